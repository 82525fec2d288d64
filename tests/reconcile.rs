//! Guarantee: a row that the table holds and the stream did not bring is found and published within a scan interval, and nothing counts
//! as delivered before it is.

#[path = "reconcile/coverage.rs"]
mod coverage;
#[path = "reconcile/forms.rs"]
mod forms;
#[path = "reconcile/modes.rs"]
mod modes;
mod support;
#[path = "reconcile/unclean.rs"]
mod unclean;

use std::collections::HashMap;
use std::time::Duration;

use forms::Form;
use support::{Database, Walpost, consume, eventually, on_each_major, servers};

const DEADLINE: Duration = Duration::from_secs(90);
/// So that what is delivered is noted at once.
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");
const INSERT: &str = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                      SELECT 't', 'key-' || n % 7, 'e', to_json(n) FROM generate_series(1, 5) n;";

async fn ids(database: &Database, from: &str) -> Vec<String> {
    let sql = format!("SELECT id::text FROM {from} ORDER BY 1");
    let rows = database.rows(&sql, &[]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

/// How often each id came.
async fn arrived(database: &Database, at_least: usize) -> HashMap<String, usize> {
    let topic = database.topic("t");
    let received = consume(&servers().pulsar_url, &topic, at_least, DEADLINE).await;
    let mut counts = HashMap::new();
    for message in received {
        *counts.entry(message.property("id").to_owned()).or_default() += 1;
    }
    counts
}

/// Each row of the outbox came, and none twice.
async fn once_each(database: &Database) {
    let expected = ids(database, "walpost.outbox").await;
    let arrived = arrived(database, expected.len()).await;
    let wrong: Vec<_> = expected
        .iter()
        .filter(|id| arrived.get(*id) != Some(&1))
        .collect();
    assert!(
        wrong.is_empty(),
        "not once: {wrong:?} of {}",
        expected.len()
    );
    assert_eq!(arrived.len(), expected.len(), "something else came");
}

async fn reconciled(database: &Database, walpost: &mut Walpost) {
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    database.wait_all_sent(DEADLINE).await;
}

/// What hides rows from a stream, and what mends it.
fn ways(major: i32) -> Vec<(&'static str, &'static str)> {
    let mut ways = vec![
        ("SET TABLE other", "SET TABLE walpost.outbox"),
        ("SET (publish = 'update')", "SET (publish = 'insert')"),
    ];
    if major >= 15 {
        ways.push((
            "SET TABLE walpost.outbox WHERE (aggregatetype <> 't')",
            "SET TABLE walpost.outbox",
        ));
    }
    ways
}

async fn rows_that_were_hidden_from_the_stream_come(major: i32) {
    let database = Database::create_on_major(major, "hidden").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE TABLE other (id int PRIMARY KEY)")
        .await;
    for (hide, mend) in ways(major) {
        // GIVEN a stream
        let walpost = database.start(&[OFTEN]).await;
        database.sql(INSERT).await;
        database.wait_all_sent(DEADLINE).await;
        walpost.stop().await;
        // WHEN rows are committed while the publication leaves them out, once while nobody streams
        database
            .sql(&format!("ALTER PUBLICATION walpost {hide}"))
            .await;
        database.sql(INSERT).await;
        database
            .sql(&format!("ALTER PUBLICATION walpost {mend}"))
            .await;
        let mut walpost = database.start(&[OFTEN]).await;
        reconciled(&database, &mut walpost).await;
        // AND once under a running stream (in one transaction, so that nothing but the comparison can tell)
        database
            .sql(&format!(
                "BEGIN; ALTER PUBLICATION walpost {hide}; {INSERT} ALTER PUBLICATION walpost {mend}; COMMIT"
            ))
            .await;
        database.wait_all_sent(DEADLINE).await;
        database.sql(INSERT).await;
        database.wait_all_sent(DEADLINE).await;
        walpost.stop().await;
    }
    // THEN every row came once
    once_each(&database).await;
}

#[tokio::test]
async fn rows_of_a_publication_that_was_dropped_and_made_again_come_once_on_18() {
    // GIVEN a stream that was stopped
    let database = Database::create_on_major(18, "dropped").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    // WHEN rows are committed without a publication (Postgres 18 streams on without an error)
    database.sql("DROP PUBLICATION walpost").await;
    database.sql(INSERT).await;
    database
        .sql("CREATE PUBLICATION walpost FOR TABLE walpost.outbox WITH (publish = 'insert', publish_via_partition_root = true)")
        .await;
    database.sql(INSERT).await;
    // THEN they come, however often the stream has to begin
    let mut walpost = database.walpost(&["run"], &[OFTEN]).spawn();
    eventually(DEADLINE, "every row to be shown as sent", async || {
        if walpost.try_exit().is_some() {
            walpost = database.walpost(&["run"], &[OFTEN]).spawn();
        }
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status <> 'sent'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    once_each(&database).await;
}

async fn partition_with_rows(
    major: i32,
    publication: Option<Form>,
    settings: &[(&str, &str)],
    at_work: &str,
) {
    // GIVEN a partitioned outbox that is streamed, or polled
    let database = Database::create_on_major(major, "attach").await;
    database.init(&["--partition-by", "day"], &[]).await;
    if let Some(form) = publication {
        database.sql(&form.made_anew()).await;
    }
    let settings = [&[database.as_owner(), OFTEN], settings].concat();
    let mut walpost = database.walpost(&["run"], &settings).spawn();
    walpost.wait_for_line(at_work, DEADLINE).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let table = |age: &str| {
        format!(
            "CREATE TABLE walpost.filled (LIKE walpost.outbox INCLUDING DEFAULTS);
             ALTER TABLE walpost.filled ALTER COLUMN seq SET DEFAULT nextval(pg_get_serial_sequence('walpost.outbox', 'seq'));
             INSERT INTO walpost.filled (aggregatetype, aggregateid, type, payload, created_at)
             SELECT 't', 'old-' || n, 'e', to_json(n), date_trunc('day', clock_timestamp()) - interval '{age}' FROM generate_series(1, 5) n"
        )
    };
    let attach = "DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '40 days'; BEGIN
                              ALTER TABLE walpost.filled ALTER COLUMN seq DROP DEFAULT;
                              EXECUTE format('ALTER TABLE walpost.outbox ATTACH PARTITION walpost.filled FOR VALUES FROM (%L) TO (%L)', at, at + interval '1 day');
                          END $$";

    // WHEN a table with rows that are older than the last note becomes a partition
    database.sql(&table("40 days")).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    database.sql(attach).await;

    // THEN its rows are published
    eventually(DEADLINE, "the rows of the partition", async || {
        (arrived(&database, 10).await.len() == 15).then_some(())
    })
    .await;

    // WHEN it goes, gets more rows, and comes back
    database
        .sql("ALTER TABLE walpost.outbox DETACH PARTITION walpost.filled")
        .await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    database
        .sql(
            "INSERT INTO walpost.filled (aggregatetype, aggregateid, type, payload, created_at, seq)
             SELECT 't', 'late-' || n, 'e', to_json(n), date_trunc('day', clock_timestamp()) - interval '40 days', 1000000 + n
             FROM generate_series(1, 3) n",
        )
        .await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    database.sql(attach).await;

    // THEN those are published, and no other row again
    eventually(DEADLINE, "the later rows of the partition", async || {
        (arrived(&database, 25).await.len() == 28).then_some(())
    })
    .await;
    walpost.stop().await;
    once_each(&database).await;
}

async fn a_table_is_given_txid_and_seq(major: i32) {
    // GIVEN a table of one's own without these columns, streamed by walpost, and older rows in it
    let database = Database::create_on_major(major, "given").await;
    database
        .sql("CREATE TABLE plain (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload json)")
        .await;
    let insert = "INSERT INTO plain (aggregatetype, aggregateid, type, payload)
                  SELECT 't', 'key-' || n, 'e', to_json(n) FROM generate_series(1, 5) n";
    let add = "ALTER TABLE plain ADD COLUMN txid xid8 NOT NULL DEFAULT pg_current_xact_id(), ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY";
    let settings = [("WALPOST_OUTBOX_TABLE", "public.plain"), OFTEN];
    database.init(&[], &settings).await;
    let noted = async || {
        database.wait_all_confirmed(DEADLINE).await;
        let sql = "SELECT coalesce((SELECT bool_and(pg_visible_in_snapshot(txid, delivered)) FROM plain), false) FROM walpost.progress";
        eventually(DEADLINE, "every row to be noted", async || {
            database.rows(sql, &[]).await[0]
                .get::<_, bool>(0)
                .then_some(())
        })
        .await;
    };
    let walpost = database.start(&settings).await;
    database.sql(insert).await;
    database.wait_all_confirmed(DEADLINE).await;
    // WHEN the columns are added under the stream
    database.sql(add).await;
    database.sql(insert).await;
    noted().await;
    walpost.stop().await;
    // AND, once more, while nobody streams
    database
        .sql("ALTER TABLE plain DROP COLUMN txid, DROP COLUMN seq")
        .await;
    // (which its operator accepts)
    let accepted = [&settings[..], &[("WALPOST_SLOT_LOST", "restart")]].concat();
    let walpost = database.start(&accepted).await;
    database.sql(insert).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    database.sql(add).await;
    let walpost = database.start(&settings).await;
    database.sql(insert).await;
    noted().await;
    // THEN no row came twice
    let rows = ids(&database, "plain").await;
    let counts = arrived(&database, rows.len()).await;
    assert_eq!(counts.len(), 20);
    assert!(counts.values().all(|times| *times == 1), "{counts:?}");
    // AND from now on what the stream leaves out is found
    database
        .sql(&format!(
            "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {insert}; ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        ))
        .await;
    noted().await;
    walpost.stop().await;
    assert_eq!(arrived(&database, 25).await.len(), 25);
}

async fn a_table_is_added(major: i32) {
    // GIVEN a stream of one table, and another one with rows, which a publication already sends
    let database = Database::create_on_major(major, "added").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    database
        .sql(&format!(
            "CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL); GRANT SELECT ON second TO walpost_connector;
             {}",
            INSERT.replace("walpost.outbox", "second")
        ))
        .await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE second")
        .await;
    database
        .sql(&INSERT.replace("walpost.outbox", "second"))
        .await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    database
        .sql(&INSERT.replace("walpost.outbox", "second"))
        .await;
    // WHEN it is added to the settings
    let both = [
        ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second"),
        OFTEN,
    ];
    let walpost = database.start(&both).await;
    database
        .sql(&INSERT.replace("walpost.outbox", "second"))
        .await;
    // THEN its rows come, and every row of both comes once
    eventually(DEADLINE, "all rows of both tables", async || {
        (arrived(&database, 30).await.len() == 35).then_some(())
    })
    .await;
    walpost.stop().await;
    let counts = arrived(&database, 35).await;
    assert!(counts.values().all(|times| *times == 1), "{counts:?}");
}

async fn an_outbox_is_replaced(major: i32) {
    // GIVEN a stream
    let database = Database::create_on_major(major, "replaced").await;
    database.init(&[], &[]).await;
    let mut walpost = database.walpost(&["run"], &[OFTEN]).spawn();
    walpost.wait_for_line("streaming", DEADLINE).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    // WHEN a table that was filled beside it takes its name
    database
        .sql(&format!(
            "CREATE TABLE walpost.next (LIKE walpost.outbox INCLUDING ALL);
             INSERT INTO walpost.next (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'next-' || n, 'e', to_json(n) FROM generate_series(1, 5) n;
             {INSERT}"
        ))
        .await;
    database.wait_all_sent(DEADLINE).await;
    let old = ids(&database, "walpost.outbox").await;
    database
        .sql(
            "BEGIN;
             DROP VIEW walpost.outbox_status;
             ALTER TABLE walpost.outbox RENAME TO gone;
             ALTER TABLE walpost.next RENAME TO outbox;
             ALTER PUBLICATION walpost SET TABLE walpost.outbox;
             GRANT SELECT ON walpost.outbox TO walpost_connector;
             COMMIT",
        )
        .await;
    database.sql(INSERT).await;
    // THEN the rows of the one and of the other are published; walpost may ask to be started again
    let mut missing = Vec::new();
    eventually(DEADLINE, "all rows of both tables", async || {
        if walpost.try_exit().is_some() {
            walpost = database.walpost(&["run"], &[OFTEN]).spawn();
        }
        let arrived = arrived(&database, 0).await;
        let new = ids(&database, "walpost.outbox").await;
        missing = old
            .iter()
            .chain(&new)
            .filter(|id| !arrived.contains_key(*id))
            .cloned()
            .collect();
        missing.is_empty().then_some(())
    })
    .await;
}

async fn a_stream_ends_and_the_next_one_publishes(major: i32) {
    // GIVEN a stream
    let database = Database::create_on_major(major, "ends").await;
    database.init(&[], &[]).await;
    database
        .sql("CREATE TABLE other (id int PRIMARY KEY)")
        .await;
    for (hide, mend) in ways(major) {
        let mut walpost = database.start(&[OFTEN]).await;
        database.sql(INSERT).await;
        // WHEN the publication leaves rows out, and stays so
        database
            .sql(&format!("ALTER PUBLICATION walpost {hide}"))
            .await;
        database.sql(INSERT).await;
        // THEN it ends soon and names the statement that mends it
        assert_eq!(
            walpost.wait_exit(DEADLINE).await,
            69,
            "{}",
            walpost.output()
        );
        assert!(
            walpost.output().contains("ALTER PUBLICATION"),
            "{}",
            walpost.output()
        );
        // AND once mended, what was left out is published
        database
            .sql(&format!("ALTER PUBLICATION walpost {mend}"))
            .await;
        let walpost = database.start(&[OFTEN]).await;
        database.wait_all_sent(DEADLINE).await;
        walpost.stop().await;
    }
    once_each(&database).await;
}

async fn a_transaction_comes_in_part(major: i32) {
    // GIVEN a stream
    let database = Database::create_on_major(major, "part").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    // WHEN it brings some rows of a transaction and leaves out others
    database
        .sql(&format!(
            "BEGIN; {INSERT} ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        ))
        .await;
    reconciled(&database, &mut walpost).await;
    // THEN all come; those that it brought twice, because the rows of a transaction are not told apart
    let arrived = arrived(&database, 15).await;
    assert_eq!(arrived.len(), 15);
    assert_eq!(arrived.values().filter(|times| **times == 2).count(), 5);
    assert_eq!(arrived.values().max(), Some(&2));
    walpost.stop().await;
}

async fn a_missing_row_cannot_be_published(major: i32) {
    // GIVEN a stream
    let database = Database::create_on_major(major, "unfit").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    // WHEN rows are left out, one of them with a topic that no topic can have
    database
        .sql(&format!(
            "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT}
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic) VALUES ('t', 'k', 'e', '1', 'a//b');
             ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        ))
        .await;
    // THEN that one is kept, and the others arrive
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    eventually(DEADLINE, "nothing to be pending", async || {
        let sql = "SELECT count(*) FROM walpost.outbox_status WHERE status = 'pending'";
        (database.rows(sql, &[]).await[0].get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    let dead = ids(&database, "walpost.outbox_status WHERE status = 'dead'").await;
    assert_eq!(dead.len(), 1, "{dead:?}");
    assert_eq!(arrived(&database, 10).await.len(), 10);
    walpost.stop().await;
}

async fn streamed_rows_are_not_taken_for_missing(major: i32) {
    // GIVEN writers' transactions of every kind: one row, many, copied rows, rows that go in their own transaction
    let database = Database::create_on_major(major, "stays").await;
    database.init(&[], &[]).await;
    let work = async |round: i32| {
        database.sql(INSERT).await;
        database
            .sql(&format!(
                "BEGIN; {INSERT} {INSERT} DELETE FROM walpost.outbox WHERE txid = pg_current_xact_id() AND payload::text = '3'; COMMIT"
            ))
            .await;
        let copied = format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, txid)
             SELECT 't', 'copy-{round}', 'e', to_json({round}), txid FROM walpost.outbox LIMIT 2"
        );
        database.sql(&copied).await;
    };
    // WHEN it is stopped and started between them
    let mut said = String::new();
    for round in 0..4 {
        let mut walpost = database.start(&[OFTEN]).await;
        work(2 * round).await;
        if round % 2 == 0 {
            database.wait_all_sent(DEADLINE).await;
        }
        work(2 * round + 1).await;
        database.wait_all_confirmed(DEADLINE).await;
        walpost.sigterm();
        assert_eq!(walpost.wait_exit(DEADLINE).await, 0);
        said.push_str(&walpost.output());
    }
    let walpost = database.start(&[OFTEN]).await;
    database.wait_all_sent(DEADLINE).await;
    said.push_str(&walpost.output());
    walpost.stop().await;
    // THEN nothing was taken for missing, and nothing came twice
    assert!(!said.contains("did not bring"), "{said}");
    let rows = ids(&database, "walpost.outbox").await;
    let arrived = arrived(&database, rows.len()).await;
    assert!(arrived.values().all(|times| *times == 1), "{arrived:?}");
}

async fn a_partition_and_a_table_come_behind_a_crash(major: i32) {
    // GIVEN a partitioned outbox whose connector was killed
    let database = Database::create_on_major(major, "crashed").await;
    database.init(&["--partition-by", "day"], &[]).await;
    let mut walpost = database.start(&[database.as_owner(), OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.sigkill();
    drop(walpost);
    // WHEN a partition with rows, and a table that is new in the settings, come before the next start
    database
        .sql(
            "CREATE TABLE walpost.filled (LIKE walpost.outbox INCLUDING DEFAULTS);
             INSERT INTO walpost.filled (aggregatetype, aggregateid, type, payload, created_at, seq)
             SELECT 't', 'old-' || n, 'e', to_json(n), date_trunc('day', clock_timestamp()) - interval '40 days', 1000000 + n
             FROM generate_series(1, 5) n;
             DO $$ DECLARE at timestamptz := date_trunc('day', clock_timestamp()) - interval '40 days'; BEGIN
                 EXECUTE format('ALTER TABLE walpost.outbox ATTACH PARTITION walpost.filled FOR VALUES FROM (%L) TO (%L)', at, at + interval '1 day');
             END $$;
             CREATE TABLE second (LIKE walpost.outbox INCLUDING ALL)",
        )
        .await;
    database
        .sql(&INSERT.replace("walpost.outbox", "second"))
        .await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE second")
        .await;
    let both = [
        database.as_owner(),
        ("WALPOST_OUTBOX_TABLE", "walpost.outbox,public.second"),
        OFTEN,
    ];
    let walpost = database.start(&both).await;
    // THEN their rows are published
    eventually(DEADLINE, "the rows of both", async || {
        (arrived(&database, 5).await.len() == 15).then_some(())
    })
    .await;
    walpost.stop().await;
}

async fn a_stop_comes_before_the_stream(major: i32) {
    // GIVEN a stream that stopped in good order, and rows that were left out since
    let database = Database::create_on_major(major, "early").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    database
        .sql(&format!(
            "ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert')"
        ))
        .await;
    // WHEN the next process is stopped while it waits for its broker
    let away = [("WALPOST_PULSAR_URL", "pulsar://127.0.0.1:1"), OFTEN];
    let mut walpost = database.walpost(&["run"], &away).spawn();
    walpost.wait_for_line("cannot reach", DEADLINE).await;
    walpost.sigterm();
    assert_eq!(walpost.wait_exit(DEADLINE).await, 0, "{}", walpost.output());
    // THEN the one after it knows what was streamed: it publishes those that were not, and those only
    let walpost = database.start(&[OFTEN]).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    once_each(&database).await;
}

async fn a_process_is_killed_before_missing_rows_are_published(major: i32) {
    // GIVEN rows that a stream did not bring, and a broker that takes nothing more when that is found
    let database = Database::create_on_major(major, "found").await;
    database.init(&[], &[]).await;
    let proxy = support::Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", proxy.addr());
    let settings = [("WALPOST_PULSAR_URL", &*url), OFTEN];
    let mut walpost = database.start(&settings).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    proxy.hold_upstream_replies(true);
    database
        .sql(&format!(
            "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
        ))
        .await;
    walpost
        .wait_for_line("the stream did not bring rows", DEADLINE)
        .await;
    let gap = "SELECT scan_position -> 'missing' IS NOT NULL FROM walpost.progress WHERE scan_upto IS NOT NULL";
    eventually(DEADLINE, "the gap to be stored", async || {
        let rows = database.rows(gap, &[]).await;
        rows.first()?.get::<_, Option<bool>>(0)?.then_some(())
    })
    .await;
    // WHEN it is killed
    walpost.sigkill();
    drop(walpost);
    proxy.hold_upstream_replies(false);
    // THEN nothing of it counts as delivered, and the next start publishes it
    let pending = ids(&database, "walpost.outbox_status WHERE status = 'pending'").await;
    assert_eq!(pending.len(), 5);
    let walpost = database.start(&[OFTEN]).await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    assert_eq!(arrived(&database, 10).await.len(), 10);
}

async fn a_stream_leaves_rows_out_again_and_again(major: i32) {
    // GIVEN a stream
    let database = Database::create_on_major(major, "again").await;
    database.init(&[], &[]).await;
    let mut walpost = database.start(&[OFTEN]).await;
    let line = walpost.wait_for_line("http://", DEADLINE).await;
    let (_, url) = line.split_once("http://").expect("just looked for");
    let addr: String = url
        .chars()
        .take_while(|c| c.is_ascii_digit() || ".:".contains(*c))
        .collect();
    // WHEN every transaction is left out
    let hidden = format!(
        "BEGIN; ALTER PUBLICATION walpost SET (publish = 'update'); {INSERT} ALTER PUBLICATION walpost SET (publish = 'insert'); COMMIT"
    );
    // THEN readiness says so and where to look
    eventually(DEADLINE, "503", async || {
        database.sql(&hidden).await;
        let said = ready(&addr).await?;
        (said.starts_with("HTTP/1.1 503") && said.contains("publication")).then_some(())
    })
    .await;
    // AND when it brings all again, it is ready again
    eventually(DEADLINE, "200", async || {
        let said = ready(&addr).await?;
        said.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;
    database.wait_all_sent(DEADLINE).await;
    walpost.stop().await;
    once_each(&database).await;
}

async fn ready(addr: &str) -> Option<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(addr).await.ok()?;
    stream
        .write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await
        .ok()?;
    let mut said = String::new();
    stream.read_to_string(&mut said).await.ok()?;
    Some(said)
}

async fn a_copied_row_is_committed_meanwhile(major: i32) {
    // GIVEN a stream whose rows are noted, and a table that is locked
    let database = Database::create_on_major(major, "reconcile").await;
    database.init(&[], &[]).await;
    let walpost = database.start(&[OFTEN]).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let copier = database.connect().await;
    let lock = "BEGIN; LOCK TABLE walpost.outbox IN ACCESS EXCLUSIVE MODE";
    copier.batch_execute(lock).await.expect("a lock");

    // WHEN a transaction is to be noted, the comparison waits for the lock, and a row with the txid of that transaction is copied meanwhile
    let sql = "SELECT pg_current_xact_id()::text";
    let txid: String = database.rows(sql, &[]).await[0].get(0);
    eventually(DEADLINE, "the comparison to wait", async || {
        let sql = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'walpost scanner'
                   AND wait_event_type = 'Lock'";
        (!database.rows(sql, &[]).await.is_empty()).then_some(())
    })
    .await;
    let copy = format!(
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, txid)
         SELECT 't', 'copied', 'e', to_json(n), '{txid}' FROM generate_series(6, 8) n; COMMIT"
    );
    copier.batch_execute(&copy).await.expect("a copy");

    // THEN each row comes once
    database.wait_all_sent(DEADLINE).await;
    database.sql(INSERT).await;
    database.wait_all_sent(DEADLINE).await;
    let said = walpost.output();
    assert!(!said.contains("did not bring rows"), "{said}");
    walpost.stop().await;
    once_each(&database).await;
}

on_each_major! {
    rows_that_the_publication_hides_for_a_while_come_once: rows_that_were_hidden_from_the_stream_come();
    a_partition_that_comes_with_rows_in_it_is_published_by_polling_too: partition_with_rows(None, &[("WALPOST_MODE", "poll")], "polling");
    a_partition_that_comes_with_rows_in_it_is_published_and_one_that_comes_back_only_from_its_going_on:
        partition_with_rows(None, &[], "streaming");
    a_table_that_is_given_txid_and_seq_while_it_is_streamed_is_not_published_again: a_table_is_given_txid_and_seq();
    a_table_that_is_added_to_the_settings_brings_its_older_rows: a_table_is_added();
    an_outbox_that_is_replaced_by_another_of_its_name_loses_nothing: an_outbox_is_replaced();
    a_publication_that_leaves_rows_out_ends_a_running_stream_and_the_next_one_publishes_them: a_stream_ends_and_the_next_one_publishes();
    a_partition_and_a_table_that_come_behind_a_crash_are_published_although_nothing_else_can_be_compared: a_partition_and_a_table_come_behind_a_crash();
    of_a_transaction_that_came_in_part_every_row_is_published: a_transaction_comes_in_part();
    a_missing_row_that_cannot_be_published_becomes_a_straggler_and_the_others_come: a_missing_row_cannot_be_published();
    rows_that_were_streamed_are_not_taken_for_missing_whatever_happens_to_the_process: streamed_rows_are_not_taken_for_missing();
    a_stop_before_there_is_a_stream_keeps_what_the_last_stop_left: a_stop_comes_before_the_stream();
    a_process_that_is_killed_before_missing_rows_are_published_publishes_them_at_its_next_start:
        a_process_is_killed_before_missing_rows_are_published();
    a_stream_that_leaves_rows_out_again_and_again_is_not_ready: a_stream_leaves_rows_out_again_and_again();
    a_copied_row_that_is_committed_while_the_tables_are_compared_is_not_taken_for_missing: a_copied_row_is_committed_meanwhile();
}
