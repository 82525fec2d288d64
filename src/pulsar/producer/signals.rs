//! What brokers say, applied to the lanes: the receiving half of the [`Producer`].
//!
//! Every signal about a producer names its id, and no id is used twice. One for a producer that its lane has left
//! changes nothing, except that a receipt is true: what was stored stays stored.

use std::collections::BTreeSet;

use tracing::{debug, info, warn};

use super::effects::Signal;
use super::lane::{Accepted, Doubt, Lane, Receipt, State};
use super::{Now, Producer};
use crate::ack::TxnNo;
use crate::meter::Side;
use crate::pulsar::verdict::{self, SendVerdict};
use crate::pulsar::wire::NextBroker;
use crate::{Error, Result};

/// Rows named in an error; more are counted.
const NAMED_ROWS: usize = 5;

impl Producer {
    /// Applies a signal. An error means that an event can never be published as it is.
    pub(in crate::pulsar) fn on(&mut self, signal: Signal, now: Now) -> Result<()> {
        self.now = now;
        self.serial += 1;
        self.apply(signal)?;
        self.settle()
    }

    fn apply(&mut self, signal: Signal) -> Result<()> {
        match signal {
            Signal::Receipt {
                connection,
                producer_id,
                sequence_id,
                stored_before,
            } => self.receipt(connection, producer_id, sequence_id, stored_before),
            Signal::SendError {
                connection,
                producer_id,
                sequence_id,
                code,
                message,
            } => return self.send_error(connection, producer_id, sequence_id, (code, &message)),
            Signal::ProducerClosed {
                connection,
                producer_id,
                next_broker,
            } => self.producer_closed(connection, producer_id, next_broker),
            Signal::Alive { connection } => self.connections.alive(connection, self.now.at),
            Signal::Disconnected { connection, reason } => self.disconnected(connection, &reason),
            Signal::Counted {
                route,
                asked,
                answer,
            } => self.counted(route, asked, answer),
            Signal::Found {
                topic,
                attempt,
                answer,
            } => self.found(topic, attempt, answer),
            Signal::Created {
                connection,
                producer_id,
                answer,
            } => return self.created(connection, producer_id, answer),
            Signal::Closed { producer_id } => self.closed(producer_id),
        }
        Ok(())
    }

    /// Transactions and how many of their events were acknowledged since the last call.
    pub(in crate::pulsar) fn take_acked(&mut self) -> impl Iterator<Item = (TxnNo, u64)> + '_ {
        self.acked.drain(..)
    }

    /// Where this producer is, and whether its lane still uses it.
    fn lane_and_use(&self, connection: u64, producer_id: u64) -> Option<(usize, bool)> {
        let &lane = self.producers.get(&producer_id)?;
        let up = State::Up {
            connection,
            producer_id,
        };
        Some((lane, self.lanes[lane].state() == up))
    }

    fn receipt(
        &mut self,
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        stored_before: bool,
    ) {
        let Some((lane_id, is_used)) = self.lane_and_use(connection, producer_id) else {
            return;
        };
        if !self.lanes[lane_id].is_valid(producer_id) {
            return;
        }
        let was_held = !self.lanes[lane_id].takes_part_batches();
        let receipt = self.with_lane(lane_id, |lane, desk| {
            lane.receipt(sequence_id, stored_before, desk)
        });
        match receipt {
            Receipt::Acknowledged(batch) => {
                let mut batch = *batch;
                if let Some(at) = batch.sent_at() {
                    let took = self.now.at.saturating_duration_since(at);
                    self.receipt_delay = (7 * self.receipt_delay + took) / 8;
                }
                self.acked
                    .extend(batch.owners.iter().map(|owner| (owner.txn, owner.count)));
                if let (Some(queue), Some(marks)) = (&self.settings.rows, batch.marks.take()) {
                    queue.push(*marks);
                }
                let topic = self.lanes[lane_id].topic;
                let metered = self.routes[self.topics[topic].route].metered;
                let messages = u64::from(batch.messages);
                batch.give_back(&mut self.memory);
                self.settings.meter.published(metered, messages);
                if stored_before {
                    self.settings.meter.recognized(messages);
                }
                let lane = &self.lanes[lane_id];
                if lane.is_quiet() && !self.backlog {
                    self.with_lane(lane_id, Lane::seal);
                } else if was_held && lane.takes_part_batches() && lane.open_since().is_some() {
                    self.filling.push_front(lane_id);
                }
                self.topic_works(topic);
                self.resume_waiting(connection);
                self.divert_refused(lane_id);
                self.drained();
            }
            Receipt::Repeated => debug!(
                connection,
                producer_id, sequence_id, "a second receipt, ignored"
            ),
            Receipt::OutOfOrder if is_used => {
                warn!(
                    connection,
                    producer_id, sequence_id, "a receipt out of order: sending again"
                );
                self.settings.doubts.raise();
                let topic = self.lanes[lane_id].topic;
                self.leave(lane_id);
                self.reopen_topic(topic);
            }
            Receipt::Doubt if is_used => {
                self.doubt(lane_id, Doubt::Receipt);
                self.topics[self.lanes[lane_id].topic].stale_since = self.serial;
            }
            Receipt::OutOfOrder | Receipt::Doubt => {}
        }
    }

    /// A topic has a receipt.
    fn topic_works(&mut self, topic: usize) {
        self.topics[topic].works();
        let latest = Some((topic, self.now.at));
        match self.working[0] {
            Some((same, _)) if same == topic => {}
            before => self.working[1] = before,
        }
        self.working[0] = latest;
    }

    /// Lanes that wait for room on a connection get it.
    pub(super) fn resume_waiting(&mut self, connection: u64) {
        while let Some(producer_id) = self.connections.next_waiting(connection) {
            if let Some((lane, true)) = self.lane_and_use(connection, producer_id) {
                self.with_lane(lane, Lane::room);
            }
        }
    }

    fn send_error(
        &mut self,
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        (code, message): (i32, &str),
    ) -> Result<()> {
        let Some((lane_id, is_used)) = self.lane_and_use(connection, producer_id) else {
            return Ok(());
        };
        let topic_id = self.lanes[lane_id].topic;
        let topic = &self.topics[topic_id];
        let error = verdict::of_send_error(&topic.name, message);
        if !is_used {
            // For a frame behind a refused one, or of a producer that the broker has closed: why, in the broker's words.
            if topic.trouble.is_some() {
                self.note_trouble(topic_id, &error);
            }
            return Ok(());
        }
        warn!(
            topic = topic.name,
            code,
            "a send was refused, sending again: {}",
            verdict::one_line(message)
        );
        self.note_trouble(topic_id, &error);
        if verdict::of_send(code) == SendVerdict::Refused {
            return self.refuse_send(lane_id, sequence_id, message);
        }
        if self.lanes[lane_id].doubt_from(sequence_id) {
            self.settings.doubts.raise();
        }
        self.leave(lane_id);
        self.reopen_topic(topic_id);
        Ok(())
    }

    /// A batch can never be sent as it is. One of several messages says nothing about each: they are sent one by one. A single message is at
    /// fault itself: it is diverted, or the error says which row it is.
    pub(super) fn refuse_send(
        &mut self,
        lane_id: usize,
        sequence_id: u64,
        message: &str,
    ) -> Result<()> {
        let topic_id = self.lanes[lane_id].topic;
        if !self.lanes[lane_id].holds(sequence_id) {
            // It has its receipt by another producer.
            self.leave(lane_id);
            self.reopen_topic(topic_id);
            return Ok(());
        }
        // Its policies are not what they were when it accepted that much.
        self.topics[topic_id].accepted = Accepted::default();
        if self.lanes[lane_id].may_be_passed(sequence_id) {
            self.settings.doubts.raise();
        }
        self.lanes[lane_id].doubt_from(sequence_id);
        let bytes = self.lanes[lane_id].entry_bytes(sequence_id);
        self.leave(lane_id);
        let is_apart = self.with_lane(lane_id, |lane, _| lane.take_apart(sequence_id));
        if is_apart {
            // Smaller ones from now on.
            let topic = &mut self.topics[topic_id];
            let half = bytes.unwrap_or(0) / 2;
            topic.batch_max_bytes = topic.batch_max_bytes.min(half.max(1));
        } else {
            self.refuse_message(lane_id, sequence_id, message)?;
        }
        self.reopen_topic(topic_id);
        Ok(())
    }

    /// A message that is alone in its batch can never be sent: it is diverted when its turn comes, or the error says which row it is.
    pub(super) fn refuse_message(
        &mut self,
        lane_id: usize,
        sequence_id: u64,
        message: &str,
    ) -> Result<()> {
        if self.lanes[lane_id].may_be_passed(sequence_id) {
            self.settings.doubts.raise();
        }
        let topic = &self.topics[self.lanes[lane_id].topic].name;
        let message = verdict::one_line(message);
        let reason = format!("the broker refuses the message on topic {topic}: {message}");
        if self.settings.diversion.is_some() && self.lanes[lane_id].refuse(sequence_id, reason) {
            return Ok(());
        }
        let rows = name_rows(self.lanes[lane_id].row_ids(sequence_id));
        Err(Error::refused(format!(
            "the broker refuses {rows} on topic {topic}: {message}"
        ))
        .hint("mend the topic's policies; the slot still holds the row"))
    }

    fn producer_closed(
        &mut self,
        connection: u64,
        producer_id: u64,
        next_broker: Option<NextBroker>,
    ) {
        let Some(&lane_id) = self.producers.get(&producer_id) else {
            return;
        };
        let topic_id = self.lanes[lane_id].topic;
        match self.lanes[lane_id].state() {
            State::Up {
                producer_id: its, ..
            } if its == producer_id => {
                let is_waiting = self.lanes[lane_id].waiting_since().is_some();
                self.lane_down(lane_id);
                self.write_off(lane_id, connection);
                if is_waiting {
                    let error = verdict::is_closed(&self.topics[topic_id].name);
                    self.note_trouble(topic_id, &error);
                }
                info!(
                    topic = self.topics[topic_id].name,
                    producer_id, "the broker closed a producer"
                );
                self.topics[topic_id].next_broker = next_broker;
                self.topics[topic_id].stale_since = self.serial;
                self.forget_accepted(topic_id);
                if !self.lanes[lane_id].is_empty() {
                    self.reopen_topic(topic_id);
                }
            }
            State::Creating {
                producer_id: its, ..
            } if its == producer_id => {
                self.topics[topic_id].next_broker = next_broker;
                self.lanes[lane_id].closed_early();
            }
            State::Leaving {
                producer_id: its, ..
            } if its == producer_id => self.closed(producer_id),
            _ => debug!(
                connection,
                producer_id, "the broker closed a producer that was left"
            ),
        }
    }

    fn disconnected(&mut self, connection: u64, reason: &str) {
        let producers = self.connections.remove(connection);
        let mut topics = BTreeSet::new();
        let mut lanes = 0;
        let mut over = Vec::new();
        for producer_id in producers.into_iter().flatten() {
            let Some(&lane) = self.producers.get(&producer_id) else {
                continue;
            };
            let lane = &mut self.lanes[lane];
            if matches!(lane.state(), State::Creating { .. }) {
                over.push(lane.topic);
            } else {
                lanes += 1;
            }
            lane.down();
            lane.take_written_bytes();
            // Lanes with nothing to send wait until they have.
            topics.insert(lane.topic);
        }
        self.settings.meter.lost(Side::Pulsar);
        warn!(connection, lanes, "broker connection ended: {reason}");
        let ended =
            Error::temporary("the connection to the Pulsar broker ended before it answered");
        for topic in over {
            self.answered_for(topic, Some(&ended));
        }
        for topic in topics {
            self.forget_accepted(topic);
            for lane in self.topics[topic].all_lanes().collect::<Vec<_>>() {
                self.divert_refused(lane);
            }
            self.reopen_topic(topic);
        }
        self.drained();
    }
}

fn name_rows(mut ids: Vec<String>) -> String {
    let more = ids.len().saturating_sub(NAMED_ROWS);
    ids.truncate(NAMED_ROWS);
    match (ids.len(), more) {
        (0, _) => "an event".to_owned(),
        (1, _) => format!("the row with id {}", ids[0]),
        (_, 0) => format!("the rows with ids {}", ids.join(", ")),
        (_, more) => format!("the rows with ids {} and {more} more", ids.join(", ")),
    }
}
