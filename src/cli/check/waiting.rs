//! What waits for somebody: rows that no snapshot can tell of, stragglers, partitions that are running out; and transactions that
//! others wait for.
//!
//! Nothing here stops a stream, so all of it is a warning, with the statement or the command that mends it.

use std::fmt::Write as _;
use std::time::Duration;

use tokio_postgres::Client;

use super::Finding;
use crate::config::{Config, Mode};
use crate::postgres::slot::slot_state;
use crate::postgres::sql_error;
use crate::postgres::waiting::{holders, listed};
use crate::scanner::outbox::OutboxTable;
use crate::scanner::partitions::{self, Span};
use crate::scanner::table::{FROM_ELSEWHERE, mend_from_elsewhere};
use crate::{Error, Result};

/// A transaction of this age makes the making of a slot take long.
const HOLDS_UP: Duration = Duration::from_secs(5);
/// One of this age is worth a look beside a slot that is there.
const KEEPS_LOG: Duration = Duration::from_secs(300);

/// A finding for each table whose rows name their transactions, for each one in partitions, for transactions, and for the stragglers.
pub(super) async fn check(client: &Client, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in &config.outbox_tables {
        // What is wrong with a table is for others to say.
        let Ok(table) = OutboxTable::read(client, name, config).await else {
            continue;
        };
        if table.has_txid {
            let found = rows(client, &table, &config.slot).await;
            findings.push(found.unwrap_or_else(|error| not_known("rows", &error)));
        }
        if table.partitioned {
            let found = ahead(client, &table).await;
            findings.extend(found.unwrap_or_else(|error| Some(not_known("partitions", &error))));
        }
    }
    let found = left_undone(client, &config.slot).await;
    findings.extend(found.unwrap_or_else(|error| Some(not_known(LEFT, &error))));
    if config.mode == Mode::Stream {
        let found = transactions(client, config).await;
        findings.push(found.unwrap_or_else(|error| not_known("transactions", &error)));
    }
    let found = stragglers(client, config).await;
    findings.push(found.unwrap_or_else(|error| not_known("stragglers", &error)));
    findings
}

fn not_known(check: &'static str, error: &Error) -> Finding {
    let (why, mend) = error.told();
    Finding::warn(
        check,
        format!("not known: {why}"),
        mend.unwrap_or_else(|| "GRANT SELECT to the role of WALPOST_POSTGRES_URL".to_owned()),
    )
}

/// See [`FROM_ELSEWHERE`]: such rows are never shown as sent, and a gap scan refuses them.
async fn rows(client: &Client, table: &OutboxTable, slot: &str) -> Result<Finding> {
    const CHECK: &str = "rows";
    let name = &table.name;
    let sql = format!("SELECT count(*) FROM {name} WHERE {FROM_ELSEWHERE}");
    let row = client.query_one(&sql, &[]).await;
    let row = row.map_err(|error| sql_error(&format!("look into table {name}"), error))?;
    let count: i64 = row.get(0);
    if count == 0 {
        return Ok(Finding::ok(
            CHECK,
            format!("every row of {name} has a txid of this cluster"),
        ));
    }
    Ok(Finding::warn(
        CHECK,
        format!(
            "{count} rows of {name} have a txid that this cluster has not come to (copied from another one): they are never \
             shown as sent, and after a loss of the slot walpost run stops at them"
        ),
        mend_from_elsewhere(name, slot),
    ))
}

/// Without a slot, what its making would wait for; with one, what keeps the log that it needs from getting shorter.
async fn transactions(client: &Client, config: &Config) -> Result<Finding> {
    const CHECK: &str = "transactions";
    // One that is being made has confirmed nothing.
    let slot = slot_state(client, &config.slot).await?;
    let has_slot = slot.is_some_and(|slot| slot.confirmed_flush.is_some());
    let (at_least, why) = if has_slot {
        (
            KEEPS_LOG,
            "the log of the slot is kept from where they began",
        )
    } else {
        (
            HOLDS_UP,
            "the making of the slot waits until they have ended",
        )
    };
    let found = holders(client, at_least).await?;
    let seconds = at_least.as_secs();
    if found.is_empty() {
        return Ok(Finding::ok(
            CHECK,
            format!("none has been writing for longer than {seconds} s"),
        ));
    }
    let (names, ends) = listed(&found);
    Ok(Finding::warn(CHECK, format!("{why}: {names}"), ends))
}

async fn ahead(client: &Client, table: &OutboxTable) -> Result<Option<Finding>> {
    const CHECK: &str = "partitions";
    let name = &table.name;
    let Some(span) = partitions::span_of(client, name).await? else {
        return Ok(None);
    };
    let count = partitions::count_ahead(client, name, span).await?;
    let span_name = span.name();
    let text = format!("{name} has {count} partitions beyond the present {span_name}");
    Ok(Some(if is_enough(count, span) {
        Finding::ok(CHECK, text)
    } else {
        Finding::warn(
            CHECK,
            format!(
                "{text}, and walpost keeps {}: when there are none left, inserts fail",
                span.ahead()
            ),
            format!("start walpost run, or: walpost init --partition-by {span_name}"),
        )
    }))
}

/// A connector that was down for half of the time is one that somebody should look at.
fn is_enough(count: i64, span: Span) -> bool {
    count * 2 >= i64::from(span.ahead())
}

const LEFT: &str = "left";
/// Entries that are told; `walpost.left_undone` has more.
const LEFT_LISTED: usize = 5;

/// Rows and partitions that the running walpost, or the last one, could not mark, delete, drop or make.
async fn left_undone(client: &Client, slot: &str) -> Result<Option<Finding>> {
    const USABLE: &str = "
        SELECT has_schema_privilege(n.oid, 'usage') AND has_table_privilege(c.oid, 'select')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'walpost' AND c.relname = 'left_undone'";
    const SQL: &str = "
        SELECT what::text, to_char(noted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')
        FROM walpost.left_undone WHERE slot = $1";
    let failed = |error| sql_error("look into walpost.left_undone", error);
    let usable = client.query_opt(USABLE, &[]).await.map_err(failed)?;
    if !usable.is_some_and(|row| row.get(0)) {
        return Ok(Some(Finding::warn(
            LEFT,
            "there is no walpost.left_undone, or no right to read it: it is not known which rows and partitions cannot be marked, deleted or dropped",
            "walpost init; GRANT SELECT, INSERT, UPDATE ON walpost.left_undone to the role of WALPOST_POSTGRES_URL",
        )));
    }
    let Some(row) = client.query_opt(SQL, &[&slot]).await.map_err(failed)? else {
        return Ok(None);
    };
    let what: serde_json::Value = serde_json::from_str(row.get(0)).unwrap_or_default();
    let count = what["count"].as_u64().unwrap_or(0);
    if count == 0 {
        return Ok(None);
    }
    let noted_at: &str = row.get(1);
    let mut text =
        format!("{count} rows, partitions or tables were left undone (noted {noted_at} UTC)");
    let listed = what["listed"].as_array().map_or(&[][..], Vec::as_slice);
    for one in listed.iter().take(LEFT_LISTED) {
        let _infallible = write!(
            text,
            "; {} {}",
            one["work"].as_str().unwrap_or_default(),
            one["table"].as_str().unwrap_or_default()
        );
        if let Some(id) = one["id"].as_str() {
            let _infallible = write!(text, " id {id}");
        }
        let _infallible = write!(text, ": {}", one["reason"].as_str().unwrap_or_default());
    }
    // Ids are the application's, and triggers word reasons: neither may steer a terminal.
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    Ok(Some(Finding::warn(
        LEFT,
        text,
        "mend what the reasons name; walpost run tries again by itself, at the latest after five minutes. /status and walpost.left_undone have more",
    )))
}

async fn stragglers(client: &Client, config: &Config) -> Result<Finding> {
    const CHECK: &str = "stragglers";
    // By the server's clock, as the due times are. No pause is longer than the setting says, unless that clock was set back.
    const SQL: &str = "
        SELECT count(*) FILTER (WHERE state <> 'dead'), count(*) FILTER (WHERE state = 'dead'),
               to_char(min(created_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'),
               count(*) FILTER (WHERE state = 'retrying' AND next_attempt_at > clock_timestamp() + make_interval(secs => $2))
        FROM walpost.straggler WHERE slot = $1";
    let missing = client
        .query_one("SELECT to_regclass('walpost.straggler') IS NULL", &[])
        .await
        .map_err(|error| sql_error("look for walpost.straggler", error))?;
    if missing.get(0) {
        return Ok(Finding::warn(
            CHECK,
            "there is no walpost.straggler: an event that cannot be published stops the stream",
            "walpost init",
        ));
    }
    let row = client
        .query_one(SQL, &[&config.slot, &config.retry_max.as_secs_f64()])
        .await
        .map_err(|error| sql_error("look into walpost.straggler", error))?;
    let (waiting, dead, late): (i64, i64, i64) = (row.get(0), row.get(1), row.get(3));
    let Some(oldest) = row.get::<_, Option<&str>>(2) else {
        return Ok(Finding::ok(CHECK, "every event could be published so far"));
    };
    let mut text = format!(
        "{waiting} events wait to be published again, {dead} are dead; the oldest is of {oldest} UTC"
    );
    let mut mend =
        "walpost stragglers list says why; then walpost stragglers retry or discard".to_owned();
    if late > 0 {
        let _infallible = write!(
            text,
            "; {late} are due later than WALPOST_RETRY_MAX from now, so the server's clock was set back, or somebody edited them"
        );
        mend = format!("walpost stragglers retry --state retrying makes them due now; {mend}");
    }
    Ok(Finding::warn(CHECK, text, mend))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_partitions_that_are_kept_ahead_are_enough() {
        assert!(is_enough(14, Span::Day) && is_enough(7, Span::Day));
        assert!(!is_enough(6, Span::Day) && !is_enough(0, Span::Hour));
    }
}
