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

on_each_major! {
    rows_that_a_standby_does_not_have_yet_do_not_count_as_delivered: a_standby_is_behind();
}
