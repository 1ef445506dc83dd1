//! What computes, as the executor drives it.
//!
//! A [`Device`] belongs to the executor's thread, which opens it too. What other threads must know of it are its
//! [`Facts`].

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use outboard_attention::DType;
use outboard_attention::kernel::{KernelTask, Results};
use outboard_proto::{TaskError, TaskHeader};

use crate::{DeviceOptions, EngineOptions, ServerError};

/// A device, and what is known of it.
pub(crate) struct Opened {
    pub(crate) device: Box<dyn Device>,
    pub(crate) facts: Facts,
}

/// What does not change while a device is open.
#[derive(Debug)]
pub(crate) struct Facts {
    /// For people, such as "cpu" or "cuda:0 NVIDIA H200".
    pub(crate) name: String,
    /// Threads of a CPU that compute.
    pub(crate) threads: Option<usize>,
    /// The element types that it computes, each with its numerics id.
    pub(crate) numerics_ids: Vec<(DType, Arc<str>)>,
    /// Work of one batch, in FLOPs.
    pub(crate) batch_flops: f64,
    pub(crate) admission: Box<dyn Admission>,
}

/// Says from any thread, by its header alone, whether a task will be computed.
pub(crate) trait Admission: fmt::Debug + Send + Sync {
    /// Refuses what the device cannot compute.
    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError>;
}

/// Computes batches. Where batches can overlap, several are under way at once, in waves that end in order.
pub(crate) trait Device {
    /// Puts a batch on its way, or computes it at once. `ended` is called once for each of its tasks, now or within a
    /// later call, and may be called from other threads while this call lasts. Operands are not read once it returned.
    ///
    /// # Errors
    /// Why none of the batch is on its way.
    fn begin(&mut self, number: u64, batch: Vec<KernelTask<'_>>, ended: OnEnd<'_>)
    -> Result<(), DeviceError>;

    /// Why a task makes [`Device::begin`] refuse a whole batch, if it is the task's own fault.
    fn check(&self, _task: &KernelTask<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Waves under way.
    fn under_way(&self) -> usize {
        0
    }

    /// True when [`Device::finish`] does not wait.
    fn is_ready(&self) -> bool {
        false
    }

    /// True when another batch had to wait for a wave to end.
    fn is_full(&self) -> bool {
        false
    }

    /// Ends the tasks of the oldest wave under way, and waits for it.
    fn finish(&mut self, _ended: OnEnd<'_>) {}

    /// How long no wave may end while some are under way; a device that takes longer is lost.
    fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }

    /// Seconds computed so far, where the device counts them itself.
    fn busy_seconds(&self) -> Option<f64> {
        None
    }

    /// Whether it computes on after a panic.
    fn survives_panic(&self) -> bool {
        false
    }
}

/// Takes a task's end.
pub(crate) type OnEnd<'a> = &'a (dyn Fn(Ended) + Sync);

/// The end of a task: the number of its batch, its place there, and its results.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) batch: u64,
    pub(crate) index: usize,
    pub(crate) results: Result<Results, DeviceError>,
}

/// Why tasks have no results.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{error}")]
pub(crate) struct DeviceError {
    pub(crate) error: TaskError,
    /// The device will not compute anything again.
    pub(crate) fatal: bool,
}

impl Facts {
    /// The numerics id of an element type, `None` when the device does not compute it.
    pub(crate) fn numerics_id(&self, dtype: DType) -> Option<&Arc<str>> {
        self.numerics_ids.iter().find(|(of, _)| *of == dtype).map(|(_, id)| id)
    }
}

/// Opens what `options` name. To be called on the thread that will use it.
pub(crate) fn open(options: &EngineOptions) -> Result<Opened, ServerError> {
    match &options.device {
        DeviceOptions::Cpu(cpu) => cpu::open(cpu, options.workspace_bytes()),
        #[cfg(feature = "cuda")]
        DeviceOptions::Cuda(cuda) => cuda::open(cuda),
    }
}
