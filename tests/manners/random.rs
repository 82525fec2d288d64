//! A broker that misbehaves at random, and a connector that is killed at random: the guarantees hold.

use std::ops::Range;

use pulsar::message::proto::ServerError;

use super::TOPIC;
use super::sender::Sender;
use super::support::{Asked, FakeBroker, Random, Reaction};

/// One run each: a failure names its seed.
const SEEDS: Range<u64> = 0..25;
/// Events of one run, a few at a time, so that faults strike between them.
const EVENTS: usize = 400;
const TOPICS: usize = 2;
const KEYS: usize = 5;
/// Of this many commands one is not simply obeyed.
const TROUBLE_ONE_OF: usize = 12;

const PASSING: [ServerError; 5] = [
    ServerError::ServiceNotReady,
    ServerError::ProducerBusy,
    ServerError::MetadataError,
    ServerError::TooManyRequests,
    ServerError::ProducerBlockedQuotaExceededError,
];

/// What a broker may do to a command without breaking its own promises. Nothing that lets it store a frame after it refused
/// the one before: no pipelined client can keep the order then.
fn misbehave(random: &mut Random, asked: Asked) -> Reaction {
    if random.below(TROUBLE_ONE_OF) > 0 {
        return Reaction::Obey;
    }
    let fail = Reaction::Fail(PASSING[random.below(PASSING.len())]);
    let close = [Reaction::Close, Reaction::ObeyAndClose, Reaction::CutShort];
    let mut choice: Vec<Reaction> = match asked {
        Asked::Send => vec![
            Reaction::FailWrite,
            Reaction::Hold,
            Reaction::Hold,
            Reaction::Lose,
            Reaction::Pend,
        ],
        Asked::Partitions | Asked::Lookup => vec![fail],
        Asked::Producer => vec![fail, Reaction::NotReady, Reaction::Hold],
        Asked::Connect => vec![Reaction::Challenge, fail],
        _ => return Reaction::Obey,
    };
    choice.extend(close);
    choice.swap_remove(random.below(choice.len()))
}

/// One run; returns what the broker stored is judged by.
async fn run(broker: &FakeBroker, seed: u64) -> Sender {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut of_broker = Random::new(seed + 1_000_000);
    broker.script_rest(move |asked, _| misbehave(&mut of_broker, asked));
    let mut sender = Sender::new(vec![broker.host()]);

    let mut published = 0;
    while published < EVENTS {
        for _ in 0..=random.below(25) {
            let topic = format!("{TOPIC}-{}", random.below(TOPICS));
            sender.publish(&topic, &format!("key-{}", random.below(KEYS)));
            published += 1;
        }
        // The broker gets a few commands, or a moment without any.
        let commands = broker.count(Asked::Send) + random.below(4);
        let mut looks = 20;
        let moved = || {
            looks -= 1;
            looks == 0 || broker.count(Asked::Send) >= commands
        };
        sender.until("the broker to be asked", moved).await;
        match random.below(14) {
            0 => broker.disconnect(),
            1 => broker.close_producers(None),
            2 => broker.ping(),
            3 => broker.challenge(),
            4 => broker.settle(random.below(2) == 0),
            5 => broker.say(&[0, 0, 0, 2]),
            6 => sender.restart(u32::try_from(1 + random.below(20)).expect("small")),
            7..=9 => broker.release(|_| {}),
            _ => {}
        }
    }
    broker.heal();
    broker.settle(random.below(2) == 0);
    broker.release(|_| {});
    sender.delivered().await;
    sender
}

#[tokio::test]
async fn a_broker_that_misbehaves_at_random_stores_every_event_once_and_in_order_when_it_deduplicates()
 {
    let mut reconnects = 0;
    for seed in SEEDS {
        let broker = FakeBroker::start_deduplicating().await;
        let sender = run(&broker, seed).await;
        sender.assert_exactly_once(&broker.stored());
        reconnects += broker.connections();
    }
    assert!(reconnects > 100, "too well behaved: {reconnects}");
}

#[tokio::test]
async fn a_broker_that_misbehaves_at_random_stores_every_event_first_in_order_when_it_does_not_deduplicate()
 {
    let mut repeats = 0;
    for seed in SEEDS {
        let broker = FakeBroker::start().await;
        let sender = run(&broker, seed).await;
        repeats += sender.assert_at_least_once(&broker.stored());
    }
    assert!(repeats > 100, "too well behaved: {repeats}");
}
