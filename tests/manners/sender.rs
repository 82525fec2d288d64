//! The library's own publisher, driven as the connector drives it, and the verdict on what the fake brokers stored.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tracing::subscriber::DefaultGuard;
use walpost::ack::AckTracker;
use walpost::outbox::key_hash;
use walpost::pulsar::{
    Auth, Codec, Doubts, Flush, HashingScheme, Outgoing, Publisher, PublisherConfig, RowTag,
};
use walpost::{Lsn, Result};

use crate::support::{FakeBroker, StoredEvent};

/// Far longer than any test here takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);
/// Short, so that a test of silence is short; far longer than a receipt takes over loopback.
pub(crate) const SEND_TIMEOUT: Duration = Duration::from_millis(500);
/// How often a condition outside of the publisher is looked at.
const TICK: Duration = Duration::from_millis(2);
/// Bytes of WAL from one commit record to the next.
const COMMIT_DISTANCE: u64 = 64;

/// The settings of every publisher here; the service URL names these hosts.
pub(crate) fn config(service: Vec<(String, u16)>) -> PublisherConfig {
    PublisherConfig {
        service,
        auth: Auth::default(),
        tls: None,
        rows: None,
        doubts: Doubts::default(),
        meter: Arc::default(),
        keepalive_interval: Duration::from_secs(30),
        producer_name: "manners".to_owned(),
        routing: String::new(),
        lanes: 2,
        hashing: HashingScheme::default(),
        partition_refresh: Duration::from_secs(60),
        producer_idle: Duration::from_secs(60),
        compression: Codec::None,
        diversion: None,
        schema: None,
        batch_max_messages: 10,
        batch_max_bytes: 128 * 1024,
        batch_linger: Duration::from_millis(1),
        max_in_flight_messages: 100_000,
        max_in_flight_bytes: 32 * 1024 * 1024,
        send_timeout: SEND_TIMEOUT,
        reconnect: (Duration::from_millis(5), Duration::from_millis(50)),
    }
}

/// One event that was published.
#[derive(Debug)]
struct Sent {
    topic: String,
    key: String,
    id: String,
    payload: Vec<u8>,
    deliver_at_ms: Option<i64>,
    commit_lsn: Lsn,
}

/// A publisher, the book of its receipts, and what was published.
pub(crate) struct Sender {
    pub(crate) publisher: Publisher,
    config: PublisherConfig,
    tracker: AckTracker,
    /// The last commit record.
    commit: u64,
    sent: Vec<Sent>,
    /// The ids of what was diverted, if it is stored elsewhere as soon as it comes.
    pub(crate) elsewhere: Option<Vec<String>>,
}

impl Sender {
    /// A publisher that has connected to its service URL, which is this one broker.
    pub(crate) async fn to(broker: &FakeBroker) -> Self {
        let mut sender = Self::new(vec![broker.host()]);
        let connected = sender.publisher.connect().await;
        connected.expect("a healthy broker is connected to");
        sender
    }

    /// One that has not connected yet.
    pub(crate) fn new(service: Vec<(String, u16)>) -> Self {
        Self::with(config(service))
    }

    /// The same with other settings.
    pub(crate) fn with(config: PublisherConfig) -> Self {
        Self {
            publisher: Publisher::new(config.clone()),
            config,
            tracker: AckTracker::new(Lsn::ZERO),
            commit: 0,
            sent: Vec::new(),
            elsewhere: None,
        }
    }

    /// Publishes one event that is larger than the batches of these tests, and waits for its receipt: the topic accepts such batches, so
    /// several are under way at a time from now on.
    pub(crate) async fn open(&mut self, topic: &str) {
        self.try_publish(topic, "key", &[b'x'; 1200])
            .expect("an event that fits");
        self.delivered().await;
    }

    /// Publishes one event in a transaction of its own; returns its id.
    pub(crate) fn publish(&mut self, topic: &str, key: &str) -> String {
        let id = format!("row-{}", self.sent.len());
        self.try_publish(topic, key, id.as_bytes())
            .expect("an event that fits");
        id
    }

    /// The same with this payload; an error when the publisher does not take it.
    pub(crate) fn try_publish(&mut self, topic: &str, key: &str, payload: &[u8]) -> Result<()> {
        self.try_publish_at(topic, key, payload, None)
    }

    /// The same, to be delivered at this time.
    pub(crate) fn try_publish_at(
        &mut self,
        topic: &str,
        key: &str,
        payload: &[u8],
        deliver_at_ms: Option<i64>,
    ) -> Result<()> {
        self.commit += COMMIT_DISTANCE;
        let event = Sent {
            topic: topic.to_owned(),
            key: key.to_owned(),
            id: format!("row-{}", self.sent.len()),
            payload: payload.to_vec(),
            deliver_at_ms,
            commit_lsn: Lsn::new(self.commit),
        };
        self.hand_over(&event)?;
        self.sent.push(event);
        Ok(())
    }

    fn hand_over(&mut self, sent: &Sent) -> Result<()> {
        let txn = self.tracker.begin();
        let event = Outgoing {
            key: &sent.key,
            payload: Some(&sent.payload),
            event_time_ms: 0,
            deliver_at_ms: sent.deliver_at_ms,
            txn,
            commit_lsn: sent.commit_lsn,
            row: RowTag::default(),
            mark: None,
        };
        let properties = [("id", sent.id.as_str())];
        let hash = key_hash(sent.key.as_bytes());
        let taken = self
            .publisher
            .publish(&sent.topic, hash, &event, &properties.into_iter());
        if taken.is_ok() {
            self.tracker.track();
        }
        self.tracker.commit(end_of(sent.commit_lsn));
        self.publisher.end_transaction();
        taken.map(drop)
    }

    /// As if the process was killed and started again: a new publisher under the same names gets everything once more that is
    /// not confirmed, in batches of another size.
    pub(crate) fn restart(&mut self, batch_max_messages: u32) {
        let confirmed = self.tracker.flush_lsn(Lsn::ZERO);
        self.tracker = AckTracker::new(confirmed);
        self.publisher = Publisher::new(PublisherConfig {
            batch_max_messages,
            ..self.config.clone()
        });
        let sent = std::mem::take(&mut self.sent);
        for event in sent
            .iter()
            .filter(|event| end_of(event.commit_lsn) > confirmed)
        {
            self.hand_over(event).expect("it fitted before");
        }
        self.sent = sent;
    }

    /// Publishes so many events of one key.
    pub(crate) fn publish_many(&mut self, topic: &str, key: &str, count: usize) {
        for _ in 0..count {
            self.publish(topic, key);
        }
    }

    /// Serves the publisher until `done`; an error is one that it returned.
    pub(crate) async fn serve_until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&Publisher) -> bool,
    ) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            while let Some(event) = self.publisher.try_next_event() {
                self.apply(event)?;
            }
            self.publisher.flush(Flush::Due);
            let now = tokio::time::Instant::now();
            self.publisher.tick(now);
            if done(&self.publisher) {
                return Ok(());
            }
            assert!(
                Instant::now() < end,
                "gave up waiting for {what}; {:?} without receipt",
                self.publisher.in_flight()
            );
            tokio::select! {
                event = self.publisher.next_event() => self.apply(event)?,
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    fn apply(&mut self, event: walpost::pulsar::BrokerEvent) -> Result<()> {
        let result = self.publisher.handle(event);
        for (txn, count) in self.publisher.take_acked() {
            self.tracker.ack(txn, count);
        }
        if self.elsewhere.is_some() && self.publisher.has_diverted() {
            let ids = self.store_diverted();
            self.elsewhere.get_or_insert_default().extend(ids);
        }
        result
    }

    /// Serves the publisher until a condition that lies outside of it.
    pub(crate) async fn until(&mut self, what: &str, mut done: impl FnMut() -> bool) {
        let served = self.serve_until(what, |_| done()).await;
        served.unwrap_or_else(|error| panic!("before {what}: {}", error.report()));
    }

    /// Serves the publisher until every event has its receipt.
    pub(crate) async fn delivered(&mut self) {
        let served = self.serve_until("all receipts", Publisher::is_empty).await;
        served.unwrap_or_else(|error| panic!("{}", error.report()));
        assert!(
            self.tracker.is_idle(),
            "a transaction waits although nothing is in flight"
        );
    }

    /// Takes what was diverted, as if it was stored elsewhere; returns the ids.
    pub(crate) fn store_diverted(&mut self) -> Vec<String> {
        let mut ids = Vec::new();
        for diverted in self.publisher.take_diverted() {
            self.tracker.ack(diverted.event.txn, 1);
            let mut properties = diverted.event.properties.into_iter();
            ids.extend(properties.find(|(name, _)| name == "id").map(|(_, id)| id));
        }
        let stored = self.publisher.stored(ids.len() as u64);
        stored.unwrap_or_else(|error| panic!("{}", error.report()));
        ids
    }

    /// The ids of what was published to this topic, or to all of them, and is neither among these nor stored elsewhere.
    pub(crate) fn missing(&self, topic: Option<&str>, stored: &[StoredEvent]) -> Vec<&str> {
        let stored = stored.iter().map(|event| event.id.as_str());
        let elsewhere = self.elsewhere.iter().flatten().map(String::as_str);
        let found: HashSet<&str> = stored.chain(elsewhere).collect();
        let of_topic = |sent: &&Sent| topic.is_none_or(|topic| sent.topic == topic);
        let sent = self.sent.iter().filter(of_topic);
        let ids = sent.map(|sent| sent.id.as_str());
        ids.filter(|id| !found.contains(id)).collect()
    }

    /// Everything published is stored, and nothing else; the first arrivals of a topic's key are in the order of
    /// publishing. Returns how many arrivals were repeats.
    pub(crate) fn assert_at_least_once(&self, stored: &[StoredEvent]) -> usize {
        let mut expected: HashMap<(&str, &str), Vec<&str>> = HashMap::new();
        for sent in &self.sent {
            let key = (sent.topic.as_str(), sent.key.as_str());
            expected.entry(key).or_default().push(&sent.id);
        }
        let mut arrived: HashMap<(&str, &str), Vec<&str>> = HashMap::new();
        let mut seen = HashSet::new();
        for event in stored {
            if seen.insert(&event.id) {
                let key = (event.topic.as_str(), event.key.as_str());
                arrived.entry(key).or_default().push(&event.id);
            }
        }
        for (key, expected) in &expected {
            let arrived = arrived.remove(key).unwrap_or_default();
            assert_eq!(
                &arrived, expected,
                "not what was published to {key:?}, or not in order"
            );
        }
        assert!(arrived.is_empty(), "nobody published {arrived:?}");
        stored.len() - seen.len()
    }

    /// Everything published is stored once, the events of a topic's key in the order of publishing.
    pub(crate) fn assert_exactly_once(&self, stored: &[StoredEvent]) {
        let repeats = self.assert_at_least_once(stored);
        assert_eq!(repeats, 0, "repeats among {stored:#?}");
    }
}

/// Where a commit record ends.
fn end_of(commit_lsn: Lsn) -> Lsn {
    Lsn::new(commit_lsn.as_u64() + COMMIT_DISTANCE / 2)
}

/// What walpost logs in this thread while the value lives.
pub(crate) struct Log {
    text: Arc<Mutex<Vec<u8>>>,
    _guard: DefaultGuard,
}

impl Log {
    pub(crate) fn capture() -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = Arc::clone(&text);
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || Writer(Arc::clone(&writer)))
            .finish();
        Self {
            text,
            _guard: tracing::subscriber::set_default(subscriber),
        }
    }

    /// Everything so far.
    pub(crate) fn text(&self) -> String {
        let bytes = self.text.lock().expect("no writer panics");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A warning that holds all of these.
    pub(crate) fn warns(&self, words: &[&str]) -> bool {
        let text = self.text();
        text.lines()
            .any(|line| line.contains("WARN") && words.iter().all(|word| line.contains(word)))
    }

    /// An error that holds all of these.
    pub(crate) fn complains(&self, words: &[&str]) -> bool {
        let text = self.text();
        text.lines()
            .any(|line| line.contains("ERROR") && words.iter().all(|word| line.contains(word)))
    }
}

struct Writer(Arc<Mutex<Vec<u8>>>);

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .expect("no writer panics")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
