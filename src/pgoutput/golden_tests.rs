//! Payloads that a Postgres 15 server sent (`pg_logical_slot_peek_binary_changes`, `proto_version` 1), and what they mean.

use super::*;
use crate::Lsn;

/// Reads hexadecimal text.
pub(crate) fn bytes(hex: &str) -> Vec<u8> {
    let hex: Vec<u8> = hex.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    hex.chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("hex is ASCII");
            u8::from_str_radix(pair, 16).expect("a hex pair")
        })
        .collect()
}

#[test]
fn begin_and_commit() {
    assert_eq!(
        parse(&bytes("42000000000152aad0000303ec854e2e54000002d6")),
        Ok(Message::Begin {
            final_lsn: Lsn::new(0x0152_aad0),
            commit_time_us: 0x0003_03ec_854e_2e54,
            xid: 726,
        })
    );
    assert_eq!(
        parse(&bytes(
            "4300000000000152aad0000000000152ab00000303ec854e2e54"
        )),
        Ok(Message::Commit {
            flags: 0,
            commit_lsn: Lsn::new(0x0152_aad0),
            end_lsn: Lsn::new(0x0152_ab00),
            commit_time_us: 0x0003_03ec_854e_2e54,
        })
    );
}

#[test]
fn logical_message() {
    assert_eq!(
        parse(&bytes(
            "4d01000000000152ab4877616c706f737400000000077b2278223a317d"
        )),
        Ok(Message::Logical(LogicalMessage {
            transactional: true,
            lsn: Lsn::new(0x0152_ab48),
            prefix: "walpost",
            content: br#"{"x":1}"#,
        }))
    );
}

#[test]
fn truncate_restart_identity() {
    assert_eq!(
        parse(&bytes("54000000010200004000")),
        Ok(Message::Truncate {
            relation_ids: vec![16384],
            options: 2,
        })
    );
}

#[test]
fn update_and_delete_are_recognised() {
    assert_eq!(
        parse(&bytes("55000040004e0002740000000161620000000402030405")),
        Ok(Message::Update { relation_id: 16384 })
    );
    assert_eq!(
        parse(&bytes(
            "44000040004b001262000000100192aaaabbbb7ccc8dddeeeeffff0001 6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e6e"
        )),
        Ok(Message::Delete { relation_id: 16384 })
    );
}

#[test]
fn an_enum_and_a_domain_over_text() {
    let mut cache = RelationCache::new();
    for (hex, expected) in [
        (
            "590000400e7075626c6963006d6f6f6400",
            (0x400e, "public", "mood"),
        ),
        ("5900004012007465787400", (0x4012, "", "text")),
    ] {
        let payload = bytes(hex);
        let Ok(Message::Type {
            id,
            namespace,
            name,
        }) = parse(&payload)
        else {
            panic!("no Type message: {hex}");
        };
        assert_eq!((id, namespace, name), expected);
        cache.note_type(id, namespace, name);
    }
    let payload =
        bytes("52000040137075626c6963007500640002006d000000400effffffff00640000004012ffffffff");
    let Ok(Message::Relation(relation)) = parse(&payload) else {
        panic!("no Relation message");
    };
    assert_eq!(relation.to_string(), "public.u");
    assert_eq!(relation.replica_identity, b'd');
    assert_eq!(relation.position("d"), Some(1));
    assert_eq!(relation.columns[1].type_oid, 0x4012);

    assert!(cache.insert(relation.clone()));
    let kept = cache.get(0x4013).expect("just stored");
    assert_eq!(kept.columns[0].type_oid, 0x400e, "an enum stays what it is");
    assert_eq!(
        kept.columns[1].type_oid,
        types::TEXT,
        "the domain's base type"
    );
    assert!(!cache.insert(relation.clone()), "the same again");

    let mut renamed = relation;
    renamed.columns[0].name = "temper".to_owned();
    assert!(cache.insert(renamed));
    assert_eq!(
        cache.get(0x4013).and_then(|r| r.position("temper")),
        Some(0)
    );
    assert_eq!(cache.get(1), None);

    let payload = bytes("49000040134e00026200000003736164740000000164");
    let Ok(Message::Insert { relation_id, tuple }) = parse(&payload) else {
        panic!("no Insert message");
    };
    assert_eq!(relation_id, 0x4013);
    assert_eq!(tuple.len(), 2);
    assert!(
        tuple
            .columns()
            .eq([Column::Binary(b"sad"), Column::Text(b"d")])
    );
}

#[test]
fn errors_name_message_field_and_offset_but_never_the_bytes() {
    let error = parse(b"I\x00\x00\x40\x00N\x00\x01t\x00\x00\x00\x09secret").expect_err("cut off");
    assert_eq!(
        (error.message(), error.field(), error.offset()),
        ("Insert", "column value", 13)
    );
    assert_eq!(
        error.to_string(),
        "malformed pgoutput message Insert: column value at byte 13 needs 9 bytes, only 6 are left"
    );
    assert_eq!(
        parse(b"").expect_err("empty").to_string(),
        "malformed pgoutput message (any): message type at byte 0 needs 1 bytes, only 0 are left"
    );
    assert_eq!(
        parse(b"T\xff\xff\xff\xff\x00")
            .expect_err("negative")
            .to_string(),
        "malformed pgoutput message Truncate: relation count at byte 1 is negative (-1)"
    );
    assert_eq!(
        parse(b"I\x00\x00\x00\x01O\x00\x00")
            .expect_err("old tuple")
            .to_string(),
        "malformed pgoutput message Insert: tuple kind at byte 5 has the unexpected value 0x4f"
    );
}

#[test]
fn a_lying_count_allocates_nothing_and_unknown_types_pass() {
    assert!(parse(b"T\x7f\xff\xff\xff\x00\x00\x00\x00\x01").is_err());
    assert!(parse(b"R\x00\x00\x00\x01a\x00b\x00d\x7f\xff").is_err());
    assert_eq!(parse(b"S\x00\x01"), Ok(Message::Unknown(b'S')));
}

#[test]
fn debug_output_holds_no_values() {
    let payload = b"I\x00\x00\x00\x01N\x00\x03nut\x00\x00\x00\x06secret";
    let shown = format!("{:?}", parse(payload));
    assert!(
        shown.contains("[Null, Unchanged, Text(6 bytes)]"),
        "{shown}"
    );
    let shown = format!(
        "{:?}",
        parse(b"M\x00\x00\x00\x00\x00\x00\x00\x00\x01p\x00\x00\x00\x00\x06secret")
    );
    assert!(
        shown.contains("content_bytes: 6") && !shown.contains("101"),
        "{shown}"
    );
}

#[test]
fn names_that_are_no_utf_8_are_no_error_and_no_other_name() {
    let Ok(Message::Relation(relation)) =
        parse(b"R\0\0\x40\x13s\0t\xe9\0d\0\x02\0c\xe9\0\0\0\0\x19\xff\xff\xff\xff\0d\0\0\0\0\x19\xff\xff\xff\xff")
    else {
        panic!("no Relation message");
    };
    assert_eq!(relation.to_string(), "s.t\u{fffd}");
    assert_eq!(relation.position("d"), Some(1));
    let message = parse(b"M\x01\0\0\0\0\0\0\0\x07p\xe9\0\0\0\0\x01x");
    let Ok(Message::Logical(message)) = message else {
        panic!("no logical message");
    };
    assert_eq!(message.prefix, "\u{fffd}");
}
