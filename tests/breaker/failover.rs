//! Scratch: the keeper reaches the promoted standby before the connector does.
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use tokio_postgres::NoTls;

use super::support::{Database, Proxy, Servers, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);

/// A streaming standby made by copying the primary's files; stopped when dropped.
struct Standby {
    data: String,
    bin: String,
    port: u16,
    url: String,
}

/// Runs a program as the owner of `folder`, who owns the servers.
fn as_owner(folder: &str, program: &str, args: &[&str]) -> Output {
    let whose = |format: &str| {
        let said = Command::new("stat")
            .args(["-c", format, folder])
            .output()
            .expect("stat");
        String::from_utf8(said.stdout)
            .expect("UTF-8")
            .trim()
            .to_owned()
    };
    let (user, group) = (whose("--reuid=%u"), whose("--regid=%g"));
    let mut command = if whose("%u") == whose_are_we() {
        Command::new(program)
    } else {
        let mut command = Command::new("setpriv");
        command.args([&user, &group, "--clear-groups", program]);
        command
    };
    command
        .current_dir(folder)
        .args(args)
        .output()
        .expect("it can be started")
}

fn whose_are_we() -> String {
    let said = Command::new("id").arg("-u").output().expect("id");
    String::from_utf8(said.stdout)
        .expect("UTF-8")
        .trim()
        .to_owned()
}

impl Standby {
    async fn build(primary: &Servers, database: &Database) -> Self {
        Self::build_with(primary, database, "").await
    }

    /// The same with more settings, which come last.
    async fn build_with(primary: &Servers, database: &Database, settings: &str) -> Self {
        let data = primary.var("WALPOST_LOCAL_POSTGRES_DATA");
        let copy = format!(
            "{}/standby",
            Path::new(data).parent().expect("a folder").display()
        );
        // Non-exclusive backup, by the book: everything between the two calls belongs to one session.
        let session = database.connect().await;
        session
            .query("SELECT pg_backup_start('standby', true)", &[])
            .await
            .expect("a backup");
        let done = Command::new("cp")
            .args(["-a", data, &copy])
            .output()
            .expect("cp");
        // Files may vanish while they are copied; what matters is replayed from the log.
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(
            done.status.success() || said.contains("No such file"),
            "{said}"
        );
        let row = session
            .query_one("SELECT labelfile FROM pg_backup_stop(false)", &[])
            .await;
        let label: String = row.expect("the backup ends").get(0);
        let write = |name: &str, text: &str| {
            // Made from a file that is there, so that the owner stays.
            let path = format!("{copy}/{name}");
            let done = Command::new("cp")
                .args(["-a", &format!("{copy}/PG_VERSION"), &path])
                .status();
            assert!(done.is_ok_and(|status| status.success()));
            std::fs::write(&path, text).expect("a small file");
        };
        write("backup_label", &label);
        write("standby.signal", "");
        let _ = std::fs::remove_file(format!("{copy}/postmaster.pid"));
        // As pg_basebackup does: slots are not part of a copy.
        for slot in std::fs::read_dir(format!("{copy}/pg_replslot"))
            .expect("a folder")
            .flatten()
        {
            std::fs::remove_dir_all(slot.path()).expect("a slot's folder");
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let socket = primary.var("WALPOST_LOCAL_POSTGRES_SOCKET_DIR");
        let primary_port = primary.var("WALPOST_LOCAL_POSTGRES_PORT");
        let conf =
            std::fs::read_to_string(format!("{copy}/postgresql.conf")).expect("a configuration");
        let more = format!(
            "\nport = {port}\nprimary_conninfo = 'host={socket} port={primary_port} user=postgres'\nhot_standby = on\n{settings}"
        );
        std::fs::write(format!("{copy}/postgresql.conf"), conf + &more).expect("a configuration");
        let bin = primary.var("WALPOST_LOCAL_POSTGRES_BIN").to_owned();
        let log = format!("{copy}.log");
        let args = ["-D", &copy, "-l", &log, "-w", "-t", "60", "start"];
        let started = as_owner(data, &format!("{bin}/pg_ctl"), &args);
        assert!(
            started.status.success(),
            "{started:?}\n{:?}",
            std::fs::read_to_string(&log)
        );
        let url = database.owner_url_through(&format!("127.0.0.1:{port}"));
        Self {
            data: copy,
            bin,
            port,
            url,
        }
    }

    async fn client(&self) -> tokio_postgres::Client {
        let (client, connection) = tokio_postgres::connect(&self.url, NoTls)
            .await
            .expect("the standby answers");
        tokio::spawn(connection);
        client
    }

    async fn promote(&self) {
        let client = self.client().await;
        client
            .query("SELECT pg_promote(true, 60)", &[])
            .await
            .expect("it can be promoted");
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        let args = ["-D", &self.data, "-m", "immediate", "-t", "30", "stop"];
        as_owner(&self.data, &format!("{}/pg_ctl", self.bin), &args);
    }
}

/// F5: rows of the new primary whose transaction ids the old one had used count as delivered.
async fn f5(reconnect: &str, interval: &str) {
    let own = Servers::own("f5", &["--no-pulsar"]);
    let database = Database::create_on(&own, "f5").await;
    database.init(&[], &[]).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1') RETURNING txid::text, id::text";
    let standby = Standby::build(&own, &database).await;
    let second = Proxy::start(&format!("127.0.0.1:{}", standby.port));
    second.refuse(true);
    let both = database.url_through(&format!("{},{}", own.postgres_addr, second.addr()));
    let both = format!("{both}?target_session_attrs=read-write");
    let settings = [
        ("WALPOST_POSTGRES_URL", &*both),
        ("WALPOST_SCAN_INTERVAL", interval),
        ("WALPOST_RECONNECT_INITIAL", reconnect),
        ("WALPOST_RECONNECT_MAX", "60s"),
        ("WALPOST_LOG", "debug"),
    ];
    let mut walpost = database.start(&settings).await;
    database.rows(insert, &[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    let there = standby.client().await;
    eventually(DEADLINE, "sent, on the standby too", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status = 'sent'";
        (there.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 1).then_some(())
    })
    .await;
    // The standby falls behind (asynchronous).
    there
        .batch_execute("ALTER SYSTEM SET primary_conninfo = ''")
        .await
        .unwrap();
    there
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    eventually(DEADLINE, "the standby to be cut off", async || {
        let sql = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'walreceiver'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    for _ in 0..20 {
        database
            .rows("SELECT pg_current_xact_id()::text", &[])
            .await;
    }
    // The old primary goes on: its log gets longer, and one more event is published and confirmed, and not noted yet.
    let holder = database.connect().await;
    holder
        .batch_execute("BEGIN; LOCK TABLE walpost.outbox IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let waiter = database.connect().await;
    let waiting = tokio::spawn(async move {
        waiter
            .batch_execute("BEGIN; LOCK TABLE walpost.outbox IN ACCESS EXCLUSIVE MODE")
            .await
            .unwrap();
        waiter
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let row = holder.query_one(insert, &[]).await.unwrap();
    let (txid, old): (String, String) = (row.get(0), row.get(1));
    holder.batch_execute("COMMIT").await.unwrap();
    let _waiter = waiting.await.unwrap();
    database
        .sql("SELECT pg_logical_emit_message(false, 'filler', repeat('x', 2000000))")
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    let received = consume(&servers().pulsar_url, &database.topic("t"), 2, DEADLINE).await;
    assert_eq!(received.len(), 2);
    let pid = own.var("WALPOST_LOCAL_POSTGRES_PID").to_owned();
    Command::new("sh")
        .args(["-c", "kill -s KILL \"$1\"", "sh", &pid])
        .status()
        .unwrap();
    // The standby becomes the primary, and the same transaction id is used once more.
    standby.promote().await;
    let there = standby.client().await;
    let mut now: u64 = 0;
    let wanted: u64 = txid.parse().unwrap();
    while now + 1 < wanted {
        let sql = "SELECT pg_current_xact_id()::text";
        now = there
            .query_one(sql, &[])
            .await
            .unwrap()
            .get::<_, String>(0)
            .parse()
            .unwrap();
    }
    let row = there.query_one(insert, &[]).await.unwrap();
    let (again, new): (String, String) = (row.get(0), row.get(1));
    assert_eq!(again, txid, "the same transaction id");
    assert_ne!(old, new);
    second.refuse(false);
    walpost
        .wait_for_line("it does not exist any more", DEADLINE)
        .await;
    eventually(DEADLINE, "everything to be known as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (there.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let row = there.query_one(insert, &[]).await.unwrap();
    let last: String = row.get(1);
    eventually(DEADLINE, "the last one", async || {
        let received = consume(&servers().pulsar_url, &database.topic("t"), 0, DEADLINE).await;
        received
            .iter()
            .any(|m| m.property("id") == last)
            .then_some(())
    })
    .await;
    eprintln!("{}", walpost.output());
    let received = consume(&servers().pulsar_url, &database.topic("t"), 0, DEADLINE).await;
    assert!(
        received.iter().any(|m| m.property("id") == new),
        "LOST: the row of txid {txid} on the new primary was never published"
    );
    walpost.stop().await;
}

#[tokio::test]
async fn f5_keeper_first() {
    f5("20s", "200ms").await;
}

#[tokio::test]
async fn f5_defaults() {
    f5("100ms", "10s").await;
}

/// F13: the session that reads rows reaches a standby, and the one that keeps the book the primary.
#[tokio::test]
async fn f13_rows_are_read_from_a_standby() {
    let own = Servers::own("f13", &["--no-pulsar"]);
    let database = Database::create_on(&own, "f13").await;
    let poll = ("WALPOST_MODE", "poll");
    database.init(&[], &[poll]).await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1') RETURNING id::text";
    let standby = Standby::build(&own, &database).await;
    let first = Proxy::start(&own.postgres_addr);
    let both = database.url_through(&format!("{},127.0.0.1:{}", first.addr(), standby.port));
    let there = standby.client().await;
    let sql = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), $1::text::pg_lsn)::int8 >= 0";
    let now = database.current_wal_lsn().await.to_string();
    eventually(DEADLINE, "the standby to follow", async || {
        there
            .query_one(sql, &[&now])
            .await
            .ok()?
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    there
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .unwrap();
    let row = database.client.query_one(insert, &[]).await.unwrap();
    let id: String = row.get(0);
    let settings = [
        ("WALPOST_POSTGRES_URL", &*both),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
        ("WALPOST_LOG", "debug"),
        ("WALPOST_HTTP_ADDR", "none"),
        poll,
    ];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    while first.accepted() < 1 {
        tokio::task::yield_now().await;
    }
    first.refuse(true);
    while first.accepted() < 2 {
        tokio::task::yield_now().await;
    }
    first.refuse(false);
    walpost.wait_for_line("polling", DEADLINE).await;
    eventually(DEADLINE, "sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    there
        .batch_execute("SELECT pg_wal_replay_resume()")
        .await
        .unwrap();
    let received = consume(&servers().pulsar_url, &database.topic("t"), 0, DEADLINE).await;
    assert!(
        received.iter().any(|m| m.property("id") == id),
        "LOST: sent, and in no topic"
    );
    walpost.stop().await;
}
