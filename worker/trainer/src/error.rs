//! What can go wrong in training.

use std::path::PathBuf;

use outboard_attention::{DocumentId, InvalidAttention, Span};
use outboard_worker::WorkerError;

use crate::RangeError;
use crate::exchange::ExchangeError;

/// Why training cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainerError {
    /// A setting out of its range.
    #[error("{field} is {value}; {expected}")]
    InvalidConfig {
        /// The setting.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        expected: String,
    },
    /// Heads that do not fit together.
    #[error(transparent)]
    InvalidHeads(#[from] InvalidAttention),
    /// A file or folder that cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A place without a single document.
    #[error("{} holds no documents: {detail}", path.display())]
    NoDocuments {
        /// The folder.
        path: PathBuf,
        /// What was looked for, and what to do.
        detail: String,
    },
    /// A file that shrank after the run began.
    #[error("{} held at least {expected} bytes when the run began and now ends after {found}; keep the data unchanged while training", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
        /// Bytes wanted.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
    /// A range that a rank was to hold and cannot load.
    #[error("step {step}: rank {rank} cannot load tokens {tokens} of document {document}: {source}")]
    Range {
        /// Training step.
        step: u64,
        /// The rank.
        rank: u32,
        /// The document.
        document: DocumentId,
        /// Its tokens.
        tokens: Span,
        /// Why not.
        source: RangeError,
    },
    /// A batch that does not fit the trainer it was given to.
    #[error("step {step}: {field} of the batch is {value}; {expected}")]
    BadBatch {
        /// Training step.
        step: u64,
        /// What does not fit.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: String,
    },
    /// A step in which no rank has a token to predict.
    #[error(
        "step {step}: no document of any rank has two tokens, so there is nothing to predict; use longer documents"
    )]
    NoTargets {
        /// Training step.
        step: u64,
    },
    /// Core attention failed.
    #[error("step {step}: core attention failed: {source}")]
    Attention {
        /// Training step.
        step: u64,
        /// What the attention said.
        source: WorkerError,
    },
    /// The exchange between ranks failed.
    #[error("step {step}: {source}")]
    Exchange {
        /// Training step.
        step: u64,
        /// What failed, with the rank at fault.
        source: ExchangeError,
    },
    /// Training diverged.
    #[error("step {step}: {what} is {value}; lower the learning rate")]
    NotFinite {
        /// Training step.
        step: u64,
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// The tensor library failed.
    #[error("tensor computation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// More compute threads than the one a rank may use.
    #[error(
        "{threads} compute threads; a rank computes on one: start its process with RAYON_NUM_THREADS=1 and CANDLE_NUM_THREADS=1"
    )]
    TooManyThreads {
        /// Threads the tensor library would use.
        threads: usize,
    },
}
