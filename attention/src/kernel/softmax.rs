//! From scores to weights, a row of attention in each lane.

use super::simd::{Vector, Words, exp2, tanh};

/// A row's running maximum is replaced only when it grows by more than this many powers of two; until then weights
/// are merely larger than one.
const SLACK: f32 = 8.0;

/// How a product of Q and K becomes a power of two.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scoring {
    /// Turns a product, or with a softcap its hyperbolic tangent, into a power of two.
    pub(super) factor: f32,
    /// With a softcap: what a product is multiplied by before the hyperbolic tangent.
    pub(super) before_tanh: Option<f32>,
}

impl Scoring {
    pub(super) fn of(geometry: &crate::HeadGeometry) -> Self {
        const LOG2_E: f32 = std::f32::consts::LOG2_E;
        match geometry.softcap() {
            None => Scoring { factor: geometry.scale() * LOG2_E, before_tanh: None },
            Some(cap) => Scoring { factor: cap * LOG2_E, before_tanh: Some(geometry.scale() / cap) },
        }
    }

    /// Applies the hyperbolic tangent, where there is one, to keys `from..to` of `[key][lane]`.
    ///
    /// # Safety
    /// `scores` must be readable and writable for `NV` vectors at each key.
    #[inline(always)]
    pub(super) unsafe fn cap<V: Vector, const NV: usize>(&self, scores: *mut f32, from: usize, to: usize) {
        let Some(factor) = self.before_tanh else { return };
        let lanes = NV * V::LANES;
        for at in (from * lanes..to * lanes).step_by(V::LANES) {
            // SAFETY: the caller vouches for the scores.
            unsafe {
                let score = scores.add(at);
                tanh(V::load(score).mul(V::splat(factor))).store(score);
            }
        }
    }
}

/// The running state of a panel's rows, a lane each.
pub(super) struct Running {
    /// `[lane]`, in powers of two.
    pub(super) max: *mut f32,
    /// `[lane]`.
    pub(super) sum: *mut f32,
}

/// Turns the scores `[key][lane]` of keys `from..to` into weights, in words along the keys from the first on, and brings
/// each lane's maximum and sum up to date. Returns the factors to rescale O by: exactly one where a lane needs none.
///
/// # Safety
/// `scores` must be readable and writable for `NV` vectors at each key, the running state for `NV` vectors.
#[inline(always)]
pub(super) unsafe fn soften<W: Words, const NV: usize>(
    running: &Running,
    scores: *mut f32,
    factor: f32,
    from: usize,
    to: usize,
) -> [W::V; NV] {
    let lanes = NV * W::V::LANES;
    let factor = W::V::splat(factor);
    let mut maxima = [W::V::splat(f32::NEG_INFINITY); NV];
    for key in from..to {
        for (v, max) in maxima.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the scores.
            *max = unsafe { W::V::load(scores.add(key * lanes + v * W::V::LANES)) }.max(*max);
        }
    }
    let mut factors = [W::V::splat(1.0); NV];
    for v in 0..NV {
        // SAFETY: the caller vouches for the maxima and sums of the panel's lanes.
        unsafe {
            let at = v * W::V::LANES;
            let old = W::V::load(running.max.add(at));
            let new = maxima[v].mul(factor);
            let grows = old.add(W::V::splat(SLACK)).lt(new);
            let max = W::V::select(grows, new, old);
            factors[v] = W::V::select(grows, exp2(old.sub(max)), W::V::splat(1.0));
            max.store(running.max.add(at));
            let sum = W::V::load(running.sum.add(at));
            sum.mul(factors[v]).store(running.sum.add(at));
            // Where nothing was seen yet, any finite maximum turns a score of -inf into a weight of zero.
            let unseen = max.lt(W::V::splat(f32::MIN));
            maxima[v] = W::V::splat(0.0).sub(W::V::select(unseen, W::V::splat(0.0), max));
        }
    }
    let mut sums = [W::V::splat(0.0); NV];
    for key in (from..to).step_by(W::PER_WORD) {
        for v in 0..NV {
            // SAFETY: the caller vouches for the scores; a word goes where its first key's score was, or before.
            unsafe {
                let score = scores.add(key * lanes + v * W::V::LANES);
                let first = W::exp2(W::V::load(score).fma(factor, maxima[v]));
                sums[v] = sums[v].add(first);
                let mut last = first;
                if W::PER_WORD == 2 {
                    last = W::exp2(W::V::load(score.add(lanes)).fma(factor, maxima[v]));
                    sums[v] = sums[v].add(last);
                }
                let word = from + (key - from) / W::PER_WORD;
                W::join(first, last).store(scores.add(word * lanes + v * W::V::LANES));
            }
        }
    }
    for (v, block_sum) in sums.iter().enumerate() {
        // SAFETY: the caller vouches for the sums of the panel's lanes.
        unsafe {
            let sum = W::V::load(running.sum.add(v * W::V::LANES));
            sum.add(*block_sum).store(running.sum.add(v * W::V::LANES));
        }
    }
    factors
}
