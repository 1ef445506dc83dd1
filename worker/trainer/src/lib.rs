//! The reference model and trainer: a small Llama trained on the bytes of files, whose core attention is computed by
//! any [`CoreAttention`](outboard_worker::CoreAttention), on this device or by the pool.
//!
//! A rank's process lists documents ([`Corpus`]), deals them ([`Packer`]), joins the other ranks ([`Exchange`]) and
//! calls [`Trainer::step`]. Where ranks share documents it holds any ranges of them ([`Packer::load_ranges`]): only
//! attention connects a document's tokens, so loss and gradient are those of the undivided batch. It must be launched with [`LAUNCH_ENVIRONMENT`], so that a rank computes on one thread.

#![forbid(unsafe_code)]

mod attention_op;
mod batch;
mod config;
mod corpus;
mod error;
mod exchange;
mod init;
mod model;
mod ops;
mod optimizer;
mod packing;
mod rng;
mod threads;
mod trainer;

pub use batch::PackedBatch;
pub use config::{ModelConfig, TrainConfig};
pub use corpus::{Corpus, CorpusFile};
pub use error::TrainerError;
pub use exchange::{Exchange, ExchangeConfig, ExchangeError};
pub use init::{Parameter, Parameters};
pub use model::{Forward, Model};
pub use optimizer::{AdamW, Update, global_norm, learning_rate};
pub use packing::{PackedFile, Packer, RangeError, StepPacking};
pub use threads::{LAUNCH_ENVIRONMENT, require_one_thread};
pub use trainer::{StepOutcome, Trainer};
