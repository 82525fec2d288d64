//! The roles of `sql/12_roles.sql`: the connector works with what it has and needs each right of it; the producer can only produce.

mod support;

use std::time::Duration;

use support::{Database, consume, eventually, servers, unique};

const DEADLINE: Duration = Duration::from_secs(60);
const MEMBERS: [(&str, &str); 2] = [
    ("walpost_connector", "login replication"),
    ("walpost_producer", "login"),
];

/// A database with the roles, and a login of each; the logins go with it.
struct Roles {
    database: Database,
    /// URLs of connector and producer.
    urls: [String; 2],
    logins: [String; 2],
}

impl Roles {
    async fn create(settings: &[(&str, &str)]) -> Self {
        let mut database = Database::create("roles").await;
        // Not by the support's own step: here the logins are the test's.
        let init = database.walpost(&["init", "--roles"], settings);
        let (code, said) = init.run(DEADLINE).await;
        assert_eq!(code, 0, "{said}");
        let (_, server) = database.url.rsplit_once('@').expect("the URL has a user");
        let logins = MEMBERS.map(|_| unique("login"));
        let urls = [0, 1].map(|n: usize| format!("postgres://{}:p@{server}", logins[n]));
        for (login, (role, attributes)) in logins.iter().zip(MEMBERS) {
            let sql =
                format!("create role {login} {attributes} password 'p'; grant {role} to {login}");
            database.sql(&sql).await;
        }
        database.url.clone_from(&urls[0]);
        Self {
            database,
            urls,
            logins,
        }
    }

    /// What the login `n` is refused with: the SQLSTATE, or nothing.
    async fn tries(&self, n: usize, sql: &str) -> Option<String> {
        let (client, connection) = tokio_postgres::connect(&self.urls[n], tokio_postgres::NoTls)
            .await
            .expect("the login");
        tokio::spawn(connection);
        let error = client.batch_execute(sql).await.err()?;
        Some(error.code().expect("of the server").code().to_owned())
    }

    async fn drop(self) {
        for login in &self.logins {
            self.database.sql(&format!("drop role {login}")).await;
        }
    }

    async fn emit(&self, n: u32) {
        let sql = format!("select walpost.emit('a', 'k', 'T', '{n}')");
        assert_eq!(self.tries(1, &sql).await, None);
    }

    async fn arrived(&self, expected: usize) -> Vec<String> {
        let topic = self.database.topic("a");
        let messages = consume(&servers().pulsar_url, &topic, expected, DEADLINE).await;
        let text = |m: &support::Received| String::from_utf8(m.payload.clone()).expect("UTF-8");
        messages.iter().map(text).collect()
    }
}

#[tokio::test]
async fn the_producer_can_insert_and_emit_and_nothing_else() {
    let roles = Roles::create(&[]).await;
    let columns = "aggregatetype, aggregateid, type, payload";
    for sql in [
        format!("insert into walpost.outbox ({columns}) values ('a', 'k', 'T', '1') returning id"),
        "select walpost.emit('a', 'k', 'T', '2')".to_owned(),
        "select walpost.emit_transient('a', 'k', 'T', '3')".to_owned(),
    ] {
        assert_eq!(roles.tries(1, &sql).await, None, "{sql}");
    }
    for sql in [
        "select payload from walpost.outbox",
        "update walpost.outbox set payload = null",
        "delete from walpost.outbox",
        "truncate walpost.outbox",
        "insert into walpost.outbox (aggregatetype, aggregateid, type, txid) values ('a', 'k', 'T', '1')",
        "insert into walpost.outbox (aggregatetype, aggregateid, type, sent_at) values ('a', 'k', 'T', now())",
        "select from walpost.progress",
        "select from walpost.straggler",
        "select from walpost.outbox_status",
        "create table walpost.t ()",
    ] {
        assert_eq!(roles.tries(1, sql).await.as_deref(), Some("42501"), "{sql}");
    }
    roles.drop().await;
}

#[tokio::test]
async fn the_connector_does_all_of_run_in_every_mode() {
    for (mode, retention) in [
        ("keep", "none"),
        ("keep", "1s"),
        ("mark", "none"),
        ("mark", "1s"),
        ("delete", "none"),
    ] {
        // GIVEN rows from before the slot, which only the gap scan can publish, and a connector with its role alone
        let settings = [
            ("WALPOST_AFTER_PUBLISH", mode),
            ("WALPOST_RETENTION", retention),
            ("WALPOST_SCAN_INTERVAL", "1s"),
        ];
        let roles = Roles::create(&settings).await;
        let database = &roles.database;
        database
            .rows(
                "select pg_drop_replication_slot($1::text::name)",
                &[&database.slot],
            )
            .await;
        roles.emit(1).await;
        // WHEN it runs, makes its slot anew, and takes a row and one that cannot be published
        let mut walpost = database.start(&settings).await;
        roles.emit(2).await;
        let poison = "insert into walpost.outbox (aggregatetype, aggregateid, type) values ('a/b', 'k', 'T')";
        assert_eq!(roles.tries(1, poison).await, None);
        roles.emit(3).await;
        // THEN all of it is done: gap, stream, straggler, mark, delete, retention
        assert_eq!(
            roles.arrived(3).await,
            ["1", "2", "3"],
            "{mode} {retention}"
        );
        let left = match (mode, retention) {
            ("delete", _) | (_, "1s") => "count(*) filter (where aggregatetype = 'a') = 0",
            ("mark", _) => "count(sent_at) = 3",
            _ => "count(*) = 4",
        };
        let done = format!(
            "select (select {left} from walpost.outbox) and (select count(*) = 1 from walpost.straggler where state = 'dead')
                    and (select bool_and(delivered is not null) from walpost.progress)"
        );
        eventually(
            DEADLINE,
            &format!("{mode}, retention {retention}: {left}"),
            async || {
                database.rows(&done, &[]).await[0]
                    .get::<_, bool>(0)
                    .then_some(())
            },
        )
        .await;
        walpost.sigterm();
        assert_eq!(walpost.wait_exit(DEADLINE).await, 0);
        let said = walpost.output();
        assert!(!said.contains("permission denied"), "{mode}: {said}");
        assert!(!said.contains("GRANT"), "{mode}: {said}");
        // THEN and more than that it may not
        for sql in [
            "insert into walpost.outbox (aggregatetype, aggregateid, type) values ('a', 'k', 'T')",
            "update walpost.outbox set payload = null",
            "truncate walpost.outbox",
            "truncate walpost.straggler",
            "delete from walpost.progress",
            "create table walpost.t ()",
            "create table public.t ()",
        ] {
            assert_eq!(roles.tries(0, sql).await.as_deref(), Some("42501"), "{sql}");
        }
        let may = |sql: &'static str, needed: bool| (sql, (!needed).then_some("42501"));
        for (sql, refused) in [
            may(
                "delete from walpost.outbox where false",
                mode == "delete" || retention != "none",
            ),
            may(
                "update walpost.outbox set sent_at = now() where false",
                mode == "mark",
            ),
        ] {
            assert_eq!(
                roles.tries(0, sql).await.as_deref(),
                refused,
                "{mode} {retention}: {sql}"
            );
        }
        roles.drop().await;
    }
}

/// A right of the connector, and a condition under which a run without it goes wrong.
const NEEDED: [&str; 14] = [
    "usage on schema walpost",
    "select on walpost.outbox",
    "update (sent_at) on walpost.outbox",
    "delete on walpost.outbox",
    "select on walpost.progress",
    "update on walpost.progress",
    "insert on walpost.straggler",
    "delete on walpost.straggler",
    "insert on walpost.after_publish",
    "select on walpost.left_undone",
    "insert on walpost.left_undone",
    "update on walpost.left_undone",
    "select on walpost.discarded",
    "delete on walpost.discarded",
];

#[tokio::test]
async fn the_connector_needs_each_of_its_rights() {
    // GIVEN the mode that needs the most
    let settings = [
        ("WALPOST_AFTER_PUBLISH", "mark"),
        ("WALPOST_RETENTION", "1h"),
    ];
    for right in NEEDED {
        let roles = Roles::create(&settings).await;
        let database = &roles.database;
        // Nothing to do for it: then an "insert" that is not there would not be missed.
        database.sql("delete from walpost.after_publish").await;
        // WHEN one right is taken away
        let revoke = format!("revoke {right} from walpost_connector");
        database.sql(&revoke).await;
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        // THEN the lack is told, by name or with what mends it
        let said = eventually(DEADLINE, &format!("a word about {right}"), async || {
            let said = walpost.output().to_lowercase();
            let told = ["permission denied", "grant ", "may not"];
            told.iter()
                .any(|words| said.contains(words))
                .then_some(said)
        })
        .await;
        assert!(said.contains("walpost"), "{said}");
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        roles.drop().await;
    }
}

#[tokio::test]
async fn the_connector_can_discard_what_it_has_stored_and_needs_the_right_to_note_it() {
    // GIVEN a straggler
    let roles = Roles::create(&[]).await;
    let database = &roles.database;
    let walpost = database.start(&[]).await;
    let poison =
        "insert into walpost.outbox (aggregatetype, aggregateid, type) values ('a/b', 'k', 'T')";
    assert_eq!(roles.tries(1, poison).await, None);
    let dead = "select count(*) = $1 from walpost.straggler";
    eventually(DEADLINE, "a straggler", async || {
        let rows = database.rows(dead, &[&1_i64]).await;
        rows[0].get::<_, bool>(0).then_some(())
    })
    .await;
    walpost.stop().await;

    // WHEN the connector discards it: THEN it may, and needs the right to insert
    let discard = async || {
        let args = ["stragglers", "discard", "--state", "dead", "--yes"];
        database.walpost(&args, &[]).run(DEADLINE).await
    };
    let right = "insert on walpost.discarded";
    database
        .sql(&format!("revoke {right} from walpost_connector"))
        .await;
    let (code, said) = discard().await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("walpost.discarded"), "{said}");
    database
        .sql(&format!("grant {right} to walpost_connector"))
        .await;
    let (code, said) = discard().await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("discarded 1 stragglers"), "{said}");
    roles.drop().await;
}

#[tokio::test]
async fn the_connectors_login_needs_the_replication_attribute() {
    let roles = Roles::create(&[]).await;
    roles
        .database
        .sql(&format!("alter role {} noreplication", roles.logins[0]))
        .await;
    let (code, said) = roles.database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("REPLICATION"), "{said}");
    roles.drop().await;
}
