//! Guarantee: the oldest and the newest Postgres that are supported do all that matters: `init`, gap scan, stream, marks, deletes,
//! retention with partitions; and what came with a later major is used where it is.
//!
//! The shared servers are of the major between them, so all other tests are its proof.

mod support;

use std::collections::HashSet;
use std::time::Duration;

use support::{Database, Walpost, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");
const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
const DELETE: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "delete");
const ROWS: i32 = 500;

async fn insert(database: &Database, first: i32) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
               SELECT 't', 'key-' || n % 7, 'e', n::text FROM generate_series($1::int, $1 + $2 - 1) n";
    database.rows(sql, &[&first, &ROWS]).await;
}

async fn one(database: &Database, sql: &str) -> String {
    database.rows(sql, &[]).await[0].get(0)
}

async fn wait_none(database: &Database, what: &str) {
    eventually(DEADLINE, &format!("no {what}"), async || {
        (one(database, &format!("SELECT count(*)::text FROM {what}")).await == "0").then_some(())
    })
    .await;
}

/// A partitioned outbox whose first rows are older than its slot.
async fn with_old_rows(major: i32) -> Database {
    let database = Database::create_on_major(major, "majors").await;
    let partitioned = ["--payload", "text", "--partition-by", "hour"];
    database.init(&partitioned, &[MARK]).await;
    let drop_slot = "SELECT pg_drop_replication_slot($1::text::name)";
    database.rows(drop_slot, &[&database.slot]).await;
    database.sql("DELETE FROM walpost.progress").await;
    insert(&database, 1).await;
    database.init(&["--payload", "text"], &[MARK]).await;
    database
}

async fn made_with_what_the_major_has(database: &Database, major: i32) {
    let version = one(database, "SHOW server_version_num").await;
    assert!(version.starts_with(&major.to_string()), "{version}");
    let id = "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = 'walpost.outbox'::regclass AND adnum = 1";
    let native = ["walpost.uuidv7()", "uuidv7()"][usize::from(major >= 18)];
    assert_eq!(one(database, id).await, native);
    let failover = format!(
        "SELECT coalesce(to_jsonb(s) ->> 'failover', 'unknown') FROM pg_replication_slots s WHERE slot_name = '{}'",
        database.slot
    );
    let expected = ["unknown", "true"][usize::from(major >= 17)];
    assert_eq!(one(database, &failover).await, expected);
}

/// A row in a partition of its own, some hours ago.
async fn attach_old(database: &Database) {
    database
        .sql(
            "DO $$ DECLARE at timestamptz := date_trunc('hour', clock_timestamp()) - interval '8h'; BEGIN
                 EXECUTE format('CREATE TABLE walpost.outbox_old PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)', at, at + interval '1h');
                 INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at) VALUES ('t', 'old', 'e', '0', at);
             END $$",
        )
        .await;
}

async fn stop_and_count(database: &Database, walpost: Walpost, expected: i32) {
    walpost.stop().await;
    let expected = usize::try_from(expected).expect("not negative");
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
    let different: HashSet<_> = received.iter().map(|message| &message.payload).collect();
    assert_eq!(different.len(), expected, "each number once");
}

async fn does_all_that_matters(major: i32) {
    // GIVEN rows from before the slot, and others behind it
    let database = with_old_rows(major).await;
    made_with_what_the_major_has(&database, major).await;
    insert(&database, 1 + ROWS).await;

    // WHEN walpost runs in mark mode: THEN the gap and the stream arrive, once, and all rows are marked and known as sent
    let walpost = database.start(&[OFTEN, MARK]).await;
    wait_none(&database, "walpost.outbox WHERE sent_at IS NULL").await;
    wait_none(&database, "walpost.progress WHERE delivered IS NULL").await;
    stop_and_count(&database, walpost, 2 * ROWS).await;

    // AND with a retention an old partition goes whole
    attach_old(&database).await;
    let retention = ("WALPOST_RETENTION", "20s");
    let walpost = database
        .start(&[OFTEN, MARK, retention, database.as_owner()])
        .await;
    wait_none(&database, "pg_class WHERE relname = 'outbox_old'").await;
    stop_and_count(&database, walpost, 2 * ROWS + 1).await;

    // AND in delete mode rows go by their receipts, also with a column list that has all that is read, where there are such
    if major >= 15 {
        let list = "ALTER PUBLICATION walpost SET TABLE walpost.outbox \
             (id, aggregatetype, aggregateid, type, payload, topic, headers, deliver_at, created_at, seq, txid)";
        database.sql(list).await;
    }
    let walpost = database.start(&[OFTEN, DELETE, database.as_owner()]).await;
    insert(&database, 1 + 2 * ROWS).await;
    let left = format!("walpost.outbox WHERE payload::int > {}", 2 * ROWS);
    wait_none(&database, &left).await;
    stop_and_count(&database, walpost, 3 * ROWS + 1).await;
    let (code, said) = database.walpost(&["check"], &[DELETE]).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("ok    partitions") && said.contains("ok    rows"),
        "{said}"
    );
}

#[tokio::test]
async fn postgres_14_does_all_that_matters() {
    does_all_that_matters(14).await;
}

#[tokio::test]
async fn postgres_18_does_all_that_matters_with_failover_slots_uuidv7_and_column_lists() {
    does_all_that_matters(18).await;
}
