//! System B's inbox: the work of a message is done once, whoever dies, from Rust and from Python.
#![allow(
    clippy::large_futures,
    reason = "the pulsar crate's futures are large; a test has the stack for them"
)]

use std::time::Duration;

use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio_postgres::Transaction;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use walpost::inbox::{Handler, HandlerError, Inbox, Message, Outcome, Settings};
use walpost::postgres::PostgresConfig;

use crate::support::{Command, Database, Python, Random, eventually, servers};

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

/// Has no work.
struct Nothing;

impl Handler for Nothing {
    async fn handle(&mut self, _: &Transaction<'_>, _: &Message) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// The file before ids had a source (functions shortened to what they did), and what was stored by it.
const EARLIER: &str = "
    create schema walpost;
    create table walpost.inbox (
        consumer text not null, id text not null, handled_at timestamptz not null default now(), primary key (consumer, id)
    );
    create index inbox_handled_at on walpost.inbox (consumer, handled_at, id);
    create table walpost.inbox_poison (
        consumer text not null, id text not null, topic text not null default '', message_id text not null default '', key text,
        payload bytea, properties json not null default '{}', attempts integer not null default 0, reason text not null,
        set_aside_at timestamptz, first_at timestamptz not null default now(), primary key (consumer, id)
    );
    create function walpost.inbox_claim(consumer text, id text) returns boolean language plpgsql as $$
    begin
        insert into walpost.inbox as i (consumer, id) values (inbox_claim.consumer, inbox_claim.id) on conflict do nothing;
        return found;
    end $$;
    create function walpost.inbox_failed(consumer text, id text, reason text, counted boolean default false) returns integer
        language sql begin atomic
        insert into walpost.inbox_poison as p (consumer, id, attempts, reason)
            values (inbox_failed.consumer, inbox_failed.id, 1, inbox_failed.reason)
            on conflict (consumer, id) do update set attempts = p.attempts + 1 returning p.attempts;
    end;
    create function walpost.inbox_give_up(consumer text, id text, reason text, topic text default '', message_id text default '',
        key text default null, payload bytea default null, properties json default '{}') returns boolean
        language sql as 'select true';
    create role $role;
    grant usage on schema walpost to $role;
    grant select, insert, update, delete on walpost.inbox, walpost.inbox_poison to $role;
    revoke execute on all functions in schema walpost from public;
    grant execute on all functions in schema walpost to $role;
    select walpost.inbox_claim('stock', '1'), walpost.inbox_claim('stock', '2'), walpost.inbox_failed('stock', '5', 'x');
    insert into walpost.inbox_poison (consumer, id, reason, set_aside_at) values ('stock', '2', 'x', now())";

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
async fn a_handler_that_goes_on_after_a_failed_statement_or_panics_or_breaks_a_deferred_constraint_has_failed()
 {
    struct Careless;
    impl Handler for Careless {
        async fn handle(
            &mut self,
            tx: &Transaction<'_>,
            message: &Message,
        ) -> Result<(), HandlerError> {
            tx.batch_execute("update stock set taken = taken + 1")
                .await?;
            match message.id.as_str() {
                "panics" => panic!("no {}", "shelf"),
                "defers" => {
                    let twice = "insert into shelf values (1), (1)";
                    tx.batch_execute(twice).await?;
                }
                _ => drop(tx.batch_execute("select 1 / 0").await),
            }
            Ok(())
        }
    }
    // GIVEN a consumer that tries three times, and a table whose constraint is checked at commit
    let database = database().await;
    database
        .sql("create table shelf (n int unique deferrable initially deferred)")
        .await;
    let mut client = database.connect().await;
    let inbox = inbox(Settings {
        max_attempts: 3,
        ..Settings::default()
    });
    // WHEN the handler swallows an error, panics, or leaves what cannot be committed
    for (id, why) in [
        ("swallows", "went on after a statement that failed"),
        ("panics", "panicked: no shelf"),
        ("defers", "duplicate key"),
    ] {
        for expected in [
            Outcome::Failed(1),
            Outcome::Failed(2),
            Outcome::SetAside,
            Outcome::Duplicate,
        ] {
            let outcome = inbox
                .handle(&mut client, &message(id, "1"), &mut Careless)
                .await;
            assert_eq!(outcome.expect("the database is there"), expected, "{id}");
        }
        // THEN these are failed attempts, with their reason
        let reason = "select reason from walpost.inbox_poison where id = $1";
        let rows = database.rows(reason, &[&id]).await;
        let reason: &str = rows[0].get(0);
        assert!(reason.contains(why), "{id}: {reason}");
    }
    // THEN no work is left of them
    assert_eq!(taken(&database).await, 0);
}

#[tokio::test]
async fn a_success_forgets_the_attempts_before_it() {
    // GIVEN a message that failed, and one that another process handled while it failed here
    let database = database().await;
    let mut client = database.connect().await;
    let inbox = inbox(Settings::default());
    let much = message("a", "5000");
    let outcome = inbox.handle(&mut client, &much, &mut Stock).await;
    assert_eq!(outcome.expect("the database is there"), Outcome::Failed(1));
    database
        .sql(
            "select walpost.inbox_claim('stock', 'b');
             select walpost.inbox_failed('stock', 'b', 'elsewhere')",
        )
        .await;
    // WHEN the one succeeds, and the other comes again
    for (id, expected) in [("a", Outcome::Handled), ("b", Outcome::Duplicate)] {
        let outcome = inbox
            .handle(&mut client, &message(id, "1"), &mut Stock)
            .await;
        assert_eq!(outcome.expect("the database is there"), expected);
    }
    // THEN nothing is kept of their failures
    let rows = database
        .rows("select id from walpost.inbox_poison", &[])
        .await;
    assert!(rows.is_empty());
    // THEN attempts begin anew when the id is forgotten and comes again
    database.sql("delete from walpost.inbox").await;
    let outcome = inbox.handle(&mut client, &much, &mut Stock).await;
    assert_eq!(outcome.expect("the database is there"), Outcome::Failed(1));
}

#[tokio::test]
async fn the_tables_of_an_earlier_version_are_brought_up_to_date() {
    // GIVEN tables and functions in their old shape, with a message set aside
    let database = database().await;
    database
        .sql(
            "drop function walpost.inbox_failed, walpost.inbox_give_up;
             alter table walpost.inbox_poison alter column properties type jsonb;
             create function walpost.inbox_failed(consumer text, id text, reason text) returns integer language sql
             begin atomic
                 insert into walpost.inbox_poison as p (consumer, id, attempts, reason)
                     values (inbox_failed.consumer, inbox_failed.id, 1, coalesce(inbox_failed.reason, 'unknown'))
                     on conflict (consumer, id) do update set attempts = p.attempts + 1, reason = excluded.reason
                     returning p.attempts;
             end;
             create function walpost.inbox_give_up(consumer text, id text, reason text, topic text default '',
                 message_id text default '', key text default null, payload bytea default null, properties jsonb default '{}')
                 returns boolean language sql as 'select true';
             insert into walpost.inbox_poison (consumer, id, reason, properties) values ('stock', 'a', 'x', '{\"id\": \"a\"}')",
        )
        .await;
    // WHEN this version's file is applied, and again
    for _ in 0..2 {
        Inbox::create(&database.client).await.expect("applied");
    }
    // THEN the column is json, its rows are there, and each function is there once
    let sql = "select pg_typeof(properties)::text, properties ->> 'id',
                      (select count(*) from pg_proc where pronamespace = 'walpost'::regnamespace and proname ~ '^inbox_')
               from walpost.inbox_poison";
    let rows = database.rows(sql, &[]).await;
    let found: (&str, &str, i64) = (rows[0].get(0), rows[0].get(1), rows[0].get(2));
    assert_eq!(found, ("json", "a", 3));
}

#[tokio::test]
async fn claims_grants_and_callers_of_an_earlier_version_hold_after_its_tables_are_brought_up_to_date()
 {
    // GIVEN the tables and functions before ids had a source; a role that may use them; a claim, one set aside, one tried once
    let database = Database::create("inbox").await;
    let role = format!("{}_consumer", database.name);
    let earlier = EARLIER.replace("$role", &role);
    database.sql(&earlier).await;
    // WHEN this version's file is applied, and again
    for _ in 0..2 {
        Inbox::create(&database.client).await.expect("applied");
    }
    // THEN that role still may, in the old way and in the new, and what was claimed counts for every source
    let calls = "select walpost.inbox_claim('stock', '1'), walpost.inbox_claim('stock', '1', 't'), walpost.inbox_claim('stock', '2', 't'),
                        walpost.inbox_claim('stock', '3'), walpost.inbox_claim('stock', '3', 't'),
                        walpost.inbox_claim('stock', '4', 't'), walpost.inbox_claim('stock', '4', 'u'), walpost.inbox_claim('stock', '4'),
                        walpost.inbox_failed('stock', '5', 'x') = 2 and walpost.inbox_failed('stock', '5', 'x', true) = 2";
    let mut client = database.connect().await;
    let set = format!("set role {role}");
    client.batch_execute(&set).await.expect("the role");
    let row = client.query_one(calls, &[]).await.expect("the grants");
    let said: Vec<bool> = (0..row.len()).map(|column| row.get(column)).collect();
    assert_eq!(
        said,
        [false, false, false, true, false, true, true, false, true]
    );
    // THEN others may not call what they might not call before
    let public = "select has_function_privilege('public', oid, 'execute') from pg_proc where proname = 'inbox_claim'";
    assert!(!database.rows(public, &[]).await[0].get::<_, bool>(0));
    // THEN the library skips what was claimed, and handles what was tried, of which nothing is left
    let inbox = inbox(Settings::default());
    for (id, expected) in [
        ("1", Outcome::Duplicate),
        ("2", Outcome::Duplicate),
        ("5", Outcome::Handled),
    ] {
        let outcome = inbox
            .handle(&mut client, &message(id, "1"), &mut Nothing)
            .await;
        assert_eq!(outcome.expect("handled"), expected, "{id}");
    }
    let left = "select id from walpost.inbox_poison where set_aside_at is null";
    assert!(database.rows(left, &[]).await.is_empty());
    drop(client);
    let drop_role = format!("drop owned by {role}; drop role {role}");
    database.sql(&drop_role).await;
}

#[tokio::test]
async fn two_tables_that_count_from_one_are_not_confused() {
    // GIVEN messages with the same numbers as ids in two topics, one of them partitioned
    let database = database().await;
    let mut client = database.connect().await;
    let inbox = inbox(Settings {
        max_attempts: 1,
        ..Settings::default()
    });
    let from = |id: &str, topic: &str, quantity: &str| Message {
        topic: topic.to_owned(),
        ..message(id, quantity)
    };
    let (orders, refunds) = (
        "persistent://public/default/order",
        "persistent://public/default/refund",
    );
    // WHEN each comes, and again, through another partition too; and one of them is poison
    for (topic, quantity, expected) in [
        (orders, "1", Outcome::Handled),
        (refunds, "x", Outcome::SetAside),
        (orders, "1", Outcome::Duplicate),
        (refunds, "1", Outcome::Duplicate),
        (
            "persistent://public/default/order-partition-7",
            "1",
            Outcome::Duplicate,
        ),
        ("persistent://public/default/return", "1", Outcome::Handled),
    ] {
        let outcome = inbox
            .handle(&mut client, &from("1", topic, quantity), &mut Stock)
            .await;
        // THEN each is handled or set aside once, whatever became of the other
        assert_eq!(outcome.expect("the database is there"), expected, "{topic}");
    }
    assert_eq!(taken(&database).await, 2);
    // THEN a UUID is one message, whatever topic brings it
    let uuid = "0198f6c2-7a11-7000-8000-0123456789ab";
    for (topic, expected) in [(orders, Outcome::Handled), (refunds, Outcome::Duplicate)] {
        let outcome = inbox
            .handle(&mut client, &from(uuid, topic, "1"), &mut Stock)
            .await;
        assert_eq!(outcome.expect("the database is there"), expected, "{topic}");
    }
    // THEN old claims of one topic go without those of another
    database.sql("update walpost.inbox set handled_at = now() - interval '2 days' where source like '%order'").await;
    let day = Duration::from_secs(24 * 3600);
    assert_eq!(inbox.prune(&database.client, day).await.expect("pruned"), 1);
    assert_eq!(
        database.rows("select from walpost.inbox", &[]).await.len(),
        3
    );
}

#[tokio::test]
async fn a_claim_without_source_and_one_with_are_never_both_new() {
    const CLAIM: &str = "select walpost.inbox_claim('stock', $1, $2)";
    const WAITING: &str = "select from pg_locks where locktype = 'advisory' and not granted and database = (select oid from pg_database where datname = current_database())";
    let source = "persistent://public/default/order";
    let database = database().await;
    let isolations = ["read committed", "repeatable read", "serializable"];
    for (number, (isolation, is_first_with)) in (0..).zip(
        isolations
            .iter()
            .flat_map(|isolation| [(isolation, false), (isolation, true)]),
    ) {
        let (first, second) = if is_first_with {
            (source, "")
        } else {
            ("", source)
        };
        // GIVEN a message that is claimed in one form, by a transaction that is still open
        let id = format!("{number}");
        let (one, two) = (database.connect().await, database.connect().await);
        one.batch_execute("begin").await.expect("a transaction");
        let claimed = one.query_one(CLAIM, &[&id, &first]).await.expect("claimed");
        assert!(claimed.get::<_, bool>(0));
        // WHEN another one claims it in the other form
        let begin = format!("begin isolation level {isolation}");
        two.batch_execute(&begin).await.expect("a transaction");
        let arguments: [&(dyn ToSql + Sync); 2] = [&id, &second];
        let mut claiming = Box::pin(two.query_one(CLAIM, &arguments));
        // THEN it waits for the first one's end
        let waits = eventually(DEADLINE, "it to wait", async || {
            (!database.rows(WAITING, &[]).await.is_empty()).then_some(())
        });
        tokio::select! {
            biased;
            claimed = &mut claiming => panic!("{isolation} did not wait: {claimed:?}"),
            () = waits => {}
        }
        one.batch_execute("commit").await.expect("committed");
        // THEN it is told that the message was handled, or is to be tried again, and is told then
        match claiming.await {
            Ok(claimed) => {
                assert_eq!(*isolation, "read committed");
                assert!(!claimed.get::<_, bool>(0), "{isolation}: both are new");
            }
            Err(error) => {
                assert_ne!(*isolation, "read committed");
                assert_eq!(
                    error.code(),
                    Some(&SqlState::T_R_SERIALIZATION_FAILURE),
                    "{error}"
                );
            }
        }
        two.batch_execute("rollback").await.expect("rolled back");
        let again = two
            .query_one(CLAIM, &[&id, &second])
            .await
            .expect("claimed");
        assert!(!again.get::<_, bool>(0), "{isolation}: both are new");

        // WHEN the second one's snapshot is older than the first one's end
        let id = format!("{number}-committed");
        two.batch_execute(&format!("{begin}; select 1"))
            .await
            .expect("a snapshot");
        one.query_one(CLAIM, &[&id, &first]).await.expect("claimed");
        let claimed = two.query_one(CLAIM, &[&id, &second]).await;
        // THEN a claim that names the source does not pass it
        if *isolation == "read committed" || !is_first_with {
            assert!(
                !claimed.is_ok_and(|claimed| claimed.get::<_, bool>(0)),
                "{isolation}: both are new"
            );
        }
        two.batch_execute("rollback").await.expect("rolled back");
    }
    // THEN claims of two sources do not wait for each other
    let (one, two) = (database.connect().await, database.connect().await);
    for (client, source) in [(&one, source), (&two, "persistent://public/default/refund")] {
        client
            .batch_execute("begin; set local lock_timeout = '20s'")
            .await
            .expect("a transaction");
        let claimed = client
            .query_one(CLAIM, &[&"both", &source])
            .await
            .expect("claimed");
        assert!(claimed.get::<_, bool>(0), "{source}");
    }
    for client in [&one, &two] {
        client.batch_execute("commit").await.expect("committed");
    }
    let stored = "select count(*) from walpost.inbox";
    assert_eq!(
        database.rows(stored, &[]).await[0].get::<_, i64>(0),
        2 * 6 + 2
    );
}

#[tokio::test]
async fn without_its_functions_the_inbox_says_what_to_run() {
    let database = database().await;
    database
        .sql("drop function walpost.inbox_claim(text, text, text)")
        .await;
    let mut client = database.connect().await;
    let outcome = inbox(Settings::default())
        .handle(&mut client, &message("a", "1"), &mut Nothing)
        .await;
    let said = outcome.expect_err("no function").report();
    assert!(said.contains("walpost sql --inbox"), "{said}");
}

#[tokio::test]
async fn what_is_not_the_messages_fault_is_no_attempt() {
    struct Breaks(String);
    impl Handler for Breaks {
        async fn handle(&mut self, tx: &Transaction<'_>, _: &Message) -> Result<(), HandlerError> {
            tx.batch_execute(&self.0).await?;
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
    let raised = [
        "08006", "25006", "40001", "40P01", "53100", "53200", "53300", "55P03", "57014", "57P01",
        "57P03", "58030",
    ];
    let raised = raised
        .map(|code| format!("do $$ begin raise exception 'x' using errcode = '{code}'; end $$"));
    let real = [
        "select pg_terminate_backend(pg_backend_pid())",
        "select pg_cancel_backend(pg_backend_pid()); select pg_sleep(60)",
        "set local statement_timeout = 10; select pg_sleep(60)",
        "set transaction read only; update stock set taken = 0",
    ];
    for sql in real.iter().map(ToString::to_string).chain(raised) {
        let mut client = database.connect().await;
        let outcome = inbox
            .handle(&mut client, &message("a", "1"), &mut Breaks(sql.clone()))
            .await;
        // THEN it is to be tried again, and nothing is booked
        assert!(outcome.expect_err(&sql).is_temporary(), "{sql}");
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
        ("inbox_claim('stock', 'a', null)", "source"),
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
    subscribe_at(&servers().pulsar_url, topic).await
}

async fn subscribe_at(pulsar_url: &str, topic: &str) -> Consumer<Vec<u8>, TokioExecutor> {
    let pulsar = Pulsar::builder(pulsar_url, TokioExecutor);
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

/// Takes stock by what the inbox stores as the id.
struct Take;

impl Handler for Take {
    async fn handle(
        &mut self,
        tx: &Transaction<'_>,
        message: &Message,
    ) -> Result<(), HandlerError> {
        let taken = Message {
            id: message.inbox_id().into_owned(),
            ..message.clone()
        };
        Stock.handle(tx, &taken).await
    }
}

#[tokio::test]
async fn what_the_tables_cannot_hold_is_handled_once_or_set_aside_like_any_other() {
    // GIVEN messages whose ids are empty, have a NUL or are too long for an index, alike but for their ends, each of them twice; and
    // poison with NUL wherever a message can have it
    let database = database().await;
    let mut random = Random::new(7);
    let letters = random.bytes(4000).into_iter();
    let long: String = letters.map(|byte| char::from(b'a' + byte % 26)).collect();
    let ids = [
        "\0",
        "a\0",
        "a\0b",
        &format!("{long}1"),
        &format!("{long}2"),
    ];
    let topic = database.topic("held");
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor);
    let pulsar = pulsar.build().await.expect("the local broker");
    let producer = pulsar.producer().with_topic(&topic);
    let mut producer = producer.build().await.expect("a producer");
    let mut sent = Vec::new();
    for (id, payload) in [("", "1"), ("", "1"), ("poison\0", "x")]
        .into_iter()
        .chain(ids.map(|id| (id, "1")))
        .chain(ids.map(|id| (id, "1")))
        .chain([("last", "1")])
    {
        let message = pulsar::producer::Message {
            payload: payload.as_bytes().to_vec(),
            partition_key: Some("k\0".to_owned()),
            properties: [("id", id), ("n\0", "v\0")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        let receipt = producer.send_non_blocking(message).await.expect("sent");
        sent.push((id, receipt.await.expect("a receipt")));
    }
    // WHEN they are consumed
    let postgres = PostgresConfig::parse(Some(&database.socket_url), &|_| None).expect("a URL");
    let inbox = inbox(Settings {
        max_attempts: 2,
        retry_initial: Duration::from_millis(1),
        ..Settings::default()
    });
    let mut consumer = subscribe(&topic).await;
    let (done, mut is_done) = tokio::sync::mpsc::unbounded_channel();
    let mut outcomes = Vec::new();
    let heard = |message: &Message, outcome| {
        outcomes.push(outcome);
        if message.id == "last" {
            done.send(()).expect("somebody waits");
        }
    };
    let mut take = Take;
    let ended = tokio::select! {
        ended = inbox.run(&postgres, &mut consumer, &mut take, heard) => Some(ended),
        _ = is_done.recv() => None,
        () = tokio::time::sleep(DEADLINE) => panic!("the last one did not come"),
    };
    consumer.close().await.expect("closed");
    // THEN each is handled once, those without an id each time
    assert!(ended.is_none(), "{ended:?}");
    let expected: Vec<Outcome> = [Outcome::Handled; 2]
        .into_iter()
        .chain([Outcome::SetAside])
        .chain([Outcome::Handled; 5])
        .chain([Outcome::Duplicate; 5])
        .chain([Outcome::Handled])
        .collect();
    assert_eq!(outcomes, expected);
    assert_eq!(taken(&database).await, 8);
    // THEN the poison one is kept whole
    let aside = "select key, properties::text, topic from walpost.inbox_poison where set_aside_at is not null";
    let aside = database.rows(aside, &[]).await;
    let kept = [0, 1, 2].map(|column| aside[0].get::<_, &str>(column));
    let properties = r#"{"id":"poison\u0000","n\u0000":"v\u0000"}"#;
    assert_eq!(kept, ["k\\0", properties, topic.as_str()]);
    let place = |(_, receipt): &(&str, pulsar::message::proto::CommandSendReceipt)| {
        let place = receipt.message_id.as_ref().expect("a place");
        format!("{topic} {}:{}:-1", place.ledger_id, place.entry_id)
    };
    let without = "select count(*) from walpost.inbox where id = any ($1)";
    let places: Vec<String> = sent[..2].iter().map(place).collect();
    assert_eq!(
        database.rows(without, &[&places]).await[0].get::<_, i64>(0),
        2
    );
}

/// Names what the child below is to do.
const CHILD_TOPIC: &str = "INBOX_CHILD_TOPIC";
const CHILD_DATABASE: &str = "INBOX_CHILD_DATABASE";
const CHILD_PULSAR: &str = "INBOX_CHILD_PULSAR";

#[tokio::test]
#[ignore = "a process of its own, which dies of a message; the next test starts it"]
async fn a_child_that_a_message_kills() {
    struct Mortal;
    impl Handler for Mortal {
        async fn handle(
            &mut self,
            tx: &Transaction<'_>,
            message: &Message,
        ) -> Result<(), HandlerError> {
            if message.payload.starts_with(b"\"") {
                std::process::abort();
            }
            Stock.handle(tx, message).await
        }
    }
    let told = |name| std::env::var(name).expect(name);
    let postgres = PostgresConfig::parse(Some(&told(CHILD_DATABASE)), &|_| None).expect("a URL");
    let mut consumer = subscribe_at(&told(CHILD_PULSAR), &told(CHILD_TOPIC)).await;
    let settings = Settings {
        max_attempts: 3,
        ..Settings::default()
    };
    let (inbox, mut mortal) = (inbox(settings), Mortal);
    let run = inbox.run(&postgres, &mut consumer, &mut mortal, |_, _| ());
    panic!("{:?}", run.await);
}

#[tokio::test]
async fn a_message_that_kills_its_process_is_set_aside_after_its_attempts() {
    // GIVEN orders, in one batch and in several, and one that kills whoever handles it
    let database = database().await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;
    for killer in ["1", "\"kills\"", "1"] {
        let orders =
            "select walpost.emit('order', 'k', 'T', o::json) from unnest(array['1', $1, '1']) o";
        database.rows(orders, &[&killer]).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    // WHEN the consumer is started again whenever it has died
    let child = || {
        let program = std::env::current_exe().expect("this program");
        let name = "inbox::a_child_that_a_message_kills";
        let arguments = ["--exact", name, "--ignored", "--nocapture"];
        Command::program(program.to_str().expect("a path"), arguments)
            .env(CHILD_TOPIC, database.topic("order"))
            .env(CHILD_DATABASE, &database.socket_url)
            .env(CHILD_PULSAR, &servers().pulsar_url)
            .spawn()
    };
    let mut deaths = 0;
    let mut running = child();
    eventually(DEADLINE, "all other orders to be taken", async || {
        if let Some(status) = running.try_exit() {
            deaths += 1;
            let is_killed = status.code().is_none();
            assert!(is_killed && deaths < 9, "{status}: {}", running.output());
            running = child();
        }
        (taken(&database).await == 8).then_some(())
    })
    .await;
    // THEN it is set aside after its attempts; the first death, in the middle of a run, was not seen
    let aside =
        "select attempts, reason, payload, set_aside_at is not null from walpost.inbox_poison";
    let aside = database.rows(aside, &[]).await;
    assert_eq!((aside.len(), deaths), (1, 4));
    let kept: (i32, &str, &[u8], bool) = (
        aside[0].get(0),
        aside[0].get(1),
        aside[0].get(2),
        aside[0].get(3),
    );
    assert_eq!(
        kept,
        (
            3,
            "the process ended during the attempt",
            &b"\"kills\""[..],
            true
        )
    );
    running.sigkill();
    walpost.stop().await;
}

#[tokio::test]
async fn a_run_that_is_dropped_in_the_first_message_counts_no_attempt() {
    struct Waits(tokio::sync::mpsc::UnboundedSender<()>);
    impl Handler for Waits {
        async fn handle(&mut self, _: &Transaction<'_>, _: &Message) -> Result<(), HandlerError> {
            self.0.send(())?;
            std::future::pending().await
        }
    }
    // GIVEN a consumer that tries once, and is in the middle of its first message
    let database = database().await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[]).await;
    database
        .sql("select walpost.emit('order', 'k', 'T', '1')")
        .await;
    let postgres = PostgresConfig::parse(Some(&database.socket_url), &|_| None).expect("a URL");
    let inbox = inbox(Settings {
        max_attempts: 1,
        ..Settings::default()
    });
    let mut consumer = subscribe(&database.topic("order")).await;
    let (begun, mut has_begun) = tokio::sync::mpsc::unbounded_channel();
    let mut waits = Waits(begun);
    let counted = "select coalesce(sum(attempts), 0) from walpost.inbox_poison";
    let counted = async || database.rows(counted, &[]).await[0].get::<_, i64>(0);
    // Asked while it is at work: `select!` drops the run before it comes to an arm.
    let at_work = async {
        has_begun.recv().await;
        counted().await
    };
    tokio::select! {
        ended = inbox.run(&postgres, &mut consumer, &mut waits, |_, _| ()) => panic!("{ended:?}"),
        counted = at_work => assert_eq!(counted, 1, "should it die now"),
        () = tokio::time::sleep(DEADLINE) => panic!("the handler was not called"),
    }
    // WHEN the run is dropped
    consumer.close().await.expect("closed");
    // THEN the attempt does not count any more, and the next run handles the message
    eventually(DEADLINE, "the count to be taken back", async || {
        (counted().await == 0).then_some(())
    })
    .await;
    let mut consumer = subscribe(&database.topic("order")).await;
    let (mut stock, is_taken) = (
        Stock,
        eventually(DEADLINE, "the order to be taken", async || {
            (taken(&database).await == 1).then_some(())
        }),
    );
    tokio::select! {
        ended = inbox.run(&postgres, &mut consumer, &mut stock, |_, _| ()) => panic!("{ended:?}"),
        () = is_taken => {}
    }
    consumer.close().await.expect("closed");
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
    python.wait_for_line("consuming", DEADLINE).await;
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

/// The example, with work that goes wrong.
const WORK: &str = r#"
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import inbox, psycopg
inbox.MAX_ATTEMPTS = 3
def work(connection, message):
    if message.data() == b"kills":
        os.abort()
    connection.execute("update stock set taken = taken + 1")
    if message.data().startswith(b"swallows"):
        try:
            connection.execute("select 1 / 0")
        except psycopg.Error:
            pass
inbox.take_stock = work
inbox.main()
"#;

#[tokio::test]
async fn the_python_example_counts_deaths_and_swallowed_errors_as_attempts() {
    // GIVEN an order whose work goes on after a statement that failed, one that kills its process, and NUL in an id and a key
    let database = database().await;
    let topic = database.topic("order");
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor);
    let pulsar = pulsar.build().await.expect("the local broker");
    let producer = pulsar.producer().with_topic(&topic);
    let mut producer = producer.build().await.expect("a producer");
    for id in ["1", "swallows\0", "2", "kills", "3"] {
        let message = pulsar::producer::Message {
            payload: id.as_bytes().to_vec(),
            partition_key: Some("k\0".to_owned()),
            properties: [("id".to_owned(), id.to_owned())].into(),
            ..Default::default()
        };
        let receipt = producer.send_non_blocking(message).await.expect("sent");
        receipt.await.expect("a receipt");
    }
    // WHEN the example, with such work, is started again whenever it has died
    let example = || {
        let folder = format!("{}/deploy/examples", env!("CARGO_MANIFEST_DIR"));
        let arguments = ["-B", "-c", WORK, folder.as_str(), topic.as_str()];
        Command::program(Python::path(), arguments)
            .env("STOCK_DATABASE_URL", &database.url)
            .env("PULSAR_URL", &servers().pulsar_url)
            .spawn()
    };
    let mut deaths = 0;
    let mut python = example();
    eventually(DEADLINE, "the orders to be taken", async || {
        if let Some(status) = python.try_exit() {
            deaths += 1;
            let is_killed = status.code().is_none();
            assert!(is_killed && deaths < 9, "{status}: {}", python.output());
            python = example();
        }
        (taken(&database).await == 3).then_some(())
    })
    .await;
    python.wait_for_line("consuming", DEADLINE).await;
    python.sigterm();
    assert_eq!(python.wait_exit(DEADLINE).await, 0, "{}", python.output());
    // THEN both are set aside after their attempts; the first death, in the middle of a run, was not seen
    assert_eq!(deaths, 4);
    let aside = "select id, key, attempts, reason, set_aside_at is not null from walpost.inbox_poison order by payload";
    let aside = database.rows(aside, &[]).await;
    assert_eq!(aside.len(), 2);
    for (row, id, why) in [
        (&aside[0], "kills", "process ended"),
        (&aside[1], "walpost-sha256:", "InFailedSqlTransaction"),
    ] {
        let kept: (&str, &str, i32, bool) = (row.get(0), row.get(1), row.get(2), row.get(4));
        assert!(kept.0.starts_with(id), "{kept:?}");
        assert_eq!((kept.1, kept.2, kept.3), ("k\\0", 3, true));
        let reason: &str = row.get(3);
        assert!(reason.contains(why), "{reason}");
    }
}

/// The example, with work that fails for reasons that are not the order's, each once, before it succeeds.
const DISTURBED: &str = r#"
import sys
sys.path.insert(0, sys.argv.pop(1))
import inbox
inbox.MAX_ATTEMPTS = 1
codes = ["57014", "40001", "40P01", "55P03", "53100", "53200", "25006", "58030", "57P01"]
disturbances = [f"do $$ begin raise exception 'x' using errcode = '{code}'; end $$" for code in codes] + [
    "set local statement_timeout = 10; select pg_sleep(60)",
    "select pg_cancel_backend(pg_backend_pid()); select pg_sleep(60)",
    "select pg_terminate_backend(pg_backend_pid())",
]
inbox.time.sleep = lambda pause: None
def work(connection, message):
    connection.execute("update stock set taken = taken + 1")
    if disturbances:
        try:
            connection.execute(disturbances.pop())
        except inbox.psycopg.Error as error:
            raise ValueError("wrapped, as by a library") from error
inbox.take_stock = work
inbox.main()
"#;

#[tokio::test]
async fn the_python_example_counts_nothing_that_is_not_the_messages_fault() {
    // GIVEN an order that an earlier version has claimed, and two new ones
    let database = database().await;
    let topic = database.topic("order");
    let pulsar = Pulsar::builder(&servers().pulsar_url, TokioExecutor);
    let pulsar = pulsar.build().await.expect("the local broker");
    let producer = pulsar.producer().with_topic(&topic);
    let mut producer = producer.build().await.expect("a producer");
    let uuid = "0198f6c2-7a11-7000-8000-0123456789ab";
    database
        .sql("insert into walpost.inbox (consumer, id) values ('stock', '1')")
        .await;
    for id in ["1", "2", uuid] {
        let message = pulsar::producer::Message {
            payload: id.as_bytes().to_vec(),
            partition_key: Some("k".to_owned()),
            properties: [("id".to_owned(), id.to_owned())].into(),
            ..Default::default()
        };
        let receipt = producer.send_non_blocking(message).await.expect("sent");
        receipt.await.expect("a receipt");
    }
    // WHEN everything but the order's own fault comes between, and an order that fails once is set aside
    let folder = format!("{}/deploy/examples", env!("CARGO_MANIFEST_DIR"));
    let arguments = ["-B", "-c", DISTURBED, folder.as_str(), topic.as_str()];
    let mut python = Command::program(Python::path(), arguments)
        .env("STOCK_DATABASE_URL", &database.url)
        .env("PULSAR_URL", &servers().pulsar_url)
        .spawn();
    // Long: it starts a Python, and a session for each lost one.
    python
        .wait_for_line(&format!("settled {uuid}"), 3 * DEADLINE)
        .await;
    // THEN each new order is taken once, and none counts as failed
    assert_eq!(taken(&database).await, 2, "{}", python.output());
    let disturbed = python.output().matches("not the order's fault").count();
    assert_eq!(disturbed, 12, "{}", python.output());
    let poison = database.rows("select from walpost.inbox_poison", &[]).await;
    assert!(poison.is_empty(), "{}", python.output());
    // THEN a number belongs to its topic, and a UUID to none
    let claims = "select id, source from walpost.inbox order by id";
    let claims = database.rows(claims, &[]).await;
    let claims: Vec<(&str, &str)> = claims.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(claims, [(uuid, ""), ("1", ""), ("2", topic.as_str())]);
    python.sigterm();
    assert_eq!(python.wait_exit(DEADLINE).await, 0, "{}", python.output());
}
