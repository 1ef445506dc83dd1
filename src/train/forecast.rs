//! Whether attention is worth disaggregating for a job's documents, said before the job starts.
//!
//! Known then are the documents of its first steps, the shape of the model, and how fast ranks compute, which they have
//! just measured. Steps are planned as the coordinator will plan them, with the rates that the job declares or without.
//! How fast links carry is taken from `--link-bytes-per-second`: what a link gives to gRPC beside a busy
//! core cannot be measured in a fraction of a second without a job, and where links decide, they are far slower.

use anyhow::Context;
use outboard_planner::{Doubt, Forecast, Problem, Rates, Slot, StepCosts, plan};
use outboard_trainer::Packer;
use serde::Serialize;

use super::args::Run;
use super::probe::Speed;
use super::rank::documents;

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
        let geometry = run.model.validate()?;
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
        let mut forecast: Option<Forecast> = None;
        for step in 0..steps {
            let packing = packer.packing(step);
            let mut all = Vec::new();
            for rank in 0..run.train.ranks {
                all.extend(documents(&packing, rank)?);
            }
            let rates = run.rates.map(Rates::from);
            let problem = Problem { rates, ..Problem::new(geometry, all, slots(run)) };
            let planned = plan(&problem)?;
            let next = Forecast::of_step(&problem, &planned, &costs)
                .with_context(|| format!("what step {step} takes cannot be predicted"))?;
            forecast = Some(forecast.map_or(next, |before| before.then(next)));
        }
        let Some(forecast) = forecast else { return Ok(None) };
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
        let (by, percent) = (if self.gain < 0.0 { "lengthen" } else { "shorten" }, 100.0 * self.gain.abs());
        format!(
            "balancing attention over {over} is predicted to {by} a step by {percent:.0}% (imbalance {:.2}, attention \
             {:.0}% of a step, computed at {:.1} GFLOP/s and the rest at {:.1}, links of {} GB/s)",
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

/// The slots that the job will have: one a server, of equal weight.
fn slots(run: &Run) -> Vec<Slot> {
    let ranks = if run.in_place { run.train.ranks } else { 0 };
    let dedicated = (0..run.dedicated).map(|_| Slot::dedicated());
    (0..ranks).map(Slot::in_place).chain(dedicated).collect()
}
