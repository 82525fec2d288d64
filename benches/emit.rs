//! What `walpost.emit` and `walpost.emit_transient` cost over the plain INSERT, as a ratio of medians in one run.
//!
//! Each variant is a prepared statement; blocks of the variants take turns, so that whatever else the machine does falls on all
//! of them. Two measures: the whole business transaction (an order, its event, COMMIT, all of it flushed), which is what an
//! application waits for; and the statement alone, many in one transaction, which hides nothing behind the flush.
//!
//! `cargo bench --bench emit` (settings by env: `BLOCKS`, default 100; `BLOCK`, default 50 statements).

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::Database;
use tokio_postgres::{Client, Statement};

const VARIANTS: [(&str, &str); 3] = [
    (
        "insert",
        "insert into walpost.outbox (aggregatetype, aggregateid, type, payload) values ('order', $1, 'OrderPlaced', $2::text::json) returning id",
    ),
    (
        "emit",
        "select walpost.emit('order', $1, 'OrderPlaced', $2::text::json)",
    ),
    (
        "emit_transient",
        "select walpost.emit_transient('order', $1, 'OrderPlaced', $2::text::json)",
    ),
];

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (blocks, block) = (setting("BLOCKS", 100), setting("BLOCK", 50));
    let database = Database::create("emit").await;
    database.init(&[], &[]).await;
    // Nobody reads it here: no log is to be kept for it.
    let drop_slot = "select pg_drop_replication_slot($1::text::name)";
    database.rows(drop_slot, &[&database.slot]).await;
    database
        .sql("create table orders (id bigint generated always as identity primary key, customer text not null)")
        .await;
    let client = &database.client;
    let prepare = async |sql| client.prepare(sql).await.expect("a statement");
    let order = prepare("insert into orders (customer) values ($1)").await;
    let mut variants = Vec::new();
    for (name, sql) in VARIANTS {
        variants.push((name, prepare(sql).await));
    }
    println!("{blocks} blocks of {block} statements each, 300 bytes of payload; medians");
    println!(
        "{:<14}  {:>12}  {:>8}  {:>12}  {:>8}",
        "", "transaction", "/ insert", "statement", "/ insert"
    );
    let mut times: Vec<[Vec<Duration>; 2]> = variants.iter().map(|_| [vec![], vec![]]).collect();
    for number in 0..=blocks {
        for ((_, event), times) in variants.iter().zip(&mut times) {
            let of_transactions = transactions(client, &order, event, block).await;
            let of_statements = statements(client, event, block).await;
            // The first block plans the statements.
            if number > 0 {
                times[0].push(of_transactions);
                times[1].push(of_statements);
            }
        }
    }
    let micros = |times: &mut Vec<Duration>| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e6 / block as f64
    };
    let medians: Vec<[f64; 2]> = times
        .iter_mut()
        .map(|[a, b]| [micros(a), micros(b)])
        .collect();
    for ((name, _), [transaction, statement]) in variants.iter().zip(&medians) {
        let [first, alone] = medians[0];
        println!(
            "{name:<14}  {transaction:9.1} µs  {:8.2}  {statement:9.1} µs  {:8.2}",
            transaction / first,
            statement / alone
        );
    }
}

fn payload() -> String {
    format!("\"{}\"", "x".repeat(298))
}

/// An order and its event, `count` times, each with its COMMIT.
async fn transactions(
    client: &Client,
    order: &Statement,
    event: &Statement,
    count: usize,
) -> Duration {
    let payload = payload();
    let begin = Instant::now();
    for _ in 0..count {
        client.batch_execute("begin").await.expect("begin");
        client
            .execute(order, &[&"customer-7"])
            .await
            .expect("an order");
        client
            .query_one(event, &[&"customer-7", &payload])
            .await
            .expect("an event");
        client.batch_execute("commit").await.expect("commit");
    }
    begin.elapsed()
}

/// The event alone, `count` times in one transaction.
async fn statements(client: &Client, event: &Statement, count: usize) -> Duration {
    let payload = payload();
    client.batch_execute("begin").await.expect("begin");
    let begin = Instant::now();
    for _ in 0..count {
        client
            .query_one(event, &[&"customer-7", &payload])
            .await
            .expect("an event");
    }
    let elapsed = begin.elapsed();
    client.batch_execute("commit").await.expect("commit");
    elapsed
}
