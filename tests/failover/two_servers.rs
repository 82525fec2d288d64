//! A URL with several hosts: the session that reads rows and the one that notes them as delivered are of one server.

use support::{Database, OwnServers, Proxy, Walpost, consume, eventually, on_each_major, servers};

use crate::{DEADLINE, Standby, own, support};

async fn a_standby_is_behind(major: i32) {
    // GIVEN a primary with a row that its standby does not have yet
    let own = own(major, "two-servers");
    let database = Database::create_on(&own, "failover").await;
    let poll = ("WALPOST_MODE", "poll");
    database.init(&[], &[poll]).await;
    let standby = Standby::build(&own, &database).await;
    let there = standby.client().await;
    let now = database.current_wal_lsn().await.to_string();
    eventually(DEADLINE, "the standby to follow", async || {
        let sql = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), $1::text::pg_lsn)::int8 >= 0";
        let row = there.query_one(sql, &[&now]).await.ok()?;
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    there
        .batch_execute("SELECT pg_wal_replay_pause()")
        .await
        .expect("a pause");
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1') RETURNING id::text";
    let id: String = database.rows(insert, &[]).await[0].get(0);

    // WHEN the primary takes the first connection of walpost, and refuses those that follow for a moment
    let primary = Proxy::start(&own.postgres_addr);
    let url = database.url_through(&format!("{},127.0.0.1:{}", primary.addr(), standby.port));
    let settings = [
        ("WALPOST_POSTGRES_URL", &*url),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
        ("WALPOST_HTTP_ADDR", "none"),
        ("WALPOST_RECONNECT_INITIAL", "100ms"),
        poll,
    ];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    while primary.accepted() < 1 {
        tokio::task::yield_now().await;
    }
    primary.refuse(true);
    while primary.accepted() < 2 {
        assert!(walpost.try_exit().is_none(), "{}", walpost.output());
        tokio::task::yield_now().await;
    }
    primary.refuse(false);

    // THEN the row arrives before it is shown as sent
    walpost.wait_for_line("polling", DEADLINE).await;
    eventually(DEADLINE, "the row to be sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let received = consume(&servers().pulsar_url, &database.topic("t"), 1, DEADLINE).await;
    let ids: Vec<&str> = received.iter().map(|one| one.property("id")).collect();
    assert_eq!(ids, [id]);
    walpost.stop().await;
}

/// A stream of a primary that still runs although its standby was promoted.
struct Beside {
    database: Database,
    standby: Standby,
    /// Before the primary: the first host of the URL.
    primary: Proxy,
    walpost: Walpost,
    _own: OwnServers,
}

impl Beside {
    async fn new(major: i32, name: &str, mode: (&str, &str)) -> Self {
        let own = own(major, name);
        let database = Database::create_on(&own, "failover").await;
        database.init(&[], &[mode]).await;
        let standby = Standby::build(&own, &database).await;
        let primary = Proxy::start(&own.postgres_addr);
        let hosts = format!("{},127.0.0.1:{}", primary.addr(), standby.port);
        let url = database.url_through(&hosts);
        let settings = [
            ("WALPOST_POSTGRES_URL", &*url),
            ("WALPOST_SCAN_INTERVAL", "200ms"),
            ("WALPOST_STRAGGLER_AGE", "100ms"),
            ("WALPOST_HTTP_ADDR", "none"),
            mode,
        ];
        let walpost = database.start(&settings).await;
        let now = database.current_wal_lsn().await.to_string();
        let there = standby.client().await;
        eventually(DEADLINE, "the standby to follow", async || {
            let sql =
                "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), $1::text::pg_lsn)::int8 >= 0";
            let row = there.query_one(sql, &[&now]).await.ok()?;
            row.get::<_, bool>(0).then_some(())
        })
        .await;
        standby.promote().await;
        Self {
            database,
            standby,
            primary,
            walpost,
            _own: own,
        }
    }

    /// Ends the sessions of that name while the primary takes no new ones.
    async fn send_over(&self, application_name: &str) {
        self.primary.refuse(true);
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND application_name = $1";
        self.database.rows(sql, &[&application_name]).await;
    }

    async fn wait_for_refusal(&mut self, line: &str) {
        self.walpost.wait_for_line(line, DEADLINE).await;
        self.primary.refuse(false);
    }
}

const OTHER_LOG: &str = "the server's log is not the one that was streamed";

/// A row, to which topic it goes, and its id.
async fn insert(client: &tokio_postgres::Client, aggregatetype: &str) -> String {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ($1, 'k', 'e', '1') RETURNING id::text";
    let row = client.query_one(sql, &[&aggregatetype]).await;
    row.expect("a row").get(0)
}

async fn unmarked_rows_of_another_log(major: i32) {
    // GIVEN a row that only the promoted standby has
    let mut beside = Beside::new(major, "two-logs", ("WALPOST_AFTER_PUBLISH", "mark")).await;
    insert(&beside.standby.client().await, "t").await;

    // WHEN the session that looks for unmarked rows is made anew, and finds that one
    beside.send_over("walpost scanner").await;
    let line = format!("could not be looked for: {OTHER_LOG}");
    beside.wait_for_refusal(&line).await;

    // THEN its row is not published, and those of the primary are
    let id = insert(&beside.database.client, "t").await;
    let topic = beside.database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, 1, DEADLINE).await;
    let ids: Vec<&str> = received.iter().map(|one| one.property("id")).collect();
    assert_eq!(ids, [id]);
    beside.walpost.stop().await;
}

async fn stragglers_of_another_log(major: i32) {
    // GIVEN a stream that has nothing to store yet
    let mode = ("WALPOST_AFTER_PUBLISH", "keep");
    let mut beside = Beside::new(major, "two-stores", mode).await;

    // WHEN the session that stores stragglers is made anew, and finds the promoted standby
    beside.send_over("walpost stragglers").await;
    insert(&beside.database.client, "a/b").await;
    beside.wait_for_refusal(OTHER_LOG).await;

    // THEN the straggler is stored where it was streamed
    let sql = "SELECT FROM walpost.straggler";
    eventually(DEADLINE, "the straggler", async || {
        (beside.database.rows(sql, &[]).await.len() == 1).then_some(())
    })
    .await;
    let there = beside.standby.client().await;
    let rows = there.query(sql, &[]).await.expect("the table");
    assert!(rows.is_empty());
    beside.walpost.stop().await;
}

on_each_major! {
    rows_of_another_log_are_not_taken_for_unmarked_ones: unmarked_rows_of_another_log();
    stragglers_are_stored_on_the_server_whose_log_is_streamed: stragglers_of_another_log();
    rows_that_a_standby_does_not_have_yet_do_not_count_as_delivered: a_standby_is_behind();
}
