//! Guarantee: an event goes to the topic whose name its row gives, byte for byte, where Pulsar's own clients reach a topic of that
//! name; and to none where they would reach another one.

mod support;

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::time::Duration;

use support::{
    Database, Judged, Python, Walpost, admin, consume, eventually, java_topics, servers,
    topic_names,
};
use walpost::outbox::{Problem, own_topic_into};

const DEADLINE: Duration = Duration::from_secs(60);
/// The C++ client subscribes to all of them, one after the other.
const LONG: Duration = Duration::from_secs(120);

/// Names that Pulsar keeps apart. The last one gets partitions.
const NAMES: [&str; 16] = [
    r"App\Models\Order",
    "com.x.Order$Item",
    "a b",
    "a+b",
    "a%20b",
    "a%2Fb",
    "é",
    "e\u{301}",
    "日本 \u{1F600}",
    " <b>&amp;\"'",
    "?a=b#c;d",
    "{type}",
    "line\nand\ttab",
    "t-partition-x",
    "~*()!@",
    "parts of é",
];

/// A value of `aggregatetype`, or a topic of the row's own, that gives no topic, and why.
const REFUSED: [(&str, Option<&str>, &str); 7] = [
    ("a/b", None, "has '/' at byte 1"),
    ("a ", None, "end in a blank"),
    ("a\n", None, "end in a blank"),
    ("a-partition-0", None, "-partition-<number>"),
    ("a-partition-\u{663}", None, "-partition-<number>"),
    (
        "a",
        Some("non-persistent://public/default/x"),
        "non-persistent",
    ),
    ("a", Some("pub lic/default/x"), "has ' ' at byte 3"),
];

/// As Java's `URLEncoder` and everybody else reads it.
fn encoded(name: &str) -> String {
    let mut path = String::new();
    for byte in name.bytes() {
        write!(path, "%{byte:02X}").expect("a String takes it");
    }
    path
}

/// Inserts a row whose payload is its `aggregatetype`.
async fn insert(database: &Database, aggregatetype: &str, topic: Option<&str>) {
    let sql = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload, topic) VALUES ($1, 'k', 't', $1, $2)";
    database.rows(sql, &[&aggregatetype, &topic]).await;
}

/// The body of an answer of walpost's own HTTP server.
fn get(addr: &str, path: &str) -> String {
    let mut stream = std::net::TcpStream::connect(addr).expect("it listens");
    let request = format!("GET {path} HTTP/1.0\r\nHost: {addr}\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("it answers");
    let (_, body) = said.split_once("\r\n\r\n").expect("HTTP");
    body.to_owned()
}

async fn addr_of(walpost: &mut Walpost) -> String {
    let line = walpost.wait_for_line("health at http://", DEADLINE).await;
    let (_, addr) = line.split_once("http://").expect("just found");
    addr.trim_end_matches('/').to_owned()
}

#[tokio::test]
async fn each_name_is_a_topic_of_its_own_wherever_it_is_told() {
    // GIVEN a stream, and a partitioned topic of such a name
    let mut database = Database::create("names").await;
    database
        .own_namespace(&servers().pulsar_admin_url, &[])
        .await;
    let last = NAMES[NAMES.len() - 1];
    let partitioned = format!(
        "/admin/v2/persistent/public/{}/{}/partitions",
        database.name,
        encoded(&format!("t.{last}"))
    );
    admin(&servers().pulsar_admin_url, "PUT", &partitioned, "3").await;
    database.init(&["--payload", "text"], &[]).await;
    let mut walpost = database.start(&[("WALPOST_SCAN_INTERVAL", "100ms")]).await;
    let addr = addr_of(&mut walpost).await;

    // WHEN rows name them, THEN check opens a producer on each
    let topics: Vec<String> = NAMES.iter().map(|name| database.topic(name)).collect();
    for name in NAMES {
        insert(&database, name, None).await;
    }
    let (code, said) = database.walpost(&["check"], &[]).run(DEADLINE).await;
    let opened = said
        .lines()
        .find(|line| line.starts_with("ok    topics       a producer can be opened on "))
        .unwrap_or_else(|| panic!("{code}: {said}"));
    for topic in &topics {
        let shown = topic.replace('\n', "\\n").replace('\t', "\\t");
        assert!(opened.contains(&shown), "{topic}: {opened}");
    }

    // WHEN they name them as their own topic, too
    for (name, topic) in NAMES.iter().zip(&topics) {
        insert(&database, name, Some(topic)).await;
    }
    database.wait_all_confirmed(DEADLINE).await;

    // THEN a client that shares nothing with walpost finds in each topic the rows of its name
    let order = serde_json::json!({ "topic": topics, "type": "Exclusive" });
    let mut consumer = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumer.next(LONG).await["ready"], true);
    let mut found: Vec<(String, String)> = Judged::take(consumer, 2 * NAMES.len(), DEADLINE)
        .await
        .into_iter()
        .map(|message| {
            let topic = message.topic;
            let whole = match topic.rsplit_once("-partition-") {
                Some((whole, number)) if number.parse::<u32>().is_ok() => whole.to_owned(),
                _ => topic,
            };
            (whole, String::from_utf8(message.payload).expect("UTF-8"))
        })
        .collect();
    found.sort();
    let mut expected: Vec<(String, String)> = NAMES
        .iter()
        .flat_map(|name| [(); 2].map(|()| (database.topic(name), (*name).to_owned())))
        .collect();
    expected.sort();
    assert_eq!(found, expected);

    // AND Prometheus' text, the status and the command that prints it have each name
    let metrics = get(&addr, "/metrics");
    let status: serde_json::Value = serde_json::from_str(&get(&addr, "/status")).expect("JSON");
    let told: Vec<&str> = status["topics"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|topic| topic["topic"].as_str().expect("text"))
        .collect();
    for topic in &topics {
        let label = topic
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n");
        let sample = format!("walpost_events_published_total{{topic=\"{label}\"}} 2");
        assert!(
            metrics.lines().any(|line| line == sample),
            "{sample}\n{metrics}"
        );
        assert!(told.contains(&&**topic), "{topic}: {told:?}");
    }

    // AND verify reads each
    eventually(DEADLINE, "every row to be noted as delivered", async || {
        let sql = "SELECT coalesce(bool_and(pg_visible_in_snapshot(txid, delivered)), false) FROM walpost.outbox, walpost.progress";
        let rows = database.rows(sql, &[]).await;
        rows[0].get::<_, bool>(0).then_some(())
    })
    .await;
    let (code, said) = database.walpost(&["verify"], &[]).run(DEADLINE).await;
    assert!(
        code == 0 && said.contains(&format!("against {} topics", NAMES.len())),
        "{said}"
    );
    walpost.stop().await;
}

#[tokio::test]
async fn a_name_that_would_be_another_topic_makes_a_dead_straggler_that_says_why() {
    // GIVEN a stream, and the topic that a cut name would reach
    let database = Database::create("nonames").await;
    database.init(&["--payload", "text"], &[]).await;
    let walpost = database.start(&[]).await;

    // WHEN rows name what is no topic of its own
    for (aggregatetype, topic, _) in REFUSED {
        insert(&database, aggregatetype, topic).await;
    }
    insert(&database, "a", None).await;
    database.wait_all_confirmed(DEADLINE).await;

    // THEN each is a dead straggler with the reason
    let rows = database
        .rows(
            "SELECT state, reason FROM walpost.straggler ORDER BY number",
            &[],
        )
        .await;
    assert_eq!(rows.len(), REFUSED.len());
    for (row, (aggregatetype, topic, why)) in rows.iter().zip(REFUSED) {
        let (state, reason): (&str, &str) = (row.get(0), row.get(1));
        assert_eq!(state, "dead", "{aggregatetype:?} {topic:?}");
        assert!(
            reason.contains(why),
            "{aggregatetype:?} {topic:?}: {reason}"
        );
    }

    // AND none of them is in the other topic
    let there = consume(&servers().pulsar_url, &database.topic("a"), 1, DEADLINE).await;
    assert_eq!(there.len(), 1);
    walpost.stop().await;
}

#[tokio::test]
async fn a_template_of_non_persistent_topics_is_refused_before_anything_is_done() {
    let database = Database::create("volatile").await;
    for (variable, topic) in [
        (
            "WALPOST_TOPIC",
            "non-persistent://public/default/{aggregatetype}",
        ),
        (
            "WALPOST_DEAD_LETTER_TOPIC",
            "non-persistent://public/default/dead",
        ),
    ] {
        for command in ["init", "check", "run"] {
            let (code, said) = database
                .walpost(&[command], &[(variable, topic)])
                .run(DEADLINE)
                .await;
            assert_eq!(code, 64, "{command}: {said}");
            assert!(
                said.contains(variable) && said.contains("non-persistent"),
                "{command}: {said}"
            );
        }
    }
}

#[tokio::test]
async fn a_name_is_accepted_if_the_java_client_reaches_that_topic_by_it() {
    // GIVEN names of all kinds, in full
    let names: Vec<String> = topic_names()
        .into_iter()
        .map(|name| format!("persistent://t/n/{name}"))
        .collect();
    // WHEN the Java client is asked for their topics
    let theirs = java_topics(servers(), &names).await;
    let mut ours = String::new();
    let mut accepted = 0;
    for (name, theirs) in names.iter().zip(theirs) {
        let problem = own_topic_into(name, &mut ours).err();
        // Pulsar reads "tenant/cluster/namespace/name" as well, of its first version.
        let is_old = name.matches('/').count() > 4;
        let is_theirs = theirs.is_some_and(|theirs| theirs == *name) && !is_old;
        // THEN walpost accepts what is a topic of exactly that name
        match problem {
            None => {
                accepted += 1;
                assert!(is_theirs, "{name:?}");
                assert_eq!(ours, *name);
            }
            // AND refuses the rest, and what the other clients and the admin interface take for something else
            Some(problem) => {
                let is_other = match problem {
                    Problem::TopicDots | Problem::TopicPartition => {
                        name.contains("-partition-0")
                            || name.ends_with("/.")
                            || name.ends_with("/..")
                    }
                    _ => false,
                };
                assert!(!is_theirs || is_other, "{name:?}: {problem:?}");
            }
        }
    }
    assert!(accepted > 1000, "{accepted}");
}
