//! A mark that would move its row to another partition: the stream brings such a row as a new one.

use crate::*;

const TABLE: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "public.parted");
const COLUMNS: &str = "id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload text,
    created_at timestamptz DEFAULT now(), seq bigint NOT NULL DEFAULT nextval('parted_seq'),
    txid xid8 NOT NULL DEFAULT pg_current_xact_id(), sent_at timestamptz";
/// The table, and partitions: the key is `sent_at`, an expression of it, or that of a partition's own partitions.
const KEYS: [&str; 3] = [
    "CREATE TABLE parted ({COLUMNS}) PARTITION BY RANGE (sent_at);
     CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
    "CREATE TABLE parted ({COLUMNS}) PARTITION BY LIST ((sent_at IS NULL));
     CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
    "CREATE TABLE parted ({COLUMNS}) PARTITION BY RANGE (created_at);
     CREATE TABLE parted_rest PARTITION OF parted DEFAULT PARTITION BY RANGE (sent_at);
     CREATE TABLE parted_rest_rest PARTITION OF parted_rest DEFAULT",
];

async fn with_key(tables: &str) -> Database {
    let database = Database::create("isolation").await;
    database
        .sql(&format!(
            "CREATE SEQUENCE parted_seq; {}",
            tables.replace("{COLUMNS}", COLUMNS)
        ))
        .await;
    database.init(&[], &[TABLE, MARK]).await;
    database
}

#[tokio::test]
async fn marking_a_table_that_is_partitioned_by_its_mark_is_refused_and_other_modes_are_not() {
    for key in KEYS {
        // GIVEN a table in which a mark would move its row
        let database = with_key(key).await;

        // THEN run and check refuse the mode
        for command in ["run", "check"] {
            let (code, said) = database
                .walpost(&[command], &[TABLE, MARK])
                .run(DEADLINE)
                .await;
            assert_eq!(code, 69, "{key}: {said}");
            assert!(said.contains("is partitioned by sent_at"), "{key}: {said}");
        }

        // AND where nothing is marked its rows come once
        let walpost = database.start(&[TABLE]).await;
        database
            .sql("INSERT INTO parted (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')")
            .await;
        database.wait_all_confirmed(DEADLINE).await;
        assert_eq!(numbers(&database.topic("t"), 1).await, [1]);
        walpost.stop().await;
    }

    // AND a table with another key is marked
    let database = with_key(
        "CREATE TABLE parted ({COLUMNS}) PARTITION BY RANGE (created_at);
         CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
    )
    .await;
    let walpost = database.start(&[TABLE, MARK]).await;
    database
        .sql("INSERT INTO parted (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')")
        .await;
    wait_count(&database, "parted WHERE sent_at IS NULL", 0).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(numbers(&database.topic("t"), 1).await, [1]);
    walpost.stop().await;
}
