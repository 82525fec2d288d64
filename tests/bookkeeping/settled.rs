//! The snapshot after a slot's making waits for every transaction that ran while it was made.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::pin::pin;
use std::process::Stdio;

use walpost::scanner::slot_maker::settled;

use crate::support::{Database, Servers, eventually, on_each_major};
use crate::{DEADLINE, POLL, PUBLISH, arrived, insert, make_slot_by_hand};

/// An outbox without a slot, and a transaction that is open with a row.
async fn with_open_transaction(major: i32) -> (Database, tokio_postgres::Client) {
    let database = Database::create_on_major(major, "settled").await;
    database.init(&[], &[POLL]).await;
    let open = database.connect().await;
    open.batch_execute("BEGIN").await.expect("a transaction");
    insert(&open, "row").await;
    (database, open)
}

async fn is_visible(database: &Database, snapshot: &str) -> bool {
    let sql = "SELECT pg_visible_in_snapshot(txid, $1::text::pg_snapshot) FROM walpost.outbox";
    database.rows(sql, &[&snapshot]).await[0].get(0)
}

/// Waits for more statements of that session than taking a snapshot needs where there is nothing to wait for.
async fn looks_again_and_again(database: &Database, session: i32) {
    let sql = "SELECT query_start::text FROM pg_stat_activity WHERE pid = $1";
    let mut seen = BTreeSet::new();
    eventually(DEADLINE, "looks at the open transactions", async || {
        let rows = database.rows(sql, &[&session]).await;
        seen.insert(rows.first()?.get::<_, String>(0));
        (seen.len() > 6).then_some(())
    })
    .await;
}

async fn waits_for_open_transactions(major: i32) {
    // GIVEN a transaction that is open
    let (database, open) = with_open_transaction(major).await;

    // WHEN a snapshot is asked for THEN it is not taken before that has ended
    let client = database.connect().await;
    let session = client.query_one("SELECT pg_backend_pid()", &[]).await;
    let session = session.expect("a row").get(0);
    let mut taking = pin!(settled(&client));
    tokio::select! {
        _ = taking.as_mut() => panic!("it did not wait"),
        () = looks_again_and_again(&database, session) => {}
    }

    // AND then it shows its rows
    open.batch_execute("COMMIT").await.expect("it commits");
    let snapshot = tokio::time::timeout(DEADLINE, taking).await;
    let snapshot = snapshot.expect("an end").expect("a snapshot");
    assert!(is_visible(&database, &snapshot).await);
}

async fn are_named(major: i32) {
    let (database, open) = with_open_transaction(major).await;
    let row = &open.query("SELECT pg_backend_pid()::text", &[]).await;
    let pid: String = row.as_ref().expect("a row")[0].get(0);
    let client = database.connect().await;
    let now = walpost::postgres::slot::next_transaction(&client).await;
    let now = now.expect("a transaction id");
    let named = walpost::postgres::slot::still_running(&client, &now).await;
    let named = named.expect("names");
    let ours = format!("process {pid} (");
    assert!(
        named.iter().any(|name| name.starts_with(&ours)),
        "{named:?}"
    );
    open.batch_execute("COMMIT").await.expect("it commits");
    let named = walpost::postgres::slot::still_running(&client, &now).await;
    let named = named.expect("names");
    assert!(
        !named.iter().any(|name| name.starts_with(&ours)),
        "{named:?}"
    );
}

async fn the_file_waits(major: i32) {
    // GIVEN the file as far as the slot
    let database = Database::create_on_major(major, "settled").await;
    database.init(&[], &[POLL]).await;
    let sql = include_str!("../../sql/11_slot.sql");
    let sql = sql.replace("/*:slot*/ 'walpost'", &format!("'{}'", database.slot));
    let (making, rest) = sql.split_once("-- The snapshot after").expect("the place");
    let rest = format!("--{rest}");
    let mut psql = std::process::Command::new("psql")
        .args(["-X", "-q", "-o", "/dev/null", "-v", "ON_ERROR_STOP=1"])
        .args(["-d", &database.socket_url, "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("psql is installed with Postgres");
    let mut input = psql.stdin.take().expect("piped");
    input.write_all(making.as_bytes()).expect("psql reads");
    eventually(DEADLINE, "the slot", async || {
        database.confirmed_flush_lsn(&database.slot).await
    })
    .await;

    // WHEN a transaction is open when it is there
    let open = database.connect().await;
    open.batch_execute("BEGIN").await.expect("a transaction");
    insert(&open, "row").await;
    input.write_all(rest.as_bytes()).expect("psql reads");
    drop(input);
    eventually(DEADLINE, "the file to wait", async || {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;

    // THEN it goes on behind its end, and the snapshot shows its row
    open.batch_execute("COMMIT").await.expect("it commits");
    eventually(DEADLINE, "psql to end", async || {
        psql.try_wait()
            .expect("a child")
            .map(|status| assert!(status.success()))
    })
    .await;
    let sql = "SELECT scan_upto::text FROM walpost.progress WHERE confirmed_lsn IS NOT NULL";
    let upto: String = database.rows(sql, &[]).await[0].get(0);
    assert!(is_visible(&database, &upto).await);
}

async fn an_unknown_slot_has_passed_a_commit_that_is_not_visible(major: i32) {
    // GIVEN a server whose commits wait for a standby that does not come, if they do not say otherwise
    let own = Servers::own(
        &format!("settled-standby-{major}"),
        &["--postgres", &major.to_string(), "--no-pulsar"],
    );
    let database = Database::create_on(&own, "settled").await;
    database.init(&[], &[POLL]).await;
    database.sql(PUBLISH).await;
    make_slot_by_hand(&database).await;
    let patient = database.connect().await;
    database
        .sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        .await;
    database.sql("SELECT pg_reload_conf()").await;
    database.sql("SET synchronous_commit = local").await;
    eventually(DEADLINE, "the setting", async || {
        let shown = database.rows("SHOW synchronous_standby_names", &[]).await;
        (shown[0].get::<_, &str>(0) == "nobody").then_some(())
    })
    .await;
    // AND a row whose commit record is written and that nobody sees yet
    let waiting = tokio::spawn(async move { insert(&patient, "row").await });
    eventually(DEADLINE, "the commit to wait", async || {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'SyncRep'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    let none = database.rows("SELECT FROM walpost.outbox", &[]).await;
    assert!(none.is_empty(), "the row is visible");

    // WHEN a slot that walpost does not know stands beyond it, and walpost runs
    let advance = "SELECT pg_replication_slot_advance($1::text::name, pg_current_wal_flush_lsn())";
    database.rows(advance, &[&database.slot]).await;
    // (With it on the comparison of table and stream finds the row.)
    let alone = ("WALPOST_RECONCILE", "off");
    let mut walpost = database.walpost(&["run"], &[alone]).spawn();
    eventually(DEADLINE, "walpost to wait, or to stream", async || {
        let said = walpost.output();
        (said.contains("waiting for transactions") || said.contains("streaming slot")).then_some(())
    })
    .await;

    // THEN the row arrives once it is visible
    database
        .sql("ALTER SYSTEM RESET synchronous_standby_names")
        .await;
    database.sql("SELECT pg_reload_conf()").await;
    waiting.await.expect("the commit ends");
    walpost.wait_for_line("streaming slot", DEADLINE).await;
    insert(&database.client, "later").await;
    let rows = arrived(&database, &["row", "later"]).await;
    assert_eq!(rows.len(), 2, "{rows:?}");
    walpost.stop().await;
}

on_each_major! {
    the_snapshot_after_a_slots_making_waits_for_transactions_that_are_open: waits_for_open_transactions();
    the_transactions_that_are_waited_for_are_named: are_named();
    the_file_of_sql_waits_as_well: the_file_waits();
    a_row_whose_commit_an_unknown_slot_has_passed_before_it_is_visible_arrives: an_unknown_slot_has_passed_a_commit_that_is_not_visible();
}
