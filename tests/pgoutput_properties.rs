//! The decoder's contract, held against an encoder that was written from the documentation's tables alone: what is
//! encoded comes back, anything shorter or longer is an error, and no input at all panics.

use proptest::collection::vec;
use proptest::prelude::*;
use walpost::Lsn;
use walpost::pgoutput::{Column, LogicalMessage, Message, Relation, RelationColumn, Tuple, parse};

/// A column's value as the test owns it.
#[derive(Clone, Debug)]
enum Value {
    Null,
    Unchanged,
    Text(Vec<u8>),
    Binary(Vec<u8>),
}

impl Value {
    fn as_column(&self) -> Column<'_> {
        match self {
            Self::Null => Column::Null,
            Self::Unchanged => Column::Unchanged,
            Self::Text(bytes) => Column::Text(bytes),
            Self::Binary(bytes) => Column::Binary(bytes),
        }
    }
}

type Row = Vec<Value>;

/// Every message of protocol 1, owned.
#[derive(Clone, Debug)]
enum Sent {
    Begin(u64, i64, u32),
    Commit(u8, u64, u64, i64),
    Origin(u64, String),
    Relation(u32, String, String, u8, Vec<(u8, String, u32, i32)>),
    Type(u32, String, String),
    Insert(u32, Row),
    Update(u32, Option<(u8, Row)>, Row),
    Delete(u32, u8, Row),
    Truncate(Vec<u32>, u8),
    Logical(bool, u64, String, Vec<u8>),
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend(text.as_bytes());
    out.push(0);
}

fn put_row(out: &mut Vec<u8>, row: &Row) {
    out.extend(i16::try_from(row.len()).expect("few columns").to_be_bytes());
    for value in row {
        let (kind, bytes) = match value {
            Value::Null => (b'n', None),
            Value::Unchanged => (b'u', None),
            Value::Text(bytes) => (b't', Some(bytes)),
            Value::Binary(bytes) => (b'b', Some(bytes)),
        };
        out.push(kind);
        if let Some(bytes) = bytes {
            out.extend(i32::try_from(bytes.len()).expect("small").to_be_bytes());
            out.extend(bytes);
        }
    }
}

impl Sent {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Begin(lsn, time, xid) => {
                out.push(b'B');
                out.extend(lsn.to_be_bytes());
                out.extend(time.to_be_bytes());
                out.extend(xid.to_be_bytes());
            }
            Self::Commit(flags, lsn, end, time) => {
                out.extend([b'C', *flags]);
                out.extend(lsn.to_be_bytes());
                out.extend(end.to_be_bytes());
                out.extend(time.to_be_bytes());
            }
            Self::Origin(lsn, name) => {
                out.push(b'O');
                out.extend(lsn.to_be_bytes());
                put_string(&mut out, name);
            }
            Self::Relation(id, namespace, name, identity, columns) => {
                out.push(b'R');
                out.extend(id.to_be_bytes());
                put_string(&mut out, namespace);
                put_string(&mut out, name);
                out.push(*identity);
                out.extend(i16::try_from(columns.len()).expect("few").to_be_bytes());
                for (flags, name, oid, modifier) in columns {
                    out.push(*flags);
                    put_string(&mut out, name);
                    out.extend(oid.to_be_bytes());
                    out.extend(modifier.to_be_bytes());
                }
            }
            Self::Type(id, namespace, name) => {
                out.push(b'Y');
                out.extend(id.to_be_bytes());
                put_string(&mut out, namespace);
                put_string(&mut out, name);
            }
            Self::Insert(id, row) => {
                out.push(b'I');
                out.extend(id.to_be_bytes());
                out.push(b'N');
                put_row(&mut out, row);
            }
            Self::Update(id, old, row) => {
                out.push(b'U');
                out.extend(id.to_be_bytes());
                if let Some((kind, old)) = old {
                    out.push(*kind);
                    put_row(&mut out, old);
                }
                out.push(b'N');
                put_row(&mut out, row);
            }
            Self::Delete(id, kind, row) => {
                out.push(b'D');
                out.extend(id.to_be_bytes());
                out.push(*kind);
                put_row(&mut out, row);
            }
            Self::Truncate(ids, options) => {
                out.push(b'T');
                out.extend(i32::try_from(ids.len()).expect("few").to_be_bytes());
                out.push(*options);
                for id in ids {
                    out.extend(id.to_be_bytes());
                }
            }
            Self::Logical(transactional, lsn, prefix, content) => {
                out.extend([b'M', u8::from(*transactional)]);
                out.extend(lsn.to_be_bytes());
                put_string(&mut out, prefix);
                out.extend(i32::try_from(content.len()).expect("small").to_be_bytes());
                out.extend(content);
            }
        }
        out
    }

    /// Whether `message` says what was sent.
    fn is(&self, message: &Message<'_>) -> bool {
        match self {
            Self::Begin(lsn, time, xid) => {
                *message
                    == Message::Begin {
                        final_lsn: Lsn::new(*lsn),
                        commit_time_us: *time,
                        xid: *xid,
                    }
            }
            Self::Commit(flags, lsn, end, time) => {
                *message
                    == Message::Commit {
                        flags: *flags,
                        commit_lsn: Lsn::new(*lsn),
                        end_lsn: Lsn::new(*end),
                        commit_time_us: *time,
                    }
            }
            Self::Origin(lsn, name) => {
                *message
                    == Message::Origin {
                        commit_lsn: Lsn::new(*lsn),
                        name,
                    }
            }
            Self::Relation(id, namespace, name, identity, columns) => {
                *message
                    == Message::Relation(Relation {
                        id: *id,
                        namespace: namespace.clone(),
                        name: name.clone(),
                        replica_identity: *identity,
                        columns: columns.iter().map(relation_column).collect(),
                    })
            }
            Self::Type(id, namespace, name) => {
                *message
                    == Message::Type {
                        id: *id,
                        namespace,
                        name,
                    }
            }
            Self::Insert(id, row) => {
                matches!(message, Message::Insert { relation_id, tuple }
                    if relation_id == id && same_row(tuple, row))
            }
            Self::Update(id, ..) => *message == Message::Update { relation_id: *id },
            Self::Delete(id, ..) => *message == Message::Delete { relation_id: *id },
            Self::Truncate(ids, options) => {
                *message
                    == Message::Truncate {
                        relation_ids: ids.clone(),
                        options: *options,
                    }
            }
            Self::Logical(transactional, lsn, prefix, content) => {
                *message
                    == Message::Logical(LogicalMessage {
                        transactional: *transactional,
                        lsn: Lsn::new(*lsn),
                        prefix,
                        content,
                    })
            }
        }
    }
}

fn relation_column(column: &(u8, String, u32, i32)) -> RelationColumn {
    RelationColumn {
        flags: column.0,
        name: column.1.clone(),
        type_oid: column.2,
        type_modifier: column.3,
    }
}

fn same_row(tuple: &Tuple<'_>, row: &Row) -> bool {
    tuple.len() == row.len() && tuple.columns().eq(row.iter().map(Value::as_column))
}

fn row() -> impl Strategy<Value = Row> {
    let bytes = || vec(any::<u8>(), 0..24);
    vec(
        prop_oneof![
            Just(Value::Null),
            Just(Value::Unchanged),
            bytes().prop_map(Value::Text),
            bytes().prop_map(Value::Binary),
        ],
        0..12,
    )
}

fn sent() -> impl Strategy<Value = Sent> {
    let text = || "[^\0]{0,12}";
    let old = || prop_oneof![Just(b'K'), Just(b'O')];
    let column = (any::<u8>(), text(), any::<u32>(), any::<i32>());
    prop_oneof![
        any::<(u64, i64, u32)>().prop_map(|(a, b, c)| Sent::Begin(a, b, c)),
        any::<(u8, u64, u64, i64)>().prop_map(|(a, b, c, d)| Sent::Commit(a, b, c, d)),
        (any::<u64>(), text()).prop_map(|(a, b)| Sent::Origin(a, b)),
        (any::<u32>(), text(), text(), any::<u8>(), vec(column, 0..8))
            .prop_map(|(a, b, c, d, e)| Sent::Relation(a, b, c, d, e)),
        (any::<u32>(), text(), text()).prop_map(|(a, b, c)| Sent::Type(a, b, c)),
        (any::<u32>(), row()).prop_map(|(a, b)| Sent::Insert(a, b)),
        (any::<u32>(), proptest::option::of((old(), row())), row())
            .prop_map(|(a, b, c)| Sent::Update(a, b, c)),
        (any::<u32>(), old(), row()).prop_map(|(a, b, c)| Sent::Delete(a, b, c)),
        (vec(any::<u32>(), 0..6), any::<u8>()).prop_map(|(a, b)| Sent::Truncate(a, b)),
        (any::<bool>(), any::<u64>(), text(), vec(any::<u8>(), 0..32))
            .prop_map(|(a, b, c, d)| Sent::Logical(a, b, c, d)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1024) })]

    #[test]
    fn what_is_encoded_comes_back(sent in sent()) {
        let payload = sent.encode();
        let message = parse(&payload);
        prop_assert!(matches!(&message, Ok(message) if sent.is(message)), "{message:?}");
    }

    #[test]
    fn every_strict_prefix_is_an_error(sent in sent()) {
        let payload = sent.encode();
        for length in 0..payload.len() {
            prop_assert!(parse(&payload[..length]).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn a_byte_too_many_is_an_error(sent in sent(), extra in any::<u8>()) {
        let mut payload = sent.encode();
        payload.push(extra);
        prop_assert!(parse(&payload).is_err());
    }

    #[test]
    fn a_changed_byte_never_panics(sent in sent(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut payload = sent.encode();
        let at = at.index(payload.len());
        payload[at] = byte;
        touch(&payload);
    }

    #[test]
    fn arbitrary_bytes_never_panic(tag in prop::sample::select(b"BCORYIUDTMx".to_vec()), rest in vec(any::<u8>(), 0..96)) {
        touch(&rest);
        let mut payload = vec![tag];
        payload.extend(&rest);
        touch(&payload);
    }
}

/// Decodes `payload` and, where that works, reads all of it.
fn touch(payload: &[u8]) {
    match parse(payload) {
        Ok(Message::Insert { tuple, .. }) => {
            assert_eq!(
                tuple.columns().count(),
                tuple.len(),
                "columns promised and delivered"
            );
        }
        Ok(_) => {}
        Err(error) => assert!(error.offset() <= payload.len(), "{error}"),
    }
}
