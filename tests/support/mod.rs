//! What the tests against real servers share; a test file says `mod support;` and takes what it needs.
//!
//! * [`servers`]: the local Postgres and Pulsar of `deploy/local/up`, started if they are not up yet.
//! * [`Servers::own`]: others that only one test knows, to be stopped, frozen and started again.
//! * [`Database`]: a fresh database with names of its own for slot and topics; gone again when dropped. Its `init`,
//!   `start` and `wait_all_confirmed` are what most tests begin and end with.
//! * [`Walpost`]: the program under test as a child process: its lines, signals, exit code, peak memory.
//! * [`Proxy`]: a TCP proxy that holds, cuts and refuses, for faults between walpost and a server.
//! * [`FakeBroker`]: a scripted broker in this process, for what a real one cannot be made to say.
//! * [`Random`]: numbers that look random and are the same in every run.
//! * [`Load`]: writers on the outbox, side by side; [`Committed`]: what they committed, and the verdict on what arrived.
//! * [`consume`]: what is in a topic, read by the pulsar crate's consumer, which shares nothing with our producer.
//! * [`read_entries`]: the same on the wire's level: batch metadata, sequence ids, tombstones.
//! * [`Python`]: Pulsar's C++ client, an independent judge, driven by the `*.py` programs of this folder.
//! * [`tool`]: Debian's Prometheus, promtool and Chromium, as `deploy/local/tool` has them.
//! * [`java_partitions`]: the partitions that Pulsar's Java client chooses; [`java_topics`]: what it makes of names.
//! * [`eventually`]: waits for a condition with a deadline; no test sleeps instead of waiting.
//!
//! Everything here panics with a sentence when it cannot do its work: a test that cannot run has failed.
#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test file is a crate of its own and uses its own part of this module"
)]

mod admin;
mod consume;
mod database;
mod fake_broker;
mod java;
mod load;
mod outbox;
mod process;
mod proxy;
mod python;
mod random;
mod servers;
mod topic_names;
mod wire;

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub(crate) use admin::{admin, admin_as, try_admin};
pub(crate) use consume::{Received, consume, consume_as};
pub(crate) use database::Database;
pub(crate) use fake_broker::{
    Asked, FakeBroker, PublishRate, Reaction, Settings, StoredEvent, Target, close_producer,
    partition_name, reason, topic_migrated,
};
pub(crate) use java::{java_partitions, java_topics};
pub(crate) use load::{Committed, Load, insert_many};
pub(crate) use process::{Command, Walpost};
pub(crate) use proxy::{Direction, Onlooker, Proxy};
pub(crate) use python::{Judged, Python, hex};
pub(crate) use random::Random;
pub(crate) use servers::{OwnServers, Servers, as_owner, servers, tool};
pub(crate) use topic_names::topic_names;
pub(crate) use wire::{Entry, EntryMessage, parse_entry, read_entries, sized};

/// Tests of cases that take a major: `name: case(more);` makes `name::on_14`, `name::on_15` and `name::on_18`, which call
/// `case(14, more)` and so on. (The oldest Postgres, the newest, and the shared one between them.)
macro_rules! on_each_major {
    ($($name:ident: $case:ident($($argument:expr),*);)+) => {$(
        mod $name {
            use super::*;

            #[tokio::test]
            async fn on_14() {
                $case(14, $($argument),*).await;
            }

            #[tokio::test]
            async fn on_15() {
                $case(15, $($argument),*).await;
            }

            #[tokio::test]
            async fn on_18() {
                $case(18, $($argument),*).await;
            }
        }
    )+};
}
pub(crate) use on_each_major;

/// A name no other test, and no earlier run on the same servers, has: `<prefix>_<time>_<pid>_<count>`.
///
/// Lower case letters, digits and `_` only, so that it serves as database, slot and topic.
pub(crate) fn unique(prefix: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let time_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis());
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("{prefix}_{time_ms:x}_{:x}_{count}", std::process::id());
    assert!(
        name.len() <= 63
            && name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
        "{name:?} cannot stand as a slot name: choose a shorter prefix of lower case letters, digits and _"
    );
    name
}

/// Calls `probe` until it gives something, for at most `deadline`; `what` completes "gave up waiting for …".
///
/// A probe that hangs counts as one that gives nothing.
pub(crate) async fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Option<T>,
) -> T {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(2);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if let Ok(Some(found)) = tokio::time::timeout(left, probe()).await {
            return found;
        }
        assert!(
            Instant::now() < end,
            "gave up waiting for {what} after {deadline:?}"
        );
        // Often at first, so that quick things stay quick; seldom later, so that waiting costs no CPU.
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
