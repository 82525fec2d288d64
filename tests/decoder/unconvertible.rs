//! Rows that the server itself cannot send: text that it cannot convert to UTF-8 (byte 0x81 in a database of the encoding `WIN1252`), and a
//! value whose output function fails by an `internal_error`.

use walpost::postgres::TableName;
use walpost::scanner::table::ScanTable;

use crate::support::{Database, consume, eventually, servers};
use crate::{DEADLINE, QUICK, wait_for_stragglers};

const SETTINGS: [(&str, &str); 1] = [("WALPOST_OUTBOX_TABLE", "events")];
const DROP_SLOT: &str = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = current_database()";

async fn database() -> Database {
    let database = Database::create_in("WIN1252", "win").await;
    database
        .sql(
            "CREATE TABLE events (
                 id text NOT NULL, aggregatetype text, aggregateid text, type text, payload text, note text,
                 txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY)",
        )
        .await;
    database.init(&[], &SETTINGS).await;
    database
}

/// SQL: a row whose texts are given as hexadecimal bytes of the database's encoding.
fn row(id: &str, key: &str, payload: &str, note: &str) -> String {
    let text = |hex: &str| format!("convert_from('\\x{hex}', 'WIN1252')");
    format!(
        "INSERT INTO events (id, aggregatetype, aggregateid, type, payload, note)
         VALUES ('{id}', 't', {}, 't', {}, {});",
        text(key),
        text(payload),
        text(note)
    )
}

/// SQL: good rows, with and without what is not ASCII, and among them some that cannot be converted: in the key, in the payload,
/// two in a row, and in a column that nobody reads.
fn rows() -> String {
    [
        row("1", "6be9", "e9", "e9"),
        row("payload", "6be9", "6181", "61"),
        row("2", "6be9", "62", "61"),
        row("key", "6b81", "63", "61"),
        row("both", "6b81", "6181", "61"),
        row("3", "6be9", "64", "81"),
        row("4", "6be9", "65", "61"),
    ]
    .concat()
}

#[tokio::test]
async fn what_the_server_cannot_convert_to_utf_8_is_isolated_by_a_scan() {
    // GIVEN such text in rows from before the slot
    let database = database().await;
    database.sql(DROP_SLOT).await;
    database.sql(&rows()).await;

    for poll in [false, true] {
        // WHEN the gap is scanned, or the table polled
        let settings = [&QUICK[..], &SETTINGS].concat();
        let poller = [&settings[..], &[("WALPOST_MODE", "poll")]].concat();
        let (settings, says) = if poll {
            (poller, "polling")
        } else {
            (settings, "streaming")
        };
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        walpost.wait_for_line(says, DEADLINE).await;
        wait_for_stragglers(&database, "dead", 3).await;

        // THEN the other rows come, in order
        let received = consume(&servers().pulsar_url, &database.topic("t"), 4, DEADLINE).await;
        let ids: Vec<&str> = received
            .iter()
            .map(|message| message.property("id"))
            .collect();
        let expected = ["1", "2", "3", "4"].repeat(1 + usize::from(poll));
        assert_eq!(ids, expected);
        assert_eq!(received[0].key.as_deref(), Some("ké"));
        assert_eq!(received[0].payload, "é".as_bytes());

        // AND these are stored whole
        let query = "SELECT id, key, payload, topic, reason FROM walpost.straggler ORDER BY number";
        let stored: Vec<(String, String, Vec<u8>)> = database
            .rows(query, &[])
            .await
            .iter()
            .map(|row| {
                assert_eq!(row.get::<_, Option<&str>>(3), None);
                assert!(row.get::<_, &str>(4).contains("cannot convert"));
                (row.get(0), row.get(1), row.get(2))
            })
            .collect();
        let whole =
            |id: &str, key: &str, payload: &[u8]| (id.to_owned(), key.to_owned(), payload.to_vec());
        assert_eq!(
            stored,
            [
                whole("payload", "k\\351", b"a\x81"),
                whole("key", "k\\201", b"c"),
                whole("both", "k\\201", b"a\x81"),
            ]
        );
        walpost.stop().await;
        if !poll {
            // The same once more, by polling.
            database
                .sql("DELETE FROM walpost.straggler; UPDATE walpost.progress SET delivered = NULL, scan_upto = NULL, scan_position = NULL")
                .await;
        }
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_converted_is_not_passed_over_where_another_has_its_seq() {
    // GIVEN such a row that has the number of the one before it
    let database = database().await;
    database.sql(DROP_SLOT).await;
    let numbered = |seq: u32, row: String| {
        let row = row.replace(
            "payload, note)",
            "payload, note, seq) OVERRIDING SYSTEM VALUE",
        );
        row.replace(");", &format!(", {seq});"))
    };
    let rows = [
        numbered(5, row("1", "6b", "61", "61")),
        numbered(5, row("bad", "6b", "6181", "61")),
        numbered(6, row("2", "6b", "61", "61")),
    ];
    database.sql(&rows.concat()).await;

    // WHEN the table is polled THEN that is told
    let settings = [&QUICK[..], &SETTINGS, &[("WALPOST_MODE", "poll")]].concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    let told = "two rows of table public.events have the seq 5";
    walpost.wait_for_line(told, DEADLINE).await;
    assert_eq!(walpost.wait_exit(DEADLINE).await, 69);

    // AND once it has a number of its own no row is missing
    database
        .sql(
            "ALTER TABLE events ALTER COLUMN seq SET GENERATED BY DEFAULT;
             UPDATE events SET seq = 7 WHERE id = 'bad'",
        )
        .await;
    let walpost = database.walpost(&["run"], &settings).spawn();
    wait_for_stragglers(&database, "dead", 1).await;
    walpost.stop().await;
    let received = consume(&servers().pulsar_url, &database.topic("t"), 2, DEADLINE).await;
    let ids: Vec<&str> = received
        .iter()
        .map(|message| message.property("id"))
        .collect();
    assert_eq!(ids, ["1", "2"]);
}

#[tokio::test]
async fn a_row_that_cannot_be_converted_is_not_passed_over_where_a_partition_is_attached_under_a_scan()
 {
    for attached in ["61", "6181"] {
        // GIVEN a list of rows, the second of which cannot be converted, and then a partition with a row between these
        let database = Database::create_in("WIN1252", "win").await;
        database
            .sql(&format!(
                "CREATE TABLE events (seq bigint, txid xid8 DEFAULT pg_current_xact_id(), payload text) PARTITION BY RANGE (seq);
                 CREATE TABLE odd PARTITION OF events FOR VALUES FROM (7) TO (9);
                 CREATE TABLE first PARTITION OF events FOR VALUES FROM (5) TO (6);
                 CREATE TABLE even (LIKE events);
                 INSERT INTO even VALUES (6, '1', convert_from('\\x{attached}', 'WIN1252'));
                 INSERT INTO events VALUES (5, '1', 'good'), (7, '1', convert_from('\\x81', 'WIN1252')), (8, '1', 'good')"
            ))
            .await;
        let name = TableName {
            schema: "public".to_owned(),
            name: "events".to_owned(),
        };
        let client = &database.client;
        let table = ScanTable::describe(client, &name).await;
        let table = table.expect("a table").expect("with seq and txid");
        let read = async |attach: &str| {
            let mut seen = Vec::new();
            let mut rows = table
                .open_chosen(client, "WHERE o.seq > 0 ORDER BY o.seq", &[])
                .await
                .expect("a list");
            database.sql(attach).await;
            let ended = loop {
                let next = rows.next(async |row| {
                    seen.push(row.seq);
                    Ok(())
                });
                match next.await {
                    Ok(true) => {}
                    Ok(false) => break Ok(()),
                    Err(error) => break Err(error),
                }
            };
            rows.close().await.expect("a session");
            (seen, ended)
        };

        // WHEN the list is read THEN it does not end as if all had come
        let attach = "ALTER TABLE events ATTACH PARTITION even FOR VALUES FROM (6) TO (7)";
        let (_, ended) = read(attach).await;
        let error = ended.expect_err("7 was passed over");
        assert!(error.is_temporary(), "{}", error.report());

        // AND the next list has all
        let (seen, ended) = read("SELECT").await;
        assert!(ended.is_ok());
        assert_eq!(seen, [5, 6, 7, 8]);
    }
}

#[tokio::test]
async fn a_stream_that_cannot_go_on_says_at_which_row_and_a_new_slot_gets_past_it() {
    // GIVEN such text in a row that is streamed, and a slot that must not be made anew
    let database = database().await;
    let settings = [&QUICK[..], &SETTINGS].concat();
    let fail = [&settings[..], &[("WALPOST_SLOT_LOST", "fail")]].concat();
    let mut walpost = database.start(&fail).await;
    database.sql(&row("before", "6b", "62", "61")).await;
    database.wait_all_confirmed(DEADLINE).await;
    let bad = [
        row("good", "6b", "62", "61"),
        row("bad", "6b", "6181", "61"),
    ]
    .concat();
    database.sql(&format!("BEGIN; {bad} COMMIT")).await;

    // WHEN the walsender ends, THEN walpost says where, and what to do
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();
    assert_eq!(code, 69, "{said}");
    let xid: String = database
        .rows("SELECT txid::text FROM events WHERE id = 'bad'", &[])
        .await[0]
        .get(0);
    for part in [
        &format!("row 2 of transaction {xid}, which commits at "),
        "public.events",
        "go on streaming at ",
        "22P05",
        "WALPOST_SLOT_LOST=recover",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }

    // AND where it may make the slot anew, it gets past it, and the row is a straggler
    database.sql(&row("behind", "6b", "62", "61")).await;
    let walpost = database.start(&settings).await;
    wait_for_stragglers(&database, "dead", 1).await;
    eventually(DEADLINE, "what is behind it", async || {
        let received = consume(&servers().pulsar_url, &database.topic("t"), 0, DEADLINE).await;
        let ids: Vec<&str> = received
            .iter()
            .map(|message| message.property("id"))
            .collect();
        ids.contains(&"behind").then_some(())
    })
    .await;
    walpost.stop().await;
}

/// A column that nobody reads, of a type whose output functions can be broken.
const MOOD: &str = "
    CREATE TYPE mood AS ENUM ('good');
    CREATE TABLE events (
        id text NOT NULL, aggregatetype text, aggregateid text, type text, payload text, mood mood,
        txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY)";

/// SQL: the functions that put out values of the type, or (for 0) its own.
fn output_functions(oid: u32) -> String {
    let function = |own: &str| {
        let own = format!("'{own}'::regproc");
        if oid == 0 { own } else { oid.to_string() }
    };
    format!(
        "UPDATE pg_type SET typoutput = {}, typsend = {} WHERE oid = 'mood'::regtype",
        function("enum_out"),
        function("enum_send")
    )
}

/// SQL: a row with a value of that type.
fn moody(id: &str) -> String {
    format!(
        "INSERT INTO events (id, aggregatetype, aggregateid, type, payload, mood) VALUES ('{id}', 't', 'k', 't', '1', 'good');"
    )
}

#[tokio::test]
async fn a_row_that_the_server_fails_to_send_again_and_again_is_named_and_a_new_slot_gets_past_it()
{
    // GIVEN a row with a value whose output function is gone, by which the server fails with an internal error
    let database = Database::create("internal").await;
    database.sql(MOOD).await;
    database.init(&["--payload", "text"], &SETTINGS).await;
    let settings = [&QUICK[..], &SETTINGS].concat();
    let fail = [&settings[..], &[("WALPOST_SLOT_LOST", "fail")]].concat();
    let mut walpost = database.start(&fail).await;
    database.sql(&moody("before")).await;
    database.wait_all_confirmed(DEADLINE).await;
    database.sql(&output_functions(4_000_000_000)).await;
    database
        .sql(&format!(
            "BEGIN; {} {} COMMIT",
            moody("bad"),
            moody("worse")
        ))
        .await;

    // WHEN the walsender fails at it each time, THEN walpost does not try for ever, and says where, and what to do
    let code = walpost.wait_exit(DEADLINE).await;
    let said = walpost.output();
    assert_eq!(code, 69, "{said}");
    let xid: String = database
        .rows("SELECT txid::text FROM events WHERE id = 'bad'", &[])
        .await[0]
        .get(0);
    for part in [
        &format!("row 1 of transaction {xid}, which commits at "),
        "cannot be sent by the server",
        "public.events",
        "go on streaming at ",
        "XX000",
        "WALPOST_SLOT_LOST=recover",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }

    // AND where it may make the slot anew, the rows come from the table, which does not need that column
    database.sql(&output_functions(0)).await;
    let walpost = database.start(&settings).await;
    database.sql(&moody("behind")).await;
    let all = ["bad", "before", "behind", "worse"];
    eventually(DEADLINE, "all rows", async || {
        let received = consume(&servers().pulsar_url, &database.topic("t"), 0, DEADLINE).await;
        let ids: std::collections::BTreeSet<&str> = received
            .iter()
            .map(|message| message.property("id"))
            .collect();
        ids.into_iter().eq(all).then_some(())
    })
    .await;
    walpost.stop().await;
}
