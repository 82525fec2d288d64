//! A route: a topic as the router names it, and the broker topics behind it: itself, or its partitions.
//!
//! How many partitions there are is known only when a broker has said so. Until then, and while a partition count changes (see `shape`),
//! the route's events are *held*: kept whole, in order, counted in the producer's limits, and without a sequence id. So a
//! topic whose metadata cannot be had delays its own events only.

use std::collections::VecDeque;
use std::time::Duration;

use pulsar::message::proto::SingleMessageMetadata;
use tokio::time::Instant;

use super::outgoing::{Outgoing, RowTag};
use super::trouble::Trouble;
use super::{Placed, Producer};
use crate::ack::TxnNo;
use crate::meter::TopicId;
use crate::outbox::{RowNumber, key_hash};
use crate::pulsar::rows::{Row, Rows};
use crate::retry::Backoff;
use crate::{Error, Lsn, Result};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Route {
    pub name: String,
    pub state: State,
    /// Broker topics by partition; one for a topic without partitions.
    pub topics: Vec<usize>,
    /// Zero for a topic without.
    pub partitions: u32,
    /// All that it has had.
    pub every_topic: Vec<usize>,
    /// How many lanes these have.
    pub lanes: usize,
    pub held: VecDeque<Held>,
    pub question: Question,
    /// Paces questions that are not answered.
    pub backoff: Backoff,
    /// Why they are not.
    pub trouble: Option<Trouble>,
    /// Why its events are diverted although nothing is known of it.
    pub refused: Option<String>,
    /// How many events were diverted when the last one was that waited here.
    pub last_diverted: u64,
    /// The transaction of that event: what it has here beyond that one is diverted too (see `diversion`).
    pub unrouted: Option<Lsn>,
    /// When the partitions are counted again.
    pub refresh_at: Instant,
    /// When its first event came.
    pub since: Instant,
    /// Its place in the meter.
    pub metered: TopicId,
}

/// What is known of a route's partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing yet.
    Unknown,
    Known,
    /// There are that many now, and what was sent by the old count awaits its receipts.
    Changing {
        to: u32,
        /// Some of the old partitions are no more: the names of the new producers must be ones that were never used.
        anew: bool,
    },
}

/// The question for the partitions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Question {
    /// The number of the one that is not answered yet.
    pub asked: Option<u64>,
    /// The number of the last that was answered, and when.
    pub answered: Option<(u64, Instant)>,
    /// It is asked again then.
    pub again_at: Option<Instant>,
    /// The last answer was this, and is to be confirmed by a second one.
    pub suspect: Option<u32>,
    /// Since when the broker has said that there is no such topic.
    pub missing_since: Option<Instant>,
}

impl Route {
    pub(super) fn new(name: String, metered: TopicId, backoff: Backoff, now: Instant) -> Self {
        Self {
            name,
            state: State::Unknown,
            topics: Vec::new(),
            partitions: 0,
            every_topic: Vec::new(),
            lanes: 0,
            held: VecDeque::new(),
            question: Question::default(),
            backoff,
            trouble: None,
            refused: None,
            last_diverted: 0,
            unrouted: None,
            refresh_at: now,
            since: now,
            metered,
        }
    }

    /// An event may pass by those that are held only when there are none.
    pub(super) fn is_open(&self) -> bool {
        self.state == State::Known && self.held.is_empty()
    }

    /// The broker's names of `partitions` partitions; of the topic itself when there are none.
    pub(super) fn topic_names(&self, partitions: u32) -> Vec<String> {
        match partitions {
            0 => vec![self.name.clone()],
            n => (0..n)
                .map(|partition| format!("{}-partition-{partition}", self.name))
                .collect(),
        }
    }
}

/// How long a topic that is asked about for the first time may keep the others waiting.
const FIRST_ANSWER: Duration = Duration::from_secs(2);

/// What the names of a topic's producers end in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Naming {
    /// A checksum of all that decides which lane and ordinal an event gets.
    pub(super) routing: u32,
    /// In which the sequence ids count.
    pub(super) epoch: u64,
}

impl std::fmt::Display for Naming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.routing)?;
        match self.epoch {
            0 => Ok(()),
            epoch => write!(f, ".{epoch:x}"),
        }
    }
}

impl Producer {
    /// True while the answer about a new topic may come any moment. One that cannot be had soon must not hold up the others.
    pub(super) fn is_asking(&self) -> bool {
        let latest = self.asking.last();
        latest.is_some_and(|(since, _)| self.now.at - *since < FIRST_ANSWER)
    }

    pub(super) fn route(&mut self, name: &str) -> usize {
        let last = self.routes.get(self.last_route);
        if last.is_some_and(|route| route.name == name) {
            return self.last_route;
        }
        self.last_route = if let Some(&index) = self.route_index.get(name) {
            index
        } else {
            let metered = self.settings.meter.topic(name);
            let (initial, max) = self.settings.reconnect;
            let backoff = Backoff::new(initial, max);
            let route = Route::new(name.to_owned(), metered, backoff, self.now.at);
            let index = self.routes.insert(|_, _| route);
            self.asking.insert((self.now.at, index));
            self.route_index.insert(name.to_owned(), index);
            self.ask(index);
            index
        };
        self.last_route
    }

    /// Keeps an event that cannot go into its lane yet.
    pub(super) fn hold(&mut self, route: usize, held: Held) {
        self.in_flight_messages += 1;
        self.held_messages += 1;
        self.in_flight_bytes += held.bytes;
        let it = &mut self.routes[route];
        it.held.push_back(held);
        if it.state == State::Known {
            self.releasable.insert(route);
        }
    }

    /// Puts held events into their lanes, as far as may be now. An error names the row that can never be published.
    pub(super) fn release(&mut self) -> Result<()> {
        while let Some(&index) = self.releasable.first() {
            while self.routes[index].state == State::Known {
                let Some(held) = self.routes[index].held.pop_front() else {
                    break;
                };
                let placed = self
                    .place(index, held.key_hash, &held.outgoing(), &held.properties())
                    .map_err(|error| {
                        let row = held.row_id();
                        Error::refused(format!("the row with id {row} cannot be published"))
                            .caused_by(error)
                    })?;
                if placed == Placed::NotNow {
                    self.routes[index].held.push_front(held);
                    break;
                }
                // From now on its lane counts it.
                self.in_flight_messages -= 1;
                self.held_messages -= 1;
                self.in_flight_bytes -= held.bytes;
            }
            self.releasable.remove(&index);
        }
        Ok(())
    }
}

/// An event that waits for its partition; the one place where events are kept as values of their own.
#[derive(Debug)]
pub struct Held {
    /// The message key.
    pub key: String,
    /// `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// In order.
    pub properties: Vec<(String, String)>,
    /// Unix time in milliseconds.
    pub event_time_ms: u64,
    /// Delayed delivery, Unix time in milliseconds.
    pub deliver_at_ms: Option<i64>,
    /// The event's transaction.
    pub txn: TxnNo,
    /// Start of its commit record.
    pub commit_lsn: Lsn,
    /// The event's row.
    pub row: RowTag,
    /// The row whose id is to be told; one or none.
    pub(super) mark: Rows,
    pub(super) key_hash: u64,
    /// What it counts for in the limits while it is kept like this: what it has allocated.
    pub bytes: usize,
}

/// What an allocation takes beside its bytes, about.
const ALLOCATION: usize = 16;

impl Held {
    pub(super) fn new<'p>(
        event: &Outgoing<'_>,
        key_hash: u64,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
    ) -> Self {
        let properties: Vec<_> = properties
            .clone()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let mut mark = Rows::default();
        if let Some(its) = event.mark {
            mark.push(its);
        }
        let text: usize = properties.iter().map(|(n, v)| n.len() + v.len()).sum();
        let bytes = size_of::<Self>()
            + properties.capacity() * size_of::<(String, String)>()
            + (3 + 2 * properties.len()) * ALLOCATION
            + event.key.len()
            + text
            + mark.memory()
            + event.payload.map_or(0, <[u8]>::len);
        Self {
            key: event.key.to_owned(),
            payload: event.payload.map(<[u8]>::to_vec),
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            txn: event.txn,
            commit_lsn: event.commit_lsn,
            row: event.row,
            mark,
            key_hash,
            bytes,
            properties,
        }
    }

    /// A message taken out of a batch again; `entry` is all of it.
    pub(super) fn from_message(
        metadata: &SingleMessageMetadata,
        entry: &[u8],
        deliver_at_ms: Option<i64>,
        (txn, commit_lsn, row): (TxnNo, Lsn, RowTag),
        mark: Option<Row<'_>>,
    ) -> Self {
        let payload_len = usize::try_from(metadata.payload_size).unwrap_or(0);
        let payload = &entry[entry.len().saturating_sub(payload_len)..];
        let payload = (!metadata.null_value()).then_some(payload);
        let key = metadata.partition_key.as_deref().unwrap_or_default();
        let event = Outgoing {
            key,
            payload,
            event_time_ms: metadata.event_time(),
            deliver_at_ms,
            txn,
            commit_lsn,
            row,
            mark,
        };
        let pairs = metadata.properties.iter();
        let properties = pairs.map(|pair| (pair.key.as_str(), pair.value.as_str()));
        Self::new(&event, key_hash(key.as_bytes()), &properties)
    }

    pub(super) fn outgoing(&self) -> Outgoing<'_> {
        Outgoing {
            key: &self.key,
            payload: self.payload.as_deref(),
            event_time_ms: self.event_time_ms,
            deliver_at_ms: self.deliver_at_ms,
            txn: self.txn,
            commit_lsn: self.commit_lsn,
            row: self.row,
            mark: self.mark(),
        }
    }

    /// Which of its table's rows with its id it is, where receipts tell rows.
    pub fn number(&self) -> RowNumber {
        self.mark().map_or(RowNumber::Unknown, |row| row.number)
    }

    /// Its row's `txid`, where that is told and there is one.
    pub fn txid(&self) -> Option<u64> {
        self.mark().and_then(|row| row.txid)
    }

    pub(super) fn mark(&self) -> Option<Row<'_>> {
        self.mark.iter().next()
    }

    pub(super) fn properties(&self) -> impl Iterator<Item = (&str, &str)> + Clone {
        let pairs = self.properties.iter();
        pairs.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The id of its row, to name it in an error.
    pub(super) fn row_id(&self) -> &str {
        let mut properties = self.properties();
        properties
            .find(|(name, _)| *name == "id")
            .map_or("?", |(_, id)| id)
    }
}
