//! Topics that change their shape: partitions that go, come, or become fewer. What is published afterwards lies where a consumer
//! of the topic finds it, and nothing is made that stands in the way of the topic.

use std::collections::HashSet;

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::{Asked, FakeBroker, StoredEvent, partition_name};

const KEYS: usize = 20;

/// Publishes one event of each key, until all have their receipts; returns the ids.
async fn round(sender: &mut Sender) -> Vec<String> {
    let keys = (0..KEYS).map(|n| format!("key-{n}"));
    let ids = keys.map(|key| sender.publish(TOPIC, &key)).collect();
    sender.delivered().await;
    ids
}

fn assert_found(published: &[String], readable: &[StoredEvent]) {
    let found: HashSet<&String> = readable.iter().map(|event| &event.id).collect();
    let missing: Vec<_> = published.iter().filter(|id| !found.contains(id)).collect();
    assert!(missing.is_empty(), "no consumer finds {missing:?}");
}

fn started(broker: &FakeBroker) -> Sender {
    Sender::with(config(vec![broker.host()]))
}

#[tokio::test]
async fn a_partitioned_topic_that_is_deleted_is_not_made_again_partition_by_partition() {
    // GIVEN a topic of three partitions
    let broker = FakeBroker::start().await;
    broker.create_partitioned(TOPIC, 3);
    let mut sender = started(&broker);
    let first = round(&mut sender).await;
    assert_found(&first, &broker.readable(TOPIC));

    // WHEN it is deleted
    broker.begin_deletion(TOPIC);
    broker.end_deletion(TOPIC);
    let second = round(&mut sender).await;

    // THEN what comes next is in the topic, of which there are no partitions
    assert_found(&second, &broker.readable(TOPIC));
    assert_eq!(broker.topic_names(), [TOPIC]);
}

#[tokio::test]
async fn while_a_partitioned_topic_is_being_deleted_its_events_wait() {
    let broker = FakeBroker::start().await;
    broker.create_partitioned(TOPIC, 3);
    let mut sender = started(&broker);
    round(&mut sender).await;

    // WHEN its partitions are gone, and its metadata goes after some have been asked for in vain
    broker.begin_deletion(TOPIC);
    let keys = (0..KEYS).map(|n| format!("key-{n}"));
    let second: Vec<String> = keys.map(|key| sender.publish(TOPIC, &key)).collect();
    let asked = || broker.count(Asked::Producer) + broker.count(Asked::Partitions);
    let before = asked();
    let again = || asked() > before + 3;
    sender.until("some attempts", again).await;
    broker.end_deletion(TOPIC);
    sender.delivered().await;

    // (A request for a producer that was on its way may have made a partition anew. Nothing goes there.)
    assert_found(&second, &broker.readable(TOPIC));
}

/// A topic without partitions is deleted and made anew with some.
async fn becomes_partitioned(auto_creation: bool) {
    let broker = FakeBroker::start().await;
    broker.auto_create(auto_creation);
    broker.create(TOPIC);
    let mut sender = started(&broker);
    round(&mut sender).await;

    broker.delete(TOPIC);
    broker.create_partitioned(TOPIC, 2);
    let second = round(&mut sender).await;

    assert_found(&second, &broker.readable(TOPIC));
    let partitions = [partition_name(TOPIC, 0), partition_name(TOPIC, 1)];
    assert_eq!(broker.topic_names(), partitions);
}

#[tokio::test]
async fn a_topic_that_is_made_anew_with_partitions_gets_no_plain_one_beside_them() {
    becomes_partitioned(true).await;
}

#[tokio::test]
async fn a_topic_that_is_made_anew_with_partitions_is_published_to_where_topics_are_not_made_by_themselves()
 {
    becomes_partitioned(false).await;
}

#[tokio::test]
async fn a_topic_that_is_made_anew_with_fewer_partitions_is_published_to() {
    let broker = FakeBroker::start().await;
    broker.create_partitioned(TOPIC, 4);
    let mut sender = started(&broker);
    round(&mut sender).await;

    broker.begin_deletion(TOPIC);
    broker.end_deletion(TOPIC);
    broker.create_partitioned(TOPIC, 2);
    let second = round(&mut sender).await;

    assert_found(&second, &broker.readable(TOPIC));
    let partitions = [partition_name(TOPIC, 0), partition_name(TOPIC, 1)];
    assert_eq!(broker.topic_names(), partitions);
}

#[tokio::test]
async fn a_missing_topic_that_an_old_broker_counts_no_partitions_of_is_counted_again() {
    // GIVEN a broker before PIP-344, which makes no topics by itself, and a topic that is missing
    let broker = FakeBroker::start().await;
    broker.missing_has_no_partitions();
    broker.auto_create(false);
    let mut sender = started(&broker);
    let keys = (0..KEYS).map(|n| format!("key-{n}"));
    let first: Vec<String> = keys.map(|key| sender.publish(TOPIC, &key)).collect();
    let asked = || broker.count(Asked::Producer) + broker.count(Asked::Partitions) > 3;
    sender.until("some attempts", asked).await;

    // WHEN it is made, with partitions
    broker.create_partitioned(TOPIC, 2);
    sender.delivered().await;

    // THEN the events are in them
    assert_found(&first, &broker.readable(TOPIC));
}
