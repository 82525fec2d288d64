//! What each column of a row does, and what each kind of bad row or table gets.

use super::support::{at, extractor, full_table, plain_row, relation, row, template};
use crate::outbox::{Columns, EventError, Extractor, OutboxEvent, Problem, Salvaged, Scratch};
use crate::pgoutput::types::{BYTEA, INT8, JSON, JSONB, TEXT, TIMESTAMPTZ, UUID};
use crate::pgoutput::{Column, Tuple};

const NUMERIC: u32 = 1700;

/// Extracts one row of the full table, after `change` was made to the plain row, and hands over event and topic.
fn with_row<T>(
    payload_oid: u32,
    change: impl FnOnce(&mut Vec<Column<'static>>),
    read: impl FnOnce(Result<(OutboxEvent<'_>, String), EventError>) -> T,
) -> T {
    let mut extractor = extractor(&full_table(payload_oid));
    let mut columns = plain_row();
    change(&mut columns);
    let bytes = row(&columns);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    let mut scratch = Scratch::new();
    let result = extractor.extract(&tuple, &mut scratch).and_then(|event| {
        let topic = extractor.topic(&tuple, &event)?;
        Ok((event, topic.to_owned()))
    });
    read(result)
}

/// The error of a row with one other value.
fn error_of(index: usize, value: Column<'static>) -> EventError {
    with_row(
        JSON,
        |row| row[index] = value,
        |result| result.expect_err("a bad row"),
    )
}

#[test]
fn a_plain_row() {
    with_row(
        JSON,
        |_| {},
        |result| {
            let (event, topic) = result.expect("a good row");
            assert_eq!(event.id, "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001");
            assert_eq!(event.aggregatetype, Some("order"));
            assert_eq!(event.aggregateid, "order-1");
            assert_eq!(event.event_type, Some("OrderPlaced"));
            assert_eq!(event.payload, Some(&br#"{"a" : 1}"#[..]));
            assert!(event.headers.is_empty());
            assert_eq!(event.topic, None);
            assert_eq!(event.deliver_at_ms, None);
            assert_eq!(event.event_time_ms, 1_767_323_045_123);
            assert_eq!(topic, "persistent://public/default/outbox.order");
            assert!(event.properties().eq([
                ("id", "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001"),
                ("type", "OrderPlaced"),
                ("aggregatetype", "order"),
            ]));
            let shown = format!("{event:?}");
            assert!(shown.contains("payload_bytes: Some(9)"), "{shown}");
        },
    );
}

#[test]
fn a_tombstone_is_not_an_empty_payload() {
    for (oid, value, payload) in [
        (JSON, Column::Null, None),
        (TEXT, Column::Text(b""), Some(&b""[..])),
        (BYTEA, Column::Text(b"\\x"), Some(b"")),
        (BYTEA, Column::Binary(b""), Some(b"")),
        (BYTEA, Column::Text(b"\\x00fF7a"), Some(b"\0\xffz")),
        (BYTEA, Column::Binary(b"\0\xffz"), Some(b"\0\xffz")),
        (JSONB, Column::Binary(b"\x01{}"), Some(b"{}")),
        // Bytes of a text payload are not looked at.
        (TEXT, Column::Text(b"\xff"), Some(b"\xff")),
    ] {
        with_row(
            oid,
            |row| row[at::PAYLOAD] = value,
            |result| {
                let (event, _) = result.expect("a good row");
                assert_eq!(event.payload, payload, "{oid} {value:?}");
            },
        );
    }
}

#[test]
fn bad_payloads() {
    for (oid, value, problem) in [
        (BYTEA, Column::Text(b"\\x0"), Problem::NotHex),
        (BYTEA, Column::Text(b"\\x0g"), Problem::NotHex),
        (BYTEA, Column::Text(b"\\\\x00"), Problem::NotHex),
        (BYTEA, Column::Text(b""), Problem::NotHex),
        (
            JSONB,
            Column::Binary(b"\x02{}"),
            Problem::BinaryValue {
                oid: JSONB,
                length: 3,
            },
        ),
        (
            NUMERIC,
            Column::Binary(b"\0"),
            Problem::BinaryType { oid: NUMERIC },
        ),
        (JSON, Column::Unchanged, Problem::Unchanged),
    ] {
        with_row(
            oid,
            |row| row[at::PAYLOAD] = value,
            |result| {
                let error = result.expect_err("a bad payload");
                assert_eq!(*error.problem(), problem, "{value:?}");
                assert_eq!(error.column(), "payload");
                assert_eq!(error.row_id(), "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001");
            },
        );
    }
}

#[test]
fn headers_become_properties_but_replace_none_of_our_own() {
    let json = Column::Text(
        br#"{"traceparent": "00-ab", "n": 1, "id": "forged", "type": "forged", "x": null}"#,
    );
    with_row(
        JSON,
        |row| {
            row[at::HEADERS] = json;
            row[at::TYPE] = Column::Null;
        },
        |result| {
            let (event, _) = result.expect("a good row");
            assert_eq!(event.headers.len(), 4);
            assert!(event.properties().eq([
                ("id", "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001"),
                ("aggregatetype", "order"),
                ("traceparent", "00-ab"),
                ("n", "1"),
                ("type", "forged"),
            ]));
            assert!(!format!("{event:?}").contains("00-ab"));
        },
    );
    let error = error_of(at::HEADERS, Column::Text(b"[\"secret\"]"));
    assert_eq!(*error.problem(), Problem::HeadersNotObject);
    let error = error_of(at::HEADERS, Column::Binary(b"\x01{\"a\":secret}"));
    assert_eq!(*error.problem(), Problem::HeadersNotJson);
    assert!(!error.to_string().contains("secret"), "{error}");
}

#[test]
fn times() {
    for (value, expected) in [
        (Column::Null, 0),
        (Column::Text(b"1969-12-31 23:59:59.999+00"), 0),
        (Column::Text(b"0044-03-15 12:00:00+00 BC"), 0),
        (Column::Text(b"1970-01-01 01:00:00.0019+01"), 1),
        (Column::Binary(&[0; 8]), 946_684_800_000),
    ] {
        with_row(
            JSON,
            |row| row[at::CREATED_AT] = value,
            |result| {
                let (event, _) = result.expect("a good row");
                assert_eq!(event.event_time_ms, expected, "{value:?}");
            },
        );
    }
    with_row(
        JSON,
        |row| row[at::DELIVER_AT] = Column::Text(b"1970-01-01 00:00:00.0011+00"),
        |result| {
            let (event, _) = result.expect("a good row");
            assert_eq!(event.deliver_at_ms, Some(2), "never early");
        },
    );
    for index in [at::CREATED_AT, at::DELIVER_AT] {
        for (value, problem) in [
            (Column::Text(b"infinity"), Problem::InfiniteTime),
            (
                Column::Binary(&[0x80, 0, 0, 0, 0, 0, 0, 0]),
                Problem::InfiniteTime,
            ),
            (Column::Text(b"tomorrow"), Problem::NotTime),
            (Column::Text(b"\xff"), Problem::NotTime),
            (
                Column::Binary(&[0; 4]),
                Problem::BinaryValue {
                    oid: TIMESTAMPTZ,
                    length: 4,
                },
            ),
        ] {
            assert_eq!(*error_of(index, value).problem(), problem, "{value:?}");
        }
    }
}

#[test]
fn a_null_where_a_value_is_needed_names_the_row() {
    let error = error_of(at::AGGREGATEID, Column::Null);
    assert_eq!(
        error.to_string(),
        "outbox row with id 0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001 in walpost.outbox: column \"aggregateid\" is NULL, \
         and an event needs it"
    );
    let error: crate::Error = error.into();
    assert_eq!(error.exit_code(), 69);
    assert!(error.hint_text().is_some());

    let error = error_of(at::ID, Column::Null);
    assert_eq!((error.row_id(), error.column()), ("NULL", "id"));
    let error = error_of(at::ID, Column::Binary(b"short"));
    assert_eq!((error.row_id(), error.column()), ("(unreadable)", "id"));
    let error = error_of(at::AGGREGATETYPE, Column::Null);
    assert_eq!(
        (error.column(), error.problem()),
        ("aggregatetype", &Problem::Null)
    );
    for index in [
        at::ID,
        at::AGGREGATETYPE,
        at::AGGREGATEID,
        at::TYPE,
        at::TOPIC,
    ] {
        assert_eq!(
            *error_of(index, Column::Text(b"\xff")).problem(),
            Problem::NotUtf8
        );
        assert_eq!(
            *error_of(index, Column::Unchanged).problem(),
            Problem::Unchanged
        );
    }
}

#[test]
fn an_infinite_time_is_the_same_text_in_both_formats() {
    let table = relation(&[
        ("id", TIMESTAMPTZ),
        ("aggregateid", TIMESTAMPTZ),
        ("payload", TIMESTAMPTZ),
    ]);
    let extractor =
        Extractor::new(&table, &Columns::default(), &template("t")).expect("all that is needed");
    for (binary, text) in [(i64::MAX, "infinity"), (i64::MIN, "-infinity")] {
        let binary = binary.to_be_bytes();
        for column in [Column::Binary(&binary), Column::Text(text.as_bytes())] {
            let bytes = row(&[column; 3]);
            let tuple = Tuple::decode(&bytes).expect("well encoded");
            let mut scratch = Scratch::new();
            let event = extractor.extract(&tuple, &mut scratch).expect("a good row");
            assert_eq!((event.id, event.aggregateid), (text, text));
            assert_eq!(event.payload, Some(text.as_bytes()));
        }
    }
}

/// What is kept of a row with these values of key, type and payload; the id is `1`.
fn kept(values: [Column<'static>; 3]) -> (EventError, Salvaged) {
    let [key, event_type, payload] = values;
    let table = relation(&[
        ("id", TEXT),
        ("aggregateid", TEXT),
        ("type", TEXT),
        ("payload", TEXT),
    ]);
    let mut extractor =
        Extractor::new(&table, &Columns::default(), &template("t")).expect("all that is needed");
    let bytes = row(&[Column::Text(b"1"), key, event_type, payload]);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    let mut scratch = Scratch::new();
    let error = extractor.extract(&tuple, &mut scratch);
    let error = error.expect_err("no event");
    (error, extractor.salvage(&tuple))
}

#[test]
fn text_that_is_no_utf_8_is_kept_whole_and_without_a_topic() {
    let (error, salvaged) = kept([
        Column::Text(b"a\\b\xe9"),
        Column::Binary(b"\xff"),
        Column::Text(b"\xe9"),
    ]);
    assert_eq!(
        (error.column(), error.problem()),
        ("aggregateid", &Problem::NotUtf8)
    );
    assert!(error.problem().is_of_the_row());
    assert_eq!(salvaged.key.as_deref(), Some(r"a\\b\351"));
    assert_eq!(salvaged.payload.as_deref(), Some(&b"\xe9"[..]));
    assert_eq!(salvaged.topic, None);
    let kind = ("type".to_owned(), r"\377".to_owned());
    assert!(salvaged.properties.contains(&kind));
}

#[test]
fn text_in_the_databases_own_encoding_is_read_only_where_it_is_ascii() {
    let (error, salvaged) = kept([
        Column::Held(b"key"),
        Column::Held(b"t\x81"),
        Column::Held(b"\x81"),
    ]);
    assert_eq!(
        (error.column(), error.problem()),
        ("type", &Problem::Unconvertible)
    );
    assert!(error.problem().is_of_the_row());
    assert_eq!(salvaged.key.as_deref(), Some("key"));
    assert_eq!(salvaged.payload.as_deref(), Some(&b"\x81"[..]));
    assert_eq!(salvaged.topic, None);
    // Valid UTF-8 by chance is not what it means.
    let (error, salvaged) = kept([
        Column::Held("é".as_bytes()),
        Column::Null,
        Column::Held("é".as_bytes()),
    ]);
    assert_eq!(error.problem(), &Problem::Unconvertible);
    assert_eq!(salvaged.key.as_deref(), Some(r"\303\251"));
    assert_eq!(salvaged.payload.as_deref(), Some("é".as_bytes()));
}

#[test]
fn an_id_in_an_error_is_short_and_printable() {
    let table = relation(&[("id", TEXT), ("aggregateid", TEXT), ("payload", TEXT)]);
    let extractor =
        Extractor::new(&table, &Columns::default(), &template("t")).expect("all that is needed");
    let id = format!("a\n{}", "x".repeat(1000));
    let bytes = row(&[Column::Text(id.as_bytes()), Column::Null, Column::Null]);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    let mut scratch = Scratch::new();
    let error = extractor.extract(&tuple, &mut scratch).expect_err("no key");
    assert_eq!(error.row_id(), format!("a\\n{}", "x".repeat(98)));
}

#[test]
fn a_row_of_another_width_is_refused() {
    let error = with_row(
        JSON,
        |row| {
            row.pop();
        },
        |result| result.expect_err("a column too few"),
    );
    assert_eq!(
        error.to_string(),
        "outbox row with id 0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001 in walpost.outbox: the row has 11 values, but its \
         table 12 columns"
    );
}

#[test]
fn a_row_may_have_a_topic_of_its_own() {
    with_row(
        JSON,
        |row| {
            row[at::TOPIC] = Column::Text(b"special");
            // Not needed then, not even to be a topic name.
            row[at::AGGREGATETYPE] = Column::Null;
        },
        |result| {
            let (event, topic) = result.expect("a good row");
            assert_eq!(topic, "persistent://public/default/special");
            assert_eq!(event.aggregatetype, None);
        },
    );
    let error = error_of(at::TOPIC, Column::Text(b"a/b"));
    assert_eq!(
        (error.column(), error.problem()),
        ("topic", &Problem::TopicShape)
    );
    let error = error_of(at::AGGREGATETYPE, Column::Text(b"a/b"));
    assert_eq!(error.column(), "aggregatetype");
    assert!(error.to_string().contains("'/' at byte 1"), "{error}");
}

#[test]
fn any_column_may_be_in_the_template_in_either_format() {
    let table = relation(&[
        ("payload", TEXT),
        ("region", INT8),
        ("id", UUID),
        ("key", TEXT),
    ]);
    let columns = Columns {
        aggregateid: "key".to_owned(),
        ..Columns::default()
    };
    let template = template("r{region}.{id}.{aggregateid}");
    let mut extractor = Extractor::new(&table, &columns, &template).expect("the columns are there");
    for region in [
        Column::Text(b"42"),
        Column::Binary(&[0, 0, 0, 0, 0, 0, 0, 42]),
    ] {
        let bytes = row(&[
            Column::Null,
            region,
            Column::Binary(&[0xab; 16]),
            Column::Text(b"k"),
        ]);
        let tuple = Tuple::decode(&bytes).expect("well encoded");
        let mut scratch = Scratch::new();
        let event = extractor.extract(&tuple, &mut scratch).expect("a good row");
        assert_eq!(
            extractor.topic(&tuple, &event).expect("a topic"),
            "persistent://public/default/r42.abababab-abab-abab-abab-abababababab.k"
        );
    }
}

#[test]
fn one_column_may_have_two_roles() {
    let table = relation(&[("payload", TEXT), ("id", UUID)]);
    let columns = Columns {
        aggregateid: "id".to_owned(),
        ..Columns::default()
    };
    let extractor = Extractor::new(&table, &columns, &template("t")).expect("enough");
    let bytes = row(&[Column::Null, Column::Binary(&[1; 16])]);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    let mut scratch = Scratch::new();
    let event = extractor.extract(&tuple, &mut scratch).expect("a good row");
    assert_eq!(event.id, "01010101-0101-0101-0101-010101010101");
    assert_eq!(event.aggregateid, event.id);
}
