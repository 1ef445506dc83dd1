//! Where everything of a batch lies: operands as they come, sequences as cuDNN takes them, results. Pure.
//!
//! Each kv head of a task becomes one *slab* of keys `[keys, dim]`, and forward one of rows `[rows, group, dim]`; a task
//! that has reversed pieces has reversed slabs as well. Pieces of the head are sequences that point into its slabs, so
//! what several pieces read lies there once. Tensors of tasks that allow it are used in place instead: K and V, and forward
//! Q, O and LSE. Backward, each piece has rows of its own, in whole tiles, since cuDNN writes
//! scratch of whole tiles beside them. Results of each piece lie apart, and are merged afterwards.

use outboard_attention::{Direction, HeadGeometry, Span, Task};

use super::pieces::{Cut, Piece, Shape, pieces};
use super::tables::{KeyHead, MadeUp, Move, PieceSpan, RowHead, RowMove, SpanIndex, Tables};
use crate::graph::{Bounds, CallGeometry};
use crate::plan::MAX_SEQUENCES;

/// Rows and keys that a kernel may read beyond the last: it loads whole tiles.
const SLACK: usize = 256;
/// Rows and keys of a tile. Backward, pieces do not share one.
const TILE: usize = 128;
/// Regions of the work memory start at multiples of this, in bytes.
const REGION: usize = 256;
/// Operands start at multiples of this, in bytes.
const OPERAND: usize = 16;

/// A task to be laid out. All tasks of a batch have one direction, [`CallGeometry`] and scale.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaidTask<'a> {
    pub(crate) geometry: &'a HeadGeometry,
    pub(crate) task: &'a Task,
}

/// An operand of a task among the tensors of a batch: `[tokens, heads, dim]` without gaps, from byte `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OperandPlace {
    pub(crate) start: usize,
    pub(crate) bytes: usize,
}

/// Operands of a task: Q, K, V and backward dO, LSE, D.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TaskOperands {
    pub(crate) q: Option<OperandPlace>,
    pub(crate) k: Option<OperandPlace>,
    pub(crate) v: Option<OperandPlace>,
    pub(crate) d_o: Option<OperandPlace>,
    pub(crate) lse: Option<OperandPlace>,
    pub(crate) d: Option<OperandPlace>,
}

/// Results of a task in the output: O and LSE, or dQ, dK and dV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ResultPlace {
    /// First bytes.
    pub(crate) starts: [usize; 3],
    /// Elements.
    pub(crate) lens: [usize; 3],
    /// True when the first, O, is in the call's element type. All else is f32.
    pub(crate) narrow: bool,
}

/// A piece of one kv head of one task, as a sequence of a call. Offsets count elements: from the memory's start for
/// tensors that are used in place, from the region's otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    /// In Q, and backward in dO and O.
    pub(crate) q: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// In O forward, in dQ backward.
    pub(crate) row_result: usize,
    pub(crate) lse: usize,
    /// In dK and dV, divided by the group.
    pub(crate) key_result: usize,
}

/// Where the tensors of a call lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tensors {
    /// In slabs.
    Slabs,
    /// K and V, and forward Q, O and LSE, in place: among the operands and results, with so many kv heads in each token.
    InPlace(usize),
}

/// Sequences of one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) shape: Shape,
    pub(crate) tensors: Tensors,
    pub(crate) sequences: Vec<Sequence>,
}

/// Regions of the work memory: byte offsets. What a direction has no use for is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) q: usize,
    pub(crate) k: usize,
    pub(crate) v: usize,
    /// A result forward, made up backward.
    pub(crate) o: usize,
    /// A result forward, an operand backward.
    pub(crate) lse: usize,
    pub(crate) d_o: usize,
    pub(crate) d: usize,
    pub(crate) dq: usize,
    /// What dQ is summed in: scratch.
    pub(crate) dq_sums: usize,
    pub(crate) dk: usize,
    pub(crate) dv: usize,
}

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
    moves: Vec<Move>,
    row_moves: Vec<RowMove>,
    made_up: Vec<MadeUp>,
    row_heads: Vec<RowHead>,
    row_index: SpanIndex,
    key_heads: Vec<KeyHead>,
    key_index: SpanIndex,
}

/// Head dims that calls are padded to.
const DIMS: [usize; 4] = [64, 128, 192, 256];

/// The geometry of the calls that compute a task: all but the number of its kv heads.
pub(crate) fn call_geometry(geometry: &HeadGeometry) -> CallGeometry {
    let largest = geometry.head_dim().max(geometry.v_head_dim());
    let dim = DIMS.into_iter().find(|dim| *dim >= largest).unwrap_or(largest.next_multiple_of(64));
    CallGeometry { dtype: geometry.dtype(), group: geometry.group(), dim, heads: 1 }
}

/// One head of one task, while it is laid out.
struct Head<'a> {
    task: &'a Task,
    pieces: Vec<Piece>,
}

/// Which head of which task.
struct HeadOf<'a> {
    index: usize,
    number: usize,
    laid: &'a LaidTask<'a>,
}

/// The heads of a task, in order, and their pieces.
fn heads(cut: Cut, task: &Task) -> Vec<Head<'_>> {
    let of_head = |head| task.mask().slices_of(head).flat_map(|slice| pieces(slice, cut)).collect();
    let all = task.kv_heads().start()..task.kv_heads().end();
    all.map(|head| Head { task, pieces: of_head(head) }).collect()
}

/// Whether the tensors of a task can be used in place: cuDNN then reads the heads of each token where they lie, and forward
/// writes O and LSE where they belong. Depends on the task alone.
fn fits_in_place(cut: Cut, laid: &LaidTask<'_>, heads: &[Head<'_>]) -> bool {
    let LaidTask { geometry, task } = laid;
    let dims = [geometry.head_dim(), geometry.v_head_dim()];
    // Parts of the heads go through slabs: otherwise each number of heads would need plans of its own.
    let whole = task.kv_heads().len() == geometry.kv_heads();
    let straight = heads.iter().all(|head| !head.has(true));
    let rows_once = |head: &Head<'_>| {
        head.has_single_rows() && head.pieces.iter().map(|p| p.q.len()).sum::<usize>() == task.q().len()
    };
    dims == [call_geometry(geometry).dim; 2]
        && whole
        && straight
        && (cut.direction == Direction::Backward || heads.iter().all(rows_once))
}

impl Head<'_> {
    /// True when no row is in more than one piece.
    fn has_single_rows(&self) -> bool {
        let mut spans: Vec<Span> = self.pieces.iter().map(|piece| piece.q).collect();
        spans.sort_by_key(|span| span.start());
        spans.windows(2).all(|pair| pair[0].end() <= pair[1].start())
    }

    fn has(&self, reversed: bool) -> bool {
        self.pieces.iter().any(|piece| piece.reversed == reversed)
    }
}

/// Rows or keys of slabs: where the forward and the reversed one of a head start.
#[derive(Clone, Copy, Default)]
struct Slab {
    forward: usize,
    reversed: usize,
}

impl Slab {
    fn take(next: &mut usize, len: usize, head: &Head<'_>) -> Slab {
        let mut take = |wanted: bool| {
            let start = *next;
            *next += if wanted { len } else { 0 };
            start
        };
        Slab { forward: take(head.has(false)), reversed: take(head.has(true)) }
    }

    fn start(&self, reversed: bool) -> usize {
        if reversed { self.reversed } else { self.forward }
    }

    /// Where `part` of the positions `all` starts, in the order of the slab.
    fn place(&self, all: Span, part: Span, reversed: bool) -> usize {
        match reversed {
            false => self.forward + part.start() - all.start(),
            true => self.reversed + all.end() - part.end(),
        }
    }
}

impl BatchLayout {
    /// Lays out tasks of one direction, call geometry and scale.
    pub(crate) fn new(cut: Cut, geometry: CallGeometry, tasks: &[LaidTask<'_>]) -> BatchLayout {
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
        let heads: Vec<Vec<Head<'_>>> = tasks.iter().map(|laid| heads(cut, laid.task)).collect();
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
        layout
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

    /// Says how the results of a head are merged.
    fn push_heads(&mut self, of: &HeadOf<'_>, [row_spans, key_spans]: [&[PieceSpan]; 2]) {
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

    /// Moves the rows at `positions` of one head to row `first` and those after it.
    fn move_rows(&mut self, of: &HeadOf<'_>, positions: Span, first: usize, reversed: bool) {
        let CallGeometry { group, dim: padded, dtype, .. } = self.geometry;
        let LaidTask { geometry, task } = *of.laid;
        let shapes = task.shapes(geometry);
        let operands = self.operands[of.index];
        let (regions, size) = (self.regions, dtype.bytes());
        let skipped = positions.start() - task.q().start();
        let rows = positions.len() as i32;
        for (place, [_, heads, dim], region) in
            [(operands.q, shapes.q, regions.q), (operands.d_o, shapes.o, regions.d_o)]
        {
            let Some(OperandPlace { start, .. }) = place else { continue };
            self.moves.push(Move {
                source: (start / size + (skipped * heads + of.number * group) * dim) as i64,
                target: (region / size + first * group * padded) as i64,
                rows,
                stride: (heads * dim) as i32,
                group: group as i32,
                dim: dim as i32,
                padded: padded as i32,
                reversed: reversed.into(),
            });
        }
        let [_, heads, _] = shapes.row;
        let source = |start: usize| (start / 4 + skipped * heads + of.number * group) as i64;
        if let Some(OperandPlace { start, .. }) = operands.lse {
            self.row_moves.push(RowMove {
                source: source(start),
                target: (regions.lse / 4 + first * group) as i64,
                rows,
                stride: heads as i32,
                group: group as i32,
                reversed: reversed.into(),
            });
        }
        if let Some(OperandPlace { start, .. }) = operands.d {
            self.made_up.push(MadeUp {
                d: source(start),
                d_o: (regions.d_o / size + first * group * padded) as i64,
                target: (regions.o / size + first * group * padded) as i64,
                rows,
                stride: heads as i32,
                group: group as i32,
                padded: padded as i32,
                reversed: reversed.into(),
                zero: 0,
            });
        }
    }

    /// Moves all keys and values of one head to key `first` and those after it.
    fn move_keys(&mut self, of: &HeadOf<'_>, first: usize, reversed: bool) {
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
fn span(all: Span, part: Span, place: usize, reversed: bool) -> PieceSpan {
    let from = |position: usize| (position - all.start()) as i32;
    let (start, end) = (from(part.start()), from(part.end()));
    PieceSpan { place: place as i64, start, end, reversed: reversed.into(), zero: 0 }
}

/// Sequences by shape and where their tensors lie. Forward, those with the most keys come first: each block of rows runs
/// through all its keys, so whatever starts last should end soon. Backward, offsets ascend.
fn calls(direction: Direction, mut sequences: Vec<((Shape, Tensors), Sequence)>) -> Vec<Call> {
    match direction {
        Direction::Forward => sequences.sort_by_key(|(kind, s)| (*kind, std::cmp::Reverse(s.keys))),
        Direction::Backward => sequences.sort_by_key(|(kind, _)| *kind),
    }
    let of_kind = sequences.chunk_by(|(a, _), (b, _)| a == b);
    of_kind
        .flat_map(|of_kind| of_kind.chunks(MAX_SEQUENCES))
        .map(|chunk| {
            let (shape, tensors) = chunk[0].0;
            Call { shape, tensors, sequences: chunk.iter().map(|(_, s)| *s).collect() }
        })
        .collect()
}

impl Call {
    /// The call's geometry, where that of its batch's slabs is `slabs`.
    pub(crate) fn geometry(&self, slabs: CallGeometry) -> CallGeometry {
        match self.tensors {
            Tensors::Slabs => slabs,
            Tensors::InPlace(heads) => CallGeometry { heads, ..slabs },
        }
    }

    /// What a plan for the call must cover.
    pub(crate) fn bounds(&self) -> Bounds {
        let most = |len: fn(&Sequence) -> usize| self.sequences.iter().map(len).max().unwrap_or(1);
        Bounds { sequences: self.sequences.len(), rows: most(|s| s.rows), keys: most(|s| s.keys) }
    }
}

/// Where the tables of a call lie: byte offsets among the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallTables {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    pub(crate) q_offsets: usize,
    pub(crate) k_offsets: usize,
    pub(crate) v_offsets: usize,
    pub(crate) row_offsets: usize,
    pub(crate) lse_offsets: usize,
    pub(crate) key_offsets: usize,
}

/// A table of the moving kernels: where it lies, its entries, and the most rows of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoveTable {
    pub(crate) start: usize,
    pub(crate) entries: usize,
    pub(crate) rows: usize,
}

/// All tables of a batch.
#[derive(Clone, Debug)]
pub(crate) struct BatchTables {
    pub(crate) tables: Tables,
    pub(crate) calls: Vec<CallTables>,
    pub(crate) moves: MoveTable,
    pub(crate) row_moves: MoveTable,
    pub(crate) made_up: MoveTable,
    pub(crate) row_heads: MoveTable,
    /// Starts and spans of the index by row.
    pub(crate) row_index: [usize; 2],
    pub(crate) key_heads: MoveTable,
    /// The same by key.
    pub(crate) key_index: [usize; 2],
}

impl BatchLayout {
    /// The tables, for plans that take so many sequences each: `capacities` has one for each call.
    pub(crate) fn tables(&self, capacities: &[usize]) -> BatchTables {
        let mut tables = Tables::default();
        let calls = self
            .calls
            .iter()
            .zip(capacities)
            .map(|(call, &capacity)| self.call_tables(&mut tables, call, capacity))
            .collect();
        macro_rules! table {
            ($field:ident, $rows:ident) => {
                MoveTable {
                    start: tables.push(&self.$field),
                    entries: self.$field.len(),
                    rows: self.$field.iter().map(|entry| entry.$rows as usize).max().unwrap_or(0),
                }
            };
        }
        let moves = table!(moves, rows);
        let row_moves = table!(row_moves, rows);
        let made_up = table!(made_up, rows);
        let row_heads = table!(row_heads, rows);
        let key_heads = table!(key_heads, keys);
        let mut index = |index: &SpanIndex| [tables.push(&index.starts), tables.push(&index.spans)];
        let (row_index, key_index) = (index(&self.row_index), index(&self.key_index));
        BatchTables { tables, calls, moves, row_moves, made_up, row_heads, row_index, key_heads, key_index }
    }

    /// Lengths and offsets of a call. Entries beyond its sequences have length zero, and the last offset again.
    fn call_tables(&self, tables: &mut Tables, call: &Call, capacity: usize) -> CallTables {
        let mut lengths = |len: fn(&Sequence) -> usize| {
            let mut table: Vec<i32> = call.sequences.iter().map(|s| len(s) as i32).collect();
            table.resize(capacity, 0);
            tables.push(&table)
        };
        let (rows, keys) = (lengths(|s| s.rows), lengths(|s| s.keys));
        let mut offsets = |first: fn(&Sequence) -> usize| {
            let mut table: Vec<i64> = call.sequences.iter().map(|s| first(s) as i64).collect();
            table.resize(capacity + 1, table.last().copied().unwrap_or(0));
            tables.push(&table)
        };
        CallTables {
            rows,
            keys,
            q_offsets: offsets(|s| s.q),
            k_offsets: offsets(|s| s.k),
            v_offsets: offsets(|s| s.v),
            row_offsets: offsets(|s| s.row_result),
            lse_offsets: offsets(|s| s.lse),
            key_offsets: offsets(|s| s.key_result),
        }
    }
}
