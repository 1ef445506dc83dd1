//! `outboard advise`: whether a pool of attention servers is worth it for a job, and what it needs.

use std::path::PathBuf;

use outboard_proto::describe;
use outboard_simulator::{Advice, Doubt, Outcome, Policy, SimulationError, advise};
use serde::Serialize;

use crate::bench::kernel::show::{Output, Progress};
use crate::page::numbers::{count, rate, things};
use crate::simulate::Described;
use crate::simulate::table;

/// Arguments of `outboard advise`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    described: Described,
    /// Write the advice as a JSON line to this file, in place of words; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The advice as `{"kind": "advice"}`.
#[derive(Debug, Serialize)]
struct Line {
    kind: &'static str,
    worth: bool,
    /// Why not.
    reason: Option<String>,
    /// More tokens a second than the best of what trainers do without attention servers, as a fraction.
    gain: Option<f64>,
    /// The same beside the best published system without them.
    gain_over_published: Option<f64>,
    tokens_per_second: Option<f64>,
    dedicated_gpus: Option<u32>,
    without: Option<&'static str>,
    without_tokens_per_second: Option<f64>,
    published: Option<&'static str>,
    published_tokens_per_second: Option<f64>,
    /// Between nodes, of a GPU.
    least_link_bytes_per_second: Option<f64>,
    /// Bytes a second and gain.
    links: Vec<[f64; 2]>,
    /// GPUs, and gain where they can do it.
    dedicated: Vec<(u32, Option<f64>)>,
    limit: Option<&'static str>,
    limit_share: Option<f64>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let named = args.described.one()?;
    let mut output = Output::new(args.json.as_deref())?;
    let progress = Progress::new(Advice::PARTS)?;
    let next = |what: &str| {
        progress.at(what);
        progress.step();
    };
    let advice = advise(&named.scenario, &next).map_err(|error| {
        let refused = matches!(error, SimulationError::Memory { .. } | SimulationError::Unsuited { .. });
        let error = anyhow::Error::from(error);
        if refused { error.context("nothing can do it, with attention servers or without") } else { error }
    })?;
    drop(progress);
    output.write(&Line::of(&advice))?;
    output.say(&sentence(&advice))?;
    if let Ok(pool) = &advice.pool {
        output.say(&format!("servers: {}", servers(&advice, pool)))?;
    }
    if !advice.links.is_empty() {
        output.say(&format!("links between nodes: {}", links(&advice)))?;
    }
    if let Some((limit, share)) = advice.limit() {
        output.say(&format!("what limits it: {limit}, {} of a step", percent(share)))?;
    }
    output.say(&format!("asked: {}", table::description(&named)))?;
    output.say(&table::tuning(&named))
}

/// Yes or no first, then what there is beside it.
fn sentence(advice: &Advice) -> String {
    let answer = match (&advice.pool, &advice.without, advice.doubt) {
        (Err(error), _, _) => format!("No: attention servers cannot do it; {}.", describe(error)),
        (Ok(pool), Err(error), _) => format!(
            "Yes: attention servers {} reach {}, and none of what trainers do without them can do it; {}.",
            place(pool),
            speed(pool),
            describe(error)
        ),
        (Ok(pool), Ok(without), None) => format!(
            "Yes: attention servers {} are predicted to train {} faster than the best that trainers do without them ({}): {} in place of {}.",
            place(pool),
            percent(advice.gain().unwrap_or(0.0)),
            best(without),
            speed(pool),
            speed(without)
        ),
        (Ok(pool), Ok(without), Some(doubt)) => format!(
            "No: {}. With attention servers training is predicted to be {} than the best that trainers do without them ({}): {} in place of {}.",
            reason(doubt),
            compared(advice.gain().unwrap_or(0.0)),
            best(without),
            speed(pool),
            speed(without)
        ),
    };
    match (&advice.published, advice.gain_over_published()) {
        (Some(published), Some(gain)) => format!(
            "{answer} {}, as its paper describes it, would reach {}: attention servers are {} than that.",
            system(published.policy),
            speed(published),
            compared(gain)
        ),
        _ => answer,
    }
}

/// How much faster or slower.
fn compared(gain: f64) -> String {
    if gain >= 0.0 { format!("{} faster", percent(gain)) } else { format!("{} slower", percent(-gain)) }
}

/// What people call a published system.
fn system(policy: Policy) -> &'static str {
    match policy {
        Policy::Flexsp => "FlexSP (flexsp)",
        Policy::Hdp => "ByteScale (hdp)",
        other => other.name(),
    }
}

fn best(without: &Outcome) -> String {
    let chosen = table::chosen(without);
    if chosen.is_empty() { without.policy.to_string() } else { format!("{}, {chosen}", without.policy) }
}

fn reason(doubt: Doubt) -> &'static str {
    match doubt {
        Doubt::Alone => "there is one device, which has nobody to share with",
        Doubt::Impossible => "attention servers cannot do it",
        Doubt::TooFewServers => "the dedicated servers are too few for the attention there is",
        Doubt::SlowLinks => "the links between nodes are too slow to share attention",
        Doubt::LittleAttention => "attention is too small a part of a step",
        Doubt::Balanced => "attention is about as balanced, and bytes as well hidden, without servers",
    }
}

fn place(pool: &Outcome) -> String {
    match pool.layout.dedicated {
        0 => "in place".to_owned(),
        gpus => format!("on {} of their own", things(gpus as usize, "GPU")),
    }
}

fn servers(advice: &Advice, pool: &Outcome) -> String {
    let lanes = pool.layout.tensor as usize;
    let best = match pool.layout.dedicated {
        0 => format!(
            "{} in place, each on the {} of a rank",
            things(pool.layout.model_devices() as usize, "server"),
            things(lanes, "GPU")
        ),
        gpus => format!(
            "{} of {} each, {gpus} of the {} GPUs",
            things(gpus as usize / lanes, "dedicated server"),
            things(lanes, "GPU"),
            pool.layout.gpus
        ),
    };
    if advice.dedicated.is_empty() {
        return best;
    }
    let tried = advice.dedicated.iter().map(|(gpus, gain)| match gain {
        Some(gain) => format!("{gpus} GPUs {}", signed(*gain)),
        None => format!("{gpus} GPUs impossible"),
    });
    format!("{best}; gain with dedicated servers on {}", tried.collect::<Vec<_>>().join(", "))
}

fn links(advice: &Advice) -> String {
    let gain = |link: &outboard_simulator::LinkGain| {
        format!("{} {}", rate(link.bytes_per_second, "B/s"), signed(link.gain))
    };
    let gains = advice.links.iter().map(gain).collect::<Vec<_>>().join(", ");
    match advice.least_link() {
        Some(least) => format!("worth it from {} a GPU; gain on {gains}", rate(least, "B/s")),
        None => format!("none that was tried is worth it; gain on {gains}"),
    }
}

fn percent(part: f64) -> String {
    format!("{:.1}%", 100.0 * part)
}

fn signed(part: f64) -> String {
    format!("{:+.1}%", 100.0 * part)
}

fn speed(outcome: &Outcome) -> String {
    format!("{} tokens/s", count(outcome.tokens_per_second.round() as u64))
}

impl Line {
    fn of(advice: &Advice) -> Line {
        let (pool, without) = (advice.pool.as_ref().ok(), advice.without.as_ref().ok());
        let published = advice.published.as_ref();
        let reason = |doubt| match (&advice.pool, doubt) {
            (Err(error), _) => describe(error).to_string(),
            (Ok(_), doubt) => reason(doubt).to_owned(),
        };
        Line {
            kind: "advice",
            worth: advice.is_worth_it(),
            reason: advice.doubt.map(reason),
            gain: advice.gain(),
            gain_over_published: advice.gain_over_published(),
            tokens_per_second: pool.map(|outcome| outcome.tokens_per_second),
            dedicated_gpus: pool.map(|outcome| outcome.layout.dedicated),
            without: without.map(|outcome| outcome.policy.name()),
            without_tokens_per_second: without.map(|outcome| outcome.tokens_per_second),
            published: published.map(|outcome| outcome.policy.name()),
            published_tokens_per_second: published.map(|outcome| outcome.tokens_per_second),
            least_link_bytes_per_second: advice.least_link(),
            links: advice.links.iter().map(|link| [link.bytes_per_second, link.gain]).collect(),
            dedicated: advice.dedicated.clone(),
            limit: advice.limit().map(|(name, _)| name),
            limit_share: advice.limit().map(|(_, share)| share),
        }
    }
}
