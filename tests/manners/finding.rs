//! Finding a topic's broker: service URL, lookup, redirects, proxies.

use std::time::{Duration, Instant};

use pulsar::message::proto::ServerError;

use super::TOPIC;
use super::sender::{Log, Sender};
use super::support::{Asked, FakeBroker, Reaction, Target, reason};

/// What a broker is given to answer CONNECT.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

fn redirect(to: &FakeBroker, authoritative: bool) -> Reaction {
    Reaction::LookAt(Target {
        url: to.url(),
        redirect: true,
        authoritative,
        through_service_url: false,
    })
}

/// Two brokers; the first redirects once to the second. Returns the flag that the second was asked with.
async fn follow_a_redirect(authoritative: bool) -> bool {
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    first.script(Asked::Lookup, [redirect(&second, authoritative)]);
    let mut sender = Sender::to(&first).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    sender.assert_exactly_once(&first.stored());
    assert_eq!(first.count(Asked::Producer), 0, "opened where it was not");
    assert_eq!(second.count(Asked::Producer), 1);
    let asked = second.seen(Asked::Lookup);
    assert_eq!(asked.len(), 1);
    let lookup = asked[0].lookup_topic.as_ref().expect("a lookup");
    assert_eq!(lookup.topic, TOPIC);
    lookup.authoritative.unwrap_or_default()
}

#[tokio::test]
async fn a_redirect_is_followed_and_its_authoritative_flag_passed_on() {
    assert!(follow_a_redirect(true).await);
}

#[tokio::test]
async fn a_redirect_that_is_not_authoritative_is_followed_as_such() {
    assert!(!follow_a_redirect(false).await);
}

#[tokio::test]
async fn a_topic_that_is_at_another_broker_is_published_there() {
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    let there = Target {
        url: second.url(),
        redirect: false,
        authoritative: true,
        through_service_url: false,
    };
    first.script(Asked::Lookup, [Reaction::LookAt(there)]);
    let mut sender = Sender::to(&first).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    sender.assert_exactly_once(&first.stored());
    assert_eq!(
        (first.count(Asked::Send), second.count(Asked::Lookup)),
        (0, 0)
    );
}

#[tokio::test]
async fn a_broker_that_does_not_answer_holds_up_no_topic_of_another() {
    // GIVEN two brokers; the second one takes connections and says nothing
    const STUCK: &str = "persistent://public/default/stuck";
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    second.script_rest(|_, _| Reaction::Ignore);
    let there = Target {
        url: second.url(),
        redirect: false,
        authoritative: true,
        through_service_url: false,
    };
    first.script_rest(move |_, command| {
        let lookup = command.lookup_topic.as_ref();
        if lookup.is_some_and(|lookup| lookup.topic == STUCK) {
            Reaction::LookAt(there.clone())
        } else {
            Reaction::Obey
        }
    });
    let mut sender = Sender::to(&first).await;
    sender.publish(STUCK, "key");
    let asked = || second.count(Asked::Connect) == 1;
    sender.until("the second one to be asked", asked).await;

    // WHEN an event of the first one's topics comes
    let begun = Instant::now();
    sender.publish(TOPIC, "key");
    let stored = || !first.stored().is_empty();
    sender.until("the event to be stored", stored).await;

    // THEN it has not waited until the second one was given up
    assert!(begun.elapsed() < CONNECT_TIMEOUT, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_broker_behind_a_proxy_is_reached_through_the_service_url() {
    // GIVEN a proxy (the fake broker plays both parts) and a broker whose address nobody here can reach
    let proxy = FakeBroker::start().await;
    let behind = Target {
        url: "pulsar://broker-3.cluster.invalid:6650".to_owned(),
        redirect: false,
        authoritative: true,
        through_service_url: true,
    };
    proxy.script(Asked::Lookup, [Reaction::LookAt(behind)]);
    let mut sender = Sender::to(&proxy).await;

    // WHEN an event is published
    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    // THEN a second connection to the proxy asked for that broker
    sender.assert_exactly_once(&proxy.stored());
    let asked_for = |command: pulsar::message::proto::BaseCommand| {
        command.connect.expect("CONNECT").proxy_to_broker_url
    };
    let asked: Vec<_> = proxy
        .seen(Asked::Connect)
        .into_iter()
        .map(asked_for)
        .collect();
    let behind = Some("broker-3.cluster.invalid:6650".to_owned());
    assert_eq!(asked, [None, behind]);
}

#[tokio::test]
async fn a_lookup_that_is_redirected_in_a_circle_is_tried_again_until_it_ends() {
    // GIVEN two brokers that send every lookup to the other one
    let log = Log::capture();
    let first = FakeBroker::start().await;
    let second = first.beside().await;
    let circle = |to: Reaction| {
        move |asked: Asked, _: &pulsar::message::proto::BaseCommand| match asked {
            Asked::Lookup => to.clone(),
            _ => Reaction::Obey,
        }
    };
    first.script_rest(circle(redirect(&second, true)));
    second.script_rest(circle(redirect(&first, false)));
    let mut sender = Sender::to(&first).await;

    // WHEN an event is published
    sender.publish_many(TOPIC, "key", 3);
    let warned = || log.warns(&["cannot publish yet", "was redirected 20 times"]);
    sender.until("the circle to be noticed", warned).await;
    assert!(first.count(Asked::Lookup) <= 20, "one round has an end");
    let seen = first.count(Asked::Lookup);
    let again = || first.count(Asked::Lookup) > seen;
    sender.until("another attempt", again).await;
    assert!(first.stored().is_empty());

    // THEN it arrives when the circle is broken
    second.heal();
    sender.delivered().await;
    sender.assert_exactly_once(&first.stored());
}

#[tokio::test]
async fn an_address_that_is_none_is_tried_again() {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let odd = Target {
        url: "http://broker".to_owned(),
        redirect: false,
        authoritative: true,
        through_service_url: false,
    };
    broker.script(Asked::Lookup, [Reaction::LookAt(odd)]);
    let mut sender = Sender::to(&broker).await;

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert!(log.warns(&["cannot publish yet", "http://broker"]));
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn of_two_hosts_in_the_service_url_the_dead_one_is_passed_over() {
    let mut dead = FakeBroker::start().await;
    let alive = dead.beside().await;
    dead.stop().await;
    let mut sender = Sender::new(vec![dead.host(), alive.host()]);
    let connected = sender.publisher.connect().await;
    connected.expect("the second host answers");

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    sender.assert_exactly_once(&alive.stored());
}

#[tokio::test]
async fn the_other_host_is_taken_when_the_first_one_dies_later() {
    // GIVEN two hosts, and a connection to the first
    let mut first = FakeBroker::start().await;
    let second = first.beside().await;
    let mut sender = Sender::new(vec![first.host(), second.host()]);
    sender.publish(TOPIC, "key");
    sender.delivered().await;
    assert_eq!(second.connections(), 0);

    // WHEN it dies
    first.stop().await;
    sender.publish_many(TOPIC, "key", 3);

    // THEN the rest goes to the second
    sender.delivered().await;
    sender.assert_exactly_once(&second.stored());
}

#[tokio::test]
async fn a_host_that_answers_connect_with_an_error_is_passed_over() {
    let ill = FakeBroker::start().await;
    let well = ill.beside().await;
    ill.script_rest(|asked, _| match asked {
        Asked::Connect => Reaction::Fail(ServerError::ServiceNotReady),
        _ => Reaction::Obey,
    });
    let mut sender = Sender::new(vec![ill.host(), well.host()]);

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert!(ill.count(Asked::Connect) > 0, "nobody asked");
    sender.assert_exactly_once(&well.stored());
}

#[tokio::test]
async fn hosts_that_all_answer_connect_with_an_error_are_asked_until_one_takes_it_back() {
    let log = Log::capture();
    let broker = FakeBroker::start().await;
    let fail = || Reaction::Fail(ServerError::ServiceNotReady);
    broker.script(Asked::Connect, [fail(), fail(), fail()]);
    let mut sender = Sender::new(vec![broker.host()]);

    sender.publish_many(TOPIC, "key", 3);
    sender.delivered().await;

    assert!(log.warns(&["cannot publish yet", &reason(ServerError::ServiceNotReady)]));
    assert_eq!(broker.count(Asked::Connect), 4);
    sender.assert_exactly_once(&broker.stored());
}

#[tokio::test]
async fn wrong_credentials_are_an_error_at_the_start_that_names_the_broker_and_the_setting() {
    let broker = FakeBroker::start().await;
    let refuse = Reaction::Fail(ServerError::AuthenticationError);
    broker.script(Asked::Connect, [refuse]);
    let mut sender = Sender::new(vec![broker.host()]);

    let error = sender.publisher.connect().await.expect_err("refused");

    assert_eq!(error.exit_code(), 69, "{}", error.report());
    let (_, port) = broker.host();
    let words = [
        &format!(":{port}"),
        &reason(ServerError::AuthenticationError),
        "WALPOST_PULSAR_TOKEN",
    ];
    for word in words {
        assert!(error.report().contains(word), "{}", error.report());
    }
}
