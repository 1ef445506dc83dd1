//! Gains of DistCA over WLB, and measured steps, predicted.

use outboard_simulator::{Layout, Outcome, Policy, Scenario, SimulationError, simulate};

use super::cases::{Group, Measured, Published};
use super::threads::in_parallel;

/// What is predicted of a group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Predicted {
    /// Gain of each case, in their order.
    pub(super) gains: Vec<f64>,
    /// Ranks that share a sequence in WLB's best run of each.
    pub(super) contexts: Vec<u32>,
}

impl Predicted {
    /// The smallest and the largest gain.
    pub(super) fn ends(&self) -> [f64; 2] {
        let fold = |first: f64, pick: fn(f64, f64) -> f64| self.gains.iter().copied().fold(first, pick);
        [fold(f64::INFINITY, f64::min), fold(0.0, f64::max)]
    }
}

/// Predicts all groups.
pub(super) fn groups(published: &Published, done: &(dyn Fn() + Sync)) -> anyhow::Result<Vec<Predicted>> {
    let mut runs = Vec::new();
    for (n, group) in published.groups.iter().enumerate() {
        for case in &group.cases {
            runs.push((n, group, published.scenario(group, *case)?));
        }
    }
    let gains = in_parallel(&runs, |(_, group, scenario)| {
        let gain = gain(scenario, group);
        done();
        gain
    });
    let mut predicted: Vec<Predicted> = Vec::new();
    predicted.resize_with(published.groups.len(), || Predicted { gains: Vec::new(), contexts: Vec::new() });
    for ((n, _, _), gain) in runs.iter().zip(gains) {
        let (gain, context) = gain?;
        predicted[*n].gains.push(gain);
        predicted[*n].contexts.push(context);
    }
    Ok(predicted)
}

/// DistCA's gain over the best of WLB, and how many ranks share a sequence in that.
fn gain(scenario: &Scenario, group: &Group) -> Result<(f64, u32), SimulationError> {
    let distca = simulate(scenario, Policy::Distca)?;
    let mut best: Option<(f64, u32)> = None;
    let mut refusal = None;
    for &context in &group.contexts {
        match wlb(scenario, context) {
            Ok(outcome) if best.is_none_or(|(seconds, _)| outcome.seconds < seconds) => {
                best = Some((outcome.seconds, context));
            }
            Ok(_) => {}
            Err(error) => refusal = Some(error),
        }
    }
    match (best, refusal) {
        (Some((seconds, context)), _) => Ok((seconds / distca.seconds, context)),
        (None, Some(error)) => Err(error),
        (None, None) => Err(SimulationError::Layout(format!("{} tries no context", group.name))),
    }
}

fn wlb(scenario: &Scenario, context: u32) -> Result<Outcome, SimulationError> {
    let layout = Layout { context: Some(context), ..scenario.layout };
    simulate(&Scenario { layout, ..scenario.clone() }, Policy::Wlb)
}

/// Seconds of a measured step, and what is predicted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) label: String,
    pub(super) policy: String,
    pub(super) measured: f64,
    pub(super) predicted: f64,
}

/// A measured step that is to be predicted.
struct Run<'a> {
    of: &'a Measured,
    scenario: Scenario,
    /// Ranks that share a sequence under WLB, or `None` for DistCA.
    context: Option<u32>,
    measured: f64,
}

/// Predicts the measured steps.
pub(super) fn steps(published: &Published, done: &(dyn Fn() + Sync)) -> anyhow::Result<Vec<Step>> {
    let mut runs = Vec::new();
    for of in &published.measured {
        let scenario = published.measured(of)?;
        let distca = of.distca.map(|seconds| (None, seconds));
        let wlb = of.wlb.iter().map(|wlb| (Some(wlb.context), wlb.seconds));
        for (context, measured) in distca.into_iter().chain(wlb) {
            runs.push(Run { of, scenario: scenario.clone(), context, measured });
        }
    }
    let outcomes = in_parallel(&runs, |run| {
        let outcome = match run.context {
            Some(context) => wlb(&run.scenario, context),
            None => simulate(&run.scenario, Policy::Distca),
        };
        done();
        outcome
    });
    let step =
        |(Run { of, context, measured, .. }, outcome): (&Run<'_>, Result<Outcome, SimulationError>)| {
            Ok(Step {
                label: format!("{} {} {}k on {} GPUs", of.model, of.mix, of.context / 1024, of.gpus),
                policy: context
                    .map_or("distca".to_owned(), |context| format!("wlb, context parallel {context}")),
                measured: *measured,
                predicted: outcome?.seconds,
            })
        };
    runs.iter().zip(outcomes).map(step).collect()
}
