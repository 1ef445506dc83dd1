//! How fast a device is.

use std::collections::VecDeque;
use std::time::Instant;

use outboard_attention::kernel::KernelTask;

use crate::kernel::LANES;
use crate::wave::{Lane, RunningWave};
use crate::{CudaError, CudaKernel};

/// What [`CudaKernel::measure`] measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// From the first start to the last end.
    pub seconds: f64,
    /// Of the kernels, each time: those that move data included.
    pub kernel_seconds: Vec<f64>,
    /// Of the host, each time, to enqueue everything.
    pub enqueue_seconds: Vec<f64>,
}

impl CudaKernel {
    /// Computes a batch `times` times over from operands that lie in pinned memory. Each time they are uploaded, and
    /// results are downloaded and thrown away, while the batches before and after are computed.
    ///
    /// # Errors
    /// As [`CudaKernel::run`]; [`CudaError::TooLarge`] too when the batch needs more than one wave.
    pub fn measure(&mut self, batch: Vec<KernelTask<'_>>, times: usize) -> Result<Measured, CudaError> {
        if self.waves(&batch)?.len() != 1 {
            let limit = self.config.batch_bytes;
            return Err(CudaError::TooLarge { index: 0, needed: limit.saturating_add(1), limit });
        }
        let tasks: Vec<_> = batch.into_iter().enumerate().collect();
        let mut ready = Vec::new();
        for _ in 0..LANES {
            let lane = Lane::new(&self.streams.context)?;
            ready.push(self.stage(lane, &tasks).map_err(|(_, error)| error)?);
        }
        let mut measured = Measured::default();
        let mut running: VecDeque<RunningWave> = VecDeque::new();
        let mut begun = Instant::now();
        // The first round through all lanes warms up, and is not counted.
        for round in 0..times + LANES {
            if round == LANES {
                while let Some(wave) = running.pop_front() {
                    wave.wait()?;
                    ready.push(wave.again());
                }
                measured = Measured::default();
                begun = Instant::now();
            }
            if ready.is_empty()
                && let Some(wave) = running.pop_front()
            {
                wave.wait()?;
                measured.kernel_seconds.push(wave.seconds()?);
                ready.push(wave.again());
            }
            if let Some(wave) = ready.pop() {
                let start = Instant::now();
                running.push_back(wave.start(&mut self.streams).map_err(|(_, error)| error)?);
                measured.enqueue_seconds.push(start.elapsed().as_secs_f64());
            }
        }
        while let Some(wave) = running.pop_front() {
            wave.wait()?;
            measured.kernel_seconds.push(wave.seconds()?);
        }
        measured.seconds = begun.elapsed().as_secs_f64();
        Ok(measured)
    }
}
