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
//! that did not belong to the outbox then. `walpost.progress.tables` says which did ([`super::coverage`]). A leaf table that is not
//! covered is a gap of its own: its rows visible in `P` are published. A leaf that was detached and comes back is covered up to
//! the snapshot that was stored when it was last seen. One that came only after `N` was taken is left for the next note: it may have rows from
//! before it was attached that `N` does not show.
//!
//! # What is not checked
//!
//! * The counts live in the process. A stop in good order stores them in `walpost.progress.streamed`, and the next start goes on with them. After a
//!   crash, or a stop that could not wait for its receipts, nobody knows what was streamed of the transactions between `delivered` and the next
//!   start. They are not compared as long as the publication and the tables are what they were: then the stream has left none of them out. `walpost.progress.catalog`
//!   is the version of both ([`published::version`](crate::postgres::published::version)), read before `delivered` was taken, and stored only when every transaction that began before it is
//!   visible in `delivered`: so it holds for each row that `delivered` does not show. The next start reads it again behind the snapshot up to which nothing is compared. Where the two differ something was changed in between, or the version is not known (the slot was made by
//!   `sql/11_slot.sql`, and nothing was noted since; or an older transaction ran at the note). All rows of these transactions are then published from the table. Some of them come twice, none is lost.
//! * A row with the `txid` of another transaction, a copy (COPY, INSERT … SELECT), that is committed while the tables are compared is not known as brought yet.
//!   The tables are then compared again behind it, up to three times ([`super::delivered`]). Only where such rows are committed during
//!   each of these is their transaction taken for short, and its rows are published again.
//! * Rows are counted by transaction. Where the application deletes streamed rows of a transaction before the note, as many rows of the
//!   same transaction that the stream left out go unnoticed. (Walpost's own deletions do not hide any: in the modes `mark` and `delete` a row
//!   that was never marked is found by [`super::unmarked`].)
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

use super::coverage::{Leaves, Seen, Uncovered};
use super::missing::XidRanges;
use super::progress::{self, Claim, Progress, Snapshot};
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
    /// Leaf tables that came too late for this note: they are not compared.
    pub late: &'a [u32],
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
            let checked = between(window.upto, Some(snapshot))?;
            if window.came.is_empty() {
                format!(" AND {checked}")
            } else {
                format!(" AND (({checked}) OR tableoid IN ({}))", list(window.came))
            }
        }
        None => String::new(),
    };
    let late = if window.late.is_empty() {
        String::new()
    } else {
        format!(" AND tableoid NOT IN ({})", list(window.late))
    };
    // Grouped by the type itself where each transaction counts: the conversion then costs once a group and not once a row.
    let (key, group) = if shift == 0 {
        ("txid::text::bigint".to_owned(), "txid".to_owned())
    } else {
        let key = format!("(txid::text::bigint >> {shift})");
        (key.clone(), key)
    };
    let sql = format!(
        "SELECT {key}, count(*) FROM {} WHERE {rows}{unchecked}{late} GROUP BY {group} ORDER BY {group}",
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

fn list(oids: &[u32]) -> String {
    let oids: Vec<String> = oids.iter().map(ToString::to_string).collect();
    oids.join(", ")
}

/// The leaf tables of an outbox: itself, or its partitions and children that hold rows of their own.
///
/// # Errors
/// Temporary when there is no such table at the moment: nothing can be said of its rows.
pub async fn leaves(client: &Client, name: &TableName) -> Result<Seen> {
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
    Ok(Seen::listed(leaves.map(|row| row.get(0))))
}

/// Which of `tables` exist.
pub(super) async fn alive(client: &Client, tables: &Leaves) -> Result<Vec<u32>> {
    let oids = tables.oids();
    let found = client
        .query("SELECT oid FROM pg_class WHERE oid = ANY ($1)", &[&oids])
        .await;
    let found = found.map_err(|error| sql_error("look for partitions", error))?;
    Ok(found.iter().map(|row| row.get(0)).collect())
}

/// The same of each of these tables.
///
/// # Errors
/// As [`leaves`].
pub async fn leaves_of(client: &Client, tables: &[TableName]) -> Result<Vec<Seen>> {
    let mut found = Vec::with_capacity(tables.len());
    for table in tables {
        found.push(leaves(client, table).await?);
    }
    Ok(found)
}

/// All of them.
pub fn union(of: &[Seen]) -> Seen {
    let mut all = Seen::default();
    for leaves in of {
        all.extend(leaves);
    }
    all
}

/// What `walpost.progress.tables` is to say when the delivered snapshot moves on from `delivered` and these leaf tables were seen up to the
/// new one.
///
/// # Errors
/// As [`leaves`].
pub async fn moved(
    client: &Client,
    tables: &[TableName],
    covered: Option<&Leaves>,
    delivered: Option<&Snapshot>,
    seen: &Seen,
) -> Result<Leaves> {
    let Some(covered) = covered else {
        return Ok(Leaves::whole(seen));
    };
    let attached = union(&leaves_of(client, tables).await?);
    let alive = alive(client, covered).await?;
    Ok(covered.moved(&attached, seen, &alive, delivered))
}

/// Stores which leaf tables belong to the outbox, before a stream or a look begins with these tables: see [`super::coverage`].
///
/// # Errors
/// As [`leaves`]; temporary when the row is not `progress` under this claim any more.
pub async fn declare(
    client: &Client,
    claim: &Claim,
    tables: &[TableName],
    progress: &mut Progress,
) -> Result<()> {
    let Some(covered) = &progress.tables else {
        return Ok(());
    };
    let attached = union(&leaves_of(client, tables).await?);
    let alive = alive(client, covered).await?;
    let declared = covered.declared(&attached, &alive, progress.delivered.as_ref());
    if declared == *covered {
        return Ok(());
    }
    progress::declared(client, claim, progress, declared).await
}

/// Begins a transaction in which the rows of a table are to be seen; gives its leaf tables. [`end_look`] ends it; after an error it may be open.
///
/// Planning the first statement locks the table and what hangs on it (ACCESS SHARE) to the end of the transaction, so none of that is detached or dropped
/// between the list and the rows. DETACH CONCURRENTLY does not wait for the lock; what it takes away is missing when `end_look` lists again, and cannot
/// come back before the transaction ends. (Not by LOCK TABLE, which a role with a right to some columns may not use.)
///
/// # Errors
/// What keeps the table from being read.
pub async fn begin_look(client: &Client, name: &TableName) -> Result<Seen> {
    let sql = format!("BEGIN ISOLATION LEVEL READ COMMITTED; SELECT FROM {name} LIMIT 0");
    let locked = client.batch_execute(&sql).await;
    locked.map_err(|error| sql_error(&format!("look into {name}"), error))?;
    leaves(client, name).await
}

/// Ends it; gives those of `seen` whose rows were there all the time.
///
/// # Errors
/// As [`leaves`].
pub async fn end_look(client: &Client, name: &TableName, seen: &Seen) -> Result<Seen> {
    let seen = seen.and(&leaves(client, name).await?);
    let ended = client.batch_execute("COMMIT").await;
    ended.map_err(|error| sql_error(&format!("look into {name}"), error))?;
    Ok(seen)
}

/// The leaf tables of one table, and what of them is not covered.
#[derive(Clone, Debug, Default)]
pub struct LeafChanges {
    /// Those that can be covered by the next note.
    pub seen: Seen,
    /// Those of them with rows that are not covered.
    pub uncovered: Uncovered,
    /// Whether one was covered before.
    pub was_known: bool,
    /// Those that can be covered and were not, with or without rows.
    pub came: Vec<u32>,
    /// Those that came after the snapshot was taken.
    pub late: Vec<u32>,
}

/// Compares the leaf tables of a table with those that the stored snapshot covers, and looks for rows visible in `upto` that are not. `early`: those that
/// were there before the snapshot that is to be noted was taken. Without a list of those that are covered (a row that an earlier version
/// wrote) all count as covered. A table that cannot be scanned (`None`) has no row that could be found.
///
/// # Errors
/// Temporary when the server is away; refused when the table cannot be read.
pub async fn leaf_changes(
    client: &Client,
    table: Option<&ScanTable>,
    covered: Option<&Leaves>,
    upto: &Snapshot,
    (early, now): (&Seen, &Seen),
) -> Result<LeafChanges> {
    let Some(covered) = covered else {
        return Ok(LeafChanges {
            seen: now.clone(),
            was_known: true,
            ..LeafChanges::default()
        });
    };
    let mut there = covered.covered();
    there.extend(early);
    let seen = now.and(&there);
    let came = covered.uncovered(&seen);
    let mut changes = LeafChanges {
        was_known: now.iter().any(|leaf| covered.is_whole(leaf)),
        came: came.keys().copied().collect(),
        late: now.iter().filter(|leaf| !seen.contains(*leaf)).collect(),
        seen,
        ..LeafChanges::default()
    };
    if let Some(table) = table {
        for (leaf, until) in came {
            if has_uncovered(client, table, leaf, until.as_ref(), upto).await? {
                changes.uncovered.insert(leaf, until);
            }
        }
    }
    Ok(changes)
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
    leaves: &Uncovered,
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
