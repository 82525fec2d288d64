//! The slot's row in `walpost.progress`: how far delivery is, and what of a gap is left.
//!
//! Input and output: a SQL connection. Snapshots are passed through as text; only Postgres looks into them.
//!
//! # Two writers never undo each other
//!
//! Every statement that changes a row is made by the holder of the slot's advisory lock ([`super::recovery`],
//! `walpost init`, `sql/11_slot.sql`), or by a task of the process that holds it, on a session of that task's own. The lock
//! belongs to a session: it may end while a task of the same process still writes. So each statement also names the
//! [`Claim`] that it is made under and the values that it was computed from, and changes nothing when one of them is not
//! what is stored (a compare-and-set). Zero rows updated is an error: the caller reads the row again and computes anew. The functions
//! that change a row bring the [`Progress`] that they are given up to date when the statement has succeeded, and only then.
//!
//! A statement whose answer is lost may have been carried out. The [`Progress`] in memory is then out of date, and the next statement
//! that is computed from it is refused. [`reread`] gives the row as it is, if it still belongs to the claim.
//!
//! `tests/bookkeeping.rs` lets two sessions write in every order that matters.

use std::collections::BTreeMap;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Transaction};

use super::coverage::{Leaves, Seen};
use super::missing::Missing;
use crate::postgres::{sql_error, sqlstate};
use crate::{Error, Lsn, Result};

/// The table does not exist.
const UNDEFINED_TABLE: &str = "42P01";
/// Or nobody may look at it, or at its schema.
const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// The table is of an earlier version.
const UNDEFINED_COLUMN: &str = "42703";

/// A `pg_snapshot` as text (`xmin:xmax:xip,…`).
pub type Snapshot = String;

/// What is stored for a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Cluster that the snapshots are from.
    pub system_id: String,
    /// Every row visible in it has its receipt.
    pub delivered: Option<Snapshot>,
    /// Rows visible in it are never streamed.
    pub scan_before: Option<Snapshot>,
    /// Rows not visible in it are always streamed.
    pub scan_upto: Option<Snapshot>,
    /// How far the scan of the gap is, by table.
    pub position: Position,
    /// The process that streamed last.
    pub session: Option<String>,
    /// What it told the slot last, if it stopped in good order.
    pub confirmed: Option<Lsn>,
    /// Timeline of the cluster when the slot was made or last claimed; `None` in a row of an earlier version.
    pub timeline: Option<u32>,
    /// What `delivered` says of the leaf tables; `None` in a row of an earlier version.
    pub tables: Option<Leaves>,
    /// JSON: what the stream brought since `delivered`, if its process stopped in good order.
    pub streamed: Option<String>,
    /// [`published::version`](crate::postgres::published::version), read before `delivered` (of a gap: `scan_upto`) was taken. `None`: not
    /// known, or a transaction that is older than the version ran then.
    pub catalog: Option<String>,
    /// A snapshot in it knows transactions that this cluster has not come to.
    pub ahead: bool,
    /// Of the producers' names: see [`super::name_mark`].
    pub generation: u64,
}

/// How far the scan of the gap is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// By table: rows up to this `seq` are out of the gap.
    pub tables: BTreeMap<String, i64>,
    /// The whole gap is closed.
    pub done: bool,
    /// The gap is these rows only: a comparison found that the stream did not bring them. `None`: everything visible in `scan_upto`
    /// and not in `delivered`.
    pub missing: Option<Missing>,
    /// By table: the leaf tables of which the scan has read every row up to its place, or the comparison that found the gap.
    pub covered: BTreeMap<String, Seen>,
    /// By table: published rows that `delivered` does not cover yet, because another table could not be read.
    pub ahead: BTreeMap<String, Stretch>,
    /// By table: the end of a scan that could not be finished, and that goes on before a later one begins.
    pub left: BTreeMap<String, Stretch>,
}

/// How far the rows of one table are to be published, or are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// Rows visible in it.
    pub upto: Snapshot,
    /// The leaf tables whose rows were seen.
    pub leaves: Seen,
}

impl Position {
    /// What is kept of it when a gap gets a later end.
    fn beyond(&self) -> Self {
        let begun = self.tables.iter();
        let begun = begun.filter(|(table, _)| self.left.contains_key(*table));
        Self {
            tables: begun.map(|(table, seq)| (table.clone(), *seq)).collect(),
            ahead: self.ahead.clone(),
            left: self.left.clone(),
            ..Self::default()
        }
    }
}

impl Progress {
    /// The gap, if there is one that is not closed.
    pub fn gap(&self) -> Option<&Snapshot> {
        self.scan_upto.as_ref().filter(|_| !self.position.done)
    }

    /// A slot's making began, and did not come to its end.
    pub fn is_cut_short(&self) -> bool {
        self.scan_before.is_some() && self.scan_upto.is_none()
    }
}

/// The right to change a slot's row: [`claim`] gives it to the holder of the slot's lock, and it ends when another process
/// claims the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    slot: String,
    session: String,
}

impl Claim {
    /// The replication slot.
    pub fn slot(&self) -> &str {
        &self.slot
    }

    /// The process that claimed its row.
    pub fn session(&self) -> &str {
        &self.session
    }
}

/// The row of `slot`; `None` when there is none yet.
///
/// # Errors
/// Refused with [`is_missing`] true when the table is not there or not ours to see; refused without it when it is an earlier
/// version's; temporary when the server is away.
pub async fn read(client: &Client, slot: &str) -> Result<Option<Progress>> {
    let sql = "SELECT system_id, delivered::text, scan_before::text, scan_upto::text, scan_position::text, session, confirmed_lsn::text,
                      coalesce(greatest(pg_snapshot_xmax(delivered), pg_snapshot_xmax(scan_before), pg_snapshot_xmax(scan_upto))
                               > pg_snapshot_xmax(pg_current_snapshot()), false),
                      timeline, tables::text, streamed::text, catalog, producer_generation
               FROM walpost.progress WHERE slot = $1";
    let row = client.query_opt(sql, &[&slot]).await.map_err(|error| {
        let error = sql_error("read walpost.progress", error);
        if sqlstate(&error) == Some(UNDEFINED_COLUMN) {
            Error::refused("table walpost.progress is an earlier version's")
                .caused_by(error)
                .hint("walpost init brings it up to date, as the table's owner")
        } else {
            error
        }
    })?;
    row.map(|row| {
        let position: Option<String> = row.get(4);
        let confirmed: Option<String> = row.get(6);
        let timeline: Option<i32> = row.get(8);
        let leaves: Option<String> = row.get(9);
        Ok(Progress {
            system_id: row.get(0),
            delivered: row.get(1),
            scan_before: row.get(2),
            scan_upto: row.get(3),
            position: position.map_or(Ok(Position::default()), |text| parse(&text))?,
            session: row.get(5),
            confirmed: confirmed.and_then(|lsn| lsn.parse().ok()),
            ahead: row.get(7),
            timeline: timeline.map(i32::cast_unsigned),
            tables: leaves.map(|text| leaves_of(&text)).transpose()?,
            streamed: row.get(10),
            catalog: row.get(11),
            generation: row.get::<_, i64>(12).unsigned_abs(),
        })
    })
    .transpose()
}

/// The row of a claim, as it is now.
///
/// # Errors
/// As [`read`]; temporary when the row is gone, or another process has claimed it.
pub async fn reread(client: &Client, claim: &Claim) -> Result<Progress> {
    let progress = read(client, &claim.slot).await?;
    progress
        .filter(|progress| progress.session.as_ref() == Some(&claim.session))
        .ok_or_else(|| changed(&claim.slot))
}

/// True for an error of [`read`] that says the table cannot be used.
pub fn is_missing(error: &Error) -> bool {
    matches!(
        sqlstate(error),
        Some(UNDEFINED_TABLE | INSUFFICIENT_PRIVILEGE | "3F000")
    )
}

/// True for an error that says the row is not what the change was computed from.
pub fn is_changed(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    source
        .and_then(|source| source.downcast_ref::<Changed>())
        .is_some()
}

/// Makes the row of a slot that has none: nothing is known of what was before.
///
/// # Errors
/// Temporary when there is a row by now.
pub async fn begin(client: &Client, slot: &str, system_id: &str) -> Result<Progress> {
    let sql =
        "INSERT INTO walpost.progress (slot, system_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
    store(client, slot, sql, &[&slot, &system_id]).await?;
    Ok(Progress {
        system_id: system_id.to_owned(),
        ..Progress::default()
    })
}

/// A slot is about to be made: rows visible in `before` it will never stream. Until [`slot_made`] says the rest, the slot is
/// not one to be streamed. `from` is the row as it was read, `None` where there was none. `catalog` is the version of publication and tables, read before.
/// Returns the row as it is then.
///
/// # Errors
/// Temporary when the row is not as it was read.
pub async fn slot_making(
    client: &Client,
    slot: &str,
    from: Option<&Progress>,
    identity: (&str, u32),
    before: &Snapshot,
    catalog: Option<&str>,
) -> Result<Progress> {
    let (system_id, timeline) = identity;
    let stored_timeline = timeline.cast_signed();
    if let Some(from) = from {
        let sql = "UPDATE walpost.progress
                   SET scan_before = $7::text::pg_snapshot, scan_upto = NULL, scan_position = NULL, confirmed_lsn = NULL,
                       streamed = NULL, timeline = $8, catalog = $9, updated_at = clock_timestamp()
                   WHERE slot = $1 AND session IS NOT DISTINCT FROM $2 AND delivered::text IS NOT DISTINCT FROM $3
                     AND scan_before::text IS NOT DISTINCT FROM $4 AND scan_upto::text IS NOT DISTINCT FROM $5 AND system_id = $6";
        let values: [&(dyn ToSql + Sync); 9] = [
            &slot,
            &from.session,
            &from.delivered,
            &from.scan_before,
            &from.scan_upto,
            &from.system_id,
            before,
            &stored_timeline,
            &catalog,
        ];
        store(client, slot, sql, &values).await?;
    } else {
        let sql = "INSERT INTO walpost.progress (slot, system_id, scan_before, timeline, catalog)
                   VALUES ($1, $2, $3::text::pg_snapshot, $4, $5) ON CONFLICT DO NOTHING";
        let values: [&(dyn ToSql + Sync); 5] =
            [&slot, &system_id, before, &stored_timeline, &catalog];
        store(client, slot, sql, &values).await?;
    }
    Ok(Progress {
        system_id: system_id.to_owned(),
        scan_before: Some(before.clone()),
        scan_upto: None,
        position: Position::default(),
        confirmed: None,
        timeline: Some(timeline),
        streamed: None,
        catalog: catalog.map(str::to_owned),
        ..from.cloned().unwrap_or_default()
    })
}

/// The slot is there and stands at `stands`: rows not visible in `upto` are always streamed. `making` is what [`slot_making`]
/// returned.
///
/// # Errors
/// Temporary when another process has changed the row since: the slot is then not one to be streamed.
pub async fn slot_made(
    client: &Client,
    slot: &str,
    making: &mut Progress,
    upto: &Snapshot,
    stands: Lsn,
) -> Result<()> {
    let sql = "UPDATE walpost.progress SET scan_upto = $5::text::pg_snapshot, confirmed_lsn = $6::text::pg_lsn
               WHERE slot = $1 AND session IS NOT DISTINCT FROM $2 AND delivered::text IS NOT DISTINCT FROM $3
                 AND scan_before::text IS NOT DISTINCT FROM $4 AND scan_upto IS NULL";
    let values: [&(dyn ToSql + Sync); 6] = [
        &slot,
        &making.session,
        &making.delivered,
        &making.scan_before,
        upto,
        &stands.to_string(),
    ];
    store(client, slot, sql, &values).await?;
    making.scan_upto = Some(upto.clone());
    making.confirmed = Some(stands);
    Ok(())
}

/// What is committed now.
pub async fn snapshot(client: &Client) -> Result<Snapshot> {
    let row = client
        .query_one("SELECT pg_current_snapshot()::text", &[])
        .await;
    let row = row.map_err(|error| sql_error("take a snapshot", error))?;
    Ok(row.get(0))
}

/// Notes that every row of these leaf tables (`None`: those that are stored) that is visible in `snapshot` has its receipt, or is stored as a straggler. What a slot's making
/// left to be looked at is over then: each row of the gap, and each that might come both ways, is visible in this snapshot.
///
/// # Errors
/// Temporary when the row is not `from` under this claim any more; a bug while a gap is open.
pub async fn delivered(
    client: &Client,
    claim: &Claim,
    from: &mut Progress,
    snapshot: &Snapshot,
    tables: Option<Leaves>,
    catalog: Option<String>,
) -> Result<()> {
    if from.gap().is_some() {
        return Err(Error::bug(format!(
            "what is delivered cannot be noted for slot {} while rows of a gap are not published",
            claim.slot
        )));
    }
    let set = "delivered = $6::text::pg_snapshot, tables = coalesce($7::text::jsonb, tables), catalog = $8,
               scan_before = NULL, scan_upto = NULL, scan_position = NULL";
    let shown = tables.as_ref().map(|tables| tables.to_json().to_string());
    let values: [&(dyn ToSql + Sync); 3] = [snapshot, &shown, &catalog];
    change(client, claim, from, set, &values).await?;
    from.catalog = catalog;
    from.delivered = Some(snapshot.clone());
    from.tables = tables.or_else(|| from.tables.take());
    (from.scan_before, from.scan_upto) = (None, None);
    from.position = Position::default();
    Ok(())
}

/// Stores a gap that a comparison found: `position` says which rows, `upto` is the snapshot that is delivered once they are published.
///
/// # Errors
/// Temporary when the row is not `from` under this claim any more; a bug while another gap is open.
pub async fn missing(
    client: &Client,
    claim: &Claim,
    from: &mut Progress,
    upto: &Snapshot,
    position: Position,
    catalog: Option<String>,
) -> Result<()> {
    if from.gap().is_some() {
        return Err(Error::bug(format!(
            "rows that are missing cannot be noted for slot {} while rows of another gap are not published",
            claim.slot
        )));
    }
    let set = "scan_before = NULL, scan_upto = $6::text::pg_snapshot, scan_position = $7::text::jsonb, catalog = $8";
    let values: [&(dyn ToSql + Sync); 3] = [upto, &show(&position), &catalog];
    change(client, claim, from, set, &values).await?;
    (from.scan_before, from.scan_upto) = (None, Some(upto.clone()));
    from.position = position;
    from.catalog = catalog;
    Ok(())
}

/// Begins a look of poll mode at everything that is visible in `upto`. Tables that could not be read until now keep their place.
///
/// # Errors
/// Temporary when the row is not `from` under this claim any more.
pub async fn look(
    client: &Client,
    claim: &Claim,
    from: &mut Progress,
    upto: &Snapshot,
) -> Result<()> {
    let position = from.position.beyond();
    let shown = (position != Position::default()).then(|| show(&position));
    let set =
        "scan_before = NULL, scan_upto = $6::text::pg_snapshot, scan_position = $7::text::jsonb";
    change(client, claim, from, set, &[upto, &shown]).await?;
    (from.scan_before, from.scan_upto) = (None, Some(upto.clone()));
    from.position = position;
    Ok(())
}

/// Opens a gap of everything that is visible in the second snapshot, before a slot is streamed whose past nobody knows. Rows visible
/// in the first one it does not stream. From now on the slot is one of this timeline that stands there: one that is put in its place while the
/// scan goes on is noticed.
///
/// # Errors
/// A bug while a gap is open; temporary when the row is not `from` under this claim any more.
pub async fn scan_again(
    client: &Client,
    claim: &Claim,
    from: &mut Progress,
    (before, upto): (Option<&Snapshot>, &Snapshot),
    (timeline, stands): (u32, Lsn),
    catalog: Option<String>,
) -> Result<()> {
    if from.gap().is_some() {
        return Err(Error::bug(
            "a gap is open, and another one was to be opened",
        ));
    }
    let set = "scan_before = $6::text::pg_snapshot, scan_upto = $7::text::pg_snapshot, scan_position = NULL, timeline = $8,
               confirmed_lsn = $9::text::pg_lsn, catalog = $10, streamed = NULL";
    let stands_at = stands.to_string();
    let values: [&(dyn ToSql + Sync); 5] =
        [&before, upto, &timeline.cast_signed(), &stands_at, &catalog];
    change(client, claim, from, set, &values).await?;
    from.scan_before = before.cloned();
    from.scan_upto = Some(upto.clone());
    from.position = Position::default();
    from.timeline = Some(timeline);
    from.confirmed = Some(stands);
    from.catalog = catalog;
    from.streamed = None;
    Ok(())
}

/// Stores how far the scan of the gap is: the position in `progress`.
///
/// # Errors
/// Temporary when the row is not `progress` under this claim any more.
pub async fn scanned(client: &Client, claim: &Claim, progress: &Progress) -> Result<()> {
    let set = "scan_position = $6::text::jsonb";
    change(client, claim, progress, set, &[&show(&progress.position)]).await
}

/// Stores which leaf tables belong to the outbox, before a stream begins.
///
/// # Errors
/// Temporary when the row is not `progress` under this claim any more.
pub async fn declared(
    client: &Client,
    claim: &Claim,
    progress: &mut Progress,
    tables: Leaves,
) -> Result<()> {
    let shown = tables.to_json().to_string();
    let set = "tables = $6::text::jsonb";
    change(client, claim, progress, set, &[&shown]).await?;
    progress.tables = Some(tables);
    Ok(())
}

/// The gap is closed: everything of these leaf tables that is visible in `scan_upto` is delivered.
///
/// # Errors
/// Temporary when the row is not `progress` under this claim any more.
pub async fn closed(
    client: &Client,
    claim: &Claim,
    progress: &mut Progress,
    tables: Leaves,
) -> Result<()> {
    let position = Position {
        done: true,
        ahead: BTreeMap::new(),
        left: BTreeMap::new(),
        ..progress.position.clone()
    };
    let set = "scan_position = $6::text::jsonb, tables = $7::text::jsonb, delivered = scan_upto";
    let shown = tables.to_json().to_string();
    change(client, claim, progress, set, &[&show(&position), &shown]).await?;
    progress.tables = Some(tables);
    progress.position = position;
    progress.delivered.clone_from(&progress.scan_upto);
    Ok(())
}

/// `session` has the slot's lock from now on, on this timeline (`None`: the one that is stored stays). What the last process left in
/// `confirmed` holds until this one streams: see [`streaming`].
///
/// # Errors
/// Temporary when the row is not as it was read.
pub async fn claim(
    client: &Client,
    slot: &str,
    from: &Progress,
    session: &str,
    timeline: Option<u32>,
) -> Result<Claim> {
    let sql = "UPDATE walpost.progress SET session = $6, timeline = coalesce($7, timeline)
               WHERE slot = $1 AND session IS NOT DISTINCT FROM $2 AND delivered::text IS NOT DISTINCT FROM $3
                 AND scan_before::text IS NOT DISTINCT FROM $4 AND scan_upto::text IS NOT DISTINCT FROM $5";
    let values: [&(dyn ToSql + Sync); 7] = [
        &slot,
        &from.session,
        &from.delivered,
        &from.scan_before,
        &from.scan_upto,
        &session,
        &timeline.map(u32::cast_signed),
    ];
    store(client, slot, sql, &values).await?;
    Ok(Claim {
        slot: slot.to_owned(),
        session: session.to_owned(),
    })
}

/// The slot is about to be streamed: until the process stops in good order nobody knows what the slot was told last. (`streamed` stays:
/// it names the position at which it holds.)
///
/// # Errors
/// Temporary when another process has claimed the row.
pub async fn streaming(client: &Client, claim: &Claim) -> Result<()> {
    let sql = "UPDATE walpost.progress SET confirmed_lsn = NULL WHERE slot = $1 AND session = $2";
    store(client, &claim.slot, sql, &[&claim.slot, &claim.session]).await
}

/// A stop in good order: what the slot was told last, and what the stream brought since `delivered` (JSON), if that is known.
///
/// # Errors
/// Temporary when another process has claimed the row.
pub async fn stopped(
    client: &Client,
    claim: &Claim,
    confirmed: Lsn,
    streamed: Option<&str>,
) -> Result<()> {
    let sql =
        "UPDATE walpost.progress SET confirmed_lsn = $3::text::pg_lsn, streamed = $4::text::jsonb
               WHERE slot = $1 AND session = $2 AND confirmed_lsn IS NULL";
    let values: [&(dyn ToSql + Sync); 4] = [
        &claim.slot,
        &claim.session,
        &confirmed.to_string(),
        &streamed,
    ];
    store(client, &claim.slot, sql, &values).await
}

/// Stores that names of earlier generations than this one are not to be used again. One that is as high, or higher, stays.
///
/// # Errors
/// Temporary with [`is_changed`] true when another process has claimed the row.
pub async fn raise_generation(client: &Client, claim: &Claim, generation: u64) -> Result<()> {
    let sql = "UPDATE walpost.progress SET producer_generation = greatest(producer_generation, $3)
               WHERE slot = $1 AND session = $2";
    let generation = generation.cast_signed();
    let values: [&(dyn ToSql + Sync); 3] = [&claim.slot, &claim.session, &generation];
    store(client, &claim.slot, sql, &values).await
}

/// Keeps every other process from claiming the row until the transaction ends.
///
/// # Errors
/// Temporary with [`is_changed`] true when another process has claimed it, or it cannot be looked at any more.
pub async fn hold(transaction: &Transaction<'_>, claim: &Claim) -> Result<()> {
    let sql = "SELECT FROM walpost.progress WHERE slot = $1 AND session = $2 FOR SHARE";
    find(transaction, claim, sql).await
}

/// Whether the claim holds at this moment.
///
/// # Errors
/// As [`hold`].
pub async fn check(client: &impl GenericClient, claim: &Claim) -> Result<()> {
    let sql = "SELECT FROM walpost.progress WHERE slot = $1 AND session = $2";
    find(client, claim, sql).await
}

async fn find(client: &impl GenericClient, claim: &Claim, sql: &str) -> Result<()> {
    let Claim { slot, session } = claim;
    let lost = || not_claimed(format!("this process has no claim to slot {slot} any more"));
    match client.query_opt(sql, &[slot, session]).await {
        Ok(found) => found.map(|_| ()).ok_or_else(lost),
        Err(error) => {
            let error = sql_error("look at the claim in walpost.progress", error);
            Err(if is_missing(&error) { lost() } else { error })
        }
    }
}

/// The error of who may not do something without a claim.
pub(super) fn not_claimed(why: String) -> Error {
    Error::temporary(why).caused_by(Changed)
}

/// Changes a row that is still `from` and still this claim's. `set` numbers its values from `$6`.
async fn change(
    client: &Client,
    claim: &Claim,
    from: &Progress,
    set: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<()> {
    let sql = format!(
        "UPDATE walpost.progress SET {set}, updated_at = clock_timestamp()
         WHERE slot = $1 AND session = $2 AND delivered::text IS NOT DISTINCT FROM $3
           AND scan_before::text IS NOT DISTINCT FROM $4 AND scan_upto::text IS NOT DISTINCT FROM $5"
    );
    let named: [&(dyn ToSql + Sync); 5] = [
        &claim.slot,
        &claim.session,
        &from.delivered,
        &from.scan_before,
        &from.scan_upto,
    ];
    store(client, &claim.slot, &sql, &[&named[..], values].concat()).await
}

/// Runs a statement that must change one row.
async fn store(
    client: &Client,
    slot: &str,
    sql: &str,
    values: &[&(dyn ToSql + Sync)],
) -> Result<()> {
    let stored = client.execute(sql, values).await;
    match stored.map_err(|error| sql_error("write walpost.progress", error))? {
        0 => Err(changed(slot)),
        _ => Ok(()),
    }
}

fn changed(slot: &str) -> Error {
    Error::temporary(format!(
        "the row of slot {slot} in walpost.progress is not what this process read: nothing was written"
    ))
    .caused_by(Changed)
}

/// The row is not what the change was computed from.
#[derive(Debug)]
struct Changed;

impl std::fmt::Display for Changed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another process or a person has changed it")
    }
}

impl std::error::Error for Changed {}

/// `{"tables": {"walpost.outbox": 17}, "done": true}`.
fn show(position: &Position) -> String {
    let mut value = serde_json::json!({ "tables": position.tables, "done": position.done });
    if let Some(missing) = &position.missing {
        value["missing"] = missing.to_json();
    }
    for (table, seen) in &position.covered {
        value["covered"][table] = seen.to_json();
    }
    for (name, stretches) in [("ahead", &position.ahead), ("left", &position.left)] {
        for (table, stretch) in stretches {
            value[name][table] = serde_json::json!({
                "upto": stretch.upto, "leaves": stretch.leaves.to_json(),
            });
        }
    }
    value.to_string()
}

/// By table: a part of what [`show`] made.
fn by_table<T>(
    value: &serde_json::Value,
    read: impl Fn(&serde_json::Value) -> Option<T>,
) -> Option<BTreeMap<String, T>> {
    let Some(tables) = value.as_object() else {
        return value.is_null().then(BTreeMap::new);
    };
    let tables = tables.iter();
    tables
        .map(|(table, value)| Some((table.clone(), read(value)?)))
        .collect()
}

fn stretch(value: &serde_json::Value) -> Option<Stretch> {
    Some(Stretch {
        upto: value["upto"].as_str()?.to_owned(),
        leaves: Seen::from_json(&value["leaves"])?,
    })
}

fn parse(text: &str) -> Result<Position> {
    let wrong = || {
        Error::refused("walpost.progress.scan_position is not what walpost wrote").hint(
            "UPDATE walpost.progress SET scan_position = NULL WHERE slot = '<this slot>' (of another slot it would open a gap that is closed): \
             the gap is then published again from its beginning",
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
    // An earlier version stored no tables there: then nothing of the gap counts as read.
    let is_earlier = Leaves::from_json(&value["covered"]).is_some();
    let (tables, covered) = if is_earlier {
        (BTreeMap::new(), BTreeMap::new())
    } else {
        let covered = by_table(&value["covered"], Seen::from_json);
        (tables, covered.ok_or_else(wrong)?)
    };
    let missing = match &value["missing"] {
        serde_json::Value::Null => None,
        missing => Some(Missing::from_json(missing).ok_or_else(wrong)?),
    };
    Ok(Position {
        tables,
        done,
        missing,
        covered,
        ahead: by_table(&value["ahead"], stretch).ok_or_else(wrong)?,
        left: by_table(&value["left"], stretch).ok_or_else(wrong)?,
    })
}

fn leaves_of(text: &str) -> Result<Leaves> {
    let value = serde_json::from_str(text).ok();
    value.and_then(|value| Leaves::from_json(&value)).ok_or_else(|| {
        Error::refused("walpost.progress.tables is not what walpost wrote").hint(
            "UPDATE walpost.progress SET tables = '{}' WHERE slot = '<this slot>' publishes every row again; with tables = NULL every \
             partition that there is now counts as covered, also one whose rows were never published",
        )
    })
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
        position.missing = Some(Missing::default());
        position.covered = BTreeMap::from([("walpost.outbox".to_owned(), Seen::listed([7, 8]))]);
        assert_eq!(parse(&show(&position)).unwrap(), position);
        let stretch = |upto: &str, leaf| Stretch {
            upto: upto.to_owned(),
            leaves: Seen::listed([leaf]),
        };
        let of = |table: &str, stretch| BTreeMap::from([(table.to_owned(), stretch)]);
        position.ahead = of("public.\"a b\"", stretch("5:6:", 7));
        position.left = of("walpost.outbox", stretch("4:4:", 9));
        assert_eq!(parse(&show(&position)).unwrap(), position);
    }

    #[test]
    fn a_position_edited_into_nonsense_is_an_error_that_says_how_to_reset_it() {
        for text in [
            "{}",
            "[]",
            "7",
            r#"{"done": true, "tables": {"t": "x"}}"#,
            r#"{"done": true, "tables": {}, "covered": {"t": {}}}"#,
            r#"{"done": true, "tables": {}, "ahead": 7}"#,
            r#"{"done": true, "tables": {}, "left": {"t": {"upto": "1:1:"}}}"#,
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.exit_code(), 69);
            assert!(error.report().contains("scan_position = NULL"), "{text}");
        }
    }
}
