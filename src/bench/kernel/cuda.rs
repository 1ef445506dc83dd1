//! `outboard bench kernel --device cuda:N`: the speed of a GPU's kernels, and of the way in and out.
//!
//! Kernel times are those of a whole batch on the device: moving tasks into the order of sequences, cuDNN's calls, and
//! merging. Batches are in pinned memory, and uploaded and downloaded each time while others are computed.

use std::time::Duration;

use anyhow::{Context, ensure};
use half::{bf16, f16};
use outboard_attention::kernel::{KernelTask, Operands, Results};
use outboard_attention::{
    AnyTensor, DType, Direction, DocumentId, Element, HeadGeometry, Mask, Span, Task, TensorView,
};
use outboard_cuda::{CudaKernel, Measured, Repeats};
use outboard_simulator::Random;
use serde::Serialize;

use super::args::{self, Args};
use super::show::{Output, Progress, table};

/// Times at least, and for so long: a device that has just woken is not what a pool of busy ones is.
const REPEATS: Repeats = Repeats { times: 7, time: Duration::from_millis(600) };

/// A task with its tensors.
pub(crate) struct CudaSubject {
    pub(crate) geometry: HeadGeometry,
    pub(crate) task: Task,
    tensors: Tensors,
    lse: Vec<f32>,
    d: Vec<f32>,
}

enum Tensors {
    Bf16([Vec<bf16>; 4]),
    F16([Vec<f16>; 4]),
}

/// One measured batch; the field names are those of the JSON lines.
#[derive(Debug, Serialize)]
struct Row {
    kind: &'static str,
    case: String,
    device: String,
    cudnn: String,
    numerics_id: String,
    direction: String,
    dtype: String,
    mask: String,
    n_q: usize,
    n_kv: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Useful work by the kernels' time, median.
    tflops: f64,
    /// Of all kernels of a batch, median.
    ms: f64,
    /// From the start of a batch to that of the next, transfers included, mean.
    wall_ms: f64,
    /// Part of the time that kernels ran.
    busy: f64,
    /// Of the kernels before cuDNN's, of cuDNN's, and of those after, medians of a few batches more.
    part_ms: [f64; 3],
    /// Of the host, to lay a batch out, look its plans up and write its tables, median.
    prepare_us: f64,
    /// Of the host, to enqueue it, median.
    enqueue_us: f64,
    /// From the start of a batch's upload to the ends of upload, kernels and download, of the last of these.
    way_ms: [f64; 3],
}

/// What the way in and out carries, in bytes a second.
#[derive(Debug, Serialize)]
struct Way {
    kind: &'static str,
    up: f64,
    down: f64,
    both: f64,
}

pub(super) fn run(args: &Args, device: usize, output: &mut Output) -> anyhow::Result<()> {
    let mut kernel = args.cuda.open(device)?;
    if args.suite {
        return suite(args, &mut kernel, output);
    }
    let dtypes: Vec<DType> = args.dtype.iter().copied().filter(|dtype| *dtype != DType::F32).collect();
    ensure!(!dtypes.is_empty(), "a GPU computes bf16 and f16; name them with --dtype");
    let shapes = args.head_dim.len() * args.tokens.len() * args.directions.len();
    let progress = Progress::new(dtypes.len() * shapes)?;
    let mut rows = Vec::new();
    for &dtype in &dtypes {
        for &head_dim in &args.head_dim {
            for &tokens in &args.tokens {
                let geometry = args.geometry(head_dim, dtype)?;
                let queries = args.queries.unwrap_or(tokens);
                let task = args.mask.task(tokens, queries, geometry.kv_heads())?;
                progress.at(format!("{queries} x {tokens}, {dtype}, head dim {head_dim}"));
                let subject = CudaSubject::new(geometry, task)?;
                for &direction in &args.directions {
                    let case = Case {
                        name: format!("{queries} x {tokens}"),
                        mask: args.mask.to_string(),
                        direction,
                    };
                    let row = measure(&mut kernel, &case, std::slice::from_ref(&subject), repeats(args))?;
                    output.write(&row)?;
                    rows.push(row);
                    progress.step();
                }
            }
        }
    }
    drop(progress);
    show(&kernel, &rows, output)
}

/// What a row is called.
struct Case {
    name: String,
    mask: String,
    direction: Direction,
}

fn repeats(args: &Args) -> Repeats {
    args.repeats.map_or(REPEATS, |n| Repeats { times: n as usize, time: Duration::ZERO })
}

/// The rows that the backend has targets for.
fn suite(args: &Args, kernel: &mut CudaKernel, output: &mut Output) -> anyhow::Result<()> {
    let geometry = args::geometry(32, 8, 128, DType::Bf16)?;
    let causal = |rows: usize, keys: usize, document: u32| -> anyhow::Result<CudaSubject> {
        let (q, kv, heads) = (Span::at(keys - rows, rows), Span::to(keys), Span::to(8));
        let document = DocumentId { rank: 0, index: document };
        CudaSubject::new(geometry, Task::new(document, q, kv, heads, &Mask::causal(keys, 8))?)
    };
    let mixed = mixed_lengths();
    // Each query sees its own key and those before it.
    let cells: usize = mixed.iter().map(|(rows, keys)| rows * keys - rows * (rows - 1) / 2).sum();
    let as_one = ((2 * cells) as f64).sqrt() as usize;
    let one = |rows: usize, keys: usize| vec![(rows, keys)];
    // The largest first: memory that has grown is kept, and pinned memory takes long to get.
    let batches = [
        ("64k causal", one(64 << 10, 64 << 10)),
        ("32k causal", one(32 << 10, 32 << 10)),
        ("16k causal", one(16 << 10, 16 << 10)),
        ("mixed shards", mixed),
        ("their work as one", one(as_one, as_one)),
        ("128 x 128k", one(128, 128 << 10)),
        ("one small task", one(128, 1024)),
    ];
    let carried = kernel.measure_transfers(512 << 20)?;
    let way = Way { kind: "transfers", up: carried.up, down: carried.down, both: carried.both };
    output.write(&way)?;
    let gigabytes = [way.up, way.down, way.both].map(|rate| format!("{:.1}", rate / 1e9));
    output.say(&format!(
        "pinned memory: up {} GB/s, down {}, both at once {}",
        gigabytes[0], gigabytes[1], gigabytes[2]
    ))?;
    let mut rows = Vec::new();
    let wanted = |name: &str| args.only.as_ref().is_none_or(|text| name.contains(text.as_str()));
    for (name, lengths) in batches.iter().filter(|(name, _)| wanted(name)) {
        let subjects = lengths.iter().zip(0..).map(|(&(rows, keys), n)| causal(rows, keys, n));
        let subjects = subjects.collect::<anyhow::Result<Vec<_>>>()?;
        for direction in [Direction::Forward, Direction::Backward] {
            let case = Case { name: (*name).to_owned(), mask: "causal".to_owned(), direction };
            let row = measure(kernel, &case, &subjects, repeats(args))?;
            output.write(&row)?;
            rows.push(row);
        }
    }
    show(kernel, &rows, output)
}

/// Shards of 128 to 8192 queries with 1k to 256k keys, the same in every run.
fn mixed_lengths() -> Vec<(usize, usize)> {
    let mut noise = Random::new(9);
    (0..12)
        .map(|_| {
            let rows = 128usize << (noise.bits() % 7);
            (rows, (rows.max(1024) << (noise.bits() % 9)).min(256 << 10))
        })
        .collect()
}

fn measure(
    kernel: &mut CudaKernel,
    case: &Case,
    subjects: &[CudaSubject],
    repeats: Repeats,
) -> anyhow::Result<Row> {
    let first = subjects.first().context("nothing is measured")?;
    let tasks = subjects.iter().map(|subject| subject.task(case.direction)).collect::<anyhow::Result<_>>()?;
    let Measured {
        seconds,
        mut kernel_seconds,
        part_seconds,
        mut prepare_seconds,
        mut enqueue_seconds,
        way_seconds,
    } = kernel.measure(tasks, repeats)?;
    let part = |n: usize| median(&mut part_seconds.iter().map(|parts| parts[n]).collect::<Vec<_>>());
    let flops: f64 = subjects.iter().map(|s| s.task.flops(&s.geometry, case.direction)).sum();
    let busy = kernel_seconds.iter().sum::<f64>() / seconds;
    let typical = median(&mut kernel_seconds);
    let most = |len: fn(&Task) -> usize| subjects.iter().map(|s| len(&s.task)).max().unwrap_or(0);
    let geometry = &first.geometry;
    Ok(Row {
        kind: "measurement",
        case: case.name.clone(),
        device: kernel.device().name.clone(),
        cudnn: kernel.cudnn_version().to_owned(),
        numerics_id: kernel.numerics_id(geometry.dtype()),
        direction: case.direction.to_string(),
        dtype: geometry.dtype().to_string(),
        mask: case.mask.clone(),
        n_q: most(|task| task.q().len()),
        n_kv: most(|task| task.kv().len()),
        q_heads: geometry.q_heads(),
        kv_heads: geometry.kv_heads(),
        head_dim: geometry.head_dim(),
        tflops: flops / typical / 1e12,
        ms: typical * 1e3,
        wall_ms: seconds / kernel_seconds.len().max(1) as f64 * 1e3,
        busy,
        part_ms: [0, 1, 2].map(|n| part(n) * 1e3),
        prepare_us: median(&mut prepare_seconds) * 1e6,
        enqueue_us: median(&mut enqueue_seconds) * 1e6,
        way_ms: way_seconds.last().copied().unwrap_or_default().map(|seconds| seconds * 1e3),
    })
}

/// The middle of some values, which are put in order; NaN of none.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn show(kernel: &CudaKernel, rows: &[Row], output: &Output) -> anyhow::Result<()> {
    output.say(&format!(
        "{}, cuDNN {}, backward sums {}",
        kernel.device(),
        kernel.cudnn_version(),
        if kernel.is_deterministic() { "in a fixed order" } else { "by atomics" }
    ))?;
    let header = [
        "case",
        "direction",
        "dtype",
        "heads",
        "dim",
        "TFLOP/s",
        "kernels ms",
        "wall ms",
        "busy",
        "host us",
        "before, cuDNN, after ms",
        "up, kernels, down ms",
    ];
    let mut table = table(header, 3);
    for row in rows {
        table.add_row([
            row.case.clone(),
            row.direction.clone(),
            row.dtype.clone(),
            format!("{}/{}", row.q_heads, row.kv_heads),
            row.head_dim.to_string(),
            format!("{:.0}", row.tflops),
            format!("{:.3}", row.ms),
            format!("{:.3}", row.wall_ms),
            format!("{:.2}", row.busy),
            format!("{:.0} + {:.0}", row.prepare_us, row.enqueue_us),
            row.part_ms.map(|ms| format!("{ms:.2}")).join(" "),
            row.way_ms.map(|ms| format!("{ms:.1}")).join(" "),
        ]);
    }
    output.say(&table.to_string())
}

impl CudaSubject {
    pub(crate) fn new(geometry: HeadGeometry, task: Task) -> anyhow::Result<CudaSubject> {
        let shapes = task.shapes(&geometry);
        let lens = [shapes.q, shapes.k, shapes.v, shapes.o].map(|shape| shape.iter().product::<usize>());
        let tensors = match geometry.dtype() {
            DType::Bf16 => Tensors::Bf16(lens.map(noise)),
            DType::F16 => Tensors::F16(lens.map(noise)),
            other => anyhow::bail!("a GPU computes bf16 and f16, not {other}"),
        };
        // About the LSE of keys of noise, so that weights are what they would be. All heads have one mask.
        let keys = |row: usize| -> usize {
            let slices = task.mask().slices_of(task.kv_heads().start());
            slices.map(|slice| slice.keys_of(task.q().start() + row).len()).sum()
        };
        let lse = (0..shapes.row[0])
            .flat_map(|row| std::iter::repeat_n((keys(row).max(1) as f32).ln() + 0.5, shapes.row[1]))
            .collect();
        let d = vec![0.0; shapes.row.iter().product()];
        Ok(CudaSubject { geometry, task, tensors, lse, d })
    }

    pub(crate) fn task(&self, direction: Direction) -> anyhow::Result<KernelTask<'_>> {
        fn views<E: Element>(
            data: &[Vec<E>; 4],
            shapes: [[usize; 3]; 4],
        ) -> anyhow::Result<[AnyTensor<'_>; 4]> {
            let view = |i: usize| TensorView::contiguous("tensor", &data[i], shapes[i]).map(E::erase);
            Ok([view(0)?, view(1)?, view(2)?, view(3)?])
        }
        let shapes = self.task.shapes(&self.geometry);
        let all = [shapes.q, shapes.k, shapes.v, shapes.o];
        let [q, k, v, d_o] = match &self.tensors {
            Tensors::Bf16(data) => views(data, all)?,
            Tensors::F16(data) => views(data, all)?,
        };
        let row = |data| TensorView::contiguous("row", data, shapes.row);
        let operands = match direction {
            Direction::Forward => Operands::Forward { q: q.into(), k, v },
            Direction::Backward => {
                Operands::Backward { q, k, v, d_o: d_o.into(), lse: row(&self.lse)?, d: row(&self.d)? }
            }
        };
        let results = Results::zeroed(&self.task, &self.geometry, direction);
        Ok(KernelTask { geometry: self.geometry, task: &self.task, operands, results })
    }
}

/// About normal noise. A million values are drawn and repeated: drawing all would take longer than measuring.
fn noise<E: Element>(len: usize) -> Vec<E> {
    const DRAWN: usize = 1 << 20;
    let mut noise = Random::new(len as u64);
    let mut value = || (0..4).map(|_| 2.0 * noise.unit() - 1.0).sum::<f64>() * 0.87;
    let drawn: Vec<E> = (0..DRAWN.min(len)).map(|_| E::from_f32(value() as f32)).collect();
    let mut all = Vec::with_capacity(len);
    while all.len() < len {
        // Not from the start each time, so that rows do not repeat at powers of two.
        let from = (all.len() / DRAWN * 1237) % drawn.len();
        let part = &drawn[from..];
        all.extend_from_slice(&part[..part.len().min(len - all.len())]);
    }
    all
}
