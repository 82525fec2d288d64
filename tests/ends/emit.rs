//! `walpost.emit`: the row of a plain INSERT, or an error that names the argument.

use std::time::Duration;

use walpost::outbox::{TopicTemplate, own_topic_into};

use crate::support::{Database, consume, servers, topic_names};

const DEADLINE: Duration = Duration::from_secs(60);

/// What a wrong call to one of the two functions is refused with: (argument, SQLSTATE, text).
const WRONG: [(&str, &str, &str, &str); 15] = [
    ("null, 'k', 'T', null", "aggregatetype", "22004", "is null"),
    ("'a', null, 'T', null", "aggregateid", "22004", "is null"),
    ("'a', 'k', null, null", "type", "22004", "is null"),
    ("'', 'k', 'T', null", "aggregatetype", "22023", "is empty"),
    ("'a', 'k', '', null", "type", "22023", "is empty"),
    (
        "'a ', 'k', 'T', null",
        "aggregatetype",
        "22023",
        "cannot stand in a topic name",
    ),
    (
        "'a/b', 'k', 'T', null",
        "aggregatetype",
        "22023",
        "cannot stand in a topic name",
    ),
    (
        "'a-partition-1', 'k', 'T', null",
        "aggregatetype",
        "22023",
        "cannot stand in a topic name",
    ),
    (
        "'a', 'k', 'T', null, headers => '[1]'",
        "headers",
        "22023",
        "object",
    ),
    (
        "'a', 'k', 'T', null, topic => ''",
        "topic",
        "22023",
        "is no topic name",
    ),
    (
        "'a', 'k', 'T', null, topic => 'a/b'",
        "topic",
        "22023",
        "is no topic name",
    ),
    (
        "'a', 'k', 'T', null, topic => 'http://a/b/c'",
        "topic",
        "22023",
        "is no topic name",
    ),
    (
        "'a', 'k', 'T', null, topic => 'a/../c'",
        "topic",
        "22023",
        "is no topic name",
    ),
    (
        "'a', 'k', 'T', null, topic => 't-partition-0'",
        "topic",
        "22023",
        "is no topic name",
    ),
    (
        "'a', 'k', 'T', null, deliver_at => 'infinity'",
        "deliver_at",
        "22023",
        "is infinite",
    ),
];

#[tokio::test]
async fn a_wrong_argument_is_named_and_the_business_transaction_fails_with_it() {
    // GIVEN an application's table beside the outbox
    let database = Database::create("emit").await;
    database.init(&[], &[]).await;
    database.sql("create table orders (n int)").await;

    for function in ["emit", "emit_transient"] {
        for (arguments, argument, sqlstate, why) in WRONG {
            // WHEN an order is written and its event has a wrong argument
            let said = database
                .client
                .batch_execute(&format!(
                    "begin; insert into orders values (1); select walpost.{function}({arguments}); commit"
                ))
                .await
                .expect_err(arguments);
            // THEN the error names the argument
            let said = said.as_db_error().expect("of the server");
            assert_eq!(said.code().code(), sqlstate, "{arguments}: {said}");
            assert_eq!(said.column(), Some(argument), "{arguments}: {said}");
            let text = said.message();
            assert!(
                text.contains(argument) && text.contains(why),
                "{arguments}: {text}"
            );
            database.sql("rollback").await;
        }
    }
    // THEN and nothing was written
    let left = database
        .rows(
            "select (select count(*) from orders) + (select count(*) from walpost.outbox)",
            &[],
        )
        .await;
    assert_eq!(left[0].get::<_, i64>(0), 0);
}

#[tokio::test]
async fn an_emitted_row_is_the_row_of_a_plain_insert() {
    for payload in ["json", "jsonb", "bytea", "text"] {
        // GIVEN an outbox of each payload type
        let database = Database::create("emit").await;
        database.init(&["--payload", payload], &[]).await;
        let walpost = database.start(&[]).await;
        // WHEN the same event is emitted and inserted, with everything that one can have
        let columns = "aggregatetype, aggregateid, type, payload, headers, topic, deliver_at";
        let values = format!(
            "'a', 'k-1', 'T', '{{\"n\": 1}}', '{{\"h\": \"v\"}}', '{}', '2026-01-02 03:04:05.678+00'",
            database.topic("own")
        );
        let id: String = database
            .rows(&format!("select walpost.emit({values})::text"), &[])
            .await[0]
            .get(0);
        database
            .sql(&format!(
                "insert into walpost.outbox ({columns}) values ({values})"
            ))
            .await;
        // AND one with no more than it needs, a tombstone
        database
            .sql("select walpost.emit('b', 'k-2', 'U', null)")
            .await;
        database.wait_all_confirmed(DEADLINE).await;

        // THEN the id is the row's, and the rows are the same
        let rows = database
            .rows(
                &format!(
                    "select id::text, (select row({columns})::text from (select o.*) as one) from walpost.outbox o order by seq"
                ),
                &[],
            )
            .await;
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[0].get::<_, &str>(0), id);
        assert_eq!(rows[0].get::<_, &str>(1), rows[1].get::<_, &str>(1));
        // THEN and so are their messages
        let topic = database.topic("own");
        let arrived = consume(&servers().pulsar_url, &topic, 2, DEADLINE).await;
        assert_eq!(arrived.len(), 2);
        assert_eq!(arrived[0].payload, arrived[1].payload);
        assert_eq!(arrived[0].key.as_deref(), Some("k-1"));
        assert_eq!(arrived[0].property("id"), id);
        assert_eq!(arrived[0].property("h"), "v");
        let topic = database.topic("b");
        assert_eq!(
            consume(&servers().pulsar_url, &topic, 1, DEADLINE)
                .await
                .len(),
            1
        );
        walpost.stop().await;
    }
}

#[tokio::test]
async fn the_sql_may_be_applied_again_and_a_changed_payload_type_makes_no_call_ambiguous() {
    // GIVEN an outbox whose payload is changed by hand
    let database = Database::create("emit").await;
    database.init(&[], &[]).await;
    database
        .sql("alter table walpost.outbox alter column payload type jsonb using payload::jsonb")
        .await;
    // WHEN the functions' files are applied again
    for file in ["09_emit", "10_emit_transient", "09_emit"] {
        let path = format!("{}/sql/{file}.sql", env!("CARGO_MANIFEST_DIR"));
        let sql = std::fs::read_to_string(path).expect("a file of sql/");
        database.sql(&sql).await;
    }
    // THEN there is one function of each name, and it takes the new type
    database
        .sql("select walpost.emit('a', 'k', 'T', '{}')")
        .await;
    let functions = database
        .rows(
            "select format('%s %s', proname, proargtypes[3]::regtype) from pg_proc
             where pronamespace = 'walpost'::regnamespace and proname like 'emit%' order by 1",
            &[],
        )
        .await;
    let functions: Vec<&str> = functions.iter().map(|row| row.get(0)).collect();
    assert_eq!(functions, ["emit jsonb", "emit_transient json"]);
}

#[tokio::test]
async fn a_name_is_accepted_if_walpost_can_route_by_it() {
    for encoding in ["UTF8", "LATIN1"] {
        // GIVEN an outbox
        let database = Database::create_in(encoding, "emit").await;
        database.init(&[], &[]).await;
        database
            .sql(
                "create function accepts(call text, name text) returns bool language plpgsql as $$ begin
                     execute 'select walpost.' || call using name;
                     return true;
                 exception when invalid_parameter_value then return false; end $$",
            )
            .await;
        // WHEN names of all kinds are given to the functions, those that the database can hold
        let names: Vec<String> = topic_names()
            .into_iter()
            .filter(|name| encoding == "UTF8" || name.chars().all(|c| u32::from(c) < 256))
            .collect();
        let template = TopicTemplate::parse("t.{aggregatetype}").expect("valid");
        let mut topic = String::new();
        for function in ["emit", "emit_transient"] {
            let sql = format!(
                "select accepts('{function}($1, ''k'', ''T'', null)', name),
                        accepts('{function}(''a'', ''k'', ''T'', null, topic => $1)', name)
                 from unnest($1::text[]) with ordinality as n (name, number) order by number"
            );
            let rows = database.rows(&sql, &[&names]).await;
            assert_eq!(rows.len(), names.len());
            for (row, name) in rows.iter().zip(&names) {
                // THEN they take those of which walpost makes a topic, and no others
                let routed = template.render_into(&mut topic, |_, out| {
                    out.push_str(name);
                    Ok(())
                });
                let own = own_topic_into(name, &mut topic);
                assert_eq!(
                    (row.get::<_, bool>(0), row.get::<_, bool>(1)),
                    (routed.is_ok(), own.is_ok()),
                    "{function} in {encoding}: {name:?}: {routed:?} {own:?}"
                );
            }
        }
    }
}
