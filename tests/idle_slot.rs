//! Guarantee: an idle outbox pins no WAL, however busy the rest of the server is.

mod support;

use std::time::Duration;

use support::{Database, eventually};

const DEADLINE: Duration = Duration::from_secs(60);
const CHURN: &str =
    "INSERT INTO foreign_table SELECT repeat('x', 1000) FROM generate_series(1, 2000)";

#[tokio::test]
async fn an_idle_outbox_lets_the_slot_follow_foreign_churn() {
    // GIVEN a stream without events, and one event that has its receipt
    let (database, other) = (
        Database::create("idle").await,
        Database::create("other").await,
    );
    database.init(&[], &[]).await;
    for database in [&database, &other] {
        database.sql("CREATE TABLE foreign_table (t text)").await;
    }
    let walpost = database
        .start(&[("WALPOST_STATUS_INTERVAL", "200ms")])
        .await;
    let event = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{}')";
    database.sql(event).await;
    let restart = "SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    let restart = async || -> walpost::Lsn {
        let rows = database.rows(restart, &[&database.slot]).await;
        rows[0].get::<_, &str>(0).parse().expect("an LSN")
    };
    let before = restart().await;

    // WHEN only others write, here and in another database
    for _ in 0..3 {
        database.sql(CHURN).await;
        other.sql(CHURN).await;
        // THEN the slot is confirmed up to the end within seconds
        let now = database.current_wal_lsn().await;
        database
            .wait_confirmed(&database.slot, now, Duration::from_secs(20))
            .await;
    }

    // AND the log before it is released
    eventually(DEADLINE, "restart_lsn to move", async || {
        database.sql("CHECKPOINT").await;
        database.sql(CHURN).await;
        (restart().await > before).then_some(())
    })
    .await;
    walpost.stop().await;
}
