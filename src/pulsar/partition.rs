//! Which partition a key belongs to: the same one for which Pulsar's own clients would choose it.
//!
//! Other producers may write to the same topic, and consumers may rely on a key's partition, so the two hashes are those of
//! the Java client, bit for bit: `JavaStringHash` (its default) and `Murmur3_32Hash` (seed 0, over UTF-8), both masked to 31
//! bits before `% partitions`. Sources: `JavaStringHash.java`, `Murmur3_32Hash.java`, `MathUtils.signSafeMod` in Pulsar;
//! `String.hashCode` in Java's documentation; `tests/partitions.rs` compares with another client.

/// How a key becomes a partition; named as in the Java client's `HashingScheme`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashingScheme {
    /// `String.hashCode` of Java: over UTF-16 code units.
    #[default]
    JavaStringHash,
    /// Murmur3, 32 bits, over UTF-8.
    Murmur3_32Hash,
}

impl HashingScheme {
    /// Both, by the names they have in settings.
    pub const NAMES: [(&'static str, Self); 2] = [
        ("java_string_hash", Self::JavaStringHash),
        ("murmur3_32_hash", Self::Murmur3_32Hash),
    ];

    /// Reads a name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text);
        known
            .map(|(_, scheme)| *scheme)
            .ok_or_else(|| "it is neither".to_owned())
    }

    /// The partition of `key` among `partitions` (at least 1).
    pub fn partition(self, key: &str, partitions: u32) -> u32 {
        let hash = match self {
            Self::JavaStringHash => java_string_hash(key),
            Self::Murmur3_32Hash => murmur3_32(key.as_bytes()),
        };
        (hash & 0x7fff_ffff) % partitions
    }
}

fn java_string_hash(key: &str) -> u32 {
    key.encode_utf16().fold(0_u32, |hash, unit| {
        hash.wrapping_mul(31).wrapping_add(u32::from(unit))
    })
}

fn murmur3_32(bytes: &[u8]) -> u32 {
    let mix = |block: u32| {
        block
            .wrapping_mul(0xcc9e_2d51)
            .rotate_left(15)
            .wrapping_mul(0x1b87_3593)
    };
    let (blocks, tail) = bytes.as_chunks::<4>();
    let mut hash = blocks.iter().fold(0_u32, |hash, block| {
        (hash ^ mix(u32::from_le_bytes(*block)))
            .rotate_left(13)
            .wrapping_mul(5)
            .wrapping_add(0xe654_6b64)
    });
    if !tail.is_empty() {
        let mut block = [0; 4];
        block[..tail.len()].copy_from_slice(tail);
        hash ^= mix(u32::from_le_bytes(block));
    }
    // The length is taken modulo 2^32, as the algorithm says.
    #[allow(clippy::cast_possible_truncation)]
    let length = bytes.len() as u32;
    hash ^= length;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn java_hashes_are_those_of_java() {
        // Known values of String.hashCode.
        for (text, hash) in [
            ("", 0_i32),
            ("a", 97),
            ("hello", 99_162_322),
            ("polygenelubricants", i32::MIN),
            ("Aa", 2112),
            ("BB", 2112),
        ] {
            assert_eq!(java_string_hash(text).cast_signed(), hash, "{text}");
        }
        // Outside of the basic plane Java hashes two surrogates.
        assert_eq!(java_string_hash("\u{1F600}"), 0xd83d * 31 + 0xde00);
    }

    #[test]
    fn murmur_is_the_published_one() {
        // The vectors with seed 0 that implementations of MurmurHash3_x86_32 are tested with.
        for (text, hash) in [
            ("", 0_u32),
            ("test", 0xba6b_d213),
            ("Hello, world!", 0xc036_3e43),
            ("The quick brown fox jumps over the lazy dog", 0x2e4f_f723),
        ] {
            assert_eq!(murmur3_32(text.as_bytes()), hash, "{text}");
        }
    }

    #[test]
    fn a_partition_is_always_one_of_those_there_are() {
        for partitions in [1, 2, 3, 7, 1024] {
            for n in 0..1000 {
                for (_, scheme) in HashingScheme::NAMES {
                    assert!(scheme.partition(&format!("key-{n}"), partitions) < partitions);
                }
            }
        }
        // A negative hashCode: masked, not its absolute value.
        assert_eq!(
            HashingScheme::JavaStringHash.partition("polygenelubricants", 10),
            0
        );
    }
}
