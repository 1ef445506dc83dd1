//! A small seeded generator, so that weights and the order of documents depend on the seed alone, on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014): one 64-bit state, equidistributed output.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// A stream of its own for every pair of seed and name.
    pub(crate) fn new(seed: u64, name: &str) -> Rng {
        // FNV-1a of the name; one round of mixing keeps near seeds apart.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Rng(Rng(seed ^ hash.rotate_left(32)).next_u64() ^ hash)
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`; zero for a bound of zero.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Close to a standard normal: the sum of twelve uniform numbers less six. Only additions, so that no library's
    /// logarithm or cosine enters the weights.
    pub(crate) fn normal(&mut self) -> f32 {
        let sum: u64 = (0..12).map(|_| self.next_u64() >> 40).sum();
        (sum as f64 / f64::from(1 << 24) - 6.0) as f32
    }

    /// Puts the elements into a random order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last + 1);
            items.swap(last, other);
        }
    }
}
