//! How fast a backlog goes from the slot into the broker, beside what the same slot, the same broker and another connector can do.
//!
//! A round of a case loads rows into a fresh database whose slot was copied before the first row, so that all read the
//! same stretch of log: `pg_recvlogical` to /dev/null from one copy, then walpost from the slot into the real broker until
//! `confirmed_flush_lsn` has reached the end, then `pg_recvlogical` again from another copy. The ratio is walpost's rate
//! over that of the two around it. All times include starting the program.
//!
//! | case | socket | transactions | payload | beside it |
//! |---|---|---|---|---|
//! | `tcp` | TCP | of 100 rows | 300 B | the `pulsar` crate's producer; Debezium Server, if `DEBEZIUM_DIR` names its folder |
//! | `unix` | Unix | of 100 rows | 300 B | |
//! | `one_transaction` | Unix | one of 1,000,000 rows | 300 B | |
//! | `16KiB` | Unix | of 100 rows | 16 KiB, a 25th of the rows | the `pulsar` crate's producer |
//!
//! The crate's producer publishes as many messages of that size (small ones in batches of 1000, large ones in batches of
//! 128 KiB); it has no database behind it, so its ratio says what reading the log costs on top of publishing with it, and
//! its rate how near the broker itself is to its limit.
//!
//! walpost has run on the slot before the rows come, and was stopped: it starts as a connector does that was down for a
//! while. (The first start on a new slot looks once through the table for what the slot will never bring.)
//!
//! `cargo bench --bench drain` (settings by env: `ROWS`, default 500000; `ROUNDS`, 5; `PER_TXN`, 100; `HUGE`, 1000000;
//! `CASES`, names separated by commas)

#![allow(
    clippy::large_futures,
    reason = "a bench's numbers are its own, and it has the stack for the pulsar crate's futures"
)]

mod support;

use support::tests::{servers, unique};
use support::{
    Backlog, CrateProducer, Debezium, Drained, LIMIT, Results, chosen, delete_topics, drain,
    recvlogical, setting,
};

/// A row of the table above.
struct Case {
    name: &'static str,
    backlog: Backlog,
    tcp: bool,
    /// Name of the case of the `pulsar` crate's producer beside it.
    crate_producer: Option<&'static str>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (rows, rounds, per_txn, huge) = (
        setting("ROWS", 500_000),
        setting("ROUNDS", 5),
        setting("PER_TXN", 100),
        setting("HUGE", 1_000_000),
    );
    let settings = [
        ("ROWS", rows),
        ("ROUNDS", rounds),
        ("PER_TXN", per_txn),
        ("HUGE", huge),
    ];
    let mut results = Results::begin_on_servers("drain", &settings);
    let debezium = Debezium::find();
    for round in 1..=rounds {
        for case in cases(rows, per_txn, huge) {
            if chosen(case.name) {
                measure(&mut results, round, &case, debezium.as_ref()).await;
                delete_topics().await;
            }
        }
    }
}

fn cases(rows: u64, per_txn: u64, huge: u64) -> [Case; 4] {
    let case = |name, rows, per_txn, payload_bytes| Case {
        name,
        backlog: Backlog {
            rows,
            per_txn,
            payload_bytes,
            topics: 1,
        },
        tcp: false,
        crate_producer: None,
    };
    [
        Case {
            tcp: true,
            crate_producer: Some("pulsar_crate"),
            ..case("tcp", rows, per_txn, 300)
        },
        case("unix", rows, per_txn, 300),
        case("one_transaction", huge, huge, 300),
        Case {
            crate_producer: Some("pulsar_crate_16KiB"),
            ..case("16KiB", rows / 25, per_txn, 16 * 1024)
        },
    ]
}

async fn measure(results: &mut Results, round: u64, case: &Case, debezium: Option<&Debezium>) {
    let rows = case.backlog.rows;
    let (database, end) = case.backlog.load(&["before", "after", "debezium"]).await;
    let url = if case.tcp {
        &database.url
    } else {
        &database.socket_url
    };
    let before = recvlogical(&database, url, "before", end).await;
    let walpost = drain(&database, url, end, rows, &[]).await;
    let after = recvlogical(&database, url, "after", end).await;
    let reference = rows as f64 / f64::midpoint(before, after);
    let rate = rows as f64 / walpost.seconds;
    let mut shown = figures(&walpost, rows);
    shown.push(("recvlogical_rows_per_s", reference));
    shown.push(("over_recvlogical", rate / reference));
    results.record(case.name, round, &shown);
    if let Some(name) = case.crate_producer {
        let payload_bytes = case.backlog.payload_bytes;
        let url = &servers().pulsar_url;
        let mut producer = CrateProducer::open(url, &unique("crate"), payload_bytes).await;
        let publishing = tokio::time::timeout(LIMIT, producer.publish(rows));
        let seconds = publishing.await.expect("receipts for all in time");
        let theirs = rows as f64 / seconds;
        let shown = [("rows_per_s", theirs), ("walpost_over_it", rate / theirs)];
        results.record(name, round, &shown);
    }
    if let Some(debezium) = debezium.filter(|_| case.tcp) {
        let drained = debezium.drain(&database, "debezium", rows).await;
        let mut shown = figures(&drained, rows);
        shown.push(("walpost_over_it", rate * drained.seconds / rows as f64));
        results.record("debezium", round, &shown);
    }
}

fn figures(drained: &Drained, rows: u64) -> Vec<(&'static str, f64)> {
    vec![
        ("rows_per_s", rows as f64 / drained.seconds),
        ("cpu_us_per_row", drained.cpu_us_per_row),
        ("peak_rss_mib", drained.peak_rss_mib),
    ]
}
