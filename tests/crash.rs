//! Nothing committed is lost, and a key's order holds, although the connector is killed again and again.
//!
//! SIGKILL leaves it no last word: no receipts awaited, no final status update. The next one begins at what Postgres was
//! told last, so events come again; they may not be missing, nor come in another order.

mod support;

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use support::{Committed, Database, Load, consume, servers};

const KILLS: usize = 10;
const DEADLINE: Duration = Duration::from_secs(60);

/// A moment that no run has twice: when the fault strikes. Nothing is waited for by it.
fn up_to(longest: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    longest.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

#[tokio::test]
async fn nothing_is_lost_or_out_of_order_when_the_connector_is_killed_ten_times_under_load() {
    // GIVEN writers at work that meet at the same keys and roll some transactions back
    let database = Database::create("crash").await;
    Load::prepare(&database).await;
    let begin = database.current_wal_lsn().await;
    let load = Load::start(&database, 4);

    // WHEN the connector is killed at random moments: while it starts, and while it streams
    let mut streamed = 0;
    for kill in 0..KILLS {
        let mut walpost = if kill % 3 == 0 {
            let walpost = database.walpost(&["run"], &[]).spawn();
            tokio::time::sleep(up_to(Duration::from_millis(500))).await;
            walpost
        } else {
            let walpost = database.start(&[]).await;
            tokio::time::sleep(up_to(Duration::from_secs(1))).await;
            walpost
        };
        walpost.sigkill();
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            128 + 9,
            "it ended before"
        );
        streamed += usize::from(walpost.output().contains("streaming"));
        load.more(50).await;
    }
    assert!(streamed >= KILLS / 2);
    assert!(
        database.confirmed_flush_lsn(&database.slot).await > Some(begin),
        "no connector got as far as confirming anything: this killed nothing under way"
    );
    let walpost = database.start(&[]).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN everything committed is there and nothing else, in commit order once repeats are dropped; and each repeat is
    // part of a stretch that a restart sent again without a gap
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    let repeats = committed.assert_at_least_once(&received);
    committed.assert_reruns(&received, KILLS);
    println!("{} events, {repeats} of them again", committed.len());
}
