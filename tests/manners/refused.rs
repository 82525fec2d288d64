//! Batches that the broker never takes. It names a batch's highest id and goes on with what stands behind it.

use std::time::Duration;

use pulsar::message::proto::ServerError;
use walpost::pulsar::{Diversion, Publisher, PublisherConfig};

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::{Asked, FakeBroker, Reaction, StoredEvent};

/// Messages of a full batch.
const BATCH: usize = 10;

/// A sender with an open producer, whose refused events are diverted.
async fn diverting(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::with(PublisherConfig {
        diversion: Some(Diversion {
            grace: Duration::ZERO,
            age: Duration::ZERO,
            unclear: Duration::from_secs(60),
            park: false,
            quiet: true,
        }),
        ..config(vec![broker.host()])
    });
    sender.open(TOPIC).await;
    sender
}

fn refuse_next(broker: &FakeBroker) {
    let fail = Reaction::Fail(ServerError::NotAllowedError);
    broker.script(Asked::Send, [fail]);
}

fn rows(numbers: impl Iterator<Item = usize>) -> Vec<String> {
    numbers.map(|number| format!("row-{number}")).collect()
}

fn ids(stored: Vec<StoredEvent>) -> Vec<String> {
    stored.into_iter().map(|event| event.id).collect()
}

async fn diverted(sender: &mut Sender) -> Vec<String> {
    let done = Publisher::has_diverted;
    let served = sender.serve_until("diverted events", done).await;
    served.unwrap_or_else(|error| panic!("{}", error.report()));
    sender.store_diverted()
}

#[tokio::test]
async fn a_batch_that_is_not_allowed_says_nothing_of_its_messages_which_are_sent_one_by_one() {
    let broker = FakeBroker::start().await;
    let mut sender = Sender::to(&broker).await;
    sender.open(TOPIC).await;
    refuse_next(&broker);

    sender.publish_many(TOPIC, "key", BATCH);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Send), 1 + 1 + BATCH);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_single_message_that_is_not_allowed_is_diverted_and_not_sent_again() {
    let broker = FakeBroker::start().await;
    let mut sender = diverting(&broker).await;
    refuse_next(&broker);

    sender.publish(TOPIC, "key");
    assert_eq!(diverted(&mut sender).await, rows(1..=1));
    sender.publish_many(TOPIC, "key", BATCH);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Send), 1 + 1 + 1, "sent again");
    let published = rows((0..=1 + BATCH).filter(|n| *n != 1));
    assert_eq!(ids(broker.stored()), published);
}

#[tokio::test]
async fn of_a_batch_that_is_not_allowed_only_the_message_at_fault_is_diverted() {
    // GIVEN a topic that takes no message of this size
    let broker = FakeBroker::start().await;
    let mut sender = diverting(&broker).await;
    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(1500));

    // WHEN one of ten is larger, in one batch with the others
    for number in 1..=BATCH {
        let bytes = if number == 4 { 2000 } else { 10 };
        let taken = sender.try_publish(TOPIC, &format!("key-{number}"), &vec![b'x'; bytes]);
        taken.expect("the broker itself takes it");
    }
    assert_eq!(diverted(&mut sender).await, rows(4..=4));
    sender.delivered().await;

    // THEN the others are there
    let stored: std::collections::BTreeSet<String> = ids(broker.stored()).into_iter().collect();
    let published = rows((0..=BATCH).filter(|n| *n != 4)).into_iter().collect();
    assert_eq!(stored, published);
}
