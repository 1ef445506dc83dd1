//! The same model as a chain of candle's differentiable primitives, with plain softmax attention under an explicit
//! block-diagonal causal mask: the oracle of the gradient tests.

use candle_core::{D, Device, Result, Tensor, Var};
use outboard_trainer::{ModelConfig, PackedBatch, Parameters};

struct Unfused<'a> {
    config: ModelConfig,
    parameters: &'a Parameters,
    /// cos and sin, `[rows, 1, head_dim / 2]`.
    angles: (Tensor, Tensor),
    /// 0 where a key counts and -inf where not, `[rows, rows]`.
    mask: Tensor,
}

/// The loss summed over predicted tokens and divided by `targets`.
pub(crate) fn loss(
    config: ModelConfig,
    parameters: &Parameters,
    batch: &PackedBatch,
    targets: u64,
) -> Result<Tensor> {
    let cpu = &Device::Cpu;
    let rows = batch.tokens.len();
    let half = config.head_dim / 2;
    let (mut angles, mut mask, mut predicting, mut next) = (vec![], vec![], vec![], vec![]);
    for document in batch.documents.iter() {
        for row in document.rows.iter() {
            let position = (row - document.rows.start()) as f64;
            angles.extend(
                (0..half).map(|i| position * f64::from(config.rope_base).powf(-(i as f64) / half as f64)),
            );
            let counts = |key: usize| key <= row && document.rows.contains(key);
            mask.extend((0..rows).map(|key| if counts(key) { 0.0 } else { f32::NEG_INFINITY }));
            if row + 1 < document.rows.end() {
                predicting.push(row as u32);
                next.push(u32::from(batch.tokens[row + 1]));
            }
        }
    }
    let turned = |f: fn(f64) -> f64| {
        Tensor::from_vec(angles.iter().map(|&a| f(a) as f32).collect::<Vec<f32>>(), (rows, 1, half), cpu)
    };
    let model = Unfused {
        config,
        parameters,
        angles: (turned(f64::cos)?, turned(f64::sin)?),
        mask: Tensor::from_vec(mask, (rows, rows), cpu)?,
    };
    let ids: Vec<u32> = batch.tokens.iter().map(|&token| u32::from(token)).collect();
    let logits = model.logits(&Tensor::from_vec(ids, rows, cpu)?)?;
    let count = predicting.len();
    let logits = logits.index_select(&Tensor::from_vec(predicting, count, cpu)?, 0)?;
    let chosen = logits.gather(&Tensor::from_vec(next, (count, 1), cpu)?, 1)?;
    (logits.log_sum_exp(1)?.sum_all()? - chosen.sum_all()?)? / targets as f64
}

impl Unfused<'_> {
    fn weight(&self, name: &str) -> &Var {
        self.parameters.get(name).unwrap()
    }

    fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let mut x = self.weight("embedding").index_select(ids, 0)?;
        for layer in 0..self.config.layers {
            let weight = |name: &str| self.weight(&format!("layer.{layer:04}.{name}"));
            let y = self.norm(&x, weight("attention.norm"))?;
            let q = self.rope(&y.matmul(weight("attention.q"))?, self.config.q_heads)?;
            let k = self.rope(&y.matmul(weight("attention.k"))?, self.config.kv_heads)?;
            let v = y.matmul(weight("attention.v"))?;
            x = (&x + self.attention(&q, &k, &v)?.matmul(weight("attention.o"))?)?;
            let y = self.norm(&x, weight("mlp.norm"))?.matmul(weight("mlp.gate_up"))?;
            let (gate, up) = (
                y.narrow(1, 0, self.config.ffn_dim)?,
                y.narrow(1, self.config.ffn_dim, self.config.ffn_dim)?,
            );
            let silu = (&gate / (gate.neg()?.exp()? + 1.0)?)?;
            x = (&x + (silu * up)?.matmul(weight("mlp.down"))?)?;
        }
        self.norm(&x, self.weight("norm"))?.matmul(self.weight("head"))
    }

    fn norm(&self, x: &Tensor, weight: &Var) -> Result<Tensor> {
        let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.config.norm_epsilon))?;
        x.broadcast_div(&mean.sqrt()?)?.broadcast_mul(weight)
    }

    fn rope(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let half = self.config.head_dim / 2;
        let x = x.reshape((rows, heads, 2 * half))?;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let (cos, sin) = &self.angles;
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Tensor::cat(&[first, second], 2)?.reshape((rows, width))
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let ModelConfig { q_heads, kv_heads, head_dim, .. } = self.config;
        let head = |x: &Tensor, head: usize| x.narrow(1, head * head_dim, head_dim)?.contiguous();
        let mut outputs = Vec::new();
        for h in 0..q_heads {
            let kv = h / (q_heads / kv_heads);
            let scores = (head(q, h)?.matmul(&head(k, kv)?.t()?)? / (head_dim as f64).sqrt())?;
            let weights = scores.broadcast_add(&self.mask)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
            outputs.push(weights.matmul(&head(v, kv)?)?);
        }
        Tensor::cat(&outputs, 1)
    }
}
