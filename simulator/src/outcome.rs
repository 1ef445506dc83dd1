//! Simulating: the steps of a scenario by a policy, and what they come to.

use crate::batch::cells;
use crate::engine::{Account, Clocks, Trace, run};
use crate::memory::Memory;
use crate::policy::{Choice, Planned, Policy, choices, floor, plan};
use crate::scenario::Sequences;
use crate::setting::Setting;
use crate::{Layout, Scenario, SimulationError};

/// What a policy makes of a scenario, the mean of its steps.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How attention is shared.
    pub policy: Policy,
    /// The layout, with what the policy chose.
    pub layout: Layout,
    /// Steps whose documents change places.
    pub window: usize,
    /// The part of the links' speed that plans of a pool count on: what the rates of a job are to say.
    pub link_share: f64,
    /// Of a step.
    pub seconds: f64,
    /// Of each step.
    pub step_seconds: Vec<f64>,
    /// Over all GPUs.
    pub tokens_per_second: f64,
    /// Useful FLOPs over what all GPUs could compute at their peak.
    pub mfu: f64,
    /// Largest over mean seconds of attention of what is computed at one time.
    pub imbalance: f64,
    /// Where time goes, mean over devices.
    pub account: Account,
    /// Of the GPU that needs most.
    pub memory: Memory,
    /// Bytes that a GPU needs, mean over all.
    pub mean_memory: f64,
    /// Bytes of a step.
    pub carried: Carried,
    /// What some devices do in the first step.
    pub trace: Trace,
}

/// Bytes that GPUs send for attention and between stages in a step, to others of their node and of other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Carried {
    /// Of all GPUs, within nodes.
    pub within: f64,
    /// Of all GPUs, between nodes.
    pub between: f64,
    /// Of the GPU that sends most, within its node.
    pub most_within: f64,
    /// Of the GPU that sends most between nodes.
    pub most_between: f64,
}

/// Simulates the steps of a scenario.
///
/// # Errors
/// A [`SimulationError`] for a scenario that makes no sense, that the policy has no answer for, or whose steps no GPU's
/// memory holds in any way that the policy could choose.
pub fn simulate(scenario: &Scenario, policy: Policy) -> Result<Outcome, SimulationError> {
    scenario.check()?;
    simulate_steps(scenario, policy, &scenario.batches())
}

/// The same for steps whose documents are given, and not drawn.
///
/// # Errors
/// As [`simulate`], and where a step has no tokens, or other than the scenario says.
pub fn simulate_steps(
    scenario: &Scenario,
    policy: Policy,
    batches: &[Sequences],
) -> Result<Outcome, SimulationError> {
    scenario.check()?;
    for (step, batch) in batches.iter().enumerate() {
        let tokens: u64 = batch.iter().flatten().map(|&tokens| tokens as u64).sum();
        if tokens != scenario.tokens || batch.iter().any(Vec::is_empty) {
            return Err(SimulationError::Documents(format!(
                "step {step} has {tokens} tokens, and not the {} that a step has, or an empty sequence",
                scenario.tokens
            )));
        }
    }
    let setting = Setting::new(scenario, scenario.layout)?;
    let sequences = batches.first().map_or(1, Vec::len);
    let mut best: Option<Outcome> = None;
    let mut refusal = None;
    for choice in choices(&setting, policy, sequences) {
        // What cannot be the fastest need not be simulated.
        if let Some(best) = &best
            && (floor(&Setting::new(scenario, choice.layout)?, policy) >= best.seconds
                || (choice.link_share < best.link_share && waits_for_little(best)))
        {
            continue;
        }
        match outcome(scenario, policy, choice, batches) {
            Ok(outcome) => {
                if best.as_ref().is_none_or(|best| outcome.seconds < best.seconds) {
                    best = Some(outcome);
                }
            }
            Err(error) => refusal = Some(nearer(refusal, error)),
        }
    }
    best.ok_or_else(|| {
        refusal.unwrap_or_else(|| SimulationError::Unsuited {
            policy: policy.to_string(),
            what: format!(
                "{sequences} sequences a step on {} ranks{}",
                setting.ranks(),
                scenario.layout.context.map_or_else(String::new, |context| format!(", {context} for each"))
            ),
        })
    })
}

/// Whether devices wait for so few bytes that it is not worth the while to plan again with these weighing more, which takes ten
/// times as long as planning without.
fn waits_for_little(outcome: &Outcome) -> bool {
    outcome.account.exposed < 0.1 * outcome.seconds
}

/// Of two refusals the one that is nearer to fitting.
pub(crate) fn nearer(first: Option<SimulationError>, second: SimulationError) -> SimulationError {
    match (first, &second) {
        (Some(SimulationError::Memory { needed, .. }), SimulationError::Memory { needed: other, .. })
            if *other < needed =>
        {
            second
        }
        (Some(first), _) => first,
        (None, _) => second,
    }
}

fn outcome(
    scenario: &Scenario,
    policy: Policy,
    choice: Choice,
    batches: &[Sequences],
) -> Result<Outcome, SimulationError> {
    let setting = Setting { link_share: choice.link_share, ..Setting::new(scenario, choice.layout)? };
    let mut sum = Sum::default();
    for window in batches.chunks(choice.window) {
        let planned = plan(&setting, policy, window)?;
        check(policy, window, &planned, &setting)?;
        for step in &planned {
            let memory = memory(&setting, &step.held);
            fits(scenario, policy, &memory)?;
            sum.add(&setting, step, &memory);
        }
    }
    Ok(sum.outcome(scenario, policy, choice, batches))
}

/// Checks that every cell is computed, once.
fn check(
    policy: Policy,
    window: &[Sequences],
    planned: &[Planned],
    setting: &Setting<'_>,
) -> Result<(), SimulationError> {
    let documents = window.iter().flatten().flatten();
    let times = (setting.closing.stages * setting.heads.kv_heads()) as u64;
    let asked = documents.map(|&tokens| cells(tokens)).sum::<u64>() * times;
    let given: u64 = planned.iter().flat_map(|step| &step.cells).sum();
    if asked == given {
        return Ok(());
    }
    let what = format!("it computes {given} of {asked} cells");
    Err(SimulationError::BadPlan { policy: policy.to_string(), what })
}

fn memory(setting: &Setting<'_>, held: &[crate::memory::Held]) -> Vec<Memory> {
    let model = setting.layout.model_devices() as usize;
    let of = |(device, held): (usize, &crate::memory::Held)| {
        if device < model {
            Memory::of(setting, device / setting.ranks(), *held)
        } else {
            Memory::of_server(setting, *held)
        }
    };
    held.iter().enumerate().map(of).collect()
}

pub(crate) fn fits(scenario: &Scenario, policy: Policy, memory: &[Memory]) -> Result<(), SimulationError> {
    let Some(most) = memory.iter().max_by(|a, b| a.total().total_cmp(&b.total())) else { return Ok(()) };
    if most.total() <= scenario.gpu.memory_bytes {
        return Ok(());
    }
    let (part, part_bytes) = most.largest();
    Err(SimulationError::Memory {
        policy: policy.to_string(),
        gpu: scenario.gpu.name.clone(),
        needed: most.total(),
        available: scenario.gpu.memory_bytes,
        part,
        part_bytes,
    })
}

/// Of the steps so far.
#[derive(Debug, Default)]
struct Sum {
    seconds: Vec<f64>,
    accounts: Vec<Account>,
    imbalance: f64,
    memory: Memory,
    mean_memory: f64,
    carried: Carried,
    trace: Option<Trace>,
}

impl Sum {
    fn add(&mut self, setting: &Setting<'_>, step: &Planned, memory: &[Memory]) {
        let trace = if self.trace.is_none() { Trace::of(&setting.layout) } else { Trace::default() };
        let mut clocks = Clocks::new(setting.devices(), setting.links, trace);
        self.seconds.push(run(&mut clocks, &step.program, &setting.closing));
        self.accounts.push(Account::mean(&clocks.accounts));
        self.imbalance += step.imbalance;
        self.trace.get_or_insert_with(|| std::mem::take(&mut clocks.trace));
        let lanes = f64::from(setting.layout.tensor);
        let all = |link: usize| clocks.carried.iter().map(|bytes| bytes[link]).sum::<f64>() * lanes;
        let most = |link: usize| clocks.carried.iter().map(|bytes| bytes[link]).fold(0.0, f64::max);
        self.carried.within += all(0);
        self.carried.between += all(1);
        self.carried.most_within += most(0);
        self.carried.most_between += most(1);
        self.mean_memory += memory.iter().map(Memory::total).sum::<f64>() / memory.len().max(1) as f64;
        if let Some(most) = memory.iter().max_by(|a, b| a.total().total_cmp(&b.total()))
            && most.total() > self.memory.total()
        {
            self.memory = *most;
        }
    }

    fn outcome(self, scenario: &Scenario, policy: Policy, choice: Choice, batches: &[Sequences]) -> Outcome {
        let steps = self.seconds.len().max(1) as f64;
        let seconds = self.seconds.iter().sum::<f64>() / steps;
        let documents = batches.iter().flatten().flatten();
        let cells: f64 = documents.map(|&tokens| cells(tokens) as f64).sum::<f64>() / steps;
        let flops = scenario.model.step_flops(scenario.tokens as f64, cells);
        let peak = f64::from(choice.layout.gpus) * scenario.gpu.peak_flops_per_second;
        let mean = |sum: f64| sum / steps;
        Outcome {
            policy,
            layout: choice.layout,
            window: choice.window,
            link_share: choice.link_share,
            seconds,
            tokens_per_second: scenario.tokens as f64 / seconds,
            mfu: flops / peak / seconds,
            imbalance: mean(self.imbalance),
            account: Account::mean(&self.accounts),
            memory: self.memory,
            mean_memory: mean(self.mean_memory),
            carried: Carried {
                within: mean(self.carried.within),
                between: mean(self.carried.between),
                most_within: mean(self.carried.most_within),
                most_between: mean(self.carried.most_between),
            },
            trace: self.trace.unwrap_or_default(),
            step_seconds: self.seconds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gpu, Link, Mix, Model, Network, Recompute, Tuning};

    fn scenario(between: f64) -> Scenario {
        let network = Network::default();
        let layout = Layout::new(64, 8);
        Scenario {
            model: Model::built_in("llama-8b").unwrap(),
            gpu: Gpu::built_in("h200").unwrap(),
            network: Network { between: Link { bytes_per_second: between, ..network.between }, ..network },
            layout,
            context: 128 << 10,
            tokens: u64::from(layout.ranks()) << 17,
            mix: Mix::Prolong,
            seed: 0,
            steps: 1,
            recompute: Recompute::Mlp,
            update: false,
            keep: false,
            nano_batches: 2,
            token_room: 1.0,
            tolerance: 0.05,
            delay: 1,
            token_slack: 0.02,
            tuning: Tuning::default(),
        }
    }

    #[test]
    fn plans_count_on_half_of_links_that_much_waits_for_if_that_is_sooner_done() {
        for (between, share) in [(6e9, 0.5), (400e9, 1.0)] {
            let scenario = scenario(between);
            let policy = Policy::Outboard;
            let kept = simulate(&scenario, policy).unwrap();
            let all = outcome(&scenario, policy, Choice::of(scenario.layout), &scenario.batches()).unwrap();
            assert_eq!(kept.link_share, share, "{between}: {:?}, with all {:?}", kept.account, all.account);
            assert_eq!(waits_for_little(&all), share == 1.0, "{:?}", all.account);
            assert_eq!(kept.seconds < all.seconds, share < 1.0, "{} and {}", kept.seconds, all.seconds);
        }
    }
}
