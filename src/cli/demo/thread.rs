//! A part of the demo on a thread and a runtime of its own, as it would be in a process of its own: so that it can be killed.

use std::io;

use tokio::sync::oneshot;

use crate::{Error, Result};

/// See the module's text.
#[derive(Debug)]
pub(super) struct Thread {
    name: &'static str,
    kill: Option<oneshot::Sender<()>>,
    ended: oneshot::Receiver<Result<()>>,
}

impl Thread {
    /// Lets the future that `work` makes run there.
    pub(super) fn start<F: Future<Output = Result<()>>>(
        name: &'static str,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<Self> {
        let failed = |error: io::Error| {
            Error::temporary(format!("cannot start the thread of {name}")).caused_by(error)
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let (kill, killed) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let body = move || {
            let result = runtime.block_on(async {
                tokio::select! {
                    result = work() => result,
                    // A sender that is gone kills nobody.
                    Ok(()) = killed => Ok(()),
                }
            });
            // With the runtime go all its tasks and sockets, wherever they stand: nothing is drained, nobody is told.
            drop(runtime);
            // Nobody listens when the demo ended first.
            let _ = end.send(result);
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(failed)?;
        let kill = Some(kill);
        Ok(Self { name, kill, ended })
    }

    /// Completes when it has ended by itself; to be awaited until then, and not again. Cancel safe.
    pub(super) async fn ended(&mut self) -> Result<()> {
        let died = || Err(Error::bug(format!("the thread of {} died", self.name)));
        (&mut self.ended).await.unwrap_or_else(|_| died())
    }

    /// Ends it as SIGKILL would: at once, without a word.
    pub(super) async fn kill(&mut self) -> Result<()> {
        if let Some(kill) = self.kill.take() {
            let _ended = kill.send(());
        }
        self.ended().await
    }
}
