//! An outbox table read by SQL, its rows in the form in which the stream would bring them.
//!
//! Input: a SQL connection of its own and snapshots. Output: a [`Relation`] as pgoutput describes it, and rows as
//! [`Tuple`]s ([`super::rows`]), so that one extractor reads both. Memory is bounded: rows come one by one, as fast as they are
//! asked for; the server keeps the list of what is to come (a cursor WITH HOLD, so that a long scan holds back no vacuum).

use tokio_postgres::{Client, Row};

use super::numbering::{SEQ_END, number_anew, tell_apart, without_place};
use super::outbox::{SEQ, TXID};
use super::progress::Snapshot;
use super::rows::{Raw, RowReader, TextAs, decode, is_unconvertible, printed};
use crate::outbox::{Extractor, NumberColumn, RowNumber};
use crate::pgoutput::types::{INT2, INT4, INT8, XID8};
use crate::pgoutput::{Relation, Tuple};
use crate::postgres::{TableName, quote_literal, sql_error};
use crate::pulsar::RowKey;
use crate::{Error, Result};

/// Columns in front of those of the [`RowReader`].
const HEAD_COLUMNS: usize = 2;
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
    reader: RowReader,
    /// SQL: the row's `seq`, as `bigint` or, where it is of another type, as text; and its `txid`.
    head: String,
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
    /// The transaction that inserted it.
    pub txid: Option<u64>,
    data: Vec<u8>,
}

impl ScanRow {
    /// Its values.
    pub fn tuple(&self) -> Result<Tuple<'_>> {
        decode(&self.data)
    }
}

impl ScanTable {
    /// Looks at a table; `None` when it does not exist, or lacks `txid` of type `xid8` or a `seq` that is a number, so that it cannot be
    /// scanned. (A domain over such a type will do.)
    pub async fn describe(client: &Client, name: &TableName) -> Result<Option<Self>> {
        let Some((relation, reader)) = RowReader::describe(client, name).await? else {
            return Ok(None);
        };
        let (Some(seq), Some(txid)) = (relation.position(SEQ), relation.position(TXID)) else {
            return Ok(None);
        };
        if relation.columns[txid].type_oid != XID8 {
            return Ok(None);
        }
        let seq = match relation.columns[seq].type_oid {
            INT8 | INT4 | INT2 => format!("o.{SEQ}::pg_catalog.int8"),
            _ => printed(&format!("o.{SEQ}")),
        };
        let head = format!("{seq}, o.{TXID}");
        let sql = "SELECT coalesce(bool_or(attname = $2 AND attidentity = 'a'), false),
                          coalesce(bool_or(attname = $3 AND NOT attnotnull), false),
                          coalesce(bool_or(attname = $2 AND typcategory = 'N'), false)
                   FROM pg_attribute JOIN pg_type t ON t.oid = atttypid WHERE attrelid = $1 AND attname IN ($2, $3)";
        let row = client.query_one(sql, &[&relation.id, &SEQ, &TXID]).await;
        let row = row.map_err(|error| sql_error("look at the outbox table", error))?;
        if !row.get::<_, bool>(2) {
            return Ok(None);
        }
        Ok(Some(Self {
            name: name.clone(),
            relation,
            reader,
            head,
            is_always_identity: row.get(0),
            may_lack_txid: row.get(1),
        }))
    }

    /// Leaves out what `extractor`, which must be one for this table, does not read.
    pub fn read_only_for(&mut self, extractor: &Extractor) {
        self.reader.read_only_for(extractor);
    }

    /// SQL: makes the list of the rows that `clause` chooses of the table under the name `o`.
    pub(super) fn declare(&self, clause: &str) -> String {
        // What is fetched and could not be sent is passed over by going back: see `Rows::isolate`.
        let scroll = if self.reader.converts() {
            "SCROLL"
        } else {
            "NO SCROLL"
        };
        let columns = self.columns(TextAs::Utf8);
        let name = &self.name;
        format!(
            "DECLARE walpost_rows {scroll} CURSOR WITH HOLD FOR SELECT {columns} FROM {name} o {clause}"
        )
    }

    /// SQL: the rows' columns, of the table under the name `o`.
    pub(super) fn columns(&self, text: TextAs) -> String {
        let columns = self.reader.select_list("o", text);
        let comma = if columns.is_empty() { "" } else { ", " };
        format!("{}{comma}{columns}", self.head)
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

    /// Which these rows (SQL) are, with their ids as events have them; `limit` at most.
    pub async fn keys(
        &self,
        client: &Client,
        (id_column, extractor): (&str, &Extractor),
        rows: &str,
        limit: usize,
    ) -> Result<Vec<RowKey>> {
        let mut reader = self.reader.clone();
        let number = extractor.number_column().map_or(TXID, NumberColumn::name);
        let id = self.relation.position(id_column);
        reader.read_only(|index| Some(index) == id);
        let read = async |text| {
            let columns = reader.select_list("o", text);
            let sql = format!(
                "SELECT o.{number}::pg_catalog.text, o.{TXID}::pg_catalog.text, {columns} FROM {} o WHERE {rows} LIMIT {limit}",
                self.name
            );
            client.query(&sql, &[]).await
        };
        let mut text = TextAs::Utf8;
        let mut found = read(text).await;
        if found.as_ref().is_err_and(is_unconvertible) {
            // Ids in ASCII are the same; a row with another one may come twice.
            text = TextAs::Held;
            found = read(text).await;
        }
        let found = found.map_err(|error| sql_error(&format!("look into {}", self.name), error))?;
        let mut keys = Vec::with_capacity(found.len());
        for row in &found {
            let data = reader.encode(row, 2, text)?;
            if let Some(id) = extractor.id(&decode(&data)?) {
                let txid: Option<&str> = row.get(1);
                keys.push(RowKey {
                    id,
                    number: RowNumber::parse(number, row.get(0)),
                    txid: txid.and_then(|txid| txid.parse().ok()),
                });
            }
        }
        Ok(keys)
    }

    pub(super) fn row(&self, row: &Row, text: TextAs) -> Result<ScanRow> {
        let seq = match row.try_get(0) {
            Ok(seq) => seq,
            Err(_) => row
                .try_get::<_, Option<&str>>(0)
                .ok()
                .flatten()
                .and_then(|seq| seq.parse().ok()),
        };
        let seq = seq.ok_or_else(|| {
            Error::refused(format!("a row of {} has no whole number as seq", self.name))
                .hint("rows that were there before the column was added need a value, and NOT NULL")
        })?;
        let txid: Option<Raw<'_>> = row.try_get(1).ok().flatten();
        let txid = txid.and_then(|Raw(bytes)| bytes.try_into().ok());
        Ok(ScanRow {
            seq,
            txid: txid.map(u64::from_be_bytes),
            data: self.reader.encode(row, HEAD_COLUMNS, text)?,
        })
    }
}

/// A table as pgoutput would describe it; `None` when it does not exist.
pub(crate) async fn describe(client: &Client, name: &TableName) -> Result<Option<Relation>> {
    let described = RowReader::describe(client, name).await?;
    Ok(described.map(|(relation, _)| relation))
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
