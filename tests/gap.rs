//! Guarantee: what the log cannot bring comes from the table. Rows from before the slot, and rows committed while the slot was
//! lost, gone or somebody else's, reach their topic before the stream goes on; rows outside of the gap are not sent again.

mod support;

use std::collections::HashSet;
use std::time::Duration;

use support::{
    Committed, Database, Load, Proxy, Received, Servers, Walpost, consume, eventually, insert_many,
    on_each_major, servers,
};

const DEADLINE: Duration = Duration::from_secs(90);
const PEAK_RSS_KIB: u64 = 96 * 1024;
const OLD_ROWS: i64 = 300_000;
/// As text they are more than that memory.
const MILLION_ROWS: i64 = 1_000_000;
/// For a million of anything on a busy machine.
const MILLION_DEADLINE: Duration = Duration::from_secs(240);
/// So that what is delivered is noted at once.
const NOTED_SOON: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");

async fn received(database: &Database, expected: usize) -> Vec<Received> {
    let topic = Load::topic(database);
    consume(&servers().pulsar_url, &topic, expected, MILLION_DEADLINE).await
}

async fn drop_slot(database: &Database) {
    let sql = "SELECT pg_drop_replication_slot($1::text::name)";
    // A walsender lets go a moment after its client did.
    eventually(DEADLINE, "the slot to be free", async || {
        database.client.execute(sql, &[&database.slot]).await.ok()
    })
    .await;
}

/// Waits until the status of every row is "sent".
async fn wait_all_noted(database: &Database) {
    eventually(DEADLINE, "every row to be known as sent", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        let rows = database.rows(sql, &[]).await;
        (rows[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
}

/// A prepared database whose rows so far are delivered, known as such, and nobody streams.
async fn delivered() -> Database {
    let database = Database::create("gap").await;
    Load::prepare(&database).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    for key in ["a", "b", "c"] {
        insert_many(&database.client, key, 200).await;
    }
    wait_all_noted(&database).await;
    walpost.stop().await;
    database
}

/// Runs until everything is confirmed, and expects each row once.
async fn recovers(database: &Database, says: &str) {
    let mut walpost = database.start(&[NOTED_SOON]).await;
    walpost.wait_for_line(says, DEADLINE).await;
    insert_many(&database.client, "a", 50).await;
    finish(database, walpost).await;
}

async fn finish(database: &Database, walpost: Walpost) {
    database.wait_all_confirmed(DEADLINE).await;
    wait_all_noted(database).await;
    walpost.stop().await;
    let committed = Committed::read(database).await;
    committed.assert_exactly_once(&received(database, committed.len()).await);
}

#[tokio::test]
async fn a_million_rows_from_before_the_slot_come_once_and_before_the_stream_while_writers_go_on() {
    // GIVEN an outbox with many rows, writers at work, and no slot
    let database = Database::create("older").await;
    Load::prepare(&database).await;
    drop_slot(&database).await;
    database.sql("DELETE FROM walpost.progress").await;
    insert_many(&database.client, "old", MILLION_ROWS).await;
    let load = Load::start(&database, 24);
    load.more(100).await;

    // WHEN the slot is made and walpost starts, while they go on
    database.init(&[], &[]).await;
    load.more(100).await;
    let mut walpost = database.walpost(&["run"], &[NOTED_SOON]).spawn();
    walpost.wait_for_line("streaming", MILLION_DEADLINE).await;
    let peak_kib = walpost.peak_rss_kib();
    load.more(100).await;
    load.stop();

    // THEN every row comes once, in order, and memory stays bounded
    assert!(peak_kib < PEAK_RSS_KIB, "peak RSS is {peak_kib} KiB");
    finish(&database, walpost).await;
}

#[tokio::test]
async fn a_scan_that_is_killed_goes_on_where_it_was_and_doubles_nothing_where_the_broker_deduplicates()
 {
    // GIVEN a gap
    let mut database = Database::create("killed").await;
    database.deduplicate(servers()).await;
    Load::prepare(&database).await;
    drop_slot(&database).await;
    insert_many(&database.client, "old", OLD_ROWS).await;
    database.init(&[], &[]).await;

    // WHEN the process is killed each time the scan has come a little further
    let scanned = async || {
        let sql = "SELECT coalesce((scan_position->'tables'->>'walpost.outbox')::bigint, 0) FROM walpost.progress";
        database.rows(sql, &[]).await[0].get::<_, i64>(0)
    };
    let mut kills = 0;
    for _ in 0..5 {
        let before = scanned().await;
        let mut walpost = database.walpost(&["run"], &[]).spawn();
        let further = eventually(DEADLINE, "the scan to go on", async || {
            let is_streaming = walpost.output().contains("streaming");
            (is_streaming || scanned().await > before).then_some(!is_streaming)
        })
        .await;
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        kills += usize::from(further);
    }
    assert!(kills > 0, "the scan was over before it could be killed");

    // THEN every row is there once
    let walpost = database.start(&[NOTED_SOON]).await;
    finish(&database, walpost).await;
}

#[tokio::test]
async fn a_slot_that_was_dropped_while_nobody_ran_is_made_anew_and_the_rows_in_between_come() {
    let database = delivered().await;
    drop_slot(&database).await;
    insert_many(&database.client, "b", 300).await;
    recovers(&database, "it does not exist any more").await;
}

#[tokio::test]
async fn a_slot_that_somebody_made_anew_is_noticed_and_the_rows_in_between_come() {
    let database = delivered().await;
    drop_slot(&database).await;
    insert_many(&database.client, "b", 300).await;
    let create = "SELECT pg_create_logical_replication_slot($1::text::name, 'pgoutput')";
    database.rows(create, &[&database.slot]).await;
    insert_many(&database.client, "c", 10).await;
    recovers(&database, "somebody advanced it, or made it anew").await;
}

#[tokio::test]
async fn a_slot_that_is_dropped_under_the_running_stream_is_made_anew_and_the_rows_in_between_come()
{
    // GIVEN a stream whose rows are known as delivered
    let database = delivered().await;
    let mut walpost = database.start(&[NOTED_SOON]).await;

    // WHEN somebody ends its walsender and drops the slot before it is back
    database
        .sql(&format!(
            "DO $$ DECLARE slot name := '{0}'; BEGIN
                 PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = slot;
                 WHILE clock_timestamp() < now() + interval '60 s' LOOP
                     BEGIN
                         PERFORM pg_drop_replication_slot(slot);
                         RETURN;
                     EXCEPTION WHEN object_in_use THEN PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = slot;
                     END;
                     PERFORM pg_sleep(0.001);
                 END LOOP;
                 RAISE EXCEPTION 'the slot could not be dropped';
             END $$",
            database.slot
        ))
        .await;
    insert_many(&database.client, "b", 300).await;
    walpost
        .wait_for_line("it does not exist any more", DEADLINE)
        .await;

    // THEN they come, once
    insert_many(&database.client, "c", 20).await;
    eventually(DEADLINE, "a new slot", async || {
        database.walsender_pid(&database.slot).await
    })
    .await;
    finish(&database, walpost).await;
}

#[tokio::test]
async fn a_slot_that_fell_behind_max_slot_wal_keep_size_is_made_anew_and_the_rows_in_between_come()
{
    // GIVEN a server that keeps little log, and nobody who streams
    let own = Servers::own("keep", &["--no-pulsar"]);
    let database = Database::create_on(&own, "keep").await;
    Load::prepare(&database).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    insert_many(&database.client, "a", 200).await;
    wait_all_noted(&database).await;
    walpost.stop().await;
    for setting in [
        "max_slot_wal_keep_size = '16MB'",
        "max_wal_size = '64MB'",
        "min_wal_size = '32MB'",
    ] {
        database.sql(&format!("ALTER SYSTEM SET {setting}")).await;
    }
    database.sql("SELECT pg_reload_conf()").await;

    // WHEN more is written than that
    insert_many(&database.client, "b", 300).await;
    eventually(DEADLINE, "the slot to be lost", async || {
        database
            .sql("CREATE TABLE filler AS SELECT repeat(md5(n::text), 30) FROM generate_series(1, 20000) n; DROP TABLE filler")
            .await;
        database.sql("SELECT pg_switch_wal()").await;
        database.sql("CHECKPOINT").await;
        let sql = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1";
        let rows = database.rows(sql, &[&database.slot]).await;
        (rows[0].get::<_, Option<&str>>(0) == Some("lost")).then_some(())
    })
    .await;

    // THEN all of it comes, once
    recovers(&database, "it is lost").await;
}

#[tokio::test]
async fn a_lost_slot_is_an_error_where_the_operator_wants_it_so() {
    let database = delivered().await;
    drop_slot(&database).await;
    let settings = [("WALPOST_SLOT_LOST", "fail")];
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("WALPOST_SLOT_LOST=recover"), "{said}");
}

#[tokio::test]
async fn progress_of_another_cluster_is_refused_and_can_be_adopted() {
    // GIVEN a copy whose progress is from elsewhere
    let database = delivered().await;
    database
        .sql("UPDATE walpost.progress SET system_id = '4711'")
        .await;

    // THEN it is refused, with the statements that help
    let (code, said) = database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("4711"), "{said}");
    let (_, adopt) = said.split_once("published: ").expect("a statement");
    let (adopt, _) = adopt.split_once("; to publish").expect("its end");

    // AND the one that adopts it lets it go on, without a repeat
    database.sql(adopt).await;
    let walpost = database.start(&[NOTED_SOON]).await;
    insert_many(&database.client, "a", 10).await;
    finish(&database, walpost).await;
}

#[tokio::test]
async fn a_position_that_somebody_edited_is_refused_with_what_resets_it() {
    let database = delivered().await;
    database
        .sql("UPDATE walpost.progress SET scan_position = '{\"done\": 7}'")
        .await;
    let (code, said) = database.walpost(&["run"], &[]).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("scan_position = NULL"), "{said}");
}

#[tokio::test]
async fn what_scan_and_stream_both_have_comes_once_also_where_the_scan_has_deleted_it() {
    // GIVEN a lost slot, and its making, which waits for a transaction; walpost hears nothing of its end
    let delete = ("WALPOST_AFTER_PUBLISH", "delete");
    let database = Database::create("gap").await;
    database.init(&[], &[delete]).await;
    Load::counters(&database).await;
    let walpost = database.start(&[delete, NOTED_SOON]).await;
    insert_many(&database.client, "a", 10).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    drop_slot(&database).await;
    let other = database.connect().await;
    let begun = "BEGIN; SELECT pg_current_xact_id()";
    other.batch_execute(begun).await.expect("a transaction");
    let proxy = Proxy::start(&servers().postgres_addr);
    let url = database.url_through(&proxy.addr());
    let settings = [delete, NOTED_SOON, ("WALPOST_POSTGRES_URL", &*url)];
    let walpost = database.walpost(&["run"], &settings).spawn();
    let slot_is = async |what: &'static str| {
        let sql = format!("SELECT FROM pg_replication_slots WHERE slot_name = $1 AND {what}");
        eventually(DEADLINE, what, async || {
            (!database.rows(&sql, &[&database.slot]).await.is_empty()).then_some(())
        })
        .await;
    };
    slot_is("confirmed_flush_lsn IS NULL").await;
    proxy.hold_upstream_replies(true);
    other.batch_execute("COMMIT").await.expect("its end");
    slot_is("confirmed_flush_lsn IS NOT NULL").await;

    // WHEN rows are committed that the slot has, and that walpost takes for the gap's
    insert_many(&database.client, "b", 20_000).await;
    proxy.hold_upstream_replies(false);

    // THEN each comes once, and goes
    eventually(DEADLINE, "the outbox to be empty", async || {
        let rows = database.rows("SELECT FROM walpost.outbox LIMIT 1", &[]);
        rows.await.is_empty().then_some(())
    })
    .await;
    database.wait_all_confirmed(DEADLINE).await;
    let said = walpost.output();
    walpost.stop().await;
    assert!(said.contains("it does not exist any more"), "{said}");
    let messages = received(&database, 20_010).await;
    let ids: HashSet<&str> = messages.iter().map(|m| m.property("id")).collect();
    assert_eq!((ids.len(), messages.len()), (20_010, 20_010));
}

async fn a_making_by_hand_was_cut_short(major: i32) {
    // GIVEN rows, and a slot from the file of sql/ whose last statement was not run
    let database = Database::create_on_major(major, "gap").await;
    Load::prepare(&database).await;
    drop_slot(&database).await;
    database.sql("DELETE FROM walpost.progress").await;
    insert_many(&database.client, "b", 300).await;
    let sql = include_str!("../sql/11_slot.sql");
    let sql = sql.replace("/*:slot*/ 'walpost'", &format!("'{}'", database.slot));
    let (cut, _last) = sql
        .split_once("-- Writes only to the row that was made above")
        .expect("its last statement");
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(&database.slot);
    std::fs::write(&file, cut).expect("a file");
    let psql = std::process::Command::new("psql")
        .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-d"])
        .args([&*database.socket_url, "-f"])
        .arg(&file)
        .status();
    assert!(psql.expect("psql is installed with Postgres").success());

    // WHEN walpost runs THEN
    recovers(&database, "its making was cut short").await;
}

on_each_major! {
    a_slot_whose_making_by_hand_was_cut_short_is_kept_and_older_rows_come: a_making_by_hand_was_cut_short();
}
