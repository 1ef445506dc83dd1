//! What is wrong with a plan.

use outboard_attention::{DocumentId, Span};

use crate::PlanError;

/// Why a plan does not answer a step. Tasks are named by their number in [`outboard_attention::StepPlan::tasks`], from
/// zero.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// A step that makes no sense, whatever the plan.
    #[error(transparent)]
    BadProblem(#[from] PlanError),
    /// A task of a document that the step does not hold in that tick.
    #[error("task {task} is of document {document}, which the step does not hold in tick {tick}")]
    UnknownDocument {
        /// The task.
        task: usize,
        /// Its document.
        document: DocumentId,
        /// The tick it is planned in.
        tick: u32,
    },
    /// A task on a slot that does not exist.
    #[error("task {task} of document {document} is on slot {slot}; there are {slots}")]
    UnknownSlot {
        /// The task.
        task: usize,
        /// Its document.
        document: DocumentId,
        /// The slot.
        slot: u32,
        /// How many there are.
        slots: usize,
    },
    /// A task that reaches beyond its document or the heads.
    #[error("task {task} of document {document} has {field} {span}, which is not within {bound}")]
    OutOfRange {
        /// The task.
        task: usize,
        /// Its document.
        document: DocumentId,
        /// `q`, `kv` or `kv_heads`.
        field: &'static str,
        /// What the task has.
        span: Span,
        /// What there is.
        bound: Span,
    },
    /// A task without a cell.
    #[error("task {task} of document {document} holds no cell: queries {q}, keys {kv}, kv heads {kv_heads}")]
    Empty {
        /// The task.
        task: usize,
        /// Its document.
        document: DocumentId,
        /// Its queries.
        q: Span,
        /// Its keys.
        kv: Span,
        /// Its kv heads.
        kv_heads: Span,
    },
    /// Two tasks that compute the same cell.
    #[error("tasks {first} and {second} of document {document} compute the same cells")]
    Overlap {
        /// The document.
        document: DocumentId,
        /// The task that comes first in the plan.
        first: usize,
        /// The other.
        second: usize,
    },
    /// Cells that no task computes.
    #[error("the tasks of document {document} hold {planned} cells, its mask {needed}")]
    Missing {
        /// The document.
        document: DocumentId,
        /// Cells of its tasks, over all kv heads.
        planned: u64,
        /// Cells of its mask, over all kv heads.
        needed: u64,
    },
}
