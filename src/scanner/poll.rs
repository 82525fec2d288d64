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
//! * A table that cannot be read (a missing right, a dropped column) holds up no other one: see [`super::gap`]. It is tried again with each look, its rows
//!   do not count as delivered, and meanwhile those of the others are shown as pending, and are left by the retention, as well: there is one
//!   `delivered` for all. Where no table can be read, the look fails.
//! * What cannot be published becomes a straggler, as in the stream; it is retried, and parks its key, from one look to the next.
//!   Without a `walpost.straggler` a row that can never be published ends the process, and a refused topic holds up the look.
//! * `WALPOST_AFTER_PUBLISH`: receipts tell their rows, so a row is marked or deleted behind its receipt here too. A mark that
//!   was lost with the process is told from a row that is yet to come by a look that began after it was seen ([`super::unmarked`]).
//! * `WALPOST_RETENTION`: a row goes when it is visible in `delivered` and is no straggler. A look's snapshot becomes that only
//!   when each of its rows has its receipt or is stored.
//! * From poll to stream and back: both keep the same `walpost.progress` and `walpost.straggler`, so the next one begins where
//!   the last one ended. A slot that is left behind by `WALPOST_MODE=poll` keeps log on the server: drop it.

use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::cluster::{self, Log};
use super::coverage::Leaves;
use super::gap::{self, Gap};
use super::modes::{self, Modes};
use super::name_mark::{NameMark, Place};
use super::overlap::Overlap;
use super::progress::{self, Claim, Progress};
use super::reconcile;
use super::recovery::{self, Session};
use super::straggler::Stragglers;
use super::straggler_fence::Right;
use super::table::ScanTable;
use super::unmarked::{Looks, Way};
use crate::config::Config;
use crate::connector::{GOODBYE, diversion, phase_after, publisher_config, routing};
use crate::lease::{self, Hold, Lease};
use crate::meter::{Meter, Phase, Side};
use crate::postgres::slot::slot_state;
use crate::postgres::{
    TableName, answered, connect_sql, is_about_rows, quote_literal, refuse_row_security,
};
use crate::pulsar::PublisherConfig;
use crate::retry::Backoff;
use crate::{Error, Result};

/// `application_name` of our sessions.
const APPLICATION_NAME: &str = "walpost poll";

/// Polls until `shutdown` resolves or an error that time cannot heal. Told to stop, a look that is under way may end within
/// the grace period, and what it published is marked.
pub async fn run(
    config: Config,
    session: Session,
    meter: Arc<Meter>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut shutdown = pin!(shutdown);
    let mut modes = Modes::default();
    let mut mark = NameMark::default();
    let lease = Lease::new();
    let polling = keep_polling(
        &config,
        &session,
        (&meter, &lease),
        (&mut modes, &mut mark),
        shutdown.as_mut(),
    );
    let ended = Box::pin(polling).await;
    let now = Instant::now();
    let by = ended.as_ref().map_or(now + GOODBYE, |stopped| stopped.by);
    modes
        .drain(by.saturating_duration_since(now).max(GOODBYE))
        .await;
    let ended = ended.and_then(|stopped| stopped.result);
    mark.end(ended, shutdown).await
}

/// Connects, polls, and connects again.
async fn keep_polling(
    config: &Config,
    session: &Session,
    (meter, lease): (&Arc<Meter>, &Lease),
    (modes, mark): (&mut Modes, &mut NameMark),
    mut shutdown: Pin<&mut impl Future<Output = ()>>,
) -> Result<Stopped> {
    let mut backoff = Backoff::new(config.reconnect_initial, config.reconnect_max);
    let stopped = || Stopped {
        by: Instant::now() + config.shutdown_grace,
        result: Ok(()),
    };
    loop {
        modes.set_right(Right::Suspended);
        let opened = tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(stopped()),
            opened = Poller::open(config, session, (meter, lease), (modes, mark)) => opened,
        };
        let error = match opened {
            Ok(mut poller) => {
                let ended = poller.poll(shutdown.as_mut()).await;
                let has_looked = poller.looks.borrow().has_read();
                if has_looked {
                    backoff.reset();
                }
                match ended {
                    // While the lock is held.
                    Ok(Stopped { by, result }) => {
                        let result = mark.end(result, shutdown).await;
                        return Ok(Stopped { by, result });
                    }
                    Err(error) if !error.is_temporary() => {
                        return mark.end(Err(error), shutdown).await;
                    }
                    Err(error) => {
                        if has_looked {
                            meter.lost(Side::Postgres);
                        }
                        error
                    }
                }
            }
            Err(error) => error,
        };
        if !error.is_temporary() {
            return Err(error);
        }
        meter.set_phase(phase_after(&error));
        let delay = backoff.next_delay();
        warn!(retry_in_ms = delay.as_millis(), "{}", error.report());
        tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(stopped()),
            () = sleep(delay) => {}
        }
    }
}

/// Told to stop.
struct Stopped {
    /// The end of the grace period.
    by: Instant,
    /// Whether the look that was under way is over.
    result: Result<()>,
}

/// One connection's worth of looks.
struct Poller<'a> {
    config: &'a Config,
    meter: &'a Meter,
    /// Holds the lock on the slot. Only short statements run on it.
    hold: Hold,
    lease: &'a Lease,
    rows: Client,
    claim: Claim,
    progress: Progress,
    publisher: PublisherConfig,
    /// `None` while a look has them, and where there is no table for them.
    stragglers: Option<Stragglers>,
    looks: watch::Sender<Looks>,
    /// Tables that could not be read.
    left: Vec<TableName>,
}

impl<'a> Poller<'a> {
    async fn open(
        config: &'a Config,
        session: &Session,
        (meter, lease): (&'a Arc<Meter>, &'a Lease),
        (modes, mark): (&mut Modes, &mut NameMark),
    ) -> Result<Self> {
        let client = connect_sql(&config.postgres, APPLICATION_NAME).await?;
        let rows = connect_sql(&config.postgres, APPLICATION_NAME).await?;
        let preparing = async {
            cluster::check_same_server(&client, &rows).await?;
            let prepared = prepare(&client, config, session).await?;
            let tables = modes::prepare(&client, config).await?;
            Ok((prepared, tables))
        };
        let prepared = answered("look at the tables", preparing).await?;
        let ((progress, claim, timeline), tables) = prepared;
        let hold = lease.clone().hold(client).await?;
        let client = hold.client();
        let right = Right::Under(claim.clone());
        modes.set_right(right.clone());
        let system_id = &progress.system_id;
        let log = answered("ask for the server's log", Log::of(client)).await?;
        let place = Place {
            postgres: config.postgres.clone(),
            log: log.clone(),
            claim: claim.clone(),
            reconnect: (config.reconnect_initial, config.reconnect_max),
        };
        let (generation, doubts) = mark.begin(client, Some(place), progress.generation).await?;
        let mut publisher = publisher_config(config, meter, system_id, timeline, generation);
        publisher.doubts = doubts;
        let looks = watch::Sender::default();
        let routes = (routing(config), publisher.clone(), lease.clone());
        let way = Way::Looks(looks.subscribe());
        modes.start(config, &tables, &log, routes, way);
        publisher.rows = modes.queue();
        let starting = Stragglers::start(config, (&publisher, lease), log, right);
        let stragglers = lease.during(starting).await?;
        publisher.diversion = diversion(config, stragglers.as_ref());
        if let Some(stragglers) = &stragglers {
            stragglers.retry(true);
        }
        Ok(Self {
            config,
            meter,
            hold,
            lease,
            rows,
            claim,
            progress,
            publisher,
            stragglers,
            looks,
            left: Vec::new(),
        })
    }

    /// Looks until told to stop.
    async fn poll<F: Future<Output = ()>>(&mut self, mut shutdown: Pin<&mut F>) -> Result<Stopped> {
        let (interval, grace) = (self.config.scan_interval, self.config.shutdown_grace);
        self.meter.set_phase(Phase::Polling);
        info!(interval_ms = interval.as_millis(), "polling");
        loop {
            let next = Instant::now() + interval;
            if let Some(stopped) = self.look_or_stop(shutdown.as_mut(), grace).await? {
                return Ok(stopped);
            }
            tokio::select! {
                biased;
                () = shutdown.as_mut() => {
                    let by = Instant::now() + grace;
                    return Ok(Stopped { by, result: Ok(()) });
                }
                rested = self.rest(next) => rested?,
            }
        }
    }

    /// One look; told to stop meanwhile, it may end within the grace period.
    async fn look_or_stop<F: Future<Output = ()>>(
        &mut self,
        shutdown: Pin<&mut F>,
        grace: Duration,
    ) -> Result<Option<Stopped>> {
        let (meter, lease) = (self.meter, self.lease.clone());
        let mut look = pin!(self.look());
        tokio::select! {
            biased;
            () = lease.lost() => return Err(lease::lost()),
            looked = look.as_mut() => return looked.map(|()| None),
            () = shutdown => {
                meter.set_phase(Phase::Stopping);
                info!("stopping: the look that is under way may end");
            }
        }
        let by = Instant::now() + grace;
        let cut_short = |_| {
            Err(
                Error::temporary("a look was not over when the time to stop was up")
                    .hint("the next start goes on with it; WALPOST_SHUTDOWN_GRACE gives more time"),
            )
        };
        let result = timeout_at(by, look).await.unwrap_or_else(cut_short);
        Ok(Some(Stopped { by, result }))
    }

    /// Waits for the next look's time, books what becomes of stragglers meanwhile, and ends with the lock's session.
    async fn rest(&mut self, until: Instant) -> Result<()> {
        loop {
            let report = async {
                match &mut self.stragglers {
                    Some(stragglers) => stragglers.next_report().await,
                    None => pending().await,
                }
            };
            let report = tokio::select! {
                biased;
                () = self.lease.lost() => return Err(lease::lost()),
                report = report => Some(report),
                () = sleep_until(until) => None,
            };
            if let (Some(report), Some(stragglers)) = (report, &mut self.stragglers) {
                stragglers.idle(report)?;
            }
            if Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Goes on with a look that was cut short, or publishes what was committed since the last one.
    async fn look(&mut self) -> Result<()> {
        if self.progress.gap().is_some() {
            self.close_gap().await?;
        }
        self.looks.send_modify(Looks::begin);
        let upto = progress::snapshot(self.hold.client()).await?;
        if self.has_rows(&upto).await? {
            progress::look(self.hold.client(), &self.claim, &mut self.progress, &upto).await?;
            self.close_gap().await?;
        }
        // Of a table that was not read it is not known which rows are yet to come.
        let tables = self.config.outbox_tables.iter();
        let read = tables.map(|table| !self.left.contains(table));
        self.looks.send_modify(|looks| looks.end(read));
        Ok(())
    }

    async fn has_rows(&self, upto: &progress::Snapshot) -> Result<bool> {
        let tables = self.config.outbox_tables.iter();
        for name in tables.filter(|name| !self.left.contains(name)) {
            let ahead = self.progress.position.ahead.get(&name.to_string());
            let (delivered, covered) = match ahead {
                Some(ahead) => (Some(&ahead.upto), Some(ahead.leaves.clone())),
                None => (
                    self.progress.delivered.as_ref(),
                    self.progress.tables.as_ref().map(Leaves::covered),
                ),
            };
            // What is not there now may come back with rows: the look leaves it.
            let Some(table) = ScanTable::describe(&self.rows, name).await? else {
                return Ok(true);
            };
            match table.any(&self.rows, upto, delivered).await {
                Ok(false) => {}
                Ok(true) => return Ok(true),
                // So does it with one that cannot be read.
                Err(error) if is_about_rows(&error) => return Ok(true),
                Err(error) => return Err(error),
            }
            // Rows of a partition that was attached with them may be older than the last look.
            if let Some(covered) = covered {
                let leaves = reconcile::leaves(&self.rows, name).await?;
                if leaves.iter().any(|leaf| !covered.contains(leaf)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    async fn close_gap(&mut self) -> Result<()> {
        let gap = Gap {
            client: self.hold.client(),
            rows: &self.rows,
            claim: &self.claim,
            routing: &routing(self.config),
            publisher: &self.publisher,
            lease: self.lease,
            left_out: &[],
        };
        let stragglers = self.stragglers.take();
        // There is no stream that could bring them.
        let mut overlap = Overlap::default();
        let closing = gap::close(&gap, &mut self.progress, stragglers, &mut overlap);
        let (stragglers, mut left) = closing.await?;
        self.stragglers = stragglers;
        self.left = left.iter().map(|(table, _)| table.clone()).collect();
        if left.len() == self.config.outbox_tables.len()
            && let Some((_, why)) = left.pop()
        {
            return Err(why);
        }
        Ok(())
    }
}

/// Takes the lock, and checks that there is what polling needs.
async fn prepare(
    client: &Client,
    config: &Config,
    session: &Session,
) -> Result<(Progress, Claim, u32)> {
    recovery::lock(client, &config.slot).await?;
    refuse_row_security(client, &config.outbox_tables).await?;
    let system_id = cluster::system_id(client).await?;
    let mut progress = if let Some(progress) = stored(client, config, &system_id).await? {
        progress
    } else {
        progress::begin(client, &config.slot, &system_id).await?
    };
    let timeline = cluster::timeline(client).await?;
    let claim = progress::claim(
        client,
        &config.slot,
        &progress,
        &session.name,
        Some(timeline),
    )
    .await?;
    check_tables(client, config).await?;
    reconcile::declare(client, &claim, &config.outbox_tables, &mut progress).await?;
    if slot_state(client, &config.slot).await?.is_some() {
        warn!("{} (hint: {})", SLOT_LEFT, drop_slot(&config.slot));
    }
    Ok((progress, claim, timeline))
}

/// What is wrong with a slot beside poll mode.
pub(crate) const SLOT_LEFT: &str =
    "a replication slot of this name keeps log on the server, and poll mode does not read it";

/// The statement that mends it.
pub(crate) fn drop_slot(slot: &str) -> String {
    format!(
        "SELECT pg_drop_replication_slot({})",
        quote_literal(slot).trim()
    )
}

/// Looks, without changing anything, whether polling has what it needs.
///
/// # Errors
/// Refused, with what mends it.
pub(crate) async fn preflight(client: &Client, config: &Config) -> Result<()> {
    refuse_row_security(client, &config.outbox_tables).await?;
    let system_id = cluster::system_id(client).await?;
    stored(client, config, &system_id).await?;
    check_tables(client, config).await
}

async fn stored(client: &Client, config: &Config, system_id: &str) -> Result<Option<Progress>> {
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
    if let Some(progress) = &stored {
        cluster::check_cluster(progress, system_id, &config.slot)?;
    }
    Ok(stored)
}

async fn check_tables(client: &Client, config: &Config) -> Result<()> {
    for name in &config.outbox_tables {
        if ScanTable::describe(client, name).await?.is_none() {
            return Err(Error::refused(format!(
                "table {name} does not exist, or has no columns txid (xid8) and seq (bigint), by which poll mode finds new rows"
            ))
            .hint(format!(
                "walpost init; or ALTER TABLE {name} ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
                 ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY"
            )));
        }
    }
    Ok(())
}
