//! Cutting a batch into units of work and sharing them among threads.
//!
//! What is cut depends on each task alone, and every unit's result on nothing but the unit, so neither the batch nor
//! the threads show in the bits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backward::{self, BackwardChunk, BackwardPack, Partial, RowInputs, finish_keys};
use super::batch::{KernelTask, Operands, Results};
use super::dispatch::dispatch;
use super::forward::{self, ForwardPack, ForwardTile, Scratch, TILE_ROWS};
use super::memory::{Buffer, Pool};
use super::work::{Blocks, HeadWork, Output};
use super::{Isa, visibility::BLOCK};
use crate::Span;

/// Rows of a forward tile are a multiple of this where there are enough.
const ROW_STEP: usize = 64;
/// A backward head is cut into chunks of at least this many rows,
const CHUNK_ROWS: usize = 2048;
/// and into at most so many, since each holds a share of dK and dV until the others are done.
const MAX_CHUNKS: usize = 4;

/// A batch in progress.
pub(super) struct Schedule<'a> {
    isa: Isa,
    tasks: Vec<TaskState<'a>>,
    heads: Vec<HeadState>,
    /// In the order of computation.
    units: Vec<Unit>,
    next: AtomicUsize,
    pool: &'a Pool,
    done: &'a (dyn Fn(usize, Results) + Sync),
}

struct TaskState<'a> {
    operands: Operands<'a>,
    outputs: Outputs,
    /// Owns what `outputs` points into; taken when the last unit is done.
    results: Mutex<Option<Results>>,
    units_left: AtomicUsize,
}

enum Outputs {
    Forward { o: Output, lse: Output },
    Backward { dq: Output, dk: Output, dv: Output },
}

struct HeadState {
    task: usize,
    work: HeadWork,
    /// All blocks of keys that the head sees.
    blocks: Blocks,
    /// K and V, packed by whichever unit comes first.
    packed: Mutex<Option<Arc<Buffer>>>,
    /// Shares of dK and dV of the chunks that are done, by chunk.
    partials: Mutex<Vec<Option<(Partial, Buffer)>>>,
    units_left: AtomicUsize,
}

/// A range of rows of one head.
struct Unit {
    head: usize,
    rows: Span,
    /// Its place among the units of the head.
    place: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Schedule<'a> {
    /// Cuts a batch that has been checked.
    pub(super) fn new(
        isa: Isa,
        batch: Vec<KernelTask<'a>>,
        pool: &'a Pool,
        done: &'a (dyn Fn(usize, Results) + Sync),
    ) -> Self {
        let mut heads = Vec::new();
        let mut tasks = Vec::with_capacity(batch.len());
        let mut costed = Vec::new();
        for (index, KernelTask { geometry, task, operands, mut results }) in batch.into_iter().enumerate() {
            let shapes = task.shapes(&geometry);
            let outputs = match &mut results {
                Results::Forward { o, lse } => {
                    Outputs::Forward { o: Output::new(o, shapes.o), lse: Output::new(lse, shapes.row) }
                }
                Results::Backward { dq, dk, dv } => Outputs::Backward {
                    dq: Output::new(dq, shapes.q),
                    dk: Output::new(dk, shapes.k),
                    dv: Output::new(dv, shapes.v),
                },
            };
            let mut units_left = 0;
            for kv_head in 0..task.kv_heads().len() {
                let work = HeadWork::new(geometry, task, kv_head);
                let all = Span::to(work.rows);
                let ranges = match outputs {
                    Outputs::Forward { .. } => tiles(&work),
                    Outputs::Backward { .. } => chunks(&work),
                };
                units_left += ranges.len();
                let width = (geometry.head_dim() + geometry.v_head_dim()) as u64;
                let cost = |rows| {
                    work.cells(rows) * width * if matches!(outputs, Outputs::Forward { .. }) { 2 } else { 5 }
                };
                let head = heads.len();
                let head_cost = cost(all);
                let units = ranges.iter().enumerate().map(|(place, rows)| Unit { head, rows: *rows, place });
                costed.extend(units.map(|unit| (head_cost, cost(unit.rows), unit)));
                heads.push(HeadState {
                    task: index,
                    blocks: work.blocks(all),
                    work,
                    packed: Mutex::new(None),
                    partials: Mutex::new(ranges.iter().map(|_| None).collect()),
                    units_left: AtomicUsize::new(ranges.len()),
                });
            }
            let results = Mutex::new(Some(results));
            tasks.push(TaskState { operands, outputs, results, units_left: AtomicUsize::new(units_left) });
        }
        // Longest first, and a head's units together, so that its packed K and V are soon free again.
        costed.sort_by_key(|(head_cost, cost, unit)| {
            (std::cmp::Reverse(*head_cost), unit.head, std::cmp::Reverse(*cost), unit.place)
        });
        let units = costed.into_iter().map(|(_, _, unit)| unit).collect();
        Schedule { isa, tasks, heads, units, next: AtomicUsize::new(0), pool, done }
    }

    /// Computes units until none is left.
    pub(super) fn work(&self, scratch: &mut Scratch) {
        while let Some(unit) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let head = &self.heads[unit.head];
            let task = &self.tasks[head.task];
            self.compute(unit, head, task, scratch);
            if task.units_left.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(results) = lock(&task.results).take()
            {
                (self.done)(head.task, results);
            }
        }
    }

    fn compute(&self, unit: &Unit, head: &HeadState, task: &TaskState<'_>, scratch: &mut Scratch) {
        let packed = self.packed(head, task);
        let (work, rows, blocks) = (&head.work, unit.rows, head.blocks);
        match (&task.operands, &task.outputs) {
            (Operands::Forward { q, .. }, Outputs::Forward { o, lse }) => {
                let packed = packed.as_slice();
                dispatch(self.isa, ForwardTile { work, rows, q: *q, packed, blocks, o, lse, scratch });
            }
            (&Operands::Backward { q, d_o, lse, d, .. }, Outputs::Backward { dq, .. }) => {
                let layout = Partial::of(work, rows);
                let mut partial = self.pool.take(layout.len());
                let inputs = RowInputs { q, d_o, lse, d };
                let (packed, to) = (packed.as_slice(), partial.of(layout.len()));
                dispatch(
                    self.isa,
                    BackwardChunk { work, rows, inputs, packed, blocks, dq, partial: to, scratch },
                );
                lock(&head.partials)[unit.place] = Some((layout, partial));
            }
            _ => unreachable!("the batch was checked"),
        }
        drop(packed);
        if head.units_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish_head(head, task);
        }
    }

    /// The head's K and V. Threads that need them while another packs them wait for it.
    fn packed(&self, head: &HeadState, task: &TaskState<'_>) -> Arc<Buffer> {
        let mut packed = lock(&head.packed);
        if let Some(packed) = &*packed {
            return packed.clone();
        }
        let (work, blocks) = (&head.work, head.blocks);
        let buffer = match task.operands {
            Operands::Forward { k, v, .. } => {
                let len = blocks.count() * forward::packed_block_len(work);
                let mut buffer = self.pool.take(len);
                dispatch(self.isa, ForwardPack { work, k, v, blocks, to: &mut buffer.of(len)[..len] });
                buffer
            }
            Operands::Backward { k, v, .. } => {
                let len = blocks.count() * backward::packed_block_len(work);
                let mut buffer = self.pool.take(len);
                dispatch(self.isa, BackwardPack { work, k, v, blocks, to: &mut buffer.of(len)[..len] });
                buffer
            }
        };
        packed.insert(Arc::new(buffer)).clone()
    }

    /// What remains when all units of a head are done: sum its shares of dK and dV, free its buffers.
    fn finish_head(&self, head: &HeadState, task: &TaskState<'_>) {
        if let Some(buffer) = lock(&head.packed).take().and_then(Arc::into_inner) {
            self.pool.give_back(buffer);
        }
        if let Outputs::Backward { dk, dv, .. } = &task.outputs {
            let partials = std::mem::take(&mut *lock(&head.partials));
            let chunks: Vec<_> =
                partials.iter().flatten().map(|(layout, p)| (*layout, p.as_slice())).collect();
            // SAFETY: the task's results are in place until its last unit is done, and only the last unit of a head
            // comes here, the only one to write the head's rows of dK and dV.
            unsafe { finish_keys(&head.work, &chunks, dk, dv) }
            for (_, buffer) in partials.into_iter().flatten() {
                self.pool.give_back(buffer);
            }
        }
    }
}

/// Ranges of rows for the forward pass: where they are cut shows in no bit.
fn tiles(work: &HeadWork) -> Vec<Span> {
    let count = work.rows.div_ceil(TILE_ROWS);
    let len = work.rows.div_ceil(count).next_multiple_of(ROW_STEP);
    (0..work.rows).step_by(len).map(|at| Span::at(at, len.min(work.rows - at))).collect()
}

/// Ranges of rows for the backward pass, about equally long to compute. They decide how dK and dV are summed, so they
/// depend on the task alone.
fn chunks(work: &HeadWork) -> Vec<Span> {
    let count = (work.rows / CHUNK_ROWS).clamp(1, MAX_CHUNKS) as u64;
    let total = work.cells(Span::to(work.rows));
    let step = 2 * BLOCK;
    let mut ranges = Vec::new();
    let (mut start, mut cells) = (0, 0);
    for at in (0..work.rows).step_by(step) {
        let end = (at + step).min(work.rows);
        cells += work.cells(Span::at(at, end - at));
        let cut = cells * count >= total * (ranges.len() as u64 + 1) && ranges.len() as u64 + 1 < count;
        if cut && end < work.rows {
            ranges.push(Span::at(start, end - start));
            start = end;
        }
    }
    ranges.push(Span::at(start, work.rows - start));
    ranges
}
