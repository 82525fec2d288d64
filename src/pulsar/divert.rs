//! Diverting: taking events out of the publisher that cannot be published now, whole and in order, for somebody who stores
//! them. The half of stragglers that is the publisher's; the other is `scanner::straggler`.
//!
//! Input: an event or a batch that is refused, a topic that is refused, a key that is parked. Output: [`Diverted`] events, in
//! the order in which each key's were committed; [`Publisher::stored`] says when they are safe.
//!
//! # Duplicates and order
//!
//! A frame that was written to a connection and has no receipt may have been stored. So events are taken out of a lane only:
//! * when its opener reports that the topic is refused. The opener has closed the lane's producer before it asked for a new
//!   one, and a broker answers that when all it was sent has its verdict; receipts stand in the event queue in front of the
//!   opener's report. (After a lost connection there is no such answer: what the broker stored without telling comes twice.)
//! * when a refused message is the oldest of the lane. It is never written, nor is anything behind it until it is gone, so
//!   no frame is under way at that moment.
//!
//! Always the whole lane is taken, from its oldest. Nothing older of a key is then left in it, and from then on the key is
//! *parked*: later events of it follow into the store and never pass. It is taken out of the parked when the last of its
//! stored events has its receipt, and only then streams again.
//!
//! # Why deduplication does not eat what was diverted
//!
//! A broker that deduplicates takes every id up to the highest it has seen for stored. Suppose an event was diverted, a
//! later one of the same lane published, and the process killed before the first was stored: it would come again from the
//! log, under its old id, and be dropped. So nothing that comes behind a diverted event in its lane is written before
//! [`Publisher::stored`] has been told of it; and a diverted event uses up its sequence id, so that ids stay a function of the log.
//! Where it is not known which lane it would have gone to, it cannot: then the rest of its transaction on that route is
//! diverted too, and the next transaction's ids are right again.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::lane::{Lane, Link};
use super::opener;
use super::outgoing::Outgoing;
use super::publisher::Publisher;
use super::route::{Held, State};
use super::verdict;

/// When events are diverted. Without it (in [`super::PublisherConfig`]) refused topics wait, and a refused event is an error.
#[derive(Clone, Copy, Debug)]
pub struct Diversion {
    /// A topic that somebody must mend is given this long.
    pub grace: Duration,
    /// A topic with trouble of its own that may pass is given this long.
    pub age: Duration,
    /// Later events of a diverted event's topic and key are diverted too, until they are let go.
    pub park: bool,
    /// Nothing is logged about it: whoever takes the events does.
    pub quiet: bool,
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
        // Nearly always nothing is parked: then nothing is hashed.
        !self.0.is_empty() && self.0.get(topic).is_some_and(|keys| keys.contains_key(key))
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

impl Publisher {
    /// Events diverted since the last call, in order.
    pub fn take_diverted(&mut self) -> Vec<Diverted> {
        std::mem::take(&mut self.diverted)
    }

    /// True when there are any.
    pub fn has_diverted(&self) -> bool {
        !self.diverted.is_empty()
    }

    /// `count` diverted events more are safe, in the order in which they were diverted: what waits for them may go.
    ///
    /// # Errors
    /// As [`Publisher::handle`]: what was held back may go too, and may be something that can never be published.
    pub fn stored(&mut self, count: u64) -> crate::Result<()> {
        self.stored_events += count;
        for lane in &mut self.lanes {
            lane.stored(self.stored_events, &mut self.memory);
        }
        for lane in 0..self.lanes.len() {
            self.divert_refused(lane);
        }
        self.drained();
        self.finish_changes();
        self.release()
    }

    /// `count` events more of this topic and key are kept elsewhere (fewer, when negative). Events of a key that has any are
    /// diverted.
    pub fn park(&mut self, topic: &str, key: &str, count: i64) {
        self.parked.change(topic, key, count);
    }

    /// Goes on with what was parked in the publisher before, or while there was none.
    pub fn set_parked(&mut self, parked: Parked) {
        self.parked = parked;
    }

    /// What is parked, for the publisher that comes next.
    pub fn take_parked(&mut self) -> Parked {
        std::mem::take(&mut self.parked)
    }

    /// Something was published to a topic that had been refused: its events need not be diverted any more.
    pub fn healed(&mut self, topic: &str) {
        if self.forget_refusal(topic) {
            info!(topic, "the topic takes events again");
        }
    }

    /// The next event of a topic is an attempt again; false when it was not refused.
    pub fn forget_refusal(&mut self, topic: &str) -> bool {
        let Some(&index) = self.route_index.get(topic) else {
            return false;
        };
        let route = &mut self.routes[index];
        let mut was_refused = route.refused.take().is_some();
        if route.state == State::Unknown && route.resolver.is_none() {
            let hurry = Arc::clone(&route.hurry);
            let shared = self.shared.clone();
            let work = opener::count_partitions(shared, index, topic.to_owned(), hurry);
            route.resolver = Some(tokio::spawn(work));
        }
        for topic in self.routes[index].topics.clone() {
            was_refused |= self.topics[topic].refused.take().is_some();
            self.open_topic(topic);
        }
        was_refused
    }

    fn is_quiet(&self) -> bool {
        self.config
            .diversion
            .is_some_and(|diversion| diversion.quiet)
    }

    /// Why an event must be diverted instead of going into its lane, if so.
    pub(super) fn diversion(
        &self,
        route: usize,
        lane: usize,
        event: &Outgoing<'_>,
    ) -> Option<String> {
        self.config.diversion?;
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
        let idle = lane.is_empty() && matches!(lane.link, Link::Down { .. });
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
        self.lanes[lane].skip(event.commit_lsn, &mut self.memory);
        let topic = self.lanes[lane].topic;
        self.divert(route, Held::new(event, key_hash, properties), reason);
        self.topics[topic].last_diverted = self.diverted_events;
    }

    fn divert(&mut self, route: usize, event: Held, reason: String) {
        let topic = self.routes[route].name.clone();
        if self
            .config
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
        let mut first = true;
        for batch in self.lanes[lane].take_all() {
            self.in_flight_messages -= batch.messages as usize;
            self.in_flight_bytes -= batch.bytes;
            let own = batch.refused.clone();
            for event in batch.into_events(self.lanes[lane].producer.headroom) {
                let why = match &own {
                    Some(own) => own.to_string(),
                    None if first => reason.to_owned(),
                    None => format!("was in line behind an event that was refused: {reason}"),
                };
                self.divert(route, event, why);
            }
            first = first && own.is_none();
        }
        self.topics[topic].last_diverted = self.diverted_events;
    }

    /// Diverts a lane whose oldest message is refused, unless a frame of it may still be under way.
    pub(super) fn divert_refused(&mut self, lane: usize) {
        if let Some(reason) = self.lanes[lane].refused_front() {
            if !self.is_quiet() {
                let topic = &self.topics[self.lanes[lane].topic].name;
                warn!(
                    topic,
                    "an event cannot be published, it becomes a straggler: {reason}"
                );
            }
            self.divert_lane(lane, &reason);
        }
    }

    /// The topic's opener has given up: its producers are closed, and the topic takes none.
    pub(super) fn topic_refused(&mut self, topic: usize, producers: &[u64], reason: &str) {
        let reason = verdict::one_line(reason);
        self.topics[topic].opener = None;
        let before = self.diverted_events;
        let is_news = self.topics[topic].refused.replace(reason.clone()).is_none();
        for &producer in producers {
            let Ok(lane) = usize::try_from(producer) else {
                continue;
            };
            if matches!(self.lanes[lane].link, Link::Opening { .. }) {
                self.lanes[lane].down(None);
                self.divert_lane(lane, &reason);
            }
        }
        if is_news && !self.is_quiet() {
            let events = self.diverted_events - before;
            let topic = &self.topics[topic].name;
            warn!(
                topic,
                events, "the topic is refused, its events become stragglers: {reason}"
            );
        }
        // Those that came to need a producer meanwhile: their old ones must be closed too.
        self.open_topic(topic);
        self.drained();
    }

    /// Nobody could say how many partitions a topic has: what waited for that is diverted.
    pub(super) fn route_refused(&mut self, index: usize, reason: &str) {
        let reason = verdict::one_line(reason);
        self.routes[index].resolver = None;
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
    }

    /// Tells openers to be impatient whose topics' events take up so much room that others might soon have none: more than
    /// a quarter of either limit. (Only trouble of the topic's own makes them give up; a broker that is away does not.)
    pub(super) fn hurry_openers(&self) {
        if self.config.diversion.is_none() {
            return;
        }
        let is_much = |messages: usize, bytes: usize| {
            messages > self.config.max_in_flight_messages / 4
                || bytes > self.config.max_in_flight_bytes / 4
        };
        for (index, topic) in self.topics.iter().enumerate() {
            let Some(opener) = &topic.opener else {
                continue;
            };
            let lanes = self.lanes.iter().filter(|lane| lane.topic == index);
            let (messages, bytes) = lanes
                .map(Lane::size)
                .fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1));
            if is_much(messages, bytes) {
                opener.hurry.notify_one();
            }
        }
        for route in self.routes.iter().filter(|route| route.resolver.is_some()) {
            let bytes = route.held.iter().map(|held| held.bytes).sum();
            if route.state == State::Unknown && is_much(route.held.len(), bytes) {
                route.hurry.notify_one();
            }
        }
    }

    /// When [`Diversion`] is on: ends a batch's way that the broker refuses for good. False otherwise, or when no batch has that
    /// id: then nothing would be ended, and the same be refused again for ever.
    pub(super) fn refuse_batch(&mut self, lane: usize, sequence_id: u64, message: &str) -> bool {
        if self.config.diversion.is_none() {
            return false;
        }
        let topic = &self.topics[self.lanes[lane].topic].name;
        let reason = format!("the broker refuses the message on topic {topic}: {message}");
        self.lanes[lane].refuse(sequence_id, reason)
    }
}

/// How long an opener goes on with a topic that is refused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    pub(super) diversion: Option<Diversion>,
    since: Option<Instant>,
}

impl Deadline {
    /// `refused`: the topic was given up before, and nothing was heard of it since.
    pub(super) fn new(diversion: Option<Diversion>, refused: bool) -> Self {
        let diversion = diversion.map(|diversion| {
            let given = |patience| if refused { Duration::ZERO } else { patience };
            Diversion {
                grace: given(diversion.grace),
                age: given(diversion.age),
                ..diversion
            }
        });
        Self {
            diversion,
            since: None,
        }
    }

    /// When to give up after this failure; `None`: not because of this.
    pub(super) fn after(&mut self, error: &crate::Error) -> Option<Instant> {
        let patience = match (self.diversion?, verdict::trouble(error)) {
            (diversion, verdict::Trouble::Mend) => diversion.grace,
            (diversion, verdict::Trouble::Topic) => diversion.age,
            (_, verdict::Trouble::Broker) => {
                self.since = None;
                return None;
            }
        };
        Some(*self.since.get_or_insert_with(Instant::now) + patience)
    }
}
