//! An instance that is stopped (SIGSTOP, a frozen container) does not keep the lock: its kernel goes on acknowledging keepalives, so only the server's
//! clock can end its sessions.

use crate::support::{Committed, Database, Load, Walpost, consume, servers};
use crate::*;

/// Two instances of this mode: one that works, and one that waits.
async fn two(database: &Database, mode: (&str, &str), works: &str) -> (Walpost, Walpost) {
    // The slot of a stopped process is free when the walsender has given it up. (60 s by default.)
    database
        .sql(&format!(
            "ALTER DATABASE {} SET wal_sender_timeout = '5s'",
            database.name
        ))
        .await;
    let settings = [&SETTINGS[..], &[mode]].concat();
    let mut first = database.walpost(&["run"], &settings).spawn();
    first.wait_for_line(works, DEADLINE).await;
    let mut second = database.walpost(&["run"], &settings).spawn();
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    (first, second)
}

#[tokio::test]
async fn a_stopped_instance_loses_the_lock_while_it_stands_still_and_loses_no_event() {
    // GIVEN writers at work, an instance that streams, and one that waits
    let mut database = Database::create("still").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let stream = ("WALPOST_MODE", "stream");
    let (mut first, mut second) = two(&database, stream, "streaming").await;
    let load = Load::start(&database, 4);
    load.more(50).await;

    // WHEN the first one is stopped, and nobody ends its sessions
    first.signal("STOP");

    // THEN the second one streams while the first one stands still
    second.wait_for_line("streaming", DEADLINE).await;
    load.more(50).await;

    // AND the first one, when it goes on, waits; and takes over when the second one dies
    first.signal("CONT");
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    load.more(50).await;
    second.sigkill();
    second.wait_exit(DEADLINE).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    first.stop().await;

    // AND every row is in the topic once, in order
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn so_does_a_poller() {
    const POLL: (&str, &str) = ("WALPOST_MODE", "poll");
    // GIVEN a poller, and one that waits
    let database = Database::create("still").await;
    database.init(&[], &[POLL]).await;
    let (mut first, mut second) = two(&database, POLL, "polling").await;

    // WHEN the first one is stopped
    first.signal("STOP");

    // THEN the second one polls while the first one stands still, which waits when it goes on
    second.wait_for_line("polling", DEADLINE).await;
    first.signal("CONT");
    first
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    second.stop().await;
    first.stop().await;
}
