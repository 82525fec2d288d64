//! With deduplication on the broker's side: exactly once, through every crash.
//!
//! Each test has a namespace of its own with deduplication switched on before its first topic is made, because a topic
//! looks at the policy when it is loaded.

mod support;

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use support::{
    Committed, Database, Load, Proxy, Received, Walpost, admin, consume, eventually, insert_many,
    servers,
};

const KILLS: usize = 6;
const DEADLINE: Duration = Duration::from_secs(90);

/// What one lane can number in one transaction (`MAX_ORDINALS` in `src/pulsar/lane.rs`); more take a producer of its own.
const LANE_EVENTS: i64 = 327_680;

/// A prepared database whose topics are in a namespace that deduplicates.
async fn deduplicated() -> Database {
    let mut database = Database::create("dedup").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    database
}

/// Stops the connector when everything is confirmed, and returns what was committed and what is in the topic.
async fn finish(database: &Database, walpost: Walpost) -> (Committed, Vec<Received>) {
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(database).await;
    let topic = Load::topic(database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    (committed, received)
}

/// How many messages the topic has taken in, duplicates included; 0 before there is a topic.
async fn taken_in(database: &Database) -> i64 {
    let path = Load::topic(database).replacen("://", "/", 1);
    let topics = format!("/admin/v2/persistent/public/{}", database.name);
    let url = &servers().pulsar_admin_url;
    if !admin(url, "GET", &topics, "").await.contains(&path[11..]) {
        return 0;
    }
    let stats = admin(url, "GET", &format!("/admin/v2/{path}/stats"), "").await;
    let (_, count) = stats.split_once("\"msgInCounter\":").expect("a count");
    let digits = count.find(|c: char| !c.is_ascii_digit()).expect("more");
    count[..digits].parse().expect("a number")
}

/// A moment that no run has twice: when the fault strikes. Nothing is waited for by it.
fn up_to(longest: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    longest.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

#[tokio::test]
async fn every_event_arrives_exactly_once_when_the_connector_is_killed_six_times_under_load() {
    // GIVEN writers at work
    let database = deduplicated().await;
    let load = Load::start(&database, 4);

    // WHEN the connector is killed at random moments while it streams
    for _ in 0..KILLS {
        let mut walpost = database.start(&[]).await;
        tokio::time::sleep(up_to(Duration::from_secs(1))).await;
        walpost.sigkill();
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            128 + 9,
            "it ended before"
        );
        load.more(50).await;
    }
    let walpost = database.start(&[]).await;
    load.more(50).await;
    load.stop();

    // THEN the topic holds every id once, in order
    let (committed, received) = finish(&database, walpost).await;
    committed.assert_exactly_once(&received);
    println!(
        "{} events, {} taken in",
        committed.len(),
        taken_in(&database).await
    );
}

#[tokio::test]
async fn a_transaction_whose_walsender_is_terminated_half_way_arrives_exactly_once() {
    // GIVEN a connector that has no room for more: the broker's receipts are held, and a transaction is under way that is
    // larger than the limit and all buffers
    let database = deduplicated().await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let settings = [
        (
            "WALPOST_PULSAR_URL",
            &*format!("pulsar://{}", broker.addr()),
        ),
        ("WALPOST_POSTGRES_URL", &database.run_socket_url()),
        ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "40000"),
    ];
    let walpost = database.start(&settings).await;
    // The key's lane has its producer, and the topic has accepted full batches: while the replies are held nobody gets a new one, and nothing
    // is sent behind a batch that is larger than all before.
    insert_many(&database.client, "many", 10_000).await;
    database.wait_all_confirmed(DEADLINE).await;
    broker.hold_upstream_replies(true);
    insert_many(&database.client, "many", 100_000).await;
    // All that there is room for, but a batch that is not full.
    eventually(DEADLINE, "the broker to have 39,000", async || {
        (taken_in(&database).await > 10_000 + 39_000).then_some(())
    })
    .await;

    // WHEN the walsender is terminated, and only then the receipts come
    database.terminate_blocked_walsender(DEADLINE).await;
    broker.hold_upstream_replies(false);

    // THEN the whole transaction is there once, although Postgres sent its beginning again
    database.wait_all_confirmed(DEADLINE).await;
    let said = walpost.output();
    assert!(said.matches("streaming").count() >= 2, "{said}");
    let (committed, received) = finish(&database, walpost).await;
    assert_eq!(committed.len(), 110_000);
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn a_transaction_larger_than_a_lanes_sequence_and_what_follows_arrive_exactly_once_and_in_order()
 {
    // GIVEN one key with more events in one transaction than a lane has sequence ids between two transactions
    let database = deduplicated().await;
    let walpost = database.start(&[]).await;
    insert_many(&database.client, "one", LANE_EVENTS + 70_000).await;
    println!("inserted");

    // WHEN small transactions of the same key follow at once
    for _ in 0..50 {
        insert_many(&database.client, "one", 3).await;
    }

    // THEN every event is there once, in order
    let (committed, received) = finish(&database, walpost).await;
    println!("consumed");
    committed.assert_exactly_once(&received);
}
