//! Connections, paths, headers.
//!
//! Input: a listening socket. Output: answers to GET and HEAD on six paths.
//!
//! # Limits
//!
//! One request a connection, [`MAX_CONNECTIONS`] at a time, [`PATIENCE`] for all of it: the head within [`HEAD_PATIENCE`], at
//! most [`HEAD_BYTES`]. So whoever connects takes a known amount of memory for a known time. A connection too many gets 503 at
//! once, so that a probe sees a reason and not a timeout; where as many are being told that, it just ends. Bodies of
//! requests are not read. What is no HTTP gets 400, a head too large 431 (both by hyper).

use std::convert::Infallible;
use std::future::{poll_fn, ready};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::{Context, exposition, health, status};

/// A scraper or two, probes, some open status pages: a handful.
const MAX_CONNECTIONS: usize = 64;
/// For a request and its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// For the request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// The request line and all headers.
const HEAD_BYTES: usize = 16 * 1024;
/// What is read and for how long of a client that goes on sending behind its answer.
const GOODBYE_BYTES: u64 = 64 * 1024;
const GOODBYE: Duration = Duration::from_secs(1);
/// What a connection too many gets.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n\
    Retry-After: 10\r\nContent-Length: 21\r\nConnection: close\r\n\r\ntoo many connections\n";

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";
const PAGE: &str = include_str!("page.html");
const PATHS: &str = "/  /status  /history  /metrics  /livez  /readyz";

/// The page may do nothing but run its own script and style, which are known by their digests, and ask this server.
static PAGE_POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; connect-src 'self'; script-src '{}'; style-src '{}'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'",
        digest_of("script"),
        digest_of("style")
    );
    HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// What stands in the page's one element of that name, as a policy names it.
fn digest_of(element: &str) -> String {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    let behind = PAGE.split_once(&open).map_or("", |(_, behind)| behind);
    let inside = behind.split_once(&close).map_or("", |(inside, _)| inside);
    let digest = ring::digest::digest(&ring::digest::SHA256, inside.as_bytes());
    let digest = base64::engine::general_purpose::STANDARD.encode(digest);
    format!("sha256-{digest}")
}

/// Serves for ever.
pub(super) async fn run(listener: std::net::TcpListener, context: Arc<Context>) {
    let listener = TcpListener::from_std(listener).expect("a socket that does not block");
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let lobby = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // The client has gone already, or there are no descriptors left: those come back.
                debug!("a connection could not be accepted: {error}");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Ok(place) = Arc::clone(&room).try_acquire_owned() {
            let context = Arc::clone(&context);
            tokio::spawn(async move {
                let _ended = timeout(PATIENCE, serve(stream, &context)).await;
                drop(place);
            });
        } else if let Ok(place) = Arc::clone(&lobby).try_acquire_owned() {
            tokio::spawn(async move {
                let _ended = timeout(PATIENCE, turn_away(stream)).await;
                drop(place);
            });
        }
        // Else there is no room even for that: the connection ends here.
    }
}

async fn turn_away(mut stream: TcpStream) {
    if stream.write_all(BUSY).await.is_ok() {
        goodbye(stream).await;
    }
}

async fn serve(stream: TcpStream, context: &Context) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), context);
        ready(Ok::<_, Infallible>(response))
    });
    let mut connection = http1::Builder::new()
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let served = poll_fn(|context| connection.poll_without_shutdown(context)).await;
    if let Err(error) = served {
        debug!("a request was no request: {error}");
    }
    goodbye(connection.into_parts().io.into_inner()).await;
}

/// Ends a connection so that the client gets the answer also if it is still sending: what is unread at a close makes the
/// system send a reset, which may overtake the answer.
async fn goodbye(mut stream: TcpStream) {
    let _gone = stream.shutdown().await;
    let mut rest = stream.take(GOODBYE_BYTES);
    let mut nowhere = tokio::io::sink();
    let reading = tokio::io::copy(&mut rest, &mut nowhere);
    let _too_long = timeout(GOODBYE, reading).await;
}

fn answer(method: &Method, path: &str, context: &Context) -> Response<Full<Bytes>> {
    let known = matches!(
        path,
        "/" | "/status" | "/history" | "/metrics" | "/livez" | "/readyz"
    );
    if !known {
        let said = format!("nothing is here; there are {PATHS}\n");
        return respond(StatusCode::NOT_FOUND, TEXT, said);
    }
    if method != Method::GET && method != Method::HEAD {
        let said = "only GET and HEAD: nothing can be changed through this port\n";
        let mut response = respond(StatusCode::METHOD_NOT_ALLOWED, TEXT, said);
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    let observed = context.observed.borrow();
    let seen = observed.fresh();
    let view = context.view.borrow();
    match path {
        "/" => {
            let mut page = respond(StatusCode::OK, HTML, PAGE);
            let policy = PAGE_POLICY.clone();
            page.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
            page
        }
        "/status" => respond(
            StatusCode::OK,
            JSON,
            status::status(context, seen, &view).to_string(),
        ),
        "/history" => respond(StatusCode::OK, JSON, status::history(&view).to_string()),
        "/metrics" => respond(
            StatusCode::OK,
            exposition::CONTENT_TYPE,
            exposition::render(&context.meter, seen, &view),
        ),
        "/livez" => match health::stuck(context.meter.since_beat()) {
            None => respond(StatusCode::OK, TEXT, "alive\n"),
            Some(why) => respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
        },
        _ => {
            let readiness = &view.readiness;
            let (status, word) = if readiness.ready {
                (StatusCode::OK, "ready")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready")
            };
            respond(status, TEXT, format!("{word}: {}\n", readiness.reason))
        }
    }
}

fn respond(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    for (name, value) in [
        (CONTENT_TYPE, content_type),
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ] {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_for_nothing_from_elsewhere_and_marks_up_no_text() {
        // The name of the SVG namespace is no address.
        let page = PAGE.replace("http://www.w3.org/2000/svg", "");
        for wrong in [
            "http://",
            "https://",
            "src=",
            "href=",
            "@import",
            "url(",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "style=",
            "onclick",
            "onload",
        ] {
            assert!(!page.contains(wrong), "{wrong}");
        }
        assert_eq!(PAGE.matches("<script>").count(), 1);
        assert_eq!(PAGE.matches("<style>").count(), 1);
    }

    #[test]
    fn the_policy_names_script_and_style_by_their_digests() {
        let policy = PAGE_POLICY.to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"));
        assert_eq!(policy.matches("sha256-").count(), 2);
        assert_ne!(digest_of("script"), digest_of("nothing"));
    }

    #[test]
    fn the_answer_to_a_connection_too_many_has_the_length_that_it_says() {
        let text = std::str::from_utf8(BUSY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("Content-Length: {}", body.len())));
    }
}
