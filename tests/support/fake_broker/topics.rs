//! The topics of a cluster: which there are, what is set on them, what they hold, and their deduplication.
//!
//! Deduplication follows Pulsar's `MessageDeduplication`: only an entry's lowest sequence id is compared; *pushed* rises
//! when an entry is handed to storage, *persisted* when it is there. Not above persisted: a duplicate. Above persisted and
//! not above pushed: not known, an error. When a topic's write fails, every pushed goes back to persisted. A topic that is
//! deleted takes its ids with it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use pulsar::message::proto::ServerError;

use super::super::wire::{Entry, EntryMessage};
use super::answers::Asking;

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

/// How much a topic takes before the connections that publish to it are not read for a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PublishRate {
    pub(crate) messages: i64,
    pub(crate) period: Duration,
}

/// What is set on a topic, or on all partitions of one.
#[derive(Clone, Debug, Default)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "any of them may be set beside any other, as on a real topic"
)]
pub(crate) struct Settings {
    /// The topic policy `maxMessageSize`.
    pub(crate) max_message_bytes: Option<usize>,
    /// `maxDeliveryDelayInMillis` of the topic policy for delayed delivery.
    pub(crate) max_delivery_delay_ms: Option<i64>,
    /// `maxProducersPerTopic`.
    pub(crate) max_producers: Option<usize>,
    /// The topic policy for the publish rate.
    pub(crate) publish_rate: Option<PublishRate>,
    /// Producers must say that they encrypt.
    pub(crate) encryption_required: bool,
    /// The name of another client's exclusive producer.
    pub(crate) exclusive: Option<String>,
    /// Fenced while its producers stay, as by a delete or a close that fails early.
    pub(crate) fenced: bool,
    /// Terminated: its ledger takes nothing any more.
    pub(crate) terminated: bool,
    /// Migrated to the cluster at this address.
    pub(crate) migrated_to: Option<String>,
    /// Every write to storage fails.
    pub(crate) writes_fail: bool,
}

/// What deduplication says of an entry.
pub(super) enum Duplication {
    New,
    /// It was stored before.
    Duplicate,
    /// It was pushed before, and whether it was stored is not known.
    Unknown,
}

/// An entry that was handed to storage.
pub(super) struct Write {
    pub(super) to: Asking,
    /// The producer that sent it.
    pub(super) incarnation: u64,
    pub(super) producer_id: u64,
    /// Its lowest and its highest sequence id.
    pub(super) ids: (u64, u64),
    events: Vec<StoredEvent>,
}

impl Write {
    pub(super) fn new(
        to: Asking,
        incarnation: u64,
        producer_id: u64,
        topic: &str,
        entry: &Entry,
    ) -> Self {
        let lowest = entry.metadata.sequence_id;
        Self {
            to,
            incarnation,
            producer_id,
            ids: (lowest, entry.metadata.highest_sequence_id.unwrap_or(lowest)),
            events: events(topic, entry),
        }
    }
}

#[derive(Default)]
struct Sequence {
    pushed: Option<u64>,
    persisted: Option<u64>,
}

/// A topic without partitions, or one partition.
#[derive(Default)]
pub(super) struct Ledger {
    /// Tells it from one of the same name before it was deleted.
    generation: u64,
    entries: u64,
    /// By producer name.
    sequences: HashMap<String, Sequence>,
    /// Writes whose end is not known yet, in order.
    pending: VecDeque<(String, Write)>,
    /// What may be published still in this period; none before the first.
    pub(super) rate_left: Option<i64>,
}

/// The metadata of a partitioned topic.
struct Partitioned {
    count: u32,
    /// Its partitions are being deleted; the metadata goes last.
    deleting: bool,
}

/// See the module's documentation.
pub(super) struct Topics {
    pub(super) deduplicates: bool,
    /// `allowAutoTopicCreation`.
    pub(super) auto_creation: bool,
    /// `defaultNumPartitions` of topics that are made by themselves; 0: they are not partitioned.
    pub(super) auto_partitions: u32,
    /// Answers 0 partitions for a topic that does not exist, as brokers before PIP-344.
    pub(super) missing_has_no_partitions: bool,
    ledgers: BTreeMap<String, Ledger>,
    partitioned: BTreeMap<String, Partitioned>,
    settings: BTreeMap<String, Settings>,
    /// With the generation of their ledgers.
    stored: Vec<(u64, StoredEvent)>,
    generations: u64,
}

impl Default for Topics {
    fn default() -> Self {
        Self {
            deduplicates: false,
            auto_creation: true,
            auto_partitions: 0,
            missing_has_no_partitions: false,
            ledgers: BTreeMap::new(),
            partitioned: BTreeMap::new(),
            settings: BTreeMap::new(),
            stored: Vec::new(),
            generations: 0,
        }
    }
}

impl Topics {
    /// The settings of a topic: its own, else those of the topic that it is a partition of.
    pub(super) fn settings(&self, topic: &str) -> Settings {
        let of_whole = || partition_of(topic).and_then(|(whole, _)| self.settings.get(whole));
        let own = self.settings.get(topic).or_else(of_whole);
        own.cloned().unwrap_or_default()
    }

    pub(super) fn settings_mut(&mut self, topic: &str) -> &mut Settings {
        self.settings.entry(topic.to_owned()).or_default()
    }

    pub(super) fn ledger(&mut self, topic: &str) -> Option<&mut Ledger> {
        self.ledgers.get_mut(topic)
    }

    /// Makes a topic without partitions, or one partition.
    pub(super) fn create(&mut self, topic: &str) {
        if !self.ledgers.contains_key(topic) {
            self.generations += 1;
            let ledger = Ledger {
                generation: self.generations,
                ..Ledger::default()
            };
            self.ledgers.insert(topic.to_owned(), ledger);
        }
    }

    /// Makes a partitioned topic, or more partitions of one.
    pub(super) fn create_partitioned(&mut self, topic: &str, count: u32) {
        let metadata = Partitioned {
            count,
            deleting: false,
        };
        self.partitioned.insert(topic.to_owned(), metadata);
        for partition in 0..count {
            self.create(&partition_name(topic, partition));
        }
    }

    /// Marks a partitioned topic as being deleted (`markPartitionedTopicDeletedAsync`); returns its partitions' names.
    pub(super) fn begin_deletion(&mut self, topic: &str) -> Vec<String> {
        let Some(metadata) = self.partitioned.get_mut(topic) else {
            return Vec::new();
        };
        metadata.deleting = true;
        let partitions = 0..metadata.count;
        partitions.map(|n| partition_name(topic, n)).collect()
    }

    /// Removes the metadata of a partitioned topic.
    pub(super) fn end_deletion(&mut self, topic: &str) {
        self.partitioned.remove(topic);
        self.settings.remove(topic);
    }

    /// Removes a ledger with all it holds.
    pub(super) fn delete(&mut self, topic: &str) {
        self.ledgers.remove(topic);
        self.settings.remove(topic);
    }

    /// How many partitions a topic has, 0 for one without; none when it does not exist. May make the metadata of a
    /// partitioned topic, as `ServerCnx.handlePartitionMetadataRequest` and
    /// `BrokerService.fetchPartitionedTopicMetadataCheckAllowAutoCreationAsync`.
    pub(super) fn count_partitions(&mut self, topic: &str, may_create: bool) -> Option<u32> {
        if let Some(metadata) = self.partitioned.get(topic) {
            return Some(metadata.count);
        }
        if self.ledgers.contains_key(topic) || self.missing_has_no_partitions {
            return Some(0);
        }
        if !may_create || !self.may_create(topic) {
            return None;
        }
        if self.auto_partitions > 0 && partition_of(topic).is_none() {
            self.create_partitioned(topic, self.auto_partitions);
            return Some(self.auto_partitions);
        }
        // Nothing is made yet: that is up to the first producer.
        Some(0)
    }

    /// Whether a producer may make a topic (`BrokerService.isAllowAutoTopicCreationAsync`): a partition of a topic that has
    /// metadata may be made although nothing else may; one without metadata, and a plain topic beside partitions, like any other.
    fn may_create(&self, topic: &str) -> bool {
        let of_whole = partition_of(topic)
            .and_then(|(whole, index)| Some((self.partitioned.get(whole)?, index)));
        match of_whole {
            Some((whole, index)) => !whole.deleting && index < whole.count,
            None => self.auto_creation,
        }
    }

    /// Finds a producer's topic, or makes it (`BrokerService.getOrCreateTopic`).
    pub(super) fn get_or_create(&mut self, topic: &str) -> Result<(), (ServerError, String)> {
        let known = self.ledgers.contains_key(topic);
        let whole = partition_of(topic);
        let count = whole.and_then(|(whole, _)| Some(self.partitioned.get(whole)?.count));
        if let (Some((_, index)), Some(count)) = (whole, count)
            && known
            && index >= count
        {
            let text =
                format!("Illegal topic partition name {topic} with max allowed {count} partitions");
            return Err((ServerError::NotAllowedError, text));
        }
        if !known && !self.may_create(topic) {
            let text = format!("Topic not found {topic}");
            return Err((ServerError::TopicNotFound, text));
        }
        self.create(topic);
        Ok(())
    }

    /// Compares an entry's lowest id and notes its highest as pushed.
    pub(super) fn duplication(
        &mut self,
        topic: &str,
        producer: &str,
        ids: (u64, u64),
    ) -> Duplication {
        let deduplicates = self.deduplicates;
        let Some(ledger) = self.ledger(topic).filter(|_| deduplicates) else {
            return Duplication::New;
        };
        let sequence = ledger.sequences.entry(producer.to_owned()).or_default();
        if sequence.pushed.is_some_and(|pushed| ids.0 <= pushed) {
            let stored = sequence.persisted.is_some_and(|last| ids.0 <= last);
            return if stored {
                Duplication::Duplicate
            } else {
                Duplication::Unknown
            };
        }
        sequence.pushed = Some(ids.1);
        Duplication::New
    }

    /// Hands an entry to storage.
    pub(super) fn push(&mut self, topic: &str, producer: &str, write: Write) {
        if let Some(ledger) = self.ledger(topic) {
            ledger.pending.push_back((producer.to_owned(), write));
        }
    }

    /// True while a topic has writes whose end is not known.
    pub(super) fn pends(&mut self, topic: &str) -> bool {
        self.ledger(topic)
            .is_some_and(|ledger| !ledger.pending.is_empty())
    }

    /// The topics that have any.
    pub(super) fn pending_topics(&self) -> Vec<String> {
        let pending = self.ledgers.iter().filter(|(_, l)| !l.pending.is_empty());
        pending.map(|(topic, _)| topic.clone()).collect()
    }

    /// How many writes of one producer pend.
    pub(super) fn pending_of(&self, incarnation: u64) -> usize {
        let writes = self.ledgers.values().flat_map(|ledger| &ledger.pending);
        writes
            .filter(|(_, write)| write.incarnation == incarnation)
            .count()
    }

    /// Ends a topic's pending writes with success, in order; returns them with the numbers of their entries.
    pub(super) fn write(&mut self, topic: &str) -> Vec<(Write, u64)> {
        let Some(ledger) = self.ledgers.get_mut(topic) else {
            return Vec::new();
        };
        let mut written = Vec::new();
        for (producer, mut write) in std::mem::take(&mut ledger.pending) {
            let sequence = ledger.sequences.entry(producer).or_default();
            sequence.persisted = Some(write.ids.1);
            let events = std::mem::take(&mut write.events).into_iter();
            let generation = ledger.generation;
            self.stored.extend(events.map(|event| (generation, event)));
            ledger.entries += 1;
            written.push((write, ledger.entries));
        }
        written
    }

    /// Ends them with failure, and forgets what was pushed (`resetHighestSequenceIdPushed`).
    pub(super) fn drop_writes(&mut self, topic: &str) -> Vec<Write> {
        let Some(ledger) = self.ledger(topic) else {
            return Vec::new();
        };
        for sequence in ledger.sequences.values_mut() {
            sequence.pushed = sequence.persisted;
        }
        let failed = std::mem::take(&mut ledger.pending);
        failed.into_iter().map(|(_, write)| write).collect()
    }

    /// The highest sequence id pushed under a name, which a broker that deduplicates tells a new producer.
    pub(super) fn last_pushed(&mut self, topic: &str, producer: &str) -> Option<u64> {
        let deduplicates = self.deduplicates;
        let ledger = self.ledger(topic).filter(|_| deduplicates)?;
        ledger.sequences.get(producer)?.pushed
    }

    /// Everything that was ever stored, in order.
    pub(super) fn stored(&self) -> Vec<StoredEvent> {
        self.stored.iter().map(|(_, event)| event.clone()).collect()
    }

    /// What a consumer of a topic finds: what lies in it, or in the partitions that its metadata counts.
    pub(super) fn readable(&self, topic: &str) -> Vec<StoredEvent> {
        let whole = self.partitioned.get(topic);
        let is_read = |name: &str| match whole {
            None => name == topic,
            Some(whole) => {
                partition_of(name).is_some_and(|(of, index)| of == topic && index < whole.count)
            }
        };
        let exists = |generation: u64, event: &StoredEvent| {
            let ledger = self.ledgers.get(&event.topic);
            ledger.is_some_and(|ledger| ledger.generation == generation)
        };
        let stored = self.stored.iter();
        let found = stored.filter(|(at, event)| is_read(&event.topic) && exists(*at, event));
        found.map(|(_, event)| event.clone()).collect()
    }

    /// Partitions that no metadata counts, and topics without partitions where metadata counts some.
    pub(super) fn misshapen(&self) -> Vec<String> {
        let is_odd = |name: &&String| match partition_of(name) {
            Some((whole, index)) => {
                let metadata = self.partitioned.get(whole);
                metadata.is_none_or(|metadata| index >= metadata.count)
            }
            None => self.partitioned.contains_key(name.as_str()),
        };
        self.ledgers.keys().filter(is_odd).cloned().collect()
    }

    /// Forgets everything that was stored, for whoever runs for long.
    pub(super) fn forget(&mut self) {
        self.stored.clear();
    }

    /// The names of all topics without partitions and of all partitions.
    pub(super) fn names(&self) -> Vec<String> {
        self.ledgers.keys().cloned().collect()
    }
}

/// The name of a partition.
pub(crate) fn partition_name(topic: &str, partition: u32) -> String {
    format!("{topic}-partition-{partition}")
}

/// The topic that a name is a partition of, and which (`TopicName.getPartitionIndex`).
fn partition_of(name: &str) -> Option<(&str, u32)> {
    let (topic, digits) = name.rsplit_once("-partition-")?;
    let index: u32 = digits.parse().ok()?;
    (index.to_string() == digits).then_some((topic, index))
}

/// What is wrong with a topic's name (`TopicName`, `NamedEntity`).
pub(super) fn wrong_name(topic: &str) -> Option<String> {
    let invalid = || Some(format!("Invalid topic name: {topic}"));
    let Some((domain, rest)) = topic.split_once("://") else {
        return invalid();
    };
    let parts: Vec<&str> = rest.splitn(4, '/').collect();
    let [names @ .., local] = parts.as_slice() else {
        return invalid();
    };
    let of_entity = |c: char| c.is_ascii_alphanumeric() || "_-=:.".contains(c);
    let sound = matches!(domain, "persistent" | "non-persistent")
        && matches!(names.len(), 2 | 3)
        && names.iter().all(|name| name.chars().all(of_entity))
        && !local.trim().is_empty();
    if sound { None } else { invalid() }
}

fn events(topic: &str, entry: &Entry) -> Vec<StoredEvent> {
    let of = |message: &EntryMessage| {
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
