//! One connection to one broker: the task that owns its socket, and the handle the others hold.
//!
//! Input: frames and requests over the handle's channel. Output: answers to requests through their oneshot, and
//! everything the broker says on its own (receipts, send errors, closed producers, the end of the connection) as
//! [`Event`]s to the publisher. The task keeps no message: what must survive the connection stays with the lanes.
//!
//! The task waits for nobody but its socket. Events that the publisher has no room for stay here, in order; while there are too
//! many, nothing more is read, and writing goes on. What is written when, see `unwritten`; how long a request may take, see
//! `requests`.
//!
//! Manners (Pulsar documentation, "Binary protocol"): CONNECT with feature flags and credentials, the broker's
//! `max_message_size` honoured, PING answered at once, PING sent when the broker is silent, `AUTH_CHALLENGE` answered
//! with fresh credentials, while receipts go on.
//!
//! # The lease
//!
//! Whatever the task writes behind CONNECT, it asks the [`Lease`] in the same poll. While that is not held nothing goes out, not even the answer to
//! a PING: a broker that asks because another instance wants the producers' names may close this connection. What comes in is taken. When the last handle is gone
//! the task ends without writing what is queued.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pulsar::message::proto::{BaseCommand, CommandConnected, MessageIdData, ServerError};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::auth::{Auth, Credentials};
pub(super) use super::command::close_producer;
use super::command::{auth_response, connect, ping, pong, request_id};
use super::requests::{Request, Requests, Resource};
pub(super) use super::socket::Endpoint;
use super::socket::{self, CONNECT_TIMEOUT, Reader, Writer};
use super::tls::TlsFiles;
use super::unwritten::Unwritten;
use super::verdict::one_line;
use super::wire::{
    self, Incoming, Migrated, NextBroker, decode_command, decode_frame, encode_command,
};
use crate::lease::Lease;
use crate::retry::Backoff;
use crate::{Error, Result};

/// As the Java client's `operationTimeoutMs`; from the moment at which the request is written.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a challenge may wait for an OAuth 2 server that is away, or a file that is being rotated. The broker hangs up
/// after `authenticationRefreshCheckSeconds`, 60 by default, so there is no use in more.
const CHALLENGE_TIMEOUT: Duration = Duration::from_secs(60);
const CHALLENGE_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// What a broker of any version accepts when it does not say (Pulsar's `maxMessageSize` default).
pub const DEFAULT_MAX_MESSAGE_BYTES: usize = 5 * 1024 * 1024;
/// Commands and sizes around a message; as the Java client's frame padding.
const FRAME_OVERHEAD_BYTES: usize = 10 * 1024;
/// The broker side of the socket: receipts are 30-50 bytes, so this is hundreds of them at a time.
const READ_BUFFER_BYTES: usize = 16 * 1024;
/// Events that the publisher has had no room for: with so many, nothing more is read. One more read may add a buffer's worth of
/// receipts, some 500; an event takes about a hundred bytes.
const MAX_UNDELIVERED: usize = 256;
/// Request id for requests whose answer is ignored.
const NO_REQUEST: u64 = u64::MAX;
/// Reason of a connection that has no handle left.
pub(super) const NOT_NEEDED: &str = "no longer needed";
/// Topics that have moved to other clusters, each until the broker closes its producer, which is the next thing it says of it.
const MAX_MIGRATED: usize = 1024;

/// What a broker says, or what becomes of its connection, without being asked.
#[derive(Debug)]
pub(super) enum Event {
    /// A send receipt: the batch whose lowest id is `sequence_id` is durable.
    Receipt {
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        /// The broker's deduplication knew it: nothing was stored now.
        stored_before: bool,
    },
    /// A batch was refused: the one that holds `sequence_id` (see `Batch::holds`).
    SendError {
        connection: u64,
        producer_id: u64,
        sequence_id: u64,
        code: i32,
        message: String,
    },
    /// The broker closed a producer (unload, bundle split, policy): look the topic up again, unless it says where it is.
    ProducerClosed {
        connection: u64,
        producer_id: u64,
        next_broker: Option<NextBroker>,
    },
    /// A message for a consumer (see `reader`): what follows the command in its frame.
    Message {
        connection: u64,
        consumer_id: u64,
        /// Ledger and entry.
        place: (u64, u64),
        body: Bytes,
    },
    /// The broker closed a consumer: look the topic up again, unless it says where it is.
    ConsumerClosed {
        connection: u64,
        consumer_id: u64,
        next_broker: Option<NextBroker>,
    },
    /// The connection ended; nothing more comes from it.
    Disconnected { connection: u64, reason: String },
    /// It has read a PING, and what was written before it.
    Alive { connection: u64 },
}

/// A handle on a live (or ended) connection. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    id: u64,
    max_message_bytes: usize,
    server_version: Arc<str>,
    /// Unbounded, and yet bounded: frames enter only under the publisher's in-flight limits, which count each frame until
    /// its receipt, and requests only from openers, of which a topic has one.
    outgoing: mpsc::UnboundedSender<Outgoing>,
    next_request: Arc<AtomicU64>,
    unwritten_bytes: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Outgoing {
    Data {
        producer_id: u64,
        frame: Bytes,
    },
    Command {
        frame: Bytes,
        /// The producer that it is about.
        producer: Option<u64>,
        request: Option<Request>,
    },
    Close(String),
}

/// How every connection is made.
#[derive(Clone, Debug)]
pub(super) struct Manner {
    pub(super) auth: Auth,
    /// `None`: without TLS.
    pub(super) tls: Option<TlsFiles>,
    /// Silence for one interval → PING, for two → dead.
    pub(super) keepalive_interval: Duration,
    /// Behind CONNECT nothing is written while it is not held.
    pub(super) lease: Lease,
}

impl Connection {
    /// Connects, introduces itself, and starts the task that owns the socket.
    pub(super) async fn open(
        endpoint: &Endpoint,
        id: u64,
        manner: &Manner,
        events: mpsc::Sender<Event>,
    ) -> Result<Self> {
        Self::open_within(REQUEST_TIMEOUT, (endpoint, 0), id, manner, events).await
    }

    /// The same, with another time for each request, and so many addresses of the endpoint tried behind the others.
    pub(super) async fn open_within(
        request_timeout: Duration,
        (endpoint, skip): (&Endpoint, usize),
        id: u64,
        manner: &Manner,
        events: mpsc::Sender<Event>,
    ) -> Result<Self> {
        // Boxed, all three: they are large, short-lived, and part of every future that may connect.
        // Before the network: credentials that cannot be had are told even when the broker is away.
        let credentials = Box::pin(manner.auth.credentials(None)).await?;
        let (reader, writer) =
            Box::pin(socket::connect(endpoint, skip, manner.tls.as_ref())).await?;
        let (outgoing, commands) = mpsc::unbounded_channel();
        let unwritten_bytes = Arc::new(AtomicUsize::new(0));
        let mut driver = Driver {
            id,
            reader,
            writer,
            inbox: BytesMut::with_capacity(READ_BUFFER_BYTES),
            unwritten: Unwritten::default(),
            unwritten_bytes: Arc::clone(&unwritten_bytes),
            unflushed: false,
            requests: Requests::new(request_timeout, Instant::now()),
            migrated: HashMap::new(),
            commands,
            events,
            undelivered: VecDeque::new(),
            auth: manner.auth.clone(),
            keepalive_interval: manner.keepalive_interval,
            credentials,
            answering: None,
            max_frame_bytes: 0,
            lease: manner.lease.clone(),
        };
        let identified = manner.tls.as_ref().is_some_and(|tls| tls.client.is_some());
        let handshake = Box::pin(driver.handshake(endpoint, identified));
        let connected = timeout(CONNECT_TIMEOUT, handshake).await.map_err(|_| {
            Error::temporary(format!(
                "the Pulsar broker at {endpoint} does not answer CONNECT"
            ))
        })??;
        let said = connected
            .max_message_size
            .and_then(|size| usize::try_from(size).ok());
        let max_message_bytes = said
            .filter(|&size| size > 0)
            .unwrap_or(DEFAULT_MAX_MESSAGE_BYTES);
        driver.max_frame_bytes = max_message_bytes + FRAME_OVERHEAD_BYTES;
        let server_version = connected.server_version;
        debug!(connection = id, %endpoint, max_message_bytes, server_version, "connected to broker");
        tokio::spawn(driver.run());
        Ok(Self {
            id,
            max_message_bytes,
            server_version: server_version.into(),
            outgoing,
            next_request: Arc::new(AtomicU64::new(1)),
            unwritten_bytes,
        })
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// The largest entry (metadata and payload) this broker takes.
    pub(super) fn max_message_bytes(&self) -> usize {
        self.max_message_bytes
    }

    /// What the broker (or the proxy before it) calls itself.
    pub(super) fn server_version(&self) -> &str {
        &self.server_version
    }

    pub(super) fn is_closed(&self) -> bool {
        self.outgoing.is_closed()
    }

    /// Queues a producer's batch. When the connection has ended the frame goes nowhere: its `Disconnected` event is on its way,
    /// and the lane still holds the frame. A frame that is larger than the broker takes is not written; a `SendError` says so.
    pub(super) fn send_data(&self, producer_id: u64, frame: Bytes) {
        self.unwritten_bytes
            .fetch_add(frame.len(), Ordering::Relaxed);
        let _ended = self.outgoing.send(Outgoing::Data { producer_id, frame });
    }

    /// Bytes of batches that are queued and that the socket has not taken yet.
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "for a publisher that bounds what is under way on a connection"
        )
    )]
    pub(super) fn unwritten_bytes(&self) -> usize {
        self.unwritten_bytes.load(Ordering::Relaxed)
    }

    /// Queues a command that has no answer and is about no producer.
    pub(super) fn send(&self, command: &BaseCommand) {
        let _ended = self.outgoing.send(Outgoing::Command {
            frame: encode_command(command),
            producer: None,
            request: None,
        });
    }

    /// Ends the connection, as if it had broken; `reason` comes back with the `Disconnected` event.
    pub(super) fn close(&self, reason: impl Into<String>) {
        let _ended = self.outgoing.send(Outgoing::Close(reason.into()));
    }

    /// Asks for a sign of life; [`Event::Alive`] answers it.
    pub(super) fn ping(&self) {
        let _ended = self.outgoing.send(Outgoing::Command {
            frame: ping(),
            producer: None,
            request: None,
        });
    }

    /// Sends the command that `build` makes for a fresh request id and waits for its answer.
    ///
    /// # Errors
    /// All temporary: no answer, or a topic that is closed in place of one (see [`super::verdict::next_broker`]). What the
    /// broker refuses is an answer.
    pub(super) async fn request(
        &self,
        build: impl FnOnce(u64) -> BaseCommand,
    ) -> Result<BaseCommand> {
        self.request_framed(|id| {
            let command = build(id);
            let frame = encode_command(&command);
            (command, frame)
        })
        .await
    }

    /// The same, with the command's frame beside it.
    pub(super) async fn request_framed(
        &self,
        build: impl FnOnce(u64) -> (BaseCommand, Bytes),
    ) -> Result<BaseCommand> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let (command, frame) = build(id);
        // Dropped here when the connection has ended, and the reply with it: kept, it would be waited for in vain.
        drop(self.outgoing.send(Outgoing::Command {
            frame,
            producer: producer_of(&command),
            request: Some(Request::new(id, &command, reply)),
        }));
        // The task ends each request that is not answered in time.
        answer.await.unwrap_or_else(|_| {
            Err(Error::temporary(
                "the connection to the Pulsar broker ended before it answered",
            ))
        })
    }
}

/// The answer to a challenge, in the making.
type Answering = Pin<Box<dyn Future<Output = Result<Credentials>> + Send>>;

/// Owns the socket.
struct Driver {
    id: u64,
    reader: Reader,
    writer: Writer,
    inbox: BytesMut,
    unwritten: Unwritten,
    /// See [`Connection::unwritten_bytes`].
    unwritten_bytes: Arc<AtomicUsize>,
    /// TLS may hold bytes that it has encrypted and the kernel has not taken.
    unflushed: bool,
    requests: Requests,
    /// Where topics have moved to whose producer or consumer is about to be closed.
    migrated: HashMap<Resource, NextBroker>,
    commands: mpsc::UnboundedReceiver<Outgoing>,
    events: mpsc::Sender<Event>,
    /// Events that there was no room for yet.
    undelivered: VecDeque<Undelivered>,
    auth: Auth,
    keepalive_interval: Duration,
    /// What the broker was last told.
    credentials: Credentials,
    answering: Option<Answering>,
    /// A message of the largest size, and what stands around it.
    max_frame_bytes: usize,
    lease: Lease,
}

impl Driver {
    /// `identified`: TLS has shown a certificate of ours.
    async fn handshake(
        &mut self,
        endpoint: &Endpoint,
        identified: bool,
    ) -> Result<CommandConnected> {
        let broken = |error: io::Error| {
            socket::broken(endpoint, identified, &error).unwrap_or_else(|| {
                Error::temporary(format!(
                    "the Pulsar broker at {endpoint} closed the connection at CONNECT"
                ))
                .caused_by(error)
            })
        };
        let connect = encode_command(&connect(endpoint, &self.credentials));
        self.writer.send(&connect).await.map_err(broken)?;
        loop {
            let command = decode_command(&mut self.inbox).map_err(|error| {
                Error::temporary(format!("{endpoint} does not speak Pulsar: {error}"))
                    .hint("if this is its TLS port, the URL begins with pulsar+ssl://")
            })?;
            let Some(Incoming { command, .. }) = command else {
                if self
                    .reader
                    .read_buf(&mut self.inbox)
                    .await
                    .map_err(broken)?
                    == 0
                {
                    return Err(broken(io::ErrorKind::UnexpectedEof.into()));
                }
                continue;
            };
            if let Some(connected) = command.connected {
                return Ok(connected);
            }
            if let Some(error) = command.error {
                return Err(self
                    .refused_connect(endpoint, error.error, &error.message)
                    .await);
            }
            if command.auth_challenge.is_some() {
                self.credentials = Box::pin(self.auth.credentials(Some(&self.credentials))).await?;
                let answer = auth_response(&self.credentials);
                self.writer.send(&answer).await.map_err(broken)?;
            }
        }
    }

    /// What a refused CONNECT leads to. A token that was kept is dropped, and may be followed by a better one.
    async fn refused_connect(&mut self, endpoint: &Endpoint, code: i32, message: &str) -> Error {
        let message = one_line(message);
        let text = format!("the Pulsar broker at {endpoint} refuses the connection: {message}");
        match ServerError::try_from(code) {
            Ok(ServerError::AuthenticationError | ServerError::AuthorizationError) => {
                self.auth.forget(&self.credentials).await;
                if self.credentials.fresh {
                    Error::refused(text).hint(self.auth.hint())
                } else {
                    Error::temporary(text)
                }
            }
            _ => Error::temporary(text),
        }
    }

    async fn run(mut self) {
        let reason = self.drive().await;
        let Self {
            id: connection,
            reader,
            writer,
            mut commands,
            mut requests,
            mut undelivered,
            events,
            ..
        } = self;
        // Before anything is waited for: the socket goes, and questions that nobody will answer any more, and the channel, so that
        // whoever sees `Disconnected` also sees `is_closed`.
        drop((reader, writer));
        commands.close();
        while let Ok(command) = commands.try_recv() {
            if let Outgoing::Command {
                request: Some(request),
                ..
            } = command
            {
                requests.add(request, Instant::now());
            }
        }
        requests.end_questions();
        let ended = Event::Disconnected { connection, reason };
        undelivered.push_back(Undelivered::Event(ended));
        // Events and answers are delivered in order: the end of a producer comes after its receipts.
        for event in undelivered {
            match event {
                Undelivered::Event(event) => {
                    let _publisher_is_gone = events.send(event).await;
                }
                Undelivered::Answer(id, command) => requests.answer(id, *command),
            }
        }
    }

    /// Returns why the connection ended. Every branch is cancel safe: reads and writes report what they did before they
    /// are polled again, channel receives lose nothing, room for an event is given back, and the answer to a challenge is kept
    /// while it is in the making.
    async fn drive(&mut self) -> String {
        let interval = self.keepalive_interval;
        let mut keepalive = interval_at(Instant::now() + interval, interval);
        keepalive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent_intervals = 0;
        loop {
            // Of what is still queued nobody would hear the receipt.
            if self.commands.is_closed() {
                return NOT_NEEDED.to_owned();
            }
            while let Some(producer_id) = self.requests.next_to_close() {
                let close = encode_command(&close_producer(producer_id, NO_REQUEST));
                self.unwritten.push_command(close, None, Some(producer_id));
            }
            let reads = self.undelivered.len() < MAX_UNDELIVERED;
            let deadline = self.requests.next_deadline();
            let has_output = !self.unwritten.is_empty() || self.unflushed;
            let may_write = self.lease.holds();
            tokio::select! {
                biased;
                // 1. What is queued goes out first: it is what receipts wait for.
                written = held(&self.lease, self.writer.write_some(&self.unwritten)), if has_output && may_write => {
                    match written {
                        None => {}
                        Some(Ok(None)) => self.unflushed = false,
                        Some(Ok(Some(0))) => return "the broker takes no more bytes".to_owned(),
                        Some(Ok(Some(bytes))) => self.written(bytes),
                        Some(Err(error)) => return format!("write failed: {error}"),
                    }
                }
                () = self.lease.held(), if has_output && !may_write => {}
                // 2. What the publisher had no room for.
                () = deliver(&self.events, &mut self.undelivered, &mut self.requests), if !self.undelivered.is_empty() => {}
                // 3. Receipts free memory and move the confirmed LSN.
                read = self.reader.read_buf(&mut self.inbox), if reads => {
                    silent_intervals = 0;
                    match read {
                        Ok(0) => return "the broker closed the connection".to_owned(),
                        Ok(_) => if let Err(reason) = self.dispatch() { return reason; },
                        Err(error) => return format!("read failed: {error}"),
                    }
                }
                // 4. New work; all of it at once, so that one write carries many frames.
                command = self.commands.recv() => {
                    let Some(mut command) = command else { return NOT_NEEDED.to_owned() };
                    loop {
                        if let Err(reason) = self.queue(command) { return reason; }
                        match self.commands.try_recv() {
                            Ok(next) => command = next,
                            Err(_) => break,
                        }
                    }
                }
                // 5. The answer to a challenge is ready.
                answer = answered(&mut self.answering), if self.answering.is_some() => {
                    self.answering = None;
                    match answer {
                        Ok(credentials) => {
                            debug!(connection = self.id, "the broker's challenge is answered");
                            self.unwritten.push_command(auth_response(&credentials), None, None);
                            self.credentials = credentials;
                        }
                        Err(error) => return error.report(),
                    }
                }
                // 6. A request has waited for too long, or the socket takes nothing. (What is not read may be the answer.)
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if reads && deadline.is_some() => {
                    if let Err(reason) = self.requests.expire(Instant::now()) { return reason; }
                }
                // 7. Silence, unless it is ours.
                _ = keepalive.tick() => {
                    if !reads {
                        silent_intervals = 0;
                        continue;
                    }
                    if silent_intervals >= 2 {
                        return format!("the broker was silent for {:?}", 2 * interval);
                    }
                    if silent_intervals == 1 {
                        self.unwritten.push_command(ping(), None, None);
                    }
                    silent_intervals += 1;
                }
            }
        }
    }

    /// The socket took so many bytes.
    fn written(&mut self, bytes: usize) {
        let taken = self.unwritten.written(bytes);
        self.unflushed = self.writer.is_tls();
        self.unwritten_bytes
            .fetch_sub(taken.data_bytes, Ordering::Relaxed);
        if self.requests.wait_for_socket() {
            let now = Instant::now();
            self.requests.socket_took_bytes(now);
            for id in taken.requests {
                self.requests.written(id, now);
            }
        }
    }

    /// Takes what is to be written; an error is the reason to end the connection.
    fn queue(&mut self, outgoing: Outgoing) -> std::result::Result<(), String> {
        match outgoing {
            Outgoing::Data { producer_id, frame } if frame.len() > self.max_frame_bytes => {
                self.unwritten_bytes
                    .fetch_sub(frame.len(), Ordering::Relaxed);
                self.refuse(producer_id, &frame);
            }
            Outgoing::Data { producer_id, frame } => self.unwritten.push_data(producer_id, frame),
            Outgoing::Command {
                frame,
                producer,
                request,
            } => {
                let id = request.as_ref().map(|request| request.id);
                self.unwritten.push_command(frame, id, producer);
                if let Some(request) = request {
                    self.requests.add(request, Instant::now());
                }
            }
            Outgoing::Close(reason) => return Err(reason),
        }
        Ok(())
    }

    /// A frame that the broker would end the connection for, without a word (`FrameDecoderUtil`): refused in its place, in the
    /// form in which it refuses what is larger than a topic's limit.
    fn refuse(&mut self, producer_id: u64, frame: &[u8]) {
        let (bytes, limit) = (frame.len(), self.max_frame_bytes);
        let Some(sequence_id) = wire::sequence_id(frame) else {
            warn!(
                connection = self.id,
                producer_id, bytes, "not a batch: not sent"
            );
            return;
        };
        self.tell(Event::SendError {
            connection: self.id,
            producer_id,
            sequence_id,
            code: ServerError::NotAllowedError.into(),
            message: format!(
                "a frame of {bytes} bytes is larger than the {limit} that this broker reads"
            ),
        });
    }

    /// Handles every complete command in the inbox.
    fn dispatch(&mut self) -> std::result::Result<(), String> {
        while let Some(incoming) = decode_frame(&mut self.inbox, self.max_frame_bytes)
            .map_err(|error| error.to_string())?
        {
            let Incoming {
                command,
                next_broker,
                migrated,
                body,
            } = incoming;
            let connection = self.id;
            if let Some(receipt) = command.send_receipt {
                let (producer_id, sequence_id) = (receipt.producer_id, receipt.sequence_id);
                // (-1, -1) says so (`PulsarCommandSender.sendSendReceiptResponse` after a duplicate).
                let none = |id: &MessageIdData| (id.ledger_id, id.entry_id) == (u64::MAX, u64::MAX);
                let stored_before = receipt.message_id.as_ref().is_some_and(none);
                self.tell(Event::Receipt {
                    connection,
                    producer_id,
                    sequence_id,
                    stored_before,
                });
            } else if let Some(error) = command.send_error {
                self.tell(Event::SendError {
                    connection,
                    producer_id: error.producer_id,
                    sequence_id: error.sequence_id,
                    code: error.error,
                    message: error.message,
                });
            } else if let Some(closed) = command.close_producer {
                self.closed(Resource::Producer(closed.producer_id), next_broker);
            } else if let Some(closed) = command.close_consumer {
                self.closed(Resource::Consumer(closed.consumer_id), next_broker);
            } else if let Some(migrated) = migrated {
                self.migrated(migrated);
            } else if let Some(message) = command.message {
                self.tell(Event::Message {
                    connection,
                    consumer_id: message.consumer_id,
                    place: (message.message_id.ledger_id, message.message_id.entry_id),
                    body,
                });
            } else if command.ping.is_some() {
                self.unwritten.push_command(pong(), None, None);
            } else if command.auth_challenge.is_some() {
                debug!(connection, "the broker asks for credentials again");
                // A second challenge while the first is being answered gets the same answer.
                if self.answering.is_none() {
                    let (auth, stale) = (self.auth.clone(), self.credentials.clone());
                    self.answering = Some(Box::pin(answer(auth, stale)));
                }
            } else if let Some(id) = request_id(&command) {
                // A producer that must wait its turn gets a second answer later; only "ready" ends the request.
                if command
                    .producer_success
                    .as_ref()
                    .is_some_and(|p| p.producer_ready == Some(false))
                {
                    continue;
                }
                self.answered_request(id, command);
            } else if command.pong.is_some() {
                self.tell(Event::Alive { connection });
            } else if command.active_consumer_change.is_none()
                && command.reached_end_of_topic.is_none()
            {
                warn!(
                    connection,
                    command = command.r#type,
                    "unexpected command from the broker, ignored"
                );
            }
        }
        Ok(())
    }

    /// The broker closed a producer or consumer, or will not open it.
    fn closed(&mut self, resource: Resource, next_broker: Option<NextBroker>) {
        let moved = self.migrated.remove(&resource);
        let next_broker = moved.or(next_broker);
        if self.requests.closed(resource, next_broker.as_ref()) {
            return;
        }
        let connection = self.id;
        self.tell(match resource {
            Resource::Producer(producer_id) => Event::ProducerClosed {
                connection,
                producer_id,
                next_broker,
            },
            Resource::Consumer(consumer_id) => Event::ConsumerClosed {
                connection,
                consumer_id,
                next_broker,
            },
        });
    }

    /// A topic has moved to another cluster. The broker closes its producer next (`Producer.topicMigrated`).
    fn migrated(&mut self, said: Migrated) {
        let resource = if said.is_consumer {
            Resource::Consumer(said.resource_id)
        } else {
            Resource::Producer(said.resource_id)
        };
        // Forgotten, they are told again when the topic is opened at the old place.
        if self.migrated.len() >= MAX_MIGRATED {
            self.migrated.clear();
        }
        self.migrated.insert(resource, said.next);
    }

    /// Hands an event on, or keeps it until there is room. Never waits.
    fn tell(&mut self, event: Event) {
        if !self.undelivered.is_empty() {
            self.undelivered.push_back(Undelivered::Event(event));
            return;
        }
        match self.events.try_send(event) {
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(event)) => {
                self.undelivered.push_back(Undelivered::Event(event));
            }
        }
    }

    /// Hands an answer on, behind the events that came before it: a producer that is closed has had all its receipts.
    fn answered_request(&mut self, id: u64, command: BaseCommand) {
        if self.undelivered.is_empty() {
            self.requests.answer(id, command);
        } else {
            let answer = Undelivered::Answer(id, Box::new(command));
            self.undelivered.push_back(answer);
        }
    }
}

/// The producer that a command is about.
fn producer_of(command: &BaseCommand) -> Option<u64> {
    let opened = command
        .producer
        .as_ref()
        .map(|producer| producer.producer_id);
    opened.or_else(|| {
        command
            .close_producer
            .as_ref()
            .map(|closed| closed.producer_id)
    })
}

/// What the publisher had no room for, or what came behind that.
#[derive(Debug)]
enum Undelivered {
    Event(Event),
    /// The answer to a request.
    Answer(u64, Box<BaseCommand>),
}

/// Hands on what there is room for. Cancel safe: an event leaves the queue when there is.
async fn deliver(
    events: &mpsc::Sender<Event>,
    undelivered: &mut VecDeque<Undelivered>,
    requests: &mut Requests,
) {
    let mut room = events
        .reserve()
        .await
        .map_err(|_publisher_is_gone| undelivered.clear())
        .ok();
    while let Some(front) = undelivered.pop_front() {
        match (front, room.take()) {
            (Undelivered::Answer(id, command), kept) => {
                requests.answer(id, *command);
                room = kept;
            }
            (Undelivered::Event(event), Some(place)) => {
                place.send(event);
                room = events.try_reserve().ok();
            }
            (event, None) => {
                undelivered.push_front(event);
                return;
            }
        }
    }
}

/// Polls `writing` only while the lease is held; `None` when it is not. A process that was stopped in between looks at the clock first.
async fn held<T>(lease: &Lease, writing: impl Future<Output = T>) -> Option<T> {
    let mut writing = pin!(writing);
    poll_fn(|context| {
        if lease.holds() {
            writing.as_mut().poll(context).map(Some)
        } else {
            Poll::Ready(None)
        }
    })
    .await
}

async fn answered(answering: &mut Option<Answering>) -> Result<Credentials> {
    match answering {
        Some(answer) => answer.await,
        None => std::future::pending().await,
    }
}

/// Credentials for a challenge; asked for again while what is in their way may pass.
async fn answer(auth: Auth, stale: Credentials) -> Result<Credentials> {
    let give_up_at = Instant::now() + CHALLENGE_TIMEOUT;
    let mut backoff = Backoff::new(CHALLENGE_PAUSE.0, CHALLENGE_PAUSE.1);
    loop {
        match auth.credentials(Some(&stale)).await {
            Err(error) if error.is_temporary() && Instant::now() < give_up_at => {
                let delay = backoff.next_delay();
                warn!(
                    retry_in_ms = delay.as_millis(),
                    "cannot answer the broker's challenge yet: {}",
                    error.report()
                );
                sleep(delay).await;
            }
            other => return other,
        }
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "connection_lease_tests.rs"]
mod lease_tests;
