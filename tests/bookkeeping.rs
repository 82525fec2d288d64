//! Guarantee: what is noted of delivery holds although others write: `walpost.progress` changes only for the holder of the slot's
//! lock and from the values that it read, and a slot is known by more than a log position. Whatever is not known is read from
//! the table.

#[path = "bookkeeping/compare_and_set.rs"]
mod compare_and_set;
#[path = "bookkeeping/two_writers.rs"]
mod two_writers;

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use support::{Database, consume, eventually, servers};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// So that what is delivered is noted at once.
pub(crate) const NOTED_SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");

/// Inserts a row of the aggregate type `t`, in a session's open transaction if it has one.
pub(crate) async fn insert(client: &tokio_postgres::Client, payload: &str) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', to_json($1::text))";
    client.execute(sql, &[&payload]).await.expect("a row");
}

/// Waits until the status of every row is "sent".
pub(crate) async fn wait_all_sent(database: &Database) {
    eventually(DEADLINE, "every row to be known as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        let rows = database.client.query(sql, &[]).await.ok()?;
        (rows[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

/// The payloads in the topic, once this many messages are there; fails when there are others.
pub(crate) async fn arrived(database: &Database, expected: &[&str]) -> Vec<String> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected.len(), DEADLINE).await;
    let payloads: Vec<String> = received
        .iter()
        .map(|message| String::from_utf8_lossy(&message.payload).replace('"', ""))
        .collect();
    let different: BTreeSet<&str> = payloads.iter().map(String::as_str).collect();
    assert_eq!(different, expected.iter().copied().collect());
    payloads
}
