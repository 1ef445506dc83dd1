//! A GPU: batches overlap, so that one is computed while the next is uploaded and the one before downloaded.

use outboard_attention::DType;
use outboard_attention::kernel::KernelTask;
use outboard_cuda::{CudaError, CudaKernel};
use outboard_proto::{ErrorKind, TaskError, TaskHeader};

use super::{Admission, Device, DeviceError, Ended, Facts, OnEnd, Opened};
use crate::{CudaOptions, ServerError};

/// Waves that are worth having under way: one each uploaded, computed and downloaded.
const WAVES: usize = 3;

struct Cuda {
    kernel: CudaKernel,
}

#[derive(Debug)]
struct Limits;

pub(super) fn open(options: &CudaOptions) -> Result<Opened, ServerError> {
    let CudaOptions { kernel: config, batch_flops } = options;
    let kernel = CudaKernel::new(config.clone())?;
    let device = kernel.device();
    let facts = Facts {
        name: format!("cuda:{} {}", device.number, device.name),
        threads: None,
        numerics_ids: [DType::Bf16, DType::F16].map(|dtype| (dtype, kernel.numerics_id(dtype).into())).into(),
        batch_flops: *batch_flops,
        admission: Box::new(Limits),
    };
    Ok(Opened { device: Box::new(Cuda { kernel }), facts })
}

impl Admission for Limits {
    fn admit(&self, header: &TaskHeader) -> Result<(), TaskError> {
        // What a task takes of the device's memory is known to the kernel alone, which is asked when its turn comes.
        CudaKernel::supports(&header.geometry).map_err(|error| DeviceError::from(error).error)
    }
}

impl Device for Cuda {
    fn begin(
        &mut self,
        number: u64,
        batch: Vec<KernelTask<'_>>,
        ended: OnEnd<'_>,
    ) -> Result<(), DeviceError> {
        Ok(self.kernel.begin(number, batch, &mut |finished| ended(finished.into()))?)
    }

    fn check(&self, task: &KernelTask<'_>) -> Result<(), DeviceError> {
        Ok(self.kernel.check_task(task)?)
    }

    fn under_way(&self) -> usize {
        self.kernel.under_way()
    }

    fn is_ready(&self) -> bool {
        self.kernel.is_ready()
    }

    fn is_full(&self) -> bool {
        self.kernel.under_way() >= WAVES
    }

    fn finish(&mut self, ended: OnEnd<'_>) {
        self.kernel.finish(&mut |finished| ended(finished.into()));
    }

    fn busy_seconds(&self) -> Option<f64> {
        Some(self.kernel.busy_seconds())
    }
}

impl From<outboard_cuda::Finished> for Ended {
    fn from(finished: outboard_cuda::Finished) -> Ended {
        let outboard_cuda::Finished { batch, index, results } = finished;
        Ended { batch, index, results: results.map_err(DeviceError::from) }
    }
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> DeviceError {
        let kind = match &error {
            CudaError::DType { .. }
            | CudaError::Softcap { .. }
            | CudaError::Group { .. }
            | CudaError::Stage { .. }
            | CudaError::NoEngine { .. } => ErrorKind::Unsupported,
            CudaError::TooLarge { .. } | CudaError::TooManyPieces { .. } => ErrorKind::TooLarge,
            CudaError::Invalid(_) => ErrorKind::Invalid,
            // Not now: a client waits and comes again.
            CudaError::Memory { .. } => ErrorKind::Busy,
            // The device's trouble, not the task's. Clients that are told so use this server no more.
            error if error.is_fatal() => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        DeviceError { fatal: error.is_fatal(), error: TaskError::new(kind, error.to_string()) }
    }
}

#[cfg(test)]
mod tests {
    use outboard_attention::kernel::KernelError;

    use super::*;

    #[test]
    fn each_error_says_where_to_try_again_and_whether_the_device_is_lost() {
        let message = String::new;
        let cases = [
            (CudaError::DType { dtype: DType::F32 }, ErrorKind::Unsupported, false),
            (CudaError::Group { group: 256, max: 128 }, ErrorKind::Unsupported, false),
            (CudaError::TooLarge { index: 3, needed: 2, limit: 1 }, ErrorKind::TooLarge, false),
            (CudaError::Invalid(KernelError::NoThreads), ErrorKind::Invalid, false),
            (CudaError::Memory { bytes: 1, place: "device", message: message() }, ErrorKind::Busy, false),
            (
                CudaError::Driver { call: "call", message: message(), lost: true },
                ErrorKind::Unavailable,
                true,
            ),
            (CudaError::Driver { call: "call", message: message(), lost: false }, ErrorKind::Internal, false),
        ];
        for (error, kind, fatal) in cases {
            let mapped = DeviceError::from(error.clone());
            assert_eq!((mapped.error.kind, mapped.fatal), (kind, fatal), "{error}");
            assert_eq!(mapped.error.message, error.to_string());
        }
    }
}
