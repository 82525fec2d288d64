//! Columns that had another name for a while: their rows in the log are not read without them.

use std::collections::BTreeMap;

use super::support::{Database, Received, consume, on_each_major, servers};
use super::{DEADLINE, insert, on};

const SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");

/// Inserts a row with values in all columns, while this one has another name.
async fn insert_while_renamed(database: &Database, column: &str) {
    let topic = database.topic("own");
    database
        .sql(&format!(
            "ALTER TABLE walpost.outbox RENAME COLUMN {column} TO former;
             DO $$ BEGIN EXECUTE replace(
                 'INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic, headers, created_at)
                  VALUES (''t'', ''{column}'', ''e'', ''p'', ''{topic}'', ''{{\"of\": \"{column}\"}}'', ''2020-01-02 03:04:05+00'')',
                 ' {column},', ' former,');
             END $$;
             ALTER TABLE walpost.outbox RENAME COLUMN former TO {column}"
        ))
        .await;
}

async fn optional_columns(major: i32) {
    // GIVEN rows from times in which one of the optional columns had another name, and then its own again
    let database = on(major).await;
    let columns = ["topic", "headers", "type"];
    for column in columns {
        insert_while_renamed(&database, column).await;
    }
    insert(&database, "walpost.outbox", "last").await;

    // WHEN walpost runs THEN each is the message that it would be if nothing had been renamed
    let walpost = database.start(&[SOON]).await;
    database.wait_all_confirmed(DEADLINE).await;
    let received = consume(&servers().pulsar_url, &database.topic("own"), 3, DEADLINE).await;
    let by_key = |message: Received| (message.key.clone().unwrap_or_default(), message);
    let received: BTreeMap<String, Received> = received.into_iter().map(by_key).collect();
    for column in columns {
        let message = &received[column];
        assert_eq!(message.property("of"), column);
        assert_eq!(message.property("type"), "e");
        assert_eq!(message.event_time_ms, Some(1_577_934_245_000));
    }
    assert_eq!(super::arrived(&database, 1).await, ["last"]);
    walpost.stop().await;
}

async fn columns_that_are_added(major: i32) {
    // GIVEN rows in the log from before a column that is read was added, and from before one beside it was dropped
    let database = on(major).await;
    database
        .sql("ALTER TABLE walpost.outbox ADD COLUMN note text, DROP COLUMN headers")
        .await;
    insert(&database, "walpost.outbox", "one").await;
    database
        .sql("ALTER TABLE walpost.outbox ADD COLUMN more text, DROP COLUMN note")
        .await;
    insert(&database, "walpost.outbox", "two").await;
    database
        .sql("ALTER TABLE walpost.outbox ADD COLUMN headers jsonb")
        .await;
    insert(&database, "walpost.outbox", "three").await;

    // WHEN walpost runs THEN the log brings them, by the slot that there is
    let walpost = database.start(&[SOON]).await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(super::arrived(&database, 3).await, ["one", "two", "three"]);
    let said = walpost.output();
    assert!(!said.contains("making a new slot"), "{said}");
    walpost.stop().await;
}

on_each_major! {
    rows_of_a_time_in_which_an_optional_column_had_another_name_are_read_with_it: optional_columns();
    rows_from_before_a_column_was_added_are_streamed: columns_that_are_added();
}
