//! Tests of the meter.

use super::*;

#[test]
fn topics_beyond_the_limit_are_counted_together() {
    let meter = Meter::new();
    for number in 0..MAX_TOPICS + 50 {
        let topic = meter.topic(&format!("persistent://p/d/{number}"));
        assert_eq!(topic, meter.topic(&format!("persistent://p/d/{number}")));
        meter.published(topic, 2);
    }
    let topics: Vec<_> = meter.topics().collect();
    assert_eq!(topics.len(), MAX_TOPICS + 1);
    assert_eq!(topics[0].published, 2);
    let other = &topics[MAX_TOPICS];
    assert_eq!((other.name, other.published), (OTHER_TOPICS, 100));
    assert_eq!(meter.all_published(), 2 * (MAX_TOPICS as u64 + 50));
}

#[test]
fn a_latency_falls_into_the_first_bucket_whose_bound_it_does_not_pass() {
    let meter = Meter::new();
    meter.observe(Duration::ZERO, 3);
    meter.observe(Duration::from_millis(1), 1);
    meter.observe(Duration::from_micros(1001), 5);
    meter.observe(Duration::from_secs(3600), 1);
    let read = meter.latencies();
    assert_eq!(read.buckets[..3], [4, 5, 0]);
    assert_eq!(read.buckets[LATENCY_BOUNDS.len()], 1);
    assert_eq!(
        read.sum,
        Duration::from_micros(1_000 + 5_005 + 3_600_000_000)
    );
}

#[test]
fn a_commit_in_the_future_of_this_clock_counts_as_no_delay() {
    let meter = Meter::new();
    meter.latency(i64::MAX, 7);
    assert_eq!(meter.latencies().buckets[0], 7);
    meter.latency(i64::MIN, 1);
    assert_eq!(meter.latencies().buckets[LATENCY_BOUNDS.len()], 1);
}

#[test]
fn troubles_are_those_that_were_told_last() {
    let meter = Meter::new();
    let one = TopicTrouble {
        topic: "t".to_owned(),
        since: Instant::now(),
        reason: "no".to_owned(),
        is_waiting: false,
    };
    let troubles = Troubles {
        count: 12,
        listed: vec![one],
        first_waiting: None,
    };
    meter.set_troubles(troubles.clone());
    assert_eq!(
        (meter.troubles(), meter.topics_in_trouble()),
        (troubles, 12)
    );
    meter.set_troubles(Troubles::default());
    assert_eq!(
        (meter.troubles(), meter.topics_in_trouble()),
        (Troubles::default(), 0)
    );
}

#[test]
fn every_phase_is_read_as_it_was_set_and_has_a_known_role() {
    let meter = Meter::new();
    for phase in Phase::ALL {
        meter.set_phase(phase);
        assert_eq!(meter.phase(), phase);
        assert!(ROLES.contains(&phase.role()));
    }
}
