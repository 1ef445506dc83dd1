//! The thread that owns the device: takes batches from the queue, computes them, and ends each task as it finishes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use outboard_attention::kernel::{CpuKernel, KernelTask, Operands, Results};
use outboard_attention::{AnyTensor, Direction, TensorSlice};
use outboard_proto::TaskError;
use outboard_transport::{ArrivedTask, TaskInputs, TaskOutcome};

use crate::ServerError;
use crate::engine::Shared;
use crate::queue::QueuedTask;

/// Starts the executor. It ends when the queue is closed and empty.
pub(crate) fn start(mut kernel: CpuKernel, shared: Arc<Shared>) -> Result<JoinHandle<()>, ServerError> {
    let run = move || {
        let dropped = |error: &TaskError| shared.stats.failed(error);
        while let Some(batch) = shared.queue.next_batch(shared.batch_flops, dropped) {
            let tasks = batch.len();
            shared.stats.batches.fetch_add(1, Ordering::Relaxed);
            run_batch(&mut kernel, batch, &shared);
            shared.queue.ended(tasks);
        }
    };
    std::thread::Builder::new().name("executor".into()).spawn(run).map_err(ServerError::Thread)
}

/// When a task was computed: from the end of the task before it in the batch to its own. Together the tasks of a batch
/// take exactly the batch's time, though with several threads they overlap.
struct Span {
    begun: Instant,
    end: Instant,
}

fn run_batch(kernel: &mut CpuKernel, batch: Vec<QueuedTask>, shared: &Shared) {
    // The kernel borrows headers and inputs (cloned by reference count) while tasks end, one by one, from within it. Their
    // leases are cloned with them: the memory is not free before the borrow ends.
    let held: Vec<_> =
        batch.iter().map(|t| (t.task.header.clone(), t.task.inputs.clone(), t.task.lease.clone())).collect();
    let mut kernel_tasks = Vec::with_capacity(batch.len());
    let mut running = Vec::with_capacity(batch.len());
    for (queued, (header, inputs, _)) in batch.into_iter().zip(&held) {
        match operands(&queued.task, inputs) {
            Ok(operands) => {
                let results = Results::zeroed(&header.task, &header.geometry, header.direction);
                kernel_tasks.push(KernelTask {
                    geometry: header.geometry,
                    task: &header.task,
                    operands,
                    results,
                });
                running.push(Mutex::new(Some(queued)));
            }
            Err(error) => fail(queued, error, shared),
        }
    }

    let previous_end = Mutex::new(Instant::now());
    let done = |index: usize, results: Results| {
        let slot: Option<&Mutex<Option<QueuedTask>>> = running.get(index);
        if let Some(queued) = slot.and_then(|slot| lock(slot).take()) {
            let end = Instant::now();
            let begun = std::mem::replace(&mut *lock(&previous_end), end);
            succeed(queued, results, Span { begun, end }, shared);
        }
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| kernel.run(kernel_tasks, &done)));
    let error = match outcome {
        Ok(Ok(())) => TaskError::internal("the kernel returned without a result for this task"),
        Ok(Err(error)) => TaskError::new(outboard_proto::ErrorKind::Unsupported, error.to_string()),
        Err(_) => TaskError::internal("the kernel panicked; this is a defect, please report it"),
    };
    for left in running {
        if let Some(queued) = left.into_inner().unwrap_or_else(PoisonError::into_inner) {
            fail(queued, error.clone(), shared);
        }
    }
}

fn succeed(queued: QueuedTask, results: Results, span: Span, shared: &Shared) {
    let dtype = queued.task.header.geometry.dtype();
    let Some(numerics_id) = shared.numerics_id(dtype).cloned() else {
        let error = TaskError::internal(format!("{dtype} was computed without a numerics id"));
        return fail(queued, error, shared);
    };
    let QueuedTask { task, arrived, .. } = queued;
    let header = &task.header;
    let compute = span.end.saturating_duration_since(span.begun);
    shared.stats.computed(header.direction, header.task.cells(), compute);
    let queued = span.begun.saturating_duration_since(arrived);
    task.reply.send(Ok(TaskOutcome { results, numerics_id, queued, compute }));
}

fn fail(queued: QueuedTask, error: TaskError, shared: &Shared) {
    let error = error.context(queued.task.header.name());
    shared.stats.failed(&error);
    queued.task.reply.send(Err(error));
}

fn operands<'a>(task: &ArrivedTask, inputs: &'a TaskInputs) -> Result<Operands<'a>, TaskError> {
    let (q_span, kv_span) = (task.header.task.q(), task.header.task.kv());
    let view = |name: &str, tensor: &'a TensorSlice, span| -> Result<AnyTensor<'a>, TaskError> {
        let missing =
            || TaskError::invalid(format!("tensor {name} holds {}, the task needs {span}", tensor.tokens()));
        tensor.view_of(span).ok_or_else(missing)
    };
    let q = view("q", &inputs.q, q_span)?;
    let k = view("k", &inputs.k, kv_span)?;
    let v = view("v", &inputs.v, kv_span)?;
    match (task.header.direction, &inputs.gradient) {
        (Direction::Forward, _) => Ok(Operands::Forward { q: q.into(), k, v }),
        (Direction::Backward, Some(gradient)) => {
            let d_o = view("d_o", &gradient.d_o, q_span)?;
            let lse = view("lse", &gradient.lse, q_span)?.f32("lse")?;
            let d = view("d", &gradient.d, q_span)?.f32("d")?;
            Ok(Operands::Backward { q, k, v, d_o: d_o.into(), lse, d })
        }
        (Direction::Backward, None) => Err(TaskError::invalid("a backward task needs dO, LSE and D")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What the locks guard is whole at every moment, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
