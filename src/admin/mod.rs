//! HTTP for people, probes and Prometheus: status page, `/status`, `/metrics`, `/livez`, `/readyz`.
//!
//! ```text
//!  data's path ──► Meter (atomics) ──┬──► sampler: each second, is there progress? ──► View ──┐
//!  log (warnings) ──► queue ─────────┘                                                        ├──► server ──► HTTP
//!  Postgres ◄── observer: slot, end of the log, stragglers ──► Observed ──────────────────────┘
//! ```
//!
//! All of it runs on a thread of its own with a runtime of its own: the data's path shares nothing with it but the
//! [`Meter`]'s atomics, its short list of topics in trouble, and a queue that it never waits for. A scrape, a thousand slow clients, a Postgres that does not
//! answer the observer: the pipe does not notice.
//!
//! Input: settings, the meter, warnings. Output: answers to GET and HEAD; nothing can be changed through it, and whoever can
//! reach the port may read (the default is loopback). No payload, header or secret is served; ids, keys, topics and reasons of
//! stragglers are, and topics in trouble with the broker's answers.
//!
//! | module | is |
//! |---|---|
//! | `server` | connections and their limits, paths, headers |
//! | `observer` | what Postgres says of slot and stragglers, every two seconds |
//! | `sampler` | lag, history, readiness, once a second |
//! | `health` | when it is ready, when it is alive |
//! | `exposition` | `/metrics` |
//! | `status` | `/status` and `/history` |
//! | `page.html` | the status page, whole |
//! | `process` | memory, CPU, open files of this process |

mod exposition;
mod health;
mod observer;
mod process;
mod sampler;
mod server;
mod status;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::{oneshot, watch};
use tracing::info;

use crate::config::{AfterPublish, Config, Mode, settings};
use crate::logging::Warnings;
use crate::meter::Meter;
use crate::{Error, Result};
use observer::Observed;
use sampler::View;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Admin {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process already.
            let _ = thread.join();
        }
    }
}

/// What answers are made of.
struct Context {
    meter: Arc<Meter>,
    observed: watch::Receiver<Observed>,
    view: watch::Receiver<View>,
    mode: Mode,
    after_publish: AfterPublish,
    slot: String,
    tables: Vec<String>,
}

impl Admin {
    /// Opens the port, and serves from then on. `None` where `WALPOST_HTTP_ADDR` says so.
    ///
    /// # Errors
    /// Temporary (exit 75) when the port is in use: the walpost before this one may still be draining, and a supervisor
    /// that starts this one again should find it free. A configuration error (64) for an address that cannot be had at all.
    pub fn start(config: &Config, meter: &Arc<Meter>, warnings: Warnings) -> Result<Option<Self>> {
        let Some(addr) = config.http_addr else {
            return Ok(None);
        };
        let listener = listen(addr)?;
        let bound = listener.local_addr().unwrap_or(addr);
        let failed = |error: io::Error| {
            Error::temporary("cannot start the thread that serves HTTP").caused_by(error)
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(failed)?;
        let (stop, stopped) = oneshot::channel();
        let (config, meter) = (config.clone(), Arc::clone(meter));
        let work = move || {
            runtime.block_on(run(listener, config, meter, warnings, stopped));
            // Without waiting: a name that is still being looked up must not hold the process.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new()
            .name("http".to_owned())
            .spawn(work)
            .map_err(failed)?;
        info!("status page, metrics and health at http://{bound}/");
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

fn listen(addr: SocketAddr) -> Result<TcpListener> {
    let opened = TcpListener::bind(addr).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    opened.map_err(|error| {
        let name = settings::HTTP_ADDR.env;
        match error.kind() {
            io::ErrorKind::AddrInUse => Error::temporary(format!("{name}={addr}: another program listens there")).hint(format!(
                "stop it, or give each walpost of this machine a port of its own; {name}=none serves nothing"
            )),
            io::ErrorKind::PermissionDenied | io::ErrorKind::AddrNotAvailable => {
                Error::config(format!("{name}={addr}: this process cannot listen there"))
                    .hint("allowed: an address of this machine, and a port from 1024 up unless walpost may use lower ones")
            }
            _ => Error::temporary(format!("{name}={addr}: cannot listen there")),
        }
        .caused_by(error)
    })
}

/// Everything of the thread, until it is told to stop.
async fn run(
    listener: TcpListener,
    config: Config,
    meter: Arc<Meter>,
    warnings: Warnings,
    stopped: oneshot::Receiver<()>,
) {
    let (observe, observed) = watch::channel(Observed::default());
    let (look, view) = watch::channel(View::default());
    let context = Arc::new(Context {
        meter: Arc::clone(&meter),
        observed: observed.clone(),
        view,
        mode: config.mode,
        after_publish: config.after_publish,
        slot: config.slot.clone(),
        tables: config
            .outbox_tables
            .iter()
            .map(ToString::to_string)
            .collect(),
    });
    tokio::select! {
        biased;
        // Told, or the sender is gone: the same.
        _ = stopped => {}
        () = observer::run(&config, observe) => {}
        () = sampler::run(&meter, observed, warnings, look) => {}
        () = server::run(listener, context) => {}
    }
}
