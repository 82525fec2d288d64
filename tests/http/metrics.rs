//! `/metrics`, as promtool and a real Prometheus see it.

use serde_json::Value;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use super::{DEADLINE, addr_of, get, insert, insert_many, streaming};
use crate::support::{Database, Proxy, eventually, servers, tool, unique};

/// The contract.
const NAMES: [&str; 12] = [
    "walpost_events_published_total",
    "walpost_publish_latency_seconds_bucket",
    "walpost_replication_lag_bytes",
    "walpost_replication_lag_seconds",
    "walpost_slot_retained_bytes",
    "walpost_in_flight_messages",
    "walpost_in_flight_bytes",
    "walpost_stragglers",
    "walpost_duplicates_suppressed_total",
    "walpost_reconnects_total",
    "walpost_confirmed_lsn",
    "walpost_role",
];

/// Debian's Prometheus, which scrapes one address each second; stopped and its folder removed when dropped.
struct Prometheus {
    child: Child,
    folder: PathBuf,
    addr: String,
}

impl Prometheus {
    async fn scraping(target: &str) -> Self {
        let program = tool("prometheus");
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique("prometheus"));
        std::fs::create_dir_all(&folder).expect("a folder");
        let config = folder.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n\
             scrape_configs: [{{job_name: walpost, static_configs: [{{targets: ['{target}']}}]}}]\n"
        );
        std::fs::write(&config, text).expect("a file");
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = free.local_addr().expect("bound").to_string();
        drop(free);
        let child = std::process::Command::new(program)
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                folder.join("data").display()
            ))
            .arg(format!("--web.listen-address={addr}"))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("log")).expect("a file"))
            .spawn()
            .expect("Prometheus starts");
        let prometheus = Self {
            child,
            folder,
            addr,
        };
        eventually(DEADLINE, "Prometheus to listen", async || {
            tokio::net::TcpStream::connect(&prometheus.addr).await.ok()
        })
        .await;
        prometheus
    }

    /// The series that a query gives.
    async fn query(&self, query: &str) -> Vec<Value> {
        let mut path = "/api/v1/query?query=".to_owned();
        for byte in query.bytes() {
            write!(path, "%{byte:02X}").expect("a String takes it");
        }
        // HTTP/1.0, so that the body is not cut into chunks.
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        let answer = super::raw(&self.addr, request.as_bytes()).await;
        let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        body["data"]["result"]
            .as_array()
            .cloned()
            .unwrap_or_default()
    }

    async fn wait_for(&self, query: &str) -> Vec<Value> {
        let what = format!("Prometheus to know {query}");
        eventually(DEADLINE, &what, async || {
            let found = self.query(query).await;
            (!found.is_empty()).then_some(found)
        })
        .await
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            eprintln!("--- Prometheus said:\n{log}\n---");
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

async fn scraped() -> (Database, crate::support::Walpost, String) {
    let (database, walpost, addr) = streaming("metrics", &[]).await;
    insert(&database, "a", "k", "x").await;
    insert(&database, "b", "k", "x").await;
    insert_many(&database, 1000).await;
    database.wait_all_confirmed(DEADLINE).await;
    // The observer looks every two seconds.
    eventually(DEADLINE, "the lag to be known", async || {
        let text = get(&addr, "/metrics").await.body;
        text.contains("walpost_replication_lag_seconds 0\n")
            .then_some(())
    })
    .await;
    (database, walpost, addr)
}

#[tokio::test]
async fn promtool_finds_no_fault_with_the_metrics() {
    let (_database, walpost, addr) = scraped().await;
    let answer = get(&addr, "/metrics").await;
    assert_eq!(
        answer.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    let mut promtool = std::process::Command::new(tool("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool starts");
    let mut stdin = promtool.stdin.take().expect("piped");
    stdin.write_all(answer.body.as_bytes()).expect("it reads");
    drop(stdin);
    let said = promtool.wait_with_output().expect("it ends");
    let text = [said.stdout, said.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        said.status.success() && text.is_empty(),
        "{text}\n{}",
        answer.body
    );
    walpost.stop().await;
}

#[tokio::test]
async fn a_real_prometheus_knows_every_metric_of_the_contract_and_counts_what_was_published() {
    let (database, walpost, addr) = scraped().await;
    let prometheus = Prometheus::scraping(&addr).await;
    for name in NAMES {
        prometheus.wait_for(name).await;
    }
    prometheus.wait_for("up{job=\"walpost\"} == 1").await;
    for (aggregatetype, count) in [("a", 1), ("b", 1), ("load", 1000)] {
        let topic = database.topic(aggregatetype);
        let query = format!("walpost_events_published_total{{topic=\"{topic}\"}} == {count}");
        prometheus.wait_for(&query).await;
    }
    // Every event was observed, and none took longer than this test.
    prometheus
        .wait_for("walpost_publish_latency_seconds_count == 1002")
        .await;
    prometheus
        .wait_for("walpost_publish_latency_seconds_bucket{le=\"60\"} == 1002")
        .await;
    prometheus
        .wait_for("walpost_publish_latency_seconds_sum > 0")
        .await;
    prometheus
        .wait_for("walpost_role{role=\"active\"} == 1")
        .await;
    prometheus.wait_for("walpost_confirmed_lsn > 0").await;
    prometheus.wait_for("walpost_build_info == 1").await;
    prometheus
        .wait_for("process_resident_memory_bytes > 1e6")
        .await;
    prometheus.wait_for("process_cpu_seconds_total > 0").await;
    walpost.stop().await;
}

#[tokio::test]
async fn lost_connections_repeated_rows_and_messages_the_broker_knew_are_counted() {
    // GIVEN a stream with one event that waits for its receipt
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let settings = [
        ("WALPOST_RECONNECT_MAX", "500ms"),
        ("WALPOST_PULSAR_URL", &*url),
    ];
    let mut database = Database::create("lost").await;
    database.deduplicate(servers()).await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;
    insert(&database, "t", "k", "x").await;
    database.wait_all_confirmed(DEADLINE).await;
    proxy.hold_upstream_replies(true);
    insert(&database, "t", "k", "y").await;
    has_line(&addr, "walpost_in_flight_messages 1").await;

    // WHEN the replication connection is lost
    database.terminate_walsender().await;

    // THEN it is counted, and so is the row that Postgres sends again
    has_line(&addr, "walpost_reconnects_total{side=\"postgres\"} 1").await;
    has_line(&addr, "walpost_duplicates_suppressed_total 1").await;

    // AND WHEN the broker connection is lost too, with the receipt of what the broker has stored
    proxy.cut();
    proxy.hold_upstream_replies(false);
    database.wait_all_confirmed(DEADLINE).await;

    // THEN that is counted, and the message that the broker's deduplication knew
    let lost = async || {
        let text = get(&addr, "/metrics").await.body;
        let zero = "walpost_reconnects_total{side=\"pulsar\"} 0\n";
        (!text.contains(zero)).then_some(())
    };
    eventually(DEADLINE, "the loss to be counted", lost).await;
    has_line(&addr, "walpost_duplicates_suppressed_total 2").await;
    has_line(&addr, "walpost_in_flight_messages 0").await;
    walpost.stop().await;
}

/// Waits until the metrics have this line.
async fn has_line(addr: &str, line: &str) {
    eventually(DEADLINE, line, async || {
        let text = get(addr, "/metrics").await.body;
        text.lines().any(|found| found == line).then_some(())
    })
    .await;
}
