//! Core attention on NVIDIA GPUs.
//!
//! [`CudaKernel`] computes what [`CpuKernel`](outboard_attention::kernel::CpuKernel) does, for bf16 and f16. The attention
//! itself is cuDNN's; what is ours is everything around it: tasks of any lengths, masks and numbers of heads become
//! ragged calls (`batch`), graphs that cuDNN's fast kernels match (`graph`), plans that are kept (`plan`), memory
//! and streams (`wave`), and kernels that move and merge (`gpu`).
//!
//! Nothing is linked: driver, cuDNN and NVRTC are loaded when a device is opened. `README.md` of this crate has the
//! measured figures, and what was found out about cuDNN.

// Foreign functions are where this crate needs `unsafe`.
mod ahead;
mod batch;
mod config;
mod copy;
#[allow(unsafe_code)]
mod cudnn;
mod error;
#[allow(unsafe_code)]
mod gpu;
mod graph;
mod kernel;
#[allow(unsafe_code)]
mod measure;
mod plan;
mod tensors;
#[allow(unsafe_code)]
mod wave;

pub use ahead::{AheadPlan, plan_ahead};
pub use config::CudaConfig;
pub use error::CudaError;
pub use gpu::{DeviceInfo, devices};
pub use kernel::{CudaKernel, Finished};
pub use measure::{Measured, Repeats, Transfers};
