//! What follows from a scenario and a layout: seconds a token, bytes a token, speeds of links.

use outboard_attention::{Direction, HeadGeometry};
use outboard_planner::TaskShape;

use crate::engine::{Closing, Costs, Links};
use crate::scenario::Recompute;
use crate::{Layout, Scenario, SimulationError};

/// Bytes of a gradient, of the optimizer's state and of what the optimizer reads and writes, each of one weight: f32
/// gradients; f32 weights and both moments. As Megatron-LM has them with its distributed optimizer.
const GRADIENT_BYTES: f64 = 4.0;
const STATE_BYTES: f64 = 12.0;
const UPDATE_BYTES: f64 = 30.0;

/// A scenario with a layout that a policy chose.
#[derive(Clone, Debug)]
pub(crate) struct Setting<'a> {
    pub(crate) scenario: &'a Scenario,
    pub(crate) layout: Layout,
    /// Heads of one lane.
    pub(crate) heads: HeadGeometry,
    pub(crate) links: Links,
    /// The part of the links' speed that plans of a pool count on.
    pub(crate) link_share: f64,
    pub(crate) closing: Closing,
}

impl Setting<'_> {
    pub(crate) fn new(scenario: &Scenario, layout: Layout) -> Result<Setting<'_>, SimulationError> {
        layout.check(&scenario.model)?;
        let Scenario { model, gpu, network, tuning, .. } = scenario;
        let heads = model.heads(layout.tensor)?;
        let lanes = f64::from(layout.tensor);
        let speed = |link: crate::Link| link.bytes_per_second * tuning.link_efficiency;
        let links = Links {
            bytes_per_second: [speed(network.within), speed(network.between)],
            latency_seconds: [network.within.latency_seconds, network.between.latency_seconds],
        };
        let element = model.dtype.bytes() as f64;
        let matmul = |flops: f64| flops / lanes / (gpu.peak_flops_per_second * tuning.matmul_efficiency);
        // All lanes get all of a token's row, or add theirs up: along a ring each sends all but its own part.
        let lane_link = usize::from(layout.tensor > network.gpus_per_node);
        let collective =
            f64::from(model.hidden) * element * (lanes - 1.0) / lanes / links.bytes_per_second[lane_link];
        let costs = Costs {
            pre: matmul(model.pre_flops()),
            post: matmul(model.post_flops()),
            mlp: matmul(model.mlp_flops()),
            tensor_pre: collective,
            tensor_post: 3.0 * collective,
            head: 3.0 * matmul(model.head_flops()),
        };
        let ranks = f64::from(layout.ranks());
        let of_node = (network.gpus_per_node / layout.tensor.max(1)).max(1);
        let among = links.bytes_per_second[usize::from(layout.ranks() > of_node)];
        let weights = lane_weights(scenario, &layout);
        let shared = weights * (ranks - 1.0) / ranks;
        let update = |seconds: f64| if scenario.update { seconds } else { 0.0 };
        let closing = Closing {
            ranks: layout.ranks() as usize,
            stages: layout.pipeline as usize,
            layers: layout.stage_layers(model),
            costs,
            recompute: scenario.recompute,
            token_bytes: f64::from(model.hidden) * element / lanes,
            devices_per_node: of_node as usize,
            gradients: update(shared * GRADIENT_BYTES / among),
            weights: update(shared * element / among),
            optimizer: update(weights / ranks * UPDATE_BYTES / gpu.memory_bytes_per_second),
        };
        Ok(Setting { scenario, layout, heads, links, link_share: 1.0, closing })
    }

    /// Whether two devices are of one node.
    pub(crate) fn near(&self) -> impl Fn(u32, u32) -> bool + '_ {
        |a, b| self.closing.near(a, b)
    }

    /// Seconds that a device takes for a task.
    pub(crate) fn seconds(&self, direction: Direction, shape: TaskShape) -> f64 {
        self.scenario.gpu.profile.seconds(&self.heads, direction, shape)
            / self.scenario.tuning.attention_efficiency
    }

    /// Seconds of a token in one layer, but for core attention: both passes, and what is computed again.
    pub(crate) fn token_seconds(&self) -> f64 {
        let costs = &self.closing.costs;
        let (dense, tensor) = (costs.pre + costs.post, costs.tensor_pre + costs.tensor_post);
        let again = match self.scenario.recompute {
            Recompute::None => 0.0,
            Recompute::Mlp => costs.mlp,
            Recompute::Full => dense + tensor,
        };
        3.0 * dense + 2.0 * tensor + again
    }

    /// Bytes of K and V of a token in one lane.
    pub(crate) fn key_bytes(&self) -> f64 {
        let elements = self.heads.kv_heads() * (self.heads.head_dim() + self.heads.v_head_dim());
        (elements * self.heads.dtype().bytes()) as f64
    }

    /// Bytes of Q, or of O, of a token in one lane.
    pub(crate) fn query_bytes(&self) -> f64 {
        (self.heads.q_heads() * self.heads.head_dim() * self.heads.dtype().bytes()) as f64
    }

    /// How much longer bytes of an all-gather take than others do.
    pub(crate) fn gather_drag(&self) -> f64 {
        self.scenario.tuning.link_efficiency / self.scenario.tuning.gather_efficiency
    }

    /// Devices of the model and of dedicated servers.
    pub(crate) fn devices(&self) -> usize {
        self.layout.devices() as usize
    }

    pub(crate) fn ranks(&self) -> usize {
        self.closing.ranks
    }

    /// Bytes of weights, of their gradients, and of this rank's share of the optimizer's state.
    pub(crate) fn model_bytes(&self) -> [f64; 3] {
        let weights = lane_weights(self.scenario, &self.layout);
        let element = self.heads.dtype().bytes() as f64;
        [weights * element, weights * GRADIENT_BYTES, weights * STATE_BYTES / self.ranks() as f64]
    }
}

/// Weights of one lane of the stage that has most: with a pipeline the embedding or the head, without both.
fn lane_weights(scenario: &Scenario, layout: &Layout) -> f64 {
    let model = &scenario.model;
    let embeddings = if layout.pipeline > 1 { 1.0 } else { 2.0 };
    let weights = f64::from(layout.stage_layers(model)) * model.layer_parameters()
        + embeddings * model.embedding_parameters();
    weights / f64::from(layout.tensor)
}
