//! `EventError`: why one row cannot become an event.
//!
//! Names the table, the row's id and the column. It holds no value of the row but the id: a value may be an application's
//! secret. The row is still in the log and the confirmed LSN must not pass it.

use std::fmt;

use crate::pgoutput::types;

/// Why one row of an outbox table cannot become an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventError(Box<Inner>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    table: String,
    row_id: String,
    column: String,
    problem: Problem,
}

/// What is wrong with a column's value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// NULL where a value is needed.
    Null,
    /// An unchanged, `TOASTed` value in an INSERT, which Postgres never sends.
    Unchanged,
    /// The row has another number of values than the relation has columns.
    ColumnCount {
        /// Columns of the relation.
        expected: usize,
        /// Values in the row.
        found: usize,
    },
    /// Text that is not UTF-8: the database's encoding is `SQL_ASCII`.
    NotUtf8,
    /// Text that is not ASCII, in a row of which the server cannot convert a text to UTF-8.
    Unconvertible,
    /// Binary format of a type that walpost reads only as text (see [`super::binary_safe`]).
    BinaryType {
        /// The type's OID.
        oid: u32,
    },
    /// A binary value that is no value of its type.
    BinaryValue {
        /// The type's OID.
        oid: u32,
        /// Bytes in the value.
        length: usize,
    },
    /// `bytea` text that is not `\x` and pairs of hexadecimal digits.
    NotHex,
    /// Text that is no ISO 8601 time as Postgres prints it, or a time out of range.
    NotTime,
    /// `infinity` or `-infinity`.
    InfiniteTime,
    /// Headers that are no JSON object.
    HeadersNotObject,
    /// Headers that are no JSON at all, or hold half of a surrogate pair.
    HeadersNotJson,
    /// Nothing where a piece of a topic name is needed.
    TopicEmpty,
    /// A character that cannot stand in a topic name.
    TopicCharacter {
        /// The character.
        character: char,
        /// Its position in the value, in bytes.
        offset: usize,
    },
    /// A character that cannot stand in the name of a tenant or a namespace.
    NamespaceCharacter {
        /// The character.
        character: char,
        /// Its position in the value, in bytes.
        offset: usize,
    },
    /// The name would end in a blank or a control character.
    TopicBlankEnd,
    /// The row's own topic begins with `non-persistent://`.
    TopicNotPersistent,
    /// The name's piece would be `.` or `..`.
    TopicDots,
    /// The name would end in `-partition-<digits>`: one partition of another topic.
    TopicPartition,
    /// The row's own topic is neither a full nor a short topic name.
    TopicShape,
    /// A logical message that is no envelope (see [`super::Envelopes`]), and why.
    Envelope(String),
}

impl EventError {
    pub(super) fn new(table: String, row_id: String, column: String, problem: Problem) -> Self {
        Self(Box::new(Inner {
            table,
            row_id,
            column,
            problem,
        }))
    }

    /// The table, as `schema.table`.
    pub fn table(&self) -> &str {
        &self.0.table
    }

    /// The row's id for people: its text (shortened, control characters escaped), `NULL`, or `(unreadable)`.
    pub fn row_id(&self) -> &str {
        &self.0.row_id
    }

    /// The column whose value is at fault; empty when it is the whole row.
    pub fn column(&self) -> &str {
        &self.0.column
    }

    /// What is wrong with it.
    pub fn problem(&self) -> &Problem {
        &self.0.problem
    }
}

impl fmt::Display for EventError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            table,
            row_id,
            column,
            problem,
        } = &*self.0;
        write!(f, "outbox row with id {row_id} in {table}: ")?;
        if !column.is_empty() {
            write!(f, "column \"{column}\" ")?;
        }
        write!(f, "{problem}")
    }
}

impl std::error::Error for EventError {}

impl From<EventError> for crate::Error {
    /// The data itself refuses: trying again changes nothing.
    fn from(error: EventError) -> Self {
        Self::refused(error.to_string()).hint(error.problem().hint())
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("is NULL, and an event needs it"),
            Self::Unchanged => f.write_str("was not sent (unchanged TOAST in an INSERT)"),
            Self::ColumnCount { expected, found } => write!(
                f,
                "the row has {found} values, but its table {expected} columns"
            ),
            Self::NotUtf8 => f.write_str("is not UTF-8"),
            Self::Unconvertible => f.write_str(
                "is in the database's own encoding, because the server cannot convert the row's text to UTF-8",
            ),
            Self::BinaryType { oid } => write!(
                f,
                "has the type with OID {oid}, which walpost does not read in binary format"
            ),
            Self::BinaryValue { oid, length } => match types::name_of(*oid) {
                Some(name) => write!(f, "is no {name} ({length} bytes)"),
                None => write!(f, "is no value of the type with OID {oid} ({length} bytes)"),
            },
            Self::NotHex => f.write_str("is no bytea in hex format"),
            Self::NotTime => f.write_str("is no time in ISO format, or out of range"),
            Self::InfiniteTime => f.write_str("is infinite"),
            Self::HeadersNotObject => f.write_str("is no JSON object"),
            Self::HeadersNotJson => f.write_str("is no valid JSON"),
            Self::TopicEmpty => f.write_str("is empty and cannot stand in a topic name"),
            Self::TopicCharacter { character, offset } => write!(
                f,
                "has {character:?} at byte {offset}, which cannot stand in a topic name"
            ),
            Self::NamespaceCharacter { character, offset } => write!(
                f,
                "has {character:?} at byte {offset}, which cannot stand in the name of a tenant or a namespace"
            ),
            Self::TopicBlankEnd => f.write_str(
                "makes the topic name end in a blank or a control character, which Pulsar's Java client cuts off",
            ),
            Self::TopicNotPersistent => f.write_str(
                "names a non-persistent topic, whose messages Pulsar drops under load and does not store",
            ),
            Self::TopicDots => f.write_str("makes a piece of the topic name \".\" or \"..\""),
            Self::TopicPartition => f.write_str(
                "makes the topic name end in -partition-<number>, which is one partition of another topic",
            ),
            Self::TopicShape => f.write_str("is no topic name"),
            Self::Envelope(why) => write!(f, "the envelope {why}"),
        }
    }
}

impl Problem {
    /// What the operator can do about it.
    fn hint(&self) -> &'static str {
        match self {
            Self::Null => "declare the column NOT NULL, so that the application sees the error",
            Self::Unchanged | Self::ColumnCount { .. } | Self::BinaryValue { .. } => {
                "the server broke the replication protocol; please report it with the server's version"
            }
            Self::NotUtf8 => {
                "a database of the encoding SQL_ASCII takes any bytes as text, one of ENCODING 'UTF8' does not; in \
                 walpost.straggler such text stands in the escape format of bytea"
            }
            Self::Unconvertible => {
                "mend the text in the table; in walpost.straggler what is not ASCII stands in the escape format of bytea"
            }
            Self::BinaryType { .. } => "the stream must be restarted without the binary option",
            Self::NotHex => "the replication connection must use bytea_output hex",
            Self::NotTime => "the replication connection must use DateStyle ISO",
            Self::InfiniteTime => "forbid it with a CHECK (isfinite(column)) constraint",
            Self::HeadersNotObject | Self::HeadersNotJson => {
                "headers are a JSON object of texts, such as {\"traceparent\": \"00-…\"}"
            }
            Self::TopicEmpty
            | Self::TopicCharacter { .. }
            | Self::NamespaceCharacter { .. }
            | Self::TopicBlankEnd
            | Self::TopicDots
            | Self::TopicPartition => {
                "tenant and namespace consist of A-Z a-z 0-9 _ - = : . ; the topic's own name may have all but '/', a blank at \
                 its end and -partition-<number>; constrain the column, or route by another with WALPOST_TOPIC"
            }
            Self::TopicNotPersistent => "write persistent://tenant/namespace/name",
            Self::Envelope(_) => {
                "let walpost.emit_transient write it, or see its members in what walpost sql prints"
            }
            Self::TopicShape => {
                "write persistent://tenant/namespace/name, tenant/namespace/name, or a name alone, which means \
                 persistent://public/default/name"
            }
        }
    }
}
