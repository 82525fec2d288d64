//! `Router`: which topic the rows of one table go to.
//!
//! Keeps the topic of the row before, and the values that it was made of: nearly always the next row has the same, and then
//! nothing is written and nothing is checked.

use super::columns::{Columns, Role};
use super::error::Problem;
use super::extract::listed;
use super::topic::{TopicTemplate, own_topic_into};
use super::value;
use crate::pgoutput::{Column, Relation, Tuple};
use crate::{Error, Result};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(super) struct Router {
    template: TopicTemplate,
    /// For each placeholder of the template.
    columns: Vec<RouteColumn>,
    /// The topic that the template last gave; empty when it gave none.
    topic: String,
    own: OwnTopic,
}

/// A column that a placeholder means.
#[derive(Clone, Debug)]
struct RouteColumn {
    index: usize,
    type_oid: u32,
    /// Its value in `Router::topic`, and whether that was in binary format.
    value: Vec<u8>,
    is_binary: bool,
}

/// The topic that a row last had in its own topic column.
#[derive(Clone, Debug, Default)]
struct OwnTopic {
    /// As it stands there; empty when there was none, which no topic is.
    written: String,
    full: String,
}

/// Which column does not give a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Culprit {
    /// The row's own topic.
    Own,
    /// The column in this place.
    Column(usize),
}

impl Router {
    /// Finds the columns that the template names.
    ///
    /// # Errors
    /// A configuration error, when `relation` lacks one.
    pub(super) fn new(
        relation: &Relation,
        columns: &Columns,
        template: &TopicTemplate,
    ) -> Result<Self> {
        let columns = template
            .placeholders()
            .map(|placeholder| RouteColumn::find(relation, columns, placeholder))
            .collect::<Result<_>>()?;
        Ok(Self {
            template: template.clone(),
            columns,
            topic: String::new(),
            own: OwnTopic::default(),
        })
    }

    /// The columns that the template names, by place and type.
    pub(super) fn columns(&self) -> impl Iterator<Item = (usize, u32)> {
        self.columns
            .iter()
            .map(|column| (column.index, column.type_oid))
    }

    /// Finds the topic of a row that has `own` in its topic column; [`topic`](Self::topic) has it then.
    ///
    /// # Errors
    /// The column whose value cannot stand in a topic name, and why.
    #[inline]
    pub(super) fn route(
        &mut self,
        tuple: &Tuple<'_>,
        own: Option<&str>,
    ) -> Result<(), (Culprit, Problem)> {
        if let Some(own) = own {
            let routed = self.own.route(own);
            return routed.map_err(|problem| (Culprit::Own, problem));
        }
        if self.topic.is_empty() || !self.columns.iter().all(|column| column.is_same(tuple)) {
            self.render(tuple)?;
        }
        Ok(())
    }

    /// Full name of the topic of the row that was routed last.
    #[inline]
    pub(super) fn topic(&self, has_own: bool) -> &str {
        if has_own { &self.own.full } else { &self.topic }
    }

    fn render(&mut self, tuple: &Tuple<'_>) -> Result<(), (Culprit, Problem)> {
        let columns = &mut self.columns;
        self.template
            .render_into(&mut self.topic, |placeholder, out| {
                let column = columns.get_mut(placeholder).ok_or(Problem::Null)?;
                let value = tuple.columns().nth(column.index).ok_or(Problem::Null)?;
                value::append_text(value, column.type_oid, out)?;
                column.keep(value);
                Ok(())
            })
            .map_err(|(placeholder, problem)| {
                let column = columns.get(placeholder).map_or(0, |column| column.index);
                (Culprit::Column(column), problem)
            })
    }
}

impl RouteColumn {
    fn find(relation: &Relation, columns: &Columns, placeholder: &str) -> Result<Self> {
        let name = columns.resolve(placeholder);
        let mut found = relation.columns.iter().enumerate();
        found
            .find(|(_, column)| column.name == name)
            .map(|(index, column)| Self {
                index,
                type_oid: column.type_oid,
                value: Vec::new(),
                is_binary: false,
            })
            .ok_or_else(|| {
                let role = Role::ALL.into_iter().find(|r| r.name() == placeholder);
                let setting = role.map_or("", Role::env_var);
                let or = if role.is_some() { " or " } else { "" };
                Error::config(format!(
                    "table {relation} has no published column \"{name}\", which the topic template names as \
                     {{{placeholder}}} (it publishes: {})",
                    listed(relation)
                ))
                .hint(format!(
                    "set WALPOST_TOPIC{or}{setting} so that the topic comes from a column that the table has"
                ))
            })
    }

    /// Whether the row has the kept value here. (The same bytes in the other format may mean something else.)
    #[inline]
    fn is_same(&self, tuple: &Tuple<'_>) -> bool {
        match tuple.columns().nth(self.index) {
            Some(Column::Text(bytes)) => !self.is_binary && self.value == bytes,
            Some(Column::Binary(bytes)) => self.is_binary && self.value == bytes,
            _ => false,
        }
    }

    fn keep(&mut self, value: Column<'_>) {
        if let Column::Text(bytes) | Column::Binary(bytes) = value {
            self.is_binary = matches!(value, Column::Binary(_));
            self.value.clear();
            self.value.extend_from_slice(bytes);
        }
    }
}

impl OwnTopic {
    fn route(&mut self, own: &str) -> Result<(), Problem> {
        if own.is_empty() || self.written != own {
            self.written.clear();
            own_topic_into(own, &mut self.full)?;
            self.written.push_str(own);
        }
        Ok(())
    }
}
