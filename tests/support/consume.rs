//! What is in a topic, read by the pulsar crate's consumer: it shares no code with our producer.
#![allow(
    clippy::large_futures,
    reason = "the pulsar crate's futures are large; a test has the stack for them"
)]

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use futures::StreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::message::proto::MessageIdData;
use pulsar::{Authentication, Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};

use super::unique;

/// Messages asked for ahead. Large, so that hundreds of thousands of messages take seconds.
const AHEAD_MESSAGES: u32 = 20_000;
/// Messages the consumer keeps for us, in effect without a limit: its one task both fills this queue and answers
/// `get_last_message_id` and `unsubscribe`, so that a full queue, which we do not empty while we wait for those, would
/// hold it up for ever.
const QUEUE_MESSAGES: u32 = i32::MAX as u32;

/// One message of a topic.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// The payload's bytes, decompressed.
    pub(crate) payload: Vec<u8>,
    /// The partition key (base64 when the producer said so).
    pub(crate) key: Option<String>,
    /// The batch's ordering key, or the message's own.
    pub(crate) ordering_key: Option<Vec<u8>>,
    /// The message's properties.
    pub(crate) properties: BTreeMap<String, String>,
    /// Milliseconds since 1970.
    pub(crate) event_time_ms: Option<u64>,
    /// Milliseconds since 1970, by the producer's clock.
    pub(crate) publish_time_ms: u64,
    /// The producer's name.
    pub(crate) producer_name: String,
    /// The batch's lowest sequence id, the same for all its messages: what deduplication compares.
    pub(crate) sequence_id: u64,
    /// The broker's (ledger, entry); with the batch index, the message's place in the topic.
    pub(crate) ledger_id: u64,
    /// See `ledger_id`.
    pub(crate) entry_id: u64,
    /// The place in its batch; `None` for a message that was sent without one.
    pub(crate) batch_index: Option<i32>,
    /// The partition; -1 for a topic without partitions.
    pub(crate) partition: i32,
}

impl Received {
    /// A property that must be there.
    pub(crate) fn property(&self, name: &str) -> &str {
        self.properties
            .get(name)
            .unwrap_or_else(|| panic!("no property {name:?} in {:?}", self.properties))
    }
}

/// Reads `topic` from its first message, in order, without acknowledging any.
///
/// Waits until at least `expected` messages have come, then reads on to the topic's last message as of that moment, so
/// that duplicates show. At the `deadline` it returns what has come: the test's own assertion then tells the count. With
/// `expected` 0 it reads what there is. (A tombstone inside a batch looks like an empty payload here, since the crate
/// drops that flag: see [`super::read_entries`].)
pub(crate) async fn consume(
    pulsar_url: &str,
    topic: &str,
    expected: usize,
    deadline: Duration,
) -> Vec<Received> {
    consume_as(pulsar_url, None, topic, expected, deadline).await
}

/// The same on a broker that asks who is there, with a token.
pub(crate) async fn consume_as(
    pulsar_url: &str,
    token: Option<&str>,
    topic: &str,
    expected: usize,
    deadline: Duration,
) -> Vec<Received> {
    let end = Instant::now() + deadline;
    let mut received = Vec::with_capacity(expected);
    let reading = Box::pin(read(pulsar_url, token, topic, expected, &mut received));
    let left = end.saturating_duration_since(Instant::now());
    if tokio::time::timeout(left, reading).await.is_err() {
        // No error here, but what the test then finds amiss is easier to judge by it.
        eprintln!(
            "{topic}: {} messages in {deadline:?}, at least {expected} expected",
            received.len()
        );
    }
    received
}

async fn read(
    pulsar_url: &str,
    token: Option<&str>,
    topic: &str,
    expected: usize,
    received: &mut Vec<Received>,
) {
    let mut builder = Pulsar::builder(pulsar_url, TokioExecutor);
    if let Some(token) = token {
        builder = builder.with_auth(Authentication {
            name: "token".to_owned(),
            data: token.as_bytes().to_vec(),
        });
    }
    let pulsar = builder
        .build()
        .await
        .expect("the local broker can be connected to");
    let mut consumer: Consumer<Vec<u8>, _> = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription(unique("test"))
        .with_subscription_type(SubType::Exclusive)
        .with_batch_size(AHEAD_MESSAGES)
        .with_options(
            ConsumerOptions::default()
                .with_initial_position(InitialPosition::Earliest)
                .with_receiver_queue_size(QUEUE_MESSAGES),
        )
        .build()
        .await
        .unwrap_or_else(|error| panic!("cannot subscribe to {topic}: {error}"));

    let mut reached: HashMap<i32, Place> = HashMap::new();
    // Known once `expected` messages have come.
    let mut last: Option<HashMap<i32, Place>> = None;
    loop {
        if last.is_none() && received.len() >= expected {
            last = Some(last_places(&mut consumer).await);
        }
        if last
            .as_ref()
            .is_some_and(|last| all_reached(last, &reached))
        {
            break;
        }
        let message = match consumer.next().await {
            Some(Ok(message)) => message,
            Some(Err(error)) => panic!("cannot read {topic}: {error}"),
            None => panic!("the subscription to {topic} ended by itself"),
        };
        let (partition, place) = place_of(message.message_id());
        reached.insert(partition, place);
        received.push(as_received(message));
    }
    // A subscription that stays would keep every later message of the topic on the broker's disk.
    consumer
        .unsubscribe()
        .await
        .expect("the test's own subscription can be removed");
}

/// (ledger, entry, index in the batch): rises along a partition.
type Place = (u64, u64, i32);

fn place_of(id: &MessageIdData) -> (i32, Place) {
    let place = (id.ledger_id, id.entry_id, id.batch_index.unwrap_or(-1));
    (id.partition.unwrap_or(-1), place)
}

/// Each partition's last message; a partition without any is left out.
async fn last_places(consumer: &mut Consumer<Vec<u8>, TokioExecutor>) -> HashMap<i32, Place> {
    consumer
        .get_last_message_id()
        .await
        .expect("the broker tells a topic's last message")
        .iter()
        // "None" is ledger or entry -1, which reads as the largest number here.
        .filter(|id| id.ledger_id != u64::MAX && id.entry_id != u64::MAX)
        .map(place_of)
        .collect()
}

fn all_reached(last: &HashMap<i32, Place>, reached: &HashMap<i32, Place>) -> bool {
    last.iter()
        .all(|(partition, place)| reached.get(partition).is_some_and(|at| at >= place))
}

fn as_received(message: pulsar::consumer::Message<Vec<u8>>) -> Received {
    let (partition, (ledger_id, entry_id, _)) = place_of(message.message_id());
    let batch_index = message.message_id().batch_index;
    let metadata = message.payload.metadata;
    Received {
        payload: message.payload.data,
        key: metadata.partition_key,
        ordering_key: metadata.ordering_key,
        properties: metadata
            .properties
            .into_iter()
            .map(|pair| (pair.key, pair.value))
            .collect(),
        event_time_ms: metadata.event_time,
        publish_time_ms: metadata.publish_time,
        producer_name: metadata.producer_name,
        sequence_id: metadata.sequence_id,
        ledger_id,
        entry_id,
        batch_index: batch_index.filter(|index| *index >= 0),
        partition,
    }
}
