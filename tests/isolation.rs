//! Guarantee: one row, one table, one partition that cannot be marked, deleted, dropped or made holds up no other. It is left with a
//! reason, tried again, and never published again and again. And a row is known by its table, its id and its `seq` (or `txid`), so
//! that nothing happens to another row of the same id.

#[path = "isolation/identity.rs"]
mod identity;
#[path = "isolation/marks.rs"]
mod marks;
#[path = "isolation/movement.rs"]
mod movement;
#[path = "isolation/notes.rs"]
mod notes;
#[path = "isolation/retention.rs"]
mod retention;
#[path = "isolation/scan.rs"]
mod scan;
mod support;

use std::time::Duration;

use serde_json::Value;

use support::{Database, Received, Walpost, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(90);
const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
const DELETE: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "delete");
/// Rows that are not marked are soon looked for.
const SOON: [(&str, &str); 2] = [
    ("WALPOST_STRAGGLER_AGE", "1s"),
    ("WALPOST_SCAN_INTERVAL", "200ms"),
];
const ROWS: &str = "walpost.outbox";
const UNMARKED: &str = "walpost.outbox WHERE sent_at IS NULL";

async fn insert(database: &Database, numbers: std::ops::RangeInclusive<u32>) {
    database
        .sql(&format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'k' || i % 10, 'e', i::text FROM generate_series({}, {}) i",
            numbers.start(),
            numbers.end()
        ))
        .await;
}

async fn count(database: &Database, what: &str) -> i64 {
    let query = format!("SELECT count(*) FROM {what}");
    database.rows(&query, &[]).await[0].get(0)
}

async fn wait_count(database: &Database, what: &str, expected: i64) {
    let waited = format!("{expected} of {what}");
    eventually(DEADLINE, &waited, async || {
        (count(database, what).await == expected).then_some(())
    })
    .await;
}

/// The payloads in the topic, once there are that many, in order of their numbers.
async fn numbers(topic: &str, expected: usize) -> Vec<u32> {
    let received = consume(&servers().pulsar_url, topic, expected, DEADLINE).await;
    let number = |message: Received| {
        let text = String::from_utf8(message.payload).expect("UTF-8");
        text.parse().expect("a number")
    };
    let mut numbers: Vec<u32> = received.into_iter().map(number).collect();
    numbers.sort_unstable();
    numbers
}

/// Every row is older than `WALPOST_STRAGGLER_AGE`, and rows that were never marked have been looked for several times since.
async fn looked_for_unmarked(database: &Database) {
    looked_for_unmarked_in(database, ROWS).await;
}

/// The same of another table.
async fn looked_for_unmarked_in(database: &Database, table: &str) {
    let young = format!("{table} WHERE created_at > clock_timestamp() - interval '2s'");
    wait_count(database, &young, 0).await;
    for _ in 0..4 {
        let now = "SELECT clock_timestamp()::text";
        let since: String = database.rows(now, &[]).await[0].get(0);
        eventually(DEADLINE, "a look for unmarked rows", async || {
            // Its session runs the query for a page first.
            let sql = format!(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'walpost scanner' AND datname = current_database()
                 AND state = 'idle' AND query_start > '{since}' AND state_change > '{since}'::timestamptz"
            );
            let rows = database.rows(&sql, &[]).await;
            (rows[0].get::<_, i64>(0) > 0).then_some(())
        })
        .await;
    }
}

/// What `/status` says is left.
async fn left(addr: &str) -> Value {
    let answer = support::admin(&format!("http://{addr}"), "GET", "/status", "").await;
    let status: Value = serde_json::from_str(&answer).expect("JSON");
    status["left"].clone()
}

/// Waits until `/status` names that many as left, and gives their reasons.
async fn wait_left(addr: &str, expected: u64) -> String {
    eventually(DEADLINE, &format!("{expected} to be left"), async || {
        let left = left(addr).await;
        (left["count"] == expected).then(|| left.to_string())
    })
    .await
}

/// Where a child serves, as its log says.
async fn addr_of(walpost: &mut Walpost) -> String {
    let line = walpost.wait_for_line("health at http://", DEADLINE).await;
    let (_, addr) = line.split_once("http://").expect("just found");
    addr.trim_end_matches('/').to_owned()
}
