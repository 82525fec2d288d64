//! Load on an outbox, and the verdict on what arrived of it.
//!
//! Every key has a counter in a table of its own. A writer raises it and inserts the events that carry the new numbers
//! in one transaction; the counter's row lock is held until the commit, so that **a key's numbers are its commit order**:
//! 1, 2, 3 … without a gap. A transaction that is rolled back takes its numbers back too, and its rows' ids are nowhere.
//! So the outbox table itself is the truth afterwards: [`Committed`] reads it and judges a topic by it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio_postgres::{Client, NoTls};

use super::{Database, Random, Received, eventually};

/// The aggregate type of every event, and so the end of the topic's name.
const AGGREGATETYPE: &str = "load";
/// Few, so that writers meet at the same key all the time.
const KEYS: usize = 20;
/// One transaction of each writer begins in this time: thousands of events a second, and two cores left for the others.
const PACE: Duration = Duration::from_millis(5);
/// Of this many transactions one is rolled back.
const ROLLBACK_ONE_OF: usize = 8;
/// Between attempts to reach a Postgres that is away.
const RETRY: Duration = Duration::from_millis(100);

/// Inserts `$2` events of the key `$1`.
const STEP: &str = "
    WITH next AS (UPDATE load_counter SET n = n + $2 WHERE key = $1 RETURNING key, n)
    INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
    SELECT 'load', key, 'counted', to_json(n - $2 + i) FROM next, generate_series(1, $2) AS i ORDER BY i";

/// What the writers did so far.
#[derive(Default)]
struct Tally {
    stop: AtomicBool,
    committed: AtomicU64,
    rolled_back: AtomicU64,
    broken_sessions: AtomicU64,
}

/// Writers at work, in a thread of their own so that they go on while a test blocks.
pub(crate) struct Load {
    tally: Arc<Tally>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Makes the outbox (`walpost init`) and the counters.
    pub(crate) async fn prepare(database: &Database) {
        database.init(&[], &[]).await;
        Self::counters(database).await;
    }

    /// Makes the counters.
    pub(crate) async fn counters(database: &Database) {
        database
            .sql(&format!(
                "CREATE TABLE load_counter (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
                 INSERT INTO load_counter (key) SELECT 'key-' || i FROM generate_series(0, {KEYS} - 1) i"
            ))
            .await;
    }

    /// The topic its events go to.
    pub(crate) fn topic(database: &Database) -> String {
        database.topic(AGGREGATETYPE)
    }

    /// Starts writers on a prepared database.
    pub(crate) fn start(database: &Database, writers: u64) -> Self {
        let tally = Arc::new(Tally::default());
        let (shared, url) = (Arc::clone(&tally), database.socket_url.clone());
        let thread = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(async {
                    let writers = (0..writers).map(|seed| write(&url, seed, &shared));
                    futures::future::join_all(writers).await;
                });
        });
        Self {
            tally,
            thread: Some(thread),
        }
    }

    /// Waits until this many transactions more are committed: the load is not only meant to run.
    pub(crate) async fn more(&self, transactions: u64) {
        let goal = self.tally.committed.load(Ordering::Relaxed) + transactions;
        eventually(
            Duration::from_secs(60),
            "the writers to commit",
            async || (self.tally.committed.load(Ordering::Relaxed) >= goal).then_some(()),
        )
        .await;
    }

    /// Ends the writers, which have had Postgres all the time.
    pub(crate) fn stop(self) {
        let broken = Arc::clone(&self.tally);
        self.stop_after_outage();
        let broken = broken.broken_sessions.load(Ordering::Relaxed);
        assert_eq!(broken, 0, "sessions of the writers ended in an error");
    }

    /// Ends the writers of a Postgres that was away meanwhile.
    pub(crate) fn stop_after_outage(mut self) {
        self.tally.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("taken only here");
        thread.join().expect("no writer panics");
        let rolled_back = self.tally.rolled_back.load(Ordering::Relaxed);
        assert!(rolled_back > 0, "no transaction was rolled back");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // A test that failed: the thread ends by itself, within one transaction.
        self.tally.stop.store(true, Ordering::Relaxed);
    }
}

/// One writer, to the end of the load; its sessions are made anew when they break.
async fn write(url: &str, seed: u64, tally: &Tally) {
    let mut random = Random::new(seed);
    while !tally.stop.load(Ordering::Relaxed) {
        if let Ok((mut client, connection)) = tokio_postgres::connect(url, NoTls).await {
            tokio::spawn(connection);
            if let Err(error) = transactions(&mut client, &mut random, tally).await {
                eprintln!("a writer's session ended: {error:?}");
                tally.broken_sessions.fetch_add(1, Ordering::Relaxed);
            }
        } else {
            tally.broken_sessions.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn transactions(
    client: &mut Client,
    random: &mut Random,
    tally: &Tally,
) -> Result<(), tokio_postgres::Error> {
    let step = client.prepare(STEP).await?;
    let mut pace = tokio::time::interval(PACE);
    while !tally.stop.load(Ordering::Relaxed) {
        pace.tick().await;
        let transaction = client.transaction().await?;
        // In the order of their names: writers that lock the same keys in different orders would deadlock.
        let mut keys: Vec<_> = (0..=random.below(3)).map(|_| random.below(KEYS)).collect();
        keys.sort_unstable();
        for key in keys {
            let key = format!("key-{key}");
            let count = i64::try_from(1 + random.below(4)).expect("a small number");
            // The parameters' types are those of the counter.
            transaction.execute(&step, &[&key, &count]).await?;
        }
        if random.below(ROLLBACK_ONE_OF) == 0 {
            transaction.rollback().await?;
            tally.rolled_back.fetch_add(1, Ordering::Relaxed);
        } else {
            transaction.commit().await?;
            tally.committed.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Inserts `count` events of one key in one transaction, as the writers do, and returns when it has committed.
pub(crate) async fn insert_many(client: &Client, key: &str, count: i64) {
    let make = "INSERT INTO load_counter (key) VALUES ($1) ON CONFLICT DO NOTHING";
    client.execute(make, &[&key]).await.expect("a counter");
    client
        .execute(STEP, &[&key, &count])
        .await
        .unwrap_or_else(|error| panic!("cannot insert {count} events of {key}: {error:?}"));
}

/// What is committed in an outbox, and what must therefore be in its topic.
pub(crate) struct Committed {
    /// By id: the key, and the number in the key's commit order.
    events: HashMap<String, (String, i64)>,
}

impl Committed {
    /// Reads the outbox. The numbers of each key must be complete, or the verdicts mean nothing.
    pub(crate) async fn read(database: &Database) -> Self {
        let query = "SELECT id::text, aggregateid, payload::text::bigint FROM walpost.outbox";
        let rows = database.rows(query, &[]).await;
        let mut numbers: HashMap<String, Vec<i64>> = HashMap::new();
        let mut events = HashMap::with_capacity(rows.len());
        for row in rows {
            let (key, number): (String, i64) = (row.get(1), row.get(2));
            numbers.entry(key.clone()).or_default().push(number);
            events.insert(row.get(0), (key, number));
        }
        for (key, mut numbers) in numbers {
            numbers.sort_unstable();
            let complete = (1..)
                .zip(&numbers)
                .all(|(expected, number)| expected == *number);
            assert!(complete, "{key} has a gap in its own table");
        }
        assert!(!events.is_empty(), "nothing was committed");
        Self { events }
    }

    /// How many events there are.
    pub(crate) fn len(&self) -> usize {
        self.events.len()
    }

    /// At least once: every committed event arrived and nothing else did; a key's first arrivals are in commit order.
    /// Returns how many arrivals were repeats.
    pub(crate) fn assert_at_least_once(&self, received: &[Received]) -> usize {
        let mut seen = HashSet::with_capacity(self.len());
        let mut last: HashMap<&str, i64> = HashMap::new();
        let mut repeats = 0;
        for (place, message) in received.iter().enumerate() {
            let (key, number) = self.event_of(message, place);
            if !seen.insert(message.property("id")) {
                repeats += 1;
                continue;
            }
            let last = last.entry(key).or_default();
            assert_eq!(
                number,
                *last + 1,
                "message {place} is {key}'s number {number} behind its number {last}"
            );
            *last = number;
        }
        let missing = self
            .events
            .iter()
            .filter(|(id, _)| !seen.contains(id.as_str()));
        let missing: Vec<_> = missing.collect();
        assert!(
            missing.is_empty(),
            "{} of {} events are lost, among them {:?}",
            missing.len(),
            self.len(),
            &missing[..missing.len().min(5)]
        );
        repeats
    }

    /// Exactly once, a key's events in commit order.
    pub(crate) fn assert_exactly_once(&self, received: &[Received]) {
        let repeats = self.assert_at_least_once(received);
        assert_eq!(repeats, 0, "of {} events came twice", self.len());
    }

    /// Each key's messages are its numbers in order, and where they go back they go on from there without a gap; at most
    /// `restarts` times for each key.
    pub(crate) fn assert_reruns(&self, received: &[Received], restarts: usize) {
        let mut keys: HashMap<&str, (i64, usize)> = HashMap::new();
        for (place, message) in received.iter().enumerate() {
            let (key, number) = self.event_of(message, place);
            let (last, went_back) = keys.entry(key).or_default();
            assert!(
                number <= *last + 1,
                "message {place}: {key} goes from its number {last} to {number}"
            );
            *went_back += usize::from(number <= *last);
            *last = number;
        }
        for (key, (_, went_back)) in keys {
            assert!(
                went_back <= restarts,
                "{key} went back {went_back} times in {restarts} restarts"
            );
        }
    }

    /// The committed event that a message says it is.
    fn event_of(&self, message: &Received, place: usize) -> (&str, i64) {
        let id = message.property("id");
        let Some((key, number)) = self.events.get(id) else {
            panic!("message {place} has the id {id}, which nobody committed");
        };
        assert_eq!(message.key.as_ref(), Some(key), "of {id}");
        assert_eq!(message.payload, number.to_string().as_bytes(), "of {id}");
        (key, *number)
    }
}
