//! The backward chunk: dQ of a range of rows of one kv head, and that range's share of dK and dV.
//!
//! Weights are computed again from the scores and the final LSE. dQ of a row is summed over blocks of keys in order,
//! whatever its neighbours are. dK and dV of a key are summed over the chunk's blocks of rows in order, each block's
//! sum starting from zero.

use super::dispatch::Program;
use super::forward::{Scratch, transpose};
use super::memory::Carver;
use super::pack::{Form, block_len, copy_padded, pack_block};
use super::product::{Add, Product, Store, prefetch, product};
use super::vector::{Vector, exp2};
use super::visibility::{BLOCK, KEY_STEP, Sight, hide, lane_bounds, sight};
use super::work::{Blocks, HeadWork, Output, gather};
use crate::{Span, TensorView};

/// Rows whose scores against a block of keys are held at a time, at most.
const BLOCK_ROWS: usize = 256;

/// Rows of dK and dV partials are padded to a multiple of this.
const PADDING: usize = 16;

/// What a backward task has for each row.
#[derive(Clone, Copy)]
pub(super) struct RowInputs<'a> {
    pub(super) q: TensorView<'a>,
    pub(super) d_o: TensorView<'a>,
    pub(super) lse: TensorView<'a>,
    pub(super) d: TensorView<'a>,
}

/// One chunk to compute.
pub(super) struct BackwardChunk<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
    pub(super) inputs: RowInputs<'a>,
    /// What [`BackwardPack`] made.
    pub(super) packed: &'a [f32],
    /// The blocks packed.
    pub(super) blocks: Blocks,
    pub(super) dq: &'a Output,
    /// Where the chunk's share of dK and dV goes, laid out as [`Partial`] says; any content.
    pub(super) partial: &'a mut [f32],
    pub(super) scratch: &'a mut Scratch,
}

/// Packs K as rows, V as rows and K as strips, block by block.
pub(super) struct BackwardPack<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) k: TensorView<'a>,
    pub(super) v: TensorView<'a>,
    pub(super) blocks: Blocks,
    pub(super) to: &'a mut [f32],
}

/// Layout of a chunk's dK (not yet scaled) and dV: whole blocks of the keys that its rows see, dK then dV.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    pub(super) blocks: Blocks,
    dk_width: usize,
    dv_width: usize,
}

impl Partial {
    pub(super) fn of(work: &HeadWork, rows: Span) -> Self {
        let padded = |dim: usize| dim.next_multiple_of(PADDING);
        let (dk_width, dv_width) = (padded(work.geometry.head_dim()), padded(work.geometry.v_head_dim()));
        Partial { blocks: work.blocks(rows), dk_width, dv_width }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.count() * BLOCK * (self.dk_width + self.dv_width)
    }

    /// dK and dV of the key at a position, which must lie in the blocks.
    fn rows<'a>(&self, partial: &'a [f32], key: usize) -> (&'a [f32], &'a [f32]) {
        let key = key - self.blocks.base();
        let (dk, dv) = partial.split_at(self.blocks.count() * BLOCK * self.dk_width);
        (&dk[key * self.dk_width..][..self.dk_width], &dv[key * self.dv_width..][..self.dv_width])
    }
}

/// Writes dK and dV of one head: the chunks' shares, summed in order from zero.
///
/// # Safety
/// The results must be in place, and no one else may hold the head's rows of them.
pub(super) unsafe fn finish_keys(work: &HeadWork, chunks: &[(Partial, &[f32])], dk: &Output, dv: &Output) {
    for key in work.kv.iter() {
        let token = key - work.kv.start();
        // SAFETY: the caller vouches for it.
        let (dk, dv) = unsafe { (dk.row(token, work.kv_head), dv.row(token, work.kv_head)) };
        dk.fill(0.0);
        dv.fill(0.0);
        for (layout, partial) in chunks {
            if !layout.blocks.keys.contains(key) {
                continue;
            }
            let (dk_part, dv_part) = layout.rows(partial, key);
            for (sum, part) in dk.iter_mut().zip(dk_part) {
                *sum += part;
            }
            for (sum, part) in dv.iter_mut().zip(dv_part) {
                *sum += part;
            }
        }
        for dk in dk {
            *dk *= work.geometry.scale();
        }
    }
}

/// Elements of one packed block: K rows, V rows, K strips.
pub(super) fn packed_block_len(work: &HeadWork) -> usize {
    let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
    let strips = block_len(Form::Strips, dim);
    block_len(Form::Rows, dim) + block_len(Form::Rows, v_dim) + strips
}

impl Program for BackwardPack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NV: usize>(self) {
        let BackwardPack { work, k, v, blocks, to } = self;
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        for (block, to) in blocks.starts().zip(to.chunks_exact_mut(packed_block_len(work))) {
            let (k_rows, rest) = to.split_at_mut(block_len(Form::Rows, dim));
            let (v_rows, strips) = rest.split_at_mut(block_len(Form::Rows, v_dim));
            pack_block::<V, MR>(work, k, blocks, block, Form::Rows, k_rows);
            pack_block::<V, MR>(work, v, blocks, block, Form::Rows, v_rows);
            pack_block::<V, MR>(work, k, blocks, block, Form::Strips, strips);
        }
    }
}

/// One tensor of a block of rows, in the two layouts that its products need.
struct RowTensor<'a> {
    dim: usize,
    /// Elements of a row, padded to whole vectors.
    width: usize,
    /// `[panel][dim][lane]`.
    columns: &'a mut [f32],
    /// `[dim / lanes][row][lanes]`, the last group of dimensions only as wide as needed.
    groups: &'a mut [f32],
}

impl RowTensor<'_> {
    /// Elements of either layout.
    fn len(rows: usize, width: usize) -> usize {
        rows * width
    }

    /// Takes in the rows of one panel.
    #[inline(always)]
    fn fill_panel<V: Vector>(&mut self, stage: &mut [f32], panel: usize, lanes: usize, rows: usize) {
        let width = self.width;
        // SAFETY: the stage holds `lanes` rows of `width`, as does a panel's columns; both are whole vectors.
        unsafe {
            let columns = self.columns[panel * lanes * width..][..lanes * width].as_mut_ptr();
            transpose::<V>(stage[..lanes * width].as_ptr(), lanes, width, columns);
        }
        for first in (0..width).step_by(lanes) {
            let group = lanes.min(width - first);
            let to = &mut self.groups[first * rows + panel * lanes * group..][..lanes * group];
            for (to, from) in to.chunks_exact_mut(group).zip(stage.chunks_exact(width)) {
                copy_padded::<V>(&from[first..][..group], to);
            }
        }
    }
}

impl Program for BackwardChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector, const MR: usize, const NV: usize>(self) {
        let BackwardChunk { work, rows, inputs, packed, blocks, dq, partial, scratch } = self;
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        let (width, v_width) = (dim.next_multiple_of(V::LANES), v_dim.next_multiple_of(V::LANES));
        let lanes = NV * V::LANES;
        let block_rows = BLOCK_ROWS / lanes * lanes;
        let pieces = [
            RowTensor::len(block_rows, width),
            RowTensor::len(block_rows, width),
            RowTensor::len(block_rows, v_width),
            RowTensor::len(block_rows, v_width),
            block_rows * width,
            block_rows,
            block_rows,
            block_rows * BLOCK,
            block_rows * BLOCK,
            lanes * width.max(v_width),
        ];
        let mut carver = Carver::new(&mut scratch.floats, pieces.iter().map(|len| Carver::room(*len)).sum());
        let [q_columns, q_groups, o_columns, o_groups, dq_t, lse, d, weights, d_scores, stage] =
            pieces.map(|len| carver.take(len));
        let mut q = RowTensor { dim, width, columns: q_columns, groups: q_groups };
        let mut d_o = RowTensor { dim: v_dim, width: v_width, columns: o_columns, groups: o_groups };

        let layout = Partial::of(work, rows);
        let partial = &mut partial[..layout.len()];
        partial.fill(0.0);
        let (dk, dv) = partial.split_at_mut(layout.blocks.count() * BLOCK * layout.dk_width);
        let block_len = packed_block_len(work);

        for first_row in rows.iter().step_by(block_rows) {
            let own = Span::at(first_row, block_rows.min(rows.end() - first_row));
            let panels = own.len().div_ceil(lanes);
            let panel_rows = |p: usize| Span::at(p * lanes, lanes.min(own.len() - p * lanes));
            scratch.positions.clear();
            scratch.positions.extend(own.iter().map(|row| work.position(row)));
            for p in 0..panels {
                let rows = Span::at(own.start() + p * lanes, panel_rows(p).len());
                gather::<V>(work, inputs.q, rows, lanes, width, stage);
                q.fill_panel::<V>(stage, p, lanes, block_rows);
                gather::<V>(work, inputs.d_o, rows, lanes, v_width, stage);
                d_o.fill_panel::<V>(stage, p, lanes, block_rows);
            }
            // Padding lanes, and rows without keys, get weights of zero by an infinite LSE.
            lse.fill(f32::INFINITY);
            d.fill(0.0);
            for (lane, row) in own.iter().enumerate() {
                let (token, head) = work.place(row);
                let row_lse = inputs.lse.row(token, head)[0];
                if row_lse != f32::NEG_INFINITY {
                    lse[lane] = row_lse * std::f32::consts::LOG2_E;
                }
                d[lane] = inputs.d.row(token, head)[0];
            }
            dq_t.fill(0.0);

            for block in work.blocks(own).starts() {
                let k_rows = &packed[(block - blocks.base()) / BLOCK * block_len..][..block_len];
                let v_rows = &k_rows[BLOCK * dim..];
                let k_strips = &v_rows[BLOCK * v_dim..];
                let mut steps = Steps::default();
                for p in 0..panels {
                    let positions = &scratch.positions[panel_rows(p).range()];
                    if let (Some(first), Some(last)) = (positions.first(), positions.last())
                        && let Some(sight) = sight(&work.slices, Span::at(*first, last + 1 - first), block)
                    {
                        steps.see(p, sight);
                    }
                }
                for p in 0..panels {
                    let Some(sight) = steps.sights[p] else {
                        steps.clear_unseen(p, lanes, weights, d_scores);
                        continue;
                    };
                    scratch.bounds.clear();
                    if sight.masked {
                        let positions = &scratch.positions[panel_rows(p).range()];
                        lane_bounds(&work.slices, lanes, positions, block, &mut scratch.bounds);
                    }
                    steps.clear_unseen(p, lanes, weights, d_scores);
                    // SAFETY: each pointer is the start of the panel's own piece of a buffer carved above, all
                    // distinct; K and V hold the keys of `sight`, which the blocks of these rows cover.
                    unsafe {
                        let panel = Panel {
                            dim,
                            v_dim,
                            factor: work.geometry.scale() * std::f32::consts::LOG2_E,
                            q: q.columns.as_ptr().add(p * lanes * width),
                            d_o: d_o.columns.as_ptr().add(p * lanes * v_width),
                            lse: lse.as_ptr().add(p * lanes),
                            d: d.as_ptr().add(p * lanes),
                            weights: weights.as_mut_ptr().add(p * BLOCK * lanes),
                            d_scores: d_scores.as_mut_ptr().add(p * BLOCK * lanes),
                            dq: dq_t.as_mut_ptr().add(p * lanes * width),
                        };
                        score::<V, MR, NV>(&panel, k_rows, v_rows, sight, &scratch.bounds);
                        add_dq::<V, MR, NV>(&panel, k_strips, sight);
                    }
                }
                let key = block - layout.blocks.base();
                // SAFETY: weights and score gradients of all steps' panels were written or cleared above; the
                // partials hold every key of the block.
                unsafe {
                    let to = (dv.as_mut_ptr().add(key * layout.dv_width), layout.dv_width);
                    add_keys::<V, MR, NV>(&steps, weights, &d_o, block_rows, to);
                    let to = (dk.as_mut_ptr().add(key * layout.dk_width), layout.dk_width);
                    add_keys::<V, MR, NV>(&steps, d_scores, &q, block_rows, to);
                }
            }

            for p in 0..panels {
                // SAFETY: the panel holds `width` rows of `lanes`, the stage `lanes` rows of `width`, whole vectors.
                unsafe {
                    transpose::<V>(dq_t.as_ptr().add(p * lanes * width), width, lanes, stage.as_mut_ptr())
                }
                for (lane, row) in panel_rows(p).iter().enumerate() {
                    let (token, head) = work.place(own.start() + row);
                    // SAFETY: rows of a head are split among chunks, so no one else writes this one; the task's
                    // results stay in place until all its chunks are done.
                    let dq = unsafe { dq.row(token, head) };
                    for (dq, sum) in dq.iter_mut().zip(&stage[lane * width..]) {
                        *dq = sum * work.geometry.scale();
                    }
                }
            }
        }
    }
}

/// Which panels of a block of rows see which steps of a block of keys.
struct Steps {
    /// What each panel sees.
    sights: [Option<Sight>; BLOCK_ROWS / 8],
    /// For each step of keys, the range of panels to sum over: all that see it, and what lies between them.
    panels: [Span; BLOCK / KEY_STEP],
}

impl Default for Steps {
    fn default() -> Self {
        Steps { sights: [None; BLOCK_ROWS / 8], panels: [Span::default(); BLOCK / KEY_STEP] }
    }
}

impl Steps {
    fn see(&mut self, panel: usize, sight: Sight) {
        self.sights[panel] = Some(sight);
        for step in &mut self.panels[sight.from / KEY_STEP..sight.to / KEY_STEP] {
            let this = Span::at(panel, 1);
            *step = if step.is_empty() { this } else { step.hull(this) };
        }
    }

    /// Zeroes what a panel does not compute but is summed over.
    fn clear_unseen(&self, panel: usize, lanes: usize, weights: &mut [f32], d_scores: &mut [f32]) {
        for (step, panels) in self.panels.iter().enumerate() {
            let key = step * KEY_STEP;
            let seen = self.sights[panel].is_some_and(|s| s.from <= key && key < s.to);
            if panels.contains(panel) && !seen {
                let at = (panel * BLOCK + key) * lanes;
                weights[at..][..KEY_STEP * lanes].fill(0.0);
                d_scores[at..][..KEY_STEP * lanes].fill(0.0);
            }
        }
    }
}

/// Consecutive rows, one a lane.
struct Panel {
    dim: usize,
    v_dim: usize,
    /// Turns a score into a power of two.
    factor: f32,
    /// `[dim][lane]`.
    q: *const f32,
    /// `[v_dim][lane]`.
    d_o: *const f32,
    /// `[lane]`, in powers of two.
    lse: *const f32,
    /// `[lane]`.
    d: *const f32,
    /// `[key][lane]` of one block: scores, then weights.
    weights: *mut f32,
    /// `[key][lane]` of one block: gradients of the weights, then of the scores.
    d_scores: *mut f32,
    /// `[dim][lane]`, not yet scaled.
    dq: *mut f32,
}

/// Computes weights and score gradients of the keys of `sight`.
///
/// # Safety
/// The panel's pointers must be good for what they are documented to hold and distinct; `k` and `v` must hold the
/// keys of `sight`.
#[inline(always)]
unsafe fn score<V: Vector, const MR: usize, const NV: usize>(
    panel: &Panel,
    k: &[f32],
    v: &[f32],
    sight: Sight,
    bounds: &[f32],
) {
    let lanes = NV * V::LANES;
    let sides = [(k, panel.dim, panel.q, panel.weights), (v, panel.v_dim, panel.d_o, panel.d_scores)];
    for (keys, dim, rows, to) in sides {
        for key in (sight.from..sight.to).step_by(MR) {
            prefetch::<V>(keys.as_ptr().wrapping_add((key + MR) * dim), MR * dim);
            // SAFETY: the caller vouches for the panel and the keys; steps of keys are whole tiles.
            unsafe {
                let p = Product {
                    a: keys.as_ptr().add(key * dim),
                    a_row: dim,
                    a_depth: 1,
                    a_segment: 0,
                    b: rows,
                    b_depth: lanes,
                    c: to.add(key * lanes),
                    c_row: lanes,
                    depth: dim,
                    segments: 1,
                };
                product::<V, MR, NV>(p, Store);
            }
        }
    }
    // SAFETY: the panel holds scores for every key of the block, and LSE and D for every lane.
    unsafe {
        if sight.masked {
            hide::<V, NV>(panel.weights, sight, bounds);
        }
        let factor = V::splat(panel.factor);
        for vector in 0..NV {
            let at = vector * V::LANES;
            let shift = V::splat(0.0).sub(V::load(panel.lse.add(at)));
            let d = V::load(panel.d.add(at));
            for key in sight.from..sight.to {
                let weight = panel.weights.add(key * lanes + at);
                let d_score = panel.d_scores.add(key * lanes + at);
                let p = exp2(V::load(weight).fma(factor, shift));
                p.store(weight);
                p.mul(V::load(d_score).sub(d)).store(d_score);
            }
        }
    }
}

/// `dQ^T += K^T dS^T` over the keys of `sight`.
///
/// # Safety
/// As [`score`], after it.
#[inline(always)]
unsafe fn add_dq<V: Vector, const MR: usize, const NV: usize>(panel: &Panel, k_strips: &[f32], sight: Sight) {
    let lanes = NV * V::LANES;
    for (strip, d) in (0..panel.dim).step_by(MR).enumerate() {
        let next = ((strip + 1) * BLOCK + sight.from) * MR;
        prefetch::<V>(k_strips.as_ptr().wrapping_add(next), (sight.to - sight.from) * MR);
        // SAFETY: the caller vouches for the panel and the keys; strips are whole tiles, and dQ is padded to vectors.
        unsafe {
            let p = Product {
                a: k_strips.as_ptr().add((strip * BLOCK + sight.from) * MR),
                a_row: 1,
                a_depth: MR,
                a_segment: 0,
                b: panel.d_scores.add(sight.from * lanes),
                b_depth: lanes,
                c: panel.dq.add(d * lanes),
                c_row: lanes,
                depth: sight.to - sight.from,
                segments: 1,
            };
            product::<V, MR, NV>(p, Add);
        }
    }
}

/// Adds to dV (from the weights and dO) or dK (from the score gradients and Q) of one block of keys. `to` is its
/// first key's row, and the elements from one key to the next.
///
/// # Safety
/// `cells` must hold `[panel][key][lane]` for all steps, and `to` all keys of the block.
#[inline(always)]
unsafe fn add_keys<V: Vector, const MR: usize, const NV: usize>(
    steps: &Steps,
    cells: &[f32],
    rows: &RowTensor<'_>,
    block_rows: usize,
    (to, to_row): (*mut f32, usize),
) {
    let lanes = NV * V::LANES;
    let width = rows.dim.next_multiple_of(V::LANES);
    for first in (0..width).step_by(lanes) {
        let group = lanes.min(width - first);
        for key in (0..BLOCK).step_by(MR) {
            let panels = steps.panels[key / KEY_STEP];
            if panels.is_empty() {
                continue;
            }
            // SAFETY: the caller vouches for the cells and the keys; rows are grouped as `RowTensor` says.
            unsafe {
                let p = Product {
                    a: cells.as_ptr().add((panels.start() * BLOCK + key) * lanes),
                    a_row: lanes,
                    a_depth: 1,
                    a_segment: BLOCK * lanes,
                    b: rows.groups.as_ptr().add(first * block_rows + panels.start() * lanes * group),
                    b_depth: group,
                    c: to.add(key * to_row + first),
                    c_row: to_row,
                    depth: lanes,
                    segments: panels.len(),
                };
                match group / V::LANES {
                    1 => product::<V, MR, 1>(p, Add),
                    _ => product::<V, MR, NV>(p, Add),
                }
            }
        }
    }
}
