//! The keeper: the handle of the task that notes what is delivered ([`super::delivered`]), for the connector.

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::delivered::{Start, Task, Verdict};
use super::handover::{Carried, Handover, Message};
use crate::Error;

/// Handovers that wait to be taken. Each is at most [`StreamedRuns::FULL`](super::streamed::StreamedRuns::FULL) entries, and a pipe with so many takes no further row.
const HANDOVERS: usize = 4;

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub struct Keeper {
    messages: mpsc::Sender<Message>,
    verdicts: mpsc::Receiver<Verdict>,
    found_missing: bool,
    task: JoinHandle<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Keeper {
    /// Starts beside a pipe.
    pub fn start(start: Start) -> Self {
        let (messages, inbox) = mpsc::channel(HANDOVERS);
        let (verdicts, told) = mpsc::channel(1);
        let task = Task::new(start, inbox, verdicts);
        Self {
            messages,
            verdicts: told,
            found_missing: false,
            task: tokio::spawn(Box::pin(task.run())),
        }
    }

    /// Hands over what `handover` gives, if there is room; otherwise the next call does.
    pub fn hand_over(&self, handover: impl FnOnce() -> Handover) {
        if let Ok(room) = self.messages.try_reserve() {
            room.send(Message::Handover(handover()));
        }
    }

    /// Waits until the stream has to end. Cancel safe.
    pub async fn verdict(&mut self) -> Verdict {
        match self.verdicts.recv().await {
            Some(verdict) => {
                self.found_missing |= matches!(verdict, Verdict::Missing);
                verdict
            }
            // It ends only when it is told to, or with a panic, which its owner does not outlive in good order.
            None => Verdict::Failed(Error::bug(
                "the task that notes what is delivered has ended",
            )),
        }
    }

    /// Whether [`Self::verdict`] has said so: it says it once, and the stream may have been lost since.
    pub fn found_missing(&self) -> bool {
        self.found_missing
    }

    /// Ends it, with a last handover; what it gives back holds everything that was handed over.
    pub async fn finish(self, last: Handover) -> Carried {
        let (answer, carried) = oneshot::channel();
        for message in [Message::Handover(last), Message::Finish(answer)] {
            if self.messages.send(message).await.is_err() {
                return Carried::default();
            }
        }
        carried.await.unwrap_or_default()
    }
}
