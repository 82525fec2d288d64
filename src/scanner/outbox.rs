//! What an outbox table has and what the role may do with it: which of the modes it can have, and the statement that mends
//! what is missing.
//!
//! Input: a SQL connection and the settings. Output: one [`OutboxTable`] for each table. Nothing is changed.

use tokio_postgres::{Client, Row};

use super::rows::{held, printed};
use crate::config::{AfterPublish, Config, Mode};
use crate::outbox::number_column;
pub use crate::outbox::{SEQ, TXID};
use crate::pgoutput::types::XID8;
use crate::postgres::{TableName, name_bytes, quote_ident, sql_error};
use crate::{Error, Result};

/// The column that marking sets.
pub const SENT_AT: &str = "sent_at";

/// A column that a mode reads or writes.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// Its type, as SQL has it.
    pub sql_type: String,
    /// Its type, or the one below all its domains.
    base_type: u32,
    /// Its type is a number, or a domain over one.
    is_number: bool,
    /// Where its type's own operators are, if not in `pg_catalog`, which alone is in the `search_path`.
    operators_in: Option<String>,
}

impl Column {
    /// An operator between two values of this type. Another schema's `=`, left unqualified, would not be found, or another type's would be
    /// taken, which the column's index does not serve.
    pub fn operator(&self, symbol: &str) -> String {
        match &self.operators_in {
            Some(schema) => format!("OPERATOR({}.{symbol})", quote_ident(schema)),
            None => symbol.to_owned(),
        }
    }

    /// Whether the type's operators are of another schema.
    pub fn has_own_operators(&self) -> bool {
        self.operators_in.is_some()
    }
}

/// SQL: the facts of table `$2` in schema `$1`.
const TABLE: &str = "
    SELECT c.oid, c.relkind = 'p', current_user::text,
           CASE WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'sent_at')
                THEN has_column_privilege(c.oid, 'sent_at', 'UPDATE') ELSE false END,
           has_table_privilege(c.oid, 'DELETE'), has_table_privilege(c.oid, 'SELECT'),
           pg_has_role(c.relowner, 'USAGE'), pg_get_userbyid(c.relowner)::text,
           getdatabaseencoding() = 'SQL_ASCII',
           -- The columns of a partition key, and those that its expressions name, depend on the table itself.
           EXISTS (SELECT FROM pg_partition_tree(c.oid) p
                   JOIN pg_attribute a ON a.attrelid = p.relid AND a.attname = 'sent_at'
                   JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = a.attrelid AND d.objsubid = a.attnum
                       AND d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid AND d.refobjsubid = 0
                       AND d.deptype = 'i')
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2";

/// SQL: whether a unique index covers the ids of table `$1` in column `$2`, and whether one makes them unique: of the whole table (a partition's own
/// says nothing of the others, nor does a table's of its children), and over nothing but the id.
const IDS: &str = "
    SELECT (SELECT coalesce(bool_and(EXISTS (
                SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
                WHERE i.indrelid = leaf.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                  AND a.attname = $2 AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))), true)
            FROM (SELECT $1::oid AS oid WHERE NOT EXISTS (SELECT FROM pg_partitioned_table WHERE partrelid = $1)
                  UNION ALL SELECT relid::oid FROM pg_partition_tree($1::oid) WHERE isleaf) leaf),
           EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
                   WHERE i.indrelid = $1 AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
                     AND a.attname = $2 AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
           AND NOT EXISTS (SELECT FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhparent WHERE c.oid = $1 AND c.relkind <> 'p')";

/// See the module's documentation.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)] // Each is a fact of the catalogue.
pub struct OutboxTable {
    /// Its name.
    pub name: TableName,
    /// Every column, in order.
    pub columns: Vec<Column>,
    /// The id's column.
    pub id: Column,
    /// The time of the event; `None` without such a column.
    pub created_at: Option<Column>,
    /// Whether there is a `sent_at`.
    pub has_sent_at: bool,
    /// Whether there is a `txid` of type `xid8`.
    pub has_txid: bool,
    /// Whether there is a `seq` that is a number: without it the scan of a gap leaves the table out.
    pub has_seq: bool,
    /// Whether it is partitioned.
    pub partitioned: bool,
    /// Whether `sent_at` is in its partition key, or in that of one of its partitions.
    parted_by_sent_at: bool,
    /// Whether the role has the owner's rights.
    owned: bool,
    /// Whether an index begins with the id.
    pub has_id_index: bool,
    /// Whether a unique index of the table, or of each of its partitions, covers the id, if only together with other columns: ids are then
    /// likely to be unique.
    pub covers_id: bool,
    /// Whether no two rows can have the same id.
    pub has_unique_id: bool,
    /// The column that tells rows with the same id apart, if there is one: see [`crate::outbox::RowNumber`].
    pub number: Option<&'static str>,
    /// Whether an index of unmarked rows begins with the event's time.
    pub has_unmarked_index: bool,
    /// The role and the table's owner, for a GRANT.
    role: String,
    owner: String,
    may_update: bool,
    may_delete: bool,
    may_select: bool,
    /// The database's encoding is `SQL_ASCII`.
    takes_any_bytes: bool,
}

impl OutboxTable {
    /// Looks at a table.
    ///
    /// # Errors
    /// Refused when there is no such table, or it has no column for the id.
    pub async fn read(client: &Client, name: &TableName, config: &Config) -> Result<Self> {
        const INDEXES: &str = "
            SELECT coalesce(bool_or(indkey[0] = $2 AND indpred IS NULL), false),
                   coalesce(bool_or(indkey[0] = $3 AND pg_get_expr(indpred, indrelid) = '(sent_at IS NULL)'), false)
            FROM pg_index WHERE indrelid = $1 AND indisvalid";
        // A name that is no UTF-8 must not be an error: no setting can mean that column.
        let columns_sql = format!(
            "SELECT {}, {}, a.attnum, (
                 WITH RECURSIVE base AS (
                     SELECT * FROM pg_type WHERE oid = atttypid
                     UNION ALL
                     SELECT t.* FROM base JOIN pg_type t ON base.typtype = 'd' AND t.oid = base.typbasetype
                 )
                 SELECT n.nspname::text FROM base
                 JOIN pg_operator o ON o.oprname = '=' AND o.oprleft = base.oid AND o.oprright = base.oid
                 JOIN pg_namespace n ON n.oid = base.typnamespace AND n.oid = o.oprnamespace
                 WHERE n.nspname <> 'pg_catalog'
             ), (
                 WITH RECURSIVE base AS (
                     SELECT t.oid, t.typtype, t.typbasetype FROM pg_type t WHERE t.oid = atttypid
                     UNION ALL
                     SELECT t.oid, t.typtype, t.typbasetype FROM base JOIN pg_type t ON base.typtype = 'd' AND t.oid = base.typbasetype
                 )
                 SELECT oid FROM base WHERE typtype <> 'd'
             ), (SELECT typcategory = 'N' FROM pg_type WHERE oid = atttypid)
             FROM pg_attribute a WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            name_bytes("attname"),
            name_bytes("format_type(atttypid, atttypmod)")
        );
        let text = |row: &Row, column: usize| {
            String::from_utf8_lossy(row.get::<_, &[u8]>(column)).into_owned()
        };
        let failed = |error| sql_error(&format!("look at table {name}"), error);
        let row = client
            .query_opt(TABLE, &[&name.schema, &name.name])
            .await
            .map_err(failed)?
            .ok_or_else(|| Error::refused(format!("table {name} does not exist")))?;
        let oid: u32 = row.get(0);
        let found = client.query(&columns_sql, &[&oid]).await.map_err(failed)?;
        let columns: Vec<Column> = found
            .iter()
            .map(|column| Column {
                name: text(column, 0),
                sql_type: text(column, 1),
                operators_in: column.get(3),
                base_type: column.get(4),
                is_number: column.get(5),
            })
            .collect();
        let find = |name: &str| columns.iter().find(|column| column.name == name).cloned();
        let id_name = &config.columns.id;
        let id = find(id_name).ok_or_else(|| {
            Error::refused(format!("table {name} has no column {id_name:?}"))
                .hint("set WALPOST_COLUMN_ID")
        })?;
        let number = |name: &str| -> Option<i16> {
            let column = columns.iter().position(|column| column.name == name)?;
            found.get(column).map(|column| column.get(2))
        };
        let indexed = client
            .query_one(
                INDEXES,
                &[&oid, &number(&id.name), &number(&config.columns.created_at)],
            )
            .await
            .map_err(failed)?;
        let ids = client.query_one(IDS, &[&oid, &id.name]).await;
        let ids = ids.map_err(failed)?;
        let is_time = |column: &Column| column.sql_type.starts_with("timestamp");
        Ok(Self {
            name: name.clone(),
            created_at: find(&config.columns.created_at).filter(is_time),
            has_sent_at: find(SENT_AT).is_some_and(|column| is_time(&column)),
            has_txid: find(TXID).is_some_and(|column| column.base_type == XID8),
            has_seq: find(SEQ).is_some_and(|column| column.is_number),
            has_id_index: indexed.get(0),
            covers_id: ids.get(0),
            has_unique_id: ids.get(1),
            number: number_column(|name| find(name).map(|column| column.base_type)),
            has_unmarked_index: indexed.get(1),
            id,
            columns,
            partitioned: row.get(1),
            role: row.get(2),
            may_update: row.get(3),
            may_delete: row.get(4),
            may_select: row.get(5),
            owned: row.get(6),
            owner: row.get(7),
            takes_any_bytes: row.get(8),
            parted_by_sent_at: row.get(9),
        })
    }

    /// The same for every table of the settings, in their order.
    pub async fn read_all(client: &Client, config: &Config) -> Result<Vec<Self>> {
        let mut tables = Vec::with_capacity(config.outbox_tables.len());
        for name in &config.outbox_tables {
            tables.push(Self::read(client, name, config).await?);
        }
        Ok(tables)
    }

    /// The statements that add a column by this definition, which begins with its name. One that has the name and another type gives it up.
    pub fn add_column(&self, definition: &str) -> String {
        let (table, name) = (&self.name, definition.split(' ').next().unwrap_or_default());
        let add = format!("ALTER TABLE {table} ADD COLUMN {definition};");
        match self.columns.iter().find(|column| column.name == name) {
            None => add,
            Some(known) => format!(
                "where nothing else names column {name} ({}): ALTER TABLE {table} RENAME COLUMN {name} TO {name}_before; {add}",
                known.sql_type
            ),
        }
    }

    /// Whether the role can look up `seq` and `txid` of a row by its id, by an index.
    pub fn tells_place(&self) -> bool {
        self.has_seq && self.has_txid && self.has_id_index && self.may_select
    }

    /// The id column, quoted.
    pub fn id_column(&self) -> String {
        quote_ident(&self.id.name)
    }

    /// SQL: whether row `o` is a straggler. `outbox` is SQL for the table's name, as it stands in `walpost.straggler`.
    ///
    /// The id there is the event's: what the output function prints, which a cast to text need not give.
    pub fn is_straggler(&self, outbox: &str) -> String {
        let id = format!("o.{}", self.id_column());
        let printed = match self.id.sql_type.as_str() {
            "uuid" | "text" | "bigint" | "integer" | "numeric" => format!("{id}::pg_catalog.text"),
            _ => printed(&id),
        };
        let same = if self.takes_any_bytes {
            // An id that is no UTF-8 stands there escaped.
            format!(
                "s.id IN ({printed}, pg_catalog.encode({}, 'escape'))",
                held(&id)
            )
        } else {
            format!("s.id = {printed}")
        };
        format!("EXISTS (SELECT FROM walpost.straggler s WHERE s.outbox = {outbox} AND {same})")
    }

    /// SQL: whether the id of row `o` is UTF-8; `None` where it must be.
    pub fn id_is_utf8(&self) -> Option<String> {
        // Here a character is a byte. Table 3-7 of the Unicode standard, without NUL.
        const UTF_8: &str = r"'^([\x01-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*$'";
        let id = printed(&format!("o.{}", self.id_column()));
        self.takes_any_bytes
            .then(|| format!("({id}) COLLATE \"C\" ~ {UTF_8}"))
    }

    /// SQL for "this long ago", comparable with `created_at`: a timestamp without time zone is UTC, as everywhere in walpost.
    pub fn ago(&self, seconds: &str) -> String {
        let ago = format!("(clock_timestamp() - make_interval(secs => {seconds}))");
        match &self.created_at {
            Some(column) if !column.sql_type.contains("with time zone") => {
                format!("({ago} AT TIME ZONE 'UTC')")
            }
            _ => ago,
        }
    }

    /// Refuses a mode that the table cannot have.
    pub fn check_after_publish(&self, mode: AfterPublish) -> Result<()> {
        let name = &self.name;
        let lack = |right: &str| {
            Error::refused(format!(
                "role {} may not {right} table {name}, which WALPOST_AFTER_PUBLISH={} needs",
                self.role,
                mode.name()
            ))
            .hint(self.grant(mode))
        };
        match mode {
            AfterPublish::Keep => return Ok(()),
            AfterPublish::Mark if !self.has_sent_at => {
                return Err(Error::refused(format!(
                    "table {name} has no column sent_at of type timestamptz, which WALPOST_AFTER_PUBLISH=mark sets"
                ))
                .hint(format!(
                    "{} or set WALPOST_AFTER_PUBLISH to keep or delete",
                    self.add_column("sent_at timestamptz")
                )));
            }
            AfterPublish::Mark if !self.may_update => return Err(lack("set sent_at in")),
            AfterPublish::Delete if !self.may_delete => return Err(lack("delete from")),
            AfterPublish::Mark | AfterPublish::Delete => {}
        }
        if !self.may_select {
            return Err(lack("read"));
        }
        Ok(())
    }

    /// Refuses a table whose rows the mode mark would move to another partition: the log holds that as a deletion and an insertion, and the
    /// stream would bring each row once more. (Poll mode knows rows by `txid`, which stays.)
    pub fn check_row_movement(&self, config: &Config) -> Result<()> {
        let marks = config.after_publish == AfterPublish::Mark && config.mode == Mode::Stream;
        if !(marks && self.parted_by_sent_at) {
            return Ok(());
        }
        let name = &self.name;
        Err(Error::refused(format!(
            "table {name} is partitioned by sent_at, which WALPOST_AFTER_PUBLISH=mark sets: each marked row moves to another partition, and \
             the stream brings it as a new one"
        ))
        .hint("partition it by another column (created_at), or set WALPOST_AFTER_PUBLISH to keep or delete"))
    }

    /// Refuses a retention that the table cannot have.
    pub fn check_retention(&self, mode: AfterPublish) -> Result<()> {
        let name = &self.name;
        let missing = if !self.has_txid {
            Some((
                "txid of type xid8",
                "txid xid8 NOT NULL DEFAULT pg_current_xact_id()",
            ))
        } else if self.created_at.is_none() {
            Some((
                "for the time of the event",
                "created_at timestamptz NOT NULL DEFAULT clock_timestamp()",
            ))
        } else if mode == AfterPublish::Keep && !self.has_seq {
            // Rows from before the slot, or of a gap, would count as delivered although nothing can bring them. (In the
            // other modes a row without its mark stays.)
            Some((
                "seq of type bigint",
                "seq bigint GENERATED ALWAYS AS IDENTITY",
            ))
        } else {
            None
        };
        if let Some((what, column)) = missing {
            return Err(Error::refused(format!(
                "table {name} has no column {what}, so it cannot be told which rows WALPOST_RETENTION may delete"
            ))
            .hint(format!(
                "{} its rows may count as delivered then: send those that were never published \
                 (from before the slot) with walpost replay --execute before WALPOST_RETENTION is set; or set WALPOST_RETENTION to none",
                self.add_column(column)
            )));
        }
        if !self.may_delete || !self.may_select {
            return Err(Error::refused(format!(
                "role {} may not delete from table {name}, which WALPOST_RETENTION needs",
                self.role
            ))
            .hint(self.grant(AfterPublish::Delete)));
        }
        if self.partitioned && !self.owned {
            return Err(Error::refused(format!(
                "role {} does not own table {name}, so it may not drop partitions, which WALPOST_RETENTION needs",
                self.role
            ))
            .hint(format!(
                "GRANT {} TO {};",
                quote_ident(&self.owner),
                quote_ident(&self.role)
            )));
        }
        self.check_after_publish(mode)
    }

    /// Why rows that were never marked cannot be looked for, if they cannot.
    pub fn unmarked_unknown(&self) -> Option<String> {
        self.created_at.is_none().then(|| {
            format!(
                "table {} has no column for the time of the event (WALPOST_COLUMN_CREATED_AT): rows that were never marked are \
                 not looked for",
                self.name
            )
        })
    }

    /// The index that serves the look for rows that were never marked.
    pub fn unmarked_index(&self) -> Option<String> {
        let created_at = self.created_at.as_ref()?;
        Some(format!(
            "CREATE INDEX ON {} ({}, {}) WHERE sent_at IS NULL;",
            self.name,
            quote_ident(&created_at.name),
            self.id_column()
        ))
    }

    fn grant(&self, mode: AfterPublish) -> String {
        let right = match mode {
            AfterPublish::Keep => "SELECT",
            AfterPublish::Mark => "SELECT, UPDATE (sent_at)",
            AfterPublish::Delete => "SELECT, DELETE",
        };
        format!(
            "GRANT {right} ON {} TO {};",
            self.name,
            quote_ident(&self.role)
        )
    }
}
