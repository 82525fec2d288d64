//! System B: does a message's work once, although the broker hands it over at least once.
//!
//! Owns nothing but the consumer's name and its settings. Input: messages of a Pulsar consumer (the pulsar crate's). Output: the
//! work of a [`Handler`], committed together with the message id in `walpost.inbox` (`sql/13_inbox.sql`), and the
//! acknowledgement to the broker, after that commit; of a batch, after its last message's (see [`ends_its_entry`]).
//!
//! ```text
//! Pulsar ─► begin; inbox_claim(consumer, id, source) ─ new ──► Handler, in the same transaction ─► commit ─► acknowledge
//!                       │                                         │ fails
//!                       └─ handled before ─► acknowledge          └─► rollback; inbox_failed; again, or set aside after n attempts
//! ```
//!
//! # Why once
//!
//! The id and the work are in one transaction: both are there or neither. A process that dies before the commit leaves nothing,
//! and one that dies after it, before the acknowledgement, gets the message again and finds the id. Two processes with the
//! same message: the second waits in the unique index for the first one's end. What the handler does outside of that
//! transaction (a mail, a call) is not covered.
//!
//! Two messages are the same when their ids are, and, for ids that are no UUIDs, their topics too ([`Message::source`]): tables and
//! databases that count from 1 each are not confused, as long as they do not share a topic.
//!
//! # Order, and messages that fail
//!
//! A message is handled, given up, or tried again before the next one is looked at: so messages are handled in the order in
//! which the subscription brings them, and one that fails holds the others up for its attempts. After
//! [`Settings::max_attempts`] it is set aside whole, with the reason, in `walpost.inbox_poison`, and **later ones go on, those
//! of the same key too**: for that key the order has a hole, which only the application can judge. Attempts are
//! counted in the database, in a row of that table that goes when the message succeeds. What counts:
//!
//! * The handler returns an error, or panics; or the commit fails, as by a deferred constraint.
//! * The handler returns `Ok` after a statement that failed: Postgres would answer COMMIT by ROLLBACK, and no error.
//! * The process dies in the handler (abort, out of memory, SIGKILL). [`Inbox::run`] counts an attempt before it begins where that
//!   may have happened: at a message that failed before, and at the first new one of each topic (partition). With an Exclusive or
//!   Failover subscription that is where the process before ended, so all but the first death count, and a message that always
//!   kills is set aside after `max_attempts + 1` of them (one more for each process that had handled others of its topic and gets
//!   it). With `Shared` and `Key_Shared` it may come to a process in the middle of its work, and such a death does not count.
//!   (The broker's redelivery count would not tell: it counts for those two only, and the pulsar crate does not hand it on.)
//!
//! A run that is dropped takes such a count back, while its connection still works: a graceful stop does not count as a failed attempt.
//!
//! What is not the message's fault is tried again for ever and is no attempt: the connection breaks; a conflict with another
//! transaction (serialization failure, deadlock, lock timeout); a statement is cancelled, by `statement_timeout` or by an operator;
//! the server stops, is read-only, or has no memory, disk or connections left. That is told by the SQLSTATE of the error that the
//! handler returns, or of one of its sources: a handler that makes a text of it hides whose fault it was. (A message whose work
//! exceeds `statement_timeout` every time holds up its successors, and the log says why.)
//!
//! # What is stored
//!
//! Any message can be, in a database with encoding UTF8: where an id is empty, has a NUL or is too long, something else stands for it
//! ([`Message::inbox_id`]). NUL in a key is written as `\0`; properties are JSON, which has `\u0000`.
//!
//! # Retention
//!
//! Ids older than [`Settings::retention`] are deleted in batches, along the index. It must be longer than the broker
//! may bring a message again: longer than the topic's retention and any seek back.

mod message;
mod session;

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use pulsar::{Consumer, TokioExecutor};
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Transaction};
use tracing::{info, warn};

pub use message::{Message, ends_its_entry};

use crate::postgres::{PostgresConfig, connect_application, sql_error, sqlstate};
use crate::retry::Backoff;
use crate::{Error, Result};
use message::{ID_BYTES, storable};
use session::{Session, Trial};

/// What has to be in the consumer's database; may be applied again.
pub const SQL: &str = include_str!("../sql/13_inbox.sql");

/// Ids that one statement deletes: some milliseconds of locks.
const PRUNE_ROWS: i64 = 1000;
/// Between two looks for ids past their retention.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Characters of a failure that are kept.
const REASON_CHARS: usize = 2000;
/// Why an attempt failed of which nothing else was heard.
const PROCESS_ENDED: &str = "the process ended during the attempt";
/// Why an attempt failed whose handler was content.
const WENT_ON: &str = "the handler went on after a statement that failed, and so all of its work would be rolled back: let the error \
                       through, or set a savepoint before a statement that may fail";

/// Why a handler could not do its work.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// The work.
pub trait Handler: Send {
    /// Does the message's work in `transaction`, which is committed when this has succeeded and rolled back when not.
    ///
    /// A panic is a failure too, and the handler is called again after it.
    fn handle(
        &mut self,
        transaction: &Transaction<'_>,
        message: &Message,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its work is committed now.
    Handled,
    /// It was handled, or set aside, before.
    Duplicate,
    /// Its work failed, for the time of this number.
    Failed(u32),
    /// Its work failed for the last time: it is in `walpost.inbox_poison`.
    SetAside,
}

/// How messages that fail, and old ids, are dealt with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Attempts before a message is set aside; at least 1. With 1, a SIGKILL in the first message after a start is enough for it.
    pub max_attempts: u32,
    /// The pause after the first failed attempt, doubled after each.
    pub retry_initial: Duration,
    /// The longest pause.
    pub retry_max: Duration,
    /// How long ids are kept; `None`: for ever.
    pub retention: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            retry_initial: Duration::from_millis(100),
            retry_max: Duration::from_secs(30),
            retention: None,
        }
    }
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Inbox {
    consumer: String,
    settings: Settings,
}

impl Inbox {
    /// The inbox of `consumer`: every application, and every part of one with work of its own, has its own name.
    ///
    /// # Errors
    /// A configuration error for a name that is empty or cannot be stored, or no attempt.
    pub fn new(consumer: impl Into<String>, settings: Settings) -> Result<Self> {
        let consumer = consumer.into();
        if consumer.is_empty() {
            return Err(Error::config("the inbox's consumer has no name")
                .hint("name the application that consumes, such as \"stock\""));
        }
        if consumer.len() > ID_BYTES || consumer.contains('\0') {
            return Err(Error::config(
                "the name of the inbox's consumer is longer than 1,000 bytes, or has a NUL",
            )
            .hint("name the application that consumes, such as \"stock\""));
        }
        if settings.max_attempts == 0 {
            return Err(
                Error::config("max_attempts is 0: no message would be tried")
                    .hint("allow at least 1"),
            );
        }
        Ok(Self { consumer, settings })
    }

    /// Makes what is missing in the consumer's database, as `walpost sql --inbox` prints it.
    pub async fn create(client: &Client) -> Result<()> {
        let made = client.batch_execute(SQL).await;
        made.map_err(|error| sql_error("make walpost.inbox", error))
    }

    /// Handles one message, once.
    ///
    /// Acknowledge it to the broker for every [`Outcome`] but [`Outcome::Failed`], only when this has returned, and only if it
    /// [`ends_its_entry`].
    ///
    /// A process that dies in `handler` is not counted here, only by [`Inbox::run`].
    ///
    /// # Errors
    /// When the message is not at fault: the database is away, or a conflict with another transaction. Nothing is committed, or
    /// nobody knows (the connection broke in COMMIT): handle it again.
    pub async fn handle(
        &self,
        client: &mut Client,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        self.attempt(client, &mut Trial::default(), message, handler)
            .await
    }

    async fn attempt(
        &self,
        client: &mut Client,
        trial: &mut Trial,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        let failed = |error| sql_error("handle a message", error);
        let name = Name::of(message);
        let mut transaction = client.transaction().await.map_err(failed)?;
        let mut claim = self.claim(&transaction, &name).await?;
        if claim.is_new && trial.counted.is_none() {
            let is_last_one_over = claim.attempts >= Some(self.settings.max_attempts);
            let is_suspect = trial.counts_ahead && (trial.is_first || claim.attempts.is_some());
            if is_last_one_over || is_suspect {
                transaction.rollback().await.map_err(failed)?;
                if is_last_one_over {
                    // It was counted before it began, and nobody was left to set the message aside.
                    let reason = claim.reason.unwrap_or_default().into();
                    return self.failed(client, message, reason, true).await;
                }
                self.count(client, trial, &name).await?;
                transaction = client.transaction().await.map_err(failed)?;
                claim = self.claim(&transaction, &name).await?;
            }
        }
        if !claim.is_new {
            // With the row of attempts that another process, which handled the message, has left behind.
            let ended = if claim.is_left {
                transaction.commit().await
            } else {
                transaction.rollback().await
            };
            ended.map_err(failed)?;
            return Ok(Outcome::Duplicate);
        }
        let error: HandlerError = match work(&transaction, message, handler).await {
            // A deferred constraint is the work's error as well, and comes now.
            Ok(()) => match transaction.commit().await {
                Ok(()) => return Ok(Outcome::Handled),
                Err(error) => error.into(),
            },
            Err(error) => {
                // Dropped instead: a session that is gone rolls back by itself.
                drop(transaction);
                error
            }
        };
        if client.is_closed() || is_of_the_database(error.as_ref()) {
            return Err(
                Error::temporary("the transaction of a message did not come to an end")
                    .caused_by(error),
            );
        }
        let is_counted = trial.counted.take().is_some();
        self.failed(client, message, error, is_counted).await
    }

    /// Claims a message, and deletes its row of attempts for the case that the transaction commits.
    async fn claim(&self, transaction: &Transaction<'_>, name: &Name<'_>) -> Result<Claim> {
        // The row first and then the claim, as `failed` does it: two processes with one message do not block each other.
        const SQL: &str = "
            WITH tried AS (
                DELETE FROM walpost.inbox_poison
                -- With what an earlier version, which knew no source, had counted of it.
                WHERE consumer = $1 AND id = $2 AND (source = $3 OR source = '' AND set_aside_at IS NULL)
                RETURNING attempts, reason, set_aside_at, source
            )
            SELECT walpost.inbox_claim($1, $2, $3), t.attempts, t.reason, t.is_left
            FROM (SELECT pg_catalog.max(attempts) FILTER (WHERE source = $3) AS attempts,
                         pg_catalog.max(reason) FILTER (WHERE source = $3) AS reason,
                         pg_catalog.count(*) > 0 AS is_left
                  FROM tried WHERE set_aside_at IS NULL AND NOT EXISTS (SELECT FROM tried WHERE set_aside_at IS NOT NULL)) t";
        let row = transaction
            .query_typed_one(
                SQL,
                &[
                    (&self.consumer, Type::TEXT),
                    (&name.id, Type::TEXT),
                    (&name.source, Type::TEXT),
                ],
            )
            .await
            .map_err(|error| failed_to("claim a message", error))?;
        let attempts: Option<i32> = row.get(1);
        Ok(Claim {
            is_new: row.get(0),
            attempts: attempts.map(|count| u32::try_from(count).unwrap_or(0)),
            reason: row.get(2),
            is_left: row.get(3),
        })
    }

    /// Counts an attempt before it begins.
    async fn count(&self, client: &Client, trial: &mut Trial, name: &Name<'_>) -> Result<()> {
        const SQL: &str = "SELECT walpost.inbox_failed($1, $2, $3, source => $4)";
        trial.count(&self.consumer, name);
        let arguments: &[(&(dyn ToSql + Sync), Type)] = &[
            (&self.consumer, Type::TEXT),
            (&name.id, Type::TEXT),
            (&PROCESS_ENDED, Type::TEXT),
            (&name.source, Type::TEXT),
        ];
        let counted = client.query_typed(SQL, arguments).await;
        counted.map_err(|error| failed_to("count an attempt", error))?;
        Ok(())
    }

    /// Books a failed attempt, in a transaction of its own.
    async fn failed(
        &self,
        client: &mut Client,
        message: &Message,
        error: HandlerError,
        is_counted: bool,
    ) -> Result<Outcome> {
        let lost = |error| failed_to("note a message that failed", error);
        let (Name { id, source }, reason) = (Name::of(message), reason(error.as_ref()));
        let transaction = client.transaction().await.map_err(lost)?;
        let note = "SELECT walpost.inbox_failed($1, $2, $3, $4, $5)";
        let row = transaction
            .query_one(note, &[&self.consumer, &id, &reason, &is_counted, &source])
            .await
            .map_err(lost)?;
        let attempts: i32 = row.get(0);
        let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
        if attempts < self.settings.max_attempts {
            transaction.commit().await.map_err(lost)?;
            return Ok(Outcome::Failed(attempts));
        }
        let set_aside =
            "SELECT walpost.inbox_give_up($1, $2, $3, $4, $5, $6, $7, $8::text::json, $9)";
        let row = transaction
            .query_one(
                set_aside,
                &[
                    &self.consumer,
                    &id,
                    &reason,
                    &storable(&message.topic),
                    &storable(&message.message_id),
                    &message.key.as_deref().map(storable),
                    &message.payload,
                    &message.properties_json(),
                    &source,
                ],
            )
            .await
            .map_err(lost)?;
        transaction.commit().await.map_err(lost)?;
        if !row.get::<_, bool>(0) {
            // Another process has handled it, or set it aside, meanwhile: the next attempt finds the id.
            return Ok(Outcome::Failed(attempts));
        }
        // Without the reason: it is the application's text.
        warn!(
            consumer = self.consumer,
            id = &*id,
            topic = message.topic,
            attempts,
            "a message is set aside, later ones go on (the reason is in walpost.inbox_poison)"
        );
        Ok(Outcome::SetAside)
    }

    /// Deletes ids older than `age`; returns how many.
    ///
    /// By keyset: each batch begins where the last one ended, and no batch walks over what was deleted before it. (Times go back and
    /// forth without a zone: the session is the application's, and its `DateStyle` may print an ambiguous abbreviation.)
    pub async fn prune(&self, client: &Client, age: Duration) -> Result<u64> {
        const SQL: &str = "
            WITH old AS MATERIALIZED (
                SELECT handled_at, id, source FROM walpost.inbox
                WHERE consumer = $1 AND handled_at < pg_catalog.now() - pg_catalog.make_interval(secs => $2)
                  AND (handled_at, id) >= ($3::text::timestamp AT TIME ZONE 'UTC', $4)
                  AND (handled_at, id, source) > ($3::text::timestamp AT TIME ZONE 'UTC', $4, $6)
                ORDER BY handled_at, id, source LIMIT $5
            ), gone AS (
                DELETE FROM walpost.inbox i USING old WHERE i.consumer = $1 AND i.id = old.id AND i.source = old.source
            )
            SELECT (handled_at AT TIME ZONE 'UTC')::text, id, source, (SELECT pg_catalog.count(*) FROM old) FROM old
            ORDER BY handled_at DESC, id DESC, source DESC LIMIT 1";
        let (mut upto, mut id, mut source) = ("-infinity".to_owned(), String::new(), String::new());
        let mut deleted = 0;
        loop {
            let row = client
                .query_opt(
                    SQL,
                    &[
                        &self.consumer,
                        &age.as_secs_f64(),
                        &upto,
                        &id,
                        &PRUNE_ROWS,
                        &source,
                    ],
                )
                .await
                .map_err(|error| failed_to("delete old ids from walpost.inbox", error))?;
            let Some(row) = row else {
                return Ok(deleted);
            };
            (upto, id, source) = (row.get(0), row.get(1), row.get(2));
            let count: i64 = row.get(3);
            deleted += count.unsigned_abs();
            if count < PRUNE_ROWS {
                return Ok(deleted);
            }
        }
    }

    /// Consumes until the future is dropped: handles each message, however long that takes, and acknowledges each entry when its last message is done.
    ///
    /// Cancel safe: what was under way is rolled back, or finds its id when it comes again. (Close the consumer then: the pulsar
    /// crate does not tell the broker when one is dropped, and what was not acknowledged stays with it.) `heard` is told what became of each
    /// message before it is acknowledged.
    ///
    /// # Errors
    /// Temporary when the broker's subscription ends: subscribe again. Refused when the database refuses for good.
    pub async fn run(
        &self,
        postgres: &PostgresConfig,
        consumer: &mut Consumer<Vec<u8>, TokioExecutor>,
        handler: &mut impl Handler,
        mut heard: impl FnMut(&Message, Outcome) + Send,
    ) -> Result<()> {
        let mut session = Session::default();
        // Topics of which a message was handled here; as many as are subscribed.
        let mut known: HashSet<String> = HashSet::new();
        let mut pruned: Option<Instant> = None;
        loop {
            let message = match consumer.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    return Err(Error::temporary("cannot consume from Pulsar").caused_by(error));
                }
                None => return Err(Error::temporary("the subscription to Pulsar has ended")),
            };
            let of_it = Message::from(&message);
            session.trial = Trial {
                counts_ahead: true,
                is_first: !known.contains(&of_it.topic),
                counted: None,
            };
            let outcome = self.settle(postgres, &mut session, &of_it, handler).await?;
            session.trial = Trial::default();
            if outcome != Outcome::Duplicate && !known.contains(&of_it.topic) {
                known.insert(of_it.topic.clone());
            }
            heard(&of_it, outcome);
            if ends_its_entry(&message) {
                let acknowledged = consumer.ack(&message).await;
                acknowledged.map_err(|error| {
                    Error::temporary("cannot acknowledge to Pulsar").caused_by(error)
                })?;
            }
            if let (Some(age), Some(client)) = (self.settings.retention, &session.client)
                && pruned.is_none_or(|at| at.elapsed() > PRUNE_INTERVAL)
            {
                match self.prune(client, age).await {
                    Ok(0) => {}
                    Ok(deleted) => info!(consumer = self.consumer, deleted, "deleted old ids"),
                    // The next message will tell whether the database is there.
                    Err(error) => warn!("{}", error.report()),
                }
                pruned = Some(Instant::now());
            }
        }
    }

    /// Tries until the message is handled or set aside.
    async fn settle(
        &self,
        postgres: &PostgresConfig,
        session: &mut Session,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        let mut pause = Backoff::new(self.settings.retry_initial, self.settings.retry_max);
        loop {
            match self.try_once(postgres, session, message, handler).await {
                Ok(Outcome::Failed(attempts)) => {
                    info!(
                        consumer = self.consumer,
                        id = &*message.inbox_id(),
                        attempts,
                        "a message failed"
                    );
                }
                Ok(outcome) => return Ok(outcome),
                Err(error) if error.is_temporary() => {
                    warn!(
                        consumer = self.consumer,
                        id = &*message.inbox_id(),
                        "{}",
                        error.report()
                    );
                }
                Err(error) => return Err(error),
            }
            sleep(pause.next_delay()).await;
        }
    }

    /// One attempt, in a session that is opened where there is none.
    async fn try_once(
        &self,
        postgres: &PostgresConfig,
        session: &mut Session,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        if session.client.as_ref().is_none_or(Client::is_closed) {
            let name = format!("walpost inbox {}", self.consumer);
            session.client = Some(connect_application(postgres, &name).await?);
        }
        let client = session
            .client
            .as_mut()
            .ok_or_else(|| Error::bug("a session was just opened"))?;
        self.attempt(client, &mut session.trial, message, handler)
            .await
    }
}

/// A message's name in the tables.
struct Name<'a> {
    id: Cow<'a, str>,
    source: Cow<'a, str>,
}

impl<'a> Name<'a> {
    fn of(message: &'a Message) -> Self {
        Self {
            id: message.inbox_id(),
            source: message.source(),
        }
    }
}

/// What the database says of a message.
struct Claim {
    /// Its work is to be done.
    is_new: bool,
    /// What is counted of it, if it was tried before and is not set aside.
    attempts: Option<u32>,
    /// Why the last of these failed.
    reason: Option<String>,
    /// There was a row of attempts, and none of a message that is set aside.
    is_left: bool,
}

/// Calls the handler, and makes sure that its transaction can be committed.
async fn work(
    transaction: &Transaction<'_>,
    message: &Message,
    handler: &mut impl Handler,
) -> std::result::Result<(), HandlerError> {
    let work = AssertUnwindSafe(async { handler.handle(transaction, message).await });
    work.catch_unwind()
        .await
        .unwrap_or_else(|panic| Err(said_in(panic.as_ref())))?;
    // An aborted transaction refuses every statement but its end, and COMMIT then rolls back and is no error.
    match transaction.batch_execute("SELECT 1").await {
        Err(error) if error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {
            Err(WENT_ON.into())
        }
        answer => Ok(answer?),
    }
}

fn said_in(panic: &(dyn Any + Send)) -> HandlerError {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the handler panicked: {}", said.unwrap_or("without a text")).into()
}

/// Whether an error is the database's own: the same work may succeed in a while. See the module's documentation.
fn is_of_the_database(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<tokio_postgres::Error>() {
            return error.is_closed()
                || error
                    .code()
                    .is_some_and(|code| passes_with_time(code.code()));
        }
        if let Some(error) = error.downcast_ref::<Error>()
            && let Some(code) = sqlstate(error)
        {
            return passes_with_time(code);
        }
        cause = error.source();
    }
    false
}

/// SQLSTATEs that say nothing of the work. (Appendix A of the Postgres documentation.)
fn passes_with_time(code: &str) -> bool {
    // Classes: connection, resources, operator intervention (a cancelled statement is one), system error.
    let of_servers = ["08", "53", "57", "58"];
    // Conflicts with others, and a server that became a standby or was made read-only.
    let of_others = ["40001", "40003", "40P01", "55P03", "25006"];
    of_others.contains(&code) || of_servers.iter().any(|class| code.starts_with(class))
}

/// An error of a statement on the inbox' tables.
fn failed_to(doing: &str, error: tokio_postgres::Error) -> Error {
    // A column or a function that an earlier version has not.
    let is_older = [SqlState::UNDEFINED_COLUMN, SqlState::UNDEFINED_FUNCTION]
        .iter()
        .any(|code| error.code() == Some(code));
    let error = sql_error(doing, error);
    if is_older {
        return error.hint(
            "schema walpost of the consumer's database is of an earlier version: walpost sql --inbox | psql <that database>, as the owner of its tables",
        );
    }
    error
}

/// The error and its causes, without what Postgres' text cannot hold.
fn reason(error: &(dyn std::error::Error + Send + Sync)) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    said.chars()
        .filter(|c| *c != '\0')
        .take(REASON_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_could_handle_nothing_are_refused() {
        assert_eq!(
            Inbox::new("", Settings::default()).unwrap_err().exit_code(),
            64
        );
        let none = Settings {
            max_attempts: 0,
            ..Settings::default()
        };
        assert!(
            Inbox::new("stock", none)
                .unwrap_err()
                .report()
                .contains("at least 1")
        );
    }

    #[test]
    fn a_reason_has_all_causes_and_no_nul() {
        let error = Error::refused("out\0 of stock").caused_by(std::io::Error::other("why"));
        let said = reason(&error);
        assert!(said.starts_with("out of stock"), "{said}");
        assert!(said.contains("why") && !said.contains('\0'), "{said}");
    }

    #[test]
    fn only_errors_of_the_database_are_no_attempt() {
        assert!(!is_of_the_database(&std::io::Error::other("x")));
        assert!(!is_of_the_database(&Error::refused("x")));
        for code in [
            "08006", "25006", "40001", "40P01", "53100", "53200", "55P03", "57014", "57P01",
        ] {
            assert!(passes_with_time(code), "{code}");
        }
        for code in [
            "22012", "23505", "25P02", "40002", "42P01", "P0001", "XX000",
        ] {
            assert!(!passes_with_time(code), "{code}");
        }
    }
}
