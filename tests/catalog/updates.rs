use super::support::{Database, on_each_major};
use super::{DEADLINE, initialized_on, insert, on};

const PLAIN: &[&str] = &["--payload", "text"];
const PARTITIONED: &[&str] = &["--payload", "text", "--partition-by", "day"];
const REFUSED: &str = "an update of walpost.outbox sends no event";

/// What the server says of a statement in a session that has not said that it mends.
async fn refusal(database: &Database, statement: &str) -> String {
    let client = database.connect().await;
    client
        .batch_execute("RESET walpost.mend")
        .await
        .expect("set");
    match client.batch_execute(statement).await {
        Ok(()) => String::new(),
        Err(error) => error
            .as_db_error()
            .expect("of the server")
            .message()
            .to_owned(),
    }
}

async fn updates_are_refused(major: i32, args: &[&str]) {
    let database = initialized_on(major, args).await;
    insert(&database, "walpost.outbox", "one").await;

    // A change of an event is refused, also by an upsert, and through a partition
    let conflict =
        "INSERT INTO walpost.outbox (id, aggregatetype, aggregateid, type, payload, created_at)
                    SELECT id, 't', 'k', 'e', 'two', created_at FROM walpost.outbox ON CONFLICT";
    let partition = "DO $$ BEGIN EXECUTE (SELECT format('UPDATE %s SET payload = %L', tableoid::regclass, 'x') FROM walpost.outbox); END $$";
    let key = if args == PLAIN {
        "(id)"
    } else {
        "(id, created_at)"
    };
    for statement in [
        "UPDATE walpost.outbox SET payload = 'two'",
        "UPDATE walpost.outbox SET headers = '{}', sent_at = sent_at",
        &format!("{conflict} {key} DO UPDATE SET payload = excluded.payload"),
        partition,
    ] {
        // (The message names the partition, where there is one.)
        let said = refusal(&database, statement).await;
        assert!(
            said.starts_with("an update of walpost.outbox") && said.ends_with("sends no event"),
            "{statement}: {said}"
        );
    }

    // What is no change of an event is not, nor are changes of the table itself
    database
        .sql("ALTER TABLE walpost.outbox ADD COLUMN notes text")
        .await;
    for statement in [
        "UPDATE walpost.outbox SET sent_at = now()",
        "UPDATE walpost.outbox SET notes = 'seen', payload = payload",
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload) VALUES ('t', 'k', 'e', 'y')
         ON CONFLICT DO NOTHING",
        "DELETE FROM walpost.outbox WHERE payload = 'y'",
        "BEGIN; SET LOCAL walpost.mend = on; UPDATE walpost.outbox SET txid = pg_current_xact_id(); COMMIT",
        "DROP VIEW walpost.outbox_status; ALTER TABLE walpost.outbox ALTER payload TYPE jsonb USING to_jsonb(payload), DROP txid",
        "UPDATE walpost.outbox SET notes = 'seen again'",
    ] {
        assert_eq!(refusal(&database, statement).await, "", "{statement}");
    }
}

async fn init_brings_the_refusal(major: i32) {
    let database = on(major).await;
    database
        .sql("DROP FUNCTION walpost.refuse_update CASCADE")
        .await;
    let check = async || {
        let (code, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
        assert_eq!(code, 0, "{said}");
        said
    };
    assert!(check().await.contains("warn  updates"));
    let (code, said) = database.walpost(&["init"], &[]).run(DEADLINE).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("brought up to date table walpost.outbox"),
        "{said}"
    );
    assert!(!check().await.contains("warn  updates"));
    insert(&database, "walpost.outbox", "one").await;
    assert_eq!(
        refusal(&database, "UPDATE walpost.outbox SET payload = 'x'").await,
        REFUSED
    );
    let (_, said) = database.walpost(&["init"], &[]).run(DEADLINE).await;
    assert!(!said.contains("brought up to date"), "{said}");
}

async fn check_tells(major: i32) {
    // GIVEN a table of the application's own, which others may update, with policies that apply to the connector
    let database = on(major).await;
    let role = format!("{}_app", database.name);
    database
        .sql(&format!(
            "CREATE TABLE events (id uuid DEFAULT gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload text,
                                  txid xid8 DEFAULT pg_current_xact_id(), seq bigint GENERATED ALWAYS AS IDENTITY);
             CREATE ROLE {role}; GRANT UPDATE ON events TO {role};
             GRANT SELECT ON events TO walpost_connector"
        ))
        .await;
    let events = ("WALPOST_OUTBOX_TABLE", "events");
    database.init(&[], &[events]).await;
    database
        .sql("ALTER TABLE events ENABLE ROW LEVEL SECURITY")
        .await;
    let url = database.run_url();
    let as_connector = ("WALPOST_POSTGRES_URL", &*url);
    let check = async || {
        database
            .walpost(&["check"], &[events, as_connector])
            .run(DEADLINE)
            .await
    };

    // THEN check says each, with what mends it
    let (code, said) = check().await;
    assert_eq!(code, 69, "{said}");
    let mends = [
        "ALTER TABLE public.events DISABLE ROW LEVEL SECURITY;".to_owned(),
        format!("REVOKE UPDATE ON public.events FROM \"{role}\";"),
        "CREATE INDEX CONCURRENTLY ON public.events USING brin ((txid::text::bigint));".to_owned(),
    ];
    for mend in &mends {
        assert!(said.contains(mend.as_str()), "no {mend:?} in:\n{said}");
        database.sql(mend).await;
    }
    // (and, now that nobody but its owner may update it, how that is refused)
    let (code, said) = check().await;
    assert_eq!(code, 0, "{said}");
    let (_, trigger) = said.split_once("CREATE TRIGGER").expect("a trigger");
    let (trigger, _) = trigger.split_once(';').expect("a whole statement");
    database.sql(&format!("CREATE TRIGGER{trigger}")).await;
    insert(&database, "events", "one").await;
    let update = "UPDATE events SET payload = 'x'";
    assert_eq!(
        refusal(&database, update).await,
        "an update of public.events sends no event"
    );
    let (_, said) = check().await;
    for word in ["row_security", "warn  updates", "txid_index"] {
        assert!(!said.contains(word), "{word}: {said}");
    }
    database
        .sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await;
}

on_each_major! {
    a_row_of_the_outbox_is_not_changed_in_place: updates_are_refused(PLAIN);
    a_row_of_a_partitioned_outbox_is_not_changed_in_place: updates_are_refused(PARTITIONED);
    init_brings_the_refusal_to_an_outbox_of_an_earlier_version_and_check_warns_until_then: init_brings_the_refusal();
    check_tells_of_row_level_security_of_updaters_and_of_a_missing_index: check_tells();
}
