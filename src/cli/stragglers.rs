//! `walpost stragglers list|retry|discard`: looks after the table of events that could not be published.
//!
//! Input: which ones (message id, topic, state; of the slot in the settings). Output: a line, or a JSON object, for each. `retry` makes
//! them due now, dead ones too; `discard` deletes them for good, after a question. Works while walpost runs, which notices
//! within seconds, and while it does not.
//!
//! What `discard` deletes it notes in `walpost.discarded`, in the same statement: the log, or a scan, may bring the event again
//! ([`crate::scanner::discarded`]). A straggler that is deleted by SQL is not noted, and may come back.
//!
//! In the modes mark and delete a row that is not marked, or still there, is taken for lost and published again. So `discard`
//! marks or deletes the outbox rows of what it deletes, in the same transaction. The mode is the one that `walpost run` has
//! noted in `walpost.after_publish`; where there is no note, that of the settings. Of several rows with the straggler's id it is the one
//! with its number ([`crate::outbox::RowNumber`]), where that was stored, and, in a table with `txid`, of its transaction: numbers and ids may have begun again. If the
//! transaction is not known, no row is marked or deleted. The straggler's row may then be published again, but no other row is lost.

use std::io::{self, IsTerminal as _, Write};

use serde_json::json;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};
use tracing::warn;

use super::{print, shown};
use crate::config::{AfterPublish, Config};
use crate::outbox::ENVELOPE_TABLE;
use crate::postgres::{connect_sql, quote_literal, sql_error, sqlstate};
use crate::scanner::modes::has_table;
use crate::scanner::outbox::{OutboxTable, SEQ, TXID};
use crate::{Error, Result};

/// Rows that are fetched and printed at a time.
const PAGE: i64 = 1000;
/// The table, or a right on it, is missing.
const MISSING: [&str; 3] = ["42P01", "3F000", "42501"];

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Print them.
    List {
        /// As JSON.
        json: bool,
    },
    /// Make them due now.
    Retry,
    /// Delete them.
    Discard {
        /// Without asking.
        yes: bool,
    },
}

/// Which ones: all that fit everything that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Message id.
    pub id: Option<String>,
    /// Full name of the topic.
    pub topic: Option<String>,
    /// `retrying`, `parked` or `dead`.
    pub state: Option<String>,
}

impl Chosen {
    fn is_all(&self) -> bool {
        *self == Self::default()
    }
}

/// The condition of [`Chosen`]; the slot is the first parameter.
const WHERE: &str = "slot = $1 and ($2::text is null or id = $2) and ($3::text is null or topic = $3) and ($4::text is null or state = $4)";

/// Runs the command and gives its exit code.
pub async fn run(
    config: &Config,
    action: Action,
    chosen: &Chosen,
    out: &mut dyn Write,
) -> Result<u8> {
    if matches!(action, Action::Retry | Action::Discard { .. }) && chosen.is_all() {
        return Err(Error::config(
            "nothing says which stragglers are meant; allowed: --id, --topic, --state, one or several of them",
        ));
    }
    let client = connect_sql(&config.postgres, "walpost stragglers").await?;
    let table = Table {
        client,
        slot: &config.slot,
        chosen,
    };
    match action {
        Action::List { json } => table.list(json, out).await?,
        Action::Retry => {
            let count = table.retry(config).await?;
            print(out, &format!("{count} stragglers are due now\n"))?;
        }
        Action::Discard { yes } => {
            let count = table.count().await?;
            if !yes && !ask(count, out)? {
                print(out, "nothing was discarded\n")?;
                return Ok(1);
            }
            let count = table.discard(config).await?;
            print(out, &format!("discarded {count} stragglers\n"))?;
        }
    }
    Ok(0)
}

/// Asks on the terminal; without one the answer is an error that says what to do.
fn ask(count: i64, out: &mut dyn Write) -> Result<bool> {
    if !io::stdin().is_terminal() {
        return Err(Error::config(format!(
            "{count} stragglers would be deleted for good, and there is no terminal to ask; allowed: --yes"
        )));
    }
    print(
        out,
        &format!(
            "delete {count} stragglers for good? Their messages are then never published. [y/N] "
        ),
    )?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(|error| Error::temporary("cannot read the answer").caused_by(error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

struct Table<'a> {
    client: Client,
    slot: &'a str,
    chosen: &'a Chosen,
}

impl Table<'_> {
    fn parameters(&self) -> [&(dyn ToSql + Sync); 4] {
        [
            &self.slot,
            &self.chosen.id,
            &self.chosen.topic,
            &self.chosen.state,
        ]
    }

    /// Makes them due. A dead one among them is then again one that later ones of its key wait behind.
    async fn retry(&self, config: &Config) -> Result<u64> {
        let doing = "retry stragglers";
        let begun = self.client.batch_execute("begin").await;
        begun.map_err(|error| failed(doing, error))?;
        let sql = format!(
            "update walpost.straggler set next_attempt_at = now(), attempts = 0, dead_letter_at = null,
                    state = case state when 'dead' then 'retrying' else state end
             where {WHERE}"
        );
        let done = self.client.execute(&sql, &self.parameters()).await;
        let count = done.map_err(|error| failed(doing, error))?;
        if config.keep_key_order {
            let sql = "
                update walpost.straggler s set state = 'parked' from (
                    select number, row_number() over (partition by topic, key order by number) as place
                    from walpost.straggler
                    where slot = $1 and topic is not null and key is not null and (state <> 'dead' or $2)
                ) line where line.number = s.number and line.place > 1 and s.state = 'retrying'";
            let parameters: [&(dyn ToSql + Sync); 2] = [&self.slot, &config.dead_block];
            let parked = self.client.execute(sql, &parameters).await;
            parked.map_err(|error| failed(doing, error))?;
        }
        let ended = self.client.batch_execute("commit").await;
        ended.map_err(|error| failed(doing, error))?;
        Ok(count)
    }

    async fn count(&self) -> Result<i64> {
        let sql = format!("select count(*) from walpost.straggler where {WHERE}");
        let row = self.client.query_one(&sql, &self.parameters()).await;
        Ok(row
            .map_err(|error| failed("count stragglers", error))?
            .get(0))
    }

    /// Deletes them, notes that, and marks or deletes their rows: one statement, so all of it or nothing.
    async fn discard(&self, config: &Config) -> Result<i64> {
        let doing = "discard stragglers, and mark or delete their rows";
        let mode = self.mode(config).await?;
        let tables = self.tables(config, mode).await?;
        let stragglers = "walpost.straggler";
        let has_numbers = self.has_columns(stragglers, &["row_seq", "row_txid"]);
        let numbers = if has_numbers.await? {
            "row_seq, row_txid"
        } else {
            "null::int8 as row_seq, null::int8 as row_txid"
        };
        let xid = if self.has_columns(stragglers, &["xid"]).await? {
            "xid"
        } else {
            "null::int8 as xid"
        };
        let mut parts = vec![
            format!(
                "gone as (delete from walpost.straggler where {WHERE} returning slot, outbox, id, commit_lsn, ordinal, {numbers}, {xid})"
            ),
            format!(
                "told as (select slot, outbox, id, commit_lsn, ordinal, {} as seq, {} as txid from gone)",
                told(&tables, SEQ),
                told(&tables, TXID)
            ),
            if self.has_columns("walpost.discarded", &["row_txid"]).await? {
                // A scan reads no table without a txid.
                "noted as (insert into walpost.discarded (slot, outbox, id, commit_lsn, ordinal, seq, row_txid)
                           select slot, outbox, id, commit_lsn, ordinal, case when txid is not null then seq end, txid from told)"
                    .to_owned()
            } else {
                "noted as (insert into walpost.discarded (slot, outbox, id, commit_lsn, ordinal, seq)
                           select slot, outbox, id, commit_lsn, ordinal, seq from told)"
                    .to_owned()
            },
        ];
        if mode != AfterPublish::Keep {
            for (number, table) in tables.iter().enumerate() {
                let (name, id) = (&table.name, table.id_column());
                let is_it = format!(
                    "gone.outbox = {} and o.{id} {} gone.id::{} and {}",
                    quote_literal(&name.to_string()),
                    table.id.operator("="),
                    table.id.sql_type,
                    is_the_row(table)
                );
                match mode {
                    AfterPublish::Delete => parts.push(format!(
                        "row_{number} as (delete from {name} o using gone where {is_it})"
                    )),
                    _ if table.has_sent_at => parts.push(format!(
                        "row_{number} as (update {name} o set sent_at = clock_timestamp() from gone where {is_it} and num_nulls(o.sent_at) = 1)"
                    )),
                    _ => {}
                }
            }
        }
        let sql = format!("with {} select count(*) from gone", parts.join(", "));
        let row = self.client.query_one(&sql, &self.parameters()).await;
        Ok(row.map_err(|error| failed(doing, error))?.get(0))
    }

    /// Whether a table of walpost's has these columns: one that an earlier version made may lack them.
    async fn has_columns(&self, table: &str, columns: &[&str]) -> Result<bool> {
        let sql = "select count(*) = cardinality($2::text[]) from pg_attribute
                   where attrelid = to_regclass($1) and attname::text = any ($2::text[]) and not attisdropped";
        let row = self.client.query_one(sql, &[&table, &columns]).await;
        let row = row.map_err(|error| failed(&format!("look at {table}"), error))?;
        Ok(row.get(0))
    }

    /// What becomes of published rows.
    async fn mode(&self, config: &Config) -> Result<AfterPublish> {
        if !has_table(&self.client).await? {
            return Ok(config.after_publish);
        }
        let sql = "select mode from walpost.after_publish where slot = $1";
        let row = self.client.query_opt(sql, &[&self.slot]).await;
        let row = row.map_err(|error| sql_error("read walpost.after_publish", error))?;
        let noted = row.and_then(|row| AfterPublish::parse(row.get(0)).ok());
        Ok(noted.unwrap_or(config.after_publish))
    }

    /// The tables of the settings that these stragglers are rows of.
    async fn tables(&self, config: &Config, mode: AfterPublish) -> Result<Vec<OutboxTable>> {
        let sql = format!("select distinct outbox from walpost.straggler where {WHERE}");
        let rows = self.client.query(&sql, &self.parameters()).await;
        let rows = rows.map_err(|error| failed("look for the stragglers' tables", error))?;
        let mut tables = Vec::new();
        for row in &rows {
            let outbox: &str = row.get(0);
            let mut names = config.outbox_tables.iter();
            match names.find(|name| name.to_string() == outbox) {
                Some(name) => match OutboxTable::read(&self.client, name, config).await {
                    Ok(table) => tables.push(table),
                    // Nothing of it is needed then.
                    Err(error) if mode == AfterPublish::Keep => warn!("{}", error.report()),
                    Err(error) => return Err(error),
                },
                None if outbox == ENVELOPE_TABLE => {}
                None => warn!(
                    "table {outbox} is not in WALPOST_OUTBOX_TABLE: its rows are neither marked nor deleted"
                ),
            }
        }
        Ok(tables)
    }

    /// In pages by number, so that memory stays small however many there are.
    async fn list(&self, as_json: bool, out: &mut dyn Write) -> Result<()> {
        let sql = format!(
            "select number, outbox, id, topic, key, state, reason, attempts, octet_length(payload),
                    commit_lsn::text, to_json(created_at) #>> '{{}}', to_json(next_attempt_at) #>> '{{}}', to_json(dead_letter_at) #>> '{{}}'
             from walpost.straggler where {WHERE} and number > $5 order by number limit $6"
        );
        let mut last: i64 = i64::MIN;
        loop {
            let [slot, id, topic, state] = self.parameters();
            let page = self
                .client
                .query(&sql, &[slot, id, topic, state, &last, &PAGE])
                .await
                .map_err(|error| failed("list stragglers", error))?;
            let Some(end) = page.last() else {
                return Ok(());
            };
            last = end.get(0);
            let lines: Vec<String> = page.iter().map(|row| line(row, as_json)).collect();
            print(out, &lines.concat())?;
        }
    }
}

/// SQL: whether row `o` of the table is the one of a row of `gone`, whose id it has. Where the number of that one is not known and several rows
/// have the id it cannot be told which one it is: none is touched.
fn is_the_row(table: &OutboxTable) -> String {
    let is_one = if table.has_unique_id {
        "true".to_owned()
    } else {
        let id = table.id_column();
        format!(
            "(select count(*) from {} d where d.{id} {} gone.id::{}) = 1",
            table.name,
            table.id.operator("="),
            table.id.sql_type
        )
    };
    let is_it = match table.number {
        // As text: whatever number type the column has.
        Some(number) => format!(
            "case when gone.row_{number} is null then {is_one} else o.{number}::text = gone.row_{number}::text end"
        ),
        None => is_one,
    };
    if table.has_txid {
        // Numbers may have begun again. (One with a seq and without a txid is of a table that had no txid then.)
        format!(
            "{is_it} and ({IS_OF_TRANSACTION} or gone.row_seq is not null and gone.row_txid is null and gone.xid is not null)"
        )
    } else {
        is_it
    }
}

/// SQL: whether row `o` was inserted by the transaction of a row of `gone`: by its `txid`, or where that was not stored by the log's. Where neither is
/// known (an earlier version stored it), no row is: another one with its id may be there by now.
const IS_OF_TRANSACTION: &str = "o.txid::text::int8 = coalesce(gone.row_txid, gone.xid)";

/// SQL: whether row `o` has the number of a row of `gone` in this column, or that was not stored.
fn is_same(column: &str) -> String {
    format!("(gone.row_{column} is null or o.{column}::text = gone.row_{column}::text)")
}

/// SQL: `seq` or `txid` (`column`) of the outbox row of a row of `gone`: as it was stored, or where that can be told quickly and for certain: the
/// table has both columns and an index over the id, and one row with that id and transaction and, if it was stored, that `seq`.
fn told(tables: &[OutboxTable], column: &str) -> String {
    // No max(xid8) before Postgres 16.
    let text = if column == TXID { "::text::int8" } else { "" };
    let tables = tables.iter().filter(|table| table.tells_place());
    let cases = tables.map(|table| {
        format!(
            "when {} then (select case when count(*) = 1 then max(o.{column}{text}) end from {} o where o.{} {} gone.id::{} and {} and {IS_OF_TRANSACTION})",
            quote_literal(&table.name.to_string()),
            table.name,
            table.id_column(),
            table.id.operator("="),
            table.id.sql_type,
            is_same(SEQ)
        )
    });
    let cases: Vec<String> = cases.collect();
    if cases.is_empty() {
        return format!("row_{column}");
    }
    format!(
        "case when row_{column} is not null then row_{column} else case outbox {} end end",
        cases.join(" ")
    )
}

/// One straggler as a line; without payload and properties, which belong to the application.
fn line(row: &Row, as_json: bool) -> String {
    let text = |index: usize| row.get::<_, Option<String>>(index);
    let (number, attempts): (i64, i32) = (row.get(0), row.get(7));
    if as_json {
        let object = json!({
            "number": number, "outbox": text(1), "id": text(2), "topic": text(3), "key": text(4), "state": text(5),
            "reason": text(6), "attempts": attempts, "payload_bytes": row.get::<_, Option<i32>>(8), "commit_lsn": text(9),
            "created_at": text(10), "next_attempt_at": text(11), "dead_letter_at": text(12),
        });
        return format!("{object}\n");
    }
    let or_none = |index: usize| text(index).unwrap_or_else(|| "(none)".to_owned());
    format!(
        "{number} {} id {} topic {} key {} attempts {attempts} since {}: {}\n",
        or_none(5),
        shown(&or_none(2)),
        shown(&or_none(3)),
        shown(&or_none(4)),
        or_none(10),
        shown(&or_none(6).replace('\n', " "))
    )
}

fn failed(doing: &str, error: tokio_postgres::Error) -> Error {
    let error = sql_error(doing, error);
    match sqlstate(&error) {
        Some(code) if MISSING.contains(&code) => error.hint(
            "run walpost init, which makes the tables walpost.straggler and walpost.discarded, or ask their owner for SELECT, UPDATE and DELETE on the one, and INSERT on the other",
        ),
        _ => error,
    }
}
