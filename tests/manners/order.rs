//! The order of one key around a message that its topic refuses.

use std::time::Duration;

use walpost::pulsar::{Diversion, PublisherConfig};

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::FakeBroker;

const LIMIT_BYTES: usize = 2000;
const EVENTS: usize = 6;
/// The one of them that is too large.
const LARGE: usize = 2;

#[tokio::test]
async fn nothing_of_a_key_is_stored_behind_a_message_that_its_topic_refuses() {
    // GIVEN a topic with a limit, and batches of one message
    let broker = FakeBroker::start().await;
    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(LIMIT_BYTES));
    let mut sender = Sender::with(PublisherConfig {
        batch_max_messages: 1,
        diversion: Some(Diversion {
            grace: Duration::from_secs(60),
            age: Duration::from_secs(60),
            unclear: Duration::from_secs(60),
            park: true,
            quiet: true,
        }),
        ..config(vec![broker.host()])
    });
    sender.elsewhere = Some(Vec::new());

    // WHEN the third of six events is above it
    for n in 0..EVENTS {
        let bytes = if n == LARGE { 2 * LIMIT_BYTES } else { 20 };
        let taken = sender.try_publish(TOPIC, "key", &vec![b'x'; bytes]);
        taken.expect("the broker's limit is larger");
    }
    sender.delivered().await;

    // THEN those behind it wait with it, in order: it can still come before them when the limit is raised
    let rows = |range: std::ops::Range<usize>| -> Vec<String> {
        range.map(|n| format!("row-{n}")).collect()
    };
    let stored: Vec<String> = broker.stored().into_iter().map(|event| event.id).collect();
    assert_eq!(stored, rows(0..LARGE));
    assert_eq!(sender.elsewhere.clone(), Some(rows(LARGE..EVENTS)));
}
