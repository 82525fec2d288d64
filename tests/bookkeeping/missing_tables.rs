//! A table that is missing for a moment.

use crate::support::{Database, eventually};
use crate::{DEADLINE, NOTED_SOON, POLL, arrived, insert};

const TABLES: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.other");

async fn a_table_is_away_for_a_moment(major: i32) {
    // GIVEN two tables in poll mode
    let database = Database::create_on_major(major, "moment").await;
    database.init(&[], &[POLL]).await;
    database
        .sql("CREATE TABLE public.other (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON public.other TO walpost_connector")
        .await;
    let settings = [POLL, NOTED_SOON, TABLES];
    let start = async || {
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        walpost.wait_for_line("polling", DEADLINE).await;
        walpost
    };
    let mut walpost = start().await;
    insert(&database.client, "first").await;
    database.wait_all_sent(DEADLINE).await;

    // WHEN one of them is renamed, rows are committed to both, and it comes back when the poller has noticed
    database
        .sql("ALTER TABLE public.other RENAME TO away")
        .await;
    database
        .sql("INSERT INTO public.away (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '\"away\"')")
        .await;
    insert(&database.client, "here").await;
    let sent = "SELECT FROM walpost.outbox_status WHERE status = 'sent' OFFSET 1";
    eventually(DEADLINE, "a look, or a word", async || {
        let ended = walpost.try_exit().is_some();
        let noticed = ended || walpost.output().contains("public.other is missing");
        let noted = !database.rows(sent, &[]).await.is_empty();
        (noticed || noted).then_some(())
    })
    .await;
    database
        .sql("ALTER TABLE public.away RENAME TO other")
        .await;
    if walpost.try_exit().is_some() {
        walpost = start().await;
    }

    // THEN both rows arrive
    insert(&database.client, "last").await;
    database.wait_all_sent(DEADLINE).await;
    if walpost.try_exit().is_some() {
        walpost = start().await;
        database.wait_all_sent(DEADLINE).await;
    }
    walpost.stop().await;
    arrived(&database, &["first", "away", "here", "last"]).await;
}

#[tokio::test]
async fn a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(15).await;
}

#[tokio::test]
async fn on_postgres_14_a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(14).await;
}

#[tokio::test]
async fn on_postgres_18_a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(18).await;
}
