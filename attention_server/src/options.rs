//! How a server is set up.

use std::net::SocketAddr;
use std::time::Duration;

use outboard_attention::kernel::Isa;

/// What a server computes with, and how much it may hold.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Instruction set of the kernel.
    pub isa: Isa,
    /// Threads of the kernel.
    pub threads: usize,
    /// Bytes that the server may hold: a quarter for the kernel's working memory, the rest for task buffers.
    pub memory_bytes: u64,
    /// Work of one batch, in FLOPs per thread. A task that arrives while a batch runs waits for it at most.
    pub batch_flops_per_thread: f64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            isa: Isa::detect(),
            threads: 1,
            memory_bytes: 2 << 30,
            // About 20 ms of one core: long against the cost of a batch, short against a layer.
            batch_flops_per_thread: 2e9,
        }
    }
}

impl EngineOptions {
    /// The share of the memory that the kernel may work in.
    pub(crate) fn workspace_bytes(&self) -> u64 {
        self.memory_bytes / 4
    }
}

/// The rank that a server shares its device with.
#[derive(Clone, Debug)]
pub struct InPlace {
    /// The job.
    pub job: String,
    /// The rank.
    pub rank: u32,
}

/// How a server is reached, and by whom it is known.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// The address to register, "host:port"; the listening address when left out.
    pub advertise: Option<String>,
    /// The coordinator's URL, or none for a server that clients name themselves.
    pub coordinator: Option<String>,
    /// The rank it shares a device with, for an in-place server.
    pub in_place: Option<InPlace>,
    /// How long tasks in hand may take to finish after a request to drain.
    pub drain_timeout: Duration,
    /// How long to wait for the coordinator at start, and for each call to it later.
    pub coordinator_timeout: Duration,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        ServiceOptions {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            coordinator: None,
            in_place: None,
            drain_timeout: Duration::from_secs(30),
            coordinator_timeout: Duration::from_secs(5),
        }
    }
}
