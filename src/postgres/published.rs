//! What a publication sends of the outbox tables, and what keeps rows of theirs out of the stream.
//!
//! Input: an SQL connection and a [`Subscription`]. Output: the first reason why the stream would leave rows or values out, as an error
//! that names the statement that mends it; else the [`OutboxRelations`] of tables whose rows are outbox rows. One statement, one round
//! trip, and no right but `CONNECT`: [`watch`] is meant to be called every few seconds beside a running stream.
//!
//! # What is asked, and why
//!
//! The question is not what the publication says but what `pgoutput` does with it, so the answer comes from
//! `pg_get_publication_tables`, which is what the `pg_publication_tables` view reads: it knows `FOR ALL TABLES`, `FOR TABLES IN
//! SCHEMA` and which ancestor a partition's rows are published as.
//!
//! * The table itself must be listed. With `publish_via_partition_root` that also covers partitions in other schemas, and those
//!   that are attached later. A table that is a partition of another published one is not listed: its rows carry that one's name.
//! * A row filter leaves rows out. It is refused, also one that is always true: no comparison with the table could tell a row that
//!   was filtered from one that was lost.
//! * A column list may leave out what walpost does not read (a large column of the application's own), but nothing that it does
//!   read: a scan would publish another message than the stream. `txid` and `seq` count as read, see [`crate::scanner`].
//! * A generated column is not sent before Postgres 18, and then only when the publication says so.
//! * Unlogged and foreign partitions are not in the write-ahead log. Children by plain inheritance are: but under their own
//!   names, and only where the publication has them, while a query on the parent shows their rows. They are refused.
//!   (Temporary children are left out: no other session sees their rows.)
//!
//! `tests/catalog` tries each of these on Postgres 14, 15 and 18.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{GenericClient, Row};

use super::names::{TableName, name_bytes, quote_ident};
use super::server_error::sql_error;
use crate::{Error, Lsn, Result};

/// What is to be streamed, and what is read of it.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// Name of the publication.
    pub publication: String,
    /// The outbox tables, in the order of the settings.
    pub tables: Vec<TableName>,
    /// Columns that walpost reads where a table has them.
    pub columns: Vec<String>,
}

/// The tables whose rows are outbox rows: each outbox table, its partitions, and theirs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutboxRelations {
    /// OID, and the outbox table's place in the settings.
    pub members: Vec<(u32, u16)>,
    /// OIDs of the outbox tables themselves.
    pub roots: Vec<u32>,
    /// By place in the settings: the columns of the outbox table that the publication sends, in the order in which it does.
    pub columns: Vec<Vec<SentColumn>>,
    /// Other tables that the publication has.
    pub others: Vec<u32>,
    /// Where the log ended when this was read: what is committed behind it may have changed it.
    pub read_at: Lsn,
}

/// A column that the publication sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentColumn {
    /// Its name.
    pub name: String,
    /// `pg_attribute.attnum`: the table's columns have it from 1 on in the order of their making, those that were dropped too.
    pub number: u16,
    /// Whether walpost reads it.
    pub is_read: bool,
}

impl OutboxRelations {
    /// The place in the settings of the outbox table that this OID belongs to.
    pub fn place(&self, oid: u32) -> Option<u16> {
        let member = self.members.iter().find(|(member, _)| *member == oid);
        member.map(|(_, place)| *place)
    }

    /// The columns of the outbox table at this place; none where it is not known.
    pub fn columns_of(&self, place: u16) -> &[SentColumn] {
        let columns = self.columns.get(usize::from(place));
        columns.map_or(&[], Vec::as_slice)
    }
}

/// Looks whether the publication still brings every row of the outbox tables, and every column that is read.
///
/// # Errors
/// Refused, with the statement that mends it, for the first thing that is wrong; temporary when the server cannot be asked.
pub async fn watch(client: &impl GenericClient, subscription: &Subscription) -> Result<()> {
    let (publication, tables) = read(client, subscription).await?;
    check(subscription, publication, &tables)
}

/// The same, and which tables the rows come from.
///
/// # Errors
/// As [`watch`].
pub async fn relations(
    client: &impl GenericClient,
    subscription: &Subscription,
) -> Result<OutboxRelations> {
    const OTHERS: &str = "
        SELECT (CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn()
                     ELSE pg_catalog.pg_current_wal_insert_lsn() END)::text,
               ARRAY(SELECT t.relid FROM pg_catalog.pg_publication p
                     CROSS JOIN LATERAL pg_catalog.pg_get_publication_tables(p.pubname::text) t WHERE p.pubname = $1)";
    // The position first: what is committed between the two is then looked at again, and not taken for known.
    let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&subscription.publication, Type::TEXT)];
    let rows = query_catalogue(client, OTHERS, &parameters).await;
    let rows = rows.map_err(|error| sql_error("read the publication's tables", error))?;
    let row = rows.first();
    let row = row.ok_or_else(|| Error::bug("a SELECT without FROM has given no row"))?;
    let read_at: &str = get(row, 0)?;
    let read_at = read_at
        .parse()
        .map_err(|_| Error::bug("a log position is not of the form X/X"))?;
    let (publication, tables) = read(client, subscription).await?;
    check(subscription, publication, &tables)?;
    let mut relations = OutboxRelations {
        members: Vec::new(),
        roots: tables.iter().flatten().map(|table| table.oid).collect(),
        columns: Vec::new(),
        others: get(row, 1)?,
        read_at,
    };
    for (place, table) in (0..).zip(&tables) {
        let members = table.iter().flat_map(|table| &table.members);
        relations.members.extend(members.map(|oid| (*oid, place)));
    }
    for table in tables {
        let mut columns = table.map_or_else(Vec::new, |table| table.sent);
        for column in &mut columns {
            column.is_read = subscription.columns.contains(&column.name);
        }
        relations.columns.push(columns);
    }
    relations
        .others
        .retain(|oid| !relations.members.iter().any(|(member, _)| member == oid));
    relations.others.sort_unstable();
    Ok(relations)
}

/// A text that changes with every change of what keeps rows out of the stream: the publication, and the definitions of the outbox tables and
/// their partitions. It never comes back to an earlier value. `None` where there is no publication.
///
/// A change of the publication's options is a new version of its row. Each table or schema in it, with filter and columns, is a row of its
/// own, which has an OID and depends on the publication; a change of it is a new row. (`pg_publication_namespace` does not exist before
/// Postgres 15, the dependencies do.) `SET UNLOGGED` and `SET LOGGED` give a table a new file, `SET SCHEMA` makes a new version of its dependency
/// on the schema, `ATTACH PARTITION` a new row in `pg_inherits`. (The version of its row in `pg_class` would also tell of each GRANT.)
///
/// # Errors
/// Temporary when the server is away.
pub async fn version(
    client: &impl GenericClient,
    publication: &str,
    tables: &[TableName],
) -> Result<Option<String>> {
    const SQL: &str = "
        WITH RECURSIVE family AS (
            SELECT c.oid, ''::text AS attached FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS w (schema, name)
            JOIN pg_catalog.pg_namespace n ON n.nspname = w.schema
            JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
            UNION
            SELECT i.inhrelid, i.xmin::text FROM family f JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid
        ), tables AS (
            SELECT pg_catalog.string_agg(f.oid::text || '.' || f.attached || '.' || c.relfilenode::text || '.' || d.xmin::text, ','
                                         ORDER BY f.oid, f.attached) AS all
            FROM family f JOIN pg_catalog.pg_class c ON c.oid = f.oid
            JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = f.oid AND d.objsubid = 0
                AND d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
        ), members AS (
            SELECT p.oid, p.xmin, pg_catalog.string_agg(d.classid::text || '.' || d.objid::text, ',' ORDER BY d.classid, d.objid) AS all
            FROM pg_catalog.pg_publication p
            LEFT JOIN pg_catalog.pg_depend d ON d.refclassid = 'pg_catalog.pg_publication'::pg_catalog.regclass AND d.refobjid = p.oid
            WHERE p.pubname = $1 GROUP BY p.oid, p.xmin)
        SELECT m.oid::text || ':' || m.xmin::text || ':' || pg_catalog.hashtextextended(coalesce(m.all, ''), 0)::text
               || ':' || pg_catalog.hashtextextended(coalesce(t.all, ''), 0)::text
        FROM members m CROSS JOIN tables t";
    let (schemas, names) = names_of(tables);
    let parameters: [(&(dyn ToSql + Sync), Type); 3] = [
        (&publication, Type::TEXT),
        (&schemas, Type::TEXT_ARRAY),
        (&names, Type::TEXT_ARRAY),
    ];
    let rows = client.query_typed(SQL, &parameters).await;
    let rows = rows.map_err(|error| sql_error("read the version of the publication", error))?;
    rows.first().map(|row| get(row, 0)).transpose()
}

/// Schemas and names of these tables.
fn names_of(tables: &[TableName]) -> (Vec<&str>, Vec<&str>) {
    tables
        .iter()
        .map(|t| (t.schema.as_str(), t.name.as_str()))
        .unzip()
}

/// The publication's options; `None` where there is no publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Options {
    inserts: bool,
    via_root: bool,
}

/// An outbox table that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    oid: u32,
    /// `pg_class.relkind` and `relpersistence`.
    kind: String,
    persistence: String,
    is_published: bool,
    is_filtered: bool,
    /// Columns that are read and that the publication's column list leaves out.
    left_out: Vec<String>,
    /// Columns that are read, generated, and not published.
    generated: Vec<String>,
    members: Vec<u32>,
    /// What is sent, whether or not it is read.
    sent: Vec<SentColumn>,
    /// Partitions and children whose rows the stream cannot bring.
    unfit: Vec<Member>,
    /// Published partitioned tables that this one is a partition of.
    ancestors: Vec<TableName>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    name: TableName,
    persistence: String,
    is_partition: bool,
    is_table: bool,
}

/// SQL: which of a table's columns `a` the publication sends, as `t` says it.
const IS_SENT: &str = "CASE WHEN t.attrs IS NULL THEN a.attgenerated = '' ELSE t.attrs @> pg_catalog.to_jsonb(a.attnum) END";

/// First a row for each outbox table; then one for each of its partitions and children that cannot be streamed, and for each
/// ancestor that stands in its place. Columns that came with Postgres 15 are read through `to_jsonb`, which has them or has not.
fn facts() -> String {
    let name = name_bytes("a.attname");
    format!(
        "
    WITH RECURSIVE publication AS (
        SELECT p.pubname, p.pubinsert, p.pubviaroot FROM pg_catalog.pg_publication p WHERE p.pubname = $1
    ), published AS MATERIALIZED (
        SELECT t.relid, pg_catalog.to_jsonb(t) ->> 'qual' IS NOT NULL AS filtered,
               NULLIF(pg_catalog.to_jsonb(t) -> 'attrs', 'null') AS attrs
        FROM publication p CROSS JOIN LATERAL pg_catalog.pg_get_publication_tables(p.pubname::text) t
    ), outbox AS (
        SELECT w.place, c.oid, c.relkind::text AS kind, c.relpersistence::text AS persistence, c.relispartition
        FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) WITH ORDINALITY AS w (schema, name, place)
        LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = w.schema
        LEFT JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.name
    ), family AS (
        SELECT o.place, o.oid FROM outbox o WHERE o.oid IS NOT NULL
        UNION
        SELECT f.place, i.inhrelid FROM family f
        JOIN pg_catalog.pg_inherits i ON i.inhparent = f.oid AND NOT i.inhdetachpending
    ), attribute AS MATERIALIZED (
        SELECT o.place, a.attname, {name} AS bytes, a.attnum, a.attgenerated <> '' AS generated, {IS_SENT} AS sent
        FROM outbox o
        JOIN pg_catalog.pg_attribute a ON a.attrelid = o.oid AND a.attnum > 0 AND NOT a.attisdropped
        JOIN published t ON t.relid = o.oid
    ), unread AS (
        SELECT a.place, a.attname::text AS name, a.generated FROM attribute a WHERE a.attname = ANY ($4) AND NOT a.sent
    )
    SELECT o.place::int8, 'outbox', coalesce(o.kind, ''), coalesce(o.persistence, ''), p.pubinsert, p.pubviaroot,
           t.relid IS NOT NULL, coalesce(t.filtered, false),
           ARRAY(SELECT u.name FROM unread u WHERE u.place = o.place AND NOT u.generated ORDER BY 1),
           ARRAY(SELECT u.name FROM unread u WHERE u.place = o.place AND u.generated ORDER BY 1),
           ARRAY(SELECT f.oid FROM family f WHERE f.place = o.place), '', '', false, o.oid,
           ARRAY(SELECT a.bytes FROM attribute a WHERE a.place = o.place AND a.sent ORDER BY a.attnum),
           ARRAY(SELECT a.attnum FROM attribute a WHERE a.place = o.place AND a.sent ORDER BY a.attnum)
    FROM outbox o LEFT JOIN publication p ON true LEFT JOIN published t ON t.relid = o.oid
    UNION ALL
    SELECT o.place, 'member', c.relkind::text, c.relpersistence::text, NULL, NULL, false, false, NULL, NULL, NULL,
           n.nspname::text, c.relname::text, c.relispartition, c.oid, NULL, NULL
    FROM outbox o JOIN family f ON f.place = o.place AND f.oid <> o.oid
    JOIN pg_catalog.pg_class c ON c.oid = f.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT c.relispartition AND c.relpersistence <> 't' OR c.relkind NOT IN ('r', 'p')
       OR c.relkind = 'r' AND c.relpersistence = 'u'
    UNION ALL
    SELECT o.place, 'ancestor', '', '', NULL, NULL, false, false, NULL, NULL, NULL, n.nspname::text, c.relname::text, false, c.oid, NULL, NULL
    FROM outbox o CROSS JOIN LATERAL pg_catalog.pg_partition_ancestors(o.oid) a (relid)
    JOIN published t ON t.relid = a.relid
    JOIN pg_catalog.pg_class c ON c.oid = a.relid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE o.relispartition AND a.relid <> o.oid
    ORDER BY 1, 12, 13"
    )
}

/// The publication's options, and each outbox table; `None` for what does not exist.
async fn read(
    client: &impl GenericClient,
    subscription: &Subscription,
) -> Result<(Option<Options>, Vec<Option<Table>>)> {
    let (schemas, names) = names_of(&subscription.tables);
    let parameters: [(&(dyn ToSql + Sync), Type); 4] = [
        (&subscription.publication, Type::TEXT),
        (&schemas, Type::TEXT_ARRAY),
        (&names, Type::TEXT_ARRAY),
        (&subscription.columns, Type::TEXT_ARRAY),
    ];
    let rows = query_catalogue(client, &facts(), &parameters).await;
    let rows = rows.map_err(|error| sql_error("look at the publication", error))?;
    let mut options = None;
    let mut tables = vec![None; subscription.tables.len()];
    let found = rows.iter().filter(|row| row.get::<_, &str>(1) == "outbox");
    for row in found {
        if let (Some(inserts), Some(via_root)) = (get(row, 4)?, get(row, 5)?) {
            options = Some(Options { inserts, via_root });
        }
        let kind: String = get(row, 2)?;
        if kind.is_empty() {
            continue;
        }
        *slot(&mut tables, row)? = Some(Table {
            oid: get(row, 14)?,
            kind,
            persistence: get(row, 3)?,
            is_published: get(row, 6)?,
            is_filtered: get(row, 7)?,
            left_out: get(row, 8)?,
            generated: get(row, 9)?,
            members: get(row, 10)?,
            sent: sent(row)?,
            ..Table::default()
        });
    }
    for row in &rows {
        let what: &str = get(row, 1)?;
        let Some(table) = slot(&mut tables, row)?.as_mut() else {
            continue;
        };
        let name = TableName::new(get::<String>(row, 11)?, get::<String>(row, 12)?);
        match what {
            "member" => table.unfit.push(Member {
                name,
                persistence: get(row, 3)?,
                is_partition: get(row, 13)?,
                is_table: matches!(get(row, 2)?, "r" | "p"),
            }),
            "ancestor" => table.ancestors.push(name),
            _ => {}
        }
    }
    Ok((options, tables))
}

/// What the row of an outbox table says of its columns.
fn sent(row: &Row) -> Result<Vec<SentColumn>> {
    let (names, numbers): (Vec<&[u8]>, Vec<i16>) = (get(row, 15)?, get(row, 16)?);
    let columns = names.into_iter().zip(numbers);
    let columns = columns.map(|(name, number)| SentColumn {
        // As the log's description of the table is read.
        name: String::from_utf8_lossy(name).into_owned(),
        number: u16::try_from(number).unwrap_or_default(),
        is_read: false,
    });
    Ok(columns.collect())
}

/// Asks again, at most twice, when the publication is dropped while the statement runs: the statement's snapshot still shows it, and
/// `pg_get_publication_tables` looks it up anew and raises 42704 (`undefined_object`). The next snapshot shows what is true now.
async fn query_catalogue(
    client: &impl GenericClient,
    statement: &str,
    parameters: &[(&(dyn ToSql + Sync), Type)],
) -> std::result::Result<Vec<Row>, tokio_postgres::Error> {
    for _ in 0..2 {
        match client.query_typed(statement, parameters).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) => {}
            answer => return answer,
        }
    }
    client.query_typed(statement, parameters).await
}

/// The table that a row of the answer is about.
fn slot<'a, T>(tables: &'a mut [T], row: &Row) -> Result<&'a mut T> {
    let place: i64 = get(row, 0)?;
    let index = usize::try_from(place - 1).ok();
    index
        .and_then(|index| tables.get_mut(index))
        .ok_or_else(|| Error::bug("the catalogue's answer is about a table that was not asked for"))
}

fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, column: usize) -> Result<T> {
    row.try_get(column)
        .map_err(|error| sql_error("read a catalogue row", error))
}

fn check(
    subscription: &Subscription,
    options: Option<Options>,
    tables: &[Option<Table>],
) -> Result<()> {
    for (name, table) in subscription.tables.iter().zip(tables) {
        let Some(table) = table else {
            return Err(
                Error::refused(format!("table {name} does not exist in this database")).hint(
                    "walpost init; or name an existing table in WALPOST_OUTBOX_TABLE; if it was renamed: \
                     ALTER TABLE … RENAME TO the name that it had",
                ),
            );
        };
        check_kind(name, table)?;
    }
    let publication = &subscription.publication;
    let quoted = quote_ident(publication);
    let Some(options) = options else {
        let names: Vec<String> = subscription
            .tables
            .iter()
            .map(ToString::to_string)
            .collect();
        return Err(Error::refused(format!(
            "publication {publication} does not exist in this database"
        ))
        .hint(format!(
            "walpost init; or: CREATE PUBLICATION {quoted} FOR TABLE {} WITH (publish = 'insert', publish_via_partition_root = true);",
            names.join(", ")
        )));
    };
    if !options.inserts {
        return Err(Error::refused(format!(
            "publication {publication} does not publish inserts"
        ))
        .hint(format!(
            "ALTER PUBLICATION {quoted} SET (publish = 'insert');"
        )));
    }
    for (name, table) in subscription.tables.iter().zip(tables) {
        if let Some(table) = table {
            check_published(publication, options, name, table)?;
            check_columns(publication, name, table)?;
            table
                .unfit
                .first()
                .map_or(Ok(()), |member| Err(unfit(name, member)))?;
        }
    }
    Ok(())
}

fn check_kind(name: &TableName, table: &Table) -> Result<()> {
    if table.persistence != "p" {
        return Err(Error::refused(format!(
            "table {name} is temporary or unlogged: its rows are not in the write-ahead log"
        ))
        .hint(format!("ALTER TABLE {name} SET LOGGED;")));
    }
    if !matches!(table.kind.as_str(), "r" | "p") {
        return Err(Error::refused(format!("{name} is not a table"))
            .hint("name the table itself in WALPOST_OUTBOX_TABLE"));
    }
    Ok(())
}

fn check_published(
    publication: &str,
    options: Options,
    name: &TableName,
    table: &Table,
) -> Result<()> {
    let quoted = quote_ident(publication);
    if table.kind == "p" && !options.via_root {
        return Err(Error::refused(format!(
            "publication {publication} publishes the partitions of {name} under their own names"
        ))
        .hint(format!(
            "ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true);"
        )));
    }
    if let Some(ancestor) = table.ancestors.first().filter(|_| !table.is_published) {
        return Err(Error::refused(format!(
            "table {name} is a partition of {ancestor}, and publication {publication} publishes its rows under that name"
        ))
        .hint(format!(
            "name {ancestor} in WALPOST_OUTBOX_TABLE; or, where all others that read the publication can do without: \
             ALTER PUBLICATION {quoted} SET (publish_via_partition_root = false);"
        )));
    }
    if !table.is_published {
        return Err(
            Error::refused(format!("publication {publication} lacks table {name}"))
                .hint(format!("ALTER PUBLICATION {quoted} ADD TABLE {name};")),
        );
    }
    if table.is_filtered {
        return Err(Error::refused(format!(
            "publication {publication} has a row filter on table {name}: rows that it leaves out would never be published"
        ))
        .hint(added_anew(&quoted, name)));
    }
    Ok(())
}

/// The statement that takes a table's row filter and column list away.
fn added_anew(publication: &str, name: &TableName) -> String {
    format!(
        "BEGIN; ALTER PUBLICATION {publication} DROP TABLE {name}; ALTER PUBLICATION {publication} ADD TABLE {name}; COMMIT;"
    )
}

fn check_columns(publication: &str, name: &TableName, table: &Table) -> Result<()> {
    let quoted = quote_ident(publication);
    if !table.left_out.is_empty() {
        let lacking = table.left_out.join(", ");
        return Err(Error::refused(format!(
            "the column list of publication {publication} leaves out columns of table {name} that walpost reads: {lacking}"
        ))
        .hint(format!(
            "{} or add them to the list; or set WALPOST_COLUMN_… of what is not to be read to nothing",
            added_anew(&quoted, name)
        )));
    }
    let Some(column) = table.generated.first() else {
        return Ok(());
    };
    Err(Error::refused(format!(
        "column {column} of table {name} is generated, and publication {publication} does not send it: walpost reads it, and no row \
         would have it"
    ))
    .hint(format!(
        "Postgres 18 and later can send it, where it is stored: ALTER PUBLICATION {quoted} SET (publish_generated_columns = stored); \
         else make it a plain column, which the application or a BEFORE INSERT trigger sets: ALTER TABLE {name} ALTER COLUMN {} \
         DROP EXPRESSION; or name another in WALPOST_COLUMN_… or WALPOST_TOPIC",
        quote_ident(column)
    )))
}

fn unfit(name: &TableName, member: &Member) -> Error {
    let child = &member.name;
    if !member.is_partition {
        return Error::refused(format!(
            "table {child} inherits from {name}: a query on {name} shows its rows, and the stream does not bring them under that name"
        ))
        .hint(format!(
            "ALTER TABLE {child} NO INHERIT {name}; and, if its rows are events, add it to WALPOST_OUTBOX_TABLE, then: walpost init"
        ));
    }
    if !member.is_table {
        return Error::refused(format!(
            "partition {child} of {name} is a foreign table: its rows are not in the write-ahead log"
        ))
        .hint(format!("ALTER TABLE {name} DETACH PARTITION {child};"));
    }
    let kind = if member.persistence == "u" {
        "unlogged"
    } else {
        "temporary"
    };
    Error::refused(format!(
        "partition {child} of {name} is {kind}: its rows are not in the write-ahead log"
    ))
    .hint(format!("ALTER TABLE {child} SET LOGGED;"))
}

#[cfg(test)]
#[path = "published_tests.rs"]
#[allow(clippy::unwrap_used)]
mod tests;
