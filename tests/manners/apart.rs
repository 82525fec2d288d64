//! One topic's trouble beside a healthy topic: the healthy one goes on, and the other's events wait or are stored elsewhere.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pulsar::message::proto::BaseCommand;
use walpost::pulsar::{Diversion, PublisherConfig};

use super::sender::{DEADLINE, Log, SEND_TIMEOUT, Sender, config};
use super::support::{Asked, FakeBroker, PublishRate, Reaction, Settings};
use super::{OTHER, TOPIC};

/// How long a topic may be in trouble before its events are stored elsewhere.
const AGE: Duration = Duration::from_millis(500);
const EVENTS: usize = 30;

fn with_lanes(broker: &FakeBroker, lanes: u32) -> PublisherConfig {
    PublisherConfig {
        lanes,
        diversion: Some(Diversion {
            grace: AGE,
            age: AGE,
            unclear: Duration::from_secs(60),
            park: false,
            quiet: true,
        }),
        ..config(vec![broker.host()])
    }
}

/// A sender with both topics open.
async fn opened(broker: &FakeBroker, lanes: u32) -> Sender {
    let mut sender = Sender::with(with_lanes(broker, lanes));
    sender.elsewhere = Some(Vec::new());
    publish(&mut sender, 1);
    sender.delivered().await;
    sender
}

fn publish(sender: &mut Sender, count: usize) {
    for n in 0..count {
        sender.publish(TOPIC, &format!("key-{n}"));
        sender.publish(OTHER, &format!("key-{n}"));
    }
}

/// Serves until the healthy topic has everything.
async fn healthy_goes_on(sender: &mut Sender, broker: &FakeBroker) {
    let others = || broker.stored().iter().filter(|e| e.topic == OTHER).count();
    let before = others();
    publish(sender, EVENTS);
    let stored = || others() >= before + EVENTS;
    sender.until("the healthy topic", stored).await;
}

/// Serves until the troubled topic's events are somewhere, while the healthy one gets events and receipts.
async fn delivered_beside(sender: &mut Sender, broker: &FakeBroker) {
    let end = Instant::now() + DEADLINE;
    loop {
        let missing = sender.missing(Some(TOPIC), &broker.stored()).len();
        if missing == 0 {
            break sender.delivered().await;
        }
        assert!(Instant::now() < end, "{missing} events are nowhere");
        sender.publish(OTHER, "key");
        let published = Instant::now();
        let over = || published.elapsed() > AGE / 10;
        sender.until("the next event", over).await;
    }
    let missing = sender.missing(None, &broker.stored());
    assert!(missing.is_empty(), "lost: {missing:?}");
}

/// A topic with trouble that does not pass: the healthy one goes on, and its own events end up elsewhere.
async fn is_set_aside(trouble: impl FnOnce(&mut Settings)) {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker, 2).await;

    broker.set(TOPIC, trouble);
    healthy_goes_on(&mut sender, &broker).await;
    delivered_beside(&mut sender, &broker).await;

    let elsewhere = sender.elsewhere.clone().unwrap_or_default();
    assert_eq!(elsewhere.len(), EVENTS, "{elsewhere:?}");
}

#[tokio::test]
async fn a_topic_whose_every_write_fails_is_set_aside() {
    is_set_aside(|topic| topic.writes_fail = true).await;
}

#[tokio::test]
async fn a_topic_with_another_clients_exclusive_producer_is_set_aside() {
    is_set_aside(|topic| topic.exclusive = Some("theirs".to_owned())).await;
}

#[tokio::test]
async fn a_topic_that_requires_encryption_is_set_aside() {
    is_set_aside(|topic| topic.encryption_required = true).await;
}

#[tokio::test]
async fn a_topic_that_stays_fenced_is_set_aside() {
    is_set_aside(|topic| topic.fenced = true).await;
}

#[tokio::test]
async fn a_topic_that_allows_fewer_producers_than_there_are_lanes_is_published_to_by_fewer() {
    const LIMIT: usize = 4;
    let broker = FakeBroker::start().await;
    broker.set(TOPIC, |topic| topic.max_producers = Some(LIMIT));
    let mut sender = Sender::with(with_lanes(&broker, 16));
    sender.elsewhere = Some(Vec::new());

    healthy_goes_on(&mut sender, &broker).await;
    delivered_beside(&mut sender, &broker).await;

    let stored = broker.stored();
    assert!(stored.iter().any(|event| event.topic == TOPIC), "no lane");
}

#[tokio::test]
async fn a_topic_that_allows_more_producers_again_is_published_to_by_all_lanes() {
    const LANES: u32 = 16;
    const LIMIT: usize = 4;
    // GIVEN a topic that few lanes publish to
    let broker = FakeBroker::start_deduplicating().await;
    broker.set(TOPIC, |topic| topic.max_producers = Some(LIMIT));
    let mut sender = Sender::with(PublisherConfig {
        partition_refresh: AGE / 10,
        ..with_lanes(&broker, LANES)
    });
    publish(&mut sender, EVENTS);
    sender.delivered().await;
    let names = || -> HashSet<String> {
        let stored = broker.stored().into_iter();
        let of_topic = stored.filter(|event| event.topic == TOPIC);
        of_topic.map(|event| event.producer).collect()
    };
    assert!(names().len() <= LIMIT, "{:?}", names());

    // WHEN it allows all of them again, and more events come
    broker.set(TOPIC, |topic| topic.max_producers = None);
    let end = Instant::now() + DEADLINE;
    let usual = || names().iter().filter(|name| !name.contains('~')).count();
    while usual() < LANES as usize {
        assert!(Instant::now() < end, "{:?}", names());
        publish(&mut sender, EVENTS * 4);
        sender.delivered().await;
        let published = Instant::now();
        let over = || published.elapsed() > AGE / 10;
        sender.until("the next events", over).await;
    }

    // THEN every event is there once, and each key's in order
    sender.assert_exactly_once(&broker.stored());
}

/// The first send to the topic neither succeeds nor fails.
fn first_write_pends() -> impl FnMut(Asked, &BaseCommand) -> Reaction + Send + 'static {
    let mut producer = None;
    let mut pends = false;
    move |asked, command| {
        if let Some(made) = &command.producer
            && made.topic == TOPIC
        {
            producer = producer.or(Some(made.producer_id));
        }
        let is_its = command.send.as_ref().map(|send| send.producer_id) == producer;
        if asked == Asked::Send && is_its && !std::mem::replace(&mut pends, true) {
            return Reaction::Pend;
        }
        Reaction::Obey
    }
}

/// A sender of which one send to the topic has no receipt within the deadline, although another topic gets receipts.
async fn with_a_write_that_pends(broker: &FakeBroker) -> (Sender, Log) {
    let log = Log::capture();
    broker.script_rest(first_write_pends());
    let mut sender = Sender::with(with_lanes(broker, 1));
    sender.elsewhere = Some(Vec::new());
    sender.publish(TOPIC, "key");
    let closed = || broker.count(Asked::CloseProducer) > 0;
    let end = Instant::now() + DEADLINE;
    while !closed() {
        assert!(Instant::now() < end, "not noticed");
        sender.publish(OTHER, "key");
        let published = Instant::now();
        let over = || published.elapsed() > SEND_TIMEOUT / 20;
        sender.until("the next event", over).await;
    }
    (sender, log)
}

#[tokio::test]
async fn a_topic_that_gets_no_receipt_ends_no_connection_of_others() {
    let broker = FakeBroker::start().await;
    let (mut sender, log) = with_a_write_that_pends(&broker).await;
    assert!(log.warns(&["no receipt on", TOPIC]), "{}", log.text());

    // WHEN its write ends at last THEN that was all, and the other topic has one producer
    broker.settle(true);
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
    assert!(!log.warns(&["broker connection ended"]), "{}", log.text());
    let others = broker.seen(Asked::Producer).into_iter();
    let others = others.filter(|it| it.producer.as_ref().is_some_and(|it| it.topic == OTHER));
    assert_eq!(others.count(), 1);
}

#[tokio::test]
async fn a_topic_whose_write_never_ends_ends_no_connection_of_others_and_is_set_aside() {
    let broker = FakeBroker::start().await;
    let (mut sender, log) = with_a_write_that_pends(&broker).await;

    // WHEN the close of its producer is not answered within the time that a request has (30 s)
    let asked_at = Instant::now();
    let waited = || asked_at.elapsed() > Duration::from_secs(20);
    sender.until("most of that time", waited).await;
    sender.publish(TOPIC, "key");
    delivered_beside(&mut sender, &broker).await;

    // THEN its events are elsewhere
    let elsewhere = sender.elsewhere.clone().unwrap_or_default();
    assert_eq!(elsewhere.len(), 2, "{elsewhere:?}");
    assert!(!log.warns(&["broker connection ended"]), "{}", log.text());
}

/// The topic takes two messages and then nothing until the rate is lifted; the broker does not read its connection meanwhile.
const SLOW: PublishRate = PublishRate {
    messages: 2,
    period: Duration::from_secs(3600),
};

#[tokio::test]
async fn a_topic_that_is_throttled_holds_up_no_other() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = Sender::with(PublisherConfig {
        // No new connection comes to the rescue.
        send_timeout: DEADLINE * 2,
        ..with_lanes(&broker, 2)
    });
    publish(&mut sender, 1);
    sender.delivered().await;

    broker.set(TOPIC, |topic| topic.publish_rate = Some(SLOW));
    healthy_goes_on(&mut sender, &broker).await;
    healthy_goes_on(&mut sender, &broker).await;

    broker.set(TOPIC, |topic| topic.publish_rate = None);
    sender.delivered().await;
    let missing = sender.missing(None, &broker.stored());
    assert!(missing.is_empty(), "lost: {missing:?}");
}

#[tokio::test]
async fn a_topic_that_has_migrated_is_followed_and_holds_up_no_other() {
    // GIVEN a topic that has migrated to another cluster
    let first = FakeBroker::start().await;
    let second = FakeBroker::start().await;
    let mut sender = opened(&first, 2).await;
    first.set(TOPIC, |topic| topic.migrated_to = Some(second.url()));

    // WHEN events of it and of another come
    healthy_goes_on(&mut sender, &first).await;
    sender.delivered().await;

    // THEN its events are there
    let both = [first.stored(), second.stored()].concat();
    let missing = sender.missing(None, &both);
    assert!(missing.is_empty(), "lost: {missing:?}");
    assert_eq!(second.stored().len(), EVENTS);
}

#[tokio::test]
async fn a_topic_that_has_migrated_and_is_asked_for_the_first_time_holds_up_no_other() {
    let first = FakeBroker::start().await;
    let second = FakeBroker::start().await;
    first.set(TOPIC, |topic| topic.migrated_to = Some(second.url()));
    let mut sender = Sender::with(with_lanes(&first, 2));
    sender.elsewhere = Some(Vec::new());

    healthy_goes_on(&mut sender, &first).await;
    sender.delivered().await;

    let both = [first.stored(), second.stored()].concat();
    let missing = sender.missing(None, &both);
    assert!(missing.is_empty(), "lost: {missing:?}");
}
