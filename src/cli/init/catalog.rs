//! What is there before `init` does anything: server, role, tables, publication, slot. Reads the catalogue only.

use tokio_postgres::{Client, GenericClient};

use crate::config::{Config, Mode};
use crate::postgres::slot::{PLUGIN, SlotState, mend_two_phase};
use crate::postgres::{TableName, quote_literal, sql_error};
use crate::{Error, Result};

/// The oldest server: protocol 1 with `binary` and `messages`, and standard SQL function bodies.
const OLDEST_VERSION_NUM: i32 = 140_000;

/// The server and the role that `init` works as.
#[derive(Debug)]
pub(super) struct Server {
    version_num: i32,
    version: String,
    wal_level: String,
    in_recovery: bool,
    pub(super) role: String,
    pub(super) database: String,
    pub(super) may_replicate: bool,
    pub(super) may_create_in_database: bool,
}

impl Server {
    pub(super) async fn read(client: &Client) -> Result<Self> {
        // Managed services grant replication through a role of their own instead of the attribute.
        let query = "
            select current_setting('server_version_num')::int, current_setting('server_version'),
                   current_setting('wal_level'), pg_is_in_recovery(), current_user::text, current_database()::text,
                   rolsuper or rolreplication or exists (
                       select from pg_roles managed
                       where managed.rolname = 'rds_replication' and pg_has_role(managed.oid, 'usage')
                   ),
                   has_database_privilege(current_database(), 'create')
            from pg_roles where rolname = current_user";
        let row = client
            .query_one(query, &[])
            .await
            .map_err(|error| sql_error("read what server this is", error))?;
        Ok(Self {
            version_num: row.get(0),
            version: row.get(1),
            wal_level: row.get(2),
            in_recovery: row.get(3),
            role: row.get(4),
            database: row.get(5),
            may_replicate: row.get(6),
            may_create_in_database: row.get(7),
        })
    }

    /// Whether a slot can survive a failover of the primary.
    pub(super) fn has_failover_slots(&self) -> bool {
        self.version_num >= 170_000
    }

    /// Refuses a server on which no stream could run, whoever asks.
    pub(super) fn check(&self, mode: Mode) -> Result<()> {
        if self.version_num < OLDEST_VERSION_NUM {
            return Err(Error::refused(format!(
                "this server is Postgres {}; walpost needs 14 or later",
                self.version
            ))
            .hint("upgrade the server"));
        }
        if self.in_recovery {
            return Err(Error::refused(
                "this server is a standby, which cannot be written to",
            )
            .hint("connect to the primary: name all servers in WALPOST_POSTGRES_URL and add target_session_attrs=read-write"));
        }
        if mode == Mode::Stream && self.wal_level != "logical" {
            return Err(Error::refused(format!(
                "wal_level is {}; a logical replication slot needs logical",
                self.wal_level
            ))
            .hint("run as a superuser: ALTER SYSTEM SET wal_level = 'logical'; then restart Postgres (a reload is not enough)"));
        }
        Ok(())
    }
}

/// A column of an existing table.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) sql_type: String,
}

/// A table's owner.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) name: String,
    pub(super) is_superuser: bool,
    /// The role that `init` works as has this role's rights.
    pub(super) is_us: bool,
}

/// An outbox table that is there.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) columns: Vec<Column>,
    pub(super) owner: Owner,
    pub(super) schema_usable: bool,
    pub(super) published: bool,
    /// Why it cannot be streamed at all, and what to do about it.
    unfit: Option<(&'static str, String)>,
}

impl Table {
    /// `None` when there is no such table.
    async fn read(
        client: &impl GenericClient,
        name: &TableName,
        publication: &str,
    ) -> Result<Option<Self>> {
        let doing = format!("look at table {name}");
        // The view shows a partitioned table only when it is published under its own name, hence the second look.
        let query = "
            select c.oid, c.relkind::text || c.relpersistence::text, owner.rolname::text, owner.rolsuper, pg_has_role(c.relowner, 'usage'),
                   has_schema_privilege(n.oid, 'usage'),
                   p.pubname is not null or exists (
                       select from pg_publication_rel r join pg_publication direct on direct.oid = r.prpubid
                       where direct.pubname = $3 and r.prrelid = c.oid
                   )
            from pg_class c
            join pg_namespace n on n.oid = c.relnamespace
            join pg_roles owner on owner.oid = c.relowner
            left join pg_publication_tables p
                on p.pubname = $3 and p.schemaname = n.nspname and p.tablename = c.relname
            where n.nspname = $1 and c.relname = $2";
        let row = client
            .query_opt(query, &[&name.schema, &name.name, &publication])
            .await
            .map_err(|error| sql_error(&doing, error))?;
        let Some(row) = row else {
            return Ok(None);
        };
        let oid: u32 = row.get(0);
        let query = "
            select attname::text, format_type(atttypid, atttypmod) from pg_attribute
            where attrelid = $1 and attnum > 0 and not attisdropped order by attnum";
        let columns = client
            .query(query, &[&oid])
            .await
            .map_err(|error| sql_error(&doing, error))?;
        Ok(Some(Self {
            columns: columns
                .iter()
                .map(|column| Column {
                    name: column.get(0),
                    sql_type: column.get(1),
                })
                .collect(),
            owner: Owner {
                name: row.get(2),
                is_superuser: row.get(3),
                is_us: row.get(4),
            },
            unfit: unfit(name, row.get(1)),
            schema_usable: row.get(5),
            published: row.get(6),
        }))
    }

    /// The type of the column of that name.
    pub(super) fn column_type(&self, name: &str) -> Option<&str> {
        let column = self.columns.iter().find(|column| column.name == name)?;
        Some(&column.sql_type)
    }

    /// Whether the status view can be made over it: a table of that name that somebody else made may lack columns.
    pub(super) fn has_status_columns(&self) -> bool {
        let mut columns = ["txid", "seq", "sent_at", "created_at"].iter();
        columns.all(|column| self.column_type(column).is_some())
            && self.column_type("txid") == Some("xid8")
    }

    /// Whether `walpost.emit` can insert into it.
    pub(super) fn has_emit_columns(&self) -> bool {
        let optional = ["topic", "headers", "deliver_at"];
        let needed = ["id", "aggregatetype", "aggregateid", "type", "payload"];
        let mut columns = needed.iter().chain(&optional);
        columns.all(|column| self.column_type(column).is_some())
    }

    /// Refuses a view and a table that lacks a column which every event needs.
    pub(super) fn check(&self, name: &TableName, config: &Config) -> Result<()> {
        if let Some((why, hint)) = &self.unfit {
            return Err(Error::refused(format!("{name} {why}")).hint(hint.as_str()));
        }
        let columns = &config.columns;
        let mut needed = vec![
            (columns.id.as_str(), "WALPOST_COLUMN_ID"),
            (columns.aggregateid.as_str(), "WALPOST_COLUMN_AGGREGATEID"),
            (columns.payload.as_str(), "WALPOST_COLUMN_PAYLOAD"),
        ];
        let routing = config.topic.columns_used(columns);
        needed.extend(routing.map(|column| (column, "WALPOST_TOPIC and WALPOST_COLUMN_*")));
        let lacking: Vec<String> = needed
            .iter()
            .filter(|(column, _)| self.column_type(column).is_none())
            .map(|(column, setting)| format!("{column:?} (see {setting})"))
            .collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let present: Vec<&str> = self.columns.iter().map(|c| c.name.as_str()).collect();
        Err(Error::refused(format!(
            "table {name} lacks what every event needs: column {}",
            lacking.join(", ")
        ))
        .hint(format!(
            "name columns that it has ({}), or add one: ALTER TABLE {name} ADD COLUMN … text NOT NULL",
            present.join(", ")
        )))
    }
}

/// Judges `pg_class.relkind` and `relpersistence`, one letter each.
fn unfit(name: &TableName, kind: &str) -> Option<(&'static str, String)> {
    match kind.split_at_checked(1) {
        Some(("r" | "p", "p")) => None,
        Some(("r" | "p", _)) => Some((
            "is temporary or unlogged, so its rows are not in the write-ahead log",
            format!("ALTER TABLE {name} SET LOGGED;"),
        )),
        _ => Some((
            "is not a table",
            "name tables in WALPOST_OUTBOX_TABLE; logical replication has no views".to_owned(),
        )),
    }
}

/// A publication that is there.
#[derive(Debug)]
pub(super) struct Publication {
    pub(super) name: String,
    pub(super) owned: bool,
    pub(super) inserts: bool,
    pub(super) via_root: bool,
}

/// Where the default of the id column comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdFunction {
    /// Postgres 18 and later have `uuidv7()`.
    Native,
    /// `walpost.uuidv7()` is there.
    Ours,
    /// `walpost.uuidv7()` has to be made.
    Missing,
}

/// `walpost.progress`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProgressTable {
    Missing,
    /// An earlier version's: its definition is applied again.
    Older,
    /// There, and the role may not read or write it.
    Closed,
    Usable,
}

/// `walpost.straggler`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StragglerTable {
    Missing,
    /// An earlier version's: its definition is applied again.
    Older,
    Current,
}

/// A function that an earlier version made: names in it mean what its caller's `search_path` says.
#[derive(Debug)]
pub(super) struct OpenFunction {
    /// With its arguments, as in SQL.
    pub(super) signature: String,
    /// The role that `init` works as may alter it.
    pub(super) is_ours: bool,
}

impl OpenFunction {
    async fn read_all(client: &impl GenericClient) -> Result<Vec<Self>> {
        // A standard body was bound when it was made.
        let query = "
            select p.oid::regprocedure::text, pg_has_role(p.proowner, 'usage') from pg_proc p
            where p.pronamespace = to_regnamespace('walpost') and p.prosqlbody is null
              and p.proname in ('emit', 'emit_transient', 'inbox_claim', 'inbox_give_up')
              and not exists (select from unnest(p.proconfig) setting where setting like 'search_path=%')
            order by 1";
        let rows = client
            .query(query, &[])
            .await
            .map_err(|error| sql_error("look at the functions of schema walpost", error))?;
        Ok(rows
            .iter()
            .map(|row| Self {
                signature: row.get(0),
                is_ours: row.get(1),
            })
            .collect())
    }

    /// The statement that makes names in it mean the same for every caller.
    pub(super) fn close(&self) -> String {
        format!(
            "ALTER FUNCTION {} SET search_path = pg_catalog, pg_temp;",
            self.signature
        )
    }
}

/// The objects of the settings, as they are.
#[derive(Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, read in one query"
)]
pub(super) struct Catalog {
    pub(super) has_schema: bool,
    pub(super) may_create_in_schema: bool,
    pub(super) progress: ProgressTable,
    pub(super) has_status: bool,
    pub(super) straggler: StragglerTable,
    pub(super) has_left_undone: bool,
    pub(super) has_emit: bool,
    pub(super) has_emit_transient: bool,
    pub(super) id_function: IdFunction,
    pub(super) open_functions: Vec<OpenFunction>,
    /// In the order of the settings.
    pub(super) tables: Vec<(TableName, Option<Table>)>,
    pub(super) publication: Option<Publication>,
}

impl Catalog {
    pub(super) async fn read(client: &impl GenericClient, config: &Config) -> Result<Self> {
        // Not by to_regclass: it is an error for whoever may not use the schema.
        let query = "
            with ours as (select to_regnamespace('walpost') as schema),
                 progress as (select c.oid from pg_class c, ours where relnamespace = schema and relname = 'progress'),
                 straggler as (select c.oid from pg_class c, ours where relnamespace = schema and relname = 'straggler')
            select schema is not null,
                   coalesce(has_schema_privilege(schema, 'create') and has_schema_privilege(schema, 'usage'), false),
                   to_regprocedure('pg_catalog.uuidv7()') is not null,
                   exists (select from pg_proc where proname = 'uuidv7' and pronargs = 0 and pronamespace = schema),
                   exists (select from progress),
                   exists (select from progress
                           where has_table_privilege(oid, 'select') and has_table_privilege(oid, 'insert')
                             and has_table_privilege(oid, 'update')),
                   exists (select from pg_class where relnamespace = schema and relname = 'outbox_status'),
                   exists (select from straggler),
                   exists (select from pg_proc where proname = 'emit' and pronamespace = schema),
                   exists (select from pg_proc where proname = 'emit_transient' and pronamespace = schema),
                   exists (select from straggler join pg_attribute on attrelid = oid
                           where attname = 'properties' and atttypid = 'json'::regtype)
                   and 3 = (select count(*) from straggler join pg_attribute on attrelid = oid
                            where attname in ('row_seq', 'row_txid', 'xid') and not attisdropped)
                   and 4 = (select count(*) from straggler join pg_index on indrelid = oid
                            join pg_class i on i.oid = indexrelid
                            where i.relname in ('straggler_place', 'straggler_due', 'straggler_key', 'straggler_id'))
                   and exists (select from ours join pg_class c on relnamespace = schema and relname = 'discarded'
                               join pg_attribute a on attrelid = c.oid and attname = 'row_txid' and not attisdropped),
                   5 = (select count(*) from progress join pg_attribute on attrelid = oid
                        where attname in ('timeline', 'tables', 'streamed', 'catalog', 'producer_generation') and not attisdropped),
                   exists (select from pg_class where relnamespace = schema and relname = 'left_undone')
            from ours";
        let schema = client
            .query_one(query, &[])
            .await
            .map_err(|error| sql_error("look at schema walpost", error))?;
        let open_functions = OpenFunction::read_all(client).await?;
        let mut tables = Vec::new();
        for name in &config.outbox_tables {
            let table = Table::read(client, name, &config.publication).await?;
            tables.push((name.clone(), table));
        }
        let query = "
            select pg_has_role(pubowner, 'usage'), pubinsert, pubviaroot from pg_publication where pubname = $1";
        let publication = client
            .query_opt(query, &[&config.publication])
            .await
            .map_err(|error| sql_error("look at the publication", error))?;
        Ok(Self {
            has_schema: schema.get(0),
            may_create_in_schema: schema.get(1),
            progress: match (schema.get(4), schema.get(11), schema.get(5)) {
                (false, _, _) => ProgressTable::Missing,
                (true, false, _) => ProgressTable::Older,
                (true, true, false) => ProgressTable::Closed,
                (true, true, true) => ProgressTable::Usable,
            },
            has_status: schema.get(6),
            straggler: match (schema.get(7), schema.get(10)) {
                (false, _) => StragglerTable::Missing,
                (true, false) => StragglerTable::Older,
                (true, true) => StragglerTable::Current,
            },
            has_left_undone: schema.get(12),
            has_emit: schema.get(8),
            has_emit_transient: schema.get(9),
            id_function: match (schema.get(2), schema.get(3)) {
                (true, _) => IdFunction::Native,
                (false, true) => IdFunction::Ours,
                (false, false) => IdFunction::Missing,
            },
            open_functions,
            tables,
            publication: publication.map(|row| Publication {
                name: config.publication.clone(),
                owned: row.get(0),
                inserts: row.get(1),
                via_root: row.get(2),
            }),
        })
    }
}

/// Refuses a slot that is there but cannot give the stream.
pub(super) fn check_slot(name: &str, slot: &SlotState, server: &Server) -> Result<()> {
    let other = match (slot.plugin.as_deref(), slot.database.as_deref()) {
        (Some(PLUGIN), Some(database)) if database == server.database => None,
        (Some(PLUGIN), database) => Some(format!("of database {}", database.unwrap_or("none"))),
        (Some(plugin), _) => Some(format!("of output plugin {plugin}")),
        (None, _) => Some("a physical one".to_owned()),
    };
    if let Some(other) = other {
        return Err(
            Error::refused(format!("slot {name} is there, but it is {other}"))
                .hint("choose a name that is free in WALPOST_SLOT"),
        );
    }
    if let Some(reason) = slot.lost_because() {
        return Err(Error::refused(format!("slot {name} is lost: {reason}")).hint(format!(
            "start walpost run, which makes it anew and publishes the rows in between from tables with txid and seq; to give up those \
             rows: SELECT pg_drop_replication_slot({}); then walpost init again",
            quote_literal(name)
        )));
    }
    if let Some(why) = slot.unfit_because() {
        return Err(
            Error::refused(format!("slot {name} is there, but {why}")).hint(mend_two_phase(name))
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        Server {
            version_num: 150_018,
            version: "15.18".to_owned(),
            wal_level: "logical".to_owned(),
            in_recovery: false,
            role: "app".to_owned(),
            database: "shop".to_owned(),
            may_replicate: true,
            may_create_in_database: true,
        }
    }

    fn slot() -> SlotState {
        SlotState {
            plugin: Some("pgoutput".to_owned()),
            database: Some("shop".to_owned()),
            active: false,
            active_pid: None,
            confirmed_flush: None,
            restart_lsn: None,
            wal_status: Some("reserved".to_owned()),
            invalidation_reason: None,
            retained_bytes: None,
            two_phase: false,
            temporary: false,
            failover: false,
            synced: false,
        }
    }

    #[test]
    fn a_server_without_logical_decoding_is_refused_with_the_command() {
        let mut wrong = server();
        assert!(wrong.check(Mode::Stream).is_ok());
        wrong.wal_level = "replica".to_owned();
        assert!(wrong.check(Mode::Poll).is_ok(), "polling needs none");
        let error = wrong.check(Mode::Stream).unwrap_err();
        assert_eq!(error.exit_code(), 69);
        let said = error.report();
        assert!(said.contains("wal_level is replica"), "{said}");
        assert!(
            said.contains("ALTER SYSTEM SET wal_level = 'logical';"),
            "{said}"
        );
        assert!(said.contains("restart"), "{said}");
    }

    #[test]
    fn an_old_server_and_a_standby_are_refused() {
        let mut old = server();
        old.version_num = 130_021;
        assert!(
            old.check(Mode::Stream)
                .unwrap_err()
                .report()
                .contains("14 or later")
        );
        let mut standby = server();
        standby.in_recovery = true;
        let said = standby.check(Mode::Stream).unwrap_err().report();
        assert!(said.contains("target_session_attrs=read-write"), "{said}");
    }

    #[test]
    fn a_slot_that_is_not_ours_or_lost_is_refused() {
        let said = |change: &dyn Fn(&mut SlotState)| {
            let mut changed = slot();
            change(&mut changed);
            check_slot("s", &changed, &server()).unwrap_err().report()
        };
        assert!(check_slot("s", &slot(), &server()).is_ok());
        assert!(said(&|s| s.plugin = None).contains("physical"));
        assert!(said(&|s| s.plugin = Some("wal2json".to_owned())).contains("wal2json"));
        assert!(said(&|s| s.database = Some("x".to_owned())).contains("of database x"));
        assert!(said(&|s| s.two_phase = true).contains("two_phase"));
        let lost = said(&|s| s.wal_status = Some("lost".to_owned()));
        assert!(lost.contains("pg_drop_replication_slot('s')"), "{lost}");
    }
}
