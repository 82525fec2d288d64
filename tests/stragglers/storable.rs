//! Stragglers whose texts a table, or an index over it, does not take easily.

use crate::support::{consume, servers};
use crate::*;

/// Text that does not compress, far longer than an entry of a B-tree may be (2.7 kB).
const LONG: &str = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 256) i)";

#[tokio::test]
async fn a_key_and_an_id_of_8_kb_are_parked_in_order_and_arrive() {
    // GIVEN somebody else's table, and a topic that is refused
    let database = Database::create("longkey").await;
    database
        .sql("CREATE TABLE events (id text, aggregatetype text, aggregateid text, type text, payload text)")
        .await;
    let table = ("WALPOST_OUTBOX_TABLE", "events");
    database.init(&[], &[table]).await;
    let settings = [
        &QUICK[..],
        &[table, ("WALPOST_RETRY_MAX_ATTEMPTS", "100000")],
    ]
    .concat();
    let walpost = database.start(&settings).await;
    let insert = async |name: &str| {
        let sql =
            format!("INSERT INTO events SELECT '{name}' || {LONG}, 't', {LONG}, 't', '{name}'");
        database.sql(&sql).await;
        database.wait_all_confirmed(DEADLINE).await;
    };
    insert("first").await;
    let topic = database.topic("t");
    terminate(&topic).await;

    // WHEN such events come
    insert("1").await;
    insert("2").await;
    insert("3").await;
    wait_for_count(&database, "parked", 2).await;

    // THEN they arrive in order when it takes messages again
    delete(&topic).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 3).await, ["1", "2", "3"]);
    walpost.stop().await;
}

#[tokio::test]
async fn what_the_databases_encoding_has_not_is_stored_and_the_stream_goes_on() {
    // GIVEN a database that has 256 characters, and a topic that is refused
    let database = Database::create_in("LATIN1", "latin").await;
    database.init(&["--payload", "text"], &[]).await;
    let attempts = ("WALPOST_RETRY_MAX_ATTEMPTS", "100000");
    let age = ("WALPOST_STRAGGLER_AGE", "1s");
    let settings = [&QUICK[..], &[attempts, age]].concat();
    let walpost = database.start(&settings).await;
    insert(&database, "t", "k", "before").await;
    database.wait_all_confirmed(DEADLINE).await;
    let topic = database.topic("t");
    terminate(&topic).await;

    // WHEN, in one transaction, envelopes have others: in a property, in the key, in the topic; and rows are around them
    let envelope = |id: &str, members: &str| {
        format!(
            r#"SELECT pg_logical_emit_message(true, 'walpost',
               '{{"id": "{id}", "type": "t", "payload_text": "{id}", {members}}}');"#
        )
    };
    let row = |key: &str| {
        format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', '{key}', 't', 'row {key}');"
        )
    };
    let statements = [
        "BEGIN;".to_owned(),
        row("k"),
        envelope(
            "property",
            r#""aggregatetype": "t", "aggregateid": "p", "headers": {"name": "\u9375 \ud83d\ude00"}"#,
        ),
        envelope("key", r#""aggregatetype": "t", "aggregateid": "\u9375""#),
        envelope(
            "topic",
            r#""aggregatetype": "t", "aggregateid": "k", "topic": "persistent://public/nowhere-at-all/\u9375""#,
        ),
        row("\u{e9}"),
        "COMMIT".to_owned(),
    ];
    database.sql(&statements.concat()).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN all are stored; those whose key or topic the database cannot hold are dead, with the name escaped
    let query = "SELECT id, topic, key, payload, reason FROM walpost.straggler WHERE state = 'dead' ORDER BY number";
    let dead = database.rows(query, &[]).await;
    let of = |index: usize, column: usize| dead[index].get::<_, Option<&str>>(column);
    assert_eq!(dead.len(), 2);
    let mut ids = [of(0, 0), of(1, 0)];
    ids.sort_unstable();
    assert_eq!(ids, [Some("key"), Some("topic")]);
    let key = usize::from(of(0, 0) != Some("key"));
    assert_eq!(
        (of(key, 1), of(key, 2)),
        (Some(&*topic), Some(r#""\u9375""#))
    );
    assert_eq!(dead[key].get::<_, &[u8]>(3), b"key");
    let reason = of(key, 4).expect("a reason");
    assert!(reason.contains("JSON string"), "{reason}");
    let reason = of(1 - key, 4).expect("a reason");
    assert!(reason.contains(r"\u9375"), "{reason}");

    // AND the others arrive as they were, once the topic takes messages again
    delete(&topic).await;
    wait_for_count(&database, "retrying", 0).await;
    let received = consume(&servers().pulsar_url, &topic, 3, DEADLINE).await;
    let with = |payload: &str| {
        received
            .iter()
            .find(|one| one.payload == payload.as_bytes())
    };
    assert_eq!(with("row k").expect("it arrives").key.as_deref(), Some("k"));
    let row = with("row \u{e9}").expect("it arrives");
    assert_eq!(row.key.as_deref(), Some("\u{e9}"));
    let property = with("property").expect("it arrives");
    assert_eq!(property.property("name"), "\u{9375} \u{1f600}");
    walpost.stop().await;
}
