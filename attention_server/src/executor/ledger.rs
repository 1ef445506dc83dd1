//! Which tasks are in hand, and how each ends: once, whatever the device does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use outboard_attention::kernel::Results;
use outboard_proto::{TaskError, TaskHeader};
use outboard_transport::{ByteLease, Reply, TaskOutcome};

use crate::device::Ended;
use crate::engine::Shared;

/// A task in the device's hands.
pub(super) struct Running {
    pub(super) header: Arc<TaskHeader>,
    pub(super) arrived: Instant,
    pub(super) reply: Reply,
    /// Freed when the task has ended.
    pub(super) _lease: ByteLease,
}

/// The tasks in hand, by batch. The device's threads end them.
pub(super) struct Ledger {
    shared: Arc<Shared>,
    batches: BTreeMap<u64, Batch>,
    /// When the last task ended. A task's time starts there, or with its batch if that came later: together the tasks take
    /// what the device took, though they overlap.
    previous_end: Mutex<Instant>,
    /// Whether the counters have the tasks' own time as that of the device.
    by_wall_clock: bool,
}

struct Batch {
    begun: Instant,
    tasks: Vec<Mutex<Option<Running>>>,
    left: AtomicUsize,
}

impl Ledger {
    pub(super) fn new(shared: Arc<Shared>, by_wall_clock: bool) -> Ledger {
        Ledger { shared, batches: BTreeMap::new(), previous_end: Mutex::new(Instant::now()), by_wall_clock }
    }

    /// Notes a batch that begins now.
    pub(super) fn open(&mut self, number: u64, tasks: Vec<Running>) {
        let left = AtomicUsize::new(tasks.len());
        let tasks = tasks.into_iter().map(|running| Mutex::new(Some(running))).collect();
        self.batches.insert(number, Batch { begun: Instant::now(), tasks, left });
    }

    /// Takes back the tasks of a batch that have not ended.
    pub(super) fn close(&mut self, number: u64) -> Vec<Running> {
        let batch = self.batches.remove(&number);
        let tasks = batch.into_iter().flat_map(|batch| batch.tasks);
        tasks.filter_map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Ends a task. One that is not in hand has ended before.
    pub(super) fn end(&self, Ended { batch, index, results }: Ended) {
        let Some(batch) = self.batches.get(&batch) else { return };
        let Some(running) = batch.tasks.get(index).and_then(|slot| lock(slot).take()) else { return };
        batch.left.fetch_sub(1, Ordering::Relaxed);
        match results {
            Ok(results) => self.succeed(running, results, batch.begun),
            Err(error) => {
                if error.fatal {
                    self.shared.lose(&error.error);
                }
                self.fail(running, error.error);
            }
        }
    }

    /// Ends a task without a result.
    pub(super) fn fail(&self, running: Running, error: TaskError) {
        let error = error.context(running.header.name());
        self.shared.stats.failed(&error);
        running.reply.send(Err(error));
        self.shared.queue.ended(1);
    }

    /// Ends every task in hand without a result.
    pub(super) fn fail_all(&mut self, error: &TaskError) {
        let numbers: Vec<u64> = self.batches.keys().copied().collect();
        for running in numbers.into_iter().flat_map(|number| self.close(number)).collect::<Vec<_>>() {
            self.fail(running, error.clone());
        }
    }

    /// Forgets batches whose tasks have all ended.
    pub(super) fn forget_ended(&mut self) {
        self.batches.retain(|_, batch| batch.left.load(Ordering::Relaxed) > 0);
    }

    fn succeed(&self, running: Running, results: Results, batch_begun: Instant) {
        let Shared { facts, stats, queue, .. } = &*self.shared;
        let header = Arc::clone(&running.header);
        let dtype = header.geometry.dtype();
        let Some(numerics_id) = facts.numerics_id(dtype).cloned() else {
            let error = TaskError::internal(format!("{dtype} was computed without a numerics id"));
            return self.fail(running, error);
        };
        let end = Instant::now();
        let begun = std::mem::replace(&mut *lock(&self.previous_end), end).max(batch_begun);
        let compute = end.saturating_duration_since(begun);
        stats.computed(header.direction, header.task.cells());
        if self.by_wall_clock {
            stats.computed_for(compute);
        }
        let queued = begun.saturating_duration_since(running.arrived);
        running.reply.send(Ok(TaskOutcome { results, numerics_id, queued, compute }));
        queue.ended(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole at every moment, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
