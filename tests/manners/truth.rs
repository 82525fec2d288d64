//! The scripted broker itself, asked by a client that says exactly what the test wants: it does what the real one's sources say.

#![allow(
    clippy::large_futures,
    reason = "a command of the protocol is a large value; a test has the stack for it"
)]

use std::time::Duration;

use prost::Message as _;
use pulsar::message::proto::{
    BaseCommand, CommandCloseProducer, CommandConnect, CommandPartitionedTopicMetadata,
    CommandPing, CommandPong, CommandProducer, CommandSend, MessageMetadata, ServerError,
    base_command::Type,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::sender::DEADLINE;
use super::support::{Asked, FakeBroker, PublishRate, Reaction, partition_name, sized};
use super::{OTHER, TOPIC};

const KNOWS_NO_MIGRATION: i32 = 19;
const KNOWS_MIGRATION: i32 = 20;

/// A connection on the bare protocol.
struct Client(TcpStream);

impl Client {
    async fn connect(broker: &FakeBroker) -> Self {
        Self::announcing(broker, KNOWS_NO_MIGRATION).await
    }

    async fn announcing(broker: &FakeBroker, protocol_version: i32) -> Self {
        let stream = TcpStream::connect(broker.host()).await.expect("it listens");
        let mut client = Self(stream);
        let connect = CommandConnect {
            client_version: "test".to_owned(),
            protocol_version: Some(protocol_version),
            ..CommandConnect::default()
        };
        client
            .say(BaseCommand {
                connect: Some(connect),
                ..of(Type::Connect)
            })
            .await;
        client.hear("CONNECTED").await;
        client
    }

    async fn say(&mut self, command: BaseCommand) {
        self.say_with(command, &[]).await;
    }

    async fn say_with(&mut self, command: BaseCommand, entry: &[u8]) {
        let body = command.encode_to_vec();
        let size = u32::try_from(body.len()).expect("a small command");
        let total = u32::try_from(4 + body.len() + entry.len()).expect("a small frame");
        let head = [total.to_be_bytes(), size.to_be_bytes()].concat();
        let frame = [head.as_slice(), &body, entry].concat();
        self.0.write_all(&frame).await.expect("the broker reads");
    }

    /// The next command; none at the end of the connection. `TOPIC_MIGRATED`, which the crate does not know, has no field set.
    async fn next(&mut self) -> Option<BaseCommand> {
        let read = async {
            let size = self.0.read_u32().await.ok()?;
            let mut frame = vec![0; size as usize];
            self.0.read_exact(&mut frame).await.ok()?;
            let mut rest = frame.as_slice();
            BaseCommand::decode(sized(&mut rest).ok()?).ok()
        };
        let heard = tokio::time::timeout(DEADLINE, read).await;
        heard.expect("the broker says something or ends the connection")
    }

    /// The next command, in short.
    async fn hear(&mut self, what: &str) -> String {
        let next = self.next().await;
        in_short(&next.unwrap_or_else(|| panic!("the connection ends instead of {what}")))
    }

    async fn hear_all(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.hear(expected).await, **expected);
        }
    }

    /// Nothing was said before the answer to a ping.
    async fn hear_nothing(&mut self) {
        self.say(BaseCommand {
            ping: Some(CommandPing {}),
            ..of(Type::Ping)
        })
        .await;
        self.hear_all(&["pong"]).await;
    }

    async fn producer(&mut self, request_id: u64, producer_id: u64, topic: &str, name: &str) {
        self.say(BaseCommand {
            producer: Some(CommandProducer {
                topic: topic.to_owned(),
                producer_id,
                request_id,
                producer_name: Some(name.to_owned()),
                ..CommandProducer::default()
            }),
            ..of(Type::Producer)
        })
        .await;
    }

    async fn close(&mut self, request_id: u64, producer_id: u64) {
        self.say(BaseCommand {
            close_producer: Some(CommandCloseProducer {
                producer_id,
                request_id,
            }),
            ..of(Type::CloseProducer)
        })
        .await;
    }

    /// A message of so many bytes, from the producer named `p`.
    async fn send(&mut self, producer_id: u64, sequence_id: u64, bytes: usize) {
        let metadata = MessageMetadata {
            producer_name: "p".to_owned(),
            sequence_id,
            highest_sequence_id: Some(sequence_id),
            ..MessageMetadata::default()
        }
        .encode_to_vec();
        let size = u32::try_from(metadata.len()).expect("small");
        let payload = vec![b'x'; bytes];
        let summed = [&size.to_be_bytes()[..], &metadata, &payload].concat();
        let sum = crc32c::crc32c(&summed).to_be_bytes();
        let entry = [&[0x0e, 0x01][..], &sum, &summed].concat();
        let send = CommandSend {
            producer_id,
            sequence_id,
            highest_sequence_id: Some(sequence_id),
            ..CommandSend::default()
        };
        let command = BaseCommand {
            send: Some(send),
            ..of(Type::Send)
        };
        self.say_with(command, &entry).await;
    }

    async fn partitions(&mut self, topic: &str) -> String {
        self.say(BaseCommand {
            partition_metadata: Some(CommandPartitionedTopicMetadata {
                topic: topic.to_owned(),
                ..CommandPartitionedTopicMetadata::default()
            }),
            ..of(Type::PartitionedMetadata)
        })
        .await;
        self.hear("the number of partitions").await
    }

    /// One producer, named `p`, with the id 1.
    async fn with_producer(broker: &FakeBroker) -> Self {
        let mut client = Self::connect(broker).await;
        client.producer(1, 1, TOPIC, "p").await;
        client.hear_all(&["producer 1: -1"]).await;
        client
    }
}

fn of(kind: Type) -> BaseCommand {
    BaseCommand {
        r#type: kind.into(),
        ..BaseCommand::default()
    }
}

/// What a command says, in a few words.
fn in_short(command: &BaseCommand) -> String {
    let name = |code: i32| ServerError::try_from(code).map_or("?", |error| error.as_str_name());
    if let Some(success) = &command.producer_success {
        let last = success.last_sequence_id.unwrap_or_default();
        format!("producer {}: {last}", success.request_id)
    } else if let Some(success) = &command.success {
        format!("success {}", success.request_id)
    } else if let Some(error) = &command.error {
        format!("{} {}", name(error.error), error.request_id)
    } else if let Some(receipt) = &command.send_receipt {
        let entry = receipt.message_id.as_ref().map(|id| id.entry_id);
        let before = entry == Some(u64::MAX);
        let kind = if before { "duplicate" } else { "receipt" };
        format!("{kind} {}", receipt.sequence_id)
    } else if let Some(error) = &command.send_error {
        format!("{} {}", name(error.error), error.sequence_id)
    } else if let Some(close) = &command.close_producer {
        format!("close {}", close.producer_id)
    } else if let Some(answer) = &command.partition_metadata_response {
        let error = answer.error.map(name);
        error.map_or_else(|| answer.partitions().to_string(), str::to_owned)
    } else if command.ping.is_some() {
        "ping".to_owned()
    } else if command.pong.is_some() {
        "pong".to_owned()
    } else {
        format!("{}", command.r#type)
    }
}

#[tokio::test]
async fn a_refused_send_changes_nothing_for_those_behind_it() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut client = Client::with_producer(&broker).await;
    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(1000));

    for (id, bytes) in [(1, 10), (2, 2000), (3, 10), (2, 10)] {
        client.send(1, id, bytes).await;
    }
    client
        .hear_all(&["receipt 1", "NotAllowedError 2", "receipt 3", "duplicate 2"])
        .await;
    // A client's fault: its ids fall.
    assert_eq!(broker.forgive().len(), 1);
}

#[tokio::test]
async fn the_size_is_looked_at_before_duplicates() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut client = Client::with_producer(&broker).await;
    client.send(1, 5, 2000).await;
    client.hear_all(&["receipt 5"]).await;

    broker.set(TOPIC, |topic| topic.max_message_bytes = Some(1000));
    client.send(1, 5, 2000).await;
    client.hear_all(&["NotAllowedError 5"]).await;
    broker.forgive();
}

#[tokio::test]
async fn a_close_is_answered_behind_the_receipts_of_what_was_sent() {
    let broker = FakeBroker::start().await;
    let mut client = Client::with_producer(&broker).await;
    broker.script(Asked::Send, [Reaction::Pend]);
    client.send(1, 1, 10).await;
    client.close(2, 1).await;
    client.send(1, 2, 10).await;
    client.hear_all(&["PersistenceError 2"]).await;

    broker.settle(true);
    client.hear_all(&["receipt 1", "success 2"]).await;
}

#[tokio::test]
async fn a_creation_whose_authorization_stalls_survives_its_close_and_takes_the_id() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut client = Client::with_producer(&broker).await;
    client.send(1, 7, 10).await;
    client.close(2, 1).await;
    client.hear_all(&["receipt 7", "success 2"]).await;

    broker.script(Asked::Producer, [Reaction::StallAuthorization]);
    client.producer(3, 1, TOPIC, "p").await;
    client.close(4, 1).await;
    client.hear_all(&["success 4"]).await;
    broker.resume();
    client.producer(5, 1, TOPIC, "p").await;
    client.hear_all(&["producer 3: 7", "producer 5: -1"]).await;
}

#[tokio::test]
async fn a_creation_whose_topic_is_loading_ends_with_its_close() {
    let broker = FakeBroker::start().await;
    let mut client = Client::connect(&broker).await;
    broker.script(Asked::Producer, [Reaction::StallLoading]);
    client.producer(1, 1, TOPIC, "p").await;
    client.producer(2, 1, TOPIC, "p").await;
    client.close(3, 1).await;
    client.hear_all(&["ServiceNotReady 2", "success 3"]).await;

    broker.resume();
    client.hear_nothing().await;
    client.producer(4, 1, TOPIC, "p").await;
    client.hear_all(&["producer 4: -1"]).await;
}

#[tokio::test]
async fn a_name_that_a_living_connection_has_is_busy() {
    let broker = FakeBroker::start().await;
    let mut first = Client::with_producer(&broker).await;
    let mut second = Client::connect(&broker).await;
    second.producer(1, 1, TOPIC, "p").await;
    first.hear_all(&["ping"]).await;
    first
        .say(BaseCommand {
            pong: Some(CommandPong {}),
            ..of(Type::Pong)
        })
        .await;
    second.hear_all(&["ProducerBusy 1"]).await;
    // It has kept its producer.
    first.send(1, 1, 10).await;
    first.hear_all(&["receipt 1"]).await;
    // The name is free on another topic, and here as soon as the first one goes.
    second.producer(2, 2, OTHER, "p").await;
    second.hear_all(&["producer 2: -1"]).await;
    second.producer(3, 3, TOPIC, "p").await;
    drop(first);
    second.hear_all(&["producer 3: -1"]).await;
}

#[tokio::test]
async fn a_name_that_a_silent_connection_has_is_free_after_its_time() {
    let broker = FakeBroker::start().await;
    let mut first = Client::with_producer(&broker).await;
    let mut second = Client::connect(&broker).await;
    second.producer(1, 1, TOPIC, "p").await;
    second.hear_all(&["producer 1: -1"]).await;
    first.hear_all(&["ping"]).await;
    assert!(first.next().await.is_none(), "it was not ended");
}

#[tokio::test]
async fn a_write_that_fails_closes_the_producer_and_then_says_so_of_each() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut client = Client::with_producer(&broker).await;
    broker.script(Asked::Send, [Reaction::Pend, Reaction::FailWrite]);
    for id in 1..=3 {
        client.send(1, id, 10).await;
    }
    client
        .hear_all(&["close 1", "PersistenceError 1", "PersistenceError 2"])
        .await;
    // What was sent behind it is dropped, and what was pushed is forgotten.
    client.producer(2, 1, TOPIC, "p").await;
    client.hear_all(&["producer 2: -1"]).await;
    assert_eq!(broker.stored().len(), 0);
}

#[tokio::test]
async fn receipts_of_an_unloaded_topic_come_behind_the_close() {
    let broker = FakeBroker::start().await;
    let mut client = Client::with_producer(&broker).await;
    for written in [true, false] {
        broker.script(Asked::Send, [Reaction::Pend]);
        let count = broker.count(Asked::Send);
        client.send(1, 1, 10).await;
        broker.wait_for(Asked::Send, count + 1).await;
        broker.unload(TOPIC, None, written);
        client.hear_all(&["close 1"]).await;
        if written {
            client.hear_all(&["receipt 1"]).await;
        }
        client.producer(2, 1, TOPIC, "p").await;
        client.hear_all(&["producer 2: -1"]).await;
    }
    assert_eq!(broker.stored().len(), 1);
}

#[tokio::test]
async fn a_frame_that_is_too_large_and_a_send_to_nobody_end_the_connection() {
    let broker = FakeBroker::start().await;
    broker.limit(1000);
    let mut client = Client::with_producer(&broker).await;
    client.send(1, 1, 1000 + 9 * 1024).await;
    client.hear_all(&["receipt 1"]).await;
    client.send(1, 2, 1000 + 10 * 1024).await;
    assert!(client.next().await.is_none(), "it was decoded");

    let mut client = Client::with_producer(&broker).await;
    client.send(2, 1, 10).await;
    assert!(client.next().await.is_none(), "it was dropped silently");
    assert_eq!(broker.forgive().len(), 3);
}

#[tokio::test]
async fn a_topic_that_has_migrated_answers_a_creation_with_its_close_alone() {
    let broker = FakeBroker::start().await;
    broker.set(TOPIC, |topic| {
        topic.migrated_to = Some("pulsar://there:1".to_owned());
    });
    let mut old = Client::connect(&broker).await;
    old.producer(1, 1, TOPIC, "p").await;
    old.hear_all(&["close 1"]).await;
    // The id stays taken until it is closed.
    old.producer(2, 1, TOPIC, "p").await;
    old.close(3, 1).await;
    old.hear_all(&["ServiceNotReady 2", "success 3"]).await;

    let mut new = Client::announcing(&broker, KNOWS_MIGRATION).await;
    new.producer(1, 1, TOPIC, "p").await;
    new.hear_all(&["68", "close 1"]).await;
}

#[tokio::test]
async fn a_topic_that_is_throttled_keeps_its_whole_connection_from_being_read() {
    let broker = FakeBroker::start().await;
    let mut client = Client::with_producer(&broker).await;
    broker.set(TOPIC, |topic| {
        topic.publish_rate = Some(PublishRate {
            messages: 1,
            period: Duration::from_secs(3600),
        });
    });
    client.send(1, 1, 10).await;
    client.producer(2, 2, OTHER, "p").await;
    client.hear_all(&["receipt 1"]).await;
    let mut other = Client::connect(&broker).await;
    other.hear_nothing().await;
    assert_eq!(broker.count(Asked::Producer), 1, "it is read");

    broker.set(TOPIC, |topic| topic.publish_rate = None);
    client.hear_all(&["producer 2: -1"]).await;
}

#[tokio::test]
async fn topics_come_into_being_as_the_broker_allows_it() {
    let broker = FakeBroker::start().await;
    let mut client = Client::connect(&broker).await;
    let (first, second) = (partition_name(TOPIC, 0), partition_name(TOPIC, 1));

    // Nothing is there, and nothing may be made.
    broker.auto_create(false);
    assert_eq!(client.partitions(TOPIC).await, "TopicNotFound");
    client.producer(1, 1, TOPIC, "p").await;
    client.hear_all(&["TopicNotFound 1"]).await;
    broker.missing_has_no_partitions();
    assert_eq!(client.partitions(TOPIC).await, "0");

    // A partition of a topic that has metadata may be made all the same, until that is being deleted; its neighbour may not.
    broker.create_partitioned(TOPIC, 1);
    assert_eq!(client.partitions(TOPIC).await, "1");
    broker.delete(&first);
    client.producer(2, 1, &first, "p").await;
    client.hear_all(&["producer 2: -1"]).await;
    client.producer(3, 2, &second, "p").await;
    client.hear_all(&["TopicNotFound 3"]).await;
    broker.begin_deletion(TOPIC);
    client.hear_all(&["close 1"]).await;
    assert_eq!(client.partitions(TOPIC).await, "1");
    client.producer(4, 1, &first, "p").await;
    client.hear_all(&["TopicNotFound 4"]).await;

    // Without metadata it is a topic like any other, and so is a plain one beside partitions.
    broker.end_deletion(TOPIC);
    broker.auto_create(true);
    client.producer(5, 1, &first, "p").await;
    client.hear_all(&["producer 5: -1"]).await;
    assert_eq!(client.partitions(TOPIC).await, "0");
    assert_eq!(broker.misshapen(), [first]);
    broker.create_partitioned(OTHER, 2);
    client.producer(6, 2, OTHER, "p").await;
    client.hear_all(&["producer 6: -1"]).await;
    assert_eq!(client.partitions(OTHER).await, "2");
    assert!(broker.misshapen().contains(&OTHER.to_owned()));
}

#[tokio::test]
async fn a_deleted_topic_comes_back_without_its_events_and_ids() {
    let broker = FakeBroker::start_deduplicating().await;
    let mut client = Client::with_producer(&broker).await;
    client.send(1, 1, 10).await;
    client.hear_all(&["receipt 1"]).await;
    assert_eq!(broker.readable(TOPIC).len(), 1);

    broker.delete(TOPIC);
    client.hear_all(&["close 1"]).await;
    client.producer(2, 1, TOPIC, "p").await;
    client.hear_all(&["producer 2: -1"]).await;
    client.send(1, 1, 10).await;
    client.hear_all(&["receipt 1"]).await;
    assert_eq!(broker.readable(TOPIC).len(), 1);
    assert_eq!(broker.stored().len(), 2);
}

#[tokio::test]
async fn a_topic_says_why_it_takes_no_producer() {
    let broker = FakeBroker::start().await;
    let mut client = Client::with_producer(&broker).await;
    broker.set(TOPIC, |topic| topic.max_producers = Some(1));
    client.producer(2, 2, TOPIC, "q").await;
    client.hear_all(&["ProducerBusy 2"]).await;
    broker.set(TOPIC, |topic| topic.max_producers = None);

    broker.set(TOPIC, |topic| topic.encryption_required = true);
    client.hear_all(&["close 1"]).await;
    client.producer(3, 2, TOPIC, "q").await;
    client.hear_all(&["MetadataError 3"]).await;
    broker.set(TOPIC, |topic| topic.encryption_required = false);

    broker.set(TOPIC, |topic| topic.fenced = true);
    client.producer(4, 2, TOPIC, "q").await;
    client.hear_all(&["ServiceNotReady 4"]).await;
    broker.set(TOPIC, |topic| topic.fenced = false);

    broker.set(TOPIC, |topic| topic.terminated = true);
    client.producer(5, 2, TOPIC, "q").await;
    client.hear_all(&["TopicTerminatedError 5"]).await;
    broker.set(TOPIC, |topic| topic.terminated = false);

    // Another client's exclusive producer closes the others without a word, and what they send ends their connection.
    client.producer(6, 2, TOPIC, "q").await;
    client.hear_all(&["producer 6: -1"]).await;
    broker.set(TOPIC, |topic| topic.exclusive = Some("theirs".to_owned()));
    client.producer(7, 3, TOPIC, "r").await;
    client.hear_all(&["ProducerBusy 7"]).await;
    client.send(2, 1, 10).await;
    assert!(client.next().await.is_none(), "it was not ended");
}
