//! The database session of a consumer that runs, and what it knows of the message in hand.
//!
//! Owns the connection. Dropped while a handler is at work on an attempt that was counted beforehand (see [`Trial`]), it takes that
//! count back: a consumer that is stopped is not one that died.

use futures::FutureExt as _;
use tokio_postgres::Client;

use super::Name;
use crate::postgres::quote_literal;

/// What is known of the attempts at the message in hand.
#[derive(Debug, Default)]
pub(super) struct Trial {
    /// Whether an attempt that the process may not outlive is counted before it begins; not by [`super::Inbox::handle`], whose
    /// caller may try again after an error of the database without telling.
    pub(super) counts_ahead: bool,
    /// Whether no message of this topic was handled here yet: then this one may have ended the process before.
    pub(super) is_first: bool,
    /// The attempt is counted already; the SQL that takes the count back.
    pub(super) counted: Option<String>,
}

impl Trial {
    /// To be called before the attempt is counted.
    pub(super) fn count(&mut self, consumer: &str, name: &Name<'_>) {
        let this = format!(
            "consumer = {} AND id = {} AND source = {} AND set_aside_at IS NULL",
            quote_literal(consumer),
            quote_literal(&name.id),
            quote_literal(&name.source)
        );
        self.counted = Some(format!(
            "UPDATE walpost.inbox_poison SET attempts = attempts - 1 WHERE {this};
             DELETE FROM walpost.inbox_poison WHERE {this} AND attempts < 1"
        ));
    }
}

/// The connection, once there is one.
#[derive(Default)]
pub(super) struct Session {
    pub(super) client: Option<Client>,
    pub(super) trial: Trial,
}

impl Drop for Session {
    fn drop(&mut self) {
        if let (Some(client), Some(take_back)) = (&self.client, self.trial.counted.take()) {
            // The first poll hands it to the connection's task, behind the transaction's rollback; nobody waits for the answer.
            let _ = client.batch_execute(&take_back).now_or_never();
        }
    }
}
