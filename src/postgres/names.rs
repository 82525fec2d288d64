//! Names and literals as SQL and the replication grammar want them quoted, and `schema.table` as an operator writes it.
//!
//! Pure text. Input: settings and catalogue values. Output: text that is safe to paste into a statement.

use std::fmt;
use std::str::FromStr;

/// Longest name Postgres keeps, in bytes (`NAMEDATALEN - 1`); it cuts off the rest, so a longer one names nothing.
pub const MAX_NAME_BYTES: usize = 63;

/// Quotes an identifier: `my"table` becomes `"my""table"`.
pub fn quote_ident(name: &str) -> String {
    postgres_protocol::escape::escape_identifier(name)
}

/// Quotes a literal for SQL; with a backslash in it the result is an `E''` string, valid under every setting.
pub fn quote_literal(text: &str) -> String {
    postgres_protocol::escape::escape_literal(text)
}

/// Quotes a literal for a replication command, whose grammar knows `''` but neither `E''` nor backslashes
/// (`repl_scanner.l`).
pub(crate) fn quote_replication_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A table by schema and name, both exactly as the catalogue has them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    /// Schema, `public` when the text named none.
    pub schema: String,
    /// Table.
    pub name: String,
}

impl TableName {
    /// Names a table by its catalogue spelling.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            schema: schema.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for TableName {
    /// Quoted where it must be, so that it can stand in SQL: `walpost.outbox`, `"Shop"."Out box"`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (part, after) in [(&self.schema, "."), (&self.name, "")] {
            if is_plain(part) {
                write!(f, "{part}{after}")?;
            } else {
                write!(f, "{}{after}", quote_ident(part))?;
            }
        }
        Ok(())
    }
}

/// Words that are reserved in Postgres and short enough to be somebody's table; they need quotes to be a name.
const RESERVED: [&str; 24] = [
    "all", "analyse", "analyze", "and", "any", "array", "case", "check", "column", "default", "do",
    "end", "from", "grant", "group", "limit", "not", "offset", "order", "primary", "select",
    "table", "user", "where",
];

fn is_plain(name: &str) -> bool {
    let mut bytes = name.bytes();
    matches!(bytes.next(), Some(b'a'..=b'z' | b'_'))
        && bytes.all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
        && !RESERVED.contains(&name)
}

/// What [`TableName::from_str`] says of a text that names no table.
#[derive(Debug, PartialEq, Eq)]
pub struct ParseTableNameError(&'static str);

impl fmt::Display for ParseTableNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "not a table name: {} (expected schema.table, with \"double quotes\" around a name that is not all lower case)",
            self.0
        )
    }
}

impl std::error::Error for ParseTableNameError {}

impl FromStr for TableName {
    type Err = ParseTableNameError;

    /// Follows SQL: a bare name is folded to lower case, a quoted one is taken as it is, `""` inside stands for `"`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, rest) = take_name(text.trim())?;
        let Some(rest) = rest.strip_prefix('.') else {
            if rest.is_empty() {
                return Ok(Self::new("public", first));
            }
            return Err(ParseTableNameError(
                "something follows the closing quote or name",
            ));
        };
        let (second, rest) = take_name(rest)?;
        if rest.starts_with('.') {
            return Err(ParseTableNameError(
                "it has more than two parts; a table of another database cannot be read",
            ));
        }
        if !rest.is_empty() {
            return Err(ParseTableNameError(
                "something follows the closing quote or name",
            ));
        }
        Ok(Self::new(first, second))
    }
}

/// Takes one name off the front and gives it back with what follows.
fn take_name(text: &str) -> Result<(String, &str), ParseTableNameError> {
    let (name, rest) = match text.strip_prefix('"') {
        Some(quoted) => take_quoted(quoted)?,
        None => take_bare(text)?,
    };
    if name.is_empty() {
        return Err(ParseTableNameError("a name in it is empty"));
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(ParseTableNameError("a name in it is longer than 63 bytes"));
    }
    if name.contains('\0') {
        return Err(ParseTableNameError("a name in it has a zero byte"));
    }
    Ok((name, rest))
}

fn take_quoted(text: &str) -> Result<(String, &str), ParseTableNameError> {
    let mut name = String::new();
    let mut rest = text;
    loop {
        let (before, after) = rest
            .split_once('"')
            .ok_or(ParseTableNameError("a double quote is not closed"))?;
        name.push_str(before);
        let Some(more) = after.strip_prefix('"') else {
            return Ok((name, after));
        };
        name.push('"');
        rest = more;
    }
}

fn take_bare(text: &str) -> Result<(String, &str), ParseTableNameError> {
    let end = text.find('.').unwrap_or(text.len());
    let (bare, rest) = text.split_at(end);
    // As in Postgres, every character beyond ASCII is a letter.
    let allowed = |c: char| {
        c == '_' || c == '$' || c.is_ascii_alphanumeric() || (!c.is_ascii() && !c.is_whitespace())
    };
    if !bare.chars().all(allowed) {
        return Err(ParseTableNameError(
            "a name with other characters than letters, digits, _ and $ needs double quotes",
        ));
    }
    if bare.starts_with(|c: char| c.is_ascii_digit() || c == '$') {
        return Err(ParseTableNameError(
            "a name that starts with a digit or $ needs double quotes",
        ));
    }
    Ok((bare.to_ascii_lowercase(), rest))
}

/// SQL: a name as bytes that are UTF-8, unless the encoding is `SQL_ASCII` and the name is not.
pub fn name_bytes(name: &str) -> String {
    format!(
        "pg_catalog.convert_to({name}::pg_catalog.text, CASE pg_catalog.getdatabaseencoding() \
         WHEN 'SQL_ASCII' THEN 'SQL_ASCII' ELSE 'UTF8' END)"
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_table_name_as_sql_does() {
        for (text, schema, name, shown) in [
            ("walpost.outbox", "walpost", "outbox", "walpost.outbox"),
            ("OUTBOX", "public", "outbox", "public.outbox"),
            (" Shop.Outbox ", "shop", "outbox", "shop.outbox"),
            (
                r#""Shop"."Out.box""#,
                "Shop",
                "Out.box",
                r#""Shop"."Out.box""#,
            ),
            (r#"s."a""b""#, "s", "a\"b", r#"s."a""b""#),
            ("s.\"order\"", "s", "order", "s.\"order\""),
            ("größe.t$1", "größe", "t$1", "\"größe\".\"t$1\""),
        ] {
            let table: TableName = text.parse().unwrap();
            assert_eq!(table, TableName::new(schema, name), "{text}");
            assert_eq!(table.to_string(), shown);
            assert_eq!(table.to_string().parse(), Ok(table), "{text}");
        }
    }

    #[test]
    fn refuses_what_names_no_table() {
        let long = "x".repeat(64);
        for text in [
            "",
            ".",
            "a.",
            ".a",
            "a.b.c",
            "\"a",
            "\"a\"b",
            "a b",
            "1a",
            "a;b",
            "\"\"",
            "a.\"b\"x",
            long.as_str(),
        ] {
            assert!(text.parse::<TableName>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn quotes_for_each_grammar() {
        assert_eq!(quote_ident("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\b").trim(), "E'a\\\\b'");
        assert_eq!(quote_replication_literal("a\\'b"), "'a\\''b'");
    }
}
