//! `walpost replay` sends again what was asked for and nothing else, in order, past deduplication, and only when told to.

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use support::{Database, Received, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(90);
const QUIET: (&str, &str) = ("WALPOST_LOG", "off");

/// Ten events of each of three keys, and five of another topic, all delivered; `mode` is `WALPOST_AFTER_PUBLISH`.
async fn delivered(mode: &str) -> Database {
    let mut database = Database::create("replay").await;
    database.deduplicate(servers()).await;
    let settings = [
        ("WALPOST_SCAN_INTERVAL", "100ms"),
        ("WALPOST_AFTER_PUBLISH", mode),
    ];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, headers, created_at)
             SELECT 't', 'k' || n % 3, 'made', to_json(n), '{\"trace\": \"x\"}', timestamptz '2026-01-01 00:00Z' + n * interval '1 hour'
             FROM generate_series(0, 29) n;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) SELECT 'u', 'k0', 'made', to_json(n) FROM generate_series(100, 104) n",
        )
        .await;
    eventually(DEADLINE, "every row to be noted as delivered", async || {
        let sql = "SELECT bool_and(pg_visible_in_snapshot(txid, delivered)) FROM walpost.outbox, walpost.progress";
        database.rows(sql, &[]).await[0].get::<_, Option<bool>>(0)?.then_some(())
    })
    .await;
    walpost.stop().await;
    database
}

async fn replay(database: &Database, args: &[&str]) -> (i32, String) {
    let args = [&["replay"], args].concat();
    database.walpost(&args, &[QUIET]).run(DEADLINE).await
}

/// Payloads of `t`, without the thirty that the stream brought.
async fn replayed(database: &Database, expected: usize) -> Vec<Received> {
    let topic = database.topic("t");
    let mut all = consume(&servers().pulsar_url, &topic, 30 + expected, DEADLINE).await;
    assert_eq!(
        all.len(),
        30 + expected,
        "as many as were chosen, and no more"
    );
    // Messages of several lanes follow one another in any order.
    let (again, first): (Vec<_>, Vec<_>) = all
        .drain(..)
        .partition(|message| message.producer_name.contains("-replay-"));
    assert_eq!(first.len(), 30);
    for message in &again {
        let id = message.property("id");
        let original = first.iter().find(|first| first.property("id") == id);
        let original = original.expect("what is replayed was there");
        assert_eq!(message.properties, original.properties, "nothing is added");
        assert_eq!(message.payload, original.payload);
        assert_eq!(message.key, original.key);
        assert_eq!(message.event_time_ms, original.event_time_ms);
    }
    again
}

fn numbers(messages: &[Received]) -> Vec<u64> {
    let number = |message: &Received| serde_json::from_slice(&message.payload).expect("a number");
    messages.iter().map(number).collect()
}

#[tokio::test]
async fn nothing_is_sent_until_execute_and_then_exactly_what_was_chosen_in_order() {
    // GIVEN delivered rows, on a broker that deduplicates
    let database = delivered("keep").await;

    // WHEN a key is chosen without --execute, THEN its rows are told and nothing is sent
    let (code, said) = replay(&database, &["--key", "k1"]).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(said.matches("would send id").count(), 10, "{said}");
    assert!(
        said.contains("would send 10 messages to 1 topics; --execute sends them"),
        "{said}"
    );
    assert!(replayed(&database, 0).await.is_empty());

    // WHEN it is executed, THEN its messages come again, in order
    let (code, said) = replay(&database, &["--key", "k1", "--execute"]).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("sent 10 messages to 1 topics, each has its receipt"),
        "{said}"
    );
    let of_k1: Vec<u64> = (0..30).filter(|number| number % 3 == 1).collect();
    assert_eq!(numbers(&replayed(&database, 10).await), of_k1);

    // WHEN it is executed again, THEN deduplication eats nothing of it
    let (code, _) = replay(&database, &["--key", "k1", "--yes"]).await;
    assert_eq!(code, 0);
    assert_eq!(
        numbers(&replayed(&database, 20).await),
        [&of_k1[..], &of_k1].concat()
    );

    // AND verify knows repeats from duplicates, and the stream goes on where it was
    let (code, said) = database
        .walpost(&["verify", "--json"], &[QUIET])
        .run(DEADLINE)
        .await;
    let report: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!((code, &report["replayed"]), (0, &json!(20)), "{report:#}");
    let walpost = database.start(&[]).await;
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('u', 'k1', 't', '105')")
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let others = consume(&servers().pulsar_url, &database.topic("u"), 6, DEADLINE).await;
    assert_eq!(numbers(&others), [100, 101, 102, 103, 104, 105]);
}

#[tokio::test]
async fn rows_are_chosen_by_id_topic_and_time_and_by_all_of_them_together() {
    let database = delivered("mark").await;
    let sql = "SELECT id::text FROM walpost.outbox WHERE payload::text = '7'";
    let id: String = database.rows(sql, &[]).await[0].get(0);
    let (t, u) = (database.topic("t"), database.topic("u"));
    let day = ["--from", "2026-01-01T05:00Z", "--to", "2026-01-01T08:00Z"];
    for (args, count) in [
        (&["--id", &*id][..], 1),
        (&["--topic", &u], 5),
        (&["--topic", &t], 30),
        (&["--topic", &t, "--key", "k0"], 10),
        (&day, 3),
        (&[&day[..], &["--key", "k2"]].concat(), 1),
        (&["--id", &id, "--key", "k0"], 0),
        (&["--key", "nobody"], 0),
    ] {
        let args = [args, &["--json"]].concat();
        let (code, said) = replay(&database, &args).await;
        assert_eq!(code, 0, "{said}");
        let lines: Vec<Value> = said
            .lines()
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let (end, rows) = lines.split_last().expect("a line at the end");
        assert_eq!(rows.len(), count, "{args:?}: {said}");
        assert_eq!((&end["chosen"], &end["sent"]), (&json!(count), &json!(0)));
    }

    // WHEN one is sent, THEN it is the one
    let (code, said) = replay(&database, &["--id", &id, "--execute", "--json"]).await;
    assert_eq!(code, 0, "{said}");
    let end: Value = serde_json::from_str(&said).expect("one line");
    assert_eq!((&end["sent"], &end["topics"]), (&json!(1), &json!(1)));
    let again = replayed(&database, 1).await;
    assert_eq!((numbers(&again), again[0].property("id")), (vec![7], &*id));
}

#[tokio::test]
async fn rows_that_are_not_delivered_and_stragglers_are_left_to_whom_they_belong() {
    // GIVEN, besides what is delivered, two rows that the stream has yet to bring, and a straggler
    let database = delivered("keep").await;
    database
        .sql(
            "INSERT INTO walpost.straggler (slot, outbox, id, topic, key, commit_lsn, ordinal, state, reason)
             SELECT 'x', 'walpost.outbox', id::text, 't', 'k1', '0/1', 0, 'dead', 'made up' FROM walpost.outbox WHERE payload::text = '4';
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k1', 't', '31'), ('t', 'k1', 't', '32')",
        )
        .await;

    // WHEN their key is replayed, THEN they are left out, and that is told
    let (code, said) = replay(&database, &["--key", "k1", "--execute"]).await;
    assert_eq!(code, 0, "{said}");
    for words in [
        "sent 9 messages",
        "left out 2 rows that are not delivered yet",
        "left out 1 stragglers",
    ] {
        assert!(said.contains(words), "no {words:?} in: {said}");
    }
    let numbers = numbers(&replayed(&database, 9).await);
    assert_eq!(numbers, [1, 7, 10, 13, 16, 19, 22, 25, 28]);
}

#[tokio::test]
async fn what_cannot_be_replayed_is_an_error_that_says_what_to_do() {
    let database = delivered("keep").await;
    let nowhere = support::Proxy::start(&servers().pulsar_addr).addr();
    let away = format!("pulsar://{nowhere}");
    let broken = format!("persistent://public/{}/x", "no-such-namespace");
    for (args, settings, exit, words) in [
        (
            &[][..],
            &[][..],
            64,
            &["--id, --key, --topic, --from, --to"][..],
        ),
        (
            &["--topic", "x.{aggregatetype}"],
            &[],
            64,
            &["template", "WALPOST_TOPIC"],
        ),
        (&["--id", "7"], &[], 64, &["--id is \"7\""]),
        (&["--from", "gestern"], &[], 64, &["--from", "allowed"]),
        (
            &["--key", "k1", "--execute"],
            &[("WALPOST_PULSAR_URL", &*away)],
            75,
            &[&*nowhere],
        ),
        (
            &["--key", "k1", "--execute"],
            &[("WALPOST_TOPIC", &*broken)],
            75,
            &["no receipts", "no-such-namespace"],
        ),
    ] {
        let args = [&["replay"], args].concat();
        let (code, said) = database.walpost(&args, settings).run(DEADLINE).await;
        assert_eq!(code, exit, "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }
    assert!(replayed(&database, 0).await.is_empty());
}
