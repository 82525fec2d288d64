//! Mistakes that were mended, and that the log still holds.

use super::support::{Database, Proxy, consume, eventually, on_each_major, servers};
use super::{DEADLINE, arrived, insert, on, partitioned_on};

async fn stop_and_count(database: &Database, settings: &[(&str, &str)], expected: &[&str]) {
    // A scan that is stopped between a receipt and its note begins again: so the stream is waited for.
    let walpost = database.start(settings).await;
    assert_eq!(arrived(database, expected.len()).await, expected);
    walpost.stop().await;
}

async fn rows_without_a_column(major: i32) {
    // GIVEN rows in the log from a time in which a column that is read was generated, and so was not sent
    let database = on(major).await;
    database
        .sql(
            "ALTER TABLE walpost.outbox RENAME COLUMN payload TO plain;
             ALTER TABLE walpost.outbox ADD COLUMN payload text GENERATED ALWAYS AS (plain || '!') STORED",
        )
        .await;
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, plain) VALUES ('t', 'k', 'e', 'one')")
        .await;

    // WHEN the table was mended: THEN a new slot and the table bring them, and the stream goes on
    database
        .sql("ALTER TABLE walpost.outbox ALTER COLUMN payload DROP EXPRESSION")
        .await;
    insert(&database, "walpost.outbox", "two").await;

    // (unless a person is to decide)
    let fail = ("WALPOST_SLOT_LOST", "fail");
    let (code, said) = database.walpost(&["run"], &[fail]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("cannot be read on") && said.contains("WALPOST_SLOT_LOST=recover"),
        "{said}"
    );

    stop_and_count(&database, &[], &["one!", "two"]).await;
    insert(&database, "walpost.outbox", "three").await;
    stop_and_count(&database, &[], &["one!", "two", "three"]).await;
}

#[tokio::test]
async fn rows_from_before_a_column_was_sent_come_from_the_table_on_14() {
    rows_without_a_column(14).await;
}

#[tokio::test]
async fn rows_from_before_a_column_was_sent_come_from_the_table_on_15() {
    rows_without_a_column(15).await;
}

#[tokio::test]
async fn rows_from_before_a_column_was_sent_come_from_the_table_on_18() {
    rows_without_a_column(18).await;
}

/// Postgres 18 goes on without a publication, and says so in a notice; what it then leaves out is found by reconciliation.
async fn rows_without_a_publication(major: i32) {
    let database = on(major).await;
    insert(&database, "walpost.outbox", "one").await;
    database.sql("DROP PUBLICATION walpost").await;
    insert(&database, "walpost.outbox", "two").await;
    database.init(&[], &[]).await;
    insert(&database, "walpost.outbox", "three").await;

    // The log is read to where it cannot be read on, and again from the table: at least once.
    let walpost = database.start(&[]).await;
    let payloads = eventually(DEADLINE, "the last row", async || {
        let payloads = arrived(&database, 3).await;
        (payloads.last().is_some_and(|last| last == "three")).then_some(payloads)
    });
    let mut payloads = payloads.await;
    payloads.dedup();
    assert_eq!(payloads, ["one", "two", "three"]);
    walpost.stop().await;
}

#[tokio::test]
async fn rows_of_a_time_without_a_publication_arrive_on_14() {
    rows_without_a_publication(14).await;
}

#[tokio::test]
async fn rows_of_a_time_without_a_publication_arrive_on_15() {
    rows_without_a_publication(15).await;
}

#[tokio::test]
async fn an_event_without_a_table_that_is_in_the_air_is_not_lost_with_a_slot_that_cannot_be_read_on()
 {
    // GIVEN a stream that does not look at the publication, and an event without a table that waits for the broker
    let database = on(15).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let settings = [
        ("WALPOST_PULSAR_URL", url.as_str()),
        ("WALPOST_SCAN_INTERVAL", "10m"),
    ];
    let mut walpost = database.start(&settings).await;
    insert(&database, "walpost.outbox", "one").await;
    assert_eq!(arrived(&database, 1).await, ["one"]);
    broker.hold_requests(true);
    database
        .sql("SELECT walpost.emit_transient('x', 'k', 'T', '\"only in the log\"')")
        .await;

    // WHEN the log cannot be read on behind it, so that the slot is made anew
    walpost.signal("STOP");
    database.sql("DROP PUBLICATION walpost").await;
    insert(&database, "walpost.outbox", "two").await;
    database.init(&[], &[]).await;
    insert(&database, "walpost.outbox", "three").await;
    walpost.signal("CONT");
    walpost.wait_for_line("making a new slot", DEADLINE).await;
    eventually(DEADLINE, "to wait, or to go on", async || {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walpost stragglers'
                   AND backend_start > (SELECT updated_at FROM walpost.progress)";
        let goes_on = !database.rows(sql, &[]).await.is_empty();
        (goes_on || walpost.output().contains("waiting for the receipts")).then_some(())
    })
    .await;
    broker.hold_requests(false);

    // THEN it arrives, and so do the rows
    let sent = consume(&servers().pulsar_url, &database.topic("x"), 1, DEADLINE).await;
    assert_eq!(sent[0].payload, b"\"only in the log\"");
    let payloads = eventually(DEADLINE, "the last row", async || {
        let payloads = arrived(&database, 3).await;
        (payloads.last().is_some_and(|last| last == "three")).then_some(payloads)
    });
    let mut payloads = payloads.await;
    payloads.sort_unstable();
    payloads.dedup();
    assert_eq!(payloads, ["one", "three", "two"]);
    walpost.stop().await;
}

async fn rows_under_other_names(major: i32) {
    // GIVEN an outbox whose partitions were published under their own names for a time, and that had another name for a time
    let database = partitioned_on(major).await;
    insert(&database, "walpost.outbox", "one").await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish_via_partition_root = false)")
        .await;
    insert(&database, "walpost.outbox", "two").await;
    database
        .sql(
            "ALTER PUBLICATION walpost SET (publish_via_partition_root = true);
             ALTER TABLE walpost.outbox RENAME TO hidden",
        )
        .await;
    insert(&database, "walpost.hidden", "three").await;
    database
        .sql("ALTER TABLE walpost.hidden RENAME TO outbox")
        .await;
    insert(&database, "walpost.outbox", "four").await;

    // WHEN walpost runs: THEN the rows of that time are the outbox' rows
    stop_and_count(&database, &[], &["one", "two", "three", "four"]).await;
}

on_each_major! {
    rows_that_came_under_a_partitions_own_name_or_under_another_are_published: rows_under_other_names();
}
