//! Guarantee: any number of instances may run. One has the slot; when it dies another takes over, and with deduplication on
//! the broker's side nothing is lost, doubled or reordered. One that is cut off from Postgres, or stopped, gives way, and does nothing
//! behind its successor's back.

#[path = "ha/frozen.rs"]
mod frozen;
#[path = "ha/long_stop.rs"]
mod long_stop;
#[path = "ha/marks.rs"]
mod marks;
#[path = "ha/stalled.rs"]
mod stalled;
mod support;
#[path = "ha/takeover.rs"]
mod takeover;

use std::time::Duration;

use support::{Committed, Database, Load, Walpost, consume, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const SETTINGS: [(&str, &str); 2] = [
    ("WALPOST_RECONNECT_MAX", "500ms"),
    ("WALPOST_SCAN_INTERVAL", "100ms"),
];

fn instance(database: &Database) -> Walpost {
    database.walpost(&["run"], &SETTINGS).spawn()
}

#[tokio::test]
async fn a_second_instance_waits_and_takes_over_when_the_first_one_dies_again_and_again() {
    // GIVEN writers at work, an instance that streams, and one that waits
    let mut database = Database::create("ha").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);
    let mut active = instance(&database);
    active.wait_for_line("streaming", DEADLINE).await;

    for round in 0..5 {
        let mut waiting = instance(&database);
        waiting
            .wait_for_line("another walpost has slot", DEADLINE)
            .await;
        load.more(50).await;

        // WHEN the first one dies, or is told to stop
        if round % 2 == 0 {
            active.sigkill();
            active.wait_exit(DEADLINE).await;
        } else {
            active.stop().await;
        }

        // THEN the other one streams
        waiting.wait_for_line("streaming", DEADLINE).await;
        assert!(
            !waiting.output().contains("making a new slot"),
            "{}",
            waiting.output()
        );
        active = waiting;
    }
    load.more(50).await;
    load.stop();

    // AND every row is in the topic once, in order
    database.wait_all_confirmed(DEADLINE).await;
    active.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn an_instance_that_was_frozen_gives_way_and_takes_over_again_without_loss_or_repeat() {
    // GIVEN an instance that is frozen in the middle of its work, and another that takes over
    let mut database = Database::create("frozen").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);
    let mut first = instance(&database);
    first.wait_for_line("streaming", DEADLINE).await;
    load.more(50).await;
    first.signal("STOP");
    database
        .sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name LIKE 'walpost%'",
        )
        .await;
    let mut second = instance(&database);
    second.wait_for_line("streaming", DEADLINE).await;
    load.more(50).await;

    // WHEN it wakes up, finds the slot taken, and the other one dies
    first.signal("CONT");
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    load.more(50).await;
    second.sigkill();
    second.wait_exit(DEADLINE).await;

    // THEN it goes on where the slot is, and every row is in the topic once, in order
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    assert!(
        !first.output().contains("making a new slot"),
        "{}",
        first.output()
    );
    first.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}
