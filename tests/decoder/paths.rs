//! Every base type, domains two deep, arrays, enums and composites, through every way that a row can take: with chosen values, and with
//! random ones.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::generators::literal;
use crate::samples::{BINARY, SAMPLES, WITHOUT_INPUT};
use crate::support::{Database, Random, admin, consume, eventually, servers};
use crate::{DEADLINE, QUICK};

/// What the database says about the output of values, and what the connector's login says.
const DATABASE_SAYS: [&str; 5] = [
    "datestyle = 'SQL, DMY'",
    "intervalstyle = 'sql_standard'",
    "bytea_output = 'escape'",
    "search_path = hidden, public",
    "timezone = 'Asia/Kolkata'",
];
const LOGIN_SAYS: [&str; 4] = [
    "extra_float_digits = -5",
    "timezone = 'America/St_Johns'",
    "datestyle = 'German'",
    "quote_all_identifiers = on",
];
/// What walpost's sessions have, whatever those say.
const WALPOST_SAYS: &str = "
    SET datestyle TO 'ISO'; SET intervalstyle TO 'postgres'; SET timezone TO 'UTC'; SET bytea_output TO 'hex';
    SET extra_float_digits TO 3; SET quote_all_identifiers TO off; SET search_path TO pg_catalog, pg_temp";

/// The ways, each with an aggregate type, and so a topic, of its own.
const WAYS: [&str; 4] = ["scan", "stream", "straggler", "poll"];

/// One message, without what differs from way to way.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    key: String,
    payload: Vec<u8>,
    id: String,
    event_type: String,
    event_time_ms: u64,
}

/// Random values of each type.
const RANDOM_VALUES: usize = 4;
/// Of the chosen values' rows: 2024-02-03 01:02:03.4567 in UTC, in microseconds.
const CHOSEN_TIME: usize = 1_706_922_123_456_700;

/// A type, and the literals of its values, each with the time of its rows.
struct Sample {
    /// For names.
    name: String,
    /// As SQL has it.
    sql: String,
    values: Vec<(String, usize)>,
}

/// With a seed: of random values.
fn samples(only_binary: bool, seed: Option<u64>) -> Vec<Sample> {
    let chosen = |values: &[&str]| {
        let values = values.iter();
        values
            .map(|value| ((*value).to_owned(), CHOSEN_TIME))
            .collect::<Vec<_>>()
    };
    let mut random = seed.map(Random::new);
    let mut values = |name: &str, values: &[&str]| match &mut random {
        Some(random) => (0..RANDOM_VALUES)
            .map(|_| {
                // Until 2105; microseconds are cut.
                let time = random.below(1 << 32) * 1_000_000 + random.below(1_000_000);
                (literal(name, random), time)
            })
            .collect(),
        None => chosen(values),
    };
    let mut samples: Vec<Sample> = SAMPLES
        .iter()
        .filter(|(name, _)| !only_binary || BINARY.contains(name))
        .map(|(name, chosen)| Sample {
            name: (*name).to_owned(),
            sql: match *name {
                "bpchar" => "character(8)".to_owned(),
                name => format!("pg_catalog.\"{name}\""),
            },
            values: values(name, chosen),
        })
        .collect();
    if !only_binary {
        let user = |name: &str, values: &[&str]| Sample {
            name: name.to_owned(),
            sql: format!("hidden.{name}"),
            values: chosen(values),
        };
        samples.push(user("mood", &["sad", "so, so"]));
        samples.push(user("pair", &["(0.1,\"2024-02-03 01:02:03+00\")", "(,)"]));
        samples.push(user("floats", &["[0.1,0.30000000000000004)", "empty"]));
    }
    samples
}

/// SQL: the types, and two tables for each of them in which each column but one is made of it. Returns the tables.
fn tables(samples: &[Sample], only_binary: bool) -> (String, Vec<String>) {
    let mut sql = "
        CREATE SCHEMA hidden;
        CREATE TABLE hidden.\"A Table\" ();
        CREATE TYPE hidden.mood AS ENUM ('sad', 'so, so');
        CREATE TYPE hidden.pair AS (amount float8, at timestamptz);
        CREATE TYPE hidden.floats AS RANGE (subtype = float8);"
        .to_owned();
    let mut tables = Vec::new();
    for Sample { name, sql: of, .. } in samples {
        let d = format!("hidden.\"d2_{name}\"");
        let more = "aggregatetype text, headers jsonb, txid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
                    seq bigint GENERATED ALWAYS AS IDENTITY";
        let (first, second) = if only_binary {
            (d.clone(), of.clone())
        } else {
            (format!("hidden.\"c_{name}\""), format!("{of}[]"))
        };
        let made = write!(
            sql,
            "CREATE DOMAIN hidden.\"d1_{name}\" AS {of};
             CREATE DOMAIN {d} AS hidden.\"d1_{name}\";
             CREATE TYPE hidden.\"c_{name}\" AS (a {of}, b {of}[], c {d});
             CREATE TABLE hidden.\"t_{name}\" (id {d}, aggregateid {of}, type {first}, payload {d}, created_at timestamptz, {more});
             CREATE TABLE hidden.\"u_{name}\" (id {of}, aggregateid {d}, type {second}, payload {of}, created_at timestamp, {more});"
        );
        made.expect("a String takes everything");
        tables.push(format!("hidden.\"t_{name}\""));
        tables.push(format!("hidden.\"u_{name}\""));
    }
    (sql, tables)
}

/// SQL: the same rows for each way.
fn insert(samples: &[Sample], only_binary: bool, way: &str) -> String {
    let mut sql = String::new();
    for Sample {
        name,
        sql: of,
        values,
    } in samples
    {
        for (number, (value, time)) in values.iter().enumerate() {
            let v = format!("'{}'::{of}", value.replace('\'', "''"));
            let (first, second) = if only_binary {
                (v.clone(), v.clone())
            } else {
                (
                    format!("ROW({v}, ARRAY[{v}, NULL], {v})"),
                    format!("ARRAY[{v}, {v}]"),
                )
            };
            for (table, event_type, epoch) in
                [("t", first, "timestamptz"), ("u", second, "timestamp")]
            {
                let inserted = write!(
                    sql,
                    "INSERT INTO hidden.\"{table}_{name}\" (id, aggregateid, type, payload, created_at, aggregatetype, headers)
                     VALUES ({v}, {v}, {event_type}, {v}, {epoch} 'epoch' + {time} * interval '1 microsecond', '{way}', '{{\"label\": \"{table}_{name} {number}\"}}');"
                );
                inserted.expect("a String takes everything");
            }
        }
    }
    sql
}

/// The messages of one way's topic, by label.
async fn received(database: &Database, way: &str, expected: usize) -> BTreeMap<String, Message> {
    let received = consume(
        &servers().pulsar_url,
        &database.topic(way),
        expected,
        DEADLINE,
    )
    .await;
    assert_eq!(received.len(), expected, "{way}");
    let message = |message: &crate::support::Received| {
        assert_eq!(message.property("aggregatetype"), way);
        assert_eq!(message.properties.len(), 4, "{:?}", message.properties);
        let read = Message {
            key: message.key.clone().expect("a key"),
            payload: message.payload.clone(),
            id: message.property("id").to_owned(),
            event_type: message.property("type").to_owned(),
            event_time_ms: message.event_time_ms.expect("a time"),
        };
        (message.property("label").to_owned(), read)
    };
    received.iter().map(message).collect()
}

/// What the messages must be: the values' text as the server prints it with walpost's settings; of `bytea` the bytes.
async fn expected(database: &Database, tables: &[String]) -> BTreeMap<String, Message> {
    let session = database.connect().await;
    session.batch_execute(WALPOST_SAYS).await.expect("settings");
    let mut expected = BTreeMap::new();
    for table in tables {
        let payload = if table.ends_with("_bytea\"") {
            "payload::bytea"
        } else {
            "convert_to(format('%s', payload), 'UTF8')"
        };
        let sql = format!(
            "SELECT headers->>'label', format('%s', aggregateid), {payload}, format('%s', id), format('%s', type),
                    floor(extract(epoch FROM created_at) * 1000)::int8
             FROM {table} WHERE aggregatetype = 'scan'"
        );
        for row in session.query(&sql, &[]).await.expect("the rows") {
            let message = Message {
                key: row.get(1),
                payload: row.get(2),
                id: row.get(3),
                event_type: row.get(4),
                event_time_ms: row.get::<_, i64>(5).unsigned_abs(),
            };
            expected.insert(row.get(0), message);
        }
    }
    expected
}

fn path(topic: &str) -> String {
    topic.replace("persistent://", "/admin/v2/persistent/")
}

/// One row of each type, shape and value goes every way.
async fn compare(only_binary: bool, seed: Option<u64>) {
    // GIVEN an outbox table for each type, and settings for the output of values that are not walpost's
    let database = Database::create(if only_binary { "binary" } else { "text" }).await;
    let samples = samples(only_binary, seed);
    let (sql, tables) = tables(&samples, only_binary);
    database.sql(&sql).await;
    let names = tables.join(", ");
    let settings = [
        &QUICK[..],
        &[
            ("WALPOST_OUTBOX_TABLE", names.as_str()),
            ("WALPOST_RETRY_MAX_ATTEMPTS", "100000"),
        ],
    ]
    .concat();
    database.init(&[], &settings).await;
    let login = format!("{}_run", database.name);
    for says in DATABASE_SAYS {
        database
            .sql(&format!("ALTER DATABASE {} SET {says}", database.name))
            .await;
    }
    for says in LOGIN_SAYS {
        database
            .sql(&format!("ALTER ROLE {login} SET {says}"))
            .await;
    }
    let rows = samples
        .iter()
        .map(|sample| 2 * sample.values.len())
        .sum::<usize>();
    let refused = path(&database.topic("straggler"));
    let admin_url = &servers().pulsar_admin_url;
    admin(admin_url, "PUT", &refused, "").await;
    admin(admin_url, "POST", &format!("{refused}/terminate"), "").await;

    // WHEN the rows are read from the table because there was no slot when they came
    database.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()").await;
    database.sql(&insert(&samples, only_binary, "scan")).await;
    let mut walpost = database.start(&settings).await;
    // AND they are streamed, and refused there
    database.sql(&insert(&samples, only_binary, "stream")).await;
    database
        .sql(&insert(&samples, only_binary, "straggler"))
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    let text = walpost.output().contains("starting the stream again");
    assert_eq!(text, !only_binary, "{}", walpost.output());
    let query = "SELECT count(*) FROM walpost.straggler";
    let stored: i64 = database.rows(query, &[]).await[0].get(0);
    assert_eq!(stored, i64::try_from(rows).expect("few"));
    // AND what was refused is published at last
    admin(admin_url, "DELETE", &format!("{refused}?force=true"), "").await;
    eventually(DEADLINE, "the stragglers to go", async || {
        let rows = database.rows(query, &[]).await;
        (rows[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    walpost.sigterm();
    assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
    // AND they are polled
    database.sql(&insert(&samples, only_binary, "poll")).await;
    let poll = [&settings[..], &[("WALPOST_MODE", "poll")]].concat();
    let poller = database.walpost(&["run"], &poll).spawn();

    // THEN every way gives the same messages, and they are the values as Postgres prints them
    let expected = expected(&database, &tables).await;
    assert_eq!(expected.len(), rows);
    for way in WAYS {
        let received = received(&database, way, rows).await;
        for (label, expected) in &expected {
            assert_eq!(
                received.get(label),
                Some(expected),
                "{way}: {label}, seed {seed:?}"
            );
        }
    }
    poller.stop().await;
}

#[tokio::test]
async fn values_that_the_stream_reads_in_binary_format_are_the_same_on_every_way() {
    compare(true, None).await;
}

#[tokio::test]
async fn random_values_that_the_stream_reads_in_binary_format_are_the_same_on_every_way() {
    compare(true, Some(1)).await;
}

#[tokio::test]
async fn values_of_every_type_are_the_same_on_every_way() {
    compare(false, None).await;
}

#[tokio::test]
async fn random_values_of_every_type_are_the_same_on_every_way() {
    compare(false, Some(2)).await;
}

#[tokio::test]
async fn every_base_type_of_the_server_has_a_sample() {
    let database = Database::create("samples").await;
    let query = "SELECT typname::text FROM pg_type
                 WHERE typtype IN ('b', 'r', 'm') AND typcategory <> 'A' AND typnamespace = 'pg_catalog'::regnamespace";
    for row in database.rows(query, &[]).await {
        let name: String = row.get(0);
        assert!(
            SAMPLES.iter().any(|(known, _)| *known == name)
                || WITHOUT_INPUT.contains(&name.as_str()),
            "type {name} is new: give it a sample"
        );
    }
}
