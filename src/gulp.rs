//! `Gulp`: decides when the replication socket is read: at once while little comes, after a short pause while much does.
//!
//! A walsender sends every row by itself. A reader that wakes for each of them pays a wake-up a row, and makes the
//! walsender pay for it too; one that lets the socket fill for a fraction of a millisecond takes a hundred rows at once.
//! With little traffic nothing is held back but the rest of a transaction, for a tenth of a millisecond. (Not being woken meanwhile
//! takes a socket of its own kind: `postgres::quiet`.)
//!
//! In between there are two reasons for a pause of less:
//!
//! * A transaction is arriving. A walsender sends it in one go once its commit is in the log, so the rest of it is on its way.
//! * The rows come late. A small part of that more makes no difference to them, and all to the walsender: where processors are
//!   scarce a reader that wakes for each row takes the walsender's processor from it in the middle of each `send` (measured
//!   with 16 writers and 1,000 transactions of 10 rows a second on two cores: 0.2 ms for each row, and a walsender that fell
//!   behind by 100 ms while it slept or waited for its turn most of the time).
//!
//! How long the pause may be is set by the socket's buffer: when that is full the walsender stops. A Unix socket counts
//! about 2 KiB for each small row against a fixed 208 KiB, so it holds only some ninety rows, which a fast walsender
//! writes in less than half a millisecond. A TCP socket holds several milliseconds' rows: where these are old, a pause of 2 ms instead of
//! one costs a sixth less processor time. The runtime's timers tick in milliseconds; hence a timer of the kernel's.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::{Error, Result};

/// Backlog is this much within one [`WINDOW`] (8 MB/s): far above it a pause is full of rows, far below it every row is
/// read at once.
const MIN_BYTES: usize = 8 * 1024;
const WINDOW: Duration = Duration::from_millis(1);
/// The pause while there is backlog; more of it where that is old and the socket has room.
const BACKLOG: Duration = Duration::from_millis(1);
/// The pause while a transaction is arriving: ten rows' time, and a small part of what a receipt takes.
const IN_TRANSACTION: Duration = Duration::from_micros(100);
/// The part of how late rows are that the next ones may wait.
const LATE_PART: u32 = 8;
const LATE_MAX: Duration = Duration::from_millis(1);
/// Rows that come this long after their commit are a backlog, also when they come slowly. (A commit's time is that at which
/// its record was made, so that a slow flush of the log is in it: what is below this says nothing.)
pub const LATE: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Debug)]
pub struct Gulp {
    timer: AsyncFd<OwnedFd>,
    longest: Duration,
    window_start: Instant,
    window_bytes: usize,
    /// The timer runs, or has run out and was not looked at.
    pausing: bool,
    /// Something was read, and [`arrived`](Self::arrived) was not told what.
    has_read: bool,
    fast: bool,
    late: Duration,
}

impl Gulp {
    /// `longest` is how long the socket may fill at full speed before the walsender would have to wait.
    pub fn new(longest: Duration) -> Result<Self> {
        let failed =
            |error: std::io::Error| Error::temporary("cannot make a timer").caused_by(error);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.map_err(|error| failed(error.into()))?;
        #[expect(
            deprecated,
            reason = "its unsafe successor is for types that may close or change their descriptor; an OwnedFd does not"
        )]
        let timer = AsyncFd::new(timer).map_err(failed)?;
        Ok(Self {
            timer,
            longest,
            window_start: Instant::now(),
            window_bytes: 0,
            pausing: false,
            has_read: false,
            fast: false,
            late: Duration::ZERO,
        })
    }

    /// True while rows come faster than they are worth reading one by one, or very late.
    pub fn is_backlog(&self) -> bool {
        self.fast || self.late >= LATE
    }

    /// True while the socket is not to be read.
    pub fn is_pausing(&self) -> bool {
        self.pausing
    }

    /// Takes note of a read; when they are large the pause begins, unless this one left something (`more`).
    pub fn took(&mut self, bytes: usize, more: bool) -> Result<()> {
        let now = Instant::now();
        if now - self.window_start < WINDOW {
            self.window_bytes += bytes;
        } else {
            // The new window keeps what the pause has gathered, however the two are aligned.
            self.window_start = now;
            self.window_bytes = bytes;
        }
        self.fast = self.window_bytes >= MIN_BYTES;
        self.has_read = true;
        if !self.fast || more {
            return Ok(());
        }
        // The later the rows, the less they mind.
        let pause = (self.late / LATE_PART).max(BACKLOG).min(self.longest);
        self.pause(pause)
    }

    /// Takes note of what was read last: its rows came this `late`, and it ended within a transaction or not.
    pub fn arrived(&mut self, late: Duration, in_transaction: bool) -> Result<()> {
        self.late = late;
        if !std::mem::take(&mut self.has_read) || self.pausing {
            return Ok(());
        }
        let least = if in_transaction {
            IN_TRANSACTION
        } else {
            Duration::ZERO
        };
        let pause = (late / LATE_PART).min(LATE_MAX).max(least);
        if pause < IN_TRANSACTION {
            return Ok(());
        }
        self.pause(pause)
    }

    /// Begins a pause; one that runs already ends when this one does.
    fn pause(&mut self, pause: Duration) -> Result<()> {
        let it_value = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(pause.subsec_nanos()),
        };
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value,
        };
        let armed = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        armed.map_err(|error| Error::temporary("cannot set a timer").caused_by(error))?;
        self.pausing = true;
        Ok(())
    }

    /// Waits until the socket is due to be read. Cancel safe: the timer runs on in the kernel.
    pub async fn wait(&mut self) -> Result<()> {
        let failed =
            |error: std::io::Error| Error::temporary("cannot wait for a timer").caused_by(error);
        while self.pausing {
            let mut ready = self.timer.readable().await.map_err(failed)?;
            match rustix::io::read(ready.get_inner(), &mut [0; 8]) {
                Ok(_) => {
                    // Remembered as ready, the next wait would not give way to anything else.
                    ready.clear_ready();
                    self.pausing = false;
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(error) => return Err(failed(error.into())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_micros(300);

    /// What is left of the pause.
    fn remaining(gulp: &Gulp) -> Duration {
        let left = rustix::time::timerfd_gettime(&gulp.timer).unwrap().it_value;
        Duration::new(
            left.tv_sec.try_into().unwrap(),
            left.tv_nsec.try_into().unwrap(),
        )
    }

    #[tokio::test]
    async fn little_is_read_at_once() {
        let mut gulp = Gulp::new(PAUSE).unwrap();
        for _ in 0..3 {
            gulp.took(100, false).unwrap();
            assert!(!gulp.is_backlog());
            assert!(!gulp.pausing);
        }
    }

    #[tokio::test]
    async fn the_rest_of_a_transaction_is_waited_for_once() {
        let mut gulp = Gulp::new(PAUSE).unwrap();
        gulp.took(100, false).unwrap();
        let start = Instant::now();
        gulp.arrived(Duration::ZERO, true).unwrap();
        assert!(!gulp.is_backlog());
        gulp.wait().await.unwrap();
        assert!(start.elapsed() >= IN_TRANSACTION);
        // Nothing was read since: the next read is not held back.
        gulp.arrived(Duration::ZERO, true).unwrap();
        assert!(!gulp.is_pausing());
        gulp.took(100, false).unwrap();
        gulp.arrived(Duration::ZERO, false).unwrap();
        assert!(!gulp.is_pausing());
    }

    #[tokio::test]
    async fn what_is_late_is_waited_for_however_little_it_is() {
        let mut gulp = Gulp::new(PAUSE).unwrap();
        for (late, pause) in [(LATE, LATE_MAX), (LATE_MAX, LATE_MAX / LATE_PART)] {
            let start = Instant::now();
            gulp.took(100, false).unwrap();
            gulp.arrived(late, false).unwrap();
            assert_eq!(gulp.is_backlog(), late == LATE);
            gulp.wait().await.unwrap();
            assert!(start.elapsed() >= pause);
        }
        gulp.took(100, false).unwrap();
        gulp.arrived(LATE_MAX / 100, false).unwrap();
        assert!(!gulp.is_pausing());
    }

    #[tokio::test]
    async fn old_rows_are_waited_for_longer_where_the_socket_holds_more() {
        let longest = 3 * BACKLOG;
        let mut gulp = Gulp::new(longest).unwrap();
        for (late, pause) in [(Duration::ZERO, BACKLOG), (LATE, longest)] {
            gulp.arrived(late, false).unwrap();
            let start = Instant::now();
            gulp.took(MIN_BYTES, false).unwrap();
            assert!(remaining(&gulp) <= pause);
            gulp.wait().await.unwrap();
            assert!(start.elapsed() >= pause);
        }
    }

    #[tokio::test]
    async fn what_a_read_has_left_is_read_at_once() {
        let mut gulp = Gulp::new(PAUSE).unwrap();
        gulp.took(MIN_BYTES, true).unwrap();
        assert!(gulp.is_backlog() && !gulp.is_pausing());
        gulp.took(MIN_BYTES, false).unwrap();
        assert!(gulp.is_pausing());
    }

    #[tokio::test]
    async fn much_is_waited_for_and_the_pause_is_over_when_it_was_waited_for() {
        let mut gulp = Gulp::new(PAUSE).unwrap();
        for _ in 0..3 {
            let start = Instant::now();
            gulp.took(MIN_BYTES, false).unwrap();
            assert!(gulp.is_backlog());
            gulp.wait().await.unwrap();
            assert!(start.elapsed() >= PAUSE);
        }
        tokio::time::sleep(2 * WINDOW).await;
        gulp.took(1, false).unwrap();
        assert!(!gulp.is_backlog());
        gulp.wait().await.unwrap();
    }
}
