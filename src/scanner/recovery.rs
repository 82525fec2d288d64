//! What to do about the slot before a stream begins: nothing, nearly always; make it anew where it is lost, gone, or not the
//! one that walpost left.
//!
//! Input: the slot's state and its row in `walpost.progress`. Output: that row, with a gap to be closed where a slot was
//! made. Loud: whatever is made anew is said as a warning.
//!
//! # When a slot is not ours any more
//!
//! * It does not exist (dropped, or a standby without failover slots was promoted), or Postgres has invalidated it.
//! * What it would bring cannot be read: the log holds rows from a time in which the publication or the table was wrong.
//! * It stands beyond what it was ever told. While a process runs it knows what it told; a process that stopped in good order
//!   has written it down.
//!
//! In all of these a slot made by us, with snapshots before and after, plus the scan of the gap, brings every row; one that
//! somebody else made has no such snapshots, so it is replaced.
//!
//! **After a crash** nobody knows what was told in the last seconds, and a slot that somebody dropped and made anew before the next
//! start is not told from our own. What Postgres shows of a slot does not name it: there is no oid and no time of creation;
//! `confirmed_flush_lsn`, `restart_lsn` and `catalog_xmin` of a new one are what the old one's may have become; the statistics'
//! `stats_reset` could carry a mark, but a crash of the server wipes it, a standby does not get it, and setting it takes a superuser.
//! One thing would do: to store each position before it is told, so that whatever stands beyond the stored one is not ours. It
//! would cost a write and a flush for each step of the confirmed LSN, also while the outbox is idle (or hold the server's log
//! back by that much), which is dear for a case in which a person drops the slot of a connector that has just crashed. Who does
//! that says so: `UPDATE walpost.progress SET scan_upto = pg_current_snapshot(), scan_position = NULL WHERE slot = '…'` before the next
//! start publishes every row that is not known as delivered (what was delivered in the last `WALPOST_SCAN_INTERVAL` comes twice).
//!
//! # One at a time
//!
//! Any number of instances may run; an advisory lock, held by the session that this module is given, lets one of them look
//! and recover. The others wait for it.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;
use tracing::warn;

use super::progress::{self, Claim, Progress};
use crate::config::{Config, SlotLost};
use crate::postgres::slot::{self, SlotState, slot_state};
use crate::postgres::{quote_literal, sql_error, waiting};
use crate::{Error, Lsn, Result};

/// The slot's row, and whether this process's memory of the slot still holds; `None` where the table is missing, and with it the scanner.
#[derive(Debug)]
pub struct Prepared {
    /// As it is now; `confirmed` and `streamed` as the process before left them.
    pub progress: Progress,
    /// The right to change it.
    pub claim: Claim,
    /// The slot is not as an earlier stream of this process left it: it was made anew, or another process has streamed it.
    /// What this process still holds of it is out of date.
    pub out_of_date: bool,
}

/// This process, and what it knows of the slot.
#[derive(Debug)]
pub struct Session {
    /// A name that no other process has.
    pub name: String,
    /// What it told the slot last, if it has had a stream.
    pub told: Option<Lsn>,
    /// Why the slot's log cannot be read on, if that was found: see `connector::unreadable`.
    pub unreadable: Option<String>,
}

/// Looks at the slot and makes it anew if that is called for.
///
/// # Errors
/// Temporary while another instance has the slot; refused when the progress is from another cluster, or when the slot is
/// lost and `WALPOST_SLOT_LOST` says so.
pub async fn prepare(
    client: &Client,
    config: &Config,
    session: &Session,
) -> Result<Option<Prepared>> {
    lock(client, &config.slot).await?;
    let stored = match progress::read(client, &config.slot).await {
        Ok(stored) => stored,
        Err(error) if progress::is_missing(&error) => {
            warn!(
                "no delivered snapshot, no gap scan: {} (hint: walpost init makes what is missing; \
                 GRANT SELECT, INSERT, UPDATE ON walpost.progress if it is there)",
                error.report()
            );
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let system_id = system_id(client).await?;
    let timeline = timeline(client).await?;
    let slot = &config.slot;
    let state = slot_state(client, slot).await?;
    let Some(progress) = stored else {
        if state.is_none() {
            // The preflight says what to do: nothing was ever set up here.
            return Ok(None);
        }
        let progress = progress::begin(client, slot, &system_id).await?;
        let claim = progress::claim(client, slot, &progress, &session.name, timeline).await?;
        return Ok(Some(Prepared {
            progress,
            claim,
            out_of_date: false,
        }));
    };
    check_cluster(&progress, &system_id, slot)?;
    let Some(why) = lost_because(state.as_ref(), &progress, session) else {
        let claim = progress::claim(client, slot, &progress, &session.name, timeline).await?;
        let out_of_date = progress.session.as_ref() != Some(&session.name);
        return Ok(Some(Prepared {
            progress,
            claim,
            out_of_date,
        }));
    };
    if config.slot_lost == SlotLost::Fail {
        return Err(Error::refused(format!("replication slot {slot}: {why}")).hint(
            "WALPOST_SLOT_LOST=recover makes a new one and publishes the rows in between from the table",
        ));
    }
    if let Some(pid) = state.as_ref().and_then(|state| state.active_pid) {
        return Err(Error::temporary(format!(
            "replication slot {slot}: {why}, and process {pid} still streams it"
        )));
    }
    warn!(
        slot,
        "{why}: making a new slot; the rows in between are published from the table"
    );
    if state.is_some() {
        let drop_slot = "SELECT pg_drop_replication_slot($1::text::name)";
        let dropped = client.execute(drop_slot, &[slot]).await;
        dropped.map_err(|error| sql_error(&format!("drop slot {slot}"), error))?;
    }
    let making = Box::pin(make_slot(client, slot));
    let progress = waiting::naming_holders(&config.postgres, waiting::SLOT_WAITS, making).await?;
    let claim = progress::claim(client, slot, &progress, &session.name, timeline).await?;
    Ok(Some(Prepared {
        progress,
        claim,
        out_of_date: true,
    }))
}

/// Makes the slot, with a snapshot before and after in `walpost.progress`. The caller holds the slot's lock ([`lock`]).
///
/// What `sql/11_slot.sql` does.
///
/// # Errors
/// Refused when the progress is from another cluster, and for what [`slot::create_slot`] refuses.
pub async fn make_slot(client: &Client, slot: &str) -> Result<Progress> {
    let system_id = system_id(client).await?;
    let timeline = timeline(client).await?;
    let stored = progress::read(client, slot).await?;
    if let Some(progress) = &stored {
        check_cluster(progress, &system_id, slot)?;
    }
    let before = progress::snapshot(client).await?;
    let identity = (&*system_id, timeline);
    let mut making =
        progress::slot_making(client, slot, stored.as_ref(), identity, &before).await?;
    let stands = slot::create_slot(client, slot).await?;
    let upto = progress::snapshot(client).await?;
    progress::slot_made(client, slot, &mut making, &upto, stands).await?;
    Ok(making)
}

/// How long a session that ends is given to say so.
const UNLOCK: Duration = Duration::from_secs(1);

/// Takes the slot's advisory lock, which is held until the session ends. Who holds it may write `walpost.progress` and make the slot.
///
/// The session does nothing while the stream runs, so the server is told how to find out that we are gone without a word (a host
/// without power, a network that forgot the connection), and never to end it for its silence. (On a Unix socket the first three
/// change nothing.)
///
/// # Errors
/// Temporary with [`is_busy`] true while another session has it.
pub async fn lock(client: &Client, slot: &str) -> Result<()> {
    const KEEP: &str = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
                        SET idle_session_timeout = 0";
    let kept = client.batch_execute(KEEP).await;
    kept.map_err(|error| sql_error("set up the session that holds the lock", error))?;
    let sql = "SELECT pg_try_advisory_lock(hashtext('walpost'), hashtext($1))";
    let row = client.query_one(sql, &[&slot]).await;
    let row = row.map_err(|error| sql_error("take the lock on the slot", error))?;
    if row.get(0) {
        return Ok(());
    }
    Err(Error::temporary(format!(
        "another walpost has slot {slot}; this one waits until that one ends"
    ))
    .caused_by(Busy))
}

/// Who has the slot's lock, for people.
pub async fn lock_holder(client: &Client, slot: &str) -> Result<Option<String>> {
    let sql = "SELECT format('%s (process %s)', coalesce(nullif(a.application_name, ''), 'a session'), l.pid)
               FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
               WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 2
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND l.classid = hashtext('walpost')::oid AND l.objid = hashtext($1)::oid
               LIMIT 1";
    let row = client.query_opt(sql, &[&slot]).await;
    let row = row.map_err(|error| sql_error("ask who has the lock on the slot", error))?;
    Ok(row.map(|row| row.get(0)))
}

/// Gives the lock back, and returns when the server has done so, or does not answer.
pub async fn unlock(client: Client) {
    let unlocking = client.batch_execute("SELECT pg_advisory_unlock_all()");
    // A session that is gone has no lock; one that hangs holds it until the server finds out.
    let _gone = timeout(UNLOCK, unlocking).await;
}

/// Another instance has the lock.
#[derive(Debug)]
struct Busy;

impl std::fmt::Display for Busy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("its lock is taken")
    }
}

impl std::error::Error for Busy {}

/// True for an error of [`prepare`] that says another instance has the slot.
pub fn is_busy(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    source
        .and_then(|source| source.downcast_ref::<Busy>())
        .is_some()
}

pub(crate) async fn system_id(client: &Client) -> Result<String> {
    let sql = "SELECT system_identifier::text FROM pg_control_system()";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("ask which cluster this is", error))?;
    Ok(row.get(0))
}

/// The timeline that the server writes on. (The one in the control file is the last checkpoint's, which a standby that was just
/// promoted has not made yet.)
pub(crate) async fn timeline(client: &Client) -> Result<u32> {
    let sql = "SELECT CASE WHEN pg_is_in_recovery() THEN (SELECT timeline_id FROM pg_control_checkpoint())
                      ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int4 END";
    let row = client.query_one(sql, &[]).await;
    let row = row.map_err(|error| sql_error("ask for the timeline", error))?;
    Ok(row.get::<_, i32>(0).cast_unsigned())
}

/// Refuses snapshots that mean nothing here. One that is [`Progress::ahead`] was not taken from this cluster as it is now, whatever
/// the row says: the transaction that stores a snapshot is itself beyond it. Transactions still to come would count as delivered.
pub(crate) fn check_cluster(progress: &Progress, system_id: &str, slot: &str) -> Result<()> {
    let why = if progress.system_id != system_id {
        format!(
            "is from cluster {}, and this is {system_id}: its snapshots mean nothing here",
            progress.system_id
        )
    } else if progress.ahead {
        "has a snapshot that knows transactions which this cluster has not come to: it was copied or edited, or the cluster \
         was set back"
            .to_owned()
    } else {
        return Ok(());
    };
    let set = |delivered: &str, upto: &str| {
        format!(
            "UPDATE walpost.progress SET system_id = '{system_id}', delivered = {delivered}, scan_before = NULL, \
             scan_upto = {upto}, scan_position = NULL WHERE slot = {}",
            quote_literal(slot).trim()
        )
    };
    Err(Error::refused(format!("walpost.progress of slot {slot} {why}")).hint(format!(
        "if this is a copy whose rows the other cluster has published: {}; to publish every row again: {}; after pg_upgrade, \
         which keeps transaction ids: UPDATE walpost.progress SET system_id = '{system_id}' WHERE slot = {}",
        set("pg_current_snapshot()", "NULL"),
        set("NULL", "pg_current_snapshot()"),
        quote_literal(slot).trim()
    )))
}

fn lost_because(
    state: Option<&SlotState>,
    progress: &Progress,
    session: &Session,
) -> Option<String> {
    let Some(state) = state else {
        return Some("it does not exist any more".to_owned());
    };
    if session.unreadable.is_some() {
        return session.unreadable.clone();
    }
    if progress.scan_before.is_some() && progress.scan_upto.is_none() {
        return Some("its making was cut short".to_owned());
    }
    if let Some(reason) = state.lost_because() {
        return Some(format!("it is lost ({reason})"));
    }
    // What we told is out of date when another process has streamed since.
    let ours = progress.session.as_ref() == Some(&session.name);
    let told = session.told.filter(|_| ours);
    let known = told.or(progress.confirmed)?;
    let stands = state.confirmed_flush.filter(|stands| *stands > known)?;
    Some(format!(
        "it stands at {stands}, and walpost left it at {known}: somebody advanced it, or made it anew"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(confirmed: u64) -> SlotState {
        SlotState {
            plugin: Some("pgoutput".into()),
            database: Some("d".into()),
            active: false,
            active_pid: None,
            confirmed_flush: Some(Lsn::new(confirmed)),
            restart_lsn: Some(Lsn::new(1)),
            wal_status: Some("reserved".into()),
            invalidation_reason: None,
            retained_bytes: None,
            failover: false,
        }
    }

    #[test]
    fn a_slot_is_ours_unless_it_is_gone_lost_or_beyond_what_it_was_told() {
        let session = |told: Option<u64>| Session {
            name: "we".to_owned(),
            told: told.map(Lsn::new),
            unreadable: None,
        };
        let new = session(None);
        let unknown = Progress::default();
        let stopped = Progress {
            confirmed: Some(Lsn::new(100)),
            session: Some("they".to_owned()),
            ..Progress::default()
        };
        assert_eq!(lost_because(Some(&slot(500)), &unknown, &new), None);
        assert_eq!(lost_because(Some(&slot(100)), &stopped, &new), None);
        assert_eq!(lost_because(Some(&slot(90)), &stopped, &new), None);
        assert!(lost_because(Some(&slot(101)), &stopped, &new).is_some());
        // A process knows what it told, unless another has streamed since.
        let ours = Progress {
            session: Some("we".to_owned()),
            ..Progress::default()
        };
        let theirs = Progress {
            session: Some("they".to_owned()),
            ..Progress::default()
        };
        let told = session(Some(300));
        assert_eq!(lost_because(Some(&slot(300)), &ours, &told), None);
        assert!(lost_because(Some(&slot(301)), &ours, &told).is_some());
        assert_eq!(lost_because(Some(&slot(301)), &theirs, &told), None);
        assert!(lost_because(None, &unknown, &new).is_some());
        let cut_short = Progress {
            scan_before: Some("1:1:".to_owned()),
            ..Progress::default()
        };
        assert!(lost_because(Some(&slot(1)), &cut_short, &new).is_some());
        let mut lost = slot(1);
        lost.wal_status = Some("lost".into());
        assert!(lost_because(Some(&lost), &unknown, &new).is_some());
    }

    #[test]
    fn progress_of_another_cluster_or_time_is_refused_with_every_way_out() {
        let progress = Progress {
            system_id: "1".to_owned(),
            ..Progress::default()
        };
        assert!(check_cluster(&progress, "1", "s").is_ok());
        let ahead = Progress {
            ahead: true,
            ..progress.clone()
        };
        for (progress, here) in [(&progress, "2"), (&ahead, "1")] {
            let said = check_cluster(progress, here, "s").unwrap_err();
            assert_eq!(said.exit_code(), 69);
            let said = said.report();
            for way in [
                "delivered = pg_current_snapshot(), scan_before = NULL, scan_upto = NULL",
                "delivered = NULL, scan_before = NULL, scan_upto = pg_current_snapshot()",
                "after pg_upgrade",
            ] {
                assert!(said.contains(way), "{said}");
            }
        }
    }
}
