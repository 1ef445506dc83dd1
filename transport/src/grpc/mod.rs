//! Tasks by gRPC, both ends.

mod account;
mod arrivals;
mod assembly;
mod client;
mod config;
mod connection;
mod elements;
pub(crate) mod home_client;
mod home_service;
mod link;
mod parcel;
mod results;
mod server;
mod session;
mod writer;

pub use client::{GrpcTransport, server_stats};
pub use config::{ClientConfig, LinkConfig, ServerConfig};
pub use home_service::serve_home;
pub use server::{router, serve};
pub use tokio_util::sync::CancellationToken;
