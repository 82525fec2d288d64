//! The statements of [`super::after_publish`], and how the row is found for which one fails.
//!
//! Input: rows of one table, by id, number and `txid`. Output: each of them is marked or deleted, gone, or among the table's [`LeftRows`] with
//! the reason.
//!
//! # Which row
//!
//! A statement finds a row by its id, by the index on it, and keeps it only if its `seq` and its `txid` are the published row's, as far as the table has
//! them. (Both: TRUNCATE … RESTART IDENTITY gives ids and numbers again while a straggler of the old rows waits.) A published row
//! whose number is not known (an older straggler's), or is one of another column (`seq` was added or dropped since), is found by its id and `txid` (which do
//! not tell two rows of one transaction apart), or by its id alone where a unique index over the id alone makes it the only one. Elsewhere there is no statement for it: it is not
//! touched and not tried again, which is told once, and [`super::unmarked`] publishes it once more, with its number. In a table that has neither column
//! the id is all there is.
//!
//! # A statement that fails
//!
//! Where the server refuses it because of the rows ([`is_about_rows`]: a foreign key, a trigger, a lock, a missing right), each half is tried
//! by itself, down to one row, which is left. A whole table that refuses everything would take two statements for each row: after
//! [`FAILURES`] of them the rest is left untried. A session waits for a lock for [`LOCK_TIMEOUT`] only: a row that somebody has
//! locked is left like any other.
//!
//! # A statement that does nothing
//!
//! A trigger that returns NULL, a rule, or a trigger that takes the mark back leave the row as it was without an error. So the statement
//! counts what it marked, and where that are fewer than it was given, those that are still there are looked for, and left.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::time::Instant;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use super::left_rows::LeftRows;
use super::outbox::{OutboxTable, SEQ, TXID};
use super::progress::{self, Claim};
use crate::config::AfterPublish;
use crate::outbox::RowNumber;
use crate::postgres::{PostgresConfig, TableName, connect_sql, is_about_rows, sql_error, sqlstate};
use crate::pulsar::Row;
use crate::upkeep::reason;
use crate::{Error, Result};

/// Rows that make a statement worth sending; it takes them all at once.
pub(super) const STATEMENT_ROWS: usize = 1_000;
/// Statements that may fail while one table's rows are marked: enough to find 25 rows among a thousand.
const FAILURES: u32 = 256;
/// A statement that timed out on a lock counts as this many failed statements.
const LOCK_FAILURE: u32 = 20;
/// How long a statement waits for a lock.
const LOCK_TIMEOUT: &str = "200ms";
/// SQLSTATE `lock_not_available`: `lock_timeout` has ended the wait.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// The reason of a row that a statement passed over.
const PASSED_OVER: &str = "the statement changed nothing without an error: a trigger of the table returns NULL or takes the mark back, or a rule replaces the statement";

/// What is done with rows of one table.
#[derive(Debug)]
pub(super) struct TableSql {
    pub(super) name: TableName,
    /// The column of the numbers.
    number: Option<&'static str>,
    by_number: Option<Pair>,
    /// By the id, and the `txid` where both the table and the row have one.
    by_id: Pair,
    /// An id alone says which row it is.
    is_id_enough: bool,
    has_txid: bool,
}

/// The statement that marks or deletes, and the one that finds which rows it passed over.
#[derive(Debug)]
struct Pair {
    change: String,
    passed_over: String,
}

/// A connection with its statements.
pub(super) struct Session {
    pub(super) client: Client,
    /// Under which it works; `None`: nobody claims anything, and the statements name no claim.
    pub(super) claim: Option<Claim>,
    prepared: HashMap<String, Statement>,
}

/// What became of rows.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// Marked or deleted, or gone.
    pub(super) done: usize,
    /// Left now, with the reason of one of them.
    pub(super) left: usize,
    pub(super) reason: Option<Arc<str>>,
    /// There is no statement for them: which rows of the table they are is not known.
    pub(super) unknown: usize,
    /// So many statements failed that rows were left untried.
    pub(super) is_exhausted: bool,
    failures: u32,
}

impl Session {
    pub(super) async fn open(postgres: &PostgresConfig) -> Result<Self> {
        let client = connect_sql(postgres, "walpost after-publish").await?;
        // What a crash of the server takes back is found again: see `unmarked`.
        client
            .batch_execute(&format!(
                "SET synchronous_commit TO off; SET lock_timeout TO '{LOCK_TIMEOUT}'"
            ))
            .await
            .map_err(|error| sql_error("set up the session", error))?;
        Ok(Self {
            client,
            claim: None,
            prepared: HashMap::new(),
        })
    }

    async fn query(
        &mut self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>> {
        let failed = |error| sql_error("mark or delete published rows", error);
        if !self.prepared.contains_key(sql) {
            let statement = self.client.prepare(sql).await.map_err(failed)?;
            self.prepared.insert(sql.to_owned(), statement);
        }
        let statement = self.prepared.get(sql);
        let statement = statement.ok_or_else(|| Error::bug("a statement was just prepared"))?;
        let rows = self.client.query(statement, parameters).await;
        rows.map_err(failed)
    }
}

impl TableSql {
    /// `is_claimed`: the statements change nothing unless the claim holds.
    pub(super) fn new(table: &OutboxTable, mode: AfterPublish, is_claimed: bool) -> Self {
        let pair = |column| Pair::new(table, mode, column, is_claimed);
        let by_number = table.number.map(|column| pair(Some(column)));
        Self {
            name: table.name.clone(),
            number: table.number,
            by_number,
            by_id: pair(None),
            is_id_enough: table.number.is_none() || table.has_unique_id,
            has_txid: table.has_txid,
        }
    }

    fn pair_for(&self, row: &Row<'_>) -> Option<&Pair> {
        let column = match row.number {
            RowNumber::Seq(_) => Some(SEQ),
            RowNumber::Txid(_) => Some(TXID),
            RowNumber::Null => self.number,
            RowNumber::Unknown => None,
        };
        if column.is_some() && column == self.number {
            return self.by_number.as_ref();
        }
        let is_known = self.is_id_enough || (self.has_txid && row.txid.is_some());
        is_known.then_some(&self.by_id)
    }
}

impl Pair {
    /// The ids come as text, and are made what the column is: any type that prints and reads its values serves.
    fn new(
        table: &OutboxTable,
        mode: AfterPublish,
        number: Option<&str>,
        is_claimed: bool,
    ) -> Self {
        let (name, id, id_type) = (&table.name, table.id_column(), &table.id.sql_type);
        let ids = format!("$1::text[]::{id_type}[]");
        // The number as text: whatever number type the column has.
        let is_number = number.map_or_else(String::new, |number| {
            format!(" AND o.{number}::text IS NOT DISTINCT FROM r.number::text")
        });
        // One that an earlier version stored or noted has none.
        let is_txid = if table.has_txid {
            " AND (r.txid IS NULL OR o.txid = r.txid)"
        } else {
            ""
        };
        let is_it = format!("o.{id} {} r.id{is_number}{is_txid}", table.id.operator("="));
        let given = format!("{ids}, $2::int8[], $3::text[]::xid8[]");
        let (change, unmarked) = match mode {
            AfterPublish::Delete => (
                format!("DELETE FROM {name} o USING r WHERE {is_it} RETURNING 1 AS is_done"),
                "true",
            ),
            // `sent_at IS NULL` would offer the planner the index on rows not marked yet: all of them, and the dead entries of those
            // marked since the last vacuum, for each statement (measured: 381 µs a row instead of 42 by the primary key).
            AfterPublish::Mark | AfterPublish::Keep => (
                format!(
                    "UPDATE {name} o SET sent_at = clock_timestamp() FROM r WHERE {is_it} AND num_nulls(o.sent_at) = 1 \
                     RETURNING o.sent_at AS is_done"
                ),
                "num_nulls(o.sent_at) = 1",
            ),
        };
        // A statement of its own would leave time for another process to claim the slot.
        let mine = if is_claimed {
            "SELECT FROM walpost.progress WHERE slot = $4 AND session = $5"
        } else {
            "SELECT"
        };
        Self {
            change: format!(
                "WITH mine AS MATERIALIZED ({mine}), r AS MATERIALIZED (
                     SELECT * FROM unnest({given}) AS u(id, number, txid) WHERE EXISTS (SELECT FROM mine)
                 ), done AS ({change})
                 SELECT count(is_done), EXISTS (SELECT FROM mine) FROM done"
            ),
            passed_over: format!(
                "WITH r AS MATERIALIZED (SELECT * FROM unnest({given}) WITH ORDINALITY AS u(id, number, txid, place))
                 SELECT r.place FROM r JOIN {name} o ON {is_it} WHERE {unmarked}"
            ),
        }
    }
}

/// Marks or deletes rows of one table; those for which that fails are left.
///
/// # Errors
/// What is wrong with the session or the server. Some of the rows may be done.
pub(super) async fn apply(
    session: &mut Session,
    table: &TableSql,
    rows: &[Row<'_>],
    left: &mut LeftRows,
) -> Result<Applied> {
    let mut applied = Applied::default();
    for row in rows.iter().filter(|row| table.pair_for(row).is_none()) {
        applied.unknown += 1;
        left.done(&row.key());
    }
    for pair in table.by_number.iter().chain([&table.by_id]) {
        let of_pair = |row: &&Row<'_>| {
            let its = table.pair_for(row);
            its.is_some_and(|its| std::ptr::eq(its, pair))
        };
        let rows: Vec<Row<'_>> = rows.iter().filter(of_pair).copied().collect();
        for rows in rows.chunks(STATEMENT_ROWS) {
            halve(session, pair, rows, left, &mut applied).await?;
        }
    }
    Ok(applied)
}

/// One statement, or as many as it takes to find the rows for which it fails.
async fn halve(
    session: &mut Session,
    pair: &Pair,
    rows: &[Row<'_>],
    left: &mut LeftRows,
    applied: &mut Applied,
) -> Result<()> {
    let mut parts = vec![rows];
    while let Some(part) = parts.pop() {
        if applied.failures >= FAILURES {
            applied.is_exhausted = true;
            applied.leave(part, None, left);
            continue;
        }
        let error = match change(session, pair, part).await {
            Ok(passed_over) => {
                let mut done = Vec::with_capacity(part.len());
                for (place, row) in (1..).zip(part) {
                    if passed_over.contains(&place) {
                        applied.leave(&[*row], Some(PASSED_OVER.into()), left);
                    } else {
                        done.push(*row);
                    }
                }
                applied.finish(&done, left);
                continue;
            }
            Err(error) if is_about_rows(&error) => error,
            Err(error) => return Err(error),
        };
        applied.failures += match sqlstate(&error) {
            Some(LOCK_NOT_AVAILABLE) => LOCK_FAILURE,
            _ => 1,
        };
        let why = Arc::from(reason(&error.told().0));
        if part.len() > 1 {
            applied.reason = Some(why);
            let (first, second) = part.split_at(part.len() / 2);
            parts.extend([second, first]);
        } else {
            applied.leave(part, Some(why), left);
        }
    }
    Ok(())
}

/// Places (from 1) of the rows that are still there as they were.
async fn change(session: &mut Session, pair: &Pair, rows: &[Row<'_>]) -> Result<HashSet<i64>> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id).collect();
    let number = |row: &Row<'_>| match row.number {
        RowNumber::Seq(number) | RowNumber::Txid(number) => Some(number),
        RowNumber::Null | RowNumber::Unknown => None,
    };
    let numbers: Vec<Option<i64>> = rows.iter().map(number).collect();
    let txids = rows.iter().map(|row| row.txid.map(|txid| txid.to_string()));
    let txids: Vec<Option<String>> = txids.collect();
    let parameters: [&(dyn ToSql + Sync); 3] = [&ids, &numbers, &txids];
    let claim = session.claim.clone();
    let claim = claim.as_ref().map(|claim| (claim.slot(), claim.session()));
    let done = match &claim {
        Some((slot, session_name)) => {
            let named: [&(dyn ToSql + Sync); 2] = [slot, session_name];
            let parameters = [&parameters[..], &named].concat();
            session.query(&pair.change, &parameters).await?
        }
        None => session.query(&pair.change, &parameters).await?,
    };
    let (done, is_mine): (i64, bool) = done
        .first()
        .map_or((0, false), |row| (row.get(0), row.get(1)));
    if !is_mine {
        return Err(progress::not_claimed(
            "another process has claimed the slot: no row is marked or deleted".to_owned(),
        ));
    }
    if usize::try_from(done).is_ok_and(|done| done >= rows.len()) {
        return Ok(HashSet::new());
    }
    // Rows that are gone, or were marked before, are done as well.
    let rows = session.query(&pair.passed_over, &parameters).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

impl Applied {
    fn leave(&mut self, rows: &[Row<'_>], why: Option<Arc<str>>, left: &mut LeftRows) {
        if let Some(why) = why {
            self.reason = Some(why);
        }
        let unknown = || Arc::from("it was not tried: too many others failed");
        let why = self.reason.get_or_insert_with(unknown);
        let now = Instant::now();
        for row in rows {
            left.leave(*row, why, now);
        }
        self.left += rows.len();
    }

    fn finish(&mut self, rows: &[Row<'_>], left: &mut LeftRows) {
        self.done += rows.len();
        if left.is_empty() {
            return;
        }
        for row in rows {
            left.done(&row.key());
        }
    }
}
