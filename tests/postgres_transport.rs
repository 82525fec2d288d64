//! Guarantee: the replication stream brings what was committed and only that, tells the server what was confirmed,
//! keeps the connection alive, and reports a lost walsender as something to retry.
//!
//! Over TCP and over the Unix socket. Each test makes a database of its own and drops it.

mod support;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use walpost::postgres::slot::{create_slot, slot_state, wal_level};
use walpost::postgres::{
    Frame, PostgresConfig, ReplicationConnection, ReplicationStream, StandbyStatus, StreamOptions,
    Subscription, TableName, connect_application, connect_sql, preflight, quote_ident, sqlstate,
};
use walpost::{Lsn, Result};

const DEADLINE: Duration = Duration::from_secs(20);
const TCP: &str = "WALPOST_POSTGRES_URL";
const SOCKET: &str = "WALPOST_LOCAL_POSTGRES_SOCKET_URL";

/// A database with an outbox table, a publication and a slot, all of one name.
struct Fixture {
    config: PostgresConfig,
    admin: Client,
    client: Client,
    name: String,
}

fn env(name: &str) -> String {
    support::servers().var(name).to_owned()
}

fn config_for(url: &str, database: &str) -> PostgresConfig {
    let (head, tail) = url.split_once('?').unwrap_or((url, ""));
    let authority = head
        .strip_prefix("postgres://")
        .expect("a URL that begins with postgres://");
    let authority = authority.split('/').next().expect("a first part");
    let url = format!("postgres://{authority}/{database}?{tail}");
    PostgresConfig::parse(Some(&url), &|name| std::env::var(name).ok()).expect("a valid URL")
}

impl Fixture {
    async fn new(variable: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let url = env(variable);
        let name = format!(
            "transport_{}_{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let own = PostgresConfig::parse(Some(&url), &|name| std::env::var(name).ok())
            .expect("a valid URL");
        let admin = connect_sql(&own, "walpost-test").await.expect("connect");
        admin
            .batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .expect("create a database");
        let config = config_for(&url, &name);
        // The statements of this test are an application's.
        let client = connect_application(&config, "walpost-test")
            .await
            .expect("connect");
        client
            .batch_execute(&format!(
                "CREATE TABLE outbox (id int, payload text); CREATE TABLE other (id int);
                 CREATE PUBLICATION {name} FOR TABLE outbox WITH (publish = 'insert')"
            ))
            .await
            .expect("create table and publication");
        create_slot(&client, &name).await.expect("create the slot");
        Self {
            config,
            admin,
            client,
            name,
        }
    }

    async fn stream(&self) -> Result<ReplicationStream> {
        let connection = ReplicationConnection::connect(&self.config, "walpost-test").await?;
        let options = StreamOptions::default();
        connection
            .start_replication(&self.name, Lsn::ZERO, &self.name, options)
            .await
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.expect(sql);
    }

    async fn confirmed_flush(&self) -> Lsn {
        let state = slot_state(&self.client, &self.name)
            .await
            .expect("read the slot");
        state
            .expect("the slot")
            .confirmed_flush
            .expect("a position")
    }

    async fn drop(self) {
        let Self {
            admin,
            client,
            name,
            ..
        } = self;
        drop(client);
        // The backends of this database need a moment to leave.
        let deadline = Instant::now() + DEADLINE;
        loop {
            let dropped = async {
                let slot = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1";
                admin.execute(slot, &[&name]).await?;
                let database = format!("DROP DATABASE {name} WITH (FORCE)");
                admin.batch_execute(&database).await
            };
            match dropped.await {
                Ok(()) => return,
                Err(error) => assert!(Instant::now() < deadline, "cannot clean up: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The next frame, as an owned pair: the pgoutput message, or nothing for a keepalive.
async fn next(stream: &mut ReplicationStream) -> Result<(Option<Vec<u8>>, Lsn, bool)> {
    let read = async {
        loop {
            match stream.next_frame()? {
                Some(Frame::XLogData {
                    payload, wal_end, ..
                }) => return Ok((Some(payload.to_vec()), wal_end, false)),
                Some(Frame::Keepalive {
                    wal_end,
                    reply_requested,
                    ..
                }) => return Ok((None, wal_end, reply_requested)),
                None => {}
            }
            stream.fill().await?;
        }
    };
    tokio::time::timeout(DEADLINE, read)
        .await
        .expect("a frame in time")
}

/// Reads one transaction; gives the tags of its messages and its end.
async fn transaction(stream: &mut ReplicationStream) -> (String, Lsn) {
    let mut tags = String::new();
    loop {
        let (Some(message), _, _) = next(stream).await.expect("stream") else {
            continue;
        };
        tags.push(char::from(message[0]));
        if message[0] == b'C' {
            // Commit: flags u8, commit LSN u64, end LSN u64, time i64.
            let end = u64::from_be_bytes(message[10..18].try_into().expect("eight bytes"));
            return (tags, Lsn::new(end));
        }
    }
}

fn confirm(flush: Lsn) -> StandbyStatus {
    StandbyStatus {
        write: flush,
        flush,
        apply: flush,
        reply_requested: false,
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn committed_rows_arrive_and_are_confirmed(variable: &str) {
    let fixture = Fixture::new(variable).await;
    let mut stream = fixture.stream().await.expect("stream");
    fixture
        .sql("INSERT INTO outbox SELECT i, 'x' FROM generate_series(1, 3) i")
        .await;
    fixture
        .sql("BEGIN; INSERT INTO outbox VALUES (4, 'rolled back'); ROLLBACK")
        .await;
    fixture
        .sql("SELECT pg_logical_emit_message(true, 'walpost', 'hello')")
        .await;

    let (tags, end) = transaction(&mut stream).await;
    assert_eq!(tags, "BRIIIC");
    let (tags, last) = transaction(&mut stream).await;
    assert_eq!(tags, "BMC");
    assert!(last > end);

    // Received is not confirmed: only a status with a flush position moves the slot.
    assert!(fixture.confirmed_flush().await < end);
    stream.send_status(confirm(end)).await.expect("send");
    eventually("the slot is confirmed", async || {
        fixture.confirmed_flush().await == end
    })
    .await;

    // GIVEN a second reader, WHEN the first holds the slot, THEN it is told to wait.
    let error = fixture.stream().await.expect_err("the slot is in use");
    assert_eq!(sqlstate(&error), Some("55006"));
    assert!(error.is_temporary());

    // The last status goes out with close, and the slot is free when it returns.
    stream.queue_status(confirm(last));
    stream.close().await.expect("close");
    assert_eq!(fixture.confirmed_flush().await, last);
    let state = slot_state(&fixture.client, &fixture.name)
        .await
        .expect("read")
        .expect("a slot");
    assert!(
        !state.active
            && state.plugin.as_deref() == Some("pgoutput")
            && state.lost_because().is_none()
    );

    // A new stream begins after what was confirmed.
    let mut stream = fixture.stream().await.expect("stream again");
    fixture.sql("INSERT INTO outbox VALUES (5, 'new')").await;
    assert_eq!(transaction(&mut stream).await.0, "BRIC");
    stream.close().await.expect("close");
    fixture.drop().await;
}

#[tokio::test]
async fn committed_rows_arrive_and_are_confirmed_over_tcp() {
    committed_rows_arrive_and_are_confirmed(TCP).await;
}

#[tokio::test]
async fn committed_rows_arrive_and_are_confirmed_over_the_socket() {
    committed_rows_arrive_and_are_confirmed(SOCKET).await;
}

#[tokio::test]
async fn a_message_larger_than_the_buffer_arrives_whole() {
    let fixture = Fixture::new(SOCKET).await;
    let mut stream = fixture.stream().await.expect("stream");
    fixture
        .sql("INSERT INTO outbox VALUES (1, repeat('walpost!', 1000000)), (2, 'small')")
        .await;
    let mut sizes = Vec::new();
    while sizes.len() < 5 {
        if let (Some(message), ..) = next(&mut stream).await.expect("stream") {
            sizes.push(message.len());
            if message.len() > 8_000_000 {
                assert!(message.ends_with(b"walpost!walpost!"));
            }
        }
    }
    assert!(sizes[2] > 8_000_000 && sizes[3] < 100, "{sizes:?}");
    stream.close().await.expect("close");
    fixture.drop().await;
}

#[tokio::test]
async fn status_updates_keep_an_idle_walsender_alive_and_silence_ends_it() {
    let fixture = Fixture::new(TCP).await;
    let timeout = format!(
        "ALTER ROLE CURRENT_USER IN DATABASE {} SET wal_sender_timeout = '1s'",
        fixture.name
    );
    fixture.sql(&timeout).await;

    // Asked for a reply, the stream gives one at once, several times over: longer than the timeout.
    let mut stream = fixture.stream().await.expect("stream");
    let (began, mut asked) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(3) {
        let (_, _, reply_requested) = next(&mut stream).await.expect("alive");
        if reply_requested {
            asked += 1;
            stream.queue_status(confirm(Lsn::ZERO));
        }
    }
    assert!(asked >= 3, "asked {asked} times");

    // With intake paused nothing is read, and flush alone keeps the connection.
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream.send_status(confirm(Lsn::ZERO)).await.expect("alive");
    }
    fixture.sql("INSERT INTO outbox VALUES (1, 'x')").await;
    assert_eq!(transaction(&mut stream).await.0, "BRIC");

    // Silence: the server gives up on us, and that is temporary.
    let error = loop {
        if let Err(error) = next(&mut stream).await {
            break error;
        }
    };
    assert!(error.is_temporary(), "{}", error.report());
    fixture.drop().await;
}

#[tokio::test]
async fn a_terminated_walsender_is_a_temporary_error() {
    let fixture = Fixture::new(TCP).await;
    let mut stream = fixture.stream().await.expect("stream");
    let terminated = fixture
        .client
        .execute(
            "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1",
            &[&fixture.name],
        )
        .await
        .expect("terminate");
    assert_eq!(terminated, 1);
    let error = loop {
        if let Err(error) = next(&mut stream).await {
            break error;
        }
    };
    assert!(error.is_temporary());
    assert_eq!(sqlstate(&error), Some("57P01"), "{}", error.report());
    fixture.drop().await;
}

#[tokio::test]
async fn what_is_missing_is_named_with_what_mends_it() {
    let fixture = Fixture::new(TCP).await;
    let (client, name) = (&fixture.client, fixture.name.as_str());
    assert_eq!(wal_level(client).await.expect("read"), "logical");
    let subscription = |publication: &str, table: &str| Subscription {
        publication: publication.to_owned(),
        tables: vec![TableName::new("public", table)],
        columns: Vec::new(),
    };
    let relations = preflight(client, name, &subscription(name, "outbox"))
        .await
        .expect("all is there");
    assert_eq!(relations.members.len(), 1);

    let fails = async |slot: &str, publication: &str, table: &str, said: &str| {
        let error = preflight(client, slot, &subscription(publication, table))
            .await
            .expect_err(said);
        assert_eq!(error.exit_code(), 69);
        assert!(error.report().contains(said), "{}", error.report());
    };
    fails("nosuch", name, "outbox", "walpost init").await;
    fails(name, "nosuch", "outbox", "walpost init").await;
    fails(name, name, "nosuch", "public.nosuch does not exist").await;
    fails(
        name,
        name,
        "other",
        &format!(
            "ALTER PUBLICATION {} ADD TABLE public.other;",
            quote_ident(name)
        ),
    )
    .await;
    fixture
        .sql("CREATE UNLOGGED TABLE fast (id int); CREATE VIEW seen AS SELECT 1; CREATE TABLE parts (id int) PARTITION BY RANGE (id)")
        .await;
    fails(name, name, "fast", "SET LOGGED").await;
    fails(name, name, "seen", "not a table").await;
    fails(name, name, "parts", "publish_via_partition_root").await;
    fixture
        .sql(&format!(
            "ALTER PUBLICATION {name} SET (publish = 'update')"
        ))
        .await;
    fails(name, name, "outbox", "publish = 'insert'").await;
    fixture
        .sql(&format!(
            "ALTER PUBLICATION {name} SET (publish = 'insert', publish_via_partition_root)"
        ))
        .await;
    preflight(client, name, &subscription(name, "outbox"))
        .await
        .expect("mended");

    // The stream itself says the same of a missing slot; and a role without the right is told which it needs.
    let connection = ReplicationConnection::connect(&fixture.config, "t")
        .await
        .expect("connect");
    let error = connection
        .start_replication("nosuch", Lsn::ZERO, name, StreamOptions::default())
        .await;
    let error = error.expect_err("no such slot");
    assert_eq!(sqlstate(&error), Some("42704"));
    assert_eq!(
        (
            error.exit_code(),
            error
                .hint_text()
                .is_some_and(|hint| hint.contains("walpost init"))
        ),
        (69, true)
    );
    let role = format!("CREATE ROLE {name}; SET ROLE {name}");
    fixture.sql(&role).await;
    fails(
        name,
        name,
        "outbox",
        &format!("ALTER ROLE {} REPLICATION;", quote_ident(name)),
    )
    .await;
    fixture.sql(&format!("RESET ROLE; DROP ROLE {name}")).await;

    let error = create_slot(client, name).await.expect_err("it exists");
    assert_eq!(sqlstate(&error), Some("42710"));
    fixture.drop().await;
}
