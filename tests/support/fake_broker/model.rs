//! The brokers of one cluster as a state machine: frames of clients, orders of a test and alarms go in, [`Output`]s come out.
//!
//! No socket, no clock and no task is in here, nor is anything left to chance: the same inputs give the same outputs. What
//! each part does is read from the sources of Pulsar 4.0.8, and names the method. `producers` creates and closes producers,
//! `sends` takes what they publish, `orders` is what a test may do to topics, `topics` is what they hold.
//!
//! Every broker of the cluster serves every topic. What a real broker does on several threads happens here at once and in the
//! order that it has there; what may take its time there (authorization, the loading of a topic, a write) waits for an order
//! if the test says so. Left out: the 30 s after which a broker forgets that it has closed a producer.

use std::collections::{BTreeMap, BTreeSet};

use prost::Message as _;
use pulsar::message::proto::{BaseCommand, ServerError};

use super::super::wire::sized;
use super::answers::{Alarm, Answers, Asking, ConnectionId, Output, Then};
use super::producers::{Creation, Slot, Stall};
use super::script::{Asked, Reaction, Script, Target};
use super::topics::{Topics, wrong_name};
use super::{commands, sends};

/// Pulsar's default `maxMessageSize`.
const MAX_MESSAGE_BYTES: i32 = 5 * 1024 * 1024;
/// What a frame may have on top of that (`Commands.MESSAGE_SIZE_FRAME_PADDING`).
const FRAME_PADDING_BYTES: usize = 10 * 1024;

/// One broker.
#[derive(Default)]
pub(super) struct Broker {
    pub(super) url: String,
    pub(super) max_message_bytes: Option<i32>,
    pub(super) script: Script,
    pub(super) accepted: u64,
}

impl Broker {
    pub(super) fn limit(&self) -> usize {
        let limit = self.max_message_bytes.unwrap_or(MAX_MESSAGE_BYTES);
        usize::try_from(limit).unwrap_or(0)
    }
}

/// One connection.
pub(super) struct Connection {
    pub(super) broker: usize,
    /// It was told CONNECTED.
    greeted: bool,
    /// What the client announced.
    pub(super) protocol_version: i32,
    pub(super) producers: BTreeMap<u64, Slot>,
    /// Producers that the broker closed: what they send is dropped (`recentlyClosedProducers`).
    pub(super) closed: BTreeSet<u64>,
    /// Producers that the broker closed without a word: no fault of the client's.
    pub(super) fenced_out: BTreeSet<u64>,
    /// Creations under a name that is open here, until it is known whether the connection lives.
    pub(super) checks: Vec<Creation>,
    /// Topics whose publish rate keeps the connection from being read.
    pub(super) throttled_by: BTreeSet<String>,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Cluster {
    pub(super) brokers: Vec<Broker>,
    pub(super) topics: Topics,
    pub(super) connections: BTreeMap<ConnectionId, Connection>,
    pub(super) answers: Answers,
    pub(super) stalled: Vec<(Stall, Creation)>,
    /// Producers whose clients wait for the end of a close.
    pub(super) closing: Vec<(ConnectionId, u64)>,
    /// What no client may do.
    pub(super) faults: Vec<String>,
    next_connection: ConnectionId,
    next_incarnation: u64,
}

impl Cluster {
    pub(super) fn add_broker(&mut self, url: String) -> usize {
        self.brokers.push(Broker {
            url,
            ..Broker::default()
        });
        self.brokers.len() - 1
    }

    /// A client has connected to a broker.
    pub(super) fn accept(&mut self, broker: usize) -> ConnectionId {
        self.next_connection += 1;
        self.brokers[broker].accepted += 1;
        let connection = Connection {
            broker,
            greeted: false,
            protocol_version: 0,
            producers: BTreeMap::new(),
            closed: BTreeSet::new(),
            fenced_out: BTreeSet::new(),
            checks: Vec::new(),
            throttled_by: BTreeSet::new(),
        };
        self.connections.insert(self.next_connection, connection);
        self.next_connection
    }

    /// The other end has closed a connection, or this one does: its producers are closed at once, and who waited for their
    /// names gets them (`ServerCnx.channelInactive`).
    pub(super) fn gone(&mut self, connection: ConnectionId) {
        let Some(gone) = self.connections.remove(&connection) else {
            return;
        };
        self.answers.forget(connection);
        self.stalled.retain(|(_, c)| c.to.connection != connection);
        for other in self.connections.values_mut() {
            other.checks.retain(|c| c.to.connection != connection);
        }
        self.answers.push(Output::Close(connection));
        for creation in gone.checks {
            self.create(creation);
        }
    }

    /// Whether a connection is read now.
    pub(super) fn reads(&self, connection: ConnectionId) -> bool {
        let found = self.connections.get(&connection);
        found.is_none_or(|connection| connection.throttled_by.is_empty())
    }

    /// Whether a frame of this size (behind its first four bytes) is decoded; else the connection ends without a word
    /// (`FrameDecoderUtil`, `ServerCnx.exceptionCaught`).
    pub(super) fn decodes(&mut self, connection: ConnectionId, size: usize) -> bool {
        let Some(found) = self.connections.get(&connection) else {
            return false;
        };
        let limit = self.brokers[found.broker].limit();
        if 4 + size <= limit + FRAME_PADDING_BYTES {
            return true;
        }
        self.faults.push(format!(
            "a frame of {size} bytes where {limit} is the limit"
        ));
        self.gone(connection);
        false
    }

    /// One frame from a client, without its first four bytes.
    pub(super) fn frame(&mut self, connection: ConnectionId, frame: &[u8]) {
        if !self.decodes(connection, frame.len()) {
            return;
        }
        let mut entry = frame;
        let raw = sized(&mut entry).unwrap_or_default();
        let command = BaseCommand::decode(raw);
        let known = command.map(|command| (Asked::of(&command), command));
        let Ok((Some(asked), command)) = known else {
            self.faults.push(format!("not expected: {known:?}"));
            return self.gone(connection);
        };
        let broker = self.connections[&connection].broker;
        let script = &mut self.brokers[broker].script;
        let reaction = script.react(asked, &command);
        if asked == Asked::Send {
            script.frames.push(frame.to_vec());
        }
        self.lives(connection);
        let told = Told {
            connection,
            asked,
            may_create: asked != Asked::Partitions || commands::may_create(raw),
            command,
            entry,
        };
        self.react(&told, reaction);
        self.finish_closes();
    }

    fn react(&mut self, told: &Told<'_>, reaction: Reaction) {
        let connection = told.connection;
        let obeyed = |then| (told.to(then), None);
        let (to, special) = match reaction {
            Reaction::Ignore => return,
            Reaction::Close => return self.gone(connection),
            Reaction::Say(bytes) => return self.answers.say(connection, bytes),
            Reaction::Challenge => {
                return self.answers.say(connection, commands::auth_challenge());
            }
            Reaction::LookAt(target) => {
                let found = commands::found(told.request_id(), &target);
                return self.answers.say(connection, found);
            }
            Reaction::Fail(error) if told.asked == Asked::Send => {
                (told.to(Then::Say), Some(Special::Refuse(error)))
            }
            Reaction::Fail(error) => {
                let to = told.to(Then::Say);
                return self.refuse(told.asked, to, error, &commands::reason(error));
            }
            Reaction::Obey => obeyed(Then::Say),
            Reaction::NotReady => obeyed(Then::NotReady),
            Reaction::Hold => obeyed(Then::Hold),
            Reaction::Lose | Reaction::ObeyAndClose => obeyed(Then::Lose),
            Reaction::CutShort => obeyed(Then::Cut),
            Reaction::Pend => (told.to(Then::Say), Some(Special::Pend)),
            Reaction::FailWrite => (told.to(Then::Say), Some(Special::FailWrite)),
            Reaction::StallAuthorization => (
                told.to(Then::Say),
                Some(Special::Stall(Stall::Authorization)),
            ),
            Reaction::StallLoading => (told.to(Then::Say), Some(Special::Stall(Stall::Loading))),
        };
        self.obey(told, to, special);
        if matches!(reaction, Reaction::ObeyAndClose | Reaction::CutShort) {
            self.gone(connection);
        }
    }

    /// Does what a healthy broker does, but for what is special about it.
    fn obey(&mut self, told: &Told<'_>, to: Asking, special: Option<Special>) {
        let command = &told.command;
        match told.asked {
            Asked::Connect | Asked::AuthResponse => self.greet(command, to),
            Asked::Partitions => self.partitions(told, to),
            Asked::Lookup => self.lookup(command, to),
            Asked::Producer => {
                if let Some(asked) = command.producer.clone() {
                    let stall = match special {
                        Some(Special::Stall(stall)) => Some(stall),
                        _ => None,
                    };
                    self.producer(asked, to, stall);
                }
            }
            Asked::CloseProducer => {
                if let Some(asked) = &command.close_producer {
                    self.close_producer(asked.producer_id, to);
                }
            }
            Asked::Send => {
                if let Some(send) = &command.send {
                    let sent = sends::Sent {
                        send,
                        entry: told.entry,
                        special,
                    };
                    self.send(&sent, to);
                }
            }
            Asked::Ping => self.answers.answer(to, commands::pong()),
            Asked::Pong => {}
        }
    }

    fn greet(&mut self, command: &BaseCommand, to: Asking) {
        let Some(connection) = self.connections.get_mut(&to.connection) else {
            return;
        };
        if let Some(connect) = &command.connect {
            connection.protocol_version = connect.protocol_version();
        }
        // The response to a challenge in mid-connection has no answer.
        if !std::mem::replace(&mut connection.greeted, true) {
            let limit = self.brokers[connection.broker].max_message_bytes;
            self.answers.answer(to, commands::connected(limit));
        }
    }

    /// `ServerCnx.handlePartitionMetadataRequest`.
    fn partitions(&mut self, told: &Told<'_>, to: Asking) {
        let asked = told.command.partition_metadata.as_ref();
        let topic = asked.map(|asked| asked.topic.as_str()).unwrap_or_default();
        if let Some(text) = wrong_name(topic) {
            return self.refuse(told.asked, to, ServerError::InvalidTopicName, &text);
        }
        let count = self.topics.count_partitions(topic, told.may_create);
        let Some(count) = count else {
            return self.refuse(told.asked, to, ServerError::TopicNotFound, "");
        };
        let answer = commands::partitions(to.request_id, count);
        self.answers.answer(to, answer);
    }

    /// `ServerCnx.handleLookup`: nobody asks whether the topic exists.
    fn lookup(&mut self, command: &BaseCommand, to: Asking) {
        let asked = command.lookup_topic.as_ref();
        let topic = asked.map(|asked| asked.topic.as_str()).unwrap_or_default();
        if let Some(text) = wrong_name(topic) {
            return self.refuse(Asked::Lookup, to, ServerError::InvalidTopicName, &text);
        }
        let here = Target {
            url: self.brokers[self.connections[&to.connection].broker]
                .url
                .clone(),
            redirect: false,
            authoritative: true,
            through_service_url: false,
        };
        let found = commands::found(to.request_id, &here);
        self.answers.answer(to, found);
    }

    /// Refuses a request.
    pub(super) fn refuse(&mut self, asked: Asked, to: Asking, error: ServerError, text: &str) {
        let refusal = commands::refusal(asked, to.request_id, error, text);
        self.answers.answer(to, refusal);
    }

    pub(super) fn new_incarnation(&mut self) -> u64 {
        self.next_incarnation += 1;
        self.next_incarnation
    }

    /// A time has passed.
    pub(super) fn alarm(&mut self, alarm: &Alarm) {
        match alarm {
            // It has said nothing: it is taken for dead (`ServerCnx.checkConnectionLiveness`).
            Alarm::Liveness(connection) => {
                let checked = self.connections.get(connection);
                if checked.is_some_and(|checked| !checked.checks.is_empty()) {
                    self.gone(*connection);
                }
            }
            Alarm::Period(topic) => self.period_is_over(topic),
        }
        self.finish_closes();
    }

    pub(super) fn take_outputs(&mut self) -> Vec<Output> {
        self.answers.take()
    }
}

/// One command of a client, and the entry behind it.
struct Told<'a> {
    connection: ConnectionId,
    asked: Asked,
    /// The question for partitions may make the topic.
    may_create: bool,
    command: BaseCommand,
    entry: &'a [u8],
}

impl Told<'_> {
    fn request_id(&self) -> u64 {
        let command = &self.command;
        let partitions = command.partition_metadata.as_ref().map(|c| c.request_id);
        let lookup = command.lookup_topic.as_ref().map(|c| c.request_id);
        let producer = command.producer.as_ref().map(|c| c.request_id);
        let close = command.close_producer.as_ref().map(|c| c.request_id);
        let id = partitions.or(lookup).or(producer).or(close);
        id.unwrap_or(commands::UNASKED)
    }

    fn to(&self, then: Then) -> Asking {
        Asking {
            connection: self.connection,
            request_id: self.request_id(),
            then,
        }
    }
}

/// What is special about how a command is obeyed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Special {
    Refuse(ServerError),
    Pend,
    FailWrite,
    Stall(Stall),
}
