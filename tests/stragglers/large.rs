//! Many large stragglers are retried in bounded memory.

use crate::support::consume;
use crate::*;

/// Stragglers of 4.5 MB each: 180 MB.
const STRAGGLERS: usize = 40;
/// What walpost takes with nothing to do, what is in flight of the stragglers (24 MiB, in frames that are made anew), and a page.
const PEAK_RSS_KIB: u64 = 110 * 1024;

#[tokio::test]
async fn forty_stragglers_of_four_megabytes_are_retried_in_bounded_memory() {
    // GIVEN heads of twenty keys, and one behind each, that cannot be compressed to nothing
    let database = prepared("large").await;
    database
        .rows(
            "INSERT INTO walpost.straggler (slot, outbox, id, topic, key, payload, state, commit_lsn, ordinal, reason)
             SELECT $1, 'walpost.outbox', n::text, $2, 'key-' || n % 20, body.text::bytea,
                    CASE WHEN n < 20 THEN 'retrying' ELSE 'parked' END, '0/1', n, 'a test'
             FROM generate_series(0, $3::int8 - 1) n,
                  (SELECT string_agg(md5(i::text), '') AS text FROM generate_series(1, 140000) i) body ORDER BY n.n",
            &[
                &database.slot,
                &database.topic("t"),
                &i64::try_from(STRAGGLERS).expect("a small number"),
            ],
        )
        .await;

    // WHEN walpost starts
    let settings = [&QUICK[..], &[("WALPOST_COMPRESSION", "none")]].concat();
    let walpost = database.start(&settings).await;
    wait_for_none(&database).await;

    // THEN all arrive, each key in its order, and the process has stayed small
    let peak_kib = walpost.peak_rss_kib();
    println!("peak RSS: {peak_kib} KiB");
    assert!(peak_kib < PEAK_RSS_KIB, "peak RSS is {peak_kib} KiB");
    walpost.stop().await;
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, STRAGGLERS, DEADLINE).await;
    assert_eq!(received.len(), STRAGGLERS);
    assert!(
        received
            .iter()
            .all(|message| message.payload.len() == 4_480_000)
    );
}
