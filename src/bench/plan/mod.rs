//! `outboard bench plan`: what plans are worth, by a judge that knows no planner, and how long planning takes.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use outboard_planner::{PlanError, Problem, Rates, Verdict, judge, least_bytes, least_seconds, plan};

mod free;
mod growth;
mod mixes;
mod rival;
mod show;
mod steps;
mod targets;
mod variants;

use super::kernel::measure::median;
use super::kernel::show::{Output, Progress, table};
use free::{Chosen, free_homes};
use rival::{Entry, LINKS, Ratios, Rivals};
use show::{FREE_HEADER, HEADER, Line, WORDS};
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
    /// Take the homes of each step's documents away and choose them, within 2% of the mean number of tokens a rank. Plans
    /// are compared with DistCA's, and with ours, of the step's own homes.
    #[arg(long)]
    free_homes: bool,
    /// Only time planning, for steps of up to 4096 servers.
    #[arg(long, conflicts_with_all = ["steps", "only", "free_homes"])]
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
    /// Median over the repeats, of planning alone.
    seconds: f64,
    /// How fast a server computes, and by default its link carries.
    rates: Rates,
    ratios: Option<Ratios>,
    homes: Homes,
}

/// Where rows live, and what the plan is set beside because of that.
#[derive(Clone, Copy, Debug)]
enum Homes {
    /// Where the step says.
    Own(Bounds),
    /// Where we chose.
    Free(Chosen),
}

/// What no plan does better.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Forward bytes of any plan that balances as well, at least.
    least_bytes: f64,
    /// Layer time at the first of [`LINKS`] over the least of any plan.
    layer_over_bound: f64,
}

/// Plans of a step, judged.
#[derive(Debug)]
struct Plans {
    /// The one that is told nothing of links.
    verdict: Verdict,
    /// Those that are told of each of [`LINKS`].
    linked: [Verdict; 2],
    /// Median over the repeats, of planning the first.
    seconds: f64,
}

/// One part of one step, and what it is compared with.
#[derive(Clone, Copy, Debug)]
struct Case<'a> {
    source: &'a Source,
    part: Part,
    problem: &'a Problem,
    rates: Rates,
    /// DistCA's plans of the whole step, where it has some.
    recorded: Option<&'a [(f64, Entry)]>,
    /// How many such parts the step has.
    parts: usize,
}

impl Planned {
    /// Forward bytes over those that any plan moves; none where it need not move any, or homes were chosen.
    fn over_bound(&self) -> Option<f64> {
        let Homes::Own(bounds) = self.homes else { return None };
        let over = self.verdict.forward.bytes as f64 / bounds.least_bytes;
        over.is_finite().then_some(over)
    }
}

impl Plans {
    /// Layer time with the plan that is told of one of [`LINKS`].
    fn layer_seconds(&self, link: usize, rates: Rates) -> f64 {
        self.linked[link].seconds(linked_rates(rates, LINKS[link]))
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
    let mut table = if args.free_homes { table(FREE_HEADER, WORDS) } else { table(HEADER, WORDS) };
    let mut all = Vec::new();
    let progress = Progress::new(2 * sources.len())?;
    for source in &sources {
        let name = source.name();
        let (whole, rates) = source.step()?;
        let lane = lane(&whole).with_context(|| source.words())?;
        let recorded = rivals.of(&name);
        for (part, problem, parts) in
            [(Part::Whole, &whole, 1), (Part::Lane, &lane, whole.geometry.kv_heads())]
        {
            progress.at(format!("{name}, {} kv heads", problem.geometry.kv_heads()));
            let case = Case { source, part, problem, rates, recorded, parts };
            let planned = case.planned(args.free_homes, args.repeats).with_context(|| source.words())?;
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
    let rows = if args.free_homes { targets::free_rows(&all) } else { targets::rows(&all) };
    let notes = if args.free_homes { &show::FREE_NOTES } else { &show::NOTES };
    show::targets(&rows, notes, &mut output)
}

impl Case<'_> {
    fn planned(&self, free: bool, repeats: u32) -> anyhow::Result<Planned> {
        let &Case { source, part, problem, rates, recorded, parts } = self;
        let (plans, homes) = if free {
            let (plans, chosen) = free_homes(problem, rates, repeats)?;
            (plans, Homes::Free(chosen))
        } else {
            let plans = own_homes(problem, rates, repeats)?;
            let [least_bytes, _] = least_bytes(problem)?;
            let least_seconds = least_seconds(problem, linked_rates(rates, LINKS[0]))?;
            let layer_over_bound = plans.layer_seconds(0, rates) / least_seconds;
            (plans, Homes::Own(Bounds { least_bytes, layer_over_bound }))
        };
        let Plans { verdict, linked, seconds } = plans;
        let ratios = match (recorded, source) {
            (Some(recorded), _) => rival::ratios(recorded, &verdict, &linked, parts, rates),
            // The targets are those of steps like the recorded ones.
            (None, Source::Variant(_)) => None,
            (None, _) => rival::ratios(&rival::plans(problem)?, &verdict, &linked, 1, rates),
        };
        let tokens: usize = problem.documents.iter().map(|document| document.tokens()).sum();
        Ok(Planned {
            step: source.name(),
            part,
            kv_heads: problem.geometry.kv_heads(),
            tokens_per_server: tokens.div_ceil(problem.slots.len().max(1)),
            verdict,
            variant: matches!(source, Source::Variant(_)),
            seconds,
            rates,
            ratios,
            homes,
        })
    }
}

fn linked_rates(rates: Rates, bytes_per_second: f64) -> Rates {
    Rates { bytes_per_second, ..rates }
}

/// Plans a step as it is.
fn own_homes(problem: &Problem, rates: Rates, repeats: u32) -> anyhow::Result<Plans> {
    let (verdict, seconds) = measure(problem, repeats)?;
    let linked = linked(problem, rates, |problem| Ok(measure(problem, 1)?.0))?;
    Ok(Plans { verdict, linked, seconds })
}

/// What `judged` makes of a step that says how slow links are.
fn linked(
    problem: &Problem,
    rates: Rates,
    judged: impl Fn(&Problem) -> anyhow::Result<Verdict>,
) -> anyhow::Result<[Verdict; 2]> {
    let [fast, slow] = LINKS.map(|bytes_per_second| {
        let rates = Some(linked_rates(rates, bytes_per_second));
        judged(&Problem { rates, ..problem.clone() })
    });
    Ok([fast?, slow?])
}

/// Plans a problem `repeats` times, which only takes time, and judges the plan.
fn measure(problem: &Problem, repeats: u32) -> anyhow::Result<(Verdict, f64)> {
    let (plan, seconds) = timed(repeats, || plan(problem))?;
    let verdict = judge(&plan, problem).context("the plan is not valid")?;
    Ok((verdict, seconds))
}

/// The last of what was planned `repeats` times, and the median of the seconds that it took.
fn timed<T>(repeats: u32, plan: impl Fn() -> Result<T, PlanError>) -> anyhow::Result<(T, f64)> {
    let mut seconds = Vec::new();
    let mut last = None;
    for _ in 0..repeats {
        let started = Instant::now();
        let plan = plan()?;
        seconds.push(started.elapsed().as_secs_f64());
        last = Some(plan);
    }
    Ok((last.context("nothing was planned")?, median(&seconds)))
}
