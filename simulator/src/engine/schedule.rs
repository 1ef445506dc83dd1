//! Micro-batches and stages: the order in which phases go through a step.

use super::clocks::{Arrival, Clocks, Operation, Wait};
use super::layers::{self, Costs, Stretch, Work};
use super::trace::{Doing, Traced};
use crate::phase::Phase;
use crate::scenario::Recompute;

/// A step as its policy has it. Devices are numbered rank by rank, stage after stage.
#[derive(Clone, Debug)]
pub(crate) enum Program {
    /// All devices do the same at the same time: the forward passes of what all stages have in hand, then the backward
    /// passes. With `p` stages and `m` micro-batches there are `m + p - 1` phases of each kind, and stage `s` has
    /// micro-batch `n - s` of forward phase `n`, and `n - (p - 1) + s` of backward phase `n`.
    Together { forward: Vec<Phase>, backward: Vec<Phase> },
    /// All ranks go through micro-batches, each forward and backward, and wait for each other after each. There is no
    /// pipeline.
    Rounds(Vec<Phase>),
    /// Replicas of the model go through their own micro-batches, one forward, one backward; they wait for each other at
    /// the end of the step.
    Apart(Vec<Replica>),
}

/// Ranks that work on the same micro-batches, on every stage.
#[derive(Clone, Debug)]
pub(crate) struct Replica {
    /// Its first rank; as many follow as its phases have devices.
    pub(crate) first: usize,
    /// A phase for each micro-batch, the same on every stage.
    pub(crate) micro_batches: Vec<Phase>,
}

/// What is the same for all policies.
#[derive(Clone, Debug)]
pub(crate) struct Closing {
    pub(crate) ranks: usize,
    pub(crate) stages: usize,
    /// Of a stage.
    pub(crate) layers: u32,
    pub(crate) costs: Costs,
    pub(crate) recompute: Recompute,
    /// Bytes of a token between stages.
    pub(crate) token_bytes: f64,
    /// Lanes over GPUs of a node, to say which devices are near each other.
    pub(crate) devices_per_node: usize,
    /// Seconds of a rank for the reduction of its gradients, for the new weights of others, and for the optimizer.
    pub(crate) gradients: f64,
    pub(crate) weights: f64,
    pub(crate) optimizer: f64,
}

impl Closing {
    fn stretch(&self, work: Work) -> Stretch<'_> {
        let idle = if self.stages > 1 { Wait::Stage } else { Wait::Attention };
        Stretch { work, layers: self.layers, costs: &self.costs, idle }
    }

    pub(crate) fn near(&self, a: u32, b: u32) -> bool {
        a as usize / self.devices_per_node == b as usize / self.devices_per_node
    }
}

/// When a device went through its layers.
#[derive(Clone, Copy, Debug, Default)]
struct Pass {
    from: f64,
    until: f64,
}

/// Runs a step; returns how long it takes.
pub(crate) fn run(clocks: &mut Clocks, program: &Program, closing: &Closing) -> f64 {
    let mut last_backward = vec![Pass::default(); clocks.accounts.len()];
    match program {
        Program::Together { forward, backward } => {
            together(clocks, forward, backward, closing, &mut last_backward)
        }
        Program::Rounds(phases) => {
            for phase in phases.iter().map(std::slice::from_ref) {
                together(clocks, phase, phase, closing, &mut last_backward);
                let last = (0..closing.ranks).map(|device| clocks.free(device)).fold(0.0, f64::max);
                for device in 0..closing.ranks {
                    clocks.pass(device, last, |account, gap| account.imbalance += gap);
                }
            }
        }
        Program::Apart(replicas) => {
            for replica in replicas {
                apart(clocks, replica, closing, &mut last_backward);
            }
        }
    }
    close(clocks, closing, &last_backward)
}

fn together(
    clocks: &mut Clocks,
    forward: &[Phase],
    backward: &[Phase],
    closing: &Closing,
    last_backward: &mut [Pass],
) {
    let devices = forward.first().map_or(0, Phase::devices);
    let start = vec![Arrival::default(); devices];
    let (mut forth, mut back) = (start.clone(), start);
    // The backward phase n needs micro-batch n of the last stage, which forward phase n + stages - 1 computes.
    for tick in 0..forward.len() + closing.stages - 1 {
        if let Some(phase) = forward.get(tick) {
            let exits = layers::run(clocks, 0, phase, closing.stretch(Work::Forward), &forth);
            forth = to_stage(clocks, phase, &exits, closing, true);
        }
        let Some(n) = (tick + 1).checked_sub(closing.stages) else { continue };
        if let Some(phase) = backward.get(n) {
            head(clocks, 0, phase, closing, (closing.stages - 1) * closing.ranks);
            let from: Vec<f64> = (0..devices).map(|device| clocks.free(device)).collect();
            let stretch = closing.stretch(Work::Backward(closing.recompute));
            let exits = layers::run(clocks, 0, phase, stretch, &back);
            for (device, exit) in exits.iter().enumerate() {
                if phase.tokens_of(device) > 0.0 {
                    last_backward[device] = Pass { from: from[device], until: exit.at };
                }
            }
            back = to_stage(clocks, phase, &exits, closing, false);
        }
    }
}

/// The head's share of the last stage, whose devices start at `last`.
fn head(clocks: &mut Clocks, first: usize, phase: &Phase, closing: &Closing, last: usize) {
    for device in 0..phase.devices() {
        let (at, seconds) = (first + device, closing.costs.head * phase.tokens_of(device));
        let of_last = (last..last + closing.ranks).contains(&at);
        if of_last && seconds > 0.0 {
            let input = Arrival::default();
            clocks.compute(Operation {
                device: at,
                input,
                wait: Wait::Stage,
                doing: Doing::DenseBackward,
                nano: 0,
                seconds,
                waits: 1.0,
            });
            clocks.accounts[at].dense += seconds;
        }
    }
}

/// Sends what all stages have computed to the next, or what they have of gradients to the one before.
fn to_stage(
    clocks: &mut Clocks,
    phase: &Phase,
    exits: &[Arrival],
    closing: &Closing,
    forth: bool,
) -> Vec<Arrival> {
    let mut arrivals = vec![Arrival::default(); exits.len()];
    for (device, exit) in exits.iter().enumerate().take(closing.stages * closing.ranks) {
        if let Some(to) = neighbour(device, closing, forth) {
            arrivals[to] = hand_over(clocks, device, to, phase.tokens_of(device), *exit, closing);
        }
    }
    arrivals
}

/// The same rank on the next stage, or on the one before.
fn neighbour(device: usize, closing: &Closing, forth: bool) -> Option<usize> {
    let to = if forth { device.checked_add(closing.ranks) } else { device.checked_sub(closing.ranks) };
    to.filter(|&to| to < closing.stages * closing.ranks)
}

/// Sends activations, or gradients, of so many tokens.
fn hand_over(
    clocks: &mut Clocks,
    from: usize,
    to: usize,
    tokens: f64,
    exit: Arrival,
    closing: &Closing,
) -> Arrival {
    let link = usize::from(!closing.near(from as u32, to as u32));
    clocks.send(from, link, tokens * closing.token_bytes, exit.at)
}

/// What a stage of a replica does next.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Forward(usize),
    Backward(usize),
}

/// One forward, one backward: stage `s` of `p` starts with `p - 1 - s` forward passes, then takes turns.
fn turns(stage: usize, stages: usize, micro_batches: usize) -> Vec<Turn> {
    let warm = (stages - 1 - stage).min(micro_batches);
    let mut turns: Vec<Turn> = (0..warm).map(Turn::Forward).collect();
    for n in 0..micro_batches {
        if warm + n < micro_batches {
            turns.push(Turn::Forward(warm + n));
        }
        turns.push(Turn::Backward(n));
    }
    turns
}

fn apart(clocks: &mut Clocks, replica: &Replica, closing: &Closing, last_backward: &mut [Pass]) {
    let (stages, count) = (closing.stages, replica.micro_batches.len());
    let mut turns: Vec<_> =
        (0..stages).map(|stage| turns(stage, stages, count).into_iter().peekable()).collect();
    // When the input of each micro-batch is at each stage, forward and backward.
    let mut forth: Vec<Vec<Option<Vec<Arrival>>>> = vec![vec![None; count]; stages];
    let mut back = forth.clone();
    for (n, phase) in replica.micro_batches.iter().enumerate() {
        forth[0][n] = Some(vec![Arrival::default(); phase.devices()]);
    }
    // Stages take turns as far as their inputs are there; which those are does not depend on times.
    loop {
        let mut moved = false;
        for stage in 0..stages {
            while let Some(&turn) = turns[stage].peek() {
                let input = match turn {
                    Turn::Forward(n) => forth[stage][n].take(),
                    Turn::Backward(n) => back[stage][n].take(),
                };
                let Some(input) = input else { break };
                turns[stage].next();
                moved = true;
                let (Turn::Forward(n) | Turn::Backward(n)) = turn;
                let phase = &replica.micro_batches[n];
                let first = stage * closing.ranks + replica.first;
                match turn {
                    Turn::Forward(n) => {
                        let stretch = closing.stretch(Work::Forward);
                        let exits = layers::run(clocks, first, phase, stretch, &input);
                        if stage + 1 < stages {
                            forth[stage + 1][n] =
                                Some(from_stage(clocks, first, phase, &exits, closing, true));
                        } else {
                            back[stage][n] = Some(exits);
                        }
                    }
                    Turn::Backward(n) => {
                        head(clocks, first, phase, closing, (stages - 1) * closing.ranks);
                        let from: Vec<f64> =
                            (0..phase.devices()).map(|device| clocks.free(first + device)).collect();
                        let stretch = closing.stretch(Work::Backward(closing.recompute));
                        let exits = layers::run(clocks, first, phase, stretch, &input);
                        for (device, (exit, from)) in exits.iter().zip(from).enumerate() {
                            last_backward[first + device] = Pass { from, until: exit.at };
                        }
                        if stage > 0 {
                            back[stage - 1][n] =
                                Some(from_stage(clocks, first, phase, &exits, closing, false));
                        }
                    }
                }
            }
        }
        if !moved {
            break;
        }
    }
}

/// The same for one replica, whose devices on this stage start at `first`.
fn from_stage(
    clocks: &mut Clocks,
    first: usize,
    phase: &Phase,
    exits: &[Arrival],
    closing: &Closing,
    forth: bool,
) -> Vec<Arrival> {
    let arrival = |(n, exit): (usize, &Arrival)| {
        let to = neighbour(first + n, closing, forth)?;
        Some(hand_over(clocks, first + n, to, phase.tokens_of(n), *exit, closing))
    };
    exits.iter().enumerate().filter_map(arrival).collect()
}

/// Gradients among the ranks of each stage, the optimizer, and the end of the step.
fn close(clocks: &mut Clocks, closing: &Closing, last_backward: &[Pass]) -> f64 {
    let model = closing.ranks * closing.stages;
    for stage in 0..closing.stages {
        let devices = stage * closing.ranks..(stage + 1) * closing.ranks;
        let last = devices.clone().map(|device| clocks.free(device)).fold(0.0, f64::max);
        // The gradients of a layer go once all ranks have them, while those of the layers below are computed. The last
        // layer's come first, and as they come at an even pace, what counts is when these are there, or the first layer's.
        let layers = f64::from(closing.layers.max(1));
        let come = |device: usize| {
            let Pass { from, until } = last_backward[device];
            from + (until - from) / layers
        };
        let first = devices.clone().map(come).fold(0.0, f64::max);
        let reduced = (first + closing.gradients).max(last + closing.gradients / layers);
        for device in devices {
            clocks.pass(device, last, |account, gap| account.imbalance += gap);
            clocks.pass(device, reduced, |account, gap| account.gradients += gap);
            let updated = reduced + closing.optimizer;
            clocks.pass(device, updated, |account, gap| account.optimizer += gap);
            // Weights of all but the first layer come while the next step computes those before.
            let done = updated + closing.weights / layers;
            clocks.pass(device, done, |account, gap| account.gradients += gap);
            clocks.trace.add(Traced {
                device: device as u32,
                nano: 0,
                doing: Doing::Update,
                start: last,
                end: done,
            });
        }
    }
    let devices = clocks.accounts.len();
    let end = (0..devices).map(|device| clocks.free(device)).fold(0.0, f64::max);
    for device in 0..devices {
        let dedicated = device >= model;
        clocks.pass(
            device,
            end,
            |account, gap| {
                if dedicated { account.imbalance += gap } else { account.bubble += gap }
            },
        );
    }
    end
}
