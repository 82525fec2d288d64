//! The watch over a SQL session: an answer that is lost ends the session, however long the question may take.
//!
//! Some statements may take as long as they take: a scan of a large table, the making of a slot, a wait for a lock. They have no deadline
//! ([`super::answer`]), and TCP finds only a peer that is gone. What a middlebox has swallowed, or a server that died behind one, would be
//! waited for without an end. So the task that drives a session looks at its bytes: where an answer is due and nothing has come for [`ANSWER`],
//! another session asks the server whether the process of this one is still at work. If it is not, twice in a row, the answer is lost; where nobody
//! can be asked [`UNKNOWN`] times in a row, the server is. Either ends the connection, and with it every wait for an answer on it.
//!
//! Input: the bytes of a session ([`Watched`]), and where to ask. Output: the end of [`drive`].
//!
//! # What is counted
//!
//! The client's `Query` and `Sync` messages, and its first message, are each answered by one `ReadyForQuery`
//! (<https://www.postgresql.org/docs/current/protocol-flow.html>). While received rows wait to be taken, nothing is read, so no
//! answer counts as due.

use std::future::Ready;
use std::future::ready;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{sleep, timeout};
use tokio_postgres::tls;
use tracing::{debug, warn};

use super::answer::ANSWER;
use super::stream::Stream;

/// So many times in a row nobody can be asked.
const UNKNOWN: u32 = 4;
/// So many times in a row its process was not at work.
const IDLE: u32 = 2;

/// What passes on a session.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    asked: AtomicU64,
    answered: AtomicU64,
    /// Bytes that were read.
    heard: AtomicU64,
    /// The client waits for bytes.
    is_waiting: AtomicBool,
}

impl Traffic {
    /// How much was heard, if an answer is due and waited for.
    fn due(&self) -> Option<u64> {
        let is_due = self.asked.load(Relaxed) > self.answered.load(Relaxed);
        (is_due && self.is_waiting.load(Relaxed)).then(|| self.heard.load(Relaxed))
    }
}

/// A stream whose messages are counted, from the first one on.
#[derive(Debug)]
pub(super) struct Watched {
    stream: Stream,
    traffic: Arc<Traffic>,
    sent: Messages,
    received: Messages,
}

impl Watched {
    pub(super) fn new(stream: Stream) -> (Self, Arc<Traffic>) {
        let traffic = Arc::new(Traffic::default());
        // The first message has no tag.
        traffic.asked.store(1, Relaxed);
        let sent = Messages {
            header: [0; 5],
            known: 1,
            left: 0,
        };
        let watched = Self {
            stream,
            traffic: Arc::clone(&traffic),
            sent,
            received: Messages::default(),
        };
        (watched, traffic)
    }
}

/// A walk over messages: a tag and a length, which counts itself.
#[derive(Debug, Default)]
struct Messages {
    header: [u8; 5],
    /// Of the header.
    known: usize,
    /// Bytes of the body that are still to come.
    left: usize,
}

impl Messages {
    /// How many messages with one of these tags begin in the next bytes.
    fn count(&mut self, mut bytes: &[u8], tags: &[u8]) -> u64 {
        let mut count = 0;
        while !bytes.is_empty() {
            let body = self.left.min(bytes.len());
            self.left -= body;
            bytes = &bytes[body..];
            let Some((byte, rest)) = bytes.split_first() else {
                break;
            };
            self.header[self.known] = *byte;
            self.known += 1;
            bytes = rest;
            if self.known == self.header.len() {
                let [tag, length @ ..] = self.header;
                let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(0);
                self.left = length.saturating_sub(4);
                self.known = 0;
                count += u64::from(tags.contains(&tag));
            }
        }
        count
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let bytes = &buffer.filled()[before..];
        let answered = this.received.count(bytes, b"Z");
        this.traffic.answered.fetch_add(answered, Relaxed);
        let heard = u64::try_from(bytes.len()).unwrap_or(0);
        this.traffic.heard.fetch_add(heard, Relaxed);
        this.traffic.is_waiting.store(read.is_pending(), Relaxed);
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(length)) = written {
            let asked = this.sent.count(&bytes[..length], b"QS");
            this.traffic.asked.fetch_add(asked, Relaxed);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl tls::TlsStream for Watched {
    fn channel_binding(&self) -> tls::ChannelBinding {
        self.stream.channel_binding()
    }
}

/// As [`super::stream::Established`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Established;

impl tls::TlsConnect<Watched> for Established {
    type Stream = Watched;
    type Error = io::Error;
    type Future = Ready<io::Result<Watched>>;

    fn connect(self, stream: Watched) -> Self::Future {
        ready(Ok(stream))
    }
}

/// The server's process that works for a session.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pid: String,
    /// When its server was started: another one has other processes.
    started: String,
}

impl Process {
    /// As [`process`] gives them.
    pub(super) fn new(pid: &str, started: &str) -> Option<Self> {
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(pid) && is_number(started)).then(|| Self {
            pid: pid.to_owned(),
            started: started.to_owned(),
        })
    }
}

/// SQL: when the server was started, in digits whatever the session's settings are.
const STARTED: &str = "pg_catalog.to_char(pg_catalog.timezone('UTC', pg_catalog.pg_postmaster_start_time()), 'YYYYMMDDHH24MISSUS')";

/// SQL that gives both.
pub(super) fn process() -> String {
    format!("SELECT pg_catalog.pg_backend_pid(), {STARTED}")
}

/// Whether a process is at work; `None` where that is not known. Boxed: it opens a session, which is driven by [`drive`].
pub(super) type AtWork = Pin<Box<dyn Future<Output = Option<bool>> + Send>>;

/// SQL for it. (Without `track_activities` a process has another state than these.)
pub(super) fn is_idle(process: &Process) -> String {
    let Process { pid, started } = process;
    format!(
        "SELECT {STARTED} = '{started}',
                NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = {pid} AND (state IS NULL OR state NOT LIKE 'idle%'))"
    )
}

/// Drives a connection to its end, or until an answer on it is lost. `ask` asks about its process.
/// `term` is how long nothing must come before it is asked for.
pub(super) async fn drive<C, E>(
    connection: C,
    traffic: Arc<Traffic>,
    ask: impl Fn() -> AtWork,
    term: Duration,
) where
    C: Future<Output = Result<(), E>>,
    E: std::fmt::Display,
{
    let mut connection = pin!(connection);
    let (mut before, mut idle, mut unknown) = (None, 0, 0);
    loop {
        if let Some(ended) = unless_ended(connection.as_mut(), sleep(term)).await {
            return tell_end(ended);
        }
        let now = traffic.due();
        if now.is_none() || now != before {
            (before, idle, unknown) = (now, 0, 0);
            continue;
        }
        let mut answer = None;
        let asking = async { answer = timeout(ANSWER, ask()).await.ok().flatten() };
        if let Some(ended) = unless_ended(connection.as_mut(), asking).await {
            return tell_end(ended);
        }
        (idle, unknown) = match answer {
            Some(true) => (0, 0),
            Some(false) => (idle + 1, 0),
            None => (0, unknown + 1),
        };
        if (idle >= IDLE || unknown >= UNKNOWN) && traffic.due() == now {
            warn!(
                "an SQL session is given up: an answer is due, nothing has come for long, and its process is not at work on the server or cannot be asked for"
            );
            return;
        }
    }
}

/// Waits while the connection goes on; how that ended, if it did.
async fn unless_ended<T>(
    connection: Pin<&mut impl Future<Output = T>>,
    wait: impl Future<Output = ()>,
) -> Option<T> {
    tokio::select! {
        biased;
        ended = connection => Some(ended),
        () = wait => None,
    }
}

fn tell_end<E: std::fmt::Display>(ended: Result<(), E>) {
    if let Err(error) = ended {
        debug!(%error, "an SQL connection ended");
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        // ParameterStatus, ReadyForQuery with a 'Z' in its body, an empty message, ReadyForQuery.
        let bytes = b"S\0\0\0\x06ZZZ\0\0\0\x05Z1\0\0\0\x04Z\0\0\0\x05I";
        for step in 1..=bytes.len() {
            let mut messages = Messages::default();
            let parts = bytes.chunks(step);
            let count: u64 = parts.map(|part| messages.count(part, b"Z")).sum();
            assert_eq!((count, messages.known, messages.left), (2, 0, 0), "{step}");
        }
    }

    /// Whether a connection is given up that does not end by itself for many terms.
    async fn is_given_up(traffic: &Arc<Traffic>, answer: Option<bool>) -> bool {
        const TERM: Duration = Duration::from_millis(1);
        let mut is_over = false;
        let connection = async {
            sleep(TERM * 200).await;
            is_over = true;
            Ok::<(), Infallible>(())
        };
        let ask = || -> AtWork { Box::pin(ready(answer)) };
        drive(connection, Arc::clone(traffic), ask, TERM).await;
        !is_over
    }

    #[tokio::test]
    async fn a_session_ends_where_an_answer_is_due_and_its_process_is_not_at_work() {
        let traffic = Arc::new(Traffic::default());
        // Nothing is due.
        assert!(!is_given_up(&traffic, Some(false)).await);
        traffic.asked.store(1, Relaxed);
        // Rows wait here.
        assert!(!is_given_up(&traffic, Some(false)).await);
        traffic.is_waiting.store(true, Relaxed);
        // The process is at work.
        assert!(!is_given_up(&traffic, Some(true)).await);
        // It is not, or nobody knows.
        assert!(is_given_up(&traffic, Some(false)).await);
        assert!(is_given_up(&traffic, None).await);
        traffic.answered.store(1, Relaxed);
        assert!(!is_given_up(&traffic, Some(false)).await);
    }
}
