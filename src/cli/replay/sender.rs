//! The publisher of `walpost replay`: the stream's settings, names of its own, and an end to its patience.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tokio_postgres::Client;

use super::MARK;
use crate::ack::{AckTracker, TxnNo};
use crate::config::Config;
use crate::connector::publisher_config;
use crate::outbox::{OutboxEvent, key_hash};
use crate::postgres::sql_error;
use crate::pulsar::{BrokerEvent, Flush, Outgoing, Publisher, PublisherConfig, RowTag};
use crate::scanner::cluster;
use crate::{Error, Lsn, Result};

/// Without a single receipt for this long a one-shot command gives up.
const RECEIPTS: Duration = Duration::from_secs(60);
/// How often the publisher looks at the clock.
const TICK: Duration = Duration::from_secs(1);

/// A publisher with names that were never used.
pub(super) struct Sender {
    publisher: Publisher,
    txn: TxnNo,
    /// In place of log positions: all that matters is that it rises.
    position: u64,
    heard_at: Instant,
}

impl Sender {
    pub(super) async fn connect(config: &Config, client: &Client) -> Result<Self> {
        let system_id = cluster::system_id(client).await?;
        let row = client
            .query_one("SELECT timeline_id FROM pg_control_checkpoint()", &[])
            .await
            .map_err(|error| sql_error("ask for the timeline", error))?;
        let timeline: i32 = row.get(0);
        let stream = publisher_config(
            config,
            &Arc::default(),
            &system_id,
            timeline.unsigned_abs(),
            0,
        );
        let unique = RandomState::new().hash_one(std::process::id());
        let mut publisher = Publisher::new(PublisherConfig {
            producer_name: format!("{}{MARK}{unique:016x}", stream.producer_name),
            ..stream
        });
        publisher.connect().await?;
        Ok(Self {
            publisher,
            txn: AckTracker::new(Lsn::ZERO).begin(),
            position: 0,
            heard_at: Instant::now(),
        })
    }

    pub(super) async fn send(&mut self, event: &OutboxEvent<'_>, topic: &str) -> Result<()> {
        while let Some(said) = self.publisher.try_next_event() {
            self.handle(said)?;
        }
        if self.publisher.is_empty() {
            self.heard_at = Instant::now();
        }
        while !self.publisher.has_room() {
            self.publisher.flush(Flush::All);
            self.wait().await?;
        }
        self.position += 1;
        let outgoing = Outgoing {
            key: event.aggregateid,
            payload: event.payload,
            event_time_ms: event.event_time_ms,
            deliver_at_ms: event.deliver_at_ms,
            txn: self.txn,
            commit_lsn: Lsn::new(self.position << 3),
            row: RowTag::default(),
            mark: None,
        };
        let hash = key_hash(event.aggregateid.as_bytes());
        let taken = self
            .publisher
            .publish(topic, hash, &outgoing, &event.properties());
        taken.map_err(|error| {
            Error::refused(format!("the row with id {} cannot be published", event.id))
                .caused_by(error)
                .hint("rows before it may have been sent")
        })
    }

    pub(super) async fn receipts(&mut self) -> Result<()> {
        while !self.publisher.is_empty() {
            self.publisher.flush(Flush::All);
            self.wait().await?;
        }
        Ok(())
    }

    fn handle(&mut self, said: BrokerEvent) -> Result<()> {
        let result = self.publisher.handle(said);
        if self.publisher.take_acked().count() > 0 {
            self.heard_at = Instant::now();
        }
        result
    }

    /// For a broker's word, at most a second.
    async fn wait(&mut self) -> Result<()> {
        if self.heard_at.elapsed() > RECEIPTS {
            let (messages, _) = self.publisher.in_flight();
            return Err(Error::temporary(format!(
                "the broker gives no receipts: {messages} messages may have been sent or not"
            ))
            .hint(
                "what it has against their topic stands above; what was sent before them is sent",
            ));
        }
        let tick = Instant::now() + TICK;
        tokio::select! {
            biased;
            said = self.publisher.next_event() => self.handle(said),
            () = sleep_until(tick) => {
                self.publisher.tick(Instant::now());
                Ok(())
            }
        }
    }
}
