//! `outboard bench plan`: what plans are worth, by a judge that knows no planner, and how long planning takes.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use outboard_planner::{Problem, Rates, Verdict, judge, least_bytes, least_seconds, plan};

mod growth;
mod mixes;
mod rival;
mod show;
mod steps;
mod targets;
mod variants;

use super::kernel::measure::median;
use super::kernel::show::{Output, Progress, table};
use rival::{LINKS, Ratios, Rivals};
use show::{HEADER, Line, WORDS};
use steps::{Source, lane};
use variants::Variant;

/// Arguments of `outboard bench plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Plan every *.step.json of this folder, instead of steps drawn from two mixes of document lengths. Plans are
    /// compared with DistCA's: those of the folder's distca.json, or else those that our policy of that name makes.
    #[arg(long, value_name = "DIR")]
    steps: Option<PathBuf>,
    /// Only steps with this text in their name.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only time planning, for steps of up to 4096 servers.
    #[arg(long, conflicts_with_all = ["steps", "only"])]
    growth: bool,
    /// How often each step is planned: the time shown is the median.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Write figures as JSON lines to this file, `-` for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Whether a step is planned with all its heads, or as a tensor-parallel lane of one kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Lane,
}

/// A step's plan, judged.
#[derive(Debug)]
struct Planned {
    step: String,
    part: Part,
    kv_heads: usize,
    /// Tokens of the step over its servers, rounded up.
    tokens_per_server: usize,
    verdict: Verdict,
    /// Whether it is of a kind of its own, which has no targets.
    variant: bool,
    /// Forward bytes of any plan that balances as well, at least.
    least_bytes: f64,
    /// Layer time at the first of [`LINKS`] over the least of any plan.
    layer_over_bound: f64,
    /// Median over the repeats, of planning alone.
    seconds: f64,
    /// How fast a server computes, and by default its link carries.
    rates: Rates,
    ratios: Option<Ratios>,
}

impl Planned {
    /// Forward bytes over those that any plan moves; none where it need not move any.
    fn over_bound(&self) -> Option<f64> {
        let over = self.verdict.forward.bytes as f64 / self.least_bytes;
        over.is_finite().then_some(over)
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.growth {
        return growth::run(args.repeats, &mut Output::new(args.json.as_deref())?);
    }
    let mut sources = match &args.steps {
        Some(folder) => steps::in_folder(folder)?,
        None => {
            let drawn = mixes::all().into_iter().map(Source::Drawn);
            drawn.chain(Variant::ALL.map(Source::Variant)).collect()
        }
    };
    if let Some(only) = &args.only {
        sources.retain(|source| source.name().contains(only.as_str()));
        ensure!(!sources.is_empty(), "--only {only:?}: no step has that in its name");
    }
    let rivals = args.steps.as_deref().map(Rivals::read).transpose()?.unwrap_or_default();
    let mut output = Output::new(args.json.as_deref())?;
    let mut table = table(HEADER, WORDS);
    let mut all = Vec::new();
    let progress = Progress::new(2 * sources.len())?;
    for source in &sources {
        let name = source.name();
        let (whole, rates) = source.step()?;
        let lane = lane(&whole).with_context(|| source.words())?;
        let lanes = whole.geometry.kv_heads();
        for (part, problem, parts) in [(Part::Whole, &whole, 1), (Part::Lane, &lane, lanes)] {
            progress.at(format!("{name}, {} kv heads", problem.geometry.kv_heads()));
            let (verdict, seconds) = measure(problem, args.repeats).with_context(|| source.words())?;
            let [least_bytes, _] = least_bytes(problem).with_context(|| source.words())?;
            let linked = linked(problem, rates).with_context(|| source.words())?;
            let least_seconds =
                least_seconds(problem, linked_rates(rates, LINKS[0])).with_context(|| source.words())?;
            let (plans, lanes) = match (rivals.of(&name), source) {
                (Some(plans), _) => (plans, parts),
                // The targets are those of steps like the recorded ones.
                (None, Source::Variant(_)) => (Vec::new(), 1),
                (None, _) => (rival::plans(problem).with_context(|| source.words())?, 1),
            };
            let ratios = rival::ratios(&plans, &verdict, &linked, lanes, rates);
            let tokens: usize = problem.documents.iter().map(|document| document.tokens()).sum();
            let planned = Planned {
                step: name.clone(),
                part,
                kv_heads: problem.geometry.kv_heads(),
                tokens_per_server: tokens.div_ceil(problem.slots.len().max(1)),
                verdict,
                variant: matches!(source, Source::Variant(_)),
                least_bytes,
                layer_over_bound: linked[0].seconds(linked_rates(rates, LINKS[0])) / least_seconds,
                seconds,
                rates,
                ratios,
            };
            let line = Line::new(&planned);
            output.write(&line)?;
            table.add_row(line.row());
            all.push(planned);
            progress.step();
        }
    }
    drop(progress);
    output.say(&table.to_string())?;
    output.say("")?;
    show::targets(&targets::rows(&all), &mut output)
}

fn linked_rates(rates: Rates, bytes_per_second: f64) -> Rates {
    Rates { bytes_per_second, ..rates }
}

/// Judges the plans that are told how slow links are.
fn linked(problem: &Problem, rates: Rates) -> anyhow::Result<[Verdict; 2]> {
    let [fast, slow] = LINKS.map(|bytes_per_second| {
        let rates = Some(linked_rates(rates, bytes_per_second));
        measure(&Problem { rates, ..problem.clone() }, 1).map(|(verdict, _)| verdict)
    });
    Ok([fast?, slow?])
}

/// Plans a problem `repeats` times, which only takes time, and judges the plan.
fn measure(problem: &Problem, repeats: u32) -> anyhow::Result<(Verdict, f64)> {
    let mut seconds = Vec::new();
    let mut last = None;
    for _ in 0..repeats {
        let started = Instant::now();
        let plan = plan(problem)?;
        seconds.push(started.elapsed().as_secs_f64());
        last = Some(plan);
    }
    let plan = last.context("nothing was planned")?;
    let verdict = judge(&plan, problem).context("the plan is not valid")?;
    Ok((verdict, median(&seconds)))
}
