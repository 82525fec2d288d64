//! Overlap: rows that are published from the table and that the slot may bring as well. They are remembered, and skipped when the stream
//! brings them.
//!
//! A row is remembered only when it is known to be published: the scan hands it over, an earlier process did (it lies at or below the stored position, in a leaf
//! table whose rows were read, see [`super::coverage`]), or the delivered snapshot covers it. That it is in the table, and in the gap, is not enough: it
//! may be deleted, or its leaf table detached, before the scan comes to it, and then only the stream has it.
//!
//! By id, number and `txid`, and not by transaction alone: a row that its own transaction deleted is only in the stream. Of a slot that walpost made these rows
//! are a handful; of one that it keeps, the backlog. More than [`MAX_OVERLAP`] are not remembered, and come twice.

use tokio_postgres::Client;
use tracing::warn;

use super::coverage::Seen;
use super::outbox::SEQ;
use super::progress::{Progress, Snapshot};
use super::snapshot::VisibleXids;
use super::table::{ScanRow, ScanTable, between};
use crate::outbox::{Extractor, RowNumber};
use crate::pgoutput::Tuple;
use crate::pipe::{Routing, ScannedRow};
use crate::postgres::is_about_rows;
use crate::pulsar::RowKey;
use crate::{Error, Result};

/// Ids that are remembered: some 10 MB.
const MAX_OVERLAP: usize = 100_000;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Overlap {
    /// Rows visible in it the slot does not bring; `None`: it brings none that is published from the table.
    before: Option<(Snapshot, VisibleXids)>,
    rows: Vec<ScannedRow>,
    /// It was told that there are too many.
    is_full: bool,
}

impl Overlap {
    /// Of a slot that does not bring rows visible in `before`.
    ///
    /// # Errors
    /// Refused when that is no snapshot.
    pub fn beyond(before: Option<&Snapshot>) -> Result<Self> {
        let before =
            before.map(|before| Ok::<_, Error>((before.clone(), VisibleXids::parse(before)?)));
        Ok(Self {
            before: before.transpose()?,
            ..Self::default()
        })
    }

    /// The remembered rows.
    pub fn into_rows(self) -> Vec<ScannedRow> {
        self.rows
    }

    /// A row of the table that the extractor is for is handed over.
    pub fn take(&mut self, table: u32, extractor: &Extractor, row: &ScanRow, tuple: &Tuple<'_>) {
        let Some((_, before)) = &self.before else {
            return;
        };
        if row.txid.is_some_and(|txid| before.shows(txid)) {
            return;
        }
        let Some(id) = extractor.id(tuple) else {
            return;
        };
        if self.rows.len() < MAX_OVERLAP {
            let number = extractor.number_column();
            let number = number.map_or(RowNumber::Unknown, |column| column.read(tuple));
            let txid = row.txid;
            self.rows.push((table, RowKey { id, number, txid }));
        } else {
            self.tell_full();
        }
    }

    /// Rows visible in `upto` up to this `seq`, of leaf tables that an earlier process read up to there.
    ///
    /// # Errors
    /// When the server is away.
    pub async fn read_before(
        &mut self,
        client: &Client,
        routing: &Routing,
        table: &ScanTable,
        upto: &Snapshot,
        (seq, seen): (i64, &Seen),
    ) -> Result<()> {
        let rows = format!("o.{SEQ} <= {seq} AND {}", of_leaves(Some(seen)));
        self.find(client, routing, table, upto, &rows).await
    }

    /// Rows of all tables that the delivered snapshot covers.
    ///
    /// # Errors
    /// When the server is away.
    pub async fn delivered(
        &mut self,
        client: &Client,
        routing: &Routing,
        progress: &Progress,
    ) -> Result<()> {
        let (Some(upto), Some(delivered)) = (&progress.scan_upto, &progress.delivered) else {
            return Ok(());
        };
        let covered = progress
            .tables
            .as_ref()
            .map(super::coverage::Leaves::covered);
        let rows = format!(
            "{} AND {}",
            between(delivered, None)?,
            of_leaves(covered.as_ref())
        );
        for name in &routing.tables {
            if let Some(table) = ScanTable::describe(client, name).await? {
                self.find(client, routing, &table, upto, &rows).await?;
            }
        }
        Ok(())
    }

    async fn find(
        &mut self,
        client: &Client,
        routing: &Routing,
        table: &ScanTable,
        upto: &Snapshot,
        rows: &str,
    ) -> Result<()> {
        let Some((before, _)) = &self.before else {
            return Ok(());
        };
        let rows = format!("{} AND {rows}", between(upto, Some(before))?);
        let extractor = Extractor::new(&table.relation, &routing.columns, &routing.template)?;
        let id = (routing.columns.id.as_str(), &extractor);
        let room = MAX_OVERLAP - self.rows.len();
        // One more than there is room for tells that there are more.
        let keys = match table.keys(client, id, &rows, room + 1).await {
            Err(error) if is_about_rows(&error) => {
                // The scan leaves it for the same reason.
                warn!(table = %table.name, "which of its rows come both ways is not known: {}", error.report());
                return Ok(());
            }
            keys => keys?,
        };
        let more = keys.len() > room;
        let keys = keys.into_iter().take(room);
        self.rows.extend(keys.map(|row| (table.relation.id, row)));
        if more {
            self.tell_full();
        }
        Ok(())
    }

    fn tell_full(&mut self) {
        if !std::mem::replace(&mut self.is_full, true) {
            warn!(
                remembered = MAX_OVERLAP,
                "the slot has more rows that are published from the table as well than can be remembered: some come twice"
            );
        }
    }
}

/// SQL: whether a row is of one of these; `None`: of any.
fn of_leaves(leaves: Option<&Seen>) -> String {
    let Some(leaves) = leaves else {
        return "true".to_owned();
    };
    let leaves: Vec<String> = leaves.iter().map(|leaf| leaf.to_string()).collect();
    if leaves.is_empty() {
        "false".to_owned()
    } else {
        format!("tableoid IN ({})", leaves.join(", "))
    }
}
