//! How a server is set up.

use std::net::SocketAddr;
use std::time::Duration;

use outboard_attention::kernel::Isa;
use outboard_transport::Homes;

/// What a server computes with, and how much it may hold.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// What computes.
    pub device: DeviceOptions,
    /// Bytes of host memory that the server may hold for task buffers. A quarter of it is the CPU kernel's working memory,
    /// where that computes.
    pub memory_bytes: u64,
}

/// What computes.
#[derive(Clone, Debug)]
pub enum DeviceOptions {
    /// Cores of this machine.
    Cpu(CpuOptions),
    /// A GPU.
    #[cfg(feature = "cuda")]
    Cuda(CudaOptions),
}

/// How a CPU computes.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Instruction set of the kernel.
    pub isa: Isa,
    /// Threads of the kernel.
    pub threads: usize,
    /// Work of one batch, in FLOPs per thread. A task that arrives while a batch runs waits for it at most.
    pub batch_flops_per_thread: f64,
}

/// How a GPU computes.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// The device, and how it is used.
    pub kernel: outboard_cuda::CudaConfig,
    /// Work of one batch, in FLOPs. A task that arrives while all waves are taken waits for a batch or two.
    pub batch_flops: f64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions { device: DeviceOptions::Cpu(CpuOptions::default()), memory_bytes: 2 << 30 }
    }
}

impl Default for CpuOptions {
    fn default() -> Self {
        CpuOptions {
            isa: Isa::detect(),
            threads: 1,
            // About 20 ms of one core: long against the cost of a batch, short against a layer.
            batch_flops_per_thread: 2e9,
        }
    }
}

#[cfg(feature = "cuda")]
impl CudaOptions {
    /// The usual options of a device.
    pub fn new(kernel: outboard_cuda::CudaConfig) -> CudaOptions {
        // About 20 ms of a Hopper GPU.
        CudaOptions { kernel, batch_flops: 1e13 }
    }
}

impl EngineOptions {
    /// The share of the memory that the kernel may work in.
    pub(crate) fn workspace_bytes(&self) -> u64 {
        match self.device {
            DeviceOptions::Cpu(_) => self.memory_bytes / 4,
            // It works in its own memory.
            #[cfg(feature = "cuda")]
            DeviceOptions::Cuda(_) => 0,
        }
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
    /// The way to keys that clients do not hold; it knows the home in this process, if there is one.
    pub homes: Homes,
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
            homes: Homes::default(),
            drain_timeout: Duration::from_secs(30),
            coordinator_timeout: Duration::from_secs(5),
        }
    }
}
