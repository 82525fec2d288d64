//! Guarantee: `WALPOST_AFTER_PUBLISH=mark` and `delete` touch a row only once its event has the broker's receipt, and every such
//! row in the end; rows that were never sent, or whose mark was lost, are found and published again.

mod support;

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::timeout;

use support::{
    Database, Load, Proxy, Received, Servers, consume, eventually, insert_many, servers,
};

const DEADLINE: Duration = Duration::from_secs(60);
const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
const DELETE: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "delete");
/// For tests in which rows are looked for again.
const SOON: [(&str, &str); 2] = [
    ("WALPOST_STRAGGLER_AGE", "1s"),
    ("WALPOST_SCAN_INTERVAL", "200ms"),
];

/// A moment that no run has twice: when the fault strikes. Nothing is waited for by it.
fn up_to(longest: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    longest.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

async fn prepare(mode: (&str, &str)) -> Database {
    let database = Database::create("modes").await;
    database.init(&["--payload", "text"], &[mode]).await;
    database
}

async fn insert(database: &Database, numbers: std::ops::RangeInclusive<u32>) {
    database
        .sql(&format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'k' || i % 10, 'e', i::text FROM generate_series({}, {}) i",
            numbers.start(),
            numbers.end()
        ))
        .await;
}

async fn count(database: &Database, what: &str) -> i64 {
    let query = format!("SELECT count(*) FROM {what}");
    database.rows(&query, &[]).await[0].get(0)
}

async fn wait_count(database: &Database, what: &str, expected: i64) {
    let waited = format!("{expected} of {what}");
    eventually(DEADLINE, &waited, async || {
        (count(database, what).await == expected).then_some(())
    })
    .await;
}

const ROWS: &str = "walpost.outbox";
const MARKED: &str = "walpost.outbox WHERE sent_at IS NOT NULL";
const UNMARKED: &str = "walpost.outbox WHERE sent_at IS NULL";

async fn numbers(topic: &str, expected: usize) -> Vec<u32> {
    let received = consume(&servers().pulsar_url, topic, expected, DEADLINE).await;
    let number = |message: Received| {
        let text = String::from_utf8(message.payload).expect("UTF-8");
        text.parse().expect("a number")
    };
    let mut numbers: Vec<u32> = received.into_iter().map(number).collect();
    numbers.sort_unstable();
    numbers
}

#[tokio::test]
async fn every_row_is_marked_once_in_each_of_several_tables() {
    // GIVEN a second table, with ids of another type and a name that needs quotes
    let database = Database::create("modes").await;
    database
        .sql(
            r#"CREATE TABLE "Out ""box" (id bigint PRIMARY KEY, aggregatetype text, aggregateid text, type text,
                                         payload text, sent_at timestamptz)"#,
        )
        .await;
    let tables = ("WALPOST_OUTBOX_TABLE", r#"walpost.outbox, "Out ""box""#);
    database.init(&["--payload", "text"], &[MARK, tables]).await;
    let walpost = database.start(&[MARK, tables]).await;

    // WHEN rows come to both in one transaction, and some of it is rolled back
    database
        .sql(
            r#"BEGIN;
               INSERT INTO "Out ""box" SELECT i, 't', 'k', 'e', i::text FROM generate_series(1, 2500) i;
               SAVEPOINT s;
               INSERT INTO "Out ""box" SELECT i, 't', 'k', 'e', i::text FROM generate_series(2501, 2600) i;
               ROLLBACK TO s;
               INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
               SELECT 't', 'k', 'e', i::text FROM generate_series(2501, 5000) i;
               COMMIT"#,
        )
        .await;

    // THEN all are marked, by one update each
    wait_count(&database, MARKED, 2500).await;
    wait_count(&database, r#""Out ""box" WHERE sent_at IS NOT NULL"#, 2500).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    eventually(DEADLINE, "the server to have counted 5000 updates", async || {
        let sql = "SELECT sum(n_tup_upd)::bigint FROM pg_stat_user_tables WHERE relname IN ('outbox', 'Out \"box')";
        let updates: Option<i64> = database.rows(sql, &[]).await[0].get(0);
        assert!(updates <= Some(5000), "{updates:?}");
        (updates == Some(5000)).then_some(())
    })
    .await;
    let expected: Vec<u32> = (1..=5000).collect();
    assert_eq!(numbers(&database.topic("t"), 5000).await, expected);
}

#[tokio::test]
async fn rows_are_marked_by_their_id_and_not_found_among_those_that_are_not_marked() {
    // GIVEN statistics by which hardly a row waits to be marked, so that the index on those looks like the shortest way
    let database = prepare(MARK).await;
    let never = ("WALPOST_SCAN_INTERVAL", "1h");
    let walpost = database.start(&[MARK, never]).await;
    insert(&database, 1..=10_000).await;
    wait_count(&database, MARKED, 10_000).await;
    database.sql("ANALYZE walpost.outbox").await;

    // WHEN more rows wait than one statement marks
    insert(&database, 10_001..=15_000).await;
    wait_count(&database, MARKED, 15_000).await;
    walpost.stop().await;

    // THEN that index, which also has an entry for each row marked since the last vacuum, was not walked through
    eventually(
        DEADLINE,
        "the server to have counted 15000 updates",
        async || {
            let sql = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'outbox'";
            let updates: i64 = database.rows(sql, &[]).await[0].get(0);
            (updates >= 15_000).then_some(())
        },
    )
    .await;
    let sql =
        "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'outbox_unmarked'";
    let read: i64 = database.rows(sql, &[]).await[0].get(0);
    assert!(read < 1000, "{read} entries were read");
}

#[tokio::test]
async fn nothing_is_marked_ahead_of_its_receipt_nor_published_again_while_it_waits_for_one() {
    // GIVEN a stream whose receipts are held, and rows that are soon thought old
    let database = prepare(MARK).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let single = ("WALPOST_BATCH_MAX_MESSAGES", "1");
    let settings = [MARK, SOON[0], SOON[1], single, ("WALPOST_PULSAR_URL", &url)];
    let walpost = database.start(&settings).await;
    // The topic accepts something larger than all that comes, so that nothing waits behind the first of its size.
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', repeat('x', 200), 'e', '0')",
        )
        .await;
    insert(&database, 1..=10).await;
    wait_count(&database, MARKED, 11).await;
    broker.hold_upstream_replies(true);
    insert(&database, 11..=500).await;
    let topic = database.topic("t");
    assert_eq!(
        numbers(&topic, 501).await.len(),
        501,
        "the broker has them all"
    );

    // WHEN they are three times as old as that: THEN none of them is marked
    eventually(DEADLINE, "the rows to be old", async || {
        let old = "walpost.outbox WHERE sent_at IS NULL AND created_at < clock_timestamp() - interval '3s'";
        assert_eq!(count(&database, MARKED).await, 11, "marked without a receipt");
        (count(&database, old).await == 490).then_some(())
    })
    .await;

    // WHEN the receipts come: THEN all are, and none was sent again
    broker.hold_upstream_replies(false);
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
    let expected: Vec<u32> = (0..=500).collect();
    assert_eq!(numbers(&topic, 501).await, expected);
}

#[tokio::test]
async fn rows_that_a_broken_publication_never_sent_arrive_and_are_marked() {
    let database = prepare(MARK).await;
    let walpost = database.start(&[MARK, SOON[0], SOON[1]]).await;
    insert(&database, 1..=3).await;
    wait_count(&database, MARKED, 3).await;

    // GIVEN rows that were committed while the table was not in the publication (in one transaction: walpost would notice)
    database
        .sql("BEGIN; ALTER PUBLICATION walpost DROP TABLE walpost.outbox")
        .await;
    insert(&database, 4..=1000).await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE walpost.outbox; COMMIT")
        .await;
    insert(&database, 1001..=1003).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN they arrive nevertheless, once, and are marked
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
    let expected: Vec<u32> = (1..=1003).collect();
    assert_eq!(numbers(&database.topic("t"), 1003).await, expected);
}

#[tokio::test]
async fn a_row_without_an_id_and_a_topic_that_is_refused_hold_up_no_other_lost_row() {
    // GIVEN two tables, the first of them somebody's, whose id may be NULL
    let database = Database::create("modes").await;
    database
        .sql(
            "CREATE TABLE events (id text, aggregatetype text, aggregateid text, type text, payload text,
                                  sent_at timestamptz, created_at timestamptz DEFAULT clock_timestamp())",
        )
        .await;
    let tables = ("WALPOST_OUTBOX_TABLE", "public.events, walpost.outbox");
    database.init(&["--payload", "text"], &[MARK, tables]).await;
    let mut walpost = database.start(&[MARK, tables, SOON[0], SOON[1]]).await;
    insert(&database, 1..=1).await;
    wait_count(&database, MARKED, 1).await;
    let refused = database.topic("refused");
    let path = refused.replace("persistent://", "/admin/v2/persistent/");
    let admin = async |method, path: &str| {
        support::admin(&servers().pulsar_admin_url, method, path, "").await;
    };
    admin("PUT", &path).await;
    admin("POST", &format!("{path}/terminate")).await;

    // WHEN rows of both are never sent, in the first one without an id and one to a topic that takes none
    database
        .sql(
            "ALTER PUBLICATION walpost DROP TABLE events, walpost.outbox;
             INSERT INTO events VALUES (NULL, 't', 'k', 'e', '100'), ('4711', 'refused', 'k', 'e', '101'), ('4712', 't', 'k', 'e', '2');
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '3');
             ALTER PUBLICATION walpost ADD TABLE events, walpost.outbox",
        )
        .await;

    // THEN the others arrive and are marked, while the one that gets no receipt is still tried
    let longer = DEADLINE * 3;
    walpost
        .wait_for_line("wait for the next round", longer)
        .await;
    wait_count(&database, MARKED, 2).await;
    wait_count(&database, "events WHERE sent_at IS NOT NULL", 1).await;
    assert_eq!(numbers(&database.topic("t"), 3).await, [1, 2, 3]);

    // AND when its topic is mended it arrives too, and the one without an id is left
    admin("DELETE", &format!("{path}?force=true")).await;
    eventually(longer, "the row to arrive", async || {
        (count(&database, "events WHERE sent_at IS NULL").await == 1).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn rows_from_before_the_mode_are_not_published_again() {
    // GIVEN rows that were published and kept
    let database = prepare(("WALPOST_AFTER_PUBLISH", "keep")).await;
    let walpost = database.start(&[]).await;
    insert(&database, 1..=50).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // WHEN the mode is turned on, and off, and on
    database.init(&[], &[MARK]).await;
    let settings = [MARK, SOON[0], SOON[1]];
    for (settings, numbers) in [
        (&settings[..], 51..=60),
        (&[], 61..=70),
        (&settings[..], 71..=80),
    ] {
        let walpost = database.start(settings).await;
        insert(&database, numbers).await;
        database.wait_all_confirmed(DEADLINE).await;
        walpost.stop().await;
    }
    // A row that is lost, for the scanner to have something to find.
    let walpost = database.start(&settings).await;
    database
        .sql(
            "ALTER PUBLICATION walpost DROP TABLE walpost.outbox;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '81');
             ALTER PUBLICATION walpost ADD TABLE walpost.outbox",
        )
        .await;
    wait_count(
        &database,
        "walpost.outbox WHERE payload = '81' AND sent_at IS NOT NULL",
        1,
    )
    .await;
    walpost.stop().await;

    // THEN only what came while it was on is marked, and each row is there once
    assert_eq!(count(&database, MARKED).await, 21);
    let expected: Vec<u32> = (1..=81).collect();
    assert_eq!(numbers(&database.topic("t"), 81).await, expected);
}

#[tokio::test]
async fn nothing_is_lost_and_every_row_goes_when_the_connector_is_killed_eight_times_in_delete_mode()
 {
    // GIVEN writers at work, and a table that remembers what they committed
    let database = Database::create("modes").await;
    database.init(&[], &[DELETE]).await;
    Load::counters(&database).await;
    database
        .sql(
            "CREATE TABLE committed (id uuid);
             CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO committed VALUES (new.id); RETURN NULL; END $$;
             CREATE TRIGGER remember AFTER INSERT ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION remember()",
        )
        .await;
    let settings = [DELETE, SOON[0], SOON[1]];
    let load = Load::start(&database, 4);

    // WHEN the connector is killed at random moments
    for _ in 0..8 {
        let mut walpost = database.start(&settings).await;
        tokio::time::sleep(up_to(Duration::from_millis(1500))).await;
        walpost.sigkill();
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            128 + 9,
            "it ended before"
        );
        load.more(50).await;
    }
    let walpost = database.start(&settings).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;

    // THEN the table is empty in the end, and each committed row is in the topic
    wait_count(&database, ROWS, 0).await;
    walpost.stop().await;
    let committed: BTreeSet<String> = database
        .rows("SELECT id::text FROM committed", &[])
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    let arrived: BTreeSet<String> = received
        .iter()
        .map(|message| message.property("id").to_owned())
        .collect();
    println!("{} rows, {} messages", committed.len(), received.len());
    assert!(committed.len() > 500);
    let lost: Vec<_> = committed.difference(&arrived).collect();
    let invented: Vec<_> = arrived.difference(&committed).collect();
    assert!(
        lost.is_empty() && invented.is_empty(),
        "{} lost: {:?}; {} invented: {:?}",
        lost.len(),
        lost.first(),
        invented.len(),
        invented.first()
    );
}

#[tokio::test]
async fn a_row_that_its_producer_deletes_in_the_same_transaction_arrives_and_holds_nothing_up() {
    let database = prepare(DELETE).await;
    let walpost = database.start(&[DELETE]).await;
    database
        .sql(
            "BEGIN;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1');
             DELETE FROM walpost.outbox;
             COMMIT",
        )
        .await;
    insert(&database, 2..=3).await;
    wait_count(&database, ROWS, 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 3).await, [1, 2, 3]);
}

#[tokio::test]
async fn marks_go_on_after_postgres_was_restarted() {
    // GIVEN rows that are published and cannot be marked
    let own = Servers::own("modes", &["--no-pulsar"]);
    let database = Database::create_on(&own, "modes").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    let mut walpost = database.start(&[MARK]).await;
    database
        .sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await;
    insert(&database, 1..=300).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.wait_for_line("could not be marked", DEADLINE).await;

    // WHEN Postgres is restarted while they wait, and only then they can be
    own.stop_postgres();
    own.start();
    let database = Reconnected(database.connect().await);
    assert_eq!(database.marked().await, Some(0));
    database
        .0
        .batch_execute("DROP TRIGGER refuse ON walpost.outbox")
        .await
        .expect("a trigger");
    database.insert(301, 600).await;

    // THEN all are marked, long before anybody would look for them again
    eventually(DEADLINE, "600 marks", async || {
        (database.marked().await? == 600).then_some(())
    })
    .await;
    walpost.sigterm();
    assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
}

/// A session made after the server was restarted.
struct Reconnected(tokio_postgres::Client);

impl Reconnected {
    async fn insert(&self, from: i32, upto: i32) {
        let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                   SELECT 't', 'k', 'e', i::text FROM generate_series($1::int, $2::int) i";
        self.0
            .execute(sql, &[&from, &upto])
            .await
            .expect("an insert");
    }

    async fn marked(&self) -> Option<i64> {
        let sql = format!("SELECT count(*) FROM {MARKED}");
        Some(self.0.query_one(&sql, &[]).await.ok()?.get(0))
    }
}

#[tokio::test]
async fn a_row_that_is_published_before_it_can_be_seen_is_marked_when_it_can() {
    // GIVEN a server on which commits wait for a standby that is not there
    let own = Servers::own("unseen", &["--no-pulsar"]);
    let database = Database::create_on(&own, "modes").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    let walpost = database.start(&[MARK]).await;
    database
        .sql("ALTER SYSTEM SET synchronous_standby_names TO 'nobody'")
        .await;
    database.sql("SELECT pg_reload_conf()").await;
    let writer = database.connect().await;
    eventually(DEADLINE, "the setting", async || {
        let rows = writer
            .query("SHOW synchronous_standby_names", &[])
            .await
            .ok()?;
        (rows[0].get::<_, &str>(0) == "nobody").then_some(())
    })
    .await;

    // WHEN a row is committed: THEN it is published while nobody can see it
    let committing = tokio::spawn(async move {
        let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')";
        writer.batch_execute(sql).await
    });
    assert_eq!(numbers(&database.topic("t"), 1).await, [1]);
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, ROWS).await, 0, "it can be seen");

    // WHEN the commit ends: THEN it is marked, long before anybody would look for it again
    database
        .client
        .batch_execute("ALTER SYSTEM RESET synchronous_standby_names")
        .await
        .expect("a superuser");
    database.sql("SELECT pg_reload_conf()").await;
    committing.await.expect("no panic").expect("a commit");
    wait_count(&database, MARKED, 1).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 1).await, [1]);
}

#[tokio::test]
async fn a_transaction_that_waits_for_walpost_and_has_more_rows_than_may_wait_holds_nothing_up() {
    // GIVEN a server on which commits wait for walpost's own confirmation
    let own = Servers::own("standby", &["--no-pulsar"]);
    let database = Database::create_on(&own, "modes").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    let mut walpost = database.start(&[MARK, SOON[0], SOON[1]]).await;
    database
        .sql("ALTER SYSTEM SET synchronous_standby_names TO '*'")
        .await;
    database.sql("SELECT pg_reload_conf()").await;
    eventually(DEADLINE, "the setting", async || {
        let sql = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;

    // WHEN one transaction has more rows than may wait to be marked, and than are kept until it can be seen
    let committed = timeout(DEADLINE, insert(&database, 1..=110_000)).await;

    // THEN its commit returns, and each row is marked, also those that were not kept
    assert!(committed.is_ok(), "it waits: {}", walpost.output());
    walpost
        .wait_for_line("more published rows than are kept", DEADLINE)
        .await;
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
}

#[tokio::test]
async fn what_is_published_when_told_to_stop_is_marked_before_the_end() {
    let database = Database::create("modes").await;
    Load::prepare(&database).await;
    database.init(&[], &[MARK]).await;
    let walpost = database.start(&[MARK]).await;

    // WHEN it is told to stop with a burst of rows on the way
    insert_many(&database.client, "k", 20_000).await;
    eventually(DEADLINE, "the first marks", async || {
        (count(&database, MARKED).await > 0).then_some(())
    })
    .await;
    walpost.stop().await;

    // THEN every row is marked: all were published
    assert_eq!(count(&database, UNMARKED).await, 0);
}
