//! The table of policies side by side, and the words around it.

use comfy_table::{CellAlignment, Table, presets};
use outboard_simulator::{Account, Outcome};

use super::description::{Description, Named};
use super::point::{Point, Row};
use crate::page::numbers::{count, percent, rate, things};

/// Parts of the account that are time lost, with what their columns are called.
pub(crate) const LOST: [(&str, &str); 5] = [
    ("imbalance", "imbalance lost"),
    ("bubble", "bubble"),
    ("exposed", "exposed"),
    ("gradients", "gradients"),
    ("host", "host"),
];

const FIGURES: [&str; 5] = ["step s", "tokens/s", "gain", "MFU", "max/mean"];
const BYTES: [&str; 4] = ["memory GB", "mean GB", "GB within", "GB between"];

/// What columns are called.
pub(super) fn header(description: &Description) -> Vec<&'static str> {
    let axes = description.sweep.iter().map(|axis| axis.entry.called());
    let figures = FIGURES.into_iter().chain(LOST.map(|(_, column)| column)).chain(BYTES);
    axes.chain(["policy"]).chain(figures).chain(["chosen"]).collect()
}

/// A row for each policy of each point.
pub(super) fn table(description: &Description, points: &[Point]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let header = header(description);
    table.set_header(&header);
    for point in points {
        for row in &point.rows {
            table.add_row(cells(description, point, row));
        }
    }
    let words = description.sweep.len() + 1;
    for column in table.column_iter_mut().skip(words).take(header.len() - words - 1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The columns of a row.
pub(super) fn cells(description: &Description, point: &Point, row: &Row) -> Vec<String> {
    let mut cells = point.labels.clone();
    let outcome = match &row.result {
        Ok(outcome) => outcome,
        Err(reason) => {
            cells.push(row.policy.name().to_owned());
            cells.resize(header(description).len() - 1, "-".to_owned());
            cells.push(reason.replace('\n', " "));
            return cells;
        }
    };
    let is_fastest = point.fastest().is_some_and(|fastest| fastest.policy == outcome.policy);
    let gigabytes = |bytes: f64| format!("{:.1}", bytes / 1e9);
    cells.extend([
        format!("{}{}", outcome.policy, if is_fastest { " *" } else { "" }),
        format!("{:.3}", outcome.seconds),
        count(outcome.tokens_per_second.round() as u64),
        gain(point, outcome),
        part(outcome.mfu),
        format!("{:.2}", outcome.imbalance),
    ]);
    cells.extend(LOST.map(|(name, _)| part(share(outcome, name))));
    cells.extend([outcome.memory.total(), outcome.mean_memory].map(gigabytes));
    cells.extend([outcome.carried.most_within, outcome.carried.most_between].map(gigabytes));
    cells.push(chosen(outcome));
    cells
}

/// The part of a step's time that goes there.
pub(crate) fn share(outcome: &Outcome, name: &str) -> f64 {
    let parts = Account::NAMES.iter().zip(outcome.account.parts());
    let seconds: f64 = parts.filter(|(known, _)| **known == name).map(|(_, seconds)| seconds).sum();
    seconds / outcome.account.total().max(f64::MIN_POSITIVE)
}

fn part(part: f64) -> String {
    format!("{:.1}%", part * 100.0)
}

/// What a policy gains over the baseline.
pub(crate) fn gain(point: &Point, outcome: &Outcome) -> String {
    match point.gain(outcome) {
        Some(_) if point.baseline().is_some_and(|baseline| baseline.policy == outcome.policy) => {
            "baseline".to_owned()
        }
        Some(gain) => format!("{:+.1}%", gain * 100.0),
        None => "-".to_owned(),
    }
}

/// What the policy chose.
pub(crate) fn chosen(outcome: &Outcome) -> String {
    let mut words = Vec::new();
    if let Some(context) = outcome.layout.context {
        words.push(format!("context parallel {context}"));
    }
    if outcome.policy.disaggregates() {
        words.push(match outcome.layout.dedicated / outcome.layout.tensor.max(1) {
            0 => "servers in place".to_owned(),
            servers => format!(
                "{} for {}",
                things(servers as usize, "server"),
                things(outcome.layout.ranks() as usize, "rank")
            ),
        });
    }
    if outcome.window > 1 {
        words.push(format!("over {} steps", outcome.window));
    }
    words.join(", ")
}

/// What was simulated, in one line. What is not the same in all points is left out.
pub(crate) fn about(points: &[Point]) -> String {
    let said: Vec<Vec<String>> = points.iter().map(|point| entries(&point.named)).collect();
    let Some(first) = said.first() else { return String::new() };
    let same = |n: &usize| said.iter().all(|of_point| of_point.get(*n) == first.get(*n));
    // Tokens a rank are only worth saying where those of a step differ.
    let said_already = |n: &usize| *n == TOKENS + 1 && same(&TOKENS);
    let words = (0..first.len()).filter(|n| same(n) && !said_already(n)).map(|n| first[n].as_str());
    words.filter(|words| !words.is_empty()).collect::<Vec<_>>().join(", ")
}

/// Which of the entries below are the tokens of a step; those of a rank follow.
const TOKENS: usize = 7;

/// All of one scenario.
pub(crate) fn description(named: &Named) -> String {
    let entries = entries(named).into_iter().filter(|words| !words.is_empty());
    entries.collect::<Vec<_>>().join(", ")
}

fn entries(named: &Named) -> Vec<String> {
    let scenario = &named.scenario;
    let (layout, network) = (&scenario.layout, &scenario.network);
    let a_rank = scenario.tokens / u64::from(layout.ranks().max(1));
    let where_served = match layout.dedicated {
        0 => String::new(),
        dedicated => format!("{dedicated} of them attention servers"),
    };
    let micro_batches = match layout.micro_batches {
        1 => "1 micro-batch".to_owned(),
        n => format!("{n} micro-batches"),
    };
    vec![
        scenario.model.name.clone(),
        format!("{} {}", layout.gpus, scenario.gpu.name),
        where_served,
        format!("tensor {}", layout.tensor),
        format!("pipeline {}", layout.pipeline),
        micro_batches,
        format!("context {}", count(scenario.context)),
        format!("{} tokens a step", count(scenario.tokens)),
        format!("{} tokens a rank", count(a_rank)),
        format!("mix {}", named.mix),
        format!("seed {}", scenario.seed),
        format!("mean of {}", things(scenario.steps as usize, "step")),
        format!("recompute {}", scenario.recompute.name()),
        if scenario.update { String::new() } else { "without the update of weights".to_owned() },
        format!("{} within nodes of {}", rate(network.within.bytes_per_second, "B/s"), network.gpus_per_node),
        format!("{} between them", rate(network.between.bytes_per_second, "B/s")),
    ]
}

/// What attention servers gain over all points, in one sentence.
pub(crate) fn range(points: &[Point]) -> Option<String> {
    let gain = |point: &Point| {
        let servers = point.servers()?;
        point.gain(servers)
    };
    let gains: Vec<f64> = points.iter().filter_map(gain).collect();
    let (least, most) = (gains.iter().copied().reduce(f64::min)?, gains.iter().copied().reduce(f64::max)?);
    let points = things(gains.len(), "point");
    Some(format!("over {points} attention servers gain {:+.1}% to {:+.1}%", least * 100.0, most * 100.0))
}

/// The parameters, in one line.
pub(crate) fn tuning(named: &Named) -> String {
    parameters(named, |_| false)
}

/// The same of all points.
pub(super) fn tunings(points: &[Point]) -> String {
    let of = |point: &Point, n: usize| point.named.scenario.tuning.entries()[n].1;
    let varies = |n: usize| points.iter().any(|point| of(point, n) != of(&points[0], n));
    match points {
        [] => String::new(),
        [point] => tuning(&point.named),
        [first, ..] => parameters(&first.named, varies),
    }
}

fn parameters(named: &Named, varies: impl Fn(usize) -> bool) -> String {
    let entries = named.scenario.tuning.entries().into_iter().enumerate();
    let words = entries.map(|(n, (name, value, unit))| match varies(n) {
        true => format!("{name} varies"),
        false => format!("{name} {value} {unit}"),
    });
    format!("tuning: {}", words.collect::<Vec<_>>().join(", "))
}

/// What a point says, in one sentence.
pub(crate) fn verdict(point: &Point) -> Option<String> {
    let fastest = point.fastest()?;
    let speed = |outcome: &Outcome| format!("{} tokens/s", count(outcome.tokens_per_second.round() as u64));
    let servers = point.servers();
    let (Some(baseline), Some(servers)) = (point.baseline(), servers) else {
        let asked = point.rows.iter().any(|row| row.policy.disaggregates());
        let none = if asked && servers.is_none() { "attention servers cannot do it; " } else { "" };
        return Some(format!("{none}{} is the fastest: {}", fastest.policy, speed(fastest)));
    };
    let gain = baseline.seconds / servers.seconds - 1.0;
    let (ours, theirs) = (servers.policy, baseline.policy);
    let said = if gain > 0.0005 {
        format!(
            "attention servers train {} faster: {ours} reaches {}, {theirs} is the best without them",
            percent(gain),
            speed(servers)
        )
    } else {
        let longer = servers.seconds / baseline.seconds;
        let longer = match longer {
            2.0.. => format!("{longer:.1} times as long"),
            _ => format!("{} longer", percent((longer - 1.0).max(0.0))),
        };
        format!(
            "attention servers gain nothing here: {theirs} reaches {}, {ours} takes {longer}",
            speed(baseline)
        )
    };
    let published = point
        .published()
        .filter(|published| published.policy != theirs && published.seconds < baseline.seconds);
    Some(match published {
        Some(other) => {
            format!("{said}; {}, as its paper describes it, would reach {}", other.policy, speed(other))
        }
        None => said,
    })
}
