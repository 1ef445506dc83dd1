//! The engine: a task handler that any transport can plug into, in front of the executor.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use outboard_attention::DType;
use outboard_proto::v1::GetServerStatsResponse;
use outboard_proto::{TaskError, TaskHeader};
use outboard_transport::{ArrivedTask, ByteBudget, TaskHandler};

use crate::device::{self, Facts, Opened};
use crate::queue::TaskQueue;
use crate::stats::Stats;
use crate::{EngineOptions, ServerError, executor};

/// What the engine and its executor share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) queue: TaskQueue,
    pub(crate) stats: Stats,
    pub(crate) facts: Facts,
    memory_bytes: u64,
    budget: ByteBudget,
    draining: AtomicBool,
    lost: OnceLock<TaskError>,
}

/// A running engine. Clones share it; its executor ends once [`Engine::close`] was called and no task is left.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Shared {
    /// Takes no more tasks, since the device computes none any more.
    pub(crate) fn lose(&self, error: &TaskError) {
        if self.lost.set(error.clone()).is_ok() {
            let device = &self.facts.name;
            tracing::error!(device, %error, "the device is lost; the server drains, and refuses the tasks it holds");
        }
        self.draining.store(true, Ordering::Release);
    }

    /// What tasks are refused with when the device is lost.
    pub(crate) fn lost(&self) -> Option<TaskError> {
        let error = self.lost.get()?;
        let device = &self.facts.name;
        Some(TaskError::unavailable(format!(
            "the server has lost {device}: {error}; send the task to another"
        )))
    }
}

impl Engine {
    /// Starts the executor, which opens the device. That may take a GPU seconds.
    ///
    /// # Errors
    /// [`ServerError`] when the device cannot be opened, or the thread not be started.
    pub fn start(options: &EngineOptions) -> Result<Engine, ServerError> {
        let task_bytes = options.memory_bytes - options.workspace_bytes();
        let (memory_bytes, options) = (options.memory_bytes, options.clone());
        Engine::start_on(move || device::open(&options), memory_bytes, task_bytes)
    }

    /// Starts an engine on whatever `open` gives, with `task_bytes` of `memory_bytes` for buffers of tasks.
    pub(crate) fn start_on(
        open: impl FnOnce() -> Result<Opened, ServerError> + Send + 'static,
        memory_bytes: u64,
        task_bytes: u64,
    ) -> Result<Engine, ServerError> {
        let share = move |facts| Shared {
            queue: TaskQueue::default(),
            stats: Stats::default(),
            facts,
            memory_bytes,
            budget: ByteBudget::new(task_bytes),
            draining: AtomicBool::new(false),
            lost: OnceLock::new(),
        };
        Ok(Engine { shared: executor::start(open, share)? })
    }

    /// The device, for people: "cpu", or such as "cuda:0 NVIDIA H200".
    pub fn device(&self) -> &str {
        &self.shared.facts.name
    }

    /// Threads that compute, where a CPU does.
    pub fn threads(&self) -> Option<usize> {
        self.shared.facts.threads
    }

    /// The element types that it computes, each with its numerics id.
    pub fn numerics(&self) -> impl Iterator<Item = (DType, &str)> {
        self.shared.facts.numerics_ids.iter().map(|(dtype, id)| (*dtype, &**id))
    }

    /// The memory of [`EngineOptions::memory_bytes`].
    pub fn memory_bytes(&self) -> u64 {
        self.shared.memory_bytes
    }

    /// Why the device computes no task any more, if it was lost. The engine drains then.
    pub fn lost(&self) -> Option<&TaskError> {
        self.shared.lost.get()
    }

    /// Refuses new tasks from now on; those in hand run on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// True after [`Engine::drain`].
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }

    /// Tasks waiting or running.
    pub fn tasks(&self) -> usize {
        self.shared.queue.len()
    }

    /// Waits until no task is waiting or running.
    ///
    /// # Errors
    /// [`ServerError::DrainTimeout`] when that takes longer than `timeout`.
    pub async fn idle(&self, timeout: Duration) -> Result<(), ServerError> {
        let start = Instant::now();
        loop {
            let tasks = self.tasks();
            if tasks == 0 {
                return Ok(());
            }
            if start.elapsed() > timeout {
                return Err(ServerError::DrainTimeout { tasks, seconds: timeout.as_secs_f64() });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends the executor once no task is left.
    pub fn close(&self) {
        self.drain();
        self.shared.queue.close();
        self.shared.budget.close();
    }
}

impl TaskHandler for Engine {
    fn numerics_id(&self, dtype: DType) -> Option<&str> {
        self.shared.facts.numerics_id(dtype).map(|id| &**id)
    }

    fn budget(&self) -> &ByteBudget {
        &self.shared.budget
    }

    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError> {
        if let Some(error) = self.shared.lost() {
            return Err(error);
        }
        if self.is_draining() {
            return Err(TaskError::unavailable("the server is draining; send the task to another"));
        }
        self.shared.facts.admission.admit(header)
    }

    fn submit(&self, task: ArrivedTask) {
        self.shared.queue.push(task);
    }

    fn count_bytes(&self, received: u64, sent: u64) {
        self.shared.stats.bytes_in.fetch_add(received, Ordering::Relaxed);
        self.shared.stats.bytes_out.fetch_add(sent, Ordering::Relaxed);
    }

    fn count_failed(&self, error: &TaskError) {
        self.shared.stats.failed(error);
    }

    fn stats(&self) -> GetServerStatsResponse {
        let Shared { stats, budget, .. } = &*self.shared;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        GetServerStatsResponse {
            numerics_ids: self.numerics().map(|(_, id)| id.to_owned()).collect(),
            forward_tasks: load(&stats.forward_tasks),
            backward_tasks: load(&stats.backward_tasks),
            cells: load(&stats.cells),
            batches: load(&stats.batches),
            failed_tasks: load(&stats.failed_tasks),
            cancelled_tasks: load(&stats.cancelled_tasks),
            bytes_in: load(&stats.bytes_in),
            bytes_out: load(&stats.bytes_out),
            compute_seconds: load(&stats.compute_nanos) as f64 / 1e9,
            memory_used_bytes: budget.used(),
            memory_limit_bytes: budget.limit(),
            draining: self.is_draining(),
        }
    }
}
