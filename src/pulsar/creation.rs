//! One producer: made and closed, each in one attempt.

use bytes::Bytes;
use pulsar::message::proto::{BaseCommand, CommandProducer, Schema, base_command::Type};

use super::connection::{self, Connection};
use super::producer::Created;
use super::schema::SchemaConfig;
use super::verdict::{self, OfTopic};
use super::wire::MAX_SCHEMA_VERSION_BYTES;
use crate::{Error, Result};

/// Asks for a producer, and waits for the answer until the request ends (60 s). The producer gives up earlier and closes it. (What is made later still, the
/// connection closes: see `requests`.)
pub(super) async fn create(
    connection: &Connection,
    topic: &str,
    (producer_id, producer_name): (u64, &str),
    schema: Option<&SchemaConfig>,
) -> Result<Created> {
    let schema = match schema {
        Some(schema) => Some(schema.read_for(topic).await?),
        None => None,
    };
    let schema = schema.as_ref();
    let answer = connection
        .request(|request_id| BaseCommand {
            r#type: Type::Producer as i32,
            producer: Some(CommandProducer {
                topic: topic.to_owned(),
                producer_id,
                request_id,
                producer_name: Some(producer_name.to_owned()),
                user_provided_producer_name: Some(true),
                schema: schema.cloned(),
                ..CommandProducer::default()
            }),
            ..BaseCommand::default()
        })
        .await?;
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
    Ok(Created {
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
        Some(long) if long.len() > MAX_SCHEMA_VERSION_BYTES => {
            let why = format!(
                "the broker's schema version of {topic} has {} bytes, and there is room for {MAX_SCHEMA_VERSION_BYTES}",
                long.len()
            );
            Err(Error::bug(why.clone()).caused_by(OfTopic::mend(why)))
        }
        version => Ok(version.map(Bytes::from)),
    }
}

/// The id of a producer that never is: a broker answers at once that it is closed (`ServerCnx.handleCloseProducer`).
const NO_PRODUCER: u64 = u64::MAX >> 1;

/// Closes a producer, or what may become one. Returns true when the broker has closed it (what was sent has its receipt), or has answered a later
/// request (a write may still be under way). Returns false when neither is answered: the connection ends, and the producer with it, and the
/// connection's last event says so, behind the receipts.
///
/// A broker answers when the writes under way have ended, which may never be: that is the topic's trouble. When it does not answer in time
/// but answers something else that came later, it has read all that was sent to the producer, and nothing that is sent to the topic
/// from then on comes before that. It refuses the producer's name until it is closed. One that answers nothing does not read the connection, which ends.
pub(super) async fn close(connection: &Connection, producer_id: u64) -> bool {
    for id in [producer_id, NO_PRODUCER] {
        let answer = connection.request(|request| connection::close_producer(id, request));
        if answer.await.is_ok() {
            return true;
        }
    }
    connection.close("a producer could not be closed");
    false
}

/// The error for a connection that is no more.
pub(super) fn is_over() -> Error {
    Error::temporary("the connection to the Pulsar broker has ended")
}
