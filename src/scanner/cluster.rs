//! Which cluster answers, and whether what is stored is from it.
//!
//! Input: a SQL connection, a row of `walpost.progress`. Output: system id and timeline, or a refusal with the statements for
//! each case.

use tokio_postgres::Client;

use super::progress::Progress;
use crate::postgres::{SystemIdentity, quote_literal, sql_error};
use crate::{Error, Result};

/// The system id, as text.
pub(crate) async fn system_id(client: &Client) -> Result<String> {
    let sql = "SELECT system_identifier::text FROM pg_control_system()";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("ask which cluster this is", error))?;
    Ok(row.get(0))
}

/// When the server was started: tells servers apart that are copies of each other.
pub(crate) const SERVER_START: &str = "SELECT extract(epoch FROM pg_postmaster_start_time())::text";

/// The answer to [`SERVER_START`].
pub(crate) async fn server_start(client: &Client) -> Result<String> {
    let row = client.query_one(SERVER_START, &[]).await;
    let row = row.map_err(|error| sql_error("ask which server this is", error))?;
    Ok(row.get(0))
}

/// Refuses two sessions of which one reads rows and the other writes what was read of them, unless they are of one server: a standby
/// may not have the rows yet that the other's snapshot shows.
pub(crate) async fn check_same_server(one: &Client, other: &Client) -> Result<()> {
    if server_start(one).await? == server_start(other).await? {
        return Ok(());
    }
    Err(two_servers("two connections for SQL"))
}

pub(crate) fn two_servers(what: &str) -> Error {
    Error::temporary(format!("{what} reached two servers"))
        .hint("name one, or say target_session_attrs=read-write in the Postgres URL")
}

/// The timeline that the server writes on. (The one in the control file is the last checkpoint's, which a standby that was just
/// promoted has not made yet.)
pub(crate) async fn timeline(client: &Client) -> Result<u32> {
    let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())
                      ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int4 END";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("ask for the timeline", error))?;
    Ok(row.get::<_, i32>(0).cast_unsigned())
}

/// Whose log it is: positions, snapshots and rows of another one say nothing of what was streamed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// Names the cluster.
    pub system_id: String,
    /// Goes up with each failover.
    pub timeline: u32,
}

impl From<&SystemIdentity> for Log {
    fn from(identity: &SystemIdentity) -> Self {
        Self {
            system_id: identity.system_id.to_string(),
            timeline: identity.timeline,
        }
    }
}

impl Log {
    /// The server's.
    pub(crate) async fn of(client: &Client) -> Result<Self> {
        Ok(Self {
            system_id: system_id(client).await?,
            timeline: timeline(client).await?,
        })
    }

    /// Refuses a session of another server's log: a standby, also one that was promoted, an old primary that still runs, a database that was put back.
    ///
    /// # Errors
    /// Temporary when it is one; `consequence` says what is left undone.
    pub(crate) async fn check(&self, client: &Client, consequence: &str) -> Result<()> {
        let row = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
        let row = row.map_err(|error| sql_error("ask whether the server is a standby", error))?;
        if row.get(0) {
            return Err(Error::temporary(format!(
                "the server is a standby: {consequence}"
            )));
        }
        let here = Self::of(client).await?;
        if here == *self {
            return Ok(());
        }
        Err(Error::temporary(format!(
            "the server's log is not the one that was streamed (cluster {}, timeline {}; streamed: cluster {}, timeline {}): {consequence}",
            here.system_id, here.timeline, self.system_id, self.timeline
        )))
    }
}

/// Refuses snapshots that mean nothing here. One that is [`Progress::ahead`] was not taken from this cluster as it is now, whatever
/// the row says: the transaction that stores a snapshot is itself beyond it. Transactions still to come would count as delivered.
pub(crate) fn check_cluster(progress: &Progress, system_id: &str, slot: &str) -> Result<()> {
    let why = if progress.system_id != system_id {
        format!(
            "is from cluster {}, and this is {system_id}: its snapshots mean nothing here",
            progress.system_id
        )
    } else if progress.ahead {
        "has a snapshot that knows transactions which this cluster has not come to: it was copied or edited, or the cluster \
         was set back"
            .to_owned()
    } else {
        return Ok(());
    };
    let set = |delivered: &str, upto: &str| {
        format!(
            "UPDATE walpost.progress SET system_id = '{system_id}', delivered = {delivered}, scan_before = NULL, \
             scan_upto = {upto}, scan_position = NULL, tables = NULL, streamed = NULL, catalog = NULL WHERE slot = {}",
            quote_literal(slot).trim()
        )
    };
    Err(Error::refused(format!("walpost.progress of slot {slot} {why}")).hint(format!(
        "if this is a copy whose rows the other cluster has published: {}; to publish every row again: {}; after pg_upgrade, \
         which keeps transaction ids: UPDATE walpost.progress SET system_id = '{system_id}' WHERE slot = {}",
        set("pg_current_snapshot()", "NULL"),
        set("NULL", "pg_current_snapshot()"),
        quote_literal(slot).trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_another_cluster_or_time_is_refused_with_every_way_out() {
        let progress = Progress {
            system_id: "1".to_owned(),
            ..Progress::default()
        };
        assert!(check_cluster(&progress, "1", "s").is_ok());
        let ahead = Progress {
            ahead: true,
            ..progress.clone()
        };
        for (progress, here) in [(&progress, "2"), (&ahead, "1")] {
            let said = check_cluster(progress, here, "s").unwrap_err();
            assert_eq!(said.exit_code(), 69);
            let said = said.report();
            for way in [
                "delivered = pg_current_snapshot(), scan_before = NULL, scan_upto = NULL",
                "delivered = NULL, scan_before = NULL, scan_upto = pg_current_snapshot()",
                "after pg_upgrade",
            ] {
                assert!(said.contains(way), "{said}");
            }
        }
    }
}
