//! Guarantee: an event goes to the topic that the template or its own row names, whatever number of topics that makes.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use support::{Database, Received, consume, read_entries, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const TOPICS: usize = 20;
const ROWS_PER_TOPIC: usize = 100;

async fn read(topic: &str, expected: usize) -> Vec<Received> {
    consume(&servers().pulsar_url, topic, expected, DEADLINE).await
}

fn types(received: &[Received]) -> Vec<String> {
    let one = |message: &Received| message.property("aggregatetype").to_owned();
    received.iter().map(one).collect()
}

#[tokio::test]
async fn the_template_may_name_any_column_of_the_table() {
    // GIVEN a template with columns that are no part of an event otherwise
    let database = Database::create("template").await;
    database.init(&[], &[]).await;
    database
        .sql("ALTER TABLE walpost.outbox ADD COLUMN region text, ADD COLUMN shard smallint, ADD COLUMN fast bool")
        .await;
    let template = format!("{}.{{region}}-{{shard}}-{{fast}}", database.topic_prefix);
    let walpost = database.start(&[("WALPOST_TOPIC", &template)]).await;

    // WHEN rows have different values there
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, region, shard, fast) VALUES
             ('1', 'k', 't', '{}', 'eu', 7, true), ('2', 'k', 't', '{}', 'us', 7, true),
             ('3', 'k', 't', '{}', 'eu', -8, false), ('4', 'k', 't', '{}', 'eu', 7, true)",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each goes to its topic
    for (topic, expected) in [
        ("eu-7-t", &["1", "4"][..]),
        ("us-7-t", &["2"]),
        ("eu--8-f", &["3"]),
    ] {
        let received = read(&database.topic(topic), expected.len()).await;
        assert_eq!(types(&received), expected, "{topic}");
    }
}

#[tokio::test]
async fn a_rows_own_topic_comes_before_the_template() {
    // GIVEN a namespace beside the default one
    let database = Database::create("override").await;
    database.init(&[], &[]).await;
    let namespace = format!("/admin/v2/namespaces/public/{}", database.name);
    support::admin(&servers().pulsar_admin_url, "PUT", &namespace, "{}").await;
    let walpost = database.start(&[]).await;

    // WHEN rows name a topic in each of the forms that Pulsar knows, an empty override among them
    let short = format!("{}-short", database.name);
    let middle = format!("public/{}/middle", database.name);
    let full = format!("persistent://public/{}/full", database.name);
    for (id, topic) in [
        ("1", Some(&short)),
        ("2", Some(&middle)),
        ("3", Some(&full)),
        ("4", None),
    ] {
        database
            .rows(
                "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic)
                 VALUES ($1, 'k', 't', '{}', $2)",
                &[&id, &topic],
            )
            .await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN that is where they are
    let topics = [
        format!("persistent://public/default/{short}"),
        format!("persistent://{middle}"),
        full,
        database.topic("4"),
    ];
    for (topic, id) in topics.iter().zip(["1", "2", "3", "4"]) {
        assert_eq!(types(&read(topic, 1).await), [id], "{topic}");
    }
}

#[tokio::test]
async fn twenty_topics_at_once_each_get_their_own_rows_in_order() {
    // GIVEN a stream
    let database = Database::create("many").await;
    database.init(&["--payload", "text"], &[]).await;
    let walpost = database.start(&[("WALPOST_LANES", "4")]).await;

    // WHEN one transaction has rows for twenty topics that nobody has used yet, and so have those after it
    let insert = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
         SELECT 'topic' || n % {TOPICS}, 'key' || n % 7, 't', (n / {TOPICS})::text
         FROM generate_series($1::int, $2::int) n ORDER BY n"
    );
    let total = i32::try_from(TOPICS * ROWS_PER_TOPIC).expect("a small number");
    for (first, last) in [
        (0, total / 2),
        (total / 2 + 1, total / 2 + 3),
        (total / 2 + 4, total - 1),
    ] {
        database.rows(&insert, &[&first, &last]).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each topic has its rows, each once, in commit order per key
    let topics = (0..TOPICS).map(|topic| database.topic(&format!("topic{topic}")));
    let all = join_all(topics.map(|topic| async move { read(&topic, ROWS_PER_TOPIC).await })).await;
    for (topic, received) in all.iter().enumerate() {
        assert_eq!(received.len(), ROWS_PER_TOPIC, "topic{topic}");
        let mut last: HashMap<String, usize> = HashMap::new();
        for message in received {
            assert_eq!(message.property("aggregatetype"), format!("topic{topic}"));
            let number = String::from_utf8_lossy(&message.payload);
            let number: usize = number.parse().expect("the payload is a number");
            let key = message.key.clone().expect("a key");
            let before = last.insert(key, number);
            assert!(
                before.is_none_or(|before| before < number),
                "{before:?}, then {number}"
            );
        }
    }
}

#[tokio::test]
async fn a_lane_never_shares_a_batch_with_another() {
    // GIVEN four lanes and rows of many keys in one transaction
    let database = Database::create("lanes").await;
    database.init(&[], &[]).await;
    let walpost = database
        .start(&[("WALPOST_LANES", "4"), ("WALPOST_BATCH_MAX_MESSAGES", "50")])
        .await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'key' || n % 100, 't', '{}' FROM generate_series(1, 2000) n",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // WHEN the topic is read entry by entry
    let entries = read_entries(&servers().pulsar_addr, &database.topic("t"), DEADLINE).await;

    // THEN each key is in one lane only, a batch has the lane as its ordering key, and no batch is larger than allowed
    let mut lane_of: HashMap<String, Vec<u8>> = HashMap::new();
    let mut producers: HashMap<Vec<u8>, String> = HashMap::new();
    for entry in &entries {
        assert!(entry.messages.len() <= 50);
        let lane = entry.metadata.ordering_key.clone().expect("the lane");
        let producer = &entry.metadata.producer_name;
        assert_eq!(
            producers
                .entry(lane.clone())
                .or_insert_with(|| producer.clone()),
            producer
        );
        for message in &entry.messages {
            let key = message
                .metadata
                .partition_key
                .clone()
                .expect("the message's own key");
            assert_eq!(*lane_of.entry(key).or_insert_with(|| lane.clone()), lane);
        }
    }
    assert_eq!((lane_of.len(), producers.len()), (100, 4));
}
