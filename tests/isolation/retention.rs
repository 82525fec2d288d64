//! Rows and partitions that retention cannot remove, and partitions that cannot be made.

use crate::*;

const RETENTION: (&str, &str) = ("WALPOST_RETENTION", "2s");
const OFTEN: (&str, &str) = ("WALPOST_SCAN_INTERVAL", "200ms");

async fn insert_old(database: &Database, payloads: std::ops::RangeInclusive<u32>, age: &str) {
    database
        .sql(&format!(
            "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, created_at)
             SELECT 't', 'k', 'e', i::text, clock_timestamp() - interval '{age}' FROM generate_series({}, {}) i",
            payloads.start(),
            payloads.end()
        ))
        .await;
}

#[tokio::test]
async fn a_row_that_retention_cannot_delete_holds_up_no_other_and_goes_when_it_can() {
    // GIVEN old rows; one under a foreign key, one that a trigger refuses, one that it keeps without an error
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[RETENTION]).await;
    database
        .sql(
            "CREATE TABLE child (outbox uuid REFERENCES walpost.outbox (id));
             CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF old.payload = '600' THEN RAISE 'not this one'; END IF;
                 IF old.payload = '2000' THEN RETURN NULL; END IF;
                 RETURN old;
             END $$;
             CREATE TRIGGER refuse BEFORE DELETE ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await;
    let mut walpost = database.start(&[OFTEN]).await;
    let _first = addr_of(&mut walpost).await;
    insert_old(&database, 1..=3000, "2h").await;
    database
        .sql("INSERT INTO child SELECT id FROM walpost.outbox WHERE payload = '1500'")
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // WHEN retention walks: THEN all others go, and it is told which do not, and why
    let mut walpost = database.start(&[RETENTION, OFTEN]).await;
    let addr = addr_of(&mut walpost).await;
    // Something passes, so that it is noted what is delivered.
    insert_old(&database, 3001..=3001, "2h").await;
    wait_count(&database, ROWS, 3).await;
    let said = eventually(DEADLINE, "the reasons", async || {
        let said = left(&addr).await.to_string();
        (said.contains("not this one")
            && said.contains("foreign key")
            && said.contains("without an error"))
        .then_some(said)
    })
    .await;
    assert!(said.contains("walpost.outbox"), "{said}");

    // WHEN they can: THEN they go
    database
        .sql("DELETE FROM child; DROP TRIGGER refuse ON walpost.outbox")
        .await;
    wait_count(&database, ROWS, 0).await;
    wait_left(&addr, 0).await;
    walpost.stop().await;
}

/// Attaches a partition of some hours ago, as if it had been made then.
async fn attach(database: &Database, name: &str, hours: u32) {
    let sql = format!(
        "SELECT (date_trunc('hour', clock_timestamp()) - interval '{hours}h')::text,
                (date_trunc('hour', clock_timestamp()) - interval '{hours}h' + interval '1h')::text"
    );
    let rows = database.rows(&sql, &[]).await;
    let (from, upto): (&str, &str) = (rows[0].get(0), rows[0].get(1));
    database
        .sql(&format!("CREATE TABLE walpost.{name} PARTITION OF walpost.outbox FOR VALUES FROM ('{from}') TO ('{upto}')"))
        .await;
}

async fn old_partitions(database: &Database) -> Vec<String> {
    let sql = "SELECT relname::text FROM pg_class WHERE relname LIKE 'outbox_old%' AND relkind = 'r' ORDER BY 1";
    let rows = database.rows(sql, &[]).await;
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn a_partition_that_cannot_be_dropped_holds_up_no_other_and_goes_when_it_can() {
    // GIVEN old partitions: a view depends on one, a reader holds one
    let database = Database::create("isolation").await;
    database
        .init(&["--payload", "text", "--partition-by", "hour"], &[])
        .await;
    for (name, hours) in [
        ("outbox_old1", 20),
        ("outbox_old2", 30),
        ("outbox_old3", 10),
        ("outbox_old4", 40),
    ] {
        attach(&database, name, hours).await;
    }
    database
        .sql("CREATE VIEW public.history AS SELECT * FROM walpost.outbox_old1")
        .await;
    let reader = database.connect().await;
    reader
        .batch_execute("BEGIN; SELECT count(*) FROM walpost.outbox_old2")
        .await
        .expect("a lock");

    // WHEN retention walks: THEN the others go
    let mut walpost = database
        .start(&[RETENTION, OFTEN, database.as_owner()])
        .await;
    let addr = addr_of(&mut walpost).await;
    eventually(DEADLINE, "the other two to be dropped", async || {
        (old_partitions(&database).await == ["outbox_old1", "outbox_old2"]).then_some(())
    })
    .await;

    // AND it is told why the first does not
    eventually(DEADLINE, "the reason", async || {
        let said = left(&addr).await.to_string();
        (said.contains("outbox_old1") && said.contains("depend")).then_some(())
    })
    .await;

    // WHEN nothing holds them any more: THEN they go
    reader.batch_execute("COMMIT").await.expect("a commit");
    database.sql("DROP VIEW public.history").await;
    eventually(DEADLINE, "all to be dropped", async || {
        old_partitions(&database).await.is_empty().then_some(())
    })
    .await;
    wait_left(&addr, 0).await;
    walpost.stop().await;
}

#[tokio::test]
async fn partitions_that_cannot_be_made_for_one_table_are_made_for_the_others() {
    // GIVEN two tables in partitions; of the first, a partition in the middle and the last ones are missing, and the middle is taken
    let database = Database::create("isolation").await;
    database
        .sql(
            "CREATE TABLE events (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload text,
                                  created_at timestamptz NOT NULL DEFAULT clock_timestamp()) PARTITION BY RANGE (created_at)",
        )
        .await;
    let hour = async |name: &str, ahead: u32| {
        let sql = format!(
            "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYYMMDDHH24'), at::text, (at + interval '1h')::text
             FROM (SELECT date_trunc('hour', clock_timestamp()) + interval '{ahead}h' AS at) x"
        );
        let rows = database.rows(&sql, &[]).await;
        let (tag, from, upto): (&str, &str, &str) =
            (rows[0].get(0), rows[0].get(1), rows[0].get(2));
        let name = if name.is_empty() {
            format!("events_p{tag}")
        } else {
            name.to_owned()
        };
        database
            .sql(&format!(
                "CREATE TABLE {name} PARTITION OF events FOR VALUES FROM ('{from}') TO ('{upto}')"
            ))
            .await;
    };
    hour("", 0).await;
    hour("taken", 3).await;
    let tables = ("WALPOST_OUTBOX_TABLE", "public.events, walpost.outbox");
    database
        .init(
            &["--payload", "text", "--partition-by", "hour"],
            &[("WALPOST_OUTBOX_TABLE", "walpost.outbox")],
        )
        .await;
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE events")
        .await;
    let last = "SELECT max(relname)::text FROM pg_class WHERE relname ~ '^outbox_p[0-9]{10}$'";
    let last: String = database.rows(last, &[]).await[0].get(0);
    database.sql(&format!("DROP TABLE walpost.{last}")).await;

    // WHEN walpost runs: THEN all others are made, of both, and it is told which one is not
    let mut walpost = database.start(&[tables, database.as_owner()]).await;
    let addr = addr_of(&mut walpost).await;
    wait_count(&database, &format!("pg_class WHERE relname = '{last}'"), 1).await;
    wait_count(
        &database,
        "pg_inherits WHERE inhparent = 'public.events'::regclass",
        49,
    )
    .await;
    let said = wait_left(&addr, 1).await;
    assert!(
        said.contains("events_p") && said.contains("overlap"),
        "{said}"
    );
    walpost.stop().await;
}
