//! `pgoutput`: decodes the messages of Postgres' logical replication plugin, protocol version 1.
//!
//! Pure functions without I/O. Input: the payload of one `XLogData` message, borrowed from the read buffer. Output: a
//! [`Message`] that borrows from it; Begin, Commit and Insert allocate nothing. Total and strict: no input panics, every
//! length is checked before it is used, and a byte too many is an error like a byte too few. Only a message of an unknown
//! type is passed on as [`Message::Unknown`], for the caller to count and skip.
//!
//! ```text
//! transaction: [Begin] ([Origin] [Type]* [Relation] [Insert]… [Message]… [Truncate]…)* [Commit]
//! ```
//! Only committed transactions arrive, one after the other, in commit order. Numbers are big-endian, strings end in a zero
//! byte, times are microseconds since 2000-01-01 UTC.
//!
//! Source: Postgres documentation, "Logical Replication Message Formats" and "Logical Streaming Replication Protocol".

mod message;
mod reader;
mod relation;
mod tuple;
pub mod types;

#[cfg(test)]
pub(crate) mod golden_tests;

pub use message::{LogicalMessage, Message, parse};
pub use reader::DecodeError;
pub use relation::{Relation, RelationCache, RelationColumn};
pub(crate) use tuple::HELD;
pub use tuple::{Column, Tuple, TupleColumns};

/// Seconds from the Unix epoch (1970) to Postgres' (2000-01-01 UTC).
pub const PG_EPOCH_UNIX_S: i64 = 946_684_800;
