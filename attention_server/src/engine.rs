//! The engine: a task handler that any transport can plug into, in front of the executor.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outboard_attention::DType;
use outboard_attention::kernel::{CpuKernel, KernelConfig, task_workspace};
use outboard_proto::v1::GetServerStatsResponse;
use outboard_proto::{ErrorKind, TaskError, TaskHeader};
use outboard_transport::{ArrivedTask, ByteBudget, TaskHandler};

use crate::queue::TaskQueue;
use crate::stats::Stats;
use crate::{EngineOptions, ServerError, executor};

/// What the engine and its executor share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) queue: TaskQueue,
    pub(crate) stats: Stats,
    numerics_ids: Vec<(DType, Arc<str>)>,
    pub(crate) batch_flops: f64,
    kernel: KernelConfig,
    budget: ByteBudget,
    draining: AtomicBool,
}

impl Shared {
    /// The numerics id of an element type, `None` when the kernel does not compute it.
    pub(crate) fn numerics_id(&self, dtype: DType) -> Option<&Arc<str>> {
        self.numerics_ids.iter().find(|(of, _)| *of == dtype).map(|(_, id)| id)
    }
}

/// A running engine. Clones share it; its executor ends once [`Engine::close`] was called and no task is left.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Starts the executor.
    ///
    /// # Errors
    /// [`ServerError::Kernel`] and [`ServerError::Thread`].
    pub fn start(options: &EngineOptions) -> Result<Engine, ServerError> {
        let workspace_bytes = usize::try_from(options.workspace_bytes()).unwrap_or(usize::MAX);
        let config = KernelConfig { isa: options.isa, threads: options.threads, workspace_bytes };
        let kernel = CpuKernel::new(config).map_err(|e| ServerError::Kernel(e.to_string()))?;
        let shared = Arc::new(Shared {
            queue: TaskQueue::default(),
            stats: Stats::default(),
            numerics_ids: DType::ALL.map(|dtype| (dtype, kernel.numerics_id(dtype).into())).into(),
            kernel: config,
            batch_flops: options.batch_flops_per_thread * options.threads as f64,
            budget: ByteBudget::new(options.memory_bytes - options.workspace_bytes()),
            draining: AtomicBool::new(false),
        });
        // The thread owns itself: it ends by the queue's closing, and holds only what it shares.
        executor::start(kernel, Arc::clone(&shared))?;
        Ok(Engine { shared })
    }

    /// The element types that it computes, each with its numerics id.
    pub fn numerics(&self) -> impl Iterator<Item = (DType, &str)> {
        self.shared.numerics_ids.iter().map(|(dtype, id)| (*dtype, &**id))
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
        self.shared.numerics_id(dtype).map(|id| &**id)
    }

    fn budget(&self) -> &ByteBudget {
        &self.shared.budget
    }

    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError> {
        if self.is_draining() {
            return Err(TaskError::unavailable("the server is draining; send the task to another"));
        }
        let KernelConfig { isa, threads, workspace_bytes: limit } = self.shared.kernel;
        let needed = task_workspace(isa, threads, &header.geometry, header.direction, &header.task);
        // A batch of any tasks then fits: it takes at most twice as much as one of them.
        if needed > limit / 2 {
            let message = format!(
                "the task needs {needed} bytes of working memory, this server has {} for one (an eighth of its memory); cut the \
                 task into fewer keys, or give the server more memory",
                limit / 2
            );
            return Err(TaskError::new(ErrorKind::TooLarge, message));
        }
        Ok(())
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
