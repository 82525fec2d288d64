//! `walpost init` as an upgrade, beside an application that writes and others that look.

use super::support::eventually;
use super::{DEADLINE, Database, init, walpost};

#[tokio::test]
async fn init_that_waits_for_a_reader_of_progress_holds_no_lock_that_writers_of_the_outbox_wait_for()
 {
    // GIVEN what an earlier version left, and somebody who reads walpost.progress and does not end
    let database = Database::create("upgrade").await;
    init(&database, &[]).await;
    database
        .sql(
            "DROP TRIGGER walpost_refuse_update ON walpost.outbox;
             ALTER TABLE walpost.progress DROP COLUMN catalog, DROP COLUMN timeline",
        )
        .await;
    let reader = database.connect().await;
    let begun = reader
        .batch_execute(
            "SET application_name = 'a dump'; BEGIN; SELECT count(*) FROM walpost.progress",
        )
        .await;
    begun.expect("a transaction");

    // WHEN init waits for it
    let url = &database.url;
    let mut upgrade = super::Command::walpost(["init"])
        .env("WALPOST_POSTGRES_URL", url)
        .env("WALPOST_SLOT", &database.slot)
        .spawn();
    let waiting = "SELECT coalesce(array_agg(l.mode::text) FILTER (WHERE l.relation = 'walpost.outbox'::regclass AND l.mode <> 'AccessShareLock'), '{}')
                   FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
                   WHERE a.application_name = 'walpost init' AND a.datname = current_database() AND a.wait_event = 'relation'
                   HAVING count(*) > 0";
    let locks = eventually(DEADLINE, "init to wait for the reader", async || {
        let rows = database.rows(waiting, &[]).await;
        rows.first().map(|row| row.get::<_, Vec<String>>(0))
    })
    .await;

    // THEN it has no lock on the outbox but that of the publication, which holds up no writer
    let held_up = ["RowExclusiveLock", "ShareUpdateExclusiveLock"];
    assert!(
        locks.iter().all(|mode| held_up.contains(&&**mode)),
        "{locks:?}"
    );

    // AND it gives up after a while, changes nothing, and names the reader with what ends it
    assert_eq!(
        upgrade.wait_exit(DEADLINE).await,
        75,
        "{}",
        upgrade.output()
    );
    let said = upgrade.output();
    let row = reader.query_one("SELECT pg_backend_pid()", &[]).await;
    let pid: i32 = row.expect("a row").get(0);
    for expected in [
        format!("process {pid} (application a dump, "),
        format!("pg_terminate_backend({pid})"),
        "walpost.progress".to_owned(),
    ] {
        assert!(said.contains(&expected), "no {expected:?} in: {said}");
    }
    let trigger = "SELECT FROM pg_trigger WHERE tgname = 'walpost_refuse_update'";
    assert!(database.rows(trigger, &[]).await.is_empty());

    // AND once the reader has ended, init does all of it
    reader.batch_execute("COMMIT").await.expect("it ends");
    let said = init(&database, &[]).await;
    assert!(
        said.contains("brought up to date table walpost.progress"),
        "{said}"
    );
    assert!(!database.rows(trigger, &[]).await.is_empty());
}

#[tokio::test]
async fn check_reads_progress_as_run_does_and_init_mends_each_column_that_an_earlier_version_lacked()
 {
    let database = Database::create("upgrade").await;
    init(&database, &[]).await;
    // (CASCADE: the view of the status reads one of them.)
    for column in [
        "timeline",
        "tables",
        "streamed",
        "catalog",
        "producer_generation",
    ] {
        // GIVEN a table without the column THEN check tells it
        database
            .sql(&format!(
                "ALTER TABLE walpost.progress DROP COLUMN {column} CASCADE"
            ))
            .await;
        let (code, said) = walpost(&database, &["check"]).await;
        assert_eq!(code, 69, "{said}");
        assert!(
            said.contains("fail  progress     table walpost.progress is an earlier version's"),
            "{said}"
        );

        // AND init mends it
        let said = init(&database, &[]).await;
        assert!(
            said.contains("brought up to date table walpost.progress"),
            "{said}"
        );
        let (_, said) = walpost(&database, &["check"]).await;
        assert!(!said.contains("fail  progress"), "{said}");
    }
}
