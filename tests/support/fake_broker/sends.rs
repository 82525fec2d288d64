//! What producers publish: the checks, in their order, and what a refusal answers.

use pulsar::message::proto::{CommandSend, MessageIdData, MessageMetadata, ServerError};

use super::super::wire::parse_entry;
use super::answers::{Alarm, Asking, Output};
use super::commands;
use super::model::{Cluster, Special};
use super::producers::Slot;
use super::topics::{Duplication, Write};

/// Magic and checksum in front of an entry: no part of what `maxMessageSize` of the broker counts.
const CHECKSUM_BYTES: usize = 6;

/// A send, the entry behind it, and what the script makes of it.
pub(super) struct Sent<'a> {
    pub(super) send: &'a CommandSend,
    pub(super) entry: &'a [u8],
    pub(super) special: Option<Special>,
}

/// What became of a send that was taken.
enum Verdict {
    Refused(ServerError, String),
    Duplicate,
    Written,
}

impl Sent<'_> {
    fn ids(&self) -> (u64, u64) {
        let lowest = self.send.sequence_id;
        (lowest, self.send.highest_sequence_id.unwrap_or(lowest))
    }
}

impl Cluster {
    /// `ServerCnx.handleSend`: what comes for a producer that the broker has closed is dropped; for one that never was, the
    /// connection ends.
    pub(super) fn send(&mut self, sent: &Sent<'_>, to: Asking) {
        let id = sent.send.producer_id;
        let Some(connection) = self.connections.get_mut(&to.connection) else {
            return;
        };
        let limit = self.brokers[connection.broker].limit();
        let Some(Slot::Open(producer)) = connection.producers.get_mut(&id) else {
            if connection.closed.contains(&id) {
                return;
            }
            if !connection.fenced_out.contains(&id) {
                let command = sent.send;
                self.faults
                    .push(format!("a send to a producer that never was: {command:?}"));
            }
            return self.gone(to.connection);
        };
        let ids = sent.ids();
        if producer.last_sequence_id >= Some(ids.0) {
            let name = &producer.name;
            self.faults
                .push(format!("sequence ids of {name} fall at {}", ids.0));
        }
        producer.last_sequence_id = Some(ids.1);
        let (topic, name) = (producer.topic.clone(), producer.name.clone());
        let (incarnation, is_closing) = (producer.incarnation, !producer.closing.is_empty());
        if sent.entry.len() > limit + CHECKSUM_BYTES {
            let bytes = sent.entry.len();
            self.faults.push(format!("{bytes} bytes are too many"));
        }
        let verdict = if is_closing {
            refused(ServerError::PersistenceError, "Producer is closed")
        } else if let Some(Special::Refuse(error)) = sent.special {
            refused(error, &commands::reason(error))
        } else {
            match parse_entry(MessageIdData::default(), sent.entry) {
                Ok(entry) => {
                    self.compare(sent, &name, &entry.metadata);
                    let write = Write::new(to, incarnation, id, &topic, &entry);
                    self.publish(sent, &topic, &entry.metadata, write)
                }
                Err(error) => {
                    self.faults.push(error.to_string());
                    refused(ServerError::ChecksumError, "Checksum failed on the broker")
                }
            }
        };
        match verdict {
            Verdict::Written => {}
            Verdict::Duplicate => {
                let receipt = commands::receipt(id, ids, None);
                self.answers.answer_for(to, Some(incarnation), receipt);
            }
            Verdict::Refused(error, text) => {
                let refusal = commands::send_error(id, ids.1, error, &text);
                self.answers.answer_for(to, Some(incarnation), refusal);
            }
        }
    }

    /// What the command says must stand in the metadata as well: the one is compared, the other recovered from.
    fn compare(&mut self, sent: &Sent<'_>, name: &str, metadata: &MessageMetadata) {
        let lowest = metadata.sequence_id;
        let ids = (lowest, metadata.highest_sequence_id.unwrap_or(lowest));
        if ids != sent.ids() || metadata.producer_name != name {
            let command = sent.send;
            self.faults.push(format!(
                "command and metadata differ: {command:?}, {metadata:?}"
            ));
        }
    }

    /// `Producer.checkAndStartPublish`, then `PersistentTopic.publishMessage`: encryption, rate, fence, size, delay, duplicates,
    /// write. A refusal changes nothing: what the producer has sent behind it is taken.
    fn publish(
        &mut self,
        sent: &Sent<'_>,
        topic: &str,
        metadata: &MessageMetadata,
        write: Write,
    ) -> Verdict {
        let settings = self.topics.settings(topic);
        if settings.encryption_required && metadata.encryption_keys.is_empty() {
            return refused(ServerError::MetadataError, "Messages must be encrypted");
        }
        if settings.publish_rate.is_some() {
            self.throttle(topic, write.to.connection, sent.send.num_messages());
        }
        if topic.starts_with("non-persistent://") {
            // Handed to whoever consumes at this moment, and stored nowhere.
            let receipt = commands::receipt(write.producer_id, write.ids, Some(0));
            self.answers.answer(write.to, receipt);
            return Verdict::Written;
        }
        if settings.fenced {
            return refused(ServerError::PersistenceError, "fenced");
        }
        // The whole entry is measured: checksum, metadata and payload (`AbstractTopic.isExceedMaximumMessageSize`).
        if settings
            .max_message_bytes
            .is_some_and(|limit| sent.entry.len() > limit)
        {
            return refused(ServerError::NotAllowedError, "Exceed maximum message size");
        }
        if let Some(limit) = settings.max_delivery_delay_ms
            && exceeds_delay(metadata, limit)
        {
            let text = format!("Exceeds max allowed delivery delay of {limit} milliseconds");
            return refused(ServerError::NotAllowedError, &text);
        }
        let name = &metadata.producer_name;
        match self.topics.duplication(topic, name, write.ids) {
            Duplication::Duplicate => return Verdict::Duplicate,
            Duplication::Unknown => {
                let text = "Cannot determine whether the message is a duplicate at this time";
                return refused(ServerError::PersistenceError, text);
            }
            Duplication::New => {}
        }
        // Writes end in the order in which they were begun.
        let waits = self.topics.pends(topic) || matches!(sent.special, Some(Special::Pend));
        let fails = settings.writes_fail || settings.terminated;
        let fails = fails || matches!(sent.special, Some(Special::FailWrite));
        self.topics.push(topic, name, write);
        if fails {
            self.fail_writes(topic);
        } else if !waits {
            self.write(topic);
        }
        Verdict::Written
    }

    /// Ends a topic's pending writes with success: receipts, also for producers that were closed meanwhile.
    pub(super) fn write(&mut self, topic: &str) {
        for (write, entry) in self.topics.write(topic) {
            let receipt = commands::receipt(write.producer_id, write.ids, Some(entry));
            self.answers
                .answer_for(write.to, Some(write.incarnation), receipt);
        }
    }

    /// Ends them with failure (`PersistentTopic.addFailed`): the topic is fenced, every producer of it closed, and the errors come
    /// behind that. As nothing pends then, the fence is gone at once.
    pub(super) fn fail_writes(&mut self, topic: &str) {
        let (error, text) = if self.topics.settings(topic).terminated {
            let text = "Managed ledger was already terminated";
            (ServerError::TopicTerminatedError, text)
        } else {
            let text = "Error while recovering ledger";
            (ServerError::PersistenceError, text)
        };
        self.disconnect(&self.producers_of(topic), None);
        for write in self.topics.drop_writes(topic) {
            let refusal = commands::send_error(write.producer_id, write.ids.1, error, text);
            self.answers
                .answer_for(write.to, Some(write.incarnation), refusal);
        }
    }

    /// Counts what is published, and does not read the whole connection while it is too much
    /// (`PublishRateLimiterImpl.handlePublishThrottling`, `ServerCnxThrottleTracker`). The frame itself is taken.
    fn throttle(&mut self, topic: &str, connection: u64, messages: i32) {
        let Some(rate) = self.topics.settings(topic).publish_rate else {
            return;
        };
        let Some(ledger) = self.topics.ledger(topic) else {
            return;
        };
        let before = ledger.rate_left;
        let left = before.unwrap_or(rate.messages) - i64::from(messages);
        ledger.rate_left = Some(left);
        if before.is_none() {
            let alarm = Alarm::Period(topic.to_owned());
            self.answers.push(Output::Alarm(rate.period, alarm));
        }
        if left <= 0
            && let Some(publishing) = self.connections.get_mut(&connection)
        {
            publishing.throttled_by.insert(topic.to_owned());
        }
    }

    /// The period is over: what was published beyond it counts in the next one.
    pub(super) fn period_is_over(&mut self, topic: &str) {
        let rate = self.topics.settings(topic).publish_rate;
        let Some(ledger) = self.topics.ledger(topic) else {
            return self.read_again(topic);
        };
        let left = ledger.rate_left.take().unwrap_or(0);
        if let Some(rate) = rate.filter(|_| left < 0) {
            ledger.rate_left = Some(left + rate.messages);
            let alarm = Alarm::Period(topic.to_owned());
            self.answers.push(Output::Alarm(rate.period, alarm));
            if left + rate.messages <= 0 {
                return;
            }
        }
        self.read_again(topic);
    }

    fn read_again(&mut self, topic: &str) {
        for (&id, connection) in &mut self.connections {
            if connection.throttled_by.remove(topic) && connection.throttled_by.is_empty() {
                self.answers.push(Output::Read(id));
            }
        }
    }
}

fn refused(error: ServerError, text: &str) -> Verdict {
    Verdict::Refused(error, text.to_owned())
}

/// `PersistentTopic.isExceedMaximumDeliveryDelay`.
fn exceeds_delay(metadata: &MessageMetadata, limit_ms: i64) -> bool {
    let published = i64::try_from(metadata.publish_time).unwrap_or(i64::MAX);
    let delay = |at: i64| at.saturating_sub(published);
    metadata
        .deliver_at_time
        .is_some_and(|at| delay(at) > limit_ms)
}
