//! The same guarantees on a broker of the 3.x line, for those who have not upgraded.
//!
//! One broker for all of it: it takes longer to start than to test.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use support::{
    Committed, Database, Load, OwnServers, Servers, Walpost, admin, consume, java_partitions,
};

/// The newest 3.x whose distribution was to be had through Maven when this was written (the 3.0 line was not).
const VERSION: &str = "3.3.6";
const DEADLINE: Duration = Duration::from_secs(60);
const KILLS: u64 = 3;

async fn start(database: &Database, broker: &OwnServers) -> Walpost {
    database
        .start(&[("WALPOST_PULSAR_URL", &broker.pulsar_url)])
        .await
}

/// The connector is killed under load, several times; with deduplication everything arrives exactly once, in order. With
/// `partitions` 0 in a topic without.
async fn exactly_once_through_kills(broker: &OwnServers, partitions: i32) {
    // GIVEN a namespace that deduplicates, and writers at work
    let mut database = Database::create("three").await;
    database.deduplicate(broker).await;
    let topic = Load::topic(&database);
    if partitions > 0 {
        partition(broker, &topic, partitions).await;
    }
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);

    // WHEN the connector is killed while it streams, each time after some more work
    for kill in 0..KILLS {
        let mut walpost = start(&database, broker).await;
        load.more(50 + 37 * kill).await;
        walpost.sigkill();
        assert_eq!(walpost.wait_exit(DEADLINE).await, 128 + 9);
        load.more(20).await;
    }
    let walpost = start(&database, broker).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN the topic has every event once, each key's in order
    let committed = Committed::read(&database).await;
    let received = consume(&broker.pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
    let used: BTreeSet<_> = received.iter().map(|message| message.partition).collect();
    let expected = if partitions == 0 {
        -1..0
    } else {
        0..partitions
    };
    assert_eq!(used, expected.collect());
    println!("{} events through {KILLS} kills", committed.len());
}

async fn partition(broker: &OwnServers, topic: &str, partitions: i32) {
    let path = format!("/admin/v2/{}/partitions", topic.replacen("://", "/", 1));
    admin(
        &broker.pulsar_admin_url,
        "PUT",
        &path,
        &partitions.to_string(),
    )
    .await;
}

/// A key is in the partition that this version's Java client chooses.
async fn same_partitions_as_the_java_client(broker: &OwnServers) {
    let database = Database::create("three").await;
    for topic in ["java", "walpost"] {
        partition(broker, &database.topic(topic), 5).await;
    }
    let keys: Vec<_> = (0..50).map(|n| format!("schlüssel-{n}")).collect();
    let java = java_partitions(broker, &database.topic("java"), "JavaStringHash", &keys).await;
    database.init(&[], &[]).await;
    let walpost = start(&database, broker).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 'walpost', key, 't', '{}' FROM unnest($1::text[]) key";
    database.rows(insert, &[&keys]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let topic = database.topic("walpost");
    let received = consume(&broker.pulsar_url, &topic, keys.len(), DEADLINE).await;
    let chosen: BTreeSet<_> = received
        .iter()
        .map(|message| {
            (
                message.key.clone().expect("a key"),
                message.partition.cast_unsigned(),
            )
        })
        .collect();
    assert_eq!(chosen, keys.into_iter().zip(java).collect());
}

#[tokio::test]
async fn a_broker_of_the_3_x_line_is_served_as_well() {
    Servers::fetch_pulsar(VERSION);
    let broker = Servers::own("pulsar3", &["--pulsar", VERSION]);
    let home = broker.var("WALPOST_LOCAL_PULSAR_HOME");
    assert!(
        home.ends_with(&format!("apache-pulsar-{VERSION}")),
        "{home}"
    );
    exactly_once_through_kills(&broker, 0).await;
    exactly_once_through_kills(&broker, 3).await;
    same_partitions_as_the_java_client(&broker).await;
}
