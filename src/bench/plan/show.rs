//! What is shown of plans: a row or a JSON line each, then the targets.

use serde::Serialize;

use super::free::Chosen;
use super::targets::Row;
use super::{Homes, Part, Planned};
use crate::bench::kernel::show::{Output, table};

/// Columns, of which the first ones are words.
pub(super) const HEADER: [&str; 18] = [
    "step",
    "kv heads",
    "servers",
    "max/mean",
    "tiles/ideal",
    "largest piece",
    "tasks",
    "forward GB",
    "fwd+bwd GB",
    "busiest MB",
    "plan ms",
    "to bound",
    "layer to bound",
    "forward x",
    "busiest x",
    "fwd+bwd x",
    "layer x 12.5",
    "layer x 3",
];
/// The same where homes were chosen.
pub(super) const FREE_HEADER: [&str; 18] = [
    "step",
    "kv heads",
    "servers",
    "max/mean",
    "tokens/mean",
    "split",
    "forward GB",
    "fwd+bwd GB",
    "busiest MB",
    "plan ms",
    "forward x",
    "fwd+bwd x",
    "busiest fwd x",
    "busiest bwd x",
    "layer x 3",
    "fwd+bwd to own",
    "layer to own 12.5",
    "layer to own 3",
];
pub(super) const WORDS: usize = 1;

/// What is to be said below the targets.
pub(super) const NOTES: [&str; 2] = [
    "x: over DistCA's plan, layer time over the best of its plans on links of 12.5 and 3 GB/s",
    "to bound: forward bytes, and layer time on links of 12.5 GB/s, over what no plan does better",
];
pub(super) const FREE_NOTES: [&str; 2] = [
    "x: over DistCA's plan of the step's own homes, layer time over the best of its plans on links of 3 GB/s",
    "to own: over our plan of the step's own homes, layer time on links of 12.5 and 3 GB/s",
];

/// A plan's JSON line. Figures over those of DistCA's plan are left out where there is none.
#[derive(Debug, Serialize)]
pub(super) struct Line<'a> {
    kind: &'static str,
    step: &'a str,
    policy: &'static str,
    part: &'static str,
    /// "own", or "free" where they were chosen.
    homes: &'static str,
    kv_heads: usize,
    servers: usize,
    documents: usize,
    tasks: usize,
    max_over_mean: f64,
    worst_tick: f64,
    tiles_over_ideal: f64,
    largest_piece: f64,
    forward_gb: f64,
    backward_gb: f64,
    busiest_mb: f64,
    busiest_backward_mb: f64,
    /// Of one layer, on links as fast as the step says, or of 50 GB/s.
    layer_ms_forward: f64,
    layer_ms_backward: f64,
    plan_ms: f64,
    /// Forward bytes over those that any plan that balances as well must move.
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_over_bound: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    forward_to_distca: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    busiest_to_distca: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    busiest_backward_to_distca: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    both_to_distca: Option<f64>,
    /// Layer time on links of 12.5 GB/s over the least of any plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer_over_bound: Option<f64>,
    /// Layer time on links of 12.5 and of 3 GB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer_to_distca: Option<[f64; 2]>,
    #[serde(flatten)]
    chosen: Option<ChosenLine>,
}

/// What a line says besides where homes were chosen.
#[derive(Debug, Serialize)]
struct ChosenLine {
    tokens_over_mean: f64,
    split_documents: usize,
    /// Over our plan of the step's own homes; layer time as above.
    both_to_own: f64,
    layer_to_own: [f64; 2],
}

/// A target's JSON line.
#[derive(Debug, Serialize)]
struct TargetLine<'a> {
    kind: &'static str,
    row: &'a str,
    target: f64,
    at_most: bool,
    reached: Option<f64>,
    pass: Option<bool>,
}

impl Part {
    pub(super) fn name(self) -> &'static str {
        match self {
            Part::Whole => "whole",
            Part::Lane => "lane",
        }
    }
}

impl<'a> Line<'a> {
    pub(super) fn new(planned: &'a Planned) -> Line<'a> {
        let Planned { step, part, kv_heads, verdict, seconds, rates, ratios, .. } = planned;
        let (homes, bounds, chosen) = match planned.homes {
            Homes::Own(bounds) => ("own", Some(bounds), None),
            Homes::Free(chosen) => ("free", None, Some(ChosenLine::of(chosen))),
        };
        Line {
            kind: "plan",
            step,
            policy: "outboard",
            part: part.name(),
            homes,
            kv_heads: *kv_heads,
            servers: verdict.slots,
            documents: verdict.documents,
            tasks: verdict.tasks,
            max_over_mean: verdict.max_over_mean,
            worst_tick: verdict.worst_tick,
            tiles_over_ideal: verdict.tiles_over_ideal,
            largest_piece: verdict.largest_piece,
            forward_gb: verdict.forward.bytes as f64 / 1e9,
            backward_gb: verdict.backward.bytes as f64 / 1e9,
            busiest_mb: verdict.forward.busiest as f64 / 1e6,
            busiest_backward_mb: verdict.backward.busiest as f64 / 1e6,
            layer_ms_forward: verdict.forward.seconds(*rates) * 1e3,
            layer_ms_backward: verdict.backward.seconds(*rates) * 1e3,
            plan_ms: seconds * 1e3,
            forward_over_bound: planned.over_bound(),
            layer_over_bound: bounds.map(|bounds| bounds.layer_over_bound),
            forward_to_distca: ratios.map(|ratios| ratios.forward),
            busiest_to_distca: ratios.map(|ratios| ratios.busiest),
            busiest_backward_to_distca: ratios.map(|ratios| ratios.busiest_backward),
            both_to_distca: ratios.map(|ratios| ratios.both),
            layer_to_distca: ratios.map(|ratios| ratios.layer),
            chosen,
        }
    }

    pub(super) fn row(&self) -> [String; 18] {
        let ratio = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        let layer = |of: Option<[f64; 2]>, link: usize| ratio(of.map(|layer| layer[link]));
        let [step, heads, servers] =
            [self.step.to_owned(), self.kv_heads.to_string(), self.servers.to_string()];
        let balance = format!("{:.4}", self.max_over_mean);
        let forward = format!("{:.3}", self.forward_gb);
        let both = format!("{:.3}", self.forward_gb + self.backward_gb);
        let busiest = format!("{:.1}", self.busiest_mb);
        let plan = format!("{:.2}", self.plan_ms);
        match &self.chosen {
            None => [
                step,
                heads,
                servers,
                balance,
                format!("{:.4}", self.tiles_over_ideal),
                format!("{:.3}", self.largest_piece),
                self.tasks.to_string(),
                forward,
                both,
                busiest,
                plan,
                ratio(self.forward_over_bound),
                ratio(self.layer_over_bound),
                ratio(self.forward_to_distca),
                ratio(self.busiest_to_distca),
                ratio(self.both_to_distca),
                layer(self.layer_to_distca, 0),
                layer(self.layer_to_distca, 1),
            ],
            Some(chosen) => [
                step,
                heads,
                servers,
                balance,
                format!("{:.4}", chosen.tokens_over_mean),
                chosen.split_documents.to_string(),
                forward,
                both,
                busiest,
                plan,
                ratio(self.forward_to_distca),
                ratio(self.both_to_distca),
                ratio(self.busiest_to_distca),
                ratio(self.busiest_backward_to_distca),
                layer(self.layer_to_distca, 1),
                ratio(Some(chosen.both_to_own)),
                layer(Some(chosen.layer_to_own), 0),
                layer(Some(chosen.layer_to_own), 1),
            ],
        }
    }
}

impl ChosenLine {
    fn of(chosen: Chosen) -> ChosenLine {
        let Chosen { tokens_over_mean, split, both_to_own, layer_to_own } = chosen;
        ChosenLine { tokens_over_mean, split_documents: split, both_to_own, layer_to_own }
    }
}

/// Shows what must be reached, and what is.
pub(super) fn targets(rows: &[Row], notes: &[&str], output: &mut Output) -> anyhow::Result<()> {
    let mut table = table(["what", "target", "reached", ""], 1);
    let (mut passed, mut measured) = (0, 0);
    for row in rows {
        let Row { name, target, reached } = row;
        let pass = row.pass();
        measured += u32::from(pass.is_some());
        passed += u32::from(pass == Some(true));
        let line =
            TargetLine { kind: "suite", row: name, target: *target, at_most: true, reached: *reached, pass };
        output.write(&line)?;
        table.add_row([
            name.clone(),
            format!("<= {}", number(*target)),
            reached.map_or("-".into(), number),
            match pass {
                Some(true) => "pass".into(),
                Some(false) => "miss".into(),
                None => "no step tells".to_owned(),
            },
        ]);
    }
    output.say(&table.to_string())?;
    for note in notes {
        output.say(note)?;
    }
    output.say(&format!("{passed} of {measured} rows pass"))
}

/// Ratios lie close to their targets, times do not.
fn number(value: f64) -> String {
    if value < 2.0 { format!("{value:.4}") } else { format!("{value:.1}") }
}
