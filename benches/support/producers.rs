//! Producers without a database behind them: what the broker can do by itself.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use pulsar::{Producer, ProducerOptions, Pulsar, TokioExecutor};
use walpost::Lsn;
use walpost::ack::{AckTracker, TxnNo};
use walpost::outbox::key_hash;
use walpost::pulsar::{
    Auth, Codec, Doubts, Flush, HashingScheme, Outgoing, Publisher, PublisherConfig, RowTag,
};

use super::{Latencies, rows};

/// Messages of one batch of the crate's producer, and fewer where their payloads would be more than [`BATCH_BYTES`].
const BATCH: u64 = 1000;
/// As large a batch as walpost makes by default, if one message of it is not larger.
const BATCH_BYTES: u64 = 128 * 1024;
/// Batches of it without receipt.
const BATCHES_AHEAD: usize = 20;
/// How often the plain publisher looks at the clock: as fine as the runtime's timer.
const TICK: Duration = Duration::from_millis(1);
/// Bytes of WAL from one commit record to the next.
const COMMIT_DISTANCE: u64 = 64;

/// walpost's defaults, for a publisher that is driven directly.
pub(crate) fn publisher_config(broker: (String, u16)) -> PublisherConfig {
    PublisherConfig {
        service: vec![broker],
        auth: Auth::default(),
        tls: None,
        rows: None,
        doubts: Doubts::default(),
        keepalive_interval: Duration::from_secs(30),
        producer_name: super::tests::unique("bench"),
        routing: String::new(),
        lanes: 16,
        hashing: HashingScheme::default(),
        partition_refresh: Duration::from_secs(60),
        producer_idle: Duration::from_secs(600),
        compression: Codec::None,
        diversion: None,
        schema: None,
        meter: std::sync::Arc::default(),
        batch_max_messages: 1000,
        batch_max_bytes: 128 * 1024,
        batch_linger: Duration::from_millis(1),
        max_in_flight_messages: 100_000,
        max_in_flight_bytes: 24 * 1024 * 1024,
        send_timeout: Duration::from_secs(30),
        reconnect: (Duration::from_millis(100), Duration::from_secs(5)),
    }
}

/// The `pulsar` crate's producer, in batches of 1000 small messages.
pub(crate) struct CrateProducer {
    producer: Producer<TokioExecutor>,
    payload_bytes: u64,
    batch: u64,
}

impl CrateProducer {
    pub(crate) async fn open(pulsar_url: &str, topic: &str, payload_bytes: u64) -> Self {
        let batch = if payload_bytes <= rows::PAYLOAD_BYTES as u64 {
            BATCH
        } else {
            (BATCH_BYTES / payload_bytes).max(1)
        };
        let pulsar: Pulsar<_> = Pulsar::builder(pulsar_url, TokioExecutor)
            .build()
            .await
            .expect("the local broker can be connected to");
        let options = ProducerOptions {
            batch_size: Some(u32::try_from(batch).expect("small")),
            block_queue_if_full: true,
            ..ProducerOptions::default()
        };
        let producer = pulsar.producer().with_topic(topic).with_options(options);
        Self {
            producer: producer.build().await.expect("a producer"),
            payload_bytes,
            batch,
        }
    }

    /// Publishes so many messages of a drain's size and returns the seconds until the last receipt.
    pub(crate) async fn publish(&mut self, messages: u64) -> f64 {
        let payload = |number| rows::payload_of(number, self.payload_bytes as usize);
        let payloads: Vec<Vec<u8>> = (0..self.batch).map(payload).collect();
        let started = Instant::now();
        let mut receipts = std::collections::VecDeque::new();
        let mut left = messages;
        while left > 0 {
            let mut batch = Vec::new();
            for payload in payloads
                .iter()
                .take(usize::try_from(left).unwrap_or(usize::MAX))
            {
                let message = pulsar::producer::Message {
                    payload: payload.clone(),
                    ..pulsar::producer::Message::default()
                };
                let sent = self.producer.send_non_blocking(message).await;
                batch.push(sent.expect("the broker takes it"));
            }
            left -= batch.len() as u64;
            receipts.push_back(batch);
            if left == 0 {
                self.producer.send_batch().await.expect("the last batch");
            }
            if receipts.len() > BATCHES_AHEAD || left == 0 {
                let wait_for = if left == 0 { receipts.len() } else { 1 };
                for batch in receipts.drain(..wait_for) {
                    try_join_all(batch).await.expect("every receipt");
                }
            }
        }
        started.elapsed().as_secs_f64()
    }
}

/// walpost's own publisher at a fixed rate, and how long each event's receipt took.
pub(crate) struct PlainPublisher {
    publisher: Publisher,
    tracker: AckTracker,
    topic: String,
    /// When each transaction without receipt was published, oldest first; its number, and how many of its events are left.
    waiting: Vec<(TxnNo, Instant, u64)>,
    latencies: Latencies,
    commit_lsn: u64,
}

impl PlainPublisher {
    pub(crate) async fn open(broker: (String, u16), topic: &str) -> Self {
        let mut publisher = Publisher::new(publisher_config(broker));
        publisher.connect().await.expect("the local broker");
        Self {
            publisher,
            tracker: AckTracker::new(Lsn::ZERO),
            topic: topic.to_owned(),
            waiting: Vec::new(),
            latencies: Latencies::default(),
            commit_lsn: 0,
        }
    }

    /// Publishes transactions of `per_txn` events, `per_second` events in all, for this long; the latencies of those after
    /// the warm-up. From the call that hands an event over: the clock's coarseness is not the broker's.
    pub(crate) async fn run(
        mut self,
        per_second: u64,
        per_txn: u64,
        (warm_up, duration): (Duration, Duration),
    ) -> Latencies {
        let payloads: Vec<Vec<u8>> = (0..1000).map(rows::payload).collect();
        let pause = Duration::from_secs(1).mul_f64(per_txn as f64 / per_second as f64);
        let started = Instant::now();
        let mut due = started;
        let mut tick = tokio::time::interval(TICK);
        while started.elapsed() < warm_up + duration {
            while due <= Instant::now() {
                self.transaction(per_txn, &payloads);
                due += pause;
            }
            self.publisher.flush(Flush::Due);
            // Receipts first: a late tick makes up for it, a receipt noted late is a wrong figure.
            tokio::select! {
                biased;
                event = self.publisher.next_event() => self.handle(event, started + warm_up),
                _ = tick.tick() => {}
            }
        }
        self.publisher.flush(Flush::All);
        while !self.publisher.is_empty() {
            let event = self.publisher.next_event().await;
            self.handle(event, started + warm_up);
        }
        self.latencies
    }

    fn transaction(&mut self, events: u64, payloads: &[Vec<u8>]) {
        self.commit_lsn += COMMIT_DISTANCE;
        let txn = self.tracker.begin();
        self.waiting.push((txn, Instant::now(), events));
        for number in 0..events {
            let number = self.commit_lsn / COMMIT_DISTANCE * events + number;
            let key = format!("key-{}", number % 1000);
            let event = Outgoing {
                key: &key,
                payload: Some(&payloads[(number % 1000) as usize]),
                event_time_ms: 1_750_000_000_000,
                deliver_at_ms: None,
                txn,
                commit_lsn: Lsn::new(self.commit_lsn),
                row: RowTag::default(),
                mark: None,
            };
            self.publisher
                .publish(
                    &self.topic,
                    key_hash(key.as_bytes()),
                    &event,
                    &[].into_iter(),
                )
                .expect("an event that fits");
            self.tracker.track();
        }
        self.tracker.commit(Lsn::new(self.commit_lsn + 8));
    }

    fn handle(&mut self, event: walpost::pulsar::BrokerEvent, counts_from: Instant) {
        self.publisher.handle(event).expect("a healthy broker");
        let now = Instant::now();
        for (txn, count) in self.publisher.take_acked() {
            self.tracker.ack(txn, count);
            let at = self.waiting.binary_search_by_key(&txn, |(txn, ..)| *txn);
            let (_, published, left) = &mut self.waiting[at.expect("it waits")];
            *left -= count;
            if *published >= counts_from {
                for _ in 0..count {
                    self.latencies.add(now - *published);
                }
            }
        }
        let finished = self.waiting.iter().take_while(|(.., left)| *left == 0);
        let finished = finished.count();
        self.waiting.drain(..finished);
    }
}
