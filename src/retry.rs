//! Pauses between attempts: exponential, with jitter, without an end.
//!
//! Owns the only use of the `backoff` crate (old and unmaintained; see `deny.toml`), so that it can be replaced here
//! and nowhere else. Callers own one [`Backoff`] for each thing they retry and call [`Backoff::reset`] when it worked.

use std::time::Duration;

use backoff::backoff::Backoff as _;
use backoff::{ExponentialBackoff, ExponentialBackoffBuilder};

/// Each pause doubles until the longest is reached.
const MULTIPLIER: f64 = 2.0;

/// A pause is spread over half to one and a half of its length, so that many connectors do not come back at once.
const JITTER: f64 = 0.5;

/// The pauses of one thing that is retried for ever.
#[derive(Debug)]
pub struct Backoff {
    inner: ExponentialBackoff,
    max: Duration,
}

impl Backoff {
    /// Begins at about `initial` and never pauses longer than `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        let inner = ExponentialBackoffBuilder::new()
            .with_initial_interval(initial.min(max))
            .with_max_interval(max)
            .with_multiplier(MULTIPLIER)
            .with_randomization_factor(JITTER)
            // The crate gives up after 15 minutes unless told otherwise.
            .with_max_elapsed_time(None)
            .build();
        Self { inner, max }
    }

    /// How long to wait before the next attempt; longer each time, never above the maximum.
    pub fn next_delay(&mut self) -> Duration {
        // The crate jitters the longest pause upwards too; `None` cannot come without an elapsed-time limit.
        self.inner
            .next_backoff()
            .map_or(self.max, |delay| delay.min(self.max))
    }

    /// The attempt worked: the next failure starts from the initial pause again.
    pub fn reset(&mut self) {
        self.inner.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIAL: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(10);

    #[test]
    fn pauses_double_within_their_jitter_up_to_the_maximum() {
        let mut backoff = Backoff::new(INITIAL, MAX);
        let mut middle = INITIAL;
        for attempt in 0..20 {
            let delay = backoff.next_delay();
            // One nanosecond of slack for the crate's floating point.
            let (low, high) = (middle / 2, middle * 3 / 2 + Duration::from_nanos(1));
            assert!(
                delay >= low && delay <= high.min(MAX),
                "{attempt}: {delay:?}"
            );
            middle = (middle * 2).min(MAX);
        }
    }

    #[test]
    fn it_never_gives_up_and_never_exceeds_the_maximum() {
        let mut backoff = Backoff::new(Duration::from_nanos(1), Duration::from_millis(1));
        for _ in 0..10_000 {
            assert!(backoff.next_delay() <= Duration::from_millis(1));
        }
    }

    #[test]
    fn reset_starts_from_the_beginning() {
        let mut backoff = Backoff::new(INITIAL, MAX);
        for _ in 0..20 {
            backoff.next_delay();
        }
        backoff.reset();
        assert!(backoff.next_delay() <= INITIAL * 3 / 2 + Duration::from_nanos(1));
    }

    #[test]
    fn an_initial_pause_above_the_maximum_is_cut() {
        let mut backoff = Backoff::new(MAX, INITIAL);
        assert!(backoff.next_delay() <= INITIAL);
    }

    #[test]
    fn pauses_differ_between_instances() {
        let first = |_| Backoff::new(MAX, MAX).next_delay();
        let delays: std::collections::HashSet<Duration> = (0..50).map(first).collect();
        assert!(delays.len() > 1, "no jitter: {delays:?}");
    }
}
