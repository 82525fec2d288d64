//! A server that takes a question and never answers is given up, whatever was asked.

use crate::support::{Database, Proxy, insert_many, servers};
use crate::*;

async fn goes_on_without_the_answer_to(text: &'static str) {
    // GIVEN a server that does not answer that
    let database = Database::create("answers").await;
    Load::prepare(&database).await;
    insert_many(&database.client, "key", 5).await;
    let proxy = Proxy::start(&servers().postgres_addr);
    proxy.swallow_answer_to(Some(text));
    let url = database.url_through(&proxy.addr());
    let settings = [
        ("WALPOST_POSTGRES_URL", &*url),
        ("WALPOST_RECONNECT_MAX", "500ms"),
    ];
    let mut walpost = database.walpost(&["run"], &settings).spawn();

    // THEN it is not waited for any longer
    walpost
        .wait_for_line("Postgres has not answered for", DEADLINE)
        .await;

    // AND once it answers every event arrives
    proxy.swallow_answer_to(None);
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, 5, DEADLINE).await;
    Committed::read(&database)
        .await
        .assert_at_least_once(&received);
}

/// What may take long has no deadline: its session ends where its process is not at work on the server any more.
async fn gives_up_a_session_without_the_answer_to(text: &'static str) {
    // GIVEN rows that come from the table, because the slot is gone, and a server whose answer to that is lost
    let database = Database::create("answers").await;
    Load::prepare(&database).await;
    insert_many(&database.client, "key", 5).await;
    let drop = "SELECT pg_drop_replication_slot($1::text::name)";
    database.rows(drop, &[&database.slot]).await;
    let proxy = Proxy::start(&servers().postgres_addr);
    proxy.swallow_answer_to(Some(text));
    let url = database.url_through(&proxy.addr());
    let settings = [
        ("WALPOST_POSTGRES_URL", &*url),
        ("WALPOST_RECONNECT_MAX", "500ms"),
    ];
    let mut walpost = database.walpost(&["run"], &settings).spawn();

    // THEN the session is given up
    walpost
        .wait_for_line("an SQL session is given up", DEADLINE * 2)
        .await;

    // AND once the server answers every event arrives
    proxy.swallow_answer_to(None);
    walpost.wait_for_line("streaming", DEADLINE).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, 5, DEADLINE).await;
    Committed::read(&database)
        .await
        .assert_at_least_once(&received);
    walpost.stop().await;
}

#[tokio::test]
async fn the_making_of_a_slot() {
    gives_up_a_session_without_the_answer_to("pg_create_logical_replication_slot").await;
}

#[tokio::test]
async fn the_rows_of_a_scan() {
    gives_up_a_session_without_the_answer_to("DECLARE walpost_rows").await;
}

macro_rules! without_the_answer_to {
    ($($name:ident: $text:literal;)+) => {$(
        #[tokio::test]
        async fn $name() {
            goes_on_without_the_answer_to($text).await;
        }
    )+};
}

without_the_answer_to! {
    the_lock: "pg_try_advisory_lock";
    the_end_of_the_log: "pg_current_wal_flush_lsn";
    the_publication: "pg_publication";
    identify_system: "IDENTIFY_SYSTEM";
    the_stragglers: "c.relname = 'straggler'";
    the_note_of_the_stream: "SET confirmed_lsn = NULL";
    start_replication: "START_REPLICATION";
}
