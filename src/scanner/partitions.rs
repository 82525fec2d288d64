//! Partitions of an outbox table by time: made ahead by `init` and by `run`.
//!
//! A table that `init --partition-by` made is partitioned by range of `created_at`, a day or an hour (UTC) each, named
//! `<table>_p20240229` or `<table>_p2024022912`. Only such a table is looked after; its newest partition says which of the two.
//!
//! There is no default partition: one would have to be locked and read through for every partition that is made, and rows in it
//! could never be dropped whole. Instead enough are made ahead to outlast a connector that is down: [`Span::ahead`]. A row of a time
//! for which there is none is refused by Postgres, so `created_at` is to be left to its default.
//!
//! A partition is made beside the table and then attached, which takes no lock that writers would wait for. One that cannot be made
//! holds up neither the others nor another table, and is told ([`crate::upkeep`]).

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::{Client, GenericClient};
use tracing::{info, warn};

use crate::meter::Meter;
use crate::postgres::{PostgresConfig, TableName, connect_sql, is_about_rows, sql_error};
use crate::upkeep::{Undone, Work};
use crate::{Error, Result};

/// How often it is looked whether there are enough.
const INTERVAL: Duration = Duration::from_secs(60);

/// What one partition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// A day in UTC.
    Day,
    /// An hour.
    Hour,
}

impl Span {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Day, Self::Hour];

    /// Its name: an option's value, and a unit of `date_trunc`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Hour => "hour",
        }
    }

    /// The span of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|span| span.name() == name)
    }

    /// How many there are beyond the present one: two weeks of days, two days of hours.
    pub fn ahead(self) -> i32 {
        match self {
            Self::Day => 14,
            Self::Hour => 48,
        }
    }

    fn hours(self) -> i32 {
        match self {
            Self::Day => 24,
            Self::Hour => 1,
        }
    }

    /// As `to_char` has it, in a partition's name.
    fn format(self) -> &'static str {
        match self {
            Self::Day => "YYYYMMDD",
            Self::Hour => "YYYYMMDDHH24",
        }
    }
}

/// The span of a table's partitions, if walpost made them.
pub async fn span_of(client: &impl GenericClient, table: &TableName) -> Result<Option<Span>> {
    const SQL: &str = "
        SELECT max(length(substring(c.relname from '_p([0-9]+)$')))
        FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        JOIN pg_class t ON t.oid = i.inhparent JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = $2 AND t.relkind = 'p' AND c.relname ~ '_p([0-9]{8}|[0-9]{10})$'
          AND starts_with(c.relname, t.relname)";
    let row = client
        .query_one(SQL, &[&table.schema, &table.name])
        .await
        .map_err(|error| sql_error(&format!("look at the partitions of {table}"), error))?;
    Ok(match row.get::<_, Option<i32>>(0) {
        Some(8) => Some(Span::Day),
        Some(10) => Some(Span::Hour),
        _ => None,
    })
}

/// How many there are beyond the present one.
pub async fn count_ahead(
    client: &impl GenericClient,
    table: &TableName,
    span: Span,
) -> Result<i64> {
    const SQL: &str = "
        SELECT count(*) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        JOIN pg_class t ON t.oid = i.inhparent JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = $2 AND c.relname ~ '_p([0-9]{8}|[0-9]{10})$'
          AND substring(c.relname from '[0-9]+$') > to_char(clock_timestamp() AT TIME ZONE 'UTC', $3::text)";
    let row = client
        .query_one(SQL, &[&table.schema, &table.name, &span.format()])
        .await
        .map_err(|error| sql_error(&format!("look at the partitions of {table}"), error))?;
    Ok(row.get(0))
}

/// What was made ahead.
#[derive(Debug, Default)]
pub struct Made {
    /// How many partitions.
    pub count: usize,
    /// Those that could not be made.
    pub refused: Vec<(TableName, Error)>,
}

/// Makes those that are missing, from the present one on. One that cannot be made, because something else has its range or a lock is held,
/// holds up none of the others.
///
/// # Errors
/// What is wrong with the table as a whole, with the session or the server.
pub async fn make_ahead(
    client: &impl GenericClient,
    table: &TableName,
    span: Span,
) -> Result<Made> {
    const MISSING: &str = "
        SELECT p.name, p.at, p.upto FROM (
            SELECT $2::text || '_p' || to_char(at AT TIME ZONE 'UTC', $3::text) AS name,
                   to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:00:00') || '+00' AS at,
                   to_char((at + make_interval(hours => $4::int)) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:00:00') || '+00' AS upto
            FROM generate_series(
                date_trunc($5::text, clock_timestamp(), 'UTC'),
                date_trunc($5::text, clock_timestamp(), 'UTC') + make_interval(hours => $4::int * $6::int),
                make_interval(hours => $4::int)) AS at
        ) p
        WHERE NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                          WHERE n.nspname = $1 AND c.relname = p.name)
        ORDER BY p.name";
    let failed = |error| sql_error(&format!("make partitions of {table}"), error);
    let missing = client
        .query(
            MISSING,
            &[
                &table.schema,
                &table.name,
                &span.format(),
                &span.hours(),
                &span.name(),
                &span.ahead(),
            ],
        )
        .await
        .map_err(failed)?;
    let mut done = Made::default();
    for row in &missing {
        let (from, upto): (&str, &str) = (row.get(1), row.get(2));
        let partition = TableName::new(&table.schema, row.get::<_, String>(0));
        // One text is one transaction: no table is left behind that is no partition.
        let made = client
            .batch_execute(&format!(
                "CREATE TABLE {partition} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS);
                 ALTER TABLE {table} ATTACH PARTITION {partition} FOR VALUES FROM ('{from}') TO ('{upto}')"
            ))
            .await;
        match made.map_err(failed) {
            Ok(()) => done.count += 1,
            Err(error) if is_about_rows(&error) => done.refused.push((partition, error)),
            // In a transaction nothing can be made after the first that was refused.
            Err(error) => {
                let first = done.refused.into_iter().next();
                return Err(first.map_or(error, |(_, first)| first));
            }
        }
    }
    Ok(done)
}

/// Sees to it that there are always enough, until it is aborted.
pub async fn keep_ahead(postgres: PostgresConfig, tables: Vec<TableName>, meter: Arc<Meter>) {
    let mut client = None;
    loop {
        if let Err(error) = round(&postgres, &tables, &mut client, &meter).await {
            client = None;
            warn_of(&error);
        }
        sleep(INTERVAL).await;
    }
}

fn warn_of(error: &Error) {
    warn!(
        "partitions could not be made ahead; when there are none left, inserts fail: {}",
        error.report()
    );
}

async fn round(
    postgres: &PostgresConfig,
    tables: &[TableName],
    client: &mut Option<Client>,
    meter: &Meter,
) -> Result<()> {
    if client.is_none() {
        let new = connect_sql(postgres, "walpost partitions").await?;
        let set = new.batch_execute("SET lock_timeout TO '5s'").await;
        set.map_err(|error| sql_error("set up the session", error))?;
        *client = Some(new);
    }
    let Some(client) = client else {
        return Err(Error::bug("a session was just opened"));
    };
    let mut undone = Undone::default();
    for table in tables {
        match make_for(client, table).await {
            Ok(refused) => {
                // One of them stands for all in the log.
                if let Some((_, error)) = refused.first() {
                    warn_of(error);
                }
                for (partition, error) in &refused {
                    undone.add(&partition.to_string(), error);
                }
            }
            Err(error) if is_about_rows(&error) => {
                warn_of(&error);
                undone.add(&table.to_string(), &error);
            }
            Err(error) => return Err(error),
        }
    }
    meter.upkeep().set(Work::Partitions, undone);
    Ok(())
}

/// Makes what is missing of one table; gives those that cannot be made.
async fn make_for(client: &Client, table: &TableName) -> Result<Vec<(TableName, Error)>> {
    let Some(span) = span_of(client, table).await? else {
        return Ok(Vec::new());
    };
    let made = make_ahead(client, table, span).await?;
    if made.count > 0 {
        info!(%table, made = made.count, "made partitions ahead");
    }
    Ok(made.refused)
}
