//! A topic of the broker: a partition, or a topic without partitions; its lanes, and how far the opening of their producers has come.
//!
//! ```text
//!            a lane needs            the broker            the shape            the producers
//!            a producer              is known              is known             are answered for
//!   Idle ───────────────► Finding ───────────► Counting ────────────► Creating ───────────────► Idle
//!                           ▲ ▲                    │ failed               │ one failed
//!                           │ └───── Pausing ◄─────┴──────────────────────┘
//!                           │           ▲
//!                           └───────────┴── at first, while the topic is in trouble
//! ```
//!
//! From `Pausing` a topic that has been in trouble for too long is given up (see `diversion`), and is `Idle` again.

use std::collections::HashMap;

use tokio::time::Instant;

use super::few::Few;
use super::lane::Accepted;
use super::route::Naming;
use super::trouble::{Failure, Trouble};
use crate::Error;
use crate::pulsar::wire::NextBroker;
use crate::retry::Backoff;

/// How far the opening of producers has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opening {
    /// Nothing is to be opened.
    Idle,
    /// Until the next attempt.
    Pausing { until: Instant },
    /// It waits for its broker.
    Finding,
    /// It waits until the partitions are counted.
    Counting { connection: u64 },
    /// So many producers are not answered for.
    Creating {
        left: usize,
        failed: bool,
        /// One was refused because there may be no more.
        limited: bool,
    },
}

/// See the module's documentation.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own, and every combination of them occurs"
)]
pub(super) struct Topic {
    pub name: String,
    /// The route that it belongs to.
    pub route: usize,
    /// By lane number; made when the first event comes.
    pub lanes: Vec<Option<usize>>,
    /// Lanes for the tails of huge transactions.
    pub dedicated: Vec<usize>,
    /// Fewer lanes than there may be, where the broker allows no more producers.
    pub few: Few,
    /// Ends the names of its producers.
    pub naming: Naming,
    /// Its lanes under other such names.
    pub earlier_lanes: HashMap<Naming, Vec<Option<usize>>>,
    /// Lanes that are made get names that were never used.
    pub anew: bool,
    pub opening: Opening,
    /// The number of the present attempt.
    pub attempt: u64,
    /// When a producer was lost or refused last, as a number of a signal: partitions that were counted earlier may have changed.
    pub stale_since: u64,
    /// When a producer was opened last, as such a number.
    pub opened_at: u64,
    /// Its producers were just opened, and nothing is sent before the partitions are counted once more: see `shape`.
    pub is_unconfirmed: bool,
    /// Paces attempts; reset by a receipt.
    pub backoff: Backoff,
    /// Something went wrong, and there was no receipt since: the next attempt waits.
    pub is_paced: bool,
    pub trouble: Option<Trouble>,
    /// Why the present attempt fails.
    pub failure: Option<Failure>,
    /// An attempt failed, and that was told.
    pub is_told: bool,
    /// The broker that has just closed its producers named this one as the next.
    pub next_broker: Option<NextBroker>,
    /// Which of the connections to its broker it uses.
    pub shard: u32,
    /// What it has accepted since its producers opened.
    pub accepted: Accepted,
    /// Batches are no larger, because a larger one was refused.
    pub batch_max_bytes: usize,
    /// Why its events are diverted.
    pub refused: Option<String>,
    /// How many events were diverted when the last one of this topic was.
    pub last_diverted: u64,
    /// When it is looked at for what is idle.
    pub idle_check_at: Option<Instant>,
}

impl Topic {
    pub(super) fn new(
        name: String,
        route: usize,
        lanes: u32,
        naming: Naming,
        backoff: Backoff,
    ) -> Self {
        Self {
            name,
            route,
            lanes: vec![None; lanes as usize],
            dedicated: Vec::new(),
            few: Few::default(),
            naming,
            earlier_lanes: HashMap::new(),
            anew: false,
            opening: Opening::Idle,
            attempt: 0,
            stale_since: 0,
            opened_at: 0,
            is_unconfirmed: false,
            backoff,
            is_paced: false,
            trouble: None,
            failure: None,
            is_told: false,
            next_broker: None,
            shard: 0,
            accepted: Accepted::default(),
            batch_max_bytes: usize::MAX,
            refused: None,
            last_diverted: 0,
            idle_check_at: None,
        }
    }

    /// Its lanes, also those that are not in use now.
    pub(super) fn all_lanes(&self) -> impl Iterator<Item = usize> + '_ {
        let lanes = self.lanes.iter().flatten().copied();
        let few = self.few.lanes.iter().copied();
        lanes.chain(few).chain(self.dedicated.iter().copied())
    }

    /// All its lanes, and those of names that it had before.
    pub(super) fn every_lane(&self) -> impl Iterator<Item = usize> + '_ {
        let earlier = self.earlier_lanes.values().flatten().flatten().copied();
        self.all_lanes().chain(earlier)
    }

    /// The ids or names of its lanes are others than after a restart.
    pub(super) fn is_numbered_anew(&self) -> bool {
        self.anew || !self.few.lanes.is_empty()
    }

    /// A lane of it is no more.
    pub(super) fn forget_lane(&mut self, lane: usize) {
        let forget = |lanes: &mut Vec<Option<usize>>| {
            for it in lanes {
                if *it == Some(lane) {
                    *it = None;
                }
            }
        };
        forget(&mut self.lanes);
        self.earlier_lanes.values_mut().for_each(forget);
        self.earlier_lanes
            .retain(|_, lanes| lanes.iter().any(Option::is_some));
        self.dedicated.retain(|&it| it != lane);
        self.few.lanes.retain(|&it| it != lane);
    }

    /// Something failed. An error that is final outweighs one that may pass.
    pub(super) fn note(&mut self, error: &Error, now: Instant) {
        self.trouble = Trouble::add(self.trouble.take(), error, now);
        if self.failure.is_none() || !error.is_temporary() {
            self.failure = Some(Failure::new(error));
        }
    }

    /// A lane has a receipt: it works.
    pub(super) fn works(&mut self) {
        // While the opening of another lane fails, that is not over.
        if self.opening == Opening::Idle && (self.is_paced || self.trouble.is_some()) {
            self.is_paced = false;
            self.trouble = None;
            self.backoff.reset();
        }
    }
}
