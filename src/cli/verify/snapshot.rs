//! Whether a transaction is visible in a snapshot, decided here: a row is judged by it, and every row is read.

use crate::{Error, Result};

/// A `pg_snapshot`: every transaction below `xmin` had ended, none from `xmax` on had, and those in `running` had not.
#[derive(Debug)]
pub(super) struct Delivered {
    xmin: u64,
    xmax: u64,
    /// Ascending.
    running: Vec<u64>,
}

impl Delivered {
    /// Reads `xmin:xmax:xip,…`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        Self::read(text).ok_or_else(|| {
            Error::refused("walpost.progress.delivered is not of the form xmin:xmax:xip")
        })
    }

    fn read(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let xmin = parts.next()?.parse().ok()?;
        let xmax = parts.next()?.parse().ok()?;
        let running = parts.next()?.split(',').filter(|xid| !xid.is_empty());
        let mut running: Vec<u64> = running.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        running.sort_unstable();
        Some(Self {
            xmin,
            xmax,
            running,
        })
    }

    /// The same as `pg_visible_in_snapshot(txid, snapshot)`.
    pub(super) fn contains(&self, txid: u64) -> bool {
        txid < self.xmin || txid < self.xmax && self.running.binary_search(&txid).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_visible_as_postgres_says() {
        let delivered = Delivered::parse("10:20:10,14,15").unwrap();
        let visible: Vec<u64> = (8..22).filter(|txid| delivered.contains(*txid)).collect();
        assert_eq!(visible, [8, 9, 11, 12, 13, 16, 17, 18, 19]);
        let quiet = Delivered::parse("20:20:").unwrap();
        assert!(quiet.contains(19) && !quiet.contains(20));
        for wrong in ["", "1:2", "x:2:", "1:2:3,y"] {
            assert!(Delivered::parse(wrong).is_err(), "{wrong}");
        }
    }
}
