//! Any row of a table with any column types becomes an event or an error, and its topic stays within the template.
//!
//! Input: one byte for each column's type, then the row as `TupleData`; the same bytes again as a template and as a row's
//! own topic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use walpost::outbox::{Columns, Extractor, Role, Scratch, TopicTemplate, key_hash, own_topic_into};
use walpost::pgoutput::{Relation, RelationColumn, Tuple, types};

const TYPES: [u32; 18] = [
    types::TEXT,
    types::UUID,
    types::JSON,
    types::JSONB,
    types::BYTEA,
    types::TIMESTAMPTZ,
    types::TIMESTAMP,
    types::INT2,
    types::INT4,
    types::INT8,
    types::OID,
    types::XID,
    types::XID8,
    types::BOOL,
    types::NAME,
    types::VARCHAR,
    types::BPCHAR,
    types::FIRST_USER_OID,
];

fuzz_target!(|input: &[u8]| {
    if let Ok(text) = std::str::from_utf8(input) {
        names(text);
    }
    let Some((oids, row)) = input.split_first_chunk::<9>() else {
        return;
    };
    let Ok(tuple) = Tuple::decode(row) else {
        return;
    };
    let columns = Role::ALL
        .iter()
        .zip(oids)
        .map(|(role, byte)| RelationColumn {
            flags: 0,
            name: role.name().to_owned(),
            type_oid: TYPES[usize::from(*byte) % TYPES.len()],
            type_modifier: -1,
        });
    let relation = Relation {
        id: 1,
        namespace: "public".to_owned(),
        name: "outbox".to_owned(),
        replica_identity: b'd',
        columns: columns.collect(),
    };
    let prefix = "persistent://public/default/outbox.";
    let template = TopicTemplate::parse(&format!("{prefix}{{aggregatetype}}")).expect("valid");
    let Ok(mut extractor) = Extractor::new(&relation, &Columns::default(), &template) else {
        return;
    };
    let mut scratch = Scratch::new();
    match extractor.extract(&tuple, &mut scratch) {
        Ok(event) => {
            key_hash(event.aggregateid.as_bytes());
            assert_eq!(event.properties().next(), Some(("id", event.id)));
            match extractor.topic(&tuple, &event) {
                Ok(topic) if event.topic.is_none() => {
                    let value = topic.strip_prefix(prefix);
                    assert!(
                        value.is_some_and(|v| Some(v) == event.aggregatetype && !v.contains('/'))
                    );
                }
                Ok(topic) => assert!(topic.ends_with(event.topic.unwrap_or_default())),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// Templates and topics keep their shape: two slashes for the domain, two for tenant and namespace.
fn names(text: &str) {
    let mut out = String::new();
    if let Ok(template) = TopicTemplate::parse(text) {
        let rendered = template.render_into(&mut out, |_, out| {
            out.push('v');
            Ok(())
        });
        assert_eq!(rendered, Ok(()));
        assert_eq!(out.matches('/').count(), 4, "{out}");
    }
    if own_topic_into(text, &mut out).is_ok() {
        assert_eq!(out.matches('/').count(), 4, "{out}");
    }
}
