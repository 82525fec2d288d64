//! The publisher: a [`Producer`] with a clock, and with connections to brokers. It lives inside the connector's one task and is driven by it;
//! nothing here is shared and nothing is locked.
//!
//! Input: events ([`publish`](Publisher::publish)), and what brokers say ([`next_event`](Publisher::next_event) →
//! [`handle`](Publisher::handle)). It decides nothing: what the producer wants done is done ([`Effect`]), and what comes of it is told to the
//! producer ([`Signal`]). What takes time is done in tasks of its own, one for each question.
//!
//! # Order of signals
//!
//! What connections say comes through one channel, and the answers to questions through another. A connection hands on what it was told
//! before it hands on an answer that came later. So when an answer is there, everything that came before it is in the other channel, which
//! is emptied first: a producer whose CLOSE was
//! answered has had all its receipts. A CLOSE without an answer behind which a later request was answered counts as closed: a write may still be under way. If neither is
//! answered, the connection ends, and that end is the answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::auth::Auth;
use super::compression::Codec;
use super::connection::{Connection, Event, Manner, NOT_NEEDED};
use super::creation;
use super::directory::{Directory, ServiceAttempt};
use super::doubts::Doubts;
use super::partition::HashingScheme;
use super::producer::{
    Diversion, Diverted, Effect, Flush, Link, Now, Outgoing, Parked, Producer, Settings, Signal,
};
use super::rows::RowQueue;
use super::schema::SchemaConfig;
use super::tls::TlsFiles;
use super::wire::NextBroker;
use crate::ack::TxnNo;
use crate::lease::Lease;
use crate::meter::{Meter, Troubles};
use crate::{Lsn, Result};

/// Broker events that may wait for the connector's loop. Connections pause reading when it is full; each event is one
/// batch's receipt, and the loop takes them all at once.
const EVENT_QUEUE: usize = 1024;

/// What the publisher needs to know.
#[derive(Clone, Debug)]
pub struct PublisherConfig {
    /// Hosts and ports of the service URL.
    pub service: Vec<(String, u16)>,
    /// Credentials.
    pub auth: Auth,
    /// Files for TLS; `None` when the service URL is without TLS.
    pub tls: Option<TlsFiles>,
    /// A connection that is silent for this long gets a PING, and for twice as long is taken for dead.
    pub keepalive_interval: Duration,
    /// Producer names are `<producer_name>-<lane>.<routing>`.
    pub producer_name: String,
    /// All that decides which lane and ordinal an event gets, besides what this struct says: tables, columns, templates.
    pub routing: String,
    /// Lanes per topic.
    pub lanes: u32,
    /// How a key becomes a partition.
    pub hashing: HashingScheme,
    /// How often the partitions of a topic in use are counted.
    pub partition_refresh: Duration,
    /// A producer that has had nothing to send for this long is closed.
    pub producer_idle: Duration,
    /// How batches are compressed.
    pub compression: Codec,
    /// When events are taken out that cannot be published; `None`: never.
    pub diversion: Option<Diversion>,
    /// What producers are opened with.
    pub schema: Option<SchemaConfig>,
    /// A batch is full at this many messages.
    pub batch_max_messages: u32,
    /// A batch is full at this many bytes.
    pub batch_max_bytes: usize,
    /// A batch waits at most this long for company.
    pub batch_linger: Duration,
    /// Room for messages without receipt.
    pub max_in_flight_messages: usize,
    /// Room for the memory that they take.
    pub max_in_flight_bytes: usize,
    /// Without a receipt for this long, while one is due: the producer is opened again where the broker has answered something later, else the connection
    /// ends.
    pub send_timeout: Duration,
    /// Where the rows of acknowledged events (`Outgoing::mark`) go, if anywhere; a full queue stops the intake.
    pub rows: Option<RowQueue>,
    /// Raised when no other process may use these names any more.
    pub doubts: Doubts,
    /// Told of receipts and of lost connections.
    pub meter: Arc<Meter>,
    /// First and longest pause between attempts to reach a broker.
    pub reconnect: (Duration, Duration),
}

/// Something that the publisher is to be told, for [`Publisher::handle`].
#[derive(Debug)]
pub struct BrokerEvent(Happened);

#[derive(Debug)]
enum Happened {
    /// A broker said something, or a question was answered.
    Signal(Signal),
    /// Something that the producer waits for is due.
    Wake,
    /// There is room for more rows, or a broker said what concerns nobody.
    Nothing,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Publisher {
    producer: Producer,
    /// Without it the connections write nothing.
    lease: Lease,
    directory: Arc<Directory>,
    reaching: ServiceAttempt,
    schema: Option<SchemaConfig>,
    events: mpsc::Receiver<Event>,
    answers: mpsc::UnboundedReceiver<Signal>,
    answering: mpsc::UnboundedSender<Signal>,
    /// An answer that waits until `events` is empty.
    answer: Option<Signal>,
    /// Those that the producer knows, by number.
    connections: HashMap<u64, Connection>,
    /// One task for each question that has no answer yet.
    questions: JoinSet<()>,
    /// Connections that were found and that the producer does not know yet.
    found: mpsc::UnboundedReceiver<Connection>,
    finding: mpsc::UnboundedSender<Connection>,
}

impl Publisher {
    /// Makes a publisher; nothing is connected yet.
    pub fn new(config: PublisherConfig) -> Self {
        Self::under(config, &Lease::default())
    }

    /// The same for one that writes nothing to a broker while this lease is not held.
    pub fn under(config: PublisherConfig, lease: &Lease) -> Self {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        let (answering, answers) = mpsc::unbounded_channel();
        let (finding, found) = mpsc::unbounded_channel();
        let manner = Manner {
            auth: config.auth,
            tls: config.tls,
            keepalive_interval: config.keepalive_interval,
            lease: lease.clone(),
        };
        let directory = Directory::new(config.service, manner, sender);
        let settings = Settings {
            producer_name: config.producer_name,
            routing: config.routing,
            lanes: config.lanes,
            hashing: config.hashing,
            partition_refresh: config.partition_refresh,
            producer_idle: config.producer_idle,
            compression: config.compression,
            diversion: config.diversion,
            batch_max_messages: config.batch_max_messages,
            batch_max_bytes: config.batch_max_bytes,
            batch_linger: config.batch_linger,
            max_in_flight_messages: config.max_in_flight_messages,
            max_in_flight_bytes: config.max_in_flight_bytes,
            send_timeout: config.send_timeout,
            rows: config.rows,
            doubts: config.doubts,
            meter: config.meter,
            reconnect: config.reconnect,
        };
        Self {
            producer: Producer::new(settings, now()),
            lease: lease.clone(),
            directory: Arc::new(directory),
            reaching: ServiceAttempt::default(),
            schema: config.schema,
            events,
            answers,
            answering,
            answer: None,
            connections: HashMap::new(),
            questions: JoinSet::new(),
            found,
            finding,
        }
    }

    /// Connects to the service URL once: learns the broker's message limit, and finds wrong credentials before the first
    /// event is read. Cancel safe: the next call goes on with the attempt.
    pub async fn connect(&mut self) -> Result<()> {
        let (connection, endpoint) = self.reaching.service(&self.directory).await?;
        let max_message_bytes = connection.max_message_bytes();
        self.producer.set_max_message_bytes(max_message_bytes);
        debug!(broker = %endpoint, max_message_bytes, "broker reached");
        Ok(())
    }

    /// Tells where the log ends, as seen while the slot is ours: nothing that was published under our producers' names can
    /// lie behind that, or the database was put back to an older state (see `producer`).
    pub fn set_log_end(&mut self, log_end: Lsn) {
        self.producer.set_log_end(log_end);
    }

    /// Where this publisher counts.
    pub fn meter(&self) -> &Meter {
        self.producer.meter()
    }

    /// True while another event may be published.
    pub fn has_room(&self) -> bool {
        self.producer.has_room()
    }

    /// True when every event published has its receipt.
    pub fn is_empty(&self) -> bool {
        self.in_flight().0 == 0
    }

    /// Events without receipt, and the memory that they take.
    pub fn in_flight(&self) -> (usize, usize) {
        self.producer.in_flight()
    }

    /// The topics that get no receipts because of what a broker said of them. Looks at all of these: to be asked about once a second.
    pub fn troubles(&self) -> Troubles {
        self.producer.troubles()
    }

    /// Takes one event on its way to `topic`. Call only while there is room. `key_hash` chooses the lane; an error means that
    /// the broker can never take the event.
    pub fn publish<'p>(
        &mut self,
        topic: &str,
        key_hash: u64,
        event: &Outgoing<'_>,
        properties: &(impl Iterator<Item = (&'p str, &'p str)> + Clone),
    ) -> Result<()> {
        let taken = self.producer.publish(topic, key_hash, event, properties);
        self.carry_out_if_any();
        taken
    }

    /// The transaction's last event was published.
    pub fn end_transaction(&mut self) {
        self.producer.end_transaction();
        self.carry_out_if_any();
    }

    /// Looks at the clock, about once a second: send deadlines, partitions to be counted again, producers without work.
    pub fn tick(&mut self, at: Instant) {
        self.producer.hold_connections(!self.lease.holds(), at);
        self.producer.tick(Now { at, ..now() });
        self.carry_out_if_any();
    }

    /// Seals the open batches that are due. Call when there is nothing more to read at once, with [`Flush::Due`].
    pub fn flush(&mut self, what: Flush) {
        self.producer.flush(what, now());
        self.carry_out_if_any();
    }

    /// When the oldest open batch has waited long enough; `None` when there is none.
    pub fn next_flush(&self) -> Option<Instant> {
        self.producer.next_flush()
    }

    /// Transactions and how many of their events were acknowledged since the last call.
    pub fn take_acked(&mut self) -> impl Iterator<Item = (TxnNo, u64)> + '_ {
        self.producer.take_acked()
    }

    /// Events diverted since the last call, in order.
    pub fn take_diverted(&mut self) -> Vec<Diverted> {
        self.producer.take_diverted()
    }

    /// True when there are any.
    pub fn has_diverted(&self) -> bool {
        self.producer.has_diverted()
    }

    /// `count` diverted events more are safe, in the order in which they were diverted: what waits for them may go.
    ///
    /// # Errors
    /// As [`Publisher::handle`]: what was held back may go too, and may be something that can never be published.
    pub fn stored(&mut self, count: u64) -> Result<()> {
        let result = self.producer.stored(count);
        self.carry_out_if_any();
        result
    }

    /// `count` events more of this topic and key are kept elsewhere (fewer, when negative). Events of a key that has any are
    /// diverted.
    pub fn park(&mut self, topic: &str, key: &str, count: i64) {
        self.producer.park(topic, key, count);
    }

    /// Goes on with what was parked in the publisher before, or while there was none.
    pub fn set_parked(&mut self, parked: Parked) {
        self.producer.set_parked(parked);
    }

    /// What is parked, for the publisher that comes next.
    pub fn take_parked(&mut self) -> Parked {
        self.producer.take_parked()
    }

    /// Something was published to a topic that had been refused: its events need not be diverted any more.
    pub fn healed(&mut self, topic: &str) {
        self.producer.healed(topic);
        self.carry_out_if_any();
    }

    /// The next event of a topic is an attempt again; false when it was not refused.
    pub fn forget_refusal(&mut self, topic: &str) -> bool {
        let was_refused = self.producer.forget_refusal(topic);
        self.carry_out_if_any();
        was_refused
    }

    /// Waits for the next thing to be told. Cancel safe.
    pub async fn next_event(&mut self) -> BrokerEvent {
        loop {
            if let Some(event) = self.try_next_event() {
                return event;
            }
            let wake_at = self.producer.next_wake();
            let full = self.producer.rows().filter(|rows| !rows.has_room());
            let room = async {
                match full {
                    Some(rows) => rows.room().await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event.map(Self::of_event),
                answer = self.answers.recv() => {
                    // After what was said before it.
                    self.answer = answer;
                    None
                }
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => Some(Happened::Wake),
                () = room => Some(Happened::Nothing),
            };
            if let Some(event) = event {
                self.producer.set_now(now());
                return BrokerEvent(event);
            }
        }
    }

    /// The next thing to be told, if there is one now.
    pub fn try_next_event(&mut self) -> Option<BrokerEvent> {
        let now = now();
        self.producer.set_now(now);
        if self.answer.is_none() {
            self.answer = self.answers.try_recv().ok();
        }
        if let Ok(event) = self.events.try_recv() {
            return Some(BrokerEvent(Self::of_event(event)));
        }
        if let Some(answer) = self.answer.take() {
            return Some(BrokerEvent(Happened::Signal(answer)));
        }
        let is_due = self.producer.next_wake().is_some_and(|at| at <= now.at);
        is_due.then_some(BrokerEvent(Happened::Wake))
    }

    /// Applies what happened. An error means that an event can never be published as it is.
    pub fn handle(&mut self, event: BrokerEvent) -> Result<()> {
        let now = now();
        let result = match event.0 {
            Happened::Signal(signal) => {
                self.note_connections(&signal);
                self.producer.on(signal, now)
            }
            Happened::Wake => self.producer.wake(now),
            Happened::Nothing => Ok(()),
        };
        self.carry_out_if_any();
        result
    }

    /// Keeps the connections that were found, and lets go of those that ended.
    fn note_connections(&mut self, signal: &Signal) {
        match signal {
            Signal::Found { .. } => {
                while let Ok(connection) = self.found.try_recv() {
                    self.connections.insert(connection.id(), connection);
                }
                self.connections
                    .retain(|_, connection| !connection.is_closed());
            }
            Signal::Disconnected { connection, .. } => {
                self.connections.remove(connection);
            }
            _ => {}
        }
    }

    /// What a connection's event means to the producer.
    fn of_event(event: Event) -> Happened {
        Happened::Signal(match event {
            Event::Receipt {
                connection,
                producer_id,
                sequence_id,
                stored_before,
            } => Signal::Receipt {
                connection,
                producer_id,
                sequence_id,
                stored_before,
            },
            Event::SendError {
                connection,
                producer_id,
                sequence_id,
                code,
                message,
            } => Signal::SendError {
                connection,
                producer_id,
                sequence_id,
                code,
                message,
            },
            Event::ProducerClosed {
                connection,
                producer_id,
                next_broker,
            } => Signal::ProducerClosed {
                connection,
                producer_id,
                next_broker,
            },
            // Nobody had it any more.
            Event::Disconnected { connection, reason } if reason == NOT_NEEDED => {
                debug!(connection, "broker connection ended: {reason}");
                return Happened::Nothing;
            }
            Event::Disconnected { connection, reason } => {
                Signal::Disconnected { connection, reason }
            }
            Event::Alive { connection } => Signal::Alive { connection },
            // A publisher has no consumers.
            Event::Message { .. } | Event::ConsumerClosed { .. } => return Happened::Nothing,
        })
    }

    /// Does what the producer wants done, if there is anything: nearly always there is nothing, once a row.
    #[inline]
    fn carry_out_if_any(&mut self) {
        if self.producer.has_effects() {
            self.carry_out();
        }
    }

    #[inline(never)]
    fn carry_out(&mut self) {
        while self.questions.try_join_next().is_some() {}
        for effect in self.producer.take_effects() {
            let questions = &mut self.questions;
            let connection = |id: u64| self.connections.get(&id);
            let asker = Asker {
                directory: &self.directory,
                schema: self.schema.as_ref(),
                answering: &self.answering,
                finding: &self.finding,
            };
            match effect {
                Effect::Send {
                    connection: id,
                    producer_id,
                    frame,
                } => {
                    if let Some(connection) = connection(id) {
                        connection.send_data(producer_id, frame);
                    }
                }
                Effect::Ping { connection: id } => {
                    if let Some(connection) = connection(id) {
                        connection.ping();
                    }
                }
                Effect::Release { connection } => {
                    self.directory.release(connection);
                    self.connections.remove(&connection);
                }
                Effect::Disconnect {
                    connection: id,
                    reason,
                } => {
                    if let Some(connection) = connection(id) {
                        connection.close(reason);
                    }
                }
                Effect::Create {
                    connection: id,
                    topic,
                    producer_id,
                    producer_name,
                } => {
                    let connection = connection(id).cloned();
                    let producer = (producer_id, producer_name);
                    questions.spawn(asker.create((id, connection), topic, producer));
                }
                Effect::Close {
                    connection: id,
                    producer_id,
                } => {
                    questions.spawn(asker.close(connection(id).cloned(), producer_id));
                }
                Effect::Count {
                    route,
                    topic,
                    asked,
                    create,
                } => {
                    questions.spawn(asker.count(route, topic, asked, create));
                }
                Effect::Find {
                    topic,
                    name,
                    attempt,
                    next_broker,
                    shard,
                } => {
                    questions.spawn(asker.find((topic, attempt), name, next_broker, shard));
                }
            }
        }
    }
}

/// Asks questions, each in a task of its own, which tells the answer.
struct Asker<'a> {
    directory: &'a Arc<Directory>,
    schema: Option<&'a SchemaConfig>,
    answering: &'a mpsc::UnboundedSender<Signal>,
    finding: &'a mpsc::UnboundedSender<Connection>,
}

impl Asker<'_> {
    fn count(
        &self,
        route: usize,
        topic: String,
        asked: u64,
        create: bool,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (directory, answering) = (self.directory.clone(), self.answering.clone());
        async move {
            let answer = directory.partitions_of(&topic, create).await;
            let _publisher_is_gone = answering.send(Signal::Counted {
                route,
                asked,
                answer,
            });
        }
    }

    fn find(
        &self,
        (topic, attempt): (usize, u64),
        name: String,
        next_broker: Option<NextBroker>,
        shard: u32,
    ) -> impl Future<Output = ()> + Send + use<> {
        let (directory, answering) = (self.directory.clone(), self.answering.clone());
        let finding = self.finding.clone();
        async move {
            let found = directory.broker(&name, next_broker, shard).await;
            let answer = found.map(|connection| {
                let link = Link {
                    connection: connection.id(),
                    max_message_bytes: connection.max_message_bytes(),
                };
                let _publisher_is_gone = finding.send(connection);
                link
            });
            let _publisher_is_gone = answering.send(Signal::Found {
                topic,
                attempt,
                answer,
            });
        }
    }

    fn create(
        &self,
        (id, connection): (u64, Option<Connection>),
        topic: String,
        (producer_id, name): (u64, String),
    ) -> impl Future<Output = ()> + Send + use<> {
        let (schema, answering) = (self.schema.cloned(), self.answering.clone());
        async move {
            let answer = match connection {
                None => Err(creation::is_over()),
                Some(connection) => {
                    let producer = (producer_id, name.as_str());
                    creation::create(&connection, &topic, producer, schema.as_ref()).await
                }
            };
            let _publisher_is_gone = answering.send(Signal::Created {
                connection: id,
                producer_id,
                answer,
            });
        }
    }

    fn close(
        &self,
        connection: Option<Connection>,
        producer_id: u64,
    ) -> impl Future<Output = ()> + Send + use<> {
        let answering = self.answering.clone();
        async move {
            if let Some(connection) = connection
                && !creation::close(&connection, producer_id).await
            {
                // The end of the connection is told, and ends the producer.
                return;
            }
            let _publisher_is_gone = answering.send(Signal::Closed { producer_id });
        }
    }
}

/// The time.
fn now() -> Now {
    let of_day = SystemTime::now().duration_since(UNIX_EPOCH);
    Now {
        at: Instant::now(),
        unix_ms: u64::try_from(of_day.unwrap_or_default().as_millis()).unwrap_or(u64::MAX),
    }
}
