//! The figures that matter most.

use outboard_planner::least_seconds;

use super::super::figures::{Figures, busiest, layer_times};
use super::{Given, Planned};
use crate::page::numbers::{bytes, rate, seconds, things};
use crate::page::tile;

pub(super) fn section(planned: &Planned<'_>, figures: &Figures) -> String {
    let Figures { verdict, tasks, imbalance_before, .. } = figures;
    let (forward, backward) = (verdict.forward.bytes, verdict.backward.bytes);
    let most = tasks.iter().max().copied().unwrap_or(0);
    let least = tasks.iter().min().copied().unwrap_or(0);
    let tiles = [
        tile(
            "Busiest over mean",
            &format!("{imbalance_before:.3} → {:.4}", verdict.max_over_mean),
            &["cells of attention, at home → planned".to_owned()],
        ),
        times(planned, figures),
        tile(
            "Bytes moved",
            &bytes(forward.saturating_add(backward)),
            &[format!("forward {}", bytes(forward)), format!("backward {}", bytes(backward))],
        ),
        links(planned, figures),
        tile(
            "Tasks",
            &things(verdict.tasks, "task"),
            &[
                if most == least {
                    format!("{most} a server")
                } else {
                    format!("{least} to {most} a server")
                },
                format!("largest: {:.1}% of its server's work", verdict.largest_piece * 100.0),
            ],
        ),
        tile("Planned in", &seconds(planned.seconds), &["reading and writing left out".to_owned()]),
    ];
    format!(
        "<section id=\"figures\">\n<h2>Figures of one layer</h2>\n<dl class=\"tiles\">\n{}</dl>\n</section>\n",
        tiles.concat()
    )
}

/// Layer time, its parts, and what it would be with every row at home.
fn times(planned: &Planned<'_>, figures: &Figures) -> String {
    let rates = planned.rates;
    let passes = layer_times(&figures.verdict, rates);
    let total: f64 = passes.iter().map(|pass| pass.1).sum();
    let mut notes: Vec<String> = passes
        .iter()
        .map(|&(name, _, compute, link)| {
            format!("{name}: compute {}, link {}", seconds(compute), seconds(link))
        })
        .collect();
    let profiled = planned.problem.profile.is_some();
    if let (Some(ratio), false) = (figures.compute_at_home(), profiled) {
        let compute: f64 = passes.iter().map(|pass| pass.2).sum();
        notes.push(format!("all at home: {}", seconds(compute * ratio)));
    }
    // What a profile predicts has no such bound.
    if !profiled && let Ok(least) = least_seconds(planned.problem, rates) {
        notes.push(format!("no plan takes less than {}", seconds(least)));
    }
    let (flops, link) = (rate(rates.flops_per_second, "FLOP/s"), rate(rates.bytes_per_second, "B/s"));
    notes.push(match planned.given {
        Given { link: true, .. } if profiled => format!("as the profile predicts, at the step's {link}"),
        Given { .. } if profiled => format!("as the profile predicts, and, by default, {link}"),
        Given { compute: true, link: true } => format!("at the step's {flops} and {link}"),
        Given { compute: false, link: false } => format!("at {flops} and {link}, by default"),
        Given { compute: true, .. } => format!("at the step's {flops} and, by default, {link}"),
        Given { compute: false, .. } => format!("at the step's {link} and, by default, {flops}"),
    });
    tile("Layer time, forward + backward", &seconds(total), &notes)
}

/// The busiest link of each pass.
fn links(planned: &Planned<'_>, figures: &Figures) -> String {
    let found = figures.passes().map(|(name, pass)| (name, busiest(pass, &planned.problem.slots)));
    let most = found.iter().filter_map(|(_, link)| link.map(|link| link.bytes)).max();
    let note = |(name, link): &(&str, Option<super::super::figures::Link>)| match link {
        Some(link) => {
            format!("{name}: {} {} server {}", bytes(link.bytes), link.way, planned.server(link.slot))
        }
        None => format!("{name}: nothing moves"),
    };
    let mut notes: Vec<String> = found.iter().map(note).collect();
    if planned.plan.ticks.len() > 1 {
        notes.push("all ticks together".to_owned());
    }
    tile("Busiest link", &bytes(most.unwrap_or(0)), &notes)
}
