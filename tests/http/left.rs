//! What was left undone: metrics, `/status`, the page, and `walpost check` say the same of it.

use serde_json::Value;

use super::page::browse;
use super::{DEADLINE, addr_of, get, status_of};
use crate::support::{Database, eventually};

/// The value of a series.
pub(super) fn sample<'a>(text: &'a str, series: &str) -> Option<&'a str> {
    let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
    let mut found = lines.filter(|(name, _)| *name == series);
    found.next().map(|(_, value)| value)
}

#[tokio::test]
async fn metrics_status_page_and_check_say_the_same_of_what_was_left_undone() {
    // GIVEN rows that are deleted once they are published, two of which a foreign key keeps, and a statement that waits
    let database = Database::create("left").await;
    let settings = [("WALPOST_AFTER_PUBLISH", "delete")];
    database.init(&["--payload", "text"], &settings).await;
    database
        .sql(
            "CREATE TABLE child (outbox uuid REFERENCES walpost.outbox (id));
             CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN INSERT INTO public.child VALUES (new.id); RETURN NULL; END $$;
             CREATE TRIGGER keep AFTER INSERT ON walpost.outbox FOR EACH ROW WHEN (new.payload IN ('3', '7'))
                 EXECUTE FUNCTION keep();
             CREATE TABLE go (at timestamptz); GRANT SELECT ON go TO PUBLIC;
             CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 WHILE NOT EXISTS (SELECT FROM public.go) LOOP PERFORM pg_sleep(0.05); END LOOP;
                 RETURN NULL;
             END $$;
             CREATE TRIGGER wait BEFORE DELETE ON walpost.outbox FOR EACH STATEMENT EXECUTE FUNCTION wait()",
        )
        .await;
    let mut walpost = database.start(&settings).await;
    let addr = addr_of(&mut walpost).await;
    let metrics = async || get(&addr, "/metrics").await.body;

    // WHEN they are published: THEN those wait
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 't', 'k' || n, 'e', n::text FROM generate_series(1, 10) n";
    database.sql(insert).await;
    let waiting = "walpost_after_publish_rows_waiting";
    eventually(DEADLINE, "ten rows to wait", async || {
        (sample(&metrics().await, waiting) == Some("10")).then_some(())
    })
    .await;
    assert_eq!(status_of(&addr).await["after_publish"]["waiting"], 10);

    // WHEN the statement goes on: THEN eight are gone, two are left, and each place says so
    database.sql("INSERT INTO go VALUES (now())").await;
    let text = eventually(DEADLINE, "all of it to be done", async || {
        let text = metrics().await;
        let done = sample(&text, "walpost_after_publish_rows_total") == Some("10");
        (done && sample(&text, waiting) == Some("0")).then_some(text)
    })
    .await;
    let series = |work: &str| format!("walpost_left_undone{{work=\"{work}\"}}");
    assert_eq!(sample(&text, &series("after_publish")), Some("2"), "{text}");
    for work in ["unmarked", "retention", "partitions"] {
        assert_eq!(sample(&text, &series(work)), Some("0"), "{text}");
    }
    let status = status_of(&addr).await;
    assert_eq!(status["left"]["count"], 2, "{status:#}");
    let listed = status["left"]["listed"].as_array().expect("a list");
    let ids: Vec<&str> = listed.iter().filter_map(|one| one["id"].as_str()).collect();
    let rows = database
        .rows("SELECT id::text FROM walpost.outbox ORDER BY seq", &[])
        .await;
    let expected: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(expected.len(), 2);
    assert!(expected.iter().all(|id| ids.contains(id)), "{status:#}");
    assert!(
        listed.iter().all(|one| one["work"] == "after_publish"),
        "{status:#}"
    );
    let page = browse(&format!("http://{addr}/"), "left-undone.png", &[]).await;
    assert!(
        page.dom
            .contains("Left undone <span id=\"left-count\">2</span>"),
        "{}",
        page.dom
    );
    for text in expected.iter().chain(&["foreign key"]) {
        assert!(page.dom.contains(text), "{text}: {}", page.dom);
    }
    let left = async || -> Option<String> {
        let check = database.walpost(&["check", "--json"], &settings);
        let (_, said) = check.run(DEADLINE).await;
        let found: Value = serde_json::from_str(&said).expect("JSON");
        let checks = found["checks"].as_array().expect("findings");
        let left = checks.iter().find(|one| one["check"] == "left")?;
        Some(left["text"].as_str().expect("a text").to_owned())
    };
    let said = eventually(DEADLINE, "the note that check reads", left).await;
    assert!(said.starts_with("2 rows"), "{said}");
    for text in expected.iter().chain(&["foreign key"]) {
        assert!(said.contains(text), "{text}: {said}");
    }

    // WHEN the foreign key's rows go: THEN so do they, and nothing is said of them any more
    database.sql("DELETE FROM child").await;
    eventually(DEADLINE, "nothing to be left", async || {
        let none = sample(&metrics().await, &series("after_publish")) == Some("0");
        (none && status_of(&addr).await["left"]["count"] == 0).then_some(())
    })
    .await;
    walpost.stop().await;
    assert_eq!(left().await, None);
}
