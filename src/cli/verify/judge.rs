//! The verdict: everything with one id side by side, then every key in the order of its table.
//!
//! Input: the records of rows, stragglers and messages, sorted by id. Output: a [`Verdict`]. Memory: the rows of one id, and
//! the second sorter's budget.

use super::record::{ById, ByKey, Digest, Found, NO_TOPIC, Row};
use super::sorter::{Sorted, Sorter};
use crate::{Error, Result};

/// How many there are, and the ids of the first few.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) count: u64,
    pub(super) ids: Vec<String>,
}

impl Tally {
    fn add(&mut self, id: &str, show: usize) {
        self.count += 1;
        if self.ids.len() < show {
            self.ids.push(id.to_owned());
        }
    }
}

/// What became of the rows and the messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Rows that must have their message.
    pub(super) rows: u64,
    /// Rows that need not: not delivered yet, or not in the time range.
    pub(super) not_judged: u64,
    /// No message, and no straggler.
    pub(super) missing: Tally,
    /// Of these: older than everything that their topic still has.
    pub(super) missing_older_than_topic: u64,
    /// Messages that came again.
    pub(super) duplicates: Tally,
    /// Rows whose message stands before that of an earlier row of their key.
    pub(super) out_of_order: Tally,
    /// Rows whose message has another payload or another key.
    pub(super) different: Tally,
    /// Stragglers without a message that will be tried again.
    pub(super) retrying: Tally,
    /// Stragglers without a message that will not.
    pub(super) dead: Tally,
    /// Messages that `walpost replay` sent, beside the first.
    pub(super) replayed: u64,
    /// Messages without a row.
    pub(super) unknown: Tally,
}

impl Verdict {
    /// Every row has its message, once, in order.
    pub(super) fn is_good(&self) -> bool {
        let wrong = [
            &self.missing,
            &self.duplicates,
            &self.out_of_order,
            &self.different,
            &self.dead,
        ];
        wrong.iter().all(|tally| tally.count == 0)
    }
}

/// What is judged by.
pub(super) struct Judge {
    /// Ids that are kept of each kind.
    pub(super) show: usize,
    /// By topic: when the oldest message that it has was published, if it has any.
    pub(super) oldest_ms: Vec<Option<u64>>,
    /// Messages whose event is not in this range are nobody's concern, with or without a row.
    pub(super) range: Range,
    /// Memory for the second sort.
    pub(super) budget_bytes: usize,
}

/// A range of times, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) from_ms: Option<u64>,
    /// Not in it any more.
    pub(super) to_ms: Option<u64>,
}

impl Range {
    pub(super) fn contains(self, at_ms: u64) -> bool {
        self.from_ms.is_none_or(|from| from <= at_ms) && self.to_ms.is_none_or(|to| at_ms < to)
    }
}

/// A row and what was found for it.
struct Case {
    row: Row,
    straggler: Option<bool>,
    message: Option<(u32, u64)>,
    different: bool,
}

impl Judge {
    /// Judges everything.
    pub(super) fn judge(&self, mut records: Sorted) -> Result<Verdict> {
        let mut verdict = Verdict::default();
        let mut order = Sorter::new(self.budget_bytes);
        let mut group: Option<Digest> = None;
        let mut cases: Vec<Case> = Vec::new();
        while let Some(record) = records.next()? {
            let (id, what) = ById::decode(record).ok_or_else(unreadable)?;
            if group.replace(id) != Some(id) {
                self.close(&mut cases, &mut verdict, &mut order)?;
            }
            match what {
                ById::Row(row) => cases.push(Case {
                    row,
                    straggler: None,
                    message: None,
                    different: false,
                }),
                ById::Straggler { table, dead } => {
                    for case in cases.iter_mut().filter(|case| case.row.table == table) {
                        case.straggler = Some(dead);
                    }
                }
                ById::Message(found) => self.message(&mut cases, &found, &mut verdict),
            }
        }
        self.close(&mut cases, &mut verdict, &mut order)?;
        drop(records);
        self.order(order.finish()?, &mut verdict)?;
        Ok(verdict)
    }

    /// A message belongs to a row of its id and topic that has none yet; several tables may use the same ids.
    fn message(&self, cases: &mut [Case], found: &Found, verdict: &mut Verdict) {
        let of_topic = |case: &&mut Case| case.row.topic == found.topic;
        let free = cases.iter_mut().filter(of_topic);
        if let Some(case) = free.into_iter().find(|case| case.message.is_none()) {
            case.message = Some((found.part, found.place));
            case.different = (case.row.key, case.row.payload) != (found.key, found.payload);
            return;
        }
        match cases.iter_mut().find(of_topic) {
            Some(case) if !case.row.judged => {}
            Some(_) if found.replayed => verdict.replayed += 1,
            Some(case) => verdict.duplicates.add(&case.row.id, self.show),
            None if self.range.contains(found.event_ms) => {
                verdict.unknown.add(&found.id, self.show);
            }
            None => {}
        }
    }

    /// Nothing more comes for these rows.
    fn close(
        &self,
        cases: &mut Vec<Case>,
        verdict: &mut Verdict,
        order: &mut Sorter,
    ) -> Result<()> {
        let mut record = Vec::new();
        for case in cases.drain(..) {
            let row = &case.row;
            if !row.judged {
                verdict.not_judged += 1;
                continue;
            }
            verdict.rows += 1;
            match (case.message, case.straggler) {
                (Some((part, place)), _) => {
                    if case.different {
                        verdict.different.add(&row.id, self.show);
                    }
                    ByKey::encode(row, part, place, &mut record);
                    order.push(&record)?;
                }
                (None, Some(true)) => verdict.dead.add(&row.id, self.show),
                (None, Some(false)) => verdict.retrying.add(&row.id, self.show),
                (None, None) => {
                    verdict.missing.add(&row.id, self.show);
                    verdict.missing_older_than_topic += u64::from(self.is_older_than_topic(row));
                }
            }
        }
        Ok(())
    }

    /// The broker deletes messages that all have read, unless it is told to retain them.
    fn is_older_than_topic(&self, row: &Row) -> bool {
        if row.topic == NO_TOPIC {
            return false;
        }
        let oldest = self.oldest_ms.get(row.topic as usize).copied().flatten();
        oldest.is_none_or(|oldest| row.created_ms < oldest)
    }

    fn order(&self, mut records: Sorted, verdict: &mut Verdict) -> Result<()> {
        let mut line = None;
        let mut highest = 0;
        while let Some(record) = records.next()? {
            let case = ByKey::decode(record).ok_or_else(unreadable)?;
            if line.replace(case.line) != Some(case.line) {
                highest = case.place;
            } else if case.place < highest {
                verdict.out_of_order.add(&case.id, self.show);
            } else {
                highest = case.place;
            }
        }
        Ok(())
    }
}

fn unreadable() -> Error {
    Error::bug("a record came back from sorting as it was not written")
}

#[cfg(test)]
mod tests {
    use super::super::record::{digest_of, digest_of_payload};
    use super::*;

    const KEY: &str = "k";

    struct Records(Sorter);

    impl Records {
        fn new() -> Self {
            Self(Sorter::new(100))
        }

        fn add(&mut self, id: &str, what: &ById) {
            let mut bytes = Vec::new();
            what.encode(id, &mut bytes);
            self.0.push(&bytes).unwrap();
        }

        fn row(&mut self, id: &str, seq: i64) -> &mut Self {
            self.row_of((0, 0), id, seq, true)
        }

        fn row_of(
            &mut self,
            (table, topic): (u16, u32),
            id: &str,
            seq: i64,
            judged: bool,
        ) -> &mut Self {
            let row = Row {
                table,
                seq,
                judged,
                topic,
                created_ms: 100,
                key: digest_of(KEY.as_bytes()),
                payload: digest_of_payload(Some(id.as_bytes())),
                id: id.to_owned(),
            };
            self.add(id, &ById::Row(row));
            self
        }

        fn message(&mut self, id: &str, place: u64) -> &mut Self {
            self.message_of(0, id, place, |_| {})
        }

        fn message_of(
            &mut self,
            topic: u32,
            id: &str,
            place: u64,
            change: impl FnOnce(&mut Found),
        ) -> &mut Self {
            let mut found = Found {
                topic,
                part: 0,
                place,
                replayed: false,
                event_ms: 100,
                key: digest_of(KEY.as_bytes()),
                payload: digest_of_payload(Some(id.as_bytes())),
                id: id.to_owned(),
            };
            change(&mut found);
            self.add(id, &ById::Message(found));
            self
        }

        fn judged(&mut self) -> Verdict {
            let judge = Judge {
                show: 2,
                oldest_ms: vec![Some(50), Some(150)],
                range: Range {
                    from_ms: Some(10),
                    to_ms: Some(1000),
                },
                budget_bytes: 100,
            };
            let sorter = std::mem::replace(&mut self.0, Sorter::new(100));
            judge.judge(sorter.finish().unwrap()).unwrap()
        }
    }

    fn ids(tally: &Tally) -> Vec<&str> {
        tally.ids.iter().map(String::as_str).collect()
    }

    #[test]
    fn every_row_with_its_message_once_and_in_order_is_good() {
        let mut records = Records::new();
        for (number, id) in (1u32..).zip(["a", "b", "c", "d"]) {
            records.row(id, number.into()).message(id, number.into());
        }
        let verdict = records.judged();
        assert!(verdict.is_good());
        assert_eq!((verdict.rows, verdict.unknown.count), (4, 0));
    }

    #[test]
    fn each_fault_is_told_from_the_others() {
        let mut records = Records::new();
        records.row("missing", 1);
        records
            .row("twice", 2)
            .message("twice", 20)
            .message("twice", 21);
        records.row("early", 4).message("early", 22);
        records.row("late", 3).message("late", 23);
        records
            .row("changed", 5)
            .message_of(0, "changed", 24, |found| {
                found.payload = digest_of_payload(None);
            });
        records
            .row("rekeyed", 6)
            .message_of(0, "rekeyed", 25, |found| {
                found.key = digest_of(b"other");
            });
        records.message("nobody's", 26);
        records.row_of((0, 0), "later", 7, false);
        let verdict = records.judged();
        assert_eq!(ids(&verdict.missing), ["missing"]);
        assert_eq!(ids(&verdict.duplicates), ["twice"]);
        assert_eq!(ids(&verdict.out_of_order), ["early"]);
        assert_eq!(verdict.different.count, 2);
        assert_eq!(ids(&verdict.unknown), ["nobody's"]);
        assert_eq!((verdict.rows, verdict.not_judged), (6, 1));
        assert!(!verdict.is_good());
    }

    #[test]
    fn a_straggler_is_not_missing_and_only_a_dead_one_is_wrong() {
        let mut records = Records::new();
        records.row("waits", 1).add(
            "waits",
            &ById::Straggler {
                table: 0,
                dead: false,
            },
        );
        records.row("arrived", 2).message("arrived", 1);
        records.add(
            "arrived",
            &ById::Straggler {
                table: 0,
                dead: false,
            },
        );
        // Of another table, whose ids are others.
        records.row("lost", 3).add(
            "lost",
            &ById::Straggler {
                table: 1,
                dead: false,
            },
        );
        let verdict = records.judged();
        assert_eq!(
            (ids(&verdict.retrying), ids(&verdict.missing)),
            (vec!["waits"], vec!["lost"])
        );
        records.row("dead", 1).add(
            "dead",
            &ById::Straggler {
                table: 0,
                dead: true,
            },
        );
        let verdict = records.judged();
        assert_eq!(ids(&verdict.dead), ["dead"]);
        assert!(!verdict.is_good());
    }

    #[test]
    fn one_id_in_two_tables_needs_two_messages_and_a_wrong_topic_is_no_message() {
        let mut records = Records::new();
        records
            .row_of((0, 0), "7", 1, true)
            .row_of((1, 1), "7", 1, true);
        records
            .message_of(0, "7", 1, |_| {})
            .message_of(1, "7", 1, |_| {});
        assert!(records.judged().is_good());
        // Both in one topic: the second is the other table's.
        records
            .row_of((0, 0), "7", 1, true)
            .row_of((1, 0), "7", 1, true);
        records.message("7", 1).message("7", 2);
        assert!(records.judged().is_good());
        records.row("astray", 1).message_of(1, "astray", 1, |_| {});
        let verdict = records.judged();
        assert_eq!((verdict.missing.count, verdict.unknown.count), (1, 1));
    }

    #[test]
    fn what_was_replayed_is_no_duplicate_and_fills_a_gap() {
        let mut records = Records::new();
        let replay = |found: &mut Found| found.replayed = true;
        records
            .row("a", 1)
            .message("a", 1)
            .message_of(0, "a", 5, replay);
        records.row("b", 2).message_of(0, "b", 6, replay);
        let verdict = records.judged();
        assert!(verdict.is_good());
        assert_eq!(verdict.replayed, 1);
    }

    #[test]
    fn a_missing_message_may_be_one_that_the_broker_has_deleted() {
        let mut records = Records::new();
        records.row_of((0, 0), "young", 1, true);
        records.row_of((0, 1), "old", 1, true);
        records.row_of((0, NO_TOPIC), "unusable", 1, true);
        let verdict = records.judged();
        assert_eq!(
            (verdict.missing.count, verdict.missing_older_than_topic),
            (3, 1)
        );
    }

    #[test]
    fn messages_outside_the_range_are_not_unknown() {
        let mut records = Records::new();
        records.message_of(0, "x", 1, |found| found.event_ms = 1000);
        records.message_of(0, "y", 2, |found| found.event_ms = 9);
        records.message_of(0, "z", 3, |found| found.event_ms = 999);
        let verdict = records.judged();
        assert_eq!(ids(&verdict.unknown), ["z"]);
        assert!(verdict.is_good());
    }
}
