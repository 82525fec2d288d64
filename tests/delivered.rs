//! Guarantee: a row that `walpost.outbox_status` shows as sent is in its topic, at every moment; and every row that is in its
//! topic is shown as sent soon.

mod support;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{Database, Proxy, Random, eventually, read_entries, servers};
use tokio_postgres::Client;

const DEADLINE: Duration = Duration::from_secs(60);
const WRITERS: u64 = 24;
const CHECKS: usize = 12;

/// One writer: transactions of a few rows, with savepoints, some rolled back, some long, some not waiting for the disk.
async fn write(client: Client, seed: u64, stop: Arc<AtomicBool>) {
    let mut random = Random::new(seed);
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', $1, 't', 'null')";
    let insert = client.prepare(insert).await.expect("the outbox is there");
    let run = async |sql: &str| client.batch_execute(sql).await.expect("a plain statement");
    while !stop.load(Ordering::Relaxed) {
        let commit = ["on", "off"][random.below(2)];
        run(&format!("BEGIN; SET LOCAL synchronous_commit = {commit}")).await;
        for _ in 0..=random.below(3) {
            let key = format!("key-{}", random.below(50));
            run("SAVEPOINT s").await;
            client.execute(&insert, &[&key]).await.expect("a row");
            if random.below(4) == 0 {
                run("ROLLBACK TO SAVEPOINT s").await;
            }
            // How long a transaction takes; nothing waits for it.
            let longest = if random.below(20) == 0 { 1500 } else { 20 };
            let pause = u64::try_from(random.below(longest)).expect("small");
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        run(if random.below(6) == 0 {
            "ROLLBACK"
        } else {
            "COMMIT"
        })
        .await;
    }
}

async fn ids(database: &Database, status: &str) -> HashSet<String> {
    let sql = "SELECT id::text FROM walpost.outbox_status WHERE status = $1";
    let rows = database.rows(sql, &[&status]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

async fn in_topic(database: &Database) -> HashSet<String> {
    let topic = database.topic("t");
    let entries = read_entries(&servers().pulsar_addr, &topic, DEADLINE).await;
    let messages = entries.into_iter().flat_map(|entry| entry.messages);
    let id = |message: support::EntryMessage| {
        let mut properties = message.metadata.properties.into_iter();
        properties
            .find(|pair| pair.key == "id")
            .expect("an id")
            .value
    };
    messages.map(id).collect()
}

#[tokio::test]
async fn no_row_is_shown_as_sent_that_is_not_in_its_topic_whatever_the_writers_do() {
    // GIVEN two dozen writers, and a broker whose receipts are held back every other while
    let database = Database::create("delivered").await;
    database.init(&[], &[]).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let settings = [
        ("WALPOST_PULSAR_URL", &*url),
        ("WALPOST_SCAN_INTERVAL", "100ms"),
    ];
    let walpost = database.start(&settings).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for seed in 0..WRITERS {
        let client = database.connect().await;
        writers.push(tokio::spawn(write(client, seed, Arc::clone(&stop))));
    }

    // WHEN the status is looked at again and again
    let mut last = 0;
    for check in 0..CHECKS {
        let hold = check % 3 == 2;
        proxy.hold_upstream_replies(hold);
        if !hold {
            eventually(DEADLINE, "more rows to be shown as sent", async || {
                (ids(&database, "sent").await.len() > last).then_some(())
            })
            .await;
        }
        // THEN what it shows as sent is in the topic, which is read after it
        let sent = ids(&database, "sent").await;
        let there = in_topic(&database).await;
        let early: Vec<_> = sent.difference(&there).collect();
        assert!(
            early.is_empty(),
            "check {check}: {early:?} of {}",
            sent.len()
        );
        last = sent.len();
    }
    proxy.hold_upstream_replies(false);
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("no writer panics");
    }

    // AND in the end every row is shown as sent
    eventually(DEADLINE, "every row to be shown as sent", async || {
        ids(&database, "pending").await.is_empty().then_some(())
    })
    .await;
    assert_eq!(ids(&database, "sent").await, in_topic(&database).await);
    walpost.stop().await;
}
