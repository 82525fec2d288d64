//! Rows that are read from the table, by the gap scan and in poll mode: what cannot be published is stored, and holds up
//! nothing but its own key, from the scan over the stream to the retry.

use crate::support::{Walpost, admin, eventually, servers};
use crate::*;

pub(crate) const NOTED_SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");
pub(crate) const POLL: (&str, &str) = ("WALPOST_MODE", "poll");
pub(crate) const MANY_ATTEMPTS: (&str, &str) = ("WALPOST_RETRY_MAX_ATTEMPTS", "1000");
/// So that a scan has stored some of its rows before it has read all.
pub(crate) const LITTLE_ROOM: [(&str, &str); 2] = [
    ("WALPOST_MAX_IN_FLIGHT_MESSAGES", "500"),
    ("WALPOST_BATCH_MAX_MESSAGES", "100"),
];
pub(crate) const OVERSIZE: &str =
    "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                        VALUES ('t', 'k', 't', repeat('x', 5 * 1024 * 1024))";
pub(crate) const MEND: &str = "UPDATE walpost.straggler SET payload = 'smaller' WHERE state = 'retrying' AND length(payload) > 1000000";

/// Puts the slot away, so that everything committed until [`make_slot`] is a gap.
pub(crate) async fn drop_slot(database: &Database) {
    let sql = "SELECT pg_drop_replication_slot($1::text::name)";
    eventually(DEADLINE, "the slot to be free", async || {
        database.client.execute(sql, &[&database.slot]).await.ok()
    })
    .await;
}

/// An outbox without a slot: what is committed now is read from the table.
pub(crate) async fn without_slot(prefix: &str, settings: &[(&str, &str)]) -> Database {
    let database = Database::create(prefix).await;
    database.init(&["--payload", "text"], settings).await;
    drop_slot(&database).await;
    database.sql("DELETE FROM walpost.progress").await;
    database
}

/// Makes a topic that lets no producer in; [`delete`] heals it.
pub(crate) async fn make_terminated(topic: &str) {
    admin(&servers().pulsar_admin_url, "PUT", &path(topic), "").await;
    terminate(topic).await;
}

/// How many rows of an aggregate type have a status.
pub(crate) async fn status(database: &Database, topic: &str, status: &str) -> i64 {
    let query =
        "SELECT count(*) FROM walpost.outbox_status WHERE aggregatetype = $1 AND status = $2";
    database.rows(query, &[&topic, &status]).await[0].get(0)
}

pub(crate) async fn wait_for_status(database: &Database, topic: &str, expected: &str, rows: i64) {
    let what = format!("{rows} rows of {topic} to be {expected}");
    eventually(DEADLINE, &what, async || {
        (status(database, topic, expected).await == rows).then_some(())
    })
    .await;
}

pub(crate) async fn stored(database: &Database) -> i64 {
    let rows = database.rows("SELECT count(*) FROM walpost.straggler", &[]);
    rows.await[0].get(0)
}

pub(crate) async fn poll(database: &Database, settings: &[(&str, &str)]) -> Walpost {
    let settings = [&QUICK[..], &[POLL, NOTED_SOON, MANY_ATTEMPTS], settings].concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line("polling", DEADLINE).await;
    walpost
}

/// Rows of which three can be no events, one is too large, and one stands behind that.
async fn insert_unpublishable(database: &Database) {
    database
        .sql("ALTER TABLE walpost.outbox ALTER aggregateid DROP NOT NULL")
        .await;
    insert(database, "t", "k", "before").await;
    insert(database, "a/b", "k", SECRET).await;
    database.sql(OVERSIZE).await;
    database
        .sql(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, headers)
             VALUES ('t', NULL, 't', 'hunter2', NULL), ('t', 'other', 't', 'hunter2', '[1]')",
        )
        .await;
    insert(database, "t", "k", "behind").await;
    insert(database, "t", "other", "goes on").await;
}

/// Asserts what became of them.
async fn assert_unpublishable_are_stored(database: &Database) {
    // A row is sent when the whole scan is over.
    wait_for_status(database, "t", "sent", 2).await;
    let topic = database.topic("t");
    assert_eq!(payloads(&topic, 2).await, ["before", "goes on"]);
    let query = "SELECT s.state, s.outbox, s.commit_lsn::text, s.ordinal = o.seq, s.reason, o.payload
                 FROM walpost.straggler s JOIN walpost.outbox o ON o.id::text = s.id ORDER BY o.seq";
    let rows = database.rows(query, &[]).await;
    let states: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(states, ["dead", "retrying", "dead", "dead", "parked"]);
    for row in &rows {
        assert_eq!(row.get::<_, &str>(1), "walpost.outbox");
        assert_eq!(row.get::<_, &str>(2), "0/0");
        assert!(row.get::<_, bool>(3), "it is not known by its seq");
    }
    let reason = |row: usize| rows[row].get::<_, &str>(4);
    assert!(reason(0).contains("'/'"), "{}", reason(0));
    assert!(reason(1).contains("maxMessageSize"), "{}", reason(1));
    assert!(reason(2).contains("NULL"), "{}", reason(2));
    assert!(reason(3).contains("headers"), "{}", reason(3));
    assert_eq!(status(database, "t", "retrying").await, 2);
    assert_eq!(status(database, "t", "dead").await, 2);
    assert_eq!(status(database, "a/b", "dead").await, 1);
}

#[tokio::test]
async fn unpublishable_rows_among_old_ones_are_stored_and_park_their_key_for_the_stream_too() {
    // GIVEN rows from before the slot, some of which cannot be published
    let database = without_slot("oldbad", &[]).await;
    insert_unpublishable(&database).await;
    database.init(&[], &[]).await;

    // WHEN walpost starts: THEN they are stored, and the stream begins
    let settings = [&QUICK[..], &[NOTED_SOON, MANY_ATTEMPTS]].concat();
    let walpost = database.start(&settings).await;
    assert_unpublishable_are_stored(&database).await;
    assert!(!walpost.output().contains(SECRET), "{}", walpost.output());

    // AND what the stream brings of the key waits behind what the scan has stored, also after a restart
    insert(&database, "t", "k", "streamed").await;
    wait_for_count(&database, "parked", 2).await;
    walpost.stop().await;
    let walpost = database.start(&settings).await;
    insert(&database, "t", "k", "later").await;
    insert(&database, "t", "other", "passes").await;
    wait_for_count(&database, "parked", 3).await;
    database.wait_all_confirmed(DEADLINE).await;

    // AND WHEN somebody mends it, THEN all of the key arrives in order, and is sent
    database.sql(MEND).await;
    wait_for_count(&database, "parked", 0).await;
    wait_for_count(&database, "retrying", 0).await;
    let all = payloads(&database.topic("t"), 7).await;
    assert_eq!(
        all,
        [
            "before", "goes on", "passes", "smaller", "behind", "streamed", "later"
        ]
    );
    wait_for_status(&database, "t", "sent", 7).await;
    assert_eq!(status(&database, "t", "dead").await, 2);
    walpost.stop().await;
}

#[tokio::test]
async fn unpublishable_rows_are_stored_in_poll_mode_and_park_their_key_from_look_to_look() {
    // GIVEN a poller, and rows some of which cannot be published
    let database = Database::create("pollbad").await;
    database.init(&["--payload", "text"], &[POLL]).await;
    insert_unpublishable(&database).await;
    let walpost = poll(&database, &[]).await;
    assert_unpublishable_are_stored(&database).await;

    // WHEN later looks, also of another process, and a stream find more of the key
    insert(&database, "t", "k", "looked").await;
    wait_for_count(&database, "parked", 2).await;
    walpost.stop().await;
    let walpost = poll(&database, &[]).await;
    insert(&database, "t", "k", "later").await;
    insert(&database, "t", "other", "passes").await;
    wait_for_count(&database, "parked", 3).await;
    wait_for_status(&database, "t", "sent", 3).await;

    // AND somebody mends it: THEN all of the key arrives in order, and is sent
    database.sql(MEND).await;
    wait_for_count(&database, "parked", 0).await;
    wait_for_count(&database, "retrying", 0).await;
    insert(&database, "t", "k", "looked again").await;
    wait_for_status(&database, "t", "sent", 8).await;
    let all = payloads(&database.topic("t"), 8).await;
    let expected = [
        "before",
        "goes on",
        "passes",
        "smaller",
        "behind",
        "looked",
        "later",
        "looked again",
    ];
    assert_eq!(all, expected);
    walpost.stop().await;
}

#[tokio::test]
async fn rows_of_two_tables_with_the_same_seq_and_id_are_both_stored() {
    let database = Database::create("twins").await;
    for table in ["one", "two"] {
        database
            .sql(&format!(
                "CREATE TABLE {table} (id text PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload text,
                                       txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY);
                 INSERT INTO {table} VALUES ('1', 'a/b', 'k', 't', 'p')"
            ))
            .await;
    }
    let settings = [("WALPOST_OUTBOX_TABLE", "one, two")];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    assert_eq!(count(&database, "dead").await, 2);
    walpost.stop().await;
}

#[tokio::test]
async fn rows_of_the_scan_and_of_retried_stragglers_are_marked_or_deleted_and_no_others() {
    for (mode, left) in [("mark", "sent_at IS NULL"), ("delete", "true")] {
        // GIVEN old rows of which one cannot be published yet
        let mode = ("WALPOST_AFTER_PUBLISH", mode);
        let database = without_slot("scanmark", &[mode]).await;
        insert_numbers(&database, "t", 5, 1, 500).await;
        database.sql(OVERSIZE).await;
        database.init(&[], &[mode]).await;
        let left = format!("SELECT count(*) FROM walpost.outbox WHERE {left}");
        let wait_left = async |rows: i64| {
            eventually(DEADLINE, &format!("{rows} rows to be left"), async || {
                (database.rows(&left, &[]).await[0].get::<_, i64>(0) == rows).then_some(())
            })
            .await;
        };

        // WHEN the scan has published the others: THEN they are marked or gone, and that one is not
        let age = ("WALPOST_STRAGGLER_AGE", "1s");
        let settings = [&QUICK[..], &[NOTED_SOON, MANY_ATTEMPTS, mode, age]].concat();
        let walpost = database.start(&settings).await;
        wait_left(1).await;
        wait_for_count(&database, "retrying", 1).await;

        // AND WHEN it is retried and arrives: THEN it is too
        database.sql(MEND).await;
        wait_for_none(&database).await;
        wait_left(0).await;
        walpost.stop().await;
        assert_eq!(payloads(&database.topic("t"), 501).await.len(), 501);
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_published_nor_stored_is_named_and_ends_the_scan() {
    // GIVEN no table for stragglers, and an old row that can be no event
    let database = without_slot("oldend", &[]).await;
    insert(&database, "t", "k", "before").await;
    insert(&database, "a/b", "k", SECRET).await;
    database.init(&[], &[]).await;
    database.sql("DROP TABLE walpost.straggler CASCADE").await;
    let query = "SELECT id::text FROM walpost.outbox WHERE aggregatetype = 'a/b'";
    let id: String = database.rows(query, &[]).await[0].get(0);

    // THEN both kinds of run end with its id, and what can be done
    for mode in [("WALPOST_MODE", "stream"), POLL] {
        let (code, said) = database.walpost(&["run"], &[mode]).run(DEADLINE).await;
        assert_eq!(code, 69, "{said}");
        assert!(
            said.contains(&id) && said.contains("walpost init"),
            "{said}"
        );
        assert!(!said.contains(SECRET), "{said}");
    }
}

#[tokio::test]
async fn two_rows_with_one_seq_are_refused_and_nothing_of_them_is_lost() {
    let database = without_slot("oneseq", &[]).await;
    insert_numbers(&database, "t", 5, 1, 100).await;
    database
        .sql("ALTER TABLE walpost.outbox ALTER seq DROP IDENTITY; UPDATE walpost.outbox SET seq = 50 WHERE seq = 51")
        .await;
    database.init(&[], &[]).await;
    let (code, said) = database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("have the seq 50"), "{said}");

    // WHEN one has another: THEN all arrive
    database
        .sql("UPDATE walpost.outbox SET seq = 51 WHERE payload = '51'")
        .await;
    let walpost = database.start(&QUICK).await;
    assert_numbers(&database.topic("t"), 5, 100).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_row_that_is_no_event_and_comes_from_table_and_log_is_stored_once() {
    // GIVEN rows behind the slot's first position, which the slot's making leaves to the scan as well
    let database = prepared("bothways").await;
    insert(&database, "t", "k", "before").await;
    insert(&database, "a/b", "k", "no topic").await;
    insert(&database, "t", "k", "after").await;
    database
        .sql("UPDATE walpost.progress SET scan_upto = pg_current_snapshot()")
        .await;

    // WHEN both bring them
    let walpost = database.start(&QUICK).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN each is there once
    wait_for_count(&database, "dead", 1).await;
    insert(&database, "t", "k", "last").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert_eq!(count(&database, "dead").await, 1);
    let received = payloads(&database.topic("t"), 3).await;
    assert_eq!(received, ["before", "after", "last"]);
    walpost.stop().await;
}
