//! A tap on the line between walpost and the broker: when each event's batch was sent, and when its receipt came.
//!
//! The tests' proxy stands between the two and shows what passes. Frames to the broker are looked into after they have
//! been passed on, so looking costs no latency; the detour over the proxy's socket does, some ten microseconds each way,
//! and it counts against walpost. An event is known by the number in its payload.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use prost::Message as _;
use pulsar::message::proto::{BaseCommand, MessageIdData};

use super::Clock;
use super::tests::{Direction, Onlooker, Proxy, parse_entry, sized};

/// Digits of an event's number.
const DIGITS: usize = 10;

/// SQL that makes the payload of event `i`: a JSON string of `bytes` bytes that begins with its number.
pub(crate) fn numbered(bytes: usize) -> String {
    let rest = bytes - DIGITS - 3;
    format!("('\"' || lpad(i::text, {DIGITS}, '0') || ':' || repeat('x', {rest}) || '\"')::json")
}

/// The number in such a payload.
pub(crate) fn number_in(payload: &[u8]) -> usize {
    let digits = payload
        .get(1..=DIGITS)
        .and_then(|digits| std::str::from_utf8(digits).ok());
    let number = digits.and_then(|digits| digits.parse().ok());
    number.expect("an event of this bench has its number in its payload")
}

/// See the module's documentation.
pub(crate) struct Tap {
    proxy: Proxy,
}

impl Tap {
    /// Stands before this broker and notes when each event was sent and when its receipt came.
    pub(crate) fn before(broker: &str, sent: Arc<Clock>, received: Arc<Clock>) -> Self {
        let lines = Mutex::new(Lines {
            sent,
            received,
            unfinished: HashMap::new(),
            waiting: HashMap::new(),
            early: HashMap::new(),
        });
        let onlooker: Onlooker = Arc::new(move |direction, connection, at, bytes| {
            // One thread runs the whole proxy: nobody waits for this lock.
            let mut lines = lines.lock().expect("a tap that panicked has failed");
            lines.passed((connection, direction), at, bytes);
        });
        Self {
            proxy: Proxy::seen_by(broker, onlooker),
        }
    }

    /// The service URL to use instead of the broker's.
    pub(crate) fn url(&self) -> String {
        format!("pulsar://{}", self.proxy.addr())
    }
}

/// A batch: connection, producer id, lowest sequence id.
type Batch = (u64, u64, u64);

struct Lines {
    sent: Arc<Clock>,
    received: Arc<Clock>,
    /// The beginning of a frame whose end is yet to come.
    unfinished: HashMap<(u64, Direction), Vec<u8>>,
    /// Events of batches without receipt.
    waiting: HashMap<Batch, Vec<usize>>,
    /// Receipts that came before the rest of the piece in which their batch stood had been passed on.
    early: HashMap<Batch, Instant>,
}

impl Lines {
    fn passed(&mut self, line: (u64, Direction), at: Instant, bytes: &[u8]) {
        let mut buffer = self.unfinished.remove(&line).unwrap_or_default();
        buffer.extend_from_slice(bytes);
        let mut rest = &buffer[..];
        while let Some(size) = rest.first_chunk::<4>() {
            let end = 4 + u32::from_be_bytes(*size) as usize;
            if end > rest.len() {
                break;
            }
            self.frame(line, at, &rest[4..end]);
            rest = &rest[end..];
        }
        let rest = rest.to_vec();
        self.unfinished.insert(line, rest);
    }

    fn frame(&mut self, (connection, _): (u64, Direction), at: Instant, frame: &[u8]) {
        let mut rest = frame;
        let command = sized(&mut rest).ok();
        let command = command.and_then(|command| BaseCommand::decode(command).ok());
        let command = command.expect("a frame of Pulsar's protocol");
        if let Some(send) = command.send {
            let entry = parse_entry(MessageIdData::default(), rest).expect("a sound entry");
            let messages = entry.messages.iter();
            let events: Vec<usize> = messages.map(|m| number_in(&m.payload)).collect();
            for event in &events {
                self.sent.note(*event, at);
            }
            let batch = (connection, send.producer_id, send.sequence_id);
            self.waiting.insert(batch, events);
            if let Some(at) = self.early.remove(&batch) {
                self.receipt(batch, at);
            }
        } else if let Some(receipt) = command.send_receipt {
            let batch = (connection, receipt.producer_id, receipt.sequence_id);
            self.receipt(batch, at);
        }
    }

    fn receipt(&mut self, batch: Batch, at: Instant) {
        match self.waiting.remove(&batch) {
            Some(events) => {
                for event in events {
                    self.received.note(event, at);
                }
            }
            None => {
                self.early.insert(batch, at);
            }
        }
    }
}
