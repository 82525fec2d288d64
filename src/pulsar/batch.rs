//! A batch: consecutive messages of one lane, from its first message to its receipt.
//!
//! Its bytes are a gap and the messages while it waits, and become a frame when they are first sent: only then is all known
//! that its header says (the schema version that the broker gave the producer, the time). From then on the frame never
//! changes: a resend repeats it byte for byte, which is what deduplication on the broker's side builds on.

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use super::compression::Codec;
use super::memory::Memory;
use super::outgoing::RowTag;
use super::route::Held;
use super::rows::{Row, Rows};
use super::wire::{self, BatchHeader};
use crate::Lsn;
use crate::ack::TxnNo;

/// Whom a batch's header names.
#[derive(Debug)]
pub(super) struct Producer {
    pub id: u64,
    pub name: String,
    /// The lane: the dispatch key of every entry.
    pub ordering_key: [u8; 4],
    /// Bytes of the gap in front of the messages.
    pub headroom: usize,
    /// The broker's name for the schema that the producer was opened with.
    pub schema_version: Option<Bytes>,
    pub compression: Codec,
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
    /// Bytes its messages are counted with.
    pub bytes: usize,
    /// A delayed message travels alone.
    pub deliver_at_ms: Option<i64>,
    /// It is not written before this many diverted events are safe (see `divert`).
    pub after: u64,
    /// Why it is never written.
    pub refused: Option<Box<str>>,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// The gap and the messages.
    Waiting(BytesMut),
    /// The frame, and when it was last written to a connection.
    Sent { frame: Bytes, at: Instant },
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
        debug_assert!(self.messages == 0 || sequence_id > self.last_sequence_id);
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

    /// The frame to write now: made the first time, the same ever after.
    pub(super) fn send(&mut self, producer: &Producer, now: Instant, memory: &mut Memory) -> Bytes {
        let frame = match &mut self.body {
            Body::Sent { frame, .. } => frame.clone(),
            Body::Waiting(buffer) => {
                let buffer = std::mem::take(buffer);
                self.frame(buffer, producer, memory)
            }
        };
        self.body = Body::Sent {
            frame: frame.clone(),
            at: now,
        };
        frame
    }

    fn frame(&self, mut buffer: BytesMut, producer: &Producer, memory: &mut Memory) -> Bytes {
        let uncompressed_bytes = buffer.len() - producer.headroom;
        let smaller = producer
            .compression
            .compress(&buffer[producer.headroom..], producer.headroom);
        let compressed = smaller.map(|smaller| {
            memory.give_back(std::mem::replace(&mut buffer, smaller).freeze());
            (producer.compression.wire(), uncompressed_bytes)
        });
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let header = BatchHeader {
            producer_id: producer.id,
            producer_name: &producer.name,
            ordering_key: &producer.ordering_key,
            lowest_sequence_id: self.first_sequence_id,
            highest_sequence_id: self.last_sequence_id,
            messages: self.messages,
            publish_time_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            deliver_at_ms: self.deliver_at_ms,
            schema_version: producer.schema_version.as_deref(),
            compressed,
        };
        wire::seal(buffer, producer.headroom, &header, &mut memory.header)
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
