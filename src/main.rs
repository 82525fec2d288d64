//! The binary: arguments, configuration, log, runtime, exit code. All else is in the library.
//!
//! Settings are read and checked before the runtime starts, so a wrong one (exit 64) has touched nothing.

use std::io::Write;
use std::process::ExitCode;

use walpost::cli::{self, Invocation, Stop};
use walpost::{Error, Result, config, logging};

const EXIT_USAGE: u8 = 64;
const EXIT_BUG: i32 = 70;

fn main() -> ExitCode {
    exit_on_panic();
    let invocation = match cli::parse(std::env::args_os(), &config::process_env) {
        Ok(invocation) => invocation,
        Err(Stop::Usage(text)) => {
            // Help that was asked for goes to stdout. If it cannot be written there is nobody to tell.
            let _ = text.print();
            return ExitCode::from(if text.use_stderr() { EXIT_USAGE } else { 0 });
        }
        Err(Stop::Wrong(error)) => return failed(&error),
        Err(Stop::Text(text)) => {
            let written = cli::print(&mut std::io::stdout(), &text);
            return written.map_or_else(|error| failed(&error), |()| ExitCode::SUCCESS);
        }
    };
    match start(invocation) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(&error),
    }
}

fn start(invocation: Invocation) -> Result<u8> {
    // One thread: the data's path has one owner, and what it waits for are two sockets.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::temporary("cannot start the runtime").caused_by(error))?;
    let code = runtime.block_on(async {
        // Before the first line is printed: whoever has read a line of `walpost run` may send SIGTERM, and it drains.
        let shutdown = cli::listen_for_signals(&invocation.command)?;
        let warnings = logging::init(&invocation.config)?;
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        for name in config::unknown_env_vars(names) {
            tracing::warn!("the env var {name} means nothing to this version of walpost");
        }
        cli::dispatch(invocation, warnings, shutdown).await
    });
    // A thread may still wait for a file or a name that never comes.
    runtime.shutdown_background();
    code
}

/// Says what went wrong, a line for each of several wrong settings.
fn failed(error: &Error) -> ExitCode {
    for line in error.report().lines() {
        say(&format!("walpost: error: {line}"));
    }
    ExitCode::from(error.exit_code())
}

/// A panic anywhere, also in a task whose end nobody awaits, ends the process: exit 70.
///
/// That is safe at any point: the slot has moved only past what the broker has acknowledged.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let what = panic.to_string().replace('\n', " ");
        say(&format!("walpost: bug: {what} (please report this)"));
        std::process::exit(EXIT_BUG);
    }));
}

/// Writes a line to stderr; unlike `eprintln!` it does not panic when stderr is closed.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
