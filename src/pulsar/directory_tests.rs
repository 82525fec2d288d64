//! Against peers of the test's own (see `peer`).

use bytes::BytesMut;
use pulsar::message::proto::ServerError;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpListener;

use super::super::peer::{Peer, connected, manner, read_command};
use super::*;

/// Short, so that a test of silence is short. An answer that takes longer only costs another attempt.
const SHORT: Duration = Duration::from_millis(200);
const ATTEMPTS: usize = 50;
const TOPIC: &str = "persistent://public/default/orders";

fn directory(peers: &[&Peer]) -> (Directory, mpsc::Receiver<Event>) {
    let service = peers.iter().map(|peer| peer.host()).collect();
    let (sender, events) = mpsc::channel(64);
    let mut directory = Directory::new(service, manner(), sender);
    directory.request_timeout = SHORT;
    (directory, events)
}

/// Asks until there is an answer; how many attempts failed.
async fn failures_before_an_answer(directory: &Directory) -> usize {
    for failures in 0..ATTEMPTS {
        if directory.partitions_of(TOPIC, true).await.is_ok() {
            return failures;
        }
    }
    panic!("no answer in {ATTEMPTS} attempts");
}

#[tokio::test]
async fn a_host_that_answers_pings_and_no_questions_is_passed_over() {
    // GIVEN a connection to a host that keeps its connections and answers nothing else
    let silent = Peer::start(|_, command| command.connect.is_some() || command.ping.is_some());
    let well = Peer::start(|_, _| true);
    let (directory, _events) = directory(&[&silent, &well]);
    let (connection, endpoint) = directory.service().await.unwrap();
    assert_eq!(endpoint.port, silent.host().1);

    // WHEN it is asked
    assert_eq!(failures_before_an_answer(&directory).await, 1);

    // THEN the answer is the other one's, and later questions go there at once
    let asked = silent.questions();
    failures_before_an_answer(&directory).await;
    assert_eq!(silent.questions(), asked);
    assert!(well.questions() > 0);
    // AND what is open on the first connection stays
    assert!(!connection.is_closed());
}

#[tokio::test]
async fn an_address_that_gave_no_answer_is_connected_to_again() {
    // GIVEN one address, and the connection that was made first has a peer that answers no question
    let address = Peer::start(|connection, command| {
        connection > 0 || command.connect.is_some() || command.ping.is_some()
    });
    let (directory, _events) = directory(&[&address]);
    let (first, _) = directory.service().await.unwrap();

    // WHEN it is asked
    assert!(failures_before_an_answer(&directory).await > 0);

    // THEN another connection answers, and the first one stays for those who use it
    let (second, _) = directory.service().await.unwrap();
    assert_ne!(first.id(), second.id());
    assert!(!first.is_closed());
}

#[tokio::test]
async fn hosts_that_cannot_be_connected_to_are_passed_over_once() {
    let gone = Peer::start(|_, _| true);
    let well = Peer::start(|_, _| true);
    let (directory, _events) = directory(&[&gone, &well]);
    gone.stop().await;

    for _ in 0..3 {
        let (_, endpoint) = directory.service().await.unwrap();
        assert_eq!(endpoint.port, well.host().1);
    }
    assert_eq!(directory.turn.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_attempt_to_reach_a_host_goes_on_when_nobody_waits_for_it() {
    // GIVEN a host that answers only after somebody who asked has given up
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let service = vec![(
        "127.0.0.1".to_owned(),
        listener.local_addr().unwrap().port(),
    )];
    let (sender, _events) = mpsc::channel(64);
    let directory = Arc::new(Directory::new(service, manner(), sender));
    let mut attempt = ServiceAttempt::default();
    let mut inbox = BytesMut::new();
    let greeted = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let asked = read_command(&mut stream, &mut inbox).await.unwrap();
        assert!(asked.connect.is_some());
        stream
    };
    let mut stream = tokio::select! {
        _early = attempt.service(&directory) => panic!("nobody has answered"),
        stream = greeted => stream,
    };

    // WHEN it answers, and answers nobody else
    stream.write_all(&connected(1024 * 1024)).await.unwrap();

    // THEN who asks next has that connection
    let (connection, _) = attempt.service(&directory).await.unwrap();
    assert_eq!(connection.id(), 1);
    // AND who asks again
    let (connection, _) = attempt.service(&directory).await.unwrap();
    assert_eq!(connection.id(), 1);
}

#[test]
fn what_a_host_says_of_a_topic_is_no_reason_to_ask_another() {
    let (sender, _events) = mpsc::channel(1);
    let service = vec![("a".to_owned(), 1), ("b".to_owned(), 1)];
    let directory = Directory::new(service, manner(), sender);
    let host = directory.next_host();
    let turn = || directory.turn.load(Ordering::Relaxed);
    let say = |code: ServerError| {
        let said = verdict::of_open(TOPIC, Some(code as i32), Some("no"));
        directory.judge::<()>(&host, Err(said)).unwrap_err();
    };

    // WHEN one topic does not exist, and another is not ready while others are
    for _ in 0..2 * MAX_UNCLEAR {
        say(ServerError::TopicNotFound);
        say(ServerError::ServiceNotReady);
        directory.judge(&host, Ok(())).unwrap();
    }
    // THEN the host stays
    assert_eq!(turn(), 0);

    // WHEN it says nothing else any more THEN another is asked
    for _ in 0..MAX_UNCLEAR {
        assert_eq!(turn(), 0);
        say(ServerError::ServiceNotReady);
    }
    assert_eq!(turn(), 1);

    // WHEN one does not answer THEN another is, at once
    let host = directory.next_host();
    let silent = Error::temporary("the broker does not answer");
    directory.judge::<()>(&host, Err(silent)).unwrap_err();
    assert_eq!(turn(), 2);
}

#[tokio::test]
async fn a_shard_has_a_connection_of_its_own() {
    let broker = Peer::start(|_, _| true);
    let (directory, _events) = directory(&[&broker]);
    let next = NextBroker {
        url: Some(format!("pulsar://127.0.0.1:{}", broker.host().1)),
        ..NextBroker::default()
    };
    let mut ids = Vec::new();
    for shard in [SHARED, 1, 2, 1, SHARED] {
        let connection = directory.next_broker(TOPIC, &next, shard).await.unwrap();
        ids.push(connection.id());
        // Kept open by somebody, as a producer would.
        std::mem::forget(connection);
    }
    assert_eq!((ids[0], ids[1]), (ids[4], ids[3]));
    assert_eq!(
        ids.iter().collect::<std::collections::HashSet<_>>().len(),
        3
    );
}

#[test]
fn lookup_answers_name_an_endpoint() {
    let service = Endpoint {
        host: "proxy".into(),
        port: 1,
        via_proxy_to: None,
    };
    let direct = endpoint_of("pulsar://10.0.0.1:6650", false, false, &service).unwrap();
    assert_eq!(
        direct,
        Endpoint {
            host: "10.0.0.1".into(),
            port: 6650,
            via_proxy_to: None
        }
    );
    let six = endpoint_of("pulsar://[::1]:6650", false, false, &service).unwrap();
    assert_eq!(six.host, "::1");
    let proxied = endpoint_of("pulsar://broker-3:6650", false, true, &service).unwrap();
    assert_eq!(
        proxied,
        Endpoint {
            via_proxy_to: Some("broker-3:6650".into()),
            ..service.clone()
        }
    );
    for odd in ["", "http://x:1", "pulsar://x", "pulsar://x:y"] {
        assert!(endpoint_of(odd, false, false, &service).is_err(), "{odd}");
    }
    let encrypted = endpoint_of("pulsar+ssl://broker-3:6651", true, false, &service).unwrap();
    assert_eq!((&*encrypted.host, encrypted.port), ("broker-3", 6651));
    assert!(endpoint_of("pulsar://broker-3:6650", true, false, &service).is_err());
    assert!(endpoint_of("pulsar+ssl://broker-3:6651", false, false, &service).is_err());
}
