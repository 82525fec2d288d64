//! A small HTTP client: one request a connection, with deadlines and a limit on the answer.
//!
//! For the broker's admin interface and for OAuth 2 servers: a handful of requests in a connector's life, so there is no
//! pool, no redirect followed (credentials would go with it) and no cookie. Input: a [`Request`]. Output: status and body.
//! Neither is logged or put into an error here: a body may hold a token.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::Secret;
use crate::reach::reach;
use crate::{Error, Result};

/// To connect, and for the TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// From the request to the answer's last byte.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer expected, a broker's whole configuration, is about 30 KiB.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// A parsed `http://…` or `https://…` URL: scheme, host, port and path; never credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl {
    tls: bool,
    /// An IPv6 address without its brackets.
    host: String,
    port: u16,
    /// Empty, or begins with a slash and does not end with one.
    path: String,
}

impl HttpUrl {
    /// Reads the URL; an error says what is wrong with it and never repeats it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (None, Some(rest)) => (true, rest),
            (None, None) => {
                return Err("it does not begin with http:// or https://".to_owned());
            }
        };
        if let Some(odd) = rest.chars().find(|c| {
            !c.is_ascii_graphic() || matches!(c, '@' | '?' | '#' | '"' | '<' | '>' | '\\')
        }) {
            return Err(if odd == '@' {
                "credentials do not belong into a URL".to_owned()
            } else {
                format!("it has the character {odd:?}")
            });
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or("a '[' is not closed")?;
                if host.parse::<std::net::Ipv6Addr>().is_err() {
                    return Err("what stands in brackets is no IPv6 address".to_owned());
                }
                (host, after)
            }
            None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
        };
        if host.is_empty() {
            return Err("a host is missing".to_owned());
        }
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => {
                if tls {
                    443
                } else {
                    80
                }
            }
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits
                .parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or("a port is not from 1 to 65535")?,
            _ => return Err("a port is not a number".to_owned()),
        };
        Ok(Self {
            tls,
            host: host.to_owned(),
            port,
            path: path.trim_end_matches('/').to_owned(),
        })
    }

    /// True for `https`.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The URL with `path` (which begins with a slash) behind its own.
    #[must_use]
    pub fn join(&self, path: &str) -> Self {
        Self {
            path: format!("{}{path}", self.path),
            ..self.clone()
        }
    }

    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

/// One request.
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) url: &'a HttpUrl,
    /// The value of `Authorization`.
    pub(crate) authorization: Option<&'a Secret>,
    /// Content type and body.
    pub(crate) body: Option<(&'static str, String)>,
    /// For `https`.
    pub(crate) tls: Option<Arc<ClientConfig>>,
    /// Who is asked, for errors: "the admin interface of Pulsar".
    pub(crate) peer: &'a str,
}

/// Status and body. No `Debug`: the body may hold a token.
pub(crate) struct Response {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

/// Sends the request and reads the whole answer, whatever its status.
///
/// # Errors
/// Temporary when there is no answer; final when the server's certificate is not acceptable.
pub(crate) async fn send(request: Request<'_>) -> Result<Response> {
    let url = request.url;
    let peer = format!("{} at {}", request.peer, url.authority());
    let away = |error: io::Error| Error::temporary(format!("cannot reach {peer}")).caused_by(error);
    let late = || Error::temporary(format!("{peer} does not answer"));
    let connecting = reach(&url.host, url.port, 0, CONNECT_TIMEOUT);
    let stream = connecting.await.map_err(away)?;
    if !url.tls {
        let answer = timeout(ANSWER_TIMEOUT, exchange(stream, &request, &peer));
        return answer.await.map_err(|_| late())?;
    }
    let tls = request
        .tls
        .as_ref()
        .ok_or_else(|| Error::bug("a request over https without settings for TLS"))?;
    let name = ServerName::try_from(url.host.clone())
        .map_err(|_| Error::config(format!("{} is no name of a certificate", url.host)))?;
    let identified = tls.client_auth_cert_resolver.has_certs();
    let handshake = TlsConnector::from(Arc::clone(tls)).connect(name, stream);
    let stream = timeout(CONNECT_TIMEOUT, handshake)
        .await
        .map_err(|_| late())?
        .map_err(|error| {
            crate::tls::explain(&peer, &url.host, identified, &error)
                .unwrap_or_else(|| away(error).hint("is this the server's port for https?"))
        })?;
    let answer = timeout(ANSWER_TIMEOUT, exchange(stream, &request, &peer));
    answer.await.map_err(|_| late())?
}

/// One request and its answer on a fresh connection.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send,
    request: &Request<'_>,
    peer: &str,
) -> Result<Response> {
    let failed = |error: hyper::Error| {
        Error::temporary(format!("{peer} ends the connection without an answer")).caused_by(error)
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(failed)?;
    let message = message(request)?;
    let asking = async {
        let answer = sender.send_request(message).await.map_err(failed)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), MAX_BODY_BYTES);
        let body = body.collect().await.map_err(|error| {
            Error::temporary(format!("the answer of {peer} cannot be read")).caused_by(error)
        })?;
        let body = body.to_bytes();
        Ok(Response { status, body })
    };
    // The connection has to be driven while the answer is awaited; it ends with this function.
    let mut asking = std::pin::pin!(asking);
    tokio::select! {
        biased;
        answer = &mut asking => answer,
        _ended = connection => asking.await,
    }
}

fn message(request: &Request<'_>) -> Result<hyper::Request<Full<Bytes>>> {
    let url = request.url;
    let path = if url.path.is_empty() { "/" } else { &url.path };
    let mut builder = hyper::Request::builder()
        .method(request.method.clone())
        .uri(path)
        .header(HOST, url.authority())
        .header(ACCEPT, "application/json");
    if let Some(secret) = request.authorization {
        let mut value = HeaderValue::from_str(secret.expose())
            .map_err(|_| Error::bug("credentials that cannot stand in a header"))?;
        value.set_sensitive(true);
        builder = builder.header(AUTHORIZATION, value);
    }
    let body = match &request.body {
        None => Bytes::new(),
        Some((content_type, body)) => {
            builder = builder.header(CONTENT_TYPE, *content_type);
            Bytes::from(body.clone())
        }
    };
    builder
        .body(Full::new(body))
        .map_err(|_| Error::bug(format!("{url} cannot stand in a request")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_scheme_host_port_and_path() {
        for (text, shown) in [
            ("http://h", "http://h:80"),
            ("https://h", "https://h:443"),
            ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
            ("https://h:8443/realms/x/", "https://h:8443/realms/x"),
            ("http://[::1]:8080", "http://[::1]:8080"),
        ] {
            assert_eq!(
                HttpUrl::parse(text).map(|url| url.to_string()).as_deref(),
                Ok(shown)
            );
        }
        let url = HttpUrl::parse("https://h/a/").unwrap();
        assert_eq!(url.join("/b").to_string(), "https://h:443/a/b");
    }

    #[test]
    fn a_wrong_url_says_why_without_repeating_it() {
        for (text, why) in [
            ("ftp://hunter2", "begin with http"),
            ("http://", "host is missing"),
            ("http://u:hunter2@h", "credentials"),
            ("http://h:x", "not a number"),
            ("http://h:0", "1 to 65535"),
            ("http://h:70000", "1 to 65535"),
            ("http://h/a?b=hunter2", "'?'"),
            ("http://h/a b", "' '"),
            ("http://[::1", "not closed"),
            ("http://[x]", "IPv6"),
            ("http://[::1]8080", "not a number"),
        ] {
            let said = HttpUrl::parse(text).unwrap_err();
            assert!(
                said.contains(why) && !said.contains("hunter2"),
                "{text}: {said}"
            );
        }
    }
}
