//! `outboard validate`: what the simulator predicts of published and of own measurements, beside them.

mod cases;
mod documents;
mod facts;
mod gains;
mod own;
mod show;
mod threads;

use std::path::PathBuf;

use crate::bench::kernel::show::{Output, Progress};
use cases::Published;
use documents::Documents;

/// Arguments of `outboard validate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write figures as JSON lines to this file, in place of tables; "-" is standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Predict steps of this machine instead: the JSON lines of runs of `outboard train` with both trainings, one file a
    /// run, whose ranks have servers in place.
    #[arg(long, value_name = "RUN.jsonl", num_args = 1.., requires = "profile")]
    train: Vec<PathBuf>,
    /// With --train: what `outboard profile` measured on this machine, with the model's head dim and as many threads as
    /// the ranks had cores in all.
    #[arg(long, value_name = "PROFILE.json", requires = "train")]
    profile: Option<PathBuf>,
    /// With --train: how many ranks' cores the profile is of.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    profiled_ranks: u32,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut output = Output::new(args.json.as_deref())?;
    if let Some(profile) = &args.profile
        && !args.train.is_empty()
    {
        let profile = crate::profile::read(profile)?;
        let own = |file: &PathBuf| own::own(file, &profile, args.profiled_ranks);
        let runs = args.train.iter().map(own).collect::<anyhow::Result<Vec<_>>>()?;
        return show::show_own(&runs, &mut output);
    }
    let published = Published::built_in()?;
    let cases: usize = published.groups.iter().map(|group| group.cases.len()).sum();
    let steps: usize =
        published.measured.iter().map(|run| run.wlb.len() + usize::from(run.distca.is_some())).sum();
    let progress = Progress::new(cases + steps)?;
    let done = || progress.step();
    let documents = Documents::built_in()?;
    let groups = gains::groups(&published, &documents, &done)?;
    let steps = gains::steps(&published, &documents, &done)?;
    drop(progress);
    let facts = facts::facts(&published)?;
    show::show(&published, &documents.source, &groups, &steps, &facts, &mut output)
}
