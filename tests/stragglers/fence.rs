//! Only the process that has the slot stores and retries stragglers, so that no event of a key comes again behind later ones.

use crate::scan::{MANY_ATTEMPTS, POLL, make_terminated};
use crate::support::eventually;
use crate::*;

const INTERVAL: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "1h");
const LOCK: i64 = 7;

/// A poller that looks once, and then rests for an hour.
fn poller(database: &Database) -> Walpost {
    let settings = [&QUICK[..], &[POLL, INTERVAL, MANY_ATTEMPTS]].concat();
    database.walpost(&["run"], &settings).spawn()
}

/// A database in which a poller has stored two events of a key, and its topic.
async fn polled() -> (Database, Walpost, String) {
    let database = Database::create("fence").await;
    database.init(&["--payload", "text"], &[POLL]).await;
    let topic = database.topic("t");
    make_terminated(&topic).await;
    insert(&database, "t", "k", "one").await;
    insert(&database, "t", "k", "two").await;
    let mut walpost = poller(&database);
    walpost.wait_for_line("polling", DEADLINE).await;
    wait_for_count(&database, "retrying", 1).await;
    wait_for_count(&database, "parked", 1).await;
    // The look is over when it is noted: until then a claim that is gone is noticed by that.
    eventually(DEADLINE, "the look to be noted", async || {
        let sql = "SELECT FROM walpost.progress WHERE delivered IS NOT NULL
                   AND NOT EXISTS (SELECT FROM walpost.outbox WHERE NOT pg_visible_in_snapshot(txid::text::xid8, delivered))";
        (database.rows(sql, &[]).await.len() == 1).then_some(())
    })
    .await;
    (database, walpost, topic)
}

async fn take_claim(database: &Database) {
    let sql = "UPDATE walpost.progress SET session = 'another' RETURNING 1";
    assert_eq!(database.rows(sql, &[]).await.len(), 1);
}

#[tokio::test]
async fn a_poller_that_has_lost_its_lock_while_it_rests_retries_nothing_any_more() {
    // GIVEN a poller that rests and retries, and one that waits
    let (database, mut first, topic) = polled().await;
    let mut second = poller(&database);
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;

    // WHEN the session that holds the lock ends, and the other one takes it
    let end = "SELECT pg_terminate_backend(pid) FROM pg_locks
               WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(database.rows(end, &[]).await.len(), 1);
    second.wait_for_line("polling", DEADLINE).await;

    // THEN the first one waits
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;

    // AND what is stored arrives once the topic is well, in order
    delete(&topic).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 2).await, ["one", "two"]);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn a_poller_whose_claim_is_gone_retries_only_when_it_has_claimed_again() {
    // GIVEN a poller that rests and retries
    let (database, mut walpost, topic) = polled().await;

    // WHEN another process has claimed the slot's row: THEN it retries nothing
    take_claim(&database).await;
    walpost
        .wait_for_line("no straggler is stored or retried", DEADLINE)
        .await;

    // AND it goes on with a claim of its own
    delete(&topic).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 2).await, ["one", "two"]);
    let refusals = walpost
        .output()
        .matches("no straggler is stored or retried")
        .count();
    assert_eq!(refusals, 1);
    walpost.stop().await;
}

/// A stream that is about to store an event of a terminated topic, and waits for the session that is returned to be free.
async fn about_to_store(database: &Database) -> (Walpost, String, Client) {
    database
        .sql(&format!(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN PERFORM pg_catalog.pg_advisory_xact_lock({LOCK}); RETURN NEW; END';
             CREATE TRIGGER slow BEFORE INSERT ON walpost.straggler FOR EACH ROW EXECUTE FUNCTION slow()"
        ))
        .await;
    let (walpost, topic) = with_terminated(database, &[MANY_ATTEMPTS]).await;
    let holder = database.connect().await;
    let lock = format!("SELECT pg_advisory_lock({LOCK})");
    holder.batch_execute(&lock).await.expect("the lock");
    insert(database, "t", "k", "one").await;
    wait_for_blocked_insert(database).await;
    (walpost, topic, holder)
}

async fn let_go(holder: &Client) {
    let sql = "SELECT pg_advisory_unlock_all()";
    holder.batch_execute(sql).await.expect("it is free");
}

#[tokio::test]
async fn a_stream_whose_claim_is_gone_stores_nothing_and_loses_nothing() {
    for is_waiting in [false, true] {
        // GIVEN a stream, and another process that has claimed the slot's row: before an event cannot be published, or while it is being stored
        let database = prepared("fence").await;
        let (mut walpost, topic) = if is_waiting {
            let (walpost, topic, holder) = about_to_store(&database).await;
            take_claim(&database).await;
            let_go(&holder).await;
            (walpost, topic)
        } else {
            let (walpost, topic) = with_terminated(&database, &[INTERVAL, MANY_ATTEMPTS]).await;
            take_claim(&database).await;
            insert(&database, "t", "k", "one").await;
            (walpost, topic)
        };

        // THEN it is not stored
        let said = walpost.wait_for_line("waiting=1", DEADLINE).await;
        assert!(said.contains("no straggler is stored or retried"), "{said}");

        // AND it comes again from the log, is stored, and arrives
        wait_for_count(&database, "retrying", 1).await;
        insert(&database, "t", "k", "two").await;
        wait_for_count(&database, "parked", 1).await;
        delete(&topic).await;
        wait_for_none(&database).await;
        assert_eq!(payloads(&topic, 2).await, ["one", "two"]);
        database.wait_all_confirmed(DEADLINE).await;
        walpost.stop().await;
    }
}

#[tokio::test]
async fn what_a_killed_process_was_about_to_store_is_not_stored_behind_its_successor() {
    // GIVEN an event that is about to be stored, and its process killed
    let database = prepared("fence").await;
    let (mut first, topic, holder) = about_to_store(&database).await;
    first.sigkill();
    first.wait_exit(DEADLINE).await;
    delete(&topic).await;
    insert(&database, "t", "k", "two").await;

    // WHEN another one has published both, and the server's process goes on
    let second = database.walpost(&["run"], &QUICK).spawn();
    assert_eq!(payloads(&topic, 2).await, ["one", "two"]);
    let_go(&holder).await;
    eventually(DEADLINE, "that process to end", async || {
        let query = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE '%insert into walpost.straggler%' AND state <> 'idle'
                     AND pid <> pg_backend_pid()";
        database.rows(query, &[]).await.is_empty().then_some(())
    })
    .await;

    // THEN every event comes once, in order
    insert(&database, "t", "k", "three").await;
    database.wait_all_confirmed(DEADLINE).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 3).await, ["one", "two", "three"]);
    second.stop().await;
}

#[tokio::test]
async fn what_is_being_stored_while_the_stream_is_opened_again_is_stored_under_the_new_claim() {
    // GIVEN an event that is about to be stored
    let database = prepared("fence").await;
    let (mut walpost, topic, holder) = about_to_store(&database).await;

    // WHEN the stream is lost and opened again meanwhile
    let before = database.walsender_pid(&database.slot).await;
    database.terminate_walsender().await;
    eventually(DEADLINE, "the next walsender", async || {
        let now = database.walsender_pid(&database.slot).await;
        (now.is_some() && now != before).then_some(())
    })
    .await;
    let_go(&holder).await;

    // THEN it is stored, once, and arrives
    wait_for_count(&database, "retrying", 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    delete(&topic).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 1).await, ["one"]);
    walpost.wait_for_line("streaming", DEADLINE).await;
    walpost.stop().await;
}
