//! Plans one step: documents in, placed tasks out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use outboard_attention::{Direction, Document, DocumentId, HeadGeometry, Mask, PlannedTask, StepPlan};
use outboard_planner::{Loads, Problem, Profile, TaskShape, Traffic, plan};

use crate::correction::{Power, relieve};
use crate::pace::Given;
use crate::placement::{Assignment, Load, place};
use crate::pool::Candidate;
use crate::server::ServerId;
use crate::slots::Footing;
use crate::{Error, JobId};

/// Most pairs of tasks that a release build compares to check a plan; a debug build checks every plan.
const MAX_CHECKED_PAIRS: usize = 1 << 20;

/// Everything a step's plan depends on.
#[derive(Clone, Debug)]
pub(crate) struct PlanInput {
    /// The run of the job.
    pub(crate) job: JobId,
    /// The job's name, for messages.
    pub(crate) name: Arc<str>,
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
    /// Most over mean attention cells of a rank, if every rank computed its own.
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
}

/// A step's plan with every task placed.
#[derive(Clone, Debug, Default)]
pub struct PlannedStep {
    /// Grows by one whenever slots are placed on other servers than before.
    pub plan_epoch: u64,
    /// Every task, in plan order.
    pub tasks: Vec<PlacedTask>,
    /// The servers of the plan, and those that may take over, in order of id.
    pub servers: Vec<Candidate>,
    /// Facts about the whole.
    pub summary: Summary,
    /// How many tasks are not on their slot's server because that is slow.
    pub corrected: u64,
    /// What each server is given.
    pub(crate) given: BTreeMap<ServerId, Given>,
    of_rank: BTreeMap<u32, Vec<usize>>,
}

impl PlannedStep {
    /// The tasks of documents that `rank` is a home of, in plan order.
    pub fn tasks_of(&self, rank: u32) -> impl Iterator<Item = &PlacedTask> {
        self.of_rank.get(&rank).into_iter().flatten().filter_map(|&n| self.tasks.get(n))
    }
}

/// Plans a step. The same input gives the same plan, its time apart.
pub(crate) fn plan_step(input: &PlanInput) -> Result<PlannedStep, Error> {
    let began = Instant::now();
    let place_name = || format!("job {}, step {}", input.name, input.step);
    let mut documents: Vec<Document> = input.submissions.iter().flat_map(|d| d.iter().cloned()).collect();
    documents.sort_unstable_by_key(Document::id);
    let slots = input.footing.planned_slots();
    let problem = Problem {
        tolerance: input.tolerance,
        rates: input.footing.rates,
        ..Problem::new(input.geometry, documents, slots)
    };
    let step = plan(&problem).map_err(|e| Error::invalid(format!("{}: {e}", place_name())))?;
    let documents = &problem.documents;
    if worth_checking(&step) {
        step.check(documents, &input.geometry).map_err(|e| {
            Error::internal(format!("{}: the planner made a wrong plan, please report it: {e}", place_name()))
        })?;
    }
    let Placed { tasks, corrected, given } = placed_tasks(input, &step, documents)?;
    let summary = summary(input, &step, &problem);
    let by_id: BTreeMap<DocumentId, &Document> = documents.iter().map(|d| (d.id(), d)).collect();
    let mut of_rank: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (n, placed) in tasks.iter().enumerate() {
        let homes = by_id.get(&placed.task.document).map_or(&[][..], |d| d.homes());
        for home in homes {
            let mine = of_rank.entry(home.rank).or_default();
            if mine.last() != Some(&n) {
                mine.push(n);
            }
        }
    }
    let summary = Summary { plan_seconds: began.elapsed().as_secs_f64(), ..summary };
    let (plan_epoch, servers) = (input.plan_epoch, input.servers.clone());
    Ok(PlannedStep { plan_epoch, tasks, servers, summary, corrected, given, of_rank })
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
        let nobody = || {
            Error::internal(format!(
                "job {}, step {}: slot {} has no server",
                input.name, input.step, task.slot
            ))
        };
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
    }
}
