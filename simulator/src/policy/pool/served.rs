//! A nano-batch whose attention is served: planned, and laid out as seconds of servers and bytes of links.

use outboard_attention::{Document, DocumentId, HomeRange, StepPlan};
use outboard_planner::{Carried, Flow, PlanError, Policy as Planner, Problem, Times, plan, plan_by};

use super::Policy;
use super::homes::{Group, slots};
use super::pace::Pace;
use crate::phase::{Attend, Exchange, Nano, Transfer};
use crate::setting::Setting;

/// A nano-batch with the plan by which it is served.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) nano: Nano,
    pub(super) plan: StepPlan,
    pub(super) problem: Problem,
    /// The device of the first slot.
    pub(super) first: usize,
}

/// Plans what the stages have in hand at one time: each one's group of documents.
pub(super) fn serve(
    setting: &Setting<'_>,
    policy: Policy,
    groups: &[(usize, &Group)],
) -> Result<Served, PlanError> {
    let mut tokens = vec![0.0; setting.devices()];
    for &(stage, group) in groups {
        for (rank, &count) in group.tokens.iter().enumerate() {
            tokens[stage * setting.ranks() + rank] = count as f64;
        }
    }
    let model = setting.layout.model_devices() as usize;
    let documents = of_stages(setting, groups)?;
    let problem = Problem::new(setting.heads, documents, slots(setting, model));
    let problem = Problem { ranks: model as u32, ..problem };
    let plan = if policy == Policy::Distca {
        plan_by(&problem, Planner::Distca { tolerance: setting.scenario.tolerance })?
    } else {
        soonest(setting, &problem, &tokens)?
    };
    debug_assert!(
        !cfg!(test) || outboard_planner::judge(&plan, &problem).is_ok(),
        "every cell once: {:?}",
        outboard_planner::judge(&plan, &problem)
    );
    // Servers in place are numbered as the devices, dedicated ones come after these.
    let first = if setting.layout.dedicated > 0 { model } else { 0 };
    let nano = nano(setting, policy, &problem, &plan, tokens);
    Ok(Served { nano, plan, problem, first })
}

/// The documents of all stages, whose homes are then devices.
fn of_stages(setting: &Setting<'_>, groups: &[(usize, &Group)]) -> Result<Vec<Document>, PlanError> {
    let mut documents = Vec::new();
    for &(stage, group) in groups {
        for document in &group.documents {
            let id = DocumentId { rank: stage as u32, index: document.id().index };
            let device = |rank: u32| rank + (stage * setting.ranks()) as u32;
            let homes = document.homes().iter().map(|home| HomeRange { rank: device(home.rank), ..*home });
            let moved = Document::new(id, document.tokens(), homes.collect());
            documents.push(moved.map_err(|error| PlanError::BadHomes(error.to_string()))?);
        }
    }
    Ok(documents)
}

/// The balanced plan of the fewest bytes; where its bytes take longer than everything that is computed meanwhile, the plan
/// for the least time, if that is sooner done.
fn soonest(setting: &Setting<'_>, problem: &Problem, tokens: &[f64]) -> Result<StepPlan, PlanError> {
    let balanced = plan(problem)?;
    let most = tokens.iter().copied().fold(0.0, f64::max);
    let pace = Pace::of(setting, problem, &balanced, most);
    let Some(rates) = pace.rates(setting, problem, &balanced) else { return Ok(balanced) };
    let bounded = plan(&Problem { rates: Some(rates), ..problem.clone() })?;
    let other = Pace::of(setting, problem, &bounded, most);
    Ok(if other.seconds() < pace.seconds() { bounded } else { balanced })
}

fn nano(setting: &Setting<'_>, policy: Policy, problem: &Problem, plan: &StepPlan, tokens: Vec<f64>) -> Nano {
    let devices = setting.devices();
    let first = devices - problem.slots.len();
    let times = Times::planned(plan, problem, &setting.scenario.gpu.profile);
    let of = |ticks: &[Vec<f64>]| {
        let mut seconds = vec![0.0; devices];
        for (slot, of_slot) in ticks.first().into_iter().flatten().enumerate() {
            seconds[first + slot] = of_slot / setting.scenario.tuning.attention_efficiency;
        }
        seconds
    };
    let (forward, backward) = (of(&times.forward), of(&times.backward));
    let flows = Flow::of(plan, problem);
    let exchange = |there: bool, bytes: &dyn Fn(&Flow) -> u64| {
        let transfer = |flow: &Flow| {
            let (home, server) = (flow.rank, (first + flow.slot) as u32);
            let (from, to) = if there { (home, server) } else { (server, home) };
            Transfer { from, to, bytes: bytes(flow) as f64 }
        };
        let transfers: Vec<Transfer> = flows.iter().map(transfer).collect();
        let exchange = Exchange::of(devices, &transfers, setting.near());
        if policy == Policy::Distca { exchange.with_barrier() } else { exchange }
    };
    let attend = |seconds: Vec<f64>, of_pass: fn(&Flow) -> Carried, again: bool| {
        let there = |flow: &Flow| of_pass(flow).there + if again { flow.forward.there } else { 0 };
        let (there, back) = (exchange(true, &there), exchange(false, &|flow| of_pass(flow).back));
        // A device that sends or receives nothing has nothing to lay out.
        let dispatch = (0..devices).map(|device| {
            let moved = there.moved(device) + back.moved(device);
            if moved > 0.0 { setting.scenario.tuning.dispatch_seconds } else { 0.0 }
        });
        Attend { seconds, dispatch: dispatch.collect(), there, back, waits: vec![1.0; devices] }
    };
    Nano {
        forward: attend(forward, |flow| flow.forward, false),
        backward: attend(backward, |flow| flow.backward, !setting.scenario.keep),
        tokens,
    }
}
