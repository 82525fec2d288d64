//! Guarantee: a `Key_Shared` subscription can share the work although messages travel in batches: a key's messages are all
//! at one consumer, in order.
//!
//! The broker dispatches whole entries by the batch's `ordering_key`, which is the lane. Judged by the C++ client.

mod support;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use serde_json::json;
use support::{Database, Judged, Python, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const CONSUMERS: usize = 4;
const WRITERS: i64 = 4;
/// Of each writer; a key has one writer, so its numbers are its commit order.
const KEYS: i64 = 100;
const TRANSACTIONS: i64 = 100;
/// Each transaction has one event of each of these many keys, so that a batch has many keys.
const KEYS_AT_A_TIME: i64 = 25;
/// 4 writers, 100 transactions, 25 keys.
const EVENTS: usize = 10_000;

/// One writer: transaction after transaction, each over another quarter of its keys.
async fn write(database: &Database, writer: i64) {
    let client = database.connect().await;
    let insert = client
        .prepare(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 'shared', 'key-' || $1::int8 || '-' || k, 'counted', to_json($2::int8)
             FROM generate_series($3::int8, $4::int8) k",
        )
        .await
        .expect("the outbox is there");
    for transaction in 0..TRANSACTIONS {
        let first = transaction * KEYS_AT_A_TIME % KEYS;
        let round = transaction * KEYS_AT_A_TIME / KEYS;
        let last = first + KEYS_AT_A_TIME - 1;
        client
            .execute(&insert, &[&writer, &round, &first, &last])
            .await
            .expect("rows can be inserted");
    }
}

/// Consumers that take what comes while the writers are at work, and the verdict.
async fn each_key_is_at_one_consumer(sticky: bool) {
    // GIVEN 16 lanes, batches, and four consumers that stay
    let database = Database::create("shared").await;
    database.init(&[], &[]).await;
    let order = json!({"topic": database.topic("shared"), "type": "KeyShared", "consumers": CONSUMERS, "sticky": sticky});
    let mut consumers = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumers.next(DEADLINE).await, json!({"ready": true}));
    let settings = [
        ("WALPOST_LANES", "16"),
        ("WALPOST_BATCH_LINGER", "20ms"),
        // Two hundred batches at the least, also when a slow machine has a backlog.
        ("WALPOST_BATCH_MAX_MESSAGES", "50"),
    ];
    let walpost = database.start(&settings).await;

    // WHEN four writers commit events of 400 keys
    let writers = (0..WRITERS).map(|writer| write(&database, writer));
    let (_, seen) = tokio::join!(
        futures::future::join_all(writers),
        Judged::take(consumers, EVENTS, DEADLINE)
    );
    walpost.stop().await;

    // THEN everything has come once, and each key's events to one consumer, in order
    assert_eq!(seen.len(), EVENTS);
    let ids: HashSet<_> = seen.iter().map(|message| &message.id).collect();
    assert_eq!(ids.len(), EVENTS, "an event came twice");
    let mut keys: HashMap<&str, (u64, i64)> = HashMap::new();
    let mut shares: BTreeMap<u64, usize> = BTreeMap::new();
    let mut batches: HashMap<(i64, i64), HashSet<&str>> = HashMap::new();
    for message in &seen {
        let (consumer, next) = keys.entry(&message.key).or_insert((message.consumer, 0));
        assert_eq!(message.consumer, *consumer, "{} moved", message.key);
        assert_eq!(
            message.payload,
            next.to_string().as_bytes(),
            "{}",
            message.key
        );
        *next += 1;
        *shares.entry(message.consumer).or_default() += 1;
        batches
            .entry(message.entry)
            .or_default()
            .insert(&message.key);
    }
    assert_eq!(keys.len(), 400);
    // AND there were batches of many keys, or this would have been easy
    let mixed = batches.values().filter(|keys| keys.len() > 1).count();
    assert!(mixed > 100, "{mixed} of {} entries mix keys", batches.len());
    // AND every consumer had work: one lane of the sixteen at the least
    println!("{shares:?}, {mixed} of {} entries mix keys", batches.len());
    let least = EVENTS / 32;
    assert!(
        shares.len() == CONSUMERS && shares.values().all(|share| *share > least),
        "{shares:?}"
    );
}

#[tokio::test]
async fn each_key_is_at_one_consumer_in_order_when_the_broker_splits_the_keys() {
    each_key_is_at_one_consumer(false).await;
}

#[tokio::test]
async fn each_key_is_at_one_consumer_in_order_when_the_consumers_name_their_ranges() {
    each_key_is_at_one_consumer(true).await;
}
