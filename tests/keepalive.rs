//! Guarantee: a broker connection that is half open is noticed although nothing is under way on it.

mod support;

use std::time::Duration;

use support::{Committed, Database, Load, Proxy, consume, insert_many, servers};

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn an_idle_connection_whose_broker_has_vanished_is_replaced() {
    // GIVEN a connector on which events have arrived, and that is idle now
    let database = Database::create("keepalive").await;
    Load::prepare(&database).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let mut walpost = database
        .start(&[
            ("WALPOST_PULSAR_URL", &*url),
            ("WALPOST_PULSAR_KEEPALIVE_INTERVAL", "500ms"),
            // Neither a send deadline nor anything else is to notice it first.
            ("WALPOST_SEND_TIMEOUT", "1h"),
            ("WALPOST_RECONNECT_MAX", "500ms"),
        ])
        .await;
    insert_many(&database.client, "key", 10).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN nothing passes any more, in either direction, and no packet tells so
    proxy.hold_requests(true);
    proxy.hold_upstream_replies(true);

    // THEN the connection is given up
    walpost.wait_for_line("was silent for 1s", DEADLINE).await;

    // AND WHEN the network is back, THEN events arrive, each once, over new connections
    proxy.hold_requests(false);
    proxy.hold_upstream_replies(false);
    insert_many(&database.client, "key", 10).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_at_least_once(&received);
    assert_eq!(received.len(), committed.len(), "nothing was under way");
}
