//! The published figures of `validation/`, which are part of this program.

use anyhow::{Context, ensure};
use outboard_simulator::{Gpu, Layout, Mix, Model, Network, Recompute, Scenario, Tuning};
use serde::Deserialize;

use super::documents::{Documents, steps_of};

const PUBLISHED: &str = include_str!("../../validation/distca.json");
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
    documents: String,
    pub(super) pipeline: u32,
    /// Smallest and largest gain of DistCA over WLB.
    pub(super) published: [Option<f64>; 2],
    /// Whether the simulator's parameters are fitted to it.
    pub(super) fitted: bool,
    /// Steps that are averaged, or fewer where there are no more documents.
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
    /// Whether there is memory for all of a step at once, so that both may do without a pipeline.
    #[serde(default)]
    one_stage: bool,
}

/// Steps that were measured, mean seconds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Measured {
    pub(super) model: String,
    layers: u32,
    pub(super) documents: String,
    pub(super) gpus: u32,
    pub(super) pipeline: u32,
    micro_batches: u32,
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

    /// A run of a group, by each number of stages that it may have.
    pub(super) fn scenarios(
        &self,
        group: &Group,
        case: Case,
        documents: &Documents,
    ) -> anyhow::Result<Vec<Scenario>> {
        let mix = documents.mix(&group.documents, case.context)?;
        let tokens = case.sequences * case.context as u64;
        let common = Scenario {
            layout: Layout { pipeline: group.pipeline, ..Layout::new(case.gpus, self.tensor) },
            context: case.context,
            tokens,
            steps: group.steps.min(steps_of(&mix, tokens)),
            tolerance: group.tolerance,
            ..self.common(&group.model, mix)?
        };
        let by = |pipeline: u32, micro_batches: u32| Scenario {
            layout: Layout { pipeline, micro_batches, ..common.layout },
            token_room: group.token_room.unwrap_or(1.0 / f64::from(micro_batches)),
            ..common.clone()
        };
        let mut scenarios = vec![by(group.pipeline, case.micro_batches)];
        if case.one_stage {
            scenarios.push(by(1, 1));
        }
        Ok(scenarios)
    }

    /// Steps that were measured.
    pub(super) fn measured(&self, measured: &Measured, documents: &Documents) -> anyhow::Result<Scenario> {
        let mix = documents.mix(&measured.documents, measured.context)?;
        let Measured { pipeline, micro_batches, steps, .. } = *measured;
        let tokens = measured.sequences * measured.context as u64;
        let there = steps_of(&mix, tokens);
        let common = self.common(&measured.model, mix)?;
        ensure!(steps <= there, "validation/distca.json: {steps} steps, and documents for {there}");
        Ok(Scenario {
            model: Model { layers: measured.layers, ..common.model },
            layout: Layout { pipeline, micro_batches, ..Layout::new(measured.gpus, self.tensor) },
            context: measured.context,
            tokens,
            steps,
            update: measured.update,
            token_room: 1.0 / f64::from(micro_batches),
            ..common
        })
    }

    /// What all runs have in common.
    pub(super) fn common(&self, model: &str, mix: Mix) -> anyhow::Result<Scenario> {
        let unknown = |what: &str, name: &str| format!("validation/distca.json: no {what} {name}");
        let gpu = Gpu::built_in(&self.gpu).with_context(|| unknown("gpu", &self.gpu))?;
        Ok(Scenario {
            model: Model::built_in(model).with_context(|| unknown("model", model))?,
            gpu: Gpu { memory_bytes: MEMORY, ..gpu },
            network: Network::default(),
            layout: Layout::new(8, self.tensor),
            context: 1 << 19,
            tokens: 1 << 20,
            mix,
            seed: 1,
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
