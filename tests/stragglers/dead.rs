//! Stragglers that nobody can publish, and the commands that look after them.

use serde_json::Value;

use crate::support::{Walpost, consume, eventually, servers};
use crate::*;

/// Runs `walpost stragglers <args>`.
pub(crate) async fn stragglers(database: &Database, args: &[&str]) -> (i32, String) {
    let args: Vec<&str> = ["stragglers"].iter().chain(args).copied().collect();
    let (code, said) = database.walpost(&args, &[]).run(DEADLINE).await;
    // Both streams are read: what is logged is not the command's output.
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.contains(" WARN "))
        .collect();
    (code, lines.join("\n"))
}

/// What `walpost stragglers list --json` says.
async fn listed(database: &Database, args: &[&str]) -> Vec<Value> {
    let args: Vec<&str> = ["list", "--json"].iter().chain(args).copied().collect();
    let (code, said) = stragglers(database, &args).await;
    assert_eq!(code, 0, "{said}");
    let lines = said.lines();
    lines
        .map(|line| serde_json::from_str(line).expect("a JSON object"))
        .collect()
}

#[tokio::test]
async fn a_straggler_dies_after_its_attempts_goes_to_the_dead_letter_topic_and_its_successors_go_on()
 {
    // GIVEN few attempts, and a dead-letter topic
    let database = prepared("dead").await;
    let dead_letters = database.topic("dead-letters");
    let settings = [
        ("WALPOST_RETRY_INITIAL", "20ms"),
        ("WALPOST_RETRY_MAX", "50ms"),
        ("WALPOST_RETRY_MAX_ATTEMPTS", "3"),
        // A namespace that is not there may come.
        ("WALPOST_STRAGGLER_AGE", "200ms"),
        ("WALPOST_DEAD_LETTER_TOPIC", &*dead_letters),
    ];
    let walpost = database.start(&settings).await;
    // AND a topic that cannot be
    let far = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic)
               VALUES ('t', 'k', 'made', 'dies', 'persistent://public/nowhere-at-all/t')";
    database.sql(far).await;
    let behind = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic)
                  VALUES ('t', 'k', 'made', 'dies too', 'persistent://public/nowhere-at-all/t')";
    database.sql(behind).await;

    // WHEN its attempts are used up THEN it is kept as dead, and its successor had its turn
    wait_for_count(&database, "dead", 2).await;
    let dead = listed(&database, &["--state", "dead"]).await;
    assert_eq!(dead.len(), 2);
    assert_eq!(dead[0]["attempts"], 3);
    assert_eq!(dead[0]["topic"], "persistent://public/nowhere-at-all/t");
    assert!(
        dead[0]["reason"]
            .as_str()
            .expect("text")
            .contains("refuses"),
        "{}",
        dead[0]
    );

    // AND copies are in the dead-letter topic, with what one must know of them
    let copies = consume(&servers().pulsar_url, &dead_letters, 2, DEADLINE).await;
    let texts: Vec<_> = copies.iter().map(|copy| copy.payload.clone()).collect();
    assert_eq!(texts, [b"dies".to_vec(), b"dies too".to_vec()]);
    let copy = &copies[0];
    assert_eq!(copy.key.as_deref(), Some("k"));
    assert_eq!(copy.property("type"), "made");
    assert_eq!(copy.property("walpost.attempts"), "3");
    assert_eq!(copy.property("walpost.id"), dead[0]["id"]);
    assert_eq!(
        copy.property("walpost.original_topic"),
        "persistent://public/nowhere-at-all/t"
    );
    assert_eq!(copy.property("walpost.reason"), dead[0]["reason"]);
    eventually(DEADLINE, "the copies to be noted", async || {
        let dead = listed(&database, &[]).await;
        dead.iter()
            .all(|one| one["dead_letter_at"].is_string())
            .then_some(())
    })
    .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
}

/// A stream with one oversize message of key `k` that has died, and one behind it.
async fn with_a_dead_head(database: &Database, on_dead: &str) -> Walpost {
    let settings = [
        ("WALPOST_RETRY_INITIAL", "20ms"),
        ("WALPOST_RETRY_MAX", "50ms"),
        ("WALPOST_RETRY_MAX_ATTEMPTS", "2"),
        ("WALPOST_ON_DEAD", on_dead),
    ];
    let walpost = database.start(&settings).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', 'k', 't', repeat('x', 5 * 1024 * 1024))",
        )
        .await;
    insert(database, "t", "k", "behind 1").await;
    wait_for_count(database, "dead", 1).await;
    insert(database, "t", "k", "behind 2").await;
    insert(database, "t", "other", "goes on").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost
}

#[tokio::test]
async fn on_dead_skip_lets_the_key_go_on_without_it() {
    let database = prepared("skip").await;
    let walpost = with_a_dead_head(&database, "skip").await;
    let mut all = payloads(&database.topic("t"), 3).await;
    let other = all.iter().position(|payload| payload == "goes on");
    all.remove(other.expect("the other key goes on"));
    assert_eq!(all, ["behind 1", "behind 2"]);
    assert_eq!(count(&database, "dead").await, 1);
    walpost.stop().await;
}

#[tokio::test]
async fn on_dead_block_holds_the_key_until_it_is_discarded_also_after_a_restart() {
    // GIVEN a key whose head is dead
    let database = prepared("block").await;
    let walpost = with_a_dead_head(&database, "block").await;
    assert_eq!(payloads(&database.topic("t"), 1).await, ["goes on"]);
    assert_eq!(count(&database, "parked").await, 2);

    // WHEN walpost is started again, THEN it still waits
    walpost.stop().await;
    let settings = [&QUICK[..], &[("WALPOST_ON_DEAD", "block")]].concat();
    let walpost = database.start(&settings).await;
    insert(&database, "t", "k", "behind 3").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "parked").await, 3);

    // AND WHEN the dead one is discarded, THEN the others arrive in order
    let (code, said) = stragglers(&database, &["discard", "--state", "dead", "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    wait_for_none(&database).await;
    let all = payloads(&database.topic("t"), 4).await;
    assert_eq!(all, ["goes on", "behind 1", "behind 2", "behind 3"]);
    // AND the key streams again
    eventually(DEADLINE, "the key to stream again", async || {
        insert(&database, "t", "k", "more").await;
        database.wait_all_confirmed(DEADLINE).await;
        wait_for_none(&database).await;
        let received = consume(&servers().pulsar_url, &database.topic("t"), 5, DEADLINE).await;
        let last = received.last()?;
        (!last.producer_name.contains("straggler")).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn the_commands_list_retry_and_discard_what_fits_and_nothing_else() {
    // GIVEN stragglers of two kinds, and no walpost
    let database = prepared("commands").await;
    let walpost = database.start(&[]).await;
    insert(&database, "a/b", "k1", SECRET).await;
    insert(&database, "c/d", "k2", SECRET).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let all = listed(&database, &[]).await;
    assert_eq!(all.len(), 2);
    assert_eq!(
        (&all[0]["key"], &all[0]["state"]),
        (&"k1".into(), &"dead".into())
    );
    assert_eq!(all[0]["payload_bytes"], SECRET.len());
    let first = all[0]["id"].as_str().expect("an id");

    // WHEN they are listed by id, state and topic, THEN only those come, and never a payload
    assert_eq!(listed(&database, &["--id", first]).await, all[..1]);
    assert_eq!(
        listed(&database, &["--state", "parked"]).await,
        [] as [Value; 0]
    );
    assert_eq!(listed(&database, &["--topic", "t"]).await, [] as [Value; 0]);
    let (code, said) = stragglers(&database, &["list"]).await;
    assert_eq!((code, said.lines().count()), (0, 2), "{said}");
    assert!(said.contains(first) && !said.contains(SECRET), "{said}");

    // WHEN nothing says which are meant, or nobody can be asked, THEN nothing happens
    for args in [
        &["retry"][..],
        &["discard", "--yes"],
        &["discard", "--id", first],
    ] {
        let (code, said) = stragglers(&database, args).await;
        assert_eq!(code, 64, "{args:?}: {said}");
        assert!(said.contains("allowed: --"), "{said}");
    }
    assert_eq!(listed(&database, &[]).await, all);

    // WHEN one is mended and retried, THEN it arrives; the other is discarded
    let topic = database.topic("t");
    let mend = "UPDATE walpost.straggler SET topic = $1 WHERE id = $2";
    database.rows(mend, &[&topic, &first]).await;
    let (code, said) = stragglers(&database, &["retry", "--topic", &topic]).await;
    assert_eq!((code, said.trim()), (0, "1 stragglers are due now"));
    let (code, said) = stragglers(&database, &["discard", "--state", "dead", "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    let walpost = database.start(&QUICK).await;
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 1).await, [SECRET]);
    walpost.stop().await;
}

#[tokio::test]
async fn a_straggler_that_was_edited_into_nonsense_says_what_is_wrong_and_others_go_on() {
    // GIVEN a terminated topic with stragglers of six keys
    let database = prepared("nonsense").await;
    let (walpost, topic) = with_terminated(&database, &[]).await;
    insert_numbers(&database, "t", 100, 1, 100).await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN somebody edits five of them, and the topic heals
    let edits = [
        ("1", "topic = 'kafka://x'", "topic is no topic name"),
        ("2", "topic = NULL", "no topic"),
        ("3", "key = NULL", "no key"),
        ("4", "properties = '{\"a\": 1}'", "properties"),
        ("5", "event_time_ms = -5", "event_time_ms"),
    ];
    for (payload, edit, _) in edits {
        let edit = format!("UPDATE walpost.straggler SET {edit} WHERE payload = '{payload}'");
        database.sql(&edit).await;
    }
    delete(&topic).await;

    // THEN they are kept with the reason, and the others arrive
    wait_for_count(&database, "dead", 5).await;
    wait_for_count(&database, "retrying", 0).await;
    for (payload, _, reason) in edits {
        let query = "SELECT reason FROM walpost.straggler WHERE payload = convert_to($1, 'UTF8')";
        let said: String = database.rows(query, &[&payload]).await[0].get(0);
        assert!(said.contains(reason), "{payload}: {said}");
    }
    let mut numbers: Vec<i64> = payloads(&topic, 95)
        .await
        .iter()
        .map(|n| n.parse().expect("a number"))
        .collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (6..=100).collect::<Vec<_>>());
    assert!(!walpost.output().contains("walpost: bug"));
    walpost.stop().await;
}
