//! A database of a test's own on the shared Postgres, with slot and topic names that nobody else has.

use std::sync::OnceLock;
use std::time::Duration;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Row};
use walpost::Lsn;

use super::{eventually, servers, unique};

const CLEANUP_DEADLINE: Duration = Duration::from_secs(20);

/// A fresh database. Dropping it ends its sessions, drops its slots (they are cluster-wide and few) and the database,
/// also when the test panics.
pub(crate) struct Database {
    /// Its name.
    pub(crate) name: String,
    /// TCP URL of the superuser.
    pub(crate) url: String,
    /// The same over the Unix socket.
    pub(crate) socket_url: String,
    /// A slot name that is free; nothing makes the slot here.
    pub(crate) slot: String,
    /// Full prefix for this test's topics: `persistent://public/default/<unique>`.
    pub(crate) topic_prefix: String,
    /// A session of the superuser in it.
    pub(crate) client: Client,
    server_url: String,
    /// The login that `walpost run` has, once there is a walpost to run.
    connector: OnceLock<String>,
}

/// Of the connectors' logins.
const CONNECTOR_PASSWORD: &str = "of-the-connector";

impl Database {
    /// Makes a database on the shared server, named after `prefix` (a few lower case letters and `_`).
    pub(crate) async fn create(prefix: &str) -> Self {
        Self::create_on(servers(), prefix).await
    }

    /// The same on another server, for instance one of `Servers::up(&["--postgres", "18"])`.
    pub(crate) async fn create_on(servers: &super::Servers, prefix: &str) -> Self {
        Self::create_with(servers, prefix, "").await
    }

    /// The same on the shared server of that major, whichever one `servers` gives.
    pub(crate) async fn create_on_major(major: i32, prefix: &str) -> Self {
        let major = major.to_string();
        if servers().var("WALPOST_LOCAL_POSTGRES_MAJOR") == major {
            return Self::create(prefix).await;
        }
        let of_major = super::Servers::up(&["--postgres", &major, "--no-pulsar"]);
        Self::create_on(&of_major, prefix).await
    }

    /// The same on the shared server, with a text encoding of its own.
    pub(crate) async fn create_in(encoding: &str, prefix: &str) -> Self {
        let options =
            format!("ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0");
        Self::create_with(servers(), prefix, &options).await
    }

    async fn create_with(servers: &super::Servers, prefix: &str, options: &str) -> Self {
        let name = unique(prefix);
        let admin = connect(&servers.postgres_socket_url).await;
        admin
            .batch_execute(&format!("CREATE DATABASE {name} {options}"))
            .await
            .unwrap_or_else(|error| panic!("cannot create database {name}: {error:?}"));
        let socket_url = with_database(&servers.postgres_socket_url, &name);
        Self {
            url: with_database(&servers.postgres_url, &name),
            client: connect(&socket_url).await,
            socket_url,
            slot: name.clone(),
            topic_prefix: format!("persistent://public/default/{name}"),
            server_url: servers.postgres_socket_url.clone(),
            connector: OnceLock::new(),
            name,
        }
    }

    /// The URL for `walpost run`: of a login that has walpost's role `walpost_connector` and nothing else; before
    /// [`Database::let_run`] the superuser's.
    pub(crate) fn run_url(&self) -> String {
        let Some(login) = self.connector.get() else {
            return self.url.clone();
        };
        let (_, server) = self.url.rsplit_once('@').expect("the URL has a user");
        format!("postgres://{login}:{CONNECTOR_PASSWORD}@{server}")
    }

    /// [`Database::run_url`] over the Unix socket, which holds some ninety rows and no more: a connector that does not read
    /// blocks its walsender at once. (Over TCP that takes as many megabytes as the kernel's limits allow, 4 + 32 on some.)
    pub(crate) fn run_socket_url(&self) -> String {
        let login = self.connector.get().expect("a walpost to run");
        let (scheme, rest) = self.socket_url.split_once("://").expect("a URL");
        let (_, server) = rest.split_once('@').expect("the URL has a user");
        format!("{scheme}://{login}:{CONNECTOR_PASSWORD}@{server}")
    }

    /// The setting that lets `walpost run` work as the tables' owner, which makes and drops partitions.
    pub(crate) fn as_owner(&self) -> (&'static str, &str) {
        ("WALPOST_POSTGRES_URL", &self.url)
    }

    /// Makes that login, once.
    pub(crate) async fn let_run(&self) {
        let login = format!("{}_run", self.name);
        if self.connector.set(login.clone()).is_ok() {
            let sql = format!(
                "CREATE ROLE {login} LOGIN REPLICATION PASSWORD '{CONNECTOR_PASSWORD}' IN ROLE walpost_connector"
            );
            self.sql(&sql).await;
        }
    }

    /// [`Database::run_url`] with another `host:port`, for instance a [`super::Proxy`]'s.
    pub(crate) fn url_through(&self, addr: &str) -> String {
        at_another(&self.run_url(), addr)
    }

    /// The superuser's URL with another `host:port`.
    pub(crate) fn owner_url_through(&self, addr: &str) -> String {
        at_another(&self.url, addr)
    }

    /// One more session, for transactions that run side by side.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.socket_url).await
    }

    /// Runs one or more statements.
    pub(crate) async fn sql(&self, statements: &str) {
        self.client
            .batch_execute(statements)
            .await
            .unwrap_or_else(|error| panic!("{statements}\nfailed: {error:?}"));
    }

    /// Runs a query with bound parameters and returns its rows.
    pub(crate) async fn rows(&self, query: &str, params: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        self.client
            .query(query, params)
            .await
            .unwrap_or_else(|error| panic!("{query}\nfailed: {error:?}"))
    }

    /// The slot's confirmed position as Postgres shows it; `None` when there is no such slot.
    pub(crate) async fn confirmed_flush_lsn(&self, slot: &str) -> Option<Lsn> {
        let rows = self
            .rows(
                "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1",
                &[&slot],
            )
            .await;
        rows.first()?.get::<_, Option<&str>>(0).map(parse_lsn)
    }

    /// Where the server writes its log now; everything committed before this call lies before it.
    pub(crate) async fn current_wal_lsn(&self) -> Lsn {
        let rows = self.rows("SELECT pg_current_wal_lsn()::text", &[]).await;
        parse_lsn(rows[0].get(0))
    }

    /// The pid of the walsender that serves the slot, if one does.
    pub(crate) async fn walsender_pid(&self, slot: &str) -> Option<i32> {
        let query = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
        self.rows(query, &[&slot]).await.first()?.get(0)
    }

    /// Terminates the walsender that serves the test's slot.
    pub(crate) async fn terminate_walsender(&self) {
        let pid = self.walsender_pid(&self.slot).await;
        let terminate = "SELECT pg_terminate_backend($1)";
        self.rows(terminate, &[&pid.expect("a walsender serves the slot")])
            .await;
    }

    /// The same while its client takes no more bytes; returns when the walsender has obeyed. The client should be at
    /// [`Database::run_socket_url`].
    ///
    /// It then stays, blocked on its last words, until the client reads on or hangs up.
    pub(crate) async fn terminate_blocked_walsender(&self, deadline: Duration) {
        let pid = self.walsender_pid(&self.slot).await.expect("a walsender");
        let waits_for = async || {
            let query = "SELECT wait_event FROM pg_stat_activity WHERE pid = $1";
            let rows = self.rows(query, &[&pid]).await;
            rows.first()?.get::<_, Option<String>>(0)
        };
        eventually(deadline, "the walsender to be blocked", async || {
            (waits_for().await? == "WalSenderWriteData").then_some(())
        })
        .await;
        self.terminate_walsender().await;
        eventually(deadline, "the walsender to say goodbye", async || {
            // Gone already, if its last words still found room.
            waits_for()
                .await
                .is_none_or(|event| event == "ClientWrite")
                .then_some(())
        })
        .await;
    }

    /// Waits until the slot's confirmed position has reached `lsn`.
    pub(crate) async fn wait_confirmed(&self, slot: &str, lsn: Lsn, deadline: Duration) {
        let what = format!("slot {slot} to confirm {lsn}");
        eventually(deadline, &what, async || {
            let confirmed = self.confirmed_flush_lsn(slot).await?;
            (confirmed >= lsn).then_some(())
        })
        .await;
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // A destructor cannot await, and this thread may already drive a runtime: hence a thread with one of its own.
        let (server_url, name) = (self.server_url.clone(), self.name.clone());
        let cleaned = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime")
                .block_on(drop_database(&server_url, &name));
        })
        .join();
        if cleaned.is_err() {
            // Not a second panic while the test's own one is on its way; what is left over has a unique name.
            eprintln!("could not clean up database {}", self.name);
        }
    }
}

async fn drop_database(server_url: &str, name: &str) {
    let admin = connect(server_url).await;
    // A walsender lets go of its slot a moment after it was told to, and a child process may come back meanwhile.
    eventually(CLEANUP_DEADLINE, "the test's slots to go", async || {
        let left = admin
            .query(
                "SELECT slot_name::text, active_pid, pg_terminate_backend(active_pid)
                   FROM pg_replication_slots WHERE database = $1",
                &[&name],
            )
            .await
            .ok()?;
        for row in &left {
            if row.get::<_, Option<i32>>(1).is_none() {
                let slot: &str = row.get(0);
                // Fails when somebody took it this instant; the next round sees to that.
                let drop_slot = "SELECT pg_drop_replication_slot($1::text::name)";
                let _ = admin.execute(drop_slot, &[&slot]).await;
            }
        }
        left.is_empty().then_some(())
    })
    .await;
    admin
        .batch_execute(&format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        .await
        .expect("the database can be dropped");
    admin
        .batch_execute(&format!("DROP ROLE IF EXISTS {name}_run"))
        .await
        .expect("the connector's login can be dropped");
}

/// A session; its connection runs in a task of the current runtime.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        // Without the URL: it holds the password.
        .unwrap_or_else(|error| panic!("cannot connect to the local Postgres: {error:?}"));
    tokio::spawn(connection);
    // Tests change rows that are there, which walpost.outbox refuses to whoever does not say so.
    client
        .batch_execute("SET walpost.mend = on")
        .await
        .expect("a session can have settings");
    client
}

fn at_another(url: &str, addr: &str) -> String {
    let (head, tail) = url.rsplit_once('@').expect("the URL has a user");
    let (_, database) = tail.split_once('/').expect("the URL has a database");
    format!("{head}@{addr}/{database}")
}

fn with_database(url: &str, database: &str) -> String {
    let (server, _) = url.rsplit_once('/').expect("the URL has a database");
    format!("{server}/{database}")
}

fn parse_lsn(text: &str) -> Lsn {
    text.parse().expect("Postgres prints an LSN")
}
