//! `Tuple`: the column values of one row, borrowed from the payload.
//!
//! ```text
//! TupleData: Int16 columns, then for each column
//!            'n'                       NULL
//!          | 'u'                       unchanged TOASTed value, not sent
//!          | 't' Int32 length, bytes   in text format
//!          | 'b' Int32 length, bytes   in binary format
//!          | 'h' Int32 length, bytes   text as the database holds it; only in rows that were read by SQL
//! ```
//! Source: Postgres documentation, "Logical Replication Message Formats", `TupleData`.
//!
//! A tuple is walked once when it is parsed; reading its columns afterwards cannot fail.

use std::fmt;
use std::iter::FusedIterator;

use super::reader::{DecodeError, Reader};

/// The kind of [`Column::Held`].
pub(crate) const HELD: u8 = b'h';

/// One column's value as it came over the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Column<'a> {
    /// SQL NULL.
    Null,
    /// A `TOASTed` value that an UPDATE left alone; Postgres does not send it. Never seen in an INSERT.
    Unchanged,
    /// The type's text output, in the client encoding.
    Text(&'a [u8]),
    /// The type's binary send format.
    Binary(&'a [u8]),
    /// The type's text output in the database's own encoding, because the server cannot convert the row to UTF-8. Never sent by
    /// a walsender: see [`crate::scanner`]'s `rows`.
    Held(&'a [u8]),
}

impl fmt::Debug for Column<'_> {
    /// Shows lengths only: values belong to the application and must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("Null"),
            Self::Unchanged => f.write_str("Unchanged"),
            Self::Text(bytes) => write!(f, "Text({} bytes)", bytes.len()),
            Self::Binary(bytes) => write!(f, "Binary({} bytes)", bytes.len()),
            Self::Held(bytes) => write!(f, "Held({} bytes)", bytes.len()),
        }
    }
}

/// The values of one row: checked, borrowed, in the order of the relation's columns.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    /// Exactly `count` encoded columns.
    data: &'a [u8],
}

impl<'a> Tuple<'a> {
    /// Reads one `TupleData` that fills `bytes` entirely.
    ///
    /// # Errors
    /// When `bytes` is anything but one whole `TupleData`.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes, 0, "TupleData");
        let tuple = Self::parse(&mut reader)?;
        reader.finish("last column")?;
        Ok(tuple)
    }

    /// Reads one `TupleData` off the front of `reader`, checking every length in it.
    #[inline]
    pub(super) fn parse(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let count = reader.count16("column count")?;
        let start = reader.rest();
        for _ in 0..count {
            match reader.u8("column kind")? {
                b'n' | b'u' => {}
                b't' | b'b' | HELD => {
                    let length = reader.count32("column length")?;
                    reader.bytes("column value", length)?;
                }
                other => return Err(reader.unexpected("column kind", other)),
            }
        }
        let (data, _) = start.split_at(start.len() - reader.rest().len());
        Ok(Self { count, data })
    }

    /// The number of columns.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// True for a row of a table without columns.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The values, in the order of the relation's columns.
    #[inline]
    pub fn columns(&self) -> TupleColumns<'a> {
        TupleColumns { data: self.data }
    }
}

impl fmt::Debug for Tuple<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.columns()).finish()
    }
}

/// Iterates over a [`Tuple`]'s values.
#[derive(Clone, Debug)]
pub struct TupleColumns<'a> {
    data: &'a [u8],
}

impl<'a> Iterator for TupleColumns<'a> {
    type Item = Column<'a>;

    #[inline]
    fn next(&mut self) -> Option<Column<'a>> {
        // `Tuple::parse` has been over this: no `?` below ends the iteration before the last column.
        let (&kind, rest) = self.data.split_first()?;
        if kind == b'n' || kind == b'u' {
            self.data = rest;
            return Some(if kind == b'n' {
                Column::Null
            } else {
                Column::Unchanged
            });
        }
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let (value, rest) = rest.split_at_checked(length)?;
        self.data = rest;
        Some(match kind {
            b't' => Column::Text(value),
            HELD => Column::Held(value),
            _ => Column::Binary(value),
        })
    }
}

impl FusedIterator for TupleColumns<'_> {}
