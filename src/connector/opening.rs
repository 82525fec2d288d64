//! Opening: from the settings to a replication stream and a pipe that belong together.
//!
//! In this order, and each step is a reason why: Postgres is asked who it is and the lock is taken ([`recovery`]); a pipe of
//! another owner is dropped, and only then may this process write to brokers ([`crate::lease`]); a pipe of another cluster or timeline is dropped; what the stream will not bring is published ([`gap`]), and only then is there
//! a pipe; the stream begins, and only then is the end of the log asked for and the stragglers of others known.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::publishing::{diversion, publisher_config, routing, subscription};
use super::{Connector, Shutdown, TICK_INTERVAL};
use crate::config::{Config, SlotLost};
use crate::lease::{self, Hold};
use crate::meter::Phase;
use crate::outbox::Extractor;
use crate::pipe::{Pipe, ScannedRow};
use crate::postgres::{
    self, OutboxRelations, ReplicationConnection, ReplicationStream, StreamOptions, SystemIdentity,
    answered, published, slot,
};
use crate::pulsar::{Flush, Publisher, PublisherConfig};
use crate::scanner::cluster;
use crate::scanner::delivered::Start;
use crate::scanner::gap::{self, Gap};
use crate::scanner::handover::Carried;
use crate::scanner::keeper::Keeper;
use crate::scanner::modes;
use crate::scanner::name_mark::Place;
use crate::scanner::outbox::OutboxTable;
use crate::scanner::overlap::Overlap;
use crate::scanner::progress::{self, Claim};
use crate::scanner::reconcile;
use crate::scanner::recovery::{self, Prepared, Session};
use crate::scanner::straggler::Stragglers;
use crate::scanner::straggler_fence::Right;
use crate::scanner::streamed::StreamedRows;
use crate::scanner::table::{self, ScanTable};
use crate::scanner::unmarked::Way;
use crate::{Error, Lsn, Result};

/// `application_name` of our sessions.
const APPLICATION_NAME: &str = "walpost";

impl Connector {
    /// Connects to Postgres, makes the pipe if there is none, and starts the stream. `None`: shutdown came first.
    pub(super) async fn open<F: Future<Output = ()>>(
        &mut self,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<ReplicationStream>> {
        let Some((hold, mut found)) = self.take_slot(shutdown.as_mut()).await? else {
            return Ok(None);
        };
        if found.prepared.as_ref().is_some_and(|it| it.out_of_date) {
            let was_ours = found.prepared.as_ref().is_some_and(|it| it.was_ours);
            let dropped = self.drop_out_of_date(was_ours, shutdown.as_mut()).await?;
            if dropped.is_none() {
                return Ok(None);
            }
        }
        let prepared = found.prepared.as_ref();
        let (carried, confirmed) = self.carried_on(&found.identity, found.confirmed, prepared);
        // The highest position that the slot may have been told so far.
        let known = self.session.told.unwrap_or(found.stands).max(found.stands);
        self.session.told = Some(known);
        self.modes.know(&found.tables);
        let client = hold.client();
        let ready = if self.has_pipe_of(&found.identity)? {
            self.keep_pipe(shutdown.as_mut()).await?
        } else {
            let making = Box::pin(self.make_pipe(client, &mut found, confirmed, shutdown.as_mut()));
            match making.await {
                // While the lock is held.
                Err(error) if !error.is_temporary() => {
                    return self.mark.end(Err(error), shutdown).await;
                }
                made => made?,
            }
        };
        if ready.is_none() {
            return Ok(None);
        }
        let beginning = Box::pin(self.begin(client, found, carried, known, shutdown));
        let Some(stream) = beginning.await? else {
            return Ok(None);
        };
        self.pipe()?.streaming(true);
        self.meter.set_phase(Phase::Streaming);
        let from = self.pipe()?.flush_lsn();
        info!(slot = self.config.slot, %from, "streaming");
        self.hold = Some(hold);
        self.left = None;
        Ok(Some(stream))
    }

    /// Gives back the lock of the last stream, looks at Postgres, and takes the lock and the lease. `None`: shutdown came first.
    async fn take_slot<F: Future<Output = ()>>(
        &mut self,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<(Hold, Found)>> {
        let config = self.config.clone();
        let was_lost = self.lease.lost_since().is_some();
        // From here on nothing is written to a broker.
        let locked = self.hold.take().map(Hold::into_client);
        self.claimed = None;
        // Another instance may have had the slot meanwhile, and this one's next claim has the name of its last one.
        self.set_right(Right::Suspended);
        let session = self.session.clone();
        let checking = Box::pin(async {
            // Waited for: were it held a moment longer, we would take ourselves for another instance.
            if let Some(client) = locked {
                recovery::unlock(&client).await;
            }
            check(&config, &session).await
        });
        let Some(checked) = self.attend(checking, shutdown.as_mut()).await? else {
            return Ok(None);
        };
        let (client, found) = checked.inspect_err(|error| {
            if recovery::is_busy(error) {
                // The other one needs the producers' names, and publishes what is in the air here.
                self.drop_pipe();
            }
        })?;
        let prepared = found.prepared.as_ref();
        self.claimed = prepared.map(|prepared| prepared.claim.clone());
        if may_be_others(prepared, was_lost) {
            self.drop_pipe();
        }
        let holding = self.lease.clone().hold(client);
        let Some(hold) = self.attend(holding, shutdown).await? else {
            return Ok(None);
        };
        Ok(Some((hold?, found)))
    }

    /// Goes on with the pipe that there is. `None`: shutdown came first.
    async fn keep_pipe<F: Future<Output = ()>>(
        &mut self,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<()>> {
        self.set_right(self.claimed.clone().into());
        if self.is_closed {
            tokio::select! {
                biased;
                () = shutdown.as_mut() => return Ok(None),
                connected = self.pipe()?.publisher().connect() => connected?,
            }
            self.is_closed = false;
        }
        Ok(Some(()))
    }

    /// Publishes what the stream will not bring, and makes a pipe. `None`: shutdown came first.
    async fn make_pipe<F: Future<Output = ()>>(
        &mut self,
        client: &Client,
        found: &mut Found,
        confirmed: Lsn,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<()>> {
        let identity = &found.identity;
        if self.pipe.is_some() {
            warn!(
                timeline = identity.timeline,
                "another cluster or timeline answers: starting with new producer names"
            );
        }
        // The old ones end first: two tasks would answer for one table.
        self.drop_pipe();
        let mut settings = self
            .publishing_for(client, identity, found.prepared.as_ref())
            .await?;
        self.start_modes(&found.tables, identity, &settings);
        settings.rows = self.modes.queue();
        let right: Right = self.claimed.clone().into();
        self.modes.set_right(right.clone());
        let (config, lease) = (self.config.clone(), self.lease.clone());
        let starting = Box::pin(Stragglers::start(
            &config,
            (&settings, &lease),
            identity.into(),
            right,
        ));
        let started = lease.during(starting);
        let Some(started) = self.attend(started, shutdown.as_mut()).await? else {
            return Ok(None);
        };
        let stragglers = started?;
        settings.diversion = diversion(&config, stragglers.as_ref());
        let closing = self.close_gap(client, &settings, found.prepared.as_mut(), stragglers);
        let (scanned, stragglers) = tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(None),
            closed = self.lease.during(closing) => closed?,
        };
        self.publishing = Some(settings.clone());
        let mut publisher = Publisher::under(settings, &self.lease);
        tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(None),
            connected = publisher.connect() => connected?,
        }
        // Only now: without a pipe the next try closes what is left of the gap.
        let mut pipe = Pipe::new(routing(&self.config), publisher, stragglers, confirmed);
        pipe.skip_scanned(scanned);
        self.pipe = Some((found.identity.clone(), pipe));
        Ok(Some(()))
    }

    /// Starts the task that notes what is delivered, if there is none, and the stream. `None`: shutdown came first.
    async fn begin<F: Future<Output = ()>>(
        &mut self,
        client: &Client,
        mut found: Found,
        carried: Option<Carried>,
        known: Lsn,
        shutdown: Shutdown<'_, F>,
    ) -> Result<Option<ReplicationStream>> {
        let config = self.config.clone();
        if let Some(prepared) = &mut found.prepared
            && self.keeper.is_none()
        {
            // (One that there is has the same settings, and tells the rest.)
            let facts = keeper_facts(client, &config, prepared, carried.as_ref());
            let asked = Box::pin(answered("look at what is to be noted", facts));
            let facts = self.attend_on(asked).await??;
            self.keep(prepared, carried, facts)?;
        }
        let (binary, claim) = (self.binary, self.claimed.clone());
        self.pipe()?.begin_stream(binary, found.relations);
        let beginning = begin_stream(
            client,
            found.connection,
            (&config.slot, known),
            claim.as_ref(),
            (&config.publication, binary),
            self.pipe()?.flush_lsn(),
        );
        let (stream, log_end) = self.attend_on(beginning).await??;
        self.pipe()?.publisher().set_log_end(log_end);
        let refreshed = self.pipe()?.refresh();
        let lease = self.lease.clone();
        let refreshed = lease.during(async {
            refreshed.await;
            Ok(())
        });
        match self.attend(refreshed, shutdown).await? {
            None => Ok(None),
            Some(refreshed) => refreshed.map(|()| Some(stream)),
        }
    }

    /// Tells under which claim stragglers are stored, and rows are marked or deleted.
    fn set_right(&self, right: Right) {
        self.modes.set_right(right.clone());
        if let Some((_, pipe)) = &self.pipe {
            pipe.set_right(right);
        }
    }

    /// Drops what is in the air and known of the slot: those rows are in the gap, are sent again, or were published by another instance. `None`: shutdown
    /// came first.
    async fn drop_out_of_date<F: Future<Output = ()>>(
        &mut self,
        was_ours: bool,
        shutdown: Shutdown<'_, F>,
    ) -> Result<Option<()>> {
        // If this process streamed the lost slot, in-flight events may be in no table (an event of `emit_transient`, a row that was deleted since).
        if was_ours {
            self.set_right(self.claimed.clone().into());
            if self.settle(shutdown).await?.is_none() {
                return Ok(None);
            }
        }
        self.drop_pipe();
        self.session.told = None;
        self.left = None;
        self.session.unreadable = None;
        self.session.is_behind.store(false, Ordering::Relaxed);
        Ok(Some(()))
    }

    /// Waits for the receipts of what is in the air, for the grace period at most. `None`: shutdown came first.
    async fn settle<F: Future<Output = ()>>(
        &mut self,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<()>> {
        let by = Instant::now() + self.config.shutdown_grace;
        let Some((_, pipe)) = &mut self.pipe else {
            return Ok(Some(()));
        };
        if pipe.unfinished() > 0 {
            info!(
                events = pipe.unfinished(),
                "the slot is made anew: waiting for the receipts of what the old one brought"
            );
        }
        while pipe.unfinished() > 0 {
            let now = Instant::now();
            if now >= by {
                warn!(
                    events = pipe.unfinished(),
                    "events of the old slot have no receipt: those that are rows are read from the table, and those of emit_transient may be lost"
                );
                break;
            }
            pipe.publisher().flush(Flush::All);
            tokio::select! {
                biased;
                () = shutdown.as_mut() => return Ok(None),
                () = self.lease.lost() => return Err(lease::lost()),
                event = pipe.next_event() => pipe.event(event)?,
                () = sleep_until(by.min(now + TICK_INTERVAL)) => pipe.tick(Instant::now()),
            }
        }
        Ok(Some(()))
    }

    /// What the last stream of the same log left, if it ended in good order, and where the slot stands.
    fn carried_on(
        &self,
        identity: &SystemIdentity,
        confirmed: Lsn,
        prepared: Option<&Prepared>,
    ) -> (Option<Carried>, Lsn) {
        // Kept until there is a stream: closing the gap may take several tries.
        if let Some(left) = self
            .left
            .as_ref()
            .filter(|left| same_log(&left.log, identity))
        {
            // The walsender may not have taken the last status update yet.
            return (Some(left.carried.clone()), confirmed.max(left.confirmed));
        }
        let left = prepared.and_then(|prepared| self.left_by_the_last(prepared, confirmed));
        (left, confirmed)
    }

    /// What the stream brought since the delivered snapshot, where that is known before it begins: a gap between the delivered
    /// snapshot and a later one is about to be closed, behind which nothing was streamed; or the last process stopped in good order
    /// and the slot stands where it left it.
    fn left_by_the_last(&self, prepared: &Prepared, confirmed: Lsn) -> Option<Carried> {
        let (progress, tables) = (&prepared.progress, &self.config.outbox_tables);
        let is_gap = progress.gap().is_some() && progress.position.missing.is_none();
        if is_gap || prepared.unknown.is_some() {
            return Some(Carried {
                streamed: Some(vec![StreamedRows::default(); tables.len()]),
                counted: tables
                    .iter()
                    .map(|table| !prepared.left_out.contains(table))
                    .collect(),
                ..Carried::default()
            });
        }
        Carried::from_json(progress.streamed.as_ref()?, tables, confirmed)
    }

    /// Starts the task that notes what is delivered, beside the pipe.
    fn keep(
        &mut self,
        prepared: &Prepared,
        carried: Option<Carried>,
        facts: KeeperFacts,
    ) -> Result<()> {
        let KeeperFacts {
            scannable,
            began,
            catalog,
        } = facts;
        let was_changed = prepared.progress.catalog != catalog;
        // Dropped while the facts were asked for.
        let Some((log, _)) = &self.pipe else {
            return Err(lease::lost());
        };
        let config = &self.config;
        let is_known = carried
            .as_ref()
            .is_some_and(|carried| carried.streamed.is_some());
        if config.reconcile && !is_known && prepared.progress.catalog.is_none() {
            info!(
                "it is not known what the stream brought since the last note of what is delivered: all rows committed since are compared with \
                 what it brings from now on, and come from the table where it does not bring them"
            );
        } else if config.reconcile && !is_known && was_changed {
            warn!(
                "the process before did not stop in good order, and the publication or a table was changed since the last note of what is delivered (or its version was not noted): \
                 all rows committed since that note are published from the table, also those that were streamed"
            );
        } else if config.reconcile && !is_known {
            info!(
                "the process before did not stop in good order: rows committed since the last note of what is delivered are not compared with \
                 the stream (walpost verify compares them with the topics)"
            );
        }
        let start = Start {
            postgres: config.postgres.clone(),
            log: log.into(),
            claim: prepared.claim.clone(),
            interval: config.scan_interval,
            compares: config.reconcile,
            tables: config.outbox_tables.clone(),
            subscription: subscription(config),
            progress: prepared.progress.clone(),
            unchecked: (!is_known && !was_changed).then_some(began),
            carried: carried.unwrap_or_default(),
            scannable,
            meter: Arc::clone(&self.meter),
        };
        self.keeper = Some(Keeper::start(start));
        if self.config.reconcile {
            self.pipe()?.count_streamed();
        }
        Ok(())
    }

    /// Whether there is a pipe, and it is of this server's log.
    ///
    /// # Errors
    /// Refused when the log ends before what the pipe has received of it.
    fn has_pipe_of(&self, identity: &SystemIdentity) -> Result<bool> {
        let Some((known, pipe)) = &self.pipe else {
            return Ok(false);
        };
        if !same_log(known, identity) {
            return Ok(false);
        }
        if identity.xlogpos < pipe.received() {
            return Err(put_back(identity.xlogpos, pipe.received()));
        }
        Ok(true)
    }

    /// How events are published, under names that this process and others may use.
    async fn publishing_for(
        &mut self,
        client: &Client,
        identity: &SystemIdentity,
        prepared: Option<&Prepared>,
    ) -> Result<PublisherConfig> {
        let config = &self.config;
        let place = prepared.map(|prepared| Place {
            postgres: config.postgres.clone(),
            log: identity.into(),
            claim: prepared.claim.clone(),
            reconnect: (config.reconnect_initial, config.reconnect_max),
        });
        let stored = prepared.map_or(0, |prepared| prepared.progress.generation);
        let (generation, doubts) = self.mark.begin(client, place, stored).await?;
        let system_id = identity.system_id.to_string();
        let timeline = identity.timeline;
        Ok(PublisherConfig {
            doubts,
            ..publisher_config(config, &self.meter, &system_id, timeline, generation)
        })
    }

    fn start_modes(
        &mut self,
        tables: &[OutboxTable],
        identity: &SystemIdentity,
        publisher: &PublisherConfig,
    ) {
        let routes = (routing(&self.config), publisher.clone(), self.lease.clone());
        let way = Way::Stream(self.progress.subscribe());
        self.modes
            .start(&self.config, tables, &identity.into(), routes, way);
    }

    /// Publishes or stores what the stream will not bring, and returns what it may bring although that is done.
    async fn close_gap(
        &self,
        client: &Client,
        publisher: &PublisherConfig,
        prepared: Option<&mut Prepared>,
        mut stragglers: Option<Stragglers>,
    ) -> Result<(Vec<ScannedRow>, Option<Stragglers>)> {
        let Some(prepared) = prepared else {
            return Ok((Vec::new(), stragglers));
        };
        let routing = routing(&self.config);
        let mut scanned = Vec::new();
        // Twice where a gap is open and the slot is unknown: with one end, what was begun doubles nothing.
        loop {
            let progress = &mut prepared.progress;
            let before = match &prepared.unknown {
                Some(unknown) => unknown.never_streamed.as_ref(),
                None => progress.scan_before.as_ref(),
            };
            let mut overlap = Overlap::beyond(before)?;
            if progress.scan_upto.is_some() {
                // What takes long has a session of its own: that of the lock is asked whether it is there.
                let rows = postgres::connect_sql(&self.config.postgres, APPLICATION_NAME).await?;
                cluster::check_same_server(client, &rows).await?;
                overlap.delivered(&rows, &routing, progress).await?;
                if progress.gap().is_some() {
                    let sessions = (client, &rows);
                    let scan = self.scan(sessions, publisher, prepared, stragglers, &mut overlap);
                    stragglers = scan.await?;
                }
            }
            scanned.extend(overlap.into_rows());
            if prepared.unknown.is_none() {
                return Ok((scanned, stragglers));
            }
            recovery::scan_up_to_now(client, &self.config, prepared).await?;
        }
    }

    /// Publishes or stores the rows of the gap.
    async fn scan(
        &self,
        (client, rows): (&Client, &Client),
        publisher: &PublisherConfig,
        prepared: &mut Prepared,
        mut stragglers: Option<Stragglers>,
        overlap: &mut Overlap,
    ) -> Result<Option<Stragglers>> {
        let routing = routing(&self.config);
        self.meter.set_phase(Phase::Scanning);
        let gap = Gap {
            client,
            rows,
            claim: &prepared.claim,
            routing: &routing,
            publisher,
            lease: &self.lease,
            left_out: &prepared.left_out,
        };
        let retry = |stragglers: &Option<Stragglers>, may_retry| {
            if let Some(stragglers) = stragglers {
                stragglers.retry(may_retry);
            }
        };
        // The lock is held, so nobody else does.
        retry(&stragglers, true);
        let left;
        let closing = gap::close(&gap, &mut prepared.progress, stragglers, overlap);
        (stragglers, left) = closing.await?;
        retry(&stragglers, false);
        // The others' rows are published, and the stream waits: see the module.
        match left.into_iter().next() {
            Some((_, why)) => Err(why),
            None => Ok(stragglers),
        }
    }
}

/// What is asked before the task that notes what is delivered begins.
struct KeeperFacts {
    scannable: Vec<bool>,
    /// A snapshot.
    began: String,
    catalog: Option<String>,
}

/// Stores which leaf tables belong to the outbox, before the stream passes over rows of those that do not (see [`crate::scanner::coverage`]),
/// and asks for these facts.
async fn keeper_facts(
    client: &Client,
    config: &Config,
    prepared: &mut Prepared,
    carried: Option<&Carried>,
) -> Result<KeeperFacts> {
    let tables = &config.outbox_tables;
    reconcile::declare(client, &prepared.claim, tables, &mut prepared.progress).await?;
    let mut scannable = Vec::with_capacity(tables.len());
    for table in tables {
        scannable.push(ScanTable::describe(client, table).await?.is_some());
    }
    check_counted(client, config, carried, &scannable).await?;
    let began = progress::snapshot(client).await?;
    // Behind the snapshot: see `reconcile`.
    let catalog = published::version(client, &config.publication, tables).await?;
    Ok(KeeperFacts {
        scannable,
        began,
        catalog,
    })
}

/// Refuses a table whose rows were counted and that cannot be compared any more: what the stream left out of it would not be found.
async fn check_counted(
    client: &Client,
    config: &Config,
    carried: Option<&Carried>,
    scannable: &[bool],
) -> Result<()> {
    if !config.reconcile || config.slot_lost == SlotLost::Restart {
        return Ok(());
    }
    let counted = carried.filter(|carried| carried.streamed.is_some());
    let counted = counted.map_or(&[][..], |carried| &carried.counted);
    for (place, table) in config.outbox_tables.iter().enumerate() {
        if scannable.get(place) == Some(&true) {
            continue;
        }
        // (Those that a scan leaves out do not count as counted.)
        if counted.get(place) == Some(&true) {
            if table::describe(client, table).await?.is_none() {
                return Err(Error::temporary(format!(
                    "table {table} does not exist at the moment"
                )));
            }
            return Err(Error::refused(format!(
                "table {table} has no columns txid and seq any more: its rows since the last note cannot be compared with the stream"
            ))
            .hint("give it the columns back; if it is to be without them: WALPOST_SLOT_LOST=restart walpost run"));
        }
        info!(%table, "the table has no columns txid and seq: it is not compared with what the stream brings");
    }
    Ok(())
}

/// Starts the stream of a slot at `from`, and asks where the log ends. The slot must stand where it was found (`known`).
async fn begin_stream(
    client: &Client,
    connection: ReplicationConnection,
    (slot, known): (&str, Lsn),
    claim: Option<&Claim>,
    (publication, binary): (&str, bool),
    from: Lsn,
) -> Result<(ReplicationStream, Lsn)> {
    let options = StreamOptions {
        binary,
        messages: true,
        ..StreamOptions::default()
    };
    // Only now: of a start that comes no further the next one must still know where the slot was left.
    if let Some(claim) = claim {
        answered("note the stream", progress::streaming(client, claim)).await?;
    }
    let starting = connection.start_replication(slot, from, publication, options);
    let started = answered(&format!("stream slot {slot}"), starting).await;
    let following = async {
        let stream = match started {
            Ok(stream) => stream,
            Err(error) => return Err(recovery::refused_start(client, slot, known, error).await),
        };
        // Only now that our walsender has it can nobody replace it.
        recovery::check_unchanged(client, slot, known).await?;
        // Asked only now: while another instance still had the slot, it may have published what came after any earlier answer.
        let log_end = slot::log_end(client).await?;
        Ok((stream, log_end))
    };
    answered("ask for the end of the log", following).await
}

/// Whether positions of the one mean the same on the other.
fn same_log(one: &SystemIdentity, other: &SystemIdentity) -> bool {
    (one.system_id, one.timeline) == (other.system_id, other.timeline)
}

/// Whether another instance may have published what this one has in the air.
fn may_be_others(prepared: Option<&Prepared>, was_lost: bool) -> bool {
    match prepared {
        Some(prepared) => prepared.out_of_date && !prepared.was_ours,
        // Nobody notes who had the slot.
        None => was_lost,
    }
}

/// What a look at Postgres gave.
struct Found {
    connection: ReplicationConnection,
    identity: SystemIdentity,
    confirmed: Lsn,
    /// Where the slot stood when it was judged.
    stands: Lsn,
    /// `None` without a `walpost.progress`.
    prepared: Option<Prepared>,
    /// Which tables are outbox tables.
    relations: OutboxRelations,
    /// What works beside the stream works on these.
    tables: Vec<OutboxTable>,
}

/// Connects, asks who the server is, sees to a lost slot, and checks that everything the stream needs is there. Gives the session that holds the
/// lock on the slot, too.
async fn check(config: &Config, session: &Session) -> Result<(Client, Found)> {
    let client = postgres::connect_sql(&config.postgres, APPLICATION_NAME).await?;
    let prepared = recovery::prepare(&client, config, session).await;
    let subscription = subscription(config);
    let preflight = postgres::preflight(&client, &config.slot, &subscription);
    let preflight = answered("look at publication and tables", preflight);
    let (prepared, relations) = match prepared {
        Err(error) if recovery::is_nothing_set_up(&error) => {
            preflight.await?;
            // It has come this moment.
            return Err(error);
        }
        prepared => (prepared?, preflight.await?),
    };
    let looking = async {
        check_definitions(&client, config).await?;
        let tables = modes::prepare(&client, config).await?;
        let state = slot::slot_state(&client, &config.slot).await?;
        Ok((tables, state))
    };
    let (tables, state) = answered("look at the tables", looking).await?;
    let confirmed = state
        .and_then(|state| state.confirmed_flush)
        .unwrap_or(Lsn::ZERO);
    let mut connection = ReplicationConnection::connect(&config.postgres, APPLICATION_NAME).await?;
    let identifying = async {
        let identity = connection.identify_system().await?;
        same_server(&client, &mut connection).await?;
        Ok(identity)
    };
    let identity = answered("ask the walsender who it is", identifying).await?;
    let found = Found {
        connection,
        identity,
        confirmed,
        stands: prepared
            .as_ref()
            .map_or(confirmed, |prepared| prepared.stands),
        prepared,
        relations,
        tables,
    };
    Ok((client, found))
}

/// Refuses a table whose rows could not be events, before the first of them comes.
async fn check_definitions(client: &Client, config: &Config) -> Result<()> {
    for table in &config.outbox_tables {
        if let Some(relation) = table::describe(client, table).await? {
            Extractor::new(&relation, &config.columns, &config.topic)?;
        }
    }
    Ok(())
}

/// The database was put back to an older state without a new timeline. What it commits from now on would be taken for what was
/// received before, and passed over.
fn put_back(log_end: Lsn, received: Lsn) -> Error {
    Error::refused(format!(
        "the database's log ends at {log_end}, and what was received from it before goes up to {received}: it was put back to \
         an older state on the same timeline"
    ))
    .hint("start walpost again; where the broker deduplicates, with a WALPOST_PRODUCER_NAME that was never used")
}

/// Of several hosts each connection finds its own: what the slot has confirmed on one server says nothing of the slot on another,
/// and a start beyond it would pass over transactions.
async fn same_server(client: &Client, replication: &mut ReplicationConnection) -> Result<()> {
    let started = cluster::server_start(client).await?;
    let rows = replication.simple_query(cluster::SERVER_START).await?;
    if rows.first().and_then(|row| row.first()) == Some(&Some(started)) {
        Ok(())
    } else {
        Err(cluster::two_servers(
            "the connection for SQL and the one for replication",
        ))
    }
}
