//! Published rows are marked or deleted only by the process that has claimed the slot.

use crate::support::{Database, eventually};
use crate::*;

const REFUSED: &str = "no row is marked or deleted";

async fn only_under_the_claim(mode: &str) {
    // GIVEN a stream that marks or deletes, and another process that has claimed the slot
    let mode = ("WALPOST_AFTER_PUBLISH", mode);
    let database = Database::create("marks").await;
    database.init(&["--payload", "text"], &[mode]).await;
    let settings = [
        mode,
        ("WALPOST_SCAN_INTERVAL", "1h"),
        ("WALPOST_LOG", "debug"),
    ];
    let mut walpost = database.start(&settings).await;
    let claim = "UPDATE walpost.progress SET session = 'another' RETURNING 1";
    assert_eq!(database.rows(claim, &[]).await.len(), 1);

    // WHEN an event gets its receipt
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', 'p')",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN its row stays as it is
    walpost.wait_for_line(REFUSED, DEADLINE).await;
    let untouched = async || {
        let sql = "SELECT FROM walpost.outbox WHERE sent_at IS NULL";
        database.rows(sql, &[]).await.len() == 1
    };
    assert!(untouched().await);

    // AND is marked or deleted once the process has a claim again
    database.terminate_walsender().await;
    eventually(DEADLINE, "the row to be marked or deleted", async || {
        (!untouched().await).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn rows_are_marked_only_under_the_claim() {
    only_under_the_claim("mark").await;
}

#[tokio::test]
async fn rows_are_deleted_only_under_the_claim() {
    only_under_the_claim("delete").await;
}
