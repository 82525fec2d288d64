//! What holds up the making of a slot is named while it waits: prepared transactions and sessions.

use super::DEADLINE;
use super::support::{Database, Servers};

/// GIVEN a prepared transaction of another database and an idle session's one WHEN a slot is made THEN `check` names both, `init` names both
/// while it waits, and so does `run` with a slot that was lost; and none shows a statement's text.
async fn are_named(major: &str) {
    let servers = Servers::own(
        &format!("sessions-held-{major}"),
        &["--postgres", major, "--no-pulsar"],
    );
    let other = Database::create_on(&servers, "other").await;
    other
        .sql("ALTER SYSTEM SET max_prepared_transactions = 4")
        .await;
    servers.stop_postgres();
    servers.start();
    let prepared = other.connect().await;
    prepared
        .batch_execute("CREATE TABLE t (n int)")
        .await
        .expect("a table");
    prepared
        .batch_execute("BEGIN; INSERT INTO t VALUES (4711); PREPARE TRANSACTION 'left ''behind'")
        .await
        .expect("a prepared transaction");
    let idle = other.connect().await;
    idle.batch_execute("SET application_name = 'forgetful'")
        .await
        .expect("a name");
    idle.batch_execute("BEGIN; INSERT INTO t VALUES (4712)")
        .await
        .expect("a transaction");
    let database = Database::create_on(&servers, "held").await;
    let pid: i32 = idle
        .query_one("SELECT pg_backend_pid()", &[])
        .await
        .expect("a pid")
        .get(0);
    let names = [
        "prepared transaction 'left ''behind' (database other_".to_owned(),
        "ROLLBACK PREPARED 'left ''behind';".to_owned(),
        format!("process {pid} (application forgetful, database other_"),
        "idle in transaction, for ".to_owned(),
        format!("pg_terminate_backend({pid})"),
    ];

    // WHEN init waits: before there is a table.
    let mut init = database.walpost(&["init", "--roles"], &[]).spawn();
    let said = init.wait_for_line("the slot waits", DEADLINE).await;
    for name in &names {
        assert!(said.contains(name), "no {name} in: {said}");
    }
    let (_, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    assert!(said.contains("warn  transactions"), "{said}");
    for name in &names {
        assert!(said.contains(name), "no {name} in: {said}");
    }
    assert!(!said.contains("4711") && !said.contains("INSERT"), "{said}");
    prepared
        .batch_execute("ROLLBACK PREPARED 'left ''behind'")
        .await
        .expect("it is there");
    idle.batch_execute("COMMIT").await.expect("it is there");
    assert_eq!(init.wait_exit(DEADLINE).await, 0, "{}", init.output());

    // WHEN run makes a slot that was lost, as a role that sees less of others
    database.let_run().await;
    database
        .rows(
            "SELECT pg_drop_replication_slot($1::text::name)",
            &[&database.slot],
        )
        .await;
    prepared
        .batch_execute("BEGIN; INSERT INTO t VALUES (4711); PREPARE TRANSACTION 'again'")
        .await
        .expect("a prepared transaction");
    idle.batch_execute("BEGIN; INSERT INTO t VALUES (4712)")
        .await
        .expect("a transaction");
    let mut walpost = database.walpost(&["run"], &[]).spawn();
    let said = walpost.wait_for_line("the slot waits", DEADLINE).await;
    for name in [
        "prepared transaction 'again'".to_owned(),
        format!("process {pid} (application forgetful, database other_"),
        "its age is not shown to this role".to_owned(),
    ] {
        assert!(said.contains(&name), "no {name} in: {said}");
    }
    prepared
        .batch_execute("COMMIT PREPARED 'again'")
        .await
        .expect("it is there");
    idle.batch_execute("COMMIT").await.expect("it is there");
    walpost.wait_for_line("streaming", DEADLINE).await;
    walpost.stop().await;
}

#[tokio::test]
async fn transactions_that_hold_up_a_slot_are_named_on_14() {
    are_named("14").await;
}

#[tokio::test]
async fn transactions_that_hold_up_a_slot_are_named_on_15() {
    are_named("15").await;
}

#[tokio::test]
async fn transactions_that_hold_up_a_slot_are_named_on_18() {
    are_named("18").await;
}
