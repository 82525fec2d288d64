//! Stragglers as they are read to become messages again: in pages that are bounded by bytes.

use tokio_postgres::Row;

use super::straggler_store::{Key, Store};
use crate::Result;
use crate::outbox::RowNumber;
use crate::postgres::sql_error;

/// Heads that one page has, and rows behind each that follow once it was published.
const HEADS: i64 = 500;
const RUN: i64 = 100;
/// What the rows of a page hold together, the last of them not counted: one row may be larger than that by itself. A sixth of
/// the default of `WALPOST_MAX_IN_FLIGHT_BYTES`; a page is there twice for a moment, as it came and as it is used.
pub(super) const PAGE_BYTES: usize = 4 * 1024 * 1024;
const PAGE_BYTES_SQL: i64 = 4 * 1024 * 1024;

/// A straggler as the table has it.
pub(crate) struct Stored {
    pub(crate) number: i64,
    pub(crate) id: Option<String>,
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) payload: Option<Vec<u8>>,
    /// `None` when it is no list of pairs of texts.
    pub(crate) properties: Option<Vec<(String, String)>>,
    pub(crate) event_time_ms: i64,
    pub(crate) deliver_at_ms: Option<i64>,
    pub(crate) reason: String,
    pub(crate) attempts: i32,
    pub(crate) is_dead: bool,
    /// Its table.
    pub(crate) outbox: String,
    /// Which of the table's rows with its id it is.
    pub(crate) row_number: RowNumber,
    /// And its `txid`; where that was not stored, the transaction that brought it.
    pub(crate) row_txid: Option<u64>,
    /// Of its properties, as the table has them.
    properties_bytes: usize,
}

impl Stored {
    /// What it counts in a page.
    pub(crate) fn bytes(&self) -> usize {
        self.payload.as_ref().map_or(0, Vec::len) + self.properties_bytes
    }
}

impl Store {
    /// A page of the heads that are due, those in `busy` left out; and of dead ones of which a copy is due, if copies are
    /// wanted. A row behind one that holds it back is no head, whatever its state: a command may have revived that one.
    pub(crate) async fn due(&mut self, busy: &[i64], copies: bool) -> Result<Vec<Stored>> {
        // Rows that a command has in hand are left to it.
        let sql = "
            with due as materialized (
                select number, id, topic, key, payload, properties::text, event_time_ms, deliver_at_ms, reason, attempts,
                       state = 'dead' as is_dead, outbox, next_attempt_at, {NUMBER}
                from walpost.straggler s
                where slot = $1 and state <> 'parked' and next_attempt_at <= now() and number <> all($2)
                      and (state = 'retrying' or $3 and dead_letter_at is null)
                      and (state = 'dead' or not $5 or not exists (
                          select from walpost.straggler e
                          where e.slot = $1 and hashtextextended(e.key, 0) = hashtextextended(s.key, 0)
                                and e.key = s.key and e.topic = s.topic and e.number < s.number and (e.state <> 'dead' or $6)
                      ))
                order by next_attempt_at, number limit $4
                for update of s skip locked
            ), page as (
                select *, sum(coalesce(octet_length(payload), 0) + octet_length(properties)) over (
                              order by next_attempt_at, number rows between unbounded preceding and 1 preceding
                          ) as before
                from due
            )
            select number, id, topic, key, payload, properties, event_time_ms, deliver_at_ms, reason, attempts, is_dead, outbox,
                   row_seq, row_txid, xid
            from page where coalesce(before, 0) < $7 order by next_attempt_at, number";
        let (slot, order, block) = (self.slot.clone(), self.keep_key_order, self.dead_block);
        let rows = self
            .rows_of(
                "look for stragglers that are due",
                &self.with_number(sql),
                &[
                    &slot,
                    &busy,
                    &copies,
                    &HEADS,
                    &order,
                    &block,
                    &PAGE_BYTES_SQL,
                ],
            )
            .await?;
        rows.iter().map(stored).collect()
    }

    /// A page of what stands behind heads that were published: each key's next ones, in order, up to one that holds back the
    /// others: it waits for its time, or is dead and blocks.
    pub(crate) async fn next_of(&mut self, keys: &[Key]) -> Result<Vec<Stored>> {
        let sql = "
            with next as materialized (
                select r.* from unnest($2::text[], $3::text[]) k(topic, key) cross join lateral (
                    select number, id, topic, key, payload, properties::text, event_time_ms, deliver_at_ms, reason, attempts,
                           false as is_dead, outbox, {NUMBER}, state = 'dead' or state = 'retrying' and next_attempt_at > now() as holds
                    from walpost.straggler s
                    where s.slot = $1 and hashtextextended(s.key, 0) = hashtextextended(k.key, 0)
                          and s.key = k.key and s.topic = k.topic and (s.state <> 'dead' or $5)
                    order by number limit $4
                ) r
            ), free as (
                select *, bool_or(holds) over (partition by topic, key order by number) as is_held from next
            ), page as (
                select *, sum(coalesce(octet_length(payload), 0) + octet_length(properties)) over (
                              order by number rows between unbounded preceding and 1 preceding
                          ) as before
                from free where not is_held
            )
            select number, id, topic, key, payload, properties, event_time_ms, deliver_at_ms, reason, attempts, is_dead, outbox,
                   row_seq, row_txid, xid
            from page where coalesce(before, 0) < $6 order by number";
        let topics: Vec<&str> = keys.iter().map(|(topic, _)| topic.as_str()).collect();
        let names: Vec<&str> = keys.iter().map(|(_, key)| key.as_str()).collect();
        let (slot, block) = (self.slot.clone(), self.dead_block);
        let rows = self
            .rows_of(
                "look for a key's next stragglers",
                &self.with_number(sql),
                &[&slot, &topics, &names, &RUN, &block, &PAGE_BYTES_SQL],
            )
            .await?;
        rows.iter().map(stored).collect()
    }

    /// A table that an earlier version made has no columns for the row's number.
    fn with_number(&self, sql: &str) -> String {
        let columns = if self.has_numbers {
            "row_seq, row_txid"
        } else {
            "null::int8 as row_seq, null::int8 as row_txid"
        };
        let xid = if self.has_xid {
            "xid"
        } else {
            "null::int8 as xid"
        };
        sql.replace("{NUMBER}", &format!("{columns}, {xid}"))
    }
}

fn stored(row: &Row) -> Result<Stored> {
    let get = |error| sql_error("read a straggler", error);
    let properties: &str = row.try_get(5).map_err(get)?;
    Ok(Stored {
        number: row.try_get(0).map_err(get)?,
        id: row.try_get(1).map_err(get)?,
        topic: row.try_get(2).map_err(get)?,
        key: row.try_get(3).map_err(get)?,
        payload: row.try_get(4).map_err(get)?,
        properties: serde_json::from_str(properties).ok(),
        properties_bytes: properties.len(),
        event_time_ms: row.try_get(6).map_err(get)?,
        deliver_at_ms: row.try_get(7).map_err(get)?,
        reason: row.try_get(8).map_err(get)?,
        attempts: row.try_get(9).map_err(get)?,
        is_dead: row.try_get(10).map_err(get)?,
        outbox: row.try_get(11).map_err(get)?,
        row_txid: {
            let txid: Option<i64> = row.try_get(13).map_err(get)?;
            let xid: Option<i64> = row.try_get(14).map_err(get)?;
            // With a number and without a txid its table had none then.
            let seq: Option<i64> = row.try_get(12).map_err(get)?;
            let txid = txid.or(xid.filter(|_| seq.is_none()));
            txid.and_then(|txid| u64::try_from(txid).ok())
        },
        row_number: match (row.try_get(12).map_err(get)?, row.try_get(13).map_err(get)?) {
            (Some(seq), _) => RowNumber::Seq(seq),
            (None, Some(txid)) => RowNumber::Txid(txid),
            (None, None) => RowNumber::Unknown,
        },
    })
}
