//! After an end that was not in good order nobody knows what was streamed since the last note. Rows that the publication hid around such an
//! end come all the same; and where it was not changed, none comes twice for it.

use super::*;
use support::Proxy;

/// How a process ends without its last note.
#[derive(Clone, Copy)]
enum End {
    /// SIGKILL.
    Killed,
    /// SIGTERM, while the broker does not answer: exit 75.
    WithoutReceipts,
}

/// Hides rows and mends it: statements around those that insert.
fn changes(major: i32) -> Vec<(String, String)> {
    let mut changes: Vec<_> = ways(major)
        .into_iter()
        .map(|(hide, mend)| {
            let statement = |change| format!("ALTER PUBLICATION walpost {change};");
            (statement(hide), statement(mend))
        })
        .collect();
    if major >= 18 {
        changes.push((
            "DROP PUBLICATION walpost;".to_owned(),
            "CREATE PUBLICATION walpost FOR TABLE walpost.outbox WITH (publish = 'insert', publish_via_partition_root = true);".to_owned(),
        ));
    }
    changes
}

/// Streams until a note is made, and ends. What was inserted meanwhile has its receipt.
async fn end_after_a_note(database: &Database, end: End) {
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let pulsar = format!("pulsar://{}", proxy.addr());
    let settings = [
        OFTEN,
        ("WALPOST_PULSAR_URL", &*pulsar),
        ("WALPOST_SHUTDOWN_GRACE", "2s"),
    ];
    let mut walpost = database.start(&settings).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    match end {
        End::Killed => walpost.sigkill(),
        End::WithoutReceipts => {
            proxy.hold_upstream_replies(true);
            database.sql(INSERT).await;
            walpost.sigterm();
        }
    }
    walpost.wait_exit(DEADLINE).await;
}

async fn all_come(database: &Database) {
    let expected = ids(database, "walpost.outbox").await;
    eventually(DEADLINE, "every row to arrive", async || {
        let arrived = arrived(database, expected.len()).await;
        expected
            .iter()
            .all(|id| arrived.contains_key(id))
            .then_some(())
    })
    .await;
}

async fn rows_hidden_around_an_unclean_end_come(major: i32, end: End) {
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE TABLE other (id int PRIMARY KEY)")
        .await;
    for (hide, mend) in changes(major) {
        // GIVEN a process that ended without a last note
        end_after_a_note(&database, end).await;
        // WHEN the publication hides rows until the next one starts
        database.sql(&hide).await;
        database.sql(INSERT).await;
        database.sql(&mend).await;
        let mut walpost = database.start(&[OFTEN]).await;
        // THEN they come
        reconciled(&database, &mut walpost).await;
        walpost.stop().await;
    }
    all_come(&database).await;
}

async fn rows_that_another_form_hides_around_a_kill_come(major: i32, form: Form) {
    // GIVEN a publication of that form
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    database.sql(&form.made_anew()).await;
    for (hide, outbox, mend) in form.ways(major) {
        // AND a process that was killed
        end_after_a_note(&database, End::Killed).await;
        // WHEN rows are hidden until the next one starts
        let insert = INSERT.replace("walpost.outbox", outbox);
        for statements in [hide, &insert, &mend] {
            database.sql(statements).await;
        }
        let mut walpost = database.start(&[OFTEN]).await;
        // THEN they come
        reconciled(&database, &mut walpost).await;
        walpost.stop().await;
    }
    all_come(&database).await;
}

#[tokio::test]
async fn rows_that_a_publication_of_a_schema_hides_around_a_kill_come_on_15() {
    rows_that_another_form_hides_around_a_kill_come(15, Form::TablesInSchema).await;
}

#[tokio::test]
async fn rows_that_a_publication_of_a_schema_hides_around_a_kill_come_on_18() {
    rows_that_another_form_hides_around_a_kill_come(18, Form::TablesInSchema).await;
}

async fn a_first_process_is_killed_before_its_first_note(major: i32) {
    // GIVEN a slot and a process that is killed before it has noted anything
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "1h")]).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    // WHEN the publication hides rows until the next one starts
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'update')")
        .await;
    database.sql(INSERT).await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'insert')")
        .await;
    let mut walpost = database.start(&[OFTEN]).await;
    // THEN they come
    reconciled(&database, &mut walpost).await;
    walpost.stop().await;
    all_come(&database).await;
}

async fn nothing_comes_twice_where_nothing_was_changed(major: i32) {
    // GIVEN a slot
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    for interval in ["1h", "200ms"] {
        // WHEN a process is killed before its first note, and one behind a note
        let often = interval == "200ms";
        let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", interval)]).await;
        database.sql(INSERT).await;
        database.wait_all_confirmed(DEADLINE).await;
        if often {
            database.wait_all_sent(DEADLINE).await;
        }
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        // AND rows are committed while nobody streams, and what hides no row is done to the table
        database.sql(INSERT).await;
        for harmless in [
            "VACUUM ANALYZE walpost.outbox",
            "GRANT SELECT ON walpost.outbox TO PUBLIC",
            "CREATE INDEX IF NOT EXISTS by_type ON walpost.outbox (type)",
        ] {
            database.sql(harmless).await;
        }
        let walpost = database.start(&[OFTEN]).await;
        database.wait_all_sent(DEADLINE).await;
        let said = walpost.output();
        assert!(!said.contains("did not bring rows"), "{said}");
        walpost.stop().await;
    }
    // THEN each row comes once
    once_each(&database).await;
}

/// Tables that hide rows: what is made before walpost runs, what hides and mends around it, and the settings.
const AROUND_A_KILL: [(&str, &str, &str); 2] = [
    (
        "ALTER TABLE events DETACH PARTITION kept;",
        "INSERT INTO kept (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1');",
        "ALTER TABLE events ATTACH PARTITION kept FOR VALUES IN ('t');",
    ),
    (
        "ALTER TABLE kept SET UNLOGGED;",
        "INSERT INTO events (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1');",
        "ALTER TABLE kept SET LOGGED;",
    ),
];

async fn rows_of_a_changed_table_come(major: i32) {
    // GIVEN a partitioned outbox of the application's own
    let database = Database::create_on_major(major, "unclean").await;
    database
        .sql(
            "CREATE TABLE events (id uuid DEFAULT gen_random_uuid(), aggregatetype text NOT NULL, aggregateid text NOT NULL, type text NOT NULL,
                 payload json, seq bigint GENERATED ALWAYS AS IDENTITY, txid xid8 NOT NULL DEFAULT pg_current_xact_id())
                 PARTITION BY LIST (aggregatetype);
             CREATE TABLE kept (LIKE events INCLUDING DEFAULTS);
             CREATE SEQUENCE numbers START 1000000; ALTER TABLE kept ALTER COLUMN seq SET DEFAULT nextval('numbers');
             ALTER TABLE events ATTACH PARTITION kept FOR VALUES IN ('t');",
        )
        .await;
    let events = [("WALPOST_OUTBOX_TABLE", "events"), OFTEN];
    database.init(&[], &events).await;
    let noted = async || {
        let sql = "SELECT count(*) FROM events e WHERE NOT EXISTS (
                       SELECT FROM walpost.progress WHERE pg_visible_in_snapshot(e.txid, delivered))";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    };
    for (hide, insert, mend) in AROUND_A_KILL {
        // AND a process that is killed behind a note
        let mut walpost = database.start(&events).await;
        let row = "INSERT INTO events (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')";
        database.sql(row).await;
        eventually(DEADLINE, "a note", noted).await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        // WHEN rows come while the stream cannot bring them
        for change in [hide, insert, mend] {
            database.sql(change).await;
        }
        let walpost = database.start(&events).await;
        eventually(DEADLINE, "a note", noted).await;
        walpost.stop().await;
    }
    // THEN they come
    let expected = ids(&database, "events").await;
    eventually(DEADLINE, "every row to arrive", async || {
        let arrived = arrived(&database, expected.len()).await;
        expected
            .iter()
            .all(|id| arrived.contains_key(id))
            .then_some(())
    })
    .await;
}

async fn rows_of_a_table_that_left_its_schema_come(major: i32) {
    // GIVEN a publication of a schema, and a process that is killed behind a note
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE SCHEMA hidden; DROP PUBLICATION walpost; CREATE PUBLICATION walpost FOR TABLES IN SCHEMA walpost WITH (publish = 'insert', publish_via_partition_root = true);
              SELECT pg_drop_replication_slot(slot) FROM walpost.progress; DELETE FROM walpost.progress")
        .await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    // WHEN rows come while the table is in another schema
    database
        .sql("ALTER TABLE walpost.outbox SET SCHEMA hidden")
        .await;
    database
        .sql(&INSERT.replace("walpost.outbox", "hidden.outbox"))
        .await;
    database
        .sql("ALTER TABLE hidden.outbox SET SCHEMA walpost")
        .await;
    let mut walpost = database.start(&[OFTEN]).await;
    // THEN they come
    reconciled(&database, &mut walpost).await;
    walpost.stop().await;
    all_come(&database).await;
}

#[tokio::test]
async fn rows_of_a_table_that_left_its_schema_around_a_kill_come_on_15() {
    rows_of_a_table_that_left_its_schema_come(15).await;
}

#[tokio::test]
async fn rows_of_a_table_that_left_its_schema_around_a_kill_come_on_18() {
    rows_of_a_table_that_left_its_schema_come(18).await;
}

async fn a_transaction_that_is_older_than_the_mend(major: i32) {
    // GIVEN a publication that hides rows, a transaction that has inserted some and stays open, and the mend
    let database = Database::create_on_major(major, "unclean").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'update')")
        .await;
    let writer = database.connect().await;
    let begun = format!("BEGIN; {INSERT}");
    writer.batch_execute(&begun).await.expect("rows");
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'insert')")
        .await;
    // AND a note behind the mend
    database.sql(INSERT).await;
    let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "1h")]).await;
    database.wait_all_sent(DEADLINE).await;
    // WHEN the transaction ends, the slot passes it, and the process is killed before the next note
    writer.batch_execute("COMMIT").await.expect("an end");
    database.wait_all_confirmed(DEADLINE).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    let mut walpost = database.start(&[OFTEN]).await;
    // THEN its rows come
    reconciled(&database, &mut walpost).await;
    walpost.stop().await;
    all_come(&database).await;
}

on_each_major! {
    rows_of_a_transaction_that_is_older_than_a_mend_come_although_a_note_follows_the_mend_and_a_kill_the_note: a_transaction_that_is_older_than_the_mend();
    rows_that_a_publication_of_all_tables_hides_around_a_kill_come: rows_that_another_form_hides_around_a_kill_come(Form::AllTables);
    rows_of_a_table_that_was_changed_around_a_kill_come: rows_of_a_changed_table_come();
    rows_hidden_around_a_kill_come: rows_hidden_around_an_unclean_end_come(End::Killed);
    rows_hidden_around_a_stop_without_receipts_come: rows_hidden_around_an_unclean_end_come(End::WithoutReceipts);
    rows_hidden_after_a_kill_before_the_first_note_come: a_first_process_is_killed_before_its_first_note();
    a_kill_repeats_nothing_where_the_publication_is_as_it_was: nothing_comes_twice_where_nothing_was_changed();
}
