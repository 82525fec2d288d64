//! The moment that a note is of: a snapshot, the log's position behind it, and the version of the publication and tables before it.
//!
//! Input: a SQL session of its own. Output: [`Moment`], only of the server and timeline that the stream reads.

use tokio_postgres::Client;

use super::cluster::Log;
use super::progress::{self, Snapshot};
use crate::postgres::published::{self, Subscription};
use crate::postgres::slot;
use crate::{Error, Lsn, Result};

/// What a note is of.
pub(super) struct Moment {
    /// [`published::version`] before the snapshot.
    pub(super) catalog: Option<String>,
    /// Set when the version differs from the last one read. Every transaction that may have written under the earlier version has a lower id.
    pub(super) changed_before: Option<u64>,
    /// What is visible now.
    pub(super) snapshot: Snapshot,
    /// Everything visible in the snapshot was committed before it.
    pub(super) position: Lsn,
}

impl Moment {
    /// This one, on the server whose log was streamed up to `confirmed`. `known`: the version of the publication and tables that was read last.
    ///
    /// # Errors
    /// Temporary when it is another server, or away.
    pub(super) async fn take(
        client: &Client,
        subscription: &Subscription,
        known: Option<&String>,
        (log, confirmed): (&Log, Lsn),
    ) -> Result<Self> {
        let (publication, tables) = (&subscription.publication, &subscription.tables);
        // In this order: see the module `delivered`, and `reconcile`.
        let catalog = published::version(client, publication, tables).await?;
        let changed_before = if catalog.as_ref() == known && known.is_some() {
            None
        } else {
            Some(slot::next_transaction(client).await?)
        };
        let snapshot = progress::snapshot(client).await?;
        let position = slot::insert_position(client).await?;
        check_log(client, log, confirmed, position).await?;
        Ok(Self {
            catalog,
            changed_before,
            snapshot,
            position,
        })
    }
}

/// The session may have reached another server than the stream did: a standby that was promoted while the stream is lost, or a database
/// that was put back. Positions of that server's log do not apply to the stream's log. (Asked behind the position: a server that gives one is no standby,
/// and its timeline stays.)
async fn check_log(client: &Client, log: &Log, confirmed: Lsn, position: Lsn) -> Result<()> {
    const CONSEQUENCE: &str = "nothing counts as delivered there before it is streamed";
    log.check(client, CONSEQUENCE).await?;
    if confirmed <= position {
        return Ok(());
    }
    Err(Error::temporary(format!(
        "the server's log ends at {position}, and the stream is confirmed up to {confirmed}: {CONSEQUENCE}"
    )))
}
