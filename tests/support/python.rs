//! A client that shares nothing with walpost: Pulsar's C++ client, driven by the Python programs of this folder.
//!
//! A program reads its order as one line of JSON and writes one line of JSON for each thing it has seen; its log goes to
//! standard error. `deploy/local/python` makes the environment that runs it (nothing to do when `tests/run` did so first).

use std::path::Path;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

use super::servers;
use super::servers::run_script;

/// A running program; killed when dropped.
pub(crate) struct Python {
    name: String,
    child: Child,
    orders: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    /// Everything on standard error, read to the end beside the rest.
    log: Option<JoinHandle<String>>,
}

impl Python {
    /// Starts `tests/support/<name>.py` and gives it its order. It finds the broker's `url` there besides.
    pub(crate) async fn start(name: &str, mut order: Value, pulsar_url: &str) -> Self {
        order["url"] = pulsar_url.into();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support");
        let mut child = Command::new(interpreter())
            // -B: no compiled files beside the sources; -u: a line is there as soon as it is written.
            .args(["-B", "-u"])
            .arg(folder.join(name).with_extension("py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start Python for {name}.py: {error}"));
        let mut stderr = child.stderr.take().expect("piped");
        let log = tokio::spawn(async move {
            let mut text = Vec::new();
            // A pipe that breaks ends the log, no more.
            let _ = stderr.read_to_end(&mut text).await;
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut python = Self {
            name: format!("{name}.py"),
            orders: child.stdin.take(),
            lines: BufReader::new(child.stdout.take().expect("piped")).lines(),
            log: Some(log),
            child,
        };
        python.tell(&order).await;
        python
    }

    /// The interpreter, for a program that is no part of these tests.
    pub(crate) fn path() -> &'static str {
        interpreter()
    }

    /// Sends one more line.
    pub(crate) async fn tell(&mut self, order: &Value) {
        let pipe = self.orders.as_mut().expect("closed only by `rest`");
        // A program that has ended is noticed by whoever waits for its answer.
        let _ = pipe.write_all(format!("{order}\n").as_bytes()).await;
    }

    /// The next line it writes.
    pub(crate) async fn next(&mut self, deadline: Duration) -> Value {
        let line = tokio::time::timeout(deadline, self.lines.next_line()).await;
        match line.map(|line| line.expect("a pipe can be read")) {
            Ok(Some(line)) => parse(&line),
            Ok(None) => self.fail("ended too early").await,
            Err(_) => {
                self.fail(&format!("said nothing within {deadline:?}"))
                    .await
            }
        }
    }

    /// Closes its input, which ends a program that goes on until then, and returns all lines that are still to come.
    pub(crate) async fn rest(mut self, deadline: Duration) -> Vec<Value> {
        self.orders = None;
        let mut values = Vec::new();
        let reading = async {
            while let Some(line) = self.lines.next_line().await.expect("a pipe can be read") {
                values.push(parse(&line));
            }
            self.child.wait().await.expect("a child can be waited for")
        };
        match tokio::time::timeout(deadline, reading).await {
            Ok(status) if status.success() => values,
            Ok(status) => self.fail(&format!("failed ({status})")).await,
            Err(_) => self.fail(&format!("did not end within {deadline:?}")).await,
        }
    }

    /// Panics with what the program had to say.
    async fn fail(&mut self, what: &str) -> ! {
        // It may have closed only its output.
        let _ = self.child.start_kill();
        let log = self.log.take().expect("taken only here");
        let log = log.await.expect("the reader does not panic");
        panic!("{} {what}; it said:\n{log}", self.name)
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{line:?} is no JSON: {error}"))
}

/// The environment's interpreter, made if it is missing. Panics when it cannot be had: no test is skipped in silence.
fn interpreter() -> &'static str {
    static INTERPRETER: OnceLock<String> = OnceLock::new();
    INTERPRETER.get_or_init(|| {
        let dir = servers().var("WALPOST_LOCAL_DIR");
        run_script("python", &[], Some(dir)).trim().to_owned()
    })
}

/// A message as `consume.py` saw it.
#[derive(Clone, Debug)]
pub(crate) struct Judged {
    /// Which of the consumers, from 0.
    pub(crate) consumer: u64,
    /// The partition key.
    pub(crate) key: String,
    /// The payload's bytes, decompressed.
    pub(crate) payload: Vec<u8>,
    /// The property `id`: the outbox row's.
    pub(crate) id: String,
    /// When it came, in milliseconds since 1970.
    pub(crate) received_ms: f64,
    /// Its topic, with the partition if there is one.
    pub(crate) topic: String,
    /// (ledger, entry): the same for all messages of a batch.
    pub(crate) entry: (i64, i64),
}

impl Judged {
    /// Waits until the consumers of `consume.py` have seen `expected` messages, and ends them.
    ///
    /// Panics at the deadline. What comes more than expected is returned too, as far as it has come by then.
    pub(crate) async fn take(consumers: Python, expected: usize, deadline: Duration) -> Vec<Self> {
        let mut consumers = consumers;
        let mut seen = Vec::with_capacity(expected);
        let end = tokio::time::Instant::now() + deadline;
        while seen.len() < expected {
            let left = end.saturating_duration_since(tokio::time::Instant::now());
            assert!(!left.is_zero(), "{} of {expected} came", seen.len());
            seen.push(Self::read(&consumers.next(left).await));
        }
        let rest = consumers.rest(deadline).await;
        seen.extend(rest.iter().map(Self::read));
        seen
    }

    fn read(line: &Value) -> Self {
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let number = |name: &str| line[name].as_i64().expect("a number");
        Self {
            consumer: line["consumer"].as_u64().expect("a number"),
            key: text(&line["key"]),
            payload: hex(line["payload"].as_str().expect("text")),
            id: text(&line["properties"]["id"]),
            received_ms: line["received_ms"].as_f64().expect("a number"),
            topic: text(&line["topic"]),
            entry: (number("ledger"), number("entry")),
        }
    }
}

/// Bytes from their hexadecimal digits.
pub(crate) fn hex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks(2);
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    pairs
        .map(|pair| byte(pair).expect("hexadecimal digits"))
        .collect()
}
