//! Any row: both formats give the same event, and nothing panics.

use std::fmt::Write as _;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::support::{extractor, full_table, relation, row, template};
use crate::outbox::{Columns, Extractor, Role, Scratch, key_hash};
use crate::pgoutput::types::{self, BYTEA};
use crate::pgoutput::{Column, Tuple};

/// One row of the full table with a `bytea` payload, as the application means it.
#[derive(Clone, Debug)]
struct Meant {
    id: [u8; 16],
    aggregatetype: String,
    aggregateid: String,
    event_type: String,
    payload: Option<Vec<u8>>,
    headers: Option<Vec<(String, String)>>,
    /// Milliseconds since 2000.
    created_ms: u32,
}

fn meant() -> impl Strategy<Value = Meant> {
    (
        any::<[u8; 16]>(),
        "[-=:.A-Za-z0-9_]{0,12}[a-z]",
        "[^\0]{0,20}",
        "[^\0]{0,20}",
        option::of(vec(any::<u8>(), 0..64)),
        option::of(vec(("h[^\0]{0,8}", "[^\0]{0,8}"), 0..4)),
        // January 2000; the calendar has tests of its own.
        0..31 * 86_400_000_u32,
    )
        .prop_map(
            |(id, aggregatetype, aggregateid, event_type, payload, headers, created_ms)| Meant {
                id,
                aggregatetype,
                aggregateid,
                event_type,
                payload,
                headers,
                created_ms,
            },
        )
}

impl Meant {
    fn uuid_text(&self) -> String {
        let hex = hex(&self.id);
        format!(
            "{}-{}-{}-{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[12..16],
            &hex[16..20],
            &hex[20..]
        )
    }

    fn headers_json(&self) -> Option<String> {
        let fields: Vec<String> = self
            .headers
            .as_ref()?
            .iter()
            .map(|(name, value)| {
                format!("{}: {}", serde_json::json!(name), serde_json::json!(value))
            })
            .collect();
        Some(format!("{{{}}}", fields.join(", ")))
    }

    /// The row as Postgres sends it, in text or in binary format.
    fn encode(&self, binary: bool) -> Vec<u8> {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let stamp = if binary {
            (i64::from(self.created_ms) * 1000).to_be_bytes().to_vec()
        } else {
            let ms = self.created_ms;
            let second = ms / 1000;
            format!(
                "2000-01-{:02} {:02}:{:02}:{:02}.{:03}+00",
                second / 86_400 + 1,
                second / 3600 % 24,
                second / 60 % 60,
                second % 60,
                ms % 1000
            )
            .into_bytes()
        };
        let id = if binary {
            self.id.to_vec()
        } else {
            self.uuid_text().into_bytes()
        };
        let payload = self.payload.as_ref().map(|payload| {
            if binary {
                payload.clone()
            } else {
                format!("\\x{}", hex(payload)).into_bytes()
            }
        });
        let headers = self.headers_json().map(|json| {
            let version: &[u8] = if binary { &[1] } else { &[] };
            [version, json.as_bytes()].concat()
        });
        let values = [
            Some(id),
            text(&self.aggregatetype),
            text(&self.aggregateid),
            text(&self.event_type),
            payload,
            None,
            headers,
            None,
            Some(stamp),
            None,
            None,
            None,
        ];
        let columns: Vec<Column<'_>> = values
            .iter()
            .map(|value| match value {
                None => Column::Null,
                Some(bytes) if binary => Column::Binary(bytes),
                Some(bytes) => Column::Text(bytes),
            })
            .collect();
        row(&columns)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

proptest! {
    #[test]
    fn both_formats_bring_what_was_meant(meant in meant()) {
        let mut extractor = extractor(&full_table(BYTEA));
        // One scratch for both rows: nothing of the first may show in the second.
        let mut scratch = Scratch::new();
        for binary in [false, true] {
            let bytes = meant.encode(binary);
            let tuple = Tuple::decode(&bytes).expect("well encoded");
            let event = extractor.extract(&tuple, &mut scratch).expect("a good row");
            let id = meant.uuid_text();
            prop_assert_eq!(event.id, &id);
            prop_assert_eq!(event.aggregatetype, Some(meant.aggregatetype.as_str()));
            prop_assert_eq!(event.aggregateid, &meant.aggregateid);
            prop_assert_eq!(event.event_type, Some(meant.event_type.as_str()));
            prop_assert_eq!(event.payload, meant.payload.as_deref());
            prop_assert_eq!(event.event_time_ms, 946_684_800_000 + u64::from(meant.created_ms));
            let own = [
                ("id", id.as_str()),
                ("type", &meant.event_type),
                ("aggregatetype", &meant.aggregatetype),
            ];
            let headers = meant.headers.iter().flatten().map(|(n, v)| (n.as_str(), v.as_str()));
            prop_assert!(event.properties().eq(own.into_iter().chain(headers)));
            let topic = extractor.topic(&tuple, &event).expect("a topic");
            prop_assert_eq!(topic, format!("persistent://public/default/outbox.{}", meant.aggregatetype));
        }
    }

    /// What is kept of one row's types (see `RepeatedText`) never shows in another.
    #[test]
    fn rows_that_follow_each_other_keep_their_own_types(
        rows in vec(("(|a|b|ab|b{300})", "(|a|b|ab|a{300})", any::<bool>()), 1..16),
        meant in meant(),
    ) {
        let extractor = extractor(&full_table(BYTEA));
        let mut scratch = Scratch::new();
        for (aggregatetype, event_type, binary) in rows {
            let meant = Meant { aggregatetype, event_type, ..meant.clone() };
            let bytes = meant.encode(binary);
            let tuple = Tuple::decode(&bytes).expect("well encoded");
            let event = extractor.extract(&tuple, &mut scratch).expect("a good row");
            prop_assert_eq!(event.aggregatetype, Some(meant.aggregatetype.as_str()));
            prop_assert_eq!(event.event_type, Some(meant.event_type.as_str()));
        }
    }

    #[test]
    fn no_row_of_any_types_panics(
        oids in vec(select(ANY_OIDS.to_vec()), 9),
        values in vec((0..4_u8, vec(any::<u8>(), 0..20)), 9),
        width in 0..10_usize,
    ) {
        let names = Role::ALL.map(Role::name);
        let columns: Vec<(&str, u32)> = names.into_iter().zip(oids).collect();
        let default = template("{aggregatetype}.{type}");
        let Ok(mut extractor) = Extractor::new(&relation(&columns), &Columns::default(), &default) else {
            return Ok(());
        };
        let columns: Vec<Column<'_>> = values
            .iter()
            .take(width)
            .map(|(kind, bytes)| match kind {
                0 => Column::Null,
                1 => Column::Unchanged,
                2 => Column::Text(bytes),
                _ => Column::Binary(bytes),
            })
            .collect();
        let bytes = row(&columns);
        let tuple = Tuple::decode(&bytes).expect("well encoded");
        let mut scratch = Scratch::new();
        match extractor.extract(&tuple, &mut scratch) {
            Ok(event) => {
                let _ = extractor.topic(&tuple, &event).map_err(|e| e.to_string());
                prop_assert!(event.properties().count() >= 1);
                let _ = (format!("{event:?}"), key_hash(event.aggregateid.as_bytes()));
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}

/// All types with a meaning here, and two without.
const ANY_OIDS: [u32; 19] = [
    types::BOOL,
    types::BYTEA,
    types::NAME,
    types::INT8,
    types::INT2,
    types::INT4,
    types::TEXT,
    types::OID,
    types::XID,
    types::JSON,
    types::BPCHAR,
    types::VARCHAR,
    types::TIMESTAMP,
    types::TIMESTAMPTZ,
    types::UUID,
    types::JSONB,
    types::XID8,
    types::FIRST_USER_OID,
    1700,
];
