//! What walpost says of itself over HTTP is true, harms nobody, and costs the pipe nothing: readiness follows progress,
//! Prometheus and promtool take the metrics, a browser shows the page without obeying what stands in rows, and no client,
//! however odd, takes more than its share.

#[path = "http/clients.rs"]
mod clients;
#[path = "http/health.rs"]
mod health;
#[path = "http/left.rs"]
mod left;
#[path = "http/metrics.rs"]
mod metrics;
#[path = "http/page.rs"]
mod page;
#[path = "http/status.rs"]
mod status;
mod support;
#[path = "http/trouble.rs"]
mod trouble;

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use support::{Database, Walpost, eventually};

const DEADLINE: Duration = Duration::from_secs(60);

/// Where a child serves, as its log says.
async fn addr_of(walpost: &mut Walpost) -> String {
    let line = walpost.wait_for_line("health at http://", DEADLINE).await;
    let (_, addr) = line.split_once("http://").expect("just found");
    addr.trim_end_matches('/').to_owned()
}

/// A prepared database, a stream on it, and where that one serves.
async fn streaming(prefix: &str, settings: &[(&str, &str)]) -> (Database, Walpost, String) {
    let database = Database::create(prefix).await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(settings).await;
    let addr = addr_of(&mut walpost).await;
    // Judged once a second.
    eventually(DEADLINE, "it to be ready", async || {
        (get(&addr, "/readyz").await.status == 200).then_some(())
    })
    .await;
    (database, walpost, addr)
}

/// Commits one event.
async fn insert(database: &Database, topic: &str, key: &str, payload: &str) {
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ($1, $2, 't', $3)";
    database.rows(insert, &[&topic, &key, &payload]).await;
}

/// Commits many small events of the topic `load` in one transaction.
async fn insert_many(database: &Database, count: i64) {
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 'load', 'key-' || n % 50, 't', '1' FROM generate_series(1, $1::int8) n";
    database.rows(insert, &[&count]).await;
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    /// The value of a header, by its name in lower case.
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        let mut found = lines.filter(|(found, _)| found.eq_ignore_ascii_case(name));
        found.next().map(|(_, value)| value)
    }
}

/// Sends these bytes and reads to the end of the connection.
async fn raw(addr: &str, bytes: &[u8]) -> Answer {
    let asking = async {
        let mut stream = TcpStream::connect(addr).await.expect("it listens");
        stream.write_all(bytes).await.expect("it reads");
        let mut said = Vec::new();
        stream.read_to_end(&mut said).await.expect("it answers");
        said
    };
    let said = timeout(DEADLINE, asking).await.expect("an answer in time");
    let said = String::from_utf8(said).expect("UTF-8");
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or((&said, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no HTTP: {said:?}")),
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

async fn ask(addr: &str, method: &str, path: &str) -> Answer {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n");
    raw(addr, request.as_bytes()).await
}

async fn get(addr: &str, path: &str) -> Answer {
    ask(addr, "GET", path).await
}

/// `/status`, parsed.
async fn status_of(addr: &str) -> Value {
    let answer = get(addr, "/status").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).expect("JSON")
}
