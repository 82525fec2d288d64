//! The bytes of a replication stream: what a walsender sends, and the one message it is sent back.
//!
//! Pure functions over borrowed bytes; no I/O, no copy, no allocation, no panic. Input: what lies in the read buffer.
//! Output: borrowed [`Message`]s. Layouts are those of "Streaming Replication Protocol" in the Postgres documentation;
//! all numbers are big-endian.
//!
//! ```text
//! any message          tag u8 | length i32, counting itself | body
//! CopyData             'd' | length | one of:
//!   XLogData           'w' | start of the data u64 | end of WAL u64 | sent at i64 | payload…
//!   keepalive          'k' | end of WAL u64 | sent at i64 | reply requested u8
//!   StandbyStatusUpdate 'r' | written u64 | flushed u64 | applied u64 | sent at i64 | reply requested u8   (ours)
//! ```

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use postgres_protocol::message::backend;

use crate::Lsn;

/// Longest message that is believed. Postgres cannot build one of 1 GiB (`MaxAllocSize`), so that a longer one means
/// that the bytes are not what we think they are.
pub const MAX_MESSAGE_BYTES: usize = 1 << 30;

const HEADER_BYTES: usize = 5;
/// Bytes of one `StandbyStatusUpdate` with its `CopyData` header.
pub const STATUS_BYTES: usize = HEADER_BYTES + 34;

/// 2000-01-01T00:00:00Z, where Postgres' time begins, in Unix time.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// One message of the stream that the pipe deals with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A piece of decoded log: one pgoutput message.
    XLogData {
        /// Where the change lies in the log; zero for messages that are no change.
        wal_start: Lsn,
        /// Where the server's log ended when it sent this.
        wal_end: Lsn,
        /// When it was sent: microseconds since 2000-01-01 UTC, by the server's clock.
        send_time_us: i64,
        /// The pgoutput message.
        payload: &'a [u8],
    },
    /// A sign of life.
    Keepalive {
        /// Where the server's log ended when it sent this, as far as this stream has read it.
        wal_end: Lsn,
        /// When it was sent: microseconds since 2000-01-01 UTC, by the server's clock.
        send_time_us: i64,
        /// The server wants a status update now, or will close the connection soon.
        reply_requested: bool,
    },
}

/// Any message that may stand in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// `CopyData`.
    Frame(Frame<'a>),
    /// `ErrorResponse`: the stream has ended; its body.
    Error(&'a [u8]),
    /// `NoticeResponse`: its body.
    Notice(&'a [u8]),
    /// `ParameterStatus`: a setting was reloaded.
    Parameter,
    /// `CopyDone`, `CommandComplete` or `ReadyForQuery`: the server has ended the stream.
    End,
}

/// Bytes that are no replication message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// A length below 4, or above [`MAX_MESSAGE_BYTES`].
    Length(u32),
    /// A message that has no place in a replication stream.
    Tag(u8),
    /// A `CopyData` of an unknown kind.
    Kind(u8),
    /// A `CopyData` of this kind with too few or too many bytes.
    Body(u8),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(length) => write!(f, "a message claims to be {length} bytes long"),
            Self::Tag(tag) => write!(
                f,
                "a message of type {:?} has no place here",
                char::from(*tag)
            ),
            Self::Kind(kind) => write!(f, "CopyData of unknown kind {:?}", char::from(*kind)),
            Self::Body(kind) => write!(f, "CopyData {:?} has a wrong length", char::from(*kind)),
        }
    }
}

impl std::error::Error for FrameError {}

/// Bytes that the first message in `buffered` takes in all, as soon as its header is there.
#[inline]
pub fn message_bytes(buffered: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some((&[_, l0, l1, l2, l3], _)) = buffered.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    match usize::try_from(length) {
        Ok(bytes) if (4..=MAX_MESSAGE_BYTES).contains(&bytes) => Ok(Some(bytes + 1)),
        _ => Err(FrameError::Length(length)),
    }
}

/// Reads the first message in `buffered` and says how many bytes it took; `None` while it is incomplete.
#[inline]
pub fn parse(buffered: &[u8]) -> Result<Option<(Message<'_>, usize)>, FrameError> {
    let Some(total) = message_bytes(buffered)? else {
        return Ok(None);
    };
    let Some(body) = buffered.get(HEADER_BYTES..total) else {
        return Ok(None);
    };
    let message = match buffered[0] {
        backend::COPY_DATA_TAG => Message::Frame(copy_data(body)?),
        backend::ERROR_RESPONSE_TAG => Message::Error(body),
        backend::NOTICE_RESPONSE_TAG => Message::Notice(body),
        backend::PARAMETER_STATUS_TAG => Message::Parameter,
        backend::COPY_DONE_TAG | backend::COMMAND_COMPLETE_TAG | backend::READY_FOR_QUERY_TAG => {
            Message::End
        }
        tag => return Err(FrameError::Tag(tag)),
    };
    Ok(Some((message, total)))
}

#[inline]
fn copy_data(body: &[u8]) -> Result<Frame<'_>, FrameError> {
    let (&kind, rest) = body.split_first().ok_or(FrameError::Kind(0))?;
    let wrong = FrameError::Body(kind);
    match kind {
        b'w' => {
            let (wal_start, rest) = take_u64(rest).ok_or(wrong)?;
            let (wal_end, rest) = take_u64(rest).ok_or(wrong)?;
            let (sent, payload) = take_u64(rest).ok_or(wrong)?;
            Ok(Frame::XLogData {
                wal_start: Lsn::new(wal_start),
                wal_end: Lsn::new(wal_end),
                send_time_us: sent.cast_signed(),
                payload,
            })
        }
        b'k' => {
            let (wal_end, rest) = take_u64(rest).ok_or(wrong)?;
            let (sent, rest) = take_u64(rest).ok_or(wrong)?;
            let &[reply] = rest else {
                return Err(wrong);
            };
            Ok(Frame::Keepalive {
                wal_end: Lsn::new(wal_end),
                send_time_us: sent.cast_signed(),
                reply_requested: reply != 0,
            })
        }
        kind => Err(FrameError::Kind(kind)),
    }
}

#[inline]
fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (number, rest) = bytes.split_first_chunk()?;
    Some((u64::from_be_bytes(*number), rest))
}

/// Feedback to the walsender. Each position is that of the last byte plus one, and zero means "not known".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Everything before it was received.
    pub write: Lsn,
    /// Everything before it is safe for good: the slot's `confirmed_flush_lsn` moves here.
    pub flush: Lsn,
    /// Everything before it is visible to readers.
    pub apply: Lsn,
    /// Ask the server for a keepalive at once.
    pub reply_requested: bool,
}

impl StandbyStatus {
    /// Appends the whole message, [`STATUS_BYTES`] long, to `out`; `now_us` as [`postgres_time_us`] gives it.
    pub fn encode(&self, now_us: i64, out: &mut Vec<u8>) {
        out.push(backend::COPY_DATA_TAG);
        // The length counts itself and the body: 4 + 34.
        out.extend_from_slice(&38_i32.to_be_bytes());
        out.push(b'r');
        for position in [self.write, self.flush, self.apply] {
            out.extend_from_slice(&position.as_u64().to_be_bytes());
        }
        out.extend_from_slice(&now_us.to_be_bytes());
        out.push(u8::from(self.reply_requested));
    }
}

/// A moment as Postgres counts: microseconds since 2000-01-01 UTC (zero for anything before 1970).
pub fn postgres_time_us(at: SystemTime) -> i64 {
    let unix = at.duration_since(UNIX_EPOCH).unwrap_or(POSTGRES_EPOCH);
    let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
    micros(unix) - micros(POSTGRES_EPOCH)
}

#[cfg(test)]
#[path = "frame_tests.rs"]
#[allow(clippy::unwrap_used)]
mod tests;
