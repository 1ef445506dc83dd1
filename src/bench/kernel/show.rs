//! What a benchmark shows: progress on a terminal, a table or JSON lines, and the peak that figures are fractions of.

use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, IsTerminal, Write};
use std::path::Path;

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use outboard_attention::kernel::Isa;
use outboard_attention::{Direction, HeadGeometry, Task};
use serde::Serialize;

use super::args::MaskKind;
use super::measure::{Device, Figures, Meter};

/// Below this share of what the instruction set can do in a cycle, the machine did something else meanwhile.
const RELIABLE: f64 = 0.95;
/// Below this part of the time, others took the cores, and the caches with them.
const UNDISTURBED: f64 = 0.9;

/// Where figures go as JSON lines, if they do.
pub(crate) struct Output(Option<Box<dyn Write>>);

/// A bar on standard error, where that is a terminal.
pub(crate) struct Progress(Option<ProgressBar>);

/// One measured shape; the field names are those of the JSON lines.
#[derive(Debug, Serialize)]
pub(crate) struct Measurement {
    kind: &'static str,
    direction: String,
    dtype: String,
    mask: String,
    n_q: usize,
    n_kv: usize,
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    v_head_dim: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    softcap: Option<f32>,
    threads: usize,
    isa: String,
    /// Useful work per second of all threads: cells that count, not those computed and thrown away.
    gflops: f64,
    /// The same by the clock on the wall, which counts whatever else ran meanwhile and threads that waited.
    wall_gflops: f64,
    /// Of what `threads` threads reach with multiply-adds in registers, measured in turn with the kernel.
    fraction_of_peak: f64,
    /// Seconds on cores over the number of threads.
    seconds: f64,
    wall_seconds: f64,
}

/// The peak of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Peak {
    kind: &'static str,
    dtype: String,
    isa: String,
    threads: usize,
    gflops_per_thread: f64,
    clock_ghz: f64,
    flops_per_cycle: f64,
    /// What the instruction set can do in a cycle: the power of two next to what was measured.
    width: f64,
    of_width: f64,
    /// Part of the time that the threads had their cores.
    share_of_cores: f64,
    /// False where the machine was too busy. Nothing is known of portable code, which has no width.
    #[serde(skip_serializing_if = "Option::is_none")]
    reliable: Option<bool>,
}

impl Output {
    pub(crate) fn new(json: Option<&Path>) -> anyhow::Result<Output> {
        Ok(Output(match json {
            None => None,
            Some(path) if path == Path::new("-") => Some(Box::new(io::stdout().lock())),
            Some(path) => {
                let file = File::create(path).with_context(|| format!("--json {}", path.display()))?;
                Some(Box::new(BufWriter::new(file)))
            }
        }))
    }

    /// Writes a line, if lines are wanted.
    pub(crate) fn write(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let Some(out) = &mut self.0 else { return Ok(()) };
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        out.write_all(&line).and_then(|()| out.flush()).context("cannot write JSON lines")
    }

    /// Prints text to standard output, unless lines are wanted.
    pub(crate) fn say(&self, text: &str) -> anyhow::Result<()> {
        if self.0.is_some() {
            return Ok(());
        }
        match writeln!(io::stdout(), "{text}") {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            outcome => outcome.context("cannot write to standard output"),
        }
    }
}

impl Progress {
    pub(crate) fn new(steps: usize) -> anyhow::Result<Progress> {
        let bar = io::stderr().is_terminal().then(|| ProgressBar::new(steps as u64));
        if let Some(bar) = &bar {
            bar.set_style(ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}")?);
        }
        Ok(Progress(bar))
    }

    /// Says what is measured next. Nothing is drawn while it is.
    pub(crate) fn at(&self, what: impl Into<String>) {
        if let Some(bar) = &self.0 {
            bar.set_message(what.into());
            bar.tick();
        }
    }

    pub(crate) fn step(&self) {
        if let Some(bar) = &self.0 {
            bar.inc(1);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// A table without lines, its figures in columns to the right of the first `words` ones.
pub(crate) fn table<const N: usize>(header: [&str; N], words: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    for column in table.column_iter_mut().skip(words) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

pub(crate) fn rounded(value: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (value * unit).round() / unit
}

impl Measurement {
    pub(crate) const HEADER: [&str; 10] = [
        "dtype",
        "direction",
        "queries",
        "keys",
        "head dim",
        "threads",
        "GFLOP/s",
        "of peak",
        "ms",
        "wall ms",
    ];

    pub(crate) fn new(
        device: &Device,
        (mask, geometry, task): (MaskKind, &HeadGeometry, &Task),
        direction: Direction,
        figures: &Figures,
    ) -> Self {
        let shape = geometry.shape();
        let wall_speed = figures.speed * figures.took.cpu / figures.took.wall;
        Measurement {
            kind: "kernel",
            direction: direction.to_string(),
            dtype: shape.dtype.to_string(),
            mask: mask.to_string(),
            n_q: task.q().len(),
            n_kv: task.kv().len(),
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            v_head_dim: shape.v_head_dim,
            softcap: shape.softcap,
            threads: device.threads,
            isa: device.isa.to_string(),
            gflops: rounded(figures.speed * 1e-9, 1),
            wall_gflops: rounded(wall_speed * 1e-9, 1),
            fraction_of_peak: rounded(figures.fraction, 3),
            seconds: figures.took.cpu,
            wall_seconds: figures.took.wall,
        }
    }

    pub(crate) fn row(&self) -> [String; 10] {
        let head_dim = match (self.head_dim, self.v_head_dim) {
            (head_dim, v_head_dim) if head_dim == v_head_dim => head_dim.to_string(),
            (head_dim, v_head_dim) => format!("{head_dim}/{v_head_dim}"),
        };
        [
            self.dtype.clone(),
            self.direction.clone(),
            self.n_q.to_string(),
            self.n_kv.to_string(),
            head_dim,
            self.threads.to_string(),
            format!("{:.1}", self.gflops),
            format!("{:.3}", self.fraction_of_peak),
            format!("{:.2}", self.seconds * 1e3),
            format!("{:.2}", self.wall_seconds * 1e3),
        ]
    }
}

impl Peak {
    pub(crate) fn of(meter: &Meter) -> Peak {
        let Device { isa, threads, .. } = meter.device;
        let flops_per_cycle = meter.flops_per_cycle();
        let width = nearest_width(flops_per_cycle);
        let (of_width, share) = (flops_per_cycle / width, meter.median_share());
        Peak {
            kind: "peak",
            dtype: meter.dtype.to_string(),
            isa: isa.to_string(),
            threads,
            gflops_per_thread: rounded(meter.median_peak() * 1e-9 / threads as f64, 1),
            clock_ghz: rounded(meter.median_clock() * 1e-9, 3),
            flops_per_cycle: rounded(flops_per_cycle, 2),
            width,
            of_width: rounded(of_width, 3),
            share_of_cores: rounded(share, 3),
            reliable: (isa != Isa::Portable).then(|| is_reliable(of_width, share)),
        }
    }

    /// What a person reads.
    pub(crate) fn words(&self) -> String {
        let Peak { dtype, isa, threads, gflops_per_thread, clock_ghz, flops_per_cycle, .. } = self;
        let mut words = format!(
            "peak of {dtype} on {isa}, {threads} threads: {gflops_per_thread:.1} GFLOP/s a thread at {clock_ghz:.2} GHz, \
             {flops_per_cycle:.1} FLOPs a cycle"
        );
        if let Some(reliable) = self.reliable {
            let (of_width, share) = (self.of_width, 100.0 * self.share_of_cores);
            words += &format!(", {of_width:.2} of {:.0}; {share:.0}% of the cores' time", self.width);
            if !reliable {
                words += "\nthe machine was too busy; figures are unreliable";
            }
        }
        words
    }
}

/// The power of two next to `flops_per_cycle`, by its logarithm.
fn nearest_width(flops_per_cycle: f64) -> f64 {
    flops_per_cycle.log2().round().exp2()
}

/// More than all of it is as sure a sign of another clock meanwhile as less.
fn is_reliable(of_width: f64, share: f64) -> bool {
    (RELIABLE..=1.0 / RELIABLE).contains(&of_width) && share >= UNDISTURBED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_shows_in_the_flops_of_a_cycle() {
        for (measured, width, reliable) in [
            (31.8, 32.0, true),
            (62.0, 64.0, true),
            (29.0, 32.0, false),
            (24.0, 32.0, false),
            (20.0, 16.0, false),
        ] {
            assert_eq!(nearest_width(measured), width);
            assert_eq!(is_reliable(measured / width, 0.99), reliable, "{measured}");
        }
        assert!(!is_reliable(1.0, 0.5), "others had the cores");
    }

    #[test]
    fn figures_are_rounded() {
        assert_eq!(rounded(0.123_46, 3), 0.123);
        assert_eq!(rounded(212.37, 0), 212.0);
        assert!(rounded(f64::NAN, 2).is_nan());
    }
}
