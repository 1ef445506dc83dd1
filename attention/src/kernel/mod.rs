//! The CPU kernel: tiled attention in f32, forward and backward, over any batch of tasks.

mod batch;
mod error;
mod isa;

pub use batch::{KernelTask, Operands, Results};
pub use error::KernelError;
pub use isa::{Isa, UnknownIsa};

use crate::reference;

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
        Ok(CpuKernel { config })
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
        for (index, work) in batch.into_iter().enumerate() {
            let invalid = |source| KernelError::Invalid { index, source };
            let round = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
            let results = match work.operands {
                Operands::Forward { q, k, v } => {
                    let inputs = reference::Inputs { q, k, v };
                    let out = reference::forward(&work.geometry, work.task, inputs).map_err(invalid)?;
                    Results::Forward { o: round(out.o), lse: round(out.lse) }
                }
                Operands::Backward { q, k, v, d_o, lse, d } => {
                    let inputs = reference::Inputs { q, k, v };
                    let widen = |x: crate::TensorView<'_>| -> Vec<f64> {
                        (0..x.shape()[0]).flat_map(|t| x.token(t).iter().map(|x| f64::from(*x))).collect()
                    };
                    let (lse, d) = (widen(lse), widen(d));
                    let gradient = reference::OutputGradient { d_o, lse: &lse, d: &d };
                    let out =
                        reference::backward(&work.geometry, work.task, inputs, gradient).map_err(invalid)?;
                    Results::Backward { dq: round(out.dq), dk: round(out.dk), dv: round(out.dv) }
                }
            };
            done(index, results);
        }
        Ok(())
    }
}
