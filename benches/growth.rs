//! How the drain's rate changes with topics, lanes, sizes of transactions and payloads, and compression: where is a cliff?
//!
//! Each round drains the base case (one topic, 16 lanes, transactions of 100 rows, 300 bytes, no compression; over the
//! Unix socket) first and last, and every other case, which differs in one thing, between the two. A case's ratio is its
//! rate over the mean of the two; for payloads, where a rate in rows would say nothing, bytes a second stand beside it.
//! Topics and producers are new in every drain, so that opening them is in the time.
//!
//! `cargo bench --bench growth` (settings by env: `ROWS`, default 200000; `ROUNDS`, 5; `HUGE`, 1000000 rows of the largest
//! transaction; `CASES`, names separated by commas)

mod support;

use support::{Backlog, Drained, Results, chosen, delete_topics, drain, setting};

/// Rows of a case are fewer when their payloads would be more than this.
const MOST_PAYLOAD_BYTES: u64 = 512 << 20;

struct Case {
    name: &'static str,
    backlog: Backlog,
    settings: &'static [(&'static str, &'static str)],
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (rows, rounds, huge) = (
        setting("ROWS", 200_000),
        setting("ROUNDS", 5),
        setting("HUGE", 1_000_000),
    );
    let settings = [("ROWS", rows), ("ROUNDS", rounds), ("HUGE", huge)];
    let mut results = Results::begin_on_servers("growth", &settings);
    let base = Backlog {
        rows,
        per_txn: 100,
        payload_bytes: 300,
        topics: 1,
    };
    for round in 1..=rounds {
        let first = measure(base, &[]).await;
        let mut cases = Vec::new();
        for case in all(base, huge) {
            if chosen(case.name) {
                let drained = measure(case.backlog, case.settings).await;
                cases.push((case.name, case.backlog, drained));
            }
        }
        let last = measure(base, &[]).await;
        let rate = rows as f64 / f64::midpoint(first.seconds, last.seconds);
        for (name, backlog, drained) in [("base", base, first), ("base_again", base, last)]
            .into_iter()
            .chain(cases)
        {
            record(&mut results, round, name, backlog, drained, rate);
        }
    }
}

fn all(base: Backlog, huge: u64) -> Vec<Case> {
    let plain = |name, backlog| Case {
        name,
        backlog,
        settings: &[],
    };
    let set = |name, settings| Case {
        name,
        backlog: base,
        settings,
    };
    let topics = |topics| Backlog { topics, ..base };
    let of = |per_txn| Backlog { per_txn, ..base };
    let payload = |payload_bytes| Backlog {
        payload_bytes,
        rows: base.rows.min(MOST_PAYLOAD_BYTES / payload_bytes),
        ..base
    };
    let one = Backlog {
        rows: huge,
        per_txn: huge,
        ..base
    };
    vec![
        plain("topics_10", topics(10)),
        plain("topics_100", topics(100)),
        set("lanes_1", &[("WALPOST_LANES", "1")]),
        set("lanes_64", &[("WALPOST_LANES", "64")]),
        plain("txn_1", of(1)),
        plain("txn_10", of(10)),
        plain("txn_1000", of(1000)),
        plain("txn_1000000", one),
        plain("payload_0.1KiB", payload(102)),
        plain("payload_1KiB", payload(1 << 10)),
        plain("payload_16KiB", payload(16 << 10)),
        plain("payload_256KiB", payload(256 << 10)),
        set("lz4", &[("WALPOST_COMPRESSION", "lz4")]),
        set("snappy", &[("WALPOST_COMPRESSION", "snappy")]),
        set("zlib", &[("WALPOST_COMPRESSION", "zlib")]),
        set("zstd", &[("WALPOST_COMPRESSION", "zstd")]),
    ]
}

async fn measure(backlog: Backlog, settings: &[(&str, &str)]) -> Drained {
    let (database, end) = backlog.load(&[]).await;
    let drained = drain(&database, &database.socket_url, end, backlog.rows, settings).await;
    delete_topics().await;
    drained
}

fn record(
    results: &mut Results,
    round: u64,
    name: &str,
    backlog: Backlog,
    drained: Drained,
    base_rate: f64,
) {
    let rate = backlog.rows as f64 / drained.seconds;
    let mib_per_s = rate * backlog.payload_bytes as f64 / f64::from(1 << 20);
    let figures = [
        ("rows_per_s", rate),
        ("over_base", rate / base_rate),
        ("payload_mib_per_s", mib_per_s),
        ("cpu_us_per_row", drained.cpu_us_per_row),
        ("peak_rss_mib", drained.peak_rss_mib),
    ];
    results.record(name, round, &figures);
}
