//! The publisher: routes, topics, lanes, limits and receipts. It lives inside the connector's one task and is driven by it;
//! nothing here is shared and nothing is locked.
//!
//! Input: events in log order ([`publish`](Publisher::publish)) and what brokers say ([`next_event`](Publisher::next_event) →
//! [`handle`](Publisher::handle)). Output: frames to broker connections, and acknowledged transactions
//! ([`take_acked`](Publisher::take_acked)).
//!
//! # Bound
//!
//! Every message counts, with its encoded bytes, from `publish` to its receipt. [`has_room`](Publisher::has_room) is false at
//! either limit; the connector then stops reading its socket, TCP stops the walsender, and Postgres waits. A broker that is
//! away is nothing but this. The events of a topic that the broker refuses are handed back to be stored elsewhere (see
//! `divert`), so that others go on; where there is nobody to store them they wait, and others go on while there is room.
//!
//! # Order
//!
//! A key always goes to the same partition and lane. A lane's frames are sent in order over one connection, and after a
//! reconnect again from the oldest without receipt. So a key's messages are stored in commit order (a frame sent twice is
//! followed by everything behind it, twice).
//!
//! # Producer names
//!
//! `<WALPOST_PRODUCER_NAME>-<system id>-<timeline>-<lane>.<routing>`. A sequence id means something only among events that
//! were numbered in the same way. Another cluster or timeline may hand out the same LSNs again; another number of lanes or
//! partitions, other tables, columns or templates send events to other lanes, where they would be measured by ids they
//! have nothing to do with, taken for old, and lost. So all of that is in the name: the last part is a checksum of the
//! routing. After such a change the events that were not confirmed before it may come twice.
//!
//! The last part also names the epoch of the log, in which sequence ids count (see `lane`). Before the first event of another epoch every
//! lane gets its receipts; then the topics' producers change. (A topic that takes nothing holds up that change, and with it all
//! topics, until its events are diverted; where nobody stores them, until it takes them.)
//!
//! What a name cannot tell is a database that was put back to an older state on the same timeline (a disk snapshot). Its log
//! then ends below what was published already; the producers know by their highest id, and nothing is sent
//! ([`Publisher::set_log_end`]). A database that is put back across the end of an epoch is noticed only by producers of the earlier epoch.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, info};

use super::auth::Auth;
use super::compression::Codec;
use super::connection::{Event, Manner};
use super::directory::Directory;
use super::divert::{Diversion, Diverted, Parked};
use super::flushing::Flush;
use super::lane::{Appended, Heard, Lane, Limits, Link, MAX_ORDINALS, epoch};
use super::memory::Memory;
use super::opener::Shared;
use super::outgoing::Outgoing;
use super::partition::HashingScheme;
use super::route::{Held, Naming, Route};
use super::rows::RowQueue;
use super::schema::SchemaConfig;
use super::tls::TlsFiles;
use super::wire::NextBroker;
use crate::ack::TxnNo;
use crate::meter::Meter;
use crate::retry::Backoff;
use crate::{Error, Lsn, Result};

/// Broker events that may wait for the connector's loop. Connections pause reading when it is full; each event is one
/// batch's receipt, and the loop takes them all at once.
const EVENT_QUEUE: usize = 1024;

/// What the publisher needs to know.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// Hosts and ports of the service URL.
    pub service: Vec<(String, u16)>,
    /// Credentials.
    pub auth: Auth,
    /// Files for TLS; `None` when the service URL is without TLS.
    pub tls: Option<TlsFiles>,
    /// A connection that is silent for this long gets a PING, and for twice as long is taken for dead.
    pub keepalive_interval: Duration,
    /// Producer names are `<producer_name>-<lane>.<routing>`.
    pub producer_name: String,
    /// All that decides which lane and ordinal an event gets, besides what this struct says: tables, columns, templates.
    pub routing: String,
    /// Lanes per topic.
    pub lanes: u32,
    /// How a key becomes a partition.
    pub hashing: HashingScheme,
    /// How often the partitions of a topic in use are counted.
    pub partition_refresh: Duration,
    /// A producer that has had nothing to send for this long is closed.
    pub producer_idle: Duration,
    /// How batches are compressed.
    pub compression: Codec,
    /// When events are taken out that cannot be published; `None`: never.
    pub diversion: Option<Diversion>,
    /// What producers are opened with.
    pub schema: Option<SchemaConfig>,
    /// A batch is full at this many messages.
    pub batch_max_messages: u32,
    /// A batch is full at this many bytes.
    pub batch_max_bytes: usize,
    /// A batch waits at most this long for company.
    pub batch_linger: Duration,
    /// Room for messages without receipt.
    pub max_in_flight_messages: usize,
    /// Room for their bytes.
    pub max_in_flight_bytes: usize,
    /// Without a receipt for this long, while one is due, the connection is taken for dead.
    pub send_timeout: Duration,
    /// Where the rows of acknowledged events (`Outgoing::mark`) go, if anywhere; a full queue stops the intake.
    pub rows: Option<RowQueue>,
    /// Told of receipts and of lost connections.
    pub meter: Arc<Meter>,
    /// First and longest pause between attempts to reach a broker.
    pub reconnect: (Duration, Duration),
}

/// Events that are held while the broker is first asked about a topic: more are not worth their memory, one by one, for an
/// answer that comes in a moment.
const MAX_HELD_AT_FIRST: usize = 4096;

/// What everything in the lanes gets its receipt for: a huge transaction's tail, or the next epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drain {
    BeforeTail,
    AfterTail,
    BeforeEpoch(u64),
}

/// What became of an event that was to go into its lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is there.
    Queued,
    /// Everything in the lanes must have its receipt first.
    NotNow,
}

/// A topic of the broker: a partition, or a topic without.
#[derive(Debug)]
pub(super) struct Topic {
    pub(super) name: String,
    /// By lane number; made when the first event comes.
    pub(super) lanes: Vec<Option<usize>>,
    pub(super) opener: Option<Opener>,
    /// Paces re-opening while the broker refuses sends or closes producers; reset by a receipt.
    pub(super) backoff: Backoff,
    pub(super) troubled: bool,
    /// The broker that has just closed its producers named this one as the next.
    pub(super) next_broker: Option<NextBroker>,
    /// Ends the names of its producers.
    pub(super) naming: Naming,
    /// Its lanes under other such names.
    pub(super) earlier_lanes: HashMap<Naming, Vec<Option<usize>>>,
    /// The route that it belongs to.
    pub(super) route: usize,
    /// Why its events are diverted.
    pub(super) refused: Option<String>,
    /// How many events were diverted when the last one of this topic was.
    pub(super) last_diverted: u64,
}

#[derive(Debug)]
pub(super) struct Opener {
    pub(super) task: JoinHandle<()>,
    pub(super) remaining: usize,
    /// Makes it give up a topic that is refused.
    pub(super) hurry: Arc<Notify>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Publisher {
    pub(super) config: PublisherConfig,
    pub(super) shared: Arc<Shared>,
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) routes: Vec<Route>,
    pub(super) route_index: HashMap<String, usize>,
    /// Most events go where the last one went: spares hashing the name.
    pub(super) last_route: usize,
    pub(super) topics: Vec<Topic>,
    /// By route and name: a partition that is somebody's topic by itself too has producers of other names there.
    pub(super) topic_index: HashMap<(usize, String), usize>,
    /// The index is the producer id, so a receipt finds its lane without a search.
    pub(super) lanes: Vec<Lane>,
    /// Lanes with an open batch that may be handed on, oldest batch first (a lane may stand here twice; flushing it twice does
    /// nothing).
    pub(super) filling: VecDeque<usize>,
    /// Lanes for the tails of huge transactions, by the lane they relieve.
    pub(super) dedicated: HashMap<(usize, Lsn), usize>,
    /// Set before and after a huge transaction's tail, and before an epoch: nothing more is taken until everything has its receipt.
    pub(super) draining: Option<Drain>,
    /// Of the events in the lanes.
    pub(super) epoch: u64,
    pub(super) in_flight_messages: usize,
    pub(super) in_flight_bytes: usize,
    /// Some route's partitions have changed in number, and it still waits for receipts.
    pub(super) changing_routes: bool,
    /// How many of `in_flight_messages` are not in a lane yet.
    pub(super) held_messages: usize,
    /// See [`Publisher::set_log_end`].
    pub(super) log_end: Lsn,
    pub(super) acked: Vec<(TxnNo, u64)>,
    pub(super) diverted: Vec<Diverted>,
    /// How many events were diverted so far, and how many of these are safe.
    pub(super) diverted_events: u64,
    pub(super) stored_events: u64,
    pub(super) parked: Parked,
    /// Where the rows of acknowledged events go, if anywhere.
    pub(super) rows: Option<RowQueue>,
    pub(super) limits: Limits,
    pub(super) memory: Memory,
    /// How long a batch may wait at present.
    pub(super) linger: Duration,
    /// How long receipts take: a moving average.
    pub(super) receipt_delay: Duration,
    /// The last flush was one of a backlog: a lane that falls quiet does not send at once.
    pub(super) backlog: bool,
}

impl Publisher {
    /// Makes a publisher; nothing is connected yet.
    pub fn new(config: PublisherConfig) -> Self {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let directory = Directory::new(
            config.service.clone(),
            Manner {
                auth: config.auth.clone(),
                tls: config.tls.clone(),
                keepalive_interval: config.keepalive_interval,
            },
            sender.clone(),
        );
        let shared = Shared {
            directory,
            schema: config.schema.clone(),
            reconnect: config.reconnect,
            diversion: config.diversion,
            events: sender,
        };
        let limits = Limits {
            batch_max_messages: config.batch_max_messages,
            batch_max_bytes: config.batch_max_bytes,
            max_message_bytes: super::DEFAULT_MAX_MESSAGE_BYTES,
        };
        Self {
            linger: config.batch_linger,
            receipt_delay: Duration::ZERO,
            backlog: false,
            rows: config.rows.clone(),
            config,
            shared: Arc::new(shared),
            events,
            routes: Vec::new(),
            route_index: HashMap::new(),
            last_route: 0,
            topics: Vec::new(),
            topic_index: HashMap::new(),
            lanes: Vec::new(),
            filling: VecDeque::new(),
            dedicated: HashMap::new(),
            draining: None,
            epoch: 0,
            in_flight_messages: 0,
            in_flight_bytes: 0,
            changing_routes: false,
            held_messages: 0,
            log_end: Lsn::new(u64::MAX),
            acked: Vec::new(),
            diverted: Vec::new(),
            diverted_events: 0,
            stored_events: 0,
            parked: Parked::default(),
            limits,
            memory: Memory::default(),
        }
    }

    /// Connects to the service URL once: learns the broker's message limit, and finds wrong credentials before the first
    /// event is read.
    pub async fn connect(&mut self) -> Result<()> {
        let (connection, endpoint) = self.shared.directory.service().await?;
        self.limits.max_message_bytes = connection.max_message_bytes();
        debug!(broker = %endpoint, max_message_bytes = self.limits.max_message_bytes, "broker reached");
        Ok(())
    }

    /// Tells where the log ends, as seen while the slot is ours: nothing that was published under our producers' names can
    /// lie behind that, or the database was put back to an older state (see the module's documentation).
    pub fn set_log_end(&mut self, log_end: Lsn) {
        self.log_end = log_end;
        for lane in &mut self.lanes {
            lane.forget_written();
        }
    }

    /// Where this publisher counts.
    pub fn meter(&self) -> &Meter {
        &self.config.meter
    }

    /// True while another event may be published.
    pub fn has_room(&self) -> bool {
        self.draining.is_none()
            && self.in_flight_messages < self.config.max_in_flight_messages
            && self.in_flight_bytes < self.config.max_in_flight_bytes
            && self.rows.as_ref().is_none_or(RowQueue::has_room)
            && (self.held_messages < MAX_HELD_AT_FIRST || !self.is_asking())
    }

    /// True when every event published has its receipt.
    pub fn is_empty(&self) -> bool {
        self.in_flight_messages == 0
    }

    /// Events without receipt, and their encoded bytes.
    pub fn in_flight(&self) -> (usize, usize) {
        (self.in_flight_messages, self.in_flight_bytes)
    }

    /// Takes one event on its way to `topic`. Call only while there is room. `key_hash` chooses the lane; an error means that
    /// the broker can never take the event.
    pub fn publish<'p>(
        &mut self,
        topic: &str,
        key_hash: u64,
        event: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
    ) -> Result<()> {
        let route = self.route(topic);
        if self.divert_unrouted(route, key_hash, event, properties) {
            return Ok(());
        }
        if !self.routes[route].is_open()
            || self.place(route, key_hash, event, properties)? == Placed::NotNow
        {
            self.hold(route, Held::new(event, key_hash, properties));
        }
        Ok(())
    }

    /// Puts an event into its lane's batch, where it counts in the limits.
    pub(super) fn place<'p>(
        &mut self,
        route: usize,
        key_hash: u64,
        event: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
    ) -> Result<Placed> {
        // Held events come late: the tail of a transaction before theirs may still have lanes of its own. (They may come so late
        // that the tail is of a transaction after theirs; then it stays, because it may go on.)
        if !self.dedicated.is_empty()
            && self.draining.is_none()
            && self
                .dedicated
                .keys()
                .any(|(_, lsn)| *lsn < event.commit_lsn)
        {
            self.drain(Drain::AfterTail);
        }
        let epoch = epoch(event.commit_lsn);
        if epoch != self.epoch && self.draining.is_none() {
            self.drain(Drain::BeforeEpoch(epoch));
        }
        if self.draining.is_some() {
            return Ok(Placed::NotNow);
        }
        let partition = match self.routes[route].partitions {
            0 => 0,
            partitions => self.config.hashing.partition(event.key, partitions),
        };
        let topic_id = self.routes[route].topics[partition as usize];
        let number = u32::try_from(key_hash % u64::from(self.config.lanes)).expect("below a u32");
        let mut lane_id = self.lane(topic_id, number);
        if self.lanes[lane_id].next_ordinal(event.commit_lsn) == MAX_ORDINALS {
            lane_id = self.dedicated_lane(lane_id, number, event.commit_lsn);
        }
        if let Some(reason) = self.diversion(route, lane_id, event) {
            self.divert_event(route, lane_id, (event, key_hash), properties, reason);
        } else {
            let after = self.topics[topic_id]
                .last_diverted
                .max(self.routes[route].last_diverted);
            self.append(lane_id, event, properties, after)?;
        }
        let lane = &self.lanes[lane_id];
        let fills_up =
            lane.next_ordinal(event.commit_lsn) == MAX_ORDINALS && !self.is_dedicated(lane_id);
        if matches!(lane.link, Link::Down { .. }) {
            self.open_topic(topic_id);
        }
        if fills_up {
            self.drain(Drain::BeforeTail);
        }
        Ok(Placed::Queued)
    }

    fn append<'p>(
        &mut self,
        lane_id: usize,
        event: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
        after: u64,
    ) -> Result<()> {
        let lane = &mut self.lanes[lane_id];
        let was_filling = lane.open_since().is_some();
        let appended = lane.append(event, properties, after, self.limits, &mut self.memory);
        let bytes = match appended {
            Appended::Queued { bytes } => bytes,
            Appended::TooLarge { bytes } => {
                let error = Error::refused(format!(
                    "the message for topic {} takes {bytes} bytes, and the broker accepts at most {}",
                    self.topics[lane.topic].name, self.limits.max_message_bytes
                ))
                .hint("raise maxMessageSize on the broker (and nettyMaxFrameSizeBytes on the bookies)");
                if self.config.diversion.is_none() {
                    return Err(error);
                }
                lane.append_refused(event, properties, &error.report(), &mut self.memory)
            }
        };
        self.in_flight_messages += 1;
        self.in_flight_bytes += bytes;
        if self.lanes[lane_id].open_since().is_some() && !was_filling {
            self.filling.push_back(lane_id);
        }
        self.divert_refused(lane_id);
        Ok(())
    }

    /// The transaction's last event was published. Only a huge one has anything to end: its dedicated lanes are drained
    /// before the next transaction's events may enter the ordinary ones.
    pub fn end_transaction(&mut self) {
        if !self.dedicated.is_empty() {
            self.drain(Drain::AfterTail);
        }
    }

    pub(super) fn drain(&mut self, drain: Drain) {
        self.draining = Some(drain);
        self.flush(Flush::All);
        self.drained();
    }

    /// Ends a drain when nothing that is in a lane awaits a receipt any more.
    pub(super) fn drained(&mut self) {
        if self.in_flight_messages > self.held_messages {
            return;
        }
        match self.draining.take() {
            Some(Drain::AfterTail) => {
                for (_, lane) in std::mem::take(&mut self.dedicated) {
                    self.lanes[lane].close();
                }
            }
            Some(Drain::BeforeEpoch(epoch)) => self.begin_epoch(epoch),
            Some(Drain::BeforeTail) | None => {}
        }
    }

    /// Looks at the clock, about once a second: send deadlines, partitions to be counted again, producers without work.
    pub fn tick(&mut self, now: Instant) {
        self.check_deadlines(now);
        self.hurry_openers();
        self.refresh_partitions(now);
        self.close_idle(now);
        self.memory.trim();
    }

    /// Ends connections on which a batch has waited too long for its receipt; their lanes resend elsewhere. A broker that is
    /// slow (a publish rate limit) may leave batches without receipt for longer than that: while its receipts come, for the
    /// lane or for what was written to the connection before, nothing is wrong. Receipts for what was written after do not count:
    /// that one topic gets none is noticed while others do.
    pub fn check_deadlines(&mut self, now: Instant) {
        let mut last: HashMap<u64, Heard> = HashMap::new();
        for lane in &self.lanes {
            if let (Link::Up(connection), Some(heard)) = (&lane.link, lane.heard) {
                let last = last.entry(connection.id()).or_insert(heard);
                if last.at < heard.at {
                    *last = heard;
                }
            }
        }
        for lane in &mut self.lanes {
            let Link::Up(connection) = &lane.link else {
                continue;
            };
            let connection = connection.clone();
            if let Some(&heard) = last.get(&connection.id()) {
                lane.overhear(heard);
            }
            let waiting_since = lane.waiting_since();
            if waiting_since.is_some_and(|since| now - since > self.config.send_timeout) {
                let topic = &self.topics[lane.topic].name;
                connection.close(format!(
                    "no receipt on {topic} within {:?}",
                    self.config.send_timeout
                ));
            }
        }
    }

    fn close_idle(&mut self, now: Instant) {
        for lane in &mut self.lanes {
            if matches!(lane.link, Link::Up(_))
                && lane.is_empty()
                && now - lane.idle_since > self.config.producer_idle
            {
                debug!(
                    producer = lane.producer.name,
                    "closed a producer without work"
                );
                lane.close();
            }
        }
    }

    fn lane(&mut self, topic: usize, number: u32) -> usize {
        if let Some(lane) = self.topics[topic].lanes[number as usize] {
            return lane;
        }
        let name = self.lane_name(topic, number);
        let lane = self.new_lane(topic, number, name, false);
        self.topics[topic].lanes[number as usize] = Some(lane);
        lane
    }

    fn lane_name(&self, topic: usize, number: u32) -> String {
        let naming = self.topics[topic].naming;
        format!("{}-{number}.{naming}", self.config.producer_name)
    }

    fn new_lane(&mut self, topic: usize, number: u32, name: String, dedicated: bool) -> usize {
        let id = self.lanes.len();
        self.lanes.push(Lane::new(
            topic,
            number,
            id as u64,
            name,
            self.config.compression,
            (dedicated, self.epoch),
            self.stored_events,
        ));
        id
    }

    /// The lane for what a huge transaction has beyond [`MAX_ORDINALS`] events on `lane`.
    fn dedicated_lane(&mut self, lane: usize, number: u32, commit_lsn: Lsn) -> usize {
        if let Some(&dedicated) = self.dedicated.get(&(lane, commit_lsn)) {
            return dedicated;
        }
        // Drained before the tail's last event was there, because that was held: its ids go on where they were.
        if let Some((lsn, dedicated)) = self.lanes[lane].tail
            && lsn == commit_lsn
        {
            self.dedicated.insert((lane, commit_lsn), dedicated);
            return dedicated;
        }
        let topic = self.lanes[lane].topic;
        let name = format!(
            "{}-{:X}",
            self.lane_name(topic, number),
            commit_lsn.as_u64()
        );
        info!(%commit_lsn, producer = name, "a transaction of this size gets a producer of its own");
        let dedicated = self.new_lane(topic, number, name, true);
        self.dedicated.insert((lane, commit_lsn), dedicated);
        self.lanes[lane].tail = Some((commit_lsn, dedicated));
        dedicated
    }

    fn is_dedicated(&self, lane: usize) -> bool {
        self.dedicated.values().any(|&dedicated| dedicated == lane)
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
