//! Events without a table.
//!
//! A transactional logical message with the prefix `walpost` is an event too ([`crate::outbox::Envelopes`]): it counts as a row
//! of its transaction, in its place among them, and goes the same way.
//!
//! One that is not transactional is refused: logged, counted, not published. It has no commit, so nothing says which
//! transaction it belongs to, in which order it stands to a key's other events or which sequence id is its own, and it is in
//! the log even if what it tells of is rolled back. Postgres itself lets anybody write it, and a reader of the log cannot send
//! it back: refusing means that it is not taken for an event, and that somebody is told. It holds nothing up, since no
//! transaction waits for it.

use tracing::warn;

use super::{Format, Pipe};
use crate::outbox::{ENVELOPE_OID, EventError, PREFIX, RowNumber, Salvaged};
use crate::pgoutput::{LogicalMessage, Tuple};
use crate::{Error, Lsn, Result};

/// Memory kept for the next envelope's row; a larger one's is given back.
const ENVELOPE_KEPT_BYTES: usize = 1024 * 1024;

impl Pipe {
    pub(super) fn logical(&mut self, message: &LogicalMessage<'_>, at: Lsn) -> Result<Format> {
        if message.prefix != PREFIX {
            self.skipped += 1;
            return Ok(Format::Fits);
        }
        if !message.transactional {
            self.refused += 1;
            // Not a line for each: whoever writes one writes many.
            if self.refused.is_power_of_two() {
                warn!(
                    at = %message.lsn, refused = self.refused,
                    "a logical message for walpost is not transactional: it is refused, not published \
                     (hint: pg_logical_emit_message(true, 'walpost', …), or walpost.emit_transient)"
                );
            }
            return Ok(Format::Fits);
        }
        if !self.extractors.iter().any(|(id, _)| *id == ENVELOPE_OID) {
            let extractor = self.envelopes.extractor()?;
            let read = Some((extractor, self.envelope_place()));
            self.extractors.push((ENVELOPE_OID, read));
        }
        let mut row = std::mem::take(&mut self.envelope_row);
        let taken = match self.envelopes.encode(message.content, &mut row) {
            Ok(()) => Tuple::decode(&row)
                .map_err(|error| Error::bug("an envelope made no row").caused_by(error))
                .and_then(|tuple| self.insert(ENVELOPE_OID, &tuple, at)),
            Err(error) => self.unreadable(message.content, error, at),
        };
        row.clear();
        row.shrink_to(ENVELOPE_KEPT_BYTES);
        self.envelope_row = row;
        taken
    }

    /// Behind the tables' places: see [`Stragglers`].
    fn envelope_place(&self) -> u16 {
        u16::try_from(self.routing.tables.len()).unwrap_or(u16::MAX)
    }

    /// A message for us that is no envelope: kept as it is.
    fn unreadable(&mut self, content: &[u8], error: EventError, at: Lsn) -> Result<Format> {
        let Some(open) = self.next_row(at)? else {
            return Ok(Format::Fits);
        };
        let whole = Salvaged {
            payload: Some(content.to_vec()),
            ..Salvaged::default()
        };
        let origin = open.origin(self.envelope_place(), false);
        self.outlet
            .unusable(error, whole, (origin, RowNumber::Unknown, None))?;
        Ok(Format::Fits)
    }
}
