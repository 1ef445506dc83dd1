//! Plans one step: documents in, placed tasks out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use outboard_attention::{Direction, Document, DocumentId, HeadGeometry, Mask, PlannedTask, StepPlan};
use outboard_planner::{Loads, PlanError, Problem, Profile, Settled, TaskShape, Traffic, plan, settle};

use crate::correction::{Power, relieve};
use crate::pace::Given;
use crate::parts::{Parts, check_rows, tokens_imbalance};
use crate::placement::{Assignment, Load, place};
use crate::pool::Candidate;
use crate::server::ServerId;
use crate::slots::Footing;
use crate::terms::Placement;
use crate::{Error, JobId};

/// Most pairs of tasks that a release build compares to check a plan; a debug build checks every plan.
const MAX_CHECKED_PAIRS: usize = 1 << 20;

/// Everything a step's plan depends on.
#[derive(Clone, Debug)]
pub(crate) struct PlanInput {
    /// The run of the job.
    pub(crate) job: JobId,
    /// The training step.
    pub(crate) step: u64,
    /// How many ranks the job has.
    pub(crate) ranks: u32,
    /// Heads of its layers.
    pub(crate) geometry: HeadGeometry,
    /// What the job runs with.
    pub(crate) footing: Arc<Footing>,
    /// Each rank's documents.
    pub(crate) submissions: Vec<Arc<Vec<Document>>>,
    /// Which servers fill the slots.
    pub(crate) assignment: Assignment,
    /// Grows by one with every other assignment.
    pub(crate) plan_epoch: u64,
    /// The servers that take the job's tasks, in order of id.
    pub(crate) servers: Vec<Candidate>,
    /// Of these the ones that are clearly slower than the others, each with its speed relative to them.
    pub(crate) slow: BTreeMap<ServerId, f64>,
    /// How far the busiest slot may lie above the mean, as a fraction of it, in a job that declares no rates.
    pub(crate) tolerance: f64,
}

/// A task and the server that computes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedTask {
    /// Nano-batch.
    pub tick: u32,
    /// The task.
    pub task: PlannedTask,
    /// Who computes it.
    pub server: ServerId,
}

/// Facts about a whole plan.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Summary {
    /// Most over mean attention cells of a rank, if every rank computed the rows that it is home of.
    pub imbalance_before: f64,
    /// Most over mean attention cells of a slot, by weight.
    pub imbalance_after: f64,
    /// Tasks of all ranks, of one layer and direction.
    pub tasks: u64,
    /// Cells of all ranks, of one layer and direction, each counted once per kv head.
    pub cells: u64,
    /// Wall time of planning, in seconds.
    pub plan_seconds: f64,
    /// Bytes that move between ranks and servers in one layer, forward.
    pub forward_bytes: u64,
    /// The same, backward.
    pub backward_bytes: u64,
    /// With placement: most over mean tokens of a rank, in the tick where that is most. 0 without.
    pub tokens_imbalance: f64,
}

/// A step's plan with every task placed.
#[derive(Clone, Debug, Default)]
pub struct PlannedStep {
    /// Grows by one whenever slots are placed on other servers than before.
    pub plan_epoch: u64,
    /// Every task, in plan order.
    pub tasks: Vec<PlacedTask>,
    /// With placement: every document with its homes, in order of id. None without.
    pub documents: Vec<Document>,
    /// The servers of the plan, and those that may take over, in order of id.
    pub servers: Vec<Candidate>,
    /// Facts about the whole.
    pub summary: Summary,
    /// How many tasks are not on their slot's server because that is slow.
    pub corrected: u64,
    /// What each server is given.
    pub(crate) given: BTreeMap<ServerId, Given>,
    parts: Parts,
}

impl PlannedStep {
    /// The tasks whose queries or keys `rank` is home of, in plan order, each once.
    pub fn tasks_of(&self, rank: u32) -> impl Iterator<Item = &PlacedTask> {
        self.parts.tasks_of(rank).filter_map(|n| self.tasks.get(n))
    }

    /// The documents that `rank` is home of tokens of, in order of id. None without placement.
    pub fn documents_of(&self, rank: u32) -> impl Iterator<Item = &Document> {
        self.parts.documents_of(rank).filter_map(|n| self.documents.get(n))
    }
}

/// Plans a step. The same input gives the same plan, its time apart.
pub(crate) fn plan_step(input: &PlanInput) -> Result<PlannedStep, Error> {
    planned_step(input).map_err(|error| error.context(format_args!("step {}", input.step)))
}

fn planned_step(input: &PlanInput) -> Result<PlannedStep, Error> {
    let began = Instant::now();
    let (problem, step) = settled(input)?;
    check_plan(input, &problem, &step)?;
    let Placed { tasks, corrected, given } = placed_tasks(input, &step, &problem.documents)?;
    let summary = summary(input, &step, &problem);
    let parts = Parts::new(&problem.documents, tasks.iter().map(|placed| &placed.task));
    let documents = input.footing.placement.map_or_else(Vec::new, |_| problem.documents);
    let summary = Summary { plan_seconds: began.elapsed().as_secs_f64(), ..summary };
    let (plan_epoch, servers) = (input.plan_epoch, input.servers.clone());
    Ok(PlannedStep { plan_epoch, tasks, documents, servers, summary, corrected, given, parts })
}

/// The step's problem, all of whose documents have homes, and its plan.
fn settled(input: &PlanInput) -> Result<(Problem, StepPlan), Error> {
    let mut documents: Vec<Document> = input.submissions.iter().flat_map(|d| d.iter().cloned()).collect();
    documents.sort_unstable_by_key(Document::id);
    let Footing { rates, placement, .. } = *input.footing;
    let slots = input.footing.planned_slots();
    let tolerance = input.tolerance;
    let ranks = if placement.is_some() { input.ranks } else { 0 };
    let problem = Problem { tolerance, rates, ranks, ..Problem::new(input.geometry, documents, slots) };
    let settled = match placement {
        Some(Placement { token_slack }) => settle(&problem, token_slack).map_err(refused)?,
        None => {
            let plan = plan(&problem).map_err(refused)?;
            return Ok((problem, plan));
        }
    };
    let Settled { documents, plan } = settled;
    Ok((Problem { documents, ..problem }, plan))
}

fn refused(error: PlanError) -> Error {
    match error {
        PlanError::BadHomes(_) => Error::internal(error.to_string()),
        _ => Error::invalid(error.to_string()),
    }
}

/// Nothing is trained on a plan that leaves cells out, or that no rank could ship.
fn check_plan(input: &PlanInput, problem: &Problem, step: &StepPlan) -> Result<(), Error> {
    let documents = &problem.documents;
    let wrong =
        |what: String| Error::internal(format!("the planner made a wrong plan, please report it: {what}"));
    if worth_checking(step) {
        step.check(documents, &input.geometry).map_err(|error| wrong(error.to_string()))?;
    }
    check_rows(documents, step).map_err(wrong)
}

/// The check compares all pairs of a document's tasks, which is dear for long documents on many slots.
fn worth_checking(step: &StepPlan) -> bool {
    let mut counts: BTreeMap<DocumentId, usize> = BTreeMap::new();
    for (_, task) in step.tasks() {
        *counts.entry(task.document).or_default() += 1;
    }
    cfg!(debug_assertions) || counts.values().map(|n| n * n / 2).sum::<usize>() <= MAX_CHECKED_PAIRS
}

/// Tasks on their servers.
struct Placed {
    tasks: Vec<PlacedTask>,
    corrected: u64,
    given: BTreeMap<ServerId, Given>,
}

fn placed_tasks(input: &PlanInput, step: &StepPlan, documents: &[Document]) -> Result<Placed, Error> {
    let kv_heads = input.geometry.kv_heads();
    let masks: BTreeMap<DocumentId, Mask> = documents.iter().map(|d| (d.id(), d.mask(kv_heads))).collect();
    let profile = profile(&input.footing.numerics_id);
    let load = |(tick, task): (u32, &PlannedTask)| {
        let mask = masks.get(&task.document);
        let cells = mask.map_or(0, |m| m.clip(task.q, task.kv, task.kv_heads).cells());
        Load { tick, slot: task.slot, cells, work: work(input, profile.as_ref(), task, cells) }
    };
    let loads: Vec<Load> = step.tasks().map(load).collect();
    let mut servers = place(&loads, &input.footing.slots, &input.assignment);
    let takers = input.servers.iter().map(|(id, _)| *id);
    let powers = Power::of_all(takers, &input.footing.slots, &input.assignment, &input.slow);
    let corrected = relieve(&loads, &powers, &mut servers);
    let mut given: BTreeMap<ServerId, Given> = BTreeMap::new();
    for (load, id) in loads.iter().zip(&servers) {
        if let Some((id, power)) = id.and_then(|id| Some((id, powers.get(&id)?))) {
            let given = given.entry(id).or_default();
            given.tasks += 1;
            given.seconds += load.work / power.weight;
        }
    }
    let placed = step.tasks().zip(servers).map(|((tick, &task), server)| {
        let nobody = || Error::internal(format!("slot {} has no server", task.slot));
        Ok(PlacedTask { tick, task, server: server.ok_or_else(nobody)? })
    });
    Ok(Placed { tasks: placed.collect::<Result<_, Error>>()?, corrected, given })
}

/// A profile of servers of this numerics id. They are compared with each other only, so that any like them will do.
fn profile(numerics_id: &str) -> Option<Profile> {
    Profile::built_in(if numerics_id.starts_with("cuda") { "h200" } else { "cpu" })
}

/// Predicted seconds of a task of so many cells, forward and backward.
fn work(input: &PlanInput, profile: Option<&Profile>, task: &PlannedTask, cells: u64) -> f64 {
    let geometry = &input.geometry;
    let rows = task.q.len().saturating_mul(geometry.group());
    let shape = TaskShape { rows, keys: task.kv.len(), cells };
    let passes = [Direction::Forward, Direction::Backward];
    profile.map_or(cells.max(1) as f64, |p| passes.map(|pass| p.seconds(geometry, pass, shape)).iter().sum())
}

fn summary(input: &PlanInput, step: &StepPlan, problem: &Problem) -> Summary {
    let (documents, geometry) = (&problem.documents, &input.geometry);
    let after = Loads::planned(step, documents, geometry);
    let traffic = Traffic::of(step, problem);
    let weight = |slot: usize| problem.slots.get(slot).map_or(1.0, |s| s.weight);
    Summary {
        imbalance_before: Loads::at_home(documents, geometry, input.ranks as usize).max_over_mean(),
        imbalance_after: after.max_over_mean_by(weight),
        tasks: step.tasks().count() as u64,
        cells: after.totals().iter().fold(0, |sum: u64, &cells| sum.saturating_add(cells)),
        plan_seconds: 0.0,
        forward_bytes: traffic.forward.total,
        backward_bytes: traffic.backward.total,
        tokens_imbalance: input.footing.placement.map_or(0.0, |_| tokens_imbalance(documents, input.ranks)),
    }
}
