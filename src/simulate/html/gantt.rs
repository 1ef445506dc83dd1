//! What some devices do when, in the first step.

use outboard_simulator::{Doing, Layout, Outcome, Trace, Traced};

use super::super::point::Point;
use super::{leading, legend};
use crate::page::numbers::seconds;
use crate::page::svg::{at, drawing, escape, line, text, ticks};

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 112.0;
const PLOT: f64 = WIDTH - LEFT - 26.0;
const TOP: f64 = 4.0;
const COMPUTE: f64 = 16.0;
const TRANSFER: f64 = 6.0;
const ROW: f64 = COMPUTE + TRANSFER + 8.0;
/// What is thinner than this many pixels is merged with what is beside it.
const VISIBLE: f64 = 0.5;

const KINDS: [(Doing, &str, &str); 6] = [
    (Doing::Dense, "g-dense", "the rest of a layer, forward"),
    (Doing::DenseBackward, "g-dense-back", "the same, backward"),
    (Doing::Attention, "g-attention", "core attention, forward"),
    (Doing::AttentionBackward, "g-attention-back", "core attention, backward"),
    (Doing::Update, "g-update", "gradients and optimizer"),
    (Doing::Transfer, "g-transfer", "bytes on their way"),
];

/// From when to when is drawn.
#[derive(Clone, Copy)]
struct Window {
    from: f64,
    to: f64,
}

pub(super) fn section(point: &Point, of_point: &str) -> String {
    let drawn: Vec<&Outcome> =
        leading(point).into_iter().filter(|outcome| !outcome.trace.stretches.is_empty()).collect();
    if drawn.is_empty() {
        return String::new();
    }
    let marks: Vec<(String, &str)> =
        KINDS.iter().map(|(_, class, name)| ((*class).to_owned(), *name)).collect();
    let longest =
        drawn.iter().filter_map(|outcome| outcome.step_seconds.first()).copied().fold(0.0, f64::max);
    let charts: String = drawn
        .iter()
        .map(|outcome| {
            let whole = chart(outcome, Window { from: 0.0, to: longest }, "the whole step");
            let near = layers(outcome).map(|window| {
                let drawn = chart(outcome, window, "a few layers");
                format!("<p class=\"closer\">Closer, from {} on:</p>\n{drawn}", seconds(window.from))
            });
            let name = outcome.policy.name();
            format!(
                "<h3>{name} <small>{}</small></h3>\n{}{whole}{}",
                step_of(outcome),
                cut(outcome),
                near.unwrap_or_default()
            )
        })
        .collect();
    format!(
        "<section id=\"gantt\">\n<h2>A step, device by device</h2>\n<p>{} Some of the devices in the first step; each computes \
         in the upper row and waits for bytes in the lower one. All whole steps have one scale, closer looks at a few layers one of their own.</p>\n{}{charts}</section>\n",
        escape(of_point),
        legend(&marks)
    )
}

fn step_of(outcome: &Outcome) -> String {
    outcome.step_seconds.first().map_or_else(String::new, |first| escape(&seconds(*first)))
}

/// Says so where not all of a step was recorded.
fn cut(outcome: &Outcome) -> String {
    let last = outcome.trace.stretches.iter().map(|stretch| stretch.end).fold(0.0, f64::max);
    match outcome.step_seconds.first() {
        Some(step) if last < step * 0.98 => {
            format!("<p>Only the first {} were recorded.</p>\n", escape(&seconds(last)))
        }
        _ => String::new(),
    }
}

/// Core attention of the first device that has any, up to its first backward.
fn attention(outcome: &Outcome) -> Vec<&Traced> {
    let stretches = &outcome.trace.stretches;
    let Some(first) = stretches.iter().find(|stretch| stretch.doing == Doing::Attention) else {
        return Vec::new();
    };
    let own = stretches.iter().filter(|stretch| stretch.device == first.device);
    let forward = own.take_while(|stretch| stretch.doing != Doing::AttentionBackward);
    forward.filter(|stretch| stretch.doing == Doing::Attention).collect()
}

/// What a device is called.
fn name(layout: &Layout, device: u32) -> String {
    let ranks = layout.ranks().max(1);
    match device.checked_sub(layout.model_devices()) {
        Some(server) => format!("server {server}"),
        None if layout.pipeline > 1 => format!("rank {}, stage {}", device % ranks, device / ranks),
        None => format!("rank {device}"),
    }
}

/// About three layers in the middle of the forward pass.
fn layers(outcome: &Outcome) -> Option<Window> {
    let attention = attention(outcome);
    let nano_batches = if attention.iter().any(|stretch| stretch.nano > 0) { 2 } else { 1 };
    let middle = attention.len() / 2;
    let from = attention.get(middle)?.start;
    let to = attention.get(middle + 3 * nano_batches)?.start;
    (to > from).then_some(Window { from, to })
}

fn chart(outcome: &Outcome, window: Window, what: &str) -> String {
    let Trace { devices, stretches } = &outcome.trace;
    let span = window.to - window.from;
    let bottom = TOP + ROW * devices.len() as f64;
    let x = |time: f64| LEFT + (time - window.from) / span * PLOT;
    let mut content = String::new();
    // From the start of the window, so that labels are short and differ.
    for tick in ticks(0.0, span, 8.0) {
        let x = x(window.from + tick);
        content.push_str(&line("grid", [x, TOP, x, bottom]));
        content.push_str(&text("label mid", [x, bottom + 14.0], &seconds(tick)));
    }
    for (n, device) in devices.iter().enumerate() {
        let y = TOP + ROW * n as f64 + 2.0;
        let name = name(&outcome.layout, *device);
        content.push_str(&text("label end", [LEFT - 8.0, y + 12.0], &name));
        let own: Vec<&Traced> = stretches.iter().filter(|stretch| stretch.device == *device).collect();
        let (moving, computing): (Vec<&Traced>, Vec<&Traced>) =
            own.into_iter().partition(|stretch| stretch.doing == Doing::Transfer);
        content.push_str(&row(&computing, window, [y, COMPUTE], &name));
        content.push_str(&row(&moving, window, [y + COMPUTE + 1.0, TRANSFER], &name));
    }
    drawing("wide gantt", [WIDTH, bottom + 20.0], &format!("{}: {what}", outcome.policy), &content)
}

/// A row's marks, one path for each kind. Each part of the row that can be seen shows what takes most of it.
fn row(stretches: &[&Traced], window: Window, [y, height]: [f64; 2], device: &str) -> String {
    let bins = (PLOT / VISIBLE) as usize;
    let wide = (window.to - window.from) / bins as f64;
    let mut taken = vec![[0.0; KINDS.len()]; bins];
    let mut totals = [0.0; KINDS.len()];
    for stretch in stretches {
        let Some(kind) = KINDS.iter().position(|(doing, _, _)| *doing == stretch.doing) else { continue };
        let (start, end) = (stretch.start.max(window.from), stretch.end.min(window.to));
        if end <= start {
            continue;
        }
        totals[kind] += end - start;
        let first = ((start - window.from) / wide) as usize;
        let last = ((end - window.from) / wide).ceil() as usize;
        for (bin, taken) in taken.iter_mut().enumerate().take(last).skip(first) {
            let from = window.from + bin as f64 * wide;
            taken[kind] += (end.min(from + wide) - start.max(from)).max(0.0);
        }
    }
    let shown: Vec<Option<usize>> = taken
        .iter()
        .map(|taken| {
            let most = (0..KINDS.len()).max_by(|a, b| taken[*a].total_cmp(&taken[*b]))?;
            (taken.iter().sum::<f64>() > wide / 2.0).then_some(most)
        })
        .collect();
    let mut paths = vec![String::new(); KINDS.len()];
    let mut bin = 0;
    while bin < bins {
        let run = shown[bin..].iter().take_while(|kind| **kind == shown[bin]).count();
        if let Some(kind) = shown[bin] {
            let (x, w) = (at(LEFT + bin as f64 * VISIBLE), at(run as f64 * VISIBLE));
            paths[kind].push_str(&format!("M{x} {}h{w}v{}h-{w}z", at(y), at(height)));
        }
        bin += run;
    }
    let marks = paths.iter().zip(KINDS).zip(totals).filter(|((path, _), _)| !path.is_empty());
    marks
        .map(|((path, (_, class, name)), total)| {
            let title = escape(&format!("{device}: {name}, {} here", seconds(total)));
            format!("<path class=\"{class}\" d=\"{path}\"><title>{title}</title></path>\n")
        })
        .collect()
}
