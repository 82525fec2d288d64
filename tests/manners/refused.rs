//! Batches that the broker never takes. It names a batch's highest id and goes on with what stands behind it.

use std::time::Duration;

use pulsar::message::proto::ServerError;
use walpost::pulsar::{Diversion, Publisher, PublisherConfig};

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::{Asked, FakeBroker, Reaction, StoredEvent, reason};

/// Messages of a full batch.
const BATCH: usize = 10;

/// A sender with an open producer, whose refused events are diverted.
async fn diverting(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::with(PublisherConfig {
        diversion: Some(Diversion {
            grace: Duration::ZERO,
            age: Duration::ZERO,
            park: false,
            quiet: true,
        }),
        ..config(vec![broker.host()])
    });
    sender.publish(TOPIC, "key");
    sender.delivered().await;
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
async fn a_batch_that_is_not_allowed_is_an_error_that_names_its_rows() {
    let broker = FakeBroker::start().await;
    let mut sender = Sender::to(&broker).await;
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    refuse_next(&broker);

    sender.publish_many(TOPIC, "key", BATCH);
    let served = sender.serve_until("an error", |_| false).await;

    let error = served.expect_err("refused").report();
    let words = ["row-1, row-2", "and 5 more", TOPIC];
    for word in words
        .map(str::to_owned)
        .into_iter()
        .chain([reason(ServerError::NotAllowedError)])
    {
        assert!(error.contains(&word), "{error}");
    }
}

#[tokio::test]
async fn a_batch_that_is_not_allowed_is_diverted_and_not_sent_again() {
    let broker = FakeBroker::start().await;
    let mut sender = diverting(&broker).await;
    refuse_next(&broker);

    sender.publish_many(TOPIC, "key", BATCH);
    assert_eq!(diverted(&mut sender).await, rows(1..=BATCH));
    sender.publish_many(TOPIC, "key", BATCH);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Send), 1 + 1 + 1, "sent again");
    let published = rows((0..=2 * BATCH).filter(|n| !(1..=BATCH).contains(n)));
    assert_eq!(ids(broker.stored()), published);
}

#[tokio::test]
async fn what_was_stored_behind_a_batch_that_is_not_allowed_is_not_diverted_with_it() {
    let broker = FakeBroker::start().await;
    let mut sender = diverting(&broker).await;
    refuse_next(&broker);

    sender.publish_many(TOPIC, "key", 3 * BATCH);
    assert_eq!(diverted(&mut sender).await, rows(1..=BATCH));
    sender.delivered().await;

    let published = rows((0..=3 * BATCH).filter(|n| !(1..=BATCH).contains(n)));
    assert_eq!(ids(broker.stored()), published);
}
