//! How the work on the tables goes: rows that wait to be marked or deleted, and what was left undone, each with the reason: rows that
//! cannot be marked or deleted, partitions that cannot be dropped or made, tables that cannot be looked through.
//!
//! One such row, partition or table holds up nothing else. It is left, tried again later, and told of here. The tasks of
//! [`crate::scanner`] that do the work write their own part of it, beside the data's path. Readers: [`crate::admin`]
//! for `/status`, page, metrics and readiness, and the task that notes it in `walpost.left_undone`, where `walpost check` finds it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::Error;
use crate::outbox::RowNumber;

/// Entries of one kind of work that are kept by name; all of them are counted. They are noted in the database, and tell the next
/// process of rows whose receipt has come.
pub const LISTED: usize = 1_000;
/// Bytes of a reason that are kept.
const REASON_BYTES: usize = 400;

/// What was to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Published rows are to be marked or deleted.
    AfterPublish,
    /// Rows that were never marked are to be found.
    Unmarked,
    /// Old rows and partitions are to go.
    Retention,
    /// Partitions are to be made ahead.
    Partitions,
    /// Rows are to be read from the table: a gap scan, or poll mode.
    Scan,
    /// What the stream has delivered is to be compared with the tables and noted.
    Note,
}

impl Work {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AfterPublish,
        Self::Unmarked,
        Self::Retention,
        Self::Partitions,
        Self::Scan,
        Self::Note,
    ];

    /// Its name, in `/status` and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::AfterPublish => "after_publish",
            Self::Unmarked => "unmarked",
            Self::Retention => "retention",
            Self::Partitions => "partitions",
            Self::Scan => "scan",
            Self::Note => "note",
        }
    }
}

/// A row, a partition or a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The outbox table, or the partition.
    pub table: String,
    /// The row's id; `None` for a partition or a table.
    pub id: Option<String>,
    /// Which of the rows with this id.
    pub number: RowNumber,
    /// Its `txid`, where it is known.
    pub txid: Option<u64>,
    /// Why it was left.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was left first: Unix time in milliseconds.
    pub since_ms: u64,
}

/// What one kind of work has left.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// How many rows, partitions and tables.
    pub count: u64,
    /// The first of them.
    pub listed: Vec<Left>,
}

impl Undone {
    /// One more table or partition, or a row of it that the error names.
    pub fn add(&mut self, table: &str, error: &Error) {
        self.push(Left {
            table: table.to_owned(),
            id: None,
            number: RowNumber::Unknown,
            txid: None,
            reason: reason(&error.told().0),
            attempts: 1,
            since_ms: now_ms(),
        });
    }

    /// One more.
    pub fn push(&mut self, left: Left) {
        self.count += 1;
        if self.listed.len() < LISTED {
            self.listed.push(left);
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Upkeep {
    undone: watch::Sender<[Undone; Work::ALL.len()]>,
    waiting: AtomicU64,
    is_full: AtomicBool,
    done: AtomicU64,
}

/// Rows on their way from their receipt to their mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// They wait.
    pub waiting: u64,
    /// So many wait that nothing more is published.
    pub is_full: bool,
    /// Since the start: marked, deleted, gone, or left with a reason.
    pub done: u64,
}

impl Upkeep {
    /// How many rows wait, and whether that stops the intake.
    pub fn set_waiting(&self, rows: usize, is_full: bool) {
        self.waiting.store(rows as u64, Relaxed);
        self.is_full.store(is_full, Relaxed);
    }

    /// Rows do not wait any more.
    pub fn add_done(&self, rows: usize) {
        self.done.fetch_add(rows as u64, Relaxed);
    }

    /// Rows on their way to their mark.
    pub fn marks(&self) -> Marks {
        Marks {
            waiting: self.waiting.load(Relaxed),
            is_full: self.is_full.load(Relaxed),
            done: self.done.load(Relaxed),
        }
    }

    /// What this work has left now. What was left before for the same reason was left then.
    pub fn set(&self, work: Work, mut undone: Undone) {
        self.undone.send_if_modified(|all| {
            let place = &mut all[work as usize];
            let key = |left: &Left| (left.table.clone(), left.id.clone(), left.reason.clone());
            let known = place.listed.iter().map(|left| (key(left), left.since_ms));
            let known: HashMap<_, _> = known.collect();
            for left in &mut undone.listed {
                left.since_ms = known.get(&key(left)).copied().unwrap_or(left.since_ms);
            }
            let is_new = *place != undone;
            *place = undone;
            is_new
        });
    }

    /// Whether this work has left the table with this reason.
    pub fn has(&self, work: Work, table: &str, why: &str) -> bool {
        let all = self.undone.borrow();
        let mut listed = all[work as usize].listed.iter();
        listed.any(|left| left.table == table && left.reason == why)
    }

    /// How many rows, partitions and tables this work has left.
    pub fn count(&self, work: Work) -> u64 {
        self.undone.borrow()[work as usize].count
    }

    /// What every work has left.
    pub fn all(&self) -> [Undone; Work::ALL.len()] {
        self.undone.borrow().clone()
    }

    /// To be told of changes.
    pub fn subscribe(&self) -> watch::Receiver<[Undone; Work::ALL.len()]> {
        self.undone.subscribe()
    }
}

/// All of it as JSON, at most `limit` entries of each work.
pub fn to_json(all: &[Undone; Work::ALL.len()], limit: usize) -> Value {
    let listed = Work::ALL.iter().flat_map(|work| {
        let undone = &all[*work as usize];
        undone.listed.iter().take(limit).map(|left| {
            let (column, number) = match left.number {
                RowNumber::Unknown => (None, None),
                RowNumber::Null => (Some("null"), None),
                RowNumber::Seq(number) => (Some("seq"), Some(number)),
                RowNumber::Txid(number) => (Some("txid"), Some(number)),
            };
            json!({
                "work": work.name(), "table": left.table, "id": left.id, "column": column, "number": number, "txid": left.txid,
                "reason": left.reason, "attempts": left.attempts, "since_ms": left.since_ms,
            })
        })
    });
    json!({
        "count": all.iter().map(|undone| undone.count).sum::<u64>(),
        "listed": listed.collect::<Value>(),
    })
}

/// The entries of one work in what [`to_json`] made; what cannot be read is left out.
pub fn from_json(noted: &Value, work: Work) -> Vec<Left> {
    let listed = noted["listed"].as_array().map_or(&[][..], Vec::as_slice);
    let of_work = listed.iter().filter(|one| one["work"] == work.name());
    let read = |one: &Value| {
        let number = match (one["column"].as_str(), one["number"].as_i64()) {
            (Some("seq"), Some(number)) => RowNumber::Seq(number),
            (Some("txid"), Some(number)) => RowNumber::Txid(number),
            (Some("null"), None) => RowNumber::Null,
            _ => RowNumber::Unknown,
        };
        Some(Left {
            table: one["table"].as_str()?.to_owned(),
            id: one["id"].as_str().map(ToOwned::to_owned),
            number,
            txid: one["txid"].as_u64(),
            reason: one["reason"].as_str()?.to_owned(),
            attempts: u32::try_from(one["attempts"].as_u64()?).unwrap_or(u32::MAX),
            since_ms: one["since_ms"].as_u64()?,
        })
    };
    of_work.filter_map(read).take(LISTED).collect()
}

/// Says which reasons are news, so that an operator is warned once of each and not once for every attempt.
#[derive(Debug, Default)]
pub struct News(Option<String>);

impl News {
    /// Whether this was not the reason before.
    pub fn is_new(&mut self, why: &str) -> bool {
        let is_new = self.0.as_deref() != Some(why);
        if is_new {
            self.0 = Some(why.to_owned());
        }
        is_new
    }

    /// It has gone well: the same reason is news again.
    pub fn over(&mut self) {
        self.0 = None;
    }
}

/// A reason, cut to what is kept.
pub fn reason(text: &str) -> String {
    let mut end = text.len().min(REASON_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// The time, for [`Left::since_ms`].
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long something waits that was tried so often: a second at first, twice as long each time, five minutes at most.
pub fn pause(attempts: u32) -> Duration {
    const LONGEST: Duration = Duration::from_secs(300);
    let doubled = 1_u64 << attempts.saturating_sub(1).min(16);
    Duration::from_secs(doubled).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_can_be_read_again() {
        let left = |id: Option<&str>, number| Left {
            table: "public.\"a b\"".to_owned(),
            id: id.map(ToOwned::to_owned),
            number,
            txid: id.map(|_| 12),
            reason: "because".to_owned(),
            attempts: 3,
            since_ms: 17,
        };
        let book = Upkeep::default();
        let listed = vec![
            left(Some("x"), RowNumber::Seq(5)),
            left(Some("y"), RowNumber::Unknown),
            left(Some("z"), RowNumber::Null),
        ];
        let undone = Undone {
            count: 7,
            listed: listed.clone(),
        };
        book.set(Work::AfterPublish, undone);
        let partition = Undone {
            count: 1,
            listed: vec![left(None, RowNumber::Txid(9))],
        };
        book.set(Work::Retention, partition.clone());
        let noted = to_json(&book.subscribe().borrow(), LISTED);
        assert_eq!(noted["count"], 8);
        assert_eq!(from_json(&noted, Work::AfterPublish), listed);
        assert_eq!(from_json(&noted, Work::Retention), partition.listed);
        assert_eq!(from_json(&json!(null), Work::Retention), []);
    }

    #[test]
    fn pauses_grow_up_to_five_minutes() {
        let seconds: Vec<u64> = [0, 1, 2, 3, 9, 10, u32::MAX]
            .map(|attempts| pause(attempts).as_secs())
            .to_vec();
        assert_eq!(seconds, [1, 1, 2, 4, 256, 300, 300]);
    }

    #[test]
    fn a_reason_is_news_once_until_it_has_gone_well_or_another_comes() {
        let mut news = News::default();
        let said = ["a", "a", "b", "b", "a"].map(|why| news.is_new(why));
        assert_eq!(said, [true, false, true, false, true]);
        news.over();
        assert!(news.is_new("a"));
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        assert_eq!(reason(&"ä".repeat(1000)).len(), REASON_BYTES);
        assert_eq!(reason("short"), "short");
    }
}
