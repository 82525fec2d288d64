//! Guarantee: told to stop, the connector drains, confirms what arrived, and says by its exit code how that went.

mod support;

use std::time::Duration;

use pulsar::message::proto::ServerError;

use support::{
    Asked, Committed, Database, FakeBroker, Load, Proxy, Reaction, consume, eventually,
    insert_many, servers,
};

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn sigterm_and_sigint_under_load_drain_so_that_nothing_comes_again() {
    let database = Database::create("drain").await;
    Load::prepare(&database).await;
    let load = Load::start(&database, 4);
    for signal in ["TERM", "INT", "TERM"] {
        let mut walpost = database.start(&[]).await;
        load.more(100).await;
        walpost.signal(signal);
        assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
    }
    load.stop();
    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    let committed = Committed::read(&database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(&database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_exactly_once(&received);
}

#[tokio::test]
async fn what_has_no_receipt_when_the_grace_is_over_is_exit_75_and_comes_at_the_next_start() {
    let database = Database::create("grace").await;
    Load::prepare(&database).await;
    let proxy = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let settings = [
        ("WALPOST_PULSAR_URL", &*url),
        ("WALPOST_SHUTDOWN_GRACE", "2s"),
        ("WALPOST_BATCH_MAX_MESSAGES", "1"),
    ];
    let mut walpost = database.start(&settings).await;
    // The topic accepts something larger than all that comes, so that nothing waits behind the first of its size.
    insert_many(&database.client, &"x".repeat(200), 1).await;
    insert_many(&database.client, "key", 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    proxy.hold_upstream_replies(true);
    let sent = proxy.to_server_bytes();
    insert_many(&database.client, "key", 100).await;
    eventually(DEADLINE, "the events to be sent", async || {
        (proxy.to_server_bytes() > sent + 1000).then_some(())
    })
    .await;

    walpost.sigterm();
    assert_eq!(
        walpost.wait_exit(Duration::from_secs(10)).await,
        75,
        "{}",
        walpost.output()
    );
    assert!(walpost.output().contains("WALPOST_SHUTDOWN_GRACE"));

    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let received = consume(
        &servers().pulsar_url,
        &Load::topic(&database),
        committed.len(),
        DEADLINE,
    )
    .await;
    committed.assert_at_least_once(&received);
}

#[tokio::test]
async fn a_stream_that_is_lost_while_the_last_transaction_arrives_is_no_reason_not_to_stop() {
    // GIVEN a transaction of which half has arrived, and SIGTERM
    let database = Database::create("halfway").await;
    Load::prepare(&database).await;
    let proxy = Proxy::start(&servers().postgres_addr);
    let url = database.url_through(&proxy.addr());
    let mut walpost = database.start(&[("WALPOST_POSTGRES_URL", &*url)]).await;
    insert_many(&database.client, "key", 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    let before = proxy.to_client_bytes();
    insert_many(&database.client, "key", 200_000).await;
    eventually(DEADLINE, "some of it to arrive", async || {
        (proxy.to_client_bytes() > before + 1_000_000).then_some(())
    })
    .await;
    proxy.hold_upstream_replies(true);
    walpost.sigterm();
    walpost.wait_for_line("draining", DEADLINE).await;

    // WHEN the connection breaks (the connector looks for a signal before it looks at the stream)
    proxy.cut();

    // THEN it stops, and what was not confirmed comes at the next start
    let code = walpost.wait_exit(Duration::from_secs(10)).await;
    assert!(matches!(code, 0 | 75), "{code}: {}", walpost.output());
    let walpost = database.start(&[]).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let committed = Committed::read(&database).await;
    let topic = Load::topic(&database);
    let received = consume(&servers().pulsar_url, &topic, committed.len(), DEADLINE).await;
    committed.assert_at_least_once(&received);
}

#[tokio::test]
async fn an_event_that_is_refused_while_it_drains_is_told_and_is_exit_69() {
    // GIVEN an event that waits for its producer, nowhere to put what is refused, and SIGTERM
    let database = Database::create("refused").await;
    database.init(&[], &[]).await;
    database.sql("DROP TABLE walpost.straggler CASCADE").await;
    let broker = FakeBroker::start().await;
    broker.script(Asked::Producer, [Reaction::NotReady]);
    broker.script(Asked::Send, [Reaction::Fail(ServerError::NotAllowedError)]);
    let mut walpost = database
        .start(&[("WALPOST_PULSAR_URL", &*broker.url())])
        .await;
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  VALUES ('t', 'k', 'e', '1') RETURNING id::text";
    let id: String = database.rows(insert, &[]).await[0].get(0);
    broker.wait_for(Asked::Producer, 1).await;
    walpost.sigterm();
    walpost.wait_for_line("no more intake", DEADLINE).await;

    // WHEN the producer is ready, and the broker refuses the event
    broker.release(|_| {});

    // THEN that is what it ends with
    let code = walpost.wait_exit(DEADLINE).await;
    assert_eq!(code, 69, "{}", walpost.output());
    let said = walpost.output();
    assert!(said.contains(&id) && said.contains("NotAllowed"), "{said}");
}

#[tokio::test]
async fn a_server_that_is_away_is_tried_again_until_sigterm() {
    let database = Database::create("away").await;
    database.init(&[], &[]).await;
    // Nothing listens where a proxy has just been.
    let nowhere = Proxy::start(&servers().pulsar_addr).addr();
    let pulsar = format!("pulsar://{nowhere}");
    let postgres = format!("postgres://nobody:hidden@{nowhere}/x");
    for (variable, url) in [
        ("WALPOST_PULSAR_URL", &pulsar),
        ("WALPOST_POSTGRES_URL", &postgres),
    ] {
        let mut walpost = database.walpost(&["run"], &[(variable, url)]).spawn();
        walpost.wait_for_line("retry_in_ms", DEADLINE).await;
        eventually(DEADLINE, "three attempts", async || {
            (walpost.output().matches("retry_in_ms").count() >= 3).then_some(())
        })
        .await;
        walpost.sigterm();
        assert_eq!(
            walpost.wait_exit(Duration::from_secs(10)).await,
            0,
            "{}",
            walpost.output()
        );
        assert!(
            walpost.output().contains(&nowhere),
            "it says where: {}",
            walpost.output()
        );
        assert!(!walpost.output().contains("hidden"));
    }
}

#[tokio::test]
async fn what_is_missing_in_postgres_is_exit_69_with_the_command_that_mends_it() {
    let database = Database::create("missing").await;
    database.init(&[], &[]).await;
    for (settings, hint) in [
        (("WALPOST_SLOT", "no_such_slot"), "walpost init"),
        (
            ("WALPOST_PUBLICATION", "no_such_publication"),
            "walpost init",
        ),
        (
            ("WALPOST_OUTBOX_TABLE", "public.no_such_table"),
            "no_such_table",
        ),
    ] {
        let mut walpost = database.walpost(&["run"], &[settings]).spawn();
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            69,
            "{}",
            walpost.output()
        );
        let said = walpost.output();
        assert!(said.contains(hint) && said.contains(settings.1), "{said}");
    }
    // A column that is absent shows when the table is described, ahead of its first row.
    database
        .sql("INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '1')")
        .await;
    let mut walpost = database
        .walpost(&["run"], &[("WALPOST_COLUMN_PAYLOAD", "body")])
        .spawn();
    assert_eq!(
        walpost.wait_exit(DEADLINE).await,
        64,
        "{}",
        walpost.output()
    );
    assert!(
        walpost.output().contains("WALPOST_COLUMN_PAYLOAD"),
        "{}",
        walpost.output()
    );
}
