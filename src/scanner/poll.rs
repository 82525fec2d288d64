//! Poll mode (`WALPOST_MODE=poll`): for a Postgres without logical replication (`wal_level` below `logical`, no REPLICATION
//! right, a managed service that offers neither). The gap scan on a timer is all there is.
//!
//! Every `WALPOST_SCAN_INTERVAL`: take a snapshot; the rows visible in it and not in `delivered` are the gap; store it, close
//! it, and it becomes `delivered`. An idle outbox is asked and not written to.
//!
//! # What holds
//!
//! * A committed row reaches its topic: it becomes visible in some snapshot, and a snapshot becomes `delivered` only when
//!   each row visible in it has its receipt. A long transaction's rows come with the first snapshot after its commit, however
//!   low their `seq`.
//! * Rolled-back rows are never visible. Rows deleted before the next look are never seen: an application that deletes its
//!   rows at once (a Debezium habit) needs the stream.
//! * Order: a key's rows in the order of `seq` within one look, and looks in the order of commits. Two transactions of one key
//!   that commit between the same two looks come in the order in which they inserted; where writers of a key wait for each
//!   other (a lock on the business row) that is the order of commits.
//! * A look that was cut short goes on with the snapshot it stored; with deduplication on the broker's side nothing of it
//!   comes twice.
//! * From poll to stream and back: both keep the same `walpost.progress`, so the next one begins where the last one ended. A
//!   slot that is left behind by `WALPOST_MODE=poll` keeps log on the server: drop it.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;

use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::gap::{self, Gap};
use super::progress::{self, Progress};
use super::recovery::{self, Session};
use super::table::ScanTable;
use crate::config::Config;
use crate::connector::{phase_after, publisher_config, routing};
use crate::meter::{Meter, Phase, Side};
use crate::postgres::slot::slot_state;
use crate::postgres::{connect_sql, sql_error};
use crate::retry::Backoff;
use crate::{Error, Result};

/// `application_name` of our sessions.
const APPLICATION_NAME: &str = "walpost poll";

/// Polls until `shutdown` resolves or an error that time cannot heal. Told to stop, a look that is under way may end within
/// the grace period.
pub async fn run(
    config: Config,
    session: Session,
    meter: Arc<Meter>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut shutdown = pin!(shutdown);
    let mut backoff = Backoff::new(config.reconnect_initial, config.reconnect_max);
    loop {
        let mut looked = false;
        let polled = poll(&config, &session, &meter, shutdown.as_mut(), &mut looked).await;
        let Err(error) = polled else {
            return Ok(());
        };
        if !error.is_temporary() {
            return Err(error);
        }
        if looked {
            backoff.reset();
        }
        if looked {
            meter.lost(Side::Postgres);
        }
        meter.set_phase(phase_after(&error));
        let delay = backoff.next_delay();
        warn!(retry_in_ms = delay.as_millis(), "{}", error.report());
        tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(()),
            () = sleep(delay) => {}
        }
    }
}

/// One connection's worth of looks; `Ok` when told to stop.
async fn poll<F: Future<Output = ()>>(
    config: &Config,
    session: &Session,
    meter: &Arc<Meter>,
    mut shutdown: Pin<&mut F>,
    looked: &mut bool,
) -> Result<()> {
    let client = connect_sql(&config.postgres, APPLICATION_NAME).await?;
    let rows = connect_sql(&config.postgres, APPLICATION_NAME).await?;
    let (mut progress, timeline) = prepare(&client, config, session).await?;
    meter.set_phase(Phase::Polling);
    info!(interval_ms = config.scan_interval.as_millis(), "polling");
    loop {
        let next = Instant::now() + config.scan_interval;
        let look = look(config, meter, &client, &rows, &mut progress, timeline);
        tokio::pin!(look);
        tokio::select! {
            biased;
            done = &mut look => done?,
            () = shutdown.as_mut() => {
                meter.set_phase(Phase::Stopping);
                info!("stopping: the look that is under way may end");
                return match tokio::time::timeout(config.shutdown_grace, look).await {
                    Ok(done) => done,
                    Err(_) => Err(Error::temporary("a look was not over when the time to stop was up")
                        .hint("the next start goes on with it; WALPOST_SHUTDOWN_GRACE gives more time")),
                };
            }
        }
        *looked = true;
        tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(()),
            () = sleep_until(next) => {}
        }
    }
}

/// Takes the lock, and checks that there is what polling needs.
async fn prepare(client: &Client, config: &Config, session: &Session) -> Result<(Progress, u32)> {
    recovery::lock(client, &config.slot).await?;
    let system_id = recovery::system_id(client).await?;
    let stored = progress::read(client, &config.slot).await;
    let stored = stored.map_err(|error| {
        if progress::is_missing(&error) {
            Error::refused("poll mode needs table walpost.progress")
                .caused_by(error)
                .hint("WALPOST_MODE=poll walpost init; GRANT SELECT, INSERT, UPDATE ON walpost.progress")
        } else {
            error
        }
    })?;
    let progress = if let Some(progress) = stored {
        recovery::check_cluster(&progress, &system_id, &config.slot)?;
        progress
    } else {
        progress::begin(client, &config.slot, &system_id).await?;
        Progress {
            system_id,
            ..Progress::default()
        }
    };
    progress::claim(client, &config.slot, &session.name).await?;
    for name in &config.outbox_tables {
        if ScanTable::describe(client, name).await?.is_none() {
            return Err(Error::refused(format!(
                "table {name} does not exist, or has no columns txid and seq, by which poll mode finds new rows"
            ))
            .hint(format!(
                "walpost init; or ALTER TABLE {name} ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
                 ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY"
            )));
        }
    }
    if slot_state(client, &config.slot).await?.is_some() {
        warn!(
            slot = config.slot,
            "a replication slot of this name keeps log on the server, and poll mode does not read it (hint: \
             SELECT pg_drop_replication_slot('{}'))",
            config.slot
        );
    }
    let sql = "SELECT timeline_id FROM pg_control_checkpoint()";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("ask for the timeline", error))?;
    let timeline: i32 = row.get(0);
    Ok((progress, timeline.unsigned_abs()))
}

/// Publishes what was committed since the last look.
async fn look(
    config: &Config,
    meter: &Arc<Meter>,
    client: &Client,
    rows: &Client,
    progress: &mut Progress,
    timeline: u32,
) -> Result<()> {
    let routing = routing(config);
    if progress.gap().is_none() {
        let upto = progress::snapshot(client).await?;
        let mut any = false;
        for name in &routing.tables {
            if let Some(table) = ScanTable::describe(client, name).await? {
                any |= table
                    .any(client, &upto, progress.delivered.as_ref())
                    .await?;
            }
        }
        if !any {
            return Ok(());
        }
        progress::look(client, &config.slot, &upto).await?;
        progress.scan_before = None;
        progress.scan_upto = Some(upto);
        progress.position = progress::Position::default();
    }
    let gap = Gap {
        client,
        rows,
        slot: &config.slot,
        routing: &routing,
        publisher: publisher_config(config, meter, &progress.system_id, timeline),
    };
    gap::close(gap, progress).await
}
