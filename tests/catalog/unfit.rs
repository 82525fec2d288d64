//! Rows of partitions and children that the stream cannot bring, and that the operator mends as the error says.

use super::support::{Database, Walpost, on_each_major};
use super::{DEADLINE, arrived, insert, on};

const SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");
/// No look at the catalogue but those that the stream asks for.
const SELDOM: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "1h");

/// Ends with 69, and says these statements.
async fn is_refused(mut walpost: Walpost, expected: &[&str]) {
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();
    assert_eq!(code, 69, "{said}");
    for words in expected {
        assert!(said.contains(words), "no {words:?} in:\n{said}");
    }
}

async fn an_unlogged_partition(major: i32) {
    // GIVEN a stream of a partitioned outbox
    let database = Database::create_on_major(major, "unfit").await;
    let partitioned = ["--payload", "text", "--partition-by", "day"];
    database.init(&partitioned, &[]).await;
    let settings = [SOON, database.as_owner()];
    let walpost = database.start(&settings).await;
    insert(&database, "walpost.outbox", "one").await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN a partition comes that is not in the log, and rows in it, before and after that is noticed
    let old = |payload: &str| {
        format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             VALUES ('t', 'k', 'e', '{payload}', date_trunc('day', clock_timestamp()) - interval '40 days')"
        )
    };
    database
        .sql(&format!(
            "DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '40 days'; BEGIN
                 EXECUTE format('CREATE UNLOGGED TABLE walpost.fast PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)',
                                at, at + interval '1 day');
                 {};
             END $$",
            old("two")
        ))
        .await;
    let mend = "ALTER TABLE walpost.fast SET LOGGED;";
    is_refused(walpost, &[mend]).await;
    database.sql(&old("three")).await;

    // THEN it starts when that is mended, and not before; its rows arrive
    is_refused(database.walpost(&["run"], &settings).spawn(), &[mend]).await;
    database.sql(mend).await;
    let walpost = database.start(&settings).await;
    assert_eq!(arrived(&database, 3).await, ["one", "two", "three"]);
    database.sql(&old("four")).await;
    assert_eq!(arrived(&database, 4).await, ["one", "two", "three", "four"]);
    walpost.stop().await;
}

#[tokio::test]
async fn rows_of_an_unlogged_partition_arrive_when_it_is_mended_on_14() {
    an_unlogged_partition(14).await;
}

#[tokio::test]
async fn rows_of_an_unlogged_partition_arrive_when_it_is_mended_on_15() {
    an_unlogged_partition(15).await;
}

#[tokio::test]
async fn rows_of_an_unlogged_partition_arrive_when_it_is_mended_on_18() {
    an_unlogged_partition(18).await;
}

/// `publication`: what it is of, where it is not of the outbox alone.
async fn a_child_by_inheritance(
    major: i32,
    publication: Option<&str>,
    interval: (&'static str, &'static str),
) {
    // GIVEN a stream
    let database = on(major).await;
    if let Some(of) = publication {
        database
            .sql(&format!(
                "DROP PUBLICATION walpost; CREATE PUBLICATION walpost {of} WITH (publish = 'insert', publish_via_partition_root = true)"
            ))
            .await;
    }
    let walpost = database.start(&[interval]).await;
    insert(&database, "walpost.outbox", "one").await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN a table comes that inherits from the outbox, with a row
    database
        .sql(
            "BEGIN;
             CREATE TABLE child () INHERITS (walpost.outbox);
             ALTER TABLE child ALTER COLUMN seq ADD GENERATED ALWAYS AS IDENTITY;
             INSERT INTO child (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', 'two');
             COMMIT",
        )
        .await;
    let mend = "ALTER TABLE public.child NO INHERIT walpost.outbox";
    let then = "add it to WALPOST_OUTBOX_TABLE, then: walpost init";
    is_refused(walpost, &[mend, then]).await;
    insert(&database, "child", "three").await;

    // THEN it does not start before that is mended
    is_refused(database.walpost(&["run"], &[interval]).spawn(), &[mend]).await;
    database.sql(mend).await;
    let both = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.child");
    database.init(&[], &[both]).await;

    // AND its rows arrive, and those that follow
    let walpost = database.start(&[SOON, both]).await;
    assert_eq!(arrived(&database, 3).await, ["one", "two", "three"]);
    insert(&database, "child", "four").await;
    insert(&database, "walpost.outbox", "five").await;
    assert_eq!(
        arrived(&database, 5).await,
        ["one", "two", "three", "four", "five"]
    );
    walpost.stop().await;
}

#[tokio::test]
async fn rows_of_a_child_arrive_when_it_is_an_outbox_of_its_own_on_14() {
    a_child_by_inheritance(14, None, SOON).await;
}

#[tokio::test]
async fn rows_of_a_child_arrive_when_it_is_an_outbox_of_its_own_on_15() {
    a_child_by_inheritance(15, None, SOON).await;
}

#[tokio::test]
async fn rows_of_a_child_arrive_when_it_is_an_outbox_of_its_own_on_18() {
    a_child_by_inheritance(18, None, SOON).await;
}

#[tokio::test]
async fn a_child_in_a_publication_of_all_tables_is_told_by_the_stream_on_14() {
    a_child_by_inheritance(14, Some("FOR ALL TABLES"), SELDOM).await;
}

#[tokio::test]
async fn a_child_in_a_publication_of_all_tables_is_told_by_the_stream_on_15() {
    a_child_by_inheritance(15, Some("FOR ALL TABLES"), SELDOM).await;
}

#[tokio::test]
async fn a_child_in_a_publication_of_all_tables_is_told_by_the_stream_on_18() {
    a_child_by_inheritance(18, Some("FOR ALL TABLES"), SELDOM).await;
}

async fn a_partition_was_unlogged_for_a_moment(major: i32) {
    // GIVEN a stream of a partitioned outbox
    let database = Database::create_on_major(major, "unfit").await;
    let partitioned = ["--payload", "text", "--partition-by", "day"];
    database.init(&partitioned, &[]).await;
    let walpost = database.start(&[SOON, database.as_owner()]).await;
    insert(&database, "walpost.outbox", "one").await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN a partition comes with a row that is not in the log, and is mended before anybody looks
    database
        .sql(
            "DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '40 days'; BEGIN
                 EXECUTE format('CREATE UNLOGGED TABLE walpost.fast PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)',
                                at, at + interval '1 day');
                 INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at) VALUES ('t', 'k', 'e', 'two', at);
                 ALTER TABLE walpost.fast SET LOGGED;
             END $$",
        )
        .await;

    // THEN it arrives, by the same stream
    assert_eq!(arrived(&database, 2).await, ["one", "two"]);
    walpost.stop().await;
}

on_each_major! {
    rows_of_a_partition_that_was_unlogged_for_a_moment_are_found: a_partition_was_unlogged_for_a_moment();
}
