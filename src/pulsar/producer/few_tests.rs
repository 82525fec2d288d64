//! A topic that allows fewer producers than there are lanes, on a broker whose every answer the test decides.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use bytes::Bytes;
use prost::Message as _;
use pulsar::message::proto::{BaseCommand, ServerError};

use super::super::diversion::Diversion;
use super::super::effects::{Created, Effect, Link, Signal};
use super::super::flushing::Flush;
use super::super::outgoing::{Outgoing, RowTag};
use super::super::{Now, Settings};
use super::*;
use crate::ack::AckTracker;
use crate::pulsar::compression::Codec;
use crate::pulsar::partition::HashingScheme;
use crate::pulsar::{verdict, wire};

const TOPIC: &str = "topic";
const LANES: u32 = 8;
/// Between two attempts to have one producer more.
const PAUSE: Duration = Duration::from_secs(60);
const KEYS: u64 = 16;

/// A producer of the broker.
#[derive(Clone)]
struct Open {
    name: String,
    connection: u64,
    /// Frames that are stored, or that it has not read yet.
    unread: VecDeque<Bytes>,
}

/// The broker: what it stores of a producer, it stores in order.
struct Broker {
    limit: usize,
    deduplicates: bool,
    /// The connection that it says the topic is on.
    connection: u64,
    /// It reads no frames of these connections.
    frozen: HashSet<u64>,
    open: BTreeMap<u64, Open>,
    /// Those of connections that have ended for the client only. They are no part of the limit here, so that a change comes at the worst time.
    ghosts: Vec<Open>,
    pushed: HashMap<String, u64>,
    /// Key and number of each event.
    stored: Vec<(String, u64)>,
    /// Names of all producers that were made.
    names: Vec<String>,
    closing: VecDeque<u64>,
    /// It closes no producer now.
    holds_closes: bool,
}

impl Broker {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            deduplicates: true,
            connection: 1,
            frozen: HashSet::new(),
            open: BTreeMap::new(),
            ghosts: Vec::new(),
            pushed: HashMap::new(),
            stored: Vec::new(),
            names: Vec::new(),
            closing: VecDeque::new(),
            holds_closes: false,
        }
    }

    /// Reads a frame; false: it was stored before.
    fn store(&mut self, name: &str, frame: &Bytes) -> bool {
        let send = command(frame).send.expect("a send");
        let highest = send.highest_sequence_id.unwrap_or(send.sequence_id);
        let pushed = self.pushed.get(name).copied();
        if self.deduplicates && pushed.is_some_and(|pushed| send.sequence_id <= pushed) {
            return false;
        }
        self.pushed.insert(name.to_owned(), highest);
        let payload = wire::payload_of(frame).expect("a payload");
        for (metadata, entry) in wire::messages(payload) {
            let size = usize::try_from(metadata.payload_size).expect("a size");
            let number = std::str::from_utf8(&entry[entry.len() - size..]).expect("a number");
            let key = metadata.partition_key.clone().unwrap_or_default();
            self.stored.push((key, number.parse().expect("a number")));
        }
        true
    }

    fn create(&mut self, connection: u64, producer_id: u64, name: &str) -> crate::Result<Created> {
        if self.open.len() >= self.limit {
            let code = Some(ServerError::ProducerBusy as i32);
            let message = Some("Topic 'topic' reached max producers limit");
            return Err(verdict::of_open(TOPIC, code, message));
        }
        // It takes the place of one of its name, which is closed with all that was not read.
        self.ghosts.retain(|ghost| ghost.name != name);
        self.names.push(name.to_owned());
        let open = Open {
            name: name.to_owned(),
            connection,
            unread: VecDeque::new(),
        };
        self.open.insert(producer_id, open);
        let known = self.pushed.get(name).copied();
        Ok(Created {
            last_sequence_id: known.filter(|_| self.deduplicates),
            schema_version: None,
        })
    }

    /// Reads what it has not read of the connections that it reads; returns the answers.
    fn read(&mut self) -> Vec<Signal> {
        let mut signals = Vec::new();
        let ids: Vec<u64> = self.open.keys().copied().collect();
        for producer_id in ids {
            let open = self.open.get_mut(&producer_id).expect("it is open");
            let (connection, name) = (open.connection, open.name.clone());
            if self.frozen.contains(&connection) {
                continue;
            }
            for frame in std::mem::take(&mut open.unread) {
                let stored_before = !self.store(&name, &frame);
                let sequence_id = command(&frame).send.expect("a send").sequence_id;
                signals.push(Signal::Receipt {
                    connection,
                    producer_id,
                    sequence_id,
                    stored_before,
                });
            }
        }
        // A close is read behind the frames, and answered then.
        let closing = std::mem::take(&mut self.closing);
        for producer_id in closing {
            let connection = self.open.get(&producer_id).map(|open| open.connection);
            if self.holds_closes || connection.is_some_and(|it| self.frozen.contains(&it)) {
                self.closing.push_back(producer_id);
            } else {
                self.open.remove(&producer_id);
                signals.push(Signal::Closed { producer_id });
            }
        }
        signals
    }

    /// The client's end of a connection is gone; the broker goes on reading what it was sent.
    fn lose(&mut self, connection: u64) -> Signal {
        let ids: Vec<u64> = self.open.keys().copied().collect();
        for id in ids {
            if self.open[&id].connection == connection {
                self.ghosts.extend(self.open.remove(&id));
            }
        }
        self.connection += 1;
        Signal::Disconnected {
            connection,
            reason: "lost".to_owned(),
        }
    }
}

fn command(frame: &Bytes) -> BaseCommand {
    let size = u32::from_be_bytes(frame[4..8].try_into().expect("4 bytes")) as usize;
    BaseCommand::decode(&frame[8..8 + size]).expect("a command")
}

/// A producer and its broker.
struct Pair {
    producer: Producer,
    broker: Broker,
    now: Now,
    lsn: u64,
    sent: u64,
}

impl Pair {
    fn new(broker: Broker) -> Self {
        let now = Now {
            at: Instant::now(),
            unix_ms: 0,
        };
        let hours = Duration::from_secs(36_000);
        let settings = Settings {
            rows: None,
            meter: std::sync::Arc::default(),
            producer_name: "unit".to_owned(),
            routing: String::new(),
            doubts: crate::pulsar::Doubts::default(),
            lanes: LANES,
            hashing: HashingScheme::default(),
            partition_refresh: PAUSE,
            producer_idle: hours,
            compression: Codec::None,
            diversion: Some(Diversion {
                grace: hours,
                age: hours,
                unclear: hours,
                park: true,
                quiet: true,
            }),
            batch_max_messages: 1,
            batch_max_bytes: 128 * 1024,
            batch_linger: Duration::ZERO,
            max_in_flight_messages: 100_000,
            max_in_flight_bytes: 1024 * 1024,
            send_timeout: hours,
            reconnect: (Duration::from_millis(100), Duration::from_secs(1)),
        };
        Self {
            producer: Producer::new(settings, now),
            broker,
            now,
            lsn: 0x1000,
            sent: 0,
        }
    }

    /// A process that begins anew with the transaction at this position, on the same broker.
    fn restart(mut self, lsn: u64, sent: u64) -> Self {
        self.broker.open.clear();
        self.broker.closing.clear();
        Self {
            lsn,
            sent,
            ..Self::new(self.broker)
        }
    }

    /// One event for each key, all in one transaction, `rounds` times.
    fn transaction(&mut self, rounds: u64) {
        for _ in 0..rounds {
            for key in 0..KEYS {
                self.event(key);
            }
        }
        self.commit();
    }

    fn event(&mut self, key: u64) {
        let number = (self.sent / KEYS).to_string();
        self.sent += 1;
        let text = format!("key-{key}");
        let event = Outgoing {
            key: &text,
            payload: Some(number.as_bytes()),
            event_time_ms: 0,
            deliver_at_ms: None,
            txn: AckTracker::new(Lsn::ZERO).begin(),
            commit_lsn: Lsn::new(self.lsn),
            row: RowTag::new(0, self.sent),
            mark: None,
        };
        let none = std::iter::empty::<(&str, &str)>();
        let taken = self.producer.publish(TOPIC, key, &event, &none);
        taken.expect("an event that fits");
    }

    fn commit(&mut self) {
        self.producer.end_transaction();
        self.producer.flush(Flush::All, self.now);
        self.lsn += 0x100;
    }

    /// Time passes, with everything that happens meanwhile.
    fn pass(&mut self, time: Duration) {
        let end = self.now.at + time;
        self.serve();
        while let Some(at) = self.producer.next_wake().filter(|&at| at <= end) {
            self.now.at = at.max(self.now.at);
            self.producer.wake(self.now).expect("nothing is refused");
            self.serve();
        }
        self.now.at = end;
        self.producer.tick(self.now);
        self.serve();
    }

    fn tell(&mut self, signal: Signal) {
        let told = self.producer.on(signal, self.now);
        told.expect("nothing is refused");
    }

    /// Does what is to be done, until nothing is.
    fn serve(&mut self) {
        for _ in 0..10_000 {
            let effects: Vec<Effect> = self.producer.take_effects().collect();
            for effect in effects {
                self.carry_out(effect);
            }
            let signals = self.broker.read();
            if signals.is_empty() && !self.producer.has_effects() {
                return;
            }
            for signal in signals {
                self.tell(signal);
            }
        }
        panic!("it does not come to rest");
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Send {
                producer_id, frame, ..
            } => {
                if let Some(open) = self.broker.open.get_mut(&producer_id) {
                    open.unread.push_back(frame);
                }
            }
            Effect::Count { route, asked, .. } => self.tell(Signal::Counted {
                route,
                asked,
                answer: Ok(0),
            }),
            Effect::Find { topic, attempt, .. } => {
                let link = Link {
                    connection: self.broker.connection,
                    max_message_bytes: 1024 * 1024,
                };
                self.tell(Signal::Found {
                    topic,
                    attempt,
                    answer: Ok(link),
                });
            }
            Effect::Create {
                connection,
                producer_id,
                producer_name,
                ..
            } => {
                let answer = self.broker.create(connection, producer_id, &producer_name);
                self.tell(Signal::Created {
                    connection,
                    producer_id,
                    answer,
                });
            }
            Effect::Close { producer_id, .. } => self.broker.closing.push_back(producer_id),
            Effect::Release { .. } => {}
            Effect::Ping { connection } => self.tell(Signal::Alive { connection }),
            Effect::Disconnect { connection, .. } => {
                let signal = self.broker.lose(connection);
                self.tell(signal);
            }
        }
    }

    /// Names of the producers that are open.
    fn open(&self) -> Vec<&str> {
        let open = self.broker.open.values();
        let mut names: Vec<&str> = open.map(|open| open.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    /// Every event is stored, and each key's in order; a repeat is followed by all behind it. Returns how many were stored twice.
    fn assert_in_order(&self) -> u64 {
        assert_eq!(self.producer.in_flight().0, 0, "receipts are missing");
        let mut last: HashMap<&str, u64> = HashMap::new();
        let mut repeats = 0;
        for (key, number) in &self.broker.stored {
            let next = last.get(key.as_str()).map_or(0, |last| last + 1);
            assert!(*number <= next, "{key}: {number} came before {next}");
            repeats += u64::from(*number < next);
            last.insert(key, *number);
        }
        for (key, last) in last {
            assert_eq!(last + 1, self.sent / KEYS, "of {key}");
        }
        repeats
    }
}

fn is_usual(name: &str) -> bool {
    !name.contains('~')
}

#[test]
fn a_limit_that_is_raised_is_noticed_and_all_lanes_are_used_again() {
    // GIVEN a topic that allows three producers
    let mut pair = Pair::new(Broker::new(3));
    pair.transaction(2);
    pair.pass(Duration::from_secs(10));
    assert_eq!(pair.open().len(), 3);
    assert!(!pair.open().into_iter().any(is_usual), "{:?}", pair.open());

    // WHEN it allows as many as there are lanes, and events come
    pair.broker.limit = 100;
    pair.pass(PAUSE);
    assert_eq!(pair.open().len(), 3, "nothing is to be sent");
    for _ in 0..3 {
        pair.transaction(1);
        pair.pass(Duration::from_secs(1));
    }

    // THEN all lanes are used, under their usual names, and nothing came twice
    assert_eq!(pair.open().len(), LANES as usize);
    assert!(pair.open().into_iter().all(is_usual), "{:?}", pair.open());
    assert_eq!(pair.assert_in_order(), 0);
}

#[test]
fn one_producer_more_is_asked_for_now_and_then_and_less_often_when_it_is_in_vain() {
    let mut pair = Pair::new(Broker::new(3));
    let mut asked = Vec::new();
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    let mut attempts = |pair: &mut Pair, minutes: u32| {
        let mut count = 0;
        for _ in 0..minutes {
            let before = pair.producer.next_id;
            pair.transaction(1);
            pair.pass(PAUSE);
            count += pair.producer.next_id - before;
        }
        asked.push(count);
    };
    attempts(&mut pair, 4);
    attempts(&mut pair, 20);
    attempts(&mut pair, 20);
    let &[first, then, at_last] = asked.as_slice() else {
        panic!("{asked:?}");
    };
    assert!((1..=3).contains(&first), "{asked:?}");
    assert!((1..=4).contains(&then), "{asked:?}");
    assert!((1..=2).contains(&at_last), "{asked:?}");
    assert_eq!(pair.assert_in_order(), 0);
}

#[test]
fn a_limit_that_is_raised_a_little_is_used() {
    let mut pair = Pair::new(Broker::new(3));
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    pair.broker.limit = 5;
    for _ in 0..4 {
        pair.pass(PAUSE);
        pair.transaction(1);
    }
    pair.pass(PAUSE);
    pair.transaction(1);
    pair.pass(PAUSE / 2);
    assert_eq!(pair.open().len(), 5);
    assert_eq!(pair.assert_in_order(), 0);
}

#[test]
fn all_lanes_are_used_again_from_the_beginning_of_a_transaction_on() {
    // GIVEN few lanes, and one producer more that was allowed in the middle of a transaction
    let mut pair = Pair::new(Broker::new(3));
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    pair.broker.limit = 100;
    pair.pass(PAUSE);
    for key in 0..KEYS {
        pair.event(key);
    }
    pair.pass(Duration::from_secs(1));
    let begun_at = pair.lsn;

    // WHEN the transaction goes on, and another comes
    for key in 0..KEYS {
        pair.event(key);
    }
    pair.commit();
    pair.pass(Duration::from_secs(1));
    assert!(pair.producer.topics[0].few.is_in_use());
    let sent = pair.sent;
    pair.transaction(2);
    pair.pass(Duration::from_secs(1));
    assert!(pair.open().into_iter().all(is_usual), "{:?}", pair.open());
    assert_eq!(pair.assert_in_order(), 0);

    // THEN a process that begins anew in between, with what was not confirmed, loses nothing
    let behind = pair.lsn;
    let (stored, end) = (pair.broker.stored.len(), pair.sent);
    let mut pair = pair.restart(begun_at, sent - 2 * KEYS);
    pair.transaction(2);
    pair.transaction(2);
    assert_eq!((pair.lsn, pair.sent), (behind, end));
    pair.transaction(2);
    pair.pass(Duration::from_secs(1));
    pair.assert_in_order();
    // And only the new ones are stored: what the few had sent is below what the usual lanes had sent after it.
    assert_eq!((pair.broker.stored.len() - stored) as u64, 2 * KEYS);
}

#[test]
fn what_was_written_on_a_lost_connection_gets_its_receipts_before_another_lane_has_its_key() {
    // GIVEN all lanes open, and frames on a connection that the broker does not read
    let mut pair = Pair::new(Broker::new(8));
    pair.broker.deduplicates = false;
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.open().len(), LANES as usize);
    pair.broker.frozen.insert(1);
    pair.transaction(1);
    pair.serve();

    // WHEN the connection is lost, there may be fewer producers, and more events come
    let lost = pair.broker.lose(1);
    assert_eq!(pair.broker.ghosts.len(), LANES as usize);
    pair.broker.limit = 3;
    pair.tell(lost);
    pair.transaction(1);
    pair.pass(Duration::from_secs(30));
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.open().len(), 3);
    assert!(!pair.open().into_iter().any(is_usual), "{:?}", pair.open());

    // AND the broker reads at last what it had been sent on that connection, and more events come
    for ghost in std::mem::take(&mut pair.broker.ghosts) {
        for frame in &ghost.unread {
            pair.broker.store(&ghost.name, frame);
        }
    }
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));

    // THEN nothing of it comes behind what was sent by other lanes
    assert_eq!(pair.assert_in_order(), 0);
}

#[test]
fn what_comes_again_by_the_few_comes_again_by_all_lanes_too() {
    // GIVEN a process that has sent four transactions, and was killed before they were confirmed
    let mut pair = Pair::new(Broker::new(100));
    let (lsn, sent) = (pair.lsn, pair.sent);
    for _ in 0..4 {
        pair.transaction(1);
        pair.pass(Duration::from_secs(1));
    }

    // WHEN the next one sends the first two again by fewer lanes, and the others by all
    pair.broker.limit = 3;
    let mut pair = pair.restart(lsn, sent);
    pair.transaction(1);
    pair.pass(Duration::from_secs(10));
    pair.broker.limit = 100;
    pair.pass(PAUSE);
    for _ in 0..4 {
        pair.transaction(1);
        pair.pass(Duration::from_secs(1));
    }

    // THEN no key ends with what is older
    assert!(!pair.producer.topics[0].few.is_in_use());
    assert_eq!(pair.assert_in_order(), KEYS);
}

#[test]
fn lanes_that_were_not_used_before_have_their_usual_names() {
    let mut pair = Pair::new(Broker::new(1));
    for _ in 0..4 {
        pair.event(0);
        pair.event(5);
        pair.commit();
        pair.pass(PAUSE);
        pair.broker.limit = 100;
    }
    let names: Vec<&String> = pair.broker.names.iter().collect();
    assert!(
        names.iter().any(|name| name.starts_with("unit-1.")),
        "{names:?}"
    );
    assert_eq!(pair.open().len(), 3);
    assert!(pair.open().into_iter().all(is_usual), "{names:?}");
}

#[test]
fn no_producer_is_asked_for_while_others_are_closed_for_it() {
    let mut pair = Pair::new(Broker::new(3));
    pair.broker.holds_closes = true;
    pair.transaction(1);
    pair.pass(Duration::from_secs(1));
    assert_eq!(pair.broker.closing.len(), 3);
    let asked = pair.producer.next_id;
    pair.pass(Duration::from_secs(20));
    assert_eq!(pair.producer.next_id, asked);

    pair.broker.holds_closes = false;
    pair.pass(Duration::from_secs(20));
    assert_eq!(pair.open().len(), 3);
    assert_eq!(pair.assert_in_order(), 0);
}
