//! What the publisher is given: one event, as it is to go out.

use crate::Lsn;
use crate::ack::TxnNo;
use crate::pulsar::rows::Row;

/// One event on its way to the broker; everything is borrowed from the replication buffer.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// Becomes `partition_key`.
    pub key: &'a str,
    /// `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
    /// Unix time in milliseconds.
    pub event_time_ms: u64,
    /// Delayed delivery, Unix time in milliseconds.
    pub deliver_at_ms: Option<i64>,
    /// The event's transaction, for the receipt.
    pub txn: TxnNo,
    /// Start of the transaction's commit record (`final_lsn` of its Begin).
    pub commit_lsn: Lsn,
    /// Which of the transaction's rows it is.
    pub row: RowTag,
    /// The row whose id is to be told when the receipt has come ([`crate::pulsar::rows`]).
    pub mark: Option<Row<'a>>,
}

/// A row's place in its transaction, and the outbox table it is of: what a straggler is known by. (In one number, since
/// every message in flight has one.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowTag(u64);

impl RowTag {
    const ORDINAL_BITS: u32 = 48;

    /// The row number `ordinal` of its transaction, of the outbox table number `table`.
    pub fn new(table: u16, ordinal: u64) -> Self {
        assert!(
            ordinal < 1 << Self::ORDINAL_BITS,
            "a transaction of that many rows does not fit a log"
        );
        Self(u64::from(table) << Self::ORDINAL_BITS | ordinal)
    }

    /// The table's place in `WALPOST_OUTBOX_TABLE`.
    pub fn table(self) -> u32 {
        u32::try_from(self.0 >> Self::ORDINAL_BITS).expect("16 bits")
    }

    /// The row's place.
    pub fn ordinal(self) -> u64 {
        self.0 & ((1 << Self::ORDINAL_BITS) - 1)
    }
}

impl Outgoing<'_> {
    /// Transaction and row.
    pub(super) fn of(&self) -> (TxnNo, Lsn, RowTag) {
        (self.txn, self.commit_lsn, self.row)
    }
}
