//! What the connector hands over to the task that notes what is delivered, and what that task has heard.
//!
//! Input: [`Handover`]s of the stream, over a channel of their own. Output: [`Heard`], the rows that the stream brought by table and transaction, and
//! the confirmed LSN; and [`Carried`], the part of it that outlives the task.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::streamed::{Run, StreamedRows};
use crate::Lsn;
use crate::postgres::TableName;

/// What the connector hands over: rows that the stream brought, and how far it is.
#[derive(Debug)]
pub struct Handover {
    /// Rows that were taken since the last handover.
    pub rows: Vec<Run>,
    /// The confirmed LSN, read after these rows were taken.
    pub confirmed: Lsn,
    /// Events that have their receipt or are stored as stragglers, in total.
    pub done: u64,
}

/// What outlives a task in good order.
#[derive(Clone, Debug, Default)]
pub struct Carried {
    /// Rows that the stream brought since the delivered snapshot, by table; `None` where an earlier process brought some and
    /// nobody knows which.
    pub streamed: Option<Vec<StreamedRows>>,
    /// By table: whether its rows have been counted since the delivered snapshot. Not those of a table that had no `txid`.
    pub counted: Vec<bool>,
    /// Comparisons in a row that found missing rows.
    pub short_rounds: u32,
}

impl Carried {
    /// For `walpost.progress.streamed`: `{"confirmed": "0/16B3748", "tables": {"walpost.outbox": …}}`.
    ///
    /// It names the position at which the slot stands then. A later stream that confirms anything moves the slot on, and what was
    /// stored is out of date by itself: nobody has to take it back, whatever is killed. What a later stream brought and did not confirm,
    /// Postgres sends again.
    pub fn to_json(&self, tables: &[TableName], confirmed: Lsn) -> Option<String> {
        let counts = tables.iter().zip(self.streamed.as_ref()?);
        let counts = counts.zip(&self.counted).filter(|(_, counted)| **counted);
        let counts = counts.map(|((table, rows), _)| (table.to_string(), rows.to_json()));
        let counts = Value::Object(counts.collect::<Map<_, _>>());
        Some(json!({ "confirmed": confirmed.to_string(), "tables": counts }).to_string())
    }

    /// What [`Self::to_json`] made, if the slot still stands there. A table that is not in it brought nothing.
    pub fn from_json(text: &str, tables: &[TableName], stands: Lsn) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let confirmed: Lsn = value["confirmed"].as_str()?.parse().ok()?;
        let counts = value["tables"]
            .as_object()
            .filter(|_| confirmed == stands)?;
        let of_table = |table: &TableName| match counts.get(&table.to_string()) {
            Some(rows) => StreamedRows::from_json(rows),
            None => Some(StreamedRows::default()),
        };
        let counted = tables
            .iter()
            .map(|table| counts.contains_key(&table.to_string()));
        Some(Self {
            streamed: Some(tables.iter().map(of_table).collect::<Option<_>>()?),
            counted: counted.collect(),
            short_rounds: 0,
        })
    }
}

/// What comes over the channel.
pub(super) enum Message {
    /// More rows.
    Handover(Handover),
    /// The end: to be answered with what is carried on.
    Finish(oneshot::Sender<Carried>),
}

/// What was handed over.
#[derive(Debug)]
pub(super) struct Heard {
    inbox: mpsc::Receiver<Message>,
    /// By table: the rows that the stream brought since the delivered snapshot.
    pub(super) streamed: Vec<StreamedRows>,
    /// Everything before it has its receipt.
    pub(super) confirmed: Lsn,
    /// See [`Handover::done`].
    pub(super) done: u64,
    /// Who waits for the end.
    pub(super) finish: Option<oneshot::Sender<Carried>>,
    /// The connector is gone.
    closed: bool,
}

impl Heard {
    /// Nothing yet, but for what is carried on.
    pub(super) fn new(inbox: mpsc::Receiver<Message>, streamed: Vec<StreamedRows>) -> Self {
        Self {
            inbox,
            streamed,
            confirmed: Lsn::ZERO,
            done: 0,
            finish: None,
            closed: false,
        }
    }

    fn take(&mut self, message: Option<Message>) {
        match message {
            Some(Message::Handover(handover)) => {
                for run in handover.rows {
                    if let Some(rows) = self.streamed.get_mut(usize::from(run.table)) {
                        rows.add(run.txid, run.rows);
                    }
                }
                self.confirmed = self.confirmed.max(handover.confirmed);
                self.done = handover.done;
            }
            Some(Message::Finish(answer)) => self.finish = Some(answer),
            None => self.closed = true,
        }
    }

    fn is_over(&self) -> bool {
        self.closed || self.finish.is_some()
    }

    /// Awaits `work` while handovers are taken; `None` when the task is to end. `work` is then dropped.
    pub(super) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            if self.is_over() {
                return None;
            }
            tokio::select! {
                biased;
                message = self.inbox.recv() => self.take(message),
                done = work.as_mut() => return Some(done),
            }
        }
    }

    /// The same for work that may not be cut short: a write.
    pub(super) async fn throughout<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                message = self.inbox.recv(), if !self.is_over() => self.take(message),
                done = work.as_mut() => return done,
            }
        }
    }

    /// Waits until everything before `position` is confirmed, at most for `patience`; false when the task is to end.
    pub(super) async fn confirmed(&mut self, position: Lsn, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.confirmed < position && !self.is_over() {
            tokio::select! {
                biased;
                message = self.inbox.recv() => self.take(message),
                () = sleep_until(until) => break,
            }
        }
        !self.is_over()
    }
}
