//! The CPU: computes a batch before it returns, on its own threads.

use outboard_attention::DType;
use outboard_attention::kernel::{CpuKernel, KernelConfig, KernelTask, task_workspace};
use outboard_proto::{ErrorKind, TaskError, TaskHeader};

use super::{Admission, Device, DeviceError, Ended, Facts, OnEnd, Opened};
use crate::{CpuOptions, ServerError};

struct Cpu(CpuKernel);

#[derive(Debug)]
struct Limits(KernelConfig);

pub(super) fn open(options: &CpuOptions, workspace_bytes: u64) -> Result<Opened, ServerError> {
    let CpuOptions { isa, threads, batch_flops_per_thread } = *options;
    let workspace_bytes = usize::try_from(workspace_bytes).unwrap_or(usize::MAX);
    let config = KernelConfig { isa, threads, workspace_bytes };
    let kernel = CpuKernel::new(config).map_err(|e| ServerError::Kernel(e.to_string()))?;
    let facts = Facts {
        name: "cpu".to_owned(),
        threads: Some(threads),
        numerics_ids: DType::ALL.map(|dtype| (dtype, kernel.numerics_id(dtype).into())).into(),
        batch_flops: batch_flops_per_thread * threads as f64,
        admission: Box::new(Limits(config)),
    };
    Ok(Opened { device: Box::new(Cpu(kernel)), facts })
}

impl Admission for Limits {
    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError> {
        let KernelConfig { isa, threads, workspace_bytes: limit } = self.0;
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
}

impl Device for Cpu {
    fn begin(
        &mut self,
        number: u64,
        batch: Vec<KernelTask<'_>>,
        ended: OnEnd<'_>,
    ) -> Result<(), DeviceError> {
        let done = |index, results| ended(Ended { batch: number, index, results: Ok(results) });
        self.0.run(batch, &done).map_err(|error| {
            let error = TaskError::new(ErrorKind::Unsupported, error.to_string());
            DeviceError { error, fatal: false }
        })
    }

    fn check(&self, task: &KernelTask<'_>) -> Result<(), DeviceError> {
        task.check_tensors(0)
            .map_err(|error| DeviceError { error: TaskError::invalid(error.to_string()), fatal: false })
    }

    fn survives_panic(&self) -> bool {
        // A batch begins with nothing of the one before.
        true
    }
}
