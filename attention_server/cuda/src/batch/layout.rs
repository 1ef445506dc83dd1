//! Where everything of a batch lies: operands as they come, sequences as cuDNN takes them, results. Pure.
//!
//! Each kv head of a task becomes one *slab* of keys `[keys, dim]`, and forward one of rows `[rows, group, dim]`; a task
//! that has reversed pieces has reversed slabs as well. Pieces of the head are sequences that point into its slabs, so
//! what several pieces read lies there once. Tensors of tasks that allow it are used in place instead: K and V, and forward
//! Q, O and LSE. Backward, each piece has rows of its own, in whole tiles: where pieces shared them results were wrong,
//! as if cuDNN wrote scratch of whole tiles. Results of each piece lie apart, and are merged afterwards.

use outboard_attention::Direction;

use super::heads::{Head, HeadOf, Slab, fits_in_place, heads};
use super::movement::span;
use super::pieces::{Cut, Piece, Shape};
use super::places::{
    Call, LaidTask, OperandPlace, Regions, ResultPlace, Sequence, TaskOperands, Tensors, calls,
};
use super::tables::{KeyHead, MadeUp, Move, RowHead, RowMove, SpanIndex};
use crate::graph::CallGeometry;

/// Rows and keys that a kernel may read beyond the last: it loads whole tiles.
const SLACK: usize = 256;
/// Rows and keys of a tile. Backward, pieces do not share one.
const TILE: usize = 128;
/// Regions of the work memory start at multiples of this, in bytes.
const REGION: usize = 256;
/// Operands start at multiples of this, in bytes.
const OPERAND: usize = 16;

/// A batch, laid out.
#[derive(Clone, Debug)]
pub(crate) struct BatchLayout {
    pub(crate) direction: Direction,
    pub(crate) geometry: CallGeometry,
    pub(crate) operands: Vec<TaskOperands>,
    pub(crate) operand_bytes: usize,
    /// Bytes after the operands that a kernel may read.
    pub(crate) operand_slack: usize,
    pub(crate) results: Vec<ResultPlace>,
    pub(crate) result_bytes: usize,
    pub(crate) regions: Regions,
    pub(crate) work_bytes: usize,
    pub(crate) calls: Vec<Call>,
    pub(super) moves: Vec<Move>,
    pub(super) row_moves: Vec<RowMove>,
    pub(super) made_up: Vec<MadeUp>,
    pub(super) row_heads: Vec<RowHead>,
    pub(super) row_index: SpanIndex,
    pub(super) key_heads: Vec<KeyHead>,
    pub(super) key_index: SpanIndex,
}

impl BatchLayout {
    /// Lays out tasks of one direction, call geometry and scale.
    ///
    /// # Errors
    /// The index of a task that is cut into more than [`MAX_PIECES`](super::MAX_PIECES).
    pub(crate) fn new(
        cut: Cut,
        geometry: CallGeometry,
        tasks: &[LaidTask<'_>],
    ) -> Result<BatchLayout, usize> {
        let mut layout = BatchLayout {
            direction: cut.direction,
            geometry,
            operands: Vec::with_capacity(tasks.len()),
            operand_bytes: 0,
            operand_slack: 0,
            results: Vec::with_capacity(tasks.len()),
            result_bytes: 0,
            regions: Regions::default(),
            work_bytes: 0,
            calls: Vec::new(),
            moves: Vec::new(),
            row_moves: Vec::new(),
            made_up: Vec::new(),
            row_heads: Vec::new(),
            row_index: SpanIndex::default(),
            key_heads: Vec::new(),
            key_index: SpanIndex::default(),
        };
        let heads = tasks.iter().enumerate().map(|(index, laid)| heads(cut, laid.task).ok_or(index));
        let heads: Vec<Vec<Head<'_>>> = heads.collect::<Result<_, _>>()?;
        let in_place: Vec<bool> = tasks
            .iter()
            .zip(&heads)
            .map(|(laid, heads)| cut.in_place && fits_in_place(cut, laid, heads))
            .collect();
        for (laid, heads) in tasks.iter().zip(&heads) {
            layout.place_operands(laid);
            layout.place_results(laid, heads);
        }
        layout.place_heads(tasks, &heads, &in_place);
        Ok(layout)
    }

    fn place_operands(&mut self, laid: &LaidTask<'_>) {
        let shapes = laid.task.shapes(laid.geometry);
        let size = self.geometry.dtype.bytes();
        let next = &mut self.operand_bytes;
        let mut place = |shape: [usize; 3], size: usize| {
            let start = next.next_multiple_of(OPERAND);
            let bytes = shape.iter().product::<usize>() * size;
            *next = start + bytes;
            Some(OperandPlace { start, bytes })
        };
        let mut operands = TaskOperands {
            q: place(shapes.q, size),
            k: place(shapes.k, size),
            v: place(shapes.v, size),
            ..TaskOperands::default()
        };
        if self.direction == Direction::Backward {
            operands.d_o = place(shapes.o, size);
            operands.lse = place(shapes.row, 4);
            operands.d = place(shapes.row, 4);
        }
        let token = |[_, heads, dim]: [usize; 3]| heads * dim * size;
        let widest = [shapes.q, shapes.k, shapes.v].map(token).into_iter().max().unwrap_or(0);
        self.operand_slack = self.operand_slack.max(SLACK * widest);
        self.operands.push(operands);
    }

    fn place_results(&mut self, laid: &LaidTask<'_>, heads: &[Head<'_>]) {
        let shapes = laid.task.shapes(laid.geometry);
        let shapes = match self.direction {
            Direction::Forward => [shapes.o, shapes.row, [0; 3]],
            Direction::Backward => [shapes.q, shapes.k, shapes.v],
        };
        let lens = shapes.map(|shape| shape.iter().product::<usize>());
        let narrow = self.direction == Direction::Forward && heads.iter().all(Head::has_single_rows);
        let sizes = [if narrow { self.geometry.dtype.bytes() } else { 4 }, 4, 4];
        let mut starts = [0; 3];
        for ((start, len), size) in starts.iter_mut().zip(lens).zip(sizes) {
            *start = self.result_bytes.next_multiple_of(OPERAND);
            self.result_bytes = *start + len * size;
        }
        self.results.push(ResultPlace { starts, lens, narrow });
    }

    fn place_heads(&mut self, tasks: &[LaidTask<'_>], heads: &[Vec<Head<'_>>], in_place: &[bool]) {
        let forward = self.direction == Direction::Forward;
        // Slabs first, so that regions can be sized before they are pointed into.
        let (mut rows, mut keys, mut row_results, mut key_results) = (0, 0, 0, 0);
        let mut slabs = Vec::new();
        for (heads, in_place) in heads.iter().zip(in_place) {
            for head in heads {
                let slab = |next: &mut usize, len: usize, wanted: bool| match wanted {
                    true => Slab::take(next, len, head),
                    false => Slab::default(),
                };
                let row_slab = slab(&mut rows, head.task.q().len(), forward && !in_place);
                slabs.push((row_slab, slab(&mut keys, head.task.kv().len(), !in_place)));
                for piece in &head.pieces {
                    row_results += if forward && *in_place { 0 } else { self.room(piece.q.len()) };
                    key_results += if forward { 0 } else { self.room(piece.kv.len()) };
                }
            }
        }
        let rows = if forward { rows } else { row_results };
        self.place_regions([rows, keys, row_results, key_results]);

        let CallGeometry { group, dim, .. } = self.geometry;
        let (mut row_result, mut key_result) = (0, 0);
        let mut sequences: Vec<((Shape, Tensors), Sequence)> = Vec::new();
        let mut slabs = slabs.into_iter();
        for (index, ((laid, heads), &in_place)) in tasks.iter().zip(heads).zip(in_place).enumerate() {
            let kv_heads = laid.task.kv_heads().len();
            let tensors = if in_place { Tensors::InPlace(kv_heads) } else { Tensors::Slabs };
            for (number, head) in heads.iter().enumerate() {
                let (row_slab, key_slab) = slabs.next().unwrap_or_default();
                let of = HeadOf { index, number, laid };
                let (q, kv) = (head.task.q(), head.task.kv());
                let (mut row_spans, mut key_spans) = (Vec::new(), Vec::new());
                for reversed in [false, true].into_iter().filter(|reversed| !in_place && head.has(*reversed))
                {
                    if forward {
                        self.move_rows(&of, q, row_slab.start(reversed), reversed);
                    }
                    self.move_keys(&of, key_slab.start(reversed), reversed);
                }
                for piece in &head.pieces {
                    let (rows, keys) = (piece.q.len(), piece.kv.len());
                    let row = match forward {
                        true => row_slab.place(q, piece.q, piece.reversed),
                        false => row_result,
                    };
                    let key = key_slab.place(kv, piece.kv, piece.reversed);
                    let mut sequence = Sequence {
                        rows,
                        keys,
                        q: row * group * dim,
                        k: key * dim,
                        v: key * dim,
                        row_result: row_result * group * dim,
                        lse: if forward { row_result } else { row } * group,
                        key_result: key_result * dim,
                    };
                    if in_place {
                        self.point_into_tensors(&of, piece, &mut sequence);
                    }
                    if !forward {
                        self.move_rows(&of, piece.q, row, piece.reversed);
                    }
                    sequences.push(((piece.shape, tensors), sequence));
                    if !(forward && in_place) {
                        row_spans.push(span(q, piece.q, row_result, piece.reversed));
                        row_result += self.room(rows);
                    }
                    if !forward {
                        key_spans.push(span(kv, piece.kv, key_result, piece.reversed));
                        key_result += self.room(keys);
                    }
                }
                if !(forward && in_place) {
                    self.push_heads(&of, [&row_spans, &key_spans]);
                }
            }
        }
        self.calls = calls(self.direction, sequences);
    }

    /// Lets a sequence point into the task's own tensors.
    fn point_into_tensors(&self, of: &HeadOf<'_>, piece: &Piece, sequence: &mut Sequence) {
        let CallGeometry { group, dim, dtype, .. } = self.geometry;
        let (operands, size) = (self.operands[of.index], dtype.bytes());
        let heads = of.laid.task.kv_heads().len();
        let key = piece.kv.start() - of.laid.task.kv().start();
        let row = piece.q.start() - of.laid.task.q().start();
        let at = |start: usize, token: usize, width: usize| start + (token * heads + of.number) * width;
        let place = |place: Option<OperandPlace>| place.map_or(0, |place| place.start / size);
        sequence.k = at(place(operands.k), key, dim);
        sequence.v = at(place(operands.v), key, dim);
        if self.direction == Direction::Forward {
            let ResultPlace { starts, .. } = self.results[of.index];
            sequence.q = at(place(operands.q), row, group * dim);
            sequence.row_result = at(starts[0] / size, row, group * dim);
            sequence.lse = at(starts[1] / 4, row, group);
        }
    }

    /// Rows, or keys, that so many of a piece take.
    fn room(&self, len: usize) -> usize {
        match self.direction {
            Direction::Forward => len,
            Direction::Backward => len.next_multiple_of(TILE),
        }
    }

    fn place_regions(&mut self, [rows, keys, row_results, key_results]: [usize; 4]) {
        let CallGeometry { group, dim, dtype, .. } = self.geometry;
        let mut next = 0;
        let mut take = |tokens: usize, heads: usize, dim: usize, size: usize| {
            let start = next;
            next = (start + (tokens + SLACK) * heads * dim * size).next_multiple_of(REGION);
            start
        };
        let io = dtype.bytes();
        let (q, k, v) = (take(rows, group, dim, io), take(keys, 1, dim, io), take(keys, 1, dim, io));
        self.regions = match self.direction {
            Direction::Forward => Regions {
                q,
                k,
                v,
                o: take(row_results, group, dim, io),
                lse: take(row_results, group, 1, 4),
                ..Regions::default()
            },
            Direction::Backward => Regions {
                q,
                k,
                v,
                o: take(rows, group, dim, io),
                lse: take(rows, group, 1, 4),
                d_o: take(rows, group, dim, io),
                d: take(rows, group, 1, 4),
                dq: take(row_results, group, dim, io),
                dq_sums: take(row_results, group, dim, 4),
                dk: take(key_results, group, dim, io),
                dv: take(key_results, group, dim, io),
            },
        };
        self.work_bytes = next;
    }
}
