//! The client library of Outboard: ships a rank's core attention to the pool by plan, awaits, merges and sums.
//!
//! A model calls [`CoreAttention`]. [`LocalAttention`] computes it on this device alone.
#![forbid(unsafe_code)]

mod assemble;
mod attention;
mod error;
mod local;

pub use attention::{Attended, CoreAttention, LayerCall, OutputGradient, PackedDocument, Qkv, QkvGradient};
pub use error::WorkerError;
pub use local::LocalAttention;
