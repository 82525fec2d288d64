//! An outbox table read by SQL, its rows in the form in which the stream would bring them.
//!
//! Input: a SQL connection of its own and snapshots. Output: a [`Relation`] as pgoutput describes it, and rows as
//! [`Tuple`]s of text, so that one extractor reads both. Memory is bounded: rows come one by one, as fast as they are asked
//! for; the server keeps the list of what is to come (a cursor WITH HOLD, so that a long scan holds back no vacuum).

use futures::{StreamExt as _, pin_mut};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, SimpleQueryMessage, SimpleQueryRow};

use super::numbering::{SEQ_END, number_anew, tell_apart, without_place};
use super::outbox::{SEQ, TXID};
use super::progress::Snapshot;
use crate::outbox::RowNumber;
use crate::pgoutput::{Relation, RelationColumn, Tuple};
use crate::postgres::{TableName, quote_ident, quote_literal, sql_error};
use crate::{Error, Result};

/// Rows that one FETCH asks for; between two of them the connection can be used for something else.
const FETCH_ROWS: u32 = 1_000;
/// SQL: rows that a scan would not see; see [`ScanTable::refuse_unscannable`].
const WITHOUT_TXID: &str = "txid IS NULL";

/// SQL: whether a row's `txid` is one that this cluster has not come to. What a statement sees was committed before its own
/// snapshot ends, so such a row was not inserted here with this `txid`. In the form that the index over `txid` serves.
pub const FROM_ELSEWHERE: &str =
    "txid::text::bigint >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint";

/// The statements for rows that are [`FROM_ELSEWHERE`]. Transaction 3 is the first that a cluster has, so it is visible in
/// every snapshot, `4:4:` included, in which nothing else is.
pub fn mend_from_elsewhere(table: &TableName, slot: &str) -> String {
    mend_txid(
        table,
        slot,
        "txid >= pg_snapshot_xmax(pg_current_snapshot())",
    )
}

/// The same for the rows that this condition chooses.
fn mend_txid(table: &TableName, slot: &str, rows: &str) -> String {
    let slot = quote_literal(slot);
    let slot = slot.trim();
    format!(
        "stop every walpost run of this slot first; to publish them: BEGIN; SET LOCAL walpost.mend = on; UPDATE {table} SET txid = pg_current_xact_id() WHERE {rows}; COMMIT, \
         and after its commit UPDATE walpost.progress SET scan_upto = pg_current_snapshot(), scan_position = NULL WHERE slot = {slot}; if they are published already: \
         BEGIN; SET LOCAL walpost.mend = on; UPDATE {table} SET txid = '3' WHERE {rows}; COMMIT, and UPDATE walpost.progress SET delivered = coalesce(delivered, '4:4:') \
         WHERE slot = {slot}; then start walpost run"
    )
}

/// An outbox table that knows each row's transaction and order.
#[derive(Debug)]
pub struct ScanTable {
    /// Its name.
    pub name: TableName,
    /// Its columns, as pgoutput would describe them.
    pub relation: Relation,
    seq: usize,
    /// Whether `seq` is GENERATED ALWAYS AS IDENTITY.
    is_always_identity: bool,
    /// Whether it leaves a `txid` possible that is NULL.
    may_lack_txid: bool,
}

/// A row that was read.
#[derive(Debug)]
pub struct ScanRow {
    /// Its place in the order of insertion.
    pub seq: i64,
    data: Vec<u8>,
}

impl ScanRow {
    /// Its values.
    pub fn tuple(&self) -> Result<Tuple<'_>> {
        decode(&self.data)
    }
}

impl ScanTable {
    /// Looks at a table; `None` when it does not exist, or lacks `txid` or `seq`, so that it cannot be scanned.
    pub async fn describe(client: &Client, name: &TableName) -> Result<Option<Self>> {
        let Some(relation) = describe(client, name).await? else {
            return Ok(None);
        };
        let (Some(seq), Some(_)) = (relation.position(SEQ), relation.position(TXID)) else {
            return Ok(None);
        };
        let sql = "SELECT coalesce(bool_or(attname = $2 AND attidentity = 'a'), false),
                          coalesce(bool_or(attname = $3 AND NOT attnotnull), false)
                   FROM pg_attribute WHERE attrelid = $1 AND attname IN ($2, $3)";
        let row = client.query_one(sql, &[&relation.id, &SEQ, &TXID]).await;
        let row = row.map_err(|error| sql_error("look at the outbox table", error))?;
        Ok(Some(Self {
            name: name.clone(),
            relation,
            seq,
            is_always_identity: row.get(0),
            may_lack_txid: row.get(1),
        }))
    }

    /// Prepares to read the rows of a gap ([`gap_condition`](super::reconcile::gap_condition)), behind `after`, in the order of `seq`.
    ///
    /// The server makes the list now: this takes as long as one walk over the table's part that the gap's snapshots leave.
    pub async fn open<'a>(&'a self, client: &'a Client, gap: &str, after: i64) -> Result<Rows<'a>> {
        let columns = self.relation.columns.iter();
        let columns: Vec<String> = columns.map(|column| quote_ident(&column.name)).collect();
        let sql = format!(
            "BEGIN;
             DECLARE walpost_rows NO SCROLL CURSOR WITH HOLD FOR
             SELECT {} FROM {} WHERE seq > {after} AND {gap} ORDER BY seq;
             COMMIT",
            columns.join(", "),
            self.name,
        );
        let opened = client.batch_execute(&sql).await;
        opened.map_err(|error| sql_error(&format!("scan table {}", self.name), error))?;
        Ok(Rows {
            table: self,
            client,
        })
    }

    /// Refuses rows that no snapshot of this cluster can tell anything of: a scan would pass them over in silence.
    ///
    /// # Errors
    /// Refused, with the statements for either case.
    pub async fn refuse_from_elsewhere(&self, client: &Client, slot: &str) -> Result<()> {
        let name = &self.name;
        let sql = format!("SELECT count(*) FROM {name} WHERE {FROM_ELSEWHERE}");
        let row = client.query_one(&sql, &[]).await;
        let row = row.map_err(|error| sql_error(&format!("look into {name}"), error))?;
        let count: i64 = row.get(0);
        if count == 0 {
            return Ok(());
        }
        Err(Error::refused(format!(
            "{count} rows of table {name} have a txid that this cluster has not come to: they were copied from another one \
             (a dump, logical replication), and it cannot be told whether they are published"
        ))
        .hint(mend_from_elsewhere(name, slot)))
    }

    /// Refuses rows of the same range as [`Self::open`] that it would pass over in silence: without a place in the order (the scan
    /// begins behind 0), or without a transaction (no snapshot shows them). Costs a walk over that range, which an index over `txid` serves: no definition of the
    /// column rules a `seq` below 1 out.
    ///
    /// # Errors
    /// Refused, with the statements that mend it.
    pub async fn refuse_unscannable(&self, client: &Client, slot: &str, gap: &str) -> Result<()> {
        let name = &self.name;
        let count = async |rows: &str| -> Result<i64> {
            let sql = format!("SELECT count(*) FROM {name} WHERE {rows}");
            let row = client.query_one(&sql, &[]).await;
            let row = row.map_err(|error| sql_error(&format!("look into {name}"), error))?;
            Ok(row.get(0))
        };
        if self.may_lack_txid {
            let rows = count(WITHOUT_TXID).await?;
            if rows > 0 {
                return Err(Error::refused(format!(
                    "{rows} rows of table {name} have no txid: it cannot be told whether they are published"
                ))
                .hint(mend_txid(name, slot, WITHOUT_TXID)));
            }
        }
        let rows = count(&format!("{} AND {gap}", without_place())).await?;
        if rows > 0 {
            return Err(Error::refused(format!(
                "{rows} rows of table {name} have a seq that is NULL or below 1 (or {SEQ_END} and above): their place in the order is not known"
            ))
            .hint(format!(
                "number them in the order in which they are to be published, above all others, for instance: {}; then restart walpost run",
                number_anew(name, self.is_always_identity)
            )));
        }
        Ok(())
    }

    /// The error for two rows that have this number.
    pub fn told_twice(&self, seq: i64) -> Error {
        let name = &self.name;
        Error::refused(format!(
            "two rows of table {name} have the seq {seq}, by which a scan knows where it is"
        ))
        .hint(format!(
            "give all but one a number above all others: {}; then start walpost run again (a UNIQUE constraint on seq keeps this from happening)",
            tell_apart(name, self.is_always_identity, seq)
        ))
    }

    /// Prepares to read the rows that `clause` (`WHERE …`, `ORDER BY …`) chooses, with its parameters.
    pub async fn open_chosen<'a>(
        &'a self,
        client: &'a Client,
        clause: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Rows<'a>> {
        let columns = self.relation.columns.iter();
        let columns: Vec<String> = columns
            .map(|column| format!("o.{}", quote_ident(&column.name)))
            .collect();
        let sql = format!(
            "DECLARE walpost_rows NO SCROLL CURSOR WITH HOLD FOR SELECT {} FROM {} o {clause}",
            columns.join(", "),
            self.name,
        );
        let opened = client.execute(&sql, parameters).await;
        opened.map_err(|error| sql_error(&format!("read table {}", self.name), error))?;
        Ok(Rows {
            table: self,
            client,
        })
    }

    /// Whether there is a row that is visible in `upto` and not in `except`, or one that [`Self::refuse_from_elsewhere`] or
    /// [`Self::refuse_unscannable`] refuses.
    pub async fn any(
        &self,
        client: &Client,
        upto: &Snapshot,
        except: Option<&Snapshot>,
    ) -> Result<bool> {
        // Each by itself, so that each can use its index.
        let mut conditions = vec![between(upto, except)?, FROM_ELSEWHERE.to_owned()];
        if self.may_lack_txid {
            conditions.push(WITHOUT_TXID.to_owned());
        }
        let exist = |rows: &String| format!("EXISTS (SELECT FROM {} WHERE {rows})", self.name);
        let exist: Vec<String> = conditions.iter().map(exist).collect();
        let sql = format!("SELECT {}", exist.join(" OR "));
        let row = client.query_one(&sql, &[]).await;
        let row = row.map_err(|error| sql_error(&format!("look into {}", self.name), error))?;
        Ok(row.get(0))
    }

    /// Ids, as text, and numbers of the rows that are visible in `upto` and not in `except`; `limit` at most.
    pub async fn ids(
        &self,
        client: &Client,
        id_column: &str,
        (upto, except): (&Snapshot, &Snapshot),
        limit: usize,
    ) -> Result<Vec<(String, RowNumber)>> {
        let sql = format!(
            "SELECT {}::text, {SEQ}::text FROM {} WHERE {} LIMIT {limit}",
            quote_ident(id_column),
            self.name,
            between(upto, Some(except))?
        );
        let rows = client.query(&sql, &[]).await;
        let rows = rows.map_err(|error| sql_error(&format!("look into {}", self.name), error))?;
        let found = rows.iter().filter_map(|row| {
            let id: Option<String> = row.get(0);
            Some((id?, RowNumber::parse(SEQ, row.get(1))))
        });
        Ok(found.collect())
    }

    fn row(&self, row: &SimpleQueryRow) -> Result<ScanRow> {
        let seq = row.get(self.seq).and_then(|seq| seq.parse().ok());
        let seq = seq.ok_or_else(|| {
            Error::refused(format!("a row of {} has no whole number as seq", self.name))
                .hint("rows that were there before the column was added need a value, and NOT NULL")
        })?;
        Ok(ScanRow {
            seq,
            data: encode(row),
        })
    }
}

/// A table as pgoutput would describe it; `None` when it does not exist.
pub(crate) async fn describe(client: &Client, name: &TableName) -> Result<Option<Relation>> {
    // A domain counts as what it is made of, as in the stream.
    let sql = "SELECT c.oid, a.attname::text, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, a.atttypmod
               FROM pg_attribute a
               JOIN pg_class c ON c.oid = a.attrelid
               JOIN pg_namespace n ON n.oid = c.relnamespace
               JOIN pg_type t ON t.oid = a.atttypid
               WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped
               ORDER BY a.attnum";
    let rows = client
        .query(sql, &[&name.schema, &name.name])
        .await
        .map_err(|error| sql_error("look at the outbox table", error))?;
    let Some(first) = rows.first() else {
        return Ok(None);
    };
    let column = |row: &Row| RelationColumn {
        flags: 0,
        name: row.get(1),
        type_oid: row.get(2),
        type_modifier: row.get(3),
    };
    Ok(Some(Relation {
        id: first.get(0),
        namespace: name.schema.clone(),
        name: name.name.clone(),
        replica_identity: b'n',
        columns: rows.iter().map(column).collect(),
    }))
}

/// `TupleData`, every value as text.
pub(super) fn encode(row: &SimpleQueryRow) -> Vec<u8> {
    let count = u16::try_from(row.len()).unwrap_or(u16::MAX);
    let mut data = count.to_be_bytes().to_vec();
    for column in 0..row.len() {
        match row.get(column) {
            None => data.push(b'n'),
            Some(text) => {
                data.push(b't');
                let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
                data.extend(length.to_be_bytes());
                data.extend(text.as_bytes());
            }
        }
    }
    data
}

/// What [`encode`] made.
pub(super) fn decode(data: &[u8]) -> Result<Tuple<'_>> {
    Tuple::decode(data)
        .map_err(|error| Error::bug("a row read by SQL cannot be read").caused_by(error))
}

/// "Visible in the one and not in the other", with a bound that the index over `txid` understands.
pub(super) fn between(upto: &Snapshot, except: Option<&Snapshot>) -> Result<String> {
    let upto = literal(upto)?;
    let visible = format!("pg_visible_in_snapshot(txid, {upto})");
    Ok(match except {
        None => visible,
        Some(except) => {
            let except = literal(except)?;
            format!(
                "{visible} AND NOT pg_visible_in_snapshot(txid, {except})
                 AND txid::text::bigint >= pg_snapshot_xmin({except})::text::bigint"
            )
        }
    })
}

/// A snapshot as a literal. They come from Postgres, by way of a table that people can edit.
fn literal(snapshot: &Snapshot) -> Result<String> {
    if snapshot.is_empty()
        || !snapshot
            .bytes()
            .all(|b| b.is_ascii_digit() || b == b':' || b == b',')
    {
        return Err(Error::bug("a snapshot is not of the form xmin:xmax:xip"));
    }
    Ok(format!("'{snapshot}'::pg_snapshot"))
}

/// What [`ScanTable::open`] prepared.
pub struct Rows<'a> {
    table: &'a ScanTable,
    client: &'a Client,
}

impl Rows<'_> {
    /// Gives the next rows to `take`, one by one; false when there were none left. `take` may wait as long as it likes:
    /// nothing is read ahead of it beyond the sockets' buffers.
    pub async fn next(&mut self, mut take: impl AsyncFnMut(ScanRow) -> Result<()>) -> Result<bool> {
        let failed = |error| sql_error(&format!("scan table {}", self.table.name), error);
        let fetch = format!("FETCH {FETCH_ROWS} FROM walpost_rows");
        let stream = self.client.simple_query_raw(&fetch).await.map_err(failed)?;
        pin_mut!(stream);
        let mut any = false;
        while let Some(message) = stream.next().await {
            if let SimpleQueryMessage::Row(row) = message.map_err(failed)? {
                any = true;
                take(self.table.row(&row)?).await?;
            }
        }
        Ok(any)
    }

    /// Forgets what the server still keeps.
    pub async fn close(self) -> Result<()> {
        let closed = self.client.batch_execute("CLOSE walpost_rows").await;
        closed.map_err(|error| sql_error("end the scan", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_that_somebody_edited_never_becomes_sql() {
        assert!(literal(&"10:20:10,14".to_owned()).is_ok());
        for wrong in ["", "1:2:3'; drop table x; --", "10:20:10 14"] {
            assert!(literal(&wrong.to_owned()).is_err(), "{wrong}");
        }
    }
}
