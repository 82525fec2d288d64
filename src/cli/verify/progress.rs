//! How far a long look is: a bar on a terminal, a line in the log every few seconds elsewhere.

use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use tracing::info;

/// Between two bars.
const REDRAW: Duration = Duration::from_millis(200);
/// Between two lines of the log.
const TELL: Duration = Duration::from_secs(5);
/// The clock is looked at once in so many steps.
const STEPS: u64 = 1024;
const WIDTH: usize = 30;

/// Counts rows and messages, and shows it on stderr.
pub(super) struct Progress {
    /// Rows that there are; about as many messages are expected.
    expected: u64,
    rows: u64,
    messages: u64,
    shown_at: Instant,
    terminal: bool,
}

impl Progress {
    pub(super) fn new(expected: u64) -> Self {
        Self {
            expected,
            rows: 0,
            messages: 0,
            shown_at: Instant::now(),
            terminal: io::stderr().is_terminal(),
        }
    }

    pub(super) fn row(&mut self) {
        self.rows += 1;
        self.step();
    }

    pub(super) fn message(&mut self) {
        self.messages += 1;
        self.step();
    }

    pub(super) fn messages(&self) -> u64 {
        self.messages
    }

    fn step(&mut self) {
        if (self.rows + self.messages).is_multiple_of(STEPS) {
            self.show();
        }
    }

    fn show(&mut self) {
        let (rows, messages) = (self.rows, self.messages);
        if self.terminal && self.shown_at.elapsed() >= REDRAW {
            self.shown_at = Instant::now();
            self.draw(&bar(rows + messages, self.expected * 2));
        } else if !self.terminal && self.shown_at.elapsed() >= TELL {
            self.shown_at = Instant::now();
            info!(rows, messages, expected = self.expected, "reading");
        }
    }

    fn draw(&self, bar: &str) {
        let (rows, messages) = (self.rows, self.messages);
        // A terminal that has gone away is no reason to stop.
        let _ = write!(io::stderr(), "\r{bar}  {rows} rows, {messages} messages ");
    }

    /// Everything is read.
    pub(super) fn end(&self) {
        if self.terminal {
            self.draw(&bar(1, 1));
            let _ = writeln!(io::stderr(), "judging");
        }
    }
}

fn bar(done: u64, of: u64) -> String {
    let percent = (done * 100).checked_div(of).unwrap_or(100).min(100);
    let filled = usize::try_from(percent).unwrap_or(100) * WIDTH / 100;
    format!("[{:<WIDTH$}] {percent:3} %", "#".repeat(filled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_never_longer_than_full() {
        assert_eq!(bar(0, 10), format!("[{}]   0 %", " ".repeat(WIDTH)));
        assert_eq!(bar(30, 10), format!("[{}] 100 %", "#".repeat(WIDTH)));
        assert!(bar(1, 0).ends_with("100 %"));
        assert_eq!(bar(1, 2).matches('#').count(), WIDTH / 2);
    }
}
