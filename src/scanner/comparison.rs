//! The comparison of all outbox tables for one note.
//!
//! Input: two snapshots, what the stream brought between them, and which leaf tables are covered. Output: [`Found`]: what is missing, and which leaf tables are
//! covered behind the note. [`super::reconcile`] compares one table, and says why nothing is left out.

use tokio_postgres::Client;
use tracing::{info, warn};

use super::coverage::{Leaves, Seen};
use super::missing::{Missing, MissingRows};
use super::progress::Snapshot;
use super::reconcile::{self, Window, begin_look, compare, end_look, leaf_changes, moved, union};
use super::streamed::StreamedRows;
use super::table::ScanTable;
use crate::postgres::TableName;
use crate::{Error, Result};

/// What is compared, and what is known of it.
pub(super) struct Comparison<'a> {
    pub(super) client: &'a Client,
    pub(super) tables: &'a [TableName],
    /// Leaf tables that the stored snapshot covers.
    pub(super) covered: Option<&'a Leaves>,
    /// What is visible in it is not compared.
    pub(super) unchecked: Option<&'a Snapshot>,
    /// By table: whether its rows were counted: see [`super::handover::Carried`].
    pub(super) counted: &'a [bool],
    /// The tables before the snapshot that is to be noted was taken.
    pub(super) before: &'a Before,
}

impl Comparison<'_> {
    /// Compares the rows visible in `upto` and not in `delivered` with those that the stream brought.
    pub(super) async fn all(
        &self,
        upto: &Snapshot,
        delivered: &Snapshot,
        streamed: &[StreamedRows],
    ) -> Result<Found> {
        let (client, tables, covered) = (self.client, self.tables, self.covered);
        let mut found = Found::default();
        for (place, name) in tables.iter().enumerate() {
            let table = ScanTable::describe(client, name).await?;
            let had_columns = self.before.had_columns.get(place) == Some(&true);
            found.counted.push(had_columns && table.is_some());
            let none = Seen::default();
            let early = self.before.leaves.get(place).unwrap_or(&none);
            let Some(table) = table else {
                if self.counted.get(place) == Some(&true) {
                    return Err(Error::temporary(format!(
                        "table {name} has no columns txid and seq any more: its rows since the last note cannot be compared with the stream"
                    ))
                    .hint(
                        "give it the columns back; if it is to be without them: WALPOST_SLOT_LOST=restart walpost run",
                    ));
                }
                // Nothing is ever read of it: what is streamed of it is all there is.
                let now = reconcile::leaves(client, name).await?;
                let leaves = leaf_changes(client, None, covered, delivered, (early, &now));
                found.seen.push(leaves.await?.seen);
                continue;
            };
            // The leaf tables first: see the module `delivered`.
            let now = begin_look(client, name).await?;
            let leaves =
                leaf_changes(client, Some(&table), covered, delivered, (early, &now)).await?;
            let mut compared = reconcile::Compared::default();
            if leaves.was_known && self.counted.get(place) != Some(&true) {
                found.skipped = true;
            } else if let Some(streamed) = streamed.get(place) {
                let window = Window {
                    upto,
                    delivered,
                    unchecked: self.unchecked.filter(|_| leaves.was_known),
                    came: &leaves.came,
                    late: &leaves.late,
                };
                compared = compare(client, &table, window, streamed).await?;
            }
            let seen = end_look(client, name, &leaves.seen).await?;
            found.seen.push(seen);
            found.rows += compared.rows;
            if compared.short > 0 || !leaves.uncovered.is_empty() {
                let rows = MissingRows {
                    txids: std::mem::take(&mut compared.txids),
                    leaves: leaves.uncovered,
                };
                let partitions = rows.leaves.len();
                found.missing.0.insert(name.to_string(), rows);
                found.told.push((name.clone(), compared, partitions));
            }
        }
        let seen = union(&found.seen);
        let covered = moved(client, tables, covered, Some(delivered), &seen).await?;
        found.covered = Some(covered);
        Ok(found)
    }

    /// Where nothing is compared: covered are leaf tables that were so, and those that have no row up to `upto` that is not.
    pub(super) async fn trust(
        &self,
        upto: &Snapshot,
        delivered: Option<&Snapshot>,
    ) -> Result<Found> {
        let (client, tables) = (self.client, self.tables);
        let nothing = Leaves::default();
        // Of a row that an earlier version wrote all are covered; not if it never noted anything.
        let covered = self
            .covered
            .or_else(|| delivered.is_none().then_some(&nothing));
        let mut seen = Seen::default();
        for (name, early) in tables.iter().zip(&self.before.leaves) {
            let table = ScanTable::describe(client, name).await?;
            let now = reconcile::leaves(client, name).await?;
            let quick = leaf_changes(client, None, covered, upto, (early, &now)).await?;
            if quick.came.is_empty() || table.is_none() {
                seen.extend(&quick.seen);
                continue;
            }
            let now = begin_look(client, name).await?;
            let leaves = leaf_changes(client, table.as_ref(), covered, upto, (early, &now));
            let leaves = leaves.await?;
            let trusted = leaves.seen.without(&leaves.uncovered);
            seen.extend(&end_look(client, name, &trusted).await?);
        }
        let covered = moved(client, tables, covered, delivered, &seen).await?;
        Ok(Found {
            covered: Some(covered),
            ..Found::default()
        })
    }
}

/// The tables before the snapshot that is to be noted was taken.
pub(super) struct Before {
    /// By table: whether it had the columns that a comparison needs.
    pub(super) had_columns: Vec<bool>,
    /// By table: its leaf tables.
    pub(super) leaves: Vec<Seen>,
}

/// What a comparison of all tables found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Rows of the tables in the window.
    pub(super) rows: u64,
    pub(super) missing: Missing,
    /// For each table in `missing`: its comparison, and the number of new partitions.
    pub(super) told: Vec<(TableName, reconcile::Compared, usize)>,
    pub(super) covered: Option<Leaves>,
    /// By table: the leaf tables that were compared.
    pub(super) seen: Vec<Seen>,
    /// By table: see [`super::handover::Carried::counted`].
    pub(super) counted: Vec<bool>,
    /// A table was not compared, because its rows were not counted; from this note on they are.
    pub(super) skipped: bool,
}

/// One warning for each table.
pub(super) fn tell(table: &TableName, compared: &reconcile::Compared, partitions: usize) {
    if compared.short > 0 {
        warn!(
            %table,
            rows = compared.missing,
            transactions = compared.short,
            first_txid = compared.first,
            "the stream did not bring rows that the table has: all rows of these transactions are published from the table \
             (hint: something changed what the publication sends; walpost check looks at it)"
        );
    }
    if partitions > 0 {
        info!(
            %table,
            partitions,
            "partitions came with rows in them: these rows are published from the table"
        );
    }
}

/// The tables that can be compared, in their order.
pub(super) async fn scannable(
    client: &Client,
    tables: &[TableName],
) -> Result<Vec<Option<ScanTable>>> {
    let mut found = Vec::with_capacity(tables.len());
    for table in tables {
        found.push(ScanTable::describe(client, table).await?);
    }
    Ok(found)
}
