//! One row that a Postgres 15 server sent in text and in binary format: each column reads the same in both.

use super::support::template;
use crate::outbox::{Columns, Extractor, Scratch, binary_safe};
use crate::pgoutput::golden_tests::bytes;
use crate::pgoutput::{Message, Relation, Tuple, parse};

const RELATION: &str = "52000040007075626c696300616c6c5f7479706573006400120169640000000b86ffffffff00740000000019ffffffff00766300000004130000000e006263000000041200000008006e6d0000000013ffffffff006a730000000072ffffffff006a620000000edaffffffff0062790000000011ffffffff0069320000000015ffffffff0069340000000017ffffffff0069380000000014ffffffff006f000000001affffffff0078000000001cffffffff00783800000013cdffffffff00620000000010ffffffff00747a00000004a0ffffffff007473000000045affffffff006e6f7468696e670000000019ffffffff";
const TEXT: &str = "49000040004e0012740000002430313932616161612d626262622d376363632d386464642d65656565666666663030303174000000076772c3b6c39f657400000002766374000000046263202074000000026e6d74000000097b226122203a20317d74000000087b2261223a20317d74000000085c7830306666313074000000022d3274000000022d3474000000022d38740000000a34303030303030303030740000000a3430303030303030303174000000143138343436373434303733373039353531363135740000000174740000001d323032362d30312d30322030333a30343a30352e3132333435362b30307400000015323032362d30312d30322030333a30343a30352e356e";
const BINARY: &str = "49000040004e001262000000100192aaaabbbb7ccc8dddeeeeffff000162000000076772c3b6c39f656200000002766362000000046263202062000000026e6d62000000097b226122203a20317d6200000009017b2261223a20317d620000000300ff106200000002fffe6200000004fffffffc6200000008fffffffffffffff86200000004ee6b28006200000004ee6b28016200000008ffffffffffffffff62000000010162000000080002ea5dbb16f58062000000080002ea5dbb1cb4606e";

/// What `select` prints for the row.
const PRINTED: [(&str, &str); 17] = [
    ("id", "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001"),
    ("t", "größe"),
    ("vc", "vc"),
    ("bc", "bc  "),
    ("nm", "nm"),
    ("js", r#"{"a" : 1}"#),
    ("jb", r#"{"a": 1}"#),
    ("by", r"\x00ff10"),
    ("i2", "-2"),
    ("i4", "-4"),
    ("i8", "-8"),
    ("o", "4000000000"),
    ("x", "4000000001"),
    ("x8", "18446744073709551615"),
    ("b", "t"),
    ("tz", "2026-01-02 03:04:05.123456+00"),
    ("ts", "2026-01-02 03:04:05.5"),
];

fn relation() -> Relation {
    match parse(&bytes(RELATION)) {
        Ok(Message::Relation(relation)) => relation,
        other => panic!("no Relation message: {other:?}"),
    }
}

/// Reads both rows with `columns`.
fn check(columns: &Columns, check: impl Fn(&Extractor, &Tuple<'_>, &mut Scratch)) {
    let extractor = Extractor::new(&relation(), columns, &template("t")).expect("columns exist");
    for payload in [bytes(TEXT), bytes(BINARY)] {
        let Ok(Message::Insert { relation_id, tuple }) = parse(&payload) else {
            panic!("no Insert message");
        };
        assert_eq!(relation_id, extractor.relation_id());
        check(&extractor, &tuple, &mut Scratch::new());
    }
}

fn columns(key: &str, payload: &str) -> Columns {
    Columns {
        aggregateid: key.to_owned(),
        payload: payload.to_owned(),
        ..Columns::default()
    }
}

#[test]
fn every_type_reads_as_its_text_in_both_formats() {
    for (name, printed) in PRINTED {
        check(&columns(name, "nothing"), |extractor, tuple, scratch| {
            let event = extractor.extract(tuple, scratch).expect(name);
            assert_eq!(event.id, PRINTED[0].1);
            assert_eq!(event.aggregateid, printed, "{name}");
            assert_eq!(event.payload, None, "a NULL payload is a tombstone");
        });
    }
    assert!(relation().columns.iter().all(|c| binary_safe(c.type_oid)));
}

#[test]
fn every_type_as_payload_is_its_text_but_bytea_its_bytes() {
    for (name, printed) in PRINTED {
        let expected = if name == "by" {
            b"\x00\xff\x10"
        } else {
            printed.as_bytes()
        };
        check(&columns("t", name), |extractor, tuple, scratch| {
            let event = extractor.extract(tuple, scratch).expect(name);
            assert_eq!(event.payload, Some(expected), "{name}");
        });
    }
}

#[test]
fn both_timestamp_types_serve_as_times() {
    let times = Columns {
        created_at: "tz".to_owned(),
        deliver_at: "ts".to_owned(),
        headers: "jb".to_owned(),
        ..columns("t", "js")
    };
    check(&times, |extractor, tuple, scratch| {
        let event = extractor.extract(tuple, scratch).expect("a good row");
        assert_eq!(event.event_time_ms, 1_767_323_045_123);
        assert_eq!(event.deliver_at_ms, Some(1_767_323_045_500));
        assert!(event.headers.iter().eq([("a", "1")]));
    });
}
