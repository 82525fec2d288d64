//! `/livez` and `/readyz`.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::status::walpost_status;
use super::{DEADLINE, addr_of, get, insert, streaming};
use crate::support::{Command, Database, Load, Servers, consume, eventually, servers, unique};

/// The promise for a broker that stops answering.
const NOT_READY_WITHIN: Duration = Duration::from_secs(15);
/// Longer than that: an idle walpost that were judged by silence would have shown it.
const IDLE: Duration = Duration::from_secs(20);

pub(super) async fn wait_ready(addr: &str, ready: bool, deadline: Duration) -> (Duration, String) {
    let began = Instant::now();
    let expected = if ready { 200 } else { 503 };
    let what = format!("/readyz to answer {expected}");
    let body = eventually(deadline, &what, async || {
        let answer = get(addr, "/readyz").await;
        (answer.status == expected).then_some(answer.body)
    });
    let body = body.await;
    (began.elapsed(), body)
}

#[tokio::test]
async fn a_frozen_broker_under_load_is_not_ready_within_15_seconds_and_ready_again_when_it_wakes() {
    // GIVEN a stream under load
    let own = Servers::own("http", &[]);
    let database = Database::create("frozenhttp").await;
    Load::prepare(&database).await;
    let settings = [("WALPOST_PULSAR_URL", &*own.pulsar_url)];
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;
    let load = Load::start(&database, 2);
    load.more(50).await;
    wait_ready(&addr, true, DEADLINE).await;

    // WHEN the broker is frozen: its connections stay
    own.signal_pulsar("STOP");

    // THEN it is not ready in time, says why, and is alive: a restart would not help
    let (after, why) = wait_ready(&addr, false, DEADLINE).await;
    assert!(after <= NOT_READY_WITHIN, "after {after:?}");
    assert!(
        why.starts_with("not ready: ") && why.contains("the broker does not answer"),
        "{why}"
    );
    assert_eq!(get(&addr, "/livez").await.status, 200);
    let metrics = get(&addr, "/metrics").await.body;
    assert!(metrics.contains("\nwalpost_ready 0\n"), "{metrics}");
    println!("not ready after {after:?}: {why}");

    // AND when it wakes up, it is ready again
    own.signal_pulsar("CONT");
    wait_ready(&addr, true, DEADLINE).await;
    load.stop();
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(get(&addr, "/readyz").await.status, 200);
    walpost.stop().await;
}

#[tokio::test]
async fn an_idle_stream_stays_ready_and_so_does_a_standby_which_says_what_it_is() {
    // GIVEN a stream that has published, and an instance that waits for it
    let (database, active, addr) = streaming("idlehttp", &[]).await;
    insert(&database, "t", "k", "x").await;
    database.wait_all_confirmed(DEADLINE).await;
    let settings = [("WALPOST_RECONNECT_MAX", "500ms")];
    let mut standby = database.walpost(&["run"], &settings).spawn();
    let waiting = addr_of(&mut standby).await;
    standby
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    wait_ready(&waiting, true, DEADLINE).await;

    // WHEN nothing happens for longer than trouble would need to show
    let end = Instant::now() + IDLE;
    while Instant::now() < end {
        // THEN both are ready all the time
        for (addr, says) in [(&addr, "ready: streaming"), (&waiting, "ready: standby")] {
            let answer = get(addr, "/readyz").await;
            assert_eq!(answer.status, 200, "{answer:?}");
            assert!(answer.body.starts_with(says), "{answer:?}");
        }
        // A pause between two looks; what is waited for is the end of the time.
        sleep(Duration::from_millis(200)).await;
    }
    let role =
        |text: &str, role: &str| text.contains(&format!("\nwalpost_role{{role=\"{role}\"}} 1\n"));
    assert!(role(&get(&addr, "/metrics").await.body, "active"));
    assert!(role(&get(&waiting, "/metrics").await.body, "standby"));

    // AND when the first one ends, the standby is the active one
    active.stop().await;
    standby.wait_for_line("streaming", DEADLINE).await;
    eventually(DEADLINE, "the role to change", async || {
        role(&get(&waiting, "/metrics").await.body, "active").then_some(())
    })
    .await;
    standby.stop().await;
}

#[tokio::test]
async fn a_schema_file_that_hangs_holds_up_its_topic_and_the_connector_stays_alive() {
    // GIVEN a schema file that nobody has written yet, and that is waited for: a pipe, as a hanging network folder would be
    let folder = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique("stuck"));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let (file, ready) = (folder.join("schema"), folder.join("ready"));
    let made = std::process::Command::new("mkfifo").arg(&file).status();
    assert!(made.expect("coreutils").success());
    let settings = [
        ("WALPOST_SCHEMA", "json"),
        ("WALPOST_SCHEMA_FILE", file.to_str().expect("UTF-8")),
    ];
    let (database, mut walpost, addr) = streaming("stuck", &settings).await;
    assert_eq!(walpost_status(&addr, &[]).await.0, 0);

    // WHEN it is read for the first event
    insert(&database, "t", "k", "{}").await;
    walpost
        .wait_for_line("there is no end of it", DEADLINE)
        .await;

    // THEN the connector lives, and says what is wrong
    assert_eq!(get(&addr, "/livez").await.status, 200);
    assert_eq!(walpost_status(&addr, &[]).await.0, 0);

    // AND when the file is there, it goes on
    let schema = r#"{"type": "record", "name": "T", "fields": [{"name": "a", "type": "string", "default": ""}]}"#;
    std::fs::write(&ready, schema).expect("a file");
    std::fs::rename(&ready, &file).expect("one folder");
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(get(&addr, "/livez").await.status, 200);
    assert_eq!(walpost_status(&addr, &[]).await.0, 0);
    walpost.stop().await;
    let received = consume(&servers().pulsar_url, &database.topic("t"), 1, DEADLINE).await;
    assert_eq!(received.len(), 1);
}

/// What blocks the connector's thread here is a log that nobody reads: the system call that writes a line waits.
#[tokio::test]
async fn a_connector_whose_thread_is_stuck_is_not_alive_and_is_again_when_it_goes_on() {
    const EVENTS: i64 = 2_000;
    // GIVEN a stream whose output nobody reads any more
    let (database, walpost, addr) = streaming("stuckthread", &[]).await;
    assert_eq!(get(&addr, "/livez").await.status, 200);
    walpost.hold_output(true);

    // WHEN it has more to say than the pipe holds: a line for each event that cannot be published
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 'no/topic', 'k', 't', '1' FROM generate_series(1, $1::int8)";
    database.rows(insert, &[&EVENTS]).await;

    // THEN it is not alive, and says so to whoever asks
    let answer = eventually(DEADLINE, "/livez to answer 503", async || {
        let answer = get(&addr, "/livez").await;
        (answer.status == 503).then_some(answer)
    })
    .await;
    assert!(answer.body.contains("thread has been stuck"), "{answer:?}");
    assert_eq!(super::status_of(&addr).await["alive"], false);

    // AND when the log is read, it goes on, and has lost nothing
    walpost.hold_output(false);
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(get(&addr, "/livez").await.status, 200);
    let sql = "SELECT count(*) FROM walpost.straggler";
    let stored: i64 = database.rows(sql, &[]).await[0].get(0);
    assert_eq!(stored, EVENTS);
    walpost.stop().await;
}

#[tokio::test]
async fn without_postgres_it_is_alive_and_not_ready() {
    let database = Database::create("nopg").await;
    // A port of loopback on which nobody listens: this one's listener is gone again.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = database.url_through(&free.local_addr().expect("bound").to_string());
    drop(free);
    let mut walpost = Command::walpost(["run"])
        .on(&database)
        .env("WALPOST_POSTGRES_URL", url)
        .spawn();
    let addr = addr_of(&mut walpost).await;
    assert_eq!(get(&addr, "/livez").await.status, 200);
    let answer = get(&addr, "/readyz").await;
    assert_eq!(
        (answer.status, &*answer.body),
        (503, "not ready: starting: there was no stream yet\n")
    );
    // What Postgres alone knows is left out, not told as zero.
    let metrics = get(&addr, "/metrics").await.body;
    assert!(!metrics.contains("walpost_replication_lag"), "{metrics}");
    eventually(DEADLINE, "the reason on /status", async || {
        let body = get(&addr, "/status").await.body;
        body.contains("retry_in_ms").then_some(())
    })
    .await;
}
