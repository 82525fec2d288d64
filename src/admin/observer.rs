//! What Postgres says: the slot, the end of the log, the stragglers.
//!
//! Owns one SQL session of its own, never the pipe's. Output: [`Observed`], anew every two seconds. A server that is away, slow,
//! or short of connections leaves the last observation standing, with its age; the connector's own warnings say why.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tracing::debug;

use crate::config::Config;
use crate::postgres::slot::{SlotState, log_end, slot_state};
use crate::postgres::{connect_sql, sql_error};
use crate::{Lsn, Result};

/// `application_name` of the session.
const APPLICATION_NAME: &str = "walpost status";
/// Between two looks at the slot. One query on shared memory.
const INTERVAL: Duration = Duration::from_secs(2);
/// Stragglers are counted in every third look: that reads their table.
const COUNT_EVERY: u32 = 3;
/// For one look; also what a status page waits at most to see that Postgres is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// An observation older than this says nothing about now.
pub(super) const FRESH: Duration = Duration::from_secs(30);
/// Stragglers that are shown; `walpost stragglers list` has all.
const LISTED: i64 = 20;

/// What was seen last.
#[derive(Clone, Debug, Default)]
pub(super) struct Observed {
    /// `None`: nothing was seen yet.
    pub(super) at: Option<Instant>,
    pub(super) log_end: Lsn,
    pub(super) slot: Option<SlotState>,
    /// `None` where there is no table for them, or no right to read it.
    pub(super) stragglers: Option<Stragglers>,
}

/// The stragglers of the slot.
#[derive(Clone, Debug, Default)]
pub(super) struct Stragglers {
    pub(super) retrying: u64,
    pub(super) parked: u64,
    pub(super) dead: u64,
    /// The oldest ones.
    pub(super) listed: Vec<Straggler>,
}

/// One of them, without payload and headers, which belong to the application. Long texts are cut by the server.
#[derive(Clone, Debug)]
pub(super) struct Straggler {
    pub(super) number: i64,
    pub(super) outbox: String,
    pub(super) id: Option<String>,
    pub(super) topic: Option<String>,
    pub(super) key: Option<String>,
    pub(super) state: String,
    pub(super) reason: String,
    pub(super) attempts: i32,
    pub(super) age_seconds: f64,
}

impl Observed {
    /// The same, if it is fresh enough to be told as the present.
    pub(super) fn fresh(&self) -> Option<&Self> {
        self.at
            .is_some_and(|at| at.elapsed() < FRESH)
            .then_some(self)
    }

    /// Bytes of log that the slot has not confirmed; `None` without a slot.
    pub(super) fn lag_bytes(&self) -> Option<u64> {
        let confirmed = self.slot.as_ref()?.confirmed_flush?;
        Some(self.log_end.as_u64().saturating_sub(confirmed.as_u64()))
    }
}

/// Looks again and again; ends only with the receivers.
pub(super) async fn run(config: &Config, observe: watch::Sender<Observed>) {
    let mut client = None;
    let mut looks: u32 = 0;
    loop {
        let count = looks.is_multiple_of(COUNT_EVERY);
        let looking = look(config, &mut client, count);
        match timeout(PATIENCE, looking).await {
            Ok(Ok((mut seen, counted))) => {
                observe.send_modify(|last| {
                    if !counted {
                        seen.stragglers = last.stragglers.take();
                    }
                    *last = seen;
                });
                looks = looks.wrapping_add(1);
            }
            Ok(Err(error)) => {
                client = None;
                debug!("Postgres could not be observed: {}", error.report());
            }
            Err(_) => {
                client = None;
                debug!("Postgres could not be observed within {PATIENCE:?}");
            }
        }
        sleep(INTERVAL).await;
    }
}

/// One look; true when the stragglers were counted.
async fn look(
    config: &Config,
    client: &mut Option<Client>,
    count: bool,
) -> Result<(Observed, bool)> {
    let client = match client {
        Some(client) => client,
        None => client.insert(connect_sql(&config.postgres, APPLICATION_NAME).await?),
    };
    let slot = slot_state(client, &config.slot).await?;
    // Asked second: the lag is then never shown smaller than it is.
    let log_end = log_end(client).await?;
    let stragglers = if count {
        stragglers(client, &config.slot).await?
    } else {
        None
    };
    let seen = Observed {
        at: Some(Instant::now()),
        log_end,
        slot,
        stragglers,
    };
    Ok((seen, count))
}

async fn stragglers(client: &Client, slot: &str) -> Result<Option<Stragglers>> {
    const USABLE: &str = "
        SELECT coalesce(has_schema_privilege(n.oid, 'usage') AND has_table_privilege(c.oid, 'select'), false)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'walpost' AND c.relname = 'straggler'";
    const COUNT: &str =
        "SELECT state, count(*) FROM walpost.straggler WHERE slot = $1 GROUP BY state";
    const LIST: &str = "
        SELECT number, outbox, left(id, 200), left(topic, 300), left(key, 200), state, left(reason, 500), attempts,
               extract(epoch FROM now() - created_at)::float8
        FROM walpost.straggler WHERE slot = $1 ORDER BY number LIMIT $2";
    let failed = |error| sql_error("look at walpost.straggler", error);
    let usable = client.query_opt(USABLE, &[]).await.map_err(failed)?;
    if !usable.is_some_and(|row| row.get(0)) {
        return Ok(None);
    }
    let mut found = Stragglers::default();
    for row in client.query(COUNT, &[&slot]).await.map_err(failed)? {
        let count = u64::try_from(row.get::<_, i64>(1)).unwrap_or(0);
        match row.get(0) {
            "retrying" => found.retrying = count,
            "parked" => found.parked = count,
            // The table allows these three.
            _ => found.dead = count,
        }
    }
    if found.retrying + found.parked + found.dead > 0 {
        let rows = client.query(LIST, &[&slot, &LISTED]).await;
        let rows = rows.map_err(failed)?;
        found.listed = rows
            .iter()
            .map(|row| Straggler {
                number: row.get(0),
                outbox: row.get(1),
                id: row.get(2),
                topic: row.get(3),
                key: row.get(4),
                state: row.get(5),
                reason: row.get(6),
                attempts: row.get(7),
                age_seconds: row.get(8),
            })
            .collect();
    }
    Ok(Some(found))
}
