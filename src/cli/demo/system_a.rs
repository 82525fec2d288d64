//! System A: commits orders, each with its outbox row in the same transaction, and rolls some of them back.

use std::time::Duration;

use futures::future::try_join_all;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_postgres::Client;

use super::{Fact, Options};
use crate::config::Config;
use crate::postgres::{connect_application, sql_error};
use crate::{Error, Result};

/// One order in so many is rolled back after its rows were written.
const ROLLED_BACK_EVERY: u64 = 10;
/// Customers of each writer. Only one writer commits for a customer, so the order of commits is known.
const CUSTOMERS: u64 = 50;

const SCHEMA: &str = "create schema if not exists demo;
create table if not exists demo.orders (
  id bigint generated always as identity primary key,
  customer text not null, number bigint not null, item text not null, quantity bigint not null)";
const ORDER: &str = "insert into demo.orders (customer, number, item, quantity) values ($1, $2, $3, $4) returning id";
const EMIT: &str = "select walpost.emit('order', $1, 'OrderPlaced', json_build_object( \
     'order', $2::bigint, 'number', $3::bigint, 'item', $4::text, 'quantity', $5::bigint))::text";
/// What the customers of the orders before the load are called, with a number behind.
pub(super) const WARM_UP: &str = "warm-up-";
/// Orders before the load: enough customers to wake every lane, its topic and each consumer.
const WARM_UP_ORDERS: &str = "with ordered as ( \
         insert into demo.orders (customer, number, item, quantity) \
         select 'warm-up-' || n, 1, 'item-0', 0 from generate_series(1, 200) n returning *) \
     select walpost.emit('order', customer, 'OrderPlaced', json_build_object( \
         'order', id, 'number', number, 'item', item, 'quantity', quantity))::text from ordered";
/// Numbers of one life of System A, so that those of the next one are higher.
const NUMBERS_OF_A_LIFE: u64 = 1_000_000_000;
const ITEMS: u64 = 100;

/// The running system.
#[derive(Debug)]
pub(super) struct SystemA {
    /// Ends when the time is up.
    pub(super) task: JoinHandle<Result<()>>,
}

/// Makes the table and orders what warms everything up; returns the message ids.
pub(super) async fn prepare(client: &Client) -> Result<Vec<String>> {
    client.batch_execute(SCHEMA).await.map_err(failed)?;
    let rows = client.query(WARM_UP_ORDERS, &[]).await.map_err(failed)?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Connects all writers and lets them work `until` then, or until the task is aborted, wherever it stands.
/// `life` counts how often System A was started before.
pub(super) async fn start(
    config: &Config,
    options: Options,
    (life, until): (u64, watch::Receiver<Instant>),
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<SystemA> {
    let mut clients = Vec::new();
    for _ in 0..options.writers {
        clients.push(connect_application(&config.postgres, "demo system A").await?);
    }
    let pause = Duration::from_secs(1) * options.writers / options.rate;
    let writers = clients.into_iter().enumerate();
    let writers: Vec<_> = writers
        .map(|(n, client)| write(client, (n, life), until.clone(), pause, facts.clone()))
        .collect();
    let task = tokio::spawn(async move { try_join_all(writers).await.map(drop) });
    Ok(SystemA { task })
}

async fn write(
    mut client: Client,
    (writer, life): (usize, u64),
    until: watch::Receiver<Instant>,
    pause: Duration,
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<()> {
    let order = client.prepare(ORDER).await.map_err(failed)?;
    let emit = client.prepare(EMIT).await.map_err(failed)?;
    let mut pace = interval(pause.max(Duration::from_micros(1)));
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut attempt: u64 = 0;
    while Instant::now() < *until.borrow() {
        pace.tick().await;
        attempt += 1;
        let customer = format!("customer-{writer}-{}", attempt % CUSTOMERS);
        let number = i64::try_from(life * NUMBERS_OF_A_LIFE + attempt).unwrap_or(i64::MAX);
        let item = format!("item-{}", attempt % ITEMS);
        let quantity = 1 + number % 7;
        let transaction = client.transaction().await.map_err(failed)?;
        let row = transaction
            .query_one(&order, &[&customer, &number, &item, &quantity])
            .await
            .map_err(failed)?;
        let order_id: i64 = row.get(0);
        let row = transaction
            .query_one(&emit, &[&customer, &order_id, &number, &item, &quantity])
            .await
            .map_err(failed)?;
        let id: String = row.get(0);
        let fact = if attempt.is_multiple_of(ROLLED_BACK_EVERY) {
            transaction.rollback().await.map_err(failed)?;
            Fact::RolledBack { id }
        } else {
            let at = Instant::now();
            // Said before: killed in COMMIT, nobody here knows how it ended.
            if facts.send(Fact::Committing { id: id.clone() }).is_err() {
                break;
            }
            transaction.commit().await.map_err(failed)?;
            Fact::Committed { id, at: Some(at) }
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
