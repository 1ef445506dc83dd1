//! The wire contract of Outboard: generated messages and services, domain <-> wire conversions, and how an error
//! becomes a gRPC status.

#![forbid(unsafe_code)]

mod convert;
mod describe;
mod error;
mod header;
mod status;

pub use convert::{
    AssignedTask, GradientHeader, KeyHome, KeyRange, LayerRef, MAX_KEY_HOMES, MAX_NAME_BYTES, MAX_SLICES,
    TensorKind, TensorRef, WireTask, check_key_homes, check_protocol_version,
};
pub use describe::describe;
pub use error::{ErrorKind, RetryHint, TaskError};
pub use header::TaskHeader;
pub use status::failure_of;

/// The protocol version this crate speaks.
pub const PROTOCOL_VERSION: u32 = 2;
/// Most payload bytes in one chunk.
pub const MAX_CHUNK_BYTES: usize = 1 << 20;

/// Generated messages, clients and servers of `outboard.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all)]
pub mod v1 {
    tonic::include_proto!("outboard.v1");
}
