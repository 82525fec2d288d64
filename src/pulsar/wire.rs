//! Frames of Pulsar's binary protocol: commands in both directions, and message batches written by hand.
//!
//! Everything on the wire is big-endian and one of two shapes (Pulsar documentation, "Binary protocol"):
//!
//! ```text
//! command:  [u32 total][u32 command size][BaseCommand]
//! send:     [u32 total][u32 command size][BaseCommand][u16 0x0e01][u32 crc32c][u32 metadata size][MessageMetadata][payload]
//!                                                                             '------------ checked by the crc ----------'
//! payload of a batch, once per message:  [u32 size][SingleMessageMetadata][message bytes]
//! ```
//!
//! `total` counts what follows it. Commands are rare and go through the pulsar crate's generated types. Batches are the
//! hot path and are written field by field into a buffer that is also the frame: the messages are appended behind a gap
//! ([`headroom`]), and when the batch is sealed its header is written into the end of that gap, so no byte moves twice.
//! The field numbers are those of `PulsarApi.proto`; the tests read every frame back with the generated types.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use pulsar::message::proto::{
    BaseCommand, CompressionType, MessageMetadata, SingleMessageMetadata,
};

use super::compression::Codec;

/// Marks a frame that carries a checksum.
const MAGIC: u16 = 0x0e01;
/// No command of a broker is near this; a larger "size" is garbage, and believing it would eat the memory.
const MAX_COMMAND_FRAME_BYTES: usize = 16 * 1024 * 1024;

// Wire types of the protobuf encoding.
const VARINT: u64 = 0;
const LENGTH_DELIMITED: u64 = 2;

const fn tag(field: u64, wire_type: u64) -> u64 {
    field << 3 | wire_type
}

/// Bytes that `value` takes as a protobuf varint.
const fn varint_len(value: u64) -> usize {
    // Nearly all are lengths of short texts, and tags.
    if value < 0x80 {
        return 1;
    }
    (70 - value.leading_zeros() as usize) / 7
}

fn put_varint(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    buffer.push(value.to_le_bytes()[0]);
}

/// Both numbers that begin a field: its tag, and its value or the length of what follows. Nearly always they have a byte each
/// and are written in one piece: a row has a dozen of them, and each piece asks whether there is room.
#[inline]
fn put_pair(buffer: &mut Vec<u8>, tag: u64, value: u64) {
    if tag < 0x80 && value < 0x80 {
        buffer.extend_from_slice(&[tag.to_le_bytes()[0], value.to_le_bytes()[0]]);
    } else {
        put_varint(buffer, tag);
        put_varint(buffer, value);
    }
}

#[inline]
fn put_number(buffer: &mut Vec<u8>, field: u64, value: u64) {
    put_pair(buffer, tag(field, VARINT), value);
}

#[inline]
fn put_length(buffer: &mut Vec<u8>, field: u64, length: usize) {
    put_pair(buffer, tag(field, LENGTH_DELIMITED), length as u64);
}

#[inline]
fn put_bytes(buffer: &mut Vec<u8>, field: u64, value: &[u8]) {
    put_length(buffer, field, value.len());
    buffer.extend_from_slice(value);
}

const fn bytes_len(field: u64, len: usize) -> usize {
    varint_len(tag(field, LENGTH_DELIMITED)) + varint_len(len as u64) + len
}

/// A command frame, ready to be written.
pub(super) fn encode_command(command: &BaseCommand) -> Bytes {
    let size = command.encoded_len();
    let mut frame = BytesMut::with_capacity(8 + size);
    frame.put_u32(length(size + 4));
    frame.put_u32(length(size));
    command
        .encode(&mut frame)
        .expect("the buffer has room: its size was asked for");
    frame.freeze()
}

/// The question how many partitions a topic has. `create`: a broker that makes topics on first use may make this one. (The pulsar crate's
/// definitions are older than that field, `metadata_auto_creation_enabled`.)
pub(super) fn encode_partitions_question(topic: &str, request_id: u64, create: bool) -> Bytes {
    let mut question = Vec::with_capacity(topic.len() + 16);
    put_bytes(&mut question, 1, topic.as_bytes());
    put_number(&mut question, 2, request_id);
    put_number(&mut question, 6, u64::from(create));
    let mut command = Vec::with_capacity(question.len() + 8);
    put_number(&mut command, 1, PARTITIONED_METADATA);
    put_bytes(&mut command, PARTITIONED_METADATA, &question);
    let mut frame = BytesMut::with_capacity(8 + command.len());
    frame.put_u32(length(command.len() + 4));
    frame.put_u32(length(command.len()));
    frame.put_slice(&command);
    frame.freeze()
}

/// `BaseCommand.Type.PARTITIONED_METADATA`, and the number of its field.
const PARTITIONED_METADATA: u64 = 21;

/// Takes the next command off `buffer`; `None` while it is incomplete.
pub(super) fn decode_command(buffer: &mut BytesMut) -> Result<Option<Incoming>, FrameError> {
    decode_frame(buffer, MAX_COMMAND_FRAME_BYTES)
}

/// The same for a broker whose frames may be larger, because its messages may.
pub(super) fn decode_frame(
    buffer: &mut BytesMut,
    max_frame_bytes: usize,
) -> Result<Option<Incoming>, FrameError> {
    let Some(total) = buffer.first_chunk::<4>() else {
        return Ok(None);
    };
    let total = u32::from_be_bytes(*total) as usize;
    if !(4..=max_frame_bytes.max(MAX_COMMAND_FRAME_BYTES)).contains(&total) {
        return Err(FrameError::Size(total));
    }
    if buffer.len() < 4 + total {
        // The rest of a large frame in few reads.
        buffer.reserve(4 + total - buffer.len());
        return Ok(None);
    }
    let frame = buffer.split_to(4 + total);
    let (size, body) = frame[4..]
        .split_first_chunk::<4>()
        .ok_or(FrameError::Size(total))?;
    let size = u32::from_be_bytes(*size) as usize;
    let body = body.get(..size).ok_or(FrameError::Size(size))?;
    let command = BaseCommand::decode(body).map_err(FrameError::Command)?;
    let is_newer = command.close_producer.is_some()
        || command.close_consumer.is_some()
        || command.r#type == TOPIC_MIGRATED;
    let newer = if is_newer {
        Newer::decode(body).map_err(FrameError::Command)?
    } else {
        Newer::default()
    };
    let closed = newer.close_producer.or(newer.close_consumer);
    let migrated = newer.topic_migrated;
    let body = if command.message.is_some() {
        frame.freeze().slice(8 + size..)
    } else {
        Bytes::new()
    };
    Ok(Some(Incoming {
        command,
        next_broker: closed
            .and_then(|closed| NextBroker::new(closed.broker_url, closed.broker_url_tls, false)),
        migrated: migrated.and_then(Migrated::new),
        body,
    }))
}

/// A command of the broker's.
#[derive(Debug, PartialEq)]
pub(super) struct Incoming {
    pub command: BaseCommand,
    /// With a closed producer or consumer: which broker has its topic next, if the closing one knows.
    pub next_broker: Option<NextBroker>,
    /// A topic has moved to another cluster (a command that `command` has no field for).
    pub migrated: Option<Migrated>,
    /// With a message: what follows the command in its frame.
    pub body: Bytes,
}

/// Where a closed producer's or consumer's topic is next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NextBroker {
    pub url: Option<String>,
    pub url_tls: Option<String>,
    /// The addresses are those of another cluster's service: the topic's broker must be looked up there.
    pub is_cluster: bool,
}

impl NextBroker {
    /// `None` where no address is named.
    fn new(url: Option<String>, url_tls: Option<String>, is_cluster: bool) -> Option<Self> {
        (url.is_some() || url_tls.is_some()).then_some(Self {
            url,
            url_tls,
            is_cluster,
        })
    }
}

/// A topic has moved to another cluster; the broker then closes this producer or consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Migrated {
    pub resource_id: u64,
    pub is_consumer: bool,
    pub next: NextBroker,
}

impl Migrated {
    fn new(said: TopicMigrated) -> Option<Self> {
        Some(Self {
            resource_id: said.resource_id,
            is_consumer: said.resource_type == CONSUMER,
            next: NextBroker::new(said.broker_url, said.broker_url_tls, true)?,
        })
    }
}

/// `BaseCommand.Type.TOPIC_MIGRATED`.
const TOPIC_MIGRATED: i32 = 68;
/// `CommandTopicMigrated.ResourceType.Consumer`.
const CONSUMER: i32 = 1;

/// The fields of `BaseCommand` that are newer than the pulsar crate's definitions, or have newer fields.
#[derive(Clone, PartialEq, prost::Message)]
struct Newer {
    #[prost(message, optional, tag = "15")]
    close_producer: Option<Closed>,
    #[prost(message, optional, tag = "16")]
    close_consumer: Option<Closed>,
    #[prost(message, optional, tag = "68")]
    topic_migrated: Option<TopicMigrated>,
}

/// The fields of `CommandCloseProducer` and `CommandCloseConsumer` since Pulsar 3.1.
#[derive(Clone, PartialEq, prost::Message)]
struct Closed {
    #[prost(string, optional, tag = "3")]
    broker_url: Option<String>,
    #[prost(string, optional, tag = "4")]
    broker_url_tls: Option<String>,
}

/// `CommandTopicMigrated`, since protocol version 20.
#[derive(Clone, PartialEq, prost::Message)]
struct TopicMigrated {
    #[prost(uint64, required, tag = "1")]
    resource_id: u64,
    #[prost(int32, required, tag = "2")]
    resource_type: i32,
    #[prost(string, optional, tag = "3")]
    broker_url: Option<String>,
    #[prost(string, optional, tag = "4")]
    broker_url_tls: Option<String>,
}

/// Bytes from the broker that are no frame of the protocol.
#[derive(Debug)]
pub(super) enum FrameError {
    Size(usize),
    Command(prost::DecodeError),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(size) => write!(f, "a frame with an impossible size of {size} bytes"),
            Self::Command(error) => write!(f, "a frame that holds no command: {error}"),
        }
    }
}

/// One message of a batch, without its payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Single<'a> {
    pub key: &'a str,
    pub event_time_ms: u64,
    pub sequence_id: u64,
    /// `None` is a tombstone: no bytes, and `null_value` set.
    pub payload: Option<&'a [u8]>,
}

/// Bytes of one property, without its tag and length.
fn property_len(name: &str, value: &str) -> usize {
    bytes_len(1, name.len()) + bytes_len(2, value.len())
}

impl Single<'_> {
    /// Writes the `SingleMessageMetadata` into `metadata`, in place of what was there.
    ///
    /// Not into the batch at once: whether the message belongs into this one depends on its size.
    pub(super) fn encode_metadata<'p>(
        &self,
        properties: impl Iterator<Item = (&'p str, &'p str)>,
        metadata: &mut Vec<u8>,
    ) {
        metadata.clear();
        properties.for_each(|(name, value)| {
            put_length(metadata, 1, property_len(name, value));
            put_bytes(metadata, 1, name.as_bytes());
            put_bytes(metadata, 2, value.as_bytes());
        });
        put_bytes(metadata, 2, self.key.as_bytes());
        put_number(metadata, 3, self.payload.map_or(0, <[u8]>::len) as u64);
        put_number(metadata, 5, self.event_time_ms);
        put_number(metadata, 8, self.sequence_id);
        if self.payload.is_none() {
            put_number(metadata, 9, 1);
        }
    }

    /// Bytes the message takes in a batch.
    pub(super) fn entry_len(&self, metadata: &[u8]) -> usize {
        4 + metadata.len() + self.payload.map_or(0, <[u8]>::len)
    }

    /// Appends the message to the batch: its metadata and its payload.
    pub(super) fn append(&self, metadata: &[u8], buffer: &mut BytesMut) {
        // Once for all three pieces.
        buffer.reserve(self.entry_len(metadata));
        buffer.put_u32(length(metadata.len()));
        buffer.put_slice(metadata);
        buffer.put_slice(self.payload.unwrap_or_default());
    }
}

/// What the header of a batch says.
#[derive(Clone, Copy, Debug)]
pub(super) struct BatchHeader<'a> {
    pub producer_id: u64,
    pub producer_name: &'a str,
    /// The lane: dispatch key of the whole entry, so that a `Key_Shared` subscription never splits a lane.
    pub ordering_key: &'a [u8],
    pub lowest_sequence_id: u64,
    pub highest_sequence_id: u64,
    pub messages: u32,
    pub publish_time_ms: u64,
    /// Delayed delivery is a property of the entry, so such a message travels alone.
    pub deliver_at_ms: Option<i64>,
    /// The schema version that the broker gave the producer.
    pub schema_version: Option<&'a [u8]>,
    /// How the messages were compressed, and their size before; `None`: they are as they are.
    pub compressed: Option<(CompressionType, usize)>,
}

/// Schema versions are 8 bytes in Pulsar (a big-endian number); there is room for twice that, and no longer one is used.
pub(super) const MAX_SCHEMA_VERSION_BYTES: usize = 16;

/// What a lane may add to its producer's name (`~` and a u32).
const MAX_RENAME_BYTES: usize = 11;

/// Room to leave in front of the messages for the largest header of this producer: sizes, magic and crc take 22 bytes,
/// `CommandSend` at most 56, the numbers of `MessageMetadata` at most 72, and each string three more than its length.
pub(super) fn headroom(producer_name: &str, ordering_key: &[u8]) -> usize {
    168 + producer_name.len() + MAX_RENAME_BYTES + ordering_key.len() + MAX_SCHEMA_VERSION_BYTES
}

/// What follows the command in a message's frame: metadata and payload, as they were sent. `None` for bytes that are no such
/// thing, or that were damaged on the way.
pub(super) fn entry(mut body: Bytes) -> Option<(MessageMetadata, Bytes)> {
    if body.first_chunk::<2>()? == &MAGIC.to_be_bytes() {
        let checksum = u32_at(&body, 2)?;
        body = body.slice(6..);
        if crc32c::crc32c(&body) as usize != checksum {
            return None;
        }
    }
    let payload_at = 4 + u32_at(&body, 0)?;
    let metadata = MessageMetadata::decode(body.get(4..payload_at)?).ok()?;
    Some((metadata, body.slice(payload_at..)))
}

/// The lowest sequence id of a batch's frame.
pub(super) fn sequence_id(frame: &[u8]) -> Option<u64> {
    let size = u32::from_be_bytes(*frame.get(4..)?.first_chunk::<4>()?) as usize;
    let command = BaseCommand::decode(frame.get(8..8 + size)?).ok()?;
    Some(command.send?.sequence_id)
}

/// Turns `buffer` (a gap of `headroom` bytes, then the messages) into the finished frame. `scratch` is reused.
pub(super) fn seal(
    buffer: BytesMut,
    headroom: usize,
    header: &BatchHeader<'_>,
    scratch: &mut Vec<u8>,
) -> Bytes {
    let payload = &buffer[headroom..];

    scratch.clear();
    put_bytes(scratch, 1, header.producer_name.as_bytes());
    put_number(scratch, 2, header.lowest_sequence_id);
    put_number(scratch, 3, header.publish_time_ms);
    if let Some((compression, uncompressed_bytes)) = header.compressed {
        put_number(scratch, 8, u64::from((compression as i32).cast_unsigned()));
        put_number(scratch, 9, uncompressed_bytes as u64);
    }
    put_number(scratch, 11, u64::from(header.messages));
    if let Some(version) = header.schema_version {
        put_bytes(scratch, 16, version);
    }
    put_bytes(scratch, 18, header.ordering_key);
    if let Some(at_ms) = header.deliver_at_ms {
        put_number(scratch, 19, at_ms.cast_unsigned());
    }
    put_number(scratch, 24, header.highest_sequence_id);
    let metadata_len = scratch.len();

    let checksum = crc32c::crc32c(&length(metadata_len).to_be_bytes());
    let checksum = crc32c::crc32c_append(checksum, scratch);
    let checksum = crc32c::crc32c_append(checksum, payload);

    let ids = (header.lowest_sequence_id, header.highest_sequence_id);
    let send_len = put_send(scratch, header.producer_id, ids, header.messages);
    let (metadata, command) = scratch.split_at(metadata_len);
    let (send, before_send) = command.split_at(send_len);
    let header_len = 4 + 4 + command.len() + 2 + 4 + 4 + metadata_len;
    assert!(
        header_len <= headroom,
        "the header outgrew the room left for it"
    );

    let mut frame = buffer;
    let start = headroom - header_len;
    let total = frame.len() - start - 4;
    let mut gap = &mut frame[start..headroom];
    gap.put_u32(length(total));
    gap.put_u32(length(command.len()));
    gap.put_slice(before_send);
    gap.put_slice(send);
    gap.put_u16(MAGIC);
    gap.put_u32(checksum);
    gap.put_u32(length(metadata_len));
    gap.put_slice(metadata);

    let _unused_gap = frame.split_to(start);
    frame.freeze()
}

/// Appends `CommandSend`, and what of `BaseCommand` stands before it; returns the length of the first.
fn put_send(scratch: &mut Vec<u8>, producer_id: u64, ids: (u64, u64), messages: u32) -> usize {
    let start = scratch.len();
    put_number(scratch, 1, producer_id);
    put_number(scratch, 2, ids.0);
    put_number(scratch, 3, u64::from(messages));
    put_number(scratch, 6, ids.1);
    let send_len = scratch.len() - start;
    put_number(scratch, 1, SEND);
    put_length(scratch, 6, send_len);
    send_len
}

/// The same frame for another producer id: what stands behind the command stays as it is, byte for byte.
pub(super) fn readdress(frame: &Bytes, producer_id: u64, ids: (u64, u64), messages: u32) -> Bytes {
    let rest = &frame[frame.len() - entry_len(frame)..];
    let mut scratch = Vec::with_capacity(64);
    let send_len = put_send(&mut scratch, producer_id, ids, messages);
    let (send, before_send) = scratch.split_at(send_len);
    let mut readdressed = BytesMut::with_capacity(8 + scratch.len() + rest.len());
    readdressed.put_u32(length(4 + scratch.len() + rest.len()));
    readdressed.put_u32(length(scratch.len()));
    readdressed.put_slice(before_send);
    readdressed.put_slice(send);
    readdressed.put_slice(rest);
    readdressed.freeze()
}

/// Bytes of a finished frame behind its command.
pub(super) fn entry_len(frame: &Bytes) -> usize {
    let command_len = u32_at(frame, 4).expect("a frame of ours has a command");
    frame.len() - 8 - command_len
}

/// `BaseCommand.Type.SEND`.
const SEND: u64 = 6;

/// Frames are far below 4 GiB: the broker's `max_message_size` is an i32, and no batch is sealed above it.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("frames are bounded by the broker's max_message_size")
}

/// The payload of a finished frame as it was before compression; `None` for bytes that are no frame of ours.
pub(super) fn payload_of(frame: &Bytes) -> Option<Bytes> {
    let command_len = u32_at(frame, 4)?;
    let metadata_at = 8 + command_len + 2 + 4;
    let metadata_len = u32_at(frame, metadata_at)?;
    let payload_at = metadata_at + 4 + metadata_len;
    let metadata = MessageMetadata::decode(frame.get(metadata_at + 4..payload_at)?).ok()?;
    let payload = frame.slice(payload_at..);
    Codec::of_wire(metadata.compression())
        .decompress(payload, metadata.uncompressed_size() as usize)
}

/// The messages of a batch's (uncompressed) payload, one `(SingleMessageMetadata, whole entry)` each: for the rare paths
/// that look into a batch again (naming its rows in an error, splitting it at a deduplication boundary).
pub(super) fn messages(mut payload: Bytes) -> impl Iterator<Item = (SingleMessageMetadata, Bytes)> {
    std::iter::from_fn(move || {
        let size = u32_at(&payload, 0)?;
        let metadata = SingleMessageMetadata::decode(payload.get(4..4 + size)?).ok()?;
        let entry_len = 4 + size + usize::try_from(metadata.payload_size).ok()?;
        if entry_len > payload.len() {
            return None;
        }
        Some((metadata, payload.split_to(entry_len)))
    })
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<usize> {
    let word = bytes.get(offset..)?.first_chunk::<4>()?;
    usize::try_from(u32::from_be_bytes(*word)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use pulsar::message::proto::base_command;

    #[derive(Debug, Clone)]
    struct Event {
        key: String,
        time: u64,
        sequence: u64,
        payload: Option<Vec<u8>>,
        properties: Vec<(String, String)>,
    }

    fn event() -> impl Strategy<Value = Event> {
        let text = || "[a-zé]{0,200}";
        (
            text(),
            any::<u64>(),
            any::<u64>(),
            prop::option::of(prop::collection::vec(any::<u8>(), 0..300)),
            prop::collection::vec((text(), text()), 0..4),
        )
            .prop_map(|(key, time, sequence, payload, properties)| Event {
                key,
                time,
                sequence,
                payload,
                properties,
            })
    }

    fn frame_of(events: &[Event], header: &BatchHeader<'_>) -> Bytes {
        let room = headroom(header.producer_name, header.ordering_key);
        let mut buffer = BytesMut::zeroed(room);
        let mut metadata = Vec::new();
        for event in events {
            let single = Single {
                key: &event.key,
                event_time_ms: event.time,
                sequence_id: event.sequence,
                payload: event.payload.as_deref(),
            };
            let properties = event
                .properties
                .iter()
                .map(|(n, v)| (n.as_str(), v.as_str()));
            let before = buffer.len();
            single.encode_metadata(properties, &mut metadata);
            single.append(&metadata, &mut buffer);
            assert_eq!(buffer.len() - before, single.entry_len(&metadata));
        }
        seal(buffer, room, header, &mut Vec::new())
    }

    proptest! {
        /// Every frame we write says, read by the generated types, what was put in.
        #[test]
        fn frames_read_back(
            events in prop::collection::vec(event(), 1..20),
            ids in (any::<u64>(), any::<u64>(), any::<u64>()),
            time in any::<u64>(),
            deliver_at in prop::option::of(any::<i64>()),
            name in "[a-z0-9-]{1,120}",
            lane in any::<u32>(),
            version in prop::option::of(prop::collection::vec(any::<u8>(), 0..=MAX_SCHEMA_VERSION_BYTES)),
        ) {
            let header = BatchHeader {
                producer_id: ids.0, producer_name: &name, ordering_key: &lane.to_be_bytes(),
                lowest_sequence_id: ids.1, highest_sequence_id: ids.2,
                messages: events.len() as u32, publish_time_ms: time, deliver_at_ms: deliver_at,
                schema_version: version.as_deref(), compressed: None,
            };
            let frame = frame_of(&events, &header);

            let u32_at = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap()) as usize;
            prop_assert_eq!(u32_at(0), frame.len() - 4);
            let command_end = 8 + u32_at(4);
            let command = BaseCommand::decode(&frame[8..command_end]).unwrap();
            prop_assert_eq!(command.r#type, base_command::Type::Send as i32);
            let send = command.send.unwrap();
            prop_assert_eq!((send.producer_id, send.sequence_id, send.highest_sequence_id.unwrap()), ids);
            prop_assert_eq!(send.num_messages.unwrap() as usize, events.len());
            prop_assert_eq!(&frame[command_end..command_end + 2], &[0x0e, 0x01]);
            prop_assert_eq!(u32_at(command_end + 2), crc32c::crc32c(&frame[command_end + 6..]) as usize);
            let metadata_at = command_end + 10;
            let metadata = MessageMetadata::decode(&frame[metadata_at..metadata_at + u32_at(command_end + 6)]).unwrap();
            prop_assert_eq!(&metadata.producer_name, &name);
            prop_assert_eq!((metadata.sequence_id, metadata.highest_sequence_id.unwrap()), (ids.1, ids.2));
            prop_assert_eq!(metadata.publish_time, time);
            prop_assert_eq!(metadata.num_messages_in_batch.unwrap() as usize, events.len());
            prop_assert_eq!(metadata.ordering_key.as_deref().unwrap(), lane.to_be_bytes());
            prop_assert_eq!(metadata.deliver_at_time, deliver_at);
            prop_assert_eq!(metadata.compression, None);
            prop_assert_eq!(&metadata.schema_version, &version);

            // What a consumer gets is what stands behind the command; a flipped bit is noticed.
            let body = frame.slice(command_end..);
            prop_assert_eq!(entry(body.clone()).unwrap().0, metadata);
            let mut damaged = body.to_vec();
            *damaged.last_mut().unwrap() ^= 1;
            prop_assert!(entry(damaged.into()).is_none());

            let read: Vec<_> = messages(payload_of(&frame).unwrap()).collect();
            prop_assert_eq!(read.len(), events.len());
            for ((single, entry), event) in read.iter().zip(&events) {
                let payload = event.payload.clone().unwrap_or_default();
                prop_assert!(entry.ends_with(&payload));
                prop_assert_eq!(single.payload_size as usize, payload.len());
                prop_assert_eq!(single.null_value.unwrap_or(false), event.payload.is_none());
                prop_assert_eq!(single.partition_key.as_ref(), Some(&event.key));
                prop_assert_eq!(single.event_time, Some(event.time));
                prop_assert_eq!(single.sequence_id, Some(event.sequence));
                let properties: Vec<_> = single.properties.iter().map(|p| (p.key.clone(), p.value.clone())).collect();
                prop_assert_eq!(&properties, &event.properties);
            }
        }

        /// Whatever a broken peer sends: an answer or an error, no panic.
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode_command(&mut buffer) {}
            let bytes = Bytes::from(bytes);
            let _no_entry = entry(bytes.clone());
            let _no_frame = payload_of(&bytes);
            messages(bytes).count();
        }
    }

    #[test]
    fn varints_of_every_length_are_those_of_protobuf() {
        let around = (0..64).flat_map(|bit| [(1_u64 << bit) - 1, 1 << bit, (1 << bit) + 1]);
        for value in around.chain([u64::MAX, 0x0123_4567_89ab_cdef, 1_750_000_000_000]) {
            let (mut ours, mut theirs) = (vec![7], vec![7]);
            put_varint(&mut ours, value);
            prost::encoding::encode_varint(value, &mut theirs);
            assert_eq!(ours, theirs, "{value}");
            assert_eq!(ours.len(), 1 + varint_len(value), "{value}");
        }
    }

    #[test]
    fn a_command_is_read_only_when_whole() {
        let command = BaseCommand {
            r#type: base_command::Type::Ping as i32,
            ping: Some(pulsar::message::proto::CommandPing {}),
            ..BaseCommand::default()
        };
        let frame = encode_command(&command);
        for cut in 0..frame.len() {
            assert!(
                decode_command(&mut BytesMut::from(&frame[..cut]))
                    .unwrap()
                    .is_none()
            );
        }
        let mut twice = BytesMut::from(&[&frame[..], &frame[..]].concat()[..]);
        for _ in 0..2 {
            let incoming = decode_command(&mut twice).unwrap().unwrap();
            assert_eq!(incoming.command, command);
        }
        assert!(twice.is_empty());
    }

    /// A command of the crate's definitions and one of the newer ones, in one frame: two encodings, one after the other, are
    /// merged by whoever reads them.
    fn merged(command: &BaseCommand, newer: &Newer) -> Incoming {
        let body = [command.encode_to_vec(), newer.encode_to_vec()].concat();
        let mut frame = BytesMut::new();
        frame.put_u32(length(body.len() + 4));
        frame.put_u32(length(body.len()));
        frame.put_slice(&body);
        decode_command(&mut frame).unwrap().unwrap()
    }

    #[test]
    fn what_is_closed_names_the_next_broker_if_the_broker_does() {
        let url = || Some("pulsar://10.0.0.2:6650".to_owned());
        let closed = |broker_url| {
            Some(Closed {
                broker_url,
                broker_url_tls: None,
            })
        };
        let producer = BaseCommand {
            r#type: base_command::Type::CloseProducer as i32,
            close_producer: Some(pulsar::message::proto::CommandCloseProducer {
                producer_id: 7,
                request_id: u64::MAX,
            }),
            ..BaseCommand::default()
        };
        let consumer = BaseCommand {
            r#type: base_command::Type::CloseConsumer as i32,
            close_consumer: Some(pulsar::message::proto::CommandCloseConsumer {
                consumer_id: 8,
                request_id: u64::MAX,
            }),
            ..BaseCommand::default()
        };
        let next = Some(NextBroker {
            url: url(),
            ..NextBroker::default()
        });
        let newer = Newer {
            close_producer: closed(url()),
            ..Newer::default()
        };
        let incoming = merged(&producer, &newer);
        assert_eq!(incoming.command.close_producer.unwrap().producer_id, 7);
        assert_eq!(incoming.next_broker, next);
        let newer = Newer {
            close_consumer: closed(url()),
            ..Newer::default()
        };
        let incoming = merged(&consumer, &newer);
        assert_eq!(incoming.command.close_consumer.unwrap().consumer_id, 8);
        assert_eq!(incoming.next_broker, next);
        assert_eq!(merged(&producer, &Newer::default()).next_broker, None);
    }

    #[test]
    fn a_topic_that_has_moved_names_its_cluster() {
        let moved = |resource_type, broker_url: Option<&str>| {
            let command = BaseCommand {
                r#type: TOPIC_MIGRATED,
                ..BaseCommand::default()
            };
            let newer = Newer {
                topic_migrated: Some(TopicMigrated {
                    resource_id: 7,
                    resource_type,
                    broker_url: broker_url.map(str::to_owned),
                    broker_url_tls: None,
                }),
                ..Newer::default()
            };
            merged(&command, &newer).migrated
        };
        let url = "pulsar://10.0.0.2:6650";
        let expected = |is_consumer| Migrated {
            resource_id: 7,
            is_consumer,
            next: NextBroker {
                url: Some(url.to_owned()),
                url_tls: None,
                is_cluster: true,
            },
        };
        assert_eq!(moved(0, Some(url)), Some(expected(false)));
        assert_eq!(moved(CONSUMER, Some(url)), Some(expected(true)));
        assert_eq!(moved(0, None), None);
    }

    #[test]
    fn the_ids_of_a_frame_are_read_back() {
        let header = BatchHeader {
            producer_id: 300,
            producer_name: "p",
            ordering_key: &[0],
            lowest_sequence_id: 1 << 40,
            highest_sequence_id: (1 << 40) + 5,
            messages: 6,
            publish_time_ms: 1,
            deliver_at_ms: None,
            schema_version: None,
            compressed: None,
        };
        let gap = headroom("p", &[0]);
        let frame = seal(BytesMut::zeroed(gap), gap, &header, &mut Vec::new());
        assert_eq!(sequence_id(&frame), Some(1 << 40));
        assert_eq!(sequence_id(&frame[..9]), None);
    }
}
