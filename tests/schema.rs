//! Guarantee: topics carry the schema that the settings name, so that typed consumers read them; a topic whose schema cannot
//! be had, or that the broker refuses, delays its own events only.
//!
//! Judged by typed consumers of the C++ client and by the broker's admin interface.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Database, Judged, Python, Walpost, admin, eventually, servers, try_admin, unique};

const DEADLINE: Duration = Duration::from_secs(60);

/// What `typed.py` calls an `Order`.
const ORDER: &str = r#"{"type": "record", "name": "Order",
    "fields": [{"name": "id", "type": "int"}, {"name": "state", "type": "string"}]}"#;
/// A topic's older schema, which no strategy but "always" lets that one follow.
const OTHER_ORDER: &str =
    r#"{"type": "record", "name": "Order", "fields": [{"name": "id", "type": "string"}]}"#;

/// A folder for schema files, in the build's own one for tests.
fn folder() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique("schema"));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    folder
}

/// What is published.
fn orders() -> Vec<Value> {
    vec![
        json!({"id": 1, "state": "placed"}),
        json!({"id": -70_000, "state": "größer 😀"}),
        json!({"id": 3, "state": ""}),
    ]
}

/// Runs `typed.py` to its end.
async fn typed(order: Value) -> Vec<Value> {
    let program = Python::start("typed", order, &servers().pulsar_url).await;
    program.rest(DEADLINE).await
}

/// Path of the topic's schema in the admin interface.
fn schema_path(topic: &str) -> String {
    let (_, name) = topic.split_once("://").expect("a full name");
    format!("/admin/v2/schemas/{name}/schema")
}

/// What the broker has registered for a topic.
async fn registered(topic: &str) -> Value {
    let said = admin(&servers().pulsar_admin_url, "GET", &schema_path(topic), "").await;
    serde_json::from_str(&said).expect("the broker answers in JSON")
}

async fn insert(database: &Database, topic: &str, payloads: &[Vec<u8>]) {
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT $1::text, 'k', 't', p FROM unnest($2::bytea[]) p";
    database.rows(insert, &[&topic, &payloads]).await;
}

/// Publishes payloads with a schema and returns the topic, once everything is confirmed.
async fn published(
    database: &Database,
    kind: &str,
    file: Option<&str>,
    payloads: &[Vec<u8>],
) -> String {
    database.init(&["--payload", "bytea"], &[]).await;
    let mut settings = vec![("WALPOST_SCHEMA", kind)];
    settings.extend(file.map(|file| ("WALPOST_SCHEMA_FILE", file)));
    let walpost = database.start(&settings).await;
    insert(database, "orders", payloads).await;
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;
    database.topic("orders")
}

fn as_json(values: &[Value]) -> Vec<Vec<u8>> {
    values
        .iter()
        .map(|value| value.to_string().into_bytes())
        .collect()
}

/// A typed consumer reads `values` back, and each message names the first version of the schema.
async fn assert_typed(topic: &str, schema: &str, values: &[Value]) {
    let order = json!({"do": "read", "topic": topic, "schema": schema, "count": values.len()});
    let expected: Vec<_> = values
        .iter()
        .map(|value| json!({"value": value, "version": 0}))
        .collect();
    assert_eq!(typed(order).await, expected);
}

#[tokio::test]
async fn a_json_schema_is_registered_and_a_typed_consumer_reads_the_topic() {
    // One file for each topic, found by its name.
    let database = Database::create("json").await;
    let folder = folder();
    let (_, local) = database.topic_prefix.rsplit_once('/').expect("a full name");
    std::fs::write(folder.join(format!("{local}.orders.avsc")), ORDER).expect("a file");
    let template = format!("{}/{{topic}}.avsc", folder.display());
    let topic = published(&database, "json", Some(&template), &as_json(&orders())).await;

    let schema = registered(&topic).await;
    assert_eq!(
        (&schema["type"], &schema["version"]),
        (&json!("JSON"), &json!(0))
    );
    assert_typed(&topic, "json", &orders()).await;
}

#[tokio::test]
async fn an_avro_schema_is_registered_and_a_typed_consumer_reads_the_topic() {
    let database = Database::create("avro").await;
    let file = folder().join("one for all.avsc");
    std::fs::write(&file, ORDER).expect("a file");
    let encoded = typed(json!({"do": "encode", "values": orders()})).await;
    let payloads: Vec<_> = encoded
        .iter()
        .map(|line| support::hex(line["bytes"].as_str().expect("text")))
        .collect();
    let topic = published(&database, "avro", file.to_str(), &payloads).await;

    let schema = registered(&topic).await;
    assert_eq!(schema["type"], "AVRO");
    let definition: Value =
        serde_json::from_str(schema["data"].as_str().expect("text")).expect("JSON");
    let expected: Value = serde_json::from_str(ORDER).expect("JSON");
    assert_eq!(definition, expected);
    assert_typed(&topic, "avro", &orders()).await;
}

#[tokio::test]
async fn text_needs_no_schema_file() {
    let database = Database::create("string").await;
    let texts = ["plain", "größer 😀", ""].map(|text| json!(text));
    let payloads = ["plain", "größer 😀", ""].map(|text| text.as_bytes().to_vec());
    let topic = published(&database, "string", None, &payloads).await;
    assert_eq!(registered(&topic).await["type"], "STRING");
    assert_typed(&topic, "string", &texts).await;
}

#[tokio::test]
async fn a_protobuf_schema_is_registered_and_the_bytes_are_untouched() {
    let database = Database::create("protobuf").await;
    let file = folder().join("order.avsc");
    std::fs::write(&file, ORDER).expect("a file");
    // Field 1 is 150, field 2 is "ok"; as in the encoding's own documentation.
    let payload = vec![0x08, 0x96, 0x01, 0x12, 0x02, b'o', b'k'];
    let topic = published(
        &database,
        "protobuf",
        file.to_str(),
        std::slice::from_ref(&payload),
    )
    .await;
    assert_eq!(registered(&topic).await["type"], "PROTOBUF");
    let seen = read(&topic, 1).await;
    assert_eq!(seen[0].payload, payload);
}

#[tokio::test]
async fn without_the_setting_nothing_is_registered() {
    let database = Database::create("none").await;
    let topic = published(&database, "none", None, &as_json(&orders())).await;
    let url = &servers().pulsar_admin_url;
    let said = try_admin(url, "GET", &schema_path(&topic), "").await;
    let refusal = said.expect_err("a topic without a schema");
    assert!(refusal.contains(" 404 "), "{refusal}");
}

/// The messages of a topic, without a schema.
async fn read(topic: &str, count: usize) -> Vec<Judged> {
    let order = json!({"topic": topic, "type": "Exclusive"});
    let mut consumer = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumer.next(DEADLINE).await, json!({"ready": true}));
    Judged::take(consumer, count, DEADLINE).await
}

/// Waits for one line about this topic that has all these words and says what to do.
async fn wait_for_reason(walpost: &Walpost, topic: &str, words: &[&str]) {
    let what = format!("one line about {topic} with {words:?} and a hint");
    eventually(DEADLINE, &what, async || {
        let lines = walpost.lines();
        let found = lines.iter().any(|line| {
            line.contains(topic)
                && line.contains("hint: ")
                && words.iter().all(|word| line.to_lowercase().contains(word))
        });
        found.then_some(())
    })
    .await;
}

/// Events of a good topic arrive while those of a bad one wait; when `heal` has run, all have arrived.
async fn waits_alone(
    database: &Database,
    settings: &[(&str, &str)],
    words: &[&str],
    heal: impl AsyncFnOnce(),
) {
    // GIVEN a stream
    database.init(&["--payload", "bytea"], &[]).await;
    let walpost = database.start(settings).await;

    // WHEN events of both topics are committed
    let payloads = as_json(&orders());
    insert(database, "bad", &payloads).await;
    insert(database, "good", &payloads).await;

    // THEN a line says why, the good ones arrive, and nothing passes the others before they are stored
    wait_for_reason(&walpost, &database.topic("bad"), words).await;
    assert_eq!(read(&database.topic("good"), 3).await.len(), 3);
    let all = database.current_wal_lsn().await;
    let confirmed = database.confirmed_flush_lsn(&database.slot).await;
    let stored = database.rows("SELECT count(*) FROM walpost.straggler", &[]);
    let stored: i64 = stored.await[0].get(0);
    assert!(
        confirmed < Some(all) || stored == 3,
        "events without a receipt are confirmed, and {stored} of 3 are stored"
    );
    // AND more of the good ones still arrive
    insert(database, "good", &payloads).await;
    let topic = database.topic("good");
    let order = json!({"do": "read", "topic": topic, "schema": "json", "count": 6});
    assert_eq!(typed(order).await.len(), 6);

    // AND WHEN the reason is gone, all of it arrives, in order
    heal().await;
    database.wait_all_confirmed(DEADLINE).await;
    let seen = read(&database.topic("bad"), 3).await;
    let seen: Vec<_> = seen.into_iter().map(|message| message.payload).collect();
    assert_eq!(seen, payloads);
    walpost.stop().await;
}

#[tokio::test]
async fn an_incompatible_schema_delays_its_topic_alone_until_it_is_allowed() {
    // GIVEN a namespace that wants compatible schemas, and a topic that has an incompatible one
    let mut database = Database::create("strict").await;
    let url = &servers().pulsar_admin_url;
    database.own_namespace(url, &[]).await;
    let strategy = format!(
        "/admin/v2/namespaces/public/{}/schemaCompatibilityStrategy",
        database.name
    );
    admin(url, "PUT", &strategy, "\"FULL\"").await;
    let older = json!({"type": "JSON", "schema": OTHER_ORDER, "properties": {}}).to_string();
    admin(url, "POST", &schema_path(&database.topic("bad")), &older).await;
    let file = folder().join("order.avsc");
    std::fs::write(&file, ORDER).expect("a file");
    let settings = [
        ("WALPOST_SCHEMA", "json"),
        ("WALPOST_SCHEMA_FILE", file.to_str().expect("UTF-8")),
        ("WALPOST_RECONNECT_MAX", "1s"),
        ("WALPOST_RETRY_MAX", "1s"),
    ];
    waits_alone(
        &database,
        &settings,
        &["incompatible", "schema"],
        async || {
            admin(url, "PUT", &strategy, "\"ALWAYS_COMPATIBLE\"").await;
        },
    )
    .await;
    assert_eq!(registered(&database.topic("bad")).await["version"], 1);
}

#[tokio::test]
async fn a_missing_schema_file_delays_its_topic_alone_until_it_is_there() {
    let database = Database::create("missing").await;
    let folder = folder();
    let (_, local) = database.topic_prefix.rsplit_once('/').expect("a full name");
    let file = |topic: &str| folder.join(format!("{local}.{topic}.avsc"));
    std::fs::write(file("good"), ORDER).expect("a file");
    let template = format!("{}/{{topic}}.avsc", folder.display());
    let settings = [
        ("WALPOST_SCHEMA", "json"),
        ("WALPOST_SCHEMA_FILE", &*template),
        ("WALPOST_RECONNECT_MAX", "1s"),
        ("WALPOST_RETRY_MAX", "1s"),
    ];
    let name = format!("{local}.bad.avsc");
    waits_alone(&database, &settings, &["schema file", &name], async || {
        std::fs::write(file("bad"), ORDER).expect("a file");
    })
    .await;
}
