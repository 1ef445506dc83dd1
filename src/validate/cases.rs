//! The published figures of `validation/`, which are part of this program.

use anyhow::Context;
use outboard_simulator::{Gpu, Layout, Mix, Model, Network, Recompute, Scenario, Tuning};
use serde::Deserialize;

const PUBLISHED: &str = include_str!("../../validation/distca.json");
/// Seed of the documents.
const SEED: u64 = 1;
/// Memory is not limited: what was published fitted.
const MEMORY: f64 = 1e15;

/// All that was published of one system, and what is assumed where it is silent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Published {
    pub(super) source: String,
    pub(super) repository: String,
    gpu: String,
    tensor: u32,
    recompute: String,
    /// What a model that knows nothing would predict.
    pub(super) null: f64,
    pub(super) assumptions: Vec<Assumption>,
    pub(super) groups: Vec<Group>,
    pub(super) measured: Vec<Measured>,
}

/// Something that is not published.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Assumption {
    pub(super) what: String,
    pub(super) taken: String,
    pub(super) tried: String,
    pub(super) published: String,
}

/// Runs of which the smallest and the largest gain are published.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Group {
    pub(super) name: String,
    pub(super) section: String,
    model: String,
    mix: String,
    pub(super) pipeline: u32,
    /// Smallest and largest gain of DistCA over WLB.
    pub(super) published: [Option<f64>; 2],
    /// Whether the simulator's parameters are fitted to it.
    pub(super) fitted: bool,
    steps: u32,
    /// Ranks that may share a sequence under WLB.
    pub(super) contexts: Vec<u32>,
    tolerance: f64,
    /// `None` is one over the number of micro-batches.
    token_room: Option<f64>,
    pub(super) cases: Vec<Case>,
}

/// One run of a group.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    pub(super) gpus: u32,
    pub(super) context: usize,
    sequences: u64,
    micro_batches: u32,
}

/// Steps that were measured, mean seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Measured {
    pub(super) model: String,
    layers: u32,
    pub(super) mix: String,
    pub(super) gpus: u32,
    pub(super) context: usize,
    sequences: u64,
    steps: u32,
    update: bool,
    pub(super) distca: Option<f64>,
    pub(super) wlb: Vec<MeasuredWlb>,
}

/// The same of one choice of WLB.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MeasuredWlb {
    pub(super) context: u32,
    pub(super) seconds: f64,
}

impl Published {
    /// What is built in.
    pub(super) fn built_in() -> anyhow::Result<Published> {
        serde_json::from_str(PUBLISHED).context("validation/distca.json")
    }

    /// A run of a group.
    pub(super) fn scenario(&self, group: &Group, case: Case) -> anyhow::Result<Scenario> {
        let layout = Layout {
            pipeline: group.pipeline,
            micro_batches: case.micro_batches,
            ..Layout::new(case.gpus, self.tensor)
        };
        Ok(Scenario {
            layout,
            context: case.context,
            tokens: case.sequences * case.context as u64,
            steps: group.steps,
            tolerance: group.tolerance,
            token_room: group.token_room.unwrap_or(1.0 / f64::from(case.micro_batches)),
            ..self.common(&group.model, &group.mix)?
        })
    }

    /// Steps that were measured.
    pub(super) fn measured(&self, measured: &Measured) -> anyhow::Result<Scenario> {
        let common = self.common(&measured.model, &measured.mix)?;
        Ok(Scenario {
            model: Model { layers: measured.layers, ..common.model },
            layout: Layout::new(measured.gpus, self.tensor),
            context: measured.context,
            tokens: measured.sequences * measured.context as u64,
            steps: measured.steps,
            update: measured.update,
            ..common
        })
    }

    /// What all runs have in common.
    pub(super) fn common(&self, model: &str, mix: &str) -> anyhow::Result<Scenario> {
        let unknown = |what: &str, name: &str| format!("validation/distca.json: no {what} {name}");
        let gpu = Gpu::built_in(&self.gpu).with_context(|| unknown("gpu", &self.gpu))?;
        Ok(Scenario {
            model: Model::built_in(model).with_context(|| unknown("model", model))?,
            gpu: Gpu { memory_bytes: MEMORY, ..gpu },
            network: Network::default(),
            layout: Layout::new(8, self.tensor),
            context: 1 << 19,
            tokens: 1 << 20,
            mix: Mix::built_in(mix).with_context(|| unknown("mix", mix))?,
            seed: SEED,
            steps: 10,
            recompute: Recompute::named(&self.recompute)
                .with_context(|| unknown("recompute", &self.recompute))?,
            update: false,
            keep: false,
            nano_batches: 2,
            token_room: 1.0,
            tolerance: 0.05,
            delay: 1,
            token_slack: 0.02,
            tuning: Tuning::default(),
        })
    }
}
