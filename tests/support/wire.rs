//! A topic as it lies on the broker: entry by entry, with both levels of metadata.
//!
//! A small consumer on the bare protocol (PulsarApi.proto), for what the crate's consumer leaves out: a batch's ordering
//! key and sequence ids as sent, each single message's sequence id, tombstones inside a batch. It reads one frame after
//! the other and checks the checksum. It does not decompress: of a compressed entry it tells the metadata and the size.
//!
//! ```text
//! [total u32][size u32][BaseCommand]                                                     a command
//! [total u32][size u32][BaseCommand][0x0e01][crc32c u32][size u32][MessageMetadata][…]   with an entry
//! […] of a batch: ([size u32][SingleMessageMetadata][payload])*
//! ```

#![allow(
    clippy::large_futures,
    reason = "a command of the protocol is a large value; a test has the stack for it"
)]

use std::io;
use std::time::Duration;

use prost::Message as _;
use pulsar::message::proto::command_subscribe::SubType;
use pulsar::message::proto::{
    BaseCommand, CommandConnect, CommandFlow, CommandGetLastMessageId, CommandLookupTopic,
    CommandPong, CommandSubscribe, MessageIdData, MessageMetadata, SingleMessageMetadata,
    base_command::Type,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::TcpStream;

use super::unique;

/// `magicCrc32c`: a checksum follows.
const MAGIC_CRC32C: [u8; 2] = [0x0e, 0x01];
/// The newest protocol the fields used here need (`ProtocolVersion.v19`).
const PROTOCOL_VERSION: i32 = 19;

/// One entry: a batch, or a message sent without one.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// The broker's place for it.
    pub(crate) message_id: MessageIdData,
    /// Of the whole batch: producer name, lowest and highest sequence id, ordering key, …
    pub(crate) metadata: MessageMetadata,
    /// Its messages, in order; none if it is compressed.
    pub(crate) messages: Vec<EntryMessage>,
    /// Bytes of all messages together as they are stored: compressed, if they are.
    pub(crate) stored_bytes: usize,
}

/// One message of an entry.
#[derive(Clone, Debug)]
pub(crate) struct EntryMessage {
    /// As sent in a batch; made from the entry's metadata when there is no batch.
    pub(crate) metadata: SingleMessageMetadata,
    /// The payload's bytes.
    pub(crate) payload: Vec<u8>,
}

/// Reads the entries that `topic` (one partition, or a topic without) has at this moment, from the first to the last.
/// `broker` is `host:port`.
pub(crate) async fn read_entries(broker: &str, topic: &str, deadline: Duration) -> Vec<Entry> {
    tokio::time::timeout(deadline, Box::pin(read(broker, topic)))
        .await
        .unwrap_or_else(|_| panic!("did not come to the end of {topic} within {deadline:?}"))
        .unwrap_or_else(|error| panic!("cannot read {topic}: {error}"))
}

async fn read(broker: &str, topic: &str) -> io::Result<Vec<Entry>> {
    let mut connection = Connection(BufStream::new(TcpStream::connect(broker).await?));
    connection.subscribe(topic).await?;
    let last = connection
        .ask(BaseCommand {
            r#type: Type::GetLastMessageId.into(),
            get_last_message_id: Some(CommandGetLastMessageId {
                consumer_id: 0,
                request_id: 3,
            }),
            ..Default::default()
        })
        .await?
        .get_last_message_id_response
        .ok_or_else(|| bad("no GetLastMessageIdResponse"))?
        .last_message_id;
    let mut entries = Vec::new();
    // "None" is entry -1, which reads as the largest number here.
    if last.entry_id == u64::MAX {
        return Ok(entries);
    }
    // All at once: what is not read yet waits in the sockets.
    connection
        .tell(BaseCommand {
            r#type: Type::Flow.into(),
            flow: Some(CommandFlow {
                consumer_id: 0,
                message_permits: 100_000_000,
            }),
            ..Default::default()
        })
        .await?;
    loop {
        let (command, body) = connection.next().await?;
        let Some(message) = command.message else {
            continue;
        };
        let at = (message.message_id.ledger_id, message.message_id.entry_id);
        entries.push(parse_entry(message.message_id, &body)?);
        if at >= (last.ledger_id, last.entry_id) {
            return Ok(entries);
        }
    }
}

struct Connection(BufStream<TcpStream>);

impl Connection {
    /// Handshake, lookup (it makes a broker that was just started load the topic), subscription from the first message.
    async fn subscribe(&mut self, topic: &str) -> io::Result<()> {
        self.ask(BaseCommand {
            r#type: Type::Connect.into(),
            connect: Some(CommandConnect {
                client_version: "walpost tests".to_owned(),
                protocol_version: Some(PROTOCOL_VERSION),
                ..Default::default()
            }),
            ..Default::default()
        })
        .await?;
        self.ask(BaseCommand {
            r#type: Type::Lookup.into(),
            lookup_topic: Some(CommandLookupTopic {
                topic: topic.to_owned(),
                request_id: 1,
                ..Default::default()
            }),
            ..Default::default()
        })
        .await?;
        self.ask(BaseCommand {
            r#type: Type::Subscribe.into(),
            subscribe: Some(CommandSubscribe {
                topic: topic.to_owned(),
                subscription: unique("wire"),
                sub_type: SubType::Exclusive.into(),
                consumer_id: 0,
                request_id: 2,
                durable: Some(false),
                // `MessageId.earliest` of the clients: (-1, -1).
                start_message_id: Some(MessageIdData {
                    ledger_id: u64::MAX,
                    entry_id: u64::MAX,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
        .await?;
        Ok(())
    }

    /// Sends a command and returns the next one that comes, which is its answer: nothing else has been asked for.
    async fn ask(&mut self, command: BaseCommand) -> io::Result<BaseCommand> {
        self.tell(command).await?;
        loop {
            let (answer, _) = self.next().await?;
            if let Some(error) = answer.error {
                return Err(bad(&error.message));
            }
            // Sent beside the answer to a subscription, and of no interest.
            if answer.active_consumer_change.is_none() {
                return Ok(answer);
            }
        }
    }

    async fn tell(&mut self, command: BaseCommand) -> io::Result<()> {
        self.0.write_all(&command_frame(&command)).await?;
        self.0.flush().await
    }

    /// The next command and what follows it in its frame; answers the broker's pings.
    async fn next(&mut self) -> io::Result<(BaseCommand, Vec<u8>)> {
        loop {
            let mut frame = vec![0; self.0.read_u32().await? as usize];
            self.0.read_exact(&mut frame).await?;
            let mut rest = frame.as_slice();
            let command = BaseCommand::decode(sized(&mut rest)?).map_err(io::Error::other)?;
            if command.ping.is_none() {
                return Ok((command, rest.to_vec()));
            }
            self.tell(BaseCommand {
                r#type: Type::Pong.into(),
                pong: Some(CommandPong {}),
                ..Default::default()
            })
            .await?;
        }
    }
}

/// A command as it goes over the wire.
pub(super) fn command_frame(command: &impl prost::Message) -> Vec<u8> {
    let body = command.encode_to_vec();
    let size = u32::try_from(body.len()).expect("no test's command is that long");
    [&(size + 4).to_be_bytes(), &size.to_be_bytes(), &body[..]].concat()
}

/// Reads what follows the command in a frame that carries an entry; an error says what is wrong with it.
pub(crate) fn parse_entry(message_id: MessageIdData, body: &[u8]) -> io::Result<Entry> {
    let mut rest = body;
    if take(&mut rest, 2)? != MAGIC_CRC32C {
        return Err(bad("an entry without a checksum"));
    }
    let sent = take_u32(&mut rest)?;
    if crc32c::crc32c(rest) != sent {
        return Err(bad("an entry whose checksum is wrong"));
    }
    let metadata = MessageMetadata::decode(sized(&mut rest)?).map_err(io::Error::other)?;
    let stored_bytes = rest.len();
    let mut messages = Vec::new();
    if metadata.compression.unwrap_or_default() != 0 {
        // Whoever expects messages here finds none and says so.
    } else if metadata.num_messages_in_batch.is_none() {
        messages.push(EntryMessage {
            metadata: SingleMessageMetadata {
                properties: metadata.properties.clone(),
                partition_key: metadata.partition_key.clone(),
                ordering_key: metadata.ordering_key.clone(),
                event_time: metadata.event_time,
                sequence_id: Some(metadata.sequence_id),
                null_value: metadata.null_value,
                ..Default::default()
            },
            payload: rest.to_vec(),
        });
    } else {
        while !rest.is_empty() {
            let single =
                SingleMessageMetadata::decode(sized(&mut rest)?).map_err(io::Error::other)?;
            let size = usize::try_from(single.payload_size).map_err(|_| bad("negative size"))?;
            messages.push(EntryMessage {
                payload: take(&mut rest, size)?.to_vec(),
                metadata: single,
            });
        }
        if i32::try_from(messages.len()).ok() != metadata.num_messages_in_batch {
            return Err(bad(
                "a batch that does not hold as many messages as it says",
            ));
        }
    }
    Ok(Entry {
        message_id,
        metadata,
        messages,
        stored_bytes,
    })
}

/// Takes `[size u32][bytes]` off the front.
pub(crate) fn sized<'a>(rest: &mut &'a [u8]) -> io::Result<&'a [u8]> {
    let size = take_u32(rest)?;
    take(rest, size as usize)
}

fn take_u32(rest: &mut &[u8]) -> io::Result<u32> {
    let bytes = take(rest, 4)?;
    Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> io::Result<&'a [u8]> {
    let (taken, left) = rest
        .split_at_checked(length)
        .ok_or_else(|| bad("cut short"))?;
    *rest = left;
    Ok(taken)
}

fn bad(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}
