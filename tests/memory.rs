//! Guarantee: memory is bounded, however large a transaction is and however long the broker's receipts take; and nothing
//! is lost or doubled by it.

mod support;

use std::ops::Range;
use std::time::Duration;

use support::{Database, Proxy, Walpost, consume, eventually, servers};
use walpost::Lsn;

const DEADLINE: Duration = Duration::from_secs(180);
const ROWS: usize = 300_000;
/// The promise for a transaction of this size with the default limits.
const PEAK_RSS_KIB: u64 = 96 * 1024;
/// Rows with which every lane has sent full batches.
const PROVEN: usize = 50_000;
/// What is written to one connection without a receipt.
const MAX_UNANSWERED_BYTES: u64 = 8 * 1024 * 1024;
/// What frames add to the messages in them, commands, and the one message that goes over the limit.
const OVERHEAD_BYTES: u64 = 1024 * 1024;

/// Commits rows of about 300 bytes, numbered by `numbers`, in one transaction.
async fn insert_in_one_transaction(database: &Database, numbers: Range<usize>) {
    let bound = |number| i64::try_from(number).expect("a small number");
    database
        .rows(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'key' || n % 1000, 't', json_build_object('number', n, 'fill', repeat('x', 240))
             FROM generate_series($1::int8, $2::int8 - 1) n",
            &[&bound(numbers.start), &bound(numbers.end)],
        )
        .await;
}

/// Each row must be in the topic once.
async fn assert_each_row_once(database: &Database) {
    let received = consume(&servers().pulsar_url, &database.topic("t"), ROWS, DEADLINE).await;
    let mut seen = vec![false; ROWS];
    for message in &received {
        let payload: serde_json::Value =
            serde_json::from_slice(&message.payload).expect("the payload is JSON");
        let number = payload["number"].as_u64().expect("a number");
        let seen = &mut seen[usize::try_from(number).expect("a row's number")];
        assert!(!std::mem::replace(seen, true), "row {number} came twice");
    }
    assert_eq!(received.len(), ROWS);
}

fn assert_peak_is_bounded(walpost: &Walpost) {
    let peak_kib = walpost.peak_rss_kib();
    assert!(peak_kib < PEAK_RSS_KIB, "peak RSS is {peak_kib} KiB");
    // Seen with --nocapture.
    println!("peak RSS: {peak_kib} KiB");
}

#[tokio::test]
async fn a_transaction_of_300000_rows_passes_through_bounded_memory() {
    // GIVEN a stream
    let database = Database::create("memory").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN one transaction has 300,000 rows
    insert_in_one_transaction(&database, 0..ROWS).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN the process has stayed small, and every row has arrived once
    assert_peak_is_bounded(&walpost);
    walpost.stop().await;
    assert_each_row_once(&database).await;
}

#[tokio::test]
async fn a_broker_that_gives_no_receipts_is_backpressure_and_not_memory() {
    // GIVEN a stream to a broker whose receipts can be held back
    let database = Database::create("held").await;
    database.init(&[], &[]).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    // Not to be taken for a dead broker on a slow machine: that would send everything again.
    let walpost = database
        .start(&[
            ("WALPOST_PULSAR_URL", &url),
            ("WALPOST_SEND_TIMEOUT", "10m"),
        ])
        .await;
    // Enough for full batches: nothing waits behind one that is larger than all before.
    insert_in_one_transaction(&database, 0..PROVEN).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN, with all lanes open, the receipts stop and many more rows are committed
    let before_bytes = proxy.to_server_bytes();
    proxy.hold_upstream_replies(true);
    insert_in_one_transaction(&database, PROVEN..ROWS).await;
    let committed = database.current_wal_lsn().await;
    // (A connection takes so much without receipts; the rest waits in walpost.)
    eventually(
        DEADLINE,
        "the connection's limit to be reached",
        async || {
            let sent = proxy.to_server_bytes() - before_bytes;
            (sent > MAX_UNANSWERED_BYTES / 10 * 9).then_some(())
        },
    )
    .await;

    // THEN nothing more is taken in, while the walsender goes on hearing of us
    let told = wait_for_status_updates(&database, 5).await;
    let sent = proxy.to_server_bytes() - before_bytes;
    assert!(
        sent <= MAX_UNANSWERED_BYTES + OVERHEAD_BYTES,
        "{sent} bytes without a receipt"
    );
    assert!(
        told < committed,
        "{told} was confirmed, {committed} has no receipt"
    );
    assert_peak_is_bounded(&walpost);

    // AND WHEN receipts come again, THEN all the rest follows, once
    proxy.hold_upstream_replies(false);
    database.wait_all_confirmed(DEADLINE).await;
    assert_peak_is_bounded(&walpost);
    walpost.stop().await;
    assert_each_row_once(&database).await;
}

/// Waits until the walsender has been told `count` times more where we are, and returns what it was told last.
async fn wait_for_status_updates(database: &Database, count: usize) -> Lsn {
    let query = "SELECT reply_time::text, flush_lsn::text FROM pg_stat_replication r
                 JOIN pg_replication_slots s ON s.active_pid = r.pid WHERE slot_name = $1";
    let mut last = String::new();
    let mut told = Lsn::ZERO;
    for number in 0..=count {
        let what = format!("status update {number}");
        (last, told) = eventually(DEADLINE, &what, async || {
            let rows = database.rows(query, &[&database.slot]).await;
            let row = rows.first()?;
            let time: String = row.get(0);
            let flush: &str = row.get(1);
            (time != last).then(|| (time, flush.parse().expect("an LSN")))
        })
        .await;
    }
    told
}
