//! The simulator: what a training step would take on a cluster, by one way to share core attention or another.

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
pub use mix::{LONG_DOCUMENTS, Mix, Stream};
pub use model::Model;
pub use network::{Link, Network};
pub use outcome::{Carried, Outcome, simulate, simulate_steps};
pub use policy::Policy;
pub use random::Random;
pub use scenario::{Recompute, Scenario, Sequences};
pub use tuning::Tuning;
