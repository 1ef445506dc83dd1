//! How fast a rank computes, measured in a fraction of a second before the job starts.
//!
//! The rank takes a few training steps of a small model, by itself: as wide as the job's model up to a bound, so that
//! the time is bounded too, with as many threads and on the cores that the job will have. Rates are used rather than
//! times, since the job's model may be larger: FLOPs of attention and of all else over the times of both.
//!
//! They are good for a decision, not for a forecast in seconds. The activations of a job's many tokens leave the caches
//! that these few stay in, which makes its rest slower than it is taken to be, and the gain a little smaller; in a model
//! wider than the bound norms and the like weigh less than they do here, which makes it larger.

use std::sync::Arc;

use anyhow::Context;
use outboard_attention::kernel::{Isa, KernelConfig};
use outboard_attention::{DocumentId, Span};
use outboard_trainer::{Exchange, ModelConfig, PackedBatch, TrainConfig, Trainer};
use outboard_worker::{LocalAttention, PackedDocument};
use serde::{Deserialize, Serialize};

/// FLOPs of a step outside of attention: a tenth of a second or two on a slow core.
const FLOPS: f64 = 2e9;
/// Bounds of the tokens of a step, which are one document. With fewer, attention is slower than in a job.
const TOKENS: (usize, usize) = (256, 1024);
/// Steps; the first, which meets cold caches and new memory, does not count.
const STEPS: u64 = 3;

/// What a rank computes a second.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Speed {
    /// In core attention, forward and backward.
    pub(crate) attention_flops_per_second: f64,
    /// In the rest of the model, whose FLOPs are those of matrices alone.
    pub(crate) rest_flops_per_second: f64,
}

/// Measures the rates of this process, which must be pinned and run on one thread besides the kernel's.
pub(crate) fn measure(job: &ModelConfig, threads: usize) -> anyhow::Result<Speed> {
    let (model, tokens) = bounded(job);
    let geometry = model.validate()?;
    let config = TrainConfig { tokens, ranks: 1, rank: 0, steps: STEPS, ..TrainConfig::default() };
    let attention = LocalAttention::new(KernelConfig::new(Isa::detect(), threads))?;
    let mut trainer = Trainer::new(&model, &config, Arc::new(attention))?;
    let mut exchange = Exchange::alone();
    let document = PackedDocument::whole(DocumentId { rank: 0, index: 0 }, Span::to(tokens));
    // Which bytes they are changes no time.
    let text: Vec<u8> = (0..tokens).map(|n| (n * 131 % 251) as u8).collect();

    let (mut attention, mut rest) = (f64::INFINITY, f64::INFINITY);
    for step in 0..STEPS {
        let batch = PackedBatch::whole(step, vec![document], text.clone());
        let outcome = trainer.step(&batch, &mut exchange)?;
        if step > 0 {
            attention = attention.min(outcome.attention_seconds);
            rest = rest.min(outcome.seconds - outcome.attention_seconds);
        }
    }
    let cells = (tokens * (tokens + 1) / 2 * model.kv_heads) as u64;
    let flops = (geometry.forward_flops(cells) + geometry.backward_flops(cells)) * model.layers as f64;
    let speed = Speed {
        attention_flops_per_second: flops / attention,
        rest_flops_per_second: model.rest_flops_per_token() * tokens as f64 / rest,
    };
    let rates = [speed.attention_flops_per_second, speed.rest_flops_per_second];
    let sound = rates.iter().all(|rate| rate.is_finite() && *rate > 0.0);
    sound.then_some(speed).with_context(|| format!("this machine's clock gives {speed:?}, which cannot be"))
}

/// One layer of the job's model, no wider than is quickly computed, and the tokens of a step.
fn bounded(job: &ModelConfig) -> (ModelConfig, usize) {
    let group = (job.q_heads / job.kv_heads.max(1)).clamp(1, 8);
    let kv_heads = job.kv_heads.clamp(1, 8 / group);
    let model = ModelConfig {
        layers: 1,
        dim: job.dim.min(256),
        q_heads: group * kv_heads,
        kv_heads,
        ffn_dim: job.ffn_dim.min(1024),
        vocab: 256,
        ..*job
    };
    let tokens = (FLOPS / model.rest_flops_per_token()) as usize;
    (model, tokens.clamp(TOKENS.0, TOKENS.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_any_size_is_probed_by_a_small_one() {
        let widest =
            ModelConfig { dim: 1 << 16, q_heads: 4096, kv_heads: 1, head_dim: 256, ..ModelConfig::default() };
        let odd =
            ModelConfig { q_heads: 60, kv_heads: 20, ffn_dim: 1 << 18, layers: 99, ..ModelConfig::default() };
        let least = ModelConfig {
            dim: 1,
            q_heads: 1,
            kv_heads: 1,
            head_dim: 2,
            ffn_dim: 1,
            ..ModelConfig::default()
        };
        for job in [ModelConfig::default(), widest, odd, least] {
            let (model, tokens) = bounded(&job);
            let geometry = model.validate().unwrap();
            assert!(model.rest_flops_per_token() * tokens as f64 <= 2.5 * FLOPS, "{model:?}");
            let cells = (tokens * tokens * model.kv_heads) as u64;
            assert!(geometry.backward_flops(cells) <= 12.0 * FLOPS, "{model:?}");
            assert_eq!(model.head_dim, job.head_dim);
        }
        let usual = ModelConfig::default();
        let small = (ModelConfig { layers: 1, ..usual }, TOKENS.1);
        assert_eq!(bounded(&usual), small, "the default is small enough");
    }

    #[test]
    fn a_rank_has_a_speed() {
        let speed = measure(&ModelConfig::default(), 1).unwrap();
        assert!(speed.attention_flops_per_second > 0.0 && speed.rest_flops_per_second > 0.0, "{speed:?}");
    }
}
