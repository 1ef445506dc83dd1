//! How fast a device is.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use outboard_attention::kernel::KernelTask;

use crate::gpu::memory::{self, DeviceMemory, PinnedMemory};
use crate::gpu::{driver, settle};
use crate::kernel::{LANES, Wave};
use crate::wave::{Lane, RunningWave, StagedWave, Streams};
use crate::{CudaError, CudaKernel};

/// How often [`CudaKernel::measure`] computes a batch: as often as both ask for.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// Times at least.
    pub times: usize,
    /// For so long at least.
    pub time: Duration,
}

/// Batches that are prepared to take the time of it, at most.
const PREPARED: usize = 50;

/// What [`CudaKernel::measure`] measured, in seconds.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// From the first start to the last end.
    pub seconds: f64,
    /// Of the kernels, each time: those that move data included.
    pub kernel_seconds: Vec<f64>,
    /// Of the host, each time, to enqueue everything.
    pub enqueue_seconds: Vec<f64>,
    /// Of the host, each time, to lay the batch out, look its plans up and write its tables.
    pub prepare_seconds: Vec<f64>,
    /// Of the kernels before cuDNN's, of cuDNN's, and of those after, of a few times more.
    pub part_seconds: Vec<[f64; 3]>,
    /// From the start of each upload to the ends of upload, kernels and download, of the same.
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
    /// Computes a batch again and again from operands that lie in pinned memory. Each time they are uploaded, and results
    /// are downloaded and thrown away, while the batches before and after are computed.
    ///
    /// # Errors
    /// As [`CudaKernel::run`], and [`CudaError::NotOneWave`].
    pub fn measure(&mut self, batch: Vec<KernelTask<'_>>, repeats: Repeats) -> Result<Measured, CudaError> {
        if self.under_way() > 0 {
            return Err(CudaError::Busy { waves: self.under_way() });
        }
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.measure_wave(&batch, repeats).inspect_err(|error| self.note(error))
    }

    fn measure_wave(&mut self, batch: &[KernelTask<'_>], repeats: Repeats) -> Result<Measured, CudaError> {
        let Wave { layout, .. } = self.only_wave(batch)?;
        let tasks: Vec<&KernelTask<'_>> = batch.iter().collect();
        let mut ready = Vec::new();
        for _ in 0..LANES {
            // Pinned memory takes long to get, so the kernel's own lanes are used, and given back.
            let lane = self.free.pop().map_or_else(|| Lane::new(&self.streams.context), Ok)?;
            match self.stage(lane, &tasks, layout.clone()) {
                Ok(staged) => ready.push(staged),
                Err((lane, error)) => {
                    self.free.extend(ready.into_iter().map(StagedWave::into_lane).chain([lane]));
                    return Err(error);
                }
            }
        }
        let mut measured = Measured::default();
        let warm_up = Repeats { times: LANES, time: Duration::ZERO };
        ready = self.repeat(ready, warm_up, &mut Measured::default())?;
        ready = self.repeat(ready, repeats, &mut measured)?;
        // Looking closer takes time of its own.
        for wave in &mut ready {
            wave.detailed = true;
        }
        let mut detailed = Measured::default();
        ready = self.repeat(ready, warm_up, &mut detailed)?;
        (measured.part_seconds, measured.way_seconds) = (detailed.part_seconds, detailed.way_seconds);
        self.free.extend(ready.into_iter().map(StagedWave::into_lane));
        for _ in 0..PREPARED.min(measured.kernel_seconds.len()) {
            let Some(lane) = self.free.pop() else { break };
            let start = Instant::now();
            let layout = self.only_wave(batch)?.layout;
            let prepared = self.prepare(lane, &tasks, layout);
            measured.prepare_seconds.push(start.elapsed().as_secs_f64());
            match prepared {
                Ok(staged) => self.free.push(staged.into_lane()),
                Err((lane, error)) => {
                    self.free.push(lane);
                    return Err(error);
                }
            }
        }
        Ok(measured)
    }

    /// Computes the waves in turn, and gives them back when all have ended.
    fn repeat(
        &mut self,
        mut ready: Vec<StagedWave>,
        repeats: Repeats,
        measured: &mut Measured,
    ) -> Result<Vec<StagedWave>, CudaError> {
        let mut running: VecDeque<RunningWave> = VecDeque::new();
        let begun = Instant::now();
        let mut started = 0;
        while started < repeats.times || begun.elapsed() < repeats.time {
            if ready.is_empty()
                && let Some(wave) = running.pop_front()
            {
                wave.wait()?;
                measured.add(&wave)?;
                ready.push(wave.again());
            }
            let Some(wave) = ready.pop() else { break };
            let start = Instant::now();
            running.push_back(wave.start(&mut self.streams).map_err(|(_, error)| error)?);
            measured.enqueue_seconds.push(start.elapsed().as_secs_f64());
            started += 1;
        }
        for wave in &running {
            wave.wait()?;
        }
        measured.seconds = begun.elapsed().as_secs_f64();
        for wave in running {
            measured.add(&wave)?;
            ready.push(wave.again());
        }
        Ok(ready)
    }

    fn only_wave(&self, batch: &[KernelTask<'_>]) -> Result<Wave, CudaError> {
        let mut waves = self.waves(batch)?;
        match (waves.pop(), waves.len()) {
            (Some(wave), 0) => Ok(wave),
            (wave, others) => Err(CudaError::NotOneWave { waves: others + usize::from(wave.is_some()) }),
        }
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
        if let Some([parts, way]) = wave.details()? {
            self.part_seconds.push(parts);
            self.way_seconds.push(way);
        }
        Ok(())
    }
}
