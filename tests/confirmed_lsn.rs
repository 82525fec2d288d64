//! Guarantee: `confirmed_flush_lsn`, read from `pg_replication_slots`, never passes an event without its receipt.

mod support;

use std::time::Duration;

use support::{
    Committed, Database, Load, Proxy, Walpost, consume, eventually, insert_many, servers,
};
use walpost::Lsn;

const DEADLINE: Duration = Duration::from_secs(60);

/// A stream through a proxy whose receipts can be held, with its lanes open.
async fn behind_proxy() -> (Database, Proxy, Walpost) {
    let database = Database::create("confirmed").await;
    Load::prepare(&database).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let walpost = database
        .start(&[
            ("WALPOST_PULSAR_URL", &url),
            ("WALPOST_STATUS_INTERVAL", "100ms"),
            ("WALPOST_BATCH_MAX_MESSAGES", "1"),
        ])
        .await;
    // The topic accepts something larger than all that comes, so that nothing waits behind the first of its size.
    insert_many(&database.client, &format!("warm-{}", "x".repeat(200)), 1).await;
    for key in 1..50 {
        insert_many(&database.client, &format!("warm-{key}"), 1).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    (database, proxy, walpost)
}

/// Commits events whose receipts do not come; returns a position behind the first of these transactions and before the
/// second one's end: to confirm it would be to confirm an event without receipt.
async fn commit_held(database: &Database, proxy: &Proxy) -> Lsn {
    proxy.hold_upstream_replies(true);
    let sent = proxy.to_server_bytes();
    insert_many(&database.client, "warm-0", 4).await;
    let first_end = database.current_wal_lsn().await;
    for key in 1..50 {
        insert_many(&database.client, &format!("warm-{key}"), 4).await;
    }
    eventually(DEADLINE, "the held events to be sent", async || {
        (proxy.to_server_bytes() > sent + 1000).then_some(())
    })
    .await;
    first_end
}

/// Watches the slot over many status updates while the rest of the server writes. What is committed behind the first event
/// without receipt must not be confirmed.
async fn assert_stays(database: &Database, first_unacknowledged: Lsn) {
    database
        .sql("CREATE TABLE IF NOT EXISTS churn (t text)")
        .await;
    let mut reports = std::collections::BTreeSet::new();
    eventually(DEADLINE, "ten status updates", async || {
        database.sql("INSERT INTO churn SELECT repeat('x', 1000) FROM generate_series(1, 100)").await;
        let confirmed = database.confirmed_flush_lsn(&database.slot).await?;
        assert!(confirmed < first_unacknowledged, "confirmed {confirmed}, and what is before {first_unacknowledged} has no receipt");
        let query = "SELECT reply_time::text FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
                     WHERE s.slot_name = $1";
        let rows = database.rows(query, &[&database.slot]).await;
        reports.insert(rows.first()?.get::<_, Option<String>>(0)?);
        (reports.len() > 10).then_some(())
    })
    .await;
}

async fn finish(database: &Database, walpost: Walpost) -> (Committed, Vec<support::Received>) {
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(database),
        committed.len(),
        DEADLINE,
    )
    .await;
    (committed, received)
}

#[tokio::test]
async fn it_stays_while_receipts_are_held_and_reaches_the_end_when_they_come() {
    let (database, proxy, walpost) = behind_proxy().await;
    let held = commit_held(&database, &proxy).await;
    assert_stays(&database, held).await;

    proxy.hold_upstream_replies(false);
    let (committed, received) = finish(&database, walpost).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn it_stays_when_the_walsender_is_terminated_while_receipts_are_held() {
    let (database, proxy, mut walpost) = behind_proxy().await;
    let held = commit_held(&database, &proxy).await;
    database.terminate_walsender().await;
    walpost.wait_for_line("terminat", DEADLINE).await;
    let confirmed = database
        .confirmed_flush_lsn(&database.slot)
        .await
        .expect("a slot");
    assert!(
        confirmed < held,
        "{confirmed} was confirmed without a receipt"
    );

    // It waits for the receipts before it starts over, so nothing comes twice.
    proxy.hold_upstream_replies(false);
    let (committed, received) = finish(&database, walpost).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn receipts_that_are_lost_with_their_connection_are_not_taken_for_given() {
    let (database, proxy, walpost) = behind_proxy().await;
    let held = commit_held(&database, &proxy).await;
    // GIVEN a broker that has stored them all, while their receipts are on the way
    let topic = Load::topic(&database);
    let stored = consume(&servers().pulsar_url, &topic, 250, DEADLINE).await;
    assert_eq!(stored.len(), 250);
    assert_stays(&database, held).await;

    // WHEN the connection is cut with the receipts in it
    proxy.cut();
    proxy.hold_upstream_replies(false);

    // THEN all of it is sent again, and nothing is skipped
    let (committed, received) = finish(&database, walpost).await;
    let repeats = committed.assert_at_least_once(&received);
    assert_eq!(repeats, 200, "what was held, and only that, comes twice");
}
