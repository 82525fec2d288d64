//! The lease: whether this process may write to brokers at this moment.
//!
//! Whoever holds the slot's advisory lock may publish ([`crate::scanner::recovery`]). The lock belongs to a session of Postgres, and a
//! process does not notice at once that its session has ended: the network is cut, the process was stopped (SIGSTOP, a frozen virtual
//! machine), or its thread was busy. Meanwhile another instance has the slot. So each publisher of the process asks the lease before it writes.
//!
//! Input: the answers of the session that holds the lock ([`Lease::hold`]), and a clock. Output: [`Lease::holds`], and futures that wait for
//! its beginning and its end.
//!
//! # What is a proof
//!
//! An answer of that session proves that the lock was held when the *question was asked*. It is asked once a second. A proof is good for
//! [`TERM`] from the question on. Bytes of the replication stream prove nothing: they may have waited in the socket while the process was stopped.
//!
//! # When Postgres is lost
//!
//! | after | what happens |
//! |---|---|
//! | the session ends | nothing more is written to a broker; opening again begins at once (`connector`, `scanner::poll`) |
//! | the session does not answer for [`TERM`] | the same, without an end of the stream: the next answer lifts it |
//! | [`ANSWER`] without an answer | the session counts as ended |
//! | [`PATIENCE`] after the loss | a publisher without unfinished events is closed; what is known of received rows stays |
//! | [`CLOSE_BY`] after the loss | every publisher is dropped; what had no receipt comes again from the log |
//!
//! The loss is the end of the session, or where it only fell silent the last question that it answered. A dropped
//! publisher ends its connections, so the broker closes its producers and the successor may open producers of the same names.
//!
//! # A process that is stopped
//!
//! Its kernel still acknowledges what arrives, so neither TCP nor the server's keepalive finds it dead, and without a limit it would hold the lock
//! as long as it is stopped. So the session has an `idle_session_timeout` of [`SERVER_PATIENCE`]: the server ends it only when the process has stopped asking. The
//! slot itself is free when the walsender has given up, after `wal_sender_timeout` (60 s by default; it asks for a status after half of that). Then the
//! successor streams. The broker closes the old connection after two keepalive intervals of its own (30 s each), or 5 s after a
//! successor has asked for a producer of the same name, whichever comes first.
//!
//! # Why nothing is published behind a successor's back
//!
//! 1. A connection's task asks [`Lease::holds`] in the same poll that writes (`pulsar::connection`). So a process that was stopped for longer
//!    than [`TERM`] writes nothing after it goes on, before the session has answered a question that was asked after that: neither what is in the
//!    connection's queue, nor a batch, nor a resend, nor a request for a producer. If the lock was lost meanwhile, the answer is an error.
//! 2. The clock is `CLOCK_BOOTTIME`: it also counts the time in which the machine was suspended. (A hypervisor that stops a machine without telling
//!    it stops that clock too. Then only 4. holds.)
//! 3. What the kernel has taken before cannot be called back, nor can the one system call that the process was about to make between the check
//!    and its stop. Also, a server that ends the session within [`TERM`] of a proof lets a successor begin while this process still
//!    counts as holder, until it has read the end of the session: normally a matter of the network's delay.
//! 4. What protects there are the producers' names. The broker has one producer of a name on a topic. The successor publishes only once its own
//!    producer is open, and by then the broker has closed the old one: what arrives for that afterwards is refused, and what arrived before lies in front
//!    of all that the successor publishes. A successor finds an open producer of a stopped process with `ProducerBusy`; a broker of Pulsar 4.0 then pings
//!    the other connection, and closes it where nothing answers.
//! 5. Names do not protect where they differ: another number of lanes or partitions, another routing (see `pulsar::producer`), stragglers
//!    and unmarked rows, whose producers have names of their own. There 1. to 3. are all there is: the exposure is one write, or what the kernel holds.
//!
//! # What is written to Postgres
//!
//! Needs no clock: the server judges it. Stragglers are stored under the claim ([`crate::scanner::straggler_fence`]); marks and deletions name the claim
//! in their statement ([`crate::scanner::after_publish`]); notes of progress are compare-and-set ([`crate::scanner::progress`]). What looks through the tables ends with
//! the lease ([`crate::scanner::modes`]).
//!
//! `tests/ha.rs` and `tests/ha/` try to break this.

use std::future::{pending, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tracing::debug;

use crate::postgres::sql_error;
use crate::{Error, Result};

/// How long an answer is good for, from its question on.
pub const TERM: Duration = Duration::from_secs(5);
/// How often the session is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// A session that takes longer than this to answer counts as ended. With the pause between questions it is below [`CLOSE_BY`].
pub const ANSWER: Duration = Duration::from_secs(8);
/// The server ends the session of a process that has not asked for this long: by then the lease does not hold, and the session counts as ended here.
const SERVER_PATIENCE: Duration = Duration::from_secs(15);
/// How long after the loss a publisher without unfinished events stays open.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How long after the loss any publisher stays open.
pub const CLOSE_BY: Duration = Duration::from_secs(10);

/// See the module's documentation. The default one never ends: a command that publishes needs no lock.
#[derive(Clone, Debug, Default)]
pub struct Lease(Option<Arc<watch::Sender<State>>>);

#[derive(Clone, Copy, Debug)]
enum State {
    Proven {
        asked: Instant,
        /// By the clock of [`uptime`].
        until: Duration,
    },
    Lost {
        since: Instant,
    },
}

/// When a question was asked, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Asked {
    at: Instant,
    uptime: Duration,
}

impl Asked {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            uptime: uptime(),
        }
    }
}

/// Time since the machine was started, the time in which it was suspended included.
fn uptime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

impl State {
    fn holds(&self) -> bool {
        match self {
            Self::Proven { until, .. } => uptime() < *until,
            Self::Lost { .. } => false,
        }
    }
}

impl Lease {
    /// A lease that is not held yet.
    pub fn new() -> Self {
        let since = Instant::now();
        Self(Some(Arc::new(watch::Sender::new(State::Lost { since }))))
    }

    /// Whether this process may write to brokers now.
    pub fn holds(&self) -> bool {
        self.0.as_ref().is_none_or(|state| state.borrow().holds())
    }

    /// Waits until it is held. Cancel safe.
    pub async fn held(&self) {
        if let Some(state) = &self.0 {
            // The sender is ours, so there is no error.
            let mut state = state.subscribe();
            drop(state.wait_for(State::holds).await);
        }
    }

    /// Waits until it is not held: lost, or without a proof. Looks at the clock whenever it is polled. Cancel safe.
    pub async fn ended(&self) {
        let Some(state) = &self.0 else {
            return pending().await;
        };
        let mut changes = state.subscribe();
        loop {
            let now = *changes.borrow_and_update();
            let State::Proven { until, .. } = now else {
                return;
            };
            let left = until.saturating_sub(uptime());
            let over = poll_fn(|_| {
                if uptime() < until {
                    Poll::Pending
                } else {
                    Poll::Ready(())
                }
            });
            tokio::select! {
                biased;
                () = over => return,
                _ = changes.changed() => {}
                () = sleep(left) => {}
            }
        }
    }

    /// Waits until the session that holds the lock has ended, or counts as ended. Cancel safe.
    pub async fn lost(&self) {
        let Some(state) = &self.0 else {
            return pending().await;
        };
        let is_lost = |state: &State| matches!(state, State::Lost { .. });
        let mut state = state.subscribe();
        drop(state.wait_for(is_lost).await);
    }

    /// Waits for `work`, as long as the session lasts.
    ///
    /// # Errors
    /// Those of `work`; temporary when the lease is lost first.
    pub async fn during<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.lost() => Err(lost()),
            done = work => done,
        }
    }

    /// Since when it is lost; `None` while the session lasts.
    pub fn lost_since(&self) -> Option<Instant> {
        match *self.0.as_ref()?.borrow() {
            State::Lost { since } => Some(since),
            State::Proven { .. } => None,
        }
    }

    fn prove(&self, asked: Asked) {
        if let Some(state) = &self.0 {
            state.send_replace(State::Proven {
                asked: asked.at,
                until: asked.uptime + TERM,
            });
        }
    }

    /// One that is held without a session, for as long as an answer is good for.
    #[cfg(test)]
    pub(crate) fn proven() -> Self {
        let lease = Self::new();
        lease.prove(Asked::now());
        lease
    }

    /// One whose session was lost at that time.
    #[cfg(test)]
    pub(crate) fn lost_at(since: Instant) -> Self {
        Self(Some(Arc::new(watch::Sender::new(State::Lost { since }))))
    }

    /// Ends it.
    #[cfg(test)]
    pub(crate) fn end(&self) {
        self.lose(false);
    }

    /// Holds it again.
    #[cfg(test)]
    pub(crate) fn renew(&self) {
        self.prove(Asked::now());
    }

    /// The session has ended; or it was silent, since the last question that it answered.
    fn lose(&self, was_silent: bool) {
        if let Some(state) = &self.0 {
            state.send_if_modified(|state| {
                let State::Proven { asked, .. } = *state else {
                    return false;
                };
                let since = if was_silent { asked } else { Instant::now() };
                *state = State::Lost { since };
                true
            });
        }
    }

    /// Holds it as long as this session answers, which holds the slot's lock. Nothing else that takes long may run on the session
    /// while something is to be published. From here on the server ends the session when nothing is asked.
    ///
    /// # Errors
    /// Temporary when the session does not answer now.
    pub async fn hold(self, client: Client) -> Result<Hold> {
        let client = Arc::new(client);
        let limits = format!(
            "SET idle_session_timeout = {0}; SET idle_in_transaction_session_timeout = {0}",
            SERVER_PATIENCE.as_millis()
        );
        let asked = Asked::now();
        match ask(&client, &limits).await {
            Answer::Yes => {}
            Answer::None => return Err(silent()),
            Answer::Ended(error) => return Err(error),
        }
        self.prove(asked);
        let task = tokio::spawn(keep(self.clone(), Arc::clone(&client)));
        Ok(Hold {
            client,
            lease: self,
            task,
        })
    }
}

/// What became of a question.
enum Answer {
    Yes,
    None,
    Ended(Error),
}

async fn ask(client: &Client, question: &str) -> Answer {
    match timeout(ANSWER, client.batch_execute(question)).await {
        Ok(Ok(())) => Answer::Yes,
        Ok(Err(error)) => Answer::Ended(sql_error("ask the session that holds the lock", error)),
        Err(_) => Answer::None,
    }
}

/// Asks until there is no answer.
async fn keep(lease: Lease, client: Arc<Client>) {
    loop {
        sleep(INTERVAL).await;
        let asked = Asked::now();
        match ask(&client, "SELECT").await {
            Answer::Yes => lease.prove(asked),
            Answer::None => return lease.lose(true),
            Answer::Ended(error) => {
                debug!("the lease ends: {}", error.report());
                return lease.lose(false);
            }
        }
    }
}

fn silent() -> Error {
    Error::temporary(format!(
        "the session that holds the lock on the slot has not answered for {ANSWER:?}"
    ))
}

/// The error of whoever works under a lease that is lost.
pub fn lost() -> Error {
    Error::temporary(
        "the session that holds the lock on the slot has ended, or does not answer: another instance may have the slot",
    )
}

/// The session that holds the lock, and the lease with it, until this is dropped.
#[derive(Debug)]
pub struct Hold {
    client: Arc<Client>,
    lease: Lease,
    task: JoinHandle<()>,
}

impl Hold {
    /// The session.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Ends the lease and gives the session, to give back the lock with it.
    pub fn into_client(self) -> Arc<Client> {
        Arc::clone(&self.client)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.task.abort();
        self.lease.lose(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ago(by: Duration) -> Asked {
        let now = Asked::now();
        Asked {
            at: now.at.checked_sub(by).unwrap(),
            uptime: now.uptime.saturating_sub(by),
        }
    }

    #[tokio::test]
    async fn a_proof_is_good_for_its_term_from_the_question_on() {
        let lease = Lease::new();
        assert!(!lease.holds() && lease.lost_since().is_some());
        lease.prove(Asked::now());
        lease.held().await;
        assert!(lease.holds() && lease.lost_since().is_none());
        // An answer that came late, or a process that was stopped since.
        lease.prove(ago(TERM));
        assert!(!lease.holds());
        lease.ended().await;
        // The session is not lost for that.
        assert!(lease.lost_since().is_none());
    }

    #[tokio::test]
    async fn a_loss_counts_from_the_last_answered_question_or_from_the_end_of_the_session() {
        let lease = Lease::new();
        let asked = ago(Duration::from_secs(3));
        lease.prove(asked);
        lease.lose(true);
        lease.lost().await;
        assert_eq!(lease.lost_since(), Some(asked.at));
        // It is lost once.
        lease.lose(false);
        assert_eq!(lease.lost_since(), Some(asked.at));
        let now = Instant::now();
        lease.prove(asked);
        lease.lose(false);
        assert!(lease.lost_since().is_some_and(|since| since >= now));
    }

    #[tokio::test]
    async fn the_default_one_never_ends() {
        let lease = Lease::default();
        lease.lose(false);
        lease.held().await;
        assert!(lease.holds() && lease.lost_since().is_none());
    }

    #[test]
    fn a_silent_session_is_given_up_before_every_publisher_is_closed() {
        assert!(TERM < ANSWER && INTERVAL + ANSWER < CLOSE_BY);
        // Nor does the server end one that is still asked.
        assert!(INTERVAL + ANSWER < SERVER_PATIENCE);
    }
}
