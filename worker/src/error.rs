//! What can go wrong for a worker.

use std::net::SocketAddr;

use outboard_attention::kernel::KernelError;
use outboard_attention::{DocumentId, InvalidAttention, Span};
use outboard_proto::TaskError;

/// Why a worker cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// Inputs that do not fit the call.
    #[error("step {step}, layer {layer}: {source}")]
    Invalid {
        /// Training step.
        step: u64,
        /// Layer.
        layer: u32,
        /// What is wrong.
        source: InvalidAttention,
    },
    /// The kernel of this process refused.
    #[error("step {step}, layer {layer}: {source}")]
    Kernel {
        /// Training step.
        step: u64,
        /// Layer.
        layer: u32,
        /// Why.
        source: KernelError,
    },
    /// The kernel of this process cannot be made.
    #[error("the kernel cannot be made: {0}")]
    NoKernel(KernelError),
    /// The coordinator refused, or cannot be reached.
    #[error("job {job}, rank {rank}: {doing} at the coordinator {url}: {source}")]
    Coordinator {
        /// The job.
        job: String,
        /// This rank.
        rank: u32,
        /// What was asked of it.
        doing: String,
        /// Its URL.
        url: String,
        /// Why.
        source: TaskError,
    },
    /// A plan that does not fit what the rank submitted.
    #[error("job {job}, rank {rank}, step {step}: the plan does not fit: {message}")]
    BadPlan {
        /// The job.
        job: String,
        /// This rank.
        rank: u32,
        /// Training step.
        step: u64,
        /// How.
        message: String,
    },
    /// The rank's home cannot listen.
    #[error("this rank's home cannot listen on {address}: {source}; choose another address")]
    Home {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Options that do not go together.
    #[error("job {job}, rank {rank}: {message}")]
    Options {
        /// The job.
        job: String,
        /// This rank.
        rank: u32,
        /// What does not fit, and what to do.
        message: String,
    },
    /// Keys, or gradients of keys, of documents that ranks share did not come.
    #[error("job {job}, rank {rank}, step {step}, layer {layer}: {source}")]
    Shared {
        /// The job.
        job: String,
        /// This rank.
        rank: u32,
        /// Training step.
        step: u64,
        /// Layer.
        layer: u32,
        /// What did not come, and from whom.
        source: TaskError,
    },
    /// A step whose documents were never submitted.
    #[error(
        "job {job}, rank {rank}: attention of step {step} was asked for before its documents were submitted"
    )]
    NotSubmitted {
        /// The job.
        job: String,
        /// This rank.
        rank: u32,
        /// Training step.
        step: u64,
    },
    /// A task that no server computed.
    #[error("rank {rank}: {task}: no server is left to try after {tried}")]
    NoServerLeft {
        /// This rank.
        rank: u32,
        /// The task: job, step, layer, direction, document.
        task: String,
        /// Servers tried and their errors.
        tried: String,
    },
    /// A task that every server would refuse.
    #[error("rank {rank}: {task}: {source}")]
    Refused {
        /// This rank.
        rank: u32,
        /// The task: job, step, layer, direction, document.
        task: String,
        /// Why.
        source: TaskError,
    },
    /// A task that was neither computed nor refused: a defect of Outboard's own, never passed over.
    #[error(
        "step {step}, layer {layer}: document {document}, queries {q}, kv heads {kv_heads}: no result came"
    )]
    NoResult {
        /// Training step.
        step: u64,
        /// Layer.
        layer: u32,
        /// The task's document.
        document: DocumentId,
        /// The task's queries.
        q: Span,
        /// The task's kv heads.
        kv_heads: Span,
    },
    /// Servers of another numerics id than the job started with.
    #[error("rank {rank}: {task}: computed by {actual}, while the job started on {expected}")]
    NumericsChanged {
        /// This rank.
        rank: u32,
        /// The task.
        task: String,
        /// Numerics id of the job.
        expected: String,
        /// Numerics id of the result.
        actual: String,
    },
}
