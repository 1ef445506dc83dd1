//! `outboard attention-server`: attention servers as a process of their own, one for each device.

mod addresses;
mod engines;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use futures::future::join_all;
use outboard_attention::kernel::Isa;
use outboard_attention_server::{Engine, Service, ServiceOptions, serve_engine};
use serde_json::json;
use tokio::sync::watch;

use crate::cuda::CudaArgs;
use crate::device::Devices;
use crate::{cores, lifetime};

/// Arguments of `outboard attention-server`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What computes: cpu; cuda:N; cuda:all, which runs a server for each GPU in this process; or auto, which is cuda:all
    /// with whichever GPUs are usable, and cpu, with a line that says why, when none is.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Devices,
    /// Where to listen; port 0 takes any free port. Several servers listen on consecutive ports, or each on a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The address that workers reach this server by, "host:port" [default: the listening address]. Of several servers it
    /// is the first one's; the ports of the others follow it.
    #[arg(long)]
    advertise: Option<String>,
    /// Register with the coordinator at this URL.
    #[arg(long)]
    coordinator: Option<String>,
    /// Host memory of each server for task buffers, in MiB. With --device cpu a quarter of it is for the kernel to work in.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    memory_mib: u64,
    /// With --device cpu: threads that compute [default: the cores this process may run on].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Cores to run on, such as 0,1 [default: all].
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// With --device cpu: instruction set of the kernel, portable, avx2, avx512 or avx512-bf16 [default: the best this
    /// machine has].
    #[arg(long)]
    isa: Option<Isa>,
    /// How long tasks in hand may take to finish after SIGTERM, in seconds.
    #[arg(long, default_value_t = 30)]
    drain_seconds: u64,
    /// Print the ready lines as JSON.
    #[arg(long)]
    json: bool,
    /// Also end when standard input does, as it does when the parent process dies.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
    #[command(flatten)]
    cuda: CudaArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if !args.cores.is_empty() {
        cores::pin(&args.cores)?;
    }
    let engines = engines::start(&args)?;
    let addresses = addresses::of(args.listen, args.advertise.as_deref(), engines.len())?;
    let options = addresses.into_iter().map(|(listen, advertise)| ServiceOptions {
        listen,
        advertise,
        coordinator: args.coordinator.clone(),
        in_place: None,
        drain_timeout: Duration::from_secs(args.drain_seconds),
        ..ServiceOptions::default()
    });
    let servers = engines.into_iter().zip(options).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the async runtime")?;
    let served = runtime.block_on(serve(&args, servers));
    // A read of standard input cannot be cancelled, and would keep the process.
    runtime.shutdown_background();
    served
}

/// Serves until all servers have ended; the first error is that of the process.
async fn serve(args: &Args, servers: Vec<(Engine, ServiceOptions)>) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let mut ends = Vec::with_capacity(servers.len());
    for (engine, options) in servers {
        match serve_engine(engine, options).await {
            Ok(service) => {
                say_ready(args, &service);
                ends.push(end(service, stopped.clone()));
            }
            Err(error) => {
                // Those before it leave the pool again.
                stop.send_replace(true);
                join_all(ends).await;
                return Err(error.into());
            }
        }
    }
    let asked = async {
        tokio::select! {
            signal = lifetime::signalled() => tracing::info!("draining after {}", signal?),
            () = lifetime::parent_gone(), if args.end_with_stdin => tracing::info!("draining, since the parent is gone"),
        }
        anyhow::Ok(())
    };
    let mut ends = std::pin::pin!(join_all(ends));
    let (asked, ended) = tokio::select! {
        ended = &mut ends => (Ok(()), ended),
        asked = asked => {
            stop.send_replace(true);
            (asked, ends.await)
        }
    };
    ended.into_iter().collect::<anyhow::Result<()>>().and(asked)
}

/// Shuts a server down once it should, or has to, end. Others go on.
async fn end(mut service: Service, mut stop: watch::Receiver<bool>) -> anyhow::Result<()> {
    let ended = tokio::select! {
        _ = stop.wait_for(|stop| *stop) => Ok(()),
        ended = service.ended() => ended,
    };
    if let Err(error) = &ended {
        tracing::error!(address = %service.address(), %error, "a server ends");
    }
    let drained = service.shut_down().await;
    Ok(ended.and(drained)?)
}

fn say_ready(args: &Args, service: &Service) {
    let (address, pid, engine) = (service.address(), std::process::id(), service.engine());
    let numerics_ids: Vec<&str> = engine.numerics().map(|(_, id)| id).collect();
    let threads = engine.threads();
    if args.json {
        let mut line = json!({"kind": "ready", "role": "attention-server", "address": address.to_string(), "pid": pid,
            "device": engine.device(), "numerics_ids": numerics_ids, "memory_bytes": engine.memory_bytes()});
        if let Some(threads) = threads {
            line["threads"] = threads.into();
        }
        println!("{line}");
    } else {
        let what = match threads {
            Some(threads) => format!("{}, {threads} threads", numerics_ids.join(" ")),
            None => format!("{}, {}", engine.device(), numerics_ids.join(" ")),
        };
        let mib = engine.memory_bytes() >> 20;
        println!("attention server ready at {address}, pid {pid}: {what}, {mib} MiB");
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention_server::EngineOptions;

    use super::*;

    #[tokio::test]
    async fn a_server_that_drains_ends_alone() {
        let (stop, stopped) = watch::channel(false);
        let mut servers = Vec::new();
        for _ in 0..2 {
            let engine = Engine::start(&EngineOptions::default()).unwrap();
            let service = serve_engine(engine.clone(), ServiceOptions::default()).await.unwrap();
            servers.push((engine, tokio::spawn(end(service, stopped.clone()))));
        }
        let (second, first) = (servers.pop().unwrap(), servers.pop().unwrap());
        first.0.drain();
        first.1.await.unwrap().unwrap();
        assert!(!second.1.is_finished() && !second.0.is_draining());
        stop.send_replace(true);
        second.1.await.unwrap().unwrap();
    }
}
