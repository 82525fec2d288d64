//! A lane: one broker producer on one topic, with its own name, its own sequence, and the batches it has not yet been
//! given receipts for.
//!
//! Input: messages in log order. Output: frames for the lane's connection, in order; batches back to the producer when
//! their receipt has come. The lane outlives its connections: a frame stays here until its receipt, and a new connection is
//! sent the very same frames again.
//!
//! # Sequence ids
//!
//! `(commit LSN mod 2^48 >> 3) << 16 | ordinal`, the ordinal counting this lane's events of the transaction. It is a pure function
//! of the log and of the routing, so the same event has the same id after any restart. (What else it depends on, such as the
//! number of lanes, is part of the producer's name: see the parent module.) Commit records are at least 40 bytes apart, which
//! leaves [`MAX_ORDINALS`] ids between two transactions. A lane that gets more events than that from one transaction would
//! run into the next one's ids: the producer gives what is above to a *dedicated* lane, whose producer carries the commit
//! LSN in its name and counts from zero.
//!
//! **Epochs.** Ids are signed 64-bit numbers at the broker. An id of the whole LSN would end at LSN 40000/0 (2^50 bytes of log), and a broker that
//! deduplicates would take every later event for an old one. So the log is divided into epochs of 2^48 bytes ([`epoch`]): an id counts within its epoch,
//! and a producer is of one epoch, which its name tells (but for epoch 0). Every lane gets its receipts before an event of another epoch is taken.
//!
//! # Why deduplication never eats a message
//!
//! A broker that deduplicates looks only at a batch's lowest id and, when it has stored that one, drops the batch whole.
//! So no batch may hold both stored and new messages. Two rules see to that:
//! * Within a process, a frame once written under a name is only ever resent as it is under that name.
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
//! # Doubt
//!
//! A broker remembers one number for each name: the highest id. "Stored before" says that an id is not above it, and nothing of the id
//! itself. It is believed of ids up to what this opening was told, and of a frame that was written before under this name. And
//! it is not believed of anything once the broker may have left out a frame and stored one behind it. These are the signs:
//! * a "stored before" that is neither;
//! * a frame that was refused, or whose receipt was passed over, when the next opening is told an id as high as its lowest;
//! * a told id inside a batch that was written;
//! * a name that was to be new, and of which the broker knows an id.
//!
//! Each of them is doubt, and there is one way out of it: the lane takes a name that was never used (`…~1`, `…~2`, …), and
//! writes everything without receipt anew. So doubt costs repetitions, never an event.
//!
//! A process that begins afterwards would open the old name, and know nothing of this. So the first of these signs, or a refusal that may become one, raises
//! [`Doubts`](crate::pulsar::Doubts): whoever runs the publisher stores a mark, and the next process uses names that were never used
//! (`scanner::name_mark`). A refusal with nothing written behind it raises nothing, unless the broker told an id as high: then nobody knows
//! whether an earlier process had the same answer. Nor does a name that was used before: whoever used it has raised it.
//!
//! # Behind a frame that may be refused
//!
//! A broker refuses a frame larger than its topic's policy, or delayed further than that allows, and stores what stands behind it. Then that
//! can neither be called back nor be put in order again. So a frame that is larger, or delayed further, than any that the topic has accepted since
//! it opened has nothing in flight behind it until its receipt ([`Accepted`]). Full batches are kept to the largest that was accepted, so that they need not wait.
//!
//! # What this does not cover
//!
//! A frame that was damaged on its way, or one that a policy refuses that was made stricter under way, may have frames behind it that are
//! stored. Where the broker deduplicates, a process that is killed right then, before it has read the refusal and stored the mark (milliseconds; up to ten seconds where it has lost Postgres and another process takes over), finds their ids below
//! the highest one when it comes back, and takes the broker's "stored
//! before" for a receipt. So does a lane whose connection ends with the refusal unread in it. The broker keeps no more than the highest id, so nobody can tell. `walpost verify` finds such rows.
//!
//! A lane that takes another name while the broker has not read all frames of the old one, and whose connection ends before the broker has closed the old producer, may
//! have them stored behind what it sends again: then the last arrivals of a key are out of order.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::time::Instant;

use super::batch::{Batch, Named};
use super::effects::Effect;
use super::memory::Memory;
use super::outgoing::Outgoing;
use super::route::Held;
use super::{Now, connections::Connections};
use crate::Lsn;
use crate::pulsar::compression::Codec;
use crate::pulsar::wire::Single;

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
    /// It is in a batch.
    Queued,
    /// It is larger than the broker takes; nothing was changed.
    TooLarge { bytes: usize },
}

/// Where the lane stands with its broker.
///
/// ```text
///             create            created
///      Down ─────────► Creating ───────► Up
///       ▲ ▲               │              │ refused, doubt, no work
///       │ └───────────────┘              ▼
///       └──────────── closed ───────── Leaving
/// ```
///
/// From each of them the end of the connection, or the broker that closes the producer, leads to `Down`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// No producer.
    Down,
    /// The broker was asked for a producer.
    Creating {
        connection: u64,
        producer_id: u64,
        since: Instant,
        /// The broker has closed it already, although its answer is still on the way.
        closed: bool,
    },
    /// There is a producer.
    Up { connection: u64, producer_id: u64 },
    /// The broker was asked to close the producer; what was written to it gets its receipt first.
    Leaving { connection: u64, producer_id: u64 },
}

/// What a topic has accepted since its producers opened: a frame that goes beyond it has none in flight behind it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Accepted {
    bytes: usize,
    delay: Duration,
}

impl Accepted {
    /// True when a frame that asks for this much will be accepted.
    fn covers(self, demand: Self) -> bool {
        demand.bytes <= self.bytes && demand.delay <= self.delay
    }

    /// A frame that asked for so much has its receipt.
    fn raise(&mut self, demand: Self) {
        self.bytes = self.bytes.max(demand.bytes);
        self.delay = self.delay.max(demand.delay);
    }
}

/// What a lane writes with.
pub(super) struct Desk<'a> {
    pub memory: &'a mut Memory,
    pub effects: &'a mut Vec<Effect>,
    pub connections: &'a mut Connections,
    pub accepted: &'a mut Accepted,
    /// Nothing may be sent yet.
    pub holds_back: bool,
    pub now: Now,
}

/// Where a lane stands in the line for room on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    None,
    Waiting,
    /// It is its turn.
    First,
}

/// The batch being filled.
#[derive(Debug)]
struct Open {
    batch: Batch,
    /// The gap for its header, and its messages.
    buffer: BytesMut,
    since: Instant,
    /// With so many bytes of messages it is full.
    max_bytes: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lane {
    pub topic: usize,
    pub named: Named,
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
    /// How many of `in_flight`, from the front, were written to the present producer.
    written: usize,
    /// What the last of them asks of the topic, if that is more than it had accepted.
    unproven: Option<Accepted>,
    state: State,
    /// The transaction whose events are being counted, and the next one's ordinal.
    txn: (Lsn, u64),
    /// What the present opening, or one before it under this name, was told: up to it every message travels alone.
    told: Option<u64>,
    /// What the present opening was told.
    told_now: Option<u64>,
    /// The lowest id that was refused or passed over under this name, and may have frames behind it that are stored.
    doubtful: Option<u64>,
    /// How often it has changed its name.
    renamed: u32,
    /// Highest id that was written under this name.
    highest_of_name: Option<u64>,
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
    /// How many diverted events are safe.
    stored: u64,
    /// The largest entry that the broker of the last producer takes.
    max_message_bytes: Option<usize>,
    /// Bytes written to the present producer that have no receipt.
    written_bytes: usize,
    /// Receipts of producers below this are for events that the lane has not any more.
    valid_from: u64,
    /// The last two producers, the present one last.
    ids: Vec<u64>,
    /// The present producer is among those whose receipts are watched for.
    is_watched: bool,
    /// Where it stands in the line for room on its connection.
    place: Place,
    /// Messages without receipt.
    messages: usize,
    /// What their batches have allocated.
    memory: usize,
}

/// Which lane it is to be.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub topic: usize,
    pub number: u32,
    pub name: String,
    pub dedicated: bool,
    pub epoch: u64,
    /// Its name must be one that was never used.
    pub anew: bool,
}

impl Lane {
    pub(super) fn new(identity: Identity, compression: Codec, stored: u64, now: Instant) -> Self {
        let mut lane = Self {
            topic: identity.topic,
            named: Named::new(identity.name, identity.number, compression),
            dedicated: identity.dedicated,
            epoch: identity.epoch,
            likely_messages: 0,
            likely_bytes: 0,
            open: None,
            in_flight: VecDeque::new(),
            written: 0,
            unproven: None,
            state: State::Down,
            txn: (Lsn::ZERO, 0),
            told: None,
            told_now: None,
            doubtful: None,
            renamed: 0,
            highest_of_name: None,
            highest_written: None,
            tail: None,
            idle_since: now,
            heard: None,
            progress_at: now,
            stored,
            max_message_bytes: None,
            written_bytes: 0,
            valid_from: 0,
            ids: Vec::new(),
            is_watched: false,
            place: Place::None,
            messages: 0,
            memory: 0,
        };
        if identity.anew {
            lane.rename();
        }
        lane
    }

    pub(super) fn state(&self) -> State {
        self.state
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
    pub(super) fn skip(&mut self, commit_lsn: Lsn, desk: &mut Desk<'_>) {
        self.seal(desk);
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
        desk: &mut Desk<'_>,
    ) -> Appended {
        let ordinal = self.next_ordinal(message.commit_lsn);
        let sequence_id = self.next_sequence_id(message.commit_lsn);
        let single = Single {
            key: message.key,
            event_time_ms: message.event_time_ms,
            sequence_id,
            payload: message.payload,
        };
        single.encode_metadata(properties.clone(), &mut desk.memory.metadata);
        let bytes = single.entry_len(&desk.memory.metadata);
        let largest = limits.max_message_bytes.saturating_sub(self.named.headroom);
        if bytes > largest && !self.fits_compressed(&single, &desk.memory.metadata, largest) {
            return Appended::TooLarge { bytes };
        }
        self.txn = (message.commit_lsn, ordinal + 1);

        let alone =
            message.deliver_at_ms.is_some() || self.told.is_some_and(|told| sequence_id <= told);
        if self.open.as_ref().is_some_and(|open| {
            alone || open.batch.bytes + bytes > open.max_bytes || open.batch.after != after
        }) {
            self.seal(desk);
        }
        if self.open.is_none() {
            let max_bytes = self.full_at(limits.batch_max_bytes.min(largest), desk);
            self.begin_batch(
                sequence_id,
                bytes,
                message.deliver_at_ms,
                after,
                max_bytes,
                desk,
            );
        }
        let Open {
            batch,
            buffer,
            max_bytes,
            ..
        } = self.open.as_mut().expect("a batch was just begun");
        single.append(&desk.memory.metadata, buffer);
        batch.add(sequence_id, bytes, message.of(), message.mark);
        self.messages += 1;
        self.memory += batch.count_memory(buffer.capacity());
        if alone || batch.messages >= limits.batch_max_messages || batch.bytes >= *max_bytes {
            self.seal(desk);
        }
        Appended::Queued
    }

    /// Puts a message in line that is never written.
    pub(super) fn append_refused<'p>(
        &mut self,
        message: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
        reason: &str,
        desk: &mut Desk<'_>,
    ) {
        let sequence_id = self.next_sequence_id(message.commit_lsn);
        self.skip(message.commit_lsn, desk);
        let single = Single {
            key: message.key,
            event_time_ms: message.event_time_ms,
            sequence_id,
            payload: message.payload,
        };
        single.encode_metadata(properties.clone(), &mut desk.memory.metadata);
        let bytes = single.entry_len(&desk.memory.metadata);
        let mut buffer = desk.memory.take(self.named.headroom + bytes);
        buffer.put_bytes(0, self.named.headroom);
        single.append(&desk.memory.metadata, &mut buffer);
        let mut batch = Batch::new(sequence_id, message.deliver_at_ms, 1);
        batch.add(sequence_id, bytes, message.of(), message.mark);
        batch.refused = Some(reason.into());
        self.push(batch.close(buffer));
    }

    /// Puts a batch behind the others.
    fn push(&mut self, mut batch: Batch) {
        self.messages += batch.messages as usize;
        self.memory += batch.recount_memory();
        self.in_flight.push_back(batch);
    }

    /// The largest entry that its broker takes, once one has said so.
    pub(super) fn max_message_bytes(&self) -> Option<usize> {
        self.max_message_bytes
    }

    /// Messages without receipt, and what their batches have allocated.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.messages, self.memory)
    }

    /// A batch has left the lane.
    fn forget(&mut self, batch: &Batch) {
        self.messages -= batch.messages as usize;
        self.memory -= batch.counted();
    }

    /// Whether a message that is larger than the broker takes becomes small enough by compression. Rare, so it may cost.
    fn fits_compressed(&self, single: &Single<'_>, metadata: &[u8], largest: usize) -> bool {
        if self.named.compression == Codec::None {
            return false;
        }
        let mut entry = BytesMut::with_capacity(single.entry_len(metadata));
        single.append(metadata, &mut entry);
        let compressed = self.named.compression.compress(&entry, 0);
        compressed.is_some_and(|compressed| compressed.len() <= largest)
    }

    /// How many bytes of messages a batch may have that begins now. Once one was accepted that is nearly full, none is larger: each of a few
    /// bytes more would have to be proven.
    fn full_at(&self, most: usize, desk: &Desk<'_>) -> usize {
        let proven = desk.accepted.bytes.saturating_sub(self.named.headroom);
        if proven >= most / 8 * 7 {
            most.min(proven)
        } else {
            most
        }
    }

    fn begin_batch(
        &mut self,
        sequence_id: u64,
        bytes: usize,
        deliver_at_ms: Option<i64>,
        after: u64,
        max_bytes: usize,
        desk: &mut Desk<'_>,
    ) {
        let needed = self.named.headroom + bytes;
        // A message that travels alone needs no more.
        let (bytes, messages) = match deliver_at_ms {
            Some(_) => (needed, 1),
            None => (self.likely_bytes.max(needed), self.likely_messages),
        };
        let mut buffer = desk.memory.take(bytes);
        buffer.put_bytes(0, self.named.headroom);
        let mut batch = Batch::new(sequence_id, deliver_at_ms, messages);
        batch.after = after;
        self.open = Some(Open {
            batch,
            buffer,
            since: desk.now.at,
            max_bytes,
        });
    }

    /// Closes the open batch, if there is one, and sends it if the lane is up.
    pub(super) fn seal(&mut self, desk: &mut Desk<'_>) {
        let Some(open) = self.open.take() else { return };
        if open.batch.deliver_at_ms.is_none() {
            // Bytes follow the size of the batches up at once and down by halves: a buffer that is too small is copied.
            self.likely_bytes = open.buffer.len().max(self.likely_bytes / 2);
            self.likely_messages = open.batch.messages as usize;
        }
        self.in_flight.push_back(open.batch.close(open.buffer));
        self.transmit(desk);
        if self.written < self.in_flight.len()
            && let Some(waiting) = self.in_flight.back_mut()
        {
            // It may wait for long: it keeps no more memory than it needs.
            self.memory -= waiting.counted();
            waiting.shrink(desk.memory);
            self.memory += waiting.counted();
        }
    }

    /// Writes what the present producer has not been sent, as far as it may go.
    pub(super) fn transmit(&mut self, desk: &mut Desk<'_>) {
        let State::Up {
            connection,
            producer_id,
        } = self.state
        else {
            return;
        };
        if desk.holds_back {
            return;
        }
        // While the oldest is a probe, only probes go out.
        let probing = self.told.filter(|&told| {
            let front = self.in_flight.front();
            front.is_some_and(|front| front.first_sequence_id <= told)
        });
        for batch in self.in_flight.iter_mut().skip(self.written) {
            // Nothing passes a refused batch, nor events that are being stored elsewhere.
            if batch.refused.is_some() || batch.after > self.stored {
                return;
            }
            if probing.is_some_and(|told| batch.first_sequence_id > told) {
                return;
            }
            // Nothing stands behind one that may be refused.
            let is_proven = |demand| desk.accepted.covers(demand);
            if self.written > 0 && !self.unproven.is_none_or(is_proven) {
                return;
            }
            if !desk
                .connections
                .has_room(connection, self.place == Place::First)
            {
                if std::mem::replace(&mut self.place, Place::Waiting) != Place::Waiting {
                    desk.connections.wait(connection, producer_id);
                }
                return;
            }
            let frame = batch.send(&self.named, producer_id, desk.now, desk.memory);
            let demand = Accepted {
                bytes: batch.entry_bytes(),
                delay: batch.delay(),
            };
            self.unproven = (!desk.accepted.covers(demand)).then_some(demand);
            desk.connections
                .wrote(connection, batch.entry_bytes(), desk.now.at);
            desk.effects.push(Effect::Send {
                connection,
                producer_id,
                frame,
            });
            if !self.is_watched {
                self.is_watched = true;
                desk.connections.watch(producer_id);
            }
            self.written += 1;
            self.written_bytes += batch.entry_bytes();
            self.highest_written = self.highest_written.max(Some(batch.last_sequence_id));
            self.highest_of_name = self.highest_of_name.max(Some(batch.last_sequence_id));
        }
    }

    /// Its connection has room again.
    pub(super) fn room(&mut self, desk: &mut Desk<'_>) {
        self.place = Place::First;
        self.transmit(desk);
        if self.place == Place::First {
            self.place = Place::None;
        }
    }

    /// This many diverted events are safe: what waited for them may go.
    pub(super) fn stored(&mut self, stored: u64, desk: &mut Desk<'_>) {
        self.stored = stored;
        if self.written < self.in_flight.len() {
            self.transmit(desk);
        }
    }

    // --- producers ---

    /// Bytes that were written to a producer which the lane has left: nothing is waited for any more.
    pub(super) fn take_written_bytes(&mut self) -> usize {
        if self.written == 0 {
            std::mem::take(&mut self.written_bytes)
        } else {
            0
        }
    }

    /// From now on only receipts of producers that are made later are for what the lane has.
    pub(super) fn forget_producers(&mut self, next_id: u64) {
        self.valid_from = next_id;
    }

    /// False for a producer whose receipts are for events that the lane has not any more.
    pub(super) fn is_valid(&self, producer_id: u64) -> bool {
        producer_id >= self.valid_from
    }

    /// The broker is being asked for a producer. Returns an earlier one of which nothing is expected any more.
    #[must_use]
    pub(super) fn create(
        &mut self,
        connection: u64,
        producer_id: u64,
        now: Instant,
    ) -> Option<u64> {
        assert_eq!(self.state, State::Down, "a lane has one producer at most");
        self.state = State::Creating {
            connection,
            producer_id,
            since: now,
            closed: false,
        };
        self.is_watched = false;
        self.ids.push(producer_id);
        (self.ids.len() > 2).then(|| self.ids.remove(0))
    }

    /// The producer is open; this is the highest id pushed under its name. An error says why it cannot be used under that name. Otherwise, before
    /// anything is sent: the ids and sizes of messages that are larger than the broker takes.
    pub(super) fn created(
        &mut self,
        last_sequence_id: Option<u64>,
        schema_version: Option<Bytes>,
        desk: &mut Desk<'_>,
    ) -> Result<Vec<(u64, usize)>, Doubt> {
        let State::Creating {
            connection,
            producer_id,
            ..
        } = self.state
        else {
            panic!("a producer is created that nobody asked for");
        };
        self.state = State::Up {
            connection,
            producer_id,
        };
        self.named.schema_version = schema_version;
        self.unwrite();
        if let Some(told) = last_sequence_id {
            if self.is_used_by_another(told) {
                return Err(Doubt::UsedName);
            }
            if self.doubtful.is_some_and(|lowest| told >= lowest) {
                return Err(Doubt::PassedOver);
            }
            if self.in_flight.iter().any(|batch| batch.is_cut_by(told)) {
                return Err(Doubt::InsideBatch);
            }
        }
        self.doubtful = None;
        self.told_now = last_sequence_id;
        self.told = self.told.max(last_sequence_id);
        // What has waited for the producer waits no longer; and what is open may have to be split.
        if let Some(open) = self.open.take() {
            self.in_flight.push_back(open.batch.close(open.buffer));
        }
        if let Some(told) = self.told {
            self.split(|batch| batch.must_split(told));
        }
        let largest = desk.connections.max_message_bytes(connection);
        self.max_message_bytes = Some(largest);
        let (compression, headroom) = (self.named.compression, self.named.headroom);
        let is_too_large = |batch: &Batch| batch.is_larger_than(largest, compression, headroom);
        self.split(|batch| batch.messages > 1 && batch.refused.is_none() && is_too_large(batch));
        let written = self
            .in_flight
            .iter()
            .filter(|batch| batch.refused.is_none());
        let too_large = written.filter(|batch| is_too_large(batch));
        Ok(too_large
            .map(|batch| (batch.first_sequence_id, batch.bytes))
            .collect())
    }

    /// Lets go of the producer: the broker is to close it. Returns where it is.
    pub(super) fn leave(&mut self) -> Option<(u64, u64)> {
        let (State::Up {
            connection,
            producer_id,
        }
        | State::Creating {
            connection,
            producer_id,
            ..
        }) = self.state
        else {
            return None;
        };
        self.state = State::Leaving {
            connection,
            producer_id,
        };
        self.unwrite();
        Some((connection, producer_id))
    }

    /// There is no producer any more; frames stay, and will be sent again. Returns where it was.
    pub(super) fn down(&mut self) -> Option<(u64, u64)> {
        let was = std::mem::replace(&mut self.state, State::Down);
        self.unwrite();
        match was {
            State::Down => None,
            State::Creating {
                connection,
                producer_id,
                ..
            }
            | State::Up {
                connection,
                producer_id,
            }
            | State::Leaving {
                connection,
                producer_id,
            } => Some((connection, producer_id)),
        }
    }

    /// True while the broker is to answer for this producer.
    pub(super) fn is_creating(&self, producer_id: u64) -> bool {
        matches!(self.state, State::Creating { producer_id: its, .. } if its == producer_id)
    }

    /// The broker has closed a producer that it is still to answer for.
    pub(super) fn closed_early(&mut self) {
        if let State::Creating { closed, .. } = &mut self.state {
            *closed = true;
        }
    }

    /// Nothing is written to the present producer.
    fn unwrite(&mut self) {
        self.written = 0;
        self.unproven = None;
        self.place = Place::None;
    }

    /// True when it has something to send and no producer.
    pub(super) fn needs_producer(&self) -> bool {
        self.state == State::Down && !self.is_empty()
    }

    // --- doubt ---

    /// Takes a name that was not used, and writes everything without receipt anew: see the module's documentation. The producer must have been let go of.
    pub(super) fn rename(&mut self) {
        assert!(
            matches!(self.state, State::Down | State::Leaving { .. }),
            "a producer keeps its name"
        );
        self.renamed += 1;
        self.named.rename(self.renamed);
        (self.told, self.told_now, self.doubtful) = (None, None, None);
        (self.highest_of_name, self.highest_written) = (None, None);
        for batch in &mut self.in_flight {
            self.memory -= batch.counted();
            batch.unsend(self.named.headroom);
            self.memory += batch.recount_memory();
        }
    }

    /// Its events were taken out and get other ids, under a name that was never used.
    pub(super) fn count_anew(&mut self) {
        self.txn.1 = 0;
        self.tail = None;
    }

    /// Its next event is of this transaction, and earlier ones may have come by other lanes: the broker may know only earlier ids. True when it
    /// has just told a later one.
    pub(super) fn begin_with(&mut self, commit_lsn: Lsn) -> bool {
        let lowest = self.next_sequence_id(commit_lsn);
        if matches!(self.state, State::Up { .. }) {
            return self.told_now.is_some_and(|told| told >= lowest);
        }
        self.doubtful = Some(self.doubtful.map_or(lowest, |known| known.min(lowest)));
        false
    }

    /// True when it has the batch of this id.
    pub(super) fn holds(&self, sequence_id: u64) -> bool {
        self.in_flight.iter().any(|batch| batch.holds(sequence_id))
    }

    /// The frame that holds `sequence_id` was refused or passed over, and those behind it may have been stored. (Not so up to the id that this
    /// opening was told: nothing up to that is ever stored now.) True when there are such frames.
    pub(super) fn doubt_from(&mut self, sequence_id: u64) -> bool {
        let mut batches = self.in_flight.iter();
        let held = batches.find(|batch| batch.holds(sequence_id));
        let (lowest, highest) = held.map_or((sequence_id, sequence_id), |batch| {
            (batch.first_sequence_id, batch.last_sequence_id)
        });
        if Some(highest) <= self.told_now {
            return false;
        }
        self.doubtful = Some(self.doubtful.map_or(lowest, |known| known.min(lowest)));
        Some(highest) < self.highest_of_name
    }

    /// The event of this id is refused for good, and a broker that is asked under this name later may call it stored: a later id was written; or as
    /// late a one was told, and nobody knows what an earlier process was answered.
    pub(super) fn may_be_passed(&self, sequence_id: u64) -> bool {
        let mut batches = self.in_flight.iter();
        let held = batches.find(|batch| batch.holds(sequence_id));
        held.is_some_and(|batch| {
            Some(batch.last_sequence_id) < self.highest_of_name
                || Some(batch.first_sequence_id) <= self.told
        })
    }

    /// The batch that holds `sequence_id` was refused as it is. True when its messages will be sent one by one.
    pub(super) fn take_apart(&mut self, sequence_id: u64) -> bool {
        let refused = self.in_flight.iter().find(|batch| batch.holds(sequence_id));
        let Some(first) = refused
            .filter(|batch| batch.messages > 1)
            .map(|batch| batch.first_sequence_id)
        else {
            return false;
        };
        self.split(|batch| batch.first_sequence_id == first);
        true
    }

    /// Cuts batches into batches of one.
    fn split(&mut self, which: impl Fn(&Batch) -> bool) {
        if !self.in_flight.iter().any(&which) {
            return;
        }
        for batch in std::mem::take(&mut self.in_flight) {
            if which(&batch) {
                self.forget(&batch);
                for single in batch.split(self.named.headroom) {
                    self.push(single);
                }
            } else {
                self.in_flight.push_back(batch);
            }
        }
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

    /// How large the batch is that holds this id.
    pub(super) fn entry_bytes(&self, sequence_id: u64) -> Option<usize> {
        let mut batches = self.in_flight.iter();
        let held = batches.find(|batch| batch.holds(sequence_id));
        held.map(Batch::entry_bytes)
    }

    /// Why the oldest message is refused, if it is, and no frame of this lane is under way any more.
    pub(super) fn refused_front(&self) -> Option<String> {
        let reason = self.in_flight.front()?.refused.as_ref()?;
        let still = match self.state {
            State::Up { .. } => self.written == 0,
            State::Down => true,
            State::Creating { .. } | State::Leaving { .. } => false,
        };
        still.then(|| reason.to_string())
    }

    /// Takes the refused message at the front out of the lane, and what must not pass it: what comes behind it of its key (when
    /// `with_key`). See [`wait_for`](Self::wait_for) for the rest.
    pub(super) fn take_refused(&mut self, with_key: bool) -> Vec<Held> {
        self.close_open();
        let Some(front) = self.in_flight.pop_front() else {
            return Vec::new();
        };
        self.forget(&front);
        let mut taken = front.into_events(self.named.headroom);
        if with_key {
            let keys: Vec<String> = taken.iter().map(|event| event.key.clone()).collect();
            let headroom = self.named.headroom;
            self.split(|batch| batch.messages > 1 && batch.has_key(&keys, headroom));
            for batch in std::mem::take(&mut self.in_flight) {
                if batch.has_key(&keys, headroom) {
                    self.forget(&batch);
                    taken.extend(batch.into_events(headroom));
                } else {
                    self.in_flight.push_back(batch);
                }
            }
        }
        taken
    }

    /// What is left in the lane waits until this many diverted events are safe.
    pub(super) fn wait_for(&mut self, diverted: u64) {
        for batch in &mut self.in_flight {
            batch.after = diverted;
        }
    }

    /// Everything that has no receipt, from the oldest on.
    pub(super) fn take_all(&mut self, now: Instant) -> VecDeque<Batch> {
        self.close_open();
        self.unwrite();
        self.idle_since = now;
        (self.messages, self.memory) = (0, 0);
        std::mem::take(&mut self.in_flight)
    }

    fn close_open(&mut self) {
        if let Some(open) = self.open.take() {
            self.in_flight.push_back(open.batch.close(open.buffer));
        }
    }

    /// True when `pushed`, the highest id ever published under the lane's name, cannot be from a log that ended at `log_end`
    /// when it was last asked for, nor is what this lane has written since. (That later events wait to be written shows nothing:
    /// the log may have been put back, and have grown past what was pushed.) Under a name that was to be new an id says that another had it.
    pub(super) fn is_beyond(&self, pushed: u64, log_end: Lsn) -> bool {
        !self.dedicated
            && !self.is_used_by_another(pushed)
            && Some(pushed) > self.highest_written
            && self.lowest_commit_lsn(pushed) > log_end
    }

    /// Under a name that was to be new: an id that it has not written itself.
    fn is_used_by_another(&self, pushed: u64) -> bool {
        self.renamed > 0 && Some(pushed) > self.highest_of_name
    }

    /// The event of this id committed there, or up to some events later.
    fn lowest_commit_lsn(&self, sequence_id: u64) -> Lsn {
        // An id's upper part exceeds its commit LSN by 8 for each 2^16 events of the transaction.
        let in_epoch = ((sequence_id >> 16) << 3).saturating_sub(((MAX_ORDINALS - 1) >> 16) << 3);
        Lsn::new((self.epoch << EPOCH_BITS) + in_epoch)
    }

    /// True when all that it has without receipt lies above `pushed`.
    pub(super) fn is_above(&self, pushed: u64) -> bool {
        let first = self.in_flight.front();
        let first = first.or(self.open.as_ref().map(|open| &open.batch));
        first.is_none_or(|batch| batch.first_sequence_id > pushed)
    }

    // --- forgetting: see `forgetting` ---

    /// What is left in the place of a lane that is forgotten.
    pub(super) fn empty(now: Instant) -> Self {
        let identity = Identity {
            topic: 0,
            number: 0,
            name: String::new(),
            dedicated: false,
            epoch: 0,
            anew: false,
        };
        Self::new(identity, Codec::None, 0, now)
    }

    /// The last transaction of which it has counted an event.
    pub(super) fn counted_to(&self) -> Lsn {
        self.txn.0
    }

    /// The highest commit LSN that may have been written under its names since the end of the log was asked for.
    pub(super) fn written_to(&self) -> Lsn {
        if self.renamed > 0 {
            return self.counted_to();
        }
        let written = self.highest_written.filter(|_| !self.dedicated);
        written.map_or(Lsn::ZERO, |id| self.lowest_commit_lsn(id))
    }

    /// The producers by which it is known.
    pub(super) fn producers(&self) -> &[u64] {
        &self.ids
    }

    /// The end of the log is asked for again: it is beyond all that was written.
    pub(super) fn forget_written(&mut self) {
        self.highest_written = None;
    }

    // --- receipts ---

    /// A receipt for the batch that begins with `sequence_id`.
    pub(super) fn receipt(
        &mut self,
        sequence_id: u64,
        stored_before: bool,
        desk: &mut Desk<'_>,
    ) -> Receipt {
        match self.in_flight.front() {
            Some(front) if front.first_sequence_id == sequence_id && front.sent_at().is_some() => {}
            // A batch that was resent although its first receipt was already on the way gets two.
            Some(front) if front.first_sequence_id > sequence_id => return Receipt::Repeated,
            None => return Receipt::Repeated,
            Some(_) => return self.receipt_of_later(sequence_id, stored_before),
        }
        let front = self.in_flight.front().expect("it was just seen");
        if stored_before && !self.may_be_stored(front) {
            return Receipt::Doubt;
        }
        let batch = self.in_flight.pop_front().expect("it was just seen");
        self.forget(&batch);
        let at = desk.now.at;
        self.heard = batch.sent_at().map(|sent_at| Heard { sent_at, at });
        self.progress_at = at;
        desk.accepted.raise(Accepted {
            bytes: batch.entry_bytes(),
            delay: batch.delay(),
        });
        if let State::Up { connection, .. } = self.state
            && self.written > 0
        {
            self.written -= 1;
            self.written_bytes = self.written_bytes.saturating_sub(batch.entry_bytes());
            desk.connections
                .answered(connection, batch.entry_bytes(), at);
        }
        if self.in_flight.is_empty() {
            self.idle_since = at;
        } else if self.written < self.in_flight.len() {
            // The last probe has its receipt, or one that nothing may stand behind.
            self.transmit(desk);
        }
        Receipt::Acknowledged(Box::new(batch))
    }

    /// "Stored before" can be true of this batch.
    fn may_be_stored(&self, batch: &Batch) -> bool {
        batch.was_written_before()
            || self
                .told_now
                .is_some_and(|told| batch.last_sequence_id <= told)
    }

    /// A broker that refuses a batch goes on with what stands behind it, and its receipts come while the lane is on its way to
    /// a new producer. They are as true as any: what is stored need not be diverted with the refused one. (Behind one that is sent again they
    /// count for nothing: what is stored before it is stored once more after it, so that the last arrivals of a key are in order.)
    fn receipt_of_later(&mut self, sequence_id: u64, stored_before: bool) -> Receipt {
        if matches!(self.state, State::Up { .. }) {
            if let Some(front) = self.in_flight.front().map(|front| front.first_sequence_id) {
                self.doubt_from(front);
            }
            return Receipt::OutOfOrder;
        }
        let mut batches = self.in_flight.iter();
        let place = batches.position(|batch| batch.refused.is_none());
        let stored = place.filter(|&place| {
            let batch = &self.in_flight[place];
            place > 0
                && !stored_before
                && batch.first_sequence_id == sequence_id
                && batch.sent_at().is_some()
        });
        match stored.and_then(|place| self.in_flight.remove(place)) {
            Some(batch) => {
                self.forget(&batch);
                Receipt::Acknowledged(Box::new(batch))
            }
            None => Receipt::Repeated,
        }
    }

    /// When the open batch was begun, if there is one.
    pub(super) fn open_since(&self) -> Option<Instant> {
        self.open.as_ref().map(|open| open.since)
    }

    /// True when a batch that is not full may be handed on: it can be written, and few are under way. What cannot be written
    /// yet keeps filling.
    pub(super) fn takes_part_batches(&self) -> bool {
        matches!(self.state, State::Up { .. }) && self.in_flight.len() < MAX_UNDER_WAY
    }

    /// True when every batch handed on has its receipt: the next one need not wait for company.
    pub(super) fn is_quiet(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Neither an open batch nor one without receipt.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_none() && self.in_flight.is_empty()
    }

    /// True when it has a batch without receipt that was written.
    pub(super) fn has_written(&self) -> bool {
        self.in_flight.iter().any(|batch| batch.sent_at().is_some())
    }

    /// Frees what it does not need while it has nothing to send.
    pub(super) fn trim(&mut self) {
        assert!(
            self.is_empty(),
            "a lane is closed only when it has nothing to send"
        );
        self.in_flight = VecDeque::new();
    }

    /// Records the last receipt on its connection: when its frame was written before this lane's oldest, that one's
    /// turn is yet to come.
    pub(super) fn note_progress(&mut self, heard: Heard) {
        let oldest = self.in_flight.front().and_then(Batch::sent_at);
        if oldest.is_some_and(|sent_at| heard.sent_at <= sent_at) {
            self.progress_at = self.progress_at.max(heard.at);
        }
    }

    /// False when nothing is under way: its receipts are not watched for until it writes again.
    pub(super) fn keeps_watch(&mut self) -> bool {
        self.is_watched = self.written > 0;
        self.is_watched
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
            .map(|batch| batch.row_ids(self.named.headroom))
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
    Acknowledged(Box<Batch>),
    /// For a batch that has its receipt already.
    Repeated,
    /// For a batch behind one that has none: the two sides disagree, start over.
    OutOfOrder,
    /// "Stored before", which cannot be known.
    Doubt,
}

/// Why a lane's name cannot be used any more: see the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The broker knows an id of a name that was to be new.
    UsedName,
    /// A frame was refused or passed over, and one behind it is stored.
    PassedOver,
    /// The highest id lies inside a batch that was written.
    InsideBatch,
    /// A receipt says "stored before" of a frame that was never written before.
    Receipt,
}

impl std::fmt::Display for Doubt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::UsedName => "the broker has published under this name before",
            Self::PassedOver => {
                "a batch was refused, or sent by another lane, and a later one is stored"
            }
            Self::InsideBatch => "the broker knows a part of a batch",
            Self::Receipt => "the broker says that it had stored a batch before it was sent",
        })
    }
}

#[cfg(test)]
#[path = "lane_tests.rs"]
mod tests;
