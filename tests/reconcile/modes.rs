//! The comparison in each mode after publishing, with a retention, and turned off.

use std::collections::BTreeSet;

use crate::support::{Asked, Database, FakeBroker, Reaction, Walpost, eventually, on_each_major};
use crate::{DEADLINE, INSERT, OFTEN, arrived};

const OFF: (&str, &str) = ("WALPOST_RECONCILE", "off");
const RETENTION: (&str, &str) = ("WALPOST_RETENTION", "2s");
const HIDE: &str = "ALTER PUBLICATION walpost SET (publish = 'update')";
const SHOW: &str = "ALTER PUBLICATION walpost SET (publish = 'insert')";

async fn count(database: &Database, what: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM {what}");
    database.rows(&sql, &[]).await[0].get(0)
}

async fn wait_count(database: &Database, what: &str, expected: i64) {
    eventually(DEADLINE, &format!("{expected} of {what}"), async || {
        (count(database, what).await == expected).then_some(())
    })
    .await;
}

/// Inserts five rows that are so old, and gives their ids.
async fn insert(database: &Database, age: &str) -> BTreeSet<String> {
    let sql = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
         SELECT 't', 'key-' || n, 'e', to_json(n), clock_timestamp() - interval '{age}' FROM generate_series(1, 5) n
         RETURNING id::text"
    );
    let rows = database.rows(&sql, &[]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

/// The ids that the broker has; each came once.
fn stored(broker: &FakeBroker) -> BTreeSet<String> {
    let events = broker.stored();
    let ids: BTreeSet<String> = events.iter().map(|event| event.id.clone()).collect();
    assert_eq!(ids.len(), events.len(), "something came twice");
    ids
}

/// From now on no send gets its receipt; gives how many came so far.
fn hold(broker: &FakeBroker) -> usize {
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    broker.count(Asked::Send)
}

/// Waits for the next send, which is held.
async fn one_is_held(broker: &FakeBroker, before: usize) {
    eventually(DEADLINE, "rows to wait for their receipt", async || {
        (broker.count(Asked::Send) > before).then_some(())
    })
    .await;
}

fn go_on(broker: &FakeBroker) {
    broker.heal();
    broker.release(|_| {});
}

async fn without_the_comparison(major: i32) {
    // GIVEN a stream that compares nothing
    let database = Database::create_on_major(major, "off").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN, OFF]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN the publication hides rows for a while
    database
        .sql(&format!("BEGIN; {HIDE}; {INSERT} {SHOW}; COMMIT"))
        .await;
    database.sql(INSERT).await;

    // THEN all of them count as delivered, and the hidden ones are not published
    database.wait_all_sent(DEADLINE).await;
    let said = walpost.output();
    walpost.stop().await;
    assert!(!said.contains("did not bring"), "{said}");
    assert_eq!(arrived(&database, 10).await.len(), 10);

    // AND check says what is given up, and only then
    let check = async |settings: &[(&str, &str)]| {
        let (code, said) = database.walpost(&["check"], settings).run(DEADLINE).await;
        assert_eq!(code, 0, "{said}");
        said
    };
    let said = check(&[OFF]).await;
    assert!(
        said.contains("warn  reconcile")
            && said.contains("is never published, and counts as delivered\n"),
        "{said}"
    );
    let said = check(&[OFF, ("WALPOST_RETENTION", "7d")]).await;
    assert!(said.contains("WALPOST_RETENTION deletes it"), "{said}");
    assert!(!check(&[]).await.contains("warn  reconcile"));
}

/// A hidden row is found, published, and only then marked or deleted.
async fn hidden_rows_come_and_then(major: i32, mode: &str, waiting: &str, done: (&str, i64)) {
    let mode = [("WALPOST_AFTER_PUBLISH", mode)];
    let database = Database::create_on_major(major, "mode").await;
    database.init(&[], &mode).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let settings = [&mode[..], &[OFTEN, ("WALPOST_PULSAR_URL", &*url)]].concat();

    // GIVEN a stream, and rows that it brought
    let mut walpost = database.start(&settings).await;
    let mut expected = insert(&database, "0s").await;
    wait_count(&database, done.0, done.1).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN it does not bring rows, and the broker gives no receipt for them
    let before = hold(&broker);
    database.sql(&format!("BEGIN; {HIDE}")).await;
    expected.extend(insert(&database, "0s").await);
    database.sql(&format!("{SHOW}; COMMIT")).await;
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    one_is_held(&broker, before).await;

    // THEN they are there as they were, and do not count as delivered
    assert_eq!(count(&database, waiting).await, 5);
    let pending = "walpost.outbox_status WHERE status = 'pending'";
    assert_eq!(count(&database, pending).await, 5);

    // AND with their receipts they are treated as any other row
    go_on(&broker);
    let (done, so_far) = done;
    let all = if so_far == 0 { 0 } else { 10 };
    wait_count(&database, done, all).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    assert_eq!(stored(&broker), expected);
    assert_eq!(count(&database, done).await, all);
}

/// A stream with a retention of seconds, and old rows of a time in which the publication sent none, which the broker has and gives no
/// receipt for.
async fn hidden_from_the_retention(
    database: &Database,
    broker: &FakeBroker,
    at_first: &[(&str, &str)],
) -> (Walpost, BTreeSet<String>) {
    let url = broker.url();
    let settings = [database.as_owner(), OFTEN, ("WALPOST_PULSAR_URL", &*url)];
    let at_first = [&settings[..], at_first].concat();
    let mut walpost = database.start(&at_first).await;
    insert(database, "0s").await;
    database.wait_all_sent(DEADLINE).await;
    // The stream ends, which is not what counts here: rows that are committed before it does are as hidden as those after it.
    database.sql(HIDE).await;
    let mut hidden = insert(database, "9h").await;
    assert_eq!(
        walpost.wait_exit(DEADLINE).await,
        69,
        "{}",
        walpost.output()
    );
    hidden.extend(insert(database, "9h").await);
    database.sql(SHOW).await;
    let before = hold(broker);
    let settings = [&settings[..], &[RETENTION]].concat();
    let walpost = database.walpost(&["run"], &settings).spawn();
    one_is_held(broker, before).await;
    (walpost, hidden)
}

async fn the_retention_deletes_no_hidden_row(major: i32) {
    // GIVEN old rows that were hidden, and that wait for their receipts
    let database = Database::create_on_major(major, "retain").await;
    database.init(&[], &[RETENTION]).await;
    let broker = FakeBroker::start().await;
    let (walpost, hidden) = hidden_from_the_retention(&database, &broker, &[RETENTION]).await;

    // WHEN the retention looks through the table: THEN they stay
    database.retention_walked(DEADLINE).await;
    let old = "walpost.outbox WHERE created_at < clock_timestamp() - interval '8h'";
    assert_eq!(count(&database, old).await, 10);

    // AND they go once they are published
    go_on(&broker);
    wait_count(&database, old, 0).await;
    walpost.stop().await;
    assert!(hidden.is_subset(&stored(&broker)));
}

async fn the_retention_drops_no_partition_with_hidden_rows(major: i32) {
    // GIVEN the same in a partition of its own
    let database = Database::create_on_major(major, "retain").await;
    database
        .init(&["--partition-by", "hour"], &[RETENTION])
        .await;
    database
        .sql(
            "DO $$ DECLARE at timestamptz := date_trunc('hour', clock_timestamp() - interval '9h'); BEGIN
                 EXECUTE format('CREATE TABLE walpost.old PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)',
                                at, at + interval '2h');
             END $$",
        )
        .await;
    let broker = FakeBroker::start().await;
    // (At first without a retention: it would drop the partition while it is empty.)
    let (walpost, hidden) = hidden_from_the_retention(&database, &broker, &[]).await;

    // WHEN the retention looks through the partitions: THEN it stays, with its rows
    database.retention_walked(DEADLINE).await;
    assert_eq!(count(&database, "walpost.old").await, 10);

    // AND it goes whole once they are published
    go_on(&broker);
    let left = "pg_class WHERE oid = to_regclass('walpost.old')";
    wait_count(&database, left, 0).await;
    walpost.stop().await;
    assert!(hidden.is_subset(&stored(&broker)));
}

/// A partition of rows that are older than the last note. Attached by [`ATTACH`].
const FILL: &str = "CREATE TABLE walpost.filled (LIKE walpost.outbox INCLUDING DEFAULTS);
    ALTER TABLE walpost.filled ALTER COLUMN seq SET DEFAULT nextval(pg_get_serial_sequence('walpost.outbox', 'seq'));
    INSERT INTO walpost.filled (aggregatetype, aggregateid, type, payload, created_at)
    SELECT 't', 'old-' || n, 'e', to_json(n), date_trunc('day', clock_timestamp()) - interval '40 days' FROM generate_series(1, 5) n";
const ATTACH: &str = "DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '40 days'; BEGIN
    ALTER TABLE walpost.filled ALTER COLUMN seq DROP DEFAULT;
    EXECUTE format('ALTER TABLE walpost.outbox ATTACH PARTITION walpost.filled FOR VALUES FROM (%L) TO (%L)', at, at + interval '1 day');
    END $$";
const FILLED: &str = "walpost.outbox WHERE aggregateid LIKE 'old-%'";
const FILLED_PENDING: &str =
    "walpost.outbox_status WHERE status = 'pending' AND aggregateid LIKE 'old-%'";

async fn rows_of_an_attached_partition_are_pending(major: i32) {
    // GIVEN a stream with a retention, and a table with old rows, older than the last note
    let database = Database::create_on_major(major, "retain").await;
    database.init(&["--partition-by", "day"], &[]).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let pulsar = ("WALPOST_PULSAR_URL", &*url);
    let settings = [database.as_owner(), OFTEN, RETENTION, pulsar];
    let walpost = database.start(&settings).await;
    database.sql(FILL).await;
    insert(&database, "-1h").await;
    database.wait_all_sent(DEADLINE).await;

    // AND notes that are held up by receipts
    let before = hold(&broker);
    insert(&database, "-1h").await;
    one_is_held(&broker, before).await;

    // WHEN that table becomes a partition
    database.sql(ATTACH).await;

    // THEN its rows are pending, and the retention leaves them
    assert_eq!(count(&database, FILLED_PENDING).await, 5);
    let rows = database
        .rows("SELECT id::text FROM walpost.filled", &[])
        .await;
    let filled: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    database.retention_walked(DEADLINE).await;
    assert_eq!(count(&database, FILLED).await, 5);

    // AND they go once they are published
    go_on(&broker);
    wait_count(&database, FILLED, 0).await;
    walpost.stop().await;
    assert!(filled.is_subset(&stored(&broker)));
}

async fn the_retention_removes_no_row_of_a_new_table(major: i32) {
    // GIVEN a stream of one table, and another one with old rows, older than the last note
    let database = Database::create_on_major(major, "retain").await;
    database.init(&[], &[RETENTION]).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let pulsar = ("WALPOST_PULSAR_URL", &*url);
    database
        .sql(
            "CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL);
             INSERT INTO second (aggregatetype, aggregateid, type, payload, created_at)
             SELECT 't', 'old-' || n, 'e', to_json(n), clock_timestamp() - interval '9h' FROM generate_series(1, 5) n",
        )
        .await;
    let both = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second");
    let walpost = database.start(&[OFTEN, pulsar]).await;
    insert(&database, "-1h").await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    database.init(&[], &[both, RETENTION]).await;

    // WHEN it is put in the settings, and notes are held up by receipts
    let before = hold(&broker);
    insert(&database, "-1h").await;
    let settings = [database.as_owner(), OFTEN, RETENTION, pulsar, both];
    let walpost = database.walpost(&["run"], &settings).spawn();
    one_is_held(&broker, before).await;

    // THEN the retention leaves its rows
    database.retention_walked(DEADLINE).await;
    assert_eq!(count(&database, "second").await, 5);

    // AND they go once they are published
    let rows = database.rows("SELECT id::text FROM second", &[]).await;
    let old: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    go_on(&broker);
    wait_count(&database, "second", 0).await;
    walpost.stop().await;
    assert!(old.is_subset(&stored(&broker)));
}

async fn a_partition_is_attached_without_the_comparison(major: i32) {
    // GIVEN a stream that compares nothing, and a table with rows that are older than a note
    let database = Database::create_on_major(major, "off").await;
    database.init(&["--partition-by", "day"], &[]).await;
    let settings = [database.as_owner(), OFTEN];
    let without = [&settings[..], &[OFF]].concat();
    let walpost = database.start(&without).await;
    database.sql(FILL).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN it becomes a partition, and an empty partition is made and noted before it has rows
    database.sql(ATTACH).await;
    database
        .sql(
            "DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '50 days'; BEGIN
                 EXECUTE format('CREATE TABLE walpost.empty PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)', at, at + interval '1 day');
             END $$",
        )
        .await;
    let known = "walpost.progress WHERE tables -> 'walpost.empty'::regclass::oid::text = 'null'";
    database.sql(INSERT).await;
    wait_count(&database, known, 1).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             SELECT 't', 'key-' || n, 'e', to_json(n), date_trunc('day', clock_timestamp()) - interval '50 days' FROM generate_series(1, 5) n",
        )
        .await;

    // THEN rows of the one are pending, and those of the other are sent, as all that are streamed
    let others = "walpost.outbox_status WHERE status <> 'sent' AND aggregateid NOT LIKE 'old-%'";
    wait_count(&database, others, 0).await;
    assert_eq!(count(&database, FILLED_PENDING).await, 5);
    walpost.stop().await;
    assert_eq!(arrived(&database, 15).await.len(), 15);

    // AND with the comparison the pending ones come, and nothing comes twice
    let walpost = database.start(&settings).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    crate::once_each(&database).await;
}

on_each_major! {
    without_the_comparison_delivered_moves_hidden_rows_stay_away_and_check_says_so: without_the_comparison();
    a_hidden_row_is_found_in_the_mode_keep:
        hidden_rows_come_and_then(
            "keep",
            "walpost.outbox_status WHERE status = 'pending'",
            ("walpost.outbox_status WHERE status = 'sent'", 5)
        );
    a_hidden_row_is_found_in_the_mode_mark_and_marked_behind_its_receipt:
        hidden_rows_come_and_then(
            "mark",
            "walpost.outbox WHERE sent_at IS NULL",
            ("walpost.outbox WHERE sent_at IS NOT NULL", 5)
        );
    a_hidden_row_is_found_in_the_mode_delete_and_deleted_behind_its_receipt:
        hidden_rows_come_and_then("delete", "walpost.outbox", ("walpost.outbox", 0));
    the_retention_deletes_no_hidden_row_before_it_is_published: the_retention_deletes_no_hidden_row();
    the_retention_drops_no_partition_with_hidden_rows_before_they_are_published: the_retention_drops_no_partition_with_hidden_rows();
    rows_of_a_partition_that_was_attached_are_neither_shown_as_sent_nor_removed_before_they_are_published: rows_of_an_attached_partition_are_pending();
    the_retention_removes_no_row_of_a_table_that_is_new_in_the_settings_before_it_is_published: the_retention_removes_no_row_of_a_new_table();
    what_is_attached_without_the_comparison_is_pending_until_there_is_one_and_a_new_partition_is_not: a_partition_is_attached_without_the_comparison();
}
