//! The micro-kernel: one register tile of a matrix product.

use super::simd::{Vector, Words};

/// `c[i][lane] (+)= sum over k of a(i, k) * b(k, lane)` for the rows and lanes of one register tile. Operands are words,
/// and strides and depths count them.
pub(super) struct Product {
    /// Left operand: `a(i, k)` is at `i * a_row + k * a_depth` within a segment.
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_depth: usize,
    /// From one segment of the depth to the next.
    pub(super) a_segment: usize,
    /// Right operand: `b(k, lane)` is at `k * b_depth + lane`, segments one after another.
    pub(super) b: *const f32,
    pub(super) b_depth: usize,
    /// Result: `c[i][lane]` is at `i * c_row + lane`.
    pub(super) c: *mut f32,
    pub(super) c_row: usize,
    /// Length of a segment of the sum.
    pub(super) depth: usize,
    /// Number of segments.
    pub(super) segments: usize,
}

/// What becomes of a finished sum. Sums start at zero and meet `c` only here, which is both faster and several times
/// more accurate than starting from `c`.
pub(super) trait Finish<V: Vector> {
    /// # Safety
    /// `c` must be readable and writable for a vector.
    unsafe fn put(&self, vector: usize, c: *mut f32, sum: V);
}

/// `c = sum`.
pub(super) struct Store;

/// `c = c + sum`.
pub(super) struct Add;

/// `c = c * factor + sum`, a factor a lane.
pub(super) struct Rescale<V, const NV: usize>(pub(super) [V; NV]);

impl<V: Vector> Finish<V> for Store {
    #[inline(always)]
    unsafe fn put(&self, _vector: usize, c: *mut f32, sum: V) {
        // SAFETY: the caller vouches for `c`.
        unsafe { sum.store(c) }
    }
}

impl<V: Vector> Finish<V> for Add {
    #[inline(always)]
    unsafe fn put(&self, _vector: usize, c: *mut f32, sum: V) {
        // SAFETY: the caller vouches for `c`.
        unsafe { V::load(c).add(sum).store(c) }
    }
}

impl<V: Vector, const NV: usize> Finish<V> for Rescale<V, NV> {
    #[inline(always)]
    unsafe fn put(&self, vector: usize, c: *mut f32, sum: V) {
        // SAFETY: the caller vouches for `c`.
        unsafe { V::load(c).fma(self.0[vector], sum).store(c) }
    }
}

/// Whether the non-finite elements of one operand are kept out where the other has a weight of zero. Guards give the
/// bits of [`Open`] where everything is finite.
pub(super) trait Guard {
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V;
}

/// Nothing is kept out: all elements are finite, or every cell counts.
pub(super) struct Open;

/// Those of the left operand; the right one holds weights.
pub(super) struct GuardLeft;

/// Those of the right operand; the left one holds weights.
pub(super) struct GuardRight;

impl Guard for Open {
    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(left, right, sum)
    }
}

impl Guard for GuardLeft {
    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(W::sanitise(left, right), right, sum)
    }
}

impl Guard for GuardRight {
    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(left, W::sanitise(right, left), sum)
    }
}

/// Computes a tile of `MR` rows by `NV` vectors. Each element is one chain of multiply-adds from zero in the order of
/// the depth, whatever the other rows and lanes hold.
///
/// # Safety
/// All elements addressed by `p` must lie within their buffers, and `c` must overlap neither operand.
#[inline(always)]
pub(super) unsafe fn product<W: Words, G: Guard, const MR: usize, const NV: usize>(
    p: Product,
    finish: impl Finish<W::V>,
) {
    let mut sums = [[W::V::splat(0.0); NV]; MR];
    let mut b = p.b;
    for segment in 0..p.segments {
        // SAFETY: the caller vouches for every element addressed.
        unsafe {
            let mut a = p.a.add(segment * p.a_segment);
            for _ in 0..p.depth {
                let mut right = [W::V::splat(0.0); NV];
                for (v, right) in right.iter_mut().enumerate() {
                    *right = W::V::load(b.add(v * W::V::LANES));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = W::V::splat(*a.add(i * p.a_row));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = G::dot::<W>(left, right, *sum);
                    }
                }
                a = a.wrapping_add(p.a_depth);
                b = b.wrapping_add(p.b_depth);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (v, sum) in sums.iter().enumerate() {
            // SAFETY: the caller vouches for every element addressed.
            unsafe { finish.put(v, p.c.add(i * p.c_row + v * W::V::LANES), *sum) }
        }
    }
}

/// Asks for the elements that a next product will read, a cache line at a time.
#[inline(always)]
pub(super) fn prefetch<V: Vector>(from: *const f32, len: usize) {
    for at in (0..len).step_by(16) {
        V::prefetch(from.wrapping_add(at));
    }
}
