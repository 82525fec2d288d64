//! `walpost run`: the connector, until a signal ends it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use crate::admin::Admin;
use crate::config::Config;
use crate::logging::Warnings;
use crate::meter::Meter;
use crate::{Error, Result, connector};

/// Exit code of a second signal: nothing was lost, but not everything was confirmed either.
const EXIT_UNFINISHED: i32 = 75;

/// How often the connector's thread shows that it lives.
const BEAT: Duration = Duration::from_secs(1);

/// Completes when the process is told to stop.
pub type Shutdown = Pin<Box<dyn Future<Output = ()>>>;

/// Streams until `shutdown`, then drains. `warnings` are for the status page.
pub async fn run(config: Config, warnings: Warnings, shutdown: Shutdown) -> Result<()> {
    let meter = Arc::new(Meter::new());
    // Before anything else is touched: who cannot be watched does not start.
    let _admin = Admin::start(&config, &meter, warnings)?;
    let beating = Arc::clone(&meter);
    tokio::spawn(async move {
        loop {
            beating.beat();
            sleep(BEAT).await;
        }
    });
    // Boxed: the whole connector's state is in this future.
    Box::pin(connector::run(
        config,
        watch::Sender::default(),
        meter,
        shutdown,
    ))
    .await
}

/// Completes at the first SIGTERM or SIGINT; the second ends the process at once.
///
/// Rows without a receipt are then streamed again at the next start, so even that loses nothing.
pub(crate) fn shutdown_signal() -> Result<impl Future<Output = ()>> {
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let (first, received) = oneshot::channel();
    tokio::spawn(async move {
        let name = either(&mut terminate, &mut interrupt).await;
        tracing::info!("{name} received: draining; a second signal stops at once");
        // Nobody listens when the connector has already ended by itself.
        let _ = first.send(());
        let name = either(&mut terminate, &mut interrupt).await;
        tracing::warn!("{name} received again: stopping without draining");
        std::process::exit(EXIT_UNFINISHED);
    });
    Ok(async move {
        // The sender lives as long as the runtime; an error would mean shutdown too.
        let _ = received.await;
    })
}

pub(crate) fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::bug("cannot listen for signals").caused_by(error))
}

/// Cancel safe: a signal that arrives is kept by its `Signal` until it is received.
async fn either(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
