//! `outboard advise`: whether a pool of attention servers is worth it for a job, and what it needs.

use std::path::PathBuf;

use outboard_simulator::{Advice, Doubt, Outcome, advise};
use serde::Serialize;

use crate::bench::kernel::show::Output;
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    gain: f64,
    tokens_per_second: f64,
    dedicated_gpus: u32,
    /// The best without a pool.
    without: &'static str,
    without_tokens_per_second: f64,
    /// The best of the published systems without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    published: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    published_tokens_per_second: Option<f64>,
    /// Between nodes, of a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    least_link_bytes_per_second: Option<f64>,
    /// Bytes a second and gain.
    links: Vec<[f64; 2]>,
    /// GPUs, and gain where they can do it.
    dedicated: Vec<(u32, Option<f64>)>,
    limit: &'static str,
    limit_share: f64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let named = args.described.one()?;
    let mut output = Output::new(args.json.as_deref())?;
    let advice = advise(&named.scenario)?;
    output.write(&Line::of(&advice))?;
    output.say(&sentence(&advice))?;
    output.say(&format!("servers: {}", servers(&advice)))?;
    output.say(&format!("links between nodes: {}", links(&advice)))?;
    let (limit, share) = advice.limit();
    output.say(&format!("what limits it: {limit}, {} of a step", percent(share)))?;
    if let Some(published) = &advice.published {
        output.say(&format!(
            "published systems without servers: {} is predicted at {} tokens/s, as its paper describes it",
            published.policy,
            speed(published)
        ))?;
    }
    output.say(&format!("asked: {}", table::description(&named)))?;
    output.say(&table::tuning(&named))
}

/// Yes or no first.
fn sentence(advice: &Advice) -> String {
    let (pool, without) = (&advice.pool, &advice.without);
    let chosen = table::chosen(without);
    let best = if chosen.is_empty() { without.policy.to_string() } else { format!("{}, {chosen}", without.policy) };
    let beside = format!("{} tokens/s in place of {}", speed(pool), speed(without));
    match advice.doubt {
        None => format!(
            "Yes: attention servers {} are predicted to train {} faster than the best without them ({best}): {beside}.",
            place(pool),
            percent(advice.gain())
        ),
        Some(doubt) => {
            let gain = advice.gain();
            let made = if gain >= 0.0 {
                format!("{} faster", percent(gain))
            } else {
                format!("{} slower", percent(-gain))
            };
            format!(
                "No: {}. With attention servers training is predicted to be {made} than the best without them ({best}): {beside}.",
                reason(doubt)
            )
        }
    }
}

fn reason(doubt: Doubt) -> &'static str {
    match doubt {
        Doubt::Alone => "there is one device, which has nobody to share with",
        Doubt::SlowLinks => "the links between nodes are too slow to share attention",
        Doubt::LittleAttention => "attention is too small a part of a step",
        Doubt::Balanced => "attention is about as balanced, and bytes as well hidden, without servers",
    }
}

fn place(pool: &Outcome) -> String {
    match pool.layout.dedicated {
        0 => "in place".to_owned(),
        gpus => format!("on {gpus} GPUs of their own"),
    }
}

fn servers(advice: &Advice) -> String {
    let pool = &advice.pool;
    let best = match pool.layout.dedicated {
        0 => format!("in place, {} of them, each on the {} GPUs of a rank's stage", pool.layout.model_devices(), pool.layout.tensor),
        gpus => format!("{} dedicated ones on {gpus} of the {} GPUs", gpus / pool.layout.tensor, pool.layout.gpus),
    };
    if advice.dedicated.is_empty() {
        return best;
    }
    let tried = advice.dedicated.iter().map(|(gpus, gain)| match gain {
        Some(gain) => format!("{gpus} GPUs {}", signed(*gain)),
        None => format!("{gpus} GPUs do not fit"),
    });
    format!("{best}; gain with dedicated servers on {}", tried.collect::<Vec<_>>().join(", "))
}

fn links(advice: &Advice) -> String {
    let gains = advice.links.iter().map(|link| format!("{} GB/s {}", giga(link.bytes_per_second), signed(link.gain)));
    let gains = gains.collect::<Vec<_>>().join(", ");
    match advice.least_link() {
        Some(least) => format!("{} GB/s a GPU are enough for most of the gain; gain on {gains}", giga(least)),
        None => format!("none that was tried is worth it; gain on {gains}"),
    }
}

fn giga(bytes_per_second: f64) -> String {
    let giga = bytes_per_second / 1e9;
    if giga >= 10.0 { format!("{giga:.0}") } else { format!("{giga:.2}") }
}

fn percent(part: f64) -> String {
    format!("{:.1}%", 100.0 * part)
}

fn signed(part: f64) -> String {
    format!("{:+.1}%", 100.0 * part)
}

fn speed(outcome: &Outcome) -> String {
    table::count(outcome.tokens_per_second.round() as u64)
}

impl Line {
    fn of(advice: &Advice) -> Line {
        let (limit, limit_share) = advice.limit();
        Line {
            kind: "advice",
            worth: advice.is_worth_it(),
            reason: advice.doubt.map(reason),
            gain: advice.gain(),
            tokens_per_second: advice.pool.tokens_per_second,
            dedicated_gpus: advice.pool.layout.dedicated,
            without: advice.without.policy.name(),
            without_tokens_per_second: advice.without.tokens_per_second,
            published: advice.published.as_ref().map(|outcome| outcome.policy.name()),
            published_tokens_per_second: advice.published.as_ref().map(|outcome| outcome.tokens_per_second),
            least_link_bytes_per_second: advice.least_link(),
            links: advice.links.iter().map(|link| [link.bytes_per_second, link.gain]).collect(),
            dedicated: advice.dedicated.clone(),
            limit,
            limit_share,
        }
    }
}
