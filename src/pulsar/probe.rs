//! One look at a broker: is it there, does it let us in, what does it say of itself, may we publish.
//!
//! Input: a service URL's hosts, credentials, TLS files; topics. Output: a [`Broker`]; what is wrong with which topic. The
//! connections are closed again, and nothing is sent.

use std::time::Duration;

use tokio::sync::mpsc;

use super::auth::Auth;
use super::connection::{Connection, Endpoint, Manner};
use super::creation;
use super::directory::{Directory, SHARED};
use super::reader::ReaderConfig;
use super::schema::SchemaConfig;
use super::tls::TlsFiles;
use crate::lease::Lease;
use crate::{Error, Result};

/// As the Java client's `operationTimeoutMs`.
const CREATION_TIMEOUT: Duration = Duration::from_secs(30);

/// What a broker said when it was connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    /// `host:port`.
    pub address: String,
    /// As the broker (or a proxy) calls itself: "Pulsar 4.0.8".
    pub server_version: String,
    /// The largest entry it takes.
    pub max_message_bytes: usize,
}

/// Connects to the first host that answers, with these credentials.
///
/// # Errors
/// That of the last host: temporary when it is away, final when it refuses.
pub async fn probe(
    service: &[(String, u16)],
    auth: Auth,
    tls: Option<TlsFiles>,
    keepalive_interval: Duration,
) -> Result<Broker> {
    let manner = Manner {
        auth,
        tls,
        keepalive_interval,
        lease: Lease::default(),
    };
    // What the connection says on its own concerns nobody here; dropping the receiver only silences it.
    let (events, _) = mpsc::channel(1);
    let mut failure = Error::config("the Pulsar service URL names no host");
    for (host, port) in service {
        let endpoint = Endpoint {
            host: host.clone(),
            port: *port,
            via_proxy_to: None,
        };
        match Connection::open(&endpoint, 0, &manner, events.clone()).await {
            Ok(connection) => {
                let broker = Broker {
                    address: endpoint.to_string(),
                    // Brokers say "Pulsar Server4.0.8".
                    server_version: connection.server_version().replace("Server", ""),
                    max_message_bytes: connection.max_message_bytes(),
                };
                connection.close("looked at");
                return Ok(broker);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Opens a producer on each topic (on one of its partitions) and closes it again. Gives the largest entry that the broker
/// takes, and what it says of the topics that it refuses.
///
/// # Errors
/// When the broker cannot be reached at all.
pub async fn produce_to(
    config: ReaderConfig,
    schema: Option<&SchemaConfig>,
    topics: &[String],
) -> Result<(usize, Vec<Error>)> {
    let manner = Manner {
        auth: config.auth,
        tls: config.tls,
        keepalive_interval: config.keepalive_interval,
        lease: Lease::default(),
    };
    // Nobody listens: see above.
    let (events, _) = mpsc::channel(1);
    let directory = Directory::new(config.service, manner, events);
    let (service, _) = directory.service().await?;
    let mut refusals = Vec::new();
    for (topic, number) in topics.iter().zip(0..) {
        let tried = Box::pin(produce(&directory, schema, topic, number)).await;
        refusals.extend(tried.err());
    }
    let max_message_bytes = service.max_message_bytes();
    service.close("looked at");
    Ok((max_message_bytes, refusals))
}

async fn produce(
    directory: &Directory,
    schema: Option<&SchemaConfig>,
    topic: &str,
    producer_id: u64,
) -> Result<()> {
    let part = match directory.partitions_of(topic, true).await? {
        0 => topic.to_owned(),
        _ => format!("{topic}-partition-0"),
    };
    let connection = directory.broker_of(&part, SHARED).await?;
    let name = format!("walpost-check-{:x}-{producer_id}", std::process::id());
    let made = creation::create(&connection, &part, (producer_id, &name), schema);
    // A creation that is not answered ends with the connection.
    let made = tokio::time::timeout(CREATION_TIMEOUT, made).await;
    made.map_err(|_| Error::temporary("the Pulsar broker does not answer a request"))??;
    let _ends_with_the_connection = creation::close(&connection, producer_id).await;
    Ok(())
}
