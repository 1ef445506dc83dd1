//! What is shown of a validation: tables, or JSON lines.

use outboard_simulator::{Layout, Tuning};
use serde::Serialize;

use super::cases::{Group, Published};
use super::facts::Fact;
use super::gains::{Predicted, Step, measured_gains};
use super::own::Own;
use crate::bench::kernel::show::{Output, table};

/// One group; the field names are those of the JSON lines.
#[derive(Debug, Serialize)]
struct GroupLine<'a> {
    kind: &'static str,
    group: &'a str,
    section: &'a str,
    fitted: bool,
    published: [Option<f64>; 2],
    predicted: [f64; 2],
    gains: &'a [f64],
    wlb: Vec<LayoutField>,
}

/// The layout of WLB's best run of a case.
#[derive(Debug, Serialize)]
struct LayoutField {
    context_parallel: u32,
    pipeline: u32,
}

#[derive(Debug, Serialize)]
struct StepLine<'a> {
    kind: &'static str,
    step: &'a str,
    policy: String,
    measured_seconds: f64,
    predicted_seconds: f64,
}

#[derive(Debug, Serialize)]
struct GainLine<'a> {
    kind: &'static str,
    step: &'a str,
    measured: f64,
    predicted: f64,
}

#[derive(Debug, Serialize)]
struct FactLine<'a> {
    kind: &'static str,
    what: &'a str,
    published: &'a str,
    predicted: f64,
    assumed: &'a str,
}

/// A run of this machine: what was measured, then what is predicted.
#[derive(Debug, Serialize)]
struct OwnLine<'a> {
    kind: &'static str,
    run: &'a str,
    steps: usize,
    local_seconds: [f64; 2],
    pool_seconds: [f64; 2],
    speedup: [f64; 2],
}

impl LayoutField {
    fn of(layout: &Layout) -> LayoutField {
        LayoutField { context_parallel: layout.context.unwrap_or(1), pipeline: layout.pipeline }
    }
}

pub(super) fn show(
    published: &Published,
    documents: &str,
    groups: &[Predicted],
    steps: &[Step],
    facts: &[Fact],
    output: &mut Output,
) -> anyhow::Result<()> {
    let named: Vec<(&Group, &Predicted)> = published.groups.iter().zip(groups).collect();
    output.say(&format!(
        "gain of DistCA over WLB-LLM at its best, smallest and largest of each group; published: {}; documents: {documents}",
        published.source
    ))?;
    let header = [
        "group",
        "",
        "published",
        "predicted",
        "difference, points",
        "largest of a constant",
        "ranks a sequence of WLB (*: no pipeline)",
    ];
    let mut rows = table(header, 2);
    for (group, predicted) in &named {
        let ends = predicted.ends();
        output.write(&GroupLine {
            kind: "validation",
            group: &group.name,
            section: &group.section,
            fitted: group.fitted,
            published: group.published,
            predicted: ends,
            gains: &predicted.gains,
            wlb: predicted.layouts.iter().map(LayoutField::of).collect(),
        })?;
        rows.add_row([
            group.name.clone(),
            if group.fitted { "fitted".to_owned() } else { "predicted".to_owned() },
            range(group.published.map(|end| end.map(|gain| format!("{gain:.2}")))),
            range(ends.map(|gain| Some(format!("{gain:.3}")))),
            range([0, 1].map(|n| group.published[n].map(|gain| format!("{:+.1}", 100.0 * (ends[n] - gain))))),
            constant(group, published.null),
            contexts(group, predicted),
        ]);
    }
    output.say(&rows.to_string())?;
    output.say(&missed(&named, published.null))?;
    output.say(&format!("\nsteps measured by DistCA's authors ({})", published.repository))?;
    let mut rows = table(["step", "policy", "measured s", "predicted s", "difference"], 2);
    for step in steps {
        output.write(&StepLine {
            kind: "validation-step",
            step: &step.label,
            policy: step.policy(),
            measured_seconds: step.measured,
            predicted_seconds: step.predicted,
        })?;
        rows.add_row([
            step.label.clone(),
            step.policy(),
            format!("{:.2}", step.measured),
            format!("{:.2}", step.predicted),
            format!("{:+.1}%", 100.0 * step.error()),
        ]);
    }
    output.say(&rows.to_string())?;
    output.say(&biased(steps))?;
    output.say("\ngain of DistCA over the best of WLB in these steps")?;
    let mut rows = table(["step", "measured", "predicted", "points"], 1);
    for (label, [measured, predicted]) in measured_gains(steps) {
        output.write(&GainLine { kind: "validation-gain", step: label, measured, predicted })?;
        let points = format!("{:+.1}", 100.0 * (predicted - measured));
        rows.add_row([label.to_owned(), format!("{measured:.3}"), format!("{predicted:.3}"), points]);
    }
    output.say(&rows.to_string())?;
    output.say("\nsingle figures of the paper, under assumptions")?;
    let mut rows = table(["what", "published", "predicted", "assumed"], 1);
    for fact in facts {
        output.write(&FactLine {
            kind: "validation-fact",
            what: &fact.what,
            published: fact.published,
            predicted: fact.predicted,
            assumed: fact.assumed,
        })?;
        let predicted = format!("{:.1}%", 100.0 * fact.predicted);
        rows.add_row([fact.what.clone(), fact.published.to_owned(), predicted, fact.assumed.to_owned()]);
    }
    output.say(&rows.to_string())?;
    output.say("\nnot published, and assumed")?;
    let mut rows = table(["what", "taken", "tried", "known"], 4);
    for assumption in &published.assumptions {
        rows.add_row([&assumption.what, &assumption.taken, &assumption.tried, &assumption.published]);
    }
    output.say(&rows.to_string())?;
    let entries = Tuning::default().entries();
    let entries: Vec<String> =
        entries.iter().map(|(name, value, unit)| format!("{name} {value} {unit}")).collect();
    output.say(&format!(
        "\nparameters, fitted to the groups that say so but for link_efficiency, which was measured: {}",
        entries.join(", ")
    ))
}

/// Runs of this machine.
pub(super) fn show_own(runs: &[Own], output: &mut Output) -> anyhow::Result<()> {
    output.say("steps of outboard train on this machine, s, measured and predicted")?;
    let header = [
        "run",
        "steps",
        "local",
        "predicted",
        "difference",
        "pool",
        "predicted",
        "difference",
        "speedup",
        "predicted",
        "points",
    ];
    let mut rows = table(header, 1);
    for own in runs {
        let Own { run, steps, local, pool } = own;
        let speedup = own.speedup();
        output.write(&OwnLine {
            kind: "validation-run",
            run,
            steps: *steps,
            local_seconds: *local,
            pool_seconds: *pool,
            speedup,
        })?;
        let off = |pair: &[f64; 2]| format!("{:+.1}%", 100.0 * (pair[1] / pair[0] - 1.0));
        rows.add_row([
            run.clone(),
            steps.to_string(),
            format!("{:.3}", local[0]),
            format!("{:.3}", local[1]),
            off(local),
            format!("{:.3}", pool[0]),
            format!("{:.3}", pool[1]),
            off(pool),
            format!("{:.3}", speedup[0]),
            format!("{:.3}", speedup[1]),
            format!("{:+.1}", 100.0 * (speedup[1] - speedup[0])),
        ]);
    }
    output.say(&rows.to_string())
}

fn range(ends: [Option<String>; 2]) -> String {
    let [low, high] = ends.map(|end| end.unwrap_or_else(|| "-".to_owned()));
    format!("{low} .. {high}")
}

/// How far a constant is from the ends.
fn constant(group: &Group, null: f64) -> String {
    let errors = group.published.iter().flatten().map(|gain| 100.0 * (null - gain).abs());
    format!("{:.1}", errors.fold(0.0, f64::max))
}

/// Ranks that share a sequence in WLB's best runs, with a star where these do without the group's pipeline.
fn contexts(group: &Group, predicted: &Predicted) -> String {
    let contexts = predicted.layouts.iter().map(|layout| {
        let star = if layout.pipeline == group.pipeline { "" } else { "*" };
        format!("{}{star}", layout.context.unwrap_or(1))
    });
    contexts.collect::<Vec<String>>().join(" ")
}

/// How far predicted steps are off, of each policy: in the mean, and in the mean of what they are off either way.
fn biased(steps: &[Step]) -> String {
    let of = |name: &str, of_policy: &dyn Fn(&Step) -> bool| {
        let errors: Vec<f64> =
            steps.iter().filter(|step| of_policy(step)).map(|step| 100.0 * step.error()).collect();
        let mean = |value: fn(f64) -> f64| {
            errors.iter().copied().map(value).sum::<f64>() / errors.len().max(1) as f64
        };
        format!("{name} {:+.1}% ({:.1}% either way)", mean(|error| error), mean(f64::abs))
    };
    format!(
        "mean difference: {}, {}, {}",
        of("all", &|_| true),
        of("distca", &|step| step.context.is_none()),
        of("wlb", &|step| step.context.is_some())
    )
}

/// How far all ends are off, and those of a constant.
fn missed(groups: &[(&Group, &Predicted)], null: f64) -> String {
    let mean = |fitted: bool, of: &dyn Fn(f64, f64) -> f64| {
        let ends =
            groups.iter().filter(|(group, _)| group.fitted == fitted).flat_map(|(group, predicted)| {
                group.published.into_iter().zip(predicted.ends()).filter_map(|(gain, end)| Some((gain?, end)))
            });
        let errors: Vec<f64> = ends.map(|(gain, end)| 100.0 * of(gain, end)).collect();
        errors.iter().sum::<f64>() / errors.len().max(1) as f64
    };
    let ours = |gain: f64, end: f64| (end - gain).abs();
    let constant = |gain: f64, _: f64| (null - gain).abs();
    format!(
        "mean distance from the published ends, in points: {:.1} where fitted and {:.1} elsewhere; the constant {null}: {:.1} and {:.1}",
        mean(true, &ours),
        mean(false, &ours),
        mean(true, &constant),
        mean(false, &constant)
    )
}
