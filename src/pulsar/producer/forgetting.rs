//! Closing and forgetting what is idle.
//!
//! A producer that has had nothing to send for `WALPOST_PRODUCER_IDLE` is closed. Its lane is forgotten once the broker has closed it; a route, with all its topics,
//! once it has no lane; and a connection is let go of when it has had no producer for as long. Each topic is looked at when one of its lanes may be due, and
//! at least once in that time, so a tick costs what is due.
//!
//! # Why a lane may be forgotten
//!
//! A lane remembers its ids (`txn`, `tail`), what was told and doubted of its name (`told`, `doubtful`, `highest_of_name`), and which name it has (`renamed`, and
//! the topic's `anew` and `few`). All of that is about events up to the last one that was numbered for the topic. Two conditions make sure that no event
//! up to that one is numbered again:
//! * **The lane is empty**, so each of its events has its receipt, or was diverted.
//! * **Its last transaction is over.** An event of a later one is in some lane, and commit LSNs rise, whoever publishes: the log in its order, a scan by `seq`, retries by
//!   a number that is counted up (`written_to`). A lane of the
//!   latest transaction is never forgotten, however long that transaction takes: it would begin to count anew, and the broker would take the event for an old one.
//!   Nor is a lane while its route has events that are held, because these may be of any transaction.
//!
//! So every event that comes to the lane that is made in its place has an id above all that were ever written under any of its names. It opens as after a
//! restart: what the broker tells is believed up to the id that it tells, and no event of this process lies there. That holds under the first name, too, of a lane that was renamed
//! in doubt: what was in doubt has its receipt under the later name. After a kill, events that come again up to the told id were
//! all settled before anything above them was written under that name; but an event that was diverted is settled only when it is stored, so a lane waits for that,
//! as it would otherwise.
//!
//! Two things are kept:
//! * **The end of the log.** A lane that is told an id from beyond the end of the log that was seen at the start must have written that id itself; else
//!   the database was put back (see the parent module). Of all lanes that are forgotten one position is kept, the highest that they have written (`forgotten_to`). A told id up to it
//!   is accepted by a lane whose events all lie above the id: none of them could be taken for old.
//! * **Names that were never used.** The lanes of a topic that was numbered anew (`anew`), or makes do with few producers (`few`), are forgotten with
//!   their route or not at all: one that is made in between must know of it, and have a name that no other had. When the route is forgotten, every transaction is over of which
//!   it had an event, and it begins anew under its first names.
//!
//! What a topic has accepted, its own connection, its pauses and its broker are only what makes it faster; partitions are counted again when it comes back. A topic or route that is refused is
//! kept until it is healed, and so is one whose diverted events are not stored, or whose events are held.
//!
//! # Numbers
//!
//! Lanes, topics and routes are known by numbers that are given again. Numbers of what was forgotten may still stand
//! * in `filling` and `timers`: an entry that concerns nothing does nothing, and leaves when it is due;
//! * in answers: those about producers name ids that are used once, and those about topics and routes the number of an attempt or question, which only rise;
//! * in `last_route`: compared by name; in `working`: replaced;
//! * in `tail`: by a transaction that is over.
//!
//! An empty lane of some hundred bytes stays in the place of each, so that a row finds its lane without a look more than before; the next lane takes its place.

use tokio::time::Instant;
use tracing::debug;

use super::effects::Effect;
use super::lane::{Lane, State as LaneState};
use super::route::{Route, State};
use super::topic::{Opening, Topic};
use super::{Producer, Timer};

impl Producer {
    /// The topic is to be looked at then for what is idle.
    pub(super) fn check_for_idle(&mut self, topic: usize, at: Instant) {
        let before = self.topics[topic].idle_check_at.replace(at);
        if let Some(before) = before {
            self.idle_checks.remove(&(before, topic));
        }
        self.idle_checks.insert((at, topic));
    }

    /// Closes and forgets what has had nothing to do for too long.
    pub(super) fn close_idle(&mut self) {
        // A topic that is to be looked at again is so from now on at the earliest.
        while let Some(&(at, topic)) = self.idle_checks.first()
            && at < self.now.at
        {
            self.idle_checks.pop_first();
            self.topics[topic].idle_check_at = None;
            let next = self.close_idle_lanes(topic);
            self.check_for_idle(topic, next);
            self.forget_if_unused(self.topics[topic].route);
        }
        let waits = |topic: usize, connection| {
            self.topics[topic].opening == Opening::Counting { connection }
        };
        let (now, idle) = (self.now.at, self.settings.producer_idle);
        for connection in self.connections.forget_unused(now, idle, waits) {
            debug!(connection, "a connection without producers is let go of");
            self.effects.push(Effect::Release { connection });
        }
    }

    /// Closes the producers of a topic's lanes that are idle, and forgets those that have none. Returns when to look again.
    fn close_idle_lanes(&mut self, topic_id: usize) -> Instant {
        let (now, idle) = (self.now.at, self.settings.producer_idle);
        let mut next = now + idle;
        let topic = &self.topics[topic_id];
        // An event that is held may be of any transaction.
        let route = &self.routes[topic.route];
        let forgets = !topic.is_numbered_anew()
            && topic.last_diverted <= self.stored_events
            && route.state == State::Known
            && route.held.is_empty();
        for lane in topic.every_lane().collect::<Vec<_>>() {
            let it = &self.lanes[lane];
            if !it.is_empty() {
                continue;
            }
            if now - it.idle_since <= idle {
                next = next.min(it.idle_since + idle);
                continue;
            }
            match it.state() {
                LaneState::Up { .. } => {
                    debug!(producer = it.named.name, "closed a producer without work");
                    self.close_lane(lane);
                    next = now;
                }
                LaneState::Creating { .. } | LaneState::Leaving { .. } => next = now,
                LaneState::Down if forgets && self.is_over(lane) => self.forget_lane(lane),
                LaneState::Down => {}
            }
        }
        next
    }

    /// The lane has nothing to do and no producer, and no event comes any more of the last transaction of which it has counted one.
    fn is_over(&self, lane: usize) -> bool {
        let it = &self.lanes[lane];
        let mut tails = self.dedicated.iter();
        it.is_empty()
            && it.state() == LaneState::Down
            && self.now.at - it.idle_since > self.settings.producer_idle
            && it.counted_to() < self.written_to
            && !tails.any(|((relieved, _), &tail)| *relieved == lane || tail == lane)
    }

    fn forget_lane(&mut self, lane: usize) {
        let gone = self.lanes.remove(lane, Lane::empty(self.now.at));
        for producer_id in gone.producers() {
            self.producers.remove(producer_id);
        }
        self.forgotten_to = self.forgotten_to.max(gone.written_to());
        let topic = &mut self.topics[gone.topic];
        topic.forget_lane(lane);
        self.routes[topic.route].lanes -= 1;
    }

    /// Forgets a route and its topics, when no lane is left that must be, and nothing is to be remembered of it.
    fn forget_if_unused(&mut self, index: usize) {
        let route = &self.routes[index];
        let question = &route.question;
        let is_quiet = route.state == State::Known
            && route.held.is_empty()
            && question.asked.is_none()
            && question.again_at.is_none()
            && route.refused.is_none()
            && route.last_diverted <= self.stored_events
            && route.unrouted.is_none_or(|lsn| lsn < self.written_to)
            && self.now.at.saturating_duration_since(route.since) > self.settings.producer_idle;
        let is_unused = |&topic: &usize| {
            let topic = &self.topics[topic];
            topic.opening == Opening::Idle
                && topic.refused.is_none()
                && topic.last_diverted <= self.stored_events
        };
        let topics = &route.every_topic;
        if !is_quiet || !topics.iter().all(is_unused) {
            return;
        }
        let is_numbered_anew = |&topic: &usize| self.topics[topic].is_numbered_anew();
        let lanes = || {
            topics
                .iter()
                .flat_map(|&topic| self.topics[topic].every_lane())
        };
        if route.lanes == 0
            || topics.iter().any(is_numbered_anew) && lanes().all(|lane| self.is_over(lane))
        {
            for lane in lanes().collect::<Vec<_>>() {
                self.forget_lane(lane);
            }
            self.forget_route(index);
        }
    }

    fn forget_route(&mut self, index: usize) {
        let (initial, max) = self.settings.reconnect;
        let backoff = || crate::retry::Backoff::new(initial, max);
        let now = self.now.at;
        let empty = Route::new(String::new(), self.routes[index].metered, backoff(), now);
        let gone = self.routes.remove(index, empty);
        self.route_index.remove(&gone.name);
        self.refreshing.remove(&(gone.refresh_at, index));
        self.releasable.remove(&index);
        self.troubled.remove(&Timer::Route(index));
        self.diverting.remove(&Timer::Route(index));
        for topic in gone.every_topic {
            let naming = self.topics[topic].naming;
            let mut empty = Topic::new(String::new(), index, 0, naming, backoff());
            empty.attempt = self.topics[topic].attempt;
            let gone = self.topics.remove(topic, empty);
            self.topic_index.remove(&(index, gone.name));
            if let Some(at) = gone.idle_check_at {
                self.idle_checks.remove(&(at, topic));
            }
            self.troubled.remove(&Timer::Topic(topic));
            self.diverting.remove(&Timer::Topic(topic));
            for working in self.working.iter_mut().flatten() {
                if working.0 == topic {
                    working.0 = usize::MAX;
                }
            }
        }
        // No question of the next route of this number has the number of one of this route's.
        self.serial += 1;
    }
}
