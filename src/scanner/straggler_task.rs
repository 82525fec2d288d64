//! The task that stores stragglers and retries them.
//!
//! Owns an SQL session ([`Store`]) and a [`Publisher`] of its own. Input: the queue of [`Straggler`]s. Output: [`Report`]s to the
//! pipe, messages to the broker.
//!
//! One task does both, on one session, one statement after the other: so what is stored and what is deleted have an order, and
//! "is an earlier event of this key still here?" has one answer. Publishing is not waited for: its receipts are events of
//! the same loop.
//!
//! # Retrying
//!
//! Heads that are due are published: the first straggler of each topic and key. A head that has its receipt is deleted, and
//! its successors follow in order, several at a time: a lane of the publisher keeps them in order, and one that fails brings
//! all behind it back. A failed attempt counts for the head alone, and its next time is set by [`Backoff`]. A broker that is
//! away is no attempt: the message waits in the publisher.
//!
//! An attempt may fail within the call that makes it (a message is too large, a row is no message). Its key is then not busy,
//! and the table does not yet say that it waits: so its later rows of the same page are left out.
//!
//! # Memory
//!
//! What is in flight, within the publisher's limits, and one page of the table, of [`PAGE_BYTES`] or one row. Before each row
//! the publisher is asked for room.
//!
//! The producers' names end in a number that no other start has, and each message has a batch of its own: neither the
//! stream's deduplication nor that of an earlier start takes a retry for something old, and one bad message fails alone. A process killed between
//! receipt and deletion publishes the message again: stragglers are at least once.
//!
//! Nothing is sent while the lease is not held ([`crate::lease`]), and the publisher is closed where Postgres stays away.
//! Nothing is stored or sent under a claim that another process has taken over ([`super::straggler_fence`]).
//! Retries are made only while the replication stream is open (the slot lets in one instance only), or while a scan runs (the
//! lock on the slot does).
//!
//! # Dead
//!
//! After `WALPOST_RETRY_MAX_ATTEMPTS` failed attempts a straggler is dead; one without a key or a topic, or that somebody has
//! edited into something that is no message, is dead at once: no attempt could be made. It stays in the table, and a copy
//! goes to `WALPOST_DEAD_LETTER_TOPIC`, tried until the broker has it.
//!
//! With `WALPOST_ON_DEAD=block` later events of its topic and key wait, also for one that was dead at once. One without a topic
//! or a key holds back nothing: nobody can say what its successors are. And one that somebody has edited holds back those of
//! the topic and key that now stand in it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::warn;

use super::progress;
use super::straggler::{Item, Report, Straggler};
use super::straggler_pages::{PAGE_BYTES, Stored};
use super::straggler_retry::Sent;
use super::straggler_store::{Failure, Key, Store};
use crate::ack::TxnNo;
use crate::config::Config;
use crate::lease::{CLOSE_BY, Lease};
use crate::pulsar::{Diversion, Doubts, Flush, Publisher, PublisherConfig};
use crate::retry::Backoff;
use crate::upkeep::News;
use crate::{Error, Result};

/// How often the table is looked at.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);
/// Of that many scans one begins to count the table again, page by page, for what commands and people have changed in it.
const RELOAD_EVERY: u32 = 3;
/// What one INSERT holds.
const BATCH_EVENTS: usize = 1000;
const BATCH_BYTES: usize = 8 * 1024 * 1024;
/// How long a broker may take to say its message limit before a scan is put off. Less than a host that is switched off takes: the attempt
/// goes on, and the next scan waits for the same one.
const BROKER_PATIENCE: Duration = Duration::from_secs(5);

/// Whether there may be more of what is due.
enum Page {
    Full,
    Last,
}

/// See the module's documentation.
pub(super) struct Task {
    pub(super) store: Store,
    pub(super) publisher: Publisher,
    /// What it was made of.
    publishing: PublisherConfig,
    lease: Lease,
    /// It may have producers.
    is_open: bool,
    pub(super) reports: mpsc::UnboundedSender<Report>,
    pub(super) reconnect: Backoff,
    pub(super) retry: (Duration, Duration),
    pub(super) max_attempts: i32,
    pub(super) order: bool,
    pub(super) dead_letter_topic: Option<String>,
    /// The tables, in the order of the settings; none where receipts tell nobody of their rows.
    pub(super) outboxes: Vec<String>,
    /// The tables, and what stands for events without one: by place, as rows are tagged.
    pub(super) all_outboxes: Vec<String>,
    /// By number; the publisher knows them as transactions.
    pub(super) sent: HashMap<i64, Sent>,
    /// How many of these are of each key, copies left out.
    pub(super) busy: HashMap<Key, usize>,
    /// Have their receipts and are still in the table.
    pub(super) done: Vec<i64>,
    pub(super) failed: Vec<Failure>,
    /// Keys of which a row has failed since the present page was read: what stands behind it waits.
    pub(super) stopped: HashSet<Key>,
    /// Topics whose last attempt failed.
    pub(super) refused: HashSet<String>,
    /// What is being stored, until it is.
    pub(super) batch: Vec<Straggler>,
    /// How much of that one INSERT holds at most.
    batch_events: usize,
    /// Who waits for the table to be read anew, behind that.
    pub(super) refresh: Vec<oneshot::Sender<()>>,
    /// Numbers messages for the publisher.
    pub(super) messages: u64,
    pub(super) scans: u32,
    /// Why no broker could be reached.
    pub(super) no_broker: News,
    /// Nothing is asked of Postgres before that.
    pause_end: Option<Instant>,
    /// By how much the numbers of keys' events differ from what was told last.
    untold: Vec<(String, String, i64)>,
}

/// The task; ends with the queue, or after it has reported a failure.
async fn run_task(
    task: &mut Task,
    mut inbox: mpsc::UnboundedReceiver<Item>,
    mut may_retry: watch::Receiver<bool>,
) {
    let lease = task.lease.clone();
    let mut scan_at = Instant::now();
    let mut tick_at = Instant::now();
    loop {
        if !task.is_pausing() {
            let settling = unless_lost(&lease, task.is_open, task.settle());
            match settling.await {
                Some(Ok(())) => {}
                Some(Err(error)) if progress::is_changed(&error) => {
                    task.refused(error);
                    continue;
                }
                Some(Err(error)) if !error.is_temporary() => {
                    let _pipe_is_gone = task.reports.send(Report::Failed(error));
                    return;
                }
                Some(Err(error)) => task.pause(&error),
                None => {
                    task.cut_short();
                    continue;
                }
            }
        }
        task.publisher.flush(Flush::All);
        let is_pausing = task.is_pausing();
        let pause_end = task.pause_end.unwrap_or(tick_at);
        let may_take = task.batch.is_empty() && task.refresh.is_empty() && !is_pausing;
        let may_scan = *may_retry.borrow() && task.store.fence.is_open() && !is_pausing;
        tokio::select! {
            biased;
            // 1. The stream waits for this.
            taken = inbox.recv(), if may_take => match taken {
                Some(item) => task.gather(item, &mut inbox),
                None => return,
            },
            // 2. Receipts.
            event = task.publisher.next_event() => task.heard(event),
            // 3. What is due.
            () = sleep_until(scan_at), if may_scan => {
                scan_at = Instant::now() + SCAN_INTERVAL;
                // It opens the publisher.
                match unless_lost(&lease, true, task.scan()).await {
                    // After what has come meanwhile, and what has failed is noted.
                    Some(Ok(Page::Full)) => scan_at = Instant::now(),
                    Some(Ok(Page::Last)) => {}
                    Some(Err(error)) if progress::is_changed(&error) => task.refused(error),
                    Some(Err(error)) => task.pause(&error),
                    None => task.cut_short(),
                }
            }
            // 4. Postgres is away, and whoever has the slot may want to retry.
            () = lost_for_good(&lease), if task.is_open => task.let_go(),
            // 5. What was refused may be allowed.
            is_told = task.store.fence.changed() => if !is_told { return },
            changed = may_retry.changed() => if changed.is_err() { return },
            () = sleep_until(pause_end), if is_pausing => {}
            () = sleep_until(tick_at) => {
                task.publisher.tick(Instant::now());
                tick_at = Instant::now() + SCAN_INTERVAL;
            }
        }
    }
}

/// See the module's documentation.
pub(super) fn run(
    config: &Config,
    (publisher, lease): (&PublisherConfig, &Lease),
    (store, all_outboxes): (Store, Vec<String>),
    inbox: mpsc::UnboundedReceiver<Item>,
    reports: mpsc::UnboundedSender<Report>,
    may_retry: watch::Receiver<bool>,
) -> impl Future<Output = ()> + Send + use<> {
    let mut task = task(config, (publisher, lease), (store, all_outboxes), reports);
    async move { run_task(&mut task, inbox, may_retry).await }
}

fn task(
    config: &Config,
    (publisher, lease): (&PublisherConfig, &Lease),
    (store, all_outboxes): (Store, Vec<String>),
    reports: mpsc::UnboundedSender<Report>,
) -> Task {
    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let producer_name = format!(
        "{}-straggler-{:x}-{:x}",
        publisher.producer_name,
        started.as_micros(),
        std::process::id()
    );
    let now = Diversion {
        grace: Duration::ZERO,
        age: Duration::ZERO,
        unclear: Diversion::UNCLEAR_AGES * config.straggler_age,
        park: false,
        quiet: true,
    };
    let outboxes = match publisher.rows {
        Some(_) => config
            .outbox_tables
            .iter()
            .map(ToString::to_string)
            .collect(),
        None => Vec::new(),
    };
    let publishing = PublisherConfig {
        producer_name,
        batch_max_messages: 1,
        diversion: Some(now),
        // The names are this process's own.
        doubts: Doubts::default(),
        ..publisher.clone()
    };
    Task {
        store,
        outboxes,
        all_outboxes,
        publisher: Publisher::under(publishing.clone(), lease),
        lease: lease.clone(),
        publishing,
        is_open: false,
        reports,
        reconnect: Backoff::new(config.reconnect_initial, config.reconnect_max),
        retry: (config.retry_initial, config.retry_max),
        max_attempts: i32::try_from(config.retry_max_attempts).unwrap_or(i32::MAX),
        order: config.keep_key_order,
        dead_letter_topic: config.dead_letter_topic.clone(),
        sent: HashMap::new(),
        busy: HashMap::new(),
        done: Vec::new(),
        failed: Vec::new(),
        stopped: HashSet::new(),
        refused: HashSet::new(),
        batch: Vec::new(),
        batch_events: BATCH_EVENTS,
        refresh: Vec::new(),
        messages: 0,
        scans: 0,
        no_broker: News::default(),
        pause_end: None,
        untold: Vec::new(),
    }
}

/// Awaits `work`; `None` when, with a publisher that may be open, the lease is lost for good before that is done.
async fn unless_lost<T>(lease: &Lease, is_open: bool, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = lost_for_good(lease), if is_open => None,
        done = work => Some(done),
    }
}

/// Waits until the lease has been lost for as long as any publisher may stay open. Cancel safe.
async fn lost_for_good(lease: &Lease) {
    loop {
        lease.lost().await;
        let close_at = lease.lost_since().map(|since| since + CLOSE_BY);
        match close_at {
            Some(at) if at <= Instant::now() => return,
            // It may be held again meanwhile.
            Some(at) => sleep_until(at).await,
            None => {}
        }
    }
}

impl Task {
    /// Closes the publisher. What has no receipt is found in the table again.
    fn let_go(&mut self) {
        let numbers: Vec<i64> = self.sent.keys().copied().collect();
        for number in numbers {
            // Of those that wait to be deleted more is to be known.
            if !self.done.contains(&number) {
                self.take_sent(number);
            }
        }
        self.publisher = Publisher::under(self.publishing.clone(), &self.lease);
        self.is_open = false;
    }

    /// The same in the middle of a conversation with Postgres: as if that had failed.
    fn cut_short(&mut self) {
        self.store.disconnect();
        self.let_go();
    }

    fn is_pausing(&self) -> bool {
        self.pause_end.is_some_and(|end| Instant::now() < end)
    }

    fn report(&self, report: Report) {
        let _pipe_is_gone = self.reports.send(report);
    }

    fn parked(&self, changes: Vec<(String, String, i64)>) {
        if !changes.is_empty() {
            self.report(Report::Parked(changes));
        }
    }

    /// Takes what is waiting, as much as one INSERT holds.
    fn gather(&mut self, first: Item, inbox: &mut mpsc::UnboundedReceiver<Item>) {
        let (mut next, mut bytes) = (Some(first), 0);
        while let Some(item) = next {
            match item {
                Item::Store(straggler) => {
                    bytes += straggler.bytes;
                    self.batch.push(*straggler);
                }
                Item::Refresh(done) => {
                    self.refresh.push(done);
                    return;
                }
            }
            if self.batch.len() >= BATCH_EVENTS || bytes >= BATCH_BYTES {
                return;
            }
            next = inbox.try_recv().ok();
        }
    }

    /// Writes to the table all that is waiting for that.
    async fn settle(&mut self) -> Result<()> {
        while let Some(event) = self.publisher.try_next_event() {
            self.heard(event);
        }
        if !self.store.is_connected() {
            let waiting = self.batch.len() + self.done.len() + self.failed.len();
            if waiting + self.refresh.len() == 0 {
                return Ok(());
            }
            self.connect().await?;
        }
        self.store_batch().await?;
        if !self.refresh.is_empty() {
            self.reload().await?;
            for done in self.refresh.drain(..) {
                let _nobody_waits = done.send(());
            }
        }
        self.note_failures().await?;
        self.delete_done().await
    }

    async fn connect(&mut self) -> Result<()> {
        if !self.store.connect().await? {
            return Err(
                Error::refused("there is no table walpost.straggler any more")
                    .hint("run walpost init"),
            );
        }
        self.reload().await?;
        self.reconnect.reset();
        Ok(())
    }

    async fn reload(&mut self) -> Result<()> {
        let counted = self.store.reload().await?;
        self.tell_counted(counted).await
    }

    async fn tell_counted(
        &mut self,
        (changes, rows): (Vec<(String, String, i64)>, u64),
    ) -> Result<()> {
        // Counted once: what is not told now is told the next time.
        self.untold.extend(changes);
        // Told first: a key is let go only by somebody who knows what is not to come of it.
        if let Some(discarded) = self.store.discarded(&self.all_outboxes).await? {
            self.report(Report::Discarded(discarded));
        }
        let changes = std::mem::take(&mut self.untold);
        self.parked(changes);
        self.report(Report::Rows(rows));
        Ok(())
    }

    /// The session is of no use any more; the next one is made after a pause, in which receipts are taken.
    fn pause(&mut self, error: &Error) {
        self.store.disconnect();
        let delay = self.reconnect.next_delay();
        warn!(
            retry_in_ms = delay.as_millis(),
            "stragglers wait: {}",
            error.report()
        );
        self.pause_end = Some(Instant::now() + delay);
    }

    /// Another process has the slot: nothing is attempted until the right is set again, which the report brings about.
    fn refused(&mut self, error: Error) {
        if self.store.fence.refuse() {
            warn!(
                waiting = self.batch.len(),
                "no straggler is stored or retried: {}",
                error.report()
            );
            self.report(Report::Failed(error));
        }
    }

    async fn store_batch(&mut self) -> Result<()> {
        while !self.batch.is_empty() && self.store.fence.is_open() {
            self.store_part().await?;
        }
        Ok(())
    }

    async fn store_part(&mut self) -> Result<()> {
        // Half as many after a failure: a server that takes too long for all of them gets them in smaller parts.
        let count = self.batch.len().min(self.batch_events);
        self.batch_events = (count / 2).max(1);
        let changes = self.store.insert(&self.batch[..count]).await?;
        self.batch_events = count.saturating_mul(2).min(BATCH_EVENTS);
        let batch: Vec<Straggler> = self.batch.drain(..count).collect();
        let mut acked: Vec<(TxnNo, u64)> = Vec::new();
        for straggler in &batch {
            match acked.last_mut().filter(|(txn, _)| *txn == straggler.txn) {
                Some((_, count)) => *count += 1,
                None => acked.push((straggler.txn, 1)),
            }
        }
        let diverted = batch.iter().filter(|straggler| straggler.diverted).count();
        self.parked(changes);
        // Rows first: at no moment do the two together look smaller than they are.
        self.report(Report::Rows(self.store.rows()));
        self.report(Report::Stored {
            acked,
            diverted: diverted as u64,
            messages: batch.len(),
            bytes: batch.iter().map(|straggler| straggler.bytes).sum(),
        });
        Ok(())
    }

    async fn note_failures(&mut self) -> Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        let changes = self.store.fail(&self.failed).await?;
        self.failed.clear();
        self.parked(changes);
        Ok(())
    }

    async fn delete_done(&mut self) -> Result<()> {
        if self.done.is_empty() {
            return Ok(());
        }
        let of = |number: &i64| self.sent.get(number);
        let (copies, done): (Vec<i64>, Vec<i64>) = self
            .done
            .iter()
            .partition(|number| of(number).is_some_and(|sent| sent.is_copy));
        if !copies.is_empty() {
            self.store.copied(&copies).await?;
        }
        let changes = self.store.delete(&done).await?;
        self.parked(changes);
        self.report(Report::Rows(self.store.rows()));
        let mut keys: HashSet<Key> = HashSet::new();
        for number in std::mem::take(&mut self.done) {
            keys.extend(self.take_sent(number).and_then(|sent| sent.key));
        }
        // All are told before the first that may fail.
        let mut healed = HashSet::new();
        for (topic, _) in &keys {
            self.report(Report::Healed(topic.clone()));
            healed.extend(self.refused.take(topic));
        }
        for topic in healed {
            self.store.hurry(&topic).await?;
        }
        self.follow(keys).await
    }

    /// Publishes what stands behind heads that have just gone.
    async fn follow(&mut self, mut keys: HashSet<Key>) -> Result<()> {
        if !self.order {
            return Ok(());
        }
        keys.retain(|key| !self.busy.contains_key(key));
        if keys.is_empty() || !self.publisher.has_room() || !self.store.fence.is_open() {
            // Without a head they are found by the next reload.
            return Ok(());
        }
        let keys: Vec<Key> = keys.into_iter().collect();
        self.stopped.clear();
        let next = self.store.next_of(&keys).await?;
        self.store.check_claim().await?;
        for row in next {
            if !self.publisher.has_room() {
                break;
            }
            if !self.is_stopped(&row) {
                self.publish(&row);
            }
        }
        Ok(())
    }

    /// True when an earlier row of its key has just failed.
    fn is_stopped(&self, row: &Stored) -> bool {
        let key = row.topic.clone().zip(row.key.clone());
        self.order && key.is_some_and(|key| self.stopped.contains(&key))
    }

    /// Publishes a page of the heads that are due.
    async fn scan(&mut self) -> Result<Page> {
        if !self.store.is_connected() {
            self.connect().await?;
        }
        self.scans = self.scans.wrapping_add(1);
        if (self.store.is_walking() || self.scans.is_multiple_of(RELOAD_EVERY))
            && let Some(counted) = self.store.walk_on().await?
        {
            self.tell_counted(counted).await?;
        }
        if self.store.rows() == 0 || !self.publisher.has_room() {
            return Ok(Page::Last);
        }
        self.stopped.clear();
        let due = self.due().await?;
        if due.is_empty() {
            return Ok(Page::Last);
        }
        self.is_open = true;
        // Learns the message limit, which may have been raised.
        let why = match timeout(BROKER_PATIENCE, self.publisher.connect()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.report()),
            Err(_) => Some("it took too long".to_owned()),
        };
        if let Some(why) = why {
            if self.no_broker.is_new(&why) {
                warn!("no straggler is retried while no broker answers: {why}");
            }
            return Ok(Page::Last);
        }
        self.no_broker.over();
        // Behind the wait: what another instance has published meanwhile is not sent again.
        self.store.check_claim().await?;
        let bytes: usize = due.iter().map(Stored::bytes).sum();
        let before = self.messages;
        for row in due {
            if !self.publisher.has_room() {
                return Ok(Page::Last);
            }
            let key = row.topic.clone().zip(row.key.clone());
            let waits = key.is_some_and(|key| self.busy.contains_key(&key));
            if row.is_dead || !self.order || !(waits || self.is_stopped(&row)) {
                self.publish(&row);
            }
        }
        // There is more where bytes have ended the page. (Nothing of it was sent: nor would it be of the next.)
        if bytes < PAGE_BYTES || self.messages == before {
            Ok(Page::Last)
        } else {
            Ok(Page::Full)
        }
    }

    /// The next page of what is due and not under way.
    async fn due(&mut self) -> Result<Vec<Stored>> {
        let failed = self.failed.iter().map(|failure| failure.number);
        let busy: Vec<i64> = self.sent.keys().copied().chain(failed).collect();
        let copies = self.dead_letter_topic.is_some();
        self.store.due(&busy, copies).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::connector::publisher_config;
    use crate::scanner::cluster::Log;
    use crate::scanner::straggler_fence::Right;

    #[tokio::test]
    async fn its_publisher_is_closed_in_time_while_postgres_is_away_and_something_is_to_be_noted() {
        // GIVEN a task whose publisher is open, with a failure to be noted in a table that cannot be reached
        let env = |name: &str| {
            let url = "postgres://nobody@127.0.0.1:1/nothing".to_owned();
            (name == "WALPOST_POSTGRES_URL").then_some(url)
        };
        let config = Config::load(&|_| None, &env).unwrap();
        let log = Log {
            system_id: "1".to_owned(),
            timeline: 1,
        };
        let publisher = publisher_config(&config, &Arc::default(), &log.system_id, 1, 0);
        let left = Duration::from_millis(500);
        let since = (Instant::now() + left).checked_sub(CLOSE_BY).unwrap();
        let lease = Lease::lost_at(since);
        let (_right, told) = watch::channel(Right::Unclaimed);
        let (_queue, inbox) = mpsc::unbounded_channel();
        let (reports, _reports) = mpsc::unbounded_channel();
        let (_may_retry, retrying) = watch::channel(false);
        let store = (Store::new(&config, log, told), Vec::new());
        let mut task = task(&config, (&publisher, &lease), store, reports);
        task.is_open = true;
        task.failed.push(Failure {
            number: 1,
            reason: "refused".to_owned(),
            attempts: 1,
            next_in: Duration::ZERO,
            dead: false,
        });

        // WHEN the time is over in which any publisher may stay open
        let running = run_task(&mut task, inbox, retrying);
        assert!(timeout(4 * left, running).await.is_err(), "it goes on");

        // THEN it is closed, and the failure still waits
        assert!(!task.is_open);
        assert_eq!(task.failed.len(), 1);
    }
}
