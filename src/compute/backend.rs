//! What computes a batch. Another backend is added here and nowhere else: a [`Backend`], and a line in [`open`].

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, ensure};
use outboard_attention::DType;
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, KernelTask, Results};

use crate::cores;
use crate::cuda::CudaArgs;
use crate::device::Device;

/// How to use a CPU, where the command line says so.
#[derive(Clone, Copy, Debug)]
pub(super) struct CpuOptions {
    pub(super) threads: Option<u16>,
    pub(super) isa: Option<Isa>,
}

/// A device that computes batches of tasks.
pub(super) trait Backend {
    /// The device, in words.
    fn describe(&self) -> String;

    /// What decides the bits of tasks of this element type: equal ids give equal bits.
    fn numerics_id(&self, dtype: DType) -> String;

    /// Computes a batch, and gives each task's results in the order of the batch.
    fn run(&mut self, batch: Vec<KernelTask<'_>>) -> anyhow::Result<Vec<Results>>;
}

/// Gets a device ready.
pub(super) fn open(device: Device, cpu: CpuOptions, cuda: &CudaArgs) -> anyhow::Result<Box<dyn Backend>> {
    match device {
        Device::Cpu => Ok(Box::new(Cpu::new(cpu)?)),
        #[cfg(feature = "cuda")]
        Device::Cuda(number) => Ok(Box::new(Cuda(cuda.open(number)?))),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => {
            let _ = cuda;
            Err(crate::cuda::absent(device))
        }
    }
}

#[cfg(feature = "cuda")]
struct Cuda(outboard_cuda::CudaKernel);

#[cfg(feature = "cuda")]
impl Backend for Cuda {
    fn describe(&self) -> String {
        format!("{}, cuDNN {}", self.0.device(), self.0.cudnn_version())
    }

    fn numerics_id(&self, dtype: DType) -> String {
        self.0.numerics_id(dtype)
    }

    fn run(&mut self, batch: Vec<KernelTask<'_>>) -> anyhow::Result<Vec<Results>> {
        in_order(batch.len(), |done| Ok(self.0.run(batch, done)?))
    }
}

struct Cpu(CpuKernel);

impl Cpu {
    fn new(CpuOptions { threads, isa }: CpuOptions) -> anyhow::Result<Cpu> {
        let isa = isa.unwrap_or_else(Isa::detect);
        let has = || Isa::available().iter().map(Isa::to_string).collect::<Vec<_>>().join(", ");
        ensure!(isa.is_available(), "--isa {isa} is not available on this machine, which has {}", has());
        let threads = match threads {
            Some(threads) => usize::from(threads),
            None => cores::available()?.len().max(1),
        };
        Ok(Cpu(CpuKernel::new(KernelConfig::new(isa, threads))?))
    }
}

impl Backend for Cpu {
    fn describe(&self) -> String {
        let KernelConfig { isa, threads, .. } = self.0.config();
        format!("cpu ({isa}, {threads} threads)")
    }

    fn numerics_id(&self, dtype: DType) -> String {
        self.0.numerics_id(dtype)
    }

    fn run(&mut self, batch: Vec<KernelTask<'_>>) -> anyhow::Result<Vec<Results>> {
        in_order(batch.len(), |done| Ok(self.0.run(batch, done)?))
    }
}

/// What `run` hands to its callback for tasks `0..tasks`, in whatever order and from whatever threads, in order.
fn in_order(
    tasks: usize,
    run: impl FnOnce(&(dyn Fn(usize, Results) + Sync)) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Results>> {
    let finished: Mutex<Vec<Option<Results>>> = Mutex::new((0..tasks).map(|_| None).collect());
    run(&|index, results| {
        if let Some(place) = finished.lock().unwrap_or_else(PoisonError::into_inner).get_mut(index) {
            *place = Some(results);
        }
    })?;
    let finished = finished.into_inner().unwrap_or_else(PoisonError::into_inner);
    let each = finished.into_iter().enumerate();
    each.map(|(n, results)| results.with_context(|| format!("the device gave no result for task {n}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(lse: f32) -> Results {
        Results::Forward { o: Vec::new(), lse: vec![lse] }
    }

    #[test]
    fn results_are_put_in_order_and_none_is_made_up() {
        let all = in_order(2, |done| {
            done(1, forward(1.0));
            done(0, forward(0.0));
            Ok(())
        });
        assert_eq!(all.unwrap(), [forward(0.0), forward(1.0)]);
        let one = in_order(2, |done| {
            done(0, forward(0.0));
            done(7, forward(7.0));
            Ok(())
        });
        assert!(one.unwrap_err().to_string().contains("task 1"));
    }
}
