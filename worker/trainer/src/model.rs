//! The reference model: a Llama-style decoder whose core attention is computed by whoever is asked to.

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use outboard_attention::HeadGeometry;
use outboard_worker::{CoreAttention, LayerCall};

use crate::attention_op::{AttentionOp, Fault};
use crate::init::{Parameters, layer_name};
use crate::ops::{CrossEntropy, RmsNorm, Rope, RopeTable, SwiGlu};
use crate::{ModelConfig, PackedBatch, TrainerError};

/// A decoder over bytes: embedding; layers of norm, Q/K/V, rotary positions, core attention, norm and gated MLP; norm
/// and head. Activations are `[rows, width]` f32, documents, or ranges of them, one after another.
pub struct Model {
    config: ModelConfig,
    geometry: HeadGeometry,
    embedding: Var,
    layers: Vec<Layer>,
    norm: Var,
    head: Var,
    rope: Arc<RopeTable>,
}

struct Layer {
    attention_norm: Var,
    q: Var,
    k: Var,
    v: Var,
    o: Var,
    mlp_norm: Var,
    gate_up: Var,
    down: Var,
}

/// The outcome of one rank's forward pass, from which backward goes.
pub struct Forward {
    step: u64,
    /// The divided loss; `None` for a rank without a token, which has no graph.
    loss: Option<Tensor>,
    sum: f64,
    fault: Fault,
}

impl Model {
    /// A model over `parameters`, for documents of at most `max_tokens` tokens. A batch may have any number of rows.
    ///
    /// # Errors
    /// [`TrainerError::InvalidConfig`] and the like for a bad configuration, or parameters of another.
    pub fn new(
        config: &ModelConfig,
        parameters: &Parameters,
        max_tokens: usize,
    ) -> Result<Self, TrainerError> {
        let geometry = config.validate()?;
        let layer = |layer| {
            let get = |name| parameters.get(&layer_name(layer, name)).cloned();
            Ok::<_, TrainerError>(Layer {
                attention_norm: get("attention.norm")?,
                q: get("attention.q")?,
                k: get("attention.k")?,
                v: get("attention.v")?,
                o: get("attention.o")?,
                mlp_norm: get("mlp.norm")?,
                gate_up: get("mlp.gate_up")?,
                down: get("mlp.down")?,
            })
        };
        Ok(Model {
            config: *config,
            geometry,
            embedding: parameters.get("embedding")?.clone(),
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            norm: parameters.get("norm")?.clone(),
            head: parameters.get("head")?.clone(),
            rope: Arc::new(RopeTable::new(config.head_dim, config.rope_base, max_tokens)),
        })
    }

    /// The heads that core attention sees.
    pub fn geometry(&self) -> HeadGeometry {
        self.geometry
    }

    /// Runs the batch forward. The loss that backward starts from is the sum over this rank's predicted tokens divided
    /// by `targets`, the number of predicted tokens of all ranks. A rank without a token asks nothing of `attention`, and
    /// its gradient is zero.
    ///
    /// # Errors
    /// [`TrainerError::BadBatch`], [`TrainerError::NoTargets`] when `targets` is zero, [`TrainerError::Attention`] with
    /// what `attention` said, [`TrainerError::Tensor`].
    pub fn forward(
        &self,
        batch: &PackedBatch,
        attention: &Arc<dyn CoreAttention>,
        targets: u64,
    ) -> Result<Forward, TrainerError> {
        batch.check()?;
        if targets == 0 {
            return Err(TrainerError::NoTargets { step: batch.step });
        }
        let fault = Fault::default();
        if batch.tokens.is_empty() {
            return Ok(Forward { step: batch.step, loss: None, sum: 0.0, fault });
        }
        let cross_entropy = CrossEntropy::new(batch.next_tokens(), targets as f64);
        let sum = cross_entropy.sum();
        let loss = self
            .logits(batch, attention, &fault)
            .and_then(|logits| logits.apply_op1(cross_entropy))
            .map_err(|error| told(error, &fault, batch.step))?;
        Ok(Forward { step: batch.step, loss: Some(loss), sum: sum.get(), fault })
    }

    /// Logits `[rows, vocab]`.
    fn logits(
        &self,
        batch: &PackedBatch,
        attention: &Arc<dyn CoreAttention>,
        fault: &Fault,
    ) -> candle_core::Result<Tensor> {
        let ids: Vec<u32> = batch.tokens.iter().map(|&token| u32::from(token)).collect();
        let ids = Tensor::from_vec(ids, batch.tokens.len(), &Device::Cpu)?;
        let positions = batch.positions();
        let mut x = self.embedding.index_select(&ids, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let call = LayerCall {
                step: batch.step,
                layer: index as u32,
                tick: 0,
                geometry: self.geometry,
                documents: batch.documents.clone(),
            };
            let op = AttentionOp::new(attention.clone(), call, fault.clone());
            x = (&x + self.attention(layer, &x, &positions, op)?)?;
            x = (&x + self.mlp(layer, &x)?)?;
        }
        self.normed(&x, &self.norm)?.matmul(&self.head)
    }

    fn attention(
        &self,
        layer: &Layer,
        x: &Tensor,
        positions: &Arc<[u32]>,
        op: AttentionOp,
    ) -> candle_core::Result<Tensor> {
        let x = self.normed(x, &layer.attention_norm)?;
        let rope = || Rope { table: self.rope.clone(), positions: positions.clone() };
        let q = x.matmul(&layer.q)?.apply_op1(rope())?;
        let k = x.matmul(&layer.k)?.apply_op1(rope())?;
        let v = x.matmul(&layer.v)?;
        q.apply_op3(&k, &v, op)?.matmul(&layer.o)
    }

    fn mlp(&self, layer: &Layer, x: &Tensor) -> candle_core::Result<Tensor> {
        let gate_up = self.normed(x, &layer.mlp_norm)?.matmul(&layer.gate_up)?;
        gate_up.apply_op1(SwiGlu { width: self.config.ffn_dim })?.matmul(&layer.down)
    }

    fn normed(&self, x: &Tensor, weight: &Var) -> candle_core::Result<Tensor> {
        x.apply_op2(weight, RmsNorm { epsilon: self.config.norm_epsilon })
    }
}

impl Forward {
    /// Sum of this rank's cross-entropies in nats, not divided.
    pub fn loss_sum(&self) -> f64 {
        self.sum
    }

    /// The gradient of the divided loss, flat in the order of `parameters`.
    ///
    /// # Errors
    /// [`TrainerError::Attention`] with what the attention said, [`TrainerError::Tensor`].
    pub fn backward(self, parameters: &Parameters) -> Result<Vec<f32>, TrainerError> {
        let Some(loss) = self.loss else { return Ok(vec![0.0; parameters.elements()]) };
        let grads = loss.backward().map_err(|error| told(error, &self.fault, self.step))?;
        let mut flat = Vec::with_capacity(parameters.elements());
        for parameter in parameters {
            match grads.get(parameter.var()) {
                Some(grad) => flat.extend(grad.flatten_all()?.to_vec1::<f32>()?),
                // A gradient that is not there is a broken operator, never a zero.
                None => {
                    let text = format!("no gradient reached the parameter {}", parameter.name());
                    return Err(candle_core::Error::Msg(text).into());
                }
            }
        }
        Ok(flat)
    }
}

/// The attention's own error where there is one, else candle's.
fn told(error: candle_core::Error, fault: &Fault, step: u64) -> TrainerError {
    match fault.take() {
        Some(source) => TrainerError::Attention { step, source },
        None => TrainerError::Tensor(error),
    }
}
