//! One rank of a run, as a process of its own: sets itself up as the launcher says, and trains.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use outboard_attention::Span;
use outboard_attention::kernel::{Isa, KernelConfig};
use outboard_attention_server::{CpuOptions, DeviceOptions, EngineOptions, InPlace, Service, ServiceOptions};
use outboard_proto::describe;
use outboard_trainer::{
    Exchange, ExchangeConfig, PackedBatch, Packer, StepPacking, Trainer, require_one_thread,
};
use outboard_transport::TaskHandler;
use outboard_worker::{CoreAttention, Home, JobOptions, LocalAttention, Placed, PoolAttention};
use tokio::runtime::Runtime;

use super::documents;
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
        let listen = || Home::listen((Ipv4Addr::LOCALHOST, 0).into(), None, runtime.handle());
        let home = setup.placement.map(|_| listen()).transpose()?;
        let in_place = match setup.in_place {
            false => None,
            true => {
                let cpu = CpuOptions { threads: setup.cores.len(), ..CpuOptions::default() };
                let engine =
                    EngineOptions { device: DeviceOptions::Cpu(cpu), memory_bytes: setup.memory_bytes };
                let options = ServiceOptions {
                    coordinator: Some(coordinator.clone()),
                    in_place: Some(InPlace { job: setup.job.clone(), rank }),
                    homes: home.as_ref().map(Home::homes).unwrap_or_default(),
                    ..ServiceOptions::default()
                };
                Some(runtime.block_on(outboard_attention_server::serve(&engine, options))?)
            }
        };
        let geometry = setup.model.validate()?;
        let options = JobOptions {
            min_servers: setup.min_servers,
            rates: setup.rates.map(Into::into),
            placement: setup.placement.map(Into::into),
            ..JobOptions::new(coordinator, setup.job.clone(), rank, setup.train.ranks, geometry)
        };
        let handler = in_place.as_ref().map(|service| Arc::new(service.engine()) as Arc<dyn TaskHandler>);
        let attention = PoolAttention::join(options, runtime.handle().clone(), handler, home)?;
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
        Some(pool) => submit(setup, pool, packing),
        None => Ok(()),
    };
    let mut next = packer.packing(0);
    submit(&next)?;
    for step in 0..setup.train.steps {
        let packing = next;
        next = packer.packing(step + 1);
        if next.step < setup.train.steps {
            submit(&next)?;
        }
        let batches = load(setup, pool, &packer, &packing)?;
        // The trainings take turns in going first, so that neither always has the warmer caches.
        if step % 2 == 1 {
            trainers.reverse();
        }
        for (mode, trainer) in &mut trainers {
            let batch = batches.get(mode).context("a training has no batch")?;
            let outcome = trainer.step(batch, exchange)?;
            let pool_step = match (*mode, pool) {
                (Mode::Pool, Some(pool)) => Some(finish(setup, pool, step, outcome.seconds)?),
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
                documents: batch.documents.iter().map(|document| document.rows.len()).collect(),
                documents_begun: batch.documents.iter().filter(|d| d.first_token == 0).count() as u64,
                dropped_bytes: packing.dropped_tokens,
                cells: cells(batch, setup.model.kv_heads),
                pool: pool_step,
            }))?;
        }
        if step % 2 == 1 {
            trainers.reverse();
        }
    }
    Ok(())
}

/// Submits a step: this rank's documents, or where the planner places tokens the first rank those of all.
fn submit(setup: &Setup, pool: &Pool, packing: &StepPacking) -> anyhow::Result<()> {
    let documents = match (setup.placement, setup.train.rank) {
        (None, rank) => documents::of_rank(packing, rank)?,
        (Some(_), 0) => documents::unplaced(packing)?,
        (Some(_), _) => Vec::new(),
    };
    Ok(pool.attention.submit_step(packing.step, documents)?)
}

/// What this rank trains on in each training of a step: the documents it is dealt, or what the plan has it hold of all
/// ranks' documents. Waits for the plan there.
fn load(
    setup: &Setup,
    pool: Option<&Pool>,
    packer: &Packer,
    packing: &StepPacking,
) -> anyhow::Result<BTreeMap<Mode, PackedBatch>> {
    let rank = setup.train.rank;
    let batch = |&mode: &Mode| {
        let batch = match (mode, pool, setup.placement) {
            (Mode::Pool, Some(pool), Some(_)) => {
                packer.load_ranges(packing, rank, &pool.attention.holdings(packing.step)?)?
            }
            _ => packer.load(packing, rank)?,
        };
        Ok((mode, batch))
    };
    setup.modes.iter().map(batch).collect()
}

/// Ends a pooled step and says what it took.
fn finish(setup: &Setup, pool: &Pool, step: u64, seconds: f64) -> anyhow::Result<PoolStep> {
    let layers = setup.model.layers as u64;
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
        bytes_predicted: layers
            .saturating_mul(stats.summary.forward_bytes.saturating_add(stats.summary.backward_bytes)),
        tokens_imbalance: stats.summary.tokens_imbalance,
        exposed_seconds: stats.exposed.as_secs_f64(),
        communication_seconds: stats.communication.as_secs_f64(),
        plan_seconds: stats.summary.plan_seconds,
    })
}

/// Causal cells of the rows that a rank holds, each counted once per kv head.
fn cells(batch: &PackedBatch, kv_heads: usize) -> u64 {
    let before = |n: usize| (n as u64) * (n as u64 + 1) / 2;
    let of_range = |tokens: Span| before(tokens.end()) - before(tokens.start());
    batch.documents.iter().map(|document| of_range(document.tokens())).sum::<u64>() * kv_heads as u64
}

#[cfg(test)]
mod tests {
    use outboard_attention::DocumentId;
    use outboard_worker::PackedDocument;

    use super::*;

    #[test]
    fn cells_are_those_of_the_rows_that_are_held() {
        let range = |first_token, row, rows, length| PackedDocument {
            id: DocumentId { rank: 0, index: 0 },
            rows: Span::at(row, rows),
            first_token,
            length,
        };
        let of = |documents: Vec<PackedDocument>| {
            let batch = PackedBatch {
                step: 0,
                following: vec![None; documents.len()],
                documents: documents.into(),
                tokens: vec![],
            };
            cells(&batch, 2)
        };
        assert_eq!(of(vec![range(0, 0, 4, 4)]), 2 * 10);
        assert_eq!(of(vec![range(3, 0, 2, 9), range(8, 2, 1, 9)]), 2 * (4 + 5 + 9));
        assert_eq!(of(vec![]), 0);
    }
}
