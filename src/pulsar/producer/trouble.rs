//! A topic's trouble: since when nothing works, whose fault it is, and when to give up.
//!
//! An answer that names a topic is that topic's trouble, whatever its code. Only connections that cannot be made or do not answer are
//! the broker's trouble: they are backpressure, however long they last. Some answers could as well be those of a broker that is in trouble as a
//! whole (its metadata store, its bookies): of these a topic is given up only when another topic got receipts meanwhile.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use super::Producer;
use super::diversion::Diversion;
use super::route::State;
use crate::Error;
use crate::meter::{MAX_TROUBLES, TopicTrouble, Troubles};
use crate::pulsar::verdict::{self, Fault};

/// What keeps a topic from getting receipts; it ends with one.
#[derive(Clone, Debug)]
pub(super) struct Trouble {
    since: Instant,
    fault: Fault,
    /// The last words about it.
    pub reason: String,
}

impl Trouble {
    /// Adds what was said now; `None` when that is not the topic's trouble.
    pub(super) fn add(known: Option<Self>, error: &Error, now: Instant) -> Option<Self> {
        let fault = verdict::fault(error);
        if fault == Fault::Broker {
            // It is given up for nothing that the broker is to blame for; and what it had before is not over.
            return known.map(|known| Self { fault, ..known });
        }
        Some(Self {
            since: known.map_or(now, |known| known.since),
            fault,
            reason: verdict::one_line(&error.report()),
        })
    }

    /// When to give up: `None`, not because of this. `others_work_at` is when another topic got a receipt last.
    pub(super) fn ends_at(
        &self,
        diversion: Option<Diversion>,
        was_given_up: bool,
        others_work_at: Option<Instant>,
    ) -> Option<Instant> {
        let diversion = diversion?;
        let patience = match self.fault {
            Fault::Mend => diversion.grace,
            Fault::Topic => diversion.age,
            Fault::Unclear => {
                let others_work = others_work_at.is_some_and(|at| at > self.since);
                others_work.then_some(diversion.age)?
            }
            Fault::Broker => return None,
        };
        let patience = if was_given_up {
            Duration::ZERO
        } else {
            patience
        };
        Some(self.since + patience)
    }
}

impl Producer {
    /// The topics that get no receipts because of what was said of them. A topic without events that wait counts only while its events
    /// are diverted: there is nothing that it could take.
    pub(in crate::pulsar) fn troubles(&self) -> Troubles {
        // Whatever was said before: a broker that is away now is every topic's trouble.
        let is_of_topic = |trouble: &&Trouble| trouble.fault != Fault::Broker;
        let routes = self.routes.iter().filter_map(|route| {
            let trouble = route.trouble.as_ref().filter(is_of_topic)?;
            let is_waiting = !route.held.is_empty();
            let is_stuck = route.state == State::Unknown && (is_waiting || route.refused.is_some());
            is_stuck.then_some((&route.name, trouble, is_waiting))
        });
        let topics = self.topics.iter().filter_map(|topic| {
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
