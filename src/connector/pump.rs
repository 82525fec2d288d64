//! The pump: the loop between the replication stream and the pipe, while both are there.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::{Shutdown, TICK_INTERVAL, handover};
use crate::Result;
use crate::feedback::Feedback;
use crate::gulp::{self, Gulp};
use crate::lease::{self, Lease};
use crate::pipe::{Format, Pipe};
use crate::postgres::ReplicationStream;
use crate::pulsar::Flush;
use crate::scanner::delivered::Verdict;
use crate::scanner::keeper::Keeper;
use crate::scanner::streamed::StreamedRuns;

/// Why the pump stopped without an error.
pub(super) enum Stopped {
    /// Told to stop, and between two transactions unless one takes too long to arrive.
    Shutdown {
        told_at: Instant,
    },
    NeedsText,
    /// Rows that the stream left out were found; between two transactions.
    Missing,
    AskCatalog,
}

/// The loop between the two sides. Told to stop, it goes on for at most `finish_transaction`.
///
/// Every branch of its select is cancel safe: `lost` waits for a change of a value, `next_event` is a channel receive, `fill` and `flush` keep their state in the
/// stream, the rest are timers.
pub(super) async fn pump<F: Future<Output = ()>>(
    pipe: &mut Pipe,
    stream: &mut ReplicationStream,
    feedback: &mut Feedback,
    mut keeper: Option<&mut Keeper>,
    lease: &Lease,
    finish_transaction: Duration,
    mut shutdown: Shutdown<'_, F>,
) -> Result<Stopped> {
    let mut gulp = Gulp::new(stream.gulp_pause())?;
    let mut lost = pin!(lease.lost());
    let mut tick_at = Instant::now() + TICK_INTERVAL;
    // Set when told to stop: the transaction that is arriving is taken to its end, so that no row of it comes again.
    let mut told_at: Option<Instant> = None;
    // Set when the keeper found rows that the stream left out. That transaction is taken to its end as well.
    let mut is_missing = keeper.as_ref().is_some_and(|keeper| keeper.found_missing());
    loop {
        // All that can be done without waiting: receipts first, they make room.
        while let Some(event) = pipe.try_next_event() {
            pipe.event(event)?;
        }
        // Read on only when all that was read is taken. Asked once a round: room may come by time alone.
        let mut taken = false;
        while pipe.has_room() {
            if let Some(told_at) = told_at.filter(|_| pipe.is_whole()) {
                return Ok(Stopped::Shutdown { told_at });
            }
            if is_missing && pipe.is_whole() {
                return Ok(Stopped::Missing);
            }
            let Some(frame) = stream.next_frame()? else {
                taken = true;
                break;
            };
            let (format, reply_requested) = pipe.frame(frame)?;
            match format {
                Format::Fits => {}
                Format::NeedsText => return Ok(Stopped::NeedsText),
                Format::AskCatalog => return Ok(Stopped::AskCatalog),
            }
            feedback.wanted |= reply_requested;
        }
        // What it says of the past the next reading of the catalogue has answered already.
        if stream.take_publication_missed() && pipe.is_ahead_of_catalog() {
            return Ok(Stopped::AskCatalog);
        }
        let late = pipe.lateness();
        gulp.arrived(late, pipe.is_in_transaction())?;
        // In a pause the next rows are waited for: a batch may wait as well.
        let due = if gulp.is_backlog() || gulp.is_pausing() && pipe.is_in_transaction() {
            Flush::Backlog(late.saturating_sub(gulp::LATE))
        } else {
            Flush::Due
        };
        pipe.publisher().flush(due);
        let now = Instant::now();
        feedback.progress(pipe, now);
        let is_due = feedback.is_due(now);
        if is_due {
            feedback.tell(pipe, stream);
        }
        if let Some(keeper) = keeper.as_deref()
            && (is_due
                || pipe
                    .streamed()
                    .is_some_and(|rows| rows.len() >= StreamedRuns::MANY))
        {
            keeper.hand_over(|| handover(pipe));
        }
        if now >= tick_at {
            pipe.tick(now);
            pipe.metering();
            tick_at = now + TICK_INTERVAL;
        }

        let stop_by = told_at.map(|told_at| told_at + finish_transaction);
        if let Some(told_at) = told_at
            && (stop_by <= Some(now) || pipe.is_whole())
        {
            return Ok(Stopped::Shutdown { told_at });
        }
        if is_missing && pipe.is_whole() {
            return Ok(Stopped::Missing);
        }

        let unsent = stream.has_unsent_status();
        let flush_at = pipe.publisher().next_flush();
        tokio::select! {
            biased;
            // 1. Told to stop.
            () = shutdown.as_mut(), if told_at.is_none() => told_at = Some(Instant::now()),
            // 2. The lock on the slot is gone: another instance may have it.
            () = lost.as_mut() => return Err(lease::lost()),
            // 3. Receipts make room and move the confirmed LSN.
            event = pipe.next_event() => pipe.event(event)?,
            // 4. Something is wrong with what the stream brings.
            verdict = verdict(keeper.as_deref_mut()), if !is_missing => match verdict {
                Verdict::Missing => is_missing = true,
                Verdict::Failed(error) => return Err(error),
            },
            // 5. Status updates, also while intake is paused: without them the server would close the connection.
            () = sleep_until(feedback.next.min(tick_at).min(stop_by.unwrap_or(tick_at))) => {}
            // 6. A batch has waited long enough.
            () = sleep_until(flush_at.unwrap_or(now)), if flush_at.is_some() => {}
            // 7. The log, while there is room for it and under backlog in gulps; else only the status that is queued.
            filled = intake(&mut gulp, stream, taken), if taken || unsent => {
                if let Some(bytes) = filled? {
                    gulp.took(bytes, stream.is_full())?;
                }
            }
        }
    }
}

/// The keeper's next verdict; pending for ever without a keeper. Cancel safe.
async fn verdict(keeper: Option<&mut Keeper>) -> Verdict {
    match keeper {
        Some(keeper) => keeper.verdict().await,
        None => std::future::pending().await,
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
    if gulp.is_pausing() {
        stream.flush().await?;
        gulp.wait().await?;
    }
    stream.fill().await.map(Some)
}
