//! A discarded straggler stays away in the modes in which rows that are not marked, or still there, are published again.

use crate::dead::stragglers;
use crate::support::eventually;
use crate::*;

const SOON: [(&str, &str); 2] = [
    ("WALPOST_STRAGGLER_AGE", "1s"),
    ("WALPOST_SCAN_INTERVAL", "200ms"),
];
/// Rows that an unmarked one would be found among.
const LEFT: &str = "SELECT payload FROM walpost.outbox WHERE sent_at IS NULL ORDER BY payload";

async fn wait_for_left(database: &Database, expected: &[&str]) {
    eventually(DEADLINE, &format!("{expected:?} to be left"), async || {
        let rows = database.rows(LEFT, &[]).await;
        let left: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
        (left == expected).then_some(())
    })
    .await;
}

async fn a_discarded_straggler_is_never_published(mode: &str) {
    // GIVEN two stragglers of a topic that is refused
    let database = Database::create("discard").await;
    let mode = ("WALPOST_AFTER_PUBLISH", mode);
    database.init(&["--payload", "text"], &[mode]).await;
    let (walpost, topic) = with_terminated(&database, &[mode, SOON[0], SOON[1]]).await;
    insert(&database, "t", "k", "discarded").await;
    insert(&database, "t", "other", "kept").await;
    wait_for_count(&database, "retrying", 2).await;
    wait_for_left(&database, &["discarded", "kept"]).await;

    // WHEN one is discarded (by a command that is not told the mode)
    let query = "SELECT id::text FROM walpost.outbox WHERE payload = 'discarded'";
    let id: String = database.rows(query, &[]).await[0].get(0);
    let (code, said) = stragglers(&database, &["discard", "--id", &id, "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));

    // THEN its row is no longer among those that may be lost, and the other one's is
    wait_for_left(&database, &["kept"]).await;

    // AND WHEN the topic heals, and a row that was never sent is found, THEN that one arrives, and the discarded one does not
    delete(&topic).await;
    wait_for_left(&database, &[]).await;
    database
        .sql(
            "ALTER PUBLICATION walpost DROP TABLE walpost.outbox;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', 'lost');
             ALTER PUBLICATION walpost ADD TABLE walpost.outbox",
        )
        .await;
    wait_for_left(&database, &[]).await;
    assert_eq!(payloads(&topic, 2).await, ["kept", "lost"]);
    walpost.stop().await;
}

#[tokio::test]
async fn a_discarded_straggler_is_never_published_in_mark_mode() {
    a_discarded_straggler_is_never_published("mark").await;
}

#[tokio::test]
async fn a_discarded_straggler_is_never_published_in_delete_mode() {
    a_discarded_straggler_is_never_published("delete").await;
}

#[tokio::test]
async fn in_keep_mode_discard_leaves_the_row_as_it_is() {
    let database = prepared("keepdiscard").await;
    let (walpost, _) = with_terminated(&database, &[]).await;
    insert(&database, "t", "k", "discarded").await;
    wait_for_count(&database, "retrying", 1).await;
    let (code, said) = stragglers(&database, &["discard", "--state", "retrying", "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    let rows = database.rows("SELECT payload FROM walpost.outbox ORDER BY seq", &[]);
    let kept: Vec<String> = rows.await.iter().map(|row| row.get(0)).collect();
    assert_eq!(kept, ["first", "discarded"]);
    walpost.stop().await;
}
