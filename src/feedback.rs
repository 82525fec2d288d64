//! `Feedback`: when the walsender is told how far we are, and what it is told.
//!
//! Input: the pipe's flush LSN (which only [`crate::ack`] decides) and the walsender's wishes. Output: status updates on the
//! stream, at a timer, on request, and soon after progress; and the same figures as [`Progress`] for whoever watches.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::Lsn;
use crate::pipe::{Counters, Pipe};
use crate::postgres::{ReplicationStream, StandbyStatus};

/// How soon after progress the walsender hears of it. Each update may cost the server a write of the slot's state file, so
/// not every receipt; a tenth of a second keeps `confirmed_flush_lsn` fresh enough for people and for a fast shutdown.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How far the connector is, for whoever watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// A stream is open.
    pub streaming: bool,
    /// What passed through so far.
    pub counters: Counters,
    /// The last position told to the walsender.
    pub confirmed: Lsn,
    /// Events without receipt.
    pub in_flight_messages: usize,
    /// Their encoded bytes.
    pub in_flight_bytes: usize,
}

/// When the walsender is told how far we are, and what.
pub(crate) struct Feedback {
    interval: Duration,
    /// When the next update is due by the timer.
    pub(crate) next: Instant,
    last: Instant,
    last_flush: Lsn,
    progress: watch::Sender<Progress>,
    /// The server asked for a reply.
    pub(crate) wanted: bool,
}

impl Feedback {
    pub(crate) fn new(interval: Duration, progress: watch::Sender<Progress>) -> Self {
        let now = Instant::now();
        Self {
            interval,
            next: now,
            last: now,
            last_flush: Lsn::ZERO,
            progress,
            wanted: false,
        }
    }

    /// Progress that was not reported yet is reported soon.
    pub(crate) fn progress(&mut self, pipe: &mut Pipe, now: Instant) {
        if pipe.flush_lsn() > self.last_flush {
            self.next = self.next.min((self.last + PROGRESS_INTERVAL).max(now));
        }
    }

    /// What the walsender was told last, if anything.
    pub(crate) fn told(&self) -> Option<Lsn> {
        Some(self.last_flush).filter(|told| *told > Lsn::ZERO)
    }

    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.wanted || now >= self.next
    }

    /// Queues a status update: written is what was received, flushed and applied what was acknowledged.
    pub(crate) fn tell(&mut self, pipe: &mut Pipe, stream: &mut ReplicationStream) {
        let flush = pipe.flush_lsn();
        assert!(
            flush >= self.last_flush,
            "the confirmed LSN fell from {} to {flush}",
            self.last_flush
        );
        let write = pipe.received().max(flush);
        stream.queue_status(StandbyStatus {
            write,
            flush,
            apply: flush,
            reply_requested: false,
        });
        self.last_flush = flush;
        self.last = Instant::now();
        self.next = self.last + self.interval;
        self.wanted = false;
        pipe.metering();
        let (in_flight_messages, in_flight_bytes) = pipe.publisher().in_flight();
        self.progress.send_replace(Progress {
            streaming: true,
            counters: pipe.counters(),
            confirmed: flush,
            in_flight_messages,
            in_flight_bytes,
        });
    }
}

impl Drop for Feedback {
    fn drop(&mut self) {
        self.progress
            .send_modify(|progress| progress.streaming = false);
    }
}
