//! Where an answer goes to, and when: at once, later, never, or in part.

use std::time::Duration;

use super::commands;

/// A connection of the cluster.
pub(super) type ConnectionId = u64;

/// What becomes of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Say,
    /// It waits until the test releases it.
    Hold,
    /// It is never said.
    Lose,
    /// Half of it is said.
    Cut,
    /// A producer's creation is answered with "not ready", and the true answer waits.
    NotReady,
}

/// Who is to be answered, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asking {
    pub(super) connection: ConnectionId,
    /// 0 for a command that has none.
    pub(super) request_id: u64,
    pub(super) then: Then,
}

/// An answer that waits for the test.
#[derive(Debug)]
pub(crate) struct Held {
    pub(super) connection: ConnectionId,
    /// The producer whose send it answers.
    pub(super) incarnation: Option<u64>,
    pub(super) bytes: Vec<u8>,
}

/// What the machine asks of the world around it.
#[derive(Debug)]
pub(super) enum Output {
    Say(ConnectionId, Vec<u8>),
    /// The connection ends, after all that was said on it.
    Close(ConnectionId),
    /// The connection is read again.
    Read(ConnectionId),
    /// [`Cluster::alarm`](super::model::Cluster::alarm) is to be called after this time.
    Alarm(Duration, Alarm),
}

/// A time that has passed.
#[derive(Clone, Debug)]
pub(super) enum Alarm {
    /// A connection that was pinged has had its time to say something.
    Liveness(ConnectionId),
    /// A topic's period of publishing is over.
    Period(String),
}

/// Answers that are ready, in order, and those that wait.
#[derive(Default)]
pub(super) struct Answers {
    out: Vec<Output>,
    held: Vec<Held>,
}

impl Answers {
    pub(super) fn push(&mut self, output: Output) {
        self.out.push(output);
    }

    pub(super) fn say(&mut self, connection: ConnectionId, bytes: Vec<u8>) {
        self.push(Output::Say(connection, bytes));
    }

    /// Answers a request.
    pub(super) fn answer(&mut self, to: Asking, bytes: Vec<u8>) {
        self.answer_for(to, None, bytes);
    }

    /// Answers a send of a producer.
    pub(super) fn answer_for(&mut self, to: Asking, incarnation: Option<u64>, mut bytes: Vec<u8>) {
        match to.then {
            Then::Say => {}
            Then::Lose => return,
            Then::Cut => bytes.truncate(bytes.len() / 2),
            Then::Hold | Then::NotReady => {
                if to.then == Then::NotReady {
                    let waiting = commands::producer_success(to.request_id, "waiting", None, false);
                    self.say(to.connection, waiting);
                }
                return self.held.push(Held {
                    connection: to.connection,
                    incarnation,
                    bytes,
                });
            }
        }
        self.say(to.connection, bytes);
    }

    /// Answers of a producer's sends that wait.
    pub(super) fn held_of(&self, incarnation: u64) -> usize {
        let held = self.held.iter();
        held.filter(|held| held.incarnation == Some(incarnation))
            .count()
    }

    /// Says what waits, in the order that `order` gives it.
    pub(super) fn release(&mut self, order: impl FnOnce(&mut Vec<Held>)) {
        let mut held = std::mem::take(&mut self.held);
        order(&mut held);
        for held in held {
            self.say(held.connection, held.bytes);
        }
    }

    /// Says the oldest that waits; false when there is none.
    pub(super) fn release_one(&mut self) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let held = self.held.remove(0);
        self.say(held.connection, held.bytes);
        true
    }

    /// Forgets what waits for a connection that has ended.
    pub(super) fn forget(&mut self, connection: ConnectionId) {
        self.held.retain(|held| held.connection != connection);
    }

    pub(super) fn take(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }
}
