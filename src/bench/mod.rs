//! `outboard bench`: what this machine reaches.

pub(crate) mod kernel;

/// Arguments of `outboard bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, clap::Subcommand)]
enum Subject {
    /// Speed of the CPU attention kernel, and the share of this machine's peak that it reaches.
    Kernel(kernel::Args),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.subject {
        Subject::Kernel(args) => kernel::run(args),
    }
}
