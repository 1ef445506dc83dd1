//! How a GPU is used.

use std::path::PathBuf;

/// How a GPU computes.
#[derive(Clone, Debug)]
pub struct CudaConfig {
    /// Its number: 0 is `cuda:0`.
    pub device: usize,
    /// Where cuDNN, cuBLASLt and NVRTC are looked for before the system's loader is asked.
    pub libraries: Vec<PathBuf>,
    /// Where execution plans are kept between runs. Without it they are built anew, which takes up to seconds each.
    pub plan_folder: Option<PathBuf>,
    /// Bytes of device memory that one wave may take: operands, results, and what lies between; never more than a third of
    /// the device's. A batch is cut into as many waves as it needs.
    pub batch_bytes: usize,
    /// Whether backward sums in a fixed order, where cuDNN can (9.25 and later). Otherwise it is faster, and the last bits
    /// of dQ differ from run to run.
    pub deterministic: bool,
    /// Threads that copy operands and results, at least one.
    pub copy_threads: usize,
    /// Whether cuDNN reads and writes tensors where they lie, where it can. Otherwise all are moved into an order of its
    /// own first. It changes no bit.
    pub in_place: bool,
}

impl CudaConfig {
    /// The usual configuration of a device.
    pub fn new(device: usize) -> CudaConfig {
        CudaConfig {
            device,
            libraries: Vec::new(),
            plan_folder: None,
            batch_bytes: usize::MAX,
            deterministic: true,
            copy_threads: 4,
            in_place: true,
        }
    }
}
