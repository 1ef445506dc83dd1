//! The profile of a CPU.

use anyhow::Context;
use outboard_attention::kernel::{CpuKernel, Isa};
use outboard_attention::{DType, Direction};

use super::{Axes, Grid, Profile, of_one_peak, rectangle, revision, working};
use crate::bench::kernel::args::geometry;
use crate::bench::kernel::measure::{Cores, Device, Meter, measure};
use crate::bench::kernel::show::Progress;
use crate::bench::kernel::subject::{Batch, Subject};

/// A batch holds as many equal tasks as make up these FLOPs, but no more than so many for each thread.
const BATCH_FLOPS: f64 = 1e9;
const MOST_TASKS: usize = 512;
/// Tasks for each thread in the batch that measures what a task costs besides its cells, and their head dim.
const TINY_TASKS: usize = 2048;
const TINY_HEAD_DIM: usize = 64;

pub(super) fn profile(axes: &Axes, isa: Isa, threads: Option<usize>) -> anyhow::Result<Profile> {
    let cores = Cores::claim()?;
    let device = cores.device(isa, threads.unwrap_or(cores.count()))?;
    let mut kernel = device.kernel()?;
    let progress = Progress::new(1 + axes.sizes())?;
    progress.at("what a task costs besides its cells");
    let overhead = task_overhead(&device, &mut kernel, axes.repeats)?;
    progress.step();

    let mut measured = Vec::new();
    for &dtype in &axes.dtypes {
        let mut meter = Meter::new(&device, dtype);
        let mut grids = Vec::new();
        for &head_dim in &axes.head_dims {
            let mut of_head_dim = Grid::each(axes, dtype, head_dim);
            for &rows in &axes.rows {
                of_head_dim.iter_mut().for_each(|grid| grid.efficiency.push(Vec::new()));
                for &keys in &axes.keys {
                    let subject =
                        Subject::new(&mut kernel, geometry(1, 1, head_dim, dtype)?, rectangle(rows, keys)?)?;
                    for (grid, &direction) in of_head_dim.iter_mut().zip(&axes.directions) {
                        progress.at(format!(
                            "{direction} {dtype} head dim {head_dim}, {rows} rows x {keys} keys"
                        ));
                        let fraction =
                            fraction(&mut kernel, &mut meter, &subject, direction, axes.repeats, overhead)?;
                        grid.efficiency.last_mut().context("a grid without rows")?.push(fraction);
                        progress.step();
                    }
                }
            }
            grids.append(&mut of_head_dim);
        }
        measured.push((meter.median_peak(), grids));
    }
    Ok(Profile {
        device: format!("cpu {isa} {} threads", device.threads),
        kernel_revision: revision(&kernel.numerics_id(DType::F32)),
        peak_flops_per_second: measured.iter().map(|(peak, _)| *peak).fold(0.0, f64::max).round(),
        grids: of_one_peak(measured),
        task_overhead_seconds: overhead,
    })
}

/// Seconds of the device for each of many tasks of one cell, in the cheaper direction: those of a thread, over the number of
/// threads.
fn task_overhead(device: &Device, kernel: &mut CpuKernel, repeats: u32) -> anyhow::Result<f64> {
    let mut meter = Meter::new(device, DType::F32);
    let subject = Subject::new(kernel, geometry(1, 1, TINY_HEAD_DIM, DType::F32)?, rectangle(1, 1)?)?;
    let count = TINY_TASKS * device.threads;
    let batch = |direction| Batch::new(direction, std::iter::repeat_n(&subject, count));
    let mut batches = [batch(Direction::Forward), batch(Direction::Backward)];
    let figures = measure(kernel, &mut meter, repeats, &mut batches)?;
    let cheapest = figures.iter().map(|figures| figures.took.cpu).fold(f64::INFINITY, f64::min);
    Ok(cheapest / count as f64)
}

/// The fraction of the element type's peak that tasks like `subject` reach, besides what each task costs as such.
fn fraction(
    kernel: &mut CpuKernel,
    meter: &mut Meter,
    subject: &Subject,
    direction: Direction,
    repeats: u32,
    overhead: f64,
) -> anyhow::Result<f64> {
    let threads = meter.device.threads;
    let flops = subject.task.flops(&subject.geometry, direction);
    let count = tasks_for_each_thread(flops * threads as f64) * threads;
    let mut batch = [Batch::new(direction, std::iter::repeat_n(subject, count))];
    let figures = measure(kernel, meter, repeats, &mut batch)?.pop().context("nothing was measured")?;
    Ok(figures.fraction * figures.took.cpu / working(figures.took.cpu, overhead * count as f64))
}

/// Tasks for each thread in a batch, given the FLOPs of one on each.
fn tasks_for_each_thread(flops: f64) -> usize {
    ((BATCH_FLOPS / flops.max(1.0)).ceil() as usize).clamp(1, MOST_TASKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_neither_too_short_nor_too_many() {
        assert_eq!(tasks_for_each_thread(1e10), 1);
        assert_eq!(tasks_for_each_thread(1e8), 10);
        assert_eq!(tasks_for_each_thread(0.0), MOST_TASKS);
    }
}
