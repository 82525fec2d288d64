//! Guarantee: a table without the columns that only walpost knows streams as it is; `check` says what it cannot have, and a mode
//! that it cannot have is refused with the statement that mends it, before anything is published.

mod support;

use std::time::Duration;

use support::{Database, Received, consume, eventually, servers};

const DEADLINE: Duration = Duration::from_secs(60);
/// Debezium's outbox table.
const DEBEZIUM: &str = "
    CREATE SCHEMA inventory;
    CREATE TABLE inventory.outboxevent (
        id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
        type varchar(255) NOT NULL, payload jsonb)";
const TABLE: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "inventory.outboxevent");
const MARK: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "mark");
const DELETE: (&str, &str) = ("WALPOST_AFTER_PUBLISH", "delete");
const RETENTION: (&str, &str) = ("WALPOST_RETENTION", "7d");

async fn debezium() -> Database {
    let database = Database::create("existing").await;
    database.sql(DEBEZIUM).await;
    database.init(&[], &[TABLE]).await;
    database
}

async fn insert(database: &Database, number: u32, and: &str) {
    database
        .sql(&format!(
            "BEGIN;
             INSERT INTO inventory.outboxevent
             VALUES (gen_random_uuid(), 't', 'k', 'e', '{number}');
             {and};
             COMMIT"
        ))
        .await;
}

async fn arrived(database: &Database, expected: usize) -> Vec<String> {
    let received = consume(
        &servers().pulsar_url,
        &database.topic("t"),
        expected,
        DEADLINE,
    )
    .await;
    let text = |message: Received| String::from_utf8(message.payload).expect("UTF-8");
    received.into_iter().map(text).collect()
}

#[tokio::test]
async fn debeziums_table_streams_with_rows_that_stay_and_rows_that_are_deleted_at_once() {
    let database = debezium().await;
    let walpost = database.start(&[TABLE]).await;
    insert(&database, 1, "").await;
    insert(&database, 2, "DELETE FROM inventory.outboxevent").await;
    insert(&database, 3, "").await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    assert_eq!(arrived(&database, 3).await, ["1", "2", "3"]);
}

#[tokio::test]
async fn check_says_what_a_table_cannot_have_and_what_it_says_mends_it() {
    let database = debezium().await;
    let check = async || database.walpost(&["check"], &[TABLE]).run(DEADLINE).await;
    let (code, said) = check().await;
    assert_eq!(code, 0, "it streams: {said}");
    for lacking in [
        "warn  table",
        "status, gap scan and retention",
        "seq",
        "the mode mark",
        "WALPOST_COLUMN_CREATED_AT",
    ] {
        assert!(said.contains(lacking), "no {lacking:?} in:\n{said}");
    }

    // WHEN the statements are run: THEN nothing is missing
    let mend = said
        .lines()
        .skip_while(|line| !line.contains("warn  table"))
        .nth(1)
        .expect("a line that mends");
    let (_, statements) = mend.split_once("-> ").expect("an arrow");
    database.sql(statements).await;
    let (code, said) = check().await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("ok    table        inventory.outboxevent has what every mode needs"),
        "{said}"
    );
}

#[tokio::test]
async fn a_mode_that_the_table_cannot_have_is_refused_with_the_statement_that_mends_it() {
    let database = debezium().await;
    insert(&database, 1, "").await;
    for (setting, expected) in [
        (
            MARK,
            [
                "no column sent_at",
                "ALTER TABLE inventory.outboxevent ADD COLUMN sent_at timestamptz;",
            ],
        ),
        (
            RETENTION,
            [
                "no column txid",
                "ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id();",
            ],
        ),
        (
            DELETE,
            [
                "walpost.after_publish does not exist",
                "WALPOST_AFTER_PUBLISH=delete walpost init",
            ],
        ),
    ] {
        for command in ["run", "check"] {
            let (code, said) = database
                .walpost(&[command], &[TABLE, setting, database.as_owner()])
                .run(DEADLINE)
                .await;
            assert_eq!(code, 69, "{command} {setting:?}: {said}");
            for words in expected {
                assert!(said.contains(words), "no {words:?} in:\n{said}");
            }
        }
    }
}

#[tokio::test]
async fn retention_is_refused_where_nothing_could_bring_a_row_that_the_log_has_not() {
    let database = debezium().await;
    database
        .sql(
            "ALTER TABLE inventory.outboxevent
             ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(),
             ADD COLUMN created_at timestamptz NOT NULL DEFAULT clock_timestamp()",
        )
        .await;
    let settings = [TABLE, RETENTION, database.as_owner()];
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    let mend = "ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY";
    assert!(
        said.contains("no column seq") && said.contains(mend),
        "{said}"
    );

    let add = format!("ALTER TABLE inventory.outboxevent {mend}");
    database.sql(&add).await;
    let walpost = database.start(&settings).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_role_without_the_rights_is_told_the_grant_and_with_it_goes_on() {
    // GIVEN a role that may stream, and not touch the table
    let database = debezium().await;
    database.init(&[], &[TABLE, DELETE]).await;
    let role = &database.name;
    database
        .sql(&format!(
            "CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'p';
             GRANT USAGE ON SCHEMA walpost, inventory TO {role};
             GRANT SELECT, INSERT, UPDATE ON walpost.after_publish TO {role};
             GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler, walpost.discarded TO {role}"
        ))
        .await;
    let (_, server) = database.url.split_once('@').expect("a server");
    let url = format!("postgres://{role}:p@{server}");
    let settings = [TABLE, DELETE, ("WALPOST_POSTGRES_URL", &*url)];
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    let (_, grant) = said
        .rsplit_once("GRANT ")
        .unwrap_or_else(|| panic!("no GRANT in {said}"));
    let (grant, _) = grant.split_once(';').expect("a whole statement");

    // WHEN it is granted: THEN rows are published and deleted
    database.sql(&format!("GRANT {grant}")).await;
    let walpost = database.start(&settings).await;
    insert(&database, 1, "").await;
    eventually(DEADLINE, "the row to be deleted", async || {
        let rows = database
            .rows("SELECT FROM inventory.outboxevent", &[])
            .await;
        rows.is_empty().then_some(())
    })
    .await;
    walpost.stop().await;
    assert_eq!(arrived(&database, 1).await, ["1"]);
    database
        .sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await;
}

/// The definition of a table whose `seq` has these options.
fn events(options: &str) -> String {
    format!(
        "CREATE TABLE public.events (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text NOT NULL, aggregateid text NOT NULL,
            type text, payload text, created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq {options})"
    )
}

#[tokio::test]
async fn a_sequence_that_does_not_count_up_is_refused_and_warned_of_and_what_is_printed_mends_it() {
    let settings = [
        ("WALPOST_OUTBOX_TABLE", "public.events"),
        ("WALPOST_MODE", "poll"),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
    ];
    for (options, why) in [
        (
            "bigint GENERATED ALWAYS AS IDENTITY (CACHE 20)",
            "has CACHE 20",
        ),
        (
            "bigint GENERATED ALWAYS AS IDENTITY (INCREMENT -1 MINVALUE 1 MAXVALUE 1000 START 1000)",
            "has a negative INCREMENT",
        ),
        (
            "bigint NOT NULL DEFAULT nextval('\"A s\"'::regclass)",
            "has CACHE 5",
        ),
        (
            "bigint NOT NULL DEFAULT nextval('\"A s\"'::regclass)",
            "has CYCLE",
        ),
    ] {
        // GIVEN a table whose seq does not rise with each insert
        let database = Database::create("order").await;
        database.sql("CREATE SEQUENCE \"A s\" CACHE 5 CYCLE").await;
        database.sql(&events(options)).await;
        let insert = "INSERT INTO public.events (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', $1)";
        database.rows(insert, &[&"0"]).await;

        // THEN init refuses it, and says what is wrong
        let (code, said) = database.walpost(&["init"], &settings).run(DEADLINE).await;
        assert_eq!(code, 69, "{said}");
        assert!(said.contains(why), "no {why:?} in: {said}");
        let (_, said) = database.walpost(&["check"], &settings).run(DEADLINE).await;
        assert!(said.contains("warn  order") && said.contains(why), "{said}");

        // WHEN what check prints is done, and sessions are made anew
        let lines: Vec<&str> = said.lines().collect();
        let at = lines
            .iter()
            .position(|line| line.starts_with("warn  order"));
        let mend = lines[at.expect("a line") + 1]
            .trim_start()
            .trim_start_matches("-> ");
        let (mend, _) = mend.rsplit_once(';').unwrap_or((mend, ""));
        database
            .connect()
            .await
            .batch_execute(mend)
            .await
            .expect(mend);
        database.init(&["--payload", "text"], &settings).await;
        let (_, said) = database.walpost(&["check"], &settings).run(DEADLINE).await;
        assert!(!said.contains("warn  order"), "{said}");

        // THEN rows of several sessions arrive in the order of insertion
        let (one, two) = (database.connect().await, database.connect().await);
        for (session, payload) in [(&one, "1"), (&two, "2"), (&one, "3")] {
            session.execute(insert, &[&payload]).await.expect("a row");
        }
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        let said = walpost.wait_for_line("polling", DEADLINE).await;
        assert!(!said.is_empty());
        let got = arrived(&database, 4).await;
        walpost.stop().await;
        let new: Vec<&String> = got.iter().filter(|payload| *payload != "0").collect();
        assert_eq!(new, ["1", "2", "3"]);
    }
}
