//! Starts what works on the outbox tables beside the stream, or beside poll mode's looks, and stops it.
//!
//! Owns the tasks of [`super::after_publish`], [`super::unmarked`], [`super::retention`] and [`super::partitions`]. Input: settings, and which cluster
//! it is. Output: the queue that receipts put their rows into. In the mode `keep`, without retention and partitions, there is nothing here.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tracing::{info, warn};

use super::after_publish::AfterPublishTask;
use super::cluster::Log;
use super::left_note::{self, LeftNote};
use super::outbox::OutboxTable;
use super::partitions;
use super::retention::Retention;
use super::straggler_fence::Right;
use super::unmarked::{Unmarked, Way};
use crate::config::{AfterPublish, Config};
use crate::lease::Lease;
use crate::pipe::Routing;
use crate::postgres::sql_error;
use crate::pulsar::rows::queue;
use crate::pulsar::{PublisherConfig, RowQueue};
use crate::retry::Backoff;
use crate::{Error, Result};

const GRANT: &str =
    "GRANT SELECT, INSERT, UPDATE ON walpost.after_publish TO the role that walpost runs as";

/// How long a stop waits before it asks again whether published rows can be seen.
const UNSEEN_PAUSE: Duration = Duration::from_millis(100);

/// The tasks; they end when this is dropped.
#[derive(Debug, Default)]
pub struct Modes {
    after_publish: Option<(RowQueue, JoinHandle<()>)>,
    /// What is known of the tables.
    tables: watch::Sender<Vec<OutboxTable>>,
    /// Under which claim rows are marked or deleted.
    right: watch::Sender<Right>,
    /// Of one cluster: another may have taken over.
    lookers: Vec<JoinHandle<()>>,
    /// Where it is noted what was left undone.
    notes: Option<LeftNote>,
}

impl Drop for Modes {
    fn drop(&mut self) {
        self.stop_lookers();
        if let Some((_, task)) = &self.after_publish {
            task.abort();
        }
    }
}

/// Looks whether the tables can have the modes of the settings, and notes the mode in the database.
///
/// # Errors
/// Refused, with the statement that mends it.
pub async fn prepare(client: &Client, config: &Config) -> Result<Vec<OutboxTable>> {
    let mode = config.after_publish;
    if mode == AfterPublish::Keep && config.retention.is_none() {
        note_keep(client, config).await?;
        // Only to know whether there are partitions; what is wrong with a table is for others to say.
        let mut tables = Vec::with_capacity(config.outbox_tables.len());
        for name in &config.outbox_tables {
            tables.extend(OutboxTable::read(client, name, config).await);
        }
        return Ok(tables);
    }
    let tables = OutboxTable::read_all(client, config).await?;
    for table in &tables {
        table.check_after_publish(mode)?;
        table.check_row_movement(config)?;
        if config.retention.is_some() {
            table.check_retention(mode)?;
        }
        if mode != AfterPublish::Keep {
            if let Some(why) = table.unmarked_unknown() {
                warn!("{why}");
            }
            if mode == AfterPublish::Mark
                && !table.has_unmarked_index
                && let Some(index) = table.unmarked_index()
            {
                warn!(table = %table.name, "looking for unmarked rows reads the whole table; better: {index}");
            }
            if !table.has_id_index {
                warn!(table = %table.name, "no index begins with column {}: each batch reads the whole table", table.id.name);
            }
        }
    }
    if mode == AfterPublish::Keep {
        note_keep(client, config).await?;
    } else {
        note_mode(client, config).await?;
    }
    if !left_note::is_usable(client).await? {
        warn!(
            "walpost may not use the table walpost.left_undone, or there is none: walpost check does not list what was left undone, and a \
             published row that cannot be marked or deleted is published again after each restart (hint: walpost init makes the table; \
             GRANT SELECT, INSERT, UPDATE ON walpost.left_undone TO the role that walpost runs as)"
        );
    }
    Ok(tables)
}

/// Rows are told from those of an earlier time in which nothing was marked by when the mode was turned on.
async fn note_mode(client: &Client, config: &Config) -> Result<()> {
    const SQL: &str = "
        INSERT INTO walpost.after_publish AS a (slot, mode, since) VALUES ($1, $2, clock_timestamp())
        ON CONFLICT (slot) DO UPDATE SET mode = excluded.mode,
            since = CASE WHEN a.mode = 'keep' THEN excluded.since ELSE a.since END
        WHERE a.mode <> excluded.mode";
    let mode = config.after_publish.name();
    if !has_table(client).await? {
        return Err(no_table(config.after_publish));
    }
    let noted = client.execute(SQL, &[&config.slot, &mode]).await;
    let changed = noted
        .map_err(|error| sql_error("note the mode in walpost.after_publish", error).hint(GRANT))?;
    if changed > 0 {
        info!(
            mode,
            "the mode is new: rows from before it stay as they are unless they are published from now on"
        );
    }
    Ok(())
}

/// The error for it.
pub(crate) fn no_table(mode: AfterPublish) -> Error {
    let mode = mode.name();
    Error::refused(format!(
        "table walpost.after_publish does not exist, or the role may not use schema walpost; WALPOST_AFTER_PUBLISH={mode} needs it"
    ))
    .hint(format!("WALPOST_AFTER_PUBLISH={mode} walpost init"))
}

async fn note_keep(client: &Client, config: &Config) -> Result<()> {
    if has_table(client).await? {
        let sql =
            "UPDATE walpost.after_publish SET mode = 'keep' WHERE slot = $1 AND mode <> 'keep'";
        let noted = client.execute(sql, &[&config.slot]).await;
        noted.map_err(|error| {
            sql_error("note the mode in walpost.after_publish", error).hint(GRANT)
        })?;
    }
    Ok(())
}

/// Whether there is a table to note it in; without the right to use the schema there might as well be none.
pub(crate) async fn has_table(client: &Client) -> Result<bool> {
    const SQL: &str = "
        SELECT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                       WHERE n.nspname = 'walpost' AND c.relname = 'after_publish'
                         AND has_schema_privilege(n.oid, 'USAGE'))";
    let row = client.query_one(SQL, &[]).await;
    let row = row.map_err(|error| sql_error("look for walpost.after_publish", error))?;
    Ok(row.get(0))
}

impl Modes {
    /// Starts what the settings ask for, beside the stream or poll mode's looks, on the server with this log; what looked through another one's tables ends. Rows
    /// that wait to be marked stay in their queue.
    pub fn start(
        &mut self,
        config: &Config,
        tables: &[OutboxTable],
        log: &Log,
        (routing, publisher, lease): (Routing, PublisherConfig, Lease),
        way: Way,
    ) {
        self.stop_lookers();
        self.know(tables);
        let meter = Arc::clone(&publisher.meter);
        let partitioned = tables.iter().filter(|table| table.partitioned);
        let partitioned: Vec<_> = partitioned.map(|table| table.name.clone()).collect();
        if !partitioned.is_empty() {
            let meter = Arc::clone(&meter);
            let postgres = config.postgres.clone();
            let keeping = move || {
                partitions::keep_ahead(postgres.clone(), partitioned.clone(), Arc::clone(&meter))
            };
            self.look(&lease, keeping);
        }
        let polls = matches!(way, Way::Looks(_));
        let backoff = || Backoff::new(config.reconnect_initial, config.reconnect_max);
        if config.after_publish != AfterPublish::Keep {
            let facts = self.tables.subscribe();
            let (queue, _) = self.after_publish.get_or_insert_with(|| {
                let (queue, receiver) = queue(Arc::clone(&meter));
                let database = (config.postgres.clone(), config.slot.clone());
                let (mode, meter) = (config.after_publish, Arc::clone(&meter));
                let told = (facts, self.right.subscribe());
                let task = AfterPublishTask::new(database, told, mode, receiver, backoff(), meter);
                (queue, tokio::spawn(task.run()))
            });
            let unmarked = Unmarked {
                postgres: config.postgres.clone(),
                slot: config.slot.clone(),
                tables: tables.to_vec(),
                facts: self.tables.subscribe(),
                log: log.clone(),
                routing,
                publisher,
                lease: lease.clone(),
                interval: config.scan_interval,
                age: config.straggler_age,
                queue: queue.clone(),
                way,
            };
            self.look(&lease, move || unmarked.clone().run());
        }
        if let Some(age) = config.retention {
            let retention = Retention {
                postgres: config.postgres.clone(),
                tables: tables.to_vec(),
                mode: config.after_publish,
                system_id: log.system_id.clone(),
                interval: config.scan_interval,
                age,
                meter: Arc::clone(&meter),
            };
            self.look(&lease, move || retention.clone().run());
        }
        // Poll mode leaves tables that cannot be read.
        if polls || !self.lookers.is_empty() {
            let note = LeftNote {
                postgres: config.postgres.clone(),
                slot: config.slot.clone(),
                meter,
                queue: self.queue(),
                is_taken_over: Arc::default(),
            };
            self.notes = Some(note.clone());
            self.lookers.push(tokio::spawn(Box::pin(note.keep())));
        }
    }

    /// Starts what `work` gives whenever the lease is held, and drops it when that ends: another instance may be at the same tables.
    fn look<W: Future<Output = ()> + Send>(
        &mut self,
        lease: &Lease,
        work: impl Fn() -> W + Send + 'static,
    ) {
        let lease = lease.clone();
        self.lookers.push(tokio::spawn(async move {
            loop {
                lease.held().await;
                tokio::select! {
                    biased;
                    () = lease.ended() => {}
                    () = Box::pin(work()) => return,
                }
            }
        }));
    }

    /// Tells under which claim rows are marked or deleted from now on.
    pub fn set_right(&self, right: Right) {
        self.right.send_replace(right);
    }

    /// Tells what is known of the tables now: columns may have come or gone.
    pub fn know(&self, tables: &[OutboxTable]) {
        self.tables.send_replace(tables.to_vec());
    }

    /// Where receipts put their rows; `None` when nothing is done with them.
    pub fn queue(&self) -> Option<RowQueue> {
        self.after_publish.as_ref().map(|(queue, _)| queue.clone())
    }

    fn stop_lookers(&mut self) {
        for task in self.lookers.drain(..) {
            task.abort();
        }
    }

    /// Stops looking, and waits until what was published is marked or deleted, for at most `patience`.
    pub async fn drain(&mut self, patience: Duration) {
        self.stop_lookers();
        let Some(queue) = self.queue() else { return };
        // Without a claim nothing is marked.
        let is_claimed = !matches!(*self.right.borrow(), Right::Suspended);
        let patience = if is_claimed { patience } else { Duration::ZERO };
        let drained = timeout(patience, async {
            // Rows of transactions that cannot be seen yet outlast a barrier.
            while queue.waiting() > 0 && queue.barrier().await {
                if queue.waiting() > 0 {
                    sleep(UNSEEN_PAUSE).await;
                }
            }
        });
        if drained.await.is_err() {
            warn!(
                rows = queue.waiting(),
                "published rows are not marked or deleted yet: they are found after WALPOST_STRAGGLER_AGE and may come twice"
            );
        }
        if let Some(notes) = &self.notes {
            notes.last().await;
        }
    }
}
