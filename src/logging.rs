//! Log lines: to stderr, as text or JSON, filtered by `WALPOST_LOG`; and the last warnings for the status page.
//!
//! Input: the checked settings. Standard output stays free for what a command prints.
//!
//! Warnings and errors are also put into a small queue, whatever the filter says: what an operator would look for in the log
//! is then on `/status`. Whoever logs never waits: where the queue is full, or nobody reads it, the line is only logged.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::time::SystemTime;

use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry};

use crate::config::{Config, LogFormat};
use crate::{Error, Result};

/// Lines that may wait to be read: more than a bad second brings, since every retry pauses.
const QUEUE: usize = 64;
/// What is kept of a line, in bytes.
const LONGEST: usize = 1000;

/// A warning or an error that was logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// When.
    pub at: SystemTime,
    /// True for an error.
    pub is_error: bool,
    /// The message, then its fields.
    pub text: String,
}

/// The warnings, as they come; to be dropped where nobody wants them.
#[derive(Debug)]
pub struct Warnings(pub(crate) mpsc::Receiver<Warning>);

/// Sends everything that is logged from now on to stderr. To be called once in a process.
pub fn init(config: &Config) -> Result<Warnings> {
    let filter = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|error| Error::bug("the log filter was checked and is wrong").caused_by(error))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(|| OneLine(io::stderr()));
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match config.log_format {
        LogFormat::Text => lines.with_ansi(colours()).with_filter(filter).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_filter(filter).boxed(),
    };
    let (sender, warnings) = mpsc::channel(QUEUE);
    tracing_subscriber::registry()
        .with(lines)
        .with(Gather(sender).with_filter(LevelFilter::WARN))
        .try_init()
        .map_err(|error| Error::bug("logging was set up twice").caused_by(error))?;
    Ok(Warnings(warnings))
}

/// Colours are for a terminal whose user has not switched them off (<https://no-color.org>).
fn colours() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Keeps an event on its line: it is written at once, and a value of a row in it (a topic's name) may have line breaks.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let (text, end) = match event.split_last() {
            Some((b'\n', text)) => (text, &b"\n"[..]),
            _ => (event, &b""[..]),
        };
        if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            self.0.write_all(event)?;
            return Ok(event.len());
        }
        let mut line = Vec::with_capacity(event.len() + 8);
        for byte in text {
            match byte {
                b'\n' => line.extend_from_slice(b"\\n"),
                b'\r' => line.extend_from_slice(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.extend_from_slice(end);
        self.0.write_all(&line)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Puts what is logged into the queue.
struct Gather(mpsc::Sender<Warning>);

impl<S: Subscriber> Layer<S> for Gather {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut text = line.message + &line.fields;
        if text.len() > LONGEST {
            let end = (0..=LONGEST).rev().find(|end| text.is_char_boundary(*end));
            text.truncate(end.unwrap_or(0));
            text.push('…');
        }
        let _full_or_unread = self.0.try_send(Warning {
            at: SystemTime::now(),
            is_error: *event.metadata().level() == Level::ERROR,
            text,
        });
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing into a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_its_values_hold() {
        for (event, written) in [
            ("topic a\nb\r refused\n", "topic a\\nb\\r refused\n"),
            ("topic é refused\n", "topic é refused\n"),
            ("no end", "no end"),
            ("", ""),
        ] {
            let mut line = OneLine(Vec::new());
            line.write_all(event.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(line.0).unwrap(), written);
        }
    }

    #[test]
    fn warnings_are_gathered_with_their_fields_and_cut_where_they_are_long() {
        let (sender, mut warnings) = mpsc::channel(2);
        let gather = Gather(sender).with_filter(LevelFilter::WARN);
        let subscriber = tracing_subscriber::registry().with(gather);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("not this");
            tracing::warn!(lanes = 3, "broker {} ended", "x");
            tracing::error!("{}", "ü".repeat(LONGEST));
            tracing::warn!("there is no room for this one");
        });
        let first = warnings.try_recv().unwrap();
        assert_eq!(
            (first.text.as_str(), first.is_error),
            ("broker x ended lanes=3", false)
        );
        let second = warnings.try_recv().unwrap();
        assert!(second.is_error && second.text.len() <= LONGEST + 3);
        assert!(warnings.try_recv().is_err());
    }
}
