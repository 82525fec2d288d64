//! Creating producers: refusals that pass by themselves, and topics that are refused.

use std::time::{Duration, Instant};

use pulsar::message::proto::{BaseCommand, ServerError};
use walpost::Lsn;
use walpost::pulsar::Publisher;

use super::sender::{Log, Sender};
use super::support::{Asked, FakeBroker, Reaction, reason};
use super::{OTHER, TOPIC};

/// The first two commands of a kind are refused; everything arrives once all the same, and the log says why it took longer.
async fn passes_by_itself(asked: Asked, error: ServerError) {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    broker.script(asked, [Reaction::Fail(error), Reaction::Fail(error)]);
    let mut sender = Sender::to(&broker).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    // The partitions are counted once more when the producer is open.
    let expected = if asked == Asked::Partitions { 4 } else { 3 };
    assert_eq!(broker.count(asked), expected);
    assert!(log.warns(&[TOPIC, &reason(error)]), "{}", log.text());
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn service_not_ready_on_lookup_is_asked_again() {
    passes_by_itself(Asked::Lookup, ServerError::ServiceNotReady).await;
}

#[tokio::test]
async fn too_many_requests_on_lookup_is_asked_again() {
    passes_by_itself(Asked::Lookup, ServerError::TooManyRequests).await;
}

#[tokio::test]
async fn a_metadata_error_on_lookup_is_asked_again() {
    passes_by_itself(Asked::Lookup, ServerError::MetadataError).await;
}

#[tokio::test]
async fn service_not_ready_on_the_question_for_partitions_is_asked_again() {
    passes_by_itself(Asked::Partitions, ServerError::ServiceNotReady).await;
}

#[tokio::test]
async fn a_topic_that_is_not_found_is_asked_for_again() {
    passes_by_itself(Asked::Partitions, ServerError::TopicNotFound).await;
    passes_by_itself(Asked::Lookup, ServerError::TopicNotFound).await;
    passes_by_itself(Asked::Producer, ServerError::TopicNotFound).await;
}

#[tokio::test]
async fn service_not_ready_on_creation_is_asked_again() {
    passes_by_itself(Asked::Producer, ServerError::ServiceNotReady).await;
}

#[tokio::test]
async fn a_producer_name_that_is_still_taken_is_asked_for_again() {
    passes_by_itself(Asked::Producer, ServerError::ProducerBusy).await;
}

#[tokio::test]
async fn too_many_requests_on_creation_is_asked_again() {
    passes_by_itself(Asked::Producer, ServerError::TooManyRequests).await;
}

#[tokio::test]
async fn a_metadata_error_on_creation_is_asked_again() {
    passes_by_itself(Asked::Producer, ServerError::MetadataError).await;
}

#[tokio::test]
async fn a_quota_that_holds_producers_back_is_waited_for() {
    passes_by_itself(
        Asked::Producer,
        ServerError::ProducerBlockedQuotaExceededError,
    )
    .await;
}

#[tokio::test]
async fn a_quota_that_refuses_producers_is_waited_for() {
    passes_by_itself(
        Asked::Producer,
        ServerError::ProducerBlockedQuotaExceededException,
    )
    .await;
}

#[tokio::test]
async fn a_producer_that_is_not_ready_yet_is_sent_nothing_before_it_is() {
    // GIVEN a broker that lets the producer wait its turn
    let broker = FakeBroker::start().await;
    broker.script(Asked::Producer, [Reaction::NotReady]);
    let mut sender = Sender::to(&broker).await;
    sender.publish_many(TOPIC, "key", 3);
    let asked = || broker.count(Asked::Producer) == 1;
    sender.until("the producer to be asked for", asked).await;

    // WHEN the broker has been heard after that, and its answer is still "not ready"
    broker.ping();
    let heard = || broker.count(Asked::Pong) == 1;
    sender.until("an answer to a later ping", heard).await;
    assert_eq!(broker.count(Asked::Send), 0, "sent before its turn");

    // THEN "ready" starts it, and the request was not repeated
    broker.release(|_| {});
    sender.delivered().await;
    assert_eq!(broker.count(Asked::Producer), 1);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_producer_whose_creation_was_not_answered_is_closed_before_it_is_asked_for_again() {
    // GIVEN batches that were stored without receipts, and a process that starts again with batches of another size
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = Sender::to(&broker).await;
    sender.open(TOPIC).await;
    broker.script(Asked::Send, vec![Reaction::Lose; 3]);
    sender.publish_many(TOPIC, "key", 30);
    let sent = || broker.count(Asked::Send) == 1 + 3;
    sender.until("the batches to be sent", sent).await;
    broker.disconnect();
    sender.restart(7);
    sender.publish_many(TOPIC, "key", 30);

    // WHEN the broker makes its producer, and does not say so within the time that a request has (30 s)
    broker.script(Asked::Producer, [Reaction::Lose]);
    let asked_at = Instant::now();
    let waited = || asked_at.elapsed() > Duration::from_secs(20);
    sender.until("most of that time", waited).await;
    assert_eq!(broker.count(Asked::Producer), 2);

    // THEN the next attempt learns what was stored, and no batch is dropped that holds something new
    sender.delivered().await;
    assert_eq!(broker.count(Asked::Producer), 3);
    assert_eq!(broker.count(Asked::CloseProducer), 1);
    sender.assert_exactly_once(&broker.stored());
}

/// A log that ends here has one event of a sender, the first.
const AFTER_ONE: Lsn = Lsn::new(100);

#[tokio::test]
async fn a_name_that_has_published_beyond_the_end_of_the_log_is_an_error_although_later_events_wait()
 {
    // GIVEN a name that has published three events
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = Sender::to(&broker).await;
    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;
    drop(sender);

    // WHEN the log ends behind the first of them, and has grown past all three before the producer is open
    let mut sender = Sender::to(&broker).await;
    sender.publisher.set_log_end(AFTER_ONE);
    sender.publish_many(TOPIC, "key", 9);
    let served = sender.serve_until("an error", |_| false).await;

    // THEN nothing is taken for old
    let error = served.expect_err("refused").report();
    assert!(error.contains("put back"), "{error}");
    assert_eq!(broker.stored().len(), 3);
}

#[tokio::test]
async fn what_a_lane_has_written_beyond_the_end_of_the_log_as_it_began_is_its_own() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = Sender::to(&broker).await;
    sender.publisher.set_log_end(AFTER_ONE);
    for _ in 0..3 {
        sender.publish_many(TOPIC, "key", 3);
        sender.delivered().await;
        broker.disconnect();
    }
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    assert!(broker.connections() > 3);
    sender.assert_exactly_once(&broker.stored());
}

/// Decides for one topic's producers, and obeys otherwise.
fn on_topic(error: ServerError) -> impl FnMut(Asked, &BaseCommand) -> Reaction + Send + 'static {
    move |_, command| match &command.producer {
        Some(producer) if producer.topic == TOPIC => Reaction::Fail(error),
        _ => Reaction::Obey,
    }
}

/// A topic is refused: its events wait, the log says why, other topics go on; when the broker takes it back everything
/// arrives in order.
async fn the_topic_waits(error: ServerError) {
    // GIVEN a broker that refuses one topic
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    broker.script_rest(on_topic(error));
    let mut sender = Sender::to(&broker).await;

    // WHEN events of that topic and of another come
    for _ in 0..3 {
        sender.publish(TOPIC, "key");
        sender.publish(OTHER, "key");
    }
    let others = || broker.stored().len() == 3;
    sender.until("the other topic", others).await;
    let said = || log.complains(&[TOPIC, &reason(error), "until this is mended"]);
    sender.until("an error with the reason", said).await;
    let attempts = || {
        let of_topic = |c: &BaseCommand| c.producer.as_ref().is_some_and(|p| p.topic == TOPIC);
        broker
            .seen(Asked::Producer)
            .iter()
            .filter(|c| of_topic(c))
            .count()
    };
    sender.until("further attempts", || attempts() >= 3).await;

    // THEN the other topic goes on
    sender.publish_many(TOPIC, "key", 3);
    sender.publish_many(OTHER, "key", 3);
    let others = || broker.stored().len() == 6;
    sender.until("the other topic again", others).await;
    assert!(broker.stored().iter().all(|event| event.topic == OTHER));
    let only_of_topic = |publisher: &Publisher| publisher.in_flight().0 == 6;
    let served = sender
        .serve_until("the receipts of the other", only_of_topic)
        .await;
    served.expect("nothing is refused for good");

    // AND everything is there when the broker changes its mind
    broker.heal();
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn the_events_of_a_topic_that_is_terminated_wait_and_other_topics_go_on() {
    the_topic_waits(ServerError::TopicTerminatedError).await;
}

#[tokio::test]
async fn the_events_of_a_topic_with_an_incompatible_schema_wait_and_other_topics_go_on() {
    the_topic_waits(ServerError::IncompatibleSchema).await;
}

#[tokio::test]
async fn the_events_of_a_topic_without_permission_wait_and_other_topics_go_on() {
    the_topic_waits(ServerError::AuthorizationError).await;
}

#[tokio::test]
async fn the_events_of_a_topic_whose_producer_is_fenced_wait_and_other_topics_go_on() {
    the_topic_waits(ServerError::ProducerFenced).await;
}

#[tokio::test]
async fn the_events_of_a_topic_that_is_terminated_while_they_are_sent_wait_and_other_topics_go_on()
{
    // GIVEN two topics with open producers
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = Sender::to(&broker).await;
    sender.open(TOPIC).await;
    sender.open(OTHER).await;

    // WHEN one is terminated with three batches on their way
    broker.set(TOPIC, |topic| topic.terminated = true);
    sender.publish_many(TOPIC, "key", 30);
    let said = || log.complains(&[TOPIC, "already terminated", "until this is mended"]);
    sender.until("an error with the reason", said).await;

    // THEN the other goes on
    sender.publish_many(OTHER, "key", 3);
    let others = || broker.stored().len() == 5;
    sender.until("the other topic", others).await;
    let only_of_topic = |publisher: &Publisher| publisher.in_flight().0 == 30;
    let served = sender
        .serve_until("the receipts of the other", only_of_topic)
        .await;
    served.expect("nothing is refused for good");

    // AND everything is there when the broker changes its mind
    broker.set(TOPIC, |topic| topic.terminated = false);
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}
