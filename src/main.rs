//! The `outboard` command: one subcommand per role.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod plan;

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
    /// Plan a step: read STEP.json, print PLAN.json.
    Plan(plan::Args),
    /// Measure speed on this machine.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().role {
        Role::Plan(args) => plan::run(args),
        Role::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outboard: {error:#}");
            ExitCode::from(2)
        }
    }
}
