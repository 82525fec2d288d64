//! `walpost check` tells what holds and what mends it; `init --enable-deduplication` turns on what the broker must do.
//!
//! On the shared servers, with a namespace for each test: the default one belongs to all.

mod support;

use std::time::Duration;

use support::{Command, Database, Proxy, admin, eventually, servers, unique};

const DEADLINE: Duration = Duration::from_secs(60);

/// A database, and a template in a namespace of its own that nothing else touches.
struct Setup {
    database: Database,
    namespace: String,
    topic: String,
}

impl Setup {
    async fn new() -> Self {
        let namespace = unique("check");
        let path = format!("/admin/v2/namespaces/public/{namespace}");
        admin(&servers().pulsar_admin_url, "PUT", &path, "{}").await;
        Self {
            database: Database::create("check").await,
            topic: format!("persistent://public/{namespace}/{{aggregatetype}}"),
            namespace: format!("public/{namespace}"),
        }
    }

    /// `walpost <args>` with the admin interface known.
    fn walpost(&self, args: &[&str], settings: &[(&str, &str)]) -> Command {
        let admin_url = ("WALPOST_PULSAR_ADMIN_URL", &*servers().pulsar_admin_url);
        let topic = ("WALPOST_TOPIC", &*self.topic);
        let settings = [&[admin_url, topic], settings].concat();
        self.database.walpost(args, &settings)
    }

    async fn run(&self, args: &[&str], settings: &[(&str, &str)]) -> (i32, String) {
        self.walpost(args, settings).run(DEADLINE).await
    }

    fn topic_of(&self, aggregatetype: &str) -> String {
        self.topic.replace("{aggregatetype}", aggregatetype)
    }

    async fn policy(&self) -> String {
        let path = format!("/admin/v2/namespaces/{}/deduplication", self.namespace);
        let policy = admin(&servers().pulsar_admin_url, "GET", &path, "").await;
        policy.trim().to_owned()
    }
}

#[tokio::test]
async fn check_says_what_is_missing_and_which_guarantee_holds() {
    let setup = Setup::new().await;

    // GIVEN nothing: THEN what is missing is named with the command that makes it
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("fail  postgres") && said.contains("-> walpost init"),
        "{said}"
    );
    assert!(said.contains("ok    broker"), "{said}");

    // WHEN init has run: THEN nothing fails, and the guarantee is the weaker one
    let (code, said) = setup.run(&["init"], &[]).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 0, "{said}");
    for expected in [
        "ok    postgres",
        "ok    slot",
        "ok    version      Postgres ",
        "ok    wal_level    logical",
        "ok    rights",
        "warn  wal          max_slot_wal_keep_size is -1",
        "-> ALTER SYSTEM SET max_slot_wal_keep_size",
        "ok    slots",
        "ok    senders",
        "ok    topics       no row names a topic yet",
        "ok    size",
        "ok    broker",
        "5242880 bytes",
        "at least once, because deduplication is off for namespace",
        "-> turn it on with walpost init --enable-deduplication",
        &setup.namespace,
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }
    assert!(!said.contains("fail"), "{said}");

    // WHEN it is turned on: THEN check says so; a second time changes nothing
    let enable = ["init", "--enable-deduplication"];
    let (code, said) = setup.run(&enable, &[]).await;
    assert_eq!(code, 0, "{said}");
    let namespace = &setup.namespace;
    let enabled = format!("enabled deduplication of namespace {namespace}");
    assert!(said.contains(&enabled), "{said}");
    eventually(DEADLINE, "the policy", async || {
        (setup.policy().await == "true").then_some(())
    })
    .await;
    let (code, said) = setup.run(&enable, &[]).await;
    assert_eq!(code, 0, "{said}");
    let exists = format!("exists deduplication of namespace {namespace}");
    assert!(
        said.contains(&exists) && !said.contains("enabled"),
        "{said}"
    );
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("ok    guarantee    effectively once"),
        "{said}"
    );
}

#[tokio::test]
async fn the_same_as_json() {
    let setup = Setup::new().await;
    setup.run(&["init"], &[]).await;
    let quiet = ("WALPOST_LOG", "off");
    let (code, said) = setup.run(&["check", "--json"], &[quiet]).await;
    assert_eq!(code, 0, "{said}");
    let json: serde_json::Value = serde_json::from_str(&said).expect("JSON and nothing else");
    assert_eq!(json["exit_code"], 0);
    let checks = json["checks"].as_array().expect("a list");
    let status = |check: &str| {
        let found = checks.iter().find(|found| found["check"] == check);
        found.unwrap_or_else(|| panic!("no {check} in {said}"))["status"].clone()
    };
    for check in ["postgres", "slot", "broker", "encryption"] {
        assert_eq!(status(check), "ok", "{said}");
    }
    assert_eq!(status("guarantee"), "warn", "{said}");
}

#[tokio::test]
async fn each_topic_of_the_rows_is_tried_and_payloads_are_measured() {
    // GIVEN rows for two topics, one of them with its own, and a payload that no message can hold
    let setup = Setup::new().await;
    setup.run(&["init"], &[]).await;
    let insert =
        "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic) VALUES";
    let (fine, ended) = (setup.topic_of("fine"), setup.topic_of("ended"));
    setup
        .database
        .sql(&format!(
            "{insert} ('fine', 'k', 't', to_json(repeat('x', 6000000)), NULL), ('x', 'k', 't', 'null', '{ended}');
             {insert} ('fine', 'k', 't', 'null', NULL)"
        ))
        .await;

    // WHEN both take producers, THEN that is told, with what the payload is; nothing was sent
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 0, "{said}");
    let both = format!("ok    topics       a producer can be opened on {ended}, {fine}");
    assert!(said.contains(&both), "{said}");
    assert!(
        said.contains(
            "warn  size         the largest payload has 6000002 bytes, a message may have 5242880"
        ),
        "{said}"
    );
    let topics = [&ended, &fine];
    for topic in topics {
        let sent = support::consume(&servers().pulsar_url, topic, 0, DEADLINE).await;
        assert!(sent.is_empty());
    }

    // WHEN one is terminated, THEN it is named and the other is not
    let path = format!("/admin/v2/{}/terminate", ended.replacen("://", "/", 1));
    admin(&servers().pulsar_admin_url, "POST", &path, "").await;
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 69, "{said}");
    let refused = format!("fail  topics       the broker refuses topic {ended}");
    assert!(
        said.contains(&refused) && said.contains("-> route the events to another topic"),
        "{said}"
    );
    assert!(!said.contains(&fine), "{said}");

    // AND WHEN a role may not read what the scanner needs, THEN the statement that mends it is told
    let role = &setup.database.name;
    setup
        .database
        .sql(&format!("CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'p'; GRANT USAGE ON SCHEMA walpost TO {role}"))
        .await;
    let (_, server) = setup
        .database
        .url
        .rsplit_once('@')
        .expect("a URL with a user");
    let url = format!("postgres://{role}:p@{server}");
    let (_, said) = setup
        .run(&["check"], &[("WALPOST_POSTGRES_URL", &url)])
        .await;
    setup
        .database
        .sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}"))
        .await;
    for expected in [
        "warn  rights".to_owned(),
        format!("GRANT SELECT, INSERT, UPDATE, DELETE ON walpost.straggler TO {role};"),
        format!("GRANT SELECT ON walpost.outbox TO \"{role}\";"),
    ] {
        assert!(said.contains(&expected), "no {expected:?} in:\n{said}");
    }
}

#[tokio::test]
async fn a_guarantee_that_cannot_be_known_is_not_claimed() {
    let setup = Setup::new().await;
    setup.run(&["init"], &[]).await;

    let (code, said) = setup
        .run(&["check"], &[("WALPOST_PULSAR_ADMIN_URL", "")])
        .await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("warn  guarantee    unknown"), "{said}");
    assert!(said.contains("-> set WALPOST_PULSAR_ADMIN_URL"), "{said}");

    let by_row = ("WALPOST_TOPIC", "persistent://public/{aggregatetype}/x");
    let (code, said) = setup.run(&["check"], &[by_row]).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("warn  guarantee    not known: WALPOST_TOPIC has {aggregatetype}"),
        "{said}"
    );

    let missing = ("WALPOST_TOPIC", "persistent://public/no-such-namespace/x");
    let (code, said) = setup.run(&["check"], &[missing]).await;
    assert_eq!(code, 69, "{said}");
    assert!(
        said.contains("-> pulsar-admin namespaces create public/no-such-namespace"),
        "{said}"
    );
}

#[tokio::test]
async fn a_server_that_is_away_is_exit_75_unless_something_else_is_wrong() {
    let setup = Setup::new().await;
    // Nothing listens where a proxy has just been.
    let nowhere = Proxy::start(&servers().pulsar_addr).addr();
    let (broker, web) = (format!("pulsar://{nowhere}"), format!("http://{nowhere}"));
    let away = [
        ("WALPOST_PULSAR_URL", &*broker),
        ("WALPOST_PULSAR_ADMIN_URL", &*web),
    ];
    let (code, said) = setup.run(&["check"], &away).await;
    assert_eq!(code, 69, "no table, and that is final: {said}");
    setup.run(&["init"], &[]).await;
    let (code, said) = setup.run(&["check"], &away).await;
    assert_eq!(code, 75, "{said}");
    assert!(
        said.contains("fail  broker") && said.contains("fail  guarantee"),
        "{said}"
    );
    assert!(said.contains("ok    postgres"), "{said}");
    assert!(
        said.contains(&nowhere) && said.contains("WALPOST_PULSAR_ADMIN_URL"),
        "{said}"
    );
}

#[tokio::test]
async fn deduplication_that_cannot_be_turned_on_is_told_before_anything_is_made() {
    let setup = Setup::new().await;
    let enable = ["init", "--enable-deduplication"];
    for (setting, exit, words) in [
        (
            ("WALPOST_PULSAR_ADMIN_URL", ""),
            64,
            "WALPOST_PULSAR_ADMIN_URL",
        ),
        (
            ("WALPOST_TOPIC", "persistent://public/{aggregatetype}/x"),
            64,
            "WALPOST_TOPIC has {aggregatetype} in its tenant or namespace",
        ),
        (
            ("WALPOST_TOPIC", "non-persistent://public/default/x"),
            64,
            "names a non-persistent topic",
        ),
        (
            ("WALPOST_TOPIC", "persistent://public/no-such-namespace/x"),
            69,
            "pulsar-admin namespaces create public/no-such-namespace",
        ),
        (
            (
                "WALPOST_PULSAR_ADMIN_URL",
                &*servers().pulsar_url.replace("pulsar", "http"),
            ),
            75,
            "admin interface",
        ),
    ] {
        let (code, said) = setup.run(&enable, &[setting]).await;
        assert_eq!(code, exit, "{said}");
        assert!(said.contains(words), "{said}");
        let errors = said
            .lines()
            .filter(|line| line.contains("walpost: error: "));
        assert_eq!(errors.count(), 1, "{said}");
        let schema = "SELECT FROM pg_namespace WHERE nspname = 'walpost'";
        assert!(setup.database.rows(schema, &[]).await.is_empty(), "{said}");
    }
    assert_ne!(setup.policy().await, "true");
}

#[tokio::test]
async fn check_warns_of_stragglers_of_partitions_running_out_and_of_a_clock_that_was_set_back() {
    let setup = Setup::new().await;
    let database = &setup.database;
    setup.run(&["init", "--partition-by", "day"], &[]).await;
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 0, "{said}");
    for expected in [
        "ok    stragglers",
        "ok    partitions   walpost.outbox has 14 partitions",
        "ok    rows",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }

    // GIVEN fewer partitions than a week needs, and stragglers, one of them due in a year
    let rows = database
        .rows(
            "SELECT relid::text FROM pg_partition_tree('walpost.outbox') WHERE isleaf ORDER BY 1",
            &[],
        )
        .await;
    for row in &rows[4..] {
        let name: &str = row.get(0);
        database.sql(&format!("DROP TABLE {name}")).await;
    }
    let insert = "INSERT INTO walpost.straggler (slot, outbox, id, state, commit_lsn, ordinal, reason, next_attempt_at, created_at)
                  SELECT $1, 'walpost.outbox', n::text, (ARRAY['dead', 'retrying', 'parked'])[n], '0/1', n, 'a test',
                         now() + CASE n WHEN 2 THEN interval '1 year' ELSE interval '1s' END, '2001-02-03 04:05:06+00'
                  FROM generate_series(1, 3) n";
    database.rows(insert, &[&database.slot]).await;

    // THEN each is told with its command
    let (code, said) = setup.run(&["check"], &[]).await;
    assert_eq!(code, 0, "a warning is no failure: {said}");
    for expected in [
        "warn  partitions   walpost.outbox has 3 partitions beyond the present day",
        "-> start walpost run, or: walpost init --partition-by day",
        "warn  stragglers   2 events wait to be published again, 1 are dead; the oldest is of 2001-02-03 04:05:06 UTC; 1 are due later",
        "-> walpost stragglers retry --state retrying",
    ] {
        assert!(said.contains(expected), "no {expected:?} in:\n{said}");
    }

    // AND the commands mend it
    setup.run(&["init", "--partition-by", "day"], &[]).await;
    setup
        .run(&["stragglers", "retry", "--state", "retrying"], &[])
        .await;
    let (_, said) = setup.run(&["check"], &[]).await;
    assert!(said.contains("ok    partitions"), "{said}");
    assert!(
        said.contains("warn  stragglers") && !said.contains("due later"),
        "{said}"
    );
}

#[tokio::test]
async fn in_poll_mode_no_slot_is_asked_for_and_one_that_is_left_behind_is_told() {
    // GIVEN nothing: THEN what poll mode lacks is named, and nothing of streaming
    let setup = Setup::new().await;
    let poll = [("WALPOST_MODE", "poll")];
    let (code, said) = setup.run(&["check"], &poll).await;
    assert_eq!(code, 69, "{said}");
    assert!(said.contains("WALPOST_MODE=poll walpost init"), "{said}");
    assert!(!said.contains("wal_level"), "{said}");

    // WHEN it is made: THEN check is content
    let (code, said) = setup.run(&["init"], &poll).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = setup.run(&["check"], &poll).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("can be polled: walpost.outbox"), "{said}");
    assert!(said.contains("none is needed"), "{said}");

    // AND a slot that would keep log for nobody is told
    let (code, said) = setup.run(&["init"], &[]).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = setup.run(&["check"], &poll).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("warn  slot"), "{said}");
    let mend = format!("SELECT pg_drop_replication_slot('{}')", setup.database.slot);
    assert!(said.contains(&mend), "{said}");
}

#[tokio::test]
async fn topics_that_are_deleted_once_they_are_read_are_warned_of() {
    // GIVEN a namespace without a policy
    let setup = Setup::new().await;
    setup.run(&["init"], &[]).await;
    let (code, said) = setup.run(&["check"], &[]).await;
    assert!(code == 0 && !said.contains("inactive"), "{said}");

    let path = format!(
        "/admin/v2/namespaces/{}/inactiveTopicPolicies",
        setup.namespace
    );
    for (mode, deletes, warns) in [
        ("delete_when_subscriptions_caught_up", true, true),
        ("delete_when_subscriptions_caught_up", false, false),
        ("delete_when_no_subscriptions", true, false),
    ] {
        // WHEN it gets one
        let policy = format!(
            r#"{{"inactiveTopicDeleteMode": "{mode}", "maxInactiveDurationSeconds": 86400, "deleteWhileInactive": {deletes}}}"#
        );
        admin(&servers().pulsar_admin_url, "POST", &path, &policy).await;
        // It reaches the brokers a moment after it was accepted.
        eventually(DEADLINE, "the policy to be there", async || {
            let said = admin(&servers().pulsar_admin_url, "GET", &path, "").await;
            let there: serde_json::Value = serde_json::from_str(&said).ok()?;
            (there["inactiveTopicDeleteMode"] == mode && there["deleteWhileInactive"] == deletes)
                .then_some(())
        })
        .await;
        // THEN check says what that means for walpost, and what to do
        let (code, said) = setup.run(&["check"], &[]).await;
        assert_eq!(code, 0, "{said}");
        let warning = format!(
            "warn  inactive     delete_when_subscriptions_caught_up holds for namespace {}",
            setup.namespace
        );
        let is_warned = said.contains(&warning)
            && said.contains("-> pulsar-admin namespaces set-inactive-topic-policies");
        assert_eq!(is_warned, warns, "{mode} {deletes}: {said}");
        assert_eq!(
            said.contains(" inactive "),
            warns,
            "{mode} {deletes}: {said}"
        );
    }
}
