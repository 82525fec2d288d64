//! What can be read of a row that cannot be an event, for whoever keeps it until somebody has mended it.

use std::cell::Cell;

use super::error::Problem;
use super::event::{Headers, OutboxEvent, Scratch};
use super::extract::{Extractor, Slots};
use super::time::Instant;
use super::value::{self, Bytes};
use super::{Role, headers};
use crate::pgoutput::{Column, Tuple};

/// Everything of a row that reads; what does not is left out.
///
/// A text that is no UTF-8, or cannot be converted to it, is kept in the escape format of `bytea` (`caf\351`), so nothing of it is lost. Then there is no
/// topic: the row must not be published like this by a mere retry.
#[derive(Clone, Default)]
pub struct Salvaged {
    /// The message id.
    pub id: Option<String>,
    /// The message key.
    pub key: Option<String>,
    /// Full name of the topic.
    pub topic: Option<String>,
    /// The message's bytes.
    pub payload: Option<Vec<u8>>,
    /// The message's properties.
    pub properties: Vec<(String, String)>,
    /// Milliseconds since 1970.
    pub event_time_ms: u64,
    /// Milliseconds since 1970.
    pub deliver_at_ms: Option<i64>,
}

impl std::fmt::Debug for Salvaged {
    /// Without what belongs to the application.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Salvaged")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .finish_non_exhaustive()
    }
}

impl Problem {
    /// Whether the row itself is at fault. Otherwise it is the connection or the server, and every row would be.
    pub fn is_of_the_row(&self) -> bool {
        match self {
            Self::Null
            | Self::NotTime
            | Self::InfiniteTime
            | Self::HeadersNotObject
            | Self::HeadersNotJson
            | Self::TopicEmpty
            | Self::TopicCharacter { .. }
            | Self::NamespaceCharacter { .. }
            | Self::TopicBlankEnd
            | Self::TopicNotPersistent
            | Self::TopicDots
            | Self::TopicPartition
            | Self::TopicShape
            | Self::NotUtf8
            | Self::Unconvertible
            | Self::Envelope(_) => true,
            Self::Unchanged
            | Self::ColumnCount { .. }
            | Self::BinaryType { .. }
            | Self::BinaryValue { .. }
            | Self::NotHex => false,
        }
    }
}

impl Extractor {
    /// The row's id as its event has it, or as [`Extractor::salvage`] gives it.
    pub fn id(&self, tuple: &Tuple<'_>) -> Option<String> {
        self.kept(&self.slots(tuple), Role::Id, &Cell::new(false))
    }

    /// A text as it is kept of a row that can be no event.
    fn kept(&self, slots: &Slots<'_>, role: Role, is_escaped: &Cell<bool>) -> Option<String> {
        let mut arena = String::new();
        match self.text(slots, role, &mut arena) {
            Ok(piece) => Some(piece?.resolve(&arena).to_owned()),
            Err(error) if matches!(error.problem(), Problem::NotUtf8 | Problem::Unconvertible) => {
                is_escaped.set(true);
                self.at(role, slots, |column, _| Ok(value::escaped(column)))
                    .ok()
            }
            Err(_) => None,
        }
    }

    /// Reads what reads of a row that [`Extractor::extract`] or [`Extractor::topic`] has refused. Rare, so it may cost.
    pub fn salvage(&mut self, tuple: &Tuple<'_>) -> Salvaged {
        let slots = self.slots(tuple);
        let is_escaped = Cell::new(false);
        let text = |role| self.kept(&slots, role, &is_escaped);
        let (mut arena, mut decoded) = (String::new(), Vec::new());
        let payload = self.optional(Role::Payload, &slots, |column, oid| {
            value::bytes(column, oid, &mut arena, &mut decoded)
        });
        // As the database holds it, if it must be; but then it is published by no mere retry.
        let held = self.at(Role::Payload, &slots, |column, _| match column {
            Column::Held(bytes) if !bytes.is_ascii() => Ok(Some(Bytes::Row(bytes))),
            _ => Ok(None),
        });
        let held = held.ok().flatten();
        is_escaped.set(is_escaped.get() || held.is_some());
        let payload = payload
            .ok()
            .flatten()
            .or(held)
            .map(|payload| match payload {
                Bytes::Row(bytes) => bytes.to_vec(),
                Bytes::Text(piece) => piece.resolve(&arena).as_bytes().to_vec(),
                Bytes::Decoded => std::mem::take(&mut decoded),
            });
        let instant = |role| self.optional(role, &slots, value::instant).ok().flatten();
        let mut scratch = Scratch::new();
        let json = text(Role::Headers);
        if let Some(json) = &json
            && headers::parse(json, &mut scratch.text, &mut scratch.headers).is_err()
        {
            scratch.headers.clear();
        }
        let (id, key, own_topic) = (text(Role::Id), text(Role::AggregateId), text(Role::Topic));
        let (aggregatetype, event_type) = (text(Role::AggregateType), text(Role::Type));
        let event = OutboxEvent {
            txid: None,
            id: id.as_deref().unwrap_or_default(),
            aggregatetype: aggregatetype.as_deref(),
            aggregateid: key.as_deref().unwrap_or_default(),
            event_type: event_type.as_deref(),
            payload: None,
            headers: Headers {
                arena: &scratch.text,
                spans: &scratch.headers,
            },
            topic: own_topic.as_deref(),
            deliver_at_ms: instant(Role::DeliverAt).map(Instant::ceil_ms),
            event_time_ms: instant(Role::CreatedAt)
                .map_or(0, |at| u64::try_from(at.floor_ms()).unwrap_or(0)),
        };
        let is_escaped = is_escaped.get();
        let topic = if is_escaped {
            None
        } else {
            self.topic(tuple, &event).ok().map(str::to_owned)
        };
        let mut properties: Vec<(String, String)> = event
            .properties()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        if is_escaped {
            // What has no column of its own in the table of stragglers.
            let more = [
                (Role::Headers, json.clone()),
                (Role::Topic, own_topic.clone()),
            ];
            let more = more
                .into_iter()
                .filter_map(|(role, text)| Some((role, text?)));
            properties.extend(more.map(|(role, text)| (role.name().to_owned(), text)));
        }
        let (event_time_ms, deliver_at_ms) = (event.event_time_ms, event.deliver_at_ms);
        Salvaged {
            id,
            key,
            topic,
            payload,
            properties,
            event_time_ms,
            deliver_at_ms,
        }
    }
}
