//! `outboard bench`: what this machine reaches.

pub(crate) mod kernel;
mod plan;

/// Arguments of `outboard bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, clap::Subcommand)]
enum Subject {
    /// Speed of the attention kernel, of the CPU beside this machine's peak, or of a GPU.
    Kernel(Box<kernel::Args>),
    /// What plans are worth, by a judge that knows no planner, and how long planning takes.
    Plan(plan::Args),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.subject {
        Subject::Kernel(args) => kernel::run(*args),
        Subject::Plan(args) => plan::run(args),
    }
}
