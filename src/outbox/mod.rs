//! `outbox`: turns the rows of an outbox table into events, and says which topic each goes to.
//!
//! Pure functions without I/O. Input: [`crate::pgoutput`] relations and tuples, and the configured [`Columns`] and
//! [`TopicTemplate`]. Output: an [`OutboxEvent`] for each row, borrowed from the read buffer; where a value has to be
//! converted (a binary uuid, `bytea` in text format, headers), from a [`Scratch`] that the caller keeps. The publisher
//! copies the bytes once, into its batch.
//!
//! ```text
//! Relation ─► Extractor::new (once)
//! Tuple ────► Extractor::extract ─► OutboxEvent ─► Extractor::topic ─► topic
//!                                             └──► key_hash(aggregateid) % lanes ─► lane
//! ```
//! An event may also come as a logical message, without a table: [`Envelopes`] makes a row of it, and the rest is the same.
//!
//! A row that cannot be an event is an [`EventError`]: it is never dropped and never sent elsewhere, and the confirmed LSN
//! must not pass it.

mod columns;
mod envelope;
mod error;
mod event;
mod extract;
mod headers;
mod identity;
mod key_hash;
mod router;
mod salvage;
mod time;
mod topic;
mod value;

pub use columns::{Columns, Role};
pub use envelope::{ENVELOPE_OID, ENVELOPE_TABLE, Envelopes, PREFIX};
pub use error::{EventError, Problem};
pub use event::{Headers, OutboxEvent, Scratch};
pub use extract::Extractor;
pub use identity::{NumberColumn, RowNumber, SEQ, TXID, number_column};
pub use key_hash::key_hash;
pub use salvage::Salvaged;
pub use topic::{TopicTemplate, own_topic_into};
pub use value::binary_safe;

#[cfg(test)]
mod tests;
