//! The thread that owns the device: takes batches from the queue, has them computed, and ends each task as it finishes.
//!
//! While waves are under way on a device that overlaps batches, the thread only ever waits for a moment: the next batch
//! is sent on its way as soon as its tasks are there, and results go out as soon as they are.

mod ledger;
#[cfg(test)]
mod tests;

use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use outboard_attention::kernel::{KernelTask, Operands, Results};
use outboard_attention::{AnyTensor, Direction, Span, TensorSlice};
use outboard_proto::{TaskError, TaskHeader};
use outboard_transport::{ArrivedTask, ByteLease, TaskInputs};

use crate::ServerError;
use crate::device::{Device, DeviceError, Facts, Opened};
use crate::engine::Shared;
use crate::queue::QueuedTask;
use ledger::{Ledger, Running};

/// How long to wait for tasks before looking again whether a wave has ended.
const MOMENT: Duration = Duration::from_micros(100);

const PANICKED: &str = "the kernel panicked; this is a defect, please report it";

/// Opens a device on a thread of its own, which computes with it until the queue is closed and empty. `share` makes of the
/// device's facts what the thread shares with others.
pub(crate) fn start(
    open: impl FnOnce() -> Result<Opened, ServerError> + Send + 'static,
    share: impl FnOnce(Facts) -> Shared + Send + 'static,
) -> Result<Arc<Shared>, ServerError> {
    let (sender, opened) = sync_channel(1);
    // The thread owns itself: it ends by the queue's closing, and holds only what it shares. Whoever starts it waits for
    // what it sends.
    let run = move || match open() {
        Ok(Opened { device, facts }) => {
            let shared = Arc::new(share(facts));
            let _ = sender.send(Ok(Arc::clone(&shared)));
            Executor::new(device, shared).run();
        }
        Err(error) => {
            let _ = sender.send(Err(error));
        }
    };
    std::thread::Builder::new().name("executor".into()).spawn(run).map_err(ServerError::Thread)?;
    opened.recv().unwrap_or_else(|_| Err(ServerError::Kernel("opening the device panicked".into())))
}

struct Executor {
    device: ManuallyDrop<Box<dyn Device>>,
    shared: Arc<Shared>,
    ledger: Ledger,
    /// Of the last batch.
    number: u64,
    /// The device is not to be called any more: it panicked, or does not answer.
    abandoned: bool,
    /// Of the device's own count, what the counters have.
    counted: f64,
    /// When the device last had nothing under way, or ended a wave.
    progressed: Instant,
}

/// What to do next.
enum Next {
    Begin(Vec<QueuedTask>),
    Finish,
    /// The device takes longer than it may.
    Abandon,
    End,
}

/// What a batch reads while it is put on its way. With the lease its memory is not free before that is over, even if the
/// task ends meanwhile.
struct Held {
    header: Arc<TaskHeader>,
    inputs: TaskInputs,
    _lease: ByteLease,
}

/// A batch that the device did not take.
struct Refused {
    error: DeviceError,
    tasks: Vec<Running>,
}

impl Executor {
    fn new(device: Box<dyn Device>, shared: Arc<Shared>) -> Executor {
        let by_wall_clock = device.busy_seconds().is_none();
        Executor {
            ledger: Ledger::new(Arc::clone(&shared), by_wall_clock),
            device: ManuallyDrop::new(device),
            shared,
            number: 0,
            abandoned: false,
            counted: 0.0,
            progressed: Instant::now(),
        }
    }

    fn run(mut self) {
        // The device's code runs in each step: what panics there must not end the thread that others wait for.
        while catch_unwind(AssertUnwindSafe(|| self.step())).unwrap_or_else(|_| {
            let first = !self.abandoned;
            self.abandon(&TaskError::internal(PANICKED));
            first
        }) {}
        // A device that is lost may never come back from being closed, and one that does not answer may still write its
        // memory; the process ends soon anyway.
        if self.shared.lost().is_none() {
            drop(ManuallyDrop::into_inner(self.device));
        }
    }

    /// One step, after which false is the end.
    fn step(&mut self) -> bool {
        match self.next() {
            Next::Begin(batch) => self.begin(batch),
            Next::Finish => self.finish(),
            Next::Abandon => {
                let seconds = self.device.patience().as_secs_f64();
                let message = format!("the device has not answered for {seconds:.1} s");
                self.abandon(&TaskError::unavailable(message));
            }
            Next::End => return false,
        }
        self.count_busy();
        if self.under_way() == 0 {
            let error = TaskError::internal("the kernel returned without a result for this task");
            self.ledger.fail_all(&error);
        }
        self.ledger.forget_ended();
        true
    }

    fn next(&self) -> Next {
        let Shared { queue, stats, facts, .. } = &*self.shared;
        let dropped = |error: &TaskError| stats.failed(error);
        loop {
            if self.under_way() == 0 {
                let batch = queue.next_batch(facts.batch_flops, dropped);
                return batch.map_or(Next::End, Next::Begin);
            }
            if self.device.is_ready() {
                return Next::Finish;
            }
            if self.device.is_full() {
                std::thread::sleep(MOMENT);
            } else if let Some(batch) = queue.try_next_batch(facts.batch_flops, MOMENT, dropped) {
                return Next::Begin(batch);
            }
            if self.progressed.elapsed() > self.device.patience() {
                return Next::Abandon;
            }
        }
    }

    fn under_way(&self) -> usize {
        if self.abandoned { 0 } else { self.device.under_way() }
    }

    fn begin(&mut self, batch: Vec<QueuedTask>) {
        if self.under_way() == 0 {
            self.progressed = Instant::now();
        }
        if let Some(error) = self.shared.lost() {
            for queued in batch {
                self.ledger.fail(split(queued).1, error.clone());
            }
            return;
        }
        self.shared.stats.batches.fetch_add(1, Ordering::Relaxed);
        let (mut held, mut tasks) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for (one, running) in batch.into_iter().map(split) {
            match operands(&one) {
                Ok(_) => {
                    held.push(one);
                    tasks.push(running);
                }
                Err(error) => self.ledger.fail(running, error),
            }
        }
        if let Err(refused) = self.offer(&held, tasks) {
            self.offer_rest(held, refused);
        }
    }

    /// Hands tasks to the device as one batch.
    fn offer(&mut self, held: &[Held], tasks: Vec<Running>) -> Result<(), Refused> {
        let batch: Result<Vec<_>, _> = held.iter().map(kernel_task).collect();
        let batch = match batch {
            Ok(batch) if batch.is_empty() => return Ok(()),
            Ok(batch) => batch,
            Err(error) => return Err(Refused { error, tasks }),
        };
        self.number += 1;
        self.ledger.open(self.number, tasks);
        let (device, ledger, number) = (&mut self.device, &self.ledger, self.number);
        let outcome =
            catch_unwind(AssertUnwindSafe(|| device.begin(number, batch, &|ended| ledger.end(ended))));
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Refused { error, tasks: self.ledger.close(number) }),
            Err(_) => {
                self.panicked();
                Ok(())
            }
        }
    }

    /// Ends those tasks of a refused batch that are at fault, and offers the others once more. Where none is, all end.
    fn offer_rest(&mut self, held: Vec<Held>, Refused { error, tasks }: Refused) {
        // A device that refuses what it has partly computed breaks its word; nobody knows whose the rest is then.
        if error.fatal || tasks.len() != held.len() {
            return self.fail(Refused { error, tasks });
        }
        let (mut rest, mut rest_tasks) = (Vec::new(), Vec::new());
        let whole = held.len();
        for (one, running) in held.into_iter().zip(tasks) {
            match self.check(&one) {
                Ok(()) => {
                    rest.push(one);
                    rest_tasks.push(running);
                }
                Err(own) => self.ledger.fail(running, own.error),
            }
        }
        if rest.len() == whole {
            return self.fail(Refused { error, tasks: rest_tasks });
        }
        if let Err(refused) = self.offer(&rest, rest_tasks) {
            self.fail(refused);
        }
    }

    fn check(&self, held: &Held) -> Result<(), DeviceError> {
        let checked =
            catch_unwind(AssertUnwindSafe(|| kernel_task(held).and_then(|task| self.device.check(&task))));
        checked.unwrap_or_else(|_| Err(DeviceError { error: TaskError::internal(PANICKED), fatal: false }))
    }

    fn fail(&self, Refused { error: DeviceError { error, fatal }, tasks }: Refused) {
        if fatal {
            self.shared.lose(&error);
        }
        for running in tasks {
            self.ledger.fail(running, error.clone());
        }
    }

    fn finish(&mut self) {
        let (device, ledger) = (&mut self.device, &self.ledger);
        let outcome = catch_unwind(AssertUnwindSafe(|| device.finish(&|ended| ledger.end(ended))));
        self.progressed = Instant::now();
        if outcome.is_err() {
            self.panicked();
        }
    }

    /// Ends every task in hand, since it is not known whose the panic was.
    fn panicked(&mut self) {
        let error = TaskError::internal(PANICKED);
        match self.device.survives_panic() {
            true => self.ledger.fail_all(&error),
            false => self.abandon(&error),
        }
    }

    /// Calls the device no more, and ends every task in hand.
    fn abandon(&mut self, error: &TaskError) {
        self.abandoned = true;
        self.shared.lose(error);
        self.ledger.fail_all(error);
    }

    fn count_busy(&mut self) {
        if self.abandoned {
            return;
        }
        if let Some(busy) = self.device.busy_seconds() {
            // Durations are never negative; a count that is would be a defect of the device's, and is not counted.
            let more = Duration::try_from_secs_f64(busy - self.counted).unwrap_or_default();
            self.shared.stats.computed_for(more);
            self.counted = busy;
        }
    }
}

fn split(QueuedTask { task, arrived, .. }: QueuedTask) -> (Held, Running) {
    let ArrivedTask { header, inputs, lease, reply, .. } = task;
    let header = Arc::new(header);
    let held = Held { header: Arc::clone(&header), inputs, _lease: lease.clone() };
    (held, Running { header, arrived, reply, _lease: lease })
}

fn kernel_task(held: &Held) -> Result<KernelTask<'_>, DeviceError> {
    let header = &*held.header;
    let operands = operands(held).map_err(|error| DeviceError { error, fatal: false })?;
    let results = Results::zeroed(&header.task, &header.geometry, header.direction);
    Ok(KernelTask { geometry: header.geometry, task: &header.task, operands, results })
}

fn operands(Held { header, inputs, .. }: &Held) -> Result<Operands<'_>, TaskError> {
    let (q_span, kv_span) = (header.task.q(), header.task.kv());
    fn view<'a>(name: &str, tensor: &'a TensorSlice, span: Span) -> Result<AnyTensor<'a>, TaskError> {
        let missing =
            || TaskError::invalid(format!("tensor {name} holds {}, the task needs {span}", tensor.tokens()));
        tensor.view_of(span).ok_or_else(missing)
    }
    let q = view("q", &inputs.q, q_span)?;
    let k = view("k", &inputs.k, kv_span)?;
    let v = view("v", &inputs.v, kv_span)?;
    match (header.direction, &inputs.gradient) {
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
