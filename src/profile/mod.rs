//! `outboard profile`: measures how much of its peak a device reaches on tasks of each size, for the cost model.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod file;

use std::path::PathBuf;

use anyhow::ensure;
use outboard_attention::kernel::Isa;
use outboard_attention::{BandSlice, DType, Direction, DocumentId, MAX_TOKENS, Mask, MaskPart, Span, Task};

use crate::bench::kernel::args::{direction, isa};
use crate::bench::kernel::show::rounded;
use crate::cuda::CudaArgs;
use crate::device::Device;
use file::{Grid, Profile, write};

pub(crate) use file::read;

/// Arguments of `outboard profile`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File to write; `-` is standard output.
    #[arg(short, long, value_name = "PROFILE.json", default_value = "-")]
    out: PathBuf,
    /// What is measured: cpu, or cuda:N.
    #[arg(long, default_value_t)]
    device: Device,
    /// With --device cpu: threads, each with a core of its own [default: one a core].
    #[arg(long)]
    threads: Option<usize>,
    /// With --device cpu: instruction set, portable, avx2, avx512 or avx512-bf16 [default: the best of this machine].
    #[arg(long, value_name = "SET")]
    simd: Option<Isa>,
    /// Directions to measure: forward or backward.
    #[arg(long, value_delimiter = ',', value_parser = direction, default_value = "forward,backward")]
    directions: Vec<Direction>,
    /// Element types of Q, K, V and dO: f32, bf16 or f16 [default: f32,bf16, or bf16 on a GPU].
    #[arg(long, value_delimiter = ',')]
    dtype: Vec<DType>,
    /// Elements of a head of Q, K and V.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128])]
    head_dim: Vec<usize>,
    /// Rows of a task: its queries times the query heads that share a kv head.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128, 1024, 8192])]
    rows: Vec<usize>,
    /// Keys of a task [default: 128,1024,16384, and 131072 on a GPU].
    #[arg(long, value_delimiter = ',')]
    keys: Vec<usize>,
    /// Measurements of each size; the median is taken.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    #[command(flatten)]
    cuda: CudaArgs,
}

/// The least that is written.
const LEAST_EFFICIENCY: f64 = 1e-5;

/// What is measured, and at which sizes.
struct Axes {
    directions: Vec<Direction>,
    dtypes: Vec<DType>,
    head_dims: Vec<usize>,
    rows: Vec<usize>,
    keys: Vec<usize>,
    repeats: u32,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let or = |asked: Vec<usize>, default: &[usize]| if asked.is_empty() { default.to_vec() } else { asked };
    let is_cpu = args.device == Device::Cpu;
    let dtypes = match (args.dtype.is_empty(), is_cpu) {
        (false, _) => args.dtype,
        (true, true) => vec![DType::F32, DType::Bf16],
        (true, false) => vec![DType::Bf16],
    };
    let keys: &[usize] = if is_cpu { &[128, 1024, 16384] } else { &[128, 1024, 16384, 131_072] };
    let axes = Axes {
        directions: args.directions,
        dtypes,
        head_dims: args.head_dim,
        rows: axis("--rows", &args.rows)?,
        keys: axis("--keys", &or(args.keys, keys))?,
        repeats: args.repeats,
    };
    let profile = match args.device {
        Device::Cpu => cpu::profile(&axes, isa(args.simd)?, args.threads)?,
        #[cfg(feature = "cuda")]
        Device::Cuda(number) => cuda::profile(&axes, args.cuda.open(number)?)?,
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(number) => return Err(crate::cuda::absent(Device::Cuda(number))),
    };
    write(&args.out, &profile)
}

impl Axes {
    fn sizes(&self) -> usize {
        let Axes { directions, dtypes, head_dims, rows, keys, .. } = self;
        directions.len() * dtypes.len() * head_dims.len() * rows.len() * keys.len()
    }
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
                // Whoever reads a profile divides by it.
                *efficiency = rounded((*efficiency * peak / highest).min(1.0), 5).max(LEAST_EFFICIENCY);
            }
            all.push(grid);
        }
    }
    all
}

/// The kernel's revision, as the end of a numerics id has it.
fn revision(numerics_id: &str) -> String {
    numerics_id.rsplit_once("-r").map_or(numerics_id, |(_, revision)| revision).to_owned()
}

impl Grid {
    /// One for each direction, with no rows yet.
    fn each(axes: &Axes, dtype: DType, head_dim: usize) -> Vec<Grid> {
        let grid = |direction: &Direction| Grid::new(*direction, dtype, head_dim, &axes.rows, &axes.keys);
        axes.directions.iter().map(grid).collect()
    }

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
        assert!(of_one_peak(vec![(1e9, vec![grid(1e-9)])])[0].efficiency[0][0] > 0.0);
    }
}
