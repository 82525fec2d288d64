//! What the publisher does before any broker has answered: there is none here.

use super::*;
use crate::ack::AckTracker;
use crate::pulsar::RowTag;

const EARLIER: Lsn = Lsn::new(0x100);
const LARGE: Lsn = Lsn::new(0x200);
const LATER: Lsn = Lsn::new(0x300);

/// A publisher whose broker is away, with diversion and one lane for each topic.
fn publisher() -> Publisher {
    let pause = Duration::from_secs(600);
    Publisher::new(PublisherConfig {
        // Reserved, and nobody listens there.
        service: vec![("127.0.0.1".to_owned(), 1)],
        auth: Auth::default(),
        tls: None,
        rows: None,
        meter: Arc::default(),
        keepalive_interval: pause,
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
            park: false,
            quiet: true,
        }),
        schema: None,
        batch_max_messages: 10,
        batch_max_bytes: 128 * 1024,
        batch_linger: Duration::ZERO,
        max_in_flight_messages: 1000,
        max_in_flight_bytes: 1024 * 1024,
        send_timeout: pause,
        reconnect: (pause, pause),
    })
}

/// A topic with so many partitions.
fn known(publisher: &mut Publisher, topic: &str, partitions: u32) -> usize {
    let route = publisher.route(topic);
    publisher.partitions_counted(route, partitions);
    route
}

fn publish(publisher: &mut Publisher, topic: &str, commit_lsn: Lsn) {
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
    let taken = publisher.publish(topic, 0, &event, &std::iter::empty());
    taken.expect("an event that fits");
}

/// The commit LSNs of what was diverted.
fn diverted(publisher: &mut Publisher) -> Vec<Lsn> {
    let diverted = publisher.take_diverted().into_iter();
    diverted.map(|diverted| diverted.event.commit_lsn).collect()
}

/// A transaction that has filled its lane, and has two events in a dedicated one; returns that.
fn with_tail(publisher: &mut Publisher, topic: &str) -> usize {
    let route = known(publisher, topic, 1);
    let topic_id = publisher.routes[route].topics[0];
    let lane = publisher.lane(topic_id, 0);
    for _ in 0..MAX_ORDINALS {
        publisher.lanes[lane].skip(LARGE, &mut publisher.memory);
    }
    publish(publisher, topic, LARGE);
    publish(publisher, topic, LARGE);
    let dedicated = publisher.dedicated[&(lane, LARGE)];
    assert_eq!(publisher.lanes[dedicated].next_ordinal(LARGE), 2);
    dedicated
}

/// As if every producer had opened, and everything that is in a lane had got its receipt.
fn acknowledge(publisher: &mut Publisher) {
    for topic in &mut publisher.topics {
        topic.opener = None;
    }
    for lane in &mut publisher.lanes {
        drop(lane.take_all());
    }
    publisher.in_flight_messages = publisher.held_messages;
    publisher.drained();
}

#[tokio::test]
async fn an_event_of_an_earlier_transaction_that_was_held_does_not_end_a_tail() {
    let mut publisher = publisher();
    publish(&mut publisher, "late", EARLIER);
    let dedicated = with_tail(&mut publisher, "large");

    known(&mut publisher, "late", 0);
    publisher.release().expect("an event that fits");
    assert_eq!(publisher.held_messages, 0, "not now");
    assert_eq!(publisher.draining, None);

    publish(&mut publisher, "large", LARGE);
    assert_eq!(publisher.lanes[dedicated].next_ordinal(LARGE), 3);
}

#[tokio::test]
async fn a_tail_that_goes_on_after_it_was_drained_goes_on_with_its_ids() {
    // GIVEN a tail that is drained because an event of a later transaction came, although more of it is held
    let mut publisher = publisher();
    let dedicated = with_tail(&mut publisher, "large");
    known(&mut publisher, "other", 0);
    publish(&mut publisher, "other", LATER);
    assert_eq!(publisher.draining, Some(Drain::AfterTail));
    acknowledge(&mut publisher);
    assert!(publisher.dedicated.is_empty());

    // WHEN the rest of it comes
    publish(&mut publisher, "large", LARGE);

    // THEN no id is used twice
    assert_eq!(publisher.lanes[dedicated].next_ordinal(LARGE), 3);
    publisher.end_transaction();
    assert_eq!(publisher.draining, Some(Drain::AfterTail));
}

#[tokio::test]
async fn new_partitions_are_taken_when_what_was_diverted_is_stored() {
    // GIVEN an event that was diverted, and new partitions
    let mut publisher = publisher();
    let route = known(&mut publisher, "topic", 2);
    for topic in publisher.routes[route].topics.clone() {
        publisher.topics[topic].refused = Some("refused".to_owned());
    }
    publish(&mut publisher, "topic", EARLIER);
    assert_eq!(diverted(&mut publisher), [EARLIER]);
    publisher.partitions_counted(route, 3);

    publisher.finish_changes();
    assert_eq!(
        publisher.routes[route].partitions, 2,
        "nothing waits for it"
    );

    publisher.stored(1).expect("nothing that does not fit");
    assert_eq!(publisher.routes[route].partitions, 3);
}

#[tokio::test]
async fn partitions_that_are_as_many_as_before_change_nothing() {
    let mut publisher = publisher();
    let route = known(&mut publisher, "topic", 2);
    publish(&mut publisher, "topic", EARLIER);
    let lanes = publisher.lanes.len();
    publisher.partitions_counted(route, 3);
    publisher.partitions_counted(route, 2);

    publish(&mut publisher, "topic", EARLIER);
    assert_eq!(publisher.lanes.len(), lanes);
    assert_eq!(publisher.lanes[0].next_ordinal(EARLIER), 2);
}

#[tokio::test]
async fn what_follows_an_event_without_a_lane_in_its_transaction_is_diverted_too() {
    // GIVEN a topic of which nothing is known, whose events are diverted
    let mut publisher = publisher();
    publish(&mut publisher, "topic", EARLIER);
    let route = publisher.route("topic");
    publisher.route_refused(route, "refused");
    publish(&mut publisher, "topic", LARGE);
    assert_eq!(diverted(&mut publisher), [EARLIER, LARGE]);

    // WHEN it is usable in mid-transaction
    publisher.forget_refusal("topic");
    known(&mut publisher, "topic", 0);
    publish(&mut publisher, "topic", LARGE);
    publish(&mut publisher, "topic", LATER);

    // THEN the rest of the transaction, whose ids nobody can know, is diverted, and the next one is not
    assert_eq!(diverted(&mut publisher), [LARGE]);
    assert_eq!(publisher.in_flight().0, 1);
}

#[tokio::test]
async fn a_partition_that_is_also_a_topic_by_itself_has_lanes_of_its_own() {
    // GIVEN an event on its way to one partition by its own name
    let mut publisher = publisher();
    let alone = known(&mut publisher, "topic-partition-1", 0);
    publish(&mut publisher, "topic-partition-1", EARLIER);

    // WHEN the whole topic is known
    let whole = known(&mut publisher, "topic", 2);

    // THEN the two have nothing in common but the broker's topic
    let [alone, whole] = [(alone, 0), (whole, 1)].map(|(route, number)| {
        let topic = publisher.routes[route].topics[number];
        (
            publisher.topics[topic].name.clone(),
            publisher.lane_name(topic, 0),
        )
    });
    assert_eq!(alone.0, whole.0);
    assert_ne!(alone.1, whole.1);
    assert_eq!(publisher.in_flight().0, 1);
}

#[tokio::test]
async fn what_is_diverted_elsewhere_holds_up_no_new_partitions() {
    let mut publisher = publisher();
    let other = known(&mut publisher, "refused", 0);
    let topic = publisher.routes[other].topics[0];
    publisher.topics[topic].refused = Some("refused".to_owned());
    let route = known(&mut publisher, "topic", 2);
    publish(&mut publisher, "refused", EARLIER);
    assert_eq!(diverted(&mut publisher), [EARLIER]);

    publisher.partitions_counted(route, 3);
    publisher.finish_changes();
    assert_eq!(publisher.routes[route].partitions, 3);
}

#[tokio::test]
async fn partitions_that_come_back_have_the_lanes_they_had() {
    // GIVEN a lane that has counted, and a change there and back
    let mut publisher = publisher();
    let route = known(&mut publisher, "topic", 2);
    publish(&mut publisher, "topic", EARLIER);
    acknowledge(&mut publisher);
    for partitions in [3, 2] {
        publisher.partitions_counted(route, partitions);
        publisher.finish_changes();
        assert_eq!(publisher.routes[route].partitions, partitions);
    }

    // WHEN more of its transaction comes THEN it counts on
    publish(&mut publisher, "topic", EARLIER);
    assert_eq!(publisher.lanes[0].next_ordinal(EARLIER), 2);
}

#[tokio::test]
async fn new_partitions_of_a_topic_with_a_tail_are_taken_although_its_transaction_goes_on() {
    let mut publisher = publisher();
    let dedicated = with_tail(&mut publisher, "large");
    let route = publisher.route("large");
    publisher.partitions_counted(route, 2);
    publish(&mut publisher, "large", LARGE);
    assert_eq!(publisher.held_messages, 1);

    publisher.finish_changes();
    assert_eq!(publisher.draining, Some(Drain::AfterTail));
    acknowledge(&mut publisher);
    publisher.finish_changes();

    assert_eq!(publisher.routes[route].partitions, 2);
    assert_eq!(publisher.lanes[dedicated].next_ordinal(LARGE), 2);
}
