//! What the stream brought, counted by table and by the value of the rows' `txid` column: one side of the comparison that
//! [`super::reconcile`] makes.
//!
//! # The two forms
//!
//! * [`StreamedRuns`] is what the pipe writes: one entry for neighbouring rows of the same table and `txid`, so that a row costs
//!   a comparison and an addition. The pipe hands its runs on every few thousand entries.
//! * [`StreamedRows`] is what is kept of them until a delivered snapshot is noted: a count for each `txid`.
//!
//! # Bound
//!
//! A backlog brings more transactions than can be kept one by one. [`StreamedRows`] holds at most [`MAX_KEYS`] counts of a table; when there
//! are more, the counts of neighbouring `txid`s are added up, in buckets that double in width each time. A bucket is still compared with the
//! same rows of the table. What is lost is precision: the rows of a whole bucket are published when one row of it is missing, and a row
//! that was deleted from the table can hide a missing one of the same bucket. Only whole buckets are compared: the snapshot that is
//! noted then ends at the edge of one, below every running transaction. Buckets end when nothing is counted any more.
//!
//! So a transaction that writes for long, or one that is prepared and left, holds up all notes once there are buckets: rows arrive, stay
//! `pending`, and no retention takes them. Nothing is lost, the counts stay bounded, and the next note behind it compares all of it. That is
//! not mended: a bucket with a running transaction in it has rows that the table does not show yet, and to know which of the streamed rows are
//! of visible transactions would take the count of each. [`super::delivered`] says which transaction it is.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::snapshot::VisibleXids;

/// Counts that are kept of one table: about 3 MiB in the worst case. Ten seconds of 6,500 transactions/s are exact.
pub const MAX_KEYS: usize = 65_536;

/// Neighbouring rows of one table with the same `txid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The table's place in the settings.
    pub table: u16,
    /// The value of the rows' `txid` column. (A row that was copied brings that of its first insertion.)
    pub txid: u64,
    /// How many.
    pub rows: u64,
}

/// Rows in the order in which the stream brought them.
#[derive(Debug, Default)]
pub struct StreamedRuns(Vec<Run>);

impl StreamedRuns {
    /// Entries that are reason enough to hand them on.
    pub const MANY: usize = 8_192;
    /// Entries at which no further row is taken until they are handed on.
    pub const FULL: usize = 65_536;

    /// One more row.
    #[inline]
    pub fn add(&mut self, table: u16, txid: u64) {
        if let Some(last) = self.0.last_mut()
            && last.txid == txid
            && last.table == table
        {
            last.rows += 1;
            return;
        }
        self.0.push(Run {
            table,
            txid,
            rows: 1,
        });
    }

    /// Entries that wait to be handed on.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there is nothing to hand on.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives them away.
    pub fn take(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.0)
    }
}

/// Rows of one table, counted by `txid`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamedRows {
    /// A key is a `txid` without so many low bits.
    shift: u32,
    rows: BTreeMap<u64, u64>,
}

impl StreamedRows {
    /// Bits of a `txid` that do not count: 0 while each is counted by itself.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// So many rows more.
    pub fn add(&mut self, txid: u64, rows: u64) {
        *self.rows.entry(txid >> self.shift).or_default() += rows;
        while self.rows.len() > MAX_KEYS {
            self.shift += 1;
            let mut wider = BTreeMap::new();
            for (key, rows) in std::mem::take(&mut self.rows) {
                *wider.entry(key >> 1).or_default() += rows;
            }
            self.rows = wider;
        }
    }

    /// Rows of that key (a `txid` without its low bits).
    pub fn of_key(&self, key: u64) -> u64 {
        self.rows.get(&key).copied().unwrap_or(0)
    }

    /// Forgets all that is visible in a snapshot that has been compared. While there are buckets that snapshot ends at the edge of one
    /// ([`Self::edge`]).
    pub fn forget(&mut self, compared: &VisibleXids) {
        let shift = self.shift;
        self.rows.retain(|key, _| {
            if shift == 0 {
                !compared.shows(*key)
            } else {
                (*key << shift) >= compared.xmin()
            }
        });
        if self.rows.is_empty() {
            self.shift = 0;
        }
    }

    /// The last edge of a bucket up to `xmin`.
    pub fn edge(&self, xmin: u64) -> u64 {
        (xmin >> self.shift) << self.shift
    }

    /// True when nothing is counted.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// As JSON: `{"shift": 0, "rows": [[txid, rows], …]}`.
    pub fn to_json(&self) -> Value {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|(key, rows)| json!([key, rows]))
            .collect();
        json!({ "shift": self.shift, "rows": rows })
    }

    /// What [`Self::to_json`] made; `None` for anything else.
    pub fn from_json(value: &Value) -> Option<Self> {
        let shift = u32::try_from(value["shift"].as_u64()?).ok()?;
        let rows = value["rows"].as_array()?.iter();
        let pair = |pair: &Value| Some((pair[0].as_u64()?, pair[1].as_u64()?));
        let rows = rows.map(pair).collect::<Option<BTreeMap<_, _>>>()?;
        (shift < u64::BITS && rows.len() <= MAX_KEYS).then_some(Self { shift, rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_rows_of_a_transaction_are_one_run() {
        let mut runs = StreamedRuns::default();
        for (table, txid) in [(0, 7), (0, 7), (1, 7), (0, 8), (0, 7)] {
            runs.add(table, txid);
        }
        let found: Vec<_> = runs
            .take()
            .iter()
            .map(|run| (run.table, run.txid, run.rows))
            .collect();
        assert_eq!(found, [(0, 7, 2), (1, 7, 1), (0, 8, 1), (0, 7, 1)]);
        assert!(runs.is_empty());
    }

    #[test]
    fn however_many_transactions_come_the_counts_are_bounded_and_none_is_forgotten() {
        let mut rows = StreamedRows::default();
        let many = 4 * MAX_KEYS as u64 + 3;
        for txid in 0..many {
            rows.add(1_000_000 + txid, 1 + txid % 2);
        }
        assert!(rows.rows.len() <= MAX_KEYS);
        assert!(rows.shift() > 0);
        let total: u64 = rows.rows.values().sum();
        assert_eq!(total, many + many / 2);
        let key = 1_000_004 >> rows.shift();
        assert!(rows.of_key(key) > 0);
        // A snapshot that shows them all ends the buckets.
        rows.forget(&VisibleXids::parse("9000000:9000000:").unwrap());
        assert!(rows.is_empty());
        assert_eq!(rows.shift(), 0);
    }

    #[test]
    fn a_transaction_that_the_snapshot_does_not_show_keeps_its_count() {
        let mut rows = StreamedRows::default();
        for txid in 10..20 {
            rows.add(txid, 3);
        }
        rows.forget(&VisibleXids::parse("12:18:12,15").unwrap());
        let left: Vec<u64> = rows.rows.keys().copied().collect();
        assert_eq!(left, [12, 15, 18, 19]);
    }

    #[test]
    fn buckets_are_compared_up_to_the_edge_of_one() {
        let mut rows = StreamedRows {
            shift: 2,
            ..StreamedRows::default()
        };
        rows.add(40, 5);
        rows.add(48, 1);
        rows.add(51, 2);
        assert_eq!(rows.edge(50), 48);
        rows.forget(&VisibleXids::parse("48:48:").unwrap());
        assert_eq!(rows.rows, BTreeMap::from([(12, 3)]));
    }

    #[test]
    fn counts_are_read_as_they_were_stored_and_nonsense_is_not() {
        let mut rows = StreamedRows::default();
        rows.add(7, 2);
        rows.add(u64::from(u32::MAX) + 9, 1);
        assert_eq!(StreamedRows::from_json(&rows.to_json()), Some(rows));
        for wrong in [
            json!({}),
            json!({"shift": 64, "rows": []}),
            json!({"shift": 0, "rows": [[1]]}),
            json!(7),
        ] {
            assert_eq!(StreamedRows::from_json(&wrong), None);
        }
    }
}
