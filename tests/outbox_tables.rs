//! Guarantee: any table serves as an outbox (several, of any name and column names, with columns of any type beside), and
//! a table may change while walpost streams.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use support::{Database, Received, consume, servers};

const DEADLINE: Duration = Duration::from_secs(60);

async fn read(topic: &str, expected: usize) -> Vec<Received> {
    consume(&servers().pulsar_url, topic, expected, DEADLINE).await
}

fn texts(received: &[Received]) -> Vec<String> {
    let text = |message: &Received| String::from_utf8(message.payload.clone()).expect("UTF-8");
    received.iter().map(text).collect()
}

#[tokio::test]
async fn several_tables_are_one_stream_in_commit_order() {
    // GIVEN two outbox tables, one of them with a name that needs quotes, and a published table that is none
    let database = Database::create("tables").await;
    database
        .sql(
            r#"CREATE SCHEMA shop;
               CREATE TABLE shop."Other, Outbox" (
                   id int PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, type text, payload text);
               CREATE TABLE shop.stock (id int)"#,
        )
        .await;
    let settings = [(
        "WALPOST_OUTBOX_TABLE",
        r#"walpost.outbox, shop."Other, Outbox""#,
    )];
    database.init(&["--payload", "text"], &settings).await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE shop.stock")
        .await;
    let walpost = database.start(&settings).await;

    // WHEN a key's rows go to both, within one transaction and across
    for number in [1, 5, 9] {
        database
            .sql(&format!(
                r#"BEGIN;
                   INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'a', '{}');
                   INSERT INTO shop.stock VALUES ({number});
                   INSERT INTO shop."Other, Outbox" VALUES ({number}, 't', 'k', 'b', '{}');
                   INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'a', '{}');
                   COMMIT;
                   INSERT INTO shop."Other, Outbox" VALUES ({number} + 1, 't', 'k', 'b', '{}')"#,
                number,
                number + 1,
                number + 2,
                number + 3
            ))
            .await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN they arrive in the order in which they were committed, and nothing of the third table does
    let received = read(&database.topic("t"), 12).await;
    let expected: Vec<String> = (1..=12).map(|number| number.to_string()).collect();
    assert_eq!(texts(&received), expected);
    let types: Vec<&str> = received
        .iter()
        .map(|message| message.property("type"))
        .collect();
    assert_eq!(types, ["a", "b", "a", "b"].repeat(3));
}

#[tokio::test]
async fn a_table_with_other_column_names_and_strange_neighbours_is_used_as_it_is() {
    // GIVEN somebody else's table, whose unread columns have types that walpost cannot read
    let database = Database::create("columns").await;
    database
        .sql(
            r#"CREATE TYPE mood AS ENUM ('sad', 'happy');
               CREATE TABLE "OutboxEvent" (
                   area int4range, mood mood, places point[], "Event Id" bigint PRIMARY KEY, entity int NOT NULL,
                   kind varchar(255), event varchar(255), body varchar, destination text, meta json,
                   happened timestamp, due timestamp, price numeric)"#,
        )
        .await;
    let settings = [
        ("WALPOST_OUTBOX_TABLE", r#""OutboxEvent""#),
        ("WALPOST_COLUMN_ID", "Event Id"),
        ("WALPOST_COLUMN_AGGREGATETYPE", "kind"),
        ("WALPOST_COLUMN_AGGREGATEID", "entity"),
        ("WALPOST_COLUMN_TYPE", "event"),
        ("WALPOST_COLUMN_PAYLOAD", "body"),
        ("WALPOST_COLUMN_TOPIC", "destination"),
        ("WALPOST_COLUMN_HEADERS", "meta"),
        ("WALPOST_COLUMN_CREATED_AT", "happened"),
        ("WALPOST_COLUMN_DELIVER_AT", "due"),
    ];
    database.init(&[], &settings).await;
    let mut walpost = database.start(&settings).await;

    // WHEN rows are inserted with all columns, and with as few as there may be
    let elsewhere = database.topic("elsewhere");
    database
        .sql(&format!(
            r#"INSERT INTO "OutboxEvent" VALUES
               ('[1,5)', 'sad', array[point(1, 2)], 9007199254740993, -7, 'thing', 'made', 'grüße',
                NULL, '{{"n": 1}}', '2024-02-29 12:34:56.789999', NULL, 1.50),
               (NULL, NULL, NULL, -1, 2147483647, NULL, NULL, '', '{elsewhere}', NULL, NULL, NULL, NULL)"#
        ))
        .await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN each column has played its part
    let received = read(&database.topic("thing"), 1).await;
    assert_eq!(texts(&received), ["grüße"]);
    let message = &received[0];
    assert_eq!(message.key.as_deref(), Some("-7"));
    assert_eq!(message.event_time_ms, Some(1_709_210_096_789));
    let expected = [
        ("id", "9007199254740993"),
        ("type", "made"),
        ("aggregatetype", "thing"),
        ("n", "1"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(message.properties, expected.into());

    let received = read(&elsewhere, 1).await;
    assert_eq!(texts(&received), [""]);
    let message = &received[0];
    assert_eq!(message.key.as_deref(), Some("2147483647"));
    assert!(
        message.event_time_ms.is_none_or(|time| time == 0),
        "not set"
    );
    assert_eq!(
        message.properties,
        [("id".to_owned(), "-1".to_owned())].into()
    );

    // AND columns that nobody reads have not made the stream slower by asking for text
    assert!(
        !walpost.output().contains("as text"),
        "{}",
        walpost.output()
    );
    walpost.sigterm();
    assert_eq!(walpost.wait_exit(DEADLINE).await, 0);
}

#[tokio::test]
async fn columns_added_renamed_and_dropped_while_streaming_are_followed() {
    // GIVEN a stream from a table
    let database = Database::create("changes").await;
    database
        .sql(
            "CREATE TABLE events (pad text, id int PRIMARY KEY, aggregatetype text, destination text,
                                  aggregateid text, type text, payload text)",
        )
        .await;
    let settings = [("WALPOST_OUTBOX_TABLE", "events")];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    let elsewhere = database.topic("elsewhere");
    let insert = |id: u32, more: &str, values: &str| {
        format!(
            "INSERT INTO events (id, aggregatetype, aggregateid, type, payload{more})
             VALUES ({id}, 't', 'k', 'e', 'payload {id}'{values});"
        )
    };
    let to_elsewhere = format!(", '{elsewhere}'");

    // WHEN its columns change, also within a transaction that has rows before and after
    for statements in [
        insert(1, ", pad, destination", &format!(", 'pad'{to_elsewhere}")),
        "ALTER TABLE events ADD COLUMN headers jsonb".to_owned(),
        insert(2, ", headers", r#", '{"added": 2}'"#),
        "ALTER TABLE events RENAME COLUMN destination TO topic".to_owned(),
        insert(3, ", topic", &to_elsewhere),
        [
            "BEGIN;".to_owned(),
            insert(4, ", pad, topic", &format!(", 'pad'{to_elsewhere}")),
            "ALTER TABLE events DROP COLUMN pad;".to_owned(),
            insert(5, ", topic", &to_elsewhere),
            "ALTER TABLE events RENAME COLUMN topic TO destination;".to_owned(),
            insert(6, ", destination", &to_elsewhere),
            "COMMIT".to_owned(),
        ]
        .concat(),
        "ALTER TABLE events RENAME COLUMN headers TO notes".to_owned(),
        insert(7, ", notes", r#", '{"added": 7}'"#),
        "ALTER TABLE events ADD COLUMN created_at timestamptz DEFAULT '2001-09-09 01:46:40Z'"
            .to_owned(),
        insert(8, "", ""),
    ] {
        database.sql(&statements).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each row was read with the columns of its moment
    let usual = read(&database.topic("t"), 5).await;
    assert_eq!(
        texts(&usual),
        [
            "payload 1",
            "payload 2",
            "payload 6",
            "payload 7",
            "payload 8"
        ]
    );
    let other = read(&elsewhere, 3).await;
    assert_eq!(texts(&other), ["payload 3", "payload 4", "payload 5"]);
    let with_header: BTreeSet<&str> = usual
        .iter()
        .chain(&other)
        .filter(|message| message.properties.contains_key("added"))
        .map(|message| message.property("id"))
        .collect();
    assert_eq!(with_header, ["2"].into());
    assert_eq!(usual[4].event_time_ms, Some(1_000_000_000_000));
}
