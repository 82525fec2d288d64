//! The delivered snapshot: every few seconds, which transactions are delivered; and whether the stream brought every row of them.
//!
//! A task beside one [`Pipe`](crate::pipe::Pipe), with a SQL connection of its own. It lives as long as the pipe: what it waits for is
//! that pipe's confirmed LSN (see the argument in [`super`]), over a channel that belongs to this pipe alone. A stream that is
//! lost and made anew goes on with the same pipe and the same log. A pipe that is dropped (another cluster or timeline, another
//! owner of the slot, a slot that was made anew) takes this task with it, so a position of one log never counts for another.
//!
//! Input: [`Handover`]s of the connector, each with the rows that were taken and the confirmed LSN. Output: `walpost.progress.delivered`, one
//! write in place of one for each event; and [`Verdict`]s, which end the stream.
//!
//! # One note
//!
//! 1. Ask the catalogue whether the publication sends every row of the tables ([`published`]). What it leaves out now ends the stream (69).
//! 2. List the leaf tables ([`super::coverage`]). Read the version of the publication and the tables ([`published::version`]). Take a snapshot `N`,
//!    then read where the log's insert position L is, and whose log that is: the session is another one than the stream's, and may have found a promoted
//!    standby before the stream did. A version is stored with `N` only when no transaction runs that is older than the version: its rows may have
//!    been written, and left out of the stream, under an earlier one, and `N` does not cover them. (ALTER PUBLICATION does not wait for the writers of
//!    the table.)
//! 3. Wait until the confirmed LSN is at L. All rows taken before that were handed over with it or before it: a handover holds all rows that
//!    were taken before its confirmed LSN was read.
//! 4. Compare ([`super::reconcile`]): first the leaf tables, then the rows. (In this order, because a leaf that is attached between the two is in the
//!    comparison then, and is new at the next note: published twice at worst. In the other order its rows would be left out.)
//!    Rows that seem to be missing are looked for again, behind the log position of then, up to [`LOOKS`] times: a copy of a row, with the `txid` of the
//!    row that it was copied from, may have been committed between 3 and 4, and the stream has brought it by the next look.
//! 5. Nothing is missing: store `N`. Otherwise store what is missing as a gap, and let the connector publish it: it waits
//!    for its receipts, ends the stream, and opens again, which closes the gap before the next stream starts. So a straggler among
//!    these rows, and the order of a key's stragglers, are treated as in every scan; and a crash in between loses nothing.
//!
//! Nothing is written while no event passes and no row is missing.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;
use tracing::{debug, warn};

use super::cluster::Log;
use super::comparison::{Before, Comparison, Found, scannable, tell};
use super::coverage::Seen;
use super::handover::{Carried, Heard, Message};
use super::moment::Moment;
use super::progress::{self, Snapshot};
use super::reconcile::leaves_of;
use super::snapshot::VisibleXids;
use super::streamed::StreamedRows;
use crate::meter::Meter;
use crate::postgres::published::{self, Subscription};
use crate::postgres::{PostgresConfig, TableName, connect_sql, slot, waiting};
use crate::upkeep::{Undone, Work};
use crate::{Error, Lsn, Result};

/// Comparisons before rows count as missing.
const LOOKS: u32 = 3;
/// An old transaction is told of when so many rounds in a row were held up by it.
const HELD_UP_ROUNDS: u32 = 3;
/// How long after a refusal the catalogue is asked once more.
const AGAIN: Duration = Duration::from_millis(200);
/// A comparison may take a tenth of the time, not more: a table without an index on `txid` is read whole.
const PAUSE_FACTOR: u32 = 10;

/// Why the stream has to end.
#[derive(Debug)]
pub enum Verdict {
    /// Rows are missing, and `walpost.progress` says which. They are published when the connector opens again.
    Missing,
    /// Nothing that the stream brings can be trusted.
    Failed(Error),
}

/// What the task begins with.
#[derive(Debug)]
pub struct Start {
    /// Where the tables are.
    pub postgres: PostgresConfig,
    /// The log that the pipe reads.
    pub log: Log,
    /// The right to write the slot's row.
    pub claim: progress::Claim,
    /// `WALPOST_SCAN_INTERVAL`.
    pub interval: Duration,
    /// `WALPOST_RECONCILE`.
    pub compares: bool,
    /// The outbox tables.
    pub tables: Vec<TableName>,
    /// The publication and what it has to send, which is looked at in each round.
    pub subscription: Subscription,
    /// The row in `walpost.progress`, as it is now.
    pub progress: progress::Progress,
    /// What is visible in it is not compared: an earlier process brought it, or part of it, and nobody knows which.
    pub unchecked: Option<Snapshot>,
    /// From the task before.
    pub carried: Carried,
    /// By table: whether it has the columns that a comparison needs, so that its rows are counted from now on.
    pub scannable: Vec<bool>,
    /// For whoever watches.
    pub meter: std::sync::Arc<Meter>,
}

/// The task.
pub(super) struct Task {
    start: Start,
    heard: Heard,
    verdicts: mpsc::Sender<Verdict>,
    client: Option<Client>,
    /// What is visible in it is not compared.
    unchecked: Option<Snapshot>,
    /// The version of the publication and tables that was read or stored last.
    version: Option<String>,
    /// A transaction with a lower id may have written rows under an earlier version: while one of them runs, `catalog` is NULL.
    changed_before: Option<u64>,
    /// See [`Carried::counted`].
    counted: Vec<bool>,
    short_rounds: u32,
    /// Rounds in a row that failed.
    failures: u32,
    /// The oldest running transaction while there are buckets, and for how many rounds.
    held_up: (u64, u32),
    /// The row in `walpost.progress` is as the last statement left it.
    is_known: bool,
    /// [`Heard::done`] at the last note.
    noted: u64,
}

/// How a round ended.
enum Round {
    Over,
    /// The task is to end.
    Interrupted,
    /// The connector is to publish what is missing.
    Missing,
    /// The publication or a table is not as the stream needs it.
    Refused(Error),
}

impl Task {
    pub(super) fn new(
        start: Start,
        inbox: mpsc::Receiver<Message>,
        verdicts: mpsc::Sender<Verdict>,
    ) -> Self {
        let known = start.carried.streamed.clone();
        let unchecked = start.unchecked.clone();
        let nothing = || vec![StreamedRows::default(); start.tables.len()];
        let counted = match &known {
            Some(_) => start.carried.counted.clone(),
            // What is older than the stream is not compared at all.
            None => vec![true; start.tables.len()],
        };
        let streamed = known.unwrap_or_else(nothing);
        Self {
            heard: Heard::new(inbox, streamed),
            verdicts,
            client: None,
            unchecked,
            version: start.progress.catalog.clone(),
            changed_before: None,
            counted: counted
                .iter()
                .zip(&start.scannable)
                .map(|(counted, scannable)| *counted && *scannable)
                .collect(),
            short_rounds: start.carried.short_rounds,
            failures: 0,
            held_up: (0, 0),
            is_known: true,
            noted: 0,
            start,
        }
    }

    /// Makes notes until it is told to end, or its keeper is gone.
    pub(super) async fn run(mut self) {
        let mut pause = self.start.interval;
        loop {
            let began = Instant::now();
            let round = self.round(&mut pause).await;
            self.tell_failure(round.as_ref().err());
            let over = match round {
                Ok(Round::Over) => false,
                Ok(Round::Interrupted) => true,
                Ok(Round::Missing) => self.end_stream(Verdict::Missing).await,
                Ok(Round::Refused(error)) => self.end_stream(Verdict::Failed(error)).await,
                Err(error) => {
                    // A statement whose answer is lost may have been carried out: the row is read again.
                    (self.client, self.is_known) = (None, false);
                    warn!("what is delivered could not be noted: {}", error.report());
                    false
                }
            };
            if over
                || self
                    .heard
                    .during(sleep_until(began + pause))
                    .await
                    .is_none()
            {
                break;
            }
        }
        if let Some(answer) = self.heard.finish.take() {
            let known = self.unchecked.is_none().then_some(self.heard.streamed);
            let carried = Carried {
                streamed: known,
                counted: self.counted,
                short_rounds: self.short_rounds,
            };
            // Nobody waits any more: the process is about to end.
            let _nobody = answer.send(carried);
        }
    }

    /// One failure may be a connection that is lost; the second in a row is a state, for readiness and `/status`.
    fn tell_failure(&mut self, failure: Option<&Error>) {
        let mut undone = Undone::default();
        self.failures = failure.map_or(0, |_| self.failures + 1);
        if let Some(error) = failure.filter(|_| self.failures > 1) {
            undone.add("walpost.progress", error);
        }
        self.start.meter.upkeep().set(Work::Note, undone);
    }

    /// The connector hears of it, and ends this task; true when it did.
    async fn end_stream(&mut self, verdict: Verdict) -> bool {
        if self.verdicts.send(verdict).await.is_err() {
            return true;
        }
        self.heard
            .during(std::future::pending::<()>())
            .await
            .is_none()
    }

    /// One note, if there is anything to be noted.
    async fn round(&mut self, pause: &mut Duration) -> Result<Round> {
        let known = self.client.take().filter(|client| !client.is_closed());
        let client = if let Some(client) = known {
            client
        } else {
            let connecting = connect_sql(&self.start.postgres, "walpost scanner");
            match self.heard.during(connecting).await {
                Some(client) => client?,
                None => return Ok(Round::Interrupted),
            }
        };
        let noted = self.note(&client, pause).await;
        self.client = Some(client);
        noted
    }

    /// What keeps rows out of the stream is told at once; the comparison finds the rows. `None`: nothing does.
    async fn look(&mut self, client: &Client) -> Result<Option<Round>> {
        let looking = published::watch(client, &self.start.subscription);
        match self.heard.during(looking).await {
            None => Ok(Some(Round::Interrupted)),
            Some(Err(error)) if !error.is_temporary() => {
                // Once more: what a statement sees of the catalogue may be of two moments.
                let again = async {
                    sleep_until(Instant::now() + AGAIN).await;
                    published::watch(client, &self.start.subscription).await
                };
                match self.heard.during(again).await {
                    None => Ok(Some(Round::Interrupted)),
                    Some(Err(again)) if !again.is_temporary() => Ok(Some(Round::Refused(again))),
                    Some(looked) => looked.map(|()| None),
                }
            }
            Some(looked) => looked.map(|()| None),
        }
    }

    #[allow(
        clippy::too_many_lines,
        reason = "the steps of one round, each with its early end"
    )]
    async fn note(&mut self, client: &Client, pause: &mut Duration) -> Result<Round> {
        if !self.is_known {
            let reading = progress::reread(client, &self.start.claim);
            let Some(read) = self.heard.during(reading).await else {
                return Ok(Round::Interrupted);
            };
            (self.start.progress, self.is_known) = (read?, true);
            if self.start.progress.gap().is_some() {
                return Ok(Round::Missing);
            }
        }
        if let Some(ended) = self.look(client).await? {
            return Ok(ended);
        }
        // Before the snapshot: what is done later may be in transactions that it does not show, and a table that has its columns only
        // then was not counted from it on.
        let done = self.heard.done;
        let tables = &self.start.tables;
        let describing = async {
            let tables = scannable(client, tables).await?;
            let had_columns = tables.iter().map(Option::is_some).collect();
            // And a leaf table that is attached only then may have rows that it does not show.
            let leaves = leaves_of(client, &self.start.tables).await?;
            Ok::<_, Error>(Before {
                had_columns,
                leaves,
            })
        };
        let Some(before) = self.heard.during(describing).await else {
            return Ok(Round::Interrupted);
        };
        let before = before?;
        let Some(Moment {
            catalog,
            snapshot: taken,
            position,
            ..
        }) = self.moment(client).await?
        else {
            return Ok(Round::Interrupted);
        };
        let stored = self.start.progress.delivered.clone();
        let covered = self.start.progress.tables.as_ref();
        let is_covered = covered.is_none_or(|covered| {
            let mut leaves = before.leaves.iter().flat_map(Seen::iter);
            leaves.all(|leaf| covered.is_whole(leaf))
        });
        if done == self.noted && stored.as_ref() == Some(&taken) && is_covered {
            return Ok(Round::Over);
        }
        let (mut behind, mut looks) = (position, 1);
        let (upto, found) = loop {
            if let Some(ended) = self.confirmed(client, behind).await? {
                return Ok(ended);
            }
            let began = Instant::now();
            let streamed = self.heard.streamed.clone();
            let end = edge(&streamed, &taken, stored.as_ref())?;
            if looks == 1 && end.as_ref() != Some(&taken) {
                self.tell_held_up(client, &taken).await?;
            }
            let Some(upto) = end else {
                return Ok(Round::Over);
            };
            let comparison = Comparison {
                client,
                tables: &self.start.tables,
                covered: self.start.progress.tables.as_ref(),
                unchecked: self.unchecked.as_ref(),
                counted: &self.counted,
                before: &before,
            };
            let found = async {
                match stored.as_ref().filter(|_| self.start.compares) {
                    Some(delivered) => comparison.all(&upto, delivered, &streamed).await,
                    None => comparison.trust(&upto, stored.as_ref()).await,
                }
            };
            let found = self.heard.during(found).await.transpose()?;
            let Some(found) = found else {
                return Ok(Round::Interrupted);
            };
            *pause = self.start.interval.max(began.elapsed() * PAUSE_FACTOR);
            let now = self.heard.streamed.iter().zip(&streamed);
            if now
                .into_iter()
                .any(|(now, then)| now.shift() != then.shift())
            {
                // The buckets have become wider meanwhile: the next round compares those.
                return Ok(Round::Over);
            }
            let is_short = found.told.iter().any(|(_, compared, _)| compared.short > 0);
            if !is_short || looks == LOOKS {
                break (upto, found);
            }
            looks += 1;
            let Some(now) = self.heard.during(slot::insert_position(client)).await else {
                return Ok(Round::Interrupted);
            };
            behind = now?;
        };
        let is_whole = upto == taken;
        let oldest = VisibleXids::parse(&upto)?.xmin();
        let changed_before = self.changed_before;
        let catalog = catalog.filter(|_| changed_before.is_none_or(|before| before <= oldest));
        if !found.missing.is_empty() {
            return self.note_missing(client, upto, found, catalog).await;
        }
        self.short_rounds = 0;
        self.start.meter.set_short_rounds(0);
        let changed = found.covered != self.start.progress.tables;
        // Once behind an unclean start even where nothing passes: from then on everything is compared.
        let is_checked = self.unchecked.is_none();
        if done == self.noted && found.rows == 0 && !changed && !found.skipped && is_checked {
            return Ok(Round::Over);
        }
        let progress = &mut self.start.progress;
        let (claim, covered) = (&self.start.claim, found.covered);
        let noting = progress::delivered(client, claim, progress, &upto, covered, catalog);
        self.heard.throughout(noting).await?;
        debug!(snapshot = upto, %position, "delivered");
        self.forget(&upto)?;
        self.count_from_now_on(found.counted);
        if is_whole {
            self.noted = done;
        }
        Ok(Round::Over)
    }

    /// What the next note is of; `None` when the task is to end.
    async fn moment(&mut self, client: &Client) -> Result<Option<Moment>> {
        let streamed = (&self.start.log, self.heard.confirmed);
        let known = self.version.as_ref();
        let taking = Moment::take(client, &self.start.subscription, known, streamed);
        let taken = self.heard.during(taking).await.transpose()?;
        if let Some(moment) = &taken
            && moment.changed_before.is_some()
        {
            self.changed_before = moment.changed_before;
            self.version.clone_from(&moment.catalog);
        }
        Ok(taken)
    }

    /// What can be noted ends before the oldest running transaction, because there are buckets. Says once if that stays the same one.
    async fn tell_held_up(&mut self, client: &Client, taken: &Snapshot) -> Result<()> {
        let taken = VisibleXids::parse(taken)?;
        let (xmin, rounds) = self.held_up;
        let rounds = if xmin == taken.xmin() { rounds + 1 } else { 1 };
        self.held_up = (taken.xmin(), rounds);
        if rounds != HELD_UP_ROUNDS {
            return Ok(());
        }
        let asking = slot::still_running(client, taken.xmax());
        let Some(running) = self.heard.during(asking).await else {
            return Ok(());
        };
        if let Some(oldest) = running?.first() {
            let asking = waiting::holder_of(client, *oldest);
            let Some(holder) = self.heard.during(asking).await else {
                return Ok(());
            };
            let holder =
                holder?.map_or(format!("transaction {oldest}"), |holder| holder.to_string());
            warn!(
                "what is delivered is not noted until an old transaction ends: {holder} (rows arrive and stay pending; more transactions have \
                 come since it began than can be counted one by one)"
            );
        }
        Ok(())
    }

    /// Waits until everything before this position is confirmed; `None`: it is.
    async fn confirmed(&mut self, client: &Client, position: Lsn) -> Result<Option<Round>> {
        while self.heard.confirmed < position {
            // In a backlog this may take hours, in which the publication is looked at all the same.
            if !self.heard.confirmed(position, self.start.interval).await {
                return Ok(Some(Round::Interrupted));
            }
            if let Some(ended) = self.look(client).await? {
                return Ok(Some(ended));
            }
        }
        Ok(None)
    }

    /// Forgets what is covered from now on.
    fn forget(&mut self, upto: &Snapshot) -> Result<()> {
        let compared = VisibleXids::parse(upto)?;
        for rows in &mut self.heard.streamed {
            rows.forget(&compared);
        }
        self.unchecked = None;
        Ok(())
    }

    fn count_from_now_on(&mut self, counted: Vec<bool>) {
        // Where nothing is compared nothing is known of the tables.
        if !counted.is_empty() {
            self.counted = counted;
        }
    }

    /// Stores the gap; the connector closes it.
    async fn note_missing(
        &mut self,
        client: &Client,
        upto: Snapshot,
        found: Found,
        catalog: Option<String>,
    ) -> Result<Round> {
        for (table, compared, partitions) in &found.told {
            tell(table, compared, *partitions);
        }
        self.short_rounds += 1;
        self.start.meter.set_short_rounds(self.short_rounds);
        let progress = &mut self.start.progress;
        let position = progress::Position {
            missing: Some(found.missing),
            covered: self
                .start
                .tables
                .iter()
                .map(ToString::to_string)
                .zip(found.seen)
                .collect(),
            ..progress::Position::default()
        };
        let claim = &self.start.claim;
        let noting = progress::missing(client, claim, progress, &upto, position, catalog);
        self.heard.throughout(noting).await?;
        self.forget(&upto)?;
        self.count_from_now_on(found.counted);
        Ok(Round::Missing)
    }
}

/// The snapshot that can be noted: `upto` itself, or where transactions are counted in buckets the last edge of all buckets below every
/// running transaction. `None`: that one lies before what is delivered; nothing can be noted now.
fn edge(
    streamed: &[StreamedRows],
    upto: &Snapshot,
    delivered: Option<&Snapshot>,
) -> Result<Option<Snapshot>> {
    let buckets = streamed.iter().filter(|rows| rows.shift() > 0);
    let xmin = VisibleXids::parse(upto)?.xmin();
    let Some(edge) = buckets.map(|rows| rows.edge(xmin)).min() else {
        return Ok(Some(upto.clone()));
    };
    let covered = delivered
        .map(|delivered| VisibleXids::parse(delivered))
        .transpose()?;
    let is_behind = covered.is_none_or(|covered| covered.xmax() <= edge);
    Ok(is_behind.then(|| format!("{edge}:{edge}:")))
}
