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
    if !outcome.policy.disaggregates() {
        words.push(format!("context {}", outcome.layout.context));
    } else if outcome.layout.dedicated > 0 {
        let servers = outcome.layout.dedicated / outcome.layout.tensor.max(1);
        words.push(format!(
            "{} for {}",
            things(servers as usize, "server"),
            things(outcome.layout.ranks() as usize, "rank")
        ));
    } else {
        words.push("servers in place".to_owned());
    }
    if outcome.window > 1 {
        words.push(format!("over {} steps", outcome.window));
    }
    words.join(", ")
}

/// What was simulated, in one line. What varies is left out.
pub(crate) fn about(description: &Description, named: &Named) -> String {
    let scenario = &named.scenario;
    let layout = &scenario.layout;
    let entries = [
        ("model", scenario.model.name.clone()),
        ("layout.gpus", format!("{} {}", layout.gpus, scenario.gpu.name)),
        ("layout.tensor", format!("tensor {}", layout.tensor)),
        ("layout.pipeline", format!("pipeline {}", layout.pipeline)),
        ("layout.dedicated", format!("{} dedicated", layout.dedicated)),
        (
            "layout.micro_batches",
            things(layout.micro_batches as usize, "micro-batch").replace("batchs", "batches"),
        ),
        ("context", format!("context {}", count(scenario.context))),
        ("tokens", format!("{} tokens a step", count(scenario.tokens))),
        ("mix", format!("mix {}", named.mix)),
        ("seed", format!("seed {}", scenario.seed)),
        ("steps", format!("mean of {}", things(scenario.steps as usize, "step"))),
        ("recompute", format!("recompute {}", scenario.recompute.name())),
        ("update", if scenario.update { "with" } else { "without" }.to_owned() + " the update of weights"),
        (
            "network.within.bytes_per_second",
            format!(
                "{} within nodes of {}",
                rate(scenario.network.within.bytes_per_second, "B/s"),
                scenario.network.gpus_per_node
            ),
        ),
        (
            "network.between.bytes_per_second",
            format!("{} between them", rate(scenario.network.between.bytes_per_second, "B/s")),
        ),
    ];
    let varies = |name: &str| description.sweep.iter().any(|axis| axis.entry.name == name);
    let said: Vec<String> =
        entries.into_iter().filter(|(name, _)| !varies(name)).map(|(_, text)| text).collect();
    said.join(", ")
}

/// The parameters, in one line.
pub(crate) fn tuning(named: &Named) -> String {
    let entries = named.scenario.tuning.entries();
    let words = entries.map(|(name, value, unit)| format!("{name} {value} {unit}"));
    format!("tuning: {}", words.join(", "))
}

/// What a point says, in one sentence.
pub(crate) fn verdict(point: &Point) -> Option<String> {
    let fastest = point.fastest()?;
    let speed = format!("{} tokens/s", count(fastest.tokens_per_second.round() as u64));
    let Some(baseline) = point.baseline() else {
        return Some(format!("{} is the fastest: {speed}", fastest.policy));
    };
    let servers = point.best(|outcome| outcome.policy.disaggregates());
    let Some(servers) = servers else {
        return Some(format!("{} is the fastest without attention servers: {speed}", fastest.policy));
    };
    let gain = baseline.seconds / servers.seconds - 1.0;
    let (ours, theirs) = (servers.policy, baseline.policy);
    Some(if gain > 0.0005 {
        format!(
            "attention servers train {} faster: {ours} reaches {speed}, {theirs} is the best without them",
            percent(gain)
        )
    } else {
        format!(
            "attention servers gain nothing here: {theirs} reaches {speed}, {ours} takes {} longer",
            percent((servers.seconds / baseline.seconds - 1.0).max(0.0))
        )
    })
}
