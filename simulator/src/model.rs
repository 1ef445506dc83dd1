//! Shapes of models, and what a token costs outside of core attention.

use outboard_attention::{DType, HeadGeometry, HeadShape};

use crate::SimulationError;

/// A decoder-only transformer with grouped-query attention and a gated MLP, all layers alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// What it is called in results.
    pub name: String,
    /// Decoder layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the gated MLP.
    pub ffn: u32,
    /// Query heads.
    pub q_heads: u32,
    /// Key/value heads; they divide the query heads.
    pub kv_heads: u32,
    /// Elements of one head.
    pub head_dim: u32,
    /// Entries of the vocabulary; embedding and head have weights of their own.
    pub vocabulary: u32,
    /// Element type of activations, weights as they are computed with, Q, K, V and dO.
    pub dtype: DType,
}

impl Model {
    /// Names that [`Model::built_in`] knows.
    pub const BUILT_IN: [&str; 3] = ["llama-8b", "llama-34b", "llama-70b"];

    /// A model by one of the names [`Model::BUILT_IN`]: shapes as published with the weights of Llama 3.1 8B, Code Llama 34B
    /// and Llama 3.1 70B.
    pub fn built_in(name: &str) -> Option<Model> {
        let shape = |layers, hidden, ffn, q_heads, kv_heads, vocabulary| Model {
            name: name.to_owned(),
            layers,
            hidden,
            ffn,
            q_heads,
            kv_heads,
            head_dim: 128,
            vocabulary,
            dtype: DType::Bf16,
        };
        match name {
            "llama-8b" => Some(shape(32, 4096, 14_336, 32, 8, 128_256)),
            "llama-34b" => Some(shape(48, 8192, 22_016, 64, 8, 32_000)),
            "llama-70b" => Some(shape(80, 8192, 28_672, 64, 8, 128_256)),
            _ => None,
        }
    }

    /// Checks that every number makes sense.
    ///
    /// # Errors
    /// The first field that does not.
    pub fn check(&self) -> Result<(), SimulationError> {
        let fields = [
            ("layers", self.layers, 1 << 12),
            ("hidden", self.hidden, 1 << 20),
            ("ffn", self.ffn, 1 << 22),
            ("vocabulary", self.vocabulary, 1 << 24),
        ];
        for (field, value, most) in fields {
            if value == 0 || value > most {
                return Err(SimulationError::OutOfRange {
                    field: format!("model.{field}"),
                    value: f64::from(value),
                    least: 1.0,
                    most: f64::from(most),
                });
            }
        }
        self.heads(1).map(|_| ())
    }

    /// The heads of one of `tensor` lanes.
    ///
    /// # Errors
    /// Where heads do not make a geometry, or do not divide among lanes.
    pub fn heads(&self, tensor: u32) -> Result<HeadGeometry, SimulationError> {
        let lane = |heads: u32, what: &'static str| {
            if tensor > 0 && heads.is_multiple_of(tensor) {
                Ok((heads / tensor) as usize)
            } else {
                Err(SimulationError::UnevenHeads { model: self.name.clone(), what, heads, tensor })
            }
        };
        let head_dim = self.head_dim as usize;
        let shape = HeadShape {
            q_heads: lane(self.q_heads, "query")?,
            kv_heads: lane(self.kv_heads, "kv")?,
            head_dim,
            v_head_dim: head_dim,
            scale: 1.0 / (self.head_dim.max(1) as f32).sqrt(),
            dtype: self.dtype,
            softcap: None,
        };
        HeadGeometry::try_from(shape).map_err(|error| SimulationError::Heads(error.to_string()))
    }

    /// Weights of one layer.
    pub fn layer_parameters(&self) -> f64 {
        let norms = 2.0 * f64::from(self.hidden);
        self.pre_weights() + self.post_weights() + norms
    }

    /// Weights of the embedding, and as many of the head.
    pub fn embedding_parameters(&self) -> f64 {
        f64::from(self.vocabulary) * f64::from(self.hidden)
    }

    /// All weights.
    pub fn parameters(&self) -> f64 {
        f64::from(self.layers) * self.layer_parameters()
            + 2.0 * self.embedding_parameters()
            + f64::from(self.hidden)
    }

    /// FLOPs of a token before core attention, forward: the projections to Q, K and V.
    pub(crate) fn pre_flops(&self) -> f64 {
        2.0 * self.pre_weights()
    }

    /// FLOPs of a token after core attention, forward: the output projection and the MLP.
    pub(crate) fn post_flops(&self) -> f64 {
        2.0 * self.post_weights()
    }

    /// Of these, FLOPs of the MLP.
    pub(crate) fn mlp_flops(&self) -> f64 {
        6.0 * f64::from(self.hidden) * f64::from(self.ffn)
    }

    /// FLOPs of a token in the head, forward.
    pub(crate) fn head_flops(&self) -> f64 {
        2.0 * self.embedding_parameters()
    }

    /// Useful FLOPs of a step, both passes, nothing recomputed: three times the forward ones of all weights but the
    /// embedding's, and of core attention, 12 a cell, query head and element of head dim. (Kernels compute 14 of these: backward
    /// they compute the scores again.)
    pub fn step_flops(&self, tokens: f64, cells: f64) -> f64 {
        let layer = self.pre_flops() + self.post_flops();
        let weights = 3.0 * (f64::from(self.layers) * layer + self.head_flops());
        weights * tokens + f64::from(self.layers) * self.attention_flops() * cells
    }

    /// Useful FLOPs of core attention a cell of one layer, all heads, both passes.
    pub fn attention_flops(&self) -> f64 {
        12.0 * f64::from(self.head_dim) * f64::from(self.q_heads)
    }

    fn pre_weights(&self) -> f64 {
        f64::from(self.hidden)
            * f64::from(self.head_dim)
            * (f64::from(self.q_heads) + 2.0 * f64::from(self.kv_heads))
    }

    fn post_weights(&self) -> f64 {
        let (hidden, ffn) = (f64::from(self.hidden), f64::from(self.ffn));
        hidden * f64::from(self.head_dim) * f64::from(self.q_heads) + 3.0 * hidden * ffn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_models_have_the_weights_of_their_names() {
        for (name, billions) in [("llama-8b", 8.03), ("llama-34b", 34.5), ("llama-70b", 70.6)] {
            let model = Model::built_in(name).unwrap();
            model.check().unwrap();
            let relative = model.parameters() / (billions * 1e9);
            assert!((relative - 1.0).abs() < 0.05, "{name} has {:.3e}", model.parameters());
        }
    }
}
