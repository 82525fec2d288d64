//! `Lsn`: a position in the write-ahead log, as Postgres prints it (`16/B374D848`).
//!
//! A newtype so that an LSN is never mixed up with a count, a transaction id or a time, all of which are 64-bit too.

use std::fmt;
use std::str::FromStr;

/// A write-ahead log position: a byte offset into the log since the cluster was made.
///
/// Zero is Postgres' `InvalidXLogRecPtr`: "no position".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// "No position"; what Postgres calls `InvalidXLogRecPtr`.
    pub const ZERO: Self = Self(0);

    /// Wraps a raw 64-bit position.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw 64-bit position.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// True for [`Lsn::ZERO`].
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Bytes of log from `earlier` to `self`; zero when `earlier` is not earlier.
    pub const fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// What [`Lsn::from_str`] says of a text that is no LSN.
#[derive(Debug, PartialEq, Eq)]
pub struct ParseLsnError(());

impl fmt::Display for ParseLsnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "not an LSN: expected two hexadecimal numbers of at most 32 bits, as in 16/B374D848",
        )
    }
}

impl std::error::Error for ParseLsnError {}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (high, low) = text.split_once('/').ok_or(ParseLsnError(()))?;
        let part = |digits: &str| {
            if digits.is_empty()
                || digits.len() > 8
                || !digits.bytes().all(|b| b.is_ascii_hexdigit())
            {
                return Err(ParseLsnError(()));
            }
            u64::from_str_radix(digits, 16).map_err(|_| ParseLsnError(()))
        };
        Ok(Self(part(high)? << 32 | part(low)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_as_postgres_does() {
        for (raw, text) in [
            (0, "0/0"),
            (0x16_B374_D848, "16/B374D848"),
            (u64::MAX, "FFFFFFFF/FFFFFFFF"),
        ] {
            assert_eq!(Lsn::new(raw).to_string(), text);
            assert_eq!(text.parse(), Ok(Lsn::new(raw)));
        }
    }

    #[test]
    fn refuses_what_is_no_lsn() {
        for text in [
            "",
            "/",
            "1",
            "1/",
            "/1",
            "g/0",
            "1/123456789",
            "+1/0",
            "1/2/3",
            " 1/2",
        ] {
            assert_eq!(text.parse::<Lsn>(), Err(ParseLsnError(())), "{text:?}");
        }
    }
}
