//! System B: does a message's work once, although the broker hands it over at least once.
//!
//! Owns nothing but the consumer's name and its settings. Input: messages of a Pulsar consumer (the pulsar crate's). Output: the
//! work of a [`Handler`], committed together with the message id in `walpost.inbox` (`sql/13_inbox.sql`), and the
//! acknowledgement to the broker, after that commit; of a batch, after its last message's (see [`ends_its_entry`]).
//!
//! ```text
//! Pulsar ─► begin; inbox_claim(consumer, id) ─ new ──► Handler, in the same transaction ─► commit ─► acknowledge
//!                       │                                  │ fails
//!                       └─ handled before ─► acknowledge   └─► rollback; inbox_failed; again, or set aside after n attempts
//! ```
//!
//! # Why once
//!
//! The id and the work are in one transaction: both are there or neither. A process that dies before the commit leaves nothing,
//! and one that dies after it, before the acknowledgement, gets the message again and finds the id. Two processes with the
//! same message: the second waits in the unique index for the first one's end. What the handler does outside of that
//! transaction (a mail, a call) is not covered.
//!
//! # Order, and messages that fail
//!
//! A message is handled, given up, or tried again before the next one is looked at: so messages are handled in the order in
//! which the subscription brings them, and one that fails holds the others up for its attempts. After
//! [`Settings::max_attempts`] it is set aside whole, with the reason, in `walpost.inbox_poison`, and **later ones go on, those
//! of the same key too**: for that key the order has a hole, which only the application can judge. Attempts are
//! counted in the database, so a process that the message kills counts as well, from its next attempt on.
//! What is not the message's fault (the database is away, a deadlock, a serialization failure) is tried again for ever and is
//! no attempt.
//!
//! # Retention
//!
//! Ids older than [`Settings::retention`] are deleted in batches, along the index. It must be longer than the broker
//! may bring a message again: longer than the topic's retention and any seek back.

use std::time::Duration;

use futures::StreamExt as _;
use pulsar::{Consumer, TokioExecutor};
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};
use tracing::{info, warn};

use crate::postgres::{PostgresConfig, connect_sql, sql_error};
use crate::retry::Backoff;
use crate::{Error, Result};

/// What has to be in the consumer's database; may be applied again.
pub const SQL: &str = include_str!("../sql/13_inbox.sql");

/// Ids that one statement deletes: some milliseconds of locks.
const PRUNE_ROWS: i64 = 1000;
/// Between two looks for ids past their retention.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
/// Characters of a failure that are kept.
const REASON_CHARS: usize = 2000;

/// Why a handler could not do its work.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// The work.
pub trait Handler: Send {
    /// Does the message's work in `transaction`, which is committed when this has succeeded and rolled back when not.
    fn handle(
        &mut self,
        transaction: &Transaction<'_>,
        message: &Message,
    ) -> impl Future<Output = Result<(), HandlerError>> + Send;
}

/// A message, as far as a handler needs it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The property `id`, which walpost sets; a message without one has its topic and place, which a resend changes.
    pub id: String,
    /// The topic, or partition.
    pub topic: String,
    /// Its place there: `ledger:entry:index in the batch`.
    pub message_id: String,
    /// The key.
    pub key: Option<String>,
    /// The payload. (A tombstone in a batch is empty here: the pulsar crate does not tell the two apart.)
    pub payload: Vec<u8>,
    /// All properties.
    pub properties: Vec<(String, String)>,
    /// Milliseconds since 1970.
    pub event_time_ms: Option<u64>,
}

impl std::fmt::Debug for Message {
    /// Without what belongs to the application.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("message_id", &self.message_id)
            .finish_non_exhaustive()
    }
}

impl From<&pulsar::consumer::Message<Vec<u8>>> for Message {
    fn from(message: &pulsar::consumer::Message<Vec<u8>>) -> Self {
        let (place, metadata) = (message.message_id(), &message.payload.metadata);
        let index = place.batch_index.unwrap_or(-1);
        let message_id = format!("{}:{}:{index}", place.ledger_id, place.entry_id);
        let properties: Vec<(String, String)> = metadata
            .properties
            .iter()
            .map(|pair| (pair.key.clone(), pair.value.clone()))
            .collect();
        let id = properties.iter().find(|(name, _)| name == "id");
        Self {
            id: id.map_or_else(
                || format!("{} {message_id}", message.topic),
                |(_, id)| id.clone(),
            ),
            topic: message.topic.clone(),
            message_id,
            key: metadata.partition_key.clone(),
            payload: message.payload.data.clone(),
            properties,
            event_time_ms: metadata.event_time,
        }
    }
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
    /// Attempts before a message is set aside; at least 1.
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
    /// A configuration error for an empty name, or no attempt.
    pub fn new(consumer: impl Into<String>, settings: Settings) -> Result<Self> {
        let consumer = consumer.into();
        if consumer.is_empty() {
            return Err(Error::config("the inbox's consumer has no name")
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
    /// # Errors
    /// When the message is not at fault: the database is away, or a conflict with another transaction. Nothing is committed, or
    /// nobody knows (the connection broke in COMMIT): handle it again.
    pub async fn handle(
        &self,
        client: &mut Client,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        let failed = |error| sql_error("handle a message", error);
        let transaction = client.transaction().await.map_err(failed)?;
        let claim = "SELECT walpost.inbox_claim($1, $2)";
        let claimed = transaction
            .query_one(claim, &[&self.consumer, &message.id])
            .await
            .map_err(failed)?;
        if !claimed.get::<_, bool>(0) {
            transaction.rollback().await.map_err(failed)?;
            return Ok(Outcome::Duplicate);
        }
        let error: HandlerError = match handler.handle(&transaction, message).await {
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
        self.failed(client, message, error.as_ref()).await
    }

    /// Books a failed attempt, in a transaction of its own.
    async fn failed(
        &self,
        client: &mut Client,
        message: &Message,
        error: &(dyn std::error::Error + Send + Sync),
    ) -> Result<Outcome> {
        let lost = |error| sql_error("note a message that failed", error);
        let reason = reason(error);
        let transaction = client.transaction().await.map_err(lost)?;
        let note = "SELECT walpost.inbox_failed($1, $2, $3)";
        let row = transaction
            .query_one(note, &[&self.consumer, &message.id, &reason])
            .await
            .map_err(lost)?;
        let attempts: i32 = row.get(0);
        let attempts = u32::try_from(attempts).unwrap_or(u32::MAX);
        let is_last = attempts >= self.settings.max_attempts;
        if is_last {
            let properties: serde_json::Map<String, serde_json::Value> = message
                .properties
                .iter()
                .map(|(name, value)| (name.clone(), value.clone().into()))
                .collect();
            let properties = serde_json::Value::Object(properties).to_string();
            let set_aside =
                "SELECT walpost.inbox_give_up($1, $2, $3, $4, $5, $6, $7, $8::text::jsonb)";
            transaction
                .execute(
                    set_aside,
                    &[
                        &self.consumer,
                        &message.id,
                        &reason,
                        &message.topic,
                        &message.message_id,
                        &message.key,
                        &message.payload,
                        &properties,
                    ],
                )
                .await
                .map_err(lost)?;
        }
        transaction.commit().await.map_err(lost)?;
        if !is_last {
            return Ok(Outcome::Failed(attempts));
        }
        // Without the reason: it is the application's text.
        warn!(
            consumer = self.consumer,
            id = message.id,
            topic = message.topic,
            attempts,
            "a message is set aside, later ones go on (the reason is in walpost.inbox_poison)"
        );
        Ok(Outcome::SetAside)
    }

    /// Deletes ids older than `age`; returns how many.
    ///
    /// By keyset: each batch begins where the last one ended, and no batch walks over what was deleted before it.
    pub async fn prune(&self, client: &Client, age: Duration) -> Result<u64> {
        const SQL: &str = "
            WITH old AS MATERIALIZED (
                SELECT handled_at, id FROM walpost.inbox
                WHERE consumer = $1 AND handled_at < now() - make_interval(secs => $2)
                  AND (handled_at, id) > ($3::text::timestamptz, $4)
                ORDER BY handled_at, id LIMIT $5
            ), gone AS (
                DELETE FROM walpost.inbox i USING old WHERE i.consumer = $1 AND i.id = old.id
            )
            SELECT handled_at::text, id, (SELECT count(*) FROM old) FROM old ORDER BY handled_at DESC, id DESC LIMIT 1";
        let (mut upto, mut id) = ("-infinity".to_owned(), String::new());
        let mut deleted = 0;
        loop {
            let row = client
                .query_opt(
                    SQL,
                    &[&self.consumer, &age.as_secs_f64(), &upto, &id, &PRUNE_ROWS],
                )
                .await
                .map_err(|error| sql_error("delete old ids from walpost.inbox", error))?;
            let Some(row) = row else {
                return Ok(deleted);
            };
            (upto, id) = (row.get(0), row.get(1));
            let count: i64 = row.get(2);
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
        let mut session = None;
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
            let outcome = self.settle(postgres, &mut session, &of_it, handler).await?;
            heard(&of_it, outcome);
            if ends_its_entry(&message) {
                let acknowledged = consumer.ack(&message).await;
                acknowledged.map_err(|error| {
                    Error::temporary("cannot acknowledge to Pulsar").caused_by(error)
                })?;
            }
            if let (Some(age), Some(client)) = (self.settings.retention, &session)
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
        session: &mut Option<Client>,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        let mut pause = Backoff::new(self.settings.retry_initial, self.settings.retry_max);
        loop {
            match self.attempt(postgres, session, message, handler).await {
                Ok(Outcome::Failed(attempts)) => {
                    info!(
                        consumer = self.consumer,
                        id = message.id,
                        attempts,
                        "a message failed"
                    );
                }
                Ok(outcome) => return Ok(outcome),
                Err(error) if error.is_temporary() => {
                    warn!(
                        consumer = self.consumer,
                        id = message.id,
                        "{}",
                        error.report()
                    );
                }
                Err(error) => return Err(error),
            }
            sleep(pause.next_delay()).await;
        }
    }

    async fn attempt(
        &self,
        postgres: &PostgresConfig,
        session: &mut Option<Client>,
        message: &Message,
        handler: &mut impl Handler,
    ) -> Result<Outcome> {
        if session.as_ref().is_none_or(Client::is_closed) {
            let name = format!("walpost inbox {}", self.consumer);
            *session = Some(connect_sql(postgres, &name).await?);
        }
        let client = session
            .as_mut()
            .ok_or_else(|| Error::bug("a session was just opened"))?;
        self.handle(client, message, handler).await
    }
}

/// Whether `message` is the last one of its entry (batch), or alone in it: the one to be acknowledged.
///
/// An acknowledgement by the pulsar crate is one of the whole entry, whichever of its messages it names: to the broker the ones
/// behind it would be done as well, and lost to a consumer that dies now. An entry that was not acknowledged comes again
/// whole, in order, and what was handled of it is a [`Outcome::Duplicate`].
pub fn ends_its_entry(message: &pulsar::consumer::Message<Vec<u8>>) -> bool {
    let index = message.message_id().batch_index.unwrap_or(-1);
    let count = message.payload.metadata.num_messages_in_batch.unwrap_or(1);
    index < 0 || index + 1 >= count
}

/// Whether an error is the database's own: the same work may succeed in a while.
fn is_of_the_database(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<tokio_postgres::Error>() {
            return error.is_closed()
                || error.code().is_some_and(|code| {
                    let of_conflicts = [
                        SqlState::T_R_SERIALIZATION_FAILURE,
                        SqlState::T_R_DEADLOCK_DETECTED,
                        SqlState::LOCK_NOT_AVAILABLE,
                    ];
                    // Classes: connection, resources, operator intervention; but a statement that takes too long is the work's.
                    let of_servers = ["08", "53", "57"];
                    of_conflicts.contains(code)
                        || *code != SqlState::QUERY_CANCELED
                            && of_servers
                                .iter()
                                .any(|class| code.code().starts_with(class))
                });
        }
        cause = error.source();
    }
    false
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
    }
}
