//! Makes the tables of `benches/README.md` and the plots `benches/*.svg` of what the benches have measured: no figure there is
//! copied by hand.
//!
//! Each bench leaves its last run in `target/bench/<bench>.jsonl`. For each run that is there this program writes the
//! part of the README between `<!-- results: <bench> -->` and `<!-- end -->`, and the plot; what has not been run stays
//! as it is, and is said to. Each figure is a median over the rounds, with the lowest and highest in parentheses.
//!
//! `cargo bench --bench report` (`CHECK=1` prints instead of writing)

mod support;

use std::fmt::Write as _;
use std::path::Path;

use support::svg::Chart;
use support::{Run, Spread, setting};

/// A column of a table.
struct Column {
    title: &'static str,
    figure: &'static str,
    digits: usize,
}

/// The figures of a chart, with their names in its legend.
struct Plot {
    title: &'static str,
    unit: &'static str,
    series: &'static [(&'static str, &'static str)],
    mark: Option<f64>,
    logarithmic: bool,
}

/// How a bench's run is shown.
struct Section {
    bench: &'static str,
    columns: &'static [Column],
    plot: Plot,
}

const fn column(title: &'static str, figure: &'static str, digits: usize) -> Column {
    Column {
        title,
        figure,
        digits,
    }
}

const SECTIONS: [Section; 6] = [
    Section {
        bench: "micro",
        columns: &[column("ns a row", "ns", 1)],
        plot: Plot {
            title: "Pieces of the data's path",
            unit: "ns a row",
            series: &[("ns", "")],
            mark: None,
            logarithmic: true,
        },
    },
    Section {
        bench: "instructions",
        columns: &[column("instructions a row", "instructions", 0)],
        plot: Plot {
            title: "Pieces of the data's path, counted",
            unit: "instructions a row",
            series: &[("instructions", "")],
            mark: None,
            logarithmic: true,
        },
    },
    Section {
        bench: "drain",
        columns: &[
            column("rows/s", "rows_per_s", 0),
            column("`pg_recvlogical`'s rows/s", "recvlogical_rows_per_s", 0),
            column("walpost / `pg_recvlogical`", "over_recvlogical", 2),
            column("walpost / this", "walpost_over_it", 2),
            column("CPU µs a row", "cpu_us_per_row", 2),
            column("peak MiB", "peak_rss_mib", 0),
        ],
        plot: Plot {
            title: "Draining a backlog",
            unit: "rows/s",
            series: &[
                ("rows_per_s", "this program"),
                ("recvlogical_rows_per_s", "pg_recvlogical"),
            ],
            mark: None,
            logarithmic: false,
        },
    },
    Section {
        bench: "steady",
        columns: &[
            column("receipt p50 ms", "receipt_p50_ms", 2),
            column("p99", "receipt_p99_ms", 2),
            column("p99.9", "receipt_p999_ms", 2),
            column("consumer p50 ms", "consumer_p50_ms", 2),
            column("p99", "consumer_p99_ms", 2),
            column("p99.9", "consumer_p999_ms", 2),
            column("due → receipt p99 ms", "due_receipt_p99_ms", 2),
            column("log p99 ms", "log_p99_ms", 2),
            column("broker p99 ms", "broker_p99_ms", 2),
            column("plain p99 ms", "plain_p99_ms", 2),
            column("receipt − broker p99 ms", "over_broker_p99_ms", 2),
            column("receipt − plain p99 ms", "over_plain_p99_ms", 2),
            column("CPU µs an event", "cpu_us_per_event", 1),
        ],
        plot: Plot {
            title: "p99 at a steady rate",
            unit: "ms",
            series: &[
                ("receipt_p99_ms", "commit → receipt"),
                ("consumer_p99_ms", "commit → consumer"),
                ("plain_p99_ms", "plain publisher"),
            ],
            mark: None,
            logarithmic: true,
        },
    },
    Section {
        bench: "cost",
        columns: &[
            column("TPS", "tps", 0),
            column("WAL bytes", "wal_bytes", 0),
            column("CPU µs", "cpu_us", 0),
            column("updates", "updates", 2),
            column("deletes", "deletes", 2),
            column("adds WAL bytes", "added_wal_bytes", 0),
            column("adds CPU µs", "added_cpu_us", 0),
            column("own CPU µs", "own_cpu_us", 0),
            column("adds µs a transaction", "added_transaction_us", 0),
            column("WAL / poller's", "wal_over_poller", 2),
            column("CPU / poller's", "cpu_over_poller", 2),
            column("own CPU / poller's", "own_cpu_over_poller", 2),
            column("time / poller's", "transaction_over_poller", 2),
        ],
        plot: Plot {
            title: "What emptying the outbox adds to the database, over what a poller adds",
            unit: "",
            series: &[("wal_over_poller", "WAL bytes"), ("cpu_over_poller", "CPU")],
            mark: Some(0.25),
            logarithmic: false,
        },
    },
    Section {
        bench: "growth",
        columns: &[
            column("over the base case", "over_base", 2),
            column("rows/s", "rows_per_s", 0),
            column("MiB/s of payload", "payload_mib_per_s", 1),
            column("CPU µs a row", "cpu_us_per_row", 2),
            column("peak MiB", "peak_rss_mib", 0),
        ],
        plot: Plot {
            title: "Drain rate over the base case's",
            unit: "",
            series: &[("over_base", "")],
            mark: Some(1.0),
            logarithmic: false,
        },
    },
];

fn main() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches");
    let readme = folder.join("README.md");
    let mut text = std::fs::read_to_string(&readme).expect("benches/README.md");
    let check = setting("CHECK", 0) != 0;
    for section in &SECTIONS {
        let bench = section.bench;
        let Some(run) = Run::read(bench) else {
            println!("{bench}: there is no run; what the README has stays");
            continue;
        };
        let (part, plot) = (section.table(&run), section.chart(&run));
        if check {
            println!("{part}");
            continue;
        }
        if run.header["optimized"] != true {
            println!("{bench}: its run is of an unoptimized build; what the README has stays");
            continue;
        }
        text = replace(&text, bench, &part);
        let path = folder.join(format!("{bench}.svg"));
        std::fs::write(&path, plot).expect("benches can be written");
        println!("{bench}: {} cases", run.cases().len());
    }
    if !check {
        std::fs::write(&readme, text).expect("benches can be written");
    }
}

/// The README with another text in a bench's place.
fn replace(text: &str, bench: &str, part: &str) -> String {
    let begin = format!("<!-- results: {bench} -->\n");
    let pieces = text.split_once(&begin).and_then(|(head, rest)| {
        let (_, tail) = rest.split_once("<!-- end -->")?;
        Some((head, tail))
    });
    let (head, tail) =
        pieces.unwrap_or_else(|| panic!("benches/README.md has no place for {bench}"));
    format!("{head}{begin}{part}<!-- end -->{tail}")
}

impl Section {
    fn table(&self, run: &Run) -> String {
        let cases = run.cases();
        // A column without any value in this run is left out.
        let columns: Vec<&Column> = self
            .columns
            .iter()
            .filter(|column| cases.iter().any(|c| run.figure(c, column.figure).is_some()))
            .collect();
        let mut out = format!("{}\n\n| |", circumstances(run));
        for column in &columns {
            write!(out, " {} |", column.title).expect("a String takes everything");
        }
        out += "\n|---|";
        out += &"---|".repeat(columns.len());
        out += "\n";
        for case in cases {
            write!(out, "| `{case}` |").expect("a String takes everything");
            for column in &columns {
                let cell = run.figure(case, column.figure);
                let cell = cell.map_or(String::new(), |spread| cell_of(spread, column.digits));
                write!(out, " {cell} |").expect("a String takes everything");
            }
            out += "\n";
        }
        format!("{out}\n![{}]({}.svg)\n", self.plot.title, self.bench)
    }

    fn chart(&self, run: &Run) -> String {
        let bars = |case: &str| {
            let figures = self.plot.series.iter();
            let bars: Vec<_> = figures
                .map(|(figure, _)| run.figure(case, figure))
                .collect();
            bars.iter().any(Option::is_some).then_some(bars)
        };
        let groups = run.cases().into_iter();
        let chart = Chart {
            title: self.plot.title.to_owned(),
            unit: self.plot.unit,
            series: self.plot.series.iter().map(|(_, name)| *name).collect(),
            groups: groups
                .filter_map(|case| Some((case.to_owned(), bars(case)?)))
                .collect(),
            mark: self.plot.mark,
            logarithmic: self.plot.logarithmic,
        };
        chart.render()
    }
}

/// The median, and lowest and highest where there was more than one round.
fn cell_of(spread: Spread, digits: usize) -> String {
    let Spread { median, low, high } = spread;
    let low_high = format!(" ({low:.digits$} to {high:.digits$})");
    format!(
        "{median:.digits$}{}",
        if low < high { low_high } else { String::new() }
    )
}

/// Where, with what settings, and how busy the machine was.
fn circumstances(run: &Run) -> String {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let machine = |name: &str| text(&run.header["machine"][name]);
    let servers = run.header["servers"].as_str();
    let servers = servers.map_or(String::new(), |servers| format!("{servers}; "));
    let settings = run.header["settings"].as_object();
    let settings: Vec<String> = settings
        .into_iter()
        .flatten()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let stolen = run.stolen_percent();
    let stolen = stolen.map_or(String::new(), |stolen| {
        let percent = cell_of(stolen, 1);
        format!("; percent of the processors that the hypervisor took: {percent}")
    });
    format!(
        "Run of {} with {}; {servers}{}, {} cores, {}, Linux {}; load when it began {}{stolen}. Medians (lowest to highest round).",
        text(&run.header["commit"]),
        settings.join(" "),
        machine("cpu"),
        machine("cores"),
        machine("memory"),
        machine("kernel"),
        machine("load_1min_at_start"),
    )
}
