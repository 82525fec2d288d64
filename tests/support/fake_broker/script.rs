//! What a test orders about single commands of clients, and what it is told of them afterwards.

use std::collections::{HashMap, VecDeque};

use pulsar::message::proto::{BaseCommand, ServerError, base_command::Type};

/// A kind of command that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Asked {
    Connect,
    AuthResponse,
    Partitions,
    Lookup,
    Producer,
    CloseProducer,
    Send,
    Ping,
    Pong,
}

impl Asked {
    /// The kind of a command; none for what these brokers do not expect.
    pub(super) fn of(command: &BaseCommand) -> Option<Self> {
        Some(match Type::try_from(command.r#type).ok()? {
            Type::Connect => Self::Connect,
            Type::AuthResponse => Self::AuthResponse,
            Type::PartitionedMetadata => Self::Partitions,
            Type::Lookup => Self::Lookup,
            Type::Producer => Self::Producer,
            Type::CloseProducer => Self::CloseProducer,
            Type::Send => Self::Send,
            Type::Ping => Self::Ping,
            Type::Pong => Self::Pong,
            _ => return None,
        })
    }
}

/// Where a lookup is answered to.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) url: String,
    /// Ask there again, instead of: the topic is there.
    pub(crate) redirect: bool,
    pub(crate) authoritative: bool,
    pub(crate) through_service_url: bool,
}

/// What is done about one command.
#[derive(Clone, Debug)]
pub(crate) enum Reaction {
    /// What a healthy broker does.
    Obey,
    /// Refused, in the form that belongs to the command; nothing is stored, and nothing else changes.
    Fail(ServerError),
    /// The answer to a lookup.
    LookAt(Target),
    /// A producer must wait its turn: "not ready" now, "ready" at [`FakeBroker::release`](super::FakeBroker::release).
    NotReady,
    /// Obeyed; the answer waits for [`FakeBroker::release`](super::FakeBroker::release).
    Hold,
    /// Obeyed; the answer never comes.
    Lose,
    /// Neither obeyed nor answered.
    Ignore,
    /// A send is handed to storage, and neither succeeds nor fails before [`FakeBroker::settle`](super::FakeBroker::settle).
    Pend,
    /// A send is handed to storage, and its write fails at once (`PersistentTopic.addFailed`).
    FailWrite,
    /// The authorization of a producer's creation does not come to an end before
    /// [`FakeBroker::resume`](super::FakeBroker::resume); the broker knows nothing of the producer until then.
    StallAuthorization,
    /// The loading of a producer's topic does not come to an end before
    /// [`FakeBroker::resume`](super::FakeBroker::resume); the producer's id is taken meanwhile.
    StallLoading,
    /// The connection ends, and the command was not obeyed.
    Close,
    /// Obeyed, and the connection ends in place of the answer.
    ObeyAndClose,
    /// Obeyed, and the connection ends in the middle of the answer.
    CutShort,
    /// These bytes in place of the answer.
    Say(Vec<u8>),
    /// `AUTH_CHALLENGE` in place of CONNECTED.
    Challenge,
}

type Decide = Box<dyn FnMut(Asked, &BaseCommand) -> Reaction + Send>;

/// One broker's script, and the commands that it got.
#[derive(Default)]
pub(super) struct Script {
    next: HashMap<Asked, VecDeque<Reaction>>,
    rest: Option<Decide>,
    pub(super) seen: Vec<BaseCommand>,
    pub(super) frames: Vec<Vec<u8>>,
}

impl Script {
    pub(super) fn add(&mut self, asked: Asked, reactions: impl IntoIterator<Item = Reaction>) {
        self.next.entry(asked).or_default().extend(reactions);
    }

    pub(super) fn set_rest(&mut self, decide: Decide) {
        self.rest = Some(decide);
    }

    pub(super) fn clear(&mut self) {
        self.rest = None;
        self.next.clear();
    }

    pub(super) fn forget(&mut self) {
        self.seen.clear();
        self.frames.clear();
    }

    /// Notes a command and says what is done about it.
    pub(super) fn react(&mut self, asked: Asked, command: &BaseCommand) -> Reaction {
        self.seen.push(command.clone());
        let next = self.next.get_mut(&asked).and_then(VecDeque::pop_front);
        next.unwrap_or_else(|| match &mut self.rest {
            Some(decide) => decide(asked, command),
            None => Reaction::Obey,
        })
    }
}
