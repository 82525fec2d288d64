//! Guarantee: `WALPOST_RETENTION` deletes old rows, and drops old partitions, only when they are delivered, marked where marks
//! are made, and no stragglers; nothing else is ever removed.
//!
//! These tests write a row of `walpost.progress` and rows of `walpost.straggler` themselves: what counts here is what retention
//! makes of them.

mod support;

use std::time::Duration;

use support::{Database, Walpost, eventually};

const DEADLINE: Duration = Duration::from_secs(60);
const RETENTION: (&str, &str) = ("WALPOST_RETENTION", "2s");
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");
const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
/// A slot that this test speaks for; the connector's own row says soon that all is delivered.
const OTHER: &str = "other";

/// Looks at the rows in the outbox by their payload.
async fn left(database: &Database) -> Vec<String> {
    let rows = database
        .rows("SELECT payload FROM walpost.outbox ORDER BY payload", &[])
        .await;
    rows.iter().map(|row| row.get(0)).collect()
}

async fn wait_left(database: &Database, expected: &[&str]) {
    eventually(DEADLINE, &format!("{expected:?} to be left"), async || {
        (left(database).await == expected).then_some(())
    })
    .await;
}

async fn insert(database: &Database, payload: &str, age: &str) {
    database
        .sql(&format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             VALUES ('t', 'k', 'e', '{payload}', clock_timestamp() - interval '{age}')"
        ))
        .await;
}

/// Says that all that is committed by now is delivered, as far as `slot` goes.
async fn deliver(database: &Database, slot: &str) {
    database
        .sql(&format!(
            "INSERT INTO walpost.progress (slot, system_id, delivered, updated_at)
             SELECT '{slot}', system_identifier::text, pg_current_snapshot(), clock_timestamp() FROM pg_control_system()
             ON CONFLICT (slot) DO UPDATE SET delivered = excluded.delivered, system_id = excluded.system_id"
        ))
        .await;
}

async fn start(settings: &[(&str, &str)]) -> (Database, Walpost) {
    let database = Database::create("retention").await;
    let settings = [&[RETENTION, OFTEN], settings].concat();
    database.init(&["--payload", "text"], &settings).await;
    database
        .sql("INSERT INTO walpost.progress (slot, system_id) SELECT 'other', system_identifier::text FROM pg_control_system()")
        .await;
    let walpost = database.start(&settings).await;
    (database, walpost)
}

#[tokio::test]
async fn a_row_goes_when_it_is_old_and_delivered_for_every_slot_and_not_before() {
    let (database, walpost) = start(&[]).await;

    // GIVEN old rows: THEN nothing goes while nothing is delivered for one of the slots, or that is said of another cluster
    insert(&database, "old", "2h").await;
    insert(&database, "young", "-1h").await;
    database.wait_all_confirmed(DEADLINE).await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await, ["old", "young"]);
    database
        .sql("UPDATE walpost.progress SET system_id = '1', delivered = pg_current_snapshot() WHERE slot = 'other'")
        .await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await, ["old", "young"]);

    // WHEN it is, for every slot: THEN the old one goes, and one that was committed since stays
    insert(&database, "later", "2h").await;
    let before = "UPDATE walpost.progress SET system_id = (SELECT system_identifier::text FROM pg_control_system()), delivered = (
                      SELECT (min(txid::text::bigint)::text || ':' || min(txid::text::bigint)::text || ':')::pg_snapshot
                      FROM walpost.outbox WHERE payload = 'later') WHERE slot = 'other'";
    database.sql(before).await;
    wait_left(&database, &["later", "young"]).await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await, ["later", "young"]);

    // AND when all is delivered, only the young one is left
    deliver(&database, OTHER).await;
    wait_left(&database, &["young"]).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_straggler_stays_in_whatever_state() {
    let (database, walpost) = start(&[]).await;
    for payload in ["dead", "sent", "retrying"] {
        insert(&database, payload, "2h").await;
    }
    database
        .sql(
            "INSERT INTO walpost.straggler (slot, outbox, id, state, commit_lsn, ordinal, reason)
             SELECT 's', 'walpost.outbox', id::text, payload, '0/1', 1, 'a test' FROM walpost.outbox
             WHERE payload <> 'sent'",
        )
        .await;
    deliver(&database, OTHER).await;
    wait_left(&database, &["dead", "retrying"]).await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await, ["dead", "retrying"]);
    walpost.stop().await;
}

#[tokio::test]
async fn in_mark_mode_only_a_marked_row_goes() {
    // GIVEN a row that is marked by its receipt, and one that cannot be
    let (database, walpost) = start(&[MARK]).await;
    database
        .sql(
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
             CREATE TRIGGER keep BEFORE UPDATE ON walpost.outbox FOR EACH ROW WHEN (old.payload = 'not marked')
                 EXECUTE FUNCTION keep()",
        )
        .await;
    insert(&database, "marked", "2h").await;
    insert(&database, "not marked", "2h").await;
    database.wait_all_confirmed(DEADLINE).await;
    deliver(&database, OTHER).await;
    wait_left(&database, &["not marked"]).await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await, ["not marked"]);
    walpost.stop().await;
}

#[tokio::test]
async fn many_rows_go_in_small_statements() {
    // GIVEN rows over many blocks, a third of them young
    let (database, walpost) = start(&[]).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             SELECT 't', 'k' || i % 10, 'e', repeat('x', 500),
                    clock_timestamp() - interval '2h' * CASE WHEN i % 3 = 0 THEN -1 ELSE 1 END
             FROM generate_series(1, 30000) i",
        )
        .await;
    deliver(&database, OTHER).await;
    eventually(DEADLINE, "10000 rows to be left", async || {
        (left(&database).await.len() == 10_000).then_some(())
    })
    .await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(left(&database).await.len(), 10_000);
    let lines = walpost.lines();
    let deleted = lines
        .iter()
        .filter_map(|line| line.split_once("deleted=")?.1.parse::<u32>().ok());
    assert_eq!(deleted.sum::<u32>(), 20_000, "each row was deleted once");
    walpost.stop().await;
}

#[tokio::test]
async fn a_table_partitioned_by_something_else_than_the_time_loses_its_old_rows_and_holds_up_no_other()
 {
    // GIVEN a table in front of the outbox that is partitioned by a text
    let database = Database::create("retention").await;
    database
        .sql(
            "CREATE TABLE events (id text PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload text,
                                  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
                                  txid xid8 NOT NULL DEFAULT pg_current_xact_id(),
                                  seq bigint NOT NULL GENERATED ALWAYS AS IDENTITY) PARTITION BY RANGE (id);
             CREATE TABLE events_a PARTITION OF events FOR VALUES FROM ('a') TO ('m');
             CREATE TABLE events_m PARTITION OF events FOR VALUES FROM ('m') TO ('zz')",
        )
        .await;
    let tables = ("WALPOST_OUTBOX_TABLE", "public.events, walpost.outbox");
    let settings = [RETENTION, OFTEN, tables];
    database.init(&["--payload", "text"], &settings).await;
    let settings = [&settings[..], &[database.as_owner()]].concat();
    let walpost = database.start(&settings).await;

    // WHEN both have an old row that is delivered, and a young one
    database
        .sql(
            "INSERT INTO events (id, aggregatetype, aggregateid, type, payload, created_at)
             SELECT i, 't', 'k', 'e', i, clock_timestamp() - a::interval
             FROM (VALUES ('b', '2h'), ('c', '-1h'), ('x', '2h')) AS e (i, a)",
        )
        .await;
    insert(&database, "old", "2h").await;
    insert(&database, "young", "-1h").await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN the old ones go, and no partition does
    wait_left(&database, &["young"]).await;
    eventually(DEADLINE, "the old events to go", async || {
        let rows = database.rows("SELECT id FROM events", &[]).await;
        let left: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        (left == ["c"]).then_some(())
    })
    .await;
    let sql = "SELECT count(*) FROM pg_partition_tree('events') WHERE isleaf";
    assert_eq!(database.rows(sql, &[]).await[0].get::<_, i64>(0), 2);
    walpost.stop().await;
}

/// Names of the partitions, oldest first.
async fn partitions(database: &Database) -> Vec<String> {
    let sql = "SELECT relid::text FROM pg_partition_tree('walpost.outbox') WHERE isleaf ORDER BY 1";
    database
        .rows(sql, &[])
        .await
        .iter()
        .map(|row| row.get(0))
        .collect()
}

/// The present hour, read once: a test may run over its end.
async fn present_hour(database: &Database) -> String {
    let sql = "SELECT date_trunc('hour', clock_timestamp())::text";
    database.rows(sql, &[]).await[0].get(0)
}

/// Attaches a partition of some hours ago, as if it had been made then.
async fn attach(database: &Database, name: &str, now: &str, hours: u32) {
    let sql = format!(
        "SELECT ('{now}'::timestamptz - interval '{hours}h')::text, ('{now}'::timestamptz - interval '{hours}h' + interval '1h')::text"
    );
    let rows = database.rows(&sql, &[]).await;
    let (from, upto): (&str, &str) = (rows[0].get(0), rows[0].get(1));
    database
        .sql(&format!("CREATE TABLE walpost.{name} PARTITION OF walpost.outbox FOR VALUES FROM ('{from}') TO ('{upto}')"))
        .await;
}

fn insert_sql(payload: &str, now: &str, hours: u32) -> String {
    format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
         VALUES ('t', 'k', 'e', '{payload}', '{now}'::timestamptz - interval '{hours}h' + interval '5min')"
    )
}

#[tokio::test]
async fn partitions_are_made_ahead_and_stream_and_drop_whole_once_every_row_is_delivered() {
    // GIVEN an outbox partitioned by hour, with old partitions: an empty one, one with delivered rows, one with a straggler,
    // and one in which a transaction is still open
    let database = Database::create("partitions").await;
    database
        .init(&["--payload", "text", "--partition-by", "hour"], &[])
        .await;
    assert_eq!(
        partitions(&database).await.len(),
        49,
        "this hour and two days"
    );
    database
        .sql("INSERT INTO walpost.progress (slot, system_id) SELECT 'other', system_identifier::text FROM pg_control_system()")
        .await;
    let now = present_hour(&database).await;
    for (name, hours) in [
        ("outbox_empty", 9),
        ("outbox_done", 8),
        ("outbox_straggler", 7),
        ("outbox_open", 6),
    ] {
        attach(&database, name, &now, hours).await;
    }
    for (payload, hours) in [("done", 8), ("also done", 8), ("straggler", 7), ("seen", 6)] {
        database.sql(&insert_sql(payload, &now, hours)).await;
    }
    insert(&database, "young", "-1h").await;
    let writer = database.connect().await;
    writer.batch_execute("BEGIN").await.expect("a transaction");
    writer
        .batch_execute(&insert_sql("open", &now, 6))
        .await
        .expect("an insert");
    database
        .sql(
            "INSERT INTO walpost.straggler (slot, outbox, id, state, commit_lsn, ordinal, reason)
             SELECT 's', 'walpost.outbox', id::text, 'dead', '0/1', 1, 'a test' FROM walpost.outbox
             WHERE payload = 'straggler'",
        )
        .await;

    let settings = [RETENTION, OFTEN, database.as_owner()];
    let walpost = database.start(&settings).await;

    // WHEN what can be seen is delivered: THEN no partition goes while a writer is at work
    deliver(&database, OTHER).await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(partitions(&database).await.len(), 49 + 4);

    // WHEN it has committed: THEN the first two go, and the delivered row beside its own
    writer.batch_execute("COMMIT").await.expect("a commit");
    wait_left(&database, &["open", "straggler", "young"]).await;
    eventually(DEADLINE, "two partitions to be dropped", async || {
        let left = partitions(&database).await;
        (!left
            .iter()
            .any(|name| name.ends_with("_empty") || name.ends_with("_done")))
        .then_some(())
    })
    .await;
    database.retention_walked(DEADLINE).await;

    // AND what is a straggler, or is not delivered, stays
    assert_eq!(left(&database).await, ["open", "straggler", "young"]);

    // WHEN that is delivered too: THEN its partition goes
    deliver(&database, OTHER).await;
    wait_left(&database, &["straggler", "young"]).await;
    eventually(DEADLINE, "the partition to be dropped", async || {
        (!partitions(&database)
            .await
            .contains(&"walpost.outbox_open".to_owned()))
        .then_some(())
    })
    .await;

    // AND every row has been streamed under the one table's name
    database.wait_all_confirmed(DEADLINE).await;
    assert!(
        !walpost.output().contains("skipped"),
        "{}",
        walpost.output()
    );
    walpost.stop().await;
    let received = support::consume(
        &support::servers().pulsar_url,
        &database.topic("t"),
        6,
        DEADLINE,
    )
    .await;
    assert_eq!(received.len(), 6);
}

#[tokio::test]
async fn a_partition_that_is_missing_ahead_is_made_by_run() {
    let database = Database::create("partitions").await;
    database
        .init(&["--payload", "text", "--partition-by", "day"], &[])
        .await;
    let made = partitions(&database).await;
    assert_eq!(made.len(), 15, "today and two weeks");
    for name in &made[1..] {
        database.sql(&format!("DROP TABLE {name}")).await;
    }
    let walpost = database.start(&[database.as_owner()]).await;
    eventually(DEADLINE, "the partitions", async || {
        (partitions(&database).await == made).then_some(())
    })
    .await;
    walpost.stop().await;

    // AND a table that is partitioned otherwise is not taken for it
    let (code, said) = database
        .walpost(&["init", "--partition-by", "hour"], &[])
        .run(DEADLINE)
        .await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("not partitioned by hour"), "{said}");
}
