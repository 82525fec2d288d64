//! Rows that cannot be marked or deleted.

use crate::support::Proxy;
use crate::*;

#[tokio::test]
async fn a_row_that_cannot_be_deleted_holds_up_no_other_is_not_published_again_and_goes_when_it_can()
 {
    // GIVEN a row to which a foreign key of the application's points
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[DELETE]).await;
    database
        .sql(
            "CREATE TABLE child (outbox uuid REFERENCES walpost.outbox (id));
             CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO public.child VALUES (new.id); RETURN NULL; END $$;
             CREATE TRIGGER keep AFTER INSERT ON walpost.outbox FOR EACH ROW WHEN (new.payload IN ('7', '170'))
                 EXECUTE FUNCTION keep()",
        )
        .await;
    let settings = [DELETE, SOON[0], SOON[1]];
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;

    // WHEN it is published among others: THEN the others go, before it and after it
    insert(&database, 1..=300).await;
    wait_count(&database, ROWS, 2).await;
    insert(&database, 301..=400).await;
    wait_count(&database, ROWS, 2).await;

    // AND it is told why it stays
    let said = wait_left(&addr, 2).await;
    assert!(
        said.contains("foreign key") && said.contains("walpost.outbox"),
        "{said}"
    );

    // AND check says so too
    let check = async || {
        database
            .walpost(&["check"], &settings)
            .run(DEADLINE)
            .await
            .1
    };
    eventually(DEADLINE, "the note that check reads", async || {
        let said = check().await;
        (said.contains("2 rows, partitions or tables were left undone")
            && said.contains("foreign key"))
        .then_some(())
    })
    .await;

    // AND it is not published again, by this process or the next one
    looked_for_unmarked(&database).await;
    walpost.stop().await;
    let walpost = database.start(&settings).await;
    looked_for_unmarked(&database).await;
    insert(&database, 401..=401).await;
    wait_count(&database, ROWS, 2).await;
    let expected: Vec<u32> = (1..=401).collect();
    assert_eq!(numbers(&database.topic("t"), 401).await, expected);

    // WHEN the foreign key's rows go: THEN it goes too
    database.sql("DELETE FROM child").await;
    wait_count(&database, ROWS, 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 401).await, expected);
    let said = check().await;
    assert!(!said.contains("left undone"), "{said}");
}

#[tokio::test]
async fn a_full_queue_of_rows_to_be_marked_is_not_ready_until_it_moves() {
    // GIVEN a statement that does not come to an end
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    database
        .sql(
            "CREATE TABLE go (at timestamptz);
             CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 WHILE NOT EXISTS (SELECT FROM public.go) LOOP PERFORM pg_sleep(0.1); END LOOP;
                 RETURN NULL;
             END $$;
             CREATE TRIGGER wait BEFORE UPDATE ON walpost.outbox FOR EACH STATEMENT EXECUTE FUNCTION wait();
             GRANT SELECT ON go TO PUBLIC",
        )
        .await;
    let mut walpost = database.start(&[MARK]).await;
    let addr = addr_of(&mut walpost).await;
    let ready = async || support::try_admin(&format!("http://{addr}"), "GET", "/readyz", "").await;
    eventually(DEADLINE, "it to be ready", async || ready().await.ok()).await;

    // WHEN so many rows are published that the stream waits: THEN it is not ready, and says why
    insert(&database, 1..=150_000).await;
    let why = eventually(DEADLINE, "it not to be ready", async || ready().await.err());
    let why = why.await;
    assert!(why.contains("wait to be marked or deleted"), "{why}");

    // WHEN it does come to an end: THEN it is ready, and every row is marked
    database.sql("INSERT INTO go VALUES (now())").await;
    eventually(DEADLINE, "it to be ready again", async || {
        ready().await.ok()
    })
    .await;
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
}

/// Refuses some rows: with an error of two classes, without one, and by taking the mark back.
const REFUSE: &str = "
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        CASE old.payload
            WHEN '7' THEN RAISE 'not this one';
            WHEN '70' THEN RAISE 'nor this one' USING ERRCODE = 'APP01';
            WHEN '8' THEN RETURN NULL;
            WHEN '9' THEN new.sent_at := NULL;
            ELSE NULL;
        END CASE;
        RETURN new;
    END $$;
    CREATE TRIGGER refuse BEFORE UPDATE ON walpost.outbox FOR EACH ROW EXECUTE FUNCTION refuse()";

#[tokio::test]
async fn rows_that_a_trigger_refuses_with_or_without_an_error_hold_up_no_other_and_come_once() {
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    database.sql(REFUSE).await;
    let mut walpost = database.start(&[MARK, SOON[0], SOON[1]]).await;
    let addr = addr_of(&mut walpost).await;

    // WHEN they are published among others: THEN the others are marked
    insert(&database, 1..=100).await;
    wait_count(&database, UNMARKED, 4).await;
    insert(&database, 101..=200).await;
    wait_count(&database, UNMARKED, 4).await;
    let said = wait_left(&addr, 4).await;
    assert!(
        said.contains("not this one") && said.contains("APP01") && said.contains("trigger"),
        "{said}"
    );

    // AND none of them is published again
    looked_for_unmarked(&database).await;
    let expected: Vec<u32> = (1..=200).collect();
    assert_eq!(numbers(&database.topic("t"), 200).await, expected);

    // WHEN the trigger goes: THEN they are marked, still without another message, and nothing is left
    database.sql("DROP TRIGGER refuse ON walpost.outbox").await;
    wait_count(&database, UNMARKED, 0).await;
    wait_left(&addr, 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("t"), 200).await, expected);
}

#[tokio::test]
async fn a_table_of_which_no_row_can_be_marked_holds_up_neither_another_table_nor_the_stream() {
    // GIVEN two tables; one of them loses the right, and a third is gone
    let database = Database::create("isolation").await;
    database
        .sql(
            "CREATE TABLE events (id bigint PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload text,
                                  sent_at timestamptz, created_at timestamptz DEFAULT clock_timestamp())",
        )
        .await;
    let tables = ("WALPOST_OUTBOX_TABLE", "public.events, walpost.outbox");
    database.init(&["--payload", "text"], &[MARK, tables]).await;
    let settings = [MARK, tables, SOON[0], SOON[1]];
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;
    database
        .sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'never'; END $$;
             CREATE TRIGGER refuse BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION refuse()",
        )
        .await;

    // WHEN thousands of rows come to both: THEN the other one's are marked
    database
        .sql(
            "INSERT INTO events SELECT i, 'other', 'k', 'e', i::text FROM generate_series(1, 3000) i;
             INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
             SELECT 't', 'k', 'e', i::text FROM generate_series(1, 3000) i",
        )
        .await;
    wait_count(&database, UNMARKED, 0).await;
    wait_left(&addr, 3000).await;

    // AND none of the first is published again
    looked_for_unmarked(&database).await;
    let expected: Vec<u32> = (1..=3000).collect();
    assert_eq!(numbers(&database.topic("other"), 3000).await, expected);

    // WHEN it can be marked: THEN it is
    database.sql("DROP TRIGGER refuse ON events").await;
    wait_count(&database, "events WHERE sent_at IS NULL", 0).await;
    walpost.stop().await;
    assert_eq!(numbers(&database.topic("other"), 3000).await, expected);
}

#[tokio::test]
async fn a_row_that_somebody_has_locked_holds_up_no_other() {
    // GIVEN published rows whose receipts are still to come, and a transaction of the application's that holds one of them
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    let broker = Proxy::before_broker(&servers().pulsar_addr);
    let url = format!("pulsar://{}", broker.addr());
    let walpost = database.start(&[MARK, ("WALPOST_PULSAR_URL", &url)]).await;
    insert(&database, 0..=0).await;
    wait_count(&database, UNMARKED, 0).await;
    broker.hold_upstream_replies(true);
    insert(&database, 1..=50).await;
    let holder = database.connect().await;
    holder
        .batch_execute("BEGIN; SELECT FROM walpost.outbox WHERE payload = '25' FOR UPDATE")
        .await
        .expect("a lock");

    // WHEN the receipts come
    broker.hold_upstream_replies(false);

    // THEN all others are marked, and it too when the transaction ends
    wait_count(&database, UNMARKED, 1).await;
    insert(&database, 51..=60).await;
    wait_count(&database, UNMARKED, 1).await;
    holder.batch_execute("COMMIT").await.expect("a commit");
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
    let expected: Vec<u32> = (0..=60).collect();
    assert_eq!(numbers(&database.topic("t"), 61).await, expected);
}

#[tokio::test]
async fn that_left_rows_cannot_be_noted_is_said_at_once_and_once() {
    // GIVEN no table to note them in
    let database = Database::create("isolation").await;
    database.init(&["--payload", "text"], &[MARK]).await;
    database.sql("DROP TABLE walpost.left_undone").await;

    // WHEN walpost runs THEN it says so, once
    let mut walpost = database.start(&[MARK, SOON[0], SOON[1]]).await;
    let said = [
        "nothing is known of rows that the process before left unmarked",
        "cannot be noted in walpost.left_undone",
    ];
    for said in said {
        let line = walpost.wait_for_line(said, DEADLINE).await;
        assert!(line.contains("WARN"), "{line}");
    }
    insert(&database, 1..=3).await;
    wait_count(&database, UNMARKED, 0).await;
    walpost.stop().await;
}
