//! `CLOSE_PRODUCER`: the topic moves (unload, bundle split), with and without the next broker's address.

use super::TOPIC;
use super::sender::Sender;
use super::support::{Asked, FakeBroker, Reaction};

/// Events of one key in three batches.
const EVENTS: usize = 30;
const BATCHES: usize = 3;

async fn opened(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::to(broker).await;
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    sender
}

/// Three batches that the broker drops silently, because it is about to close the producer.
async fn dropped(sender: &mut Sender, broker: &FakeBroker) {
    broker.script(Asked::Send, vec![Reaction::Ignore; BATCHES]);
    let before = broker.count(Asked::Send);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == before + BATCHES;
    sender.until("the batches to be sent", sent).await;
}

#[tokio::test]
async fn a_closed_producer_is_looked_up_again_and_what_it_dropped_is_sent_again() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    dropped(&mut sender, &broker).await;

    broker.close_producers(None);
    sender.delivered().await;

    assert_eq!(broker.connections(), 1, "the connection is well");
    assert_eq!(broker.count(Asked::Lookup), 2);
    assert_eq!(broker.count(Asked::Producer), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_closed_producer_with_nothing_to_send_is_opened_again_when_there_is() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;

    broker.close_producers(None);
    broker.ping();
    let heard = || broker.count(Asked::Pong) == 1;
    sender.until("an answer to a later ping", heard).await;
    assert_eq!(broker.count(Asked::Producer), 1, "opened for nothing");

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;
    assert_eq!(broker.count(Asked::Lookup), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn receipts_that_come_before_the_producer_is_closed_count() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let hold = [Reaction::Hold, Reaction::Ignore, Reaction::Ignore];
    broker.script(Asked::Send, hold);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;

    broker.release(|_| {});
    broker.close_producers(None);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Send), 1 + BATCHES + 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_closed_producer_whose_next_broker_is_named_goes_straight_there() {
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    let mut sender = opened(&first).await;
    dropped(&mut sender, &first).await;

    first.close_producers(Some(&second.url()));
    sender.delivered().await;

    assert_eq!(second.count(Asked::Producer), 1, "not the one named");
    let lookups = (first.count(Asked::Lookup), second.count(Asked::Lookup));
    assert_eq!(lookups, (1, 0), "asked although it was told");
    sender.assert_exactly_once(&first.stored());
}

#[tokio::test]
async fn a_closed_producer_whose_next_broker_cannot_be_reached_is_looked_up() {
    let first = FakeBroker::start().await;
    let mut dead = first.beside().await;
    dead.stop().await;
    let mut sender = opened(&first).await;
    dropped(&mut sender, &first).await;

    first.close_producers(Some(&dead.url()));
    sender.delivered().await;

    assert!(first.count(Asked::Lookup) >= 2, "no fresh lookup");
    sender.assert_exactly_once(&first.stored());
}

#[tokio::test]
async fn a_closed_producer_whose_next_broker_does_not_have_the_topic_is_looked_up() {
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    let not_here = Reaction::Fail(pulsar::message::proto::ServerError::ServiceNotReady);
    second.script(Asked::Producer, vec![not_here; 100]);
    let mut sender = opened(&first).await;
    dropped(&mut sender, &first).await;

    first.close_producers(Some(&second.url()));
    sender.delivered().await;

    assert!(first.count(Asked::Lookup) >= 2, "no fresh lookup");
    sender.assert_exactly_once(&first.stored());
}

#[tokio::test]
async fn a_next_broker_that_is_no_address_leads_to_a_lookup() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    dropped(&mut sender, &broker).await;

    broker.close_producers(Some("somewhere"));
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Lookup), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_topic_that_moves_again_and_again_loses_nothing() {
    let first = FakeBroker::start_deduplicating().await;
    let second = first.beside().await;
    let mut sender = opened(&first).await;

    for round in 0..20 {
        sender.publish_many(TOPIC, "key", EVENTS);
        let stored = 1 + round * EVENTS;
        let some = || first.stored().len() > stored;
        sender.until("some of the round", some).await;
        first.close_producers((round % 3 == 0).then(|| second.url()).as_deref());
        second.close_producers((round % 3 == 1).then(|| first.url()).as_deref());
    }
    sender.delivered().await;

    assert!(first.count(Asked::Producer) > 10, "closed for nothing");
    sender.assert_exactly_once(&first.stored());
}
