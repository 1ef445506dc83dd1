//! The CPU kernel: tiled attention in f32, forward and backward, over any batch of tasks.
//!
//! A task's bits depend on the task and the instruction set alone, neither on the batch nor on the threads. Cutting a
//! task by query or kv head changes no bit of O, LSE and dQ, since every row meets blocks of keys at fixed positions,
//! in order, in a lane of its own. dK and dV start from zero in every task: rows (position, then query head in the
//! group) are summed in blocks of up to 256, the blocks in order within a chunk, and chunks in order; a head has one
//! chunk, or with 4096 rows and more two to four of about equal work.
//!
//! NaN and infinities run through the arithmetic like other values. A cell that the mask leaves out has a weight of
//! zero, so a non-finite V, K or dO may show in rows of the same task that do not see it.

// Vectors, raw tiles and rows shared among threads are where this crate needs `unsafe`.
#[allow(unsafe_code)]
mod backward;
mod batch;
#[allow(unsafe_code)]
mod dispatch;
mod error;
#[allow(unsafe_code)]
mod forward;
mod isa;
#[allow(unsafe_code)]
mod memory;
#[allow(unsafe_code)]
mod pack;
#[allow(unsafe_code)]
mod peak;
#[allow(unsafe_code)]
mod product;
#[allow(unsafe_code)]
mod schedule;
#[allow(unsafe_code)]
mod vector;
#[allow(unsafe_code)]
mod visibility;
#[allow(unsafe_code)]
mod work;
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86;

pub use batch::{KernelTask, Operands, Results};
pub use error::KernelError;
pub use isa::{Isa, UnknownIsa};
pub use peak::fma_loop;

use forward::Scratch;
use memory::Pool;
use schedule::Schedule;

/// Counts changes that alter bits; part of [`CpuKernel::numerics_id`].
const REVISION: u32 = 1;

/// How to run a [`CpuKernel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelConfig {
    /// Instruction set; it must be available on this machine.
    pub isa: Isa,
    /// Threads that compute, at least one. One computes on the caller's thread.
    pub threads: usize,
}

/// A kernel with its threads' workspaces, which are kept between batches.
#[derive(Debug)]
pub struct CpuKernel {
    config: KernelConfig,
    /// One for each thread.
    scratch: Vec<Scratch>,
    pool: Pool,
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
        Ok(CpuKernel { config, scratch, pool: Pool::default() })
    }

    /// The configuration.
    pub fn config(&self) -> KernelConfig {
        self.config
    }

    /// Backend, instruction set, element type and kernel revision. Kernels of equal ids give equal bits.
    pub fn numerics_id(&self) -> String {
        format!("cpu-{}-f32-r{REVISION}", self.config.isa)
    }

    /// Computes a batch of tasks in any mix of geometry and direction, and calls `done(index, results)` for each as
    /// soon as it is finished, from whichever thread finished it. A task's bits depend on nothing but the task.
    ///
    /// # Errors
    /// [`KernelError`] when a task is not computable; then none is computed.
    pub fn run<'a>(
        &mut self,
        batch: Vec<KernelTask<'a>>,
        done: &(dyn Fn(usize, Results) + Sync),
    ) -> Result<(), KernelError> {
        for (index, task) in batch.iter().enumerate() {
            task.check(index)?;
        }
        let schedule = Schedule::new(self.config.isa, batch, &self.pool, done);
        let [own, others @ ..] = self.scratch.as_mut_slice() else { return Ok(()) };
        if others.is_empty() {
            schedule.work(own);
            return Ok(());
        }
        std::thread::scope(|scope| {
            for scratch in others {
                let schedule = &schedule;
                scope.spawn(move || schedule.work(scratch));
            }
            schedule.work(own);
        });
        Ok(())
    }
}
