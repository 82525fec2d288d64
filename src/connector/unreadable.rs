//! A log that cannot be read on, although catalogue and settings are right by now.
//!
//! pgoutput reads publications and tables as they were when a row was written. So a mistake that has been mended stays in the log:
//! rows of a time in which a column that walpost reads was not sent (generated, or left out of a column list), or, before Postgres
//! 18, any change of a time in which there was no publication (42704). Streaming fails at the same place each time.
//!
//! The other kind is a row that the walsender cannot send: text that it cannot convert, a row beyond a limit of the server, or an
//! `internal_error` at one place of the log (as of a value whose text form exceeds 1 GB). The last may pass with time, so it counts only when
//! it has come at that place [`ATTEMPTS`] times in a row, with growing pauses between them ([`Repeats`]).
//!
//! First the stream is opened again: opening looks at the present catalogue, and refuses what is still wrong with the statement
//! that mends it. A second failure without a transaction in between is the past, and nothing can mend that: the slot then counts as
//! lost ([`crate::scanner::recovery`]), which under `WALPOST_SLOT_LOST=recover` makes a new one and publishes the rows in between
//! from the table. A third is an error.
//!
//! # What comes twice, and what may be lost
//!
//! Opening again keeps the pipe and the task that notes what is delivered, so nothing of either is lost. For the new slot no last note is
//! taken, because there can be none: a snapshot is noted when the confirmed LSN has passed the end of the log of that moment, and this slot never
//! gets past the place that cannot be read. So the rows that were published since the last note are published once more from the table: those of
//! the last `WALPOST_SCAN_INTERVAL`, or in a backlog all since it began. What is in the air gets its receipts first, for the grace period at
//! most, because it may be in no table: an event of `emit_transient`, a row that its application has deleted. Such events *behind* that
//! place are lost with the slot.

use crate::postgres::{internal_error_at, is_unreadable, quote_literal};
use crate::{Error, Lsn};

/// How often a walsender may fail at one place before the log counts as unreadable there.
const ATTEMPTS: u32 = 5;

/// How often the walsender has failed at one place by an error that may pass.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    at: Option<Lsn>,
    times: u32,
}

impl Repeats {
    /// Takes an error of a stream; whether it has come at its place too often to wait for its passing.
    pub(super) fn is_stuck(&mut self, error: &Error) -> bool {
        let at = internal_error_at(error);
        let before = if at == self.at { self.times } else { 0 };
        (self.at, self.times) = (at, before + 1);
        at.is_some() && self.times >= ATTEMPTS
    }

    /// Whether the last stream ended so.
    pub(super) fn has_some(&self) -> bool {
        self.at.is_some()
    }
}

/// What is to be done about an error of the stream.
pub(super) enum Remedy {
    /// Open again, and look at the catalogue.
    Reopen,
    /// Make the slot anew; why.
    RemakeSlot(String),
    /// It is none of these errors, or nothing helped.
    None,
}

/// What was tried, and how many transactions had been received then.
#[derive(Debug, Default)]
pub(super) enum Unreadable {
    #[default]
    Never,
    Reopened {
        transactions: u64,
    },
    Remade,
}

impl Unreadable {
    /// Judges an error of a stream that has received so many transactions.
    pub(super) fn judge(&mut self, error: &Error, transactions: u64) -> Remedy {
        if !is_unreadable(error) {
            return Remedy::None;
        }
        match *self {
            // The new slot's pipe counts from 0, and its first transaction is behind everything that was mended.
            Self::Remade if transactions == 0 => Remedy::None,
            Self::Reopened { transactions: then } if then == transactions => {
                *self = Self::Remade;
                Remedy::RemakeSlot(format!("it cannot be read on: {}", error.told().0))
            }
            _ => {
                *self = Self::Reopened { transactions };
                Remedy::Reopen
            }
        }
    }
}

/// What a person can do where nothing helped.
pub(super) fn by_hand(error: Error, slot: &str) -> Error {
    error.hint(format!(
        "where every outbox table has the columns txid and seq: SELECT pg_drop_replication_slot({}); then walpost run with \
         WALPOST_SLOT_LOST=recover makes a new slot and publishes the rows in between from the table",
        quote_literal(slot).trim()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::postgres::{ServerError, UnreadableLog};

    #[test]
    fn an_internal_error_counts_only_when_it_comes_again_and_again_at_one_place() {
        let error = |at: u64| {
            let at = Lsn::new(at);
            let body =
                format!("SERROR\0CXX000\0Mm\0Win the change callback, associated LSN {at}\0\0");
            ServerError::parse(body.as_bytes()).into_error("go on")
        };
        let mut repeats = Repeats::default();
        for at in [1, 2] {
            for _ in 1..ATTEMPTS {
                assert!(!repeats.is_stuck(&error(at)));
            }
        }
        assert!(repeats.is_stuck(&error(2)));
        assert!(repeats.is_stuck(&error(2)) && repeats.has_some());
        // Something else ended the stream in between.
        for _ in 0..=ATTEMPTS {
            assert!(!repeats.is_stuck(&Error::temporary("x")));
        }
        assert!(!repeats.is_stuck(&error(2)));
    }

    #[test]
    fn the_slot_is_made_anew_only_where_opening_again_has_not_helped_and_only_once() {
        let old = || Error::refused("x").caused_by(UnreadableLog("why".to_owned()));
        let mut unreadable = Unreadable::default();
        assert!(matches!(
            unreadable.judge(&Error::refused("x"), 0),
            Remedy::None
        ));
        assert!(matches!(unreadable.judge(&old(), 3), Remedy::Reopen));
        assert!(matches!(unreadable.judge(&old(), 4), Remedy::Reopen));
        assert!(matches!(unreadable.judge(&old(), 4), Remedy::RemakeSlot(_)));
        assert!(matches!(unreadable.judge(&old(), 0), Remedy::None));
        assert!(matches!(unreadable.judge(&old(), 5), Remedy::Reopen));
    }
}
