//! A topic that the broker refuses: readiness, `/status`, the page, the metrics and `walpost status` name it, with the broker's words.

use pulsar::message::proto::ServerError;

use super::health::wait_ready;
use super::left::sample;
use super::page::browse;
use super::status::walpost_status;
use super::{DEADLINE, get, insert, status_of, streaming};
use crate::support::{Asked, FakeBroker, Reaction, eventually, reason};

const METRIC: &str = "walpost_topics_in_trouble";

#[tokio::test]
async fn a_topic_that_the_broker_refuses_is_named_everywhere_until_it_works_again() {
    // GIVEN a broker that opens no producer on one topic, with an answer that could as well be about all
    let broker = FakeBroker::start().await;
    broker.script_rest(|asked, command| match &command.producer {
        Some(producer) if asked == Asked::Producer && producer.topic.ends_with("orders") => {
            Reaction::Fail(ServerError::MetadataError)
        }
        _ => Reaction::Obey,
    });
    let words = reason(ServerError::MetadataError);
    let settings = [
        ("WALPOST_PULSAR_URL", &*broker.url()),
        ("WALPOST_STRAGGLER_AGE", "15s"),
        ("WALPOST_RECONNECT_MAX", "500ms"),
    ];
    let (database, walpost, addr) = streaming("trouble", &settings).await;
    let topic = database.topic("orders");
    assert_eq!(status_of(&addr).await["topics_in_trouble"]["count"], 0);
    let metric = async || {
        let text = get(&addr, "/metrics").await.body;
        sample(&text, METRIC).map(ToOwned::to_owned)
    };
    assert_eq!(metric().await.as_deref(), Some("0"));

    // WHEN that topic's events are all there is
    insert(&database, "orders", "k", "x").await;

    // THEN readiness blames the topic, and not a broker that does not answer
    let (_, why) = wait_ready(&addr, false, DEADLINE).await;
    assert!(
        why.contains(&format!("topic {topic} has taken nothing for ")) && why.contains(&words),
        "{why}"
    );
    assert!(!why.contains("does not answer"), "{why}");

    // AND so does everything else
    let status = status_of(&addr).await;
    let troubles = &status["topics_in_trouble"];
    assert_eq!(troubles["count"], 1, "{status:#}");
    let one = &troubles["listed"][0];
    assert_eq!(one["topic"], *topic, "{status:#}");
    assert_eq!(one["events_wait"], true, "{status:#}");
    assert!(one["age_seconds"].as_f64() >= Some(9.0), "{status:#}");
    let said = one["reason"].as_str().expect("a text");
    assert!(said.contains(&words), "{said}");
    assert_eq!(metric().await.as_deref(), Some("1"));
    let (_, said) = walpost_status(&addr, &[]).await;
    assert!(
        said.contains("topics in trouble: 1\n")
            && said.contains(&format!("  {topic} has taken nothing for "))
            && said.contains(&words),
        "{said}"
    );
    let page = browse(&format!("http://{addr}/"), "trouble.png", &[]).await;
    assert!(
        page.dom
            .contains("Topics in trouble <span id=\"troubles-count\">1</span>")
            && page.dom.contains(&words),
        "{}",
        page.dom
    );

    // WHEN another topic works THEN it is ready, and the topic whose events are stragglers now is still named
    insert(&database, "other", "k", "x").await;
    eventually(DEADLINE, "a straggler", async || {
        let status = status_of(&addr).await;
        (status["counters"]["stragglers_stored"] == 1 && status["in_flight"]["messages"] == 0)
            .then_some(())
    })
    .await;
    wait_ready(&addr, true, DEADLINE).await;
    eventually(DEADLINE, "its events to be stragglers", async || {
        let status = status_of(&addr).await;
        let troubles = &status["topics_in_trouble"];
        assert_eq!(troubles["count"], 1, "{status:#}");
        (troubles["listed"][0]["events_wait"] == false).then_some(())
    })
    .await;

    // WHEN the broker takes it THEN nothing is said of it any more
    broker.heal();
    eventually(DEADLINE, "no topic to be in trouble", async || {
        let status = status_of(&addr).await;
        let none = status["topics_in_trouble"]["count"] == 0
            && status["topics_in_trouble"]["listed"] == serde_json::json!([]);
        (none && metric().await.as_deref() == Some("0")).then_some(())
    })
    .await;
    let (_, said) = walpost_status(&addr, &[]).await;
    assert!(!said.contains("in trouble"), "{said}");
    walpost.stop().await;
}
