//! Published rows of transactions that nobody can see yet, until they can be seen.
//!
//! Pure, but for the question which transactions run. Input: rows, and which transactions run ([`Running`]). Output: the rows whose transactions have ended.
//!
//! # Bound
//!
//! [`MAX_ROWS`] rows and [`MAX_BYTES`] of ids: as many as the queue of [`crate::pulsar::rows`] takes before the stream pauses. They must not pause
//! it. Where walpost is the synchronous standby, a transaction ends only when walpost has read and confirmed the whole of it, however many
//! rows it has. A row beyond that is forgotten: it is an unmarked row that [`super::unmarked`] finds.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::postgres::sql_error;
use crate::pulsar::rows::{Row, Rows};
use crate::{Error, Result};

/// Rows that are kept.
const MAX_ROWS: usize = 100_000;
/// Bytes of their ids.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Unseen {
    by_xid: BTreeMap<u32, Rows>,
    rows: usize,
    bytes: usize,
    has_forgotten: bool,
}

impl Unseen {
    /// Keeps a row; false where there is no room for it.
    pub(super) fn keep(&mut self, row: Row<'_>) -> bool {
        if self.rows >= MAX_ROWS || self.bytes + row.id.len() > MAX_BYTES {
            return false;
        }
        self.rows += 1;
        self.bytes += row.id.len();
        self.by_xid.entry(row.xid).or_default().push(row);
        true
    }

    /// Gives the rows whose transactions have ended.
    pub(super) fn ended(&mut self, running: &Running) -> Vec<Rows> {
        let have_ended = self.by_xid.keys().filter(|xid| !running.has(**xid));
        let have_ended: Vec<u32> = have_ended.copied().collect();
        let ended = have_ended.iter().filter_map(|xid| self.by_xid.remove(xid));
        let ended: Vec<Rows> = ended.collect();
        self.rows -= ended.iter().map(Rows::len).sum::<usize>();
        self.bytes -= ended.iter().map(Rows::bytes).sum::<usize>();
        self.has_forgotten &= !self.by_xid.is_empty();
        ended
    }

    /// Notes that a row was forgotten; true the first time since there was none here.
    pub(super) fn is_first_overflow(&mut self) -> bool {
        !std::mem::replace(&mut self.has_forgotten, true)
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.rows
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows == 0
    }
}

/// Which transactions run, of a `pg_snapshot`: without the epoch, as the log names them.
#[derive(Debug)]
pub(super) struct Running {
    /// Everything from here on had not ended.
    next: u32,
    running: Vec<u32>,
}

impl Running {
    pub(super) async fn ask(client: &Client) -> Result<Self> {
        let row = client
            .query_one("SELECT pg_current_snapshot()::text", &[])
            .await;
        let row = row.map_err(|error| sql_error("ask for running transactions", error))?;
        let text: &str = row.get(0);
        Self::parse(text).ok_or_else(|| Error::bug("a snapshot is not of the form xmin:xmax:xip"))
    }

    /// Reads `xmin:xmax:xip,…`.
    #[allow(clippy::cast_possible_truncation)] // The lower half is the transaction id, the upper one the epoch.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let _oldest = parts.next()?;
        let next = parts.next()?.parse::<u64>().ok()? as u32;
        let running = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let running = running.map(|xid| xid.parse::<u64>().map(|xid| xid as u32));
        Some(Self {
            next,
            running: running.collect::<Result<_, _>>().ok()?,
        })
    }

    /// True when transaction `xid` had not ended; never for 0, a row that was seen.
    pub(super) fn has(&self, xid: u32) -> bool {
        // Transaction ids are compared in a circle, as Postgres does.
        let not_begun = xid.wrapping_sub(self.next) < 1 << 31;
        xid != 0 && (not_begun || self.running.contains(&xid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::RowNumber;

    #[test]
    fn a_snapshot_tells_which_transactions_run_also_when_ids_wrap() {
        let running = Running::parse("10:20:10,14").unwrap();
        for (xid, runs) in [
            (9, false),
            (10, true),
            (11, false),
            (14, true),
            (19, false),
            (20, true),
            (0, false),
        ] {
            assert_eq!(running.has(xid), runs, "{xid}");
        }
        // Epoch 1: 2^32 + 5.
        let running = Running::parse("4294967290:4294967301:4294967290").unwrap();
        for (xid, runs) in [
            (u32::MAX - 5, true),
            (u32::MAX - 4, false),
            (4, false),
            (5, true),
        ] {
            assert_eq!(running.has(xid), runs, "{xid}");
        }
        assert!(Running::parse("1:2:").unwrap().running.is_empty());
        for wrong in ["", "1:2", "a:b:c", "1:2:x"] {
            assert!(Running::parse(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn rows_are_kept_within_a_bound_until_their_transactions_have_ended() {
        let row = |xid, id| Row {
            table: 0,
            xid,
            id,
            number: RowNumber::Unknown,
            txid: None,
        };
        let mut unseen = Unseen::default();
        for _ in 1..MAX_ROWS {
            assert!(unseen.keep(row(10, "")));
        }
        assert!(unseen.keep(row(14, "x")) && !unseen.keep(row(14, "")));
        assert!(unseen.is_first_overflow() && !unseen.is_first_overflow());

        assert!(
            unseen
                .ended(&Running::parse("10:20:10,14").unwrap())
                .is_empty()
        );
        let ended = unseen.ended(&Running::parse("14:20:14").unwrap());
        let ended: usize = ended.iter().map(Rows::len).sum();
        assert_eq!((ended, unseen.len()), (MAX_ROWS - 1, 1));
        assert!(
            !unseen.is_first_overflow(),
            "14 still has rows that were forgotten"
        );

        let long = "x".repeat(MAX_BYTES);
        assert!(!unseen.keep(row(10, &long)) && unseen.keep(row(10, &long[1..])));
        assert_eq!(unseen.ended(&Running::parse("20:20:").unwrap()).len(), 2);
        assert!(unseen.is_empty() && unseen.bytes == 0 && unseen.is_first_overflow());
    }
}
