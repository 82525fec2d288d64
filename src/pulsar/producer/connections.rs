//! What the producer knows of the connections to brokers.
//!
//! A broker that throttles one topic stops reading the whole connection, so what is written there holds up every topic on it. Therefore
//! the bytes that are written to a connection and have no answer are bounded, and lanes wait in line for room. A connection that stays
//! silent although it was written to is asked for a sign of life; a broker that gives none does not read it. While nothing may be
//! written ([`crate::lease`]) no connection counts as silent: what was handed to it waits there.
//!
//! A look once a second costs one step for each connection and each producer that has written or waits for receipts.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::effects::Link;
use super::lane::Heard;

/// Frames without receipt on one connection: what a broker stores in some milliseconds at full speed.
const MAX_UNANSWERED_BYTES: usize = 8 * 1024 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Connections {
    known: HashMap<u64, Known>,
    /// Producers that have written since they were last looked at, or have frames without receipt; and some that are no more.
    watched: Vec<u64>,
    /// What is handed to them is not written.
    are_held: bool,
}

#[derive(Debug)]
struct Known {
    max_message_bytes: usize,
    /// Bytes of frames without receipt.
    unanswered: usize,
    /// When a receipt came last, or the first frame was written after the last receipt.
    heard_at: Instant,
    /// When it was asked for a sign of life.
    pinged_at: Option<Instant>,
    /// When the last such question was written that was answered: what was written before has been read.
    read_until: Option<Instant>,
    /// Producers whose lanes wait for room.
    waiting: VecDeque<u64>,
    /// Producers there that are not closed, or may be being created.
    producers: BTreeSet<u64>,
    /// Topics that were to ask for producers there once their partitions are counted.
    expected: BTreeSet<usize>,
    /// When it last had a producer, or was found.
    used_at: Instant,
    /// The last receipt that was seen.
    heard: Option<Heard>,
}

impl Connections {
    /// A connection is there.
    pub(super) fn add(&mut self, link: Link, now: Instant) {
        let known = self.known.entry(link.connection).or_insert(Known {
            max_message_bytes: link.max_message_bytes,
            unanswered: 0,
            heard_at: now,
            pinged_at: None,
            read_until: None,
            waiting: VecDeque::new(),
            producers: BTreeSet::new(),
            expected: BTreeSet::new(),
            used_at: now,
            heard: None,
        });
        known.used_at = now;
    }

    /// Sets whether frames are held back instead of written.
    pub(super) fn hold(&mut self, are_held: bool, now: Instant) {
        if std::mem::replace(&mut self.are_held, are_held) && !are_held {
            for known in self.known.values_mut() {
                known.heard_at = now;
                known.pinged_at = None;
            }
        }
    }

    /// It has ended. Returns the producers that were there; `None` when it was not known.
    pub(super) fn remove(&mut self, connection: u64) -> Option<BTreeSet<u64>> {
        self.known.remove(&connection).map(|known| known.producers)
    }

    /// A topic will ask for producers there.
    pub(super) fn expect(&mut self, connection: u64, topic: usize) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.expected.insert(topic);
        }
    }

    /// A producer is asked for there.
    pub(super) fn add_producer(&mut self, connection: u64, producer_id: u64) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.producers.insert(producer_id);
        }
    }

    /// A producer is no more.
    pub(super) fn remove_producer(&mut self, connection: u64, producer_id: u64, now: Instant) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.producers.remove(&producer_id);
            known.used_at = now;
        }
    }

    /// The producers there.
    pub(super) fn producers(&self, connection: u64) -> impl Iterator<Item = u64> + '_ {
        let known = self.known.get(&connection);
        known
            .into_iter()
            .flat_map(|known| known.producers.iter().copied())
    }

    /// Forgets the connections that have had no producer for so long, and returns them. `waits` tells whether a topic still
    /// waits to ask for producers there.
    pub(super) fn forget_unused(
        &mut self,
        now: Instant,
        patience: Duration,
        waits: impl Fn(usize, u64) -> bool,
    ) -> Vec<u64> {
        let mut unused = Vec::new();
        self.known.retain(|&connection, known| {
            let is_quiet = known.producers.is_empty()
                && now.saturating_duration_since(known.used_at) > patience;
            if is_quiet {
                known.expected.retain(|&topic| waits(topic, connection));
            }
            let is_unused = is_quiet && known.expected.is_empty();
            if is_unused {
                unused.push(connection);
            }
            !is_unused
        });
        unused.sort_unstable();
        unused
    }

    // --- receipts ---

    /// The receipts of this producer are to be watched for.
    pub(super) fn watch(&mut self, producer_id: u64) {
        self.watched.push(producer_id);
    }

    /// The producers whose receipts are to be watched for, once.
    pub(super) fn take_watched(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.watched)
    }

    /// A lane there has had this receipt.
    pub(super) fn note_heard(&mut self, connection: u64, heard: Heard) {
        if let Some(known) = self.known.get_mut(&connection)
            && known.heard.is_none_or(|last| last.at < heard.at)
        {
            known.heard = Some(heard);
        }
    }

    /// The last receipt that was seen there.
    pub(super) fn heard(&self, connection: u64) -> Option<Heard> {
        self.known.get(&connection)?.heard
    }

    // --- room ---

    /// How many there are, and how many producers are watched.
    #[cfg(test)]
    pub(super) fn count(&self) -> (usize, usize) {
        (self.known.len(), self.watched.len())
    }

    pub(super) fn is_known(&self, connection: u64) -> bool {
        self.known.contains_key(&connection)
    }

    /// The largest entry that its broker takes.
    pub(super) fn max_message_bytes(&self, connection: u64) -> usize {
        let known = self.known.get(&connection);
        known.map_or(usize::MAX, |known| known.max_message_bytes)
    }

    /// True when a frame may be written: by a lane whose turn it is, or when none waits in line. (Where nothing is without answer, no answer
    /// would give anybody a turn.)
    pub(super) fn has_room(&self, connection: u64, in_turn: bool) -> bool {
        let known = self.known.get(&connection);
        known.is_none_or(|known| {
            let may_go = in_turn || known.waiting.is_empty() || known.unanswered == 0;
            may_go && known.unanswered < MAX_UNANSWERED_BYTES
        })
    }

    /// The lane of this producer is to be told when there is room.
    pub(super) fn wait(&mut self, connection: u64, producer_id: u64) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.waiting.push_back(producer_id);
        }
    }

    /// The producer whose turn it is, if there is room.
    pub(super) fn next_waiting(&mut self, connection: u64) -> Option<u64> {
        let known = self.known.get_mut(&connection)?;
        if known.unanswered >= MAX_UNANSWERED_BYTES {
            return None;
        }
        known.waiting.pop_front()
    }

    /// A frame was written.
    pub(super) fn wrote(&mut self, connection: u64, bytes: usize, now: Instant) {
        if let Some(known) = self.known.get_mut(&connection) {
            if known.unanswered == 0 {
                known.heard_at = now;
            }
            known.unanswered += bytes;
        }
    }

    /// Frames of a producer that was left: their receipts are not waited for.
    pub(super) fn written_off(&mut self, connection: u64, bytes: usize) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.unanswered = known.unanswered.saturating_sub(bytes);
        }
    }

    /// Frames have their receipt.
    pub(super) fn answered(&mut self, connection: u64, bytes: usize, now: Instant) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.unanswered = known.unanswered.saturating_sub(bytes);
            known.heard_at = now;
            known.pinged_at = None;
        }
    }

    /// Connections that have had no receipt for so long although one is due, and are to be asked for a sign of life.
    pub(super) fn newly_silent(&mut self, now: Instant, patience: Duration) -> Vec<u64> {
        let mut silent = Vec::new();
        if self.are_held {
            return silent;
        }
        for (&connection, known) in &mut self.known {
            if known.unanswered > 0
                && known.pinged_at.is_none()
                && now.saturating_duration_since(known.heard_at) >= patience
            {
                known.pinged_at = Some(now);
                silent.push(connection);
            }
        }
        silent
    }

    /// Those that gave none for so long.
    pub(super) fn stalled(&self, now: Instant, patience: Duration) -> Vec<u64> {
        let is_stalled = |known: &Known| {
            let is_due = known.unanswered > 0 && !self.are_held;
            let pinged_at = known.pinged_at.filter(|_| is_due);
            pinged_at.is_some_and(|at| now.saturating_duration_since(at) >= patience)
        };
        let stalled = self.known.iter().filter(|(_, known)| is_stalled(known));
        stalled.map(|(&connection, _)| connection).collect()
    }

    /// It gave one.
    pub(super) fn alive(&mut self, connection: u64, now: Instant) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.heard_at = now;
            known.read_until = known.pinged_at.take().or(known.read_until);
        }
    }

    /// What was written before that has been read.
    pub(super) fn read_until(&self, connection: u64) -> Option<Instant> {
        self.known.get(&connection)?.read_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(3);

    #[test]
    fn a_connection_is_not_silent_while_nothing_is_written_to_it() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut connections = Connections::default();
        let link = Link {
            connection: 1,
            max_message_bytes: 1000,
        };
        connections.add(link, start);
        // What is handed to it waits there, also for longer than a broker has for an answer, and for a second one.
        connections.hold(true, at(1));
        connections.wrote(1, 100, at(1));
        assert!(connections.newly_silent(at(5), PATIENCE).is_empty());
        // From the moment on at which it is written the broker has its time.
        connections.hold(false, at(8));
        assert!(connections.newly_silent(at(9), PATIENCE).is_empty());
        assert_eq!(connections.newly_silent(at(11), PATIENCE), [1]);
        // So has it for the sign of life.
        connections.hold(true, at(12));
        assert!(connections.stalled(at(15), PATIENCE).is_empty());
        connections.hold(false, at(20));
        assert!(connections.stalled(at(20), PATIENCE).is_empty());
        assert_eq!(connections.newly_silent(at(23), PATIENCE), [1]);
        connections.hold(false, at(24));
        assert_eq!(connections.stalled(at(26), PATIENCE), [1]);
    }
}
