//! How a job is laid out over GPUs.

use crate::error::in_range;
use crate::{Model, SimulationError};

/// How the GPUs of a job are shared among tensor, pipeline and data parallelism.
///
/// GPUs are numbered with the lanes of tensor parallelism innermost, then ranks, then stages; dedicated attention
/// servers come last. A *rank* is one place of data and context parallelism; with `pipeline` stages it has a device on each.
/// All `tensor` lanes of a device do the same, so one lane of each is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// All GPUs, those of dedicated attention servers among them.
    pub gpus: u32,
    /// Lanes of tensor parallelism.
    pub tensor: u32,
    /// Stages of the pipeline.
    pub pipeline: u32,
    /// Context parallelism: ranks that share a sequence; it divides the ranks. `None` where the policy chooses, or has no notion of it.
    pub context: Option<u32>,
    /// GPUs that do nothing but core attention, a multiple of the lanes; 0 where ranks' own devices serve it.
    pub dedicated: u32,
    /// Micro-batches of a step.
    pub micro_batches: u32,
}

/// Largest number of GPUs.
const MAX_GPUS: u32 = 1 << 20;

impl Layout {
    /// Lanes of a node and nothing else but data parallelism.
    pub fn new(gpus: u32, tensor: u32) -> Layout {
        Layout { gpus, tensor, pipeline: 1, context: None, dedicated: 0, micro_batches: 1 }
    }

    /// Ranks of data and context parallelism.
    pub fn ranks(&self) -> u32 {
        (self.gpus.saturating_sub(self.dedicated)) / self.tensor.saturating_mul(self.pipeline).max(1)
    }

    /// Devices of the model: ranks times stages. Those of dedicated servers follow.
    pub fn model_devices(&self) -> u32 {
        self.ranks() * self.pipeline
    }

    /// All devices, of one lane.
    pub fn devices(&self) -> u32 {
        self.model_devices() + self.dedicated / self.tensor.max(1)
    }

    /// Layers of a stage of `model`.
    pub fn stage_layers(&self, model: &Model) -> u32 {
        model.layers / self.pipeline.max(1)
    }

    /// Checks that everything multiplies out, and that the model's heads and layers divide.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, model: &Model) -> Result<(), SimulationError> {
        let Layout { gpus, tensor, pipeline, context, dedicated, micro_batches } = *self;
        let most = f64::from(MAX_GPUS);
        for (field, value) in
            [("gpus", gpus), ("tensor", tensor), ("pipeline", pipeline), ("micro_batches", micro_batches)]
        {
            in_range(&format!("layout.{field}"), f64::from(value), 1.0, most)?;
        }
        let bad = |what: String| Err(SimulationError::Layout(what));
        if dedicated >= gpus {
            return bad(format!("{dedicated} dedicated GPUs of {gpus} leave none for the model"));
        }
        if !dedicated.is_multiple_of(tensor) {
            return bad(format!(
                "{dedicated} dedicated GPUs are no multiple of the {tensor} lanes of tensor parallelism; each server has a GPU in every lane"
            ));
        }
        let block = u64::from(tensor) * u64::from(pipeline);
        let of_model = gpus - dedicated;
        if !u64::from(of_model).is_multiple_of(block) {
            return bad(format!(
                "{of_model} GPUs of the model are no multiple of tensor {tensor} times pipeline {pipeline}; {} or {} are",
                u64::from(of_model) / block * block,
                (u64::from(of_model) / block + 1) * block
            ));
        }
        let ranks = self.ranks();
        if let Some(context) = context
            && !(context > 0 && ranks.is_multiple_of(context))
        {
            return bad(format!(
                "context parallelism {context} does not divide the {ranks} ranks that tensor {tensor} and pipeline {pipeline} leave of {of_model} GPUs"
            ));
        }
        if !model.layers.is_multiple_of(pipeline) {
            return bad(format!(
                "pipeline {pipeline} does not divide the {} layers of {}",
                model.layers, model.name
            ));
        }
        model.heads(tensor).map(|_| ())
    }
}
