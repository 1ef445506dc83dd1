//! The profile of a GPU.

use std::time::Duration;

use anyhow::Context;
use outboard_attention::{Direction, Task};
use outboard_cuda::{CudaKernel, Repeats};

use super::{Axes, Grid, Profile, of_one_peak, rectangle, revision, working};
use crate::bench::kernel::args::geometry;
use crate::bench::kernel::cuda::{CudaSubject, median};
use crate::bench::kernel::show::Progress;

/// A batch holds as many equal tasks as make up these FLOPs, but no more than so many, of so many bytes of operands in all:
/// enough that no part of the device is idle for want of blocks.
const BATCH_FLOPS: f64 = 4e12;
const MOST_TASKS: usize = 512;
const MOST_BYTES: usize = 4 << 30;
/// The part of the device's memory for a batch that is used: what tasks share is counted with each of them.
const MEMORY: f64 = 0.9;
/// Query heads of the kv head, where they divide the rows.
const GROUP: usize = 4;

pub(super) fn profile(axes: &Axes, mut kernel: CudaKernel) -> anyhow::Result<Profile> {
    let progress = Progress::new(1 + axes.sizes())?;
    let dtype = axes.dtypes.first().copied().context("--dtype is empty")?;
    for &dtype in &axes.dtypes {
        CudaKernel::supports(&geometry(1, 1, 64, dtype)?)?;
    }
    progress.at("what a task costs besides its cells");
    let mut overhead = f64::INFINITY;
    for direction in [Direction::Forward, Direction::Backward] {
        let subject = CudaSubject::new(geometry(1, 1, 64, dtype)?, rectangle(1, 1)?)?;
        overhead = overhead.min(seconds(&mut kernel, &subject, direction, MOST_TASKS, axes.repeats)?);
    }
    overhead /= MOST_TASKS as f64;
    progress.step();

    let mut grids = Vec::new();
    for &dtype in &axes.dtypes {
        for &head_dim in &axes.head_dims {
            let mut of_head_dim = Grid::each(axes, dtype, head_dim);
            for &rows in &axes.rows {
                of_head_dim.iter_mut().for_each(|grid| grid.efficiency.push(Vec::new()));
                let group = if rows % GROUP == 0 { GROUP } else { 1 };
                for &keys in &axes.keys {
                    let subject = CudaSubject::new(
                        geometry(group, 1, head_dim, dtype)?,
                        rectangle(rows / group, keys)?,
                    )?;
                    for (grid, &direction) in of_head_dim.iter_mut().zip(&axes.directions) {
                        progress.at(format!(
                            "{direction} {dtype} head dim {head_dim}, {rows} rows x {keys} keys"
                        ));
                        let flops = subject.task.flops(&subject.geometry, direction);
                        let operands = operand_bytes(&subject.task, head_dim, group);
                        let bytes = kernel.task_bytes(&subject.geometry, direction, &subject.task)?;
                        let room = MEMORY * kernel.batch_bytes() as f64 / bytes.max(1) as f64;
                        let count = tasks(flops, operands, room as usize);
                        let took = seconds(&mut kernel, &subject, direction, count, axes.repeats)?;
                        let rate = flops * count as f64 / working(took, overhead * count as f64);
                        grid.efficiency.last_mut().context("a grid without rows")?.push(rate);
                        progress.step();
                    }
                }
            }
            grids.append(&mut of_head_dim);
        }
    }
    let peak = grids.iter().flat_map(|grid| grid.efficiency.iter().flatten()).copied().fold(0.0, f64::max);
    Ok(Profile {
        device: format!("cuda {}, cuDNN {}", kernel.device().name, kernel.cudnn_version()),
        kernel_revision: revision(&kernel.numerics_id(dtype)),
        peak_flops_per_second: peak.round(),
        grids: of_one_peak(vec![(1.0, scaled(grids, peak))]),
        task_overhead_seconds: overhead,
    })
}

/// Rates as fractions of the highest.
fn scaled(mut grids: Vec<Grid>, peak: f64) -> Vec<Grid> {
    for rate in grids.iter_mut().flat_map(|grid| grid.efficiency.iter_mut().flatten()) {
        *rate /= peak;
    }
    grids
}

/// Seconds that the kernels take for a batch of so many tasks.
fn seconds(
    kernel: &mut CudaKernel,
    subject: &CudaSubject,
    direction: Direction,
    count: usize,
    repeats: u32,
) -> anyhow::Result<f64> {
    let tasks = (0..count).map(|_| subject.task(direction)).collect::<anyhow::Result<_>>()?;
    let repeats = Repeats { times: repeats as usize, time: Duration::ZERO };
    Ok(median(&mut kernel.measure(tasks, repeats)?.kernel_seconds))
}

fn operand_bytes(task: &Task, head_dim: usize, group: usize) -> usize {
    2 * head_dim * 2 * (group * task.q().len() + task.kv().len())
}

/// Tasks of a batch, given FLOPs and bytes of operands of one, and how many of them the device has room for.
fn tasks(flops: f64, bytes: usize, room: usize) -> usize {
    let most = MOST_TASKS.min(MOST_BYTES / bytes.max(1)).min(room).max(1);
    ((BATCH_FLOPS / flops.max(1.0)).ceil() as usize).clamp(1, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_neither_too_short_nor_too_many() {
        let all = usize::MAX;
        assert_eq!(tasks(1e13, 1, all), 1);
        assert_eq!(tasks(1e12, 1, all), 4);
        assert_eq!(tasks(1.0, 1, all), MOST_TASKS);
        assert_eq!(tasks(1.0, MOST_BYTES / 3, all), 3);
        assert_eq!(tasks(1.0, all, all), 1);
        assert_eq!((tasks(1.0, 1, 7), tasks(1.0, 1, 0)), (7, 1));
    }
}
