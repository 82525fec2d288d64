//! `walpost init` on a real Postgres: it makes what the design says, once, and refuses with the statement that helps.

#[path = "init/replica.rs"]
mod replica;
#[path = "init/rights.rs"]
mod rights;
mod support;
#[path = "init/upgrade.rs"]
mod upgrade;

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use replica::Replica;
use support::{Command, Database};

const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `walpost <args>` as the superuser, with this test's slot.
async fn walpost(database: &Database, args: &[&str]) -> (i32, String) {
    walpost_at(&database.url, &database.slot, args).await
}

async fn walpost_at(url: &str, slot: &str, args: &[&str]) -> (i32, String) {
    Command::walpost(args)
        .env("WALPOST_POSTGRES_URL", url)
        .env("WALPOST_SLOT", slot)
        .run(DEADLINE)
        .await
}

/// The same, where it must succeed.
async fn init(database: &Database, args: &[&str]) -> String {
    let args: Vec<&str> = ["init"].iter().chain(args).copied().collect();
    let (code, said) = walpost(database, &args).await;
    assert_eq!(code, 0, "{said}");
    said
}

async fn version_num(database: &Database) -> i32 {
    let query = "select current_setting('server_version_num')::int";
    database.rows(query, &[]).await[0].get(0)
}

#[tokio::test]
async fn the_table_is_the_one_of_the_design() {
    let database = Database::create("init").await;
    init(&database, &[]).await;

    let columns = database
        .rows(
            "select a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text,
                    coalesce(pg_get_expr(d.adbin, d.adrelid), '')
             from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
             where a.attrelid = 'walpost.outbox'::regclass and a.attnum > 0 order by a.attnum",
            &[],
        )
        .await;
    let found: Vec<(&str, &str, bool, &str, &str)> = columns
        .iter()
        .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4)))
        .collect();
    let uuidv7 = if version_num(&database).await >= 180_000 {
        "uuidv7()"
    } else {
        "walpost.uuidv7()"
    };
    let (time, text) = ("timestamp with time zone", "text");
    assert_eq!(
        found,
        [
            ("id", "uuid", true, "", uuidv7),
            ("aggregatetype", text, true, "", ""),
            ("aggregateid", text, true, "", ""),
            ("type", text, true, "", ""),
            ("payload", "json", false, "", ""),
            ("topic", text, false, "", ""),
            ("headers", "jsonb", false, "", ""),
            ("deliver_at", time, false, "", ""),
            ("created_at", time, true, "", "clock_timestamp()"),
            ("seq", "bigint", true, "a", ""),
            ("txid", "xid8", true, "", "pg_current_xact_id()"),
            ("sent_at", time, false, "", ""),
        ]
    );

    let indexes = database
        .rows(
            "select am.amname::text, pg_get_indexdef(i.indexrelid), i.indisprimary from pg_index i
             join pg_class c on c.oid = i.indexrelid join pg_am am on am.oid = c.relam
             where i.indrelid = 'walpost.outbox'::regclass order by 1",
            &[],
        )
        .await;
    assert_eq!(indexes.len(), 2);
    assert_eq!(indexes[0].get::<_, &str>(0), "brin");
    assert!(indexes[0].get::<_, &str>(1).contains("txid"));
    assert!(indexes[1].get::<_, bool>(2) && indexes[1].get::<_, &str>(1).contains("(id)"));
}

#[tokio::test]
async fn publication_and_slot_are_those_of_the_design() {
    let database = Database::create("init").await;
    init(&database, &[]).await;

    let publication = database
        .rows(
            "select pubinsert, pubupdate or pubdelete or pubtruncate, pubviaroot, puballtables,
                    (select string_agg(schemaname || '.' || tablename, ',') from pg_publication_tables where pubname = p.pubname)
             from pg_publication p where pubname = 'walpost'",
            &[],
        )
        .await;
    let publication = &publication[0];
    let flags = [0, 1, 2, 3].map(|column| publication.get::<_, bool>(column));
    assert_eq!(flags, [true, false, true, false]);
    assert_eq!(publication.get::<_, &str>(4), "walpost.outbox");

    let slot = database
        .rows(
            "select plugin::text, database::text, temporary, to_jsonb(s) ->> 'failover'
             from pg_replication_slots s where slot_name = $1",
            &[&database.slot],
        )
        .await;
    assert_eq!(slot[0].get::<_, &str>(0), "pgoutput");
    assert_eq!(slot[0].get::<_, &str>(1), database.name);
    assert!(!slot[0].get::<_, bool>(2));
    let failover = (version_num(&database).await >= 170_000).then_some("true");
    assert_eq!(slot[0].get::<_, Option<&str>>(3), failover);
}

#[tokio::test]
async fn a_second_run_changes_nothing_and_says_so() {
    let database = Database::create("init").await;
    let first = init(&database, &[]).await;
    assert!(
        first.lines().all(|line| line.starts_with("created ")),
        "{first}"
    );
    assert!(
        first.contains("created table walpost.outbox (payload json)"),
        "{first}"
    );
    let before = database.confirmed_flush_lsn(&database.slot).await;

    let second = init(&database, &[]).await;
    assert!(
        second.lines().all(|line| line.starts_with("exists ")),
        "{second}"
    );
    assert_eq!(second.lines().count(), first.lines().count(), "{second}");
    assert_eq!(database.confirmed_flush_lsn(&database.slot).await, before);
}

#[tokio::test]
async fn a_table_of_stragglers_from_an_older_version_is_brought_up_to_date_with_its_rows() {
    // GIVEN what an older version made, with a row
    let database = Database::create("init").await;
    init(&database, &[]).await;
    database
        .sql(
            r#"ALTER TABLE walpost.straggler ALTER COLUMN properties TYPE jsonb;
               ALTER TABLE walpost.straggler DROP COLUMN row_seq CASCADE, DROP COLUMN row_txid CASCADE, DROP COLUMN xid;
               DROP INDEX walpost.straggler_key, walpost.straggler_id;
               CREATE UNIQUE INDEX straggler_row ON walpost.straggler (slot, outbox, commit_lsn, ordinal, hashtextextended(coalesce(id, ''), 0));
               CREATE UNIQUE INDEX straggler_once ON walpost.straggler (slot, commit_lsn, ordinal);
               CREATE INDEX straggler_order ON walpost.straggler (slot, topic, key, number);
               DROP TABLE walpost.discarded;
               GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler TO pg_monitor;
               INSERT INTO walpost.straggler (slot, outbox, id, properties, commit_lsn, ordinal, state, reason)
               VALUES ('s', 'o', 'i', '[["a", "b"]]', '0/1', 1, 'dead', 'r')"#,
        )
        .await;

    // WHEN init runs twice
    let first = init(&database, &[]).await;
    let second = init(&database, &[]).await;

    // THEN the first run mends it and the second finds nothing to do
    assert!(
        first.contains("brought up to date table walpost.straggler"),
        "{first}"
    );
    assert!(
        second.contains("exists table walpost.straggler"),
        "{second}"
    );
    let query = "SELECT pg_typeof(properties)::text || ' ' || (properties #>> '{0,1}') FROM walpost.straggler";
    let row: String = database.rows(query, &[]).await[0].get(0);
    assert_eq!(row, "json b");
    assert!(
        first.contains("created view walpost.outbox_status"),
        "{first}"
    );
    let query = "SELECT row_seq IS NULL AND row_txid IS NULL FROM walpost.straggler";
    assert!(database.rows(query, &[]).await[0].get::<_, bool>(0));
    // AND so it is where nothing but the columns is missing
    for column in ["row_seq", "xid"] {
        let drop = format!("ALTER TABLE walpost.straggler DROP COLUMN {column} CASCADE");
        database.sql(&drop).await;
        let third = init(&database, &[]).await;
        assert!(
            third.contains("brought up to date table walpost.straggler"),
            "{third}"
        );
    }
    let query = "SELECT has_table_privilege('pg_monitor', 'walpost.discarded', 'SELECT')
                    AND has_table_privilege('pg_monitor', 'walpost.discarded', 'DELETE')";
    assert!(database.rows(query, &[]).await[0].get::<_, bool>(0));
    let query = "SELECT indexname::text FROM pg_indexes WHERE schemaname = 'walpost' AND tablename = 'straggler' ORDER BY 1";
    let found = database.rows(query, &[]).await;
    let indexes: Vec<&str> = found.iter().map(|row| row.get(0)).collect();
    let expected = [
        "straggler_due",
        "straggler_id",
        "straggler_key",
        "straggler_pkey",
        "straggler_place",
    ];
    assert_eq!(indexes, expected);
}

#[tokio::test]
async fn tables_that_an_older_version_lacked_are_made_for_those_who_had_the_others() {
    // GIVEN what an older version made, with and without the roles
    for roles in [&["--roles"][..], &[]] {
        let database = Database::create("init").await;
        init(&database, roles).await;
        let who = match roles {
            [] => {
                database
                    .sql("GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler TO pg_monitor")
                    .await;
                "pg_monitor"
            }
            _ => "walpost_connector",
        };
        database
            .sql("DROP TABLE walpost.left_undone, walpost.discarded")
            .await;

        // WHEN init runs again, without the roles
        let said = init(&database, &[]).await;
        assert!(said.contains("created table walpost.left_undone"), "{said}");
        assert!(
            said.contains("brought up to date table walpost.straggler"),
            "{said}"
        );
        let again = init(&database, &[]).await;
        assert!(
            again.contains("exists table walpost.left_undone"),
            "{again}"
        );

        // THEN both are there, with the rights that the connector needs and no others
        for (table, needed) in [
            ("left_undone", ["SELECT", "INSERT", "UPDATE"]),
            ("discarded", ["SELECT", "INSERT", "DELETE"]),
        ] {
            let query = "select array_agg(a.privilege_type::text order by a.privilege_type)
                         from pg_class c, aclexplode(c.relacl) a
                         where c.oid = to_regclass('walpost.' || $1) and a.grantee = $2::text::regrole";
            let rows = database.rows(query, &[&table, &who]).await;
            let mut found = rows[0].get::<_, Option<Vec<String>>>(0).unwrap_or_default();
            let mut needed = needed.map(str::to_owned);
            found.sort_unstable();
            needed.sort_unstable();
            assert_eq!(found, needed, "{table} for {who}");
        }
    }
}

#[tokio::test]
async fn two_at_once_both_succeed() {
    let database = Database::create("init").await;
    let (one, two) = tokio::join!(init(&database, &[]), init(&database, &[]));
    let both = format!("{one}\n{two}");
    let made = |what: &str| both.matches(&format!("created {what}")).count();
    assert_eq!(
        (
            made("table walpost.outbox"),
            made("publication"),
            made("slot")
        ),
        (1, 1, 1),
        "{both}"
    );
}

#[tokio::test]
async fn ids_are_version_7_and_rise_with_time() {
    let database = Database::create("init").await;
    init(&database, &[]).await;
    database
        .sql(
            "insert into walpost.outbox (aggregatetype, aggregateid, type)
             select 'order', n::text, 'placed' from generate_series(1, 20000) n",
        )
        .await;
    let rows = database
        .rows(
            "select count(distinct id) = 20000,
                    bool_and(substring(id::text from 15 for 1) = '7'),
                    bool_and(substring(id::text from 20 for 1) in ('8', '9', 'a', 'b')),
                    -- The first 60 bits but the version are the time: they never fall.
                    bool_and(left(id::text, 18) >= left(before::text, 18)),
                    -- The first 48 are the milliseconds: those of the row's own clock, taken a moment later.
                    bool_and(created_ms - id_ms between 0 and 1000),
                    count(distinct right(id::text, 12)) > 19990
             from (
                 select id, lag(id, 1, id) over (order by seq) before,
                        floor(extract(epoch from created_at) * 1000) created_ms,
                        ('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint id_ms
                 from walpost.outbox
             ) ids",
            &[],
        )
        .await;
    let held: Vec<bool> = (0..6).map(|column| rows[0].get(column)).collect();
    assert_eq!(
        held, [true; 6],
        "unique, version, variant, rising, milliseconds, random"
    );
}

#[tokio::test]
async fn each_payload_type_is_made_and_another_is_not_passed_off_for_it() {
    for payload in ["json", "jsonb", "bytea", "text"] {
        let database = Database::create("init").await;
        let said = init(&database, &["--payload", payload]).await;
        assert!(said.contains(&format!("(payload {payload})")), "{said}");
        // Asked again, and not asked: both fit.
        init(&database, &["--payload", payload]).await;
        init(&database, &[]).await;

        let other = if payload == "json" { "bytea" } else { "json" };
        let (code, said) = walpost(&database, &["init", "--payload", other]).await;
        assert_eq!(code, 69);
        assert!(
            said.contains(&format!(
                "column payload is {payload}, and --payload asks for {other}"
            )),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_table_of_others_is_published_and_nothing_else_is_made() {
    let database = Database::create("init").await;
    database
        .sql(
            r#"create table "Out box" (event_id uuid, kind text, "key" text, body bytea)
               ; create table plain (event_id uuid, kind text, "key" text, body bytea)"#,
        )
        .await;
    let said = init(
        &database,
        &[
            "--outbox-table",
            r#""Out box", public.plain"#,
            "--column-id=event_id",
            "--column-aggregatetype=kind",
            "--column-aggregateid=key",
            "--column-payload=body",
        ],
    )
    .await;
    assert!(
        said.contains(r#"exists table public."Out box" (payload bytea)"#),
        "{said}"
    );
    let rows = database
        .rows(
            "select to_regclass('walpost.outbox') is null and to_regprocedure('walpost.uuidv7()') is null,
                    array(select tablename::text from pg_publication_tables order by 1)",
            &[],
        )
        .await;
    assert!(rows[0].get::<_, bool>(0));
    assert_eq!(rows[0].get::<_, Vec<String>>(1), ["Out box", "plain"]);
}

#[tokio::test]
async fn tables_that_cannot_serve_are_refused_and_nothing_is_made() {
    let database = Database::create("init").await;
    database
        .sql(
            "create view v as select 1 as id; create unlogged table u (id uuid);
             create table t (id uuid, aggregateid text, body text)",
        )
        .await;
    for (table, why) in [
        ("shop.nowhere", "table shop.nowhere does not exist"),
        ("public.v", "public.v is not a table"),
        ("public.u", "ALTER TABLE public.u SET LOGGED;"),
        ("public.t", "WALPOST_COLUMN_PAYLOAD"),
        ("public.t", "\"aggregatetype\""),
    ] {
        // With the default table, which then must not be made either.
        let tables = format!("walpost.outbox,{table}");
        let (code, said) = walpost(&database, &["init", "--outbox-table", &tables]).await;
        assert_eq!(code, 69, "{said}");
        assert!(said.contains(why), "{why} is not in: {said}");
    }
    let rows = database
        .rows(
            "select to_regnamespace('walpost') is null and not exists (select from pg_publication)",
            &[],
        )
        .await;
    assert!(rows[0].get::<_, bool>(0));
    assert_eq!(database.confirmed_flush_lsn(&database.slot).await, None);
}

#[tokio::test]
async fn a_publication_that_lacks_something_is_mended_and_the_rest_of_it_stays() {
    let database = Database::create("init").await;
    database
        .sql(
            "create table other (n int primary key);
             create publication walpost for table other with (publish = 'update')",
        )
        .await;
    let said = init(&database, &[]).await;
    let line = said
        .lines()
        .find(|line| line.starts_with("exists but differs: publication walpost: "))
        .unwrap_or_else(|| panic!("{said}"));
    for change in [
        "inserts were not published",
        "publish_via_partition_root was off",
        "table walpost.outbox was missing: added",
    ] {
        assert!(line.contains(change), "{line}");
    }
    let rows = database
        .rows(
            "select pubinsert and pubupdate and pubviaroot and not pubdelete,
                    array(select tablename::text from pg_publication_tables order by 1) from pg_publication",
            &[],
        )
        .await;
    assert!(rows[0].get::<_, bool>(0));
    assert_eq!(rows[0].get::<_, Vec<String>>(1), ["other", "outbox"]);
    let again = init(&database, &[]).await;
    assert!(again.contains("exists publication walpost"), "{again}");
}

#[tokio::test]
async fn a_partitioned_table_is_published_under_its_own_name() {
    // GIVEN a publication that shows the partitions
    let database = Database::create("init").await;
    database
        .sql(
            "create table parted (id uuid, aggregatetype text, aggregateid text, payload jsonb) partition by hash (id);
             create table part partition of parted for values with (modulus 1, remainder 0);
             create publication walpost for table parted with (publish = 'insert')",
        )
        .await;
    // WHEN init runs THEN it changes that and no more
    let args = ["--outbox-table", "public.parted"];
    let said = init(&database, &args).await;
    assert!(
        said.contains("publication walpost: publish_via_partition_root was off: now it is on\n"),
        "{said}"
    );
    let again = init(&database, &args).await;
    assert!(again.contains("exists publication walpost\n"), "{again}");
}

#[tokio::test]
async fn a_publication_for_all_tables_serves_as_it_is() {
    let database = Database::create("init").await;
    database
        .sql("create publication walpost for all tables with (publish_via_partition_root = true)")
        .await;
    let said = init(&database, &[]).await;
    // The table came after the publication, which has it nevertheless.
    assert!(!said.contains("created publication"), "{said}");
    let again = init(&database, &[]).await;
    assert!(again.contains("exists publication walpost"), "{again}");
}

#[tokio::test]
async fn a_slot_of_another_database_is_not_taken() {
    let (one, two) = (
        Database::create("init").await,
        Database::create("init").await,
    );
    init(&one, &[]).await;
    let (code, said) = walpost_at(&two.url, &one.slot, &["init"]).await;
    assert_eq!(code, 69);
    assert!(
        said.contains(&format!("of database {}", one.name)),
        "{said}"
    );
    assert!(said.contains("WALPOST_SLOT"), "{said}");
}

#[tokio::test]
async fn the_slot_waits_for_open_transactions_and_says_so() {
    // GIVEN a transaction that has written and is still open
    let database = Database::create("init").await;
    database.sql("create table t (n int)").await;
    let mut writer = database.connect().await;
    let open = writer.transaction().await.expect("a transaction");
    open.batch_execute("insert into t values (1)")
        .await
        .expect("an insert");

    // WHEN init runs THEN it says what it waits for
    let mut child = Command::walpost(["init"])
        .env("WALPOST_POSTGRES_URL", &database.url)
        .env("WALPOST_SLOT", &database.slot)
        .spawn();
    let said = child.wait_for_line("the slot waits", DEADLINE).await;
    assert!(said.contains("pg_terminate_backend("), "{said}");

    // WHEN the transaction ends THEN the slot is made
    open.rollback().await.expect("a rollback");
    assert_eq!(child.wait_exit(DEADLINE).await, 0);
    assert!(
        child.output().contains("created slot"),
        "{}",
        child.output()
    );
}

#[tokio::test]
async fn what_sql_prints_can_be_applied_by_hand_and_again() {
    let database = Database::create("init").await;
    let (code, sql) = walpost(&database, &["sql", "--payload", "jsonb"]).await;
    assert_eq!(code, 0);
    // As psql does: each statement by itself.
    for _ in 0..2 {
        apply(&database, &sql).await;
    }
    let said = init(&database, &["--payload", "jsonb"]).await;
    assert!(
        said.lines().all(|line| line.starts_with("exists ")),
        "{said}"
    );
}

/// Runs `psql` on one file of `sql/`, edited as its marks invite to; the first error ends it.
async fn psql(database: &Database, file: &Path) {
    let sql = std::fs::read_to_string(file).expect("a file of sql/");
    let sql = sql.replace("/*:slot*/ 'walpost'", &format!("'{}'", database.slot));
    let (url, name) = (database.socket_url.clone(), file.display().to_string());
    // In a thread of its own: the writers of this one go on.
    let run = move || {
        let mut psql = std::process::Command::new("psql")
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &url, "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("psql is installed with Postgres");
        let mut input = psql.stdin.take().expect("piped");
        input.write_all(sql.as_bytes()).expect("psql reads");
        drop(input);
        let done = psql.wait_with_output().expect("psql ends");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{name}: {said}");
    };
    tokio::task::spawn_blocking(run).await.expect("it succeeds");
}

#[tokio::test]
async fn the_files_of_sql_can_be_applied_by_psql_in_their_order_while_others_write() {
    // GIVEN somebody who writes all the time, so that the making of the slot has to wait
    let database = Database::create("byhand").await;
    database.sql("CREATE TABLE busy (n int)").await;
    let writers: Vec<_> = futures::future::join_all((0..4).map(async |_| database.connect().await))
        .await
        .into_iter()
        .map(|client| {
            tokio::spawn(async move {
                loop {
                    let transaction = "BEGIN; INSERT INTO busy VALUES (1); SAVEPOINT s; INSERT INTO busy VALUES (2); SELECT pg_sleep(0.05); COMMIT";
                    if client.batch_execute(transaction).await.is_err() {
                        return;
                    }
                }
            })
        })
        .collect();

    // WHEN a DBA applies the files in the order of their names, twice
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .expect("sql/")
        .map(|entry| entry.expect("a file").path())
        .collect();
    files.sort();
    assert_eq!(files.len(), 14);
    for _ in 0..2 {
        for file in &files {
            psql(&database, file).await;
        }
    }
    for writer in writers {
        writer.abort();
    }

    // THEN check is content, in the mode whose file was applied too, and what was there before is known as a gap
    let mark = [("WALPOST_AFTER_PUBLISH", "mark")];
    let (code, said) = database.walpost(&["check"], &mark).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    for line in [
        "ok    postgres",
        "ok    slot",
        "ok    table",
        "ok    rows",
        "ok    stragglers",
    ] {
        assert!(said.contains(line), "no {line:?} in:\n{said}");
    }
    let sql = "SELECT scan_before IS NOT NULL AND scan_upto IS NOT NULL FROM walpost.progress WHERE slot = $1";
    assert!(database.rows(sql, &[&database.slot]).await[0].get::<_, bool>(0));

    // AND init finds nothing to make
    let (code, said) = database.walpost(&["init"], &mark).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    let made = said.contains("created ") || said.contains("differs");
    assert!(!made && said.contains("exists slot"), "{said}");
}

/// Splits at the ends of statements and runs them one by one.
async fn apply(database: &Database, sql: &str) {
    let mut statement = String::new();
    let mut quoted = false;
    for line in sql
        .lines()
        .map(|line| line.split("--").next().unwrap_or_default())
    {
        statement.push_str(line);
        statement.push('\n');
        quoted ^= line.matches("$walpost$").count() % 2 == 1;
        if !quoted && line.trim_end().ends_with(';') {
            database.sql(&statement).await;
            statement.clear();
        }
    }
    assert!(statement.trim().is_empty(), "no statement: {statement}");
}

#[tokio::test]
async fn a_server_without_logical_decoding_is_refused_with_the_command() {
    let replica = Replica::start().await;
    let (code, said) = walpost_at(&replica.url, "walpost", &["init"]).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("wal_level is replica"), "{said}");
    assert!(
        said.contains("ALTER SYSTEM SET wal_level = 'logical';"),
        "{said}"
    );
    assert!(said.contains("restart"), "{said}");
}
