//! Which of cuDNN's engines computes a graph, and plans by it.
//!
//! cuDNN's heuristics are asked once for a geometry and direction, at fixed bounds. Whatever they choose then computes
//! every call, so that a task's bits never depend on what it is batched with.

use std::sync::Arc;

use outboard_attention::Direction;
use serde::{Deserialize, Serialize};

use crate::CudaError;
use crate::cudnn::names::{HEURISTICS_A, KNOB_STAGES, attribute, kind, value};
use crate::cudnn::{Cudnn, Descriptor, Handle};
use crate::graph::Graph;

/// An engine and its knobs: `(type, value)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Engine {
    pub(crate) index: i64,
    pub(crate) knobs: Vec<(i32, i64)>,
    /// True when equal inputs give equal bits.
    pub(crate) deterministic: bool,
}

/// The value of the stages knob at which the backward engine of cuDNN 9.25 and later adds up dQ in a fixed order.
const ORDERED_STAGES: i64 = 4;

/// Knobs of an engine at most.
const MAX_KNOBS: usize = 64;
/// Engine configurations that the heuristics are asked for.
const MAX_CONFIGS: usize = 16;

/// What plans are built for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    /// The device of a handle.
    Device(&'a Handle),
    /// A device that is described, and need not be there.
    Described(&'a Descriptor),
}

impl Target<'_> {
    pub(crate) fn handle(&self) -> Option<&Handle> {
        match self {
            Target::Device(handle) => Some(handle),
            Target::Described(_) => None,
        }
    }

    /// Sets whichever of the two attributes applies.
    fn set_on(&self, descriptor: &Descriptor, handle: i32, properties: i32) -> Result<(), CudaError> {
        match self {
            Target::Device(device) => descriptor.set_handle(handle, device).map(|_| ()),
            Target::Described(device) => descriptor.set_descriptors(properties, &[device]).map(|_| ()),
        }
    }
}

/// Describes a device by what [`device_properties`](crate::cudnn::device_properties) wrote.
pub(crate) fn describe(cudnn: &Arc<Cudnn>, json: &str) -> Result<Descriptor, CudaError> {
    let properties = Descriptor::new(cudnn, kind::DEVICE_PROPERTIES)?;
    properties.set(attribute::DEVICE_JSON, json.as_bytes())?;
    properties.finalize(|| "describing a device".to_owned())?;
    Ok(properties)
}

/// A plan that is ready to be executed.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) descriptor: Descriptor,
    /// Bytes of device memory that a call needs besides its tensors.
    pub(crate) workspace: usize,
    /// Sequences that a call has, at most: tables have this many entries.
    pub(crate) sequences: usize,
    /// The plan refers to its graph.
    _graph: Option<Graph>,
}

impl Plan {
    /// As cuDNN writes it down, machine code included.
    pub(crate) fn json(&self) -> Result<String, CudaError> {
        self.descriptor.text(attribute::PLAN_JSON)
    }
}

/// Asks the heuristics for an engine that computes `graph`; for `deterministic`, one that sums in a fixed order, or none.
pub(crate) fn choose(
    cudnn: &Arc<Cudnn>,
    graph: &Graph,
    direction: Direction,
    deterministic: bool,
    target: Target<'_>,
) -> Result<Engine, CudaError> {
    let heuristics = Descriptor::new(cudnn, kind::ENGINE_HEURISTICS)?;
    heuristics.set_descriptors(attribute::HEURISTICS_GRAPH, &[&graph.graph])?.set_enum(
        attribute::HEURISTICS_MODE,
        value::HEURISTICS_MODE,
        HEURISTICS_A,
    )?;
    if let Target::Described(device) = target {
        heuristics.set_descriptors(attribute::HEURISTICS_DEVICE, &[device])?;
    }
    heuristics.finalize(|| "asking the heuristics".to_owned())?;
    let mut tried = Vec::new();
    for config in heuristics.list(attribute::HEURISTICS_RESULTS, kind::ENGINE_CONFIG, MAX_CONFIGS)? {
        // Forward, no engine adds in an order that is not fixed.
        let fixed = direction == Direction::Forward;
        let engine = Engine { deterministic: fixed, ..read(&config)? };
        if deterministic && !fixed {
            let mut ordered = Engine { deterministic: true, ..engine.clone() };
            ordered.knobs.retain(|(knob, _)| *knob != KNOB_STAGES);
            ordered.knobs.push((KNOB_STAGES, ORDERED_STAGES));
            match finalize(cudnn, graph, &ordered, target) {
                Ok(_) => return Ok(ordered),
                Err(error) => tried.push(error.to_string()),
            }
            continue;
        }
        match finalize(cudnn, graph, &engine, target) {
            Ok(_) => return Ok(engine),
            Err(error) => tried.push(error.to_string()),
        }
    }
    let message = if tried.is_empty() { "it knows none".to_owned() } else { tried.join("; ") };
    Err(CudaError::NoEngine { direction, message })
}

/// The engine and knobs of a configuration.
fn read(config: &Descriptor) -> Result<Engine, CudaError> {
    let engines = config.list(attribute::CONFIG_ENGINE, kind::ENGINE, 1)?;
    let index = match engines.first() {
        Some(engine) => engine.get::<i64>(attribute::ENGINE_INDEX)?,
        None => 0,
    };
    let mut knobs = Vec::new();
    for knob in config.list(attribute::CONFIG_KNOBS, kind::KNOB_CHOICE, MAX_KNOBS)? {
        let kind = knob.get_enum(attribute::KNOB_TYPE, value::KNOB_TYPE)?;
        knobs.push((kind, knob.get::<i64>(attribute::KNOB_VALUE)?));
    }
    Ok(Engine { index, knobs, deterministic: false })
}

/// Builds the plan of `graph` by `engine`: compiles it, which takes up to seconds.
pub(crate) fn plan(
    cudnn: &Arc<Cudnn>,
    graph: Graph,
    engine: &Engine,
    target: Target<'_>,
) -> Result<Plan, CudaError> {
    let descriptor = finalize(cudnn, &graph, engine, target)?;
    let sequences = graph.sequences;
    Plan::of(descriptor, sequences, Some(graph))
}

/// Restores a plan from [`Plan::json`], for the same version of cuDNN and the same kind of device.
pub(crate) fn restore(
    cudnn: &Arc<Cudnn>,
    json: &str,
    sequences: usize,
    target: Target<'_>,
) -> Result<Plan, CudaError> {
    let descriptor = Descriptor::new(cudnn, kind::EXECUTION_PLAN)?;
    target.set_on(&descriptor, attribute::PLAN_HANDLE, attribute::PLAN_DEVICE)?;
    descriptor.set(attribute::PLAN_JSON, json.as_bytes())?;
    descriptor.finalize(|| "restoring a plan".to_owned())?;
    Plan::of(descriptor, sequences, None)
}

impl Plan {
    fn of(descriptor: Descriptor, sequences: usize, graph: Option<Graph>) -> Result<Plan, CudaError> {
        let workspace = descriptor.get::<i64>(attribute::PLAN_WORKSPACE)?;
        Ok(Plan { descriptor, workspace: usize::try_from(workspace).unwrap_or(0), sequences, _graph: graph })
    }
}

fn finalize(
    cudnn: &Arc<Cudnn>,
    graph: &Graph,
    engine: &Engine,
    target: Target<'_>,
) -> Result<Descriptor, CudaError> {
    let chosen = Descriptor::new(cudnn, kind::ENGINE)?;
    chosen
        .set_descriptors(attribute::ENGINE_GRAPH, &[&graph.graph])?
        .set(attribute::ENGINE_INDEX, &[engine.index])?;
    if let Target::Described(device) = target {
        chosen.set_descriptors(attribute::ENGINE_DEVICE, &[device])?;
    }
    chosen.finalize(|| format!("choosing engine {}", engine.index))?;
    let mut knobs = Vec::new();
    for &(kind, value) in &engine.knobs {
        let knob = Descriptor::new(cudnn, kind::KNOB_CHOICE)?;
        knob.set_enum(attribute::KNOB_TYPE, value::KNOB_TYPE, kind)?.set(attribute::KNOB_VALUE, &[value])?;
        knob.finalize(|| format!("setting knob {kind} to {value}"))?;
        knobs.push(knob);
    }
    let config = Descriptor::new(cudnn, kind::ENGINE_CONFIG)?;
    config.set_descriptors(attribute::CONFIG_ENGINE, &[&chosen])?;
    if !knobs.is_empty() {
        config.set_descriptors(attribute::CONFIG_KNOBS, &knobs.iter().collect::<Vec<_>>())?;
    }
    config.finalize(|| format!("configuring engine {} with {:?}", engine.index, engine.knobs))?;
    let plan = Descriptor::new(cudnn, kind::EXECUTION_PLAN)?;
    target.set_on(&plan, attribute::PLAN_HANDLE, attribute::PLAN_DEVICE)?;
    plan.set_descriptors(attribute::PLAN_CONFIG, &[&config])?;
    plan.finalize(|| format!("building a plan by engine {} with {:?}", engine.index, engine.knobs))?;
    Ok(plan)
}
