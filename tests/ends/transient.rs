//! `walpost.emit_transient`: events without a table take the same route, with the same guarantees from the log on.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{Database, Random, Received, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
/// Between a writer's transactions: they have to last longer than all kills, and leave the machine to the others.
const PACE: Duration = Duration::from_millis(10);

fn text(message: &Received) -> &str {
    std::str::from_utf8(&message.payload).expect("UTF-8")
}

async fn read(database: &Database, aggregatetype: &str, expected: usize) -> Vec<Received> {
    let topic = database.topic(aggregatetype);
    consume(&servers().pulsar_url, &topic, expected, DEADLINE).await
}

#[tokio::test]
async fn an_event_without_a_table_is_the_same_message() {
    for (payload, value, bytes) in [
        (
            "json",
            r#"'{"n":  1.50, "no": null}'"#,
            &br#"{"n":  1.50, "no": null}"#[..],
        ),
        ("json", "'null'", b"null"),
        ("jsonb", r#"'{"n":  1}'"#, br#"{"n": 1}"#),
        ("text", "E'a \"b\"\\n'", b"a \"b\"\n"),
        ("bytea", r"'\x00ff'", &[0, 255]),
    ] {
        // GIVEN an outbox of each payload type
        let database = Database::create("transient").await;
        database.init(&["--payload", payload], &[]).await;
        let walpost = database.start(&[]).await;
        // WHEN one event goes through the table and one without, in that order
        let arguments = format!(
            "'a', 'k-ä', 'T', {value}, '{{\"h\": \"v\", \"none\": null}}', null, '2026-01-02 03:04:05.678+00'"
        );
        database
            .sql(&format!("select walpost.emit({arguments})"))
            .await;
        let rows = database
            .rows(
                &format!("select walpost.emit_transient({arguments})::text"),
                &[],
            )
            .await;
        let id: &str = rows[0].get(0);
        // THEN they differ by nothing but id and time
        let arrived = read(&database, "a", 2).await;
        assert_eq!(arrived.len(), 2, "{payload}");
        let (row, transient) = (&arrived[0], &arrived[1]);
        assert_eq!(transient.payload, bytes, "{payload}");
        assert_eq!(transient.property("id"), id);
        assert_eq!(
            (&row.payload, &row.key),
            (&transient.payload, &transient.key)
        );
        for name in ["type", "aggregatetype", "h"] {
            assert_eq!(row.property(name), transient.property(name));
        }
        assert_eq!(row.properties.len(), transient.properties.len());
        assert!(transient.event_time_ms >= row.event_time_ms);
        // THEN and the table knows nothing of it
        let count = database
            .rows("select count(*) from walpost.outbox", &[])
            .await;
        assert_eq!(count[0].get::<_, i64>(0), 1);
        walpost.stop().await;
    }
}

#[tokio::test]
async fn a_rolled_back_a_foreign_and_a_non_transactional_message_are_not_published() {
    // GIVEN a connector
    let database = Database::create("transient").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[]).await;
    let emit = |prefix: &str, transactional: bool, id: &str| {
        format!(
            r#"select pg_logical_emit_message({transactional}, '{prefix}',
                '{{"id": "{id}", "aggregatetype": "a", "aggregateid": "k", "payload": "{id}"}}')"#
        )
    };
    // WHEN messages come that are none for it, and one that is
    database
        .sql(&format!(
            "begin; {}; savepoint s; {}; rollback",
            emit("walpost", true, "back"),
            emit("walpost", true, "back2")
        ))
        .await;
    database
        .sql(&format!(
            "begin; savepoint s; {}; rollback to s; {}; commit",
            emit("walpost", true, "sub"),
            emit("walpost", true, "first")
        ))
        .await;
    database.sql(&emit("other", true, "foreign")).await;
    database
        .sql(&format!(
            "begin; {}; rollback",
            emit("walpost", false, "outside")
        ))
        .await;
    database.sql(&emit("walpost", true, "last")).await;
    // THEN the refusal is told with its reason, and only what was committed for it arrives
    let line = walpost.wait_for_line("not transactional", DEADLINE).await;
    assert!(line.contains("refused"), "{line}");
    database.wait_all_confirmed(DEADLINE).await;
    let arrived = read(&database, "a", 2).await;
    let texts: Vec<&str> = arrived.iter().map(text).collect();
    assert_eq!(texts, ["\"first\"", "\"last\""]);
    walpost.stop().await;
}

#[tokio::test]
async fn what_is_no_envelope_is_kept_as_a_straggler_and_the_stream_goes_on() {
    // GIVEN a connector that marks rows, so that a straggler's row would be looked for
    let database = Database::create("transient").await;
    let settings = [("WALPOST_AFTER_PUBLISH", "mark")];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    // WHEN a transaction holds a row, a message that is nothing, one that has no key, and a good one
    database
        .sql(
            r#"begin;
            select walpost.emit('a', 'k', 'T', '1');
            select pg_logical_emit_message(true, 'walpost', 'not json');
            select pg_logical_emit_message(true, 'walpost', '{"id": "7", "aggregatetype": "a", "payload": 2}');
            select walpost.emit_transient('a', 'k', 'T', '3');
            commit"#,
        )
        .await;
    // THEN the others arrive in order, and the LSN passes
    database.wait_all_confirmed(DEADLINE).await;
    let arrived = read(&database, "a", 2).await;
    assert_eq!(arrived.iter().map(text).collect::<Vec<_>>(), ["1", "3"]);
    // THEN and what could not be published is there, whole, with the reason and its place
    let kept = database
        .rows(
            "select outbox, id, convert_from(payload, 'UTF8'), state, reason, ordinal from walpost.straggler order by ordinal",
            &[],
        )
        .await;
    assert_eq!(kept.len(), 2);
    for (row, (id, payload, why, ordinal)) in kept.iter().zip([
        (None, "not json", "is no JSON object", 2_i64),
        (Some("7"), "2", "\"aggregateid\" is NULL", 3),
    ]) {
        assert_eq!(row.get::<_, &str>(0), "walpost.emit_transient");
        assert_eq!(row.get::<_, Option<&str>>(1), id);
        assert_eq!(
            (row.get::<_, &str>(2), row.get::<_, &str>(3)),
            (payload, "dead")
        );
        let reason: &str = row.get(4);
        assert!(reason.contains(why), "{reason}");
        assert_eq!(row.get::<_, i64>(5), ordinal);
    }
    // THEN and the row is marked, while nothing looks for a row of the others
    eventually(DEADLINE, "the row to be marked", async || {
        let row = database
            .rows("select count(sent_at) from walpost.outbox", &[])
            .await;
        (row[0].get::<_, i64>(0) == 1).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn rows_and_transient_events_arrive_once_and_in_order_through_sigkill() {
    const WRITERS: usize = 3;
    const KILLS: usize = 6;
    // GIVEN a broker that deduplicates, and writers that mix rows and messages of their own keys in each transaction
    let mut database = Database::create("transient").await;
    database.deduplicate(servers()).await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[]).await;
    let mut writers = Vec::new();
    let stop = Arc::new(AtomicBool::new(false));
    for writer in 0..WRITERS {
        let stop = Arc::clone(&stop);
        let client = database.connect().await;
        writers.push(tokio::spawn(async move {
            let mut n = 0;
            for transaction in 0_u32.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                tokio::time::sleep(PACE).await;
                let mut sql = "begin".to_owned();
                for step in 0..4 {
                    n += 1;
                    let function = if (transaction + step) % 3 == 0 {
                        "emit"
                    } else {
                        "emit_transient"
                    };
                    let call =
                        format!("; select walpost.{function}('mix', 'key-{writer}', 'T', '{n}')");
                    sql.push_str(&call);
                }
                // Numbers of what is rolled back are used again.
                if transaction % 7 == 3 {
                    n -= 4;
                    sql += "; rollback";
                } else {
                    sql += "; commit";
                }
                client
                    .batch_execute(&sql)
                    .await
                    .expect("the writer's transaction");
            }
            n
        }));
    }
    // WHEN the connector is killed again and again, and the walsender too
    let mut random = Random::new(7);
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(50 + random.below(300) as u64)).await;
        if kill % 2 == 0 {
            database.terminate_walsender().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        walpost.sigkill();
        assert_eq!(walpost.wait_exit(DEADLINE).await, 128 + 9);
        walpost = database.start(&[]).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut expected = HashMap::new();
    for (writer, task) in writers.into_iter().enumerate() {
        expected.insert(format!("key-{writer}"), task.await.expect("a writer"));
    }
    database.wait_all_confirmed(DEADLINE).await;
    // THEN every key has every number once, in order
    let total: u32 = expected.values().sum();
    let arrived = read(&database, "mix", total as usize).await;
    let mut next: HashMap<&str, u32> = HashMap::new();
    for message in &arrived {
        let key = message.key.as_deref().expect("a key");
        let number = next.entry(key).or_default();
        *number += 1;
        assert_eq!(text(message), number.to_string(), "of {key}");
    }
    assert_eq!(arrived.len(), total as usize);
    walpost.stop().await;
}
