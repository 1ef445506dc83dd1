//! `outboard bench kernel --suite`: what the kernel must reach, and what it does.

use anyhow::{Context, bail, ensure};
use comfy_table::Table;
use outboard_attention::kernel::{CpuKernel, Isa};
use outboard_attention::{DType, Direction};
use serde::Serialize;

use super::accuracy::{Errors, errors};
use super::args::{Args, MaskKind, geometry};
use super::measure::{Cores, Figures, Meter, measure, median};
use super::show::{Output, Peak, Progress, rounded, table};
use super::subject::{Batch, Subject};
use super::targets::{
    ACCURACY_TOKENS, Arithmetic, CAUSAL_16K, Goal, HEAD_DIM, HEADS, Row, SHARED_BY_FOUR, Shape, WINDOW, Work,
    equal_document, mixed_batch, rows,
};

/// FLOPs from which a batch takes long, and how often batches are measured that do not, and that do.
const LONG_FLOPS: f64 = 1e11;
const REPEATS: u32 = 7;
const LONG_REPEATS: u32 = 3;

/// Rows measured so far, and what later rows take from them.
struct Suite<'a> {
    isa: Isa,
    threads: usize,
    repeats: Option<u32>,
    cores: &'a Cores,
    benches: Vec<Bench>,
    /// The last shape measured, of which there is often another direction.
    prepared: Option<(Shape, Subject)>,
    /// Fractions of the peak that shapes have reached.
    reached: Vec<(Shape, Direction, f64)>,
    errors: Option<(Arithmetic, Errors)>,
}

/// A kernel and the peak of its instruction set and element type.
struct Bench {
    meter: Meter,
    kernel: CpuKernel,
}

/// What a row reached, or why it could not.
enum Outcome {
    Reached { value: f64, figures: Option<Figures> },
    NotHere(String),
}

/// A row's JSON line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    kind: &'static str,
    row: &'a str,
    target: f64,
    /// Whether the target is the most or the least.
    at_most: bool,
    reached: Option<f64>,
    pass: Option<bool>,
    threads: usize,
    gflops: Option<f64>,
    fraction_of_peak: Option<f64>,
    seconds: Option<f64>,
    wall_seconds: Option<f64>,
    note: Option<&'a str>,
}

pub(super) fn run(args: &Args, isa: Isa, cores: &Cores, output: &mut Output) -> anyhow::Result<()> {
    let threads = match args.threads[..] {
        [] => cores.count().min(2),
        [threads] => threads,
        _ => bail!("--suite takes one number of --threads, not {}", args.threads.len()),
    };
    let wanted = |row: &Row| args.only.as_ref().is_none_or(|text| row.name.contains(text));
    let rows: Vec<_> = rows().into_iter().filter(wanted).collect();
    let only = args.only.as_deref().unwrap_or_default();
    ensure!(!rows.is_empty(), "--only {only:?}: no row has that in its name");
    let mut suite = Suite {
        isa,
        threads,
        repeats: args.repeats,
        cores,
        benches: Vec::new(),
        prepared: None,
        reached: Vec::new(),
        errors: None,
    };
    let mut table = table(["what", "target", "reached", "", "GFLOP/s", "of peak", "wall s"], 1);
    let (mut passed, mut measured) = (0, 0);
    let progress = Progress::new(rows.len())?;
    for row in &rows {
        progress.at(row.name.clone());
        let outcome = suite.outcome(row.work).with_context(|| row.name.clone())?;
        let line = Line::new(row, threads, &outcome);
        measured += u32::from(line.pass.is_some());
        passed += u32::from(line.pass == Some(true));
        output.write(&line)?;
        add_row(&mut table, &line);
        progress.step();
    }
    drop(progress);
    let peaks: Vec<_> = suite.benches.iter().filter(|bench| bench.meter.has_peaks()).collect();
    output.say(&format!("{isa}, {threads} threads"))?;
    output.say(&table.to_string())?;
    for bench in peaks {
        let peak = Peak::of(&bench.meter);
        output.write(&peak)?;
        output.say(&peak.words())?;
    }
    output.say(&format!("{passed} of {measured} rows pass"))
}

impl Suite<'_> {
    fn outcome(&mut self, work: Work) -> anyhow::Result<Outcome> {
        match work {
            Work::Speed(shape, direction) => self.speed(shape, direction),
            Work::Mixed(direction) => self.mixed(direction),
            Work::Window(direction) => self.window(direction),
            Work::Accuracy(arithmetic, direction) => self.accuracy(arithmetic, direction),
        }
    }

    fn speed(&mut self, shape: Shape, direction: Direction) -> anyhow::Result<Outcome> {
        if let Some(isa) = shape.simd.filter(|isa| !isa.is_available()) {
            return Ok(Outcome::NotHere(format!("no {isa} on this machine")));
        }
        if shape.dtype == DType::Bf16 && self.isa != Isa::Avx512Bf16 {
            let here =
                if Isa::Avx512Bf16.is_available() { "not by this --simd" } else { "not on this machine" };
            return Ok(Outcome::NotHere(here.into()));
        }
        let figures = self.figures(shape, direction)?;
        Ok(Outcome::Reached { value: figures.fraction, figures: Some(figures) })
    }

    /// Measures a shape in one direction.
    fn figures(&mut self, shape: Shape, direction: Direction) -> anyhow::Result<Figures> {
        let prepared = self.prepared.take().filter(|(prepared, _)| *prepared == shape);
        let repeats = self.repeats;
        let Bench { meter, kernel } = self.bench(shape.simd.unwrap_or(self.isa), shape.dtype)?;
        let subject = match prepared {
            Some((_, subject)) => subject,
            None => {
                let geometry = geometry(HEADS, shape.kv_heads, HEAD_DIM, shape.dtype)?;
                let task = shape.mask.task(shape.tokens, shape.queries, shape.kv_heads)?;
                Subject::new(kernel, geometry, task)?
            }
        };
        let mut batch = [Batch::new(direction, [&subject])];
        let repeats = repeats.unwrap_or_else(|| default_repeats(&batch));
        let figures = measure(kernel, meter, repeats, &mut batch)?.pop().context("nothing was measured")?;
        self.prepared = Some((shape, subject));
        self.reached.push((shape, direction, figures.fraction));
        Ok(figures)
    }

    fn mixed(&mut self, direction: Direction) -> anyhow::Result<Outcome> {
        self.prepared = None;
        let repeats = self.repeats;
        let Bench { meter, kernel } = self.bench(self.isa, DType::F32)?;
        let geometry = geometry(HEADS, SHARED_BY_FOUR, HEAD_DIM, DType::F32)?;
        let mut subject = |queries, tokens| {
            Subject::new(kernel, geometry, MaskKind::Causal.task(tokens, queries, SHARED_BY_FOUR)?)
        };
        let shapes = mixed_batch();
        let tasks: Vec<_> = shapes.iter().map(|&(q, kv)| subject(q, kv)).collect::<anyhow::Result<_>>()?;
        let document = equal_document(&shapes);
        let document = subject(document, document)?;
        let mut batches = [Batch::new(direction, &tasks), Batch::new(direction, [&document])];
        let repeats = repeats.unwrap_or_else(|| default_repeats(&batches));
        match &measure(kernel, meter, repeats, &mut batches)?[..] {
            [mixed, causal] => {
                let pairs = mixed.fractions.iter().zip(&causal.fractions);
                let ratios: Vec<_> = pairs.map(|(mixed, causal)| mixed / causal).collect();
                Ok(Outcome::Reached { value: median(&ratios), figures: Some(mixed.clone()) })
            }
            _ => bail!("nothing was measured"),
        }
    }

    fn window(&mut self, direction: Direction) -> anyhow::Result<Outcome> {
        let known = |reached: &(Shape, Direction, f64)| (reached.0, reached.1) == (CAUSAL_16K, direction);
        let causal = match self.reached.iter().find(|reached| known(reached)) {
            Some((.., fraction)) => *fraction,
            None => self.figures(CAUSAL_16K, direction)?.fraction,
        };
        let window = self.figures(WINDOW, direction)?;
        Ok(Outcome::Reached { value: causal / window.fraction, figures: Some(window) })
    }

    fn accuracy(&mut self, arithmetic: Arithmetic, direction: Direction) -> anyhow::Result<Outcome> {
        self.prepared = None;
        let (isa, dtype) = match (arithmetic, self.isa) {
            (Arithmetic::F32, isa) => (isa, DType::F32),
            (Arithmetic::Bf16Pairs, Isa::Avx512Bf16) => (Isa::Avx512Bf16, DType::Bf16),
            (Arithmetic::Bf16Pairs, _) => (Isa::Portable, DType::Bf16),
            (Arithmetic::Bf16InF32, Isa::Avx512Bf16) => (Isa::Avx512, DType::Bf16),
            (Arithmetic::Bf16InF32, isa) => (isa, DType::Bf16),
        };
        if (arithmetic, isa) == (Arithmetic::Bf16InF32, Isa::Portable) {
            return Ok(Outcome::NotHere("not by this --simd".into()));
        }
        let known = self.errors.filter(|(known, _)| *known == arithmetic);
        let errors = match known {
            Some((_, errors)) => errors,
            None => {
                let kernel = &mut self.bench(isa, dtype)?.kernel;
                let geometry = geometry(1, 1, HEAD_DIM, dtype)?;
                let task = MaskKind::Causal.task(ACCURACY_TOKENS, ACCURACY_TOKENS, 1)?;
                let subject = Subject::new(kernel, geometry, task)?;
                errors(kernel, &subject)?
            }
        };
        self.errors = Some((arithmetic, errors));
        let value = match direction {
            Direction::Forward => errors.o,
            Direction::Backward => errors.gradients,
        };
        Ok(Outcome::Reached { value, figures: None })
    }

    fn bench(&mut self, isa: Isa, dtype: DType) -> anyhow::Result<&mut Bench> {
        let is_it = |bench: &Bench| bench.meter.device.isa == isa && bench.meter.dtype == dtype;
        let at = match self.benches.iter().position(is_it) {
            Some(at) => at,
            None => {
                let device = self.cores.device(isa, self.threads)?;
                self.benches.push(Bench { kernel: device.kernel()?, meter: Meter::new(&device, dtype) });
                self.benches.len() - 1
            }
        };
        self.benches.get_mut(at).context("no such bench")
    }
}

fn default_repeats(batches: &[Batch<'_>]) -> u32 {
    let long = batches.iter().any(|batch| batch.flops() > LONG_FLOPS);
    if long { LONG_REPEATS } else { REPEATS }
}

impl<'a> Line<'a> {
    fn new(row: &'a Row, threads: usize, outcome: &'a Outcome) -> Self {
        let (reached, figures, note) = match outcome {
            Outcome::Reached { value, figures } => (Some(*value), figures.as_ref(), None),
            Outcome::NotHere(why) => (None, None, Some(why.as_str())),
        };
        Line {
            kind: "suite",
            row: &row.name,
            target: row.goal.value(),
            at_most: matches!(row.goal, Goal::AtMost(_)),
            reached,
            pass: reached.map(|reached| row.goal.is_met(reached)),
            threads,
            gflops: figures.map(|figures| rounded(figures.speed * 1e-9, 1)),
            fraction_of_peak: figures.map(|figures| rounded(figures.fraction, 3)),
            seconds: figures.map(|figures| figures.took.cpu),
            wall_seconds: figures.map(|figures| figures.took.wall),
            note,
        }
    }
}

fn add_row(table: &mut Table, line: &Line<'_>) {
    let number = |value: f64| if value < 0.01 { format!("{value:.1e}") } else { format!("{value:.3}") };
    let figure = |value: Option<f64>, digits: usize| match value {
        Some(value) => format!("{value:.digits$}"),
        None => String::new(),
    };
    let sign = if line.at_most { "<=" } else { ">=" };
    table.add_row([
        line.row.to_owned(),
        format!("{sign} {}", number(line.target)),
        line.reached.map_or("-".into(), number),
        match line.pass {
            Some(true) => "pass".to_owned(),
            Some(false) => "miss".to_owned(),
            None => line.note.unwrap_or_default().to_owned(),
        },
        figure(line.gflops, 1),
        figure(line.fraction_of_peak, 3),
        figure(line.wall_seconds, 3),
    ]);
}
