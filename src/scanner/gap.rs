//! The gap scan: publishes, before the stream starts, what was committed before the slot was made and is not delivered.
//!
//! Input: the snapshots in `walpost.progress` and the outbox tables. Output: events to a publisher of its own, and how far
//! it is, stored about once a second, so that a scan goes on after a crash where it was.
//!
//! # The barrier
//!
//! The scan ends only when each of its events has its receipt. Only then the stream starts, so a key's earlier events never
//! come after its later ones, and nothing of the scan is in the air when the log position moves.
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
use tracing::{debug, info};

use super::progress::{self, Progress, Snapshot};
use super::table::{ScanRow, ScanTable, print_as_the_stream};
use crate::ack::AckTracker;
use crate::outbox::{Extractor, Scratch, key_hash};
use crate::pipe::Routing;
use crate::pulsar::{Flush, Outgoing, Publisher, PublisherConfig, Row, RowTag};
use crate::{Error, Lsn, Result};

/// How often the position is stored and the publisher looks at the clock.
const TICK: Duration = Duration::from_secs(1);
/// How often the log tells how far the scan is.
const TELL: Duration = Duration::from_secs(10);

/// What the scan works on.
pub struct Gap<'a> {
    /// For `walpost.progress`.
    pub client: &'a Client,
    /// For the rows; busy all the time.
    pub rows: &'a Client,
    /// The replication slot.
    pub slot: &'a str,
    /// Tables, columns, template.
    pub routing: &'a Routing,
    /// The stream's publisher settings; the producers' names are changed.
    pub publisher: PublisherConfig,
}

/// Closes the gap; does nothing where there is none. Not cancel safe in the sense that what is in the air when it is dropped
/// is published again by the next one.
///
/// # Errors
/// Refused for a row that can never be published; temporary when a server is away: the position is stored.
pub async fn close(gap: Gap<'_>, progress: &mut Progress) -> Result<()> {
    let Some(upto) = progress.gap().cloned() else {
        return Ok(());
    };
    print_as_the_stream(gap.rows).await?;
    let mut tables = Vec::with_capacity(gap.routing.tables.len());
    for name in &gap.routing.tables {
        let Some(table) = ScanTable::describe(gap.rows, name).await? else {
            info!(table = %name, "the table has no columns txid and seq: rows from before the slot are not looked for");
            continue;
        };
        // Of all tables, before the first is scanned: nothing is half done when it is refused.
        table.refuse_from_elsewhere(gap.rows, gap.slot).await?;
        tables.push(table);
    }
    for table in &tables {
        let scan = Scan::new(&gap, table, &upto, progress).await?;
        scan.run(&gap, progress, &upto).await?;
    }
    progress.position.done = true;
    progress.delivered = Some(upto);
    progress::scanned(gap.client, gap.slot, &progress.position).await
}

/// The scan of one table.
struct Scan<'a> {
    table: &'a ScanTable,
    extractor: Extractor,
    publisher: Publisher,
    /// By `seq` in place of log positions.
    tracker: AckTracker,
    scratch: Scratch,
    topic: String,
    /// The table's place in the settings, where receipts are to tell of their rows.
    mark: Option<u32>,
    after: i64,
    published: u64,
    stored_at: Instant,
    told_at: Instant,
}

impl<'a> Scan<'a> {
    async fn new(
        gap: &Gap<'_>,
        table: &'a ScanTable,
        upto: &Snapshot,
        progress: &Progress,
    ) -> Result<Self> {
        let name = table.name.to_string();
        let after = progress.position.tables.get(&name).copied().unwrap_or(0);
        let scan = crc32c::crc32c(format!("{upto} {name}").as_bytes());
        let mut publisher = Publisher::new(PublisherConfig {
            producer_name: format!("{}-scan-{scan:08x}", gap.publisher.producer_name),
            ..gap.publisher.clone()
        });
        publisher.connect().await?;
        let now = Instant::now();
        Ok(Self {
            table,
            extractor: Extractor::new(
                &table.relation,
                &gap.routing.columns,
                &gap.routing.template,
            )?,
            publisher,
            tracker: AckTracker::new(position(after)?),
            scratch: Scratch::new(),
            topic: String::new(),
            mark: gap
                .routing
                .tables
                .iter()
                .position(|known| *known == table.name)
                .filter(|_| gap.routing.report_rows)
                .and_then(|place| u32::try_from(place).ok()),
            after,
            published: 0,
            stored_at: now,
            told_at: now,
        })
    }

    async fn run(mut self, gap: &Gap<'_>, progress: &mut Progress, upto: &Snapshot) -> Result<()> {
        let table = &self.table.name;
        debug!(%table, after_seq = self.after, "reading rows from the table");
        let except = progress.delivered.as_ref();
        let mut rows = self.table.open(gap.rows, upto, except, self.after).await?;
        loop {
            let any = rows
                .next(async |row| {
                    self.publish(&row)?;
                    self.serve(gap, progress).await
                })
                .await?;
            if !any {
                break;
            }
        }
        rows.close().await?;
        while !self.publisher.is_empty() {
            self.publisher.flush(Flush::All);
            self.wait(gap, progress).await?;
        }
        self.store(gap, progress).await?;
        if self.published > 0 {
            info!(%table, published = self.published, "rows were published from the table");
        }
        Ok(())
    }

    /// Handles what brokers said, and waits for them while there is no room.
    async fn serve(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        while let Some(event) = self.publisher.try_next_event() {
            self.handle(event)?;
        }
        while !self.publisher.has_room() {
            // Batches go when they are full; those that are not would wait for rows that have no room.
            self.publisher.flush(Flush::All);
            self.wait(gap, progress).await?;
        }
        self.tick(gap, progress).await
    }

    async fn wait(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let tick = Instant::now() + TICK;
        let event = tokio::select! {
            biased;
            event = self.publisher.next_event() => Some(event),
            () = sleep_until(tick) => None,
        };
        if let Some(event) = event {
            self.handle(event)?;
        }
        self.tick(gap, progress).await
    }

    fn handle(&mut self, event: crate::pulsar::BrokerEvent) -> Result<()> {
        let result = self.publisher.handle(event);
        for (txn, count) in self.publisher.take_acked() {
            self.tracker.ack(txn, count);
        }
        result
    }

    async fn tick(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let now = Instant::now();
        if now - self.stored_at < TICK {
            return Ok(());
        }
        self.stored_at = now;
        self.publisher.tick(now);
        self.store(gap, progress).await?;
        if now - self.told_at >= TELL {
            self.told_at = now;
            info!(table = %self.table.name, published = self.published, "publishing rows from the table");
        }
        Ok(())
    }

    async fn store(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let seq = self.tracker.flush_lsn(Lsn::ZERO).as_u64() >> 3;
        let seq = i64::try_from(seq).unwrap_or(i64::MAX);
        let table = self.table.name.to_string();
        if progress.position.tables.insert(table, seq) == Some(seq) {
            return Ok(());
        }
        progress::scanned(gap.client, gap.slot, &progress.position).await
    }

    fn publish(&mut self, row: &ScanRow) -> Result<()> {
        let tuple = row.tuple()?;
        let unusable = |error| {
            Error::refused("a row from before the stream cannot be published")
                .caused_by(Error::from(error))
        };
        let event = self
            .extractor
            .extract(&tuple, &mut self.scratch)
            .map_err(unusable)?;
        self.extractor
            .topic_into(&tuple, &event, &mut self.topic)
            .map_err(unusable)?;
        let seq = position(row.seq)?;
        let txn = self.tracker.begin();
        let outgoing = Outgoing {
            key: event.aggregateid,
            payload: event.payload,
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            txn,
            commit_lsn: seq,
            row: RowTag::default(),
            mark: self.mark.map(|table| Row {
                table,
                xid: 0,
                id: event.id,
            }),
        };
        let hash = key_hash(event.aggregateid.as_bytes());
        self.publisher
            .publish(&self.topic, hash, &outgoing, event.properties())
            .map_err(|error| {
                Error::refused(format!("the row with id {} cannot be published", event.id))
                    .caused_by(error)
            })?;
        self.tracker.track();
        self.tracker.commit(seq);
        self.published += 1;
        Ok(())
    }
}

/// A `seq` as a position whose sequence ids are its own: see `lane`.
fn position(seq: i64) -> Result<Lsn> {
    let seq = u64::try_from(seq).ok().filter(|seq| *seq < 1 << 47);
    seq.map(|seq| Lsn::new(seq << 3)).ok_or_else(|| {
        Error::refused("a row has a seq that is negative, or larger than 2^47")
            .hint("seq must be a sequence that rises from 1")
    })
}

/// Ids of the rows that the scan published and that the stream may bring as well, of all tables.
pub async fn overlap(
    client: &Client,
    routing: &Routing,
    progress: &Progress,
) -> Result<Vec<(u32, String)>> {
    let (Some(before), Some(upto)) = (&progress.scan_before, &progress.scan_upto) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for name in &routing.tables {
        if let Some(table) = ScanTable::describe(client, name).boxed().await? {
            let id = &routing.columns.id;
            let ids = table.ids(client, id, upto, before).await?;
            found.extend(ids.into_iter().map(|text| (table.relation.id, text)));
        }
    }
    Ok(found)
}
