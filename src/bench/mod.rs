//! `outboard bench`.

/// Arguments of `outboard bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("nothing to measure yet")
}
