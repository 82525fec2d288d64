//! Guarantee: an event goes to the partition for which Pulsar's own clients would choose it, also while partitions are added;
//! topics come and go by the hundred without loss or repetition.
//!
//! The judge of partitions is the Java client, the reference: the C++ client hashes a key's bytes and not its UTF-16 units,
//! and its Python binding cannot choose the hash at all.

mod support;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use serde_json::{Value, json};
use support::{
    Committed, Database, Judged, Load, Python, Received, Walpost, admin, consume, eventually,
    java_partitions, servers,
};

const DEADLINE: Duration = Duration::from_secs(90);

/// Path of a topic in the admin interface.
fn admin_path(topic: &str) -> String {
    format!("/admin/v2/{}", topic.replacen("://", "/", 1))
}

/// Makes a partitioned topic, or gives one more partitions with `POST`.
async fn partition(method: &str, topic: &str, partitions: u32) {
    let path = format!("{}/partitions", admin_path(topic));
    let url = &servers().pulsar_admin_url;
    admin(url, method, &path, &partitions.to_string()).await;
}

async fn stats(topic: &str) -> Value {
    let path = format!("{}/stats", admin_path(topic));
    let said = admin(&servers().pulsar_admin_url, "GET", &path, "").await;
    serde_json::from_str(&said).expect("the broker answers in JSON")
}

/// The number after `-partition-`; `None` for a topic without partitions.
fn partition_of(topic: &str) -> Option<u32> {
    let (_, number) = topic.rsplit_once("-partition-")?;
    Some(number.parse().expect("a number"))
}

/// Reads topics with the C++ client: exactly `expected` messages, or more if more have come by then.
async fn judge(topics: &[String], expected: usize) -> Vec<Judged> {
    let order = json!({"topic": topics, "type": "Exclusive"});
    let mut consumer = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumer.next(DEADLINE).await, json!({"ready": true}));
    Judged::take(consumer, expected, DEADLINE).await
}

/// Keys that hashes could treat differently.
fn keys() -> Vec<String> {
    let special = [
        "",
        " ",
        "\u{0}x",
        "ä",
        "öüß",
        "grüße-42",
        "e\u{301}",
        "漢字",
        "😀",
        "a😀b",
        "\u{ffff}",
        "\u{10ffff}",
        // hashCode is the smallest int; absolute value and mask differ.
        "polygenelubricants",
        "Aa",
        "BB",
    ];
    let numbered = (0..100).map(|n| format!("order-{n}"));
    // Every remainder of the 4 bytes that Murmur takes at a time, and every size of a length.
    let lengths = (1..=9).chain([127, 128, 129, 5000]);
    let repeated = lengths.flat_map(|length| ["k".repeat(length), "ü".repeat(length)]);
    let all: BTreeSet<String> = special
        .into_iter()
        .map(str::to_owned)
        .chain(numbered)
        .chain(repeated)
        // Postgres' text has every character but NUL.
        .filter(|key| !key.contains('\u{0}'))
        .collect();
    all.into_iter().collect()
}

/// Both publish the same keys to topics with as many partitions, and choose the same ones.
async fn same_partitions(settings: &[(&str, &str)], scheme: &str) {
    const PARTITIONS: u32 = 7;
    let database = Database::create("hash").await;
    let keys = keys();
    for topic in ["java", "walpost"] {
        partition("PUT", &database.topic(topic), PARTITIONS).await;
    }
    let java = java_partitions(servers(), &database.topic("java"), scheme, &keys).await;

    database.init(&[], &[]).await;
    let walpost = database.start(settings).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 'walpost', key, 't', '{}' FROM unnest($1::text[]) key";
    database.rows(insert, &[&keys]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    let seen = judge(&[database.topic("walpost")], keys.len()).await;
    assert_eq!(seen.len(), keys.len());
    let chosen: HashMap<&str, Option<u32>> = seen
        .iter()
        .map(|message| (&*message.key, partition_of(&message.topic)))
        .collect();
    for (key, partition) in keys.iter().zip(&java) {
        assert_eq!(chosen[&**key], Some(*partition), "{scheme}: {key:?}");
    }
    let used: BTreeSet<_> = java.iter().collect();
    assert_eq!(used.len(), PARTITIONS as usize, "the keys tell nothing");
}

#[tokio::test]
async fn a_key_is_in_the_partition_that_the_java_client_chooses_by_default() {
    same_partitions(&[], "JavaStringHash").await;
}

#[tokio::test]
async fn a_key_is_in_the_partition_that_the_java_client_chooses_with_murmur() {
    let settings = [("WALPOST_HASHING_SCHEME", "murmur3_32_hash")];
    same_partitions(&settings, "Murmur3_32Hash").await;
}

#[tokio::test]
async fn topics_with_and_without_partitions_are_served_side_by_side() {
    // GIVEN topics with no, one and four partitions
    const EVENTS: usize = 3000;
    let database = Database::create("mixed").await;
    partition("PUT", &database.topic("one"), 1).await;
    partition("PUT", &database.topic("four"), 4).await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN transactions have events for all of them
    for part in 0..3_i64 {
        let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                      SELECT (ARRAY['none', 'one', 'four'])[1 + n % 3], 'key-' || n % 40, 't', to_json(n)
                      FROM generate_series($1::int8, $1::int8 + 999) n";
        database.rows(insert, &[&(part * 1000)]).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each has its own once, a key in one partition and in order
    let topics = ["none", "one", "four"].map(|topic| database.topic(topic));
    let seen = judge(&topics, EVENTS).await;
    assert_eq!(seen.len(), EVENTS);
    let mut used: BTreeSet<&str> = BTreeSet::new();
    let mut keys: HashMap<(usize, &str), (&str, i64)> = HashMap::new();
    for message in &seen {
        let number: i64 = String::from_utf8_lossy(&message.payload)
            .parse()
            .expect("a number");
        let kind = usize::try_from(number % 3).expect("0, 1 or 2");
        let partitioned = message
            .topic
            .starts_with(&format!("{}-partition-", topics[kind]));
        assert!(
            partitioned == (kind > 0),
            "{number} is in {}",
            message.topic
        );
        assert!(
            partitioned || message.topic == topics[kind],
            "{number} is in {}",
            message.topic
        );
        used.insert(&message.topic);
        let (topic, last) = keys
            .entry((kind, &message.key))
            .or_insert((&message.topic, -1));
        assert_eq!(
            *topic, message.topic,
            "{} is in two partitions",
            message.key
        );
        assert!(number > *last, "{number} after {last}");
        *last = number;
    }
    assert_eq!(used.len(), 6, "{used:?}");
}

/// Messages such that each key's come in the order of its partitions' first ones: what a reader of one partition after the
/// other sees of a key that has moved, and never back.
fn by_key_and_partition(received: Vec<Received>) -> Vec<Received> {
    let number = |message: &Received| -> i64 {
        let text = String::from_utf8_lossy(&message.payload);
        text.parse().expect("a number")
    };
    let place = |message: &Received| (message.key.clone(), message.partition);
    let mut first: HashMap<_, i64> = HashMap::new();
    for message in &received {
        first.entry(place(message)).or_insert(number(message));
    }
    let mut sorted = received;
    // Stable: within one partition it stays as it came.
    sorted.sort_by_key(|message| (message.key.clone(), first[&place(message)]));
    sorted
}

#[tokio::test]
async fn partitions_added_while_running_are_used_and_nothing_is_lost_or_reordered() {
    // GIVEN a topic with two partitions under load
    let database = Database::create("growth").await;
    let topic = Load::topic(&database);
    partition("PUT", &topic, 2).await;
    Load::prepare(&database).await;
    let walpost = database.start(&[("WALPOST_PARTITION_REFRESH", "1s")]).await;
    let load = Load::start(&database, 4);
    load.more(200).await;

    // WHEN it gets three more
    partition("POST", &topic, 5).await;

    // THEN they are used without a restart
    for number in 2..5 {
        let new = format!("{topic}-partition-{number}");
        let what = format!("messages in the new partition {number}");
        eventually(Duration::from_secs(20), &what, async || {
            (stats(&new).await["msgInCounter"].as_u64()? > 0).then_some(())
        })
        .await;
    }
    load.more(200).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // AND everything is there once, each key's events in order, those in its old partition before those in its new one
    let committed = Committed::read(&database).await;
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    let moved: BTreeSet<_> = received
        .iter()
        .map(|message| (message.key.clone(), message.partition))
        .collect();
    assert!(moved.len() > 20, "no key has moved: {}", moved.len());
    committed.assert_exactly_once(&by_key_and_partition(received));
}

#[tokio::test]
async fn a_namespace_that_allows_more_producers_again_gets_them_and_nothing_is_lost_or_reordered() {
    // GIVEN a namespace that allows three producers on a topic, under load
    const LIMIT: usize = 3;
    let mut database = Database::create("few").await;
    let url = &servers().pulsar_admin_url;
    let limit = LIMIT.to_string();
    let policies = [("maxProducersPerTopic", &*limit, &*limit)];
    database.own_namespace(url, &policies).await;
    let topic = Load::topic(&database);
    Load::prepare(&database).await;
    let walpost = database.start(&[("WALPOST_PARTITION_REFRESH", "1s")]).await;
    let load = Load::start(&database, 4);
    load.more(200).await;
    let producers = async || {
        let stats = stats(&topic).await;
        stats["publishers"].as_array().map_or(0, Vec::len)
    };
    eventually(DEADLINE, "as many producers as there may be", async || {
        (producers().await == LIMIT).then_some(())
    })
    .await;
    load.more(200).await;

    // WHEN it allows more
    let path = format!("/admin/v2/namespaces/public/{}", database.name);
    let path = format!("{path}/maxProducersPerTopic");
    admin(url, "POST", &path, "100").await;

    // THEN they are used without a restart
    eventually(DEADLINE, "more producers", async || {
        (producers().await > 2 * LIMIT).then_some(())
    })
    .await;
    load.more(200).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // AND everything is there once, each key's events in order
    let committed = Committed::read(&database).await;
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

/// The connector is killed while it streams, each time after some more work, and started again.
async fn kill(database: &Database, load: &Load, walpost: &mut Walpost, settings: &[(&str, &str)]) {
    load.more(60).await;
    walpost.sigkill();
    assert_eq!(
        walpost.wait_exit(DEADLINE).await,
        128 + 9,
        "it ended before"
    );
    load.more(20).await;
    *walpost = database.start(settings).await;
}

#[tokio::test]
async fn a_partitioned_topic_has_everything_exactly_once_when_the_connector_is_killed() {
    // GIVEN a topic with three partitions in a namespace that deduplicates, under load
    let mut database = Database::create("killed").await;
    database.deduplicate(servers()).await;
    let topic = Load::topic(&database);
    partition("PUT", &topic, 3).await;
    Load::prepare(&database).await;
    let mut walpost = database.start(&[]).await;
    let load = Load::start(&database, 4);

    // WHEN the connector is killed four times
    for _ in 0..4 {
        kill(&database, &load, &mut walpost, &[]).await;
    }
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN every event is there once, in order, in all partitions
    let committed = Committed::read(&database).await;
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    let used: BTreeSet<_> = received.iter().map(|message| message.partition).collect();
    assert_eq!(used, BTreeSet::from([0, 1, 2]));
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn a_connector_killed_while_partitions_are_added_loses_and_reorders_nothing() {
    // GIVEN a topic with two partitions under load
    let database = Database::create("grown").await;
    let topic = Load::topic(&database);
    partition("PUT", &topic, 2).await;
    Load::prepare(&database).await;
    let settings = [("WALPOST_PARTITION_REFRESH", "100ms")];
    let mut walpost = database.start(&settings).await;
    let load = Load::start(&database, 4);

    // WHEN partitions are added and the connector is killed, time and again
    // Doubled, so that no key comes back to a partition that it has had.
    for partitions in [4, 8, 16] {
        kill(&database, &load, &mut walpost, &settings).await;
        partition("POST", &topic, partitions).await;
    }
    kill(&database, &load, &mut walpost, &settings).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN everything is there, and what a key has in each partition goes on where that in its former one ended, or repeats it
    let committed = Committed::read(&database).await;
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_at_least_once(&by_key_and_partition(received));
}

#[tokio::test]
async fn hundreds_of_topics_whose_idle_producers_are_closed_lose_and_repeat_nothing() {
    const TOPICS: i64 = 300;
    const WAVES: i64 = 3;
    const KEYS: i64 = 6;
    // GIVEN a namespace that deduplicates, and producers that are closed after a second
    let mut database = Database::create("many").await;
    database.deduplicate(servers()).await;
    database.init(&[], &[]).await;
    let settings = [("WALPOST_PRODUCER_IDLE", "1s"), ("WALPOST_LANES", "4")];
    let walpost = database.start(&settings).await;

    // WHEN events of 300 topics come in waves, with quiet between them, while one topic is always busy
    let busy = database.topic("busy");
    let keep_busy = async || {
        let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('busy', 'k', 't', '0')";
        database.sql(insert).await;
    };
    for wave in 0..WAVES {
        let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                      SELECT 'topic-' || t, 'key-' || k, 't', to_json($1::int8 * 2 + n)
                      FROM generate_series(0, 1) n, generate_series(1, $2::int8) k, generate_series(1, $3::int8) t
                      ORDER BY n, k, t";
        database.rows(insert, &[&wave, &KEYS, &TOPICS]).await;
        database.wait_all_confirmed(DEADLINE).await;
        for number in 1..=TOPICS {
            let topic = database.topic(&format!("topic-{number}"));
            eventually(
                DEADLINE,
                "an idle topic's producers to be closed",
                async || {
                    keep_busy().await;
                    let open = stats(&topic).await["publishers"].as_array()?.len();
                    (open == 0).then_some(())
                },
            )
            .await;
        }
        // A topic that is not idle keeps its producer, so the statistics do tell.
        eventually(DEADLINE, "the busy topic to have a producer", async || {
            keep_busy().await;
            database.wait_all_confirmed(DEADLINE).await;
            let open = stats(&busy).await["publishers"].as_array()?.len();
            (open > 0).then_some(())
        })
        .await;
    }
    walpost.stop().await;

    // THEN each topic has each key's events once, in order
    let topics: Vec<_> = (1..=TOPICS)
        .map(|number| database.topic(&format!("topic-{number}")))
        .collect();
    let expected = usize::try_from(TOPICS * KEYS * WAVES * 2).expect("a small number");
    let seen = judge(&topics, expected).await;
    assert_eq!(seen.len(), expected);
    let mut next: HashMap<(&str, &str), i64> = HashMap::new();
    for message in &seen {
        let next = next.entry((&message.topic, &message.key)).or_default();
        let at = (&message.topic, &message.key);
        assert_eq!(message.payload, next.to_string().as_bytes(), "{at:?}");
        *next += 1;
    }
    assert_eq!(next.len(), usize::try_from(TOPICS * KEYS).expect("small"));
}
