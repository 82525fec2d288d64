//! The replication slot, asked about and made over an ordinary SQL connection.
//!
//! Input: a `tokio_postgres` client and names. Output: states, as the catalogues have them at that moment. Works on
//! Postgres 14 to 18: columns that came later are read through `to_jsonb`, which has them or has not.

use tokio_postgres::{Client, Row, types::ToSql};

use super::names::quote_ident;
use super::server_error::sql_error;
use crate::{Error, Lsn, Result};

/// The output plugin that walpost decodes.
pub const PLUGIN: &str = "pgoutput";

/// A slot as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // Each is a fact of the view.
pub struct SlotState {
    /// Output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// Database it decodes; `None` for a physical slot.
    pub database: Option<String>,
    /// Whether a process streams it now.
    pub active: bool,
    /// That process.
    pub active_pid: Option<i32>,
    /// Everything before it was confirmed; the slot never sends it again.
    pub confirmed_flush: Option<Lsn>,
    /// The log that the server keeps for it begins here; `None` once it is lost.
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Why it cannot be used any more (Postgres 17+).
    pub invalidation_reason: Option<String>,
    /// Bytes of log that the server keeps for it.
    pub retained_bytes: Option<u64>,
    /// Whether it streams prepared transactions when they are prepared, and not when they are committed.
    pub two_phase: bool,
    /// Whether it goes with the session that made it.
    pub temporary: bool,
    /// Whether standbys take it over (Postgres 17+).
    pub failover: bool,
    /// Whether this server got it from its primary, which it may have been a standby of (Postgres 17+).
    pub synced: bool,
}

impl SlotState {
    /// Why it will never stream again, if so.
    pub fn lost_because(&self) -> Option<&str> {
        let lost = self.wal_status.as_deref() == Some("lost");
        let unnamed = lost.then_some("the log it needs was removed");
        self.invalidation_reason.as_deref().or(unnamed)
    }

    /// Why what it streams cannot be published, if so: it was made by hand. (pgoutput follows the slot's option, also where the
    /// subscriber does not ask for it.)
    pub fn unfit_because(&self) -> Option<&'static str> {
        self.two_phase
            .then_some("it has the option two_phase, so it streams transactions that are prepared and may roll back")
    }
}

/// What makes a slot with `two_phase` fit, for people.
pub fn mend_two_phase(name: &str) -> String {
    format!(
        "Postgres 18 and later, which loses nothing: ALTER_REPLICATION_SLOT {} (TWO_PHASE false); as a statement of a replication \
         connection (psql 'dbname=… replication=database'); else start walpost run with WALPOST_SLOT_LOST=recover, which makes the slot anew \
         and publishes the rows in between from tables with txid and seq",
        quote_ident(name)
    )
}

/// The state of slot `name`; `None` when there is none.
pub async fn slot_state(client: &Client, name: &str) -> Result<Option<SlotState>> {
    const SQL: &str = "
        SELECT plugin::text, database::text, active, active_pid, confirmed_flush_lsn::text, restart_lsn::text,
               wal_status, two_phase, temporary, to_jsonb(s) ->> 'invalidation_reason' AS invalidation_reason,
               coalesce((to_jsonb(s) ->> 'failover')::bool, false) AS failover,
               coalesce((to_jsonb(s) ->> 'synced')::bool, false) AS synced,
               greatest(pg_wal_lsn_diff(
                   CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
                   restart_lsn), 0)::int8 AS retained_bytes
        FROM pg_replication_slots s
        WHERE slot_name = $1";
    let row = client
        .query_opt(SQL, &[&name])
        .await
        .map_err(|error| sql_error("read the slot's state", error))?;
    row.map(|row| {
        Ok(SlotState {
            plugin: get(&row, "plugin")?,
            database: get(&row, "database")?,
            active: get(&row, "active")?,
            active_pid: get(&row, "active_pid")?,
            confirmed_flush: get_lsn(&row, "confirmed_flush_lsn")?,
            restart_lsn: get_lsn(&row, "restart_lsn")?,
            wal_status: get(&row, "wal_status")?,
            invalidation_reason: get(&row, "invalidation_reason")?,
            retained_bytes: get::<Option<i64>>(&row, "retained_bytes")?
                .map(|bytes| u64::try_from(bytes).unwrap_or(0)),
            two_phase: get(&row, "two_phase")?,
            temporary: get(&row, "temporary")?,
            failover: get(&row, "failover")?,
            synced: get(&row, "synced")?,
        })
    })
    .transpose()
}

/// A snapshot of transactions that slot `name` never streams; `None` when the slot does not say.
///
/// `catalog_xmin` rises to the oldest transaction that was running at some position only when that position is confirmed
/// (`LogicalIncreaseXminForSlot`, `LogicalConfirmReceivedLocation`), and a new slot has that of a position before its own. So every older
/// transaction had ended before the slot's confirmed position. It is 32 bits wide: the epoch is that of the youngest transaction,
/// which is less than 2^31 away.
pub async fn never_streamed(client: &Client, name: &str) -> Result<Option<String>> {
    let sql = "SELECT CASE WHEN oldest IS NOT NULL THEN format('%s:%s:', oldest, oldest) END AS snapshot
               FROM (SELECT next - ((next - catalog_xmin::text::bigint) & 4294967295) AS oldest
                     FROM pg_replication_slots, (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS next) n
                     WHERE slot_name = $1) s";
    let row = client.query_opt(sql, &[&name]).await;
    let row = row.map_err(|error| sql_error("read the slot's catalog_xmin", error))?;
    row.map_or(Ok(None), |row| get(&row, "snapshot"))
}

/// A transaction id that is younger than every one that is running now. (The `xmax` of a snapshot is not: transactions that run may lie
/// beyond it.)
pub async fn next_transaction(client: &Client) -> Result<u64> {
    let sql = "SELECT pg_current_xact_id()::text AS id";
    let row = query_one(client, sql, &[], "ask for a transaction id").await?;
    let id: String = get(&row, "id")?;
    id.parse()
        .map_err(|_| Error::bug("a transaction id is no number"))
}

/// The transactions older than `before` (of [`next_transaction`]) that are still running, oldest first.
pub async fn still_running(client: &Client, before: u64) -> Result<Vec<u64>> {
    let sql = "SELECT x.id::text AS id FROM pg_snapshot_xip(pg_current_snapshot()) AS x(id)
               WHERE x.id < $1::text::xid8 ORDER BY x.id";
    let rows = client.query(sql, &[&before.to_string()]).await;
    let rows = rows.map_err(|error| sql_error("ask which transactions are running", error))?;
    let id = |row| -> Result<u64> {
        let id: &str = get(row, "id")?;
        id.parse()
            .map_err(|error| Error::bug("cannot read a transaction id").caused_by(error))
    };
    rows.iter().map(id).collect()
}

/// Where the log that can have been streamed ends at this moment.
pub async fn log_end(client: &Client) -> Result<Lsn> {
    let sql = "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END)::text AS lsn";
    let row = query_one(client, sql, &[], "read the end of the log").await?;
    get_lsn(&row, "lsn")?
        .ok_or_else(|| Error::temporary("the server does not say where its log ends"))
}

/// The log's insert position: everything that is visible now was inserted before it.
///
/// # Errors
/// Temporary when the server is away, or a standby.
pub async fn insert_position(client: &Client) -> Result<Lsn> {
    let sql = "SELECT pg_current_wal_insert_lsn()::text AS lsn";
    let row = query_one(client, sql, &[], "read the log's insert position").await?;
    get_lsn(&row, "lsn")?
        .ok_or_else(|| Error::temporary("the server does not say where its log ends"))
}

/// Makes logical slot `name` for pgoutput, with failover on Postgres 17+, and says from where it streams.
///
/// The server first waits until every transaction that is now open has ended.
///
/// # Errors
/// Refused (SQLSTATE 42710) when it exists, refused (53400) when `max_replication_slots` are in use.
pub async fn create_slot(client: &Client, name: &str) -> Result<Lsn> {
    // Arguments: temporary, two-phase, failover.
    let sql = if server_version_num(client).await? >= 170_000 {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, $2, false, false, true)"
    } else {
        "SELECT lsn::text FROM pg_create_logical_replication_slot($1, $2, false, false)"
    };
    let row = query_one(
        client,
        sql,
        &[&name, &PLUGIN],
        "create the replication slot",
    )
    .await?;
    get_lsn(&row, "lsn")?.ok_or_else(|| Error::bug("a new slot has no position"))
}

/// The server's version: 150018 for 15.18.
pub async fn server_version_num(client: &Client) -> Result<u32> {
    let sql = "SELECT current_setting('server_version_num')::int4 AS version";
    let row = query_one(client, sql, &[], "read the server's version").await?;
    let version: i32 = get(&row, "version")?;
    Ok(u32::try_from(version).unwrap_or(0))
}

/// The setting `wal_level`; streaming needs `logical`.
pub async fn wal_level(client: &Client) -> Result<String> {
    let sql = "SELECT current_setting('wal_level') AS wal_level";
    get(
        &query_one(client, sql, &[], "read wal_level").await?,
        "wal_level",
    )
}

/// Runs a statement that gives exactly one row; `doing` completes "cannot …".
pub(super) async fn query_one(
    client: &Client,
    sql: &str,
    parameters: &[&(dyn ToSql + Sync)],
    doing: &str,
) -> Result<Row> {
    let row = client.query_one(sql, parameters).await;
    row.map_err(|error| sql_error(doing, error))
}

/// A column by name; a wrong type is a mistake of ours.
pub(super) fn get<'a, T: tokio_postgres::types::FromSql<'a>>(
    row: &'a Row,
    column: &str,
) -> Result<T> {
    row.try_get(column)
        .map_err(|error| sql_error("read a catalogue row", error))
}

fn get_lsn(row: &Row, column: &str) -> Result<Option<Lsn>> {
    let text: Option<&str> = get(row, column)?;
    text.map(|text| {
        text.parse()
            .map_err(|error| Error::bug(format!("cannot read {column}")).caused_by(error))
    })
    .transpose()
}
