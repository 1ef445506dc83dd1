//! The client library of Outboard: ships a rank's core attention to the pool by plan, awaits, merges and sums.
//!
//! A model calls [`CoreAttention`]. [`PoolAttention`] has the pool compute it, [`LocalAttention`] this device alone.
#![forbid(unsafe_code)]

mod assemble;
mod attention;
mod dispatch;
mod error;
mod home;
mod job;
mod local;
mod options;
mod peers;
mod plan;
mod pool;
mod request;

pub use attention::{Attended, CoreAttention, LayerCall, OutputGradient, PackedDocument, Qkv, QkvGradient};
pub use error::WorkerError;
pub use home::Home;
pub use local::LocalAttention;
pub use options::JobOptions;
pub use outboard_proto::v1::{Placement, PlanSummary, Rates};
pub use plan::Holding;
pub use pool::{Placed, PoolAttention, StepStats};
