//! The meter: what passes, as numbers that another thread may read at any time.
//!
//! Written by the data's path at the granularity of a receipt (one batch) or of its tick (a second, and each status update),
//! never for a single event; read by [`crate::admin`]. Every number is an atomic of its own with relaxed order: a reader may
//! see one number of this moment beside one of the moment before, and neither side ever waits for the other. Nothing is
//! decided by these numbers except what people and probes are told.
//!
//! # Topics
//!
//! Labels must be few: a template such as `outbox.{aggregateid}` makes a topic for each key. The first [`MAX_TOPICS`] topics
//! are counted by name, all later ones together as [`OTHER_TOPICS`]. Partitions are counted as their topic.
//!
//! # Latency
//!
//! From the commit, as its Begin message tells it, to the receipt. One observation a receipt, with the weight of all its
//! events and the time of its oldest transaction: no event is ever shown faster than it was, and a batch costs the same
//! however many transactions are in it. The two ends are two machines' clocks: a difference below zero counts as zero. Only
//! the stream is measured; rows from the table and stragglers have no Begin, and are late on purpose.
//!
//! # Topics in trouble
//!
//! These come with the broker's words, so they are not numbers: the data's path replaces the list once a second, and only while a
//! topic is in trouble or has just recovered. Its lock is held for as long as it takes to copy [`MAX_TROUBLES`] entries.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use crate::Lsn;
use crate::pgoutput::PG_EPOCH_UNIX_S;
use crate::pipe::Counters;
use crate::upkeep::Upkeep;

/// Topics that are counted by name: as many lines in each scrape, and as many rows on the status page.
pub const MAX_TOPICS: usize = 200;
/// Topics in trouble that are listed; all of them are counted.
pub const MAX_TROUBLES: usize = 10;
/// Stands for all others; no topic's full name is like it.
pub const OTHER_TOPICS: &str = "other";

/// Upper bounds of the histogram's buckets: from a lone event on one machine to an outage of minutes.
pub const LATENCY_BOUNDS: [Duration; 16] = {
    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }
    [
        ms(1),
        ms(2),
        ms(5),
        ms(10),
        ms(25),
        ms(50),
        ms(100),
        ms(250),
        ms(500),
        ms(1_000),
        ms(2_500),
        ms(5_000),
        ms(10_000),
        ms(30_000),
        ms(60_000),
        ms(300_000),
    ]
};

/// What the connector is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// It has no stream: it starts, or Postgres went away.
    Connecting,
    /// Another instance has the slot; this one waits for its end.
    Standby,
    /// It publishes rows from the table before the stream starts.
    Scanning,
    /// It streams.
    Streaming,
    /// It looks at the table again and again (`WALPOST_MODE=poll`).
    Polling,
    /// It was told to stop, and waits for receipts.
    Stopping,
}

impl Phase {
    const ALL: [Self; 6] = [
        Self::Connecting,
        Self::Standby,
        Self::Scanning,
        Self::Streaming,
        Self::Polling,
        Self::Stopping,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Standby => "standby",
            Self::Scanning => "scanning",
            Self::Streaming => "streaming",
            Self::Polling => "polling",
            Self::Stopping => "stopping",
        }
    }

    /// Which of [`ROLES`] that is: `active` has the slot (or its lock).
    pub fn role(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Standby => "standby",
            Self::Scanning | Self::Streaming | Self::Polling | Self::Stopping => "active",
        }
    }
}

/// All that [`Phase::role`] may say.
pub const ROLES: [&str; 3] = ["active", "standby", "connecting"];

/// A side whose connections may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The replication connection.
    Postgres,
    /// A connection to a broker.
    Pulsar,
}

/// A topic's place in the meter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TopicId(usize);

#[derive(Debug, Default)]
struct Topic {
    name: String,
    published: AtomicU64,
    /// Of the last receipt, in milliseconds since the meter began.
    last_ms: AtomicU64,
}

/// What is known of one topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicReading<'a> {
    /// Full name without the partition, or [`OTHER_TOPICS`].
    pub name: &'a str,
    /// Messages that have their receipt.
    pub published: u64,
    /// Since the last of these receipts.
    pub quiet_for: Duration,
}

/// A topic that gets no receipts because of an answer that was about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicTrouble {
    /// Full name, with the partition.
    pub topic: String,
    /// When the first such answer came after the last receipt.
    pub since: Instant,
    /// The last answer: one line, no control characters.
    pub reason: String,
    /// Its events wait; otherwise they become stragglers.
    pub is_waiting: bool,
}

/// The topics in trouble.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// How many there are.
    pub count: u64,
    /// At most [`MAX_TROUBLES`] of them; first the one that has been in trouble for longest.
    pub listed: Vec<TopicTrouble>,
    /// The first one whose events wait, listed or not.
    pub first_waiting: Option<TopicTrouble>,
}

/// The histogram of latencies, as it is at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LatencyReading {
    /// Events up to each of [`LATENCY_BOUNDS`], and above the last: not cumulative.
    pub buckets: [u64; LATENCY_BOUNDS.len() + 1],
    /// Of all events.
    pub sum: Duration,
}

/// How far a scan of the tables is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanReading {
    /// Rows it has handed on so far.
    pub published: u64,
    /// Rows of its table up to this `seq` are done.
    pub position: u64,
    /// The table's place in the settings.
    pub table: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Meter {
    began: Instant,
    began_at: SystemTime,
    phase: AtomicU8,
    beat_ms: AtomicU64,
    /// The last one is for all that have no place of their own.
    topics: Box<[OnceLock<Topic>]>,
    latency: [AtomicU64; LATENCY_BOUNDS.len() + 1],
    latency_sum_us: AtomicU64,
    events: AtomicU64,
    acknowledged: AtomicU64,
    stragglers: AtomicU64,
    suppressed: AtomicU64,
    recognized: AtomicU64,
    transactions: AtomicU64,
    skipped: AtomicU64,
    refused: AtomicU64,
    confirmed: AtomicU64,
    received: AtomicU64,
    in_flight_messages: AtomicU64,
    in_flight_bytes: AtomicU64,
    unfinished: AtomicU64,
    lost_postgres: AtomicU64,
    lost_pulsar: AtomicU64,
    reconciled: AtomicU64,
    short_rounds: AtomicU64,
    scanning: AtomicBool,
    scan_table: AtomicU64,
    scan_published: AtomicU64,
    scan_position: AtomicU64,
    topics_in_trouble: AtomicU64,
    troubles: watch::Sender<Troubles>,
    upkeep: Upkeep,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter {
    /// All at zero.
    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            began: Instant::now(),
            began_at: SystemTime::now(),
            phase: AtomicU8::new(Phase::Connecting as u8),
            beat_ms: zero(),
            topics: (0..=MAX_TOPICS).map(|_| OnceLock::new()).collect(),
            latency: std::array::from_fn(|_| zero()),
            latency_sum_us: zero(),
            events: zero(),
            acknowledged: zero(),
            stragglers: zero(),
            suppressed: zero(),
            recognized: zero(),
            transactions: zero(),
            skipped: zero(),
            refused: zero(),
            confirmed: zero(),
            received: zero(),
            in_flight_messages: zero(),
            in_flight_bytes: zero(),
            unfinished: zero(),
            lost_postgres: zero(),
            lost_pulsar: zero(),
            reconciled: zero(),
            short_rounds: zero(),
            scanning: AtomicBool::new(false),
            scan_table: zero(),
            scan_published: zero(),
            scan_position: zero(),
            topics_in_trouble: zero(),
            troubles: watch::Sender::default(),
            upkeep: Upkeep::default(),
        }
    }

    // --- written by the data's path ---

    /// The connector is at something else now.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    /// The connector's thread lives: its timers fire.
    pub fn beat(&self) {
        self.beat_ms.store(self.now_ms(), Relaxed);
    }

    /// A topic's place, for [`published`](Self::published); to be asked once for each topic a publisher has.
    pub fn topic(&self, name: &str) -> TopicId {
        for (index, slot) in self.topics[..MAX_TOPICS].iter().enumerate() {
            let new = || Topic {
                name: name.to_owned(),
                ..Topic::default()
            };
            if slot.get_or_init(new).name == name {
                return TopicId(index);
            }
        }
        self.topics[MAX_TOPICS].get_or_init(|| Topic {
            name: OTHER_TOPICS.to_owned(),
            ..Topic::default()
        });
        TopicId(MAX_TOPICS)
    }

    /// A batch of that many messages has its receipt.
    pub fn published(&self, topic: TopicId, messages: u64) {
        if let Some(topic) = self.topics.get(topic.0).and_then(OnceLock::get) {
            topic.published.fetch_add(messages, Relaxed);
            topic.last_ms.store(self.now_ms(), Relaxed);
        }
    }

    /// That many events have their receipt now, the oldest of them committed at `commit_time_us` (since 2000-01-01 UTC).
    pub fn latency(&self, commit_time_us: i64, events: u64) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let commit_us = commit_time_us.saturating_add(PG_EPOCH_UNIX_S * 1_000_000);
        let now_us = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
        let late_us = u64::try_from(now_us.saturating_sub(commit_us)).unwrap_or(0);
        self.observe(Duration::from_micros(late_us), events);
    }

    fn observe(&self, late: Duration, events: u64) {
        let bucket = LATENCY_BOUNDS.partition_point(|bound| *bound < late);
        self.latency[bucket].fetch_add(events, Relaxed);
        let late_us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        self.latency_sum_us
            .fetch_add(late_us.saturating_mul(events), Relaxed);
    }

    /// What a pipe counted since it last told.
    pub fn count(&self, new: &Counters) {
        self.events.fetch_add(new.events, Relaxed);
        self.acknowledged.fetch_add(new.acknowledged, Relaxed);
        self.stragglers.fetch_add(new.stragglers, Relaxed);
        self.suppressed.fetch_add(new.suppressed, Relaxed);
        self.transactions.fetch_add(new.transactions, Relaxed);
        self.skipped.fetch_add(new.skipped, Relaxed);
        self.refused.fetch_add(new.refused, Relaxed);
    }

    /// The broker's deduplication knew that many messages: it stored nothing, and gave its receipt.
    pub fn recognized(&self, messages: u64) {
        self.recognized.fetch_add(messages, Relaxed);
    }

    /// Where the stream stands.
    pub fn set_positions(&self, received: Lsn, confirmed: Lsn) {
        self.received.store(received.as_u64(), Relaxed);
        self.confirmed.store(confirmed.as_u64(), Relaxed);
    }

    /// Events without receipt and their bytes; `unfinished` counts those too that wait for the table of stragglers.
    pub fn set_in_flight(&self, (messages, bytes): (usize, usize), unfinished: usize) {
        self.in_flight_messages.store(messages as u64, Relaxed);
        self.in_flight_bytes.store(bytes as u64, Relaxed);
        self.unfinished.store(unfinished as u64, Relaxed);
    }

    /// Which topics are in trouble now.
    pub fn set_troubles(&self, troubles: Troubles) {
        let before = self.topics_in_trouble.swap(troubles.count, Relaxed);
        if before > 0 || troubles.count > 0 {
            self.troubles.send_replace(troubles);
        }
    }

    /// A connection was lost, and is made again.
    pub fn lost(&self, side: Side) {
        self.of_side(side).fetch_add(1, Relaxed);
    }

    /// A scan of the table in this place of the settings is at work.
    pub fn set_scan(&self, table: usize, published: u64, position: u64) {
        self.scan_table.store(table as u64, Relaxed);
        self.scan_published.store(published, Relaxed);
        self.scan_position.store(position, Relaxed);
        self.scanning.store(true, Relaxed);
    }

    /// So many rows that the stream left out were published from the table, or stored as stragglers.
    pub fn reconciled(&self, rows: u64) {
        self.reconciled.fetch_add(rows, Relaxed);
    }

    /// So many comparisons in a row found rows that the stream left out.
    pub fn set_short_rounds(&self, rounds: u32) {
        self.short_rounds.store(u64::from(rounds), Relaxed);
    }

    /// No scan is at work any more.
    pub fn end_scan(&self) {
        self.scanning.store(false, Relaxed);
    }

    /// How the work on the tables goes: written and read through this.
    pub fn upkeep(&self) -> &Upkeep {
        &self.upkeep
    }

    // --- read by whoever watches ---

    /// When it began.
    pub fn began_at(&self) -> SystemTime {
        self.began_at
    }

    /// Since it began.
    pub fn uptime(&self) -> Duration {
        self.began.elapsed()
    }

    /// What the connector is at.
    pub fn phase(&self) -> Phase {
        let phase = usize::from(self.phase.load(Relaxed));
        Phase::ALL.get(phase).copied().unwrap_or(Phase::Connecting)
    }

    /// Since the connector's thread last showed that it lives.
    pub fn since_beat(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.beat_ms.load(Relaxed)))
    }

    /// The topics, in the order in which they came.
    pub fn topics(&self) -> impl Iterator<Item = TopicReading<'_>> {
        let now_ms = self.now_ms();
        let topics = self.topics.iter().filter_map(OnceLock::get);
        topics.map(move |topic| TopicReading {
            name: &topic.name,
            published: topic.published.load(Relaxed),
            quiet_for: Duration::from_millis(now_ms.saturating_sub(topic.last_ms.load(Relaxed))),
        })
    }

    /// Messages with a receipt, of all topics.
    pub fn all_published(&self) -> u64 {
        self.topics().map(|topic| topic.published).sum()
    }

    /// The histogram.
    pub fn latencies(&self) -> LatencyReading {
        LatencyReading {
            buckets: std::array::from_fn(|bucket| self.latency[bucket].load(Relaxed)),
            sum: Duration::from_micros(self.latency_sum_us.load(Relaxed)),
        }
    }

    /// What passed, over all pipes of this process.
    pub fn counters(&self) -> Counters {
        Counters {
            events: self.events.load(Relaxed),
            acknowledged: self.acknowledged.load(Relaxed),
            stragglers: self.stragglers.load(Relaxed),
            suppressed: self.suppressed.load(Relaxed),
            transactions: self.transactions.load(Relaxed),
            skipped: self.skipped.load(Relaxed),
            refused: self.refused.load(Relaxed),
        }
    }

    /// Repeats that reached no topic: rows that Postgres sent again and the pipe knew, messages that the broker knew.
    pub fn duplicates_suppressed(&self) -> u64 {
        self.suppressed.load(Relaxed) + self.recognized.load(Relaxed)
    }

    /// Everything before this was received.
    pub fn received(&self) -> Lsn {
        Lsn::new(self.received.load(Relaxed))
    }

    /// The confirmed position; zero before the first stream.
    pub fn confirmed(&self) -> Lsn {
        Lsn::new(self.confirmed.load(Relaxed))
    }

    /// Events without receipt, and their bytes.
    pub fn in_flight(&self) -> (u64, u64) {
        (
            self.in_flight_messages.load(Relaxed),
            self.in_flight_bytes.load(Relaxed),
        )
    }

    /// Events that have neither a receipt nor a place among the stragglers.
    pub fn unfinished(&self) -> u64 {
        self.unfinished.load(Relaxed)
    }

    /// Which topics are in trouble.
    pub fn troubles(&self) -> Troubles {
        self.troubles.borrow().clone()
    }

    /// How many topics are in trouble.
    pub fn topics_in_trouble(&self) -> u64 {
        self.topics_in_trouble.load(Relaxed)
    }

    /// How often a connection of this side was lost.
    pub fn times_lost(&self, side: Side) -> u64 {
        self.of_side(side).load(Relaxed)
    }

    /// Rows that the stream left out and that came from the table.
    pub fn all_reconciled(&self) -> u64 {
        self.reconciled.load(Relaxed)
    }

    /// Comparisons in a row that found such rows.
    pub fn short_rounds(&self) -> u64 {
        self.short_rounds.load(Relaxed)
    }

    /// How far the scan is, if one is at work.
    pub fn scan(&self) -> Option<ScanReading> {
        self.scanning.load(Relaxed).then(|| ScanReading {
            published: self.scan_published.load(Relaxed),
            position: self.scan_position.load(Relaxed),
            table: usize::try_from(self.scan_table.load(Relaxed)).unwrap_or(usize::MAX),
        })
    }

    fn of_side(&self, side: Side) -> &AtomicU64 {
        match side {
            Side::Postgres => &self.lost_postgres,
            Side::Pulsar => &self.lost_pulsar,
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
#[path = "meter_tests.rs"]
mod tests;
