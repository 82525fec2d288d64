//! `walpost verify` finds what is missing, doubled, changed and out of order, finds nothing where nothing is wrong, and does
//! it in bounded memory.
//!
//! Most faults are made by hand: rows that are declared delivered, and messages that the pulsar crate's producer sends, which
//! shares no code with walpost's.

mod support;

use std::time::{Duration, Instant};

use pulsar::{Pulsar, TokioExecutor, producer};
use serde_json::{Value, json};
use support::{Database, Load, Proxy, admin, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
/// A million rows, in a build without optimization on a machine that is busy.
const LONG: Duration = Duration::from_secs(600);
const MILLION: u64 = 1_000_000;
/// The promise: two sorts' budgets, and what the process takes anyway.
const PEAK_RSS_KIB: u64 = 96 * 1024;
/// The same for the time, of an optimized build.
const MILLION_WITHIN: Duration = Duration::from_secs(60);
const QUIET: (&str, &str) = ("WALPOST_LOG", "off");

/// `walpost verify --json <args>`.
async fn verify(database: &Database, args: &[&str], settings: &[(&str, &str)]) -> (i32, Value) {
    let args = [&["verify", "--json"], args].concat();
    let settings = [&[QUIET], settings].concat();
    let (code, said) = database.walpost(&args, &settings).run(LONG).await;
    let report = serde_json::from_str(&said).unwrap_or_else(|_| panic!("no JSON: {said}"));
    (code, report)
}

/// Ids of a kind of fault, sorted.
fn ids<'a>(report: &'a Value, kind: &str) -> Vec<&'a str> {
    let list = report[kind]["first_ids"].as_array().expect("a list");
    let mut ids: Vec<_> = list.iter().map(|id| id.as_str().expect("text")).collect();
    ids.sort_unstable();
    ids
}

fn assert_good(code: i32, report: &Value) {
    assert_eq!((code, &report["exit_code"]), (0, &json!(0)), "{report:#}");
    for kind in [
        "missing",
        "duplicates",
        "out_of_order",
        "different",
        "unknown_messages",
    ] {
        assert_eq!(report[kind]["count"], 0, "{kind}: {report:#}");
    }
}

/// A table whose ids are words, so that a test can say what it means.
async fn outbox_with_words(prefix: &str) -> Database {
    let database = Database::create(prefix).await;
    database.init(&[], &[]).await;
    database
        .sql("DROP VIEW walpost.outbox_status; ALTER TABLE walpost.outbox ALTER id DROP DEFAULT, ALTER id TYPE text")
        .await;
    database
}

async fn insert(database: &Database, id: &str, key: &str) {
    let sql = "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload) VALUES ($1, 't', $2, 't', to_json($1::text))";
    database.rows(sql, &[&id, &key]).await;
}

/// Says that everything committed so far has its receipt.
async fn declare_delivered(database: &Database) {
    let sql = "INSERT INTO walpost.progress (slot, system_id, delivered)
               SELECT $1, system_identifier::text, pg_current_snapshot() FROM pg_control_system()
               ON CONFLICT (slot) DO UPDATE SET delivered = excluded.delivered";
    database.rows(sql, &[&database.slot]).await;
}

/// Waits until walpost itself has noted that all rows are delivered.
async fn wait_delivered(database: &Database) {
    eventually(LONG, "every row to be noted as delivered", async || {
        let sql = "SELECT coalesce(bool_and(pg_visible_in_snapshot(txid, delivered)), false)
                   FROM walpost.outbox, walpost.progress";
        database.rows(sql, &[]).await[0]
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
}

/// Sends messages as another program would.
struct Hand(pulsar::Producer<TokioExecutor>);

impl Hand {
    async fn on(topic: &str) -> Self {
        let pulsar = Pulsar::builder(&*servers().pulsar_url, TokioExecutor);
        let pulsar = Box::pin(pulsar.build()).await.expect("the broker");
        let producer = pulsar.producer().with_topic(topic);
        Self(Box::pin(producer.build()).await.expect("a producer"))
    }

    /// The message that the row `id` of [`insert`] should become.
    async fn send(&mut self, id: &str, key: &str) {
        self.send_as(Some(id), key, &json!(id).to_string()).await;
    }

    async fn send_as(&mut self, id: Option<&str>, key: &str, payload: &str) {
        let message = producer::Message {
            payload: payload.as_bytes().to_vec(),
            properties: id
                .map(|id| ("id".to_owned(), id.to_owned()))
                .into_iter()
                .collect(),
            partition_key: Some(key.to_owned()),
            ..producer::Message::default()
        };
        let receipt = Box::pin(self.0.send_non_blocking(message))
            .await
            .expect("sent");
        receipt.await.expect("a receipt");
    }
}

#[tokio::test]
async fn what_walpost_delivered_under_load_and_a_kill_is_found_whole() {
    // GIVEN writers that roll back and meet at keys, a broker that deduplicates, and a connector that is killed on the way
    let mut database = Database::create("verify").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);
    let settings = [("WALPOST_SCAN_INTERVAL", "100ms")];
    let mut walpost = database.start(&settings).await;
    load.more(100).await;
    walpost.sigkill();
    drop(walpost);
    let walpost = database.start(&settings).await;
    load.more(100).await;

    eventually(DEADLINE, "something to be delivered", async || {
        let sql = "SELECT FROM walpost.outbox, walpost.progress WHERE pg_visible_in_snapshot(txid, delivered) LIMIT 1";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;

    // WHEN it is verified while all this goes on, THEN what is judged is good
    let (code, report) = verify(&database, &[], &[]).await;
    assert_eq!(code, 0, "{report:#}");
    assert!(report["rows"].as_u64().expect("a number") > 0);

    // AND afterwards every row is judged, and nobody has subscribed to the topic
    load.stop();
    wait_delivered(&database).await;
    walpost.stop().await;
    let (code, report) = verify(&database, &[], &[]).await;
    assert_good(code, &report);
    let rows = database
        .rows("SELECT count(*) FROM walpost.outbox", &[])
        .await;
    assert_eq!(report["rows"], rows[0].get::<_, i64>(0), "{report:#}");
    assert_eq!(report["messages"], report["rows"]);
    let path = Load::topic(&database).replacen("://", "/", 1);
    let path = format!("/admin/v2/{path}/subscriptions");
    let subscriptions = admin(&servers().pulsar_admin_url, "GET", &path, "").await;
    assert_eq!(subscriptions.trim(), "[]");
}

#[tokio::test]
async fn each_fault_is_found_and_named() {
    // GIVEN rows of one key that are said to be delivered
    let database = outbox_with_words("faults").await;
    for id in [
        "first", "lost", "twice", "late", "early", "changed", "rekeyed", "last",
    ] {
        insert(&database, id, "k").await;
    }
    declare_delivered(&database).await;
    insert(&database, "not yet delivered", "k").await;

    // WHEN one message is missing, one comes twice, two change places, two are not the row's, two are nobody's
    let mut hand = Hand::on(&database.topic("t")).await;
    for id in ["first", "twice", "twice", "early", "late"] {
        hand.send(id, "k").await;
    }
    hand.send_as(Some("changed"), "k", "\"other\"").await;
    hand.send_as(Some("rekeyed"), "l", "\"rekeyed\"").await;
    hand.send("last", "k").await;
    hand.send("nobody's", "k").await;
    hand.send_as(None, "k", "foreign").await;

    // THEN each is told apart and named, and the exit code is 1
    let (code, report) = verify(&database, &[], &[]).await;
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(ids(&report, "missing"), ["lost"]);
    assert_eq!(ids(&report, "duplicates"), ["twice"]);
    assert_eq!(ids(&report, "out_of_order"), ["early"]);
    assert_eq!(ids(&report, "different"), ["changed", "rekeyed"]);
    assert_eq!(ids(&report, "unknown_messages"), ["nobody's"]);
    assert_eq!(report["unknown_messages"]["count"], 2);
    assert_eq!(
        (&report["rows"], &report["rows_not_judged"]),
        (&json!(8), &json!(1))
    );
    assert_eq!(report["messages"], 10);

    // AND the same in words, of each kind as many ids as were asked for
    let args = ["verify", "--show", "1"];
    let (code, said) = database.walpost(&args, &[]).run(DEADLINE).await;
    assert_eq!(code, 1, "{said}");
    for line in ["missing", "    lost", "WRONG"] {
        assert!(said.contains(line), "{said}");
    }
    assert!(
        said.contains("changed") != said.contains("rekeyed"),
        "{said}"
    );
}

#[tokio::test]
async fn a_time_range_judges_only_its_rows() {
    // GIVEN a row of each of three days, and no message at all
    let database = outbox_with_words("range").await;
    for (id, day) in [("a", "01"), ("b", "02"), ("c", "03")] {
        let at = format!("2026-01-{day} 12:00Z");
        let sql = "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, created_at) VALUES ($1, 't', 'k', 't', $2::text::timestamptz)";
        database.rows(sql, &[&id, &at]).await;
    }
    declare_delivered(&database).await;

    // WHEN a day is asked for, THEN only its row is missing; the end of the range is not in it
    for (args, missing) in [
        (
            &["--from", "2026-01-02", "--to", "2026-01-03"][..],
            &["b"][..],
        ),
        (&["--from", "2026-01-02T12:00:00Z"], &["b", "c"]),
        (&["--to", "2026-01-02 13:00+01"], &["a"]),
        (&["--from", "2026-01-04"], &[]),
    ] {
        let (code, report) = verify(&database, args, &[]).await;
        assert_eq!(ids(&report, "missing"), missing, "{args:?}");
        assert_eq!(code, i32::from(!missing.is_empty()));
        // No topic, so nothing that the broker could still have.
        assert_eq!(report["missing_older_than_topic"], missing.len());
    }
}

#[tokio::test]
async fn partitions_codecs_tombstones_and_binary_payloads_are_read_as_they_are() {
    // GIVEN a topic of five partitions, bytea payloads, tombstones beside empty payloads, large and delayed messages
    let database = Database::create("parts").await;
    let settings = [
        ("WALPOST_SCAN_INTERVAL", "100ms"),
        ("WALPOST_COMPRESSION", "zstd"),
        ("WALPOST_AFTER_PUBLISH", "mark"),
    ];
    database.init(&["--payload", "bytea"], &settings).await;
    let path = database.topic("t").replacen("://", "/", 1);
    let path = format!("/admin/v2/{path}/partitions");
    admin(&servers().pulsar_admin_url, "PUT", &path, "5").await;
    let walpost = database.start(&settings).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, deliver_at)
             SELECT 't', 'k' || n % 50, 't',
                    CASE n % 10 WHEN 0 THEN NULL WHEN 1 THEN ''::bytea WHEN 2 THEN decode(repeat('00ff', 50000), 'hex')
                                ELSE decode(md5(n::text), 'hex') END,
                    CASE WHEN n % 100 = 7 THEN now() + interval '1 hour' END
             FROM generate_series(1, 2000) n",
        )
        .await;
    wait_delivered(&database).await;
    eventually(DEADLINE, "the marks", async || {
        let sql = "SELECT FROM walpost.outbox WHERE sent_at IS NULL LIMIT 1";
        database.rows(sql, &[]).await.is_empty().then_some(())
    })
    .await;
    walpost.stop().await;

    // WHEN it is verified, THEN it is good
    let (code, report) = verify(&database, &[], &settings).await;
    assert_good(code, &report);
    assert_eq!(
        (&report["rows"], &report["messages"]),
        (&json!(2000), &json!(2000))
    );

    // AND a tombstone that should have had no bytes instead is another payload
    database
        .sql("UPDATE walpost.outbox SET payload = NULL WHERE payload = ''")
        .await;
    let (code, report) = verify(&database, &["--show", "0"], &settings).await;
    assert_eq!(
        (code, &report["different"]["count"]),
        (1, &json!(200)),
        "{report:#}"
    );
}

#[tokio::test]
async fn a_straggler_is_told_as_one_and_not_as_missing() {
    // GIVEN a row whose topic takes nothing, and another that is fine
    let database = outbox_with_words("verify_straggler").await;
    let settings = [
        ("WALPOST_SCAN_INTERVAL", "100ms"),
        ("WALPOST_STRAGGLER_AGE", "1s"),
        ("WALPOST_RETRY_INITIAL", "1h"),
        ("WALPOST_RETRY_MAX", "1h"),
    ];
    let walpost = database.start(&settings).await;
    insert(&database, "fine", "k").await;
    let sql = "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload, topic) VALUES ('bad', 't', 'k', 't', 'null', $1)";
    // No such namespace.
    let nowhere = format!("persistent://public/{}/x", database.name);
    database.rows(sql, &[&nowhere]).await;
    insert(&database, "third", "k").await;
    database
        .sql("INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload) VALUES ('impossible', 'a/b', 'k', 't', 'null')")
        .await;
    eventually(LONG, "two stragglers", async || {
        let rows = database.rows("SELECT FROM walpost.straggler", &[]).await;
        (rows.len() == 2).then_some(())
    })
    .await;
    wait_delivered(&database).await;
    walpost.stop().await;

    // WHEN verified, THEN the one is retried, the other dead, which is wrong, and nothing is missing
    let (code, report) = verify(&database, &[], &[]).await;
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(ids(&report, "retrying"), ["bad"]);
    assert_eq!(ids(&report, "dead"), ["impossible"]);
    assert_eq!(
        (&report["missing"]["count"], &report["rows"]),
        (&json!(0), &json!(4))
    );

    // AND without the dead one everything that can be is there
    database
        .sql("DELETE FROM walpost.straggler WHERE state = 'dead'; DELETE FROM walpost.outbox WHERE id = 'impossible'")
        .await;
    let (code, report) = verify(&database, &[], &[]).await;
    assert_good(code, &report);
}

#[tokio::test]
async fn a_connection_that_breaks_on_the_way_changes_nothing_of_the_verdict() {
    // GIVEN 40 MB of delivered messages, and a way to the broker that can be cut
    let database = Database::create("verify_cut").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "100ms")]).await;
    let rows = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                SELECT 't', 'k' || n % 100, 't', to_json(repeat(md5(n::text), 125)) FROM generate_series(1, 10000) n";
    database.sql(rows).await;
    wait_delivered(&database).await;
    walpost.stop().await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());

    // WHEN it is cut while the topic is being read
    let settings = [QUIET, ("WALPOST_PULSAR_URL", &*url)];
    let mut child = database.walpost(&["verify", "--json"], &settings).spawn();
    eventually(LONG, "a part of the topic", async || {
        (proxy.to_client_bytes() > 4_000_000).then_some(())
    })
    .await;
    let before = proxy.accepted();
    proxy.cut();
    let code = child.wait_exit(LONG).await;

    // THEN it was read on elsewhere, and every message was counted once
    assert!(proxy.accepted() > before, "the cut came too late");
    let report = serde_json::from_str(&child.output()).expect("JSON");
    assert_good(code, &report);
    assert_eq!(report["messages"], 10_000, "{report:#}");
}

#[tokio::test]
async fn what_cannot_be_verified_is_an_error_that_says_what_to_do() {
    let database = Database::create("verify_errors").await;
    let run = async |args: &[&str], settings: &[(&str, &str)]| {
        let args = [&["verify"], args].concat();
        database.walpost(&args, settings).run(DEADLINE).await
    };
    let expect = |(code, said): (i32, String), wanted: i32, words: &[&str]| {
        assert_eq!(code, wanted, "{said}");
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    };
    expect(
        run(&[], &[]).await,
        69,
        &["walpost.progress", "walpost init"],
    );
    database.init(&[], &[]).await;
    expect(run(&[], &[]).await, 75, &["start walpost run"]);
    declare_delivered(&database).await;
    for wrong in ["gestern", "infinity", "1969-01-01"] {
        expect(
            run(&["--from", wrong], &[]).await,
            64,
            &["--from", wrong, "allowed"],
        );
    }
    expect(run(&["--show", "10001"], &[]).await, 64, &["--show"]);
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type) VALUES ('t', 'k', 't')")
        .await;
    let nowhere = Proxy::start(&servers().pulsar_addr).addr();
    let away = format!("pulsar://{nowhere}");
    expect(
        run(&[], &[("WALPOST_PULSAR_URL", &away)]).await,
        75,
        &[&nowhere],
    );
    database
        .sql("ALTER TABLE walpost.outbox RENAME created_at TO at")
        .await;
    expect(
        run(&["--to", "now"], &[]).await,
        64,
        &["WALPOST_COLUMN_CREATED_AT"],
    );
    database
        .sql("DROP VIEW walpost.outbox_status; ALTER TABLE walpost.outbox DROP txid")
        .await;
    expect(run(&[], &[]).await, 69, &["ADD COLUMN txid"]);
}

#[tokio::test]
async fn a_million_rows_are_verified_in_bounded_memory() {
    // GIVEN a million delivered rows of about 300 bytes
    let database = Database::create("million").await;
    database.init(&[], &[]).await;
    let settings = [("WALPOST_SCAN_INTERVAL", "1s")];
    let walpost = database.start(&settings).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 't' || n % 2, 'key' || n % 1000, 't', json_build_object('number', n, 'fill', repeat('x', 240))
                  FROM generate_series(1, $1::int8) n";
    database
        .rows(insert, &[&i64::try_from(MILLION).expect("small")])
        .await;
    wait_delivered(&database).await;
    walpost.stop().await;

    // WHEN one of them has lost its row, and another was never sent
    let gone = "DELETE FROM walpost.outbox WHERE seq IN (123456)";
    database.sql(gone).await;
    let one = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t1', 'key1', 't', 'null')";
    database.sql(one).await;
    declare_delivered(&database).await;
    let began = Instant::now();
    let mut child = database.walpost(&["verify", "--json"], &[QUIET]).spawn();
    let mut peak_kib = 0;
    let report = eventually(LONG, "the report", async || {
        let said = child.output();
        if said.ends_with('}') {
            return serde_json::from_str::<Value>(&said).ok();
        }
        peak_kib = peak_kib.max(peak_rss_kib(child.pid()).unwrap_or_default());
        None
    })
    .await;
    let took = began.elapsed();
    assert_eq!(child.wait_exit(DEADLINE).await, 1);

    // THEN that is what it says, in bounded memory
    println!("a million rows: {took:.1?}, peak RSS {peak_kib} KiB");
    assert_eq!(report["rows"], MILLION, "{report:#}");
    assert_eq!(report["messages"], MILLION);
    for (kind, count) in [
        ("missing", 1),
        ("unknown_messages", 1),
        ("duplicates", 0),
        ("out_of_order", 0),
        ("different", 0),
    ] {
        assert_eq!(report[kind]["count"], count, "{kind}: {report:#}");
    }
    assert!(
        (1..PEAK_RSS_KIB).contains(&peak_kib),
        "peak RSS is {peak_kib} KiB"
    );
    if !cfg!(debug_assertions) {
        assert!(took < MILLION_WITHIN, "it took {took:?}");
    }
}

/// `None` when the process has ended.
fn peak_rss_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}
