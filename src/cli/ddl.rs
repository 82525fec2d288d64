//! The files of `sql/` with the settings filled in: what `init` applies and `sql` prints.
//!
//! The one place of substitution. A file is valid SQL as it stands, with the defaults; where a setting goes, a mark
//! stands before the default: `/*:slot*/ 'walpost'`. `fill` puts the value, quoted, in place of both. So a DBA can
//! read and apply the files alone, and sees in them what may be edited.

use crate::config::{AfterPublish, Config};
use crate::postgres::{TableName, quote_literal};
use crate::{Error, Result};

const SCHEMA: &str = include_str!("../../sql/01_schema.sql");
const UUIDV7: &str = include_str!("../../sql/02_uuidv7.sql");
const OUTBOX: &str = include_str!("../../sql/03_outbox.sql");
const PUBLICATION: &str = include_str!("../../sql/04_publication.sql");
const PROGRESS: &str = include_str!("../../sql/05_progress.sql");
const STRAGGLER: &str = include_str!("../../sql/06_straggler.sql");
const STATUS: &str = include_str!("../../sql/07_status.sql");
const AFTER_PUBLISH: &str = include_str!("../../sql/08_after_publish.sql");
const EMIT: &str = include_str!("../../sql/09_emit.sql");
const EMIT_TRANSIENT: &str = include_str!("../../sql/10_emit_transient.sql");
const SLOT: &str = include_str!("../../sql/11_slot.sql");
const LEFT_UNDONE: &str = include_str!("../../sql/14_left_undone.sql");
const ROLES: &str = include_str!("../../sql/12_roles.sql");

/// What the dollar quotes of the files look like: the one text that no name may contain.
const DOLLAR_QUOTE: &str = "$walpost$";

/// Type of the payload column of a table that walpost makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Payload {
    /// Keeps the producer's bytes and streams faster than `jsonb`.
    #[default]
    Json,
    /// JSON that can be indexed; Postgres writes it anew, so the bytes change.
    Jsonb,
    /// Any bytes.
    Bytea,
    /// Any text.
    Text,
}

impl Payload {
    /// All of them, the default first.
    pub const ALL: [Self; 4] = [Self::Json, Self::Jsonb, Self::Bytea, Self::Text];

    /// The SQL type's name.
    pub fn sql_type(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Jsonb => "jsonb",
            Self::Bytea => "bytea",
            Self::Text => "text",
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|payload| payload.sql_type() == name)
    }
}

/// The table that `init` makes; any other must be there already.
pub fn own_table() -> TableName {
    TableName::new("walpost", "outbox")
}

/// The filled-in files. Each may be applied again.
#[derive(Debug)]
pub struct Ddl {
    /// The schema.
    pub schema: String,
    /// Id function and table; absent when the settings name only other tables.
    pub outbox: Option<[String; 2]>,
    /// The table of stragglers.
    pub straggler: String,
    /// The publication of all tables.
    pub publication: String,
    /// The table of what is delivered.
    pub progress: String,
    /// The table of what was left undone.
    pub left_undone: String,
    /// The view of each row's status; absent when the settings name only other tables.
    pub status: Option<String>,
    /// What the modes mark and delete need; absent in the mode keep.
    pub after_publish: Option<String>,
    /// The function that inserts; absent when the settings name only other tables.
    pub emit: Option<String>,
    /// The function that emits without a table.
    pub emit_transient: String,
    /// The slot: to be applied alone, outside a transaction that writes.
    pub slot: String,
}

impl Ddl {
    /// Fills the settings in.
    ///
    /// With `partitioned` the table is partitioned by range of `created_at`; its partitions are made by
    /// [`crate::scanner::partitions`].
    pub fn new(config: &Config, payload: Payload, partitioned: bool) -> Result<Self> {
        let outbox = if config.outbox_tables.contains(&own_table()) {
            let table = fill(OUTBOX, "payload", "json", payload.sql_type())?;
            let (key, end) = if partitioned {
                (
                    "not null",
                    ", primary key (id, created_at)) partition by range (created_at);",
                )
            } else {
                ("primary key", ");")
            };
            let table = fill(&table, "key", "primary key", key)?;
            let table = fill(&table, "end", ");", end)?;
            Some([UUIDV7.to_owned(), table])
        } else {
            None
        };
        let name = quote_literal(&config.publication);
        let publication = fill(PUBLICATION, "publication", "'walpost'", name.trim())?;
        let publication = fill_tables(&publication, config)?;
        let after_publish = match config.after_publish {
            AfterPublish::Keep => None,
            mode => {
                let slot = quote_literal(&config.slot);
                let sql = fill(AFTER_PUBLISH, "slot", "'walpost'", slot.trim())?;
                Some(fill(
                    &sql,
                    "mode",
                    "'mark'",
                    quote_literal(mode.name()).trim(),
                )?)
            }
        };
        Ok(Self {
            schema: SCHEMA.to_owned(),
            status: outbox.is_some().then(|| STATUS.to_owned()),
            emit: outbox.is_some().then(|| EMIT.to_owned()),
            emit_transient: emit_transient_sql(payload)?,
            outbox,
            straggler: STRAGGLER.to_owned(),
            left_undone: LEFT_UNDONE.to_owned(),
            publication,
            after_publish,
            progress: PROGRESS.to_owned(),
            slot: slot_sql(&config.slot)?,
        })
    }

    /// All of it, in the order of application.
    pub fn text(&self) -> String {
        let parts: Vec<&str> = [&self.schema]
            .into_iter()
            .chain(self.outbox.iter().flatten())
            .chain([&self.publication, &self.progress, &self.straggler])
            .chain([&self.left_undone])
            .chain(&self.status)
            .chain(&self.after_publish)
            .chain(&self.emit)
            .chain([&self.emit_transient, &self.slot])
            .map(String::as_str)
            .collect();
        parts.join("\n")
    }
}

/// What makes the function that emits without a table, taking this type.
///
/// # Errors
/// A bug, if the file has lost its mark.
pub fn emit_transient_sql(payload: Payload) -> Result<String> {
    fill(EMIT_TRANSIENT, "payload", "json", payload.sql_type())
}

/// What makes an existing `walpost.outbox` refuse updates: the end of its file.
///
/// # Errors
/// A bug, if the file has lost it.
pub fn refuse_update_sql() -> Result<&'static str> {
    let begin = OUTBOX.find("create or replace function walpost.refuse_update()");
    // Without the end, which puts the session's search_path back.
    let end = OUTBOX.rfind("do $walpost$ begin perform");
    begin
        .zip(end)
        .map(|(begin, end)| &OUTBOX[begin..end])
        .ok_or_else(|| Error::bug("sql/03_outbox.sql has no walpost.refuse_update"))
}

/// The two roles, and what they may do in these settings' mode.
///
/// # Errors
/// A configuration error for a name that cannot stand in it.
pub fn roles_sql(config: &Config) -> Result<String> {
    let mode = quote_literal(config.after_publish.name());
    let sql = fill(ROLES, "mode", "'keep'", mode.trim())?;
    let retention = config.retention.is_some().to_string();
    let sql = fill(&sql, "retention", "false", &retention)?;
    fill_tables(&sql, config)
}

fn fill_tables(sql: &str, config: &Config) -> Result<String> {
    let tables: Vec<String> = config
        .outbox_tables
        .iter()
        .map(|table| quote_literal(&table.to_string()).trim().to_owned())
        .collect();
    fill(sql, "tables", "'walpost.outbox'", &tables.join(", "))
}

/// What makes the slot, with a snapshot before and after it in `walpost.progress`; does nothing where there is one.
///
/// # Errors
/// A configuration error for a name that cannot stand in it.
pub fn slot_sql(slot: &str) -> Result<String> {
    fill(SLOT, "slot", "'walpost'", quote_literal(slot).trim())
}

/// Puts `value` in place of the mark `/*:name*/` and the default behind it, which stand in the file exactly once.
fn fill(sql: &str, name: &str, default: &str, value: &str) -> Result<String> {
    let mark = format!("/*:{name}*/ {default}");
    if value.contains(DOLLAR_QUOTE) {
        return Err(Error::config(format!(
            "a name contains {DOLLAR_QUOTE}, which the SQL that walpost makes cannot hold; rename it"
        )));
    }
    match sql.split_once(&mark) {
        Some((before, after)) if !after.contains(&mark) => Ok(format!("{before}{value}{after}")),
        _ => Err(Error::bug(format!("the SQL files do not hold {mark} once"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(flags: &[(&str, &str)]) -> Config {
        let find = |name: &str| {
            let found = flags.iter().find(|(flag, _)| *flag == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Config::load(&find, &|name| {
            (name == "PGUSER").then(|| "postgres".to_owned())
        })
        .unwrap()
    }

    #[test]
    fn the_defaults_print_the_files_without_marks() {
        let ddl = Ddl::new(&config(&[]), Payload::Json, false).unwrap();
        let files = [
            SCHEMA,
            UUIDV7,
            OUTBOX,
            PUBLICATION,
            PROGRESS,
            STRAGGLER,
            LEFT_UNDONE,
            STATUS,
            EMIT,
            EMIT_TRANSIENT,
            SLOT,
        ]
        .join("\n");
        let marks = ["payload", "key", "end", "publication", "tables", "slot"];
        let expected = marks.iter().fold(files, |text, mark| {
            text.replace(&format!("/*:{mark}*/ "), "")
        });
        assert_eq!(ddl.text(), expected);
    }

    #[test]
    fn values_are_filled_in_and_quoted() {
        let config = config(&[
            ("publication", "it's"),
            ("slot", "s1"),
            ("outbox-table", "walpost.outbox,shop.events"),
        ]);
        let ddl = Ddl::new(&config, Payload::Bytea, false).unwrap();
        let text = ddl.text();
        assert!(text.contains("publication constant text := 'it''s';"));
        assert!(text.contains("set_config('walpost.slot', 's1', false)"));
        assert!(text.contains("array['walpost.outbox', 'shop.events'];"));
        assert_eq!(
            text.matches("payload       bytea,").count(),
            2,
            "the table and emit_transient"
        );
    }

    #[test]
    fn the_roles_are_those_of_the_mode() {
        let config = config(&[
            ("after-publish", "mark"),
            ("retention", "7d"),
            ("outbox-table", "walpost.outbox,shop.events"),
        ]);
        let sql = roles_sql(&config).unwrap();
        assert!(sql.contains("mode constant text := 'mark';"), "{sql}");
        assert!(sql.contains("retention constant boolean := true;"));
        assert!(sql.contains("array['walpost.outbox', 'shop.events'];"));
    }

    #[test]
    fn what_the_modes_need_is_made_in_them_only() {
        let made = |mode| {
            let config = config(&[("after-publish", mode), ("slot", "s1")]);
            Ddl::new(&config, Payload::Json, false).unwrap().text()
        };
        assert!(!made("keep").contains("walpost.after_publish"));
        assert!(made("delete").contains("(values ('s1', 'delete'))"));
    }

    #[test]
    fn tables_of_others_are_not_made() {
        let ddl = Ddl::new(
            &config(&[("outbox-table", "shop.events")]),
            Payload::Json,
            false,
        )
        .unwrap();
        assert!(ddl.outbox.is_none());
        let text = ddl.text();
        assert!(!text.contains("create table if not exists walpost.outbox"));
        // What walpost keeps for itself is made all the same.
        assert!(text.contains("create schema walpost"));
        assert!(text.contains("create table if not exists walpost.straggler"));
        assert!(text.contains("create table if not exists walpost.progress"));
        assert!(!text.contains("create or replace view"));
    }

    #[test]
    fn a_name_that_would_end_the_dollar_quote_is_refused() {
        let config = config(&[("publication", "a$walpost$b")]);
        assert_eq!(
            Ddl::new(&config, Payload::Json, false)
                .unwrap_err()
                .exit_code(),
            64
        );
    }

    #[test]
    fn a_database_in_any_encoding_can_read_it() {
        for mode in ["keep", "delete", "mark"] {
            let config = config(&[("after-publish", mode), ("slot", "s1")]);
            let text = Ddl::new(&config, Payload::Json, false).unwrap().text();
            assert!(text.is_ascii(), "comments, too, are sent to Postgres");
        }
    }

    #[test]
    fn each_payload_type_has_its_name() {
        for payload in Payload::ALL {
            assert_eq!(Payload::from_name(payload.sql_type()), Some(payload));
        }
        assert_eq!(Payload::from_name("xml"), None);
    }
}
