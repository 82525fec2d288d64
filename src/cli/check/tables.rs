//! What each outbox table can have and what it cannot: columns beyond Debezium's turn on what needs them.

use tokio_postgres::Client;

use super::{Finding, catalog};
use crate::config::{AfterPublish, Config};
use crate::scanner::modes;
use crate::scanner::outbox::{OutboxTable, SENT_AT, SEQ, TXID};
use crate::scanner::sequences;
use crate::{Error, Result};

const CHECK: &str = "table";

/// A finding for each table.
pub(super) async fn check(client: &Client, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in &config.outbox_tables {
        match OutboxTable::read(client, name, config).await {
            Ok(table) => {
                findings.push(finding(&table, config));
                findings.extend(catalog::check(client, &table, config).await);
                findings.extend(ids(&table));
                findings.extend(order(client, &table).await);
            }
            Err(error) => findings.push(Finding::fail(CHECK, &error)),
        }
    }
    if config.after_publish != AfterPublish::Keep {
        findings.extend(
            noted(client, config)
                .await
                .err()
                .map(|error| Finding::fail("mode", &error)),
        );
    }
    findings
}

async fn noted(client: &Client, config: &Config) -> Result<()> {
    if modes::has_table(client).await? {
        return Ok(());
    }
    Err(modes::no_table(config.after_publish))
}

fn finding(table: &OutboxTable, config: &Config) -> Finding {
    if let Err(error) = possible(table, config) {
        return Finding::fail(CHECK, &error);
    }
    let (cannot, mends) = lacks(table, config);
    let name = &table.name;
    if cannot.is_empty() {
        return Finding::ok(CHECK, format!("{name} has what every mode needs"));
    }
    Finding::warn(
        CHECK,
        format!("{name} streams, but cannot have: {}", cannot.join("; ")),
        mends.join(" "),
    )
}

/// An id is what a consumer knows a message by, and a table without `seq` and `txid` has nothing else to tell rows apart.
fn ids(table: &OutboxTable) -> Option<Finding> {
    if table.covers_id {
        return None;
    }
    let (name, id) = (&table.name, table.id_column());
    let apart = match table.number {
        Some(column) => format!("walpost tells rows with the same id apart by {column}"),
        None => {
            "walpost cannot tell rows with the same id apart (there is no seq that is a whole number, and no txid): in the modes mark and delete the receipt of one \
             counts for all"
                .to_owned()
        }
    };
    Some(Finding::warn(
        "ids",
        format!(
            "no unique index of {name} covers {id}: {apart}; consumers take a second message with an id for a repetition of the first"
        ),
        format!(
            "CREATE UNIQUE INDEX CONCURRENTLY ON {name} ({id}); of a partitioned table: on each partition, or with the partition key"
        ),
    ))
}

/// Scans and poll mode read by `seq`.
async fn order(client: &Client, table: &OutboxTable) -> Vec<Finding> {
    const CHECK: &str = "order";
    match sequences::unordered(client, &table.name).await {
        Ok(found) => found
            .iter()
            .map(|sequence| Finding::warn(CHECK, sequence.why(), sequence.mend()))
            .collect(),
        Err(error) => vec![Finding::fail(CHECK, &error)],
    }
}

/// The modes that are asked for.
fn possible(table: &OutboxTable, config: &Config) -> Result<(), Error> {
    table.check_after_publish(config.after_publish)?;
    table.check_row_movement(config)?;
    if config.retention.is_some() {
        table.check_retention(config.after_publish)?;
    }
    Ok(())
}

/// What is off, and what turns it on.
fn lacks(table: &OutboxTable, config: &Config) -> (Vec<String>, Vec<String>) {
    let name = &table.name;
    let (mut cannot, mut mends) = (Vec::new(), Vec::new());
    let mut lack = |what: &str, mend: String| {
        cannot.push(what.to_owned());
        mends.push(mend);
    };
    let add = |definition: &str| table.add_column(definition);
    if !table.has_txid {
        lack(
            "status, gap scan and retention, nor a comparison with what the stream brought (no column txid of type xid8)",
            // Rows that are there get the transaction that adds it: it commits behind theirs, so what is said of it is true of them.
            add(&format!(
                "{TXID} xid8 NOT NULL DEFAULT pg_current_xact_id()"
            )),
        );
    }
    if !table.has_seq {
        lack(
            "a gap scan in the order of insertion (no column seq that is a number)",
            add(&format!("{SEQ} bigint GENERATED ALWAYS AS IDENTITY")),
        );
    }
    if !table.has_sent_at {
        lack(
            "the mode mark (no column sent_at of type timestamptz)",
            add(&format!("{SENT_AT} timestamptz")),
        );
    }
    if table.created_at.is_none() {
        lack(
            "event times, retention and the look for unmarked rows (no column for the time, see WALPOST_COLUMN_CREATED_AT)",
            add("created_at timestamptz NOT NULL DEFAULT clock_timestamp()"),
        );
    }
    let marks = config.after_publish != AfterPublish::Keep;
    if marks && !table.has_id_index {
        lack(
            "marks and deletes at a bearable cost (no index begins with the id)",
            format!("CREATE UNIQUE INDEX ON {name} ({});", table.id_column()),
        );
    }
    if config.after_publish == AfterPublish::Mark
        && !table.has_unmarked_index
        && let Some(index) = table.unmarked_index()
    {
        lack(
            "a quick look for unmarked rows (no index holds them)",
            index,
        );
    }
    (cannot, mends)
}
