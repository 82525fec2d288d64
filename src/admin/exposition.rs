//! `/metrics`: Prometheus' text format, version 0.0.4.
//!
//! Written by hand and not by a client library: a registry would be a second home for numbers that the [`Meter`] has
//! already, and the format is three kinds of lines (<https://prometheus.io/docs/instrumenting/exposition_formats/>).
//! `promtool check metrics` and a real Prometheus judge it in `tests/http.rs`.
//!
//! What is not known is left out, never told as zero: without a fresh word from Postgres there is no lag and no retention, in
//! poll mode there is no slot, and without `walpost.straggler` there are no stragglers.

use std::fmt::Write as _;

use super::observer::Observed;
use super::process;
use super::sampler::View;
use crate::meter::{LATENCY_BOUNDS, Meter, ROLES, Side};
use crate::upkeep::Work;

/// Of the answer.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics, as they are now.
pub(super) fn render(meter: &Meter, seen: Option<&Observed>, view: &View) -> String {
    let mut page = Page(String::with_capacity(16 * 1024));
    let version = env!("CARGO_PKG_VERSION");
    page.family(
        "walpost_build_info",
        "gauge",
        "The version, as a label; always 1.",
    );
    page.sample("walpost_build_info", &[("version", version)], 1);
    events(&mut page, meter);
    latency(&mut page, meter);
    positions(&mut page, meter, seen, view);
    stragglers(&mut page, seen);
    upkeep(&mut page, meter);
    state(&mut page, meter, view);
    own_process(&mut page, meter);
    page.0
}

fn events(page: &mut Page, meter: &Meter) {
    let name = "walpost_events_published_total";
    page.family(
        name,
        "counter",
        "Messages with a send receipt, by topic without partition; beyond the first 200 topics as \"other\". From the stream, \
         from scans of the table, retried stragglers and dead letters.",
    );
    for topic in meter.topics() {
        page.sample(name, &[("topic", topic.name)], topic.published);
    }
    let counters = meter.counters();
    page.counter(
        "walpost_events_received_total",
        "Rows of outbox tables taken from the replication stream.",
        counters.events,
    );
    page.counter(
        "walpost_transactions_total",
        "Transactions taken from the replication stream, with or without outbox rows.",
        counters.transactions,
    );
    page.counter(
        "walpost_messages_skipped_total",
        "Messages of the replication stream that are no inserts into an outbox table.",
        counters.skipped,
    );
    page.counter(
        "walpost_messages_refused_total",
        "Logical messages for walpost that are not transactional, and so no events.",
        counters.refused,
    );
    page.counter(
        "walpost_stragglers_stored_total",
        "Events stored in walpost.straggler because they could not be published.",
        counters.stragglers,
    );
    page.counter(
        "walpost_reconciled_events_total",
        "Rows that the stream left out and that were published from the table, or stored as stragglers.",
        meter.all_reconciled(),
    );
    page.counter(
        "walpost_duplicates_suppressed_total",
        "Repeats that reached no topic: rows that Postgres sent again, messages that the broker's deduplication knew.",
        meter.duplicates_suppressed(),
    );
    page.gauge(
        "walpost_topics_in_trouble",
        "Topics and partitions that take nothing because of what the broker answered about them: their events wait, or become \
         stragglers. /status tells names and answers.",
        meter.topics_in_trouble(),
    );
    let name = "walpost_reconnects_total";
    page.family(
        name,
        "counter",
        "Connections that were lost and are made again, by side.",
    );
    for (label, side) in [("postgres", Side::Postgres), ("pulsar", Side::Pulsar)] {
        page.sample(name, &[("side", label)], meter.times_lost(side));
    }
}

fn latency(page: &mut Page, meter: &Meter) {
    let name = "walpost_publish_latency_seconds";
    page.family(
        name,
        "histogram",
        "From a transaction's commit to its events' send receipt, each event of a receipt with the time of the receipt's \
         oldest transaction; only events of the replication stream.",
    );
    let read = meter.latencies();
    let mut count = 0;
    for (bound, events) in LATENCY_BOUNDS.iter().zip(read.buckets) {
        count += events;
        let bound = bound.as_secs_f64().to_string();
        page.sample(
            "walpost_publish_latency_seconds_bucket",
            &[("le", &bound)],
            count,
        );
    }
    count += read.buckets[LATENCY_BOUNDS.len()];
    page.sample(
        "walpost_publish_latency_seconds_bucket",
        &[("le", "+Inf")],
        count,
    );
    page.sample(
        "walpost_publish_latency_seconds_sum",
        &[],
        read.sum.as_secs_f64(),
    );
    page.sample("walpost_publish_latency_seconds_count", &[], count);
}

fn positions(page: &mut Page, meter: &Meter, seen: Option<&Observed>, view: &View) {
    if let Some(bytes) = seen.and_then(Observed::lag_bytes) {
        page.gauge(
            "walpost_replication_lag_bytes",
            "Log that the slot has not confirmed.",
            bytes,
        );
    }
    if let Some(seconds) = view.lag_seconds {
        page.gauge(
            "walpost_replication_lag_seconds",
            "How long ago the log ended where the slot has confirmed it now; 0 when everything is confirmed.",
            seconds,
        );
    }
    let slot = seen.and_then(|seen| seen.slot.as_ref());
    if let Some(bytes) = slot.and_then(|slot| slot.retained_bytes) {
        page.gauge(
            "walpost_slot_retained_bytes",
            "Log that the server keeps for the slot.",
            bytes,
        );
    }
    if let Some(slot) = slot {
        page.gauge(
            "walpost_slot_lost",
            "1 when the slot was invalidated and can never stream again.",
            u8::from(slot.lost_because().is_some()),
        );
    }
    let confirmed = slot.and_then(|slot| slot.confirmed_flush);
    page.gauge(
        "walpost_confirmed_lsn",
        "Position up to which everything is confirmed, in bytes from the log's beginning.",
        meter
            .confirmed()
            .max(confirmed.unwrap_or_default())
            .as_u64(),
    );
    let (messages, bytes) = meter.in_flight();
    page.gauge(
        "walpost_in_flight_messages",
        "Events handed to the broker's side and without a receipt.",
        messages,
    );
    page.gauge(
        "walpost_in_flight_bytes",
        "Encoded bytes of these events.",
        bytes,
    );
    page.gauge(
        "walpost_postgres_observed",
        "1 while Postgres answers the queries behind lag, slot and stragglers.",
        u8::from(seen.is_some()),
    );
}

fn stragglers(page: &mut Page, seen: Option<&Observed>) {
    let Some(found) = seen.and_then(|seen| seen.stragglers.as_ref()) else {
        return;
    };
    let name = "walpost_stragglers";
    page.family(
        name,
        "gauge",
        "Events in walpost.straggler: retrying, parked behind an earlier one of their key, or dead.",
    );
    for (state, count) in [
        ("retrying", found.retrying),
        ("parked", found.parked),
        ("dead", found.dead),
    ] {
        page.sample(name, &[("state", state)], count);
    }
}

fn upkeep(page: &mut Page, meter: &Meter) {
    let marks = meter.upkeep().marks();
    page.gauge(
        "walpost_after_publish_rows_waiting",
        "Published rows that wait to be marked or deleted; at 100000 the stream waits for them.",
        marks.waiting,
    );
    page.counter(
        "walpost_after_publish_rows_total",
        "Published rows that were marked or deleted, were gone, or were left with a reason.",
        marks.done,
    );
    let name = "walpost_left_undone";
    page.family(
        name,
        "gauge",
        "Rows, partitions and tables that were left with a reason and are tried again: published rows that cannot be marked or deleted \
         (after_publish), unmarked rows that cannot be published (unmarked), old rows and partitions that cannot be removed \
         (retention), partitions that cannot be made (partitions), tables that a scan or poll mode cannot read (scan), \
         notes of what is delivered (note). /status and walpost check tell the reasons.",
    );
    for work in Work::ALL {
        let count = meter.upkeep().count(work);
        page.sample(name, &[("work", work.name())], count);
    }
}

fn state(page: &mut Page, meter: &Meter, view: &View) {
    let name = "walpost_role";
    page.family(
        name,
        "gauge",
        "1 for what this instance is: active (has the slot), standby (waits for it), connecting.",
    );
    let role = meter.phase().role();
    for known in ROLES {
        page.sample(name, &[("role", known)], u8::from(known == role));
    }
    page.gauge(
        "walpost_ready",
        "1 while /readyz answers 200.",
        u8::from(view.readiness.ready),
    );
    let scan = meter.scan();
    page.gauge(
        "walpost_scan_running",
        "1 while rows are published from a table: a gap before the slot, or a look of poll mode.",
        u8::from(scan.is_some()),
    );
    if let Some(scan) = scan {
        page.gauge(
            "walpost_scan_rows",
            "Rows that the running scan has handed on.",
            scan.published,
        );
    }
}

fn own_process(page: &mut Page, meter: &Meter) {
    let began = meter.began_at().duration_since(std::time::UNIX_EPOCH);
    page.gauge(
        "process_start_time_seconds",
        "Start of the process, Unix time.",
        began.unwrap_or_default().as_secs_f64(),
    );
    let Some(process) = process::read() else {
        return;
    };
    page.counter(
        "process_cpu_seconds_total",
        "User and system CPU time.",
        process.cpu_seconds,
    );
    page.gauge(
        "process_resident_memory_bytes",
        "Resident memory.",
        process.resident_bytes,
    );
    page.gauge(
        "process_virtual_memory_bytes",
        "Virtual memory.",
        process.virtual_bytes,
    );
    if let Some(count) = process.open_fds {
        page.gauge("process_open_fds", "Open file descriptors.", count);
    }
}

/// The text, family by family. Writing into a String cannot fail.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.0.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{open}{label}=\"");
            for c in text.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn rendered(meter: &Meter) -> String {
        render(meter, None, &View::default())
    }

    #[test]
    fn a_label_is_escaped() {
        let meter = Meter::new();
        meter.published(meter.topic("a\"b\\c\nd<é>"), 3);
        let line = r#"walpost_events_published_total{topic="a\"b\\c\nd<é>"} 3"#;
        assert!(rendered(&meter).lines().any(|found| found == line));
    }

    #[test]
    fn the_histogram_is_cumulative_and_its_count_is_its_last_bucket() {
        let meter = Meter::new();
        meter.latency(0, 2);
        let text = rendered(&meter);
        let value = |start: &str| {
            let line = text.lines().find(|line| line.starts_with(start)).unwrap();
            line.rsplit_once(' ').unwrap().1.to_owned()
        };
        assert_eq!(
            value("walpost_publish_latency_seconds_bucket{le=\"300\"}"),
            "0"
        );
        assert_eq!(
            value("walpost_publish_latency_seconds_bucket{le=\"+Inf\"}"),
            "2"
        );
        assert_eq!(value("walpost_publish_latency_seconds_count"), "2");
        assert!(text.contains("{le=\"0.001\"} 0\n"));
    }

    #[test]
    fn what_postgres_did_not_say_is_left_out() {
        let meter = Meter::new();
        let text = rendered(&meter);
        assert!(!text.contains("walpost_replication_lag") && !text.contains("walpost_slot"));
        let seen = Observed {
            stragglers: Some(super::super::observer::Stragglers::default()),
            ..Observed::default()
        };
        let view = View {
            lag_seconds: Some(Duration::from_millis(1500).as_secs_f64()),
            ..View::default()
        };
        let text = render(&meter, Some(&seen), &view);
        assert!(text.contains("walpost_replication_lag_seconds 1.5\n"));
        assert!(text.contains("walpost_stragglers{state=\"dead\"} 0\n"));
        assert!(text.contains("walpost_role{role=\"connecting\"} 1\n"));
    }
}
