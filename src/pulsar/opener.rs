//! Finding a topic's broker and opening producers on it: the slow, asynchronous part of publishing, kept out of the
//! publisher's loop.
//!
//! Input: a topic and the producers wanted on it. Output: one [`Event::Opened`] per success, and
//! [`Event::PartitionsCounted`]. What fails is tried again with backoff, for ever: a broker that is away is backpressure and
//! not an error, and a topic that is refused can be mended on the broker's side (a permission, a schema, a topic made anew)
//! while the others go on; where events can be diverted (see `divert`), a topic that is refused for too long is given up and
//! that is reported. Each failure is logged with its reason. The publisher aborts the task when it is no longer wanted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use pulsar::message::proto::{
    BaseCommand, CommandLookupTopic, CommandLookupTopicResponse, CommandPartitionedTopicMetadata,
    CommandProducer, Schema, base_command::Type, command_lookup_topic_response::LookupType,
};
use tokio::sync::{Mutex, Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::connection::{self, Connection, Endpoint, Event, Manner, OpenedProducer};
use super::divert::{Deadline, Diversion};
use super::schema::SchemaConfig;
use super::verdict;
use super::wire::{MAX_SCHEMA_VERSION_BYTES, NextBroker};
use crate::retry::Backoff;
use crate::{Error, Result};

/// As the Java client's `maxLookupRedirects`.
const MAX_REDIRECTS: usize = 20;

/// How brokers are found and greeted: shared by all openers.
#[derive(Debug)]
pub(super) struct Directory {
    service: Vec<(String, u16)>,
    manner: Manner,
    schema: Option<SchemaConfig>,
    events: mpsc::Sender<Event>,
    /// One connection per endpoint. Locks, but not on the data's path: they are taken when a topic is opened. An endpoint's own
    /// is held while connecting, so that sixteen openers make one connection, and one that does not answer holds up no other.
    connections: std::sync::Mutex<HashMap<Endpoint, Arc<Mutex<Slot>>>>,
    next_connection: AtomicU64,
    /// The last lookup said that brokers are reached through the service URL's proxy.
    behind_proxy: AtomicBool,
    pub(super) reconnect: (Duration, Duration),
    diversion: Option<Diversion>,
}

/// Where an endpoint's connection is; locked while one is being made.
#[derive(Debug, Default)]
struct Slot {
    connection: Option<Connection>,
    /// When the last attempt failed.
    failed_at: Option<Instant>,
}

impl Slot {
    fn open(&self) -> Option<Connection> {
        self.connection.clone().filter(|open| !open.is_closed())
    }
}

/// The connection, if it is open and nobody is making one.
fn open_in(slot: &Mutex<Slot>) -> Option<Connection> {
    slot.try_lock().ok()?.open()
}

/// A producer to open.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub producer_id: u64,
    pub producer_name: String,
    /// The connection it was open on before, if the broker may still hold it there.
    pub close_first: Option<Connection>,
}

/// The topic to open them on.
#[derive(Debug)]
pub(super) struct Target {
    /// Its place among the publisher's topics.
    pub index: usize,
    pub name: String,
    /// It was given up before, and nothing was heard of it since.
    pub refused: bool,
    pub next_broker: Option<NextBroker>,
    /// Makes the opener give up a topic that is refused.
    pub hurry: Arc<Notify>,
}

impl Directory {
    pub(super) fn new(
        service: Vec<(String, u16)>,
        manner: Manner,
        schema: Option<SchemaConfig>,
        reconnect: (Duration, Duration),
        diversion: Option<Diversion>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Self {
            service,
            manner,
            schema,
            events,
            connections: std::sync::Mutex::default(),
            next_connection: AtomicU64::new(1),
            behind_proxy: AtomicBool::new(false),
            reconnect,
            diversion,
        }
    }

    async fn connect(&self, endpoint: &Endpoint) -> Result<Connection> {
        let slot = self.slot(endpoint);
        let asked_at = Instant::now();
        let mut place = slot.lock().await;
        if let Some(open) = place.open() {
            return Ok(open);
        }
        if place
            .failed_at
            .is_some_and(|failed_at| failed_at > asked_at)
        {
            // Each by itself would wait for as long as the one before.
            return Err(Error::temporary(format!(
                "{endpoint} was just tried, and cannot be reached"
            )));
        }
        let id = self.next_connection.fetch_add(1, Ordering::Relaxed);
        let opened = Connection::open(endpoint, id, &self.manner, self.events.clone()).await;
        match &opened {
            Ok(opened) => place.connection = Some(opened.clone()),
            Err(_) => place.failed_at = Some(Instant::now()),
        }
        opened
    }

    /// The place of an endpoint's connection.
    fn slot(&self, endpoint: &Endpoint) -> Arc<Mutex<Slot>> {
        let mut slots = self
            .connections
            .lock()
            .expect("nobody panics while holding it");
        // Brokers come and go under new names.
        slots.retain(|_, slot| Arc::strong_count(slot) > 1 || open_in(slot).is_some());
        Arc::clone(slots.entry(endpoint.clone()).or_default())
    }

    /// A connection to a host of the service URL: one that is open already, else the first that answers.
    pub(super) async fn service(&self) -> Result<(Connection, Endpoint)> {
        let hosts = self.service.iter().map(|(host, port)| Endpoint {
            host: host.clone(),
            port: *port,
            via_proxy_to: None,
        });
        for endpoint in hosts.clone() {
            if let Some(open) = open_in(&self.slot(&endpoint)) {
                return Ok((open, endpoint));
            }
        }
        let mut failure = Error::config("the Pulsar service URL names no host");
        for endpoint in hosts {
            match self.connect(&endpoint).await {
                Ok(connection) => return Ok((connection, endpoint)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn tell(&self, event: Event) {
        let _publisher_is_gone = self.events.send(event).await;
    }

    /// Asks which broker serves the topic, following redirects, and connects to it.
    pub(super) async fn broker_of(&self, topic: &str) -> Result<Connection> {
        let (mut connection, service) = self.service().await?;
        let mut authoritative = false;
        for _ in 0..MAX_REDIRECTS {
            let answer = lookup(&connection, topic, authoritative).await?;
            let through_service = answer.proxy_through_service_url();
            self.behind_proxy.store(through_service, Ordering::Relaxed);
            let tls = self.manner.tls.is_some();
            let target = |url: &str| endpoint_of(url, tls, through_service, &service);
            let url = if tls {
                answer.broker_service_url_tls.as_deref()
            } else {
                answer.broker_service_url.as_deref()
            };
            match (answer.response(), url.filter(|url| !url.is_empty())) {
                (LookupType::Connect | LookupType::Redirect, None) => {
                    let kind = if tls { "with" } else { "without" };
                    return Err(Error::temporary(format!(
                        "the lookup of {topic} names no broker address {kind} TLS"
                    ))
                    .hint("the brokers' listeners must match WALPOST_PULSAR_URL"));
                }
                (LookupType::Connect, Some(url)) => return self.connect(&target(url)?).await,
                (LookupType::Redirect, Some(url)) => {
                    authoritative = answer.authoritative();
                    connection = self.connect(&target(url)?).await?;
                }
                _ => {
                    return Err(verdict::of_open(
                        topic,
                        answer.error,
                        answer.message.as_deref(),
                    ));
                }
            }
        }
        Err(Error::temporary(format!(
            "the lookup of {topic} was redirected {MAX_REDIRECTS} times"
        )))
    }

    /// How many partitions a topic has; 0 for a topic without. Where the broker makes topics on first use, it decides now.
    pub(super) async fn partitions_of(&self, topic: &str) -> Result<u32> {
        let (connection, _) = self.service().await?;
        let answer = connection
            .request(|request_id| BaseCommand {
                r#type: Type::PartitionedMetadata as i32,
                partition_metadata: Some(CommandPartitionedTopicMetadata {
                    topic: topic.to_owned(),
                    request_id,
                    ..CommandPartitionedTopicMetadata::default()
                }),
                ..BaseCommand::default()
            })
            .await?;
        let failed = |code, message: Option<&str>| Err(verdict::of_open(topic, code, message));
        if let Some(error) = answer.error {
            return failed(Some(error.error), Some(&error.message));
        }
        match answer.partition_metadata_response {
            None => Err(Error::temporary(format!(
                "the question for the partitions of {topic} got another answer"
            ))),
            Some(answer) if answer.error.is_some() => {
                failed(answer.error, answer.message.as_deref())
            }
            Some(answer) => Ok(answer.partitions()),
        }
    }

    /// The broker that a closing one named as the topic's next.
    async fn next_broker(&self, next: &NextBroker) -> Result<Connection> {
        let (_, service) = self.service().await?;
        let tls = self.manner.tls.is_some();
        let url = if tls {
            &next.assigned_broker_service_url_tls
        } else {
            &next.assigned_broker_service_url
        };
        let url = url.as_deref().unwrap_or_default();
        let through_service = self.behind_proxy.load(Ordering::Relaxed);
        self.connect(&endpoint_of(url, tls, through_service, &service)?)
            .await
    }
}

/// Counts the partitions of a topic, until they are known; the body of the task.
pub(super) async fn count_partitions(
    directory: Arc<Directory>,
    route: usize,
    topic: String,
    hurry: Arc<Notify>,
) {
    let mut patience = Patience::new(&directory, &topic, &hurry, false);
    let partitions = loop {
        match directory.partitions_of(&topic).await {
            Ok(partitions) => break partitions,
            Err(error) if patience.ends_after(&error).await => {
                let reason = error.report();
                let refused = Event::RouteRefused { route, reason };
                return directory.tell(refused).await;
            }
            Err(_) => {}
        }
    };
    patience.rewarded();
    directory
        .tell(Event::PartitionsCounted { route, partitions })
        .await;
}

/// Counts them again, once: the topic works, so a failure is no news.
pub(super) async fn recount_partitions(directory: Arc<Directory>, route: usize, topic: String) {
    let event = match directory.partitions_of(&topic).await {
        Ok(partitions) => Event::PartitionsCounted { route, partitions },
        Err(error) => {
            debug!(topic, "partitions not counted: {}", error.report());
            Event::PartitionsUnknown { route }
        }
    };
    directory.tell(event).await;
}

/// Tries that go on until one succeeds: says why each failed, and waits longer from one to the next.
struct Patience<'a> {
    topic: &'a str,
    backoff: Backoff,
    tried: bool,
    deadline: Deadline,
    hurry: &'a Notify,
}

impl<'a> Patience<'a> {
    fn new(directory: &Directory, topic: &'a str, hurry: &'a Notify, refused: bool) -> Self {
        let (initial, max) = directory.reconnect;
        Self {
            topic,
            backoff: Backoff::new(initial, max),
            tried: false,
            deadline: Deadline::new(directory.diversion, refused),
            hurry,
        }
    }

    /// Waits until the next attempt is due; true when there is to be none, because the topic has been refused for too long.
    async fn ends_after(&mut self, error: &Error) -> bool {
        self.tried = true;
        let (topic, mut delay) = (self.topic, self.backoff.next_delay());
        let give_up_at = self.deadline.after(error);
        if let Some(at) = give_up_at {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            delay = delay.min(left);
        }
        let (retry_in_ms, why) = (delay.as_millis(), error.report());
        if error.is_temporary() {
            warn!(topic, retry_in_ms, "cannot publish yet: {why}");
        } else {
            error!(
                topic,
                retry_in_ms, "cannot publish until this is mended; the topic's events wait: {why}"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => false,
            () = self.hurry.notified(), if give_up_at.is_some() => true,
        }
    }

    fn rewarded(&self) {
        if self.tried {
            info!(topic = self.topic, "the topic is usable again");
        }
    }
}

async fn lookup(
    connection: &Connection,
    topic: &str,
    authoritative: bool,
) -> Result<CommandLookupTopicResponse> {
    let answer = connection
        .request(|request_id| BaseCommand {
            r#type: Type::Lookup as i32,
            lookup_topic: Some(CommandLookupTopic {
                topic: topic.to_owned(),
                request_id,
                authoritative: Some(authoritative),
                ..CommandLookupTopic::default()
            }),
            ..BaseCommand::default()
        })
        .await?;
    if let Some(error) = answer.error {
        return Err(verdict::of_open(
            topic,
            Some(error.error),
            Some(&error.message),
        ));
    }
    answer
        .lookup_topic_response
        .ok_or_else(|| Error::temporary(format!("the lookup of {topic} got another answer")))
}

/// `pulsar://host:port` (`pulsar+ssl://` with TLS) of a lookup answer → where to connect; through a proxy the service
/// address stays.
fn endpoint_of(
    url: &str,
    tls: bool,
    through_service: bool,
    service: &Endpoint,
) -> Result<Endpoint> {
    let odd = || {
        Error::temporary(format!(
            "the lookup names a broker address that cannot be used: {url}"
        ))
    };
    let broker = url
        .strip_prefix(if tls { "pulsar+ssl://" } else { "pulsar://" })
        .ok_or_else(odd)?
        .trim_end_matches('/');
    let (host, port) = broker.rsplit_once(':').ok_or_else(odd)?;
    let port = port.parse().map_err(|_| odd())?;
    Ok(if through_service {
        Endpoint {
            via_proxy_to: Some(broker.to_owned()),
            ..service.clone()
        }
    } else {
        let host = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        Endpoint {
            host,
            port,
            via_proxy_to: None,
        }
    })
}

/// Opens the producers of one topic; the body of the opener task.
pub(super) async fn open(
    directory: Arc<Directory>,
    mut target: Target,
    mut wanted: Vec<Wanted>,
    pause: Duration,
) {
    tokio::time::sleep(pause).await;
    let mut next_broker = target.next_broker.take();
    let topic = &target.name;
    let mut patience = Patience::new(&directory, topic, &target.hurry, target.refused);
    while let Err(error) = attempt(&directory, topic, &mut wanted, next_broker.take()).await {
        // A failed attempt has first closed all that was open before, and what it left half made; nothing that is still wanted
        // is open.
        if patience.ends_after(&error).await {
            let refused = Event::TopicRefused {
                topic: target.index,
                producers: wanted.iter().map(|wanted| wanted.producer_id).collect(),
                reason: error.report(),
            };
            return directory.tell(refused).await;
        }
    }
    patience.rewarded();
}

/// One round: what was opened is reported and taken out of `wanted`; the first failure is returned.
async fn attempt(
    directory: &Directory,
    topic: &str,
    wanted: &mut Vec<Wanted>,
    next_broker: Option<NextBroker>,
) -> Result<()> {
    for producer in wanted.iter_mut() {
        if let Some(connection) = producer.close_first.take() {
            close_producer(&connection, producer.producer_id).await;
        }
    }
    let schema = directory.schema.as_ref();
    let schema = match schema {
        Some(schema) => Some(schema.read_for(topic).await?),
        None => None,
    };
    let connection = match next_broker {
        None => directory.broker_of(topic).await?,
        Some(next) => match directory.next_broker(&next).await {
            Ok(connection) => connection,
            Err(_) => directory.broker_of(topic).await?,
        },
    };
    let results = join_all(
        wanted
            .iter()
            .map(|producer| create(&connection, topic, producer, schema.as_ref())),
    )
    .await;
    let mut opened = Vec::new();
    let mut failure = None;
    let mut failed = Vec::new();
    for (producer, result) in std::mem::take(wanted).into_iter().zip(results) {
        match result {
            Ok(producer) => opened.push(producer),
            Err(error) => {
                failed.push(producer);
                // An error that is final outweighs one that may pass.
                if failure.as_ref().is_none_or(Error::is_temporary) {
                    failure = Some(error);
                }
            }
        }
    }
    *wanted = failed;
    if !opened.is_empty() {
        directory
            .tell(Event::Opened {
                connection,
                producers: opened,
            })
            .await;
    }
    failure.map_or(Ok(()), Err)
}

/// Creates a producer. After a failure there is none: one whose creation was not answered in time is closed again. The broker
/// may be at it still, and would answer the next attempt on this connection, which has the same producer id, with "already
/// created" and without the last sequence id (`ServerCnx.handleProducer`). Nothing would then be a probe, and a batch that
/// holds both stored and new messages be dropped. Closing the connection would do as well, but every topic of that broker has
/// it; a close is answered after the creation's end, or ends it (`ServerCnx.handleCloseProducer`). The Java client does so too.
pub(super) async fn create(
    connection: &Connection,
    topic: &str,
    producer: &Wanted,
    schema: Option<&Schema>,
) -> Result<OpenedProducer> {
    let answer = connection
        .request(|request_id| BaseCommand {
            r#type: Type::Producer as i32,
            producer: Some(CommandProducer {
                topic: topic.to_owned(),
                producer_id: producer.producer_id,
                request_id,
                producer_name: Some(producer.producer_name.clone()),
                user_provided_producer_name: Some(true),
                schema: schema.cloned(),
                ..CommandProducer::default()
            }),
            ..BaseCommand::default()
        })
        .await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            close_producer(connection, producer.producer_id).await;
            return Err(error);
        }
    };
    if let Some(error) = answer.error {
        return Err(verdict::of_open(
            topic,
            Some(error.error),
            Some(&error.message),
        ));
    }
    let success = answer.producer_success.ok_or_else(|| {
        Error::temporary(format!(
            "the creation of a producer on {topic} got another answer"
        ))
    })?;
    // -1: the broker knows no sequence of this name.
    let last_sequence_id = success
        .last_sequence_id
        .and_then(|id| u64::try_from(id).ok());
    Ok(OpenedProducer {
        producer_id: producer.producer_id,
        last_sequence_id,
        schema_version: schema_version(topic, schema, success.schema_version)?,
    })
}

/// What the batches say of their schema: the broker's version of it, where producers have one.
fn schema_version(
    topic: &str,
    schema: Option<&Schema>,
    version: Option<Vec<u8>>,
) -> Result<Option<Bytes>> {
    let version = version.filter(|version| schema.is_some() && !version.is_empty());
    match version {
        Some(long) if long.len() > MAX_SCHEMA_VERSION_BYTES => Err(Error::bug(format!(
            "the broker's schema version of {topic} has {} bytes, and there is room for {MAX_SCHEMA_VERSION_BYTES}",
            long.len()
        ))),
        version => Ok(version.map(Bytes::from)),
    }
}

/// Closes a producer and waits until the broker has: one whose send was refused, so that the frames behind the refused one
/// cannot be stored before it is sent again; or one that may be half made. When the connection is gone so is the producer.
pub(super) async fn close_producer(connection: &Connection, producer_id: u64) {
    let answer = connection
        .request(|id| connection::close_producer(producer_id, id))
        .await;
    if answer.is_err() {
        connection.close("a producer could not be closed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
