//! A deadline for what a server is asked.
//!
//! `statement_timeout` is off in walpost's sessions, and TCP notices only a server that is gone: one that is there and says nothing (a
//! stopped process, a middlebox, a disk that hangs) would be waited for without an end. Each question that takes a moment on a healthy
//! server has this deadline. What may take long by its nature (a scan, the making of a slot, a lock) has none: it ends with the lease ([`crate::lease`])
//! where its session is the lock's, and every SQL session ends when an answer on it is lost (`watch`).
//!
//! # What `walpost run` waits for, and what ends the wait
//!
//! | wait | ends by | broker events meanwhile |
//! |---|---|---|
//! | connecting, logging in, settings | `connect_timeout` for each address | served by `Connector::attend` while opening; the others are tasks of their own |
//! | the lock, the slot and its row, the claim, publication and tables, the walsender's identity | this deadline | `Connector::attend` |
//! | `START_REPLICATION`, the note of the stream, the end of the log, what is to be noted | this deadline | `Connector::attend_on`: a stop does not cut it short |
//! | the making of a slot, transactions that are waited for before | `watch`; the holders are named ([`super::waiting`]) | `Connector::attend` |
//! | the session of the lock, whoever asks on it | the lease's own deadline ([`crate::lease::ANSWER`]) | |
//! | rows of a scan, poll mode's looks | `watch`, and the lease | none of a stream, which begins after it; those of the scan are served (`scanner::cursor`) |
//! | a status update, the log | the pump's select ([`crate::connector`]) | the same select |
//! | the goodbye to a walsender, notes at the end | a deadline of a second or so | not any more |
//! | stragglers: storing, retrying, counting | this deadline for each statement, `lock_timeout` below it ([`crate::scanner`]) | the stream's go on; those of retries wait |
//! | the keeper, marks, retention, partitions, notes of what is left | `watch`; tasks of their own | the stream's go on |
//! | rows that were never marked | the same | those of the rows before are served |
//!
//! Input: a future that asks. Output: its answer, or a temporary error.

use std::time::Duration;

use tokio::time::timeout;

use crate::{Error, Result};

/// How long an answer may take.
pub const ANSWER: Duration = Duration::from_secs(15);

/// What a statement's bytes are given in addition: one second for so many. (A slow line, and a server that writes them to its log.)
const BYTES_A_SECOND: usize = 256 * 1024;

/// Waits for an answer, for at most [`ANSWER`]. `doing` completes "cannot …".
///
/// # Errors
/// Those of `work`; temporary when there is no answer. The session is then of no use any more.
pub async fn answered<T>(doing: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    answered_to(0, doing, work).await
}

/// The same for a statement with so many bytes of data.
///
/// # Errors
/// As [`answered`].
pub async fn answered_to<T>(
    bytes: usize,
    doing: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let seconds = u64::try_from(bytes / BYTES_A_SECOND).unwrap_or(u64::MAX);
    let limit = ANSWER.saturating_add(Duration::from_secs(seconds));
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Error::temporary(format!(
            "cannot {doing}: Postgres has not answered for {limit:?}"
        )))
    })
}
