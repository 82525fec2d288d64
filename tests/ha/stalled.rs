//! Postgres stalls in the middle of an opening, for longer than any publisher may stay open, and goes on before the opening is given up.

use crate::support::{Database, Proxy, eventually, servers};
use crate::*;

/// The first process that is about to stream waits for longer than `lease::CLOSE_BY`, and for less than it has for an answer (15 s).
const STALL: &str = "
    CREATE SEQUENCE walpost.stalls;
    CREATE FUNCTION walpost.stall() RETURNS trigger SECURITY DEFINER LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('walpost.stalls') = 1 THEN
            PERFORM pg_catalog.pg_sleep(12);
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER stall BEFORE UPDATE OF confirmed_lsn ON walpost.progress FOR EACH ROW EXECUTE FUNCTION walpost.stall()";

async fn insert(database: &Database, key: &str) {
    let sql = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', '{key}', 'e', '0')"
    );
    database.sql(&sql).await;
}

#[tokio::test]
async fn an_opening_whose_pipe_was_dropped_in_a_stall_begins_again() {
    // GIVEN a stream with an event that has no receipt
    let database = Database::create("stalled").await;
    database.init(&[], &[]).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    database.let_run().await;
    let mut walpost = database
        .walpost(&["run"], &SETTINGS)
        .env("WALPOST_PULSAR_URL", format!("pulsar://{}", broker.addr()))
        .spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    insert(&database, &"x".repeat(200)).await;
    database.wait_all_confirmed(DEADLINE).await;
    let sent = broker.to_server_bytes();
    broker.hold_upstream_replies(true);
    insert(&database, "k").await;
    eventually(DEADLINE, "the event to be sent", async || {
        (broker.to_server_bytes() > sent).then_some(())
    })
    .await;

    // WHEN the stream is lost, and the opening of the next one stalls
    database.sql(STALL).await;
    database.terminate_walsender().await;
    walpost
        .wait_for_line("events without a receipt come again", DEADLINE)
        .await;
    broker.hold_upstream_replies(false);

    // THEN it streams again
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
}
