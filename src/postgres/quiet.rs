//! `Quiet`: a plain socket that wakes its reader only while the reader waits for it.
//!
//! A runtime registers a socket once, edge-triggered: every packet that arrives ends the wait in `epoll_wait`, whether
//! somebody wants to read or not. A walsender sends each row by itself, so that a reader which lets the socket fill
//! ([`crate::gulp`]) was woken for each row all the same, and the walsender paid for waking it (measured: 36,000 to 51,000
//! waits in two seconds, for 3,600 and 1,400 reads).
//!
//! Here the socket is in an epoll set of its own, one-shot, and only that set is known to the runtime. It is armed when a
//! read or write would block, and disarmed by the event it brings (`epoll_ctl(2)`, `EPOLLONESHOT`); between two reads it is
//! silent.
//!
//! One task drives both directions, so there is one waker. Cancel safe: what is armed stays known in `self`.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A plain socket, not blocking.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Quiet {
    socket: Socket,
    /// The set that has the socket in it.
    set: AsyncFd<OwnedFd>,
    /// What it is armed for.
    armed: EventFlags,
}

impl Socket {
    pub(super) fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => (&mut &*socket).read(buffer),
            Self::Unix(socket) => (&mut &*socket).read(buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => (&mut &*socket).write(bytes),
            Self::Unix(socket) => (&mut &*socket).write(bytes),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Quiet {
    /// Takes over a socket that the runtime does not know. Needs the runtime's context.
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        let none = EventFlags::ONESHOT;
        epoll::add(&set, &socket, EventData::new_u64(0), none)?;
        #[expect(
            deprecated,
            reason = "its unsafe successor is for types that may close or change their descriptor; an OwnedFd does not"
        )]
        let set = AsyncFd::with_interest(set, Interest::READABLE)?;
        Ok(Self {
            socket,
            set,
            armed: EventFlags::empty(),
        })
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Waits until the socket may be ready for `what`.
    fn poll_ready(&mut self, cx: &mut Context<'_>, what: EventFlags) -> Poll<io::Result<()>> {
        if !self.armed.contains(what) {
            let armed = self.armed | what;
            let data = EventData::new_u64(0);
            epoll::modify(&self.set, &self.socket, data, armed | EventFlags::ONESHOT)?;
            self.armed = armed;
        }
        loop {
            // First the runtime's memory, then the set's: an event between the two is seen by the next round.
            ready!(self.set.poll_read_ready(cx))?.clear_ready();
            let nothing_yet = Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            let mut events = Vec::<Event>::with_capacity(1);
            let spare = rustix::buffer::spare_capacity(&mut events);
            if epoll::wait(&self.set, spare, Some(&nothing_yet))? > 0 {
                self.armed = EventFlags::empty();
                return Poll::Ready(Ok(()));
            }
        }
    }
}

/// Whether an attempt has to wait.
fn would_block<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

impl AsyncRead for Quiet {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.armed.contains(EventFlags::IN) {
            ready!(this.poll_ready(cx, EventFlags::IN))?;
        }
        // Always ready would starve the runtime's other tasks; but that much is a backlog, and its reader pauses.
        loop {
            let read = this.socket.read(buffer.initialize_unfilled());
            if would_block(&read) {
                ready!(this.poll_ready(cx, EventFlags::IN))?;
                continue;
            }
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Quiet {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.armed.contains(EventFlags::OUT) {
            ready!(this.poll_ready(cx, EventFlags::OUT))?;
        }
        loop {
            let written = this.socket.write(bytes);
            if would_block(&written) {
                ready!(this.poll_ready(cx, EventFlags::OUT))?;
                continue;
            }
            match written {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match &self.socket {
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Write),
            Socket::Unix(socket) => socket.shutdown(Shutdown::Write),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn pair() -> (Quiet, tokio::net::UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let ours = Quiet::new(Socket::Unix(ours)).unwrap();
        (ours, tokio::net::UnixStream::from_std(theirs).unwrap())
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_also_when_both_sides_wait() {
        let (mut ours, mut theirs) = pair();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let echo = tokio::spawn(async move {
            let mut buffer = vec![0; 10_000];
            loop {
                let bytes = theirs.read(&mut buffer).await.unwrap();
                if bytes == 0 {
                    return;
                }
                theirs.write_all(&buffer[..bytes]).await.unwrap();
            }
        });
        let mut received = Vec::new();
        let mut written = 0;
        let mut buffer = vec![0; 7_000];
        while received.len() < expected.len() {
            let step = async {
                tokio::select! {
                    bytes = ours.read(&mut buffer) => (bytes.unwrap(), 0),
                    () = std::future::ready(()), if written < sent.len() => (0, 1),
                }
            };
            let (bytes, write) = timeout(SOON, step).await.unwrap();
            received.extend_from_slice(&buffer[..bytes]);
            if write > 0 {
                let chunk = &sent[written..sent.len().min(written + 5_000)];
                // What is not taken at once waits until something was read.
                if let Ok(bytes) = timeout(Duration::from_millis(1), ours.write(chunk)).await {
                    written += bytes.unwrap();
                }
            }
        }
        assert!(received == expected, "the echo is not what was sent");
        ours.shutdown().await.unwrap();
        timeout(SOON, echo).await.unwrap().unwrap();
        assert_eq!(
            timeout(SOON, ours.read(&mut buffer))
                .await
                .unwrap()
                .unwrap(),
            0
        );
    }

    #[tokio::test]
    async fn a_wait_that_was_given_up_is_gone_on_with() {
        let (mut ours, mut theirs) = pair();
        let mut buffer = [0; 10];
        for round in 0..100_u8 {
            let none = timeout(Duration::from_millis(1), ours.read(&mut buffer)).await;
            assert!(none.is_err());
            theirs.write_all(&[round; 3]).await.unwrap();
            let bytes = timeout(SOON, ours.read(&mut buffer)).await.unwrap();
            assert_eq!(&buffer[..bytes.unwrap()], [round; 3]);
        }
    }

    #[tokio::test]
    async fn nobody_is_woken_who_does_not_wait() {
        // GIVEN a socket whose last read brought something
        let (mut ours, mut theirs) = pair();
        let mut buffer = [0; 10];
        theirs.write_all(b"x").await.unwrap();
        timeout(SOON, ours.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        // WHEN more comes
        theirs.write_all(b"y").await.unwrap();
        // THEN the runtime hears nothing of it
        let woken = timeout(Duration::from_millis(100), ours.set.readable()).await;
        assert!(woken.is_err(), "woken while nobody reads");
        // AND it is there for whoever reads
        let bytes = timeout(SOON, ours.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&buffer[..bytes], b"y");
    }
}
