//! `walpost demo`: both systems and the connector between them, with the sums at the end.
//!
//! System A (`system_a`) commits orders with their events by `walpost.emit`, and rolls some back. The real connector streams, on
//! a thread of its own. System B (`system_b`) consumes from Pulsar and takes stock through the inbox. Both report to one
//! `Ledger`, which alone knows what should and what did arrive. Everything in Postgres happens in a database of its own
//! with a slot of its own; both are removed at the end unless `--keep` was given.
//!
//! After the part whose latency is measured the work goes on while connector, System B and System A are killed and started
//! again, one after the other: cut off wherever they stand, without a last word to Postgres or Pulsar. What a System A
//! that was killed in COMMIT never heard, the table tells.

mod ledger;
mod system_a;
mod system_b;
mod thread;

use std::collections::HashSet;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tokio_postgres::Client;

use super::{init, print, run::shutdown_signal};
use crate::config::{Config, Mode};
use crate::connector::{self, Progress};
use crate::outbox::TopicTemplate;
use crate::postgres::{connect_sql, quote_ident, sql_error};
use crate::{Error, Lsn, Result};
use ledger::{Ledger, Report};
use thread::Thread;

/// Name of the demo's database and of its slot.
const NAME: &str = "walpost_demo";
/// Without another arrival, for what is under way when System A stops; a broker that was cut off may take a while.
const SETTLE: Duration = Duration::from_secs(30);
/// Between two kills, so that each falls into work that has begun again.
const KILL_EVERY: Duration = Duration::from_secs(1);
/// For everything to wake up before the load.
const WARM_UP: Duration = Duration::from_secs(60);
/// Until the last kill tells System A when to stop.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// After everything has arrived: long enough for what should not arrive to show itself.
const GRACE: Duration = Duration::from_secs(1);
/// For the connector to drain and free the slot.
const STOP: Duration = Duration::from_secs(15);

/// How much, how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How long System A works.
    pub seconds: u64,
    /// Orders a second, over all writers.
    pub rate: u32,
    /// Connections that commit at the same time.
    pub writers: u32,
    /// How often connector, System B and System A are killed, after the measured part.
    pub kills: u32,
    /// Go on streaming until a signal, and remove nothing.
    pub keep: bool,
}

/// What A and B report to the ledger.
#[derive(Debug)]
enum Fact {
    /// COMMIT is about to be issued.
    Committing { id: String },
    /// A transaction committed; `at` is when COMMIT was issued, if that is known.
    Committed { id: String, at: Option<Instant> },
    /// A transaction was rolled back after its outbox row was written.
    RolledBack { id: String },
    /// A message arrived. `number` counts this customer's orders.
    Received {
        id: String,
        customer: String,
        number: u64,
        at: Instant,
    },
}

/// Runs the demo. The exit code is 1 when a committed order was lost, a rolled-back one arrived, or the sums differ.
pub async fn run(config: &Config, options: Options, out: &mut dyn Write) -> Result<u8> {
    let admin = connect_sql(&config.postgres, "walpost demo").await?;
    remove(&admin).await?;
    statement(&admin, &format!("create database {}", quote_ident(NAME))).await?;

    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let topic = format!("persistent://public/default/walpost-demo-{started}");
    let mut config = config.clone();
    config.postgres = config.postgres.with_dbname(NAME);
    NAME.clone_into(&mut config.slot);
    // What it shows is the stream.
    config.mode = Mode::Stream;
    config.producer_name = format!("walpost-{NAME}");
    config.topic =
        TopicTemplate::parse(&format!("{topic}.{{aggregatetype}}")).map_err(Error::bug)?;
    print(
        out,
        &format!(
            "database {NAME} on {}, topic {topic}.order\n",
            config.postgres.display_url()
        ),
    )?;
    init::run(&config, None, None, false, out).await?;

    let mut connector = Connector::start(config.clone())?;
    let outcome = drive(
        &config,
        options,
        &format!("{topic}.order"),
        &mut connector,
        &admin,
        out,
    )
    .await;
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            connector.stop().await?;
            return Err(error);
        }
    };
    let interrupted = report.is_none();
    if options.keep && !interrupted {
        print(
            out,
            &format!(
                "\nStill streaming from database {NAME}; Ctrl-C stops it. Try, with psql, in that database:\n  {EXAMPLE}\n"
            ),
        )?;
        tokio::select! {
            () = shutdown_signal()? => {}
            ended = connector.ended() => ended?,
        }
    }
    connector.stop().await?;
    if !options.keep {
        remove(&admin).await?;
    }
    Ok(report.map_or(0, |report| u8::from(!report.is_exact())))
}

const EXAMPLE: &str =
    "select walpost.emit('order', 'you', 'OrderPlaced', '{\"hello\": \"world\"}');";

/// The two systems at work.
struct Systems {
    facts: mpsc::UnboundedSender<Fact>,
    a: system_a::SystemA,
    b: Thread,
    /// When System A is to stop by itself: not before the last kill.
    until: watch::Sender<Instant>,
    next_kill: Instant,
    /// How many receipts the connectors had that were killed.
    published: u64,
    /// How often something was killed.
    kills: u32,
}

impl Systems {
    /// Kills and starts anew: the connector first, then System B, then System A, and again.
    async fn kill_next(
        &mut self,
        config: &Config,
        options: Options,
        topic: &str,
        connector: &mut Connector,
    ) -> Result<&'static str> {
        let round = self.kills / 3 + 1;
        let victim = self.kills % 3;
        self.kills += 1;
        let killed = match victim {
            0 => {
                self.published += connector.progress.borrow().counters.acknowledged;
                connector.thread.kill().await?;
                *connector = Connector::start(config.clone())?;
                "the connector"
            }
            1 => {
                self.b.kill().await?;
                self.b = system_b::start(config, topic, self.facts.clone())?;
                "System B"
            }
            _ => {
                self.a.task.abort();
                let life = (u64::from(round), self.until.subscribe());
                self.a = system_a::start(config, options, life, self.facts.clone()).await?;
                "System A"
            }
        };
        // From now, not from the last one: starting again may have taken longer.
        self.next_kill = Instant::now() + KILL_EVERY;
        if self.kills == 3 * options.kills {
            self.until.send_replace(self.next_kill);
        }
        Ok(killed)
    }
}

/// Lets both systems run and prints how it goes; `None` when a signal ended it early.
async fn drive(
    config: &Config,
    options: Options,
    topic: &str,
    connector: &mut Connector,
    admin: &Client,
    out: &mut dyn Write,
) -> Result<Option<Report>> {
    // As many facts as can come are counted anyway: the ledger remembers every order of the demo.
    let (facts, mut reported) = mpsc::unbounded_channel();
    let books = connect_sql(&config.postgres, "walpost demo books").await?;
    system_b::prepare(&books).await?;
    let warm_up = system_a::prepare(&books).await?;
    let mut b = system_b::start(config, topic, facts.clone())?;
    tokio::select! {
        warmed = warm(&mut reported, warm_up) => warmed?,
        ended = b.ended() => {
            ended?;
            return Err(Error::bug("System B stopped without being told to"));
        }
    }

    let measured_until = Instant::now() + Duration::from_secs(options.seconds);
    let last = if options.kills == 0 {
        measured_until
    } else {
        measured_until + FOR_EVER
    };
    let (until, of_a) = watch::channel(last);
    let a = system_a::start(config, options, (0, of_a), facts.clone()).await?;
    let mut systems = Systems {
        facts,
        a,
        b,
        until,
        next_kill: measured_until,
        published: 0,
        kills: 0,
    };
    let mut shutdown = std::pin::pin!(shutdown_signal()?);
    let mut ledger = Ledger::new(measured_until);
    let mut display = Display::new();
    let mut tick = interval(Duration::from_millis(500));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut a_ended: Option<Instant> = None;
    loop {
        tokio::select! {
            biased;
            () = shutdown.as_mut() => return Ok(None),
            ended = connector.ended() => {
                ended?;
                return Err(Error::bug("the connector stopped without being told to"));
            }
            () = sleep_until(systems.next_kill), if systems.kills < 3 * options.kills => {
                let killed = systems.kill_next(config, options, topic, connector).await?;
                display.end(out)?;
                print(out, &format!("killed {killed}, and started it again\n"))?;
            }
            fact = reported.recv() => {
                // One of the orders before the load may come again, like any other.
                let is_warm_up = |fact: &Fact| matches!(fact, Fact::Received { customer, .. } if customer.starts_with(system_a::WARM_UP));
                if let Some(fact) = fact.filter(|fact| !is_warm_up(fact)) {
                    ledger.note(fact);
                }
            }
            ended = &mut systems.a.task, if a_ended.is_none() => {
                ended.map_err(|error| Error::bug("System A panicked").caused_by(error))??;
                a_ended = Some(Instant::now());
            }
            ended = systems.b.ended() => {
                ended?;
                return Err(Error::bug("System B stopped without being told to"));
            }
            _ = tick.tick() => {
                let lag_bytes = lag_bytes(admin).await?;
                display.show(&ledger, &connector.progress.borrow(), lag_bytes, out)?;
                let Some(a_ended) = a_ended else { continue };
                resolve(&books, &mut ledger).await?;
                let quiet = ledger.since_last_arrival().min(a_ended.elapsed());
                if quiet > SETTLE || (ledger.is_settled() && quiet > GRACE) {
                    display.end(out)?;
                    break;
                }
            }
        }
    }
    systems.b.kill().await?;
    let published = systems.published + connector.progress.borrow().counters.acknowledged;
    let report = ledger.report(published, sums(&books).await?);
    print(out, &report.to_string())?;
    Ok(Some(report))
}

/// Waits until System B has taken each of the orders `ids`, which no ledger books: the first message of a topic, a lane or a
/// subscription takes the broker's first seconds.
async fn warm(reported: &mut mpsc::UnboundedReceiver<Fact>, ids: Vec<String>) -> Result<()> {
    let mut missing: HashSet<String> = ids.into_iter().collect();
    let warmed = async {
        while !missing.is_empty() {
            if let Some(Fact::Received { id, .. }) = reported.recv().await {
                missing.remove(&id);
            }
        }
    };
    timeout(WARM_UP, warmed).await.map_err(|_| {
        Error::temporary(format!(
            "the orders before the load did not arrive within {} s",
            WARM_UP.as_secs()
        ))
        .hint("run walpost check")
    })
}

/// Asks the table about the orders whose COMMIT nobody lived to hear of.
async fn resolve(books: &Client, ledger: &mut Ledger) -> Result<()> {
    let in_doubt = ledger.in_doubt();
    if in_doubt.is_empty() {
        return Ok(());
    }
    let sql = "select id::text from walpost.outbox where id = any($1::text[]::uuid[])";
    let found = books
        .query(sql, &[&in_doubt])
        .await
        .map_err(|error| sql_error("look for orders in doubt", error))?;
    for row in found {
        let id = row.get(0);
        ledger.note(Fact::Committed { id, at: None });
    }
    Ok(())
}

/// What was ordered by the table of System A, and taken by that of System B.
async fn sums(books: &Client) -> Result<(i64, i64)> {
    let sql = "select (select coalesce(sum(quantity), 0) from demo.orders)::bigint, \
                      (select coalesce(sum(taken), 0) from demo.stock)::bigint";
    let row = books
        .query_one(sql, &[])
        .await
        .map_err(|error| sql_error("add up orders and stock", error))?;
    Ok((row.get(0), row.get(1)))
}

/// Bytes of log that the slot has not confirmed.
async fn lag_bytes(admin: &Client) -> Result<i64> {
    let sql = "select coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn), 0)::bigint \
               from pg_replication_slots where slot_name = $1";
    let row = admin
        .query_opt(sql, &[&NAME])
        .await
        .map_err(|error| sql_error("look at the slot", error))?;
    Ok(row.map_or(0, |row| row.get(0)))
}

/// The live line: rewritten in place on a terminal, one line every few seconds elsewhere.
struct Display {
    terminal: bool,
    last: Option<(Instant, u64)>,
    printed: Option<Instant>,
}

impl Display {
    fn new() -> Self {
        Self {
            terminal: io::stdout().is_terminal(),
            last: None,
            printed: None,
        }
    }

    fn show(
        &mut self,
        ledger: &Ledger,
        progress: &Progress,
        lag_bytes: i64,
        out: &mut dyn Write,
    ) -> Result<()> {
        let now = Instant::now();
        let received = ledger.received();
        let rate = match self.last {
            Some((at, before)) => (received - before) as f64 / (now - at).as_secs_f64(),
            None => 0.0,
        };
        self.last = Some((now, received));
        if !self.terminal
            && self
                .printed
                .is_some_and(|at| now - at < Duration::from_secs(3))
        {
            return Ok(());
        }
        self.printed = Some(now);
        let confirmed: Lsn = progress.confirmed;
        let line = format!(
            "committed {:>8}  received {received:>8}  {rate:>7.0}/s  lag {:>7.1} KiB  confirmed {confirmed}",
            ledger.committed(),
            lag_bytes as f64 / 1024.0,
        );
        print(
            out,
            &if self.terminal {
                format!("\r\x1b[K{line}")
            } else {
                format!("{line}\n")
            },
        )
    }

    fn end(&self, out: &mut dyn Write) -> Result<()> {
        if self.terminal {
            print(out, "\n")
        } else {
            Ok(())
        }
    }
}

/// The real connector.
struct Connector {
    stop: Option<oneshot::Sender<()>>,
    thread: Thread,
    progress: watch::Receiver<Progress>,
}

impl Connector {
    fn start(config: Config) -> Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (sender, progress) = watch::channel(Progress::default());
        let shutdown = async {
            // A sender that is gone means the same: the demo is over.
            let _ = stopped.await;
        };
        let work = move || connector::run(config, sender, Arc::default(), shutdown);
        Ok(Self {
            stop: Some(stop),
            thread: Thread::start("the connector", work)?,
            progress,
        })
    }

    /// Completes when the connector has ended by itself. Cancel safe.
    async fn ended(&mut self) -> Result<()> {
        self.thread.ended().await
    }

    async fn stop(mut self) -> Result<()> {
        let Some(stop) = self.stop.take() else {
            return Ok(());
        };
        if stop.send(()).is_err() {
            return Ok(());
        }
        match timeout(STOP, self.ended()).await {
            Ok(result) => result,
            Err(_) => Err(Error::temporary("the connector does not stop")),
        }
    }
}

/// Removes what an earlier demo left.
async fn remove(admin: &Client) -> Result<()> {
    let drop_slot = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                     where slot_name = $1 and not active";
    let still_there = "select 1 from pg_replication_slots where slot_name = $1";
    let deadline = Instant::now() + STOP;
    let failed = |error| sql_error("remove the demo's slot", error);
    while admin
        .query_opt(still_there, &[&NAME])
        .await
        .map_err(failed)?
        .is_some()
    {
        admin.query(drop_slot, &[&NAME]).await.map_err(failed)?;
        if Instant::now() > deadline {
            return Err(Error::temporary(format!("the slot {NAME} is in use"))
                .hint("is another demo running?"));
        }
        sleep(Duration::from_millis(50)).await;
    }
    statement(
        admin,
        &format!("drop database if exists {} with (force)", quote_ident(NAME)),
    )
    .await
}

async fn statement(client: &Client, sql: &str) -> Result<()> {
    client
        .batch_execute(sql)
        .await
        .map_err(|error| sql_error("prepare the demo", error))
}
