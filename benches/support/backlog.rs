//! Rows waiting in a slot, and programs that drain it.

use std::time::{Duration, Instant};

use walpost::Lsn;

use super::tests::{Command, Database, Walpost, eventually, servers};
use super::{LIMIT, cpu_seconds};

/// How often a drain's end is looked for: below one percent of any drain, and rare enough to take nothing from it.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes of different payloads that the rows take turns with.
const POOL_BYTES: u64 = 4 << 20;
/// Different keys among the rows.
const KEYS: u64 = 1000;

/// What waits in a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backlog {
    /// How many rows; a whole number of transactions is loaded, the last one may be smaller.
    pub(crate) rows: u64,
    /// Rows of one transaction.
    pub(crate) per_txn: u64,
    /// Bytes of each payload: a JSON string of hexadecimal digits, which a codec makes half as long.
    pub(crate) payload_bytes: u64,
    /// The rows go round these topics.
    pub(crate) topics: u64,
}

impl Backlog {
    /// Loads it into a fresh database, whose slot stands before the first row, and so do these copies of it; returns
    /// where the rows end in the log.
    pub(crate) async fn load(self, copies: &[&str]) -> (Database, Lsn) {
        let database = Database::create("bench").await;
        database.init(&[], &[]).await;
        first_run(&database).await;
        for copy in copies {
            let name = format!("{}_{copy}", database.slot);
            let sql = "select pg_copy_logical_replication_slot($1::text::name, $2::text::name)";
            database.rows(sql, &[&database.slot, &name]).await;
        }
        // One by one: a transaction block around them would not let the last one commit.
        for statement in self.statements() {
            database.sql(&statement).await;
        }
        let end = "select pg_current_wal_insert_lsn()::text";
        let end: String = database.rows(end, &[]).await[0].get(0);
        // Flushes what the load has left, so that no checkpoint falls into the time that is measured.
        database.sql("checkpoint").await;
        (database, end.parse().expect("Postgres prints an LSN"))
    }

    /// Commits are not waited for while loading; the checkpoint at the end makes up for it.
    fn statements(self) -> [String; 3] {
        let Self {
            rows,
            per_txn,
            payload_bytes,
            topics,
        } = self;
        let digits = payload_bytes.saturating_sub(2).max(1);
        let hashes = digits.div_ceil(32);
        let pool = (POOL_BYTES / payload_bytes.max(1)).clamp(16, 1024);
        [
            "set synchronous_commit = off".to_owned(),
            format!(
                "create unlogged table bench_pool as
                   select n, to_json(left(string_agg(md5(n || '-' || part), ''), {digits})) as body
                   from generate_series(0, {pool} - 1) n, generate_series(1, {hashes}) part group by n;
                 create unique index on bench_pool (n);
                 analyze bench_pool"
            ),
            format!(
                "do $$ begin for begun in 0 .. {rows} - 1 by {per_txn} loop
                   insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
                   select 'order' || i % {topics}, 'key-' || i % {KEYS}, 'OrderPlaced', (select body from bench_pool where n = i % {pool})
                   from generate_series(begun, least(begun + {per_txn}, {rows}) - 1) i;
                   commit;
                 end loop; end $$"
            ),
        ]
    }
}

/// Lets walpost run on the new slot until nothing of the slot's making is left to be looked at in the table: it is a connector
/// that has run before and was down while the rows came, as connectors are.
async fn first_run(database: &Database) {
    let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "100ms")]).await;
    let event = "insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
                 values ('first', 'key', 'First', '{}')";
    database.sql(event).await;
    let over = "select scan_before is null from walpost.progress where delivered is not null";
    let over = async || {
        database
            .rows(over, &[])
            .await
            .first()?
            .get::<_, bool>(0)
            .then_some(())
    };
    eventually(LIMIT, "the end of the slot's making", over).await;
    walpost.sigterm();
    let code = walpost.wait_exit(LIMIT).await;
    assert_eq!(code, 0, "{}", walpost.output());
}

/// How a drain went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drained {
    /// From the program's start to the end of the backlog.
    pub(crate) seconds: f64,
    /// Of the program, for each row.
    pub(crate) cpu_us_per_row: f64,
    /// Of the program.
    pub(crate) peak_rss_mib: f64,
}

impl Drained {
    /// Lets a running program work until the probe says that it is done, then stops it.
    pub(crate) async fn of(
        mut child: Walpost,
        started: Instant,
        rows: u64,
        done: impl AsyncFnMut() -> bool,
        exit_codes: &[i32],
    ) -> Self {
        tokio::select! {
            biased;
            () = Until(done).reached() => {}
            code = child.wait_exit(LIMIT) => panic!("it ended with {code} before it was done: {}", child.output()),
        }
        let seconds = started.elapsed().as_secs_f64();
        let drained = Self {
            seconds,
            cpu_us_per_row: cpu_seconds(child.pid()) * 1e6 / rows as f64,
            peak_rss_mib: child.peak_rss_kib() as f64 / 1024.0,
        };
        // It has long said something; asked for here, so that nothing is measured of it.
        child.wait_for_line("", LIMIT).await;
        child.sigterm();
        let code = child.wait_exit(LIMIT).await;
        assert!(exit_codes.contains(&code), "{}", child.output());
        drained
    }
}

/// A condition that is looked at at short, even intervals (`eventually` looks less and less often).
pub(crate) struct Until<P>(pub(crate) P);

impl<P: AsyncFnMut() -> bool> Until<P> {
    pub(crate) async fn reached(mut self) {
        let end = Instant::now() + LIMIT;
        while !self.0().await {
            assert!(Instant::now() < end, "not drained within {LIMIT:?}");
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// `walpost run` on this URL of the database, until everything up to `end` is confirmed.
pub(crate) async fn drain(
    database: &Database,
    url: &str,
    end: Lsn,
    rows: u64,
    settings: &[(&str, &str)],
) -> Drained {
    let started = Instant::now();
    let walpost = database
        .walpost(&["run"], settings)
        .env("WALPOST_POSTGRES_URL", url)
        .spawn();
    let done = async || {
        let confirmed = database.confirmed_flush_lsn(&database.slot).await;
        confirmed.is_some_and(|confirmed| confirmed >= end)
    };
    Drained::of(walpost, started, rows, done, &[0]).await
}

/// Seconds that `pg_recvlogical` takes to throw the same stretch of log away, from this copy of the slot.
pub(crate) async fn recvlogical(database: &Database, url: &str, copy: &str, end: Lsn) -> f64 {
    let bin = servers().var("WALPOST_LOCAL_POSTGRES_BIN");
    let (slot, end) = (
        format!("{}_{copy}", database.slot),
        format!("--endpos={end}"),
    );
    let options = [
        "proto_version=1",
        "publication_names=walpost",
        "binary=true",
        "messages=true",
    ];
    let mut args = vec!["-d", url, "-S", &slot, "--start", "-f", "/dev/null", &end];
    for option in options {
        args.extend(["-o", option]);
    }
    let started = Instant::now();
    let (code, output) = Command::program(&format!("{bin}/pg_recvlogical"), args)
        .run(LIMIT)
        .await;
    assert_eq!(code, 0, "{output}");
    started.elapsed().as_secs_f64()
}
