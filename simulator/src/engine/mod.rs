//! The engine: when every device computes, sends and waits in a step.
//!
//! Each device has a queue of computing and four links (in and out, within its node and between nodes). A policy says
//! what goes through them and in which order, and that order never depends on times: what is next on a queue waits for
//! its inputs even where something behind it could go first, as launches on a CUDA stream do. So a step is a longest path, found by
//! passing over its operations once, and no event queue is needed: there is never a choice. And since every time is a
//! maximum or a minimum of earlier times plus a duration, shorter durations, or faster links, never make a step longer.
//!
//! Bytes that travel at one time share their links: a device has sent when all it sends has passed its own link, and
//! has received when all it receives has passed its own, everybody it waits for has sent, and a latency is over.

mod account;
mod clocks;
mod layers;
mod schedule;
#[cfg(test)]
mod tests;
mod trace;

pub use account::Account;
pub use trace::{Doing, Trace, Traced};

pub(crate) use clocks::{Clocks, Links};
pub(crate) use layers::Costs;
pub(crate) use schedule::{Closing, Program, Replica, run};
