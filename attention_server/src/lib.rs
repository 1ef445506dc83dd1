//! A stateless attention server: rebatches whatever tasks are ready, across workers, layers and directions, computes
//! them, and streams results back.
//!
//! [`Engine`] is the task handler behind every transport; [`serve`] puts it on the network and into the pool. A rank
//! that shares its device with a server embeds both.
#![forbid(unsafe_code)]

mod batch;
mod device;
mod engine;
mod error;
mod executor;
mod options;
mod queue;
mod registration;
mod service;
mod stats;

pub use batch::{Ready, next_batch};
pub use engine::Engine;
pub use error::ServerError;
#[cfg(feature = "cuda")]
pub use options::CudaOptions;
pub use options::{CpuOptions, DeviceOptions, EngineOptions, InPlace, ServiceOptions};
pub use service::{Service, serve, serve_engine};
