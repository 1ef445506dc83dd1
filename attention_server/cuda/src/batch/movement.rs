//! What the moving kernels are told: which rows and keys to bring where, and what to merge. Pure.

use outboard_attention::{Direction, Span};

use super::heads::HeadOf;
use super::layout::BatchLayout;
use super::places::{LaidTask, OperandPlace, ResultPlace};
use super::tables::{KeyHead, MadeUp, Move, PieceSpan, RowHead, RowMove};
use crate::graph::CallGeometry;

impl BatchLayout {
    /// Says how the results of a head are merged.
    pub(super) fn push_heads(&mut self, of: &HeadOf<'_>, [row_spans, key_spans]: [&[PieceSpan]; 2]) {
        let CallGeometry { group, dim: padded, dtype, .. } = self.geometry;
        let LaidTask { geometry, task } = *of.laid;
        let ResultPlace { starts, narrow, .. } = self.results[of.index];
        let forward = self.direction == Direction::Forward;
        let heads = task.kv_heads().len();
        let row_dim = if forward { geometry.v_head_dim() } else { geometry.head_dim() };
        self.row_heads.push(RowHead {
            values: (starts[0] / if narrow { dtype.bytes() } else { 4 }) as i64,
            lse: (starts[1] / 4) as i64,
            rows: task.q().len() as i32,
            heads: (heads * group) as i32,
            first_head: (of.number * group) as i32,
            group: group as i32,
            dim: row_dim as i32,
            padded: padded as i32,
            first_block: self.row_index.push(task.q().len(), row_spans),
            narrow: narrow.into(),
        });
        if forward {
            return;
        }
        self.key_heads.push(KeyHead {
            dk: (starts[1] / 4) as i64,
            dv: (starts[2] / 4) as i64,
            keys: task.kv().len() as i32,
            heads: heads as i32,
            head: of.number as i32,
            group: group as i32,
            dim: geometry.head_dim() as i32,
            v_dim: geometry.v_head_dim() as i32,
            padded: padded as i32,
            first_block: self.key_index.push(task.kv().len(), key_spans),
        });
    }

    /// Moves the rows at `positions` of one head, of Q and backward of LSE and dO, to row `first` and those after it.
    pub(super) fn move_rows(&mut self, of: &HeadOf<'_>, positions: Span, first: usize, reversed: bool) {
        let CallGeometry { group, dim: padded, dtype, .. } = self.geometry;
        let LaidTask { geometry, task } = *of.laid;
        let shapes = task.shapes(geometry);
        let operands = self.operands[of.index];
        let (regions, size) = (self.regions, dtype.bytes());
        let skipped = positions.start() - task.q().start();
        let rows = positions.len() as i32;
        if let Some(OperandPlace { start, .. }) = operands.q {
            let [_, heads, dim] = shapes.q;
            self.moves.push(Move {
                source: (start / size + (skipped * heads + of.number * group) * dim) as i64,
                target: (regions.q / size + first * group * padded) as i64,
                rows,
                stride: (heads * dim) as i32,
                group: group as i32,
                dim: dim as i32,
                padded: padded as i32,
                reversed: reversed.into(),
            });
        }
        let [_, heads, dim] = shapes.o;
        let row = skipped * heads + of.number * group;
        if let Some(OperandPlace { start, .. }) = operands.lse {
            self.row_moves.push(RowMove {
                source: (start / 4 + row) as i64,
                target: (regions.lse / 4 + first * group) as i64,
                rows,
                stride: heads as i32,
                group: group as i32,
                reversed: reversed.into(),
            });
        }
        if let Some((d, d_o)) = operands.d.zip(operands.d_o) {
            self.made_up.push(MadeUp {
                d: (d.start / 4 + row) as i64,
                d_o: (d_o.start / size + row * dim) as i64,
                moved: (regions.d_o / size + first * group * padded) as i64,
                o: (regions.o / size + first * group * padded) as i64,
                rows,
                stride: heads as i32,
                group: group as i32,
                dim: dim as i32,
                padded: padded as i32,
                reversed: reversed.into(),
            });
        }
    }

    /// Moves all keys and values of one head to key `first` and those after it.
    pub(super) fn move_keys(&mut self, of: &HeadOf<'_>, first: usize, reversed: bool) {
        let CallGeometry { dim: padded, dtype, .. } = self.geometry;
        let shapes = of.laid.task.shapes(of.laid.geometry);
        let operands = self.operands[of.index];
        let (regions, size) = (self.regions, dtype.bytes());
        for (place, [keys, heads, dim], region) in
            [(operands.k, shapes.k, regions.k), (operands.v, shapes.v, regions.v)]
        {
            let Some(OperandPlace { start, .. }) = place else { continue };
            self.moves.push(Move {
                source: (start / size + of.number * dim) as i64,
                target: (region / size + first * padded) as i64,
                rows: keys as i32,
                stride: (heads * dim) as i32,
                group: 1,
                dim: dim as i32,
                padded: padded as i32,
                reversed: reversed.into(),
            });
        }
    }
}

/// A part of the positions `all` as the kernels know it.
pub(super) fn span(all: Span, part: Span, place: usize, reversed: bool) -> PieceSpan {
    let from = |position: usize| (position - all.start()) as i32;
    let (start, end) = (from(part.start()), from(part.end()));
    PieceSpan { place: place as i64, start, end, reversed: reversed.into(), zero: 0 }
}
