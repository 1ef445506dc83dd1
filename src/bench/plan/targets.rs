//! What plans must reach: rows of one table.

use super::free::Chosen;
use super::rival::{LINKS, Ratios};
use super::{Homes, Part, Planned};

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
/// The same where homes are chosen too.
const FREE_PLAN_MS: [(usize, f64); 3] = [(64, 60.0), (256, 250.0), (512, 600.0)];
/// The rank with most tokens over the mean, on every step whose homes are chosen.
const TOKENS: f64 = 1.02;

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

/// The same where homes are chosen.
struct FreeTargets {
    forward: f64,
    both: f64,
    busiest: [f64; 2],
    /// Layer time on the slowest links, over that of our plan of the step's own homes.
    layer_to_own: f64,
}

const FREE_WHOLE: FreeTargets =
    FreeTargets { forward: 0.29, both: 0.31, busiest: [0.22, 0.21], layer_to_own: 0.95 };
const FREE_LANE: FreeTargets =
    FreeTargets { forward: 0.31, both: 0.38, busiest: [0.34, 0.37], layer_to_own: 0.65 };

impl Row {
    pub(super) fn pass(&self) -> Option<bool> {
        self.reached.map(|reached| reached <= self.target)
    }
}

/// Everything there is a target for.
pub(super) fn rows(all: &[Planned]) -> Vec<Row> {
    rows_by_part(all, [(Part::Whole, WHOLE), (Part::Lane, LANE)], rows_of)
}

/// The same where homes are chosen.
pub(super) fn free_rows(all: &[Planned]) -> Vec<Row> {
    rows_by_part(all, [(Part::Whole, FREE_WHOLE), (Part::Lane, FREE_LANE)], free_rows_of)
}

/// Takes a row's name, its target and what is reached.
type Add<'a> = &'a mut dyn FnMut(String, f64, Option<f64>);

fn rows_by_part<T>(
    all: &[Planned],
    parts: [(Part, T); 2],
    rows_of: impl Fn(&[&Planned], &T, Add<'_>),
) -> Vec<Row> {
    let mut rows = Vec::new();
    for (part, targets) in parts {
        let steps: Vec<&Planned> =
            all.iter().filter(|planned| planned.part == part && !planned.variant).collect();
        rows_of(&steps, &targets, &mut |name, target, reached| {
            let name = format!("{} {name}", part.name());
            rows.push(Row { name, target, reached });
        });
    }
    rows
}

fn rows_of(steps: &[&Planned], targets: &Targets, add: Add<'_>) {
    let large = |step: &Planned| step.tokens_per_server > SMALL_STEP;
    let tasks = |step: &Planned| {
        let verdict = &step.verdict;
        verdict.tasks as f64 / (verdict.documents + TASKS_PER_SERVER * verdict.slots).max(1) as f64
    };
    add_balance(steps, add);
    let tiles = worst(steps, any, |step| step.verdict.tiles_over_ideal);
    add("tiles/ideal, worst step".into(), targets.tiles, tiles);
    add("tasks to documents + 12 x servers, above 128k, worst step".into(), 1.0, worst(steps, large, tasks));
    let piece = worst(steps, large, |step| step.verdict.largest_piece);
    add("largest piece, above 128k, worst step".into(), LARGEST_PIECE, piece);
    let mean = |of: fn(&Ratios) -> f64| mean_ratio(steps, of);
    add("forward bytes to DistCA".into(), targets.forward, mean(|ratios| ratios.forward));
    add("busiest link to DistCA".into(), targets.busiest, mean(|ratios| ratios.busiest));
    add("forward and backward bytes to DistCA".into(), targets.both, mean(|ratios| ratios.both));
    let bound = geometric_mean(steps.iter().filter_map(|step| step.over_bound()));
    add("forward bytes to the bound".into(), targets.bound, bound);
    let layer: [fn(&Ratios) -> f64; 2] = [|ratios| ratios.layer[0], |ratios| ratios.layer[1]];
    for ((link, target), of) in LINKS.iter().zip(targets.layer).zip(layer) {
        add(format!("layer time at {} GB/s to DistCA", link / 1e9), target, mean(of));
    }
    add_plan_ms(steps, PLAN_MS, add);
}

fn free_rows_of(steps: &[&Planned], targets: &FreeTargets, add: Add<'_>) {
    add_balance(steps, add);
    let chosen = |of: fn(&Chosen) -> f64| {
        steps.iter().filter_map(move |step| match &step.homes {
            Homes::Free(chosen) => Some(of(chosen)),
            Homes::Own(_) => None,
        })
    };
    let tokens = chosen(|chosen| chosen.tokens_over_mean).reduce(f64::max);
    add("tokens/mean, worst step".into(), TOKENS, tokens);
    let mean = |of: fn(&Ratios) -> f64| mean_ratio(steps, of);
    let [forward, backward] = targets.busiest;
    add("forward bytes to DistCA".into(), targets.forward, mean(|ratios| ratios.forward));
    add("forward and backward bytes to DistCA".into(), targets.both, mean(|ratios| ratios.both));
    add("busiest link forward to DistCA".into(), forward, mean(|ratios| ratios.busiest));
    add("busiest link backward to DistCA".into(), backward, mean(|ratios| ratios.busiest_backward));
    let both = chosen(|chosen| chosen.both_to_own).reduce(f64::max);
    add("forward and backward bytes to own homes, worst step".into(), 1.0, both);
    let layer: [fn(&Chosen) -> f64; 2] = [|chosen| chosen.layer_to_own[0], |chosen| chosen.layer_to_own[1]];
    for (link, of) in LINKS.iter().zip(layer) {
        let name = format!("layer time at {} GB/s to own homes, worst step", link / 1e9);
        add(name, 1.0, chosen(of).reduce(f64::max));
    }
    let [_, slow] = LINKS;
    let name = format!("layer time at {} GB/s to own homes", slow / 1e9);
    add(name, targets.layer_to_own, geometric_mean(chosen(layer[1])));
    add_plan_ms(steps, FREE_PLAN_MS, add);
}

fn add_balance(steps: &[&Planned], add: Add<'_>) {
    add("max/mean, worst step".into(), BALANCE, worst(steps, any, |step| step.verdict.max_over_mean));
}

fn add_plan_ms(steps: &[&Planned], targets: [(usize, f64); 3], add: Add<'_>) {
    for (servers, target) in targets {
        let such = |step: &Planned| step.verdict.slots == servers;
        let worst = worst(steps, such, |step| 1e3 * step.seconds);
        add(format!("plan ms at {servers} servers, worst step"), target, worst);
    }
}

fn any(_: &Planned) -> bool {
    true
}

fn mean_ratio(steps: &[&Planned], of: fn(&Ratios) -> f64) -> Option<f64> {
    geometric_mean(steps.iter().filter_map(|step| step.ratios.as_ref().map(of)))
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
        for rows in [rows(&[]), free_rows(&[])] {
            let mut names: Vec<&String> = rows.iter().map(|row| &row.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), rows.len());
            assert!(rows.iter().all(|row| row.pass().is_none()));
        }
    }

    #[test]
    fn a_mean_of_ratios_is_geometric() {
        assert_eq!(geometric_mean([].into_iter()), None);
        let mean = geometric_mean([0.25, 1.0].into_iter()).unwrap();
        assert!((mean - 0.5).abs() < 1e-12, "{mean}");
    }
}
