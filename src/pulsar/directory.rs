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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pulsar::message::proto::{
    BaseCommand, CommandLookupTopic, CommandLookupTopicResponse, CommandPartitionedTopicMetadata,
    base_command::Type, command_lookup_topic_response::LookupType,
};
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::connection::{Connection, Endpoint, Event, Manner};
use super::verdict;
use super::wire::NextBroker;
use crate::{Error, Result};

/// As the Java client's `maxLookupRedirects`.
const MAX_REDIRECTS: usize = 20;

/// The shard of lookups, and of topics that have no connection of their own.
pub(super) const SHARED: u32 = 0;

/// How brokers are found and greeted: shared by all who open producers or consumers.
#[derive(Debug)]
pub(super) struct Directory {
    service: Vec<(String, u16)>,
    manner: Manner,
    events: mpsc::Sender<Event>,
    /// One connection per endpoint and shard. Locks, but not on the data's path: they are taken when a topic is opened. A connection's own
    /// is held while connecting, so that sixteen openers make one connection, and one that does not answer holds up no other.
    connections: std::sync::Mutex<HashMap<(Endpoint, u32), Arc<Mutex<Slot>>>>,
    next_connection: AtomicU64,
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
            events,
            connections: std::sync::Mutex::default(),
            next_connection: AtomicU64::new(1),
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
        let opened = Connection::open(endpoint, id, &self.manner, self.events.clone()).await;
        match &opened {
            Ok(opened) => place.connection = Some(opened.clone()),
            Err(_) => place.failed_at = Some(Instant::now()),
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

    /// A connection to a host of the service URL: one that is open already, else the first that answers.
    pub(super) async fn service(&self) -> Result<(Connection, Endpoint)> {
        let hosts = self.service.iter().map(|(host, port)| Endpoint {
            host: host.clone(),
            port: *port,
            via_proxy_to: None,
        });
        for endpoint in hosts.clone() {
            if let Some(open) = open_in(&self.slot(&endpoint, SHARED)) {
                return Ok((open, endpoint));
            }
        }
        let mut failure = Error::config("the Pulsar service URL names no host");
        for endpoint in hosts {
            match self.connect(&endpoint, SHARED).await {
                Ok(connection) => return Ok((connection, endpoint)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    /// Asks which broker serves the topic, following redirects over shared connections, and connects to it.
    pub(super) async fn broker_of(&self, topic: &str, shard: u32) -> Result<Connection> {
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
                (LookupType::Connect, Some(url)) => {
                    return self.connect(&target(url)?, shard).await;
                }
                (LookupType::Redirect, Some(url)) => {
                    authoritative = answer.authoritative();
                    connection = self.connect(&target(url)?, SHARED).await?;
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
    pub(super) async fn next_broker(&self, next: &NextBroker, shard: u32) -> Result<Connection> {
        let (_, service) = self.service().await?;
        let tls = self.manner.tls.is_some();
        let url = if tls {
            &next.assigned_broker_service_url_tls
        } else {
            &next.assigned_broker_service_url
        };
        let url = url.as_deref().unwrap_or_default();
        let through_service = self.behind_proxy.load(Ordering::Relaxed);
        self.connect(&endpoint_of(url, tls, through_service, &service)?, shard)
            .await
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
