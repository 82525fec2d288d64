//! The pipe: one replication message in, one event into the publisher, and the book kept of what may be confirmed.
//!
//! Owns the decoder's state (relations, the open transaction) and the [`Outlet`] that its rows go into. It does no I/O of its
//! own and never waits: the connector reads frames and hands them in, and asks for the flush LSN.
//!
//! One row's way, without an allocation or a task of its own:
//!
//! ```text
//! frame (borrowed) → pgoutput::parse (borrowed) → Extractor (borrowed) → topic into a reused String → lane's batch (copied once)
//! ```
//!
//! # What Postgres repeats
//!
//! A replication connection that is made anew starts at the confirmed LSN: Postgres sends again what was received and not
//! confirmed. All of that is in the publisher's hands or has its receipt, and the tracker ([`crate::ack`]) knows it, so it is
//! skipped: whole transactions up to the last one that was received whole, by their commit LSN (two never share one); and of
//! the one that was cut, as many rows as were taken of it (a log that is decoded again gives the same rows in the same order).
//! No row is ever told by its own LSN: all rows of one COPY may share one. So a lost connection neither waits for the broker
//! nor sends anything twice.
//!
//! # What cannot be published
//!
//! [`Outlet`] sees to it, as it does for rows that are read from the table.
//!
//! # Events without a table
//!
//! Transactional logical messages are rows as well: see the module `logical`.
//!
//! # Which relations are outbox tables
//!
//! A relation with the name of an outbox table is one, whatever its OID: a table that was dropped and made anew goes on. Rows of any
//! other relation are judged by the catalogue ([`OutboxRelations`]), which the connector reads before each stream:
//!
//! * Committed before that reading: the OID decides. A partition whose rows came under its own name, because
//!   `publish_via_partition_root` was off for a time, and an outbox table that had another name for a time are followed; other
//!   tables are skipped, with a warning for each.
//! * Committed behind it, of a relation that is not known as somebody else's: the catalogue has changed, so it is asked again
//!   ([`Format::AskCatalog`]). Opening refuses what is wrong with the publication or a table; what is right then is decided as above,
//!   because the same row is by now older than the reading.
//!
//! Rows of a table that was an outbox table in this process and is none any more are refused: somebody renamed it, and may not
//! know that it is still written to. `tests/catalog/stream.rs` tries each.
//!
//! # Columns that had another name
//!
//! The log describes a table as it was. Where an optional column had another name then, its rows are refused as unreadable: see the module
//! `renamed`, and `crate::connector` for what becomes of that.
//!
//! # A slot that was changed
//!
//! A transaction that was cut and does not come again was taken out of the slot by somebody; going on would confirm it half
//! published. The pipe refuses.

mod logical;
mod renamed;

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::ack::TxnNo;
use crate::outbox::{Columns, ENVELOPE_OID, Envelopes, Extractor, RowNumber, TopicTemplate};
use crate::outlet::{Counts, Event, Origin, Outlet, Source};
use crate::pgoutput::{self, Message, Relation, RelationCache, Tuple};
use crate::postgres::{self, Frame, OutboxRelations, TableName, UnreadableLog};
use crate::pulsar::{Publisher, RowKey, RowTag};
use crate::scanner::straggler::Stragglers;
use crate::scanner::straggler_fence::Right;
use crate::scanner::streamed::StreamedRuns;
use crate::{Error, Lsn, Result};

/// What passed through, since the start of the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Events handed to the publisher.
    pub events: u64,
    /// Events that have their receipt.
    pub acknowledged: u64,
    /// Events stored as stragglers instead.
    pub stragglers: u64,
    /// Rows that Postgres repeated although they were taken before.
    pub suppressed: u64,
    /// Transactions with or without events.
    pub transactions: u64,
    /// Messages that are no business of ours: other tables, updates, deletes, truncates, unknown types.
    pub skipped: u64,
    /// Logical messages for us that belong to no transaction.
    pub refused: u64,
}

impl Counters {
    /// What came since an earlier reading of the same counters.
    fn since(&self, earlier: &Self) -> Self {
        Self {
            events: self.events - earlier.events,
            acknowledged: self.acknowledged - earlier.acknowledged,
            stragglers: self.stragglers - earlier.stragglers,
            suppressed: self.suppressed - earlier.suppressed,
            transactions: self.transactions - earlier.transactions,
            skipped: self.skipped - earlier.skipped,
            refused: self.refused - earlier.refused,
        }
    }
}

/// A row that a scan published and that the stream may bring as well: OID of its table, and which of its rows.
pub type ScannedRow = (u32, RowKey);

/// Which tables and columns are read, and where their rows go.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The outbox tables.
    pub tables: Vec<TableName>,
    /// Names of their columns.
    pub columns: Columns,
    /// Topic of a row that names none.
    pub template: TopicTemplate,
    /// Whether it is to be told which rows have their receipt.
    pub report_rows: bool,
}

impl std::fmt::Display for Routing {
    /// All that decides which topic and key an event gets, in a form that stays the same from version to version.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut tables: Vec<String> = self.tables.iter().map(ToString::to_string).collect();
        tables.sort_unstable();
        let columns = &self.columns;
        write!(
            f,
            "{}\n{:?}\n{:?}\n",
            self.template, columns.aggregateid, columns.topic
        )?;
        f.write_str(&tables.join("\n"))
    }
}

/// Whether the stream can go on as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// It can.
    Fits,
    /// A column that is read has a type without a known binary form: ask for text and start again.
    NeedsText,
    /// A row of a relation that the catalogue did not have as it is when it was read: read it and start again.
    AskCatalog,
}

/// The transaction whose rows are arriving, or were when the connection was lost.
#[derive(Clone, Copy, Debug)]
struct OpenTxn {
    no: TxnNo,
    commit_lsn: Lsn,
    xid: u32,
    /// How many of its rows were taken.
    rows: u64,
}

impl OpenTxn {
    /// Its last row, of the table at that place in the settings.
    fn origin(&self, table: u16, is_row: bool) -> Origin {
        Origin {
            txn: self.no,
            commit_lsn: self.commit_lsn,
            row: RowTag::new(table, self.rows),
            xid: self.xid,
            is_row,
        }
    }
}

/// Where the stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Between,
    /// In a transaction that was received whole before.
    Repeating {
        commit_lsn: Lsn,
    },
    /// In the open transaction, of which this many rows are repeated first.
    Open {
        repeated: u64,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Pipe {
    routing: Routing,
    outlet: Outlet,
    relations: RelationCache,
    /// One per relation seen, with the table's place in the settings; `None` for a table that is no outbox.
    extractors: Vec<(u32, Option<(Extractor, u16)>)>,
    envelopes: Envelopes,
    /// Memory for an envelope's row.
    envelope_row: Vec<u8>,
    /// Tables that are no outbox and had rows: told once.
    foreign: Vec<u32>,
    /// What the catalogue says of tables by their OIDs.
    outbox: OutboxRelations,
    /// OIDs that were outbox tables earlier in this process.
    former: Vec<u32>,
    /// Values in the stream are binary where their type allows.
    binary: bool,
    open: Option<OpenTxn>,
    stream: Stream,
    /// Commit LSN of the last transaction that was received whole.
    received_whole: Lsn,
    /// Table OID, id and number of rows that the gap scan published and that the stream may bring as well: a handful, and only while
    /// a slot is new.
    scanned: HashSet<ScannedRow>,
    /// The rows that this pipe has taken, by table and `txid`, until they are handed on; `None`: nobody counts them.
    streamed: Option<StreamedRuns>,
    /// Commit time of the last transaction that began, and when the last message was sent: microseconds by the server's
    /// clock.
    times_us: (i64, i64),
    /// The furthest position received.
    received: Lsn,
    /// WAL end of the last keepalive, for the idle rule.
    keepalive_wal_end: Lsn,
    /// See [`Counters`].
    suppressed: u64,
    transactions: u64,
    skipped: u64,
    refused: u64,
    /// What the meter knows of all that was counted.
    metered: Counters,
}

impl Pipe {
    /// A pipe whose slot has confirmed up to `confirmed`.
    pub fn new(
        routing: Routing,
        publisher: Publisher,
        stragglers: Option<Stragglers>,
        confirmed: Lsn,
    ) -> Self {
        let report_rows = routing.report_rows;
        Self {
            envelopes: Envelopes::new(&routing.columns, &routing.template),
            envelope_row: Vec::new(),
            routing,
            outlet: Outlet::new(publisher, stragglers, Source::Log, report_rows, confirmed),
            relations: RelationCache::new(),
            extractors: Vec::new(),
            foreign: Vec::new(),
            outbox: OutboxRelations::default(),
            former: Vec::new(),
            binary: true,
            open: None,
            stream: Stream::Between,
            received_whole: Lsn::ZERO,
            scanned: HashSet::new(),
            streamed: None,
            times_us: (0, 0),
            received: confirmed,
            keepalive_wal_end: Lsn::ZERO,
            suppressed: 0,
            transactions: 0,
            skipped: 0,
            refused: 0,
            metered: Counters::default(),
        }
    }

    /// A new replication connection begins: Postgres repeats everything from the confirmed LSN on. `outbox` was just read.
    pub fn begin_stream(&mut self, binary: bool, outbox: OutboxRelations) {
        self.former.append(&mut self.outbox.roots);
        self.former.retain(|oid| !outbox.roots.contains(oid));
        self.foreign.retain(|oid| outbox.place(*oid).is_none());
        self.outbox = outbox;
        self.stream = Stream::Between;
        self.binary = binary;
        // A walsender describes each relation anew; the old description may be out of date.
        self.relations = RelationCache::new();
        self.extractors.clear();
    }

    /// These rows (table OID, id and number) are in their topics already, should the stream bring them: see [`crate::scanner`].
    pub fn skip_scanned(&mut self, rows: impl IntoIterator<Item = ScannedRow>) {
        self.scanned = rows.into_iter().collect();
    }

    /// From now on the rows that are taken are counted, for [`Pipe::streamed`].
    pub fn count_streamed(&mut self) {
        self.streamed = Some(StreamedRuns::default());
    }

    /// The rows taken since they were last handed on, where they are counted.
    pub fn streamed(&mut self) -> Option<&mut StreamedRuns> {
        self.streamed.as_mut()
    }

    /// The publisher, to wait on.
    pub fn publisher(&mut self) -> &mut Publisher {
        self.outlet.publisher()
    }

    /// Puts a new publisher in the place of the one that there is: see [`Outlet::renew_publisher`]. Only between two transactions: their events are
    /// numbered by the publisher.
    pub fn renew_publisher(&mut self, publisher: Publisher) {
        assert!(
            self.is_whole(),
            "a publisher ends in the middle of a transaction"
        );
        self.outlet.renew_publisher(publisher);
    }

    /// True while another frame may be taken.
    pub fn has_room(&self) -> bool {
        let streamed = self.streamed.as_ref();
        self.outlet.has_room() && streamed.is_none_or(|runs| runs.len() < StreamedRuns::FULL)
    }

    /// Events without receipt, and not stored as stragglers either.
    pub fn unfinished(&self) -> usize {
        self.outlet.unfinished()
    }

    /// Completes when all is known of the stragglers that another instance may have stored; to be awaited before the first
    /// frame of a new stream.
    pub fn refresh(&self) -> impl Future<Output = ()> + use<> {
        let refreshed = self.outlet.stragglers().map(Stragglers::refresh);
        async move {
            if let Some(refreshed) = refreshed {
                refreshed.await;
            }
        }
    }

    /// Tells whether the replication stream is open: only then are stragglers retried.
    pub fn streaming(&self, is_streaming: bool) {
        if let Some(stragglers) = self.outlet.stragglers() {
            stragglers.retry(is_streaming);
        }
    }

    /// Tells under which claim stragglers are stored and retried from now on.
    pub fn set_right(&self, right: Right) {
        if let Some(stragglers) = self.outlet.stragglers() {
            stragglers.set_right(right);
        }
    }

    /// Waits for what a broker says, or what became of stragglers. Cancel safe.
    pub async fn next_event(&mut self) -> Event {
        self.outlet.next_event().await
    }

    /// The next of these, if one is waiting.
    pub fn try_next_event(&mut self) -> Option<Event> {
        self.outlet.try_next_event()
    }

    /// Applies what was said.
    pub fn event(&mut self, event: Event) -> Result<()> {
        self.outlet.event(event)
    }

    /// True while a transaction has begun and not committed.
    pub fn is_in_transaction(&self) -> bool {
        self.stream != Stream::Between
    }

    /// True when every transaction that rows were taken of has been received whole. Not so behind a lost connection that cut one: its
    /// rest is yet to come.
    pub fn is_whole(&self) -> bool {
        self.stream == Stream::Between && self.open.is_none()
    }

    /// How long after its commit the server has sent the last row: all of it by the server's clock.
    pub fn lateness(&self) -> Duration {
        let (committed, sent) = self.times_us;
        Duration::from_micros(u64::try_from(sent.saturating_sub(committed)).unwrap_or(0))
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        let Counts {
            events,
            acknowledged,
            stragglers,
        } = self.outlet.counts();
        Counters {
            events,
            acknowledged,
            stragglers,
            suppressed: self.suppressed,
            transactions: self.transactions,
            skipped: self.skipped,
            refused: self.refused,
        }
    }

    /// The publisher looks at the clock: to be called about once a second.
    pub fn tick(&mut self, at: Instant) {
        self.outlet.tick(at);
    }

    /// Tells the meter where everything stands; to be called about once a second, and with every status update.
    pub fn metering(&mut self) {
        let confirmed = self.flush_lsn();
        let counters = self.counters();
        let received = self.received.max(confirmed);
        let meter = self.outlet.metering();
        meter.count(&counters.since(&self.metered));
        meter.set_positions(received, confirmed);
        self.metered = counters;
    }

    /// Whether what arrives now was committed behind the last reading of the catalogue.
    pub fn is_ahead_of_catalog(&self) -> bool {
        self.received > self.outbox.read_at
    }

    /// Everything before this was received.
    pub fn received(&self) -> Lsn {
        self.received
    }

    /// The position to confirm; the only place it comes from is [`AckTracker::flush_lsn`](crate::ack::AckTracker::flush_lsn).
    pub fn flush_lsn(&mut self) -> Lsn {
        self.outlet.tracker().flush_lsn(self.keepalive_wal_end)
    }

    /// Says of an error of the stream which row it is about, where the server cannot convert the row's text to UTF-8 or cannot send it at all
    /// (`is_stuck`: it has failed there too often). Nothing behind that row can be read: the log keeps it, also when the row is mended.
    #[cold]
    pub fn locate(&self, error: Error, is_stuck: bool) -> Error {
        let why = if postgres::is_unconvertible(&error) {
            "has text that the server cannot convert to UTF-8"
        } else if is_stuck || postgres::is_beyond_limits(&error) {
            "cannot be sent by the server"
        } else {
            return error;
        };
        let tables: Vec<String> = self
            .routing
            .tables
            .iter()
            .map(ToString::to_string)
            .collect();
        let tables = tables.join(", ");
        let place = match (self.stream, &self.open) {
            (Stream::Open { .. }, Some(open)) => format!(
                "row {} of transaction {}, which commits at {}, of table {tables} or another one of the publication",
                open.rows + 1,
                open.xid,
                open.commit_lsn
            ),
            _ => format!("a row behind {} of table {tables}", self.received),
        };
        Error::refused(format!("{place} {why}")).caused_by(UnreadableLog(error.told().0))
    }

    /// Takes one frame; true when the server wants a status update at once.
    pub fn frame(&mut self, frame: Frame<'_>) -> Result<(Format, bool)> {
        match frame {
            Frame::Keepalive {
                wal_end,
                reply_requested,
                ..
            } => {
                self.keepalive_wal_end = self.keepalive_wal_end.max(wal_end);
                self.received = self.received.max(wal_end);
                Ok((Format::Fits, reply_requested))
            }
            Frame::XLogData {
                wal_start,
                send_time_us,
                payload,
                ..
            } => {
                self.received = self.received.max(wal_start);
                self.times_us.1 = send_time_us;
                Ok((self.message(payload, wal_start)?, false))
            }
        }
    }

    fn message(&mut self, payload: &[u8], at: Lsn) -> Result<Format> {
        let message = pgoutput::parse(payload).map_err(|error| {
            Error::bug(format!("the replication stream at {at} cannot be decoded")).caused_by(error)
        })?;
        match message {
            Message::Insert { relation_id, tuple } => return self.insert(relation_id, &tuple, at),
            Message::Begin {
                final_lsn,
                commit_time_us,
                xid,
            } => {
                self.times_us.0 = commit_time_us;
                self.begin(final_lsn, commit_time_us, xid, at)?;
            }
            Message::Commit {
                commit_lsn,
                end_lsn,
                ..
            } => self.commit(commit_lsn, end_lsn)?,
            Message::Relation(relation) => {
                let id = relation.id;
                self.relations.insert(relation);
                return self.relation(id);
            }
            Message::Type {
                id,
                namespace,
                name,
            } => self.relations.note_type(id, namespace, name),
            Message::Logical(message) => return self.logical(&message, at),
            Message::Unknown(tag) => {
                self.skipped += 1;
                debug!(tag, %at, "a message of an unknown type is skipped");
            }
            Message::Origin { .. }
            | Message::Truncate { .. }
            | Message::Update { .. }
            | Message::Delete { .. } => {
                self.skipped += 1;
            }
        }
        Ok(Format::Fits)
    }

    fn begin(&mut self, commit_lsn: Lsn, commit_time_us: i64, xid: u32, at: Lsn) -> Result<()> {
        if self.stream != Stream::Between {
            return Err(Error::bug(format!(
                "a transaction begins inside another at {at}"
            )));
        }
        if commit_lsn <= self.received_whole {
            self.stream = Stream::Repeating { commit_lsn };
            return Ok(());
        }
        let open = match self.open {
            Some(open) if open.commit_lsn == commit_lsn => open,
            Some(open) => {
                return Err(Error::refused(format!(
                    "the connection was lost in the transaction that commits at {}, and the slot goes on with the one at {commit_lsn}: \
                     somebody advanced the slot, or dropped it and made it anew",
                    open.commit_lsn
                ))
                .hint("rows between the two may never have been published: compare the table with the topics, then start walpost again"));
            }
            None => {
                let tracker = self.outlet.tracker();
                let no = tracker.begin();
                tracker.set_commit_time(commit_time_us);
                tracker.set_xid(xid);
                OpenTxn {
                    no,
                    commit_lsn,
                    xid,
                    rows: 0,
                }
            }
        };
        self.open = Some(open);
        self.stream = Stream::Open {
            repeated: open.rows,
        };
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn) -> Result<()> {
        let stream = std::mem::replace(&mut self.stream, Stream::Between);
        if stream == (Stream::Repeating { commit_lsn }) {
            return Ok(());
        }
        let open = self.open.take();
        if stream != (Stream::Open { repeated: 0 })
            || open.is_none_or(|open| open.commit_lsn != commit_lsn)
        {
            return Err(Error::bug(format!(
                "the commit at {commit_lsn} does not end the transaction that began"
            )));
        }
        self.outlet.tracker().commit(end_lsn);
        self.outlet.publisher().end_transaction();
        self.received_whole = commit_lsn;
        self.received = self.received.max(end_lsn);
        self.transactions += 1;
        Ok(())
    }

    /// Counts a row; `None` when it was taken before the connection was lost.
    fn next_row(&mut self, at: Lsn) -> Result<Option<OpenTxn>> {
        match (&mut self.stream, &mut self.open) {
            (Stream::Repeating { .. }, _) => {}
            (Stream::Open { repeated }, _) if *repeated > 0 => *repeated -= 1,
            (Stream::Open { .. }, Some(open)) => {
                open.rows += 1;
                return Ok(Some(*open));
            }
            _ => {
                return Err(Error::bug(format!(
                    "a row outside of a transaction at {at}"
                )));
            }
        }
        self.suppressed += 1;
        Ok(None)
    }

    fn relation(&mut self, id: u32) -> Result<Format> {
        let Some(relation) = self.relations.get(id) else {
            return Ok(Format::Fits);
        };
        let is_outbox =
            |table: &TableName| table.schema == relation.namespace && table.name == relation.name;
        let place = self.routing.tables.iter().position(is_outbox);
        let extractor = if let Some(place) = place {
            let extractor = Extractor::new(relation, &self.routing.columns, &self.routing.template)
                .map_err(|error| described_otherwise(relation, &error))?;
            let place = u16::try_from(place).unwrap_or(u16::MAX);
            self.refuse_renamed(relation, place)?;
            if self.binary
                && let Some((column, type_oid)) = extractor.needs_text()
            {
                info!(table = %relation, column, type_oid, "this column's type is read as text: starting the stream again");
                return Ok(Format::NeedsText);
            }
            Some((extractor, place))
        } else {
            // Not worth a word yet: a partition is described too, before its rows come under the table's own name.
            None
        };
        self.extractors.retain(|(known, _)| *known != id);
        self.extractors.push((id, extractor));
        Ok(Format::Fits)
    }

    /// Refuses rows that would be read without what they have.
    fn refuse_renamed(&self, relation: &Relation, place: u16) -> Result<()> {
        let is_same_table = self.outbox.roots.contains(&relation.id);
        let now = self.outbox.columns_of(place);
        match renamed::renamed(relation, now, is_same_table) {
            None => Ok(()),
            Some(column) => Err(described_otherwise(
                relation,
                &Error::refused(format!("column {column} had another name then")),
            )),
        }
    }

    fn insert(&mut self, relation_id: u32, tuple: &Tuple<'_>, at: Lsn) -> Result<Format> {
        let Some(open) = self.next_row(at)? else {
            return Ok(Format::Fits);
        };
        // One to a handful of tables: faster than hashing the id.
        let known = self.extractors.iter_mut();
        let Some((_, extractor)) = known.into_iter().find(|(id, _)| *id == relation_id) else {
            return Err(Error::bug(format!(
                "a row of a table that was not described (OID {relation_id}) at {at}"
            )));
        };
        let Some((extractor, table)) = extractor else {
            return self.row_under_another_name(relation_id, tuple, open, at);
        };
        let origin = open.origin(*table, relation_id != ENVELOPE_OID);
        let (scanned, number) = (&mut self.scanned, extractor.number_column());
        let is_scanned = |id: &str, txid| {
            !scanned.is_empty() && {
                let number = number.map_or(RowNumber::Unknown, |column| column.read(tuple));
                let id = id.to_owned();
                scanned.remove(&(relation_id, RowKey { id, number, txid }))
            }
        };
        let taken = self.outlet.take(extractor, tuple, origin, is_scanned)?;
        if !taken.is_new {
            self.suppressed += 1;
        }
        if let (Some(streamed), Some(txid)) = (&mut self.streamed, taken.txid) {
            streamed.add(*table, txid);
        }
        Ok(Format::Fits)
    }

    /// A row of a relation that no setting names: see the module's documentation.
    #[cold]
    fn row_under_another_name(
        &mut self,
        relation_id: u32,
        tuple: &Tuple<'_>,
        open: OpenTxn,
        at: Lsn,
    ) -> Result<Format> {
        if self.foreign.contains(&relation_id) {
            self.skipped += 1;
            return Ok(Format::Fits);
        }
        let Some(relation) = self.relations.get(relation_id) else {
            return Err(Error::bug(format!(
                "a row of a table that was not described (OID {relation_id}) at {at}"
            )));
        };
        let is_foreign = self.outbox.others.binary_search(&relation_id).is_ok();
        let is_new = open.commit_lsn >= self.outbox.read_at;
        let place = self.outbox.place(relation_id);
        if let Some(place) = place.filter(|_| !is_new) {
            let extractor = Extractor::new(relation, &self.routing.columns, &self.routing.template)
                .map_err(|error| described_otherwise(relation, &error))
                .and_then(|extractor| self.refuse_renamed(relation, place).map(|()| extractor));
            info!(table = %relation, "rows of an outbox table under another name: they are published as its own");
            // Also where it cannot be read: it was not taken, and comes again.
            self.give_back_row();
            let extractor = extractor?;
            let needs_text = self.binary && extractor.needs_text().is_some();
            if needs_text {
                return Ok(Format::NeedsText);
            }
            self.extractors.retain(|(known, _)| *known != relation_id);
            self.extractors
                .push((relation_id, Some((extractor, place))));
            return self.insert(relation_id, tuple, at);
        }
        if is_new && !is_foreign && !self.former.contains(&relation_id) {
            info!(table = %relation, "rows of a table that is not known: reading the catalogue again");
            self.give_back_row();
            return Ok(Format::AskCatalog);
        }
        if self.former.contains(&relation_id) {
            return Err(Error::refused(format!(
                "table {relation} (OID {relation_id}) was an outbox table until it was renamed, and is still written to: its rows are \
                 not published any more"
            ))
            .hint(format!(
                "let the application write to the table that has the name now; add {relation} to WALPOST_OUTBOX_TABLE if its rows are \
                 events; else ALTER PUBLICATION … DROP TABLE {relation}; a restart without either skips its rows"
            )));
        }
        warn!(table = %relation, "the publication holds a table that is not in WALPOST_OUTBOX_TABLE: its rows are skipped");
        self.foreign.push(relation_id);
        self.skipped += 1;
        Ok(Format::Fits)
    }

    /// The row that was just counted is not taken: it comes again.
    fn give_back_row(&mut self) {
        if let Some(open) = &mut self.open {
            open.rows -= 1;
        }
    }
}

/// The catalogue has what an event needs, as opening has seen; the log does not.
fn described_otherwise(relation: &Relation, error: &Error) -> Error {
    let (why, hint) = error.told();
    let said = Error::refused(format!(
        "the log holds rows of table {relation} from a time in which they were sent without what an event needs"
    ))
    .caused_by(UnreadableLog(why));
    match hint {
        Some(hint) => said.hint(hint),
        None => said,
    }
}
