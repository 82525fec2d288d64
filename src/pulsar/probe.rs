//! One look at a broker: is it there, does it let us in, what does it say of itself.
//!
//! Input: a service URL's hosts, credentials, TLS files. Output: a [`Broker`]; the connection is closed again.

use std::time::Duration;

use tokio::sync::mpsc;

use super::auth::Auth;
use super::connection::{Connection, Endpoint, Manner};
use super::tls::TlsFiles;
use crate::{Error, Result};

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
