//! Discarded events: what `walpost stragglers discard` has deleted stays away, although the log or a scan may bring it again.
//!
//! A straggler is stored before the log position passes its transaction. Until that has happened, and the server keeps it across a
//! crash, Postgres may send the transaction again: after a kill of walpost while another event of it, or an earlier one, has no
//! receipt. So may a scan that goes on after a crash, or one that closes the gap of a lost slot. To a process that finds no
//! straggler such an event is new: it would be published, or stored again. So `discard` writes a row of `walpost.discarded` in the
//! transaction that deletes the straggler; here is what a process knows of these rows.
//!
//! # Why a discarded event does not come back
//!
//! * The rows are read when the stragglers are: before the first row of a scan, and before the first frame of a stream. An event
//!   that is among them is left out by [`crate::outlet`], which every row passes on its way from the log or a scan.
//! * One that is discarded later, while it is on its way for a second time, is parked with its key until the table is read the next
//!   time (every three seconds). It comes to be stored, and the INSERT leaves out what is in `walpost.discarded`. The rows are
//!   read after the stragglers are counted, and are told before the key is let go.
//! * In the modes mark and delete the outbox row is marked or deleted in the transaction of `discard`, so the look for unmarked rows does not
//!   find it.
//!
//! With `WALPOST_ORDERING=none` nothing is parked: an event that is discarded in the three seconds after a start may be on its way to
//! its topic already. And a message that is being retried at the moment of `discard` is on its way as well.
//!
//! # Which event it is
//!
//! Its table and id, and its place: commit LSN and ordinal where the log has brought it, `seq` and `txid` for a scan. (`seq` and id alone
//! are another row's after TRUNCATE … RESTART IDENTITY.) `discard` looks up what was not stored of both in the outbox, if that has a
//! row of the id and of the straggler's transaction once (the stream stores the transaction's id in the log); a row whose `txid` is not known is none that a scan leaves out. What an earlier version noted has no `txid`, and is known
//! without. The stream does not bring what a scan has stored, except for
//! the few rows whose ids are remembered (see [`super`]).
//!
//! # Bound
//!
//! A row goes when `walpost.progress.delivered` shows the transaction that discarded it: by then the confirmed LSN had passed the
//! straggler's. It stays for an hour, and two checkpoints, in any case: the server writes a slot's confirmed LSN to disk only with a
//! checkpoint, and a crash, or a standby that takes over, brings back an earlier one. In memory an event takes two entries of 40 bytes.
//!
//! Tests: `tests/stragglers/discard.rs`.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use tokio_postgres::Row;

use crate::Lsn;
use crate::pulsar::RowTag;

/// SQL: rows of a slot (`$1`), as [`Discarded::read`] takes them; `has_txid`: the table has the column `row_txid`.
pub(super) fn select(has_txid: bool) -> String {
    let txid = if has_txid { "row_txid" } else { "NULL::int8" };
    format!(
        "SELECT outbox, id, commit_lsn::text, ordinal, seq, {txid} FROM walpost.discarded WHERE slot = $1"
    )
}

/// SQL: whether the event of [`super::straggler_store`]'s INSERT is among them.
pub(super) fn is_discarded(has_txid: bool) -> String {
    let same_txid = if has_txid {
        "(event.commit_lsn::pg_lsn <> '0/0' or d.row_txid is null or d.row_txid = event.row_txid)"
    } else {
        "true"
    };
    format!(
        "exists (
    select from walpost.discarded d
    where d.slot = $1 and d.outbox = event.outbox and d.id is not distinct from event.id
          and (d.commit_lsn = event.commit_lsn::pg_lsn and d.ordinal = event.ordinal
               or event.commit_lsn::pg_lsn = '0/0' and d.seq = event.ordinal)
          and {same_txid}
)"
    )
}

/// Deletes what is not needed any more; `$1` is the slot.
pub(super) const PRUNE: &str = "
    DELETE FROM walpost.discarded d USING walpost.progress p
    WHERE d.slot = $1 AND p.slot = d.slot AND pg_visible_in_snapshot(d.txid, p.delivered)
          AND d.discarded_at < now() - greatest(interval '1 hour', 2 * current_setting('checkpoint_timeout')::interval)";

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Discarded(HashSet<Place>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    table: u32,
    /// 0 for a row of the table.
    commit_lsn: u64,
    /// Or its `seq`.
    ordinal: u64,
    /// Of a row of the table; 0, which no transaction has: any.
    txid: u64,
    id_hash: u64,
}

impl Discarded {
    /// Of the rows that [`select`] gives; what is of none of these tables is left out.
    pub(super) fn read(rows: &[Row], outboxes: &[String]) -> Self {
        let mut discarded = Self::default();
        for row in rows {
            let name: &str = row.get(0);
            let table = outboxes.iter().position(|outbox| outbox == name);
            let table = table.and_then(|table| u32::try_from(table).ok());
            let lsn = row.get::<_, &str>(2).parse().unwrap_or(Lsn::ZERO);
            if let Some(table) = table {
                let txid = row.get::<_, Option<i64>>(5);
                let txid = txid.and_then(|txid| u64::try_from(txid).ok());
                discarded.add(table, row.get(1), (lsn, row.get(3)), (row.get(4), txid));
            }
        }
        discarded
    }

    fn add(
        &mut self,
        table: u32,
        id: Option<&str>,
        place: (Lsn, i64),
        (seq, txid): (Option<i64>, Option<u64>),
    ) {
        let of_scan = seq.map(|seq| (Lsn::ZERO, seq));
        for (lsn, ordinal) in [Some(place), of_scan].into_iter().flatten() {
            let txid = txid.filter(|_| lsn == Lsn::ZERO);
            if let Ok(ordinal) = u64::try_from(ordinal) {
                self.0.insert(Place {
                    table,
                    commit_lsn: lsn.as_u64(),
                    ordinal,
                    txid: txid.unwrap_or(0),
                    id_hash: hash(id),
                });
            }
        }
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the row at this place, with this `txid` and id, is one of them; read from the table, its LSN is `0/0`.
    pub fn contains(
        &self,
        (row, txid): (RowTag, Option<u64>),
        commit_lsn: Lsn,
        id: Option<&str>,
    ) -> bool {
        let any = Place {
            table: row.table(),
            commit_lsn: commit_lsn.as_u64(),
            ordinal: row.ordinal(),
            txid: 0,
            id_hash: hash(id),
        };
        let its = txid.filter(|_| commit_lsn == Lsn::ZERO);
        let its = its.map(|txid| Place { txid, ..any });
        self.0.contains(&any) || its.is_some_and(|its| self.0.contains(&its))
    }
}

fn hash(id: Option<&str>) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_known_by_its_place_in_the_log_and_by_its_seq_and_txid_and_only_with_its_id() {
        let mut discarded = Discarded::default();
        assert!(discarded.is_empty());
        discarded.add(1, Some("7"), (Lsn::new(800), 3), (Some(42), Some(9)));
        discarded.add(0, None, (Lsn::new(800), 4), (None, None));
        // As an earlier version noted it.
        discarded.add(0, None, (Lsn::ZERO, 5), (Some(5), None));
        let known = [
            (RowTag::new(1, 3), None, 800, Some("7")),
            (RowTag::new(1, 3), Some(8), 800, Some("7")),
            (RowTag::new(1, 42), Some(9), 0, Some("7")),
            (RowTag::new(0, 4), Some(9), 800, None),
            (RowTag::new(0, 5), Some(9), 0, None),
        ];
        for (row, txid, lsn, id) in known {
            assert!(
                discarded.contains((row, txid), Lsn::new(lsn), id),
                "{row:?}"
            );
        }
        let others = [
            // Another timeline may use the same position.
            (RowTag::new(1, 3), Some(9), 800, Some("8")),
            (RowTag::new(1, 3), Some(9), 808, Some("7")),
            (RowTag::new(0, 3), Some(9), 800, Some("7")),
            // Another row with the same id.
            (RowTag::new(1, 43), Some(9), 0, Some("7")),
            (RowTag::new(1, 42), Some(9), 800, Some("7")),
            (RowTag::new(0, 4), Some(9), 800, Some("")),
            // Another row with the same id and seq: numbers have begun again.
            (RowTag::new(1, 42), Some(10), 0, Some("7")),
            (RowTag::new(1, 42), None, 0, Some("7")),
        ];
        for (row, txid, lsn, id) in others {
            assert!(
                !discarded.contains((row, txid), Lsn::new(lsn), id),
                "{row:?}"
            );
        }
    }
}
