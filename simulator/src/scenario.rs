//! What is to be simulated.

use crate::error::in_range;
use crate::random::Random;
use crate::{Gpu, Layout, Mix, Model, Network, SimulationError, Tuning};

/// A training job on a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// What is trained.
    pub model: Model,
    /// What it is trained on.
    pub gpu: Gpu,
    /// How GPUs are connected.
    pub network: Network,
    /// Who does what.
    pub layout: Layout,
    /// Tokens of the longest document.
    pub context: usize,
    /// Tokens of a step.
    pub tokens: u64,
    /// How long documents are.
    pub mix: Mix,
    /// Of the documents that are drawn.
    pub seed: u64,
    /// Steps that are simulated, and whose mean is taken.
    pub steps: u32,
    /// What of a layer's forward pass is done again backward.
    pub recompute: Recompute,
    /// Whether a step ends with the reduction of gradients and the optimizer. Published times may leave them out.
    pub update: bool,
    /// Whether attention servers keep Q, K and V for the backward pass. Otherwise they are sent again.
    pub keep: bool,
    /// Nano-batches that take turns where attention is disaggregated: 2 (ping and pong), or 1.
    pub nano_batches: u32,
    /// The most tokens of a micro-batch of variable length over the mean.
    pub token_room: f64,
    /// Where DistCA's planner stops: a server that lacks no more than this fraction of its share gets no more.
    pub tolerance: f64,
    /// The most steps whose documents variable-length packing may exchange: 1 where none is put off.
    pub delay: u32,
    /// How far above the mean the tokens of a rank may lie where the planner chooses homes, as a fraction of it.
    pub token_slack: f64,
    /// Efficiencies and overheads.
    pub tuning: Tuning,
}

/// Activation recomputation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Everything that backward needs is kept.
    #[default]
    None,
    /// The MLP is computed again from its input: what Megatron calls selective, for that module.
    Mlp,
    /// All of a layer is computed again from its input, core attention too, with all that it sends.
    Full,
}

impl Recompute {
    /// The names, as they are read and printed.
    pub const NAMES: [&str; 3] = ["none", "mlp", "full"];

    /// A choice by its name.
    pub fn named(name: &str) -> Option<Recompute> {
        match name {
            "none" => Some(Recompute::None),
            "mlp" => Some(Recompute::Mlp),
            "full" => Some(Recompute::Full),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Recompute::None => "none",
            Recompute::Mlp => "mlp",
            Recompute::Full => "full",
        }
    }
}

/// Lengths of the documents of a step: those of every sequence of at most a context's tokens, one after another.
pub type Sequences = Vec<Vec<usize>>;

/// Most tokens of a step, so that nothing overflows.
const MAX_TOKENS: u64 = 1 << 34;
/// Most cells that a step may have, so that sums of them do not overflow.
const MAX_CELLS: f64 = (1u64 << 62) as f64;
/// Most documents of all steps, about, so that they fit memory.
const MAX_DOCUMENTS: f64 = (1u64 << 24) as f64;

impl Scenario {
    /// Checks that everything makes sense and multiplies out. Whether memory suffices depends on the policy and is found
    /// out later.
    ///
    /// # Errors
    /// The first entry that does not.
    pub fn check(&self) -> Result<(), SimulationError> {
        self.model.check()?;
        self.gpu.check()?;
        self.network.check()?;
        self.layout.check(&self.model)?;
        self.tuning.check()?;
        in_range("context", self.context as f64, 1.0, f64::from(1u32 << 28))?;
        in_range("tokens", self.tokens as f64, self.context as f64, MAX_TOKENS as f64)?;
        in_range("steps", f64::from(self.steps), 1.0, 1000.0)?;
        in_range("nano_batches", f64::from(self.nano_batches), 1.0, 2.0)?;
        in_range("tolerance", self.tolerance, 0.0, 1.0)?;
        in_range("token_room", self.token_room, 0.0, 1e6)?;
        in_range("delay", f64::from(self.delay), 1.0, 64.0)?;
        in_range("token_slack", self.token_slack, 0.0, 1.0)?;
        let heads = f64::from(self.model.kv_heads) * f64::from(self.layout.pipeline);
        let cells = self.tokens as f64 * self.context as f64 * heads;
        in_range("tokens times context, kv heads and stages", cells, 0.0, MAX_CELLS)?;
        if !self.gpu.profile.is_of(self.model.dtype) {
            return Err(SimulationError::Profile(format!(
                "it has no grid of {}, the element type of {}",
                self.model.dtype, self.model.name
            )));
        }
        let shares = u64::from(self.layout.ranks()) * u64::from(self.layout.micro_batches);
        if self.tokens < 2 * shares {
            return Err(SimulationError::Documents(format!(
                "tokens is {}, which gives less than 2 to each of {shares} ranks and micro-batches",
                self.tokens
            )));
        }
        self.mix.check(self.context)?;
        let documents = f64::from(self.steps) * self.tokens as f64 / self.mix.usual_length(self.context);
        if documents > MAX_DOCUMENTS {
            return Err(SimulationError::Documents(format!(
                "{} steps of {} tokens have about {documents:.0} documents; at most {MAX_DOCUMENTS:.0} are simulated",
                self.steps, self.tokens
            )));
        }
        Ok(())
    }

    /// The documents of every step. Sequences are filled one after the other; where one is full its last document is cut
    /// off, and the rest of it begins the next, as a document of its own. A step takes the next tokens, so that its last
    /// sequence may be shorter.
    pub fn batches(&self) -> Vec<Sequences> {
        let mut stream = self.mix.stream(self.context, Random::new(self.seed));
        let mut over = 0;
        let mut batch = || {
            let mut sequences = Vec::new();
            let mut left = self.tokens;
            while left > 0 {
                let mut room = left.min(self.context as u64) as usize;
                left -= room as u64;
                let mut sequence = Vec::new();
                while room > 0 {
                    if over == 0 {
                        over = stream.draw();
                    }
                    let length = over.min(room);
                    sequence.push(length);
                    (over, room) = (over - length, room - length);
                }
                sequences.push(sequence);
            }
            sequences
        };
        (0..self.steps).map(|_| batch()).collect()
    }
}
