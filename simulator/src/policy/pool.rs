//! Attention servers: core attention of all ranks, and of all stages of a pipeline, computed by a pool.
//!
//! `outboard` is what the rest of this repository does: `outboard_planner::settle` chooses homes and plans
//! (`outboard-fixed-homes`: `plan`, documents laid out over ranks in order); a server starts when what it needs is there, and
//! a rank goes on when what it needs is. `distca` is DistCA (arXiv 2510.18121; its planner as in `outboard_planner::plan_by`),
//! documents laid out in order, every transfer a barrier of all (`distca` code, all-to-all). Both work on two nano-batches
//! that take turns, and, with a pipeline, all stages do the same at one time.
//!
//! Simplified: a plan is the same for all layers and micro-batches with equal documents; results travel in the element type.

use outboard_attention::{Document, DocumentId, HomeRange, Span};
use outboard_planner::{
    Flow, PlanError, Policy as Planner, Problem, Rates, Slot, Times, plan, plan_by, settle,
};

use super::{Planned, Policy};
use crate::SimulationError;
use crate::batch::{Piece, cells};
use crate::engine::Program;
use crate::memory::Held;
use crate::phase::{Attend, Exchange, Nano, Phase, Transfer};
use crate::scenario::Sequences;
use crate::setting::Setting;

/// Where DistCA's planner stops: the least tolerance that its scripts allow.
const TOLERANCE: f64 = 0.05;

/// Documents that are computed together, with the tokens that each rank holds of them.
#[derive(Clone, Debug, Default)]
struct Group {
    /// Homes are ranks, whatever the stage.
    documents: Vec<Document>,
    /// Of each rank.
    tokens: Vec<u64>,
}

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
    for group in groups.iter().flatten() {
        tally.count(setting, group);
    }
    Ok(tally.planned(setting, count, Program::Together { forward, backward }))
}

/// The documents of each micro-batch, in nano-batches: whole sequences where there are enough, else documents.
fn micro_batches(setting: &Setting<'_>, policy: Policy, batch: &Sequences) -> Vec<[Vec<usize>; 2]> {
    let count = setting.layout.micro_batches as usize;
    let parts = 2 * count;
    let mut groups: Vec<Vec<usize>> = vec![Vec::new(); parts];
    if policy == Policy::Distca && batch.len() >= parts {
        // In the order in which they come.
        for (n, sequence) in batch.iter().enumerate() {
            groups[n * parts / batch.len()].extend(sequence);
        }
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
    let mut groups = groups.into_iter();
    std::iter::from_fn(|| Some([groups.next()?, groups.next()?])).collect()
}

/// Documents with homes on ranks, as many tokens on each as on any other, or about as many.
fn placed(setting: &Setting<'_>, policy: Policy, lengths: &[usize]) -> Result<Group, PlanError> {
    let ranks = setting.ranks();
    let ids = (0u32..).map(|index| DocumentId { rank: 0, index });
    let bad = |error: outboard_attention::InvalidAttention| PlanError::BadHomes(error.to_string());
    let documents = if policy == Policy::Outboard {
        let unplaced = ids.zip(lengths).map(|(id, &tokens)| Document::unplaced(id, tokens));
        let documents = unplaced.collect::<Result<Vec<Document>, _>>().map_err(bad)?;
        let slots = if setting.layout.dedicated == 0 { in_place(ranks) } else { dedicated(setting) };
        let problem = Problem { ranks: ranks as u32, ..problem(setting, documents, slots, lengths, 1) };
        settle(&problem, setting.scenario.token_slack)?.documents
    } else {
        let total: usize = lengths.iter().sum();
        let border = |rank: usize| (total as u128 * rank as u128 / ranks as u128) as usize;
        let (mut at, mut rank) = (0, 0);
        let mut documents = Vec::with_capacity(lengths.len());
        for (id, &tokens) in ids.zip(lengths) {
            let first = at;
            let mut homes = Vec::new();
            while at < first + tokens {
                while border(rank + 1) <= at {
                    rank += 1;
                }
                let until = border(rank + 1).min(first + tokens);
                let tokens = Span::at(at - first, until - at);
                homes.push(HomeRange { rank: rank as u32, tokens });
                at = until;
            }
            documents.push(Document::new(id, tokens, homes).map_err(bad)?);
        }
        documents
    };
    let mut tokens = vec![0; ranks];
    for home in documents.iter().flat_map(Document::homes) {
        if let Some(tokens) = tokens.get_mut(home.rank as usize) {
            *tokens += home.tokens.len() as u64;
        }
    }
    Ok(Group { documents, tokens })
}

fn in_place(devices: usize) -> Vec<Slot> {
    (0..devices as u32).map(Slot::in_place).collect()
}

fn dedicated(setting: &Setting<'_>) -> Vec<Slot> {
    let servers = setting.devices() - setting.layout.model_devices() as usize;
    vec![Slot::dedicated(); servers]
}

/// What the planner is asked. Links carry while the rest of the layer is computed too, so they count for as much faster.
fn problem(
    setting: &Setting<'_>,
    documents: Vec<Document>,
    slots: Vec<Slot>,
    lengths: &[usize],
    stages: usize,
) -> Problem {
    let ranks = setting.ranks() as f64;
    let [mut forward, mut backward] = [0.0; 2];
    for &tokens in lengths {
        let seconds = Piece { start: 0, end: tokens }.seconds(setting);
        forward += seconds[0];
        backward += seconds[1];
    }
    let count = slots.len() as f64;
    let attention = (forward + backward) * stages as f64 / count;
    let costs = &setting.closing.costs;
    let tokens: usize = lengths.iter().sum();
    let dense = (3.0 * (costs.pre + costs.post) + 2.0 * (costs.tensor_pre + costs.tensor_post))
        * tokens as f64
        / ranks;
    let flops: f64 = lengths
        .iter()
        .map(|&tokens| {
            let cells = cells(tokens) * setting.heads.kv_heads() as u64;
            setting.heads.forward_flops(cells) + setting.heads.backward_flops(cells)
        })
        .sum();
    let link = setting.links.bytes_per_second
        [usize::from(setting.layout.devices() as usize > setting.closing.devices_per_node)];
    let hidden = if attention > 0.0 { (1.0 + dense / attention).min(1e3) } else { 1.0 };
    let flops_per_second = if attention > 0.0 { flops * stages as f64 / count / attention } else { 1e14 };
    let rates = Rates { flops_per_second, bytes_per_second: link * hidden };
    Problem { rates: Some(rates), ..Problem::new(setting.heads, documents, slots) }
}

/// What is computed at one time: each active stage's micro-batch.
fn phase(
    setting: &Setting<'_>,
    policy: Policy,
    active: &[(usize, &Vec<Group>)],
    backward_only: bool,
    tally: &mut Tally,
) -> Result<Phase, PlanError> {
    let nanos = (0..2).map(|nano| {
        let groups: Vec<(usize, &Group)> =
            active.iter().filter_map(|(stage, groups)| Some((*stage, groups.get(nano)?))).collect();
        self::nano(setting, policy, &groups, backward_only, tally)
    });
    Ok(Phase { nanos: nanos.collect::<Result<_, _>>()? })
}

fn nano(
    setting: &Setting<'_>,
    policy: Policy,
    groups: &[(usize, &Group)],
    backward_only: bool,
    tally: &mut Tally,
) -> Result<Nano, PlanError> {
    let (ranks, devices) = (setting.ranks(), setting.devices());
    let mut documents = Vec::new();
    let mut lengths = Vec::new();
    let mut tokens = vec![0.0; devices];
    for &(stage, group) in groups {
        for document in &group.documents {
            let id = DocumentId { rank: stage as u32, index: document.id().index };
            let at = |home: &HomeRange| HomeRange { rank: home.rank + (stage * ranks) as u32, ..*home };
            let homes = document.homes().iter().map(at).collect();
            let moved = Document::new(id, document.tokens(), homes)
                .map_err(|error| PlanError::BadHomes(error.to_string()))?;
            lengths.push(document.tokens());
            documents.push(moved);
        }
        for (rank, &count) in group.tokens.iter().enumerate() {
            tokens[stage * ranks + rank] = count as f64;
        }
    }
    let model = setting.layout.model_devices() as usize;
    let is_dedicated = setting.layout.dedicated > 0;
    let slots = if is_dedicated { dedicated(setting) } else { in_place(model) };
    // Servers in place are numbered as the devices, dedicated ones come after these.
    let first = if is_dedicated { model } else { 0 };
    let problem = Problem { ranks: model as u32, ..self::problem(setting, documents, slots, &lengths, 1) };
    let planned = if policy == Policy::Distca {
        let problem = Problem { rates: None, ..problem.clone() };
        plan_by(&problem, Planner::Distca { tolerance: TOLERANCE })?
    } else {
        plan(&problem)?
    };
    let times = Times::planned(&planned, &problem, &setting.scenario.gpu.profile);
    let efficiency = setting.scenario.tuning.attention_efficiency;
    let of = |ticks: &[Vec<f64>]| {
        let mut seconds = vec![0.0; devices];
        for (slot, of_slot) in ticks.first().into_iter().flatten().enumerate() {
            seconds[first + slot] = of_slot / efficiency;
        }
        seconds
    };
    let seconds = [of(&times.forward), of(&times.backward)];
    let flows = Flow::of(&planned, &problem);
    let transfers = |bytes: fn(&Flow, bool) -> u64, there: bool| -> Vec<Transfer> {
        let transfer = |flow: &Flow| {
            let (home, server) = (flow.rank, (first + flow.slot) as u32);
            let (from, to) = if there { (home, server) } else { (server, home) };
            Transfer { from, to, bytes: bytes(flow, there) as f64 }
        };
        flows.iter().map(transfer).collect()
    };
    let forward: fn(&Flow, bool) -> u64 =
        |flow, there| if there { flow.forward.there } else { flow.forward.back };
    let kept: fn(&Flow, bool) -> u64 =
        |flow, there| if there { flow.backward.there } else { flow.backward.back };
    let sent_again: fn(&Flow, bool) -> u64 =
        |flow, there| if there { flow.backward.there + flow.forward.there } else { flow.backward.back };
    let exchange = |bytes, there| {
        let exchange = Exchange::of(devices, &transfers(bytes, there), setting.near());
        if policy == Policy::Distca { exchange.with_barrier() } else { exchange }
    };
    let dispatch: Vec<f64> = (0..devices)
        .map(|device| {
            let takes_part = tokens[device] > 0.0 || seconds[0][device] > 0.0;
            if takes_part { setting.scenario.tuning.dispatch_seconds } else { 0.0 }
        })
        .collect();
    let attend = |seconds: &[f64], bytes: fn(&Flow, bool) -> u64| Attend {
        seconds: seconds.to_vec(),
        dispatch: dispatch.clone(),
        there: exchange(bytes, true),
        back: exchange(bytes, false),
        waits: vec![1.0; devices],
    };
    let nano = Nano {
        tokens,
        forward: attend(&seconds[0], forward),
        backward: attend(&seconds[1], if setting.scenario.keep { kept } else { sent_again }),
    };
    tally.add(setting, &nano, backward_only, &planned, &problem, first);
    Ok(nano)
}

/// What is known of a step once all of it is planned.
#[derive(Debug)]
struct Tally {
    cells: Vec<u64>,
    held: Vec<Held>,
    most: f64,
    mean: f64,
    tokens: Vec<f64>,
}

impl Tally {
    fn new(setting: &Setting<'_>) -> Tally {
        let devices = setting.devices();
        Tally {
            cells: vec![0; devices],
            held: vec![Held::default(); devices],
            most: 0.0,
            mean: 0.0,
            tokens: vec![0.0; setting.ranks()],
        }
    }

    /// Adds a nano-batch of one phase. Those of the backward pass alone compute nothing that forward ones have not.
    fn add(
        &mut self,
        setting: &Setting<'_>,
        nano: &Nano,
        backward_only: bool,
        plan: &outboard_attention::StepPlan,
        problem: &Problem,
        first: usize,
    ) {
        let servers = problem.slots.len() as f64;
        for (attend, counts) in
            [(&nano.forward, !backward_only), (&nano.backward, backward_only || setting.closing.stages == 1)]
        {
            if counts {
                self.most += attend.seconds.iter().copied().fold(0.0, f64::max);
                self.mean += attend.seconds.iter().sum::<f64>() / servers;
            }
        }
        let bytes = setting.key_bytes() + setting.query_bytes();
        for (device, receives) in nano.forward.there.receives.iter().enumerate() {
            // Q, K and V of others, by their bytes; O comes on top.
            let tokens = (receives[0] + receives[1]) / bytes;
            let held = &mut self.held[device];
            held.keys = held.keys.max(tokens);
            held.queries = held.queries.max(tokens);
            held.layers = if setting.scenario.keep { f64::from(setting.closing.layers) } else { 2.0 };
        }
        if !backward_only {
            let heads = setting.heads.kv_heads() as u64;
            let loads =
                outboard_planner::Loads::planned(plan, &problem.documents, &problem.geometry).totals();
            for (slot, load) in loads.into_iter().enumerate() {
                self.cells[first + slot] += load / heads.max(1);
            }
        }
    }

    /// Adds a nano-batch of a micro-batch.
    fn count(&mut self, setting: &Setting<'_>, group: &Group) {
        for (rank, &tokens) in group.tokens.iter().enumerate() {
            self.tokens[rank] = self.tokens[rank].max(2.0 * tokens as f64);
        }
        let _ = setting;
    }

    fn planned(mut self, setting: &Setting<'_>, micro_batches: usize, program: Program) -> Planned {
        let (stages, ranks) = (setting.closing.stages, setting.ranks());
        for stage in 0..stages {
            for (rank, &tokens) in self.tokens.iter().enumerate() {
                let held = &mut self.held[stage * ranks + rank];
                held.tokens = tokens;
                held.in_flight = (2 * (stages - stage) - 1).min(micro_batches) as f64;
            }
        }
        let imbalance = if self.mean > 0.0 { self.most / self.mean } else { 1.0 };
        Planned { program, cells: self.cells, imbalance, held: self.held }
    }
}
