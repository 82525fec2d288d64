//! What the fake brokers of one cluster have stored, and their deduplication.
//!
//! Deduplication follows Pulsar's `MessageDeduplication`: only an entry's lowest sequence id is compared; *pushed* rises
//! when an entry is handed to storage, *persisted* when it is there. Not above persisted: a duplicate. Above persisted and
//! not above pushed: not known, an error. A write that fails puts pushed back to persisted.

use std::collections::HashMap;

use super::super::wire::Entry;

/// One message as it was stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredEvent {
    /// Its topic.
    pub(crate) topic: String,
    /// The producer's name.
    pub(crate) producer: String,
    /// Its partition key.
    pub(crate) key: String,
    /// Its property `id`.
    pub(crate) id: String,
    /// Its own sequence id.
    pub(crate) sequence_id: u64,
    /// How many messages its entry holds.
    pub(crate) batch: usize,
}

/// What became of an entry.
pub(super) enum Outcome {
    /// Stored, as the entry of this number.
    Stored(u64),
    /// It was stored before: the receipt says (-1, -1).
    Duplicate,
    /// Pushed before, and whether it was stored is not known: `PersistenceError`.
    Unknown,
}

#[derive(Default)]
struct Sequence {
    pushed: Option<u64>,
    persisted: Option<u64>,
}

/// Topic and producer name.
type Producer = (String, String);

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Storage {
    pub(super) deduplicates: bool,
    pub(super) events: Vec<StoredEvent>,
    entries: u64,
    sequences: HashMap<Producer, Sequence>,
    /// Writes whose end is not known yet, with their highest sequence ids.
    pending: Vec<(Producer, u64, Vec<StoredEvent>)>,
}

impl Storage {
    /// Takes an entry in; without `at_once` its write stays pending until [`settle`](Self::settle).
    pub(super) fn push(&mut self, topic: &str, entry: &Entry, at_once: bool) -> Outcome {
        let metadata = &entry.metadata;
        let producer = (topic.to_owned(), metadata.producer_name.clone());
        let lowest = metadata.sequence_id;
        let highest = metadata.highest_sequence_id.unwrap_or(lowest);
        if self.deduplicates {
            let sequence = self.sequences.entry(producer.clone()).or_default();
            if sequence.pushed.is_some_and(|pushed| lowest <= pushed) {
                return if sequence
                    .persisted
                    .is_some_and(|persisted| lowest <= persisted)
                {
                    Outcome::Duplicate
                } else {
                    Outcome::Unknown
                };
            }
            sequence.pushed = Some(highest);
        }
        self.pending.push((producer, highest, events(topic, entry)));
        if at_once {
            self.settle(true);
        }
        self.entries += 1;
        Outcome::Stored(self.entries)
    }

    /// Ends the pending writes: they are stored, or they have failed.
    pub(super) fn settle(&mut self, written: bool) {
        for (producer, highest, events) in std::mem::take(&mut self.pending) {
            let sequence = self.sequences.entry(producer).or_default();
            if written {
                sequence.persisted = Some(highest);
                self.events.extend(events);
            } else {
                sequence.pushed = sequence.persisted;
            }
        }
    }

    /// The highest sequence id pushed under a name, which a broker that deduplicates tells a new producer.
    pub(super) fn last_pushed(&self, topic: &str, producer: &str) -> Option<u64> {
        let producer = (topic.to_owned(), producer.to_owned());
        let sequence = self.sequences.get(&producer)?;
        sequence.pushed.filter(|_| self.deduplicates)
    }
}

fn events(topic: &str, entry: &Entry) -> Vec<StoredEvent> {
    let of = |message: &super::super::wire::EntryMessage| {
        let id = message.metadata.properties.iter().find(|p| p.key == "id");
        StoredEvent {
            topic: topic.to_owned(),
            producer: entry.metadata.producer_name.clone(),
            key: message.metadata.partition_key.clone().unwrap_or_default(),
            id: id.map(|p| p.value.clone()).unwrap_or_default(),
            sequence_id: message.metadata.sequence_id.unwrap_or_default(),
            batch: entry.messages.len(),
        }
    };
    entry.messages.iter().map(of).collect()
}
