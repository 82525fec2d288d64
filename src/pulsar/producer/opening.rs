//! How the producers of a topic are opened, closed, and opened again. See `topic` for the states.
//!
//! Each attempt finds the topic's broker, and then asks for the partitions (`shape`), unless the topic has a producer that is open: a topic may have been deleted, or
//! have got partitions, and a producer would make the old one anew. What fails is tried again with backoff, for ever: a broker that is
//! away is backpressure and not an error, and a topic that is refused can be mended on the broker's side (a permission, a schema, a topic made anew)
//! while the others go on; where events can be diverted (see `diversion`), a topic that has been in trouble for too long is given up.
//!
//! # Producer ids
//!
//! Every creation gets an id of its own. A broker answers a second creation of the same id with "already created" and
//! without the last sequence id (`ServerCnx.handleProducer`), and an answer that comes late could not be told from that of another attempt. A
//! creation without an answer is closed after a while; should it complete after that, the producer that nobody asked for is closed as well.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::effects::{Created, Effect, Link};
use super::lane::{Accepted, Doubt, Lane, State};
use super::route::State as RouteState;
use super::topic::Opening;
use super::trouble::GivenUp;
use super::{Lsn, Producer, Timer};
use crate::pulsar::verdict;
use crate::{Error, Result};

/// How long a broker may take for a producer: as the Java client's `operationTimeoutMs`.
const CREATION_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection on which receipts are due is asked for a sign of life after this time; without one for as long again its broker does not read it.
const STALL: Duration = Duration::from_secs(3);
/// Connections to one broker besides the shared one.
const SHARDS: u32 = 15;

impl Producer {
    /// Begins an attempt for the topic's lanes that have something to send and no producer, unless one is under way.
    pub(super) fn open_topic(&mut self, topic_id: usize) {
        let topic = &self.topics[topic_id];
        if topic.opening != Opening::Idle {
            return;
        }
        let needed = |lane: usize| self.lanes[lane].needs_producer();
        if !topic.all_lanes().any(needed) || self.is_making_room(topic_id) {
            return;
        }
        let topic = &mut self.topics[topic_id];
        topic.attempt += 1;
        if topic.is_paced {
            self.pause(topic_id);
        } else {
            self.find(topic_id);
        }
    }

    /// Opens the topic's lanes again after something went wrong: at once the first time, with backoff until a receipt shows
    /// that it is well.
    pub(super) fn reopen_topic(&mut self, topic_id: usize) {
        self.topics[topic_id].stale_since = self.serial;
        self.open_topic(topic_id);
        self.topics[topic_id].is_paced = true;
    }

    /// Waits before the next attempt, and says why if something failed.
    fn pause(&mut self, topic_id: usize) {
        let now = self.now.at;
        let gives_up_at = self.gives_up_at(topic_id);
        let topic = &mut self.topics[topic_id];
        let mut delay = topic.backoff.next_delay();
        if let Some(given_up) = gives_up_at {
            delay = delay.min(given_up.at.saturating_duration_since(now));
        }
        topic.opening = Opening::Pausing { until: now + delay };
        if let Some(failure) = topic.failure.take() {
            topic.is_told = true;
            failure.tell(&topic.name, delay);
        }
        self.wake_at(now + delay, Timer::Topic(topic_id));
    }

    /// A pause may be over.
    pub(super) fn pause_is_over(&mut self, topic_id: usize) {
        let Opening::Pausing { until } = self.topics[topic_id].opening else {
            return;
        };
        if until > self.now.at {
            return;
        }
        if self
            .gives_up_at(topic_id)
            .is_some_and(|given_up| given_up.at <= self.now.at)
        {
            self.topic_refused(topic_id);
        } else {
            self.topics[topic_id].attempt += 1;
            self.find(topic_id);
        }
    }

    /// When the topic's events are diverted, if its trouble goes on.
    fn gives_up_at(&self, topic_id: usize) -> Option<GivenUp> {
        let topic = &self.topics[topic_id];
        let trouble = topic.trouble.as_ref()?;
        let others = self.working.iter().flatten();
        let others = others.filter(|(topic, _)| *topic != topic_id);
        trouble.ends_at(
            self.settings.diversion,
            topic.refused.is_some(),
            others.map(|(_, at)| *at).max(),
        )
    }

    /// Topics that have waited for too long, or whose events take so much room that others might soon have none, do not wait for the end of
    /// a pause.
    pub(super) fn give_up_the_hopeless(&mut self) {
        if self.settings.diversion.is_none() {
            return;
        }
        let room_is_short = self.is_much(self.in_flight());
        for topic in self.topics_in_trouble() {
            let Opening::Pausing { .. } = self.topics[topic].opening else {
                continue;
            };
            let Some(given_up) = self.gives_up_at(topic) else {
                continue;
            };
            let takes_much =
                room_is_short && given_up.is_clear && self.is_much(self.size_of(topic));
            if given_up.at <= self.now.at || takes_much {
                self.topic_refused(topic);
            }
        }
        self.give_up_routes();
    }

    /// What the topic's lanes have without receipt; and what its route holds while its partitions change, since that waits for each of them.
    fn size_of(&self, topic_id: usize) -> (usize, usize) {
        let lanes = self.topics[topic_id].all_lanes();
        let size = lanes.fold((0, 0), |sum, lane| {
            let size = self.lanes[lane].size();
            (sum.0 + size.0, sum.1 + size.1)
        });
        let route = &self.routes[self.topics[topic_id].route];
        if !matches!(route.state, RouteState::Changing { .. }) {
            return size;
        }
        let bytes: usize = route.held.iter().map(|held| held.bytes).sum();
        (size.0 + route.held.len(), size.1 + bytes)
    }

    /// More than a quarter of either limit; or anything at all that everything waits for.
    pub(super) fn is_much(&self, (messages, bytes): (usize, usize)) -> bool {
        messages > self.settings.max_in_flight_messages / 4
            || bytes > self.settings.max_in_flight_bytes / 4
            || self.draining.is_some() && messages > 0
    }

    /// An attempt failed.
    fn failed(&mut self, topic_id: usize, error: &Error) {
        self.note_failure(topic_id, error);
        let topic = &mut self.topics[topic_id];
        topic.stale_since = self.serial;
        topic.is_paced = true;
        self.pause(topic_id);
    }

    // --- the broker ---

    fn find(&mut self, topic_id: usize) {
        let topic = &mut self.topics[topic_id];
        topic.opening = Opening::Finding;
        self.effects.push(Effect::Find {
            topic: topic_id,
            name: topic.name.clone(),
            attempt: topic.attempt,
            next_broker: topic.next_broker.take(),
            shard: topic.shard,
        });
    }

    /// The topic's broker was found, or was not.
    pub(super) fn found(&mut self, topic_id: usize, attempt: u64, answer: Result<Link>) {
        if let Ok(link) = answer {
            // In any case: one that nobody uses is let go of after a while.
            self.connections.add(link, self.now.at);
        }
        let topic = &self.topics[topic_id];
        if topic.attempt != attempt || topic.opening != Opening::Finding {
            return;
        }
        let link = match answer {
            Ok(link) => link,
            Err(error) => return self.failed(topic_id, &error),
        };
        self.connections.expect(link.connection, topic_id);
        self.count(topic_id, link.connection);
    }

    // --- the shape ---

    /// Makes sure that the topic is still there, at the last moment before its producers are asked for.
    fn count(&mut self, topic_id: usize, connection: u64) {
        self.topics[topic_id].opening = Opening::Counting { connection };
        let topic = &self.topics[topic_id];
        let is_open = |lane: usize| matches!(self.lanes[lane].state(), State::Up { .. });
        // One that was opened before another was lost proves nothing.
        let is_there = topic.opened_at > topic.stale_since && topic.all_lanes().any(is_open);
        if is_there || self.is_counted(topic_id) {
            self.create_all(topic_id, connection);
        } else {
            self.ask(self.topics[topic_id].route);
        }
    }

    /// The partitions were counted: topics that waited for it go on.
    pub(super) fn counted_for(&mut self, topic_id: usize) {
        let Opening::Counting { connection } = self.topics[topic_id].opening else {
            return;
        };
        if self.is_counted(topic_id) {
            self.create_all(topic_id, connection);
        } else {
            // Another producer was lost after the question.
            self.ask(self.topics[topic_id].route);
        }
    }

    /// They could not be counted.
    pub(super) fn not_counted_for(&mut self, topic_id: usize, error: &Error) {
        if matches!(self.topics[topic_id].opening, Opening::Counting { .. }) {
            self.failed(topic_id, error);
        }
    }

    // --- the producers ---

    /// Asks for the producers of all lanes that need one.
    fn create_all(&mut self, topic_id: usize, connection: u64) {
        let lanes = self.topics[topic_id].all_lanes();
        let wanted: Vec<usize> = lanes
            .filter(|&lane| self.lanes[lane].needs_producer())
            .collect();
        if wanted.is_empty() {
            let topic = &mut self.topics[topic_id];
            topic.opening = Opening::Idle;
            if topic.refused.is_none() {
                // What was said of it was of what it has no more.
                (topic.trouble, topic.failure) = (None, None);
            }
            return;
        }
        let is_up = |lane: usize| matches!(self.lanes[lane].state(), State::Up { .. });
        if !self.topics[topic_id].all_lanes().any(is_up) {
            self.topics[topic_id].is_unconfirmed = true;
        }
        self.topics[topic_id].opening = Opening::Creating {
            left: wanted.len(),
            failed: false,
            limited: false,
        };
        for lane in wanted {
            self.create(lane, connection);
        }
    }

    pub(super) fn create(&mut self, lane_id: usize, connection: u64) {
        let producer_id = self.next_id;
        self.next_id += 1;
        let lane = &mut self.lanes[lane_id];
        if let Some(earlier) = lane.create(connection, producer_id, self.now.at) {
            self.producers.remove(&earlier);
        }
        self.producers.insert(producer_id, lane_id);
        self.connections.add_producer(connection, producer_id);
        self.creations.push_back((self.now.at, producer_id));
        self.effects.push(Effect::Create {
            connection,
            topic: self.topics[lane.topic].name.clone(),
            producer_id,
            producer_name: lane.named.name.clone(),
        });
    }

    /// A producer is there, or is not.
    pub(super) fn created(
        &mut self,
        connection: u64,
        producer_id: u64,
        answer: Result<Created>,
    ) -> Result<()> {
        let lane_id = self.producers.get(&producer_id).copied();
        let waits = lane_id.filter(|&lane| self.lanes[lane].is_creating(producer_id));
        let Some(lane_id) = waits else {
            // Too late: it was given up, or its connection has ended.
            if answer.is_ok() && self.connections.is_known(connection) {
                self.effects.push(Effect::Close {
                    connection,
                    producer_id,
                });
            }
            return Ok(());
        };
        let State::Creating { closed, .. } = self.lanes[lane_id].state() else {
            return Ok(());
        };
        let topic_id = self.lanes[lane_id].topic;
        let created = match answer {
            Ok(_) if closed => {
                self.lane_down(lane_id);
                let error = verdict::is_closed(&self.topics[topic_id].name);
                self.answered_for(topic_id, Some(&error));
                return Ok(());
            }
            Ok(created) => created,
            Err(error) => {
                self.lane_down(lane_id);
                let next_broker = verdict::next_broker(&error).cloned();
                if next_broker.is_some() {
                    self.topics[topic_id].next_broker = next_broker;
                }
                self.answered_for(topic_id, Some(&error));
                return Ok(());
            }
        };
        let lane = &self.lanes[lane_id];
        if let Some(pushed) = created.last_sequence_id
            && lane.is_beyond(pushed, self.known_log_end(lane, pushed))
        {
            return Err(went_back(&self.topics[topic_id].name, &lane.named.name));
        }
        let told = created.last_sequence_id;
        let opened = self.with_lane(lane_id, |lane, desk| {
            lane.created(told, created.schema_version, desk)
        });
        match opened {
            Ok(too_large) => self.refuse_too_large(lane_id, connection, too_large)?,
            Err(doubt) => self.doubt(lane_id, doubt),
        }
        self.topics[topic_id].refused = None;
        self.topics[topic_id].opened_at = self.serial;
        self.divert_refused(lane_id);
        self.drained();
        self.answered_for(topic_id, None);
        Ok(())
    }

    /// Messages that the lane's new broker does not take: such a frame would end the connection without a word, again and again.
    fn refuse_too_large(
        &mut self,
        lane_id: usize,
        connection: u64,
        too_large: Vec<(u64, usize)>,
    ) -> Result<()> {
        let largest = self.connections.max_message_bytes(connection);
        for (sequence_id, bytes) in too_large {
            let message = format!("{bytes} bytes, and the broker accepts at most {largest}");
            self.refuse_message(lane_id, sequence_id, &message)?;
        }
        self.with_lane(lane_id, Lane::transmit);
        Ok(())
    }

    /// One creation of the topic's attempt is over.
    pub(super) fn answered_for(&mut self, topic_id: usize, error: Option<&Error>) {
        if self.topics[topic_id].few.is_trying {
            return self.tried_one_more(topic_id, error);
        }
        if let Some(error) = error {
            self.note_failure(topic_id, error);
            let topic = &mut self.topics[topic_id];
            topic.stale_since = self.serial;
            if let Opening::Creating {
                failed, limited, ..
            } = &mut topic.opening
            {
                *failed = true;
                *limited |= verdict::is_producer_limit(error);
            }
        }
        let topic = &mut self.topics[topic_id];
        let Opening::Creating {
            left,
            failed,
            limited,
        } = &mut topic.opening
        else {
            return;
        };
        *left -= 1;
        if *left > 0 {
            return;
        }
        let (failed, limited) = (*failed, *limited);
        if topic.is_unconfirmed {
            let route = topic.route;
            self.ask(route);
        }
        if limited && self.make_do_with_few(topic_id) {
            self.topics[topic_id].opening = Opening::Idle;
            return;
        }
        let topic = &mut self.topics[topic_id];
        if failed {
            topic.is_paced = true;
            self.pause(topic_id);
            return;
        }
        topic.opening = Opening::Idle;
        topic.failure = None;
        if std::mem::take(&mut topic.is_told) {
            info!(topic = topic.name, "the topic is usable again");
        }
        // For lanes that came to need a producer meanwhile.
        self.open_topic(topic_id);
    }

    /// Creations that are not answered are closed, and tried again.
    pub(super) fn give_up_creations(&mut self) {
        while let Some(&(since, producer_id)) = self.creations.front() {
            let lane = self.producers.get(&producer_id).copied();
            let lane = lane.filter(|&lane| self.lanes[lane].is_creating(producer_id));
            if lane.is_some() && self.now.at - since < CREATION_TIMEOUT {
                break;
            }
            self.creations.pop_front();
            let Some(lane) = lane else {
                continue;
            };
            self.close_producer_of(lane);
            let topic = &self.topics[self.lanes[lane].topic].name;
            let error = verdict::no_answer(topic);
            self.answered_for(self.lanes[lane].topic, Some(&error));
        }
    }

    /// The broker is to close a lane's producer.
    pub(super) fn leave(&mut self, lane: usize) {
        let was_creating = matches!(self.lanes[lane].state(), State::Creating { .. });
        self.close_producer_of(lane);
        if was_creating {
            self.answered_for(self.lanes[lane].topic, None);
        }
    }

    fn close_producer_of(&mut self, lane: usize) {
        if let Some((connection, producer_id)) = self.lanes[lane].leave() {
            self.effects.push(Effect::Close {
                connection,
                producer_id,
            });
            self.write_off(lane, connection);
        }
    }

    /// A lane has no producer any more.
    pub(super) fn lane_down(&mut self, lane: usize) {
        if let Some((connection, producer_id)) = self.lanes[lane].down() {
            self.connections
                .remove_producer(connection, producer_id, self.now.at);
        }
    }

    /// The end of the log, for a lane that was told this id: at least what was written under names that are forgotten, if
    /// nothing that the lane has could be taken for old (see `forgetting`).
    fn known_log_end(&self, lane: &Lane, pushed: u64) -> Lsn {
        if lane.is_above(pushed) {
            self.log_end.max(self.forgotten_to)
        } else {
            self.log_end
        }
    }

    /// What was written to a producer that the lane has left leaves its room on the connection to others.
    pub(super) fn write_off(&mut self, lane: usize, connection: u64) {
        let bytes = self.lanes[lane].take_written_bytes();
        if bytes > 0 {
            self.connections.written_off(connection, bytes);
            self.resume_waiting(connection);
        }
    }

    /// A producer that was to be closed is.
    pub(super) fn closed(&mut self, producer_id: u64) {
        let Some(&lane) = self.producers.get(&producer_id) else {
            return;
        };
        if matches!(self.lanes[lane].state(), State::Leaving { producer_id: its, .. } if its == producer_id)
        {
            self.lane_down(lane);
            self.divert_refused(lane);
            self.drained();
            self.open_topic(self.lanes[lane].topic);
        }
    }

    /// Nothing is known of what a lane has without receipt: it takes another name. See `lane`.
    pub(super) fn doubt(&mut self, lane_id: usize, doubt: Doubt) {
        // (Another process had reason to use that name, and has raised it for that.)
        if doubt != Doubt::UsedName {
            self.settings.doubts.raise();
        }
        self.leave(lane_id);
        self.with_lane(lane_id, |lane, _| lane.rename());
        let lane = &self.lanes[lane_id];
        warn!(
            topic = self.topics[lane.topic].name,
            producer = lane.named.name,
            "publishing under a new name, so some events may come twice: {doubt}"
        );
    }

    // --- a connection for a throttled topic ---

    /// Whether the connections write nothing of what is handed to them, as of now.
    pub(in crate::pulsar) fn hold_connections(&mut self, are_held: bool, now: Instant) {
        self.connections.hold(are_held, now);
    }

    /// A broker that throttles a topic reads nothing more from the connection. Which topic that is cannot be told; so all topics that wait for receipts on a
    /// silent connection get connections of their own, and the silent one ends. From then on a throttled topic holds up none but itself.
    pub(super) fn part_from_throttled(&mut self) {
        for connection in self.connections.newly_silent(self.now.at, STALL) {
            self.effects.push(Effect::Ping { connection });
        }
        for connection in self.connections.stalled(self.now.at, STALL) {
            let mut topics: BTreeSet<usize> = BTreeSet::new();
            for producer_id in self.connections.producers(connection) {
                let Some(&lane) = self.producers.get(&producer_id) else {
                    continue;
                };
                let lane = &self.lanes[lane];
                let up = State::Up {
                    connection,
                    producer_id,
                };
                if lane.state() == up && !lane.is_empty() {
                    topics.insert(lane.topic);
                }
            }
            // One by itself leaves the shared connection to the others, which may be asking for producers there.
            let is_shared = topics.iter().any(|&topic| self.topics[topic].shard == 0);
            if topics.len() < 2 && !(is_shared && self.topics.len() > 1) {
                continue;
            }
            for &topic in &topics {
                self.move_to_own_connection(topic);
            }
            let topics = topics.len();
            self.disconnect(
                connection,
                format!("the broker does not read it, and {topics} topics wait: each gets a connection of its own"),
            );
        }
    }

    /// The topic uses another connection from its next opening on.
    pub(super) fn move_to_own_connection(&mut self, topic: usize) {
        // One after the other, so that those that meet again part again.
        self.last_shard = self.last_shard % SHARDS + 1;
        self.topics[topic].shard = self.last_shard;
    }

    /// What the topic has accepted counts no more: its policies may have changed.
    pub(super) fn forget_accepted(&mut self, topic_id: usize) {
        self.topics[topic_id].accepted = Accepted::default();
        self.topics[topic_id].batch_max_bytes = usize::MAX;
    }
}

/// The database was put back to an older state without a new timeline: its new events would get ids of old ones.
fn went_back(topic: &str, producer: &str) -> Error {
    Error::refused(format!(
        "producer {producer} has published events to topic {topic} that lie behind the end of this database's log: the \
         database was put back to an older state on the same timeline, and its new events would be taken for old ones"
    ))
    .hint("set WALPOST_PRODUCER_NAME to a name that was never used: what is not confirmed is then published again")
}
