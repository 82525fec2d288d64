//! Guarantee: where the broker deduplicates each event comes once, in order, also where the log passes the end of an epoch of sequence ids (2^48
//! bytes), and where ids of whole positions would end (2^50 bytes).

mod support;

use std::time::Duration;

use support::{
    Committed, Database, Load, OwnServers, Servers, as_owner, consume, insert_many, servers,
};
use walpost::Lsn;

const DEADLINE: Duration = Duration::from_secs(120);

/// A cluster of its own whose log begins two segments below this epoch.
fn just_below(epoch: u64) -> OwnServers {
    let own = Servers::own(
        &format!("epoch-{epoch}"),
        &["--postgres", "15", "--no-pulsar"],
    );
    own.stop_postgres();
    let data = own.var("WALPOST_LOCAL_POSTGRES_DATA");
    let reset = format!("{}/pg_resetwal", own.var("WALPOST_LOCAL_POSTGRES_BIN"));
    // Timeline, upper half of the position, segment of 16 MB.
    let segment = format!("00000001{:08X}000000FE", (epoch << 16) - 1);
    let done = as_owner(data, &reset, &["-l", &segment, data]);
    assert!(done.status.success(), "{done:?}");
    own.start();
    own
}

/// `large`: events of the one transaction that begins below the epoch and ends in it.
async fn each_event_comes_once_across(epoch: u64, large: i64) {
    // GIVEN writers, and a stream to a broker that deduplicates, just below the epoch
    let own = just_below(epoch);
    let mut database = Database::create_on(&own, "epochs").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let boundary = Lsn::new(epoch << 48);
    assert!(database.current_wal_lsn().await < boundary);
    let load = Load::start(&database, 4);
    let mut walpost = database.start(&[]).await;
    load.more(50).await;
    let across = database.connect().await;
    across.batch_execute("BEGIN").await.expect("a transaction");
    insert_many(&across, "across", large).await;

    // WHEN the log goes on into the epoch, and the connector is killed again and again
    for _ in 0..4 {
        if database.current_wal_lsn().await < boundary {
            database.sql("SELECT pg_switch_wal()").await;
        }
        load.more(20).await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        load.more(20).await;
        walpost = database.start(&[]).await;
    }
    assert!(database.current_wal_lsn().await > boundary);
    across.batch_execute("COMMIT").await.expect("its end");
    load.more(50).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    let walpost = database.start(&[]).await;
    load.more(50).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN each event is there once, in order
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn each_event_comes_once_where_the_first_epoch_ends_inside_a_huge_transaction() {
    each_event_comes_once_across(1, 340_000).await;
}

#[tokio::test]
async fn each_event_comes_once_where_ids_of_whole_positions_would_end() {
    each_event_comes_once_across(4, 2_000).await;
}
