//! What releases an LSN is on the server's disk before, and waits for no standby.

use std::fs;
use std::time::Duration;

use tokio::time::timeout;

use super::DEADLINE;
use super::support::{Database, OwnServers, Servers, eventually, on_each_major};

/// An event that no topic takes, so that it becomes a straggler.
fn unpublishable(key: &str) -> String {
    format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('no/topic', '{key}', 'e', '1')"
    )
}

async fn is_stored(database: &Database, key: &str) -> Option<()> {
    let sql = "SELECT FROM walpost.straggler WHERE key = $1";
    let found = database.connect().await.query(sql, &[&key]).await;
    (!found.expect("the table").is_empty()).then_some(())
}

/// A process's parent and name.
fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

/// Ends the server and all its processes at once, as a loss of power does (only that the disk's cache stays).
async fn end_all_processes(database: &Database) {
    let pid: i32 = database.rows("SELECT pg_backend_pid()", &[]).await[0].get(0);
    let postmaster = parent(pid.unsigned_abs()).expect("a backend has a parent");
    let mut pids = vec![postmaster];
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let pid = entry.file_name().to_string_lossy().parse::<u32>();
        if let Ok(pid) = pid
            && parent(pid) == Some(postmaster)
        {
            pids.push(pid);
        }
    }
    assert!(pids.len() > 5, "{pids:?}");
    // First none may go on: one that sees another's end would write what it still has.
    send_signal("STOP", &pids);
    send_signal("KILL", &pids);
    eventually(DEADLINE, "the processes to be gone", async || {
        let gone = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        pids.iter().all(gone).then_some(())
    })
    .await;
}

/// From now on the log is written to disk by sessions that commit, and by nobody else.
async fn stop_wal_writer(database: &Database) {
    let sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'";
    let pid: i32 = database.rows(sql, &[]).await[0].get(0);
    send_signal("STOP", &[pid.unsigned_abs()]);
}

fn send_signal(signal: &str, pids: &[u32]) {
    let sent = std::process::Command::new("sh")
        .args([
            "-c",
            "signal=$1; shift; kill -s $signal \"$@\"",
            "sh",
            signal,
        ])
        .args(pids.iter().map(u32::to_string))
        .status();
    assert!(sent.expect("a shell").success(), "SIG{signal}");
}

async fn own(major: i32, name: &str) -> (OwnServers, Database) {
    let major = major.to_string();
    let args = ["--postgres", &major, "--no-pulsar"];
    let servers = Servers::own(&format!("{name}-{major}"), &args);
    let database = Database::create_on(&servers, "durable").await;
    database.init(&[], &[]).await;
    (servers, database)
}

/// GIVEN a database whose commits are not flushed by default WHEN an event has become a straggler, the LSN is past it, and all of the server's
/// processes end at once THEN the event is there.
async fn an_event_is_on_disk(major: i32) {
    let (servers, mut database) = own(major, "sessions-crash").await;
    database
        .sql(&format!(
            "ALTER DATABASE {} SET synchronous_commit = off",
            database.name
        ))
        .await;
    let mut walpost = database.start(&[]).await;

    // The slot's own file is written when the LSN passes a record of running transactions that the walsender has read, as a checkpoint
    // makes one. So the event and that record are there before walpost reads on.
    let application = database.connect().await;
    application
        .batch_execute("SET synchronous_commit = on")
        .await
        .expect("a setting");
    walpost.signal("STOP");
    for statement in [&unpublishable("first"), "CHECKPOINT"] {
        application
            .batch_execute(statement)
            .await
            .expect("a statement");
    }
    let passed =
        "SELECT sent_lsn >= pg_current_wal_flush_lsn(), confirmed_flush_lsn >= $1::text::pg_lsn
                  FROM pg_replication_slots JOIN pg_stat_replication ON pid = active_pid";
    let upto = "SELECT pg_current_wal_flush_lsn()::text";
    let row = application.query_one(upto, &[]).await;
    let upto: String = row.expect("a position").get(0);
    let reached = async |column: usize| {
        eventually(
            DEADLINE,
            "the walsender, or the LSN, to pass it",
            async || {
                let rows = application.query(passed, &[&upto]).await.ok()?;
                rows.first()?.get::<_, bool>(column).then_some(())
            },
        )
        .await;
    };
    reached(0).await;
    stop_wal_writer(&database).await;
    walpost.signal("CONT");
    reached(1).await;
    end_all_processes(&database).await;
    walpost.sigkill();
    servers.start();

    database.client = database.connect().await;
    let walpost = database.start(&[]).await;
    database.sql(&unpublishable("second")).await;
    eventually(DEADLINE, "a later one", async || {
        is_stored(&database, "second").await
    })
    .await;
    assert!(
        is_stored(&database, "first").await.is_some(),
        "the event is lost"
    );
    walpost.stop().await;
}

/// GIVEN `synchronous_standby_names = '*'`, so that walpost's own walsender is a standby that commits wait for
/// WHEN an event becomes a straggler THEN the application's commits return: storing it waits for nobody.
async fn a_straggler_waits_for_nobody(major: i32) {
    let (_servers, database) = own(major, "sessions-standby").await;
    let walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "200ms")]).await;
    database
        .sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        .await;
    database.sql("SELECT pg_reload_conf()").await;
    eventually(DEADLINE, "the setting", async || {
        let sql = "SELECT FROM pg_stat_replication WHERE sync_state = 'sync'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    let application = database.connect().await;
    for key in ["first", "second"] {
        let committed = timeout(DEADLINE, application.batch_execute(&unpublishable(key))).await;
        committed
            .unwrap_or_else(|_| panic!("the commit of the {key} waits: {}", walpost.output()))
            .expect("a row");
        eventually(DEADLINE, "the straggler", async || {
            is_stored(&database, key).await
        })
        .await;
    }
    // AND what walpost notes of its progress waits for nobody either.
    let noted = "SELECT FROM walpost.progress p JOIN walpost.outbox o ON pg_visible_in_snapshot(o.txid, p.delivered) WHERE o.aggregateid = 'second'";
    eventually(DEADLINE, "the delivered snapshot", async || {
        (!database.rows(noted, &[]).await.is_empty()).then_some(())
    })
    .await;
    timeout(Duration::from_secs(60), walpost.stop())
        .await
        .expect("it stops");
    let reset = "ALTER SYSTEM RESET synchronous_standby_names";
    database.sql(reset).await;
    database.sql("SELECT pg_reload_conf()").await;
}

on_each_major! {
    an_event_is_on_disk_before_the_lsn_passes_it: an_event_is_on_disk();
    a_straggler_is_stored_without_waiting_for_walposts_own_confirmation: a_straggler_waits_for_nobody();
}
