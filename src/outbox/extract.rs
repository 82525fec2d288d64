//! `Extractor`: turns the rows of one outbox table into events.
//!
//! Made once for each `Relation` message (a table's columns may change under way), from the configured column names and
//! the topic template; from then on a row costs one walk over its columns and, while its scratch memory suffices, no
//! allocation. Columns that nobody reads are passed over, and those behind the last one that is read not even visited.

use super::columns::{Columns, Role};
use super::error::{EventError, Problem};
use super::event::{Headers, OutboxEvent, Scratch};
use super::identity::NumberColumn;
use super::router::{Culprit, Router};
use super::topic::TopicTemplate;
use super::value::{self, Bytes, Piece, binary_safe};
use super::{headers, time::Instant};
use crate::pgoutput::types::{
    self, BPCHAR, JSON, JSONB, TEXT, TIMESTAMP, TIMESTAMPTZ, VARCHAR, XID8,
};
use crate::pgoutput::{Column, Relation, RelationColumn, Tuple};
use crate::{Error, Result};

/// A power of two, so that a slot needs no bounds check: one for each role, and the three below.
const SLOTS: usize = 16;
/// The slot of a column that nobody reads.
const UNREAD: u8 = 13;
/// The slot of the column `txid`, unless it has a role as well.
const TXID_SLOT: u8 = 14;
/// The slot of a role whose column the table does not have: always NULL.
const ABSENT: u8 = 15;
const _: () = assert!(Role::ALL.len() <= UNREAD as usize);
/// The column with the id of the inserting transaction, of type `xid8`.
const TXID: &str = "txid";
/// Characters of a row's id in an error.
const ID_SHOWN_CHARS: usize = 100;

/// The values of the columns, by slot.
pub(super) type Slots<'a> = [Column<'a>; SLOTS];

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
    /// Where the row's `txid` is; [`ABSENT`] in a table that has none.
    txid_slot: u8,
    columns: Columns,
    router: Router,
    number: Option<NumberColumn>,
}

#[derive(Clone, Copy, Debug)]
struct RoleColumn {
    slot: u8,
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
                slot: *place,
                type_oid: column.type_oid,
            };
        }
        let mut txid_slot = ABSENT;
        for (place, column) in plan.iter_mut().zip(&relation.columns) {
            if column.name == TXID && column.type_oid == XID8 {
                if *place == UNREAD {
                    *place = TXID_SLOT;
                }
                txid_slot = *place;
            }
        }
        while plan.pop_if(|slot| *slot == UNREAD).is_some() {}
        let router = Router::new(relation, columns, template)?;
        Ok(Self {
            relation_id: relation.id,
            table: relation.to_string(),
            column_names: relation.columns.iter().map(|c| c.name.clone()).collect(),
            plan,
            roles,
            txid_slot,
            columns: columns.clone(),
            router,
            number: NumberColumn::find(relation),
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

    /// The column that tells rows with the same id apart, if there is one.
    pub fn number_column(&self) -> Option<NumberColumn> {
        self.number
    }

    /// The roles without a column: what they bring is off.
    pub fn missing(&self) -> impl Iterator<Item = Role> {
        Role::ALL
            .into_iter()
            .filter(|role| self.roles[role.index()].slot == ABSENT)
    }

    /// Whether the column in this place is read.
    pub fn reads(&self, index: usize) -> bool {
        let is_planned = self.plan.get(index).is_some_and(|slot| *slot != UNREAD);
        let is_number = self.number.is_some_and(|number| number.index() == index);
        is_planned || is_number || self.router.columns().any(|(place, _)| place == index)
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
            .router
            .columns()
            .map(|(index, oid)| (self.column_name(index), oid));
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
        let id = self.at(Role::Id, &slots, |column, oid| {
            value::text(column, oid, arena)
        })?;
        let aggregateid = self.at(Role::AggregateId, &slots, |column, oid| {
            value::text(column, oid, arena)
        })?;
        let [kept_aggregatetype, kept_type] = &mut scratch.repeated;
        let aggregatetype = self.optional(Role::AggregateType, &slots, |column, oid| {
            kept_aggregatetype.read(column, oid, arena)
        })?;
        let event_type = self.optional(Role::Type, &slots, |column, oid| {
            kept_type.read(column, oid, arena)
        })?;
        let topic = self.text(&slots, Role::Topic, arena)?;
        let payload = self.optional(Role::Payload, &slots, |column, oid| {
            value::bytes(column, oid, arena, &mut scratch.bytes)
        })?;
        if let Some(json) = self.text(&slots, Role::Headers, arena)? {
            self.at(Role::Headers, &slots, |_, _| match json {
                Piece::Row(json) => headers::parse(json, arena, &mut scratch.headers),
                Piece::Arena(_) => Err(Problem::HeadersNotObject),
            })?;
        }
        let deliver_at = self.optional(Role::DeliverAt, &slots, value::instant)?;
        let created_at = self.optional(Role::CreatedAt, &slots, value::instant)?;

        // Nothing is added to the scratch from here on: what was made in it can be lent out.
        let Scratch {
            text: arena,
            bytes,
            headers: spans,
            repeated: [kept_aggregatetype, kept_type],
        } = scratch;
        let (arena, spans) = (arena.as_str(), spans.as_slice());
        Ok(OutboxEvent {
            id: id.resolve(arena),
            aggregatetype: aggregatetype.map(|text| kept_aggregatetype.resolve(text, arena)),
            aggregateid: aggregateid.resolve(arena),
            event_type: event_type.map(|text| kept_type.resolve(text, arena)),
            payload: payload.map(|payload| match payload {
                Bytes::Row(bytes) => bytes,
                Bytes::Text(piece) => piece.resolve(arena).as_bytes(),
                Bytes::Decoded => bytes.as_slice(),
            }),
            headers: Headers { arena, spans },
            topic: topic.map(|piece| piece.resolve(arena)),
            deliver_at_ms: deliver_at.map(Instant::ceil_ms),
            event_time_ms: created_at.map_or(0, |at| u64::try_from(at.floor_ms()).unwrap_or(0)),
            txid: xid(in_slot(&slots, self.txid_slot)),
        })
    }

    /// The row's `txid`, of a row that is no event; `None` where it is NULL or there is no such column.
    pub fn txid(&self, tuple: &Tuple<'_>) -> Option<u64> {
        xid(in_slot(&self.slots(tuple), self.txid_slot))
    }

    /// Full name of the topic for `event`, which must come from `tuple`: the row's own topic where it has one, else the
    /// template's.
    ///
    /// # Errors
    /// When a value cannot stand in a topic name.
    #[inline]
    pub fn topic(
        &mut self,
        tuple: &Tuple<'_>,
        event: &OutboxEvent<'_>,
    ) -> Result<&str, EventError> {
        if let Err((culprit, problem)) = self.router.route(tuple, event.topic) {
            let name = match culprit {
                Culprit::Own => self.columns.name(Role::Topic),
                Culprit::Column(index) => self.column_name(index),
            };
            return Err(self.error(&self.slots(tuple), name.to_owned(), problem));
        }
        Ok(self.router.topic(event.topic.is_some()))
    }

    #[inline]
    pub(super) fn slots<'a>(&self, tuple: &Tuple<'a>) -> Slots<'a> {
        let mut slots = [Column::Null; SLOTS];
        let mut columns = tuple.columns();
        for &slot in &self.plan {
            let Some(column) = columns.next() else { break };
            slots[usize::from(slot) % SLOTS] = column;
        }
        slots
    }

    /// Reads the column of `role`; what `read` finds wrong becomes an error that names row and column.
    #[expect(
        clippy::inline_always,
        reason = "the error is made out of line, so that what is left is a call of `read`"
    )]
    #[inline(always)]
    pub(super) fn at<'a, T>(
        &self,
        role: Role,
        slots: &Slots<'a>,
        read: impl FnOnce(Column<'a>, u32) -> Result<T, Problem>,
    ) -> Result<T, EventError> {
        let RoleColumn { slot, type_oid } = self.roles[role.index()];
        read(in_slot(slots, slot), type_oid)
            .map_err(|problem| self.role_error(slots, role, problem))
    }

    /// The same for a column that may be NULL, which is `None`.
    #[expect(
        clippy::inline_always,
        reason = "half of the columns are NULL as a rule, which is then a comparison and no call"
    )]
    #[inline(always)]
    pub(super) fn optional<'a, T>(
        &self,
        role: Role,
        slots: &Slots<'a>,
        read: impl FnOnce(Column<'a>, u32) -> Result<T, Problem>,
    ) -> Result<Option<T>, EventError> {
        match in_slot(slots, self.roles[role.index()].slot) {
            Column::Null => Ok(None),
            _ => self.at(role, slots, read).map(Some),
        }
    }

    #[inline]
    pub(super) fn text<'a>(
        &self,
        slots: &Slots<'a>,
        role: Role,
        arena: &mut String,
    ) -> Result<Option<Piece<'a>>, EventError> {
        self.optional(role, slots, |column, oid| value::text(column, oid, arena))
    }

    fn column_name(&self, index: usize) -> &str {
        self.column_names.get(index).map_or("", String::as_str)
    }

    #[cold]
    #[inline(never)]
    fn role_error(&self, slots: &Slots<'_>, role: Role, problem: Problem) -> EventError {
        self.error(slots, self.columns.name(role).to_owned(), problem)
    }

    #[cold]
    fn error(&self, slots: &Slots<'_>, column: String, problem: Problem) -> EventError {
        let RoleColumn { slot, type_oid } = self.roles[Role::Id.index()];
        let mut arena = String::new();
        let shown = |text: &str| {
            let shown = text.chars().take(ID_SHOWN_CHARS);
            shown.flat_map(char::escape_debug).collect()
        };
        let row_id = match value::text(in_slot(slots, slot), type_oid, &mut arena) {
            Ok(piece) => shown(piece.resolve(&arena)),
            Err(Problem::Null) => "NULL".to_owned(),
            Err(Problem::NotUtf8 | Problem::Unconvertible) => {
                shown(&value::escaped(in_slot(slots, slot)))
            }
            Err(_) => "(unreadable)".to_owned(),
        };
        EventError::new(self.table.clone(), row_id, column, problem)
    }
}

#[inline]
fn in_slot<'a>(slots: &Slots<'a>, slot: u8) -> Column<'a> {
    slots[usize::from(slot) % SLOTS]
}

/// A value of type `xid8`.
#[inline]
fn xid(value: Column<'_>) -> Option<u64> {
    match value {
        Column::Binary(bytes) => bytes.try_into().ok().map(u64::from_be_bytes),
        Column::Text(digits) | Column::Held(digits) if !digits.is_empty() => {
            digits.iter().try_fold(0_u64, |number, byte| {
                let digit = byte.checked_sub(b'0').filter(|digit| *digit < 10)?;
                number.checked_mul(10)?.checked_add(u64::from(digit))
            })
        }
        _ => None,
    }
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

pub(super) fn listed(relation: &Relation) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_txid_is_the_same_in_text_and_binary_and_anything_else_is_none() {
        for txid in [0, 7, 1_234_567, u64::MAX] {
            let text = txid.to_string();
            assert_eq!(xid(Column::Text(text.as_bytes())), Some(txid));
            assert_eq!(xid(Column::Held(text.as_bytes())), Some(txid));
            assert_eq!(xid(Column::Binary(&txid.to_be_bytes())), Some(txid));
        }
        for text in ["", "-1", "7x", "18446744073709551616"] {
            assert_eq!(xid(Column::Text(text.as_bytes())), None, "{text}");
        }
        for none in [Column::Null, Column::Unchanged, Column::Binary(&[0; 4])] {
            assert_eq!(xid(none), None, "{none:?}");
        }
    }
}
