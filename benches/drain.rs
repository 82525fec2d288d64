//! How long a backlog takes from the slot into the broker, beside `pg_recvlogical` throwing the same backlog away.
//!
//! Each round loads rows into a fresh database whose slot was copied before the first row, so that both programs read the
//! same stretch of log: `pg_recvlogical` to /dev/null from one copy, then walpost from the slot into the real broker
//! until `confirmed_flush_lsn` has reached the end, then `pg_recvlogical` again from another copy. The ratio is walpost's
//! time over the mean of the two around it. Both times include starting the program.
//!
//! `cargo bench --bench drain` (settings by env: `ROWS`, default 500000; `ROUNDS`, default 5; `PER_TXN`, default 100)

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::{Command, Database, eventually, servers};
use walpost::Lsn;

const LIMIT: Duration = Duration::from_secs(300);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (rows, rounds, per_txn) = (
        setting("ROWS", 500_000),
        setting("ROUNDS", 5),
        setting("PER_TXN", 100),
    );
    println!(
        "{rows} rows of 300 bytes payload, {per_txn} a transaction; seconds; ratio = walpost / pg_recvlogical"
    );
    for over in ["tcp", "unix"] {
        let mut ratios = Vec::new();
        for round in 1..=rounds {
            let database = load(rows, per_txn).await;
            let url = if over == "tcp" {
                &database.url
            } else {
                &database.socket_url
            };
            let end = database.current_wal_lsn().await;
            let before = recvlogical(&database, url, "ref1", end).await;
            let (time, cpu, rss) = walpost(&database, url, end, rows).await;
            let after = recvlogical(&database, url, "ref2", end).await;
            let reference = f64::midpoint(before, after);
            ratios.push(time / reference);
            println!(
                "{over:<4} round {round}: pg_recvlogical {before:.2} {after:.2}  walpost {time:.2} ({:.0} rows/s, {cpu:.2} µs cpu/row, {rss} KiB peak)  ratio {:.2}",
                rows as f64 / time,
                time / reference,
            );
        }
        ratios.sort_by(f64::total_cmp);
        println!(
            "{over:<4} median ratio {:.2}  (min {:.2}, max {:.2})",
            ratios[ratios.len() / 2],
            ratios[0],
            ratios[ratios.len() - 1]
        );
    }
}

/// A database whose slot, and two copies of it, stand before the rows.
async fn load(rows: u64, per_txn: u64) -> Database {
    let database = Database::create("drain").await;
    let (code, output) = Command::walpost(["init"]).on(&database).run(LIMIT).await;
    assert_eq!(code, 0, "{output}");
    for copy in ["ref1", "ref2"] {
        let name = format!("{}_{copy}", database.slot);
        let sql = "select pg_copy_logical_replication_slot($1::text::name, $2::text::name)";
        database.rows(sql, &[&database.slot, &name]).await;
    }
    let transactions = rows / per_txn;
    database
        .sql(&format!(
            "do $$ begin for t in 1..{transactions} loop
               insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
               select 'order', 'key-' || (t * {per_txn} + i) % 1000, 'OrderPlaced', ('\"' || repeat('x', 298) || '\"')::json
               from generate_series(1, {per_txn}) i;
               commit;
             end loop; end $$"
        ))
        .await;
    database
}

async fn recvlogical(database: &Database, url: &str, copy: &str, end: Lsn) -> f64 {
    let program = format!(
        "{}/pg_recvlogical",
        servers().var("WALPOST_LOCAL_POSTGRES_BIN")
    );
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
    let start = Instant::now();
    let (code, output) = Command::program(&program, args).run(LIMIT).await;
    assert_eq!(code, 0, "{output}");
    start.elapsed().as_secs_f64()
}

/// Seconds until everything was confirmed, CPU microseconds a row, peak resident KiB.
async fn walpost(database: &Database, url: &str, end: Lsn, rows: u64) -> (f64, f64, u64) {
    let start = Instant::now();
    let mut child = Command::walpost(["run"])
        .on(database)
        .env("WALPOST_POSTGRES_URL", url)
        .spawn();
    eventually(LIMIT, "the slot to reach the end", async || {
        let confirmed = database.confirmed_flush_lsn(&database.slot).await?;
        (confirmed >= end).then_some(())
    })
    .await;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = cpu_seconds(child.pid()) * 1e6 / rows as f64;
    let rss = child.peak_rss_kib();
    child.sigterm();
    assert_eq!(child.wait_exit(LIMIT).await, 0, "{}", child.output());
    (seconds, cpu, rss)
}

/// User and system time so far, from `/proc/PID/stat` (fields 14 and 15, in ticks of 10 ms).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after_name = stat.rsplit(") ").next().expect("a name in parentheses");
    let ticks = |field: usize| {
        after_name
            .split(' ')
            .nth(field - 3)
            .and_then(|t| t.parse::<u64>().ok())
            .expect("a number")
    };
    (ticks(14) + ticks(15)) as f64 / 100.0
}
