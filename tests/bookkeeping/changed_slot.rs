//! A slot that is dropped, replaced or invalidated while the gap is scanned.

use std::collections::HashSet;

use crate::support::{Asked, Database, FakeBroker, Reaction, Walpost, eventually};
use crate::{DEADLINE, NOTED_SOON, drop_slot, insert, make_slot_by_hand, wait_all_sent};

/// A database with a gap, and a walpost whose scan of it waits for receipts.
async fn scanning(database: &Database, broker: &FakeBroker) -> Walpost {
    database.init(&[], &[]).await;
    drop_slot(database).await;
    insert(&database.client, "old").await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    let settings = [NOTED_SOON, ("WALPOST_PULSAR_URL", &*broker.url())];
    let walpost = database.walpost(&["run"], &settings).spawn();
    eventually(DEADLINE, "the scan to wait for its receipt", async || {
        (broker.count(Asked::Send) > 0).then_some(())
    })
    .await;
    walpost
}

/// Lets the scan end, and expects everything to arrive.
async fn goes_on(database: &Database, broker: &FakeBroker, mut walpost: Walpost) {
    broker.heal();
    broker.release(|_| {});
    walpost.wait_for_line("looking at it again", DEADLINE).await;
    walpost.wait_for_line("streaming", DEADLINE).await;
    insert(&database.client, "new").await;
    wait_all_sent(database).await;
    walpost.stop().await;
    let arrived: HashSet<String> = broker.stored().into_iter().map(|event| event.id).collect();
    let rows = database
        .rows("SELECT id::text FROM walpost.outbox", &[])
        .await;
    let rows: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(arrived, rows);
}

async fn dropped(major: i32) {
    let (database, broker) = (
        Database::create_on_major(major, "changed").await,
        FakeBroker::start().await,
    );
    let walpost = scanning(&database, &broker).await;
    drop_slot(&database).await;
    insert(&database.client, "without a slot").await;
    goes_on(&database, &broker, walpost).await;
}

async fn replaced(major: i32) {
    let (database, broker) = (
        Database::create_on_major(major, "changed").await,
        FakeBroker::start().await,
    );
    let walpost = scanning(&database, &broker).await;
    drop_slot(&database).await;
    insert(&database.client, "without a slot").await;
    make_slot_by_hand(&database).await;
    goes_on(&database, &broker, walpost).await;
}

#[tokio::test]
async fn a_slot_that_is_dropped_during_the_scan_is_recovered() {
    dropped(15).await;
}

#[tokio::test]
async fn a_slot_that_is_replaced_during_the_scan_is_not_streamed_as_ours() {
    replaced(15).await;
}

#[tokio::test]
async fn on_postgres_14_a_slot_that_is_dropped_or_replaced_during_the_scan_is_recovered() {
    dropped(14).await;
    replaced(14).await;
}

#[tokio::test]
async fn on_postgres_18_a_slot_that_is_dropped_or_replaced_during_the_scan_is_recovered() {
    dropped(18).await;
    replaced(18).await;
}

async fn invalidated(major: &str) {
    // GIVEN a server that keeps little log, and a scan that waits
    let own = crate::support::Servers::own(
        &format!("changed{major}"),
        &["--postgres", major, "--no-pulsar"],
    );
    let (database, broker) = (
        Database::create_on(&own, "changed").await,
        FakeBroker::start().await,
    );
    let walpost = scanning(&database, &broker).await;
    for setting in [
        "max_slot_wal_keep_size = '16MB'",
        "max_wal_size = '64MB'",
        "min_wal_size = '32MB'",
    ] {
        database.sql(&format!("ALTER SYSTEM SET {setting}")).await;
    }
    database.sql("SELECT pg_reload_conf()").await;

    // WHEN more is written than that
    insert(&database.client, "of the lost slot").await;
    eventually(DEADLINE, "the slot to be lost", async || {
        database
            .sql("CREATE TABLE filler AS SELECT repeat(md5(n::text), 30) FROM generate_series(1, 20000) n; DROP TABLE filler")
            .await;
        database.sql("SELECT pg_switch_wal()").await;
        database.sql("CHECKPOINT").await;
        let sql = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1";
        let rows = database.rows(sql, &[&database.slot]).await;
        (rows[0].get::<_, Option<&str>>(0) == Some("lost")).then_some(())
    })
    .await;

    // THEN
    goes_on(&database, &broker, walpost).await;
}

#[tokio::test]
async fn a_slot_that_is_invalidated_during_the_scan_is_recovered() {
    invalidated("15").await;
}

#[tokio::test]
async fn on_postgres_14_a_slot_that_is_invalidated_during_the_scan_is_recovered() {
    invalidated("14").await;
}

#[tokio::test]
async fn on_postgres_18_a_slot_that_is_invalidated_during_the_scan_is_recovered() {
    invalidated("18").await;
}
