//! The publisher's half of [`super::straggler_task`]: a straggler becomes a message, and what became of the message a verdict.
//!
//! Input: rows that are due. Output: in the [`Task`], which are under way, which have their receipts, which attempts failed.

use std::collections::HashSet;
use std::time::Duration;

use tracing::warn;

use super::straggler_pages::Stored;
use super::straggler_store::{Failure, Key};
use super::straggler_task::Task;
use crate::ack::TxnNo;
use crate::outbox::{key_hash, own_topic_into};
use crate::pulsar::{BrokerEvent, Outgoing, Row, RowTag};
use crate::retry::Backoff;
use crate::{Lsn, Result};

/// A straggler that was handed to the publisher.
pub(super) struct Sent {
    pub(super) key: Option<Key>,
    pub(super) attempts: i32,
    pub(super) is_copy: bool,
}

impl Task {
    fn note_sent(&mut self, number: i64, sent: Sent) {
        if let Some(key) = &sent.key {
            *self.busy.entry(key.clone()).or_default() += 1;
        }
        self.sent.insert(number, sent);
    }

    pub(super) fn take_sent(&mut self, number: i64) -> Option<Sent> {
        let sent = self.sent.remove(&number)?;
        if let Some(key) = &sent.key
            && let Some(count) = self.busy.get_mut(key)
        {
            *count -= 1;
            if *count == 0 {
                self.busy.remove(key);
            }
        }
        Some(sent)
    }

    /// Hands one to the publisher, or finds that it cannot be published.
    pub(super) fn publish(&mut self, row: &Stored) {
        let key = row.topic.clone().zip(row.key.clone());
        let number = row.number;
        let sent = Sent {
            key: if row.is_dead { None } else { key },
            attempts: row.attempts,
            is_copy: row.is_dead,
        };
        let message = if row.is_dead {
            Ok(self.dead_letter(row))
        } else {
            checked(row)
        };
        match message {
            Ok((topic, properties)) => {
                self.note_sent(number, sent);
                if let Err(error) = self.hand_over(row, &topic, &properties) {
                    self.failure(number, &error.report());
                }
            }
            Err(why) => {
                self.stopped.extend(sent.key);
                self.failed.push(Failure {
                    number,
                    reason: why,
                    attempts: row.attempts,
                    next_in: Duration::ZERO,
                    dead: true,
                });
            }
        }
    }

    fn hand_over(
        &mut self,
        row: &Stored,
        topic: &str,
        properties: &[(String, String)],
    ) -> Result<()> {
        let key = row.key.as_deref().unwrap_or_default();
        self.messages += 1;
        let event = Outgoing {
            key,
            payload: row.payload.as_deref(),
            event_time_ms: u64::try_from(row.event_time_ms).unwrap_or(0),
            deliver_at_ms: row.deliver_at_ms.filter(|_| !row.is_dead),
            txn: TxnNo::of_straggler(row.number),
            // All that matters is that it rises.
            commit_lsn: Lsn::new(self.messages << 3),
            row: RowTag::default(),
            mark: self.mark(row),
        };
        let properties = properties.iter().map(|(n, v)| (n.as_str(), v.as_str()));
        let hash = key_hash(key.as_bytes());
        let taken = self.publisher.publish(topic, hash, &event, &properties);
        self.take_diverted();
        taken
    }

    /// Published at last, it is marked or deleted like any other; a copy of a dead one changes nothing.
    fn mark<'a>(&self, row: &'a Stored) -> Option<Row<'a>> {
        let table = self.outboxes.iter().position(|name| *name == row.outbox)?;
        Some(Row {
            table: u32::try_from(table).ok()?,
            xid: 0,
            id: row.id.as_deref().filter(|_| !row.is_dead)?,
            // Where it is not known: it is marked if no other row has its id.
            number: row.row_number,
            txid: row.row_txid,
        })
    }

    /// Where a copy of a dead one goes, and its properties.
    fn dead_letter(&self, row: &Stored) -> (String, Vec<(String, String)>) {
        let mut properties = row.properties.clone().unwrap_or_default();
        let more = [
            ("walpost.reason", row.reason.clone()),
            (
                "walpost.original_topic",
                row.topic.clone().unwrap_or_default(),
            ),
            ("walpost.id", row.id.clone().unwrap_or_default()),
            ("walpost.attempts", row.attempts.to_string()),
        ];
        properties.extend(more.map(|(name, value)| (name.to_owned(), value)));
        let topic = self.dead_letter_topic.clone().unwrap_or_default();
        (topic, properties)
    }

    pub(super) fn heard(&mut self, event: BrokerEvent) {
        warn_of(self.publisher.handle(event));
        let acked: Vec<i64> = self
            .publisher
            .take_acked()
            .map(|(txn, _)| txn.straggler())
            .collect();
        self.done.extend(acked);
        self.take_diverted();
    }

    /// What the publisher gives back has failed: the first of each key counts, the others only wait.
    fn take_diverted(&mut self) {
        loop {
            let diverted = self.publisher.take_diverted();
            if diverted.is_empty() {
                return;
            }
            // Nothing is kept from being sent by them; what is sent now may come back as well.
            let stored = self.publisher.stored(diverted.len() as u64);
            warn_of(stored);
            let mut firsts: HashSet<Key> = HashSet::new();
            let mut topics: HashSet<String> = HashSet::new();
            for event in diverted {
                let number = event.event.txn.straggler();
                topics.insert(event.topic);
                let key = self.sent.get(&number).and_then(|sent| sent.key.clone());
                let is_first = !self.order || key.is_none_or(|key| firsts.insert(key));
                if is_first {
                    self.failure(number, &event.reason);
                } else {
                    self.take_sent(number);
                }
            }
            for topic in topics {
                // The next attempt must be one.
                self.publisher.forget_refusal(&topic);
                self.refused.insert(topic);
            }
        }
    }

    fn failure(&mut self, number: i64, reason: &str) {
        let Some(sent) = self.take_sent(number) else {
            return;
        };
        self.stopped.extend(sent.key);
        let attempts = sent.attempts.saturating_add(1);
        let mut backoff = Backoff::new(self.retry.0, self.retry.1);
        // Past the longest pause more doubling changes nothing.
        let next_in = (0..attempts.clamp(1, 64)).fold(self.retry.0, |_, _| backoff.next_delay());
        let dead = !sent.is_copy && attempts >= self.max_attempts;
        if dead {
            warn!(number, attempts, "a straggler is dead: {reason}");
        }
        self.failed.push(Failure {
            number,
            reason: reason.to_owned(),
            attempts: if sent.is_copy {
                sent.attempts
            } else {
                attempts
            },
            next_in: if dead { Duration::ZERO } else { next_in },
            dead,
        });
    }
}

/// With diversion on only a producer name that somebody else has used says this.
fn warn_of(heard: crate::Result<()>) {
    if let Err(error) = heard {
        warn!("a straggler's producer: {}", error.report());
    }
}

/// Topic and properties, if it can be a message as it stands in the table; else what is wrong with it.
fn checked(row: &Stored) -> Result<(String, Vec<(String, String)>), String> {
    let topic = row
        .topic
        .as_deref()
        .ok_or("the straggler has no topic: set its column topic, then walpost stragglers retry")?;
    if row.key.is_none() {
        return Err(
            "the straggler has no key: set its column key, then walpost stragglers retry"
                .to_owned(),
        );
    }
    let mut full = String::new();
    own_topic_into(topic, &mut full)
        .map_err(|problem| format!("the straggler's column topic {problem}"))?;
    if full != topic {
        return Err(format!("the straggler's column topic must be {full}"));
    }
    if row.event_time_ms < 0 {
        return Err("the straggler's column event_time_ms is below 0".to_owned());
    }
    let properties = row.properties.clone().ok_or(
        "the straggler's column properties is no list of pairs of texts, as in [[\"name\", \"value\"]]",
    )?;
    Ok((full, properties))
}
