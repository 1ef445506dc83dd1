//! The micro-kernel: one register tile of a matrix product.

use super::simd::{MAX_TILE_ROWS, Vector, Words};

/// `c[i][lane] (+)= sum over k of a(i, k) * b(k, lane)` for the rows and lanes of one register tile. Operands are words,
/// and strides and depths count them.
pub(super) struct Product {
    /// Left operand, as [`Lie`] says within a segment.
    pub(super) a: *const f32,
    /// From one row to the next, where [`Rows`] lie.
    pub(super) a_row: usize,
    /// From one segment of the depth to the next.
    pub(super) a_segment: usize,
    /// Right operand: `NV` vectors for each step of the depth, segments one after another.
    pub(super) b: *const f32,
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
    /// Whether it is so rarely needed that its code should be small.
    const RARE: bool;

    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V;
}

/// Nothing is kept out: all elements are finite, or every cell counts.
pub(super) struct Open;

/// Those of the left operand; the right one holds weights.
pub(super) struct GuardLeft;

/// Those of the right operand; the left one holds weights.
pub(super) struct GuardRight;

impl Guard for Open {
    const RARE: bool = false;

    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(left, right, sum)
    }
}

impl Guard for GuardLeft {
    const RARE: bool = true;

    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(W::sanitise(left, right), right, sum)
    }
}

impl Guard for GuardRight {
    const RARE: bool = true;

    #[inline(always)]
    fn dot<W: Words>(left: W::V, right: W::V, sum: W::V) -> W::V {
        W::dot(left, W::sanitise(right, left), sum)
    }
}

/// How the left operand's rows and depth lie in memory.
pub(super) trait Lie {
    /// Words from one row to the next, and from one step of the depth to the next, of a tile of `MR` rows.
    fn strides<const MR: usize>(row: usize) -> (usize, usize);
}

/// Rows lie `a_row` words apart, each contiguous along the depth.
pub(super) struct Rows;

/// A step of the depth has the rows side by side.
pub(super) struct Strips;

impl Lie for Rows {
    #[inline(always)]
    fn strides<const MR: usize>(row: usize) -> (usize, usize) {
        (row, 1)
    }
}

impl Lie for Strips {
    #[inline(always)]
    fn strides<const MR: usize>(_row: usize) -> (usize, usize) {
        (1, MR)
    }
}

/// Steps of the depth to a turn of the loop.
const UNROLL: usize = 4;

/// Computes a tile of `MR` rows by `NV` vectors. Each element is one chain of multiply-adds from zero in the order of
/// the depth, whatever the other rows and lanes hold.
///
/// # Safety
/// All elements addressed by `p` must lie within their buffers, and `c` must overlap neither operand.
#[inline(always)]
pub(super) unsafe fn product<W: Words, L: Lie, G: Guard, const MR: usize, const NV: usize>(
    p: Product,
    finish: impl Finish<W::V>,
) {
    const { assert!(MAX_TILE_ROWS.is_multiple_of(MR) && (NV == 1 || NV == 2)) }
    let mut sums = [[W::V::splat(0.0); NV]; MR];
    let mut b = p.b;
    let (_, step) = L::strides::<MR>(p.a_row);
    for segment in 0..p.segments {
        // SAFETY: the caller vouches for every element addressed.
        unsafe {
            let mut a = p.a.add(segment * p.a_segment);
            let turns = if G::RARE { 0 } else { p.depth / UNROLL };
            for _ in 0..turns {
                for n in 0..UNROLL {
                    let (a, b) = (a.add(n * step), b.add(n * NV * W::V::LANES));
                    multiply::<W, L, G, MR, NV>(&mut sums, a, p.a_row, b);
                }
                a = a.wrapping_add(UNROLL * step);
                b = b.wrapping_add(UNROLL * NV * W::V::LANES);
            }
            for _ in turns * UNROLL..p.depth {
                multiply::<W, L, G, MR, NV>(&mut sums, a, p.a_row, b);
                a = a.wrapping_add(step);
                b = b.wrapping_add(NV * W::V::LANES);
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

/// One step of the depth.
///
/// # Safety
/// `a` and `b` must be readable for the step.
#[inline(always)]
unsafe fn multiply<W: Words, L: Lie, G: Guard, const MR: usize, const NV: usize>(
    sums: &mut [[W::V; NV]; MR],
    a: *const f32,
    a_row: usize,
    b: *const f32,
) {
    let (row, _) = L::strides::<MR>(a_row);
    // SAFETY: the caller vouches for every element addressed.
    unsafe {
        let mut right = [W::V::splat(0.0); NV];
        for (v, right) in right.iter_mut().enumerate() {
            *right = W::V::load(b.add(v * W::V::LANES));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let left = W::V::splat(*a.add(i * row));
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = G::dot::<W>(left, right, *sum);
            }
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
