//! Cutting a batch into units of work and sharing them among threads.
//!
//! What is cut depends on each task alone wherever it shows in the bits, and every unit's result on nothing but the unit,
//! so neither the batch nor the threads show in the bits.
//!
//! Units of a head follow each other. So of all heads that have begun and not ended, only the last to begin can have
//! units that no thread is at, and there are never more such heads than threads. Each takes a room of the workspace. There
//! may be fewer rooms than threads: who begins a head waits for one, which the heads before it need no other thread to
//! give back.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Isa;
use super::backward::{BLOCK_ROWS, BackwardChunk, ChunkLen, RowInputs};
use super::batch::{KernelTask, Operands, QueryInput, Results};
use super::forward::{Carry, CarryLen, ForwardTile, SMALL_TILE_ROWS, Scratch, TILE_ROWS, TileLen, tiles};
use super::key_gradients::{KeyGradients, Partial, finish_keys};
use super::keys::{KeySource, KeyTensors, Pack, PackLen};
use super::memory::{Buffer, Carver, Pool};
use super::simd::dispatch;
use super::stream::{ForwardState, head_carry};
use super::visibility::BLOCK;
use super::work::{Blocks, HeadWork, Output, QueryRows};
use crate::{Direction, HeadGeometry, Span, Task};

/// A backward head is cut into chunks of at least this many rows,
const CHUNK_ROWS: usize = 2048;
/// and into at most so many, since each holds a share of dK and dV until the others are done.
const MAX_CHUNKS: usize = 8;

/// A batch in progress.
pub(super) struct Schedule<'a> {
    isa: Isa,
    tasks: Vec<TaskState<'a>>,
    heads: Vec<HeadState>,
    /// In the order of computation.
    units: Vec<Unit>,
    next: AtomicUsize,
    needs: Needs,
    pool: &'a Pool,
    done: &'a (dyn Fn(usize, Results) + Sync),
}

/// Elements of workspace that a batch takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Of each thread.
    pub(super) scratch: usize,
    /// Of the room of a head in progress.
    pub(super) room: usize,
    /// Heads that take a room.
    pub(super) heads: usize,
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
    Stage { o: Output, lse: Output, carry: Output, stage: Stage },
    Backward { dq: Output, dk: Output, dv: Output },
}

#[derive(Clone, Copy)]
struct Stage {
    resume: bool,
    finish: bool,
}

struct HeadState {
    task: usize,
    work: HeadWork,
    /// All blocks of keys that the head sees.
    blocks: Blocks,
    /// Elements of packed keys; none when the head's only unit packs for itself.
    packed: usize,
    /// Layouts of the chunks' shares of dK and dV, and where in the head's room they start; none for a single chunk.
    partials: Vec<(Partial, usize)>,
    /// Where the running state of each tile starts in the task's, for a stage.
    carries: Vec<usize>,
    /// Elements of the head's room: packed keys, then partials.
    room_len: usize,
    /// Its share of the workspace, from its first unit to its last.
    room: Mutex<Option<Buffer>>,
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

impl Needs {
    /// Bytes for `threads` threads and `rooms` heads in progress. Saturates.
    pub(super) fn bytes(self, threads: usize, rooms: usize) -> usize {
        let elements = self.scratch.saturating_mul(threads).saturating_add(self.room.saturating_mul(rooms));
        elements.saturating_mul(size_of::<f32>())
    }

    /// How many of at most `threads` heads may be in progress in `limit` bytes, `None` when that is too little.
    pub(super) fn rooms(self, threads: usize, limit: usize) -> Option<usize> {
        let rooms = threads.min(self.heads);
        (rooms.min(1)..=rooms).rev().find(|rooms| self.bytes(threads, *rooms) <= limit)
    }

    fn include(&mut self, scratch: usize, room: usize) {
        self.scratch = self.scratch.max(scratch);
        self.room = self.room.max(room);
        self.heads += usize::from(room > 0);
    }
}

impl HeadState {
    /// A head and the units it is cut into.
    fn new(
        isa: Isa,
        task: usize,
        work: HeadWork,
        tile_rows: usize,
        carry: Option<&mut usize>,
    ) -> (Self, Vec<Span>) {
        let all = Span::to(work.rows);
        let blocks = work.blocks(all);
        let (ranges, shared): (Vec<Span>, bool) = match work.direction {
            Direction::Forward => {
                // Stages of a task must agree on its tiles.
                let tile_rows = if carry.is_some() { TILE_ROWS } else { tile_rows };
                let ranges: Vec<_> = tiles(work.rows, tile_rows).collect();
                let shared = ranges.len() > 1;
                (ranges, shared)
            }
            // A chunk goes through its keys once for each block of rows.
            Direction::Backward => (chunks(&work), work.rows > BLOCK_ROWS),
        };
        let dtype = work.geometry.dtype();
        let packed = if shared { dispatch(isa, dtype, PackLen { work: &work, blocks }) } else { 0 };
        let (partials, room_len) = match work.direction {
            Direction::Forward => (Vec::new(), packed),
            Direction::Backward => partials(&work, &ranges, packed),
        };
        let mut carries = Vec::new();
        if let Some(carry) = carry {
            let (len, starts) = head_carry(isa, &work);
            carries.extend(starts.iter().map(|start| *carry + start));
            *carry += len;
        }
        let units_left = AtomicUsize::new(ranges.len());
        let room = Mutex::new(None);
        let head = HeadState { task, work, blocks, packed, partials, carries, room_len, room, units_left };
        (head, ranges)
    }
}

/// What a task without tensors takes at most, in any batch.
pub(super) fn task_needs(isa: Isa, geometry: &HeadGeometry, direction: Direction, task: &Task) -> Needs {
    let mut needs = Needs::default();
    let mut before: Option<HeadWork> = None;
    for kv_head in 0..task.kv_heads().len() {
        let work = HeadWork::new(*geometry, direction, task, task.kv(), kv_head);
        // Heads mostly have one mask, and then one need.
        if before.as_ref().is_some_and(|before| before.slices == work.slices) {
            continue;
        }
        let dtype = geometry.dtype();
        let blocks = work.blocks(Span::to(work.rows));
        let packed = || dispatch(isa, dtype, PackLen { work: &work, blocks });
        match direction {
            Direction::Forward => {
                let rows = Span::to(work.rows.min(TILE_ROWS));
                let scratch = dispatch(isa, dtype, TileLen { work: &work, rows });
                needs.include(scratch, if work.rows > SMALL_TILE_ROWS { packed() } else { 0 });
            }
            Direction::Backward => {
                let scratch = dispatch(isa, dtype, ChunkLen { work: &work });
                let packed = if work.rows > BLOCK_ROWS { packed() } else { 0 };
                let (_, room) = partials(&work, &chunks(&work), packed);
                needs.include(scratch, room);
            }
        }
        before = Some(work);
    }
    needs
}

/// Where the chunks' shares of dK and dV lie in a head's room after its packed keys, and the elements of the room. A
/// single chunk has none.
fn partials(work: &HeadWork, chunks: &[Span], packed: usize) -> (Vec<(Partial, usize)>, usize) {
    let mut partials = Vec::new();
    let mut room = packed;
    if chunks.len() > 1 {
        for rows in chunks {
            let layout = Partial::of(work, *rows);
            let at = Carver::room(room);
            partials.push((layout, at));
            room = at + layout.len();
        }
    }
    (partials, room)
}

/// Elements of scratch that the longest unit of a head takes.
fn scratch_len(isa: Isa, work: &HeadWork, ranges: &[Span]) -> usize {
    let dtype = work.geometry.dtype();
    match (work.direction, ranges.iter().max_by_key(|rows| rows.len())) {
        (_, None) => 0,
        (Direction::Forward, Some(rows)) => dispatch(isa, dtype, TileLen { work, rows: *rows }),
        (Direction::Backward, Some(_)) => dispatch(isa, dtype, ChunkLen { work }),
    }
}

/// Rows of forward tiles: fewer where whole tiles would leave threads without work.
fn tile_rows(batch: &[KernelTask<'_>], threads: usize) -> usize {
    let mut units = 0;
    for KernelTask { geometry, task, operands, .. } in batch {
        let rows = task.q().len() * geometry.group();
        units += task.kv_heads().len()
            * match operands.direction() {
                Direction::Forward => rows.div_ceil(TILE_ROWS),
                Direction::Backward => rows.div_ceil(CHUNK_ROWS),
            };
    }
    if units.is_multiple_of(threads) || units >= 4 * threads { TILE_ROWS } else { SMALL_TILE_ROWS }
}

impl<'a> Schedule<'a> {
    /// Cuts a batch that has been checked for `threads` threads.
    pub(super) fn new(
        (isa, threads): (Isa, usize),
        batch: Vec<KernelTask<'a>>,
        pool: &'a Pool,
        done: &'a (dyn Fn(usize, Results) + Sync),
    ) -> Self {
        let tile_rows = tile_rows(&batch, threads);
        let mut heads = Vec::new();
        let mut tasks = Vec::with_capacity(batch.len());
        let mut costed = Vec::new();
        let mut needs = Needs::default();
        for (index, task) in batch.into_iter().enumerate() {
            let keys = task.keys();
            let KernelTask { geometry, task, operands, mut results } = task;
            let direction = operands.direction();
            let outputs = Outputs::of(task, &geometry, keys, &mut results);
            let mut carried = 0;
            let mut units_left = 0;
            for kv_head in 0..task.kv_heads().len() {
                let work = HeadWork::new(geometry, direction, task, keys, kv_head);
                let carry = matches!(outputs, Outputs::Stage { .. }).then_some(&mut carried);
                let (head, ranges) = HeadState::new(isa, index, work, tile_rows, carry);
                needs.include(scratch_len(isa, &head.work, &ranges), head.room_len);
                units_left += ranges.len();
                let flops = |rows| {
                    let (dim, v_dim) = (geometry.head_dim() as f64, geometry.v_head_dim() as f64);
                    let cells = head.work.cells(rows) as f64;
                    match direction {
                        Direction::Forward => cells * (dim + v_dim),
                        Direction::Backward => cells * (3.0 * dim + 2.0 * v_dim),
                    }
                };
                let head_cost = flops(Span::to(head.work.rows));
                for (place, rows) in ranges.into_iter().enumerate() {
                    costed.push((head_cost, flops(rows), Unit { head: heads.len(), rows, place }));
                }
                heads.push(head);
            }
            let results = Mutex::new(Some(results));
            tasks.push(TaskState { operands, outputs, results, units_left: AtomicUsize::new(units_left) });
        }
        // Longest first, and a head's units together, so that its room is soon free again.
        costed.sort_by(|(head_a, cost_a, a), (head_b, cost_b, b)| {
            (head_b.total_cmp(head_a).then(a.head.cmp(&b.head)))
                .then(cost_b.total_cmp(cost_a))
                .then(a.place.cmp(&b.place))
        });
        let units = costed.into_iter().map(|(_, _, unit)| unit).collect();
        Schedule { isa, tasks, heads, units, next: AtomicUsize::new(0), needs, pool, done }
    }

    pub(super) fn needs(&self) -> Needs {
        self.needs
    }

    /// Number of units: more threads than this have nothing to do.
    pub(super) fn units(&self) -> usize {
        self.units.len()
    }

    /// Computes units until none is left.
    pub(super) fn work(&self, scratch: &mut Scratch) {
        let _guard = AbandonOnPanic(self.pool);
        while let Some(unit) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            let head = &self.heads[unit.head];
            let task = &self.tasks[head.task];
            let Some(room) = self.room(head, task.key_tensors()) else { return };
            self.compute(unit, head, task, room, scratch);
            if head.units_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.finish_head(head, task);
            }
            if task.units_left.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(results) = lock(&task.results).take()
            {
                (self.done)(head.task, task.outputs.finish(results));
            }
        }
    }

    fn compute(
        &self,
        unit: &Unit,
        head: &HeadState,
        task: &TaskState<'_>,
        room: *mut f32,
        scratch: &mut Scratch,
    ) {
        let (isa, dtype) = (self.isa, head.work.geometry.dtype());
        let (work, rows) = (&head.work, unit.rows);
        let tensors = task.key_tensors();
        let keys = match head.packed {
            0 => KeySource::Tensors(tensors),
            len => {
                // SAFETY: the room holds as many elements, packed and not written again until the head's last unit is
                // done.
                let words = unsafe { std::slice::from_raw_parts(room, len) };
                KeySource::Packed { blocks: head.blocks, words }
            }
        };
        match (&task.operands, &task.outputs) {
            (Operands::Forward { q, .. }, Outputs::Forward { o, lse }) => {
                let q = query_rows(q, o);
                dispatch(isa, dtype, ForwardTile { work, rows, q, keys, carry: None, o, lse, scratch });
            }
            (Operands::Stage { q, .. }, Outputs::Stage { o, lse, carry, stage }) => {
                let q = QueryRows::View(*q);
                let Stage { resume, finish } = *stage;
                let len = dispatch(isa, dtype, CarryLen { work, rows });
                let from = head.carries[unit.place];
                // SAFETY: each tile of a task has a part of its own of the state, which stays in place until all are
                // done.
                let state = unsafe { carry.part(from, len) };
                let carry = Some(Carry { state, resume, finish });
                dispatch(isa, dtype, ForwardTile { work, rows, q, keys, carry, o, lse, scratch });
            }
            (Operands::Backward { q, d_o, lse, d, .. }, Outputs::Backward { dq, dk, dv }) => {
                let inputs = RowInputs { q: QueryRows::View(*q), d_o: query_rows(d_o, dq), lse: *lse, d: *d };
                let key_gradients = match head.partials.get(unit.place) {
                    None => KeyGradients::Results { kv: work.kv, kv_head: work.kv_head, dk, dv },
                    Some((layout, at)) => {
                        // SAFETY: the room has a part of its own for each chunk, after the packed keys.
                        let data = unsafe { std::slice::from_raw_parts_mut(room.add(*at), layout.len()) };
                        KeyGradients::Partial { layout: *layout, data }
                    }
                };
                dispatch(isa, dtype, BackwardChunk { work, rows, inputs, keys, dq, key_gradients, scratch });
            }
            _ => unreachable!("the batch was checked"),
        }
    }

    /// The head's room, with its keys packed. Threads that need them while another packs them wait for it. `None` when
    /// another thread has panicked.
    fn room(&self, head: &HeadState, tensors: KeyTensors<'_>) -> Option<*mut f32> {
        if head.room_len == 0 {
            return Some(NonNull::dangling().as_ptr());
        }
        let mut room = lock(&head.room);
        if let Some(room) = &*room {
            return Some(room.address());
        }
        let mut buffer = self.pool.take()?;
        if head.packed > 0 {
            let (work, blocks) = (&head.work, head.blocks);
            let to = &mut buffer.of(head.room_len)[..head.packed];
            dispatch(self.isa, work.geometry.dtype(), Pack { work, tensors, blocks, to });
        }
        Some(room.insert(buffer).address())
    }

    /// What remains when all units of a head are done: sum its shares of dK and dV, free its room.
    fn finish_head(&self, head: &HeadState, task: &TaskState<'_>) {
        let Some(room) = lock(&head.room).take() else { return };
        if let Outputs::Backward { dk, dv, .. } = &task.outputs
            && !head.partials.is_empty()
        {
            // SAFETY: the chunks are done, and the room holds what they left.
            let share = |(layout, at): &(Partial, usize)| unsafe {
                (*layout, std::slice::from_raw_parts(room.address().add(*at).cast_const(), layout.len()))
            };
            let chunks: Vec<_> = head.partials.iter().map(share).collect();
            // SAFETY: the task's results are in place until its last unit is done, and only the last unit of a head
            // comes here, the only one to write the head's rows of dK and dV.
            unsafe { finish_keys(&head.work, &chunks, dk, dv) }
        }
        self.pool.give_back(room);
    }
}

/// Lets the other threads end when one panics, instead of waiting for what it has.
struct AbandonOnPanic<'a>(&'a Pool);

impl Drop for AbandonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abandon();
        }
    }
}

impl<'a> TaskState<'a> {
    fn key_tensors(&self) -> KeyTensors<'a> {
        match &self.operands {
            Operands::Forward { k, v, .. }
            | Operands::Stage { k, v, .. }
            | Operands::Backward { k, v, .. } => KeyTensors { k: *k, v: *v },
        }
    }
}

impl Outputs {
    /// Where the results of a task lie. They must not move until it is done.
    fn of(task: &Task, geometry: &HeadGeometry, keys: Span, results: &mut Results) -> Self {
        let shapes = task.shapes(geometry);
        match results {
            Results::Forward { o, lse } => {
                Outputs::Forward { o: Output::new(o, shapes.o), lse: Output::new(lse, shapes.row) }
            }
            Results::Stage(ForwardState { next, carry, o, lse, .. }) => {
                let finish = keys.end() == task.kv().end();
                let stage = Stage { resume: *next > task.kv().start(), finish };
                *next = keys.end();
                let len = carry.len();
                let carry = Output::new(carry, [1, 1, len]);
                Outputs::Stage {
                    o: Output::new(o, shapes.o),
                    lse: Output::new(lse, shapes.row),
                    carry,
                    stage,
                }
            }
            Results::Backward { dq, dk, dv } => Outputs::Backward {
                dq: Output::new(dq, shapes.q),
                dk: Output::new(dk, shapes.k),
                dv: Output::new(dv, shapes.v),
            },
        }
    }

    /// The results as they are given back.
    fn finish(&self, results: Results) -> Results {
        match (self, results) {
            (Outputs::Stage { stage: Stage { finish: true, .. }, .. }, Results::Stage(state)) => {
                Results::Forward { o: state.o, lse: state.lse }
            }
            (_, results) => results,
        }
    }
}

/// The rows of Q or dO, which may lie in `result`.
fn query_rows<'a>(input: &QueryInput<'a>, result: &'a Output) -> QueryRows<'a> {
    match input {
        QueryInput::View(tensor) => QueryRows::View(*tensor),
        QueryInput::InPlace => QueryRows::InPlace(result),
    }
}

/// Ranges of rows for the backward pass, about equally long to compute. They decide how dK and dV are summed, so they
/// depend on the task alone.
fn chunks(work: &HeadWork) -> Vec<Span> {
    let all = Span::to(work.rows);
    let count = (work.rows / CHUNK_ROWS).clamp(1, MAX_CHUNKS) as u128;
    if count == 1 {
        return vec![all];
    }
    let total = work.cells(all);
    // Fine enough, and few even for rows without end.
    let step = (work.rows / 1024).next_multiple_of(2 * BLOCK).max(2 * BLOCK);
    let mut ranges = Vec::new();
    let (mut start, mut cells) = (0, 0);
    for at in (0..work.rows).step_by(step) {
        let end = (at + step).min(work.rows);
        cells += work.cells(Span::at(at, end - at));
        let cuts = ranges.len() as u128 + 1;
        if cells > 0 && cells * count >= total * cuts && cuts < count && end < work.rows {
            ranges.push(Span::at(start, end - start));
            start = end;
        }
    }
    ranges.push(Span::at(start, work.rows - start));
    ranges
}
