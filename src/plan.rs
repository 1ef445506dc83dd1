//! `outboard plan`: reads STEP.json, prints PLAN.json, and shows the plan to people.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use outboard_attention::Document;
use outboard_planner::{
    DEFAULT_TOLERANCE, DISTCA_TOLERANCE, PlanError, Policy, Profile, Rates, Settled, plan_by, settle,
};

use chosen::Chosen;
use figures::Figures;

use crate::step::{PlanFile, Step, read};

mod chosen;
#[cfg(test)]
mod examples;
mod fetched;
mod figures;
mod html;
mod summary;

/// Arguments of `outboard plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The step to plan, as STEP.json describes it.
    step: PathBuf,
    /// Write the plan to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write a page that shows the plan to this file too: figures, the work of each server, who sends to whom, and how
    /// the longest documents are cut. It needs no network and no other file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Who decides: our planner, or another system's way to compare it with.
    #[arg(long, value_name = "NAME", default_value_t, value_parser = policies())]
    policy: Policy,
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true, help = TOLERANCE.as_str())]
    tolerance: Option<f64>,
    #[arg(long, value_name = "PROFILE.json", help = PROFILE.as_str())]
    profile: Option<PathBuf>,
}

static PROFILE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "How fast a server of speed 1 computes tasks of each shape: a file that `outboard profile` wrote, or one that \
         comes with this program, {}. Predicted times are shown on standard error, and if the step has bytes_per_second, \
         layer time is counted by them instead of flops_per_second",
        Profile::BUILT_IN.join(", ")
    )
});

static TOLERANCE: LazyLock<String> = LazyLock::new(|| {
    format!(
        "With outboard, how far the busiest server may lie above the mean, as a fraction of it [default: \
         {DEFAULT_TOLERANCE}, or whatever takes the least layer time if the step has bytes_per_second]; with distca, how far below the mean a server may stay [default: {DISTCA_TOLERANCE}]. \
         More moves fewer bytes"
    )
});

/// What each of [`Policy::NAMES`] is.
const ABOUT: [&str; Policy::NAMES.len()] = [
    "balances within the tolerance and moves few bytes",
    "no balancing: every row is computed where it lives",
    "whole documents, most work first, each to the server with the least (as WLB-LLM packs them)",
    "every document in two chunks a server, one from its head and one from its tail",
    "servers that lack work take rows of all kv heads, fewest bytes per FLOP first (as DistCA plans)",
];

fn policies() -> impl TypedValueParser<Value = Policy> {
    let names = Policy::NAMES.iter().zip(ABOUT).map(|(name, about)| PossibleValue::new(*name).help(about));
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Policy>())
}

/// The policy with its tolerance, and the problem's.
fn with_tolerance(policy: Policy, tolerance: Option<f64>) -> anyhow::Result<(Policy, f64)> {
    match (policy, tolerance) {
        (Policy::Distca { .. }, Some(tolerance)) => Ok((Policy::Distca { tolerance }, DEFAULT_TOLERANCE)),
        (Policy::Outboard, Some(tolerance)) => Ok((policy, tolerance)),
        (_, None) => Ok((policy, DEFAULT_TOLERANCE)),
        (_, Some(_)) => bail!("--tolerance means nothing to policy {policy}; it is for outboard and distca"),
    }
}

/// The profile of that name, or else in that file.
fn profile(asked: &Path) -> anyhow::Result<Profile> {
    match asked.to_str().and_then(Profile::built_in) {
        Some(profile) => Ok(profile),
        None => crate::profile::read(asked).with_context(|| {
            let names = Profile::BUILT_IN.join(", ");
            format!("--profile takes a file or one of {names}")
        }),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { step, output, html, policy, tolerance, profile: asked } = args;
    if let (Some(html), Some(output)) = (&html, &output)
        && html == output
    {
        bail!("--html and --output both name {}", html.display());
    }
    let balance = policy == Policy::Outboard && tolerance.is_some();
    let (policy, tolerance) = with_tolerance(policy, tolerance)?;
    let profile = asked.as_deref().map(profile).transpose()?;
    let Step { mut problem, servers, documents, flops_per_second, link, token_slack, mut unused } =
        read(&step)?;
    if token_slack.is_some() && policy != Policy::Outboard {
        bail!("{}: policy {policy} takes documents with homes, and some have none", step.display());
    }
    let free: Vec<bool> = problem.documents.iter().map(|document| !document.is_placed()).collect();
    problem.tolerance = tolerance;
    problem.profile = profile;
    if problem.profile.is_some() && problem.rates.is_some() && flops_per_second.is_some() {
        unused.push("flops_per_second is not used: --profile says how fast servers compute".to_owned());
    }
    // What the step says of links and servers holds, whatever is planned for.
    let known = problem.rates;
    if balance {
        problem.rates = None;
    }
    for note in unused {
        eprintln!("outboard: {}: {note}", step.display());
    }
    let started = Instant::now();
    let planned = match token_slack {
        Some(slack) => settle(&problem, slack).map(|Settled { documents, plan }| {
            problem.documents = documents;
            plan
        }),
        None => plan_by(&problem, policy),
    };
    let plan = planned.map_err(|error| {
        // The planner knows slots, and whoever wrote the step servers.
        let server = match &error {
            PlanError::NoMemory { slot, .. } => servers.get(*slot),
            _ => None,
        };
        let of_server = server.map(|id| format!(": server {id} has too little memory")).unwrap_or_default();
        let document = match &error {
            PlanError::PinnedTooMany { document, .. } | PlanError::NoRank { document } => {
                documents.get(document.index as usize)
            }
            _ => None,
        };
        let of_server = document.map_or(of_server, |id| format!(": document {id}"));
        anyhow::Error::from(error).context(format!("cannot plan {}{of_server}", step.display()))
    })?;
    let plan_seconds = started.elapsed().as_secs_f64();
    // Whoever gives a profile asks for what it predicts, wherever that goes.
    let table = problem.profile.is_some() || std::io::stderr().is_terminal();
    let figures = (table || html.is_some())
        .then(|| Figures::of(&problem, &plan))
        .transpose()
        .with_context(|| format!("cannot judge the plan of {}", step.display()))?;
    let chosen = token_slack.filter(|_| figures.is_some()).map(|slack| {
        let free = free.iter().filter(|free| **free).count();
        Chosen::of(&problem, &plan, slack, free)
    });
    if let (Some(figures), true) = (&figures, table) {
        let shown = summary::Shown {
            problem: &problem,
            figures,
            servers: &servers,
            rates: known,
            chosen: chosen.as_ref(),
        };
        eprintln!("{}", summary::table(&shown));
    }
    if let (Some(figures), Some(file)) = (&figures, html) {
        let default = Rates::default();
        let given = html::Given { compute: flops_per_second.is_some(), link: link.is_some() };
        let flops_per_second = flops_per_second.unwrap_or(default.flops_per_second);
        let planned = html::Planned {
            problem: &problem,
            plan: &plan,
            servers: &servers,
            documents: &documents,
            step: &step.file_name().unwrap_or(step.as_os_str()).to_string_lossy(),
            policy,
            limit: (policy == Policy::Outboard && problem.rates.is_none()).then_some(tolerance),
            rates: Rates { flops_per_second, bytes_per_second: link.unwrap_or(default.bytes_per_second) },
            given,
            seconds: plan_seconds,
            chosen: chosen.as_ref(),
        };
        std::fs::write(&file, html::page(&planned, figures))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let placed: Vec<&Document> =
        problem.documents.iter().zip(free).filter(|(_, free)| *free).map(|(d, _)| d).collect();
    let plan = PlanFile::new(&plan, &placed, &servers, &documents, plan_seconds);
    write_json(&plan, output)
}

fn write_json(plan: &PlanFile, output: Option<PathBuf>) -> anyhow::Result<()> {
    let mut json = serde_json::to_vec(plan).context("cannot encode the plan")?;
    json.push(b'\n');
    match output {
        Some(file) => std::fs::write(&file, json).with_context(|| format!("cannot write {}", file.display())),
        None => match std::io::stdout().write_all(&json) {
            // Whoever read the plan has seen enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            outcome => outcome.context("cannot write the plan to standard output"),
        },
    }
}
