//! How fast a device is.

use std::collections::VecDeque;
use std::time::Instant;

use outboard_attention::kernel::KernelTask;

use crate::gpu::memory::{self, DeviceMemory, PinnedMemory};
use crate::gpu::{driver, settle};
use crate::kernel::{LANES, Wave};
use crate::wave::{Lane, RunningWave, Streams};
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
    /// From the start of each upload to the ends of upload, kernels and download.
    pub way_seconds: Vec<[f64; 3]>,
}

/// Bytes a second between pinned memory and the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Transfers {
    /// To the device.
    pub up: f64,
    /// From the device.
    pub down: f64,
    /// Both at once, together.
    pub both: f64,
}

impl CudaKernel {
    /// Computes a batch `times` times over from operands that lie in pinned memory. Each time they are uploaded, and
    /// results are downloaded and thrown away, while the batches before and after are computed.
    ///
    /// # Errors
    /// As [`CudaKernel::run`], and [`CudaError::NotOneWave`].
    pub fn measure(&mut self, batch: Vec<KernelTask<'_>>, times: usize) -> Result<Measured, CudaError> {
        let waves = self.waves(&batch)?;
        let [Wave { layout, .. }] = &waves[..] else {
            return Err(CudaError::NotOneWave { waves: waves.len() });
        };
        let tasks: Vec<&KernelTask<'_>> = batch.iter().collect();
        let mut ready = Vec::new();
        for _ in 0..LANES {
            let lane = Lane::new(&self.streams.context)?;
            ready.push(self.stage(lane, &tasks, layout.clone()).map_err(|(_, error)| error)?);
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
                measured.add(&wave)?;
                ready.push(wave.again());
            }
            if let Some(wave) = ready.pop() {
                let start = Instant::now();
                running.push_back(wave.start(&mut self.streams).map_err(|(_, error)| error)?);
                measured.enqueue_seconds.push(start.elapsed().as_secs_f64());
            }
        }
        for wave in &running {
            wave.wait()?;
        }
        // Before the waves go: freeing pinned memory takes far longer than computing.
        measured.seconds = begun.elapsed().as_secs_f64();
        for wave in &running {
            measured.add(wave)?;
        }
        Ok(measured)
    }

    /// Copies `bytes` up, down, and both ways at once, a few times each.
    ///
    /// # Errors
    /// [`CudaError::Memory`] and [`CudaError::Driver`].
    pub fn measure_transfers(&mut self, bytes: usize) -> Result<Transfers, CudaError> {
        const TIMES: usize = 6;
        let Streams { context, upload, download, .. } = &self.streams;
        let mut hosts = [0; 2].map(|_| PinnedMemory::new(context));
        let mut devices = [0; 2].map(|_| DeviceMemory::new(context));
        for (host, device) in hosts.iter_mut().zip(&mut devices) {
            host.reserve(bytes)?;
            device.reserve(bytes)?;
        }
        let [source, target] = &mut hosts;
        let mut rate = |up: bool, down: bool| -> Result<f64, CudaError> {
            let mut begun = Instant::now();
            for time in 0..TIMES + 1 {
                if time == 1 {
                    context.synchronize().map_err(driver("cuCtxSynchronize"))?;
                    begun = Instant::now();
                }
                // SAFETY: all four memories hold `bytes`, and stay until the device is through, below.
                unsafe {
                    if up {
                        memory::upload(upload, source, &devices[0], bytes)?;
                    }
                    if down {
                        memory::download(download, &devices[1], target, bytes)?;
                    }
                }
            }
            context.synchronize().map_err(driver("cuCtxSynchronize"))?;
            let ways = usize::from(up) + usize::from(down);
            Ok((TIMES * ways * bytes) as f64 / begun.elapsed().as_secs_f64())
        };
        let rates = [(true, false), (false, true), (true, true)].map(|(up, down)| rate(up, down));
        // A failed copy may have left others under way, and the memory goes now.
        settle(context)?;
        let [up, down, both] = rates;
        Ok(Transfers { up: up?, down: down?, both: both? })
    }
}

impl Measured {
    fn add(&mut self, wave: &RunningWave) -> Result<(), CudaError> {
        self.kernel_seconds.push(wave.seconds()?);
        self.way_seconds.push(wave.way()?);
        Ok(())
    }
}
