//! The backward pass of a block of rows against a block of keys.

use super::backward::{MAX_PANELS, RowTensor};
use super::keys::BlockKeys;
use super::pack::{strip_len, words};
use super::product::{Add, Guard, Open, Product, Rows, Store, Strips, prefetch, product};
use super::simd::{Single, Vector, Words};
use super::softmax::Scoring;
use super::visibility::{BLOCK, KEY_STEP, Sight, hide};
use crate::Span;

/// Which panels of a block of rows see which steps of a block of keys.
pub(super) struct Steps {
    /// What each panel sees.
    pub(super) sights: [Option<Sight>; MAX_PANELS],
    /// For each step of keys, the range of panels to sum over: all that see it, and what lies between them.
    panels: [Span; BLOCK / KEY_STEP],
}

impl Default for Steps {
    fn default() -> Self {
        Steps { sights: [None; MAX_PANELS], panels: [Span::default(); BLOCK / KEY_STEP] }
    }
}

impl Steps {
    pub(super) fn see(&mut self, panel: usize, sight: Sight) {
        self.sights[panel] = Some(sight);
        for step in &mut self.panels[sight.from / KEY_STEP..sight.to / KEY_STEP] {
            let this = Span::at(panel, 1);
            *step = if step.is_empty() { this } else { step.hull(this) };
        }
    }

    /// Zeroes what a panel does not compute but is summed over.
    #[inline(always)]
    pub(super) fn clear_unseen<W: Words>(
        &self,
        panel: usize,
        lanes: usize,
        weights: &mut [f32],
        d_scores: &mut [f32],
    ) {
        for (step, panels) in self.panels.iter().enumerate() {
            let key = step * KEY_STEP;
            let seen = self.sights[panel].is_some_and(|s| s.from <= key && key < s.to);
            if panels.contains(panel) && !seen {
                let at = (panel * BLOCK + key) * lanes / W::PER_WORD;
                let len = KEY_STEP * lanes / W::PER_WORD;
                weights[at..][..len].fill(0.0);
                d_scores[at..][..len].fill(0.0);
            }
        }
    }
}

/// Consecutive rows, one a lane. Where a word holds one element, `scores` is `weights` and `d_weights` is `d_scores`.
pub(super) struct Panel {
    pub(super) dim: usize,
    pub(super) v_dim: usize,
    pub(super) scoring: Scoring,
    /// `[dim in words][lane]`.
    pub(super) q: *const f32,
    /// `[v_dim in words][lane]`.
    pub(super) d_o: *const f32,
    /// `[lane]`, in powers of two.
    pub(super) lse: *const f32,
    /// `[lane]`.
    pub(super) d: *const f32,
    /// `[key][lane]` of one block: scores, then score gradients in words along the keys from the first seen on.
    pub(super) scores: *mut f32,
    /// `[key][lane]` of one block: gradients of the weights.
    pub(super) d_weights: *mut f32,
    /// `[key][lane in words]` of one block.
    pub(super) weights: *mut f32,
    /// `[key][lane in words]` of one block.
    pub(super) d_scores: *mut f32,
    /// `[dim][lane]`, not yet scaled.
    pub(super) dq: *mut f32,
}

/// Computes weights and score gradients of the keys of `sight`. Returns false when a product is infinite or NaN, which
/// every non-finite element of a row or a key leads to, or when `finite` is false, which says so of the rows; then cells
/// that do not count get zeros whatever else their row and key hold.
///
/// # Safety
/// The panel's pointers must be good for what they are documented to hold, and distinct where nothing else is said;
/// `keys` must hold the keys of `sight`.
#[inline(always)]
pub(super) unsafe fn score<W: Words, const MR: usize, const NV: usize>(
    panel: &Panel,
    keys: &BlockKeys<'_>,
    sight: Sight,
    bounds: &[f32],
    finite: bool,
) -> bool {
    let lanes = NV * W::V::LANES;
    let Sight { from, to, masked } = sight;
    let sides =
        [(keys.k, panel.dim, panel.q, panel.scores), (keys.v, panel.v_dim, panel.d_o, panel.d_weights)];
    for (rows, dim, columns, to_products) in sides {
        let depth = words::<W>(dim);
        for key in (from..to).step_by(MR) {
            let row = rows.first.wrapping_add(key * rows.stride);
            if rows.stride == depth {
                prefetch::<W::V>(row.wrapping_add(MR * depth), MR * depth);
            }
            // SAFETY: the caller vouches for the panel and the keys; steps of keys are whole tiles.
            unsafe {
                let p = Product {
                    a: row,
                    a_row: rows.stride,
                    a_segment: 0,
                    b: columns,
                    c: to_products.add(key * lanes),
                    c_row: lanes,
                    depth,
                    segments: 1,
                };
                product::<W, Rows, Open, MR, NV>(p, Store);
            }
        }
    }
    // SAFETY: the panel holds products for every key of the block, and LSE and D for every lane.
    unsafe {
        let finite_products = all_finite::<W::V>(panel.scores.add(from * lanes), (to - from) * lanes)
            && all_finite::<W::V>(panel.d_weights.add(from * lanes), (to - from) * lanes);
        panel.scoring.cap::<W::V, NV>(panel.scores, from, to);
        if masked {
            hide::<W::V, NV>(panel.scores, sight, bounds);
        }
        let capped = panel.scoring.before_tanh.is_some();
        match (finite && finite_products, capped) {
            (true, false) => weigh::<W, NV, false, false>(panel, from, to),
            (true, true) => weigh::<W, NV, false, true>(panel, from, to),
            (false, false) => weigh::<W, NV, true, false>(panel, from, to),
            (false, true) => weigh::<W, NV, true, true>(panel, from, to),
        }
        finite && finite_products
    }
}

/// False when one of `len` elements, whole vectors, is NaN, infinite, or so large that twice as much is.
///
/// # Safety
/// `values` must be readable for `len` elements.
#[inline(always)]
unsafe fn all_finite<V: Vector>(values: *const f32, len: usize) -> bool {
    // Several sums, so that they do not wait for each other. Zero times a finite number is zero; NaN is less than nothing.
    let zero = V::splat(0.0);
    let mut sums = [zero; 4];
    for at in (0..len).step_by(4 * V::LANES) {
        for (n, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the elements; steps of keys are a multiple of four vectors.
            let value = unsafe { V::load(values.add(at + n * V::LANES)) };
            *sum = value.add(value).fma(zero, *sum);
        }
    }
    V::all(sums[0].add(sums[1]).add(sums[2].add(sums[3])).lt(V::splat(1.0)))
}

/// Turns the products of keys `from..to` into weights and score gradients.
///
/// # Safety
/// As [`score`].
#[inline(always)]
unsafe fn weigh<W: Words, const NV: usize, const GUARDED: bool, const CAPPED: bool>(
    panel: &Panel,
    from: usize,
    to: usize,
) {
    let lanes = NV * W::V::LANES;
    let (zero, one) = (W::V::splat(0.0), W::V::splat(1.0));
    let factor = W::V::splat(panel.scoring.factor);
    for vector in 0..NV {
        let at = vector * W::V::LANES;
        // SAFETY: the caller vouches for the panel; a word goes where its first key's score was, or before.
        unsafe {
            let shift = zero.sub(W::V::load(panel.lse.add(at)));
            let d = W::V::load(panel.d.add(at));
            for key in (from..to).step_by(W::PER_WORD) {
                let mut d_scores = [zero; 2];
                for (n, d_score) in d_scores[..W::PER_WORD].iter_mut().enumerate() {
                    let cell = (key + n) * lanes + at;
                    let score = W::V::load(panel.scores.add(cell));
                    let mut weight = W::exp2(score.fma(factor, shift));
                    let mut difference = W::V::load(panel.d_weights.add(cell)).sub(d);
                    if GUARDED {
                        weight = W::V::select(score.lt(W::V::splat(f32::MIN)), zero, weight);
                        difference = Single::<W::V>::sanitise(difference, weight);
                    }
                    *d_score = weight.mul(difference);
                    if CAPPED {
                        // The score is the hyperbolic tangent, or -inf where the cell does not count.
                        let t = score.max(W::V::splat(-1.0));
                        *d_score = d_score.mul(one.sub(t.mul(t)));
                    }
                    W::store_run(weight, panel.weights, cell);
                    W::store_run(*d_score, panel.d_scores, cell);
                }
                if W::PER_WORD == 2 {
                    let word = from + (key - from) / 2;
                    W::join(d_scores[0], d_scores[1]).store(panel.scores.add(word * lanes + at));
                }
            }
        }
    }
}

/// `dQ^T += K^T dS^T` over the keys of `sight`.
///
/// # Safety
/// As [`score`], after it.
#[inline(always)]
pub(super) unsafe fn add_dq<W: Words, G: Guard, const MR: usize, const NV: usize>(
    panel: &Panel,
    keys: &mut BlockKeys<'_>,
    sight: Sight,
) {
    let lanes = NV * W::V::LANES;
    let d_scores = if W::PER_WORD == 1 { panel.d_scores } else { panel.scores };
    let (first, depth) = (sight.from / W::PER_WORD, (sight.to - sight.from) / W::PER_WORD);
    let strips = keys.strips::<W, MR>();
    for (strip, d) in (0..panel.dim).step_by(MR).enumerate() {
        let k = strips.wrapping_add(strip * strip_len::<W, MR>() + first * MR);
        prefetch::<W::V>(k.wrapping_add(strip_len::<W, MR>()), depth * MR);
        // SAFETY: the caller vouches for the panel and the keys; strips are whole tiles, and dQ is padded to vectors.
        unsafe {
            let p = Product {
                a: k,
                a_row: 1,
                a_segment: 0,
                b: d_scores.add(sight.from * lanes),
                c: panel.dq.add(d * lanes),
                c_row: lanes,
                depth,
                segments: 1,
            };
            product::<W, Strips, G, MR, NV>(p, Add);
        }
    }
}

/// What is summed into one block's keys.
pub(super) struct KeySide<'a> {
    /// Weights or score gradients.
    pub(super) cells: &'a [f32],
    /// dO or Q.
    pub(super) rows: &'a RowTensor<'a>,
    /// dV or dK: the first key's row,
    pub(super) to: *mut f32,
    /// and the elements from one key to the next.
    pub(super) to_row: usize,
}

/// Adds to dV (from the weights and dO) and dK (from the score gradients and Q) of one block of keys.
///
/// # Safety
/// The cells must hold `[panel][key][lane in words]` for all steps, and what is added to all keys of the block that some
/// panel sees.
#[inline(always)]
pub(super) unsafe fn add_keys<W: Words, G: Guard, const MR: usize, const NV: usize>(
    steps: &Steps,
    block_rows: usize,
    sides: [KeySide<'_>; 2],
) {
    let lanes = NV * W::V::LANES;
    let per_panel = lanes / W::PER_WORD;
    for KeySide { cells, rows, to, to_row } in sides {
        let padded = rows.dim.next_multiple_of(W::V::LANES);
        for first in (0..padded).step_by(lanes) {
            let group = lanes.min(padded - first);
            let rows = rows.groups[first * block_rows / W::PER_WORD..].as_ptr();
            for key in (0..BLOCK).step_by(MR) {
                let panels = steps.panels[key / KEY_STEP];
                if panels.is_empty() {
                    continue;
                }
                // SAFETY: the caller vouches for the cells and the keys; rows are grouped as `RowTensor` says.
                unsafe {
                    let p = Product {
                        a: cells.as_ptr().add((panels.start() * BLOCK + key) * per_panel),
                        a_row: per_panel,
                        a_segment: BLOCK * per_panel,
                        b: rows.add(panels.start() * per_panel * group),
                        c: to.wrapping_add(key * to_row + first),
                        c_row: to_row,
                        depth: per_panel,
                        segments: panels.len(),
                    };
                    match group / W::V::LANES {
                        1 if NV > 1 => product::<W, Rows, G, MR, 1>(p, Add),
                        _ => product::<W, Rows, G, MR, NV>(p, Add),
                    }
                }
            }
        }
    }
}
