//! What an outbox costs the database: write-ahead log, processor time and throughput per event, by what empties it.
//!
//! The business transaction (pgbench, four clients, as fast as they can) changes an account and inserts an order; with an
//! outbox it inserts one event of 300 bytes as well. A round runs the same number of transactions in fresh databases:
//!
//! | case | |
//! |---|---|
//! | `none` | without an outbox |
//! | `insert` | the event is written, and nobody reads it: what every outbox costs |
//! | `poller` | a classic poller: `SELECT … FOR UPDATE SKIP LOCKED` and `UPDATE … SET sent_at`, 100 rows at a time, with the partial index that it needs; it publishes nothing |
//! | `keep`, `mark`, `delete` | walpost streams into the real broker, in each of its modes after publishing |
//!
//! Counted is everything from the first transaction until the last event is confirmed and, where the case has it, marked or
//! gone, and a VACUUM of the outbox then: log bytes, and the processor time of all of Postgres' processes. What a case adds is
//! its figure less that of `insert`, and the ratio is what it adds over what the poller adds (a round in which noise makes that
//! less than nothing has none). The *own* processor time is that of the sessions that walpost (its walsender with them) or the
//! poller holds: what is added beyond it is other sessions' work that takes longer, on a machine shared with the broker, or
//! more of it, such as vacuuming. The time of a transaction
//! (clients over TPS) is shown too, but all programs share one machine: there walpost and the broker weigh on it, and the
//! poller publishes nothing.
//!
//! `cargo bench --bench cost` (settings by env: `TRANSACTIONS`, default 30000; `ROUNDS`, 5; `CASES`, names separated by
//! commas, with `insert` and `poller` always among them). Nothing else may use that Postgres meanwhile.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::tests::{Command, Database, Walpost, eventually, servers};
use support::{
    LIMIT, Results, chosen, cpu_seconds, cpu_seconds_of_all, delete_topics, folder, setting,
};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

const CLIENTS: u64 = 4;
/// Accounts: few pages, so that little of the log are images of pages that changed for the first time since a checkpoint.
const ACCOUNTS: u64 = 10_000;
/// Rows of one look of the poller.
const POLL_ROWS: i64 = 100;
/// How long the poller waits when there was nothing: as late as its readers will bear it.
const POLL_PAUSE: Duration = Duration::from_millis(20);
/// The script's path stands in pgbench's own list of files.
const SCRIPT: &str = "cost.pgbench.sql";

const ALL: [&str; 6] = ["none", "insert", "poller", "keep", "mark", "delete"];

/// Per event; without an outbox, per transaction.
#[derive(Clone, Copy)]
struct Cost {
    wal_bytes: f64,
    cpu_us: f64,
    /// The part of it that the consumer's own sessions used, its walsender among them.
    own_cpu_us: f64,
    /// Of one client's transaction, while all four are at work.
    transaction_us: f64,
    tps: f64,
    updates: f64,
    deletes: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (transactions, rounds) = (setting("TRANSACTIONS", 30_000), setting("ROUNDS", 5));
    let settings = [("TRANSACTIONS", transactions), ("ROUNDS", rounds)];
    let mut results = Results::begin_on_servers("cost", &settings);
    for round in 1..=rounds {
        let mut costs = Vec::new();
        for case in ALL {
            if chosen(case) || case == "insert" || case == "poller" {
                costs.push((case, measure(case, transactions).await));
                delete_topics().await;
            }
        }
        let of = |name: &str| costs.iter().find(|(case, _)| *case == name);
        let (Some((_, insert)), Some((_, poller))) = (of("insert"), of("poller")) else {
            unreachable!("both are always measured");
        };
        for (case, cost) in &costs {
            record(&mut results, round, case, *cost, (*insert, *poller));
        }
    }
}

fn record(results: &mut Results, round: u64, case: &str, cost: Cost, references: (Cost, Cost)) {
    let (insert, poller) = references;
    let mut figures = vec![
        ("tps", cost.tps),
        ("wal_bytes", cost.wal_bytes),
        ("cpu_us", cost.cpu_us),
        ("own_cpu_us", cost.own_cpu_us),
        ("transaction_us", cost.transaction_us),
        ("updates", cost.updates),
        ("deletes", cost.deletes),
    ];
    if !["none", "insert"].contains(&case) {
        let added = |of: fn(Cost) -> f64| (of(cost) - of(insert), of(poller) - of(insert));
        let (wal, poller_wal) = added(|cost| cost.wal_bytes);
        let (cpu, poller_cpu) = added(|cost| cost.cpu_us);
        let (time, poller_time) = added(|cost| cost.transaction_us);
        figures.extend([
            ("added_wal_bytes", wal),
            ("added_cpu_us", cpu),
            ("added_transaction_us", time),
        ]);
        let ratios = [
            ("wal_over_poller", wal, poller_wal),
            ("cpu_over_poller", cpu, poller_cpu),
            ("own_cpu_over_poller", cost.own_cpu_us, poller.own_cpu_us),
            ("transaction_over_poller", time, poller_time),
        ];
        // Where noise makes the poller seem to add nothing there is no ratio.
        let told = ratios.into_iter().filter(|(.., poller)| *poller > 0.0);
        figures.extend(told.map(|(name, added, poller)| (name, added / poller)));
    }
    results.record(case, round, &figures);
}

async fn measure(case: &str, transactions: u64) -> Cost {
    let database = prepare(case).await;
    let consumer = Consumer::start(case, &database).await;
    // Full page images after a checkpoint are written by chance otherwise.
    database.sql("checkpoint").await;
    let wal = database.current_wal_lsn().await;
    let cpu = postgres_cpu_seconds();
    let tps = pgbench(&database, case, transactions).await;
    consumer.finish(case, &database).await;
    database.sql("vacuum walpost.outbox").await;
    let cpu = postgres_cpu_seconds() - cpu;
    let own_cpu = own_cpu_seconds(&database).await;
    let wal = database.current_wal_lsn().await.as_u64() - wal.as_u64();
    consumer.stop().await;
    let [updates, deletes] = written(&database, case, transactions).await;
    let per_event = |total: f64| total / transactions as f64;
    Cost {
        wal_bytes: per_event(wal as f64),
        cpu_us: per_event(cpu * 1e6),
        own_cpu_us: per_event(own_cpu * 1e6),
        transaction_us: CLIENTS as f64 * 1e6 / tps,
        tps,
        updates: per_event(updates as f64),
        deletes: per_event(deletes as f64),
    }
}

fn mode(case: &str) -> [(&'static str, &str); 1] {
    let streams = ["keep", "mark", "delete"].contains(&case);
    [("WALPOST_AFTER_PUBLISH", if streams { case } else { "keep" })]
}

async fn prepare(case: &str) -> Database {
    let database = Database::create("cost").await;
    database.init(&[], &mode(case)).await;
    database
        .sql(&format!(
            "create table bench_account (id int primary key, balance bigint not null) with (fillfactor = 80);
             insert into bench_account select i, 0 from generate_series(1, {ACCOUNTS}) i;
             create table bench_order (id bigint generated always as identity primary key, account int not null, amount bigint not null)",
        ))
        .await;
    database.sql("vacuum analyze bench_account").await;
    if ["none", "insert", "poller"].contains(&case) {
        // These have no slot to be read.
        let drop = "select pg_drop_replication_slot($1::text::name)";
        database.rows(drop, &[&database.slot]).await;
    }
    if case == "poller" {
        let index = "create index outbox_unsent on walpost.outbox (seq) where sent_at is null";
        database.sql(index).await;
    }
    database
}

/// Processor time of the whole server so far.
fn postgres_cpu_seconds() -> f64 {
    let pid = servers().var("WALPOST_LOCAL_POSTGRES_PID");
    cpu_seconds_of_all(pid.parse().expect("a process id"))
}

/// Processor time of the sessions that walpost or the poller holds. What they used before the first transaction is in it: a few
/// milliseconds.
async fn own_cpu_seconds(database: &Database) -> f64 {
    let sql = "select pid from pg_stat_activity
               where datname = current_database() and application_name ~ '^(walpost|poller)'";
    let rows = database.rows(sql, &[]).await;
    let pids = rows.iter().map(|row| row.get::<_, i32>(0).cast_unsigned());
    pids.map(cpu_seconds).sum()
}

/// Runs the transactions and returns how many there were a second.
async fn pgbench(database: &Database, case: &str, transactions: u64) -> f64 {
    let payload = "0123456789abcdef".repeat(19);
    let event = match case {
        "none" => String::new(),
        _ => format!(
            "insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
               values ('order', 'key-' || :account, 'OrderPlaced', '\"{}\"');\n",
            &payload[..298]
        ),
    };
    let script = format!(
        "\\set account random(1, {ACCOUNTS})
         begin;
         update bench_account set balance = balance + 1 where id = :account;
         insert into bench_order (account, amount) values (:account, 1);
         {event}commit;\n"
    );
    let path = folder().join(SCRIPT);
    std::fs::write(&path, script).expect("the target folder can be written");
    let own = format!("{}/pgbench", servers().var("WALPOST_LOCAL_POSTGRES_BIN"));
    let each = (transactions / CLIENTS).to_string();
    let clients = CLIENTS.to_string();
    let script = path.to_str().expect("a path that is text");
    let args = [
        "-n",
        "-M",
        "prepared",
        "-c",
        &clients,
        "-t",
        &each,
        "-f",
        script,
        &database.socket_url,
    ];
    let (code, said) = Command::program(&own, args).run(LIMIT).await;
    assert_eq!(code, 0, "pgbench: {said}");
    let tps = said.lines().find_map(|line| {
        let (number, _) = line.strip_prefix("tps = ")?.split_once(' ')?;
        number.parse().ok()
    });
    tps.unwrap_or_else(|| panic!("pgbench told no tps:\n{said}"))
}

/// What empties the outbox.
enum Consumer {
    Nobody,
    Poller(Arc<AtomicBool>, JoinHandle<()>),
    Walpost(Walpost),
}

impl Consumer {
    async fn start(case: &str, database: &Database) -> Self {
        match case {
            "none" | "insert" => Self::Nobody,
            "poller" => {
                let stop = Arc::new(AtomicBool::new(false));
                let polling = poll(database.connect().await, Arc::clone(&stop));
                Self::Poller(stop, tokio::spawn(polling))
            }
            mode_of_walpost => {
                let url = ("WALPOST_POSTGRES_URL", database.socket_url.as_str());
                let settings = [mode(mode_of_walpost)[0], url];
                Self::Walpost(database.start(&settings).await)
            }
        }
    }

    /// Waits until it has done everything.
    async fn finish(&self, case: &str, database: &Database) {
        if let Self::Walpost(_) = self {
            database.wait_all_confirmed(LIMIT).await;
        }
        let left = match case {
            "mark" | "poller" => "select exists (select from walpost.outbox where sent_at is null)",
            "delete" => "select exists (select from walpost.outbox)",
            _ => return,
        };
        eventually(LIMIT, "the outbox to be emptied", async || {
            (!database.rows(left, &[]).await[0].get::<_, bool>(0)).then_some(())
        })
        .await;
    }

    async fn stop(self) {
        match self {
            Self::Nobody => {}
            Self::Poller(stop, polling) => {
                stop.store(true, Ordering::Relaxed);
                polling.await.expect("the poller does not panic");
            }
            Self::Walpost(walpost) => walpost.stop().await,
        }
    }
}

/// The poller that applications write for themselves.
async fn poll(mut client: Client, stop: Arc<AtomicBool>) {
    client
        .batch_execute("set application_name = 'poller'")
        .await
        .expect("a name");
    let select = client
        .prepare(
            "select id::text, aggregateid, type, payload::text from walpost.outbox
             where sent_at is null order by seq limit $1 for update skip locked",
        )
        .await
        .expect("a sound query");
    let update = client
        .prepare("update walpost.outbox set sent_at = clock_timestamp() where id = any ($1::text[]::uuid[])")
        .await
        .expect("a sound query");
    while !stop.load(Ordering::Relaxed) {
        let transaction = client.transaction().await.expect("a transaction");
        let rows = transaction
            .query(&select, &[&POLL_ROWS])
            .await
            .expect("rows");
        let ids: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        if !ids.is_empty() {
            let updated = transaction.execute(&update, &[&ids]).await;
            updated.expect("the poller's own rows");
        }
        transaction.commit().await.expect("a commit");
        if ids.is_empty() {
            tokio::time::sleep(POLL_PAUSE).await;
        }
    }
}

/// Rows of the outbox that were updated and deleted. Sessions report what they did when they end.
async fn written(database: &Database, case: &str, transactions: u64) -> [i64; 2] {
    let sql = "select n_tup_upd, n_tup_del from pg_stat_user_tables where schemaname = 'walpost' and relname = 'outbox'";
    let expected = match case {
        "mark" | "poller" | "delete" => i64::try_from(transactions).expect("not that many"),
        _ => 0,
    };
    eventually(LIMIT, "the server to have counted", async || {
        let rows = database.rows(sql, &[]).await;
        let counted: [i64; 2] = [rows[0].get(0), rows[0].get(1)];
        (counted[0] + counted[1] >= expected).then_some(counted)
    })
    .await
}
