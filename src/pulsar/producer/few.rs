//! A topic that allows fewer producers than there are lanes (a namespace's or a topic's `max-producers`).
//!
//! Its events then go to as many lanes as there may be, the *few*: lanes of their own, under names that were never used, because under the
//! usual names other keys' events have these ids. Now and then, while there is work, one of the usual producers is asked for. When the broker
//! makes it, the topic's events go to all lanes again, and to as many as there may be then if that is still too much.
//!
//! # Order
//!
//! Both changes send keys from one lane to another, whose producer may be on another connection. So no event goes to its new lane before
//! every event that was written to an old one has its receipt: the route is `Changing` meanwhile (see `shape`), and what comes for it is held.
//! * Events that were never written are taken out of their lanes and held with the others, in the order of the log. Not from a lane that
//!   is being closed: it may have written them under another name.
//! * A lane that has written some gets its receipts under its own name, also where that takes a new producer: the broker then closes an
//!   earlier one of that name, which may have frames on a lost connection. Lanes that have nothing to send give up their producers for that.
//! * The new lanes' producers are asked for when the old ones are closed, so that those do not count.
//! * What was diverted is stored before, because nothing in another lane would wait for that.
//!
//! A topic that gets no receipts does not keep its route waiting for ever: what its lanes hold is diverted (see `diversion`).
//!
//! # A restart
//!
//! A process begins with all lanes, whatever the one before it did. Is what a broker then calls "stored before" stored, although its event
//! may have gone to another lane? It is:
//! * A usual lane is used again only from the beginning of a transaction on. So under a usual name an id is always the one that the log and the
//!   routing give the event, and never an earlier one.
//! * When an event is written under a usual name, every earlier event of its lane has a receipt, under whatever name, or is stored as a straggler, or was written
//!   before it under that name. So nothing is missing below the highest id of a name.
//! * Within a process, a name of the few is used for one change only. The next process begins with the same names, and takes the next one where the broker
//!   knows an id (see `lane`'s doubt).
//!
//! So events that were sent by the few and not confirmed when the process ended come again under their usual names, and are stored twice: at least once,
//! also with deduplication. None is lost.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::Producer;
use super::lane::{Doubt, State as LaneState};
use super::route::State;
use super::topic::Opening;
use crate::{Error, Lsn};

/// The longest pause between two attempts to have one producer more, in pauses between two looks at the partitions.
const LONGEST_PAUSE: u32 = 16;

/// A topic's fewer lanes.
#[derive(Debug, Default)]
pub(super) struct Few {
    /// By number; made when they are needed first.
    pub(super) lanes: Vec<usize>,
    /// So many of them are in use; 0: the usual lanes are.
    count: usize,
    /// So many are to be used (0: the usual lanes), as soon as every event that was written has its receipt.
    next: Option<usize>,
    /// The transaction of the last event that one of them took, and of the first one that none of them takes.
    last_txn: Lsn,
    next_txn: Lsn,
    /// One producer more is asked for.
    pub(super) is_trying: bool,
    /// One producer more was allowed.
    may_grow: bool,
    /// When one more is asked for.
    try_at: Option<Instant>,
    /// How often that, or what followed from it, was in vain, one after the other.
    in_vain: u32,
    /// How many were in use before the usual lanes were tried last.
    before: usize,
}

impl Few {
    pub(super) fn is_in_use(&self) -> bool {
        self.count > 0
    }

    pub(super) fn is_changing(&self) -> bool {
        self.next.is_some()
    }

    /// The lane that takes the events of lane number `number`, if it is one of these.
    pub(super) fn lane(&self, number: u32) -> Option<usize> {
        let place = (number as usize).checked_rem(self.count)?;
        Some(self.lanes[place])
    }

    /// The usual lanes are used, and all the topic's lanes have names that were never used.
    pub(super) fn end(&mut self) {
        let lanes = std::mem::take(&mut self.lanes);
        *self = Self {
            lanes,
            ..Self::default()
        };
    }

    /// One more is tried after a pause that is longer each time it was in vain.
    fn try_later(&mut self, now: Instant, pause: Duration) {
        let factor = 1 << self.in_vain.min(LONGEST_PAUSE.ilog2());
        self.try_at = Some(now + pause * factor);
    }
}

impl Producer {
    /// The broker allows no more producers on the topic, now that an attempt is over. Returns true when no lane of it needs one any more.
    pub(super) fn make_do_with_few(&mut self, topic_id: usize) -> bool {
        let topic = &self.topics[topic_id];
        let state = |lane: usize| self.lanes[lane].state();
        let is_up = |&lane: &usize| matches!(state(lane), LaneState::Up { .. });
        let usual = topic.lanes.iter().flatten().filter(|&it| is_up(it)).count();
        let few = topic.few.lanes.iter().filter(|&it| is_up(it)).count();
        let (up, unused, all) = if topic.few.is_in_use() {
            (few, usual, topic.few.count)
        } else {
            (usual, few, topic.lanes.len())
        };
        // A producer that is being closed still counts.
        let is_closing = |lane: usize| matches!(state(lane), LaneState::Leaving { .. });
        let is_open = self.routes[topic.route].state == State::Known && unused == 0;
        if up == 0 || up >= all || !is_open || topic.all_lanes().any(is_closing) {
            // A huge transaction's own lane, or one that must get its receipts, may have the place of one that has nothing to send.
            self.close_those_without_work(topic_id);
            return false;
        }
        warn!(
            topic = topic.name,
            producers = up,
            "the broker allows no more producers on the topic: going on with so many"
        );
        self.change_lanes(topic_id, up);
        self.close_those_without_work(topic_id);
        let mut lanes = self.topics[topic_id].all_lanes();
        !lanes.any(|lane| self.lanes[lane].needs_producer())
    }

    fn close_those_without_work(&mut self, topic_id: usize) {
        for lane in self.topics[topic_id].all_lanes().collect::<Vec<_>>() {
            let it = &self.lanes[lane];
            if it.is_empty() && matches!(it.state(), LaneState::Up { .. }) {
                self.close_lane(lane);
            }
        }
    }

    /// The topic is to use so many lanes; 0: all.
    fn change_lanes(&mut self, topic_id: usize, count: usize) {
        let topic = &mut self.topics[topic_id];
        topic.few.next = Some(count);
        let route = &mut self.routes[topic.route];
        if route.state == State::Known {
            route.state = State::Changing {
                to: route.partitions,
                anew: false,
            };
        }
        let route = self.topics[topic_id].route;
        self.changing.insert(route);
        self.make_few_possible(route);
    }

    /// What was never written is taken out of lanes that may get no producer, and lanes that have nothing to send leave theirs to those that
    /// wait for receipts.
    pub(super) fn make_few_possible(&mut self, route: usize) {
        for topic_id in self.routes[route].topics.clone() {
            let topic = &self.topics[topic_id];
            if topic.few.next.is_none_or(|count| count == 0) {
                continue;
            }
            let lanes = topic.all_lanes().filter(|&lane| {
                let lane = &self.lanes[lane];
                matches!(lane.state(), LaneState::Up { .. } | LaneState::Down)
                    && !lane.is_empty()
                    && !lane.has_written()
            });
            let lanes: Vec<usize> = lanes.collect();
            self.hold_lanes_again(&lanes);
            let is_waiting = |lane: usize| self.lanes[lane].needs_producer();
            if self.topics[topic_id].all_lanes().any(is_waiting) {
                self.close_those_without_work(topic_id);
            }
        }
    }

    /// The route's lanes have got all their receipts: those that are to be used from now on are.
    pub(super) fn take_lanes(&mut self, route: usize) {
        for topic_id in self.routes[route].topics.clone() {
            let Some(count) = self.topics[topic_id].few.next.take() else {
                continue;
            };
            let few = self.topics[topic_id].few.lanes.clone();
            for lane in self.topics[topic_id].all_lanes().collect::<Vec<_>>() {
                // The usual ones that are open already stay so.
                if count > 0 || few.contains(&lane) {
                    self.close_lane(lane);
                }
            }
            let (now, pause) = (self.now.at, self.settings.partition_refresh);
            let it = &mut self.topics[topic_id].few;
            it.may_grow = false;
            if count == 0 {
                info!(
                    topic = self.topics[topic_id].name,
                    "the broker allows more producers on the topic: going on with all lanes"
                );
                let it = &mut self.topics[topic_id].few;
                it.before = std::mem::take(&mut it.count);
                self.begin_again(topic_id);
                continue;
            }
            it.in_vain = if it.before >= count && it.before > 0 {
                it.in_vain + 1
            } else {
                0
            };
            it.try_later(now, pause);
            it.count = count;
            for number in self.topics[topic_id].few.lanes.len()..count {
                let number = u32::try_from(number).expect("fewer than there are lanes");
                let name = self.lane_name(topic_id, number);
                let lane = self.new_lane(topic_id, number, name, false);
                self.topics[topic_id].few.lanes.push(lane);
            }
            for lane in self.topics[topic_id].few.lanes[..count].iter().copied() {
                self.lanes[lane].rename();
                self.lanes[lane].count_anew();
            }
        }
    }

    /// The usual lanes go on with the transaction that waits. What the broker knows of it, or of a later one, is from another process, and what
    /// is older may just have come again: then it is to come again as well, so that the last arrivals of a key are in order.
    fn begin_again(&mut self, topic_id: usize) {
        let commit_lsn = self.topics[topic_id].few.next_txn;
        for number in 0..self.settings.lanes {
            let lane = self.lane(topic_id, number);
            if self.lanes[lane].begin_with(commit_lsn) {
                self.doubt(lane, Doubt::PassedOver);
            }
        }
    }

    /// True while producers are being closed that are not used any more: they count until they are.
    pub(super) fn is_making_room(&self, topic_id: usize) -> bool {
        let topic = &self.topics[topic_id];
        if topic.few.lanes.is_empty() {
            return false;
        }
        let is_closing =
            |&lane: &usize| matches!(self.lanes[lane].state(), LaneState::Leaving { .. });
        if topic.few.is_in_use() {
            topic.lanes.iter().flatten().any(is_closing)
        } else {
            topic.few.lanes.iter().any(is_closing)
        }
    }

    // --- more again ---

    /// False when the topic's events go to all lanes from this one on, and this one must wait.
    pub(super) fn stays_with_few(&mut self, topic_id: usize, commit_lsn: Lsn) -> bool {
        let few = &mut self.topics[topic_id].few;
        // In mid-transaction a usual lane would give an event the id of an earlier one.
        if few.may_grow && few.last_txn != commit_lsn {
            few.next_txn = commit_lsn;
            self.change_lanes(topic_id, 0);
            // At once, when nothing waits for its receipt.
            self.finish_changes();
            return !self.topics[topic_id].few.is_changing();
        }
        few.last_txn = commit_lsn;
        if few.try_at.is_some_and(|at| at <= self.now.at) {
            self.try_one_more(topic_id);
        }
        true
    }

    /// Asks for the producer of a usual lane, where the topic has one.
    fn try_one_more(&mut self, topic_id: usize) {
        let topic = &self.topics[topic_id];
        let works = !topic.is_paced && !topic.is_unconfirmed && topic.opened_at > topic.stale_since;
        let mut states = topic.few.lanes.iter().map(|&it| self.lanes[it].state());
        let connection = states.find_map(|state| match state {
            LaneState::Up { connection, .. } => Some(connection),
            _ => None,
        });
        let Some(connection) = connection.filter(|_| works && topic.opening == Opening::Idle)
        else {
            return;
        };
        let number = u32::try_from(topic.few.count).expect("fewer than there are lanes");
        let lane = self.lane(topic_id, number);
        if self.lanes[lane].state() != LaneState::Down {
            return;
        }
        let topic = &mut self.topics[topic_id];
        topic.few.is_trying = true;
        topic.few.try_at = None;
        topic.opening = Opening::Creating {
            left: 1,
            failed: false,
            limited: false,
        };
        self.create(lane, connection);
    }

    /// That producer is there, or is not.
    pub(super) fn tried_one_more(&mut self, topic_id: usize, error: Option<&Error>) {
        let topic = &mut self.topics[topic_id];
        topic.opening = Opening::Idle;
        let few = &mut topic.few;
        few.is_trying = false;
        let lane = topic.lanes.get(few.count).copied().flatten();
        let is_up = lane.is_some_and(|it| matches!(self.lanes[it].state(), LaneState::Up { .. }));
        if error.is_none() && is_up {
            few.may_grow = true;
        } else {
            few.in_vain += 1;
            few.try_later(self.now.at, self.settings.partition_refresh);
        }
        // For lanes that came to need a producer meanwhile.
        self.open_topic(topic_id);
    }
}

#[cfg(test)]
#[path = "few_tests.rs"]
mod tests;
