//! What the benches share. A bench says `mod support;` and takes what it needs.
//!
//! * [`tests`]: the tests' own support: the local servers, databases, child processes, proxies.
//! * [`Results`], [`Run`]: a run's figures, written to `target/bench/<bench>.jsonl` while it goes and read by `report`.
//! * [`Spread`], [`Latencies`]: medians with their spread; percentiles.
//! * [`setting`], [`chosen`]: a run's settings, from the environment.
//! * [`delete_topics`]: gives the disk back after a case.
//! * [`Backlog`], [`drain`]: rows waiting in a slot, and how long a connector takes for them.
//! * [`cpu_seconds`], [`cpu_seconds_of_all`]: what a process, or a process and its children, have used.
//! * [`CrateProducer`], [`PlainPublisher`]: the `pulsar` crate's producer and walpost's own, without a database.
//! * [`Debezium`]: Debezium Server, where its folder is given.
//! * [`Tap`]: stands before the broker and notes when each event's batch was sent and when its receipt came.
//! * [`bodies`]: the small pieces of the data's path that `micro` times and `instructions` counts.
//! * [`svg`]: the plots.
#![allow(
    clippy::cast_possible_truncation,
    clippy::large_futures,
    reason = "a bench's numbers are its own, and it has the stack for the pulsar crate's futures"
)]
#![allow(
    dead_code,
    unused_imports,
    reason = "each bench is a crate of its own and uses its own part of this module"
)]

#[path = "../../tests/support/mod.rs"]
pub(crate) mod tests;

mod backlog;
pub(crate) mod bodies;
mod debezium;
mod latency;
mod producers;
mod results;
pub(crate) mod rows;
pub(crate) mod svg;
mod tap;
mod usage;

use std::time::Duration;

pub(crate) use backlog::{Backlog, Drained, Until, drain, recvlogical};
pub(crate) use debezium::Debezium;
pub(crate) use latency::{Clock, Latencies, NEVER};
pub(crate) use producers::{CrateProducer, PlainPublisher, publisher_config};
pub(crate) use results::{Results, Run, Spread, folder};
pub(crate) use tap::{Tap, number_in, numbered};
pub(crate) use usage::{cpu_seconds, cpu_seconds_of_all};

/// Longer than any single step takes; a bench that waits longer has failed.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// Deletes the topics that benches have filled; to be called after each case. The local broker keeps every message for a
/// day, and a whole run is tens of gigabytes.
pub(crate) async fn delete_topics() {
    const OURS: [&str; 6] = [
        "bench_",
        "steady_",
        "cost_",
        "plain_",
        "crate_",
        "debezium_",
    ];
    let url = &tests::servers().pulsar_admin_url;
    let namespace = "/admin/v2/persistent/public/default";
    let topics = tests::admin(url, "GET", namespace, "").await;
    let topics: Vec<String> = serde_json::from_str(&topics).expect("a list of names");
    let names = topics.iter().filter_map(|topic| topic.rsplit('/').next());
    for name in names.filter(|name| OURS.iter().any(|ours| name.starts_with(ours))) {
        let path = format!("{namespace}/{name}?force=true");
        if let Err(answer) = tests::try_admin(url, "DELETE", &path, "").await {
            println!("the topic {name} stays for now: {answer}");
        }
    }
}

/// A whole number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text:?} is not a whole number"))
    })
}

/// True when `CASES` (names, separated by commas) holds this case, or is not set.
pub(crate) fn chosen(case: &str) -> bool {
    std::env::var("CASES").map_or(true, |cases| cases.split(',').any(|name| name == case))
}
