//! Nanoseconds a row of each piece of the data's path: decode, extract and route, encode, acknowledge.
//!
//! Needs no server. What each body is and what it leaves out: `support/bodies.rs`. Criterion runs them, each iteration
//! does 1000 operations. The means go where `report` finds them, unless arguments made it less than a whole run.
//!
//! `cargo bench --bench micro` (criterion's own arguments behind `--`: a filter, `--measurement-time`, …)

mod support;

use criterion::{Criterion, Throughput};
use support::Results;
use support::bodies::{self, Meter, OPERATIONS};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for name in bodies::ALL {
        let (group, how) = name.split_once('/').expect("a name of two parts");
        let mut group = criterion.benchmark_group(group);
        group.throughput(Throughput::Elements(OPERATIONS));
        group.bench_function(how, |bencher| {
            let mut body = bodies::prepare(name);
            bencher.iter_custom(|iterations| {
                let mut meter = Meter::default();
                for _ in 0..iterations {
                    body(&mut meter);
                }
                meter.elapsed()
            });
        });
        group.finish();
    }
    criterion.final_summary();
    // Cargo's own argument only.
    if std::env::args()
        .skip(1)
        .all(|argument| argument == "--bench")
    {
        keep();
    }
}

/// Copies criterion's estimates into a run of ours.
fn keep() {
    let mut results = Results::begin("micro", &[("operations", OPERATIONS)]);
    let criterion = support::folder().with_file_name("criterion");
    for name in bodies::ALL {
        let path = criterion.join(name).join("new/estimates.json");
        let text = std::fs::read_to_string(&path).expect("criterion's estimates");
        let estimates: serde_json::Value = serde_json::from_str(&text).expect("criterion's JSON");
        let ns = |at: &str| {
            let value = estimates.pointer(at).and_then(serde_json::Value::as_f64);
            value.expect("criterion's estimate") / OPERATIONS as f64
        };
        results.record(
            name,
            1,
            &[
                ("ns", ns("/mean/point_estimate")),
                ("ns_low", ns("/mean/confidence_interval/lower_bound")),
                ("ns_high", ns("/mean/confidence_interval/upper_bound")),
            ],
        );
    }
}
