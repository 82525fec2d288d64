//! The mark that a process leaves when the names of its producers may not be used any more: a higher `producer_generation` in `walpost.progress`.
//!
//! # Why
//!
//! A broker that deduplicates knows one number for each producer's name: the highest id. When it has refused a frame and stored one behind it, it calls the
//! refused one "stored before" from then on. The process that read the refusal knows better, and sends what has no receipt under another name (see `pulsar::producer`, "Doubt").
//! A process that begins afterwards does not: it would open the same names, be told a number above the refused id, and take the answer for a receipt.
//! The event would be lost. So the generation is a part of the names, and a process uses the one that is stored. Names of a
//! generation that is not stored yet were never used.
//!
//! # When it is stored
//!
//! * At once, when the producer raises its [`Doubts`]: a task with a session of its own stores the mark beside everything else. Nothing waits for it. It is needed when the
//!   process ends before the events have their receipts under another name; a kill within the milliseconds in between is not covered, and waiting would
//!   not cover it either.
//! * Before this process makes another publisher with the same names ([`NameMark::begin`]): what the one before knew is gone with it.
//! * Before the process ends ([`NameMark::end`]). The slot's lock is still held then, so no other process claims the row first. Where Postgres
//!   is away, the process waits for it: the next one could do nothing without Postgres either, so nothing is gained by an earlier end. The wait ends when
//!   the process is told to stop, when another process has claimed the row, or when the server refuses the statement. Then the error says that events may be
//!   lost, and what prevents it.
//!
//! Once is enough: while a higher generation is stored than the one in use, every later doubt of this publisher is covered.
//!
//! What it costs: events that were in flight when the process ended come again under the new names, so they may be there twice. Doubt costs repetitions, never an event.
//!
//! Without a `walpost.progress` there is no place for the mark. Within the process the generation is counted all the same.

use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::cluster::Log;
use super::progress::{self, Claim};
use crate::postgres::{PostgresConfig, answered, connect_sql, quote_literal};
use crate::pulsar::Doubts;
use crate::retry::Backoff;
use crate::{Error, Result};

/// `application_name` of the session that stores the mark.
const APPLICATION_NAME: &str = "walpost mark";
/// How long a process that was told to stop goes on trying.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the mark is to be stored.
#[derive(Clone, Debug)]
pub struct Place {
    /// The server.
    pub postgres: PostgresConfig,
    /// The log that the names tell of: names of another one are others anyway.
    pub log: Log,
    /// The slot, and the right to change its row.
    pub claim: Claim,
    /// First and longest pause between attempts.
    pub reconnect: (Duration, Duration),
}

/// The names in use, and the mark against them.
#[derive(Debug, Default)]
pub struct NameMark(Option<Current>);

#[derive(Debug)]
struct Current {
    generation: u64,
    doubts: Doubts,
    /// `None` without a `walpost.progress`.
    storing: Option<Storing>,
}

#[derive(Debug)]
struct Storing {
    place: Place,
    stored: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for Storing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl NameMark {
    /// A publisher is about to be made, and none with the same names is left. Gives the generation of its names, and what it is to raise. `place` is `None` without a
    /// `walpost.progress`; `stored` is the generation there, as it was read under the claim. `client` is the session that holds the slot's lock.
    ///
    /// # Errors
    /// Temporary when the names of the publisher before may not be used and this could not be stored.
    pub async fn begin(
        &mut self,
        client: &Client,
        place: Option<Place>,
        stored: u64,
    ) -> Result<(u64, Doubts)> {
        let mut generation = stored;
        if let Some(before) = &self.0 {
            generation = generation.max(before.generation);
            if before.doubts.is_raised() && generation == before.generation {
                generation += 1;
                if let Some(place) = &place {
                    let raising = progress::raise_generation(client, &place.claim, generation);
                    answered(
                        "store that producer names are not to be used again",
                        raising,
                    )
                    .await?;
                }
            }
        }
        let doubts = Doubts::default();
        let storing = place.map(|place| Storing::start(place, generation, doubts.clone()));
        self.0 = Some(Current {
            generation,
            doubts: doubts.clone(),
            storing,
        });
        Ok((generation, doubts))
    }

    /// The process is about to end like this: the mark is stored first, if one is needed. `told` resolves when the process is told to stop.
    ///
    /// # Errors
    /// `ended`; or, refused, that the mark could not be stored.
    pub async fn end<T>(&mut self, ended: Result<T>, told: impl Future<Output = ()>) -> Result<T> {
        let Err(unmarked) = self.leave(told).await else {
            return ended;
        };
        Err(match ended {
            Ok(_) => unmarked,
            Err(error) => unmarked.caused_by(error),
        })
    }

    async fn leave(&mut self, told: impl Future<Output = ()>) -> Result<()> {
        let Some(current) = self.0.take().filter(|it| it.doubts.is_raised()) else {
            return Ok(());
        };
        let Some(storing) = current.storing else {
            return Err(unmarked("there is no such table", None));
        };
        if *storing.stored.borrow() {
            return Ok(());
        }
        // From now on it is tried here: what the server refuses is said.
        let place = storing.place.clone();
        drop(storing);
        let giving_up = async {
            told.await;
            sleep(PATIENCE).await;
            Error::temporary("the time to stop was up")
        };
        let why = tokio::select! {
            biased;
            kept = keep_storing(&place, current.generation, true) => match kept {
                Ok(()) => return Ok(()),
                Err(why) => why,
            },
            why = giving_up => why,
        };
        let statement = format!(
            "UPDATE walpost.progress SET producer_generation = {} WHERE slot = {}",
            current.generation + 1,
            quote_literal(place.claim.slot()).trim()
        );
        Err(unmarked(&why.report(), Some(&statement)))
    }
}

impl Storing {
    fn start(place: Place, generation: u64, doubts: Doubts) -> Self {
        let (told, stored) = watch::channel(false);
        let its_place = place.clone();
        let task = async move {
            doubts.raised().await;
            if keep_storing(&its_place, generation, false).await.is_ok() {
                told.send_replace(true);
            }
        };
        Self {
            place,
            stored,
            task: tokio::spawn(task),
        }
    }
}

/// Tries until it is stored, or can be no more: another process has claimed the row, or `is_last` and the server refuses.
async fn keep_storing(place: &Place, generation: u64, is_last: bool) -> Result<()> {
    let mut backoff = Backoff::new(place.reconnect.0, place.reconnect.1);
    loop {
        let error = match store(place, generation).await {
            Ok(()) => {
                info!(
                    generation = generation + 1,
                    "the broker may have left out an event and stored a later one: the next start uses producer names that were never used"
                );
                return Ok(());
            }
            Err(error) => error,
        };
        if progress::is_changed(&error) || is_last && !error.is_temporary() {
            return Err(error);
        }
        let delay = backoff.next_delay();
        warn!(
            retry_in_ms = delay.as_millis(),
            "that producer names are not to be used again could not be stored: {}",
            error.report()
        );
        sleep(delay).await;
    }
}

async fn store(place: &Place, generation: u64) -> Result<()> {
    let client = connect_sql(&place.postgres, APPLICATION_NAME).await?;
    let storing = async {
        let undone = "that producer names are not to be used again is not stored there";
        place.log.check(&client, undone).await?;
        progress::raise_generation(&client, &place.claim, generation + 1).await
    };
    answered(
        "store that producer names are not to be used again",
        storing,
    )
    .await
}

/// The process ends without the mark.
fn unmarked(why: &str, statement: Option<&str>) -> Error {
    let other = "set WALPOST_PRODUCER_NAME to a name that was never used: what is not confirmed is then published again";
    let hint = match statement {
        Some(statement) => format!("{statement}; or {other}"),
        None => other.to_owned(),
    };
    Error::refused(format!(
        "events may be lost at the next start where the broker deduplicates: it may have left out some and stored later ones, and that producer \
         names are not to be used again could not be stored in walpost.progress ({why})"
    ))
    .hint(format!("before the next start: {hint}"))
}
