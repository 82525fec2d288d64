//! The delivered snapshot: every few seconds in which events passed, which transactions are delivered.
//!
//! A task beside one stream, with a SQL connection of its own; it ends with the stream, because what it waits for is that
//! stream's confirmed LSN (see the argument in [`super`]; a slot made anew stands beyond positions whose events it never
//! brought). Input: the connector's progress. Output: `walpost.progress.delivered`, one write in place of one for each event.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{debug, warn};

use super::progress::{self, Claim};
use crate::feedback::Progress;
use crate::postgres::{PostgresConfig, connect_sql, sql_error};
use crate::{Error, Lsn, Result};

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Keeper {
    /// Starts beside a stream of the claim's slot. `stored` is its row as the stream began with it.
    pub fn start(
        postgres: PostgresConfig,
        claim: Claim,
        stored: progress::Progress,
        interval: Duration,
        stream: watch::Receiver<Progress>,
    ) -> Self {
        Self(tokio::spawn(keep(
            postgres, claim, stored, interval, stream,
        )))
    }
}

async fn keep(
    postgres: PostgresConfig,
    claim: Claim,
    stored: progress::Progress,
    interval: Duration,
    mut stream: watch::Receiver<Progress>,
) {
    // Of this process's earlier streams: those events may have been acknowledged since the last snapshot.
    let mut seen = None;
    let mut client = None;
    let mut stored = Some(stored);
    loop {
        let next = Instant::now() + interval;
        let counters = stream.borrow().counters;
        let done = counters.acknowledged + counters.stragglers;
        if seen != Some(done) && done > 0 {
            match note(&postgres, &mut client, (&claim, &mut stored), &mut stream).await {
                Ok(()) => seen = Some(done),
                Err(error) => {
                    warn!("what is delivered could not be noted: {}", error.report());
                    client = None;
                    // It may have been stored all the same.
                    stored = None;
                }
            }
        }
        sleep_until(next).await;
    }
}

async fn note(
    postgres: &PostgresConfig,
    client: &mut Option<Client>,
    (claim, stored): (&Claim, &mut Option<progress::Progress>),
    stream: &mut watch::Receiver<Progress>,
) -> Result<()> {
    let client = match client {
        Some(client) => client,
        None => client.insert(connect_sql(postgres, "walpost scanner").await?),
    };
    let stored = match stored {
        Some(stored) => stored,
        None => stored.insert(progress::reread(client, claim).await?),
    };
    // In this order: see the module.
    let snapshot: String = ask(client, "SELECT pg_current_snapshot()::text").await?;
    let position: String = ask(client, "SELECT pg_current_wal_insert_lsn()::text").await?;
    let position: Lsn = position
        .parse()
        .map_err(|_| Error::bug("a log position is not of the form X/X"))?;
    let reached = stream.wait_for(|progress| progress.confirmed >= position);
    reached
        .await
        .map_err(|_| Error::temporary("the connector has ended"))?;
    progress::delivered(client, claim, stored, &snapshot, None).await?;
    debug!(snapshot, %position, "delivered");
    Ok(())
}

async fn ask(client: &Client, sql: &str) -> Result<String> {
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("take a snapshot", error))?;
    row.try_get(0)
        .map_err(|error| Error::bug("a snapshot without a value").caused_by(error))
}
