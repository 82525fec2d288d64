//! Slots of which `walpost.progress` knows nothing: what the table has is published up to now, and what the slot brings as well is skipped.

use std::collections::BTreeSet;

use crate::support::{Asked, Database, FakeBroker, Reaction, eventually, on_each_major};
use crate::{DEADLINE, NOTED_SOON, POLL, PUBLISH, arrived, drop_slot, insert, make_slot_by_hand};

/// An outbox and a publication, and no slot.
async fn without_slot(major: i32) -> Database {
    let database = Database::create_on_major(major, "unknown").await;
    database.init(&[], &[POLL]).await;
    database.sql(PUBLISH).await;
    database
}

async fn first_sight(major: i32, progress: &str) {
    // GIVEN rows from before a slot that somebody made, and rows from after it
    let database = without_slot(major).await;
    insert(&database.client, "older").await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "newer").await;
    database.sql(progress).await;

    // WHEN walpost runs there for the first time
    let walpost = database.start(&[NOTED_SOON]).await;
    insert(&database.client, "streamed").await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // THEN all of them come, each once
    let rows = arrived(&database, &["older", "newer", "streamed"]).await;
    assert_eq!(rows.len(), 3, "{rows:?}");
}

const NO_ROW: &str = "DELETE FROM walpost.progress";
const ROW_WITHOUT_SNAPSHOTS: &str =
    "INSERT INTO walpost.progress (slot, system_id, session, timeline)
               SELECT slot_name, system_identifier::text, 'an earlier one', 1
               FROM pg_replication_slots, pg_control_system() WHERE database = current_database()";

async fn a_slot_behind_the_last_look_of_poll_mode(major: i32) {
    // GIVEN a poller that has delivered a row and stopped
    let database = without_slot(major).await;
    let mut poller = database.walpost(&["run"], &[POLL, NOTED_SOON]).spawn();
    poller.wait_for_line("polling", DEADLINE).await;
    insert(&database.client, "polled").await;
    database.wait_all_sent(DEADLINE).await;
    poller.stop().await;

    // WHEN a row is committed, then somebody makes the slot, then another row is committed
    insert(&database.client, "between").await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "behind").await;
    let walpost = database.start(&[NOTED_SOON]).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // THEN each comes once
    let rows = arrived(&database, &["polled", "between", "behind"]).await;
    assert_eq!(rows.len(), 3, "{rows:?}");
}

async fn a_first_start_is_killed(major: i32) {
    // GIVEN a found slot, an older row, and a start whose scan never ends because the broker is away
    let database = without_slot(major).await;
    insert(&database.client, "older").await;
    make_slot_by_hand(&database).await;
    let away = [NOTED_SOON, ("WALPOST_PULSAR_URL", "pulsar://127.0.0.1:1")];
    let mut walpost = database.walpost(&["run"], &away).spawn();
    eventually(DEADLINE, "the slot to be claimed", async || {
        let sql = "SELECT FROM walpost.progress WHERE session IS NOT NULL";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;

    // WHEN the next one starts THEN the row comes
    let walpost = database.start(&[NOTED_SOON]).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    arrived(&database, &["older"]).await;
}

#[tokio::test]
async fn a_row_that_is_deleted_before_the_scan_comes_to_its_table_comes_from_the_slot() {
    // GIVEN a slot that somebody made, and rows of two tables that it brings
    let database = without_slot(15).await;
    database
        .sql("CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON second TO walpost_connector;
              ALTER PUBLICATION walpost ADD TABLE second")
        .await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "first").await;
    let second = "INSERT INTO second (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1') RETURNING id::text";
    let deleted: String = database.rows(second, &[]).await[0].get(0);

    // AND a scan that waits for the receipt of the first table's row
    let broker = FakeBroker::start().await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    let url = broker.url();
    let both = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second");
    let settings = [NOTED_SOON, both, ("WALPOST_PULSAR_URL", &*url)];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > 0).then_some(())
    })
    .await;

    // WHEN the application deletes the second table's row, and the scan goes on
    database.sql("DELETE FROM second").await;
    broker.heal();
    broker.release(|_| {});

    // THEN it comes from the slot, and the other one does not come again
    walpost.wait_for_line("streaming", DEADLINE).await;
    insert(&database.client, "last").await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    let stored: Vec<String> = broker.stored().into_iter().map(|event| event.id).collect();
    assert_eq!(stored.len(), 3, "{stored:?}");
    assert!(stored.contains(&deleted), "{stored:?}");
}

async fn replaced_between_two_tries_of_its_scan(major: i32) {
    // GIVEN a slot that somebody made, and a process that is killed while it reads the table for it
    let database = without_slot(major).await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "older").await;
    let broker = FakeBroker::start().await;
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Ignore,
        _ => Reaction::Obey,
    });
    let url = broker.url();
    // (without the comparison, which would find the rows)
    let settings = [
        NOTED_SOON,
        ("WALPOST_RECONCILE", "off"),
        ("WALPOST_PULSAR_URL", &*url),
    ];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > 0).then_some(())
    })
    .await;
    walpost.sigkill();
    walpost.wait_exit(DEADLINE).await;
    broker.heal();

    // WHEN the slot is replaced behind rows that it has and that the scan does not read
    insert(&database.client, "between").await;
    drop_slot(&database).await;
    make_slot_by_hand(&database).await;
    insert(&database.client, "behind").await;
    let walpost = database.start(&settings).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;

    // THEN they come
    let stored: BTreeSet<String> = broker.stored().into_iter().map(|event| event.id).collect();
    let rows = database.rows("SELECT id::text FROM walpost.outbox", &[]);
    let expected = rows.await.iter().map(|row| row.get(0)).collect();
    assert_eq!(stored, expected);
}

on_each_major! {
    a_slot_that_is_replaced_between_two_tries_of_its_scan_is_noticed: replaced_between_two_tries_of_its_scan();
    a_slot_that_was_there_before_walpost_is_read_with_the_table_and_no_older_row_counts_as_delivered: first_sight(NO_ROW);
    a_row_without_snapshots_is_no_better_than_none: first_sight(ROW_WITHOUT_SNAPSHOTS);
    rows_between_the_last_look_of_poll_mode_and_a_slot_made_by_hand_arrive: a_slot_behind_the_last_look_of_poll_mode();
    a_first_start_that_is_killed_in_its_scan_does_not_take_the_slot_for_known: a_first_start_is_killed();
}
