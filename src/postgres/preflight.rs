//! Everything that streaming needs of a server, checked before it starts: one clear error, with the command that mends it.
//!
//! Input: an SQL connection to the database that is to be streamed, and the names. Output: the tables that rows come
//! from, or the first thing that is wrong, in the order in which an operator would mend them. Nothing is changed. Only what streaming itself
//! needs is asked for: the role needs `REPLICATION`, but no right to read the table.

use tokio_postgres::Client;

use super::names::{quote_ident, quote_literal};
use super::published::{self, OutboxRelations, Subscription};
use super::row_security::refuse_row_security;
use super::slot::{self, PLUGIN, SlotState, get, query_one, slot_state};
use crate::{Error, Result};

/// The oldest Postgres whose pgoutput has the options that walpost uses.
const OLDEST_VERSION: u32 = 140_000;

/// Checks version, `wal_level`, the role, row-level security, the tables, the publication ([`published`]) and the slot.
///
/// # Errors
/// Refused, with a hint, for the first thing that is wrong; temporary when the server cannot be asked.
pub async fn preflight(
    client: &Client,
    slot: &str,
    subscription: &Subscription,
) -> Result<OutboxRelations> {
    check_server(client).await?;
    let role = check_role(client).await?;
    refuse_row_security(client, &subscription.tables).await?;
    let relations = published::relations(client, subscription).await?;
    let state = slot_state(client, slot).await?;
    check_slot(slot, state.as_ref(), &role.database)?;
    Ok(relations)
}

async fn check_server(client: &Client) -> Result<()> {
    let version = slot::server_version_num(client).await?;
    if version < OLDEST_VERSION {
        return Err(Error::refused(format!(
            "the server is Postgres {}, walpost needs 14 or newer",
            version / 10_000
        )));
    }
    let level = slot::wal_level(client).await?;
    if level != "logical" {
        return Err(
            Error::refused(format!("wal_level is {level}, streaming needs logical"))
                .hint("ALTER SYSTEM SET wal_level = logical; then restart Postgres"),
        );
    }
    Ok(())
}

struct Role {
    database: String,
}

async fn check_role(client: &Client) -> Result<Role> {
    // Managed services patch Postgres to accept members of a role of theirs instead of the attribute.
    const SQL: &str = "
        SELECT current_database()::text AS database, current_user::text AS role,
               r.rolreplication OR r.rolsuper
               OR EXISTS (SELECT FROM pg_roles m
                          WHERE m.rolname = 'rds_replication' AND pg_has_role(r.oid, m.oid, 'MEMBER')) AS may_replicate
        FROM pg_roles r WHERE r.rolname = current_user";
    let row = query_one(client, SQL, &[], "read the role's rights").await?;
    let role: String = get(&row, "role")?;
    if !get::<bool>(&row, "may_replicate")? {
        return Err(
            Error::refused(format!("role {role} may not replicate")).hint(format!(
                "as a superuser: ALTER ROLE {} REPLICATION;",
                quote_ident(&role)
            )),
        );
    }
    Ok(Role {
        database: get(&row, "database")?,
    })
}

fn check_slot(name: &str, state: Option<&SlotState>, database: &str) -> Result<()> {
    let Some(state) = state else {
        return Err(
            Error::refused(format!("replication slot {name} does not exist")).hint("walpost init"),
        );
    };
    let another = "set WALPOST_SLOT to a name that is free, then: walpost init";
    match (state.plugin.as_deref(), state.database.as_deref()) {
        (Some(PLUGIN), Some(its)) if its == database => {}
        (Some(PLUGIN), Some(its)) => {
            return Err(Error::refused(format!(
                "replication slot {name} belongs to database {its}, and this is {database}"
            ))
            .hint(another));
        }
        (Some(plugin), _) => {
            return Err(Error::refused(format!(
                "replication slot {name} was made for plugin {plugin}, not {PLUGIN}"
            ))
            .hint(another));
        }
        (None, _) => {
            return Err(Error::refused(format!(
                "replication slot {name} is a physical one, not for {PLUGIN}"
            ))
            .hint(another));
        }
    }
    if let Some(reason) = state.lost_because() {
        return Err(
            Error::refused(format!("replication slot {name} is lost: {reason}")).hint(format!(
                "walpost run with WALPOST_SLOT_LOST=recover makes it anew and publishes the rows in between from tables with txid and seq; to \
                 give up those rows: SELECT pg_drop_replication_slot({}); then: walpost init",
                quote_literal(name)
            )),
        );
    }
    if let Some(why) = state.unfit_because() {
        return Err(
            Error::refused(format!("replication slot {name} will not do: {why}"))
                .hint(slot::mend_two_phase(name)),
        );
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn good_slot() -> SlotState {
        SlotState {
            plugin: Some("pgoutput".into()),
            database: Some("shop".into()),
            active: false,
            active_pid: None,
            confirmed_flush: None,
            restart_lsn: None,
            wal_status: Some("reserved".into()),
            invalidation_reason: None,
            retained_bytes: None,
            two_phase: false,
            temporary: false,
            failover: false,
            synced: false,
        }
    }

    #[test]
    fn a_slot_that_will_not_do_is_told_why() {
        let said = |change: &dyn Fn(&mut SlotState)| {
            let mut state = good_slot();
            change(&mut state);
            let error = check_slot("s", Some(&state), "shop").unwrap_err();
            assert_eq!(error.exit_code(), 69);
            error.report()
        };
        assert!(check_slot("s", Some(&good_slot()), "shop").is_ok());
        assert!(
            check_slot("s", None, "shop")
                .unwrap_err()
                .report()
                .contains("walpost init")
        );
        assert!(said(&|s| s.plugin = None).contains("physical"));
        assert!(said(&|s| s.plugin = Some("wal2json".into())).contains("plugin wal2json"));
        assert!(said(&|s| s.database = Some("x".into())).contains("database x"));
        let prepared = said(&|s| s.two_phase = true);
        assert!(
            prepared.contains("ALTER_REPLICATION_SLOT \"s\""),
            "{prepared}"
        );
        let lost = said(&|s| s.wal_status = Some("lost".into()));
        assert!(lost.contains("pg_drop_replication_slot('s')"), "{lost}");
        assert!(
            said(&|s| s.invalidation_reason = Some("idle_timeout".into())).contains("idle_timeout")
        );
    }
}
