//! `walpost status`: what a running walpost says of itself at `WALPOST_HTTP_ADDR`, for people, or as JSON.
//!
//! Input: `/status` over HTTP; nothing else is asked, neither Postgres nor Pulsar. Texts that came from rows are printed
//! without their control characters: a terminal would obey them.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::Value;
use tokio::signal::unix::SignalKind;
use tokio::time::sleep;

use super::{print, run::listen};
use crate::config::{Config, settings};
use crate::http::{self, HttpUrl, Request};
use crate::{Error, Result};

/// Between two looks of `--watch`: what it shows is sampled as often.
const INTERVAL: Duration = Duration::from_secs(2);
/// Topics that are listed; `--json` has all.
const TOPICS: usize = 20;

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// As it came.
    pub json: bool,
    /// Again and again.
    pub watch: bool,
}

/// Asks and prints; with `watch` until a signal ends it.
///
/// # Errors
/// Temporary (exit 75) when nothing listens, what listens gives no status, or the connector is stuck; of the configuration
/// when nothing is served.
pub async fn run(config: &Config, options: Options, out: &mut dyn Write) -> Result<()> {
    let name = settings::HTTP_ADDR.env;
    let addr = config.http_addr.ok_or_else(|| {
        Error::config(format!(
            "{name}=none: walpost serves no status; allowed: the address that walpost run was given"
        ))
    })?;
    let url = HttpUrl::parse(&format!("http://{}", reachable(addr))).map_err(Error::bug)?;
    // On a terminal the last one is wiped; elsewhere they follow each other.
    let wipe = if options.watch && std::io::stdout().is_terminal() {
        "\x1b[H\x1b[J"
    } else {
        ""
    };
    let status = ask(&url).await?;
    // Before the first line: whoever has read it may send SIGINT.
    let interrupt = options.watch.then(|| listen(SignalKind::interrupt()));
    let interrupt = interrupt.transpose()?;
    print(out, &format!("{wipe}{}", show(&status, options.json)))?;
    let Some(mut interrupt) = interrupt else {
        if status["alive"] == false {
            return Err(
                Error::temporary("walpost answers, but its connector is stuck")
                    .hint("end it (SIGKILL if need be) and start it again: nothing is lost"),
            );
        }
        return Ok(());
    };
    let again = async {
        loop {
            sleep(INTERVAL).await;
            // It answered before, so it may be starting again: that is worth watching.
            let text = match ask(&url).await {
                Ok(status) => show(&status, options.json),
                Err(error) => format!("{}\n", error.report()),
            };
            print(out, &format!("{wipe}{text}"))?;
        }
    };
    tokio::select! {
        biased;
        _ended = interrupt.recv() => Ok(()),
        failed = again => failed,
    }
}

/// Who listens on all addresses is found on loopback.
fn reachable(addr: SocketAddr) -> SocketAddr {
    let ip = match addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, addr.port())
}

async fn ask(url: &HttpUrl) -> Result<Value> {
    let hint = format!(
        "is walpost run at work on this machine, with the same {}?",
        settings::HTTP_ADDR.env
    );
    let url = url.join("/status");
    let answer = http::send(Request {
        method: Method::GET,
        url: &url,
        authorization: None,
        body: None,
        tls: None,
        peer: "walpost",
    })
    .await
    .map_err(|error| error.hint(hint.clone()))?;
    let odd = || {
        Error::temporary(format!(
            "what answers at {url} ({}) is no walpost",
            answer.status
        ))
        .hint(hint.clone())
    };
    if answer.status == StatusCode::SERVICE_UNAVAILABLE {
        return Err(Error::temporary(format!(
            "walpost at {url} has too many connections"
        )));
    }
    if answer.status != StatusCode::OK {
        return Err(odd());
    }
    let status: Value = serde_json::from_slice(&answer.body).map_err(|_| odd())?;
    if status["phase"].is_string() {
        Ok(status)
    } else {
        Err(odd())
    }
}

fn show(status: &Value, json: bool) -> String {
    if json {
        return format!("{status}\n");
    }
    let mut text = String::new();
    summary(&mut text, status);
    topics(&mut text, status);
    troubles(&mut text, status);
    stragglers(&mut text, status);
    left(&mut text, status);
    if let Some(warnings) = status["warnings"].as_array()
        && let Some(last) = warnings.first()
    {
        let ago_ms = number(&status["now_ms"]).saturating_sub(number(&last["at_ms"]));
        let _ = writeln!(
            text,
            "last warning, {} ago: {}",
            span(ago_ms as f64 / 1000.0),
            plain(&last["text"])
        );
    }
    text
}

fn summary(text: &mut String, status: &Value) {
    let slot = &status["slot"];
    let (lag, in_flight, counters) = (&status["lag"], &status["in_flight"], &status["counters"]);
    let ready = if status["ready"] == true {
        "ready"
    } else {
        "NOT READY"
    };
    let _ = writeln!(
        text,
        "walpost {}, {} ({}), up {}: {ready}: {}",
        plain(&status["version"]),
        plain(&status["role"]),
        plain(&status["phase"]),
        span(status["uptime_seconds"].as_f64().unwrap_or(0.0)),
        plain(&status["reason"])
    );
    let _ = writeln!(
        text,
        "slot {}: wal_status {}, confirmed {}, {} kept by the server{}",
        plain(&slot["name"]),
        plain(&slot["wal_status"]),
        plain(&slot["confirmed_lsn"]),
        bytes(&slot["retained_bytes"]),
        slot["lost_because"]
            .as_str()
            .map_or_else(String::new, |_| format!(
                ", LOST: {}",
                plain(&slot["lost_because"])
            ))
    );
    let _ = writeln!(
        text,
        "lag {}, {}; in flight {} events, {}",
        bytes(&lag["bytes"]),
        lag["seconds"].as_f64().map_or("unknown".to_owned(), span),
        number(&in_flight["messages"]),
        bytes(&in_flight["bytes"])
    );
    let _ = writeln!(
        text,
        "published {} events, {} of them left out by the stream; suppressed {} duplicates, lost connections: {} to Postgres, {} to Pulsar",
        number(&counters["published"]),
        number(&counters["reconciled"]),
        number(&counters["duplicates_suppressed"]),
        number(&counters["reconnects_postgres"]),
        number(&counters["reconnects_pulsar"])
    );
    let scan = &status["scan"];
    if scan.is_object() {
        let _ = writeln!(
            text,
            "scan of {}: {} rows published, at seq {}",
            plain(&scan["table"]),
            number(&scan["published"]),
            number(&scan["position_seq"])
        );
    }
}

fn topics(text: &mut String, status: &Value) {
    let topics = status["topics"].as_array().map_or(&[][..], Vec::as_slice);
    for topic in topics.iter().take(TOPICS) {
        let last = topic["last_receipt_seconds_ago"].as_f64();
        let last = last.map_or("no receipt yet".to_owned(), |last| {
            format!("last receipt {} ago", span(last))
        });
        let _ = writeln!(
            text,
            "topic {}: {} published, {last}",
            plain(&topic["topic"]),
            number(&topic["published"])
        );
    }
    if topics.len() > TOPICS {
        let _ = writeln!(text, "and {} more topics", topics.len() - TOPICS);
    }
}

/// The topics that take nothing, in the broker's words.
fn troubles(text: &mut String, status: &Value) {
    let found = &status["topics_in_trouble"];
    if number(&found["count"]) == 0 {
        return;
    }
    let _ = writeln!(text, "topics in trouble: {}", number(&found["count"]));
    for one in found["listed"].as_array().map_or(&[][..], Vec::as_slice) {
        let events = if one["events_wait"] == true {
            "wait"
        } else {
            "become stragglers"
        };
        let _ = writeln!(
            text,
            "  {} has taken nothing for {}, its events {events}: {}",
            plain(&one["topic"]),
            span(one["age_seconds"].as_f64().unwrap_or(0.0)),
            plain(&one["reason"])
        );
    }
}

fn stragglers(text: &mut String, status: &Value) {
    let found = &status["stragglers"];
    if !found.is_object() {
        return;
    }
    let _ = writeln!(
        text,
        "stragglers: {} retrying, {} parked, {} dead",
        number(&found["retrying"]),
        number(&found["parked"]),
        number(&found["dead"])
    );
    for one in found["oldest"].as_array().map_or(&[][..], Vec::as_slice) {
        let _ = writeln!(
            text,
            "  {} id {} topic {} key {} attempts {} for {}: {}",
            plain(&one["state"]),
            plain(&one["id"]),
            plain(&one["topic"]),
            plain(&one["key"]),
            number(&one["attempts"]),
            span(one["age_seconds"].as_f64().unwrap_or(0.0)),
            plain(&one["reason"])
        );
    }
}

/// Rows that wait to be marked, and what was left undone.
fn left(text: &mut String, status: &Value) {
    let marks = &status["after_publish"];
    if marks.is_object() {
        let full = if marks["is_full"] == true {
            ", and the stream waits for them"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "mode {}: {} rows done, {} wait{full}",
            plain(&marks["mode"]),
            number(&marks["done"]),
            number(&marks["waiting"])
        );
    }
    let found = &status["left"];
    if number(&found["count"]) == 0 {
        return;
    }
    let _ = writeln!(text, "left undone: {}", number(&found["count"]));
    for one in found["listed"].as_array().map_or(&[][..], Vec::as_slice) {
        let _ = writeln!(
            text,
            "  {} {} id {} attempts {}: {}",
            plain(&one["work"]),
            plain(&one["table"]),
            plain(&one["id"]),
            number(&one["attempts"]),
            plain(&one["reason"])
        );
    }
}

/// A text without what a terminal would obey; "(none)" for nothing.
fn plain(value: &Value) -> String {
    let text = value.as_str().unwrap_or("(none)");
    let safe = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(safe).collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn bytes(value: &Value) -> String {
    let Some(bytes) = value.as_u64() else {
        return "unknown".to_owned();
    };
    let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    let fitting = units.iter().find(|(_, size)| bytes >= *size);
    fitting.map_or_else(
        || format!("{bytes} B"),
        |(unit, size)| format!("{:.1} {unit}", bytes as f64 / *size as f64),
    )
}

fn span(seconds: f64) -> String {
    let units = [("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)];
    let fitting = units.iter().find(|(_, size)| seconds >= *size);
    fitting.map_or_else(
        || format!("{seconds:.1} s"),
        |(unit, size)| format!("{:.1} {unit}", seconds / size),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn texts_of_rows_cannot_steer_the_terminal() {
        let status = json!({
            "phase": "streaming",
            "stragglers": { "retrying": 1, "oldest": [{ "id": "\u{1b}[2Jx\u{9b}31m", "reason": "a\nb" }] },
        });
        let text = show(&status, false);
        assert!(
            text.contains("id \u{fffd}[2Jx\u{fffd}31m") && text.contains("a\u{fffd}b"),
            "{text}"
        );
    }

    #[test]
    fn topics_in_trouble_are_printed_with_their_reasons() {
        let mut status = json!({
            "phase": "streaming",
            "topics_in_trouble": {
                "count": 12, "listed": [{ "topic": "persistent://p/d/t", "age_seconds": 75.0, "reason": "no\u{1b}", "events_wait": true }],
            },
        });
        let text = show(&status, false);
        assert!(
            text.contains("topics in trouble: 12\n  persistent://p/d/t has taken nothing for 1.2 min, its events wait: no\u{fffd}\n"),
            "{text}"
        );
        status["topics_in_trouble"] = json!({ "count": 0, "listed": [] });
        assert!(!show(&status, false).contains("trouble"));
    }

    #[test]
    fn who_listens_everywhere_is_asked_on_loopback() {
        for (given, asked) in [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:2", "[::1]:2"),
            ("10.1.2.3:4", "10.1.2.3:4"),
        ] {
            assert_eq!(reachable(given.parse().unwrap()).to_string(), asked);
        }
    }

    #[test]
    fn sizes_and_spans_have_units() {
        assert_eq!(bytes(&json!(1536)), "1.5 KiB");
        assert_eq!(bytes(&json!(null)), "unknown");
        assert_eq!(span(90.0), "1.5 min");
        assert_eq!(span(0.25), "0.2 s");
    }
}
