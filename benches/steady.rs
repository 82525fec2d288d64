//! How late events are at a steady rate: from the commit to the broker's receipt, and to a consumer.
//!
//! Concurrent writers commit transactions by a timetable that does not wait for them (an open loop): a transaction that is
//! late because the one before it was is late by the timetable, and its events' figures say so. Three things are measured
//! in one run, in percentiles over all events after a warm-up:
//!
//! | figure | from | to |
//! |---|---|---|
//! | `receipt` | the writer sees its commit | the broker's receipt passes the tap |
//! | `consumer` | the writer sees its commit | a consumer of the `pulsar` crate has the message |
//! | `due_receipt` | the transaction was due | the broker's receipt passes the tap: with the transaction itself, and all waiting |
//! | `log` | the writer sees its commit | the batch passes the tap: the share of `receipt` that is Postgres' and walpost's |
//! | `broker` | the batch passes the tap | its receipt passes the tap: the broker's share of `receipt` |
//! | `plain` | walpost's publisher is handed the event, no database, no tap, at the same rate to the same broker just before | its receipt is handled |
//!
//! The tap (`support/tap.rs`) stands between walpost and the broker; its detour counts against walpost. A receipt may
//! come before the writer hears that its commit is done, and then counts as zero.
//!
//! What reading the log adds to publishing is the p99 of `receipt` less the broker's own: `over_broker_p99` with that of
//! the very same messages, while writers, database and consumer load the machine; `over_plain_p99` with that of
//! `plain`, which has the machine to itself.
//!
//! `cargo bench --bench steady` (settings by env: `RATES`, default `100,1000,10000,30000`; `SECONDS`, 20; `WARM_UP`, 5;
//! `ROUNDS`, 5). A rate that the machine cannot sustain ends the bench with what is missing, not with a figure.

#![allow(
    clippy::cast_possible_truncation,
    clippy::large_futures,
    reason = "a bench's numbers are its own, and it has the stack for the pulsar crate's futures"
)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use support::tests::{Command, Database, Walpost, eventually, servers, unique};
use support::{
    Clock, LIMIT, Latencies, PlainPublisher, Results, Tap, cpu_seconds, delete_topics, number_in,
    numbered, setting,
};
use tokio_postgres::NoTls;

/// Sessions that write.
const WRITERS: usize = 16;
/// Transactions a second at most: from there on they grow. A commit is a flush of the log, and disks have their limits.
const MOST_TRANSACTIONS_PER_S: u64 = 1000;
const PAYLOAD_BYTES: usize = 300;
/// Messages a consumer asks for ahead.
const AHEAD: u32 = 20_000;
/// What is still on its way when the last transaction has committed.
const TAIL: Duration = Duration::from_secs(60);

/// One rate's timetable.
#[derive(Clone, Copy)]
struct Plan {
    per_second: u64,
    per_txn: u64,
    warm_up: Duration,
    duration: Duration,
}

impl Plan {
    fn transactions(self) -> usize {
        let seconds = (self.warm_up + self.duration).as_secs();
        (self.per_second * seconds / self.per_txn) as usize
    }

    fn events(self) -> usize {
        self.transactions() * self.per_txn as usize
    }

    /// The first event that counts.
    fn first(self) -> usize {
        (self.per_second * self.warm_up.as_secs()) as usize
    }

    /// When a transaction is due, after the start.
    fn due(self, transaction: usize) -> Duration {
        let events = transaction as f64 * self.per_txn as f64;
        Duration::from_secs_f64(events / self.per_second as f64)
    }
}

/// What happens to the events, and when.
struct Clocks {
    due: Clock,
    committed: Clock,
    sent: Arc<Clock>,
    receipt: Arc<Clock>,
    consumer: Clock,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let rates = std::env::var("RATES").unwrap_or("100,1000,10000,30000".to_owned());
    let (seconds, warm_up, rounds) = (
        setting("SECONDS", 20),
        setting("WARM_UP", 5),
        setting("ROUNDS", 5),
    );
    let settings = [
        ("SECONDS", seconds),
        ("WARM_UP", warm_up),
        ("ROUNDS", rounds),
    ];
    let mut results = Results::begin_on_servers("steady", &settings);
    for round in 1..=rounds {
        for rate in rates.split(',') {
            let per_second: u64 = rate.parse().expect("RATES: whole numbers");
            let plan = Plan {
                per_second,
                per_txn: per_second.div_ceil(MOST_TRANSACTIONS_PER_S),
                warm_up: Duration::from_secs(warm_up),
                duration: Duration::from_secs(seconds),
            };
            measure(&mut results, round, plan).await;
            delete_topics().await;
        }
    }
}

async fn measure(results: &mut Results, round: u64, plan: Plan) {
    let alone = without_database(plan).await.percentiles_ms();
    let (clocks, cpu_us) = stream(plan).await;
    let from = plan.first();
    let of = |a: &Clock, b: &Clock| Latencies::between(a, b, from).percentiles_ms();
    let receipt = of(&clocks.committed, &clocks.receipt);
    let broker = of(&clocks.sent, &clocks.receipt);
    let named = [
        (
            ["receipt_p50_ms", "receipt_p99_ms", "receipt_p999_ms"],
            receipt,
        ),
        (
            ["consumer_p50_ms", "consumer_p99_ms", "consumer_p999_ms"],
            of(&clocks.committed, &clocks.consumer),
        ),
        (
            [
                "due_receipt_p50_ms",
                "due_receipt_p99_ms",
                "due_receipt_p999_ms",
            ],
            of(&clocks.due, &clocks.receipt),
        ),
        (["broker_p50_ms", "broker_p99_ms", "broker_p999_ms"], broker),
        (
            ["log_p50_ms", "log_p99_ms", "log_p999_ms"],
            of(&clocks.committed, &clocks.sent),
        ),
        (["plain_p50_ms", "plain_p99_ms", "plain_p999_ms"], alone),
    ];
    let mut figures: Vec<(&str, f64)> = named
        .into_iter()
        .flat_map(|(names, values)| names.into_iter().zip(values))
        .collect();
    figures.push(("over_broker_p99_ms", receipt[1] - broker[1]));
    figures.push(("over_plain_p99_ms", receipt[1] - alone[1]));
    figures.push(("cpu_us_per_event", cpu_us));
    results.record(&format!("{}/s", plan.per_second), round, &figures);
}

/// The same rate without a database.
async fn without_database(plan: Plan) -> Latencies {
    let (host, port) = servers()
        .pulsar_addr
        .rsplit_once(':')
        .expect("host and port");
    let broker = (host.to_owned(), port.parse().expect("a port"));
    let topic = format!("persistent://public/default/{}", unique("plain"));
    let publisher = PlainPublisher::open(broker, &topic).await;
    let times = (plan.warm_up, plan.duration);
    let running = publisher.run(plan.per_second, plan.per_txn, times);
    let deadline = plan.warm_up + plan.duration + TAIL;
    let latencies = tokio::time::timeout(deadline, running).await;
    latencies.expect("receipts for all in time")
}

/// The rate through walpost: what became of every event, and walpost's processor time for each.
async fn stream(plan: Plan) -> (Arc<Clocks>, f64) {
    let database = Database::create("steady").await;
    database.init(&[], &[]).await;
    let zero = Instant::now();
    let clock = || Clock::new(zero, plan.events());
    let clocks = Arc::new(Clocks {
        due: clock(),
        committed: clock(),
        sent: Arc::new(clock()),
        receipt: Arc::new(clock()),
        consumer: clock(),
    });
    let (sent, receipt) = (Arc::clone(&clocks.sent), Arc::clone(&clocks.receipt));
    let tap = Tap::before(&servers().pulsar_addr, sent, receipt);
    let consumer = consume(database.topic("order"), Arc::clone(&clocks)).await;
    let walpost = start(&database, &tap).await;
    let before = cpu_seconds(walpost.pid());
    let writers = write(&database, plan, Arc::clone(&clocks));
    wait_for_all(plan, &clocks).await;
    let cpu_us = (cpu_seconds(walpost.pid()) - before) * 1e6 / plan.events() as f64;
    writers.join().expect("no writer panics");
    consumer.join().expect("the consumer does not panic");
    walpost.stop().await;
    (clocks, cpu_us)
}

async fn start(database: &Database, tap: &Tap) -> Walpost {
    let mut walpost = Command::walpost(["run"])
        .on(database)
        .env("WALPOST_POSTGRES_URL", &database.socket_url)
        .env("WALPOST_PULSAR_URL", tap.url())
        .spawn();
    walpost.wait_for_line("streaming", LIMIT).await;
    walpost
}

/// Waits until every event has reached the consumer and has its receipt.
async fn wait_for_all(plan: Plan, clocks: &Clocks) {
    let deadline = plan.warm_up + plan.duration + TAIL;
    let what = format!("{} events a second to be sustained", plan.per_second);
    eventually(deadline, &what, async || {
        (clocks.consumer.is_complete() && clocks.receipt.is_complete()).then_some(())
    })
    .await;
}

/// The writers, in a thread of their own: what this thread does must not make them late.
fn write(database: &Database, plan: Plan, clocks: Arc<Clocks>) -> JoinHandle<()> {
    let url = database.socket_url.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let next = AtomicUsize::new(0);
        runtime.block_on(async {
            let started = Instant::now();
            let writers = (0..WRITERS).map(|_| writer(&url, plan, &clocks, &next, started));
            futures::future::join_all(writers).await;
        });
    })
}

/// Takes the next transaction of the timetable, waits until it is due, and commits it.
async fn writer(url: &str, plan: Plan, clocks: &Clocks, next: &AtomicUsize, started: Instant) {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .expect("the local Postgres");
    tokio::spawn(connection);
    let payload = numbered(PAYLOAD_BYTES);
    let insert = client
        .prepare(&format!(
            "insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
             select 'order', 'key-' || i % 1000, 'OrderPlaced', {payload} from generate_series($1::bigint, $2::bigint) i"
        ))
        .await
        .expect("a sound statement");
    loop {
        let transaction = next.fetch_add(1, Ordering::Relaxed);
        if transaction >= plan.transactions() {
            return;
        }
        let due = started + plan.due(transaction);
        tokio::time::sleep_until(due.into()).await;
        let first = transaction * plan.per_txn as usize;
        let last = first + plan.per_txn as usize - 1;
        let number = |event: usize| i64::try_from(event).expect("not that many");
        let inserted = client
            .execute(&insert, &[&number(first), &number(last)])
            .await;
        let committed = Instant::now();
        inserted.expect("an insert");
        for event in first..=last {
            clocks.due.note(event, due);
            clocks.committed.note(event, committed);
        }
    }
}

/// A consumer in a thread of its own, subscribed when this returns; it ends when it has had every event.
async fn consume(topic: String, clocks: Arc<Clocks>) -> JoinHandle<()> {
    let (subscribed, is_subscribed) = tokio::sync::oneshot::channel();
    let consumer = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(Box::pin(async {
            let mut consumer = subscribe(&topic).await;
            let _ = subscribed.send(());
            while !clocks.consumer.is_complete() {
                let message = consumer.next().await.expect("the subscription stays");
                let message = message.expect("a message");
                let at = Instant::now();
                clocks.consumer.note(number_in(&message.payload.data), at);
            }
        }));
    });
    is_subscribed.await.expect("a subscription");
    consumer
}

async fn subscribe(topic: &str) -> Consumer<Vec<u8>, TokioExecutor> {
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor)
        .build()
        .await
        .expect("the local broker");
    let options = ConsumerOptions::default()
        .with_initial_position(InitialPosition::Earliest)
        .with_receiver_queue_size(AHEAD);
    let consumer = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription(unique("steady"))
        .with_subscription_type(SubType::Exclusive)
        .with_batch_size(AHEAD)
        .with_options(options);
    consumer.build().await.expect("a subscription")
}
