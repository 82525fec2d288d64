//! `OutboxEvent`: one row as a message, borrowed from the read buffer and a [`Scratch`].

use std::fmt;

use super::headers::Span;
use super::value::RepeatedText;

/// What a `Scratch` keeps of its memory from one row to the next; one huge row must not hold its size for ever.
const KEPT_BYTES: usize = 1024 * 1024;
/// The same for the list of properties.
const KEPT_HEADERS: usize = 4096;

/// Memory that extraction uses over and over: one for each task that extracts.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Texts made from binary values, and the properties.
    pub(super) text: String,
    /// A payload decoded from `bytea` text.
    pub(super) bytes: Vec<u8>,
    pub(super) headers: Vec<Span>,
    /// Of the columns aggregatetype and type; not cleared.
    pub(super) repeated: [RepeatedText; 2],
}

impl Scratch {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(KEPT_BYTES);
        self.bytes.clear();
        self.bytes.shrink_to(KEPT_BYTES);
        self.headers.clear();
        self.headers.shrink_to(KEPT_HEADERS);
    }
}

/// One outbox row as a message.
#[derive(Clone, Copy)]
pub struct OutboxEvent<'a> {
    /// The message id: a uuid in canonical lower case, or whatever text the column has.
    pub id: &'a str,
    /// What the event is about; `None` without such a column, or where it is NULL.
    pub aggregatetype: Option<&'a str>,
    /// The message key.
    pub aggregateid: &'a str,
    /// The event's type; `None` without such a column, or where it is NULL.
    pub event_type: Option<&'a str>,
    /// The message's bytes; `None` is a tombstone, which is not the same as no bytes.
    pub payload: Option<&'a [u8]>,
    /// The headers column.
    pub headers: Headers<'a>,
    /// The row's own topic, as it stands there (see [`super::Extractor::topic`]).
    pub topic: Option<&'a str>,
    /// Not to be delivered before this: milliseconds since 1970 UTC, rounded up; may be past.
    pub deliver_at_ms: Option<i64>,
    /// When it happened: milliseconds since 1970 UTC, rounded down. 0, which Pulsar takes for "not set", without such a
    /// column, where it is NULL, or before 1970.
    pub event_time_ms: u64,
    /// The row's `txid` column: the transaction that inserted it. `None` without such a column of type `xid8`, or where it is NULL.
    pub txid: Option<u64>,
}

impl<'a> OutboxEvent<'a> {
    /// The message's properties: `id`, `type`, `aggregatetype` and the headers.
    ///
    /// A header does not replace a property that comes from a column of its own: a consumer relies on `id`.
    pub fn properties(&self) -> impl Iterator<Item = (&'a str, &'a str)> + Clone + use<'a> {
        let named = |name: &'static str, value: Option<&'a str>| value.map(|value| (name, value));
        let event_type = named("type", self.event_type);
        let aggregatetype = named("aggregatetype", self.aggregatetype);
        let (has_type, has_aggregatetype) = (event_type.is_some(), aggregatetype.is_some());
        let is_own = move |name: &str| match name {
            "id" => true,
            "type" => has_type,
            "aggregatetype" => has_aggregatetype,
            _ => false,
        };
        std::iter::once(("id", self.id))
            .chain(event_type)
            .chain(aggregatetype)
            .chain(self.headers.iter().filter(move |(name, _)| !is_own(name)))
    }
}

impl fmt::Debug for OutboxEvent<'_> {
    /// Shows the payload's length and the headers' number only: an event may reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxEvent")
            .field("id", &self.id)
            .field("aggregatetype", &self.aggregatetype)
            .field("aggregateid", &self.aggregateid)
            .field("event_type", &self.event_type)
            .field("payload_bytes", &self.payload.map(<[u8]>::len))
            .field("headers", &self.headers.len())
            .field("topic", &self.topic)
            .field("deliver_at_ms", &self.deliver_at_ms)
            .field("event_time_ms", &self.event_time_ms)
            .finish()
    }
}

/// The properties from the headers column.
#[derive(Clone, Copy, Default)]
pub struct Headers<'a> {
    pub(super) arena: &'a str,
    pub(super) spans: &'a [Span],
}

impl<'a> Headers<'a> {
    /// Name and value of each, in the column's order.
    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a str)> + Clone + use<'a> {
        let Self { arena, spans } = *self;
        spans.iter().map(move |span| {
            (
                arena.get(span.name.clone()).unwrap_or_default(),
                arena.get(span.value.clone()).unwrap_or_default(),
            )
        })
    }

    /// The number of properties.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// True when the column gives none.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
}

impl fmt::Debug for Headers<'_> {
    /// Names only: the values belong to the application.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|(name, _)| name))
            .finish()
    }
}
