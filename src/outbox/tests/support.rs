//! Relations and rows for the tests; the row encoder knows nothing of the decoder.

use crate::outbox::{Columns, Extractor, TopicTemplate};
use crate::pgoutput::{Column, Relation, RelationColumn, types};

/// A table with the given columns.
pub(super) fn relation(columns: &[(&str, u32)]) -> Relation {
    Relation {
        id: 7,
        namespace: "walpost".to_owned(),
        name: "outbox".to_owned(),
        replica_identity: b'd',
        columns: columns
            .iter()
            .map(|(name, type_oid)| RelationColumn {
                flags: 0,
                name: (*name).to_owned(),
                type_oid: *type_oid,
                type_modifier: -1,
            })
            .collect(),
    }
}

/// The columns that `walpost init` makes, with a payload of `payload_oid`.
pub(super) fn full_table(payload_oid: u32) -> Relation {
    relation(&[
        ("id", types::UUID),
        ("aggregatetype", types::TEXT),
        ("aggregateid", types::TEXT),
        ("type", types::TEXT),
        ("payload", payload_oid),
        ("topic", types::TEXT),
        ("headers", types::JSONB),
        ("deliver_at", types::TIMESTAMPTZ),
        ("created_at", types::TIMESTAMPTZ),
        ("seq", types::INT8),
        ("txid", types::XID8),
        ("sent_at", types::TIMESTAMPTZ),
    ])
}

pub(super) fn template(text: &str) -> TopicTemplate {
    TopicTemplate::parse(text).expect("a valid template")
}

/// An extractor with default columns and template.
pub(super) fn extractor(relation: &Relation) -> Extractor {
    let default = template("persistent://public/default/outbox.{aggregatetype}");
    Extractor::new(relation, &Columns::default(), &default).expect("the columns are there")
}

/// Encodes a row (`TupleData`).
pub(super) fn row(columns: &[Column<'_>]) -> Vec<u8> {
    let mut out = i16::try_from(columns.len())
        .expect("few columns")
        .to_be_bytes()
        .to_vec();
    for column in columns {
        let (kind, value) = match column {
            Column::Null => (b'n', None),
            Column::Unchanged => (b'u', None),
            Column::Text(value) => (b't', Some(value)),
            Column::Binary(value) => (b'b', Some(value)),
            Column::Held(value) => (b'h', Some(value)),
        };
        out.push(kind);
        if let Some(value) = value {
            out.extend(i32::try_from(value.len()).expect("small").to_be_bytes());
            out.extend(*value);
        }
    }
    out
}

/// A row of [`full_table`] in text format, with NULL where it may be NULL.
pub(super) fn plain_row() -> Vec<Column<'static>> {
    vec![
        Column::Text(b"0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001"),
        Column::Text(b"order"),
        Column::Text(b"order-1"),
        Column::Text(b"OrderPlaced"),
        Column::Text(br#"{"a" : 1}"#),
        Column::Null,
        Column::Null,
        Column::Null,
        Column::Text(b"2026-01-02 03:04:05.123456+00"),
        Column::Text(b"1"),
        Column::Text(b"726"),
        Column::Null,
    ]
}

/// Positions in [`full_table`].
pub(super) mod at {
    pub(crate) const ID: usize = 0;
    pub(crate) const AGGREGATETYPE: usize = 1;
    pub(crate) const AGGREGATEID: usize = 2;
    pub(crate) const TYPE: usize = 3;
    pub(crate) const PAYLOAD: usize = 4;
    pub(crate) const TOPIC: usize = 5;
    pub(crate) const HEADERS: usize = 6;
    pub(crate) const DELIVER_AT: usize = 7;
    pub(crate) const CREATED_AT: usize = 8;
}
