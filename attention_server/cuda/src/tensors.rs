//! The tensors of tasks, to and from a wave's pinned memory.

use outboard_attention::kernel::{KernelTask, Operands, QueryInput, Results};
use outboard_attention::{AnyTensor, DType, TensorView};

use crate::batch::{OperandPlace, TaskOperands};
use crate::copy::{self, Source, Widened};
use crate::wave::{RunningWave, StagedWave};

/// Copies the operands of a wave's tasks to where they are uploaded from.
pub(crate) fn bring<'a>(
    tasks: impl Iterator<Item = &'a KernelTask<'a>>,
    wave: &mut StagedWave,
    threads: usize,
) {
    let (places, target) = wave.operands();
    let copies = tasks.zip(places).flat_map(|(task, places)| operands(task, places)).collect();
    copy::gather(copies, target, threads);
}

/// Copies the results of a wave that has ended to its tasks' buffers.
pub(crate) fn take<'a>(wave: &RunningWave, results: impl Iterator<Item = &'a mut Results>, threads: usize) {
    let layout = wave.layout();
    let mut copies = Vec::new();
    for (of_task, place) in results.zip(&layout.results) {
        for (i, to) in parts(of_task).into_iter().enumerate() {
            let dtype = if place.narrow && i == 0 { layout.geometry.dtype } else { DType::F32 };
            let (start, bytes) = (place.starts[i], place.lens[i] * dtype.bytes());
            copies.push(Widened { dtype, from: &wave.results()[start..start + bytes], to });
        }
    }
    copy::scatter(copies, threads);
}

/// The operands of a task and where they go.
fn operands<'a>(task: &'a KernelTask<'_>, places: &TaskOperands) -> Vec<(Source<'a>, OperandPlace)> {
    let mut all = Vec::new();
    let mut add =
        |place: Option<OperandPlace>, source: Source<'a>| all.extend(place.map(|place| (source, place)));
    let any = |tensor: &AnyTensor<'a>| Source::from(*tensor);
    let query = |input: &QueryInput<'a>| match input {
        QueryInput::View(tensor) => Source::from(*tensor),
        // Only f32 may lie in its result's place, and the check has refused it.
        QueryInput::InPlace => Source::Nothing,
    };
    match &task.operands {
        Operands::Forward { q, k, v } => {
            add(places.q, query(q));
            add(places.k, any(k));
            add(places.v, any(v));
        }
        Operands::Backward { q, k, v, d_o, lse, d } => {
            add(places.q, any(q));
            add(places.k, any(k));
            add(places.v, any(v));
            add(places.d_o, query(d_o));
            let row = |view: &TensorView<'a>| Source::from(AnyTensor::F32(*view));
            add(places.lse, row(lse));
            add(places.d, row(d));
        }
        Operands::Stage { .. } => {}
    }
    all
}

fn parts(results: &mut Results) -> Vec<&mut [f32]> {
    match results {
        Results::Forward { o, lse } => vec![o, lse],
        Results::Backward { dq, dk, dv } => vec![dq, dk, dv],
        Results::Stage(_) => Vec::new(),
    }
}
