//! Tests of the model, its training loop and what they stand on.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod corpus;
mod exchange;
mod gradients;
mod optimizer;
mod packing;
mod placed;
mod ranges;
mod shared;
mod support;
mod threads;
mod training;
mod unfused;
