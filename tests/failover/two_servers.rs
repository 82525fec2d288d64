//! A URL with several hosts: the session that reads rows and the one that notes them as delivered are of one server.

use support::{Database, Proxy, consume, eventually, on_each_major, servers};

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

async fn a_standby_was_promoted_beside_its_primary(major: i32) {
    // GIVEN a stream of a primary that still runs although its standby was promoted, and a row that only that one has
    let own = own(major, "two-logs");
    let database = Database::create_on(&own, "failover").await;
    let mark = ("WALPOST_AFTER_PUBLISH", "mark");
    database.init(&[], &[mark]).await;
    let standby = Standby::build(&own, &database).await;
    let primary = Proxy::start(&own.postgres_addr);
    let url = database.url_through(&format!("{},127.0.0.1:{}", primary.addr(), standby.port));
    let settings = [
        ("WALPOST_POSTGRES_URL", &*url),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
        ("WALPOST_STRAGGLER_AGE", "100ms"),
        ("WALPOST_HTTP_ADDR", "none"),
        mark,
    ];
    let mut walpost = database.start(&settings).await;
    let now = database.current_wal_lsn().await.to_string();
    let there = standby.client().await;
    eventually(DEADLINE, "the standby to follow", async || {
        let sql = "SELECT pg_wal_lsn_diff(pg_last_wal_replay_lsn(), $1::text::pg_lsn)::int8 >= 0";
        let row = there.query_one(sql, &[&now]).await.ok()?;
        row.get::<_, bool>(0).then_some(())
    })
    .await;
    standby.promote().await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1') RETURNING id::text";
    there.query(insert, &[]).await.expect("a row");

    // WHEN the session that looks for unmarked rows is made anew, and finds that one
    primary.refuse(true);
    database
        .sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'walpost scanner'",
        )
        .await;
    walpost
        .wait_for_line(
            "could not be looked for: the server's log is not the one that was streamed",
            DEADLINE,
        )
        .await;
    primary.refuse(false);

    // THEN its row is not published, and those of the primary are
    let id: String = database.rows(insert, &[]).await[0].get(0);
    let received = consume(&servers().pulsar_url, &database.topic("t"), 1, DEADLINE).await;
    let ids: Vec<&str> = received.iter().map(|one| one.property("id")).collect();
    assert_eq!(ids, [id]);
    walpost.stop().await;
}

on_each_major! {
    rows_of_another_log_are_not_taken_for_unmarked_ones: a_standby_was_promoted_beside_its_primary();
    rows_that_a_standby_does_not_have_yet_do_not_count_as_delivered: a_standby_is_behind();
}
