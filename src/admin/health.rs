//! When walpost is ready, and when it is alive; pure, from one reading a second.
//!
//! # Ready
//!
//! By progress, not by the state of connections:
//! * events are in flight and for [`PATIENCE`] none of them got its receipt: not ready. A frozen broker keeps its connections;
//!   only this shows it. Where the broker has refused a topic whose events wait, the reason names the topic and the broker's words. Nothing in flight is no trouble: an idle outbox stays ready;
//! * for [`PATIENCE`] there was no stream, or since the start there never was one: not ready;
//! * the log has grown and for [`SILENCE`] the walsender has brought nothing new of it, not even in a keepalive: not ready.
//!   That also holds while intake is paused, say by too many stragglers, and while one huge transaction of somebody else's is
//!   decoded: nothing is delivered meanwhile, whatever the cause;
//! * two comparisons of the tables with the stream in a row found rows that the stream left out: not ready. They were published from the
//!   table, but something keeps them out of the stream;
//! * so many published rows wait to be marked or deleted that the stream waits for them, and for [`PATIENCE`] none of them was: not ready. Rows
//!   that cannot be marked or deleted do not wait; `/status` lists them;
//! * a table cannot be read by a scan or in poll mode: not ready. Its rows wait; those of the other tables do not;
//! * what is delivered could not be noted in `walpost.progress`, twice in a row and for [`PATIENCE`] (a table that may not be read any
//!   more, say): not ready. Events are published, but rows stay `pending`, nothing goes by retention, and nothing is compared;
//! * it is stopping: not ready.
//!
//! **A standby is ready**: it waits for the slot and can take over, which is all that is asked of it. Were it not, a rolling
//! update that waits for the new instance before it ends the old one would wait for ever. Who wants to know which instance
//! works asks `walpost_role` or the word in the answer.
//!
//! # Alive
//!
//! The connector's thread has a timer that fires each second; when it has not for [`HEARTBEAT`], the thread is stuck and only
//! a restart helps. Servers that are away are nothing a restart would mend, so they never count here.

use std::time::{Duration, Instant};

use crate::Lsn;
use crate::meter::{Phase, Troubles};
use crate::upkeep::Marks;

/// Without progress for this long it is not ready. Shorter than what a supervisor gives, longer than a reconnect or a pause
/// of a healthy broker.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// A walsender that has caught up sends keepalives at half of `wal_sender_timeout` (30 s by default).
pub(super) const SILENCE: Duration = Duration::from_secs(60);
/// Thirty beats.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(30);

/// Comparisons in a row with missing rows: one may be a publication that was changed and mended, two are a state.
const SHORT_ROUNDS: u64 = 2;

/// One reading.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) at: Instant,
    pub(super) phase: Phase,
    /// Rises with each event that is published or stored as a straggler.
    pub(super) delivered: u64,
    /// Events that are neither.
    pub(super) unfinished: u64,
    /// Topics that take nothing, because of what the broker said of them.
    pub(super) troubles: Troubles,
    /// Rows on their way from their receipt to their mark.
    pub(super) marks: Marks,
    /// How far the stream has come.
    pub(super) received: Lsn,
    /// Where the log ends, if Postgres said so lately.
    pub(super) log_end: Option<Lsn>,
    /// Comparisons in a row that found rows which the stream left out.
    pub(super) short_rounds: u64,
    /// Tables that cannot be read by a scan.
    pub(super) unread: u64,
    /// Whether the last notes of what is delivered failed.
    pub(super) is_unnoted: bool,
}

/// The answer of `/readyz`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Readiness {
    pub(super) ready: bool,
    /// What it is at, or why it is not ready.
    pub(super) reason: String,
}

impl Default for Readiness {
    fn default() -> Self {
        not("starting: there was no stream yet".to_owned())
    }
}

/// What readings showed so far.
#[derive(Debug, Default)]
pub(super) struct Health {
    delivered: u64,
    received: Lsn,
    /// When there last was progress, or nothing to be done.
    moved_at: Option<Instant>,
    marked: u64,
    /// When rows were last marked or deleted, or there was room for more.
    marked_at: Option<Instant>,
    /// When there last was a stream, or its place was waited for.
    placed_at: Option<Instant>,
    /// When what is delivered could last be noted, as far as is known.
    noted_at: Option<Instant>,
    /// When the walsender last brought something new, or had nothing to bring.
    heard_at: Option<Instant>,
}

impl Health {
    /// Takes the next reading.
    pub(super) fn judge(&mut self, now: &Reading) -> Readiness {
        let at_work = matches!(
            now.phase,
            Phase::Scanning | Phase::Streaming | Phase::Polling
        );
        if now.unfinished == 0 || now.delivered != self.delivered || !at_work {
            self.moved_at = Some(now.at);
        }
        if !now.marks.is_full || now.marks.done != self.marked || !at_work {
            self.marked_at = Some(now.at);
        }
        self.marked = now.marks.done;
        if !now.is_unnoted || !at_work {
            self.noted_at = Some(now.at);
        }
        let at_end = now.log_end.is_none_or(|end| end <= now.received);
        if at_end || now.received != self.received || now.phase != Phase::Streaming {
            self.heard_at = Some(now.at);
        }
        if at_work || now.phase == Phase::Standby {
            self.placed_at = Some(now.at);
        }
        self.delivered = now.delivered;
        self.received = now.received;
        let since = |then: Option<Instant>| then.map_or(Duration::ZERO, |then| now.at - then);
        match now.phase {
            Phase::Stopping => not("stopping: no more intake, waiting for receipts".to_owned()),
            Phase::Standby => yes(
                "standby: another instance has the slot, this one takes over when that one ends",
            ),
            Phase::Connecting => match self.placed_at {
                None => Readiness::default(),
                Some(_) if since(self.placed_at) < PATIENCE => yes("connecting again"),
                Some(_) => not(format!(
                    "no stream for {} s: Postgres is away, or refuses; the last warnings say why",
                    since(self.placed_at).as_secs()
                )),
            },
            // Before the broker: what waits for this may be in flight.
            _ if since(self.marked_at) >= PATIENCE => not(format!(
                "{} published rows wait to be marked or deleted and none was for {} s: the stream waits for them; the last warnings \
                 and the locks in Postgres (pg_locks) say why",
                now.marks.waiting,
                since(self.marked_at).as_secs()
            )),
            _ if since(self.moved_at) >= PATIENCE => not(format!(
                "{} events are in flight and none got its receipt for {} s: {}",
                now.unfinished,
                since(self.moved_at).as_secs(),
                no_receipt_because(now)
            )),
            _ if since(self.heard_at) >= SILENCE => not(format!(
                "the log has grown to {} and nothing beyond {} was received for {} s",
                now.log_end.unwrap_or_default(),
                now.received,
                since(self.heard_at).as_secs()
            )),
            _ if now.short_rounds >= SHORT_ROUNDS => not(format!(
                "the stream left out rows in {} comparisons in a row (they are published from the table): look at the publication's \
                 tables, row filters and publish_via_partition_root (walpost check)",
                now.short_rounds
            )),
            _ if now.unread > 0 => not(format!(
                "{} outbox tables cannot be read, and their rows wait: /status and walpost check say why",
                now.unread
            )),
            _ if since(self.noted_at) >= PATIENCE => not(format!(
                "what is delivered could not be noted for {} s, and rows stay pending: /status, the last warnings and walpost check say why",
                since(self.noted_at).as_secs()
            )),
            phase => yes(phase.name()),
        }
    }
}

/// Whose trouble it is that there are no receipts.
fn no_receipt_because(now: &Reading) -> String {
    let Some(first) = &now.troubles.first_waiting else {
        return "the broker does not answer".to_owned();
    };
    let taken_nothing_for = now.at.saturating_duration_since(first.since).as_secs();
    let more = match now.troubles.count {
        0 | 1 => String::new(),
        count => format!(" ({count} topics are in trouble: see /status)"),
    };
    format!(
        "topic {} has taken nothing for {taken_nothing_for} s: {}{more}",
        first.topic, first.reason
    )
}

fn yes(what: &str) -> Readiness {
    Readiness {
        ready: true,
        reason: what.to_owned(),
    }
}

fn not(reason: String) -> Readiness {
    Readiness {
        ready: false,
        reason,
    }
}

/// Why the process is taken for stuck, if so.
pub(super) fn stuck(since_beat: Duration) -> Option<String> {
    (since_beat >= HEARTBEAT).then(|| {
        format!(
            "the connector's thread has been stuck for {} s",
            since_beat.as_secs()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::TopicTrouble;

    struct Clock {
        health: Health,
        now: Reading,
    }

    impl Clock {
        fn new(phase: Phase) -> Self {
            let now = Reading {
                at: Instant::now(),
                phase,
                delivered: 0,
                unfinished: 0,
                troubles: Troubles::default(),
                marks: Marks::default(),
                received: Lsn::new(100),
                log_end: Some(Lsn::new(100)),
                short_rounds: 0,
                unread: 0,
                is_unnoted: false,
            };
            Self {
                health: Health::default(),
                now,
            }
        }

        /// So many readings, a second apart; the last answer.
        fn seconds(&mut self, count: u64, change: impl Fn(&mut Reading)) -> Readiness {
            let mut last = Readiness::default();
            for _ in 0..count {
                self.now.at += Duration::from_secs(1);
                change(&mut self.now);
                last = self.health.judge(&self.now);
            }
            last
        }
    }

    #[test]
    fn an_idle_stream_is_ready_for_ever() {
        let mut clock = Clock::new(Phase::Streaming);
        assert!(clock.seconds(3600, |_| {}).ready);
    }

    #[test]
    fn events_without_a_receipt_for_ten_seconds_are_not_ready_until_one_comes() {
        let mut clock = Clock::new(Phase::Streaming);
        clock.seconds(100, |_| {});
        assert!(clock.seconds(9, |now| now.unfinished = 5).ready);
        let said = clock.seconds(2, |_| {});
        assert!(!said.ready && said.reason.contains("5 events"), "{said:?}");
        // One of five is progress.
        assert!(clock.seconds(1, |now| now.delivered += 1).ready);
        assert!(clock.seconds(60, |now| now.delivered += 1).ready);
    }

    #[test]
    fn topics_that_the_broker_refuses_are_the_reason_and_not_its_silence() {
        // GIVEN one topic that was refused long ago, and others
        let mut clock = Clock::new(Phase::Streaming);
        let first = TopicTrouble {
            topic: "persistent://p/d/orders".to_owned(),
            since: clock.now.at,
            reason: "the broker refuses it: no".to_owned(),
            is_waiting: true,
        };
        clock.seconds(64, |_| {});

        // WHEN nothing gets a receipt
        let said = clock.seconds(11, |now| {
            now.unfinished = 5;
            now.troubles.count = 1;
            now.troubles.first_waiting = Some(first.clone());
        });

        // THEN that topic is named, with its time and the broker's words
        let expected =
            "topic persistent://p/d/orders has taken nothing for 75 s: the broker refuses it: no";
        assert!(!said.ready && said.reason.ends_with(expected), "{said:?}");
        assert!(!said.reason.contains("does not answer"), "{said:?}");
        let said = clock.seconds(1, |now| now.troubles.count = 3);
        assert!(said.reason.contains("3 topics"), "{said:?}");

        // AND when its events become stragglers, those in flight wait for the broker
        let said = clock.seconds(1, |now| now.troubles.first_waiting = None);
        assert!(
            said.reason.ends_with("the broker does not answer"),
            "{said:?}"
        );
    }

    #[test]
    fn a_log_that_grows_unheard_is_not_ready_after_a_minute() {
        let mut clock = Clock::new(Phase::Streaming);
        clock.seconds(10, |_| {});
        let grow =
            |now: &mut Reading| now.log_end = now.log_end.map(|end| Lsn::new(end.as_u64() + 8));
        assert!(clock.seconds(59, grow).ready);
        let said = clock.seconds(3, grow);
        assert!(
            !said.ready && said.reason.contains("nothing beyond"),
            "{said:?}"
        );
        let follow = |now: &mut Reading| now.received = Lsn::new(now.received.as_u64() + 1);
        assert!(clock.seconds(1, follow).ready);
        // A Postgres that says nothing is judged by the stream alone.
        assert!(clock.seconds(100, |now| now.log_end = None).ready);
    }

    #[test]
    fn a_full_queue_of_rows_to_be_marked_is_not_ready_unless_it_moves() {
        let mut clock = Clock::new(Phase::Streaming);
        clock.seconds(10, |_| {});
        let fill = |now: &mut Reading| {
            now.marks.waiting = 100_000;
            now.marks.is_full = true;
        };
        assert!(clock.seconds(9, fill).ready);
        let said = clock.seconds(2, |_| {});
        assert!(
            !said.ready && said.reason.contains("100000 published rows wait"),
            "{said:?}"
        );
        // A slow database is not a stuck one.
        assert!(clock.seconds(60, |now| now.marks.done += 1).ready);
        clock.seconds(60, |_| {});
        assert!(clock.seconds(1, |now| now.marks.is_full = false).ready);
    }

    #[test]
    fn it_is_not_ready_before_the_first_stream_and_a_lost_one_has_ten_seconds() {
        let mut clock = Clock::new(Phase::Connecting);
        assert!(!clock.seconds(1, |_| {}).ready);
        assert!(clock.seconds(1, |now| now.phase = Phase::Scanning).ready);
        assert!(clock.seconds(9, |now| now.phase = Phase::Connecting).ready);
        assert!(!clock.seconds(2, |_| {}).ready);
        assert!(clock.seconds(1, |now| now.phase = Phase::Standby).ready);
        assert!(!clock.seconds(1, |now| now.phase = Phase::Stopping).ready);
    }

    #[test]
    fn rows_that_the_stream_leaves_out_twice_in_a_row_are_not_ready() {
        let mut clock = Clock::new(Phase::Streaming);
        assert!(clock.seconds(5, |now| now.short_rounds = 1).ready);
        let said = clock.seconds(1, |now| now.short_rounds = 2);
        assert!(
            !said.ready && said.reason.contains("publication"),
            "{said:?}"
        );
        assert!(clock.seconds(1, |now| now.short_rounds = 0).ready);
    }

    #[test]
    fn a_table_that_cannot_be_read_is_not_ready() {
        let mut clock = Clock::new(Phase::Polling);
        assert!(clock.seconds(5, |_| {}).ready);
        let said = clock.seconds(1, |now| now.unread = 1);
        assert!(
            !said.ready && said.reason.contains("1 outbox tables"),
            "{said:?}"
        );
        assert!(clock.seconds(1, |now| now.unread = 0).ready);
    }

    #[test]
    fn notes_of_what_is_delivered_that_fail_for_ten_seconds_are_not_ready() {
        let mut clock = Clock::new(Phase::Streaming);
        clock.seconds(100, |_| {});
        assert!(clock.seconds(9, |now| now.is_unnoted = true).ready);
        let said = clock.seconds(2, |_| {});
        assert!(
            !said.ready && said.reason.contains("could not be noted"),
            "{said:?}"
        );
        assert!(clock.seconds(1, |now| now.is_unnoted = false).ready);
    }

    #[test]
    fn only_a_thread_without_heartbeat_is_stuck() {
        assert_eq!(stuck(Duration::from_secs(29)), None);
        assert!(stuck(Duration::from_secs(30)).is_some());
    }
}
