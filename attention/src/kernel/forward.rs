//! The forward tile: O and LSE of a range of rows of one kv head.
//!
//! Scores are computed transposed, `S^T = K Q^T`, with a row of attention in each lane, so that the row maximum and
//! sum are vertical and a query group is just more rows. Every row goes through the same operations whatever its
//! neighbours are: blocks of keys at fixed positions, in order; the rescaling decision its own; cells it does not see
//! an exact zero. A block that it does not see at all leaves it as it is, bit for bit.

use super::dispatch::Program;
use super::memory::{Buffer, Carver};
use super::pack::{Form, block_len, copy_padded, pack_block};
use super::product::{Add, Product, Rescale, Store, prefetch, product};
use super::vector::{Vector, exp2};
use super::visibility::{BLOCK, Sight, hide, lane_bounds, sight};
use super::work::{Blocks, HeadWork, Output, gather};
use crate::math::ln;
use crate::{Span, TensorView};

/// Rows of a tile at most.
pub(super) const TILE_ROWS: usize = 512;

/// A row's running maximum is replaced only when it grows by more than this many powers of two; until then weights
/// are merely larger than one.
const SLACK: f32 = 8.0;

/// One tile to compute.
pub(super) struct ForwardTile<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
    pub(super) q: TensorView<'a>,
    /// What [`ForwardPack`] made.
    pub(super) packed: &'a [f32],
    /// The blocks packed.
    pub(super) blocks: Blocks,
    pub(super) o: &'a Output,
    pub(super) lse: &'a Output,
    pub(super) scratch: &'a mut Scratch,
}

/// Packs K as rows and V as strips, block by block.
pub(super) struct ForwardPack<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) k: TensorView<'a>,
    pub(super) v: TensorView<'a>,
    pub(super) blocks: Blocks,
    pub(super) to: &'a mut [f32],
}

/// A thread's working memory, kept between tiles.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) floats: Buffer,
    pub(super) positions: Vec<usize>,
    pub(super) bounds: Vec<f32>,
}

/// Elements of one packed block: K rows, then V strips.
pub(super) fn packed_block_len(work: &HeadWork) -> usize {
    block_len(Form::Rows, work.geometry.head_dim()) + block_len(Form::Strips, work.geometry.v_head_dim())
}

impl Program for ForwardPack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NV: usize>(self) {
        let v_at = block_len(Form::Rows, self.work.geometry.head_dim());
        for (block, to) in self.blocks.starts().zip(self.to.chunks_exact_mut(packed_block_len(self.work))) {
            let (k, v) = to.split_at_mut(v_at);
            pack_block::<V, MR>(self.work, self.k, self.blocks, block, Form::Rows, k);
            pack_block::<V, MR>(self.work, self.v, self.blocks, block, Form::Strips, v);
        }
    }
}

/// Consecutive rows, one a lane, and their running state.
struct Panel {
    dim: usize,
    v_dim: usize,
    /// Turns a score into a power of two.
    factor: f32,
    /// `[dim][lane]`.
    q: *const f32,
    /// `[v_dim][lane]`, not yet divided by the sum.
    o: *mut f32,
    /// `[lane]`, in powers of two.
    max: *mut f32,
    /// `[lane]`.
    sum: *mut f32,
    /// `[key][lane]` of one block.
    scores: *mut f32,
}

impl Program for ForwardTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NV: usize>(self) {
        let ForwardTile { work, rows, q, packed, blocks, o, lse, scratch } = self;
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        let (width, v_width) = (dim.next_multiple_of(V::LANES), v_dim.next_multiple_of(V::LANES));
        let lanes = NV * V::LANES;
        let panels = rows.len().div_ceil(lanes);
        let pieces = [
            panels * lanes * width,
            panels * lanes * v_width,
            panels * lanes,
            panels * lanes,
            BLOCK * lanes,
            lanes * width.max(v_width),
        ];
        let mut carver = Carver::new(&mut scratch.floats, pieces.iter().map(|len| Carver::room(*len)).sum());
        let [q_t, o_t, max, sum, scores, stage] = pieces.map(|len| carver.take(len));
        o_t.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        scratch.positions.clear();
        scratch.positions.extend(rows.iter().map(|row| work.position(row)));

        let panel_rows = |p: usize| Span::at(p * lanes, lanes.min(rows.len() - p * lanes));
        // The last panel may do with fewer vectors.
        let vectors = |p: usize| panel_rows(p).len().div_ceil(V::LANES);
        for p in 0..panels {
            let used = vectors(p) * V::LANES;
            let own = Span::at(rows.start() + p * lanes, panel_rows(p).len());
            gather::<V>(work, q, own, used, width, stage);
            // SAFETY: the stage holds `used` rows of `width`, the panel `width` rows of `used`, both multiples of a
            // vector.
            unsafe { transpose::<V>(stage.as_ptr(), used, width, q_t.as_mut_ptr().add(p * lanes * width)) }
        }

        let block_len = packed_block_len(work);
        let first_block = blocks.base();
        for block in work.blocks(rows).starts() {
            let k = &packed[(block - first_block) / BLOCK * block_len..][..block_len];
            let v = &k[BLOCK * dim..];
            for p in 0..panels {
                let own = panel_rows(p);
                let positions = &scratch.positions[own.range()];
                let (Some(first), Some(last)) = (positions.first(), positions.last()) else { continue };
                let Some(sight) = sight(&work.slices, Span::at(*first, last + 1 - first), block) else {
                    continue;
                };
                scratch.bounds.clear();
                if sight.masked {
                    lane_bounds(&work.slices, vectors(p) * V::LANES, positions, block, &mut scratch.bounds);
                }
                // SAFETY: each pointer is the start of the panel's own piece of a buffer carved above, all distinct;
                // K and V hold the keys of `sight`, which the blocks of these rows cover.
                unsafe {
                    let panel = Panel {
                        dim,
                        v_dim,
                        factor: work.geometry.scale() * std::f32::consts::LOG2_E,
                        q: q_t.as_ptr().add(p * lanes * width),
                        o: o_t.as_mut_ptr().add(p * lanes * v_width),
                        max: max.as_mut_ptr().add(p * lanes),
                        sum: sum.as_mut_ptr().add(p * lanes),
                        scores: scores.as_mut_ptr(),
                    };
                    match vectors(p) {
                        1 => attend::<V, MR, 1>(&panel, k, v, sight, &scratch.bounds),
                        _ => attend::<V, MR, NV>(&panel, k, v, sight, &scratch.bounds),
                    }
                }
            }
        }

        for p in 0..panels {
            let (own, used) = (panel_rows(p), vectors(p) * V::LANES);
            // SAFETY: the panel holds `v_width` rows of `used`, the stage `used` rows of `v_width`, both multiples of
            // a vector; maxima and sums are there for every lane.
            unsafe {
                let weighted = o_t.as_mut_ptr().add(p * lanes * v_width);
                for lane in (0..used).step_by(V::LANES) {
                    let (max, sum) = (max.as_ptr().add(p * lanes + lane), sum.as_ptr().add(p * lanes + lane));
                    normalise(weighted.add(lane), used, v_dim, V::load(max), V::load(sum));
                }
                transpose::<V>(weighted, v_width, used, stage.as_mut_ptr());
            }
            for (lane, row) in own.iter().enumerate() {
                let (token, head) = work.place(rows.start() + row);
                // SAFETY: rows of a head are split among tiles, so no one else writes this one; the task's results
                // stay in place until all its tiles are done.
                let (o, lse) = unsafe { (o.row(token, head), lse.row(token, head)) };
                copy_padded::<V>(&stage[lane * v_width..][..v_dim], o);
                // A row without keys has a sum of zero.
                lse[0] = (f64::from(max[row]) * std::f64::consts::LN_2 + ln(f64::from(sum[row]))) as f32;
            }
        }
    }
}

/// Divides a vector of rows, `[v_dim][lane]`, by their sums; a row that saw no key becomes zero.
///
/// # Safety
/// `weighted` must hold `dim` vectors at intervals of `stride`.
#[inline(always)]
unsafe fn normalise<V: Vector>(weighted: *mut f32, stride: usize, dim: usize, max: V, sum: V) {
    let factor = V::splat(1.0).div(sum);
    let unseen = V::and(max.lt(V::splat(f32::MIN)), sum.lt(V::splat(f32::MIN_POSITIVE)));
    for d in 0..dim {
        // SAFETY: the caller vouches for it.
        unsafe {
            let at = weighted.add(d * stride);
            V::select(unseen, V::splat(0.0), V::load(at).mul(factor)).store(at);
        }
    }
}

/// Transposes `[rows][columns]` to `[columns][rows]`, both multiples of a vector.
///
/// # Safety
/// Both buffers must hold `rows * columns` elements and not overlap.
#[inline(always)]
pub(super) unsafe fn transpose<V: Vector>(from: *const f32, rows: usize, columns: usize, to: *mut f32) {
    for row in (0..rows).step_by(V::LANES) {
        for column in (0..columns).step_by(V::LANES) {
            // SAFETY: the squares lie within both buffers, which the caller vouches for.
            unsafe {
                V::transpose(from.add(row * columns + column), columns, to.add(column * rows + row), rows);
            }
        }
    }
}

/// Takes the keys of `sight` in one block into a panel of `NV` vectors.
///
/// # Safety
/// The panel's pointers must be good for what they are documented to hold and distinct; `k` and `v` must hold the
/// keys of `sight`.
#[inline(always)]
unsafe fn attend<V: Vector, const MR: usize, const NV: usize>(
    panel: &Panel,
    k: &[f32],
    v: &[f32],
    sight: Sight,
    bounds: &[f32],
) {
    let lanes = NV * V::LANES;
    let Sight { from, to, masked } = sight;
    for key in (from..to).step_by(MR) {
        prefetch::<V>(k.as_ptr().wrapping_add((key + MR) * panel.dim), MR * panel.dim);
        // SAFETY: the caller vouches for the panel and the keys; steps of keys are whole tiles.
        unsafe {
            let p = Product {
                a: k.as_ptr().add(key * panel.dim),
                a_row: panel.dim,
                a_depth: 1,
                a_segment: 0,
                b: panel.q,
                b_depth: lanes,
                c: panel.scores.add(key * lanes),
                c_row: lanes,
                depth: panel.dim,
                segments: 1,
            };
            product::<V, MR, NV>(p, Store);
        }
    }
    if masked {
        // SAFETY: the panel's scores hold every key of the block.
        unsafe { hide::<V, NV>(panel.scores, sight, bounds) }
    }
    // SAFETY: the panel's scores hold every key of the block.
    let factors = unsafe { soften::<V, NV>(panel, from, to) };
    for (strip, d) in (0..panel.v_dim).step_by(MR).enumerate() {
        prefetch::<V>(v.as_ptr().wrapping_add(((strip + 1) * BLOCK + from) * MR), (to - from) * MR);
        // SAFETY: the caller vouches for the panel and the keys; strips are whole tiles, and O is padded to vectors.
        unsafe {
            let p = Product {
                a: v.as_ptr().add(strip * BLOCK * MR + from * MR),
                a_row: 1,
                a_depth: MR,
                a_segment: 0,
                b: panel.scores.add(from * lanes),
                b_depth: lanes,
                c: panel.o.add(d * lanes),
                c_row: lanes,
                depth: to - from,
                segments: 1,
            };
            match factors {
                None => product::<V, MR, NV>(p, Add),
                Some(factors) => product::<V, MR, NV>(p, Rescale(factors)),
            }
        }
    }
}

/// Turns the scores of keys `from..to` into weights, and brings each lane's maximum and sum up to date. Returns the
/// factors to rescale O by when some lane needs it; a lane that does not has a factor of exactly one.
///
/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn soften<V: Vector, const NV: usize>(panel: &Panel, from: usize, to: usize) -> Option<[V; NV]> {
    let lanes = NV * V::LANES;
    let factor = V::splat(panel.factor);
    let lowest = V::splat(f32::NEG_INFINITY);
    let mut maxima = [lowest; NV];
    for key in from..to {
        for (v, max) in maxima.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the scores.
            *max = unsafe { V::load(panel.scores.add(key * lanes + v * V::LANES)) }.max(*max);
        }
    }
    let mut factors = [V::splat(1.0); NV];
    let mut rescale = false;
    for v in 0..NV {
        // SAFETY: the caller vouches for the maxima and sums of the panel's lanes.
        unsafe {
            let old = V::load(panel.max.add(v * V::LANES));
            let new = maxima[v].mul(factor);
            let grows = old.add(V::splat(SLACK)).lt(new);
            rescale |= V::any(grows);
            let max = V::select(grows, new, old);
            factors[v] = V::select(grows, exp2(old.sub(max)), V::splat(1.0));
            max.store(panel.max.add(v * V::LANES));
            let sum = V::load(panel.sum.add(v * V::LANES));
            sum.mul(factors[v]).store(panel.sum.add(v * V::LANES));
            // Where nothing was seen yet, any finite maximum turns a score of -inf into a weight of zero.
            let unseen = max.lt(V::splat(f32::MIN));
            maxima[v] = V::splat(0.0).sub(V::select(unseen, V::splat(0.0), max));
        }
    }
    let mut sums = [V::splat(0.0); NV];
    for key in from..to {
        for v in 0..NV {
            // SAFETY: the caller vouches for the scores.
            unsafe {
                let score = panel.scores.add(key * lanes + v * V::LANES);
                let weight = exp2(V::load(score).fma(factor, maxima[v]));
                sums[v] = sums[v].add(weight);
                weight.store(score);
            }
        }
    }
    for (v, block_sum) in sums.iter().enumerate() {
        // SAFETY: the caller vouches for the sums of the panel's lanes.
        unsafe {
            let sum = V::load(panel.sum.add(v * V::LANES));
            sum.add(*block_sum).store(panel.sum.add(v * V::LANES));
        }
    }
    rescale.then_some(factors)
}
