//! Reconciliation: compares what the table holds with what the stream brought, and finds what is missing.
//!
//! Input: a SQL connection, the counts of the stream ([`super::streamed`]), two snapshots. Output: the transactions of which
//! the table has more rows than the stream brought, and the leaf tables that came with rows in them.
//!
//! # Why it is needed
//!
//! The stream can leave rows out without an error: the publication's table list, row filter or `publish` was changed and changed
//! back, the publication was dropped and made again (Postgres 18 goes on without it), a partition was attached with rows in it, the table was
//! replaced by another of its name. The confirmed LSN moves past such rows all the same. So the confirmed LSN alone does not
//! prove delivery. It is not tried to name every cause: the result is compared.
//!
//! # Why no row is left out
//!
//! Let `P` be the delivered snapshot that is stored, and `N` the next one, taken before log position L. When the
//! confirmed LSN has reached L, the stream has brought every row that it will ever bring of the transactions visible in `N` (see
//! [`super`]). The stream's rows were counted by the value of their `txid` column. The table is asked for the same: rows
//! visible in `N` and not in `P`, by `txid`. A `txid` with more rows in the table than were counted is short: at least one of its rows was not
//! brought. (Fewer is normal: rows that their own transaction deleted, rows that retention deleted.) `N` becomes `delivered` only after
//! all rows of each short `txid` were published from the table or stored as stragglers. So a row is covered by `delivered`
//! only if it was brought, published from the table, or stored.
//!
//! **Leaf tables.** The argument needs that the rows visible in `P` were compared when `P` was noted. That is not so for a leaf table
//! that did not belong to the outbox then. `walpost.progress.tables` holds the OIDs of those that did. A leaf table that is not
//! among them is a gap of its own: its rows visible in `P` are published. A leaf that was detached and comes back is covered up to
//! the snapshot that was stored when it was last seen.
//!
//! # What is not checked
//!
//! * The counts live in the process. A stop in good order stores them in `walpost.progress.streamed`, and the next start goes on with them. After a
//!   crash, transactions between `delivered` and the next start cannot be compared. (`walpost verify` compares them with the topics.)
//! * A row with the `txid` of another transaction, a copy (COPY, INSERT … SELECT), that is committed while the tables are compared is not known as brought yet.
//!   The tables are then compared again behind it, up to three times ([`super::delivered`]). Only where such rows are committed during
//!   each of these is their transaction taken for short, and its rows are published again.
//! * A row that is changed by UPDATE keeps its `txid`, so it is not a new event; see `sql/03_outbox.sql`.
//! * Tables without `txid` and `seq`. Where a table in use is given these columns, its older rows get the transaction of that statement,
//!   and the stream has not counted them: its comparison begins at the note after the next one. (A table that is new in the settings is
//!   compared at once: the stream brought nothing of it.)
//!
//! # Cost
//!
//! One query for each table and note, over the rows since the last note, which the index on `txid::text::bigint` serves.

use futures::{StreamExt as _, pin_mut};
use tokio_postgres::Client;

use super::missing::{Leaves, XidRanges, leaves_since};
use super::progress::Snapshot;
use super::streamed::StreamedRows;
use super::table::{ScanTable, between};
use crate::postgres::{TableName, sql_error};
use crate::{Error, Result};

/// What is compared: rows visible in `upto` and not in `delivered`.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    /// The snapshot that is to be noted.
    pub upto: &'a Snapshot,
    /// The one that is stored.
    pub delivered: &'a Snapshot,
    /// Rows visible in it are not compared: an earlier process that crashed may have brought them.
    pub unchecked: Option<&'a Snapshot>,
    /// Leaf tables of which no earlier process can have brought rows: they are compared all the same.
    pub came: &'a [u32],
}

/// What a comparison of one table found.
#[derive(Clone, Debug, Default)]
pub struct Compared {
    /// Rows of the table in the window.
    pub rows: u64,
    /// Transactions that are short.
    pub txids: XidRanges,
    /// How many rows are missing, at least.
    pub missing: u64,
    /// How many transactions (or buckets of them) are short.
    pub short: u64,
    /// The first of them.
    pub first: Option<u64>,
}

/// Compares the rows of `table` in the window with those that the stream brought.
///
/// # Errors
/// Temporary when the server is away; refused when the table cannot be read.
pub async fn compare(
    client: &Client,
    table: &ScanTable,
    window: Window<'_>,
    streamed: &StreamedRows,
) -> Result<Compared> {
    let failed = |error| {
        sql_error(
            &format!("compare table {} with the stream", table.name),
            error,
        )
    };
    let shift = streamed.shift();
    let rows = between(window.upto, Some(window.delivered))?;
    let unchecked = match window.unchecked {
        Some(snapshot) => {
            let came: Vec<String> = window.came.iter().map(ToString::to_string).collect();
            let checked = between(window.upto, Some(snapshot))?;
            if came.is_empty() {
                format!(" AND {checked}")
            } else {
                format!(" AND (({checked}) OR tableoid IN ({}))", came.join(", "))
            }
        }
        None => String::new(),
    };
    // Grouped by the type itself where each transaction counts: the conversion then costs once a group and not once a row.
    let (key, group) = if shift == 0 {
        ("txid::text::bigint".to_owned(), "txid".to_owned())
    } else {
        let key = format!("(txid::text::bigint >> {shift})");
        (key.clone(), key)
    };
    let sql = format!(
        "SELECT {key}, count(*) FROM {} WHERE {rows}{unchecked} GROUP BY {group} ORDER BY {group}",
        table.name
    );
    let parameters: [&str; 0] = [];
    let found = client.query_raw(&sql, parameters).await.map_err(failed)?;
    pin_mut!(found);
    let mut compared = Compared::default();
    let mut joins = false;
    while let Some(row) = found.next().await {
        let row = row.map_err(failed)?;
        let number = |column: usize| -> Result<u64> {
            let value: i64 = row.try_get(column).map_err(failed)?;
            u64::try_from(value).map_err(|_| Error::bug("a negative count or transaction id"))
        };
        let (key, rows) = (number(0)?, number(1)?);
        compared.rows += rows;
        let brought = streamed.of_key(key);
        let (first, end) = (key << shift, (key + 1) << shift);
        if rows > brought {
            compared.txids.add(first, end, joins);
            compared.missing += rows - brought;
            compared.short += 1;
            compared.first = compared.first.or(Some(first));
        }
        joins = rows > brought;
    }
    Ok(compared)
}

/// The leaf tables of an outbox: itself, or its partitions and children that hold rows of their own.
///
/// # Errors
/// Temporary when there is no such table at the moment: nothing can be said of its rows.
pub async fn leaves(client: &Client, name: &TableName) -> Result<Vec<u32>> {
    const SQL: &str = "
        WITH RECURSIVE tree AS (
            SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = $1 AND c.relname = $2
            UNION
            SELECT i.inhrelid FROM pg_inherits i JOIN tree ON i.inhparent = tree.oid WHERE NOT i.inhdetachpending)
        SELECT c.oid, c.relkind <> 'p' FROM tree JOIN pg_class c ON c.oid = tree.oid ORDER BY c.oid";
    let found = client.query(SQL, &[&name.schema, &name.name]).await;
    let found = found.map_err(|error| sql_error("look for the outbox' partitions", error))?;
    if found.is_empty() {
        return Err(Error::temporary(format!(
            "table {name} does not exist at the moment: nothing of it counts as delivered"
        )));
    }
    let leaves = found.iter().filter(|row| row.get(1));
    Ok(leaves.map(|row| row.get(0)).collect())
}

/// Which of `tables` exist.
pub(super) async fn alive(client: &Client, tables: &Leaves) -> Result<Vec<u32>> {
    let oids: Vec<u32> = tables.keys().copied().collect();
    let found = client
        .query("SELECT oid FROM pg_class WHERE oid = ANY ($1)", &[&oids])
        .await;
    let found = found.map_err(|error| sql_error("look for partitions", error))?;
    Ok(found.iter().map(|row| row.get(0)).collect())
}

/// Leaf tables, and what of them is not covered.
#[derive(Clone, Debug, Default)]
pub struct LeafChanges {
    /// What is covered from the next note on.
    pub covered: Leaves,
    /// By table, in the order of the settings: leaf tables with rows that are not covered.
    pub uncovered: Vec<Leaves>,
    /// By table: whether a leaf table of it was covered before.
    pub was_known: Vec<bool>,
    /// By table: leaf tables that belong to it now and were not covered, with or without rows.
    pub came: Vec<Vec<u32>>,
}

/// Compares the leaf tables of all outbox tables with those that the stored snapshot covers. Without a list of those (a
/// row that an earlier version wrote) all count as covered.
pub async fn leaf_changes(
    client: &Client,
    tables: &[TableName],
    scannable: &[Option<ScanTable>],
    covered: Option<&Leaves>,
    delivered: &Snapshot,
) -> Result<LeafChanges> {
    let mut now = Vec::with_capacity(tables.len());
    for table in tables {
        now.push(leaves(client, table).await?);
    }
    let all: Vec<u32> = now.iter().flatten().copied().collect();
    let Some(covered) = covered else {
        return Ok(LeafChanges {
            covered: all.into_iter().map(|oid| (oid, None)).collect(),
            uncovered: vec![Leaves::new(); tables.len()],
            was_known: vec![true; tables.len()],
            came: vec![Vec::new(); tables.len()],
        });
    };
    let alive = alive(client, covered).await?;
    let (next, came) = leaves_since(covered, &all, &alive, delivered);
    let mut uncovered = Vec::with_capacity(tables.len());
    for (oids, table) in now.iter().zip(scannable) {
        let mut with_rows = Leaves::new();
        for (oid, until) in came.iter().filter(|(oid, _)| oids.contains(oid)) {
            if let Some(table) = table
                && has_uncovered(client, table, *oid, until.as_ref(), delivered).await?
            {
                with_rows.insert(*oid, until.clone());
            }
        }
        uncovered.push(with_rows);
    }
    let belonged = |oids: &Vec<u32>| oids.iter().any(|oid| covered.get(oid) == Some(&None));
    Ok(LeafChanges {
        covered: next,
        uncovered,
        was_known: now.iter().map(belonged).collect(),
        came: now
            .iter()
            .map(|oids| {
                oids.iter()
                    .copied()
                    .filter(|oid| came.contains_key(oid))
                    .collect()
            })
            .collect(),
    })
}

/// The leaf tables that are covered from now on where nothing is compared: all that belong to the outbox tables.
pub async fn covered_now(
    client: &Client,
    tables: &[TableName],
    covered: Option<&Leaves>,
    delivered: Option<&Snapshot>,
) -> Result<Leaves> {
    let mut all = Vec::new();
    for table in tables {
        all.extend(leaves(client, table).await?);
    }
    Ok(match (covered, delivered) {
        (Some(covered), Some(delivered)) => {
            let alive = alive(client, covered).await?;
            leaves_since(covered, &all, &alive, delivered).0
        }
        _ => all.into_iter().map(|oid| (oid, None)).collect(),
    })
}

async fn has_uncovered(
    client: &Client,
    table: &ScanTable,
    leaf: u32,
    until: Option<&Snapshot>,
    delivered: &Snapshot,
) -> Result<bool> {
    let failed = |error| {
        sql_error(
            &format!("look into a new partition of {}", table.name),
            error,
        )
    };
    // A partition that was just made is empty, and is known from then on: nothing is read for it.
    let size = client
        .query_one(
            "SELECT coalesce(pg_relation_size($1::oid), 0) > 0",
            &[&leaf],
        )
        .await;
    if !size.map_err(failed)?.get::<_, bool>(0) {
        return Ok(false);
    }
    let sql = format!(
        "SELECT EXISTS (SELECT FROM {} WHERE tableoid = {leaf} AND {})",
        table.name,
        between(delivered, until)?
    );
    let row = client.query_one(&sql, &[]).await.map_err(failed)?;
    Ok(row.get(0))
}

/// SQL: the rows of a table that are a gap: visible in `upto` and not in `delivered`, of the short transactions only where a
/// comparison named those; and the rows of leaf tables that `delivered` does not cover.
///
/// # Errors
/// A bug when a snapshot is not one.
pub fn gap_condition(
    upto: &Snapshot,
    delivered: Option<&Snapshot>,
    txids: Option<&XidRanges>,
    leaves: &Leaves,
) -> Result<String> {
    let mut conditions = Vec::new();
    match txids {
        None => conditions.push(between(upto, delivered)?),
        Some(txids) if txids.is_empty() => {}
        Some(txids) => conditions.push(format!(
            "{} AND '{}'::int8multirange @> txid::text::bigint",
            between(upto, delivered)?,
            txids.to_sql()
        )),
    }
    if let Some(delivered) = delivered {
        for (leaf, until) in leaves {
            let rows = between(delivered, until.as_ref())?;
            conditions.push(format!("tableoid = {leaf} AND {rows}"));
        }
    }
    Ok(if conditions.is_empty() {
        "false".to_owned()
    } else {
        format!("(({}))", conditions.join(") OR ("))
    })
}
