//! The connector: opens both sides, runs the loop between them, restarts what breaks, and drains at the end.
//!
//! One task runs everything here. It owns the replication socket (through [`ReplicationStream`]) and the [`Pipe`]; broker
//! sockets belong to tasks of their own, which it hears through the publisher's event channel.
//!
//! # Restarting either half
//!
//! * **Pulsar** breaks: the lanes keep their frames, openers reconnect with backoff, and the same frames are sent again in
//!   order. The replication connection stays; when the in-flight limits are reached nothing more is read from it, while
//!   status updates go on by their timer. (Over TCP they may not arrive: see below.)
//! * **Postgres** breaks: the stream starts again at the confirmed LSN. What Postgres then repeats the pipe knows and skips (see
//!   [`crate::pipe`]). As long as the session that holds the lock on the slot answers, what was received goes on to the broker; without it
//!   nothing is written there, because another instance may have the slot ([`crate::lease`]). Where Postgres stays away the publisher is closed when
//!   everything has its receipt, and the pipe with its knowledge stays; at the latest after [`CLOSE_BY`] the pipe is dropped, and what it
//!   held comes again from the log. A successor finds its producers' names free.
//!
//! # Status updates over TCP while nothing is read
//!
//! Linux can starve them. When a receive buffer that may grow no more is full of small segments, the next one is dropped and
//! the window shut, with that one outside of it. If it is shorter than the unit in which the server's side counts its
//! window (1 KiB where `tcp_rmem` allows 32 MB, 128 bytes with the default 6 MB), all that side sends then carries a
//! sequence number beyond the window, also its bare ACKs, and our side drops them: the status update that is on its way is
//! sent again at doubling intervals, none after it is sent at all, and the walsender gives up after `wal_sender_timeout`.
//! (Seen on Linux 6.18: `TCPRcvQDrop` in `nstat`, 34 bytes unacknowledged in `ss -ti`. A smaller `SO_RCVBUF` makes it more
//! frequent, and `TCP_WINDOW_CLAMP` does not limit what is queued.) It ends when enough is read for the window to open. So
//! over TCP an intake that is paused for longer than `wal_sender_timeout` or our `tcp_user_timeout` (60 s both) may cost a new
//! connection, which repeats nothing to the broker. A Unix socket has no window.
//!
//! # Stopping
//!
//! On shutdown the transaction that is arriving is taken to its end (for at most half of the grace period); on an event that
//! cannot be published intake ends at once. Then what is in flight gets its receipts within the grace period, and a last
//! status update confirms it. What has no receipt by then is not confirmed and comes again. A stream that is lost meanwhile is
//! not made anew: Postgres resends everything after the confirmed LSN.

mod opening;
mod publishing;
mod pump;
mod unreadable;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use crate::config::{Config, Mode};
use crate::feedback::Feedback;
pub use crate::feedback::Progress;
use crate::lease::{self, CLOSE_BY, Hold, Lease, PATIENCE};
use crate::meter::{Meter, Phase, Side, Troubles};
use crate::pipe::Pipe;
use crate::postgres::{self, ReplicationStream, SystemIdentity};
use crate::pulsar::{Flush, Publisher, PublisherConfig};
use crate::retry::Backoff;
use crate::scanner::handover::{Carried, Handover};
use crate::scanner::keeper::Keeper;
use crate::scanner::modes::Modes;
use crate::scanner::name_mark::NameMark;
use crate::scanner::poll;
use crate::scanner::progress::{self, Claim};
use crate::scanner::recovery::{self, Session};
use crate::scanner::streamed::StreamedRuns;
use crate::{Error, Lsn, Result};
pub(crate) use publishing::{diversion, publisher_config, routing, subscription};
use pump::{Stopped, pump};
use unreadable::{Remedy, Repeats, Unreadable};

/// How often the publisher looks at the clock: send deadlines, idle producers, growing topics.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// SQLSTATE of a slot that another process streams.
const OBJECT_IN_USE: &str = "55006";
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
    let mut shutdown = pin!(lasting(shutdown));
    let session = Session {
        name: session_name(),
        told: None,
        unreadable: None,
        is_behind: Arc::default(),
    };
    if config.mode == Mode::Poll {
        return Box::pin(poll::run(config, session, meter, shutdown)).await;
    }
    let mut connector = Connector {
        config,
        progress,
        meter,
        pipe: None,
        binary: true,
        session,
        lease: Lease::new(),
        hold: None,
        publishing: None,
        is_closed: false,
        claimed: None,
        keeper: None,
        left: None,
        modes: Modes::default(),
        mark: NameMark::default(),
        unreadable: Unreadable::default(),
        repeats: Repeats::default(),
    };
    let ended = keep_streaming(&mut connector, shutdown.as_mut()).await;
    // The lock is held until the mark is stored.
    connector.mark.end(ended, shutdown).await
}

/// Opens, streams, and opens again.
async fn keep_streaming<F: Future<Output = ()>>(
    connector: &mut Connector,
    mut shutdown: Shutdown<'_, F>,
) -> Result<()> {
    let mut backoff = Backoff::new(
        connector.config.reconnect_initial,
        connector.config.reconnect_max,
    );
    loop {
        let opened = Box::pin(connector.open(shutdown.as_mut())).await;
        let error = match opened {
            Ok(None) => return connector.stopped_without_stream().await,
            Ok(Some(stream)) => {
                if !connector.repeats.has_some() {
                    backoff.reset();
                }
                match connector.stream(stream, shutdown.as_mut()).await? {
                    Ended::Shutdown => return Ok(()),
                    Ended::NeedsText => {
                        connector.binary = false;
                        continue;
                    }
                    Ended::Missing | Ended::AskCatalog => continue,
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
        match connector.attend(sleep(delay), shutdown.as_mut()).await {
            Ok(Some(())) => {}
            Ok(None) => return connector.stopped_without_stream().await,
            // Another instance has the slot: opening finds it.
            Err(error) if error.is_temporary() => {}
            Err(error) => return Err(error),
        }
    }
}

/// A future that may be awaited again after its end, and is then over at once: who stops in the middle of something that fails
/// asks again.
fn lasting(future: impl Future<Output = ()>) -> impl Future<Output = ()> {
    let (mut future, mut is_over) = (Box::pin(future), false);
    poll_fn(move |context| {
        if !is_over {
            ready!(future.as_mut().poll(context));
            is_over = true;
        }
        Poll::Ready(())
    })
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
    /// Rows that the stream left out are to be published before it goes on.
    Missing,
    /// The catalogue is to be read again before the stream goes on.
    AskCatalog,
    /// Postgres went away, or another process has claimed the slot.
    Lost(Error),
}

/// What a stream of this process leaves behind for the next one.
struct Left {
    /// The log that it read.
    log: SystemIdentity,
    /// The slot stands there, or will when the walsender has taken the last status update.
    confirmed: Lsn,
    carried: Carried,
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
    /// Whether this process may write to brokers.
    lease: Lease,
    /// The session that holds the lock on the slot, while there is a stream.
    hold: Option<Hold>,
    /// What the pipe's publisher was made of.
    publishing: Option<PublisherConfig>,
    /// The pipe's publisher was closed, and the one in its place has not been connected.
    is_closed: bool,
    /// The right to change the slot's row in `walpost.progress`.
    claimed: Option<Claim>,
    /// Notes what is delivered; beside a pipe, while there is a `walpost.progress`.
    keeper: Option<Keeper>,
    /// What the last stream left when it ended so that missing rows can be published.
    left: Option<Left>,
    /// What works on the tables beside the stream.
    modes: Modes,
    /// Whether another process may use the names of this one's producers.
    mark: NameMark,
    unreadable: Unreadable,
    repeats: Repeats,
}

impl Connector {
    /// Drops the in-flight batches: another instance owns the slot now, or they come again.
    fn drop_pipe(&mut self) {
        (self.pipe, self.keeper) = (None, None);
        self.is_closed = false;
        self.meter.set_in_flight((0, 0), 0);
        self.meter.set_troubles(Troubles::default());
    }

    /// The pipe that opening has made.
    ///
    /// # Errors
    /// Temporary where it was dropped since, because the lease was lost for too long ([`Self::give_way`]).
    fn pipe(&mut self) -> Result<&mut Pipe> {
        match &mut self.pipe {
            Some((_, pipe)) => Ok(pipe),
            None => Err(lease::lost()),
        }
    }

    /// Closes the publisher when Postgres has been lost for so long that another instance may want its producers' names.
    fn give_way(&mut self, now: Instant) {
        let (Some(since), Some((_, pipe))) = (self.lease.lost_since(), &mut self.pipe) else {
            return;
        };
        let unfinished = pipe.unfinished();
        if self.is_closed || now < since + PATIENCE || unfinished > 0 && now < since + CLOSE_BY {
            return;
        }
        // In the middle of a transaction a new publisher would count its events from the beginning.
        if let Some(config) = self
            .publishing
            .clone()
            .filter(|_| unfinished == 0 && pipe.is_whole())
        {
            info!(
                "Postgres is away: the producers are closed, so that another instance can open them"
            );
            pipe.renew_publisher(Publisher::under(config, &self.lease));
            self.is_closed = true;
        } else {
            warn!(
                events = unfinished,
                "Postgres is away: the producers are closed, so that another instance can open them; events without a receipt come again from the log"
            );
            self.drop_pipe();
        }
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
            self.give_way(Instant::now());
            let lost_since = self.lease.lost_since().filter(|_| !self.is_closed);
            let close_at = lost_since.map_or(tick_at, |since| since + CLOSE_BY);
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
                () = sleep_until(tick_at.min(close_at)) => {
                    pipe.tick(Instant::now());
                    pipe.metering();
                    tick_at = Instant::now() + TICK_INTERVAL;
                }
            }
        }
    }

    /// The same for work that has a deadline, and that a stop may not cut short: the next start would take the stream for one that ended badly.
    async fn attend_on<T>(&mut self, work: impl Future<Output = T>) -> Result<T> {
        let never = pin!(std::future::pending::<()>());
        let done = self.attend(work, never).await?;
        done.ok_or_else(|| Error::bug("what never comes has come"))
    }

    /// Stops while Postgres is away: it resends everything after the confirmed LSN.
    async fn stopped_without_stream(&mut self) -> Result<()> {
        // A gap scan that was cut short has published rows, too.
        self.modes.drain(self.config.shutdown_grace).await;
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
        let mut feedback = Feedback::new(self.config.status_interval, self.progress.clone());
        let mut keeper = self.keeper.take();
        let lease = self.lease.clone();
        let ended = pump(
            self.pipe()?,
            &mut stream,
            &mut feedback,
            keeper.as_mut(),
            &lease,
            grace / 2,
            shutdown.as_mut(),
        )
        .await;
        self.keeper = keeper;
        let is_stuck = ended
            .as_ref()
            .is_err_and(|error| self.repeats.is_stuck(error));
        let pipe = self.pipe()?;
        let ended = ended.map_err(|error| pipe.locate(error, is_stuck));
        pipe.streaming(false);
        // A stream that ended before its first status update has told nothing: what the one before told still holds.
        self.session.told = feedback.told().or(self.session.told);
        match ended {
            Ok(Stopped::Shutdown { told_at }) => {
                self.meter.set_phase(Phase::Stopping);
                info!("stopping: no more intake, waiting for receipts");
                self.stop(stream, feedback, told_at + grace).await?;
                self.note_stop().await;
                Ok(Ended::Shutdown)
            }
            Ok(Stopped::Missing) => self.end_for_missing(stream, feedback, shutdown).await,
            Ok(Stopped::NeedsText) => {
                self.close_lost(stream, shutdown).await?;
                Ok(Ended::NeedsText)
            }
            Ok(Stopped::AskCatalog) => {
                self.close_lost(stream, shutdown).await?;
                Ok(Ended::AskCatalog)
            }
            Err(error) if error.is_temporary() => {
                self.close_lost(stream, shutdown).await?;
                Ok(Ended::Lost(error))
            }
            // pgoutput sends every column of every table in the publication, and knows one format for all of them.
            Err(error) if self.binary && postgres::is_without_binary_form(&error) => {
                info!(
                    "starting the stream again with values as text: {}",
                    error.told().0
                );
                self.close_lost(stream, shutdown).await?;
                Ok(Ended::NeedsText)
            }
            Err(error) => {
                let transactions = self.pipe()?.counters().transactions;
                match self.unreadable.judge(&error, transactions) {
                    Remedy::None => {}
                    remedy => {
                        warn!("opening again: {}", error.report());
                        if let Remedy::RemakeSlot(why) = remedy {
                            self.session.unreadable = Some(why);
                        }
                        self.close_lost(stream, shutdown).await?;
                        return Ok(Ended::AskCatalog);
                    }
                }
                let error = if postgres::is_unreadable(&error) {
                    unreadable::by_hand(error, &self.config.slot)
                } else {
                    error
                };
                // Nothing passes the event that cannot be published, and what is before it is confirmed.
                match self.stop(stream, feedback, Instant::now() + grace).await {
                    Ok(()) => self.note_stop().await,
                    Err(incomplete) => warn!("{}", incomplete.report()),
                }
                Err(error)
            }
        }
    }

    /// Ends what there may be of a stream that is lost: where only the lock's session is gone the walsender is still there.
    async fn close_lost<F: Future<Output = ()>>(
        &mut self,
        stream: ReplicationStream,
        shutdown: Shutdown<'_, F>,
    ) -> Result<()> {
        match self.attend(stream.close(), shutdown).await {
            Err(error) if !error.is_temporary() => Err(error),
            // Opening tells the rest.
            _ => Ok(()),
        }
    }

    /// Rows that the stream left out were found. It ends when everything that it brought has its receipt and is confirmed, so that it
    /// brings nothing twice; opening again publishes them.
    async fn end_for_missing<F: Future<Output = ()>>(
        &mut self,
        mut stream: ReplicationStream,
        mut feedback: Feedback,
        mut shutdown: Shutdown<'_, F>,
    ) -> Result<Ended> {
        info!("the stream ends, so that rows it left out can be published from the table");
        let grace = self.config.shutdown_grace;
        let lease = self.lease.clone();
        let pipe = self.pipe()?;
        while pipe.unfinished() > 0 {
            pipe.publisher().flush(Flush::All);
            tokio::select! {
                biased;
                () = shutdown.as_mut() => {
                    self.stop(stream, feedback, Instant::now() + grace).await?;
                    self.note_stop().await;
                    return Ok(Ended::Shutdown);
                }
                () = lease.lost() => {
                    self.session.told = feedback.told().or(self.session.told);
                    self.close_lost(stream, shutdown).await?;
                    return Ok(Ended::Lost(lease::lost()));
                }
                event = pipe.next_event() => match pipe.event(event) {
                    Err(error) if error.is_temporary() => {
                        self.session.told = feedback.told().or(self.session.told);
                        return Ok(Ended::Lost(error));
                    }
                    booked => booked?,
                },
                () = sleep_until(feedback.next) => {
                    feedback.tell(pipe, &mut stream);
                    pipe.tick(Instant::now());
                    // What it does not take now it takes with the next.
                    if let Ok(Err(error)) = timeout(GOODBYE, stream.flush()).await {
                        self.session.told = feedback.told().or(self.session.told);
                        return Ok(Ended::Lost(error));
                    }
                }
            }
        }
        feedback.tell(pipe, &mut stream);
        self.session.told = feedback.told().or(self.session.told);
        if let Err(error) = stream.close().await {
            warn!("{}", error.report());
        }
        // A process that is killed or stopped before the next stream leaves the counts to its successor.
        self.note_stop().await;
        self.drop_pipe();
        Ok(Ended::Missing)
    }

    /// Ends the task that notes what is delivered, and keeps what the stream brought since then.
    async fn end_keeper(&mut self) -> Option<Left> {
        let (identity, pipe) = self.pipe.as_mut()?;
        let keeper = self.keeper.take()?;
        // Rows of a transaction that was cut are counted, and the next stream brings them again.
        let is_whole = pipe.is_whole();
        let finishing = keeper.finish(handover(pipe));
        let carried = timeout(GOODBYE, finishing).await.ok()?;
        is_whole.then(|| Left {
            log: identity.clone(),
            confirmed: pipe.flush_lsn(),
            carried,
        })
    }

    /// Notes what the slot was told last, so that the next start can tell whether it still is the same slot, and what the stream brought
    /// since the last note.
    async fn note_stop(&mut self) {
        let left = self.end_keeper().await;
        let confirmed = self.pipe.as_mut().map(|(_, pipe)| pipe.flush_lsn());
        let (Some(confirmed), Some(hold), Some(claim)) =
            (confirmed, &self.hold, self.claimed.take())
        else {
            return;
        };
        let tables = &self.config.outbox_tables;
        let streamed = left
            .as_ref()
            .and_then(|left| left.carried.to_json(tables, left.confirmed));
        let noting = progress::stopped(hold.client(), &claim, confirmed, streamed.as_deref());
        if let Ok(Err(error)) = timeout(GOODBYE, noting).await {
            warn!("{}", error.report());
        }
        self.left = left;
    }

    /// The last steps: receipts, final status update, goodbye.
    async fn stop(
        &mut self,
        mut stream: ReplicationStream,
        mut feedback: Feedback,
        by: Instant,
    ) -> Result<()> {
        let lease = self.lease.clone();
        let pipe = self.pipe()?;
        // Half of what is left, should that be less than the goodbye takes.
        let now = Instant::now();
        let left = by.saturating_duration_since(now);
        let deadline = now + left.saturating_sub(GOODBYE).max(left / 2);
        let mut failure = None;
        while pipe.unfinished() > 0 && Instant::now() < deadline && failure.is_none() {
            // Without the lease nothing more is sent, and others wait for the producers.
            let lost_since = lease.lost_since();
            if lost_since.is_some_and(|since| Instant::now() >= since + CLOSE_BY) {
                break;
            }
            // Again after each event: it may have let held events go into their lanes.
            pipe.publisher().flush(Flush::All);
            tokio::select! {
                biased;
                event = pipe.next_event() => failure = pipe.event(event).err(),
                () = sleep_until(feedback.next) => {
                    feedback.tell(pipe, &mut stream);
                    let _lost = timeout(GOODBYE, stream.flush()).await;
                    pipe.tick(Instant::now());
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
        match failure {
            // Why there will be no receipt.
            Some(failure) => Err(failure),
            None if missing > 0 => Err(unfinished(missing)),
            None => Ok(()),
        }
    }
}

/// What the pipe has to say to the task that notes what is delivered.
fn handover(pipe: &mut Pipe) -> Handover {
    let rows = pipe.streamed().map(StreamedRuns::take);
    let counters = pipe.counters();
    Handover {
        rows: rows.unwrap_or_default(),
        // After the rows: see the keeper.
        confirmed: pipe.flush_lsn(),
        done: counters.acknowledged + counters.stragglers,
    }
}

fn unfinished(missing: usize) -> Error {
    Error::temporary(format!(
        "{missing} events had no receipt when the time to stop was up"
    ))
    .hint("they are not confirmed and will be sent again; WALPOST_SHUTDOWN_GRACE gives more time")
}

/// A name that no other process has, on this machine or another.
fn session_name() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:016x}", RandomState::new().hash_one(std::process::id()))
}
