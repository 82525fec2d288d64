//! System A: commits orders, each with its outbox row in the same transaction, and rolls some of them back.

use std::time::Duration;

use futures::future::try_join_all;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::Client;

use super::{Fact, Options};
use crate::config::Config;
use crate::postgres::{connect_sql, sql_error};
use crate::{Error, Result};

/// One order in so many is rolled back after its rows were written.
const ROLLED_BACK_EVERY: u64 = 10;
/// Customers of each writer. Only one writer commits for a customer, so the order of commits is known.
const CUSTOMERS: u64 = 50;

const SCHEMA: &str = "create schema if not exists demo;
create table if not exists demo.orders (
  id bigint generated always as identity primary key,
  customer text not null, number bigint not null, amount_cents bigint not null)";
const ORDER: &str =
    "insert into demo.orders (customer, number, amount_cents) values ($1, $2, $3) returning id";
const OUTBOX: &str = "insert into walpost.outbox (aggregatetype, aggregateid, type, payload) \
     values ('order', $1, 'OrderPlaced', json_build_object('order', $2::bigint, 'number', $3::bigint, 'amount_cents', $4::bigint)) \
     returning id::text";

/// The running system.
#[derive(Debug)]
pub(super) struct SystemA {
    /// Ends when the time is up.
    pub(super) task: JoinHandle<Result<()>>,
}

/// Connects all writers and lets them work for `options.seconds`.
pub(super) async fn start(
    config: &Config,
    options: Options,
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<SystemA> {
    let mut clients = Vec::new();
    for _ in 0..options.writers {
        clients.push(connect_sql(&config.postgres, "demo system A").await?);
    }
    let first = clients
        .first()
        .ok_or_else(|| Error::bug("the demo has no writer"))?;
    first.batch_execute(SCHEMA).await.map_err(failed)?;
    let until = Instant::now() + Duration::from_secs(options.seconds);
    let pause = Duration::from_secs(1) * options.writers / options.rate;
    let writers = clients.into_iter().enumerate();
    let writers: Vec<_> = writers
        .map(|(n, client)| write(client, n, until, pause, facts.clone()))
        .collect();
    let task = tokio::spawn(async move { try_join_all(writers).await.map(drop) });
    Ok(SystemA { task })
}

async fn write(
    mut client: Client,
    writer: usize,
    until: Instant,
    pause: Duration,
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<()> {
    let order = client.prepare(ORDER).await.map_err(failed)?;
    let outbox = client.prepare(OUTBOX).await.map_err(failed)?;
    let mut pace = interval(pause.max(Duration::from_micros(1)));
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut attempt: u64 = 0;
    while Instant::now() < until {
        pace.tick().await;
        attempt += 1;
        let customer = format!("customer-{writer}-{}", attempt % CUSTOMERS);
        let number = i64::try_from(attempt).unwrap_or(i64::MAX);
        let amount_cents = 100 + number * 7 % 10_000;
        let transaction = client.transaction().await.map_err(failed)?;
        let row = transaction
            .query_one(&order, &[&customer, &number, &amount_cents])
            .await
            .map_err(failed)?;
        let order_id: i64 = row.get(0);
        let row = transaction
            .query_one(&outbox, &[&customer, &order_id, &number, &amount_cents])
            .await
            .map_err(failed)?;
        let id: String = row.get(0);
        let fact = if attempt.is_multiple_of(ROLLED_BACK_EVERY) {
            transaction.rollback().await.map_err(failed)?;
            Fact::RolledBack { id }
        } else {
            let at = Instant::now();
            transaction.commit().await.map_err(failed)?;
            Fact::Committed { id, at }
        };
        // The ledger is gone when the demo was stopped.
        if facts.send(fact).is_err() {
            break;
        }
    }
    Ok(())
}

fn failed(error: tokio_postgres::Error) -> Error {
    sql_error("System A: write an order", error)
}
