//! The session that stores stragglers waits neither for an answer nor for a lock without an end; what then happens stores each of them once,
//! and lets nothing of its key pass. Meanwhile other topics go on.

use crate::support::eventually;
use crate::*;

const LOCK: i64 = 8;
const LATER: [(&str, &str); 2] = [("WALPOST_RETRY_INITIAL", "1h"), ("WALPOST_RETRY_MAX", "1h")];

/// A stream through a proxy, whose topic `t` was terminated.
async fn behind(database: &Database, proxy: &Proxy) -> (Walpost, String) {
    database.let_run().await;
    let through = database.url_through(&proxy.addr());
    let settings = [&QUICK[..], &[scan::MANY_ATTEMPTS]].concat();
    let run = database.walpost(&["run"], &settings);
    let mut walpost = run.env("WALPOST_POSTGRES_URL", through).spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    insert(database, "t", "k", "first").await;
    insert(database, "other", "k", "first").await;
    database.wait_all_confirmed(DEADLINE).await;
    let topic = database.topic("t");
    terminate(&topic).await;
    (walpost, topic)
}

/// Server processes that work for the session of stragglers.
async fn sessions(database: &Database) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walpost stragglers'";
    database.rows(sql, &[]).await[0].get(0)
}

/// How often a line with this text was printed.
fn times(walpost: &Walpost, text: &str) -> usize {
    walpost.output().matches(text).count()
}

/// Each event is stored once, and they arrive in order.
async fn assert_all_arrive(database: &Database, topic: &str) {
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(database, "retrying").await, 1);
    insert(database, "t", "k", "two").await;
    wait_for_count(database, "parked", 1).await;
    delete(topic).await;
    wait_for_none(database).await;
    assert_eq!(payloads(topic, 2).await, ["one", "two"]);
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_given_up_and_stores_nothing_twice() {
    // GIVEN a stream, and a server that commits what is to be stored, and whose answer is lost
    let database = prepared("unanswered").await;
    let proxy = Proxy::start(&servers().postgres_addr);
    let (mut walpost, topic) = behind(&database, &proxy).await;
    proxy.swallow_answer_to(Some("COMMIT"));

    // WHEN an event is to be stored
    insert(&database, "t", "k", "one").await;
    wait_for_count(&database, "retrying", 1).await;

    // THEN other topics go on
    insert(&database, "other", "k", "second").await;
    let other = database.topic("other");
    assert_eq!(payloads(&other, 2).await, ["first", "second"]);
    assert_eq!(times(&walpost, "stragglers wait"), 0);

    // AND the session is given up, and the event is in the table once
    let said = walpost.wait_for_line("stragglers wait", DEADLINE).await;
    assert!(said.contains("has not answered"), "{said}");
    proxy.swallow_answer_to(None);
    assert_all_arrive(&database, &topic).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_lock_on_the_table_is_waited_for_in_steps_that_leave_no_session_behind() {
    // GIVEN a stream, and a session that keeps everybody from the table
    let database = prepared("unanswered").await;
    let proxy = Proxy::start(&servers().postgres_addr);
    let (walpost, topic) = behind(&database, &proxy).await;
    let mut holder = database.connect().await;
    let lock = holder.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE walpost.straggler IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("a lock");

    // WHEN an event is to be stored: THEN other topics go on
    insert(&database, "t", "k", "one").await;
    insert(&database, "other", "k", "second").await;
    let other = database.topic("other");
    assert_eq!(payloads(&other, 2).await, ["first", "second"]);

    // AND the wait ends, again and again
    eventually(DEADLINE, "two waits to end", async || {
        (times(&walpost, "stragglers wait") >= 2).then_some(())
    })
    .await;
    let left = sessions(&database).await;
    assert!(left <= 1, "{left} sessions");

    // AND when the table is free, the event is stored, and no later one of its key passes it
    lock.rollback().await.expect("a session");
    assert_all_arrive(&database, &topic).await;
    walpost.stop().await;
}

#[tokio::test]
async fn what_an_unanswered_commit_stores_after_the_table_was_counted_holds_back_its_key() {
    // GIVEN a server whose COMMIT of stragglers takes as long as somebody holds a lock
    let mut database = Database::create("unanswered").await;
    database
        .own_namespace(&servers().pulsar_admin_url, &[])
        .await;
    let mut walpost = with_short_delays(&mut database, &LATER).await;
    database
        .sql(&format!(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN
                      WHILE EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype = ''advisory'' AND objid = {LOCK} AND granted
                                    AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()))
                      LOOP PERFORM pg_catalog.pg_sleep(0.05); END LOOP;
                      RETURN NULL;
                  END';
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON walpost.straggler DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()"
        ))
        .await;
    let holder = database.connect().await;
    let take = format!("SELECT pg_advisory_lock({LOCK})");
    holder.batch_execute(&take).await.expect("the lock");

    // WHEN its answer is given up, and the event is to be stored again before that COMMIT is over
    insert_late(&database).await;
    let said = walpost.wait_for_line("stragglers wait", DEADLINE).await;
    assert!(said.contains("has not answered"), "{said}");
    wait_for_blocked_insert(&database).await;
    let free = "SELECT pg_advisory_unlock_all()";
    holder.batch_execute(free).await.expect("it is free");
    database.wait_all_confirmed(DEADLINE).await;

    // THEN the next event of the key waits behind it
    insert(&database, "t", "k", "next").await;
    wait_for_count(&database, "parked", 1).await;
    assert_eq!(count(&database, "retrying").await, 1);
    walpost.stop().await;
}
