//! What each kind of table gets: columns that are missing, off, or of a type that cannot serve.

use super::support::{at, extractor, full_table, plain_row, relation, row, template};
use crate::outbox::{Columns, Extractor, Role, Scratch};
use crate::pgoutput::types::{BYTEA, FIRST_USER_OID, INT8, JSON, TEXT, TIMESTAMP, UUID};
use crate::pgoutput::{Column, Tuple};

const NUMERIC: u32 = 1700;

#[test]
fn what_an_optional_column_brings_is_off_without_it() {
    let table = relation(&[
        ("id", UUID),
        ("aggregateid", TEXT),
        ("payload", TEXT),
        ("type", TEXT),
    ]);
    let columns = Columns {
        event_type: String::new(),
        ..Columns::default()
    };
    let extractor = Extractor::new(&table, &columns, &template("t")).expect("enough");
    assert!(extractor.missing().eq([
        Role::AggregateType,
        Role::Type,
        Role::Topic,
        Role::Headers,
        Role::DeliverAt,
        Role::CreatedAt,
    ]));
    assert_eq!(extractor.table(), "walpost.outbox");
    assert_eq!(extractor.needs_text(), None);
}

/// The report of a table that cannot serve.
fn refusal(table: &[(&str, u32)], columns: &Columns, topic: &str) -> String {
    let error = Extractor::new(&relation(table), columns, &template(topic)).expect_err("refused");
    assert_eq!(error.exit_code(), 64);
    error.report()
}

#[test]
fn a_missing_column_is_named_with_the_setting_that_mends_it() {
    let default = Columns::default();
    let some = [("id", UUID), ("kind", TEXT), ("aggregateid", TEXT)];
    assert_eq!(
        refusal(&some, &default, "t"),
        "table walpost.outbox has no published column \"payload\" for the payload of an event (it publishes: id, \
         kind, aggregateid) (hint: set WALPOST_COLUMN_PAYLOAD to the column that holds it, or add the column to the \
         table and, where the publication lists columns, to the publication)"
    );
    let all = [
        ("id", UUID),
        ("kind", TEXT),
        ("aggregateid", TEXT),
        ("payload", JSON),
    ];
    let report = refusal(&all, &default, "{aggregatetype}");
    assert!(report.contains("\"aggregatetype\""), "{report}");
    assert!(report.contains("WALPOST_COLUMN_AGGREGATETYPE"), "{report}");
    let report = refusal(&all, &default, "{region}");
    assert!(report.contains("set WALPOST_TOPIC so"), "{report}");
    let off = Columns {
        payload: String::new(),
        ..Columns::default()
    };
    let report = refusal(&all, &off, "t");
    assert!(
        report.starts_with("WALPOST_COLUMN_PAYLOAD is empty"),
        "{report}"
    );
    let renamed = Columns {
        aggregatetype: "kind".to_owned(),
        ..Columns::default()
    };
    assert!(Extractor::new(&relation(&all), &renamed, &template("{aggregatetype}")).is_ok());
}

#[test]
fn a_type_that_cannot_serve_is_refused_at_once() {
    let table = |name, oid| {
        [
            ("id", UUID),
            ("aggregateid", TEXT),
            ("payload", JSON),
            (name, oid),
        ]
    };
    let default = Columns::default();
    assert_eq!(
        refusal(&table("created_at", INT8), &default, "t"),
        "column \"created_at\" of table walpost.outbox is int8, but created_at must be timestamptz or timestamp \
         (hint: set WALPOST_COLUMN_CREATED_AT to another column, or to nothing to do without)"
    );
    let report = refusal(&table("headers", BYTEA), &default, "t");
    assert!(report.contains("must be jsonb, json or text"), "{report}");
    for (name, oid) in [
        ("deliver_at", TIMESTAMP),
        ("headers", JSON),
        ("headers", FIRST_USER_OID),
    ] {
        assert!(Extractor::new(&relation(&table(name, oid)), &default, &template("t")).is_ok());
    }
}

#[test]
fn a_type_without_binary_reader_asks_for_text() {
    let table = [
        ("id", UUID),
        ("unread", NUMERIC),
        ("aggregateid", NUMERIC),
        ("payload", JSON),
        ("region", FIRST_USER_OID),
    ];
    let mut columns = Columns::default();
    let extractor =
        Extractor::new(&relation(&table), &columns, &template("t")).expect("enough for text");
    assert_eq!(extractor.needs_text(), Some(("aggregateid", NUMERIC)));
    columns.aggregateid = "id".to_owned();
    let extractor =
        Extractor::new(&relation(&table), &columns, &template("t")).expect("enough for text");
    assert_eq!(extractor.needs_text(), None);
    let extractor =
        Extractor::new(&relation(&table), &columns, &template("{region}")).expect("enough");
    assert_eq!(extractor.needs_text(), Some(("region", FIRST_USER_OID)));
}

#[test]
fn a_huge_row_does_not_hold_its_memory() {
    let extractor = extractor(&full_table(BYTEA));
    let mut scratch = Scratch::new();
    let huge = format!("\\x{}", "ab".repeat(4 << 20));
    let headers = format!("{{\"h\":\"{}\"}}", "v".repeat(4 << 20));
    let mut columns = plain_row();
    columns[at::PAYLOAD] = Column::Text(huge.as_bytes());
    columns[at::HEADERS] = Column::Text(headers.as_bytes());
    let bytes = row(&columns);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    let event = extractor.extract(&tuple, &mut scratch).expect("good");
    assert_eq!(event.payload.map(<[u8]>::len), Some(4 << 20));
    assert!(scratch.bytes.capacity() >= 4 << 20 && scratch.text.capacity() >= 4 << 20);

    columns[at::PAYLOAD] = Column::Null;
    columns[at::HEADERS] = Column::Null;
    let bytes = row(&columns);
    let tuple = Tuple::decode(&bytes).expect("well encoded");
    extractor.extract(&tuple, &mut scratch).expect("good");
    assert!(scratch.bytes.capacity() <= 1 << 20 && scratch.text.capacity() <= 1 << 20);
}
