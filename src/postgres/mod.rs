//! The Postgres side: how walpost reaches a server, streams a slot, and looks after slot and publication.
//!
//! Reading order: [`config`] says where to connect; [`connection`] dials, encrypts ([`tls`], [`channel_binding`]) and
//! picks a host, [`stream`] is what it returns; [`session`] says which settings every session has; [`startup`] logs in a replication connection; [`replication`] speaks its
//! commands and turns it into a [`replication_stream::ReplicationStream`], whose bytes [`frame`] takes apart.
//! [`slot`], [`published`] and [`mod@preflight`] ask an ordinary SQL connection about slot, publication, tables and rights; [`row_security`]
//! looks for policies that hide rows, [`answer`] limits how long an answer is waited for, `watch` ends a session whose
//! answer is lost, [`waiting`] names transactions that are waited for; [`names`]
//! quotes what goes into SQL; [`server_error`] says what a server's refusal means for the process.
//!
//! Input: a [`PostgresConfig`]. Output: a [`tokio_postgres::Client`] for SQL, and borrowed [`Frame`]s for the pipe.

pub mod answer;
pub mod channel_binding;
pub mod config;
pub mod connection;
pub mod frame;
pub mod names;
mod parameters;
pub mod preflight;
pub mod published;
mod quiet;
pub mod replication;
pub mod replication_stream;
pub mod row_security;
pub mod server_error;
pub mod session;
pub mod slot;
pub mod startup;
pub mod stream;
pub mod tls;
mod url;
pub mod waiting;
mod watch;

pub use answer::{answered, answered_to};
pub use config::PostgresConfig;
pub use connection::{connect_application, connect_sql};
pub use frame::{Frame, StandbyStatus};
pub use names::{TableName, name_bytes, quote_ident, quote_literal};
pub use preflight::preflight;
pub use published::{OutboxRelations, SentColumn, Subscription};
pub use replication::{ReplicationConnection, StreamOptions, SystemIdentity};
pub use replication_stream::{ReplicationStream, UnreadableLog, is_unreadable};
pub use row_security::refuse_row_security;
pub use server_error::{
    ServerError, internal_error_at, is_about_rows, is_beyond_limits, is_unconvertible,
    is_without_binary_form, sql_error, sqlstate,
};
