//! A database of the encoding `SQL_ASCII` holds any bytes as text.

use crate::support::{Database, Received, Walpost, consume, eventually, servers};
use crate::{DEADLINE, QUICK};

/// `é` as LATIN1 has it, which is no UTF-8.
const CAFE: &str = r"E'caf\xe9'";
const SETTINGS: [(&str, &str); 1] = [("WALPOST_OUTBOX_TABLE", "events")];

/// A database with an outbox whose text columns take anything; `payload` is its payload's type.
async fn database(payload: &str) -> Database {
    let database = Database::create_in("SQL_ASCII", "ascii").await;
    database
        .sql(&format!(
            "CREATE TABLE events (
                 id text NOT NULL, aggregatetype text, aggregateid text, type text, payload {payload}, topic text, headers json,
                 txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY, sent_at timestamptz,
                 created_at timestamptz NOT NULL DEFAULT now());"
        ))
        .await;
    database.init(&[], &SETTINGS).await;
    database
}

/// SQL: one row in which each column in turn is no UTF-8, and good ones before and behind. What is good is of topic `way`.
fn rows(way: &str) -> String {
    let row = |id: &str,
               topic: &str,
               key: &str,
               event_type: &str,
               payload: &str,
               own: &str,
               headers: &str| {
        format!(
            "INSERT INTO events VALUES ({id}, {topic}, {key}, {event_type}, {payload}, {own}, {headers});"
        )
    };
    let t = format!("'{way}'");
    let body = r#"E'{"a": "caf\xe9"}'"#;
    [
        row(
            &format!("'first {way}'"),
            &t,
            "'k'",
            "'t'",
            "'1'",
            "NULL",
            "NULL",
        ),
        row(
            &format!("'payload {way}'"),
            &t,
            "'k'",
            "'t'",
            body,
            "NULL",
            r#"'{"h": "grüße"}'"#,
        ),
        row(
            &format!("E'id {way} caf\\xe9'"),
            &t,
            "'k'",
            "'t'",
            "'2'",
            "NULL",
            "NULL",
        ),
        row(
            &format!("'key {way}'"),
            &t,
            CAFE,
            "'t'",
            body,
            "NULL",
            "NULL",
        ),
        row(
            &format!("'type {way}'"),
            &t,
            "'k'",
            CAFE,
            "'2'",
            "NULL",
            "NULL",
        ),
        row(
            &format!("'headers {way}'"),
            &t,
            "'k'",
            "'t'",
            "'2'",
            "NULL",
            r#"E'{"h": "caf\xe9"}'"#,
        ),
        row(
            &format!("'own {way}'"),
            &t,
            "'k'",
            "'t'",
            "'2'",
            CAFE,
            "NULL",
        ),
        row(
            &format!("'route {way}'"),
            CAFE,
            "'k'",
            "'t'",
            "'2'",
            "NULL",
            "NULL",
        ),
        row(
            &format!("'last {way}'"),
            &t,
            "'k'",
            "'t'",
            "'3'",
            "NULL",
            "NULL",
        ),
    ]
    .concat()
}

async fn read(database: &Database, way: &str) -> Vec<Received> {
    let received = consume(&servers().pulsar_url, &database.topic(way), 3, DEADLINE).await;
    let mut ids: Vec<&str> = received
        .iter()
        .map(|message| message.property("id"))
        .collect();
    if way == "unmarked" {
        // In the order of time and id.
        ids.sort_unstable_by_key(|id| id.starts_with("last"));
    }
    assert_eq!(
        ids,
        ["first", "payload", "last"].map(|id| format!("{id} {way}"))
    );
    received
}

/// What is no UTF-8 in the payload is published as it is; the other six rows are dead stragglers, and nothing of them is lost.
async fn assert_isolated(database: &Database, way: &str) {
    let received = read(database, way).await;
    assert_eq!(received[1].payload, b"{\"a\": \"caf\xe9\"}");
    assert_eq!(received[1].property("h"), "grüße");
    let query = "SELECT key, payload, topic, properties::text, reason, id FROM walpost.straggler
                 WHERE state = 'dead' AND (id LIKE $1 OR properties::text LIKE $1) ORDER BY number";
    let rows = database.rows(query, &[&format!("%{way}%")]).await;
    assert_eq!(rows.len(), 6, "{way}");
    for row in &rows {
        let (id, reason): (&str, &str) = (row.get(5), row.get(4));
        assert!(reason.contains("is not UTF-8"), "{reason}");
        assert_eq!(
            row.get::<_, Option<&str>>(2),
            None,
            "{id}: no retry publishes it unmended"
        );
        let (key, payload): (&str, &[u8]) = (row.get(0), row.get(1));
        let properties: &str = row.get(3);
        let column = id.split(' ').next().expect("a word");
        if column == "key" {
            assert_eq!((key, payload), ("caf\\351", &b"{\"a\": \"caf\xe9\"}"[..]));
        } else {
            assert_eq!((key, payload), ("k", &b"2"[..]));
            assert!(properties.contains("caf\\\\351"), "{properties}");
        }
    }
}

async fn stop(mut walpost: Walpost) {
    walpost.sigterm();
    assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
}

#[tokio::test]
async fn text_that_is_no_utf_8_stops_nothing_but_its_own_row() {
    for payload in ["text", "json"] {
        // GIVEN such text in each column, from before the slot
        let database = database(payload).await;
        database.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()").await;
        database.sql(&rows("scan")).await;

        // WHEN the gap is scanned, THEN all that can be an event is published, in order, and the rest is kept whole
        let settings = [&QUICK[..], &SETTINGS].concat();
        let walpost = database.start(&settings).await;
        assert_isolated(&database, "scan").await;

        // AND so it is when it is streamed
        database.sql(&rows("stream")).await;
        database.wait_all_confirmed(DEADLINE).await;
        assert_isolated(&database, "stream").await;
        stop(walpost).await;

        // AND polled
        database.sql(&rows("poll")).await;
        let poll = [&settings[..], &[("WALPOST_MODE", "poll")]].concat();
        let mut walpost = database.walpost(&["run"], &poll).spawn();
        walpost.wait_for_line("polling", DEADLINE).await;
        eventually(DEADLINE, "the stragglers of the look", async || {
            let query =
                "SELECT count(*) FROM walpost.straggler WHERE properties::text LIKE '%poll%'";
            let rows = database.rows(query, &[]).await;
            (rows[0].get::<_, i64>(0) >= 6).then_some(())
        })
        .await;
        assert_isolated(&database, "poll").await;
        stop(walpost).await;

        // AND no command minds
        for command in [
            &["check"][..],
            &["status"],
            &["verify"],
            &["stragglers", "list"],
            &["replay", "--key", "k"],
        ] {
            let (_, said) = database.walpost(command, &settings).run(DEADLINE).await;
            assert!(!said.contains("[22021]"), "{command:?}: {said}");
            assert!(!said.contains("panicked"), "{command:?}: {said}");
        }
    }
}

#[tokio::test]
async fn a_table_or_a_column_whose_name_is_no_utf_8_stops_nothing() {
    // GIVEN such names, in the outbox and beside it
    let database = database("text").await;
    let session = database.connect().await;
    let odd = r"
        SET client_encoding TO 'SQL_ASCII';
        DO $$ BEGIN
            EXECUTE format(E'ALTER TABLE events ADD COLUMN %I text DEFAULT ''caf\xe9''', E'caf\xe9');
            EXECUTE format('CREATE TABLE %I (%I int)', E'caf\xe9', E'caf\xe9');
            EXECUTE format('CREATE DOMAIN %I AS int', E'dom\xe9');
            EXECUTE format('ALTER TABLE %I ADD COLUMN d %I', E'caf\xe9', E'dom\xe9');
            EXECUTE format('ALTER PUBLICATION walpost ADD TABLE %I', E'caf\xe9');
        END $$";
    session.batch_execute(odd).await.expect("odd names");
    let neighbour = r"
        DO $$ BEGIN EXECUTE format('INSERT INTO %I VALUES (1, 1)', E'caf\xe9'); END $$;
        SELECT pg_logical_emit_message(true, E'caf\xe9', E'caf\xe9');";
    database.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()").await;
    let insert = |way: &str| {
        format!(
            "INSERT INTO events (id, aggregatetype, aggregateid, type, payload) VALUES ('{way}', '{way}', 'k', 't', '1')"
        )
    };
    database.sql(&insert("scan")).await;

    // WHEN it is scanned, and streamed, THEN it goes on
    let settings = [&QUICK[..], &SETTINGS].concat();
    let walpost = database.start(&settings).await;
    session
        .batch_execute(neighbour)
        .await
        .expect("a row beside it");
    database.sql(&insert("stream")).await;
    database.wait_all_confirmed(DEADLINE).await;
    for way in ["scan", "stream"] {
        let received = consume(&servers().pulsar_url, &database.topic(way), 1, DEADLINE).await;
        assert_eq!(received.len(), 1, "{way}");
    }
    stop(walpost).await;
}

#[tokio::test]
async fn rows_whose_text_is_no_utf_8_do_not_hold_up_the_look_for_unmarked_ones() {
    // GIVEN the mode mark, rows that were never marked, and such text in their ids
    let database = database("text").await;
    let mark = [
        ("WALPOST_AFTER_PUBLISH", "mark"),
        ("WALPOST_STRAGGLER_AGE", "100ms"),
        // It would find them as well.
        ("WALPOST_RECONCILE", "off"),
    ];
    let settings = [&QUICK[..], &SETTINGS, &mark].concat();
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    // In one transaction: a publication that stays so ends the stream.
    database
        .sql(&format!(
            "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {}; ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT",
            rows("unmarked")
        ))
        .await;

    // WHEN they are looked for, THEN what can be an event is published and marked
    eventually(DEADLINE, "the marks", async || {
        let query = "SELECT count(*) FROM events WHERE sent_at IS NOT NULL";
        let rows = database.rows(query, &[]).await;
        (rows[0].get::<_, i64>(0) == 3).then_some(())
    })
    .await;
    read(&database, "unmarked").await;
    stop(walpost).await;
}
