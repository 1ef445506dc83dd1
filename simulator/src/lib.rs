//! The simulator: what a training step would take on a cluster, by each way to share core attention.
//! `simulate(scenario, policy) -> outcome`, pure.
//!
//! # What is modelled
//! - **Devices.** Each has a queue of computing and links in and out, within its node and between nodes. The lanes of tensor
//!   parallelism do the same, so one of them is simulated.
//! - **A layer.** What comes before attention, attention, what comes after it; forward and backward, with what is computed
//!   again. Nano-batches take turns where attention is served. Attention takes what a profile says of tasks of its shapes
//!   (`outboard_planner::Profile`), everything else its FLOPs, and collectives among lanes their bytes.
//! - **A step.** Micro-batches through the stages of a pipeline: one forward, one backward, each replica by itself; or, where
//!   attention is served, all stages at the same time. Then gradients are reduced, behind the last backward pass as far as it
//!   lasts, and the optimizer runs.
//! - **Bytes.** A transfer takes a latency and its bytes over a link's speed; what travels at one time shares its links.
//! - **Memory.** Weights, gradients, the optimizer's state, activations of all micro-batches under way, what the layer at work
//!   or the head needs besides, what is held of other ranks' attention, buffers of the transport ([`Memory`]). A step that
//!   does not fit is an error that names the largest part.
//!
//! # What is guaranteed
//! - The same scenario and policy give the same outcome, bit for bit: no clock, thread or hash order enters, and floating
//!   point only as IEEE basic operations and square roots.
//! - A step takes no less time than all its FLOPs on all devices, nor than the bytes of any link. With plan and order fixed,
//!   faster links never make it longer.
//! - Policies compute as many cells as their documents have; other sums are an error. (Tests hold plans of pools to the
//!   planner's judge.)
//! - No input makes it panic: what cannot be simulated is a [`SimulationError`] that names the entry.
//!
//! # How it works
//! A policy turns the documents of a step into phases: what each device computes and sends in each layer. The engine runs
//! them in an order that never depends on times, so that a step is a longest path. [`advise()`] compares a pool with the best
//! without. What it predicts of published and of own measurements stands in this crate's README.
//!
//! # Policies
//! | policy | what it is | after |
//! |---|---|---|
//! | `outboard` | attention servers; homes and plan by `outboard_planner::settle` | |
//! | `outboard-fixed-homes` | the same, documents laid out over ranks in order | |
//! | `distca` | attention servers, greedy plans, transfers that all wait for | DistCA, [arXiv 2510.18121](https://arxiv.org/abs/2510.18121) |
//! | `fixed` | sequences packed in order, each shared by chunks of its tokens | Llama 3, [arXiv 2407.21783](https://arxiv.org/abs/2407.21783) |
//! | `wlb` | variable-length packing by work, documents shared by their own chunks | WLB-LLM, [arXiv 2503.17924](https://arxiv.org/abs/2503.17924) |
//! | `cp`, `cp-ring` | sequences packed in order, documents shared by their own chunks; keys gathered, or around a ring | WLB-LLM; Ring Attention, [arXiv 2310.01889](https://arxiv.org/abs/2310.01889) |
//! | `flexsp` | groups of several sizes, by length of documents | FlexSP, [arXiv 2412.01523](https://arxiv.org/abs/2412.01523) |
//! | `hdp` | as many ranks for each document as it needs | ByteScale, [arXiv 2502.21231](https://arxiv.org/abs/2502.21231) |
//!
//! What was simplified of each stands at its definition.

// Tests of the crate's own share theirs with those from outside.
#[cfg(test)]
extern crate self as outboard_simulator;

mod advise;
mod batch;
mod engine;
mod error;
mod gpu;
mod layout;
mod memory;
mod mix;
mod model;
mod network;
mod outcome;
mod phase;
mod policy;
#[cfg(test)]
mod properties;
mod random;
mod scenario;
mod setting;
mod tuning;

pub use advise::{Advice, Doubt, LinkGain, advise};
pub use engine::{Account, Doing, Trace, Traced};
pub use error::SimulationError;
pub use gpu::Gpu;
pub use layout::Layout;
pub use memory::Memory;
pub use mix::{Mix, Stream};
pub use model::Model;
pub use network::{Link, Network};
pub use outcome::{Carried, Outcome, simulate, simulate_steps};
pub use policy::Policy;
pub use random::Random;
pub use scenario::{Recompute, Scenario, Sequences};
pub use tuning::Tuning;
