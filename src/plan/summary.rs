//! A plan for human eyes.

use comfy_table::{CellAlignment, Table, presets};
use outboard_planner::{Problem, Rates, Times, least_seconds};

use super::chosen::Chosen;
use super::figures::{Figures, busiest, layer_times};
use crate::page::numbers::{count, seconds};

/// More servers than this are too many to read.
const ROWS: usize = 32;

/// A plan and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown<'a> {
    pub(super) problem: &'a Problem,
    pub(super) figures: &'a Figures,
    /// Slot n is server `servers[n]`.
    pub(super) servers: &'a [u64],
    /// How fast servers and links are, where that is known.
    pub(super) rates: Option<Rates>,
    /// The homes, where some were chosen.
    pub(super) chosen: Option<&'a Chosen>,
}

/// Per server its share, tasks and bytes, busiest first where there are many, what its rank holds and it fetches where homes
/// were chosen, and with a profile what it predicts; then the step as a whole. Layer time where rates are known.
pub(super) fn table(shown: &Shown<'_>) -> String {
    let &Shown { problem, figures, servers, rates, chosen } = shown;
    let Figures { traffic, tasks, verdict, times: predicted, .. } = figures;
    let slots = &problem.slots;
    let (_, shares) = figures.shares();
    let computing = predicted.as_ref().map(Times::totals);
    let mut order: Vec<usize> = (0..slots.len()).collect();
    if order.len() > ROWS {
        order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]));
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let mut header = vec!["server", "rank", "cells / mean", "tasks", "MB in", "MB out"];
    if chosen.is_some() {
        header.extend(["tokens / mean", "keys fetched", "rows fetched"]);
    }
    header.extend(computing.as_ref().map(|_| "compute ms"));
    table.set_header(header);
    for &n in order.iter().take(ROWS) {
        let rank = slots[n].rank.map_or("-".to_owned(), |rank| rank.to_string());
        let bytes_in = traffic.forward.bytes_in[n].saturating_add(traffic.backward.bytes_in[n]);
        let bytes_out = traffic.forward.bytes_out[n].saturating_add(traffic.backward.bytes_out[n]);
        let mut row = vec![
            servers[n].to_string(),
            rank,
            format!("{:.4}", shares[n]),
            tasks[n].to_string(),
            megabytes(bytes_in),
            megabytes(bytes_out),
        ];
        row.extend(chosen.map(|chosen| held(problem, chosen, n)).into_iter().flatten());
        row.extend(computing.as_ref().map(|seconds| milliseconds(seconds.get(n).copied().unwrap_or(0.0))));
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let hidden = order.len().saturating_sub(ROWS);
    let more =
        if hidden > 0 { format!("\n{hidden} servers with less work are not shown") } else { String::new() };
    format!(
        "{table}{more}\n{} tasks; max / mean {:.3} at home, {:.4} planned; forward {:.3} GB, backward {:.3} GB a layer\n{}{}{}{}",
        verdict.tasks,
        figures.imbalance_before,
        verdict.max_over_mean,
        traffic.forward.total as f64 / 1e9,
        traffic.backward.total as f64 / 1e9,
        links(problem, figures, servers),
        chosen
            .map(|chosen| format!("\n{}; keys and rows fetched are means over kv heads", chosen.words()))
            .unwrap_or_default(),
        predicted.as_ref().map(|times| self::predicted(problem, times)).unwrap_or_default(),
        rates.map(|rates| times(problem, figures, rates)).unwrap_or_default(),
    )
}

/// What the rank of a slot holds, and what the slot fetches.
fn held(problem: &Problem, chosen: &Chosen, slot: usize) -> [String; 3] {
    let rank = problem.slots.get(slot).and_then(|slot| slot.rank);
    let held = rank.map_or("-".to_owned(), |rank| format!("{:.4}", chosen.holdings.over_mean(rank)));
    let fetched = chosen.fetched.get(slot).copied().unwrap_or_default();
    let fetched = fetched.of_a_head(problem.geometry.kv_heads());
    [held, count(fetched.keys), count(fetched.rows)]
}

/// What a layer is predicted to take.
fn predicted(problem: &Problem, times: &Times) -> String {
    let [forward, backward] = times.busiest();
    let weights: f64 = problem.slots.iter().map(|slot| slot.weight).sum();
    let mean = times.device_seconds / weights;
    format!(
        "\npredicted a layer: compute {} ms (forward {}, backward {}) on the busiest server, max / mean {:.4}; {:.1}% of all \
         compute time lost to inefficient shapes",
        milliseconds(forward + backward),
        milliseconds(forward),
        milliseconds(backward),
        if mean > 0.0 { (forward + backward) / mean } else { 1.0 },
        100.0 * times.lost(),
    )
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.3}", 1e3 * seconds)
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// The link that is in use longest in each pass.
fn links(problem: &Problem, figures: &Figures, servers: &[u64]) -> String {
    let passes = figures.passes().map(|(name, pass)| match busiest(pass, &problem.slots) {
        Some(link) => {
            let server = servers.get(link.slot).copied().unwrap_or_default();
            format!("{name} {} MB ({} server {server})", megabytes(link.bytes), link.way)
        }
        None => format!("{name} 0 MB"),
    });
    format!("busiest link: {}", passes.join(", "))
}

/// Layer time, and the least of any plan. What a profile predicts has no such bound.
fn times(problem: &Problem, figures: &Figures, rates: Rates) -> String {
    let passes = layer_times(&figures.verdict, rates).map(|(name, whole, compute, link)| {
        format!("{name} {} (compute {}, link {})", seconds(whole), seconds(compute), seconds(link))
    });
    let least = match problem.profile {
        Some(_) => String::new(),
        None => least_seconds(problem, rates)
            .map(|least| format!("; no plan takes less than {}", seconds(least)))
            .unwrap_or_default(),
    };
    format!("\nlayer time: {}{least}", passes.join(", "))
}

#[cfg(test)]
mod tests {
    use outboard_planner::plan;

    use super::super::examples::in_place;
    use super::*;

    #[test]
    fn links_are_named_and_times_where_rates_are_known() {
        let problem = in_place(2);
        let figures = Figures::of(&problem, &plan(&problem).unwrap()).unwrap();
        let rates = Rates { flops_per_second: figures.verdict.forward.flops, bytes_per_second: 1e6 };
        let shown = Shown {
            problem: &problem,
            figures: &figures,
            servers: &[70, 71],
            rates: Some(rates),
            chosen: None,
        };
        let known = table(&shown);
        let most = figures.traffic.forward.bytes_in[1];
        assert!(most > figures.traffic.forward.bytes_in[0]);
        let link = format!("busiest link: forward {:.1} MB (into server 71)", most as f64 / 1e6);
        assert!(known.contains(&link), "{known}");
        let link = seconds(most as f64 / 1e6);
        let time = format!("layer time: forward {link} (compute 1.00 s, link {link}), backward");
        assert!(known.contains(&time) && known.contains("no plan takes less than"), "{time}\n{known}");
        let unknown = table(&Shown { rates: None, ..shown });
        assert!(unknown.contains("busiest link") && !unknown.contains("layer time"), "{unknown}");
        assert!(!unknown.contains("fetched") && !unknown.contains("chosen"), "{unknown}");
    }
}
