//! Guarantee: a payload's bytes arrive as they are, whatever their type and size, and NULL is not the same as nothing;
//! headers, delivery times and ids of every type come with it.
//!
//! All rows of a test have one key, so they are in one lane and arrive in the order in which they were inserted. Topics are
//! read on the wire's level, where a tombstone and a batch's own metadata can be seen.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::{Database, Entry, EntryMessage, Random, read_entries, servers};
use tokio_postgres::types::ToSql;

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: usize = 1024 * 1024;

async fn entries(database: &Database, topic: &str) -> Vec<Entry> {
    read_entries(&servers().pulsar_addr, &database.topic(topic), DEADLINE).await
}

fn messages(entries: Vec<Entry>) -> Vec<EntryMessage> {
    entries
        .into_iter()
        .flat_map(|entry| entry.messages)
        .collect()
}

/// Payload, or `None` for a tombstone.
fn payload(message: &EntryMessage) -> Option<Vec<u8>> {
    let is_null = message.metadata.null_value.unwrap_or_default();
    assert!(
        !is_null || message.payload.is_empty(),
        "a tombstone with a payload"
    );
    (!is_null).then(|| message.payload.clone())
}

fn properties(message: &EntryMessage) -> BTreeMap<&str, &str> {
    let pairs = message.metadata.properties.iter();
    pairs
        .map(|pair| (pair.key.as_str(), pair.value.as_str()))
        .collect()
}

/// Inserts each value, one transaction each, into an outbox with a payload of type `sql_type`, and compares what arrives
/// with `expected`, byte for byte.
async fn round_trip<V: ToSql + Sync>(
    sql_type: &str,
    cast: &str,
    values: &[Option<V>],
    expected: impl Fn(&V) -> Vec<u8>,
) {
    // GIVEN a stream
    let database = Database::create("payload").await;
    database.init(&["--payload", sql_type], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN every value is committed
    let insert = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', {cast})"
    );
    for value in values {
        database.rows(&insert, &[value]).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN exactly that arrives
    let received: Vec<_> = messages(entries(&database, "t").await)
        .iter()
        .map(payload)
        .collect();
    assert_eq!(received.len(), values.len());
    for (number, (received, value)) in received.iter().zip(values).enumerate() {
        let expected = value.as_ref().map(&expected);
        // Without the payloads in the message: they may have a megabyte.
        let lengths = (
            received.as_ref().map(Vec::len),
            expected.as_ref().map(Vec::len),
        );
        assert!(
            *received == expected,
            "value {number} differs (lengths {lengths:?})"
        );
    }
}

#[tokio::test]
async fn bytea_arrives_byte_for_byte() {
    let mut random = Random::new(1);
    let all_bytes: Vec<u8> = (0..=255).collect();
    let mut values = vec![
        Some(Vec::new()),
        None,
        Some(vec![0]),
        Some(b"\\x41".to_vec()),
        Some(all_bytes.repeat(3)),
        // Stored outside of the row, as it is and compressed; the last two also near and beyond a batch's size.
        Some(random.bytes(MIB)),
        Some(vec![0; MIB]),
        Some(random.bytes(127 * 1024)),
        Some(random.bytes(129 * 1024)),
        None,
        Some(Vec::new()),
    ];
    values.extend((1990..2010).map(|length| Some(random.bytes(length))));
    round_trip("bytea", "$1", &values, Clone::clone).await;
}

#[tokio::test]
async fn text_arrives_byte_for_byte() {
    let mut random = Random::new(2);
    // Postgres' text has every character but NUL.
    let all_characters: String = ('\u{1}'..='\u{ff}').collect();
    let digits: Vec<String> = random
        .bytes(MIB / 2)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let values = [
        String::new(),
        "a".to_owned(),
        "\\x4142".to_owned(),
        all_characters,
        "grüße \u{1f600} \u{10ffff} e\u{301}\u{feff}\r\n\t\u{1}".to_owned(),
        digits.concat(),
        "compressible ".repeat(MIB / 13),
    ];
    let values: Vec<_> = values.into_iter().map(Some).chain([None]).collect();
    round_trip("text", "$1", &values, |text| text.clone().into_bytes()).await;
}

/// JSON texts that a parser would write back otherwise.
fn json_texts() -> Vec<Option<String>> {
    let numbers: Vec<String> = Random::new(3)
        .bytes(MIB / 4)
        .iter()
        .map(u8::to_string)
        .collect();
    let texts = [
        "1".to_owned(),
        "{}".to_owned(),
        " \t\r\n{ \"b\" : 1 ,\"a\":2,\n\n\"b\":3 } ".to_owned(),
        r#"{"escapes": "\u00e9\ud83d\ude00\/\\\"\b\f\n", "plain": "é😀/", "k\u0065y": ""}"#
            .to_owned(),
        "[1.0, 1e2, 1E+2, -0, 0.10, 123456789012345678901234567890.12345678901234567890]"
            .to_owned(),
        "null".to_owned(),
        "\"\"".to_owned(),
        format!("[{}]", numbers.join(",")),
        format!("\"{}\"", "compressible ".repeat(MIB / 13)),
    ];
    texts.into_iter().map(Some).chain([None]).collect()
}

#[tokio::test]
async fn json_keeps_whitespace_escapes_and_digits() {
    round_trip("json", "$1::text::json", &json_texts(), |text| {
        text.clone().into_bytes()
    })
    .await;
}

#[tokio::test]
async fn jsonb_arrives_as_postgres_prints_it() {
    // What Postgres makes of each text is asked of Postgres.
    let database = Database::create("jsonb").await;
    let texts = json_texts();
    let mut printed = BTreeMap::new();
    for text in texts.iter().flatten() {
        let rows = database.rows("SELECT $1::text::jsonb::text", &[text]).await;
        printed.insert(text.clone(), rows[0].get::<_, String>(0).into_bytes());
    }
    let changed = printed
        .iter()
        .filter(|(text, printed)| text.as_bytes() != **printed);
    assert!(
        changed.count() > 2,
        "these texts do not tell json and jsonb apart"
    );
    round_trip("jsonb", "$1::text::jsonb", &texts, |text| {
        printed[text].clone()
    })
    .await;
}

#[tokio::test]
async fn headers_become_properties() {
    // GIVEN a stream
    let database = Database::create("headers").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN rows have headers of every kind, none, and one that would hide the row's id
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let rich = format!(
        r#"{{"traceparent": "{traceparent}", "größe 😀": "\"ü\"\n\\", "number": -12.50, "big": 12345678901234567890,
            "yes": true, "nothing": null, "list": [1, {{"a": "b"}}], "empty": "", "long": "{}"}}"#,
        "x".repeat(100_000)
    );
    let hiding = r#"{"id": "not the id", "type": "no type", "other": "header"}"#;
    for headers in [Some(rich.as_str()), None, Some("{}"), Some(hiding)] {
        let insert =
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, headers)
                      VALUES ('t', 'k', 'made', '{}', $1::text::jsonb)";
        database.rows(insert, &[&headers]).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN they are the message's properties, with the row's own beside
    let received = messages(entries(&database, "t").await);
    let ids = database
        .rows("SELECT id::text FROM walpost.outbox ORDER BY seq", &[])
        .await;
    let ids: Vec<&str> = ids.iter().map(|row| row.get(0)).collect();
    assert_eq!(received.len(), 4);
    let own = |number: usize| {
        BTreeMap::from([
            ("id", ids[number]),
            ("type", "made"),
            ("aggregatetype", "t"),
        ])
    };
    let mut expected = own(0);
    let long = "x".repeat(100_000);
    expected.extend([
        ("traceparent", traceparent),
        ("größe 😀", "\"ü\"\n\\"),
        ("number", "-12.50"),
        ("big", "12345678901234567890"),
        ("yes", "true"),
        ("list", r#"[1, {"a": "b"}]"#),
        ("empty", ""),
        ("long", &long),
    ]);
    assert_eq!(properties(&received[0]), expected);
    assert_eq!(properties(&received[1]), own(1));
    assert_eq!(properties(&received[2]), own(2));
    let mut expected = own(3);
    expected.insert("other", "header");
    assert_eq!(properties(&received[3]), expected);
}

#[tokio::test]
async fn a_delayed_message_travels_alone_with_its_time() {
    // GIVEN a stream that may well make one batch of what follows
    let database = Database::create("delayed").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[("WALPOST_BATCH_LINGER", "1s")]).await;

    // WHEN one transaction has rows with and without a delivery time, for one key
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, deliver_at)
             SELECT 't', 'k', 't', to_json(n), CASE WHEN n IN (3, 4, 7) THEN now() + n * interval '1 hour 1.0001 s' END
             FROM generate_series(1, 8) n",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each delayed one is an entry of its own that carries its time, the others carry none, and all are in order. (Which
    // of the others share an entry depends on when their rows came in.)
    let query = "SELECT payload::text, ceil(extract(epoch FROM deliver_at) * 1000)::int8 FROM walpost.outbox ORDER BY seq";
    let rows = database.rows(query, &[]).await;
    let expected: Vec<(Option<i64>, String)> =
        rows.iter().map(|row| (row.get(1), row.get(0))).collect();
    assert_eq!(expected.len(), 8);
    let mut found: Vec<(Option<i64>, String)> = Vec::new();
    for entry in entries(&database, "t").await {
        let at_ms = entry.metadata.deliver_at_time;
        assert!(
            at_ms.is_none() || entry.messages.len() == 1,
            "a delayed message shares its entry"
        );
        for message in entry.messages {
            let text = String::from_utf8(message.payload).expect("UTF-8");
            found.push((at_ms, text));
        }
    }
    assert_eq!(found, expected);
}

#[tokio::test]
async fn an_id_without_a_known_binary_form_makes_the_stream_go_on_as_text() {
    // GIVEN two tables, one of which has an id that walpost reads only as text
    let database = Database::create("numeric").await;
    database
        .sql(
            "CREATE TABLE odd (id numeric PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload bytea,
                               headers jsonb, created_at timestamptz, deliver_at timestamptz)",
        )
        .await;
    let settings = [("WALPOST_OUTBOX_TABLE", "walpost.outbox,odd")];
    database.init(&["--payload", "bytea"], &settings).await;
    let mut walpost = database.start(&settings).await;
    let usual = |payload: &str| {
        format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{payload}');"
        )
    };
    let odd = |id: &str, payload: &str| {
        format!(
            r#"INSERT INTO odd VALUES ({id}, 't', 'k', 't', {payload}, '{{"h": "v"}}', '2001-09-09 01:46:40.999+00', NULL);"#
        )
    };

    // WHEN that id turns up within a transaction whose first rows are sent already, and in those after it
    database.sql(&usual("\\x01")).await;
    database.wait_all_confirmed(DEADLINE).await;
    let mixed = [
        "BEGIN;",
        &usual("\\x02"),
        &usual("\\x03"),
        &odd("12345678901234567890.50", "'\\x0004'"),
        &usual("\\x05"),
        "COMMIT",
    ];
    database.sql(&mixed.concat()).await;
    walpost.wait_for_line("as text", DEADLINE).await;
    database.sql(&odd("-1", "NULL")).await;
    database.sql(&odd("0.1", "''")).await;
    database.sql(&usual("\\xff06")).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN everything has arrived, once, in order, and text has changed nothing
    let received = messages(entries(&database, "t").await);
    let expected = [
        Some(vec![1]),
        Some(vec![2]),
        Some(vec![3]),
        Some(vec![0, 4]),
        Some(vec![5]),
        None,
        Some(vec![]),
        Some(vec![255, 6]),
    ];
    assert_eq!(received.iter().map(payload).collect::<Vec<_>>(), expected);
    let odd = &received[3];
    let expected = [
        ("id", "12345678901234567890.50"),
        ("type", "t"),
        ("aggregatetype", "t"),
        ("h", "v"),
    ];
    assert_eq!(properties(odd), expected.into());
    assert_eq!(odd.metadata.event_time, Some(1_000_000_000_999));
    assert_eq!(properties(&received[5])["id"], "-1");
}
