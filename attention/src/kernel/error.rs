//! Why a kernel refuses a batch.

use super::Isa;
use crate::{DType, Direction, InvalidAttention};

/// A batch or configuration that the CPU kernel does not compute. Nothing has been computed when it is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// An element type that this kernel has no code for.
    #[error(
        "task {index} of the batch: geometry.dtype {dtype} is not supported by the CPU kernel; it computes f32"
    )]
    UnsupportedDType {
        /// Index of the task in the batch.
        index: usize,
        /// The element type asked for.
        dtype: DType,
    },
    /// A task or tensor that does not fit.
    #[error("task {index} of the batch: {source}")]
    Invalid {
        /// Index of the task in the batch.
        index: usize,
        /// What does not fit.
        source: InvalidAttention,
    },
    /// A result buffer of the wrong length.
    #[error("task {index} of the batch: results.{tensor} holds {actual} elements; the task needs {needed}")]
    BadResult {
        /// Index of the task in the batch.
        index: usize,
        /// Which buffer.
        tensor: &'static str,
        /// Elements there are.
        actual: usize,
        /// Elements there should be.
        needed: usize,
    },
    /// Result buffers of one direction with operands of the other.
    #[error("task {index} of the batch: operands are {operands}, results are {results}")]
    MixedDirections {
        /// Index of the task in the batch.
        index: usize,
        /// Direction of the operands.
        operands: Direction,
        /// Direction of the results.
        results: Direction,
    },
    /// An instruction set that this machine lacks.
    #[error("isa {isa} is not available on this machine")]
    IsaUnavailable {
        /// What was asked for.
        isa: Isa,
    },
    /// A kernel without threads.
    #[error("threads is 0; the kernel needs at least one")]
    NoThreads,
}
