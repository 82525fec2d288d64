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
//! * **poll**: a look that begins now takes a snapshot in which each of these rows is visible. It ends. A table that this look could not
//!   read waits for the next round, because its rows may be yet to come; the others do not wait for it.
//!
//! Then the marks of everything acknowledged by then are made, and the rows of the page that are still not marked, and have
//! not become stragglers meanwhile, are those.
//!
//! A row whose receipt has come and whose mark is refused ([`super::left_rows`]) is not published again: who marks rows is asked which
//! those are. Where there are more than it knows by name, the table is not looked through until there are fewer.
//!
//! Rows are told apart by their number as well as their id ([`crate::outbox::RowNumber`]): another row of the same id is not this one's
//! business.
//!
//! Memory: a page of ids, and of its rows what is in flight. A page of which rows get no receipt, or a table that cannot be looked through,
//! holds up none of the others; what was left so is told ([`crate::upkeep`]). An index on `(created_at, id) where sent_at is null` serves it; `init` makes it.

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use futures::{StreamExt as _, pin_mut};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;
use tracing::{info, warn};

use super::cluster::Log;
use super::outbox::{OutboxTable, SEQ, TXID};
use super::rows::{RowReader, TextAs, decode, is_unconvertible};
use crate::feedback::Progress;
use crate::lease::Lease;
use crate::outbox::{Extractor, RowNumber};
use crate::outlet::{Outlet, Source};
use crate::pipe::Routing;
use crate::postgres::{PostgresConfig, connect_sql, quote_ident, quote_literal, slot, sql_error};
use crate::pulsar::{Doubts, Flush, Publisher, PublisherConfig, RowKey, RowQueue, RowTag};
use crate::upkeep::{Undone, Work};
use crate::{Error, Lsn, Result};

/// Rows of a page: their ids are in memory at once; the rows themselves come one by one, as they are published.
const PAGE_ROWS: i64 = 1_000;
/// Rows without a receipt after this long are given up until the next round: their topic may be unusable for good.
const RECEIPTS: Duration = Duration::from_secs(60);
/// How often the publisher looks at the clock.
const TICK: Duration = Duration::from_secs(1);

/// What the task works with.
#[derive(Clone, Debug)]
pub struct Unmarked {
    /// Where the tables are.
    pub postgres: PostgresConfig,
    /// The replication slot, for `walpost.after_publish`.
    pub slot: String,
    /// What is known of the tables, in the order of the settings.
    pub tables: Vec<OutboxTable>,
    /// Tells them again at each opening.
    pub facts: watch::Receiver<Vec<OutboxTable>>,
    /// The log that is streamed, or the one of the server that is polled.
    pub log: Log,
    /// Where their rows go.
    pub routing: Routing,
    /// The stream's settings; the producers' names are changed.
    pub publisher: PublisherConfig,
    /// Under which it is published.
    pub lease: Lease,
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
#[derive(Clone, Debug, Default)]
pub struct Looks {
    /// How many began.
    begun: u64,
    /// The last of them that is over.
    over: u64,
    /// For each table, in the order of the settings: the last look that has read it to its end.
    read: Vec<u64>,
}

impl Looks {
    /// Another one begins; its snapshot is taken after this.
    pub fn begin(&mut self) {
        self.begun += 1;
    }

    /// It is over; `read` says for each table, in the order of the settings, whether it was read to its end.
    pub fn end(&mut self, read: impl IntoIterator<Item = bool>) {
        self.over = self.begun;
        let was_read = read.into_iter().enumerate();
        for (number, _) in was_read.filter(|(_, was_read)| *was_read) {
            if self.read.len() <= number {
                self.read.resize(number + 1, 0);
            }
            self.read[number] = self.over;
        }
    }

    /// Whether one of them has read a table.
    pub fn has_read(&self) -> bool {
        !self.read.is_empty()
    }

    /// Whether a look that began after that many has read this table.
    fn has_read_since(&self, begun: u64, number: usize) -> bool {
        self.read.get(number).is_some_and(|look| *look > begun)
    }
}

/// A row that may be lost; the last one of a page is where the next page begins.
#[derive(Clone, Debug)]
struct Place {
    created_at: String,
    id: String,
    /// Of the column that tells rows with this id apart.
    number: Option<String>,
    txid: Option<u64>,
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
        if self.facts.has_changed().unwrap_or(false) {
            self.tables.clone_from(&self.facts.borrow_and_update());
        }
        // An old primary that still runs has rows that were never streamed and never will be.
        let consequence = "its rows are not looked through";
        self.log.check(client, consequence).await?;
        let mut round = Round::default();
        for number in 0..self.tables.len() {
            if self.tables[number].created_at.is_none() {
                continue;
            }
            if let Err(error) = self.look_through(client, number, &mut round).await {
                if client.is_closed() {
                    return Err(error);
                }
                round.leave(&self.tables[number], &error);
            }
        }
        self.publisher
            .meter
            .upkeep()
            .set(Work::Unmarked, round.undone);
        Ok(())
    }

    /// Publishes what is lost of one table.
    async fn look_through(
        &mut self,
        client: &Client,
        number: usize,
        round: &mut Round,
    ) -> Result<()> {
        let mut after = None;
        loop {
            let page = self.page(client, number, after.as_ref()).await?;
            let Some(last) = page.last().cloned() else {
                return Ok(());
            };
            self.pass(client, number).await?;
            let page = self.without_left(number, page).await?;
            match self.publish_unmarked(client, number, &page, round).await {
                Ok(0) => {}
                Ok(published) => {
                    let table = &self.tables[number].name;
                    info!(%table, published, "published rows that had not been marked");
                }
                Err(error) if client.is_closed() => return Err(error),
                // The next page need not wait for a topic that takes nothing.
                Err(error) => round.leave(&self.tables[number], &error),
            }
            after = Some(last);
        }
    }

    /// The same page without the rows that have their receipt and cannot be marked.
    async fn without_left(&self, number: usize, page: Vec<Place>) -> Result<Vec<Place>> {
        let place = u32::try_from(number).unwrap_or(u32::MAX);
        let left = self.queue.left(place).await;
        let left = left.ok_or_else(|| Error::temporary("nobody marks rows any more"))?;
        if left.is_full {
            return Err(Error::temporary(format!(
                "{} published rows and more cannot be marked or deleted: others that are not marked cannot be told from them",
                left.rows.len()
            ))
            .hint("walpost status says why they cannot; mend that first"));
        }
        let column = self.tables[number].number.unwrap_or_default();
        // Left by the number of another column, which the table had then or has since: the id and the txid say which it is.
        let of_another = |key: &&RowKey| match key.number {
            RowNumber::Seq(_) => column != SEQ,
            RowNumber::Txid(_) => column != TXID,
            RowNumber::Null | RowNumber::Unknown => false,
        };
        let others = left.rows.iter().filter(of_another);
        let others: HashSet<(&str, u64)> = others
            .filter_map(|key| key.txid.map(|txid| (key.id.as_str(), txid)))
            .collect();
        let is_left = |place: &Place| {
            if place
                .txid
                .is_some_and(|txid| others.contains(&(&place.id, txid)))
            {
                return true;
            }
            let number = RowNumber::parse(column, place.number.as_deref());
            // Of one that an earlier version left less is known.
            let numbers = [number, RowNumber::Unknown].into_iter();
            let mut keys = numbers.flat_map(|number| {
                [place.txid, None].map(|txid| RowKey {
                    id: place.id.clone(),
                    number,
                    txid,
                })
            });
            keys.any(|key| left.rows.contains(&key))
        };
        let mut page = page;
        if !left.rows.is_empty() {
            page.retain(|place| !is_left(place));
        }
        Ok(page)
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
        let number = number_of(table);
        let txid = txid_of(table);
        let (at_least, behind) = if table.id.has_own_operators() {
            let (from, above) = (table.id.operator(">="), table.id.operator(">"));
            let than = |operator: &str| {
                format!(
                    "o.{time} >= $3::text::{time_type} AND (o.{time} > $3::text::{time_type} OR o.{id} {operator} $4::text::{id_type})"
                )
            };
            (than(&from), than(&above))
        } else {
            let than = |operator: &str| {
                format!(
                    "(o.{time}, o.{id}) {operator} ($3::text::{time_type}, $4::text::{id_type})"
                )
            };
            (than(">="), than(">"))
        };
        let sql = format!(
            "SELECT o.{time}::text, o.{id}::text, {number}, {txid} FROM {} o
             WHERE {} AND o.{id} IS NOT NULL AND o.{time} < {}
               AND o.{time} >= (SELECT since FROM walpost.after_publish WHERE slot = $2)
               AND ($3::text IS NULL OR {at_least})
               AND ($3::text IS NULL OR {behind} OR {number} > $5::text)
             ORDER BY o.{time}, o.{id}, {number} LIMIT {PAGE_ROWS}",
            table.name,
            is_lost(client, table).await?,
            table.ago("$1::float8"),
        );
        let seconds = self.age.as_secs_f64();
        let after_time = after.map(|place| place.created_at.as_str());
        let after_id = after.map(|place| place.id.as_str());
        let after_number = after.and_then(|place| place.number.as_deref());
        let after: [&(dyn ToSql + Sync); 3] = [&after_time, &after_id, &after_number];
        let rows = client
            .query(
                &sql,
                &[&[&seconds as _, &self.slot as _], &after[..]].concat(),
            )
            .await
            .map_err(failed)?;
        let place = |row: &tokio_postgres::Row| {
            Ok(Place {
                created_at: row.try_get(0)?,
                id: row.try_get(1)?,
                number: row.try_get(2)?,
                txid: row
                    .try_get::<_, Option<&str>>(3)?
                    .and_then(|txid| txid.parse().ok()),
            })
        };
        rows.iter()
            .map(place)
            .collect::<Result<_, _>>()
            .map_err(failed)
    }

    /// Waits until every row of a table that was committed before now has been brought, and its marks are made.
    ///
    /// # Errors
    /// Temporary where a look is over that could not read the table.
    async fn pass(&mut self, client: &Client, number: usize) -> Result<()> {
        let ended = |_| Error::temporary("nothing brings rows any more");
        match &mut self.way {
            Way::Stream(progress) => {
                let upto = slot::insert_position(client).await?;
                let passed = |now: &Progress| now.streaming && now.confirmed >= upto;
                progress.wait_for(passed).await.map_err(ended)?;
            }
            Way::Looks(looks) => {
                let begun = looks.borrow().begun;
                let passed = |now: &Looks| now.over > begun;
                let now = looks.wait_for(passed).await.map_err(ended)?;
                if !now.has_read_since(begun, number) {
                    return Err(Error::temporary(
                        "poll mode cannot read the table: rows that are not marked cannot be told from those that are yet to come",
                    ));
                }
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
        page: &[Place],
        round: &mut Round,
    ) -> Result<usize> {
        if page.is_empty() {
            return Ok(0);
        }
        let table = &self.tables[number];
        let Some((relation, mut reader)) = RowReader::describe(client, &table.name).await? else {
            return Ok(0);
        };
        let mut extractor =
            Extractor::new(&relation, &self.routing.columns, &self.routing.template)?;
        reader.read_only_for(&extractor);
        // Where the server may refuse to send a row, each is asked for by itself.
        let at_once = if reader.converts() { 1 } else { page.len() };
        let mut published = 0;
        for page in page.chunks(at_once) {
            let rows = still_lost(client, table, &reader, page).await?;
            let source = (&reader, &mut extractor, number);
            published += self.publish_rows(client, &rows, source, round).await?;
        }
        if let Some(again) = &mut round.again {
            again.receipts().await?;
        }
        Ok(published)
    }

    /// Publishes the rows that a query gives.
    async fn publish_rows(
        &self,
        client: &Client,
        sql: &str,
        (reader, extractor, number): (&RowReader, &mut Extractor, usize),
        round: &mut Round,
    ) -> Result<usize> {
        let name = &self.tables[number].name;
        let failed = |error| sql_error(&format!("read rows of table {name}"), error);
        let place = u16::try_from(number).unwrap_or(u16::MAX);
        let mut published = 0;
        // While a row waits for room the server waits with the next; and while the server is waited for, receipts are heard.
        let asking = client.query_raw::<_, i64, _>(sql, []);
        let rows = round.beside(asking).await?.map_err(failed)?;
        pin_mut!(rows);
        while let Some(row) = round.beside(rows.next()).await? {
            let row = match row {
                Err(error) if is_unconvertible(&error) => {
                    let error = failed(error);
                    warn!(
                        "a row that was never marked stays as it is: {}",
                        error.report()
                    );
                    round.undone.add(&name.to_string(), &error);
                    continue;
                }
                row => reader.encode(&row.map_err(failed)?, 0, TextAs::Utf8)?,
            };
            if round.again.is_none() {
                round.again =
                    Some(Again::connect((&self.publisher, &self.lease), &self.queue).await?);
            }
            let Some(again) = &mut round.again else {
                return Err(Error::bug("a publisher was just made"));
            };
            match again.publish(place, extractor, &row).await {
                Ok(()) => published += 1,
                Err(error) if error.is_temporary() => return Err(error),
                // The others need not wait for it.
                Err(error) => {
                    warn!(
                        "a row that was never marked stays as it is: {}",
                        error.report()
                    );
                    round.undone.add(&name.to_string(), &error);
                }
            }
        }
        Ok(published)
    }
}

/// One look through all tables.
#[derive(Default)]
struct Round {
    again: Option<Again>,
    undone: Undone,
}

impl Round {
    /// Waits for the server, and hears meanwhile what brokers say of the rows before.
    async fn beside<T>(&mut self, answer: impl Future<Output = T>) -> Result<T> {
        let mut answer = pin!(answer);
        loop {
            let Some(again) = &mut self.again else {
                return Ok(answer.await);
            };
            again.outlet.publisher().flush(Flush::Due);
            tokio::select! {
                biased;
                answer = answer.as_mut() => return Ok(answer),
                heard = again.wait() => heard?,
            }
        }
    }

    /// Leaves the rest of a table, or of a page, to the next round.
    fn leave(&mut self, table: &OutboxTable, error: &Error) {
        // The next rows get a new outlet: this one may hold events that have no receipt yet.
        self.again = None;
        let table = &table.name;
        warn!(
            %table,
            "rows that were never marked wait for the next round: {}",
            error.report()
        );
        self.undone.add(&table.to_string(), error);
    }
}

/// A publisher with names that were never used: nothing it sends is taken for a repeat.
struct Again {
    outlet: Outlet,
    /// Counts rows, in place of log positions.
    rows: u64,
}

impl Again {
    async fn connect(
        (config, lease): (&PublisherConfig, &Lease),
        queue: &RowQueue,
    ) -> Result<Self> {
        use std::hash::{BuildHasher as _, RandomState};
        let unique = RandomState::new().hash_one(std::process::id());
        let settings = PublisherConfig {
            producer_name: format!("{}-again-{unique:016x}", config.producer_name),
            rows: Some(queue.clone()),
            doubts: Doubts::default(),
            ..config.clone()
        };
        let mut publisher = Publisher::under(settings, lease);
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

/// SQL: whether row `o` is not marked and no straggler.
async fn is_lost(client: &Client, table: &OutboxTable) -> Result<String> {
    let not_marked = if table.has_sent_at {
        "o.sent_at IS NULL"
    } else {
        "true"
    };
    // A row without a readable id can be no event, and the server would not send the id.
    let not_marked = match table.id_is_utf8() {
        Some(is_utf8) => format!("{not_marked} AND {is_utf8}"),
        None => not_marked.to_owned(),
    };
    let row = client
        .query_one("SELECT to_regclass('walpost.straggler') IS NOT NULL", &[])
        .await
        .map_err(|error| sql_error("look for walpost.straggler", error))?;
    if !row.get::<_, bool>(0) {
        return Ok(not_marked);
    }
    Ok(format!(
        "{not_marked} AND NOT {}",
        table.is_straggler(&quote_literal(&table.name.to_string()))
    ))
}

/// SQL: the rows of this page that are lost.
async fn still_lost(
    client: &Client,
    table: &OutboxTable,
    reader: &RowReader,
    page: &[Place],
) -> Result<String> {
    let ids: Vec<String> = page.iter().map(|place| quote_literal(&place.id)).collect();
    let number = |place: &Place| place.number.as_deref().map(quote_literal);
    let numbers: Vec<String> = page
        .iter()
        .map(|place| number(place).unwrap_or_else(|| "NULL".to_owned()))
        .collect();
    let txid = |place: &Place| place.txid.map(|txid| quote_literal(&txid.to_string()));
    let txids: Vec<String> = page
        .iter()
        .map(|place| txid(place).unwrap_or_else(|| "NULL".to_owned()))
        .collect();
    let (id, id_type) = (table.id_column(), &table.id.sql_type);
    let time = table
        .created_at
        .as_ref()
        .map_or_else(|| id.clone(), |column| quote_ident(&column.name));
    let number = number_of(table);
    Ok(format!(
        "WITH r AS MATERIALIZED (
             SELECT * FROM unnest(ARRAY[{}]::text[]::{id_type}[], ARRAY[{}]::text[], ARRAY[{}]::text[]) AS u(id, number, txid)
         )
         SELECT {} FROM r JOIN {} o
             ON o.{id} {} r.id AND {number} IS NOT DISTINCT FROM r.number AND {} IS NOT DISTINCT FROM r.txid WHERE {}
         ORDER BY o.{time}, o.{id}, {number}",
        ids.join(", "),
        numbers.join(", "),
        txids.join(", "),
        reader.select_list("o", TextAs::Utf8),
        table.name,
        table.id.operator("="),
        txid_of(table),
        is_lost(client, table).await?,
    ))
}

/// SQL: what tells row `o` from others with its id, as text; NULL in a table that has nothing.
fn number_of(table: &OutboxTable) -> String {
    table.number.map_or_else(
        || "NULL::text".to_owned(),
        |column| format!("o.{column}::text"),
    )
}

/// SQL: the `txid` of row `o`, as text; NULL in a table that has none.
fn txid_of(table: &OutboxTable) -> &'static str {
    if table.has_txid {
        "o.txid::text"
    } else {
        "NULL::text"
    }
}
