//! `Reader`: takes big-endian fields off the front of one `pgoutput` payload, every read checked.
//!
//! Owns nothing: it borrows the payload and hands out slices of it. Its errors name the message, the field and the
//! offset, never the bytes themselves (they may be an application's data).

use std::fmt;

use crate::Lsn;

/// Why a payload is no valid `pgoutput` message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeError {
    message: &'static str,
    field: &'static str,
    offset: usize,
    fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// The payload ends inside the field.
    Short { needed: usize, left: usize },
    /// A string without its terminating zero byte.
    Unterminated,
    /// A count or a length below zero.
    Negative(i64),
    /// A byte that should be one of a few.
    UnexpectedByte(u8),
    /// Bytes behind the last field.
    Leftover(usize),
}

impl DecodeError {
    /// The message type, as in the Postgres documentation (`Insert`, `Relation`, …).
    pub fn message(&self) -> &'static str {
        self.message
    }

    /// The field that could not be read.
    pub fn field(&self) -> &'static str {
        self.field
    }

    /// Where in the payload that field starts, in bytes; the message's type byte is at 0.
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "malformed pgoutput message {}: {} at byte {} ",
            self.message, self.field, self.offset
        )?;
        match self.fault {
            Fault::Short { needed, left } => {
                write!(f, "needs {needed} bytes, only {left} are left")
            }
            Fault::Unterminated => f.write_str("has no terminating zero byte"),
            Fault::Negative(value) => write!(f, "is negative ({value})"),
            Fault::UnexpectedByte(byte) => write!(f, "has the unexpected value 0x{byte:02x}"),
            Fault::Leftover(count) => {
                write!(f, "is followed by {count} bytes that belong to no field")
            }
        }
    }
}

impl std::error::Error for DecodeError {}

/// A cursor over one payload.
#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    total: usize,
    message: &'static str,
}

impl<'a> Reader<'a> {
    /// Starts behind the type byte: `rest` is what follows `offset` bytes of the payload.
    pub(super) fn new(rest: &'a [u8], offset: usize, message: &'static str) -> Self {
        Self {
            rest,
            total: offset.saturating_add(rest.len()),
            message,
        }
    }

    /// The bytes not yet read.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn offset(&self) -> usize {
        self.total - self.rest.len()
    }

    #[cold]
    fn error_at(&self, offset: usize, field: &'static str, fault: Fault) -> DecodeError {
        DecodeError {
            message: self.message,
            field,
            offset,
            fault,
        }
    }

    #[cold]
    fn short(&self, field: &'static str, needed: usize) -> DecodeError {
        let left = self.rest.len();
        self.error_at(self.offset(), field, Fault::Short { needed, left })
    }

    /// `byte`, just read from `field`, is none of the values the field may have.
    #[cold]
    pub(super) fn unexpected(&self, field: &'static str, byte: u8) -> DecodeError {
        self.error_at(
            self.offset().saturating_sub(1),
            field,
            Fault::UnexpectedByte(byte),
        )
    }

    #[inline]
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let Some((head, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.short(field, N));
        };
        self.rest = rest;
        Ok(*head)
    }

    #[inline]
    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(u8::from_be_bytes(self.array(field)?))
    }

    #[inline]
    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.array(field)?))
    }

    #[inline]
    pub(super) fn i32(&mut self, field: &'static str) -> Result<i32, DecodeError> {
        Ok(i32::from_be_bytes(self.array(field)?))
    }

    #[inline]
    pub(super) fn i64(&mut self, field: &'static str) -> Result<i64, DecodeError> {
        Ok(i64::from_be_bytes(self.array(field)?))
    }

    #[inline]
    pub(super) fn lsn(&mut self, field: &'static str) -> Result<Lsn, DecodeError> {
        Ok(Lsn::new(u64::from_be_bytes(self.array(field)?)))
    }

    /// A 16-bit count; Postgres writes it signed.
    #[inline]
    pub(super) fn count16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        let offset = self.offset();
        let count = i16::from_be_bytes(self.array(field)?);
        u16::try_from(count)
            .map_err(|_| self.error_at(offset, field, Fault::Negative(i64::from(count))))
    }

    /// A 32-bit count or length; Postgres writes it signed.
    #[inline]
    pub(super) fn count32(&mut self, field: &'static str) -> Result<usize, DecodeError> {
        let offset = self.offset();
        let count = self.i32(field)?;
        usize::try_from(count)
            .map_err(|_| self.error_at(offset, field, Fault::Negative(i64::from(count))))
    }

    #[inline]
    pub(super) fn bytes(
        &mut self,
        field: &'static str,
        length: usize,
    ) -> Result<&'a [u8], DecodeError> {
        let Some((head, rest)) = self.rest.split_at_checked(length) else {
            return Err(self.short(field, length));
        };
        self.rest = rest;
        Ok(head)
    }

    /// A zero-terminated string, which is UTF-8 but for names in a database of the encoding `SQL_ASCII`. Such a name cannot be
    /// in the settings, so nobody asks for it: U+FFFD stands for it.
    pub(super) fn string(&mut self, field: &'static str) -> Result<&'a str, DecodeError> {
        let bytes = self.terminated(field)?;
        Ok(std::str::from_utf8(bytes).unwrap_or("\u{fffd}"))
    }

    /// The same with U+FFFD in place of what is no UTF-8, and the rest as it is.
    pub(super) fn shown_string(&mut self, field: &'static str) -> Result<String, DecodeError> {
        let bytes = self.terminated(field)?;
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn terminated(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let offset = self.offset();
        let Some(length) = self.rest.iter().position(|&byte| byte == 0) else {
            return Err(self.error_at(offset, field, Fault::Unterminated));
        };
        let bytes = self.bytes(field, length)?;
        self.u8(field)?;
        Ok(bytes)
    }

    /// Every message ends here: leftovers mean that we misread it, or that it is of a protocol we did not ask for.
    #[inline]
    pub(super) fn finish(&self, last_field: &'static str) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(self.error_at(self.offset(), last_field, Fault::Leftover(self.rest.len())))
    }
}
