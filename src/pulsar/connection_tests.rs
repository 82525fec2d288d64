//! Against a socket that the test reads and writes by hand.

use bytes::{BufMut as _, BytesMut};
use pulsar::message::proto::{
    CommandCloseProducer, CommandPing, CommandProducer, CommandProducerSuccess, CommandSendReceipt,
    CommandSuccess, base_command::Type,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::super::peer::{connected, manner, read_command};
use super::super::wire::{BatchHeader, headroom, seal};
use super::*;

const DEADLINE: Duration = Duration::from_secs(60);
const LIMIT: i32 = 1024 * 1024;
const FRAME_BYTES: usize = 512 * 1024;
/// Frames of that size that no loopback connection has room for while its far side does not read.
const MANY_FRAMES: u64 = 64;
/// More than the connection keeps and takes in one read.
const MANY_RECEIPTS: u64 = 4000;

/// A connection, what it tells, and the broker's side of its socket.
struct Side {
    connection: Connection,
    events: mpsc::Receiver<Event>,
    stream: TcpStream,
    inbox: BytesMut,
}

async fn open(request_timeout: Duration, events: usize) -> Side {
    open_as(&manner(), request_timeout, events).await
}

async fn open_as(manner: &Manner, request_timeout: Duration, events: usize) -> Side {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        host: "127.0.0.1".to_owned(),
        port: listener.local_addr().unwrap().port(),
        via_proxy_to: None,
    };
    let (sender, events) = mpsc::channel(events);
    let connecting = Connection::open_within(request_timeout, (&endpoint, 0), 1, manner, sender);
    let accepting = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut inbox = BytesMut::new();
        let asked = read_command(&mut stream, &mut inbox).await.unwrap();
        assert!(asked.connect.is_some());
        stream.write_all(&connected(LIMIT)).await.unwrap();
        (stream, inbox)
    };
    let (connection, (stream, inbox)) = tokio::join!(connecting, accepting);
    Side {
        connection: connection.unwrap(),
        events,
        stream,
        inbox,
    }
}

impl Side {
    /// The next command that the connection sends.
    async fn next(&mut self) -> BaseCommand {
        let command = read_command(&mut self.stream, &mut self.inbox);
        let command = timeout(DEADLINE, command).await.expect("a command in time");
        command.expect("the connection is open")
    }

    async fn next_event(&mut self) -> Event {
        let event = timeout(DEADLINE, self.events.recv()).await;
        event
            .expect("an event in time")
            .expect("the connection lives")
    }

    async fn say(&mut self, command: &BaseCommand) {
        let frame = encode_command(command);
        let saying = timeout(DEADLINE, self.stream.write_all(&frame)).await;
        saying.expect("room in time").expect("an open socket");
    }
}

/// A batch of about so many bytes.
fn batch(producer_id: u64, sequence_id: u64, bytes: usize) -> Bytes {
    let header = BatchHeader {
        producer_id,
        producer_name: "p",
        ordering_key: &[0],
        lowest_sequence_id: sequence_id,
        highest_sequence_id: sequence_id,
        messages: 1,
        publish_time_ms: 1,
        deliver_at_ms: None,
        schema_version: None,
        compressed: None,
    };
    let gap = headroom("p", &[0]);
    seal(BytesMut::zeroed(gap + bytes), gap, &header, &mut Vec::new())
}

fn create(producer_id: u64, request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::Producer as i32,
        producer: Some(CommandProducer {
            topic: "orders".to_owned(),
            producer_id,
            request_id,
            ..CommandProducer::default()
        }),
        ..BaseCommand::default()
    }
}

fn lookup(request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::Lookup as i32,
        lookup_topic: Some(pulsar::message::proto::CommandLookupTopic {
            topic: "orders".to_owned(),
            request_id,
            ..Default::default()
        }),
        ..BaseCommand::default()
    }
}

fn success(request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::Success as i32,
        success: Some(CommandSuccess {
            request_id,
            ..CommandSuccess::default()
        }),
        ..BaseCommand::default()
    }
}

fn receipt(sequence_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::SendReceipt as i32,
        send_receipt: Some(CommandSendReceipt {
            producer_id: 1,
            sequence_id,
            ..CommandSendReceipt::default()
        }),
        ..BaseCommand::default()
    }
}

fn ping_command() -> BaseCommand {
    BaseCommand {
        r#type: Type::Ping as i32,
        ping: Some(CommandPing {}),
        ..BaseCommand::default()
    }
}

#[tokio::test]
async fn the_end_of_a_producer_is_told_behind_its_receipts_also_where_the_connection_ends() {
    // GIVEN a publisher that has room for one event, a producer that is to be closed, and a question
    const RECEIPTS: u64 = 5;
    let mut side = open(REQUEST_TIMEOUT, 1).await;
    let closing = side.connection.clone();
    let closed = tokio::spawn(async move { closing.request(|id| close_producer(1, id)).await });
    assert!(side.next().await.close_producer.is_some());
    let asking = side.connection.clone();
    let asked = tokio::spawn(async move { asking.request(lookup).await });
    assert!(side.next().await.lookup_topic.is_some());

    // WHEN the broker sends receipts and ends the connection without an answer
    for sequence_id in 0..RECEIPTS {
        side.say(&receipt(sequence_id)).await;
    }
    side.stream.shutdown().await.unwrap();

    // THEN the question ends, and the CLOSE not before the receipts and the end were heard
    let asked = timeout(DEADLINE, asked).await.expect("in time");
    asked.unwrap().unwrap_err();
    assert!(side.connection.is_closed());
    for expected in 0..RECEIPTS {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!closed.is_finished(), "before receipt {expected}");
        match side.next_event().await {
            Event::Receipt { sequence_id, .. } => assert_eq!(sequence_id, expected),
            other => panic!("{other:?}"),
        }
    }
    let ended = side.next_event().await;
    assert!(matches!(ended, Event::Disconnected { .. }), "{ended:?}");
    let closed = timeout(DEADLINE, closed).await.expect("in time");
    closed.unwrap().unwrap_err();
}

#[tokio::test]
async fn requests_and_answers_to_pings_go_before_the_data_of_other_producers() {
    // GIVEN a broker that does not read, and more data than its socket takes
    let mut side = open(REQUEST_TIMEOUT, 16).await;
    for sequence_id in 0..MANY_FRAMES {
        side.connection
            .send_data(1, batch(1, sequence_id, FRAME_BYTES));
    }
    assert!(side.connection.unwritten_bytes() > 0);

    // WHEN a producer is to be opened and this one to be closed, and the broker pings
    let opening = side.connection.clone();
    let opened = tokio::spawn(async move { opening.request(|id| create(2, id)).await });
    let closing = side.connection.clone();
    let closed = tokio::spawn(async move { closing.request(|id| close_producer(1, id)).await });
    side.say(&ping_command()).await;
    // All of that is queued when the tasks have had their turns.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }

    // THEN the broker reads them before the last data, and the end of the producer behind its data
    let (mut sent, mut created_after, mut ponged_after) = (0, None, None);
    let request_id = loop {
        let command = side.next().await;
        if let Some(send) = command.send {
            assert_eq!(send.sequence_id, sent);
            sent += 1;
        } else if let Some(producer) = command.producer {
            created_after = Some(sent);
            side.say(&success(producer.request_id)).await;
        } else if command.pong.is_some() {
            ponged_after = Some(sent);
        } else if let Some(close) = command.close_producer {
            break close.request_id;
        }
    };
    assert_eq!(sent, MANY_FRAMES, "the close has overtaken data");
    assert!(
        created_after.is_some_and(|sent| sent < MANY_FRAMES),
        "{created_after:?}"
    );
    assert!(
        ponged_after.is_some_and(|sent| sent < MANY_FRAMES),
        "{ponged_after:?}"
    );
    side.say(&success(request_id)).await;
    assert!(opened.await.unwrap().is_ok());
    assert!(closed.await.unwrap().is_ok());
    assert_eq!(side.connection.unwritten_bytes(), 0);
}

#[tokio::test]
async fn a_request_that_is_not_answered_ends_and_the_connection_stays() {
    let mut side = open(Duration::from_millis(50), 16).await;
    let error = side.connection.request(lookup).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("does not answer"), "{error}");

    side.say(&ping_command()).await;
    while side.next().await.pong.is_none() {}
    assert!(!side.connection.is_closed());
}

#[tokio::test]
async fn a_producer_that_is_made_when_nobody_waits_for_it_any_more_is_closed() {
    // GIVEN a creation that is not answered in time
    let mut side = open(Duration::from_millis(50), 16).await;
    let answer = side.connection.request(|id| create(7, id)).await;
    assert!(answer.is_err());
    let asked = side.next().await.producer.expect("a creation");

    // WHEN it completes THEN the producer is closed, and the connection stays
    side.say(&BaseCommand {
        r#type: Type::ProducerSuccess as i32,
        producer_success: Some(CommandProducerSuccess {
            request_id: asked.request_id,
            ..CommandProducerSuccess::default()
        }),
        ..BaseCommand::default()
    })
    .await;
    let close = side.next().await.close_producer.expect("a close");
    assert_eq!(close.producer_id, 7);
    side.say(&success(close.request_id)).await;
    side.say(&ping_command()).await;
    assert!(side.next().await.pong.is_some());
    assert!(!side.connection.is_closed());
}

#[tokio::test]
async fn a_request_that_cannot_be_written_ends_with_its_connection() {
    // GIVEN a socket that takes nothing more
    let mut side = open(Duration::from_millis(50), 16).await;
    for sequence_id in 0..MANY_FRAMES {
        side.connection
            .send_data(1, batch(1, sequence_id, FRAME_BYTES));
    }
    // WHEN a request waits for it: to be behind data, it is about that producer
    let asked = side.connection.request(|id| close_producer(1, id));
    let asked = timeout(DEADLINE, asked).await.expect("an end in time");

    // THEN it ends
    let error = asked.unwrap_err().to_string();
    assert!(error.contains("ended"), "{error}");
    let event = side.next_event().await;
    let Event::Disconnected { reason, .. } = event else {
        panic!("{event:?}");
    };
    assert!(reason.contains("no byte"), "{reason}");
}

#[tokio::test]
async fn pings_are_answered_and_data_is_written_while_nobody_takes_events() {
    // GIVEN room for one event, and more receipts than the connection keeps
    let mut side = open(REQUEST_TIMEOUT, 1).await;
    for sequence_id in 0..10 {
        side.say(&receipt(sequence_id)).await;
    }
    side.say(&ping_command()).await;
    // WHEN nobody takes events, THEN the ping is answered
    assert!(side.next().await.pong.is_some());

    // WHEN more receipts come than the connection keeps, THEN it still writes
    for sequence_id in 10..MANY_RECEIPTS {
        side.say(&receipt(sequence_id)).await;
    }
    side.connection.send_data(1, batch(1, 7, 100));
    assert_eq!(side.next().await.send.unwrap().sequence_id, 7);

    // AND nothing is lost, and all is in order
    for expected in 0..MANY_RECEIPTS {
        match side.next_event().await {
            Event::Receipt { sequence_id, .. } => assert_eq!(sequence_id, expected),
            other => panic!("{other:?}"),
        }
    }
    side.say(&ping_command()).await;
    assert!(side.next().await.pong.is_some());
}

#[tokio::test]
async fn a_connection_whose_events_nobody_takes_stops_reading() {
    // More than the largest socket buffers of a Linux system as it comes.
    const FAR_TOO_MANY: usize = 48 * 1024 * 1024;
    let side = open(REQUEST_TIMEOUT, 1).await;
    let receipts = encode_command(&receipt(1)).repeat(1000);

    // WHEN a broker says receipts for as long as its socket takes them
    let (mut said, mut refused) = (0, 0);
    while refused < 10_000 && said < FAR_TOO_MANY {
        match side.stream.try_write(&receipts[said % receipts.len()..]) {
            Ok(bytes) => (said, refused) = (said + bytes, 0),
            Err(_full) => refused += 1,
        }
        tokio::task::yield_now().await;
    }

    // THEN it takes no more at some time
    assert!(said < FAR_TOO_MANY);
}

#[tokio::test]
async fn a_broker_that_is_not_read_is_not_taken_for_silent() {
    // GIVEN a connection that reads no more, because nobody takes its events
    let impatient = Manner {
        keepalive_interval: Duration::from_millis(20),
        ..manner()
    };
    let mut side = open_as(&impatient, REQUEST_TIMEOUT, 1).await;
    for sequence_id in 0..MANY_RECEIPTS {
        side.say(&receipt(sequence_id)).await;
    }

    // WHEN many intervals pass, THEN it stays
    sleep(impatient.keepalive_interval * 20).await;
    assert!(!side.connection.is_closed());
    // (And a broker that is read and says nothing is left: `tests/manners/connections.rs`.)
}

#[tokio::test]
async fn what_was_kept_is_told_before_the_end_of_the_connection() {
    let mut side = open(REQUEST_TIMEOUT, 1).await;
    for sequence_id in 0..20 {
        side.say(&receipt(sequence_id)).await;
    }
    side.say(&ping_command()).await;
    assert!(side.next().await.pong.is_some());
    side.connection.close("enough");
    // The socket does not wait for whoever takes the events.
    let rest = timeout(DEADLINE, side.stream.read_buf(&mut side.inbox)).await;
    assert_eq!(rest.expect("an end in time").unwrap(), 0);

    for expected in 0..20 {
        match side.next_event().await {
            Event::Receipt { sequence_id, .. } => assert_eq!(sequence_id, expected),
            other => panic!("{other:?}"),
        }
    }
    let end = side.next_event().await;
    assert!(matches!(end, Event::Disconnected { .. }), "{end:?}");
    assert!(side.connection.is_closed());
}

#[tokio::test]
async fn a_frame_that_is_larger_than_the_broker_reads_is_refused_and_never_written() {
    // GIVEN a limit of 1 MiB, and frames around one that is larger
    let mut side = open(REQUEST_TIMEOUT, 16).await;
    let limit = usize::try_from(LIMIT).unwrap() + FRAME_OVERHEAD_BYTES;
    let largest = batch(1, 1, limit - batch(1, 1, 0).len());
    assert_eq!(largest.len(), limit);
    let too_large = batch(1, 2, limit - batch(1, 2, 0).len() + 1);
    for frame in [largest, too_large, batch(1, 3, 100)] {
        side.connection.send_data(1, frame);
    }

    // THEN the others are written
    assert_eq!(side.next().await.send.unwrap().sequence_id, 1);
    assert_eq!(side.next().await.send.unwrap().sequence_id, 3);
    // AND this one is refused as by a topic's limit
    let event = side.next_event().await;
    let Event::SendError {
        producer_id,
        sequence_id,
        code,
        message,
        ..
    } = event
    else {
        panic!("{event:?}");
    };
    assert_eq!((producer_id, sequence_id), (1, 2));
    assert_eq!(code, ServerError::NotAllowedError as i32);
    assert!(message.contains("larger"), "{message}");
    assert_eq!(side.connection.unwritten_bytes(), 0);
}

/// A command that the pulsar crate has no definition of.
fn topic_migrated(producer_id: u64, url: &str) -> Bytes {
    #[derive(Clone, PartialEq, prost::Message)]
    struct Command {
        #[prost(int32, required, tag = "1")]
        r#type: i32,
        #[prost(message, required, tag = "68")]
        topic_migrated: Moved,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Moved {
        #[prost(uint64, required, tag = "1")]
        resource_id: u64,
        #[prost(int32, required, tag = "2")]
        resource_type: i32,
        #[prost(string, optional, tag = "3")]
        url: Option<String>,
    }
    use prost::Message as _;
    let command = Command {
        r#type: 68,
        topic_migrated: Moved {
            resource_id: producer_id,
            resource_type: 0,
            url: Some(url.to_owned()),
        },
    }
    .encode_to_vec();
    let mut frame = BytesMut::new();
    let size = u32::try_from(command.len()).unwrap();
    frame.put_u32(size + 4);
    frame.put_u32(size);
    frame.put_slice(&command);
    frame.freeze()
}

fn close_of(producer_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::CloseProducer as i32,
        close_producer: Some(CommandCloseProducer {
            producer_id,
            request_id: u64::MAX,
        }),
        ..BaseCommand::default()
    }
}

#[tokio::test]
async fn a_close_is_the_answer_to_the_creation_of_its_producer_and_otherwise_an_event() {
    const ELSEWHERE: &str = "pulsar://elsewhere:6650";
    // GIVEN a request for a producer
    let mut side = open(REQUEST_TIMEOUT, 16).await;
    let opening = side.connection.clone();
    let opened = tokio::spawn(async move { opening.request(|id| create(7, id)).await });
    assert!(side.next().await.producer.is_some());

    // WHEN another producer's topic has moved, and then this one's
    for producer_id in [8, 7] {
        let moved = topic_migrated(producer_id, ELSEWHERE);
        side.stream.write_all(&moved).await.unwrap();
        side.say(&close_of(producer_id)).await;
    }

    // THEN the request ends with the new place
    let error = timeout(DEADLINE, opened).await.expect("an end in time");
    let error = error.unwrap().unwrap_err();
    let next = super::super::verdict::next_broker(&error).expect("a place");
    assert_eq!(
        (next.url.as_deref(), next.is_cluster),
        (Some(ELSEWHERE), true)
    );
    assert!(error.to_string().contains("orders"), "{error}");
    // AND the other is an event, with the same
    let event = side.next_event().await;
    let Event::ProducerClosed {
        producer_id: 8,
        next_broker: Some(next),
        ..
    } = &event
    else {
        panic!("{event:?}");
    };
    assert_eq!(next.url.as_deref(), Some(ELSEWHERE));
    // AND a close of the same producer later knows nothing of it
    side.say(&close_of(7)).await;
    let event = side.next_event().await;
    assert!(
        matches!(
            event,
            Event::ProducerClosed {
                producer_id: 7,
                next_broker: None,
                ..
            }
        ),
        "{event:?}"
    );
}
