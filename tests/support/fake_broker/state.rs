//! The broker behind [`FakeBroker`](super::FakeBroker): what it knows, and what it does about one command.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use prost::Message as _;
use pulsar::message::proto::{BaseCommand, MessageIdData, ServerError, base_command::Type};
use tokio::sync::mpsc;

use super::super::wire::{parse_entry, sized};
use super::storage::{Outcome, Storage};
use super::{Asked, Reaction, Target, commands};

/// Pulsar's default `maxMessageSize`.
const MAX_MESSAGE_BYTES: i32 = 5 * 1024 * 1024;

/// An open producer.
pub(super) struct Open {
    topic: String,
    name: String,
    last_sequence_id: Option<u64>,
    /// Every send is refused with this, because one was.
    refusing: Option<ServerError>,
}

type Decide = Box<dyn FnMut(Asked, &BaseCommand) -> Reaction + Send>;

#[derive(Default)]
pub(super) struct State {
    pub(super) url: String,
    pub(super) max_message_bytes: Option<i32>,
    pub(super) storage: Arc<Mutex<Storage>>,
    pub(super) script: HashMap<Asked, VecDeque<Reaction>>,
    pub(super) rest: Option<Decide>,
    pub(super) accepted: u64,
    /// What is dropped from here is closed, after everything said to it before.
    pub(super) connections: BTreeMap<u64, mpsc::UnboundedSender<Vec<u8>>>,
    /// By connection and producer id.
    pub(super) producers: BTreeMap<(u64, u64), Open>,
    pub(super) closed: HashSet<(u64, u64)>,
    /// Connections that were told CONNECTED.
    pub(super) greeted: HashSet<u64>,
    pub(super) held: Vec<(u64, Vec<u8>)>,
    pub(super) seen: Vec<BaseCommand>,
    pub(super) frames: Vec<Vec<u8>>,
    pub(super) faults: Vec<String>,
}

pub(super) fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("nothing panics under the lock")
}

impl State {
    pub(super) fn accept(&mut self, say: mpsc::UnboundedSender<Vec<u8>>) -> u64 {
        self.accepted += 1;
        self.connections.insert(self.accepted, say);
        self.accepted
    }

    pub(super) fn gone(&mut self, connection: u64) {
        self.connections.remove(&connection);
        self.producers.retain(|&(on, _), _| on != connection);
        self.held.retain(|&(on, _)| on != connection);
    }

    pub(super) fn say(&self, connection: u64, bytes: Vec<u8>) {
        if let Some(say) = self.connections.get(&connection) {
            let _ended = say.send(bytes);
        }
    }

    pub(super) fn storage<T>(&self, with: impl FnOnce(&mut Storage) -> T) -> T {
        with(&mut self.storage.lock().expect("nothing panics under the lock"))
    }

    /// One frame from a client; false when its connection has ended.
    pub(super) fn frame(&mut self, connection: u64, frame: &[u8]) -> bool {
        if !self.connections.contains_key(&connection) {
            return false;
        }
        let mut rest = frame;
        let command = sized(&mut rest).and_then(|c| BaseCommand::decode(c).map_err(Into::into));
        let known = command.map(|command| (kind(&command), command));
        let Ok((Some(asked), command)) = known else {
            self.faults.push(format!("not expected: {known:?}"));
            return false;
        };
        self.seen.push(command.clone());
        let scripted = self.script.get_mut(&asked).and_then(VecDeque::pop_front);
        let reaction = scripted.unwrap_or_else(|| match &mut self.rest {
            Some(decide) => decide(asked, &command),
            None => Reaction::Obey,
        });
        let who = Command {
            connection,
            asked,
            said: command,
            entry: rest,
        };
        if asked == Asked::Send {
            self.frames.push(frame.to_vec());
        }
        self.react(&who, reaction);
        true
    }

    fn react(&mut self, who: &Command<'_>, reaction: Reaction) {
        let connection = who.connection;
        match reaction {
            Reaction::Ignore => {}
            Reaction::Close => self.gone(connection),
            Reaction::Say(bytes) => self.say(connection, bytes),
            Reaction::Challenge => self.say(connection, commands::auth_challenge()),
            Reaction::LookAt(target) => {
                let id = who.request_id().unwrap_or_default();
                self.say(connection, commands::found(id, &target));
            }
            Reaction::Fail(error) => self.refuse(who, error),
            Reaction::NotReady => {
                if let Some(ready) = self.obey(who, true) {
                    let id = who.request_id().unwrap_or_default();
                    self.say(
                        connection,
                        commands::producer_success(id, "waiting", None, false),
                    );
                    self.held.push((connection, ready));
                }
            }
            Reaction::Obey => {
                if let Some(answer) = self.obey(who, true) {
                    self.say(connection, answer);
                }
            }
            Reaction::Hold => {
                if let Some(answer) = self.obey(who, true) {
                    self.held.push((connection, answer));
                }
            }
            Reaction::Lose => {
                let _lost = self.obey(who, true);
            }
            Reaction::Pend => {
                let _not_yet = self.obey(who, false);
            }
            Reaction::ObeyAndClose => {
                let _lost = self.obey(who, true);
                self.gone(connection);
            }
            Reaction::CutShort => {
                if let Some(mut answer) = self.obey(who, true) {
                    answer.truncate(answer.len() / 2);
                    self.say(connection, answer);
                }
                self.gone(connection);
            }
        }
    }

    fn refuse(&mut self, who: &Command<'_>, error: ServerError) {
        let Some(send) = &who.said.send else {
            let refusal = commands::refusal(who.asked, who.request_id(), error);
            return self.say(who.connection, refusal);
        };
        let producer_id = send.producer_id;
        let highest = send.highest_sequence_id.unwrap_or(send.sequence_id);
        let Some(producer) = self.producers.get_mut(&(who.connection, producer_id)) else {
            return;
        };
        // A frame with a wrong checksum, or one that is not allowed, is no trouble of the topic's.
        if !matches!(
            error,
            ServerError::ChecksumError | ServerError::NotAllowedError
        ) {
            producer.refusing = Some(error);
        }
        self.say(
            who.connection,
            commands::send_error(producer_id, highest, error),
        );
    }

    /// Does what a healthy broker does and returns its answer.
    fn obey(&mut self, who: &Command<'_>, at_once: bool) -> Option<Vec<u8>> {
        let request_id = who.request_id().unwrap_or_default();
        match who.asked {
            Asked::Connect | Asked::AuthResponse => {
                // The response to a challenge in mid-connection has no answer.
                let first = self.greeted.insert(who.connection);
                first.then(|| commands::connected(self.max_message_bytes))
            }
            Asked::Partitions => Some(commands::partitions(request_id, 0)),
            Asked::Lookup => {
                let here = Target {
                    url: self.url.clone(),
                    redirect: false,
                    authoritative: true,
                    through_service_url: false,
                };
                Some(commands::found(request_id, &here))
            }
            Asked::Producer => Some(self.open(who, request_id)),
            Asked::CloseProducer => {
                let closed = who.said.close_producer.as_ref()?;
                let producer = (who.connection, closed.producer_id);
                self.producers.remove(&producer);
                Some(commands::success(request_id))
            }
            Asked::Send => self.send(who, at_once),
            Asked::Ping => Some(commands::pong()),
            Asked::Pong => None,
        }
    }

    /// A name may be open once: while another connection has it the answer is `ProducerBusy`, and that connection, which a
    /// real broker would ping, is taken for dead. To a connection that has a producer with this id it says that one's name and
    /// no sequence id, as `ServerCnx.handleProducer`.
    fn open(&mut self, who: &Command<'_>, request_id: u64) -> Vec<u8> {
        let asked = who.said.producer.clone().unwrap_or_default();
        let name = asked.producer_name.unwrap_or_default();
        let place = (who.connection, asked.producer_id);
        if let Some(open) = self.producers.get(&place) {
            return commands::producer_success(request_id, &open.name, None, true);
        }
        let other = self
            .producers
            .iter()
            .find(|(at, open)| **at != place && open.name == name && open.topic == asked.topic);
        if let Some((&(connection, _), _)) = other {
            self.gone(connection);
            return commands::refusal(who.asked, Some(request_id), ServerError::ProducerBusy);
        }
        let pushed = self.storage(|storage| storage.last_pushed(&asked.topic, &name));
        let answer = commands::producer_success(request_id, &name, pushed, true);
        self.closed.remove(&place);
        self.producers.insert(
            place,
            Open {
                topic: asked.topic,
                name,
                last_sequence_id: None,
                refusing: None,
            },
        );
        answer
    }

    fn send(&mut self, who: &Command<'_>, at_once: bool) -> Option<Vec<u8>> {
        let send = who.said.send.as_ref()?;
        let place = (who.connection, send.producer_id);
        let Some(producer) = self.producers.get_mut(&place) else {
            if !self.closed.contains(&place) {
                self.faults
                    .push(format!("a send to a producer that never was: {send:?}"));
            }
            return None;
        };
        let lowest = send.sequence_id;
        let highest = send.highest_sequence_id.unwrap_or(lowest);
        if producer.last_sequence_id >= Some(lowest) {
            self.faults.push(format!(
                "sequence ids of {} fall at {lowest}",
                producer.name
            ));
        }
        producer.last_sequence_id = Some(highest);
        if let Some(error) = producer.refusing {
            return Some(commands::send_error(send.producer_id, highest, error));
        }
        let (topic, name) = (producer.topic.clone(), producer.name.clone());
        let limit = self.max_message_bytes.unwrap_or(MAX_MESSAGE_BYTES);
        let entry = match parse_entry(MessageIdData::default(), who.entry) {
            Ok(entry) => entry,
            Err(error) => {
                self.faults.push(error.to_string());
                return None;
            }
        };
        let metadata = &entry.metadata;
        let said = (
            metadata.sequence_id,
            metadata.highest_sequence_id.unwrap_or(metadata.sequence_id),
        );
        if said != (lowest, highest) || metadata.producer_name != name {
            self.faults.push(format!(
                "command and metadata differ: {send:?}, {metadata:?}"
            ));
        }
        // Magic and checksum are no part of what is stored.
        if who.entry.len() > usize::try_from(limit).unwrap_or(0) + 6 {
            self.faults
                .push(format!("{} bytes are too many", who.entry.len()));
        }
        let outcome = self.storage(|storage| storage.push(&topic, &entry, at_once));
        let ids = (lowest, highest);
        Some(match outcome {
            Outcome::Stored(number) => commands::receipt(send.producer_id, ids, Some(number)),
            Outcome::Duplicate => commands::receipt(send.producer_id, ids, None),
            Outcome::Unknown => {
                commands::send_error(send.producer_id, highest, ServerError::PersistenceError)
            }
        })
    }
}

/// One command of a client, and the entry behind it.
struct Command<'a> {
    connection: u64,
    asked: Asked,
    said: BaseCommand,
    entry: &'a [u8],
}

impl Command<'_> {
    fn request_id(&self) -> Option<u64> {
        let command = &self.said;
        let partitions = command.partition_metadata.as_ref().map(|c| c.request_id);
        let lookup = command.lookup_topic.as_ref().map(|c| c.request_id);
        let producer = command.producer.as_ref().map(|c| c.request_id);
        let close = command.close_producer.as_ref().map(|c| c.request_id);
        partitions.or(lookup).or(producer).or(close)
    }
}

pub(super) fn kind(command: &BaseCommand) -> Option<Asked> {
    Some(match Type::try_from(command.r#type).ok()? {
        Type::Connect => Asked::Connect,
        Type::AuthResponse => Asked::AuthResponse,
        Type::PartitionedMetadata => Asked::Partitions,
        Type::Lookup => Asked::Lookup,
        Type::Producer => Asked::Producer,
        Type::CloseProducer => Asked::CloseProducer,
        Type::Send => Asked::Send,
        Type::Ping => Asked::Ping,
        Type::Pong => Asked::Pong,
        _ => return None,
    })
}
