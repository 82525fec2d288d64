//! The small pieces of the data's path, each as a body that does [`OPERATIONS`] of one kind.
//!
//! `micro` times them, `instructions` counts what they execute. What a body does inside of [`Meter::measure`] counts,
//! what it does around it (waiting for receipts, making rows) does not. Only walpost's public interface is used. The frame's
//! header, checksum and compression are no public function: they are measured through
//! [`Publisher::publish`] and [`Publisher::flush`], which is all that the connector's task does with an event. The socket
//! is written by a task of its own and is not in these figures; a fake broker in this process gives the receipts.

use std::hint::black_box;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::time::timeout;
use walpost::Lsn;
use walpost::ack::AckTracker;
use walpost::outbox::{Columns, Extractor, Scratch, TopicTemplate, key_hash};
use walpost::pgoutput::{Message, Tuple, parse};
use walpost::pulsar::{Codec, Flush, Outgoing, Publisher, RowTag};

use super::tests::FakeBroker;
use super::{LIMIT, publisher_config, rows};

/// Operations of one call of a body: as many rows as a transaction of a busy outbox may have.
pub(crate) const OPERATIONS: u64 = 1000;
/// Bytes of WAL from one commit record to the next.
const COMMIT_DISTANCE: u64 = 4096;

/// Sums up what is measured.
#[derive(Default)]
pub(crate) struct Meter(Duration);

impl Meter {
    /// Does the work and counts it. `instructions` lets callgrind count inside of this function only, hence its own name.
    #[inline(never)]
    pub(crate) fn measure<R>(&mut self, work: impl FnOnce() -> R) -> R {
        let started = Instant::now();
        let result = work();
        self.0 += started.elapsed();
        result
    }

    /// The time so far.
    pub(crate) fn elapsed(&self) -> Duration {
        self.0
    }
}

/// One piece of work; a call does [`OPERATIONS`] of its kind.
pub(crate) type Body = Box<dyn FnMut(&mut Meter)>;

/// Every body by its name: what is done, and how.
pub(crate) const ALL: [&str; 12] = [
    "decode/binary",
    "decode/text",
    "extract_route/binary",
    "extract_route/text",
    "encode/1_lane",
    "encode/16_lanes",
    "encode/lz4",
    "encode/snappy",
    "encode/zlib",
    "encode/zstd",
    "ack/in_order",
    "ack/reverse",
];

/// Makes a body ready to be called.
pub(crate) fn prepare(name: &str) -> Body {
    let (what, how) = name.split_once('/').expect("a name of `ALL`");
    match (what, how) {
        ("decode", _) => decode(how == "binary"),
        ("extract_route", _) => extract_route(how == "binary"),
        ("encode", "1_lane") => encode(1, Codec::None),
        ("encode", "16_lanes") => encode(16, Codec::None),
        ("encode", codec) => encode(16, Codec::parse(codec).expect("a codec's name")),
        ("ack", _) => ack(how == "reverse"),
        _ => panic!("there is no body {name:?}: {ALL:?}"),
    }
}

fn inserts(binary: bool) -> Vec<Vec<u8>> {
    (0..OPERATIONS)
        .map(|number| rows::insert_message(number, binary))
        .collect()
}

/// `XLogData`'s payload → `Message`.
fn decode(binary: bool) -> Body {
    let messages = inserts(binary);
    Box::new(move |meter| {
        meter.measure(|| {
            for message in &messages {
                let _ = black_box(parse(black_box(message)).expect("a sound message"));
            }
        });
    })
}

/// Tuple → event, its topic and its key's hash.
fn extract_route(binary: bool) -> Body {
    let messages = inserts(binary);
    let template = "persistent://public/default/outbox.{aggregatetype}";
    let template = TopicTemplate::parse(template).expect("a sound template");
    let extractor = Extractor::new(&rows::relation(), &Columns::default(), &template);
    let mut extractor = extractor.expect("a sound table");
    let mut scratch = Scratch::new();
    Box::new(move |meter| {
        let tuples: Vec<Tuple<'_>> = messages.iter().map(|message| tuple_of(message)).collect();
        meter.measure(|| {
            for tuple in &tuples {
                let event = extractor
                    .extract(tuple, &mut scratch)
                    .expect("a sound event");
                let topic = extractor.topic(tuple, &event).expect("a sound topic");
                black_box((topic, key_hash(event.aggregateid.as_bytes()), event));
            }
        });
    })
}

fn tuple_of(message: &[u8]) -> Tuple<'_> {
    match parse(message) {
        Ok(Message::Insert { tuple, .. }) => tuple,
        other => panic!("not an insert: {other:?}"),
    }
}

/// Event → its lane's batch → frames, handed to the task that owns the broker's socket.
fn encode(lanes: u32, codec: Codec) -> Body {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut sender = Sender::new(&runtime, lanes, codec);
    let keys: Vec<String> = (0..OPERATIONS).map(|n| format!("key-{n}")).collect();
    let ids: Vec<String> = (0..OPERATIONS).map(|n| format!("{n:036}")).collect();
    let payloads: Vec<Vec<u8>> = (0..OPERATIONS).map(rows::payload).collect();
    let mut transaction = move |meter: &mut Meter| {
        sender.commit_lsn += COMMIT_DISTANCE;
        let txn = sender.tracker.begin();
        let publisher = &mut sender.publisher;
        // A publisher starts tasks.
        let inside = runtime.enter();
        meter.measure(|| {
            for ((key, id), payload) in keys.iter().zip(&ids).zip(&payloads) {
                let event = Outgoing {
                    key,
                    payload: Some(payload),
                    event_time_ms: 1_750_000_000_000,
                    deliver_at_ms: None,
                    txn,
                    commit_lsn: Lsn::new(sender.commit_lsn),
                    row: RowTag::default(),
                    mark: None,
                };
                let properties = [
                    ("id", id.as_str()),
                    ("type", "OrderPlaced"),
                    ("aggregatetype", "order"),
                ];
                publisher
                    .publish(
                        "persistent://public/default/outbox.order",
                        key_hash(key.as_bytes()),
                        &event,
                        &properties.into_iter(),
                    )
                    .expect("an event that fits");
            }
            publisher.flush(Flush::All);
        });
        drop(inside);
        for _ in 0..OPERATIONS {
            sender.tracker.track();
        }
        sender.tracker.commit(Lsn::new(sender.commit_lsn + 8));
        let settled = runtime.block_on(async { timeout(LIMIT, sender.settle()).await });
        settled.expect("receipts for all in time");
    };
    // Opens the topic and every lane.
    transaction(&mut Meter::default());
    Box::new(transaction)
}

/// A publisher whose broker is in this process.
struct Sender {
    publisher: Publisher,
    tracker: AckTracker,
    broker: FakeBroker,
    commit_lsn: u64,
}

impl Sender {
    fn new(runtime: &Runtime, lanes: u32, compression: Codec) -> Self {
        runtime.block_on(async {
            let broker = FakeBroker::start().await;
            let mut config = publisher_config(broker.host());
            config.lanes = lanes;
            config.compression = compression;
            let mut publisher = Publisher::new(config);
            publisher.connect().await.expect("it is there");
            Self {
                publisher,
                tracker: AckTracker::new(Lsn::ZERO),
                broker,
                commit_lsn: 0,
            }
        })
    }

    /// Takes receipts until all are there.
    async fn settle(&mut self) {
        while !self.publisher.is_empty() {
            let event = self.publisher.next_event().await;
            self.publisher.handle(event).expect("a healthy broker");
            for (txn, count) in self.publisher.take_acked() {
                self.tracker.ack(txn, count);
            }
            self.publisher.flush(Flush::All);
        }
        self.broker.forget();
    }
}

/// One event a transaction: begun, committed and acknowledged, and the flush LSN asked for.
fn ack(reverse: bool) -> Body {
    let mut tracker = AckTracker::new(Lsn::ZERO);
    let mut lsn = 0;
    let mut txns = Vec::with_capacity(OPERATIONS as usize);
    Box::new(move |meter| {
        meter.measure(|| {
            txns.clear();
            for _ in 0..OPERATIONS {
                lsn += COMMIT_DISTANCE;
                txns.push(tracker.begin());
                tracker.track();
                tracker.commit(Lsn::new(lsn));
            }
            if reverse {
                txns.reverse();
            }
            for txn in &txns {
                tracker.ack(*txn, 1);
                black_box(tracker.flush_lsn(Lsn::ZERO));
            }
        });
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::new(lsn));
    })
}
