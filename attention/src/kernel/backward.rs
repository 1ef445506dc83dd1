//! The backward chunk: dQ of a range of rows of one kv head, and that range's share of dK and dV.
//!
//! Weights are computed again from the scores and the final LSE. dQ of a row is summed over blocks of keys in order,
//! whatever its neighbours are. dK and dV of a key are summed over the chunk's blocks of rows in order, each block's
//! sum starting from zero.

use super::forward::{Scratch, transpose};
use super::gradient::{KeySide, Panel, Steps, add_dq, add_keys, score};
use super::key_gradients::KeyGradients;
use super::keys::{KeySource, own_block_len};
use super::memory::Carver;
use super::pack::words;
use super::product::{GuardLeft, GuardRight, Open};
use super::row::Row;
use super::simd::{Program, Vector, Words};
use super::softmax::Scoring;
use super::visibility::{BLOCK, lane_bounds, sight, slices_near};
use super::work::{HeadWork, Output, QueryRows, gather};
use crate::{MAX_HEAD_DIM, Span, TensorView};

/// Rows whose scores against a block of keys are held at a time, at most.
pub(super) const BLOCK_ROWS: usize = 256;

/// Panels of a block of rows, with the narrowest vectors.
pub(super) const MAX_PANELS: usize = BLOCK_ROWS / 4;

/// What a backward task has for each row.
#[derive(Clone, Copy)]
pub(super) struct RowInputs<'a> {
    pub(super) q: QueryRows<'a>,
    pub(super) d_o: QueryRows<'a>,
    pub(super) lse: TensorView<'a>,
    pub(super) d: TensorView<'a>,
}

/// One chunk to compute.
pub(super) struct BackwardChunk<'a> {
    pub(super) work: &'a HeadWork,
    pub(super) rows: Span,
    pub(super) inputs: RowInputs<'a>,
    pub(super) keys: KeySource<'a>,
    pub(super) dq: &'a Output,
    /// Where the chunk's share of dK and dV goes.
    pub(super) key_gradients: KeyGradients<'a>,
    pub(super) scratch: &'a mut Scratch,
}

/// Elements of scratch that a chunk takes.
pub(super) struct ChunkLen<'a> {
    pub(super) work: &'a HeadWork,
}

/// How a block of rows lies in its scratch.
struct Layout {
    dim: usize,
    v_dim: usize,
    /// Lanes of a panel.
    lanes: usize,
    block_rows: usize,
    /// Words of a row, padded to vectors.
    width: usize,
    v_width: usize,
    /// Elements of a row, padded to vectors and tiles.
    padded: usize,
    v_padded: usize,
    per_word: usize,
    own_block: usize,
}

impl Layout {
    #[inline(always)]
    fn of<W: Words, const MR: usize, const NV: usize>(work: &HeadWork) -> Self {
        let (dim, v_dim) = (work.geometry.head_dim(), work.geometry.v_head_dim());
        let lanes = NV * W::V::LANES;
        Layout {
            dim,
            v_dim,
            lanes,
            block_rows: BLOCK_ROWS / lanes * lanes,
            width: words::<W>(dim).next_multiple_of(W::V::LANES),
            v_width: words::<W>(v_dim).next_multiple_of(W::V::LANES),
            padded: dim.next_multiple_of(W::V::LANES.max(MR)),
            v_padded: v_dim.next_multiple_of(W::V::LANES.max(MR)),
            per_word: W::PER_WORD,
            own_block: own_block_len::<W>(work),
        }
    }

    /// Words of Q and dO in two layouts each, dQ, LSE, D, weights and score gradients of all panels, products of a
    /// panel, a panel's rows, a block of keys, and its dK and dV.
    fn pieces(&self) -> [usize; 13] {
        let rows = self.block_rows;
        let cells = rows * BLOCK / self.per_word;
        let products = if self.per_word == 1 { 0 } else { 2 * BLOCK * self.lanes };
        [
            rows * self.width,
            rows / self.per_word * self.padded,
            rows * self.v_width,
            rows / self.per_word * self.v_padded,
            rows * self.padded,
            rows,
            rows,
            cells,
            cells,
            products,
            self.lanes * self.padded.max(self.v_padded),
            self.own_block,
            BLOCK * (self.padded + self.v_padded),
        ]
    }
}

impl Program for ChunkLen<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) -> usize {
        Layout::of::<W, MR, NV>(self.work).pieces().iter().map(|len| Carver::room(*len)).sum()
    }
}

/// One tensor of a block of rows, in the two layouts that its products need.
pub(super) struct RowTensor<'a> {
    pub(super) dim: usize,
    /// Words of a row, padded to whole vectors.
    width: usize,
    /// `[panel][dim in words][lane]`.
    columns: &'a mut [f32],
    /// `[dim / lanes][row in words][lanes]`, the last group of dimensions only as wide as needed.
    pub(super) groups: &'a mut [f32],
}

impl RowTensor<'_> {
    /// Takes in the rows of one panel. False when some element is infinite or NaN.
    ///
    /// # Safety
    /// As [`QueryRows::row`].
    #[inline(always)]
    unsafe fn fill_panel<W: Words>(
        &mut self,
        work: &HeadWork,
        from: &QueryRows<'_>,
        rows: Span,
        layout: &Layout,
        panel: usize,
        stage: &mut [f32],
    ) -> bool {
        let (width, lanes) = (self.width, layout.lanes);
        // SAFETY: the caller vouches for the rows. The stage holds `lanes` rows of `width`, as does a panel's columns;
        // both are whole vectors.
        unsafe {
            gather::<W>(work, from, rows, lanes, width, stage);
            let columns = self.columns[panel * lanes * width..][..lanes * width].as_mut_ptr();
            transpose::<W::V>(stage[..lanes * width].as_ptr(), lanes, width, columns);
        }
        let padded = self.dim.next_multiple_of(W::V::LANES);
        let mut across = [0.0; MAX_HEAD_DIM];
        let across = &mut across[..padded];
        let mut finite = true;
        for lane in (0..lanes).step_by(W::PER_WORD) {
            let mut pair = [Row::default(); 2];
            for (n, row) in pair[..W::PER_WORD].iter_mut().enumerate() {
                if lane + n < rows.len() {
                    let (token, head) = work.place(rows.start() + lane + n);
                    // SAFETY: the caller vouches for the rows.
                    *row = unsafe { from.row(token, head) };
                    finite &= row.is_finite();
                }
            }
            W::of_rows(pair[0], pair[1], across);
            let at = (panel * lanes + lane) / W::PER_WORD;
            for first in (0..padded).step_by(lanes) {
                let group = lanes.min(padded - first);
                let to = first * layout.block_rows / W::PER_WORD + at * group;
                self.groups[to..][..group].copy_from_slice(&across[first..][..group]);
            }
        }
        finite
    }
}

impl Program for BackwardChunk<'_> {
    type Output = ();

    #[inline(always)]
    fn run<W: Words, const MR: usize, const NV: usize>(self) {
        let BackwardChunk { work, rows, inputs, keys, dq, mut key_gradients, scratch } = self;
        let layout = Layout::of::<W, MR, NV>(work);
        let Layout { dim, v_dim, lanes, block_rows, width, v_width, padded, v_padded, .. } = layout;
        let pieces = layout.pieces();
        let mut carver = Carver::new(&mut scratch.floats, pieces.iter().map(|len| Carver::room(*len)).sum());
        let [
            q_columns,
            q_groups,
            o_columns,
            o_groups,
            dq_t,
            lse,
            d,
            weights,
            d_scores,
            products,
            stage,
            own_block,
            edge,
        ] = pieces.map(|len| carver.take(len));
        let mut q = RowTensor { dim, width, columns: q_columns, groups: q_groups };
        let mut d_o = RowTensor { dim: v_dim, width: v_width, columns: o_columns, groups: o_groups };
        let scoring = Scoring::of(&work.geometry);

        // SAFETY: no one else holds the head's dK and dV, or this share of them.
        unsafe { key_gradients.clear() }
        for first_row in rows.iter().step_by(block_rows) {
            let own = Span::at(first_row, block_rows.min(rows.end() - first_row));
            let panels = own.len().div_ceil(lanes);
            let panel_rows = |p: usize| Span::at(p * lanes, lanes.min(own.len() - p * lanes));
            scratch.positions.clear();
            scratch.positions.extend(own.iter().map(|row| work.position(row)));
            let mut finite_rows = [true; MAX_PANELS];
            for (p, finite) in finite_rows[..panels].iter_mut().enumerate() {
                let rows = Span::at(own.start() + p * lanes, panel_rows(p).len());
                // SAFETY: rows of a head are split among chunks, so no one writes these now.
                unsafe {
                    *finite = q.fill_panel::<W>(work, &inputs.q, rows, &layout, p, stage);
                    *finite &= d_o.fill_panel::<W>(work, &inputs.d_o, rows, &layout, p, stage);
                }
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
                // Anything that could make more than an ordinary number of a cell that does not count.
                finite_rows[lane / lanes] &= lse[lane] > f32::NEG_INFINITY && d[lane].abs() < f32::MAX / 2.0;
            }
            dq_t.fill(0.0);

            slices_near(&work.slices, work.positions(own), work.kv, &mut scratch.near);
            for block in work.blocks(own).starts() {
                slices_near(&scratch.near, work.positions(own), Span::at(block, BLOCK), &mut scratch.here);
                if scratch.here.is_empty() {
                    continue;
                }
                let mut steps = Steps::default();
                for p in 0..panels {
                    let positions = &scratch.positions[panel_rows(p).range()];
                    if let (Some(first), Some(last)) = (positions.first(), positions.last())
                        && let Some(sight) = sight(&scratch.here, Span::at(*first, last + 1 - first), block)
                    {
                        steps.see(p, sight);
                    }
                }
                let mut block_keys = keys.block::<W, MR>(work, block, own_block);
                let mut finite = true;
                for (p, own_finite) in finite_rows.iter().copied().enumerate().take(panels) {
                    steps.clear_unseen::<W>(p, lanes, weights, d_scores);
                    finite &= own_finite;
                    let Some(sight) = steps.sights[p] else { continue };
                    scratch.bounds.clear();
                    if sight.masked {
                        let positions = &scratch.positions[panel_rows(p).range()];
                        lane_bounds(&scratch.here, lanes, positions, block, &mut scratch.bounds);
                    }
                    // SAFETY: each pointer is the start of the panel's own piece of a buffer carved above, all distinct
                    // but where they are documented to be one; the block holds the keys of `sight`, which the blocks
                    // of these rows cover.
                    unsafe {
                        let cells = p * BLOCK * lanes / W::PER_WORD;
                        let (weights, d_scores) =
                            (weights.as_mut_ptr().add(cells), d_scores.as_mut_ptr().add(cells));
                        let one = W::PER_WORD == 1;
                        let products = products.as_mut_ptr();
                        let panel = Panel {
                            dim,
                            v_dim,
                            scoring,
                            q: q.columns.as_ptr().add(p * lanes * width),
                            d_o: d_o.columns.as_ptr().add(p * lanes * v_width),
                            lse: lse.as_ptr().add(p * lanes),
                            d: d.as_ptr().add(p * lanes),
                            scores: if one { weights } else { products },
                            d_weights: if one { d_scores } else { products.add(BLOCK * lanes) },
                            weights,
                            d_scores,
                            dq: dq_t.as_mut_ptr().add(p * lanes * padded),
                        };
                        if score::<W, MR, NV>(&panel, &block_keys, sight, &scratch.bounds, own_finite) {
                            add_dq::<W, Open, MR, NV>(&panel, &mut block_keys, sight);
                        } else {
                            finite = false;
                            add_dq::<W, GuardLeft, MR, NV>(&panel, &mut block_keys, sight);
                        }
                    }
                }
                // SAFETY: weights and score gradients of all steps' panels were written or cleared above; the gradients
                // hold every key of the block that is there, and no one else holds them.
                unsafe {
                    let [dk, dv] = key_gradients.open(work, block, [padded, v_padded], edge);
                    let sides = [
                        KeySide { cells: weights, rows: &d_o, to: dv.0, to_row: dv.1 },
                        KeySide { cells: d_scores, rows: &q, to: dk.0, to_row: dk.1 },
                    ];
                    if finite {
                        add_keys::<W, Open, MR, NV>(&steps, block_rows, sides);
                    } else {
                        add_keys::<W, GuardRight, MR, NV>(&steps, block_rows, sides);
                    }
                    key_gradients.close(work, block, [padded, v_padded], edge);
                }
            }

            for p in 0..panels {
                // SAFETY: the panel holds `padded` rows of `lanes`, the stage `lanes` rows of `padded`, whole vectors.
                unsafe {
                    let from = dq_t.as_ptr().add(p * lanes * padded);
                    transpose::<W::V>(from, padded, lanes, stage.as_mut_ptr());
                }
                for (lane, row) in panel_rows(p).iter().enumerate() {
                    let (token, head) = work.place(own.start() + row);
                    // SAFETY: rows of a head are split among chunks, so no one else writes this one, and dO in the same
                    // place was taken in; the task's results stay in place until all its chunks are done.
                    let dq = unsafe { dq.row(token, head) };
                    for (dq, sum) in dq.iter_mut().zip(&stage[lane * padded..]) {
                        *dq = sum * work.geometry.scale();
                    }
                }
            }
        }
        // SAFETY: as for clear.
        unsafe { key_gradients.finish(work.geometry.scale()) }
    }
}
