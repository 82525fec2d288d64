//! Row-level security that would hide rows from walpost, found before anything is read.
//!
//! A table whose policies hide rows looks like one that has none, and every row would count as delivered. Each session has
//! `row_security = off` ([`super::session`]), so Postgres refuses such a query (42501) whenever it comes. Here the same is told at the start, with
//! the statements that mend it. `tests/sessions/row_security.rs` tries both.

use tokio_postgres::Client;

use super::names::{TableName, quote_ident};
use super::server_error::sql_error;
use crate::{Error, Result};

/// walpost's own tables.
const OWN: [&str; 5] = [
    "progress",
    "straggler",
    "after_publish",
    "left_undone",
    "discarded",
];

/// Refuses tables of which policies may hide rows from this role. (One that the role may not read at all is not its concern: streaming needs no
/// right to it.)
///
/// # Errors
/// Refused, with the statements for each.
pub async fn refuse_row_security(client: &Client, tables: &[TableName]) -> Result<()> {
    const SQL: &str = "
        SELECT n.nspname::text, c.relname::text, current_user::text, pg_has_role(c.relowner, 'USAGE')
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN unnest($1::text[], $2::text[]) AS t (schema, name) ON n.nspname = t.schema AND c.relname = t.name
        WHERE c.relrowsecurity AND row_security_active(c.oid) AND has_any_column_privilege(c.oid, 'SELECT')
        ORDER BY 1, 2";
    let own = OWN.map(|name| TableName::new("walpost", name));
    let all = || tables.iter().chain(&own);
    let schemas: Vec<&str> = all().map(|table| table.schema.as_str()).collect();
    let names: Vec<&str> = all().map(|table| table.name.as_str()).collect();
    let rows = client
        .query(SQL, &[&schemas, &names])
        .await
        .map_err(|error| sql_error("look for row-level security", error))?;
    let Some(first) = rows.first() else {
        return Ok(());
    };
    let role: &str = first.get(2);
    let mut hidden = Vec::new();
    let mut ways = vec![format!(
        "as a superuser: ALTER ROLE {} BYPASSRLS;",
        quote_ident(role)
    )];
    for row in &rows {
        let table = TableName::new(row.get::<_, &str>(0), row.get::<_, &str>(1)).to_string();
        ways.push(if row.get(3) {
            format!("or ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY;")
        } else {
            format!("or as the owner: ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;")
        });
        hidden.push(table);
    }
    Err(Error::refused(format!(
        "row-level security of {} may hide rows from role {role}: they would count as published",
        hidden.join(", ")
    ))
    .hint(ways.join(" ")))
}
