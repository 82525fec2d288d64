//! Scratch: cases that a hostile reader found.

#[path = "breaker/failover.rs"]
mod failover;
mod support;

use std::collections::HashMap;
use std::time::Duration;

use support::{Database, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(40);
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");
const INSERT: &str = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                      SELECT 't', 'key-' || n % 7, 'e', to_json(n) FROM generate_series(1, 5) n;";

async fn sent(database: &Database) {
    eventually(DEADLINE, "every row to be shown as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

async fn ids(database: &Database, sql: &str) -> Vec<String> {
    let rows = database.rows(sql, &[]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

async fn arrived(database: &Database, at_least: usize) -> HashMap<String, usize> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, at_least, DEADLINE).await;
    let mut counts = HashMap::new();
    for message in received {
        *counts.entry(message.property("id").to_owned()).or_default() += 1;
    }
    counts
}

/// Inserts a last row, waits until it is sent, and compares.
async fn expect_all(database: &Database, expected: &[String]) {
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(database).await;
    // Scratch: time for a later note to find what this one did not.
    tokio::time::sleep(Duration::from_secs(3)).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(database).await;
    let arrived = arrived(database, 0).await;
    let lost: Vec<_> = expected
        .iter()
        .filter(|id| !arrived.contains_key(*id))
        .collect();
    let doubled: Vec<_> = arrived.iter().filter(|(_, n)| **n > 1).collect();
    assert!(
        lost.is_empty(),
        "LOST {} of {}; doubled {}",
        lost.len(),
        expected.len(),
        doubled.len()
    );
}

/// F4: the publication is changed and changed back while a walpost that was killed is down.
#[tokio::test]
async fn f4_publication_changed_while_a_killed_walpost_is_down() {
    let database = Database::create("f4").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(&database).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    database
        .sql("CREATE TABLE other (id int PRIMARY KEY); ALTER PUBLICATION walpost SET TABLE other")
        .await;
    database.sql(INSERT).await;
    database
        .sql("ALTER PUBLICATION walpost SET TABLE walpost.outbox")
        .await;
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    let walpost = database.start(&[OFTEN]).await;
    expect_all(&database, &expected).await;
    walpost.stop().await;
}

const BOTH: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second");

async fn two_tables(name: &str) -> Database {
    let database = Database::create(name).await;
    database.init(&[], &[]).await;
    database
        .sql(
            "CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON second TO walpost_connector;",
        )
        .await;
    database.init(&[], &[BOTH]).await;
    database
}

/// F7: a slot that somebody made with two_phase, and a prepared transaction.
#[tokio::test]
async fn f7_slot_with_two_phase() {
    let database = Database::create("f7").await;
    database.init(&[], &[]).await;
    database
        .rows(
            "SELECT pg_drop_replication_slot($1::text::name)",
            &[&database.slot],
        )
        .await;
    database.sql("DELETE FROM walpost.progress").await;
    database
        .rows(
            "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput', false, true)",
            &[&database.slot],
        )
        .await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    sent(&database).await;
    let gid = &database.name;
    database
        .sql(&format!("BEGIN; {INSERT} PREPARE TRANSACTION '{gid}'"))
        .await;
    database.sql(&format!("ROLLBACK PREPARED '{gid}'")).await;
    database
        .sql(&format!("BEGIN; {INSERT} PREPARE TRANSACTION '{gid}'"))
        .await;
    database.sql(&format!("COMMIT PREPARED '{gid}'")).await;
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    database.sql(INSERT).await;
    let code = tokio::time::timeout(Duration::from_secs(8), walpost.wait_exit(DEADLINE)).await;
    eprintln!("EXIT {code:?}\n{}", walpost.output());
    if let Ok(code) = code {
        let mut again = database.walpost(&["run"], &[OFTEN]).spawn();
        let second = again.wait_exit(DEADLINE).await;
        panic!(
            "ended with {code}, and again with {second}: {}",
            again.output()
        );
    }
    expect_all(&database, &expected).await;
    assert_eq!(arrived(&database, 0).await.len(), expected.len() + 10);
    walpost.stop().await;
}

/// F8: another table of a FOR ALL TABLES publication has a column that the server cannot send in binary.
#[tokio::test]
async fn f8_another_table_with_an_array_without_a_binary_form() {
    let database = Database::create("f8").await;
    database.init(&[], &[]).await;
    database
        .sql("DROP PUBLICATION walpost; CREATE PUBLICATION walpost FOR ALL TABLES WITH (publish = 'insert', publish_via_partition_root = true);
              CREATE TABLE rights (id int PRIMARY KEY, acl aclitem[])")
        .await;
    let mut walpost = database.walpost(&["run"], &[OFTEN]).spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    database.sql(INSERT).await;
    sent(&database).await;
    database.sql("INSERT INTO rights SELECT 1, array_agg(a) FROM (SELECT makeaclitem(10, 10, 'SELECT', false) a) x").await;
    database.sql(INSERT).await;
    let ended = tokio::time::timeout(Duration::from_secs(10), sent(&database)).await;
    if ended.is_err() {
        panic!("stuck; exit {:?}\n{}", walpost.try_exit(), walpost.output());
    }
    walpost.stop().await;
}

/// F9: one row with a txid of the future, and a comparison that finds rows of others.
#[tokio::test]
async fn f9_one_row_of_the_future_stops_all() {
    let database = Database::create("f9").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    sent(&database).await;
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, txid) VALUES ('t', 'future', 'e', '1', '99999999999')")
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    database
        .sql(&format!("BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"))
        .await;
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    database.sql(INSERT).await;
    let code = tokio::time::timeout(Duration::from_secs(8), walpost.wait_exit(DEADLINE)).await;
    if let Ok(code) = code {
        let mut again = database.walpost(&["run"], &[OFTEN]).spawn();
        let second = again.wait_exit(DEADLINE).await;
        panic!(
            "ended with {code}, and again with {second}: {}",
            again.output()
        );
    }
    expect_all(&database, &expected).await;
    walpost.stop().await;
}

/// F10: an optional column has another name for a while.
#[tokio::test]
async fn f10_topic_column_renamed_for_a_while() {
    let database = Database::create("f10").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    sent(&database).await;
    walpost.stop().await;
    let topic = database.topic("own");
    database
        .sql(&format!(
            "ALTER TABLE walpost.outbox RENAME COLUMN topic TO topic_old;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic_old) VALUES ('t', 'k', 'e', '1', '{topic}');
             ALTER TABLE walpost.outbox RENAME COLUMN topic_old TO topic"
        ))
        .await;
    let walpost = database.start(&[OFTEN]).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(&database).await;
    walpost.stop().await;
    let there = consume(&servers().pulsar_url, &topic, 1, Duration::from_secs(5));
    let there = tokio::time::timeout(Duration::from_secs(8), there).await;
    let elsewhere = arrived(&database, 0).await.len();
    assert_eq!(
        elsewhere,
        5,
        "the row went to the template's topic; its own: {:?}",
        there.map(|t| t.len())
    );
}

/// F11: rows of the same transaction that are deleted hide rows that the stream left out.
#[tokio::test]
async fn f11_deleted_rows_hide_missing_ones() {
    let database = Database::create("f11").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    sent(&database).await;
    walpost.stop().await;
    let before = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) SELECT 'u', 'x', 'e', to_json(n) FROM generate_series(1, 5) n;";
    database
        .sql("ALTER PUBLICATION walpost SET TABLE walpost.outbox WHERE (aggregatetype <> 't')")
        .await;
    database
        .sql(&format!("BEGIN; {before} {INSERT} COMMIT"))
        .await;
    database.sql("ALTER PUBLICATION walpost SET TABLE walpost.outbox; DELETE FROM walpost.outbox WHERE aggregatetype = 'u'").await;
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    let walpost = database.start(&[OFTEN]).await;
    expect_all(&database, &expected).await;
    walpost.stop().await;
}

/// F12: an UPDATE moves a row to another partition: by the mode mark, in a table that keeps sent rows apart.
#[tokio::test]
async fn f12_row_that_moves_to_another_partition_is_no_event() {
    let database = Database::create("f12").await;
    database
        .sql(
            "CREATE TABLE parted (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload json,
                created_at timestamptz DEFAULT now(), seq bigint DEFAULT 0, txid xid8 NOT NULL DEFAULT pg_current_xact_id(), sent_at timestamptz)
                PARTITION BY RANGE (sent_at);
             CREATE SEQUENCE parted_seq; ALTER TABLE parted ALTER COLUMN seq SET DEFAULT nextval('parted_seq');
             CREATE TABLE parted_done PARTITION OF parted FOR VALUES FROM ('2000-01-01') TO ('2100-01-01');
             CREATE TABLE parted_open PARTITION OF parted DEFAULT;",
        )
        .await;
    let settings = [
        ("WALPOST_OUTBOX_TABLE", "public.parted"),
        OFTEN,
        ("WALPOST_AFTER_PUBLISH", "mark"),
    ];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    let insert = "INSERT INTO parted (aggregatetype, aggregateid, type, payload) SELECT 't', 'k' || n, 'e', to_json(n) FROM generate_series(1, 5) n";
    database.sql(insert).await;
    eventually(DEADLINE, "all marked", async || {
        let sql = "SELECT count(*) FROM parted WHERE sent_at IS NULL";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    database.wait_all_confirmed(DEADLINE).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let counts = arrived(&database, 5).await;
    assert!(counts.values().all(|n| *n == 1), "{counts:?}");
}

/// F17: SIGTERM while the broker is away, and rows that the publication hid before.
#[tokio::test]
async fn f17_sigterm_while_the_broker_is_away() {
    let database = Database::create("f17").await;
    database.init(&[], &[]).await;
    let proxy = support::Proxy::before_broker(&servers().pulsar_addr);
    let pulsar = format!("pulsar://{}", proxy.addr());
    let settings = [
        OFTEN,
        ("WALPOST_PULSAR_URL", &*pulsar),
        ("WALPOST_SHUTDOWN_GRACE", "2s"),
    ];
    let mut walpost = database.start(&settings).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(&database).await;
    proxy.hold_upstream_replies(true);
    database.sql(INSERT).await;
    database
        .sql(&format!("BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"))
        .await;
    walpost.sigterm();
    let code = walpost.wait_exit(DEADLINE).await;
    eprintln!("EXIT {code}");
    proxy.hold_upstream_replies(false);
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    let walpost = database.start(&[OFTEN]).await;
    expect_all(&database, &expected).await;
    walpost.stop().await;
}

/// F18: the outbox itself has a column that walpost does not read and the server cannot send in binary.
#[tokio::test]
async fn f18_own_column_without_a_binary_form() {
    let database = Database::create("f18").await;
    database.init(&[], &[]).await;
    database.sql("ALTER TABLE walpost.outbox ADD COLUMN acl aclitem[] DEFAULT ARRAY[makeaclitem(10, 10, 'SELECT', false)]").await;
    let (code, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    eprintln!("EXIT check {code}: {}", said.lines().last().unwrap_or(""));
    let mut walpost = database.walpost(&["run"], &[OFTEN]).spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    database.sql(INSERT).await;
    let ended = tokio::time::timeout(Duration::from_secs(10), sent(&database)).await;
    if ended.is_err() {
        panic!("stuck; exit {:?}\n{}", walpost.try_exit(), walpost.output());
    }
    walpost.stop().await;
}

/// F19: a table whose own columns txid and seq are something else.
#[tokio::test]
async fn f19_txid_of_another_type() {
    let database = Database::create("f19").await;
    database
        .sql("CREATE TABLE plain (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload json, txid bigint DEFAULT txid_current(), seq bigserial)")
        .await;
    let settings = [("WALPOST_OUTBOX_TABLE", "public.plain"), OFTEN];
    database.init(&[], &settings).await;
    let (code, said) = database.walpost(&["check"], &settings).run(DEADLINE).await;
    eprintln!("EXIT check {code}: {said}");
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    let insert = "INSERT INTO plain (aggregatetype, aggregateid, type, payload) SELECT 't', 'k' || n, 'e', to_json(n) FROM generate_series(1, 5) n";
    database.sql(insert).await;
    let ended = tokio::time::timeout(
        Duration::from_secs(10),
        database.wait_all_confirmed(DEADLINE),
    )
    .await;
    panic!(
        "{ended:?}; exit {:?}\n{}",
        walpost.try_exit(),
        walpost.output()
    );
}

/// F20: one table that may not be read keeps what is delivered of all others from being noted; is that told?
#[tokio::test]
async fn f20_one_table_without_select() {
    let database = two_tables("f20").await;
    let settings = [BOTH, OFTEN, ("WALPOST_HTTP_ADDR", "127.0.0.1:34987")];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    database
        .sql("REVOKE SELECT ON second FROM walpost_connector; REVOKE SELECT ON second FROM PUBLIC")
        .await;
    database.sql(INSERT).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    let status = ids(
        &database,
        "SELECT DISTINCT status FROM walpost.outbox_status",
    )
    .await;
    let ready = std::process::Command::new("curl")
        .args(["-s", "-w", " %{http_code}", "http://127.0.0.1:34987/readyz"])
        .output()
        .unwrap();
    eprintln!(
        "STATUS {status:?} arrived {} READY {} exit {:?}",
        arrived(&database, 0).await.len(),
        String::from_utf8_lossy(&ready.stdout),
        walpost.try_exit()
    );
    let (code, said) = database
        .walpost(
            &["check"],
            &[BOTH, ("WALPOST_POSTGRES_URL", &database.run_url())],
        )
        .run(DEADLINE)
        .await;
    eprintln!("EXIT check {code}\n{said}");
    panic!("{}", walpost.output());
}

/// F21: as f4 on Postgres 18, with a publication that was dropped and made again.
#[tokio::test]
async fn f21_publication_dropped_while_a_killed_walpost_is_down_on_18() {
    let on = support::Servers::up(&["--postgres", "18", "--no-pulsar"]);
    let database = Database::create_on(&on, "f21").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    sent(&database).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    database.sql("DROP PUBLICATION walpost").await;
    database.sql(INSERT).await;
    database
        .sql("CREATE PUBLICATION walpost FOR TABLE walpost.outbox WITH (publish = 'insert', publish_via_partition_root = true)")
        .await;
    let expected = ids(&database, "SELECT id::text FROM walpost.outbox").await;
    let walpost = database.start(&[OFTEN]).await;
    expect_all(&database, &expected).await;
    walpost.stop().await;
}
