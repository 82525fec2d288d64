//! System B's inbox: the work of a message is done once, whoever dies, from Rust and from Python.
#![allow(
    clippy::large_futures,
    reason = "the pulsar crate's futures are large; a test has the stack for them"
)]

use std::time::Duration;

use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio_postgres::Transaction;
use walpost::inbox::{Handler, HandlerError, Inbox, Message, Outcome, Settings};
use walpost::postgres::PostgresConfig;

use crate::support::{Command, Database, Python, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);

/// Takes stock, and fails where there is too little.
struct Stock;

impl Handler for Stock {
    async fn handle(
        &mut self,
        transaction: &Transaction<'_>,
        message: &Message,
    ) -> Result<(), HandlerError> {
        let quantity: i64 = std::str::from_utf8(&message.payload)?.parse()?;
        let sql = "update stock set taken = taken + $1, taken_by = taken_by || $2::text";
        transaction.execute(sql, &[&quantity, &message.id]).await?;
        Ok(())
    }
}

async fn database() -> Database {
    let database = Database::create("inbox").await;
    Inbox::create(&database.client).await.expect("the inbox");
    database
        .sql(
            "create table stock (taken bigint not null check (taken < 1000), taken_by text[] not null);
             insert into stock values (0, '{}')",
        )
        .await;
    database
}

fn message(id: &str, quantity: &str) -> Message {
    Message {
        id: id.to_owned(),
        topic: "t".to_owned(),
        message_id: "1:2:3".to_owned(),
        key: Some("k".to_owned()),
        payload: quantity.as_bytes().to_vec(),
        properties: vec![("id".to_owned(), id.to_owned())],
        event_time_ms: None,
    }
}

fn inbox(settings: Settings) -> Inbox {
    Inbox::new("stock", settings).expect("settings that hold")
}

async fn taken(database: &Database) -> i64 {
    database.rows("select taken from stock", &[]).await[0].get(0)
}

#[tokio::test]
async fn a_message_that_comes_again_is_skipped_even_while_the_first_is_being_handled() {
    // GIVEN a consumer
    let database = database().await;
    // WHEN a message comes twice, and to another consumer
    let (mut client, mut other) = (database.connect().await, database.connect().await);
    let inbox = inbox(Settings::default());
    let seven = message("a", "7");
    let first = inbox.handle(&mut client, &seven, &mut Stock).await;
    let second = inbox.handle(&mut client, &seven, &mut Stock).await;
    let elsewhere = Inbox::new("audit", Settings::default()).expect("a name");
    let third = elsewhere.handle(&mut other, &seven, &mut Stock).await;
    // THEN each consumer does it once
    assert_eq!(first.expect("handled"), Outcome::Handled);
    assert_eq!(second.expect("handled"), Outcome::Duplicate);
    assert_eq!(third.expect("handled"), Outcome::Handled);
    assert_eq!(taken(&database).await, 14);

    // WHEN another one comes to two sessions at once, sixteen times
    let sessions: Vec<_> = (0..16).map(|_| database.connect()).collect();
    let sessions = futures::future::join_all(sessions).await;
    let eight = message("b", "8");
    let all = sessions.into_iter().map(async |mut client| {
        inbox
            .handle(&mut client, &eight, &mut Stock)
            .await
            .expect("handled")
    });
    let outcomes = futures::future::join_all(all).await;
    // THEN one of them handles it
    let handled = outcomes.iter().filter(|o| **o == Outcome::Handled).count();
    assert_eq!(handled, 1, "{outcomes:?}");
    assert_eq!(taken(&database).await, 22);
}

#[tokio::test]
async fn a_message_that_fails_is_set_aside_whole_after_its_attempts_and_leaves_no_work_behind() {
    // GIVEN a consumer that tries three times
    let database = database().await;
    let mut client = database.connect().await;
    let inbox = inbox(Settings {
        max_attempts: 3,
        ..Settings::default()
    });
    // WHEN a message's work breaks a constraint, and another's is no number
    for (id, quantity, why) in [("much", "5000", "check"), ("none", "x", "invalid digit")] {
        let poison = message(id, quantity);
        for expected in [
            Outcome::Failed(1),
            Outcome::Failed(2),
            Outcome::SetAside,
            Outcome::Duplicate,
        ] {
            let outcome = inbox.handle(&mut client, &poison, &mut Stock).await;
            assert_eq!(outcome.expect("the database is there"), expected);
        }
        // THEN it is kept with its reason
        let kept = database
            .rows(
                "select topic, message_id, key, payload, properties ->> 'id', attempts, reason, set_aside_at is not null
                 from walpost.inbox_poison where consumer = 'stock' and id = $1",
                &[&id],
            )
            .await;
        let kept = &kept[0];
        let texts = [0, 1, 2, 4].map(|column| kept.get::<_, &str>(column));
        assert_eq!(texts, ["t", "1:2:3", "k", id]);
        assert_eq!(kept.get::<_, &[u8]>(3), quantity.as_bytes());
        assert_eq!(kept.get::<_, i32>(5), 3);
        let reason: &str = kept.get(6);
        assert!(reason.contains(why), "{reason}");
        assert!(kept.get::<_, bool>(7));
    }
    // THEN nothing was taken, and later ones go on
    assert_eq!(taken(&database).await, 0);
    let next = inbox
        .handle(&mut client, &message("next", "1"), &mut Stock)
        .await;
    assert_eq!(next.expect("handled"), Outcome::Handled);
}

#[tokio::test]
async fn a_lost_session_and_a_conflict_are_no_attempt() {
    struct Breaks(&'static str);
    impl Handler for Breaks {
        async fn handle(&mut self, tx: &Transaction<'_>, _: &Message) -> Result<(), HandlerError> {
            tx.batch_execute(self.0).await?;
            Ok(())
        }
    }
    // GIVEN a consumer that tries once
    let database = database().await;
    let inbox = inbox(Settings {
        max_attempts: 1,
        ..Settings::default()
    });
    // WHEN the transaction ends for a reason that is not the message's
    for sql in [
        "select pg_terminate_backend(pg_backend_pid())",
        "do $$ begin raise exception 'x' using errcode = 'deadlock_detected'; end $$",
        "do $$ begin raise exception 'x' using errcode = 'lock_not_available'; end $$",
    ] {
        let mut client = database.connect().await;
        let outcome = inbox
            .handle(&mut client, &message("a", "1"), &mut Breaks(sql))
            .await;
        // THEN it is to be tried again, and nothing is booked
        assert!(outcome.expect_err(sql).is_temporary(), "{sql}");
    }
    let booked =
        "select (select count(*) from walpost.inbox) + (select count(*) from walpost.inbox_poison)";
    assert_eq!(database.rows(booked, &[]).await[0].get::<_, i64>(0), 0);
    let mut client = database.connect().await;
    let outcome = inbox
        .handle(&mut client, &message("a", "1"), &mut Stock)
        .await;
    assert_eq!(outcome.expect("handled"), Outcome::Handled);
}

#[tokio::test]
async fn old_ids_go_in_batches_and_young_ones_and_those_of_others_stay() {
    // GIVEN more old ids than one statement takes, many of the same moment
    let database = database().await;
    database
        .sql(
            "insert into walpost.inbox
             select c, n::text, now() - interval '2 days' - (n / 1500) * interval '1 s'
             from generate_series(1, 4500) n, (values ('stock'), ('audit')) as consumers (c);
             insert into walpost.inbox select 'stock', 'young-' || n from generate_series(1, 10) n",
        )
        .await;
    // WHEN those older than a day go
    let inbox = inbox(Settings::default());
    let day = Duration::from_secs(24 * 3600);
    // THEN all of them are gone, and nothing else
    let deleted = inbox.prune(&database.client, day).await;
    assert_eq!(deleted.expect("pruned"), 4500);
    let left = "select count(*) filter (where consumer = 'stock'), count(*) from walpost.inbox";
    let left = database.rows(left, &[]).await;
    assert_eq!(
        (left[0].get::<_, i64>(0), left[0].get::<_, i64>(1)),
        (10, 4510)
    );
    assert_eq!(inbox.prune(&database.client, day).await.expect("pruned"), 0);
}

#[tokio::test]
async fn wrong_arguments_of_the_functions_are_named() {
    let database = database().await;
    for (call, argument) in [
        ("inbox_claim('', 'a')", "consumer"),
        ("inbox_claim(null, 'a')", "consumer"),
        ("inbox_claim('stock', '')", "id"),
        ("inbox_give_up('stock', null, 'why')", "id"),
    ] {
        let said = database
            .client
            .query(&format!("select walpost.{call}"), &[])
            .await;
        let said = said.expect_err(call);
        let said = said.as_db_error().expect("of the server");
        assert_eq!(
            (said.code().code(), said.column()),
            ("22023", Some(argument)),
            "{call}"
        );
    }
}

async fn subscribe(topic: &str) -> Consumer<Vec<u8>, TokioExecutor> {
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor);
    let pulsar = pulsar.build().await.expect("the local broker");
    let options = ConsumerOptions {
        initial_position: InitialPosition::Earliest,
        ..ConsumerOptions::default()
    };
    let consumer = pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription("stock")
        .with_subscription_type(SubType::Failover)
        .with_options(options);
    consumer.build().await.expect("a subscription")
}

#[tokio::test]
async fn a_consumer_that_is_dropped_anywhere_takes_every_order_once() {
    const ORDERS: i64 = 150;
    // GIVEN orders in a topic, one of them poison
    let database = database().await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;
    database
        .sql(&format!(
            "select walpost.emit('order', 'k-' || n % 7, 'T', to_json(1)) from generate_series(1, {ORDERS}) n;
             select walpost.emit('order', 'k-1', 'T', '\"poison\"');
             select walpost.emit('order', 'k-1', 'T', '1')"
        ))
        .await;
    let postgres = PostgresConfig::parse(Some(&database.socket_url), &|_| None).expect("a URL");
    let inbox = inbox(Settings {
        max_attempts: 2,
        retry_initial: Duration::from_millis(1),
        ..Settings::default()
    });
    // WHEN a consumer is cut off again and again, wherever it stands
    let all = || async { (taken(&database).await == ORDERS + 1).then_some(()) };
    let mut duplicates = 0;
    for round in 1_u64.. {
        let mut consumer = subscribe(&database.topic("order")).await;
        // Longer each time, so that a busy machine gets through as well.
        let patience = Duration::from_millis(100 * round);
        let heard = |_: &Message, outcome: Outcome| {
            duplicates += u32::from(outcome == Outcome::Duplicate);
        };
        let mut stock = Stock;
        let run = inbox.run(&postgres, &mut consumer, &mut stock, heard);
        let ended = tokio::time::timeout(patience, run).await;
        assert!(ended.is_err(), "it ends by being dropped only: {ended:?}");
        // The broker hands on at once what was not acknowledged; the crate does not tell it when a consumer is dropped.
        consumer.close().await.expect("closed");
        if round >= 5 && all().await.is_some() {
            break;
        }
        assert!(round < 50, "only {} are taken", taken(&database).await);
    }
    // THEN every order was taken once, by its id, and the poison one is set aside
    let by = "select count(distinct id), count(*) from stock, unnest(taken_by) id";
    let by = database.rows(by, &[]).await;
    assert_eq!(
        (by[0].get::<_, i64>(0), by[0].get::<_, i64>(1)),
        (ORDERS + 1, ORDERS + 1)
    );
    let aside = "select count(*) from walpost.inbox_poison where set_aside_at is not null";
    assert_eq!(database.rows(aside, &[]).await[0].get::<_, i64>(0), 1);
    println!("duplicates skipped: {duplicates}");
    walpost.stop().await;
}

#[tokio::test]
async fn the_python_example_takes_every_order_once_although_it_is_killed() {
    const ORDERS: i64 = 300;
    // GIVEN orders in a topic, one of them poison, and the stock in the example's own table
    let database = Database::create("inbox").await;
    database.init(&[], &[]).await;
    let (code, sql) = Command::walpost(["sql", "--inbox"]).run(DEADLINE).await;
    assert_eq!(code, 0, "{sql}");
    database.sql(&sql).await;
    database
        .sql("create table stock (item text primary key, taken bigint not null default 0)")
        .await;
    let walpost = database.start(&[]).await;
    let emit = |from: i64, upto: i64| {
        format!(
            "select walpost.emit('order', 'k-' || n % 7, 'T', json_build_object('item', 'i-' || n % 3, 'quantity', n))
             from generate_series({from}, {upto}) n"
        )
    };
    database.sql(&emit(1, ORDERS / 2)).await;
    database
        .sql("select walpost.emit('order', 'k-1', 'T', '{\"item\": null}')")
        .await;
    database.sql(&emit(ORDERS / 2 + 1, ORDERS)).await;
    // WHEN the example is killed while it works, and started again
    let example = || {
        let path = format!("{}/deploy/examples/inbox.py", env!("CARGO_MANIFEST_DIR"));
        let topic = database.topic("order");
        Command::program(Python::path(), ["-B", path.as_str(), topic.as_str()])
            .env("STOCK_DATABASE_URL", &database.url)
            .env("PULSAR_URL", &servers().pulsar_url)
    };
    let handled = "select count(*) from walpost.inbox";
    let count = async || database.rows(handled, &[]).await[0].get::<_, i64>(0);
    for kill in 1..=3 {
        let mut python = example().spawn();
        let goal = count().await + 30 * kill;
        eventually(DEADLINE, "the example to take some orders", async || {
            (count().await >= goal.min(ORDERS - 10)).then_some(())
        })
        .await;
        python.sigkill();
    }
    let mut python = example().spawn();
    eventually(DEADLINE, "all orders to be taken", async || {
        (count().await == ORDERS + 1).then_some(())
    })
    .await;
    python.sigterm();
    assert_eq!(python.wait_exit(DEADLINE).await, 0, "{}", python.output());
    // THEN what was ordered is what was taken, and the poison order is set aside
    let sums = "select sum(taken)::bigint from stock";
    assert_eq!(
        database.rows(sums, &[]).await[0].get::<_, i64>(0),
        ORDERS * (ORDERS + 1) / 2
    );
    let aside = "select attempts, reason, set_aside_at is not null from walpost.inbox_poison";
    let aside = database.rows(aside, &[]).await;
    assert_eq!(aside.len(), 1);
    assert_eq!(aside[0].get::<_, i32>(0), 5);
    assert!(
        aside[0].get::<_, &str>(1).contains("KeyError"),
        "the order has no quantity"
    );
    assert!(aside[0].get::<_, bool>(2));
    walpost.stop().await;
}
