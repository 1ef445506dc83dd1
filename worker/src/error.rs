//! What can go wrong for a worker.

use outboard_attention::InvalidAttention;

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
    /// Any other failure, described for a person.
    #[error("{0}")]
    Failed(String),
}
