//! What `ALTER ROLE` and `ALTER DATABASE` set, and what walpost does all the same.

use tokio_postgres::Client;
use walpost::postgres::session::SETTINGS;
use walpost::postgres::{PostgresConfig, ReplicationConnection, connect_application, connect_sql};

use super::support::{Database, eventually, unique};
use super::{DEADLINE, as_user, drop_role, insert, received};

/// For each setting of the list a value that walpost could not work with, as far as there is one.
const OPPOSITES: [(&str, &str); 26] = [
    ("search_path", "public, pg_catalog"),
    ("row_security", "on"),
    ("statement_timeout", "40ms"),
    ("lock_timeout", "7ms"),
    ("idle_in_transaction_session_timeout", "1s"),
    ("idle_session_timeout", "2s"),
    ("transaction_timeout", "1500ms"),
    ("default_transaction_read_only", "on"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_deferrable", "on"),
    ("synchronous_commit", "off"),
    ("client_encoding", "LATIN1"),
    ("datestyle", "German, DMY"),
    ("intervalstyle", "sql_standard"),
    ("timezone", "Asia/Kolkata"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-10"),
    ("lc_monetary", "C"),
    ("lc_numeric", "C"),
    ("lc_time", "C"),
    ("xmloption", "document"),
    ("quote_all_identifiers", "on"),
    ("array_nulls", "off"),
    ("transform_null_equals", "on"),
    ("exit_on_error", "on"),
    ("client_min_messages", "error"),
];

async fn has(database: &Database, setting: &str) -> bool {
    let sql = "SELECT current_setting($1, true) IS NOT NULL";
    database.rows(sql, &[&setting]).await[0].get(0)
}

/// `standard_conforming_strings` has no place in OPPOSITES: newer servers take no other value.
async fn set_opposites(database: &Database, of: &str) {
    for (name, value) in OPPOSITES {
        if has(database, name).await {
            // A list is a list of names.
            let value = if name == "search_path" {
                value.to_owned()
            } else {
                format!("'{value}'")
            };
            database
                .sql(&format!("ALTER {of} SET {name} = {value}"))
                .await;
        }
    }
}

async fn shown(client: &Client, name: &str) -> Option<String> {
    let sql = "SELECT pg_catalog.current_setting($1, true)";
    client
        .query_one(sql, &[&name])
        .await
        .expect("a setting")
        .get(0)
}

/// GIVEN role, database and URL with the opposite of each setting WHEN walpost opens a session of either kind THEN it has the
/// list's values; and an application's session has the role's.
async fn every_session_has_the_list(major: i32) {
    let database = Database::create_on_major(major, "settings").await;
    let role = unique("set");
    database
        .sql(&format!(
            "CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'p'"
        ))
        .await;
    set_opposites(&database, &format!("DATABASE {}", database.name)).await;
    set_opposites(&database, &format!("ROLE {role}")).await;
    let url = format!(
        "{}?options=-c%20bytea_output%3Descape%20-c%20work_mem%3D77MB",
        as_user(&database, &role)
    );
    let config = PostgresConfig::parse(Some(&url), &|_| None).expect("a URL");

    let client = connect_sql(&config, "test").await.expect("a session");
    let mut walsender = ReplicationConnection::connect(&config, "test")
        .await
        .expect("a replication session");
    let theirs = connect_application(&config, "test")
        .await
        .expect("an application's session");
    let mut different = 0;
    for (name, value) in SETTINGS {
        if !has(&database, name).await {
            continue;
        }
        assert_eq!(shown(&client, name).await.as_deref(), Some(value), "{name}");
        let rows = walsender
            .simple_query(&format!("SELECT current_setting('{name}')"))
            .await;
        assert_eq!(
            rows.expect("a setting"),
            [[Some(value.to_owned())]],
            "{name} of the walsender"
        );
        different += u32::from(shown(&theirs, name).await.as_deref() != Some(value));
    }
    assert!(
        different >= 20,
        "only {different} were set to something else"
    );
    // What is not in the list is the operator's.
    assert_eq!(shown(&client, "work_mem").await.as_deref(), Some("77MB"));
    drop((client, walsender, theirs));
    drop_role(&database, &role).await;
}

#[tokio::test]
async fn every_session_has_the_settings_of_the_list_on_14() {
    every_session_has_the_list(14).await;
}

#[tokio::test]
async fn every_session_has_the_settings_of_the_list_on_15() {
    every_session_has_the_list(15).await;
}

#[tokio::test]
async fn every_session_has_the_settings_of_the_list_on_18() {
    every_session_has_the_list(18).await;
}

/// GIVEN rows from before the slot, and a login whose settings are hostile WHEN walpost runs with it
/// THEN the scan of the gap gets to its end, the stream goes on, and transactions are noted as delivered.
async fn runs_with_hostile_settings(major: i32) {
    let mut database = Database::create_on_major(major, "hostile").await;
    let rows = 20_000;
    database.init(&[], &[]).await;
    database
        .rows(
            "SELECT pg_drop_replication_slot($1::text::name)",
            &[&database.slot],
        )
        .await;
    database.sql("DELETE FROM walpost.progress").await;
    insert(&database, rows).await;
    set_opposites(&database, &format!("DATABASE {}", database.name)).await;
    // The shared client of the test has the settings that it had.
    let login = format!("{}_run", database.name);
    set_opposites(&database, &format!("ROLE {login}")).await;
    database.url = format!("{}?target_session_attrs=read-write", database.url);

    // init works in spite of them, too.
    database.init(&[], &[]).await;
    let walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "200ms")]).await;
    insert(&database, 100).await;
    eventually(DEADLINE, "everything to be delivered", async || {
        let sql = "SELECT count(*) FROM walpost.outbox o, walpost.progress p
                   WHERE pg_visible_in_snapshot(o.txid, p.delivered)";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == i64::from(rows) + 100).then_some(())
    })
    .await;
    walpost.stop().await;
    let expected = usize::try_from(rows + 100).expect("positive");
    assert_eq!(received(&database, expected).await, expected);
}

#[tokio::test]
async fn timeouts_and_read_only_of_the_role_stop_neither_scan_nor_stream_on_14() {
    runs_with_hostile_settings(14).await;
}

#[tokio::test]
async fn timeouts_and_read_only_of_the_role_stop_neither_scan_nor_stream_on_15() {
    runs_with_hostile_settings(15).await;
}

#[tokio::test]
async fn timeouts_and_read_only_of_the_role_stop_neither_scan_nor_stream_on_18() {
    runs_with_hostile_settings(18).await;
}
