//! Which ids show that the log was put back.

use super::*;

const COMMIT: Lsn = Lsn::new(0x1000);

fn lane() -> Lane {
    let identity = Identity {
        topic: 0,
        number: 0,
        name: "unit".to_owned(),
        dedicated: false,
        epoch: 0,
        anew: false,
    };
    Lane::new(identity, Codec::None, 0, Instant::now())
}

/// The id of the transaction's event with this ordinal.
fn id(lane: &mut Lane, commit_lsn: Lsn, ordinal: u64) -> u64 {
    lane.txn = (commit_lsn, ordinal);
    lane.next_sequence_id(commit_lsn)
}

#[test]
fn the_last_id_of_a_huge_transaction_is_not_beyond_its_own_log() {
    let mut lane = lane();
    for ordinal in [0, 1 << 16, MAX_ORDINALS - 1] {
        let pushed = id(&mut lane, COMMIT, ordinal);
        // Its commit record, the shortest, is the last of the log.
        assert!(!lane.is_beyond(pushed, Lsn::new(COMMIT.as_u64() + 40)));
        assert!(lane.is_beyond(pushed, Lsn::new(COMMIT.as_u64() - 40)));
    }
}

#[test]
fn what_the_lane_has_written_itself_is_not_beyond_the_end_of_the_log() {
    let mut lane = lane();
    let log_end = Lsn::new(0x100);
    let written = id(&mut lane, COMMIT, MAX_ORDINALS - 1);
    lane.highest_written = Some(written);
    assert!(!lane.is_beyond(written, log_end));
    assert!(lane.is_beyond(written + 1, log_end), "somebody else's");

    // The log is asked again, and ends before that.
    lane.forget_written();
    assert!(lane.is_beyond(written, log_end));
}

#[test]
fn an_id_of_another_under_a_name_that_was_to_be_new_says_nothing_of_the_log() {
    let mut lane = lane();
    let log_end = Lsn::new(0x100);
    let pushed = id(&mut lane, COMMIT, 0);
    lane.rename();
    assert!(!lane.is_beyond(pushed, log_end));

    // But one of its own does, when the log is asked again and ends before that.
    lane.highest_of_name = Some(pushed);
    assert!(lane.is_beyond(pushed, log_end));
}

#[test]
fn events_that_wait_do_not_hide_that_the_log_was_put_back() {
    let mut lane = lane();
    let pushed = id(&mut lane, COMMIT, 0);
    lane.txn = (Lsn::new(0x2000), 1);
    assert!(lane.is_beyond(pushed, Lsn::new(0x100)));
}

/// A lane with an event of this id, which was written, and of which nothing is known.
fn with_batch(sequence_id: u64) -> Lane {
    let mut lane = lane();
    lane.in_flight.push_back(Batch::new(sequence_id, None, 1));
    lane.highest_of_name = Some(sequence_id);
    lane
}

#[test]
fn a_refused_event_may_be_passed_once_a_later_one_was_written_or_told() {
    let mut lane = with_batch(7);
    assert!(!lane.may_be_passed(7), "nothing is behind it");
    lane.told = Some(6);
    assert!(!lane.may_be_passed(7), "what was told is in front of it");
    lane.told = Some(7);
    assert!(
        lane.may_be_passed(7),
        "an earlier process may have had the same answer"
    );
    lane.told = None;
    lane.highest_of_name = Some(8);
    assert!(lane.may_be_passed(7));
    assert!(!lane.may_be_passed(5), "it is not here any more");
    // Under a name that was never used nothing was written yet.
    lane.rename();
    assert!(!lane.may_be_passed(7));
}

#[test]
fn an_event_without_an_answer_leaves_doubt_for_others_only_with_one_behind_it_that_is_not_known_as_pushed()
 {
    let mut lane = with_batch(7);
    assert!(!lane.doubt_from(7), "nothing is behind it");
    lane.highest_of_name = Some(8);
    assert!(lane.doubt_from(7));
    // What was pushed before this opening is never stored now.
    lane.told_now = Some(7);
    assert!(!lane.doubt_from(7));
}
