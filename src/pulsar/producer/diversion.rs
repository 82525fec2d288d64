//! Diverting: taking events out of the publisher that cannot be published now, whole and in order, for somebody who stores
//! them. The half of stragglers that is the publisher's; the other is `scanner::straggler`.
//!
//! Input: an event or a batch that is refused, a topic that is refused, a key that is parked. Output: [`Diverted`] events, in
//! the order in which each key's were committed; [`Producer::stored`] says when they are safe.
//!
//! # Duplicates and order
//!
//! A frame that was written to a connection and has no receipt may have been stored. So events are taken out of a lane only:
//! * when its topic has been in trouble for too long, and the lane has no producer. Its last one was closed, and a broker answers that when all it was sent has its
//!   verdict; receipts come before that answer. (After a lost connection, and where writes do not end, there is no such answer: what the broker stored without telling comes twice.)
//! * when a refused message is the oldest of the lane. It is never written, nor is anything behind it until it is gone, so
//!   no frame is under way at that moment.
//!
//! Of a topic in trouble the whole lane is taken, from its oldest. Behind a refused message only what is of its key. Nothing older of a key is then left in the lane, and from then on the key is
//! *parked*: later events of it follow into the store and never pass. It is taken out of the parked when the last of its
//! stored events has its receipt, and only then streams again.
//!
//! # Why deduplication does not eat what was diverted
//!
//! A broker that deduplicates takes every id up to the highest it has seen for stored. Suppose an event was diverted, a
//! later one of the same lane published, and the process killed before the first was stored: it would come again from the
//! log, under its old id, and be dropped. So nothing that comes behind a diverted event in its lane is written before
//! [`Producer::stored`] has been told of it; and a diverted event uses up its sequence id, so that ids stay a function of the log.
//! Where it is not known which lane it would have gone to, it cannot: then the rest of its transaction on that route is
//! diverted too, and the next transaction's ids are right again.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tracing::{info, warn};

use super::lane::State as LaneState;
use super::outgoing::Outgoing;
use super::route::{Held, State};
use super::topic::Opening;
use super::{Producer, Timer};

/// When events are diverted. Without it (in the producer's settings) refused topics wait, and a refused event is an error.
#[derive(Clone, Copy, Debug)]
pub struct Diversion {
    /// A topic that somebody must mend is given this long.
    pub grace: Duration,
    /// A topic with trouble of its own that may pass is given this long.
    pub age: Duration,
    /// And this long one whose trouble may be that of all topics, while no other topic gets receipts.
    pub unclear: Duration,
    /// Later events of a diverted event's topic and key are diverted too, until they are let go.
    pub park: bool,
    /// Nothing is logged about it: whoever takes the events does.
    pub quiet: bool,
}

impl Diversion {
    /// How many times [`age`](Self::age) [`unclear`](Self::unclear) is: then the log must go on, whoever is to blame. It may be that no other topic
    /// has room, or anything to send.
    pub const UNCLEAR_AGES: u32 = 4;
}

/// An event that was taken out of the publisher.
#[derive(Debug)]
pub struct Diverted {
    /// Its topic, as the router names it.
    pub topic: String,
    /// Why.
    pub reason: String,
    /// The event.
    pub event: Held,
}

/// Which keys of which topics are parked, and for how many events.
#[derive(Debug, Default)]
pub struct Parked(HashMap<String, HashMap<String, u64>>);

impl Parked {
    fn contains(&self, topic: &str, key: &str) -> bool {
        self.0.get(topic).is_some_and(|keys| keys.contains_key(key))
    }

    /// Counts `count` events more, or fewer when negative.
    pub fn change(&mut self, topic: &str, key: &str, count: i64) {
        if !self.0.contains_key(topic) {
            self.0.insert(topic.to_owned(), HashMap::new());
        }
        let Some(keys) = self.0.get_mut(topic) else {
            return;
        };
        let left = keys
            .get(key)
            .copied()
            .unwrap_or(0)
            .saturating_add_signed(count);
        if left == 0 {
            keys.remove(key);
        } else {
            keys.insert(key.to_owned(), left);
        }
        if keys.is_empty() {
            self.0.remove(topic);
        }
    }
}

impl Producer {
    /// Events diverted since the last call, in order.
    pub(in crate::pulsar) fn take_diverted(&mut self) -> Vec<Diverted> {
        std::mem::take(&mut self.diverted)
    }

    /// True when there are any.
    pub(in crate::pulsar) fn has_diverted(&self) -> bool {
        !self.diverted.is_empty()
    }

    /// `count` diverted events more are safe, in the order in which they were diverted: what waits for them may go.
    ///
    /// # Errors
    /// As [`Publisher::handle`]: what was held back may go too, and may be something that can never be published.
    pub(in crate::pulsar) fn stored(&mut self, count: u64) -> crate::Result<()> {
        self.stored_events += count;
        let stored = self.stored_events;
        let mut lanes = BTreeSet::new();
        for it in std::mem::take(&mut self.diverting) {
            let (topics, last_diverted) = match it {
                Timer::Topic(topic) => (vec![topic], self.topics[topic].last_diverted),
                Timer::Route(route) => {
                    let route = &self.routes[route];
                    (route.topics.clone(), route.last_diverted)
                }
            };
            if last_diverted > stored {
                self.diverting.insert(it);
            }
            for topic in topics {
                lanes.extend(self.topics[topic].all_lanes());
            }
        }
        for &lane in &lanes {
            self.with_lane(lane, |lane, desk| lane.stored(stored, desk));
        }
        for lane in lanes {
            self.divert_refused(lane);
        }
        self.drained();
        self.settle()
    }

    /// `count` events more of this topic and key are kept elsewhere (fewer, when negative). Events of a key that has any are
    /// diverted.
    pub(in crate::pulsar) fn park(&mut self, topic: &str, key: &str, count: i64) {
        self.parked.change(topic, key, count);
    }

    /// Goes on with what was parked in the publisher before, or while there was none.
    pub(in crate::pulsar) fn set_parked(&mut self, parked: Parked) {
        self.parked = parked;
    }

    /// What is parked, for the publisher that comes next.
    pub(in crate::pulsar) fn take_parked(&mut self) -> Parked {
        std::mem::take(&mut self.parked)
    }

    /// Something was published to a topic that had been refused: its events need not be diverted any more.
    pub(in crate::pulsar) fn healed(&mut self, topic: &str) {
        if self.forget_refusal(topic) {
            info!(topic, "the topic takes events again");
        }
    }

    /// The next event of a topic is an attempt again; false when it was not refused.
    pub(in crate::pulsar) fn forget_refusal(&mut self, topic: &str) -> bool {
        let Some(&index) = self.route_index.get(topic) else {
            return false;
        };
        let route = &mut self.routes[index];
        let mut was_refused = route.refused.take().is_some();
        if was_refused {
            route.trouble = None;
            if route.state == State::Unknown {
                self.asking.insert((route.since, index));
            }
        }
        let is_asked = route.question.asked.is_some() || route.question.again_at.is_some();
        if route.state == State::Unknown && !is_asked {
            route.trouble = None;
            self.serial += 1;
            self.ask(index);
        }
        for topic in self.routes[index].topics.clone() {
            let it = &mut self.topics[topic];
            was_refused |= it.refused.take().is_some();
            (it.trouble, it.is_paced) = (None, false);
            self.open_topic(topic);
        }
        was_refused
    }

    fn is_quiet(&self) -> bool {
        self.settings
            .diversion
            .is_some_and(|diversion| diversion.quiet)
    }

    /// Why an event must be diverted instead of going into its lane, if so.
    #[inline]
    pub(super) fn diversion(
        &self,
        route: usize,
        lane: usize,
        event: &Outgoing<'_>,
    ) -> Option<String> {
        // Nearly always nothing of its topic is diverted.
        let may_be = !self.parked.0.is_empty()
            || self.routes[route].unrouted.is_some()
            || self.topics[self.lanes[lane].topic].refused.is_some();
        (may_be && self.settings.diversion.is_some())
            .then(|| self.why_diverted(route, lane, event))?
    }

    #[inline(never)]
    fn why_diverted(&self, route: usize, lane: usize, event: &Outgoing<'_>) -> Option<String> {
        if self.routes[route].unrouted == Some(event.commit_lsn) {
            return Some(
                "follows an event of its transaction that was stored before the topic was usable"
                    .to_owned(),
            );
        }
        if self.parked.contains(&self.routes[route].name, event.key) {
            return Some("waits behind an earlier event of its topic and key".to_owned());
        }
        let lane = &self.lanes[lane];
        let reason = self.topics[lane.topic].refused.as_ref()?;
        // What is in a lane, or has a producer, goes first, and takes this one with it if need be.
        let idle = lane.is_empty() && lane.state() == LaneState::Down;
        idle.then(|| reason.clone())
    }

    /// Diverts one event that is in no lane; `lane` is where it would have gone.
    pub(super) fn divert_event<'p>(
        &mut self,
        route: usize,
        lane: usize,
        (event, key_hash): (&Outgoing<'_>, u64),
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
        reason: String,
    ) {
        self.with_lane(lane, |lane, desk| lane.skip(event.commit_lsn, desk));
        let topic = self.lanes[lane].topic;
        self.divert(route, Held::new(event, key_hash, properties), reason);
        self.note_diverted(topic);
    }

    /// The last event that was diverted was of this topic.
    fn note_diverted(&mut self, topic: usize) {
        self.topics[topic].last_diverted = self.diverted_events;
        self.diverting.insert(Timer::Topic(topic));
    }

    fn divert(&mut self, route: usize, event: Held, reason: String) {
        let topic = self.routes[route].name.clone();
        if self
            .settings
            .diversion
            .is_some_and(|diversion| diversion.park)
        {
            self.parked.change(&topic, &event.key, 1);
        }
        self.diverted_events += 1;
        self.diverted.push(Diverted {
            topic,
            reason,
            event,
        });
    }

    /// Takes everything out of a lane in which no frame is under way.
    fn divert_lane(&mut self, lane: usize, reason: &str) {
        let topic = self.lanes[lane].topic;
        let route = self.topics[topic].route;
        let headroom = self.lanes[lane].named.headroom;
        let batches = self.with_lane(lane, |lane, desk| lane.take_all(desk.now.at));
        for batch in batches {
            let own = batch.refused.clone();
            for event in batch.into_events(headroom) {
                let why = own.as_deref().unwrap_or(reason).to_owned();
                self.divert(route, event, why);
            }
        }
        self.note_diverted(topic);
    }

    /// Diverts a lane's oldest message if it is refused and no frame of the lane may be under way, and with it what comes behind it of its key.
    pub(super) fn divert_refused(&mut self, lane: usize) {
        while let Some(reason) = self.lanes[lane].refused_front() {
            let topic = self.lanes[lane].topic;
            let route = self.topics[topic].route;
            if !self.is_quiet() {
                let topic = &self.topics[topic].name;
                warn!(
                    topic,
                    "an event cannot be published, it becomes a straggler: {reason}"
                );
            }
            let parks = self.settings.diversion.is_some_and(|it| it.park);
            let taken = self.with_lane(lane, |lane, _| lane.take_refused(parks));
            for (place, event) in taken.into_iter().enumerate() {
                let why = match place {
                    0 => reason.clone(),
                    _ => format!("was in line behind an event that was refused: {reason}"),
                };
                self.divert(route, event, why);
            }
            self.note_diverted(topic);
            self.lanes[lane].wait_for(self.diverted_events);
        }
    }

    /// The topic has been in trouble for too long: what its lanes have that have no producer is diverted.
    pub(super) fn topic_refused(&mut self, topic_id: usize) {
        let topic = &mut self.topics[topic_id];
        topic.opening = Opening::Idle;
        let trouble = topic.trouble.as_ref();
        let reason = trouble.map_or("it was given up", |trouble| &trouble.reason);
        let reason = reason.to_owned();
        let before = self.diverted_events;
        let is_news = topic.refused.replace(reason.clone()).is_none();
        for lane in self.topics[topic_id].all_lanes().collect::<Vec<_>>() {
            if self.lanes[lane].state() == LaneState::Down {
                self.divert_lane(lane, &reason);
            }
        }
        if is_news && !self.is_quiet() {
            let events = self.diverted_events - before;
            let topic = &self.topics[topic_id].name;
            warn!(
                topic,
                events, "the topic is refused, its events become stragglers: {reason}"
            );
        }
        self.drained();
    }

    /// Nobody could say how many partitions a topic has: what waited for that is diverted.
    pub(super) fn route_refused(&mut self, index: usize) {
        // It stays as long as the refusal: the meter is told of it.
        let trouble = self.routes[index].trouble.as_ref();
        let reason = trouble.map_or("it was given up", |it| &it.reason);
        let reason = reason.to_owned();
        let held = std::mem::take(&mut self.routes[index].held);
        if !self.is_quiet() {
            warn!(
                topic = self.routes[index].name,
                events = held.len(),
                "the topic is refused, its events become stragglers: {reason}"
            );
        }
        for event in held {
            self.in_flight_messages -= 1;
            self.held_messages -= 1;
            self.in_flight_bytes -= event.bytes;
            self.divert_without_lane(index, event, reason.clone());
        }
        self.routes[index].refused = Some(reason);
        self.asking.remove(&(self.routes[index].since, index));
    }

    /// Diverts an event of a topic whose partitions nobody can say; false when it is not so.
    pub(super) fn divert_unrouted<'p>(
        &mut self,
        route: usize,
        key_hash: u64,
        event: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
    ) -> bool {
        let state = self.routes[route].state;
        let Some(reason) = self.routes[route].refused.clone() else {
            return false;
        };
        if state != State::Unknown || !self.routes[route].held.is_empty() {
            return false;
        }
        self.divert_without_lane(route, Held::new(event, key_hash, properties), reason);
        true
    }

    fn divert_without_lane(&mut self, route: usize, event: Held, reason: String) {
        self.routes[route].unrouted = Some(event.commit_lsn);
        self.divert(route, event, reason);
        self.routes[route].last_diverted = self.diverted_events;
        self.diverting.insert(Timer::Route(route));
    }
}
