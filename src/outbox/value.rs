//! Column values as text or as bytes, the same in Postgres' text and binary formats.
//!
//! The rule of this module: a value reads the same whichever format it came in, namely as Postgres' text output. A key
//! that changed its text with the stream's format would change its lane and lose its order.
//!
//! Text that is already there is borrowed; text that has to be made (a binary uuid, a number) is appended to an arena
//! that the caller keeps, and referred to by its place there. Whoever can do without a value looks for NULL first: here it is an error.

use std::fmt::Write as _;
use std::ops::Range;

use super::error::Problem;
use super::time::Instant;
use crate::pgoutput::Column;
use crate::pgoutput::types::{
    BOOL, BPCHAR, BYTEA, INT2, INT4, INT8, JSON, JSONB, NAME, OID, TEXT, TIMESTAMP, TIMESTAMPTZ,
    UUID, VARCHAR, XID, XID8,
};

const HEX_DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Whether walpost can read values of the type `type_oid` in binary format.
///
/// When a column that walpost reads has another type, the stream must ask for text (leave the `binary` option out).
pub fn binary_safe(type_oid: u32) -> bool {
    matches!(
        type_oid,
        BOOL | BYTEA
            | NAME
            | INT8
            | INT2
            | INT4
            | TEXT
            | OID
            | XID
            | JSON
            | BPCHAR
            | VARCHAR
            | TIMESTAMP
            | TIMESTAMPTZ
            | UUID
            | JSONB
            | XID8
    )
}

/// A text: in the row itself, or in the arena.
#[derive(Clone, Debug)]
pub(super) enum Piece<'a> {
    Row(&'a str),
    Arena(Range<usize>),
}

impl<'a> Piece<'a> {
    /// The text; `arena` must be the one that the piece was made with.
    pub(super) fn resolve(self, arena: &'a str) -> &'a str {
        match self {
            Self::Row(text) => text,
            // The arena only grew since, so the range is there.
            Self::Arena(range) => arena.get(range).unwrap_or_default(),
        }
    }
}

/// Types whose binary format is their text.
#[inline]
fn is_text(type_oid: u32) -> bool {
    matches!(type_oid, TEXT | VARCHAR | BPCHAR | NAME | JSON)
}

/// The value's text.
#[inline]
pub(super) fn text<'a>(
    column: Column<'a>,
    type_oid: u32,
    arena: &mut String,
) -> Result<Piece<'a>, Problem> {
    match column {
        Column::Null => Err(Problem::Null),
        Column::Unchanged => Err(Problem::Unchanged),
        Column::Binary(bytes) if !is_text(type_oid) => binary_text(bytes, type_oid, arena),
        Column::Text(bytes) | Column::Binary(bytes) => utf8(bytes).map(Piece::Row),
        Column::Held(bytes) => held(bytes).map(Piece::Row),
    }
}

/// The last text of a column that most rows share with the row before: equal bytes are the same text, and need no look for UTF-8.
#[derive(Debug, Default)]
pub(super) struct RepeatedText(String);

impl RepeatedText {
    /// Longer texts are not kept.
    const MAX_BYTES: usize = 256;

    /// The value's text; `None` when it is the one of the last row.
    #[inline]
    pub(super) fn read<'a>(
        &mut self,
        column: Column<'a>,
        type_oid: u32,
        arena: &mut String,
    ) -> Result<Option<Piece<'a>>, Problem> {
        if self.is_same(column, type_oid) {
            return Ok(None);
        }
        let piece = text(column, type_oid, arena)?;
        if let Piece::Row(text) = piece
            && text.len() <= Self::MAX_BYTES
        {
            self.0.clear();
            self.0.push_str(text);
        }
        Ok(Some(piece))
    }

    /// The text that [`Self::read`] gave.
    pub(super) fn resolve<'a>(&'a self, piece: Option<Piece<'a>>, arena: &'a str) -> &'a str {
        piece.map_or(&self.0, |piece| piece.resolve(arena))
    }

    #[inline]
    fn is_same(&self, column: Column<'_>, type_oid: u32) -> bool {
        match column {
            Column::Text(bytes) => self.0.as_bytes() == bytes,
            Column::Binary(bytes) => is_text(type_oid) && self.0.as_bytes() == bytes,
            _ => false,
        }
    }
}

/// Appends the value's text to `out`.
pub(super) fn append_text(
    column: Column<'_>,
    type_oid: u32,
    out: &mut String,
) -> Result<(), Problem> {
    if let Piece::Row(text) = text(column, type_oid, out)? {
        out.push_str(text);
    }
    Ok(())
}

/// A payload: in the row, made as text, or decoded into the buffer.
#[derive(Clone, Debug)]
pub(super) enum Bytes<'a> {
    Row(&'a [u8]),
    Text(Piece<'a>),
    Decoded,
}

/// The value's bytes. A `bytea` in text format is decoded into `decoded`, which must be empty.
pub(super) fn bytes<'a>(
    column: Column<'a>,
    type_oid: u32,
    arena: &mut String,
    decoded: &mut Vec<u8>,
) -> Result<Bytes<'a>, Problem> {
    Ok(match (column, type_oid) {
        (Column::Null, _) => return Err(Problem::Null),
        (Column::Unchanged, _) => return Err(Problem::Unchanged),
        (Column::Held(bytes), _) => Bytes::Row(held(bytes)?.as_bytes()),
        (Column::Text(text), BYTEA) => {
            unhex(text, decoded)?;
            Bytes::Decoded
        }
        // Text types and JSON: in both formats the bytes are the value. They are not looked at.
        (Column::Text(bytes), _) | (Column::Binary(bytes), BYTEA) => Bytes::Row(bytes),
        (Column::Binary(bytes), oid) if is_text(oid) => Bytes::Row(bytes),
        (Column::Binary(bytes), JSONB) => Bytes::Row(without_version(bytes)?),
        (Column::Binary(bytes), _) => Bytes::Text(binary_text(bytes, type_oid, arena)?),
    })
}

/// The value's bytes in the escape format of `bytea`, for what is no UTF-8.
pub(super) fn escaped(column: Column<'_>) -> String {
    let (Column::Text(bytes) | Column::Binary(bytes) | Column::Held(bytes)) = column else {
        return String::new();
    };
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\\' => out.push_str("\\\\"),
            b'\0'..b'\x80' => out.push(char::from(byte)),
            _ => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\{byte:03o}");
            }
        }
    }
    out
}

/// The value as a point in time.
pub(super) fn instant(column: Column<'_>, type_oid: u32) -> Result<Instant, Problem> {
    match column {
        Column::Null => Err(Problem::Null),
        Column::Unchanged => Err(Problem::Unchanged),
        Column::Text(text) | Column::Held(text) => Instant::from_text(text),
        Column::Binary(bytes) if matches!(type_oid, TIMESTAMPTZ | TIMESTAMP) => {
            Instant::from_pg_us(i64::from_be_bytes(array(bytes, type_oid)?))
        }
        Column::Binary(_) => Err(Problem::BinaryType { oid: type_oid }),
    }
}

/// Text in another encoding: of ASCII it is the same in every one that a database can have.
fn held(bytes: &[u8]) -> Result<&str, Problem> {
    if bytes.is_ascii() {
        utf8(bytes)
    } else {
        Err(Problem::Unconvertible)
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(bytes).map_err(|_| Problem::NotUtf8)
}

fn array<const N: usize>(bytes: &[u8], oid: u32) -> Result<[u8; N], Problem> {
    bytes.try_into().map_err(|_| Problem::BinaryValue {
        oid,
        length: bytes.len(),
    })
}

/// `jsonb` in binary format: the version, 1, then the text.
fn without_version(bytes: &[u8]) -> Result<&[u8], Problem> {
    bytes.strip_prefix(&[1]).ok_or(Problem::BinaryValue {
        oid: JSONB,
        length: bytes.len(),
    })
}

/// What Postgres' text output of a binary value would be, where that is something else.
fn binary_text<'a>(bytes: &'a [u8], oid: u32, arena: &mut String) -> Result<Piece<'a>, Problem> {
    let start = arena.len();
    match oid {
        JSONB => return utf8(without_version(bytes)?).map(Piece::Row),
        BOOL => {
            let [value] = array(bytes, oid)?;
            return Ok(Piece::Row(if value == 0 { "f" } else { "t" }));
        }
        UUID => append_uuid(array(bytes, oid)?, arena),
        INT2 => append_number(i16::from_be_bytes(array(bytes, oid)?), arena),
        INT4 => append_number(i32::from_be_bytes(array(bytes, oid)?), arena),
        INT8 => append_number(i64::from_be_bytes(array(bytes, oid)?), arena),
        OID | XID => append_number(u32::from_be_bytes(array(bytes, oid)?), arena),
        XID8 => append_number(u64::from_be_bytes(array(bytes, oid)?), arena),
        BYTEA => {
            arena.push_str("\\x");
            append_hex(bytes, arena);
        }
        TIMESTAMPTZ | TIMESTAMP => match i64::from_be_bytes(array(bytes, oid)?) {
            // As a text it is as good as any other; as a point in time it is none.
            i64::MAX => return Ok(Piece::Row("infinity")),
            i64::MIN => return Ok(Piece::Row("-infinity")),
            pg_us => Instant::from_pg_us(pg_us)?
                .write(oid == TIMESTAMPTZ, arena)
                .map_err(|_| Problem::NotTime)?,
        },
        _ => return Err(Problem::BinaryType { oid }),
    }
    Ok(Piece::Arena(start..arena.len()))
}

fn append_number(number: impl std::fmt::Display, arena: &mut String) {
    // Writing to a String cannot fail.
    let _ = write!(arena, "{number}");
}

fn append_hex(bytes: &[u8], out: &mut String) {
    let digit = |nibble: u8| char::from(HEX_DIGITS[usize::from(nibble & 15)]);
    for byte in bytes {
        out.push(digit(byte >> 4));
        out.push(digit(*byte));
    }
}

/// Canonical form: lower case, in groups of 8-4-4-4-12. (The default table has one in every row, so it is made in one
/// piece, two digits at a time.)
fn append_uuid(uuid: [u8; 16], out: &mut String) {
    /// Where each byte's two digits stand.
    const PLACES: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    let mut text = [b'-'; 36];
    for (byte, place) in uuid.into_iter().zip(PLACES) {
        text[place..place + 2].copy_from_slice(&HEX_PAIRS[usize::from(byte)]);
    }
    // ASCII only.
    out.push_str(std::str::from_utf8(&text).unwrap_or_default());
}

/// The two digits of every byte.
const HEX_PAIRS: [[u8; 2]; 256] = {
    let mut table = [[0; 2]; 256];
    let mut byte = 0;
    while byte < table.len() {
        table[byte] = [HEX_DIGITS[byte >> 4], HEX_DIGITS[byte & 15]];
        byte += 1;
    }
    table
};

/// `bytea` text in hex format: `\x`, then two digits a byte.
fn unhex(text: &[u8], out: &mut Vec<u8>) -> Result<(), Problem> {
    let digits = text.strip_prefix(b"\\x").ok_or(Problem::NotHex)?;
    let (pairs, odd) = digits.as_chunks::<2>();
    if !odd.is_empty() {
        return Err(Problem::NotHex);
    }
    // Invalid digits are collected rather than branched upon: large payloads decode several times faster.
    let mut invalid = 0;
    out.extend(pairs.iter().map(|[high, low]| {
        let (high, low) = (NIBBLES[usize::from(*high)], NIBBLES[usize::from(*low)]);
        invalid |= high | low;
        high << 4 | low & 15
    }));
    if invalid & INVALID == 0 {
        Ok(())
    } else {
        Err(Problem::NotHex)
    }
}

/// Marks a byte that is no hexadecimal digit in [`NIBBLES`].
const INVALID: u8 = 0x80;

/// The value of every hexadecimal digit.
const NIBBLES: [u8; 256] = {
    let mut table = [INVALID; 256];
    let mut nibble = 0;
    while nibble < 16 {
        let digit = HEX_DIGITS[nibble];
        // `nibble` is below 16.
        #[allow(clippy::cast_possible_truncation)]
        let value = nibble as u8;
        table[digit as usize] = value;
        table[digit.to_ascii_uppercase() as usize] = value;
        nibble += 1;
    }
    table
};
