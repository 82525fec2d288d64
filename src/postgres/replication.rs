//! The replication connection: identifies the server and starts the stream.
//!
//! Owns a logged-in session until [`ReplicationConnection::start_replication`] turns it into a
//! [`ReplicationStream`]. Commands are those of "Streaming Replication Protocol" in the Postgres documentation.

use fallible_iterator::FallibleIterator as _;
use postgres_protocol::message::backend::Message;
use tracing::debug;

use super::config::{PostgresConfig, TargetSession};
use super::connection::{Login, check_target, first_host};
use super::names::{quote_ident, quote_replication_literal};
use super::replication_stream::ReplicationStream;
use super::startup::Session;
use super::stream::Stream;
use crate::{Error, Lsn, Result};

/// Who the server is, as `IDENTIFY_SYSTEM` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Names the cluster; a restored copy has the same.
    pub system_id: u64,
    /// Goes up with each failover or point-in-time recovery.
    pub timeline: u32,
    /// Where its log ends.
    pub xlogpos: Lsn,
    /// The database we are connected to.
    pub dbname: String,
}

/// What to ask of pgoutput.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// Values in binary format where their type has one (Postgres 14+).
    pub binary: bool,
    /// Also send what `pg_logical_emit_message` wrote (Postgres 14+).
    pub messages: bool,
    /// pgoutput's protocol; 1 sends only committed transactions, whole and in commit order.
    pub proto_version: u32,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self {
            binary: true,
            messages: true,
            proto_version: 1,
        }
    }
}

struct ReplicationLogin<'a> {
    config: &'a PostgresConfig,
    name: &'a str,
}

impl Login for ReplicationLogin<'_> {
    type Output = Session;

    async fn log_in(&self, stream: Stream, wanted: TargetSession) -> Result<Session> {
        let mut session = Session::open(stream, self.config, self.name).await?;
        check_target(wanted, |parameter| session.parameter(parameter))?;
        session.set_up().await?;
        Ok(session)
    }
}

/// A walsender of our own that is not streaming yet.
pub struct ReplicationConnection {
    session: Session,
}

impl std::fmt::Debug for ReplicationConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationConnection")
            .field("server_version", &self.server_version())
            .finish_non_exhaustive()
    }
}

impl ReplicationConnection {
    /// Connects and logs in for logical replication.
    ///
    /// # Errors
    /// As [`super::connect_sql`]; refused with the statement that mends it when the role lacks `REPLICATION`.
    pub async fn connect(config: &PostgresConfig, application_name: &str) -> Result<Self> {
        let name = config
            .application_name
            .as_deref()
            .unwrap_or(application_name);
        let session = first_host(config, &ReplicationLogin { config, name }).await?;
        Ok(Self { session })
    }

    /// The server's version as `server_version_num` has it: 150018 for 15.18; 0 if it did not say.
    pub fn server_version(&self) -> u32 {
        self.session
            .parameter("server_version")
            .map_or(0, version_number)
    }

    /// Asks the server who it is.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let rows = self.simple_query("IDENTIFY_SYSTEM").await?;
        let identity = match rows.first().map(Vec::as_slice) {
            Some(
                [
                    Some(system_id),
                    Some(timeline),
                    Some(xlogpos),
                    Some(dbname),
                    ..,
                ],
            ) => match (system_id.parse(), timeline.parse(), xlogpos.parse()) {
                (Ok(system_id), Ok(timeline), Ok(xlogpos)) => Some(SystemIdentity {
                    system_id,
                    timeline,
                    xlogpos,
                    dbname: dbname.clone(),
                }),
                _ => None,
            },
            _ => None,
        };
        identity.ok_or_else(|| {
            Error::refused("the answer to IDENTIFY_SYSTEM cannot be read")
                .hint("connect to Postgres itself; a pooler such as PgBouncer cannot replicate")
        })
    }

    /// Runs one command and gives back its rows as text. The connection stays usable when the server refuses it.
    pub async fn simple_query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>> {
        // The first word is enough to tell what failed, and quotes nothing.
        let command = sql.split_whitespace().next().unwrap_or_default();
        self.session.doing(&format!("run {command}"));
        self.session.query(sql).await?;
        let mut rows = Vec::new();
        let mut refusal = None;
        loop {
            match self.session.read().await {
                Ok(Message::DataRow(body)) => {
                    let mut ranges = body.ranges();
                    let mut row = Vec::new();
                    while let Some(range) = ranges.next().map_err(|error| {
                        Error::temporary(format!("cannot read a row of {command}")).caused_by(error)
                    })? {
                        let text = range.map(|range| &body.buffer()[range]);
                        row.push(text.map(|text| String::from_utf8_lossy(text).into_owned()));
                    }
                    rows.push(row);
                }
                Ok(Message::ReadyForQuery(_)) => return refusal.map_or(Ok(rows), Err),
                Ok(_) => {}
                // The server goes on with ReadyForQuery; when it does not, the first error tells why.
                Err(error) if refusal.is_none() && super::sqlstate(&error).is_some() => {
                    refusal = Some(error);
                }
                Err(error) => return Err(refusal.unwrap_or(error)),
            }
        }
    }

    /// Starts to stream `slot` from `start_lsn` ([`Lsn::ZERO`]: from where it was confirmed last; the server never
    /// goes back before that anyway), with the changes of `publication`.
    ///
    /// # Errors
    /// Temporary (55006) while another process holds the slot; refused (42704) when there is none; refused (55000) when
    /// it is lost. [`super::sqlstate`] tells them apart. A missing publication shows only when the stream meets a change.
    pub async fn start_replication(
        mut self,
        slot: &str,
        start_lsn: Lsn,
        publication: &str,
        options: StreamOptions,
    ) -> Result<ReplicationStream> {
        let command = start_command(slot, start_lsn, publication, options);
        self.session.doing(&format!("stream slot {slot}"));
        self.session.query(&command).await?;
        self.session.read_copy_both().await?;
        debug!(slot, %start_lsn, publication, ?options, "streaming");
        let (stream, read_ahead) = self.session.into_parts();
        let stream = stream.into_quiet().map_err(|error| {
            Error::temporary("cannot make a set of descriptors to wait with").caused_by(error)
        })?;
        Ok(ReplicationStream::new(stream, &read_ahead))
    }
}

fn start_command(slot: &str, start: Lsn, publication: &str, options: StreamOptions) -> String {
    let mut command = format!(
        "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '{}', publication_names {}",
        quote_ident(slot),
        options.proto_version,
        // The option is a list of identifiers, which are quoted once more inside of the literal.
        quote_replication_literal(&quote_ident(publication)),
    );
    if options.binary {
        command.push_str(", binary 'true'");
    }
    if options.messages {
        command.push_str(", messages 'true'");
    }
    command.push(')');
    command
}

/// `15.18 (Debian 15.18-1)` is 150018, `18beta1` is 180000.
fn version_number(text: &str) -> u32 {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next().and_then(|digits| digits.parse().ok());
    let major: u32 = number().unwrap_or(0);
    let has_minor = text
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .starts_with('.');
    let minor: u32 = if has_minor { number().unwrap_or(0) } else { 0 };
    major.saturating_mul(10_000).saturating_add(minor)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_server_version() {
        for (text, number) in [
            ("15.18 (Debian 15.18-0+deb12u1)", 150_018),
            ("18beta1", 180_000),
            ("14.0", 140_000),
            ("17", 170_000),
            ("", 0),
            ("99999999999.1", 1),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
    }

    #[test]
    fn quotes_every_name_in_the_command() {
        let command = start_command(
            "s\"1",
            Lsn::new(0x1_0000_0002),
            "p'\"\\",
            StreamOptions::default(),
        );
        assert_eq!(
            command,
            r#"START_REPLICATION SLOT "s""1" LOGICAL 1/2 (proto_version '1', publication_names '"p''""\"', binary 'true', messages 'true')"#
        );
    }
}
