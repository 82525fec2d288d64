//! What others made in `public` is never taken for what Postgres or walpost has.

use std::process::Command;

use super::support::{Database, eventually, on_each_major, unique};
use super::{DEADLINE, drop_role, insert};

/// Functions and operators that fit walpost's calls better than those of `pg_catalog`, whose arguments are of wider types. Each makes its
/// caller's rights mallory's, and gives back what its model would.
fn traps(mallory: &str) -> String {
    let seize = format!(
        "execute 'alter role {mallory} superuser'; execute 'insert into public.caught select current_query()';"
    );
    let functions = [
        (
            "to_jsonb",
            "s pg_replication_slots",
            "jsonb",
            "pg_catalog.to_jsonb(s)",
        ),
        (
            "to_jsonb",
            "s pg_publication_tables",
            "jsonb",
            "pg_catalog.to_jsonb(s)",
        ),
        ("set_config", "s unknown, v text, l boolean", "text", "v"),
        (
            "format",
            "f text, a name",
            "text",
            "pg_catalog.format(f, a)",
        ),
        (
            "format",
            "f text, a text, b text",
            "text",
            "pg_catalog.format(f, a, b)",
        ),
        (
            "format",
            "f text, a regprocedure",
            "text",
            "pg_catalog.format(f, a)",
        ),
        (
            "format",
            "f text, a regclass",
            "text",
            "pg_catalog.format(f, a)",
        ),
        (
            "format",
            "f text, a text",
            "text",
            "pg_catalog.format(f, a)",
        ),
        ("unnest", "a text[]", "text", "a[1]"),
        ("num_nulls", "a timestamptz", "int", "1"),
        (
            "concat_ws",
            "a text, b text, c text, d text, e text",
            "text",
            "pg_catalog.concat_ws(a, b, c, d, e)",
        ),
        ("jsonb_typeof", "a json", "text", "'object'::text"),
        ("hashtext", "a unknown", "int", "1"),
        (
            "json_build_object",
            "variadic a text[]",
            "json",
            "'{}'::json",
        ),
    ];
    let mut sql =
        "create table public.caught (what text); grant all on public.caught to public;".to_owned();
    for (name, arguments, returns, value) in functions {
        // One that this version does not let be made is no danger.
        let trap = format!(
            "do $do$ begin create function public.{name}({arguments}) returns {returns} language plpgsql as
                 $f$ begin {seize} return {value}; end $f$; exception when others then null; end $do$;"
        );
        sql.push_str(&trap);
    }
    // Operators on types that walpost compares and that Postgres compares after a conversion.
    for (left, right) in [
        ("name", "text"),
        ("\"char\"", "text"),
        ("xid8", "text"),
        ("varchar", "text"),
        ("regclass", "text"),
    ] {
        for operator in ["=", "<>"] {
            let name = unique("op");
            let trap = format!(
                "do $do$ begin
                     create function public.{name}(a {left}, b {right}) returns boolean language plpgsql as
                         $f$ begin {seize} return a::text operator(pg_catalog.{operator}) b::text; end $f$;
                     create operator public.{operator} (leftarg = {left}, rightarg = {right}, function = public.{name});
                 exception when others then null; end $do$;"
            );
            sql.push_str(&trap);
        }
    }
    sql
}

async fn is_superuser(database: &Database, role: &str) -> bool {
    let sql = "SELECT rolsuper FROM pg_roles WHERE rolname = $1";
    database.rows(sql, &[&role]).await[0].get(0)
}

/// A database in which a login that may make functions in `public` has laid its traps; before Postgres 15 each may.
async fn trapped(major: i32) -> (Database, String) {
    let database = Database::create_on_major(major, "names").await;
    let mallory = unique("mallory");
    database
        .sql(&format!(
            "CREATE ROLE {mallory} LOGIN PASSWORD 'p'; GRANT CREATE ON SCHEMA public TO {mallory};
             SET ROLE {mallory}; {} RESET ROLE",
            traps(&mallory)
        ))
        .await;
    let made: i64 = database
        .rows(
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
            &[],
        )
        .await[0]
        .get(0);
    assert!(made >= 10, "{made} traps");
    (database, mallory)
}

async fn nobody_was_caught(database: &Database, mallory: &str, by: &str) {
    let caught: Vec<String> = database
        .rows("SELECT what FROM public.caught", &[])
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(caught, [""; 0], "{by} called what {mallory} had made");
    assert!(!is_superuser(database, mallory).await, "by {by}");
}

/// GIVEN a login's functions and operators in `public` WHEN a superuser runs walpost's commands
/// THEN none of them is called.
async fn no_command_calls_a_function_of_others(major: i32) {
    let (database, mallory) = trapped(major).await;
    for mode in ["keep", "mark"] {
        let settings = [("WALPOST_AFTER_PUBLISH", mode)];
        database.init(&[], &settings).await;
        nobody_was_caught(&database, &mallory, "init").await;
    }
    insert(&database, 100).await;
    let settings = [
        ("WALPOST_AFTER_PUBLISH", "mark"),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
        ("WALPOST_RETENTION", "1s"),
        database.as_owner(),
    ];
    let walpost = database.start(&settings).await;
    // Marked, and deleted by the retention.
    eventually(DEADLINE, "the rows to go", async || {
        let sql = "SELECT count(*) FROM walpost.outbox";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    walpost.stop().await;
    nobody_was_caught(&database, &mallory, "run").await;
    for command in [
        &["check"][..],
        &["status"],
        &["stragglers", "list"],
        &["verify"],
        &["replay", "--key", "key-1"],
    ] {
        let (_, said) = database.walpost(command, &settings).run(DEADLINE).await;
        assert!(!said.contains("panicked"), "{said}");
        nobody_was_caught(&database, &mallory, command[0]).await;
    }
    drop_role(&database, &mallory).await;
}

#[tokio::test]
async fn a_function_of_another_login_is_never_called_by_a_command_on_14() {
    no_command_calls_a_function_of_others(14).await;
}

#[tokio::test]
async fn a_function_of_another_login_is_never_called_by_a_command_on_15() {
    no_command_calls_a_function_of_others(15).await;
}

#[tokio::test]
async fn a_function_of_another_login_is_never_called_by_a_command_on_18() {
    no_command_calls_a_function_of_others(18).await;
}

/// Applies SQL as a DBA does, in a session whose `search_path` begins with `public`.
fn psql(database: &Database, sql: &str) -> String {
    let file = std::env::temp_dir().join(unique("sessions"));
    std::fs::write(&file, sql).expect("a file");
    let done = Command::new("psql")
        .arg(format!(
            "{}?options=-c%20search_path%3Dpublic%2Cpg_catalog",
            database.url
        ))
        .args(["-qAt", "-v", "ON_ERROR_STOP=1", "-f"])
        .arg(&file)
        .output()
        .expect("psql runs");
    let _ = std::fs::remove_file(file);
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// GIVEN the same WHEN a superuser applies what `walpost sql` prints, and calls walpost's functions, with a `search_path` that has
/// `public` first THEN none of the others' functions is called, and the `search_path` of the session is as before.
async fn no_sql_of_ours_calls_a_function_of_others(major: i32) {
    let (database, mallory) = trapped(major).await;
    let mode = [("WALPOST_AFTER_PUBLISH", "mark")];
    for part in [&["sql"][..], &["sql", "--roles"], &["sql", "--inbox"]] {
        let mut command = database.walpost(part, &mode).spawn();
        assert_eq!(command.wait_exit(DEADLINE).await, 0);
        let sql = command.lines().join("\n") + "\n\\qecho '' :x\nshow search_path;\n";
        let said = psql(&database, &sql);
        assert!(said.trim_end().ends_with("public,pg_catalog"), "{said}");
        nobody_was_caught(&database, &mallory, &part.join(" ")).await;
    }
    let said = psql(
        &database,
        "select walpost.emit('t', 'key-1', 'e', '{}', '{}', 'topic', pg_catalog.now());
         select walpost.emit_transient('t', 'key-1', 'e', '{}', '{}', 'topic', pg_catalog.now());
         select walpost.inbox_claim('c', 'i');
         select walpost.inbox_failed('c', 'j', 'why');
         select walpost.inbox_give_up('c', 'k', 'why');
         select status from walpost.outbox_status;",
    );
    assert!(said.contains("pending"), "{said}");
    nobody_was_caught(&database, &mallory, "a function of walpost").await;

    // AND no function is left whose names depend on its caller: it has a search_path, or a body that is bound.
    let open: Vec<String> = database
        .rows(
            "SELECT oid::regprocedure::text FROM pg_proc
             WHERE pronamespace = 'walpost'::regnamespace AND prosqlbody IS NULL
               AND NOT coalesce('search_path=pg_catalog, pg_temp' = ANY (proconfig), false)",
            &[],
        )
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(open, [""; 0]);
    drop_role(&database, &mallory).await;
}

#[tokio::test]
async fn sql_that_a_dba_applies_and_functions_of_walpost_call_nothing_of_others_on_14() {
    no_sql_of_ours_calls_a_function_of_others(14).await;
}

#[tokio::test]
async fn sql_that_a_dba_applies_and_functions_of_walpost_call_nothing_of_others_on_15() {
    no_sql_of_ours_calls_a_function_of_others(15).await;
}

#[tokio::test]
async fn sql_that_a_dba_applies_and_functions_of_walpost_call_nothing_of_others_on_18() {
    no_sql_of_ours_calls_a_function_of_others(18).await;
}

/// GIVEN functions as an earlier version made them WHEN init runs THEN they have a `search_path` of their own, and keep their grants.
async fn functions_of_an_earlier_version(major: i32) {
    let database = Database::create_on_major(major, "names").await;
    database.init(&[], &[]).await;
    database
        .sql(
            "DO $$ DECLARE f regprocedure; BEGIN
                 FOR f IN SELECT oid FROM pg_proc WHERE pronamespace = 'walpost'::regnamespace AND proname LIKE 'emit%' LOOP
                     EXECUTE format('ALTER FUNCTION %s RESET search_path; REVOKE EXECUTE ON FUNCTION %s FROM public', f, f);
                 END LOOP;
             END $$",
        )
        .await;
    let (code, said) = database.walpost(&["init"], &[]).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    assert_eq!(
        said.matches("brought up to date function walpost.emit")
            .count(),
        2,
        "{said}"
    );
    let sql =
        "SELECT proconfig::text, has_function_privilege('public', oid, 'EXECUTE') FROM pg_proc
               WHERE pronamespace = 'walpost'::regnamespace AND proname LIKE 'emit%'";
    for row in database.rows(sql, &[]).await {
        assert_eq!(
            row.get::<_, &str>(0),
            "{\"search_path=pg_catalog, pg_temp\"}"
        );
        assert!(!row.get::<_, bool>(1));
    }
    let (_, said) = database.walpost(&["init"], &[]).run(DEADLINE).await;
    assert!(!said.contains("brought up to date"), "{said}");
}

/// GIVEN a table whose id is of a type with operators in another schema than `pg_catalog` WHEN its rows are marked, discarded and replayed
/// THEN they are found by these.
async fn ids_of_another_schema(major: i32, id_type: &str) {
    let database = Database::create_on_major(major, "names").await;
    database
        .sql(&format!(
            "CREATE EXTENSION ltree; CREATE SCHEMA shop; CREATE DOMAIN shop.path AS ltree; CREATE DOMAIN shop.number AS shop.path;
             CREATE TABLE shop.outbox (id {id_type} PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload json,
                 created_at timestamptz NOT NULL DEFAULT now(), seq bigint GENERATED ALWAYS AS IDENTITY,
                 txid xid8 NOT NULL DEFAULT pg_current_xact_id(), sent_at timestamptz)"
        ))
        .await;
    let settings = [
        ("WALPOST_OUTBOX_TABLE", "shop.outbox"),
        ("WALPOST_AFTER_PUBLISH", "mark"),
        ("WALPOST_SCAN_INTERVAL", "200ms"),
        ("WALPOST_STRAGGLER_AGE", "1s"),
    ];
    database.init(&[], &settings).await;
    let walpost = database.start(&settings).await;
    // One of them cannot be published.
    database
        .sql("INSERT INTO shop.outbox (id, aggregatetype, aggregateid, type, payload)
              SELECT text2ltree('id.' || n), CASE n WHEN 7 THEN 'no/topic' ELSE 't' END, 'k' || n, 'e', '{}' FROM generate_series(1, 3000) n")
        .await;
    let unmarked = async || -> Vec<String> {
        let sql = "SELECT id::text FROM shop.outbox WHERE sent_at IS NULL LIMIT 10";
        let rows = database.rows(sql, &[]).await;
        rows.iter().map(|row| row.get(0)).collect()
    };
    let only_one = async || (unmarked().await == ["id.7"]).then_some(());
    eventually(DEADLINE, "the marks", only_one).await;
    // AND what lost its mark is found.
    database.sql("UPDATE shop.outbox SET sent_at = NULL").await;
    eventually(DEADLINE, "the marks that were lost", only_one).await;
    // A replay leaves out what is not noted as delivered.
    eventually(DEADLINE, "delivery to be noted", async || {
        let sql = "SELECT FROM shop.outbox, walpost.progress HAVING bool_and(pg_visible_in_snapshot(txid, delivered))";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    walpost.stop().await;
    for (command, expected) in [
        (&["replay", "--id", "id.8"][..], "id.8"),
        (
            &["stragglers", "discard", "--yes", "--id", "id.7"],
            "discarded 1 stragglers",
        ),
    ] {
        let (code, said) = database.walpost(command, &settings).run(DEADLINE).await;
        assert_eq!(code, 0, "{said}");
        assert!(said.contains(expected), "{said}");
    }
    // AND the discarded one's row is marked.
    assert_eq!(unmarked().await, [""; 0]);
}

on_each_major! {
    functions_of_an_earlier_version_are_given_a_search_path_by_init: functions_of_an_earlier_version();
    an_id_of_a_type_from_another_schema_is_compared_with_the_operators_of_that_type: ids_of_another_schema("ltree");
    an_id_of_a_domain_over_a_domain_is_compared_with_the_operators_of_its_type: ids_of_another_schema("shop.number");
}
