//! What plans must reach: rows of one table.

use super::rival::{LINKS, Ratios};
use super::{Part, Planned};

/// The slot with most work over the mean, on every step.
const BALANCE: f64 = 1.01;
/// A slot has about so many tasks besides one for each document.
const TASKS_PER_SERVER: usize = 12;
/// No task is more of a slot's work,
const LARGEST_PIECE: f64 = 0.25;
/// on steps with more tokens a server.
const SMALL_STEP: usize = 128 * 1024;
/// Milliseconds of planning by number of servers.
const PLAN_MS: [(usize, f64); 3] = [(64, 10.0), (256, 25.0), (512, 50.0)];

/// What must be reached, and what is.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    /// The most that passes.
    pub(super) target: f64,
    /// `None` where no step tells.
    pub(super) reached: Option<f64>,
}

/// Targets that differ between steps planned whole and their lanes.
struct Targets {
    tiles: f64,
    forward: f64,
    busiest: f64,
    both: f64,
    bound: f64,
    layer: [f64; 2],
}

const WHOLE: Targets =
    Targets { tiles: 1.02, forward: 0.475, busiest: 0.28, both: 0.42, bound: 1.015, layer: [0.66, 0.37] };
const LANE: Targets =
    Targets { tiles: 1.025, forward: 0.73, busiest: 0.52, both: 0.75, bound: 1.07, layer: [0.76, 0.45] };

impl Row {
    pub(super) fn pass(&self) -> Option<bool> {
        self.reached.map(|reached| reached <= self.target)
    }
}

/// Everything there is a target for.
pub(super) fn rows(all: &[Planned]) -> Vec<Row> {
    let mut rows = Vec::new();
    for (part, targets) in [(Part::Whole, WHOLE), (Part::Lane, LANE)] {
        let steps: Vec<&Planned> =
            all.iter().filter(|planned| planned.part == part && !planned.variant).collect();
        rows_of(&steps, &targets, &mut |name, target, reached| {
            let name = format!("{} {name}", part.name());
            rows.push(Row { name, target, reached });
        });
    }
    rows
}

fn rows_of(steps: &[&Planned], targets: &Targets, add: &mut impl FnMut(String, f64, Option<f64>)) {
    let large = |step: &Planned| step.tokens_per_server > SMALL_STEP;
    let all = |_: &Planned| true;
    let tasks = |step: &Planned| {
        let verdict = &step.verdict;
        verdict.tasks as f64 / (verdict.documents + TASKS_PER_SERVER * verdict.slots).max(1) as f64
    };
    add("max/mean, worst step".into(), BALANCE, worst(steps, all, |step| step.verdict.max_over_mean));
    add(
        "tiles/ideal, worst step".into(),
        targets.tiles,
        worst(steps, all, |step| step.verdict.tiles_over_ideal),
    );
    add("tasks to documents + 12 x servers, above 128k, worst step".into(), 1.0, worst(steps, large, tasks));
    let piece = worst(steps, large, |step| step.verdict.largest_piece);
    add("largest piece, above 128k, worst step".into(), LARGEST_PIECE, piece);
    let mean =
        |of: fn(&Ratios) -> f64| geometric_mean(steps.iter().filter_map(|step| step.ratios.as_ref().map(of)));
    add("forward bytes to DistCA".into(), targets.forward, mean(|ratios| ratios.forward));
    add("busiest link to DistCA".into(), targets.busiest, mean(|ratios| ratios.busiest));
    add("forward and backward bytes to DistCA".into(), targets.both, mean(|ratios| ratios.both));
    let bound = geometric_mean(steps.iter().filter_map(|step| step.over_bound()));
    add("forward bytes to the bound".into(), targets.bound, bound);
    let layer: [fn(&Ratios) -> f64; 2] = [|ratios| ratios.layer[0], |ratios| ratios.layer[1]];
    for ((link, target), of) in LINKS.iter().zip(targets.layer).zip(layer) {
        add(format!("layer time at {} GB/s to DistCA", link / 1e9), target, mean(of));
    }
    for (servers, target) in PLAN_MS {
        let such = |step: &Planned| step.verdict.slots == servers;
        add(
            format!("plan ms at {servers} servers, worst step"),
            target,
            worst(steps, such, |step| 1e3 * step.seconds),
        );
    }
}

fn worst(
    steps: &[&Planned],
    counts: impl Fn(&Planned) -> bool,
    figure: impl Fn(&Planned) -> f64,
) -> Option<f64> {
    steps.iter().filter(|step| counts(step)).map(|step| figure(step)).reduce(f64::max)
}

fn geometric_mean(ratios: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0u32);
    for ratio in ratios {
        sum += ratio.ln();
        count += 1;
    }
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_rows_apart_and_nothing_passes_unseen() {
        let rows = rows(&[]);
        let mut names: Vec<&String> = rows.iter().map(|row| &row.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), rows.len());
        assert!(rows.iter().all(|row| row.pass().is_none()));
    }

    #[test]
    fn a_mean_of_ratios_is_geometric() {
        assert_eq!(geometric_mean([].into_iter()), None);
        let mean = geometric_mean([0.25, 1.0].into_iter()).unwrap();
        assert!((mean - 0.5).abs() < 1e-12, "{mean}");
    }
}
