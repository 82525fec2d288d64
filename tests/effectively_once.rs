//! Guarantee: with deduplication on the broker's side the topic holds every committed event exactly once, in order per key,
//! whatever dies while 200,000 of them pass: the connector twenty times, the walsender five times, the broker twice.

mod support;

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use support::{Committed, Database, Load, Servers, Walpost, consume, insert_many};

const DEADLINE: Duration = Duration::from_secs(180);
const EVENTS: usize = 200_000;
const KILLS: u64 = 20;

/// A moment that no run has twice: when the fault strikes. Nothing is waited for by it.
fn up_to(longest: Duration) -> Duration {
    let random = RandomState::new().hash_one(0_u8);
    longest.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

/// Rows in bulk besides what the writers do, so that every fault strikes a full pipe.
async fn pour(database: &Database, round: u64) {
    for key in 0..4 {
        insert_many(&database.client, &format!("bulk-{key}"), 2_400).await;
    }
    insert_many(&database.client, &format!("round-{round}"), 500).await;
}

async fn start(database: &Database, own: &Servers) -> Walpost {
    let settings = [
        ("WALPOST_PULSAR_URL", &*own.pulsar_url),
        ("WALPOST_RECONNECT_MAX", "1s"),
    ];
    database.start(&settings).await
}

#[tokio::test]
async fn two_hundred_thousand_events_arrive_exactly_once_whatever_dies_on_the_way() {
    // GIVEN writers at work, and a broker that deduplicates
    let own = Servers::own("once", &[]);
    let mut database = Database::create("once").await;
    database.deduplicate(&own).await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 2);
    let mut walpost = start(&database, &own).await;
    let mut faults = (0, 0, 0);

    for round in 0..KILLS {
        pour(&database, round).await;
        load.more(50).await;

        // WHEN the walsender is terminated every fourth time
        if round % 4 == 1 {
            database.terminate_walsender().await;
            faults.1 += 1;
            load.more(20).await;
        }
        // AND the broker dies twice: once by SIGKILL, once told to
        if round == 6 || round == 13 {
            if round == 6 {
                own.signal_pulsar("KILL");
            } else {
                own.stop_pulsar();
            }
            faults.2 += 1;
            pour(&database, round).await;
            own.start();
            load.more(20).await;
        }
        // AND the connector is killed at a random moment, each time
        tokio::time::sleep(up_to(Duration::from_millis(500))).await;
        walpost.sigkill();
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            128 + 9,
            "it ended before"
        );
        faults.0 += 1;
        // The dead connector's session may still hold the slot for a moment.
        walpost = start(&database, &own).await;
    }
    assert_eq!(faults, (20, 5, 2));
    load.stop();

    // THEN the topic holds every id once, in order
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&own.pulsar_url, &topic, committed.len(), DEADLINE).await;
    assert!(committed.len() >= EVENTS, "{} events", committed.len());
    println!("{} events, {} received", committed.len(), received.len());
    committed.assert_exactly_once(&received);
}
