//! Whether attention is worth disaggregating for a job's documents, said before the job starts.
//!
//! Known then are the documents of its first steps, the shape of the model, and how fast ranks compute, which they have
//! just measured. Steps are planned as the coordinator will plan them, with the rates that the job declares or without, and
//! where the planner places tokens with homes of its choice. Without a pool, ranks compute the documents that they are
//! dealt, whatever is placed in one.
//! How fast links carry is taken from `--link-bytes-per-second`: what a link gives to gRPC beside a busy
//! core cannot be measured in a fraction of a second without a job, and where links decide, they are far slower.

use anyhow::Context;
use outboard_attention::StepPlan;
use outboard_planner::{Doubt, Forecast, Problem, Rates, Settled, StepCosts, plan, settle};
use outboard_trainer::{Packer, StepPacking};
use serde::Serialize;

use super::args::Run;
use super::documents::{dealt, problem, slots, unplaced};
use super::probe::Speed;
use super::protocol::Placement;

/// Steps to look ahead: enough for the mean of their imbalances, and planned in a blink.
const STEPS: u64 = 8;

/// What is said before the job starts, and `{"kind": "forecast"}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Outlook {
    pub(crate) kind: &'static str,
    /// Steps looked at.
    pub(crate) steps: u64,
    pub(crate) ranks: u32,
    pub(crate) servers: usize,
    /// Whether the gain is large enough to be worth it.
    pub(crate) worth: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// The part by which plans shorten a step; below zero where they lengthen it.
    pub(crate) gain: f64,
    /// The same of plans that leave documents where they are dealt to; `None` where the job's do that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gain_with_fixed_homes: Option<f64>,
    /// The same of even attention at no cost.
    pub(crate) ideal_gain: f64,
    /// Most over mean cells of a rank.
    pub(crate) imbalance: f64,
    /// Part of the slowest rank's step that is attention, without a pool.
    pub(crate) attention_share: f64,
    /// Of the slowest rank, in attention.
    pub(crate) attention_flops_per_second: f64,
    /// Of the slowest rank, in the rest of the model.
    pub(crate) rest_flops_per_second: f64,
    /// Of a server's link, each way.
    pub(crate) bytes_per_second: f64,
    #[serde(skip)]
    doubt: Option<Doubt>,
    /// Whether the job declares its rates.
    #[serde(skip)]
    declared: bool,
    #[serde(skip)]
    in_place: bool,
}

impl Outlook {
    /// Plans the first steps of a run, and says what that makes of them. `None` for a run of no rank.
    pub(crate) fn new(run: &Run, speeds: &[Speed]) -> anyhow::Result<Option<Outlook>> {
        let least = |rate: fn(&Speed) -> f64| speeds.iter().map(rate).reduce(f64::min);
        // A step waits for the slowest rank.
        let speed = least(|s| s.attention_flops_per_second).zip(least(|s| s.rest_flops_per_second));
        let Some((attention, rest)) = speed else { return Ok(None) };
        let costs = StepCosts {
            layers: run.model.layers as u32,
            rates: Rates { flops_per_second: attention, bytes_per_second: run.link_bytes_per_second },
            rest_seconds_per_token: run.model.rest_flops_per_token() / rest,
        };
        let mut packer = Packer::new(run.corpus.clone(), &run.train)?;
        let steps = run.train.steps.min(STEPS);
        let (mut fixed, mut free): (Option<Forecast>, Option<Forecast>) = (None, None);
        let add =
            |sum: &mut Option<Forecast>, next| *sum = Some(sum.map_or(next, |before| before.then(next)));
        for step in 0..steps {
            let packing = packer.packing(step);
            let of_step = with_fixed_homes(run, &packing, &costs)?;
            add(&mut fixed, of_step);
            if let Some(placement) = run.placement {
                let chosen = with_chosen_homes(run, &packing, &costs, placement)?;
                add(&mut free, beside(chosen, of_step));
            }
        }
        let Some(forecast) = free.or(fixed) else { return Ok(None) };
        let declared = run.rates.is_some();
        let doubt = forecast.doubt();
        Ok(Some(Outlook {
            kind: "forecast",
            steps,
            ranks: run.train.ranks,
            servers: slots(run).len(),
            worth: doubt.is_none(),
            reason: doubt.map(|doubt| doubt.to_string()),
            gain: forecast.gain(),
            gain_with_fixed_homes: free.and(fixed).map(|fixed| fixed.gain()),
            ideal_gain: forecast.ideal_gain(),
            imbalance: forecast.imbalance(),
            attention_share: forecast.attention_share(),
            attention_flops_per_second: attention,
            rest_flops_per_second: rest,
            bytes_per_second: run.link_bytes_per_second,
            doubt,
            declared,
            in_place: run.dedicated == 0,
        }))
    }

    /// What is predicted.
    pub(crate) fn words(&self) -> String {
        let over = match self.in_place {
            true => format!("{} ranks", self.ranks),
            false => format!("{} servers", self.servers),
        };
        let placed = if self.gain_with_fixed_homes.is_some() {
            ", with tokens where the planner puts them,"
        } else {
            ""
        };
        let instead =
            self.gain_with_fixed_homes.map(|gain| format!("{:.0}% with fixed homes, ", 100.0 * gain));
        let instead = instead.unwrap_or_default();
        let (by, percent) = (if self.gain < 0.0 { "lengthen" } else { "shorten" }, 100.0 * self.gain.abs());
        format!(
            "balancing attention over {over}{placed} is predicted to {by} a step by {percent:.0}% ({instead}imbalance \
             {:.2}, attention {:.0}% of a step, computed at {:.1} GFLOP/s and the rest at {:.1}, links of {} GB/s)",
            self.imbalance,
            100.0 * self.attention_share,
            self.attention_flops_per_second / 1e9,
            self.rest_flops_per_second / 1e9,
            self.bytes_per_second / 1e9,
        )
    }

    /// Why a pool is not worth it for this job, and what would help.
    pub(crate) fn warning(&self) -> Option<String> {
        let doubt = self.doubt?;
        let help = match doubt {
            Doubt::OneRank => "more ranks, or --attention local",
            Doubt::TooFewSlots => "more servers with --pool, or --in-place",
            Doubt::SlowLinks if self.declared => {
                "faster links, or a larger --bytes-per-second where they carry more than that"
            }
            Doubt::SlowLinks => {
                "faster links, --link-bytes-per-second where they carry more than is assumed, or else \
                 --flops-per-second and --bytes-per-second, with which plans move less"
            }
            Doubt::Balanced => "--attention local, or documents whose lengths differ more",
            Doubt::LittleAttention => "--attention local, or longer documents with more --tokens",
        };
        let least = 100.0 * Forecast::LEAST_GAIN;
        Some(format!(
            "attention is not worth disaggregating for this job, whose steps would gain less than {least:.0}%: \
             {doubt}. Training goes on; what helps: {help}"
        ))
    }
}

/// What a step takes with documents where they are dealt to.
fn with_fixed_homes(run: &Run, packing: &StepPacking, costs: &StepCosts) -> anyhow::Result<Forecast> {
    let problem = problem(run, dealt(packing)?)?;
    let planned = plan(&problem)?;
    of_step(packing.step, &problem, &planned, costs)
}

/// What it takes with tokens where the planner puts them.
fn with_chosen_homes(
    run: &Run,
    packing: &StepPacking,
    costs: &StepCosts,
    placement: Placement,
) -> anyhow::Result<Forecast> {
    let free = problem(run, unplaced(packing)?)?;
    let Settled { documents, plan } = settle(&free, placement.token_slack)?;
    of_step(packing.step, &Problem { documents, ..free }, &plan, costs)
}

fn of_step(step: u64, problem: &Problem, plan: &StepPlan, costs: &StepCosts) -> anyhow::Result<Forecast> {
    Forecast::of_step(problem, plan, costs)
        .with_context(|| format!("what step {step} takes cannot be predicted"))
}

/// A step with chosen homes, beside ranks that compute, without a pool, what they are dealt.
fn beside(chosen: Forecast, dealt: Forecast) -> Forecast {
    let Forecast { planned_seconds, unlinked_seconds, ideal_seconds, .. } = chosen;
    Forecast { planned_seconds, unlinked_seconds, ideal_seconds, ..dealt }
}
