//! `outboard compute`: computes a batch of tasks that is stored in files.
//!
//! It is for checking one backend against another, or against a program that knows nothing of this one, and for
//! computing again what came out wrong. A folder holds batch.json and, for a task named `t0`, `t0.q`, `t0.k` and `t0.v`,
//! for backward also `t0.d_o`, `t0.lse` and `t0.d`. Results are written beside them: `t0.o` and `t0.lse_out`, or `t0.dq`,
//! `t0.dk` and `t0.dv`. Nothing is written unless every task was computed.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use outboard_attention::kernel::{KernelTask, Results};

mod args;
mod backend;
mod files;
mod show;
mod tensors;

pub(crate) use args::Args;
use backend::{Backend, CpuOptions};
use files::{BATCH_FILE, Entry};
use tensors::Inputs;

use crate::device::Device;

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { dir, device, threads, isa, alone, json, cuda } = args;
    ensure!(
        device == Device::Cpu || (threads.is_none() && isa.is_none()),
        "--threads and --isa are for --device cpu, and --device is {device}"
    );
    let entries = files::read(&dir)?;
    fits(&entries)?;
    let mut backend = backend::open(device, CpuOptions { threads, isa }, &cuda)?;
    let inputs = entries.iter().map(|entry| Inputs::read(&dir, entry)).collect::<anyhow::Result<Vec<_>>>()?;
    let tasks: Vec<_> = entries.iter().zip(&inputs).collect();
    let batch_of = if alone { 1 } else { tasks.len().max(1) };
    let (mut took, mut results) = (Duration::ZERO, Vec::with_capacity(tasks.len()));
    for batch in tasks.chunks(batch_of) {
        let (mut batch_results, seconds) = compute(backend.as_mut(), batch).with_context(|| match batch {
            [(entry, _)] => format!("task {} of {}", entry.name, dir.display()),
            _ => format!("{} (tasks count from 0, as in {BATCH_FILE})", dir.display()),
        })?;
        results.append(&mut batch_results);
        took += seconds;
    }
    for (entry, results) in entries.iter().zip(&results) {
        tensors::write(&dir, entry, results)?;
    }
    show::show(json, &entries, backend.as_ref(), (tasks.len().div_ceil(batch_of), took))
}

/// Computes tasks as one batch, and says how long that took.
fn compute(
    backend: &mut dyn Backend,
    batch: &[(&Entry, &Inputs)],
) -> anyhow::Result<(Vec<Results>, Duration)> {
    let mut tasks = Vec::with_capacity(batch.len());
    for &(entry, inputs) in batch {
        let Entry { direction, geometry, task, .. } = entry;
        let results = Results::zeroed(task, geometry, *direction);
        tasks.push(KernelTask { geometry: *geometry, task, operands: inputs.operands(entry)?, results });
    }
    let start = Instant::now();
    let results = backend.run(tasks)?;
    Ok((results, start.elapsed()))
}

/// Refuses what this machine has no memory for.
fn fits(entries: &[Entry]) -> anyhow::Result<()> {
    let needed: u128 = entries.iter().map(tensors::bytes).sum();
    let system = rustix::system::sysinfo();
    let present = u128::from(system.totalram) * u128::from(system.mem_unit.max(1));
    let gib = |bytes: u128| bytes as f64 / (1u64 << 30) as f64;
    ensure!(
        needed <= present,
        "the tasks' tensors and results take {:.1} GiB, and this machine has {:.1} GiB of memory; use fewer or smaller \
         tasks",
        gib(needed),
        gib(present)
    );
    Ok(())
}
