//! What keeps the notes of what is delivered from being made is told: a right that is taken away while walpost runs, or an old row of
//! another cluster.

use crate::support::try_admin;
use crate::*;

const TABLES: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second");
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");

#[tokio::test]
async fn a_right_that_is_taken_away_under_the_stream_is_told_by_readiness_status_and_check() {
    // GIVEN a running walpost with two tables
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[]).await;
    database
        .sql("CREATE TABLE public.second (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON public.second TO walpost_connector")
        .await;
    database.init(&[], &[TABLES]).await;
    let mut walpost = database.walpost(&["run"], &[TABLES, OFTEN]).spawn();
    let addr = addr_of(&mut walpost).await;
    walpost.wait_for_line("streaming", DEADLINE).await;
    insert(&database, 1..=3).await;
    database.wait_all_sent(DEADLINE).await;

    for (right, on) in [
        ("SELECT", "public.second"),
        ("SELECT, UPDATE", "walpost.progress"),
    ] {
        // WHEN its role may not read one of the tables any more, or not write its notes
        database
            .sql(&format!("REVOKE {right} ON {on} FROM walpost_connector"))
            .await;
        insert(&database, 4..=6).await;

        // THEN it is not ready, and says why
        let ready = async || try_admin(&format!("http://{addr}"), "GET", "/readyz", "").await;
        eventually(DEADLINE, "not to be ready", async || {
            let why = ready().await.err()?;
            why.contains("could not be noted").then_some(())
        })
        .await;
        let said = wait_left(&addr, 1).await;
        assert!(said.contains("permission denied"), "{said}");
        assert!(said.contains("\"note\""), "{said}");
        let connector = database.run_url();
        let as_connector = ("WALPOST_POSTGRES_URL", &*connector);
        let (code, said) = database
            .walpost(&["check"], &[TABLES, as_connector])
            .run(DEADLINE)
            .await;
        let grant = format!(
            "GRANT {} ON {on}",
            if on == "public.second" {
                right
            } else {
                "SELECT, INSERT, UPDATE"
            }
        );
        assert!(said.contains(&grant), "{said}");
        // (Streaming itself goes on without walpost's own tables.)
        assert_eq!(code == 69, on == "public.second", "{said}");

        // AND WHEN the right is given back THEN it is ready, and every row is known as sent
        database
            .sql(&format!("GRANT {right} ON {on} TO walpost_connector"))
            .await;
        eventually(DEADLINE, "to be ready", async || ready().await.ok()).await;
        database.wait_all_sent(DEADLINE).await;
        wait_left(&addr, 0).await;
    }
    walpost.stop().await;
}

#[tokio::test]
async fn one_row_with_a_txid_of_the_future_does_not_keep_rows_that_the_stream_left_out_from_arriving()
 {
    // GIVEN a row that says that it was inserted in a transaction which this cluster has not come to
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    insert(&database, 1..=3).await;
    database.wait_all_sent(DEADLINE).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, txid) VALUES ('t', 'k', 'e', '4', '99999999999')",
        )
        .await;

    // WHEN the stream leaves other rows out
    database
        .sql(
            "BEGIN;
             ALTER PUBLICATION walpost SET (publish = 'update');
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) SELECT 't', 'k', 'e', i::text FROM generate_series(5, 9) i;
             ALTER PUBLICATION walpost SET (publish = 'insert');
             COMMIT",
        )
        .await;
    insert(&database, 10..=10).await;

    // THEN these are published from the table, and the row is told of
    let topic = database.topic("t");
    let expected: Vec<u32> = (1..=10).collect();
    let mut arrived = numbers(&topic, 10).await;
    arrived.dedup();
    assert_eq!(arrived, expected);
    walpost
        .wait_for_line("these rows are left out", DEADLINE)
        .await;
    wait_count(&database, "walpost.outbox_status WHERE status <> 'sent'", 1).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_transaction_that_holds_up_the_notes_of_a_busy_outbox_is_named_and_they_go_on_behind_it()
{
    // GIVEN a transaction that stays open
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    insert(&database, 1..=1).await;
    database.wait_all_sent(DEADLINE).await;
    let holder = database.connect().await;
    holder
        .batch_execute("SET application_name = 'forgetful'; BEGIN; SELECT pg_current_xact_id()")
        .await
        .expect("a transaction");

    // WHEN rows of more transactions come than are counted one by one (their txid is what counts)
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, txid)
             SELECT 'many', 'k', 'e', i::text, (2 + i)::text::xid8 FROM generate_series(1, 70000) i",
        )
        .await;
    insert(&database, 2..=2).await;

    // THEN it is named, and the last row arrives all the same
    let line = walpost
        .wait_for_line("is not noted until an old transaction ends", DEADLINE)
        .await;
    assert!(line.contains("forgetful"), "{line}");
    assert_eq!(numbers(&database.topic("t"), 2).await, [1, 2]);
    let pending = "walpost.outbox_status WHERE aggregatetype = 't' AND status <> 'sent'";
    assert_eq!(count(&database, pending).await, 1);

    // AND WHEN it ends THEN that row is known as sent
    holder.batch_execute("COMMIT").await.expect("its end");
    wait_count(&database, pending, 0).await;
    walpost.stop().await;
}
