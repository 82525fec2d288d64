//! What people change in a large table is found page by page.

use crate::scan::MANY_ATTEMPTS;
use crate::*;

/// Two stragglers of each key are more than two pages.
const KEYS: i64 = 6_000;
const SELDOM: [(&str, &str); 4] = [
    MANY_ATTEMPTS,
    ("WALPOST_RETRY_INITIAL", "1h"),
    ("WALPOST_RETRY_MAX", "1h"),
    ("WALPOST_LOG", "walpost::scanner=debug,info"),
];

/// Somebody puts stragglers into the table, two of each key, of which the first ones are in this state.
async fn put(database: &Database, first: &str) {
    database
        .rows(
            "INSERT INTO walpost.straggler (slot, outbox, id, topic, key, payload, state, commit_lsn, ordinal, reason, next_attempt_at)
             SELECT $1, 'walpost.outbox', n::text, $2, 'key-' || n % $3::int8, 'p', CASE WHEN n < $3 THEN $4 ELSE 'parked' END, '0/1', n, 'a test', 'infinity'
             FROM generate_series(0, 2 * $3::int8 - 1) n ORDER BY n.n",
            &[&database.slot, &database.topic("t"), &KEYS, &first],
        )
        .await;
}

#[tokio::test]
async fn each_key_without_a_head_gets_one_in_a_large_table() {
    // GIVEN a stream, and a topic that takes nothing
    let database = prepared("walk").await;
    let (mut walpost, _) = with_terminated(&database, &SELDOM).await;

    // WHEN somebody puts back stragglers without heads
    put(&database, "parked").await;

    // THEN the first of each key becomes one, from a table that is read in pages
    wait_for_count(&database, "retrying", KEYS).await;
    let page = "read a page of walpost.straggler rows=5000";
    walpost.wait_for_line(page, DEADLINE).await;
    assert_eq!(count(&database, "parked").await, KEYS);
    let heads = "SELECT FROM walpost.straggler WHERE state = 'retrying' AND ordinal >= $1";
    assert!(database.rows(heads, &[&KEYS]).await.is_empty());
    walpost.stop().await;
}

#[tokio::test]
async fn keys_wait_for_what_is_in_a_large_table_until_somebody_deletes_it() {
    // GIVEN stragglers that wait for their time
    let database = prepared("walk").await;
    put(&database, "retrying").await;
    let walpost = database.start(&[&QUICK[..], &SELDOM].concat()).await;

    // WHEN there are later events of the first and the last key: THEN they wait
    for (key, parked) in [("key-0", KEYS + 1), ("key-5999", KEYS + 2)] {
        insert(&database, "t", key, "waits").await;
        wait_for_count(&database, "parked", parked).await;
    }

    // AND go on once somebody has deleted all of it
    database.sql("DELETE FROM walpost.straggler").await;
    eventually(DEADLINE, "the table to be counted twice", async || {
        let page = "read a page of walpost.straggler rows=0";
        (walpost.output().matches(page).count() > 1).then_some(())
    })
    .await;
    for key in ["key-0", "key-5999"] {
        insert(&database, "t", key, "goes on").await;
    }
    let topic = database.topic("t");
    assert_eq!(payloads(&topic, 2).await, ["goes on", "goes on"]);
    wait_for_none(&database).await;
    walpost.stop().await;
}
