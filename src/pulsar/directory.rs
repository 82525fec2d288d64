//! Finding brokers: lookups, and the connections that they lead to.
//!
//! Input: the hosts of the service URL, and topics. Output: [`Connection`]s, and how many partitions a topic has. Each function
//! is one attempt: what fails is told, and whoever asked decides whether and when it is asked again.
//!
//! A connection is known by its endpoint and a shard. Shard 0 carries lookups and everything that no other shard was asked for;
//! a topic that needs a connection of its own (a broker that throttles a topic stops reading the whole connection) asks for
//! another shard.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use pulsar::message::proto::{
    BaseCommand, CommandLookupTopic, CommandLookupTopicResponse, base_command::Type,
    command_lookup_topic_response::LookupType,
};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connection::{Connection, Endpoint, Event, Manner, REQUEST_TIMEOUT};
use super::verdict::{self, Fault};
use super::wire::{self, NextBroker};
use crate::{Error, Result};

/// As the Java client's `maxLookupRedirects`.
const MAX_REDIRECTS: usize = 20;

/// A host that gives so many answers in a row that may be about itself (`ServiceNotReady`) is passed over.
const MAX_UNCLEAR: usize = 8;

/// The shard of lookups, and of topics that have no connection of their own.
pub(super) const SHARED: u32 = 0;

/// What a connection is known by: its endpoint and its shard.
type Key = (Endpoint, u32);

/// How brokers are found and greeted: shared by all who open producers or consumers.
#[derive(Debug)]
pub(super) struct Directory {
    service: Vec<(String, u16)>,
    manner: Manner,
    request_timeout: Duration,
    events: mpsc::Sender<Event>,
    /// One connection per endpoint and shard. Locks, but not on the data's path: they are taken when a topic is opened. A connection's own
    /// is held while connecting, so that sixteen openers make one connection, and one that does not answer holds up no other.
    connections: std::sync::Mutex<HashMap<Key, Arc<Mutex<Slot>>>>,
    next_connection: AtomicU64,
    /// How many hosts of the service URL were passed over; tells which one is asked.
    turn: AtomicUsize,
    /// How many connections could not be made, or did not answer. Of a name with several addresses another comes first then.
    misses: AtomicUsize,
    /// So many answers in a row, of one host, were of the kind that may be about the host itself.
    unclear: AtomicUsize,
    /// The last lookup said that brokers are reached through the service URL's proxy.
    behind_proxy: AtomicBool,
}

/// Where a connection is kept; locked while one is being made.
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

impl Directory {
    pub(super) fn new(
        service: Vec<(String, u16)>,
        manner: Manner,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Self {
            service,
            manner,
            request_timeout: REQUEST_TIMEOUT,
            events,
            connections: std::sync::Mutex::default(),
            next_connection: AtomicU64::new(1),
            turn: AtomicUsize::new(0),
            misses: AtomicUsize::new(0),
            unclear: AtomicUsize::new(0),
            behind_proxy: AtomicBool::new(false),
        }
    }

    /// The connection of this endpoint and shard, made now if there is none.
    async fn connect(&self, endpoint: &Endpoint, shard: u32) -> Result<Connection> {
        let slot = self.slot(endpoint, shard);
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
        let (manner, events) = (&self.manner, self.events.clone());
        let endpoint = (endpoint, self.misses.load(Ordering::Relaxed));
        let opened =
            Connection::open_within(self.request_timeout, endpoint, id, manner, events).await;
        if let Ok(opened) = &opened {
            place.connection = Some(opened.clone());
        } else {
            place.failed_at = Some(Instant::now());
            self.misses.fetch_add(1, Ordering::Relaxed);
        }
        opened
    }

    /// The place of a connection.
    fn slot(&self, endpoint: &Endpoint, shard: u32) -> Arc<Mutex<Slot>> {
        let mut slots = self
            .connections
            .lock()
            .expect("nobody panics while holding it");
        // Brokers come and go under new names.
        slots.retain(|_, slot| Arc::strong_count(slot) > 1 || open_in(slot).is_some());
        Arc::clone(slots.entry((endpoint.clone(), shard)).or_default())
    }

    /// Whoever asks for its endpoint and shard gets another connection from now on. It ends when nobody has it any more.
    pub(super) fn release(&self, connection: u64) {
        let slots = self
            .connections
            .lock()
            .expect("nobody panics while holding it");
        // (A slot that is locked is one where another is being made, or this one is being handed out.)
        for mut slot in slots.values().filter_map(|slot| slot.try_lock().ok()) {
            slot.connection.take_if(|kept| kept.id() == connection);
        }
    }

    /// A connection to a host of the service URL: the one that was asked last, or the next that can be connected to.
    pub(super) async fn service(&self) -> Result<(Connection, Endpoint)> {
        let (connection, host) = self.host().await?;
        Ok((connection, host.endpoint))
    }

    async fn host(&self) -> Result<(Connection, Host)> {
        let mut failure = Error::config("the Pulsar service URL names no host");
        for _ in &self.service {
            let host = self.next_host();
            match self.connect(&host.endpoint, SHARED).await {
                Ok(connection) => return Ok((connection, host)),
                Err(error) => {
                    self.pass_over(&host);
                    failure = error;
                }
            }
        }
        Err(failure)
    }

    /// The host that is to be asked. Call only where there is one.
    fn next_host(&self) -> Host {
        let turn = self.turn.load(Ordering::Relaxed);
        let (host, port) = &self.service[turn % self.service.len()];
        Host {
            turn,
            endpoint: Endpoint {
                host: host.clone(),
                port: *port,
                via_proxy_to: None,
            },
        }
    }

    /// The next one is to be asked from now on. Of many who were let down by the same host only the first moves on.
    fn pass_over(&self, host: &Host) {
        let next = host.turn.wrapping_add(1);
        let _another_did =
            self.turn
                .compare_exchange(host.turn, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Asks over a connection that lookups share. Who gives no answer is asked over another connection the next time: behind one
    /// address there may be many brokers or proxies. The old connection stays for those whose producers are on it.
    async fn ask(
        &self,
        connection: &Connection,
        endpoint: &Endpoint,
        build: impl FnOnce(u64) -> (BaseCommand, Bytes),
    ) -> Result<BaseCommand> {
        let answer = connection.request_framed(build).await;
        if answer.is_err() {
            self.misses.fetch_add(1, Ordering::Relaxed);
            let mut place = self.slot(endpoint, SHARED).lock_owned().await;
            if place
                .connection
                .as_ref()
                .is_some_and(|kept| kept.id() == connection.id())
            {
                place.connection = None;
            }
        }
        answer
    }

    /// Asks which broker serves the topic, following redirects over shared connections, and connects to it.
    pub(super) async fn broker_of(&self, topic: &str, shard: u32) -> Result<Connection> {
        let (connection, host) = self.host().await?;
        let found = self.find(connection, &host.endpoint, topic, shard).await;
        self.judge(&host, found)
    }

    /// A host that does not answer, or cannot say again and again, is passed over: another may know more. What it says of a topic is
    /// no reason: the next one may be dead, and everybody would wait for it.
    fn judge<T>(&self, host: &Host, result: Result<T>) -> Result<T> {
        let passes = match result.as_ref().map_err(verdict::fault) {
            Err(_) if result.as_ref().is_err_and(verdict::is_unanswered) => true,
            Err(Fault::Broker) => true,
            Err(Fault::Unclear) => self.unclear.fetch_add(1, Ordering::Relaxed) + 1 >= MAX_UNCLEAR,
            Ok(_) | Err(Fault::Topic | Fault::Mend) => {
                self.unclear.store(0, Ordering::Relaxed);
                false
            }
        };
        if passes {
            self.unclear.store(0, Ordering::Relaxed);
            self.pass_over(host);
        }
        result
    }

    async fn find(
        &self,
        mut connection: Connection,
        service: &Endpoint,
        topic: &str,
        shard: u32,
    ) -> Result<Connection> {
        let mut endpoint = service.clone();
        let mut authoritative = false;
        for _ in 0..MAX_REDIRECTS {
            let lookup = |request_id| {
                let command = lookup(topic, authoritative, request_id);
                let frame = wire::encode_command(&command);
                (command, frame)
            };
            let answer = self.ask(&connection, &endpoint, lookup).await?;
            let answer = found(topic, answer)?;
            let through_service = answer.proxy_through_service_url();
            self.behind_proxy.store(through_service, Ordering::Relaxed);
            let tls = self.manner.tls.is_some();
            let target = |url: &str| endpoint_of(url, tls, through_service, service);
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
                (LookupType::Connect, Some(url)) => {
                    return self.connect(&target(url)?, shard).await;
                }
                (LookupType::Redirect, Some(url)) => {
                    authoritative = answer.authoritative();
                    endpoint = target(url)?;
                    connection = self.connect(&endpoint, SHARED).await?;
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

    /// How many partitions a topic has; 0 for a topic without. Where the broker makes topics on first use, it may do so now when `create`
    /// says so. (A broker before PIP-344 may in any case, and says 0 of a topic that is not there.)
    pub(super) async fn partitions_of(&self, topic: &str, create: bool) -> Result<u32> {
        let (connection, host) = self.host().await?;
        let question = |request_id| {
            let frame = wire::encode_partitions_question(topic, request_id, create);
            (BaseCommand::default(), frame)
        };
        let answer = self.ask(&connection, &host.endpoint, question).await;
        self.judge(&host, answer.and_then(|answer| counted(topic, answer)))
    }

    /// The topic's broker: the one that a closing broker named, if that can be had, else by a lookup.
    pub(super) async fn broker(
        &self,
        topic: &str,
        next: Option<NextBroker>,
        shard: u32,
    ) -> Result<Connection> {
        if let Some(next) = next
            && let Ok(connection) = self.next_broker(topic, &next, shard).await
        {
            return Ok(connection);
        }
        self.broker_of(topic, shard).await
    }

    /// Where a closing broker says that the topic is next: that broker, or the one that the other cluster names.
    pub(super) async fn next_broker(
        &self,
        topic: &str,
        next: &NextBroker,
        shard: u32,
    ) -> Result<Connection> {
        let tls = self.manner.tls.is_some();
        let url = if tls { &next.url_tls } else { &next.url };
        let url = url.as_deref().unwrap_or_default();
        if next.is_cluster {
            let service = direct_endpoint(url, tls)?;
            let connection = self.connect(&service, SHARED).await?;
            return self.find(connection, &service, topic, shard).await;
        }
        let endpoint = if self.behind_proxy.load(Ordering::Relaxed) {
            let (_, service) = self.service().await?;
            endpoint_of(url, tls, true, &service)?
        } else {
            direct_endpoint(url, tls)?
        };
        self.connect(&endpoint, shard).await
    }
}

/// An attempt to reach the service URL, which goes on while nobody waits for it. A host that is switched off takes longer than some wait: an
/// attempt that ended with them would begin with that host again, and never come to the next one.
#[derive(Debug, Default)]
pub(super) struct ServiceAttempt {
    /// One at most. It ends with this value.
    task: JoinSet<Result<(Connection, Endpoint)>>,
}

impl ServiceAttempt {
    /// As [`Directory::service`]. Cancel safe: the next call waits for the same attempt.
    pub(super) async fn service(
        &mut self,
        directory: &Arc<Directory>,
    ) -> Result<(Connection, Endpoint)> {
        // What came of it while nobody waited may hold no more; a connection that it made is found at once.
        let _old = self.task.try_join_next();
        if self.task.is_empty() {
            let directory = Arc::clone(directory);
            self.task.spawn(async move { directory.service().await });
        }
        match self.task.join_next().await {
            Some(Ok(reached)) => reached,
            Some(Err(error)) => {
                Err(Error::bug("the attempt to reach a broker ended").caused_by(error))
            }
            None => Err(Error::bug("nobody tries to reach a broker")),
        }
    }
}

/// A host of the service URL.
#[derive(Debug)]
struct Host {
    /// How many were passed over before it.
    turn: usize,
    endpoint: Endpoint,
}

fn lookup(topic: &str, authoritative: bool, request_id: u64) -> BaseCommand {
    BaseCommand {
        r#type: Type::Lookup as i32,
        lookup_topic: Some(CommandLookupTopic {
            topic: topic.to_owned(),
            request_id,
            authoritative: Some(authoritative),
            ..CommandLookupTopic::default()
        }),
        ..BaseCommand::default()
    }
}

/// The answer to a lookup.
fn found(topic: &str, answer: BaseCommand) -> Result<CommandLookupTopicResponse> {
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

/// The answer to a question for partitions.
fn counted(topic: &str, answer: BaseCommand) -> Result<u32> {
    let failed = |code, message: Option<&str>| Err(verdict::of_open(topic, code, message));
    if let Some(error) = answer.error {
        return failed(Some(error.error), Some(&error.message));
    }
    match answer.partition_metadata_response {
        None => Err(Error::temporary(format!(
            "the question for the partitions of {topic} got another answer"
        ))),
        Some(answer) if answer.error.is_some() => failed(answer.error, answer.message.as_deref()),
        Some(answer) => Ok(answer.partitions()),
    }
}

/// `pulsar://host:port` (`pulsar+ssl://` with TLS) of a lookup answer → where to connect; through a proxy the service
/// address stays.
fn endpoint_of(
    url: &str,
    tls: bool,
    through_service: bool,
    service: &Endpoint,
) -> Result<Endpoint> {
    let direct = direct_endpoint(url, tls)?;
    if !through_service {
        return Ok(direct);
    }
    let (_, broker) = url.split_once("://").unwrap_or_default();
    Ok(Endpoint {
        via_proxy_to: Some(broker.trim_end_matches('/').to_owned()),
        ..service.clone()
    })
}

fn direct_endpoint(url: &str, tls: bool) -> Result<Endpoint> {
    let odd = || {
        Error::temporary(format!(
            "the broker names an address that cannot be used: {url}"
        ))
    };
    let broker = url
        .strip_prefix(if tls { "pulsar+ssl://" } else { "pulsar://" })
        .ok_or_else(odd)?
        .trim_end_matches('/');
    let (host, port) = broker.rsplit_once(':').ok_or_else(odd)?;
    let port = port.parse().map_err(|_| odd())?;
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    Ok(Endpoint {
        host,
        port,
        via_proxy_to: None,
    })
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
