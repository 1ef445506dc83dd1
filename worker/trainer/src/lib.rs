//! The reference model and trainer: a small Llama trained on the bytes of files, whose core attention is computed by
//! any [`CoreAttention`](outboard_worker::CoreAttention), on this device or by the pool.
//!
//! A rank's process lists documents ([`Corpus`]), deals them ([`Packer`]), joins the other ranks ([`Exchange`]) and
//! calls [`Trainer::step`]. It must be launched with [`LAUNCH_ENVIRONMENT`], so that a rank computes on one thread.

#![forbid(unsafe_code)]

mod attention_op;
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

pub use config::{ModelConfig, TrainConfig};
pub use corpus::{Corpus, CorpusFile};
pub use error::TrainerError;
pub use exchange::{Exchange, ExchangeConfig, ExchangeError};
pub use init::{Parameter, Parameters};
pub use model::{Forward, Model};
pub use optimizer::{AdamW, Update, global_norm, learning_rate};
pub use packing::{PackedBatch, PackedFile, Packer, StepPacking};
pub use threads::{LAUNCH_ENVIRONMENT, require_one_thread};
pub use trainer::{StepOutcome, Trainer};
