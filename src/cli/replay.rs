//! `walpost replay`: publishes delivered rows again, chosen by id, key, topic or time, for a consumer that lost what it had.
//!
//! Input: the outbox tables. Output: without `--execute` a line for each row that would be sent, and nothing else; with it
//! the messages, and a report once every one of them has its receipt.
//!
//! # What is sent
//!
//! The message of the row as the stream made it, to the topic that it goes to by the present settings, with no property
//! added: properties are the row's, and a consumer that looks at `id` must find the same message. That it is a repeat says
//! the producer's name (`…-replay-…`), by which `walpost verify` knows it too. That name is new each time, so deduplication on
//! the broker's side takes nothing for a repeat, and the stream's sequence ids are not touched. Repeats of one key are in the
//! order of `seq`, behind everything that the topic already has.
//!
//! # What is not
//!
//! Rows that are not in the delivered snapshot: the stream brings them, and they would stand before their time. Stragglers:
//! `walpost stragglers retry` is for them, and their place in the order of their key is kept.
//!
//! Memory: as the stream's, bounded by `WALPOST_MAX_IN_FLIGHT_BYTES`; rows are read as fast as they are sent.

mod sender;

use std::collections::HashSet;
use std::io::Write;

use clap::{Arg, ArgMatches};
use serde_json::json;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

use super::verify::{check_has_time, delivered, described, milliseconds, time_args};
use super::{print, switch};
use crate::config::Config;
use crate::outbox::{Extractor, OutboxEvent, Scratch, TopicTemplate};
use crate::postgres::{connect_sql, quote_ident, refuse_row_security, sql_error, sqlstate};
use crate::scanner::outbox::OutboxTable;
use crate::scanner::rows::printed;
use crate::scanner::table::{ScanRow, ScanTable};
use crate::{Error, Result};
use sender::Sender;

/// What a producer's name has of it; [`super::verify`] looks for it.
pub(super) const MARK: &str = "-replay-";
/// Which rows: all that fit everything that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Message id.
    pub id: Option<String>,
    /// Message key.
    pub key: Option<String>,
    /// Full name of the topic.
    pub topic: Option<String>,
    /// Created at or after this.
    pub from: Option<String>,
    /// Created before this.
    pub to: Option<String>,
    /// Really send them.
    pub execute: bool,
    /// A JSON object a line.
    pub json: bool,
}

pub(super) fn subcommand() -> clap::Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    clap::Command::new("replay")
        .about("Publish delivered rows again; without --execute only say which")
        .after_help(
            "--id, --key, --topic (here: a topic's name; the template is WALPOST_TOPIC), --from and --to say which; only what \
             fits all of them is meant.",
        )
        .arg(option("id", "ID", "only the row of this message id"))
        .arg(option("key", "KEY", "only rows of this message key"))
        .args(time_args())
        .arg(switch("execute").visible_alias("yes").help("send them; without this nothing is sent"))
        .arg(switch("json").help("a JSON object a line"))
}

pub(super) fn options(matches: &ArgMatches) -> Options {
    let given = |name: &str| matches.get_one::<String>(name).cloned();
    Options {
        id: given("id"),
        key: given("key"),
        topic: given("topic").map(super::full_topic),
        from: given("from"),
        to: given("to"),
        execute: matches.get_flag("execute"),
        json: matches.get_flag("json"),
    }
}

/// Runs the command and gives its exit code.
pub async fn run(config: &Config, options: &Options, out: &mut dyn Write) -> Result<u8> {
    check(options, config)?;
    let client = connect_sql(&config.postgres, "walpost replay").await?;
    refuse_row_security(&client, &config.outbox_tables).await?;
    // For the error that says what is allowed.
    milliseconds(&client, "--from", options.from.as_deref()).await?;
    milliseconds(&client, "--to", options.to.as_deref()).await?;
    let upto = delivered(&client, &config.slot).await?;
    let mut replay = Replay {
        options,
        upto,
        has_stragglers: has_stragglers(&client).await?,
        sender: if options.execute {
            Some(Sender::connect(config, &client).await?)
        } else {
            None
        },
        found: 0,
        topics: HashSet::new(),
        out,
    };
    let mut left = Left::default();
    for number in 0..config.outbox_tables.len() {
        let it = Box::pin(replay.table(&client, config, number)).await?;
        left.pending += it.pending;
        left.stragglers += it.stragglers;
    }
    replay.end(left).await
}

/// Nothing chosen is not everything: that would be a slip with consequences.
fn check(options: &Options, config: &Config) -> Result<()> {
    let chosen = [
        &options.id,
        &options.key,
        &options.topic,
        &options.from,
        &options.to,
    ];
    if chosen.iter().all(|option| option.is_none()) {
        return Err(Error::config(
            "nothing says which rows are meant; allowed: --id, --key, --topic, --from, --to, one or several of them",
        ));
    }
    match &options.topic {
        Some(topic) if is_template(topic, &config.topic) => Err(Error::config(format!(
            "--topic is {topic:?}, a template; for this command it names the topic whose rows are meant"
        ))
        .hint("set the template with the env var WALPOST_TOPIC")),
        _ => Ok(()),
    }
}

/// Whether `topic` names columns as the template in use does. (A topic's own name may have braces.)
fn is_template(topic: &str, used: &TopicTemplate) -> bool {
    TopicTemplate::parse(topic).is_ok_and(|template| {
        let mut columns = template.placeholders();
        columns.any(|column| used.placeholders().any(|used| used == column))
    })
}

async fn has_stragglers(client: &Client) -> Result<bool> {
    let sql = "SELECT to_regclass('walpost.straggler') IS NOT NULL";
    let row = client.query_one(sql, &[]).await;
    Ok(row
        .map_err(|error| sql_error("look for walpost.straggler", error))?
        .get(0))
}

/// Rows that fit and are not sent.
#[derive(Clone, Copy, Default)]
struct Left {
    pending: i64,
    stragglers: i64,
}

struct Replay<'a> {
    options: &'a Options,
    upto: String,
    has_stragglers: bool,
    sender: Option<Sender>,
    found: u64,
    topics: HashSet<String>,
    out: &'a mut dyn Write,
}

impl Replay<'_> {
    async fn table(&mut self, client: &Client, config: &Config, number: usize) -> Result<Left> {
        let name = &config.outbox_tables[number];
        let mut table = described(client, name).await?;
        let facts = OutboxTable::read(client, name, config).await?;
        let mut extractor = Extractor::new(&table.relation, &config.columns, &config.topic)?;
        if self.options.from.is_some() || self.options.to.is_some() {
            check_has_time(&extractor)?;
        }
        table.read_only_for(&extractor);
        let chosen = self.chosen(config, &facts);
        let (outbox, upto, options) = (name.to_string(), self.upto.clone(), self.options);
        let parameters: [&(dyn ToSql + Sync); 6] = [
            &options.id,
            &options.key,
            &options.from,
            &options.to,
            &upto,
            &outbox,
        ];
        let visible = "pg_visible_in_snapshot(o.txid, $5::text::pg_snapshot)";
        let straggler = self.straggler(&facts);
        let sql = format!(
            "SELECT count(*) FILTER (WHERE NOT {visible}), count(*) FILTER (WHERE {visible} AND {straggler})
             FROM {name} o WHERE {chosen} AND $6::text IS NOT NULL"
        );
        let row = client.query_one(&sql, &parameters).await;
        let row = row.map_err(|error| self.cannot_look(name, error))?;
        let left = Left {
            pending: row.get(0),
            stragglers: row.get(1),
        };
        let clause = format!(
            "WHERE {chosen} AND {visible} AND NOT {straggler} AND $6::text IS NOT NULL ORDER BY o.seq"
        );
        self.rows(client, &table, &mut extractor, (&clause, &parameters))
            .await?;
        Ok(left)
    }

    /// An id that cannot be one is the asker's mistake.
    fn cannot_look(
        &self,
        name: &crate::postgres::TableName,
        error: tokio_postgres::Error,
    ) -> Error {
        let error = sql_error(&format!("look into {name}"), error);
        match (&self.options.id, sqlstate(&error)) {
            (Some(id), Some(code)) if code.starts_with("22") => Error::config(format!(
                "--id is {id:?}, which is no value of the column for the id: {}",
                error.told().0
            )),
            _ => error,
        }
    }

    /// What was asked for; the parameters are those of [`Replay::table`].
    fn chosen(&self, config: &Config, facts: &OutboxTable) -> String {
        let (id, id_type) = (facts.id_column(), &facts.id.sql_type);
        let key = quote_ident(&config.columns.aggregateid);
        // Every parameter stands in it, given or not, so that each has its type.
        let id = match self.options.id {
            Some(_) => format!("o.{id} {} $1::text::{id_type}", facts.id.operator("=")),
            None => "$1::text IS NULL".to_owned(),
        };
        let in_time = match &facts.created_at {
            Some(column) => {
                let time = quote_ident(&column.name);
                format!(
                    "($3::text IS NULL OR o.{time} >= $3::text::timestamptz)
                     AND ($4::text IS NULL OR o.{time} < $4::text::timestamptz)"
                )
            }
            None => "$3::text IS NULL AND $4::text IS NULL".to_owned(),
        };
        let key = printed(&format!("o.{key}"));
        format!("{id} AND ($2::text IS NULL OR {key} = $2::text) AND {in_time}")
    }

    fn straggler(&self, facts: &OutboxTable) -> String {
        if !self.has_stragglers {
            return "false".to_owned();
        }
        facts.is_straggler("$6::text")
    }

    async fn rows(
        &mut self,
        client: &Client,
        table: &ScanTable,
        extractor: &mut Extractor,
        (clause, parameters): (&str, &[&(dyn ToSql + Sync)]),
    ) -> Result<()> {
        let mut rows = table.open_chosen(client, clause, parameters).await?;
        let mut scratch = Scratch::new();
        while rows
            .next(async |row| self.row(extractor, &row, &mut scratch).await)
            .await?
        {}
        rows.close().await
    }

    async fn row(
        &mut self,
        extractor: &mut Extractor,
        row: &ScanRow,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let tuple = row.tuple()?;
        let unusable =
            |error| Error::refused("a row cannot be published").caused_by(Error::from(error));
        let event = extractor.extract(&tuple, scratch).map_err(unusable)?;
        let topic = extractor.topic(&tuple, &event).map_err(unusable)?;
        if self
            .options
            .topic
            .as_ref()
            .is_some_and(|only| only.as_str() != topic)
        {
            return Ok(());
        }
        self.found += 1;
        if !self.topics.contains(topic) {
            self.topics.insert(topic.to_owned());
        }
        match &mut self.sender {
            Some(sender) => sender.send(&event, topic).await,
            None => print(self.out, &line(&event, topic, self.options.json)),
        }
    }

    async fn end(self, left: Left) -> Result<u8> {
        let sent = self.sender.is_some();
        if let Some(mut sender) = self.sender {
            sender.receipts().await?;
        }
        let (found, topics) = (self.found, self.topics.len());
        if self.options.json {
            let (pending, stragglers) = (left.pending, left.stragglers);
            let end = json!({
                "sent": if sent { found } else { 0 }, "chosen": found, "topics": topics,
                "not_delivered_yet": pending, "stragglers": stragglers,
            });
            print(self.out, &format!("{end}\n"))?;
            return Ok(0);
        }
        let mut lines = vec![if sent {
            format!("sent {found} messages to {topics} topics, each has its receipt")
        } else {
            format!("would send {found} messages to {topics} topics; --execute sends them")
        }];
        let (pending, stragglers) = (left.pending, left.stragglers);
        if pending > 0 {
            lines.push(format!(
                "left out {pending} rows that are not delivered yet: the stream brings them"
            ));
        }
        if stragglers > 0 {
            lines.push(format!(
                "left out {stragglers} stragglers: see walpost stragglers"
            ));
        }
        lines.push(String::new());
        let text = lines.join("\n");
        print(self.out, &text)?;
        Ok(0)
    }
}

/// A row as a line, without what belongs to the application.
fn line(event: &OutboxEvent<'_>, topic: &str, as_json: bool) -> String {
    let (id, key) = (event.id, event.aggregateid);
    let bytes = event.payload.map(<[u8]>::len);
    if as_json {
        let object = json!({ "id": id, "key": key, "topic": topic, "payload_bytes": bytes });
        return format!("{object}\n");
    }
    let payload = bytes.map_or("tombstone".to_owned(), |bytes| format!("{bytes} bytes"));
    format!(
        "would send id {id:?} key {key:?} {payload} to {}\n",
        super::shown(topic)
    )
}
