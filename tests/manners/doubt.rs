//! What a broker says of a batch, and what it does not say: "refused" of a batch of several messages, "stored before" of one
//! that was never sent, a last id that is too low, receipts that skip one. No event may be lost over it.

use std::time::{Duration, Instant};

use pulsar::message::proto::ServerError;
use walpost::pulsar::{Diversion, Publisher, PublisherConfig};

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::{Asked, FakeBroker, Reaction, StoredEvent};

/// Events of one key in three batches.
const EVENTS: usize = 30;
const BATCHES: usize = 3;
/// A limit of a topic, and events that are far below it while one batch of them is far above.
const LIMIT_BYTES: usize = 20_000;
const SMALL_BYTES: usize = 200;
const SMALL_EVENTS: usize = 310;

fn diverting(broker: &FakeBroker) -> PublisherConfig {
    PublisherConfig {
        diversion: Some(Diversion {
            grace: Duration::from_secs(60),
            age: Duration::from_secs(60),
            unclear: Duration::from_secs(60),
            park: false,
            quiet: true,
        }),
        ..config(vec![broker.host()])
    }
}

/// A sender whose topic has accepted more than any batch here has: several are under way at a time.
async fn opened(config: PublisherConfig) -> Sender {
    let mut sender = Sender::with(config);
    sender.elsewhere = Some(Vec::new());
    let taken = sender.try_publish(TOPIC, "key", &vec![b'x'; 100_000]);
    taken.expect("an event that fits");
    sender.delivered().await;
    sender
}

fn assert_nothing_is_lost(sender: &Sender, stored: &[StoredEvent]) {
    let missing = sender.missing(Some(TOPIC), stored);
    assert!(missing.is_empty(), "lost: {missing:?}");
}

/// One batch that the topic's limit refuses, with others behind it, each message of all of them small enough.
async fn a_batch_above_the_limit(broker: &FakeBroker, config: PublisherConfig) {
    // GIVEN a topic with a limit
    let mut sender = opened(PublisherConfig {
        batch_max_messages: 1000,
        send_timeout: Duration::from_secs(30),
        ..config
    })
    .await;
    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(LIMIT_BYTES));

    // WHEN a batch above it is refused after more was sent behind it
    broker.script(Asked::Send, vec![Reaction::Hold; 1 + BATCHES]);
    for _ in 0..SMALL_EVENTS {
        let taken = sender.try_publish(TOPIC, "key", &[b'x'; SMALL_BYTES]);
        taken.expect("a small event");
    }
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;
    for _ in 0..BATCHES {
        sender.publish(TOPIC, "key");
        let before = broker.count(Asked::Send);
        let sent = || broker.count(Asked::Send) > before;
        sender.until("another behind it", sent).await;
    }
    broker.release(|_| {});
    sender.delivered().await;

    // THEN each message is stored, and none is taken for one that the broker will never take
    assert_eq!(sender.elsewhere.as_deref(), Some([].as_slice()), "diverted");
    assert_nothing_is_lost(&sender, &broker.stored());
}

#[tokio::test]
async fn a_batch_that_is_too_large_for_its_topic_says_nothing_of_its_messages() {
    let broker = FakeBroker::start().await;
    a_batch_above_the_limit(&broker, diverting(&broker)).await;
}

#[tokio::test]
async fn a_batch_that_is_too_large_for_its_topic_says_nothing_of_its_messages_with_deduplication() {
    let broker = FakeBroker::start_deduplicating().await;
    a_batch_above_the_limit(&broker, diverting(&broker)).await;
}

#[tokio::test]
async fn a_batch_that_is_too_large_for_its_topic_is_no_error_where_nothing_is_diverted() {
    let broker = FakeBroker::start_deduplicating().await;
    a_batch_above_the_limit(&broker, config(vec![broker.host()])).await;
}

#[tokio::test]
async fn after_a_restart_a_batch_that_is_too_large_for_its_topic_is_stored_although_later_ones_were()
 {
    // GIVEN a batch that the topic's limit refuses, later ones that were stored, and an end before anything is done about it
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(PublisherConfig {
        batch_max_messages: 1000,
        send_timeout: Duration::from_secs(30),
        ..config(vec![broker.host()])
    })
    .await;
    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(LIMIT_BYTES));
    broker.script(Asked::Send, [Reaction::Hold, Reaction::Hold]);
    for _ in 0..SMALL_EVENTS {
        let taken = sender.try_publish(TOPIC, "key", &[b'x'; SMALL_BYTES]);
        taken.expect("a small event");
    }
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;
    sender.publish(TOPIC, "key");
    let stored = || broker.stored().len() == 2;
    sender.until("a later one to be stored", stored).await;
    broker.release(|_| {});
    // Refused for good, or stored in another way.
    let served = sender.serve_until("the end", Publisher::is_empty).await;
    drop(served);

    // WHEN the process starts again with smaller batches
    sender.restart(50);
    sender.delivered().await;

    // THEN the small events are there
    assert_nothing_is_lost(&sender, &broker.stored());
}

/// A time beyond any delivery delay.
const FAR_MS: i64 = 4_000_000_000_000;

#[tokio::test]
async fn a_refusal_that_comes_late_of_a_batch_that_was_refused_again_ends_nothing() {
    // GIVEN a batch whose refusal is on its way as its producer is closed
    let broker = FakeBroker::start().await;
    let mut sender = opened(diverting(&broker)).await;
    broker.set(TOPIC, |topic| topic.max_delivery_delay_ms = Some(1000));
    broker.script(Asked::Send, [Reaction::Hold]);
    let taken = sender.try_publish_at(TOPIC, "key", b"later", Some(FAR_MS));
    taken.expect("an event that fits");
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;
    broker.close_producers(None);

    // WHEN it comes after the batch was sent to the next producer, refused, and set aside
    sender.delivered().await;
    assert_eq!(
        sender.elsewhere.as_deref(),
        Some(["row-1".to_owned()].as_slice())
    );
    broker.release(|_| {});

    // THEN what comes next is published
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    assert_nothing_is_lost(&sender, &broker.stored());
}

#[tokio::test]
async fn a_message_beyond_the_topics_delivery_delay_is_diverted_alone() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(diverting(&broker)).await;
    broker.set(TOPIC, |topic| topic.max_delivery_delay_ms = Some(1000));

    broker.script(Asked::Send, vec![Reaction::Hold; 1 + BATCHES]);
    let taken = sender.try_publish_at(TOPIC, "key", b"later", Some(FAR_MS));
    taken.expect("an event that fits");
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) > BATCHES;
    sender.until("the batches behind it", sent).await;
    broker.release(|_| {});
    let served = sender.serve_until("everything", Publisher::is_empty).await;
    served.unwrap_or_else(|error| panic!("{}", error.report()));

    let elsewhere = sender.elsewhere.clone().unwrap_or_default();
    assert_eq!(elsewhere, ["row-1"], "not only the one that is refused");
    assert_nothing_is_lost(&sender, &broker.stored());
}

#[tokio::test]
async fn a_producer_whose_creation_comes_late_behind_its_close_loses_nothing() {
    // GIVEN batches that were stored without receipts, and a process that starts again with batches of another size
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(config(vec![broker.host()])).await;
    broker.script(Asked::Send, vec![Reaction::Lose; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;
    broker.disconnect();
    sender.restart(7);
    sender.publish_many(TOPIC, "key", EVENTS);

    // WHEN the authorization of its producer takes longer than a request may (30 s), so that a close finds nothing to close,
    // and comes to its end as the producer is asked for again
    let stall = Reaction::StallAuthorization;
    broker.script(Asked::Producer, [stall.clone(), stall]);
    let asked_at = Instant::now();
    let waited = || asked_at.elapsed() > Duration::from_secs(20);
    sender.until("most of that time", waited).await;
    let again = || broker.count(Asked::Producer) == 3;
    sender.until("the next attempt", again).await;
    broker.resume();

    // THEN nothing is lost
    sender.delivered().await;
    assert_nothing_is_lost(&sender, &broker.stored());
}

/// The first of three batches is not stored, and those behind it are.
async fn the_first_of_three(reaction: Reaction) {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(config(vec![broker.host()])).await;
    broker.script(Asked::Send, [reaction]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert_nothing_is_lost(&sender, &broker.stored());
}

#[tokio::test]
async fn a_batch_whose_write_is_refused_in_front_of_others_that_are_stored_is_not_lost() {
    the_first_of_three(Reaction::Fail(ServerError::PersistenceError)).await;
}

#[tokio::test]
async fn a_batch_without_a_receipt_in_front_of_others_that_have_theirs_is_not_lost() {
    the_first_of_three(Reaction::Ignore).await;
}

#[tokio::test]
async fn stored_before_counts_for_nothing_that_is_sent_the_first_time() {
    // GIVEN a batch above all that the producer was told, which the broker has not stored
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(config(vec![broker.host()])).await;
    broker.script(Asked::Send, [Reaction::Ignore]);
    sender.publish(TOPIC, "key");
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;

    // WHEN its receipt says that it was stored before
    let sends = broker.seen(Asked::Send);
    let last = sends[1].send.as_ref().expect("a send");
    let highest = last.highest_sequence_id.unwrap_or(last.sequence_id);
    broker.say_duplicate(last.producer_id, (last.sequence_id, highest));

    // THEN it is stored all the same
    sender.delivered().await;
    assert_nothing_is_lost(&sender, &broker.stored());
}

#[tokio::test]
async fn a_last_id_inside_a_batch_that_was_sent_loses_nothing() {
    // GIVEN a batch of ten that a broker dropped with its connection
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(config(vec![broker.host()])).await;
    broker.script(Asked::Send, [Reaction::Ignore]);
    sender.publish_many(TOPIC, "key", 10);
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;
    broker.disconnect();

    // WHEN another process under the same names stores the first five of them, and ends
    let mut other = Sender::to(&broker).await;
    other.publish_many(TOPIC, "key", 1 + 5);
    other.delivered().await;
    drop(other);

    // THEN the other five are stored as well
    sender.delivered().await;
    assert_nothing_is_lost(&sender, &broker.stored());
}
