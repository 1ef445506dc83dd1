//! Where everything of a batch lies: operands as they come, sequences as cuDNN takes them, results. Pure.
//!
//! Each kv head of a task becomes one *slab* of rows `[rows, group, dim]` and one of keys `[keys, dim]`; a task that has
//! reversed pieces has reversed slabs as well. Pieces of the head are sequences that point into its slabs, so rows and
//! keys that several pieces read lie there once. Results of each piece lie apart, and are merged afterwards.

use outboard_attention::{Direction, HeadGeometry, Span, Task};

use super::pieces::{Cut, Piece, Shape, pieces};
use super::tables::{KeyHead, MadeUp, Move, PieceSpan, RowHead, RowMove, Tables};
use crate::graph::{Bounds, CallGeometry};
use crate::plan::MAX_SEQUENCES;

/// Rows and keys that a kernel may read beyond the last: it loads whole tiles.
const SLACK: usize = 256;
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

/// Results of a task in the output, in f32 elements: O and LSE, or dQ, dK and dV.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ResultPlace {
    pub(crate) start: usize,
    pub(crate) lens: [usize; 3],
}

/// A piece of one kv head of one task, as a sequence of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) rows: usize,
    pub(crate) keys: usize,
    /// First row among the slabs of rows.
    pub(crate) row: usize,
    /// First key among the slabs of keys.
    pub(crate) key: usize,
    /// First row among the results by row.
    pub(crate) row_result: usize,
    /// First key among the results by key.
    pub(crate) key_result: usize,
}

/// Sequences of one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) shape: Shape,
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
    pub(crate) results: Vec<ResultPlace>,
    /// f32 elements of all results.
    pub(crate) result_len: usize,
    pub(crate) regions: Regions,
    pub(crate) work_bytes: usize,
    pub(crate) calls: Vec<Call>,
    moves: Vec<Move>,
    row_moves: Vec<RowMove>,
    made_up: Vec<MadeUp>,
    row_heads: Vec<RowHead>,
    row_pieces: Vec<PieceSpan>,
    key_heads: Vec<KeyHead>,
    key_pieces: Vec<PieceSpan>,
}

/// Head dims that calls are padded to.
const DIMS: [usize; 4] = [64, 128, 192, 256];

/// The geometry of the calls that compute a task: all but the number of its kv heads.
pub(crate) fn call_geometry(geometry: &HeadGeometry) -> CallGeometry {
    let largest = geometry.head_dim().max(geometry.v_head_dim());
    let dim = DIMS.into_iter().find(|dim| *dim >= largest).unwrap_or(largest.next_multiple_of(64));
    CallGeometry { dtype: geometry.dtype(), group: geometry.group(), dim }
}

/// One head of one task, while it is laid out.
struct Head<'a> {
    task: &'a Task,
    pieces: Vec<Piece>,
}

impl Head<'_> {
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
            results: Vec::with_capacity(tasks.len()),
            result_len: 0,
            regions: Regions::default(),
            work_bytes: 0,
            calls: Vec::new(),
            moves: Vec::new(),
            row_moves: Vec::new(),
            made_up: Vec::new(),
            row_heads: Vec::new(),
            row_pieces: Vec::new(),
            key_heads: Vec::new(),
            key_pieces: Vec::new(),
        };
        for laid in tasks {
            layout.place_operands(laid);
            layout.place_results(laid);
        }
        layout.place_heads(cut, tasks);
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
        self.operands.push(operands);
    }

    fn place_results(&mut self, laid: &LaidTask<'_>) {
        let shapes = laid.task.shapes(laid.geometry);
        let shapes = match self.direction {
            Direction::Forward => [shapes.o, shapes.row, [0; 3]],
            Direction::Backward => [shapes.q, shapes.k, shapes.v],
        };
        let lens = shapes.map(|shape| shape.iter().product::<usize>());
        // Each result starts at a multiple of four elements, for the sake of wide stores.
        let start = self.result_len;
        self.result_len = start + lens.iter().map(|len| len.next_multiple_of(4)).sum::<usize>();
        self.results.push(ResultPlace { start, lens });
    }

    fn place_heads(&mut self, cut: Cut, tasks: &[LaidTask<'_>]) {
        let CallGeometry { group, dim, .. } = self.geometry;
        // What each head has, so that regions can be sized before they are pointed into.
        let mut heads = Vec::new();
        let (mut rows, mut keys) = (0, 0);
        for (index, laid) in tasks.iter().enumerate() {
            for head in laid.task.kv_heads().start()..laid.task.kv_heads().end() {
                let pieces = laid.task.mask().slices_of(head).flat_map(|slice| pieces(slice, cut)).collect();
                let head = Head { task: laid.task, pieces };
                let slabs = (
                    Slab::take(&mut rows, laid.task.q().len(), &head),
                    Slab::take(&mut keys, laid.task.kv().len(), &head),
                );
                heads.push((index, head, slabs));
            }
        }
        let row_results: usize = heads.iter().flat_map(|(_, head, _)| &head.pieces).map(|p| p.q.len()).sum();
        let key_results: usize = heads.iter().flat_map(|(_, head, _)| &head.pieces).map(|p| p.kv.len()).sum();
        self.place_regions([rows, keys, row_results, key_results]);

        let (mut row_result, mut key_result) = (0, 0);
        let mut sequences: Vec<(Shape, Sequence)> = Vec::new();
        let mut head_of_task = 0;
        let mut previous = None;
        for (index, head, (row_slab, key_slab)) in &heads {
            head_of_task = if previous == Some(*index) { head_of_task + 1 } else { 0 };
            previous = Some(*index);
            let laid = &tasks[*index];
            self.move_head(*index, laid, head_of_task, head, (*row_slab, *key_slab));
            let (first_row_piece, first_key_piece) = (self.row_pieces.len(), self.key_pieces.len());
            for piece in &head.pieces {
                let (q, kv) = (head.task.q(), head.task.kv());
                sequences.push((
                    piece.shape,
                    Sequence {
                        rows: piece.q.len(),
                        keys: piece.kv.len(),
                        row: row_slab.place(q, piece.q, piece.reversed),
                        key: key_slab.place(kv, piece.kv, piece.reversed),
                        row_result,
                        key_result,
                    },
                ));
                let span = |all: Span, part: Span, place: usize| PieceSpan {
                    place: place as i64,
                    start: (part.start() - all.start()) as i32,
                    end: (part.end() - all.start()) as i32,
                    reversed: piece.reversed.into(),
                    zero: 0,
                };
                self.row_pieces.push(span(q, piece.q, row_result));
                row_result += piece.q.len();
                if cut.direction == Direction::Backward {
                    self.key_pieces.push(span(kv, piece.kv, key_result));
                    key_result += piece.kv.len();
                }
            }
            let ResultPlace { start, lens } = self.results[*index];
            let starts = [start, start + lens[0].next_multiple_of(4)];
            let pieces = head.pieces.len() as i32;
            let row_dim = match cut.direction {
                Direction::Forward => laid.geometry.v_head_dim(),
                Direction::Backward => laid.geometry.head_dim(),
            };
            self.row_heads.push(RowHead {
                values: starts[0] as i64,
                lse: starts[1] as i64,
                rows: head.task.q().len() as i32,
                heads: (head.task.kv_heads().len() * group) as i32,
                first_head: (head_of_task * group) as i32,
                group: group as i32,
                dim: row_dim as i32,
                padded: dim as i32,
                first_piece: first_row_piece as i32,
                pieces,
            });
            if cut.direction == Direction::Backward {
                self.key_heads.push(KeyHead {
                    dk: starts[1] as i64,
                    dv: (starts[1] + lens[1].next_multiple_of(4)) as i64,
                    keys: head.task.kv().len() as i32,
                    heads: head.task.kv_heads().len() as i32,
                    head: head_of_task as i32,
                    group: group as i32,
                    dim: laid.geometry.head_dim() as i32,
                    v_dim: laid.geometry.v_head_dim() as i32,
                    padded: dim as i32,
                    first_piece: first_key_piece as i32,
                    pieces,
                    zero: 0,
                });
            }
        }
        self.calls = calls(sequences);
    }

    fn place_regions(&mut self, [rows, keys, row_results, key_results]: [usize; 4]) {
        let CallGeometry { group, dim, dtype } = self.geometry;
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

    /// Moves the operands of one head into its slabs.
    fn move_head(
        &mut self,
        index: usize,
        laid: &LaidTask<'_>,
        head_of_task: usize,
        head: &Head<'_>,
        (row_slab, key_slab): (Slab, Slab),
    ) {
        let CallGeometry { group, dim: padded, dtype } = self.geometry;
        let shapes = laid.task.shapes(laid.geometry);
        let operands = self.operands[index];
        let regions = self.regions;
        let size = dtype.bytes();
        for reversed in [false, true] {
            if !head.has(reversed) {
                continue;
            }
            let start = |slab: Slab| if reversed { slab.reversed } else { slab.forward };
            let (row, key) = (start(row_slab), start(key_slab));
            let mut moved =
                |place: Option<OperandPlace>, [rows, heads, dim]: [usize; 3], group, region, first| {
                    if let Some(OperandPlace { start, .. }) = place {
                        self.moves.push(Move {
                            source: (start / size + head_of_task * group * dim) as i64,
                            target: (region / size + first * group * padded) as i64,
                            rows: rows as i32,
                            stride: (heads * dim) as i32,
                            group: group as i32,
                            dim: dim as i32,
                            padded: padded as i32,
                            reversed: reversed.into(),
                        });
                    }
                };
            moved(operands.q, shapes.q, group, regions.q, row);
            moved(operands.k, shapes.k, 1, regions.k, key);
            moved(operands.v, shapes.v, 1, regions.v, key);
            moved(operands.d_o, shapes.o, group, regions.d_o, row);
            let [rows, heads, _] = shapes.row;
            if let Some(OperandPlace { start, .. }) = operands.lse {
                self.row_moves.push(RowMove {
                    source: (start / 4 + head_of_task * group) as i64,
                    target: (regions.lse / 4 + row * group) as i64,
                    rows: rows as i32,
                    stride: heads as i32,
                    group: group as i32,
                    reversed: reversed.into(),
                });
            }
            if let Some(OperandPlace { start, .. }) = operands.d {
                self.made_up.push(MadeUp {
                    d: (start / 4 + head_of_task * group) as i64,
                    d_o: (regions.d_o / size + row * group * padded) as i64,
                    target: (regions.o / size + row * group * padded) as i64,
                    rows: rows as i32,
                    stride: heads as i32,
                    group: group as i32,
                    padded: padded as i32,
                    reversed: reversed.into(),
                    zero: 0,
                });
            }
        }
    }
}

/// Sequences by shape, those with the most keys first: each block of rows runs through all its keys, so whatever starts
/// last should end soon.
fn calls(mut sequences: Vec<(Shape, Sequence)>) -> Vec<Call> {
    sequences.sort_by_key(|(shape, sequence)| (*shape, std::cmp::Reverse(sequence.keys)));
    let of_shape = sequences.chunk_by(|(a, _), (b, _)| a == b);
    of_shape
        .flat_map(|of_shape| of_shape.chunks(MAX_SEQUENCES))
        .map(|chunk| Call { shape: chunk[0].0, sequences: chunk.iter().map(|(_, s)| *s).collect() })
        .collect()
}

impl Call {
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
    pub(crate) kv_offsets: usize,
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
    pub(crate) row_pieces: usize,
    pub(crate) key_heads: MoveTable,
    pub(crate) key_pieces: usize,
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
        let (row_pieces, key_pieces) = (tables.push(&self.row_pieces), tables.push(&self.key_pieces));
        BatchTables { tables, calls, moves, row_moves, made_up, row_heads, row_pieces, key_heads, key_pieces }
    }

    /// Lengths and offsets of a call. Entries beyond its sequences have length zero, and the last offset again.
    fn call_tables(&self, tables: &mut Tables, call: &Call, capacity: usize) -> CallTables {
        let CallGeometry { group, dim, .. } = self.geometry;
        let mut lengths = |len: fn(&Sequence) -> usize| {
            let mut table: Vec<i32> = call.sequences.iter().map(|s| len(s) as i32).collect();
            table.resize(capacity, 0);
            tables.push(&table)
        };
        let (rows, keys) = (lengths(|s| s.rows), lengths(|s| s.keys));
        let mut offsets = |first: &dyn Fn(&Sequence) -> usize, len: fn(&Sequence) -> usize, width: usize| {
            let mut table: Vec<i64> = call.sequences.iter().map(|s| first(s) as i64 * width as i64).collect();
            let end = call.sequences.last().map_or(0, |s| (first(s) + len(s)) as i64 * width as i64);
            table.resize(capacity + 1, end);
            tables.push(&table)
        };
        let forward = self.direction == Direction::Forward;
        CallTables {
            rows,
            keys,
            q_offsets: offsets(&|s| s.row, |s| s.rows, group * dim),
            kv_offsets: offsets(&|s| s.key, |s| s.keys, dim),
            row_offsets: offsets(&|s| s.row_result, |s| s.rows, group * dim),
            // LSE is a result forward, which lies with the results, and an operand backward, which lies with Q.
            lse_offsets: offsets(&|s| if forward { s.row_result } else { s.row }, |s| s.rows, group),
            key_offsets: offsets(&|s| s.key_result, |s| s.keys, dim),
        }
    }
}
