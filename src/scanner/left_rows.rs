//! The rows of one table that were published and could not be marked or deleted, until they can.
//!
//! Pure: rows, reasons and the time go in; which rows are due comes out. A row is tried again after a pause that grows to five
//! minutes ([`crate::upkeep::pause`]).
//!
//! # Bound
//!
//! [`MAX_ROWS`] rows and [`MAX_BYTES`] of ids for each table. A row beyond that is forgotten: it is an unmarked row that
//! [`super::unmarked`] finds. To keep that from publishing such rows again and again, a table that has forgotten some is not looked
//! through until half of its list is done ([`LeftRows::is_full`]).

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;

use crate::outbox::RowNumber;
use crate::pulsar::{LeftOfTable, Row, RowKey};
use crate::upkeep::{Left, now_ms, pause};

/// Rows of one table that are kept.
const MAX_ROWS: usize = 10_000;
/// Bytes of their ids.
const MAX_BYTES: usize = 1024 * 1024;

#[derive(Debug)]
struct Waiting {
    reason: Arc<str>,
    attempts: u32,
    next: Instant,
    since_ms: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct LeftRows {
    rows: BTreeMap<RowKey, Waiting>,
    bytes: usize,
    has_forgotten: bool,
}

impl LeftRows {
    /// Leaves a row that was tried, or was not because all others before it failed.
    pub(super) fn leave(&mut self, row: Row<'_>, reason: &Arc<str>, now: Instant) {
        let (id, key) = (row.id, row.key());
        if let Some(known) = self.rows.get_mut(&key) {
            known.attempts = known.attempts.saturating_add(1);
            known.next = now + pause(known.attempts);
            known.reason = Arc::clone(reason);
        } else if self.rows.len() < MAX_ROWS && self.bytes + id.len() <= MAX_BYTES {
            self.bytes += id.len();
            let waiting = Waiting {
                reason: Arc::clone(reason),
                attempts: 1,
                next: now + pause(1),
                since_ms: now_ms(),
            };
            self.rows.insert(key, waiting);
        } else {
            self.has_forgotten = true;
        }
    }

    /// Takes over what another process has left.
    pub(super) fn take_over(&mut self, noted: Left, now: Instant) {
        if let Some(id) = noted.id
            && (noted.number != RowNumber::Unknown || noted.txid.is_some())
            && self.rows.len() < MAX_ROWS
            && self.bytes + id.len() <= MAX_BYTES
        {
            self.bytes += id.len();
            let waiting = Waiting {
                reason: noted.reason.into(),
                attempts: noted.attempts,
                next: now,
                since_ms: noted.since_ms,
            };
            let key = RowKey {
                id,
                number: noted.number,
                txid: noted.txid,
            };
            self.rows.insert(key, waiting);
        }
    }

    /// A row is marked, or gone.
    pub(super) fn done(&mut self, key: &RowKey) {
        if self.rows.remove(key).is_some() {
            self.bytes -= key.id.len();
        }
        if self.rows.len() <= MAX_ROWS / 2 && self.bytes <= MAX_BYTES / 2 {
            self.has_forgotten = false;
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// True when rows had to be dropped from this list: from then on they look like rows that were never marked.
    pub(super) fn is_full(&self) -> bool {
        self.has_forgotten
    }

    /// When the first is to be tried again.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.rows.values().map(|waiting| waiting.next).min()
    }

    /// Those that are to be tried now, at most `limit`.
    pub(super) fn due(&self, now: Instant, limit: usize) -> Vec<RowKey> {
        let due = self.rows.iter().filter(|(_, waiting)| waiting.next <= now);
        due.take(limit).map(|(key, _)| key.clone()).collect()
    }

    /// For the look for unmarked rows.
    pub(super) fn tell(&self) -> LeftOfTable {
        LeftOfTable {
            is_full: self.is_full(),
            rows: self.rows.keys().cloned().collect::<HashSet<_>>(),
        }
    }

    /// The first of them, for people.
    pub(super) fn listed(&self, table: &str, limit: usize) -> impl Iterator<Item = Left> {
        self.rows
            .iter()
            .take(limit)
            .map(move |(key, waiting)| Left {
                table: table.to_owned(),
                id: Some(key.id.clone()),
                number: key.number,
                txid: key.txid,
                reason: waiting.reason.to_string(),
                attempts: waiting.attempts,
                since_ms: waiting.since_ms,
            })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(id: &str, seq: i64, txid: u64) -> RowKey {
        RowKey {
            id: id.to_owned(),
            number: RowNumber::Seq(seq),
            txid: Some(txid),
        }
    }

    #[test]
    fn a_row_is_due_after_a_pause_that_grows_and_goes_when_it_is_done() {
        let (mut rows, reason) = (LeftRows::default(), Arc::from("because"));
        let now = Instant::now();
        let first = key("a", 1, 9);
        for seconds in [1, 2, 4, 8] {
            rows.leave(first.row(0), &reason, now);
            let pause = Duration::from_secs(seconds);
            assert_eq!(rows.next_due(), Some(now + pause));
            assert!(rows.due(now + pause / 2, 10).is_empty());
            assert_eq!(rows.due(now + pause, 10), std::slice::from_ref(&first));
        }
        let others = [key("a", 2, 9), key("a", 1, 10)];
        for other in &others {
            rows.leave(other.row(0), &reason, now);
        }
        rows.done(&first);
        assert_eq!(rows.len(), 2, "other rows with that id stay");
        for other in &others {
            rows.done(other);
        }
        assert!(rows.is_empty() && rows.bytes == 0);
    }

    #[test]
    fn rows_beyond_the_bound_are_forgotten_until_half_of_the_others_are_done() {
        let (mut rows, reason) = (LeftRows::default(), Arc::from("because"));
        let now = Instant::now();
        let numbered = |row: usize| key("a", i64::try_from(row).unwrap(), 9);
        for row in 0..MAX_ROWS {
            rows.leave(numbered(row).row(0), &reason, now);
        }
        assert!(!rows.is_full());
        rows.leave(key("b", 0, 9).row(0), &reason, now);
        assert!(rows.is_full() && rows.len() == MAX_ROWS);
        for row in 0..MAX_ROWS / 2 {
            assert!(rows.is_full(), "{row}");
            rows.done(&numbered(row));
        }
        assert!(!rows.is_full());
    }
}
