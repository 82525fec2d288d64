//! Creating and closing producers.

use pulsar::message::proto::{CommandProducer, ServerError};

use super::answers::{Alarm, Asking, ConnectionId, Output};
use super::commands;
use super::model::Cluster;
use super::script::Asked;
use super::topics::wrong_name;

/// `connectionLivenessCheckTimeoutMillis`.
const LIVENESS_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// The protocol from which on a client understands `TOPIC_MIGRATED`.
const KNOWS_MIGRATION: i32 = 20;

/// Where a creation stays until the test lets it go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stall {
    Authorization,
    Loading,
}

/// A producer that a client asks for.
#[derive(Clone, Debug)]
pub(super) struct Creation {
    pub(super) to: Asking,
    producer_id: u64,
    incarnation: u64,
    topic: String,
    name: String,
    epoch: u64,
    encrypted: bool,
}

/// What a connection knows of a producer's id.
pub(super) enum Slot {
    /// A producer is being created.
    Pending {
        incarnation: u64,
    },
    Open(Producer),
}

impl Slot {
    fn incarnation(&self) -> u64 {
        match self {
            Self::Pending { incarnation } => *incarnation,
            Self::Open(producer) => producer.incarnation,
        }
    }

    fn open(&self) -> Option<&Producer> {
        match self {
            Self::Pending { .. } => None,
            Self::Open(producer) => Some(producer),
        }
    }
}

/// An open producer.
pub(super) struct Producer {
    pub(super) incarnation: u64,
    pub(super) topic: String,
    pub(super) name: String,
    pub(super) last_sequence_id: Option<u64>,
    epoch: u64,
    /// Who waits until it is closed; it takes nothing meanwhile.
    pub(super) closing: Vec<Asking>,
}

/// Why a producer is not created.
enum Refusal {
    Error(ServerError, String),
    /// `CLOSE_PRODUCER` is the only answer.
    Migrated(String),
    /// Another connection has the name; it must be asked whether it lives.
    Check(ConnectionId),
}

fn error<T>(code: ServerError, text: String) -> Result<T, Refusal> {
    Err(Refusal::Error(code, text))
}

impl Cluster {
    /// `ServerCnx.handleProducer`. The id is taken only when the client is known to be authorized.
    pub(super) fn producer(&mut self, asked: CommandProducer, to: Asking, stall: Option<Stall>) {
        if let Some(text) = wrong_name(&asked.topic) {
            return self.refuse(Asked::Producer, to, ServerError::InvalidTopicName, &text);
        }
        let creation = Creation {
            to,
            producer_id: asked.producer_id,
            incarnation: self.new_incarnation(),
            name: asked.producer_name.clone().unwrap_or_default(),
            epoch: asked.epoch(),
            encrypted: asked.encrypted(),
            topic: asked.topic,
        };
        if stall == Some(Stall::Authorization) {
            self.stalled.push((Stall::Authorization, creation));
        } else {
            self.register(creation, stall.is_some());
        }
    }

    /// Takes the producer's id. To a connection that has a producer of this id the answer is that one's name, and no sequence
    /// id; a second request while the first is not answered is refused.
    fn register(&mut self, creation: Creation, loading: bool) {
        let to = creation.to;
        let Some(connection) = self.connections.get_mut(&to.connection) else {
            return;
        };
        match connection.producers.get(&creation.producer_id) {
            Some(Slot::Open(open)) => {
                let answer = commands::producer_success(to.request_id, &open.name, None, true);
                return self.answers.answer(to, answer);
            }
            Some(Slot::Pending { .. }) => {
                let text = "Producer is already present on the connection";
                return self.refuse(Asked::Producer, to, ServerError::ServiceNotReady, text);
            }
            None => {}
        }
        let pending = Slot::Pending {
            incarnation: creation.incarnation,
        };
        connection.producers.insert(creation.producer_id, pending);
        if loading {
            self.stalled.push((Stall::Loading, creation));
        } else {
            self.create(creation);
        }
    }

    /// Lets the creations go on that a script has stalled.
    pub(super) fn resume(&mut self) {
        for (stall, creation) in std::mem::take(&mut self.stalled) {
            match stall {
                Stall::Authorization => self.register(creation, false),
                Stall::Loading => self.create(creation),
            }
        }
    }

    /// Adds the producer to its topic and answers (`ServerCnx.buildProducerAndAddTopic`). A creation whose id was closed
    /// meanwhile ends here without a word.
    pub(super) fn create(&mut self, creation: Creation) {
        let to = creation.to;
        let id = creation.producer_id;
        let slots = self.connections.get(&to.connection).map(|c| &c.producers);
        let slot = slots.and_then(|slots| slots.get(&id));
        if slot.is_none_or(|slot| slot.incarnation() != creation.incarnation) {
            return;
        }
        match self.admit(&creation) {
            Ok(()) => self.admitted(creation),
            Err(Refusal::Error(code, text)) => {
                if let Some(connection) = self.connections.get_mut(&to.connection) {
                    connection.producers.remove(&id);
                }
                self.refuse(Asked::Producer, to, code, &text);
            }
            // The id stays taken.
            Err(Refusal::Migrated(url)) => self.tell_migrated(to.connection, id, &url),
            Err(Refusal::Check(connection)) => self.check(connection, creation),
        }
    }

    fn admitted(&mut self, creation: Creation) {
        let (to, id) = (creation.to, creation.producer_id);
        let pushed = self.topics.last_pushed(&creation.topic, &creation.name);
        let answer = commands::producer_success(to.request_id, &creation.name, pushed, true);
        if let Some(connection) = self.connections.get_mut(&to.connection) {
            let producer = Producer {
                incarnation: creation.incarnation,
                topic: creation.topic,
                name: creation.name,
                last_sequence_id: None,
                epoch: creation.epoch,
                closing: Vec::new(),
            };
            connection.producers.insert(id, Slot::Open(producer));
        }
        self.answers.answer(to, answer);
    }

    /// The checks, in their order (`ServerCnx.handleProducer`, `AbstractTopic.addProducer`, `incrementTopicEpochIfNeeded`).
    fn admit(&mut self, creation: &Creation) -> Result<(), Refusal> {
        let topic = &creation.topic;
        self.topics
            .get_or_create(topic)
            .map_err(|(code, text)| Refusal::Error(code, text))?;
        let settings = self.topics.settings(topic);
        if settings
            .max_producers
            .is_some_and(|limit| self.producers_of(topic).len() >= limit)
        {
            let text = format!("Topic '{topic}' reached max producers limit");
            return error(ServerError::ProducerBusy, text);
        }
        if settings.encryption_required && !creation.encrypted {
            let text = format!("Encryption is required in {topic}");
            return error(ServerError::MetadataError, text);
        }
        if let Some(name) = settings.exclusive {
            let text = format!("Topic has an existing exclusive producer: {name}");
            return error(ServerError::ProducerBusy, text);
        }
        if settings.fenced {
            let text = "Topic is temporarily unavailable".to_owned();
            return error(ServerError::ServiceNotReady, text);
        }
        if let Some(url) = settings.migrated_to {
            return Err(Refusal::Migrated(url));
        }
        if settings.terminated {
            let text = "Topic was already terminated".to_owned();
            return error(ServerError::TopicTerminatedError, text);
        }
        self.take_name(creation)
    }

    /// A name is open once for each topic (`AbstractTopic.tryOverwriteOldProducer`).
    fn take_name(&mut self, creation: &Creation) -> Result<(), Refusal> {
        let of_topic = self.producers_of(&creation.topic);
        let has_name = |&(connection, id): &(ConnectionId, u64)| {
            let open = self.open_producer(connection, id);
            open.is_some_and(|open| open.name == creation.name)
        };
        match of_topic.into_iter().find(has_name) {
            None => Ok(()),
            Some((other, _)) if other != creation.to.connection => Err(Refusal::Check(other)),
            Some((_, id)) if id == creation.producer_id && self.is_older(creation, id) => Ok(()),
            Some(_) => error(ServerError::ProducerBusy, taken(creation)),
        }
    }

    fn is_older(&self, creation: &Creation, id: u64) -> bool {
        let open = self.open_producer(creation.to.connection, id);
        open.is_some_and(|open| open.epoch < creation.epoch)
    }

    /// Pings the connection that has the name. Whatever comes from it says that it lives.
    fn check(&mut self, other: ConnectionId, creation: Creation) {
        let Some(checked) = self.connections.get_mut(&other) else {
            return;
        };
        let is_first = checked.checks.is_empty();
        checked.checks.push(creation);
        if is_first {
            self.answers.say(other, commands::ping());
            let alarm = Output::Alarm(LIVENESS_TIMEOUT, Alarm::Liveness(other));
            self.answers.push(alarm);
        }
    }

    /// Something has come from a connection: who wants one of its names is refused.
    pub(super) fn lives(&mut self, connection: ConnectionId) {
        let checked = self.connections.get_mut(&connection);
        let checks = checked.map(|checked| std::mem::take(&mut checked.checks));
        for creation in checks.unwrap_or_default() {
            if let Some(other) = self.connections.get_mut(&creation.to.connection) {
                other.producers.remove(&creation.producer_id);
            }
            let (to, text) = (creation.to, taken(&creation));
            self.refuse(Asked::Producer, to, ServerError::ProducerBusy, &text);
        }
    }

    /// `ServerCnx.handleCloseProducer`: an id that is not known, and one whose creation is under way, is closed at once; an open
    /// producer when all that it sent has its verdict.
    pub(super) fn close_producer(&mut self, id: u64, to: Asking) {
        let Some(connection) = self.connections.get_mut(&to.connection) else {
            return;
        };
        match connection.producers.get_mut(&id) {
            Some(Slot::Open(producer)) => {
                producer.closing.push(to);
                self.closing.push((to.connection, id));
            }
            known => {
                if known.is_some() {
                    connection.producers.remove(&id);
                }
                let answer = commands::success(to.request_id);
                self.answers.answer(to, answer);
            }
        }
    }

    /// Answers the closes whose producers have nothing left to wait for (`Producer.publishOperationCompleted`).
    pub(super) fn finish_closes(&mut self) {
        for (at, id) in std::mem::take(&mut self.closing) {
            let Some(producer) = self.open_producer(at, id) else {
                // Its connection has ended, or it was closed in another way, which has answered.
                continue;
            };
            let incarnation = producer.incarnation;
            if self.topics.pending_of(incarnation) + self.answers.held_of(incarnation) > 0 {
                self.closing.push((at, id));
                continue;
            }
            self.remove(at, id);
        }
    }

    /// Forgets an open producer, and answers who waits for that (`Producer.closeNow`).
    pub(super) fn remove(&mut self, at: ConnectionId, id: u64) {
        let connection = self.connections.get_mut(&at);
        let slot = connection.and_then(|connection| connection.producers.remove(&id));
        if let Some(Slot::Open(producer)) = slot {
            for to in producer.closing {
                self.answers.answer(to, commands::success(to.request_id));
            }
        }
    }

    /// Closes producers on the broker's side and tells their clients (`Producer.disconnect`): what they have sent is not waited
    /// for, its answers come later, and what comes from them now is dropped.
    pub(super) fn disconnect(&mut self, producers: &[(ConnectionId, u64)], next: Option<&str>) {
        for &(at, id) in producers {
            if let Some(connection) = self.connections.get_mut(&at) {
                connection.closed.insert(id);
                self.answers.say(at, commands::close_producer(id, next));
                self.remove(at, id);
            }
        }
    }

    /// The next address, to those who understand it, and `CLOSE_PRODUCER`, which is all that others are told
    /// (`PulsarCommandSenderImpl.sendTopicMigrated`).
    pub(super) fn tell_migrated(&mut self, at: ConnectionId, id: u64, url: &str) {
        let Some(connection) = self.connections.get_mut(&at) else {
            return;
        };
        connection.closed.insert(id);
        if connection.protocol_version >= KNOWS_MIGRATION {
            self.answers.say(at, commands::topic_migrated(id, url));
        }
        self.answers.say(at, commands::close_producer(id, None));
    }

    /// The open producers of a topic.
    pub(super) fn producers_of(&self, topic: &str) -> Vec<(ConnectionId, u64)> {
        self.open_producers(|_, producer| producer.topic == topic)
    }

    /// The open producers that are wanted; `wanted` gets their broker too.
    pub(super) fn open_producers(
        &self,
        wanted: impl Fn(usize, &Producer) -> bool,
    ) -> Vec<(ConnectionId, u64)> {
        let mut found = Vec::new();
        for (&at, connection) in &self.connections {
            for (&id, slot) in &connection.producers {
                if slot
                    .open()
                    .is_some_and(|open| wanted(connection.broker, open))
                {
                    found.push((at, id));
                }
            }
        }
        found
    }

    fn open_producer(&self, at: ConnectionId, id: u64) -> Option<&Producer> {
        self.connections.get(&at)?.producers.get(&id)?.open()
    }
}

fn taken(creation: &Creation) -> String {
    let (name, topic) = (&creation.name, &creation.topic);
    format!("Producer with name '{name}' is already connected to topic '{topic}'")
}
