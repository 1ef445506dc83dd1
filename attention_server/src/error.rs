//! Why a server cannot start or go on.

use std::net::SocketAddr;

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// The kernel cannot be made.
    #[error("the kernel cannot be made: {0}")]
    Kernel(String),
    /// The GPU cannot be used.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] outboard_cuda::CudaError),
    /// The device failed for good while it was in use.
    #[error("the device {device} is lost: {message}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        message: String,
    },
    /// The executor's thread cannot be started.
    #[error("the executor's thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address, or port 0 for any free port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// No address to tell the coordinator.
    #[error(
        "the server listens on {address}, which is no address that workers can reach; name one with --advertise HOST:PORT"
    )]
    NoAddress {
        /// The address.
        address: SocketAddr,
    },
    /// The coordinator refused the server or cannot be reached.
    #[error("cannot register with the coordinator at {url}: {message}")]
    Register {
        /// Its URL.
        url: String,
        /// Why.
        message: String,
    },
    /// Serving ended by an error.
    #[error("serving on {address} ended: {message}")]
    Serve {
        /// The address.
        address: SocketAddr,
        /// Why.
        message: String,
    },
    /// Tasks in hand did not finish in time.
    #[error("{tasks} tasks were still running {seconds:.0} s after the request to drain")]
    DrainTimeout {
        /// How many.
        tasks: usize,
        /// How long they had.
        seconds: f64,
    },
}
