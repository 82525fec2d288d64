//! `ReplicationStream`: the streaming connection, made for one task with one biased select.
//!
//! Owns the socket, one reusable read buffer and one small write buffer. Input: the walsender's bytes. Output: borrowed
//! [`Frame`]s; and status updates back.
//!
//! **One owner for both directions.** The stream is not split: [`fill`] also pushes out what [`queue_status`] left, so
//! that a loop that reads need not select on writing; [`flush`] is for the time in which intake is paused. Both poll
//! the same socket from the same task, for TLS as well.
//!
//! **Cancel safety.** [`fill`] and [`flush`] keep all their state in `self`: dropped before they are ready, they have
//! lost nothing, and the next call goes on. They may be branches of a select.
//!
//! **Memory.** The read buffer has [`READ_BUFFER_BYTES`]; a longer message makes it grow to that message's size, and
//! it shrinks again some reads later. Unsent status updates replace each other, so that the write buffer holds two at most.
//!
//! [`fill`]: ReplicationStream::fill
//! [`flush`]: ReplicationStream::flush
//! [`queue_status`]: ReplicationStream::queue_status

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};
use tracing::{debug, warn};

use super::frame::{
    self, Frame, FrameError, Message, STATUS_BYTES, StandbyStatus, postgres_time_us,
};
use super::server_error::ServerError;
use super::stream::Stream;
use crate::{Error, Result};

/// Size of the read buffer while messages are small: more than a socket holds by default (208 KiB), so that one
/// read can empty it.
pub const READ_BUFFER_BYTES: usize = 256 * 1024;

/// A buffer that grew is kept for this many reads without a long message, lest every long message pays for a new one.
const READS_BEFORE_SHRINKING: u32 = 64;

/// A TCP receive buffer holds hundreds of kilobytes, and grows; a fast walsender sends some eighty in a millisecond.
const TCP_GULP_PAUSE: Duration = Duration::from_millis(2);
/// A Unix socket holds about ninety rows (see [`crate::gulp`]).
const UNIX_GULP_PAUSE: Duration = Duration::from_micros(250);

/// SQLSTATE of the only notice of a walsender's that is about lost rows: "skipped loading publication" (`pgoutput.c`). The code, because the
/// text is in the server's language.
const PUBLICATION_SKIPPED: &str = "55000";

/// SQLSTATE with which the walsender of an earlier Postgres ends where there is no publication.
const UNDEFINED_OBJECT: &str = "42704";

/// How long [`ReplicationStream::close`] waits for the server at most.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// A stream of changes; see the module's text for how to drive it.
pub struct ReplicationStream {
    stream: Stream,
    /// `input[start..end]` was read and not taken yet.
    input: Vec<u8>,
    start: usize,
    end: usize,
    last_fill_bytes: usize,
    reads_without_long_message: u32,
    /// How the reading side ended, found while there still were bytes to hand out.
    ended: Option<io::Error>,
    /// Set by a notice that says so, see [`take_publication_missed`](Self::take_publication_missed).
    publication_missed: bool,
    /// `output[sent..]` is still to be written; all messages but those of `close` are [`STATUS_BYTES`] long.
    output: Vec<u8>,
    sent: usize,
    unflushed: bool,
}

impl std::fmt::Debug for ReplicationStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplicationStream")
            .field("buffered_bytes", &self.buffered_bytes())
            .field("has_unsent_status", &self.has_unsent_status())
            .finish_non_exhaustive()
    }
}

impl ReplicationStream {
    /// Takes over a connection on which the stream was started, and what was read beyond the answer to that.
    pub(super) fn new(stream: Stream, read_ahead: &[u8]) -> Self {
        let mut input = vec![0; READ_BUFFER_BYTES.max(read_ahead.len())];
        input[..read_ahead.len()].copy_from_slice(read_ahead);
        Self {
            stream,
            input,
            start: 0,
            end: read_ahead.len(),
            last_fill_bytes: 0,
            reads_without_long_message: 0,
            ended: None,
            publication_missed: false,
            output: Vec::with_capacity(4 * STATUS_BYTES),
            sent: 0,
            unflushed: false,
        }
    }

    /// Waits for bytes and reads all there are (up to the buffer's size); says how many. Sends queued status on the way.
    ///
    /// Take all frames with [`next_frame`](Self::next_frame) first. Cancel safe.
    ///
    /// # Errors
    /// Temporary when the connection has ended, cleanly or in the middle of a message.
    pub async fn fill(&mut self) -> Result<usize> {
        self.make_room()?;
        poll_fn(|cx| self.poll_fill(cx)).await
    }

    /// The next complete frame in the buffer, without any I/O; `None` means: time to [`fill`](Self::fill).
    ///
    /// # Errors
    /// The server's own error (temporary when the walsender was terminated), or temporary when it ended the stream.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>> {
        loop {
            let buffered = &self.input[self.start..self.end];
            let (message, used) = match frame::parse(buffered) {
                Ok(Some(parsed)) => parsed,
                Ok(None) => return Ok(None),
                Err(error) => return Err(unreadable(error)),
            };
            self.start += used;
            match message {
                Message::Frame(frame) => return Ok(Some(frame)),
                Message::Error(body) => {
                    return Err(server_says(ServerError::parse(body)));
                }
                Message::End => {
                    return Err(Error::temporary("the walsender has ended the stream"));
                }
                Message::Notice(body) => {
                    let notice = ServerError::parse(body);
                    self.publication_missed |= notice.code() == PUBLICATION_SKIPPED;
                    warn!(%notice, "the walsender has something to say");
                }
                Message::Parameter => {}
            }
        }
    }

    /// Lines up a status update; it is sent by the next [`fill`](Self::fill) or [`flush`](Self::flush).
    ///
    /// One that waits unsent is replaced: the newer one says all that it said.
    pub fn queue_status(&mut self, status: StandbyStatus) {
        // Of a message that is half sent, the other half must follow.
        self.output
            .truncate(self.sent.div_ceil(STATUS_BYTES) * STATUS_BYTES);
        status.encode(postgres_time_us(SystemTime::now()), &mut self.output);
    }

    /// True once after the walsender has said that it goes on without the publication, because there was none when the changes that
    /// it is decoding were made (Postgres 18; earlier ones end the stream with 42704).
    pub fn take_publication_missed(&mut self) -> bool {
        std::mem::take(&mut self.publication_missed)
    }

    /// True while a status update waits for the socket.
    pub fn has_unsent_status(&self) -> bool {
        self.unflushed || self.sent < self.output.len()
    }

    /// Sends what is queued; ready at once when nothing is. Reads nothing. Cancel safe.
    ///
    /// # Errors
    /// Temporary when the connection is gone.
    pub async fn flush(&mut self) -> Result<()> {
        poll_fn(|cx| self.poll_send(cx)).await.map_err(|error| {
            Error::temporary("the connection to the walsender is lost").caused_by(error)
        })
    }

    /// [`queue_status`](Self::queue_status) and [`flush`](Self::flush): for where nothing else is waiting.
    pub async fn send_status(&mut self, status: StandbyStatus) -> Result<()> {
        self.queue_status(status);
        self.flush().await
    }

    /// Bytes that the last [`fill`](Self::fill) read. Small against [`buffer_bytes`](Self::buffer_bytes) while rows keep
    /// coming means that waiting a little before the next one would read more at once.
    pub fn last_fill_bytes(&self) -> usize {
        self.last_fill_bytes
    }

    /// True when the last [`fill`](Self::fill) left no room: the socket most likely has more.
    pub fn is_full(&self) -> bool {
        self.end == self.input.len()
    }

    /// How long the socket may be left to fill while there is backlog, before the walsender would have to wait.
    pub fn gulp_pause(&self) -> Duration {
        if self.stream.is_unix() {
            UNIX_GULP_PAUSE
        } else {
            TCP_GULP_PAUSE
        }
    }

    /// Size of the read buffer now.
    pub fn buffer_bytes(&self) -> usize {
        self.input.len()
    }

    /// Bytes read but not taken yet; after [`next_frame`](Self::next_frame) said `None`, part of one message.
    pub fn buffered_bytes(&self) -> usize {
        self.end - self.start
    }

    /// Ends the stream: sends what is queued and Terminate, then waits (2 s at most) until the server has closed, so
    /// that the slot is free for whoever comes next. What it still sends is thrown away.
    ///
    /// Terminate alone, without `CopyDone`: after `CopyDone` a walsender finishes the transaction it is sending before it
    /// reads on, at Terminate it exits at once (`ProcessRepliesIfAny` in `walsender.c`).
    ///
    /// # Errors
    /// Temporary when the last status may not have arrived.
    pub async fn close(self) -> Result<()> {
        self.close_within(CLOSE_DEADLINE).await
    }

    async fn close_within(mut self, deadline: Duration) -> Result<()> {
        let goodbye = async {
            self.output.extend_from_slice(b"X\0\0\0\x04");
            loop {
                // Reading while writing: the server may be blocked until we take what it sends.
                self.start = self.end;
                self.make_room()?;
                if let Err(error) = poll_fn(|cx| self.poll_fill(cx)).await {
                    // The end is what we wait for, if everything was sent before.
                    return if self.has_unsent_status() {
                        Err(error)
                    } else {
                        Ok(())
                    };
                }
            }
        };
        tokio::time::timeout(deadline, goodbye)
            .await
            .unwrap_or_else(|_| {
                Err(Error::temporary(format!(
                    "the walsender did not close within {deadline:?}"
                )))
            })
    }

    /// Makes the first message fit behind `start`, and leaves room to read into.
    fn make_room(&mut self) -> Result<()> {
        // What is left is part of one message, so that this moves little; a long message is moved once.
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = frame::message_bytes(&self.input[..self.end]).map_err(unreadable)?;
        let wanted = wanted.unwrap_or(0);
        if wanted > READ_BUFFER_BYTES {
            self.reads_without_long_message = 0;
        } else {
            self.reads_without_long_message = self.reads_without_long_message.saturating_add(1);
        }
        if wanted > self.input.len() {
            self.resize(wanted.next_multiple_of(READ_BUFFER_BYTES));
        } else if self.input.len() > READ_BUFFER_BYTES
            && self.end <= READ_BUFFER_BYTES
            && self.reads_without_long_message > READS_BEFORE_SHRINKING
        {
            self.resize(READ_BUFFER_BYTES);
        }
        if self.end == self.input.len() {
            return Err(Error::bug(
                "the replication stream was read before its frames were taken",
            ));
        }
        Ok(())
    }

    fn resize(&mut self, bytes: usize) {
        // A new zeroed Vec comes from the system untouched: a huge one costs memory only as it fills.
        let mut input = vec![0; bytes];
        input[..self.end].copy_from_slice(&self.input[..self.end]);
        self.input = input;
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize>> {
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            // The reading side knows more: the server's reason may lie there unread.
            debug!(%error, "cannot send to the walsender");
        }
        let mut total = 0;
        // Under TLS each read yields about one record; so read until there is nothing, or no room. A plain socket gives all it
        // has at once: asking again would cost a system call, and arm a quiet one.
        while self.ended.is_none()
            && self.end < self.input.len()
            && (total == 0 || self.stream.is_encrypted())
        {
            let mut room = ReadBuf::new(&mut self.input[self.end..]);
            match Pin::new(&mut self.stream).poll_read(cx, &mut room) {
                Poll::Ready(Ok(())) => match room.filled().len() {
                    0 => self.ended = Some(io::ErrorKind::UnexpectedEof.into()),
                    bytes => {
                        self.end += bytes;
                        total += bytes;
                    }
                },
                Poll::Ready(Err(error)) => self.ended = Some(error),
                Poll::Pending => break,
            }
        }
        if total > 0 {
            self.last_fill_bytes = total;
            return Poll::Ready(Ok(total));
        }
        match &self.ended {
            Some(error) => Poll::Ready(Err(self.end_of_stream(error))),
            None => Poll::Pending,
        }
    }

    fn end_of_stream(&self, error: &io::Error) -> Error {
        match (error.kind(), self.buffered_bytes()) {
            (io::ErrorKind::UnexpectedEof, 0) => {
                Error::temporary("the walsender closed the connection")
            }
            (io::ErrorKind::UnexpectedEof, bytes) => Error::temporary(format!(
                "the walsender closed the connection in the middle of a message ({bytes} bytes of it had come)"
            )),
            (kind, _) => Error::temporary("the connection to the walsender is lost")
                .caused_by(io::Error::new(kind, error.to_string())),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.output.len() {
            let stream = Pin::new(&mut self.stream);
            match ready!(stream.poll_write(cx, &self.output[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                bytes => {
                    self.sent += bytes;
                    self.unflushed = true;
                }
            }
        }
        self.output.clear();
        self.sent = 0;
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Behind an error of a stream that cannot be read on because of what the log holds, however often it is opened: see
/// [`is_unreadable`].
#[derive(Debug)]
pub struct UnreadableLog(pub String);

impl std::fmt::Display for UnreadableLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UnreadableLog {}

/// True for an error with an [`UnreadableLog`] as its source.
pub fn is_unreadable(error: &Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(<dyn std::error::Error>::is::<UnreadableLog>)
}

/// What the server says when it ends the stream, and where it was in the log.
fn server_says(error: ServerError) -> Error {
    // A stream that has begun has its slot: what is missing is the publication, when the change that is being decoded was made.
    if error.code() == UNDEFINED_OBJECT {
        return Error::refused(
            "the publication did not exist when changes were made that the slot now has to bring, and the walsender ends there",
        )
        .caused_by(UnreadableLog(error.to_string()));
    }
    let doing = match error.position() {
        Some(at) => format!("go on streaming at {at}"),
        None => "go on streaming".to_owned(),
    };
    error.into_error(&doing)
}

fn unreadable(error: FrameError) -> Error {
    Error::temporary("the walsender sent bytes that are no replication message").caused_by(error)
}

#[cfg(test)]
#[path = "replication_stream_tests.rs"]
#[allow(clippy::unwrap_used)]
mod tests;
