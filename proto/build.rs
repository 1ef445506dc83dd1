//! Compiles the protobuf definitions without protoc.

use std::error::Error;

const PROTOS: [&str; 4] = [
    "outboard/v1/types.proto",
    "outboard/v1/attention.proto",
    "outboard/v1/coordinator.proto",
    "outboard/v1/home.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
