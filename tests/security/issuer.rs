//! A tiny OAuth 2 server (discovery and the client credentials grant) whose tokens the test's broker accepts.
//!
//! A thread of its own serves one connection after the other until the guard is dropped; HTTP is as much of it as walpost
//! sends: a head, and a body of `Content-Length` bytes.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::broker::token;

/// The client's secret, with everything that a form must encode.
pub(crate) const CLIENT_SECRET: &str = "a secret & more=100% ü";
const CLIENT_ID: &str = "the-client";
/// Role in the tokens.
pub(crate) const ROLE: &str = "oauth2-user";

/// A running server.
pub(crate) struct Issuer {
    /// `http://127.0.0.1:…/realm`
    pub(crate) url: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    addr: String,
}

struct Shared {
    life: Duration,
    stop: AtomicBool,
    /// Every token handed out, and the form that asked for it.
    given: Mutex<Vec<(String, String)>>,
}

impl Issuer {
    /// Its tokens live for `life`.
    pub(crate) fn start(life: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = listener.local_addr().expect("bound").to_string();
        let url = format!("http://{addr}/realm");
        let shared = Arc::new(Shared {
            life,
            stop: AtomicBool::new(false),
            given: Mutex::default(),
        });
        let (served, issuer) = (Arc::clone(&shared), url.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if served.stop.load(Ordering::Relaxed) {
                    return;
                }
                // A client that goes away in the middle concerns nobody.
                let _ = stream.and_then(|stream| answer(stream, &served, &issuer));
            }
        });
        Self {
            url,
            shared,
            thread: Some(thread),
            addr,
        }
    }

    /// The tokens handed out so far.
    pub(crate) fn tokens(&self) -> Vec<String> {
        let given = self.shared.given.lock().expect("no panic");
        given.iter().map(|(token, _)| token.clone()).collect()
    }

    /// The form of the last request that got one.
    pub(crate) fn last_form(&self) -> String {
        let given = self.shared.given.lock().expect("no panic");
        given.last().expect("a token was given").1.clone()
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes the thread; fails only when it has ended.
        let _ = TcpStream::connect(&self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(stream: TcpStream, shared: &Shared, issuer: &str) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
    }
    let length = head
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, value)| value.trim().parse().expect("a number"));
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let form = String::from_utf8(body).expect("a form is ASCII");
    let (status, json) = if head.starts_with("GET /realm/.well-known/openid-configuration ") {
        (
            "200 OK",
            format!(r#"{{"token_endpoint":"{issuer}/token"}}"#),
        )
    } else if head.starts_with("POST /realm/token ") {
        give(shared, &form)
    } else {
        ("404 Not Found", "{}".to_owned())
    };
    write!(
        reader.get_mut(),
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{json}",
        json.len()
    )
}

fn give(shared: &Shared, form: &str) -> (&'static str, String) {
    // As application/x-www-form-urlencoded writes `CLIENT_SECRET`.
    let secret = "client_secret=a%20secret%20%26%20more%3D100%25%20%C3%BC";
    let right = form.split('&').any(|pair| pair == secret)
        && form
            .split('&')
            .any(|pair| pair == format!("client_id={CLIENT_ID}"))
        && form.starts_with("grant_type=client_credentials&");
    if !right {
        // Repeats what was sent, as a careless server might: walpost must not.
        let answer = format!(r#"{{"error":"invalid_client","error_description":"got {form}"}}"#);
        return ("401 Unauthorized", answer);
    }
    let token = token(ROLE, shared.life);
    let answer = format!(
        r#"{{"access_token":"{token}","token_type":"Bearer","expires_in":{}}}"#,
        shared.life.as_secs()
    );
    let mut given = shared.given.lock().expect("no panic");
    given.push((token, form.to_owned()));
    ("200 OK", answer)
}
