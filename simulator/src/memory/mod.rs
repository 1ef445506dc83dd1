//! Memory of the GPU that needs most: the tensors that it holds at the moment of a step when they are most.
//!
//! That moment is the turn from the forward pass to the backward pass: all layers have kept what the backward pass needs of
//! the micro-batches under way, and then the head is at work on the last stage, and after it the last layer. Of these two
//! the one that needs more counts, and the part of the other is 0.
//!
//! What is counted is what a trainer like Megatron-LM holds, with sequence parallelism, the distributed optimizer and plain
//! cross-entropy. `measured` sets parts and totals beside records of DistCA's authors.
//!
//! Not counted, since no formula is known for it: the CUDA context and buffers of communicators (2.9 GiB on one node of those
//! records); what an allocator has reserved and tensors do not use (`nvidia-smi` showed 138.2 GiB where they took 71.3 GiB at
//! most); and buffers larger than what goes through them (DistCA reserves four, of 1 to 4 GiB each, on every GPU). The
//! memory of built-in GPUs leaves room for some of it ([`crate::Gpu::built_in`]).

#[cfg(test)]
mod measured;
mod token;

use crate::setting::Setting;

/// Bytes of one GPU, part by part.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Memory {
    /// Weights, in the element type they are computed with.
    pub weights: f64,
    /// Their gradients, f32 in a buffer of their own, as Megatron-LM accumulates them.
    pub gradients: f64,
    /// The rank's share of the optimizer's state: f32 weights and both moments, over all ranks.
    pub optimizer: f64,
    /// What layers keep for the backward pass, for the micro-batches that are under way.
    pub activations: f64,
    /// What the layer at work needs besides in its backward pass: what it computes again, gradients, rows gathered from all
    /// lanes, gradients of other ranks' attention. 0 where logits are more.
    pub layer_at_work: f64,
    /// Logits in the element type and in f32, and the rows they are computed from, on the last stage. 0 where the layer at
    /// work is more.
    pub logits: f64,
    /// Q, K and V of other ranks that are kept for the backward pass, or those of one layer.
    pub attention: f64,
    /// What is being sent to attention servers and back, as it lies in the buffers of the transport.
    pub transport_buffers: f64,
}

/// What a device holds of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Held {
    /// The most tokens of a micro-batch.
    pub(crate) tokens: f64,
    /// Of these, the most that a layer is computed for at one time: those of a nano-batch.
    pub(crate) at_once: f64,
    /// Micro-batches that are under way at once.
    pub(crate) in_flight: f64,
    /// The most tokens of others whose K and V it holds in a layer, each as often as it holds them, and whose Q.
    pub(crate) keys: f64,
    pub(crate) queries: f64,
    /// In how many layers at once.
    pub(crate) layers: f64,
    /// Bytes of buffers through which tensors go to attention servers and back.
    pub(crate) buffers: f64,
}

impl Held {
    /// Bytes of others' Q, K and V.
    fn kept_of_others(&self, setting: &Setting<'_>) -> f64 {
        self.layers * (self.keys * setting.key_bytes() + self.queries * setting.query_bytes())
    }

    /// Bytes of what one layer's backward pass makes of them: dK and dV, and dO and dQ.
    fn gradients_of_others(&self, setting: &Setting<'_>) -> f64 {
        self.keys * setting.key_bytes() + self.queries * 2.0 * setting.query_bytes()
    }
}

impl Memory {
    /// Names of the parts, in the order of [`Memory::parts`].
    pub const NAMES: [&str; 8] = [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "layer at work",
        "logits",
        "attention of others",
        "transport buffers",
    ];

    /// The parts in order, bytes.
    pub fn parts(&self) -> [f64; 8] {
        [
            self.weights,
            self.gradients,
            self.optimizer,
            self.activations,
            self.layer_at_work,
            self.logits,
            self.attention,
            self.transport_buffers,
        ]
    }

    /// All of it, bytes.
    pub fn total(&self) -> f64 {
        self.parts().iter().sum()
    }

    /// The largest part: its name and its bytes.
    pub fn largest(&self) -> (&'static str, f64) {
        let named = Memory::NAMES.into_iter().zip(self.parts());
        named.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("nothing", 0.0))
    }

    /// What a device of `stage` needs that holds this.
    pub(crate) fn of(setting: &Setting<'_>, stage: usize, held: Held) -> Memory {
        let [weights, gradients, optimizer] = setting.model_bytes();
        let kept = token::kept(setting).with(setting.scenario.recompute);
        let layers = f64::from(setting.closing.layers);
        let layer = held.at_once * token::at_work(setting) + held.gradients_of_others(setting);
        let is_last = stage + 1 == setting.closing.stages;
        let head = if is_last { held.tokens * token::logits(setting) } else { 0.0 };
        let (layer_at_work, logits) = if layer < head { (0.0, head) } else { (layer, 0.0) };
        Memory {
            weights,
            gradients,
            optimizer,
            activations: held.tokens * held.in_flight * layers * kept,
            layer_at_work,
            logits,
            attention: held.kept_of_others(setting),
            transport_buffers: held.buffers,
        }
    }

    /// What a dedicated attention server needs.
    pub(crate) fn of_server(setting: &Setting<'_>, held: Held) -> Memory {
        Memory {
            layer_at_work: held.gradients_of_others(setting),
            attention: held.kept_of_others(setting),
            transport_buffers: held.buffers,
            ..Memory::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gpu, Layout, Mix, Model, Network, Recompute, Scenario, Tuning};

    fn scenario(layout: Layout, recompute: Recompute) -> Scenario {
        Scenario {
            model: Model::built_in("llama-8b").unwrap(),
            gpu: Gpu::built_in("h200").unwrap(),
            network: Network::default(),
            layout,
            context: 1 << 16,
            tokens: 1 << 20,
            mix: Mix::Pretrain,
            seed: 0,
            steps: 1,
            recompute,
            update: true,
            keep: false,
            nano_batches: 2,
            token_room: 1.0,
            tolerance: 0.0,
            delay: 1,
            token_slack: 0.0,
            tuning: Tuning::default(),
        }
    }

    fn memory(scenario: &Scenario, stage: usize, held: Held) -> Memory {
        Memory::of(&Setting::new(scenario, scenario.layout).unwrap(), stage, held)
    }

    fn held(tokens: f64) -> Held {
        Held { tokens, at_once: tokens, in_flight: 1.0, ..Held::default() }
    }

    #[test]
    fn the_head_and_the_layer_behind_it_are_at_work_one_after_the_other() {
        let pipeline = scenario(Layout { pipeline: 2, ..Layout::new(64, 8) }, Recompute::None);
        let [first, last] = [0, 1].map(|stage| memory(&pipeline, stage, held(1000.0)));
        assert!(first.layer_at_work > 0.0 && first.logits == 0.0, "{first:?}");
        assert!(last.layer_at_work == 0.0 && last.logits > first.layer_at_work, "{last:?}");
        // 128,256 logits in bf16 and f32 among 8 lanes, and a row of 4,096 elements.
        assert_eq!(last.logits, 1000.0 * (128_256.0 / 8.0 * 6.0 + 4096.0 * 2.0));
        let mut few_words = pipeline;
        few_words.model.vocabulary = 1000;
        let last = memory(&few_words, 1, held(1000.0));
        assert_eq!((last.layer_at_work, last.logits), (first.layer_at_work, 0.0));
    }

    #[test]
    fn what_is_computed_again_is_kept_of_no_layer_but_the_one_at_work() {
        let of = |recompute| memory(&scenario(Layout::new(64, 8), recompute), 0, held(1000.0));
        let [none, mlp, full] = [Recompute::None, Recompute::Mlp, Recompute::Full].map(of);
        assert!(none.activations > mlp.activations && mlp.activations > full.activations);
        // The input of each of 32 layers, 4,096 elements among 8 lanes.
        assert_eq!(full.activations, 1000.0 * 32.0 * 4096.0 / 8.0 * 2.0);
        // The norm that enters the MLP, and three times its width.
        let mlp_again = 1000.0 * (4096.0 + 3.0 * 14_336.0) / 8.0 * 2.0;
        assert_eq!(none.activations - mlp.activations, 32.0 * mlp_again);
        let layer = |recompute| {
            let pipeline = scenario(Layout { pipeline: 2, ..Layout::new(64, 8) }, recompute);
            memory(&pipeline, 0, held(1000.0)).layer_at_work
        };
        assert_eq!(layer(Recompute::Mlp) - layer(Recompute::None), mlp_again);
    }

    #[test]
    fn one_lane_gathers_no_rows() {
        let logits = |tensor| {
            memory(&scenario(Layout::new(64, tensor), Recompute::None), 0, held(1.0)).logits
                * f64::from(tensor)
        };
        assert_eq!(logits(8) - logits(1), 8.0 * 4096.0 * 2.0);
    }

    #[test]
    fn what_is_held_of_others_takes_the_same_on_a_dedicated_server() {
        let scenario = scenario(Layout::new(64, 8), Recompute::None);
        let setting = Setting::new(&scenario, scenario.layout).unwrap();
        let of_others = Held { keys: 100.0, queries: 10.0, layers: 32.0, buffers: 5e6, ..Held::default() };
        let (server, rank) = (Memory::of_server(&setting, of_others), Memory::of(&setting, 0, of_others));
        let [keys, queries] = [100.0 * 512.0, 10.0 * 1024.0];
        assert_eq!(server.attention, 32.0 * (keys + queries));
        assert_eq!(server.layer_at_work, keys + 2.0 * queries);
        assert_eq!(server.transport_buffers, 5e6);
        assert_eq!(
            [rank.attention, rank.layer_at_work, rank.transport_buffers],
            [server.attention, server.layer_at_work, server.transport_buffers]
        );
        assert_eq!(server.weights + server.gradients + server.optimizer + server.activations, 0.0);
    }
}
