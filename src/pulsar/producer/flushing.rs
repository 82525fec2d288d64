//! When a batch is sent.
//!
//! A batch goes when it is full; when its lane has no batch without receipt (an idle pipe never waits); when it has waited for
//! the linger time. Under load a lane always has a batch under way, so batches grow by themselves. One that is not full waits
//! in any case while its lane has no producer, or eight batches without receipt: an outage ends with few large batches, not
//! with one for each event. Such a lane leaves `filling`; a receipt or its producer brings the batch on, so that nothing is
//! stuck.
//!
//! While rows come in numbers or late, or more of their transaction is on its way ([`Flush::Backlog`]), only the first counts, and
//! a linger time that grows: as long as a receipt takes, and a quarter of what is counted as late ([`crate::gulp::LATE`] is not).
//! Every entry costs the broker the same however many messages it holds, so fewer and larger ones end a backlog sooner; and a
//! broker that gets slow is given fewer, by itself.

use std::time::Duration;

use tokio::time::Instant;

use super::lane::Lane;
use super::{Now, Producer};

/// Which open batches [`Producer::flush`] seals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Those whose lane has nothing under way, and those that have waited for the linger time.
    Due,
    /// While rows come in numbers, or late by this much, or more of a transaction is on its way: only those that have waited for
    /// as long as a receipt takes, and for a part of that.
    Backlog(Duration),
    /// All.
    All,
}

/// The part of how late its events are that a batch may wait in a backlog.
const BACKLOG_WAIT: u32 = 4;
/// The longest wait in a backlog: at full speed a lane's batch is full before that.
const BACKLOG_MAX_WAIT: Duration = Duration::from_millis(64);

impl Producer {
    /// Seals the open batches that are due. Call when there is nothing more to read at once, with [`Flush::Due`].
    pub(in crate::pulsar) fn flush(&mut self, what: Flush, now: Now) {
        self.now = now;
        self.flush_now(what);
    }

    pub(super) fn flush_now(&mut self, what: Flush) {
        let linger = self.settings.batch_linger;
        self.backlog = matches!(what, Flush::Backlog(_));
        self.linger = match what {
            Flush::Due | Flush::All => linger,
            Flush::Backlog(late) => backlog_linger(linger, late, self.receipt_delay),
        };
        let due = self.now.at.checked_sub(self.linger);
        for _ in 0..self.filling.len() {
            let Some(id) = self.filling.pop_front() else {
                return;
            };
            let lane = &self.lanes[id];
            let Some(since) = lane.open_since() else {
                continue;
            };
            if what != Flush::All && !lane.takes_part_batches() {
                // Not looked at again until a receipt brings it back, or a producer that opens takes all.
                continue;
            }
            let quiet = what == Flush::Due && lane.is_quiet();
            if what == Flush::All || quiet || due.is_some_and(|due| since <= due) {
                self.with_lane(id, Lane::seal);
            } else {
                self.filling.push_back(id);
            }
        }
    }

    /// When the oldest open batch has waited long enough; `None` when there is none.
    pub(in crate::pulsar) fn next_flush(&self) -> Option<Instant> {
        let since = self
            .filling
            .iter()
            .filter(|&&id| self.lanes[id].takes_part_batches())
            .find_map(|&id| self.lanes[id].open_since());
        since.map(|since| since + self.linger)
    }
}

/// How long a batch may wait in a backlog, when events are this `late` and their `receipt` takes this long after that.
fn backlog_linger(linger: Duration, late: Duration, receipt: Duration) -> Duration {
    if linger.is_zero() {
        return linger;
    }
    (late / BACKLOG_WAIT + receipt).clamp(linger, linger.max(BACKLOG_MAX_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_millis(1);

    #[test]
    fn a_batch_waits_in_a_backlog_and_no_longer_than_it_takes_to_fill() {
        let ms = Duration::from_millis;
        let of = |late, receipt| backlog_linger(LINGER, ms(late), ms(receipt));
        assert_eq!(of(0, 0), LINGER);
        assert_eq!(of(2, 0), LINGER);
        assert_eq!(of(40, 3), ms(13));
        assert_eq!(of(60_000, 3), ms(64));
        assert_eq!(of(0, 500), ms(64));
        assert_eq!(
            backlog_linger(Duration::ZERO, ms(9000), ms(3)),
            Duration::ZERO
        );
        assert_eq!(backlog_linger(ms(100), ms(9000), ms(3)), ms(100));
    }
}
