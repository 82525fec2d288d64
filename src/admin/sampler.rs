//! Once a second: is there progress, how late is it, what is the history; the last warnings.
//!
//! Input: the meter, what the observer saw, the queue of warnings. Output: one [`View`], changed in place.
//!
//! # Lag in seconds
//!
//! How long ago the log ended where it is confirmed now: everything that was in the log at that time is delivered. Taken from
//! readings of the end of the log, so it is exact to the observer's two seconds, needs nothing of the events, and holds as
//! well while nothing streams at all. Zero when everything is confirmed.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::health::{Health, Readiness, Reading};
use super::observer::Observed;
use crate::Lsn;
use crate::logging::{Warning, Warnings};
use crate::meter::{Meter, Phase};
use crate::upkeep::Work;

const TICK: Duration = Duration::from_secs(1);
/// A sample of the history each so many ticks.
pub(super) const SAMPLE_EVERY: u32 = 2;
/// Fifteen minutes of samples; about 25 KiB.
const SAMPLES: usize = 15 * 60 / SAMPLE_EVERY as usize;
/// Warnings that are shown.
const WARNINGS: usize = 20;
/// Readings of the log's end that are kept; where there are more, every second one goes, and the lag is a little coarser.
const MARKS: usize = 1024;

/// One point of the history.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sample {
    /// Unix time.
    pub(super) at_ms: u64,
    /// Messages with a receipt, since the start.
    pub(super) published: u64,
    pub(super) in_flight: u64,
    /// `None` where Postgres said nothing.
    pub(super) lag_bytes: Option<u64>,
    pub(super) lag_seconds: Option<f64>,
}

/// What the server tells besides the meter and the observation.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) readiness: Readiness,
    pub(super) lag_seconds: Option<f64>,
    pub(super) history: VecDeque<Sample>,
    /// The newest first.
    pub(super) warnings: VecDeque<Warning>,
}

/// Samples for ever.
pub(super) async fn run(
    meter: &Meter,
    observed: watch::Receiver<Observed>,
    mut warnings: Warnings,
    look: watch::Sender<View>,
) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut health = Health::default();
    let mut lag = Lag::default();
    let mut ticks: u32 = 0;
    loop {
        tick.tick().await;
        let seen = observed.borrow().clone();
        let fresh = seen.fresh();
        if let (Some(at), Some(slot)) = (seen.at, &seen.slot) {
            lag.note(at, seen.log_end, slot.confirmed_flush.unwrap_or_default());
        }
        let lag_seconds = fresh
            .and_then(|seen| seen.slot.as_ref())
            .map(|_| lag.at(Instant::now()).as_secs_f64());
        let readiness = health.judge(&reading(meter, fresh));
        let sample = Sample {
            at_ms: unix_ms(SystemTime::now()),
            published: meter.all_published(),
            in_flight: meter.in_flight().0,
            lag_bytes: fresh.and_then(Observed::lag_bytes),
            lag_seconds,
        };
        look.send_modify(|view| {
            while let Ok(warning) = warnings.0.try_recv() {
                view.warnings.push_front(warning);
                view.warnings.truncate(WARNINGS);
            }
            view.readiness = readiness;
            view.lag_seconds = lag_seconds;
            if ticks.is_multiple_of(SAMPLE_EVERY) {
                if view.history.len() == SAMPLES {
                    view.history.pop_front();
                }
                view.history.push_back(sample);
            }
        });
        ticks = ticks.wrapping_add(1);
    }
}

fn reading(meter: &Meter, fresh: Option<&Observed>) -> Reading {
    let phase = meter.phase();
    let counters = meter.counters();
    Reading {
        at: Instant::now(),
        phase,
        // Retried stragglers are published too, and say nothing about the stream.
        delivered: if phase == Phase::Streaming {
            counters.acknowledged + counters.stragglers
        } else {
            meter.all_published()
        },
        unfinished: meter.unfinished(),
        troubles: meter.troubles(),
        marks: meter.upkeep().marks(),
        received: meter.received(),
        log_end: fresh.map(|seen| seen.log_end),
        short_rounds: meter.short_rounds(),
        unread: meter.upkeep().count(Work::Scan),
        is_unnoted: meter.upkeep().count(Work::Note) > 0,
    }
}

/// Unix time in milliseconds.
pub(super) fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// When the log ended where; see the module's documentation.
#[derive(Debug, Default)]
struct Lag {
    /// Rising in both; all beyond what is confirmed, except the first, at which everything was confirmed.
    marks: VecDeque<(Instant, Lsn)>,
    confirmed: Lsn,
}

impl Lag {
    fn note(&mut self, at: Instant, log_end: Lsn, confirmed: Lsn) {
        self.confirmed = confirmed;
        if confirmed >= log_end || self.marks.back().is_some_and(|(_, last)| *last > log_end) {
            // Nothing is late, or another timeline answers.
            self.marks.clear();
        }
        if self.marks.back().is_none_or(|(_, last)| *last != log_end) {
            self.marks.push_back((at, log_end));
        }
        // The last one that is confirmed is the time from which on something is not.
        while self.marks.get(1).is_some_and(|(_, end)| *end <= confirmed) {
            self.marks.pop_front();
        }
        if self.marks.len() > MARKS {
            let mut index = 0;
            self.marks.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
    }

    fn at(&self, now: Instant) -> Duration {
        match (self.marks.front(), self.marks.back()) {
            (Some((since, _)), Some((_, end))) if *end > self.confirmed => {
                now.saturating_duration_since(*since)
            }
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_the_age_of_the_last_moment_at_which_everything_was_confirmed() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut lag = Lag::default();
        assert_eq!(lag.at(at(5)), Duration::ZERO, "nothing is known");
        lag.note(at(0), Lsn::new(100), Lsn::new(100));
        assert_eq!(lag.at(at(5)), Duration::ZERO);
        lag.note(at(10), Lsn::new(100), Lsn::new(100));
        // What came after second 10 is not confirmed.
        lag.note(at(12), Lsn::new(200), Lsn::new(100));
        lag.note(at(14), Lsn::new(300), Lsn::new(100));
        assert_eq!(lag.at(at(20)), Duration::from_secs(10));
        // All of second 12 is.
        lag.note(at(22), Lsn::new(300), Lsn::new(250));
        assert_eq!(lag.at(at(22)), Duration::from_secs(10));
        lag.note(at(24), Lsn::new(300), Lsn::new(300));
        assert_eq!(lag.at(at(30)), Duration::ZERO);
        // Another timeline.
        lag.note(at(31), Lsn::new(50), Lsn::new(40));
        assert_eq!(lag.at(at(33)), Duration::from_secs(2));
    }

    #[test]
    fn hours_without_confirmation_take_bounded_memory_and_keep_their_beginning() {
        let start = Instant::now();
        let mut lag = Lag::default();
        for second in 0..100_000 {
            let at = start + Duration::from_secs(second);
            lag.note(at, Lsn::new(100 + second), Lsn::new(100));
        }
        assert!(lag.marks.len() <= MARKS);
        let now = start + Duration::from_secs(100_000);
        assert_eq!(lag.at(now), Duration::from_secs(100_000));
    }
}
