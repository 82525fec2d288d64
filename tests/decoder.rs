//! Guarantee: a row gives the same message whichever way it takes: gap scan, poll mode, stream, or the table of stragglers; whatever
//! its columns' types are, whatever role and database say about the output of values, and whatever bytes its text has.

#[path = "decoder/generators.rs"]
mod generators;
#[path = "decoder/paths.rs"]
mod paths;
#[path = "decoder/samples.rs"]
mod samples;
#[path = "decoder/sql_ascii.rs"]
mod sql_ascii;
mod support;
#[path = "decoder/unconvertible.rs"]
mod unconvertible;
#[path = "decoder/without_binary.rs"]
mod without_binary;

use std::time::Duration;

use support::{Database, eventually};

const DEADLINE: Duration = Duration::from_secs(90);

/// Quick retries.
const QUICK: [(&str, &str); 4] = [
    ("WALPOST_RETRY_INITIAL", "50ms"),
    ("WALPOST_RETRY_MAX", "500ms"),
    ("WALPOST_RECONNECT_MAX", "500ms"),
    ("WALPOST_SCAN_INTERVAL", "100ms"),
];

/// Waits until so many stragglers are in a state.
async fn wait_for_stragglers(database: &Database, state: &str, expected: i64) {
    let what = format!("{expected} stragglers to be {state}");
    eventually(DEADLINE, &what, async || {
        let query = "SELECT count(*) FROM walpost.straggler WHERE state = $1";
        let count: i64 = database.rows(query, &[&state]).await[0].get(0);
        (count == expected).then_some(())
    })
    .await;
}
