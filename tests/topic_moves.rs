//! Topics that move, fill up, end and begin on a real broker, under load: nothing is lost, a key's events stay in order, and
//! with deduplication (each test's namespace has it) nothing comes twice.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{
    Committed, Database, Load, Received, Walpost, admin, consume, eventually, insert_many, servers,
    try_admin,
};

const DEADLINE: Duration = Duration::from_secs(90);
/// How often a topic moves in one test.
const MOVES: usize = 8;

/// A database whose topics are in a namespace that deduplicates and has these policies besides.
async fn prepared(policies: &[(&str, &str, &str)]) -> Database {
    let mut database = Database::create("moves").await;
    let deduplication = ("deduplication", "true", "true");
    let policies = [&[deduplication], policies].concat();
    let url = &servers().pulsar_admin_url;
    database.own_namespace(url, &policies).await;
    Load::prepare(&database).await;
    database
}

/// Asks the shared broker's admin interface.
async fn ask(method: &str, path: &str, body: &str) -> String {
    admin(&servers().pulsar_admin_url, method, path, body).await
}

/// Admin path of the load's topic.
fn topic_path(database: &Database) -> String {
    format!(
        "/admin/v2/{}",
        Load::topic(database).replacen("://", "/", 1)
    )
}

/// Admin path of the namespace.
fn namespace_path(database: &Database) -> String {
    format!("/admin/v2/namespaces/public/{}", database.name)
}

/// Everything that is in the load's topic at this moment.
async fn read(database: &Database, expected: usize) -> Vec<Received> {
    let topic = Load::topic(database);
    consume(&servers().pulsar_url, &topic, expected, DEADLINE).await
}

/// Stops the connector when everything is confirmed, and judges the topic.
async fn judge(database: &Database, walpost: Walpost) {
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(database).await;
    committed.assert_exactly_once(&read(database, committed.len()).await);
}

/// Lets writers work while `move_it` is done again and again. Each move meets producers that are there: it waits until what
/// was committed before it has been received, for a topic without producers closes none.
async fn under_load(database: &Database, mut move_it: impl AsyncFnMut()) -> Walpost {
    let walpost = database.start(&[]).await;
    let load = Load::start(database, 4);
    for _ in 0..MOVES {
        load.more(100).await;
        database.wait_all_confirmed(DEADLINE).await;
        move_it().await;
    }
    load.more(100).await;
    load.stop();
    let said = walpost.output();
    let closed = said.matches("the broker closed a producer").count();
    assert!(closed >= MOVES, "closed {closed} times only:\n{said}");
    walpost
}

#[tokio::test]
async fn a_topic_that_is_unloaded_again_and_again_under_load_loses_and_repeats_nothing() {
    let database = prepared(&[]).await;
    let unload = format!("{}/unload", topic_path(&database));

    let walpost = under_load(&database, async || {
        ask("PUT", &unload, "").await;
    })
    .await;

    judge(&database, walpost).await;
}

#[tokio::test]
async fn a_namespace_that_is_unloaded_again_and_again_under_load_loses_and_repeats_nothing() {
    let database = prepared(&[]).await;
    let unload = format!("{}/unload", namespace_path(&database));

    let walpost = under_load(&database, async || {
        ask("PUT", &unload, "").await;
    })
    .await;

    judge(&database, walpost).await;
}

#[tokio::test]
async fn a_bundle_that_is_split_again_and_again_under_load_loses_and_repeats_nothing() {
    let database = prepared(&[]).await;
    let topic = Load::topic(&database).replacen("://", "/", 1);
    let bundle = format!("/lookup/v2/topic/{topic}/bundle");
    let namespace = namespace_path(&database);

    // The bundle that has the topic, which is another one each time. The broker refuses while the last one is still being
    // unloaded.
    let url = &servers().pulsar_admin_url;
    let walpost = under_load(&database, async || {
        eventually(DEADLINE, "the broker to split", async || {
            let bundle = try_admin(url, "GET", &bundle, "").await.ok()?;
            let split = format!("{namespace}/{}/split?unload=true", bundle.trim());
            try_admin(url, "PUT", &split, "").await.ok()
        })
        .await;
    })
    .await;

    judge(&database, walpost).await;
}

/// A subscription that nobody reads fills its backlog quota; the broker turns producers away until it is emptied.
async fn backlog_quota(policy: &str) {
    // GIVEN a topic with a small quota and a subscription
    let database = prepared(&[]).await;
    let mut walpost = database.start(&[]).await;
    insert_many(&database.client, "key", 10).await;
    database.wait_all_confirmed(DEADLINE).await;
    let subscription = format!("{}/subscription/idle", topic_path(&database));
    ask("PUT", &subscription, "").await;
    let quota = format!("{}/backlogQuota", namespace_path(&database));
    let limit = json!({"limitSize": 20_000, "limitTime": -1, "policy": policy});
    ask("POST", &quota, &limit.to_string()).await;

    // WHEN the backlog grows over the quota and the broker has noticed (it looks once a second)
    let load = Load::start(&database, 4);
    let blocked = walpost.wait_for_line("cannot publish yet", DEADLINE).await;
    assert!(blocked.to_lowercase().contains("quota"), "{blocked}");
    load.more(100).await;
    load.stop();
    let before = database.current_wal_lsn().await;
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    assert!(confirmed < Some(before), "the quota blocked nothing");

    // THEN everything arrives when the quota is gone and the backlog too
    ask("DELETE", &quota, "").await;
    ask("POST", &format!("{subscription}/skip_all"), "").await;
    judge(&database, walpost).await;
}

#[tokio::test]
async fn a_backlog_quota_that_holds_producers_back_is_waited_for() {
    backlog_quota("producer_request_hold").await;
}

#[tokio::test]
async fn a_backlog_quota_that_refuses_producers_is_waited_for() {
    backlog_quota("producer_exception").await;
}

#[tokio::test]
async fn events_wait_for_a_topic_that_is_made_later_where_topics_are_not_made_on_first_use() {
    // GIVEN a namespace in which somebody has to make the topics, and one that is made
    let off = r#"{"allowAutoTopicCreation":false}"#;
    let database = prepared(&[("autoTopicCreation", off, "false")]).await;
    let other = database.topic("other");
    let other_path = format!("/admin/v2/{}", other.replacen("://", "/", 1));
    ask("PUT", &other_path, "").await;

    // WHEN events for both come
    let mut walpost = database.start(&[]).await;
    insert_many(&database.client, "key", 100).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('other', 'key', 'made', '1')",
        )
        .await;
    let waits = walpost.wait_for_line("cannot publish", DEADLINE).await;
    let topic = Load::topic(&database);
    assert!(waits.contains(&topic), "{waits}");

    // THEN the topic that is there gets its own
    let received = consume(&servers().pulsar_url, &other, 1, DEADLINE).await;
    assert_eq!(received.len(), 1);
    let before = database.current_wal_lsn().await;
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    assert!(confirmed < Some(before), "confirmed without a topic");

    // AND the other one too, once it is made
    ask("PUT", &topic_path(&database), "").await;
    insert_many(&database.client, "key", 100).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    database
        .sql("DELETE FROM walpost.outbox WHERE aggregatetype = 'other'")
        .await;
    let committed = Committed::read(&database).await;
    assert_eq!(committed.len(), 200);
    committed.assert_exactly_once(&read(&database, 200).await);
}

#[tokio::test]
async fn events_wait_while_their_topic_is_terminated_and_arrive_in_the_one_that_is_made_anew() {
    // GIVEN a topic that is terminated after a hundred events
    let database = prepared(&[]).await;
    let mut walpost = database.start(&[]).await;
    insert_many(&database.client, "key", 100).await;
    database.wait_all_confirmed(DEADLINE).await;
    let path = topic_path(&database);
    let last: Value = serde_json::from_str(&ask("POST", &format!("{path}/terminate"), "").await)
        .expect("the last message's id");
    assert!(last["entryId"].as_i64() >= Some(0), "{last}");

    // WHEN more come, they wait, and somebody is told what to do
    insert_many(&database.client, "key", 100).await;
    let told = "cannot publish until this is mended";
    let told = walpost.wait_for_line(told, DEADLINE).await;
    assert!(told.contains(&Load::topic(&database)), "{told}");
    assert!(told.contains("re-create"), "{told}");
    let mut received = read(&database, 100).await;
    assert_eq!(received.len(), 100);

    // THEN they arrive when it is deleted (and made anew by the next attempt)
    ask("DELETE", &format!("{path}?force=true"), "").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    received.extend(read(&database, 100).await);
    let committed = Committed::read(&database).await;
    committed.assert_exactly_once(&received);
}
