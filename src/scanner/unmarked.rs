//! Rows that were never marked (or, in delete mode, are still there): published again, and marked.
//!
//! They are rows whose message was never sent, because the table was missing in the publication for a while, or whose mark
//! was lost with the process. Which of the two cannot be told, so such a row may come twice. Input: the outbox tables, the
//! connector's progress. Output: events to a publisher of its own; their receipts mark them as any other's do.
//!
//! # Which rows
//!
//! Older than `WALPOST_STRAGGLER_AGE`, created since the mode was turned on (`walpost.after_publish.since`: what was kept
//! before is nobody's loss), not marked, not waiting as a straggler. And behind the stream: a row that the stream has yet to bring
//! is not lost, however long the broker was away. So a page of ids is read first, *then* the log's insert position; each of
//! these rows was committed before it. Once the confirmed LSN is there, and the marks of everything acknowledged by then are
//! made, the rows of the page that are still not marked are those.
//!
//! Memory: one page. An index on `(created_at, id) where sent_at is null` serves it; `init` makes it.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};
use tracing::{info, warn};

use super::outbox::OutboxTable;
use crate::ack::{AckTracker, TxnNo};
use crate::feedback::Progress;
use crate::outbox::{Extractor, Scratch, key_hash};
use crate::pgoutput::{Relation, RelationColumn, Tuple};
use crate::pipe::Routing;
use crate::postgres::{PostgresConfig, connect_sql, quote_ident, quote_literal, sql_error};
use crate::pulsar::{Flush, Outgoing, Publisher, PublisherConfig, Row, RowQueue, RowTag};
use crate::{Error, Lsn, Result};

/// Rows of a page: their ids, and then the rows themselves, are in memory at once.
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
    /// The stream.
    pub progress: watch::Receiver<Progress>,
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
            *client = Some(open(&self.postgres).await?);
        }
        let Some(client) = client else {
            return Err(Error::bug("a session was just opened"));
        };
        let mut again = None;
        for number in 0..self.tables.len() {
            if self.tables[number].created_at.is_none() {
                continue;
            }
            let mut after = None;
            loop {
                let page = self.page(client, number, after.as_ref()).await?;
                let Some(last) = page.last().cloned() else {
                    break;
                };
                let ids: Vec<String> = page.into_iter().map(|place| place.id).collect();
                self.stream_passes(client).await?;
                let published = self
                    .publish_unmarked(client, number, &ids, &mut again)
                    .await?;
                if published > 0 {
                    let table = &self.tables[number].name;
                    info!(%table, published, "published rows that had not been marked");
                }
                after = Some(last);
            }
        }
        Ok(())
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
        let not_marked = if table.has_sent_at {
            "sent_at IS NULL"
        } else {
            "true"
        };
        let stragglers = client
            .query_one("SELECT to_regclass('walpost.straggler') IS NOT NULL", &[])
            .await
            .map_err(failed)?;
        let no_straggler = if stragglers.get(0) {
            format!(
                "NOT EXISTS (SELECT FROM walpost.straggler s WHERE s.outbox = {} AND s.id = o.{id}::text)",
                quote_literal(&table.name.to_string())
            )
        } else {
            "true".to_owned()
        };
        let sql = format!(
            "SELECT o.{time}::text, o.{id}::text FROM {} o
             WHERE {not_marked} AND o.{time} < {} AND {no_straggler}
               AND o.{time} >= (SELECT since FROM walpost.after_publish WHERE slot = $2)
               AND ($3::text IS NULL OR (o.{time}, o.{id}) > ($3::text::{time_type}, $4::text::{id_type}))
             ORDER BY o.{time}, o.{id} LIMIT {PAGE_ROWS}",
            table.name,
            table.ago("$1::float8"),
        );
        let seconds = self.age.as_secs_f64();
        let after_time = after.map(|place| place.created_at.as_str());
        let after_id = after.map(|place| place.id.as_str());
        let rows = client
            .query(&sql, &[&seconds, &self.slot, &after_time, &after_id])
            .await
            .map_err(failed)?;
        let place = |row: &tokio_postgres::Row| Place {
            created_at: row.get(0),
            id: row.get(1),
        };
        Ok(rows.iter().map(place).collect())
    }

    /// Waits until the stream has passed by everything committed before now, and its marks are made.
    async fn stream_passes(&mut self, client: &Client) -> Result<()> {
        let row = client
            .query_one("SELECT pg_current_wal_insert_lsn()::text", &[])
            .await
            .map_err(|error| sql_error("read the log's position", error))?;
        let text: &str = row.get(0);
        let upto: Lsn = text
            .parse()
            .map_err(|error| Error::bug("cannot read the log's position").caused_by(error))?;
        let passed = |progress: &Progress| progress.streaming && progress.confirmed >= upto;
        let ended = |_| Error::temporary("the stream has ended");
        self.progress.wait_for(passed).await.map_err(ended)?;
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
        let relation = describe(client, table).await?;
        let rows = still_there(client, table, &relation, ids).await?;
        if rows.is_empty() {
            return Ok(0);
        }
        if again.is_none() {
            *again = Some(Again::connect(&self.publisher, &self.queue).await?);
        }
        let Some(again) = again else {
            return Err(Error::bug("a publisher was just made"));
        };
        let extractor = Extractor::new(&relation, &self.routing.columns, &self.routing.template)?;
        let mut published = 0;
        for row in &rows {
            match again
                .publish(u32::try_from(number).unwrap_or(u32::MAX), &extractor, row)
                .await
            {
                Ok(()) => published += 1,
                Err(error) if error.is_temporary() => return Err(error),
                // The others need not wait for it.
                Err(error) => warn!("{}", error.report()),
            }
        }
        again.receipts().await?;
        Ok(published)
    }
}

/// A publisher with names that were never used: nothing it sends is taken for a repeat.
struct Again {
    publisher: Publisher,
    txn: TxnNo,
    /// In place of log positions.
    position: u64,
    scratch: Scratch,
    topic: String,
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
            publisher,
            txn: AckTracker::new(Lsn::ZERO).begin(),
            position: 0,
            scratch: Scratch::new(),
            topic: String::new(),
        })
    }

    async fn publish(&mut self, table: u32, extractor: &Extractor, row: &[u8]) -> Result<()> {
        while !self.publisher.has_room() {
            self.wait().await?;
        }
        let tuple = Tuple::decode(row)
            .map_err(|error| Error::bug("a row read by SQL cannot be read").caused_by(error))?;
        let unusable = |error| {
            Error::refused("a row that was never marked cannot be published")
                .caused_by(Error::from(error))
        };
        let event = extractor
            .extract(&tuple, &mut self.scratch)
            .map_err(unusable)?;
        extractor
            .topic_into(&tuple, &event, &mut self.topic)
            .map_err(unusable)?;
        self.position += 1;
        let outgoing = Outgoing {
            key: event.aggregateid,
            payload: event.payload,
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            txn: self.txn,
            commit_lsn: Lsn::new(self.position << 3),
            row: RowTag::default(),
            mark: Some(Row {
                table,
                xid: 0,
                id: event.id,
            }),
        };
        let hash = key_hash(event.aggregateid.as_bytes());
        self.publisher
            .publish(&self.topic, hash, &outgoing, event.properties())
            .map_err(|error| {
                Error::refused(format!("the row with id {} cannot be published", event.id))
                    .caused_by(error)
            })
    }

    async fn receipts(&mut self) -> Result<()> {
        let deadline = Instant::now() + RECEIPTS;
        while !self.publisher.is_empty() {
            if Instant::now() > deadline {
                return Err(
                    Error::temporary("rows that were never marked get no receipt")
                        .hint("what the broker has against their topic stands above"),
                );
            }
            self.publisher.flush(Flush::All);
            self.wait().await?;
        }
        Ok(())
    }

    /// For a broker's word, at most a second.
    async fn wait(&mut self) -> Result<()> {
        let tick = Instant::now() + TICK;
        tokio::select! {
            biased;
            event = self.publisher.next_event() => {
                let result = self.publisher.handle(event);
                self.publisher.take_acked().for_each(drop);
                result
            }
            () = sleep_until(tick) => {
                self.publisher.tick(Instant::now());
                Ok(())
            }
        }
    }
}

/// A session that prints values as the walsender does.
async fn open(postgres: &PostgresConfig) -> Result<Client> {
    let client = connect_sql(postgres, "walpost scanner").await?;
    let sql = "SET datestyle TO 'ISO'; SET intervalstyle TO 'postgres'; SET timezone TO 'UTC';
               SET bytea_output TO 'hex'; SET extra_float_digits TO 3";
    let set = client.batch_execute(sql).await;
    set.map_err(|error| sql_error("set up the session", error))?;
    Ok(client)
}

/// The table as pgoutput would describe it.
async fn describe(client: &Client, table: &OutboxTable) -> Result<Relation> {
    // A domain counts as what it is made of, as in the stream.
    const SQL: &str = "
        SELECT c.oid, a.attname::text, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.oid END, a.atttypmod
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_type t ON t.oid = a.atttypid
        WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum";
    let name = &table.name;
    let rows = client
        .query(SQL, &[&name.schema, &name.name])
        .await
        .map_err(|error| sql_error(&format!("look at table {name}"), error))?;
    let column = |row: &tokio_postgres::Row| RelationColumn {
        flags: 0,
        name: row.get(1),
        type_oid: row.get(2),
        type_modifier: row.get(3),
    };
    Ok(Relation {
        id: rows.first().map_or(0, |row| row.get(0)),
        namespace: name.schema.clone(),
        name: name.name.clone(),
        replica_identity: b'n',
        columns: rows.iter().map(column).collect(),
    })
}

/// The rows of these ids that are not marked, as encoded tuples of text.
async fn still_there(
    client: &Client,
    table: &OutboxTable,
    relation: &Relation,
    ids: &[String],
) -> Result<Vec<Vec<u8>>> {
    let columns: Vec<String> = relation
        .columns
        .iter()
        .map(|column| quote_ident(&column.name))
        .collect();
    let ids: Vec<String> = ids.iter().map(|id| quote_literal(id)).collect();
    let not_marked = if table.has_sent_at {
        "sent_at IS NULL"
    } else {
        "true"
    };
    let time = table
        .created_at
        .as_ref()
        .map_or_else(|| table.id_column(), |column| quote_ident(&column.name));
    let (id, id_type) = (table.id_column(), &table.id.sql_type);
    let sql = format!(
        "SELECT {} FROM {} WHERE {id} = ANY (ARRAY[{}]::text[]::{id_type}[]) AND {not_marked} ORDER BY {time}, {id}",
        columns.join(", "),
        table.name,
        ids.join(", "),
    );
    let messages = client
        .simple_query(&sql)
        .await
        .map_err(|error| sql_error(&format!("read rows of table {}", table.name), error))?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => Some(encode(row)),
        _ => None,
    };
    Ok(messages.iter().filter_map(row).collect())
}

/// `TupleData`, every value as text.
fn encode(row: &SimpleQueryRow) -> Vec<u8> {
    let mut data = u16::try_from(row.len())
        .unwrap_or(u16::MAX)
        .to_be_bytes()
        .to_vec();
    for column in 0..row.len() {
        match row.get(column) {
            None => data.push(b'n'),
            Some(text) => {
                data.push(b't');
                data.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
                data.extend(text.as_bytes());
            }
        }
    }
    data
}
