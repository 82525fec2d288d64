//! Tables without `txid` and `seq`, as Debezium's, and a slot that is lost.

use crate::support::{Database, Walpost, eventually, on_each_major};
use crate::{DEADLINE, NOTED_SOON, arrived, drop_slot};

const TABLE: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "public.outboxevent");
const RESTART: (&str, &str) = ("WALPOST_SLOT_LOST", "restart");

/// Inserts a row, and says in which transaction.
async fn put(database: &Database, payload: &str) -> String {
    let sql = "INSERT INTO public.outboxevent VALUES (gen_random_uuid(), 't', 'k', 'e', to_jsonb($1::text)) RETURNING pg_current_xact_id()::text";
    database.rows(sql, &[&payload]).await[0].get(0)
}

/// Debezium's table, a row that was delivered, and one that was committed when there was no slot.
async fn with_lost_slot(major: i32) -> Database {
    let database = Database::create_on_major(major, "unscan").await;
    database
        .sql(
            "CREATE TABLE public.outboxevent (
                 id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
                 type varchar(255) NOT NULL, payload jsonb)",
        )
        .await;
    database.init(&[], &[TABLE]).await;
    let walpost = database.start(&[TABLE, NOTED_SOON]).await;
    let last = put(&database, "delivered").await;
    stop_when_noted(&database, walpost, &last).await;
    drop_slot(&database).await;
    put(&database, "between").await;
    database
}

/// Stops walpost when the transaction is known as delivered.
async fn stop_when_noted(database: &Database, walpost: Walpost, transaction: &str) {
    let noted = "SELECT FROM walpost.progress WHERE pg_visible_in_snapshot($1::text::xid8, delivered) AND scan_upto IS NULL";
    eventually(DEADLINE, "delivery to be noted", async || {
        (!database.rows(noted, &[&transaction]).await.is_empty()).then_some(())
    })
    .await;
    walpost.stop().await;
}

async fn refused(database: &Database) -> String {
    let (code, said) = database.walpost(&["run"], &[TABLE]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    said
}

async fn recovers_with_the_columns(major: i32) {
    // GIVEN a lost slot, and a table whose rows no snapshot can be compared with THEN walpost refuses, with the statement
    let database = with_lost_slot(major).await;
    let said = refused(&database).await;
    assert!(said.contains("WALPOST_SLOT_LOST=restart"), "{said}");
    let from = said.find("ALTER TABLE").expect("a statement");
    let upto = said[from..].find(" (rewrites").expect("its end") + from;

    // WHEN it is given THEN no row is missing
    database.sql(&said[from..upto]).await;
    let walpost = database.start(&[TABLE, NOTED_SOON]).await;
    let last = put(&database, "streamed").await;
    stop_when_noted(&database, walpost, &last).await;
    arrived(&database, &["delivered", "between", "streamed"]).await;

    // AND the next time it recovers by itself
    drop_slot(&database).await;
    put(&database, "again").await;
    let walpost = database.start(&[TABLE, NOTED_SOON]).await;
    let last = put(&database, "last").await;
    stop_when_noted(&database, walpost, &last).await;
    arrived(
        &database,
        &["delivered", "between", "streamed", "again", "last"],
    )
    .await;
}

async fn recovers_with_the_statements_for_a_table_in_use(major: i32) {
    // GIVEN a lost slot, and OPERATIONS' statements for a table in use
    let database = with_lost_slot(major).await;
    refused(&database).await;
    let operations = include_str!("../../deploy/OPERATIONS.md");
    let (_, section) = operations
        .split_once("### Adding `txid` and `seq` to a table in use")
        .expect("the section");
    let sql = section.split("```").nth(1).expect("statements");
    let sql = sql
        .trim_start_matches("sql")
        .replace("shop.outbox", "public.outboxevent");
    for statement in sql
        .split(";\n")
        .filter(|statement| !statement.trim().is_empty())
    {
        database.sql(statement).await;
    }

    // WHEN walpost runs THEN every row comes, in the order of the numbers
    let walpost = database.start(&[TABLE, NOTED_SOON]).await;
    let last = put(&database, "streamed").await;
    stop_when_noted(&database, walpost, &last).await;
    arrived(&database, &["delivered", "between", "streamed"]).await;
}

async fn the_slot_is_made_anew_by_init(major: i32) {
    // GIVEN a slot that was dropped, and made again by init
    let database = with_lost_slot(major).await;
    let (code, said) = database.walpost(&["init"], &[TABLE]).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");

    // THEN the rows in between are not passed over
    let said = refused(&database).await;
    assert!(said.contains("ALTER TABLE"), "{said}");

    // AND restart gives them up, says so, and goes on
    let walpost = database.start(&[TABLE, NOTED_SOON, RESTART]).await;
    assert!(
        walpost.output().contains("not looked for"),
        "{}",
        walpost.output()
    );
    let last = put(&database, "streamed").await;
    stop_when_noted(&database, walpost, &last).await;
    arrived(&database, &["delivered", "streamed"]).await;
}

async fn restarts(major: i32) {
    let database = with_lost_slot(major).await;
    let walpost = database.start(&[TABLE, NOTED_SOON, RESTART]).await;
    let last = put(&database, "streamed").await;
    stop_when_noted(&database, walpost, &last).await;
    arrived(&database, &["delivered", "streamed"]).await;
    // AND afterwards nothing is refused
    let walpost = database.start(&[TABLE, NOTED_SOON]).await;
    walpost.stop().await;
}

on_each_major! {
    a_lost_slot_is_refused_where_the_gap_cannot_be_read_and_the_statement_mends_it: recovers_with_the_columns();
    the_statements_for_a_table_in_use_let_it_recover: recovers_with_the_statements_for_a_table_in_use();
    who_drops_the_slot_and_makes_another_is_told_of_the_gap_as_well: the_slot_is_made_anew_by_init();
    restart_gives_up_the_rows_of_a_lost_slot_that_cannot_be_read_and_goes_on: restarts();
}
