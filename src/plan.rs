//! `outboard plan`.

use std::path::PathBuf;

/// Arguments of `outboard plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The step to plan.
    step: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    anyhow::bail!("cannot plan {} yet", args.step.display())
}
