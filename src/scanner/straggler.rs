//! Stragglers: events that cannot be published, on their way into `walpost.straggler`, and what is known of those in it.
//!
//! Owns the queue to the task that stores and retries them ([`super::straggler_task`]) and the count of what is in it. Input:
//! events that the publisher has diverted, and rows that cannot be events. Output: [`Report`]s, which the pipe books.
//!
//! # Why the confirmed LSN never passes a straggler that is not stored
//!
//! To the [`AckTracker`](crate::ack::AckTracker) a straggler is an event like any other: it was tracked when its row came. It
//! is acknowledged in one place only, where the pipe books [`Report::Stored`], and the task sends that after the COMMIT of
//! the transaction that has inserted the row (or has found it there, from an earlier time). A process that dies in between
//! has confirmed nothing of it, and Postgres sends the transaction again; what was stored is then found by its
//! (slot, commit LSN, ordinal; one that was read from the table: its `seq` and `txid`) and not stored twice. What somebody has discarded meanwhile is known too: see [`super::discarded`].
//!
//! # Order
//!
//! The publisher diverts a key's events in order; the queue, the table's numbers and the retries keep it. From the first
//! diverted event on until the last has its receipt the key is parked (see `pulsar::producer::diversion`). That count is kept in the publisher:
//! one up for each event diverted, and by [`Report::Parked`] up and down with the rows of the table.
//!
//! With `WALPOST_ON_DEAD=block` a row that can be no event holds back what comes behind it in its topic and key, if these can be
//! read in it: its key is parked when it comes, not only when it is stored. What came before it and is on its way goes on. But
//! what of that waits for its topic to be found, or is refused later, is stored later too: it then stands behind that row, and
//! behind what came after it meanwhile. That order is not the log's; with `WALPOST_ON_DEAD=skip` it is.
//!
//! # Bound
//!
//! The queue counts in messages and bytes with the same limits as what is in flight. (A lane that is diverted may exceed them
//! by what it held, which was within them.) At `WALPOST_STRAGGLER_LIMIT` rows, stored and queued together, there is no room
//! either: the connector then stops reading, and goes on when rows have gone.

use std::fmt;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::warn;

use super::cluster::Log;
use super::discarded::Discarded;
use super::straggler_fence::Right;
use super::straggler_store::Store;
use super::straggler_task;
use crate::ack::TxnNo;
use crate::config::Config;
use crate::lease::Lease;
use crate::outbox::{ENVELOPE_TABLE, RowNumber, Salvaged};
use crate::pulsar::{Diverted, Parked, PublisherConfig, RowTag};
use crate::{Error, Lsn, Result};

/// An event to be stored.
#[derive(Clone)]
pub(crate) struct Straggler {
    pub(crate) outbox: String,
    pub(crate) id: Option<String>,
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) payload: Option<Vec<u8>>,
    pub(crate) properties: Vec<(String, String)>,
    pub(crate) event_time_ms: u64,
    pub(crate) deliver_at_ms: Option<i64>,
    pub(crate) commit_lsn: Lsn,
    pub(crate) ordinal: u64,
    /// Which of the table's rows with its id it is.
    pub(crate) number: RowNumber,
    /// Its `txid`, where that is known.
    pub(crate) txid: Option<u64>,
    /// The transaction that brought it, without the epoch, where the log has told it: nearly always the row's `txid`.
    pub(crate) xid: Option<u32>,
    pub(crate) reason: String,
    /// Nothing can be attempted with it as it is.
    pub(crate) hopeless: bool,
    /// The publisher has diverted it.
    pub(crate) diverted: bool,
    /// The publisher counts it among those that hold back later ones of their key.
    pub(crate) parks: bool,
    pub(crate) txn: TxnNo,
    pub(crate) bytes: usize,
}

impl fmt::Debug for Straggler {
    /// Without what belongs to the application.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Straggler")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("commit_lsn", &self.commit_lsn)
            .finish_non_exhaustive()
    }
}

/// What the task is asked for.
#[derive(Debug)]
pub(crate) enum Item {
    /// Store this.
    Store(Box<Straggler>),
    /// Read the table anew, report, and say when that is done.
    Refresh(oneshot::Sender<()>),
}

/// What the task has done.
#[derive(Debug)]
pub enum Report {
    /// Committed. The first of those that were diverted, in order.
    Stored {
        /// Whose events, and how many.
        acked: Vec<(TxnNo, u64)>,
        /// How many of them were diverted by the publisher.
        diverted: u64,
        /// How many they are.
        messages: usize,
        /// And their bytes.
        bytes: usize,
    },
    /// Topic, key, and by how much the number of its events in the table differs from what was known.
    Parked(Vec<(String, String, i64)>),
    /// What was discarded by now: it is not to be published any more. Comes before the [`Report::Parked`] that lets its key go.
    Discarded(Discarded),
    /// This many rows are in the table.
    Rows(u64),
    /// A message was published to a topic that had been refused.
    Healed(String),
    /// The table cannot be used any more, and time will not mend that; or, temporary, another process has the slot: nothing is stored until the
    /// right is set again.
    Failed(Error),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Stragglers {
    queue: mpsc::UnboundedSender<Item>,
    reports: mpsc::UnboundedReceiver<Report>,
    may_retry: watch::Sender<bool>,
    right: watch::Sender<Right>,
    /// While no publisher keeps it.
    parked: Parked,
    discarded: Discarded,
    task: JoinHandle<()>,
    /// The tables, in the order of the settings, and behind them what stands for events without one.
    outboxes: Vec<String>,
    messages: usize,
    bytes: usize,
    max_messages: usize,
    max_bytes: usize,
    rows: u64,
    limit: u64,
    /// A dead one holds back later ones of its key.
    dead_block: bool,
    told_full: bool,
}

impl Stragglers {
    /// Starts the task, if there is a table for it, and reads what must be parked. `None`: the table is missing, which is logged. Call it
    /// after the claim: a process that had the slot before has stored its stragglers by then, or its transaction fails.
    ///
    /// # Errors
    /// Refused where there is a table that walpost may not use.
    pub async fn start(
        config: &Config,
        publisher: (&PublisherConfig, &Lease),
        log: Log,
        right: Right,
    ) -> Result<Option<Self>> {
        let (right, told) = watch::channel(right);
        let mut store = Store::new(config, log, told);
        if !store.connect().await? {
            warn!(
                "there is no table walpost.straggler: an event that cannot be published stops walpost, and the events of a refused topic wait \
                 (hint: run walpost init)"
            );
            return Ok(None);
        }
        let outboxes: Vec<String> = config
            .outbox_tables
            .iter()
            .map(ToString::to_string)
            .chain([ENVELOPE_TABLE.to_owned()])
            .collect();
        let (known, rows) = store.reload().await?;
        let known_discarded = store.discarded(&outboxes).await?;
        let (queue, inbox) = mpsc::unbounded_channel();
        let (outbox, reports) = mpsc::unbounded_channel();
        let (may_retry, retrying) = watch::channel(false);
        let store = (store, outboxes.clone());
        let work = straggler_task::run(config, publisher, store, inbox, outbox, retrying);
        let mut stragglers = Self {
            queue,
            reports,
            may_retry,
            right,
            parked: Parked::default(),
            discarded: known_discarded.unwrap_or_default(),
            task: tokio::spawn(work),
            outboxes,
            messages: 0,
            bytes: 0,
            max_messages: config.max_in_flight_messages,
            max_bytes: usize::try_from(config.max_in_flight_bytes).unwrap_or(usize::MAX),
            rows: 0,
            limit: u64::try_from(config.straggler_limit).unwrap_or(u64::MAX),
            dead_block: config.keep_key_order && config.dead_block,
            told_full: false,
        };
        for known in [Report::Parked(known), Report::Rows(rows)] {
            stragglers.idle(known)?;
        }
        Ok(Some(stragglers))
    }

    /// The slot is ours (the stream is open, or the lock is held and a scan runs), or is not: only then are stragglers
    /// retried, so that of several instances one does.
    pub fn retry(&self, may_retry: bool) {
        self.may_retry.send_replace(may_retry);
    }

    /// Sets the [`Right`] to store and retry. Its owner suspends it before it claims the slot again, and sets it once it knows that no other process had
    /// the slot in between.
    pub fn set_right(&self, right: Right) {
        self.right.send_replace(right);
    }

    /// Books a report while there is no publisher.
    ///
    /// # Errors
    /// As [`Report::Failed`].
    pub fn idle(&mut self, report: Report) -> Result<()> {
        self.book(&report);
        match report {
            Report::Discarded(discarded) => self.set_discarded(discarded),
            Report::Parked(changes) => {
                for (topic, key, count) in changes {
                    self.parked.change(&topic, &key, count);
                }
            }
            Report::Failed(error) => return Err(error),
            Report::Stored { .. } | Report::Rows(_) | Report::Healed(_) => {}
        }
        Ok(())
    }

    /// Whether somebody has discarded this row (with its `txid`), which comes again; read from the table, its LSN is `0/0`.
    pub fn is_discarded(
        &self,
        row: (RowTag, Option<u64>),
        commit_lsn: Lsn,
        id: Option<&str>,
    ) -> bool {
        !self.discarded.is_empty() && self.discarded.contains(row, commit_lsn, id)
    }

    /// To be told of [`Report::Discarded`].
    pub fn set_discarded(&mut self, discarded: Discarded) {
        self.discarded = discarded;
    }

    /// What is parked, for a publisher to keep.
    pub fn take_parked(&mut self) -> Parked {
        std::mem::take(&mut self.parked)
    }

    /// The same, back from a publisher.
    pub fn set_parked(&mut self, parked: Parked) {
        self.parked = parked;
    }

    /// Completes when everything taken so far is stored and the table has been read anew, and the reports of that are waiting.
    /// To be awaited between getting the slot and the first event: while another instance had it, that one has stored.
    pub fn refresh(&self) -> impl Future<Output = ()> + use<> {
        let (done, refreshed) = oneshot::channel();
        let _ended = self.queue.send(Item::Refresh(done));
        async move {
            // An error is the task's end, which is reported.
            let _ended = refreshed.await;
        }
    }

    /// Takes an event that the publisher has diverted, of the transaction `xid` of the log.
    pub fn divert(&mut self, diverted: Diverted, xid: Option<u32>) {
        let Diverted {
            topic,
            reason,
            event,
        } = diverted;
        let number = number_of(event.number(), event.commit_lsn, event.row);
        let txid = event.txid();
        let mut properties = event.properties.iter();
        let id = properties.find(|(name, _)| name == "id");
        self.push(Straggler {
            outbox: self.outbox(event.row),
            id: id.map(|(_, id)| id.clone()),
            topic: Some(topic),
            key: Some(event.key),
            payload: event.payload,
            properties: event.properties,
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            commit_lsn: event.commit_lsn,
            ordinal: event.row.ordinal(),
            number,
            txid,
            xid,
            reason,
            hopeless: false,
            diverted: true,
            parks: true,
            txn: event.txn,
            bytes: event.bytes,
        });
    }

    /// Takes a row that cannot be an event as it is. Returns the topic and key that it holds back from now on, for the
    /// publisher to park.
    pub fn unusable(
        &mut self,
        row: Salvaged,
        (txn, commit_lsn, tag, (number, txid)): (TxnNo, Lsn, RowTag, (RowNumber, Option<u64>)),
        reason: String,
    ) -> Option<(String, String)> {
        let holds_back = row.topic.clone().zip(row.key.clone());
        let holds_back = holds_back.filter(|_| self.dead_block);
        let text: usize = row.properties.iter().map(|(n, v)| n.len() + v.len()).sum();
        let bytes = size_of::<Straggler>() + text + row.payload.as_ref().map_or(0, Vec::len);
        self.push(Straggler {
            outbox: self.outbox(tag),
            id: row.id,
            topic: row.topic,
            key: row.key,
            payload: row.payload,
            properties: row.properties,
            event_time_ms: row.event_time_ms,
            deliver_at_ms: row.deliver_at_ms,
            commit_lsn,
            ordinal: tag.ordinal(),
            number: number_of(number, commit_lsn, tag),
            txid,
            // The row was read: its own txid is known.
            xid: None,
            reason,
            hopeless: true,
            diverted: false,
            parks: holds_back.is_some(),
            txn,
            bytes,
        });
        holds_back
    }

    fn outbox(&self, row: RowTag) -> String {
        let outbox = usize::try_from(row.table()).ok();
        let outbox = outbox.and_then(|outbox| self.outboxes.get(outbox));
        outbox.cloned().unwrap_or_default()
    }

    fn push(&mut self, straggler: Straggler) {
        self.messages += 1;
        self.bytes += straggler.bytes;
        // The task ends only with us, or after it has reported a failure that ends us.
        let _ended = self.queue.send(Item::Store(Box::new(straggler)));
    }

    /// True while another event may be taken.
    pub fn has_room(&self) -> bool {
        self.messages < self.max_messages && self.bytes < self.max_bytes && !self.is_full()
    }

    fn is_full(&self) -> bool {
        self.rows + self.messages as u64 >= self.limit
    }

    /// Events that are not stored yet.
    pub fn waiting(&self) -> usize {
        self.messages
    }

    /// Waits for the next report. Cancel safe.
    pub async fn next_report(&mut self) -> Report {
        let ended = || Report::Failed(Error::bug("the stragglers' task has ended"));
        self.reports.recv().await.unwrap_or_else(ended)
    }

    /// The next report, if one is waiting.
    pub fn try_next_report(&mut self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Books what concerns the queue and the table's size.
    pub fn book(&mut self, report: &Report) {
        match report {
            Report::Stored {
                messages, bytes, ..
            } => {
                self.messages -= messages;
                self.bytes -= bytes;
            }
            Report::Rows(rows) => {
                self.rows = *rows;
                let is_full = self.is_full();
                if is_full && !self.told_full {
                    warn!(
                        rows,
                        limit = self.limit,
                        "WALPOST_STRAGGLER_LIMIT is reached: intake pauses until stragglers have gone \
                         (hint: mend what walpost stragglers list names, or discard what is not needed)"
                    );
                }
                self.told_full = is_full;
            }
            Report::Parked(_) | Report::Discarded(_) | Report::Healed(_) | Report::Failed(_) => {}
        }
    }
}

/// The number of a row: as it was read, or where nobody read it the `seq` by which a scan knows it.
fn number_of(read: RowNumber, commit_lsn: Lsn, row: RowTag) -> RowNumber {
    match read {
        RowNumber::Unknown if commit_lsn == Lsn::ZERO => {
            i64::try_from(row.ordinal()).map_or(RowNumber::Unknown, RowNumber::Seq)
        }
        known => known,
    }
}

impl Drop for Stragglers {
    fn drop(&mut self) {
        self.task.abort();
    }
}
