//! Guarantee: walpost logs in by every method, encrypts as `sslmode` says, and says clearly why when it cannot.
//!
//! Every case is tried twice, once for a replication connection (our own login) and once for SQL. One cluster, one test:
//! the cases only read.

#[path = "postgres_login/cluster.rs"]
mod cluster;

use cluster::{Cluster, SCRAM_PASSWORD};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use walpost::postgres::{PostgresConfig, ReplicationConnection, connect_sql};
use walpost::{Error, Result};

/// What the server says about a connection: the user, and whether it is encrypted.
type Seen = (String, bool);

async fn both(url: &str) -> (Result<Seen>, Result<()>) {
    let config = PostgresConfig::parse(Some(url), &|_| None).expect("a valid URL");
    let sql = async {
        let client = connect_sql(&config, "walpost-test").await?;
        let row = client
            .query_one(
                "SELECT usename::text, ssl, application_name FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)
                 WHERE pid = pg_backend_pid()",
                &[],
            )
            .await
            .expect("ask the server about the connection");
        assert_eq!(row.get::<_, &str>(2), "walpost-test");
        Ok((row.get(0), row.get(1)))
    };
    let replication = async {
        let mut connection = ReplicationConnection::connect(&config, "walpost-test").await?;
        assert!(connection.server_version() >= 140_000);
        let identity = connection.identify_system().await?;
        assert_eq!(identity.dbname, "postgres");
        assert!(identity.system_id > 0 && identity.timeline > 0 && !identity.xlogpos.is_zero());
        // A refused command leaves the connection usable.
        let error = connection
            .simple_query("BASE_NONSENSE")
            .await
            .expect_err("no such command");
        assert_eq!(walpost::postgres::sqlstate(&error), Some("42601"));
        connection.identify_system().await?;
        Ok(())
    };
    (sql.await, replication.await)
}

async fn works(url: &str, user: &str, encrypted: bool) {
    let (sql, replication) = both(url).await;
    let seen = sql.unwrap_or_else(|error| panic!("{url}: {}", error.report()));
    assert_eq!(seen, (user.to_owned(), encrypted), "{url}");
    replication.unwrap_or_else(|error| panic!("{url}: {}", error.report()));
}

async fn fails(url: &str, exit_code: u8, said: &str) {
    let (sql, replication) = both(url).await;
    let check = |error: Error| {
        let report = error.report();
        assert_eq!(error.exit_code(), exit_code, "{url}: {report}");
        assert!(report.contains(said), "{url}: {report}");
        assert!(!report.contains("wr0ng"), "{report}");
    };
    check(sql.expect_err(url));
    check(replication.expect_err(url));
}

#[tokio::test]
async fn every_way_of_login_works_or_says_why_not() {
    let cluster = Cluster::start();
    let admin = PostgresConfig::parse(Some(&cluster.socket()), &|_| None).expect("a valid URL");
    let admin = connect_sql(&admin, "walpost-test")
        .await
        .expect("connect over the socket");
    let roles = format!(
        "CREATE ROLE scram LOGIN REPLICATION PASSWORD '{SCRAM_PASSWORD}';
         CREATE ROLE clear LOGIN REPLICATION PASSWORD 'pw';
         CREATE ROLE weak LOGIN PASSWORD 'pw';
         CREATE ROLE cert LOGIN REPLICATION;
         CREATE ROLE onlytls LOGIN REPLICATION;
         CREATE ROLE onlyplain LOGIN REPLICATION;
         SET password_encryption = md5;
         CREATE ROLE md5 LOGIN REPLICATION PASSWORD 'pw'"
    );
    admin.batch_execute(&roles).await.expect("create the roles");

    passwords(&cluster).await;
    encryption(&cluster).await;
    certificates(&cluster).await;
    several_hosts(&cluster, &admin).await;
}

async fn passwords(cluster: &Cluster) {
    works(&cluster.socket(), "postgres", false).await;
    works(
        &format!("{}&sslmode=require", cluster.socket()),
        "postgres",
        false,
    )
    .await;
    works(&cluster.tcp("postgres", ""), "postgres", true).await;
    works(&cluster.tcp("md5:pw", ""), "md5", true).await;
    works(&cluster.tcp("clear:pw", "sslmode=disable"), "clear", false).await;
    let scram = "scram:p%C3%A4%25ss%2F%40%3A%3F%23";
    works(&cluster.tcp(scram, "sslmode=disable"), "scram", false).await;
    works(
        &cluster.tcp(scram, "channel_binding=disable"),
        "scram",
        true,
    )
    .await;
    // The server's certificate is signed with SHA-384: the binding follows it, or the server would refuse.
    works(
        &cluster.tcp(scram, "channel_binding=require"),
        "scram",
        true,
    )
    .await;

    fails(
        &cluster.tcp(scram, "channel_binding=require&sslmode=disable"),
        69,
        "channel_binding",
    )
    .await;
    fails(
        &cluster.tcp("clear:pw", "channel_binding=require"),
        69,
        "channel",
    )
    .await;
    for user in ["scram", "md5", "clear"] {
        fails(&cluster.tcp(&format!("{user}:wr0ng"), ""), 69, "28P01").await;
        fails(&cluster.tcp(user, ""), 69, "password").await;
    }
    fails(&cluster.tcp("nobody", ""), 69, "28000").await;
    let missing = cluster
        .tcp("postgres", "")
        .replace("/postgres?", "/nowhere?");
    fails(&missing, 69, "3D000").await;

    let weak =
        PostgresConfig::parse(Some(&cluster.tcp("weak:pw", "")), &|_| None).expect("a valid URL");
    let error = ReplicationConnection::connect(&weak, "t")
        .await
        .expect_err("may not replicate");
    assert_eq!(walpost::postgres::sqlstate(&error), Some("42501"));
    assert!(error.report().contains("ALTER ROLE"), "{}", error.report());
}

async fn encryption(cluster: &Cluster) {
    works(&cluster.tcp("postgres", "sslmode=allow"), "postgres", false).await;
    works(
        &cluster.tcp("postgres", "sslmode=disable"),
        "postgres",
        false,
    )
    .await;
    works(
        &cluster.tcp("postgres", "sslmode=require"),
        "postgres",
        true,
    )
    .await;
    works(&cluster.tcp("onlytls", "sslmode=allow"), "onlytls", true).await;
    works(
        &cluster.tcp("onlyplain", "sslmode=prefer"),
        "onlyplain",
        false,
    )
    .await;
    fails(&cluster.tcp("onlytls", "sslmode=disable"), 69, "28000").await;
    fails(&cluster.tcp("onlyplain", "sslmode=require"), 69, "28000").await;
}

async fn certificates(cluster: &Cluster) {
    let tls = |name: &str| cluster.path("tls").join(name).display().to_string();
    let (ca, other) = (tls("ca.crt"), tls("other.crt"));
    let by_name = |url: String| url.replace("127.0.0.1", "localhost");
    let with = |user: &str, parameters: String| cluster.tcp(user, &parameters);

    works(
        &with("postgres", format!("sslmode=verify-ca&sslrootcert={ca}")),
        "postgres",
        true,
    )
    .await;
    let full = with("postgres", format!("sslmode=verify-full&sslrootcert={ca}"));
    works(&by_name(full.clone()), "postgres", true).await;
    // The certificate is for localhost alone.
    fails(&full, 69, "not valid for").await;
    // A server's own certificate as the root: what a self-signed server has.
    let own = tls("server.crt");
    works(
        &with("postgres", format!("sslmode=verify-ca&sslrootcert={own}")),
        "postgres",
        true,
    )
    .await;
    for mode in ["require", "verify-ca", "verify-full"] {
        let url = by_name(with(
            "postgres",
            format!("sslmode={mode}&sslrootcert={other}"),
        ));
        fails(&url, 69, "sslrootcert").await;
    }
    fails(
        &by_name(with("postgres", "sslmode=verify-full".into())),
        69,
        "UnknownIssuer",
    )
    .await;
    fails(
        &with(
            "postgres",
            "sslmode=verify-ca&sslrootcert=/nonexistent".into(),
        ),
        64,
        "/nonexistent",
    )
    .await;

    let (crt, key) = (tls("client.crt"), tls("client.key"));
    works(
        &with(
            "cert",
            format!("sslmode=require&sslcert={crt}&sslkey={key}"),
        ),
        "cert",
        true,
    )
    .await;
    fails(&with("cert", "sslmode=require".into()), 69, "certificate").await;
}

async fn several_hosts(cluster: &Cluster, admin: &tokio_postgres::Client) {
    // Port 1 refuses; the second host takes it.
    let port = cluster.port;
    let two = format!("postgres://postgres@127.0.0.1:1,127.0.0.1:{port}/postgres");
    works(&two, "postgres", true).await;
    works(
        &format!("{two}?target_session_attrs=read-write"),
        "postgres",
        true,
    )
    .await;
    fails("postgres://u@127.0.0.1:1/d", 75, "127.0.0.1:1").await;
    fails(
        "postgres://u@/d?host=/nonexistent",
        75,
        "/nonexistent/.s.PGSQL.5432",
    )
    .await;

    let set = "ALTER SYSTEM SET default_transaction_read_only = on";
    admin.batch_execute(set).await.expect("change the setting");
    admin
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .expect("reload");
    let read_only = format!("{two}?target_session_attrs=read-write");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let config = walpost::postgres::PostgresConfig::parse(Some(&two), &|_| None).expect("a URL");
    loop {
        let inherits = walpost::postgres::connect_application(&config, "test").await;
        let show = "SHOW default_transaction_read_only";
        let shown = inherits.expect("a session").query_one(show, &[]).await;
        if shown.expect("a setting").get::<_, &str>(0) == "on" {
            break;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the setting was never reloaded"
        );
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // No other takes writes: this one does so when asked to.
    works(&read_only, "postgres", true).await;
    works(
        &format!("{two}?target_session_attrs=primary"),
        "postgres",
        true,
    )
    .await;
}

/// A listener that answers the request for TLS with `answer`, or never.
async fn odd_server(answer: Option<u8>) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .expect("listen");
    let port = listener.local_addr().expect("the address").port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 8];
                socket.read_exact(&mut request).await.expect("read");
                match answer {
                    Some(answer) => socket.write_all(&[answer]).await.expect("answer"),
                    None => std::future::pending().await,
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_server_without_tls_and_one_without_an_answer_are_told_apart() {
    let url = async |answer, parameters| {
        let port = odd_server(answer).await;
        format!("postgres://u@127.0.0.1:{port}/d?{parameters}")
    };
    fails(&url(Some(b'N'), "sslmode=require").await, 69, "has no TLS").await;
    fails(
        &url(Some(b'N'), "sslmode=prefer").await,
        75,
        "cannot log in",
    )
    .await;
    fails(
        &url(Some(b'E'), "sslmode=require").await,
        75,
        "request for TLS",
    )
    .await;
    fails(&url(Some(b'S'), "sslmode=require").await, 75, "TLS with").await;
    fails(&url(None, "connect_timeout=1").await, 75, "within 1s").await;
}
