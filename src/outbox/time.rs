//! `Instant`: Postgres' timestamps, from and to its text and binary formats.
//!
//! ```text
//! binary: Int64 microseconds since 2000-01-01 (UTC for timestamptz); the two extremes mean ±infinity
//! text:   2026-01-02 03:04:05.123456+00      DateStyle ISO; zone +HH[:MM[:SS]] only for timestamptz;
//!         0044-03-15 12:00:00+00 BC          years of 4 to 6 digits
//! ```
//! The calendar is the proleptic Gregorian, as in Postgres. A `timestamp` without a zone is taken as UTC. Seconds and
//! microseconds are kept apart because Postgres' last years do not fit into 64 bits of microseconds since 1970.

use std::fmt::{self, Write as _};

use super::error::Problem;
use crate::pgoutput::PG_EPOCH_UNIX_S;

const SECONDS_PER_DAY: i64 = 86_400;
/// Days from 0001-01-01 to 1970-01-01.
const UNIX_EPOCH_DAY: i64 = 719_162;
const MONTH_DAYS: [i64; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
/// Days of a common year before each month.
const DAYS_BEFORE_MONTH: [i64; 12] = {
    let mut before = [0; 12];
    let mut month = 1;
    while month < 12 {
        before[month] = before[month - 1] + MONTH_DAYS[month - 1];
        month += 1;
    }
    before
};

/// A point in time, to the microsecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Instant {
    /// Whole seconds since 1970-01-01 UTC, rounded down.
    unix_s: i64,
    /// Microseconds since that second.
    us: i64,
}

impl Instant {
    /// Reads the binary format's number.
    pub(super) fn from_pg_us(pg_us: i64) -> Result<Self, Problem> {
        if pg_us == i64::MAX || pg_us == i64::MIN {
            return Err(Problem::InfiniteTime);
        }
        Ok(Self {
            unix_s: pg_us.div_euclid(1_000_000) + PG_EPOCH_UNIX_S,
            us: pg_us.rem_euclid(1_000_000),
        })
    }

    /// Reads the text format.
    pub(super) fn from_text(text: &[u8]) -> Result<Self, Problem> {
        if text == b"infinity" || text == b"-infinity" {
            return Err(Problem::InfiniteTime);
        }
        parse(text).ok_or(Problem::NotTime)
    }

    /// Milliseconds since 1970, rounded down.
    pub(super) fn floor_ms(self) -> i64 {
        self.unix_s * 1000 + self.us / 1000
    }

    /// Milliseconds since 1970, rounded up: what must not be early stays late.
    pub(super) fn ceil_ms(self) -> i64 {
        self.unix_s * 1000 + (self.us + 999) / 1000
    }

    /// Appends the text that Postgres prints with `TimeZone` UTC and `DateStyle` ISO.
    pub(super) fn write(self, with_zone: bool, out: &mut String) -> fmt::Result {
        let (year, month, day) = date_of(self.unix_s.div_euclid(SECONDS_PER_DAY) + UNIX_EPOCH_DAY);
        let second = self.unix_s.rem_euclid(SECONDS_PER_DAY);
        // There is no year 0: 1 BC comes before AD 1.
        let (printed, bc) = if year > 0 {
            (year, "")
        } else {
            (1 - year, " BC")
        };
        write!(
            out,
            "{printed:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
            second / 3600,
            second / 60 % 60,
            second % 60
        )?;
        if self.us != 0 {
            write!(out, ".{:06}", self.us)?;
            out.truncate(out.trim_end_matches('0').len());
        }
        out.push_str(if with_zone { "+00" } else { "" });
        out.push_str(bc);
        Ok(())
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: usize) -> Option<i64> {
    let days = *MONTH_DAYS.get(month)?;
    Some(days + i64::from(month == 1 && is_leap(year)))
}

/// Days from 0001-01-01 to the first day of `year`; years before AD 1 count 0, -1, ….
fn days_before_year(year: i64) -> i64 {
    let whole = year - 1;
    whole * 365 + whole.div_euclid(4) - whole.div_euclid(100) + whole.div_euclid(400)
}

/// The day's number from 0001-01-01; `month` counts from 0, `day` from 1. `None`: there is no such day.
fn day_of(year: i64, month: usize, day: i64) -> Option<i64> {
    if !(1..=days_in_month(year, month)?).contains(&day) {
        return None;
    }
    let leap_day = i64::from(month > 1 && is_leap(year));
    Some(days_before_year(year) + DAYS_BEFORE_MONTH.get(month)? + leap_day + day - 1)
}

/// Year, month (from 1) and day (from 1) of the day that is `number` days after 0001-01-01.
fn date_of(number: i64) -> (i64, usize, i64) {
    // At most one year off: no year is longer than 366 days or, on the average, shorter than 365.2425.
    let mut year = (number * 400).div_euclid(146_097) + 1;
    if days_before_year(year) > number {
        year -= 1;
    } else if days_before_year(year + 1) <= number {
        year += 1;
    }
    let mut day = number - days_before_year(year);
    let mut month = 0;
    while let Some(length) = days_in_month(year, month).filter(|length| *length <= day) {
        day -= length;
        month += 1;
    }
    (year, month + 1, day + 1)
}

/// Takes a number of `digits.start()` to `digits.end()` digits off the front.
fn number(text: &mut &[u8], digits: std::ops::RangeInclusive<usize>) -> Option<i64> {
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !digits.contains(&length) {
        return None;
    }
    let (head, rest) = text.split_at(length);
    *text = rest;
    Some(
        head.iter()
            .fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0')),
    )
}

/// Takes `byte` off the front if it is there.
fn accept(text: &mut &[u8], byte: u8) -> bool {
    match text.split_first() {
        Some((first, rest)) if *first == byte => {
            *text = rest;
            true
        }
        _ => false,
    }
}

fn below(value: i64, limit: i64) -> Option<i64> {
    (value < limit).then_some(value)
}

fn parse(text: &[u8]) -> Option<Instant> {
    let (mut rest, bc) = match text.strip_suffix(b" BC") {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    let text = &mut rest;
    let printed_year = number(text, 4..=6).filter(|year| *year > 0)?;
    let year = if bc { 1 - printed_year } else { printed_year };
    let month = accept(text, b'-').then(|| number(text, 2..=2))??;
    let day = accept(text, b'-').then(|| number(text, 2..=2))??;
    let hour = accept(text, b' ').then(|| number(text, 2..=2))??;
    let minute = accept(text, b':').then(|| number(text, 2..=2))??;
    let second = accept(text, b':').then(|| number(text, 2..=2))??;
    let mut us = 0;
    if accept(text, b'.') {
        let before = text.len();
        us = number(text, 1..=6)?;
        for _ in (before - text.len())..6 {
            us *= 10;
        }
    }
    let offset_s = zone(text)?;
    if !text.is_empty() {
        return None;
    }
    let day = day_of(year, usize::try_from(month - 1).ok()?, day)?;
    let second_of_day = below(hour, 24)? * 3600 + below(minute, 60)? * 60 + below(second, 60)?;
    Some(Instant {
        unix_s: (day - UNIX_EPOCH_DAY) * SECONDS_PER_DAY + second_of_day - offset_s,
        us,
    })
}

/// Seconds east of UTC: `+HH[:MM[:SS]]`, or nothing.
fn zone(text: &mut &[u8]) -> Option<i64> {
    let sign = if accept(text, b'+') {
        1
    } else if accept(text, b'-') {
        -1
    } else {
        return Some(0);
    };
    let mut seconds = below(number(text, 2..=2)?, 24)? * 3600;
    for unit in [60, 1] {
        if !accept(text, b':') {
            break;
        }
        seconds += below(number(text, 2..=2)?, 60)? * unit;
    }
    Some(sign * seconds)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn printed(instant: Instant) -> String {
        let mut out = String::new();
        instant.write(true, &mut out).expect("a String takes it");
        out
    }

    /// `select x::text, timestamptz_send(x)` of Postgres 15.
    #[test]
    fn text_and_binary_agree_as_they_do_in_postgres() {
        for (text, pg_us) in [
            ("2026-01-02 03:04:05.123456+00", 0x0002_ea5d_bb16_f580_u64),
            ("1969-12-31 23:59:59.999999+00", 0xfffc_a2fe_c4c8_1fff),
            ("1970-01-01 00:00:00+00", 0xfffc_a2fe_c4c8_2000),
            ("2000-01-01 00:00:00+00", 0),
            ("2000-02-29 12:00:00.5+00", 0x0000_04ac_ef96_7120),
            ("1900-03-01 00:00:00+00", 0xfff4_ce91_5cae_a000),
            ("294276-12-31 23:59:59.999999+00", 0x7fff_ff5b_b3b2_9fff),
            ("4714-11-24 00:00:00+00 BC", 0xfd0f_7cc1_411f_a000),
            ("0001-12-31 23:59:59+00 BC", 0xff1f_e2ff_c58d_1dc0),
            ("0001-01-01 00:00:00+00", 0xff1f_e2ff_c59c_6000),
            ("12026-07-08 09:10:11.000001+00", 0x0464_19e3_1a39_22c1),
            ("0004-02-29 00:00:00+00", 0xff20_3dae_4a7b_2000),
            ("0005-02-28 00:00:00+00 BC", 0xff1f_57fd_9056_0000),
        ] {
            let from_text = Instant::from_text(text.as_bytes());
            assert_eq!(
                from_text,
                Instant::from_pg_us(pg_us.cast_signed()),
                "{text}"
            );
            assert_eq!(from_text.map(printed).as_deref(), Ok(text));
        }
    }

    #[test]
    fn offsets_are_east_of_utc() {
        let utc = Instant::from_text(b"2026-01-02 03:04:05.1+00");
        for text in [
            "2026-01-02 08:34:05.1+05:30",
            "2026-01-02 03:04:05.1",
            "2026-01-01 23:34:05.1-03:30",
            "2026-01-02 08:57:33.1+05:53:28",
        ] {
            assert_eq!(Instant::from_text(text.as_bytes()), utc, "{text}");
        }
    }

    #[test]
    fn milliseconds_round_down_or_up() {
        let ms = |text: &str| {
            let instant = Instant::from_text(text.as_bytes()).expect(text);
            (instant.floor_ms(), instant.ceil_ms())
        };
        assert_eq!(ms("1970-01-01 00:00:00.0015+00"), (1, 2));
        assert_eq!(ms("1970-01-01 00:00:00.002+00"), (2, 2));
        assert_eq!(ms("1969-12-31 23:59:59.9985+00"), (-2, -1));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["infinity", "-infinity"] {
            assert_eq!(
                Instant::from_text(text.as_bytes()),
                Err(Problem::InfiniteTime)
            );
        }
        for extreme in [i64::MIN, i64::MAX] {
            assert_eq!(Instant::from_pg_us(extreme), Err(Problem::InfiniteTime));
        }
        for text in [
            "",
            "now",
            "2026-01-02",
            "2026-01-02T03:04:05",
            "2026-13-01 00:00:00+00",
            "2026-00-01 00:00:00+00",
            "2026-02-29 00:00:00+00",
            "2026-01-32 00:00:00+00",
            "2026-01-00 00:00:00+00",
            "2026-01-01 24:00:00+00",
            "2026-01-01 00:60:00+00",
            "2026-01-01 00:00:60+00",
            "2026-01-01 00:00:00.+00",
            "2026-01-01 00:00:00.1234567+00",
            "2026-01-01 00:00:00+0",
            "2026-01-01 00:00:00+00:",
            "2026-01-01 00:00:00+00 AD",
            "2026-01-01 00:00:00 UTC",
            "0000-01-01 00:00:00+00",
            "02/01/2026 03:04:05",
            "1234567-01-01 00:00:00",
        ] {
            assert_eq!(
                Instant::from_text(text.as_bytes()),
                Err(Problem::NotTime),
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_binary_time_prints_and_reads_back(
            // Postgres' own range: 4714-11-24 BC to 294276-12-31.
            pg_us in -211_813_488_000_000_000_i64..9_223_371_331_200_000_000
        ) {
            let instant = Instant::from_pg_us(pg_us).expect("finite");
            prop_assert_eq!(Instant::from_text(printed(instant).as_bytes()), Ok(instant));
        }

        #[test]
        fn no_text_and_no_number_panics(text in "[-+ 0-9:.BC]{0,40}", pg_us in any::<i64>()) {
            let _ = Instant::from_text(text.as_bytes()).map(|i| (i.floor_ms(), i.ceil_ms(), printed(i)));
            let _ = Instant::from_pg_us(pg_us).map(|i| (i.floor_ms(), i.ceil_ms(), printed(i)));
        }
    }
}
