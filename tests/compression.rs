//! Guarantee: with each codec the bytes arrive as they are, and compressible batches get smaller on the wire.
//!
//! Read back by the C++ client, which has its own implementation of each codec; what is really stored is looked at on the
//! wire's level.

mod support;

use std::collections::HashMap;
use std::time::Duration;

use pulsar::message::proto::CompressionType;
use serde_json::json;
use support::{Database, Entry, Judged, Python, Random, read_entries, servers};

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: usize = 1024 * 1024;
/// Of one transaction, for batches of many.
const MANY: usize = 3000;

/// Name in settings, number in the metadata.
const CODECS: [(&str, CompressionType); 5] = [
    ("none", CompressionType::None),
    ("lz4", CompressionType::Lz4),
    ("zstd", CompressionType::Zstd),
    ("snappy", CompressionType::Snappy),
    ("zlib", CompressionType::Zlib),
];

/// Payloads of every size and kind, one transaction each, then many in one.
fn payloads() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let mut random = Random::new(7);
    let alone = vec![
        Vec::new(),
        b"x".to_vec(),
        b"compressible ".repeat(MIB / 13),
        random.bytes(MIB),
        vec![0; MIB],
        random.bytes(100),
        b"ab".repeat(200),
    ];
    let many = (0..MANY).map(|n| match n % 10 {
        0 => Vec::new(),
        1 => random.bytes(50),
        _ => format!(r#"{{"order": {n}, "state": "placed", "currency": "EUR", "total": 12.50}}"#)
            .into_bytes(),
    });
    let many = many.collect();
    (alone, many)
}

/// What a codec made of a topic, and the sum of bytes stored.
fn check_entries(name: &str, codec: CompressionType, entries: &[Entry]) -> usize {
    let mut compressed = 0;
    for entry in entries {
        let metadata = &entry.metadata;
        let original = metadata.uncompressed_size.unwrap_or_default() as usize;
        match metadata.compression.unwrap_or_default() {
            // What would not get smaller is sent as it is.
            0 => assert!(original == 0 || original == entry.stored_bytes, "{name}"),
            number => {
                assert_eq!(number, codec as i32, "{name}: another codec");
                assert!(entry.stored_bytes < original, "{name}: not smaller");
                compressed += metadata.num_messages_in_batch.map_or(1, i32::cast_unsigned) as usize;
            }
        }
    }
    if codec == CompressionType::None {
        assert_eq!(compressed, 0);
    } else {
        assert!(
            compressed > MANY / 2,
            "{name}: {compressed} messages are in compressed entries"
        );
    }
    entries.iter().map(|entry| entry.stored_bytes).sum()
}

/// One codec: the stream, the C++ client's verdict, the bytes stored.
async fn round_trip(name: &str, codec: CompressionType) -> usize {
    // GIVEN a stream with that compression
    let database = Database::create("compress").await;
    database.init(&["--payload", "bytea"], &[]).await;
    let settings = [
        ("WALPOST_COMPRESSION", name),
        ("WALPOST_BATCH_LINGER", "20ms"),
    ];
    let walpost = database.start(&settings).await;

    // WHEN rows are committed alone and together
    let (alone, many) = payloads();
    let insert = "INSERT INTO walpost.outbox (aggregatetype, aggregateid, type, payload)
                  SELECT 't', 'k-' || n % 7, 't', p FROM unnest($1::bytea[]) WITH ORDINALITY AS rows (p, n)
                  RETURNING id::text, payload";
    let mut expected: HashMap<String, Vec<u8>> = HashMap::new();
    for transaction in alone.chunks(1).chain([many.as_slice()]) {
        let rows = database.rows(insert, &[&transaction]).await;
        expected.extend(rows.iter().map(|row| (row.get(0), row.get(1))));
    }
    database.wait_all_confirmed(DEADLINE).await;
    walpost.stop().await;

    // THEN the C++ client reads every one as it was, once
    let order = json!({"topic": database.topic("t"), "type": "Exclusive"});
    let mut consumer = Python::start("consume", order, &servers().pulsar_url).await;
    assert_eq!(consumer.next(DEADLINE).await, json!({"ready": true}));
    let seen = Judged::take(consumer, alone.len() + MANY, DEADLINE).await;
    assert_eq!(seen.len(), alone.len() + MANY, "{name}");
    for message in &seen {
        let payload = expected.remove(&message.id);
        let payload = payload.unwrap_or_else(|| panic!("{name}: {} came twice", message.id));
        // Without the bytes: they may be a megabyte.
        let lengths = (message.payload.len(), payload.len());
        assert!(
            message.payload == payload,
            "{name}: {} differs {lengths:?}",
            message.id
        );
    }
    assert!(expected.is_empty());

    // AND the batches say that they are compressed, and are smaller
    let entries = read_entries(&servers().pulsar_addr, &database.topic("t"), DEADLINE).await;
    let mixed = entries
        .iter()
        .filter(|entry| entry.metadata.num_messages_in_batch > Some(1));
    assert!(mixed.count() > 3, "{name}: no batches of many");
    check_entries(name, codec, &entries)
}

#[tokio::test]
async fn every_codec_arrives_byte_for_byte_and_makes_batches_smaller() {
    let mut stored = HashMap::new();
    for (name, codec) in CODECS {
        stored.insert(name, round_trip(name, codec).await);
    }
    println!("{stored:?}");
    // A megabyte is random and stays; two are compressible, and most of the small ones.
    let plain = stored.remove("none").expect("one of the codecs");
    assert!(plain > 3 * MIB, "{plain}");
    for (name, bytes) in stored {
        assert!(bytes < plain * 45 / 100, "{name}: {bytes} of {plain}");
    }
}
