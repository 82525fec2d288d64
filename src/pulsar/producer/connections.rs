//! What the producer knows of the connections to brokers.
//!
//! A broker that throttles one topic stops reading the whole connection, so what is written there holds up every topic on it. Therefore
//! the bytes that are written to a connection and have no answer are bounded, and lanes wait in line for room. A connection that stays
//! silent although it was written to is asked for a sign of life; a broker that gives none does not read it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::effects::Link;

/// Frames without receipt on one connection: what a broker stores in some milliseconds at full speed.
const MAX_UNANSWERED_BYTES: usize = 8 * 1024 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Connections {
    known: HashMap<u64, Known>,
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
    /// Producers whose lanes wait for room.
    waiting: VecDeque<u64>,
}

impl Connections {
    /// A connection is there.
    pub(super) fn add(&mut self, link: Link, now: Instant) {
        self.known.entry(link.connection).or_insert(Known {
            max_message_bytes: link.max_message_bytes,
            unanswered: 0,
            heard_at: now,
            pinged_at: None,
            waiting: VecDeque::new(),
        });
    }

    /// It has ended.
    pub(super) fn remove(&mut self, connection: u64) {
        self.known.remove(&connection);
    }

    pub(super) fn is_known(&self, connection: u64) -> bool {
        self.known.contains_key(&connection)
    }

    /// The largest entry that its broker takes.
    pub(super) fn max_message_bytes(&self, connection: u64) -> usize {
        let known = self.known.get(&connection);
        known.map_or(usize::MAX, |known| known.max_message_bytes)
    }

    pub(super) fn has_room(&self, connection: u64) -> bool {
        let known = self.known.get(&connection);
        known.is_none_or(|known| known.unanswered < MAX_UNANSWERED_BYTES)
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
            let pinged_at = known.pinged_at.filter(|_| known.unanswered > 0);
            pinged_at.is_some_and(|at| now.saturating_duration_since(at) >= patience)
        };
        let stalled = self.known.iter().filter(|(_, known)| is_stalled(known));
        stalled.map(|(&connection, _)| connection).collect()
    }

    /// It gave one.
    pub(super) fn alive(&mut self, connection: u64, now: Instant) {
        if let Some(known) = self.known.get_mut(&connection) {
            known.heard_at = now;
            known.pinged_at = None;
        }
    }
}
