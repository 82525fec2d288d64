//! Log lines: to stderr, as text or JSON, filtered by `WALPOST_LOG`.
//!
//! Input: the checked settings. Standard output stays free for what a command prints.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};
use crate::{Error, Result};

/// Sends everything that is logged from now on to stderr. To be called once in a process.
pub fn init(config: &Config) -> Result<()> {
    let filter = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|error| Error::bug("the log filter was checked and is wrong").caused_by(error))?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    let set = match config.log_format {
        LogFormat::Text => lines.with_ansi(colours()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    set.map_err(|error| Error::bug("logging was set up twice").caused_by(error))
}

/// Colours are for a terminal whose user has not switched them off (<https://no-color.org>).
fn colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
