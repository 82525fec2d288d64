//! `pgoutput` messages as a walsender sends them for `walpost.outbox`, built here so that `micro` needs no server.

use walpost::pgoutput::{Message, Relation, parse, types};

/// The relation's OID.
const OID: u32 = 16_400;

/// A payload's bytes, as in the drain.
pub(crate) const PAYLOAD_BYTES: usize = 300;

/// Columns of the table: name and type.
const COLUMNS: [(&str, u32); 12] = [
    ("id", types::UUID),
    ("aggregatetype", types::TEXT),
    ("aggregateid", types::TEXT),
    ("type", types::TEXT),
    ("payload", types::JSON),
    ("topic", types::TEXT),
    ("headers", types::JSONB),
    ("deliver_at", types::TIMESTAMPTZ),
    ("created_at", types::TIMESTAMPTZ),
    ("seq", types::INT8),
    ("txid", types::XID8),
    ("sent_at", types::TIMESTAMPTZ),
];

/// The table's Relation message.
pub(crate) fn relation_message() -> Vec<u8> {
    let mut out = vec![b'R'];
    out.extend(OID.to_be_bytes());
    out.extend(b"walpost\0outbox\0d");
    out.extend((COLUMNS.len() as u16).to_be_bytes());
    for (name, type_oid) in COLUMNS {
        out.push(u8::from(name == "id"));
        out.extend(name.as_bytes());
        out.push(0);
        out.extend(type_oid.to_be_bytes());
        out.extend((-1_i32).to_be_bytes());
    }
    out
}

/// The same, decoded.
pub(crate) fn relation() -> Relation {
    match parse(&relation_message()) {
        Ok(Message::Relation(relation)) => relation,
        other => panic!("not a relation: {other:?}"),
    }
}

/// A payload: a JSON string of hexadecimal digits, another for each number.
pub(crate) fn payload(number: u64) -> Vec<u8> {
    payload_of(number, PAYLOAD_BYTES)
}

/// The same of another size.
pub(crate) fn payload_of(number: u64, bytes: usize) -> Vec<u8> {
    let digits = (0..).map(|part: u64| format!("{:016x}", mix(number << 16 | part)));
    let digits: String = digits.take(bytes.div_ceil(16)).collect();
    format!("\"{}\"", &digits[..bytes - 2]).into_bytes()
}

/// An Insert message of row `number`, with values in binary form where `binary` asks for it.
pub(crate) fn insert_message(number: u64, binary: bool) -> Vec<u8> {
    let mut out = vec![b'I'];
    out.extend(OID.to_be_bytes());
    out.push(b'N');
    out.extend((COLUMNS.len() as u16).to_be_bytes());
    for (name, _) in COLUMNS {
        match value(name, number, binary) {
            None => out.push(b'n'),
            Some(bytes) => {
                out.push(if binary { b'b' } else { b't' });
                out.extend((bytes.len() as u32).to_be_bytes());
                out.extend(bytes);
            }
        }
    }
    out
}

fn value(column: &str, number: u64, binary: bool) -> Option<Vec<u8>> {
    /// 2025-06-01, in microseconds since 2000.
    const TIME_US: u64 = 802_051_200_000_000;
    let integer = |value: u64| {
        Some(if binary {
            value.to_be_bytes().to_vec()
        } else {
            value.to_string().into_bytes()
        })
    };
    let (high, low) = (mix(number), mix(!number));
    match column {
        "id" if binary => Some([high.to_be_bytes(), low.to_be_bytes()].concat()),
        "id" => {
            let hex = format!("{high:016x}{low:016x}");
            let parts = [
                &hex[..8],
                &hex[8..12],
                &hex[12..16],
                &hex[16..20],
                &hex[20..],
            ];
            Some(parts.join("-").into_bytes())
        }
        "aggregatetype" => Some(b"order".to_vec()),
        "aggregateid" => Some(format!("key-{}", number % 1000).into_bytes()),
        "type" => Some(b"OrderPlaced".to_vec()),
        "payload" => Some(payload(number)),
        "created_at" if binary => integer(TIME_US + number),
        "created_at" => {
            let us = number % 1_000_000;
            Some(format!("2025-06-01 00:00:00.{us:06}+00").into_bytes())
        }
        "seq" | "txid" => integer(number),
        _ => None,
    }
}

/// Well spread bits of a number (the finalizer of `SplitMix64`).
fn mix(number: u64) -> u64 {
    let mut bits = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}
