//! Attention servers: core attention of all ranks, and of all stages of a pipeline, computed by a pool.
//!
//! `outboard` is what the rest of this repository does: `outboard_planner::settle` chooses homes and plans
//! (`outboard-fixed-homes`: `plan`, documents laid out over ranks in order); a server starts when what it needs is there, and
//! a rank goes on when what it needs is. Where more than a tenth of a step waits for bytes, plans count on the links' speed or
//! on half of it, whichever makes shorter steps. `distca` is DistCA (arXiv 2510.18121; its planner as in `outboard_planner::plan_by`),
//! documents laid out in order, every transfer a barrier of all (`distca` code, all-to-all). Both work on two nano-batches
//! that take turns, and, with a pipeline, all stages do the same at one time.
//!
//! Simplified: a plan is the same for all layers and micro-batches with equal documents; results travel in the element type.

mod homes;
mod pace;
mod served;

use outboard_planner::{Loads, PlanError};

use super::{Planned, Policy};
use crate::SimulationError;
use crate::batch::cells;
use crate::engine::Program;
use crate::memory::Held;
use crate::phase::{Nano, Phase};
use crate::scenario::Sequences;
use crate::setting::Setting;

use homes::{Group, placed};
use served::{Served, serve};

pub(super) fn plan_step(
    setting: &Setting<'_>,
    policy: Policy,
    batch: &Sequences,
) -> Result<Planned, SimulationError> {
    let wrong = |source| SimulationError::Plan { policy: policy.to_string(), source };
    let groups = micro_batches(setting, policy, batch)
        .into_iter()
        .map(|nanos| nanos.into_iter().map(|lengths| placed(setting, policy, &lengths)).collect())
        .collect::<Result<Vec<Vec<Group>>, PlanError>>()
        .map_err(wrong)?;
    let stages = setting.closing.stages;
    let count = groups.len();
    let mut tally = Tally::new(setting);
    let mut phases = [Vec::new(), Vec::new()];
    for (backward, phases) in [false, true].into_iter().zip(&mut phases) {
        for n in 0..count + stages - 1 {
            if backward && stages == 1 {
                break;
            }
            let in_hand = |stage: usize| {
                let micro_batch =
                    if backward { (n + stage).checked_sub(stages - 1) } else { n.checked_sub(stage) };
                micro_batch.and_then(|micro_batch| groups.get(micro_batch))
            };
            let active: Vec<(usize, &Vec<Group>)> =
                (0..stages).filter_map(|stage| Some((stage, in_hand(stage)?))).collect();
            phases.push(phase(setting, policy, &active, backward, &mut tally).map_err(wrong)?);
        }
    }
    let [forward, mut backward] = phases;
    if stages == 1 {
        backward.clone_from(&forward);
    }
    for nanos in &groups {
        tally.count(nanos);
    }
    Ok(tally.planned(setting, count, Program::Together { forward, backward }))
}

/// The documents of each micro-batch, in nano-batches: whole sequences where there are enough, else documents.
fn micro_batches(setting: &Setting<'_>, policy: Policy, batch: &Sequences) -> Vec<Vec<Vec<usize>>> {
    let nanos = setting.scenario.nano_batches as usize;
    let parts = nanos * setting.layout.micro_batches as usize;
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); parts];
    if policy == Policy::Distca && batch.len() >= parts {
        // In the order in which they come.
        for (n, sequence) in batch.iter().enumerate() {
            groups[n * parts / batch.len()].extend(sequence);
        }
    } else if parts == 1 {
        groups[0].extend(batch.iter().flatten());
    } else {
        // Longest first, each where there are the fewest tokens, and of these the least work.
        let mut documents: Vec<usize> = batch.iter().flatten().copied().collect();
        documents.sort_unstable_by(|a, b| b.cmp(a));
        let mut sums = vec![(0usize, 0u64); parts];
        for tokens in documents {
            let least = (0..parts).min_by_key(|&n| sums[n]).unwrap_or(0);
            sums[least].0 += tokens;
            sums[least].1 += cells(tokens);
            groups[least].push(tokens);
        }
    }
    groups.chunks(nanos).map(<[_]>::to_vec).collect()
}

/// What is computed at one time: each active stage's micro-batch.
fn phase(
    setting: &Setting<'_>,
    policy: Policy,
    active: &[(usize, &Vec<Group>)],
    backward_only: bool,
    tally: &mut Tally,
) -> Result<Phase, PlanError> {
    let nanos = (0..setting.scenario.nano_batches as usize).map(|nano| {
        let groups: Vec<(usize, &Group)> =
            active.iter().filter_map(|(stage, groups)| Some((*stage, groups.get(nano)?))).collect();
        let served = serve(setting, policy, &groups)?;
        tally.add(setting, &served, backward_only);
        Ok(served.nano)
    });
    let phase = Phase { nanos: nanos.collect::<Result<_, PlanError>>()? };
    tally.hold(setting, &phase);
    Ok(phase)
}

/// What is known of a step once all of it is planned.
#[derive(Debug)]
struct Tally {
    cells: Vec<u64>,
    held: Vec<Held>,
    most: f64,
    mean: f64,
    /// Tokens of each rank, the most of a micro-batch and of a nano-batch.
    tokens: Vec<[f64; 2]>,
}

impl Tally {
    fn new(setting: &Setting<'_>) -> Tally {
        let devices = setting.devices();
        Tally {
            cells: vec![0; devices],
            held: vec![Held::default(); devices],
            most: 0.0,
            mean: 0.0,
            tokens: vec![[0.0; 2]; setting.ranks()],
        }
    }

    /// Adds a nano-batch of one phase. Those of the backward pass alone compute nothing that forward ones have not.
    fn add(&mut self, setting: &Setting<'_>, served: &Served, backward_only: bool) {
        let Served { nano, plan, problem, first } = served;
        let servers = problem.slots.len() as f64;
        for (attend, counts) in
            [(&nano.forward, !backward_only), (&nano.backward, backward_only || setting.closing.stages == 1)]
        {
            if counts {
                self.most += attend.seconds.iter().copied().fold(0.0, f64::max);
                self.mean += attend.seconds.iter().sum::<f64>() / servers;
            }
        }
        if !backward_only {
            let loads = Loads::planned(plan, &problem.documents, &problem.geometry).totals();
            for (slot, load) in loads.into_iter().enumerate() {
                self.cells[first + slot] += load;
            }
        }
    }

    /// Adds what devices hold of others' tokens while a phase is computed, or until the backward pass where it is kept: Q, K
    /// and V, by their bytes; and what lies in the buffers of the transport, for each nano-batch the most that goes out and
    /// the most that comes in at one time.
    fn hold(&mut self, setting: &Setting<'_>, phase: &Phase) {
        let bytes = setting.key_bytes() + setting.query_bytes();
        for (device, held) in self.held.iter_mut().enumerate() {
            let of = |nano: &Nano| nano.forward.there.received(device);
            let tokens = phase.nanos.iter().map(of).sum::<f64>() / bytes;
            held.keys = held.keys.max(tokens);
            held.queries = held.queries.max(tokens);
            let buffers = phase.nanos.iter().map(|nano| nano.buffers(device)).sum();
            held.buffers = held.buffers.max(buffers);
        }
    }

    /// Adds a micro-batch.
    fn count(&mut self, nanos: &[Group]) {
        for (rank, [together, at_once]) in self.tokens.iter_mut().enumerate() {
            let of_nanos = nanos.iter().map(|group| group.tokens[rank] as f64);
            *together = together.max(of_nanos.clone().sum());
            *at_once = of_nanos.fold(*at_once, f64::max);
        }
    }

    fn planned(mut self, setting: &Setting<'_>, micro_batches: usize, program: Program) -> Planned {
        let (stages, ranks) = (setting.closing.stages, setting.ranks());
        for stage in 0..stages {
            for (rank, &[together, at_once]) in self.tokens.iter().enumerate() {
                let held = &mut self.held[stage * ranks + rank];
                (held.tokens, held.at_once) = (together, at_once);
                held.in_flight = (2 * (stages - stage) - 1).min(micro_batches) as f64;
            }
        }
        for held in &mut self.held {
            // A server with a device of its own serves all stages, and keeps what the first has under way.
            let under_way = if held.in_flight > 0.0 {
                held.in_flight
            } else {
                (2 * stages - 1).min(micro_batches) as f64
            };
            let kept = f64::from(setting.closing.layers) * under_way;
            held.layers = if setting.scenario.keep { kept } else { 1.0 };
        }
        let imbalance = if self.mean > 0.0 { self.most / self.mean } else { 1.0 };
        Planned { program, cells: self.cells, imbalance, held: self.held }
    }
}
