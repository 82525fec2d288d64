//! What the database says of an outbox table beside its columns: row-level security, who may update it, the index of `txid`.

use tokio_postgres::Client;

use super::Finding;
use crate::cli::ddl::own_table;
use crate::config::Config;
use crate::connector::subscription;
use crate::postgres::{TableName, quote_ident, quote_literal, sql_error};
use crate::scanner::outbox::OutboxTable;
use crate::{Error, Result};

/// Findings about one table; nothing where all is well.
pub(super) async fn check(client: &Client, table: &OutboxTable, config: &Config) -> Vec<Finding> {
    match Facts::read(client, &table.name).await {
        Ok(facts) => [
            facts.row_security(&table.name),
            facts.updates(table, config),
            facts.txid_index(table),
        ]
        .into_iter()
        .flatten()
        .collect(),
        Err(error) => vec![Finding::fail("table", &error)],
    }
}

#[allow(clippy::struct_excessive_bools)] // Each is a fact of the catalogue.
struct Facts {
    role: String,
    /// Whether policies apply to the role.
    has_row_security: bool,
    /// Whether updates are refused by the trigger of `sql/03_outbox.sql`.
    refuses_updates: bool,
    /// Whether the trigger's function is there, for other tables to use.
    has_refuse_update: bool,
    /// Roles, beside the owner's and superusers, that may update more than `sent_at`.
    updaters: Vec<String>,
    has_txid_index: bool,
}

impl Facts {
    async fn read(client: &Client, name: &TableName) -> Result<Self> {
        const SQL: &str = "
            SELECT current_user::text, pg_catalog.row_security_active(c.oid),
                   EXISTS (SELECT FROM pg_catalog.pg_trigger t
                           WHERE t.tgrelid = c.oid AND t.tgname = 'walpost_refuse_update' AND t.tgenabled <> 'D'),
                   ARRAY(SELECT DISTINCT coalesce(r.rolname::text, 'PUBLIC')
                         FROM (SELECT x.grantee FROM pg_catalog.aclexplode(c.relacl) x WHERE x.privilege_type = 'UPDATE'
                               UNION
                               SELECT x.grantee FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) x
                               WHERE a.attrelid = c.oid AND a.attname <> 'sent_at' AND x.privilege_type = 'UPDATE') g
                         LEFT JOIN pg_catalog.pg_roles r ON r.oid = g.grantee
                         WHERE g.grantee <> c.relowner AND r.rolsuper IS NOT TRUE ORDER BY 1),
                   EXISTS (SELECT FROM pg_catalog.pg_index i
                           WHERE i.indrelid = c.oid AND i.indisvalid AND i.indpred IS NULL
                             AND i.indkey[0] = 0
                             AND pg_catalog.pg_get_expr(i.indexprs, i.indrelid) LIKE '((txid)::text)::bigint%'),
                   EXISTS (SELECT FROM pg_catalog.pg_proc f JOIN pg_catalog.pg_namespace s ON s.oid = f.pronamespace
                           WHERE s.nspname = 'walpost' AND f.proname = 'refuse_update' AND f.pronargs = 0)
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = $1 AND c.relname = $2";
        let row = client.query_one(SQL, &[&name.schema, &name.name]).await;
        let row = row.map_err(|error| sql_error(&format!("look at table {name}"), error))?;
        Ok(Self {
            role: row.get(0),
            has_row_security: row.get(1),
            refuses_updates: row.get(2),
            updaters: row.get(3),
            has_txid_index: row.get(4),
            has_refuse_update: row.get(5),
        })
    }

    /// Reading with policies would leave rows out; walpost's sessions have `row_security = off`, so it is an error instead.
    fn row_security(&self, name: &TableName) -> Option<Finding> {
        self.has_row_security.then(|| {
            let role = &self.role;
            let error = Error::refused(format!(
                "row-level security of table {name} applies to role {role}: scans and comparisons cannot read it"
            ));
            let role = quote_ident(role);
            let mend = format!("ALTER ROLE {role} BYPASSRLS; or ALTER TABLE {name} DISABLE ROW LEVEL SECURITY;");
            Finding::fail("row_security", &error.hint(mend))
        })
    }

    fn updates(&self, table: &OutboxTable, config: &Config) -> Option<Finding> {
        const CHECK: &str = "updates";
        let name = &table.name;
        if self.refuses_updates {
            return None;
        }
        if *name == own_table() {
            return Some(Finding::warn(
                CHECK,
                format!(
                    "{name} does not refuse updates: they send nothing, and the row shows as sent"
                ),
                "walpost init, as the table's owner",
            ));
        }
        let text = format!(
            "{name} does not refuse updates: only inserts are events, an update (also by ON CONFLICT DO UPDATE) sends nothing"
        );
        Some(match self.updaters.first() {
            Some(role) => Finding::warn(
                CHECK,
                format!("{text}; role {role} may update it"),
                format!("REVOKE UPDATE ON {name} FROM {};", grantee(role)),
            ),
            None if self.has_refuse_update => Finding::warn(CHECK, text, trigger(table, config)),
            None => Finding::warn(
                CHECK,
                text,
                "give it a BEFORE UPDATE trigger that raises an error",
            ),
        })
    }

    fn txid_index(&self, table: &OutboxTable) -> Option<Finding> {
        if !table.has_txid || self.has_txid_index {
            return None;
        }
        let name = &table.name;
        let concurrently = if table.partitioned {
            ""
        } else {
            "CONCURRENTLY "
        };
        Some(Finding::warn(
            "txid_index",
            format!(
                "{name} has no index on txid: each scan and each comparison with the stream reads all of it"
            ),
            format!("CREATE INDEX {concurrently}ON {name} USING brin ((txid::text::bigint));"),
        ))
    }
}

fn grantee(role: &str) -> String {
    match role {
        "PUBLIC" => role.to_owned(),
        _ => quote_ident(role),
    }
}

/// What refuses changes of the columns that are read.
fn trigger(table: &OutboxTable, config: &Config) -> String {
    let read = subscription(config).columns;
    let columns = table.columns.iter().map(|column| &column.name);
    let columns: Vec<String> = columns
        .filter(|name| read.contains(name))
        .map(|name| quote_literal(name).trim().to_owned())
        .collect();
    let unless_marked = if table.has_sent_at {
        " WHEN (old.sent_at IS NOT DISTINCT FROM new.sent_at)"
    } else {
        ""
    };
    format!(
        "CREATE TRIGGER walpost_refuse_update AFTER UPDATE ON {} FOR EACH ROW{unless_marked} EXECUTE FUNCTION walpost.refuse_update({});",
        table.name,
        columns.join(", ")
    )
}
