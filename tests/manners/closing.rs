//! `CLOSE_PRODUCER`: the topic moves (unload, bundle split, another cluster), with and without the next address; of an open
//! producer, and in place of the answer to its creation.

use std::time::{Duration, Instant};

use pulsar::message::proto::BaseCommand;

use super::TOPIC;
use super::sender::{Log, Sender};
use super::support::{Asked, FakeBroker, Reaction, close_producer, topic_migrated};

/// Events of one key in three batches.
const EVENTS: usize = 30;
const BATCHES: usize = 3;
/// Far below the 30 s that a request has, and far above what an attempt takes.
const AT_ONCE: Duration = Duration::from_secs(10);

async fn opened(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::to(broker).await;
    sender.open(TOPIC).await;
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

/// Answers a creation with what is said about its producer, and obeys everything else.
fn in_place_of_creation(
    say: impl Fn(u64) -> Vec<u8> + Send + 'static,
) -> impl FnMut(Asked, &BaseCommand) -> Reaction + Send + 'static {
    move |_, command| match &command.producer {
        Some(producer) => Reaction::Say(say(producer.producer_id)),
        None => Reaction::Obey,
    }
}

#[tokio::test]
async fn a_producer_that_is_closed_in_place_of_being_created_is_asked_for_again_at_once() {
    // GIVEN a broker that unloads the topic while the producer is being created
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut closes = 1;
    broker.script_rest(move |_, command| match &command.producer {
        Some(producer) if closes > 0 => {
            closes -= 1;
            Reaction::Say(close_producer(producer.producer_id, None))
        }
        _ => Reaction::Obey,
    });
    let mut sender = Sender::to(&broker).await;

    // WHEN events come
    let begun = Instant::now();
    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    // THEN nobody waits for another answer
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    assert!(
        log.warns(&[TOPIC, "while it is being opened"]),
        "{}",
        log.text()
    );
    assert_eq!(broker.connections(), 1, "the connection is well");
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_producer_that_is_closed_in_place_of_being_created_goes_where_the_broker_says() {
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    let url = second.url();
    first.script_rest(in_place_of_creation(move |id| {
        close_producer(id, Some(&url))
    }));
    let mut sender = Sender::to(&first).await;

    let begun = Instant::now();
    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    let lookups = (first.count(Asked::Lookup), second.count(Asked::Lookup));
    assert_eq!(lookups, (1, 0), "asked although it was told");
    sender.assert_exactly_once(&first.stored());
}

#[tokio::test]
async fn a_topic_that_has_moved_to_another_cluster_is_looked_up_there() {
    // GIVEN two clusters, and a topic of the first whose batches are dropped because it moves
    let old = FakeBroker::start().await;
    let new = FakeBroker::start().await;
    let mut sender = opened(&old).await;
    dropped(&mut sender, &old).await;
    let announced = old.seen(Asked::Connect)[0].connect.clone();
    let announced = announced.and_then(|connect| connect.protocol_version);
    assert!(
        announced >= Some(20),
        "{announced:?} is not told of such topics"
    );

    // WHEN the broker says so, to the open producer and to any that is asked for later
    let url = new.url();
    let moved = move |id| [topic_migrated(id, &url), close_producer(id, None)].concat();
    old.script_rest(in_place_of_creation(moved));
    old.migrate(&new.url());
    sender.delivered().await;

    // THEN the new cluster is asked where the topic is
    assert_eq!(new.count(Asked::Lookup), 1);
    assert_eq!(
        old.count(Asked::Producer),
        1,
        "the old cluster was asked again"
    );

    // AND again when the connection to it is lost
    new.disconnect();
    sender.publish_many(TOPIC, "key", EVENTS);
    let begun = Instant::now();
    sender.delivered().await;
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    let stored = [old.stored(), new.stored()].concat();
    sender.assert_exactly_once(&stored);
}

#[tokio::test]
async fn a_topic_that_had_moved_before_the_start_is_looked_up_in_its_cluster() {
    let old = FakeBroker::start().await;
    let new = FakeBroker::start().await;
    let url = new.url();
    let moved = move |id| [topic_migrated(id, &url), close_producer(id, None)].concat();
    old.script_rest(in_place_of_creation(moved));
    let mut sender = Sender::to(&old).await;

    let begun = Instant::now();
    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    assert!(old.stored().is_empty());
    sender.assert_exactly_once(&new.stored());
}
