//! A deadline for what a server is asked.
//!
//! `statement_timeout` is off in walpost's sessions, and TCP notices only a server that is gone: one that is there and says nothing (a
//! stopped process, a middlebox, a disk that hangs) would be waited for without an end. Each question that takes a moment on a healthy
//! server has this deadline. What may take long by its nature (a scan, the making of a slot) has none; the lease ends it ([`crate::lease`]).
//!
//! Input: a future that asks. Output: its answer, or a temporary error.

use std::time::Duration;

use tokio::time::timeout;

use crate::{Error, Result};

/// How long an answer may take.
pub const ANSWER: Duration = Duration::from_secs(15);

/// Waits for an answer, for at most [`ANSWER`]. `doing` completes "cannot …".
///
/// # Errors
/// Those of `work`; temporary when there is no answer. The session is then of no use any more.
pub async fn answered<T>(doing: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(ANSWER, work).await.unwrap_or_else(|_| {
        Err(Error::temporary(format!(
            "cannot {doing}: Postgres has not answered for {ANSWER:?}"
        )))
    })
}
