use proptest::prelude::*;

use super::*;
use crate::outbox::{OutboxEvent, Scratch};
use crate::pgoutput::Tuple;

const FULL: &str = r#"{"id": "m-1", "aggregatetype": "order", "aggregateid": "c-7", "type": "OrderPlaced",
    "payload": {"n":  1.50, "none": null}, "headers": {"traceparent": "00", "tries": 3}, "topic": null,
    "deliver_at": "2026-01-02T03:04:05.678Z", "created_at": "2026-01-02 03:04:05+01"}"#;

/// Reads an envelope as the pipe does and hands event and topic, or the error, to `look`.
fn read_with<T>(
    columns: &Columns,
    template: &str,
    content: &[u8],
    look: impl FnOnce(Result<(OutboxEvent<'_>, &str), EventError>) -> T,
) -> T {
    let envelopes = Envelopes::new(columns, &TopicTemplate::parse(template).unwrap());
    let mut extractor = envelopes.extractor().unwrap();
    let mut row = vec![9; 3];
    let mut scratch = Scratch::new();
    if let Err(error) = envelopes.encode(content, &mut row) {
        return look(Err(error));
    }
    let tuple = Tuple::decode(&row).unwrap();
    let event = extractor.extract(&tuple, &mut scratch);
    look(event.and_then(|event| Ok((event, extractor.topic(&tuple, &event)?))))
}

fn read<T>(
    content: &str,
    look: impl FnOnce(Result<(OutboxEvent<'_>, &str), EventError>) -> T,
) -> T {
    let template = "persistent://public/default/outbox.{aggregatetype}";
    read_with(&Columns::default(), template, content.as_bytes(), look)
}

fn payload(member: &str) -> Option<Vec<u8>> {
    let content = format!(r#"{{"id": "1", "aggregatetype": "a", "aggregateid": "k"{member}}}"#);
    read(&content, |event| {
        event.unwrap().0.payload.map(<[u8]>::to_vec)
    })
}

fn refused(content: &str) -> String {
    read(content, |event| event.unwrap_err().to_string())
}

#[test]
fn every_member_becomes_what_the_column_of_its_name_becomes() {
    read(FULL, |event| {
        let (event, topic) = event.unwrap();
        assert_eq!((event.id, event.aggregateid), ("m-1", "c-7"));
        assert_eq!(event.payload, Some(&br#"{"n":  1.50, "none": null}"#[..]));
        assert_eq!(event.deliver_at_ms, Some(1_767_323_045_678));
        assert_eq!(event.event_time_ms, 1_767_319_445_000);
        let properties: Vec<_> = event.properties().collect();
        let expected = [
            ("id", "m-1"),
            ("type", "OrderPlaced"),
            ("aggregatetype", "order"),
            ("traceparent", "00"),
            ("tries", "3"),
        ];
        assert_eq!(properties, expected);
        assert_eq!(topic, "persistent://public/default/outbox.order");
    });
}

#[test]
fn a_payload_is_any_json_a_text_any_bytes_or_nothing() {
    assert_eq!(payload(r#", "payload": "x""#).unwrap(), br#""x""#);
    assert_eq!(payload(r#", "payload": null"#).unwrap(), b"null");
    assert_eq!(payload(r#", "payload_text": "x\n""#).unwrap(), b"x\n");
    assert_eq!(payload(r#", "payload_base64": "AP8=""#).unwrap(), [0, 255]);
    assert_eq!(payload(""), None);
    assert_eq!(payload(r#", "payload_text": null"#), None);
}

#[test]
fn what_is_no_envelope_is_named_without_its_values() {
    for (content, why) in [
        ("secret", "is no JSON object"),
        ("[\"secret\"]", "is no JSON object"),
        ("{\"id\": \"secret\" ", "is no JSON object"),
        (r#"{"id": "1"} secret"#, "is no JSON object"),
        (
            r#"{"payload": 1, "payload_text": "secret"}"#,
            "more than one payload",
        ),
        (
            r#"{"payload_base64": "secret!"}"#,
            "payload_base64 that is no base64",
        ),
        (r#"{"type": {"secret": 1}}"#, "type that is no text"),
        (
            r#"{"id": "secret\u0000"}"#,
            r"id with \u0000, which is no text in Postgres",
        ),
        (
            r#"{"agregateid": "secret"}"#,
            r#"none of an envelope: "agregateid""#,
        ),
        (r#"{"type": "secret", "type": "b"}"#, r#"has "type" twice"#),
        (
            r#"{"id": "1", "payload": "secret"}"#,
            "\"aggregateid\" is NULL",
        ),
        (
            r#"{"id": "1", "aggregateid": "k", "aggregatetype": "a/b"}"#,
            "cannot stand in a topic name",
        ),
        (
            r#"{"id": "1", "aggregateid": "k", "aggregatetype": "a", "headers": ["secret"]}"#,
            "is no JSON object",
        ),
        (
            r#"{"id": "1", "aggregateid": "k", "aggregatetype": "a", "deliver_at": "secret"}"#,
            "is no time",
        ),
    ] {
        let said = refused(content);
        assert!(said.contains(why), "{content}: {said}");
        assert!(!said.contains("secret"), "{content}: {said}");
    }
    let template = "persistent://public/default/t";
    read_with(
        &Columns::default(),
        template,
        b"{\"id\": \"\xff\"}",
        |event| {
            let said = event.unwrap_err().to_string();
            assert!(said.contains("not UTF-8"), "{said}");
        },
    );
}

#[test]
fn the_template_may_name_a_column_by_its_configured_name() {
    // GIVEN tables whose aggregatetype is called kind, and whose own topic is not to be obeyed
    let columns = Columns {
        aggregatetype: "kind".to_owned(),
        topic: String::new(),
        ..Columns::default()
    };
    let content = br#"{"id": "1", "aggregateid": "k", "aggregatetype": "a", "topic": "mine"}"#;
    // WHEN an envelope comes THEN its member is called aggregatetype all the same
    for template in [
        "persistent://public/default/{kind}",
        "persistent://public/default/{aggregatetype}",
    ] {
        read_with(&columns, template, content, |event| {
            assert_eq!(event.unwrap().1, "persistent://public/default/a");
        });
    }
    // THEN and a column that no envelope has is an error of that event
    read_with(
        &columns,
        "persistent://public/default/{tenant}",
        content,
        |event| {
            let said = event.unwrap_err().to_string();
            assert!(said.contains("column \"tenant\" is NULL"), "{said}");
        },
    );
}

proptest! {
    #[test]
    fn any_bytes_are_an_event_or_an_error(content in proptest::collection::vec(any::<u8>(), 0..200)) {
        let template = "persistent://public/default/t";
        read_with(&Columns::default(), template, &content, |_| ());
    }

    #[test]
    fn any_texts_come_out_as_they_went_in(id in "[^\\x00\n]+", key in "[^\\x00]*", text in ".*", bytes in any::<Vec<u8>>()) {
        let template = "persistent://public/default/t";
        let mut envelope = serde_json::json!({ "id": id, "aggregateid": key, "payload_text": text });
        read_with(&Columns::default(), template, envelope.to_string().as_bytes(), |event| {
            let (event, _) = event.unwrap();
            assert_eq!((event.id, event.aggregateid, event.payload), (&*id, &*key, Some(text.as_bytes())));
        });
        envelope = serde_json::json!({ "id": id, "aggregateid": key, "payload_base64": BASE64.encode(&bytes) });
        read_with(&Columns::default(), template, envelope.to_string().as_bytes(), |event| {
            assert_eq!(event.unwrap().0.payload, Some(&*bytes));
        });
    }
}
