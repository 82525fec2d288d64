//! A route: a topic as the router names it, and the broker topics behind it: itself, or its partitions.
//!
//! How many partitions there are is known only when a broker has said so. Until then, and while a partition count changes,
//! the route's events are *held*: kept whole, in order, counted in the publisher's limits, and without a sequence id. So a
//! topic whose metadata cannot be had delays its own events only.
//!
//! # Growth
//!
//! A topic that gets more partitions sends some keys elsewhere. The new count is taken only when everything sent under the
//! old one has its receipt, so a key's later events never overtake its earlier ones; and when everything that was diverted is
//! stored, because nothing in a new partition would wait for that. The count is part of the producers' names (see
//! `publisher`), because a key's sequence ids in its new partition must not be measured by what other keys did there before.
//! An event that was sent under the old count, and whose confirmation was lost with the process or with Postgres, therefore
//! comes again under the new one: the moment of growth is at least once, also with deduplication.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use pulsar::message::proto::SingleMessageMetadata;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use super::opener;
use super::outgoing::{Outgoing, RowTag};
use super::publisher::{Drain, Placed, Publisher, Topic};
use super::rows::{Row, Rows};
use crate::ack::TxnNo;
use crate::meter::TopicId;
use crate::outbox::{RowNumber, key_hash};
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
    pub held: VecDeque<Held>,
    pub resolver: Option<JoinHandle<()>>,
    /// Makes the resolver give up a topic that is refused.
    pub hurry: Arc<Notify>,
    /// Why its events are diverted although nothing is known of it.
    pub refused: Option<String>,
    /// How many events were diverted when the last one was that waited here.
    pub last_diverted: u64,
    /// The transaction of that event: what it has here beyond that one is diverted too (see `divert`).
    pub unrouted: Option<Lsn>,
    /// When the partitions are counted again.
    pub refresh_at: Instant,
    /// When its first event came.
    since: Instant,
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
    },
}

impl Route {
    pub(super) fn new(name: String, metered: TopicId) -> Self {
        Self {
            name,
            state: State::Unknown,
            topics: Vec::new(),
            partitions: 0,
            held: VecDeque::new(),
            resolver: None,
            hurry: Arc::default(),
            refused: None,
            last_diverted: 0,
            unrouted: None,
            refresh_at: Instant::now(),
            since: Instant::now(),
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
    routing: u32,
    /// In which the sequence ids count.
    epoch: u64,
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

impl Publisher {
    /// True while the answer about a new topic may come any moment. One that cannot be had soon must not hold up the others.
    pub(super) fn is_asking(&self) -> bool {
        let unknown = |route: &&Route| route.state == State::Unknown && route.refused.is_none();
        let mut routes = self.routes.iter().filter(unknown);
        routes.any(|route| route.since.elapsed() < FIRST_ANSWER)
    }

    pub(super) fn route(&mut self, name: &str) -> usize {
        let last = self.routes.get(self.last_route);
        if last.is_some_and(|route| route.name == name) {
            return self.last_route;
        }
        self.last_route = if let Some(&index) = self.route_index.get(name) {
            index
        } else {
            let index = self.routes.len();
            let metered = self.config.meter.topic(name);
            self.routes.push(Route::new(name.to_owned(), metered));
            self.route_index.insert(name.to_owned(), index);
            let hurry = Arc::clone(&self.routes[index].hurry);
            let shared = self.shared.clone();
            let work = opener::count_partitions(shared, index, name.to_owned(), hurry);
            self.routes[index].resolver = Some(tokio::spawn(work));
            index
        };
        self.last_route
    }

    /// Counts the partitions of topics again whose time has come. A topic without partitions never gets any.
    pub(super) fn refresh_partitions(&mut self, now: Instant) {
        for (index, route) in self.routes.iter_mut().enumerate() {
            if route.partitions > 0 && route.resolver.is_none() && route.refresh_at <= now {
                let (shared, name) = (self.shared.clone(), route.name.clone());
                let work = opener::recount_partitions(shared, index, name);
                route.resolver = Some(tokio::spawn(work));
            }
        }
    }

    /// A broker said how many partitions a route has.
    pub(super) fn partitions_counted(&mut self, index: usize, partitions: u32) {
        let refresh_at = Instant::now() + self.config.partition_refresh;
        let route = &mut self.routes[index];
        route.resolver = None;
        route.refresh_at = refresh_at;
        match route.state {
            State::Known if route.partitions == partitions => {}
            // Not lanes of the same names anew: they would begin to count in mid-transaction.
            State::Changing { .. } if route.partitions == partitions => route.state = State::Known,
            State::Unknown => self.take_partitions(index, partitions),
            State::Known | State::Changing { .. } if partitions == 0 => {
                warn!(
                    topic = route.name,
                    partitions = route.partitions,
                    "a partitioned topic has no partitions any more; going on with those it had"
                );
            }
            State::Known | State::Changing { .. } => {
                info!(
                    topic = route.name,
                    from = route.partitions,
                    to = partitions,
                    "the topic's partitions have changed in number"
                );
                route.state = State::Changing { to: partitions };
                self.changing_routes = true;
            }
        }
    }

    /// They could not be counted again: later once more.
    pub(super) fn partitions_unknown(&mut self, index: usize) {
        let route = &mut self.routes[index];
        route.resolver = None;
        route.refresh_at = Instant::now() + self.config.partition_refresh;
    }

    /// Ends the changes of those routes whose lanes have got all their receipts.
    pub(super) fn finish_changes(&mut self) {
        if !self.changing_routes {
            return;
        }
        self.changing_routes = false;
        for index in 0..self.routes.len() {
            let State::Changing { to } = self.routes[index].state else {
                continue;
            };
            let topics = self.routes[index].topics.iter();
            let mut lanes = topics.flat_map(|&topic| self.topics[topic].lanes.iter().flatten());
            // An opener at work would come back with a producer of the old name.
            let busy = |topic: &usize| self.topics[*topic].opener.is_some();
            if lanes.all(|&lane| self.lanes[lane].is_empty())
                && !self.routes[index].topics.iter().any(busy)
                && self.dedicated.is_empty()
                && self.is_stored(index)
            {
                self.take_partitions(index, to);
                continue;
            }
            self.changing_routes = true;
            // More of its transaction may be held here than there is room for, and its end would never be read.
            let is_tail =
                |(lane, _): &(usize, Lsn)| self.topics[self.lanes[*lane].topic].route == index;
            if self.draining.is_none() && self.dedicated.keys().any(is_tail) {
                self.drain(Drain::AfterTail);
            }
        }
    }

    /// True when what was diverted on a route is safe.
    fn is_stored(&self, index: usize) -> bool {
        let route = &self.routes[index];
        let topics = route.topics.iter();
        let of_topics = topics.map(|&topic| self.topics[topic].last_diverted);
        of_topics.fold(route.last_diverted, u64::max) <= self.stored_events
    }

    fn take_partitions(&mut self, index: usize, partitions: u32) {
        let naming = self.naming(partitions);
        let names = self.routes[index].topic_names(partitions);
        let topics = names
            .iter()
            .map(|name| self.topic(name, naming, index))
            .collect();
        let route = &mut self.routes[index];
        route.topics = topics;
        route.partitions = partitions;
        route.state = State::Known;
    }

    /// A checksum of all that decides which lane and ordinal an event gets; see the publisher's documentation.
    fn naming(&self, partitions: u32) -> Naming {
        let config = &self.config;
        let text = format!(
            "{}\n{}\n{partitions}\n{:?}",
            config.routing, config.lanes, config.hashing
        );
        Naming {
            routing: crc32c::crc32c(text.as_bytes()),
            epoch: self.epoch,
        }
    }

    /// From now on events are of this epoch. The lanes must be empty.
    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        for topic in 0..self.topics.len() {
            let routing = self.topics[topic].naming.routing;
            self.rename(topic, Naming { routing, epoch });
        }
    }

    /// The topic of that name, whose producers' names end in `naming` from now on. Its lanes must be empty. Lanes of a name that it
    /// had before are taken up again: they know how far they have counted, and what they have written.
    fn topic(&mut self, name: &str, naming: Naming, route: usize) -> usize {
        let place = (route, name.to_owned());
        if let Some(&index) = self.topic_index.get(&place) {
            self.rename(index, naming);
            return index;
        }
        let lanes = vec![None; self.config.lanes as usize];
        let (initial, max) = self.config.reconnect;
        let index = self.topics.len();
        self.topics.push(Topic {
            name: name.to_owned(),
            lanes,
            opener: None,
            backoff: Backoff::new(initial, max),
            troubled: false,
            next_broker: None,
            naming,
            earlier_lanes: HashMap::new(),
            route,
            refused: None,
            last_diverted: 0,
        });
        self.topic_index.insert(place, index);
        index
    }

    /// See [`Publisher::topic`].
    fn rename(&mut self, index: usize, naming: Naming) {
        let topic = &mut self.topics[index];
        if topic.naming == naming {
            return;
        }
        let lanes = topic.earlier_lanes.remove(&naming);
        let lanes = lanes.unwrap_or_else(|| vec![None; self.config.lanes as usize]);
        let old = std::mem::replace(&mut topic.lanes, lanes);
        for &lane in old.iter().flatten() {
            self.lanes[lane].close();
        }
        topic.earlier_lanes.insert(topic.naming, old);
        topic.naming = naming;
    }

    /// Keeps an event that cannot go into its lane yet.
    pub(super) fn hold(&mut self, route: usize, held: Held) {
        self.in_flight_messages += 1;
        self.held_messages += 1;
        self.in_flight_bytes += held.bytes;
        self.routes[route].held.push_back(held);
    }

    /// Puts held events into their lanes, as far as may be now. An error names the row that can never be published.
    pub(super) fn release(&mut self) -> Result<()> {
        if self.held_messages == 0 {
            return Ok(());
        }
        for index in 0..self.routes.len() {
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
                    return Ok(());
                }
                // From now on its lane counts it.
                self.in_flight_messages -= 1;
                self.held_messages -= 1;
                self.in_flight_bytes -= held.bytes;
            }
        }
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Some(resolver) = &self.resolver {
            resolver.abort();
        }
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
    /// What it counts for in the limits while it is kept like this.
    pub bytes: usize,
}

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
            bytes: size_of::<Self>()
                + event.key.len()
                + text
                + event.mark.map_or(0, |row| row.id.len())
                + event.payload.map_or(0, <[u8]>::len),
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
