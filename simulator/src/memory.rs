//! Memory of the GPU that needs most.

use crate::scenario::Recompute;
use crate::setting::Setting;

/// Bytes of one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Weights, in the element type they are computed with.
    pub weights: f64,
    /// Their gradients.
    pub gradients: f64,
    /// The rank's share of the optimizer's state.
    pub optimizer: f64,
    /// What layers keep for the backward pass, for the micro-batches that are under way.
    pub activations: f64,
    /// Q, K and V of other ranks that are kept for the backward pass, or those of one layer.
    pub attention: f64,
    /// Logits and their gradients, on the last stage.
    pub logits: f64,
}

/// What a device holds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Held {
    /// The most tokens of a micro-batch.
    pub(crate) tokens: f64,
    /// Micro-batches that are under way at once.
    pub(crate) in_flight: f64,
    /// The most tokens of others whose K and V it holds in a layer, and whose Q and O.
    pub(crate) keys: f64,
    pub(crate) queries: f64,
    /// In how many layers at once.
    pub(crate) layers: f64,
}

impl Memory {
    /// Names of the parts, in the order of [`Memory::parts`].
    pub const NAMES: [&str; 6] =
        ["weights", "gradients", "optimizer", "activations", "attention of others", "logits"];

    /// The parts in order.
    pub fn parts(&self) -> [f64; 6] {
        [self.weights, self.gradients, self.optimizer, self.activations, self.attention, self.logits]
    }

    /// All of it.
    pub fn total(&self) -> f64 {
        self.parts().iter().sum()
    }

    /// The largest part and its name.
    pub fn largest(&self) -> (&'static str, f64) {
        let named = Memory::NAMES.into_iter().zip(self.parts());
        named.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("nothing", 0.0))
    }

    /// What a device of `stage` needs that holds this.
    pub(crate) fn of(setting: &Setting<'_>, stage: usize, held: Held) -> Memory {
        let [weights, gradients, optimizer] = setting.model_bytes();
        let layers = f64::from(setting.closing.layers);
        let element = setting.heads.dtype().bytes() as f64;
        // What is computed again is held of one layer at a time.
        let kept = token_bytes(setting, setting.scenario.recompute);
        let last = stage + 1 == setting.closing.stages;
        let vocabulary = f64::from(setting.scenario.model.vocabulary) / f64::from(setting.layout.tensor);
        Memory {
            weights,
            gradients,
            optimizer,
            activations: held.tokens
                * (held.in_flight * layers * kept + (token_bytes(setting, Recompute::None) - kept)),
            attention: held.layers
                * (held.keys * setting.key_bytes() + held.queries * 2.0 * setting.query_bytes()),
            // In the element type, and as much again for gradients.
            logits: if last { held.tokens * vocabulary * 2.0 * element } else { 0.0 },
        }
    }

    /// What a dedicated attention server needs.
    pub(crate) fn of_server(setting: &Setting<'_>, held: Held) -> Memory {
        let attention =
            held.layers * (held.keys * setting.key_bytes() + held.queries * 2.0 * setting.query_bytes());
        Memory { attention, ..Memory::default() }
    }
}

/// Bytes that one layer keeps of a token in one lane, with sequence parallelism: its input, both norms' outputs and what
/// enters the MLP; Q, K, V, O; gate, up and their product.
fn token_bytes(setting: &Setting<'_>, recompute: Recompute) -> f64 {
    let model = &setting.scenario.model;
    let [hidden, ffn, head_dim, q_heads, kv_heads] =
        [model.hidden, model.ffn, model.head_dim, model.q_heads, model.kv_heads].map(f64::from);
    let attention = head_dim * (2.0 * q_heads + 2.0 * kv_heads);
    let elements = match recompute {
        Recompute::None => 4.0 * hidden + attention + 3.0 * ffn,
        Recompute::Mlp => 4.0 * hidden + attention,
        Recompute::Full => hidden,
    };
    elements * setting.heads.dtype().bytes() as f64 / f64::from(setting.layout.tensor)
}
