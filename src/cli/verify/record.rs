//! What is noted of each row and each message, as bytes whose order is the order in which they are judged.
//!
//! ```text
//! by id:    [digest of id 16][0][table 2][seq 8]…      a row
//!           [digest of id 16][1][table 2][state 1]     its straggler
//!           [digest of id 16][2][topic 4][part 4][place 8]…  a message
//! by key:   [topic 4][table 2][digest of key 16][part 4][seq 8][place 8][id]
//! ```
//! So everything with one id stands together, rows first, then messages in the order of their topic; and everything with one
//! key in the order of the table. Digests are the first 16 bytes of SHA-256: that two differing values share one is out of
//! the question, also if somebody tried. No payload and no key is written anywhere.

use ring::digest::{SHA256, digest};

/// The beginning of a SHA-256.
pub(super) type Digest = [u8; 16];

/// Bytes of an id that are kept, to be shown.
const ID_SHOWN_BYTES: usize = 200;
/// [`Row::topic`] of a row that cannot be an event.
pub(super) const NO_TOPIC: u32 = u32::MAX;

/// Digest of a value.
pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    let whole = digest(&SHA256, bytes);
    let mut short = Digest::default();
    short.copy_from_slice(&whole.as_ref()[..16]);
    short
}

/// Of a payload: a tombstone is none of those that have bytes.
pub(super) fn digest_of_payload(payload: Option<&[u8]>) -> Digest {
    payload.map_or(Digest::default(), digest_of)
}

/// A row of an outbox table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// The table's place in the settings.
    pub(super) table: u16,
    pub(super) seq: i64,
    /// Whether it must have its message.
    pub(super) judged: bool,
    pub(super) topic: u32,
    pub(super) created_ms: u64,
    pub(super) key: Digest,
    pub(super) payload: Digest,
    pub(super) id: String,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) topic: u32,
    /// Its partition.
    pub(super) part: u32,
    /// Its number in the partition.
    pub(super) place: u64,
    /// Whether `walpost replay` sent it.
    pub(super) replayed: bool,
    pub(super) event_ms: u64,
    pub(super) key: Digest,
    pub(super) payload: Digest,
    pub(super) id: String,
}

/// Something with an id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ById {
    Row(Row),
    /// The row of this table is a straggler; dead, if true.
    Straggler {
        table: u16,
        dead: bool,
    },
    Message(Found),
}

impl ById {
    /// Writes it into `out`, in place of what was there. `id` is the whole one.
    pub(super) fn encode(&self, id: &str, out: &mut Vec<u8>) {
        out.clear();
        out.extend(digest_of(id.as_bytes()));
        match self {
            Self::Row(row) => {
                out.push(0);
                out.extend(row.table.to_be_bytes());
                out.extend(ordered(row.seq));
                out.push(u8::from(row.judged));
                out.extend(row.topic.to_be_bytes());
                out.extend(row.created_ms.to_be_bytes());
                out.extend(row.key);
                out.extend(row.payload);
                out.extend(shown(id).as_bytes());
            }
            Self::Straggler { table, dead } => {
                out.push(1);
                out.extend(table.to_be_bytes());
                out.push(u8::from(*dead));
            }
            Self::Message(found) => {
                out.push(2);
                out.extend(found.topic.to_be_bytes());
                out.extend(found.part.to_be_bytes());
                out.extend(found.place.to_be_bytes());
                out.push(u8::from(found.replayed));
                out.extend(found.event_ms.to_be_bytes());
                out.extend(found.key);
                out.extend(found.payload);
                out.extend(shown(id).as_bytes());
            }
        }
    }

    /// The digest of the id, and the rest; `None` for bytes that nobody encoded.
    pub(super) fn decode(bytes: &[u8]) -> Option<(Digest, Self)> {
        let mut bytes = Bytes(bytes);
        let id = bytes.take()?;
        let [kind] = bytes.take()?;
        let what = match kind {
            0 => Self::Row(Row {
                table: u16::from_be_bytes(bytes.take()?),
                seq: unordered(bytes.take()?),
                judged: bytes.take()? == [1],
                topic: u32::from_be_bytes(bytes.take()?),
                created_ms: u64::from_be_bytes(bytes.take()?),
                key: bytes.take()?,
                payload: bytes.take()?,
                id: bytes.text()?,
            }),
            1 => Self::Straggler {
                table: u16::from_be_bytes(bytes.take()?),
                dead: bytes.take()? == [1],
            },
            _ => Self::Message(Found {
                topic: u32::from_be_bytes(bytes.take()?),
                part: u32::from_be_bytes(bytes.take()?),
                place: u64::from_be_bytes(bytes.take()?),
                replayed: bytes.take()? == [1],
                event_ms: u64::from_be_bytes(bytes.take()?),
                key: bytes.take()?,
                payload: bytes.take()?,
                id: bytes.text()?,
            }),
        };
        Some((id, what))
    }
}

/// A row that has its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ByKey {
    /// Topic, table, key, partition: rows that agree in them have an order.
    pub(super) line: [u8; 26],
    pub(super) place: u64,
    pub(super) id: String,
}

impl ByKey {
    pub(super) fn encode(row: &Row, part: u32, place: u64, out: &mut Vec<u8>) {
        out.clear();
        out.extend(row.topic.to_be_bytes());
        out.extend(row.table.to_be_bytes());
        out.extend(row.key);
        out.extend(part.to_be_bytes());
        out.extend(ordered(row.seq));
        out.extend(place.to_be_bytes());
        out.extend(row.id.as_bytes());
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut bytes = Bytes(bytes);
        let line = bytes.take()?;
        let _seq: [u8; 8] = bytes.take()?;
        Some(Self {
            line,
            place: u64::from_be_bytes(bytes.take()?),
            id: bytes.text()?,
        })
    }
}

/// Big-endian bytes whose order is that of the numbers, negative ones too.
fn ordered(seq: i64) -> [u8; 8] {
    (seq ^ i64::MIN).to_be_bytes()
}

fn unordered(bytes: [u8; 8]) -> i64 {
    i64::from_be_bytes(bytes) ^ i64::MIN
}

fn shown(id: &str) -> &str {
    let mut end = id.len().min(ID_SHOWN_BYTES);
    while !id.is_char_boundary(end) {
        end -= 1;
    }
    &id[..end]
}

struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn text(&self) -> Option<String> {
        String::from_utf8(self.0.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(seq: i64, id: &str) -> Row {
        Row {
            table: 1,
            seq,
            judged: true,
            topic: 7,
            created_ms: 5,
            key: digest_of(b"k"),
            payload: digest_of_payload(None),
            id: id.to_owned(),
        }
    }

    fn encoded(what: &ById, id: &str) -> Vec<u8> {
        let mut out = Vec::new();
        what.encode(id, &mut out);
        out
    }

    proptest! {
        /// Read as written; a key's rows stand in the order of seq, whatever its sign.
        #[test]
        fn records_read_back_and_sort_by_seq(a in any::<i64>(), b in any::<i64>(), id in "[a-zé]{0,60}", place in any::<u64>()) {
            let what = ById::Row(row(a, &id));
            let (digest, read) = ById::decode(&encoded(&what, &id)).unwrap();
            prop_assert_eq!((digest, read), (digest_of(id.as_bytes()), what));
            let (mut first, mut second) = (Vec::new(), Vec::new());
            ByKey::encode(&row(a, &id), 3, place, &mut first);
            ByKey::encode(&row(b, &id), 3, place, &mut second);
            prop_assert_eq!(first.cmp(&second), a.cmp(&b));
            prop_assert_eq!(ByKey::decode(&first).unwrap().place, place);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = ById::decode(&bytes);
            let _ = ByKey::decode(&bytes);
        }
    }

    #[test]
    fn what_has_one_id_stands_together_rows_before_stragglers_before_messages() {
        let message = ById::Message(Found {
            topic: 0,
            part: 0,
            place: 0,
            replayed: true,
            event_ms: 9,
            key: Digest::default(),
            payload: digest_of_payload(Some(b"")),
            id: "x".to_owned(),
        });
        let straggler = ById::Straggler {
            table: 1,
            dead: true,
        };
        let all = [ById::Row(row(i64::MAX, "x")), straggler, message];
        let bytes: Vec<_> = all.iter().map(|what| encoded(what, "x")).collect();
        assert!(bytes.is_sorted());
        for (what, bytes) in all.iter().zip(&bytes) {
            assert_eq!(&ById::decode(bytes).unwrap().1, what);
        }
        assert_ne!(digest_of_payload(None), digest_of_payload(Some(b"")));
    }

    #[test]
    fn a_long_id_is_cut_for_show_only() {
        let long = "é".repeat(500);
        let bytes = encoded(&ById::Row(row(1, "")), &long);
        let (digest, ById::Row(read)) = ById::decode(&bytes).unwrap() else {
            panic!("a row");
        };
        assert_eq!(digest, digest_of(long.as_bytes()));
        assert_eq!(read.id.len(), 200);
    }
}
