//! Guarantee: a row whose `seq` a scan cannot use is refused, never passed over, and the statement that walpost prints for it gives it a
//! place that is read; it loses and doubles nothing when it is followed to the letter.
//!
//! Real servers, in stream and in poll mode. With `WALPOST_TEST_POSTGRES=18` on that Postgres.

mod support;

use std::time::Duration;

use support::{Database, consume, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const MODES: [(&str, &str); 2] = [("WALPOST_MODE", "stream"), ("WALPOST_MODE", "poll")];

/// What stands between two texts.
fn between<'a>(said: &'a str, from: &str, upto: &str) -> &'a str {
    let found = said
        .split_once(from)
        .and_then(|(_, rest)| rest.split_once(upto));
    found.unwrap_or_else(|| panic!("{said}")).0
}

/// `run` ends with 69; what it said.
async fn refused(database: &Database, settings: &[(&str, &str)]) -> String {
    let (code, said) = database.walpost(&["run"], settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    said
}

/// The payloads in the topic, sorted; all of them, and nothing more.
async fn arrived(database: &Database, expected: usize) -> Vec<String> {
    let received = consume(
        &servers().pulsar_url,
        &database.topic("t"),
        expected,
        DEADLINE,
    )
    .await;
    let text = |message: support::Received| String::from_utf8(message.payload).expect("UTF-8");
    let mut all: Vec<String> = received.into_iter().map(text).collect();
    all.sort();
    all
}

/// Commits rows of these names and numbers, however the column is defined.
fn insert(rows: &[(&str, i64)]) -> String {
    let values: Vec<String> = rows
        .iter()
        .map(|(payload, seq)| format!("('t', 'k', 't', '{payload}', {seq})"))
        .collect();
    format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, seq) OVERRIDING SYSTEM VALUE VALUES {}",
        values.join(", ")
    )
}

/// A table that walpost makes, partitioned or not, before a slot or an instance has seen any row of it.
async fn prepared(mode: (&str, &str), args: &[&str]) -> Database {
    let database = Database::create("numbering").await;
    let args = [&["--payload", "text"], args].concat();
    database.init(&args, &[mode]).await;
    database
        .sql(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{}';
             DELETE FROM walpost.progress",
            database.slot
        ))
        .await;
    database
}

/// Rows in each of two partitions, so that a `ctid` is there twice; without partitions, more of them.
const PLACES: &str =
    "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
     SELECT 't', 'k', 't', 'good-' || n, now() - (n % 2) * interval '1 day' FROM generate_series(1, 6) n";

#[tokio::test]
async fn a_seq_that_no_scan_can_use_is_refused_and_the_statement_gives_it_a_place() {
    for mode in MODES {
        for args in [&[][..], &["--partition-by", "day"]] {
            // GIVEN rows with numbers of their own making, in the table that walpost makes, which says GENERATED ALWAYS
            let database = prepared(mode, args).await;
            if !args.is_empty() {
                database
                    .sql(
                        "DO $$ BEGIN EXECUTE format('CREATE TABLE walpost.outbox_yesterday PARTITION OF walpost.outbox FOR VALUES FROM (%L) TO (%L)',
                             (now() - interval '1 day')::date, now()::date); EXCEPTION WHEN invalid_object_definition OR duplicate_table THEN NULL; END $$",
                    )
                    .await;
            }
            database.sql(PLACES).await;
            database
                .sql(&insert(&[("zero", 0), ("below", -5), ("large", 1 << 47)]))
                .await;
            // AND one that comes by COPY's and MINVALUE's way: the sequence itself is below 1
            database
                .sql("ALTER TABLE walpost.outbox ALTER seq SET MINVALUE -10 SET START -10 RESTART WITH -10")
                .await;
            database
                .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', 'minvalue')")
                .await;
            database.init(&["--payload", "text"], &[mode]).await;

            // WHEN walpost starts, THEN nothing is passed over
            let said = refused(&database, &[mode]).await;
            assert!(
                said.contains("4 rows of table walpost.outbox have a seq"),
                "{said}"
            );

            // AND WHEN the statement is run to the letter, THEN all arrive, and what is inserted later too
            database
                .sql(between(&said, "for instance: ", "; then restart"))
                .await;
            let walpost = database.walpost(&["run"], &[mode]).spawn();
            database
                .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', 'later')")
                .await;
            assert_eq!(
                arrived(&database, 11).await,
                [
                    "below", "good-1", "good-2", "good-3", "good-4", "good-5", "good-6", "large",
                    "later", "minvalue", "zero"
                ],
                "{mode:?} {args:?}"
            );
            let always = "SELECT bool_and(attidentity = 'a') AND count(*) > 0 FROM pg_attribute
                          WHERE attname = 'seq' AND attrelid = 'walpost.outbox'::regclass";
            assert!(database.rows(always, &[]).await[0].get::<_, bool>(0));
            let places =
                "SELECT count(DISTINCT seq) = count(*) AND min(seq) > 0 FROM walpost.outbox";
            assert!(database.rows(places, &[]).await[0].get::<_, bool>(0));
            walpost.stop().await;
        }
    }
}

#[tokio::test]
async fn two_rows_with_one_seq_are_refused_however_far_the_scan_was_and_the_statement_loses_neither()
 {
    for mode in MODES {
        // GIVEN two pairs with one number, far enough from each other for the scan's position to be stored in between
        let database = prepared(mode, &[]).await;
        database
            .sql(&insert(&[
                ("a", 1),
                ("b", 2),
                ("c", 2),
                ("d", 3),
                ("e", 7),
                ("f", 7),
                ("g", 7),
                ("h", 9),
            ]))
            .await;
        database.init(&["--payload", "text"], &[mode]).await;

        // WHEN walpost starts, and again, THEN it is refused: neither of the pair counts as done
        refused(&database, &[mode]).await;
        let said = refused(&database, &[mode]).await;
        assert!(said.contains("have the seq 2"), "{said}");

        // AND WHEN the statement is run to the letter, THEN each row has its own number, and all arrive
        database
            .sql(between(&said, "above all others: ", "; then start"))
            .await;
        let walpost = database.walpost(&["run"], &[mode]).spawn();
        database
            .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', 'later')")
            .await;
        let mut all = arrived(&database, 9).await;
        // What was sent before the refusal has no receipt that was noted, and may come twice.
        all.dedup();
        assert_eq!(all, ["a", "b", "c", "d", "e", "f", "g", "h", "later"]);
        let places = "SELECT count(DISTINCT seq) = count(*) FROM walpost.outbox";
        assert!(database.rows(places, &[]).await[0].get::<_, bool>(0));
        walpost.stop().await;
    }
}
