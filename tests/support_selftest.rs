//! The test support itself, against the real servers: what it reports must be what happened, or the other tests prove
//! nothing.

#[path = "selftest/run.rs"]
mod run;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pulsar::{Pulsar, TokioExecutor, producer};
use support::{
    Command, Database, Direction, Onlooker, Proxy, admin, consume, eventually, read_entries,
    servers, unique,
};

const SOON: Duration = Duration::from_secs(30);

/// Sends messages in batches with the crate's producer.
async fn produce(topic: &str, batch_messages: u32, payloads: impl Iterator<Item = Vec<u8>>) {
    Box::pin(send_all(topic, batch_messages, payloads)).await;
}

#[allow(
    clippy::large_futures,
    reason = "the pulsar crate's futures are large; a test has the stack for them"
)]
async fn send_all(topic: &str, batch_messages: u32, payloads: impl Iterator<Item = Vec<u8>>) {
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor)
        .build()
        .await
        .expect("the broker is up");
    let mut sender = pulsar
        .producer()
        .with_topic(topic)
        .with_options(producer::ProducerOptions {
            batch_size: (batch_messages > 1).then_some(batch_messages),
            ..Default::default()
        })
        .build()
        .await
        .expect("a producer");
    let mut receipts = Vec::new();
    for payload in payloads {
        let message = producer::Message {
            payload,
            partition_key: Some("key".to_owned()),
            properties: [("id".to_owned(), "1".to_owned())].into(),
            event_time: Some(1_700_000_000_000),
            ..Default::default()
        };
        receipts.push(sender.send_non_blocking(message).await.expect("queued"));
    }
    if batch_messages > 1 {
        sender.send_batch().await.expect("the last batch is sent");
    }
    for receipt in receipts {
        receipt.await.expect("a receipt");
    }
}

#[tokio::test]
async fn a_database_goes_with_its_slots_although_a_walsender_holds_one() {
    // GIVEN a database with a slot that pg_recvlogical streams from
    let database = Database::create("selftest").await;
    let (name, slot) = (database.name.clone(), database.slot.clone());
    let create = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')";
    database.rows(create, &[&slot]).await;
    database
        .sql("CREATE TABLE t (a int); CREATE PUBLICATION p FOR TABLE t; INSERT INTO t VALUES (1)")
        .await;
    let before = database.current_wal_lsn().await;
    let receiver = Command::program(
        &format!(
            "{}/pg_recvlogical",
            servers().var("WALPOST_LOCAL_POSTGRES_BIN")
        ),
        [
            "--start",
            "-f",
            "/dev/null",
            "-o",
            "proto_version=1",
            "-o",
            "publication_names=p",
            "-s",
            "1",
            "-d",
            &database.url,
            "-S",
            &slot,
        ],
    )
    .spawn();

    // WHEN it has confirmed what was committed
    eventually(SOON, "a walsender", async || {
        database.walsender_pid(&slot).await
    })
    .await;
    database.sql("INSERT INTO t VALUES (2)").await;
    database.wait_confirmed(&slot, before, SOON).await;
    assert!(database.confirmed_flush_lsn(&slot).await >= Some(before));
    drop(database);

    // THEN neither slot nor database is left
    let other = Database::create("selftest").await;
    let left = "SELECT 1 FROM pg_replication_slots WHERE slot_name = $1
                UNION ALL SELECT 1 FROM pg_database WHERE datname = $2";
    assert!(other.rows(left, &[&slot, &name]).await.is_empty());
    assert_eq!(other.confirmed_flush_lsn(&slot).await, None);
    drop(receiver);
}

#[tokio::test]
async fn consume_reads_every_message_of_a_batch_and_what_comes_after_the_expected() {
    let topic = format!("persistent://public/default/{}", unique("consume"));
    let payload = |number: u32| number.to_be_bytes().to_vec();
    produce(&topic, 100, (0..1050).map(payload)).await;

    // Fewer expected than there are: the rest comes too, as a duplicate would.
    let received = consume(&servers().pulsar_url, &topic, 1000, SOON).await;
    assert!(
        received
            .iter()
            .map(|m| m.payload.clone())
            .eq((0..1050).map(payload))
    );
    let first = &received[0];
    assert_eq!(first.key.as_deref(), Some("key"));
    assert_eq!(first.property("id"), "1");
    assert_eq!(first.event_time_ms, Some(1_700_000_000_000));
    assert_eq!(
        (first.batch_index, received[1].batch_index),
        (Some(0), Some(1))
    );

    // More expected than there are: the deadline ends it, and what came is returned.
    let received = consume(&servers().pulsar_url, &topic, 2000, Duration::from_secs(2)).await;
    assert_eq!(received.len(), 1050);

    // The same on the wire's level.
    let entries = read_entries(&servers().pulsar_addr, &topic, SOON).await;
    let messages: Vec<_> = entries.iter().flat_map(|entry| &entry.messages).collect();
    assert!(
        messages
            .iter()
            .map(|m| m.payload.clone())
            .eq((0..1050).map(payload))
    );
    assert_eq!(entries[0].metadata.producer_name, first.producer_name);
}

#[tokio::test]
async fn consume_of_an_empty_or_partitioned_topic_ends() {
    let topic = format!("persistent://public/default/{}", unique("empty"));
    assert!(
        consume(&servers().pulsar_url, &topic, 0, SOON)
            .await
            .is_empty()
    );
    assert!(
        read_entries(&servers().pulsar_addr, &topic, SOON)
            .await
            .is_empty()
    );

    let topic = unique("partitioned");
    let path = format!("/admin/v2/persistent/public/default/{topic}/partitions");
    admin(&servers().pulsar_admin_url, "PUT", &path, "3").await;
    produce(&topic, 1, (0..30).map(|number: u8| vec![number])).await;
    let mut received = consume(&servers().pulsar_url, &topic, 30, SOON).await;
    received.sort_by_key(|message| message.payload.clone());
    assert!(received.iter().map(|m| m.payload[0]).eq(0..30));
    assert!(received.iter().all(|message| message.partition >= 0));
}

#[tokio::test]
async fn consume_reads_300000_messages_in_seconds() {
    let topic = format!("persistent://public/default/{}", unique("many"));
    produce(&topic, 1000, (0..300_000).map(|_| vec![b'x'; 300])).await;
    let begun = Instant::now();
    let received = consume(&servers().pulsar_url, &topic, 300_000, SOON).await;
    assert_eq!(received.len(), 300_000, "in {:?}", begun.elapsed());
}

#[tokio::test]
async fn consume_reads_on_when_far_more_messages_come_than_are_expected() {
    // The broker reckons with the size of the batches so far, and so sends more than was asked for.
    let topic = format!("persistent://public/default/{}", unique("repeats"));
    produce(&topic, 2, (0..1_000).map(|_| vec![b'x'])).await;
    produce(&topic, 1000, (0..100_000).map(|_| vec![b'x'])).await;
    for expected in [1_000, 11_000, 25_000, 40_000] {
        let received = consume(&servers().pulsar_url, &topic, expected, SOON).await;
        assert_eq!(received.len(), 101_000);
    }
}

#[tokio::test]
async fn the_proxy_holds_cuts_and_refuses() {
    let database = Database::create("selftest").await;
    let proxy = Proxy::start(&servers().postgres_addr);
    let url = database.url_through(&proxy.addr());
    let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls)
        .await
        .expect("the proxy passes bytes");
    let connection = tokio::spawn(connection);
    database.sql("CREATE TABLE t (a int)").await;

    // GIVEN held replies, WHEN a statement is sent, THEN the server does it and the client hears nothing of it
    proxy.hold_upstream_replies(true);
    let heard = proxy.to_client_bytes();
    let insert = tokio::spawn(async move {
        client.batch_execute("INSERT INTO t VALUES (1)").await?;
        Ok::<_, tokio_postgres::Error>(client)
    });
    eventually(SOON, "the row", async || {
        let rows = database.rows("SELECT FROM t", &[]).await;
        (rows.len() == 1).then_some(())
    })
    .await;
    assert!(!insert.is_finished());
    assert_eq!(proxy.to_client_bytes(), heard);

    // WHEN they are let go, THEN the answer arrives
    proxy.hold_upstream_replies(false);
    let client = insert
        .await
        .expect("no panic")
        .expect("the insert succeeds");

    // GIVEN held requests, WHEN the connection is cut, THEN the statement was never done
    proxy.hold_requests(true);
    let lost = tokio::spawn(async move { client.batch_execute("INSERT INTO t VALUES (2)").await });
    assert!(!lost.is_finished());
    proxy.cut();
    lost.await
        .expect("no panic")
        .expect_err("its connection is gone");
    let _ = connection.await.expect("no panic");
    assert_eq!(database.rows("SELECT FROM t", &[]).await.len(), 1);

    // WHEN it refuses, THEN nobody gets through, until it no longer does
    proxy.hold_requests(false);
    proxy.refuse(true);
    let connect = async || tokio_postgres::connect(&url, tokio_postgres::NoTls).await;
    assert!(connect().await.is_err());
    proxy.refuse(false);
    assert!(connect().await.is_ok());
    assert_eq!(proxy.accepted(), 3);
    assert!(proxy.to_server_bytes() > 0);
}

#[tokio::test]
async fn a_broker_behind_the_proxy_is_not_reached_around_it() {
    // GIVEN a topic of one megabyte
    let topic = format!("persistent://public/default/{}", unique("readdressed"));
    produce(&topic, 1, (0..10).map(|_| vec![b'x'; 100_000])).await;

    // WHEN it is read through the proxy, lookup and all
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let received = consume(&url, &topic, 10, SOON).await;

    // THEN every message has passed through it
    assert_eq!(received.len(), 10);
    assert!(proxy.to_client_bytes() > 1_000_000);
}

#[tokio::test]
async fn an_onlooker_sees_all_that_passes_the_proxy() {
    // GIVEN a proxy before the broker, and an onlooker who adds up what it is shown
    let seen = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let shown = Arc::clone(&seen);
    let onlooker: Onlooker = Arc::new(move |direction, _, _, bytes| {
        shown[usize::from(direction == Direction::ToClient)]
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
    });
    let proxy = Proxy::seen_by(&servers().pulsar_addr, onlooker);
    let topic = format!("persistent://public/default/{}", unique("seen"));
    produce(&topic, 1, (0..10).map(|_| vec![b'x'; 1000])).await;

    // WHEN a topic is read through it
    let url = format!("pulsar://{}", proxy.addr());
    assert_eq!(consume(&url, &topic, 10, SOON).await.len(), 10);

    // THEN it has seen what the proxy has passed, each way
    let counted = || [proxy.to_server_bytes(), proxy.to_client_bytes()];
    eventually(SOON, "both counts to agree", async || {
        let seen = [0, 1].map(|way| seen[way].load(Ordering::Relaxed));
        (seen == counted() && seen[1] > 10_000).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_child_is_heard_signalled_and_measured() {
    let script = "trap 'echo caught; exit 7' TERM; echo ready >&2; while :; do sleep 0.05; done";
    let mut child = Command::program("sh", ["-c", script])
        .env("WALPOST_SLOT", "x")
        .spawn();
    assert_eq!(child.wait_for_line("read", SOON).await, "ready");
    assert!(child.peak_rss_kib() > 100);
    child.sigterm();
    assert_eq!(child.wait_exit(SOON).await, 7);
    assert_eq!(child.lines(), ["ready", "caught"]);

    let mut child = Command::program("sleep", ["60"]).spawn();
    child.sigkill();
    assert_eq!(child.wait_exit(SOON).await, 128 + 9);
}

#[tokio::test]
#[should_panic(expected = "no line was waited for")]
async fn a_child_that_has_said_nothing_yet_gets_no_signal_that_it_may_handle() {
    let child = Command::program("sh", ["-c", "trap 'exit 7' TERM; echo ready; sleep 60"]).spawn();
    child.sigterm();
}

#[tokio::test]
async fn a_child_inherits_no_setting_of_the_tests_own() {
    // Not vacuous: servers() has found WALPOST_* variables, or tests/run has set them; PATH must stay.
    let print = "env | grep -c '^WALPOST_' ; test -n \"$PATH\"";
    let (code, said) = Command::program("sh", ["-c", print])
        .env("WALPOST_SLOT", "x")
        .run(SOON)
        .await;
    assert_eq!((code, said.as_str()), (0, "1"));
}

#[tokio::test]
#[should_panic(expected = "gave up waiting for nothing")]
async fn eventually_gives_up_on_a_probe_that_hangs() {
    let deadline = Duration::from_millis(50);
    eventually(deadline, "nothing", std::future::pending::<Option<()>>).await;
}
