//! `outboard validate`: what the simulator predicts of published and of own measurements, beside them.

mod cases;
mod facts;
mod gains;
mod show;
mod threads;

use std::path::PathBuf;

use crate::bench::kernel::show::{Output, Progress};
use cases::Published;

/// Arguments of `outboard validate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Write figures as JSON lines to this file, in place of tables; "-" is standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let published = Published::built_in()?;
    let cases: usize = published.groups.iter().map(|group| group.cases.len()).sum();
    let steps: usize =
        published.measured.iter().map(|run| run.wlb.len() + usize::from(run.distca.is_some())).sum();
    let mut output = Output::new(args.json.as_deref())?;
    let progress = Progress::new(cases + steps)?;
    let done = || progress.step();
    let groups = gains::groups(&published, &done)?;
    let steps = gains::steps(&published, &done)?;
    drop(progress);
    let facts = facts::facts(&published)?;
    show::show(&published, &groups, &steps, &facts, &mut output)
}
