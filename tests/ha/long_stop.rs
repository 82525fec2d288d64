//! An instance that is stopped (SIGSTOP) for longer than every lease, session and keepalive lasts. Nobody ends anything of it: Postgres and the
//! broker have to find out by themselves. The successor works meanwhile; the old one, going on, changes nothing behind its back.

use crate::support::{Committed, Database, Load, admin, consume, eventually, servers};
use crate::takeover::{Between, CLOSED, insert, routing};
use crate::*;
use tokio::time::{Instant, sleep_until};

/// Longer than `wal_sender_timeout` and two keepalive intervals of the broker (60 s each).
const STOP: Duration = Duration::from_secs(75);
/// In which a successor of a stopped instance streams: `wal_sender_timeout`, and time to try.
const FOUND: Duration = Duration::from_secs(120);
const LOCK: i64 = 9;

/// All at once: they mostly wait.
#[tokio::test]
async fn an_instance_that_is_stopped_for_long_is_succeeded_and_changes_nothing_when_it_goes_on() {
    tokio::join!(
        is_succeeded(),
        changes_nothing("mark", "sent_at IS NULL"),
        changes_nothing("delete", "true"),
    );
}

/// Nothing is lost or repeated, also when it takes over again.
async fn is_succeeded() {
    // GIVEN writers at work, an instance that is stopped in the middle of its work, and one that waits
    let mut database = Database::create("long").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);
    let mut first = instance(&database);
    first.wait_for_line("streaming", DEADLINE).await;
    let mut second = instance(&database);
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;
    first.signal("STOP");
    let until = Instant::now() + STOP;

    // THEN the other one streams, and publishes on every lane
    second.wait_for_line("streaming", FOUND).await;
    load.more(50).await;
    let now = database.current_wal_lsn().await;
    database.wait_confirmed(&database.slot, now, DEADLINE).await;

    // AND WHEN the first one goes on, THEN it waits, and takes over when the second one dies
    sleep_until(until).await;
    load.more(50).await;
    first.signal("CONT");
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;
    second.sigkill();
    second.wait_exit(DEADLINE).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    first.stop().await;

    // AND every row is in the topic once, in order
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

/// Commits one event.
async fn insert_one(database: &Database, topic: &str, payload: &str) {
    let sql = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('{topic}', repeat('x', 200), 'e', '{payload}')"
    );
    database.sql(&sql).await;
}

async fn stragglers(database: &Database) -> usize {
    let sql = "SELECT FROM walpost.straggler";
    database.rows(sql, &[]).await.len()
}

/// Sends the broker's administration a command for a topic.
async fn terminate(topic: &str) {
    let path = topic.replace("persistent://", "/admin/v2/persistent/");
    let path = format!("{path}/terminate");
    admin(&servers().pulsar_admin_url, "POST", &path, "").await;
}

/// Rows are not marked or deleted, events are not stored or published behind the successor's first one.
async fn changes_nothing(mode: &str, unchanged: &str) {
    const EVENTS: usize = 300;
    // GIVEN an instance with a published row that it cannot mark or delete yet
    let mode = ("WALPOST_AFTER_PUBLISH", mode);
    let database = Database::create("long").await;
    database.init(&[], &[mode]).await;
    database
        .sql(&format!(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN
                      IF EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = ''advisory'' AND objid = {LOCK} AND granted
                                 AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
                      THEN RAISE EXCEPTION ''not now''; END IF;
                      RETURN coalesce(NEW, OLD);
                  END';
             CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION refuse()"
        ))
        .await;
    let between = Between::start();
    let settings = [
        mode,
        ("WALPOST_BATCH_MAX_MESSAGES", "1"),
        ("WALPOST_SCAN_INTERVAL", "1h"),
        ("WALPOST_LOG", "debug"),
    ];
    let mut first = between.instance(&database, &settings).await;
    first.wait_for_line("streaming", DEADLINE).await;
    let topic = database.topic("t");
    let marks = database.connect().await;
    marks
        .batch_execute(&format!("SELECT pg_advisory_lock({LOCK})"))
        .await
        .expect("the lock");
    insert_one(&database, "r", "0").await;
    insert(&database, 10).await;
    // The topic accepts something larger than all that comes, so that nothing waits behind the first of its size.
    insert_one(&database, "t", "0").await;
    database.wait_all_confirmed(DEADLINE).await;
    first
        .wait_for_line("published rows could not be marked or deleted", DEADLINE)
        .await;

    // AND with an event that it cannot store yet
    terminate(&database.topic("r")).await;
    let mut table = database.connect().await;
    let lock = table.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE walpost.straggler IN SHARE MODE")
        .await
        .expect("a lock");
    insert_one(&database, "r", "1").await;
    eventually(DEADLINE, "the event to wait for the table", async || {
        let sql = "SELECT FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ILIKE '%insert into walpost.straggler%'";
        (database.rows(sql, &[]).await.len() == 1).then_some(())
    })
    .await;

    // AND with events whose receipts are lost
    let sent = between.broker.to_server_bytes();
    between.broker.hold_upstream_replies(true);
    insert(&database, EVENTS).await;
    eventually(DEADLINE, "events to be sent", async || {
        (between.broker.to_server_bytes() > sent + 10_000).then_some(())
    })
    .await;

    // WHEN it is stopped for long, and an instance with other producer names, which marks nothing, takes over
    first.signal("STOP");
    let until = Instant::now() + STOP;
    lock.rollback().await.expect("a session");
    let other = [("WALPOST_LANES", "3"), ("WALPOST_SCAN_INTERVAL", "1h")];
    let other = [&SETTINGS[..], &other].concat();
    let mut second = database.walpost(&["run"], &other).spawn();
    second.wait_for_line("streaming", FOUND).await;
    insert(&database, 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(stragglers(&database).await, 1);
    sleep_until(until).await;

    // AND it goes on, and nothing keeps it from marking, storing and sending any more
    between.broker.cut();
    between.broker.hold_upstream_replies(false);
    marks
        .batch_execute("SELECT pg_advisory_unlock_all()")
        .await
        .expect("it is free");
    first.signal("CONT");
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    first
        .wait_for_line("published rows are not marked or deleted now", DEADLINE * 2)
        .await;
    insert(&database, 1).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN it has marked or deleted nothing, stored nothing, and published nothing behind the second one's first event
    let sql = format!("SELECT FROM walpost.outbox WHERE {unchanged}");
    assert_eq!(database.rows(&sql, &[]).await.len(), EVENTS + 15);
    assert_eq!(stragglers(&database).await, 1);
    second.stop().await;
    let received = consume(&servers().pulsar_url, &topic, EVENTS + 13, DEADLINE).await;
    let names = received.iter().map(|event| routing(&event.producer_name));
    let mut names: Vec<&str> = names.collect();
    names.dedup();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(!first.output().contains(CLOSED), "{}", first.output());
    first.stop().await;
}
