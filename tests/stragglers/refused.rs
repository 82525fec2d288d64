//! Topics that are refused and heal, kills meanwhile, the limit, and an instance that takes over.

use crate::support::{Proxy, consume, eventually, servers};
use crate::*;

#[tokio::test]
async fn a_refused_topic_is_stored_while_three_others_stream_and_arrives_in_order_when_it_heals() {
    // GIVEN a topic that was terminated, and little room: a quarter of what is coming for it
    let database = prepared("refused").await;
    let settings = [("WALPOST_MAX_IN_FLIGHT_MESSAGES", "1000")];
    let (walpost, topic) = with_terminated(&database, &settings).await;

    // WHEN 4,000 events of it are committed among 30,000 of three others
    for round in 0..10 {
        insert_numbers(&database, "t", 20, 400 * round + 1, 400).await;
        for other in ["a", "b", "c"] {
            insert_numbers(&database, other, 20, 1000 * round + 1, 1000).await;
        }
    }

    // THEN the others arrive, and the log position passes all of them
    database.wait_all_confirmed(DEADLINE).await;
    for other in ["a", "b", "c"] {
        assert_eq!(assert_numbers(&database.topic(other), 20, 10_000).await, 0);
    }
    let stored = count(&database, "retrying").await + count(&database, "parked").await;
    assert_eq!(stored, 4000);
    assert_eq!(
        count(&database, "retrying").await,
        20,
        "a head for each key"
    );

    // AND WHEN it heals while more is committed, THEN all of it arrives, each key in order, without a gap at the switch
    delete(&topic).await;
    let mut first = 4001;
    eventually(DEADLINE, "the stragglers to go", async || {
        insert_numbers(&database, "t", 20, first, 100).await;
        first += 100;
        let left = count(&database, "retrying").await + count(&database, "parked").await;
        (left == 0).then_some(())
    })
    .await;
    insert_numbers(&database, "t", 20, first, 100).await;
    database.wait_all_confirmed(DEADLINE).await;
    wait_for_none(&database).await;
    let repeats = assert_numbers(&topic, 20, first + 99).await;
    assert_eq!(repeats, 0, "nothing crashed, so nothing comes twice");
    // It streams again: what is published now is no straggler. (The publisher hears a moment after the table is empty.)
    eventually(DEADLINE, "the stream to publish again", async || {
        insert(&database, "t", "key-0", "more").await;
        database.wait_all_confirmed(DEADLINE).await;
        let streamed = consume(&servers().pulsar_url, &topic, 1, DEADLINE).await;
        let last = streamed.last().expect("a message");
        (!last.producer_name.contains("straggler")).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn nothing_is_lost_and_order_is_kept_when_it_is_killed_again_and_again_meanwhile() {
    // GIVEN a terminated topic with events
    let database = prepared("killed").await;
    let (mut walpost, topic) = with_terminated(&database, &[]).await;
    let mut first = 1;

    // WHEN walpost is killed at several moments while the topic is refused, and while it heals
    for kill in 0..8_u32 {
        insert_numbers(&database, "t", 10, first, 500).await;
        insert_numbers(&database, "a", 10, first, 500).await;
        first += 500;
        let stored = i64::from(kill) * 300;
        if kill == 4 {
            delete(&topic).await;
        }
        if kill < 4 {
            eventually(DEADLINE, "some of it to be stored", async || {
                let now = count(&database, "retrying").await + count(&database, "parked").await;
                (now >= stored).then_some(())
            })
            .await;
        }
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        walpost = database.start(&QUICK).await;
    }

    // THEN everything arrives, each key in order
    database.wait_all_confirmed(DEADLINE).await;
    wait_for_none(&database).await;
    for name in ["t", "a"] {
        let repeats = assert_numbers(&database.topic(name), 10, first - 1).await;
        println!("{name}: {repeats} of {} came again", first - 1);
    }
    walpost.stop().await;
}

#[tokio::test]
async fn at_the_limit_the_intake_pauses_until_there_is_room() {
    // GIVEN a terminated topic and a limit
    let database = prepared("limit").await;
    let (mut walpost, topic) =
        with_terminated(&database, &[("WALPOST_STRAGGLER_LIMIT", "300")]).await;

    // WHEN more events of it are committed than that, and one of another topic behind them
    insert_numbers(&database, "t", 5, 1, 5000).await;
    insert(&database, "a", "k", "behind").await;
    let line = walpost.wait_for_line("WALPOST_STRAGGLER_LIMIT is reached", DEADLINE);
    assert!(line.await.contains("hint"));

    // THEN the log position stays in front of what has no place
    let all = database.current_wal_lsn().await;
    let rows = database.rows("SELECT count(*) FROM walpost.straggler", &[]);
    let rows: i64 = rows.await[0].get(0);
    assert!((300..5000).contains(&rows), "{rows} are stored");
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    assert!(confirmed < Some(all), "it has passed what is not stored");

    // AND WHEN the topic heals, THEN all of it arrives
    delete(&topic).await;
    database.wait_all_confirmed(DEADLINE).await;
    wait_for_none(&database).await;
    assert_numbers(&topic, 5, 5000).await;
    assert_eq!(payloads(&database.topic("a"), 1).await, ["behind"]);
    walpost.stop().await;
}

#[tokio::test]
async fn deduplication_takes_no_straggler_for_old_when_it_is_killed_again_and_again() {
    // GIVEN a namespace that deduplicates, and messages too large for it among others of the same lane
    let mut database = Database::create("dedup").await;
    database.deduplicate(servers()).await;
    database.init(&["--payload", "text"], &[]).await;
    let settings = [&QUICK[..], &[("WALPOST_LANES", "1")]].concat();
    let mut walpost = database.start(&settings).await;
    let mut first = 1;

    // WHEN walpost is killed while it stores them, and they are made smaller while it is away
    for _ in 0..4 {
        insert_numbers(&database, "t", 10, first, 200).await;
        database
            .sql(
                "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                 SELECT 't', 'large-' || n, 't', repeat('x', 5 * 1024 * 1024) FROM generate_series(1, 2) n",
            )
            .await;
        insert_numbers(&database, "t", 10, first + 200, 200).await;
        first += 400;
        eventually(DEADLINE, "one of them to be stored", async || {
            (count(&database, "retrying").await > 0).then_some(())
        })
        .await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        let smaller =
            "UPDATE walpost.straggler SET payload = 'smaller' WHERE length(payload) > 1000000";
        database.sql(smaller).await;
        walpost = database.start(&settings).await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    let smaller =
        "UPDATE walpost.straggler SET payload = 'smaller' WHERE length(payload) > 1000000";
    database.sql(smaller).await;
    wait_for_none(&database).await;
    walpost.stop().await;

    // THEN every event is there, each key's in order, and each large one
    let repeats = assert_numbers(&database.topic("t"), 10, first - 1).await;
    println!("{repeats} of {} came again", first - 1);
    let expected = usize::try_from(first - 1).expect("few") + 8;
    let received = consume(
        &servers().pulsar_url,
        &database.topic("t"),
        expected,
        DEADLINE,
    )
    .await;
    let large: std::collections::HashSet<&str> = received
        .iter()
        .filter(|message| message.payload == b"smaller")
        .map(|message| message.property("id"))
        .collect();
    assert_eq!(large.len(), 8);
}

#[tokio::test]
async fn an_instance_that_takes_over_knows_what_the_other_has_stored() {
    // GIVEN two instances, the second of which was there before the first had stored anything
    let database = prepared("takeover").await;
    let settings = [&QUICK[..], &[("WALPOST_RETRY_MAX_ATTEMPTS", "1000")]].concat();
    let mut first = database.start(&settings).await;
    let mut second = database.walpost(&["run"], &settings).spawn();
    second
        .wait_for_line("another walpost has slot", DEADLINE)
        .await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             VALUES ('t', 'k', 't', repeat('x', 5 * 1024 * 1024))",
        )
        .await;
    database.wait_all_confirmed(DEADLINE).await;

    // WHEN the first is killed and the second has the slot
    first.sigkill();
    first.wait_exit(DEADLINE).await;
    insert(&database, "t", "k", "behind").await;
    insert(&database, "t", "other", "goes on").await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN it keeps the key behind what the first has stored
    assert_eq!(payloads(&database.topic("t"), 1).await, ["goes on"]);
    assert_eq!(count(&database, "parked").await, 1);
    database
        .sql("UPDATE walpost.straggler SET payload = 'smaller' WHERE state = 'retrying'")
        .await;
    wait_for_none(&database).await;
    let all = payloads(&database.topic("t"), 3).await;
    assert_eq!(all, ["goes on", "smaller", "behind"]);
    second.stop().await;
}

#[tokio::test]
async fn that_no_broker_answers_a_retry_is_said_and_the_straggler_arrives_when_one_does() {
    // GIVEN a straggler, and a broker that is away
    let database = prepared("away").await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let settings = [("WALPOST_PULSAR_URL", url.as_str()), QUICK[0], QUICK[1]];
    let (mut walpost, topic) = with_terminated(&database, &settings).await;
    insert(&database, "t", "k", "late").await;
    wait_for_count(&database, "retrying", 1).await;
    broker.refuse(true);
    broker.cut();

    // WHEN it is to be retried THEN the log says why it is not
    let said = "no straggler is retried while no broker answers";
    let line = walpost.wait_for_line(said, DEADLINE).await;
    assert!(line.contains("WARN"), "{line}");

    // AND it arrives when a broker answers
    delete(&topic).await;
    broker.refuse(false);
    wait_for_none(&database).await;
    assert_eq!(payloads(&topic, 1).await, ["late"]);
    walpost.stop().await;
}
