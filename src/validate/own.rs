//! Steps of `outboard train` on this machine, predicted from a profile that was measured on it.
//!
//! Attention takes what the profile says of tasks of its shapes, everything else the FLOPs of its matrices at the rate
//! that ranks measured before the job started, and what is moved the links' bytes a second. Nothing is fitted.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use outboard_planner::Profile;
use outboard_simulator::{
    Gpu, Layout, Link, Mix, Model, Network, Outcome, Policy, Recompute, Scenario, Sequences, Tuning,
    simulate_steps,
};
use serde::Deserialize;

use crate::train::job::JobLine;

/// Memory is not limited, and nothing waits for it.
const PLENTY: f64 = 1e15;

/// What is read of a run.
#[derive(Debug)]
struct Run {
    job: JobLine,
    /// Of everything but attention, on the slowest rank.
    rest_flops_per_second: f64,
    bytes_per_second: f64,
    /// Documents dealt to each rank, step by step.
    batches: Vec<Sequences>,
    /// Seconds of each step, with local attention and with the pool.
    local: Vec<f64>,
    pool: Vec<f64>,
}

#[derive(Debug, Deserialize)]
struct ForecastLine {
    rest_flops_per_second: f64,
    bytes_per_second: f64,
}

#[derive(Debug, Deserialize)]
struct StepLine {
    attention: String,
    seconds: f64,
    ranks: Vec<RankLine>,
}

#[derive(Debug, Deserialize)]
struct RankLine {
    documents: Vec<usize>,
}

/// A run beside what is predicted of it, means over its steps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Own {
    pub(super) run: String,
    pub(super) steps: usize,
    /// Measured and predicted seconds of a step with local attention.
    pub(super) local: [f64; 2],
    /// The same with the pool.
    pub(super) pool: [f64; 2],
}

impl Own {
    /// Measured and predicted.
    pub(super) fn speedup(&self) -> [f64; 2] {
        [0, 1].map(|n| self.local[n] / self.pool[n])
    }
}

/// Predicts the steps of a run from its JSON lines and a profile of the cores of `profiled` ranks.
pub(super) fn own(file: &Path, profile: &Profile, profiled: u32) -> anyhow::Result<Own> {
    let run = read(file).with_context(|| file.display().to_string())?;
    let scenario = scenario(&run, profile, profiled)?;
    let local = Scenario { layout: Layout { context: Some(1), ..scenario.layout }, ..scenario.clone() };
    let pool = if run.job.token_slack.is_some() { Policy::Outboard } else { Policy::OutboardFixedHomes };
    let mean = |seconds: &[f64]| seconds.iter().sum::<f64>() / seconds.len() as f64;
    let predicted = |scenario: &Scenario, policy| {
        let outcome: Outcome = simulate_steps(scenario, policy, &run.batches)?;
        anyhow::Ok(mean(&outcome.step_seconds))
    };
    Ok(Own {
        run: file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        steps: run.batches.len(),
        local: [mean(&run.local), predicted(&local, Policy::Fixed)?],
        pool: [mean(&run.pool), predicted(&scenario, pool)?],
    })
}

fn read(file: &Path) -> anyhow::Result<Run> {
    let text = std::fs::read_to_string(file)?;
    let (mut job, mut forecast) = (None, None);
    let (mut batches, mut local, mut pool) = (Vec::new(), Vec::new(), Vec::new());
    for (n, line) in text.lines().enumerate() {
        let line: serde_json::Value =
            serde_json::from_str(line).with_context(|| format!("line {}", n + 1))?;
        let kind = line.get("kind").and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        let place = || format!("line {}, a {kind}", n + 1);
        match kind.as_str() {
            "job" => job = Some(serde_json::from_value::<JobLine>(line).with_context(place)?),
            "forecast" => forecast = Some(serde_json::from_value::<ForecastLine>(line).with_context(place)?),
            "step" => {
                let step: StepLine = serde_json::from_value(line).with_context(place)?;
                if step.attention == "local" {
                    batches.push(step.ranks.into_iter().map(|rank| rank.documents).collect());
                    local.push(step.seconds);
                } else {
                    pool.push(step.seconds);
                }
            }
            _ => {}
        }
    }
    let missing = "it must be the JSON lines of `outboard train` with local and pooled attention";
    let job: JobLine = job.with_context(|| format!("no line of kind job; {missing}"))?;
    let forecast = forecast.with_context(|| format!("no line of kind forecast; {missing}"))?;
    ensure!(
        !local.is_empty() && local.len() == pool.len(),
        "{} local steps and {} pooled; {missing}",
        local.len(),
        pool.len()
    );
    ensure!(
        job.in_place && job.dedicated == 0,
        "only runs whose ranks have servers in place, and no others, can be predicted"
    );
    let ForecastLine { rest_flops_per_second, bytes_per_second } = forecast;
    Ok(Run { job, rest_flops_per_second, bytes_per_second, batches, local, pool })
}

fn scenario(run: &Run, profile: &Profile, profiled: u32) -> anyhow::Result<Scenario> {
    let model = &run.job.model;
    let small = |what: &str, value: usize| u32::try_from(value).with_context(|| format!("{what} is {value}"));
    let profile = profile.clone().faster(1.0 / f64::from(profiled)).context("a profile of no rank")?;
    let peak = profile.peak_flops_per_second();
    let link = Link { bytes_per_second: run.bytes_per_second, latency_seconds: 0.0 };
    let Some(tokens) = u64::from(run.job.ranks).checked_mul(run.job.tokens as u64) else {
        bail!("{} ranks of {} tokens", run.job.ranks, run.job.tokens)
    };
    Ok(Scenario {
        model: Model {
            name: "as trained".to_owned(),
            layers: small("layers", model.layers)?,
            hidden: small("dim", model.dim)?,
            ffn: small("ffn_dim", model.ffn_dim)?,
            q_heads: small("q_heads", model.q_heads)?,
            kv_heads: small("kv_heads", model.kv_heads)?,
            head_dim: small("head_dim", model.head_dim)?,
            vocabulary: small("vocab", model.vocab)?,
            dtype: model.attention_dtype,
        },
        gpu: Gpu {
            name: "a rank's cores".to_owned(),
            peak_flops_per_second: peak,
            memory_bytes: PLENTY,
            memory_bytes_per_second: PLENTY,
            profile,
        },
        network: Network { gpus_per_node: 1, within: link, between: link },
        layout: Layout::new(run.job.ranks, 1),
        context: run.job.tokens,
        tokens,
        mix: Mix::Pretrain,
        seed: 0,
        steps: small("steps", run.batches.len())?,
        recompute: Recompute::None,
        update: false,
        keep: false,
        nano_batches: 1,
        token_room: 1.0,
        tolerance: 0.05,
        delay: 1,
        token_slack: run.job.token_slack.unwrap_or(0.0),
        tuning: Tuning {
            matmul_efficiency: run.rest_flops_per_second / peak,
            attention_efficiency: 1.0,
            link_efficiency: 1.0,
            gather_efficiency: 1.0,
            dispatch_seconds: 0.0,
        },
    })
}
