//! A run's figures: written line by line while it goes, read back by `report`, which makes tables and plots of them.
//!
//! ```text
//! {"bench":"drain","at_unix_s":…,"commit":…,"optimized":true,"machine":{…},"servers":…,"settings":{"ROWS":500000,…}}
//! {"case":"tcp","round":1,"figures":{"rows_per_s":90000.0,…},"stolen_percent":1.5}
//! …
//! ```
//! `stolen_percent` is what a hypervisor has taken of the processors since the line before: rented machines are noisy, and a
//! tail of milliseconds is made of that first.
//! A run overwrites the one before it. Figures are measured values or ratios of values of the same round; medians are left
//! to the reader, so that the spread stays visible.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::tests::servers;

/// Where runs are kept: `bench` in cargo's target folder.
pub(crate) fn folder() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
    target.expect("cargo's tmp is in its target").join("bench")
}

/// A run being written.
pub(crate) struct Results {
    file: File,
    processors: Processors,
}

impl Results {
    /// Starts the run of a bench that needs no servers, with these settings.
    pub(crate) fn begin(bench: &str, settings: &[(&str, u64)]) -> Self {
        Self::start(bench, settings, &Value::Null)
    }

    /// The same with the local servers, which are started if they are not up.
    pub(crate) fn begin_on_servers(bench: &str, settings: &[(&str, u64)]) -> Self {
        let postgres = servers().var("WALPOST_LOCAL_POSTGRES_MAJOR");
        let pulsar = Path::new(servers().var("WALPOST_LOCAL_PULSAR_HOME")).file_name();
        let pulsar = pulsar.unwrap_or_default().to_string_lossy();
        let both = format!("Postgres {postgres}, {pulsar}");
        Self::start(bench, settings, &json!(both))
    }

    fn start(bench: &str, settings: &[(&str, u64)], servers: &Value) -> Self {
        std::fs::create_dir_all(folder()).expect("the target folder can be written");
        let path = folder().join(format!("{bench}.jsonl"));
        let file = File::create(&path)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        let settings: Map<String, Value> = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut results = Self {
            file,
            processors: Processors::now(),
        };
        results.line(&json!({
            "bench": bench,
            "at_unix_s": now.map_or(0, |now| now.as_secs()),
            "commit": commit(),
            "optimized": !cfg!(debug_assertions),
            "machine": machine(),
            "servers": servers,
            "settings": settings,
        }));
        results
    }

    /// Adds what one round of a case has shown, and prints it.
    pub(crate) fn record(&mut self, case: &str, round: u64, figures: &[(&str, f64)]) {
        let shown: Vec<String> = figures
            .iter()
            .map(|(name, value)| format!("{name} {}", short(*value)))
            .collect();
        println!("{case}, round {round}: {}", shown.join(", "));
        let figures: Map<String, Value> = figures
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        let processors = Processors::now();
        let stolen_percent = processors.stolen_percent_since(self.processors);
        self.processors = processors;
        self.line(&json!({
            "case": case, "round": round, "figures": figures, "stolen_percent": stolen_percent,
        }));
    }

    fn line(&mut self, line: &Value) {
        writeln!(self.file, "{line}").expect("the target folder can be written");
    }
}

/// Three significant digits or all before the point, as people read it.
pub(crate) fn short(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Which state of walpost was measured; `+` for one with changes that are not committed.
fn commit() -> String {
    let git = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty=+"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    let said = git.ok().filter(|output| output.status.success());
    said.map_or("unknown".to_owned(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}

/// What the figures were taken on.
fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let mut lines = text.lines();
        let line = lines.find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    json!({
        "cpu": field(&read("/proc/cpuinfo"), "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
        // The version, without the name that somebody gave a build.
        "kernel": read("/proc/sys/kernel/osrelease").trim().split('-').next(),
        "load_1min_at_start": read("/proc/loadavg").split(' ').next().unwrap_or("unknown"),
    })
}

/// What became of all processors' time since the machine was started.
#[derive(Clone, Copy)]
struct Processors {
    ticks: u64,
    stolen: u64,
}

impl Processors {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let all = stat.lines().next().unwrap_or_default();
        // proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in the first two.
        let fields = all.split_whitespace().skip(1).take(8);
        let ticks: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
        Self {
            ticks: ticks.iter().sum(),
            stolen: ticks.get(7).copied().unwrap_or(0),
        }
    }

    fn stolen_percent_since(self, earlier: Self) -> f64 {
        let ticks = self.ticks.saturating_sub(earlier.ticks).max(1);
        let stolen = self.stolen.saturating_sub(earlier.stolen);
        100.0 * stolen as f64 / ticks as f64
    }
}

/// A run read back.
pub(crate) struct Run {
    /// The first line.
    pub(crate) header: Value,
    records: Vec<Value>,
}

impl Run {
    /// The last run of a bench; `None` when there is none.
    pub(crate) fn read(bench: &str) -> Option<Self> {
        let path = folder().join(format!("{bench}.jsonl"));
        let text = std::fs::read_to_string(&path).ok()?;
        let mut lines = text.lines().map(|line| {
            serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("{}: {error}: {line}", path.display()))
        });
        let header = lines.next()?;
        Some(Self {
            header,
            records: lines.collect(),
        })
    }

    /// The cases, in the order in which they first came.
    pub(crate) fn cases(&self) -> Vec<&str> {
        let mut cases = Vec::new();
        for record in &self.records {
            let case = record["case"].as_str().unwrap_or_default();
            if !cases.contains(&case) {
                cases.push(case);
            }
        }
        cases
    }

    /// What a hypervisor took of the processors, in percent.
    pub(crate) fn stolen_percent(&self) -> Option<Spread> {
        let records = self.records.iter();
        Spread::of(records.filter_map(|record| record["stolen_percent"].as_f64()))
    }

    /// One figure of a case over all rounds; `None` when it has none.
    pub(crate) fn figure(&self, case: &str, figure: &str) -> Option<Spread> {
        let of_case = self.records.iter().filter(|record| record["case"] == case);
        Spread::of(of_case.filter_map(|record| record["figures"][figure].as_f64()))
    }
}

/// A median and what lies around it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, low, high })
    }
}
