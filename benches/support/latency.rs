//! Instants that several threads note, one for each event, and percentiles of what lies between them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Nothing was noted.
pub(crate) const NEVER: u64 = u64::MAX;

/// When something happened to each of a run's events: the first time counts.
pub(crate) struct Clock {
    zero: Instant,
    ns: Vec<AtomicU64>,
    noted: AtomicUsize,
}

impl Clock {
    /// For the events 0 to `events` - 1; all clocks that are compared have the same `zero`.
    pub(crate) fn new(zero: Instant, events: usize) -> Self {
        Self {
            zero,
            ns: (0..events).map(|_| AtomicU64::new(NEVER)).collect(),
            noted: AtomicUsize::new(0),
        }
    }

    /// It happened to this event at this instant.
    pub(crate) fn note(&self, event: usize, at: Instant) {
        let ns = at.saturating_duration_since(self.zero).as_nanos();
        if let Some(noted) = self.ns.get(event) {
            let ns = u64::try_from(ns).unwrap_or(NEVER);
            let first = noted.compare_exchange(NEVER, ns, Ordering::Relaxed, Ordering::Relaxed);
            // Release: who sees the count sees the instants.
            self.noted
                .fetch_add(usize::from(first.is_ok()), Ordering::Release);
        }
    }

    /// Nanoseconds since zero; [`NEVER`] when it has not happened.
    pub(crate) fn ns(&self, event: usize) -> u64 {
        self.ns[event].load(Ordering::Relaxed)
    }

    /// True when it has happened to all events.
    pub(crate) fn is_complete(&self) -> bool {
        self.noted.load(Ordering::Acquire) == self.ns.len()
    }
}

/// Latencies in nanoseconds.
#[derive(Default)]
pub(crate) struct Latencies(Vec<u64>);

impl Latencies {
    /// Adds one.
    pub(crate) fn add(&mut self, latency: Duration) {
        self.0
            .push(u64::try_from(latency.as_nanos()).unwrap_or(NEVER));
    }

    /// From one clock to another, of the events from `first` on; an event without either is a panic. What comes before what it is measured from
    /// counts as zero.
    pub(crate) fn between(from: &Clock, to: &Clock, first: usize) -> Self {
        let between = |event| {
            let (from, to) = (from.ns(event), to.ns(event));
            assert!(from != NEVER && to != NEVER, "event {event} is missing");
            to.saturating_sub(from)
        };
        Self((first..from.ns.len()).map(between).collect())
    }

    /// p50, p99 and p99.9 in milliseconds: the smallest value that this share of all does not exceed.
    pub(crate) fn percentiles_ms(mut self) -> [f64; 3] {
        assert!(!self.0.is_empty(), "nothing was measured");
        self.0.sort_unstable();
        [500, 990, 999].map(|permille| {
            let rank = (self.0.len() * permille).div_ceil(1000);
            self.0[rank.max(1) - 1] as f64 / 1e6
        })
    }
}
