//! Opening producers on a topic's broker: the slow, asynchronous part of publishing, kept out of the publisher's loop.
//!
//! Input: a topic and the producers wanted on it. Output: one [`Event::Opened`] per success, and
//! [`Event::PartitionsCounted`]. What fails is tried again with backoff, for ever: a broker that is away is backpressure and
//! not an error, and a topic that is refused can be mended on the broker's side (a permission, a schema, a topic made anew)
//! while the others go on; where events can be diverted (see `divert`), a topic that is refused for too long is given up and
//! that is reported. Each failure is logged with its reason. The publisher aborts the task when it is no longer wanted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use pulsar::message::proto::{BaseCommand, CommandProducer, Schema, base_command::Type};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::connection::{self, Connection, Event, OpenedProducer};
use super::directory::{Directory, SHARED};
use super::divert::{Deadline, Diversion};
use super::schema::SchemaConfig;
use super::verdict;
use super::wire::{MAX_SCHEMA_VERSION_BYTES, NextBroker};
use crate::retry::Backoff;
use crate::{Error, Result};

/// What all openers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) directory: Directory,
    pub(super) schema: Option<SchemaConfig>,
    /// First and longest pause between attempts.
    pub(super) reconnect: (Duration, Duration),
    pub(super) diversion: Option<Diversion>,
    pub(super) events: mpsc::Sender<Event>,
}

impl Shared {
    async fn tell(&self, event: Event) {
        let _publisher_is_gone = self.events.send(event).await;
    }
}

/// A producer to open.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub producer_id: u64,
    pub producer_name: String,
    /// The connection it was open on before, if the broker may still hold it there.
    pub close_first: Option<Connection>,
}

/// The topic to open them on.
#[derive(Debug)]
pub(super) struct Target {
    /// Its place among the publisher's topics.
    pub index: usize,
    pub name: String,
    /// It was given up before, and nothing was heard of it since.
    pub refused: bool,
    pub next_broker: Option<NextBroker>,
    /// Makes the opener give up a topic that is refused.
    pub hurry: Arc<Notify>,
}

/// Counts the partitions of a topic, until they are known; the body of the task.
pub(super) async fn count_partitions(
    shared: Arc<Shared>,
    route: usize,
    topic: String,
    hurry: Arc<Notify>,
) {
    let mut patience = Patience::new(&shared, &topic, &hurry, false);
    let partitions = loop {
        match shared.directory.partitions_of(&topic).await {
            Ok(partitions) => break partitions,
            Err(error) if patience.ends_after(&error).await => {
                let reason = error.report();
                let refused = Event::RouteRefused { route, reason };
                return shared.tell(refused).await;
            }
            Err(_) => {}
        }
    };
    patience.rewarded();
    shared
        .tell(Event::PartitionsCounted { route, partitions })
        .await;
}

/// Counts them again, once: the topic works, so a failure is no news.
pub(super) async fn recount_partitions(shared: Arc<Shared>, route: usize, topic: String) {
    let event = match shared.directory.partitions_of(&topic).await {
        Ok(partitions) => Event::PartitionsCounted { route, partitions },
        Err(error) => {
            debug!(topic, "partitions not counted: {}", error.report());
            Event::PartitionsUnknown { route }
        }
    };
    shared.tell(event).await;
}

/// Tries that go on until one succeeds: says why each failed, and waits longer from one to the next.
struct Patience<'a> {
    topic: &'a str,
    backoff: Backoff,
    tried: bool,
    deadline: Deadline,
    hurry: &'a Notify,
}

impl<'a> Patience<'a> {
    fn new(shared: &Shared, topic: &'a str, hurry: &'a Notify, refused: bool) -> Self {
        let (initial, max) = shared.reconnect;
        Self {
            topic,
            backoff: Backoff::new(initial, max),
            tried: false,
            deadline: Deadline::new(shared.diversion, refused),
            hurry,
        }
    }

    /// Waits until the next attempt is due; true when there is to be none, because the topic has been refused for too long.
    async fn ends_after(&mut self, error: &Error) -> bool {
        self.tried = true;
        let (topic, mut delay) = (self.topic, self.backoff.next_delay());
        let give_up_at = self.deadline.after(error);
        if let Some(at) = give_up_at {
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            delay = delay.min(left);
        }
        let (retry_in_ms, why) = (delay.as_millis(), error.report());
        if error.is_temporary() {
            warn!(topic, retry_in_ms, "cannot publish yet: {why}");
        } else {
            error!(
                topic,
                retry_in_ms, "cannot publish until this is mended; the topic's events wait: {why}"
            );
        }
        tokio::select! {
            () = tokio::time::sleep(delay) => false,
            () = self.hurry.notified(), if give_up_at.is_some() => true,
        }
    }

    fn rewarded(&self) {
        if self.tried {
            info!(topic = self.topic, "the topic is usable again");
        }
    }
}

/// Opens the producers of one topic; the body of the opener task.
pub(super) async fn open(
    shared: Arc<Shared>,
    mut target: Target,
    mut wanted: Vec<Wanted>,
    pause: Duration,
) {
    tokio::time::sleep(pause).await;
    let mut next_broker = target.next_broker.take();
    let topic = &target.name;
    let mut patience = Patience::new(&shared, topic, &target.hurry, target.refused);
    while let Err(error) = attempt(&shared, topic, &mut wanted, next_broker.take()).await {
        next_broker = verdict::next_broker(&error).cloned();
        // A failed attempt has first closed all that was open before, and what it left half made; nothing that is still wanted
        // is open.
        if patience.ends_after(&error).await {
            let refused = Event::TopicRefused {
                topic: target.index,
                producers: wanted.iter().map(|wanted| wanted.producer_id).collect(),
                reason: error.report(),
            };
            return shared.tell(refused).await;
        }
    }
    patience.rewarded();
}

/// One round: what was opened is reported and taken out of `wanted`; the first failure is returned.
async fn attempt(
    shared: &Shared,
    topic: &str,
    wanted: &mut Vec<Wanted>,
    next_broker: Option<NextBroker>,
) -> Result<()> {
    for producer in wanted.iter_mut() {
        if let Some(connection) = producer.close_first.take() {
            close_producer(&connection, producer.producer_id).await;
        }
    }
    let (directory, schema) = (&shared.directory, shared.schema.as_ref());
    let schema = schema.map(|schema| schema.of_topic(topic)).transpose()?;
    let connection = directory.broker(topic, next_broker, SHARED).await?;
    let results = join_all(
        wanted
            .iter()
            .map(|producer| create(&connection, topic, producer, schema.as_ref())),
    )
    .await;
    let mut opened = Vec::new();
    let mut failure = None;
    let mut failed = Vec::new();
    for (producer, result) in std::mem::take(wanted).into_iter().zip(results) {
        match result {
            Ok(producer) => opened.push(producer),
            Err(error) => {
                failed.push(producer);
                // An error that is final outweighs one that may pass.
                if failure.as_ref().is_none_or(Error::is_temporary) {
                    failure = Some(error);
                }
            }
        }
    }
    *wanted = failed;
    if !opened.is_empty() {
        shared
            .tell(Event::Opened {
                connection,
                producers: opened,
            })
            .await;
    }
    failure.map_or(Ok(()), Err)
}

/// Creates a producer. After a failure there is none: one whose creation was not answered in time is closed again. The broker
/// may be at it still, and would answer the next attempt on this connection, which has the same producer id, with "already
/// created" and without the last sequence id (`ServerCnx.handleProducer`). Nothing would then be a probe, and a batch that
/// holds both stored and new messages be dropped. Closing the connection would do as well, but every topic of that broker has
/// it; a close is answered after the creation's end, or ends it (`ServerCnx.handleCloseProducer`). The Java client does so too.
pub(super) async fn create(
    connection: &Connection,
    topic: &str,
    producer: &Wanted,
    schema: Option<&Schema>,
) -> Result<OpenedProducer> {
    let answer = connection
        .request(|request_id| BaseCommand {
            r#type: Type::Producer as i32,
            producer: Some(CommandProducer {
                topic: topic.to_owned(),
                producer_id: producer.producer_id,
                request_id,
                producer_name: Some(producer.producer_name.clone()),
                user_provided_producer_name: Some(true),
                schema: schema.cloned(),
                ..CommandProducer::default()
            }),
            ..BaseCommand::default()
        })
        .await;
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            close_producer(connection, producer.producer_id).await;
            return Err(error);
        }
    };
    if let Some(error) = answer.error {
        return Err(verdict::of_open(
            topic,
            Some(error.error),
            Some(&error.message),
        ));
    }
    let success = answer.producer_success.ok_or_else(|| {
        Error::temporary(format!(
            "the creation of a producer on {topic} got another answer"
        ))
    })?;
    // -1: the broker knows no sequence of this name.
    let last_sequence_id = success
        .last_sequence_id
        .and_then(|id| u64::try_from(id).ok());
    Ok(OpenedProducer {
        producer_id: producer.producer_id,
        last_sequence_id,
        schema_version: schema_version(topic, schema, success.schema_version)?,
    })
}

/// What the batches say of their schema: the broker's version of it, where producers have one.
fn schema_version(
    topic: &str,
    schema: Option<&Schema>,
    version: Option<Vec<u8>>,
) -> Result<Option<Bytes>> {
    let version = version.filter(|version| schema.is_some() && !version.is_empty());
    match version {
        Some(long) if long.len() > MAX_SCHEMA_VERSION_BYTES => Err(Error::bug(format!(
            "the broker's schema version of {topic} has {} bytes, and there is room for {MAX_SCHEMA_VERSION_BYTES}",
            long.len()
        ))),
        version => Ok(version.map(Bytes::from)),
    }
}

/// Closes a producer and waits until the broker has: one whose send was refused, so that the frames behind the refused one
/// cannot be stored before it is sent again; or one that may be half made. When the connection is gone so is the producer.
pub(super) async fn close_producer(connection: &Connection, producer_id: u64) {
    let answer = connection
        .request(|id| connection::close_producer(producer_id, id))
        .await;
    if answer.is_err() {
        connection.close("a producer could not be closed");
    }
}
