//! The slot's row in `walpost.progress`: how far delivery is, and what of a gap is left.
//!
//! Input and output: a SQL connection. Snapshots are passed through as text; only Postgres looks into them.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::postgres::{sql_error, sqlstate};
use crate::{Error, Lsn, Result};

/// The table does not exist.
const UNDEFINED_TABLE: &str = "42P01";
/// Or nobody may look at it, or at its schema.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// A `pg_snapshot` as text (`xmin:xmax:xip,…`).
pub type Snapshot = String;

/// What is stored for a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Cluster that the snapshots are from.
    pub system_id: String,
    /// Every row visible in it has its receipt.
    pub delivered: Option<Snapshot>,
    /// Taken before the slot was made.
    pub scan_before: Option<Snapshot>,
    /// Taken after the slot was made.
    pub scan_upto: Option<Snapshot>,
    /// How far the scan of the gap is, by table.
    pub position: Position,
    /// The process that streamed last.
    pub session: Option<String>,
    /// What it told the slot last, if it stopped in good order.
    pub confirmed: Option<Lsn>,
    /// A snapshot in it knows transactions that this cluster has not come to.
    pub ahead: bool,
}

/// How far the scan of the gap is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// By table: rows up to this `seq` are out of the gap.
    pub tables: BTreeMap<String, i64>,
    /// The whole gap is closed.
    pub done: bool,
}

impl Progress {
    /// The gap, if there is one that is not closed.
    pub fn gap(&self) -> Option<&Snapshot> {
        self.scan_upto.as_ref().filter(|_| !self.position.done)
    }
}

/// The row of `slot`; `None` when there is none yet.
///
/// # Errors
/// Refused with [`is_missing`] true when the table is not there or not ours to see; temporary when the server is away.
pub async fn read(client: &Client, slot: &str) -> Result<Option<Progress>> {
    let sql = "SELECT system_id, delivered::text, scan_before::text, scan_upto::text, scan_position::text, session, confirmed_lsn::text,
                      coalesce(greatest(pg_snapshot_xmax(delivered), pg_snapshot_xmax(scan_before), pg_snapshot_xmax(scan_upto))
                               > pg_snapshot_xmax(pg_current_snapshot()), false)
               FROM walpost.progress WHERE slot = $1";
    let row = client
        .query_opt(sql, &[&slot])
        .await
        .map_err(|error| sql_error("read walpost.progress", error))?;
    row.map(|row| {
        let position: Option<String> = row.get(4);
        let confirmed: Option<String> = row.get(6);
        Ok(Progress {
            system_id: row.get(0),
            delivered: row.get(1),
            scan_before: row.get(2),
            scan_upto: row.get(3),
            position: position.map_or(Ok(Position::default()), |text| parse(&text))?,
            session: row.get(5),
            confirmed: confirmed.and_then(|lsn| lsn.parse().ok()),
            ahead: row.get(7),
        })
    })
    .transpose()
}

/// True for an error of [`read`] that says the table cannot be used.
pub fn is_missing(error: &Error) -> bool {
    matches!(
        sqlstate(error),
        Some(UNDEFINED_TABLE | INSUFFICIENT_PRIVILEGE | "3F000")
    )
}

/// Makes the row of a slot that has none: nothing is known of what was before.
pub async fn begin(client: &Client, slot: &str, system_id: &str) -> Result<()> {
    let sql =
        "INSERT INTO walpost.progress (slot, system_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    store(client, sql, &[&slot, &system_id]).await
}

/// A slot is about to be made: rows visible in `before` it will never stream. Until [`slot_made`] says the rest, the slot is
/// not one to be streamed.
pub async fn slot_making(
    client: &Client,
    slot: &str,
    system_id: &str,
    before: &Snapshot,
) -> Result<()> {
    let sql = "INSERT INTO walpost.progress (slot, system_id, scan_before) VALUES ($1, $2, $3::text::pg_snapshot)
               ON CONFLICT (slot) DO UPDATE
               SET scan_before = excluded.scan_before, scan_upto = NULL, scan_position = NULL, confirmed_lsn = NULL,
                   updated_at = clock_timestamp()";
    store(client, sql, &[&slot, &system_id, before]).await
}

/// The slot is there: rows not visible in `upto` are always streamed.
pub async fn slot_made(client: &Client, slot: &str, upto: &Snapshot) -> Result<()> {
    let sql = "UPDATE walpost.progress SET scan_upto = $2::text::pg_snapshot WHERE slot = $1";
    store(client, sql, &[&slot, upto]).await
}

/// What is committed now.
pub async fn snapshot(client: &Client) -> Result<Snapshot> {
    let row = client
        .query_one("SELECT pg_current_snapshot()::text", &[])
        .await;
    let row = row.map_err(|error| sql_error("take a snapshot", error))?;
    Ok(row.get(0))
}

/// Notes that every row visible in `delivered` has its receipt. What a slot's making left to be looked at is over then:
/// each row of the gap, and each that might come both ways, is visible in this snapshot.
pub async fn delivered(client: &Client, slot: &str, delivered: &Snapshot) -> Result<()> {
    let sql = "UPDATE walpost.progress
               SET delivered = $2::text::pg_snapshot, scan_before = NULL, scan_upto = NULL, scan_position = NULL,
                   updated_at = clock_timestamp()
               WHERE slot = $1";
    store(client, sql, &[&slot, delivered]).await
}

/// Begins a look of poll mode at everything that is visible in `upto`.
pub async fn look(client: &Client, slot: &str, upto: &Snapshot) -> Result<()> {
    let sql = "UPDATE walpost.progress
               SET scan_before = NULL, scan_upto = $2::text::pg_snapshot, scan_position = NULL, updated_at = clock_timestamp()
               WHERE slot = $1";
    store(client, sql, &[&slot, upto]).await
}

/// Notes how far the scan of the gap is. At its end everything visible in `scan_upto` is delivered.
pub async fn scanned(client: &Client, slot: &str, position: &Position) -> Result<()> {
    let sql = "UPDATE walpost.progress
               SET scan_position = $2::text::jsonb, updated_at = clock_timestamp(),
                   delivered = CASE WHEN $3 THEN scan_upto ELSE delivered END
               WHERE slot = $1";
    store(client, sql, &[&slot, &show(position), &position.done]).await
}

/// `session` streams now, and until it stops in good order nobody knows what the slot was told last.
pub async fn claim(client: &Client, slot: &str, session: &str) -> Result<()> {
    let sql = "UPDATE walpost.progress SET session = $2, confirmed_lsn = NULL
               WHERE slot = $1 AND (session IS DISTINCT FROM $2 OR confirmed_lsn IS NOT NULL)";
    store(client, sql, &[&slot, &session]).await
}

/// A stop in good order: what the slot was told last.
pub async fn stopped(client: &Client, slot: &str, confirmed: Lsn) -> Result<()> {
    let sql = "UPDATE walpost.progress SET confirmed_lsn = $2::text::pg_lsn WHERE slot = $1";
    store(client, sql, &[&slot, &confirmed.to_string()]).await
}

async fn store(
    client: &Client,
    sql: &str,
    values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<()> {
    let stored = client.execute(sql, values).await;
    stored
        .map(|_| ())
        .map_err(|error| sql_error("write walpost.progress", error))
}

/// `{"tables": {"walpost.outbox": 17}, "done": true}`.
fn show(position: &Position) -> String {
    serde_json::json!({ "tables": position.tables, "done": position.done }).to_string()
}

fn parse(text: &str) -> Result<Position> {
    let wrong = || {
        Error::refused("walpost.progress.scan_position is not what walpost wrote").hint(
            "UPDATE walpost.progress SET scan_position = NULL: the gap is then published again from its beginning",
        )
    };
    let value: serde_json::Value = serde_json::from_str(text).map_err(|_| wrong())?;
    let done = value["done"].as_bool().ok_or_else(wrong)?;
    let tables = value["tables"].as_object().ok_or_else(wrong)?;
    let tables = tables
        .iter()
        .map(|(table, seq)| Some((table.clone(), seq.as_i64()?)))
        .collect::<Option<_>>()
        .ok_or_else(wrong)?;
    Ok(Position { tables, done })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_read_as_it_was_written() {
        let mut position = Position::default();
        assert_eq!(parse(&show(&position)).unwrap(), position);
        position.tables.insert("walpost.outbox".to_owned(), 17);
        position.done = true;
        assert_eq!(parse(&show(&position)).unwrap(), position);
    }

    #[test]
    fn a_position_edited_into_nonsense_is_an_error_that_says_how_to_reset_it() {
        for text in ["{}", "[]", "7", r#"{"done": true, "tables": {"t": "x"}}"#] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.exit_code(), 69);
            assert!(error.report().contains("scan_position = NULL"), "{text}");
        }
    }
}
