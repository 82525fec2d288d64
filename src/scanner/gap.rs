//! The gap scan: publishes, before the stream starts, what was committed before the slot was made and is not delivered.
//!
//! Input: the snapshots in `walpost.progress` and the outbox tables. Output: events to a publisher of its own, and how far
//! it is, stored about once a second, so that a scan goes on after a crash where it was.
//!
//! # The barrier
//!
//! The scan ends only when each of its events has its receipt, or is stored as a straggler. Only then the stream starts, so a
//! key's earlier events never come after its later ones, and nothing of the scan is in the air when the log position moves.
//!
//! # What cannot be published
//!
//! Becomes a straggler, as in the stream ([`crate::outlet`]), and counts as done when it is in that table: not before, so
//! whatever is killed in between is read again. It is known by its table, `seq` and id (a row that is read has no commit LSN;
//! `0/0` stands there): a scan that goes on after a crash reads the same rows and stores none of them twice. Later events of its key are
//! parked behind it, here, by the stream that follows, and after a restart, because what is parked goes from one to the next
//! with the [`Stragglers`]. Stragglers are retried while the scan runs: at `WALPOST_STRAGGLER_LIMIT` it waits for their going.
//!
//! A scan has less patience than the stream with a topic whose trouble may pass: all that comes after it would wait. And a
//! slot that is lost within seconds of a straggler's coming through it, before its delivery was noted, gives that row twice.
//!
//! # Repeats
//!
//! A row's sequence id is its `seq`, and the producers are named after the scan (the end of the gap and the table), so with
//! deduplication on the broker's side a scan that goes on after a crash doubles nothing.
//!
//! # Order
//!
//! In the order of `seq`, which is the order of insertion. Where a key's writers wait for each other (a lock on the business
//! row), that is the order of commits.

use std::time::Duration;

use futures::future::FutureExt as _;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{debug, info, warn};

use super::missing::{Leaves, leaves_since, uncovered};
use super::numbering::SEQ_END;
use super::progress::{self, Claim, Progress, Snapshot};
use super::reconcile::{self, gap_condition};
use super::straggler::Stragglers;
use super::table::{self, ScanRow, ScanTable};
use crate::outbox::Extractor;
use crate::outlet::{Outlet, Source};
use crate::pipe::{Routing, ScannedRow};
use crate::postgres::TableName;
use crate::pulsar::{Diversion, Flush, Publisher, PublisherConfig, RowTag};
use crate::{Error, Lsn, Result};

/// How long a topic may have trouble that may pass, at most: the stream waits for the scan, and with it all other topics.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the position is stored and the publisher looks at the clock.
const TICK: Duration = Duration::from_secs(1);
/// Ids that are remembered, so that what the scan published is skipped in the stream: some 10 MB.
const MAX_OVERLAP: usize = 100_000;
/// How often the log tells how far the scan is.
const TELL: Duration = Duration::from_secs(10);

/// What the scan works on.
pub struct Gap<'a> {
    /// For `walpost.progress`.
    pub client: &'a Client,
    /// For the rows; busy all the time.
    pub rows: &'a Client,
    /// The slot, and the right to change its row.
    pub claim: &'a Claim,
    /// Tables, columns, template.
    pub routing: &'a Routing,
    /// The stream's publisher settings; the producers' names are changed.
    pub publisher: &'a PublisherConfig,
    /// Tables that have no columns `txid` and `seq`, and that the operator lets be left out.
    pub left_out: &'a [TableName],
}

impl Gap<'_> {
    fn extractor(&self, table: &ScanTable) -> Result<Extractor> {
        let routing = self.routing;
        Extractor::new(&table.relation, &routing.columns, &routing.template)
    }
}

/// Closes the gap; does nothing where there is none. Gives the stragglers back, which the caller lets be retried meanwhile.
/// What is in the air when it is dropped is published again by the next one.
///
/// # Errors
/// Refused for a row that can be neither published nor stored; temporary when a server is away: the position is stored.
pub async fn close(
    gap: &Gap<'_>,
    progress: &mut Progress,
    mut stragglers: Option<Stragglers>,
) -> Result<Option<Stragglers>> {
    let Some(upto) = progress.gap().cloned() else {
        return Ok(stragglers);
    };
    // Before their partitions are noted as covered.
    for name in &gap.routing.tables {
        if table::describe(gap.rows, name).await?.is_none() {
            return Err(unreadable(name));
        }
    }
    let uncovered = cover(gap, progress).await?;
    let mut tables = Vec::with_capacity(gap.routing.tables.len());
    for (place, name) in (0..).zip(&gap.routing.tables) {
        let Some(mut table) = ScanTable::describe(gap.rows, name).await? else {
            if gap.left_out.contains(name) {
                warn!(table = %name, "the table has no columns txid and seq: rows that the slot does not bring are not looked for");
                continue;
            }
            return Err(unreadable(name));
        };
        table.read_only_for(&gap.extractor(&table)?);
        // Of all tables, before the first is scanned: nothing is half done when it is refused.
        let slot = gap.claim.slot();
        let Some(rows) = rows_of(progress, &upto, name, &uncovered)? else {
            continue;
        };
        table.refuse_from_elsewhere(gap.rows, slot).await?;
        table.refuse_unscannable(gap.rows, slot, &rows).await?;
        tables.push((place, table, rows));
    }
    for (place, table, rows) in &tables {
        let mut scan = Scan::new(gap, (*place, table), &upto, progress, stragglers).await?;
        scan.metering();
        let scanned = scan.run(gap, progress, rows).await;
        // Also where it failed: what was in the air is published again by the next one.
        let meter = scan.outlet.metering();
        meter.end_scan();
        meter.set_in_flight((0, 0), 0);
        if progress.position.missing.is_some() {
            let counts = scan.outlet.counts();
            scan.outlet
                .metering()
                .reconciled(counts.acknowledged + counts.stragglers);
        }
        scanned?;
        stragglers = scan.outlet.into_stragglers();
    }
    for (_, table, _) in &tables {
        // A table that took the name meanwhile has rows that were not read.
        let now = table::describe(gap.rows, &table.name).await?;
        if now.map(|now| now.id) != Some(table.relation.id) {
            return Err(unreadable(&table.name));
        }
    }
    progress::closed(gap.client, gap.claim, progress).await?;
    Ok(stragglers)
}

/// The leaf tables that are covered once the gap is closed: those that there were when its scan began, also where it goes on after a
/// crash. (A leaf that comes while the scan is at work may hold rows behind which it is already; it is new at the next note.)
async fn cover(gap: &Gap<'_>, progress: &mut Progress) -> Result<Leaves> {
    if progress.position.covered.is_none() {
        let mut now = Leaves::new();
        for table in &gap.routing.tables {
            let leaves = reconcile::leaves(gap.client, table).await?;
            now.extend(leaves.into_iter().map(|leaf| (leaf, None)));
        }
        if let (Some(before), Some(delivered)) = (&progress.tables, &progress.delivered) {
            let alive = reconcile::alive(gap.client, before).await?;
            let oids: Vec<u32> = now.keys().copied().collect();
            now = leaves_since(before, &oids, &alive, delivered).0;
        }
        progress.position.covered = Some(now);
        progress::scanned(gap.client, gap.claim, progress).await?;
    }
    let covered = progress.position.covered.clone().unwrap_or_default();
    Ok(match &progress.tables {
        Some(before) => uncovered(before, &covered),
        None => Leaves::new(),
    })
}

/// SQL: which rows of a table are to be published; `None`: none.
fn rows_of(
    progress: &Progress,
    upto: &Snapshot,
    table: &TableName,
    uncovered: &Leaves,
) -> Result<Option<String>> {
    let delivered = progress.delivered.as_ref();
    let Some(missing) = &progress.position.missing else {
        return gap_condition(upto, delivered, None, uncovered).map(Some);
    };
    let rows = missing.0.get(&table.to_string());
    rows.map(|rows| gap_condition(upto, delivered, Some(&rows.txids), &rows.leaves))
        .transpose()
}

/// The table is not there at the moment, or is not the one that it was: what is visible now is not delivered.
pub(super) fn unreadable(table: &TableName) -> Error {
    Error::temporary(format!(
        "table {table} is missing, was replaced, or has lost its columns txid and seq while it was read"
    ))
    .hint("what is delivered is not noted until it can be read: bring it back, or take it out of WALPOST_OUTBOX_TABLE")
}

/// The scan of one table.
struct Scan<'a> {
    table: &'a ScanTable,
    /// The table's place in the settings.
    place: u16,
    extractor: Extractor,
    /// Its tracker counts by `seq` in place of log positions.
    outlet: Outlet,
    after: i64,
    /// The last row's `seq`.
    last: i64,
    /// There are no more rows.
    is_read: bool,
    stored_at: Instant,
    told_at: Instant,
}

impl<'a> Scan<'a> {
    async fn new(
        gap: &Gap<'_>,
        (place, table): (u16, &'a ScanTable),
        upto: &Snapshot,
        progress: &Progress,
        stragglers: Option<Stragglers>,
    ) -> Result<Self> {
        let name = table.name.to_string();
        let after = progress.position.tables.get(&name).copied().unwrap_or(0);
        let scan = crc32c::crc32c(format!("{upto} {name}").as_bytes());
        let mut publisher = Publisher::new(PublisherConfig {
            producer_name: format!("{}-scan-{scan:08x}", gap.publisher.producer_name),
            diversion: gap.publisher.diversion.map(|diversion| Diversion {
                age: diversion.age.min(PATIENCE),
                ..diversion
            }),
            ..gap.publisher.clone()
        });
        publisher.connect().await?;
        let report_rows = gap.routing.report_rows;
        let now = Instant::now();
        Ok(Self {
            table,
            place,
            extractor: gap.extractor(table)?,
            outlet: Outlet::new(
                publisher,
                stragglers,
                Source::Table,
                report_rows,
                position(after)?,
            ),
            after,
            last: after,
            is_read: false,
            stored_at: now,
            told_at: now,
        })
    }

    async fn run(&mut self, gap: &Gap<'_>, progress: &mut Progress, chosen: &str) -> Result<()> {
        let table = &self.table.name;
        debug!(%table, after_seq = self.after, "reading rows from the table");
        let mut rows = self.table.open(gap.rows, chosen, self.after).await?;
        loop {
            let any = rows
                .next(async |row| {
                    self.take(&row)?;
                    self.serve(gap, progress).await
                })
                .await?;
            if !any {
                break;
            }
        }
        rows.close().await?;
        self.is_read = true;
        while self.outlet.unfinished() > 0 {
            self.outlet.publisher().flush(Flush::All);
            self.wait(gap, progress).await?;
        }
        self.store(gap, progress).await?;
        let counts = self.outlet.counts();
        if counts.events > 0 {
            info!(
                %table,
                published = counts.acknowledged,
                stragglers = counts.stragglers,
                "rows were published from the table"
            );
        }
        Ok(())
    }

    /// Handles what was said, and waits while there is no room.
    async fn serve(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        while let Some(event) = self.outlet.try_next_event() {
            self.outlet.event(event)?;
        }
        while !self.outlet.has_room() {
            // Batches go when they are full; those that are not would wait for rows that have no room.
            self.outlet.publisher().flush(Flush::All);
            self.wait(gap, progress).await?;
        }
        self.tick(gap, progress).await
    }

    async fn wait(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let tick = Instant::now() + TICK;
        let event = tokio::select! {
            biased;
            event = self.outlet.next_event() => Some(event),
            () = sleep_until(tick) => None,
        };
        if let Some(event) = event {
            self.outlet.event(event)?;
        }
        self.tick(gap, progress).await
    }

    async fn tick(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let now = Instant::now();
        if now - self.stored_at < TICK {
            return Ok(());
        }
        self.stored_at = now;
        if gap.client.is_closed() {
            return Err(Error::temporary(
                "the session that holds the lock on the slot has ended: another instance may scan as well",
            ));
        }
        // A topic with few rows never fills a batch; unsent it would hold up the position, and all that is behind it.
        self.outlet.publisher().flush(Flush::Due);
        self.outlet.publisher().tick(now);
        self.metering();
        self.store(gap, progress).await?;
        if now - self.told_at >= TELL {
            self.told_at = now;
            let counts = self.outlet.counts();
            info!(
                table = %self.table.name,
                published = counts.acknowledged,
                stragglers = counts.stragglers,
                "publishing rows from the table"
            );
        }
        Ok(())
    }

    fn metering(&mut self) {
        let position = self.outlet.tracker().flush_lsn(Lsn::ZERO).as_u64() >> 3;
        let published = self.outlet.counts().acknowledged;
        let meter = self.outlet.metering();
        meter.set_scan(usize::from(self.place), published, position);
    }

    async fn store(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let seq = self.outlet.tracker().flush_lsn(Lsn::ZERO).as_u64() >> 3;
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        // Another row may have the last one's number, against all rules: it is refused, and must not count as done before.
        let seq = if self.is_read {
            seq
        } else {
            seq.min(self.last - 1).max(self.after)
        };
        let table = self.table.name.to_string();
        if progress.position.tables.insert(table, seq) == Some(seq) {
            return Ok(());
        }
        progress::scanned(gap.client, gap.claim, progress).await
    }

    fn take(&mut self, row: &ScanRow) -> Result<()> {
        if row.seq <= self.last {
            return Err(self.table.told_twice(row.seq));
        }
        self.last = row.seq;
        let position = position(row.seq)?;
        let tag = RowTag::new(self.place, position.as_u64() >> 3);
        self.outlet
            .take_read(&mut self.extractor, &row.tuple()?, tag, position)
    }
}

/// A `seq` as a position whose sequence ids are its own: see `lane`.
fn position(seq: i64) -> Result<Lsn> {
    let seq = u64::try_from(seq)
        .ok()
        .filter(|seq| *seq < SEQ_END.unsigned_abs());
    seq.map(|seq| Lsn::new(seq << 3)).ok_or_else(|| {
        // Such rows are counted, and refused with the statement that mends them, before a scan begins.
        Error::bug("a row with a seq that no scan can use was read")
    })
}

/// Ids and numbers of the rows that the scan publishes and that the stream may bring as well, of all tables: those that are visible in
/// `upto` and not in `before`. (By number as well: another row of the same id may be in the stream only, because its own transaction
/// deleted it.) Of a slot that walpost made these are a handful; of one that it keeps, the backlog. More than
/// [`MAX_OVERLAP`] are not remembered, and come twice.
pub async fn overlap(
    client: &Client,
    routing: &Routing,
    before: Option<&Snapshot>,
    upto: Option<&Snapshot>,
) -> Result<Vec<ScannedRow>> {
    let (Some(before), Some(upto)) = (before, upto) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for name in &routing.tables {
        if let Some(table) = ScanTable::describe(client, name).boxed().await? {
            let extractor = Extractor::new(&table.relation, &routing.columns, &routing.template)?;
            let id = (routing.columns.id.as_str(), &extractor);
            let left = MAX_OVERLAP - found.len();
            // One more than there is room for tells that there are more.
            let ids = table.ids(client, id, (upto, before), left + 1).await?;
            let more = ids.len() > left;
            found.extend(
                ids.into_iter()
                    .take(left)
                    .map(|(id, number)| (table.relation.id, id, number)),
            );
            if more {
                warn!(
                    remembered = MAX_OVERLAP,
                    "the slot has more rows that are published from the table as well than can be remembered: some come twice"
                );
                break;
            }
        }
    }
    Ok(found)
}
