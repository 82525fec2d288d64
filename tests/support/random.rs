//! Numbers that look random and are the same in every run: a test that fails, fails again.

/// `xorshift64*` (Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled").
pub(crate) struct Random(u64);

impl Random {
    /// Each seed gives another sequence.
    pub(crate) fn new(seed: u64) -> Self {
        // Zero would stay zero.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        // The high half: the low bits of such generators are the weak ones.
        let limit = u64::try_from(limit).expect("at most 64 bits");
        usize::try_from((self.next() >> 32) % limit).expect("below a usize")
    }

    /// Bytes that no compression makes smaller.
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_be_bytes());
        words.flatten().take(length).collect()
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}
