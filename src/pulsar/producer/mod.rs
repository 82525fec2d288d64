//! The producer: decides what goes to which broker. It holds topics, partitions, lanes, batches, sequence ids, receipts and refusals; it
//! has no socket, no clock and no task.
//!
//! Input: events in log order ([`Producer::publish`]), what brokers say ([`Producer::on`]), and the time ([`Producer::tick`],
//! [`Producer::wake`]). Output: [`Effect`]s, which somebody carries out (see `pulsar::publisher`), acknowledged transactions
//! ([`Producer::take_acked`]), and events that cannot be published ([`Producer::take_diverted`]). The same inputs give the same outputs, but for the
//! jitter of pauses.
//!
//! | module | is |
//! |---|---|
//! | `effects` | what is to be done, and what comes of it |
//! | `outgoing`, `batch`, `memory` | an event; messages of one lane from the first to the receipt; the buffers that batches take turns with |
//! | `lane` | one broker producer: names, sequence ids, open batch, batches without receipt |
//! | `topic`, `opening` | a topic of the broker, and how its producers are opened |
//! | `few` | a topic that allows fewer producers than there are lanes |
//! | `route`, `shape` | a topic as the router names it, and its partitions: how many there are, and what happens when that changes |
//! | `signals` | what brokers say, applied to the lanes |
//! | `diversion`, `trouble` | what cannot be published: taken out, in order; when a topic is given up |
//! | `flushing` | when a batch is sent |
//! | `connections` | bytes without receipt on each connection, and the producers there |
//! | `forgetting`, `slab` | what is idle is closed and forgotten; numbers that may be given again |
//!
//! # Bound
//!
//! Every message counts, with the memory that its batch has allocated, from `publish` to its receipt. [`has_room`](Producer::has_room) is false at
//! either limit; the connector then stops reading its socket, TCP stops the walsender, and Postgres waits. A broker that is
//! away is nothing but this. The events of a topic that the broker refuses are handed back to be stored elsewhere (see
//! `diversion`), so that others go on; where there is nobody to store them they wait, and others go on while there is room.
//!
//! # What it costs
//!
//! A step costs only the items that it concerns. All lanes are walked in two cases: when a stream is opened (`set_log_end`), and at the next epoch.
//!
//! | step | costs a step for each |
//! |---|---|
//! | event, receipt | lane that it is for |
//! | any signal | route with events that may be released now; route that changes its partitions |
//! | end of a connection | lane that has a producer there |
//! | tick | lane that has written since the last one or has frames without receipt; creation without answer whose time is over; topic or route in trouble of its own; route whose partitions are to be counted; topic whose turn it is to be looked at for what is idle, once in `WALPOST_PRODUCER_IDLE`; connection |
//! | diverted events are stored | lane of a topic of which events were diverted that were not stored |
//! | trouble is told | topic or route in trouble of its own |
//!
//! A topic that waits for its broker costs only its own attempts.
//!
//! # Order
//!
//! A key goes to one partition and one lane. Only a change of partitions or of the number of producers (`shape`, `few`) moves it, after all its earlier
//! events have their receipts. A lane's frames are sent in order over one connection, and after a
//! reconnect again from the oldest without receipt. So a key's messages are stored in commit order (a frame sent twice is
//! followed by everything behind it, twice).
//!
//! # Producer names
//!
//! `<WALPOST_PRODUCER_NAME>-<system id>-<timeline>[g<generation>]-<lane>.<routing>`. A sequence id means something only among events that
//! were numbered in the same way. Another cluster or timeline may hand out the same LSNs again; another number of lanes or
//! partitions, other tables, columns or templates send events to other lanes, where they would be measured by ids they
//! have nothing to do with, taken for old, and lost. So all of that is in the name: the last part is a checksum of the
//! routing. After such a change the events that were not confirmed before it may come twice.
//!
//! The last part also names the epoch of the log, in which sequence ids count (see `lane`). Before the first event of another epoch every
//! lane gets its receipts; then the topics' producers change. (A topic that takes nothing holds up that change, and with it all
//! topics, until its events are diverted; where nobody stores them, until it takes them.)
//!
//! The generation is left out while it is 0. A process that may not believe the broker's "stored before" any more raises it for the next one: see `lane` ("Doubt") and
//! `scanner::name_mark`. Scans, stragglers, unmarked rows and replays put something of their own between it and the lane (`-scan-…`, `-straggler-…`, `-again-…`, `-replay-…`).
//! A scan that goes on has the names that it had, so a refusal in it raises the generation too; the names of the others are of one process only.
//!
//! What a name cannot tell is a database that was put back to an older state on the same timeline (a disk snapshot). Its log
//! then ends below what was published already; the producers know by their highest id, and nothing is sent
//! ([`Producer::set_log_end`]). A database that is put back across the end of an epoch is noticed only by producers of the earlier epoch.

mod batch;
mod connections;
mod diversion;
mod effects;
mod few;
mod flushing;
mod forgetting;
mod lane;
mod memory;
mod opening;
mod outgoing;
mod route;
mod shape;
mod signals;
mod slab;
mod topic;
mod trouble;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use connections::Connections;
pub use diversion::{Diversion, Diverted, Parked};
pub(super) use effects::{Created, Effect, Link, Signal};
pub use flushing::Flush;
use lane::{Appended, Desk, Identity, Lane, Limits, MAX_ORDINALS, State, epoch};
use memory::Memory;
pub use outgoing::{Outgoing, RowTag};
pub use route::Held;
use route::Route;
use slab::Slab;
use topic::Topic;

use super::compression::Codec;
use super::doubts::Doubts;
use super::partition::HashingScheme;
use super::rows::RowQueue;
use super::verdict;
use crate::ack::TxnNo;
use crate::meter::Meter;
use crate::{Error, Lsn, Result};

/// What the producer needs to know.
#[derive(Clone, Debug)]
pub(super) struct Settings {
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
    /// A batch is full at this many messages.
    pub batch_max_messages: u32,
    /// A batch is full at this many bytes.
    pub batch_max_bytes: usize,
    /// A batch waits at most this long for company.
    pub batch_linger: Duration,
    /// Room for messages without receipt.
    pub max_in_flight_messages: usize,
    /// Room for the memory that they take.
    pub max_in_flight_bytes: usize,
    /// Without a receipt for this long, while one is due: the producer is opened again where the broker has answered something later, else the connection
    /// ends.
    pub send_timeout: Duration,
    /// Where the rows of acknowledged events (`Outgoing::mark`) go, if anywhere; a full queue stops the intake.
    pub rows: Option<RowQueue>,
    /// Raised when no other process may use these names any more (see `lane`).
    pub doubts: Doubts,
    /// Told of receipts and of lost connections.
    pub meter: Arc<Meter>,
    /// First and longest pause between attempts to reach a broker.
    pub reconnect: (Duration, Duration),
}

/// The time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub at: Instant,
    /// The time of day, in milliseconds since 1970: what batches are stamped with.
    pub unix_ms: u64,
}

/// Events that are held while the broker is first asked about a topic: more are not worth their memory, one by one, for an
/// answer that comes in a moment.
const MAX_HELD_AT_FIRST: usize = 4096;

/// What everything in the lanes gets its receipt for: a huge transaction's tail, or the next epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drain {
    BeforeTail,
    AfterTail,
    BeforeEpoch(u64),
}

/// What became of an event that was to go into its lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    /// It is there.
    Queued,
    /// Everything in the lanes must have its receipt first.
    NotNow,
}

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Topic(usize),
    Route(usize),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Producer {
    settings: Settings,
    now: Now,
    /// Counts signals.
    serial: u64,
    effects: Vec<Effect>,
    timers: BinaryHeap<Reverse<(Instant, Timer)>>,
    routes: Slab<Route>,
    route_index: HashMap<String, usize>,
    /// Most events go where the last one went: spares hashing the name.
    last_route: usize,
    topics: Slab<Topic>,
    /// By route and name: a partition that is somebody's topic by itself too has producers of other names there.
    topic_index: HashMap<(usize, String), usize>,
    lanes: Slab<Lane>,
    /// Which lane a producer is of.
    producers: HashMap<u64, usize>,
    /// Of the next producer.
    next_id: u64,
    /// The connection that a topic was moved to last.
    last_shard: u32,
    connections: Connections,
    /// Lanes with an open batch that may be handed on, oldest batch first (a lane may stand here twice; flushing it twice does
    /// nothing).
    filling: VecDeque<usize>,
    /// Lanes for the tails of huge transactions, by the lane they relieve.
    dedicated: HashMap<(usize, Lsn), usize>,
    /// Set before and after a huge transaction's tail, and before an epoch: nothing more is taken until everything has its receipt.
    draining: Option<Drain>,
    /// Of the events in the lanes.
    epoch: u64,
    in_flight_messages: usize,
    in_flight_bytes: usize,
    /// Routes that are not known, and not given up, by when their first event came.
    asking: BTreeSet<(Instant, usize)>,
    /// Routes whose partitions have changed in number, and which still wait for receipts.
    changing: BTreeSet<usize>,
    /// Routes with partitions, by when these are counted again.
    refreshing: BTreeSet<(Instant, usize)>,
    /// Known routes with events that are held.
    releasable: BTreeSet<usize>,
    /// Topics and routes with trouble of their own, and some whose trouble is over.
    troubled: BTreeSet<Timer>,
    /// Topics and routes of which something was diverted that is not stored yet, and some of which it is.
    diverting: BTreeSet<Timer>,
    /// Creations, oldest first; what is answered stays until its turn comes.
    creations: VecDeque<(Instant, u64)>,
    /// Topics by when they are looked at for what is idle: see `forgetting`.
    idle_checks: BTreeSet<(Instant, usize)>,
    /// The highest commit LSN of events in lanes that had written when [`Producer::tick`] looked.
    written_to: Lsn,
    /// The highest commit LSN that was written, since the end of the log was asked for, under a name that is forgotten.
    forgotten_to: Lsn,
    /// How many of `in_flight_messages` are not in a lane yet.
    held_messages: usize,
    /// See [`Producer::set_log_end`].
    log_end: Lsn,
    acked: Vec<(TxnNo, u64)>,
    diverted: Vec<Diverted>,
    /// How many events were diverted so far, and how many of these are safe.
    diverted_events: u64,
    stored_events: u64,
    parked: Parked,
    limits: Limits,
    memory: Memory,
    /// How long a batch may wait at present.
    linger: Duration,
    /// How long receipts take: a moving average.
    receipt_delay: Duration,
    /// The last flush was one of a backlog: a lane that falls quiet does not send at once.
    backlog: bool,
    /// The last two topics that got a receipt, and when.
    working: [Option<(usize, Instant)>; 2],
}

impl Producer {
    /// Makes a producer; nothing is opened yet.
    pub(super) fn new(settings: Settings, now: Now) -> Self {
        let limits = Limits {
            batch_max_messages: settings.batch_max_messages,
            batch_max_bytes: settings.batch_max_bytes,
            max_message_bytes: super::DEFAULT_MAX_MESSAGE_BYTES,
        };
        Self {
            linger: settings.batch_linger,
            settings,
            now,
            serial: 1,
            effects: Vec::new(),
            timers: BinaryHeap::new(),
            routes: Slab::new(),
            route_index: HashMap::new(),
            last_route: 0,
            topics: Slab::new(),
            topic_index: HashMap::new(),
            lanes: Slab::new(),
            producers: HashMap::new(),
            next_id: 1,
            last_shard: 0,
            connections: Connections::default(),
            filling: VecDeque::new(),
            dedicated: HashMap::new(),
            draining: None,
            epoch: 0,
            in_flight_messages: 0,
            in_flight_bytes: 0,
            asking: BTreeSet::new(),
            changing: BTreeSet::new(),
            refreshing: BTreeSet::new(),
            releasable: BTreeSet::new(),
            troubled: BTreeSet::new(),
            diverting: BTreeSet::new(),
            creations: VecDeque::new(),
            idle_checks: BTreeSet::new(),
            written_to: Lsn::ZERO,
            forgotten_to: Lsn::ZERO,
            held_messages: 0,
            log_end: Lsn::new(u64::MAX),
            acked: Vec::new(),
            diverted: Vec::new(),
            diverted_events: 0,
            stored_events: 0,
            parked: Parked::default(),
            limits,
            memory: Memory::default(),
            receipt_delay: Duration::ZERO,
            backlog: false,
            working: [None; 2],
        }
    }

    /// A broker was connected to that takes entries of this size.
    pub(super) fn set_max_message_bytes(&mut self, bytes: usize) {
        self.limits.max_message_bytes = bytes;
    }

    /// What is to be done, in order.
    pub(super) fn take_effects(&mut self) -> std::vec::Drain<'_, Effect> {
        self.effects.drain(..)
    }

    /// True when something is to be done.
    pub(super) fn has_effects(&self) -> bool {
        !self.effects.is_empty()
    }

    /// It is later now.
    pub(super) fn set_now(&mut self, now: Now) {
        self.now = now;
    }

    /// Tells where the log ends, as seen while the slot is ours: nothing that was published under our producers' names can
    /// lie behind that, or the database was put back to an older state (see the module's documentation).
    pub(super) fn set_log_end(&mut self, log_end: Lsn) {
        self.log_end = log_end;
        self.forgotten_to = Lsn::ZERO;
        for lane in self.lanes.iter_mut() {
            lane.forget_written();
        }
    }

    /// Where it counts.
    pub(super) fn meter(&self) -> &Meter {
        &self.settings.meter
    }

    /// True while another event may be published.
    pub(super) fn has_room(&self) -> bool {
        self.draining.is_none()
            && self.in_flight_messages < self.settings.max_in_flight_messages
            && (self.in_flight_bytes < self.settings.max_in_flight_bytes
                || self.in_flight_messages == 0)
            && self.settings.rows.as_ref().is_none_or(RowQueue::has_room)
            && (self.held_messages < MAX_HELD_AT_FIRST || !self.is_asking())
    }

    /// Where rows go that have their receipt.
    pub(super) fn rows(&self) -> Option<&RowQueue> {
        self.settings.rows.as_ref()
    }

    /// Events without receipt, and the memory that they take.
    pub(super) fn in_flight(&self) -> (usize, usize) {
        (self.in_flight_messages, self.in_flight_bytes)
    }

    /// Does something with a lane, and counts what it holds then.
    fn with_lane<T>(&mut self, lane: usize, work: impl FnOnce(&mut Lane, &mut Desk<'_>) -> T) -> T {
        let lane = &mut self.lanes[lane];
        let before = lane.size();
        let topic = &mut self.topics[lane.topic];
        let mut desk = Desk {
            memory: &mut self.memory,
            effects: &mut self.effects,
            connections: &mut self.connections,
            holds_back: topic.is_unconfirmed,
            accepted: &mut topic.accepted,
            now: self.now,
        };
        let result = work(lane, &mut desk);
        let after = lane.size();
        self.in_flight_messages = self.in_flight_messages + after.0 - before.0;
        self.in_flight_bytes = self.in_flight_bytes + after.1 - before.1;
        result
    }

    /// Takes one event on its way to `topic`. Call only while there is room. `key_hash` chooses the lane; an error means that
    /// the broker can never take the event.
    pub(super) fn publish<'p>(
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
    fn place<'p>(
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
            partitions => self.settings.hashing.partition(event.key, partitions),
        };
        let topic_id = self.routes[route].topics[partition as usize];
        if self.topics[topic_id].few.is_in_use() && !self.stays_with_few(topic_id, event.commit_lsn)
        {
            return Ok(Placed::NotNow);
        }
        let number = u32::try_from(key_hash % u64::from(self.settings.lanes)).expect("below a u32");
        let mut lane_id = self.lane_of(topic_id, number);
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
        if lane.state() == State::Down {
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
        let was_filling = self.lanes[lane_id].open_since().is_some();
        let topic = &self.topics[self.lanes[lane_id].topic];
        // A topic's own broker may take less, or more, than the one that was asked first.
        let its_broker_takes = self.lanes[lane_id].max_message_bytes();
        let max_message_bytes = its_broker_takes.unwrap_or(self.limits.max_message_bytes);
        let limits = Limits {
            batch_max_bytes: self.limits.batch_max_bytes.min(topic.batch_max_bytes),
            max_message_bytes,
            ..self.limits
        };
        let appended = self.with_lane(lane_id, |lane, desk| {
            lane.append(event, properties, after, limits, desk)
        });
        if let Appended::TooLarge { bytes } = appended {
            let error = Error::refused(format!(
                "the message for topic {} takes {bytes} bytes, and the broker accepts at most {}",
                self.topics[self.lanes[lane_id].topic].name, max_message_bytes
            ))
            .hint("raise maxMessageSize on the broker (and nettyMaxFrameSizeBytes on the bookies)");
            if self.settings.diversion.is_none() {
                return Err(error);
            }
            let reason = error.report();
            self.with_lane(lane_id, |lane, desk| {
                lane.append_refused(event, properties, &reason, desk);
            });
            self.divert_refused(lane_id);
        }
        if self.lanes[lane_id].open_since().is_some() && !was_filling {
            self.filling.push_back(lane_id);
        }
        Ok(())
    }

    /// The transaction's last event was published. Only a huge one has anything to end: its dedicated lanes are drained
    /// before the next transaction's events may enter the ordinary ones.
    pub(super) fn end_transaction(&mut self) {
        if !self.dedicated.is_empty() {
            self.drain(Drain::AfterTail);
        }
    }

    fn drain(&mut self, drain: Drain) {
        self.draining = Some(drain);
        self.flush_now(Flush::All);
        self.drained();
    }

    /// Ends a drain when nothing that is in a lane awaits a receipt any more.
    fn drained(&mut self) {
        if self.in_flight_messages > self.held_messages {
            return;
        }
        match self.draining.take() {
            Some(Drain::AfterTail) => {
                for (_, lane) in std::mem::take(&mut self.dedicated) {
                    self.close_lane(lane);
                }
            }
            Some(Drain::BeforeEpoch(epoch)) => self.begin_epoch(epoch),
            Some(Drain::BeforeTail) | None => {}
        }
    }

    /// Looks at the clock, about once a second: send deadlines, topics in trouble, partitions to be counted again, producers without work.
    /// What it costs: see the module's documentation.
    pub(super) fn tick(&mut self, now: Now) {
        self.now = now;
        self.check_deadlines();
        self.give_up_creations();
        self.give_up_the_hopeless();
        self.refresh_partitions();
        self.close_idle();
        self.forget_troubles();
        self.memory.trim();
    }

    /// When [`wake`](Self::wake) is to be called; `None`: not by itself.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    /// Does what is due by now.
    pub(super) fn wake(&mut self, now: Now) -> Result<()> {
        self.now = now;
        self.serial += 1;
        while let Some(&Reverse((at, timer))) = self.timers.peek()
            && at <= now.at
        {
            self.timers.pop();
            match timer {
                Timer::Topic(topic) => self.pause_is_over(topic),
                Timer::Route(route) => self.ask_again(route),
            }
        }
        self.settle()
    }

    fn wake_at(&mut self, at: Instant, timer: Timer) {
        self.timers.push(Reverse((at, timer)));
    }

    /// What may follow from anything that happened.
    fn settle(&mut self) -> Result<()> {
        self.finish_changes();
        self.drained();
        self.release()
    }

    /// Looks for batches that have waited too long for their receipts. A broker that is
    /// slow (a publish rate limit) may leave batches without receipt for longer than that: while its receipts come, for the
    /// lane or for what was written to the connection before, nothing is wrong. Receipts for what was written after do not count:
    /// that one topic gets none is noticed while others do.
    ///
    /// A broker that has answered something that was written later has read the batch: then it is the topic's trouble. Its lane leaves its
    /// producer, and resends when the broker has closed that, which it does when the writes under way have ended. Otherwise, or where no other
    /// topic uses the connection, that ends.
    fn check_deadlines(&mut self) {
        let now = self.now.at;
        let mut ended = Vec::new();
        let mut stuck = Vec::new();
        let mut silent: Vec<(usize, bool, Instant)> = Vec::new();
        for (connection, producer_id, id) in self.watched_lanes() {
            let lane = &mut self.lanes[id];
            if !lane.keeps_watch() {
                continue;
            }
            self.connections.watch(producer_id);
            let heard = self.connections.heard(connection);
            if let Some(heard) = heard {
                lane.note_progress(heard);
            }
            let Some(since) = lane.waiting_since() else {
                continue;
            };
            if now - since > self.settings.send_timeout {
                let topic = &self.topics[lane.topic].name;
                let reason = format!(
                    "no receipt on {topic} within {:?}",
                    self.settings.send_timeout
                );
                // Others got receipts for what was written later.
                let others_work = heard.is_some_and(|heard| heard.at > since);
                silent.push((lane.topic, others_work, since));
                if others_work || self.connections.read_until(connection) > Some(since) {
                    stuck.push((id, connection, reason));
                } else {
                    ended.push((connection, reason));
                }
            }
        }
        for (topic_id, others_work, since) in silent {
            let error = verdict::no_answer(&self.topics[topic_id].name);
            self.note_trouble(topic_id, &error);
            let topic = &mut self.topics[topic_id];
            let trouble = topic.trouble.take();
            topic.trouble = trouble.map(|trouble| trouble.unheard(since));
            if others_work && topic.shard == 0 {
                self.move_to_own_connection(topic_id);
            }
        }
        for (lane_id, connection, reason) in stuck {
            let topic_id = self.lanes[lane_id].topic;
            let mut there = self.connections.producers(connection);
            let is_others = |producer_id: u64| {
                let lane = self.producers.get(&producer_id);
                lane.is_some_and(|&lane| {
                    let lane = &self.lanes[lane];
                    lane.topic != topic_id && matches!(lane.state(), State::Up { .. })
                })
            };
            let is_shared = there.any(is_others);
            drop(there);
            if is_shared {
                warn!("{reason}, sending again");
                self.leave(lane_id);
                self.reopen_topic(topic_id);
            } else {
                // It may help, and harms nobody.
                ended.push((connection, reason));
            }
        }
        for (connection, reason) in ended {
            self.disconnect(connection, reason);
        }
        self.part_from_throttled();
    }

    /// The connections, producers and lanes of those that have written since they were last looked at, or had frames without receipt then.
    /// Notes the receipts that came, and the transactions.
    fn watched_lanes(&mut self) -> Vec<(u64, u64, usize)> {
        let mut lanes = Vec::new();
        for id in self.connections.take_watched() {
            let Some(&lane_id) = self.producers.get(&id) else {
                continue;
            };
            let lane = &self.lanes[lane_id];
            self.written_to = self.written_to.max(lane.counted_to());
            if let State::Up {
                connection,
                producer_id,
            } = lane.state()
                && producer_id == id
            {
                if let Some(heard) = lane.heard {
                    self.connections.note_heard(connection, heard);
                }
                lanes.push((connection, producer_id, lane_id));
            }
        }
        lanes
    }

    fn disconnect(&mut self, connection: u64, reason: String) {
        let effect = Effect::Disconnect { connection, reason };
        self.effects.push(effect);
    }

    /// Closes the producer of a lane that has nothing to send, and frees its memory. Its next message opens another (when the broker has closed
    /// this one).
    fn close_lane(&mut self, lane: usize) {
        self.lanes[lane].trim();
        self.leave(lane);
    }

    /// The lane that takes the events of lane number `number`.
    fn lane_of(&mut self, topic: usize, number: u32) -> usize {
        match self.topics[topic].few.lane(number) {
            Some(lane) => lane,
            None => self.lane(topic, number),
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
        format!("{}-{number}.{naming}", self.settings.producer_name)
    }

    fn new_lane(&mut self, topic: usize, number: u32, name: String, dedicated: bool) -> usize {
        let identity = Identity {
            topic,
            number,
            name,
            dedicated,
            epoch: self.epoch,
            anew: self.topics[topic].anew || dedicated && self.topics[topic].few.is_in_use(),
        };
        let lane = Lane::new(
            identity,
            self.settings.compression,
            self.stored_events,
            self.now.at,
        );
        self.routes[self.topics[topic].route].lanes += 1;
        self.lanes.insert(|_, _| lane)
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
        self.topics[topic].dedicated.push(dedicated);
        self.dedicated.insert((lane, commit_lsn), dedicated);
        self.lanes[lane].tail = Some((commit_lsn, dedicated));
        dedicated
    }

    fn is_dedicated(&self, lane: usize) -> bool {
        self.dedicated.values().any(|&dedicated| dedicated == lane)
    }
}

#[cfg(test)]
mod forgetting_tests;
#[cfg(test)]
mod tests;
