use super::support::Database;
use super::{DEADLINE, arrived, insert, on};

/// What goes wrong, and the statement that `run` and `check` name and that mends it.
const ON_EACH_MAJOR: [(&str, &str); 4] = [
    (
        "CREATE TABLE other (id int); ALTER PUBLICATION walpost SET TABLE other",
        "ALTER PUBLICATION \"walpost\" ADD TABLE walpost.outbox;",
    ),
    (
        "ALTER PUBLICATION walpost SET (publish = 'update')",
        "ALTER PUBLICATION \"walpost\" SET (publish = 'insert');",
    ),
    (
        "DROP PUBLICATION walpost",
        "CREATE PUBLICATION \"walpost\" FOR TABLE walpost.outbox WITH (publish = 'insert', publish_via_partition_root = true);",
    ),
    (
        "CREATE TABLE child () INHERITS (walpost.outbox)",
        "ALTER TABLE public.child NO INHERIT walpost.outbox;",
    ),
];
const ADDED_ANEW: &str = "BEGIN; ALTER PUBLICATION \"walpost\" DROP TABLE walpost.outbox; \
     ALTER PUBLICATION \"walpost\" ADD TABLE walpost.outbox; COMMIT;";
const SINCE_15: [(&str, &str); 3] = [
    (
        "ALTER PUBLICATION walpost SET TABLE walpost.outbox WHERE (aggregatetype <> 'x')",
        ADDED_ANEW,
    ),
    (
        "ALTER PUBLICATION walpost SET TABLE walpost.outbox (id, aggregatetype, aggregateid, type, payload)",
        ADDED_ANEW,
    ),
    (
        "ALTER PUBLICATION walpost SET TABLE walpost.outbox (id, aggregatetype, aggregateid, type, payload, topic, headers, deliver_at, \
                                                             created_at, seq)",
        ADDED_ANEW,
    ),
];

/// The same for a partitioned table of the application's own.
const PARTITIONED: [(&str, &str); 3] = [
    (
        "ALTER PUBLICATION walpost SET (publish_via_partition_root = false)",
        "ALTER PUBLICATION \"walpost\" SET (publish_via_partition_root = true);",
    ),
    (
        "CREATE UNLOGGED TABLE parts.fast PARTITION OF events FOR VALUES IN ('fast')",
        "ALTER TABLE parts.fast SET LOGGED;",
    ),
    (
        "CREATE FOREIGN DATA WRAPPER far; CREATE SERVER far FOREIGN DATA WRAPPER far;
         CREATE FOREIGN TABLE parts.far PARTITION OF events FOR VALUES IN ('far') SERVER far",
        "ALTER TABLE public.events DETACH PARTITION parts.far;",
    ),
];
const EVENTS: (&str, &str) = ("WALPOST_OUTBOX_TABLE", "events");
const MAKE_EVENTS: &str = "
    CREATE TABLE events (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload text)
    PARTITION BY LIST (aggregatetype);
    CREATE SCHEMA parts; CREATE TABLE parts.t PARTITION OF events FOR VALUES IN ('t');";

async fn is_refused_until_mended(
    database: &Database,
    settings: &[(&str, &str)],
    cases: &[(&str, &str)],
) {
    for (wrong, mend) in cases {
        database.sql(wrong).await;
        for command in ["run", "check"] {
            let settings = [settings, &[database.as_owner()]].concat();
            let (code, said) = database.walpost(&[command], &settings).run(DEADLINE).await;
            assert_eq!(code, 69, "{command} after {wrong}:\n{said}");
            assert!(said.contains(mend), "{wrong}: no {mend:?} in:\n{said}");
        }
        database.sql(mend).await;
        let (code, said) = database.walpost(&["check"], settings).run(DEADLINE).await;
        assert_eq!(code, 0, "after {mend}:\n{said}");
        assert!(said.contains("ok    postgres"), "after {mend}:\n{said}");
    }
}

async fn what_the_stream_would_leave_out_is_refused(major: i32) {
    let database = on(major).await;
    is_refused_until_mended(&database, &[], &ON_EACH_MAJOR).await;
    if major >= 15 {
        is_refused_until_mended(&database, &[], &SINCE_15).await;
    }

    // A partitioned table, with partitions in another schema
    database.sql(MAKE_EVENTS).await;
    database.init(&[], &[EVENTS]).await;
    is_refused_until_mended(&database, &[EVENTS], &PARTITIONED).await;

    // A partition as the outbox table, while the publication sends its rows under the root's name
    let settings = [("WALPOST_OUTBOX_TABLE", "parts.t"), database.as_owner()];
    let (code, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("name public.events in WALPOST_OUTBOX_TABLE"),
        "{said}"
    );
}

async fn a_running_stream_ends(major: i32) {
    let database = on(major).await;
    let since_15 = SINCE_15.iter().filter(|_| major >= 15);
    for (wrong, mend) in ON_EACH_MAJOR.iter().chain(since_15) {
        let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "200ms")]).await;
        database.sql(wrong).await;
        let code = walpost.wait_exit(DEADLINE).await;
        let said = walpost.output();
        assert_eq!(code, 69, "{wrong}:\n{said}");
        assert!(said.contains(mend), "{wrong}: no {mend:?} in:\n{said}");
        database.sql(mend).await;
    }
    let walpost = database.start(&[]).await;
    walpost.stop().await;
}

#[tokio::test]
async fn a_running_stream_ends_within_a_scan_interval_when_rows_would_be_left_out_on_14() {
    a_running_stream_ends(14).await;
}

#[tokio::test]
async fn a_running_stream_ends_within_a_scan_interval_when_rows_would_be_left_out_on_15() {
    a_running_stream_ends(15).await;
}

#[tokio::test]
async fn a_running_stream_ends_within_a_scan_interval_when_rows_would_be_left_out_on_18() {
    a_running_stream_ends(18).await;
}

#[tokio::test]
async fn what_the_stream_would_leave_out_is_refused_with_the_statement_that_mends_it_on_14() {
    what_the_stream_would_leave_out_is_refused(14).await;
}

#[tokio::test]
async fn what_the_stream_would_leave_out_is_refused_with_the_statement_that_mends_it_on_15() {
    what_the_stream_would_leave_out_is_refused(15).await;
}

#[tokio::test]
async fn what_the_stream_would_leave_out_is_refused_with_the_statement_that_mends_it_on_18() {
    what_the_stream_would_leave_out_is_refused(18).await;
}

async fn any_form_of_publication_does(major: i32) {
    // GIVEN an outbox table with a partition in another schema
    let database = on(major).await;
    database.sql(MAKE_EVENTS).await;
    database.init(&[], &[EVENTS]).await;
    let options = "WITH (publish = 'insert', publish_via_partition_root = true)";
    let mut forms = vec!["FOR ALL TABLES"];
    if major >= 15 {
        forms.push("FOR TABLES IN SCHEMA public");
        // What walpost does not read may stay out.
        database
            .sql("ALTER TABLE events ADD COLUMN notes text")
            .await;
        forms.push("FOR TABLE events (id, aggregatetype, aggregateid, type, payload)");
    }
    let mut payloads = Vec::new();
    for form in forms {
        // WHEN the publication is of another form: THEN rows arrive, also through the partition
        let publication =
            format!("DROP PUBLICATION walpost; CREATE PUBLICATION walpost {form} {options}");
        database.sql(&publication).await;
        let walpost = database.start(&[EVENTS, database.as_owner()]).await;
        for table in ["events", "parts.t"] {
            payloads.push(format!("{table} {form}"));
            insert(&database, table, payloads.last().expect("pushed")).await;
        }
        database.wait_all_confirmed(DEADLINE).await;
        walpost.stop().await;
    }
    assert_eq!(arrived(&database, payloads.len()).await, payloads);
}

#[tokio::test]
async fn a_publication_of_all_tables_does_as_well_on_14() {
    any_form_of_publication_does(14).await;
}

#[tokio::test]
async fn publications_of_all_tables_of_a_schema_and_with_a_column_list_do_as_well_on_15() {
    any_form_of_publication_does(15).await;
}

#[tokio::test]
async fn publications_of_all_tables_of_a_schema_and_with_a_column_list_do_as_well_on_18() {
    any_form_of_publication_does(18).await;
}

async fn a_generated_column_is_refused(major: i32) {
    let database = on(major).await;
    database
        .sql(
            "CREATE TABLE orders (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text,
                                  payload text, kind text GENERATED ALWAYS AS ('of-' || aggregatetype) STORED)",
        )
        .await;
    let template = format!("{}.{{kind}}", database.topic_prefix);
    let settings = [
        ("WALPOST_OUTBOX_TABLE", "orders"),
        ("WALPOST_TOPIC", &template),
        database.as_owner(),
    ];
    // Before there is a row
    for command in ["init", "run", "check"] {
        let (code, said) = database.walpost(&[command], &settings).run(DEADLINE).await;
        assert_eq!(code, 69, "{command}: {said}");
        let expected = match command {
            "run" | "check" => "lacks table public.orders",
            _ => "column kind of table public.orders is generated",
        };
        assert!(said.contains(expected), "{command}: {said}");
    }
    database
        .sql("ALTER PUBLICATION walpost ADD TABLE orders")
        .await;
    for command in ["run", "check"] {
        let (code, said) = database.walpost(&[command], &settings).run(DEADLINE).await;
        assert_eq!(code, 69, "{command}: {said}");
        assert!(
            said.contains("column kind of table public.orders is generated"),
            "{command}: {said}"
        );
    }
    let mend = if major >= 18 {
        "ALTER PUBLICATION \"walpost\" SET (publish_generated_columns = stored);"
    } else {
        "ALTER TABLE public.orders ALTER COLUMN \"kind\" DROP EXPRESSION"
    };
    let (_, said) = database.walpost(&["run"], &settings).run(DEADLINE).await;
    assert!(said.contains(mend), "{said}");
    database.sql(mend).await;
    let walpost = database.start(&settings).await;
    let column = if major >= 18 { "" } else { ", kind" };
    let value = if major >= 18 { "" } else { ", 'of-t'" };
    database
        .sql(&format!(
            "INSERT INTO orders (aggregatetype, aggregateid, type, payload{column}) VALUES ('t', 'k', 'e', 'one'{value})"
        ))
        .await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    let topic = database.topic("of-t");
    let url = &super::servers().pulsar_url;
    super::consume(url, &topic, 1, DEADLINE).await;
}

#[tokio::test]
async fn a_generated_column_that_is_read_is_refused_before_the_first_row_on_14() {
    a_generated_column_is_refused(14).await;
}

#[tokio::test]
async fn a_generated_column_that_is_read_is_refused_before_the_first_row_on_15() {
    a_generated_column_is_refused(15).await;
}

#[tokio::test]
async fn a_generated_column_that_is_read_is_refused_before_the_first_row_unless_it_is_sent_on_18() {
    a_generated_column_is_refused(18).await;
}
