//! A plan as one HTML page that needs nothing else: no network, no fonts, no libraries.

mod bars;
mod documents;
mod flows;
mod headline;
mod matrix;
mod panels;
mod servers;
mod shape;
mod strip;

use outboard_attention::StepPlan;
use outboard_planner::{Policy, Problem, Rates};

use super::chosen::Chosen;
use super::figures::Figures;
use crate::page::Page;
use crate::page::numbers::{count, percent, things};
use crate::page::svg::{escape, textures};

const STYLE: &str = include_str!("plan.css");
const SCRIPT: &str = include_str!("plan.js");

/// A plan and what is known of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned<'a> {
    pub(super) problem: &'a Problem,
    pub(super) plan: &'a StepPlan,
    /// Slot n is server `servers[n]`.
    pub(super) servers: &'a [u64],
    /// Document `0.n` is `documents[n]`.
    pub(super) documents: &'a [u64],
    /// What the step is called.
    pub(super) step: &'a str,
    pub(super) policy: Policy,
    /// How far the busiest server may lie above the mean, where that is what was planned for.
    pub(super) limit: Option<f64>,
    /// How fast servers and links are.
    pub(super) rates: Rates,
    /// Who says so, for each of the two.
    pub(super) given: Given,
    /// How long planning took.
    pub(super) seconds: f64,
    /// The homes, where some were chosen.
    pub(super) chosen: Option<&'a Chosen>,
}

/// Which rates the step gives; the others are the judge's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Given {
    pub(super) compute: bool,
    pub(super) link: bool,
}

impl Planned<'_> {
    /// A slot's server, as text.
    fn server(&self, slot: usize) -> String {
        self.servers.get(slot).map_or_else(|| "?".to_owned(), u64::to_string)
    }
}

/// The whole page.
pub(super) fn page(planned: &Planned<'_>, figures: &Figures) -> String {
    let name = escape(planned.step);
    let sections = [
        headline::section(planned, figures),
        bars::section(planned, figures),
        flows::section(planned),
        documents::section(planned),
        servers::section(planned, figures),
    ];
    let sections = sections.concat();
    let (textures, about) = (textures(), about(planned));
    let body = format!(
        "{textures}<main>\n<header><h1>Who computes what: {name}</h1>\n{about}</header>\n{sections}</main>\n"
    );
    let title = format!("Plan of {}", planned.step);
    Page { title: &title, style: STYLE, script: SCRIPT, body: &body }.markup()
}

/// What was planned, and how.
fn about(planned: &Planned<'_>) -> String {
    let Planned { problem, policy, limit, .. } = planned;
    let geometry = &problem.geometry;
    let tokens: usize = problem.documents.iter().map(|d| d.tokens()).sum();
    let ticks = planned.plan.ticks.len();
    let in_ticks = if ticks > 1 { format!(" in {}", things(ticks, "tick")) } else { String::new() };
    let dims = match (geometry.head_dim(), geometry.v_head_dim()) {
        (same, other) if same == other => format!("head dim {same}"),
        (head, v_head) => format!("head dim {head} of Q and K, {v_head} of V"),
    };
    let goal = match limit {
        Some(limit) => {
            format!("for the fewest bytes with the busiest server within {} of the mean", percent(*limit))
        }
        None if problem.rates.is_some() && *policy == Policy::Outboard => {
            "for the least layer time".to_owned()
        }
        None => "without a bound on the busiest server".to_owned(),
    };
    let chosen = match planned.chosen {
        Some(chosen) => format!("<br/>{}.", escape(&chosen.words())),
        None => String::new(),
    };
    format!(
        "<p>{}{in_ticks}, {} tokens, on {}. {}, {}, {dims}, {}.<br/>Planned by <b>{policy}</b> {goal}. \
         Figures are of one layer.{chosen}</p>\n",
        things(problem.documents.len(), "document"),
        count(tokens),
        things(problem.slots.len(), "server"),
        things(geometry.q_heads(), "query head"),
        things(geometry.kv_heads(), "kv head"),
        geometry.dtype(),
    )
}
