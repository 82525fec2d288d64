//! What every session of walpost's own has in common: the settings that walpost depends on, set right after the login.
//!
//! Input: nothing. Output: the statements that [`connect_sql`](super::connect_sql) and
//! [`ReplicationConnection::connect`](super::ReplicationConnection::connect) run before anybody else may use the session.
//!
//! # Nothing is inherited from role, database or `options`
//!
//! `ALTER ROLE … SET`, `ALTER DATABASE … SET`, `postgresql.conf` and `options` (`PGOPTIONS`) can change what a name means, which rows
//! a query sees, how values are printed and how long a statement may take. [`SETTINGS`] is the one list of all that walpost's
//! decisions and the bytes of its messages depend on. Both kinds of session get it, so a value that is read from the table
//! has the text that the stream would bring. It is set by statements and not in the startup packet, because a pooler such as `PgBouncer`
//! refuses parameters that it does not know; a walsender for a database accepts statements too. A setting that this server does not have
//! is left out.
//!
//! * `options` of the URL is sent at login, before: it may set anything that is not in the list, such as `work_mem`.
//! * What costs only time (`work_mem`, `jit`, `enable_…`) stays the operator's, and so does `wal_sender_timeout`; `walpost check`
//!   compares the latter with `WALPOST_STATUS_INTERVAL`. `role` stays too: it says with whose rights walpost works.
//! * Settings that only a superuser may change (`session_replication_role`, `lc_messages`, `temp_file_limit`, …) cannot be
//!   set here. A scan that exceeds `temp_file_limit` is refused with the statement that mends it. walpost reads no text of an error message.
//! * The inbox works in the application's own session
//!   ([`connect_application`](super::connection::connect_application)): its handler's statements depend on the application's settings. Every name
//!   in walpost's own statements there is qualified.
//!
//! Why it holds: `tests::sessions_are_opened_in_one_file_only` finds any other call that opens one. `tests/sessions.rs` sets the opposite of each
//! value for role and database, and asks both kinds of session, on the oldest and the newest Postgres.
//!
//! # What is durable, and what waits for whom
//!
//! `synchronous_commit` is `local` everywhere: a COMMIT returns when the server's own log is flushed, whatever the database's default is,
//! and never waits for a standby. With `synchronous_standby_names = '*'` walpost's own walsender counts as a standby, so a COMMIT
//! that waited for standbys would wait for walpost's confirmation, which waits for that COMMIT. A session that writes only
//! what is found again may say `off`.
//!
//! | write | setting | why |
//! |---|---|---|
//! | `walpost.straggler`: INSERT (`scanner::straggler_store`) | local | the LSN, or the scan, passes the event behind this COMMIT; a row that is lost is an event that is lost |
//! | the same: attempts, due times, state, dead-letter time | local | same session; a loss would repeat an attempt, or a copy in the dead-letter topic |
//! | the same: DELETE of published or discarded ones | local | same session; a loss would publish an event twice, or bring back one that a person has discarded |
//! | `walpost.progress`: `delivered`, the scan's position, what is missing ([`crate::scanner::progress`]) | local | rows count as sent, and retention deletes them, by it; a loss would only repeat rows |
//! | the same: `scan_before` before a slot is made, `scan_upto` behind | local | a slot outlives a crash of the server; without its snapshots the rows before it would count as delivered |
//! | the same: `session`, `timeline`, `confirmed_lsn`, `streamed` | local | an old `confirmed_lsn` would make a slot look as if somebody had advanced it |
//! | the same: `producer_generation` ([`crate::scanner::name_mark`]) | local | the next start believes the broker by it; a loss could lose an event |
//! | replication slot: make, drop | none | Postgres flushes a slot's file by itself |
//! | `walpost.after_publish`: mode and since ([`crate::scanner::modes`]) | local | rows that are older than `since` are never looked for |
//! | outbox: `sent_at`, DELETE after receipt ([`crate::scanner::after_publish`]) | off | a loss leaves the row unmarked: [`crate::scanner::unmarked`] finds it, and it may come twice |
//! | outbox: DELETE and DROP by retention ([`crate::scanner::retention`]) | off | a loss leaves delivered rows for the next round |
//! | outbox: partitions made ahead ([`crate::scanner::partitions`]) | local | made again when missing |
//! | `walpost.discarded`: INSERT by `walpost stragglers discard`, DELETE by the connector ([`crate::scanner::discarded`]) | local | a person was told so; a loss of the DELETE is found again |
//! | `walpost.left_undone` ([`crate::scanner::left_note`]) | local | a loss publishes a row again |
//! | `walpost init`: schema, tables, functions, roles, publication | local | a person was told that they are there |
//! | `walpost stragglers retry`, `discard` ([`crate::cli::stragglers`]) | local | a person was told so |
//! | `walpost.inbox` ([`crate::inbox`]) | the application's | one transaction with the application's own work: both are durable, or neither |
//!
//! `tests/sessions.rs` ends all processes of a server at once, whose default is `off`, behind a straggler, and lets a straggler be stored where
//! every standby is waited for.

/// Settings by name, see the module. The tests read it too.
pub const SETTINGS: [(&str, &str); 27] = [
    // Names mean what Postgres itself has, never what somebody made in a schema that all may write to.
    ("search_path", "pg_catalog, pg_temp"),
    // A policy that hides rows is an error, not a smaller result.
    ("row_security", "off"),
    // A scan or the making of a slot takes as long as it takes. A wait for a lock ends with its holder's transaction; the
    // sessions that must not make others wait set a timeout of their own.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    // Postgres 17; a walsender, too, decodes in a transaction.
    ("transaction_timeout", "0"),
    // Managed services turn it on when the disk is full. walpost lets the log shrink.
    ("default_transaction_read_only", "off"),
    // Each statement sees what was committed when it began; snapshots are compared with that.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    // See "What is durable".
    ("synchronous_commit", "local"),
    // Texts of values.
    ("client_encoding", "UTF8"),
    ("datestyle", "ISO, MDY"),
    ("intervalstyle", "postgres"),
    ("timezone", "UTC"),
    ("bytea_output", "hex"),
    // 1 and above: the shortest text that reads back as the same number.
    ("extra_float_digits", "1"),
    ("lc_monetary", "C"),
    ("lc_numeric", "C"),
    ("lc_time", "C"),
    ("xmloption", "content"),
    ("quote_all_identifiers", "off"),
    // How statements are read.
    ("standard_conforming_strings", "on"),
    ("array_nulls", "on"),
    ("transform_null_equals", "off"),
    // An error ends the statement, not the session; and warnings of the walsender arrive.
    ("exit_on_error", "off"),
    ("client_min_messages", "notice"),
];

/// The statements, each to be sent as a simple query, in this order. The first by itself, so that the second has all the time it needs.
pub(super) fn statements() -> [String; 2] {
    let values: Vec<String> = SETTINGS
        .iter()
        .map(|(name, value)| format!("('{name}', '{value}')"))
        .collect();
    // Qualified, and without an operator: it runs before names are safe. One statement, because the walsender of
    // Postgres 14 reads no further than a semicolon.
    let all = format!(
        "SELECT pg_catalog.set_config(s.name, s.value, false) FROM (VALUES {}) AS s (name, value) \
         WHERE pg_catalog.current_setting(s.name, true) IS NOT NULL",
        values.join(", ")
    );
    ["SET statement_timeout = 0".to_owned(), all]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_statements_can_be_sent_before_names_and_quotes_are_safe() {
        for (name, value) in SETTINGS {
            let harmless = |c: char| c.is_ascii_alphanumeric() || " _,".contains(c);
            assert!(
                name.chars().all(harmless) && value.chars().all(harmless),
                "{name}"
            );
        }
        for statement in statements() {
            assert!(!statement.contains(';'), "{statement}");
        }
    }

    /// Every session has the settings, because there is no other way to open one.
    #[test]
    fn sessions_are_opened_in_one_file_only() {
        const OPENS: [&str; 5] = [
            "tokio_postgres::connect",
            "tokio_postgres::Config",
            "config::Config as PgConfig",
            ".connect_raw(",
            "startup_message(",
        ];
        const MAY: [&str; 2] = ["postgres/connection.rs", "postgres/startup.rs"];
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut folders = vec![src.clone()];
        let mut read = 0;
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path
                    .strip_prefix(&src)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                if MAY.contains(&&*name)
                    || name == "postgres/session.rs"
                    || path.extension().is_none_or(|extension| extension != "rs")
                {
                    continue;
                }
                read += 1;
                let text = fs::read_to_string(&path).unwrap();
                for way in OPENS {
                    assert!(
                        !text.contains(way),
                        "{name} opens a session by {way}: use connect_sql, connect_application or ReplicationConnection::connect"
                    );
                }
                // A `use` that renames what opens one.
                assert!(
                    !text.contains("NoTls"),
                    "{name} names NoTls, which only a session of its own needs"
                );
            }
        }
        assert!(read > 100, "only {read} files were read");
        let connects = |name: &str| {
            let text = fs::read_to_string(src.join(name)).unwrap();
            text.matches(".connect_raw(").count() + text.matches("startup_message(").count()
        };
        assert_eq!(MAY.map(connects), [1, 1]);
    }
}
