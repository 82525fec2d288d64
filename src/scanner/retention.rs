//! Deletes delivered rows that are older than `WALPOST_RETENTION`, and drops partitions whole.
//!
//! A task beside the stream with a SQL connection of its own. Input: the tables, and `walpost.progress`, which says what is
//! delivered. Output: short DELETEs, and DROP TABLE of partitions.
//!
//! # Which rows
//!
//! Older than the retention by `created_at`, and *removable*: covered by the delivered snapshot of every slot that publishes the table
//! ([`super::coverage`]: the row is visible in it, and it speaks of the row's leaf table), and each of this very
//! cluster; in mark mode marked; and not in `walpost.straggler`, in whatever state. No slot that publishes the table, or one that
//! has not seen a delivery yet: nothing is removable. In delete mode rows go by their receipts, so nothing is left to this but
//! empty partitions.
//!
//! # Cost
//!
//! Each statement looks at a stretch of blocks (a range of ctid), so it needs no index, is short, and holds few locks. A
//! walk over the whole table is made once in a tenth of the retention: a row is kept at most that much longer.
//!
//! # What cannot be removed
//!
//! A row that the server refuses to delete (a foreign key, a trigger, a lock) is found by halving the stretch, and left: later
//! statements leave its place (ctid) out until its pause is over ([`crate::upkeep::pause`]). A partition that cannot be dropped (a view depends
//! on it, the role does not own it) is left in the same way, and its rows are deleted meanwhile. A table that cannot be looked at
//! holds up no other. All of it is told ([`crate::upkeep`]), with the rows that a trigger keeps without an error.
//! How many are remembered is bounded ([`super::left_places`]). `tests/isolation/retention.rs` tries to break this.
//!
//! # Dropping a partition
//!
//! 1. Without a lock: is every row removable? The snapshot in which that was seen is kept.
//! 2. In a transaction with a short `lock_timeout`: lock the table and the partition, so that no writer has rows in it that
//!    cannot be seen. What such a writer may have added since has a transaction id at or beyond that snapshot's oldest, which
//!    the index over `txid` finds at once. If none of that is to be kept: drop.
//!
//! Writers of the outbox wait for at most that timeout; if it is up, the next round tries again: the others at once where only the
//! partition itself is in use, all of them where the table is. (DETACH CONCURRENTLY would not
//! wait, but a writer still in the partition would commit rows that the publication no longer knows.)

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::Client;
use tracing::{debug, info, warn};

use super::coverage;
use super::left_places::{Deletion, LeftPlaces, Stretch};
use super::outbox::OutboxTable;
use crate::config::AfterPublish;
use crate::meter::Meter;
use crate::postgres::{
    PostgresConfig, TableName, connect_sql, is_about_rows, quote_ident, quote_literal, sql_error,
    sqlstate,
};
use crate::upkeep::Work;
use crate::{Error, Result};

/// Blocks that one DELETE looks at: 2 MiB, some thousand rows.
const STEP_BLOCKS: i64 = 256;
/// A lock was not to be had in time.
const LOCK_NOT_AVAILABLE: &str = "55P03";
/// Nor was the second look short enough.
const QUERY_CANCELED: &str = "57014";
/// Walks in the time of a retention.
const WALKS: u32 = 10;

/// What the task works with.
#[derive(Clone, Debug)]
pub struct Retention {
    /// Where the tables are.
    pub postgres: PostgresConfig,
    /// The tables.
    pub tables: Vec<OutboxTable>,
    /// What becomes of published rows.
    pub mode: AfterPublish,
    /// The cluster that snapshots must be from.
    pub system_id: String,
    /// `WALPOST_SCAN_INTERVAL`.
    pub interval: Duration,
    /// `WALPOST_RETENTION`.
    pub age: Duration,
    /// Where it is told what cannot be removed.
    pub meter: Arc<Meter>,
}

/// A table with rows of its own: the outbox table, or one of its partitions.
#[derive(Debug)]
struct Leaf {
    name: TableName,
    blocks: i64,
    /// All its rows are older than the retention, by its bound.
    is_past: bool,
    /// A trigger (BEFORE DELETE FOR EACH ROW) or a rule may keep a row from being deleted without an error.
    may_keep_rows: bool,
}

/// What became of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Dropped,
    /// Something in it is to be kept.
    Stays,
    /// The table could not be locked in time.
    TableInUse,
    /// The partition could not be locked in time.
    InUse,
}

impl Retention {
    /// Runs until it is aborted.
    pub async fn run(self) {
        let mut client = None;
        let mut left = LeftPlaces::default();
        loop {
            sleep(self.interval.max(self.age / WALKS)).await;
            if let Err(error) = self.round(&mut client, &mut left).await {
                client = None;
                warn!(
                    "rows past their retention could not be deleted: {}",
                    error.report()
                );
            }
        }
    }

    async fn round(&self, client: &mut Option<Client>, left: &mut LeftPlaces) -> Result<()> {
        if client.is_none() {
            *client = Some(open(&self.postgres).await?);
        }
        let Some(client) = client else {
            return Err(Error::bug("a session was just opened"));
        };
        let Some(has_stragglers) = knows_deliveries(client).await? else {
            warn!(
                "nothing is deleted: there is no walpost.progress to say what is delivered (walpost init makes it)"
            );
            return Ok(());
        };
        left.begin_round();
        for table in &self.tables {
            let done = self.walk(client, table, has_stragglers, left).await;
            match done {
                Ok(()) => {}
                // The others may well go.
                Err(error) if is_about_rows(&error) => left.table(&table.name, &error),
                Err(error) => return Err(error),
            }
        }
        self.meter.upkeep().set(Work::Retention, left.end_round());
        Ok(())
    }

    /// Removes what may go of one table.
    async fn walk(
        &self,
        client: &Client,
        table: &OutboxTable,
        has_stragglers: bool,
        left: &mut LeftPlaces,
    ) -> Result<()> {
        let removable = self.removable(table, has_stragglers);
        let mut in_use = false;
        for leaf in self.leaves(client, table).await? {
            let mut fate = Fate::Stays;
            // What goes whole is not deleted by rows. One wait for the table's lock is enough for a round.
            if leaf.is_past && in_use {
                continue;
            }
            if leaf.is_past && left.may_try(&leaf.name) {
                fate = match self.drop_partition(client, table, &leaf, &removable).await {
                    Ok(fate) => {
                        left.forget(&leaf.name);
                        if fate == Fate::Dropped {
                            left.ends(&leaf.name, 0);
                        }
                        fate
                    }
                    Err(error) if is_about_rows(&error) => {
                        left.partition(&leaf.name, &error);
                        Fate::Stays
                    }
                    Err(error) => return Err(error),
                };
            }
            in_use |= fate == Fate::TableInUse;
            if fate == Fate::Stays && self.mode != AfterPublish::Delete {
                let deleted = self.delete_rows(client, table, &leaf, &removable, left);
                match deleted.await {
                    Ok(()) => {}
                    Err(error) if is_about_rows(&error) => left.table(&leaf.name, &error),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// SQL: whether row `o` may go, apart from its age. Never true by a NULL.
    fn removable(&self, table: &OutboxTable, has_stragglers: bool) -> String {
        if self.mode == AfterPublish::Delete {
            return "false".to_owned();
        }
        // A slot without a list of leaf tables is of an earlier version, or new: it may publish every table.
        let outbox = format!(
            "{}::regclass",
            quote_literal(&table.name.to_string()).trim()
        );
        let publishes = format!(
            "(p.tables IS NULL OR p.slot = ANY (ARRAY({})))",
            coverage::publishing_slots(&outbox)
        );
        let mut sql = format!(
            "o.txid IS NOT NULL AND EXISTS (SELECT FROM walpost.progress p WHERE {publishes}) AND NOT EXISTS (
                 SELECT FROM walpost.progress p
                 WHERE p.system_id <> {} OR {publishes} AND ({}) IS NOT TRUE)",
            quote_literal(&self.system_id),
            coverage::IS_SHOWN
        );
        if self.mode == AfterPublish::Mark {
            sql.push_str(" AND o.sent_at IS NOT NULL");
        }
        if has_stragglers {
            let _infallible = write!(
                sql,
                " AND NOT {}",
                table.is_straggler(&quote_literal(&table.name.to_string()))
            );
        }
        sql
    }

    async fn leaves(&self, client: &Client, table: &OutboxTable) -> Result<Vec<Leaf>> {
        // Only a bound on the event's time says how old rows are: a partition of a table by range of that one column. (The
        // bound of another column need be no time: by CASE it is not read as one.)
        const SQL: &str = "
            WITH leaf AS (
                SELECT $1::text::regclass AS oid WHERE NOT $2
                UNION ALL
                SELECT relid FROM pg_partition_tree($1::text::regclass) WHERE isleaf AND $2
            ), by_time AS (
                SELECT partrelid FROM pg_partitioned_table t
                JOIN pg_attribute a ON a.attrelid = t.partrelid AND a.attnum = t.partattrs[0]
                WHERE t.partstrat = 'r' AND t.partnatts = 1 AND a.attname = $3
            )
            SELECT n.nspname::text, c.relname::text,
                   pg_relation_size(c.oid) / current_setting('block_size')::int8,
                   CASE WHEN i.inhparent IN (SELECT partrelid FROM by_time)
                        THEN coalesce((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \\(''([^'']+)''\\)'))[1]::timestamptz
                                      < clock_timestamp() - make_interval(secs => $4), false)
                        ELSE false END,
                   EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = c.oid AND NOT t.tgisinternal AND t.tgtype & 11 = 11)
                       OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid)
            FROM leaf JOIN pg_class c ON c.oid = leaf.oid JOIN pg_namespace n ON n.oid = c.relnamespace
            LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
            ORDER BY c.relname";
        let created_at = table
            .created_at
            .as_ref()
            .map_or("", |column| column.name.as_str());
        let (name, age) = (table.name.to_string(), self.age.as_secs_f64());
        let rows = client
            .query(SQL, &[&name, &table.partitioned, &created_at, &age])
            .await
            .map_err(|error| sql_error(&format!("look at table {name}"), error))?;
        let leaf = |row: &tokio_postgres::Row| Leaf {
            name: TableName::new(row.get::<_, String>(0), row.get::<_, String>(1)),
            blocks: row.get(2),
            is_past: row.get::<_, Option<bool>>(3).unwrap_or(false),
            may_keep_rows: row.get(4),
        };
        Ok(rows.iter().map(leaf).collect())
    }

    async fn delete_rows(
        &self,
        client: &Client,
        table: &OutboxTable,
        leaf: &Leaf,
        removable: &str,
        left: &mut LeftPlaces,
    ) -> Result<()> {
        let Some(created_at) = &table.created_at else {
            return Ok(());
        };
        let (time, ago) = (quote_ident(&created_at.name), table.ago("$1::float8"));
        let chosen = format!(
            "o.ctid >= $2::text::tid AND o.ctid < $3::text::tid AND o.ctid <> ALL ($4::text[]::tid[])
             AND o.{time} < {ago} AND {removable}"
        );
        let deletion = Deletion {
            client,
            leaf: &leaf.name,
            id: table.id_column(),
            chosen,
            age: self.age.as_secs_f64(),
            may_be_kept: leaf.may_keep_rows,
        };
        let mut deleted = 0;
        let mut from = 0;
        while from < leaf.blocks {
            let stretch = Stretch::blocks(from, from + STEP_BLOCKS);
            deleted += deletion.stretch(stretch, left).await?;
            from += STEP_BLOCKS;
        }
        left.ends(&leaf.name, leaf.blocks);
        if deleted > 0 {
            info!(table = %leaf.name, deleted, "deleted delivered rows past their retention");
        }
        Ok(())
    }

    async fn drop_partition(
        &self,
        client: &Client,
        table: &OutboxTable,
        leaf: &Leaf,
        removable: &str,
    ) -> Result<Fate> {
        let name = &leaf.name;
        let failed = |error| sql_error(&format!("look through partition {name}"), error);
        let sql = format!(
            "SELECT EXISTS (SELECT FROM ONLY {name} o WHERE ({removable}) IS NOT TRUE),
                    pg_snapshot_xmin(pg_current_snapshot())::text"
        );
        let row = client.query_one(&sql, &[]).await.map_err(failed)?;
        if row.get(0) {
            return Ok(Fate::Stays);
        }
        let oldest: &str = row.get(1);
        let lock = format!(
            "BEGIN; SET LOCAL lock_timeout TO '200ms'; SET LOCAL statement_timeout TO '5s';
             LOCK TABLE ONLY {} IN ACCESS EXCLUSIVE MODE",
            table.name
        );
        let lock_partition = format!("LOCK TABLE ONLY {name} IN ACCESS EXCLUSIVE MODE");
        let again = format!(
            "SELECT EXISTS (SELECT FROM ONLY {name} o WHERE o.txid::text::bigint >= {oldest} AND ({removable}) IS NOT TRUE)"
        );
        let mut has_table = false;
        let stays = async {
            client.batch_execute(&lock).await?;
            has_table = true;
            client.batch_execute(&lock_partition).await?;
            let must_stay: bool = client.query_one(&again, &[]).await?.get(0);
            let end = if must_stay {
                "ROLLBACK".to_owned()
            } else {
                format!("DROP TABLE {name}; COMMIT")
            };
            client.batch_execute(&end).await?;
            Ok(must_stay)
        };
        match stays.await {
            Ok(true) => Ok(Fate::Stays),
            Ok(false) => {
                info!(partition = %name, "dropped a partition past its retention");
                Ok(Fate::Dropped)
            }
            Err(error) => {
                let error = sql_error(&format!("drop partition {name}"), error);
                if client.is_closed() {
                    return Err(error);
                }
                client.batch_execute("ROLLBACK").await.map_err(failed)?;
                if !matches!(sqlstate(&error), Some(LOCK_NOT_AVAILABLE | QUERY_CANCELED)) {
                    return Err(error);
                }
                debug!(partition = %name, "somebody uses the table: the partition is dropped another time");
                Ok(if has_table {
                    Fate::InUse
                } else {
                    Fate::TableInUse
                })
            }
        }
    }
}

async fn open(postgres: &PostgresConfig) -> Result<Client> {
    let client = connect_sql(postgres, "walpost retention").await?;
    let sql = "SET synchronous_commit TO off; SET lock_timeout TO '5s'; SET timezone TO 'UTC'; SET datestyle TO 'ISO'";
    let set = client.batch_execute(sql).await;
    set.map_err(|error| sql_error("set up the session", error))?;
    Ok(client)
}

/// `None` without a `walpost.progress`, else whether there is a `walpost.straggler`.
async fn knows_deliveries(client: &Client) -> Result<Option<bool>> {
    let sql = "SELECT to_regclass('walpost.progress') IS NOT NULL, to_regclass('walpost.straggler') IS NOT NULL";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("look for walpost.progress", error))?;
    let (progress, stragglers): (bool, bool) = (row.get(0), row.get(1));
    Ok(progress.then_some(stragglers))
}
