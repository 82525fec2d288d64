//! A discarded straggler stays away: in the modes in which rows that are not marked, or still there, are published again, and
//! when its transaction is sent or scanned again because walpost was killed.

use crate::dead::stragglers;
use crate::scan::{drop_slot, make_terminated, without_slot};
use crate::support::{admin, eventually, servers};
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

/// A namespace that is not there: what goes to it waits, and holds the log's position.
struct Missing(String);

impl Missing {
    fn of(database: &Database) -> Self {
        Self(format!("public/{}-late", database.name))
    }

    /// A row of that namespace; the statement's other rows stand before it.
    fn row(&self) -> String {
        format!("('t', 'holds', 't', 'holds', 'persistent://{}/x')", self.0)
    }

    async fn create(&self) {
        let path = format!("/admin/v2/namespaces/{}", self.0);
        admin(&servers().pulsar_admin_url, "PUT", &path, "").await;
    }
}

/// One transaction: an event that its topic refuses, one that is no event, and one that holds the log's position.
async fn insert_both(database: &Database, missing: &Missing) {
    let insert = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic)
         VALUES ('t', 'k', 't', 'discarded', NULL), ('a/b', 'k', 't', 'no event', NULL), {}",
        missing.row()
    );
    database.sql(&insert).await;
}

async fn discard_both(database: &Database) {
    wait_for_count(database, "retrying", 1).await;
    wait_for_count(database, "dead", 1).await;
    for state in ["retrying", "dead"] {
        let (code, said) = stragglers(database, &["discard", "--state", state, "--yes"]).await;
        assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    }
}

async fn noted(database: &Database) -> i64 {
    let rows = database.rows("SELECT count(*) FROM walpost.discarded", &[]);
    rows.await[0].get(0)
}

/// What happens to a process, its topic and its slot after a straggler was discarded.
struct After {
    mode: &'static str,
    is_healed: bool,
    is_slot_lost: bool,
}

async fn a_discarded_straggler_stays_away_after_a_kill(after: After) {
    // GIVEN two stragglers of a transaction that is not confirmed, since another event of it waits
    let database = Database::create("discard").await;
    let mode = ("WALPOST_AFTER_PUBLISH", after.mode);
    database.init(&["--payload", "text"], &[mode]).await;
    let settings = [
        mode,
        ("WALPOST_STRAGGLER_AGE", "1h"),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
    ];
    let (mut walpost, topic) = with_terminated(&database, &settings).await;
    let missing = Missing::of(&database);
    insert_both(&database, &missing).await;

    // WHEN they are discarded, walpost is killed, and the transaction comes again from the log or from the table
    discard_both(&database).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    if after.is_healed {
        delete(&topic).await;
    }
    if after.is_slot_lost {
        drop_slot(&database).await;
        missing.create().await;
    }
    let settings = [&QUICK[..], &settings].concat();
    let walpost = database.start(&settings).await;
    insert(&database, "t", "k", "after").await;

    // THEN they are neither published nor stored, and what comes behind them is
    if after.is_healed {
        // The first one's delivery may not have been noted: a scan then repeats it.
        let all = eventually(DEADLINE, "what comes behind them", async || {
            let all = payloads(&topic, 0).await;
            all.iter().any(|payload| payload == "after").then_some(all)
        });
        let mut published = all.await;
        published.retain(|payload| payload != "first");
        assert_eq!(published, ["after"]);
    } else {
        wait_for_count(&database, "retrying", 1).await;
        let rows = database.rows(
            "SELECT convert_from(payload, 'UTF8') FROM walpost.straggler",
            &[],
        );
        let stored: Vec<String> = rows.await.iter().map(|row| row.get(0)).collect();
        assert_eq!(stored, ["after"]);
    }
    if !after.is_slot_lost {
        assert_eq!(noted(&database).await, 2);
        missing.create().await;
    }
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "dead").await, 0);
    let said = walpost.output();
    assert_eq!(
        said.matches("a discarded event came again").count(),
        2,
        "{said}"
    );

    // THEN the note of them goes when their delivery is noted, and they have been discarded long enough
    database
        .sql("UPDATE walpost.discarded SET discarded_at = now() - interval '1 day'")
        .await;
    insert(&database, "u", "k", "more").await;
    eventually(DEADLINE, "nothing to be noted", async || {
        (noted(&database).await == 0).then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_discarded_straggler_is_not_stored_again_when_its_transaction_comes_again() {
    a_discarded_straggler_stays_away_after_a_kill(After {
        mode: "keep",
        is_healed: false,
        is_slot_lost: false,
    })
    .await;
}

#[tokio::test]
async fn a_discarded_straggler_is_not_published_when_its_transaction_comes_again_in_mark_mode() {
    a_discarded_straggler_stays_away_after_a_kill(After {
        mode: "mark",
        is_healed: true,
        is_slot_lost: false,
    })
    .await;
}

#[tokio::test]
async fn a_discarded_straggler_is_not_published_when_its_transaction_comes_again_in_delete_mode() {
    a_discarded_straggler_stays_away_after_a_kill(After {
        mode: "delete",
        is_healed: true,
        is_slot_lost: false,
    })
    .await;
}

#[tokio::test]
async fn a_discarded_straggler_is_not_published_when_its_slot_is_lost_and_the_gap_is_scanned() {
    a_discarded_straggler_stays_away_after_a_kill(After {
        mode: "keep",
        is_healed: true,
        is_slot_lost: true,
    })
    .await;
}

#[tokio::test]
async fn what_a_scan_has_stored_and_somebody_has_discarded_stays_away_when_the_scan_goes_on() {
    for settings in [&[][..], &[("WALPOST_MODE", "poll")]] {
        // GIVEN a scan of which the first row waits for its topic, and two are stored
        let database = if settings.is_empty() {
            without_slot("discard", settings).await
        } else {
            let database = Database::create("discard").await;
            database.init(&["--payload", "text"], settings).await;
            database
        };
        let (missing, topic) = (Missing::of(&database), database.topic("t"));
        make_terminated(&topic).await;
        let first = format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic) VALUES {}",
            missing.row()
        );
        database.sql(&first).await;
        insert(&database, "t", "k", "discarded").await;
        insert(&database, "a/b", "k", "no event").await;
        if settings.is_empty() {
            database.init(&[], &[]).await;
        }
        let settings = [&QUICK[..], settings].concat();
        let mut walpost = database.walpost(&["run"], &settings).spawn();

        // WHEN they are discarded, walpost is killed, and the topics heal
        discard_both(&database).await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        delete(&topic).await;
        missing.create().await;
        let walpost = database.walpost(&["run"], &settings).spawn();
        insert(&database, "t", "k", "after").await;

        // THEN the scan leaves them out
        assert_eq!(payloads(&topic, 1).await, ["after"]);
        assert_eq!(count(&database, "dead").await, 0);
        let said = walpost.output();
        assert_eq!(
            said.matches("a discarded event came again").count(),
            2,
            "{said}"
        );
        drop(walpost);
    }
}

#[tokio::test]
async fn a_straggler_that_is_discarded_just_before_it_comes_again_stays_away() {
    // GIVEN a straggler of a transaction whose first event waits, and a walpost that was killed
    let database = prepared("discard").await;
    let missing = Missing::of(&database);
    let settings = [("WALPOST_STRAGGLER_AGE", "1h")];
    let (mut walpost, topic) = with_terminated(&database, &settings).await;
    let insert_all = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic)
         VALUES {}, ('t', 'k', 't', 'discarded', NULL), ('t', 'k', 't', 'kept', NULL)",
        missing.row()
    );
    database.sql(&insert_all).await;
    wait_for_count(&database, "parked", 1).await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    delete(&topic).await;
    // The retries of the one that stays are not what is looked at here.
    database
        .sql("UPDATE walpost.straggler SET next_attempt_at = now() + interval '1 hour'")
        .await;

    // WHEN the next one, with room for one event, has read the table of stragglers, and one is discarded
    let little = [
        ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "1"),
        ("WALPOST_BATCH_MAX_MESSAGES", "1"),
    ];
    let settings = [&QUICK[..], &settings, &little].concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line("cannot publish yet", DEADLINE).await;
    let query = "SELECT id::text FROM walpost.outbox WHERE payload = 'discarded'";
    let id: String = database.rows(query, &[]).await[0].get(0);
    let (code, said) = stragglers(&database, &["discard", "--id", &id, "--yes"]).await;
    assert_eq!((code, said.trim()), (0, "discarded 1 stragglers"));
    missing.create().await;

    // THEN it is not published and not stored when it comes, and what is behind it is published
    database.wait_all_confirmed(DEADLINE).await;
    let (code, said) = stragglers(&database, &["retry", "--state", "retrying"]).await;
    assert_eq!(code, 0, "{said}");
    wait_for_none(&database).await;
    let mut published = payloads(&topic, 1).await;
    published.dedup();
    assert_eq!(published, ["kept"]);
    walpost.stop().await;
}
