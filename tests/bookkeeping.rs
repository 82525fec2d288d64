//! Guarantee: what is noted of delivery holds although others write: `walpost.progress` changes only for the holder of the slot's
//! lock and from the values that it read, and a slot is known by more than a log position. Whatever is not known is read from
//! the table.

#[path = "bookkeeping/changed_slot.rs"]
mod changed_slot;
#[path = "bookkeeping/compare_and_set.rs"]
mod compare_and_set;
#[path = "bookkeeping/hand_made_slots.rs"]
mod hand_made_slots;
#[path = "bookkeeping/missing_tables.rs"]
mod missing_tables;
#[path = "bookkeeping/name_mark.rs"]
mod name_mark;
#[path = "bookkeeping/other_types.rs"]
mod other_types;
#[path = "bookkeeping/settled.rs"]
mod settled;
#[path = "bookkeeping/timelines.rs"]
mod timelines;
#[path = "bookkeeping/two_writers.rs"]
mod two_writers;
#[path = "bookkeeping/unknown_slots.rs"]
mod unknown_slots;
#[path = "bookkeeping/unscannable.rs"]
mod unscannable;

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use support::{Database, consume, eventually, servers};

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
/// So that what is delivered is noted at once.
pub(crate) const NOTED_SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");

pub(crate) const POLL: (&str, &str) = ("WALPOST_MODE", "poll");
/// What `walpost init` makes for the stream.
pub(crate) const PUBLISH: &str = "CREATE PUBLICATION walpost FOR TABLE walpost.outbox WITH (publish = 'insert', publish_via_partition_root = true)";

/// Makes the test's slot as anybody may.
pub(crate) async fn make_slot_by_hand(database: &Database) {
    let create = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')";
    database.rows(create, &[&database.slot]).await;
}

pub(crate) async fn drop_slot(database: &Database) {
    let sql = "SELECT pg_drop_replication_slot($1::text::name)";
    // A walsender lets go a moment after its client did.
    eventually(DEADLINE, "the slot to be free", async || {
        database.client.execute(sql, &[&database.slot]).await.ok()
    })
    .await;
}

/// Inserts a row of the aggregate type `t`, in a session's open transaction if it has one.
pub(crate) async fn insert(client: &tokio_postgres::Client, payload: &str) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', to_json($1::text))";
    client.execute(sql, &[&payload]).await.expect("a row");
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
