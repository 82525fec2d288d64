//! What each mode after publishing costs the database: writes and write-ahead log per event.
//!
//! For each of `keep`, `mark` and `delete` the same rows go into a fresh database, a hundred a transaction, while walpost streams;
//! counted is everything from the first row until the last one is confirmed and, where the mode has it, marked or gone.
//! `keep` is the measure: its rows are written by the application, and walpost writes nothing for them.
//!
//! `cargo bench --bench writes` (setting by env: `ROWS`, default 100000). Nothing else may write to that server meanwhile.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use support::{Database, Load, eventually};

const LIMIT: Duration = Duration::from_secs(300);
const PER_TXN: u64 = 100;

struct Cost {
    wal_bytes: f64,
    updates: f64,
    deletes: f64,
    transactions: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let rows = std::env::var("ROWS").map_or(100_000, |text| text.parse().expect("a number"));
    println!("{rows} rows of 300 bytes payload, {PER_TXN} a transaction; per event");
    println!("mode     updates  deletes  transactions  WAL bytes  WAL / keep");
    let mut keep = None;
    for mode in ["keep", "mark", "delete"] {
        let cost = measure(mode, rows).await;
        let keep = *keep.get_or_insert(cost.wal_bytes);
        println!(
            "{mode:<7}  {:7.4}  {:7.4}  {:12.4}  {:9.0}  {:10.2}",
            cost.updates,
            cost.deletes,
            cost.transactions,
            cost.wal_bytes,
            cost.wal_bytes / keep
        );
    }
}

async fn measure(mode: &str, rows: u64) -> Cost {
    let database = Database::create("writes").await;
    let settings = [("WALPOST_AFTER_PUBLISH", mode)];
    database.init(&[], &settings).await;
    Load::prepare(&database).await;
    let walpost = database.start(&settings).await;
    // Full page images after a checkpoint are written by chance otherwise.
    database.sql("CHECKPOINT").await;
    let wal = database.current_wal_lsn().await;
    let before = counters(&database).await;
    database
        .sql(&format!(
            "do $$ begin for t in 1..{} loop
               insert into walpost.outbox (aggregatetype, aggregateid, type, payload)
               select 'order', 'key-' || i, 'OrderPlaced', ('\"' || repeat('x', 298) || '\"')::json
               from generate_series(1, {PER_TXN}) i;
               commit;
             end loop; end $$",
            rows / PER_TXN
        ))
        .await;
    database.wait_all_confirmed(LIMIT).await;
    let left = match mode {
        "mark" => "SELECT count(*) FROM walpost.outbox WHERE sent_at IS NULL",
        "delete" => "SELECT count(*) FROM walpost.outbox",
        _ => "SELECT 0::bigint",
    };
    eventually(LIMIT, "nothing to be left to do", async || {
        (database.rows(left, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let wal = database.current_wal_lsn().await.as_u64() - wal.as_u64();
    // Sessions report what they did when they have been idle for a moment.
    walpost.stop().await;
    let expected = if mode == "keep" { 0 } else { rows };
    let after = eventually(LIMIT, "the server to have counted", async || {
        let after = counters(&database).await;
        let written = after[1] - before[1] + after[2] - before[2];
        (after[0] - before[0] >= rows && written >= expected).then_some(after)
    })
    .await;
    let per_event = |index: usize| (after[index] - before[index]) as f64 / rows as f64;
    Cost {
        wal_bytes: wal as f64 / rows as f64,
        updates: per_event(1),
        deletes: per_event(2),
        transactions: per_event(3),
    }
}

/// Rows inserted, updated and deleted in the outbox, and transactions of the database.
async fn counters(database: &Database) -> [u64; 4] {
    let sql = "SELECT n_tup_ins, n_tup_upd, n_tup_del, (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())
               FROM pg_stat_user_tables WHERE schemaname = 'walpost' AND relname = 'outbox'";
    let rows = database.rows(sql, &[]).await;
    let number = |index: usize| u64::try_from(rows[0].get::<_, i64>(index)).expect("a count");
    [number(0), number(1), number(2), number(3)]
}
