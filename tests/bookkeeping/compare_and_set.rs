//! The statements that change `walpost.progress`, from real sessions.

use walpost::Lsn;
use walpost::scanner::coverage::{Leaves, Seen};
use walpost::scanner::progress::{self, Claim, Position, Progress};

use crate::support::{Database, consume, on_each_major, servers};
use crate::{DEADLINE, NOTED_SOON, insert};

async fn stored(database: &Database) -> Progress {
    let read = progress::read(&database.client, &database.slot).await;
    read.expect("it can be read").expect("a row")
}

async fn claim(database: &Database, session: &str) -> (Claim, Progress) {
    let progress = stored(database).await;
    let claimed = progress::claim(
        &database.client,
        &database.slot,
        &progress,
        session,
        Some(1),
    )
    .await;
    (claimed.expect("a claim"), progress)
}

async fn snapshot(database: &Database) -> String {
    progress::snapshot(&database.client)
        .await
        .expect("a snapshot")
}

async fn a_change_from_what_is_not_stored(major: i32) {
    // GIVEN a process that has claimed the row, and knows it
    let database = Database::create_on_major(major, "cas").await;
    database.init(&[], &[]).await;
    let client = &database.client;
    let (ours, mut known) = claim(&database, "we").await;
    progress::closed(client, &ours, &mut known, Leaves::default())
        .await
        .expect("no gap is left");
    let upto = snapshot(&database).await;
    let covered = || Leaves::whole(&Seen::listed([7]));

    // WHEN another one claims it, or makes the slot anew, or a person edits it
    let others: [&str; 4] = [
        "session = 'they'",
        "scan_before = '7:7:', scan_upto = NULL, scan_position = NULL",
        "scan_upto = pg_current_snapshot(), scan_position = NULL",
        "delivered = '9:9:'",
    ];
    let slot = &database.slot;
    for change in others {
        let saved = format!(
            "DROP TABLE IF EXISTS saved; CREATE TABLE saved AS TABLE walpost.progress; UPDATE walpost.progress SET {change} WHERE slot = '{slot}'"
        );
        database.sql(&saved).await;
        let now = stored(&database).await;

        // THEN none of our statements changes it, and each says so
        let mut from = known.clone();
        let noted =
            progress::delivered(client, &ours, &mut from, &upto, Some(covered()), None).await;
        let looked = progress::look(client, &ours, &mut from.clone(), &upto).await;
        let closed = progress::closed(client, &ours, &mut from.clone(), covered()).await;
        let scanned = progress::scanned(client, &ours, &from).await;
        let declared = progress::declared(client, &ours, &mut from.clone(), covered()).await;
        let missing = progress::missing(
            client,
            &ours,
            &mut from.clone(),
            &upto,
            Position::default(),
            None,
        )
        .await;
        for written in [noted, looked, closed, scanned, declared, missing] {
            let error = written.expect_err(change);
            assert!(progress::is_changed(&error), "{}", error.report());
            assert!(error.is_temporary(), "{}", error.report());
        }
        let claimed = progress::claim(client, slot, &known, "we", Some(1)).await;
        assert!(claimed.is_err(), "{change}");
        assert_eq!(stored(&database).await, now, "{change}");
        assert_eq!(from, known, "{change}");
        database.sql("UPDATE walpost.progress p SET session = s.session, delivered = s.delivered, scan_before = s.scan_before,
                          scan_upto = s.scan_upto, scan_position = s.scan_position FROM saved s WHERE s.slot = p.slot").await;
    }

    // AND what it knows it may change
    progress::delivered(
        client,
        &ours,
        &mut known,
        &upto,
        Some(covered()),
        Some("a version".to_owned()),
    )
    .await
    .expect("it is ours");
    let now = stored(&database).await;
    assert_eq!(
        (now.delivered, now.scan_upto, now.tables),
        (Some(upto), None, Some(covered()))
    );
}

async fn two_claims(major: i32) {
    let database = Database::create_on_major(major, "cas").await;
    database.init(&[], &[]).await;
    let client = &database.client;
    // GIVEN a process that stopped in good order
    let (first, _) = claim(&database, "first").await;
    progress::streaming(client, &first)
        .await
        .expect("it is its");
    progress::stopped(client, &first, Lsn::new(77), Some("{\"t\": 1}"))
        .await
        .expect("it is its");

    // WHEN the next one claims the row THEN it is told, and so is the one after it, should this one come no further
    let (second, known) = claim(&database, "second").await;
    let now = stored(&database).await;
    for known in [&known, &now] {
        assert_eq!(
            (known.confirmed, known.streamed.as_deref()),
            (Some(Lsn::new(77)), Some("{\"t\": 1}"))
        );
    }

    // WHEN it streams THEN the row says nothing of what the slot was told any more (what was streamed names the position at which it holds)
    progress::streaming(client, &second)
        .await
        .expect("it is its");
    let now = stored(&database).await;
    assert_eq!(
        (now.confirmed, now.streamed.as_deref(), now.timeline),
        (None, Some("{\"t\": 1}"), Some(1))
    );

    // AND the first one can neither stream nor stop again
    assert!(progress::streaming(client, &first).await.is_err());
    assert!(
        progress::stopped(client, &first, Lsn::new(99), None)
            .await
            .is_err()
    );
    assert!(progress::reread(client, &first).await.is_err());
}

async fn a_table_of_an_earlier_version(major: i32) {
    // GIVEN an installation of an earlier version
    let database = Database::create_on_major(major, "older").await;
    database.init(&[], &[]).await;
    database
        .sql(
            "DROP VIEW walpost.outbox_status;
             ALTER TABLE walpost.progress DROP COLUMN timeline, DROP COLUMN tables, DROP COLUMN streamed, DROP COLUMN producer_generation;
             CREATE VIEW walpost.outbox_status AS
             SELECT o.id, o.aggregatetype, o.aggregateid, o.type, o.created_at, o.seq, o.txid, o.sent_at,
                    CASE WHEN pg_visible_in_snapshot(o.txid, p.delivered) THEN 'sent' ELSE 'pending' END AS status,
                    NULL::text AS reason, NULL::integer AS attempts
             FROM walpost.outbox o, walpost.progress p",
        )
        .await;

    // WHEN the new version runs THEN it says what to do
    let (code, said) = database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("walpost init"), "{said}");

    // AND that is enough
    let (code, said) = database.walpost(&["init"], &[]).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("brought up to date table walpost.progress"),
        "{said}"
    );
    let walpost = database.start(&[NOTED_SOON]).await;
    insert(&database.client, "row").await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // AND producers have the names that they had
    assert_eq!(stored(&database).await.generation, 0);
    let received = consume(&servers().pulsar_url, &database.topic("t"), 1, DEADLINE).await;
    let name = &received[0].producer_name;
    assert!(!name.contains("-1g"), "{name}");
}

async fn names_that_are_not_to_be_used_again(major: i32) {
    // GIVEN a process that has claimed the row
    let database = Database::create_on_major(major, "names").await;
    database.init(&[], &[]).await;
    let client = &database.client;
    let (first, _) = claim(&database, "first").await;
    assert_eq!(stored(&database).await.generation, 0);

    // WHEN it marks its names, perhaps twice because an answer was lost THEN that is stored, and nothing else changes
    let before = stored(&database).await;
    for _ in 0..2 {
        let raised = progress::raise_generation(client, &first, 1).await;
        raised.expect("it is its");
    }
    let mut expected = before;
    expected.generation = 1;
    assert_eq!(stored(&database).await, expected);

    // AND nothing lowers it, neither a statement that comes late nor a slot that is made anew
    progress::raise_generation(client, &first, 3)
        .await
        .expect("it is its");
    progress::raise_generation(client, &first, 2)
        .await
        .expect("it is its");
    let now = stored(&database).await;
    let system_id = now.system_id.clone();
    let before = snapshot(&database).await;
    let identity = (&*system_id, 1);
    let making =
        progress::slot_making(client, &database.slot, Some(&now), identity, &before, None).await;
    assert_eq!(making.expect("a row").generation, 3);
    assert_eq!(stored(&database).await.generation, 3);

    // WHEN another one has claimed the row THEN the first changes nothing any more
    let (_second, _) = claim(&database, "second").await;
    let error = progress::raise_generation(client, &first, 4).await;
    assert!(progress::is_changed(&error.expect_err("it is another's")));
    assert_eq!(stored(&database).await.generation, 3);
}

on_each_major! {
    a_change_that_was_computed_from_what_is_not_stored_any_more_changes_nothing: a_change_from_what_is_not_stored();
    what_the_slot_was_told_last_is_read_once_and_a_stop_of_an_earlier_claim_is_refused: two_claims();
    a_generation_of_names_is_raised_under_the_claim_and_never_lowered: names_that_are_not_to_be_used_again();
    a_table_of_an_earlier_version_is_refused_until_init_has_brought_it_up_to_date: a_table_of_an_earlier_version();
}
