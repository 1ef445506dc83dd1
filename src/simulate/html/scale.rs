//! Throughput as something varies, a line for each policy.

use outboard_simulator::{Outcome, Policy};

use super::super::description::Description;
use super::super::point::Point;
use super::{class, legend};
use crate::page::numbers::count;
use crate::page::svg::{at, drawing, escape, line, text, ticks, upright};

const LEFT: f64 = 66.0;
const RIGHT: f64 = 144.0;
const TOP: f64 = 30.0;
const PLOT: f64 = 230.0;
/// More charts than this are left out.
const CHARTS: usize = 12;
/// Labels are at least so far apart.
const APART: f64 = 13.0;

/// Points that differ by what is on the horizontal axis alone.
struct Chart<'a> {
    /// What the others are at, in words.
    title: String,
    points: Vec<&'a Point>,
}

pub(super) fn section(description: &Description, points: &[Point]) -> String {
    let axes = &description.sweep;
    let varies = |n: &usize| axes.get(*n).is_some_and(|axis| axis.values.len() > 1);
    let gpus = axes.iter().position(|axis| axis.entry.name == "layout.gpus").filter(varies);
    let Some(across) = gpus.or_else(|| (0..axes.len()).find(|n| varies(n))) else { return String::new() };
    let mut charts: Vec<Chart<'_>> = Vec::new();
    for point in points {
        let others = axes.iter().zip(&point.labels).enumerate().filter(|(n, _)| *n != across && varies(n));
        let words: Vec<String> =
            others.map(|(_, (axis, value))| format!("{} {value}", axis.entry.called())).collect();
        let title = words.join(", ");
        match charts.iter_mut().find(|chart| chart.title == title) {
            Some(chart) => chart.points.push(point),
            None => charts.push(Chart { title, points: vec![point] }),
        }
    }
    let left_out = charts.len().saturating_sub(CHARTS);
    let width = if charts.len() > 1 { 532.0 } else { 1080.0 };
    let drawings: String =
        charts.iter().take(CHARTS).map(|chart| drawn(description, across, chart, width)).collect();
    let more = match left_out {
        0 => String::new(),
        n => format!("<p>{n} more combinations are not drawn.</p>\n"),
    };
    let drawn =
        |policy: &&Policy| points.iter().flat_map(Point::outcomes).any(|outcome| outcome.policy == **policy);
    let marks: Vec<(String, &str)> =
        description.policies.iter().filter(drawn).map(|policy| (class(*policy), policy.name())).collect();
    format!(
        "<section id=\"scale\">\n<h2>Throughput of a GPU by {}</h2>\n\
         <p>Tokens a second of each GPU. Where a line has a gap, the policy cannot do it.</p>\n{}\
         <div class=\"charts\">\n{drawings}</div>\n{more}</section>\n",
        escape(words(axes[across].entry.called())),
        legend(&marks)
    )
}

fn per_gpu(outcome: &Outcome) -> f64 {
    outcome.tokens_per_second / f64::from(outcome.layout.gpus.max(1))
}

fn drawn(description: &Description, across: usize, chart: &Chart<'_>, width: f64) -> String {
    let axis = &description.sweep[across];
    let plot = width - LEFT - RIGHT;
    let bottom = TOP + PLOT;
    let values = || chart.points.iter().flat_map(|point| point.outcomes()).map(per_gpu);
    let most = values().fold(0.0, f64::max);
    if most <= 0.0 {
        return String::new();
    }
    // From 0 on, so that heights are to each other as what they stand for.
    let high = most * 1.05;
    let y = |value: f64| bottom - value / high * PLOT;
    let step = plot / axis.values.len() as f64;
    let x = |n: usize| LEFT + (n as f64 + 0.5) * step;
    let title = if chart.title.is_empty() { "Tokens a second of each GPU" } else { &chart.title };
    let mut content = text("title", [LEFT, 14.0], title);
    for tick in ticks(0.0, high, 5.0) {
        content.push_str(&line("grid", [LEFT, y(tick), LEFT + plot, y(tick)]));
        content.push_str(&text("label end", [LEFT - 6.0, y(tick) + 4.0], &count(tick.round() as u64)));
    }
    let every =
        ((axis.values.iter().map(String::len).max().unwrap_or(1) as f64 * 7.0 + 8.0) / step).ceil() as usize;
    for (n, value) in axis.values.iter().enumerate().step_by(every.max(1)) {
        content.push_str(&text("label mid", [x(n), bottom + 16.0], value));
    }
    content.push_str(&text("axis mid", [LEFT + plot / 2.0, bottom + 34.0], words(axis.entry.called())));
    content.push_str(&upright("axis", [14.0, TOP + PLOT / 2.0], "tokens/s a GPU"));
    let mut ends = Vec::new();
    for policy in &description.policies {
        let found: Vec<Option<&Outcome>> = axis
            .values
            .iter()
            .map(|value| {
                let point = chart.points.iter().find(|point| point.labels.get(across) == Some(value))?;
                point.outcomes().find(|outcome| outcome.policy == *policy)
            })
            .collect();
        let place = |n: usize, outcome: &Outcome| [x(n), y(per_gpu(outcome))];
        content.push_str(&path(*policy, &found, place));
        let last = found.iter().enumerate().rev().find_map(|(n, outcome)| Some((n, (*outcome)?)));
        ends.extend(last.map(|(n, outcome)| (*policy, place(n, outcome))));
        for (n, outcome) in found.iter().enumerate() {
            if let Some(outcome) = outcome {
                content.push_str(&mark(place(n, outcome), &axis.values[n], outcome));
            }
        }
    }
    content.push_str(&names(ends, LEFT + plot + 4.0, [TOP, bottom]));
    drawing(
        "plot-of",
        [width, bottom + 42.0],
        &format!("Throughput of a GPU by {}: {title}", words(axis.entry.called())),
        &content,
    )
}

/// What an axis is called in a sentence.
fn words(entry: &str) -> &str {
    match entry {
        "gpus" => "number of GPUs",
        "link-between" => "bytes a second between nodes",
        other => other,
    }
}

/// A line through what a policy reaches, with gaps where it cannot.
fn path(policy: Policy, found: &[Option<&Outcome>], place: impl Fn(usize, &Outcome) -> [f64; 2]) -> String {
    let mut d = String::new();
    let mut on = false;
    for (n, outcome) in found.iter().enumerate() {
        if let Some(outcome) = outcome {
            let [x, y] = place(n, outcome);
            d.push_str(&format!("{}{} {}", if on { 'L' } else { 'M' }, at(x), at(y)));
        }
        on = outcome.is_some();
    }
    if d.is_empty() { d } else { format!("<path class=\"run {}\" d=\"{d}\"/>\n", class(policy)) }
}

fn mark([x, y]: [f64; 2], value: &str, outcome: &Outcome) -> String {
    let title = format!(
        "{} at {value}: {} tokens/s, {} a GPU",
        outcome.policy,
        count(outcome.tokens_per_second.round() as u64),
        count(per_gpu(outcome).round() as u64)
    );
    format!(
        "<circle class=\"spot {}\" cx=\"{}\" cy=\"{}\" r=\"4\"><title>{}</title></circle>\n",
        class(outcome.policy),
        at(x),
        at(y),
        escape(&title)
    )
}

/// Names beside the ends of lines, pushed apart where these are close.
fn names(mut ends: Vec<(Policy, [f64; 2])>, x: f64, [top, bottom]: [f64; 2]) -> String {
    ends.sort_by(|a, b| a.1[1].total_cmp(&b.1[1]));
    let mut places: Vec<f64> = Vec::with_capacity(ends.len());
    for (_, [_, y]) in &ends {
        let after = places.last().map_or(top, |last| last + APART);
        places.push(y.max(after));
    }
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = place.min(limit);
        limit = *place - APART;
    }
    let named = ends.iter().zip(&places);
    named
        .map(|((policy, _), y)| text(&format!("of {}", class(*policy)), [x, y + 4.0], policy.name()))
        .collect()
}
