//! Bytes of one token on one lane: what a layer keeps of it, what a layer at work needs of it, and what the head needs.
//!
//! Rows of the residual stream are shared among lanes outside of matrix products, which need them whole (sequence
//! parallelism, arXiv 2205.05198). The layer is Megatron-LM's, with Transformer Engine's fused norms: a norm and the
//! projection behind it keep the norm's input and its output.

use crate::scenario::Recompute;
use crate::setting::Setting;

/// Bytes of an f32, in which log-sum-exps and the loss are computed.
const F32: f64 = 4.0;

/// Bytes of a token that a layer keeps for its backward pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kept {
    /// The layer's input.
    pub(super) input: f64,
    /// Its norm, which is projected to Q, K and V, and the residual stream behind attention.
    pub(super) stream: f64,
    /// Q, K and V as they were projected and as attention reads them, O, and a log-sum-exp for each query head. The two are
    /// not the same tensors: positions are applied to Q and K in between, and V is a part of the projection's output, all of
    /// which stays while V does. DistCA's authors found them twice too.
    pub(super) attention: f64,
    /// The norm that enters the MLP, gate and up, and their product.
    pub(super) mlp: f64,
}

impl Kept {
    /// What is kept where a part of the layer is computed again.
    pub(super) fn with(self, recompute: Recompute) -> f64 {
        let Kept { input, stream, attention, mlp } = self;
        match recompute {
            Recompute::None => input + stream + attention + mlp,
            Recompute::Mlp => input + stream + attention,
            Recompute::Full => input,
        }
    }
}

/// What a layer keeps of a token where nothing is computed again.
pub(super) fn kept(setting: &Setting<'_>) -> Kept {
    let (queries, keys) = (setting.query_bytes(), setting.key_bytes());
    let row = share_of_row(setting);
    Kept {
        input: row,
        stream: 2.0 * row,
        attention: 2.0 * (queries + keys) + queries + F32 * setting.heads.q_heads() as f64,
        mlp: row + 3.0 * share_of_ffn(setting),
    }
}

/// What a layer needs of a token besides while it goes through the backward pass of its MLP, which takes more than that of
/// attention does: what is computed again; the gradients of gate, up and their product; a whole row of the gradient, before
/// lanes share it out; and, where there are lanes, a whole row gathered for the gradients of weights.
pub(super) fn at_work(setting: &Setting<'_>) -> f64 {
    let kept = kept(setting);
    let again = kept.with(Recompute::None) - kept.with(setting.scenario.recompute);
    again + 3.0 * share_of_ffn(setting) + row(setting) + gathered_row(setting)
}

/// What the head needs of a token: logits in the element type and, for the loss, in f32, as later of their gradients; and,
/// where there are lanes, a whole row gathered for the product. Each lane has its part of the vocabulary.
pub(super) fn logits(setting: &Setting<'_>) -> f64 {
    let vocabulary = f64::from(setting.scenario.model.vocabulary) / lanes(setting);
    vocabulary * (element(setting) + F32) + gathered_row(setting)
}

fn lanes(setting: &Setting<'_>) -> f64 {
    f64::from(setting.layout.tensor)
}

fn element(setting: &Setting<'_>) -> f64 {
    setting.heads.dtype().bytes() as f64
}

/// A row of the residual stream.
fn row(setting: &Setting<'_>) -> f64 {
    f64::from(setting.scenario.model.hidden) * element(setting)
}

/// A lane's part of a row of the residual stream.
fn share_of_row(setting: &Setting<'_>) -> f64 {
    row(setting) / lanes(setting)
}

/// A row of the residual stream that is gathered from all lanes; one lane has it already.
fn gathered_row(setting: &Setting<'_>) -> f64 {
    if setting.layout.tensor > 1 { row(setting) } else { 0.0 }
}

/// A lane's part of a row of the MLP.
fn share_of_ffn(setting: &Setting<'_>) -> f64 {
    f64::from(setting.scenario.model.ffn) * element(setting) / lanes(setting)
}
