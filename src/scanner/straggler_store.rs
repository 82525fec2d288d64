//! The SQL behind stragglers: one session on `walpost.straggler`. Input: events and verdicts. Output: how many of which key are
//! in the table; what is read of it is in [`super::straggler_pages`], how it is counted in [`super::straggler_walk`].
//!
//! Every change is one transaction, so that a process that is killed leaves the table in one of its states. A COMMIT returns when the
//! server's log is flushed, and waits for no standby (`synchronous_commit = local`, [`crate::postgres::session`]): the LSN passes an event
//! behind it. Errors are
//! temporary where another attempt may help; the session is then made anew.
//!
//! # Deadlines
//!
//! Every statement has one ([`answered`]; an INSERT gets more time for its bytes). The task of [`super::straggler_task`] waits meanwhile, and nobody
//! else: the stream and the receipts of its topics go on until the queue of stragglers is full. A wait for a lock ends by the session's `lock_timeout`
//! before the deadline, so that attempts leave no sessions behind that wait on the server.
//!
//! After a deadline it is not known whether the transaction is committed, or will be. The next session counts the table anew and tries again with the same
//! events. The unique index lets each of them in once: the INSERT waits for a transaction that is still open, and then finds its rows there. They may
//! have become visible after the count. So behind an INSERT that found rows of its events the rows of their keys are counted once more, and no
//! later event of such a key passes. A transaction that is still open when another process claims the slot commits before that claim or not at all
//! ([`super::straggler_fence`]).
//!
//! What the database cannot hold (an envelope is UTF-8 whatever the database's encoding) must not hold up the rest for ever:
//! such an event is stored with its texts escaped, dead, and its payload as it was.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, GenericClient, Row, Transaction};
use tracing::warn;

use super::cluster::Log;
use super::discarded::{self, Discarded};
use super::straggler::Straggler;
use super::straggler_fence::{Fence, Right};
use super::straggler_walk::Walk;
use crate::config::Config;
use crate::outbox::RowNumber;
use crate::postgres::{self, PostgresConfig, answered, answered_to, sql_error};
use crate::{Error, Result};

/// `application_name` of the session.
const APPLICATION_NAME: &str = "walpost stragglers";
/// How long a statement waits for a lock: below the deadline of an answer, so that the statement ends and leaves no session of the server behind that
/// still waits.
const LOCK_TIMEOUT: &str = "SET lock_timeout TO '10s'";
/// Completes "cannot …".
const STORING: &str = "store stragglers";
/// Stores events: $1 slot, $2 to $13 their columns, $14 whether keys keep their order, $15 whether a dead one blocks, $16 the
/// first pause in seconds, $17 to $19 more columns. (Where dead ones do not block, hopeless ones are nobody's predecessors.) What was
/// discarded meanwhile is left out: see [`Insert::sql`].
const INSERT: &str = "
    with event as (
        select * from unnest(
            $2::text[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::text[], $8::int8[], $9::int8[],
            $10::text[], $11::int8[], $12::text[], $13::bool[], $17::int8[], $18::int8[], $19::int8[]
        ) with ordinality
        as e(outbox, id, topic, key, payload, properties, event_time_ms, deliver_at_ms, commit_lsn, ordinal, reason, hopeless,
             row_seq, row_txid, log_xid, place)
    )
    insert into walpost.straggler (slot, outbox, id, topic, key, payload, properties, event_time_ms, deliver_at_ms,
                                   commit_lsn, ordinal, reason, state, next_attempt_at{NUMBER}{XID})
    select $1, outbox, id, topic, key, payload, properties::json, event_time_ms, deliver_at_ms,
           commit_lsn::pg_lsn, ordinal, reason,
           case
               when hopeless then 'dead'
               when $14 and (
                   row_number() over (partition by topic, key, hopeless and not $15 order by place) > 1
                   or exists (
                       select from walpost.straggler s
                       where s.slot = $1 and hashtextextended(s.key, 0) = hashtextextended(event.key, 0)
                             and s.key = event.key and s.topic = event.topic and (s.state <> 'dead' or $15)
                   )
               ) then 'parked'
               else 'retrying'
           end,
           now() + $16::float8 * interval '1 second'{NUMBER}{XID_VALUE}
    from event where not {IS_DISCARDED} order by place
    on conflict do nothing
    returning topic, key, state";

/// The transaction id of the log with its epoch: the INSERT's own id is younger.
const FULL_XID: &str = ",
           pg_current_xact_id()::text::int8 - (pg_current_xact_id()::text::int8 - log_xid) % 4294967296";

/// A key's name: topic and key.
pub(crate) type Key = (String, String);

/// What a failed attempt leads to.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) number: i64,
    pub(crate) reason: String,
    pub(crate) attempts: i32,
    pub(crate) next_in: Duration,
    pub(crate) dead: bool,
}

/// What is known of discarded events.
#[derive(Clone, Copy, Default)]
struct Discards {
    /// There is a `walpost.discarded`.
    is_there: bool,
    /// There is a `walpost.progress` by which it is pruned.
    can_prune: bool,
    /// It has the column `row_txid`: one that an earlier version made has not.
    has_txid: bool,
}

/// See the module's documentation.
#[allow(clippy::struct_excessive_bools)] // Each is a setting, or a fact of the catalogue.
pub(crate) struct Store {
    postgres: PostgresConfig,
    /// The log that is streamed, or the one of the server that is polled: a straggler that another server has is lost here.
    log: Log,
    pub(super) slot: String,
    pub(super) keep_key_order: bool,
    pub(super) dead_block: bool,
    retry_initial: Duration,
    client: Option<Client>,
    pub(super) fence: Fence,
    /// Events of each key that hold back later ones, as last seen.
    pub(super) keys: HashMap<Key, i64>,
    pub(super) rows: i64,
    /// The counting that is under way.
    pub(super) walk: Walk,
    discards: Discards,
    /// The table has columns for the row's number: one that an earlier version made has not.
    pub(super) has_numbers: bool,
    /// It has the column `xid`.
    pub(super) has_xid: bool,
    /// How many rows of it, and the last one's number, were there when it was read.
    discarded: (i64, i64),
}

impl Store {
    pub(crate) fn new(config: &Config, log: Log, right: watch::Receiver<Right>) -> Self {
        Self {
            log,
            postgres: config.postgres.clone(),
            slot: config.slot.clone(),
            keep_key_order: config.keep_key_order,
            dead_block: config.dead_block,
            retry_initial: config.retry_initial,
            client: None,
            fence: Fence::new(right),
            keys: HashMap::new(),
            rows: 0,
            walk: Walk::default(),
            discards: Discards::default(),
            has_numbers: false,
            has_xid: false,
            discarded: (0, 0),
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.client
            .as_ref()
            .is_some_and(|client| !client.is_closed())
    }

    pub(crate) fn disconnect(&mut self) {
        self.client = None;
    }

    /// Connects; false where there is no table.
    ///
    /// # Errors
    /// Refused where there is one that walpost may not use: it may hold events that later ones of their key must not pass. Temporary on a server with
    /// another log.
    pub(crate) async fn connect(&mut self) -> Result<bool> {
        let client = postgres::connect_sql(&self.postgres, APPLICATION_NAME).await?;
        let consequence = "no straggler is stored or retried there";
        answered("ask for the server's log", async {
            let limited = client.batch_execute(LOCK_TIMEOUT).await;
            limited.map_err(|error| sql_error("set up the session", error))?;
            self.log.check(&client, consequence).await
        })
        .await?;
        let sql = "
            select coalesce(bool_and(has_table_privilege(c.oid, p)), false)
                   and coalesce(has_schema_privilege(to_regnamespace('walpost'), 'usage'), false), count(*) > 0,
                   coalesce(bool_and((select count(*) from pg_attribute a
                                      where a.attrelid = c.oid and not a.attisdropped
                                            and a.attname in ('row_seq', 'row_txid')) = 2), false), quote_ident(current_user),
                   coalesce(bool_and(exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'xid' and not a.attisdropped)), false)
            from pg_class c, unnest(array['select', 'insert', 'update', 'delete']) p
            where c.relname = 'straggler' and c.relnamespace = to_regnamespace('walpost')";
        let doing = "look for walpost.straggler";
        let row = answered(doing, async {
            let row = client.query_one(sql, &[]).await;
            row.map_err(|error| sql_error(doing, error))
        })
        .await?;
        let (may_use, is_there): (bool, bool) = (row.get(0), row.get(1));
        if is_there && !may_use {
            let role: &str = row.get(3);
            return Err(Error::refused(
                "walpost may not use the table walpost.straggler: later events of a key would pass those that are stored there",
            )
            .hint(format!(
                "let the owner GRANT USAGE ON SCHEMA walpost TO {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler TO {role}"
            )));
        }
        self.has_numbers = row.get(2);
        self.has_xid = row.get(4);
        if is_there {
            let looking = discards(&client);
            self.discards = answered("look for walpost.discarded", looking).await?;
        }
        self.client = Some(client);
        Ok(is_there)
    }

    fn client(&mut self) -> Result<&mut Client> {
        self.client.as_mut().ok_or_else(no_session)
    }

    /// Looks whether stragglers may be sent now: see [`super::straggler_fence`].
    pub(super) async fn check_claim(&self) -> Result<()> {
        let client = self.client.as_ref().ok_or_else(no_session)?;
        answered("look at the claim", self.fence.check(client)).await
    }

    pub(super) async fn rows_of(
        &mut self,
        doing: &str,
        sql: &str,
        with: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>> {
        let client = self.client()?;
        answered(doing, async {
            let rows = client.query(sql, with).await;
            rows.map_err(|error| sql_error(doing, error))
        })
        .await
    }

    /// What was discarded, if that has changed since it was last asked for. To be called behind [`Self::reload`]: a straggler that is not counted
    /// any more because somebody has discarded it is then among these.
    pub(crate) async fn discarded(&mut self, outboxes: &[String]) -> Result<Option<Discarded>> {
        let Discards {
            is_there,
            can_prune,
            has_txid,
        } = self.discards;
        if !is_there {
            return Ok(None);
        }
        let slot = self.slot.clone();
        if can_prune && self.discarded.0 > 0 {
            self.rows_of("prune walpost.discarded", discarded::PRUNE, &[&slot])
                .await?;
        }
        let doing = "look for discarded events";
        let sql =
            "SELECT count(*), coalesce(max(number), 0) FROM walpost.discarded WHERE slot = $1";
        let now = self.rows_of(doing, sql, &[&slot]).await?;
        let now = now.first().map_or((0, 0), |row| (row.get(0), row.get(1)));
        if now == self.discarded {
            return Ok(None);
        }
        let rows = self
            .rows_of(doing, &discarded::select(has_txid), &[&slot])
            .await?;
        self.discarded = now;
        Ok(Some(Discarded::read(&rows, outboxes)))
    }

    pub(crate) fn rows(&self) -> u64 {
        u64::try_from(self.rows).unwrap_or(0)
    }

    /// Stores events; returns by how much the counts of keys differ from what was added when they came.
    pub(crate) async fn insert(
        &mut self,
        events: &[Straggler],
    ) -> Result<Vec<(String, String, i64)>> {
        let (order, block) = (self.keep_key_order, self.dead_block);
        let insert = Insert {
            slot: self.slot.clone(),
            order,
            block,
            retry_initial: self.retry_initial.as_secs_f64(),
            discards: self.discards,
            has_numbers: self.has_numbers,
            has_xid: self.has_xid,
        };
        let client = self.client.as_mut().ok_or_else(no_session)?;
        let failed = |error| sql_error(STORING, error);
        let mut transaction = answered(STORING, self.fence.begin(client)).await?;
        let rows = match insert.all_in_time(&transaction, events).await? {
            Err(error) if is_about_a_value(&error) => {
                answered(STORING, async {
                    transaction.rollback().await.map_err(failed)
                })
                .await?;
                transaction = answered(STORING, self.fence.begin(client)).await?;
                insert.one_by_one(&mut transaction, events).await?
            }
            rows => rows.map_err(failed)?,
        };
        let found = if order && rows.len() < events.len() {
            answered(STORING, insert.holding(&transaction, events)).await?
        } else {
            Vec::new()
        };
        answered(STORING, self.fence.commit(transaction)).await?;
        self.rows += i64::try_from(rows.len()).unwrap_or(0);
        let mut changes: HashMap<Key, i64> = HashMap::new();
        if !order {
            return Ok(Vec::new());
        }
        for event in events.iter().filter(|event| event.parks) {
            if let (Some(topic), Some(key)) = (&event.topic, &event.key) {
                *changes.entry((topic.clone(), key.clone())).or_default() -= 1;
            }
        }
        for row in &rows {
            let is_dead = row.get::<_, &str>(2) == "dead";
            if let (Some(topic), Some(key)) = (row.get(0), row.get(1))
                && (!is_dead || block)
            {
                let key: Key = (topic, key);
                *self.keys.entry(key.clone()).or_default() += 1;
                *changes.entry(key).or_default() += 1;
            }
        }
        for (key, count) in found {
            let known = self.keys.insert(key.clone(), count).unwrap_or(0);
            *changes.entry(key).or_default() += count - known;
        }
        Ok(listed(changes))
    }

    /// These have their receipts. Returns the changes of counts.
    pub(crate) async fn delete(&mut self, numbers: &[i64]) -> Result<Vec<(String, String, i64)>> {
        let sql =
            "delete from walpost.straggler where number = any($1) returning topic, key, number";
        let rows = self
            .rows_of("delete published stragglers", sql, &[&numbers])
            .await?;
        self.rows -= i64::try_from(rows.len()).unwrap_or(0);
        let mut changes = HashMap::new();
        for row in &rows {
            self.walk.forget_row(row.get(2));
            self.forget(row, &mut changes);
        }
        Ok(listed(changes))
    }

    /// One row holds back later ones no more.
    fn forget(&mut self, row: &Row, changes: &mut HashMap<Key, i64>) {
        let (Some(topic), Some(key)) = (row.get(0), row.get(1)) else {
            return;
        };
        let key: Key = (topic, key);
        self.walk.forget(row.get(2), &key);
        if let Some(count) = self.keys.get_mut(&key) {
            *count -= 1;
            if *count <= 0 {
                self.keys.remove(&key);
            }
            *changes.entry(key).or_default() -= 1;
        }
    }

    /// These attempts failed. Returns the changes of counts: a dead one may let its successors go.
    pub(crate) async fn fail(
        &mut self,
        failures: &[Failure],
    ) -> Result<Vec<(String, String, i64)>> {
        let sql = "
            update walpost.straggler s
            set reason = f.reason, attempts = f.attempts, next_attempt_at = now() + f.next_in * interval '1 second',
                state = case when s.state = 'dead' or f.dead then 'dead' else 'retrying' end
            from unnest($1::int8[], $2::text[], $3::int4[], $4::float8[], $5::bool[]) f(number, reason, attempts, next_in, dead),
                 (select number, state from walpost.straggler where number = any($1)) before
            where s.number = f.number and before.number = f.number
            returning s.topic, s.key, s.number, s.state = 'dead' and before.state <> 'dead'";
        let numbers: Vec<i64> = failures.iter().map(|failure| failure.number).collect();
        // In ASCII: what a broker says is it mostly, and then every database can hold it.
        let reasons: Vec<String> = failures
            .iter()
            .map(|failure| ascii(&failure.reason.replace('\0', " ")))
            .collect();
        let attempts: Vec<i32> = failures.iter().map(|failure| failure.attempts).collect();
        let pauses: Vec<f64> = failures
            .iter()
            .map(|failure| failure.next_in.as_secs_f64())
            .collect();
        let dead: Vec<bool> = failures.iter().map(|failure| failure.dead).collect();
        let rows = self
            .rows_of(
                "note failed attempts",
                sql,
                &[&numbers, &reasons, &attempts, &pauses, &dead],
            )
            .await?;
        let mut changes = HashMap::new();
        let mut let_go: Vec<Key> = Vec::new();
        for row in rows.iter().filter(|row| row.get(3)) {
            if !self.dead_block {
                self.forget(row, &mut changes);
                let key: Option<(String, String)> = row
                    .get::<_, Option<String>>(0)
                    .zip(row.get::<_, Option<String>>(1));
                let_go.extend(key);
            }
        }
        self.promote_next(&let_go).await?;
        Ok(listed(changes))
    }

    /// A copy of these is in the dead-letter topic.
    pub(crate) async fn copied(&mut self, numbers: &[i64]) -> Result<()> {
        let sql = "update walpost.straggler set dead_letter_at = now() where number = any($1)";
        self.rows_of("note dead letters", sql, &[&numbers]).await?;
        Ok(())
    }

    /// A topic takes messages again: its heads need not wait for their time.
    pub(crate) async fn hurry(&mut self, topic: &str) -> Result<()> {
        let sql = "update walpost.straggler set next_attempt_at = now()
                   where slot = $1 and topic = $2 and state = 'retrying' and next_attempt_at > now()";
        let slot = self.slot.clone();
        self.rows_of("hurry a topic's stragglers", sql, &[&slot, &topic])
            .await?;
        Ok(())
    }
}

fn no_session() -> Error {
    Error::temporary("there is no session for stragglers")
}

async fn discards(client: &Client) -> Result<Discards> {
    let sql = "
        select count(*) filter (where c.relname = 'discarded') > 0,
               coalesce(bool_and(has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'delete'))
                        filter (where c.relname = 'discarded'), false),
               coalesce(bool_and(has_table_privilege(c.oid, 'select')) filter (where c.relname = 'progress'), false),
               coalesce(bool_or(exists (select from pg_attribute a where a.attrelid = c.oid and a.attname = 'row_txid' and not a.attisdropped))
                        filter (where c.relname = 'discarded'), false), quote_ident(current_user)
        from pg_class c where c.relname in ('discarded', 'progress') and c.relnamespace = to_regnamespace('walpost')";
    let row = client
        .query_one(sql, &[])
        .await
        .map_err(|error| sql_error("look for walpost.discarded", error))?;
    let (is_there, may_use): (bool, bool) = (row.get(0), row.get(1));
    if is_there && !may_use {
        let role: &str = row.get(4);
        return Err(Error::refused(
            "walpost may not use the table walpost.discarded: what walpost stragglers discard has deleted may come again after a crash",
        )
        .hint(format!(
            "let the owner GRANT SELECT, INSERT, DELETE ON walpost.discarded TO {role}"
        )));
    }
    Ok(Discards {
        is_there,
        can_prune: row.get(2),
        has_txid: row.get(3),
    })
}

/// The settings that [`INSERT`] takes with the events.
#[allow(clippy::struct_excessive_bools)] // Each is a setting, or a fact of the catalogue.
struct Insert {
    slot: String,
    order: bool,
    block: bool,
    retry_initial: f64,
    discards: Discards,
    /// See [`Store::has_numbers`].
    has_numbers: bool,
    /// See [`Store::has_xid`].
    has_xid: bool,
}

impl Insert {
    fn sql(&self) -> String {
        let is_discarded = if self.discards.is_there {
            discarded::is_discarded(self.discards.has_txid)
        } else {
            "false".to_owned()
        };
        let number = if self.has_numbers {
            ", row_seq, row_txid"
        } else {
            ""
        };
        let (xid, xid_value) = if self.has_xid {
            (", xid", FULL_XID)
        } else {
            ("", "")
        };
        INSERT
            .replace("{IS_DISCARDED}", &is_discarded)
            .replace("{NUMBER}", number)
            .replace("{XID}", xid)
            .replace("{XID_VALUE}", xid_value)
    }

    async fn all(
        &self,
        client: &impl GenericClient,
        events: &[Straggler],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        fn column<'a, T>(events: &'a [Straggler], get: impl Fn(&'a Straggler) -> T + 'a) -> Vec<T> {
            events.iter().map(get).collect()
        }
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let seq = |event: &Straggler| match event.number {
            RowNumber::Seq(seq) => Some(seq),
            _ => None,
        };
        let txid = |event: &Straggler| match event.number {
            RowNumber::Txid(txid) => Some(txid),
            _ => event.txid.and_then(|txid| i64::try_from(txid).ok()),
        };
        let with: [&(dyn ToSql + Sync); 19] = [
            &self.slot,
            &column(events, |event| event.outbox.as_str()),
            &column(events, |event| event.id.as_deref()),
            &column(events, |event| event.topic.as_deref()),
            &column(events, |event| event.key.as_deref()),
            &column(events, |event| event.payload.as_deref()),
            &column(events, |event| ascii_json(&event.properties)),
            &column(events, |event| number(event.event_time_ms)),
            &column(events, |event| event.deliver_at_ms),
            &column(events, |event| event.commit_lsn.to_string()),
            &column(events, |event| number(event.ordinal)),
            &column(events, |event| event.reason.replace('\0', " ")),
            &column(events, |event| event.hopeless),
            &self.order,
            &self.block,
            &self.retry_initial,
            &column(events, seq),
            &column(events, txid),
            &column(events, |event| event.xid.map(i64::from)),
        ];
        client.query(&self.sql(), &with).await
    }

    /// The same with a deadline.
    async fn all_in_time(
        &self,
        client: &impl GenericClient,
        events: &[Straggler],
    ) -> Result<Result<Vec<Row>, tokio_postgres::Error>> {
        let bytes = events.iter().map(|event| event.bytes).sum();
        answered_to(bytes, STORING, async { Ok(self.all(client, events).await) }).await
    }

    /// Where one event cannot be stored as it is, it is stored as well as it can be, and the others as ever.
    async fn one_by_one(
        &self,
        transaction: &mut Transaction<'_>,
        events: &[Straggler],
    ) -> Result<Vec<Row>> {
        let failed = |error| sql_error(STORING, error);
        let mut rows = Vec::new();
        for event in events {
            for event in [event.clone(), event.with_plain_reason(), event.in_ascii()] {
                let savepoint = answered(STORING, async {
                    let savepoint = transaction.savepoint("event").await;
                    savepoint.map_err(failed)
                });
                let savepoint = savepoint.await?;
                let stored = self.all_in_time(&savepoint, std::slice::from_ref(&event));
                match stored.await? {
                    Ok(stored) => {
                        let kept = async { savepoint.commit().await.map_err(failed) };
                        answered(STORING, kept).await?;
                        rows.extend(stored);
                        break;
                    }
                    Err(error) if is_about_a_value(&error) && !event.is_plain() => {
                        let undone = async { savepoint.rollback().await.map_err(failed) };
                        answered(STORING, undone).await?;
                        warn!(
                            ?event,
                            "a straggler cannot be stored as it is, and is stored with escapes: {}",
                            sql_error("store it", error).report()
                        );
                    }
                    Err(error) => return Err(failed(error)),
                }
            }
        }
        Ok(rows)
    }

    /// How many rows of these events' keys hold back later ones. Asked behind an INSERT that found some of the events in the table: a COMMIT whose answer
    /// was not waited for may have stored them after the table was counted.
    async fn holding(
        &self,
        client: &impl GenericClient,
        events: &[Straggler],
    ) -> Result<Vec<(Key, i64)>> {
        const SQL: &str = "
            select k.topic, k.key, (
                select count(*) from walpost.straggler s
                where s.slot = $1 and hashtextextended(s.key, 0) = hashtextextended(k.key, 0)
                      and s.key = k.key and s.topic = k.topic and (s.state <> 'dead' or $4)
            ) from unnest($2::text[], $3::text[]) k(topic, key)";
        let keys = events.iter().filter_map(|event| {
            let topic = event.topic.as_deref()?;
            Some((topic, event.key.as_deref()?))
        });
        let keys: HashSet<(&str, &str)> = keys.collect();
        let (topics, keys): (Vec<&str>, Vec<&str>) = keys.into_iter().unzip();
        let rows = client
            .query(SQL, &[&self.slot, &topics, &keys, &self.block])
            .await
            .map_err(|error| sql_error(STORING, error))?;
        let row = |row: &Row| ((row.get(0), row.get(1)), row.get(2));
        Ok(rows.iter().map(row).collect())
    }
}

impl Straggler {
    /// The same with its reason in ASCII.
    fn with_plain_reason(&self) -> Self {
        Self {
            reason: ascii(&self.reason),
            ..self.clone()
        }
    }

    /// The same with every text in ASCII, where it is not so already as a JSON string; then nothing can be attempted with it.
    fn in_ascii(&self) -> Self {
        let escaped = |text: &Option<String>| {
            let escaped = |text: &String| {
                if is_plain(text) {
                    text.clone()
                } else {
                    ascii_json(text)
                }
            };
            text.as_ref().map(escaped)
        };
        Self {
            id: escaped(&self.id),
            topic: escaped(&self.topic),
            key: escaped(&self.key),
            reason: format!(
                "id, topic or key stand here as a JSON string, because this database cannot hold their characters: {}",
                ascii(&self.reason)
            ),
            hopeless: true,
            ..self.clone()
        }
    }

    fn is_plain(&self) -> bool {
        let names = [&self.id, &self.topic, &self.key];
        names.into_iter().flatten().all(|text| is_plain(text)) && self.reason.is_ascii()
    }
}

/// True when every database can hold it.
fn is_plain(text: &str) -> bool {
    text.is_ascii() && !text.contains('\0')
}

/// True when another value would have been taken: class 22, data exceptions (characters that the database's encoding has not
/// are one), and 54, limits.
fn is_about_a_value(error: &tokio_postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    code.is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
}

pub(super) fn listed(changes: HashMap<Key, i64>) -> Vec<(String, String, i64)> {
    let real = changes.into_iter().filter(|(_, count)| *count != 0);
    real.map(|((topic, key), count)| (topic, key, count))
        .collect()
}

/// As JSON in ASCII, which needs nothing of the database's encoding.
fn ascii_json(value: &impl Serialize) -> String {
    // Texts and lists of texts can always be written.
    ascii(&serde_json::to_string(value).unwrap_or_default())
}

/// Everything else as JSON escapes it.
fn ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            ascii.push(character);
        } else {
            let units = character.encode_utf16(&mut [0; 2]).to_vec();
            ascii.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}
