//! The outlet: a row goes in; from then on it is in the publisher's hands, or in the stragglers', until the broker has it or
//! the table of stragglers does.
//!
//! Owns the [`Publisher`], the [`Stragglers`] and the [`AckTracker`] that says what is done. Input: rows, from the log
//! ([`crate::pipe`]) or from the table ([`crate::scanner`]), and what brokers and the stragglers' task say. Output: the
//! position up to which all is done. It does no I/O of its own. This is the only place where a row becomes an event, and
//! where an event is acknowledged.
//!
//! # What cannot be published
//!
//! Events that the publisher gives back, and rows that are no events, go to the stragglers
//! ([`crate::scanner::straggler`]); they are acknowledged when they are in their table. Where there is no such table the
//! first of them is an error, and nothing passes it.
//!
//! What somebody has discarded of them is left out when it comes again ([`crate::scanner::discarded`]).
//!
//! # One after the other
//!
//! A scan has producers, and so a publisher, of its own. When nothing is unfinished the stragglers are taken out of one
//! outlet and go into the next: the same task goes on, and what is parked stays parked.

use tokio::time::Instant;
use tracing::{info, warn};

use crate::ack::{AckTracker, TxnNo};
use crate::meter::Meter;
use crate::outbox::{EventError, Extractor, RowNumber, Salvaged, Scratch, key_hash};
use crate::pgoutput::Tuple;
use crate::pulsar::{BrokerEvent, Outgoing, Publisher, Row, RowTag};
use crate::scanner::straggler::{Report, Stragglers};
use crate::{Error, Lsn, Result};

/// Where an outlet's rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The log: a straggler is known by its transaction's commit LSN and its place in there.
    Log,
    /// The table: a straggler is known by its table, `seq` and `txid`, and its commit LSN is `0/0`, where no log begins.
    Table,
}

/// Which row it is.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// Its transaction, for the tracker.
    pub txn: TxnNo,
    /// Where that committed, or what stands for it: sequence ids are made of it.
    pub commit_lsn: Lsn,
    /// Its table, and its place in the transaction; a row of the table has its `seq` there.
    pub row: RowTag,
    /// The transaction that inserted it, without the epoch; 0 when the row was read by SQL.
    pub xid: u32,
    /// There is a row in a table that may be marked. (An event of `walpost.emit_transient` has none.)
    pub is_row: bool,
}

/// Something an outlet hears.
#[derive(Debug)]
pub enum Event {
    /// From a broker.
    Broker(BrokerEvent),
    /// From the stragglers' task.
    Stragglers(Report),
}

/// What became of a row.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// False for a row that is in its topic already, or was discarded.
    pub is_new: bool,
    /// Its `txid`, where it has one.
    pub txid: Option<u64>,
}

/// What went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Events taken.
    pub events: u64,
    /// Events that have their receipt.
    pub acknowledged: u64,
    /// Events stored as stragglers instead.
    pub stragglers: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Outlet {
    publisher: Publisher,
    /// `None`: there is no table for them.
    stragglers: Option<Stragglers>,
    tracker: AckTracker,
    source: Source,
    /// Whether receipts tell which rows they are of.
    report_rows: bool,
    scratch: Scratch,
    counts: Counts,
}

impl Outlet {
    /// An outlet for rows behind `confirmed`.
    pub fn new(
        mut publisher: Publisher,
        mut stragglers: Option<Stragglers>,
        source: Source,
        report_rows: bool,
        confirmed: Lsn,
    ) -> Self {
        if let Some(stragglers) = &mut stragglers {
            publisher.set_parked(stragglers.take_parked());
        }
        Self {
            publisher,
            stragglers,
            tracker: AckTracker::new(confirmed),
            source,
            report_rows,
            scratch: Scratch::new(),
            counts: Counts::default(),
        }
    }

    /// Gives the stragglers to whoever comes next. Nothing may be unfinished: it would be forgotten.
    pub fn into_stragglers(mut self) -> Option<Stragglers> {
        assert!(
            self.unfinished() == 0,
            "an outlet ends with events that are neither published nor stored"
        );
        let mut stragglers = self.stragglers.take();
        if let Some(stragglers) = &mut stragglers {
            stragglers.set_parked(self.publisher.take_parked());
        }
        stragglers
    }

    /// Puts a new publisher in the place of the one that there is, whose connections end. Nothing may be unfinished: it would be forgotten. What is
    /// parked stays parked.
    pub fn renew_publisher(&mut self, mut publisher: Publisher) {
        assert!(
            self.unfinished() == 0,
            "a publisher ends with events that are neither published nor stored"
        );
        publisher.set_parked(self.publisher.take_parked());
        self.publisher = publisher;
    }

    /// The publisher, to wait on.
    pub fn publisher(&mut self) -> &mut Publisher {
        &mut self.publisher
    }

    /// The stragglers, if there is a table for them.
    pub fn stragglers(&self) -> Option<&Stragglers> {
        self.stragglers.as_ref()
    }

    /// The tracker, to begin and commit transactions.
    pub fn tracker(&mut self) -> &mut AckTracker {
        &mut self.tracker
    }

    /// What went through so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The publisher looks at the clock, about once a second, and the meter is told which topics are in trouble.
    pub fn tick(&mut self, at: Instant) {
        self.publisher.tick(at);
        self.publisher
            .meter()
            .set_troubles(self.publisher.troubles());
    }

    /// Tells the meter what is in the air.
    pub fn metering(&self) -> &Meter {
        let meter = self.publisher.meter();
        meter.set_in_flight(self.publisher.in_flight(), self.unfinished());
        meter
    }

    /// True while another row may be taken.
    pub fn has_room(&self) -> bool {
        let stragglers = self.stragglers.as_ref();
        self.publisher.has_room() && stragglers.is_none_or(Stragglers::has_room)
    }

    /// Events without receipt, and not stored as stragglers either.
    pub fn unfinished(&self) -> usize {
        let waiting = self.stragglers.as_ref().map_or(0, Stragglers::waiting);
        self.publisher.in_flight().0 + waiting
    }

    /// Takes a row of the open transaction, unless `is_known` says of its id and `txid` that it is in its topic already, or somebody has
    /// discarded it.
    ///
    /// # Errors
    /// Refused for a row that can be neither published nor stored.
    pub fn take(
        &mut self,
        extractor: &mut Extractor,
        tuple: &Tuple<'_>,
        origin: Origin,
        is_known: impl FnOnce(&str, Option<u64>) -> bool,
    ) -> Result<Taken> {
        let number = extractor.number_column();
        let stragglers = self.stragglers.as_ref();
        let known_by = self.source.known_by(origin.commit_lsn);
        let is_discarded = |id, txid| {
            let is_discarded =
                stragglers.is_some_and(|them| them.is_discarded((origin.row, txid), known_by, id));
            if is_discarded {
                info!(commit_lsn = %known_by, ordinal = origin.row.ordinal(), "a discarded event came again, and is left out");
            }
            is_discarded
        };
        let event = extractor.extract(tuple, &mut self.scratch);
        let routed = event.and_then(|event| {
            let topic = extractor.topic(tuple, &event)?;
            Ok((event, topic))
        });
        let (event, topic) = match routed {
            Ok(routed) => routed,
            Err(error) => {
                let salvaged = extractor.salvage(tuple);
                let txid = extractor.txid(tuple);
                let id = salvaged.id.as_deref();
                let is_new = !is_discarded(id, txid) && !id.is_some_and(|id| is_known(id, txid));
                if is_new {
                    let number = number.filter(|_| origin.is_row);
                    let number = number.map_or(RowNumber::Unknown, |column| column.read(tuple));
                    self.unusable(error, salvaged, (origin, number, txid))?;
                }
                return Ok(Taken { is_new, txid });
            }
        };
        let txid = event.txid;
        if is_discarded(Some(event.id), txid) || is_known(event.id, txid) {
            return Ok(Taken {
                is_new: false,
                txid,
            });
        }
        // A straggler of the table is known by its txid. The id is told only to whoever marks the row.
        let is_told = (self.report_rows || self.source == Source::Table) && origin.is_row;
        let outgoing = Outgoing {
            key: event.aggregateid,
            payload: event.payload,
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            txn: origin.txn,
            commit_lsn: origin.commit_lsn,
            row: origin.row,
            mark: is_told.then(|| Row {
                table: origin.row.table(),
                xid: origin.xid,
                id: if self.report_rows { event.id } else { "" },
                txid,
                number: number.map_or(RowNumber::Unknown, |column| column.read(tuple)),
            }),
        };
        let hash = key_hash(event.aggregateid.as_bytes());
        self.publisher
            .publish(topic, hash, &outgoing, &event.properties())
            .map_err(|error| {
                Error::refused(format!("the row with id {} cannot be published", event.id))
                    .caused_by(error)
            })?;
        self.tracker.track();
        self.counts.events += 1;
        self.hand_on_diverted();
        Ok(Taken { is_new: true, txid })
    }

    /// Takes a row that was read by SQL, as a transaction of its own at `position`.
    ///
    /// # Errors
    /// As [`Outlet::take`]; the row is then not waited for.
    pub fn take_read(
        &mut self,
        extractor: &mut Extractor,
        tuple: &Tuple<'_>,
        row: RowTag,
        position: Lsn,
    ) -> Result<()> {
        let txn = self.tracker.begin();
        let origin = Origin {
            txn,
            commit_lsn: position,
            row,
            xid: 0,
            is_row: true,
        };
        let taken = self.take(extractor, tuple, origin, |_, _| false);
        self.tracker.commit(position);
        taken.map(|_| ())
    }

    /// Stores what is no event, if it is itself at fault and there is a table for it.
    ///
    /// # Errors
    /// Refused where that is not so.
    pub fn unusable(
        &mut self,
        error: EventError,
        salvaged: Salvaged,
        (origin, number, txid): (Origin, RowNumber, Option<u64>),
    ) -> Result<()> {
        match &mut self.stragglers {
            Some(stragglers) if error.problem().is_of_the_row() => {
                let why = Error::from(error).report();
                warn!("an event cannot be published, it becomes a dead straggler: {why}");
                let known_by = self.source.known_by(origin.commit_lsn);
                let row = (origin.txn, known_by, origin.row, (number, txid));
                if let Some((topic, key)) = stragglers.unusable(salvaged, row, why) {
                    self.publisher.park(&topic, &key, 1);
                }
                self.tracker.track();
                self.counts.events += 1;
                Ok(())
            }
            _ => {
                let (what, hint) = match self.source {
                    Source::Log => (
                        format!(
                            "an event of the transaction committed at {} cannot be published",
                            origin.commit_lsn
                        ),
                        "the slot keeps the event until it is published",
                    ),
                    Source::Table => (
                        format!(
                            "the row with id {} cannot be published",
                            salvaged.id.as_deref().unwrap_or("NULL")
                        ),
                        "mend the row, or run walpost init: with its table walpost.straggler the others need not wait",
                    ),
                };
                Err(Error::refused(what)
                    .caused_by(Error::from(error))
                    .hint(hint))
            }
        }
    }

    /// Waits for what a broker says, or what became of stragglers. Cancel safe: both are channels.
    pub async fn next_event(&mut self) -> Event {
        let Some(stragglers) = &mut self.stragglers else {
            return Event::Broker(self.publisher.next_event().await);
        };
        tokio::select! {
            biased;
            report = stragglers.next_report() => Event::Stragglers(report),
            event = self.publisher.next_event() => Event::Broker(event),
        }
    }

    /// The next of these, if one is waiting.
    pub fn try_next_event(&mut self) -> Option<Event> {
        let report = self
            .stragglers
            .as_mut()
            .and_then(Stragglers::try_next_report);
        report
            .map(Event::Stragglers)
            .or_else(|| self.publisher.try_next_event().map(Event::Broker))
    }

    /// Applies what was said, and books the receipts.
    ///
    /// # Errors
    /// An event that can be neither published nor stored, or a table of stragglers that cannot be used any more.
    pub fn event(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Broker(event) => self.broker_event(event),
            Event::Stragglers(report) => self.report(report),
        }
    }

    fn broker_event(&mut self, event: BrokerEvent) -> Result<()> {
        let result = self.publisher.handle(event);
        let mut oldest: Option<i64> = None;
        let mut acknowledged = 0;
        for (txn, count) in self.publisher.take_acked() {
            let committed = self.tracker.ack(txn, count);
            oldest = oldest.or(committed);
            acknowledged += count;
        }
        self.counts.acknowledged += acknowledged;
        if let Some(oldest) = oldest {
            self.publisher.meter().latency(oldest, acknowledged);
        }
        self.hand_on_diverted();
        result
    }

    /// Books what became of stragglers. The only place where one is acknowledged: it is in the table.
    fn report(&mut self, report: Report) -> Result<()> {
        if let Some(stragglers) = &mut self.stragglers {
            stragglers.book(&report);
        }
        match report {
            Report::Stored {
                acked, diverted, ..
            } => {
                for (txn, count) in acked {
                    self.tracker.ack(txn, count);
                    self.counts.stragglers += count;
                }
                self.publisher.stored(diverted)?;
            }
            Report::Parked(changes) => {
                for (topic, key, count) in changes {
                    self.publisher.park(&topic, &key, count);
                }
            }
            Report::Discarded(discarded) => {
                if let Some(stragglers) = &mut self.stragglers {
                    stragglers.set_discarded(discarded);
                }
            }
            Report::Healed(topic) => self.publisher.healed(&topic),
            Report::Rows(_) => {}
            Report::Failed(error) => return Err(error),
        }
        self.hand_on_diverted();
        Ok(())
    }

    fn hand_on_diverted(&mut self) {
        if self.publisher.has_diverted()
            && let Some(stragglers) = &mut self.stragglers
        {
            for mut diverted in self.publisher.take_diverted() {
                diverted.event.commit_lsn = self.source.known_by(diverted.event.commit_lsn);
                let xid = self.tracker.xid_of(diverted.event.txn);
                stragglers.divert(diverted, xid);
            }
        }
    }
}

impl Source {
    /// The commit LSN by which a straggler is known.
    fn known_by(self, commit_lsn: Lsn) -> Lsn {
        match self {
            Self::Log => commit_lsn,
            Self::Table => Lsn::ZERO,
        }
    }
}
