//! Gains of DistCA over WLB, and measured steps, predicted.

use outboard_simulator::{Layout, Outcome, Policy, Scenario, SimulationError, simulate};

use super::cases::{Group, Measured, Published};
use super::documents::Documents;
use super::threads::in_parallel;

/// What is predicted of a group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Predicted {
    /// Gain of each case, in their order.
    pub(super) gains: Vec<f64>,
    /// Layout of WLB's best run of each.
    pub(super) layouts: Vec<Layout>,
}

impl Predicted {
    /// The smallest and the largest gain.
    pub(super) fn ends(&self) -> [f64; 2] {
        let fold = |first: f64, pick: fn(f64, f64) -> f64| self.gains.iter().copied().fold(first, pick);
        [fold(f64::INFINITY, f64::min), fold(0.0, f64::max)]
    }
}

/// Predicts all groups.
pub(super) fn groups(
    published: &Published,
    documents: &Documents,
    done: &(dyn Fn() + Sync),
) -> anyhow::Result<Vec<Predicted>> {
    let mut runs = Vec::new();
    for (n, group) in published.groups.iter().enumerate() {
        for case in &group.cases {
            runs.push((n, group, published.scenarios(group, *case, documents)?));
        }
    }
    let gains = in_parallel(&runs, |(_, group, scenarios)| {
        let gain = gain(scenarios, group);
        done();
        gain
    });
    let mut predicted: Vec<Predicted> = Vec::new();
    predicted.resize_with(published.groups.len(), || Predicted { gains: Vec::new(), layouts: Vec::new() });
    for ((n, _, _), gain) in runs.iter().zip(gains) {
        let (gain, layout) = gain?;
        predicted[*n].gains.push(gain);
        predicted[*n].layouts.push(layout);
    }
    Ok(predicted)
}

/// DistCA's gain over the best of WLB, each with the number of stages that suits it, and the layout of the latter.
fn gain(scenarios: &[Scenario], group: &Group) -> Result<(f64, Layout), SimulationError> {
    let mut distca = Fastest::default();
    let mut wlb = Fastest::default();
    for scenario in scenarios {
        let layout = scenario.layout;
        distca.take(layout, simulate(scenario, Policy::Distca));
        for context in contexts(group, layout) {
            wlb.take(Layout { context: Some(context), ..layout }, self::wlb(scenario, context));
        }
    }
    let ((_, distca), (layout, wlb)) = (distca.found(group)?, wlb.found(group)?);
    Ok((wlb / distca, layout))
}

/// Ranks that may share a sequence: those of the group, or, where a group with a pipeline does without, any power of two.
fn contexts(group: &Group, layout: Layout) -> Vec<u32> {
    if layout.pipeline == group.pipeline {
        return group.contexts.clone();
    }
    std::iter::successors(Some(1), |context| Some(2 * context))
        .take_while(|context| *context <= layout.ranks())
        .collect()
}

/// The layout of the fastest of some runs, with its seconds, and why another was refused. A refusal counts where nothing else
/// is found: without a pipeline, say, fewer ranks may share a sequence than a group tries.
#[derive(Debug, Default)]
struct Fastest {
    best: Option<(Layout, f64)>,
    refusal: Option<SimulationError>,
}

impl Fastest {
    fn take(&mut self, layout: Layout, outcome: Result<Outcome, SimulationError>) {
        match outcome {
            Ok(outcome) if self.best.is_none_or(|(_, seconds)| outcome.seconds < seconds) => {
                self.best = Some((layout, outcome.seconds));
            }
            Ok(_) => {}
            Err(error) => self.refusal = Some(error),
        }
    }

    fn found(self, group: &Group) -> Result<(Layout, f64), SimulationError> {
        let nothing = || SimulationError::Layout(format!("{} tries no layout", group.name));
        self.best.ok_or_else(|| self.refusal.unwrap_or_else(nothing))
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
    /// Ranks that share a sequence under WLB, or `None` for DistCA.
    pub(super) context: Option<u32>,
    pub(super) measured: f64,
    pub(super) predicted: f64,
}

impl Step {
    pub(super) fn policy(&self) -> String {
        self.context.map_or("distca".to_owned(), |context| format!("wlb, context parallel {context}"))
    }

    /// How far the prediction is off, as a part of what was measured.
    pub(super) fn error(&self) -> f64 {
        self.predicted / self.measured - 1.0
    }
}

/// Gains of DistCA over the best of WLB where both were measured: label, measured, predicted.
pub(super) fn measured_gains(steps: &[Step]) -> Vec<(&str, [f64; 2])> {
    let of_run = |run: &[Step]| -> Option<[f64; 2]> {
        let distca = run.iter().find(|step| step.context.is_none())?;
        let best = |seconds: fn(&Step) -> f64| {
            let wlb = run.iter().filter(|step| step.context.is_some()).map(seconds);
            wlb.min_by(f64::total_cmp).map(|best| best / seconds(distca))
        };
        Some([best(|step| step.measured)?, best(|step| step.predicted)?])
    };
    let runs = steps.chunk_by(|a, b| a.label == b.label);
    runs.filter_map(|run| Some((run.first()?.label.as_str(), of_run(run)?))).collect()
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
pub(super) fn steps(
    published: &Published,
    documents: &Documents,
    done: &(dyn Fn() + Sync),
) -> anyhow::Result<Vec<Step>> {
    let mut runs = Vec::new();
    for of in &published.measured {
        let scenario = published.measured(of, documents)?;
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
            Ok(Step { label: label(of), context: *context, measured: *measured, predicted: outcome?.seconds })
        };
    runs.iter().zip(outcomes).map(step).collect()
}

fn label(of: &Measured) -> String {
    let stages = match of.pipeline {
        1 => String::new(),
        stages => format!(", {stages} stages"),
    };
    format!("{}, {}, {}k on {} GPUs{stages}", of.model, of.documents, of.context / 1024, of.gpus)
}
