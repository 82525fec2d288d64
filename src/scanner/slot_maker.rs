//! Makes a slot with a snapshot before and after it in `walpost.progress`, as `sql/11_slot.sql` does.
//!
//! Input: a SQL connection that holds the slot's lock. Output: the slot, and its row.
//!
//! # The snapshot after
//!
//! `scan_upto` says: rows that are not visible in it are always streamed. A plain snapshot, taken when the slot is there, says so
//! only where the slot waited for every transaction that ran while it was made. Before Postgres 14.13, 15.8 and 16.4 it may not
//! have: a slot that finds another slot's stored snapshot takes it for its own, and then streams only the second part of a
//! transaction that was running. The rows of the first part would be neither streamed nor in the gap.
//!
//! So on every version [`settled`] takes a transaction id when the slot is there, waits until each transaction that is older and still
//! running has ended, and then takes the snapshot that is stored. What is not visible in that one began after the slot was there, so it is
//! streamed whole. What is visible is in the gap. What of that the stream brings as well, in part or whole, is not visible in
//! `scan_before`, so its ids are remembered and skipped. These are the rows committed while the slot was made and while [`settled`] waited;
//! there is a limit to how many are remembered ([`super::gap::overlap`]), beyond which rows come twice.
//!
//! (A snapshot of everything older than that transaction id would leave fewer. But then a transaction that is visible may have
//! committed behind one that is not, and a key's rows would come out of order: the scan's before the stream's. Of a plain
//! snapshot whatever is visible was committed before whatever is not. `tests/gap.rs` has seen it, with 24 writers.)

use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::Client;

use super::cluster;
use super::progress::{self, Progress, Snapshot};
use crate::Result;
use crate::postgres::{TableName, published, slot, sql_error};

/// Between two looks at the transactions that are waited for, at most.
const LOOK: Duration = Duration::from_secs(1);

/// Makes the slot, with a snapshot before and after in `walpost.progress`. The caller holds the slot's lock.
///
/// # Errors
/// Refused when the progress is from another cluster, and for what [`slot::create_slot`] refuses.
pub async fn make_slot(
    client: &Client,
    slot: &str,
    publication: &str,
    tables: &[TableName],
) -> Result<Progress> {
    let system_id = cluster::system_id(client).await?;
    let timeline = cluster::timeline(client).await?;
    let stored = progress::read(client, slot).await?;
    if let Some(progress) = &stored {
        cluster::check_cluster(progress, &system_id, slot)?;
    }
    let catalog = published::version(client, publication, tables).await?;
    let before = progress::snapshot(client).await?;
    let identity = (&*system_id, timeline);
    let stored = stored.as_ref();
    let catalog = catalog.as_deref();
    let making = progress::slot_making(client, slot, stored, identity, &before, catalog).await;
    let mut making = making?;
    let stands = slot::create_slot(client, slot).await?;
    let upto = settled(client).await?;
    progress::slot_made(client, slot, &mut making, &upto, stands).await?;
    Ok(making)
}

/// A snapshot that is taken when every transaction that is running now has ended. The caller names those that take long
/// ([`crate::postgres::waiting`]).
pub async fn settled(client: &Client) -> Result<Snapshot> {
    let now = slot::next_transaction(client).await?;
    let mut pause = Duration::from_millis(5);
    while !slot::still_running(client, now).await?.is_empty() {
        sleep(pause).await;
        pause = (pause * 2).min(LOOK);
    }
    progress::snapshot(client).await
}

/// Whether commits on this server wait for a standby, which walpost itself may be.
pub async fn has_synchronous_standbys(client: &Client) -> Result<bool> {
    let sql = "SELECT current_setting('synchronous_standby_names') <> ''";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("read synchronous_standby_names", error))?;
    Ok(row.get(0))
}
