//! Guarantee: on a Shared subscription an event with `deliver_at` arrives not before its time, and all others at once.
//!
//! Judged by the C++ client. The broker delivers up to one tick early (unless `isDelayedDeliveryDeliverAtTimeStrict`) and
//! the tick is a second by default, so the test has a namespace with a short one.

mod support;

use std::time::Duration;

use serde_json::json;
use support::{Database, Judged, Python, servers};

const DEADLINE: Duration = Duration::from_secs(60);
/// Of the namespace's delayed delivery, and so what the broker may be early.
const TICK_MS: u32 = 10;
/// What it may be late: seconds on a busy machine.
const LATE_MS: f64 = 5_000.0;

#[tokio::test]
async fn delayed_events_arrive_not_before_their_time_and_the_others_at_once() {
    // GIVEN a consumer on a Shared subscription and a stream
    let mut database = Database::create("delayed").await;
    let short = json!({"active": true, "tickTime": TICK_MS}).to_string();
    let policy = ("delayedDelivery", &*short, "\"tickTime\":10,");
    database
        .own_namespace(&servers().pulsar_admin_url, &[policy])
        .await;
    database.init(&[], &[]).await;
    let order = json!({"topic": database.topic("t"), "type": "Shared"});
    let mut consumer = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumer.next(DEADLINE).await, json!({"ready": true}));
    let walpost = database.start(&[]).await;

    // WHEN one transaction has events of one key for now, for later in all orders, and for a time that has passed
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, deliver_at)
             SELECT 't', 'k', 't', to_json(n), now() + d * interval '1 ms'
             FROM unnest(ARRAY[NULL, 6000, 4000, NULL, 5000.5, -60000, 4000, NULL]) WITH ORDINALITY AS rows (d, n)",
        )
        .await;
    let seen = Judged::take(consumer, 8, DEADLINE).await;
    walpost.stop().await;

    // THEN each comes when it should
    assert_eq!(seen.len(), 8);
    let query = "SELECT payload::text, (extract(epoch FROM created_at) * 1000)::float8,
                        (extract(epoch FROM greatest(deliver_at, created_at)) * 1000)::float8, deliver_at > created_at
                 FROM walpost.outbox";
    let rows = database.rows(query, &[]).await;
    let first_due_ms = rows
        .iter()
        .filter(|row| row.get::<_, Option<bool>>(3) == Some(true))
        .map(|row| row.get::<_, f64>(2))
        .fold(f64::INFINITY, f64::min);
    for row in &rows {
        let (number, due_ms): (String, f64) = (row.get(0), row.get(2));
        let message = seen
            .iter()
            .find(|message| message.payload == number.as_bytes())
            .unwrap_or_else(|| panic!("event {number} did not come"));
        let late_ms = message.received_ms - due_ms;
        println!("event {number}: {late_ms:.1} ms after its time");
        assert!(
            late_ms >= -f64::from(TICK_MS),
            "event {number} came {} ms too early",
            -late_ms
        );
        assert!(
            late_ms < LATE_MS,
            "event {number} came {late_ms} ms too late"
        );
        if row.get::<_, Option<bool>>(3) != Some(true) {
            assert!(message.received_ms < first_due_ms, "event {number} waited");
        }
    }
}
