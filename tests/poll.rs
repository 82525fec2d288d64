//! Guarantee: without logical replication (`wal_level=replica`, a role without the right) poll mode brings every committed row,
//! none that was rolled back, a key's in the order of commits; and a change between poll and stream loses nothing.

#[path = "poll/modes.rs"]
mod modes;
mod support;

use std::time::Duration;

use support::{
    Committed, Database, Load, Received, Servers, Walpost, consume, eventually, insert_many,
    servers,
};

const DEADLINE: Duration = Duration::from_secs(90);
const POLL: [(&str, &str); 2] = [("WALPOST_MODE", "poll"), ("WALPOST_SCAN_INTERVAL", "100ms")];
const STREAM: [(&str, &str); 1] = [("WALPOST_SCAN_INTERVAL", "100ms")];

/// A server that cannot replicate logically.
async fn replica_level(name: &str) -> ReplicaLevel {
    let own = Servers::own(name, &["--no-pulsar"]);
    let database = Database::create_on(&own, name).await;
    database.sql("ALTER SYSTEM SET wal_level = 'replica'").await;
    own.stop_postgres();
    own.start();
    let mut database = database;
    database.client = database.connect().await;
    ReplicaLevel {
        database,
        _own: own,
    }
}

/// A database, and its server, which must outlive it.
struct ReplicaLevel {
    database: Database,
    _own: support::OwnServers,
}

async fn start(database: &Database, settings: &[(&str, &str)]) -> Walpost {
    let mut walpost = database.walpost(&["run"], settings).spawn();
    let says = if settings.contains(&POLL[0]) {
        "polling"
    } else {
        "streaming"
    };
    walpost.wait_for_line(says, DEADLINE).await;
    walpost
}

async fn received(database: &Database, expected: usize) -> Vec<Received> {
    let topic = Load::topic(database);
    consume(&servers().pulsar_url, &topic, expected, DEADLINE).await
}

/// What `walpost init` makes for polling, and the load's counters.
async fn prepare(database: &Database, settings: &[(&str, &str)]) {
    database.init(&[], settings).await;
    Load::counters(database).await;
}

#[tokio::test]
async fn every_row_arrives_where_there_is_no_logical_replication() {
    // GIVEN a server that cannot replicate logically, a role without rights beyond its own tables, and writers at work
    let ReplicaLevel { database, _own } = replica_level("poll").await;
    let role = format!("{}_r", database.name);
    database
        .sql(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'p'; GRANT CREATE ON DATABASE {} TO {role}",
            database.name
        ))
        .await;
    let (_, server) = database.url.rsplit_once('@').expect("a user");
    let url = format!("postgres://{role}:p@{server}");
    let settings = [POLL[0], POLL[1], ("WALPOST_POSTGRES_URL", &*url)];
    // Without --roles: it may make none, and owns what it polls.
    let (code, said) = database.walpost(&["init"], &settings).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    Load::counters(&database).await;
    insert_many(&database.client, "old", 5_000).await;
    let load = Load::start(&database, 8);

    // WHEN it polls, with a transaction that is open all the while
    let long = database.connect().await;
    long.batch_execute("BEGIN").await.expect("a transaction");
    insert_many(&long, "long", 10).await;
    let walpost = start(&database, &settings).await;
    load.more(500).await;
    long.batch_execute("COMMIT").await.expect("it commits");
    load.more(100).await;
    load.stop();

    // THEN every row comes once, in order, and none that was rolled back
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    committed.assert_exactly_once(&received(&database, committed.len()).await);
}

#[tokio::test]
async fn a_poller_that_is_killed_goes_on_with_the_look_it_began() {
    // GIVEN writers, and a broker that deduplicates
    let mut database = Database::create("pollkill").await;
    database.deduplicate(servers()).await;
    prepare(&database, &POLL).await;
    let load = Load::start(&database, 4);

    // WHEN it is killed again and again
    for _ in 0..10 {
        let mut walpost = start(&database, &POLL).await;
        load.more(60).await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
    }
    load.stop();

    // THEN every row is there once, in order
    let walpost = start(&database, &POLL).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    committed.assert_exactly_once(&received(&database, committed.len()).await);
}

#[tokio::test]
async fn a_change_between_poll_and_stream_loses_nothing() {
    // GIVEN writers at work and a poller
    let database = Database::create("switch").await;
    prepare(&database, &POLL).await;
    let load = Load::start(&database, 4);
    let walpost = start(&database, &POLL).await;
    load.more(100).await;
    walpost.stop().await;
    load.more(50).await;

    // WHEN it becomes a stream, and a poller again, and a stream again
    database.init(&[], &[]).await;
    let walpost = start(&database, &STREAM).await;
    load.more(100).await;
    walpost.stop().await;
    load.more(50).await;
    let mut walpost = start(&database, &POLL).await;
    walpost
        .wait_for_line("keeps log on the server", DEADLINE)
        .await;
    load.more(100).await;
    walpost.stop().await;
    let walpost = start(&database, &STREAM).await;
    load.more(100).await;
    load.stop();

    // THEN nothing is lost
    database.wait_all_confirmed(DEADLINE).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    committed.assert_at_least_once(&received(&database, committed.len()).await);
}

#[tokio::test]
async fn a_table_without_the_columns_that_polling_needs_is_refused_with_the_statement_that_adds_them()
 {
    let database = Database::create("pollbare").await;
    database
        .sql("CREATE TABLE bare (id uuid PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload json)")
        .await;
    let settings = [POLL[0], POLL[1], ("WALPOST_OUTBOX_TABLE", "bare")];
    database.init(&[], &settings).await;
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("ALTER TABLE public.bare ADD COLUMN txid"),
        "{said}"
    );
}
