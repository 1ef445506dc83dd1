//! A plan for human eyes.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, Table, presets};
use outboard_attention::StepPlan;
use outboard_planner::{Loads, Pass, PassVerdict, Problem, Times, Traffic};

/// More servers than this are too many to read.
const ROWS: usize = 32;

/// Per server its share, tasks and bytes, busiest first where there are many; then the step as a whole. With a profile also
/// what it predicts of each.
pub(super) fn table(problem: &Problem, plan: &StepPlan, servers: &[u64]) -> String {
    let Problem { geometry, documents, slots, .. } = problem;
    let after = Loads::planned(plan, documents, geometry);
    let traffic = Traffic::of(plan, problem);
    let cells = after.totals();
    let total: f64 = cells.iter().map(|&c| c as f64).sum();
    let weights: f64 = slots.iter().map(|slot| slot.weight).sum();
    let share = |n: usize| match total > 0.0 {
        true => cells[n] as f64 / slots[n].weight / (total / weights),
        false => 0.0,
    };
    let mut tasks = vec![0usize; slots.len()];
    for (_, task) in plan.tasks() {
        tasks[task.slot as usize] += 1;
    }
    let times = problem.profile.as_ref().map(|profile| Times::planned(plan, problem, profile));
    let computing = times.as_ref().map(Times::totals);
    let mut order: Vec<usize> = (0..slots.len()).collect();
    if order.len() > ROWS {
        order.sort_by(|&a, &b| share(b).total_cmp(&share(a)));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut header = vec!["server", "rank", "cells / mean", "tasks", "MB in", "MB out"];
    header.extend(times.as_ref().map(|_| "compute ms"));
    table.set_header(header);
    for &n in order.iter().take(ROWS) {
        let rank = slots[n].rank.map_or("-".to_owned(), |rank| rank.to_string());
        let bytes_in = traffic.forward.bytes_in[n].saturating_add(traffic.backward.bytes_in[n]);
        let bytes_out = traffic.forward.bytes_out[n].saturating_add(traffic.backward.bytes_out[n]);
        let [bytes_in, bytes_out] = [bytes_in, bytes_out].map(|bytes| format!("{:.1}", bytes as f64 / 1e6));
        let share = format!("{:.4}", share(n));
        let mut row = vec![servers[n].to_string(), rank, share, tasks[n].to_string(), bytes_in, bytes_out];
        row.extend(computing.as_ref().map(|seconds| milliseconds(seconds.get(n).copied().unwrap_or(0.0))));
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let hidden = order.len().saturating_sub(ROWS);
    let more =
        if hidden > 0 { format!("\n{hidden} servers with less work are not shown") } else { String::new() };
    let ranks = documents.iter().flat_map(|d| d.homes()).map(|home| home.rank);
    let ranks: BTreeSet<u32> = ranks.chain(slots.iter().filter_map(|slot| slot.rank)).collect();
    let ranks: Vec<u32> = ranks.into_iter().collect();
    let before = Loads::at_home_of(documents, geometry, &ranks).max_over_mean();
    let predicted = times.map(|times| predicted(problem, &traffic, &times)).unwrap_or_default();
    format!(
        "{table}{more}\n{} tasks; max / mean {before:.3} at home, {:.4} planned; forward {:.3} GB, backward {:.3} GB a layer{predicted}",
        tasks.iter().sum::<usize>(),
        after.max_over_mean_by(|n| slots[n].weight),
        traffic.forward.total as f64 / 1e9,
        traffic.backward.total as f64 / 1e9,
    )
}

/// What a layer is predicted to take.
fn predicted(problem: &Problem, traffic: &Traffic, times: &Times) -> String {
    let [forward, backward] = times.busiest();
    let weights: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
    let mean = times.device_seconds / weights;
    let mut text = format!(
        "\npredicted a layer: compute {} ms (forward {}, backward {}) on the busiest server, max / mean {:.4}; {:.1}% of all \
         compute time lost to inefficient shapes",
        milliseconds(forward + backward),
        milliseconds(forward),
        milliseconds(backward),
        if mean > 0.0 { (forward + backward) / mean } else { 1.0 },
        100.0 * times.lost(),
    );
    if let Some(rates) = problem.rates {
        let passes = [(forward, &traffic.forward), (backward, &traffic.backward)];
        let layer: f64 = passes
            .into_iter()
            .map(|(seconds, pass)| {
                let &Pass { total, busiest, .. } = pass;
                PassVerdict { bytes: total, busiest, flops: 0.0, predicted: Some(seconds) }.seconds(rates)
            })
            .sum();
        text += &format!("; layer time {} ms", milliseconds(layer));
    }
    text
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3}", 1e3 * seconds)
}
