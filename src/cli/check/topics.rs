//! The topics that the tables' rows go to: whether this role may publish there, and whether the payloads are small enough.
//!
//! A producer is opened on each topic and closed again; nothing is sent. (A topic that does not exist is made by that where
//! the broker makes topics on first use, as it would be by the first event.) Which topics: those of the rows that are there,
//! looked for in [`SAMPLE_ROWS`] rows of each table, [`MAX_TOPICS`] at most.

use std::collections::BTreeSet;

use tokio_postgres::Client;

use super::Finding;
use crate::config::Config;
use crate::outbox::{Extractor, Problem, Role, Scratch};
use crate::postgres::{TableName, connect_sql, quote_ident, sql_error, sqlstate};
use crate::pulsar::{ReaderConfig, produce_to};
use crate::scanner::outbox::OutboxTable;
use crate::scanner::table::ScanTable;
use crate::{Error, Result};

/// Topics that are tried.
const MAX_TOPICS: usize = 20;
/// Rows of a table that are looked at: a second, however large the table is.
const SAMPLE_ROWS: usize = 100_000;
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// A finding for each topic that is refused, or one for all; and one for the size of the payloads.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    // A server that is away has its own line.
    let Ok(client) = connect_sql(&config.postgres, "walpost check").await else {
        return Vec::new();
    };
    let looked = look(&client, config).await;
    drop(client);
    let (topics, largest_bytes) = match looked {
        Ok(found) => found,
        Err(error) => return vec![Finding::fail("topics", &error)],
    };
    let reach = ReaderConfig::of(config);
    let produced = Box::pin(produce_to(reach, config.schema.as_ref(), &topics)).await;
    let Ok((max_message_bytes, refusals)) = produced else {
        return Vec::new();
    };
    let mut findings = tried(&topics, &refusals);
    findings.push(size(largest_bytes, max_message_bytes));
    findings
}

fn tried(topics: &[String], refusals: &[Error]) -> Vec<Finding> {
    const CHECK: &str = "topics";
    if topics.is_empty() {
        let none = "no row names a topic yet, so the right to publish was not tried";
        return vec![Finding::ok(CHECK, none)];
    }
    if refusals.is_empty() {
        let text = format!("a producer can be opened on {}", topics.join(", "));
        return vec![Finding::ok(CHECK, text)];
    }
    refusals
        .iter()
        .map(|error| Finding::fail(CHECK, error))
        .collect()
}

fn size(largest_bytes: i64, max_message_bytes: usize) -> Finding {
    const CHECK: &str = "size";
    let largest = usize::try_from(largest_bytes).unwrap_or_default();
    let text = format!(
        "the largest payload has {largest} bytes, a message may have {max_message_bytes} with its properties"
    );
    if largest < max_message_bytes {
        return Finding::ok(CHECK, text);
    }
    Finding::warn(
        CHECK,
        format!("{text}: such events become stragglers"),
        "raise maxMessageSize on the broker (and nettyMaxFrameSizeBytes on the bookies), or WALPOST_COMPRESSION=zstd",
    )
}

/// The topics, and the largest payload.
async fn look(client: &Client, config: &Config) -> Result<(Vec<String>, i64)> {
    let mut topics = BTreeSet::new();
    let mut largest_bytes = 0;
    let mut topic = String::new();
    let rendered = config
        .topic
        .render_into(&mut topic, |_, _| Err(Problem::Null));
    if rendered.is_ok() {
        topics.insert(topic);
    }
    for name in &config.outbox_tables {
        // What is wrong with a table says its own line.
        let (Ok(table), Ok(Some(scan))) = (
            OutboxTable::read(client, name, config).await,
            ScanTable::describe(client, name).await,
        ) else {
            continue;
        };
        match largest(client, config, &table).await {
            Ok(bytes) => largest_bytes = largest_bytes.max(bytes),
            // Streaming takes no right to read it; the line about rights tells what does.
            Err(error) if sqlstate(&error) == Some(INSUFFICIENT_PRIVILEGE) => continue,
            Err(error) => return Err(error),
        }
        of_rows(client, config, name, &scan, &mut topics).await?;
    }
    Ok((topics.into_iter().take(MAX_TOPICS).collect(), largest_bytes))
}

async fn largest(client: &Client, config: &Config, table: &OutboxTable) -> Result<i64> {
    let name = &config.columns.payload;
    let Some(column) = table.columns.iter().find(|column| column.name == *name) else {
        return Ok(0);
    };
    let cast = if column.sql_type == "bytea" {
        ""
    } else {
        "::text"
    };
    let sql = format!(
        "SELECT coalesce(max(octet_length(p{cast})), 0)::int8 FROM (SELECT {} AS p FROM {} LIMIT {SAMPLE_ROWS}) s",
        quote_ident(name),
        table.name
    );
    let row = client.query_one(&sql, &[]).await;
    Ok(row
        .map_err(|error| sql_error("look for the largest payload", error))?
        .get(0))
}

/// Adds the topics of one row of each kind: rows that agree in every column that routing looks at go to one topic.
async fn of_rows(
    client: &Client,
    config: &Config,
    name: &TableName,
    table: &ScanTable,
    topics: &mut BTreeSet<String>,
) -> Result<()> {
    let mut extractor = Extractor::new(&table.relation, &config.columns, &config.topic)?;
    let own = config.columns.name(Role::Topic);
    let own = table.relation.position(own).map(|_| own);
    let columns: BTreeSet<&str> = config
        .topic
        .columns_used(&config.columns)
        .chain(own)
        .collect();
    let columns: Vec<String> = columns.into_iter().map(quote_ident).collect();
    if columns.is_empty() {
        return Ok(());
    }
    let columns = columns.join(", ");
    let clause = format!(
        "WHERE (o.tableoid, o.ctid) IN (
             SELECT DISTINCT ON ({columns}) t, c
             FROM (SELECT tableoid AS t, ctid AS c, {columns} FROM {name} LIMIT {SAMPLE_ROWS}) s
             ORDER BY {columns}
             LIMIT {MAX_TOPICS})"
    );
    let mut rows = table.open_unordered(client, &clause, &[]).await?;
    let mut scratch = Scratch::new();
    let take = async |row: crate::scanner::table::ScanRow| {
        let tuple = row.tuple()?;
        // A row that cannot be an event is a straggler's matter.
        if let Ok(event) = extractor.extract(&tuple, &mut scratch)
            && let Ok(topic) = extractor.topic(&tuple, &event)
            && !topics.contains(topic)
        {
            topics.insert(topic.to_owned());
        }
        Ok(())
    };
    rows.next(take).await?;
    rows.close().await
}
