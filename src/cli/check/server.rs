//! What of Postgres' settings and of the role's rights streaming depends on: one line each.
//!
//! The `postgres` line says whether streaming can start at all; these say what it stands on, and what may end it later.

use tokio_postgres::Client;

use super::Finding;
use crate::config::Config;
use crate::postgres::slot::{self, SlotState};
use crate::postgres::{quote_ident, sql_error};
use crate::{Error, Result};

const OLDEST: u32 = 14;
/// The newest that the tests run against.
const NEWEST_TESTED: u32 = 18;
const MIB: i64 = 1024 * 1024;

/// A finding for each.
pub(super) async fn check(client: &Client, config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        version(client).await,
        or_failed("wal_level", wal_level(client).await),
        or_failed("rights", rights(client, config).await),
    ];
    let facts = match Facts::read(client, &config.slot).await {
        Ok(facts) => facts,
        Err(error) => {
            findings.push(Finding::fail("wal", &error));
            return findings;
        }
    };
    findings.push(facts.wal_kept());
    findings.push(facts.room(
        ("slots", "max_replication_slots"),
        (facts.slots_used, facts.max_slots),
        facts.slot.is_some(),
    ));
    let streamed = facts.slot.as_ref().is_some_and(|slot| slot.active);
    findings.push(facts.room(
        ("senders", "max_wal_senders"),
        (facts.senders_used, facts.max_senders),
        streamed,
    ));
    findings.extend(facts.idle_timeout());
    findings.extend(facts.sender_timeout(config));
    findings
}

fn or_failed(check: &'static str, finding: Result<Finding>) -> Finding {
    finding.unwrap_or_else(|error| Finding::fail(check, &error))
}

/// Whether this version of Postgres is known.
pub(super) async fn version(client: &Client) -> Finding {
    or_failed("version", known_version(client).await)
}

async fn known_version(client: &Client) -> Result<Finding> {
    const CHECK: &str = "version";
    let major = slot::server_version_num(client).await? / 10_000;
    if major < OLDEST {
        return Err(
            Error::refused(format!("Postgres {major}; walpost needs {OLDEST} or newer"))
                .hint("pg_upgrade"),
        );
    }
    if major > NEWEST_TESTED {
        return Ok(Finding::warn(
            CHECK,
            format!("Postgres {major}; this version of walpost was tested up to {NEWEST_TESTED}"),
            "look for a newer walpost",
        ));
    }
    Ok(Finding::ok(CHECK, format!("Postgres {major}")))
}

async fn wal_level(client: &Client) -> Result<Finding> {
    let level = slot::wal_level(client).await?;
    if level == "logical" {
        return Ok(Finding::ok("wal_level", level));
    }
    Err(
        Error::refused(format!("{level}; streaming needs logical")).hint(
            "ALTER SYSTEM SET wal_level = logical; then restart Postgres; or set WALPOST_MODE=poll",
        ),
    )
}

/// Rights beyond those that streaming itself needs: on the tables, for the scanner, and on walpost's own.
async fn rights(client: &Client, config: &Config) -> Result<Finding> {
    const OWN: &str = "
        SELECT format('GRANT %s ON walpost.%I TO %I;', w.rights, c.relname, current_user)
        FROM (VALUES ('progress', 'SELECT, INSERT, UPDATE'), ('straggler', 'SELECT, INSERT, UPDATE, DELETE'),
                     ('discarded', 'SELECT, INSERT, DELETE'), ('after_publish', 'SELECT, INSERT, UPDATE'),
                     ('left_undone', 'SELECT, INSERT, UPDATE')) w (name, rights)
        JOIN pg_class c ON c.relnamespace = to_regnamespace('walpost') AND c.relname = w.name
        WHERE NOT (SELECT bool_and(has_table_privilege(c.oid, p)) FROM regexp_split_to_table(w.rights, ', ') p)
        UNION ALL
        SELECT format('GRANT USAGE ON SCHEMA walpost TO %I;', current_user)
        WHERE to_regnamespace('walpost') IS NOT NULL AND NOT has_schema_privilege(to_regnamespace('walpost'), 'USAGE')";
    // Who notes what is delivered compares the tables with the stream.
    const NOTES: &str = "
        SELECT coalesce(bool_or(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')
                                AND has_table_privilege(c.oid, 'UPDATE')), false)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'walpost' AND c.relname = 'progress'";
    const TABLE: &str = "
        SELECT current_user::text, coalesce(bool_or(has_table_privilege(c.oid, 'SELECT')), true)
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = $2";
    let failed = |error| sql_error("read the role's rights", error);
    let own = client.query(OWN, &[]).await.map_err(failed)?;
    let mut mends: Vec<String> = own.iter().map(|row| row.get(0)).collect();
    let notes = client.query_one(NOTES, &[]).await.map_err(failed)?;
    let notes: bool = notes.get(0);
    let (mut user, mut unread) = (String::new(), Vec::new());
    for name in &config.outbox_tables {
        let row = client.query_one(TABLE, &[&name.schema, &name.name]).await;
        let row = row.map_err(failed)?;
        user = row.get(0);
        if !row.get::<_, bool>(1) {
            mends.push(format!("GRANT SELECT ON {name} TO {};", quote_ident(&user)));
            unread.push(name.to_string());
        }
    }
    if notes && !unread.is_empty() {
        return Err(Error::refused(format!(
            "role {user} may not read {}: what is delivered cannot be noted, of no table",
            unread.join(", ")
        ))
        .hint(mends.join(" ")));
    }
    if mends.is_empty() {
        return Ok(Finding::ok(
            "rights",
            format!("role {user} may read the tables and use walpost's own"),
        ));
    }
    Ok(Finding::warn(
        "rights",
        format!("role {user} lacks rights that the scanner or stragglers need"),
        mends.join(" "),
    ))
}

/// What the server says of itself.
struct Facts {
    name: String,
    slot: Option<SlotState>,
    /// MiB; -1 is without limit.
    max_keep_mib: i64,
    keep_mib: i64,
    max_slots: i64,
    slots_used: i64,
    max_senders: i64,
    senders_used: i64,
    /// Seconds; `None` before Postgres 18.
    idle_timeout_s: Option<i64>,
    sender_timeout_ms: i64,
}

impl Facts {
    async fn read(client: &Client, name: &str) -> Result<Self> {
        // In the units of pg_settings, which are fixed for each of these.
        const SQL: &str = "
            SELECT coalesce((SELECT setting::int8 FROM pg_settings WHERE name = 'max_slot_wal_keep_size'), -1),
                   coalesce((SELECT setting::int8 FROM pg_settings WHERE name = 'wal_keep_size'), 0),
                   current_setting('max_replication_slots')::int8, (SELECT count(*) FROM pg_replication_slots),
                   current_setting('max_wal_senders')::int8, (SELECT count(*) FROM pg_stat_replication),
                   (SELECT CASE unit WHEN 'min' THEN 60 WHEN 's' THEN 1 END * setting::int8
                    FROM pg_settings WHERE name = 'idle_replication_slot_timeout'),
                   coalesce((SELECT setting::int8 FROM pg_settings WHERE name = 'wal_sender_timeout'), 0)";
        let row = client.query_one(SQL, &[]).await;
        let row = row.map_err(|error| sql_error("read the server's settings", error))?;
        Ok(Self {
            name: name.to_owned(),
            slot: slot::slot_state(client, name).await?,
            max_keep_mib: row.get(0),
            keep_mib: row.get(1),
            max_slots: row.get(2),
            slots_used: row.get(3),
            max_senders: row.get(4),
            senders_used: row.get(5),
            idle_timeout_s: row.get(6),
            sender_timeout_ms: row.get(7),
        })
    }

    fn wal_kept(&self) -> Finding {
        const CHECK: &str = "wal";
        let retained = self.slot.as_ref().and_then(|slot| slot.retained_bytes);
        let retained_mib = i64::try_from(retained.unwrap_or_default()).unwrap_or(i64::MAX) / MIB;
        let (limit, keep) = (self.max_keep_mib, self.keep_mib);
        if limit < 0 {
            return Finding::warn(
                CHECK,
                format!(
                    "max_slot_wal_keep_size is -1: while walpost is away, the log that its slot keeps ({retained_mib} MiB now) grows \
                     until the disk is full"
                ),
                "ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf(); (a size that the disk has room for; \
                 a slot that is lost to it is made anew, and the rows in between come from the table)",
            );
        }
        let text = format!(
            "{retained_mib} MiB of log kept for the slot, at most {limit} (max_slot_wal_keep_size), at least {keep} for anybody (wal_keep_size)"
        );
        if retained_mib > limit / 2 {
            return Finding::warn(
                CHECK,
                format!("{text}: more than half, and the slot is lost at the limit"),
                "start walpost run, or raise max_slot_wal_keep_size",
            );
        }
        Finding::ok(CHECK, text)
    }

    /// Whether there is one left; `has` is true when ours is among those in use.
    fn room(
        &self,
        (check, setting): (&'static str, &str),
        (used, max): (i64, i64),
        has: bool,
    ) -> Finding {
        let text = format!("{used} of {max} in use ({setting})");
        let mend = || {
            format!(
                "ALTER SYSTEM SET {setting} = {}; then restart Postgres",
                max + 10
            )
        };
        if has || used + 1 < max {
            return Finding::ok(check, text);
        }
        if used < max {
            let name = &self.name;
            return Finding::warn(check, format!("{text}: {name} takes the last one"), mend());
        }
        let full = format!("{text}: none is left for {}", self.name);
        Finding::fail(check, &Error::refused(full).hint(mend()))
    }

    fn idle_timeout(&self) -> Option<Finding> {
        const CHECK: &str = "idle_slot";
        let seconds = self.idle_timeout_s?;
        if seconds == 0 {
            return Some(Finding::ok(
                CHECK,
                "idle_replication_slot_timeout is off: the slot waits for walpost however long it is away",
            ));
        }
        Some(Finding::warn(
            CHECK,
            format!(
                "idle_replication_slot_timeout is {seconds} s: the slot is lost when walpost is away for longer"
            ),
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();",
        ))
    }

    fn sender_timeout(&self, config: &Config) -> Option<Finding> {
        const CHECK: &str = "timeout";
        let (timeout_ms, ours) = (
            u128::try_from(self.sender_timeout_ms).ok()?,
            config.status_interval,
        );
        if timeout_ms == 0 || ours.as_millis() * 2 <= timeout_ms {
            return None;
        }
        Some(Finding::warn(
            CHECK,
            format!(
                "wal_sender_timeout is {timeout_ms} ms, and walpost tells where it is every {} ms: the server may take it for dead",
                ours.as_millis()
            ),
            "ALTER SYSTEM SET wal_sender_timeout = '60s'; SELECT pg_reload_conf(); or lower WALPOST_STATUS_INTERVAL",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn facts() -> Facts {
        Facts {
            name: "s".to_owned(),
            slot: None,
            max_keep_mib: 1000,
            keep_mib: 0,
            max_slots: 10,
            slots_used: 3,
            max_senders: 10,
            senders_used: 3,
            idle_timeout_s: None,
            sender_timeout_ms: 60_000,
        }
    }

    fn slot(retained_bytes: u64) -> SlotState {
        SlotState {
            plugin: None,
            database: None,
            active: false,
            active_pid: None,
            confirmed_flush: None,
            restart_lsn: None,
            wal_status: None,
            invalidation_reason: None,
            retained_bytes: Some(retained_bytes),
            two_phase: false,
            temporary: false,
            failover: false,
            synced: false,
        }
    }

    #[test]
    fn log_without_a_limit_and_log_near_it_are_warned_of() {
        let status = |facts: Facts| facts.wal_kept().status;
        assert_eq!(
            status(Facts {
                max_keep_mib: -1,
                ..facts()
            }),
            Status::Warn
        );
        assert_eq!(
            status(Facts {
                slot: Some(slot(400 << 20)),
                ..facts()
            }),
            Status::Ok
        );
        assert_eq!(
            status(Facts {
                slot: Some(slot(600 << 20)),
                ..facts()
            }),
            Status::Warn
        );
    }

    #[test]
    fn the_last_slot_is_a_warning_and_none_a_failure_unless_it_is_ours() {
        let status = |used, has| {
            facts()
                .room(("slots", "max_replication_slots"), (used, 10), has)
                .status
        };
        assert_eq!(status(8, false), Status::Ok);
        assert_eq!(status(9, false), Status::Warn);
        assert_eq!(status(10, false), Status::Fail { temporary: false });
        assert_eq!(status(10, true), Status::Ok);
    }

    #[test]
    fn a_timeout_for_idle_slots_is_told_only_where_there_is_one() {
        let status = |idle_timeout_s| {
            let facts = Facts {
                idle_timeout_s,
                ..facts()
            };
            facts.idle_timeout().map(|finding| finding.status)
        };
        assert_eq!(status(None), None);
        assert_eq!(status(Some(0)), Some(Status::Ok));
        assert_eq!(status(Some(3600)), Some(Status::Warn));
    }
}
