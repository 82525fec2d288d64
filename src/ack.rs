//! `AckTracker`: which log position may be confirmed, given which events the broker has acknowledged.
//!
//! Input: in log order, [`begin`](AckTracker::begin), [`track`](AckTracker::track) per event and
//! [`commit`](AckTracker::commit); in any order, [`ack`](AckTracker::ack). Output: one function,
//! [`flush_lsn`](AckTracker::flush_lsn), whose value goes into every status update.
//!
//! # Why the confirmed LSN never passes an unacknowledged event
//!
//! Transactions stand in a queue in commit order, each with the number of its events that await a receipt. The confirmed
//! LSN takes a transaction's end LSN only when that transaction is at the *front*, has committed, and awaits nothing; it
//! is then removed. So everything before the confirmed LSN has been removed, and was removed only when acknowledged. A
//! count can fall to zero early while the transaction is still open (its later rows are yet to come): an open transaction
//! has no end LSN and is never removed by a receipt.
//!
//! The idle rule adds the keepalive's WAL end, only while the queue is *empty*: the walsender writes a keepalive behind
//! everything it has decoded up to that position, so with an empty queue all of it was received and acknowledged.
//!
//! # Why it always reaches the end
//!
//! Every `ack` that empties the front removes it and all that stand complete behind it.
//!
//! # Bound
//!
//! A transaction that has committed and awaits nothing is folded into the one before it (whose end LSN moves up: nothing
//! between the two needs a receipt). So each transaction in the queue, but for the open one, awaits a receipt, and the queue is
//! never longer than the events in flight, however many transactions pass while one event waits.
//!
//! # Panics
//!
//! Calls out of order are bugs of ours, never bad input: the pipe answers a stream that begins inside a transaction, or has
//! rows and commits outside of one, with an error before it calls here. To go on after such a bug could confirm what was not
//! acknowledged, so the process ends (exit 70) with the slot where it was.

use std::collections::VecDeque;

use crate::Lsn;

/// Names one transaction for the tracker; rises by one with every [`AckTracker::begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TxnNo(u64);

impl TxnNo {
    /// Stands for a stored straggler, which belongs to no open transaction; never given to a tracker.
    pub(crate) fn of_straggler(number: i64) -> Self {
        Self(number.cast_unsigned())
    }

    /// The number it was made of.
    pub(crate) fn straggler(self) -> i64 {
        self.0.cast_signed()
    }
}

#[derive(Debug)]
struct Txn {
    no: TxnNo,
    /// Events handed on and not yet acknowledged.
    awaiting: u64,
    /// Set by the commit; `None` while rows may still come.
    end_lsn: Option<Lsn>,
    /// When it committed, where that is known. Handed back with its receipts; decides nothing.
    commit_time_us: Option<i64>,
    /// Its transaction id, without the epoch, where that is known. Decides nothing.
    xid: Option<u32>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct AckTracker {
    queue: VecDeque<Txn>,
    next_no: u64,
    awaiting: u64,
    confirmed: Lsn,
    /// End LSN of the last transaction committed here, to hold the log to its order.
    last_end: Lsn,
}

impl AckTracker {
    /// Starts at `confirmed`, the slot's `confirmed_flush_lsn`.
    pub fn new(confirmed: Lsn) -> Self {
        Self {
            queue: VecDeque::new(),
            next_no: 0,
            awaiting: 0,
            confirmed,
            last_end: Lsn::ZERO,
        }
    }

    /// A transaction begins; the one before must have committed.
    pub fn begin(&mut self) -> TxnNo {
        assert!(self.open().is_none(), "a transaction began inside another");
        let no = TxnNo(self.next_no);
        self.next_no += 1;
        self.queue.push_back(Txn {
            no,
            awaiting: 0,
            end_lsn: None,
            commit_time_us: None,
            xid: None,
        });
        no
    }

    /// The open transaction committed at this time, in whatever the caller measures: [`ack`](Self::ack) tells it again.
    pub fn set_commit_time(&mut self, commit_time_us: i64) {
        let open = self.queue.back_mut().filter(|txn| txn.end_lsn.is_none());
        open.expect("a commit time outside of a transaction")
            .commit_time_us = Some(commit_time_us);
    }

    /// The open transaction has this id in the log (without the epoch): [`xid_of`](Self::xid_of) tells it again.
    pub fn set_xid(&mut self, xid: u32) {
        let open = self.queue.back_mut().filter(|txn| txn.end_lsn.is_none());
        open.expect("an id outside of a transaction").xid = Some(xid);
    }

    /// The id of a transaction that is not acknowledged yet, where it is known.
    pub fn xid_of(&self, txn: TxnNo) -> Option<u32> {
        let index = self.queue.binary_search_by_key(&txn, |txn| txn.no).ok()?;
        self.queue[index].xid
    }

    /// One more event of the open transaction is handed to the broker's side.
    pub fn track(&mut self) {
        let open = self.queue.back_mut().filter(|txn| txn.end_lsn.is_none());
        open.expect("an event outside of a transaction").awaiting += 1;
        self.awaiting += 1;
    }

    /// The open transaction committed; `end_lsn` is where its commit record ends.
    pub fn commit(&mut self, end_lsn: Lsn) {
        let complete = self
            .open()
            .expect("a commit outside of a transaction")
            .awaiting
            == 0;
        assert!(
            end_lsn > self.last_end,
            "commits must rise: {end_lsn} after {}",
            self.last_end
        );
        self.last_end = end_lsn;
        let length = self.queue.len();
        if complete && length > 1 {
            self.queue.pop_back();
            self.queue[length - 2].end_lsn = Some(end_lsn);
        } else {
            self.queue[length - 1].end_lsn = Some(end_lsn);
            self.advance();
        }
    }

    /// `count` events of transaction `no` have been acknowledged; returns when it committed, if that was told.
    pub fn ack(&mut self, no: TxnNo, count: u64) -> Option<i64> {
        // The queue is sorted by number; numbers of folded transactions are missing, so search instead of indexing.
        // Nearly always it is one of the first few.
        let index = self.queue.partition_point(|txn| txn.no < no);
        let txn = self.queue.get_mut(index).filter(|txn| txn.no == no);
        let txn = txn.expect("a receipt for a transaction that awaits none");
        assert!(txn.awaiting >= count, "more receipts than events");
        txn.awaiting -= count;
        let Txn {
            awaiting,
            end_lsn,
            commit_time_us,
            ..
        } = *txn;
        self.awaiting -= count;
        if index == 0 {
            self.advance();
        } else if awaiting == 0 && end_lsn.is_some() {
            self.queue.remove(index);
            self.queue[index - 1].end_lsn = end_lsn;
        }
        commit_time_us
    }

    /// **The** flush position: the end of the last transaction before which everything is acknowledged; and only while
    /// nothing at all is in flight, the WAL end of the last keepalive (zero: none yet). Never falls.
    pub fn flush_lsn(&mut self, keepalive_wal_end: Lsn) -> Lsn {
        if self.is_idle() {
            self.confirmed = self.confirmed.max(keepalive_wal_end);
        }
        self.confirmed
    }

    /// Nothing is in flight: no open transaction, no event without its receipt.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty()
    }

    /// Events that await their receipt.
    pub fn awaiting(&self) -> u64 {
        self.awaiting
    }

    fn open(&self) -> Option<&Txn> {
        self.queue.back().filter(|txn| txn.end_lsn.is_none())
    }

    fn advance(&mut self) {
        while let Some(&Txn {
            awaiting: 0,
            end_lsn: Some(end_lsn),
            ..
        }) = self.queue.front()
        {
            // A slot may stand ahead of the first transactions it sends only if it was moved by hand.
            self.confirmed = self.confirmed.max(end_lsn);
            self.queue.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lsn(n: usize) -> Lsn {
        Lsn::new(1000 + 100 * n as u64)
    }

    /// The slow truth: the end of the last committed transaction before which every event is acknowledged.
    fn expected(sizes: &[usize], acked: &[Vec<bool>]) -> Lsn {
        let complete = sizes
            .iter()
            .enumerate()
            .take_while(|(i, _)| acked[*i].iter().all(|&a| a));
        complete.last().map_or(Lsn::ZERO, |(i, _)| lsn(i))
    }

    #[test]
    fn what_is_acknowledged_behind_one_that_waits_takes_no_room() {
        let mut tracker = AckTracker::new(Lsn::ZERO);
        let mut numbers = Vec::new();
        for i in 0..1000 {
            numbers.push(tracker.begin());
            tracker.track();
            tracker.commit(lsn(i));
            // The newest, or the one before it: never the first.
            if i % 2 == 0 && i > 1 {
                tracker.ack(numbers[i], 1);
                tracker.ack(numbers[i - 1], 1);
            }
            assert!(tracker.queue.len() as u64 <= tracker.awaiting());
        }
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::ZERO);
        tracker.ack(numbers[0], 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), lsn(998));
        tracker.ack(numbers[999], 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), lsn(999));
        assert!(tracker.is_idle());
    }

    fn run(sizes: &[usize], order: impl FnOnce(&mut Vec<(usize, usize)>)) {
        let mut tracker = AckTracker::new(Lsn::ZERO);
        let mut numbers = Vec::new();
        let mut events = Vec::new();
        let mut acked: Vec<Vec<bool>> = Vec::new();
        for (i, &size) in sizes.iter().enumerate() {
            numbers.push(tracker.begin());
            for event in 0..size {
                tracker.track();
                events.push((i, event));
            }
            tracker.commit(lsn(i));
            acked.push(vec![false; size]);
        }
        order(&mut events);
        for (i, event) in events {
            tracker.ack(numbers[i], 1);
            acked[i][event] = true;
            assert_eq!(tracker.flush_lsn(Lsn::ZERO), expected(sizes, &acked));
        }
        assert!(tracker.is_idle());
        assert_eq!(tracker.awaiting(), 0);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), lsn(sizes.len() - 1));
    }

    #[test]
    fn three_thousand_receipts_in_reverse() {
        run(&vec![3; 1000], |events| events.reverse());
    }

    #[test]
    fn keepalives_count_only_while_nothing_is_in_flight() {
        let mut tracker = AckTracker::new(Lsn::new(50));
        assert_eq!(tracker.flush_lsn(Lsn::new(60)), Lsn::new(60));
        assert_eq!(tracker.flush_lsn(Lsn::new(55)), Lsn::new(60), "never falls");
        let no = tracker.begin();
        assert_eq!(
            tracker.flush_lsn(Lsn::new(70)),
            Lsn::new(60),
            "a transaction is open"
        );
        tracker.track();
        tracker.commit(Lsn::new(100));
        assert_eq!(
            tracker.flush_lsn(Lsn::new(900)),
            Lsn::new(60),
            "an event has no receipt"
        );
        tracker.ack(no, 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::new(100));
        assert_eq!(tracker.flush_lsn(Lsn::new(900)), Lsn::new(900));
    }

    #[test]
    fn an_open_transaction_holds_although_all_its_events_so_far_are_acknowledged() {
        let mut tracker = AckTracker::new(Lsn::ZERO);
        let no = tracker.begin();
        tracker.track();
        tracker.ack(no, 1);
        assert_eq!(tracker.flush_lsn(Lsn::new(500)), Lsn::ZERO);
        tracker.track();
        tracker.commit(Lsn::new(400));
        assert_eq!(tracker.flush_lsn(Lsn::new(500)), Lsn::ZERO);
        tracker.ack(no, 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::new(400));
    }

    #[test]
    fn a_million_empty_transactions_behind_one_event_take_no_memory() {
        let mut tracker = AckTracker::new(Lsn::ZERO);
        let no = tracker.begin();
        tracker.track();
        tracker.commit(Lsn::new(10));
        for n in 0..1_000_000 {
            tracker.begin();
            tracker.commit(Lsn::new(20 + n));
        }
        assert_eq!(tracker.queue.len(), 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::ZERO);
        tracker.ack(no, 1);
        assert_eq!(tracker.flush_lsn(Lsn::ZERO), Lsn::new(20 + 999_999));
    }

    #[test]
    #[should_panic(expected = "more receipts than events")]
    fn a_receipt_too_many_is_a_bug() {
        let mut tracker = AckTracker::new(Lsn::ZERO);
        let no = tracker.begin();
        tracker.track();
        tracker.ack(no, 2);
    }

    proptest! {
        /// Thousands of receipts in a random order: after each one the tracker says exactly what the slow truth says.
        #[test]
        fn receipts_in_any_order(
            sizes in prop::collection::vec(0usize..6, 1..800),
            keys in prop::collection::vec(any::<u32>(), 4800),
        ) {
            run(&sizes, |events| {
                let mut keyed: Vec<_> = events.drain(..).zip(keys).map(|(event, key)| (key, event)).collect();
                keyed.sort_unstable();
                events.extend(keyed.into_iter().map(|(_, event)| event));
            });
        }

        /// Log and receipts interleaved at random, open transactions and keepalives among them.
        #[test]
        fn receipts_between_the_rows(steps in prop::collection::vec((0u8..10, any::<u16>()), 1..3000)) {
            let mut tracker = AckTracker::new(Lsn::ZERO);
            let mut position = 1u64;
            let mut open: Option<TxnNo> = None;
            // Every transaction so far: number, events without receipt, end.
            let mut all: Vec<(TxnNo, u64, Option<Lsn>)> = Vec::new();
            let mut idle_mark = Lsn::ZERO;
            let mut last = Lsn::ZERO;
            for (step, choice) in steps {
                position += 8;
                match (step, open) {
                    (0..=1, None) => {
                        let no = tracker.begin();
                        open = Some(no);
                        all.push((no, 0, None));
                    }
                    (0..=4, Some(_)) => {
                        tracker.track();
                        all.last_mut().unwrap().1 += 1;
                    }
                    (5, Some(_)) => {
                        tracker.commit(Lsn::new(position));
                        all.last_mut().unwrap().2 = Some(Lsn::new(position));
                        open = None;
                    }
                    (6..=8, _) => {
                        let waiting: Vec<usize> = (0..all.len()).filter(|&i| all[i].1 > 0).collect();
                        if !waiting.is_empty() {
                            let i = waiting[usize::from(choice) % waiting.len()];
                            tracker.ack(all[i].0, 1);
                            all[i].1 -= 1;
                        }
                    }
                    _ => {}
                }
                let prefix = all.iter().take_while(|t| t.1 == 0 && t.2.is_some()).last();
                let truth = prefix.and_then(|t| t.2).unwrap_or(Lsn::ZERO);
                let idle = all.iter().all(|t| t.1 == 0 && t.2.is_some());
                if idle { idle_mark = Lsn::new(position) }
                let flush = tracker.flush_lsn(Lsn::new(position));
                prop_assert_eq!(flush, truth.max(idle_mark));
                prop_assert!(flush >= last);
                last = flush;
            }
        }
    }
}
