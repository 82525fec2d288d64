//! The topics that rows go to, by number, and what is in them.

use std::collections::HashMap;

use super::record::{Found, digest_of, digest_of_payload};
use super::{Config, MAX_TOPICS};
use crate::cli::replay::MARK;
use crate::outbox::{Problem, TopicTemplate};
use crate::pulsar::{Message, Reader, ReaderConfig};
use crate::{Error, Result};

#[derive(Debug)]
struct Topic {
    name: String,
    /// When the oldest message that it has was published.
    oldest_ms: Option<u64>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Topics {
    numbers: HashMap<String, u32>,
    list: Vec<Topic>,
}

impl Topics {
    /// With the one topic of a template that names no column: it may have messages, and no row any more.
    pub(super) fn new(template: &TopicTemplate) -> Result<Self> {
        let mut topics = Self {
            numbers: HashMap::new(),
            list: Vec::new(),
        };
        let mut name = String::new();
        let rendered = template.render_into(&mut name, |_, _| Err(Problem::Null));
        if rendered.is_ok() {
            topics.number(&name)?;
        }
        Ok(topics)
    }

    /// The topic's number.
    pub(super) fn number(&mut self, name: &str) -> Result<u32> {
        if let Some(number) = self.numbers.get(name) {
            return Ok(*number);
        }
        if self.list.len() == MAX_TOPICS {
            return Err(Error::refused(format!(
                "the rows go to more than {MAX_TOPICS} topics, whose names would have to be kept in memory"
            ))
            .hint("verify one table at a time, with WALPOST_OUTBOX_TABLE"));
        }
        let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        self.numbers.insert(name.to_owned(), number);
        self.list.push(Topic {
            name: name.to_owned(),
            oldest_ms: None,
        });
        Ok(number)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    pub(super) fn oldest_ms(&self) -> Vec<Option<u64>> {
        self.list.iter().map(|topic| topic.oldest_ms).collect()
    }

    /// Reads all of them, one partition after the other, and gives each message with its id.
    pub(super) async fn read(
        &mut self,
        config: &Config,
        mut take: impl FnMut(Found, Option<&str>) -> Result<()>,
    ) -> Result<()> {
        let mut reader = Reader::new(ReaderConfig::of(config));
        for (topic, number) in self.list.iter_mut().zip(0..) {
            let parts = reader.parts(&topic.name).await?;
            for (name, part) in parts.iter().zip(0..) {
                let mut place = 0;
                let oldest_ms = &mut topic.oldest_ms;
                let reading = reader.read(name, |message| {
                    let at_ms = message.publish_time_ms;
                    *oldest_ms = Some(oldest_ms.map_or(at_ms, |oldest| oldest.min(at_ms)));
                    place += 1;
                    let found = found(config, message, (number, part, place));
                    take(found, message.property("id"))
                });
                reading.await?;
            }
        }
        Ok(())
    }
}

fn found(config: &Config, message: &Message<'_>, (topic, part, place): (u32, u32, u64)) -> Found {
    let producer = message.producer_name;
    Found {
        topic,
        part,
        place,
        replayed: producer.starts_with(&config.producer_name) && producer.contains(MARK),
        event_ms: message.event_time_ms,
        key: digest_of(message.key.unwrap_or_default().as_bytes()),
        payload: digest_of_payload(message.payload),
        id: String::new(),
    }
}
