//! `walpost verify`: proves that every delivered row of the outbox has its message, once, in order.
//!
//! Input: the delivered snapshot, the stragglers, the outbox tables, the topics that their rows go to; read in this order.
//! Output: a report and exit code 0 (all good) or 1 (something is wrong). Nothing is changed: the topics are read without a
//! cursor ([`crate::pulsar::Reader`]), so no consumer notices.
//!
//! # What is proven
//!
//! A row that is visible in the delivered snapshot had its receipt, or was stored as a straggler, before that snapshot was
//! stored. The stragglers are read after it, the topics last; so such a row is a straggler that was seen, or its message is in
//! the topic. What is looked for:
//!
//! * **missing**: the topic that the row goes to by the present settings has no message with its id;
//! * **duplicate**: it has more than one (copies that `walpost replay` sent are counted apart);
//! * **different**: payload or key is another. "The same" means the bytes of the payload column as they are published: the
//!   text of `json`, `jsonb` and `text`, the bytes of `bytea`; a NULL is a tombstone, and not the same as no bytes;
//! * **out of order**: first messages of one key, one table, one partition that do not stand in the order of `seq`. That is
//!   the order of commits wherever a key's writers wait for each other (a lock on the business row). Where they do not,
//!   `seq` is drawn before the commit, and two transactions that overlapped may be told here although each is where it
//!   belongs; no table can say which committed first;
//! * **dead**: a straggler that is not tried any more. (One that is, is told and no fault.)
//!
//! Messages without a row are told and no fault either: rows are deleted by retention and in mode `delete`, and rows may be
//! committed and published while this reads.
//!
//! # Memory
//!
//! An external sort ([`sorter`]) by id, and then by key, each with [`BUDGET_BYTES`]. (A merge of the two streams would need
//! a window: a topic is in order key by key only, and a message may stand any distance behind its neighbours in the table,
//! after an outage of its topic, say. No window is a bound for that; a sort needs none.) Besides: one page of rows, a few
//! entries of a topic, the names of the topics, at most [`MAX_TOPICS`].

mod judge;
mod progress;
mod record;
mod report;
mod snapshot;
mod sorter;
mod topics;

use std::io::Write;

use clap::{Arg, ArgMatches};
use futures::StreamExt as _;
use tokio_postgres::Client;

use super::{print, switch};
use crate::config::Config;
use crate::outbox::{Extractor, Role, Scratch};
use crate::postgres::{TableName, connect_sql, refuse_row_security, sql_error, sqlstate};
use crate::scanner::cluster;
use crate::scanner::progress as stored;
use crate::scanner::table::{ScanRow, ScanTable};
use crate::{Error, Result};
use judge::{Judge, Range};
use progress::Progress;
use record::{ById, NO_TOPIC, Row, digest_of, digest_of_payload};
use report::Report;
use snapshot::Delivered;
use sorter::Sorter;
use topics::Topics;

/// Memory of each of the two sorts.
const BUDGET_BYTES: usize = 16 * 1024 * 1024;
/// Their names are in memory.
const MAX_TOPICS: usize = 100_000;

/// What to look at, and how to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Rows created at or after this, as Postgres reads a time.
    pub from: Option<String>,
    /// And before this.
    pub to: Option<String>,
    /// Ids that are told of each kind of fault.
    pub show: usize,
    /// As JSON.
    pub json: bool,
}

pub(super) fn subcommand() -> clap::Command {
    clap::Command::new("verify")
        .about(
            "Prove from table and topics that every delivered row has its message, once, in order",
        )
        .after_help("Exit codes: 0 all good; 1 something is wrong; otherwise as everywhere.")
        .args(time_args())
        .arg(
            Arg::new("show")
                .long("show")
                .value_name("COUNT")
                .help("ids that are told of each kind of fault")
                .value_parser(clap::value_parser!(u32).range(0..=10_000))
                .default_value("10"),
        )
        .arg(switch("json").help("print one JSON object instead of lines"))
}

pub(super) fn time_args() -> [Arg; 2] {
    [("from", "created at or after this"), ("to", "created before this")].map(|(name, what)| {
        Arg::new(name).long(name).value_name("TIME").help(format!(
            "only rows {what}: anything that Postgres reads as timestamptz, UTC unless it says otherwise"
        ))
    })
}

pub(super) fn options(matches: &ArgMatches) -> Options {
    let given = |name: &str| matches.get_one::<String>(name).cloned();
    Options {
        from: given("from"),
        to: given("to"),
        show: matches
            .get_one::<u32>("show")
            .map_or(0, |show| *show as usize),
        json: matches.get_flag("json"),
    }
}

/// Runs the command and gives its exit code.
pub async fn run(config: &Config, options: &Options, out: &mut dyn Write) -> Result<u8> {
    let client = connect_sql(&config.postgres, "walpost verify").await?;
    refuse_row_security(&client, &config.outbox_tables).await?;
    let range = Range {
        from_ms: milliseconds(&client, "--from", options.from.as_deref()).await?,
        to_ms: milliseconds(&client, "--to", options.to.as_deref()).await?,
    };
    // In this order: see the module.
    let upto = delivered(&client, &config.slot).await?;
    let mut look = Look {
        delivered: Delivered::parse(&upto)?,
        range,
        topics: Topics::new(&config.topic)?,
        sorter: Sorter::new(BUDGET_BYTES),
        progress: Progress::new(count(&client, &config.outbox_tables).await?),
        record: Vec::new(),
    };
    look.stragglers(&client, config).await?;
    for (number, name) in config.outbox_tables.iter().enumerate() {
        let number = u16::try_from(number).unwrap_or(u16::MAX);
        Box::pin(look.table(&client, config, number, name)).await?;
    }
    drop(client);
    let without_id = Box::pin(look.read_topics(config)).await?;
    look.progress.end();
    let judge = Judge {
        show: options.show,
        oldest_ms: look.topics.oldest_ms(),
        range,
        budget_bytes: BUDGET_BYTES,
    };
    let mut verdict = judge.judge(look.sorter.finish()?)?;
    verdict.unknown.count += without_id;
    let report = Report {
        tables: config
            .outbox_tables
            .iter()
            .map(ToString::to_string)
            .collect(),
        topics: look.topics.len(),
        messages: look.progress.messages(),
        upto,
        verdict,
    };
    let text = if options.json {
        report.json()
    } else {
        report.text()
    };
    print(out, &text)?;
    Ok(report.exit_code())
}

/// A time as Postgres understands it.
pub(super) async fn milliseconds(
    client: &Client,
    option: &str,
    text: Option<&str>,
) -> Result<Option<u64>> {
    let Some(text) = text else {
        return Ok(None);
    };
    let wrong = |why: String| {
        Error::config(format!(
            "{option} is {text:?}, which is no time that rows can have: {why}; allowed: for instance \
             2026-01-31T12:00:00Z, '2026-01-31 12:00+01', yesterday, now"
        ))
    };
    let sql = "SELECT floor(extract(epoch FROM $1::text::timestamptz) * 1000)::float8";
    let row = client.query_one(sql, &[&text]).await;
    let row = row.map_err(|error| match sql_error("read a time", error) {
        // 22: the value is at fault.
        error if sqlstate(&error).is_some_and(|code| code.starts_with("22")) => {
            wrong(error.told().0)
        }
        error => error,
    })?;
    let at: f64 = row.get(0);
    if !at.is_finite() || at < 0.0 {
        return Err(wrong("it is before 1970 or infinite".to_owned()));
    }
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked"
    )]
    Ok(Some(at as u64))
}

/// The snapshot of what is delivered.
pub(super) async fn delivered(client: &Client, slot: &str) -> Result<stored::Snapshot> {
    let progress = stored::read(client, slot).await.map_err(|error| {
        if stored::is_missing(&error) {
            Error::refused("table walpost.progress, which says what is delivered, cannot be read")
                .caused_by(error)
                .hint("walpost init; GRANT USAGE ON SCHEMA walpost and SELECT ON walpost.progress")
        } else {
            error
        }
    })?;
    let nothing = || {
        Error::temporary(format!(
            "nothing is known to be delivered through slot {slot} yet"
        ))
        .hint("start walpost run; WALPOST_SCAN_INTERVAL after the first receipt it is noted")
    };
    let progress = progress.ok_or_else(nothing)?;
    let system_id = cluster::system_id(client).await?;
    cluster::check_cluster(&progress, &system_id, slot)?;
    progress.delivered.ok_or_else(nothing)
}

async fn count(client: &Client, tables: &[TableName]) -> Result<u64> {
    let mut rows = 0;
    for name in tables {
        let sql = format!("SELECT count(*) FROM {name}");
        let row = client.query_one(&sql, &[]).await;
        let row = row.map_err(|error| sql_error(&format!("count the rows of {name}"), error))?;
        rows += u64::try_from(row.get::<_, i64>(0)).unwrap_or_default();
    }
    Ok(rows)
}

/// Describes a table that is to be read; refused without the columns for it.
pub(super) async fn described(client: &Client, name: &TableName) -> Result<ScanTable> {
    ScanTable::describe(client, name).await?.ok_or_else(|| {
        Error::refused(format!(
            "table {name} does not exist, or has no columns txid and seq: which rows are delivered, and in which order, cannot be told"
        ))
        .hint(format!(
            "walpost init; or ALTER TABLE {name} ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(), ADD COLUMN \
             seq bigint GENERATED ALWAYS AS IDENTITY"
        ))
    })
}

/// Refuses a time range for a table whose rows have no time.
pub(super) fn check_has_time(extractor: &Extractor) -> Result<()> {
    if extractor.missing().any(|role| role == Role::CreatedAt) {
        return Err(Error::config(format!(
            "--from and --to need a column for the time of the event, and table {} has none",
            extractor.table()
        ))
        .hint(Role::CreatedAt.env_var()));
    }
    Ok(())
}

/// Everything is noted here.
struct Look {
    delivered: Delivered,
    range: Range,
    topics: Topics,
    sorter: Sorter,
    progress: Progress,
    record: Vec<u8>,
}

impl Look {
    fn note(&mut self, id: &str, what: &ById) -> Result<()> {
        what.encode(id, &mut self.record);
        self.sorter.push(&self.record)
    }

    async fn stragglers(&mut self, client: &Client, config: &Config) -> Result<()> {
        let there = "SELECT to_regclass('walpost.straggler') IS NOT NULL";
        let failed = |error| sql_error("read walpost.straggler", error);
        if !client
            .query_one(there, &[])
            .await
            .map_err(failed)?
            .get::<_, bool>(0)
        {
            return Ok(());
        }
        let sql = "SELECT outbox, id, state = 'dead' FROM walpost.straggler WHERE slot = $1 AND id IS NOT NULL";
        let rows = client
            .query_raw(sql, [&config.slot])
            .await
            .map_err(failed)?;
        futures::pin_mut!(rows);
        while let Some(row) = rows.next().await {
            let row = row.map_err(failed)?;
            let (outbox, id, dead): (&str, &str, bool) = (row.get(0), row.get(1), row.get(2));
            let table = config
                .outbox_tables
                .iter()
                .position(|name| name.to_string() == outbox);
            if let Some(table) = table.and_then(|table| u16::try_from(table).ok()) {
                self.note(id, &ById::Straggler { table, dead })?;
            }
        }
        Ok(())
    }

    async fn table(
        &mut self,
        client: &Client,
        config: &Config,
        number: u16,
        name: &TableName,
    ) -> Result<()> {
        let mut table = described(client, name).await?;
        let mut extractor = Extractor::new(&table.relation, &config.columns, &config.topic)?;
        if self.range != Range::default() {
            check_has_time(&extractor)?;
        }
        table.read_only_for(&extractor);
        let mut scratch = Scratch::new();
        let mut rows = table.open_unordered(client, "", &[]).await?;
        while rows
            .next(async |row| self.row(&mut extractor, number, &row, &mut scratch))
            .await?
        {}
        rows.close().await
    }

    fn row(
        &mut self,
        extractor: &mut Extractor,
        table: u16,
        row: &ScanRow,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.progress.row();
        let tuple = row.tuple()?;
        let is_delivered = row.txid.is_some_and(|txid| self.delivered.contains(txid));
        let mut noted = Row {
            table,
            seq: row.seq,
            judged: false,
            topic: NO_TOPIC,
            created_ms: 0,
            key: record::Digest::default(),
            payload: record::Digest::default(),
            id: String::new(),
        };
        let routed = match extractor.extract(&tuple, scratch) {
            Ok(event) => {
                noted.created_ms = event.event_time_ms;
                noted.key = digest_of(event.aggregateid.as_bytes());
                noted.payload = digest_of_payload(event.payload);
                event.id.clone_into(&mut noted.id);
                extractor.topic(&tuple, &event)
            }
            Err(error) => Err(error),
        };
        if let Ok(topic) = routed {
            noted.topic = self.topics.number(topic)?;
        } else {
            // It can be nothing but a straggler.
            let salvaged = extractor.salvage(&tuple);
            noted.created_ms = salvaged.event_time_ms;
            noted.id = salvaged.id.unwrap_or_default();
        }
        noted.judged = is_delivered && self.range.contains(noted.created_ms);
        let id = std::mem::take(&mut noted.id);
        self.note(&id, &ById::Row(noted))
    }

    /// Reads every topic; gives the number of messages without an id.
    async fn read_topics(&mut self, config: &Config) -> Result<u64> {
        let Self {
            topics,
            sorter,
            progress,
            record,
            range,
            ..
        } = self;
        let mut without_id = 0;
        topics
            .read(config, |found, id| {
                progress.message();
                let Some(id) = id else {
                    without_id += u64::from(range.contains(found.event_ms));
                    return Ok(());
                };
                ById::Message(found).encode(id, record);
                sorter.push(record)
            })
            .await?;
        Ok(without_id)
    }
}
