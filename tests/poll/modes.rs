//! What becomes of published rows in poll mode: marked, deleted, or gone after their retention; never ahead of a receipt.

use std::collections::BTreeSet;

use crate::support::Proxy;
use crate::*;

const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
const DELETE: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "delete");
/// Rows are soon thought old.
const AGE: (&str, &str) = ("WALPOST_STRAGGLER_AGE", "1s");
const UNMARKED: &str = "walpost.outbox WHERE sent_at IS NULL";
const MARKED: &str = "walpost.outbox WHERE sent_at IS NOT NULL";

async fn prepared(mode: (&str, &str)) -> Database {
    let database = Database::create("pollmodes").await;
    database
        .init(&["--payload", "text"], &[POLL[0], mode])
        .await;
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
    eventually(DEADLINE, &format!("{expected} of {what}"), async || {
        (count(database, what).await == expected).then_some(())
    })
    .await;
}

async fn numbers(database: &Database, expected: usize) -> Vec<u32> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE);
    let number = |message: Received| {
        let text = String::from_utf8(message.payload).expect("UTF-8");
        text.parse().expect("a number")
    };
    let mut numbers: Vec<u32> = received.await.into_iter().map(number).collect();
    numbers.sort_unstable();
    numbers
}

#[tokio::test]
async fn nothing_is_marked_ahead_of_its_receipt_nor_published_again_while_it_waits_for_one() {
    // GIVEN a poller whose receipts are held, and rows that are soon thought old
    let database = prepared(MARK).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let settings = [POLL[0], POLL[1], MARK, AGE, ("WALPOST_PULSAR_URL", &url)];
    let walpost = start(&database, &settings).await;
    insert(&database, 1..=10).await;
    wait_count(&database, MARKED, 10).await;
    broker.hold_upstream_replies(true);
    insert(&database, 11..=500).await;

    // WHEN they are three times as old as that: THEN none of them is marked, nor sent
    eventually(DEADLINE, "the rows to be old", async || {
        let old = "walpost.outbox WHERE sent_at IS NULL AND created_at < clock_timestamp() - interval '3s'";
        assert_eq!(count(&database, MARKED).await, 10, "marked without a receipt");
        (count(&database, old).await == 490).then_some(())
    })
    .await;
    let sent = "walpost.outbox_status WHERE status = 'sent'";
    assert_eq!(count(&database, sent).await, 10);

    // WHEN the receipts come: THEN all are, and none was sent again
    broker.hold_upstream_replies(false);
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
    let expected: Vec<u32> = (1..=500).collect();
    assert_eq!(numbers(&database, 500).await, expected);
}

#[tokio::test]
async fn a_mark_that_was_lost_with_the_process_is_made_in_the_end() {
    // GIVEN rows that are published and cannot be marked
    let database = prepared(MARK).await;
    let settings = [POLL[0], POLL[1], MARK, AGE];
    database
        .sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await;
    let mut walpost = start(&database, &settings).await;
    insert(&database, 1..=300).await;
    walpost.wait_for_line("could not be marked", DEADLINE).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN walpost is killed, and only then they can be
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    database.sql("DROP TRIGGER refuse ON walpost.outbox").await;
    let walpost = start(&database, &settings).await;

    // THEN they are, although nothing new ever comes; they may come again
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
    let arrived: BTreeSet<u32> = numbers(&database, 300).await.into_iter().collect();
    assert_eq!(arrived, (1..=300).collect());
}

#[tokio::test]
async fn nothing_is_lost_and_every_row_goes_when_the_poller_is_killed_again_and_again_in_delete_mode()
 {
    // GIVEN writers at work, and a table that remembers what they committed
    let database = Database::create("polldelete").await;
    prepare(&database, &[POLL[0], DELETE]).await;
    database
        .sql(
            "CREATE TABLE committed (id uuid);
             CREATE FUNCTION remember() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO committed VALUES (new.id); RETURN NULL; END $$;
             CREATE TRIGGER remember AFTER INSERT ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION remember()",
        )
        .await;
    let settings = [POLL[0], POLL[1], DELETE, AGE];
    let load = Load::start(&database, 4);

    // WHEN the poller is killed, each time in another part of its work
    for transactions in [20, 60, 35, 90, 50, 75] {
        let mut walpost = start(&database, &settings).await;
        load.more(transactions).await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
    }
    let walpost = start(&database, &settings).await;
    load.more(50).await;
    load.stop();

    // THEN the table is empty in the end, and each committed row is in the topic
    wait_count(&database, "walpost.outbox", 0).await;
    walpost.stop().await;
    let rows = database.rows("SELECT id::text FROM committed", &[]).await;
    let committed: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let received = received(&database, committed.len()).await;
    let id = |message: &Received| message.property("id").to_owned();
    let arrived: BTreeSet<String> = received.iter().map(id).collect();
    assert!(committed.len() > 300, "{}", committed.len());
    assert_eq!(arrived, committed);
    println!("{} rows, {} messages", committed.len(), received.len());
}

#[tokio::test]
async fn a_row_goes_after_its_retention_when_its_receipt_has_come_and_a_straggler_stays() {
    // GIVEN a poller, whose receipts are held from some time on
    let database = prepared(("WALPOST_AFTER_PUBLISH", "keep")).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let retention = ("WALPOST_RETENTION", "1s");
    database.init(&[], &[POLL[0], retention]).await;
    let settings = [POLL[0], POLL[1], retention, ("WALPOST_PULSAR_URL", &url)];
    let walpost = start(&database, &settings).await;
    let old = async |topic: &str, payload: &str| {
        database
            .sql(&format!(
                "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
                 VALUES ('{topic}', 'k', 'e', '{payload}', clock_timestamp() - interval '2h')"
            ))
            .await;
    };
    let payloads = async || {
        let query = "SELECT payload FROM walpost.outbox ORDER BY payload";
        let rows = database.rows(query, &[]).await;
        rows.iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    let wait_left = async |expected: &[&str]| {
        eventually(DEADLINE, &format!("{expected:?} to be left"), async || {
            (payloads().await == expected).then_some(())
        })
        .await;
    };

    // WHEN old rows come: THEN the one that is published goes, and the one that cannot be stays
    old("t", "published").await;
    old("a/b", "straggler").await;
    wait_left(&["straggler"]).await;

    // AND one without its receipt stays until that comes
    broker.hold_upstream_replies(true);
    old("t", "waits").await;
    database.retention_walked(DEADLINE).await;
    assert_eq!(payloads().await, ["straggler", "waits"]);
    broker.hold_upstream_replies(false);
    wait_left(&["straggler"]).await;
    walpost.stop().await;
}
