//! The forward tile: O and LSE of a range of rows of one kv head.
//!
//! Scores are computed transposed, `S^T = K Q^T`, with a row of attention in each lane, so that the row maximum and
//! sum are vertical and a query group is just more rows. Every row goes through the same operations whatever its
//! neighbours are: blocks of keys at fixed positions, in order; the rescaling decision its own; cells it does not see
//! an exact zero. A block that it does not see at all leaves it as it is, bit for bit.

use super::keys::{BlockKeys, KeySource, own_block_len};
use super::memory::{Buffer, Carver};
use super::pack::{strip_len, words};
use super::product::{GuardLeft, Open, Product, Rescale, Rows, Store, Strips, prefetch, product};
use super::simd::{Program, Vector, Words, copy_padded};
use super::softmax::{Running, Scoring, soften};
use super::visibility::{BLOCK, Sight, hide, lane_bounds, sight, slices_near};
use super::work::{HeadWork, Output, QueryRows, gather};
use crate::math::ln;
use crate::{BandSlice, Span};

/// Rows of a tile at most,
pub(super) const TILE_ROWS: usize = 512;
/// and where whole tiles would leave threads without work.
pub(super) const SMALL_TILE_ROWS: usize = 128;

/// Rows of a tile are a multiple of this where there are enough.
const ROW_STEP: usize = 64;

/// Ranges of rows for the forward pass: where they are cut shows in no bit.
pub(super) fn tiles(rows: usize, tile_rows: usize) -> impl Iterator<Item = Span> {
    let count = rows.div_ceil(tile_rows).max(1);
    let len = rows.div_ceil(count).next_multiple_of(ROW_STEP);
    (0..rows).step_by(len).map(move |at| Span::at(at, len.min(rows - at)))
}

/// One tile to compute, or a stage of it.
pub(super) struct ForwardTile<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
    pub(super) q: QueryRows<'a>,
    pub(super) keys: KeySource<'a>,
    /// `None` when all keys are there.
    pub(super) carry: Option<Carry<'a>>,
    pub(super) o: &'a Output,
    pub(super) lse: &'a Output,
    pub(super) scratch: &'a mut Scratch,
}

/// The running state of a tile between stages.
pub(super) struct Carry<'a> {
    /// [`CarryLen`] elements.
    pub(super) state: &'a mut [f32],
    /// Whether an earlier stage left something there.
    pub(super) resume: bool,
    /// Whether this is the last stage.
    pub(super) finish: bool,
}

/// A thread's working memory, kept between tiles.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) floats: Buffer,
    pub(super) positions: Vec<usize>,
    pub(super) bounds: Vec<f32>,
    /// Slices that meet the rows, and of these the ones that meet a block.
    pub(super) near: Vec<BandSlice>,
    pub(super) here: Vec<BandSlice>,
}

/// Elements of a tile's running state.
pub(super) struct CarryLen<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
}

/// Elements of scratch that a tile takes.
pub(super) struct TileLen<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
}

/// How a tile lies in its scratch.
struct Layout {
    dim: usize,
    v_dim: usize,
    /// Lanes of a panel.
    lanes: usize,
    panels: usize,
    /// Words of a row of Q, padded to vectors, and elements of a row of O, padded to vectors and tiles.
    width: usize,
    v_width: usize,
    /// Words of a block of keys that the tile packs itself.
    own_block: usize,
}

impl Layout {
    #[inline(always)]
    fn of<W: Words, const MR: usize, const NV: usize>(work: &HeadWork, rows: Span) -> Self {
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        let lanes = NV * W::V::LANES;
        Layout {
            dim,
            v_dim,
            lanes,
            panels: rows.len().div_ceil(lanes),
            width: words::<W>(dim).next_multiple_of(W::V::LANES),
            v_width: v_dim.next_multiple_of(W::V::LANES.max(MR)),
            own_block: own_block_len::<W>(work),
        }
    }

    /// Elements of Q, O, maxima, sums, scores, a panel's rows, and a block of keys.
    fn pieces(&self) -> [usize; 7] {
        let rows = self.panels * self.lanes;
        let stage = self.lanes * self.width.max(self.v_width);
        [rows * self.width, rows * self.v_width, rows, rows, BLOCK * self.lanes, stage, self.own_block]
    }

    fn carry_len(&self) -> usize {
        self.panels * self.lanes * (self.v_width + 2)
    }
}

impl Program for CarryLen<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> usize {
        Layout::of::<W, MR, NV>(self.work, self.rows).carry_len()
    }
}

impl Program for TileLen<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> usize {
        Layout::of::<W, MR, NV>(self.work, self.rows).pieces().iter().map(|len| Carver::room(*len)).sum()
    }
}

/// Consecutive rows, one a lane, and their running state.
struct Panel {
    dim: usize,
    v_dim: usize,
    scoring: Scoring,
    /// `[dim in words][lane]`.
    q: *const f32,
    /// `[v_dim][lane]`, not yet divided by the sum.
    o: *mut f32,
    running: Running,
    /// `[key][lane]` of one block.
    scores: *mut f32,
}

impl Program for ForwardTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) {
        let ForwardTile { work, rows, q, keys, carry, o, lse, scratch } = self;
        let layout = Layout::of::<W, MR, NV>(work, rows);
        let Layout { lanes, panels, width, v_width, .. } = layout;
        let pieces = layout.pieces();
        let mut carver = Carver::new(&mut scratch.floats, pieces.iter().map(|len| Carver::room(*len)).sum());
        let [q_t, o_t, max, sum, scores, stage, own_block] = pieces.map(|len| carver.take(len));
        scratch.positions.clear();
        scratch.positions.extend(rows.iter().map(|row| work.position(row)));

        let panel_rows = |p: usize| Span::at(p * lanes, lanes.min(rows.len() - p * lanes));
        // The last panel may do with fewer vectors.
        let vectors = |p: usize| panel_rows(p).len().div_ceil(W::V::LANES);
        for p in 0..panels {
            let used = vectors(p) * W::V::LANES;
            let own = Span::at(rows.start() + p * lanes, panel_rows(p).len());
            // SAFETY: rows of a head are split among tiles, so no one writes these now. The stage holds `used` rows of
            // `width`, the panel `width` rows of `used`, both multiples of a vector.
            unsafe {
                gather::<W>(work, &q, own, used, width, stage);
                transpose::<W::V>(stage.as_ptr(), used, width, q_t.as_mut_ptr().add(p * lanes * width));
            }
        }

        // A cell that does not count has a weight of zero, but zero times a non-finite value is not zero. Where O shows
        // such a value, the keys are gone through again with a guard against it.
        for guarded in [false, true] {
            match &carry {
                Some(Carry { state, resume: true, .. }) => {
                    let (from_max, rest) = state.split_at(max.len());
                    let (from_sum, from_o) = rest.split_at(sum.len());
                    max.copy_from_slice(from_max);
                    sum.copy_from_slice(from_sum);
                    o_t.copy_from_slice(from_o);
                }
                _ => {
                    o_t.fill(0.0);
                    max.fill(f32::NEG_INFINITY);
                    sum.fill(0.0);
                }
            }
            slices_near(&work.slices, work.positions(rows), work.kv, &mut scratch.near);
            let mut blocks = work.blocks(rows).starts().peekable();
            while let Some(block) = blocks.next() {
                let all = work.positions(rows);
                slices_near(&scratch.near, all, Span::at(block, BLOCK), &mut scratch.here);
                if scratch.here.is_empty() {
                    continue;
                }
                let mut block_keys = keys.block::<W, MR>(work, block, own_block);
                for p in 0..panels {
                    let own = panel_rows(p);
                    let positions = &scratch.positions[own.range()];
                    let (Some(first), Some(last)) = (positions.first(), positions.last()) else { continue };
                    let Some(sight) = sight(&scratch.here, Span::at(*first, last + 1 - first), block) else {
                        continue;
                    };
                    scratch.bounds.clear();
                    if sight.masked {
                        let lanes = vectors(p) * W::V::LANES;
                        lane_bounds(&scratch.here, lanes, positions, block, &mut scratch.bounds);
                    }
                    // SAFETY: each pointer is the start of the panel's own piece of a buffer carved above, all
                    // distinct; the block holds the keys of `sight`, which the blocks of these rows cover.
                    unsafe {
                        let panel = Panel {
                            dim: layout.dim,
                            v_dim: layout.v_dim,
                            scoring: Scoring::of(&work.geometry),
                            q: q_t.as_ptr().add(p * lanes * width),
                            o: o_t.as_mut_ptr().add(p * lanes * v_width),
                            running: Running {
                                max: max.as_mut_ptr().add(p * lanes),
                                sum: sum.as_mut_ptr().add(p * lanes),
                            },
                            scores: scores.as_mut_ptr(),
                        };
                        let seen = Seen { sight, bounds: &scratch.bounds, guarded };
                        // What the last panel asks for is used before anything else drives it from the caches.
                        let next = blocks.peek().filter(|_| p + 1 == panels);
                        let next = next.map(|block| Next { keys: &keys, work, block: *block });
                        if NV > 1 && vectors(p) == 1 {
                            attend::<W, MR, 1>(&panel, &mut block_keys, &seen, next);
                        } else {
                            attend::<W, MR, NV>(&panel, &mut block_keys, &seen, next);
                        }
                    }
                }
            }
            if all_finite::<W::V>(o_t) {
                break;
            }
        }

        if let Some(Carry { state, finish: false, .. }) = carry {
            let (to_max, rest) = state.split_at_mut(max.len());
            let (to_sum, to_o) = rest.split_at_mut(sum.len());
            to_max.copy_from_slice(max);
            to_sum.copy_from_slice(sum);
            to_o.copy_from_slice(o_t);
            return;
        }
        for p in 0..panels {
            let (own, used) = (panel_rows(p), vectors(p) * W::V::LANES);
            // SAFETY: the panel holds `v_width` rows of `used`, the stage `used` rows of `v_width`, both multiples of
            // a vector; maxima and sums are there for every lane.
            unsafe {
                let weighted = o_t.as_mut_ptr().add(p * lanes * v_width);
                for lane in (0..used).step_by(W::V::LANES) {
                    let at = p * lanes + lane;
                    let (max, sum) = (W::V::load(max.as_ptr().add(at)), W::V::load(sum.as_ptr().add(at)));
                    normalise(weighted.add(lane), used, layout.v_dim, max, sum);
                }
                transpose::<W::V>(weighted, v_width, used, stage.as_mut_ptr());
            }
            for (lane, row) in own.iter().enumerate() {
                let (token, head) = work.place(rows.start() + row);
                // SAFETY: rows of a head are split among tiles, so no one else writes this one, and Q in the same place
                // was gathered; the task's results stay in place until all its tiles are done.
                let (o, lse) = unsafe { (o.row(token, head), lse.row(token, head)) };
                copy_padded::<W::V>(&stage[lane * v_width..][..layout.v_dim], o);
                // A row without keys has a sum of zero.
                lse[0] = (f64::from(max[row]) * std::f64::consts::LN_2 + ln(f64::from(sum[row]))) as f32;
            }
        }
    }
}

/// False when some element is infinite or NaN. The length must be a multiple of a vector.
#[inline(always)]
fn all_finite<V: Vector>(values: &[f32]) -> bool {
    let mut sum = V::splat(0.0);
    let zero = V::splat(0.0);
    for values in values.chunks_exact(V::LANES) {
        // SAFETY: a chunk is a vector.
        sum = unsafe { V::load(values.as_ptr()) }.fma(zero, sum);
    }
    // Zero times a finite number is zero, and nothing else is less than one here: NaN is not.
    V::all(sum.lt(V::splat(1.0)))
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
            // Adding zero turns -0 into +0: which it was may depend on blocks that only a neighbour saw.
            V::select(unseen, V::splat(0.0), V::load(at).fma(factor, V::splat(0.0))).store(at);
        }
    }
}

/// Transposes `[rows][columns]` to `[columns][rows]`, both multiples of a vector.
///
/// # Safety
/// Both buffers must hold `rows * columns` words and not overlap.
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

/// What a panel sees of a block.
struct Seen<'a> {
    sight: Sight,
    /// [`lane_bounds`] where the sight is masked.
    bounds: &'a [f32],
    /// Whether V may hold values that are not finite.
    guarded: bool,
}

/// The block of keys that comes after the one at hand.
struct Next<'a> {
    keys: &'a KeySource<'a>,
    work: &'a HeadWork,
    block: usize,
}

/// Takes the keys of one block into a panel of `NV` vectors. Memory delivers meanwhile what is used next: V during the
/// product of Q and K, and the next block's K during the product of weights and V.
///
/// # Safety
/// The panel's pointers must be good for what they are documented to hold and distinct; `keys` must hold the keys of
/// the sight.
#[inline(always)]
unsafe fn attend<W: Words, const MR: usize, const NV: usize>(
    panel: &Panel,
    keys: &mut BlockKeys<'_>,
    seen: &Seen<'_>,
    next: Option<Next<'_>>,
) {
    let lanes = NV * W::V::LANES;
    let Sight { from, to, masked } = seen.sight;
    let depth = words::<W>(panel.dim);
    for key in (from..to).step_by(MR) {
        let k = keys.k.first.wrapping_add(key * keys.k.stride);
        if keys.k.stride == depth {
            prefetch::<W::V>(k.wrapping_add(MR * depth), MR * depth);
        }
        keys.ask_for_strips::<W::V>(Span::at(key, MR));
        // SAFETY: the caller vouches for the panel and the keys; steps of keys are whole tiles.
        unsafe {
            let p = Product {
                a: k,
                a_row: keys.k.stride,
                a_segment: 0,
                b: panel.q,
                c: panel.scores.add(key * lanes),
                c_row: lanes,
                depth,
                segments: 1,
            };
            product::<W, Rows, Open, MR, NV>(p, Store);
        }
    }
    // SAFETY: the panel's scores hold every key of the block.
    let factors = unsafe {
        panel.scoring.cap::<W::V, NV>(panel.scores, from, to);
        if masked {
            hide::<W::V, NV>(panel.scores, seen.sight, seen.bounds);
        }
        soften::<W, NV>(&panel.running, panel.scores, panel.scoring.factor, from, to)
    };
    let strips = keys.strips::<W, MR>();
    let (first, depth) = (from / W::PER_WORD, (to - from) / W::PER_WORD);
    let rows_a_strip = BLOCK.div_ceil(panel.v_dim.div_ceil(MR));
    for (strip, d) in (0..panel.v_dim).step_by(MR).enumerate() {
        let v = strips.wrapping_add(strip * strip_len::<W, MR>() + first * MR);
        prefetch::<W::V>(v.wrapping_add(strip_len::<W, MR>()), depth * MR);
        if let Some(Next { keys, work, block }) = &next {
            keys.ask_for_rows::<W::V>(work, Span::at(block + strip * rows_a_strip, rows_a_strip));
        }
        // SAFETY: the caller vouches for the panel and the keys; strips are whole tiles, and O is padded to vectors.
        unsafe {
            let p = Product {
                a: v,
                a_row: 1,
                a_segment: 0,
                b: panel.scores.add(from * lanes),
                c: panel.o.add(d * lanes),
                c_row: lanes,
                depth,
                segments: 1,
            };
            if seen.guarded {
                product::<W, Strips, GuardLeft, MR, NV>(p, Rescale(factors));
            } else {
                product::<W, Strips, Open, MR, NV>(p, Rescale(factors));
            }
        }
    }
}
