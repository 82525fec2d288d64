//! What the producer does, told by hand what brokers say.

use super::*;
use crate::ack::AckTracker;
use crate::meter::{MAX_TROUBLES, Troubles};
use crate::pulsar::RowTag;

const EARLIER: Lsn = Lsn::new(0x100);
const LARGE: Lsn = Lsn::new(0x200);
const LATER: Lsn = Lsn::new(0x300);

/// The time of all that happens here.
fn now() -> Now {
    Now {
        at: Instant::now(),
        unix_ms: 0,
    }
}

/// A producer that no broker answers, with diversion and one lane for each topic.
fn producer() -> Producer {
    let pause = Duration::from_secs(600);
    let settings = Settings {
        rows: None,
        doubts: Doubts::default(),
        meter: Arc::default(),
        producer_name: "unit".to_owned(),
        routing: String::new(),
        lanes: 1,
        hashing: HashingScheme::default(),
        partition_refresh: pause,
        producer_idle: pause,
        compression: Codec::None,
        diversion: Some(Diversion {
            grace: Duration::ZERO,
            age: Duration::ZERO,
            unclear: Duration::from_secs(60),
            park: false,
            quiet: true,
        }),
        batch_max_messages: 10,
        batch_max_bytes: 128 * 1024,
        batch_linger: Duration::ZERO,
        max_in_flight_messages: 1000,
        max_in_flight_bytes: 1024 * 1024,
        send_timeout: pause,
        reconnect: (pause, pause),
    };
    Producer::new(settings, now())
}

/// The broker says that the topic has so many partitions.
fn count(producer: &mut Producer, route: usize, partitions: u32) {
    producer.serial += 1;
    producer.ask(route);
    while let Some(asked) = producer.routes[route].question.asked {
        producer.counted(route, asked, Ok(partitions));
    }
}

/// A topic with so many partitions.
fn known(producer: &mut Producer, topic: &str, partitions: u32) -> usize {
    let route = producer.route(topic);
    count(producer, route, partitions);
    route
}

fn publish(producer: &mut Producer, topic: &str, commit_lsn: Lsn) {
    let event = Outgoing {
        key: "key",
        payload: Some(b"payload"),
        event_time_ms: 0,
        deliver_at_ms: None,
        txn: AckTracker::new(Lsn::ZERO).begin(),
        commit_lsn,
        row: RowTag::default(),
        mark: None,
    };
    let taken = producer.publish(topic, 0, &event, &std::iter::empty());
    taken.expect("an event that fits");
}

/// The commit LSNs of what was diverted.
fn diverted(producer: &mut Producer) -> Vec<Lsn> {
    let diverted = producer.take_diverted().into_iter();
    diverted.map(|diverted| diverted.event.commit_lsn).collect()
}

/// A transaction that has filled its lane, and has two events in a dedicated one; returns that.
fn with_tail(producer: &mut Producer, topic: &str) -> usize {
    let route = known(producer, topic, 1);
    let topic_id = producer.routes[route].topics[0];
    let lane = producer.lane(topic_id, 0);
    for _ in 0..MAX_ORDINALS {
        producer.with_lane(lane, |lane, desk| lane.skip(LARGE, desk));
    }
    publish(producer, topic, LARGE);
    publish(producer, topic, LARGE);
    let dedicated = producer.dedicated[&(lane, LARGE)];
    assert_eq!(producer.lanes[dedicated].next_ordinal(LARGE), 2);
    dedicated
}

/// As if every producer had opened, and everything that is in a lane had got its receipt.
fn acknowledge(producer: &mut Producer) {
    for topic in producer.topics.iter_mut() {
        topic.opening = topic::Opening::Idle;
    }
    for lane in 0..producer.lanes.len() {
        producer.with_lane(lane, |lane, desk| drop(lane.take_all(desk.now.at)));
    }
    producer.drained();
}

#[test]
fn an_event_of_an_earlier_transaction_that_was_held_does_not_end_a_tail() {
    let mut producer = producer();
    publish(&mut producer, "late", EARLIER);
    let dedicated = with_tail(&mut producer, "large");

    known(&mut producer, "late", 0);
    producer.release().expect("an event that fits");
    assert_eq!(producer.held_messages, 0, "not now");
    assert_eq!(producer.draining, None);

    publish(&mut producer, "large", LARGE);
    assert_eq!(producer.lanes[dedicated].next_ordinal(LARGE), 3);
}

#[test]
fn a_tail_that_goes_on_after_it_was_drained_goes_on_with_its_ids() {
    // GIVEN a tail that is drained because an event of a later transaction came, although more of it is held
    let mut producer = producer();
    let dedicated = with_tail(&mut producer, "large");
    known(&mut producer, "other", 0);
    publish(&mut producer, "other", LATER);
    assert_eq!(producer.draining, Some(Drain::AfterTail));
    acknowledge(&mut producer);
    assert!(producer.dedicated.is_empty());

    // WHEN the rest of it comes
    publish(&mut producer, "large", LARGE);

    // THEN no id is used twice
    assert_eq!(producer.lanes[dedicated].next_ordinal(LARGE), 3);
    producer.end_transaction();
    assert_eq!(producer.draining, Some(Drain::AfterTail));
}

#[test]
fn new_partitions_are_taken_when_what_was_diverted_is_stored() {
    // GIVEN an event that was diverted, and new partitions
    let mut producer = producer();
    let route = known(&mut producer, "topic", 2);
    for topic in producer.routes[route].topics.clone() {
        producer.topics[topic].refused = Some("refused".to_owned());
    }
    publish(&mut producer, "topic", EARLIER);
    assert_eq!(diverted(&mut producer), [EARLIER]);
    count(&mut producer, route, 3);

    producer.finish_changes();
    assert_eq!(producer.routes[route].partitions, 2, "nothing waits for it");

    producer.stored(1).expect("nothing that does not fit");
    assert_eq!(producer.routes[route].partitions, 3);
}

#[test]
fn partitions_that_are_as_many_as_before_change_nothing() {
    let mut producer = producer();
    let route = known(&mut producer, "topic", 2);
    publish(&mut producer, "topic", EARLIER);
    let lanes = producer.lanes.len();
    count(&mut producer, route, 3);
    count(&mut producer, route, 2);

    publish(&mut producer, "topic", EARLIER);
    assert_eq!(producer.lanes.len(), lanes);
    assert_eq!(producer.lanes[0].next_ordinal(EARLIER), 2);
}

#[test]
fn what_follows_an_event_without_a_lane_in_its_transaction_is_diverted_too() {
    // GIVEN a topic of which nothing is known, whose events are diverted
    let mut producer = producer();
    publish(&mut producer, "topic", EARLIER);
    let route = producer.route("topic");
    let error = crate::Error::refused("refused");
    producer.routes[route].trouble = trouble::Trouble::add(None, &error, now().at);
    producer.route_refused(route);
    publish(&mut producer, "topic", LARGE);
    assert_eq!(diverted(&mut producer), [EARLIER, LARGE]);

    // WHEN it is usable in mid-transaction
    producer.forget_refusal("topic");
    known(&mut producer, "topic", 0);
    publish(&mut producer, "topic", LARGE);
    publish(&mut producer, "topic", LATER);

    // THEN the rest of the transaction, whose ids nobody can know, is diverted, and the next one is not
    assert_eq!(diverted(&mut producer), [LARGE]);
    assert_eq!(producer.in_flight().0, 1);
}

#[test]
fn a_partition_that_is_also_a_topic_by_itself_has_lanes_of_its_own() {
    // GIVEN an event on its way to one partition by its own name
    let mut producer = producer();
    let alone = known(&mut producer, "topic-partition-1", 0);
    publish(&mut producer, "topic-partition-1", EARLIER);

    // WHEN the whole topic is known
    let whole = known(&mut producer, "topic", 2);

    // THEN the two have nothing in common but the broker's topic
    let [alone, whole] = [(alone, 0), (whole, 1)].map(|(route, number)| {
        let topic = producer.routes[route].topics[number];
        (
            producer.topics[topic].name.clone(),
            producer.lane_name(topic, 0),
        )
    });
    assert_eq!(alone.0, whole.0);
    assert_ne!(alone.1, whole.1);
    assert_eq!(producer.in_flight().0, 1);
}

#[test]
fn what_is_diverted_elsewhere_holds_up_no_new_partitions() {
    let mut producer = producer();
    let other = known(&mut producer, "refused", 0);
    let topic = producer.routes[other].topics[0];
    producer.topics[topic].refused = Some("refused".to_owned());
    let route = known(&mut producer, "topic", 2);
    publish(&mut producer, "refused", EARLIER);
    assert_eq!(diverted(&mut producer), [EARLIER]);

    count(&mut producer, route, 3);
    producer.finish_changes();
    assert_eq!(producer.routes[route].partitions, 3);
}

#[test]
fn partitions_that_become_fewer_are_another_topics_and_get_names_that_were_never_used() {
    // GIVEN a lane that has counted, and a topic that grows and is then made anew with fewer
    let mut producer = producer();
    let route = known(&mut producer, "topic", 2);
    publish(&mut producer, "topic", EARLIER);
    acknowledge(&mut producer);
    for partitions in [3, 2] {
        count(&mut producer, route, partitions);
        producer.finish_changes();
        assert_eq!(producer.routes[route].partitions, partitions);
    }

    // WHEN more of its transaction comes THEN it counts anew, under another name
    publish(&mut producer, "topic", EARLIER);
    assert_eq!(producer.lanes[0].next_ordinal(EARLIER), 1);
    let name = &producer.lanes[0].named.name;
    assert!(name.ends_with("~1"), "{name}");
}

#[test]
fn new_partitions_of_a_topic_with_a_tail_are_taken_although_its_transaction_goes_on() {
    let mut producer = producer();
    let dedicated = with_tail(&mut producer, "large");
    let route = producer.route("large");
    count(&mut producer, route, 2);
    publish(&mut producer, "large", LARGE);
    assert_eq!(producer.held_messages, 1);

    producer.finish_changes();
    assert_eq!(producer.draining, Some(Drain::AfterTail));
    acknowledge(&mut producer);
    producer.finish_changes();

    assert_eq!(producer.routes[route].partitions, 2);
    assert_eq!(producer.lanes[dedicated].next_ordinal(LARGE), 2);
}

/// What somebody must mend about a topic.
fn to_be_mended(said: &str) -> Error {
    Error::refused(said).caused_by(verdict::OfTopic::mend(said.to_owned()))
}

/// Something was said of a topic at that time.
fn trouble_of(producer: &mut Producer, name: &str, said: &str, after: Duration) {
    let route = known(producer, name, 0);
    let topic = producer.routes[route].topics[0];
    let at = producer.now.at + after;
    producer.topics[topic].note(&to_be_mended(said), at);
    producer.troubled.insert(Timer::Topic(topic));
}

#[test]
fn the_topics_that_are_told_to_be_in_trouble_are_those_longest_in_trouble() {
    // GIVEN more refused topics than are listed, with events that wait
    let mut producer = producer();
    assert_eq!(producer.troubles(), Troubles::default());
    for number in 0..MAX_TROUBLES as u64 + 2 {
        let name = format!("topic-{number}");
        publish(&mut producer, &name, EARLIER);
        let after = Duration::from_secs(100 - number);
        trouble_of(&mut producer, &name, "no\n \u{1b}[2J", after);
    }
    producer.release().expect("events that fit");

    // THEN all are counted, and the oldest are listed first, with one line that steers no terminal
    let told = producer.troubles();
    assert_eq!(told.count, MAX_TROUBLES as u64 + 2);
    assert_eq!(told.listed.len(), MAX_TROUBLES);
    assert_eq!(told.listed[0].topic, "topic-11");
    assert_eq!(told.listed[1].topic, "topic-10");
    assert_eq!(told.listed[0].reason, "no \u{fffd}[2J");
    assert_eq!(told.first_waiting.as_ref(), told.listed.first());
}

#[test]
fn a_topic_in_trouble_is_told_while_events_wait_or_are_diverted_and_not_when_it_works() {
    let mut producer = producer();
    let count = |producer: &Producer| producer.troubles().count;
    trouble_of(&mut producer, "topic", "no", Duration::ZERO);
    assert_eq!(count(&producer), 0, "nothing waits");
    publish(&mut producer, "topic", EARLIER);
    assert_eq!(count(&producer), 1);

    // WHEN its events are diverted THEN it still is
    let topic = producer.routes[producer.route_index["topic"]].topics[0];
    producer.topic_refused(topic);
    assert_eq!(producer.in_flight().0, 0);
    assert_eq!(count(&producer), 1);
    assert_eq!(producer.troubles().first_waiting, None);

    // WHEN something was published to it THEN not any more
    producer.healed("topic");
    assert_eq!(count(&producer), 0);

    // WHEN it has a receipt for an event that waited THEN neither
    trouble_of(&mut producer, "topic", "no", Duration::ZERO);
    publish(&mut producer, "topic", LATER);
    assert_eq!(count(&producer), 1);
    producer.topics[topic].opening = topic::Opening::Idle;
    producer.topics[topic].works();
    assert_eq!(count(&producer), 0);
}

#[test]
fn a_topic_in_trouble_whose_broker_is_away_now_is_not_told() {
    let mut producer = producer();
    trouble_of(&mut producer, "topic", "no", Duration::ZERO);
    publish(&mut producer, "topic", EARLIER);
    assert_eq!(producer.troubles().count, 1);

    let topic = producer.routes[producer.route_index["topic"]].topics[0];
    let away = Error::temporary("the connection ended");
    producer.topics[topic].note(&away, producer.now.at);
    assert_eq!(producer.troubles().count, 0);
}

#[test]
fn a_connection_that_is_refused_gives_up_no_topic() {
    // GIVEN a topic with an event that waits, and a producer that gives up at once what must be mended
    let mut producer = producer();
    publish(&mut producer, "topic", EARLIER);
    count(&mut producer, 0, 0);
    producer.release().expect("an event that fits");
    producer.flush(Flush::All, now());
    let topic = producer.routes[0].topics[0];
    assert_eq!(producer.topics[topic].opening, topic::Opening::Finding);
    let attempt = producer.topics[topic].attempt;

    // WHEN no connection can be made until somebody mends the credentials
    let refused = Error::refused("the broker refuses the connection");
    producer.found(topic, attempt, Err(refused));
    producer.give_up_the_hopeless();

    // THEN that is told of no topic, and nothing is diverted
    assert!(matches!(
        producer.topics[topic].opening,
        topic::Opening::Pausing { .. }
    ));
    assert_eq!(producer.troubles(), Troubles::default());
    assert_eq!(diverted(&mut producer), []);

    // AND what the broker refuses of the topic is
    producer.note_failure(topic, &to_be_mended("no"));
    producer.give_up_the_hopeless();
    assert_eq!(diverted(&mut producer), [EARLIER]);
}

#[test]
fn a_topic_whose_partitions_cannot_be_counted_is_in_trouble_until_it_is_asked_about_again() {
    // GIVEN a topic that nobody knows, whose events were diverted
    let mut producer = producer();
    publish(&mut producer, "topic", EARLIER);
    let route = producer.route("topic");
    let error = to_be_mended("no such tenant");
    producer.routes[route].trouble = trouble::Trouble::add(None, &error, producer.now.at);
    producer.troubled.insert(Timer::Route(route));
    assert_eq!(producer.troubles().count, 1);
    producer.route_refused(route);

    // THEN it is told
    let told = producer.troubles();
    assert_eq!((told.count, &*told.listed[0].reason), (1, "no such tenant"));

    // AND not when something was published to it
    producer.healed("topic");
    assert_eq!(producer.troubles().count, 0);
}

#[test]
fn a_topic_whose_trouble_may_be_everybodys_is_given_up_late_or_when_another_gets_receipts() {
    let minute = Duration::from_secs(60);
    for (others_work, given_up_after) in [(false, minute), (true, Duration::ZERO)] {
        // GIVEN a topic whose writes fail, perhaps because of the broker
        let mut producer = producer();
        trouble_of(&mut producer, "topic", "no", Duration::ZERO);
        publish(&mut producer, "topic", EARLIER);
        let topic = producer.routes[producer.route_index["topic"]].topics[0];
        let since = producer.now;
        let unclear = crate::pulsar::verdict::of_send_error("topic", "UnknownError");
        producer.topics[topic].trouble = trouble::Trouble::add(None, &unclear, since.at);
        let until = since.at + 10 * minute;
        producer.topics[topic].opening = topic::Opening::Pausing { until };
        let after = |passed: Duration| Now {
            at: since.at + passed,
            ..since
        };

        // WHEN another has a receipt since, or none has
        let route = known(&mut producer, "other", 0);
        let other = producer.routes[route].topics[0];
        if others_work {
            producer.working[0] = Some((other, after(Duration::from_millis(1)).at));
        }

        // THEN it waits for that long
        if let Some(before) = given_up_after.checked_sub(Duration::from_secs(1)) {
            producer.tick(after(before));
            assert_eq!(diverted(&mut producer), []);
        }
        producer.tick(after(given_up_after + Duration::from_secs(1)));
        assert_eq!(diverted(&mut producer), [EARLIER], "{others_work}");
    }
}

#[test]
fn the_brokers_time_is_not_counted_as_a_topics_trouble() {
    // GIVEN a topic in trouble whose broker goes away for longer than a topic is given
    let minute = Duration::from_secs(60);
    let start = Instant::now();
    let closed = crate::pulsar::verdict::is_closed("topic");
    let away = Error::temporary("the connection ended");
    let trouble = trouble::Trouble::add(None, &closed, start);
    let trouble = trouble::Trouble::add(trouble, &away, start + minute);
    let trouble = trouble::Trouble::add(trouble, &away, start + 2 * minute);

    // WHEN it is back, others have receipts, and the topic has its trouble again
    let back = start + 11 * minute;
    let trouble = trouble::Trouble::add(trouble, &closed, back).expect("trouble");
    let diversion = Diversion {
        grace: Duration::ZERO,
        age: 5 * minute,
        unclear: 20 * minute,
        park: false,
        quiet: true,
    };
    let given_up = trouble.ends_at(Some(diversion), false, Some(back + minute));

    // THEN it has had one minute of the five
    let given_up = given_up.expect("it is the topic's");
    assert_eq!((given_up.at, given_up.is_clear), (back + 4 * minute, true));
}

#[test]
fn a_route_changes_its_partitions_while_another_topic_has_a_lane_for_a_huge_transaction() {
    // GIVEN a huge transaction with a lane of its own on one topic, and an event of it on another
    let mut producer = producer();
    with_tail(&mut producer, "large");
    let route = known(&mut producer, "other", 1);
    publish(&mut producer, "other", LARGE);

    // WHEN that gets more partitions, its further events are held, and all that is in lanes has its receipt
    count(&mut producer, route, 2);
    publish(&mut producer, "other", LARGE);
    assert_eq!(producer.routes[route].held.len(), 1);
    producer.settle().expect("no events are refused");
    acknowledge(&mut producer);
    producer.settle().expect("no events are refused");

    // THEN it takes them, although the transaction goes on
    assert_eq!(producer.routes[route].partitions, 2);
    assert!(producer.routes[route].held.is_empty());
}

#[test]
fn nobody_passes_those_who_wait_for_room_on_a_connection() {
    // GIVEN a connection that is full, and one producer that waits
    let now = Instant::now();
    let mut connections = Connections::default();
    let link = Link {
        connection: 1,
        max_message_bytes: usize::MAX,
    };
    connections.add(link, now);
    connections.wrote(1, 8 * 1024 * 1024, now);
    assert!(!connections.has_room(1, true));
    connections.wait(1, 7);

    // WHEN there is room again THEN it is that one's
    connections.answered(1, 1, now);
    assert!(!connections.has_room(1, false));
    assert_eq!(connections.next_waiting(1), Some(7));
    assert!(connections.has_room(1, true));
    assert!(connections.has_room(1, false));

    // AND where no receipt is due any more, nobody waits for one
    connections.wait(1, 8);
    connections.answered(1, usize::MAX, now);
    assert!(connections.has_room(1, false));
}
