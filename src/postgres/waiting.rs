//! Which transactions hold up the making of a replication slot: it waits for each that was writing when it began, in any database of the
//! server, and so does everything that compares snapshots.
//!
//! Input: a SQL session, or where to open one. Output: [`Holder`]s, or a warning every few seconds while something is waited for. A
//! statement's text is never shown: it may hold data. A role that is not in `pg_read_all_stats` sees neither state nor age of other
//! roles' sessions; their process id it does see.

use std::convert::Infallible;
use std::fmt;
use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::{Client, Row};
use tracing::warn;

use super::config::PostgresConfig;
use super::connection::connect_sql;
use super::names::{TableName, quote_literal};
use super::server_error::sql_error;
use crate::Result;

/// What is said first while the making of a slot takes long.
pub const SLOT_WAITS: &str = "the slot waits for transactions that were writing before it";
/// The same of the scan before a slot whose past nobody knows.
pub const SCAN_WAITS: &str = "the scan before a slot that walpost does not know waits for transactions that were writing before it";
/// Nothing is said of a wait that is shorter.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the same is said again.
const AGAIN: Duration = Duration::from_secs(60);
/// So many are named.
const NAMED: usize = 10;

/// A transaction that has written and not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its transaction id without the epoch, and those of its subtransactions.
    pub xids: Vec<u32>,
    /// How long it runs, in seconds, where that is known.
    pub age_s: Option<u64>,
    /// What runs it.
    pub by: By,
    /// Its commit is in the log, and waits for a synchronous standby.
    waits_for_standby: bool,
    /// The rest of what is known of it.
    about: Vec<String>,
}

/// What runs a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// A session, by its process id.
    Process(i32),
    /// `PREPARE TRANSACTION`, by its name; it outlives sessions and restarts.
    Prepared(String),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            By::Process(pid) => write!(f, "process {pid}")?,
            By::Prepared(gid) => {
                write!(f, "prepared transaction {}", quote_literal(gid).trim())?;
            }
        }
        let mut about = self.about.clone();
        about.push(match self.age_s {
            Some(age) => format!("for {age} s"),
            None => "its age is not shown to this role".to_owned(),
        });
        write!(f, " ({})", about.join(", "))
    }
}

impl Holder {
    /// What ends it.
    pub fn end(&self) -> String {
        match &self.by {
            // The commit stands; it only stops waiting.
            By::Process(pid) if self.waits_for_standby => {
                format!("SELECT pg_cancel_backend({pid});")
            }
            By::Process(pid) => format!("SELECT pg_terminate_backend({pid});"),
            By::Prepared(gid) => {
                let gid = quote_literal(gid);
                let gid = gid.trim();
                format!("COMMIT PREPARED {gid}; or ROLLBACK PREPARED {gid};")
            }
        }
    }
}

/// All of the server that have run for so long, or are not known not to, the oldest first. Not the session's own.
pub async fn holders(client: &Client, at_least: Duration) -> Result<Vec<Holder>> {
    // Whoever has a transaction id holds a lock on it; pg_locks shows it to every role, pg_stat_activity.backend_xid does not.
    const SQL: &str = "
        SELECT h.xids, h.pid, h.gid, h.age::int8, h.database, h.application, h.state, h.waits_for_standby
        FROM (
            SELECT array_agg(l.transactionid::text) AS xids, l.pid, NULL::text AS gid,
                   extract(epoch FROM clock_timestamp() - a.xact_start) AS age, a.datname::text AS database,
                   a.application_name AS application, a.state, coalesce(a.wait_event = 'SyncRep', false) AS waits_for_standby
            FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
            WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted AND l.pid <> pg_backend_pid()
            GROUP BY l.pid, a.xact_start, a.datname, a.application_name, a.state, a.wait_event
            UNION ALL
            SELECT array[transaction::text], NULL, gid, extract(epoch FROM clock_timestamp() - prepared), database::text, NULL, NULL, false
            FROM pg_prepared_xacts
        ) h
        WHERE coalesce(h.age >= $1::float8, true) ORDER BY h.age DESC NULLS LAST, h.pid";
    let rows = client
        .query(SQL, &[&at_least.as_secs_f64()])
        .await
        .map_err(|error| sql_error("look for transactions that are waited for", error))?;
    Ok(rows.iter().map(holder).collect())
}

/// The running transaction of that id, if somebody is known to run it.
pub async fn holder_of(client: &Client, xid: u64) -> Result<Option<Holder>> {
    let all = holders(client, Duration::ZERO).await?;
    // Locks name transactions without the epoch.
    let short = u32::try_from(xid & u64::from(u32::MAX)).unwrap_or(0);
    Ok(all.into_iter().find(|one| one.xids.contains(&short)))
}

/// Whoever holds a lock on a table in schema `walpost`, or on one of these, the oldest first. Not the session itself.
pub async fn table_holders(client: &Client, tables: &[TableName]) -> Result<Vec<Holder>> {
    const SQL: &str = "
        SELECT ARRAY[]::text[], h.pid, h.gid, h.age::int8, h.database, h.application, h.state, false
        FROM (
            SELECT DISTINCT l.pid, p.gid, extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared)) AS age,
                   coalesce(a.datname::text, p.database::text) AS database, a.application_name AS application, a.state
            FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
                 LEFT JOIN pg_stat_activity a ON a.pid = l.pid
                 LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND l.virtualtransaction = '-1/' || p.transaction::text
            WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
                  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND (n.nspname = 'walpost' OR (n.nspname::text, c.relname::text) IN (SELECT * FROM unnest($1::text[], $2::text[])))
        ) h
        ORDER BY h.age DESC NULLS LAST, h.pid";
    let schemas: Vec<&str> = tables.iter().map(|table| &*table.schema).collect();
    let names: Vec<&str> = tables.iter().map(|table| &*table.name).collect();
    let rows = client
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(|error| sql_error("look for who holds a table's lock", error))?;
    Ok(rows.iter().map(holder).collect())
}

fn holder(row: &Row) -> Holder {
    let xids: Vec<String> = row.get(0);
    let age: Option<i64> = row.get(3);
    let mut about = Vec::new();
    let mut add = |what: &str, column: usize| {
        let text: Option<String> = row.get(column);
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            about.push(format!("{what}{text}"));
        }
    };
    add("application ", 5);
    add("database ", 4);
    add("", 6);
    let waits_for_standby = row.get(7);
    if waits_for_standby {
        about.push("its commit waits for a synchronous standby".to_owned());
    }
    let gid: Option<String> = row.get(2);
    Holder {
        xids: xids.iter().filter_map(|xid| xid.parse().ok()).collect(),
        age_s: age.map(|age| u64::try_from(age).unwrap_or(0)),
        by: match gid {
            Some(gid) => By::Prepared(gid),
            None => By::Process(row.get::<_, Option<i32>>(1).unwrap_or(0)),
        },
        waits_for_standby,
        about,
    }
}

/// One text for all of them, and one for what ends them.
pub fn listed(holders: &[Holder]) -> (String, String) {
    let mut names: Vec<String> = holders.iter().take(NAMED).map(Holder::to_string).collect();
    let ends: Vec<String> = holders.iter().take(NAMED).map(Holder::end).collect();
    if holders.len() > NAMED {
        names.push(format!("{} more", holders.len() - NAMED));
    }
    (names.join("; "), ends.join(" "))
}

/// Does the work, and names what holds it up while it takes long; `waits` says what waits.
pub async fn naming_holders<T>(
    postgres: &PostgresConfig,
    waits: &str,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    // Seldom polled, and large.
    let mut naming = Box::pin(name_for_ever(postgres, waits));
    tokio::select! {
        biased;
        done = &mut work => done,
        never = &mut naming => match never {},
    }
}

/// Looks in a session of its own: the one that waits is busy.
async fn name_for_ever(postgres: &PostgresConfig, waits: &str) -> Infallible {
    let mut client = None;
    let mut waited = Duration::ZERO;
    let mut said = (Vec::new(), Duration::ZERO);
    loop {
        sleep(PATIENCE).await;
        waited += PATIENCE;
        let found = look(&mut client, postgres, waited).await;
        let named = match found {
            Ok(named) => named,
            Err(error) => {
                client = None;
                warn!(
                    "{waits}, and it cannot be told for which: {}",
                    error.report()
                );
                continue;
            }
        };
        let by: Vec<By> = named.iter().map(|holder| holder.by.clone()).collect();
        if by == said.0 && waited < said.1 + AGAIN {
            continue;
        }
        said = (by, waited);
        if named.is_empty() {
            warn!(
                waited_s = waited.as_secs(),
                "{waits}; none is left that was there when it began"
            );
            continue;
        }
        let (transactions, ends) = listed(&named);
        warn!(
            waited_s = waited.as_secs(),
            "{waits}: {transactions} (hint: they end by themselves, or by: {ends})"
        );
    }
}

async fn look(
    client: &mut Option<Client>,
    postgres: &PostgresConfig,
    at_least: Duration,
) -> Result<Vec<Holder>> {
    let client = match client {
        Some(client) => client,
        None => client.insert(connect_sql(postgres, "walpost waiting").await?),
    };
    holders(client, at_least).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_named_with_what_is_known_and_what_ends_it() {
        let process = Holder {
            xids: vec![7],
            age_s: None,
            by: By::Process(12),
            waits_for_standby: false,
            about: vec!["application psql".to_owned()],
        };
        let prepared = Holder {
            xids: vec![8],
            age_s: Some(300),
            by: By::Prepared("it's".to_owned()),
            waits_for_standby: false,
            about: vec!["database shop".to_owned()],
        };
        let (names, ends) = listed(&[process, prepared]);
        assert_eq!(
            names,
            "process 12 (application psql, its age is not shown to this role); \
             prepared transaction 'it''s' (database shop, for 300 s)"
        );
        assert_eq!(
            ends,
            "SELECT pg_terminate_backend(12); COMMIT PREPARED 'it''s'; or ROLLBACK PREPARED 'it''s';"
        );
    }
}
