//! A lane: one broker producer on one topic, with its own name, its own sequence, and the batches it has not yet been
//! given receipts for.
//!
//! Input: messages in log order. Output: frames to the lane's connection, in order; batches back to the publisher when
//! their receipt has come. The lane outlives its connections: a frame stays here until its receipt, and a new connection is
//! sent the very same frames again.
//!
//! # Sequence ids
//!
//! `(commit LSN mod 2^48 >> 3) << 16 | ordinal`, the ordinal counting this lane's events of the transaction. It is a pure function
//! of the log and of the routing, so the same event has the same id after any restart. (What else it depends on, such as the
//! number of lanes, is part of the producer's name: see `publisher`.) Commit records are at least 40 bytes apart, which
//! leaves [`MAX_ORDINALS`] ids between two transactions. A lane that gets more events than that from one transaction would
//! run into the next one's ids: the publisher gives what is above to a *dedicated* lane, whose producer carries the commit
//! LSN in its name and counts from zero.
//!
//! **Epochs.** Ids are signed 64-bit numbers at the broker. An id of the whole LSN would end at LSN 40000/0 (2^50 bytes of log), and a broker that
//! deduplicates would take every later event for an old one. So the log is divided into epochs of 2^48 bytes ([`epoch`]): an id counts within its epoch,
//! and a producer is of one epoch, which its name tells (but for epoch 0). The publisher lets every lane get its receipts before it takes an event of another epoch.
//!
//! # Why deduplication never eats a message
//!
//! A broker that deduplicates looks only at a batch's lowest id and, when it has stored that one, drops the batch whole.
//! So no batch may hold both stored and new messages. Two rules see to that:
//! * Within a process, a frame once written is only ever resent as it is.
//! * A producer that opens is told the highest id ever *pushed* under its name, which is not always stored. So each message
//!   up to that id is a **probe** of its own: it travels alone, in order, and gets its own verdict: "stored before" (a
//!   receipt), "not known" (`PersistenceError`: a new producer, and again), or it is stored now. Batches that wait are split
//!   for it, and what is above that id waits until every probe has its receipt: nothing newer may be stored before them.
//!
//! DESIGN.md has one probe only, with the highest id, and everything below withheld until its verdict. Were that one message
//! ever stored rather than recognized (deduplication switched off in between, a topic that was deleted), all that was
//! withheld below it would be refused as old, and lost. One probe for each message costs a restart some small frames (at
//! most what was in flight) and cannot lose.
//!
//! # A damaged frame
//!
//! A broker that finds a frame's checksum wrong refuses that frame alone, and may have stored those behind it. Under the same
//! name it would then take the frame for an old one. So the lane goes on under another name (`…~1`), with everything that
//! has no receipt: what stood behind the damaged frame may come twice, nothing is lost.
//!
//! # What this does not cover
//!
//! Where the broker deduplicates and refuses one frame alone (damaged; or not allowed, as one larger than its topic's policy
//! takes), frames behind it are stored already. A process that is killed right then, before the refused events are stored under
//! another name or as stragglers, finds their ids below the highest one when it comes back, and takes the broker's "stored
//! before" for a receipt. The broker keeps no more than the highest id, so nobody can tell. `walpost verify` finds such rows.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use super::batch::{Batch, Producer};
use super::compression::Codec;
use super::connection::Connection;
use super::memory::Memory;
use super::outgoing::Outgoing;
use super::wire::{self, Single};
use crate::Lsn;

/// Ids of one lane between two transactions: commit records are ≥ 40 bytes = 5 × 8 apart, and each 8 bytes hold 2^16.
pub(super) const MAX_ORDINALS: u64 = 5 << 16;

/// An epoch is 2^48 bytes of log: see the module's documentation.
const EPOCH_BITS: u32 = 48;

/// The epoch of an event that committed there.
pub(super) fn epoch(commit_lsn: Lsn) -> u64 {
    commit_lsn.as_u64() >> EPOCH_BITS
}

/// A lane with this many batches under way keeps its open one until it is full, or until a receipt comes: about an eighth of
/// what a receipt takes, and the broker has no batch for each event where receipts are slow.
const MAX_UNDER_WAY: usize = 8;

/// Limits of a batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub batch_max_messages: u32,
    pub batch_max_bytes: usize,
    pub max_message_bytes: usize,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Appended {
    /// It is in a batch and takes this many bytes until its receipt.
    Queued { bytes: usize },
    /// It is larger than the broker takes; nothing was changed.
    TooLarge { bytes: usize },
}

/// Where the lane stands with its broker.
#[derive(Debug)]
pub(super) enum Link {
    /// No producer, and nobody is opening one.
    Down {
        /// A producer of this lane may still stand on this connection.
        close_first: Option<Connection>,
    },
    /// An opener is at work; holds the connection's id when the broker has closed the producer meanwhile.
    Opening {
        closed_on: Option<u64>,
    },
    Up(Connection),
}

/// The batch being filled.
#[derive(Debug)]
struct Open {
    batch: Batch,
    /// The gap for its header, and its messages.
    buffer: BytesMut,
    since: Instant,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lane {
    pub topic: usize,
    pub producer: Producer,
    /// Serves the tail of one huge transaction only.
    dedicated: bool,
    /// Of its events.
    epoch: u64,
    /// Messages of the last batch.
    likely_messages: usize,
    /// What a batch's buffer is likely to need.
    likely_bytes: usize,
    open: Option<Open>,
    in_flight: VecDeque<Batch>,
    /// How many of `in_flight`, from the front, were written to the present connection.
    written: usize,
    pub link: Link,
    /// The transaction whose events are being counted, and the next one's ordinal.
    txn: (Lsn, u64),
    /// Highest id pushed by an earlier session: up to it every message travels alone.
    pushed: Option<u64>,
    /// Highest id that was written since the end of the log was asked for.
    highest_written: Option<u64>,
    /// The last dedicated lane that relieved this one, and whose transaction's tail it took.
    pub tail: Option<(Lsn, usize)>,
    /// Since when the lane has had nothing to do.
    pub idle_since: Instant,
    /// Its last receipt.
    pub heard: Option<Heard>,
    /// When a receipt last showed that its oldest frame's turn was yet to come.
    progress_at: Instant,
    /// How often a damaged frame has changed its name.
    renamed: u32,
    /// How many diverted events are safe.
    stored: u64,
}

impl Lane {
    pub(super) fn new(
        topic: usize,
        number: u32,
        producer_id: u64,
        producer_name: String,
        compression: Codec,
        (dedicated, epoch): (bool, u64),
        stored: u64,
    ) -> Self {
        let ordering_key = number.to_be_bytes();
        let headroom = wire::headroom(&producer_name, &ordering_key);
        Self {
            topic,
            producer: Producer {
                id: producer_id,
                name: producer_name,
                ordering_key,
                headroom,
                schema_version: None,
                compression,
            },
            dedicated,
            epoch,
            likely_messages: 0,
            likely_bytes: 0,
            open: None,
            in_flight: VecDeque::new(),
            written: 0,
            link: Link::Down { close_first: None },
            txn: (Lsn::ZERO, 0),
            pushed: None,
            highest_written: None,
            tail: None,
            idle_since: Instant::now(),
            heard: None,
            progress_at: Instant::now(),
            renamed: 0,
            stored,
        }
    }

    /// The ordinal that the next event of this transaction would have.
    pub(super) fn next_ordinal(&self, commit_lsn: Lsn) -> u64 {
        if self.txn.0 == commit_lsn {
            self.txn.1
        } else {
            0
        }
    }

    /// The sequence id of the transaction's next event.
    fn next_sequence_id(&self, commit_lsn: Lsn) -> u64 {
        let base = if self.dedicated {
            0
        } else {
            let in_epoch = commit_lsn.as_u64() & ((1 << EPOCH_BITS) - 1);
            (in_epoch >> 3) << 16
        };
        base + self.next_ordinal(commit_lsn)
    }

    /// An event of this transaction goes elsewhere: its sequence id is used up, and what comes behind it begins a batch.
    pub(super) fn skip(&mut self, commit_lsn: Lsn, memory: &mut Memory) {
        self.seal(memory);
        self.txn = (commit_lsn, self.next_ordinal(commit_lsn) + 1);
    }

    /// Puts a message into the open batch, sealing before or after it as the limits ask. It is not written before `after`
    /// diverted events are safe.
    pub(super) fn append<'p>(
        &mut self,
        message: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
        after: u64,
        limits: Limits,
        memory: &mut Memory,
    ) -> Appended {
        let ordinal = self.next_ordinal(message.commit_lsn);
        let sequence_id = self.next_sequence_id(message.commit_lsn);
        let single = Single {
            key: message.key,
            event_time_ms: message.event_time_ms,
            sequence_id,
            payload: message.payload,
        };
        single.encode_metadata(properties.clone(), &mut memory.metadata);
        let bytes = single.entry_len(&memory.metadata);
        let largest = limits.max_message_bytes - self.producer.headroom;
        if bytes > largest && !self.fits_compressed(&single, &memory.metadata, largest) {
            return Appended::TooLarge { bytes };
        }
        self.txn = (message.commit_lsn, ordinal + 1);

        let alone = message.deliver_at_ms.is_some()
            || self.pushed.is_some_and(|pushed| sequence_id <= pushed);
        let batch_max_bytes = limits.batch_max_bytes.min(largest);
        if self.open.as_ref().is_some_and(|open| {
            alone || open.batch.bytes + bytes > batch_max_bytes || open.batch.after != after
        }) {
            self.seal(memory);
        }
        if self.open.is_none() {
            self.begin_batch(sequence_id, bytes, message.deliver_at_ms, after, memory);
        }
        let Open { batch, buffer, .. } = self.open.as_mut().expect("a batch was just begun");
        single.append(&memory.metadata, buffer);
        batch.add(sequence_id, bytes, message.of(), message.mark);
        if alone || batch.messages >= limits.batch_max_messages || batch.bytes >= batch_max_bytes {
            self.seal(memory);
        }
        Appended::Queued { bytes }
    }

    /// Puts a message in line that is never written; returns the bytes it takes until it is taken out again.
    pub(super) fn append_refused<'p>(
        &mut self,
        message: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
        reason: &str,
        memory: &mut Memory,
    ) -> usize {
        let sequence_id = self.next_sequence_id(message.commit_lsn);
        self.skip(message.commit_lsn, memory);
        let single = Single {
            key: message.key,
            event_time_ms: message.event_time_ms,
            sequence_id,
            payload: message.payload,
        };
        single.encode_metadata(properties.clone(), &mut memory.metadata);
        let bytes = single.entry_len(&memory.metadata);
        let mut buffer = memory.take(self.producer.headroom + bytes);
        buffer.put_bytes(0, self.producer.headroom);
        single.append(&memory.metadata, &mut buffer);
        let mut batch = Batch::new(sequence_id, message.deliver_at_ms, 1);
        batch.add(sequence_id, bytes, message.of(), message.mark);
        batch.refused = Some(reason.into());
        self.in_flight.push_back(batch.close(buffer));
        bytes
    }

    /// Marks the batch that holds `sequence_id` as one that is never written again; false when there is none.
    pub(super) fn refuse(&mut self, sequence_id: u64, reason: String) -> bool {
        let mut batches = self.in_flight.iter_mut();
        let Some(batch) = batches.find(|batch| batch.holds(sequence_id)) else {
            return false;
        };
        batch.refused = Some(reason.into());
        true
    }

    /// Why the oldest message is refused, if it is, and no frame of this lane is under way any more.
    pub(super) fn refused_front(&self) -> Option<String> {
        let front = self.in_flight.front()?;
        let reason = front.refused.as_ref()?;
        let still = match self.link {
            Link::Up(_) => self.written == 0,
            // Never opened, or closed by the broker.
            Link::Down { ref close_first } => close_first.is_none(),
            Link::Opening { .. } => false,
        };
        still.then(|| reason.to_string())
    }

    /// Everything that has no receipt, from the oldest on.
    pub(super) fn take_all(&mut self) -> VecDeque<Batch> {
        if let Some(open) = self.open.take() {
            self.in_flight.push_back(open.batch.close(open.buffer));
        }
        self.written = 0;
        self.idle_since = Instant::now();
        std::mem::take(&mut self.in_flight)
    }

    /// This many diverted events are safe: what waited for them may go.
    pub(super) fn stored(&mut self, stored: u64, memory: &mut Memory) {
        self.stored = stored;
        if self.written < self.in_flight.len() {
            self.transmit(memory);
        }
    }

    /// Messages without receipt, and their bytes.
    pub(super) fn size(&self) -> (usize, usize) {
        let open = self.open.as_ref().map(|open| &open.batch);
        let batches = self.in_flight.iter().chain(open);
        batches.fold((0, 0), |(messages, bytes), batch| {
            (messages + batch.messages as usize, bytes + batch.bytes)
        })
    }

    /// Whether a message that is larger than the broker takes becomes small enough by compression. Rare, so it may cost.
    fn fits_compressed(&self, single: &Single<'_>, metadata: &[u8], largest: usize) -> bool {
        if self.producer.compression == Codec::None {
            return false;
        }
        let mut entry = BytesMut::with_capacity(single.entry_len(metadata));
        single.append(metadata, &mut entry);
        let compressed = self.producer.compression.compress(&entry, 0);
        compressed.is_some_and(|compressed| compressed.len() <= largest)
    }

    fn begin_batch(
        &mut self,
        sequence_id: u64,
        bytes: usize,
        deliver_at_ms: Option<i64>,
        after: u64,
        memory: &mut Memory,
    ) {
        let headroom = self.producer.headroom;
        let mut buffer = memory.take(self.likely_bytes.max(headroom + bytes));
        buffer.put_bytes(0, headroom);
        let mut batch = Batch::new(sequence_id, deliver_at_ms, self.likely_messages);
        batch.after = after;
        self.open = Some(Open {
            batch,
            buffer,
            since: Instant::now(),
        });
    }

    /// Closes the open batch, if there is one, and sends it if the lane is up.
    pub(super) fn seal(&mut self, memory: &mut Memory) {
        let Some(open) = self.open.take() else { return };
        // Bytes follow the size of the batches up at once and down by halves: a buffer that is too small is copied.
        self.likely_bytes = open.buffer.len().max(self.likely_bytes / 2);
        self.likely_messages = open.batch.messages as usize;
        self.in_flight.push_back(open.batch.close(open.buffer));
        self.transmit(memory);
    }

    /// Sends what the present connection has not been sent.
    fn transmit(&mut self, memory: &mut Memory) {
        let Link::Up(connection) = &self.link else {
            return;
        };
        let now = Instant::now();
        // While the oldest is a probe, only probes go out.
        let probing = self.pushed.filter(|&pushed| {
            let front = self.in_flight.front();
            front.is_some_and(|front| front.first_sequence_id <= pushed)
        });
        for batch in self.in_flight.iter_mut().skip(self.written) {
            // Nothing passes a refused batch, nor events that are being stored elsewhere.
            if batch.refused.is_some() || batch.after > self.stored {
                return;
            }
            if probing.is_some_and(|pushed| batch.first_sequence_id > pushed) {
                return;
            }
            connection.send_data(self.producer.id, batch.send(&self.producer, now, memory));
            self.written += 1;
            self.highest_written = self.highest_written.max(Some(batch.last_sequence_id));
        }
    }

    /// The producer is open: send everything that has no receipt, in order.
    pub(super) fn opened(
        &mut self,
        connection: Connection,
        last_sequence_id: Option<u64>,
        schema_version: Option<Bytes>,
        memory: &mut Memory,
    ) {
        self.producer.schema_version = schema_version;
        self.pushed = self.pushed.max(last_sequence_id);
        // What has waited for the producer waits no longer; and what is open may have to be split.
        self.link = Link::Down { close_first: None };
        self.seal(memory);
        if let Some(pushed) = self.pushed {
            self.split_waiting(pushed);
        }
        self.written = 0;
        self.link = Link::Up(connection);
        self.transmit(memory);
    }

    /// True when `pushed`, the highest id ever published under the lane's name, cannot be from a log that ended at `log_end`
    /// when it was last asked for, nor is what this lane has written since. (That later events wait to be written shows nothing:
    /// the log may have been put back, and have grown past what was pushed.)
    pub(super) fn is_beyond(&self, pushed: u64, log_end: Lsn) -> bool {
        // An id's upper part exceeds its commit LSN by 8 for each 2^16 events of the transaction.
        let in_epoch = ((pushed >> 16) << 3).saturating_sub(((MAX_ORDINALS - 1) >> 16) << 3);
        let commit_lsn = (self.epoch << EPOCH_BITS) + in_epoch;
        !self.dedicated && Some(pushed) > self.highest_written && commit_lsn > log_end.as_u64()
    }

    /// The end of the log is asked for again: it is beyond all that was written.
    pub(super) fn forget_written(&mut self) {
        self.highest_written = None;
    }

    /// Cuts batches that were never sent and reach down to `pushed` or below into batches of one.
    fn split_waiting(&mut self, pushed: u64) {
        if !self.in_flight.iter().any(|batch| batch.must_split(pushed)) {
            return;
        }
        for batch in std::mem::take(&mut self.in_flight) {
            if batch.must_split(pushed) {
                self.in_flight.extend(batch.split(self.producer.headroom));
            } else {
                self.in_flight.push_back(batch);
            }
        }
    }

    /// A receipt for the batch that begins with `sequence_id`.
    pub(super) fn receipt(&mut self, sequence_id: u64, memory: &mut Memory) -> Receipt {
        match self.in_flight.front() {
            Some(front) if front.first_sequence_id == sequence_id && front.sent_at().is_some() => {}
            // A batch that was resent although its first receipt was already on the way gets two.
            Some(front) if front.first_sequence_id > sequence_id => return Receipt::Repeated,
            None => return Receipt::Repeated,
            Some(_) => return self.receipt_behind_refused(sequence_id),
        }
        let batch = self.in_flight.pop_front().expect("the front was just seen");
        let at = Instant::now();
        self.heard = batch.sent_at().map(|sent_at| Heard { sent_at, at });
        self.progress_at = at;
        self.written = self.written.saturating_sub(1);
        if self.in_flight.is_empty() {
            self.idle_since = at;
        } else if self.written < self.in_flight.len() {
            // The last probe has its receipt.
            self.transmit(memory);
        }
        Receipt::Acknowledged(batch)
    }

    /// A broker that refuses a batch goes on with what stands behind it, and its receipts come while the lane is on its way to
    /// a new producer. They are as true as any: what is stored need not be diverted with the refused one.
    fn receipt_behind_refused(&mut self, sequence_id: u64) -> Receipt {
        let mut batches = self.in_flight.iter();
        let place = batches.position(|batch| batch.refused.is_none());
        let stored = place.filter(|&place| {
            let batch = &self.in_flight[place];
            place > 0
                && self.written == 0
                && batch.first_sequence_id == sequence_id
                && batch.sent_at().is_some()
        });
        match stored.and_then(|place| self.in_flight.remove(place)) {
            Some(batch) => Receipt::Acknowledged(batch),
            None => Receipt::OutOfOrder,
        }
    }

    /// The connection or the producer is gone; frames stay, and will be sent again.
    pub(super) fn down(&mut self, close_first: Option<Connection>) {
        self.link = Link::Down { close_first };
        self.written = 0;
    }

    /// The frame that holds `sequence_id` was damaged on its way: see the module's documentation.
    pub(super) fn damaged(&mut self, sequence_id: u64) {
        let mut batches = self.in_flight.iter();
        let place = batches.position(|batch| batch.holds(sequence_id));
        if place.is_none_or(|place| place + 1 >= self.written) {
            // Nothing was sent behind it.
            return;
        }
        self.renamed += 1;
        let base = self.producer.name.split('~').next().unwrap_or_default();
        self.producer.name = format!("{base}~{}", self.renamed);
        self.pushed = None;
        for batch in &mut self.in_flight {
            batch.unsend(self.producer.headroom);
        }
    }

    /// Closes the producer of a lane that has nothing to send, and frees its memory. The lane stays, because producer ids
    /// are its place; its next message opens the producer again (and first waits until the broker has closed this one).
    pub(super) fn close(&mut self) {
        assert!(
            self.is_empty(),
            "a lane is closed only when it has nothing to send"
        );
        if let Link::Up(connection) = &self.link {
            connection.close_producer(self.producer.id);
            self.down(Some(connection.clone()));
        }
        self.in_flight = VecDeque::new();
    }

    /// When the open batch was begun, if there is one.
    pub(super) fn open_since(&self) -> Option<Instant> {
        self.open.as_ref().map(|open| open.since)
    }

    /// True when a batch that is not full may be handed on: it can be written, and few are under way. What cannot be written
    /// yet had better grow.
    pub(super) fn takes_part_batches(&self) -> bool {
        matches!(self.link, Link::Up(_)) && self.in_flight.len() < MAX_UNDER_WAY
    }

    /// True when every batch handed on has its receipt: the next one need not wait for company.
    pub(super) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Neither an open batch nor one without receipt.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_none() && self.in_flight.is_empty()
    }

    /// Takes notice of the last receipt on its connection: when its frame was written before this lane's oldest, that one's
    /// turn is yet to come.
    pub(super) fn overhear(&mut self, heard: Heard) {
        let oldest = self.in_flight.front().and_then(Batch::sent_at);
        if oldest.is_some_and(|sent_at| heard.sent_at <= sent_at) {
            self.progress_at = self.progress_at.max(heard.at);
        }
    }

    /// Since when the oldest batch has waited without a sign that its receipt comes nearer; `None` when nothing was written.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let oldest = self.in_flight.front().filter(|_| self.written > 0)?;
        oldest.sent_at().map(|at| at.max(self.progress_at))
    }

    /// Ids of the rows in the batch that holds `sequence_id`, to name them in an error.
    pub(super) fn row_ids(&self, sequence_id: u64) -> Vec<String> {
        let mut batches = self.in_flight.iter();
        batches
            .find(|batch| batch.holds(sequence_id))
            .map(|batch| batch.row_ids(self.producer.headroom))
            .unwrap_or_default()
    }
}

/// A receipt: when its frame was written, and when it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    pub sent_at: Instant,
    pub at: Instant,
}

/// What a receipt meant.
#[derive(Debug)]
pub(super) enum Receipt {
    Acknowledged(Batch),
    /// For a batch that has its receipt already.
    Repeated,
    /// For a batch behind one that is not refused: the two sides disagree, start over.
    OutOfOrder,
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
