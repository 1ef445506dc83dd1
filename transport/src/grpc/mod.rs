//! Tasks by gRPC, both ends.

mod account;
mod arrivals;
mod client;
mod config;
mod connection;
mod elements;
mod link;
mod parcel;
mod results;
mod server;
mod session;
mod writer;

pub use client::{GrpcTransport, server_stats};
pub use config::{ClientConfig, LinkConfig, ServerConfig};
pub use server::{router, serve};
pub use tokio_util::sync::CancellationToken;
