//! Rows of a table that SQL reads, in the form in which the stream brings them.
//!
//! Input: a SQL session and a table's name. Output: the [`Relation`] that pgoutput would send for the table, the list of
//! columns for a SELECT, and each row as `TupleData`. So one extractor, with one decoder ([`crate::outbox`]), reads the rows
//! of the stream and those of the table.
//!
//! # The same bytes as the stream's
//!
//! An event is a function of each column's type, the value's format (text or binary) and the value's bytes.
//!
//! * **Type.** A domain counts as the type below it, through any number of domains, if that is one of
//!   [`types`]; else as itself. That is what the stream makes of pgoutput's `Type` message, which names the type that
//!   `getBaseType` gives. Both come from [`types::read_as`].
//! * **Format.** Binary where [`binary_safe`] says that the type can be read so, otherwise text. It is asked for one column
//!   at a time, where the stream asks for all columns at once (pgoutput knows no other way). The decoder gives the same event
//!   for both formats of a type that is `binary_safe`.
//! * **Bytes.** Binary comes from the type's send function, text from its output function (`format('%s', …)` calls it; a
//!   cast to text may be another function: `inet::text` adds the netmask, `character(n)::text` removes blanks). pgoutput
//!   calls the same two functions. What they print depends on settings of the session (`DateStyle`, `IntervalStyle`,
//!   `TimeZone`, `bytea_output`, `extra_float_digits`, `lc_monetary`, `search_path`), and each session of walpost's sets them itself.
//!
//! `tests/decoder.rs` reads each base type of the server, and domains, arrays, enums and composites, through gap scan, poll
//! mode, stragglers and stream, and compares the messages.
//!
//! # Text that is no UTF-8
//!
//! Postgres converts text to UTF-8 for its client. Not so in a database of the encoding `SQL_ASCII`, which takes any bytes as
//! text: there it refuses to send text that is no UTF-8. So there text is asked for as `bytea`, and the stream's session asks for
//! `SQL_ASCII` as well. The decoder then decides: a payload is published as it is, a row whose key or property is no
//! UTF-8 becomes a straggler.
//!
//! A database of another encoding may hold what UTF-8 has no character for (byte 0x81 in `WIN1252`). Then the server refuses to send
//! the row. A scan takes such a row by itself, its text as the database holds it ([`TextAs::Held`]): it becomes a straggler, and
//! the scan goes on. The stream cannot do that: see [`crate::pipe::Pipe::locate`].

use std::error::Error as StdError;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, Type};
use tokio_postgres::{Client, Row};

use crate::outbox::{Extractor, binary_safe};
use crate::pgoutput::{HELD, Relation, RelationColumn, Tuple, types};
use crate::postgres::{TableName, name_bytes, quote_ident, sql_error};
use crate::{Error, Result};

/// How SQL is asked for a column, and what its value is in `TupleData`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Not asked for: nobody reads it. NULL.
    Unread,
    /// As it is: binary.
    Binary,
    /// The same of a type whose value is text.
    Characters,
    /// Through its output function: text.
    Text,
    /// The same as `bytea`, so that the server sends any bytes: text.
    AnyBytes,
}

/// How the rows of one table are read.
#[derive(Clone, Debug)]
pub(super) struct RowReader {
    /// Name, for SQL, and form of each column.
    columns: Vec<(String, Form)>,
    /// The server converts text for us, which may fail.
    converts: bool,
}

/// What is asked for of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextAs {
    /// UTF-8.
    Utf8,
    /// The bytes that the database holds ([`Column::Held`](crate::pgoutput::Column::Held)), which can always be had.
    Held,
}

impl RowReader {
    /// Looks at a table; `None` when it does not exist.
    pub(super) async fn describe(
        client: &Client,
        name: &TableName,
    ) -> Result<Option<(Relation, Self)>> {
        let sql = format!(
            "SELECT c.oid, a.atttypid, a.atttypmod, pg_catalog.getdatabaseencoding()::pg_catalog.text, {},
                   (WITH RECURSIVE made_of (oid, typtype, typbasetype) AS (
                        SELECT t.oid, t.typtype, t.typbasetype FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid
                        UNION ALL
                        SELECT t.oid, t.typtype, t.typbasetype
                        FROM made_of m JOIN pg_catalog.pg_type t ON t.oid = m.typbasetype WHERE m.typtype = 'd'
                    )
                    SELECT m.oid FROM made_of m WHERE m.typtype <> 'd')
            FROM pg_catalog.pg_attribute a
            JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped
            ORDER BY a.attnum",
            name_bytes("a.attname")
        );
        let failed = |error| sql_error("look at the outbox table", error);
        let rows = client.query(&sql, &[&name.schema, &name.name]).await;
        let rows = rows.map_err(failed)?;
        let Some(first) = rows.first() else {
            return Ok(None);
        };
        let mut relation = Relation {
            id: first.try_get(0).map_err(failed)?,
            namespace: name.schema.clone(),
            name: name.name.clone(),
            replica_identity: b'n',
            columns: Vec::with_capacity(rows.len()),
        };
        let encoding: &str = first.try_get(3).map_err(failed)?;
        let takes_any_bytes = encoding == "SQL_ASCII";
        let mut columns = Vec::with_capacity(rows.len());
        for row in &rows {
            let (own, base) = (row.try_get(1), row.try_get(5));
            let type_oid = types::read_as(own.map_err(failed)?, base.map_err(failed)?);
            let name: &[u8] = row.try_get(4).map_err(failed)?;
            let form = if std::str::from_utf8(name).is_ok() {
                Form::of(type_oid, takes_any_bytes)
            } else {
                // No setting can name it.
                Form::Unread
            };
            let name = String::from_utf8_lossy(name).into_owned();
            columns.push((quote_ident(&name), form));
            relation.columns.push(RelationColumn {
                flags: 0,
                name,
                type_oid,
                type_modifier: row.try_get(2).map_err(failed)?,
            });
        }
        let reader = Self {
            columns,
            converts: !takes_any_bytes && encoding != "UTF8",
        };
        Ok(Some((relation, reader)))
    }

    /// Leaves out the columns that `extractor` does not read: they cost time, and one that cannot be read must not stop the
    /// others.
    pub(super) fn read_only_for(&mut self, extractor: &Extractor) {
        self.read_only(|index| extractor.reads(index));
    }

    /// The same for the columns in other places than these.
    pub(super) fn read_only(&mut self, is_read: impl Fn(usize) -> bool) {
        for (index, (_, form)) in self.columns.iter_mut().enumerate() {
            if !is_read(index) {
                *form = Form::Unread;
            }
        }
    }

    /// Whether the server converts text for us: then it may refuse to send a row.
    pub(super) fn converts(&self) -> bool {
        self.converts
    }

    /// SQL: the columns for a SELECT from the table under the name `alias`. Empty if none is read.
    pub(super) fn select_list(&self, alias: &str, text: TextAs) -> String {
        let columns = self.columns.iter();
        let columns: Vec<String> = columns
            .filter_map(|(name, form)| {
                let column = format!("{alias}.{name}");
                match form {
                    Form::Unread => None,
                    Form::Characters | Form::Text if text == TextAs::Held => Some(held(&column)),
                    Form::Binary | Form::Characters => Some(column),
                    Form::Text => Some(printed(&column)),
                    Form::AnyBytes => Some(format!(
                        "pg_catalog.convert_to({}, 'SQL_ASCII')",
                        printed(&column)
                    )),
                }
            })
            .collect();
        columns.join(", ")
    }

    /// `TupleData` of a row whose columns are those of [`Self::select_list`] behind `skip` others.
    pub(super) fn encode(&self, row: &Row, skip: usize, text: TextAs) -> Result<Vec<u8>> {
        let count = u16::try_from(self.columns.len()).unwrap_or(u16::MAX);
        let mut data = Vec::with_capacity(row.raw_size_bytes() + 2 + self.columns.len());
        data.extend(count.to_be_bytes());
        let mut place = skip;
        for (_, form) in &self.columns {
            let kind = match form {
                Form::Unread => {
                    data.push(b'n');
                    continue;
                }
                Form::Characters | Form::Text if text == TextAs::Held => HELD,
                Form::Binary | Form::Characters => b'b',
                Form::Text | Form::AnyBytes => b't',
            };
            let value: Option<Raw<'_>> = row
                .try_get(place)
                .map_err(|error| Error::bug("a row has too few columns").caused_by(error))?;
            place += 1;
            match value {
                None => data.push(b'n'),
                Some(Raw(bytes)) => {
                    data.push(kind);
                    // Postgres' own limit for a message is 1 GB.
                    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    data.extend(length.to_be_bytes());
                    data.extend(bytes);
                }
            }
        }
        Ok(data)
    }
}

impl Form {
    fn of(type_oid: u32, takes_any_bytes: bool) -> Self {
        match (types::is_characters(type_oid), binary_safe(type_oid)) {
            (true, _) | (_, false) if takes_any_bytes => Self::AnyBytes,
            (true, _) => Self::Characters,
            (_, true) => Self::Binary,
            (_, false) => Self::Text,
        }
    }
}

/// SQL: what the output function of the value's type prints. (`IS NULL` would be true of a composite value whose fields
/// are all NULL.)
pub(crate) fn printed(value: &str) -> String {
    format!(
        "CASE WHEN pg_catalog.num_nonnulls({value}) = 1 THEN pg_catalog.format('%s', {value}) END"
    )
}

/// SQL: the same as the bytes that the database holds, in its own encoding: they are never refused.
pub(super) fn held(value: &str) -> String {
    format!(
        "pg_catalog.convert_to({}, pg_catalog.getdatabaseencoding())",
        printed(value)
    )
}

/// Whether the server refuses to send a row because of its text: `character_not_in_repertoire`, `untranslatable_character`.
pub(super) fn is_unconvertible(error: &tokio_postgres::Error) -> bool {
    let code = error.code().map(SqlState::code);
    matches!(code, Some("22021" | "22P05"))
}

/// What [`RowReader::encode`] made.
pub(super) fn decode(data: &[u8]) -> Result<Tuple<'_>> {
    Tuple::decode(data)
        .map_err(|error| Error::bug("a row read by SQL cannot be read").caused_by(error))
}

/// A value's bytes as they came, of any type.
pub(super) struct Raw<'a>(pub(super) &'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}
