//! A Postgres snapshot taken apart: which transactions it shows as finished.
//!
//! Input: the text form of a `pg_snapshot`, `xmin:xmax:xip,…` (Postgres documentation, "Transaction ID and Snapshot Information
//! Functions"). Output: whether a transaction id is visible in it, by the same rule as `pg_visible_in_snapshot`.

use crate::{Error, Result};

/// See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VisibleXids {
    /// Every transaction below it has ended.
    xmin: u64,
    /// No transaction from it on had ended.
    xmax: u64,
    /// Those between the two that were in progress, rising.
    in_progress: Vec<u64>,
}

impl VisibleXids {
    /// Takes the text apart.
    ///
    /// # Errors
    /// Refused for anything that Postgres would not print.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || {
            Error::refused("a snapshot in walpost.progress is not of the form xmin:xmax:xip")
                .hint("it was edited by hand; walpost writes these values itself")
        };
        let mut parts = text.split(':');
        let mut part = || parts.next().ok_or_else(wrong);
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        let (xmin, xmax, listed) = (number(part()?)?, number(part()?)?, part()?);
        let listed = listed.split(',').filter(|xid| !xid.is_empty());
        let in_progress = listed.map(number).collect::<Result<Vec<_>>>()?;
        if parts.next().is_some() || xmin > xmax || !in_progress.is_sorted() {
            return Err(wrong());
        }
        Ok(Self {
            xmin,
            xmax,
            in_progress,
        })
    }

    /// Every transaction below it is visible.
    pub fn xmin(&self) -> u64 {
        self.xmin
    }

    /// No transaction from it on is visible.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// Whether the transaction had ended when the snapshot was taken.
    pub fn shows(&self, xid: u64) -> bool {
        xid < self.xmin || (xid < self.xmax && self.in_progress.binary_search(&xid).is_err())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_visible_by_the_rule_of_postgres() {
        let snapshot = VisibleXids::parse("10:20:10,14,15").unwrap();
        let visible: Vec<u64> = (8..22).filter(|xid| snapshot.shows(*xid)).collect();
        assert_eq!(visible, [8, 9, 11, 12, 13, 16, 17, 18, 19]);
        let quiet = VisibleXids::parse("20:20:").unwrap();
        assert!(quiet.shows(19) && !quiet.shows(20));
        assert_eq!(quiet.xmin(), 20);
    }

    #[test]
    fn what_postgres_would_not_print_is_an_error() {
        for text in ["", "1:2", "1:2:3:4", "2:1:", "1:9:5,4", "a:2:", "1:2:x"] {
            assert!(VisibleXids::parse(text).is_err(), "{text}");
        }
    }
}
