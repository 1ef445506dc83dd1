//! Settings of the model and of a training run.

use outboard_attention::{DType, HeadGeometry, MAX_TOKENS};
use serde::{Deserialize, Serialize};

use crate::TrainerError;

/// Largest number of matrix elements: the reference model shows and tests attention, and is no way to train billions.
const MAX_ELEMENTS: usize = 1 << 30;

/// Shape of the reference model, a Llama-style decoder over bytes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub q_heads: usize,
    /// Key/value heads; they divide `q_heads`.
    pub kv_heads: usize,
    /// Elements of one head, of Q/K and of V; even, because rotary positions turn pairs. `q_heads * head_dim` need not
    /// equal `dim`.
    pub head_dim: usize,
    /// Element type of Q, K, V and dO as core attention takes them: they are rounded to it. All else is f32.
    #[serde(with = "by_name")]
    pub attention_dtype: DType,
    /// Width of the gated MLP.
    pub ffn_dim: usize,
    /// Number of distinct tokens; bytes need 256.
    pub vocab: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f32,
    /// Added to the mean square before its root in every norm.
    pub norm_epsilon: f32,
}

/// A training run as one rank sees it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Seed of the weights and of the order of documents.
    pub seed: u64,
    /// Steps of the run; the learning rate decays towards the last.
    pub steps: u64,
    /// Tokens that each rank is dealt in a step, and so the most of a document. Where tokens are placed anew, a rank may
    /// hold more or fewer.
    pub tokens: usize,
    /// Ranks of the job.
    pub ranks: u32,
    /// This rank, below `ranks`.
    pub rank: u32,
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Steps over which the learning rate rises linearly to its largest.
    pub warmup_steps: u64,
    /// Decoupled weight decay of AdamW, on matrices only.
    pub weight_decay: f64,
    /// Decay of AdamW's running mean of gradients.
    pub beta1: f64,
    /// Decay of AdamW's running mean of squared gradients.
    pub beta2: f64,
    /// Added to AdamW's denominator.
    pub epsilon: f64,
    /// Largest norm of the global gradient; longer ones are scaled down to it.
    pub clip_norm: f64,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            layers: 2,
            dim: 128,
            q_heads: 8,
            kv_heads: 2,
            head_dim: 32,
            attention_dtype: DType::F32,
            ffn_dim: 384,
            vocab: 256,
            rope_base: 10_000.0,
            norm_epsilon: 1e-5,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            seed: 0,
            steps: 20,
            tokens: 16_384,
            ranks: 2,
            rank: 0,
            learning_rate: 5e-3,
            warmup_steps: 2,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip_norm: 1.0,
        }
    }
}

impl ModelConfig {
    /// Checks every setting and gives the heads that core attention sees.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] or [`TrainerError::InvalidHeads`] with the setting at fault.
    pub fn validate(&self) -> Result<HeadGeometry, TrainerError> {
        in_range("layers", self.layers, 1, 1024)?;
        in_range("dim", self.dim, 1, 1 << 16)?;
        in_range("ffn_dim", self.ffn_dim, 1, 1 << 18)?;
        in_range("vocab", self.vocab, 256, 1 << 20)?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(invalid("head_dim", self.head_dim, "rotary positions need an even number"));
        }
        if !(self.rope_base.is_finite() && self.rope_base > 1.0) {
            return Err(invalid("rope_base", self.rope_base, "it must be finite and above one"));
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon > 0.0) {
            return Err(invalid("norm_epsilon", self.norm_epsilon, "it must be finite and above zero"));
        }
        let geometry = HeadGeometry::standard(self.q_heads, self.kv_heads, self.head_dim)?;
        let heads = 2 * (self.q_heads + self.kv_heads) * self.head_dim;
        let elements = 2 * self.vocab * self.dim + self.layers * self.dim * (heads + 3 * self.ffn_dim);
        in_range("number of matrix elements", elements, 1, MAX_ELEMENTS)?;
        Ok(geometry.with_dtype(self.attention_dtype))
    }

    /// FLOPs of one token outside of core attention, forward and backward: two for each element of a matrix that it is
    /// multiplied with, and twice that backward. Norms, rotary positions and the like are not counted.
    pub fn rest_flops_per_token(&self) -> f64 {
        let heads = 2.0 * (self.q_heads + self.kv_heads) as f64 * self.head_dim as f64;
        let layer = self.dim as f64 * (heads + 3.0 * self.ffn_dim as f64);
        6.0 * (self.layers as f64 * layer + self.vocab as f64 * self.dim as f64)
    }
}

impl TrainConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] with the setting at fault.
    pub fn validate(&self) -> Result<(), TrainerError> {
        in_range("tokens", self.tokens, 2, MAX_TOKENS)?;
        in_range("ranks", self.ranks as usize, 1, 4096)?;
        in_range("rank", self.rank as usize, 0, self.ranks as usize - 1)?;
        let fraction = |field, value: f64| match (0.0..1.0).contains(&value) {
            true => Ok(()),
            false => Err(invalid(field, value, "it must be at least zero and below one")),
        };
        fraction("beta1", self.beta1)?;
        fraction("beta2", self.beta2)?;
        fraction("weight_decay", self.weight_decay)?;
        let positive = |field, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(invalid(field, value, "it must be finite and above zero")),
        };
        positive("learning_rate", self.learning_rate)?;
        positive("epsilon", self.epsilon)?;
        positive("clip_norm", self.clip_norm)
    }
}

fn in_range(field: &'static str, value: usize, min: usize, max: usize) -> Result<(), TrainerError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(invalid(field, value, &format!("it must be between {min} and {max}")))
}

fn invalid(field: &'static str, value: impl ToString, expected: &str) -> TrainerError {
    TrainerError::InvalidConfig { field, value: value.to_string(), expected: expected.to_string() }
}

/// An element type by its name.
mod by_name {
    use outboard_attention::DType;
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(dtype)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}
