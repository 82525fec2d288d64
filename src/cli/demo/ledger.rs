//! The demo's book: what was committed and rolled back, what arrived, how often, in which order and how late.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use tokio::time::Instant;

use super::Fact;

/// What is known of one order.
#[derive(Debug, Default)]
struct Order {
    /// COMMIT was issued.
    committing: bool,
    committed: bool,
    /// `None` also for one that was in doubt: then the moment is not known.
    committed_at: Option<Instant>,
    rolled_back: bool,
    received: u64,
    first_received_at: Option<Instant>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Ledger {
    orders: HashMap<String, Order>,
    /// Highest number seen of each customer's orders.
    customers: HashMap<String, u64>,
    committed: u64,
    received: u64,
    /// Committed orders that have not arrived yet.
    missing: u64,
    out_of_order: u64,
    started: Instant,
    /// When the part ends whose latency and throughput count.
    measured_until: Instant,
    last_arrival: Instant,
}

impl Ledger {
    pub(super) fn new(measured_until: Instant) -> Self {
        let now = Instant::now();
        Self {
            orders: HashMap::new(),
            customers: HashMap::new(),
            committed: 0,
            received: 0,
            missing: 0,
            out_of_order: 0,
            started: now,
            measured_until,
            last_arrival: now,
        }
    }

    pub(super) fn note(&mut self, fact: Fact) {
        match fact {
            Fact::Committing { id } => self.orders.entry(id).or_default().committing = true,
            Fact::Committed { id, at } => {
                let order = self.orders.entry(id).or_default();
                order.committed = true;
                order.committed_at = at;
                self.committed += 1;
                // The message may be here before System A has heard of its commit.
                if order.received == 0 {
                    self.missing += 1;
                }
            }
            Fact::RolledBack { id } => self.orders.entry(id).or_default().rolled_back = true,
            Fact::Received {
                id,
                customer,
                number,
                at,
            } => {
                let order = self.orders.entry(id).or_default();
                order.received += 1;
                self.received += 1;
                self.last_arrival = at;
                if order.received > 1 {
                    return;
                }
                order.first_received_at = Some(at);
                if order.committed {
                    self.missing -= 1;
                }
                let highest = self.customers.entry(customer).or_default();
                if number <= *highest {
                    self.out_of_order += 1;
                }
                *highest = number.max(*highest);
            }
        }
    }

    /// Orders whose COMMIT was issued by a System A that did not live to hear the answer.
    pub(super) fn in_doubt(&self) -> Vec<String> {
        let in_doubt = |order: &Order| order.committing && !order.committed;
        let orders = self.orders.iter().filter(|(_, order)| in_doubt(order));
        orders.map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Everything committed has arrived.
    pub(super) fn is_settled(&self) -> bool {
        self.missing == 0
    }

    pub(super) fn since_last_arrival(&self) -> Duration {
        self.last_arrival.elapsed()
    }

    /// The sums. `published` is what the connectors said they had receipts for.
    pub(super) fn report(&self, published: u64, (ordered, taken): (i64, i64)) -> Report {
        let mut report = Report {
            committed: self.committed,
            published,
            received: self.received,
            out_of_order: self.out_of_order,
            ordered,
            taken,
            ..Report::default()
        };
        for order in self.orders.values() {
            report.rolled_back += u64::from(order.rolled_back);
            report.lost += u64::from(order.committed && order.received == 0);
            report.invented += u64::from(!order.committed && order.received > 0);
            if let (Some(committed), Some(received)) = (order.committed_at, order.first_received_at)
                && committed < self.measured_until
            {
                let latency = received.saturating_duration_since(committed);
                report.latencies.push(latency);
                let elapsed = received.saturating_duration_since(self.started);
                report.elapsed = report.elapsed.max(elapsed);
            }
            report.duplicates += order.received.saturating_sub(1);
        }
        report.latencies.sort_unstable();
        report
    }
}

/// The table at the end.
#[derive(Debug, Default)]
pub(super) struct Report {
    committed: u64,
    rolled_back: u64,
    published: u64,
    received: u64,
    lost: u64,
    duplicates: u64,
    /// Arrived, but never committed: rolled back, or of nobody's making.
    invented: u64,
    out_of_order: u64,
    /// By the tables of System A and System B.
    ordered: i64,
    taken: i64,
    /// Of the measured part.
    elapsed: Duration,
    /// Of the measured part, sorted.
    latencies: Vec<Duration>,
}

impl Report {
    /// Nothing lost, nothing invented, and what was ordered is what was taken.
    pub(super) fn is_exact(&self) -> bool {
        self.lost == 0 && self.invented == 0 && self.ordered == self.taken
    }

    /// The nearest-rank percentile.
    fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.latencies.len() * percent).div_ceil(100).max(1);
        self.latencies.get(rank - 1).copied().unwrap_or_default()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.latencies.len() as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let ms = |percent| format!("{:.1} ms", self.percentile(percent).as_secs_f64() * 1000.0);
        let rows = [
            ("committed", self.committed.to_string()),
            ("rolled back", self.rolled_back.to_string()),
            ("published", self.published.to_string()),
            ("received", self.received.to_string()),
            ("lost", self.lost.to_string()),
            ("duplicates", self.duplicates.to_string()),
            ("rolled back, but received", self.invented.to_string()),
            ("out of order for their key", self.out_of_order.to_string()),
            ("sum ordered", self.ordered.to_string()),
            ("sum taken", self.taken.to_string()),
            ("throughput", format!("{rate:.0} events/s")),
            ("commit → taken p50", ms(50)),
            ("commit → taken p99", ms(99)),
        ];
        writeln!(f)?;
        for (name, value) in rows {
            writeln!(f, "{name:<28}{value:>16}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(id: &str, customer: &str, number: u64) -> Fact {
        Fact::Received {
            id: id.into(),
            customer: customer.into(),
            number,
            at: Instant::now(),
        }
    }

    fn committed(id: &str) -> Fact {
        Fact::Committed {
            id: id.into(),
            at: Some(Instant::now()),
        }
    }

    fn ledger() -> Ledger {
        Ledger::new(Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn the_sums_tell_what_happened() {
        let mut ledger = ledger();
        for fact in [
            committed("a"),
            received("a", "ann", 1),
            received("b", "bob", 1),
            committed("b"),
            received("a", "ann", 1),
            committed("lost"),
            Fact::RolledBack { id: "never".into() },
            Fact::RolledBack {
                id: "leaked".into(),
            },
            received("leaked", "eve", 2),
            committed("late"),
            received("late", "eve", 1),
        ] {
            ledger.note(fact);
        }
        assert!(!ledger.is_settled());
        let report = ledger.report(5, (7, 7));
        assert_eq!(
            (report.committed, report.rolled_back, report.published),
            (4, 2, 5)
        );
        assert_eq!((report.received, report.lost, report.duplicates), (5, 1, 1));
        assert_eq!((report.invented, report.out_of_order), (1, 1));
        assert!(!report.is_exact());
        assert_eq!(report.latencies.len(), 3);
    }

    #[test]
    fn an_exact_run_is_exact() {
        let mut ledger = ledger();
        ledger.note(committed("a"));
        ledger.note(Fact::RolledBack { id: "b".into() });
        ledger.note(received("a", "ann", 1));
        assert!(ledger.is_settled());
        assert!(ledger.report(1, (7, 7)).is_exact());
        assert!(
            !ledger.report(1, (7, 6)).is_exact(),
            "less taken than ordered"
        );
    }

    #[test]
    fn an_order_in_doubt_is_what_the_table_says_and_has_no_latency() {
        let mut ledger = ledger();
        for id in ["there", "not"] {
            ledger.note(Fact::Committing { id: id.into() });
        }
        ledger.note(received("there", "ann", 1));
        let mut in_doubt = ledger.in_doubt();
        in_doubt.sort_unstable();
        assert_eq!(in_doubt, ["not", "there"]);
        assert!(!ledger.report(1, (0, 0)).is_exact(), "nobody knows yet");
        ledger.note(Fact::Committed {
            id: "there".into(),
            at: None,
        });
        let report = ledger.report(1, (0, 0));
        assert!(report.is_exact());
        assert!(report.latencies.is_empty());
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let latencies = (1..=200).map(Duration::from_millis).collect();
        let report = Report {
            latencies,
            ..Report::default()
        };
        assert_eq!(report.percentile(50), Duration::from_millis(100));
        assert_eq!(report.percentile(99), Duration::from_millis(198));
        assert_eq!(Report::default().percentile(99), Duration::ZERO);
    }
}
