//! Counters of a server since it started.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use outboard_attention::Direction;
use outboard_proto::{ErrorKind, TaskError};

/// Counters that many threads add to. Each stands alone: no two are read as one.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) forward_tasks: AtomicU64,
    pub(crate) backward_tasks: AtomicU64,
    pub(crate) cells: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) failed_tasks: AtomicU64,
    pub(crate) cancelled_tasks: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    /// Of a CPU the wall time of its batches, of a GPU the time of its kernels.
    pub(crate) compute_nanos: AtomicU64,
}

impl Stats {
    pub(crate) fn computed(&self, direction: Direction, cells: u64) {
        let tasks = match direction {
            Direction::Forward => &self.forward_tasks,
            Direction::Backward => &self.backward_tasks,
        };
        tasks.fetch_add(1, Ordering::Relaxed);
        self.cells.fetch_add(cells, Ordering::Relaxed);
    }

    /// Adds to the time that the device has computed.
    pub(crate) fn computed_for(&self, time: Duration) {
        self.compute_nanos.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, error: &TaskError) {
        let counter = match error.kind {
            ErrorKind::Cancelled => &self.cancelled_tasks,
            _ => &self.failed_tasks,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
