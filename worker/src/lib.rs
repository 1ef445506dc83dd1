//! The client library of Outboard: ships a rank's core attention to the pool by plan, awaits, merges and sums.

mod attention;
mod error;

pub use attention::{Attended, CoreAttention, LayerCall, OutputGradient, PackedDocument, Qkv, QkvGradient};
pub use error::WorkerError;
