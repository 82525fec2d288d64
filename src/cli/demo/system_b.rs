//! System B: takes stock for each order, once: the work and the message id in one transaction ([`crate::inbox`]).
//!
//! Its consumers are the pulsar crate's own (not code of ours), on one `Key_Shared` subscription, so that many transactions are
//! under way at a time while each customer's orders are taken in their order.

use futures::future::try_join_all;
use pulsar::consumer::InitialPosition;
use pulsar::{Authentication, Consumer, ConsumerOptions, Pulsar, SubType, TokioExecutor};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_postgres::{Client, Transaction};

use super::Fact;
use super::thread::Thread;
use crate::config::Config;
use crate::inbox::{Handler, HandlerError, Inbox, Message, Settings};
use crate::postgres::sql_error;
use crate::{Error, Result};

/// Consumers side by side: as many commits share a flush of the log.
const WORKERS: usize = 8;

const SCHEMA: &str = "create schema if not exists demo;
create table if not exists demo.stock (item text primary key, taken bigint not null default 0);
insert into demo.stock (item) select 'item-' || n from generate_series(0, 99) n on conflict do nothing";

/// Makes inbox and stock. (A real System B has a database of its own.)
pub(super) async fn prepare(client: &Client) -> Result<()> {
    Inbox::create(client).await?;
    let made = client.batch_execute(SCHEMA).await;
    made.map_err(|error| sql_error("System B: make the stock", error))
}

/// The work of one consumer.
struct Stock;

impl Handler for Stock {
    async fn handle(
        &mut self,
        transaction: &Transaction<'_>,
        message: &Message,
    ) -> Result<(), HandlerError> {
        let order: serde_json::Value = serde_json::from_slice(&message.payload)?;
        let (Some(item), Some(quantity)) = (order["item"].as_str(), order["quantity"].as_i64())
        else {
            return Err("an order without item or quantity".into());
        };
        let sql = "update demo.stock set taken = taken + $2 where item = $1";
        if transaction.execute(sql, &[&item, &quantity]).await? != 1 {
            return Err("an order of an item that nobody has".into());
        }
        Ok(())
    }
}

/// Subscribes from the topic's beginning and works until it is killed.
pub(super) fn start(
    config: &Config,
    topic: &str,
    facts: mpsc::UnboundedSender<Fact>,
) -> Result<Thread> {
    let (config, topic) = (config.clone(), topic.to_owned());
    Thread::start("System B", move || work(config, topic, facts))
}

async fn work(config: Config, topic: String, facts: mpsc::UnboundedSender<Fact>) -> Result<()> {
    let inbox = Inbox::new("demo-system-b", Settings::default())?;
    let heard = |message: &Message, _| {
        let order: serde_json::Value = serde_json::from_slice(&message.payload).unwrap_or_default();
        // The ledger is gone when the demo was stopped.
        let _ended = facts.send(Fact::Received {
            id: message.id.clone(),
            customer: message.key.clone().unwrap_or_default(),
            number: order["number"].as_u64().unwrap_or_default(),
            at: Instant::now(),
        });
    };
    let workers = (0..WORKERS).map(|_| {
        Box::pin(async {
            let mut consumer = Box::pin(subscribe(&config, &topic)).await?;
            inbox
                .run(&config.postgres, &mut consumer, &mut Stock, heard)
                .await
        })
    });
    try_join_all(workers).await.map(drop)
}

async fn subscribe(config: &Config, topic: &str) -> Result<Consumer<Vec<u8>, TokioExecutor>> {
    let mut builder = Pulsar::builder(config.pulsar_url.to_string(), TokioExecutor);
    if let Some((name, data)) = config.pulsar_auth.method_and_data().await? {
        if name == "tls" {
            return Err(
                Error::config("the demo's consumer cannot show a client certificate")
                    .hint("give the demo a token, OAuth2 credentials or a password"),
            );
        }
        builder = builder.with_auth(Authentication { name, data });
    }
    if let Some(ca) = &config.pulsar_tls.ca {
        builder = builder
            .with_certificate_chain_file(ca)
            .map_err(|error| Error::temporary("System B: read the CA file").caused_by(error))?;
    }
    let pulsar = builder.build().await.map_err(failed)?;
    let options = ConsumerOptions {
        initial_position: InitialPosition::Earliest,
        ..ConsumerOptions::default()
    };
    pulsar
        .consumer()
        .with_topic(topic)
        .with_subscription("demo-system-b")
        .with_subscription_type(SubType::KeyShared)
        .with_options(options)
        .build()
        .await
        .map_err(failed)
}

fn failed(error: pulsar::Error) -> Error {
    Error::temporary("System B: consume from Pulsar").caused_by(error)
}
