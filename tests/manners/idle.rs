//! What has nothing to do goes away, at the broker too, and comes back.

use std::time::Duration;

use walpost::pulsar::PublisherConfig;

use super::sender::{Log, Sender, config};
use super::support::{Asked, FakeBroker, Reaction, Target};

const TOPICS: usize = 60;
const ROUNDS: usize = 3;
const KEYS: [&str; 4] = ["a", "b", "c", "d"];

fn topic(number: usize) -> String {
    format!("persistent://public/default/idle-{number}")
}

/// A publisher whose producers are idle soon.
fn short_of_patience(broker: &FakeBroker) -> Sender {
    Sender::with(PublisherConfig {
        producer_idle: Duration::from_millis(100),
        ..config(vec![broker.host()])
    })
}

#[tokio::test]
async fn producers_and_connections_of_many_topics_go_away_and_come_back() {
    // GIVEN many topics at two brokers that deduplicate
    let log = Log::capture();
    let broker = FakeBroker::start_deduplicating().await;
    let other = broker.beside().await;
    let there = Target {
        url: other.url(),
        redirect: false,
        authoritative: true,
        through_service_url: false,
    };
    broker.script_rest(move |_, command| match &command.lookup_topic {
        Some(lookup) if lookup.topic.contains('7') => Reaction::LookAt(there.clone()),
        _ => Reaction::Obey,
    });
    let mut sender = short_of_patience(&broker);
    let mut made = 0;
    for _ in 0..ROUNDS {
        // WHEN events come for all of them
        for _ in 0..2 {
            for number in 0..TOPICS {
                for key in KEYS {
                    sender.publish(&topic(number), key);
                }
            }
        }
        sender.delivered().await;
        let count = broker.count(Asked::Producer) + other.count(Asked::Producer);
        assert!(count >= made + TOPICS, "each has been asked for anew");
        made = count;

        // AND then no more THEN neither a producer nor a connection is left
        sender
            .until("nothing to be left", || broker.open() == (0, 0))
            .await;
    }
    assert!(broker.connections() >= ROUNDS as u64 && other.connections() >= ROUNDS as u64);

    // AND nothing was lost, doubled or out of order, and nothing was wrong
    sender.assert_exactly_once(&broker.stored());
    let text = log.text();
    assert!(!text.contains("WARN") && !text.contains("ERROR"), "{text}");
}
