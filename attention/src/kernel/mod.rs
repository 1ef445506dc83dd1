//! The CPU kernel: tiled exact attention, forward and backward, over any batch of tasks.
//!
//! A task's bits depend on the task, its element type and the instruction set alone, neither on the batch nor on the
//! threads. Cutting a task by query or kv head changes no bit of O, LSE and dQ, nor does it matter in which parts its
//! keys arrive, since every row meets blocks of keys at fixed positions, in order, in a lane of its own. dK and dV start
//! from zero in every task: rows (position, then query head in the group) are summed in blocks of up to 256, the blocks
//! in order within a chunk, and chunks in order; a head has one chunk, or with 4096 rows and more two to eight of about
//! equal work.
//!
//! f32 and f16 are computed in f32. bf16 is too, but where the instruction set has a dot product of bf16 pairs, and by
//! the portable path, which models it: there weights and score gradients are rounded to bf16 before products.
//!
//! NaN and infinities show in the results of the rows and keys that they meet in a cell that counts, and nowhere else.
//!
//! `README.md` beside this file explains the algorithm and its layouts with a picture, and how to add an instruction set.

// Vectors, raw tiles and rows shared among threads are where this crate needs `unsafe`.
#[allow(unsafe_code)]
mod backward;
mod batch;
mod error;
#[allow(unsafe_code)]
mod forward;
#[allow(unsafe_code)]
mod gradient;
mod isa;
#[allow(unsafe_code)]
mod key_gradients;
mod keys;
#[allow(unsafe_code)]
mod memory;
mod pack;
#[allow(unsafe_code)]
mod peak;
#[allow(unsafe_code)]
mod product;
mod row;
#[allow(unsafe_code)]
mod schedule;
#[allow(unsafe_code)]
mod simd;
#[allow(unsafe_code)]
mod softmax;
mod stream;
#[allow(unsafe_code)]
mod visibility;
#[allow(unsafe_code)]
mod work;

pub use batch::{KernelTask, Operands, QueryInput, Results};
pub use error::KernelError;
pub use isa::{Isa, UnknownIsa};
pub use peak::{clock_loop, peak_loop};
pub use stream::ForwardState;

use std::fmt;
use std::sync::Arc;

use forward::Scratch;
use memory::Pool;
use schedule::{Needs, Schedule, task_needs};

use crate::{DType, Direction, HeadGeometry, Task};

/// Keys are computed in blocks of this many, at multiples of it from the document's first.
pub const KEY_BLOCK: usize = 128;

/// Counts changes that alter bits; part of [`CpuKernel::numerics_id`].
const REVISION: u32 = 2;

/// How to run a [`CpuKernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelConfig {
    /// Instruction set; it must be available on this machine.
    pub isa: Isa,
    /// Threads that compute, at least one. One computes on the caller's thread.
    pub threads: usize,
    /// Bytes of working memory that the kernel may take, besides operands and results; see [`task_workspace`].
    pub workspace_bytes: usize,
}

impl KernelConfig {
    /// Any amount of working memory.
    pub fn new(isa: Isa, threads: usize) -> Self {
        KernelConfig { isa, threads, workspace_bytes: usize::MAX }
    }
}

/// A kernel with its threads' workspaces, which are kept between batches.
pub struct CpuKernel {
    config: KernelConfig,
    /// One for each thread.
    scratch: Vec<Scratch>,
    pool: Pool,
    on_thread: Option<OnThread>,
}

/// See [`CpuKernel::on_thread`].
type OnThread = Arc<dyn Fn(usize) + Send + Sync>;

impl fmt::Debug for CpuKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuKernel").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Bytes of working memory without which a kernel of `threads` threads cannot compute this task. A batch needs at most
/// twice as much as the most demanding of its tasks; with more, more heads are computed at a time. Saturates.
///
/// # Panics
/// When this machine lacks `isa`.
pub fn task_workspace(
    isa: Isa,
    threads: usize,
    geometry: &HeadGeometry,
    direction: Direction,
    task: &Task,
) -> usize {
    let needs = task_needs(isa, geometry, direction, task);
    needs.bytes(threads, needs.heads.min(1))
}

impl CpuKernel {
    /// A kernel of the given configuration.
    ///
    /// # Errors
    /// [`KernelError::NoThreads`], or [`KernelError::IsaUnavailable`] when this machine lacks the instruction set.
    pub fn new(config: KernelConfig) -> Result<Self, KernelError> {
        if config.threads == 0 {
            return Err(KernelError::NoThreads);
        }
        if !config.isa.is_available() {
            return Err(KernelError::IsaUnavailable { isa: config.isa });
        }
        let scratch = (0..config.threads).map(|_| Scratch::default()).collect();
        Ok(CpuKernel { config, scratch, pool: Pool::default(), on_thread: None })
    }

    /// Calls `start(n)` on each thread that computes, other than the caller's, when it starts: there it may be pinned to
    /// a core. `n` counts from one.
    pub fn on_thread(self, start: impl Fn(usize) + Send + Sync + 'static) -> Self {
        CpuKernel { on_thread: Some(Arc::new(start)), ..self }
    }

    /// The configuration.
    pub fn config(&self) -> KernelConfig {
        self.config
    }

    /// Backend, instruction set, element type and kernel revision. Kernels of equal ids give equal bits.
    pub fn numerics_id(&self, dtype: DType) -> String {
        format!("cpu-{}-{dtype}-r{REVISION}", self.config.isa.numerics(dtype))
    }

    /// Bytes of working memory held at the moment.
    pub fn workspace_bytes(&self) -> usize {
        self.pool.bytes() + self.scratch.iter().map(|s| s.floats.bytes()).sum::<usize>()
    }

    /// The state of a forward task whose keys will arrive in stages.
    ///
    /// # Errors
    /// [`KernelError::Invalid`] when the task does not fit the geometry.
    pub fn start(&self, geometry: &HeadGeometry, task: &Task) -> Result<ForwardState, KernelError> {
        task.check(geometry).map_err(|source| KernelError::Invalid { index: 0, source })?;
        Ok(ForwardState::new(self.config.isa, geometry, task))
    }

    /// Computes a batch of tasks in any mix of geometry and direction, and calls `done(index, results)` for each as
    /// soon as it is finished, from whichever thread finished it. A task's bits depend on nothing but the task.
    ///
    /// # Errors
    /// [`KernelError`] when a task is not computable, or the batch needs more working memory than the kernel may take;
    /// then none is computed.
    pub fn run<'a>(
        &mut self,
        batch: Vec<KernelTask<'a>>,
        done: &(dyn Fn(usize, Results) + Sync),
    ) -> Result<(), KernelError> {
        let KernelConfig { isa, threads, workspace_bytes: limit } = self.config;
        for (index, task) in batch.iter().enumerate() {
            task.check(isa, index)?;
        }
        let schedule = Schedule::new((isa, threads), batch, &self.pool, done);
        let needs = schedule.needs();
        let threads = threads.min(schedule.units());
        let Some(rooms) = needs.rooms(threads, limit) else {
            return Err(KernelError::WorkspaceTooSmall {
                needed: needs.bytes(threads, needs.heads.min(1)),
                limit,
            });
        };
        reserve(&mut self.scratch, &self.pool, Reservation { needs, threads, rooms, limit });
        let [own, others @ ..] = &mut self.scratch[..threads] else { return Ok(()) };
        if others.is_empty() {
            schedule.work(own);
            return Ok(());
        }
        let (schedule, on_thread) = (&schedule, &self.on_thread);
        std::thread::scope(|scope| {
            for (n, scratch) in others.iter_mut().enumerate() {
                scope.spawn(move || {
                    if let Some(start) = on_thread {
                        start(n + 1);
                    }
                    schedule.work(scratch);
                });
            }
            schedule.work(own);
        });
        Ok(())
    }
}

/// What a batch is given to work in.
struct Reservation {
    needs: Needs,
    threads: usize,
    rooms: usize,
    limit: usize,
}

/// Makes the workspace fit a batch. What is there is kept, unless it would then be more than the limit.
fn reserve(scratch: &mut [Scratch], pool: &Pool, to: Reservation) {
    let Reservation { needs, threads, rooms, limit } = to;
    let (used, idle) = scratch.split_at_mut(threads);
    let grown = |held: usize, needed: usize| held.max(needed.next_multiple_of(16) * size_of::<f32>());
    let scratches = used.iter().map(|s| grown(s.floats.bytes(), needs.scratch)).sum::<usize>();
    if scratches.saturating_add(grown(pool.largest(), needs.room).saturating_mul(rooms)) > limit {
        used.fill_with(Scratch::default);
        pool.reserve(0, 0);
    }
    idle.fill_with(Scratch::default);
    for scratch in used {
        scratch.floats.grow(needs.scratch);
    }
    pool.reserve(rooms, needs.room);
}
