//! What a server plugs into a transport.

use outboard_attention::DType;
use outboard_proto::{TaskError, TaskHeader};

use crate::{ByteBudget, ByteLease, Reply, TaskInputs};

/// Where a task came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The rank that shares this process, by pointer.
    InPlace,
    /// A client elsewhere.
    Remote,
}

/// A task that is whole: every input tensor has arrived and matches its header.
#[derive(Debug)]
pub struct ArrivedTask {
    /// Everything but the tensors.
    pub header: TaskHeader,
    /// The tensors.
    pub inputs: TaskInputs,
    /// Where it came from.
    pub origin: Origin,
    /// Bytes that its buffers take, freed when the result has been sent.
    pub lease: ByteLease,
    /// How to end it.
    pub reply: Reply,
}

/// Computes tasks. One handler serves every transport of a server.
pub trait TaskHandler: Send + Sync + 'static {
    /// The numerics id of what it computes from inputs of an element type, `None` when it does not compute that: equal
    /// ids give equal bits. The same answer at any time.
    fn numerics_id(&self, dtype: DType) -> Option<&str>;

    /// The server's memory.
    fn budget(&self) -> &ByteBudget;

    /// Refuses a task by its header alone, before any buffer is taken for it. Its element types and its numerics id have
    /// been checked.
    ///
    /// # Errors
    /// What this server cannot compute, or that it takes no new work.
    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError>;

    /// Takes a whole task and ends it, sooner or later, by its reply. Never blocks.
    fn submit(&self, task: ArrivedTask);

    /// Counts tensor bytes as they cross the network.
    fn count_bytes(&self, received: u64, sent: u64);

    /// Counts a task that ended before it could be submitted.
    fn count_failed(&self, error: &TaskError);

    /// Counters for `GetServerStats`.
    fn stats(&self) -> outboard_proto::v1::GetServerStatsResponse;
}
