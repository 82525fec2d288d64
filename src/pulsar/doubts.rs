//! Whether the names of a publisher's producers may still be used by a process that begins now.
//!
//! The producer raises it; `scanner::name_mark` waits for it and stores the mark. It is never lowered: the mark is for other names.

use std::sync::Arc;

use tokio::sync::watch;

/// Raised once a broker may have left out an event and stored a later one under the same name: of that event it would say "stored before" to a
/// process that does not know. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Doubts(Arc<watch::Sender<bool>>);

impl Doubts {
    /// There is such an event, perhaps.
    pub fn raise(&self) {
        self.0
            .send_if_modified(|raised| !std::mem::replace(raised, true));
    }

    /// True once it was raised.
    pub fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until it is raised. Cancel safe.
    pub async fn raised(&self) {
        // The sender is ours, so there is no error.
        drop(self.0.subscribe().wait_for(|raised| *raised).await);
    }
}
