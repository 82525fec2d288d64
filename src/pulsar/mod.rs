//! The Pulsar side: our own pipelined producer over the pulsar crate's protocol types.
//!
//! | module | is |
//! |---|---|
//! | `wire` | frames, byte by byte |
//! | `auth` | credentials |
//! | `tls`, `socket` | whom to trust; a plain or encrypted socket |
//! | `connection`, `command` | the task that owns one broker's socket; what it says and answers |
//! | `unwritten`, `requests` | frames that a socket has not taken yet; requests that have no answer yet |
//! | `directory` | which broker has a topic; one connection for each endpoint and shard |
//! | `opener` | producer creation, tried until it succeeds |
//! | `rows` | ids of the rows behind a batch, from its receipt to whoever marks or deletes them |
//! | `batch`, `compression` | messages of one lane from the first to the receipt; the codecs |
//! | `outgoing` | what the publisher is given |
//! | `lane` | one producer: sequence ids, open batch, batches without receipt |
//! | `memory` | the buffers that batches take turns with |
//! | `route`, `partition` | a topic and its partitions, and what waits until they are known; key → partition |
//! | `schema` | what producers are opened with |
//! | `divert` | what cannot be published: taken out, in order |
//! | `publisher`, `events` | limits, placing, deadlines; receipts and what brokers say |
//! | `flushing` | when a batch is sent |
//! | `verdict` | what the broker says → what walpost does |
//! | `reader` | topics from their first message to their last, for `verify` |
//! | `admin`, `probe` | the admin interface and one look at a broker, for `init` and `check` |
//!
//! Why not the pulsar crate's Producer: it cannot set sequence ids, keeps one batch in flight and ignores keys in batches.

mod admin;
mod auth;
mod batch;
mod command;
mod compression;
mod connection;
mod directory;
mod divert;
mod events;
mod flushing;
mod lane;
mod memory;
mod opener;
mod outgoing;
mod partition;
#[cfg(test)]
mod peer;
mod probe;
mod publisher;
mod reader;
mod requests;
mod route;
pub mod rows;
pub mod schema;
mod socket;
mod tls;
mod unwritten;
mod verdict;
mod wire;

pub use admin::{Admin, Deduplication};
pub use auth::{Auth, ClientCredentials, OAuth2};
pub use compression::Codec;
pub use connection::DEFAULT_MAX_MESSAGE_BYTES;
pub use divert::{Diversion, Diverted, Parked};
pub use events::BrokerEvent;
pub use flushing::Flush;
pub use outgoing::{Outgoing, RowTag};
pub use partition::HashingScheme;
pub use probe::{Broker, probe, produce_to};
pub use publisher::{Publisher, PublisherConfig};
pub use reader::{Message, Reader, ReaderConfig};
pub use route::Held;
pub use rows::{LeftOfTable, Row, RowKey, RowQueue, Rows};
pub use tls::TlsFiles;
