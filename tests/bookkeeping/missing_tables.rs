//! A table that is missing for a moment.

use std::collections::HashSet;

use crate::support::{Asked, Database, FakeBroker, Reaction, eventually};
use crate::{DEADLINE, NOTED_SOON, POLL, arrived, drop_slot, insert, wait_all_sent};

const TABLES: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.other");

async fn a_table_is_away_for_a_moment(major: i32) {
    // GIVEN two tables in poll mode
    let database = Database::create_on_major(major, "moment").await;
    database.init(&[], &[POLL]).await;
    database
        .sql("CREATE TABLE public.other (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON public.other TO walpost_connector")
        .await;
    let settings = [POLL, NOTED_SOON, TABLES];
    let start = async || {
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        walpost.wait_for_line("polling", DEADLINE).await;
        walpost
    };
    let mut walpost = start().await;
    insert(&database.client, "first").await;
    wait_all_sent(&database).await;

    // WHEN one of them is renamed, rows are committed to both, and it comes back when the poller has noticed
    database
        .sql("ALTER TABLE public.other RENAME TO away")
        .await;
    database
        .sql("INSERT INTO public.away (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '\"away\"')")
        .await;
    insert(&database.client, "here").await;
    let sent = "SELECT FROM walpost.outbox_status WHERE status = 'sent' OFFSET 1";
    eventually(DEADLINE, "a look, or a word", async || {
        let ended = walpost.try_exit().is_some();
        let noticed = ended || walpost.output().contains("public.other is missing");
        let noted = !database.rows(sent, &[]).await.is_empty();
        (noticed || noted).then_some(())
    })
    .await;
    database
        .sql("ALTER TABLE public.away RENAME TO other")
        .await;
    if walpost.try_exit().is_some() {
        walpost = start().await;
    }

    // THEN both rows arrive
    insert(&database.client, "last").await;
    wait_all_sent(&database).await;
    if walpost.try_exit().is_some() {
        walpost = start().await;
        wait_all_sent(&database).await;
    }
    walpost.stop().await;
    arrived(&database, &["first", "away", "here", "last"]).await;
}

#[tokio::test]
async fn a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(15).await;
}

#[tokio::test]
async fn on_postgres_14_a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(14).await;
}

#[tokio::test]
async fn on_postgres_18_a_look_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_for_a_moment(18).await;
}

/// When the table is renamed in a scan of two.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Away {
    BeforeItsScan,
    BehindItsScan,
}

async fn a_table_is_away_during_a_gap_scan(major: i32, away: Away) {
    // GIVEN two tables with a row each that no slot brings
    let database = Database::create_on_major(major, "moment").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE TABLE public.other (LIKE walpost.outbox INCLUDING ALL)")
        .await;
    let tables = match away {
        Away::BeforeItsScan => "walpost.outbox,public.other",
        Away::BehindItsScan => "public.other,walpost.outbox",
    };
    let tables = ("WALPOST_OUTBOX_TABLE", tables);
    database.init(&[], &[tables]).await;
    drop_slot(&database).await;
    insert(&database.client, "here").await;
    database
        .sql("INSERT INTO public.other (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', '1')")
        .await;

    // AND a scan that waits for the receipt of walpost.outbox
    let broker = FakeBroker::start().await;
    let before = usize::from(away == Away::BehindItsScan);
    broker.script(Asked::Send, vec![Reaction::Obey; before]);
    broker.script_rest(|asked, _| match asked {
        Asked::Send => Reaction::Hold,
        _ => Reaction::Obey,
    });
    let settings = [NOTED_SOON, tables, ("WALPOST_PULSAR_URL", &*broker.url())];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    eventually(DEADLINE, "the scan to wait", async || {
        (broker.count(Asked::Send) > before).then_some(())
    })
    .await;

    // WHEN the other one is renamed, and the scan goes on
    database
        .sql("ALTER TABLE public.other RENAME TO away")
        .await;
    broker.heal();
    broker.release(|_| {});
    let covered = "SELECT count(*) FROM public.away, walpost.progress WHERE pg_visible_in_snapshot(txid, delivered)";
    let covered = async || -> i64 { database.rows(covered, &[]).await[0].get(0) };
    eventually(DEADLINE, "a word, or a note", async || {
        let told =
            walpost.try_exit().is_some() || walpost.output().contains("public.other is missing");
        (told || covered().await > 0).then_some(())
    })
    .await;

    // THEN its row does not count as delivered
    assert_eq!(covered().await, 0, "{}", walpost.output());

    // AND it arrives when the table is back, with all others
    database
        .sql("ALTER TABLE public.away RENAME TO other")
        .await;
    insert(&database.client, "last").await;
    let noted = "SELECT bool_and(pg_visible_in_snapshot(o.txid, p.delivered)) IS TRUE FROM walpost.progress p,
                 (SELECT txid FROM public.other UNION ALL SELECT txid FROM walpost.outbox) o";
    eventually(DEADLINE, "every row to be noted", async || {
        if walpost.try_exit().is_some() {
            walpost = database.walpost(&["run"], &settings).spawn();
        }
        database.rows(noted, &[]).await[0]
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    walpost.stop().await;
    let stored: HashSet<String> = broker.stored().into_iter().map(|event| event.id).collect();
    let ids = "SELECT id::text FROM public.other UNION ALL SELECT id::text FROM walpost.outbox";
    let ids = database.rows(ids, &[]).await;
    assert_eq!(stored, ids.iter().map(|row| row.get(0)).collect());
}

#[tokio::test]
async fn a_gap_scan_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_during_a_gap_scan(15, Away::BeforeItsScan).await;
    a_table_is_away_during_a_gap_scan(15, Away::BehindItsScan).await;
}

#[tokio::test]
async fn on_postgres_14_a_gap_scan_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_during_a_gap_scan(14, Away::BeforeItsScan).await;
    a_table_is_away_during_a_gap_scan(14, Away::BehindItsScan).await;
}

#[tokio::test]
async fn on_postgres_18_a_gap_scan_that_does_not_find_a_table_delivers_nothing() {
    a_table_is_away_during_a_gap_scan(18, Away::BeforeItsScan).await;
    a_table_is_away_during_a_gap_scan(18, Away::BehindItsScan).await;
}
