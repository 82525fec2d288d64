//! What brokers say, applied to the lanes: the receiving half of the [`Publisher`].
//!
//! Every event names its connection. One that comes from a connection its lane has left is not about the present producer
//! and changes nothing, except that a receipt is always true: what was stored stays stored.

use std::sync::Arc;

use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::connection::{Connection, Event, OpenedProducer};
use super::lane::{Link, Receipt};
use super::opener::{self, Wanted};
use super::publisher::{Opener, Publisher};
use super::verdict::{self, SendVerdict};
use super::wire::NextBroker;
use crate::ack::TxnNo;
use crate::meter::Side;
use crate::{Error, Result};

/// A thing a broker said, the end of a connection, or room for more rows (`None`), for [`Publisher::handle`].
#[derive(Debug)]
pub struct BrokerEvent(Option<Event>);

/// Rows named in an error; more are counted.
const NAMED_ROWS: usize = 5;

impl Publisher {
    /// Waits for the next thing a broker says. Cancel safe.
    pub async fn next_event(&mut self) -> BrokerEvent {
        let full = self.rows.as_ref().filter(|rows| !rows.has_room());
        let room = async {
            match full {
                Some(rows) => rows.room().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            event = self.events.recv() => {
                BrokerEvent(Some(event.expect("the publisher's own directory holds a sender")))
            }
            () = room => BrokerEvent(None),
        }
    }

    /// The next thing a broker said, if one is waiting.
    pub fn try_next_event(&mut self) -> Option<BrokerEvent> {
        let event = self.events.try_recv().ok()?;
        Some(BrokerEvent(Some(event)))
    }

    /// Applies what a broker said. An error means that an event can never be published as it is.
    pub fn handle(&mut self, event: BrokerEvent) -> Result<()> {
        let Some(event) = event.0 else {
            return Ok(());
        };
        self.apply(event)?;
        self.finish_changes();
        self.release()
    }

    fn apply(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Receipt {
                connection,
                producer_id,
                sequence_id,
                stored_before,
            } => {
                self.receipt(connection, producer_id, sequence_id, stored_before);
                Ok(())
            }
            Event::SendError {
                connection,
                producer_id,
                sequence_id,
                code,
                message,
            } => {
                let message = verdict::one_line(&message);
                self.send_error(connection, producer_id, sequence_id, code, &message)
            }
            Event::ProducerClosed {
                connection,
                producer_id,
                next_broker,
            } => {
                self.producer_closed(connection, producer_id, next_broker);
                Ok(())
            }
            // A publisher has no consumers.
            Event::Message { .. } | Event::ConsumerClosed { .. } => Ok(()),
            Event::Disconnected { connection, reason } => {
                self.disconnected(connection, &reason);
                Ok(())
            }
            Event::Opened {
                connection,
                producers,
            } => self.opened(&connection, producers),
            Event::PartitionsCounted { route, partitions } => {
                self.partitions_counted(route, partitions);
                Ok(())
            }
            Event::PartitionsUnknown { route } => {
                self.partitions_unknown(route);
                Ok(())
            }
            Event::TopicRefused {
                topic,
                producers,
                reason,
            } => {
                self.topic_refused(topic, &producers, &reason);
                Ok(())
            }
            Event::RouteRefused { route, reason } => {
                self.route_refused(route, &reason);
                Ok(())
            }
        }
    }

    /// Transactions and how many of their events were acknowledged since the last call.
    pub fn take_acked(&mut self) -> impl Iterator<Item = (TxnNo, u64)> + '_ {
        self.acked.drain(..)
    }

    fn receipt(
        &mut self,
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        stored_before: bool,
    ) {
        let Some(lane) = self.lanes.get_mut(slot(producer_id)) else {
            return;
        };
        let was_held = !lane.takes_part_batches();
        match lane.receipt(sequence_id, &mut self.memory) {
            Receipt::Acknowledged(mut batch) => {
                if let Some(at) = batch.sent_at() {
                    self.receipt_delay = (7 * self.receipt_delay + at.elapsed()) / 8;
                }
                self.in_flight_messages -= batch.messages as usize;
                self.in_flight_bytes -= batch.bytes;
                self.acked
                    .extend(batch.owners.iter().map(|owner| (owner.txn, owner.count)));
                if let (Some(queue), Some(marks)) = (&self.rows, batch.marks.take()) {
                    queue.push(*marks);
                }
                let topic = lane.topic;
                let route = self.topics[topic].route;
                let metered = self.routes[route].metered;
                let messages = u64::from(batch.messages);
                batch.give_back(&mut self.memory);
                self.config.meter.published(metered, messages);
                if stored_before {
                    self.config.meter.recognized(messages);
                }
                if lane.is_quiet() && !self.backlog {
                    lane.seal(&mut self.memory);
                } else if was_held && lane.takes_part_batches() && lane.open_since().is_some() {
                    self.filling.push_front(slot(producer_id));
                }
                if std::mem::take(&mut self.topics[topic].troubled) {
                    self.topics[topic].backoff.reset();
                }
                self.divert_refused(slot(producer_id));
                self.drained();
            }
            Receipt::Repeated => debug!(
                connection,
                producer_id, sequence_id, "a second receipt, ignored"
            ),
            Receipt::OutOfOrder => {
                if let Link::Up(up) = &lane.link {
                    warn!(
                        connection,
                        producer_id, sequence_id, "a receipt out of order: starting over"
                    );
                    up.close("a receipt came out of order");
                }
            }
        }
    }

    fn send_error(
        &mut self,
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        code: i32,
        message: &str,
    ) -> Result<()> {
        let Some(lane) = self.lanes.get_mut(slot(producer_id)) else {
            return Ok(());
        };
        // Errors for the frames behind a refused one find the lane already on its way to a new producer.
        let Link::Up(up) = &lane.link else {
            return Ok(());
        };
        if up.id() != connection {
            return Ok(());
        }
        let (topic, up) = (lane.topic, up.clone());
        if verdict::of_send(code) == SendVerdict::Refused
            && !self.refuse_batch(slot(producer_id), sequence_id, message)
        {
            let lane = &self.lanes[slot(producer_id)];
            let rows = name_rows(lane.row_ids(sequence_id));
            let topic = &self.topics[topic].name;
            return Err(Error::refused(format!(
                "the broker refuses {rows} on topic {topic}: {message}"
            ))
            .hint("mend the topic's policies; the slot still holds the row"));
        }
        warn!(
            topic = self.topics[topic].name,
            code, "a send was refused, sending again: {message}"
        );
        let lane = &mut self.lanes[slot(producer_id)];
        if verdict::is_damage(code) {
            lane.damaged(sequence_id);
        }
        lane.down(Some(up));
        self.reopen_topic(topic);
        Ok(())
    }

    fn producer_closed(
        &mut self,
        connection: u64,
        producer_id: u64,
        next_broker: Option<NextBroker>,
    ) {
        let Some(lane) = self.lanes.get_mut(slot(producer_id)) else {
            return;
        };
        match &mut lane.link {
            Link::Up(up) if up.id() == connection => {
                let topic = lane.topic;
                lane.down(None);
                info!(
                    topic = self.topics[topic].name,
                    producer_id, "the broker closed a producer"
                );
                self.topics[topic].next_broker = next_broker;
                if !self.lanes[slot(producer_id)].is_empty() {
                    self.reopen_topic(topic);
                }
            }
            Link::Opening { closed_on } => *closed_on = Some(connection),
            Link::Up(_) | Link::Down { .. } => {}
        }
    }

    fn disconnected(&mut self, connection: u64, reason: &str) {
        let mut topics = Vec::new();
        let mut lanes = 0;
        for lane in &mut self.lanes {
            if matches!(&lane.link, Link::Up(up) if up.id() == connection) {
                lane.down(None);
                lanes += 1;
                // Lanes with nothing to send wait until they have.
                if !lane.is_empty() && !topics.contains(&lane.topic) {
                    topics.push(lane.topic);
                }
            }
        }
        self.config.meter.lost(Side::Pulsar);
        warn!(connection, lanes, "broker connection ended: {reason}");
        for topic in topics {
            self.reopen_topic(topic);
        }
    }

    fn opened(&mut self, connection: &Connection, producers: Vec<OpenedProducer>) -> Result<()> {
        for producer in producers {
            let lane = &mut self.lanes[slot(producer.producer_id)];
            let Link::Opening { closed_on } = lane.link else {
                continue;
            };
            let topic = lane.topic;
            let opener = self.topics[topic].opener.as_mut();
            let opener = opener.expect("a lane is being opened by its topic's opener");
            opener.remaining -= 1;
            if opener.remaining == 0 {
                self.topics[topic].opener = None;
            }
            if let Some(pushed) = producer.last_sequence_id
                && lane.is_beyond(pushed, self.log_end)
            {
                return Err(went_back(&self.topics[topic].name, &lane.producer.name));
            }
            // A topic's own broker may take less than the one that was asked first.
            let largest = &mut self.limits.max_message_bytes;
            *largest = (*largest).min(connection.max_message_bytes());
            if connection.is_closed() {
                lane.down(None);
            } else if closed_on == Some(connection.id()) {
                // Or the one before it was, on this connection: then this one is open, and must not be met again.
                lane.down(Some(connection.clone()));
            } else {
                lane.opened(
                    connection.clone(),
                    producer.last_sequence_id,
                    producer.schema_version,
                    &mut self.memory,
                );
            }
            self.topics[topic].refused = None;
            self.divert_refused(slot(producer.producer_id));
            self.drained();
            // For this lane if it was closed meanwhile, and for those that came to need a producer while this opener ran.
            self.open_topic(topic);
        }
        Ok(())
    }

    /// Opens the topic's lanes again after something went wrong: at once the first time, with backoff until a receipt shows
    /// that it is well.
    fn reopen_topic(&mut self, topic: usize) {
        self.open_topic(topic);
        self.topics[topic].troubled = true;
    }

    /// Starts an opener for the topic's lanes that have something to send and no producer, unless one is at work.
    pub(super) fn open_topic(&mut self, topic_id: usize) {
        let topic = &mut self.topics[topic_id];
        if topic.opener.is_some() {
            return;
        }
        let mut wanted = Vec::new();
        // Dedicated lanes stand outside of the topic's table, so look through all.
        for lane in self
            .lanes
            .iter_mut()
            .filter(|lane| lane.topic == topic_id && !lane.is_empty())
        {
            let Link::Down { close_first } = &mut lane.link else {
                continue;
            };
            let close_first = close_first.take();
            lane.link = Link::Opening { closed_on: None };
            wanted.push(Wanted {
                producer_id: lane.producer.id,
                producer_name: lane.producer.name.clone(),
                close_first,
            });
        }
        if wanted.is_empty() {
            return;
        }
        let pause = if topic.troubled {
            topic.backoff.next_delay()
        } else {
            std::time::Duration::ZERO
        };
        let remaining = wanted.len();
        let hurry = Arc::<Notify>::default();
        let work = opener::open(
            self.shared.clone(),
            opener::Target {
                index: topic_id,
                name: topic.name.clone(),
                refused: topic.refused.is_some(),
                next_broker: topic.next_broker.take(),
                hurry: Arc::clone(&hurry),
            },
            wanted,
            pause,
        );
        topic.opener = Some(Opener {
            task: tokio::spawn(work),
            remaining,
            hurry,
        });
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        for topic in &self.topics {
            if let Some(opener) = &topic.opener {
                opener.task.abort();
            }
        }
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

/// Producer ids are indexes into the lanes.
fn slot(producer_id: u64) -> usize {
    usize::try_from(producer_id).unwrap_or(usize::MAX)
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
