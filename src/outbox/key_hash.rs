//! `key_hash`: the hash that chooses an event's lane.
//!
//! Sequence ids count per lane, so after a restart, an upgrade or on another machine the same key must land in the same
//! lane: the hash is part of the on-disk contract with the broker's deduplication and must never change. It is XXH64 with
//! seed 0, over the key's UTF-8 bytes (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>), chosen because it is
//! specified, exists in every language, reads eight bytes a step and spreads well over its low bits, which `% lanes` uses.

const P1: u64 = 0x9e37_79b1_85eb_ca87;
const P2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const P3: u64 = 0x1656_67b1_9e37_79f9;
const P4: u64 = 0x85eb_ca77_c2b2_ae63;
const P5: u64 = 0x27d4_eb2f_1656_67c5;

fn round(accumulator: u64, lane: u64) -> u64 {
    accumulator
        .wrapping_add(lane.wrapping_mul(P2))
        .rotate_left(31)
        .wrapping_mul(P1)
}

/// XXH64 (seed 0) of a message key; `key_hash(key) % lanes` is the key's lane.
pub fn key_hash(key: &[u8]) -> u64 {
    let (stripes, tail) = key.as_chunks::<32>();
    let mut hash = if stripes.is_empty() {
        P5
    } else {
        let mut lanes = [P1.wrapping_add(P2), P2, 0, P1.wrapping_neg()];
        for stripe in stripes {
            let (words, _) = stripe.as_chunks::<8>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane = round(*lane, u64::from_le_bytes(*word));
            }
        }
        let [a, b, c, d] = lanes;
        let start = a
            .rotate_left(1)
            .wrapping_add(b.rotate_left(7))
            .wrapping_add(c.rotate_left(12))
            .wrapping_add(d.rotate_left(18));
        lanes.iter().fold(start, |hash, lane| {
            (hash ^ round(0, *lane)).wrapping_mul(P1).wrapping_add(P4)
        })
    };
    hash = hash.wrapping_add(key.len() as u64);

    let (words, tail) = tail.as_chunks::<8>();
    for word in words {
        hash ^= round(0, u64::from_le_bytes(*word));
        hash = hash.rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
    }
    let (half_words, tail) = tail.as_chunks::<4>();
    for half in half_words {
        hash ^= u64::from(u32::from_le_bytes(*half)).wrapping_mul(P1);
        hash = hash.rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
    }
    for byte in tail {
        hash ^= u64::from(*byte).wrapping_mul(P5);
        hash = hash.rotate_left(11).wrapping_mul(P1);
    }

    hash = (hash ^ (hash >> 33)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 29)).wrapping_mul(P3);
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::key_hash;

    /// Made with the reference implementation (Python's `xxhash.xxh64(key).intdigest()`). A change of any of these values
    /// breaks deduplication for every installation.
    #[test]
    fn the_values_never_change() {
        for (key, hash) in [
            ("", 0xef46_db37_51d8_e999),
            ("a", 0xd24e_c4f1_a98c_6e5b),
            ("abc", 0x44bc_2cf5_ad77_0999),
            ("order-1", 0x3baf_4120_aa43_a0ad),
            (
                "0192aaaa-bbbb-7ccc-8ddd-eeeeffff0001",
                0x0d25_2530_fd1c_908a,
            ),
            ("größe", 0xe6be_bd66_47f5_02a5),
            ("12345678901234567890123456789012", 0x40fd_1aa5_2d98_274c),
        ] {
            assert_eq!(key_hash(key.as_bytes()), hash, "{key:?}");
        }
        assert_eq!(key_hash(&[b'x'; 100]), 0x92f0_de5a_88a3_c094);
        let all_bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(key_hash(&all_bytes), 0x1fac_be84_06cd_904b);
    }

    #[test]
    fn likely_keys_spread_over_the_lanes() {
        for lanes in [2_u64, 3, 16, 64] {
            let mut counts = vec![0_u64; usize::try_from(lanes).expect("small")];
            for n in 0..64_000_u64 {
                let lane = key_hash(format!("order-{n}").as_bytes()) % lanes;
                counts[usize::try_from(lane).expect("small")] += 1;
            }
            let fair = 64_000 / lanes;
            assert!(
                counts.iter().all(|n| n.abs_diff(fair) < fair / 5),
                "{lanes} lanes: {counts:?}"
            );
        }
    }
}
