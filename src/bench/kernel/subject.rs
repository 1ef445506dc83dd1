//! What is measured: tasks with tensors of noise, and batches of them.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, ensure};
use outboard_attention::kernel::{CpuKernel, KernelTask, Operands, Results};
use outboard_attention::merge::row_dots;
use outboard_attention::{Direction, Elements, HeadGeometry, Task, TaskShapes, TensorView};
use outboard_simulator::Random;

/// A task with all that either direction is computed from.
pub(crate) struct Subject {
    pub(crate) geometry: HeadGeometry,
    pub(crate) task: Task,
    pub(crate) shapes: TaskShapes,
    pub(crate) q: Elements,
    pub(crate) k: Elements,
    pub(crate) v: Elements,
    pub(crate) d_o: Elements,
    lse: Vec<f32>,
    d: Vec<f32>,
}

/// Tasks that are computed together in one direction, with their result buffers.
pub(crate) struct Batch<'a> {
    direction: Direction,
    subjects: Vec<&'a Subject>,
    results: Vec<Results>,
}

impl Subject {
    /// A task on noise. Computes it forward once, for what backward needs of it.
    pub(crate) fn new(kernel: &mut CpuKernel, geometry: HeadGeometry, task: Task) -> anyhow::Result<Self> {
        task.check(&geometry)?;
        let shapes = task.shapes(&geometry);
        fits(&geometry, shapes)?;
        let (dtype, mut noise) = (geometry.dtype(), Random::new(1));
        // Between -1 and 1.
        let mut tensor = |shape: [usize; 3]| {
            let values = std::iter::repeat_with(|| (2.0 * noise.unit() - 1.0) as f32);
            Elements::rounded(dtype, values.take(shape.iter().product()))
        };
        let (q, k) = (tensor(shapes.q), tensor(shapes.k));
        let (v, d_o) = (tensor(shapes.v), tensor(shapes.o));
        let mut subject = Subject { geometry, task, shapes, q, k, v, d_o, lse: Vec::new(), d: Vec::new() };
        let mut forward = Batch::new(Direction::Forward, [&subject]);
        forward.run(kernel)?;
        if let Some(Results::Forward { o, lse }) = forward.results.pop() {
            let values = subject.d_o.values();
            let d_o = TensorView::contiguous("d_o", &values, shapes.o)?;
            let d = row_dots(d_o, TensorView::contiguous("o", &o, shapes.o)?)?;
            (subject.lse, subject.d) = (lse, d);
        }
        Ok(subject)
    }

    fn operands(&self, direction: Direction) -> anyhow::Result<Operands<'_>> {
        let q = self.q.contiguous("q", self.shapes.q)?;
        let k = self.k.contiguous("k", self.shapes.k)?;
        let v = self.v.contiguous("v", self.shapes.v)?;
        Ok(match direction {
            Direction::Forward => Operands::Forward { q: q.into(), k, v },
            Direction::Backward => {
                let d_o = self.d_o.contiguous("d_o", self.shapes.o)?.into();
                let lse = TensorView::contiguous("lse", &self.lse, self.shapes.row)?;
                let d = TensorView::contiguous("d", &self.d, self.shapes.row)?;
                Operands::Backward { q, k, v, d_o, lse, d }
            }
        })
    }
}

/// Refuses what this machine has no memory for.
fn fits(geometry: &HeadGeometry, shapes: TaskShapes) -> anyhow::Result<()> {
    let bytes = |shape: [usize; 3], element: usize| {
        shape.iter().fold(element as u128, |bytes, side| bytes * *side as u128)
    };
    let operand = geometry.dtype().bytes();
    let inputs = bytes(shapes.q, operand) + bytes(shapes.k, operand) + bytes(shapes.v, operand);
    let results = bytes(shapes.q, 4) + bytes(shapes.k, 4) + bytes(shapes.v, 4);
    let needed = inputs + results + bytes(shapes.o, operand) + 3 * bytes(shapes.row, 4);
    let system = rustix::system::sysinfo();
    let present = u128::from(system.totalram) * u128::from(system.mem_unit.max(1));
    let gib = |bytes: u128| bytes as f64 / (1u64 << 30) as f64;
    ensure!(
        needed <= present,
        "the tensors take {:.1} GiB, and this machine has {:.1} GiB of memory",
        gib(needed),
        gib(present)
    );
    Ok(())
}

impl<'a> Batch<'a> {
    pub(crate) fn new(direction: Direction, subjects: impl IntoIterator<Item = &'a Subject>) -> Self {
        let subjects: Vec<_> = subjects.into_iter().collect();
        let results = subjects.iter().map(|s| Results::zeroed(&s.task, &s.geometry, direction)).collect();
        Batch { direction, subjects, results }
    }

    /// FLOPs of useful work: of cells that count.
    pub(crate) fn flops(&self) -> f64 {
        self.subjects.iter().map(|s| s.task.flops(&s.geometry, self.direction)).sum()
    }

    /// Computes every task once.
    pub(crate) fn run(&mut self, kernel: &mut CpuKernel) -> anyhow::Result<()> {
        let mut batch = Vec::with_capacity(self.subjects.len());
        for (subject, results) in self.subjects.iter().zip(std::mem::take(&mut self.results)) {
            let operands = subject.operands(self.direction)?;
            batch.push(KernelTask { geometry: subject.geometry, task: &subject.task, operands, results });
        }
        let finished = Mutex::new(Vec::with_capacity(batch.len()));
        kernel.run(batch, &|index, results| {
            finished.lock().unwrap_or_else(PoisonError::into_inner).push((index, results));
        })?;
        let mut finished = finished.into_inner().unwrap_or_else(PoisonError::into_inner);
        finished.sort_by_key(|(index, _)| *index);
        self.results = finished.into_iter().map(|(_, results)| results).collect();
        let all = self.results.len() == self.subjects.len();
        all.then_some(()).context("the kernel did not finish every task")
    }

    /// What the last run computed, a task each.
    pub(crate) fn results(&self) -> &[Results] {
        &self.results
    }
}
