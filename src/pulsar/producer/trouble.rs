//! A topic's trouble: since when nothing works, whose fault it is, and when to give up.
//!
//! An answer that names a topic is that topic's trouble, whatever its code. Only connections that cannot be made or do not answer are
//! the broker's trouble: they are backpressure, however long they last. That holds for connections that are refused as well (credentials,
//! certificates): they are told as what somebody must mend, and give up no topic. Some answers could as well be those of a broker that is in trouble as a
//! whole (its metadata store, its bookies): of these a topic is given up when another topic got receipts meanwhile; or after a much longer time,
//! because nobody else may be able to show it: others have no events, or no room for them.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use super::diversion::Diversion;
use super::route::State;
use super::{Producer, Timer};
use crate::Error;
use crate::meter::{MAX_TROUBLES, TopicTrouble, Troubles};
use crate::pulsar::verdict::{self, Fault};

/// When a topic is given up, if its trouble goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GivenUp {
    pub at: Instant,
    /// It is the topic's trouble beyond doubt: where it takes much room, it is given up at once.
    pub is_clear: bool,
}

/// What keeps a topic from getting receipts; it ends with one.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    /// The broker's time is not in it.
    since: Instant,
    /// Receipts of other topics after this time show that the broker works.
    unheard_since: Instant,
    fault: Fault,
    /// When it became the broker's.
    away_since: Option<Instant>,
    /// The last words about it.
    pub reason: String,
}

impl Trouble {
    /// Adds what was said now; `None` when that is not the topic's trouble.
    pub(super) fn add(known: Option<Self>, error: &Error, now: Instant) -> Option<Self> {
        let fault = verdict::fault(error);
        if fault == Fault::Broker {
            // It is given up for nothing that the broker is to blame for; and what it had before is not over.
            return known.map(|known| Self {
                fault,
                away_since: known.away_since.or(Some(now)),
                ..known
            });
        }
        let (since, unheard_since) = known.map_or((now, now), |known| {
            let away = known.away_since.map(|at| now.saturating_duration_since(at));
            let away = away.unwrap_or_default();
            (known.since + away, known.unheard_since + away)
        });
        Some(Self {
            since,
            unheard_since,
            fault,
            away_since: None,
            reason: verdict::one_line(&error.report()),
        })
    }

    /// The topic had no receipt since then, although it waited for one.
    pub(super) fn unheard(self, since: Instant) -> Self {
        Self {
            unheard_since: self.unheard_since.min(since),
            ..self
        }
    }

    /// When to give up: `None`, not because of this. `others_work_at` is when another topic got a receipt last.
    pub(super) fn ends_at(
        &self,
        diversion: Option<Diversion>,
        was_given_up: bool,
        others_work_at: Option<Instant>,
    ) -> Option<GivenUp> {
        let diversion = diversion?;
        let others_work = others_work_at.is_some_and(|at| at > self.unheard_since);
        let (patience, is_clear) = match self.fault {
            Fault::Mend => (diversion.grace, true),
            Fault::Topic => (diversion.age, true),
            Fault::Unclear if others_work => (diversion.age, true),
            Fault::Unclear => (diversion.unclear, was_given_up),
            Fault::Broker => return None,
        };
        let patience = if was_given_up {
            Duration::ZERO
        } else {
            patience
        };
        Some(GivenUp {
            at: self.since + patience,
            is_clear,
        })
    }
}

impl Producer {
    /// Something was said of a topic.
    pub(super) fn note_trouble(&mut self, topic_id: usize, error: &Error) {
        let topic = &mut self.topics[topic_id];
        topic.trouble = Trouble::add(topic.trouble.take(), error, self.now.at);
        if topic.trouble.is_some() {
            self.troubled.insert(Timer::Topic(topic_id));
        }
    }

    /// An attempt to open its producers failed.
    pub(super) fn note_failure(&mut self, topic_id: usize, error: &Error) {
        let topic = &mut self.topics[topic_id];
        topic.note(error, self.now.at);
        if topic.trouble.is_some() {
            self.troubled.insert(Timer::Topic(topic_id));
        }
    }

    pub(super) fn topics_in_trouble(&self) -> Vec<usize> {
        let topics = self.troubled.iter().filter_map(|it| match *it {
            Timer::Topic(topic) => Some(topic),
            Timer::Route(_) => None,
        });
        topics
            .filter(|&topic| self.topics[topic].trouble.is_some())
            .collect()
    }

    pub(super) fn routes_in_trouble(&self) -> Vec<usize> {
        let routes = self.troubled.iter().filter_map(|it| match *it {
            Timer::Topic(_) => None,
            Timer::Route(route) => Some(route),
        });
        routes
            .filter(|&route| self.routes[route].trouble.is_some())
            .collect()
    }

    /// Those whose trouble is over are no more among those in trouble.
    pub(super) fn forget_troubles(&mut self) {
        self.troubled.retain(|it| match *it {
            Timer::Topic(topic) => self.topics[topic].trouble.is_some(),
            Timer::Route(route) => self.routes[route].trouble.is_some(),
        });
    }

    /// The topics that get no receipts because of what was said of them. A topic without events that wait counts only while its events
    /// are diverted: there is nothing that it could take.
    pub(in crate::pulsar) fn troubles(&self) -> Troubles {
        // Whatever was said before: a broker that is away now is every topic's trouble.
        let is_of_topic = |trouble: &&Trouble| trouble.fault != Fault::Broker;
        let routes = self.routes_in_trouble().into_iter().filter_map(|route| {
            let route = &self.routes[route];
            let trouble = route.trouble.as_ref().filter(is_of_topic)?;
            let is_waiting = !route.held.is_empty();
            let is_stuck = route.state == State::Unknown && (is_waiting || route.refused.is_some());
            is_stuck.then_some((&route.name, trouble, is_waiting))
        });
        let topics = self.topics_in_trouble().into_iter().filter_map(|topic| {
            let topic = &self.topics[topic];
            let trouble = topic.trouble.as_ref().filter(is_of_topic)?;
            let mut lanes = topic.all_lanes();
            let is_waiting = lanes.any(|lane| !self.lanes[lane].is_empty());
            let is_stuck = is_waiting || topic.refused.is_some();
            is_stuck.then_some((&topic.name, trouble, is_waiting))
        });
        let mut found: Vec<(&String, &Trouble, bool)> = routes.chain(topics).collect();
        found.sort_by_key(|(_, trouble, _)| trouble.since);
        let safe = |text: &str| text.replace(char::is_control, "\u{fffd}");
        let told = |&(name, trouble, is_waiting): &(&String, &Trouble, bool)| TopicTrouble {
            topic: safe(name),
            since: trouble.since.into_std(),
            reason: safe(&trouble.reason),
            is_waiting,
        };
        let mut waiting = found.iter().filter(|(_, _, is_waiting)| *is_waiting);
        Troubles {
            count: found.len() as u64,
            listed: found.iter().take(MAX_TROUBLES).map(told).collect(),
            first_waiting: waiting.next().map(told),
        }
    }
}

/// A failure, for the log.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    why: String,
    must_be_mended: bool,
}

impl Failure {
    pub(super) fn new(error: &Error) -> Self {
        Self {
            why: error.report(),
            must_be_mended: !error.is_temporary(),
        }
    }

    /// Says so, and when it is tried again.
    pub(super) fn tell(&self, topic: &str, delay: Duration) {
        let (retry_in_ms, why) = (delay.as_millis(), &self.why);
        if self.must_be_mended {
            error!(
                topic,
                retry_in_ms, "cannot publish until this is mended; the topic's events wait: {why}"
            );
        } else {
            warn!(topic, retry_in_ms, "cannot publish yet: {why}");
        }
    }
}
