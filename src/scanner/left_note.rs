//! Notes what was left undone in `walpost.left_undone`, where `walpost check` and the next process find it.
//!
//! A task with a SQL connection that it opens only when there is something to note, at most every [`PAUSE`]. What cannot be noted (there is
//! no such table: `walpost init` makes it) is told by `/status` all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::Result;
use crate::meter::Meter;
use crate::postgres::{PostgresConfig, connect_sql, sql_error};
use crate::pulsar::RowQueue;
use crate::upkeep::{LISTED, Left, News, Undone, Work, from_json, to_json};

/// Between two notes. Rows that were left meanwhile, by a process that is then killed, are published again.
const PAUSE: Duration = Duration::from_secs(2);
/// After a note that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(60);
const APPLICATION_NAME: &str = "walpost notes";

/// What the task works with.
#[derive(Clone, Debug)]
pub(super) struct LeftNote {
    pub(super) postgres: PostgresConfig,
    /// The replication slot.
    pub(super) slot: String,
    /// What is left undone.
    pub(super) meter: Arc<Meter>,
    /// Of the task that takes over what the process before this one has noted, in the modes that have one.
    pub(super) queue: Option<RowQueue>,
    /// That was taken over: until then a note would wipe it out.
    pub(super) is_taken_over: Arc<AtomicBool>,
}

impl LeftNote {
    /// Notes every change until it is aborted.
    pub(super) async fn keep(self) {
        // The task answers this question only behind its taking over.
        if let Some(queue) = &self.queue
            && queue.left(0).await.is_none()
        {
            return;
        }
        self.is_taken_over.store(true, Ordering::Relaxed);
        let mut changes = self.meter.upkeep().subscribe();
        // What the process before this one has noted may be out of date.
        changes.mark_changed();
        let mut news = News::default();
        while changes.changed().await.is_ok() {
            let all = changes.borrow_and_update().clone();
            let pause = match write(&self.postgres, &self.slot, &all).await {
                Ok(()) => {
                    news.over();
                    PAUSE
                }
                Err(error) => {
                    let why = error.report();
                    if news.is_new(&why) {
                        warn!(
                            "what is left undone cannot be noted in walpost.left_undone: walpost check does not know it, and the next \
                             process may publish rows again that were left: {why} (hint: walpost init makes that table; GRANT SELECT, \
                             INSERT, UPDATE ON walpost.left_undone)"
                        );
                    }
                    AFTER_FAILURE
                }
            };
            sleep(pause).await;
        }
    }

    /// The last note before the end; nobody waits for it long.
    pub(super) async fn last(&self) {
        if !self.is_taken_over.load(Ordering::Relaxed) {
            return;
        }
        let all = self.meter.upkeep().all();
        let _noted = timeout(PAUSE, write(&self.postgres, &self.slot, &all)).await;
    }
}

async fn write(
    postgres: &PostgresConfig,
    slot: &str,
    all: &[Undone; Work::ALL.len()],
) -> Result<()> {
    const SQL: &str = "
        INSERT INTO walpost.left_undone AS l (slot, what, noted_at) VALUES ($1, $2::text::jsonb, clock_timestamp())
        ON CONFLICT (slot) DO UPDATE SET what = excluded.what, noted_at = excluded.noted_at WHERE l.what <> excluded.what";
    let client = connect_sql(postgres, APPLICATION_NAME).await?;
    let what = to_json(all, LISTED).to_string();
    let noted = client.execute(SQL, &[&slot, &what]).await;
    noted.map_err(|error| sql_error("note what was left undone", error))?;
    Ok(())
}

/// What the process before this one has left of published rows.
pub(super) async fn read(postgres: &PostgresConfig, slot: &str) -> Result<Vec<Left>> {
    let client = connect_sql(postgres, APPLICATION_NAME).await?;
    let sql = "SELECT what::text FROM walpost.left_undone WHERE slot = $1";
    let row = client.query_opt(sql, &[&slot]).await;
    let row = row.map_err(|error| sql_error("read what was left undone", error))?;
    let what: Option<Value> = row.and_then(|row| serde_json::from_str(row.get(0)).ok());
    Ok(what.map_or_else(Vec::new, |what| from_json(&what, Work::AfterPublish)))
}
