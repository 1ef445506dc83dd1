//! The `outboard` command: one subcommand per role.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use outboard_proto::describe;
use tracing_subscriber::EnvFilter;

mod attention_server;
mod bench;
mod compute;
mod coordinator;
mod cores;
mod cuda;
mod device;
mod holdings;
mod lifetime;
mod page;
mod plan;
mod profile;
mod simulate;
mod slices;
mod step;
mod train;
mod validate;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Core attention as a service for long-context training.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Train a small Llama whose core attention is computed by attention servers, and compare with local attention.
    ///
    /// Before the job starts, a line says what balanced attention is predicted to gain for its documents and links; where
    /// that is not worth a pool, a warning does. The table at the end has what was run, and what the times of the local
    /// training predict of two trainings that were not: whole documents packed by their attention without a pool (wlb),
    /// and attention exactly where the plans put it.
    Train(train::Args),
    /// Run one attention server, or one for each GPU.
    AttentionServer(attention_server::Args),
    /// Run the coordinator: the pool, the jobs, and their plans.
    Coordinator(coordinator::Args),
    /// Plan a step: read STEP.json, print PLAN.json.
    Plan(plan::Args),
    /// Compute a batch of attention tasks that is stored in files, on a device.
    Compute(compute::Args),
    /// Measure speed on this machine.
    Bench(bench::Args),
    /// Measure what this machine reaches on tasks of each size, for the cost model: print or write PROFILE.json.
    Profile(profile::Args),
    /// Say what the simulator predicts of published measurements, beside them, and what is assumed where they are silent.
    Validate(validate::Args),
    /// Simulate training steps on a cluster, by each way to share core attention: what each would take, where the time
    /// goes, and what fits.
    Simulate(Box<simulate::Args>),
    /// One rank of `outboard train`, which starts it.
    #[command(hide = true)]
    TrainRank,
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("OUTBOARD_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let outcome = match Cli::parse().role {
        Role::Train(args) => train::run(args),
        Role::AttentionServer(args) => attention_server::run(args),
        Role::Coordinator(args) => coordinator::run(args),
        Role::Plan(args) => plan::run(args),
        Role::Compute(args) => compute::run(args),
        Role::Bench(args) => bench::run(args),
        Role::Profile(args) => profile::run(args),
        Role::Validate(args) => validate::run(args),
        Role::Simulate(args) => simulate::run(*args),
        Role::TrainRank => return train::rank::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outboard: {}", describe(error.as_ref()));
            ExitCode::from(2)
        }
    }
}
