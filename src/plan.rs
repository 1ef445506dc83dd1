//! `outboard plan`: reads STEP.json, prints PLAN.json.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use outboard_planner::plan;

use crate::step::{PlanFile, Step, read};

mod summary;

/// Arguments of `outboard plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The step to plan, as STEP.json describes it.
    step: PathBuf,
    /// Write the plan to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How far the busiest server may lie above the mean, as a fraction of it. More moves fewer bytes.
    #[arg(long, allow_negative_numbers = true, default_value_t = outboard_planner::DEFAULT_TOLERANCE)]
    tolerance: f64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { step, output, tolerance } = args;
    let Step { mut problem, servers, documents, unused, .. } = read(&step)?;
    problem.tolerance = tolerance;
    for note in unused {
        eprintln!("outboard: {}: {note}", step.display());
    }
    let started = Instant::now();
    let plan = plan(&problem).with_context(|| format!("cannot plan {}", step.display()))?;
    let plan_seconds = started.elapsed().as_secs_f64();
    if std::io::stderr().is_terminal() {
        eprintln!("{}", summary::table(&problem, &plan, &servers));
    }
    let plan = PlanFile::new(&plan, &servers, &documents, plan_seconds);
    let mut json = serde_json::to_vec(&plan).context("cannot encode the plan")?;
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
