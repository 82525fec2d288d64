//! A table that poll mode or the scan of a gap cannot read.

use crate::support::try_admin;
use crate::*;

const POLL: (&str, &str) = ("WALPOST_MODE", "poll");
/// The one that breaks comes first.
const TABLES: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "public.bad,walpost.outbox");
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "100ms");

/// What is done to the table `public.bad`.
struct Breakage {
    /// In place of what was there, with a row `11` in it.
    breaks: &'static str,
    mends: &'static str,
    /// What the reason says.
    says: &'static str,
}

const ROW: &str = "INSERT INTO public.bad (aggregatetype, aggregateid, type, payload) VALUES ('b', 'k', 'e', '11')";

const BREAKAGES: [Breakage; 6] = [
    Breakage {
        breaks: "REVOKE SELECT ON public.bad FROM walpost_connector",
        mends: "GRANT SELECT ON public.bad TO walpost_connector",
        says: "permission denied",
    },
    Breakage {
        breaks: "ALTER TABLE public.bad RENAME COLUMN payload TO gone",
        mends: "ALTER TABLE public.bad RENAME COLUMN gone TO payload",
        says: "payload",
    },
    Breakage {
        breaks: "ALTER TABLE public.bad RENAME COLUMN seq TO gone",
        mends: "ALTER TABLE public.bad RENAME COLUMN gone TO seq",
        says: "public.bad is missing",
    },
    Breakage {
        breaks: "ALTER TABLE public.bad RENAME TO away",
        mends: "ALTER TABLE public.away RENAME TO bad",
        says: "public.bad is missing",
    },
    Breakage {
        breaks: "UPDATE public.bad SET txid = '4000000000000' WHERE payload = '11'",
        mends: "UPDATE public.bad SET txid = pg_current_xact_id() WHERE payload = '11'",
        says: "copied from another one",
    },
    Breakage {
        // Behind the row 11, which is published.
        breaks: "INSERT INTO public.bad (aggregatetype, aggregateid, type, payload, seq) OVERRIDING SYSTEM VALUE
                 VALUES ('b', 'k', 'e', '12', 5000), ('b', 'k', 'e', '13', 5000)",
        mends: "UPDATE public.bad SET seq = DEFAULT WHERE payload = '13'",
        says: "have the seq 5000",
    },
];

async fn prepared(mode: &[(&str, &str)]) -> Database {
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], mode).await;
    database
        .sql(
            "CREATE TABLE public.bad (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload text,
                                      txid xid8 NOT NULL DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY);
             GRANT SELECT ON public.bad TO walpost_connector",
        )
        .await;
    database
}

/// Rows of public.bad that do not count as delivered.
const UNDELIVERED: &str = "public.bad b, walpost.progress p WHERE NOT coalesce(pg_visible_in_snapshot(b.txid, p.delivered), false)";

#[tokio::test]
async fn a_table_that_polling_cannot_read_holds_up_no_other_and_comes_when_it_can_be_read() {
    for broken in BREAKAGES {
        // GIVEN a poller of two tables
        let database = prepared(&[POLL]).await;
        let settings = [POLL, TABLES, OFTEN];
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        let addr = addr_of(&mut walpost).await;
        walpost.wait_for_line("polling", DEADLINE).await;
        insert(&database, 1..=3).await;
        database.sql(&ROW.replace("11", "10")).await;
        wait_count(&database, UNDELIVERED, 0).await;

        // WHEN one of them breaks while no look is possible, and rows are committed to both
        let breaks = match broken.breaks {
            with_column if with_column.contains("COLUMN") || with_column.contains("RENAME") => {
                format!("{ROW}; {with_column}")
            }
            breaks => format!("BEGIN; LOCK TABLE public.bad; {ROW}; {breaks}; COMMIT"),
        };
        database.sql(&breaks).await;
        insert(&database, 4..=6).await;

        // THEN those of the other arrive, look after look
        assert_eq!(
            numbers(&database.topic("t"), 6).await,
            [1, 2, 3, 4, 5, 6],
            "{}",
            broken.breaks
        );
        for more in 7..=8 {
            insert(&database, more..=more).await;
            let expected: Vec<u32> = (1..=more).collect();
            let arrived = numbers(&database.topic("t"), expected.len()).await;
            assert_eq!(arrived, expected, "{}", broken.breaks);
        }

        // AND it is told which one does not, and why
        let said = wait_left(&addr, 1).await;
        assert!(
            said.contains("public.bad") && said.contains(broken.says),
            "{said}"
        );
        let ready = async || try_admin(&format!("http://{addr}"), "GET", "/readyz", "").await;
        eventually(DEADLINE, "not to be ready", async || {
            let why = ready().await.err()?;
            why.contains("cannot be read").then_some(())
        })
        .await;
        eventually(DEADLINE, "the note that check reads", async || {
            let check = database.walpost(&["check"], &settings).run(DEADLINE);
            let (_, said) = check.await;
            (said.contains("left undone") && said.contains(broken.says)).then_some(())
        })
        .await;
        let warned = walpost.output().matches("the table cannot be read").count();
        assert_eq!(warned, 1, "{}", walpost.output());

        // AND nothing of it counts as delivered, also for a process that comes after one that was killed
        walpost.sigkill();
        walpost.wait_exit(DEADLINE).await;
        let table = if broken.breaks.contains("TO away") {
            "public.away"
        } else {
            "public.bad"
        };
        assert!(count(&database, &UNDELIVERED.replace("public.bad", table)).await > 0);

        // WHEN it is mended THEN each row has come once
        database.sql(broken.mends).await;
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        walpost.wait_for_line("polling", DEADLINE).await;
        wait_count(&database, UNDELIVERED, 0).await;
        insert(&database, 9..=9).await;
        let expected: Vec<u32> = (1..=9).collect();
        assert_eq!(
            numbers(&database.topic("t"), 9).await,
            expected,
            "{}",
            broken.breaks
        );
        let bad: &[u32] = if broken.says.contains("5000") {
            &[10, 11, 12, 13]
        } else {
            &[10, 11]
        };
        assert_eq!(
            numbers(&database.topic("b"), bad.len()).await,
            bad,
            "{}",
            broken.breaks
        );
        walpost.stop().await;
    }
}

#[tokio::test]
async fn a_table_that_is_mended_under_a_running_poller_comes_and_it_is_ready_again() {
    let database = prepared(&[POLL]).await;
    let settings = [POLL, TABLES, OFTEN];
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    let addr = addr_of(&mut walpost).await;
    walpost.wait_for_line("polling", DEADLINE).await;
    let broken = &BREAKAGES[5];
    database
        .sql(&format!("BEGIN; {ROW}; {}; COMMIT", broken.breaks))
        .await;
    wait_left(&addr, 1).await;
    for number in 1..=3 {
        insert(&database, number..=number).await;
        wait_count(
            &database,
            "walpost.progress WHERE scan_position -> 'ahead' -> 'walpost.outbox' IS NOT NULL
             AND pg_visible_in_snapshot((SELECT max(txid) FROM walpost.outbox), scan_upto)",
            1,
        )
        .await;
    }
    database.sql(broken.mends).await;
    wait_left(&addr, 0).await;
    wait_count(&database, UNDELIVERED, 0).await;
    insert(&database, 4..=4).await;
    assert_eq!(numbers(&database.topic("t"), 4).await, [1, 2, 3, 4]);
    assert_eq!(numbers(&database.topic("b"), 3).await, [11, 12, 13]);
    eventually(DEADLINE, "to be ready", async || {
        let said = try_admin(&format!("http://{addr}"), "GET", "/readyz", "").await;
        said.is_ok().then_some(())
    })
    .await;
    walpost.stop().await;
}

#[tokio::test]
async fn the_rows_of_a_gap_come_although_another_table_cannot_be_read() {
    for broken in [&BREAKAGES[0], &BREAKAGES[4], &BREAKAGES[5]] {
        // GIVEN rows from before the slot in two tables, the first of which cannot be read
        let database = prepared(&[POLL]).await;
        insert(&database, 1..=3).await;
        database
            .sql(&format!("BEGIN; {ROW}; {}; COMMIT", broken.breaks))
            .await;
        database.init(&[], &[TABLES]).await;
        // (`init` grants what is missing.)
        database
            .sql(broken.breaks.split("INSERT").next().unwrap_or_default())
            .await;

        // WHEN walpost runs, twice THEN those of the other one come, once, and it says why it does not stream
        for _ in 0..2 {
            let (code, said) = database.walpost(&["run"], &[TABLES]).run(DEADLINE).await;
            assert!(code == 69 && said.contains(broken.says), "{code} {said}");
            assert_eq!(numbers(&database.topic("t"), 3).await, [1, 2, 3]);
        }

        // WHEN it is mended THEN its rows come, and the stream begins
        database.sql(broken.mends).await;
        let walpost = database.start(&[TABLES]).await;
        insert(&database, 4..=4).await;
        assert_eq!(numbers(&database.topic("t"), 4).await, [1, 2, 3, 4]);
        let bad: &[u32] = if broken.says.contains("5000") {
            &[11, 12, 13]
        } else {
            &[11]
        };
        assert_eq!(numbers(&database.topic("b"), bad.len()).await, bad);
        walpost.stop().await;
    }
}

#[tokio::test]
async fn rows_whose_mark_was_lost_are_marked_although_another_table_cannot_be_read() {
    // A table that no look for unmarked rows can read either, and one in which such a look finds a row.
    for broken in [&BREAKAGES[0], &BREAKAGES[5]] {
        // GIVEN a poller that marks rows of two tables, the first of which breaks
        let database = prepared(&[POLL, MARK]).await;
        database
            .sql(
                "ALTER TABLE public.bad ADD COLUMN created_at timestamptz NOT NULL DEFAULT clock_timestamp(), ADD COLUMN sent_at timestamptz;
                 GRANT UPDATE (sent_at) ON public.bad TO walpost_connector",
            )
            .await;
        let settings = [
            POLL,
            MARK,
            TABLES,
            OFTEN,
            ("WALPOST_STRAGGLER_AGE", "200ms"),
        ];
        let mut walpost = database.walpost(&["run"], &settings).spawn();
        walpost.wait_for_line("polling", DEADLINE).await;
        insert(&database, 1..=3).await;
        wait_count(&database, UNMARKED, 0).await;
        let breaks = format!(
            "BEGIN; LOCK TABLE public.bad; {ROW}; {}; COMMIT",
            broken.breaks
        );
        database.sql(&breaks).await;
        walpost.wait_for_line("cannot be read", DEADLINE).await;

        // WHEN marks of the other one are lost
        database
            .sql("BEGIN; SET LOCAL walpost.mend = on; UPDATE walpost.outbox SET sent_at = NULL; COMMIT")
            .await;

        // THEN they are made again
        wait_count(&database, UNMARKED, 0).await;

        // AND once it is mended, the rows of the first one are marked, and came once
        database.sql(broken.mends).await;
        wait_count(&database, "public.bad WHERE sent_at IS NULL", 0).await;
        let bad: &[u32] = if broken.says.contains("5000") {
            &[11, 12, 13]
        } else {
            &[11]
        };
        assert_eq!(numbers(&database.topic("b"), bad.len()).await, bad);
        walpost.stop().await;
    }
}
