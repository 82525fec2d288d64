//! A message as handlers and the inbox's tables have it.
//!
//! Owns nothing. Input: a message of the pulsar crate's consumer. Output: a [`Message`], and what the tables can hold of it.
//!
//! # Which messages are the same
//!
//! Those with the same id and the same source ([`Message::source`]). An id that is a UUID is unique wherever it was made: it has no
//! source. Any other id (a number, mostly) is unique in its own table only, and another table, or the same one of another
//! database, counts from 1 too. So its source is the topic it comes in.
//!
//! * A partitioned topic counts as one: how many partitions it has may change, and with that the partition of a key.
//! * A message that is resent, retried or replayed comes in the same topic. A replay into another topic, and the copy in a
//!   dead-letter topic, are messages of their own: who consumes both topics under one name does the work for each.
//!
//! Earlier versions knew no source. A claim of theirs counts for every source (see `sql/13_inbox.sql`).

use std::borrow::Cow;
use std::fmt::Write as _;

use ring::digest::{SHA256, digest};

/// The longest id that is stored as it is, and the longest source: with the consumer's name they fit into an index entry (some
/// 2.7 kB).
pub(super) const ID_BYTES: usize = 1000;
const SOURCE_BYTES: usize = 500;
/// What begins the substitute of an id that the tables cannot hold.
const SUBSTITUTE: &str = "walpost-sha256:";

/// A message, as far as a handler needs it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The property `id`, which walpost sets; a message without one, or with an empty one, has its topic and place, which a
    /// resend changes.
    pub id: String,
    /// The topic, or partition.
    pub topic: String,
    /// Its place there: `ledger:entry:index in the batch`.
    pub message_id: String,
    /// The key.
    pub key: Option<String>,
    /// The payload. (A tombstone in a batch is empty here: the pulsar crate does not tell the two apart.)
    pub payload: Vec<u8>,
    /// All properties.
    pub properties: Vec<(String, String)>,
    /// Milliseconds since 1970.
    pub event_time_ms: Option<u64>,
}

impl Message {
    /// What `walpost.inbox` and `walpost.inbox_poison` have for [`Message::id`]: the same, where they can hold it.
    ///
    /// An index entry of Postgres holds some 2.7 kB, and text no NUL. An id with NUL or of more than 1,000 bytes is replaced by
    /// `walpost-sha256:` and its SHA-256 in hexadecimal digits, and so is one that begins like that: no two ids become one. For an
    /// empty id it is topic and place, as for a message without one.
    pub fn inbox_id(&self) -> Cow<'_, str> {
        let id = if self.id.is_empty() {
            Cow::Owned(self.place())
        } else {
            Cow::Borrowed(self.id.as_str())
        };
        held(id, ID_BYTES)
    }

    /// Where the id is unique: see the module's documentation. Empty: everywhere.
    pub fn source(&self) -> Cow<'_, str> {
        if self.id.is_empty() || is_uuid(&self.id) || self.id == self.place() {
            return Cow::Borrowed("");
        }
        held(whole_topic(&self.topic), SOURCE_BYTES)
    }

    fn place(&self) -> String {
        topic_and_place(&self.topic, &self.message_id)
    }

    /// All properties as JSON.
    pub(super) fn properties_json(&self) -> String {
        let properties: serde_json::Map<String, serde_json::Value> = self
            .properties
            .iter()
            .map(|(name, value)| (name.clone(), value.clone().into()))
            .collect();
        serde_json::Value::Object(properties).to_string()
    }
}

/// In its usual form, 8-4-4-4-12 hexadecimal digits, as Postgres prints it.
fn is_uuid(id: &str) -> bool {
    id.len() == 36
        && id.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// The full name of the topic of which this is a partition, or of the topic itself.
fn whole_topic(topic: &str) -> Cow<'_, str> {
    let whole = topic.rsplit_once("-partition-").filter(|(_, number)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    let topic = whole.map_or(topic, |(topic, _)| topic);
    if topic.contains("://") {
        Cow::Borrowed(topic)
    } else if topic.contains('/') {
        Cow::Owned(format!("persistent://{topic}"))
    } else {
        Cow::Owned(format!("persistent://public/default/{topic}"))
    }
}

/// The text itself, or what stands for it where the tables cannot hold it.
fn held(text: Cow<'_, str>, longest: usize) -> Cow<'_, str> {
    if text.len() <= longest && !text.contains('\0') && !text.starts_with(SUBSTITUTE) {
        return text;
    }
    let mut substitute = SUBSTITUTE.to_owned();
    for byte in digest(&SHA256, text.as_bytes()).as_ref() {
        // Writing to a String cannot fail.
        let _ = write!(substitute, "{byte:02x}");
    }
    Cow::Owned(substitute)
}

fn topic_and_place(topic: &str, message_id: &str) -> String {
    format!("{topic} {message_id}")
}

/// What Postgres' text can hold of `text`: NUL is written as `\0`.
pub(super) fn storable(text: &str) -> String {
    text.replace('\0', "\\0")
}

impl std::fmt::Debug for Message {
    /// Without what belongs to the application.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("message_id", &self.message_id)
            .finish_non_exhaustive()
    }
}

impl From<&pulsar::consumer::Message<Vec<u8>>> for Message {
    fn from(message: &pulsar::consumer::Message<Vec<u8>>) -> Self {
        let (place, metadata) = (message.message_id(), &message.payload.metadata);
        let index = place.batch_index.unwrap_or(-1);
        let message_id = format!("{}:{}:{index}", place.ledger_id, place.entry_id);
        let properties: Vec<(String, String)> = metadata
            .properties
            .iter()
            .map(|pair| (pair.key.clone(), pair.value.clone()))
            .collect();
        let id = properties.iter().find(|(name, _)| name == "id");
        let id = id.filter(|(_, id)| !id.is_empty());
        Self {
            id: id.map_or_else(
                || topic_and_place(&message.topic, &message_id),
                |(_, id)| id.clone(),
            ),
            topic: message.topic.clone(),
            message_id,
            key: metadata.partition_key.clone(),
            payload: message.payload.data.clone(),
            properties,
            event_time_ms: metadata.event_time,
        }
    }
}

/// Whether `message` is the last one of its entry (batch), or alone in it: the one to be acknowledged.
///
/// An acknowledgement by the pulsar crate is one of the whole entry, whichever of its messages it names: to the broker the ones
/// behind it would be done as well, and lost to a consumer that dies now. An entry that was not acknowledged comes again
/// whole, in order, and what was handled of it is a [`super::Outcome::Duplicate`].
pub fn ends_its_entry(message: &pulsar::consumer::Message<Vec<u8>>) -> bool {
    let index = message.message_id().batch_index.unwrap_or(-1);
    let count = message.payload.metadata.num_messages_in_batch.unwrap_or(1);
    index < 0 || index + 1 >= count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox_id(id: &str) -> String {
        let message = Message {
            id: id.to_owned(),
            topic: "t".to_owned(),
            message_id: "1:2:3".to_owned(),
            ..Message::default()
        };
        message.inbox_id().into_owned()
    }

    #[test]
    fn ids_that_the_tables_hold_stay_and_others_get_one_of_their_own() {
        let longest = "x".repeat(ID_BYTES);
        for id in ["a", "0198f6c2", "\u{e9}", longest.as_str()] {
            assert_eq!(inbox_id(id), id);
        }
        assert_eq!(inbox_id(""), "t 1:2:3");
        // SHA-256 of one NUL.
        let nul = "walpost-sha256:6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d";
        assert_eq!(inbox_id("\0"), nul);
        let mut seen = std::collections::HashSet::new();
        let longer = format!("{longest}y");
        for id in ["\0", "\0\0", "a\0", nul, longer.as_str(), "\\0"] {
            assert_eq!(inbox_id(id), inbox_id(id));
            assert!(seen.insert(inbox_id(id)), "{id:?}");
        }
    }

    #[test]
    fn only_ids_that_are_no_uuids_have_a_source_and_a_topic_is_one_however_it_is_written() {
        let source = |id: &str, topic: &str| {
            let message = Message {
                id: id.to_owned(),
                topic: topic.to_owned(),
                message_id: "1:2:3".to_owned(),
                ..Message::default()
            };
            message.source().into_owned()
        };
        let full = "persistent://public/default/outbox.order";
        for uuid in [
            "0198f6c2-7a11-7000-8000-0123456789ab",
            "0198F6C2-7A11-7000-8000-0123456789AB",
        ] {
            assert_eq!(source(uuid, full), "");
        }
        // Topic and place are unique by themselves.
        for id in ["", "persistent://public/default/outbox.order 1:2:3"] {
            assert_eq!(source(id, full), "");
        }
        let ids = [
            "1",
            "-1",
            "order-1",
            "0198f6c27a11700080000123456789ab",
            "0198f6c2-7a11-7000-8000-0123456789ag",
        ];
        for id in ids {
            for topic in [
                full,
                "outbox.order",
                "public/default/outbox.order",
                "persistent://public/default/outbox.order-partition-0",
                "outbox.order-partition-12",
            ] {
                assert_eq!(source(id, topic), full, "{id} {topic}");
            }
            let other = "persistent://public/default/outbox.order-partition-x";
            assert_eq!(source(id, other), other);
            let long = "x".repeat(SOURCE_BYTES + 1);
            assert!(source(id, &long).starts_with(SUBSTITUTE));
        }
    }

    #[test]
    fn text_is_stored_without_nul_and_properties_as_they_are() {
        assert_eq!(storable("a\0b"), "a\\0b");
        let message = Message {
            properties: vec![("a\0".to_owned(), "\0".to_owned())],
            ..Message::default()
        };
        assert_eq!(message.properties_json(), r#"{"a\u0000":"\u0000"}"#);
    }
}
