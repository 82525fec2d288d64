//! Guarantee: an event that cannot be published is not lost, also where there is no table for stragglers (made by an older
//! `init`; one without rights is refused: `tests/stragglers.rs` has that and the rest). A warning says so at the start. What is before it is drained and confirmed, walpost stops with
//! exit code 69 and names the row, the slot still holds it, and it arrives once what stands against it is mended. Where a whole
//! topic is refused, its events wait instead, and other topics go on.

mod support;

use std::time::Duration;

use support::{Database, admin, consume, eventually, servers};
use walpost::Lsn;

const DEADLINE: Duration = Duration::from_secs(60);
/// Stands in payloads and other values; must never be in the output.
const SECRET: &str = "hunter2";
/// The broker's `maxMessageSize`, of which it tells every client.
const MAX_MESSAGE_BYTES: usize = 5 * 1024 * 1024;

/// One event that cannot be published, and what is expected of it.
struct Case<'a> {
    /// The bad row's id, as it must stand in the error.
    id: &'a str,
    /// More of what the error must say.
    reasons: &'a [&'a str],
    settings: &'a [(&'a str, &'a str)],
    /// Inserts the bad row.
    bad: &'a str,
    /// Inserts a good row; `{}` is its payload.
    good: &'a str,
}

impl Case<'_> {
    async fn insert_good(&self, database: &Database, payload: &str) {
        database.sql(&self.good.replace("{}", payload)).await;
    }

    /// Commits good rows around the bad one while walpost streams; checks how it stops and what the slot keeps.
    async fn stops_at_the_bad_row(&self, database: &Database) {
        // GIVEN a stream on which events arrive, without a table for stragglers
        database.sql("DROP TABLE walpost.straggler CASCADE").await;
        let mut walpost = database.start(self.settings).await;
        let warned = walpost.output();
        assert!(
            warned.contains("there is no table walpost.straggler")
                && warned.contains("run walpost init"),
            "{warned}"
        );
        self.insert_good(database, "before 1").await;
        database.wait_all_confirmed(DEADLINE).await;

        // WHEN rows before it, the bad row, and rows after it are committed
        self.insert_good(database, "before 2").await;
        self.insert_good(database, "before 3").await;
        database.sql(self.bad).await;
        self.insert_good(database, "after 1").await;

        // THEN it stops and says why, and nothing of the row but its id
        let code = walpost.wait_exit(DEADLINE).await;
        self.check_end(code, &walpost.output());

        // AND the slot stands right before the bad row's transaction
        self.check_slot(database).await;
    }

    fn check_end(&self, code: i32, said: &str) {
        assert_eq!(code, 69, "{said}");
        let errors: Vec<&str> = said
            .lines()
            .filter(|line| line.contains("walpost: error: "))
            .collect();
        let [error] = errors[..] else {
            panic!("not one error:\n{said}")
        };
        for expected in [self.id].iter().chain(self.reasons) {
            assert!(error.contains(expected), "no {expected:?} in: {error}");
        }
        assert!(!said.contains(SECRET), "{said}");
        let password = servers()
            .postgres_url
            .split(['@', ':'])
            .nth(2)
            .expect("a password");
        assert!(!said.contains(password), "{said}");
    }

    /// Reads what the slot would send now: first the bad row's transaction, and before that nothing.
    async fn check_slot(&self, database: &Database) {
        let slot = &database.slot;
        eventually(DEADLINE, "the slot to be free", async || {
            database.walsender_pid(slot).await.is_none().then_some(())
        })
        .await;
        let confirmed = database
            .confirmed_flush_lsn(slot)
            .await
            .expect("the slot is there");
        let query = "SELECT lsn::text, data FROM pg_logical_slot_peek_binary_changes($1::text::name, NULL, NULL,
                         'proto_version', '1', 'publication_names', 'walpost')";
        let changes = database.rows(query, &[slot]).await;
        let inserts: Vec<&[u8]> = changes
            .iter()
            .map(|change| change.get::<_, &[u8]>(1))
            .filter(|data| data.starts_with(b"I"))
            .collect();
        let holds =
            |data: &[u8], text: &str| data.windows(text.len()).any(|part| part == text.as_bytes());
        assert_eq!(inserts.len(), 2, "not the bad row and the one after it");
        assert!(holds(inserts[0], self.id) && holds(inserts[1], "after 1"));
        let commit = changes
            .iter()
            .find(|change| change.get::<_, &[u8]>(1).starts_with(b"C"));
        let commit: Lsn = commit
            .expect("a commit")
            .get::<_, &str>(0)
            .parse()
            .expect("an LSN");
        assert!(
            confirmed < commit,
            "{confirmed} is behind the bad row's commit at {commit}"
        );
    }

    /// Starts again as before and expects the same end.
    async fn stops_again(&self, database: &Database) {
        let (code, said) = database
            .walpost(&["run"], self.settings)
            .run(DEADLINE)
            .await;
        self.check_end(code, &said);
        self.check_slot(database).await;
    }

    /// Starts with other settings and expects all that is left.
    async fn goes_on(&self, database: &Database, settings: &[(&str, &str)]) {
        let settings: Vec<_> = self.settings.iter().chain(settings).copied().collect();
        let walpost = database.start(&settings).await;
        database.wait_all_confirmed(DEADLINE).await;
        walpost.stop().await;
    }
}

/// The payloads in a topic, in order.
async fn payloads(topic: &str, expected: usize) -> Vec<String> {
    let received = consume(&servers().pulsar_url, topic, expected, DEADLINE).await;
    let text = |message: support::Received| String::from_utf8(message.payload).expect("UTF-8");
    received.into_iter().map(text).collect()
}

const BEFORE: [&str; 3] = ["before 1", "before 2", "before 3"];

#[tokio::test]
async fn a_null_key_stops_the_stream_until_another_column_is_the_key() {
    // GIVEN somebody else's table, whose key may be NULL
    let database = Database::create("nullkey").await;
    database
        .sql("CREATE TABLE events (id serial, aggregatetype text, aggregateid text, type text, payload text, other text)")
        .await;
    let case = Case {
        id: "4711",
        reasons: &[
            "public.events",
            "aggregateid",
            "NULL",
            "declare the column NOT NULL",
        ],
        settings: &[("WALPOST_OUTBOX_TABLE", "events")],
        bad: "INSERT INTO events VALUES (4711, 't', NULL, 'hunter2', 'bad', 'hunter2')",
        good: "INSERT INTO events (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{}')",
    };
    database.init(&[], case.settings).await;

    case.stops_at_the_bad_row(&database).await;
    assert_eq!(payloads(&database.topic("t"), 3).await, BEFORE);
    case.stops_again(&database).await;
    assert_eq!(
        payloads(&database.topic("t"), 3).await,
        BEFORE,
        "nothing comes twice"
    );

    // WHEN the key is taken from a column that has a value
    case.goes_on(&database, &[("WALPOST_COLUMN_AGGREGATEID", "id")])
        .await;

    // THEN the event arrives, and each of the others once
    let mut all = payloads(&database.topic("t"), 5).await;
    // Two keys now, so two lanes.
    all[3..].sort();
    assert_eq!(all, ["before 1", "before 2", "before 3", "after 1", "bad"]);
}

#[tokio::test]
async fn a_value_that_cannot_stand_in_a_topic_name_is_never_another_topic() {
    let database = Database::create("badtopic").await;
    database.init(&["--payload", "text"], &[]).await;
    let id = "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001";
    let case = Case {
        id,
        reasons: &["walpost.outbox", "aggregatetype", "'/'", "WALPOST_TOPIC"],
        settings: &[],
        bad: "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload)
              VALUES ('0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001', 'hunter2/x', 'k', 'hunter2', 'bad')",
        good: "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{}')",
    };

    case.stops_at_the_bad_row(&database).await;
    assert_eq!(payloads(&database.topic("t"), 3).await, BEFORE);
    case.stops_again(&database).await;

    // WHEN the template does without the column
    let topic = database.topic("everything");
    case.goes_on(&database, &[("WALPOST_TOPIC", &topic)]).await;

    // THEN the event and what came after it arrive there, and nothing comes twice
    assert_eq!(payloads(&topic, 2).await, ["bad", "after 1"]);
    assert_eq!(payloads(&database.topic("t"), 3).await, BEFORE);
}

#[tokio::test]
async fn a_topic_of_its_own_that_is_none_stops_the_stream_until_the_column_is_left_out() {
    let database = Database::create("badown").await;
    database.init(&["--payload", "text"], &[]).await;
    let case = Case {
        id: "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0002",
        reasons: &["walpost.outbox", "\"topic\"", "is no topic name"],
        settings: &[],
        bad: "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload, topic)
              VALUES ('0192aaaa-bbbb-7ccc-8ddd-eeeeffff0002', 't', 'k', 't', 'bad', 'kafka://hunter2')",
        good: "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{}')",
    };

    case.stops_at_the_bad_row(&database).await;
    case.stops_again(&database).await;

    // WHEN that column is not read, THEN all arrive, in order, each once
    case.goes_on(
        &database,
        &[("WALPOST_COLUMN_TOPIC", "nothing has this name")],
    )
    .await;
    let all = ["before 1", "before 2", "before 3", "bad", "after 1"];
    assert_eq!(payloads(&database.topic("t"), 5).await, all);
}

#[tokio::test]
async fn a_message_larger_than_the_broker_takes_stops_the_stream_at_every_start() {
    let database = Database::create("oversize").await;
    database.init(&["--payload", "text"], &[]).await;
    let bad = format!(
        "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload)
         VALUES ('0192aaaa-bbbb-7ccc-8ddd-eeeeffff0003', 't', 'k', 't', rpad('{SECRET}', {MAX_MESSAGE_BYTES}, 'hunter2'))"
    );
    let limit = MAX_MESSAGE_BYTES.to_string();
    let case = Case {
        id: "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0003",
        reasons: &[&limit, "maxMessageSize"],
        settings: &[],
        bad: &bad,
        good: "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', '{}')",
    };

    case.stops_at_the_bad_row(&database).await;
    case.stops_again(&database).await;
    case.stops_again(&database).await;
    assert_eq!(payloads(&database.topic("t"), 3).await, BEFORE);
}

#[tokio::test]
async fn a_message_just_below_the_brokers_limit_arrives() {
    // GIVEN a stream
    let database = Database::create("largest").await;
    database.init(&["--payload", "text"], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN a payload leaves only a little for metadata
    let bytes = MAX_MESSAGE_BYTES - 1024;
    let insert = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 't', repeat('x', {bytes}))"
    );
    database.sql(&insert).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN it is in the topic
    let received = payloads(&database.topic("t"), 1).await;
    assert_eq!(
        received.iter().map(String::len).collect::<Vec<_>>(),
        [bytes]
    );
}

#[tokio::test]
async fn events_of_a_terminated_topic_wait_until_it_is_made_anew_and_other_topics_go_on() {
    // GIVEN a topic that was terminated after its first event
    let database = Database::create("terminated").await;
    database.init(&["--payload", "text"], &[]).await;
    database.sql("DROP TABLE walpost.straggler CASCADE").await;
    let mut walpost = database.start(&[]).await;
    let insert = |topic: &str, payload: &str| {
        format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('{topic}', 'k', 't', '{payload}')"
        )
    };
    database.sql(&insert("t", "before")).await;
    database.wait_all_confirmed(DEADLINE).await;
    let topic = database.topic("t");
    let path = topic.replace("persistent://", "/admin/v2/persistent/");
    let admin_url = &servers().pulsar_admin_url;
    admin(admin_url, "POST", &format!("{path}/terminate"), "").await;

    // WHEN events for it and for another topic are committed
    let before = database.current_wal_lsn().await;
    database.sql(&insert("t", SECRET)).await;
    database.sql(&insert("other", "goes on 1")).await;
    let line = walpost.wait_for_line("cannot publish until", DEADLINE);
    let line = line.await;
    database.sql(&insert("t", "after")).await;
    database.sql(&insert("other", "goes on 2")).await;
    let after = database.current_wal_lsn().await;

    // THEN the other topic's arrive, the log names the terminated one, and the slot keeps its events
    let others = payloads(&database.topic("other"), 2).await;
    assert_eq!(others, ["goes on 1", "goes on 2"]);
    assert!(
        line.contains(&topic) && line.contains("terminated"),
        "{line}"
    );
    let slot = database.confirmed_flush_lsn(&database.slot).await;
    let confirmed = slot.expect("the slot");
    assert!(
        confirmed < after,
        "{confirmed} has passed the event ({before} to {after})"
    );

    // AND WHEN somebody deletes it, THEN they arrive in a new one
    admin(admin_url, "DELETE", &format!("{path}?force=true"), "").await;
    database.wait_all_confirmed(DEADLINE).await;
    assert!(!walpost.output().contains(SECRET), "{}", walpost.output());
    walpost.stop().await;
    assert_eq!(payloads(&topic, 2).await, [SECRET, "after"]);
    assert_eq!(payloads(&database.topic("other"), 2).await, others);
}
