//! Rows on their way from the server, a batch at a time, and past those that the server cannot send.
//!
//! Input: a cursor WITH HOLD that [`ScanTable`] has declared on a session. Output: [`ScanRow`]s. The server keeps the list of what is
//! to come; here is one row at a time.
//!
//! Of which leaf tables a cursor reads every row is said by the transaction that declares it ([`reconcile::begin_look`]). A leaf table that is
//! attached meanwhile may be in the cursor, and is not among them: it is published twice at worst.

use futures::{StreamExt as _, pin_mut};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use super::coverage::Seen;
use super::reconcile;
use super::rows::{TextAs, is_unconvertible};
use super::table::{ScanRow, ScanTable};
use crate::postgres::sql_error;
use crate::{Error, Result};

/// Rows that one FETCH asks for; between two of them the connection can be used for something else.
const FETCH_ROWS: u32 = 1_000;

impl ScanTable {
    /// Prepares to read the rows of a gap ([`gap_condition`](reconcile::gap_condition)), behind `after`, in the order of `seq`, and ends the
    /// transaction that [`reconcile::begin_look`] began. Gives those of `seen` that it reads.
    ///
    /// The server makes the list now: this takes as long as one walk over the table's part that the gap's snapshots leave.
    pub async fn open<'a>(
        &'a self,
        client: &'a Client,
        gap: &str,
        (after, seen): (i64, &Seen),
    ) -> Result<(Rows<'a>, Seen)> {
        let clause = format!("WHERE o.seq > {after} AND {gap} ORDER BY o.seq");
        let declared = client.batch_execute(&self.declare(&clause)).await;
        declared.map_err(|error| sql_error(&format!("scan table {}", self.name), error))?;
        let seen = reconcile::end_look(client, &self.name, seen).await?;
        let rows = Rows::new(self, client, Some((clause, Vec::new())));
        Ok((rows, seen))
    }

    /// Prepares to read the rows that `clause` (`WHERE … ORDER BY o.seq`) chooses, with its parameters.
    pub async fn open_chosen<'a>(
        &'a self,
        client: &'a Client,
        clause: &str,
        parameters: &[&'a (dyn ToSql + Sync)],
    ) -> Result<Rows<'a>> {
        self.make_list(client, clause, parameters).await?;
        let again = (clause.to_owned(), parameters.to_vec());
        Ok(Rows::new(self, client, Some(again)))
    }

    /// The same in any order. A row that the server cannot convert to UTF-8 is an error then.
    pub async fn open_unordered<'a>(
        &'a self,
        client: &'a Client,
        clause: &str,
        parameters: &[&'a (dyn ToSql + Sync)],
    ) -> Result<Rows<'a>> {
        self.make_list(client, clause, parameters).await?;
        Ok(Rows::new(self, client, None))
    }

    async fn make_list(
        &self,
        client: &Client,
        clause: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<()> {
        let made = client.execute(&self.declare(clause), parameters).await;
        made.map_err(|error| sql_error(&format!("read table {}", self.name), error))?;
        Ok(())
    }
}

/// Ends a transaction that failed; without one it does nothing.
pub async fn abandon(client: &Client) {
    let _session_is_gone = client.batch_execute("ROLLBACK").await;
}

/// Who takes rows, and has other things to do while the server is waited for.
pub(super) trait Taker {
    /// Takes a row; may wait as long as it likes: nothing is read ahead of it beyond the sockets' buffers.
    async fn take(&mut self, row: ScanRow) -> Result<()>;

    /// Does what else there is to do while the server is waited for, for ever. Cancel safe.
    async fn serve(&mut self) -> Error;
}

/// One that has nothing else to do.
struct Idle<F>(F);

impl<F: AsyncFnMut(ScanRow) -> Result<()>> Taker for Idle<F> {
    async fn take(&mut self, row: ScanRow) -> Result<()> {
        (self.0)(row).await
    }

    async fn serve(&mut self) -> Error {
        std::future::pending().await
    }
}

/// Waits for the server while the taker serves others.
async fn served<T>(taker: &mut impl Taker, answer: impl Future<Output = T>) -> Result<T> {
    tokio::select! {
        biased;
        answer = answer => Ok(answer),
        error = taker.serve() => Err(error),
    }
}

/// What [`ScanTable::open`] prepared.
pub struct Rows<'a> {
    table: &'a ScanTable,
    client: &'a Client,
    /// The FETCH.
    fetch: Option<Statement>,
    /// How rows of the list are found again, if they are in the order of `seq`: the clause, and its parameters.
    again: Option<(String, Vec<&'a (dyn ToSql + Sync)>)>,
    /// How many rows of the list are done.
    done: u64,
    /// The last row's `seq`, and how its text was asked for.
    last: i64,
    last_as: TextAs,
    /// Behind a row that was isolated: the next row's `seq`.
    next: Option<i64>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(
        table: &'a ScanTable,
        client: &'a Client,
        again: Option<(String, Vec<&'a (dyn ToSql + Sync)>)>,
    ) -> Self {
        Self {
            table,
            client,
            fetch: None,
            again,
            done: 0,
            last: i64::MIN,
            last_as: TextAs::Utf8,
            next: None,
        }
    }

    /// Gives the next rows to `take`, one by one; false when there were none left. `take` may wait as long as it likes:
    /// nothing is read ahead of it beyond the sockets' buffers.
    pub async fn next(&mut self, take: impl AsyncFnMut(ScanRow) -> Result<()>) -> Result<bool> {
        self.next_for(Idle(take)).await
    }

    /// The same for a taker that has other things to do.
    pub(super) async fn next_for(&mut self, mut taker: impl Taker) -> Result<bool> {
        let table = self.table;
        let failed = |error| sql_error(&format!("scan table {}", table.name), error);
        let fetch = if let Some(fetch) = &self.fetch {
            fetch
        } else {
            // Prepared: a simple query would bring text.
            let sql = format!("FETCH {FETCH_ROWS} FROM walpost_rows");
            let prepared = self.client.prepare(&sql).await.map_err(failed)?;
            self.fetch.insert(prepared)
        };
        let asking = self.client.query_raw::<_, i64, _>(fetch, []);
        let rows = served(&mut taker, asking).await?.map_err(failed)?;
        let mut any = false;
        let refused = {
            pin_mut!(rows);
            loop {
                match served(&mut taker, rows.next()).await? {
                    None => break None,
                    Some(Ok(row)) => {
                        any = true;
                        let row = table.row(&row, TextAs::Utf8)?;
                        self.check_next(Some(row.seq))?;
                        self.done += 1;
                        (self.last, self.last_as) = (row.seq, TextAs::Utf8);
                        taker.take(row).await?;
                    }
                    Some(Err(error)) => break Some(error),
                }
            }
        };
        match refused {
            None => {
                if !any {
                    self.check_next(None)?;
                }
                Ok(any)
            }
            Some(error) if is_unconvertible(&error) && self.again.is_some() => {
                if let Some(row) = self.isolate(failed(error)).await? {
                    taker.take(row).await?;
                }
                Ok(true)
            }
            Some(error) => Err(failed(error)),
        }
    }

    /// The server cannot convert the row behind the last one to UTF-8: goes on behind it, and gives it as it is held. `None`: it
    /// is gone meanwhile.
    ///
    /// A FETCH that fails has moved the cursor to its own end. But rows arrive in order up to the one that fails, so their number
    /// says which it is. It is looked for by `seq`. So no two rows may have the number of the last one, or of the one that is found in its
    /// place. And what is found must be what comes: a table that is attached meanwhile has rows that are not in the list.
    async fn isolate(&mut self, why: Error) -> Result<Option<ScanRow>> {
        let table = self.table;
        let failed = |error| sql_error(&format!("scan table {}", table.name), error);
        self.done += 1;
        let go_on = format!("MOVE ABSOLUTE {} FROM walpost_rows", self.done);
        self.client.batch_execute(&go_on).await.map_err(failed)?;
        let Some((clause, parameters)) = &self.again else {
            return Err(why);
        };
        let select = async |columns: String, rows: String, limit: u32| {
            let sql = format!(
                "SELECT {columns} FROM (SELECT o.* FROM {} o {clause}) o WHERE {rows} ORDER BY o.seq LIMIT {limit}",
                table.name,
            );
            self.client.query(&sql, parameters).await
        };
        let behind = |seq: i64| format!("o.seq > {seq}");
        let refuse_twice =
            async |seq: i64, text| match select(table.columns(text), format!("o.seq = {seq}"), 2)
                .await
            {
                Ok(rows) if rows.len() < 2 => Ok(()),
                Err(error) if !is_unconvertible(&error) => Err(failed(error)),
                _ => Err(table.told_twice(seq)),
            };
        refuse_twice(self.last, self.last_as).await?;
        let found = match select(table.columns(TextAs::Utf8), behind(self.last), 1).await {
            Err(error) if is_unconvertible(&error) => {
                let rows = select(table.columns(TextAs::Held), behind(self.last), 1).await;
                let row = rows.map_err(failed)?.pop();
                row.map(|row| table.row(&row, TextAs::Held)).transpose()?
            }
            Err(error) => return Err(failed(error)),
            // That is the next one: it comes by itself.
            Ok(rows) => {
                if let Some(row) = rows.first() {
                    refuse_twice(table.row(row, TextAs::Utf8)?.seq, TextAs::Utf8).await?;
                }
                None
            }
        };
        let last = found.as_ref().map_or(self.last, |row| row.seq);
        let next = select("o.seq::pg_catalog.text".to_owned(), behind(last), 1).await;
        let next = next.map_err(failed)?.pop();
        let next = next.and_then(|row| row.get::<_, &str>(0).parse().ok());
        self.next = next;
        if found.is_some() {
            (self.last, self.last_as) = (last, TextAs::Held);
        }
        Ok(found)
    }

    /// Refuses to go on at this row, or at the end, where a row that must come before was passed over.
    fn check_next(&mut self, seq: Option<i64>) -> Result<()> {
        let Some(next) = self.next else { return Ok(()) };
        match seq {
            // It was deleted meanwhile.
            Some(seq) if seq < next => return Ok(()),
            Some(seq) if seq == next => {
                self.next = None;
                return Ok(());
            }
            _ => {}
        }
        let name = &self.table.name;
        Err(Error::temporary(format!(
            "table {name} changed while it was read, and rows from seq {next} on are not in the list: it is read again"
        ))
        .hint("attach partitions while no scan runs, if this goes on"))
    }

    /// Forgets what the server still keeps.
    pub async fn close(self) -> Result<()> {
        let closed = self.client.batch_execute("CLOSE walpost_rows").await;
        closed.map_err(|error| sql_error("end the scan", error))
    }
}
