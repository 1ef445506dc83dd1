//! Tensors on the move: one [`Transport`] trait from worker to attention server, in-process or by gRPC, both ends.

#![forbid(unsafe_code)]

mod budget;
pub mod grpc;
mod guard;
mod handler;
mod home;
mod in_process;
mod parts;
mod sizes;
mod sums;
mod task;

pub use budget::{ByteBudget, ByteLease};
pub use handler::{ArrivedTask, Origin, TaskHandler};
pub use home::{HomeHandler, Homes, KeyGradient};
pub use in_process::InProcess;
pub use task::{GradientInputs, KeyShare, Keys, Pending, Reply, TaskInputs, TaskOutcome, TaskRequest};

/// Ships tasks to one attention server.
pub trait Transport: Send + Sync {
    /// Ships tasks together; the result of each is awaited by its [`Pending`], in the same order. Never blocks: room
    /// at the server (credits, in bytes) is awaited inside, and when too much waits already, tasks fail as busy. Each task
    /// is admitted or refused by itself, and a shipment that the server cannot hold at once goes in parts.
    fn ship(&self, shipment: Vec<TaskRequest>) -> Vec<Pending>;

    /// What has crossed the link since it was made.
    fn traffic(&self) -> Traffic;

    /// The numerics ids of the server, one for each element type that it computes; none before they are known.
    fn numerics_ids(&self) -> Vec<String>;
}

/// Tensor bytes that crossed a link; in-process tasks cross none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// From client to server.
    pub sent: u64,
    /// From server to client.
    pub received: u64,
}
