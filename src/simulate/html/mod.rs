//! Results as one page that needs nothing else.

mod gantt;
mod headline;
mod parameters;
mod scale;
mod stacks;

use outboard_simulator::{Outcome, Policy};

use super::description::Description;
use super::point::Point;
use super::table::about;
use crate::page::Page;
use crate::page::svg::{escape, textures};

const STYLE: &str = include_str!("simulate.css");

/// How many colours there are for policies.
const COLOURS: usize = 12;

/// The whole page. Figures of one point are those of the last that has any.
pub(super) fn page(description: &Description, points: &[Point]) -> String {
    let Some(shown) = points.iter().rfind(|point| point.fastest().is_some()) else { return String::new() };
    let scenario = &shown.named.scenario;
    let varies = |name: &str| description.sweep.iter().any(|axis| axis.entry.name == name);
    let gpus = if varies("layout.gpus") { String::new() } else { format!("{} ", scenario.layout.gpus) };
    let title = format!("{} on {gpus}{}", scenario.model.name, scenario.gpu.name);
    let of_point = of_point(description, shown);
    let sections = [
        headline::section(points, shown, &of_point),
        scale::section(description, points),
        stacks::time(shown, &of_point),
        stacks::memory(shown, &of_point),
        gantt::section(shown, &of_point),
        parameters::results(description, points),
        parameters::section(description, shown),
    ];
    let body = format!(
        "{}<main>\n<header><h1>What attention servers would gain: {}</h1>\n<p>{}.</p>\n</header>\n{}</main>\n",
        textures(),
        escape(&title),
        escape(&about(points)),
        sections.concat()
    );
    let title = format!("Simulation of {title}");
    Page { title: &title, style: STYLE, script: "", body: &body }.markup()
}

/// Which of several points is shown, in words; empty where there is one.
fn of_point(description: &Description, shown: &Point) -> String {
    let axes = description.sweep.iter().map(|axis| axis.entry.called()).zip(&shown.labels);
    let words: Vec<String> = axes.map(|(name, value)| format!("{name} {value}")).collect();
    if words.is_empty() { String::new() } else { format!("At {}.", words.join(", ")) }
}

/// The class of a policy's marks.
fn class(policy: Policy) -> String {
    let n = Policy::ALL.iter().position(|other| *other == policy).unwrap_or(0);
    format!("p{}", n % COLOURS)
}

/// Marks with what they stand for.
fn legend(marks: &[(String, &str)]) -> String {
    let mark = |(class, name): &(String, &str)| {
        format!(
            "<span><svg viewBox=\"0 0 16 12\"><rect class=\"{class}\" width=\"16\" height=\"12\"/></svg>{}</span>",
            escape(name)
        )
    };
    format!("<p class=\"legend\">{}</p>\n", marks.iter().map(mark).collect::<String>())
}

/// The outcomes that are worth a closer look: the best with attention servers, the best without, and the next fastest.
fn leading(point: &Point) -> Vec<&Outcome> {
    let mut leading: Vec<&Outcome> = Vec::new();
    leading.extend(point.best(|outcome| outcome.policy.disaggregates()));
    leading.extend(point.baseline());
    let chosen: Vec<Policy> = leading.iter().map(|outcome| outcome.policy).collect();
    leading.extend(point.best(|outcome| !chosen.contains(&outcome.policy)));
    leading
}
