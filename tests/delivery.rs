//! Guarantee: while nothing breaks, every committed row arrives exactly once, a rolled-back row never, and the messages of
//! a key in commit order.
//!
//! Several writers commit and roll back side by side; each key belongs to one writer, which numbers the key's committed
//! rows in its payloads, so that the order of commits can be read off the topic. What must have arrived is what Postgres
//! has in the table at the end.

mod support;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::SinkExt as _;
use futures::future::join_all;
use support::{Database, Random, Received, consume, servers};
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(120);
const WRITERS: usize = 6;
const TRANSACTIONS: usize = 60;
const KEYS_PER_WRITER: usize = 20;
const MAX_ROWS: usize = 50;
const COPIED_ROWS: usize = 10_000;
const AGGREGATE_TYPES: [&str; 3] = ["order", "payment", "stock"];

/// A row as an application makes it.
struct NewRow {
    aggregatetype: &'static str,
    aggregateid: String,
    event_type: String,
    payload: String,
}

/// One session with keys of its own.
struct Writer {
    name: String,
    client: Client,
    random: Random,
    /// For each key: its rows so far, without those rolled back.
    counts: Vec<usize>,
    /// All rows ever made, so that one rolled back is not like any that came after it.
    made: usize,
    rolled_back: Vec<String>,
}

impl Writer {
    async fn new(database: &Database, number: usize, keys: usize) -> Self {
        Self {
            name: format!("writer{number}"),
            client: database.connect().await,
            random: Random::new(u64::try_from(number).expect("a small number")),
            counts: vec![0; keys],
            made: 0,
            rolled_back: Vec::new(),
        }
    }

    fn row(&mut self) -> NewRow {
        let key = self.random.below(self.counts.len());
        self.counts[key] += 1;
        self.made += 1;
        let (name, number, made) = (&self.name, self.counts[key], self.made);
        NewRow {
            aggregatetype: AGGREGATE_TYPES[key % AGGREGATE_TYPES.len()],
            aggregateid: format!("{name}-key{key}"),
            event_type: format!("type{}", made % 7),
            payload: format!(r#"{{"number": {number}, "made": "{name}/{made}"}}"#),
        }
    }

    /// Inserts 1 to `most` rows in one statement.
    async fn insert(&mut self, most: usize) -> Vec<NewRow> {
        let count = 1 + self.random.below(most);
        let rows: Vec<NewRow> = (0..count).map(|_| self.row()).collect();
        let column = |field: fn(&NewRow) -> &str| rows.iter().map(field).collect::<Vec<_>>();
        self.client
            .execute(
                "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                 SELECT a, k, t, p::json FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS new (a, k, t, p)",
                &[
                    &column(|row| row.aggregatetype),
                    &column(|row| &row.aggregateid),
                    &column(|row| &row.event_type),
                    &column(|row| &row.payload),
                ],
            )
            .await
            .expect("rows can be inserted");
        rows
    }

    /// Inserts rows that the next statement takes back.
    async fn insert_in_vain(&mut self, most: usize) {
        let before = self.counts.clone();
        let rows = self.insert(most).await;
        self.rolled_back
            .extend(rows.into_iter().map(|row| row.payload));
        self.counts = before;
    }

    async fn say(&self, statement: &str) {
        let done = self.client.batch_execute(statement).await;
        done.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }

    /// Transactions of all kinds, one after the other.
    async fn write(mut self) -> Self {
        for number in 0..TRANSACTIONS {
            self.say("BEGIN").await;
            match number % 4 {
                0 => {
                    self.insert_in_vain(MAX_ROWS).await;
                    self.say("ROLLBACK").await;
                    continue;
                }
                1 => {
                    self.insert(MAX_ROWS / 2).await;
                    self.say("SAVEPOINT here").await;
                    self.insert_in_vain(MAX_ROWS / 2).await;
                    self.say("ROLLBACK TO here").await;
                    self.insert(MAX_ROWS / 2).await;
                }
                2 => {
                    self.say("SAVEPOINT first").await;
                    self.insert(MAX_ROWS / 2).await;
                    self.say("SAVEPOINT second").await;
                    self.insert(MAX_ROWS / 2).await;
                    self.say("RELEASE second; RELEASE first").await;
                }
                _ => {
                    self.insert(MAX_ROWS).await;
                }
            }
            self.say("COMMIT").await;
        }
        self
    }

    /// One COPY: all its rows may share one log position.
    async fn copy(mut self) -> Self {
        let mut lines = Vec::new();
        for _ in 0..COPIED_ROWS {
            let NewRow {
                aggregatetype,
                aggregateid,
                event_type,
                payload,
            } = self.row();
            lines.push(format!(
                "{aggregatetype}\t{aggregateid}\t{event_type}\t{payload}\n"
            ));
        }
        let copy = "COPY walpost.outbox (aggregatetype, aggregateid, type, payload) FROM STDIN";
        let sink = self.client.copy_in(copy).await.expect("COPY can begin");
        let mut sink = std::pin::pin!(sink);
        sink.send(bytes::Bytes::from(lines.concat()))
            .await
            .expect("COPY takes rows");
        let copied = sink.finish().await.expect("COPY ends");
        assert_eq!(copied, COPIED_ROWS as u64);
        self
    }
}

/// A row as Postgres has it.
#[derive(Debug, PartialEq, Eq)]
struct Committed {
    aggregatetype: String,
    aggregateid: String,
    event_type: String,
    payload: String,
    created_at_ms: u64,
}

async fn committed_rows(database: &Database) -> HashMap<String, Committed> {
    let query = "SELECT id::text, aggregatetype, aggregateid, type, payload::text,
                        floor(extract(epoch FROM created_at) * 1000)::int8 FROM walpost.outbox";
    let rows = database.rows(query, &[]).await;
    let committed = |row: &tokio_postgres::Row| Committed {
        aggregatetype: row.get(1),
        aggregateid: row.get(2),
        event_type: row.get(3),
        payload: row.get(4),
        created_at_ms: u64::try_from(row.get::<_, i64>(5)).expect("after 1970"),
    };
    rows.iter()
        .map(|row| (row.get(0), committed(row)))
        .collect()
}

/// The same, as it arrived.
fn as_committed(message: &Received) -> Committed {
    Committed {
        aggregatetype: message.property("aggregatetype").to_owned(),
        aggregateid: message.key.clone().expect("every message has its key"),
        event_type: message.property("type").to_owned(),
        payload: String::from_utf8(message.payload.clone()).expect("JSON is UTF-8"),
        created_at_ms: message
            .event_time_ms
            .expect("every message has its event time"),
    }
}

#[tokio::test]
async fn every_committed_row_arrives_once_and_in_order_and_no_rolled_back_row_ever() {
    // GIVEN an outbox with rows from before the start
    let database = Database::create("delivery").await;
    database.init(&[], &[]).await;
    let early = Writer::new(&database, 0, KEYS_PER_WRITER)
        .await
        .write()
        .await;

    // WHEN writers commit, roll back and copy while walpost streams
    let walpost = database.start(&[]).await;
    let copier = Writer::new(&database, WRITERS + 1, 500).await;
    let mut writers = Vec::new();
    for number in 1..=WRITERS {
        writers.push(Writer::new(&database, number, KEYS_PER_WRITER).await);
    }
    let writing = join_all(
        writers
            .into_iter()
            .map(|writer| tokio::spawn(writer.write())),
    );
    let (written, _) = tokio::join!(writing, copier.copy());
    let written = written
        .into_iter()
        .map(|joined| joined.expect("no writer panics"));
    let rolled_back: HashSet<String> = written
        .chain([early])
        .flat_map(|writer| writer.rolled_back)
        .collect();
    assert!(
        rolled_back.len() > TRANSACTIONS,
        "too few rows were rolled back"
    );
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each committed row has arrived, as it was committed, once
    let mut committed = committed_rows(&database).await;
    assert!(committed.len() > COPIED_ROWS + WRITERS * TRANSACTIONS);
    for aggregatetype in AGGREGATE_TYPES {
        let expected = committed
            .values()
            .filter(|row| row.aggregatetype == aggregatetype)
            .count();
        let topic = database.topic(aggregatetype);
        let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
        let mut numbers: HashMap<String, u64> = HashMap::new();
        for message in &received {
            let arrived = as_committed(message);
            assert!(
                !rolled_back.contains(&arrived.payload),
                "rolled back: {arrived:?}"
            );
            assert_eq!(arrived.aggregatetype, aggregatetype);
            let row = committed.remove(message.property("id"));
            assert_eq!(
                Some(&arrived),
                row.as_ref(),
                "another row, or one for the second time"
            );

            // AND the rows of each key in the order of their commits
            let payload: serde_json::Value =
                serde_json::from_slice(&message.payload).expect("the payload is JSON");
            let number = numbers.entry(arrived.aggregateid).or_default();
            *number += 1;
            assert_eq!(
                payload["number"],
                *number,
                "{} is out of order",
                message.property("id")
            );
        }
    }
    assert!(
        committed.is_empty(),
        "{} rows have not arrived",
        committed.len()
    );
}
