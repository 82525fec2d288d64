//! A broker that misbehaves at random, and a connector that is killed at random: the guarantees hold.
//!
//! Each run has a seed of its own, new each time, that stands in the output. To replay one:
//! `WALPOST_RANDOM_SEED=… WALPOST_RANDOM_KINDS=…` as printed. `WALPOST_RANDOM_KINDS` alone (names of [`Kind`]s, with commas, or
//! `all`) takes other kinds of trouble than those that are switched on here. A replay takes the same decisions, one after the
//! other; as the sockets have their own time, they may meet other commands, and so the run is repeated.

use std::collections::HashSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pulsar::message::proto::ServerError;
use walpost::pulsar::{Diversion, PublisherConfig};

use super::TOPIC;
use super::sender::{Sender, config};
use super::support::{Asked, FakeBroker, PublishRate, Random, Reaction, Settings};

/// Runs of one test.
const RUNS: u64 = 25;
/// Events of one run, a few at a time, so that faults strike between them.
const EVENTS: usize = 400;
const TOPICS: usize = 2;
const KEYS: usize = 5;
/// Of this many commands one is not simply obeyed.
const TROUBLE_ONE_OF: usize = 12;
/// A limit of a topic, one event in so many that is above it, and one in so many that is to be delivered in many years.
const LIMIT_BYTES: usize = 2000;
const LARGE_ONE_OF: usize = 30;
const FAR_ONE_OF: usize = 30;
const FAR_MS: i64 = 4_000_000_000_000;
const MAX_DELAY_MS: i64 = 1000;
/// As slow as a topic becomes.
const SLOW: PublishRate = PublishRate {
    messages: 20,
    period: Duration::from_millis(50),
};

/// A kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Answers that are late, lost or cut, connections that end, passing refusals, writes that pend or fail.
    Answers,
    /// The process is killed and starts again.
    Kills,
    /// A send is refused, and those behind it are stored.
    Refused,
    /// The receipt of a send is late or lost, and those behind it get theirs.
    Skipped,
    /// A topic limits the size of its messages for a while, and some messages are larger.
    Size,
    /// A topic limits the delivery delay for a while, and some messages are beyond it.
    Delay,
    /// A topic is fenced for a while with its producers attached.
    Fence,
    /// Topics are unloaded with writes under way.
    Unload,
    /// Authorization and the loading of topics take their time.
    Stalls,
    /// A topic allows fewer producers than there are lanes for a while.
    Producers,
    /// Another client has the topic for itself for a while.
    Exclusive,
    /// A topic requires encryption for a while.
    Encryption,
    /// A topic is throttled for a while.
    Rate,
    /// All writes of a topic fail for a while.
    Writes,
    /// A topic is deleted, and comes back when it is asked for.
    Deleted,
    /// A topic is deleted and made anew with more, fewer or no partitions.
    Shape,
    /// A topic is terminated for a while.
    Terminated,
    /// The brokers' limit falls and rises while frames wait.
    Limits,
    /// A topic is told to have migrated for a while.
    Migrated,
}

/// Which kinds are switched on, and which keep the order of first arrivals and, with deduplication, store each event once: for
/// those the verdict is strict. For all together it is that nothing is lost.
#[rustfmt::skip]
const SWITCHES: [(Kind, bool, bool); 19] = [
    // kind             on     strict
    (Kind::Answers,     true,  true),
    (Kind::Kills,       true,  true),
    (Kind::Refused,     true,  false),
    (Kind::Skipped,     true,  false),
    (Kind::Size,        true,  false),
    (Kind::Delay,       true,  false),
    (Kind::Fence,       true,  false),
    (Kind::Unload,      true,  true),
    (Kind::Stalls,      true,  true),
    (Kind::Producers,   true,  true),
    (Kind::Exclusive,   true,  true),
    (Kind::Encryption,  true,  true),
    (Kind::Rate,        true,  true),
    (Kind::Writes,      true,  true),
    (Kind::Deleted,     true,  false),
    (Kind::Shape,       true,  false),
    (Kind::Terminated,  true,  true),
    (Kind::Limits,      true,  true),
    // The other cluster has no metadata of its topics' partitions; a real one would.
    (Kind::Migrated,    false, false),
];

/// Kinds that leave a batch without a place in front of others that are stored. Where the broker deduplicates, a kill before the
/// batch is resent loses it: the known hole (most of it is closed by the mark that is stored, which a `Sender` has not), for which such kinds and kills come together only when they are named.
const OPEN_THE_HOLE: [Kind; 5] = [
    Kind::Refused,
    Kind::Skipped,
    Kind::Size,
    Kind::Delay,
    Kind::Fence,
];

/// Kinds after which what was not confirmed when the process was killed is stored twice, also where the broker deduplicates.
const REPEAT_AFTER_KILLS: [Kind; 1] = [Kind::Producers];

/// The kinds of a run.
#[derive(Clone)]
struct Kinds(Vec<Kind>);

impl Kinds {
    /// Those that are switched on or named by the environment; only the strict ones of them for a strict verdict.
    fn chosen(verdict: Verdict, deduplicates: bool) -> Self {
        let asked = std::env::var("WALPOST_RANDOM_KINDS").ok();
        let is_on = |kind: Kind, on: bool| match asked.as_deref() {
            None => on,
            Some("all") => true,
            Some(names) => names.split(',').any(|name| name == format!("{kind:?}")),
        };
        let chosen = SWITCHES.iter().filter(|&&(kind, on, strict)| {
            is_on(kind, on) && (strict || verdict == Verdict::NothingLost)
        });
        let mut kinds = Self(chosen.map(|&(kind, _, _)| kind).collect());
        let are_named = asked.is_some_and(|names| names != "all");
        let have_hole = OPEN_THE_HOLE.iter().any(|&kind| kinds.have(kind));
        if deduplicates && have_hole && !are_named {
            kinds.0.retain(|&kind| kind != Kind::Kills);
        }
        if deduplicates && verdict == Verdict::Strict && !are_named {
            kinds.0.retain(|kind| !REPEAT_AFTER_KILLS.contains(kind));
        }
        kinds
    }

    fn have(&self, kind: Kind) -> bool {
        self.0.contains(&kind)
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.0.iter().map(|kind| format!("{kind:?}")).collect();
        names.join(",")
    }
}

/// What is asked of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    NothingLost,
    /// That, and the order of a key's first arrivals; each event once where the broker deduplicates.
    Strict,
}

/// The seeds of a test: new ones, or again and again the one that is to be replayed.
fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("WALPOST_RANDOM_SEED") {
        let seed = seed.parse().expect("WALPOST_RANDOM_SEED is a number");
        return vec![seed; usize::try_from(RUNS).expect("a few")];
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| now.as_millis());
    let first = u64::try_from(now_ms).expect("a time of these centuries") * 1000;
    (first..first + RUNS).collect()
}

const PASSING: [ServerError; 5] = [
    ServerError::ServiceNotReady,
    ServerError::ProducerBusy,
    ServerError::MetadataError,
    ServerError::TooManyRequests,
    ServerError::ProducerBlockedQuotaExceededError,
];

const OF_SENDS: [ServerError; 4] = [
    ServerError::PersistenceError,
    ServerError::ChecksumError,
    ServerError::ServiceNotReady,
    ServerError::UnknownError,
];

/// What a broker may do to a command without breaking its own promises.
fn misbehave(random: &mut Random, kinds: &Kinds, asked: Asked) -> Reaction {
    if random.below(TROUBLE_ONE_OF) > 0 {
        return Reaction::Obey;
    }
    let fail = Reaction::Fail(PASSING[random.below(PASSING.len())]);
    let refuse = Reaction::Fail(OF_SENDS[random.below(OF_SENDS.len())]);
    let close = [Reaction::Close, Reaction::ObeyAndClose, Reaction::CutShort];
    let mut choice: Vec<Reaction> = match asked {
        Asked::Send => vec![Reaction::FailWrite, Reaction::Pend],
        Asked::Partitions | Asked::Lookup => vec![fail],
        Asked::Producer => vec![fail, Reaction::NotReady, Reaction::Hold],
        Asked::Connect => vec![Reaction::Challenge, fail],
        _ => return Reaction::Obey,
    };
    if kinds.have(Kind::Answers) {
        choice.extend(close);
    } else {
        choice.clear();
    }
    let mut of = |kind: Kind, at: Asked, reaction: Reaction| {
        if kinds.have(kind) && asked == at {
            choice.push(reaction);
        }
    };
    of(Kind::Refused, Asked::Send, refuse);
    of(Kind::Skipped, Asked::Send, Reaction::Hold);
    of(Kind::Skipped, Asked::Send, Reaction::Lose);
    of(Kind::Stalls, Asked::Producer, Reaction::StallAuthorization);
    of(Kind::Stalls, Asked::Producer, Reaction::StallLoading);
    if choice.is_empty() {
        return Reaction::Obey;
    }
    choice.swap_remove(random.below(choice.len()))
}

/// One run.
struct Run<'a> {
    broker: &'a FakeBroker,
    /// Another cluster, to which topics migrate.
    other: &'a FakeBroker,
    kinds: Kinds,
    random: Random,
    sender: Sender,
    /// Events that may be refused.
    refusable: HashSet<String>,
    /// The topic of each event.
    topics: Vec<String>,
}

impl<'a> Run<'a> {
    fn new(broker: &'a FakeBroker, other: &'a FakeBroker, seed: u64, kinds: Kinds) -> Self {
        println!(
            "WALPOST_RANDOM_SEED={seed} WALPOST_RANDOM_KINDS={}",
            kinds.names()
        );
        let (mut of_broker, of_closure) = (Random::new(seed.wrapping_add(1)), kinds.clone());
        broker.script_rest(move |asked, _| misbehave(&mut of_broker, &of_closure, asked));
        // Topics in trouble are waited for.
        let patience = Duration::from_secs(600);
        let diversion = Diversion {
            grace: patience,
            age: patience,
            unclear: Duration::from_secs(60),
            park: false,
            quiet: true,
        };
        let mut sender = Sender::with(PublisherConfig {
            diversion: Some(diversion),
            // In some runs lanes and topics are forgotten between two events.
            producer_idle: Duration::from_millis([1, 10, 60_000][(seed % 3) as usize]),
            // And so often one more producer is tried where there are fewer than lanes.
            partition_refresh: Duration::from_millis(20),
            ..config(vec![broker.host()])
        });
        sender.elsewhere = Some(Vec::new());
        Self {
            broker,
            other,
            kinds,
            random: Random::new(seed),
            sender,
            refusable: HashSet::new(),
            topics: Vec::new(),
        }
    }

    fn some_topic(&mut self) -> String {
        format!("{TOPIC}-{}", self.random.below(TOPICS))
    }

    fn publish(&mut self) {
        let large = self.kinds.have(Kind::Size) && self.random.below(LARGE_ONE_OF) == 0;
        let far = self.kinds.have(Kind::Delay) && self.random.below(FAR_ONE_OF) == 0;
        self.publish_one(large, far);
    }

    fn publish_one(&mut self, large: bool, far: bool) {
        let topic = self.some_topic();
        let key = format!("key-{}", self.random.below(KEYS));
        let bytes = if large {
            LIMIT_BYTES * 2
        } else {
            20 + self.random.below(300)
        };
        let payload = vec![b'x'; bytes];
        let taken = self
            .sender
            .try_publish_at(&topic, &key, &payload, far.then_some(FAR_MS));
        taken.expect("an event that fits");
        if large || far {
            self.refusable.insert(format!("row-{}", self.topics.len()));
        }
        self.topics.push(topic);
    }

    /// Something happens that no command asked for.
    fn strike(&mut self) {
        let kinds = self.kinds.0.clone();
        match kinds[self.random.below(kinds.len())] {
            Kind::Answers => self.strike_connections(),
            Kind::Kills => {
                // Half the time the broker learns late that the connection has ended.
                self.broker.stall(self.random.below(2) == 0);
                let batch = u32::try_from(1 + self.random.below(20)).expect("small");
                self.sender.restart(batch);
            }
            Kind::Stalls => self.broker.resume(),
            Kind::Refused | Kind::Skipped => {}
            Kind::Unload => {
                let (topic, written) = (self.some_topic(), self.random.below(2) == 0);
                self.broker.unload(&topic, None, written);
            }
            Kind::Deleted => {
                let topic = self.some_topic();
                self.broker.delete(&topic);
            }
            Kind::Shape => self.reshape(),
            Kind::Limits => {
                let limit = [1500, 5 * 1024 * 1024][self.random.below(2)];
                self.broker.limit(limit);
                self.broker.disconnect();
            }
            of_topic => {
                let (topic, on) = (self.some_topic(), self.random.below(3) == 0);
                let url = self.other.url();
                self.broker.set(&topic, |settings| {
                    set(settings, of_topic, on, url);
                });
            }
        }
    }

    fn strike_connections(&mut self) {
        match self.random.below(13) {
            0 => self.broker.disconnect(),
            1 => self.broker.close_producers(None),
            2 => self.broker.ping(),
            3 => self.broker.challenge(),
            4 => self.broker.settle(self.random.below(2) == 0),
            5 => self.broker.say(&[0, 0, 0, 2]),
            6..=8 => self.broker.release(|_| {}),
            _ => {}
        }
    }

    /// Deletes a topic and makes it anew.
    fn reshape(&mut self) {
        let topic = self.some_topic();
        self.broker.delete(&topic);
        self.broker.begin_deletion(&topic);
        self.broker.end_deletion(&topic);
        match u32::try_from(self.random.below(4)).expect("small") {
            0 => self.broker.create(&topic),
            partitions => self.broker.create_partitioned(&topic, partitions),
        }
    }

    /// Publishes everything under all that trouble, and waits until it is somewhere when the trouble is over.
    async fn run(&mut self) {
        while self.topics.len() < EVENTS {
            for _ in 0..=self.random.below(25) {
                self.publish();
            }
            // The broker gets a few commands, or a moment without any.
            let broker = self.broker;
            let commands = broker.count(Asked::Send) + self.random.below(4);
            let mut looks = 20;
            let moved = || {
                looks -= 1;
                looks == 0 || broker.count(Asked::Send) >= commands
            };
            self.sender.until("the broker to be asked", moved).await;
            broker.stall(false);
            self.strike();
        }
        self.broker.heal();
        self.broker.stall(false);
        self.broker.limit(5 * 1024 * 1024);
        for topic in 0..TOPICS {
            let topic = format!("{TOPIC}-{topic}");
            self.broker
                .set(&topic, |settings| *settings = Settings::default());
        }
        self.broker.resume();
        self.broker.settle(self.random.below(2) == 0);
        self.broker.release(|_| {});
        self.sender.delivered().await;
        // What comes when all is well again lies where a consumer finds it.
        let before = self.topics.len();
        for _ in 0..TOPICS * KEYS {
            self.publish_one(false, false);
        }
        self.sender.delivered().await;
        for (number, topic) in self.topics.iter().enumerate().skip(before) {
            let id = format!("row-{number}");
            let found = [self.broker.readable(topic), self.other.readable(topic)].concat();
            assert!(found.iter().any(|event| event.id == id), "{id} is nowhere");
        }
    }

    /// Nothing is lost, and nothing was set aside for no reason: only what may be refused, and what comes behind that.
    fn assert_complete(&self) {
        let stored = [self.broker.stored(), self.other.stored()].concat();
        let missing = self.sender.missing(None, &stored);
        assert!(missing.is_empty(), "lost: {missing:?}");
        // (A topic may be made anew by a request for a producer that is on its way as the topic goes. Nothing is sent there: see the end of `run`.)
        let mut refused: HashSet<&str> = HashSet::new();
        for id in self.sender.elsewhere.iter().flatten() {
            let number: usize = id.trim_start_matches("row-").parse().expect("a row");
            let topic = self.topics[number].as_str();
            if self.refusable.contains(id) {
                refused.insert(topic);
            }
            assert!(refused.contains(topic), "{id} could have been published");
        }
    }
}

/// Switches one kind of trouble of a topic on or off.
fn set(topic: &mut Settings, kind: Kind, on: bool, url: String) {
    match kind {
        Kind::Size => topic.max_message_bytes = on.then_some(LIMIT_BYTES),
        Kind::Delay => topic.max_delivery_delay_ms = on.then_some(MAX_DELAY_MS),
        Kind::Fence => topic.fenced = on,
        Kind::Producers => topic.max_producers = on.then_some(1),
        Kind::Exclusive => topic.exclusive = on.then(|| "theirs".to_owned()),
        Kind::Encryption => topic.encryption_required = on,
        Kind::Rate => topic.publish_rate = on.then_some(SLOW),
        Kind::Writes => topic.writes_fail = on,
        Kind::Terminated => topic.terminated = on,
        Kind::Migrated => topic.migrated_to = on.then_some(url),
        other => panic!("{other:?} is not set on a topic"),
    }
}

/// Runs of new seeds; returns how many connections were made, and how many arrivals were repeats.
async fn runs(deduplicates: bool, verdict: Verdict) -> (u64, usize) {
    let (mut connections, mut repeats) = (0, 0);
    let kinds = Kinds::chosen(verdict, deduplicates);
    if kinds.0.is_empty() {
        // The environment names none that this test can judge.
        return (0, 0);
    }
    for seed in seeds() {
        let start = async || {
            if deduplicates {
                FakeBroker::start_deduplicating().await
            } else {
                FakeBroker::start().await
            }
        };
        let (broker, other) = (start().await, start().await);
        let mut run = Run::new(&broker, &other, seed, kinds.clone());
        run.run().await;
        run.assert_complete();
        connections += broker.connections();
        let stored = broker.stored();
        match verdict {
            Verdict::NothingLost => {}
            Verdict::Strict if deduplicates => run.sender.assert_exactly_once(&stored),
            Verdict::Strict => repeats += run.sender.assert_at_least_once(&stored),
        }
    }
    (connections, repeats)
}

/// True when nothing was asked for by the environment.
fn is_usual() -> bool {
    let asked = ["WALPOST_RANDOM_SEED", "WALPOST_RANDOM_KINDS"];
    asked.iter().all(|name| std::env::var_os(name).is_none())
}

#[tokio::test]
async fn a_broker_that_misbehaves_at_random_stores_every_event_once_and_in_order_when_it_deduplicates()
 {
    let (connections, _) = runs(true, Verdict::Strict).await;
    let enough = connections > 4 * RUNS || !is_usual();
    assert!(enough, "too well behaved: {connections}");
}

#[tokio::test]
async fn a_broker_that_misbehaves_at_random_stores_every_event_first_in_order_when_it_does_not_deduplicate()
 {
    let (_, repeats) = runs(false, Verdict::Strict).await;
    let enough = repeats > 100 || !is_usual();
    assert!(enough, "too well behaved: {repeats}");
}

#[tokio::test]
async fn topics_that_misbehave_at_random_lose_nothing_where_the_broker_deduplicates() {
    runs(true, Verdict::NothingLost).await;
}

#[tokio::test]
async fn topics_that_misbehave_at_random_lose_nothing_where_the_broker_does_not_deduplicate() {
    runs(false, Verdict::NothingLost).await;
}
