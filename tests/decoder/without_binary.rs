//! Columns whose type has no binary form. The stream asks for binary values of all columns of all tables of the publication, and the
//! server refuses to send such a one.

use crate::support::Database;
use crate::{DEADLINE, QUICK};

/// What has no binary form although its own type has a send function.
const TYPES: &str = "CREATE TYPE part AS (id int, acl aclitem)";
const ACL: &str = "makeaclitem(10, 10, 'SELECT', false)";

async fn insert(database: &Database) {
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '{\"n\": 1}')")
        .await;
}

#[tokio::test]
async fn a_column_without_binary_form_in_the_outbox_does_not_stop_the_stream() {
    for column in [
        format!("acl aclitem[] DEFAULT ARRAY[{ACL}]"),
        format!("acl part DEFAULT ROW(1, {ACL})"),
    ] {
        // GIVEN an outbox with a column of such a type that walpost does not read
        let database = Database::create("decoder").await;
        database.init(&[], &[]).await;
        database.sql(TYPES).await;
        let add = format!("ALTER TABLE walpost.outbox ADD COLUMN {column}");
        database.sql(&add).await;

        // WHEN rows are committed while walpost runs
        let mut walpost = database.start(&QUICK).await;
        insert(&database).await;
        insert(&database).await;

        // THEN they arrive, and the log says why values are text from now on
        database.wait_all_sent(DEADLINE).await;
        walpost
            .wait_for_line("starting the stream again with values as text", DEADLINE)
            .await;
        walpost.stop().await;
    }
}

#[tokio::test]
async fn a_column_without_binary_form_in_another_table_does_not_stop_the_stream() {
    // GIVEN a publication that has another table with such a column
    let database = Database::create("decoder").await;
    database.init(&[], &[]).await;
    database
        .sql(&format!(
            "{TYPES};
             CREATE TABLE rights (id int PRIMARY KEY, acl aclitem[], one part);
             DROP PUBLICATION walpost;
             CREATE PUBLICATION walpost FOR ALL TABLES WITH (publish = 'insert', publish_via_partition_root = true)"
        ))
        .await;
    let walpost = database.start(&QUICK).await;
    insert(&database).await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN that one gets rows, in the middle of a transaction too: THEN the outbox' rows arrive all the same, once each
    for id in 1..=2 {
        database
            .sql(&format!(
                "BEGIN;
                 INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '{{}}');
                 INSERT INTO rights VALUES ({id}, ARRAY[{ACL}], ROW(1, {ACL}));
                 INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '{{}}');
                 COMMIT"
            ))
            .await;
    }
    insert(&database).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let topic = database.topic("t");
    let arrived =
        crate::support::consume(&crate::support::servers().pulsar_url, &topic, 6, DEADLINE).await;
    assert_eq!(arrived.len(), 6);
}
