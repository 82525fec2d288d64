//! Guarantee: what cannot be published is stored before the log position passes it, keeps its order, and arrives once it can;
//! meanwhile everything else goes on.
//!
//! Real servers. A topic is refused by being terminated, and healed by being deleted: the broker then makes it anew.

#[path = "stragglers/dead.rs"]
mod dead;
#[path = "stragglers/discard.rs"]
mod discard;
#[path = "stragglers/fence.rs"]
mod fence;
#[path = "stragglers/large.rs"]
mod large;
#[path = "stragglers/numbers_again.rs"]
mod numbers_again;
#[path = "stragglers/order.rs"]
mod order;
#[path = "stragglers/refused.rs"]
mod refused;
#[path = "stragglers/scan.rs"]
mod scan;
#[path = "stragglers/scan_refused.rs"]
mod scan_refused;
#[path = "stragglers/storable.rs"]
mod storable;
mod support;
#[path = "stragglers/unanswered.rs"]
mod unanswered;
#[path = "stragglers/walk.rs"]
mod walk;

use std::time::Duration;

use tokio_postgres::{Client, Transaction};

use support::{Database, Proxy, Walpost, admin, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
/// Stands in payloads; must never be in the output.
const SECRET: &str = "hunter2";
/// Quick retries.
const QUICK: [(&str, &str); 3] = [
    ("WALPOST_RETRY_INITIAL", "50ms"),
    ("WALPOST_RETRY_MAX", "500ms"),
    ("WALPOST_RECONNECT_MAX", "500ms"),
];

async fn prepared(prefix: &str) -> Database {
    let database = Database::create(prefix).await;
    database.init(&["--payload", "text"], &[]).await;
    database
}

/// Commits one event.
async fn insert(database: &Database, topic: &str, key: &str, payload: &str) {
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ($1, $2, 't', $3)";
    database.rows(insert, &[&topic, &key, &payload]).await;
}

/// Commits events of a topic in transactions of 100, spread over so many keys; payloads are numbers from `first` on.
async fn insert_numbers(database: &Database, topic: &str, keys: i64, first: i64, count: i64) {
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT $1::text, 'key-' || number % $2::int8, 't', number::text FROM generate_series($3::int8, $4::int8) number ORDER BY number::int8";
    for first in (first..first + count).step_by(100) {
        database
            .rows(insert, &[&topic, &keys, &first, &(first + 99)])
            .await;
    }
}

/// Path of a topic in the admin interface.
fn path(topic: &str) -> String {
    topic.replace("persistent://", "/admin/v2/persistent/")
}

/// Ends a topic: no producer is let in any more.
async fn terminate(topic: &str) {
    let path = format!("{}/terminate", path(topic));
    admin(&servers().pulsar_admin_url, "POST", &path, "").await;
}

/// Deletes a topic and what is in it: it is made anew when it is next used.
async fn delete(topic: &str) {
    let path = format!("{}?force=true", path(topic));
    admin(&servers().pulsar_admin_url, "DELETE", &path, "").await;
}

/// A stream on which topic `t` was terminated after its first event.
async fn with_terminated(database: &Database, settings: &[(&str, &str)]) -> (Walpost, String) {
    let settings = [&QUICK[..], settings].concat();
    let walpost = database.start(&settings).await;
    insert(database, "t", "key-0", "first").await;
    database.wait_all_confirmed(DEADLINE).await;
    let topic = database.topic("t");
    terminate(&topic).await;
    (walpost, topic)
}

/// How many stragglers there are in a state.
async fn count(database: &Database, state: &str) -> i64 {
    let query = "SELECT count(*) FROM walpost.straggler WHERE state = $1";
    database.rows(query, &[&state]).await[0].get(0)
}

async fn wait_for_count(database: &Database, state: &str, expected: i64) {
    let what = format!("{expected} stragglers to be {state}");
    eventually(DEADLINE, &what, async || {
        (count(database, state).await == expected).then_some(())
    })
    .await;
}

/// Waits until the table is empty.
async fn wait_for_none(database: &Database) {
    eventually(DEADLINE, "the stragglers to go", async || {
        let rows = database.rows("SELECT count(*) FROM walpost.straggler", &[]);
        (rows.await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

/// Keeps everybody from writing into the table until the transaction ends.
async fn lock_table(session: &mut Client) -> Transaction<'_> {
    let lock = session.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE walpost.straggler IN SHARE MODE")
        .await
        .expect("a lock");
    lock
}

async fn wait_for_blocked_insert(database: &Database) {
    eventually(DEADLINE, "the insert to wait for the lock", async || {
        let query = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ILIKE '%insert into walpost.straggler%'";
        (database.rows(query, &[]).await[0].get::<_, i64>(0) == 1).then_some(())
    })
    .await;
}

/// A stream in a namespace that allows no long delays; one message of key `k` was published.
async fn with_short_delays(database: &mut Database, settings: &[(&str, &str)]) -> Walpost {
    let url = &servers().pulsar_admin_url;
    let policy = format!(
        "/admin/v2/namespaces/public/{}/delayedDelivery",
        database.name
    );
    let delays = r#"{"active": true, "tickTime": 1000, "maxDeliveryDelayInMillis": 60000}"#;
    admin(url, "POST", &policy, delays).await;
    database.init(&["--payload", "text"], &[]).await;
    let attempts = ("WALPOST_RETRY_MAX_ATTEMPTS", "1000");
    let settings = [&QUICK[..], &[attempts], settings].concat();
    let walpost = database.start(&settings).await;
    insert(database, "t", "k", "before").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost
}

/// Commits a message that such a namespace refuses.
async fn insert_late(database: &Database) {
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, deliver_at)
             VALUES ('t', 'k', 't', 'late', now() + interval '1 hour')",
        )
        .await;
}

/// The payloads in a topic, in order.
async fn payloads(topic: &str, expected: usize) -> Vec<String> {
    let received = consume(&servers().pulsar_url, topic, expected, DEADLINE).await;
    let text = |message: support::Received| String::from_utf8(message.payload).expect("UTF-8");
    received.into_iter().map(text).collect()
}

/// Asserts that a topic holds the numbers 1 to `count`, each at least once, the first arrivals of each key in order; returns
/// how many came again.
async fn assert_numbers(topic: &str, keys: i64, count: i64) -> usize {
    let expected = usize::try_from(count).expect("a small number");
    let received = consume(&servers().pulsar_url, topic, expected, DEADLINE).await;
    let mut last = vec![0; usize::try_from(keys).expect("a few")];
    let (mut seen, mut repeats) = (std::collections::HashSet::new(), 0);
    for message in received {
        let text = String::from_utf8(message.payload).expect("UTF-8");
        let Ok(number) = text.parse::<i64>() else {
            continue;
        };
        if !seen.insert(number) {
            repeats += 1;
            continue;
        }
        let last = &mut last[usize::try_from(number % keys).expect("a key")];
        assert!(*last < number, "{number} came behind {last} of its key");
        *last = number;
    }
    let missing: Vec<i64> = (1..=count).filter(|n| !seen.contains(n)).collect();
    assert!(
        missing.is_empty(),
        "{} of {count} are missing: {:?}",
        missing.len(),
        &missing[..missing.len().min(5)]
    );
    repeats
}

#[tokio::test]
async fn a_null_key_is_stored_dead_and_the_stream_goes_on() {
    // GIVEN somebody else's table, whose key may be NULL
    let database = Database::create("nullkey").await;
    database
        .sql("CREATE TABLE events (id text, aggregatetype text, aggregateid text, type text, payload text)")
        .await;
    let settings = [("WALPOST_OUTBOX_TABLE", "events")];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;

    // WHEN a row without a key stands between two others
    database
        .sql(
            "INSERT INTO events VALUES ('1', 't', 'k', 't', 'before'), ('4711', 't', NULL, 'made', 'hunter2'),
                                       ('3', 't', 'k', 't', 'after')",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN those arrive, and it is kept whole, with the reason
    let received = payloads(&database.topic("t"), 2).await;
    assert_eq!(received, ["before", "after"]);
    let query = "SELECT outbox, id, topic, key, payload, properties::text, state, reason, ordinal FROM walpost.straggler";
    let rows = database.rows(query, &[]).await;
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    let text = |index: usize| row.get::<_, Option<&str>>(index);
    assert_eq!((text(0), text(1)), (Some("public.events"), Some("4711")));
    assert_eq!((text(2), text(3)), (Some(&*database.topic("t")), None));
    assert_eq!(row.get::<_, &[u8]>(4), SECRET.as_bytes());
    assert!(text(5).expect("properties").contains(r#"["type","made"]"#));
    assert_eq!(text(6), Some("dead"));
    let reason = text(7).expect("a reason");
    assert!(
        reason.contains("aggregateid") && reason.contains("NULL"),
        "{reason}"
    );
    assert_eq!(row.get::<_, i64>(8), 2);
    assert!(!walpost.output().contains(SECRET), "{}", walpost.output());
    walpost.stop().await;
}

#[tokio::test]
async fn a_topic_name_that_is_none_is_stored_dead_and_the_stream_goes_on() {
    let database = prepared("badtopic").await;
    let walpost = database.start(&[]).await;
    insert(&database, "t", "k", "before").await;
    insert(&database, "a/b", "k", SECRET).await;
    insert(&database, "t", "k", "after").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(payloads(&database.topic("t"), 2).await, ["before", "after"]);
    let query = "SELECT topic, key, reason, state FROM walpost.straggler";
    let rows = database.rows(query, &[]).await;
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].get::<_, Option<&str>>(0), None);
    assert_eq!(rows[0].get::<_, Option<&str>>(1), Some("k"));
    assert!(rows[0].get::<_, &str>(2).contains("'/'"));
    assert_eq!(rows[0].get::<_, &str>(3), "dead");
    walpost.stop().await;
}

#[tokio::test]
async fn an_oversize_message_is_stored_and_holds_back_its_own_key_only() {
    // GIVEN a stream
    let database = prepared("oversize").await;
    let settings = [&QUICK[..], &[("WALPOST_RETRY_MAX_ATTEMPTS", "1000")]].concat();
    let walpost = database.start(&settings).await;

    // WHEN a message that the broker does not take is followed by others
    insert(&database, "t", "k", "before").await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', 'k', 't', repeat('x', 5 * 1024 * 1024))",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    insert(&database, "t", "k", "behind").await;
    insert(&database, "t", "other", "goes on").await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN the log position passes them all, the key waits, the other goes on
    assert_eq!(
        payloads(&database.topic("t"), 2).await,
        ["before", "goes on"]
    );
    let query = "SELECT state, length(payload), reason FROM walpost.straggler ORDER BY number";
    let rows = database.rows(query, &[]).await;
    let seen: Vec<(&str, i32)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(seen, [("retrying", 5 * 1024 * 1024), ("parked", 6)]);
    assert!(rows[0].get::<_, &str>(2).contains("maxMessageSize"));

    // AND WHEN somebody makes it small enough, THEN it arrives, its successor behind it, and the key streams again
    let mend = "UPDATE walpost.straggler SET payload = 'smaller' WHERE state = 'retrying'";
    database.sql(mend).await;
    wait_for_none(&database).await;
    insert(&database, "t", "k", "streamed").await;
    database.wait_all_confirmed(DEADLINE).await;
    let all = payloads(&database.topic("t"), 5).await;
    assert_eq!(all, ["before", "goes on", "smaller", "behind", "streamed"]);
    walpost.stop().await;
}

#[tokio::test]
async fn the_log_position_passes_a_straggler_only_when_it_is_committed() {
    // GIVEN a stream, and a session that keeps everybody from writing into the table
    let database = prepared("commit").await;
    let mut walpost = database.start(&[]).await;
    insert(&database, "t", "k", "before").await;
    database.wait_all_confirmed(DEADLINE).await;
    let mut locker = database.connect().await;
    let lock = lock_table(&mut locker).await;

    // WHEN a row comes that must be stored, and one behind it
    let before = database.current_wal_lsn().await;
    insert(&database, "a/b", "k", "bad").await;
    let bad = database.current_wal_lsn().await;
    insert(&database, "t", "k", "after").await;
    assert_eq!(payloads(&database.topic("t"), 2).await, ["before", "after"]);
    // (A session waits for the lock, and the walsender has been told since.)
    wait_for_blocked_insert(&database).await;
    let told = "SELECT reply_time FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
                WHERE s.slot_name = $1 AND reply_time > $2::text::timestamptz";
    let now: String = database.rows("SELECT now()::text", &[]).await[0].get(0);
    eventually(DEADLINE, "another status update", async || {
        (!database
            .rows(told, &[&database.slot, &now])
            .await
            .is_empty())
        .then_some(())
    })
    .await;

    // THEN the slot stands in front of it
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    let confirmed = confirmed.expect("the slot");
    assert!(
        confirmed < bad,
        "{confirmed} has passed the event ({before} to {bad}) that is not stored"
    );

    // AND WHEN walpost is killed before the commit, THEN the row is stored by the next one
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    lock.rollback().await.expect("the lock goes");
    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "dead").await, 1);
    walpost.stop().await;
}

#[tokio::test]
async fn with_ordering_none_later_events_of_the_key_pass() {
    let database = prepared("unordered").await;
    let settings = [&QUICK[..], &[("WALPOST_ORDERING", "none")]].concat();
    let walpost = database.start(&settings).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', 'k', 't', repeat('x', 5 * 1024 * 1024))",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    insert(&database, "t", "k", "passes").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(payloads(&database.topic("t"), 1).await, ["passes"]);
    assert_eq!(count(&database, "retrying").await, 1);
    assert_eq!(count(&database, "parked").await, 0);
    walpost.stop().await;
}

#[tokio::test]
async fn a_repeated_transaction_stores_nothing_twice() {
    // GIVEN a broker whose receipts are held
    let database = prepared("repeated").await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let through = format!("pulsar://{}", broker.addr());
    let mut walpost = database.start(&[("WALPOST_PULSAR_URL", &through)]).await;
    insert(&database, "t", "k", "first").await;
    database.wait_all_confirmed(DEADLINE).await;
    broker.hold_upstream_replies(true);

    // WHEN a transaction has a row that must be stored and one that waits for its receipt, and walpost is killed
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', 'k', 't', 'good'), ('a/b', 'k', 't', 'bad')",
        )
        .await;
    let all = database.current_wal_lsn().await;
    wait_for_count(&database, "dead", 1).await;
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    assert!(confirmed < Some(all), "it is confirmed without its receipt");
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;

    // THEN the transaction comes again, is confirmed, and the row is stored once
    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "dead").await, 1);
    let received = payloads(&database.topic("t"), 2).await;
    assert_eq!(received[..2], ["first", "good"]);
    walpost.stop().await;
}

#[tokio::test]
async fn a_message_that_the_broker_refuses_alone_is_stored_and_its_key_keeps_its_order() {
    // GIVEN a namespace that allows no long delays
    let mut database = Database::create("notallowed").await;
    database
        .own_namespace(&servers().pulsar_admin_url, &[])
        .await;
    let walpost = with_short_delays(&mut database, &[]).await;

    // WHEN a message is to be delayed for longer, and others of its key and of another come behind it
    insert_late(&database).await;
    database.wait_all_confirmed(DEADLINE).await;
    insert(&database, "t", "k", "behind").await;
    insert(&database, "t", "other", "goes on").await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN it is stored with the broker's reason, and only its key waits
    let topic = database.topic("t");
    assert_eq!(payloads(&topic, 2).await, ["before", "goes on"]);
    let query = "SELECT reason FROM walpost.straggler WHERE state = 'retrying'";
    let reason: String = database.rows(query, &[]).await[0].get(0);
    assert!(reason.contains("delivery delay"), "{reason}");

    // AND WHEN somebody takes the delay away, THEN both arrive in order
    let mend = "UPDATE walpost.straggler SET deliver_at_ms = NULL WHERE state = 'retrying'";
    database.sql(mend).await;
    wait_for_none(&database).await;
    let all = payloads(&topic, 4).await;
    assert_eq!(all, ["before", "goes on", "late", "behind"]);
    walpost.stop().await;
}

#[tokio::test]
async fn nothing_overtakes_a_straggler_in_its_lane_before_it_is_stored() {
    // GIVEN a broker that deduplicates, one lane, and a table that nobody can write
    let mut database = Database::create("overtake").await;
    database.deduplicate(servers()).await;
    let mut walpost = with_short_delays(&mut database, &[("WALPOST_LANES", "1")]).await;
    let mut locker = database.connect().await;
    let lock = lock_table(&mut locker).await;

    // WHEN a message is refused alone, one of another key comes behind it in the lane, and walpost is killed
    insert_late(&database).await;
    wait_for_blocked_insert(&database).await;
    insert(&database, "t", "other", "goes on").await;
    let all = database.current_wal_lsn().await.to_string();
    let now: String = database.rows("SELECT now()::text", &[]).await[0].get(0);
    eventually(DEADLINE, "walpost to say it has received both", async || {
        let query = "SELECT 1 FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
                     WHERE s.slot_name = $1 AND r.write_lsn >= $2::text::pg_lsn AND r.reply_time > $3::text::timestamptz + interval '1 s'";
        let rows = database.rows(query, &[&database.slot, &all, &now]).await;
        (!rows.is_empty()).then_some(())
    })
    .await;
    // THEN the later one is not published: with a higher id stored, the broker would take the first for a duplicate
    assert_eq!(payloads(&database.topic("t"), 0).await, ["before"]);
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    lock.rollback().await.expect("the lock goes");

    // AND the next walpost stores it
    let settings = [&QUICK[..], &[("WALPOST_LANES", "1")]].concat();
    let walpost = database.start(&settings).await;
    database.wait_all_confirmed(DEADLINE).await;
    let mend =
        "UPDATE walpost.straggler SET deliver_at_ms = NULL WHERE payload = 'late' RETURNING 1";
    assert_eq!(database.rows(mend, &[]).await.len(), 1, "it is lost");
    wait_for_none(&database).await;
    // (What was written behind a message that is refused alone may be stored, and comes again.)
    let mut all = payloads(&database.topic("t"), 3).await;
    all.sort();
    all.dedup();
    assert_eq!(all, ["before", "goes on", "late"]);
    walpost.stop().await;
}
