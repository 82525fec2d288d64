//! Guarantee: a terminated walsender, or a restarted Postgres, loses nothing; and as long as the connector lives it
//! publishes nothing twice either, without any help from the broker. A server that is there and does not answer is given up.

#[path = "walsender/answers.rs"]
mod answers;
mod support;

use std::time::Duration;

use support::{Committed, Database, Load, Proxy, consume, eventually, insert_many, servers};

const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test]
async fn five_terminated_walsenders_under_load_lose_and_double_nothing() {
    let database = Database::create("walsender").await;
    Load::prepare(&database).await;
    let walpost = database.start(&[]).await;
    let load = Load::start(&database, 4);
    for _ in 0..5 {
        load.more(50).await;
        let old = eventually(DEADLINE, "a walsender", async || {
            database.walsender_pid(&database.slot).await
        })
        .await;
        database.terminate_walsender().await;
        eventually(DEADLINE, "another walsender", async || {
            let pid = database.walsender_pid(&database.slot).await?;
            (pid != old).then_some(())
        })
        .await;
    }
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    let committed = Committed::read(&database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(&database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn a_walsender_terminated_inside_a_large_transaction_loses_and_doubles_nothing() {
    // GIVEN a stream that is stopped by backpressure in the middle of a transaction
    const ROWS: i64 = 100_000;
    let database = Database::create("walsender_big").await;
    Load::prepare(&database).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let settings = [
        ("WALPOST_PULSAR_URL", &*url),
        ("WALPOST_POSTGRES_URL", &database.run_socket_url()),
        ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "20000"),
    ];
    let walpost = database.start(&settings).await;
    insert_many(&database.client, "big", 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    proxy.hold_upstream_replies(true);
    insert_many(&database.client, "big", ROWS).await;

    // WHEN the walsender is terminated there, and the receipts come
    database.terminate_blocked_walsender(DEADLINE).await;
    proxy.hold_upstream_replies(false);
    database.wait_all_confirmed(DEADLINE).await;
    let said = walpost.output();
    walpost.stop().await;

    // THEN the transaction came again from its start, and what had its receipt was suppressed
    assert!(said.matches("streaming").count() >= 2, "{said}");
    let committed = Committed::read(&database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(&database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn a_restarted_postgres_loses_nothing() {
    let own = support::Servers::own("restart", &["--no-pulsar"]);
    let database = Database::create_on(&own, "restarted").await;
    Load::prepare(&database).await;
    let walpost = database.start(&[]).await;
    let load = Load::start(&database, 4);
    load.more(100).await;
    // Blocks until Postgres is down, which it is when its last walsender has let go.
    own.stop_postgres();
    own.start();
    load.more(100).await;
    load.stop_after_outage();
    eventually(DEADLINE, "everything to be confirmed", async || {
        let client = database.connect().await;
        let query = "SELECT confirmed_flush_lsn >= pg_current_wal_lsn() FROM pg_replication_slots WHERE slot_name = $1";
        let row = client.query_one(query, &[&database.slot]).await.ok()?;
        row.get::<_, Option<bool>>(0)?.then_some(())
    })
    .await;
    walpost.stop().await;
    let mut database = database;
    database.client = database.connect().await;
    let committed = Committed::read(&database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(&database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_at_least_once(&received);
}
