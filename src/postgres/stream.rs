//! `Stream`: one type for the three ways to reach a server, so that everything above it is written once.
//!
//! Owns the socket. It also is what hands `tokio_postgres` an already encrypted connection: [`Established`] stands in
//! for its TLS connector and only passes the stream and its channel binding through.

use std::future::{Ready, ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::tls;

use super::quiet::{Quiet, Socket};

/// A connection to a server, encrypted or not.
#[derive(Debug)]
pub enum Stream {
    /// TCP without encryption.
    Tcp(TcpStream),
    /// A Unix socket; never encrypted, as in libpq.
    Unix(UnixStream),
    /// Either of the two, made for reading in gulps.
    Quiet(Quiet),
    /// TLS over TCP.
    Tls {
        /// The encrypted stream.
        stream: Box<tokio_rustls::client::TlsStream<TcpStream>>,
        /// `tls-server-end-point` of the server's certificate, where it has one.
        end_point: Option<Vec<u8>>,
    },
}

impl Stream {
    /// True when what is sent cannot be read on the way.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls { .. })
    }

    /// Data for SCRAM channel binding.
    pub fn end_point(&self) -> Option<&[u8]> {
        match self {
            Self::Tls { end_point, .. } => end_point.as_deref(),
            Self::Tcp(_) | Self::Unix(_) | Self::Quiet(_) => None,
        }
    }

    /// The same connection as a [`Quiet`] one; an encrypted one stays as it is (its socket belongs to the TLS library).
    ///
    /// # Errors
    /// When the system has no more descriptors.
    pub(super) fn into_quiet(self) -> io::Result<Self> {
        let socket = match self {
            Self::Tcp(socket) => Socket::Tcp(socket.into_std()?),
            Self::Unix(socket) => Socket::Unix(socket.into_std()?),
            Self::Quiet(_) | Self::Tls { .. } => return Ok(self),
        };
        Quiet::new(socket).map(Self::Quiet)
    }

    /// Whether it is a Unix socket.
    pub(super) fn is_unix(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Quiet(quiet) => quiet.socket().is_unix(),
            Self::Tcp(_) | Self::Tls { .. } => false,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Quiet(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls { stream, .. } => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Quiet(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls { stream, .. } => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Quiet(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls { stream, .. } => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Quiet(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls { stream, .. } => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl tls::TlsStream for Stream {
    fn channel_binding(&self) -> tls::ChannelBinding {
        match self.end_point() {
            Some(data) => tls::ChannelBinding::tls_server_end_point(data.to_vec()),
            None => tls::ChannelBinding::none(),
        }
    }
}

/// A "TLS connector" for a stream on which the handshake is already done, or was not wanted.
#[derive(Clone, Copy, Debug)]
pub struct Established;

impl tls::TlsConnect<Stream> for Established {
    type Stream = Stream;
    type Error = io::Error;
    type Future = Ready<io::Result<Stream>>;

    fn connect(self, stream: Stream) -> Self::Future {
        ready(Ok(stream))
    }
}
