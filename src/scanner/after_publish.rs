//! Marks or deletes the rows whose receipt has come (`WALPOST_AFTER_PUBLISH`).
//!
//! A task that owns a SQL connection and the end of the queue in [`crate::pulsar::rows`]. Input: rows, by id, number and `txid`, from receipts and from
//! nowhere else: a row that a broken publication never sent must not be marked. Output: one statement for each table and
//! thousand rows, or for what has come in a tenth of a second ([`super::marking`]). It is beside the data's path: a slow database fills the
//! queue, and only a full queue pauses the stream; readiness follows it.
//!
//! # Rows that cannot be seen yet
//!
//! A transaction is in the log, and may be published, before it becomes visible to others: for a moment, or with synchronous
//! replication until the standby has answered. An UPDATE would pass its rows by. So before each statement the database is
//! asked which transactions are still running, and rows of those wait for the next one. A row that is then not found is gone:
//! its producer deleted it, perhaps in the same transaction.
//!
//! # Rows that cannot be marked or deleted
//!
//! A foreign key, a trigger, a lock, a missing right: such rows are left with their reason and tried again after a pause that grows
//! ([`super::left_rows`]). They hold up no other row, table or the stream, and the look for unmarked rows does not publish them again. A
//! table that refuses every row is not tried for a while: its rows are left at once. `tests/isolation/marks.rs` tries to break this.
//!
//! # What is lost with the process
//!
//! Rows in the queue. They stay as they were, and [`super::unmarked`] finds them, which publishes them again. Rows that were left are
//! noted in `walpost.left_undone` ([`super::left_note`]) and taken over by the next process; what is not in that note (a thousand
//! rows, a few seconds old) is published once more by each process that starts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{debug, warn};

use super::left_note;
use super::left_rows::LeftRows;
use super::marking::{Applied, STATEMENT_ROWS, Session, TableSql, apply};
use super::outbox::OutboxTable;
use crate::config::AfterPublish;
use crate::meter::Meter;
use crate::postgres::{PostgresConfig, sql_error};
use crate::pulsar::rows::{Published, Row, RowReceiver, Rows};
use crate::retry::Backoff;
use crate::upkeep::{LISTED, Undone, Work, pause};
use crate::{Error, Result};

/// How long the first of them waits for company.
const STATEMENT_WAIT: Duration = Duration::from_millis(100);
/// A connection that nobody uses for this long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// The task's state.
#[derive(Debug)]
pub struct AfterPublishTask {
    postgres: PostgresConfig,
    slot: String,
    /// In the order of the settings.
    tables: Vec<Table>,
    receiver: RowReceiver,
    backoff: Backoff,
    meter: Arc<Meter>,
    /// What has come and is not done, and how much it counts in the queue.
    waiting: Vec<Rows>,
    barriers: Vec<oneshot::Sender<()>>,
    /// When the first of it came.
    since: Instant,
}

/// One table.
#[derive(Debug)]
struct Table {
    sql: TableSql,
    left: LeftRows,
    /// It refused every row: until when it is not tried, how often that was in a row, and why.
    refusal: Option<Refusal>,
}

#[derive(Clone, Debug)]
struct Refusal {
    until: Instant,
    times: u32,
    reason: Arc<str>,
}

impl AfterPublishTask {
    /// A task for these tables.
    pub fn new(
        (postgres, slot): (PostgresConfig, String),
        tables: &[OutboxTable],
        mode: AfterPublish,
        receiver: RowReceiver,
        backoff: Backoff,
        meter: Arc<Meter>,
    ) -> Self {
        let table = |table: &OutboxTable| Table {
            sql: TableSql::new(table, mode),
            left: LeftRows::default(),
            refusal: None,
        };
        Self {
            postgres,
            slot,
            tables: tables.iter().map(table).collect(),
            receiver,
            backoff,
            meter,
            waiting: Vec::new(),
            barriers: Vec::new(),
            since: Instant::now(),
        }
    }

    /// Runs until the other end of the queue is gone and all is done.
    pub async fn run(mut self) {
        self.take_over().await;
        let mut session = None;
        let mut open = true;
        while open || !self.waiting.is_empty() || !self.barriers.is_empty() {
            if open {
                open = self.gather().await;
            }
            if self.waiting.is_empty() && self.barriers.is_empty() && !self.is_any_due() {
                // Nothing for a while: nobody needs the connection.
                session = None;
                continue;
            }
            match self.work(&mut session).await {
                Ok(()) => {
                    self.backoff.reset();
                    if !self.waiting.is_empty() {
                        // Transactions that run: look again in a while.
                        tokio::time::sleep(STATEMENT_WAIT).await;
                    }
                }
                Err(error) => {
                    session = None;
                    let delay = self.backoff.next_delay();
                    warn!(
                        retry_in_ms = delay.as_millis(),
                        rows = self.rows_waiting(),
                        "published rows could not be marked or deleted; they wait: {}",
                        error.report()
                    );
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// Rows that the process before this one has left: they have their receipts.
    async fn take_over(&mut self) {
        let noted = match left_note::read(&self.postgres, &self.slot).await {
            Ok(noted) => noted,
            Err(error) => {
                warn!(
                    "nothing is known of rows that the process before left unmarked: they are published again: {}",
                    error.report()
                );
                return;
            }
        };
        let now = Instant::now();
        for left in noted {
            let mut tables = self.tables.iter_mut();
            if let Some(table) = tables.find(|table| table.sql.name.to_string() == left.table) {
                table.left.take_over(left, now);
            }
        }
        self.tell();
    }

    /// Waits for enough rows, or long enough, or a barrier, or for rows that are to be tried again; false when the other end is gone.
    /// Returns without any after a time of silence.
    async fn gather(&mut self) -> bool {
        let silent_at = Instant::now() + IDLE;
        let due_at = self.next_due().map_or(silent_at, |due| due.min(silent_at));
        while self.barriers.is_empty() && self.rows_waiting() < STATEMENT_ROWS {
            let until = if self.waiting.is_empty() {
                due_at
            } else {
                due_at.min(self.since + STATEMENT_WAIT)
            };
            tokio::select! {
                biased;
                published = self.receiver.recv() => match published {
                    Some(published) => self.take(published),
                    None => return false,
                },
                () = sleep_until(until) => break,
            }
        }
        // What else is there goes along, within reason.
        while self.barriers.is_empty()
            && self.rows_waiting() < 4 * STATEMENT_ROWS
            && let Some(published) = self.receiver.try_recv()
        {
            self.take(published);
        }
        true
    }

    fn take(&mut self, published: Published) {
        match published {
            Published::Rows(rows) => {
                if self.waiting.is_empty() {
                    self.since = Instant::now();
                }
                self.waiting.push(rows);
            }
            Published::Barrier(barrier) => self.barriers.push(barrier),
            Published::Left(table, answer) => {
                let table = usize::try_from(table).ok();
                let table = table.and_then(|place| self.tables.get(place));
                // Who asked may have gone.
                let _gone = answer.send(table.map(|table| table.left.tell()).unwrap_or_default());
            }
        }
    }

    fn rows_waiting(&self) -> usize {
        self.waiting.iter().map(Rows::len).sum()
    }

    /// When rows that were left are to be tried again.
    fn next_due(&self) -> Option<Instant> {
        self.tables.iter().filter_map(Table::next_due).min()
    }

    fn is_any_due(&self) -> bool {
        self.next_due().is_some_and(|due| due <= Instant::now())
    }

    /// What has come and what is due, table by table.
    async fn work(&mut self, session: &mut Option<Session>) -> Result<()> {
        if self.waiting.is_empty() && !self.is_any_due() {
            self.answer();
            return Ok(());
        }
        if session.is_none() {
            *session = Some(Session::open(&self.postgres).await?);
        }
        let Some(session) = session else {
            return Err(Error::bug("a session was just opened"));
        };
        let running = Running::ask(&session.client).await?;
        let mut has_changed = false;
        for (place, table) in (0..).zip(&mut self.tables) {
            let rows = self.waiting.iter().flat_map(Rows::iter);
            let rows: Vec<Row<'_>> = rows
                .filter(|row| row.table == place && !running.has(row.xid))
                .collect();
            has_changed |= table.work(session, &rows).await?;
        }
        self.finish(&running);
        if has_changed {
            self.tell();
        }
        Ok(())
    }

    /// Everything is done but the rows of transactions that run.
    fn finish(&mut self, running: &Running) {
        let mut rest = Rows::default();
        let still = |row: &Row<'_>| running.has(row.xid);
        let (mut rows, mut bytes) = (0, 0);
        for done in std::mem::take(&mut self.waiting) {
            rows += done.len();
            bytes += done.bytes();
            done.iter().filter(still).for_each(|row| rest.push(row));
        }
        self.receiver.done(rows - rest.len(), bytes - rest.bytes());
        if !rest.is_empty() {
            self.waiting.push(rest);
            self.since = Instant::now();
        }
        self.answer();
    }

    fn answer(&mut self) {
        for barrier in self.barriers.drain(..) {
            // Who asked may have gone.
            let _gone = barrier.send(());
        }
    }

    /// Tells what is left.
    fn tell(&self) {
        let count: usize = self.tables.iter().map(|table| table.left.len()).sum();
        let listed = self.tables.iter().flat_map(|table| {
            let name = table.sql.name.to_string();
            table.left.listed(&name, LISTED).collect::<Vec<_>>()
        });
        let undone = Undone {
            count: count as u64,
            listed: listed.take(LISTED).collect(),
        };
        self.meter.upkeep().set(Work::AfterPublish, undone);
    }
}

impl Table {
    fn next_due(&self) -> Option<Instant> {
        let due = self.left.next_due()?;
        let until = self.refusal.as_ref().map(|refusal| refusal.until);
        Some(until.map_or(due, |until| until.max(due)))
    }

    /// Marks or deletes these rows, and those that are due; true when what is left has changed.
    async fn work(&mut self, session: &mut Session, rows: &[Row<'_>]) -> Result<bool> {
        let now = Instant::now();
        if let Some(refusal) = &self.refusal
            && refusal.until > now
        {
            for row in rows {
                self.left.leave(*row, &refusal.reason, now);
            }
            return Ok(!rows.is_empty());
        }
        let due = self.left.due(now, STATEMENT_ROWS);
        if rows.is_empty() && due.is_empty() {
            return Ok(false);
        }
        let had_left = self.left.len();
        let again: Vec<Row<'_>> = due.iter().map(|key| key.row(0)).collect();
        for (rows, are_new) in [(rows, true), (&again, false)] {
            if rows.is_empty() {
                continue;
            }
            let applied = apply(session, &self.sql, rows, &mut self.left).await?;
            debug!(table = %self.sql.name, done = applied.done, left = applied.left, "marked or deleted");
            self.note(&applied, are_new);
        }
        Ok(had_left > 0 || !self.left.is_empty())
    }

    fn note(&mut self, applied: &Applied, are_new: bool) {
        if applied.done > 0 {
            self.refusal = None;
        }
        let Some(reason) = applied.reason.as_ref().filter(|_| applied.left > 0) else {
            return;
        };
        if applied.is_exhausted && applied.done == 0 {
            let times = self.refusal.as_ref().map_or(1, |known| known.times + 1);
            self.refusal = Some(Refusal {
                until: Instant::now() + pause(times),
                times,
                reason: Arc::clone(reason),
            });
        }
        if are_new {
            warn!(
                table = %self.sql.name,
                rows = applied.left,
                "published rows could not be marked or deleted; they are left, and tried again: {reason}"
            );
        }
    }
}

/// Which transactions run, of a `pg_snapshot`: without the epoch, as the log names them.
#[derive(Debug)]
struct Running {
    /// Everything from here on had not ended.
    next: u32,
    running: Vec<u32>,
}

impl Running {
    async fn ask(client: &Client) -> Result<Self> {
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
    fn has(&self, xid: u32) -> bool {
        // Transaction ids are compared in a circle, as Postgres does.
        let not_begun = xid.wrapping_sub(self.next) < 1 << 31;
        xid != 0 && (not_begun || self.running.contains(&xid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
