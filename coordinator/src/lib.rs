//! The coordinator: knows the pool of attention servers and the jobs, and plans every step of every job.
//!
//! [`serve`] runs it on a listener; a [`Handle`] is the same without a network, for a process that embeds it. Pool,
//! jobs and steps are pure state machines that get the time as an argument; the handle holds them behind one lock, looks
//! at leases and deadlines several times in each, and plans on threads of their own.
//!
//! Every wait is bounded by [`Options`]: a rank that does not come, does not speak or leaves is named to the others.

#![forbid(unsafe_code)]

mod correction;
mod documents;
mod gathering;
mod handle;
mod job;
mod jobs;
mod options;
mod pace;
mod parts;
mod placement;
mod planning;
mod pool;
mod report;
mod server;
mod service;
mod slots;
#[cfg(test)]
mod stability;
mod steps;
mod terms;
mod text;
mod verdict;
mod wire;

pub use gathering::Joined;
pub use handle::{Handle, RankPlan, Submission};
pub use job::JobId;
pub use options::{MAX_RANKS, Options};
pub use outboard_planner::Rates;
pub use planning::{PlacedTask, PlannedStep, Summary};
pub use pool::{Candidate, PoolEntry};
pub use report::{RankTimes, RunTimes, ServerReport, ServerTimes, StepReport};
pub use server::{InPlace, ServerId, ServerSpec};
pub use service::{Service, serve, serve_handle};
pub use slots::SlotSpec;
pub use terms::{Placement, RankSpec, Terms};

/// Why a call failed: what was wrong with which values, and what to do.
pub type Error = outboard_proto::TaskError;
