//! Which rights `init` needs for what is still missing, and the statement that gives each.
//!
//! Pure: from the catalogue to a list. All that is lacking is told at once, so that a DBA is asked once. What
//! this list cannot foresee is refused by Postgres itself (SQLSTATE 42501), and each step has its hint for that.

use super::catalog::{Catalog, ProgressTable, Server, StragglerTable, Table};
use crate::cli::ddl::own_table;
use crate::config::Mode;
use crate::postgres::quote_ident;
use crate::{Error, Result};

/// Something the role may not do, and the statement that changes that.
#[derive(Debug, PartialEq, Eq)]
struct Lack {
    right: String,
    cure: String,
}

/// Refuses when the role lacks a right for anything that has to be made or mended.
pub(super) fn check(
    server: &Server,
    catalog: &Catalog,
    mode: Mode,
    slot_missing: bool,
) -> Result<()> {
    let mut lacks: Vec<Lack> = Vec::new();
    for lack in all(server, catalog, mode, slot_missing) {
        if !lacks.contains(&lack) {
            lacks.push(lack);
        }
    }
    if lacks.is_empty() {
        return Ok(());
    }
    let rights: Vec<&str> = lacks.iter().map(|lack| lack.right.as_str()).collect();
    let cures: Vec<&str> = lacks.iter().map(|lack| lack.cure.as_str()).collect();
    Err(Error::refused(format!(
        "role {} lacks what init needs: {}",
        quote_ident(&server.role),
        rights.join(", ")
    ))
    .hint(format!(
        "run as a superuser: {} or apply what walpost sql prints as a role that may",
        cures.join(" ")
    )))
}

fn all(server: &Server, catalog: &Catalog, mode: Mode, slot_missing: bool) -> Vec<Lack> {
    let mut lacks = Vec::new();
    let own_missing = catalog
        .tables
        .iter()
        .any(|(name, table)| table.is_none() && *name == own_table());
    let own_can_emit = catalog.tables.iter().any(|(name, table)| {
        *name == own_table() && table.as_ref().is_some_and(Table::has_emit_columns)
    });
    if own_missing
        || catalog.progress == ProgressTable::Missing
        || catalog.straggler == StragglerTable::Missing
        || !catalog.has_left_undone
        || !catalog.has_emit_transient
        || (own_can_emit && !catalog.has_emit)
    {
        if !catalog.has_schema {
            lacks.extend(create_in_database(server));
        } else if !catalog.may_create_in_schema {
            lacks.push(create_in_schema(server));
        }
    }
    for (name, table) in &catalog.tables {
        if let Some(table) = table
            && !table.schema_usable
        {
            lacks.push(Lack {
                right: format!("USAGE on schema {}", quote_ident(&name.schema)),
                cure: grant(
                    server,
                    &format!("USAGE ON SCHEMA {}", quote_ident(&name.schema)),
                ),
            });
        }
    }
    if mode == Mode::Poll {
        return lacks;
    }
    lacks.extend(publish(server, catalog));
    if slot_missing && catalog.progress == ProgressTable::Closed {
        lacks.push(Lack {
            right: "SELECT, INSERT and UPDATE on table walpost.progress".to_owned(),
            cure: grant(server, "SELECT, INSERT, UPDATE ON walpost.progress"),
        });
    }
    if slot_missing && !server.may_replicate {
        lacks.push(Lack {
            right: "the REPLICATION attribute".to_owned(),
            cure: format!("ALTER ROLE {} REPLICATION;", quote_ident(&server.role)),
        });
    }
    lacks
}

/// For making the publication, or for changing one that lacks something.
fn publish(server: &Server, catalog: &Catalog) -> Vec<Lack> {
    let mut lacks = Vec::new();
    let to_add = catalog.tables.iter().filter_map(|(name, table)| {
        let table = table.as_ref().filter(|table| !table.published)?;
        Some((name, table))
    });
    for (name, table) in to_add {
        if !table.owner.is_us {
            let role = quote_ident(&server.role);
            // Membership in a superuser's role would give far more than this table.
            let cure = if table.owner.is_superuser {
                format!("ALTER TABLE {name} OWNER TO {role};")
            } else {
                format!("GRANT {} TO {role};", quote_ident(&table.owner.name))
            };
            lacks.push(Lack {
                right: format!("ownership of table {name} (to publish it)"),
                cure,
            });
        }
    }
    let unpublished = catalog
        .tables
        .iter()
        .any(|(_, table)| table.as_ref().is_none_or(|table| !table.published));
    match &catalog.publication {
        None => lacks.extend(create_in_database(server)),
        Some(publication)
            if !publication.owned
                && (unpublished || !publication.inserts || !publication.via_root) =>
        {
            let name = quote_ident(&publication.name);
            lacks.push(Lack {
                right: format!("ownership of publication {name}"),
                cure: format!(
                    "ALTER PUBLICATION {name} OWNER TO {};",
                    quote_ident(&server.role)
                ),
            });
            // Postgres asks this of a publication's new owner.
            lacks.extend(create_in_database(server));
        }
        Some(_) => {}
    }
    lacks
}

fn create_in_database(server: &Server) -> Option<Lack> {
    let database = quote_ident(&server.database);
    (!server.may_create_in_database).then(|| Lack {
        right: format!("CREATE on database {database}"),
        cure: grant(server, &format!("CREATE ON DATABASE {database}")),
    })
}

fn create_in_schema(server: &Server) -> Lack {
    Lack {
        right: "CREATE on schema walpost".to_owned(),
        cure: grant(server, "USAGE, CREATE ON SCHEMA walpost"),
    }
}

fn grant(server: &Server, what: &str) -> String {
    format!("GRANT {what} TO {};", quote_ident(&server.role))
}
