//! Counting `walpost.straggler`, page by page.
//!
//! The task of [`super::straggler_task`] keeps the count of each key by what it does itself. Commands and people change the table too, so it is
//! counted again, over and over: a page at each scan, by number. Input: the table. Output: how the counts of keys differ from what was known, at the
//! end of a walk; and heads for keys that have lost theirs.
//!
//! # Bound
//!
//! The task runs on the data's thread: a page has [`PAGE_ROWS`] rows, and behind each [`SLICE`] of work the others have their turn. A
//! table of so many rows is counted every few seconds, as fast as a person looks; one of 100,000 rows in some twenty.
//!
//! # Changes during a walk
//!
//! What the task inserts gets a number behind the walk's place, and is seen there. What it deletes, or lets die, in front of that place is taken off what
//! the walk has counted ([`Walk::forget`]). What somebody else changes in front of it is found by the next walk.

use std::collections::HashMap;

use tokio::task::yield_now;
use tracing::debug;

use super::straggler_store::{Key, Store, listed};
use crate::Result;
use crate::postgres::sql_error;

/// Rows of a page.
const PAGE_ROWS: i64 = 5000;
/// Rows or keys that are looked at in one go.
const SLICE: usize = 1000;

/// How far a walk is.
#[derive(Default)]
pub(super) struct Walk {
    /// The number of the last row that was read.
    after: i64,
    /// Rows of each key that hold back later ones, up to there.
    keys: HashMap<Key, i64>,
    /// All rows up to there.
    rows: i64,
}

impl Walk {
    /// A row is not in the table any more.
    pub(super) fn forget_row(&mut self, number: i64) {
        self.rows -= i64::from(number <= self.after);
    }

    /// A row holds back later ones no more.
    pub(super) fn forget(&mut self, number: i64, key: &Key) {
        if number <= self.after
            && let Some(count) = self.keys.get_mut(key)
        {
            *count -= 1;
            if *count <= 0 {
                self.keys.remove(key);
            }
        }
    }
}

impl Store {
    /// Counts all of it, and makes heads of what has lost its head (somebody deleted it). Returns how the counts of keys have
    /// changed since they were last known, and how many rows there are.
    pub(crate) async fn reload(&mut self) -> Result<(Vec<(String, String, i64)>, u64)> {
        self.walk = Walk::default();
        loop {
            if let Some(counted) = self.walk_on().await? {
                return Ok(counted);
            }
        }
    }

    /// True in the middle of a walk.
    pub(crate) fn is_walking(&self) -> bool {
        self.walk.after > 0
    }

    /// Counts the next page; at the end of the table what [`Store::reload`] returns.
    pub(crate) async fn walk_on(&mut self) -> Result<Option<(Vec<(String, String, i64)>, u64)>> {
        let sql = "
            select number, topic, key, state <> 'dead' or $3 as holds, state = 'parked' as is_parked
            from walpost.straggler where slot = $1 and number > $2 order by number limit $4";
        let (slot, block, after) = (self.slot.clone(), self.dead_block, self.walk.after);
        let doing = "count stragglers";
        let rows = self
            .rows_of(doing, sql, &[&slot, &after, &block, &PAGE_ROWS])
            .await?;
        let get = |error| sql_error(doing, error);
        let mut headless: Vec<i64> = Vec::new();
        for (place, row) in (1..).zip(&rows) {
            let number: i64 = row.try_get(0).map_err(get)?;
            self.walk.after = number;
            self.walk.rows += 1;
            let (topic, key): (Option<String>, Option<String>) =
                (row.try_get(1).map_err(get)?, row.try_get(2).map_err(get)?);
            let (holds, is_parked): (bool, bool) =
                (row.try_get(3).map_err(get)?, row.try_get(4).map_err(get)?);
            if let (Some(key), true) = (topic.zip(key), holds) {
                let count = self.walk.keys.entry(key).or_default();
                *count += 1;
                if *count == 1 && is_parked {
                    headless.push(number);
                }
            }
            if place % SLICE == 0 {
                yield_now().await;
            }
        }
        self.promote(&headless).await?;
        debug!(rows = rows.len(), "read a page of walpost.straggler");
        if i64::try_from(rows.len()).is_ok_and(|read| read >= PAGE_ROWS) {
            return Ok(None);
        }
        let Walk { keys, rows, .. } = std::mem::take(&mut self.walk);
        self.rows = rows;
        let keys = if self.keep_key_order {
            keys
        } else {
            HashMap::new()
        };
        let changes = differences(&self.keys, &keys).await;
        self.keys = keys;
        Ok(Some((listed(changes), self.rows())))
    }

    /// Makes heads of these rows, which are parked, where nothing stands before them.
    async fn promote(&mut self, numbers: &[i64]) -> Result<()> {
        if numbers.is_empty() {
            return Ok(());
        }
        let sql = "
            update walpost.straggler s set state = 'retrying', next_attempt_at = now()
            where s.number = any($1) and s.state = 'parked' and not exists (
                select from walpost.straggler e
                where e.slot = s.slot and hashtextextended(e.key, 0) = hashtextextended(s.key, 0)
                      and e.key = s.key and e.topic = s.topic and e.number < s.number and (e.state <> 'dead' or $2)
            )";
        let block = self.dead_block;
        let doing = "look for stragglers without a head";
        self.rows_of(doing, sql, &[&numbers, &block]).await?;
        Ok(())
    }

    /// Makes heads of the first ones of these keys, whose heads have died and hold back nothing any more.
    pub(super) async fn promote_next(&mut self, keys: &[Key]) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let sql = "
            update walpost.straggler s set state = 'retrying', next_attempt_at = now()
            from unnest($2::text[], $3::text[]) k(topic, key) cross join lateral (
                select number, state from walpost.straggler e
                where e.slot = $1 and hashtextextended(e.key, 0) = hashtextextended(k.key, 0)
                      and e.key = k.key and e.topic = k.topic and e.state <> 'dead'
                order by number limit 1
            ) head
            where s.number = head.number and head.state = 'parked'";
        let topics: Vec<&str> = keys.iter().map(|(topic, _)| topic.as_str()).collect();
        let names: Vec<&str> = keys.iter().map(|(_, key)| key.as_str()).collect();
        let slot = self.slot.clone();
        let doing = "let go what stands behind dead stragglers";
        self.rows_of(doing, sql, &[&slot, &topics, &names]).await?;
        Ok(())
    }
}

/// By how much the counts of keys differ.
async fn differences(before: &HashMap<Key, i64>, now: &HashMap<Key, i64>) -> HashMap<Key, i64> {
    let mut changes = HashMap::new();
    let counts = before
        .keys()
        .map(|key| (key, now.get(key).copied().unwrap_or(0)));
    let new = now.iter().filter(|(key, _)| !before.contains_key(*key));
    let counts = counts.chain(new.map(|(key, count)| (key, *count)));
    for (place, (key, count)) in (1..).zip(counts) {
        let change = count - before.get(key).copied().unwrap_or(0);
        if change != 0 {
            changes.insert(key.clone(), change);
        }
        if place % SLICE == 0 {
            yield_now().await;
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("t".to_owned(), name.to_owned())
    }

    #[tokio::test]
    async fn differences_are_told_of_keys_that_came_went_or_changed() {
        let before = HashMap::from([(key("a"), 1), (key("b"), 2), (key("c"), 3)]);
        let now = HashMap::from([(key("a"), 1), (key("b"), 5), (key("d"), 4)]);
        let expected = HashMap::from([(key("b"), 3), (key("c"), -3), (key("d"), 4)]);
        assert_eq!(differences(&before, &now).await, expected);
    }

    #[test]
    fn what_goes_in_front_of_a_walks_place_is_taken_off_its_count() {
        let mut walk = Walk {
            after: 10,
            keys: HashMap::from([(key("a"), 2)]),
            rows: 3,
        };
        for number in [10, 11] {
            walk.forget_row(number);
            walk.forget(number, &key("a"));
            walk.forget(number, &key("b"));
        }
        assert_eq!((walk.rows, walk.keys.get(&key("a"))), (2, Some(&1)));
        walk.forget(9, &key("a"));
        assert!(walk.keys.is_empty());
    }
}
