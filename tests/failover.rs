//! Guarantee: when the primary dies and a standby without the slot is promoted, walpost follows, makes the slot anew, and every
//! row that the new primary has reaches its topic; what was known as delivered is not sent again.

mod support;
#[path = "failover/synced.rs"]
mod synced;
#[path = "failover/two_servers.rs"]
mod two_servers;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::{
    Asked, Database, FakeBroker, Load, OwnServers, Reaction, Received, Servers, Walpost, as_owner,
    consume, eventually, insert_many, on_each_major, servers,
};
use tokio_postgres::NoTls;

const DEADLINE: Duration = Duration::from_secs(90);

/// Servers of one test.
fn own(major: i32, name: &str) -> OwnServers {
    let major = major.to_string();
    let args = ["--postgres", &major, "--no-pulsar"];
    Servers::own(&format!("{name}-{major}"), &args)
}

/// A streaming standby made by copying the primary's files; stopped when dropped.
struct Standby {
    data: String,
    bin: String,
    port: u16,
    url: String,
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
        let major: i32 = primary
            .var("WALPOST_LOCAL_POSTGRES_MAJOR")
            .parse()
            .expect("a number");
        let (start, stop) = if major >= 15 {
            ("pg_backup_start('standby', true)", "pg_backup_stop(false)")
        } else {
            (
                "pg_start_backup('standby', true, false)",
                "pg_stop_backup(false, false)",
            )
        };
        session
            .query(&format!("SELECT {start}"), &[])
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
            .query_one(&format!("SELECT labelfile FROM {stop}"), &[])
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

/// The outbox of a server: the ids of each key in order.
async fn committed(client: &tokio_postgres::Client) -> HashMap<String, Vec<String>> {
    let sql = "SELECT aggregateid, id::text FROM walpost.outbox ORDER BY seq";
    let mut keys: HashMap<String, Vec<String>> = HashMap::new();
    for row in client.query(sql, &[]).await.expect("an outbox") {
        keys.entry(row.get(0)).or_default().push(row.get(1));
    }
    keys
}

/// First arrivals, by key and in order, and how often each id came.
fn arrivals(received: &[Received]) -> (HashMap<String, Vec<String>>, HashMap<String, usize>) {
    let (mut first, mut times) = (
        HashMap::<String, Vec<String>>::new(),
        HashMap::<String, usize>::new(),
    );
    for message in received {
        let id = message.property("id").to_owned();
        let times = times.entry(id.clone()).or_default();
        *times += 1;
        if *times == 1 {
            let key = message.key.clone().expect("a key");
            first.entry(key).or_default().push(id);
        }
    }
    (first, times)
}

#[tokio::test]
async fn a_promoted_standby_without_the_slot_is_followed_and_every_row_it_has_arrives() {
    // GIVEN a stream that knows of two servers, a standby, rows that are known as delivered, and writers at work
    let own = Servers::own("failover", &["--no-pulsar"]);
    let database = Database::create_on(&own, "failover").await;
    Load::prepare(&database).await;
    insert_many(&database.client, "early", 500).await;
    let standby = Standby::build(&own, &database).await;
    let both = database.url_through(&format!("{},127.0.0.1:{}", own.postgres_addr, standby.port));
    let both = format!("{both}?target_session_attrs=read-write");
    let settings = [
        ("WALPOST_POSTGRES_URL", &*both),
        ("WALPOST_SCAN_INTERVAL", "100ms"),
    ];
    let mut walpost = database.start(&settings).await;
    database.wait_all_confirmed(DEADLINE).await;
    eventually(DEADLINE, "the early rows to be known as sent, on the standby too", async || {
        let client = standby.client().await;
        let sql = "SELECT count(*) FILTER (WHERE status = 'sent') FROM walpost.outbox_status WHERE aggregateid = 'early'";
        (client.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 500).then_some(())
    })
    .await;
    let load = Load::start(&database, 8);
    load.more(300).await;

    // WHEN the primary is killed in the middle of it, and the standby promoted
    let pid = own.var("WALPOST_LOCAL_POSTGRES_PID").to_owned();
    let killed = Command::new("sh")
        .args(["-c", "kill -s KILL \"$1\"", "sh", &pid])
        .status();
    assert!(
        killed.is_ok_and(|status| status.success()),
        "the primary cannot be killed"
    );
    standby.promote().await;
    walpost
        .wait_for_line("it does not exist any more", DEADLINE)
        .await;
    load.stop_after_outage();

    // THEN the slot is made anew there, new rows arrive, and so does every row that the new primary has
    let client = standby.client().await;
    insert_many(&client, "late", 100).await;
    eventually(DEADLINE, "everything to be known as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (client.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    walpost.stop().await;
    let committed = committed(&client).await;
    let rows: usize = committed.values().map(Vec::len).sum();
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, rows, DEADLINE).await;
    let (first, times) = arrivals(&received);
    let known: HashSet<&String> = committed.values().flatten().collect();
    for (key, ids) in &committed {
        let arrived = first.get(key).cloned().unwrap_or_default();
        // The old primary may have published rows that never reached the standby.
        let arrived: Vec<_> = arrived
            .into_iter()
            .filter(|id| known.contains(id))
            .collect();
        assert_eq!(&arrived, ids, "{key}");
    }
    // AND what was known as delivered is not sent again
    for id in &committed["early"] {
        assert_eq!(times[id], 1, "{id} was sent again");
    }
}

/// Cuts a standby off its primary: from now on it stays where it is.
async fn cut_off(standby: &Standby) {
    let client = standby.client().await;
    for sql in [
        "ALTER SYSTEM SET primary_conninfo = ''",
        "SELECT pg_reload_conf()",
    ] {
        client.batch_execute(sql).await.expect("a superuser");
    }
    eventually(DEADLINE, "the standby to receive nothing", async || {
        let sql = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver)";
        let row = client.query_one(sql, &[]).await.ok()?;
        row.get::<_, bool>(0).then_some(())
    })
    .await;
}

/// Waits until a row that was committed before the call has been looked at by whoever notes what is delivered, several times.
async fn looked_at(client: &tokio_postgres::Client) {
    let now = "SELECT clock_timestamp()::text";
    let since: String = client.query_one(now, &[]).await.expect("a time").get(0);
    // Each look asks the catalogue first, and again while it waits.
    let sql = "SELECT query_start::text FROM pg_stat_activity
               WHERE datname = current_database() AND application_name = 'walpost scanner' AND query_start > $1::text::timestamptz";
    let mut seen = HashSet::new();
    eventually(DEADLINE, "looks at what is delivered", async || {
        let row = client.query_opt(sql, &[&since]).await.ok()??;
        seen.insert(row.get::<_, String>(0));
        (seen.len() > 5).then_some(())
    })
    .await;
}

/// A stream that is far beyond a standby, whose primary is then killed; the standby is promoted.
struct Behind {
    walpost: Walpost,
    broker: FakeBroker,
    standby: Standby,
    /// On the old primary.
    confirmed: String,
    /// Dropped behind what uses them.
    _servers: (Database, OwnServers),
}

const INSERT: &str = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')";

const OFF: (&str, &str) = ("WALPOST_RECONCILE", "off");

impl Behind {
    async fn promoted(major: i32, name: &str, settings: &[(&str, &str)]) -> Self {
        let own = own(major, name);
        let database = Database::create_on(&own, "behind").await;
        database.init(&[], &[]).await;
        let standby = Standby::build(&own, &database).await;
        let addrs = format!("{},127.0.0.1:{}", own.postgres_addr, standby.port);
        let both = database.url_through(&addrs) + "?target_session_attrs=read-write";
        let broker = FakeBroker::start().await;
        let url = broker.url();
        let always = [
            ("WALPOST_POSTGRES_URL", &*both),
            ("WALPOST_PULSAR_URL", &*url),
            ("WALPOST_SCAN_INTERVAL", "100ms"),
        ];
        let walpost = database.start(&[&always[..], settings].concat()).await;
        database.sql(INSERT).await;
        eventually(DEADLINE, "a note, on the standby too", async || {
            let client = standby.client().await;
            let sql = "SELECT count(*) FILTER (WHERE status = 'sent') FROM walpost.outbox_status";
            (client.query_one(sql, &[]).await.ok()?.get::<_, i64>(0) == 1).then_some(())
        })
        .await;
        cut_off(&standby).await;
        for _ in 0..4 {
            database.sql(INSERT).await;
            database.sql("SELECT pg_switch_wal()").await;
        }
        database.sql(INSERT).await;
        database.wait_all_confirmed(DEADLINE).await;
        let confirmed = database.current_wal_lsn().await.to_string();
        let pid = own.var("WALPOST_LOCAL_POSTGRES_PID").to_owned();
        let killed = Command::new("sh")
            .args(["-c", "kill -s KILL \"$1\"", "sh", &pid])
            .status();
        assert!(killed.is_ok_and(|status| status.success()));
        standby.promote().await;
        Self {
            walpost,
            broker,
            standby,
            confirmed,
            _servers: (database, own),
        }
    }

    /// Commits a row on the new primary; its position is one that the stream confirmed on the old one.
    async fn insert(&self, client: &tokio_postgres::Client) {
        client.batch_execute(INSERT).await.expect("a row");
        let sql = "SELECT pg_current_wal_insert_lsn() < $1::text::pg_lsn";
        let row = client.query_one(sql, &[&self.confirmed]).await;
        assert!(
            row.expect("a position").get::<_, bool>(0),
            "it is not behind"
        );
    }

    /// Waits until every row is known as sent, and has arrived.
    async fn all_arrive(self, client: &tokio_postgres::Client) {
        let Self {
            broker, walpost, ..
        } = self;
        eventually(DEADLINE, "every row to be known as sent", async || {
            (pending(client).await == 0).then_some(())
        })
        .await;
        walpost.stop().await;
        let stored: HashSet<String> = broker.stored().into_iter().map(|event| event.id).collect();
        let ids = client
            .query("SELECT id::text FROM walpost.outbox", &[])
            .await;
        for row in ids.expect("an outbox") {
            assert!(stored.contains(row.get::<_, &str>(0)), "a row was lost");
        }
    }
}

async fn pending(client: &tokio_postgres::Client) -> i64 {
    let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status = 'pending'";
    client.query_one(sql, &[]).await.expect("a status").get(0)
}

async fn a_position_of_the_old_primary(major: i32) {
    // GIVEN a stream that has followed to a standby, whose log ends before what was confirmed, and nothing that would find what it leaves
    // out
    let behind = Behind::promoted(major, "behind", &[OFF]).await;
    let client = behind.standby.client().await;
    eventually(DEADLINE, "the stream of the new primary", async || {
        let said = behind.walpost.output();
        (said.matches("opening: streaming").count() > 1).then_some(())
    })
    .await;

    // WHEN a row gets no receipt there
    behind.broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    behind.insert(&client).await;

    // THEN it does not count as delivered, and with its receipt it does
    looked_at(&client).await;
    assert_eq!(pending(&client).await, 1);
    behind.broker.heal();
    behind.broker.release(|_| {});
    behind.all_arrive(&client).await;
}

async fn a_row_before_the_stream_of_the_new_primary(major: i32) {
    // GIVEN a stream that takes its time to follow, and nothing that would find what it leaves out
    let pause = ("WALPOST_RECONNECT_INITIAL", "20s");
    let longest = ("WALPOST_RECONNECT_MAX", "20s");
    let settings = [pause, longest, OFF];
    let behind = Behind::promoted(major, "meanwhile", &settings).await;

    // WHEN a row is committed there meanwhile, and who notes what is delivered comes before the stream
    let client = behind.standby.client().await;
    behind.insert(&client).await;
    eventually(DEADLINE, "a note, or a word", async || {
        let is_told = behind
            .walpost
            .output()
            .contains("is not the one that was streamed");
        (is_told || pending(&client).await == 0).then_some(())
    })
    .await;

    // THEN it is not delivered, and arrives
    assert_eq!(pending(&client).await, 1);
    behind.all_arrive(&client).await;
}

// (Not on 15: it takes half a minute.)
#[tokio::test]
async fn nothing_counts_as_delivered_on_the_new_primary_before_it_is_streamed_on_14() {
    a_row_before_the_stream_of_the_new_primary(14).await;
}

#[tokio::test]
async fn nothing_counts_as_delivered_on_the_new_primary_before_it_is_streamed_on_18() {
    a_row_before_the_stream_of_the_new_primary(18).await;
}

on_each_major! {
    a_position_that_the_old_primary_confirmed_proves_nothing_on_the_new_one: a_position_of_the_old_primary();
}
