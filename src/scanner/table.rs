//! An outbox table read by SQL, its rows in the form in which the stream would bring them.
//!
//! Input: a SQL connection of its own and snapshots. Output: a [`Relation`] as pgoutput describes it, and rows as
//! [`Tuple`]s of text, so that one extractor reads both. Memory is bounded: rows come one by one, as fast as they are asked
//! for; the server keeps the list of what is to come (a cursor WITH HOLD, so that a long scan holds back no vacuum).

use futures::{StreamExt as _, pin_mut};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use super::progress::Snapshot;
use crate::pgoutput::{Relation, RelationColumn, Tuple};
use crate::postgres::{TableName, quote_ident, sql_error};
use crate::{Error, Result};

/// Rows that one FETCH asks for; between two of them the connection can be used for something else.
const FETCH_ROWS: u32 = 1_000;
const TXID: &str = "txid";
const SEQ: &str = "seq";

/// An outbox table that knows each row's transaction and order.
#[derive(Debug)]
pub struct ScanTable {
    /// Its name.
    pub name: TableName,
    /// Its columns, as pgoutput would describe them.
    pub relation: Relation,
    seq: usize,
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
        Tuple::decode(&self.data)
            .map_err(|error| Error::bug("a row read by SQL cannot be read").caused_by(error))
    }
}

/// Makes a session print values in the form in which the walsender does.
pub async fn print_as_the_stream(client: &Client) -> Result<()> {
    let sql = "SET datestyle TO 'ISO'; SET intervalstyle TO 'postgres'; SET timezone TO 'UTC';
               SET bytea_output TO 'hex'; SET extra_float_digits TO 3";
    let set = client.batch_execute(sql).await;
    set.map_err(|error| sql_error("set up the session", error))
}

impl ScanTable {
    /// Looks at a table; `None` when it lacks `txid` or `seq`, so that it cannot be scanned.
    pub async fn describe(client: &Client, name: &TableName) -> Result<Option<Self>> {
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
        let relation = Relation {
            id: first.get(0),
            namespace: name.schema.clone(),
            name: name.name.clone(),
            replica_identity: b'n',
            columns: rows
                .iter()
                .map(|row| RelationColumn {
                    flags: 0,
                    name: row.get(1),
                    type_oid: row.get(2),
                    type_modifier: row.get(3),
                })
                .collect(),
        };
        let (Some(seq), Some(_)) = (relation.position(SEQ), relation.position(TXID)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            name: name.clone(),
            relation,
            seq,
        }))
    }

    /// Prepares to read the rows that are visible in `upto` and not in `except`, behind `after`, in the order of `seq`.
    ///
    /// The server makes the list now: this takes as long as one walk over the table's part that is not older than `except`.
    pub async fn open<'a>(
        &'a self,
        client: &'a Client,
        upto: &Snapshot,
        except: Option<&Snapshot>,
        after: i64,
    ) -> Result<Rows<'a>> {
        let columns = self.relation.columns.iter();
        let columns: Vec<String> = columns.map(|column| quote_ident(&column.name)).collect();
        let sql = format!(
            "BEGIN;
             DECLARE walpost_rows NO SCROLL CURSOR WITH HOLD FOR
             SELECT {} FROM {} WHERE seq > {after} AND {} ORDER BY seq;
             COMMIT",
            columns.join(", "),
            self.name,
            between(upto, except)?,
        );
        let opened = client.batch_execute(&sql).await;
        opened.map_err(|error| sql_error(&format!("scan table {}", self.name), error))?;
        Ok(Rows {
            table: self,
            client,
        })
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

    /// Whether there is a row that is visible in `upto` and not in `except`.
    pub async fn any(
        &self,
        client: &Client,
        upto: &Snapshot,
        except: Option<&Snapshot>,
    ) -> Result<bool> {
        let sql = format!(
            "SELECT EXISTS (SELECT FROM {} WHERE {})",
            self.name,
            between(upto, except)?
        );
        let row = client.query_one(&sql, &[]).await;
        let row = row.map_err(|error| sql_error(&format!("look into {}", self.name), error))?;
        Ok(row.get(0))
    }

    /// Ids of the rows that are visible in `upto` and not in `except`, as text. For few.
    pub async fn ids(
        &self,
        client: &Client,
        id_column: &str,
        upto: &Snapshot,
        except: &Snapshot,
    ) -> Result<Vec<String>> {
        let sql = format!(
            "SELECT {}::text FROM {} WHERE {}",
            quote_ident(id_column),
            self.name,
            between(upto, Some(except))?
        );
        let rows = client.query(&sql, &[]).await;
        let rows = rows.map_err(|error| sql_error(&format!("look into {}", self.name), error))?;
        Ok(rows.iter().filter_map(|row| row.get(0)).collect())
    }

    fn row(&self, row: &SimpleQueryRow) -> Result<ScanRow> {
        let seq = row.get(self.seq).and_then(|seq| seq.parse().ok());
        let seq = seq.ok_or_else(|| {
            Error::refused(format!("a row of {} has no whole number as seq", self.name))
                .hint("rows that were there before the column was added need a value, and NOT NULL")
        })?;
        let mut data = Vec::new();
        for column in 0..self.relation.columns.len() {
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
        let count = u16::try_from(self.relation.columns.len()).unwrap_or(u16::MAX);
        let data = [&count.to_be_bytes()[..], &data].concat();
        Ok(ScanRow { seq, data })
    }
}

/// "Visible in the one and not in the other", with a bound that the index over `txid` understands.
fn between(upto: &Snapshot, except: Option<&Snapshot>) -> Result<String> {
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
