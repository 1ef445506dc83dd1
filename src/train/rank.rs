//! One rank of a run, as a process of its own: sets itself up as the launcher says, and trains.

use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use outboard_attention::kernel::{Isa, KernelConfig};
use outboard_attention::{Document, DocumentId, HomeRange, Span};
use outboard_attention_server::{CpuOptions, DeviceOptions, EngineOptions, InPlace, Service, ServiceOptions};
use outboard_proto::describe;
use outboard_trainer::{Exchange, ExchangeConfig, Packer, StepPacking, Trainer, require_one_thread};
use outboard_transport::TaskHandler;
use outboard_worker::{CoreAttention, JobOptions, LocalAttention, Placed, PoolAttention};
use tokio::runtime::Runtime;

use super::probe::{self, Speed};
use super::protocol::{FromRank, Mode, PlacedCells, PoolStep, RankStep, Setup, ToRank};
use crate::cores;

/// How long a rank waits for the others in the gradient exchange.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(300);

/// Runs a rank; the launcher is at the other end of standard input and output, and shows any error.
pub(crate) fn run() -> ExitCode {
    let outcome = listen().and_then(|launcher| match launcher.recv() {
        Ok(ToRank::Setup(setup)) => train(&setup, &launcher),
        _ => {
            bail!("this command is started by `outboard train`, which tells it what to do on standard input")
        }
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // When the launcher is gone, nobody needs to know.
            let _ = say(&FromRank::Failed { message: describe(error.as_ref()) });
            ExitCode::from(2)
        }
    }
}

/// Reads the launcher's messages. The process ends with the launcher, however that ends.
fn listen() -> anyhow::Result<Receiver<ToRank>> {
    let (sender, receiver) = sync_channel(4);
    let read = move || {
        for line in std::io::stdin().lock().lines() {
            let message = line.ok().and_then(|line| serde_json::from_str::<ToRank>(&line).ok());
            let Some(message) = message else { break };
            let finish = matches!(message, ToRank::Finish);
            if sender.send(message).is_err() || finish {
                return;
            }
        }
        std::process::exit(3);
    };
    std::thread::Builder::new().name("launcher".into()).spawn(read).context("cannot start a thread")?;
    Ok(receiver)
}

fn say(message: &FromRank) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, message)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn train(setup: &Setup, launcher: &Receiver<ToRank>) -> anyhow::Result<()> {
    require_one_thread()?;
    cores::pin(&setup.cores)?;
    let speed = setup.probe.then(|| probe::measure(&setup.model, setup.cores.len())).transpose();
    let speed = speed.unwrap_or_else(|error| {
        // The run needs no prediction.
        tracing::warn!(rank = setup.train.rank, error = %describe(error.as_ref()), "the speed could not be measured");
        None
    });
    let mut exchange = join_exchange(setup, launcher, speed)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let pool = match setup.modes.contains(&Mode::Pool) {
        true => Some(Pool::join(setup, &runtime)?),
        false => None,
    };
    let outcome = train_steps(setup, pool.as_ref(), &mut exchange).and_then(|()| {
        say(&FromRank::Done)?;
        // The in-place server must stay until every rank is done.
        launcher.recv().context("the launcher is gone").map(drop)
    });
    if let Some(pool) = pool {
        let reason = outcome.as_ref().err().map(|error| describe(error.as_ref()));
        let left = pool.leave(&reason.unwrap_or_default(), &runtime);
        // What went wrong first says more than what went wrong because of it.
        return outcome.and(left);
    }
    outcome
}

fn join_exchange(
    setup: &Setup,
    launcher: &Receiver<ToRank>,
    speed: Option<Speed>,
) -> anyhow::Result<Exchange> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen for other ranks")?;
    say(&FromRank::Listening { address: listener.local_addr()?, speed })?;
    let Ok(ToRank::Exchange { addresses }) = launcher.recv() else {
        bail!("the launcher did not say where the other ranks are");
    };
    let config = ExchangeConfig {
        job: setup.job.clone(),
        rank: setup.train.rank,
        ranks: setup.train.ranks,
        timeout: EXCHANGE_TIMEOUT,
    };
    Ok(Exchange::connect(&config, &listener, &addresses)?)
}

/// The pool as this rank takes part in it.
struct Pool {
    attention: Arc<PoolAttention>,
    in_place: Option<Service>,
}

impl Pool {
    fn join(setup: &Setup, runtime: &Runtime) -> anyhow::Result<Pool> {
        let rank = setup.train.rank;
        let coordinator = setup.coordinator.clone().context("a pooled run needs a coordinator")?;
        let in_place = match setup.in_place {
            false => None,
            true => {
                let cpu = CpuOptions { threads: setup.cores.len(), ..CpuOptions::default() };
                let engine =
                    EngineOptions { device: DeviceOptions::Cpu(cpu), memory_bytes: setup.memory_bytes };
                let options = ServiceOptions {
                    coordinator: Some(coordinator.clone()),
                    in_place: Some(InPlace { job: setup.job.clone(), rank }),
                    ..ServiceOptions::default()
                };
                Some(runtime.block_on(outboard_attention_server::serve(&engine, options))?)
            }
        };
        let geometry = setup.model.validate()?;
        let options = JobOptions {
            min_servers: setup.min_servers,
            rates: setup.rates.map(Into::into),
            ..JobOptions::new(coordinator, setup.job.clone(), rank, setup.train.ranks, geometry)
        };
        let handler = in_place.as_ref().map(|service| Arc::new(service.engine()) as Arc<dyn TaskHandler>);
        let attention = PoolAttention::join(options, runtime.handle().clone(), handler, None)?;
        say(&FromRank::Started { numerics_id: attention.numerics_id().to_owned() })?;
        Ok(Pool { attention: Arc::new(attention), in_place })
    }

    fn leave(self, reason: &str, runtime: &Runtime) -> anyhow::Result<()> {
        let left = self.attention.leave(reason);
        if let Some(service) = self.in_place {
            runtime.block_on(service.shut_down())?;
        }
        Ok(left?)
    }
}

fn train_steps(setup: &Setup, pool: Option<&Pool>, exchange: &mut Exchange) -> anyhow::Result<()> {
    let rank = setup.train.rank;
    let corpus = Arc::new(setup.data.corpus()?);
    let mut packer = Packer::new(corpus, &setup.train)?;
    let mut trainers = Vec::with_capacity(setup.modes.len());
    for &mode in &setup.modes {
        let attention: Arc<dyn CoreAttention> = match (mode, pool) {
            (Mode::Pool, Some(pool)) => pool.attention.clone(),
            _ => {
                let config = KernelConfig::new(Isa::detect(), setup.cores.len());
                Arc::new(LocalAttention::new(config)?)
            }
        };
        trainers.push((mode, Trainer::new(&setup.model, &setup.train, attention)?));
    }

    let submit = |packing: &StepPacking| match pool {
        Some(pool) => Ok(pool.attention.submit_step(packing.step, documents(packing, rank)?)?),
        None => anyhow::Ok(()),
    };
    let mut next = packer.packing(0);
    submit(&next)?;
    for step in 0..setup.train.steps {
        let packing = next;
        next = packer.packing(step + 1);
        if next.step < setup.train.steps {
            submit(&next)?;
        }
        let batch = packer.load(&packing, rank)?;
        // The trainings take turns in going first, so that neither always has the warmer caches.
        if step % 2 == 1 {
            trainers.reverse();
        }
        for (mode, trainer) in &mut trainers {
            let outcome = trainer.step(&batch, exchange)?;
            let pool_step = match (*mode, pool) {
                (Mode::Pool, Some(pool)) => Some(finish(pool, step, outcome.seconds)?),
                _ => None,
            };
            say(&FromRank::Step(RankStep {
                step,
                mode: *mode,
                loss: outcome.loss,
                seconds: outcome.seconds,
                attention_seconds: outcome.attention_seconds,
                exchange_seconds: outcome.exchange_seconds,
                wait_seconds: outcome.wait_seconds,
                tokens: outcome.tokens as u64,
                documents: packing.lengths(rank),
                dropped_bytes: packing.dropped_tokens,
                cells: cells(&packing, rank, setup.model.kv_heads),
                pool: pool_step,
            }))?;
        }
        if step % 2 == 1 {
            trainers.reverse();
        }
    }
    Ok(())
}

/// Ends a pooled step and says what it took.
fn finish(pool: &Pool, step: u64, seconds: f64) -> anyhow::Result<PoolStep> {
    let stats = pool.attention.finish_step(step, seconds)?;
    let placed =
        stats.placed.iter().map(|&Placed { server, rank, cells }| PlacedCells { server, rank, cells });
    Ok(PoolStep {
        placed: placed.collect(),
        imbalance_before: stats.summary.imbalance_before,
        imbalance_after: stats.summary.imbalance_after,
        planned_tasks: stats.summary.tasks,
        tasks: stats.tasks,
        tasks_resent: stats.tasks_resent,
        servers_lost: stats.servers_lost,
        bytes_moved: stats.bytes_moved,
        exposed_seconds: stats.exposed.as_secs_f64(),
        communication_seconds: stats.communication.as_secs_f64(),
        plan_seconds: stats.summary.plan_seconds,
    })
}

/// This rank's documents of a step, as the planner sees them.
pub(crate) fn documents(packing: &StepPacking, rank: u32) -> anyhow::Result<Vec<Document>> {
    let document = |(index, tokens): (usize, usize)| {
        let id = DocumentId { rank, index: index as u32 };
        Document::new(id, tokens, vec![HomeRange { rank, tokens: Span::to(tokens) }])
    };
    Ok(packing.lengths(rank).into_iter().enumerate().map(document).collect::<Result<_, _>>()?)
}

/// Causal cells of this rank's documents, each counted once per kv head.
fn cells(packing: &StepPacking, rank: u32, kv_heads: usize) -> u64 {
    let of_document = |n: usize| (n as u64) * (n as u64 + 1) / 2;
    packing.lengths(rank).into_iter().map(of_document).sum::<u64>() * kv_heads as u64
}
