//! Slots that somebody made, with properties that walpost does not give its own.

use crate::support::{Database, OwnServers, Servers, on_each_major};
use crate::{DEADLINE, NOTED_SOON, arrived, drop_slot, insert};

/// A server that takes prepared transactions.
async fn server(major: i32) -> OwnServers {
    let servers = Servers::own(
        &format!("by-hand-{major}"),
        &["--postgres", &major.to_string(), "--no-pulsar"],
    );
    let other = Database::create_on(&servers, "other").await;
    other
        .sql("ALTER SYSTEM SET max_prepared_transactions = 4")
        .await;
    servers.stop_postgres();
    servers.start();
    servers
}

/// A slot that streams a transaction when it is prepared. `walpost.progress` has nothing of it.
async fn with_two_phase(servers: &Servers) -> Database {
    let database = Database::create_on(servers, "by_hand").await;
    database.init(&[], &[]).await;
    drop_slot(&database).await;
    database.sql("DELETE FROM walpost.progress").await;
    make_with_two_phase(&database).await;
    database
}

async fn make_with_two_phase(database: &Database) {
    let sql = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput', false, true)";
    database.rows(sql, &[&database.slot]).await;
}

/// Inserts a row in a transaction that is prepared, and ends it so.
async fn prepared(database: &Database, payload: &str, end: &str) {
    let gid = &database.name;
    database
        .sql(&format!(
            "BEGIN; INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', to_json('{payload}'::text));
             PREPARE TRANSACTION '{gid}'"
        ))
        .await;
    database.sql(&format!("{end} PREPARED '{gid}'")).await;
}

async fn a_slot_that_streams_prepared_transactions(major: i32) {
    // GIVEN a slot with two_phase, and rows of prepared transactions in its log
    let servers = server(major).await;
    let database = with_two_phase(&servers).await;
    prepared(&database, "never", "ROLLBACK").await;
    prepared(&database, "one", "COMMIT").await;

    // THEN check says what is wrong with it
    let (code, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("option two_phase") && said.contains("(TWO_PHASE false)"),
        "{said}"
    );
    // (and so does run, where a person is to decide)
    let fail = ("WALPOST_SLOT_LOST", "fail");
    let (code, said) = database.walpost(&["run"], &[fail]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("option two_phase"), "{said}");

    // AND WHEN walpost runs: THEN the committed rows arrive, once each, those of later prepared transactions too
    let walpost = database.start(&[NOTED_SOON]).await;
    prepared(&database, "never", "ROLLBACK").await;
    prepared(&database, "two", "COMMIT").await;
    insert(&database.client, "three").await;
    database.wait_all_confirmed(DEADLINE).await;
    database.wait_all_sent(DEADLINE).await;
    let rows = arrived(&database, &["one", "two", "three"]).await;
    assert_eq!(rows.len(), 3, "{rows:?}");

    // AND WHEN somebody puts such a slot in its place meanwhile: THEN it is found out as well
    walpost.stop().await;
    drop_slot(&database).await;
    insert(&database.client, "four").await;
    make_with_two_phase(&database).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    prepared(&database, "five", "COMMIT").await;
    database.wait_all_sent(DEADLINE).await;
    let rows = arrived(&database, &["one", "two", "three", "four", "five"]).await;
    assert_eq!(rows.len(), 5, "{rows:?}");
    walpost.stop().await;
}

on_each_major! {
    a_slot_with_two_phase_is_made_anew_and_no_prepared_transaction_is_published_before_its_commit: a_slot_that_streams_prepared_transactions();
}
