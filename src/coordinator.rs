//! `outboard coordinator`: the pool, the jobs and their plans, as a process of its own.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use outboard_coordinator::Options;
use serde_json::json;
use tokio::net::TcpListener;

use crate::lifetime;

/// Arguments of `outboard coordinator`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes any free port.
    #[arg(long, default_value = "127.0.0.1:4650")]
    listen: SocketAddr,
    /// How long a server stays in the pool without a heartbeat, in milliseconds.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(30..=86_400_000))]
    lease_ms: u32,
    /// How long a job waits for its ranks and servers, in seconds.
    #[arg(long, default_value_t = 300.0)]
    join_timeout: f64,
    /// How long a step waits for its last rank, in seconds.
    #[arg(long, default_value_t = 300.0)]
    step_timeout: f64,
    /// Print the ready line as JSON.
    #[arg(long)]
    json: bool,
    /// Also end when standard input does, as it does when the parent process dies.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let options = Options {
        lease: Duration::from_millis(u64::from(args.lease_ms)),
        join_timeout: seconds("--join-timeout", args.join_timeout)?,
        step_timeout: seconds("--step-timeout", args.step_timeout)?,
        ..Options::default()
    };
    options.check()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the async runtime")?;
    let served = runtime.block_on(serve(args, options));
    // Neither a plan in the making nor a read of standard input may hold the process up.
    runtime.shutdown_background();
    served
}

async fn serve(args: Args, options: Options) -> anyhow::Result<()> {
    let listen = args.listen;
    let listener = TcpListener::bind(listen).await;
    let listener = listener
        .with_context(|| format!("cannot listen on {listen}; choose another address with --listen"))?;
    say_ready(args.json, listener.local_addr()?);
    let shutdown = async move {
        tokio::select! {
            signal = lifetime::signalled() => match signal {
                Ok(signal) => tracing::info!("shutting down after {signal}"),
                Err(error) => tracing::error!("shutting down, since signals cannot be received: {error:#}"),
            },
            () = lifetime::parent_gone(), if args.end_with_stdin => tracing::info!("shutting down, since the parent is gone"),
        }
    };
    Ok(outboard_coordinator::serve(listener, options, shutdown).await?)
}

fn say_ready(as_json: bool, address: SocketAddr) {
    let pid = std::process::id();
    if as_json {
        let ready =
            json!({"kind": "ready", "role": "coordinator", "address": address.to_string(), "pid": pid});
        println!("{ready}");
    } else {
        println!("coordinator ready at {address}, pid {pid}");
    }
}

/// A time given in seconds on the command line.
fn seconds(flag: &str, value: f64) -> anyhow::Result<Duration> {
    let time = Duration::try_from_secs_f64(value).ok().filter(|time| !time.is_zero());
    time.with_context(|| format!("{flag} is {value}; it must be a number of seconds above 0"))
}
