//! `Extractor`: turns the rows of one outbox table into events.
//!
//! Made once for each `Relation` message (a table's columns may change under way), from the configured column names and
//! the topic template; from then on a row costs one walk over its columns and, while its scratch memory suffices, no
//! allocation. Columns that nobody reads are passed over, and those behind the last one that is read not even visited.

use super::columns::{Columns, Role};
use super::error::{EventError, Problem};
use super::event::{Headers, OutboxEvent, Scratch};
use super::topic::{TopicTemplate, own_topic_into};
use super::value::{self, Bytes, Piece, binary_safe};
use super::{headers, time::Instant};
use crate::pgoutput::types::{self, BPCHAR, JSON, JSONB, TEXT, TIMESTAMP, TIMESTAMPTZ, VARCHAR};
use crate::pgoutput::{Column, Relation, RelationColumn, Tuple};
use crate::{Error, Result};

/// The slot of a role whose column the table does not have: always NULL.
const ABSENT: usize = Role::ALL.len();
/// In [`Extractor::plan`]: nobody reads this column.
const UNREAD: u8 = u8::MAX;
/// Characters of a row's id in an error.
const ID_SHOWN_CHARS: usize = 100;

/// The values of the columns that have a role, by slot; the last one is [`ABSENT`].
pub(super) type Slots<'a> = [Column<'a>; ABSENT + 1];

/// Reads the rows of one outbox table.
#[derive(Clone, Debug)]
pub struct Extractor {
    relation_id: u32,
    table: String,
    column_names: Vec<String>,
    /// For each column up to the last one read: the slot its value goes to. (One column may have several roles.)
    plan: Vec<u8>,
    /// For each role: the slot its value is in, and its type.
    roles: [RoleColumn; Role::ALL.len()],
    columns: Columns,
    template: TopicTemplate,
    /// For each placeholder of the template: the column's position and type.
    route: Vec<(usize, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct RoleColumn {
    slot: usize,
    type_oid: u32,
}

impl Extractor {
    /// Finds the columns of `relation`.
    ///
    /// # Errors
    /// A configuration error naming table, column and setting, when the table lacks a required column or one that the
    /// template names, or when a column's type cannot serve its role.
    pub fn new(relation: &Relation, columns: &Columns, template: &TopicTemplate) -> Result<Self> {
        let mut plan = vec![UNREAD; relation.columns.len()];
        let mut roles = [RoleColumn {
            slot: ABSENT,
            type_oid: 0,
        }; Role::ALL.len()];
        let mut slots: u8 = 0;
        for role in Role::ALL {
            let name = columns.name(role);
            let Some((place, column)) = plan
                .iter_mut()
                .zip(&relation.columns)
                .find(|(_, column)| column.name == name)
            else {
                if role.is_required() {
                    return Err(missing(relation, role, name));
                }
                continue;
            };
            check_type(relation, role, column)?;
            if *place == UNREAD {
                *place = slots;
                slots += 1;
            }
            roles[role.index()] = RoleColumn {
                slot: usize::from(*place),
                type_oid: column.type_oid,
            };
        }
        while plan.pop_if(|slot| *slot == UNREAD).is_some() {}
        let route = template
            .placeholders()
            .map(|placeholder| route_column(relation, columns, placeholder))
            .collect::<Result<_>>()?;
        Ok(Self {
            relation_id: relation.id,
            table: relation.to_string(),
            column_names: relation.columns.iter().map(|c| c.name.clone()).collect(),
            plan,
            roles,
            columns: columns.clone(),
            template: template.clone(),
            route,
        })
    }

    /// The table's OID.
    pub fn relation_id(&self) -> u32 {
        self.relation_id
    }

    /// The table, as `schema.table`.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// The roles without a column: what they bring is off.
    pub fn missing(&self) -> impl Iterator<Item = Role> {
        Role::ALL
            .into_iter()
            .filter(|role| self.roles[role.index()].slot == ABSENT)
    }

    /// A column that is read, and its type, if that type cannot be read in binary format: then the stream must ask for
    /// text.
    pub fn needs_text(&self) -> Option<(&str, u32)> {
        let of_roles = Role::ALL
            .into_iter()
            .map(|role| (self.columns.name(role), self.roles[role.index()]))
            .filter(|(_, column)| column.slot != ABSENT)
            .map(|(name, column)| (name, column.type_oid));
        let of_route = self
            .route
            .iter()
            .map(|(index, oid)| (self.column_name(*index), *oid));
        of_roles.chain(of_route).find(|(_, oid)| !binary_safe(*oid))
    }

    /// Reads one row.
    ///
    /// `scratch` is the caller's to keep; the event borrows from it and from the row.
    ///
    /// # Errors
    /// When the row cannot be an event; the error names the row's id, the column and the reason.
    pub fn extract<'a>(
        &self,
        tuple: &Tuple<'a>,
        scratch: &'a mut Scratch,
    ) -> Result<OutboxEvent<'a>, EventError> {
        scratch.clear();
        let slots = self.slots(tuple);
        if tuple.len() != self.column_names.len() {
            let problem = Problem::ColumnCount {
                expected: self.column_names.len(),
                found: tuple.len(),
            };
            return Err(self.error(&slots, String::new(), problem));
        }
        let arena = &mut scratch.text;
        let id = self.required_text(&slots, Role::Id, arena)?;
        let aggregateid = self.required_text(&slots, Role::AggregateId, arena)?;
        let aggregatetype = self.text(&slots, Role::AggregateType, arena)?;
        let event_type = self.text(&slots, Role::Type, arena)?;
        let topic = self.text(&slots, Role::Topic, arena)?;
        let payload = self.at(Role::Payload, &slots, |column, oid| {
            value::bytes(column, oid, arena, &mut scratch.bytes)
        })?;
        if let Some(json) = self.text(&slots, Role::Headers, arena)? {
            self.at(Role::Headers, &slots, |_, _| match json {
                Piece::Row(json) => headers::parse(json, arena, &mut scratch.headers),
                Piece::Arena(_) => Err(Problem::HeadersNotObject),
            })?;
        }
        let deliver_at = self.at(Role::DeliverAt, &slots, value::instant)?;
        let created_at = self.at(Role::CreatedAt, &slots, value::instant)?;

        // Nothing is added to the scratch from here on: what was made in it can be lent out.
        let Scratch {
            text: arena,
            bytes,
            headers: spans,
        } = scratch;
        let (arena, spans) = (arena.as_str(), spans.as_slice());
        Ok(OutboxEvent {
            id: id.resolve(arena),
            aggregatetype: aggregatetype.map(|piece| piece.resolve(arena)),
            aggregateid: aggregateid.resolve(arena),
            event_type: event_type.map(|piece| piece.resolve(arena)),
            payload: payload.map(|payload| match payload {
                Bytes::Row(bytes) => bytes,
                Bytes::Text(piece) => piece.resolve(arena).as_bytes(),
                Bytes::Decoded => bytes.as_slice(),
            }),
            headers: Headers { arena, spans },
            topic: topic.map(|piece| piece.resolve(arena)),
            deliver_at_ms: deliver_at.map(Instant::ceil_ms),
            event_time_ms: created_at.map_or(0, |at| u64::try_from(at.floor_ms()).unwrap_or(0)),
        })
    }

    /// Writes the full name of the topic for `event`, which must come from `tuple`, into `out`, in place of what was
    /// there: the row's own topic where it has one, else the template's.
    ///
    /// # Errors
    /// When a value cannot stand in a topic name; `out` is then empty.
    pub fn topic_into(
        &self,
        tuple: &Tuple<'_>,
        event: &OutboxEvent<'_>,
        out: &mut String,
    ) -> Result<(), EventError> {
        if let Some(topic) = event.topic {
            return own_topic_into(topic, out).map_err(|problem| {
                let name = self.columns.name(Role::Topic).to_owned();
                self.error(&self.slots(tuple), name, problem)
            });
        }
        self.template
            .render_into(out, |placeholder, out| {
                let (index, oid) = self.route.get(placeholder).ok_or(Problem::Null)?;
                let column = tuple.columns().nth(*index).ok_or(Problem::Null)?;
                value::append_text(column, *oid, out)
            })
            .map_err(|(placeholder, problem)| {
                let index = self.route.get(placeholder).map_or(0, |(index, _)| *index);
                let name = self.column_name(index).to_owned();
                self.error(&self.slots(tuple), name, problem)
            })
    }

    #[inline]
    pub(super) fn slots<'a>(&self, tuple: &Tuple<'a>) -> Slots<'a> {
        let mut slots = [Column::Null; ABSENT + 1];
        for (&slot, column) in self.plan.iter().zip(tuple.columns()) {
            if let Some(place) = slots.get_mut(usize::from(slot)) {
                *place = column;
            }
        }
        slots
    }

    /// Reads the column of `role`; what `read` finds wrong becomes an error that names row and column.
    #[inline]
    pub(super) fn at<'a, T>(
        &self,
        role: Role,
        slots: &Slots<'a>,
        read: impl FnOnce(Column<'a>, u32) -> Result<T, Problem>,
    ) -> Result<T, EventError> {
        let RoleColumn { slot, type_oid } = self.roles[role.index()];
        read(slots[slot], type_oid)
            .map_err(|problem| self.error(slots, self.columns.name(role).to_owned(), problem))
    }

    pub(super) fn text<'a>(
        &self,
        slots: &Slots<'a>,
        role: Role,
        arena: &mut String,
    ) -> Result<Option<Piece<'a>>, EventError> {
        self.at(role, slots, |column, oid| value::text(column, oid, arena))
    }

    fn required_text<'a>(
        &self,
        slots: &Slots<'a>,
        role: Role,
        arena: &mut String,
    ) -> Result<Piece<'a>, EventError> {
        self.at(role, slots, |column, oid| {
            value::text(column, oid, arena)?.ok_or(Problem::Null)
        })
    }

    fn column_name(&self, index: usize) -> &str {
        self.column_names.get(index).map_or("", String::as_str)
    }

    #[cold]
    fn error(&self, slots: &Slots<'_>, column: String, problem: Problem) -> EventError {
        let RoleColumn { slot, type_oid } = self.roles[Role::Id.index()];
        let mut arena = String::new();
        let row_id = match value::text(slots[slot], type_oid, &mut arena) {
            Ok(Some(piece)) => {
                let text = piece.resolve(&arena);
                text.chars()
                    .take(ID_SHOWN_CHARS)
                    .flat_map(char::escape_debug)
                    .collect()
            }
            Ok(None) => "NULL".to_owned(),
            Err(_) => "(unreadable)".to_owned(),
        };
        EventError::new(self.table.clone(), row_id, column, problem)
    }
}

/// Position and type of the column that a placeholder means.
fn route_column(relation: &Relation, columns: &Columns, placeholder: &str) -> Result<(usize, u32)> {
    let name = columns.resolve(placeholder);
    let mut found = relation.columns.iter().enumerate();
    found
        .find(|(_, column)| column.name == name)
        .map(|(index, column)| (index, column.type_oid))
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

fn missing(relation: &Relation, role: Role, name: &str) -> Error {
    let setting = role.env_var();
    if name.is_empty() {
        return Error::config(format!(
            "{setting} is empty, and every event needs its {role}"
        ))
        .hint(format!("name a column of {relation}: {}", listed(relation)));
    }
    Error::config(format!(
        "table {relation} has no published column \"{name}\" for the {role} of an event (it publishes: {})",
        listed(relation)
    ))
    .hint(format!(
        "set {setting} to the column that holds it, or add the column to the table and, where the publication lists \
         columns, to the publication"
    ))
}

fn listed(relation: &Relation) -> String {
    let names: Vec<&str> = relation.columns.iter().map(|c| c.name.as_str()).collect();
    if names.is_empty() {
        return "none".to_owned();
    }
    names.join(", ")
}

/// Refuses at once a type that no row could satisfy. Types of the database's own are let through: their text may do.
fn check_type(relation: &Relation, role: Role, column: &RelationColumn) -> Result<()> {
    let (allowed, said): (&[u32], _) = match role {
        Role::DeliverAt | Role::CreatedAt => {
            (&[TIMESTAMPTZ, TIMESTAMP], "timestamptz or timestamp")
        }
        Role::Headers => (&[JSONB, JSON, TEXT, VARCHAR, BPCHAR], "jsonb, json or text"),
        _ => return Ok(()),
    };
    let oid = column.type_oid;
    if allowed.contains(&oid) || oid >= types::FIRST_USER_OID {
        return Ok(());
    }
    let found =
        types::name_of(oid).map_or_else(|| format!("the type with OID {oid}"), str::to_owned);
    Err(Error::config(format!(
        "column \"{}\" of table {relation} is {found}, but {role} must be {said}",
        column.name
    ))
    .hint(format!(
        "set {} to another column, or to nothing to do without",
        role.env_var()
    )))
}
