//! `outboard bench kernel`: the CPU kernel's speed against the peak of this machine's multiply-adds.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, ensure};
use comfy_table::{CellAlignment, Table, presets};
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, KernelTask, Operands, Results, peak_loop};
use outboard_attention::merge::row_dots;
use outboard_attention::{
    BandSlice, DType, Direction, DocumentId, HeadGeometry, Mask, MaskPart, Span, Task, TaskShapes, TensorView,
};
use serde::Serialize;

/// Seconds of one run of the multiply-add loop.
const PEAK_SECONDS: f64 = 0.02;

/// Arguments of `outboard bench kernel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Tokens of the one document, as many queries as keys.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 4096])]
    tokens: Vec<usize>,
    /// Query heads.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key/value heads, a divisor of --heads [default: as many as --heads].
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Elements of a head of Q, K and V.
    #[arg(long, value_delimiter = ',', default_values_t = [32, 64, 128])]
    head_dim: Vec<usize>,
    /// Threads [default: one, and one a core].
    #[arg(long, value_delimiter = ',')]
    threads: Vec<usize>,
    /// Instruction set: portable, avx2 or avx512 [default: the best of this machine].
    #[arg(long)]
    isa: Option<Isa>,
    /// Which cells count: causal, full, or window:W for the last W keys before each query and its own.
    #[arg(long, default_value = "causal")]
    mask: MaskKind,
    /// Measurements of each shape; the median is printed.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Write one JSON object a line to FILE instead of a table; `-` is stdout.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug)]
enum MaskKind {
    Causal,
    Full,
    Window(u32),
}

/// One measured shape; the field names are those of the JSON lines.
#[derive(Debug, Serialize)]
struct Measurement {
    kind: &'static str,
    direction: String,
    dtype: String,
    mask: String,
    n_q: usize,
    n_kv: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    threads: usize,
    isa: String,
    /// Useful work per second: cells that count, not those computed and thrown away.
    gflops: f64,
    /// Of what `threads` threads reach with multiply-adds in registers, measured in turn with the kernel.
    fraction_of_peak: f64,
}

/// What a task is computed from.
struct Tensors {
    shapes: TaskShapes,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_o: Vec<f32>,
    lse: Vec<f32>,
    d: Vec<f32>,
}

/// One shape to measure, with one number of threads.
struct Subject<'a> {
    isa: Isa,
    threads: usize,
    mask: MaskKind,
    geometry: HeadGeometry,
    task: &'a Task,
    /// Iterations of the multiply-add loop.
    peak_iterations: u64,
    repeats: u32,
}

impl FromStr for MaskKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "causal" => Ok(MaskKind::Causal),
            None if text == "full" => Ok(MaskKind::Full),
            Some(("window", width)) => match width.parse() {
                Ok(width) if width > 0 => Ok(MaskKind::Window(width)),
                _ => Err(format!("window width {width:?} must be a number above zero")),
            },
            _ => Err("it must be causal, full or window:W".into()),
        }
    }
}

impl std::fmt::Display for MaskKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MaskKind::Causal => f.write_str("causal"),
            MaskKind::Full => f.write_str("full"),
            MaskKind::Window(width) => write!(f, "window:{width}"),
        }
    }
}

impl MaskKind {
    fn task(self, tokens: usize, kv_heads: usize) -> anyhow::Result<Task> {
        let (lo, hi) = match self {
            MaskKind::Causal => (None, Some(0)),
            MaskKind::Full => (None, None),
            MaskKind::Window(width) => (Some(-i64::from(width)), Some(0)),
        };
        let (all, kv_heads) = (Span::to(tokens), Span::to(kv_heads));
        let slice = BandSlice::new(all, all, lo, hi)?;
        let mask = Mask::new(vec![MaskPart { kv_heads, slice }])?;
        Ok(Task::new(DocumentId { rank: 0, index: 0 }, all, all, kv_heads, &mask)?)
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let isa = args.isa.unwrap_or_else(Isa::detect);
    ensure!(isa.is_available(), "--isa {isa} is not available on this machine");
    let mut json = args.json.as_deref().map(open).transpose()?;
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["direction", "tokens", "head dim", "threads", "GFLOP/s", "of peak"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }

    let peak_iterations = calibrate(isa);
    let kv_heads = args.kv_heads.unwrap_or(args.heads);
    for &head_dim in &args.head_dim {
        let geometry = HeadGeometry::standard(args.heads, kv_heads, head_dim)?;
        for &tokens in &args.tokens {
            let task = &args.mask.task(tokens, kv_heads)?;
            let tensors = Tensors::of(isa, &geometry, task)?;
            for threads in threads(&args.threads)? {
                let (mask, repeats) = (args.mask, args.repeats);
                let subject = Subject { isa, threads, mask, geometry, task, peak_iterations, repeats };
                for direction in [Direction::Forward, Direction::Backward] {
                    let measured = subject.measure(direction, &tensors)?;
                    match &mut json {
                        Some(out) => {
                            serde_json::to_writer(&mut *out, &measured)?;
                            writeln!(out)?;
                            out.flush()?;
                        }
                        None => _ = table.add_row(measured.row()),
                    }
                }
            }
        }
    }
    if json.is_none() {
        println!("f32 on {isa}, {} query heads, {kv_heads} kv heads, {} mask", args.heads, args.mask);
        println!("{table}");
    }
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<Box<dyn Write>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdout().lock()));
    }
    let file = File::create(path).with_context(|| format!("--json {}", path.display()))?;
    Ok(Box::new(BufWriter::new(file)))
}

fn threads(asked: &[usize]) -> anyhow::Result<Vec<usize>> {
    ensure!(!asked.contains(&0), "--threads 0: at least one thread is needed");
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let all = std::thread::available_parallelism().context("counting the cores")?.get();
    Ok(if all == 1 { vec![1] } else { vec![1, all] })
}

/// How many iterations of the multiply-add loop take about [`PEAK_SECONDS`].
fn calibrate(isa: Isa) -> u64 {
    let mut iterations = 1000;
    loop {
        let start = Instant::now();
        peak_loop(isa, DType::F32, iterations);
        let seconds = start.elapsed().as_secs_f64();
        if seconds > PEAK_SECONDS / 4.0 {
            return ((iterations as f64 * PEAK_SECONDS / seconds) as u64).max(1);
        }
        iterations *= 2;
    }
}

impl Tensors {
    fn of(isa: Isa, geometry: &HeadGeometry, task: &Task) -> anyhow::Result<Self> {
        let shapes = task.shapes(geometry);
        let mut state = 1u64;
        let mut noise = |shape: [usize; 3]| -> Vec<f32> {
            let next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            };
            std::iter::repeat_with(next).take(shape.iter().product()).collect()
        };
        let (q, k, v, d_o) = (noise(shapes.q), noise(shapes.k), noise(shapes.v), noise(shapes.o));
        let mut tensors = Tensors { shapes, q, k, v, d_o, lse: Vec::new(), d: Vec::new() };
        let mut kernel = CpuKernel::new(KernelConfig::new(isa, 1))?;
        let results = Results::zeroed(task, geometry, Direction::Forward);
        let operands = tensors.operands(Direction::Forward)?;
        let results = compute(&mut kernel, KernelTask { geometry: *geometry, task, operands, results })?;
        if let Results::Forward { o, lse } = results {
            let o = TensorView::contiguous("o", &o, shapes.o)?;
            tensors.d = row_dots(TensorView::contiguous("d_o", &tensors.d_o, shapes.o)?, o)?;
            tensors.lse = lse;
        }
        Ok(tensors)
    }

    fn operands(&self, direction: Direction) -> anyhow::Result<Operands<'_>> {
        let q = TensorView::contiguous("q", &self.q, self.shapes.q)?;
        let k = TensorView::contiguous("k", &self.k, self.shapes.k)?;
        let v = TensorView::contiguous("v", &self.v, self.shapes.v)?;
        Ok(match direction {
            Direction::Forward => Operands::Forward { q: q.into(), k: k.into(), v: v.into() },
            Direction::Backward => {
                let d_o = TensorView::contiguous("d_o", &self.d_o, self.shapes.o)?;
                let lse = TensorView::contiguous("lse", &self.lse, self.shapes.row)?;
                let d = TensorView::contiguous("d", &self.d, self.shapes.row)?;
                Operands::Backward { q: q.into(), k: k.into(), v: v.into(), d_o: d_o.into(), lse, d }
            }
        })
    }
}

/// Computes one task and returns its results.
fn compute(kernel: &mut CpuKernel, task: KernelTask<'_>) -> anyhow::Result<Results> {
    let finished = Mutex::new(None);
    kernel.run(vec![task], &|_, results| {
        *finished.lock().unwrap_or_else(PoisonError::into_inner) = Some(results);
    })?;
    finished
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .context("the kernel did not finish its task")
}

impl Subject<'_> {
    /// Peak loop and kernel in turn, so that whatever else the machine does slows down both.
    fn measure(&self, direction: Direction, tensors: &Tensors) -> anyhow::Result<Measurement> {
        let mut kernel = CpuKernel::new(KernelConfig::new(self.isa, self.threads))?;
        let mut results = Results::zeroed(self.task, &self.geometry, direction);
        let (mut speeds, mut fractions) = (Vec::new(), Vec::new());
        let mut before = self.peak();
        for repeat in 0..=self.repeats {
            let (geometry, task) = (self.geometry, self.task);
            let operands = tensors.operands(direction)?;
            let start = Instant::now();
            results = compute(&mut kernel, KernelTask { geometry, task, operands, results })?;
            let speed = task.flops(&geometry, direction) / start.elapsed().as_secs_f64();
            let after = self.peak();
            // The first run grows the workspaces.
            if repeat > 0 {
                speeds.push(speed);
                fractions.push(speed / (0.5 * (before + after)));
            }
            before = after;
        }
        let shape = self.geometry.shape();
        Ok(Measurement {
            kind: "kernel",
            direction: direction.to_string(),
            dtype: shape.dtype.to_string(),
            mask: self.mask.to_string(),
            n_q: self.task.q().len(),
            n_kv: self.task.kv().len(),
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            threads: self.threads,
            isa: self.isa.to_string(),
            gflops: rounded(median(speeds) * 1e-9, 1),
            fraction_of_peak: rounded(median(fractions), 3),
        })
    }

    /// FLOP/s of the multiply-add loop on all threads at once.
    fn peak(&self) -> f64 {
        let start = Instant::now();
        let flops: f64 = std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads)
                .map(|_| scope.spawn(|| peak_loop(self.isa, DType::F32, self.peak_iterations)))
                .collect();
            let own = peak_loop(self.isa, DType::F32, self.peak_iterations);
            own + others.into_iter().filter_map(|other| other.join().ok()).sum::<f64>()
        });
        flops / start.elapsed().as_secs_f64()
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}

impl Measurement {
    fn row(&self) -> [String; 6] {
        [
            self.direction.clone(),
            self.n_q.to_string(),
            self.head_dim.to_string(),
            self.threads.to_string(),
            format!("{:.1}", self.gflops),
            format!("{:.2}", self.fraction_of_peak),
        ]
    }
}
