//! Marks or deletes the rows whose receipt has come (`WALPOST_AFTER_PUBLISH`).
//!
//! A task that owns a SQL connection and the end of the queue in [`crate::pulsar::rows`]. Input: ids, from receipts and from
//! nowhere else: a row that a broken publication never sent must not be marked. Output: one statement for each table and
//! thousand rows, or for what has come in a tenth of a second. It is beside the data's path: a slow database fills the queue, and
//! only a full queue pauses the stream.
//!
//! # Rows that cannot be seen yet
//!
//! A transaction is in the log, and may be published, before it becomes visible to others: for a moment, or with synchronous
//! replication until the standby has answered. An UPDATE would pass its rows by. So before each statement the database is
//! asked which transactions are still running, and rows of those wait for the next one. A row that is then not found is gone:
//! its producer deleted it, perhaps in the same transaction.
//!
//! # What is lost with the process
//!
//! Ids in the queue. Their rows stay as they were, and [`super::unmarked`] finds them.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::{Client, Statement};
use tracing::{debug, warn};

use super::outbox::OutboxTable;
use crate::config::AfterPublish;
use crate::postgres::{PostgresConfig, connect_sql, sql_error};
use crate::pulsar::rows::{Published, Row, RowReceiver, Rows};
use crate::retry::Backoff;
use crate::{Error, Result};

/// Rows that make a statement worth sending; it takes them all at once.
const STATEMENT_ROWS: usize = 1_000;
/// How long the first of them waits for company.
const STATEMENT_WAIT: Duration = Duration::from_millis(100);
/// A connection that nobody uses for this long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// The task's state.
#[derive(Debug)]
pub struct AfterPublishTask {
    postgres: PostgresConfig,
    /// One statement for each table, in the order of the settings.
    sql: Vec<String>,
    receiver: RowReceiver,
    backoff: Backoff,
    /// What has come and is not done, and how much it counts in the queue.
    waiting: Vec<Rows>,
    barriers: Vec<oneshot::Sender<()>>,
    /// When the first of it came.
    since: Instant,
}

/// A connection with its statements.
struct Session {
    client: Client,
    statements: Vec<Statement>,
}

impl AfterPublishTask {
    /// A task for these tables.
    pub fn new(
        postgres: PostgresConfig,
        tables: &[OutboxTable],
        mode: AfterPublish,
        receiver: RowReceiver,
        backoff: Backoff,
    ) -> Self {
        Self {
            postgres,
            sql: tables.iter().map(|table| statement(table, mode)).collect(),
            receiver,
            backoff,
            waiting: Vec::new(),
            barriers: Vec::new(),
            since: Instant::now(),
        }
    }

    /// Runs until the other end of the queue is gone and all is done.
    pub async fn run(mut self) {
        let mut session = None;
        let mut open = true;
        while open || !self.waiting.is_empty() || !self.barriers.is_empty() {
            if open {
                open = self.gather().await;
            }
            if self.waiting.is_empty() && self.barriers.is_empty() {
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

    /// Waits for enough rows, or long enough, or a barrier; false when the other end is gone. Returns without any after a
    /// time of silence.
    async fn gather(&mut self) -> bool {
        let silent_at = Instant::now() + IDLE;
        while self.barriers.is_empty() && self.rows_waiting() < STATEMENT_ROWS {
            let until = if self.waiting.is_empty() {
                silent_at
            } else {
                self.since + STATEMENT_WAIT
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
        }
    }

    fn rows_waiting(&self) -> usize {
        self.waiting.iter().map(Rows::len).sum()
    }

    /// One statement for each table, or several when there is more than one takes.
    async fn work(&mut self, session: &mut Option<Session>) -> Result<()> {
        if self.waiting.is_empty() {
            self.answer();
            return Ok(());
        }
        if session.is_none() {
            *session = Some(Session::open(&self.postgres, &self.sql).await?);
        }
        let Some(Session { client, statements }) = session else {
            return Err(Error::bug("a session was just opened"));
        };
        let running = Running::ask(client).await?;
        for (table, statement) in (0..).zip(&*statements) {
            let rows = self.waiting.iter().flat_map(Rows::iter);
            let ids: Vec<&str> = rows
                .filter(|row| row.table == table && !running.has(row.xid))
                .map(|row| row.id)
                .collect();
            for ids in ids.chunks(STATEMENT_ROWS) {
                let done = client.execute(statement, &[&ids]).await;
                let rows =
                    done.map_err(|error| sql_error("mark or delete published rows", error))?;
                debug!(rows, "marked or deleted");
            }
        }
        self.finish(&running);
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
}

impl Session {
    async fn open(postgres: &PostgresConfig, sql: &[String]) -> Result<Self> {
        let client = connect_sql(postgres, "walpost after-publish").await?;
        // What a crash of the server takes back is found again: see `unmarked`.
        client
            .batch_execute("SET synchronous_commit TO off")
            .await
            .map_err(|error| sql_error("set up the session", error))?;
        let mut statements = Vec::with_capacity(sql.len());
        for sql in sql {
            let prepared = client.prepare(sql).await;
            statements.push(prepared.map_err(|error| sql_error("prepare to mark rows", error))?);
        }
        Ok(Self { client, statements })
    }
}

/// The ids come as text, and are made what the column is: any type that prints and reads its values serves.
fn statement(table: &OutboxTable, mode: AfterPublish) -> String {
    let (name, id) = (&table.name, table.id_column());
    let ids = format!("ANY ($1::text[]::{}[])", table.id.sql_type);
    let equals = table.id.operator("=");
    match mode {
        AfterPublish::Delete => format!("DELETE FROM {name} WHERE {id} {equals} {ids}"),
        // `sent_at IS NULL` would offer the planner the index on rows not marked yet: all of them, and the dead entries of those
        // marked since the last vacuum, for each statement (measured: 381 µs a row instead of 42 by the primary key).
        AfterPublish::Mark | AfterPublish::Keep => format!(
            "UPDATE {name} SET sent_at = clock_timestamp() WHERE {id} {equals} {ids} AND num_nulls(sent_at) = 1"
        ),
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
