//! How much each server computes, where rows live and as planned.

use super::super::figures::{Device, Figures};
use super::Planned;
use crate::page::svg::{drawing, line, rect, text, ticks, upright};

const WIDTH: f64 = 1080.0;
const LEFT: f64 = 66.0;
const RIGHT: f64 = 96.0;
const TOP: f64 = 30.0;
const PLOT: f64 = WIDTH - LEFT - RIGHT;
/// More devices than this are sorted, since their names would not be read.
const NAMED: usize = 96;
/// More devices than this share bars.
const BARS: usize = 512;
/// More ticks than this are drawn as one.
const TICKS: usize = 4;

/// A device, or several with nearly the same work at home, of which the busiest counts.
struct Bar {
    name: String,
    before: f64,
    after: f64,
    /// Whether it computes at all as planned.
    serves: bool,
}

pub(super) fn section(planned: &Planned<'_>, figures: &Figures) -> String {
    let ticks = figures.after.len();
    let charts = if (2..=TICKS).contains(&ticks) {
        let each = figures.before.iter().zip(&figures.after).zip(&planned.plan.ticks);
        let chart = |((before, after), tick): ((&Vec<u64>, &Vec<u64>), &outboard_attention::TickPlan)| {
            let figure = figure(planned, figures, &figures.share(before), &figures.share(after));
            format!("<h3>Tick {}</h3>\n{figure}", tick.tick)
        };
        each.map(chart).collect()
    } else {
        let (before, after) = figures.shares();
        let note = match ticks {
            0..=1 => String::new(),
            _ => format!("<p>All {ticks} ticks together.</p>\n"),
        };
        note + &figure(planned, figures, &before, &after)
    };
    format!("<section id=\"balance\">\n<h2>Work of each server</h2>\n{charts}</section>\n")
}

/// One tick: words, then the whole range, then the range of what is planned.
fn figure(planned: &Planned<'_>, figures: &Figures, before: &[f64], after: &[f64]) -> String {
    let (bars, sorted) = bars(planned, figures, before, after);
    let most = |value: fn(&Bar) -> f64| bars.iter().max_by(|a, b| value(a).total_cmp(&value(b)));
    let (Some(at_home), Some(at_last)) = (most(|bar| bar.before), most(|bar| bar.after)) else {
        return String::new();
    };
    let lone = figures.devices.iter().any(|device| device.slot.is_none());
    let lone = if lone { " Ranks without a server compute nothing as planned." } else { "" };
    let words = format!(
        "<p>At home {} would have {:.3} times the mean; as planned, {} has most: {:.4} times the mean.{lone}</p>\n",
        at_home.name, at_home.before, at_last.name, at_last.after
    );
    let limit = planned.limit.map(|limit| 1.0 + limit);
    let top = at_home.before.max(at_last.after).max(limit.unwrap_or(1.0)).max(1.0) * 1.06;
    let whole = chart(&bars, [0.0, top], limit, sorted, true);
    let served = || bars.iter().filter(|bar| bar.serves).map(|bar| bar.after);
    let (low, high) = (served().fold(1.0, f64::min), served().fold(limit.unwrap_or(1.0), f64::max));
    // Where the plan fills much of the whole range anyway, nothing is gained by looking closer.
    let near = if high - low < top / 4.0 {
        let margin = ((high - low) * 0.12).max(0.001);
        chart(&bars, [low - margin, high + margin], limit, sorted, false)
    } else {
        String::new()
    };
    words + &legend(planned) + &whole + &near
}

fn legend(planned: &Planned<'_>) -> String {
    let limit = match planned.limit {
        Some(limit) => format!("<span><i class=\"key limit\"></i>tolerance, {:.3}</span>", 1.0 + limit),
        None => String::new(),
    };
    format!(
        "<p class=\"legend\"><span><i class=\"key before\"></i>every row at home</span>\
         <span><i class=\"key after\"></i>planned</span><span><i class=\"key mean\"></i>mean</span>{limit}</p>\n"
    )
}

/// The bars from left to right, and whether they are sorted.
fn bars(planned: &Planned<'_>, figures: &Figures, before: &[f64], after: &[f64]) -> (Vec<Bar>, bool) {
    let name = |device: &Device| match (device.slot, device.rank) {
        (Some(slot), _) => format!("server {}", planned.server(slot)),
        (None, rank) => format!("rank {} (no server)", rank.unwrap_or_default()),
    };
    let values = before.iter().zip(after).zip(&figures.devices);
    let bar = |((&before, &after), device): ((&f64, &f64), &Device)| Bar {
        name: name(device),
        before,
        after,
        serves: device.slot.is_some(),
    };
    let mut bars: Vec<Bar> = values.map(bar).collect();
    let sorted = bars.len() > NAMED;
    if sorted {
        bars.sort_by(|a, b| b.before.total_cmp(&a.before));
    }
    let together = bars.len().div_ceil(BARS);
    if together > 1 {
        bars = bars.chunks(together).map(joined).collect();
    }
    (bars, sorted)
}

fn joined(bars: &[Bar]) -> Bar {
    let most = |value: fn(&Bar) -> f64| bars.iter().map(value).fold(0.0, f64::max);
    Bar {
        name: format!("the busiest of {} devices", bars.len()),
        before: most(|bar| bar.before),
        after: most(|bar| bar.after),
        serves: bars.iter().any(|bar| bar.serves),
    }
}

/// Bars within a range of shares: both kinds from zero up where it is the `whole` range, else marks for what is planned.
fn chart(bars: &[Bar], [low, high]: [f64; 2], limit: Option<f64>, sorted: bool, whole: bool) -> String {
    let (title, plot) = match whole {
        true => ("Cells of each server over the mean, at home and planned", 210.0),
        false => ("The same as planned, near the mean", 120.0),
    };
    let bottom = TOP + plot;
    let y = |share: f64| bottom - (share - low) / (high - low) * plot;
    let step = PLOT / bars.len().max(1) as f64;
    let mut content = text("title", [LEFT, 14.0], title);
    let ticks = ticks(low, high, 5.0);
    let apart = ticks.get(1).zip(ticks.first()).map_or(1.0, |(second, first)| second - first);
    let digits = (-apart.log10().floor()).clamp(1.0, 6.0) as usize;
    for tick in ticks {
        content.push_str(&line("grid", [LEFT, y(tick), LEFT + PLOT, y(tick)]));
        content.push_str(&text("label end", [LEFT - 6.0, y(tick) + 4.0], &format!("{tick:.digits$}")));
    }
    for (n, bar) in bars.iter().enumerate() {
        let x = LEFT + n as f64 * step;
        content.push_str(&if whole { pair(bar, x, step, y) } else { mark(bar, x, step, y) });
    }
    content.push_str(&line("mean", [LEFT, y(1.0), LEFT + PLOT, y(1.0)]));
    content.push_str(&limits(y(1.0), limit.map(y)));
    for (n, bar) in bars.iter().enumerate() {
        let title = format!("{}: {:.4} of the mean at home, {:.4} planned", bar.name, bar.before, bar.after);
        content.push_str(&rect("hit", [LEFT + n as f64 * step, TOP, step, plot], &title));
    }
    content.push_str(&names(bars, sorted, step, bottom));
    content.push_str(&upright("axis", [14.0, TOP + plot / 2.0], "cells / mean"));
    drawing("wide", [WIDTH, bottom + 40.0], title, &content)
}

/// The names of the lines at the mean and at the limit, and the latter line where the two can be told apart.
fn limits(mean: f64, limit: Option<f64>) -> String {
    let x = LEFT + PLOT + 6.0;
    let Some(limit) = limit.filter(|limit| mean - limit > 2.5) else {
        return text("label", [x, mean + 4.0], "mean");
    };
    let push = ((13.0 - (mean - limit)) / 2.0).max(0.0);
    line("limit", [LEFT, limit, LEFT + PLOT, limit])
        + &text("label", [x, limit + 4.0 - push], "tolerance")
        + &text("label", [x, mean + 4.0 + push], "mean")
}

/// Work at home and as planned, side by side where there is room, else planned as a mark before work at home.
fn pair(bar: &Bar, x: f64, step: f64, y: impl Fn(f64) -> f64) -> String {
    let tall = |share: f64| y(0.0) - y(share);
    if step < 7.0 {
        // A little wider than they are apart, so that no seams show where many touch.
        let width = if step > 3.0 { step - 0.5 } else { step + 0.5 };
        let before = rect("before", [x, y(bar.before), width, tall(bar.before)], "");
        let after = rect("after", [x, y(bar.after) - 1.5, width, 3.0], "");
        return if bar.serves { before + &after } else { before };
    }
    let width = (step * 0.4).min(28.0);
    let middle = x + step / 2.0;
    rect("before", [middle - width, y(bar.before), width, tall(bar.before)], "")
        + &rect("after", [middle, y(bar.after), width, tall(bar.after)], "")
}

fn mark(bar: &Bar, x: f64, step: f64, y: impl Fn(f64) -> f64) -> String {
    if !bar.serves {
        return String::new();
    }
    let width = (step * 0.8).clamp(2.0, 56.0);
    rect("after", [x + (step - width) / 2.0, y(bar.after) - 1.5, width, 3.0], "")
}

/// What the horizontal axis says.
fn names(bars: &[Bar], sorted: bool, step: f64, bottom: f64) -> String {
    let (middle, y) = (LEFT + PLOT / 2.0, bottom + 34.0);
    if sorted {
        return text("label", [LEFT, bottom + 16.0], "most work at home")
            + &text("label end", [LEFT + PLOT, bottom + 16.0], "least")
            + &text("axis mid", [middle, y], &format!("{} servers, by their work at home", bars.len()));
    }
    let longest = bars.iter().map(|bar| short(&bar.name).len()).max().unwrap_or(1);
    let every = ((longest as f64 * 7.0 + 6.0) / step).ceil().max(1.0) as usize;
    let labels: String = bars
        .iter()
        .enumerate()
        .step_by(every)
        .map(|(n, bar)| text("label mid", [LEFT + (n as f64 + 0.5) * step, bottom + 16.0], &short(&bar.name)))
        .collect();
    let lone = if bars.iter().any(|bar| !bar.serves) { "server, and rank (r) without one" } else { "server" };
    labels + &text("axis mid", [middle, y], lone)
}

/// A server's id, or a rank's.
fn short(name: &str) -> String {
    match name.strip_prefix("rank ") {
        Some(rank) => format!("r{}", rank.trim_end_matches(" (no server)")),
        None => name.trim_start_matches("server ").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use outboard_planner::{Policy, Rates, plan_by};

    use super::super::super::examples::{in_place, mixed};
    use super::super::Given;
    use super::*;

    fn with_bars(problem: &outboard_planner::Problem, check: impl Fn(&Planned<'_>, &Figures)) {
        let plan = plan_by(problem, Policy::Fixed).unwrap();
        let servers: Vec<u64> = (0..problem.slots.len() as u64).collect();
        let planned = Planned {
            problem,
            plan: &plan,
            servers: &servers,
            documents: &[],
            step: "",
            policy: Policy::Fixed,
            limit: Some(0.01),
            rates: Rates::default(),
            given: Given { compute: false, link: false },
            seconds: 0.0,
            chosen: None,
        };
        check(&planned, &Figures::of(problem, &plan).unwrap());
    }

    #[test]
    fn however_many_servers_there_are_the_busiest_is_seen() {
        for (servers, expected, in_order) in [(2, 2, false), (NAMED as u32, NAMED, false), (1500, 500, true)]
        {
            with_bars(&in_place(servers), |planned, figures| {
                let (before, after) = figures.shares();
                let (bars, sorted) = bars(planned, figures, &before, &after);
                assert_eq!((bars.len(), sorted), (expected, in_order));
                let most = before.iter().copied().fold(0.0, f64::max);
                assert!(most > 1.9 && bars[0].before == most && bars[0].after == most);
                assert!(!sorted || bars.windows(2).all(|pair| pair[0].before >= pair[1].before));
            });
        }
    }

    #[test]
    fn every_tick_has_its_bars_and_every_rank_its_name() {
        with_bars(&mixed(), |planned, figures| {
            let section = section(planned, figures);
            let ticks: Vec<&str> =
                section.match_indices("<h3>Tick ").map(|(at, _)| &section[at + 9..at + 10]).collect();
            assert_eq!(ticks, ["0", "1"]);
            for name in [">0<", ">1<", ">2<", ">r2<"] {
                assert!(section.contains(&format!("{name}/text>")), "{name}");
            }
        });
    }
}
