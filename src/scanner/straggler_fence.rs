//! The fence around `walpost.straggler`: stragglers are stored and retried only by the process that has claimed the slot's row in
//! `walpost.progress`.
//!
//! Input: the [`Right`] of this process, as its owner tells it. Output: transactions that commit before another process claims the row, or not at all.
//!
//! # Why
//!
//! The task of [`super::straggler_task`] has a session of its own. It may be connected again before its owner is, while
//! another instance has the slot. To store an event then would bring it back behind those that the other instance has published of its key;
//! and both would retry.
//!
//! # How
//!
//! * A transaction that stores locks the row of the [`Claim`] (`FOR SHARE`) before it commits. Another process's claim is an UPDATE of that row. If
//!   the claim waits for the COMMIT, the claiming process finds the straggler when it reads the table. If the claim commits first, the transaction fails and
//!   nothing is stored.
//!   (`FOR KEY SHARE` would not conflict with that UPDATE. The keeper's notes of the same row wait for the COMMIT alone: not for an INSERT that waits for
//!   somebody's lock. The row is also looked at first, so that the order of table locks, `walpost.progress` before `walpost.straggler`, is that of
//!   `walpost init`.)
//! * The same process claims again with each opening, under the same name. So the right is suspended before that, and a transaction that began
//!   before does not commit. A process that finds that it was not the last one to claim drops its pipe, and with it the task and what that has not stored.
//! * Before stragglers are sent the claim is looked at. What was sent just before another process claimed the row may still arrive:
//!   stragglers are at least once. It is a key's oldest; those behind it follow only while the claim holds.
//! * Deleting what has its receipt needs no claim: it is true whoever has the slot.
//!
//! A refusal is temporary. Its owner is told, and the batch waits until the owner sets the right again; the owner claims again or drops the task.
//! Without a `walpost.progress` nobody claims anything, and nothing is asked.

use tokio::sync::watch;
use tokio_postgres::{Client, Transaction};

use super::progress::{self, Claim};
use crate::postgres::sql_error;
use crate::{Error, Result};

/// Ends a transaction whose process says nothing any more (a host without power): another instance waits for it to claim the row.
const IDLE_TIMEOUT: &str = "SET LOCAL idle_in_transaction_session_timeout = '60s'";

/// Whether this process may store and retry stragglers, and mark or delete published rows.
#[derive(Clone, Debug, Default)]
pub enum Right {
    /// There is no `walpost.progress`: nothing is claimed.
    Unclaimed,
    /// While this is the claim.
    Under(Claim),
    /// Suspended until the owner of the slot is known.
    #[default]
    Suspended,
}

impl From<Option<Claim>> for Right {
    fn from(claim: Option<Claim>) -> Self {
        claim.map_or(Self::Unclaimed, Self::Under)
    }
}

/// See the module's documentation.
pub(super) struct Fence {
    right: watch::Receiver<Right>,
    /// The server has refused this right.
    is_refused: bool,
}

impl Fence {
    pub(super) fn new(right: watch::Receiver<Right>) -> Self {
        Self {
            right,
            is_refused: false,
        }
    }

    /// True unless it is known that the server would refuse.
    pub(super) fn is_open(&self) -> bool {
        !self.is_refused && !matches!(*self.right.borrow(), Right::Suspended)
    }

    /// Waits until the right is set again; false when its owner is gone. Cancel safe.
    pub(super) async fn changed(&mut self) -> bool {
        let is_told = self.right.changed().await.is_ok();
        self.is_refused = false;
        is_told
    }

    /// The server has refused. True when nothing else was told meanwhile.
    pub(super) fn refuse(&mut self) -> bool {
        self.is_refused = true;
        !self.right.has_changed().unwrap_or(false)
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// Temporary with [`progress::is_changed`] true when the claim does not hold.
    pub(super) async fn begin<'a>(&mut self, client: &'a mut Client) -> Result<Transaction<'a>> {
        let right = self.right.borrow_and_update().clone();
        let failed = |error| sql_error("begin to store stragglers", error);
        let transaction = client.transaction().await.map_err(failed)?;
        match &right {
            Right::Unclaimed => {}
            Right::Under(claim) => {
                let limited = transaction.batch_execute(IDLE_TIMEOUT).await;
                limited.map_err(failed)?;
                progress::check(&transaction, claim).await?;
            }
            Right::Suspended => return Err(suspended()),
        }
        Ok(transaction)
    }

    /// Commits it, if the claim still holds and the right was not set again since it began.
    ///
    /// # Errors
    /// As [`Fence::begin`].
    pub(super) async fn commit(&self, transaction: Transaction<'_>) -> Result<()> {
        let right = self.right.borrow().clone();
        if let Right::Under(claim) = &right {
            progress::hold(&transaction, claim).await?;
        }
        // Behind that: from here on nobody claims the row.
        if self.right.has_changed().unwrap_or(true) {
            return Err(suspended());
        }
        let committed = transaction.commit().await;
        committed.map_err(|error| sql_error("store stragglers", error))
    }

    /// Looks at the claim.
    ///
    /// # Errors
    /// As [`Fence::begin`].
    pub(super) async fn check(&self, client: &Client) -> Result<()> {
        let right = self.right.borrow().clone();
        match right {
            Right::Unclaimed => Ok(()),
            Right::Under(claim) => progress::check(client, &claim).await,
            Right::Suspended => Err(suspended()),
        }
    }
}

/// The error of whoever needs the right while it is suspended.
pub(super) fn suspended() -> Error {
    progress::not_claimed("it is not known yet whose the slot is".to_owned())
}
