//! What is forgotten, what comes back, and what a tick costs, against a broker that deduplicates.

use super::*;
use crate::ack::AckTracker;
use crate::pulsar::RowTag;
use crate::pulsar::wire;

const IDLE: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);
const LANES: u32 = 4;
/// Bytes of log from one commit record to the next.
const DISTANCE: u64 = 64;
/// Rounds of effects and answers: far more than any test here needs.
const MAX_ROUNDS: usize = 1000;

/// A producer's topic and name.
type Name = (String, String);

/// A broker that answers at once, unless it is silent.
#[derive(Default)]
struct Broker {
    /// The highest id of each name.
    pushed: HashMap<Name, u64>,
    producers: HashMap<u64, Name>,
    /// What was stored, in order.
    stored: Vec<(String, String, u64)>,
    partitions: HashMap<String, u32>,
    released: Vec<u64>,
    is_silent: bool,
    connection: u64,
}

impl Broker {
    fn answer(&mut self, effect: Effect) -> Vec<Signal> {
        match effect {
            Effect::Count {
                route,
                topic,
                asked,
                ..
            } => {
                let answer = Ok(self.partitions.get(&topic).copied().unwrap_or(0));
                vec![Signal::Counted {
                    route,
                    asked,
                    answer,
                }]
            }
            Effect::Find { .. } if self.is_silent => Vec::new(),
            Effect::Find { topic, attempt, .. } => vec![Signal::Found {
                topic,
                attempt,
                answer: Ok(Link {
                    connection: self.connection,
                    max_message_bytes: 1 << 20,
                }),
            }],
            Effect::Create {
                connection,
                topic,
                producer_id,
                producer_name,
            } => {
                let name = (topic, producer_name);
                let last_sequence_id = self.pushed.get(&name).copied();
                self.producers.insert(producer_id, name);
                let answer = Ok(Created {
                    last_sequence_id,
                    schema_version: None,
                });
                vec![Signal::Created {
                    connection,
                    producer_id,
                    answer,
                }]
            }
            Effect::Close { producer_id, .. } => {
                self.producers.remove(&producer_id);
                vec![Signal::Closed { producer_id }]
            }
            Effect::Send {
                connection,
                producer_id,
                frame,
            } => {
                let name = self.producers[&producer_id].clone();
                let payload = wire::payload_of(&frame).expect("a batch");
                let ids: Vec<u64> = wire::messages(payload)
                    .map(|(metadata, _)| metadata.sequence_id())
                    .collect();
                let stored_before = self.pushed.get(&name).is_some_and(|&last| ids[0] <= last);
                if !stored_before {
                    self.pushed.insert(name.clone(), ids[ids.len() - 1]);
                    for &id in &ids {
                        self.stored.push((name.0.clone(), name.1.clone(), id));
                    }
                }
                vec![Signal::Receipt {
                    connection,
                    producer_id,
                    sequence_id: ids[0],
                    stored_before,
                }]
            }
            Effect::Release { connection } => {
                self.released.push(connection);
                Vec::new()
            }
            Effect::Ping { connection } => vec![Signal::Alive { connection }],
            Effect::Disconnect { .. } => panic!("nothing is wrong: {effect:?}"),
        }
    }
}

/// A producer with its broker and its clock.
struct World {
    producer: Producer,
    broker: Broker,
    now: Now,
    commit: u64,
    published: usize,
}

impl World {
    fn new() -> Self {
        let pause = Duration::from_secs(3600);
        let settings = Settings {
            rows: None,
            meter: Arc::default(),
            producer_name: "unit".to_owned(),
            routing: String::new(),
            doubts: crate::pulsar::Doubts::default(),
            lanes: LANES,
            hashing: HashingScheme::default(),
            partition_refresh: pause,
            producer_idle: IDLE,
            compression: Codec::None,
            diversion: Some(Diversion {
                grace: pause,
                age: pause,
                unclear: pause,
                park: false,
                quiet: true,
            }),
            batch_max_messages: 10,
            batch_max_bytes: 128 * 1024,
            batch_linger: Duration::ZERO,
            max_in_flight_messages: 1_000_000,
            max_in_flight_bytes: 1 << 30,
            send_timeout: pause,
            reconnect: (SECOND, SECOND),
        };
        let now = Now {
            at: Instant::now(),
            unix_ms: 0,
        };
        let mut producer = Producer::new(settings, now);
        // Everything that is published comes later.
        producer.set_log_end(Lsn::new(1));
        Self {
            producer,
            broker: Broker::default(),
            now,
            commit: 0x1000,
            published: 0,
        }
    }

    /// A new transaction begins.
    fn begin(&mut self) {
        self.commit += DISTANCE;
    }

    /// One more event of the transaction.
    fn publish(&mut self, topic: &str, lane: u64) {
        let event = Outgoing {
            key: "key",
            payload: Some(b"payload"),
            event_time_ms: 0,
            deliver_at_ms: None,
            txn: AckTracker::new(Lsn::ZERO).begin(),
            commit_lsn: Lsn::new(self.commit),
            row: RowTag::new(0, self.published as u64),
            mark: None,
        };
        self.published += 1;
        self.producer.set_now(self.now);
        let taken = self
            .producer
            .publish(topic, lane, &event, &std::iter::empty());
        taken.expect("an event that fits");
    }

    /// Carries out what is to be done until nothing more is.
    fn serve(&mut self) {
        for _ in 0..MAX_ROUNDS {
            self.producer.flush(Flush::All, self.now);
            let effects: Vec<Effect> = self.producer.take_effects().collect();
            if effects.is_empty() {
                return;
            }
            for signal in effects
                .into_iter()
                .flat_map(|effect| self.broker.answer(effect))
                .collect::<Vec<_>>()
            {
                let result = self.producer.on(signal, self.now);
                result.unwrap_or_else(|error| panic!("{}", error.report()));
            }
        }
        panic!("the producer and its broker do not come to rest");
    }

    /// So many seconds pass, with a tick in each.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now.at += SECOND;
            self.producer.tick(self.now);
            self.serve();
            let woken = self.producer.wake(self.now);
            woken.unwrap_or_else(|error| panic!("{}", error.report()));
            self.serve();
        }
    }

    /// One event in a transaction of its own, stored.
    fn deliver(&mut self, topic: &str, lane: u64) {
        let before = self.producer.in_flight().0;
        self.begin();
        self.publish(topic, lane);
        self.serve();
        assert_eq!(self.producer.in_flight().0, before, "it has its receipt");
    }

    /// Long enough for everything that may be forgotten.
    fn idle(&mut self) {
        self.pass(2 * IDLE.as_secs() + 4);
    }

    /// The same while other topics are in use.
    fn idle_beside_others(&mut self) {
        for _ in 0..3 {
            self.deliver("other", 0);
            self.pass(IDLE.as_secs());
        }
    }

    /// The names under which events of a topic were stored, and their ids, in order.
    fn stored(&self, topic: &str) -> Vec<(&str, u64)> {
        let stored = self.broker.stored.iter();
        let of_topic = stored.filter(|(its, _, _)| its == topic);
        of_topic.map(|(_, name, id)| (name.as_str(), *id)).collect()
    }

    /// Lanes, topics, routes, producers, connections.
    fn sizes(&self) -> [usize; 5] {
        let it = &self.producer;
        let [names, pairs] = [it.route_index.len(), it.topic_index.len()];
        assert_eq!((names, pairs), (it.routes.len(), it.topics.len()));
        assert_eq!(it.idle_checks.len(), it.topics.len());
        let (connections, _) = it.connections.count();
        [
            it.lanes.len(),
            it.topics.len(),
            it.routes.len(),
            it.producers.len(),
            connections,
        ]
    }

    fn lane(&self, topic: &str, number: usize) -> &Lane {
        let route = self.producer.route_index[topic];
        let topic = self.producer.routes[route].topics[0];
        let lane = self.producer.topics[topic].lanes[number].expect("there is one");
        &self.producer.lanes[lane]
    }

    fn looks(&self) -> usize {
        let it = &self.producer;
        it.lanes.take_looks() + it.topics.take_looks() + it.routes.take_looks()
    }
}

/// The id of the transaction's event with this ordinal, in its lane.
fn id(commit: u64, ordinal: u64) -> u64 {
    (commit >> 3 << 16) + ordinal
}

#[test]
fn what_was_used_and_is_idle_is_forgotten_but_for_the_last_transaction() {
    // GIVEN many topics, some with partitions, all of whose lanes were used, several times over
    let mut world = World::new();
    for round in 0..3 {
        for number in 0..100 {
            let topic = format!("topic-{number}");
            if number % 10 == 0 {
                world.broker.partitions.insert(topic.clone(), 3);
            }
            for lane in 0..u64::from(LANES) {
                world.begin();
                world.publish(&topic, lane);
            }
        }
        world.serve();
        assert_eq!(world.producer.in_flight().0, 0);
        assert_eq!(
            world.broker.stored.len(),
            (round + 1) * 100 * LANES as usize
        );
        let used = world.sizes();
        assert!(
            used[0] >= 400 && used[1] == 120 && used[2] == 100,
            "{used:?}"
        );

        // WHEN they have nothing to do
        world.idle();

        // THEN nothing is left but the lane whose transaction may go on
        let [lanes, topics, routes, producers, connections] = world.sizes();
        assert_eq!((lanes, topics, routes, connections), (1, 1, 1, 0));
        assert!(producers <= 2);
        let it = &world.producer;
        assert!(it.filling.is_empty() && it.timers.is_empty() && it.creations.is_empty());
        assert!(it.asking.is_empty() && it.changing.is_empty() && it.refreshing.is_empty());
        assert!(it.releasable.is_empty() && it.troubled.is_empty() && it.diverting.is_empty());
        assert_eq!(it.connections.count(), (0, 0));
        assert!(world.broker.producers.is_empty());
        world.broker.released.clear();
    }
}

#[test]
fn a_lane_that_comes_back_goes_on_under_its_name_above_its_earlier_ids() {
    let mut world = World::new();
    let mut ids = Vec::new();
    for _ in 0..3 {
        world.deliver("topic", 1);
        ids.push(id(world.commit, 0));
        world.idle_beside_others();
        assert!(!world.producer.route_index.contains_key("topic"));
    }
    let stored = world.stored("topic");
    assert_eq!(stored.iter().map(|(_, id)| *id).collect::<Vec<_>>(), ids);
    assert!(stored.iter().all(|(name, _)| *name == stored[0].0));
}

#[test]
fn a_lane_is_not_forgotten_while_its_transaction_may_go_on() {
    // GIVEN a transaction with an event that has its receipt
    let mut world = World::new();
    world.deliver("topic", 0);

    // WHEN its next one comes when the lane has been idle for long
    world.idle();
    world.publish("topic", 0);
    world.serve();

    // THEN it has the next id, and is stored
    let ids: Vec<u64> = world.stored("topic").iter().map(|(_, id)| *id).collect();
    assert_eq!(ids, [id(world.commit, 0), id(world.commit, 1)]);
}

#[test]
fn a_lane_is_not_forgotten_while_an_event_of_its_transaction_may_be_held() {
    // GIVEN a transaction with an event that has its receipt, and one that is held because the topic changes its partitions
    let mut world = World::new();
    world.broker.partitions.insert("topic".to_owned(), 2);
    world.deliver("topic", 0);
    let route = world.producer.route_index["topic"];
    world.producer.routes[route].state = route::State::Changing { to: 3, anew: false };
    world.publish("topic", 0);
    assert_eq!(world.producer.held_messages, 1);

    // WHEN others go on for long, and the topic is as it was
    world.idle_beside_others();
    world.producer.serial += 1;
    world.producer.ask(route);
    world.serve();

    // THEN it has the next id, and is stored
    assert_eq!(world.producer.in_flight().0, 0);
    let stored = world.broker.stored.iter();
    let ids: Vec<u64> = stored
        .filter(|(topic, _, _)| topic.starts_with("topic"))
        .map(|(_, _, id)| id & 0xffff)
        .collect();
    assert_eq!(ids, [0, 1]);
}

/// A lane that has published, and is renamed in doubt.
fn renamed() -> World {
    let mut world = World::new();
    world.deliver("topic", 0);
    let route = world.producer.route_index["topic"];
    let topic = world.producer.routes[route].topics[0];
    let lane = world.producer.topics[topic].lanes[0].expect("there is one");
    world.producer.doubt(lane, lane::Doubt::Receipt);
    world.serve();
    world
}

/// It is forgotten and comes back, and is, twice. Returns the names under which its events are stored.
fn names_after_coming_back(mut world: World) -> Vec<String> {
    for _ in 0..2 {
        world.idle_beside_others();
        assert!(!world.producer.route_index.contains_key("topic"));
        world.deliver("topic", 0);
    }
    let stored = world.stored("topic").into_iter();
    stored.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn a_lane_that_was_renamed_comes_back_under_its_first_name() {
    let mut world = renamed();
    world.deliver("topic", 0);
    let names = names_after_coming_back(world);
    let first = &names[0];
    assert_eq!(names[1], format!("{first}~1"));
    assert_eq!([&names[2], &names[3]], [first; 2]);
    assert_eq!(names.len(), 4);
}

#[test]
fn a_lane_that_was_renamed_and_has_not_published_since_comes_back_under_its_first_name() {
    let names = names_after_coming_back(renamed());
    let first = &names[0];
    assert_eq!(names, vec![first.clone(); 3]);
}

#[test]
fn a_lane_of_a_topic_that_was_numbered_anew_is_forgotten_with_its_route_only() {
    // GIVEN a topic whose names must be ones that were never used, with two lanes
    let mut world = World::new();
    world.deliver("topic", 0);
    let route = world.producer.route_index["topic"];
    let topic = world.producer.routes[route].topics[0];
    world.producer.topics[topic].anew = true;
    world.deliver("topic", 1);
    assert!(world.lane("topic", 1).named.name.ends_with("~1"));

    // WHEN one of them is idle THEN it is kept
    for _ in 0..4 {
        world.pass(IDLE.as_secs() - 1);
        world.deliver("topic", 0);
    }
    assert!(world.lane("topic", 1).named.name.ends_with("~1"));

    // WHEN both are THEN they are forgotten, and the topic begins under its first names
    world.idle_beside_others();
    assert!(!world.producer.route_index.contains_key("topic"));
    world.deliver("topic", 1);
    assert!(!world.lane("topic", 1).named.name.contains('~'));
    assert_eq!(world.stored("topic").len(), 7);
}

#[test]
fn a_tail_is_forgotten_when_its_transaction_is_over() {
    // GIVEN a transaction with more events than a lane has ids
    let mut world = World::new();
    world.deliver("topic", 0);
    world.begin();
    let commit_lsn = Lsn::new(world.commit);
    let route = world.producer.route_index["topic"];
    let topic = world.producer.routes[route].topics[0];
    let lane = world.producer.topics[topic].lanes[0].expect("there is one");
    for _ in 0..MAX_ORDINALS {
        world
            .producer
            .with_lane(lane, |lane, desk| lane.skip(commit_lsn, desk));
    }
    world.publish("topic", 0);
    world.serve();
    assert_eq!(world.producer.topics[topic].dedicated.len(), 1);

    // WHEN it goes on after a while THEN its lane is still there
    world.idle();
    world.publish("topic", 0);
    world.producer.end_transaction();
    world.serve();
    let stored = world.stored("topic");
    assert_eq!(
        stored[1..].iter().map(|(_, id)| *id).collect::<Vec<_>>(),
        [0, 1]
    );

    // WHEN it is over THEN nothing is left of it
    world.idle_beside_others();
    assert!(!world.producer.route_index.contains_key("topic"));
    assert!(world.producer.dedicated.is_empty());
    assert_eq!(world.producer.lanes.len(), 1);
}

#[test]
fn what_waits_for_diverted_events_goes_when_these_are_stored_and_nothing_is_forgotten_before() {
    // GIVEN a topic that was given up before it was known, so that an event was diverted
    let mut world = World::new();
    world.begin();
    world.publish("topic", 0);
    let route = world.producer.route_index["topic"];
    world.producer.route_refused(route);
    assert_eq!(world.producer.take_diverted().len(), 1);
    world.producer.forget_refusal("topic");

    // WHEN another comes THEN it waits, however long
    world.begin();
    world.publish("topic", 1);
    world.serve();
    world.idle_beside_others();
    assert_eq!(world.producer.in_flight().0, 1);
    assert!(world.stored("topic").is_empty());

    // WHEN the first is stored THEN it goes, and the topic is forgotten
    world.producer.stored(1).expect("an event that fits");
    world.serve();
    assert_eq!(world.stored("topic").len(), 1);
    world.idle_beside_others();
    assert!(!world.producer.route_index.contains_key("topic"));
    assert!(world.producer.diverting.is_empty());
}

#[test]
fn a_log_that_was_put_back_is_noticed_by_a_lane_whose_events_would_be_taken_for_old() {
    // GIVEN an event that waits for its broker, and a topic with a later one that is forgotten
    let mut world = World::new();
    world.broker.is_silent = true;
    world.begin();
    world.publish("older", 0);
    world.serve();
    world.broker.is_silent = false;
    for _ in 0..10 {
        world.deliver("topic", 0);
    }
    let (name, later) = (world.broker.stored[0].1.clone(), id(world.commit, 0));
    world.idle_beside_others();
    assert!(!world.producer.route_index.contains_key("topic"));

    // WHEN its name turns out to have published an id from between the two
    let before = later - (DISTANCE >> 3 << 16);
    world
        .broker
        .pushed
        .insert(("older".to_owned(), name), before);
    let route = world.producer.route_index["older"];
    let topic = world.producer.routes[route].topics[0];
    let attempt = world.producer.topics[topic].attempt;
    let mut signals = vec![Signal::Found {
        topic,
        attempt,
        answer: Ok(Link {
            connection: 0,
            max_message_bytes: 1 << 20,
        }),
    }];
    let mut result = Ok(());
    for _ in 0..MAX_ROUNDS {
        for signal in std::mem::take(&mut signals) {
            result = result.and(world.producer.on(signal, world.now));
        }
        let effects: Vec<Effect> = world.producer.take_effects().collect();
        let answers = effects
            .into_iter()
            .flat_map(|effect| world.broker.answer(effect));
        signals = answers.collect();
    }

    // THEN nothing is sent
    let error = result.expect_err("the log was put back");
    assert!(error.to_string().contains("put back"), "{error}");
    assert!(world.stored("older").is_empty());
}

#[test]
fn a_tick_and_a_signal_cost_what_is_due_and_not_what_waits() {
    const TOPICS: usize = 10_000;
    // GIVEN many topics that wait for their broker, each with two lanes, and one that is in use
    let mut world = World::new();
    world.deliver("busy", 0);
    world.broker.is_silent = true;
    world.begin();
    for number in 0..TOPICS {
        let topic = format!("topic-{number}");
        world.publish(&topic, 0);
        world.publish(&topic, 1);
    }
    world.serve();
    assert_eq!(world.producer.in_flight().0, 2 * TOPICS);
    world.producer.tick(world.now);
    world.looks();

    // WHEN the clock is looked at, events and signals come, something is stored, and a connection ends
    world.now.at += SECOND;
    world.producer.tick(world.now);
    let tick = world.looks();
    let _troubles = world.producer.troubles();
    let _room = world.producer.has_room();
    world.producer.stored(0).expect("nothing that does not fit");
    let (connection, now) = (77, world.now);
    let signal = Signal::Disconnected {
        connection,
        reason: "it broke".to_owned(),
    };
    world
        .producer
        .on(signal, now)
        .expect("nothing that does not fit");
    let signals = world.looks();
    world.publish("busy", 0);
    world.serve();
    let event = world.looks();

    // THEN none of that looks at the topics that wait
    assert!(
        tick < 50 && signals < 50 && event < 100,
        "{tick} {signals} {event}"
    );

    // AND those that are idle are not looked at before their time
    world.broker.is_silent = false;
    let answers: Vec<Signal> = (0..world.producer.topics.len())
        .map(|topic| Signal::Found {
            topic,
            attempt: world.producer.topics[topic].attempt,
            answer: Ok(Link {
                connection: 0,
                max_message_bytes: 1 << 20,
            }),
        })
        .collect();
    for signal in answers {
        world.producer.on(signal, now).expect("events that fit");
    }
    world.serve();
    assert_eq!(world.producer.in_flight().0, 0);
    world.pass(1);
    world.looks();
    world.now.at += SECOND;
    world.producer.tick(world.now);
    let tick = world.looks();
    assert!(tick < 50, "{tick}");
}

#[test]
fn a_connection_is_let_go_of_when_it_has_no_producers_and_none_are_to_come() {
    // GIVEN a topic that waits on its connection until its partitions are counted
    let mut world = World::new();
    world.deliver("topic", 0);
    let route = world.producer.route_index["topic"];
    let topic = world.producer.routes[route].topics[0];
    world.broker.connection = 5;
    let link = Link {
        connection: 5,
        max_message_bytes: 1 << 20,
    };
    world.producer.connections.add(link, world.now.at);
    world.producer.connections.expect(5, topic);
    world.producer.topics[topic].opening = topic::Opening::Counting { connection: 5 };

    // WHEN nothing is there for long THEN the other one is let go of
    world.idle();
    assert_eq!(world.broker.released, [0]);
    assert!(world.producer.connections.is_known(5));

    // WHEN the topic waits no more THEN this one, too
    world.producer.topics[topic].opening = topic::Opening::Idle;
    world.idle();
    assert_eq!(world.broker.released, [0, 5]);
}
