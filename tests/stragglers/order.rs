//! No later event of a key passes an earlier one that fails, or is dead and blocks, when what is in front of them goes.

use crate::dead::stragglers;
use crate::scan::{MANY_ATTEMPTS, MEND, OVERSIZE};
use crate::support::{Walpost, eventually};
use crate::*;

const BLOCK: (&str, &str) = ("WALPOST_ON_DEAD", "block");

/// Commits a row that can be no event, one behind it in its key, and one of another key.
async fn insert_with_hopeless(database: &Database) {
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, headers)
             VALUES ('t', 'k', 't', 'hopeless', '[1]'), ('t', 'k', 't', 'behind', NULL), ('t', 'other', 't', 'goes on', NULL)",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;
}

/// Waits until the straggler with this payload is gone.
async fn wait_for_departure(database: &Database, payload: &str) {
    eventually(DEADLINE, &format!("{payload} to go"), async || {
        let query = "SELECT 1 FROM walpost.straggler WHERE payload = convert_to($1, 'UTF8')";
        let rows = database.rows(query, &[&payload]).await;
        rows.is_empty().then_some(())
    })
    .await;
}

/// A key whose dead straggler is discarded goes on with what stands behind it.
async fn assert_goes_on(database: &Database, walpost: Walpost, expected: &[&str]) {
    let (code, said) = stragglers(database, &["discard", "--state", "dead", "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    wait_for_none(database).await;
    let all = payloads(&database.topic("t"), expected.len()).await;
    assert_eq!(all, expected);
    walpost.stop().await;
}

#[tokio::test]
async fn a_successor_that_is_too_large_holds_back_what_is_behind_it_when_the_topic_heals() {
    // GIVEN a topic that is refused, and behind its first straggler one that no broker takes, and another
    let database = prepared("toolarge").await;
    let (walpost, topic) = with_terminated(&database, &[MANY_ATTEMPTS]).await;
    insert(&database, "t", "k", "head").await;
    database.sql(OVERSIZE).await;
    insert(&database, "t", "k", "behind").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "parked").await, 2);

    // WHEN the topic heals
    delete(&topic).await;
    wait_for_departure(&database, "head").await;
    eventually(DEADLINE, "an attempt with the large one", async || {
        let query = "SELECT 1 FROM walpost.straggler WHERE state = 'retrying' AND attempts > 1";
        (!database.rows(query, &[]).await.is_empty()).then_some(())
    })
    .await;

    // THEN the last one waits, until the large one is mended
    assert_eq!(payloads(&topic, 1).await, ["head"]);
    assert_eq!(count(&database, "parked").await, 1);
    database.sql(MEND).await;
    wait_for_none(&database).await;
    let all = payloads(&topic, 3).await;
    assert_eq!(all, ["head", "smaller", "behind"]);
    walpost.stop().await;
}

#[tokio::test]
async fn on_dead_block_holds_back_what_comes_in_the_same_transaction_as_a_hopeless_row() {
    // GIVEN a stream
    let database = prepared("hopeless").await;
    let settings = [&QUICK[..], &[BLOCK]].concat();
    let walpost = database.start(&settings).await;
    insert(&database, "t", "k", "before").await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN a row that can be no event comes with one behind it
    insert_with_hopeless(&database).await;

    // THEN that one waits, and another key does not
    let topic = database.topic("t");
    assert_eq!(payloads(&topic, 2).await, ["before", "goes on"]);
    assert_eq!(count(&database, "dead").await, 1);
    assert_eq!(count(&database, "parked").await, 1);
    let expected = ["before", "goes on", "behind"];
    assert_goes_on(&database, walpost, &expected).await;
}

#[tokio::test]
async fn on_dead_block_holds_back_what_is_behind_a_hopeless_row_when_the_head_before_it_goes() {
    // GIVEN a topic that is refused, and stragglers of a key, the second of which can be no event
    let database = prepared("hopelesshead").await;
    let (walpost, topic) = with_terminated(&database, &[BLOCK, MANY_ATTEMPTS]).await;
    insert(&database, "t", "k", "head").await;
    database.wait_all_confirmed(DEADLINE).await;
    insert_with_hopeless(&database).await;
    assert_eq!(count(&database, "dead").await, 1);
    assert_eq!(count(&database, "retrying").await, 2, "a head of each key");

    // WHEN the topic heals
    delete(&topic).await;
    wait_for_departure(&database, "head").await;
    wait_for_departure(&database, "goes on").await;

    // THEN the one behind it waits
    assert_eq!(count(&database, "parked").await, 1);
    let mut sent = payloads(&topic, 2).await;
    sent.sort();
    assert_eq!(sent, ["goes on", "head"]);
    let (code, said) = stragglers(&database, &["discard", "--state", "dead", "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 3).await[2], "behind");
    walpost.stop().await;
}

#[tokio::test]
async fn on_dead_block_holds_back_what_is_behind_a_straggler_that_turns_out_to_be_no_message() {
    // GIVEN a topic that is refused, and stragglers of a key, the second of which somebody has edited into nonsense
    let database = prepared("editedhead").await;
    let (walpost, topic) = with_terminated(&database, &[BLOCK, MANY_ATTEMPTS]).await;
    for payload in ["head", "edited", "behind"] {
        insert(&database, "t", "k", payload).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    let edit = r#"UPDATE walpost.straggler SET properties = '{"a": 1}' WHERE payload = 'edited'"#;
    database.sql(edit).await;

    // WHEN the topic heals, THEN it is dead, and the one behind it waits until it is discarded
    delete(&topic).await;
    wait_for_count(&database, "dead", 1).await;
    assert_eq!(count(&database, "parked").await, 1);
    assert_eq!(payloads(&topic, 1).await, ["head"]);
    assert_goes_on(&database, walpost, &["head", "behind"]).await;
}

#[tokio::test]
async fn a_key_whose_stragglers_may_not_be_read_any_more_is_not_passed() {
    // GIVEN a straggler, whose topic heals while walpost is down
    let database = prepared("norights").await;
    let (walpost, topic) = with_terminated(&database, &[MANY_ATTEMPTS]).await;
    insert(&database, "t", "k", "old").await;
    wait_for_count(&database, "retrying", 1).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    delete(&topic).await;
    insert(&database, "t", "k", "new").await;

    // WHEN walpost may not read it any more THEN it does not start, and says what it needs
    database
        .sql("REVOKE ALL ON walpost.straggler FROM walpost_connector")
        .await;
    let (code, said) = database
        .walpost(&["run"], &[MANY_ATTEMPTS])
        .run(DEADLINE)
        .await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler"),
        "{said}"
    );

    // AND with its rights the straggler goes out before what came later
    database
        .sql("GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler TO walpost_connector")
        .await;
    let walpost = database.start(&[MANY_ATTEMPTS]).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 2).await, ["old", "new"]);
    walpost.stop().await;
}
