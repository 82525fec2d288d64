//! The program under test as a child process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::servers::send_signal;
use super::{Database, eventually, servers};

/// How a child is to be started; ends with [`Command::spawn`].
pub(crate) struct Command(std::process::Command);

impl Command {
    /// `walpost <args>`, with no `WALPOST_*` or `PG*` variable of the test's own environment.
    pub(crate) fn walpost<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Self {
        Self::program(env!("CARGO_BIN_EXE_walpost"), args)
    }

    /// Another program, under the same rules.
    pub(crate) fn program<A: AsRef<OsStr>>(
        program: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let mut command = std::process::Command::new(program);
        command.args(args);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("WALPOST_") || name.starts_with("PG") {
                command.env_remove(&*name);
            }
        }
        Self(command)
    }

    /// Sets a variable of the child's environment.
    #[must_use]
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Points the child at a test's database, slot and topics, and at the shared broker; over TCP. `run` logs in as
    /// [`Database::run_url`] says, every other command as the superuser.
    #[must_use]
    pub(crate) fn on(self, database: &Database) -> Self {
        let runs = self.0.get_args().next().is_some_and(|first| first == "run");
        let url = if runs {
            database.run_url()
        } else {
            database.url.clone()
        };
        self.env("WALPOST_POSTGRES_URL", url)
            .env("WALPOST_PULSAR_URL", &servers().pulsar_url)
            .env("WALPOST_SLOT", &database.slot)
            .env(
                "WALPOST_TOPIC",
                format!("{}.{{aggregatetype}}", database.topic_prefix),
            )
            // Several connectors run at a time: each takes a port that is free.
            .env("WALPOST_HTTP_ADDR", "127.0.0.1:0")
    }

    /// Starts it; its output is gathered line by line.
    pub(crate) fn spawn(mut self) -> Walpost {
        let program = self.0.get_program().to_owned();
        let mut child = self
            .0
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let gate = Arc::new(Gate::default());
        let out = child.stdout.take().expect("piped");
        let err = child.stderr.take().expect("piped");
        let readers = vec![
            gather(out, Arc::clone(&lines), Arc::clone(&gate)),
            gather(err, Arc::clone(&lines), Arc::clone(&gate)),
        ];
        Walpost {
            child,
            lines,
            gate,
            readers,
            is_ready: false,
        }
    }

    /// Starts it, waits for its end and returns its exit code and everything it printed.
    pub(crate) async fn run(self, deadline: Duration) -> (i32, String) {
        let mut child = self.spawn();
        let code = child.wait_exit(deadline).await;
        (code, child.output())
    }
}

/// Reads a pipe to its end in a thread of its own, so that the child never waits for a slow test.
fn gather(
    pipe: impl Read + Send + 'static,
    lines: Arc<Mutex<Vec<String>>>,
    gate: Arc<Gate>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let held = gate.held.lock().expect("no reader panics");
            let held = gate.changed.wait_while(held, |held| *held);
            drop(held.expect("no reader panics"));
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).into_owned();
            lines.lock().expect("no reader panics").push(line);
        }
    })
}

/// Whether the readers of a child's output wait.
#[derive(Default)]
struct Gate {
    held: Mutex<bool>,
    changed: Condvar,
}

/// A running child; killed when dropped.
pub(crate) struct Walpost {
    child: Child,
    gate: Arc<Gate>,
    /// Shared with the two reader threads. Lines of stdout and stderr, in the order in which they were read.
    lines: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
    /// A line that a test waited for has come; see [`Walpost::signal`].
    is_ready: bool,
}

impl Walpost {
    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops reading what it prints (or goes on): its pipes fill, and then it waits in the system call that writes a line.
    pub(crate) fn hold_output(&self, hold: bool) {
        *self.gate.held.lock().expect("no reader panics") = hold;
        self.gate.changed.notify_all();
    }

    /// The lines it has printed so far.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("no reader panics").clone()
    }

    /// The same as one text.
    pub(crate) fn output(&self) -> String {
        self.lines().join("\n")
    }

    /// Waits for a line that contains `text` and returns it. Fails at once when the child ends without it.
    pub(crate) async fn wait_for_line(&mut self, text: &str, deadline: Duration) -> String {
        let seen = Arc::clone(&self.lines);
        let find = || {
            let lines = seen.lock().expect("no reader panics");
            lines.iter().find(|line| line.contains(text)).cloned()
        };
        let what = format!("a line with {text:?}");
        let found = eventually(deadline, &what, async || {
            // Asked before looking: a child that ended now has said everything it will say.
            let ended = self.try_exit();
            match (find(), ended) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(status)) => Some(Err(status)),
                (None, None) => None,
            }
        });
        match found.await {
            Ok(line) => {
                self.is_ready = true;
                line
            }
            Err(status) => panic!(
                "the child ended ({status}) without {what}; it said:\n{}",
                self.output()
            ),
        }
    }

    /// Waits for its end and returns the exit code; 128 + the signal's number if one ended it, as a shell shows it.
    pub(crate) async fn wait_exit(&mut self, deadline: Duration) -> i32 {
        use std::os::unix::process::ExitStatusExt;

        let status = eventually(deadline, "the child's end", async || self.try_exit()).await;
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// Its exit status, if it has ended and all it said has been read.
    pub(crate) fn try_exit(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().expect("a child can be waited for")?;
        for reader in self.readers.drain(..) {
            reader.join().expect("no reader panics");
        }
        Some(status)
    }

    /// Asks it to stop, as an operator or a supervisor does. Needs a sign of readiness: see [`Walpost::signal`].
    pub(crate) fn sigterm(&self) {
        self.signal("TERM");
    }

    /// Kills it: no destructor, no last word.
    pub(crate) fn sigkill(&mut self) {
        self.child.kill().expect("a child can be killed");
    }

    /// Sends a signal by its name: `STOP`, `CONT`, `INT`, …
    ///
    /// A signal that a program handles kills it as long as it has not set its handler, and on a busy machine that takes a
    /// while. So one that can be handled needs a line of the child's own before it, which the test has waited for with
    /// [`Walpost::wait_for_line`]; without it this panics, on every machine. (walpost listens for signals before it prints its
    /// first line. `KILL`, `STOP` and `CONT` do the same to every process at any time.)
    pub(crate) fn signal(&self, name: &str) {
        assert!(
            self.is_ready || ["KILL", "STOP", "CONT"].contains(&name),
            "SIG{name} to a child of which no line was waited for: it may not have set its handler yet, and would die of it"
        );
        send_signal(&self.pid().to_string(), name);
    }

    /// The most memory it has had resident, in KiB (`VmHWM`); only while it lives.
    pub(crate) fn peak_rss_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("/proc can be read");
        status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok())
            .expect("the child lives, so it has a peak resident size")
    }
}

impl Drop for Walpost {
    fn drop(&mut self) {
        self.hold_output(false);
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the child said:\n{}\n---", self.output());
        }
    }
}
