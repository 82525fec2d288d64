//! The connector: opens both sides, runs the loop between them, restarts what breaks, and drains at the end.
//!
//! One task runs everything here. It owns the replication socket (through [`ReplicationStream`]) and the [`Pipe`]; broker
//! sockets belong to tasks of their own, which it hears through the publisher's event channel.
//!
//! # Restarting either half
//!
//! * **Pulsar** breaks: the lanes keep their frames, openers reconnect with backoff, and the same frames are sent again in
//!   order. The replication connection stays; when the in-flight limits are reached nothing more is read from it, while
//!   status updates go on by their timer.
//! * **Postgres** breaks: what was received goes on to the broker, and the stream starts again at the confirmed LSN. What
//!   Postgres then repeats the pipe knows and skips (see [`crate::pipe`]).
//!
//! # Stopping
//!
//! On shutdown the transaction that is arriving is taken to its end (for at most half of the grace period); on an event that
//! cannot be published intake ends at once. Then what is in flight gets its receipts within the grace period, and a last
//! status update confirms it. What has no receipt by then is not confirmed and comes again.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_postgres::Client;
use tracing::{info, warn};

use crate::config::{AfterPublish, Config, Mode};
use crate::feedback::Feedback;
pub use crate::feedback::Progress;
use crate::gulp::Gulp;
use crate::meter::{Meter, Phase, Side};
use crate::pipe::{Format, Pipe, Routing};
use crate::postgres::{
    self, ReplicationConnection, ReplicationStream, StreamOptions, SystemIdentity, slot,
};
use crate::pulsar::{Diversion, Flush, Publisher, PublisherConfig};
use crate::retry::Backoff;
use crate::scanner::delivered::Keeper;
use crate::scanner::gap::{self, Gap};
use crate::scanner::modes::{self, Modes};
use crate::scanner::outbox::OutboxTable;
use crate::scanner::poll;
use crate::scanner::progress;
use crate::scanner::recovery::{self, Prepared, Session};
use crate::scanner::straggler::Stragglers;
use crate::scanner::unmarked::Way;
use crate::{Error, Lsn, Result};

/// `application_name` of our sessions.
const APPLICATION_NAME: &str = "walpost";
/// How often the publisher looks at the clock: send deadlines, idle producers, growing topics.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a topic may be refused before its events become stragglers: a permission or a namespace that is just being made.
const REFUSED_GRACE: Duration = Duration::from_secs(3);
/// SQLSTATE of a slot that another process streams.
const OBJECT_IN_USE: &str = "55006";
/// Rows that come this long after their commit are a backlog, also when they come slowly.
const LATE: Duration = Duration::from_millis(100);
/// Kept back from the grace period for the last status update and the goodbye.
pub(crate) const GOODBYE: Duration = Duration::from_secs(1);

/// Runs until `shutdown` resolves or an error that time cannot heal. `progress` is updated with every status update, `meter`
/// with every receipt, and about once a second.
pub async fn run(
    config: Config,
    progress: watch::Sender<Progress>,
    meter: Arc<Meter>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let mut shutdown = pin!(shutdown);
    let session = Session {
        name: session_name(),
        told: None,
    };
    if config.mode == Mode::Poll {
        return poll::run(config, session, meter, shutdown).await;
    }
    let mut connector = Connector {
        config,
        progress,
        meter,
        pipe: None,
        binary: true,
        session,
        scanner: None,
        modes: Modes::default(),
    };
    let mut backoff = Backoff::new(
        connector.config.reconnect_initial,
        connector.config.reconnect_max,
    );
    loop {
        let opened = connector.open(shutdown.as_mut()).await;
        let error = match opened {
            Ok(None) => return connector.stopped_without_stream(),
            Ok(Some(stream)) => {
                backoff.reset();
                match connector.stream(stream, shutdown.as_mut()).await? {
                    Ended::Shutdown => return Ok(()),
                    Ended::NeedsText => {
                        connector.binary = false;
                        continue;
                    }
                    Ended::Lost(error) => {
                        connector.meter.lost(Side::Postgres);
                        error
                    }
                }
            }
            Err(error) => error,
        };
        if !error.is_temporary() {
            return Err(error);
        }
        connector.meter.set_phase(phase_after(&error));
        let delay = backoff.next_delay();
        warn!(retry_in_ms = delay.as_millis(), "{}", error.report());
        if connector
            .attend(sleep(delay), shutdown.as_mut())
            .await?
            .is_none()
        {
            return connector.stopped_without_stream();
        }
    }
}

/// What it is at until the next try. Without `walpost.progress` there is no lock, and the slot itself says that another has it.
pub(crate) fn phase_after(error: &Error) -> Phase {
    if recovery::is_busy(error) || postgres::sqlstate(error) == Some(OBJECT_IN_USE) {
        Phase::Standby
    } else {
        Phase::Connecting
    }
}

/// Why streaming ended without an error that is final.
enum Ended {
    /// Drained and confirmed.
    Shutdown,
    /// The stream must be started again with values as text.
    NeedsText,
    /// Postgres went away.
    Lost(Error),
}

type Shutdown<'a, F> = Pin<&'a mut F>;

struct Connector {
    config: Config,
    progress: watch::Sender<Progress>,
    meter: Arc<Meter>,
    /// Made when the first connection tells which cluster this is, and anew should it be another.
    pipe: Option<(SystemIdentity, Pipe)>,
    binary: bool,
    session: Session,
    /// The session that holds the lock on the slot, while there is a stream and a `walpost.progress`.
    scanner: Option<Client>,
    /// What works on the tables beside the stream.
    modes: Modes,
}

impl Connector {
    /// Connects to Postgres, makes the pipe if there is none, and starts the stream. `None`: shutdown came first.
    async fn open<F: Future<Output = ()>>(
        &mut self,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<ReplicationStream>> {
        let config = self.config.clone();
        // The lock goes with it, so that it can be taken again.
        self.scanner = None;
        let session = Session {
            name: self.session.name.clone(),
            ..self.session
        };
        let checking = check(&config, &session);
        let Some(checked) = self.attend(checking, shutdown.as_mut()).await? else {
            return Ok(None);
        };
        let Checked {
            client,
            connection,
            identity,
            confirmed,
            prepared,
            tables,
        } = checked.inspect_err(|error| {
            if recovery::is_busy(error) {
                // The other one needs the producers' names, and publishes what is in the air here.
                self.drop_pipe();
            }
        })?;
        if prepared
            .as_ref()
            .is_some_and(|prepared| prepared.out_of_date)
        {
            // What was in the air is in the gap, or the slot sends it again, or another instance has published it.
            self.drop_pipe();
            self.session.told = None;
        }
        let known = self
            .pipe
            .as_ref()
            .map(|(known, _)| (known.system_id, known.timeline));
        if known != Some((identity.system_id, identity.timeline)) {
            if known.is_some() {
                warn!(
                    timeline = identity.timeline,
                    "another cluster or timeline answers: starting with new producer names"
                );
            }
            let mut settings = self.publishing_for(&identity);
            self.start_modes(&tables, &identity);
            settings.rows = self.modes.queue();
            // The old ones end first: two tasks would answer for one table.
            self.drop_pipe();
            let started = Stragglers::start(&config, &settings);
            let Some(started) = self.attend(started, shutdown.as_mut()).await? else {
                return Ok(None);
            };
            let stragglers = started?;
            settings.diversion = diversion(&config, stragglers.as_ref());
            let closing = self.close_gap(&client, &settings, prepared, stragglers);
            let (scanned, stragglers) = tokio::select! {
                biased;
                () = shutdown.as_mut() => return Ok(None),
                closed = closing => closed?,
            };
            let mut publisher = Publisher::new(settings);
            tokio::select! {
                biased;
                () = shutdown.as_mut() => return Ok(None),
                connected = publisher.connect() => connected?,
            }
            // Only now: without a pipe the next try closes what is left of the gap.
            let mut pipe = Pipe::new(routing(&self.config), publisher, stragglers, confirmed);
            pipe.skip_scanned(scanned);
            self.pipe = Some((identity, pipe));
        }
        let binary = self.binary;
        let pipe = self.pipe();
        pipe.begin_stream(binary);
        let start = pipe.flush_lsn();
        let options = StreamOptions {
            binary,
            messages: true,
            ..StreamOptions::default()
        };
        let stream = connection
            .start_replication(&config.slot, start, &config.publication, options)
            .await?;
        // Asked only now: while another instance still had the slot, it may have published what came after any earlier answer.
        let log_end = slot::log_end(&client).await?;
        pipe.publisher().set_log_end(log_end);
        let refreshed = pipe.refresh();
        if self.attend(refreshed, shutdown).await?.is_none() {
            return Ok(None);
        }
        self.pipe().streaming(true);
        self.meter.set_phase(Phase::Streaming);
        info!(slot = self.config.slot, from = %start, "streaming");
        self.scanner = Some(client);
        Ok(Some(stream))
    }

    fn publishing_for(&self, identity: &SystemIdentity) -> PublisherConfig {
        publisher_config(
            &self.config,
            &self.meter,
            &identity.system_id.to_string(),
            identity.timeline,
        )
    }

    fn start_modes(&mut self, tables: &[OutboxTable], identity: &SystemIdentity) {
        let system_id = identity.system_id.to_string();
        let publisher = self.publishing_for(identity);
        let routes = (routing(&self.config), publisher);
        let way = Way::Stream(self.progress.subscribe());
        self.modes
            .start(&self.config, tables, &system_id, routes, way);
    }

    /// Publishes or stores what the stream will not bring, and returns what it may bring although that is done.
    async fn close_gap(
        &self,
        client: &Client,
        publisher: &PublisherConfig,
        prepared: Option<Prepared>,
        mut stragglers: Option<Stragglers>,
    ) -> Result<(Vec<(u32, String)>, Option<Stragglers>)> {
        let Some(Prepared { mut progress, .. }) = prepared else {
            return Ok((Vec::new(), stragglers));
        };
        let routing = routing(&self.config);
        if progress.gap().is_some() {
            self.meter.set_phase(Phase::Scanning);
            let rows = postgres::connect_sql(&self.config.postgres, APPLICATION_NAME).await?;
            let gap = Gap {
                client,
                rows: &rows,
                slot: &self.config.slot,
                routing: &routing,
                publisher,
            };
            let retry = |stragglers: &Option<Stragglers>, may_retry| {
                if let Some(stragglers) = stragglers {
                    stragglers.retry(may_retry);
                }
            };
            // The lock is held, so nobody else does.
            retry(&stragglers, true);
            stragglers = gap::close(&gap, &mut progress, stragglers).await?;
            retry(&stragglers, false);
        }
        let scanned = gap::overlap(client, &routing, &progress).await?;
        Ok((scanned, stragglers))
    }

    /// What is in the air is not ours to wait for any more.
    fn drop_pipe(&mut self) {
        self.pipe = None;
        self.meter.set_in_flight((0, 0), 0);
    }

    fn pipe(&mut self) -> &mut Pipe {
        let (_, pipe) = self
            .pipe
            .as_mut()
            .expect("made by open, before anything streams");
        pipe
    }

    /// Awaits `work` while broker events are served; `None` when shutdown came first.
    async fn attend<T, F: Future<Output = ()>>(
        &mut self,
        work: impl Future<Output = T>,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Option<T>> {
        let mut work = pin!(work);
        let mut tick_at = Instant::now() + TICK_INTERVAL;
        loop {
            let Some((_, pipe)) = &mut self.pipe else {
                return Ok(tokio::select! {
                    biased;
                    () = shutdown.as_mut() => None,
                    done = work.as_mut() => Some(done),
                });
            };
            pipe.publisher().flush(Flush::Due);
            tokio::select! {
                biased;
                () = shutdown.as_mut() => return Ok(None),
                done = work.as_mut() => return Ok(Some(done)),
                event = pipe.next_event() => pipe.event(event)?,
                () = sleep_until(tick_at) => {
                    pipe.publisher().tick(Instant::now());
                    pipe.metering();
                    tick_at = Instant::now() + TICK_INTERVAL;
                }
            }
        }
    }

    /// Told to stop while Postgres is away: what it has not been told of comes again.
    fn stopped_without_stream(&mut self) -> Result<()> {
        match self.pipe.as_ref().map(|(_, pipe)| pipe.unfinished()) {
            Some(missing @ 1..) => Err(unfinished(missing)),
            _ => Ok(()),
        }
    }

    /// Streams until something ends it, then drains.
    async fn stream<F: Future<Output = ()>>(
        &mut self,
        mut stream: ReplicationStream,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Ended> {
        let grace = self.config.shutdown_grace;
        let keeper = self.scanner.as_ref().map(|_| {
            let (postgres, slot) = (self.config.postgres.clone(), self.config.slot.clone());
            let interval = self.config.scan_interval;
            Keeper::start(postgres, slot, interval, self.progress.subscribe())
        });
        let mut feedback = Feedback::new(self.config.status_interval, self.progress.clone());
        let ended = pump(
            self.pipe(),
            &mut stream,
            &mut feedback,
            grace / 2,
            shutdown.as_mut(),
        )
        .await;
        drop(keeper);
        // A stream that ended before its first status update has told nothing: what the one before told still holds.
        self.session.told = feedback.told().or(self.session.told);
        self.pipe().streaming(false);
        match ended {
            Ok(Stopped::Shutdown { told_at }) => {
                self.meter.set_phase(Phase::Stopping);
                info!("stopping: no more intake, waiting for receipts");
                self.stop(stream, feedback, told_at + grace).await?;
                self.note_stop().await;
                Ok(Ended::Shutdown)
            }
            Ok(Stopped::NeedsText) => {
                // The server may close on us meanwhile, which changes nothing.
                let _lost = stream.close().await;
                Ok(Ended::NeedsText)
            }
            Err(error) if error.is_temporary() => Ok(Ended::Lost(error)),
            Err(error) => {
                // Nothing passes the event that cannot be published, and what is before it is confirmed.
                if let Err(incomplete) = self.stop(stream, feedback, Instant::now() + grace).await {
                    warn!("{}", incomplete.report());
                }
                Err(error)
            }
        }
    }

    /// Notes what the slot was told last, so that the next start can tell whether it still is the same slot.
    async fn note_stop(&mut self) {
        let Some(client) = self.scanner.take() else {
            return;
        };
        let confirmed = self.pipe().flush_lsn();
        let noting = progress::stopped(&client, &self.config.slot, confirmed);
        if let Ok(Err(error)) = timeout(GOODBYE, noting).await {
            warn!("{}", error.report());
        }
    }

    /// The last steps: receipts, final status update, goodbye.
    async fn stop(
        &mut self,
        mut stream: ReplicationStream,
        mut feedback: Feedback,
        by: Instant,
    ) -> Result<()> {
        let pipe = self.pipe();
        // Half of what is left, should that be less than the goodbye takes.
        let now = Instant::now();
        let left = by.saturating_duration_since(now);
        let deadline = now + left.saturating_sub(GOODBYE).max(left / 2);
        let mut failure = None;
        while pipe.unfinished() > 0 && Instant::now() < deadline && failure.is_none() {
            // Again after each event: it may have let held events go into their lanes.
            pipe.publisher().flush(Flush::All);
            tokio::select! {
                biased;
                event = pipe.next_event() => failure = pipe.event(event).err(),
                () = sleep_until(feedback.next) => {
                    feedback.tell(pipe, &mut stream);
                    let _lost = timeout(GOODBYE, stream.flush()).await;
                    pipe.publisher().tick(Instant::now());
                }
                () = sleep_until(deadline) => {}
            }
        }
        feedback.tell(pipe, &mut stream);
        let confirmed = pipe.flush_lsn();
        if let Err(error) = stream.close().await {
            warn!(
                "the last status update may not have arrived: {}",
                error.report()
            );
        }
        let missing = pipe.unfinished();
        let counters = pipe.counters();
        // Receipts go first; then as long as there is time, and a moment in any case.
        let left = by.saturating_duration_since(Instant::now());
        self.modes.drain(left.max(GOODBYE)).await;
        info!(%confirmed, events = counters.acknowledged, stragglers = counters.stragglers, suppressed = counters.suppressed, "stopped");
        if missing > 0 {
            return Err(unfinished(missing));
        }
        Ok(())
    }
}

/// Which tables and columns are read, and where rows go.
pub(crate) fn routing(config: &Config) -> Routing {
    Routing {
        tables: config.outbox_tables.clone(),
        columns: config.columns.clone(),
        template: config.topic.clone(),
        report_rows: config.after_publish != AfterPublish::Keep,
    }
}

/// How events of this cluster and timeline are published.
pub(crate) fn publisher_config(
    config: &Config,
    meter: &Arc<Meter>,
    system_id: &str,
    timeline: u32,
) -> PublisherConfig {
    PublisherConfig {
        service: config.pulsar_url.hosts.clone(),
        auth: config.pulsar_auth.clone(),
        tls: config.broker_tls(),
        keepalive_interval: config.pulsar_keepalive_interval,
        // A failover or a restored copy may hand out the same LSNs again: under the old name their events would be taken for
        // duplicates.
        producer_name: format!("{}-{system_id}-{timeline}", config.producer_name),
        routing: routing(config).to_string(),
        lanes: u32::try_from(config.lanes).unwrap_or(u32::MAX),
        hashing: config.hashing,
        partition_refresh: config.partition_refresh,
        producer_idle: config.producer_idle,
        compression: config.compression,
        diversion: None,
        rows: None,
        schema: config.schema.clone(),
        batch_max_messages: u32::try_from(config.batch_max_messages).unwrap_or(u32::MAX),
        batch_max_bytes: usize::try_from(config.batch_max_bytes).unwrap_or(usize::MAX),
        batch_linger: config.batch_linger,
        max_in_flight_messages: config.max_in_flight_messages,
        max_in_flight_bytes: usize::try_from(config.max_in_flight_bytes).unwrap_or(usize::MAX),
        send_timeout: config.send_timeout,
        meter: Arc::clone(meter),
        reconnect: (config.reconnect_initial, config.reconnect_max),
    }
}

/// When events become stragglers: never, where there is no table for them.
pub(crate) fn diversion(config: &Config, stragglers: Option<&Stragglers>) -> Option<Diversion> {
    stragglers.map(|_| Diversion {
        grace: REFUSED_GRACE,
        age: config.straggler_age,
        park: config.keep_key_order,
        quiet: false,
    })
}

fn unfinished(missing: usize) -> Error {
    Error::temporary(format!(
        "{missing} events had no receipt when the time to stop was up"
    ))
    .hint("they are not confirmed and will be sent again; WALPOST_SHUTDOWN_GRACE gives more time")
}

/// Why the pump stopped without an error.
enum Stopped {
    /// Told to stop, and between two transactions unless one takes too long to arrive.
    Shutdown {
        told_at: Instant,
    },
    NeedsText,
}

/// The loop between the two sides. Told to stop, it goes on for at most `finish_transaction`.
///
/// Every branch of its select is cancel safe: `next_event` is a channel receive, `fill` and `flush` keep their state in the
/// stream, the rest are timers.
async fn pump<F: Future<Output = ()>>(
    pipe: &mut Pipe,
    stream: &mut ReplicationStream,
    feedback: &mut Feedback,
    finish_transaction: Duration,
    mut shutdown: Shutdown<'_, F>,
) -> Result<Stopped> {
    let mut gulp = Gulp::new(stream.gulp_pause())?;
    let mut tick_at = Instant::now() + TICK_INTERVAL;
    // Set when told to stop: the transaction that is arriving is taken to its end, so that no row of it comes again.
    let mut told_at: Option<Instant> = None;
    loop {
        // All that can be done without waiting: receipts first, they make room.
        while let Some(event) = pipe.try_next_event() {
            pipe.event(event)?;
        }
        while pipe.has_room() {
            if let Some(told_at) = told_at.filter(|_| !pipe.is_in_transaction()) {
                return Ok(Stopped::Shutdown { told_at });
            }
            let Some(frame) = stream.next_frame()? else {
                break;
            };
            let (format, reply_requested) = pipe.frame(frame)?;
            if format == Format::NeedsText {
                return Ok(Stopped::NeedsText);
            }
            feedback.wanted |= reply_requested;
        }
        let late = pipe.lateness();
        let due = if gulp.is_backlog() || late >= LATE {
            Flush::Backlog(late)
        } else {
            Flush::Due
        };
        pipe.publisher().flush(due);
        let now = Instant::now();
        feedback.progress(pipe, now);
        if feedback.is_due(now) {
            feedback.tell(pipe, stream);
        }
        if now >= tick_at {
            pipe.publisher().tick(now);
            pipe.metering();
            tick_at = now + TICK_INTERVAL;
        }

        let stop_by = told_at.map(|told_at| told_at + finish_transaction);
        if let Some(told_at) = told_at
            && (stop_by <= Some(now) || !pipe.is_in_transaction())
        {
            return Ok(Stopped::Shutdown { told_at });
        }

        let room = pipe.has_room();
        let unsent = stream.has_unsent_status();
        let flush_at = pipe.publisher().next_flush();
        tokio::select! {
            biased;
            // 1. Told to stop.
            () = shutdown.as_mut(), if told_at.is_none() => told_at = Some(Instant::now()),
            // 2. Receipts make room and move the confirmed LSN.
            event = pipe.next_event() => pipe.event(event)?,
            // 3. Status updates, also while intake is paused: without them the server would close the connection.
            () = sleep_until(feedback.next.min(tick_at).min(stop_by.unwrap_or(tick_at))) => {}
            // 4. A batch has waited long enough.
            () = sleep_until(flush_at.unwrap_or(now)), if flush_at.is_some() => {}
            // 5. The log, while there is room for it and under backlog in gulps; else only the status that is queued.
            filled = intake(&mut gulp, stream, room), if room || unsent => {
                if let Some(bytes) = filled? {
                    gulp.took(bytes)?;
                }
            }
        }
    }
}

/// Reads the log if there is room for it, and says how much; otherwise pushes out queued status updates. Cancel safe.
async fn intake(
    gulp: &mut Gulp,
    stream: &mut ReplicationStream,
    room: bool,
) -> Result<Option<usize>> {
    if !room {
        stream.flush().await?;
        return Ok(None);
    }
    if gulp.is_backlog() {
        stream.flush().await?;
        gulp.wait().await?;
    }
    stream.fill().await.map(Some)
}

/// What a look at Postgres gave.
struct Checked {
    /// Holds the lock on the slot.
    client: Client,
    connection: ReplicationConnection,
    identity: SystemIdentity,
    confirmed: Lsn,
    /// `None` without a `walpost.progress`.
    prepared: Option<Prepared>,
    /// What works beside the stream works on these.
    tables: Vec<OutboxTable>,
}

/// Connects, asks who the server is, sees to a lost slot, and checks that everything the stream needs is there.
async fn check(config: &Config, session: &Session) -> Result<Checked> {
    let client = postgres::connect_sql(&config.postgres, APPLICATION_NAME).await?;
    let prepared = recovery::prepare(&client, config, session).await?;
    postgres::preflight(
        &client,
        &config.slot,
        &config.publication,
        &config.outbox_tables,
    )
    .await?;
    let tables = modes::prepare(&client, config).await?;
    let state = slot::slot_state(&client, &config.slot).await?;
    let confirmed = state
        .and_then(|state| state.confirmed_flush)
        .unwrap_or(Lsn::ZERO);
    let mut connection = ReplicationConnection::connect(&config.postgres, APPLICATION_NAME).await?;
    let identity = connection.identify_system().await?;
    Ok(Checked {
        client,
        connection,
        identity,
        confirmed,
        prepared,
        tables,
    })
}

/// A name that no other process has, on this machine or another.
fn session_name() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}
