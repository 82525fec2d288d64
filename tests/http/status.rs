//! `/status`, and `walpost status`, which prints it.

use std::time::Duration;

use serde_json::Value;

use super::{DEADLINE, addr_of, get, insert, status_of, streaming};
use crate::support::{Asked, Command, Database, FakeBroker, Reaction, eventually};

pub(super) async fn walpost_status(addr: &str, args: &[&str]) -> (i32, String) {
    let args = [&["status"], args].concat();
    Command::walpost(args)
        .env("PGUSER", "nobody")
        .env("WALPOST_HTTP_ADDR", addr)
        .run(DEADLINE)
        .await
}

#[tokio::test]
async fn status_says_where_everything_stands_and_the_command_prints_it() {
    let (database, walpost, addr) = streaming("status", &[]).await;
    insert(&database, "t", "k", "x").await;
    database.wait_all_confirmed(DEADLINE).await;
    let status = eventually(DEADLINE, "the slot to be observed", async || {
        let status = status_of(&addr).await;
        (status["lag"]["seconds"] == 0.0 && status["stragglers"].is_object()).then_some(status)
    })
    .await;
    for (pointer, expected) in [
        ("/role", "active".into()),
        ("/phase", "streaming".into()),
        ("/mode", "stream".into()),
        ("/ready", true.into()),
        ("/alive", true.into()),
        ("/slot/name", Value::from(&*database.slot)),
        ("/slot/exists", true.into()),
        ("/slot/active", true.into()),
        ("/slot/wal_status", "reserved".into()),
        ("/slot/lost_because", Value::Null),
        ("/counters/published", 1.into()),
        ("/counters/acknowledged", 1.into()),
        ("/in_flight/messages", 0.into()),
        ("/topics/0/topic", Value::from(database.topic("t"))),
        ("/topics/0/published", 1.into()),
        ("/stragglers/dead", 0.into()),
        ("/scan", Value::Null),
        ("/warnings", Value::Array(Vec::new())),
    ] {
        assert_eq!(
            status.pointer(pointer),
            Some(&expected),
            "{pointer}: {status:#}"
        );
    }
    let history: Value = serde_json::from_str(&get(&addr, "/history").await.body).expect("JSON");
    let columns = [
        "at_ms",
        "published",
        "in_flight",
        "lag_bytes",
        "lag_seconds",
    ];
    let lengths: Vec<_> = columns
        .map(|name| history[name].as_array().map(Vec::len))
        .into();
    assert!(
        lengths[0] > Some(0) && lengths.iter().all(|length| *length == lengths[0]),
        "{lengths:?}"
    );

    let (code, said) = walpost_status(&addr, &[]).await;
    assert_eq!(code, 0, "{said}");
    for part in [
        "active (streaming)",
        "ready: streaming",
        &database.slot,
        "wal_status reserved",
        "published 1 events",
        &database.topic("t"),
        "0 dead",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let (code, said) = walpost_status(&addr, &["--json"]).await;
    assert_eq!(code, 0, "{said}");
    let printed: Value = serde_json::from_str(&said).expect("one JSON object");
    assert_eq!(printed["slot"]["name"], Value::from(&*database.slot));
    walpost.stop().await;
}

#[tokio::test]
async fn watch_prints_again_until_ctrl_c_also_while_walpost_is_away() {
    let (_database, walpost, addr) = streaming("watch", &[]).await;
    let mut watching = Command::walpost(["status", "--watch"])
        .env("PGUSER", "nobody")
        .env("WALPOST_HTTP_ADDR", &addr)
        .spawn();
    eventually(DEADLINE, "a second look", async || {
        (watching.output().matches("ready: streaming").count() >= 2).then_some(())
    })
    .await;
    // WHEN it stops, the watcher says so and goes on
    walpost.stop().await;
    watching
        .wait_for_line("cannot reach walpost", DEADLINE)
        .await;
    watching.signal("INT");
    assert_eq!(watching.wait_exit(DEADLINE).await, 0);
}

#[tokio::test]
async fn where_nothing_listens_or_something_else_does_the_command_says_so() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port");
    let addr = listener.local_addr().expect("bound").to_string();
    // What is no walpost
    let other = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = listener.accept().await.expect("a client");
        let _request = stream.read(&mut [0; 1024]).await;
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        stream.write_all(answer).await.expect("it reads");
    });
    let (code, said) = walpost_status(&addr, &[]).await;
    assert!(
        code == 75 && said.contains("is no walpost"),
        "{code}: {said}"
    );
    other.await.expect("no panic");
    // Nothing
    let (code, said) = walpost_status(&addr, &[]).await;
    assert_eq!(code, 75, "{said}");
    assert!(
        said.contains(&addr) && said.contains("WALPOST_HTTP_ADDR"),
        "{said}"
    );
    // Not even meant
    let (code, said) = walpost_status("none", &[]).await;
    assert!(
        code == 64 && said.contains("WALPOST_HTTP_ADDR=none"),
        "{code}: {said}"
    );
}

#[tokio::test]
async fn a_port_in_use_ends_run_with_75_before_anything_is_touched_and_none_opens_no_port() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("bound").to_string();
    let (code, said) = Command::walpost(["run"])
        .env("PGUSER", "nobody")
        .env("WALPOST_HTTP_ADDR", &addr)
        .run(DEADLINE)
        .await;
    assert_eq!(code, 75, "{said}");
    assert!(
        said.contains(&format!(
            "WALPOST_HTTP_ADDR={addr}: another program listens there"
        )) && said.contains("WALPOST_HTTP_ADDR=none"),
        "{said}"
    );
    // An address that is not this machine's is a wrong setting (192.0.2.0/24 is nobody's).
    let (code, said) = Command::walpost(["run"])
        .env("PGUSER", "nobody")
        .env("WALPOST_HTTP_ADDR", "192.0.2.1:9464")
        .run(DEADLINE)
        .await;
    assert_eq!(code, 64, "{said}");

    for nothing in ["none", ""] {
        let database = Database::create("noport").await;
        database.init(&[], &[]).await;
        let settings = [("WALPOST_HTTP_ADDR", nothing)];
        let walpost = database.start(&settings).await;
        assert!(
            !walpost.output().contains("http://"),
            "{}",
            walpost.output()
        );
        walpost.stop().await;
    }
}

#[tokio::test]
async fn a_scan_shows_its_table_and_rows_while_it_runs() {
    // GIVEN rows from before the slot, and a broker whose receipts are held
    let database = Database::create("scanhttp").await;
    database.init(&["--payload", "text"], &[]).await;
    database.sql("DELETE FROM walpost.progress").await;
    database
        .rows(
            "SELECT pg_drop_replication_slot($1::text::name)",
            &[&database.slot],
        )
        .await;
    for number in 0..10 {
        insert(&database, "t", "k", &number.to_string()).await;
    }
    database.init(&[], &[]).await;
    let broker = FakeBroker::start().await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    let settings = [("WALPOST_PULSAR_URL", &*broker.url())];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    let addr = addr_of(&mut walpost).await;

    // THEN the scan is on /status
    let status = eventually(DEADLINE, "the scan to wait for receipts", async || {
        let status = status_of(&addr).await;
        (status["in_flight"]["messages"] == 10).then_some(status)
    })
    .await;
    assert_eq!(status["phase"], "scanning", "{status:#}");
    assert_eq!(status["scan"]["table"], "walpost.outbox", "{status:#}");
    assert_eq!(status["scan"]["published"], 0, "{status:#}");

    // AND gone once it is over
    broker.heal();
    broker.release(|_| {});
    eventually(Duration::from_secs(60), "the stream", async || {
        let status = status_of(&addr).await;
        (status["scan"].is_null()
            && status["phase"] == "streaming"
            && status["counters"]["published"] == 10)
            .then_some(())
    })
    .await;
    walpost.stop().await;
}
