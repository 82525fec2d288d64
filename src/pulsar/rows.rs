//! Ids of published rows, on their way from the receipts to whoever marks or deletes them.
//!
//! A row is known by its table, its id, its number ([`RowNumber`]) and its `txid` ([`RowKey`]). A batch collects the ids of its rows as [`Rows`] (only where an event names its row, see `Outgoing::row`); its receipt
//! moves them into the queue made by [`queue`]. Nothing is parsed or copied on the way.
//!
//! # Bound
//!
//! A receipt must never wait, and no id may be lost: so the queue takes everything, and while it is over [`MAX_ROWS`] or
//! [`MAX_BYTES`] the publisher has no room for new events. What can still come in are the receipts of what is in flight,
//! which is bounded itself.
//!
//! Rows of a transaction that nobody can see yet are set aside, and take no room ([`RowReceiver::set_aside`]): a commit that waits for walpost's
//! own confirmation (`synchronous_standby_names`) would otherwise wait for ever. Whoever sets them aside bounds them.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, mpsc, oneshot};

use crate::meter::Meter;
use crate::outbox::RowNumber;

/// Rows that may wait. A statement takes a thousand; a hundred of them make up for a second of a slow database.
const MAX_ROWS: usize = 100_000;
/// Bytes of their ids: a UUID has 36.
const MAX_BYTES: usize = 16 * 1024 * 1024;

/// The row that an event was made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Its table's place in `WALPOST_OUTBOX_TABLE`.
    pub table: u32,
    /// The transaction that inserted it, without the epoch; 0 when the row was read by SQL.
    pub xid: u32,
    /// Its id, as Postgres prints it.
    pub id: &'a str,
    /// Which of the rows with this id.
    pub number: RowNumber,
    /// Its `txid`, where it has one.
    pub txid: Option<u64>,
}

impl Row<'_> {
    /// Which row of its table it is.
    pub fn key(&self) -> RowKey {
        RowKey {
            id: self.id.to_owned(),
            number: self.number,
            txid: self.txid,
        }
    }
}

/// Which row of a table: an id may have several rows, and a number may be given again (TRUNCATE … RESTART IDENTITY), but not in the same
/// transaction's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// See [`Row::id`].
    pub id: String,
    /// See [`Row::number`].
    pub number: RowNumber,
    /// See [`Row::txid`].
    pub txid: Option<u64>,
}

impl RowKey {
    /// The row of the table in this place.
    pub fn row(&self, table: u32) -> Row<'_> {
        Row {
            table,
            xid: 0,
            id: &self.id,
            number: self.number,
            txid: self.txid,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    table: u32,
    xid: u32,
    number: RowNumber,
    /// 0, which no transaction has: none.
    txid: u64,
    /// Where its id ends in the text.
    end: usize,
}

/// No row: the message was made of something else.
const NONE: u32 = u32::MAX;

/// Ids of rows, in one piece of memory.
#[derive(Debug, Default)]
pub struct Rows {
    text: String,
    places: Vec<Place>,
}

impl Rows {
    /// Adds a row.
    pub fn push(&mut self, row: Row<'_>) {
        self.text.push_str(row.id);
        self.places.push(Place {
            table: row.table,
            xid: row.xid,
            number: row.number,
            txid: row.txid.unwrap_or(0),
            end: self.text.len(),
        });
    }

    /// The row of a batch's message number `index`; those before it without a row get an empty place.
    pub(super) fn push_at(&mut self, index: usize, row: Row<'_>) {
        let end = self.text.len();
        let nothing = Place {
            table: NONE,
            xid: 0,
            number: RowNumber::Unknown,
            txid: 0,
            end,
        };
        self.places.resize(index, nothing);
        self.push(row);
    }

    /// The row of a batch's message number `index`.
    pub(super) fn get(&self, index: usize) -> Option<Row<'_>> {
        let place = self.places.get(index).filter(|place| place.table != NONE)?;
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.places[before].end);
        Some(Row {
            table: place.table,
            xid: place.xid,
            number: place.number,
            txid: (place.txid != 0).then_some(place.txid),
            id: &self.text[start..place.end],
        })
    }

    /// Every row.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.places.len()).filter_map(|index| self.get(index))
    }

    /// How many there are, at most.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// What they have allocated.
    pub(super) fn memory(&self) -> usize {
        size_of::<Self>() + self.text.capacity() + self.places.capacity() * size_of::<Place>()
    }

    /// Bytes of their ids.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }
}

/// What comes through the queue.
#[derive(Debug)]
pub enum Published {
    /// Rows whose receipt has come.
    Rows(Rows),
    /// To be answered when everything before it is done.
    Barrier(oneshot::Sender<()>),
    /// Which rows of a table (by its place) have their receipt and could not be marked or deleted.
    Left(u32, oneshot::Sender<LeftOfTable>),
}

/// Rows of one table that have their receipt and could not be marked or deleted.
#[derive(Clone, Debug, Default)]
pub struct LeftOfTable {
    /// There are more than are known by name.
    pub is_full: bool,
    /// Those that are.
    pub rows: HashSet<RowKey>,
}

#[derive(Debug)]
struct Gauge {
    rows: AtomicUsize,
    bytes: AtomicUsize,
    /// Rows that wait as well, and take no room.
    aside: AtomicUsize,
    room: Notify,
    meter: Arc<Meter>,
}

impl Gauge {
    fn has_room(&self) -> bool {
        self.rows.load(Ordering::Relaxed) < MAX_ROWS
            && self.bytes.load(Ordering::Relaxed) < MAX_BYTES
    }

    fn waiting(&self) -> usize {
        self.rows.load(Ordering::Relaxed) + self.aside.load(Ordering::Relaxed)
    }

    fn metering(&self) {
        let upkeep = self.meter.upkeep();
        upkeep.set_waiting(self.waiting(), !self.has_room());
    }

    /// These take no room any more.
    fn make_room(&self, rows: usize, bytes: usize) {
        self.rows.fetch_sub(rows, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.metering();
        self.room.notify_waiters();
    }
}

/// The end where receipts go in.
#[derive(Clone, Debug)]
pub struct RowQueue {
    sender: mpsc::UnboundedSender<Published>,
    gauge: Arc<Gauge>,
}

/// The other end. Rows count until [`RowReceiver::done`].
#[derive(Debug)]
pub struct RowReceiver {
    receiver: mpsc::UnboundedReceiver<Published>,
    gauge: Arc<Gauge>,
}

/// Makes a queue that tells the meter how many wait.
pub fn queue(meter: Arc<Meter>) -> (RowQueue, RowReceiver) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let gauge = Arc::new(Gauge {
        rows: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        aside: AtomicUsize::new(0),
        room: Notify::new(),
        meter,
    });
    let queue = RowQueue {
        sender,
        gauge: gauge.clone(),
    };
    (queue, RowReceiver { receiver, gauge })
}

impl RowQueue {
    /// Hands on rows whose receipt has come; never waits.
    pub fn push(&self, rows: Rows) {
        self.gauge.rows.fetch_add(rows.len(), Ordering::Relaxed);
        self.gauge.bytes.fetch_add(rows.bytes(), Ordering::Relaxed);
        self.gauge.metering();
        // The other end is gone only while the process ends.
        let _ended = self.sender.send(Published::Rows(rows));
    }

    /// False while so many wait that nothing more should be published.
    pub fn has_room(&self) -> bool {
        self.gauge.has_room()
    }

    /// Waits until there is room. Cancel safe.
    pub async fn room(&self) {
        loop {
            let notified = self.gauge.room.notified();
            if self.has_room() {
                return;
            }
            notified.await;
        }
    }

    /// How many wait, those that are set aside included.
    pub fn waiting(&self) -> usize {
        self.gauge.waiting()
    }

    /// Waits until everything pushed before is done; false when the other end is gone.
    pub async fn barrier(&self) -> bool {
        let (done, wait) = oneshot::channel();
        self.sender.send(Published::Barrier(done)).is_ok() && wait.await.is_ok()
    }

    /// Which rows of the table in this place have their receipt and could not be marked or deleted; `None` when the other end is gone.
    pub async fn left(&self, table: u32) -> Option<LeftOfTable> {
        let (answer, wait) = oneshot::channel();
        self.sender.send(Published::Left(table, answer)).ok()?;
        wait.await.ok()
    }
}

impl RowReceiver {
    /// The next rows or barrier; `None` when the other end is gone. Cancel safe.
    pub async fn recv(&mut self) -> Option<Published> {
        self.receiver.recv().await
    }

    /// The same without waiting.
    pub fn try_recv(&mut self) -> Option<Published> {
        self.receiver.try_recv().ok()
    }

    /// These are done: they make room.
    pub fn done(&self, rows: usize, bytes: usize) {
        self.gauge.meter.upkeep().add_done(rows);
        self.gauge.make_room(rows, bytes);
    }

    /// Sets rows aside: they still wait, but no longer count against the bound.
    pub fn set_aside(&self, rows: usize, bytes: usize) {
        self.gauge.aside.fetch_add(rows, Ordering::Relaxed);
        self.gauge.make_room(rows, bytes);
    }

    /// These were set aside, and take room again.
    pub fn take_back(&self, rows: usize, bytes: usize) {
        self.gauge.rows.fetch_add(rows, Ordering::Relaxed);
        self.gauge.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.gauge.aside.fetch_sub(rows, Ordering::Relaxed);
        self.gauge.metering();
    }

    /// These are forgotten: they make room.
    pub fn dropped(&self, rows: usize, bytes: usize) {
        self.gauge.make_room(rows, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str) -> Row<'_> {
        Row {
            table: 1,
            xid: 7,
            number: RowNumber::Seq(3),
            txid: Some(5),
            id,
        }
    }

    #[test]
    fn rows_keep_their_places_beside_messages_without_one() {
        let mut rows = Rows::default();
        rows.push_at(2, row("a"));
        rows.push_at(3, row(""));
        rows.push_at(5, row("bc"));
        let ids: Vec<_> = rows.iter().map(|row| row.id).collect();
        assert_eq!(ids, ["a", "", "bc"]);
        assert_eq!(rows.get(5), Some(row("bc")));
        for none in [0, 1, 4, 6] {
            assert_eq!(rows.get(none), None);
        }
        assert_eq!(rows.bytes(), 3);
    }

    #[tokio::test]
    async fn a_full_queue_takes_what_comes_and_has_room_again_when_it_is_done() {
        let (queue, mut receiver) = queue(Arc::default());
        let mut many = Rows::default();
        for _ in 0..MAX_ROWS {
            many.push(row("x"));
        }
        queue.push(many);
        assert!(!queue.has_room());
        let mut more = Rows::default();
        more.push(row("y"));
        queue.push(more);
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.room().await }
        });
        for _ in 0..2 {
            let Some(Published::Rows(rows)) = receiver.recv().await else {
                panic!("rows were pushed");
            };
            receiver.done(rows.len(), rows.bytes());
        }
        waiting.await.unwrap();
        assert!(queue.has_room() && queue.waiting() == 0);
    }

    #[tokio::test]
    async fn rows_that_are_set_aside_wait_and_take_no_room() {
        let (queue, mut receiver) = queue(Arc::default());
        let mut many = Rows::default();
        for _ in 0..MAX_ROWS {
            many.push(row("x"));
        }
        queue.push(many);
        let Some(Published::Rows(rows)) = receiver.recv().await else {
            panic!("rows were pushed");
        };
        let (count, bytes) = (rows.len(), rows.bytes());
        receiver.set_aside(count, bytes);
        assert!(queue.has_room() && queue.waiting() == MAX_ROWS);
        receiver.take_back(count, bytes);
        assert!(!queue.has_room() && queue.waiting() == MAX_ROWS);
        receiver.done(count, bytes);
        assert!(queue.has_room() && queue.waiting() == 0);
    }
}
