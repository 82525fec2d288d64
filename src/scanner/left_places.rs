//! The rows and partitions that [`super::retention`] cannot remove, and how the row is found for which a DELETE fails.
//!
//! A row is known by its place (ctid) in its table: when somebody moves it, it is tried again sooner, and another row that takes the place waits
//! for the rest of the pause. Nothing depends on it but the time of an attempt.
//!
//! # Bound
//!
//! [`MAX_ROWS`] rows are remembered. In a round in which so many are known, or [`FAILURES`] statements of one stretch have failed, what is
//! left of that stretch waits for the next round, and the round goes on behind it.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use crate::outbox::RowNumber;
use crate::postgres::{TableName, is_about_rows, sql_error, sqlstate};
use crate::upkeep::{Left, Undone, now_ms, pause, reason};
use crate::{Error, Result};

/// Rows that are remembered, of all tables.
const MAX_ROWS: usize = 10_000;
/// Statements that may fail in one stretch: enough to find twenty rows.
const FAILURES: u32 = 512;
/// A statement that timed out on a lock counts as this many failed statements.
const LOCK_FAILURE: u32 = 20;
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// An entry that was not tried for so long after it was due is dropped: its table or partition is gone.
const FORGOTTEN: Duration = Duration::from_secs(600);
/// A page has fewer rows than that, however large it is.
const PAGE_ROWS: u32 = 8192;
/// The lock timeout of a statement over a whole stretch, and of one that looks for the row that somebody has locked.
const LOCK_TIMEOUTS: [&str; 2] = ["SET lock_timeout TO '5s'", "SET lock_timeout TO '100ms'"];

/// Where a row is: its table, block and place in the block.
type Place = (String, i64, u32);

#[derive(Debug)]
struct Waiting {
    id: Option<String>,
    reason: String,
    attempts: u32,
    next: Instant,
    since_ms: u64,
}

impl Waiting {
    fn new(why: String) -> Self {
        Self {
            id: None,
            reason: why,
            attempts: 0,
            next: Instant::now(),
            since_ms: now_ms(),
        }
    }

    fn again(&mut self, why: String) {
        self.reason = why;
        self.attempts = self.attempts.saturating_add(1);
        self.next = Instant::now() + pause(self.attempts);
    }

    fn told(&self, table: &str) -> Left {
        Left {
            table: table.to_owned(),
            id: self.id.clone(),
            number: RowNumber::Unknown,
            txid: None,
            reason: self.reason.clone(),
            attempts: self.attempts,
            since_ms: self.since_ms,
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct LeftPlaces {
    rows: HashMap<Place, Waiting>,
    partitions: HashMap<String, Waiting>,
    /// Tables, stretches and rows of this round that are not remembered.
    others: Undone,
}

impl LeftPlaces {
    pub(super) fn begin_round(&mut self) {
        self.others = Undone::default();
    }

    /// All that is left at the end of a round. Entries of tables that are gone are dropped.
    pub(super) fn end_round(&mut self) -> Undone {
        let now = Instant::now();
        let is_known = |waiting: &Waiting| waiting.next + FORGOTTEN > now;
        self.rows.retain(|_, waiting| is_known(waiting));
        self.partitions.retain(|_, waiting| is_known(waiting));
        let mut undone = Undone::default();
        let mut rows: Vec<_> = self.rows.iter().collect();
        rows.sort_unstable_by_key(|(place, _)| *place);
        for (name, waiting) in &self.partitions {
            undone.push(waiting.told(name));
        }
        for ((table, ..), waiting) in rows {
            undone.push(waiting.told(table));
        }
        let others = std::mem::take(&mut self.others);
        undone.count += others.count - others.listed.len() as u64;
        others.listed.into_iter().for_each(|left| undone.push(left));
        undone
    }

    /// A table could not be looked at, or not to its end.
    pub(super) fn table(&mut self, table: &TableName, error: &Error) {
        self.others.add(&table.to_string(), error);
    }

    /// True when it is time to drop a partition, as far as earlier attempts tell.
    pub(super) fn may_try(&self, partition: &TableName) -> bool {
        let known = self.partitions.get(&partition.to_string());
        known.is_none_or(|waiting| waiting.next <= Instant::now())
    }

    /// A partition cannot be dropped.
    pub(super) fn partition(&mut self, partition: &TableName, error: &Error) {
        let why = reason(&error.told().0);
        let known = self.partitions.entry(partition.to_string());
        let waiting = known.or_insert_with(|| Waiting::new(why.clone()));
        waiting.again(why);
    }

    /// A partition is gone, or nothing keeps it but its rows.
    pub(super) fn forget(&mut self, partition: &TableName) {
        self.partitions.remove(&partition.to_string());
    }

    /// A table has no rows from this block on.
    pub(super) fn ends(&mut self, table: &TableName, blocks: i64) {
        let table = table.to_string();
        self.rows
            .retain(|(of, block, _), _| *of != table || *block < blocks);
    }

    /// A row cannot be deleted; false when it is one too many.
    fn row(&mut self, place: Place, id: Option<String>, why: &str) -> bool {
        if self.rows.len() >= MAX_ROWS && !self.rows.contains_key(&place) {
            return false;
        }
        let known = self.rows.entry(place);
        let waiting = known.or_insert_with(|| Waiting::new(why.to_owned()));
        waiting.id = id;
        waiting.again(why.to_owned());
        true
    }

    /// Places of a stretch that are not to be tried yet; those that are due are forgotten, and come again if they still fail.
    fn of_stretch(&self, table: &str, stretch: Stretch) -> Vec<String> {
        let now = Instant::now();
        let waits = self.rows.iter().filter(|((of, block, row), waiting)| {
            of == table && stretch.has(*block, *row) && waiting.next > now
        });
        waits
            .map(|((_, block, row), _)| format!("({block},{row})"))
            .collect()
    }

    /// A stretch was deleted: what was due in it went, or was taken up again since `began`.
    fn went(&mut self, table: &str, stretch: Stretch, began: Instant) {
        self.rows.retain(|(of, block, row), waiting| {
            of != table || !stretch.has(*block, *row) || waiting.next > began
        });
    }
}

/// Places from one up to another, which is not in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    from: (i64, u32),
    upto: (i64, u32),
}

impl Stretch {
    /// Whole blocks.
    pub(super) fn blocks(from: i64, upto: i64) -> Self {
        Self {
            from: (from, 0),
            upto: (upto, 0),
        }
    }

    fn has(self, block: i64, row: u32) -> bool {
        self.from <= (block, row) && (block, row) < self.upto
    }

    /// Its halves; `None` for a single place.
    fn halves(self) -> Option<[Self; 2]> {
        let ((block, row), (last, end)) = (self.from, self.upto);
        let whole = if end > 0 { last + 1 } else { last };
        let middle = if whole - block > 1 {
            (block + (whole - block) / 2, 0)
        } else {
            let end = if last > block { PAGE_ROWS } else { end };
            if end - row <= 1 {
                return None;
            }
            (block, row + (end - row) / 2)
        };
        let first = Self {
            upto: middle,
            ..self
        };
        Some([
            first,
            Self {
                from: middle,
                ..self
            },
        ])
    }
}

/// How rows of one table are deleted.
pub(super) struct Deletion<'a> {
    pub(super) client: &'a Client,
    pub(super) leaf: &'a TableName,
    pub(super) id: String,
    /// SQL: the rows `o` from place `$2` up to `$3` that are older than `$1` seconds and may go, without the places `$4`.
    pub(super) chosen: String,
    pub(super) age: f64,
    /// A trigger or a rule may keep a row without an error.
    pub(super) may_be_kept: bool,
}

impl Deletion<'_> {
    /// Deletes what may go of a stretch, as far as it can be deleted; how many rows went.
    pub(super) async fn stretch(&self, stretch: Stretch, left: &mut LeftPlaces) -> Result<u64> {
        let table = self.leaf.to_string();
        let began = Instant::now();
        let without = left.of_stretch(&table, stretch);
        let (mut deleted, mut failures) = (0, 0);
        let mut parts = vec![stretch];
        let mut is_impatient = false;
        while let Some(part) = parts.pop() {
            let error = match self.delete(part, &without).await {
                Ok(rows) => {
                    deleted += rows;
                    left.went(&table, part, began);
                    if self.may_be_kept {
                        self.find_kept(part, &without, left).await?;
                    }
                    continue;
                }
                Err(error) if is_about_rows(&error) => error,
                Err(error) => return Err(error),
            };
            let is_locked = sqlstate(&error) == Some(LOCK_NOT_AVAILABLE);
            failures += if is_locked { LOCK_FAILURE } else { 1 };
            if is_locked && !is_impatient {
                is_impatient = true;
                self.set(LOCK_TIMEOUTS[1]).await?;
            }
            let halves = part.halves().filter(|_| failures < FAILURES);
            if let Some([first, second]) = halves {
                parts.extend([second, first]);
            } else {
                let why = reason(&error.told().0);
                let place = (table.clone(), part.from.0, part.from.1);
                let is_row = part.halves().is_none();
                let id = if is_row {
                    self.id_at(part).await?
                } else {
                    None
                };
                if !(is_row && left.row(place, id, &why)) {
                    left.table(self.leaf, &error);
                    break;
                }
            }
        }
        if is_impatient {
            self.set(LOCK_TIMEOUTS[0]).await?;
        }
        Ok(deleted)
    }

    async fn set(&self, sql: &str) -> Result<()> {
        let set = self.client.batch_execute(sql).await;
        set.map_err(|error| sql_error("set up the session", error))
    }

    async fn delete(&self, stretch: Stretch, without: &[String]) -> Result<u64> {
        let sql = format!("DELETE FROM ONLY {} o WHERE {}", self.leaf, self.chosen);
        let (from, upto) = (text(stretch.from), text(stretch.upto));
        let parameters: [&(dyn ToSql + Sync); 4] = [&self.age, &from, &upto, &without];
        let done = self.client.execute(&sql, &parameters).await;
        done.map_err(|error| sql_error(&format!("delete from {}", self.leaf), error))
    }

    /// Rows that are still there although nothing failed. (One that became old meanwhile is due in the next round.)
    async fn find_kept(
        &self,
        stretch: Stretch,
        without: &[String],
        left: &mut LeftPlaces,
    ) -> Result<()> {
        const KEPT: &str = "the statement changed nothing without an error: a trigger of the table returns NULL, or a rule replaces the statement";
        let sql = format!(
            "SELECT o.{}::text, (o.ctid::text::point)[0]::int8, (o.ctid::text::point)[1]::int8 FROM ONLY {} o WHERE {} LIMIT {MAX_ROWS}",
            self.id, self.leaf, self.chosen
        );
        let (from, upto) = (text(stretch.from), text(stretch.upto));
        let parameters: [&(dyn ToSql + Sync); 4] = [&self.age, &from, &upto, &without];
        let kept = self.client.query(&sql, &parameters).await;
        let kept = kept.map_err(|error| sql_error(&format!("look into {}", self.leaf), error))?;
        for row in kept {
            let place = u32::try_from(row.get::<_, i64>(2)).unwrap_or(u32::MAX);
            let place = (self.leaf.to_string(), row.get(1), place);
            left.row(place, row.get(0), KEPT);
        }
        Ok(())
    }

    /// The id of the row in a place, for people.
    async fn id_at(&self, place: Stretch) -> Result<Option<String>> {
        let sql = format!(
            "SELECT o.{}::text FROM ONLY {} o WHERE o.ctid = $1::text::tid",
            self.id, self.leaf
        );
        let row = self.client.query_opt(&sql, &[&text(place.from)]).await;
        let row = row.map_err(|error| sql_error(&format!("look into {}", self.leaf), error))?;
        Ok(row.and_then(|row| row.get(0)))
    }
}

/// As a `tid` is written.
fn text((block, row): (i64, u32)) -> String {
    format!("({block},{row})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halving_comes_to_every_place_and_to_nothing_twice() {
        let mut parts = vec![Stretch::blocks(3, 5)];
        let mut places = Vec::new();
        while let Some(part) = parts.pop() {
            match part.halves() {
                Some([first, second]) => {
                    assert!(first.from == part.from && first.upto == second.from);
                    assert_eq!(second.upto, part.upto);
                    parts.extend([second, first]);
                }
                None => places.push(part.from),
            }
        }
        let expected = (3..5).flat_map(|block| (0..PAGE_ROWS).map(move |row| (block, row)));
        assert!(places.into_iter().eq(expected));
    }

    #[test]
    fn a_row_is_left_out_until_its_pause_is_over_and_forgotten_when_it_went() {
        let mut left = LeftPlaces::default();
        let stretch = Stretch::blocks(0, 256);
        assert!(left.row(("t".to_owned(), 7, 2), Some("a".to_owned()), "because"));
        assert_eq!(left.of_stretch("t", stretch), ["(7,2)"]);
        assert!(left.of_stretch("u", stretch).is_empty());
        assert!(left.of_stretch("t", Stretch::blocks(8, 9)).is_empty());
        left.went("t", stretch, Instant::now());
        assert_eq!(left.end_round().count, 1, "it was not tried");
        left.went("t", stretch, Instant::now() + Duration::from_secs(2));
        assert_eq!(left.end_round().count, 0);
    }
}
