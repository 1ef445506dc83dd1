//! `outboard attention-server`: one attention server as a process of its own.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use outboard_attention::kernel::Isa;
use outboard_attention_server::{CpuOptions, DeviceOptions, EngineOptions, Service, ServiceOptions};
use serde_json::json;

use crate::{cores, lifetime};

/// Arguments of `outboard attention-server`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes any free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The address that workers reach this server by, "host:port" [default: the listening address].
    #[arg(long)]
    advertise: Option<String>,
    /// Register with the coordinator at this URL.
    #[arg(long)]
    coordinator: Option<String>,
    /// Memory, in MiB: a quarter for the kernel to work in, the rest for task buffers.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    memory_mib: u64,
    /// Threads that compute [default: the cores this process may run on].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Cores to run on, such as 0,1 [default: all].
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// Instruction set of the kernel: portable, avx2 or avx512 [default: the best this machine has].
    #[arg(long)]
    isa: Option<Isa>,
    /// How long tasks in hand may take to finish after SIGTERM, in seconds.
    #[arg(long, default_value_t = 30)]
    drain_seconds: u64,
    /// Print the ready line as JSON.
    #[arg(long)]
    json: bool,
    /// Also end when standard input does, as it does when the parent process dies.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if !args.cores.is_empty() {
        cores::pin(&args.cores)?;
    }
    let threads = match args.threads {
        Some(threads) => usize::from(threads),
        None => cores::available()?.len(),
    };
    let cpu = CpuOptions { isa: args.isa.unwrap_or_else(Isa::detect), threads, ..CpuOptions::default() };
    let engine = EngineOptions { device: DeviceOptions::Cpu(cpu), memory_bytes: args.memory_mib << 20 };
    let service = ServiceOptions {
        listen: args.listen,
        advertise: args.advertise.clone(),
        coordinator: args.coordinator.clone(),
        in_place: None,
        drain_timeout: Duration::from_secs(args.drain_seconds),
        ..ServiceOptions::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the async runtime")?;
    let served = runtime.block_on(serve(args, (engine, threads), service));
    // A read of standard input cannot be cancelled, and would keep the process.
    runtime.shutdown_background();
    served
}

async fn serve(
    args: Args,
    (engine, threads): (EngineOptions, usize),
    options: ServiceOptions,
) -> anyhow::Result<()> {
    let mut service = outboard_attention_server::serve(&engine, options).await?;
    say_ready(&args, &service, threads);
    tokio::select! {
        signal = lifetime::signalled() => tracing::info!("draining after {}", signal?),
        () = lifetime::parent_gone(), if args.end_with_stdin => tracing::info!("draining, since the parent is gone"),
        ended = service.ended() => ended?,
    }
    Ok(service.shut_down().await?)
}

fn say_ready(args: &Args, service: &Service, threads: usize) {
    let (address, pid) = (service.address(), std::process::id());
    let running = service.engine();
    let numerics_ids: Vec<&str> = running.numerics().map(|(_, id)| id).collect();
    if args.json {
        println!(
            "{}",
            json!({"kind": "ready", "role": "attention-server", "address": address.to_string(), "pid": pid,
                   "numerics_ids": numerics_ids, "threads": threads, "memory_bytes": running.memory_bytes()})
        );
    } else {
        let mib = running.memory_bytes() >> 20;
        println!(
            "attention server ready at {address}, pid {pid}: {}, {threads} threads, {mib} MiB",
            numerics_ids.join(" ")
        );
    }
}
