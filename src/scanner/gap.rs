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
//! A row's sequence id is its `seq`, and the producers are named after the scan (a digest of the end of the gap and the table), so with
//! deduplication on the broker's side a scan that goes on after a crash doubles nothing.
//!
//! # A table that cannot be read
//!
//! (A missing right, a dropped column, a damaged page, rows that no scan can use, two rows of one number.) It holds up no other: it is left with
//! its reason, which the log, `/status` and `walpost check` tell, and the others are read. The gap stays open, so `delivered` does not move
//! over its rows. `scan_position.ahead` stores how far the other tables are published. Poll mode looks on, with later ends for the others,
//! and tries the table again with each look; one that was left in the middle first goes on with the end that it had (`left`), so that
//! its first rows are not published once more. A gap in front of a stream is closed for the others, and then the stream does not begin: rows of
//! the stream would overtake older ones of their key, and nothing could be noted as delivered.
//!
//! # What a closed gap covers
//!
//! The leaf tables that every cursor of this gap had, by table ([`super::coverage`]). They are stored before the first row is read, and what is
//! attached, detached or put in the settings later does not change what was read. A table that is not in the settings when the gap is closed was
//! not read, or not to its end: it keeps the coverage that it had.
//!
//! # Order
//!
//! In the order of `seq`, which is the order of insertion. Where a key's writers wait for each other (a lock on the business
//! row), that is the order of commits.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{debug, info, warn};

use super::coverage::{Seen, Uncovered};
use super::cursor::{Rows, Taker, abandon};
use super::numbering::SEQ_END;
use super::overlap::Overlap;
use super::progress::{self, Claim, Progress, Snapshot, Stretch};
use super::reconcile::{self, gap_condition};
use super::straggler::Stragglers;
use super::table::{self, ScanRow, ScanTable};
use crate::lease::Lease;
use crate::meter::Troubles;
use crate::outbox::Extractor;
use crate::outlet::{Outlet, Source};
use crate::pipe::Routing;
use crate::postgres::{TableName, is_about_rows, sqlstate};
use crate::pulsar::{Diversion, Flush, Publisher, PublisherConfig, RowTag};
use crate::upkeep::{Undone, Work, reason};
use crate::{Error, Lsn, Result};

/// How long a topic may have trouble that may pass, at most: the stream waits for the scan, and with it all other topics.
const PATIENCE: Duration = Duration::from_secs(10);
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
    /// The slot, and the right to change its row.
    pub claim: &'a Claim,
    /// Tables, columns, template.
    pub routing: &'a Routing,
    /// The stream's publisher settings; the producers' names are changed.
    pub publisher: &'a PublisherConfig,
    /// Under which it is published.
    pub lease: &'a Lease,
    /// Tables that have no columns `txid` and `seq`, and that the operator lets be left out.
    pub left_out: &'a [TableName],
}

impl Gap<'_> {
    fn extractor(&self, table: &ScanTable) -> Result<Extractor> {
        let routing = self.routing;
        Extractor::new(&table.relation, &routing.columns, &routing.template)
    }
}

/// A table that could not be read, and why.
pub type LeftTable = (TableName, Error);

/// Closes the gap; does nothing where there is none. Gives the stragglers back, which the caller lets be retried meanwhile, and the
/// tables that could not be read: the gap is then still open. What is in the air when it is dropped is published again by the next one.
/// `overlap` gets the rows that the slot may bring as well.
///
/// # Errors
/// Refused for a row that can be neither published nor stored; temporary when a server is away: the position is stored.
pub async fn close(
    gap: &Gap<'_>,
    progress: &mut Progress,
    mut stragglers: Option<Stragglers>,
    overlap: &mut Overlap,
) -> Result<(Option<Stragglers>, Vec<LeftTable>)> {
    let Some(upto) = progress.gap().cloned() else {
        return Ok((stragglers, Vec::new()));
    };
    let tables = &gap.routing.tables;
    let mut left: Vec<LeftTable> = Vec::new();
    let mut done = Vec::with_capacity(tables.len());
    for (place, name) in (0..).zip(tables) {
        let closing = close_table(gap, (place, name), progress, &mut stragglers, overlap);
        match closing.await? {
            Ok(read) => done.push((name, read)),
            Err(why) => left.push((name.clone(), why)),
        }
    }
    let mut seen = BTreeMap::new();
    for (name, read) in done {
        // A table that took the name meanwhile has rows that were not read.
        let now = table::describe(gap.rows, name).await?;
        if now.is_none_or(|now| read.table.is_some_and(|was| was != now.id)) {
            progress.position.tables.remove(&name.to_string());
            left.push((name.clone(), unreadable(name)));
        } else {
            let leaves = reconcile::leaves(gap.rows, name).await?;
            seen.insert(name.to_string(), read.seen.and(&leaves));
        }
    }
    tell_left(gap, &left);
    if left.is_empty() {
        let mut all = Seen::default();
        for seen in seen.values() {
            all.extend(seen);
        }
        let (covered, delivered) = (progress.tables.as_ref(), progress.delivered.as_ref());
        let leaves = reconcile::moved(gap.client, tables, covered, delivered, &all).await?;
        progress::closed(gap.client, gap.claim, progress, leaves).await?;
    } else {
        set_apart(&mut progress.position, tables, &upto, seen);
        progress::scanned(gap.client, gap.claim, progress).await?;
    }
    Ok((stragglers, left))
}

/// Records the end of the scan for tables that were read (`seen`: their leaf tables), and the position of those that were not.
fn set_apart(
    position: &mut progress::Position,
    tables: &[TableName],
    upto: &Snapshot,
    mut seen: BTreeMap<String, Seen>,
) {
    for name in tables {
        let key = name.to_string();
        let end = |leaves| Stretch {
            upto: upto.clone(),
            leaves,
        };
        // Begun is what had a cursor, also without a position: see `seen_with`.
        let so_far = position.covered.remove(&key);
        let begun = so_far.is_some() || position.tables.get(&key).is_some_and(|seq| *seq > 0);
        let so_far = so_far.unwrap_or_default();
        if let Some(leaves) = seen.remove(&key) {
            position.tables.remove(&key);
            position.left.remove(&key);
            position.ahead.insert(key, end(leaves));
        } else if begun {
            position.left.entry(key).or_insert_with(|| end(so_far));
        } else {
            position.tables.remove(&key);
            position.left.remove(&key);
        }
    }
}

/// One warning for each table and reason; `/status` tells them as long as they hold.
fn tell_left(gap: &Gap<'_>, left: &[LeftTable]) {
    let upkeep = gap.publisher.meter.upkeep();
    let mut undone = Undone::default();
    for (table, why) in left {
        let name = table.to_string();
        if !upkeep.has(Work::Scan, &name, &reason(&why.told().0)) {
            warn!(%table, "the table cannot be read, and its rows wait; the others are read: {}", why.report());
        }
        undone.add(&name, why);
    }
    upkeep.set(Work::Scan, undone);
}

/// Whether an error that came while a table was read is about this table, so that the others may be read.
fn is_of_table(error: &Error) -> bool {
    match sqlstate(error) {
        Some(_) => is_about_rows(error),
        None => matches!(error.exit_code(), 64 | 69),
    }
}

/// What was read of a table.
struct Read {
    /// Its OID; `None`: it was not looked at.
    table: Option<u32>,
    /// The leaf tables whose rows are published up to the end of the gap.
    seen: Seen,
}

/// Publishes one table's rows of the gap. Returns what was read of it, or the reason why it cannot be read.
async fn close_table(
    gap: &Gap<'_>,
    (place, name): (u16, &TableName),
    progress: &mut Progress,
    stragglers: &mut Option<Stragglers>,
    overlap: &mut Overlap,
) -> Result<Result<Read, Error>> {
    let key = name.to_string();
    loop {
        let Some(upto) = progress.gap().cloned() else {
            return Err(Error::bug("there is no gap, and one was to be closed"));
        };
        let ahead = progress.position.ahead.get(&key);
        if let Some(ahead) = ahead.filter(|ahead| ahead.upto == upto) {
            let seen = ahead.leaves.clone();
            return Ok(Ok(Read { table: None, seen }));
        }
        let earlier = progress.position.left.get(&key);
        let is_earlier = earlier.is_some();
        let upto = earlier.map_or(upto, |earlier| earlier.upto.clone());
        let chosen = match ready(gap, name, progress, &upto).await {
            Ok(Ready::Rows(chosen)) => chosen,
            Ok(Ready::Nothing(seen)) => return Ok(Ok(Read { table: None, seen })),
            Err(why) if is_of_table(&why) || is_unreadable(&why) => return Ok(Err(why)),
            Err(error) => return Err(error),
        };
        let scan = Scan::new(gap, (place, &chosen), progress, stragglers.take(), overlap);
        let mut scan = scan.await?;
        scan.metering();
        let scanned = scan.run(gap, progress).await;
        // Also where it failed: what was in the air is published again by the next one.
        let meter = scan.outlet.metering();
        meter.end_scan();
        meter.set_in_flight((0, 0), 0);
        meter.set_troubles(Troubles::default());
        if progress.position.missing.is_some() {
            let counts = scan.outlet.counts();
            meter.reconciled(counts.acknowledged + counts.stragglers);
        }
        let why = scanned?;
        let seen = scan.seen;
        *stragglers = scan.outlet.into_stragglers();
        if let Some(why) = why {
            // The rest of the table would be read again under the same names.
            if gap.publisher.doubts.is_raised() {
                return Err(
                    Error::temporary("a scan is begun again, under other producer names")
                        .caused_by(why),
                );
            }
            return Ok(Err(why));
        }
        if !is_earlier {
            let table = Some(chosen.table.relation.id);
            return Ok(Ok(Read { table, seen }));
        }
        progress.position.tables.remove(&key);
        progress.position.left.remove(&key);
        let end = Stretch { upto, leaves: seen };
        progress.position.ahead.insert(key.clone(), end);
        progress::scanned(gap.client, gap.claim, progress).await?;
    }
}

/// What is to be read of a table.
enum Ready {
    Rows(Box<Chosen>),
    /// Nothing; of these leaf tables nothing is missing.
    Nothing(Seen),
}

/// The table as a scan reads it, and which of its rows.
struct Chosen {
    table: ScanTable,
    upto: Snapshot,
    /// The leaf tables that the next cursor adds nothing to: see [`seen_with`].
    seen: Seen,
    /// SQL, for these leaf tables.
    rows: String,
}

/// Looks at a table.
///
/// # Errors
/// What keeps it from being read.
async fn ready(
    gap: &Gap<'_>,
    name: &TableName,
    progress: &Progress,
    upto: &Snapshot,
) -> Result<Ready> {
    let Some(mut table) = ScanTable::describe(gap.rows, name).await? else {
        if gap.left_out.contains(name) {
            warn!(table = %name, "the table has no columns txid and seq: rows that the slot does not bring are not looked for");
            return Ok(Ready::Nothing(reconcile::leaves(gap.rows, name).await?));
        }
        return Err(unreadable(name));
    };
    table.read_only_for(&gap.extractor(&table)?);
    let leaves = reconcile::leaves(gap.rows, name).await?;
    let seen = seen_with(progress, name, &leaves);
    let Some(rows) = rows_of(progress, name, upto, &seen)? else {
        return Ok(Ready::Nothing(seen));
    };
    let slot = gap.claim.slot();
    match table.refuse_from_elsewhere(gap.rows, slot).await {
        // What a comparison has found are other rows. Those of the future wait until the cluster comes to their txid: then they are compared.
        Err(error) if progress.position.missing.is_some() && !error.is_temporary() => {
            warn!(table = %name, "these rows are left out: {}", error.report());
        }
        looked => looked?,
    }
    table.refuse_unscannable(gap.rows, slot, &rows).await?;
    Ok(Ready::Rows(Box::new(Chosen {
        table,
        upto: upto.clone(),
        seen,
        rows,
    })))
}

/// What is seen of a table with a cursor that has these leaf tables: those that each earlier one had, or the comparison that found the gap.
/// (Each, also one that stored no position: it may have published rows, and where the broker deduplicates it takes a row with a lower `seq` for
/// one of them.)
fn seen_with(progress: &Progress, table: &TableName, leaves: &Seen) -> Seen {
    let (position, key) = (&progress.position, table.to_string());
    if let Some(earlier) = position.left.get(&key) {
        return earlier.leaves.and(leaves);
    }
    match position.covered.get(&key) {
        Some(so_far) => so_far.and(leaves),
        None if position.tables.contains_key(&key) || position.missing.is_some() => Seen::default(),
        None => leaves.clone(),
    }
}

/// SQL: which rows of a table are to be published, of these leaf tables; `None`: none.
fn rows_of(
    progress: &Progress,
    table: &TableName,
    upto: &Snapshot,
    seen: &Seen,
) -> Result<Option<String>> {
    let key = table.to_string();
    let delivered = progress.delivered.as_ref();
    if let Some(missing) = &progress.position.missing {
        let rows = missing.0.get(&key);
        return rows
            .map(|rows| gap_condition(upto, delivered, Some(&rows.txids), &rows.leaves))
            .transpose();
    }
    let tables = progress.tables.as_ref();
    if let Some(ahead) = progress.position.ahead.get(&key) {
        let new = seen.iter().filter(|leaf| !ahead.leaves.contains(*leaf));
        let new: Uncovered = new
            .map(|leaf| {
                let until = match tables {
                    Some(tables) => tables.until(leaf, delivered),
                    None => delivered.cloned(),
                };
                (leaf, until)
            })
            .collect();
        return gap_condition(upto, Some(&ahead.upto), None, &new).map(Some);
    }
    let new = tables.map_or_else(Uncovered::new, |tables| tables.uncovered(seen));
    gap_condition(upto, delivered, None, &new).map(Some)
}

/// The table is not there at the moment, or is not the one that it was: what is visible now is not delivered.
fn unreadable(table: &TableName) -> Error {
    Error::temporary(format!(
        "table {table} is missing, was replaced, or has lost its columns txid and seq while it was read"
    ))
    .hint("what is delivered is not noted until it can be read: bring it back, or take it out of WALPOST_OUTBOX_TABLE")
    .caused_by(NotThere)
}

/// See [`unreadable`].
#[derive(Debug)]
struct NotThere;

impl std::fmt::Display for NotThere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("its rows cannot be read")
    }
}

impl std::error::Error for NotThere {}

fn is_unreadable(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(<dyn std::error::Error>::is::<NotThere>)
}

/// The scan of one table.
struct Scan<'a> {
    chosen: &'a Chosen,
    table: &'a ScanTable,
    /// The table's place in the settings.
    place: u16,
    extractor: Extractor,
    /// Its tracker counts by `seq` in place of log positions.
    outlet: Outlet,
    after: i64,
    /// Leaf tables whose rows are published when it is over.
    seen: Seen,
    overlap: &'a mut Overlap,
    /// The last row's `seq`.
    last: i64,
    stored_at: Instant,
    told_at: Instant,
}

impl<'a> Scan<'a> {
    async fn new(
        gap: &Gap<'_>,
        (place, chosen): (u16, &'a Chosen),
        progress: &Progress,
        stragglers: Option<Stragglers>,
        overlap: &'a mut Overlap,
    ) -> Result<Self> {
        let (table, upto) = (&chosen.table, &chosen.upto);
        let name = table.name.to_string();
        let after = progress.position.tables.get(&name).copied().unwrap_or(0);
        let settings = PublisherConfig {
            producer_name: producer_name(&gap.publisher.producer_name, upto, &name),
            diversion: gap.publisher.diversion.map(|diversion| Diversion {
                age: diversion.age.min(PATIENCE),
                ..diversion
            }),
            ..gap.publisher.clone()
        };
        let mut publisher = Publisher::under(settings, gap.lease);
        publisher.connect().await?;
        let report_rows = gap.routing.report_rows;
        let now = Instant::now();
        Ok(Self {
            chosen,
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
            seen: Seen::default(),
            overlap,
            last: after,
            stored_at: now,
            told_at: now,
        })
    }

    /// Publishes the chosen rows. Why they cannot be read, if so; those before have their receipts.
    async fn run(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<Option<Error>> {
        let table = &self.table.name;
        debug!(%table, after_seq = self.after, "reading rows from the table");
        let why = match self.read(gap, progress).await {
            Ok(()) => None,
            Err(Unread::Table(why)) => Some(why),
            Err(Unread::Failed(error)) => return Err(error),
        };
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
        Ok(why)
    }

    /// Declares the cursor, and says which leaf tables it reads.
    async fn open<'b>(&mut self, gap: &Gap<'b>, progress: &Progress) -> Result<Rows<'b>>
    where
        'a: 'b,
    {
        let (chosen, table) = (self.chosen, self.table);
        let leaves = reconcile::begin_look(gap.rows, &table.name).await?;
        let seen = seen_with(progress, &table.name, &leaves);
        let mut rows = chosen.rows.clone();
        if seen != chosen.seen {
            rows = rows_of(progress, &table.name, &chosen.upto, &seen)?
                .unwrap_or_else(|| "false".to_owned());
            let slot = gap.claim.slot();
            table.refuse_unscannable(gap.rows, slot, &rows).await?;
        }
        let (rows, seen) = table.open(gap.rows, &rows, (self.after, &seen)).await?;
        self.seen = seen;
        Ok(rows)
    }

    /// Stores which leaf tables the cursor reads, and remembers what earlier ones read.
    async fn begun(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<()> {
        let key = self.table.name.to_string();
        let position = &mut progress.position;
        let so_far = match position.left.get_mut(&key) {
            Some(earlier) => Some(std::mem::replace(&mut earlier.leaves, self.seen.clone())),
            None => position.covered.insert(key, self.seen.clone()),
        };
        if so_far.as_ref() != Some(&self.seen) {
            progress::scanned(gap.client, gap.claim, progress).await?;
        }
        if self.after > 0 {
            let (upto, earlier) = (&self.chosen.upto, (self.after, &self.seen));
            self.overlap
                .read_before(gap.rows, gap.routing, self.table, upto, earlier)
                .await?;
        }
        Ok(())
    }

    async fn read(&mut self, gap: &Gap<'_>, progress: &mut Progress) -> Result<(), Unread> {
        let mut rows = match self.open(gap, progress).await {
            Ok(rows) => rows,
            Err(error) => {
                abandon(gap.rows).await;
                return Err(error.into());
            }
        };
        self.begun(gap, progress).await.map_err(Unread::Failed)?;
        // A row is taken when the next one is known: of two with one number neither is published, however often the table is tried again.
        let mut held: Option<ScanRow> = None;
        loop {
            // An error of ours is not the table's.
            let mut failed = None;
            let next = rows.next_for(Taking {
                scan: self,
                at: (gap, progress),
                held: &mut held,
                failed: &mut failed,
            });
            let next = next.await;
            if let Some(error) = failed {
                return Err(Unread::Failed(error));
            }
            match next {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    rows.close().await?;
                    return Err(error.into());
                }
            }
        }
        rows.close().await?;
        if let Some(row) = held {
            self.take(&row).map_err(Unread::Failed)?;
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
        self.outlet.tick(now);
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
        let table = self.table.name.to_string();
        if progress.position.tables.insert(table, seq) == Some(seq) {
            return Ok(());
        }
        progress::scanned(gap.client, gap.claim, progress).await
    }

    fn take(&mut self, row: &ScanRow) -> Result<()> {
        self.last = row.seq;
        let position = position(row.seq)?;
        let tag = RowTag::new(self.place, position.as_u64() >> 3);
        let tuple = row.tuple()?;
        let table = self.table.relation.id;
        self.overlap.take(table, &self.extractor, row, &tuple);
        self.outlet
            .take_read(&mut self.extractor, &tuple, tag, position)
    }
}

/// What the producers of one table's scan are named after: the end of the gap and the table. With 128 bits of their digest, because poll mode makes a name
/// with each look, and the broker remembers thousands: under the name of another scan, rows with a lower `seq` would count as stored.
fn producer_name(of_stream: &str, upto: &str, table: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, format!("{upto} {table}").as_bytes());
    let mut name = format!("{of_stream}-scan-");
    for byte in digest.as_ref().iter().take(16) {
        // Writing to a `String` never fails.
        let _never = write!(name, "{byte:02x}");
    }
    name
}

/// A scan that takes rows.
struct Taking<'s, 'a, 'g> {
    scan: &'s mut Scan<'a>,
    at: (&'s Gap<'g>, &'s mut Progress),
    /// The last row that came, and is not taken yet.
    held: &'s mut Option<ScanRow>,
    /// An error that is not the table's.
    failed: &'s mut Option<Error>,
}

impl Taking<'_, '_, '_> {
    fn fail(&mut self, error: Error) -> Error {
        *self.failed = Some(error);
        Error::bug("another error is looked at")
    }
}

impl Taker for Taking<'_, '_, '_> {
    async fn take(&mut self, row: ScanRow) -> Result<()> {
        let last = self.held.as_ref().map_or(self.scan.last, |held| held.seq);
        if row.seq <= last {
            return Err(self.scan.table.told_twice(row.seq));
        }
        let Some(before) = self.held.replace(row) else {
            return Ok(());
        };
        let (gap, progress) = (self.at.0, &mut *self.at.1);
        let taken = match self.scan.take(&before) {
            Ok(()) => self.scan.serve(gap, progress).await,
            Err(error) => Err(error),
        };
        taken.map_err(|error| self.fail(error))
    }

    /// Receipts, while the server makes up its mind. (What is done with the session of the lock waits until the row is there: it would be
    /// cut short by it.)
    async fn serve(&mut self) -> Error {
        loop {
            let tick = Instant::now() + TICK;
            let outlet = &mut self.scan.outlet;
            tokio::select! {
                biased;
                event = outlet.next_event() => if let Err(error) = outlet.event(event) {
                    return self.fail(error);
                },
                () = sleep_until(tick) => {
                    outlet.publisher().flush(Flush::Due);
                    outlet.tick(Instant::now());
                }
            }
        }
    }
}

/// Why a table was not read to its end.
enum Unread {
    /// It cannot be read.
    Table(Error),
    /// The scan has failed.
    Failed(Error),
}

impl From<Error> for Unread {
    fn from(error: Error) -> Self {
        if is_of_table(&error) {
            Self::Table(error)
        } else {
            Self::Failed(error)
        }
    }
}

/// A `seq` as a position whose sequence ids are its own: see `pulsar::producer::lane`.
fn position(seq: i64) -> Result<Lsn> {
    let seq = u64::try_from(seq)
        .ok()
        .filter(|seq| *seq < SEQ_END.unsigned_abs());
    seq.map(|seq| Lsn::new(seq << 3)).ok_or_else(|| {
        // Such rows are counted, and refused with the statement that mends them, before a scan begins.
        Error::bug("a row with a seq that no scan can use was read")
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_looks_have_one_name() {
        // As many as would have thousands of pairs in 32 bits.
        let looks = (0..300_000).map(|xmax| {
            let upto: Snapshot = format!("{xmax}:{xmax}:");
            producer_name("walpost", &upto, "walpost.outbox")
        });
        assert_eq!(looks.collect::<HashSet<_>>().len(), 300_000);
        let name = |table| producer_name("walpost", "5:5:", table);
        assert_eq!(name("walpost.outbox"), name("walpost.outbox"));
        assert_ne!(name("walpost.outbox"), name("walpost.other"));
    }
}
