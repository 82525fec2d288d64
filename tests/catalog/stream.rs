//! What changes under a running stream, told by the stream itself. Nothing is looked at on a timer here.

use super::support::{Database, Walpost, on_each_major};
use super::{DEADLINE, arrived, insert, on, partitioned_on};

/// No look at the catalogue but those that the stream asks for.
const SELDOM: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "1h");

async fn ends_with(mut walpost: Walpost, expected: &[&str]) {
    assert_eq!(
        walpost.wait_exit(DEADLINE).await,
        69,
        "{}",
        walpost.output()
    );
    let said = walpost.output();
    for words in expected {
        assert!(said.contains(words), "no {words:?} in:\n{said}");
    }
}

/// A running stream that has brought one row.
async fn running(database: &Database) -> Walpost {
    let walpost = database.start(&[SELDOM]).await;
    insert(database, "walpost.outbox", "one").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost
}

async fn a_publication_that_goes_is_told(major: i32) {
    let database = on(major).await;
    let walpost = running(&database).await;
    database.sql("DROP PUBLICATION walpost").await;
    insert(&database, "walpost.outbox", "two").await;
    ends_with(
        walpost,
        &["CREATE PUBLICATION \"walpost\" FOR TABLE walpost.outbox"],
    )
    .await;
}

#[tokio::test]
async fn a_publication_that_is_dropped_is_told_by_the_stream_on_14() {
    a_publication_that_goes_is_told(14).await;
}

#[tokio::test]
async fn a_publication_that_is_dropped_is_told_by_the_stream_on_15() {
    a_publication_that_goes_is_told(15).await;
}

#[tokio::test]
async fn a_publication_that_is_dropped_is_told_by_the_stream_on_18() {
    a_publication_that_goes_is_told(18).await;
}

async fn rows_under_a_partitions_own_name(major: i32) {
    let database = partitioned_on(major).await;
    let walpost = running(&database).await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish_via_partition_root = false)")
        .await;
    insert(&database, "walpost.outbox", "two").await;
    let statement = "ALTER PUBLICATION \"walpost\" SET (publish_via_partition_root = true);";
    ends_with(walpost, &[statement]).await;

    // WHEN it is run: THEN that row is not lost
    database.sql(statement).await;
    let walpost = database.start(&[SELDOM]).await;
    assert_eq!(arrived(&database, 2).await, ["one", "two"]);
    walpost.stop().await;
}

async fn a_renamed_outbox(major: i32) {
    let database = on(major).await;
    let walpost = running(&database).await;
    database
        .sql("ALTER TABLE walpost.outbox RENAME TO hidden")
        .await;
    insert(&database, "walpost.hidden", "two").await;
    ends_with(walpost, &["walpost.outbox does not exist", "RENAME TO"]).await;
    database
        .sql("ALTER TABLE walpost.hidden RENAME TO outbox")
        .await;
    let walpost = database.start(&[SELDOM]).await;
    assert_eq!(arrived(&database, 2).await, ["one", "two"]);
    walpost.stop().await;
}

const REPLACE: &str = "
    BEGIN;
    ALTER TABLE walpost.outbox RENAME TO former;
    CREATE TABLE walpost.outbox (LIKE walpost.former INCLUDING ALL);
    ALTER PUBLICATION walpost ADD TABLE walpost.outbox;
    GRANT SELECT ON walpost.outbox TO walpost_connector;
    COMMIT";

async fn a_replaced_outbox(major: i32) {
    // GIVEN an outbox that is replaced under a running stream
    let database = on(major).await;
    let walpost = running(&database).await;
    database.sql(REPLACE).await;

    // THEN rows of the new one arrive
    insert(&database, "walpost.outbox", "two").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(arrived(&database, 2).await, ["one", "two"]);

    // AND WHEN somebody still writes to the former one: THEN it is told
    insert(&database, "walpost.former", "three").await;
    ends_with(
        walpost,
        &[
            "table walpost.former",
            "was an outbox table",
            "WALPOST_OUTBOX_TABLE",
        ],
    )
    .await;

    // AND WHEN it is named as well: THEN that row arrives
    let both = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,walpost.former");
    let walpost = database.start(&[SELDOM, both]).await;
    assert_eq!(arrived(&database, 3).await, ["one", "two", "three"]);
    walpost.stop().await;
}

async fn an_outbox_that_is_made_anew(major: i32) {
    let database = on(major).await;
    let walpost = running(&database).await;
    database
        .sql(
            "BEGIN;
             CREATE TABLE walpost.new (LIKE walpost.outbox INCLUDING ALL);
             DROP TABLE walpost.outbox CASCADE;
             ALTER TABLE walpost.new RENAME TO outbox;
             ALTER PUBLICATION walpost ADD TABLE walpost.outbox;
             GRANT SELECT ON walpost.outbox TO walpost_connector;
             COMMIT",
        )
        .await;
    insert(&database, "walpost.outbox", "two").await;
    assert_eq!(arrived(&database, 2).await, ["one", "two"]);
    walpost.stop().await;
}

async fn other_tables(major: i32) {
    let database = on(major).await;
    database
        .sql("CREATE TABLE known (id int); ALTER PUBLICATION walpost ADD TABLE known")
        .await;
    let mut walpost = running(&database).await;
    database
        .sql("INSERT INTO known VALUES (1); CREATE TABLE added (id int); ALTER PUBLICATION walpost ADD TABLE added")
        .await;
    for id in 0..3 {
        database
            .sql(&format!("INSERT INTO added VALUES ({id})"))
            .await;
        insert(&database, "walpost.outbox", &format!("after {id}")).await;
    }
    walpost.wait_for_line("public.added", DEADLINE).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(
        arrived(&database, 4).await,
        ["one", "after 0", "after 1", "after 2"]
    );
    let said = walpost.output();
    assert_eq!(
        said.matches("reading the catalogue again").count(),
        1,
        "{said}"
    );
    assert_eq!(
        said.matches("not in WALPOST_OUTBOX_TABLE").count(),
        2,
        "{said}"
    );
    walpost.stop().await;
}

async fn another_table_is_added(major: i32) {
    // GIVEN a running connector, and another table
    let database = on(major).await;
    let walpost = running(&database).await;
    database
        .sql("CREATE TABLE more (LIKE walpost.outbox INCLUDING ALL)")
        .await;
    let both = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,more");
    let init = async || {
        let (code, said) = database
            .walpost(&["init", "--roles"], &[both])
            .run(DEADLINE)
            .await;
        assert_eq!(code, 0, "{said}");
        said
    };

    // WHEN it is stopped before init: THEN rows between init and start come once
    walpost.stop().await;
    let said = init().await;
    assert!(!said.contains("restart walpost run"), "{said}");
    insert(&database, "more", "two").await;
    let walpost = database.start(&[SELDOM, both]).await;
    insert(&database, "more", "three").await;
    assert_eq!(arrived(&database, 3).await, ["one", "two", "three"]);
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN it is not: THEN init says what to do
    database
        .sql("ALTER PUBLICATION walpost DROP TABLE more")
        .await;
    let said = init().await;
    assert!(
        said.contains("restart walpost run") && said.contains("public.more"),
        "{said}"
    );
    assert_eq!(arrived(&database, 3).await, ["one", "two", "three"]);
    walpost.stop().await;
}

on_each_major! {
    rows_under_a_partitions_own_name_end_the_stream_with_the_statement: rows_under_a_partitions_own_name();
    an_outbox_that_is_renamed_ends_the_stream_when_its_rows_come: a_renamed_outbox();
    a_new_table_of_that_name_is_followed_and_rows_of_the_former_one_are_told: a_replaced_outbox();
    an_outbox_that_is_dropped_and_made_anew_goes_on: an_outbox_that_is_made_anew();
    other_tables_in_the_publication_are_skipped_and_cost_one_look_at_the_catalogue: other_tables();
    another_table_is_added_by_stop_init_start_and_init_tells_when_the_order_is_another: another_table_is_added();
}
