//! Rows that were never marked (or, in delete mode, are still there): published again, and marked.
//!
//! They are rows whose message was never sent, because the table was missing in the publication for a while, or whose mark
//! was lost with the process. Which of the two cannot be told, so such a row may come twice. Input: the outbox tables, the
//! connector's progress. Output: events to a publisher of its own; their receipts mark them as any other's do.
//!
//! # Which rows
//!
//! Older than `WALPOST_STRAGGLER_AGE`, created since the mode was turned on (`walpost.after_publish.since`: what was kept
//! before is nobody's loss), not marked, not waiting as a straggler. And behind whatever brings rows to their topics: a row that is yet to
//! come is not lost, however long the broker was away. So a page of ids is read first, and *then* waited for ([`Way`]):
//!
//! * **stream**: the log's insert position is read; each of these rows was committed before it. The confirmed LSN gets there.
//! * **poll**: a look that begins now takes a snapshot in which each of these rows is visible. It ends.
//!
//! Then the marks of everything acknowledged by then are made, and the rows of the page that are still not marked, and have
//! not become stragglers meanwhile, are those.
//!
//! Memory: a page of ids, and of its rows what is in flight. A table that cannot be looked through to its end, because of the
//! database or because rows of it get no receipt, holds up none of the others. An index on `(created_at, id) where sent_at is null` serves it; `init` makes it.

use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::{Client, SimpleQueryMessage};
use tracing::{info, warn};

use super::outbox::OutboxTable;
use super::table::{decode, describe, encode};
use crate::feedback::Progress;
use crate::outbox::Extractor;
use crate::outlet::{Outlet, Source};
use crate::pgoutput::Relation;
use crate::pipe::Routing;
use crate::postgres::{PostgresConfig, connect_sql, quote_ident, quote_literal, sql_error};
use crate::pulsar::{Flush, Publisher, PublisherConfig, RowQueue, RowTag};
use crate::{Error, Lsn, Result};

/// Rows of a page: their ids are in memory at once; the rows themselves come one by one, as they are published.
const PAGE_ROWS: i64 = 1_000;
/// Rows without a receipt after this long are given up until the next round: their topic may be unusable for good.
const RECEIPTS: Duration = Duration::from_secs(60);
/// How often the publisher looks at the clock.
const TICK: Duration = Duration::from_secs(1);

/// What the task works with.
#[derive(Debug)]
pub struct Unmarked {
    /// Where the tables are.
    pub postgres: PostgresConfig,
    /// The replication slot, for `walpost.after_publish`.
    pub slot: String,
    /// The tables, in the order of the settings.
    pub tables: Vec<OutboxTable>,
    /// Where their rows go.
    pub routing: Routing,
    /// The stream's settings; the producers' names are changed.
    pub publisher: PublisherConfig,
    /// `WALPOST_SCAN_INTERVAL`.
    pub interval: Duration,
    /// `WALPOST_STRAGGLER_AGE`.
    pub age: Duration,
    /// Where receipts put the rows to be marked.
    pub queue: RowQueue,
    /// What brings rows to their topics.
    pub way: Way,
}

/// What brings rows to their topics, and how far it is.
#[derive(Clone, Debug)]
pub enum Way {
    /// The stream.
    Stream(watch::Receiver<Progress>),
    /// Poll mode's looks.
    Looks(watch::Receiver<Looks>),
}

/// Looks that began with a snapshot of their own: a look that was cut short before goes on with an old one, and does not count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Looks {
    /// How many began.
    pub begun: u64,
    /// The last of them that is over.
    pub over: u64,
}

/// Where a page ended.
#[derive(Clone, Debug)]
struct Place {
    created_at: String,
    id: String,
}

impl Unmarked {
    /// Runs until it is aborted.
    pub async fn run(mut self) {
        let mut client = None;
        loop {
            sleep(self.interval).await;
            if let Err(error) = self.round(&mut client).await {
                client = None;
                warn!(
                    "rows that were never marked could not be looked for: {}",
                    error.report()
                );
            }
        }
    }

    async fn round(&mut self, client: &mut Option<Client>) -> Result<()> {
        if client.is_none() {
            *client = Some(connect_sql(&self.postgres, "walpost scanner").await?);
        }
        let Some(client) = client else {
            return Err(Error::bug("a session was just opened"));
        };
        let mut again = None;
        for number in 0..self.tables.len() {
            if self.tables[number].created_at.is_none() {
                continue;
            }
            if let Err(error) = self.look_through(client, number, &mut again).await {
                if client.is_closed() {
                    return Err(error);
                }
                // What of it has no receipt would be waited for with the next table's rows.
                again = None;
                let table = &self.tables[number].name;
                warn!(
                    %table,
                    "rows that were never marked wait for the next round: {}",
                    error.report()
                );
            }
        }
        Ok(())
    }

    /// Publishes what is lost of one table.
    async fn look_through(
        &mut self,
        client: &Client,
        number: usize,
        again: &mut Option<Again>,
    ) -> Result<()> {
        let mut after = None;
        loop {
            let page = self.page(client, number, after.as_ref()).await?;
            let Some(last) = page.last().cloned() else {
                return Ok(());
            };
            let ids: Vec<String> = page.into_iter().map(|place| place.id).collect();
            self.pass(client).await?;
            let published = self.publish_unmarked(client, number, &ids, again).await?;
            if published > 0 {
                let table = &self.tables[number].name;
                info!(%table, published, "published rows that had not been marked");
            }
            after = Some(last);
        }
    }

    /// The next rows that may be lost.
    async fn page(
        &self,
        client: &Client,
        number: usize,
        after: Option<&Place>,
    ) -> Result<Vec<Place>> {
        let table = &self.tables[number];
        let failed = |error| sql_error(&format!("look through table {}", table.name), error);
        let Some(created_at) = &table.created_at else {
            return Ok(Vec::new());
        };
        let (id, id_type) = (table.id_column(), &table.id.sql_type);
        let (time, time_type) = (quote_ident(&created_at.name), &created_at.sql_type);
        let behind = if table.id.has_own_operators() {
            let above = table.id.operator(">");
            format!(
                "o.{time} >= $3::text::{time_type} AND (o.{time} > $3::text::{time_type} OR o.{id} {above} $4::text::{id_type})"
            )
        } else {
            format!("(o.{time}, o.{id}) > ($3::text::{time_type}, $4::text::{id_type})")
        };
        let sql = format!(
            "SELECT o.{time}::text, o.{id}::text FROM {} o
             WHERE {} AND o.{id} IS NOT NULL AND o.{time} < {}
               AND o.{time} >= (SELECT since FROM walpost.after_publish WHERE slot = $2)
               AND ($3::text IS NULL OR {behind})
             ORDER BY o.{time}, o.{id} LIMIT {PAGE_ROWS}",
            table.name,
            is_lost(client, table).await?,
            table.ago("$1::float8"),
        );
        let seconds = self.age.as_secs_f64();
        let after_time = after.map(|place| place.created_at.as_str());
        let after_id = after.map(|place| place.id.as_str());
        let rows = client
            .query(&sql, &[&seconds, &self.slot, &after_time, &after_id])
            .await
            .map_err(failed)?;
        let place = |row: &tokio_postgres::Row| {
            Ok(Place {
                created_at: row.try_get(0)?,
                id: row.try_get(1)?,
            })
        };
        rows.iter()
            .map(place)
            .collect::<Result<_, _>>()
            .map_err(failed)
    }

    /// Waits until everything committed before now has been brought, and its marks are made.
    async fn pass(&mut self, client: &Client) -> Result<()> {
        let ended = |_| Error::temporary("nothing brings rows any more");
        match &mut self.way {
            Way::Stream(progress) => {
                let upto = log_position(client).await?;
                let passed = |now: &Progress| now.streaming && now.confirmed >= upto;
                progress.wait_for(passed).await.map_err(ended)?;
            }
            Way::Looks(looks) => {
                let begun = looks.borrow().begun;
                let passed = |now: &Looks| now.over > begun;
                looks.wait_for(passed).await.map_err(ended)?;
            }
        }
        if !self.queue.barrier().await {
            return Err(Error::temporary("nobody marks rows any more"));
        }
        Ok(())
    }

    /// Publishes those of the page that are still not marked, and waits for their receipts.
    async fn publish_unmarked(
        &self,
        client: &Client,
        number: usize,
        ids: &[String],
        again: &mut Option<Again>,
    ) -> Result<usize> {
        let table = &self.tables[number];
        let Some(relation) = describe(client, &table.name).await? else {
            return Ok(0);
        };
        let failed = |error| sql_error(&format!("read rows of table {}", table.name), error);
        let sql = still_lost(client, table, &relation, ids).await?;
        let mut extractor =
            Extractor::new(&relation, &self.routing.columns, &self.routing.template)?;
        let place = u16::try_from(number).unwrap_or(u16::MAX);
        let mut published = 0;
        // While a row waits for room the server waits with the next.
        let rows = client.simple_query_raw(&sql).await.map_err(failed)?;
        pin_mut!(rows);
        while let Some(message) = rows.next().await {
            let SimpleQueryMessage::Row(row) = message.map_err(failed)? else {
                continue;
            };
            if again.is_none() {
                *again = Some(Again::connect(&self.publisher, &self.queue).await?);
            }
            let Some(again) = again else {
                return Err(Error::bug("a publisher was just made"));
            };
            match again.publish(place, &mut extractor, &encode(&row)).await {
                Ok(()) => published += 1,
                Err(error) if error.is_temporary() => return Err(error),
                // The others need not wait for it.
                Err(error) => warn!(
                    "a row that was never marked stays as it is: {}",
                    error.report()
                ),
            }
        }
        if let Some(again) = again {
            again.receipts().await?;
        }
        Ok(published)
    }
}

/// A publisher with names that were never used: nothing it sends is taken for a repeat.
struct Again {
    outlet: Outlet,
    /// Counts rows, in place of log positions.
    rows: u64,
}

impl Again {
    async fn connect(config: &PublisherConfig, queue: &RowQueue) -> Result<Self> {
        use std::hash::{BuildHasher as _, RandomState};
        let unique = RandomState::new().hash_one(std::process::id());
        let mut publisher = Publisher::new(PublisherConfig {
            producer_name: format!("{}-again-{unique:016x}", config.producer_name),
            rows: Some(queue.clone()),
            ..config.clone()
        });
        publisher.connect().await?;
        Ok(Self {
            outlet: Outlet::new(publisher, None, Source::Table, true, Lsn::ZERO),
            rows: 0,
        })
    }

    async fn publish(&mut self, table: u16, extractor: &mut Extractor, row: &[u8]) -> Result<()> {
        self.until(Outlet::has_room).await?;
        self.rows += 1;
        let (tag, position) = (RowTag::new(table, self.rows), Lsn::new(self.rows << 3));
        self.outlet
            .take_read(extractor, &decode(row)?, tag, position)
    }

    async fn receipts(&mut self) -> Result<()> {
        self.until(|outlet| outlet.unfinished() == 0).await
    }

    /// Sends, and waits until receipts have brought that about, but not for ever.
    async fn until(&mut self, done: impl Fn(&Outlet) -> bool) -> Result<()> {
        let deadline = Instant::now() + RECEIPTS;
        while !done(&self.outlet) {
            if Instant::now() > deadline {
                return Err(
                    Error::temporary("rows that were never marked get no receipt")
                        .hint("what the broker has against their topic stands above"),
                );
            }
            // What is not sent gets no receipt, and makes no room.
            self.outlet.publisher().flush(Flush::All);
            self.wait().await?;
        }
        Ok(())
    }

    /// For a broker's word, at most a second.
    async fn wait(&mut self) -> Result<()> {
        let tick = Instant::now() + TICK;
        tokio::select! {
            biased;
            event = self.outlet.next_event() => self.outlet.event(event),
            () = sleep_until(tick) => {
                self.outlet.publisher().tick(Instant::now());
                Ok(())
            }
        }
    }
}

/// Where the log ends.
async fn log_position(client: &Client) -> Result<Lsn> {
    let row = client
        .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
        .await
        .map_err(|error| sql_error("read the log's position", error))?;
    let text: &str = row.get(0);
    text.parse()
        .map_err(|error| Error::bug("cannot read the log's position").caused_by(error))
}

/// SQL: whether row `o` is not marked and no straggler.
async fn is_lost(client: &Client, table: &OutboxTable) -> Result<String> {
    let not_marked = if table.has_sent_at {
        "o.sent_at IS NULL"
    } else {
        "true"
    };
    let row = client
        .query_one("SELECT to_regclass('walpost.straggler') IS NOT NULL", &[])
        .await
        .map_err(|error| sql_error("look for walpost.straggler", error))?;
    if !row.get::<_, bool>(0) {
        return Ok(not_marked.to_owned());
    }
    Ok(format!(
        "{not_marked} AND NOT EXISTS (SELECT FROM walpost.straggler s WHERE s.outbox = {} AND s.id = o.{}::text)",
        quote_literal(&table.name.to_string()),
        table.id_column()
    ))
}

/// SQL: the rows of these ids that are lost.
async fn still_lost(
    client: &Client,
    table: &OutboxTable,
    relation: &Relation,
    ids: &[String],
) -> Result<String> {
    let columns = relation.columns.iter();
    let columns: Vec<String> = columns
        .map(|column| format!("o.{}", quote_ident(&column.name)))
        .collect();
    let ids: Vec<String> = ids.iter().map(|id| quote_literal(id)).collect();
    let (id, id_type) = (table.id_column(), &table.id.sql_type);
    let time = table
        .created_at
        .as_ref()
        .map_or_else(|| id.clone(), |column| quote_ident(&column.name));
    Ok(format!(
        "SELECT {} FROM {} o WHERE o.{id} {} ANY (ARRAY[{}]::text[]::{id_type}[]) AND {} ORDER BY o.{time}, o.{id}",
        columns.join(", "),
        table.name,
        table.id.operator("="),
        ids.join(", "),
        is_lost(client, table).await?,
    ))
}
