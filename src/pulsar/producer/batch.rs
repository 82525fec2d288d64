//! A batch: consecutive messages of one lane, from its first message to its receipt.
//!
//! Its bytes are a gap and the messages while it waits, and become a frame when they are first sent: only then is all known
//! that its header says (the schema version that the broker gave the producer, the time). From then on the frame never
//! changes: a resend repeats it byte for byte, which is what deduplication on the broker's side builds on.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use super::memory::Memory;
use super::outgoing::RowTag;
use super::route::Held;

use super::Now;
use crate::Lsn;
use crate::ack::TxnNo;
use crate::pulsar::compression::Codec;
use crate::pulsar::rows::{Row, Rows};
use crate::pulsar::wire::{self, BatchHeader};

/// What a batch's header says of its producer.
#[derive(Debug)]
pub(super) struct Named {
    pub name: String,
    /// The name without what [`rename`](Self::rename) adds.
    base_len: usize,
    /// The lane: the dispatch key of every entry.
    pub ordering_key: [u8; 4],
    /// Bytes of the gap in front of the messages.
    pub headroom: usize,
    /// The broker's name for the schema that the producer was opened with.
    pub schema_version: Option<Bytes>,
    pub compression: Codec,
}

impl Named {
    pub(super) fn new(name: String, lane: u32, compression: Codec) -> Self {
        let ordering_key = lane.to_be_bytes();
        Self {
            headroom: wire::headroom(&name, &ordering_key),
            base_len: name.len(),
            name,
            ordering_key,
            schema_version: None,
            compression,
        }
    }

    /// The name's number `number`.
    pub(super) fn rename(&mut self, number: u32) {
        self.name.truncate(self.base_len);
        self.name.push('~');
        self.name.push_str(&number.to_string());
    }
}

/// Consecutive messages of one transaction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner {
    pub txn: TxnNo,
    pub count: u64,
    pub commit_lsn: Lsn,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Batch {
    pub first_sequence_id: u64,
    pub last_sequence_id: u64,
    pub messages: u32,
    /// Whom its receipt concerns, in order.
    pub owners: Vec<Owner>,
    /// Each message's row.
    rows: Vec<RowTag>,
    /// The ids of the rows that are to be told of, where messages said so.
    pub marks: Option<Box<Rows>>,
    /// Bytes of its messages.
    pub bytes: usize,
    /// Memory that it is counted with.
    counted: usize,
    /// What its buffer, rows and owners had room for when that was counted.
    counted_room: [usize; 3],
    /// How much later than it was sent it is to be delivered.
    delay: Duration,
    /// A delayed message travels alone.
    pub deliver_at_ms: Option<i64>,
    /// It is not written before this many diverted events are safe (see `diversion`).
    pub after: u64,
    /// Why it is never written.
    pub refused: Option<Box<str>>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// The gap and the messages.
    Waiting(BytesMut),
    /// The frame, as it was made for this producer id; when it was last written, and how often.
    Sent {
        frame: Bytes,
        producer_id: u64,
        at: Instant,
        times: u32,
    },
}

impl Batch {
    /// A batch whose first message has this id, of about so many messages; its bytes come with [`close`](Self::close).
    pub(super) fn new(sequence_id: u64, deliver_at_ms: Option<i64>, likely: usize) -> Self {
        Self {
            first_sequence_id: sequence_id,
            last_sequence_id: sequence_id,
            messages: 0,
            owners: Vec::new(),
            rows: Vec::with_capacity(likely),
            marks: None,
            bytes: 0,
            counted: 0,
            counted_room: [0; 3],
            delay: Duration::ZERO,
            deliver_at_ms,
            after: 0,
            refused: None,
            body: Body::Waiting(BytesMut::new()),
        }
    }

    /// Counts one more message.
    pub(super) fn add(
        &mut self,
        sequence_id: u64,
        bytes: usize,
        (txn, commit_lsn, row): (TxnNo, Lsn, RowTag),
        mark: Option<Row<'_>>,
    ) {
        assert!(
            self.messages == 0 || sequence_id > self.last_sequence_id,
            "sequence ids rise: {sequence_id} behind {} of {commit_lsn}",
            self.last_sequence_id
        );
        self.last_sequence_id = sequence_id;
        if let Some(mark) = mark {
            let marks = self.marks.get_or_insert_default();
            marks.push_at(self.messages as usize, mark);
        }
        self.messages += 1;
        self.bytes += bytes;
        match self.owners.last_mut().filter(|owner| owner.txn == txn) {
            Some(owner) => owner.count += 1,
            None => self.owners.push(Owner {
                txn,
                count: 1,
                commit_lsn,
            }),
        }
        self.rows.push(row);
    }

    /// No more messages: these are their bytes, behind the gap.
    pub(super) fn close(mut self, buffer: BytesMut) -> Self {
        self.body = Body::Waiting(buffer);
        self
    }

    /// True when a refusal that names this id means this batch. A receipt names a batch's lowest id; a refusal names the highest
    /// (`Producer.java` of the broker: `checkAndStartPublish`, `callBackSequenceId`) or, from some places, the lowest.
    pub(super) fn holds(&self, sequence_id: u64) -> bool {
        (self.first_sequence_id..=self.last_sequence_id).contains(&sequence_id)
    }

    /// When its frame was last written; `None` while it waits.
    pub(super) fn sent_at(&self) -> Option<Instant> {
        match self.body {
            Body::Waiting(_) => None,
            Body::Sent { at, .. } => Some(at),
        }
    }

    /// The frame to write now: made the first time; ever after the same, but for its command when that names another producer.
    pub(super) fn send(
        &mut self,
        named: &Named,
        producer_id: u64,
        now: Now,
        memory: &mut Memory,
    ) -> Bytes {
        match &mut self.body {
            Body::Sent {
                frame,
                producer_id: made_for,
                at,
                times,
            } => {
                *at = now.at;
                *times = times.saturating_add(1);
                if *made_for != producer_id {
                    let ids = (self.first_sequence_id, self.last_sequence_id);
                    *frame = wire::readdress(frame, producer_id, ids, self.messages);
                    *made_for = producer_id;
                }
                frame.clone()
            }
            Body::Waiting(buffer) => {
                let buffer = std::mem::take(buffer);
                let frame = self.frame(buffer, named, producer_id, now, memory);
                self.body = Body::Sent {
                    frame: frame.clone(),
                    producer_id,
                    at: now.at,
                    times: 1,
                };
                frame
            }
        }
    }

    fn frame(
        &mut self,
        mut buffer: BytesMut,
        named: &Named,
        producer_id: u64,
        now: Now,
        memory: &mut Memory,
    ) -> Bytes {
        let uncompressed_bytes = buffer.len() - named.headroom;
        let smaller = named
            .compression
            .compress(&buffer[named.headroom..], named.headroom);
        let compressed = smaller.map(|smaller| {
            memory.give_back(std::mem::replace(&mut buffer, smaller).freeze());
            (named.compression.wire(), uncompressed_bytes)
        });
        if let Some(at_ms) = self.deliver_at_ms {
            let ahead_ms = u64::try_from(at_ms)
                .unwrap_or(0)
                .saturating_sub(now.unix_ms);
            self.delay = Duration::from_millis(ahead_ms);
        }
        let header = BatchHeader {
            producer_id,
            producer_name: &named.name,
            ordering_key: &named.ordering_key,
            lowest_sequence_id: self.first_sequence_id,
            highest_sequence_id: self.last_sequence_id,
            messages: self.messages,
            publish_time_ms: now.unix_ms,
            deliver_at_ms: self.deliver_at_ms,
            schema_version: named.schema_version.as_deref(),
            compressed,
        };
        wire::seal(buffer, named.headroom, &header, &mut memory.header)
    }

    /// Bytes of its frame that a broker measures against a topic's limit: what stands behind the command. 0 before it is sent.
    pub(super) fn entry_bytes(&self) -> usize {
        match &self.body {
            Body::Waiting(_) => 0,
            Body::Sent { frame, .. } => wire::entry_len(frame),
        }
    }

    /// True when its frame is, or would be, larger than a broker takes. Rare, so it may cost.
    pub(super) fn is_larger_than(&self, largest: usize, codec: Codec, headroom: usize) -> bool {
        match &self.body {
            Body::Sent { frame, .. } => wire::entry_len(frame) > largest,
            Body::Waiting(buffer) if buffer.len() <= largest => false,
            Body::Waiting(buffer) => {
                let compressed = codec.compress(&buffer[headroom..], 0);
                compressed.is_none_or(|compressed| compressed.len() + headroom > largest)
            }
        }
    }

    /// How much later than it was sent it is to be delivered.
    pub(super) fn delay(&self) -> Duration {
        self.delay
    }

    /// True when its frame was written before it was last written.
    pub(super) fn was_written_before(&self) -> bool {
        matches!(self.body, Body::Sent { times: 2.., .. })
    }

    /// True when the id is one of a batch that was written, and not its last.
    pub(super) fn is_cut_by(&self, sequence_id: u64) -> bool {
        self.sent_at().is_some()
            && (self.first_sequence_id..self.last_sequence_id).contains(&sequence_id)
    }

    // --- memory ---

    /// Counts its memory again while messages are added; returns by how much it has grown. `capacity` is that of the buffer.
    #[inline]
    pub(super) fn count_memory(&mut self, capacity: usize) -> usize {
        let room = [capacity, self.rows.capacity(), self.owners.capacity()];
        if room == self.counted_room && self.marks.is_none() {
            return 0;
        }
        self.counted_room = room;
        self.count_grown(capacity)
    }

    #[inline(never)]
    fn count_grown(&mut self, capacity: usize) -> usize {
        let marks = self.marks.as_ref().map_or(0, |marks| marks.memory());
        let counted = size_of::<Self>()
            + capacity
            + self.owners.capacity() * size_of::<Owner>()
            + self.rows.capacity() * size_of::<RowTag>()
            + marks;
        let grown = counted.saturating_sub(self.counted);
        self.counted += grown;
        grown
    }

    /// The same from the beginning, for a batch that is closed.
    pub(super) fn recount_memory(&mut self) -> usize {
        let capacity = match &self.body {
            Body::Waiting(buffer) => buffer.capacity(),
            Body::Sent { frame, .. } => frame.len(),
        };
        self.counted = 0;
        self.count_grown(capacity)
    }

    /// What it is counted with.
    pub(super) fn counted(&self) -> usize {
        self.counted
    }

    /// Gives back what it has allocated and does not need.
    pub(super) fn shrink(&mut self, memory: &mut Memory) {
        if let Body::Waiting(buffer) = &mut self.body
            && buffer.capacity() > 2 * buffer.len()
        {
            let needed = BytesMut::from(&buffer[..]);
            memory.give_back(std::mem::replace(buffer, needed).freeze());
        }
        if self.rows.capacity() > 2 * self.rows.len() {
            self.rows.shrink_to_fit();
            self.owners.shrink_to_fit();
        }
        self.recount_memory();
    }

    /// It has its receipt: the next batch may have its memory.
    pub(super) fn give_back(self, memory: &mut Memory) {
        if let Body::Sent { frame, .. } = self.body {
            memory.give_back(frame);
        }
    }

    /// As if it had never been sent: its next frame names another producer.
    pub(super) fn unsend(&mut self, headroom: usize) {
        if self.sent_at().is_some() {
            let payload = self.payload(headroom).unwrap_or_default();
            let mut buffer = BytesMut::with_capacity(headroom + payload.len());
            buffer.put_bytes(0, headroom);
            buffer.put_slice(&payload);
            self.body = Body::Waiting(buffer);
        }
    }

    /// True when it was never sent and holds ids on both sides of `pushed`, or several up to it.
    pub(super) fn must_split(&self, pushed: u64) -> bool {
        self.sent_at().is_none() && self.messages > 1 && self.first_sequence_id <= pushed
    }

    /// The same messages in batches of one.
    pub(super) fn split(self, headroom: usize) -> Vec<Self> {
        let mut singles = Vec::with_capacity(self.messages as usize);
        let mut owners = self.of_each();
        let messages = wire::messages(self.payload(headroom).unwrap_or_default());
        for (index, (metadata, entry)) in messages.enumerate() {
            let mut buffer = BytesMut::with_capacity(headroom + entry.len());
            buffer.put_bytes(0, headroom);
            buffer.put_slice(&entry);
            let mut single = Self::new(metadata.sequence_id(), self.deliver_at_ms, 1);
            let of = owners
                .next()
                .expect("a batch has an owner for each message");
            let mark = self.marks.as_ref().and_then(|marks| marks.get(index));
            single.add(metadata.sequence_id(), entry.len(), of, mark);
            single.after = self.after;
            single.refused.clone_from(&self.refused);
            singles.push(single.close(buffer));
        }
        assert!(
            owners.next().is_none(),
            "a batch has a message for each of its owners"
        );
        singles
    }

    /// Transaction and row of each message.
    fn of_each(&self) -> impl Iterator<Item = (TxnNo, Lsn, RowTag)> {
        let owners = self.owners.iter();
        let txns = owners.flat_map(|owner| {
            std::iter::repeat_n((owner.txn, owner.commit_lsn), count_of(owner.count))
        });
        txns.zip(&self.rows)
            .map(|((txn, commit_lsn), row)| (txn, commit_lsn, *row))
    }

    /// The same messages as events of their own.
    pub(super) fn into_events(self, headroom: usize) -> Vec<Held> {
        let messages = wire::messages(self.payload(headroom).unwrap_or_default());
        let events: Vec<Held> = messages
            .zip(self.of_each())
            .enumerate()
            .map(|(index, ((metadata, entry), of))| {
                let mark = self.marks.as_ref().and_then(|marks| marks.get(index));
                Held::from_message(&metadata, &entry, self.deliver_at_ms, of, mark)
            })
            .collect();
        assert_eq!(
            events.len(),
            self.messages as usize,
            "a batch holds all its messages"
        );
        events
    }

    /// True when it has a message of one of these keys.
    pub(super) fn has_key(&self, keys: &[String], headroom: usize) -> bool {
        let mut messages = wire::messages(self.payload(headroom).unwrap_or_default());
        messages.any(|(metadata, _)| {
            let key = metadata.partition_key.unwrap_or_default();
            keys.contains(&key)
        })
    }

    /// Ids of its rows, to name them in an error.
    pub(super) fn row_ids(&self, headroom: usize) -> Vec<String> {
        let payload = self.payload(headroom).unwrap_or_default();
        let id_of = |metadata: pulsar::message::proto::SingleMessageMetadata| {
            let mut properties = metadata.properties.into_iter();
            properties
                .find(|property| property.key == "id")
                .map(|property| property.value)
        };
        wire::messages(payload)
            .filter_map(|(metadata, _)| id_of(metadata))
            .collect()
    }

    fn payload(&self, headroom: usize) -> Option<Bytes> {
        match &self.body {
            Body::Waiting(buffer) => Some(Bytes::copy_from_slice(buffer.get(headroom..)?)),
            Body::Sent { frame, .. } => wire::payload_of(frame),
        }
    }
}

fn count_of(count: u64) -> usize {
    usize::try_from(count).expect("a batch's messages are counted by a u32")
}
