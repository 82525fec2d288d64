//! Rows with the same id: a row is known by its `seq` and its `txid` as well.

use crate::support::{Asked, FakeBroker, Reaction, Walpost, admin};
use crate::*;

const POLL: (&str, &str) = ("WALPOST_MODE", "poll");

/// An outbox whose ids are not unique.
async fn prepare(settings: &[(&str, &str)], columns: &str) -> Database {
    let database = Database::create("isolation").await;
    database
        .sql(&format!(
            "CREATE TABLE events (id text, aggregatetype text, aggregateid text, type text, payload text, sent_at timestamptz,
                                  created_at timestamptz DEFAULT clock_timestamp() {columns})"
        ))
        .await;
    let settings = [settings, &[TABLE]].concat();
    database.init(&["--payload", "text"], &settings).await;
    database
}

const TABLE: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "public.events");
const TXID: &str = ", txid xid8 NOT NULL DEFAULT pg_current_xact_id()";
const BOTH: &str =
    ", txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY";

async fn insert_same(database: &Database, topic: &str, payload: &str) {
    database
        .sql(&format!(
            "INSERT INTO events (id, aggregatetype, aggregateid, type, payload) VALUES ('same', '{topic}', 'k', 'e', '{payload}')"
        ))
        .await;
}

#[tokio::test]
async fn a_row_is_not_deleted_for_the_receipt_of_an_earlier_one_with_its_id() {
    // GIVEN a poller that has published a row in its first look and waits for the receipt; another look does not come
    let database = prepare(&[POLL, DELETE], BOTH).await;
    insert_same(&database, "t", "1").await;
    let broker = FakeBroker::start().await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    let url = broker.url();
    let settings = [POLL, DELETE, TABLE, ("WALPOST_PULSAR_URL", &url)];
    let never = [&settings[..], &[("WALPOST_SCAN_INTERVAL", "1h")]].concat();
    let walpost = database.walpost(&["run"], &never).spawn();
    eventually(DEADLINE, "the row to be sent", async || {
        (broker.count(Asked::Send) > 0).then_some(())
    })
    .await;

    // WHEN one with the same id is committed, and then the receipt comes
    insert_same(&database, "t", "2").await;
    broker.heal();
    broker.release(|_| {});

    // THEN the first one goes, and the other stays
    wait_count(&database, "events WHERE payload = '1'", 0).await;
    assert_eq!(count(&database, "events").await, 1);
    walpost.stop().await;

    // AND at the next look it is published as well, and goes behind its own receipt
    let walpost = database.walpost(&["run"], &settings).spawn();
    wait_count(&database, "events", 0).await;
    walpost.stop().await;
    assert_eq!(broker.stored().len(), 2);
}

#[tokio::test]
async fn a_row_without_a_receipt_is_not_marked_with_another_of_its_id() {
    for columns in [BOTH, TXID] {
        // GIVEN a topic that takes nothing
        let database = prepare(&[MARK], columns).await;
        let refused = database.topic("refused");
        let path = refused.replace("persistent://", "/admin/v2/persistent/");
        let url = &servers().pulsar_admin_url;
        admin(url, "PUT", &path, "").await;
        admin(url, "POST", &format!("{path}/terminate"), "").await;
        let settings = [MARK, TABLE, ("WALPOST_RETRY_MAX", "1s")];
        let walpost = database.start(&settings).await;

        // WHEN two rows have the same id, and one of them gets no receipt
        insert_same(&database, "refused", "1").await;
        insert_same(&database, "t", "2").await;
        insert_same(&database, "t", "3").await;
        wait_count(
            &database,
            "events WHERE sent_at IS NOT NULL AND payload IN ('2', '3')",
            2,
        )
        .await;
        wait_count(&database, "walpost.straggler", 1).await;

        // THEN it is not marked
        wait_count(&database, "events WHERE sent_at IS NULL", 1).await;

        // AND when its topic is mended it arrives, and is the one that is marked
        admin(url, "DELETE", &format!("{path}?force=true"), "").await;
        assert_eq!(numbers(&refused, 1).await, [1]);
        wait_count(&database, "walpost.straggler", 0).await;
        wait_count(&database, "events WHERE sent_at IS NULL", 0).await;
        walpost.stop().await;
        assert_eq!(numbers(&database.topic("t"), 2).await, [2, 3]);
    }
}

/// Two stragglers with the same id: one of a topic that is refused, and one that is no event.
async fn stragglers_with_one_id(
    database: &Database,
    settings: &[(&str, &str)],
    older: bool,
) -> Walpost {
    if older {
        database
            .sql("ALTER TABLE walpost.straggler DROP COLUMN row_seq, DROP COLUMN row_txid")
            .await;
    }
    let refused = database.topic("refused");
    let path = refused.replace("persistent://", "/admin/v2/persistent/");
    let url = &servers().pulsar_admin_url;
    admin(url, "PUT", &path, "").await;
    admin(url, "POST", &format!("{path}/terminate"), "").await;
    let walpost = database.start(&[settings, &[TABLE]].concat()).await;
    for (topic, payload) in [
        ("refused", "1"),
        ("a/b", "2"),
        ("refused", "3"),
        ("a/b", "4"),
    ] {
        insert_same(database, topic, payload).await;
    }
    wait_count(database, "walpost.straggler", 4).await;
    walpost
}

#[tokio::test]
async fn discard_touches_the_very_row_of_its_straggler_and_no_other_of_its_id() {
    for mode in [MARK, DELETE] {
        for (columns, older) in [(BOTH, false), (TXID, false), (BOTH, true)] {
            // GIVEN stragglers of rows that all have one id
            let database = prepare(&[mode], columns).await;
            let walpost = stragglers_with_one_id(&database, &[mode], older).await;

            // WHEN those of one topic, and then those that are no events, are discarded
            let left = "SELECT payload FROM events WHERE sent_at IS NULL ORDER BY payload";
            let discard = async |state: &str| -> Vec<String> {
                let args = ["stragglers", "discard", "--state", state, "--yes"];
                let discard = database.walpost(&args, &[TABLE]).run(DEADLINE);
                let (code, said) = discard.await;
                assert!(code == 0 && said.contains("discarded "), "{said}");
                let rows = database.rows(left, &[]).await;
                rows.iter().map(|row| row.get(0)).collect()
            };
            let first = discard("dead").await;
            discard("retrying").await;
            let second = discard("parked").await;

            // THEN their rows are marked or deleted, and none where the table is an earlier version's and does not say which they are
            if older {
                assert_eq!(first, ["1", "2", "3", "4"], "{mode:?}");
                assert_eq!(second, first, "{mode:?}");
            } else {
                assert_eq!(first, ["1", "3"], "{mode:?} {columns}");
                assert!(second.is_empty(), "{mode:?} {columns}: {second:?}");
            }
            walpost.stop().await;
        }
    }
}

#[tokio::test]
async fn a_discarded_straggler_is_known_by_its_seq_also_where_others_have_its_id() {
    for settings in [&[][..], &[MARK]] {
        let database = prepare(settings, BOTH).await;
        let walpost = stragglers_with_one_id(&database, settings, false).await;
        let args = ["stragglers", "discard", "--state", "dead", "--yes"];
        let (code, said) = database.walpost(&args, &[TABLE]).run(DEADLINE).await;
        assert_eq!(code, 0, "{said}");
        let sql = "SELECT d.seq FROM walpost.discarded d JOIN events e USING (seq) WHERE e.payload IN ('2', '4')";
        assert_eq!(database.rows(sql, &[]).await.len(), 2);
        walpost.stop().await;
    }
}

async fn snapshot(database: &Database) -> String {
    let sql = "SELECT pg_current_snapshot()::text";
    database.rows(sql, &[]).await[0].get(0)
}

/// A slot that may bring rows that are to be scanned: those from that snapshot up to now.
async fn gap_since(database: &Database, before: &str) {
    let upto = snapshot(database).await;
    database
        .sql(&format!(
            "UPDATE walpost.progress SET delivered = '{before}', scan_before = '{before}', scan_upto = '{upto}', scan_position = NULL"
        ))
        .await;
}

#[tokio::test]
async fn the_stream_skips_the_very_row_that_a_scan_published_and_no_other_of_its_id() {
    // GIVEN a row that was inserted and deleted, and so is in the stream only, and one with its id that a scan publishes and the stream
    // brings as well
    let database = prepare(&[], BOTH).await;
    let before = snapshot(&database).await;
    database
        .sql(
            "BEGIN;
             INSERT INTO events (id, aggregatetype, aggregateid, type, payload) VALUES ('same', 't', 'k', 'e', '1');
             DELETE FROM events;
             COMMIT",
        )
        .await;
    insert_same(&database, "t", "2").await;
    gap_since(&database, &before).await;

    // WHEN walpost scans and then streams
    let walpost = database.start(&[TABLE]).await;
    insert_same(&database, "t", "3").await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN each row came once
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 3).await, [1, 2, 3]);
}

#[tokio::test]
async fn the_stream_brings_a_row_although_a_scan_published_one_with_its_id_and_seq() {
    // GIVEN a row that a scan publishes, and that the stream might have brought as well but did not
    let database = prepare(&[], BOTH).await;
    let before = snapshot(&database).await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'update')")
        .await;
    insert_same(&database, "t", "1").await;
    database
        .sql("ALTER PUBLICATION walpost SET (publish = 'insert')")
        .await;
    gap_since(&database, &before).await;
    let walpost = database.start(&[TABLE]).await;

    // WHEN numbers begin again, and another row has its id and seq
    database.sql("TRUNCATE events RESTART IDENTITY").await;
    insert_same(&database, "t", "2").await;
    let rows = database.rows("SELECT seq FROM events", &[]).await;
    assert_eq!(rows[0].get::<_, i64>(0), 1);

    // THEN it comes
    assert_eq!(numbers(&database.topic("t"), 2).await, [1, 2]);
    walpost.stop().await;
}

#[tokio::test]
async fn a_row_without_a_number_is_marked_by_its_id_and_published_once() {
    // GIVEN a table whose seq may be NULL
    let database = prepare(&[MARK], ", seq bigint").await;
    let walpost = database.start(&[MARK, TABLE, SOON[0], SOON[1]]).await;
    insert_same(&database, "t", "1").await;
    wait_count(&database, "events WHERE sent_at IS NULL", 0).await;
    database.sql("INSERT INTO events (id, aggregatetype, aggregateid, type, payload, seq) VALUES ('same', 't', 'k', 'e', '2', 7)").await;
    wait_count(&database, "events WHERE sent_at IS NULL", 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 2).await, [1, 2]);
}

#[tokio::test]
async fn a_seq_that_is_no_whole_number_hides_no_txid() {
    for seq in ["text DEFAULT 'x'", "numeric DEFAULT 1.5"] {
        // GIVEN a table whose rows its txid tells apart, and not its seq
        let database = prepare(&[MARK], &format!("{TXID}, seq {seq}")).await;
        let walpost = database.start(&[MARK, TABLE, SOON[0], SOON[1]]).await;

        // WHEN rows are published THEN they are marked, and come once
        insert_same(&database, "t", "1").await;
        insert_same(&database, "t", "2").await;
        wait_count(&database, "events WHERE sent_at IS NULL", 0).await;
        looked_for_unmarked_in(&database, "events").await;
        walpost.stop().await;
        assert_eq!(numbers(&database.topic("t"), 2).await, [1, 2], "{seq}");
    }
}

const UNMARKED_EVENTS: &str = "events WHERE sent_at IS NULL";
const ADD_SEQ: &str = "ALTER TABLE events ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY";
const REFUSE: &str = "
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
    CREATE TRIGGER refuse BEFORE UPDATE ON events FOR EACH ROW WHEN (old.payload = '7') EXECUTE FUNCTION refuse()";
const MEND: &str = "DROP TRIGGER refuse ON events";

#[tokio::test]
async fn rows_are_marked_and_come_once_although_seq_is_added_under_way() {
    // GIVEN a running walpost, and a table without seq
    let database = prepare(&[MARK], TXID).await;
    database.sql(REFUSE).await;
    let mut walpost = database.start(&[MARK, TABLE, SOON[0], SOON[1]]).await;
    let addr = addr_of(&mut walpost).await;
    insert_same(&database, "t", "1").await;
    wait_count(&database, UNMARKED_EVENTS, 0).await;

    // WHEN it gets the column
    database.sql(ADD_SEQ).await;
    insert_same(&database, "t", "2").await;
    insert_same(&database, "t", "7").await;

    // THEN its rows are marked, one that is refused is left, and none comes again
    wait_count(&database, UNMARKED_EVENTS, 1).await;
    wait_left(&addr, 1).await;
    looked_for_unmarked_in(&database, "events").await;

    // AND the connection to Postgres is made again: THEN so it is still
    let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE database = current_database()";
    database.sql(end).await;
    insert_same(&database, "t", "8").await;
    wait_count(&database, UNMARKED_EVENTS, 1).await;
    looked_for_unmarked_in(&database, "events").await;
    database.sql(MEND).await;
    wait_count(&database, UNMARKED_EVENTS, 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 4).await, [1, 2, 7, 8]);
}

#[tokio::test]
async fn a_row_that_was_left_before_its_table_got_a_seq_is_not_due_for_ever() {
    for is_old_note in [false, true] {
        // GIVEN a row that could not be marked, of a table without seq
        let database = prepare(&[MARK], TXID).await;
        database.sql(REFUSE).await;
        let settings = [MARK, TABLE, SOON[0], SOON[1]];
        let mut walpost = database.start(&settings).await;
        let addr = addr_of(&mut walpost).await;
        insert_same(&database, "t", "7").await;
        wait_left(&addr, 1).await;
        walpost.stop().await;

        // WHEN the table gets the column before the next start
        database.sql(ADD_SEQ).await;
        database.sql(MEND).await;
        if is_old_note {
            // An earlier version did not note the txid beside the number.
            database
                .sql("UPDATE walpost.left_undone SET what = regexp_replace(what::text, '\"txid\": *[0-9]+', '\"txid\": null', 'g')::jsonb")
                .await;
        }
        let mut walpost = database.start(&settings).await;
        let addr = addr_of(&mut walpost).await;

        // THEN it is marked; where it is not known which row it is that is told, and it comes once more
        if is_old_note {
            let told = "which rows of the table they are is not known";
            walpost.wait_for_line(told, DEADLINE).await;
        }
        wait_count(&database, UNMARKED_EVENTS, 0).await;
        wait_left(&addr, 0).await;
        walpost.stop().await;
        let expected = vec![7; 1 + usize::from(is_old_note)];
        let arrived = numbers(&database.topic("t"), expected.len()).await;
        assert_eq!(arrived, expected);
    }
}

#[tokio::test]
async fn check_warns_of_ids_that_no_unique_index_covers_and_of_no_others() {
    let database = prepare(&[], BOTH).await;
    let check = async |settings: &[(&str, &str)]| {
        database.walpost(&["check"], settings).run(DEADLINE).await.1
    };
    let warned = "no unique index of public.events covers";
    let said = check(&[TABLE]).await;
    assert!(
        said.contains(warned) && said.contains("apart by seq"),
        "{said}"
    );
    database.sql("CREATE UNIQUE INDEX ON events (id)").await;
    let said = check(&[TABLE]).await;
    assert!(!said.contains("no unique index"), "{said}");

    // walpost's own table in partitions is unique by id and time.
    let database = Database::create("isolation").await;
    database
        .init(&["--payload", "text", "--partition-by", "day"], &[])
        .await;
    let said = database.walpost(&["check"], &[]).run(DEADLINE).await.1;
    assert!(!said.contains("no unique index"), "{said}");
}

#[tokio::test]
async fn a_straggler_whose_number_is_not_known_deletes_no_row_by_an_id_that_is_unique_with_another_column_only()
 {
    // GIVEN rows with one id, and a straggler of the first, as an earlier version stored it
    let never = [
        POLL,
        DELETE,
        TABLE,
        ("WALPOST_SCAN_INTERVAL", "1h"),
        ("WALPOST_RETRY_INITIAL", "50ms"),
    ];
    let database = prepare(&never, BOTH).await;
    database
        .sql("ALTER TABLE events ADD PRIMARY KEY (id, payload)")
        .await;
    insert_same(&database, "a/b", "1").await;
    let walpost = database.walpost(&["run"], &never).spawn();
    wait_count(&database, "walpost.straggler", 1).await;
    insert_same(&database, "t", "2").await;
    let topic = database.topic("t");
    database
        .sql(&format!(
            "UPDATE walpost.straggler SET row_seq = NULL, row_txid = NULL, topic = '{topic}', key = 'k'"
        ))
        .await;

    // WHEN it is published
    let args = ["stragglers", "retry", "--state", "dead"];
    let (code, said) = database.walpost(&args, &never).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    wait_count(&database, "walpost.straggler", 0).await;
    walpost.stop().await;

    // THEN the row that has no receipt is still there, and arrives in the next look
    wait_count(&database, "events WHERE payload = '2'", 1).await;
    let walpost = database.walpost(&["run"], &[POLL, DELETE, TABLE]).spawn();
    wait_count(&database, "events WHERE payload = '2'", 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&topic, 2).await, [1, 2]);
}
