//! The scan and poll mode with a topic that lets nobody in: kills, the limit, and what is passed when.

use crate::scan::*;
use crate::support::eventually;
use crate::*;

#[tokio::test]
async fn a_topic_refused_during_the_scan_keeps_each_keys_order_over_scan_stream_and_retry() {
    // GIVEN old rows of a topic that lets nobody in, among those of another
    let database = without_slot("scanref", &[]).await;
    let topic = database.topic("t");
    make_terminated(&topic).await;
    insert_numbers(&database, "t", 20, 1, 2000).await;
    insert_numbers(&database, "a", 20, 1, 2000).await;
    database.init(&[], &[]).await;

    // WHEN walpost starts: THEN it streams, the other topic has all, and all of this one is stored and not sent
    let settings = [&QUICK[..], &[NOTED_SOON, MANY_ATTEMPTS]].concat();
    let walpost = database.start(&settings).await;
    assert_eq!(assert_numbers(&database.topic("a"), 20, 2000).await, 0);
    assert_eq!(count(&database, "retrying").await, 20);
    assert_eq!(count(&database, "parked").await, 1980);
    wait_for_status(&database, "a", "sent", 2000).await;
    assert_eq!(status(&database, "t", "retrying").await, 2000);

    // AND WHEN the stream brings more of it, before and after a restart, and it heals meanwhile
    insert_numbers(&database, "t", 20, 2001, 400).await;
    wait_for_count(&database, "parked", 2380).await;
    walpost.stop().await;
    let walpost = database.start(&settings).await;
    insert_numbers(&database, "t", 20, 2401, 100).await;
    wait_for_count(&database, "parked", 2480).await;
    delete(&topic).await;
    let mut first = 2501;
    eventually(DEADLINE, "the stragglers to go", async || {
        insert_numbers(&database, "t", 20, first, 100).await;
        first += 100;
        (stored(&database).await == 0).then_some(())
    })
    .await;
    insert_numbers(&database, "t", 20, first, 100).await;
    database.wait_all_confirmed(DEADLINE).await;
    wait_for_none(&database).await;

    // THEN each key arrives in order, each row once, and all are sent
    assert_eq!(assert_numbers(&topic, 20, first + 99).await, 0);
    wait_for_status(&database, "t", "sent", first + 99).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_scan_that_is_killed_again_and_again_stores_nothing_twice_and_loses_nothing() {
    // GIVEN many old rows of a topic that lets nobody in, among those of another and some that are no events
    let database = without_slot("scankill", &[]).await;
    let topic = database.topic("t");
    make_terminated(&topic).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT CASE WHEN n % 400 = 1 THEN 'a/b' WHEN n % 2 = 0 THEN 't' ELSE 'a' END, 'key-' || (n + 1) / 2 % 10, 't', ((n + 1) / 2)::text
             FROM generate_series(1, 40000) n ORDER BY n",
        )
        .await;
    database.init(&[], &[]).await;

    // WHEN it is killed each time it has stored more
    let settings = [&QUICK[..], &[NOTED_SOON, MANY_ATTEMPTS], &LITTLE_ROOM].concat();
    let mut kills = 0;
    for _ in 0..6 {
        let before = stored(&database).await;
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        let further = eventually(DEADLINE, "more to be stored", async || {
            assert_eq!(walpost.try_exit(), None, "{}", walpost.output());
            let is_streaming = walpost.output().contains("streaming");
            (is_streaming || stored(&database).await > before).then_some(!is_streaming)
        })
        .await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        kills += usize::from(further);
        // THEN none is there twice, and nothing of the topic is shown as sent
        let twice =
            "SELECT id FROM walpost.straggler GROUP BY outbox, id HAVING count(*) > 1 LIMIT 1";
        assert!(database.rows(twice, &[]).await.is_empty());
        assert_eq!(status(&database, "t", "sent").await, 0);
    }
    assert!(kills > 2, "the scan was over after {kills} kills");

    // AND in the end all of the other topic is there, and this one's is stored, each row once
    let mut walpost = database.start(&settings).await;
    let sent = "SELECT payload::int8 FROM walpost.outbox_status s JOIN walpost.outbox o USING (id) WHERE s.aggregatetype = 'a' AND status = 'sent'";
    let sent = database.rows(sent, &[]).await.len();
    assert_eq!(sent, 19_900, "the scan is over");
    assert_eq!(count(&database, "dead").await, 100);
    assert_eq!(stored(&database).await, 20_100);

    // AND WHEN the topic heals, and walpost is killed while it does, THEN each key arrives in order
    delete(&topic).await;
    for left in [18_000, 12_000, 5_000] {
        eventually(DEADLINE, "some stragglers to go", async || {
            (stored(&database).await < left).then_some(())
        })
        .await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        walpost = database.start(&settings).await;
    }
    wait_for_count(&database, "retrying", 0).await;
    wait_for_count(&database, "parked", 0).await;
    let repeats = assert_numbers(&topic, 10, 20_000).await;
    println!("{kills} kills of the scan, {repeats} of 20000 came again");
    wait_for_status(&database, "t", "sent", 20_000).await;
    let others = payloads(&database.topic("a"), 19_900).await;
    let others: std::collections::HashSet<String> = others.into_iter().collect();
    assert_eq!(others.len(), 19_900);
    walpost.stop().await;
}

#[tokio::test]
async fn the_scan_passes_a_straggler_only_when_it_is_committed() {
    // GIVEN old rows with one too large among them, and a session that keeps it from being stored
    let database = without_slot("scancommit", &[]).await;
    insert_numbers(&database, "a", 5, 1, 100).await;
    database.sql(OVERSIZE).await;
    insert_numbers(&database, "a", 5, 101, 100).await;
    database.init(&[], &[]).await;
    database
        .sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_advisory_xact_lock(4711); RETURN new; END $$;
             CREATE TRIGGER wait BEFORE INSERT ON walpost.straggler FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        .await;
    let locker = database.connect().await;
    let lock = "SELECT pg_advisory_lock(4711)";
    locker.batch_execute(lock).await.expect("a lock");
    let passed = async || {
        let query = "SELECT max(seq) FROM walpost.outbox WHERE seq <= (
                         SELECT (scan_position->'tables'->>'walpost.outbox')::bigint FROM walpost.progress)";
        database.rows(query, &[]).await[0].get::<_, Option<i64>>(0)
    };
    let large = "SELECT seq FROM walpost.outbox WHERE aggregatetype = 't'";
    let large: i64 = database.rows(large, &[]).await[0].get(0);

    // WHEN the scan has published all the others
    let settings = [&QUICK[..], &[NOTED_SOON, MANY_ATTEMPTS]].concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    wait_for_blocked_insert(&database).await;
    assert_numbers(&database.topic("a"), 5, 200).await;

    // THEN it stands in front of that one, and the stream does not begin
    eventually(DEADLINE, "the scan to note where it is", async || {
        (passed().await? == large - 1).then_some(())
    })
    .await;
    assert!(!walpost.output().contains("streaming"));
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    assert_eq!(passed().await, Some(large - 1));
    assert_eq!(status(&database, "a", "sent").await, 0);

    // AND WHEN it may be stored: THEN the next one does, and streams
    let unlock = "SELECT pg_advisory_unlock(4711)";
    locker.batch_execute(unlock).await.expect("the lock goes");
    let walpost = database.start(&settings).await;
    assert_eq!(count(&database, "retrying").await, 1);
    assert_eq!(status(&database, "a", "sent").await, 200);
    assert_eq!(status(&database, "t", "retrying").await, 1);
    walpost.stop().await;
}

#[tokio::test]
async fn at_the_limit_the_scan_waits_until_stragglers_have_gone() {
    // GIVEN old rows of a topic that lets nobody in, more than may be stored
    let database = without_slot("scanlimit", &[]).await;
    let topic = database.topic("t");
    make_terminated(&topic).await;
    insert_numbers(&database, "t", 5, 1, 3000).await;
    database.init(&[], &[]).await;
    let limit = ("WALPOST_STRAGGLER_LIMIT", "300");
    let settings = [
        &QUICK[..],
        &[NOTED_SOON, MANY_ATTEMPTS, limit],
        &LITTLE_ROOM,
    ]
    .concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost
        .wait_for_line("WALPOST_STRAGGLER_LIMIT is reached", DEADLINE)
        .await;
    // (What is on its way into the table counts as well, and arrives there.)
    eventually(DEADLINE, "300 to be stored", async || {
        (stored(&database).await >= 300).then_some(())
    })
    .await;
    let rows = stored(&database).await;
    assert!(rows < 3000, "{rows} are stored");
    assert!(!walpost.output().contains("streaming"));

    // WHEN it heals: THEN they go while the scan runs, it goes on, and the stream begins
    delete(&topic).await;
    walpost.wait_for_line("streaming", DEADLINE).await;
    wait_for_none(&database).await;
    assert_eq!(assert_numbers(&topic, 5, 3000).await, 0);
    walpost.stop().await;
}

#[tokio::test]
async fn a_poller_goes_on_with_other_topics_and_keeps_each_keys_order_when_it_is_killed() {
    // GIVEN a poller, and a topic that lets nobody in
    let database = Database::create("pollref").await;
    database.init(&["--payload", "text"], &[POLL]).await;
    let topic = database.topic("t");
    make_terminated(&topic).await;
    let mut walpost = poll(&database, &[]).await;

    // WHEN more of it and of another comes, it is killed again and again, and the topic heals meanwhile
    let mut first = 1;
    for kill in 0..6_i64 {
        insert_numbers(&database, "t", 10, first, 300).await;
        insert_numbers(&database, "a", 10, first, 300).await;
        first += 300;
        if kill < 4 {
            eventually(DEADLINE, "some of it to be stored", async || {
                (stored(&database).await >= kill * 200).then_some(())
            })
            .await;
            assert_eq!(status(&database, "t", "sent").await, 0);
        }
        if kill == 3 {
            // THEN the other topic goes on
            wait_for_status(&database, "a", "sent", first - 1).await;
            assert_numbers(&database.topic("a"), 10, first - 1).await;
            delete(&topic).await;
        }
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        walpost = poll(&database, &[]).await;
    }

    // THEN everything arrives, each key in order, and is sent
    wait_for_status(&database, "t", "sent", first - 1).await;
    wait_for_none(&database).await;
    for name in ["t", "a"] {
        let repeats = assert_numbers(&database.topic(name), 10, first - 1).await;
        println!("{name}: {repeats} of {} came again", first - 1);
    }
    walpost.stop().await;
}
