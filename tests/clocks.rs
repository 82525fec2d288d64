//! Guarantee: a clock that is set back, or a time of day that somebody wrote, delays what is said in `scanner` and loses nothing.

mod support;

use std::time::Duration;

use support::{Database, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");

async fn prepared(settings: &[(&str, &str)]) -> Database {
    let database = Database::create("clocks").await;
    database.init(&["--payload", "text"], settings).await;
    database
}

async fn insert(database: &Database, payload: &str, created_at: &str) {
    database
        .sql(&format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             VALUES ('t', 'k', 'e', {payload}, clock_timestamp() + interval '{created_at}')"
        ))
        .await;
}

async fn payloads(database: &Database, expected: usize) -> Vec<String> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
    let text = |payload: &[u8]| String::from_utf8_lossy(payload).into_owned();
    received
        .iter()
        .map(|message| text(&message.payload))
        .collect()
}

async fn count(database: &Database, what: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM {what}");
    database.rows(&sql, &[]).await[0].get(0)
}

async fn wait_count(database: &Database, what: &str, expected: i64) {
    eventually(DEADLINE, &format!("{expected} {what}"), async || {
        (count(database, what).await == expected).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_straggler_that_is_due_in_a_year_keeps_its_key_in_order_until_an_operator_makes_it_due() {
    // GIVEN a straggler with one behind it, and a server's clock that was set back since
    let database = prepared(&[]).await;
    let settings = [
        ("WALPOST_RETRY_MAX", "1s"),
        ("WALPOST_RETRY_INITIAL", "50ms"),
        ("WALPOST_RETRY_MAX_ATTEMPTS", "1000"),
    ];
    let walpost = database.start(&settings).await;
    insert(&database, "repeat('x', 5 * 1024 * 1024)", "0s").await;
    database.wait_all_confirmed(DEADLINE).await;
    insert(&database, "'behind'", "0s").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    database
        .sql("UPDATE walpost.straggler SET payload = 'smaller', next_attempt_at = now() + interval '1 year' WHERE state = 'retrying'")
        .await;

    // THEN others go on and its own key waits
    let walpost = database.start(&settings).await;
    insert(&database, "'behind too'", "0s").await;
    database.sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'other', 'e', 'other')").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(payloads(&database, 1).await, ["other"]);
    assert_eq!(
        count(&database, "walpost.straggler WHERE state = 'parked'").await,
        2
    );

    // WHEN it is made due: THEN all come, in order
    let retry = ["stragglers", "retry", "--state", "retrying"];
    let (code, said) = database.walpost(&retry, &settings).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    wait_count(&database, "walpost.straggler", 0).await;
    assert_eq!(
        payloads(&database, 4).await,
        ["other", "smaller", "behind", "behind too"]
    );
    walpost.stop().await;
}

#[tokio::test]
async fn a_row_that_is_dated_in_the_future_arrives_is_marked_and_stays_and_its_lost_message_is_found_when_its_time_comes()
 {
    // GIVEN the mode mark, a short retention, and a row of next year (and no comparison, which would find lost rows at once)
    let settings = [
        ("WALPOST_RECONCILE", "off"),
        OFTEN,
        ("WALPOST_AFTER_PUBLISH", "mark"),
        ("WALPOST_STRAGGLER_AGE", "500ms"),
        ("WALPOST_RETENTION", "2s"),
    ];
    let database = prepared(&settings).await;
    let walpost = database.start(&settings).await;
    insert(&database, "'next year'", "1 year").await;
    wait_count(&database, "walpost.outbox WHERE sent_at IS NOT NULL", 1).await;

    // AND two whose messages a broken publication never sent, one of them of next year
    database
        .sql("BEGIN; ALTER PUBLICATION walpost DROP TABLE walpost.outbox")
        .await;
    insert(&database, "'lost'", "0s").await;
    insert(&database, "'lost next year'", "1 year").await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE walpost.outbox; COMMIT")
        .await;

    // THEN the one of today is found, and goes by its retention once another event has moved what is known as delivered
    wait_count(
        &database,
        "walpost.outbox WHERE payload = 'lost' AND sent_at IS NOT NULL",
        1,
    )
    .await;
    insert(&database, "'more'", "1 year").await;
    wait_count(&database, "walpost.outbox WHERE payload = 'lost'", 0).await;
    assert_eq!(payloads(&database, 3).await, ["next year", "lost", "more"]);

    // AND those of next year stay, the one that was not sent among them
    wait_count(
        &database,
        "walpost.outbox WHERE payload IN ('next year', 'more') AND sent_at IS NOT NULL",
        2,
    )
    .await;
    let unsent = "walpost.outbox WHERE payload = 'lost next year' AND sent_at IS NULL";
    assert_eq!(count(&database, unsent).await, 1);

    // WHEN its time has come: THEN it is found as well
    database.sql("UPDATE walpost.outbox SET created_at = clock_timestamp() WHERE payload = 'lost next year'").await;
    wait_count(
        &database,
        "walpost.outbox WHERE payload = 'lost next year' AND sent_at IS NOT NULL",
        1,
    )
    .await;
    let all = ["next year", "lost", "more", "lost next year"];
    assert_eq!(payloads(&database, 4).await, all);
    walpost.stop().await;
}
