//! What can be read of a row that cannot be an event, for whoever keeps it until somebody has mended it.

use super::error::Problem;
use super::event::{Headers, OutboxEvent, Scratch};
use super::extract::Extractor;
use super::time::Instant;
use super::value::{self, Bytes};
use super::{Role, headers};
use crate::pgoutput::Tuple;

/// Everything of a row that reads; what does not is left out.
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
            | Self::TopicDots
            | Self::TopicPartition
            | Self::TopicShape
            | Self::Envelope(_) => true,
            Self::Unchanged
            | Self::ColumnCount { .. }
            | Self::NotUtf8
            | Self::BinaryType { .. }
            | Self::BinaryValue { .. }
            | Self::NotHex => false,
        }
    }
}

impl Extractor {
    /// Reads what reads of a row that [`Extractor::extract`] or [`Extractor::topic`] has refused. Rare, so it may cost.
    pub fn salvage(&mut self, tuple: &Tuple<'_>) -> Salvaged {
        let slots = self.slots(tuple);
        let text = |role: Role| {
            let mut arena = String::new();
            let piece = self.text(&slots, role, &mut arena).ok().flatten()?;
            Some(piece.resolve(&arena).to_owned())
        };
        let (mut arena, mut decoded) = (String::new(), Vec::new());
        let payload = self.optional(Role::Payload, &slots, |column, oid| {
            value::bytes(column, oid, &mut arena, &mut decoded)
        });
        let payload = payload.ok().flatten().map(|payload| match payload {
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
        let topic = self.topic(tuple, &event).ok().map(str::to_owned);
        let properties = event
            .properties()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
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
