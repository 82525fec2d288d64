//! Sends that are refused, receipts that are missing or in the wrong order, messages that are too large.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use pulsar::message::proto::ServerError;
use walpost::pulsar::PublisherConfig;

use super::TOPIC;
use super::sender::{Log, Sender, config};
use super::support::{Asked, FakeBroker, Reaction, StoredEvent, reason};

/// Events of one key in this many batches; all batches are on their way before the first receipt.
const EVENTS: usize = 30;
const BATCHES: usize = 3;

/// An open producer, so that the next batches go out at once.
async fn opened(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::to(broker).await;
    sender.open(TOPIC).await;
    sender
}

/// The ids of what is stored, in order.
fn ids(stored: &[StoredEvent]) -> Vec<&str> {
    stored.iter().map(|event| event.id.as_str()).collect()
}

/// What stands behind the command of a frame (without its first four bytes): the command names the producer, and each one has an id of its own.
fn entry(frame: &[u8]) -> &[u8] {
    let size = u32::from_be_bytes(*frame.first_chunk::<4>().expect("a frame"));
    &frame[4 + size as usize..]
}

/// Publishes so many events of one key, each after a batch with the one before it has waited for long enough to be sent.
async fn publish_slowly(sender: &mut Sender, count: usize) {
    for _ in 0..count {
        sender.publish(TOPIC, "key");
        let published = Instant::now();
        let over = || published.elapsed() > Duration::from_millis(3);
        sender.until("the linger time to be over", over).await;
    }
}

/// A sender with an open producer and batches without end.
async fn with_large_batches(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::with(PublisherConfig {
        batch_max_messages: 1000,
        send_timeout: Duration::from_secs(30),
        ..config(vec![broker.host()])
    });
    sender.open(TOPIC).await;
    sender
}

#[tokio::test]
async fn without_receipts_a_few_batches_are_sent_and_the_next_one_grows() {
    let broker = FakeBroker::start().await;
    let mut sender = with_large_batches(&broker).await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });

    publish_slowly(&mut sender, 30).await;
    assert_eq!(broker.count(Asked::Send), 1 + 8);

    broker.heal();
    broker.release(|_| {});
    sender.delivered().await;
    assert_eq!(broker.count(Asked::Send), 1 + 8 + 1);
    let stored = broker.stored();
    assert_eq!(stored.last().map(|event| event.batch), Some(30 - 8));
    sender.assert_exactly_once(&stored);
}

#[tokio::test]
async fn one_receipt_lets_one_batch_go() {
    let broker = FakeBroker::start().await;
    let mut sender = with_large_batches(&broker).await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    publish_slowly(&mut sender, 10).await;
    assert_eq!(broker.count(Asked::Send), 1 + 8);

    // The oldest gets its receipt; the others' are lost.
    broker.release(|held| held.truncate(1));
    let one_more = || broker.count(Asked::Send) == 1 + 8 + 1;
    sender.until("one more batch", one_more).await;
    publish_slowly(&mut sender, 3).await;
    assert_eq!(broker.count(Asked::Send), 1 + 8 + 1);
    assert_eq!(sender.publisher.in_flight().0, 10 - 1 + 3);
}

#[tokio::test]
async fn what_comes_while_the_broker_is_away_is_one_batch_when_it_is_back() {
    let log = Log::capture();
    let mut broker = FakeBroker::start().await;
    let mut sender = with_large_batches(&broker).await;
    broker.stop().await;
    sender.publish(TOPIC, "key");
    let missed = || log.warns(&["cannot publish yet"]);
    sender.until("a warning", missed).await;

    publish_slowly(&mut sender, 30).await;
    broker.start_again().await;
    sender.delivered().await;

    let stored = broker.stored();
    let largest = stored.iter().map(|event| event.batch).max();
    assert!(largest >= Some(30), "{stored:#?}");
    sender.assert_exactly_once(&stored);
}

#[tokio::test]
async fn a_frame_with_a_checksum_error_is_sent_again_byte_for_byte() {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let fail = Reaction::Fail(ServerError::ChecksumError);
    broker.script(Asked::Send, [fail]);

    sender.publish(TOPIC, "key");
    sender.delivered().await;

    let frames = broker.frames();
    assert_eq!(frames.len(), 3);
    assert_eq!(entry(&frames[1]), entry(&frames[2]));
    assert!(log.warns(&[TOPIC, &reason(ServerError::ChecksumError)]));
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_checksum_error_in_front_of_frames_that_were_stored_loses_nothing() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let fail = Reaction::Fail(ServerError::ChecksumError);
    broker.script(Asked::Send, [fail]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    // What stood behind the damaged frame is stored before it, and again after it: the last arrivals are in order.
    let stored = broker.stored();
    let published = (0..=EVENTS).map(|n| format!("row-{n}"));
    let published: Vec<String> = published.collect();
    let last = stored.len().checked_sub(EVENTS).expect("all are there");
    assert_eq!(ids(&stored[last..]), published[1..]);
    assert_eq!(stored.len(), 1 + 2 * EVENTS - EVENTS / BATCHES);
}

#[tokio::test]
async fn a_checksum_error_in_front_of_frames_that_were_stored_loses_nothing_where_the_broker_deduplicates()
 {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    let fail = Reaction::Fail(ServerError::ChecksumError);
    broker.script(Asked::Send, [fail]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    // Under the same name the broker takes the damaged frame for a duplicate: its ids are below those behind it.
    let stored = broker.stored();
    let arrived: HashSet<&str> = ids(&stored).into_iter().collect();
    assert_eq!(arrived.len(), EVENTS + 1, "events are lost");
}

/// A send is refused for a reason that concerns its whole topic, and what stands behind it is stored: fresh lookup, fresh
/// producer, everything again in order.
async fn is_sent_again(error: ServerError) {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, [Reaction::Fail(error)]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert!(broker.count(Asked::Lookup) >= 2, "no fresh lookup");
    assert!(broker.count(Asked::Producer) >= 2, "no fresh producer");
    assert!(log.warns(&[TOPIC, &reason(error)]));
    // The last arrivals are in order, whatever was stored behind the refused batch before.
    let stored = broker.stored();
    let published: Vec<String> = (1..=EVENTS).map(|n| format!("row-{n}")).collect();
    let last = stored.len().checked_sub(EVENTS).expect("all are there");
    assert_eq!(ids(&stored[last..]), published);
}

#[tokio::test]
async fn service_not_ready_on_send_leads_to_a_fresh_lookup_and_a_resend_in_order() {
    is_sent_again(ServerError::ServiceNotReady).await;
}

#[tokio::test]
async fn a_persistence_error_leads_to_a_fresh_lookup_and_a_resend_in_order() {
    is_sent_again(ServerError::PersistenceError).await;
}

#[tokio::test]
async fn an_error_on_send_that_nobody_foresaw_leads_to_a_resend_in_order() {
    is_sent_again(ServerError::UnknownError).await;
}

#[tokio::test]
async fn a_write_that_fails_closes_the_producer_and_everything_is_sent_again_in_order() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, [Reaction::FailWrite]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::Lookup), 2, "no fresh lookup");
    assert_eq!(broker.count(Asked::Producer), 2, "no fresh producer");
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_topic_that_is_fenced_for_a_while_gets_everything_again_in_order() {
    // GIVEN three batches that meet a fenced topic
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.set(TOPIC, |topic| topic.fenced = true);
    sender.publish_many(TOPIC, "key", EVENTS);
    let refused = || broker.count(Asked::Send) > BATCHES;
    sender.until("the batches to be refused", refused).await;

    // WHEN the producer was refused as well, and the topic is free again
    let refused = || broker.count(Asked::Producer) >= 2;
    sender.until("another producer", refused).await;
    assert!(log.warns(&[TOPIC, "fenced"]), "{}", log.text());
    broker.set(TOPIC, |topic| topic.fenced = false);

    // THEN everything is there once
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

/// Three batches are handed to storage, which does not answer before the connection breaks: their fate is unknown.
async fn a_write_pends_and_then(written: bool) {
    // GIVEN a broker that deduplicates
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Pend; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) > BATCHES;
    sender.until("the batches to be sent", sent).await;

    // WHEN they come again while the broker does not know, it says PersistenceError
    broker.disconnect();
    let again = || broker.count(Asked::Producer) >= 4;
    sender.until("several attempts", again).await;
    assert_eq!(broker.stored().len(), 1);
    assert_eq!(sender.publisher.in_flight().0, EVENTS);

    // THEN whether the writes succeed in the end or fail, everything is there once
    broker.settle(written);
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn batches_pushed_but_not_known_to_be_stored_are_there_once_when_their_write_succeeds() {
    a_write_pends_and_then(true).await;
}

#[tokio::test]
async fn batches_pushed_but_not_known_to_be_stored_are_there_once_when_their_write_fails() {
    a_write_pends_and_then(false).await;
}

#[tokio::test]
async fn a_send_that_is_not_allowed_is_an_error_that_names_the_row() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let fail = Reaction::Fail(ServerError::NotAllowedError);
    broker.script(Asked::Send, [fail]);

    let row = sender.publish(TOPIC, "key");
    let error = sender
        .serve_until("an error", |_| false)
        .await
        .expect_err("refused");

    assert_eq!(error.exit_code(), 69);
    let words = [&row, TOPIC, &reason(ServerError::NotAllowedError)];
    for word in words {
        assert!(error.report().contains(word), "{}", error.report());
    }
    assert_eq!(sender.publisher.in_flight().0, 1, "it was given up");
    assert_eq!(broker.stored().len(), 1);
}

#[tokio::test]
async fn a_message_above_the_brokers_limit_is_an_error_that_names_its_bytes_and_the_limit() {
    const LIMIT: usize = 2000;
    let broker = FakeBroker::start().await;
    broker.limit(2000);
    let mut sender = opened(&broker).await;

    let taken = sender.try_publish(TOPIC, "key", &[b'x'; LIMIT]);
    let error = taken.expect_err("too large");
    assert_eq!(error.exit_code(), 69);
    let text = error.to_string();
    assert!(text.contains("accepts at most 2000"), "{text}");
    let number = |word: &str| word.parse::<usize>().ok();
    let bytes = text.split(' ').find_map(number).expect("a number");
    assert!((LIMIT..LIMIT + 200).contains(&bytes), "{text}");

    // Batches keep to it as well: the fake broker complains about any that does not.
    for _ in 0..EVENTS {
        let taken = sender.try_publish(TOPIC, "key", &[b'x'; LIMIT / 4]);
        taken.expect("small enough");
    }
    sender.delivered().await;
    let stored = broker.stored();
    assert!(stored.iter().any(|event| event.batch > 1), "no batch");
    sender.assert_exactly_once(&stored);
}

#[tokio::test]
async fn a_message_above_the_limit_that_is_the_first_of_its_topic_is_an_error_too() {
    let broker = FakeBroker::start().await;
    broker.limit(2000);
    let mut sender = Sender::to(&broker).await;

    // Whether at once or when the topic's partitions are known.
    let taken = sender.try_publish(TOPIC, "key", &[b'x'; 2000]);
    let served = match taken {
        Ok(()) => sender.serve_until("an error", |_| false).await,
        refused => refused,
    };

    let error = served.expect_err("too large");
    assert!(
        error.report().contains("accepts at most 2000"),
        "{}",
        error.report()
    );
    assert_eq!(broker.stored(), []);
}

#[tokio::test]
async fn receipts_out_of_order_end_the_producer_and_everything_is_sent_again_in_order() {
    // GIVEN three batches whose receipts are held
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Hold; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;

    // WHEN the receipt for the last one comes, and none before it
    broker.release(|held| drop(held.drain(..BATCHES - 1)));
    sender.delivered().await;

    // THEN all three were sent again by a new producer, and the connection is kept for others
    assert_eq!(broker.connections(), 1);
    assert!(log.warns(&["a receipt out of order"]));
    let frames = broker.frames();
    let entries: Vec<&[u8]> = frames[1..].iter().map(|frame| entry(frame)).collect();
    assert_eq!(entries[..BATCHES], entries[BATCHES..]);
    let stored = broker.stored();
    assert_eq!(sender.assert_at_least_once(&stored), EVENTS);
    let stored = &ids(&stored)[1..];
    assert_eq!(stored[..EVENTS], stored[EVENTS..], "not in order again");
}

#[tokio::test]
async fn receipts_in_reverse_lose_nothing_where_the_broker_deduplicates() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Hold; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;

    broker.release(|held| held.reverse());
    sender.delivered().await;

    // The first one's receipt came last; nobody can say whether the others were stored: they come again under another name.
    assert_eq!(broker.connections(), 1);
    let repeats = sender.assert_at_least_once(&broker.stored());
    assert_eq!(repeats, EVENTS - EVENTS / BATCHES);
}

#[tokio::test]
async fn a_receipt_for_a_batch_that_has_one_is_ignored() {
    // GIVEN a batch with its receipt, and one without
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, [Reaction::Hold]);
    sender.publish(TOPIC, "key");
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the second batch to be sent", sent).await;

    // WHEN the first one's receipt comes again
    let sends = broker.seen(Asked::Send);
    let first = sends[0].send.as_ref().expect("a send");
    broker.say_receipt(first.producer_id, first.sequence_id);
    broker.ping();
    let heard = || broker.count(Asked::Pong) == 1;
    sender.until("an answer to a later ping", heard).await;

    // THEN it counts for nothing
    assert_eq!(sender.publisher.in_flight().0, 1);
    broker.release(|_| {});
    sender.delivered().await;
    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_receipt_that_never_comes_is_waited_for_until_the_send_deadline_and_then_asked_for_anew()
{
    let log = Log::capture();
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Lose; BATCHES]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert!(log.warns(&["no receipt on", TOPIC]), "{}", log.text());
    assert_eq!(broker.connections(), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn without_deduplication_a_lost_receipt_leads_to_a_repetition_from_that_batch_on() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Lose; BATCHES]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    let stored = broker.stored();
    assert_eq!(sender.assert_at_least_once(&stored), EVENTS);
    let stored = &ids(&stored)[1..];
    assert_eq!(stored[..EVENTS], stored[EVENTS..], "not in order again");
}

/// The process is killed while the fate of three batches is not known to it, and starts again with batches of another size.
async fn killed_with(reaction: Reaction, written: bool) {
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![reaction; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) > BATCHES;
    sender.until("the batches to be sent", sent).await;

    sender.restart(7);
    sender.publish_many(TOPIC, "key", EVENTS);
    let again = || broker.count(Asked::Producer) >= 2;
    sender.until("a new producer", again).await;
    broker.settle(written);

    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn after_a_restart_batches_that_were_stored_without_a_receipt_are_not_stored_again() {
    killed_with(Reaction::Lose, true).await;
}

#[tokio::test]
async fn after_a_restart_batches_that_were_dropped_are_stored() {
    killed_with(Reaction::Ignore, true).await;
}

#[tokio::test]
async fn after_a_restart_batches_whose_write_pends_are_stored_once_when_it_succeeds() {
    killed_with(Reaction::Pend, true).await;
}

#[tokio::test]
async fn after_a_restart_batches_whose_write_pends_are_stored_once_when_it_fails() {
    killed_with(Reaction::Pend, false).await;
}
