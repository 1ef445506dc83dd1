//! Why a kernel refuses a batch.

use super::{Isa, KEY_BLOCK};
use crate::{DType, Direction, InvalidAttention, Span};

/// A batch or configuration that the CPU kernel does not compute. Nothing has been computed when it is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
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
    /// An operand in place of a result that has another form.
    #[error(
        "task {index} of the batch: {tensor} cannot lie in its result's place with dtype {dtype}, head_dim {head_dim} \
         and v_head_dim {v_head_dim}; it must be f32 and the dims equal"
    )]
    NotInPlace {
        /// Index of the task in the batch.
        index: usize,
        /// Which operand.
        tensor: &'static str,
        /// Its element type.
        dtype: DType,
        /// Elements of a head of Q and K.
        head_dim: usize,
        /// Elements of a head of V and O.
        v_head_dim: usize,
    },
    /// A stage's keys that do not continue those before, or end within a block.
    #[error(
        "task {index} of the batch: the stage's keys {keys} must start at {expected}, and end at a multiple of \
         {KEY_BLOCK} or with the task's keys {task}"
    )]
    BadStage {
        /// Index of the task in the batch.
        index: usize,
        /// Positions of the stage's keys.
        keys: Span,
        /// Where they should start.
        expected: usize,
        /// Positions of the task's keys.
        task: Span,
    },
    /// A stage with the state of another task, or of another kernel's instruction set.
    #[error("task {index} of the batch: the stage's state was started for another task or instruction set")]
    OtherStage {
        /// Index of the task in the batch.
        index: usize,
    },
    /// A stage with the results of a whole task, or the other way round.
    #[error(
        "task {index} of the batch: a stage needs the state of its task as its result, and nothing else does"
    )]
    MixedStages {
        /// Index of the task in the batch.
        index: usize,
    },
    /// A batch that needs more working memory than the kernel may take.
    #[error(
        "the batch needs a workspace of {needed} bytes, the kernel may take {limit}; make its tasks smaller"
    )]
    WorkspaceTooSmall {
        /// Bytes needed.
        needed: usize,
        /// [`KernelConfig::workspace_bytes`](super::KernelConfig::workspace_bytes).
        limit: usize,
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
