//! The socket of a broker connection, plain or TLS, in two halves that one task reads and writes by turns.
//!
//! Input: an [`Endpoint`]. Output: a [`Reader`] and a [`Writer`]. Plain TCP keeps its own lock-free halves: it is the path
//! that benchmarks run on, and no byte of it pays for TLS.

use std::io::{self, IoSlice};
use std::time::Duration;

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::tls::TlsFiles;
use super::unwritten::Unwritten;
use crate::aside::read_aside;
use crate::reach::reach;
use crate::{Error, Result, tls};

/// For TCP, for the TLS handshake and for CONNECT, each.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Frames handed to the kernel in one call; 64 small frames fill a socket buffer's worth of a normal send.
const WRITE_SLICES: usize = 64;

/// Where to connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Endpoint {
    pub host: String,
    pub port: u16,
    /// `host:port` of the broker behind a Pulsar proxy.
    pub via_proxy_to: Option<String>,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)?;
        match &self.via_proxy_to {
            Some(broker) => write!(f, " (proxy to {broker})"),
            None => Ok(()),
        }
    }
}

/// The half that reads.
pub(super) enum Reader {
    Plain(OwnedReadHalf),
    Tls(ReadHalf<TlsStream<TcpStream>>),
}

/// The half that writes.
pub(super) enum Writer {
    Plain(OwnedWriteHalf),
    Tls(WriteHalf<TlsStream<TcpStream>>),
}

/// Connects to `endpoint`; with `tls`, the certificate must be for the endpoint's host (behind a proxy: the proxy's).
/// So many of its addresses are tried behind the others.
pub(super) async fn connect(
    endpoint: &Endpoint,
    skip: usize,
    tls: Option<&TlsFiles>,
) -> Result<(Reader, Writer)> {
    let away = |error: io::Error| {
        Error::temporary(format!("cannot reach the Pulsar broker at {endpoint}")).caused_by(error)
    };
    // Before the network: a file that cannot be used is told even when the broker is away.
    let config = match tls.cloned() {
        Some(tls) => {
            let read = read_aside(TlsFiles::WHAT, tls.names(), move || tls.client_config());
            Some(read.await?)
        }
        None => None,
    };
    let connecting = reach(&endpoint.host, endpoint.port, skip, CONNECT_TIMEOUT);
    let stream = connecting.await.map_err(away)?;
    stream.set_nodelay(true).map_err(away)?;
    let Some(config) = config else {
        let (reader, writer) = stream.into_split();
        return Ok((Reader::Plain(reader), Writer::Plain(writer)));
    };
    let name = ServerName::try_from(endpoint.host.clone()).map_err(|_| {
        Error::config(format!(
            "{} is no name that a certificate could be for",
            endpoint.host
        ))
    })?;
    let identified = config.client_auth_cert_resolver.has_certs();
    let handshake = TlsConnector::from(config).connect(name, stream);
    let stream = timeout(CONNECT_TIMEOUT, handshake)
        .await
        .map_err(|_| away(io::ErrorKind::TimedOut.into()))?
        .map_err(|error| {
            broken(endpoint, identified, &error).unwrap_or_else(|| {
                Error::temporary(format!("no TLS with the Pulsar broker at {endpoint}"))
                    .caused_by(error)
                    .hint("pulsar+ssl:// needs the broker's TLS port (brokerServicePortTls)")
            })
        })?;
    // Both halves share the TLS session, so tokio puts a lock between them. One task uses them, never at once: the lock is
    // always free, and costs nothing beside the encryption.
    let (reader, writer) = tokio::io::split(stream);
    Ok((Reader::Tls(reader), Writer::Tls(writer)))
}

/// What TLS has to say about an I/O error: in TLS 1.3 a server refuses a client's certificate only after the handshake.
/// `identified`: there was one.
pub(super) fn broken(endpoint: &Endpoint, identified: bool, error: &io::Error) -> Option<Error> {
    let peer = format!("the Pulsar broker at {endpoint}");
    tls::explain(&peer, &endpoint.host, identified, error)
}

impl Reader {
    /// Reads what there is; 0 is the end. Cancel safe.
    pub(super) async fn read_buf(&mut self, inbox: &mut BytesMut) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read_buf(inbox).await,
            Self::Tls(reader) => reader.read_buf(inbox).await,
        }
    }
}

impl Writer {
    pub(super) fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Writes all of it, down to the socket.
    pub(super) async fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(writer) => writer.write_all(frame).await,
            Self::Tls(writer) => {
                writer.write_all(frame).await?;
                writer.flush().await
            }
        }
    }

    /// Writes the front of the queue and returns how many bytes were taken. With an empty queue it pushes out what TLS has
    /// encrypted and the kernel has not taken yet, and returns `None` when nothing is left. Cancel safe.
    pub(super) async fn write_some(&mut self, unwritten: &Unwritten) -> io::Result<Option<usize>> {
        if unwritten.is_empty() {
            if let Self::Tls(writer) = self {
                writer.flush().await?;
            }
            return Ok(None);
        }
        let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
        let count = unwritten.fill(&mut slices);
        let slices = &slices[..count];
        match self {
            Self::Plain(writer) => writer.write_vectored(slices).await,
            Self::Tls(writer) => writer.write_vectored(slices).await,
        }
        .map(Some)
    }
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
