//! Instructions a row of each piece of the data's path, counted by callgrind: the same on a busy machine as on an idle one,
//! and so the figure to compare before and after a change.
//!
//! The bodies are those of `micro`. For each, this program runs itself under `valgrind --tool=callgrind`, which counts
//! only inside of `Meter::measure`. A count twice as long as another is not twice as slow: cache misses are not in it.
//!
//! `cargo bench --bench instructions` (setting by env: `CASES`, names separated by commas). Needs valgrind:
//! `benches/get-valgrind` installs Debian's.

mod support;

use std::process::{Command, Stdio};

use support::bodies::{self, Meter, OPERATIONS};
use support::{Results, chosen, folder, setting};

/// Set for the run under valgrind: the body's name.
const BODY: &str = "WALPOST_BENCH_BODY";
/// Calls of a body that are counted.
const CALLS: u64 = 10;

fn main() {
    if let Ok(name) = std::env::var(BODY) {
        let mut body = bodies::prepare(&name);
        let mut meter = Meter::default();
        for _ in 0..setting("CALLS", CALLS) {
            body(&mut meter);
        }
        return;
    }
    let mut results = Results::begin("instructions", &[("operations", OPERATIONS * CALLS)]);
    for name in bodies::ALL.into_iter().filter(|name| chosen(name)) {
        // What comes before the counted calls (opening lanes, growing buffers) is in both and falls out.
        let (few, many) = (count(name, CALLS), count(name, 2 * CALLS));
        let each = (many - few) as f64 / (OPERATIONS * CALLS) as f64;
        results.record(name, 1, &[("instructions", each)]);
    }
}

/// Instructions of so many calls, and of what precedes them.
fn count(name: &str, calls: u64) -> u64 {
    let out = folder().join(format!("callgrind.{}.out", name.replace('/', ".")));
    let own = std::env::current_exe().expect("this program's path");
    let ended = Command::new("valgrind")
        .args(["--tool=callgrind", "--quiet", "--dump-line=no"])
        .arg("--toggle-collect=*Meter*measure*")
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(own)
        .env(BODY, name)
        .env("CALLS", calls.to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| {
            panic!("cannot run valgrind ({error}): benches/get-valgrind installs it")
        });
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{name} under valgrind: {said}");
    let written = std::fs::read_to_string(&out).expect("callgrind has written it");
    let totals = written.lines().find_map(|line| {
        let rest = line.strip_prefix("totals:")?;
        rest.trim().parse::<u64>().ok()
    });
    let totals = totals.expect("callgrind's totals");
    assert!(
        totals > 0,
        "nothing was counted in {name}: has this program been stripped of its symbols?"
    );
    totals
}
