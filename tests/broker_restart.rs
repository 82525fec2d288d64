//! Guarantee: a broker that is away is backpressure. Nothing is lost, memory stays bounded, Postgres keeps its connection.

mod support;

use std::time::{Duration, Instant};

use support::{Committed, Database, Load, Servers, Walpost, consume, eventually, insert_many};

const DEADLINE: Duration = Duration::from_secs(120);
const AWAY: Duration = Duration::from_secs(20);
const PEAK_RSS_KIB: u64 = 96 * 1024;

async fn assert_all_arrived(own: &Servers, database: &Database, walpost: Walpost) {
    database.wait_all_confirmed(DEADLINE).await;
    let peak_kib = walpost.peak_rss_kib();
    assert!(peak_kib < PEAK_RSS_KIB, "peak RSS is {peak_kib} KiB");
    walpost.stop().await;
    let committed = Committed::read(database).await;
    let received = consume(
        &own.pulsar_url,
        &Load::topic(database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_at_least_once(&received);
}

#[tokio::test]
async fn a_broker_that_is_stopped_for_20_seconds_or_frozen_costs_nothing_but_time() {
    let own = Servers::own("broker", &[]);
    let database = Database::create("away").await;
    Load::prepare(&database).await;
    // Without status updates the walsender would give up long before the broker is back.
    let timeout = format!(
        "ALTER DATABASE {} SET wal_sender_timeout = '5s'",
        database.name
    );
    database.sql(&timeout).await;
    // Over TCP the kernel may lose the acknowledgements of status updates while nothing is read: see `connector`.
    let settings = [
        ("WALPOST_POSTGRES_URL", &*database.run_socket_url()),
        ("WALPOST_PULSAR_URL", &*own.pulsar_url),
        ("WALPOST_SEND_TIMEOUT", "3s"),
        ("WALPOST_RECONNECT_MAX", "1s"),
    ];
    let mut walpost = database.start(&settings).await;
    let load = Load::start(&database, 4);
    load.more(100).await;
    let walsender = database.walsender_pid(&database.slot).await;

    // WHEN the broker is stopped for 20 s under load, with more rows than may be in flight
    let stopped = Instant::now();
    own.stop_pulsar();
    insert_many(&database.client, "flood", 150_000).await;
    eventually(
        DEADLINE,
        "the broker to have been away long enough",
        async || (stopped.elapsed() > AWAY).then_some(()),
    )
    .await;
    // THEN the walsender is still the same, kept alive by status updates
    assert_eq!(database.walsender_pid(&database.slot).await, walsender);
    own.start();
    load.more(100).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(database.walsender_pid(&database.slot).await, walsender);

    // AND WHEN the broker is frozen, so that only the send deadline can tell
    own.signal_pulsar("STOP");
    insert_many(&database.client, "frozen", 1000).await;
    walpost.wait_for_line("no receipt on", DEADLINE).await;
    own.signal_pulsar("CONT");

    // THEN all of it arrives in order
    assert_all_arrived(&own, &database, walpost).await;
}
