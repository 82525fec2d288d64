//! Reads topics from their first message to the one that is their last when asked, and leaves no trace: a subscription
//! that is not durable, closed at the end; no cursor stays, no other consumer notices.
//!
//! Input: topics. Output: their messages, in order, out of batches and uncompressed. It stands on the publisher's own
//! connections, so credentials and TLS (client certificates too) are those of `run`, and a tombstone is not the same as no
//! bytes; the pulsar crate's consumer can do neither.
//!
//! # Bound
//!
//! [`QUEUE`] entries of at most the broker's message size, and the one that is being looked at. While the queue is full the
//! connection does not read; what the broker has sent beyond that waits in the sockets.
//!
//! # Breaks
//!
//! A connection that ends, or a topic that moves, is followed: the next subscription begins behind the last entry that was
//! taken whole. So every entry is given once.

use std::time::Duration;

use bytes::Bytes;
use pulsar::message::proto::command_subscribe::SubType;
use pulsar::message::proto::{
    BaseCommand, CommandCloseConsumer, CommandFlow, CommandGetLastMessageId, CommandSubscribe,
    KeyValue, MessageIdData, MessageMetadata, ServerError, base_command::Type,
};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::auth::Auth;
use super::compression::Codec;
use super::connection::{Connection, Event, Manner};
use super::directory::{Directory, SHARED};
use super::tls::TlsFiles;
use super::wire::NextBroker;
use super::{verdict, wire};
use crate::config::Config;
use crate::lease::Lease;
use crate::retry::Backoff;
use crate::{Error, Result};

/// Entries that wait to be looked at.
const QUEUE: usize = 4;
/// Messages that the broker may send unasked; asked for again when half of them have come.
const PERMITS: u32 = 1_000_000;
/// A topic that has more, and a broker that sends nothing for so long: something is wrong.
const SILENCE: Duration = Duration::from_secs(30);
/// Attempts without an entry in between.
const ATTEMPTS: u32 = 5;
/// What a compressed entry may become. A batch has the broker's message size at most before it is compressed, 5 MiB unless
/// somebody raised it.
const MAX_UNCOMPRESSED_BYTES: usize = 128 * 1024 * 1024;

/// Ledger and entry.
type Place = (u64, u64);

/// How topics are reached: the publisher's settings.
#[derive(Clone, Debug)]
pub struct ReaderConfig {
    /// Hosts and ports of the service URL.
    pub service: Vec<(String, u16)>,
    /// Credentials.
    pub auth: Auth,
    /// Files for TLS; `None` when the service URL is without TLS.
    pub tls: Option<TlsFiles>,
    /// A connection that is silent for this long gets a PING, and for twice as long is taken for dead.
    pub keepalive_interval: Duration,
    /// First and longest pause between attempts to reach a broker.
    pub reconnect: (Duration, Duration),
}

impl ReaderConfig {
    /// As the settings have it.
    pub fn of(config: &Config) -> Self {
        Self {
            service: config.pulsar_url.hosts.clone(),
            auth: config.pulsar_auth.clone(),
            tls: config.broker_tls(),
            keepalive_interval: config.pulsar_keepalive_interval,
            reconnect: (config.reconnect_initial, config.reconnect_max),
        }
    }
}

/// A message as it lies in its topic.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// `None` without one.
    pub key: Option<&'a str>,
    /// `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
    /// Milliseconds since 1970; 0 without one.
    pub event_time_ms: u64,
    /// The producer's clock, milliseconds since 1970.
    pub publish_time_ms: u64,
    /// The producer.
    pub producer_name: &'a str,
    properties: &'a [KeyValue],
}

impl<'a> Message<'a> {
    /// A property's value.
    pub fn property(&self, name: &str) -> Option<&'a str> {
        let found = self.properties.iter().find(|found| found.key == name)?;
        Some(&found.value)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Reader {
    directory: Directory,
    events: mpsc::Receiver<Event>,
    reconnect: (Duration, Duration),
    next_consumer: u64,
}

/// Where a topic ended when the reading began.
#[derive(Clone, Copy, Debug, Default)]
enum End {
    #[default]
    Unknown,
    Empty,
    At(Place),
}

/// How far the reading of one topic is.
#[derive(Debug, Default)]
struct Reach {
    /// The topic's end.
    end: End,
    /// The last entry that was taken.
    taken: Option<Place>,
    /// Where the broker that closed the consumer says that the topic is.
    next_broker: Option<NextBroker>,
}

impl Reach {
    fn is_done(&self) -> bool {
        match self.end {
            End::Unknown => false,
            End::Empty => true,
            End::At(last) => self.taken >= Some(last),
        }
    }
}

impl Reader {
    /// Makes a reader; nothing is connected yet.
    pub fn new(config: ReaderConfig) -> Self {
        let (sender, events) = mpsc::channel(QUEUE);
        let manner = Manner {
            auth: config.auth,
            tls: config.tls,
            keepalive_interval: config.keepalive_interval,
            lease: Lease::default(),
        };
        let reconnect = config.reconnect;
        Self {
            directory: Directory::new(config.service, manner, sender),
            events,
            reconnect,
            next_consumer: 0,
        }
    }

    /// The topics that hold `topic`'s messages: its partitions, or itself; none where it does not exist.
    pub async fn parts(&self, topic: &str) -> Result<Vec<String>> {
        match self.directory.partitions_of(topic, true).await {
            Ok(0) => Ok(vec![topic.to_owned()]),
            Ok(partitions) => Ok((0..partitions)
                .map(|number| format!("{topic}-partition-{number}"))
                .collect()),
            Err(error) if verdict::is_missing(&error) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Gives every message that `topic` (a partition, or a topic without any) has at this moment to `take`, the oldest
    /// first. A topic that does not exist has none.
    ///
    /// # Errors
    /// That of `take`, at once; refused when the role may not consume; temporary when the broker is away for good.
    pub async fn read(
        &mut self,
        topic: &str,
        mut take: impl FnMut(&Message<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut reach = Reach::default();
        let mut backoff = Backoff::new(self.reconnect.0, self.reconnect.1);
        let mut attempts = 0;
        loop {
            let before = reach.taken;
            let failure = match Box::pin(self.pass(topic, &mut reach, &mut take)).await {
                Ok(result) => return result,
                Err(failure) => failure,
            };
            if verdict::is_missing(&failure) {
                return Ok(());
            }
            if let Some(next) = verdict::next_broker(&failure) {
                reach.next_broker = Some(next.clone());
            }
            if reach.taken != before {
                attempts = 0;
                backoff.reset();
            }
            attempts += 1;
            if !failure.is_temporary() || attempts == ATTEMPTS {
                return Err(failure);
            }
            let delay = backoff.next_delay();
            let (retry_in_ms, why) = (delay.as_millis(), failure.report());
            warn!(topic, retry_in_ms, "the topic cannot be read on yet: {why}");
            sleep(delay).await;
        }
    }

    /// One subscription's worth. The inner result is final; an outer error may be tried again, if it is temporary.
    async fn pass(
        &mut self,
        topic: &str,
        reach: &mut Reach,
        take: &mut impl FnMut(&Message<'_>) -> Result<()>,
    ) -> Result<Result<()>> {
        let next = reach.next_broker.take();
        let connection = self.directory.broker(topic, next, SHARED).await?;
        self.next_consumer += 1;
        let consumer = self.next_consumer;
        self.ask(topic, &connection, |request| {
            subscribe(topic, consumer, request, reach.taken)
        })
        .await?;
        if matches!(reach.end, End::Unknown) {
            let answer = self.ask(topic, &connection, |request| last(consumer, request));
            reach.end = last_of(topic, &answer.await?)?;
        }
        let done = self.entries(topic, &connection, consumer, reach, take);
        let done = done.await;
        let closed = self
            .ask(topic, &connection, |request| close(consumer, request))
            .await;
        if closed.is_err() {
            connection.close("a reader could not be closed");
        }
        done
    }

    async fn entries(
        &mut self,
        topic: &str,
        connection: &Connection,
        consumer: u64,
        reach: &mut Reach,
        take: &mut impl FnMut(&Message<'_>) -> Result<()>,
    ) -> Result<Result<()>> {
        let mut permits = 0;
        while !reach.is_done() {
            if permits <= PERMITS / 2 {
                connection.send(&flow(consumer, PERMITS - permits));
                permits = PERMITS;
            }
            let silent = || {
                Error::temporary(format!(
                    "topic {topic} has more, and the broker does not send it"
                ))
            };
            let event = timeout(SILENCE, self.events.recv())
                .await
                .map_err(|_| silent())?;
            match event {
                Some(Event::Message {
                    connection: id,
                    consumer_id,
                    place,
                    body,
                }) if (id, consumer_id) == (connection.id(), consumer) => {
                    let (metadata, payload) = opened(topic, place, body)?;
                    permits = permits.saturating_sub(
                        metadata
                            .num_messages_in_batch()
                            .try_into()
                            .unwrap_or(1)
                            .max(1),
                    );
                    if reach.taken < Some(place) {
                        if let Err(error) = each(topic, place, &metadata, &payload, take) {
                            return Ok(Err(error));
                        }
                        reach.taken = Some(place);
                    }
                }
                Some(Event::ConsumerClosed {
                    connection: id,
                    consumer_id,
                    next_broker,
                }) if (id, consumer_id) == (connection.id(), consumer) => {
                    reach.next_broker = next_broker;
                    return Err(Error::temporary(format!(
                        "topic {topic} moves to another broker"
                    )));
                }
                Some(Event::Disconnected {
                    connection: id,
                    reason,
                }) if id == connection.id() => {
                    return Err(Error::temporary(format!(
                        "the connection to the broker of {topic} ended: {reason}"
                    )));
                }
                // Of connections and consumers that are left.
                Some(_) => {}
                None => return Ok(Err(Error::bug("the reader's own directory holds a sender"))),
            }
        }
        Ok(Ok(()))
    }

    /// A request and its answer. What else comes meanwhile is let go: nothing is subscribed, or no longer of interest, and a
    /// queue that is full would hold up the answer.
    async fn ask(
        &mut self,
        topic: &str,
        connection: &Connection,
        build: impl FnOnce(u64) -> BaseCommand,
    ) -> Result<BaseCommand> {
        let mut request = std::pin::pin!(connection.request(build));
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut request => break answer?,
                event = self.events.recv() => drop(event),
            }
        };
        match answer.error {
            None => Ok(answer),
            Some(error) => Err(refused(topic, error.error, &error.message)),
        }
    }
}

/// Reading takes another right than publishing.
fn refused(topic: &str, code: i32, message: &str) -> Error {
    match ServerError::try_from(code) {
        Ok(ServerError::AuthorizationError | ServerError::AuthenticationError) => {
            Error::refused(format!("the broker refuses to let topic {topic} be read: {}", verdict::one_line(message)))
                .hint("grant walpost's role (of its token, certificate or user) the 'consume' permission on this topic or its namespace")
        }
        _ => verdict::of_open(topic, Some(code), Some(message)),
    }
}

fn opened(topic: &str, place: Place, body: Bytes) -> Result<(MessageMetadata, Bytes)> {
    let wrong = |what: &str| {
        Error::temporary(format!(
            "entry {}:{} of topic {topic} {what}",
            place.0, place.1
        ))
    };
    let entry = wire::entry(body).ok_or_else(|| wrong("was damaged on its way"))?;
    let (metadata, payload) = entry;
    if !metadata.encryption_keys.is_empty() {
        return Err(Error::refused(format!(
            "topic {topic} has encrypted messages, which walpost neither writes nor reads"
        )));
    }
    let bytes = metadata.uncompressed_size() as usize;
    if bytes > MAX_UNCOMPRESSED_BYTES {
        return Err(wrong("says that it is too large when uncompressed"));
    }
    let payload = Codec::of_wire(metadata.compression()).decompress(payload, bytes);
    let payload = payload.ok_or_else(|| wrong("cannot be uncompressed"))?;
    Ok((metadata, payload))
}

/// Gives an entry's messages to `take`.
fn each(
    topic: &str,
    place: Place,
    metadata: &MessageMetadata,
    payload: &Bytes,
    take: &mut impl FnMut(&Message<'_>) -> Result<()>,
) -> Result<()> {
    if metadata.marker_type.is_some() {
        return Ok(());
    }
    let of_entry = Message {
        key: metadata.partition_key.as_deref(),
        payload: (!metadata.null_value()).then_some(&payload[..]),
        event_time_ms: metadata.event_time(),
        publish_time_ms: metadata.publish_time,
        producer_name: &metadata.producer_name,
        properties: &metadata.properties,
    };
    let Some(count) = metadata.num_messages_in_batch else {
        return take(&of_entry);
    };
    let mut found = 0;
    for (single, entry) in wire::messages(payload.clone()) {
        found += 1;
        if single.compacted_out() {
            continue;
        }
        let length = usize::try_from(single.payload_size).unwrap_or_default();
        take(&Message {
            key: single.partition_key.as_deref(),
            payload: (!single.null_value()).then(|| &entry[entry.len() - length..]),
            event_time_ms: single.event_time(),
            properties: &single.properties,
            ..of_entry
        })?;
    }
    if found != count {
        return Err(Error::refused(format!(
            "entry {}:{} of topic {topic} says it has {count} messages, and {found} can be read",
            place.0, place.1
        )));
    }
    Ok(())
}

fn subscribe(topic: &str, consumer_id: u64, request_id: u64, after: Option<Place>) -> BaseCommand {
    // Of a reader: the place behind which it begins. (-1, -1) is the clients' `MessageId.earliest`.
    let (ledger_id, entry_id) = after.unwrap_or((u64::MAX, u64::MAX));
    BaseCommand {
        r#type: Type::Subscribe as i32,
        subscribe: Some(CommandSubscribe {
            topic: topic.to_owned(),
            subscription: format!("walpost-reader-{:x}-{consumer_id}", std::process::id()),
            sub_type: SubType::Exclusive as i32,
            consumer_id,
            request_id,
            durable: Some(false),
            start_message_id: Some(MessageIdData {
                ledger_id,
                entry_id,
                ..MessageIdData::default()
            }),
            force_topic_creation: Some(false),
            ..CommandSubscribe::default()
        }),
        ..BaseCommand::default()
    }
}

fn last(consumer_id: u64, request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::GetLastMessageId as i32,
        get_last_message_id: Some(CommandGetLastMessageId {
            consumer_id,
            request_id,
        }),
        ..BaseCommand::default()
    }
}

/// "None" is entry -1, which reads as the largest number here.
fn last_of(topic: &str, answer: &BaseCommand) -> Result<End> {
    let answer = answer.get_last_message_id_response.as_ref();
    let answer = answer.ok_or_else(|| {
        Error::temporary(format!(
            "the question for the end of {topic} got another answer"
        ))
    })?;
    let last = &answer.last_message_id;
    Ok(match last.entry_id {
        u64::MAX => End::Empty,
        entry => End::At((last.ledger_id, entry)),
    })
}

fn flow(consumer_id: u64, message_permits: u32) -> BaseCommand {
    BaseCommand {
        r#type: Type::Flow as i32,
        flow: Some(CommandFlow {
            consumer_id,
            message_permits,
        }),
        ..BaseCommand::default()
    }
}

fn close(consumer_id: u64, request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::CloseConsumer as i32,
        close_consumer: Some(CommandCloseConsumer {
            consumer_id,
            request_id,
        }),
        ..BaseCommand::default()
    }
}
