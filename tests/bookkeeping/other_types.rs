//! Columns named `txid` and `seq` that are something else: the table streams as one without them, and it is said what mends that.

use crate::support::{Database, eventually};
use crate::{DEADLINE, NOTED_SOON, arrived, drop_slot};

const TABLE: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "public.plain");

async fn put(database: &Database, payload: &str) {
    let sql = "INSERT INTO plain (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', to_json($1::text))";
    database.rows(sql, &[&payload]).await;
}

/// The statements in what check says, one for each column.
fn mends(said: &str) -> Vec<String> {
    let of = |from: usize| {
        let rest = &said[from..];
        rest.find(" TO ").and_then(|_| rest.split(": ").nth(1))
    };
    let found = said.match_indices("where nothing else names column");
    let statements = found.filter_map(|(from, _)| of(from));
    statements
        .map(|text| {
            let text = text.split("where nothing else").next().unwrap_or_default();
            text.lines().next().unwrap_or_default().to_owned()
        })
        .collect()
}

#[tokio::test]
async fn a_table_whose_txid_or_seq_is_of_another_type_streams_and_check_says_what_mends_it() {
    for (columns, wrong) in [
        ("txid bigint DEFAULT txid_current(), seq bigserial", 1),
        (
            "txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq text NOT NULL DEFAULT gen_random_uuid()",
            1,
        ),
        ("txid text, seq uuid DEFAULT gen_random_uuid()", 2),
    ] {
        // GIVEN such a table
        let database = Database::create("types").await;
        database
            .sql(&format!(
                "CREATE TABLE plain (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text,
                                     payload json, {columns})"
            ))
            .await;
        database.init(&[], &[TABLE]).await;

        // THEN its rows are streamed
        let walpost = database.start(&[TABLE, NOTED_SOON]).await;
        put(&database, "one").await;
        database.wait_all_confirmed(DEADLINE).await;
        arrived(&database, &["one"]).await;
        walpost.stop().await;

        // AND WHEN what check says is done: THEN a gap of it can be read
        let (code, said) = database.walpost(&["check"], &[TABLE]).run(DEADLINE).await;
        assert_eq!(code, 0, "{columns}: {said}");
        let statements = mends(&said);
        assert_eq!(statements.len(), wrong, "{columns}: {said}");
        for statement in statements {
            database.sql(&statement).await;
        }
        drop_slot(&database).await;
        put(&database, "two").await;
        let walpost = database.start(&[TABLE, NOTED_SOON]).await;
        eventually(DEADLINE, "delivery to be noted", async || {
            let sql = "SELECT FROM plain p, walpost.progress s WHERE NOT coalesce(pg_visible_in_snapshot(p.txid, s.delivered), false)";
            database.rows(sql, &[]).await.is_empty().then_some(())
        })
        .await;
        arrived(&database, &["one", "two"]).await;
        walpost.stop().await;
    }
}
