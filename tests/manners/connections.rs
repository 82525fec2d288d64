//! Connections: pings, challenges, silence, broken frames, brokers that are away.

use std::time::{Duration, Instant};

use pulsar::message::proto::ServerError;
use walpost::pulsar::PublisherConfig;

use super::sender::{Log, SEND_TIMEOUT, Sender, config};
use super::support::{Asked, FakeBroker, Reaction};
use super::{OTHER, TOPIC};

const EVENTS: usize = 30;
const BATCHES: usize = 3;

async fn opened(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::to(broker).await;
    sender.open(TOPIC).await;
    sender
}

#[tokio::test]
async fn a_ping_is_answered() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;

    for count in 1..=3 {
        broker.ping();
        let answered = || broker.count(Asked::Pong) == count;
        sender.until("PONG", answered).await;
    }
    assert_eq!(broker.connections(), 1);
}

#[tokio::test]
async fn a_challenge_instead_of_connected_is_answered() {
    let broker = FakeBroker::start().await;
    broker.script(Asked::Connect, [Reaction::Challenge]);
    let mut sender = opened(&broker).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert_eq!(broker.count(Asked::AuthResponse), 1);
    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_challenge_while_events_flow_is_answered_and_disturbs_nothing() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let connect = &broker.seen(Asked::Connect)[0];
    let flags = connect.connect.as_ref().and_then(|c| c.feature_flags);
    assert_eq!(
        flags.and_then(|flags| flags.supports_auth_refresh),
        Some(true),
        "a broker challenges only who says that it can be challenged"
    );

    for count in 1..=3 {
        sender.publish_many(TOPIC, "key", EVENTS);
        broker.challenge();
        let answered = || broker.count(Asked::AuthResponse) == count;
        sender.until("AUTH_RESPONSE", answered).await;
    }
    sender.delivered().await;

    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

/// Something on the wire ends the connection while three batches have no receipt; they are sent again.
async fn broken_by(what: &str, bytes: &[u8]) {
    let log = Log::capture();
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Hold; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;

    broker.say(bytes);
    sender.delivered().await;

    assert!(
        log.warns(&["broker connection ended", what]),
        "{}",
        log.text()
    );
    assert_eq!(broker.connections(), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn garbage_from_the_broker_leads_to_a_new_connection() {
    broken_by("impossible size", b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
}

#[tokio::test]
async fn a_frame_too_small_to_be_one_leads_to_a_new_connection() {
    broken_by("impossible size", &[0, 0, 0, 2, 7, 7]).await;
}

#[tokio::test]
async fn a_command_larger_than_its_frame_leads_to_a_new_connection() {
    broken_by("impossible size", &[0, 0, 0, 8, 0, 0, 0, 99, 1, 2, 3, 4]).await;
}

#[tokio::test]
async fn a_frame_that_holds_no_command_leads_to_a_new_connection() {
    let frame = [0, 0, 0, 8, 0, 0, 0, 4, 255, 255, 255, 255];
    broken_by("no command", &frame).await;
}

/// The reaction to the first command of a kind ends the connection; everything arrives once all the same.
async fn survives(asked: Asked, reaction: Reaction) {
    let broker = FakeBroker::start_deduplicating().await;
    broker.script(asked, [reaction]);
    let mut sender = Sender::new(vec![broker.host()]);

    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;

    assert_eq!(broker.connections(), 2, "{asked:?}");
    sender.assert_exactly_once(&broker.stored());
}

const STEPS: [Asked; 5] = [
    Asked::Connect,
    Asked::Partitions,
    Asked::Lookup,
    Asked::Producer,
    Asked::Send,
];

#[tokio::test]
async fn a_connection_that_ends_before_any_step_is_obeyed_is_made_again() {
    for asked in STEPS {
        survives(asked, Reaction::Close).await;
    }
}

#[tokio::test]
async fn a_connection_that_ends_before_any_steps_answer_is_made_again() {
    for asked in STEPS {
        survives(asked, Reaction::ObeyAndClose).await;
    }
}

#[tokio::test]
async fn a_connection_that_ends_in_the_middle_of_any_steps_answer_is_made_again() {
    for asked in STEPS {
        survives(asked, Reaction::CutShort).await;
    }
}

#[tokio::test]
async fn something_that_is_no_broker_at_the_address_is_asked_again() {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let other = Reaction::Say(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    broker.script(Asked::Connect, [other]);
    let mut sender = Sender::new(vec![broker.host()]);

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert!(log.warns(&["does not speak Pulsar"]), "{}", log.text());
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_broker_that_refuses_connections_for_a_while_is_backpressure_and_no_error() {
    // GIVEN a broker that goes away while batches are under way
    let log = Log::capture();
    let mut broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, vec![Reaction::Hold; BATCHES]);
    sender.publish_many(TOPIC, "key", EVENTS);
    let sent = || broker.count(Asked::Send) == 1 + BATCHES;
    sender.until("the batches to be sent", sent).await;
    broker.stop().await;

    // WHEN it is missed, and more comes meanwhile
    let missed = || log.warns(&["cannot publish yet", "cannot reach the Pulsar broker"]);
    sender.until("a warning", missed).await;
    sender.publish_many(TOPIC, "key", EVENTS);
    sender.publish_many(TOPIC, "another", EVENTS);
    assert_eq!(sender.publisher.in_flight().0, 3 * EVENTS);

    // THEN everything is there when it comes back
    broker.start_again().await;
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_broker_that_falls_silent_with_batches_under_way_is_left_after_the_send_deadline() {
    // GIVEN a broker that stops reading while the connection stays
    let log = Log::capture();
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.stall(true);
    sender.publish_many(TOPIC, "key", EVENTS);

    // WHEN the deadline has passed
    let noticed = || log.warns(&["broker connection ended", "no receipt on", TOPIC]);
    sender.until("the silence to be noticed", noticed).await;
    assert_eq!(sender.publisher.in_flight().0, EVENTS);

    // THEN a new connection takes everything, when the broker is back
    broker.stall(false);
    sender.delivered().await;
    assert!(broker.connections() >= 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_broker_that_takes_batches_slowly_and_steadily_is_not_left() {
    // GIVEN more batches on two topics than get their receipts within the send deadline
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    sender.publish(OTHER, "key");
    sender.delivered().await;
    broker.script(Asked::Send, vec![Reaction::Hold; BATCHES * 4 + 1]);
    sender.publish_many(TOPIC, "key", EVENTS * 4);
    let sent = || broker.count(Asked::Send) == 2 + BATCHES * 4;
    sender.until("the batches to be sent", sent).await;
    // Its only batch is the last in line.
    sender.publish(OTHER, "key");
    let sent = || broker.count(Asked::Send) == 2 + BATCHES * 4 + 1;
    sender.until("the last one to be sent", sent).await;

    // WHEN the receipts come one by one
    let began = Instant::now();
    for _ in 0..=BATCHES * 4 {
        let before = Instant::now();
        let over = || before.elapsed() > SEND_TIMEOUT / 5;
        sender.until("the next receipt to be due", over).await;
        assert!(broker.release_one(), "everything was sent anew");
    }
    sender.delivered().await;

    // THEN the connection is kept
    assert!(began.elapsed() > SEND_TIMEOUT * 2);
    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn receipts_of_another_topic_do_not_hide_that_one_gets_none() {
    // GIVEN a batch whose receipt is lost
    let log = Log::capture();
    let broker = FakeBroker::start_deduplicating().await;
    let mut sender = opened(&broker).await;
    broker.script(Asked::Send, [Reaction::Lose]);
    sender.publish(TOPIC, "key");
    let sent = || broker.count(Asked::Send) == 2;
    sender.until("the batch to be sent", sent).await;

    // WHEN what another topic is sent later gets its receipts
    let end = Instant::now() + SEND_TIMEOUT * 10;
    while !log.warns(&["no receipt on", TOPIC]) {
        assert!(Instant::now() < end, "not noticed");
        sender.publish(OTHER, "key");
        let published = Instant::now();
        let over = || published.elapsed() > SEND_TIMEOUT / 20;
        sender.until("the next event", over).await;
    }

    // THEN the first one is sent anew all the same
    sender.delivered().await;
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn an_error_that_answers_no_request_is_survived() {
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    // The answer to a request that nobody waits for any more looks the same.
    broker.script(Asked::Pong, [Reaction::Fail(ServerError::UnknownError)]);
    broker.ping();
    let answered = || broker.count(Asked::Pong) == 1;
    sender.until("PONG", answered).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

/// A publisher that notices silence after a few tenths of a second.
async fn impatient(broker: &FakeBroker) -> Sender {
    let mut sender = Sender::with(PublisherConfig {
        keepalive_interval: Duration::from_millis(100),
        ..config(vec![broker.host()])
    });
    sender.open(TOPIC).await;
    sender
}

#[tokio::test]
async fn a_quiet_connection_is_pinged_and_kept() {
    let broker = FakeBroker::start().await;
    let mut sender = impatient(&broker).await;

    let pinged = || broker.count(Asked::Ping) >= 5;
    sender.until("pings", pinged).await;
    sender.publish(TOPIC, "key");
    sender.delivered().await;

    assert_eq!(broker.connections(), 1);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_half_open_connection_is_noticed_although_nothing_is_under_way() {
    // GIVEN a connection with nothing under way, whose far side has gone without a word
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let mut sender = impatient(&broker).await;
    broker.stall(true);

    // WHEN it was silent for too long, it is left
    let noticed = || log.warns(&["broker connection ended", "silent"]);
    sender.until("the silence to be noticed", noticed).await;

    // THEN the next event goes over a new one
    broker.stall(false);
    sender.publish_many(TOPIC, "key", EVENTS);
    sender.delivered().await;
    assert_eq!(broker.connections(), 2);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn a_producer_whose_send_was_refused_as_its_connection_ended_is_opened_again_at_once() {
    // GIVEN a publisher that has an error for a send before it, and knows not yet that the connection is gone
    let broker = FakeBroker::start().await;
    let mut sender = opened(&broker).await;
    let fail = Reaction::Fail(ServerError::PersistenceError);
    broker.script(Asked::Send, [fail]);
    sender.publish(TOPIC, "key");
    let refused = || broker.count(Asked::Send) == 2;
    sender.until("the send", refused).await;
    broker.disconnect();

    // WHEN the producer on the dead connection should be closed first
    let before = Instant::now();
    sender.delivered().await;

    // THEN nobody waits for that connection's answer (a request has 30 s)
    assert!(before.elapsed() < Duration::from_secs(10));
    sender.assert_exactly_once(&broker.stored());
}
