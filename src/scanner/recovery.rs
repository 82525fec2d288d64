//! What to do about the slot before a stream begins: nothing, nearly always; make it anew where it is lost, gone, or not the
//! one that walpost left; read the table up to now where nobody knows what it was told.
//!
//! Input: the slot's state and its row in `walpost.progress`. Output: that row, with a gap to be closed where a slot was
//! made. Loud: whatever is made anew is said as a warning.
//!
//! # How a slot is known
//!
//! By the cluster's system id, its timeline and the position, which are stored with the claim (and, until the first claim, by whoever made
//! the slot). A log position alone says nothing on another timeline: the old primary may have been told 0/5000, the
//! standby be promoted at 0/4500, and somebody's automation make a slot of the same name there at 0/4600.
//!
//! | what is found | is | what is done |
//! |---|---|---|
//! | as it was left, or behind that (a server that crashed forgets the last positions) | ours | it is streamed |
//! | no slot, or Postgres has invalidated it | lost | made anew, and the gap is scanned |
//! | what it would bring cannot be read: the log holds rows from a time in which the publication or the table was wrong | lost | the same |
//! | it was made by hand with the option `two_phase`: it streams transactions that may still roll back | lost | the same |
//! | it stands beyond what it was ever told, or beyond the end of the log | lost | the same |
//! | another timeline, and the slot is not one that this server kept in step with its primary's (`synced`, Postgres 17+) | lost | the same |
//! | another timeline, and the slot is `synced` | unknown | kept, and the table is scanned up to now: a straggler's row, or the last progress, may not have reached the standby |
//! | no row in `walpost.progress`, or one that knows neither `delivered` nor a snapshot of the slot's making | unknown | the same |
//! | a making that was cut short; poll mode since the slot was made; a row of an earlier version and no good stop | unknown | the same |
//!
//! A slot that was made by us, with snapshots before and after, plus the scan of the gap, brings every row. So does any slot that exists now,
//! plus a scan up to a snapshot that is taken now, when every transaction that runs now has ended ([`settled`], on all versions, as where a
//! slot is made; it names those that take long). What is not visible in that one began behind the slot's position. A plain
//! snapshot would not do: a transaction's commit record is in the log before the transaction is visible, for a moment, or, where commits wait for a synchronous
//! standby, for as long as that takes; and the slot may stand beyond the record. (Somebody advanced it; or it was made meanwhile: also the
//! servers that wait for running transactions when they make a slot do not wait for one that began in the last part of it.) Such a
//! row would neither be in the gap nor be streamed. The wait costs a start behind an unknown slot as long as the longest
//! transaction takes.
//!
//! Where `synchronous_standby_names` is set, a commit may wait for walpost's own walsender, which does not run yet: neither would end. The role
//! of the connector does not see which sessions wait so (`pg_read_all_stats`), nor does anybody of `COMMIT PREPARED`. There nothing is waited for,
//! if [`super::reconcile`] is on: a row that is not visible in the plain snapshot, and that the slot does not bring, becomes visible when its commit
//! has stopped waiting. It is then beyond what is delivered, and the comparison finds that it was not streamed and publishes it. Not a row since that snapshot is
//! taken for streamed because an earlier process has streamed it: `catalog` is NULL until a note of what is delivered shows every transaction that ran when the stream
//! began, so after a crash before that all of them come from the table. (Such a row may arrive behind later ones of its key.) With `WALPOST_RECONCILE=off` the transactions are
//! waited for in every case; they are named, with what ends them. So are those that the making of a slot waits for: there the server itself waits.
//!
//! Of an
//! unknown slot that is what is done, rather than to replace it: its log may hold what no table has (events of `emit_transient`, rows that
//! were deleted since), and whoever made it chose its properties. The rows that come both ways are those that the scan
//! published and that the slot has not confirmed. They are not older than its `catalog_xmin` ([`slot::never_streamed`]), so there are not more of
//! them than the slot's backlog. Their ids are remembered, up to a limit, and skipped in the stream ([`super::gap::overlap`]). What
//! this process cannot know is what another one published before: of an unknown slot such rows may come again.
//!
//! `WALPOST_SLOT_LOST=fail` refuses a lost slot. An unknown one is read in every case: nothing of it is missing.
//!
//! # Tables that cannot be read
//!
//! A table without `txid` and `seq` has no gap. Where rows of it would be lost (a lost slot, or a gap behind what is delivered), `recover`
//! refuses, with the statements that add the columns; `restart` goes on without those rows. On a first start
//! the rows from before the slot are left out with a warning, as the documentation of such tables says.
//!
//! # After a crash on the same timeline
//!
//! Nobody knows what was told in the last seconds, and a slot that somebody dropped and made anew before the next
//! start is not told from our own. What Postgres shows of a slot does not name it: there is no oid and no time of creation;
//! `confirmed_flush_lsn`, `restart_lsn` and `catalog_xmin` of a new one are what the old one's may have become; the statistics'
//! `stats_reset` could carry a mark, but a crash of the server wipes it, a standby does not get it, and setting it takes a superuser.
//! One thing would do: to store each position before it is told, so that whatever stands beyond the stored one is not ours. It
//! would cost a write and a flush for each step of the confirmed LSN, also while the outbox is idle (or hold the server's log
//! back by that much). That is too much for this case: a person drops the slot of a connector that has just crashed. A scan up to now after each
//! crash would help too, but it publishes what was acknowledged since the last note a second time. An operator who drops such a slot
//! asks for the scan: `UPDATE walpost.progress SET scan_upto = pg_current_snapshot(), scan_position = NULL WHERE slot = '…'` before the next
//! start publishes every row that is not known as delivered (what was delivered in the last `WALPOST_SCAN_INTERVAL` comes twice).
//!
//! # From the look to the stream
//!
//! A scan may take hours, in which the slot can be invalidated, dropped or replaced. Only when the walsender has taken the slot can nobody do
//! that any more. So the slot is looked at once more behind `START_REPLICATION` ([`check_unchanged`]), before a row is read: one that
//! stands beyond what it was known to stand at is not the one that was judged, and everything begins again. A refusal of
//! `START_REPLICATION` that comes from such a change begins again as well ([`refused_start`]).
//!
//! # One at a time
//!
//! Any number of instances may run; an advisory lock, held by the session that this module is given, lets one of them look
//! and recover. The others wait for it. An instance whose lock was lost with its session, and whose stream was not, keeps its claim: who
//! has the lock then waits until the slot is free.
//!
//! `tests/bookkeeping.rs`, `tests/gap.rs` and `tests/failover.rs` try to break all of this.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::Client;
use tracing::warn;

use super::cluster;
use super::progress::{self, Claim, Progress, Snapshot};
use super::slot_maker::{has_synchronous_standbys, make_slot, settled};
use super::table::{self, ScanTable};
use crate::config::{Config, SlotLost};
use crate::postgres::published;
use crate::postgres::slot::{self, PLUGIN, SlotState, slot_state};
use crate::postgres::{TableName, answered, sql_error, sqlstate, waiting};
use crate::{Error, Lsn, Result};

/// SQLSTATEs of a `START_REPLICATION` whose slot is invalidated, or gone.
const CHANGED_SLOT: [&str; 2] = ["55000", "42704"];

/// The slot's row, and whether this process's memory of the slot still holds.
#[derive(Debug)]
pub struct Prepared {
    /// As it is now; `confirmed` and `streamed` as the process before left them.
    pub progress: Progress,
    /// The right to change it.
    pub claim: Claim,
    /// The slot is not as an earlier stream of this process left it: it was made anew, or another process has streamed it, or
    /// there is a gap to be closed. What this process still holds of it is out of date.
    pub out_of_date: bool,
    /// This process was the last to stream the slot: nobody else has published what it has in the air.
    pub was_ours: bool,
    /// Tables that a scan leaves out, because they have no columns `txid` and `seq`.
    pub left_out: Vec<TableName>,
    /// Set where nobody knows what the slot was told; see [`scan_up_to_now`].
    pub unknown: Option<Unknown>,
    /// Where the slot stands.
    pub stands: Lsn,
}

/// A slot that is kept although nobody knows what it was told.
#[derive(Debug)]
pub struct Unknown {
    /// Rows visible in it the slot does not stream.
    pub never_streamed: Option<Snapshot>,
    timeline: u32,
}

/// This process, and what it knows of the slot.
#[derive(Clone, Debug)]
pub struct Session {
    /// A name that no other process has.
    pub name: String,
    /// What it told the slot last, or where it stood before, if it has had a stream.
    pub told: Option<Lsn>,
    /// Why the slot's log cannot be read on, if that was found: see `connector::unreadable`.
    pub unreadable: Option<String>,
    /// Another process has claimed the slot since this one's last stream: what this one knows of the slot, and has in the air, is out of date. Set before this one
    /// claims again, and kept until that is dropped, also when the opening fails in between.
    pub is_behind: Arc<AtomicBool>,
}

/// Looks at the slot and makes it anew if that is called for. `None` where the table is missing, and with it the scanner.
///
/// # Errors
/// Temporary while another instance has the slot; refused when the progress is from another cluster, or when the slot is
/// lost and `WALPOST_SLOT_LOST` says so; temporary with [`is_nothing_set_up`] true when there is neither slot nor row.
pub async fn prepare(
    client: &Client,
    config: &Config,
    session: &Session,
) -> Result<Option<Prepared>> {
    let slot = &config.slot;
    let looked = answered("look at the slot", look(client, config, session)).await?;
    let Looked::Lost(lost) = looked else {
        return Ok(match looked {
            Looked::Prepared(prepared) => Some(*prepared),
            Looked::NoTable | Looked::Lost(_) => None,
        });
    };
    let Lost {
        state,
        why,
        left_out,
        is_claimed,
    } = *lost;
    // It may wait for transactions, and names them.
    let progress = make_anew(client, config, state.as_ref(), &why).await?;
    let stands = progress.confirmed.unwrap_or(Lsn::ZERO);
    session.is_behind.store(!is_claimed, Ordering::Relaxed);
    let claiming = progress::claim(client, slot, &progress, &session.name, None);
    let claim = answered("claim the slot", claiming).await?;
    Ok(Some(Prepared {
        progress,
        claim,
        out_of_date: true,
        was_ours: is_claimed,
        left_out,
        unknown: None,
        stands,
    }))
}

/// What a look at the slot gave.
enum Looked {
    /// There is no `walpost.progress`.
    NoTable,
    /// It is to be made anew.
    Lost(Box<Lost>),
    Prepared(Box<Prepared>),
}

/// A slot that is to be made anew.
struct Lost {
    state: Option<SlotState>,
    why: String,
    left_out: Vec<TableName>,
    is_claimed: bool,
}

/// Takes the lock, looks at the slot, and claims it unless it is lost.
async fn look(client: &Client, config: &Config, session: &Session) -> Result<Looked> {
    lock(client, &config.slot).await?;
    let stored = match progress::read(client, &config.slot).await {
        Ok(stored) => stored,
        Err(error) if progress::is_missing(&error) => {
            warn!(
                "no delivered snapshot, no gap scan: {} (hint: walpost init makes what is missing; \
                 GRANT SELECT, INSERT, UPDATE ON walpost.progress if it is there)",
                error.report()
            );
            return Ok(Looked::NoTable);
        }
        Err(error) => return Err(error),
    };
    let system_id = cluster::system_id(client).await?;
    let slot = &config.slot;
    let state = slot_state(client, slot).await?;
    let here = Here {
        timeline: cluster::timeline(client).await?,
        // Asked after the slot, which never stands beyond it.
        log_end: slot::log_end(client).await?,
    };
    let progress = match stored {
        Some(progress) => progress,
        None if state.is_none() => return Err(nothing_set_up(slot)),
        None => progress::begin(client, slot, &system_id).await?,
    };
    cluster::check_cluster(&progress, &system_id, slot)?;
    let verdict = judge(state.as_ref(), &progress, session, &here);
    let left_out = left_out(client, config, &progress, &verdict).await?;
    let has_claim = progress.session.as_ref() == Some(&session.name);
    let is_claimed = has_claim && !session.is_behind.load(Ordering::Relaxed);
    if let Verdict::Lost(why) = verdict {
        return Ok(Looked::Lost(Box::new(Lost {
            state,
            why,
            left_out,
            is_claimed,
        })));
    }
    let stands = state.as_ref().and_then(|state| state.confirmed_flush);
    if let Some(pid) = state.as_ref().and_then(|state| state.active_pid)
        && !has_claim
    {
        // Its lock is gone, and its stream is not. A claim would take its right to note what it delivers.
        return Err(Error::temporary(format!(
            "process {pid} of the server still streams slot {slot}; this walpost waits until that one ends"
        ))
        .caused_by(Busy));
    }
    let mut out_of_date =
        !is_claimed || progress.gap().is_some() && progress.position.missing.is_none();
    let mut unknown = None;
    if let Verdict::Unknown(why) = &verdict {
        refuse_busy(slot, state.as_ref(), why)?;
        warn!(
            slot,
            "{why}: rows that are not known as delivered are published from the table before the stream begins"
        );
        out_of_date = true;
        unknown = Some(Unknown {
            never_streamed: slot::never_streamed(client, slot).await?,
            timeline: here.timeline,
        });
    }
    // Of an unknown slot the timeline is stored with the scan: until then the next start finds it as unknown as this one.
    let timeline = unknown.is_none().then_some(here.timeline);
    session.is_behind.store(!is_claimed, Ordering::Relaxed);
    let claim = progress::claim(client, slot, &progress, &session.name, timeline).await?;
    Ok(Looked::Prepared(Box::new(Prepared {
        progress,
        claim,
        out_of_date,
        was_ours: is_claimed,
        left_out,
        unknown,
        stands: stands.unwrap_or(Lsn::ZERO),
    })))
}

/// Opens a gap of everything that is visible now and not delivered, before an unknown slot is streamed; does nothing where it
/// is known.
///
/// # Errors
/// Temporary when the server is away, or the row was changed.
pub async fn scan_up_to_now(
    client: &Client,
    config: &Config,
    prepared: &mut Prepared,
) -> Result<()> {
    let Some(unknown) = &prepared.unknown else {
        return Ok(());
    };
    // Of no slot that walpost did not make itself is it known what ran while it was made: see the module.
    let (publication, tables) = (&config.publication, &config.outbox_tables);
    let (upto, catalog) = if config.reconcile && has_synchronous_standbys(client).await? {
        // Not waited for: see the module. Without a catalogue no row since is taken for streamed.
        (progress::snapshot(client).await?, None)
    } else {
        let catalog = published::version(client, publication, tables).await?;
        let waits = waiting::SCAN_WAITS;
        let settling = Box::pin(settled(client));
        let upto = waiting::naming_holders(&config.postgres, waits, settling).await?;
        (upto, catalog)
    };
    let before = unknown.never_streamed.as_ref();
    let snapshots = (before, &upto);
    progress::scan_again(
        client,
        &prepared.claim,
        &mut prepared.progress,
        snapshots,
        (unknown.timeline, prepared.stands),
        catalog,
    )
    .await?;
    prepared.unknown = None;
    Ok(())
}

async fn make_anew(
    client: &Client,
    config: &Config,
    state: Option<&SlotState>,
    why: &str,
) -> Result<Progress> {
    let slot = &config.slot;
    if config.slot_lost == SlotLost::Fail {
        return Err(Error::refused(format!("replication slot {slot}: {why}")).hint(
            "WALPOST_SLOT_LOST=recover makes a new one and publishes the rows in between from the table",
        ));
    }
    refuse_busy(slot, state, why)?;
    warn!(
        slot,
        "{why}: making a new slot; the rows in between are published from the table"
    );
    if let Some(state) = state {
        let row = client
            .query_one("SELECT current_database()::text", &[])
            .await;
        let row = row.map_err(|error| sql_error("ask for the database's name", error))?;
        let ours: String = row.get(0);
        if state.plugin.as_deref() != Some(PLUGIN) || state.database.as_ref() != Some(&ours) {
            return Err(Error::refused(format!(
                "replication slot {slot}: {why}; the slot of that name is not one of {PLUGIN} in this database"
            ))
            .hint("drop it if nobody needs it, or set WALPOST_SLOT to a name that is free, then: walpost init"));
        }
        let drop_slot = "SELECT pg_drop_replication_slot($1::text::name)";
        let dropped = client.execute(drop_slot, &[slot]).await;
        dropped.map_err(|error| sql_error(&format!("drop slot {slot}"), error))?;
    }
    let making = Box::pin(make_slot(
        client,
        slot,
        &config.publication,
        &config.outbox_tables,
    ));
    waiting::naming_holders(&config.postgres, waiting::SLOT_WAITS, making).await
}

fn refuse_busy(slot: &str, state: Option<&SlotState>, why: &str) -> Result<()> {
    match state.and_then(|state| state.active_pid) {
        Some(pid) => Err(Error::temporary(format!(
            "replication slot {slot}: {why}, and process {pid} still streams it"
        ))),
        None => Ok(()),
    }
}

/// The tables that a scan has to leave out.
///
/// # Errors
/// Refused where that loses rows and the settings do not accept it.
async fn left_out(
    client: &Client,
    config: &Config,
    progress: &Progress,
    verdict: &Verdict,
) -> Result<Vec<TableName>> {
    let missing = progress.position.missing.as_ref();
    // A missing gap concerns only the tables that it names.
    let is_behind = progress.delivered.is_some() && missing.is_none();
    let has_gap = progress.gap().is_some() || progress.is_cut_short();
    let (why, loses) = match verdict {
        Verdict::Ours if progress.gap().is_none() => return Ok(Vec::new()),
        Verdict::Ours => ("it was made anew", is_behind),
        Verdict::Unknown(why) => (&**why, has_gap && is_behind),
        Verdict::Lost(why) => (&**why, true),
    };
    let mut found = Vec::new();
    for name in &config.outbox_tables {
        if table::describe(client, name).await?.is_none() {
            return Err(
                Error::refused(format!("table {name} does not exist in this database"))
                    .hint("walpost init; or name an existing table in WALPOST_OUTBOX_TABLE"),
            );
        }
        if ScanTable::describe(client, name).await?.is_none() {
            found.push(name.clone());
        }
    }
    // These tables had the columns when they were compared.
    let is_missing =
        |name: &TableName| missing.is_some_and(|missing| missing.0.contains_key(&name.to_string()));
    let (why, loses) = if !loses && found.iter().any(is_missing) {
        ("the stream did not bring rows of the table", true)
    } else {
        (why, loses)
    };
    if loses && !found.is_empty() && config.slot_lost != SlotLost::Restart {
        return Err(cannot_recover(&config.slot, why, &found));
    }
    Ok(found)
}

/// The refusal, with every way out.
fn cannot_recover(slot: &str, why: &str, tables: &[TableName]) -> Error {
    let names: Vec<String> = tables.iter().map(ToString::to_string).collect();
    let mends: Vec<String> = tables.iter().map(add_columns).collect();
    Error::refused(format!(
        "replication slot {slot}: {why}; rows that are not delivered yet cannot be read from {}, which has no columns txid (xid8) and seq (bigint)",
        names.join(", ")
    ))
    .hint(format!(
        "to publish every row of the table again, those that were delivered too, and to recover by itself from then on: {}; \
         to give up the rows in between: WALPOST_SLOT_LOST=restart walpost run",
        mends.join("; ")
    ))
}

/// The statements that let a table be scanned, and those that do it without a long lock. (The default of txid is no volatile
/// function, so the first column rewrites nothing; each row gets the transaction of the statement, which commits behind its own.)
fn add_columns(name: &TableName) -> String {
    format!(
        "ALTER TABLE {name} ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
         ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY (rewrites the table under an exclusive lock, and a column of another type is renamed first; without that lock, see \
         \"Adding txid and seq to a table in use\" in OPERATIONS.md)"
    )
}

/// What is asked of the server besides the slot.
struct Here {
    timeline: u32,
    log_end: Lsn,
}

/// What the slot is.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The one that walpost left, as it left it.
    Ours,
    /// It streams, and nobody knows what it was told.
    Unknown(String),
    /// It will not bring what is missing.
    Lost(String),
}

fn judge(
    state: Option<&SlotState>,
    progress: &Progress,
    session: &Session,
    here: &Here,
) -> Verdict {
    let Some(state) = state else {
        return Verdict::Lost("it does not exist any more".to_owned());
    };
    // The slot was made anew and its gap is open: what was known of the one before says nothing of it.
    let is_new = progress.gap().is_some() && progress.position.missing.is_none();
    // What this process knows of the slot is out of date when another one has claimed it since.
    let ours = progress.session.as_ref() == Some(&session.name)
        && !session.is_behind.load(Ordering::Relaxed);
    let unreadable = session.unreadable.as_ref();
    if let Some(why) = unreadable.filter(|_| ours && !is_new) {
        return Verdict::Lost(why.clone());
    }
    if let Some(reason) = state.lost_because() {
        return Verdict::Lost(format!("it is lost ({reason})"));
    }
    if let Some(why) = state.unfit_because() {
        return Verdict::Lost(why.to_owned());
    }
    let stands = state.confirmed_flush.unwrap_or(Lsn::ZERO);
    if stands > here.log_end {
        return Verdict::Lost(format!(
            "it stands at {stands}, and the log ends at {}: it is from another server or time",
            here.log_end
        ));
    }
    if let Some(known) = progress.timeline.filter(|known| *known != here.timeline) {
        let now = here.timeline;
        return if state.synced {
            Verdict::Unknown(format!(
                "the cluster was on timeline {known} and is on {now}, a standby's that kept the slot in step"
            ))
        } else {
            Verdict::Lost(format!(
                "the cluster was on timeline {known} and is on {now}, and the slot is not known to be the one of before"
            ))
        };
    }
    if progress.is_cut_short() {
        return Verdict::Unknown("its making was cut short".to_owned());
    }
    if progress.scan_upto.is_none() && progress.delivered.is_none() {
        return Verdict::Unknown("walpost has never streamed it".to_owned());
    }
    let of_comparison = progress.position.missing.is_some();
    if progress.scan_before.is_none() && progress.scan_upto.is_some() && !of_comparison {
        // Poll mode leaves it so, and the statements that a person is told to give. (So does a comparison of stream and table, which
        // says which rows it means.)
        return Verdict::Unknown("the table was last read without regard to the slot".to_owned());
    }
    let never_claimed = progress.session.is_none() && progress.scan_upto.is_some();
    let as_left = progress.confirmed == state.confirmed_flush && progress.confirmed.is_some();
    if progress.timeline.is_none() && !never_claimed && !as_left {
        return Verdict::Unknown(
            "an earlier version of walpost did not note what it is".to_owned(),
        );
    }
    let told = session.told.filter(|_| ours && !is_new);
    match told.or(progress.confirmed) {
        Some(known) if stands > known => Verdict::Lost(format!(
            "it stands at {stands}, and walpost left it at {known}: somebody advanced it, or made it anew"
        )),
        _ => Verdict::Ours,
    }
}

/// To be asked when the walsender has taken the slot: whether it is the one that was judged. `known` is where that one stood, or
/// what this process told it since.
///
/// # Errors
/// Temporary when it is not.
pub async fn check_unchanged(client: &Client, slot: &str, known: Lsn) -> Result<()> {
    let state = slot_state(client, slot).await?;
    match changed_since(state.as_ref(), known) {
        Some(how) => Err(Error::temporary(format!(
            "replication slot {slot} {how} before the stream began: looking at it again"
        ))),
        None => Ok(()),
    }
}

/// What a refused `START_REPLICATION` means: temporary when the slot was changed since it was judged, so that it is looked at
/// again; else the refusal itself.
pub async fn refused_start(client: &Client, slot: &str, known: Lsn, error: Error) -> Error {
    if !sqlstate(&error).is_some_and(|code| CHANGED_SLOT.contains(&code)) {
        return error;
    }
    match slot_state(client, slot).await {
        Ok(state) => match changed_since(state.as_ref(), known) {
            Some(how) => Error::temporary(format!(
                "replication slot {slot} {how} before the stream began: looking at it again"
            ))
            .caused_by(error),
            None => error,
        },
        Err(away) => away,
    }
}

fn changed_since(state: Option<&SlotState>, known: Lsn) -> Option<String> {
    let Some(state) = state else {
        return Some("was dropped".to_owned());
    };
    if let Some(reason) = state.lost_because() {
        return Some(format!("was lost ({reason})"));
    }
    if state.two_phase {
        return Some("was made anew with two_phase".to_owned());
    }
    let stands = state.confirmed_flush.filter(|stands| *stands > known)?;
    Some(format!("moved from {known} to {stands}"))
}

/// Neither slot nor row.
#[derive(Debug)]
struct NothingSetUp;

impl std::fmt::Display for NothingSetUp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("walpost.progress has no row of it")
    }
}

impl std::error::Error for NothingSetUp {}

fn nothing_set_up(slot: &str) -> Error {
    Error::temporary(format!("replication slot {slot} does not exist"))
        .hint("walpost init")
        .caused_by(NothingSetUp)
}

/// True for an error of [`prepare`] that says nothing was ever set up; what is missing first is the preflight's to say.
pub fn is_nothing_set_up(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    source
        .and_then(|source| source.downcast_ref::<NothingSetUp>())
        .is_some()
}

/// How long a session that ends is given to say so.
const UNLOCK: Duration = Duration::from_secs(1);

/// Takes the slot's advisory lock, which is held until the session ends. Who holds it may write `walpost.progress` and make the slot.
///
/// The server is told how to find out that we are gone without a word (a host without power, a network that forgot the connection). That says
/// nothing of a process that is stopped: its kernel answers. So the server also ends the session when it is idle for longer than anything that is
/// done between the lock and the lease ([`crate::lease`], which asks it every second from then on, and shortens that). (On a Unix socket the first
/// three change nothing.)
///
/// # Errors
/// Temporary with [`is_busy`] true while another session has it.
pub async fn lock(client: &Client, slot: &str) -> Result<()> {
    const KEEP: &str = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3;
                        SET idle_session_timeout = '5min'";
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
pub async fn unlock(client: &Client) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scanner::missing::Missing;
    use crate::scanner::progress::Position;

    const HERE: Here = Here {
        timeline: 1,
        log_end: Lsn::new(10_000),
    };

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
            two_phase: false,
            temporary: false,
            failover: false,
            synced: false,
        }
    }

    fn session(told: Option<u64>) -> Session {
        Session {
            name: "we".to_owned(),
            told: told.map(Lsn::new),
            unreadable: None,
            is_behind: Arc::default(),
        }
    }

    /// Of a slot that was streamed and noted.
    fn noted(session: &str, confirmed: Option<u64>) -> Progress {
        Progress {
            session: Some(session.to_owned()),
            delivered: Some("5:5:".to_owned()),
            confirmed: confirmed.map(Lsn::new),
            timeline: Some(1),
            ..Progress::default()
        }
    }

    fn is_lost(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Lost(_))
    }

    fn is_unknown(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Unknown(_))
    }

    #[test]
    fn a_slot_is_ours_unless_it_is_gone_lost_or_beyond_what_it_was_told() {
        let new = session(None);
        let crashed = noted("they", None);
        let stopped = noted("they", Some(100));
        let judge = |state: Option<&SlotState>, progress: &Progress, session: &Session| {
            judge(state, progress, session, &HERE)
        };
        assert_eq!(judge(Some(&slot(500)), &crashed, &new), Verdict::Ours);
        assert_eq!(judge(Some(&slot(100)), &stopped, &new), Verdict::Ours);
        assert_eq!(judge(Some(&slot(90)), &stopped, &new), Verdict::Ours);
        assert!(is_lost(&judge(Some(&slot(101)), &stopped, &new)));
        // A process knows what it told, unless another has streamed since.
        let (ours, theirs) = (noted("we", None), noted("they", None));
        let told = session(Some(300));
        assert_eq!(judge(Some(&slot(300)), &ours, &told), Verdict::Ours);
        assert!(is_lost(&judge(Some(&slot(301)), &ours, &told)));
        assert_eq!(judge(Some(&slot(301)), &theirs, &told), Verdict::Ours);
        // Also where it has claimed the slot again since, in an opening that came no further.
        let behind = session(Some(300));
        behind.is_behind.store(true, Ordering::Relaxed);
        assert_eq!(judge(Some(&slot(301)), &ours, &behind), Verdict::Ours);
        // That a log could not be read on says nothing of the slot that another process has made since.
        let mut unreadable = session(None);
        unreadable.unreadable = Some("because".to_owned());
        assert!(is_lost(&judge(Some(&slot(300)), &ours, &unreadable)));
        assert_eq!(judge(Some(&slot(300)), &theirs, &unreadable), Verdict::Ours);
        assert!(is_lost(&judge(None, &crashed, &new)));
        assert!(is_lost(&judge(Some(&slot(10_001)), &crashed, &new)));
        let mut lost = slot(1);
        lost.wal_status = Some("lost".into());
        assert!(is_lost(&judge(Some(&lost), &crashed, &new)));
        let mut two_phase = slot(90);
        two_phase.two_phase = true;
        assert!(is_lost(&judge(Some(&two_phase), &stopped, &new)));
        // Made by us and never streamed: it stands where it was made.
        let made = Progress {
            scan_before: Some("1:1:".to_owned()),
            scan_upto: Some("2:2:".to_owned()),
            confirmed: Some(Lsn::new(100)),
            timeline: Some(1),
            ..Progress::default()
        };
        assert_eq!(judge(Some(&slot(100)), &made, &new), Verdict::Ours);
        assert!(is_lost(&judge(Some(&slot(101)), &made, &new)));
    }

    #[test]
    fn a_position_of_another_timeline_proves_nothing() {
        let here = Here {
            timeline: 2,
            ..HERE
        };
        // Told 0/5000 before; the slot on the promoted standby stands at less.
        let before = noted("we", None);
        let told = session(Some(0x5000));
        let judge = |state: &SlotState| judge(Some(state), &before, &told, &here);
        assert!(is_lost(&judge(&slot(0x2600))));
        let mut synced = slot(0x2600);
        synced.synced = true;
        assert!(is_unknown(&judge(&synced)));
        synced.wal_status = Some("lost".into());
        assert!(is_lost(&judge(&synced)));
    }

    #[test]
    fn a_slot_of_which_nothing_is_noted_is_unknown() {
        let new = session(None);
        let judge = |progress: &Progress| judge(Some(&slot(100)), progress, &new, &HERE);
        let nothing = Progress::default();
        assert!(is_unknown(&judge(&nothing)));
        let claimed = Progress {
            session: Some("they".to_owned()),
            timeline: Some(1),
            ..nothing.clone()
        };
        assert!(is_unknown(&judge(&claimed)));
        let cut_short = Progress {
            scan_before: Some("1:1:".to_owned()),
            timeline: Some(1),
            ..nothing.clone()
        };
        assert!(is_unknown(&judge(&cut_short)));
        let polled = Progress {
            scan_upto: Some("7:7:".to_owned()),
            ..noted("they", None)
        };
        assert!(is_unknown(&judge(&polled)));
        // Rows that a comparison of stream and table found say nothing of the slot.
        let compared = Progress {
            position: Position {
                missing: Some(Missing::default()),
                ..Position::default()
            },
            ..polled
        };
        assert_eq!(judge(&compared), Verdict::Ours);
        // Of an earlier version only a good stop, or a slot that was just made, is good enough.
        let earlier = |confirmed| Progress {
            timeline: None,
            ..noted("they", confirmed)
        };
        assert_eq!(judge(&earlier(Some(100))), Verdict::Ours);
        assert!(is_unknown(&judge(&earlier(Some(101)))));
        assert!(is_unknown(&judge(&earlier(None))));
        let made = Progress {
            scan_before: Some("1:1:".to_owned()),
            scan_upto: Some("2:2:".to_owned()),
            ..nothing
        };
        assert_eq!(judge(&made), Verdict::Ours);
    }

    #[test]
    fn a_slot_that_was_changed_before_the_stream_is_noticed() {
        let known = Lsn::new(100);
        assert_eq!(changed_since(Some(&slot(100)), known), None);
        assert_eq!(changed_since(Some(&slot(90)), known), None);
        assert!(changed_since(Some(&slot(101)), known).is_some());
        assert!(changed_since(None, known).is_some());
    }
}
