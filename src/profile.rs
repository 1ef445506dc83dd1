//! `outboard profile`: measures how much of its peak this machine reaches on tasks of each size, for the cost model.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use outboard_attention::kernel::{CpuKernel, Isa};
use outboard_attention::{BandSlice, DType, Direction, DocumentId, MAX_TOKENS, Mask, MaskPart, Span, Task};
use serde::Serialize;

use crate::bench::kernel::args::{direction, geometry, isa};
use crate::bench::kernel::measure::{Cores, Device, Meter, measure};
use crate::bench::kernel::show::{Progress, rounded};
use crate::bench::kernel::subject::{Batch, Subject};

/// A batch holds as many equal tasks as make up these FLOPs, but no more than so many for each thread.
const BATCH_FLOPS: f64 = 1e9;
const MOST_TASKS: usize = 512;
/// Tasks for each thread in the batch that measures what a task costs besides its cells, and their head dim.
const TINY_TASKS: usize = 2048;
const TINY_HEAD_DIM: usize = 64;

/// Arguments of `outboard profile`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File to write; `-` is standard output.
    #[arg(short, long, value_name = "PROFILE.json", default_value = "-")]
    out: PathBuf,
    /// Threads, each with a core of its own [default: one a core].
    #[arg(long)]
    threads: Option<usize>,
    /// Instruction set: portable, avx2, avx512 or avx512-bf16 [default: the best of this machine].
    #[arg(long, value_name = "SET")]
    simd: Option<Isa>,
    /// Directions to measure: forward or backward.
    #[arg(long, value_delimiter = ',', value_parser = direction, default_value = "forward,backward")]
    directions: Vec<Direction>,
    /// Element types of Q, K, V and dO: f32, bf16 or f16.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtype: Vec<DType>,
    /// Elements of a head of Q, K and V.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128])]
    head_dim: Vec<usize>,
    /// Rows of a task: its queries times the query heads that share a kv head.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128, 1024, 8192])]
    rows: Vec<usize>,
    /// Keys of a task.
    #[arg(long, value_delimiter = ',', default_values_t = [128, 1024, 16384])]
    keys: Vec<usize>,
    /// Measurements of each size; the median is taken.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

/// What is written. A task takes `flops / (peak_flops_per_second * efficiency) + task_overhead_seconds`.
#[derive(Debug, Serialize)]
struct Profile {
    device: String,
    kernel_revision: String,
    /// Of all threads, by the element type that has the highest: efficiencies of all are fractions of it.
    peak_flops_per_second: f64,
    grids: Vec<Grid>,
    /// Of the device: what a task of one cell costs a thread in the cheaper direction, over the number of threads.
    task_overhead_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Grid {
    direction: String,
    dtype: String,
    head_dim: usize,
    rows: Vec<usize>,
    keys: Vec<usize>,
    /// For each number of rows, one for each of keys.
    efficiency: Vec<Vec<f64>>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let isa = isa(args.simd)?;
    let cores = Cores::claim()?;
    let device = cores.device(isa, args.threads.unwrap_or(cores.count()))?;
    let (rows, keys) = (axis("--rows", &args.rows)?, axis("--keys", &args.keys)?);
    let mut kernel = device.kernel()?;
    let sizes = args.head_dim.len() * rows.len() * keys.len() * args.directions.len();
    let progress = Progress::new(1 + args.dtype.len() * sizes)?;
    progress.at("what a task costs besides its cells");
    let overhead = task_overhead(&device, &mut kernel, args.repeats)?;
    progress.step();

    let mut measured = Vec::new();
    for &dtype in &args.dtype {
        let mut meter = Meter::new(&device, dtype);
        let mut grids = Vec::new();
        for &head_dim in &args.head_dim {
            let mut of_head_dim: Vec<_> = args
                .directions
                .iter()
                .map(|direction| Grid::new(*direction, dtype, head_dim, &rows, &keys))
                .collect();
            for &rows in &rows {
                of_head_dim.iter_mut().for_each(|grid| grid.efficiency.push(Vec::new()));
                for &keys in &keys {
                    let subject =
                        Subject::new(&mut kernel, geometry(1, 1, head_dim, dtype)?, rectangle(rows, keys)?)?;
                    for (grid, &direction) in of_head_dim.iter_mut().zip(&args.directions) {
                        progress.at(format!(
                            "{direction} {dtype} head dim {head_dim}, {rows} rows x {keys} keys"
                        ));
                        let fraction =
                            fraction(&mut kernel, &mut meter, &subject, direction, args.repeats, overhead)?;
                        grid.efficiency.last_mut().context("a grid without rows")?.push(fraction);
                        progress.step();
                    }
                }
            }
            grids.append(&mut of_head_dim);
        }
        measured.push((meter.median_peak(), grids));
    }
    drop(progress);

    let profile = Profile {
        device: format!("cpu {isa} {} threads", device.threads),
        kernel_revision: revision(&kernel),
        peak_flops_per_second: measured.iter().map(|(peak, _)| *peak).fold(0.0, f64::max).round(),
        grids: of_one_peak(measured),
        task_overhead_seconds: overhead,
    };
    write(&args.out, &profile)
}

/// The values of an axis in ascending order, each once.
fn axis(option: &str, values: &[usize]) -> anyhow::Result<Vec<usize>> {
    let mut values = values.to_vec();
    values.sort_unstable();
    values.dedup();
    for value in &values {
        ensure!((1..=MAX_TOKENS).contains(value), "{option} {value} must be from 1 to {MAX_TOKENS}");
    }
    Ok(values)
}

/// A task all of whose cells count.
fn rectangle(rows: usize, keys: usize) -> anyhow::Result<Task> {
    let (rows, keys, kv_heads) = (Span::to(rows), Span::to(keys), Span::to(1));
    let mask = Mask::new(vec![MaskPart { kv_heads, slice: BandSlice::new(rows, keys, None, None)? }])?;
    Ok(Task::new(DocumentId { rank: 0, index: 0 }, rows, keys, kv_heads, &mask)?)
}

/// Seconds of the device for each of many tasks of one cell, in the cheaper direction.
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

/// Of `seconds`, those left without `overhead`: never less than half, since tiny tasks are little but overhead, of which
/// the difference would be noise.
fn working(seconds: f64, overhead: f64) -> f64 {
    (seconds - overhead).max(0.5 * seconds)
}

/// Grids in fractions of the highest of their peaks.
fn of_one_peak(measured: Vec<(f64, Vec<Grid>)>) -> Vec<Grid> {
    let highest = measured.iter().map(|(peak, _)| *peak).fold(0.0, f64::max);
    let mut all = Vec::new();
    for (peak, grids) in measured {
        for mut grid in grids {
            for efficiency in grid.efficiency.iter_mut().flatten() {
                *efficiency = rounded((*efficiency * peak / highest).min(1.0), 5);
            }
            all.push(grid);
        }
    }
    all
}

/// The kernel's revision, as the end of its numerics id has it.
fn revision(kernel: &CpuKernel) -> String {
    let id = kernel.numerics_id(DType::F32);
    id.rsplit_once("-r").map_or_else(|| id.clone(), |(_, revision)| revision.to_owned())
}

fn write(out: &Path, profile: &Profile) -> anyhow::Result<()> {
    let mut json = serde_json::to_vec(profile).context("cannot encode the profile")?;
    json.push(b'\n');
    if out != Path::new("-") {
        return std::fs::write(out, json).with_context(|| format!("cannot write {}", out.display()));
    }
    match std::io::stdout().write_all(&json) {
        // Whoever read the profile has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("cannot write the profile to standard output"),
    }
}

impl Grid {
    fn new(direction: Direction, dtype: DType, head_dim: usize, rows: &[usize], keys: &[usize]) -> Grid {
        let (direction, dtype) = (direction.to_string(), dtype.to_string());
        let efficiency = Vec::with_capacity(rows.len());
        Grid { direction, dtype, head_dim, rows: rows.to_vec(), keys: keys.to_vec(), efficiency }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_ascends() {
        assert_eq!(axis("--rows", &[128, 16, 128]).unwrap(), [16, 128]);
        let message = axis("--keys", &[16, 0]).unwrap_err().to_string();
        assert!(message.contains("--keys 0"), "{message}");
    }

    #[test]
    fn every_cell_of_a_rectangle_counts() {
        assert_eq!(rectangle(5, 3).unwrap().cells(), 15);
    }

    #[test]
    fn batches_are_neither_too_short_nor_too_many() {
        assert_eq!(tasks_for_each_thread(1e10), 1);
        assert_eq!(tasks_for_each_thread(1e8), 10);
        assert_eq!(tasks_for_each_thread(0.0), MOST_TASKS);
    }

    #[test]
    fn overhead_is_taken_off_in_bounds() {
        assert_eq!(working(1.0, 0.25), 0.75);
        assert_eq!(working(1.0, 0.9), 0.5);
    }

    #[test]
    fn efficiencies_are_of_the_highest_peak() {
        let grid = |efficiency| {
            let mut grid = Grid::new(Direction::Forward, DType::F32, 64, &[1], &[1]);
            grid.efficiency = vec![vec![efficiency]];
            grid
        };
        let grids = of_one_peak(vec![(1e9, vec![grid(0.8)]), (2e9, vec![grid(0.6)])]);
        let efficiencies: Vec<_> = grids.iter().map(|grid| grid.efficiency[0][0]).collect();
        assert_eq!(efficiencies, [0.4, 0.6]);
    }
}
