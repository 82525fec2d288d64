//! The shape of a topic: how many partitions it has, when that is asked, and what happens when it changes.
//!
//! It is asked when the first event comes, every `WALPOST_PARTITION_REFRESH` for a topic with partitions, and before producers are opened
//! on a topic that has none open. A broker that makes topics on first use would otherwise make what an operator has deleted: a
//! partition of a topic that is no more, which no consumer of the topic would read, or a topic without partitions beside its partitions.
//!
//! A topic may still be deleted or replaced between the answer and the producers, which then make it anew. So when producers were opened on a topic that had
//! none, the question comes once more, and nothing is sent before its answer.
//!
//! # Growth
//!
//! A topic that gets more partitions sends some keys elsewhere. The new count is taken only when everything sent under the
//! old one has its receipt, so a key's later events never overtake its earlier ones; and when everything that was diverted is
//! stored, because nothing in a new partition would wait for that. The count is part of the producers' names (see
//! the parent module), because a key's sequence ids in its new partition must not be measured by what other keys did there before.
//! An event that was sent under the old count, and whose confirmation was lost with the process or with Postgres, therefore
//! comes again under the new one: the moment of growth is at least once, also with deduplication.
//!
//! # Other changes
//!
//! A topic with fewer partitions than before, or with none, or with some where it had none, is another topic: somebody has deleted the
//! old one. A second answer must confirm a count that is smaller. What has no receipt from a partition that is gone is taken out of its lanes and goes to the new ones, in the order of the
//! log, under names that were never used: receipts may have been on their way, so this moment is at least once, too.
//!
//! # A topic that is missing
//!
//! The question forbids the broker to make the topic, unless it is the first one. A topic that was there and is missing is waited for during
//! [`DELETED_GRACE`], in which an operator who replaces it can do so. After that it counts as a topic without partitions, and the broker decides whether it is made on
//! first use.

use std::collections::BTreeSet;
use std::time::Duration;

use tracing::{debug, info, warn};

use super::effects::Effect;
use super::lane::{Lane, State as LaneState};
use super::route::{Held, Naming, Question, State};
use super::topic::{Opening, Topic};
use super::trouble::{Failure, GivenUp, Trouble};
use super::{Drain, Producer, Timer};
use crate::pulsar::verdict;
use crate::retry::Backoff;
use crate::{Error, Result};

/// How long a topic that was there may be missing before the broker may make it anew.
const DELETED_GRACE: Duration = Duration::from_secs(5);
/// An answer is as good as a new one for this long.
const FRESH: Duration = Duration::from_secs(1);

impl Producer {
    /// Asks how many partitions a route has, unless that is being asked since the last signal.
    pub(super) fn ask(&mut self, index: usize) {
        let serial = self.serial;
        let route = &mut self.routes[index];
        if route.question.asked == Some(serial) {
            return;
        }
        route.question.asked = Some(serial);
        route.question.again_at = None;
        self.effects.push(Effect::Count {
            route: index,
            topic: route.name.clone(),
            asked: serial,
            create: route.state == State::Unknown,
        });
    }

    /// It is time for a question that was put off.
    pub(super) fn ask_again(&mut self, index: usize) {
        let question = &self.routes[index].question;
        if question.again_at.is_some_and(|at| at <= self.now.at) {
            self.ask(index);
        }
    }

    fn ask_later(&mut self, index: usize, delay: Duration) {
        let at = self.now.at + delay;
        self.routes[index].question.again_at = Some(at);
        self.wake_at(at, Timer::Route(index));
    }

    /// True when what is known of the topic's shape was asked after all that may have changed it.
    pub(super) fn is_counted(&self, topic_id: usize) -> bool {
        let topic = &self.topics[topic_id];
        let route = &self.routes[topic.route];
        let Question {
            answered: Some((asked, at)),
            suspect: None,
            ..
        } = route.question
        else {
            return false;
        };
        route.topics.contains(&topic_id) && asked >= topic.stale_since && self.now.at - at < FRESH
    }

    /// Counts the partitions of topics again whose time has come. A topic without partitions gets some only when it is made anew, and then its producers are closed.
    pub(super) fn refresh_partitions(&mut self) {
        while let Some(&(at, index)) = self.refreshing.first()
            && at <= self.now.at
        {
            self.refreshing.pop_first();
            let route = &self.routes[index];
            // One that is being asked about gets its time with the answer.
            if route.question.asked.is_none() && route.question.again_at.is_none() {
                self.ask(index);
            }
        }
    }

    /// The partitions of a route, if it has any, are counted again after the usual time.
    fn refresh_later(&mut self, index: usize) {
        let route = &mut self.routes[index];
        self.refreshing.remove(&(route.refresh_at, index));
        route.refresh_at = self.now.at + self.settings.partition_refresh;
        if route.partitions > 0 {
            self.refreshing.insert((route.refresh_at, index));
        }
    }

    /// A broker answered how many partitions a route has, or did not.
    pub(super) fn counted(&mut self, index: usize, asked: u64, answer: Result<u32>) {
        if self.routes[index].question.asked != Some(asked) {
            return;
        }
        self.routes[index].question.asked = None;
        match answer {
            Ok(partitions) => {
                let route = &mut self.routes[index];
                route.question.missing_since = None;
                if route.trouble.take().is_some() {
                    info!(topic = route.name, "the topic is usable again");
                }
                route.backoff.reset();
                self.partitions_counted(index, asked, partitions);
            }
            Err(error) if self.routes[index].state == State::Unknown => {
                self.not_counted(index, &error);
            }
            Err(error) if verdict::is_missing(&error) => self.missing(index, asked, &error),
            Err(error) => self.not_counted_again(index, &error),
        }
    }

    /// Nobody says how many there are: asked again later, until the topic has been in trouble for too long.
    fn not_counted(&mut self, index: usize, error: &Error) {
        let now = self.now.at;
        let route = &mut self.routes[index];
        route.trouble = Trouble::add(route.trouble.take(), error, now);
        self.troubled.insert(Timer::Route(index));
        let route = &mut self.routes[index];
        let mut delay = route.backoff.next_delay();
        if let Some(given_up) = self.route_gives_up_at(index) {
            delay = delay.min(given_up.at.saturating_duration_since(now));
            if delay.is_zero() {
                return self.route_refused(index);
            }
        }
        Failure::new(error).tell(&self.routes[index].name, delay);
        self.ask_later(index, delay);
    }

    pub(super) fn route_gives_up_at(&self, index: usize) -> Option<GivenUp> {
        let trouble = self.routes[index].trouble.as_ref()?;
        let others = self.working.iter().flatten().map(|(_, at)| *at).max();
        trouble.ends_at(self.settings.diversion, false, others)
    }

    /// Routes that nobody knows, and whose events take much room, are given up.
    pub(super) fn give_up_routes(&mut self) {
        let room_is_short = self.is_much(self.in_flight());
        for index in self.routes_in_trouble() {
            let route = &self.routes[index];
            if route.state != State::Unknown || route.question.again_at.is_none() {
                continue;
            }
            let Some(given_up) = self.route_gives_up_at(index) else {
                continue;
            };
            let size = || {
                let bytes = route.held.iter().map(|held| held.bytes).sum();
                (route.held.len(), bytes)
            };
            let takes_much = room_is_short && given_up.is_clear && self.is_much(size());
            if given_up.at <= self.now.at || takes_much {
                self.routes[index].question.again_at = None;
                self.route_refused(index);
            }
        }
    }

    /// They could not be counted again: those who wait for it try again, and otherwise it is asked at the usual time.
    fn not_counted_again(&mut self, index: usize, error: &Error) {
        debug!(
            topic = self.routes[index].name,
            "partitions not counted: {}",
            error.report()
        );
        self.refresh_later(index);
        let mut waits = false;
        for topic in self.routes[index].topics.clone() {
            waits |= self.topics[topic].is_unconfirmed;
            self.not_counted_for(topic, error);
        }
        if waits {
            let delay = self.routes[index].backoff.next_delay();
            self.ask_later(index, delay);
        }
    }

    /// There is no such topic any more.
    fn missing(&mut self, index: usize, asked: u64, error: &Error) {
        let now = self.now.at;
        let route = &mut self.routes[index];
        let since = *route.question.missing_since.get_or_insert(now);
        let was_there = |&topic: &usize| self.topics[topic].opened_at > 0;
        if now - since >= DELETED_GRACE || !route.topics.iter().any(was_there) {
            // The broker decides, when a producer is asked for.
            return self.partitions_counted(index, asked, 0);
        }
        let gone = verdict::is_gone(&route.name);
        for topic in self.routes[index].topics.clone() {
            self.topics[topic].stale_since = self.serial;
            self.topics[topic].is_paced = true;
            if self.topics[topic].is_unconfirmed {
                // A partition that was made anew by asking for its producers.
                for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
                    self.leave(lane);
                }
            }
        }
        let route = &self.routes[index];
        debug!(topic = route.name, "{}", error.report());
        self.not_counted_again(index, &gone);
    }

    /// A broker said how many partitions a route has.
    fn partitions_counted(&mut self, index: usize, asked: u64, partitions: u32) {
        let now = self.now.at;
        self.refresh_later(index);
        let route = &mut self.routes[index];
        let is_smaller = route.state != State::Unknown && partitions < route.partitions;
        if is_smaller && route.question.suspect != Some(partitions) {
            route.question.suspect = Some(partitions);
            // Behind this signal: another question.
            self.serial += 1;
            return self.ask(index);
        }
        route.question.suspect = None;
        route.question.answered = Some((asked, now));
        let before = route.partitions;
        match route.state {
            State::Unknown => self.take_partitions(index, partitions, false),
            State::Known if before == partitions => {}
            // Not lanes of the same names anew: they would begin to count in mid-transaction.
            State::Changing { anew: false, .. } if before == partitions => {
                let mut topics = route.topics.iter();
                if topics.any(|&it| self.topics[it].few.is_changing()) {
                    route.state = State::Changing {
                        to: partitions,
                        anew: false,
                    };
                } else {
                    self.known(index);
                }
            }
            State::Known | State::Changing { .. } if partitions > before && before > 0 => {
                info!(
                    topic = route.name,
                    from = before,
                    to = partitions,
                    "the topic's partitions have changed in number"
                );
                let anew = matches!(route.state, State::Changing { anew: true, .. });
                route.state = State::Changing {
                    to: partitions,
                    anew,
                };
                self.changing.insert(index);
            }
            State::Known | State::Changing { .. } => self.replaced(index, partitions),
        }
        for topic in self.routes[index].topics.clone() {
            self.confirm(topic, asked);
            self.counted_for(topic);
        }
    }

    /// The topic is there: what waited for that is sent.
    fn confirm(&mut self, topic_id: usize, asked: u64) {
        let topic = &mut self.topics[topic_id];
        let is_opening = matches!(topic.opening, Opening::Creating { .. });
        if !topic.is_unconfirmed || is_opening || asked < topic.opened_at {
            return;
        }
        topic.is_unconfirmed = false;
        for lane in self.topics[topic_id].all_lanes().collect::<Vec<_>>() {
            self.with_lane(lane, Lane::transmit);
        }
    }

    /// The topic was deleted and made anew with another number of partitions.
    fn replaced(&mut self, index: usize, partitions: u32) {
        let route = &mut self.routes[index];
        let from = route.partitions;
        warn!(
            topic = route.name,
            from,
            to = partitions,
            "the topic was made anew with another number of partitions: going on with those, and some events may come twice"
        );
        route.state = State::Changing {
            to: partitions,
            anew: true,
        };
        self.changing.insert(index);
        let stay = if from == 0 || partitions == 0 {
            0
        } else {
            partitions as usize
        };
        let gone: Vec<usize> = route.topics.iter().skip(stay).copied().collect();
        for &topic in &gone {
            for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
                self.leave(lane);
            }
            self.topics[topic].opening = Opening::Idle;
        }
        self.hold_again(&gone);
    }

    /// Takes everything without receipt out of the lanes of these topics of one route, in the order of the log, and holds it with what is held.
    pub(super) fn hold_again(&mut self, topics: &[usize]) {
        let lanes = topics.iter().flat_map(|&it| self.topics[it].all_lanes());
        self.hold_lanes_again(&lanes.collect::<Vec<_>>());
    }

    /// The same for some lanes.
    pub(super) fn hold_lanes_again(&mut self, lanes: &[usize]) {
        let mut taken: Vec<Held> = Vec::new();
        for &lane in lanes {
            let headroom = self.lanes[lane].named.headroom;
            let batches = self.with_lane(lane, |lane, desk| lane.take_all(desk.now.at));
            // The events get other ids.
            self.lanes[lane].forget_producers(self.next_id);
            for batch in batches {
                taken.extend(batch.into_events(headroom));
            }
            self.dedicated.retain(|_, dedicated| *dedicated != lane);
        }
        let Some(topic) = lanes.first().map(|&lane| self.lanes[lane].topic) else {
            return;
        };
        self.in_flight_messages += taken.len();
        self.held_messages += taken.len();
        self.in_flight_bytes += taken.iter().map(|held| held.bytes).sum::<usize>();
        // Some of what was held before may have been taken out of other lanes, so that both must be put in order together.
        let index = self.topics[topic].route;
        let route = &mut self.routes[index];
        taken.extend(route.held.drain(..));
        taken.sort_by_key(|held| (held.commit_lsn, held.row.ordinal()));
        route.held.extend(taken);
        if route.state == State::Known {
            self.releasable.insert(index);
        }
    }

    /// Ends the changes of those routes whose lanes have got all their receipts.
    pub(super) fn finish_changes(&mut self) {
        for index in std::mem::take(&mut self.changing) {
            let State::Changing { to, anew } = self.routes[index].state else {
                continue;
            };
            self.make_few_possible(index);
            let topics = &self.routes[index].topics;
            let lanes = topics
                .iter()
                .flat_map(|&topic| self.topics[topic].all_lanes());
            // An attempt under way would come back with a producer of the old name.
            let is_idle = |lane: usize| {
                let lane = &self.lanes[lane];
                lane.is_empty() && !matches!(lane.state(), LaneState::Creating { .. })
            };
            let is_drained = lanes.collect::<Vec<_>>().into_iter().all(is_idle);
            if is_drained && self.dedicated.is_empty() && self.is_stored(index) {
                self.take_partitions(index, to, anew);
                self.take_lanes(index);
                continue;
            }
            self.changing.insert(index);
            // More of its transaction may be held here than there is room for, and its end would never be read.
            if self.draining.is_none() && !self.dedicated.is_empty() {
                self.drain(Drain::AfterTail);
            }
        }
    }

    /// True when what was diverted on a route is safe.
    fn is_stored(&self, index: usize) -> bool {
        let route = &self.routes[index];
        let topics = route.topics.iter();
        let of_topics = topics.map(|&topic| self.topics[topic].last_diverted);
        of_topics.fold(route.last_diverted, u64::max) <= self.stored_events
    }

    /// From now on the route has these partitions. `anew`: under names that were never used.
    fn take_partitions(&mut self, index: usize, partitions: u32, anew: bool) {
        let naming = self.naming(partitions);
        let names = self.routes[index].topic_names(partitions);
        let topics: Vec<usize> = names
            .iter()
            .map(|name| self.topic(name, naming, index))
            .collect();
        if anew {
            for &topic in &topics {
                self.name_anew(topic);
            }
        }
        let route = &mut self.routes[index];
        let before = std::mem::replace(&mut route.topics, topics);
        route.partitions = partitions;
        self.asking.remove(&(self.routes[index].since, index));
        self.refresh_later(index);
        self.known(index);
        for topic in before {
            if !self.routes[index].topics.contains(&topic) {
                self.close_topic(topic);
            }
        }
    }

    /// A route's partitions are known: what is held may go.
    fn known(&mut self, index: usize) {
        let route = &mut self.routes[index];
        route.state = State::Known;
        if !route.held.is_empty() {
            self.releasable.insert(index);
        }
        // Its lanes may not have been told, when they were of no route.
        let stored = self.stored_events;
        for topic in self.routes[index].topics.clone() {
            for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
                self.with_lane(lane, |lane, desk| lane.stored(stored, desk));
            }
        }
    }

    /// Nothing goes to this topic any more.
    fn close_topic(&mut self, topic: usize) {
        for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
            self.close_lane(lane);
        }
        let topic = &mut self.topics[topic];
        topic.opening = Opening::Idle;
        topic.trouble = None;
    }

    /// The lanes of a topic that has nothing in them get names that were never used.
    fn name_anew(&mut self, topic: usize) {
        for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
            self.close_lane(lane);
            let lane = &mut self.lanes[lane];
            lane.forget_producers(self.next_id);
            lane.rename();
            lane.count_anew();
        }
        let topic = &mut self.topics[topic];
        topic.anew = true;
        topic.few.end();
        topic.refused = None;
    }

    /// A checksum of all that decides which lane and ordinal an event gets; see the parent module's documentation.
    fn naming(&self, partitions: u32) -> Naming {
        let settings = &self.settings;
        let text = format!(
            "{}\n{}\n{partitions}\n{:?}",
            settings.routing, settings.lanes, settings.hashing
        );
        Naming {
            routing: crc32c::crc32c(text.as_bytes()),
            epoch: self.epoch,
        }
    }

    /// From now on events are of this epoch. The lanes must be empty.
    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        let topics: BTreeSet<usize> = self.topic_index.values().copied().collect();
        for topic in topics {
            let routing = self.topics[topic].naming.routing;
            self.rename(topic, Naming { routing, epoch });
        }
    }

    /// The topic of that name, whose producers' names end in `naming` from now on. Its lanes must be empty. Lanes of a name that it
    /// had before are taken up again: they know how far they have counted, and what they have written.
    fn topic(&mut self, name: &str, naming: Naming, route: usize) -> usize {
        let place = (route, name.to_owned());
        if let Some(&index) = self.topic_index.get(&place) {
            self.rename(index, naming);
            return index;
        }
        let (initial, max) = self.settings.reconnect;
        let backoff = Backoff::new(initial, max);
        let lanes = self.settings.lanes;
        let mut topic = Topic::new(name.to_owned(), route, lanes, naming, backoff);
        let index = self.topics.insert(|_, left| {
            // No attempt has the number of an earlier topic's.
            topic.attempt = left.map_or(0, |left| left.attempt);
            topic
        });
        self.topic_index.insert(place, index);
        self.routes[route].every_topic.push(index);
        self.check_for_idle(index, self.now.at + self.settings.producer_idle);
        index
    }

    /// See [`Producer::topic`].
    fn rename(&mut self, index: usize, naming: Naming) {
        let topic = &mut self.topics[index];
        if topic.naming == naming {
            return;
        }
        let lanes = topic.earlier_lanes.remove(&naming);
        let lanes = lanes.unwrap_or_else(|| vec![None; self.settings.lanes as usize]);
        let old = std::mem::replace(&mut topic.lanes, lanes);
        // They are of names that will not be used again, as a huge transaction's are.
        let few = std::mem::take(&mut topic.few).lanes;
        topic.dedicated.extend(&few);
        let before = std::mem::replace(&mut topic.naming, naming);
        for lane in old.iter().flatten().copied().chain(few).collect::<Vec<_>>() {
            self.close_lane(lane);
        }
        self.topics[index].earlier_lanes.insert(before, old);
    }
}
