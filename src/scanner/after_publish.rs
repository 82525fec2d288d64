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
//! asked which transactions are still running, and rows of those are set aside ([`super::unseen`]) until theirs has ended. They take no room in the
//! queue: the standby may be walpost itself, which confirms a transaction only once it has read the whole of it. A row that is
//! then not found is gone: its producer deleted it, perhaps in the same transaction.
//!
//! # Rows that cannot be marked or deleted
//!
//! A foreign key, a trigger, a lock, a missing right: such rows are left with their reason and tried again after a pause that grows
//! ([`super::left_rows`]). They hold up no other row, table or the stream, and the look for unmarked rows does not publish them again. A
//! table that refuses every row is not tried for a while: its rows are left at once. `tests/isolation/marks.rs` tries to break this.
//!
//! # Only under the claim
//!
//! Each statement names the claim to the slot ([`super::progress::Claim`]) and changes nothing where another process has claimed it since: one that was
//! sent by a process that was stopped and goes on arrives behind that. Rows whose receipt has come then wait until this process has the slot again. With the
//! process they are lost as below.
//!
//! # What is lost with the process
//!
//! Rows in the queue. They stay as they were, and [`super::unmarked`] finds them, which publishes them again. Rows that were left are
//! noted in `walpost.left_undone` ([`super::left_note`]) and taken over by the next process; what is not in that note (a thousand
//! rows, a few seconds old) is published once more by each process that starts.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use super::left_note;
use super::left_rows::LeftRows;
use super::marking::{Applied, STATEMENT_ROWS, Session, TableSql, apply};
use super::outbox::OutboxTable;
use super::progress;
use super::straggler_fence::{Right, suspended};
use super::unseen::{Running, Unseen};
use crate::config::AfterPublish;
use crate::meter::Meter;
use crate::postgres::PostgresConfig;
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
    /// What is known of the tables, in the order of the settings; told again at each opening.
    facts: watch::Receiver<Vec<OutboxTable>>,
    /// The same for whoever marks or deletes.
    tables: Vec<Table>,
    /// Under which claim that is done.
    right: watch::Receiver<Right>,
    /// The statements name a claim.
    is_claimed: bool,
    mode: AfterPublish,
    receiver: RowReceiver,
    backoff: Backoff,
    meter: Arc<Meter>,
    /// What has come and is not done, and how much it counts in the queue.
    waiting: Vec<Rows>,
    /// Rows of transactions that were running when the database was last asked. They count in the queue, and take no room there.
    unseen: Unseen,
    barriers: Vec<oneshot::Sender<()>>,
    /// When the first of it came, or the database was last asked for the transactions of those set aside.
    since: Instant,
}

/// One table.
#[derive(Debug)]
struct Table {
    sql: TableSql,
    left: LeftRows,
    /// It refused every row: until when it is not tried, how often that was in a row, and why.
    refusal: Option<Refusal>,
    /// That it is not known which of its rows to mark was told.
    has_told_unknown: bool,
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
        (mut facts, right): (watch::Receiver<Vec<OutboxTable>>, watch::Receiver<Right>),
        mode: AfterPublish,
        receiver: RowReceiver,
        backoff: Backoff,
        meter: Arc<Meter>,
    ) -> Self {
        let table = |table: &OutboxTable| Table {
            sql: TableSql::new(table, mode, true),
            left: LeftRows::default(),
            refusal: None,
            has_told_unknown: false,
        };
        let tables = facts.borrow_and_update().iter().map(table).collect();
        Self {
            postgres,
            slot,
            tables,
            facts,
            right,
            is_claimed: true,
            mode,
            receiver,
            backoff,
            meter,
            waiting: Vec::new(),
            unseen: Unseen::default(),
            barriers: Vec::new(),
            since: Instant::now(),
        }
    }

    /// Runs until the other end of the queue is gone and all is done.
    pub async fn run(mut self) {
        self.take_over().await;
        let mut session = None;
        let mut open = true;
        while open || self.has_rows() || !self.barriers.is_empty() {
            if open {
                open = self.gather().await;
            } else if self.waiting.is_empty() {
                // Transactions that run: look again in a while.
                sleep_until(self.since + STATEMENT_WAIT).await;
            }
            if !self.has_rows() && self.barriers.is_empty() && !self.is_any_due() {
                // Nothing for a while: nobody needs the connection.
                session = None;
                continue;
            }
            match self.work(&mut session).await {
                Ok(()) => self.backoff.reset(),
                // Another instance has the slot: the rows wait until it is ours again.
                Err(error) if progress::is_changed(&error) => {
                    debug!(
                        "published rows are not marked or deleted now: {}",
                        error.report()
                    );
                    if self.right.changed().await.is_err() {
                        return;
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
            let until = if self.has_rows() {
                due_at.min(self.since + STATEMENT_WAIT)
            } else {
                due_at
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
                if !self.has_rows() {
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

    fn has_rows(&self) -> bool {
        !self.waiting.is_empty() || !self.unseen.is_empty()
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
        if !self.has_rows() && !self.is_any_due() {
            self.answer();
            return Ok(());
        }
        let claim = match self.right.borrow_and_update().clone() {
            Right::Suspended => return Err(suspended()),
            Right::Unclaimed => None,
            Right::Under(claim) => Some(claim),
        };
        if session.is_none() {
            *session = Some(Session::open(&self.postgres).await?);
        }
        let Some(session) = session else {
            return Err(Error::bug("a session was just opened"));
        };
        if self.facts.has_changed().unwrap_or(false) || self.is_claimed != claim.is_some() {
            self.is_claimed = claim.is_some();
            self.renew();
        }
        session.claim = claim;
        let running = Running::ask(&session.client).await?;
        self.sort(&running);
        let mut has_changed = false;
        for (place, table) in (0..).zip(&mut self.tables) {
            let rows = self.waiting.iter().flat_map(Rows::iter);
            let rows: Vec<Row<'_>> = rows.filter(|row| row.table == place).collect();
            has_changed |= table.work(session, &rows).await?;
        }
        self.finish();
        if has_changed {
            self.tell();
        }
        Ok(())
    }

    /// The tables have changed, or may have.
    fn renew(&mut self) {
        let facts = self.facts.borrow_and_update();
        for (table, facts) in self.tables.iter_mut().zip(facts.iter()) {
            table.sql = TableSql::new(facts, self.mode, self.is_claimed);
            table.has_told_unknown = false;
        }
    }

    /// Sets the rows of transactions that run aside, and takes those back whose transactions have ended.
    fn sort(&mut self, running: &Running) {
        self.since = Instant::now();
        let ended = self.unseen.ended(running);
        for rows in std::mem::take(&mut self.waiting) {
            let seen = if rows.iter().any(|row| running.has(row.xid)) {
                self.set_aside(&rows, running)
            } else {
                rows
            };
            self.waiting.push(seen);
        }
        for rows in ended {
            self.receiver.take_back(rows.len(), rows.bytes());
            self.waiting.push(rows);
        }
    }

    /// Sets those aside whose transactions run, as far as there is room for them, and gives the others.
    fn set_aside(&mut self, rows: &Rows, running: &Running) -> Rows {
        let mut seen = Rows::default();
        let (mut kept, mut kept_bytes, mut dropped) = (0, 0, 0);
        for row in rows.iter() {
            if !running.has(row.xid) {
                seen.push(row);
            } else if self.unseen.keep(row) {
                (kept, kept_bytes) = (kept + 1, kept_bytes + row.id.len());
            } else {
                dropped += 1;
            }
        }
        self.receiver.set_aside(kept, kept_bytes);
        let left_bytes = seen.bytes() + kept_bytes;
        self.receiver
            .dropped(rows.len() - seen.len() - kept, rows.bytes() - left_bytes);
        if dropped > 0 && self.unseen.is_first_overflow() {
            warn!(
                kept = self.unseen.len(),
                "a transaction has more published rows than are kept until its commit can be seen: the others are not marked or deleted now; \
                 the look for unmarked rows finds them after WALPOST_STRAGGLER_AGE and publishes them once more"
            );
        }
        seen
    }

    /// Everything is done but the rows set aside.
    fn finish(&mut self) {
        for done in std::mem::take(&mut self.waiting) {
            self.receiver.done(done.len(), done.bytes());
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
        if applied.unknown > 0 && !std::mem::replace(&mut self.has_told_unknown, true) {
            warn!(
                table = %self.sql.name,
                rows = applied.unknown,
                "published rows are not marked or deleted: which rows of the table they are is not known (no unique index over the id alone, and \
                 not their seq or txid); the look for unmarked rows publishes them once more"
            );
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
