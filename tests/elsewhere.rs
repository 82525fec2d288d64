//! Guarantee: what comes from another cluster, or another time, loses nothing in silence. Rows whose `txid` this cluster has not
//! come to, and snapshots that know more than it does, are refused with statements that do what they say.

mod support;

use std::time::Duration;

use support::{Committed, Database, Load, consume, insert_many, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const NOTED_SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");
const POLL: (&str, &str) = ("WALPOST_MODE", "poll");

/// An outbox as a restored dump leaves it: no slot, no progress, and 30 rows, the first 20 with a `txid` of a cluster that was
/// far busier.
async fn restored() -> Database {
    let database = Database::create("elsewhere").await;
    Load::prepare(&database).await;
    let drop_slot = "SELECT pg_drop_replication_slot($1::text::name)";
    database.rows(drop_slot, &[&database.slot]).await;
    database.sql("DELETE FROM walpost.progress").await;
    insert_many(&database.client, "a", 20).await;
    database
        .sql("UPDATE walpost.outbox SET txid = (txid::text::bigint + 1000000000)::text::xid8")
        .await;
    insert_many(&database.client, "b", 10).await;
    database
}

/// The text between two others; both must be there.
fn between<'a>(said: &'a str, from: &str, upto: &str) -> &'a str {
    let found = said
        .split_once(from)
        .and_then(|(_, rest)| rest.split_once(upto));
    found
        .unwrap_or_else(|| panic!("no {from:?} … {upto:?} in:\n{said}"))
        .0
}

async fn refused(database: &Database, settings: &[(&str, &str)]) -> String {
    let (code, said) = database.walpost(&["run"], settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    said
}

/// Runs until every row is known as sent, and expects each committed one once.
async fn arrives_once(database: &Database) {
    let walpost = database.start(&[NOTED_SOON]).await;
    insert_many(&database.client, "b", 10).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(database).await;
    let topic = Load::topic(database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn rows_with_a_txid_of_the_future_are_refused_and_arrive_once_they_have_one_of_this_cluster()
{
    // GIVEN such rows, and a slot that was made behind them
    let database = restored().await;
    database.init(&[], &[]).await;

    // THEN they are not passed over: check warns, run refuses
    let (_, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    assert!(
        said.contains("warn  rows         20 rows of walpost.outbox"),
        "{said}"
    );
    let said = refused(&database, &[]).await;
    assert!(said.contains("20 rows of table walpost.outbox"), "{said}");

    // WHEN the statements for rows that nobody has published are run, while others write: THEN each row comes once
    insert_many(&database.client, "b", 10).await;
    database
        .sql(between(
            &said,
            "to publish them: ",
            ", and after its commit ",
        ))
        .await;
    insert_many(&database.client, "b", 10).await;
    database
        .sql(between(&said, ", and after its commit ", "; if they are"))
        .await;
    arrives_once(&database).await;
    let (_, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    assert!(said.contains("ok    rows"), "{said}");
}

#[tokio::test]
async fn rows_with_a_txid_of_the_future_that_are_published_already_are_not_sent_again() {
    let database = restored().await;
    database.init(&[], &[]).await;
    let said = refused(&database, &[]).await;
    database
        .sql(between(
            &said,
            "published already: ",
            ", and UPDATE walpost.progress",
        ))
        .await;
    let progress = between(
        &said,
        "'3' WHERE txid >= pg_snapshot_xmax(pg_current_snapshot()); COMMIT, and ",
        "; then start",
    );
    database.sql(progress).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    database.wait_all_sent(DEADLINE).await;
    insert_many(&database.client, "c", 10).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, 20, DEADLINE).await;
    let keys: Vec<_> = received
        .iter()
        .map(|message| message.key.as_deref())
        .collect();
    assert_eq!(keys, [[Some("b"); 10], [Some("c"); 10]].concat());
}

#[tokio::test]
async fn polling_refuses_rows_with_a_txid_of_the_future_although_no_other_row_is_new() {
    let database = restored().await;
    database
        .sql("DELETE FROM walpost.outbox WHERE aggregateid = 'b'")
        .await;
    let said = refused(&database, &[POLL]).await;
    database
        .sql(between(
            &said,
            "to publish them: ",
            ", and after its commit ",
        ))
        .await;
    let settings = [POLL, NOTED_SOON];
    database
        .sql(between(&said, ", and after its commit ", "; if they are"))
        .await;
    let walpost = database.walpost(&["run"], &settings).spawn();
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    committed.assert_exactly_once(&consume(&servers().pulsar_url, &topic, 20, DEADLINE).await);
}

#[tokio::test]
async fn a_delivered_snapshot_of_the_future_is_refused_and_each_way_out_does_what_it_says() {
    // GIVEN rows that are delivered, one that is not, and a snapshot in which all that is still to come is delivered
    let database = Database::create("future").await;
    Load::prepare(&database).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    insert_many(&database.client, "a", 10).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    insert_many(&database.client, "a", 1).await;
    let ahead = "UPDATE walpost.progress SET delivered = '900000000000:900000000000:'";
    database.sql(ahead).await;

    // THEN neither mode believes it
    let said = refused(&database, &[]).await;
    assert!(
        said.contains("which this cluster has not come to"),
        "{said}"
    );
    refused(&database, &[POLL]).await;

    // WHEN it is adopted: THEN the stream goes on, and brings the one row
    database
        .sql(between(&said, "has published: ", "; to publish"))
        .await;
    arrives_once(&database).await;

    // WHEN every row is to be published again: THEN every row is
    database.sql(ahead).await;
    let said = refused(&database, &[]).await;
    database
        .sql(between(&said, "every row again: ", "; after pg_upgrade"))
        .await;
    let walpost = database.start(&[NOTED_SOON]).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, 2 * committed.len(), DEADLINE).await;
    assert_eq!(committed.assert_at_least_once(&received), committed.len());
}

/// Somebody else's table, with columns for the order and the transaction that may be empty.
async fn with_loose_columns() -> (Database, [(&'static str, &'static str); 2]) {
    let database = Database::create("loose").await;
    database
        .sql(
            "CREATE TABLE events (id text PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload text,
                                  seq bigint, txid xid8 DEFAULT pg_current_xact_id())",
        )
        .await;
    (database, [("WALPOST_OUTBOX_TABLE", "events"), NOTED_SOON])
}

async fn insert_loose(database: &Database, id: &str, seq: &str) {
    let sql = format!("INSERT INTO events VALUES ('{id}', 't', 'k', 't', '{id}', {seq})");
    database.sql(&sql).await;
}

/// The payloads of the table's topic, in order.
async fn arrived(database: &Database, expected: usize) -> Vec<String> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
    let text = |message: support::Received| String::from_utf8(message.payload).expect("UTF-8");
    received.into_iter().map(text).collect()
}

#[tokio::test]
async fn rows_without_a_place_in_the_order_are_refused_until_they_have_one() {
    for mode in [("WALPOST_MODE", "stream"), POLL] {
        // GIVEN rows from before the slot, three of them with numbers that no scan begins with
        let (database, settings) = with_loose_columns().await;
        for (id, seq) in [
            ("null", "NULL"),
            ("zero", "0"),
            ("below", "-5"),
            ("one", "1"),
        ] {
            insert_loose(&database, id, seq).await;
        }
        database.init(&[], &settings).await;
        let settings = [&settings[..], &[mode]].concat();

        // THEN nothing is passed over
        let said = refused(&database, &settings).await;
        assert!(
            said.contains("3 rows of table public.events have a seq that is NULL or below 1"),
            "{said}"
        );

        // AND WHEN the statement is run, THEN all arrive, in the order that it gave them
        let mend = between(&said, "for instance: ", "; then restart");
        database.sql(mend).await;
        let walpost = database.walpost(&["run"], &settings).spawn();
        assert_eq!(
            arrived(&database, 4).await,
            ["one", "null", "below", "zero"]
        );
        walpost.stop().await;
    }
}

#[tokio::test]
async fn rows_without_a_transaction_are_refused_until_they_have_one() {
    for mode in [("WALPOST_MODE", "stream"), POLL] {
        let (database, settings) = with_loose_columns().await;
        insert_loose(&database, "old", "1").await;
        database.sql("UPDATE events SET txid = NULL").await;
        database.init(&[], &settings).await;
        let settings = [&settings[..], &[mode]].concat();

        let said = refused(&database, &settings).await;
        assert!(
            said.contains("1 rows of table public.events have no txid"),
            "{said}"
        );

        let publish = between(&said, "to publish them: ", ", and after its commit ");
        database.sql(publish).await;
        let again = between(&said, ", and after its commit ", "; if they are");
        database.sql(again).await;
        let walpost = database.walpost(&["run"], &settings).spawn();
        assert_eq!(arrived(&database, 1).await, ["old"]);
        walpost.stop().await;
    }
}
