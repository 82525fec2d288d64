//! Which partitions and tables the delivered snapshot speaks of: those whose rows were seen, and no others.

use std::collections::BTreeSet;

use crate::support::{Asked, Database, FakeBroker, Reaction, Walpost, eventually, on_each_major};
use crate::{DEADLINE, INSERT, OFTEN, arrived, ids, reconciled};

const BOTH: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second");

/// An outbox and a second one.
async fn two_tables(major: i32) -> Database {
    let database = Database::create_on_major(major, "covered").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON second TO walpost_connector")
        .await;
    database.init(&[], &[BOTH]).await;
    database
}

/// Five rows for the second one.
async fn insert_second(database: &Database) {
    database
        .sql(&INSERT.replace("walpost.outbox", "second"))
        .await;
}

async fn drop_slot(database: &Database) {
    let sql = "SELECT pg_drop_replication_slot($1::text::name)";
    database.rows(sql, &[&database.slot]).await;
}

/// From now on no send is stored, but for so many at first.
fn hold_behind(broker: &FakeBroker, first: usize) {
    broker.script(Asked::Send, vec![Reaction::Obey; first]);
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Ignore,
        _ => Reaction::Obey,
    });
}

/// Starts a scan that waits for a receipt, and kills it.
async fn killed_in_its_scan(
    database: &Database,
    broker: &FakeBroker,
    first: usize,
    settings: &[(&str, &str)],
) {
    hold_behind(broker, first);
    let walpost = database.walpost(&["run"], settings).spawn();
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > first).then_some(())
    })
    .await;
    if first > 0 {
        // Else the next one would begin where this one did.
        eventually(DEADLINE, "the position to be stored", async || {
            let sql = "SELECT (SELECT max(value::bigint) FROM jsonb_each_text(scan_position -> 'tables')) FROM walpost.progress";
            let stored: Option<i64> = database.rows(sql, &[]).await[0].get(0);
            stored.filter(|seq| *seq > 0)
        })
        .await;
    }
    kill(walpost).await;
    broker.heal();
}

async fn kill(mut walpost: Walpost) {
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
}

fn stored(broker: &FakeBroker) -> BTreeSet<String> {
    broker.stored().into_iter().map(|event| event.id).collect()
}

/// Waits until every row of these tables has come.
async fn all_come(database: &Database, broker: &FakeBroker, tables: &[&str]) {
    let mut expected = BTreeSet::new();
    for table in tables {
        expected.extend(ids(database, table).await);
    }
    let mut missing = Vec::new();
    let come = eventually(DEADLINE, "every row to come", async || {
        let stored = stored(broker);
        missing = expected.difference(&stored).cloned().collect();
        missing.is_empty().then_some(())
    });
    come.await;
}

/// `first`: how many sends of the scan get their receipt before it is killed.
async fn taken_out_while_a_gap_is_open(major: i32, first: usize) {
    // GIVEN two tables with rows that no slot brings, and a process that was killed while it published them
    let database = two_tables(major).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let settings = [OFTEN, ("WALPOST_PULSAR_URL", &*url)];
    let both = [&settings[..], &[BOTH]].concat();
    let one = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')";
    database.sql(one).await;
    database.sql(&one.replace("walpost.outbox", "second")).await;
    database.sql(&one.replace("walpost.outbox", "second")).await;
    drop_slot(&database).await;
    killed_in_its_scan(&database, &broker, first, &both).await;

    // WHEN the second one is taken out of the settings for a time
    let walpost = database.start(&settings).await;
    insert_second(&database).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // THEN its rows come when it is put back
    let walpost = database.start(&both).await;
    all_come(&database, &broker, &["walpost.outbox", "second"]).await;
    walpost.stop().await;
}

async fn a_table_is_taken_out_while_a_gap_is_open(major: i32) {
    // Before its scan, and in it.
    taken_out_while_a_gap_is_open(major, 0).await;
    taken_out_while_a_gap_is_open(major, 1).await;
}

#[tokio::test]
async fn a_table_that_is_taken_out_while_rows_that_the_stream_left_out_wait_for_their_publication_loses_none()
 {
    // GIVEN rows of two tables that the stream did not bring, and a process that was killed before it published them
    let database = two_tables(15).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let settings = [OFTEN, ("WALPOST_PULSAR_URL", &*url)];
    let both = [&settings[..], &[BOTH]].concat();
    let mut walpost = database.start(&both).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let before = broker.count(Asked::Send);
    hold_behind(&broker, 0);
    let second = INSERT.replace("walpost.outbox", "second");
    database
        .sql(&format!(
            "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} {second} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        ))
        .await;
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > before).then_some(())
    })
    .await;
    kill(walpost).await;
    broker.heal();

    // WHEN the second one is taken out of the settings for a time
    let walpost = database.start(&settings).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // THEN its rows come when it is put back
    let walpost = database.start(&both).await;
    all_come(&database, &broker, &["walpost.outbox", "second"]).await;
    walpost.stop().await;
}

const HIDDEN: &str = "ALTER PUBLICATION walpost SET (publish = 'update');";
const SHOWN: &str = "ALTER PUBLICATION walpost SET (publish = 'insert');";
const WITHOUT_SEQ: &str = "ALTER TABLE walpost.outbox RENAME COLUMN seq TO another;";
const WITH_SEQ: &str = "ALTER TABLE walpost.outbox RENAME COLUMN another TO seq;";

async fn a_column_is_gone_before_the_rows_are_published(major: i32) {
    // GIVEN rows that the stream did not bring, and a process that was killed before it published them
    let database = Database::create_on_major(major, "covered").await;
    database.init(&[], &[]).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let settings = [OFTEN, ("WALPOST_PULSAR_URL", &*url)];
    let mut walpost = database.start(&settings).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let before = broker.count(Asked::Send);
    hold_behind(&broker, 0);
    database
        .sql(&format!("BEGIN; {HIDDEN} {INSERT} {SHOWN} COMMIT"))
        .await;
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > before).then_some(())
    })
    .await;
    kill(walpost).await;
    broker.heal();

    // WHEN the table has lost a column that a scan needs THEN they are not given up
    database.sql(WITHOUT_SEQ).await;
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("which has no columns txid"), "{said}");

    // AND they come when it has the column again
    database.sql(WITH_SEQ).await;
    let walpost = database.start(&settings).await;
    all_come(&database, &broker, &["walpost.outbox"]).await;
    walpost.stop().await;
}

async fn a_column_is_gone_for_a_round(major: i32, is_restarted: bool) {
    // GIVEN a stream whose rows are counted
    let database = Database::create_on_major(major, "covered").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN rows are hidden, and the table loses a column that a comparison needs
    database
        .sql(&format!(
            "BEGIN; {HIDDEN} {INSERT} {SHOWN} {WITHOUT_SEQ} COMMIT"
        ))
        .await;
    walpost
        .wait_for_line("has no columns txid and seq any more", DEADLINE)
        .await;
    if is_restarted {
        walpost.stop().await;
        let (code, said) = database.walpost(&["run"], &[OFTEN]).run(DEADLINE).await;
        let told = said.contains("has no columns txid and seq any more");
        assert!(code == 69 && told, "{said}");
        database.sql(WITH_SEQ).await;
        walpost = database.start(&[OFTEN]).await;
    } else {
        database.sql(WITH_SEQ).await;
    }

    // THEN they come when it has the column again
    reconciled(&database, &mut walpost).await;
    walpost.stop().await;
    let expected = ids(&database, "walpost.outbox").await;
    let arrived = arrived(&database, expected.len()).await;
    assert!(expected.iter().all(|id| arrived.contains_key(id)));
}

/// How a process ends.
#[derive(Clone, Copy)]
enum End {
    Killed,
    Stopped,
}

async fn taken_out_by_a_run_without_a_note(end: End) {
    // GIVEN two tables whose rows are noted, and a lock that holds up every later note
    let database = two_tables(15).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let settings = [OFTEN, ("WALPOST_PULSAR_URL", &*url)];
    let both = [&settings[..], &[BOTH]].concat();
    let walpost = database.start(&both).await;
    database.sql(INSERT).await;
    insert_second(&database).await;
    database.wait_all_confirmed(DEADLINE).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let holder = database.connect().await;
    let lock = "BEGIN; LOCK TABLE walpost.outbox IN ACCESS EXCLUSIVE MODE";
    holder.batch_execute(lock).await.expect("a lock");

    // WHEN a process without the second one confirms rows of it, and ends before its first note
    let walpost = database.start(&settings).await;
    insert_second(&database).await;
    database.wait_all_confirmed(DEADLINE).await;
    match end {
        End::Killed => kill(walpost).await,
        End::Stopped => walpost.stop().await,
    }
    holder.batch_execute("COMMIT").await.expect("an end");

    // THEN these rows come when it is put back
    let walpost = database.start(&both).await;
    all_come(&database, &broker, &["walpost.outbox", "second"]).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_table_that_is_taken_out_by_a_run_that_is_killed_before_its_first_note_loses_no_row() {
    taken_out_by_a_run_without_a_note(End::Killed).await;
}

#[tokio::test]
async fn a_table_that_is_taken_out_by_a_run_that_is_stopped_before_its_first_note_loses_no_row() {
    taken_out_by_a_run_without_a_note(End::Stopped).await;
}

/// The partition that has the rows of now, and the statement that attaches it.
async fn partition_of_now(database: &Database) -> (String, String) {
    let sql = "SELECT c.oid::regclass::text, pg_get_expr(c.relpartbound, c.oid) FROM pg_class c
               WHERE c.oid = (SELECT max(tableoid) FROM walpost.outbox)";
    let row = &database.rows(sql, &[]).await[0];
    let (leaf, bound): (String, String) = (row.get(0), row.get(1));
    let attach = format!("ALTER TABLE walpost.outbox ATTACH PARTITION {leaf} {bound}");
    (leaf, attach)
}

async fn detached_in_a_gap_scan(
    major: i32,
    first: usize,
    settings: &[(&str, &str)],
    at_work: &str,
) {
    // GIVEN a partition with rows that are to be read from the table, and a process that was killed while it published them
    let database = Database::create_on_major(major, "covered").await;
    database.init(&["--partition-by", "day"], settings).await;
    let broker = FakeBroker::start().await;
    let url = broker.url();
    let pulsar = ("WALPOST_PULSAR_URL", &*url);
    // Each row by itself, so that one has its receipt before the others.
    let single = ("WALPOST_BATCH_MAX_MESSAGES", "1");
    let settings = [&[database.as_owner(), OFTEN, pulsar, single], settings].concat();
    let one = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')";
    database.sql(one).await;
    if at_work == "streaming" {
        drop_slot(&database).await;
    }
    for _ in 0..3 {
        database.sql(one).await;
    }
    killed_in_its_scan(&database, &broker, first, &settings).await;

    // WHEN it is detached while the next one scans, and attached again
    let (leaf, attach) = partition_of_now(&database).await;
    database
        .sql(&format!(
            "ALTER TABLE walpost.outbox DETACH PARTITION {leaf}"
        ))
        .await;
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line(at_work, DEADLINE).await;
    eventually(DEADLINE, "the gap to be closed", async || {
        let sql =
            "SELECT scan_upto IS NULL OR scan_position -> 'done' = 'true' FROM walpost.progress";
        database.rows(sql, &[]).await[0]
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    database.sql(&attach).await;

    // THEN its rows come
    all_come(&database, &broker, &["walpost.outbox"]).await;
    walpost.stop().await;
}

async fn a_partition_is_detached_in_a_gap_scan(major: i32) {
    // Nothing of it is stored as published; then something is.
    detached_in_a_gap_scan(major, 0, &[], "streaming").await;
    detached_in_a_gap_scan(major, 1, &[], "streaming").await;
}

async fn a_partition_is_detached_in_a_look(major: i32) {
    let poll = [("WALPOST_MODE", "poll")];
    detached_in_a_gap_scan(major, 0, &poll, "polling").await;
    detached_in_a_gap_scan(major, 1, &poll, "polling").await;
}

/// `is_unreadable`: the try in between finds a row in the partition that no scan can use.
async fn attached_between_two_tries_of_a_scan(major: i32, is_unreadable: bool) {
    // GIVEN a table with a partition that is detached and has rows of the lowest numbers, where the broker deduplicates
    let database = Database::create_on_major(major, "covered").await;
    database
        .sql(
            "CREATE TABLE events (id uuid DEFAULT gen_random_uuid(), aggregatetype text NOT NULL, aggregateid text NOT NULL, type text NOT NULL,
                 payload json, seq bigint NOT NULL, txid xid8 NOT NULL DEFAULT pg_current_xact_id()) PARTITION BY LIST (type);
             CREATE TABLE away PARTITION OF events FOR VALUES IN ('away');
             CREATE TABLE here PARTITION OF events FOR VALUES IN ('here');
             INSERT INTO events (aggregatetype, aggregateid, type, payload, seq)
                 VALUES ('t', 'k', 'away', '1', 1), ('held', 'k', 'here', '2', 2), ('t', 'k', 'here', '3', 3), ('t', 'k', 'here', '4', 4);
             INSERT INTO events (aggregatetype, aggregateid, type, payload, seq) VALUES ('t', 'k', 'away', '0', 0);
             ALTER TABLE events DETACH PARTITION away",
        )
        .await;
    if !is_unreadable {
        database.sql("DELETE FROM away WHERE seq = 0").await;
    }
    let broker = FakeBroker::start_deduplicating().await;
    let url = broker.url();
    let settings = [
        ("WALPOST_OUTBOX_TABLE", "public.events"),
        ("WALPOST_PULSAR_URL", &*url),
        OFTEN,
    ];
    database.init(&[], &settings).await;
    // AND a scan that publishes the other rows and gets no receipt for the first of them, so that it stores no position
    let mut held = None;
    broker.script_rest(move |asked, command| {
        if let Some(producer) = &command.producer
            && producer.topic.contains("held")
        {
            held = Some(producer.producer_id);
        }
        match &command.send {
            Some(send) if asked == Asked::Send && Some(send.producer_id) == held => {
                Reaction::Ignore
            }
            _ => Reaction::Obey,
        }
    });
    let walpost = database.walpost(&["run"], &settings).spawn();
    eventually(DEADLINE, "the other rows to be published", async || {
        (stored(&broker).len() == 2).then_some(())
    })
    .await;
    kill(walpost).await;

    // WHEN the partition is attached before the next try
    database
        .sql("ALTER TABLE events ATTACH PARTITION away FOR VALUES IN ('away')")
        .await;
    broker.heal();
    if is_unreadable {
        let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
        assert!(code == 69 && said.contains("below 1"), "{said}");
        database.sql("UPDATE away SET seq = 9 WHERE seq = 0").await;
    }
    let walpost = database.start(&settings).await;

    // THEN its rows come
    all_come(&database, &broker, &["events"]).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_partition_that_is_detached_while_the_tables_are_compared_is_covered_no_further() {
    // GIVEN a stream, and two sessions that wait for each other's lock on the outbox
    let database = Database::create("covered").await;
    database.init(&["--partition-by", "day"], &[]).await;
    let walpost = database.start(&[database.as_owner(), OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let (leaf, attach) = partition_of_now(&database).await;
    let lock = "BEGIN; LOCK TABLE walpost.outbox IN ACCESS EXCLUSIVE MODE";
    let writer = database.connect().await;
    writer.batch_execute(lock).await.expect("a lock");
    let detacher = database.connect().await;
    let waiting = async {
        detacher.batch_execute(lock).await.expect("a lock");
    };
    // AND rows that the stream does not bring, committed when the second session is in the queue
    let committing = async {
        eventually(DEADLINE, "the second session to wait", async || {
            let sql = "SELECT FROM pg_locks WHERE relation = 'walpost.outbox'::regclass AND mode = 'AccessExclusiveLock' AND NOT granted";
            (!database.rows(sql, &[]).await.is_empty()).then_some(())
        })
        .await;
        let hidden = format!(
            "ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        );
        writer.batch_execute(&hidden).await.expect("rows");
    };
    tokio::join!(waiting, committing);
    let expected = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walpost scanner'
                    AND wait_event_type = 'Lock'";
    eventually(DEADLINE, "the comparison to wait", async || {
        (!database.rows(expected, &[]).await.is_empty()).then_some(())
    })
    .await;

    // WHEN their partition is detached before they are compared, and attached behind the note
    let detach = format!("ALTER TABLE walpost.outbox DETACH PARTITION {leaf}; COMMIT");
    detacher.batch_execute(&detach).await.expect("an end");
    // The comparison that waited may be one of before these rows: with one more event there is a note behind it.
    database
        .sql("SELECT walpost.emit_transient('x', 'k', 'T', '1')")
        .await;
    let noted = format!(
        "SELECT coalesce((SELECT bool_and(pg_visible_in_snapshot(txid, delivered)) FROM {leaf}), false) FROM walpost.progress"
    );
    eventually(DEADLINE, "the note", async || {
        database.rows(&noted, &[]).await[0]
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    database.sql(&attach).await;

    // THEN these rows come
    let expected = ids(&database, "walpost.outbox").await;
    eventually(DEADLINE, "every row to come", async || {
        let arrived = arrived(&database, 0).await;
        expected
            .iter()
            .all(|id| arrived.contains_key(id))
            .then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_slot_that_does_not_publish_a_table_holds_back_neither_its_status_nor_its_retention_and_one_that_does_so_does()
 {
    // GIVEN a stream of two tables, each with an old row
    let database = two_tables(15).await;
    let retention = ("WALPOST_RETENTION", "2s");
    let settings = [database.as_owner(), OFTEN, BOTH, retention];
    database.init(&[], &[BOTH, retention]).await;
    // AND another slot that publishes the second one
    database
        .sql(
            "INSERT INTO walpost.progress (slot, system_id, delivered, tables)
             SELECT 'other', system_identifier::text, '4:4:', jsonb_build_object('second'::regclass::oid::text, null)
             FROM pg_control_system()",
        )
        .await;
    let walpost = database.start(&settings).await;
    let old = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
               VALUES ('t', 'k', 'e', '1', clock_timestamp() - interval '9h')";
    database.sql(old).await;
    database.sql(&old.replace("walpost.outbox", "second")).await;
    let count = async |table: &str| -> i64 {
        let sql = format!("SELECT count(*) FROM {table}");
        database.rows(&sql, &[]).await[0].get(0)
    };

    // THEN the row of the first one goes, and that of the second one stays
    eventually(DEADLINE, "the first one's row to go", async || {
        (count("walpost.outbox").await == 0).then_some(())
    })
    .await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(count("second").await, 1);

    // WHEN the other slot has delivered it: THEN it goes
    database
        .sql("UPDATE walpost.progress SET delivered = pg_current_snapshot() WHERE slot = 'other'")
        .await;
    eventually(DEADLINE, "the second one's row to go", async || {
        (count("second").await == 0).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_slot_that_does_not_know_a_partition_of_its_table_yet_holds_back_its_rows() {
    // GIVEN a stream of a partitioned outbox
    let database = Database::create("covered").await;
    database.init(&["--partition-by", "day"], &[]).await;
    let walpost = database.start(&[database.as_owner(), OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN another slot publishes it, and knows another partition only: THEN its rows are pending
    let (leaf, _) = partition_of_now(&database).await;
    database
        .sql(&format!(
            "INSERT INTO walpost.progress (slot, system_id, delivered, tables)
             SELECT 'other', system_identifier::text, pg_current_snapshot(), jsonb_build_object((
                 SELECT min(inhrelid::bigint)::text FROM pg_inherits
                 WHERE inhparent = 'walpost.outbox'::regclass AND inhrelid <> '{leaf}'::regclass), null)
             FROM pg_control_system()"
        ))
        .await;
    let status = async || -> Vec<String> {
        let sql = "SELECT DISTINCT status FROM walpost.outbox_status";
        let rows = database.rows(sql, &[]).await;
        rows.iter().map(|row| row.get(0)).collect()
    };
    assert_eq!(status().await, ["pending"]);

    // AND when it is covered up to a snapshot, what that one shows is sent
    let covered = async |as_json: &str| {
        let key = format!("'{leaf}'::regclass::oid::text");
        database
            .sql(&format!(
                "UPDATE walpost.progress SET tables = tables || jsonb_build_object({key}, {as_json}) WHERE slot = 'other'"
            ))
            .await;
    };
    covered("jsonb_build_array()").await;
    assert_eq!(status().await, ["pending"]);
    covered("jsonb_build_array('4:4:')").await;
    assert_eq!(status().await, ["pending"]);
    covered("jsonb_build_array(pg_current_snapshot()::text)").await;
    assert_eq!(status().await, ["sent"]);
    covered("pg_current_snapshot()::text").await;
    assert_eq!(status().await, ["sent"]);
    covered("null").await;
    assert_eq!(status().await, ["sent"]);
    walpost.stop().await;
}

on_each_major! {
    a_partition_that_is_attached_between_two_tries_of_a_scan_loses_no_row_where_the_broker_deduplicates: attached_between_two_tries_of_a_scan(false);
    a_partition_that_is_attached_between_two_tries_of_a_scan_of_which_one_failed_loses_no_row_where_the_broker_deduplicates: attached_between_two_tries_of_a_scan(true);
    rows_that_the_stream_left_out_are_not_given_up_for_a_column_that_is_gone: a_column_is_gone_before_the_rows_are_published();
    a_table_that_loses_its_columns_is_not_noted_before_it_has_them_again: a_column_is_gone_for_a_round(false);
    a_table_that_loses_its_columns_is_not_noted_by_the_next_process_either: a_column_is_gone_for_a_round(true);
    a_table_that_is_taken_out_of_the_settings_while_a_gap_is_open_loses_no_row: a_table_is_taken_out_while_a_gap_is_open();
    a_partition_that_is_detached_when_a_gap_scan_goes_on_loses_no_row: a_partition_is_detached_in_a_gap_scan();
    a_partition_that_is_detached_when_a_look_goes_on_loses_no_row: a_partition_is_detached_in_a_look();
}
