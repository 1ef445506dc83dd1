//! Tasks by gRPC, both ends.

mod client;
mod config;
mod server;

pub use client::{GrpcTransport, server_stats};
pub use config::{ClientConfig, LinkConfig, ServerConfig};
pub use server::{router, serve};
pub use tokio_util::sync::CancellationToken;
