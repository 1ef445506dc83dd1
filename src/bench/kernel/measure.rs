//! Times of batches beside this machine's peak, taken in turn.
//!
//! Time is what the process spent on its cores, over the number of threads: neither neighbours that take the cores away
//! nor a hypervisor that does shows in it, and peak and kernel are timed alike.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use outboard_attention::DType;
use outboard_attention::kernel::{CpuKernel, Isa, KernelConfig, clock_loop, peak_loop};
use rustix::time::{ClockId, clock_gettime};

use super::subject::Batch;
use crate::cores;

/// Seconds of one run of the multiply-add loop, and of the clock's.
const PEAK_SECONDS: f64 = 0.024;
const CLOCK_SECONDS: f64 = 0.004;
/// A sample runs a batch as often as it takes to last this long.
const SAMPLE_SECONDS: f64 = 0.04;
/// A first run this long counts, since growing the workspaces does not show in it.
const LONG_SECONDS: f64 = 1.0;
/// How long a thread that has ended may take to leave its core: until then not all of its time is counted.
const SETTLE: Duration = Duration::from_millis(1);

/// Threads of an instruction set, each on a core of its own.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) isa: Isa,
    pub(crate) threads: usize,
    cores: Arc<[usize]>,
}

/// The cores to measure on, those that share no execution units with one before first.
#[derive(Clone, Debug)]
pub(crate) struct Cores(Arc<[usize]>);

/// Seconds that something took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    /// On cores, over the number of threads.
    pub(crate) cpu: f64,
    pub(crate) wall: f64,
}

/// What the multiply-add loop reached, sample by sample.
pub(crate) struct Meter {
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    iterations: u64,
    clock_iterations: u64,
    /// FLOP/s of all threads.
    peaks: Vec<f64>,
    /// Cycles a second.
    clocks: Vec<f64>,
    /// Of the time on the wall, the part that the threads had their cores.
    shares: Vec<f64>,
}

/// A batch's measurements, medians but for the samples.
#[derive(Clone, Debug)]
pub(crate) struct Figures {
    /// Useful FLOP/s by the time on cores.
    pub(crate) speed: f64,
    /// Of the peak measured before and after.
    pub(crate) fraction: f64,
    /// Of one run.
    pub(crate) took: Took,
    /// The fraction of each sample, in order.
    pub(crate) fractions: Vec<f64>,
}

struct Sample {
    took: Took,
    fraction: f64,
}

impl Cores {
    /// Those that this process may run on. Pins the caller's thread, which computes too, to the first.
    pub(crate) fn claim() -> anyhow::Result<Cores> {
        let available = cores::available()?;
        let cores = spread(&available, first_sibling);
        let first = *cores.first().context("this process may run on no core")?;
        cores::pin(&[first])?;
        Ok(Cores(cores.into()))
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn device(&self, isa: Isa, threads: usize) -> anyhow::Result<Device> {
        let count = self.count();
        ensure!(threads > 0, "--threads 0: at least one thread is needed");
        ensure!(
            threads <= count,
            "--threads {threads}: each takes a core of its own, and this process may run on {count}"
        );
        Ok(Device { isa, threads, cores: Arc::clone(&self.0) })
    }
}

/// The first of the cores that share the execution units of `core`.
fn first_sibling(core: usize) -> usize {
    let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    let list = std::fs::read_to_string(path).unwrap_or_default();
    list.split([',', '-', '\n']).next().and_then(|first| first.parse().ok()).unwrap_or(core)
}

/// The same cores, one of each group of siblings first, then another of each.
fn spread(cores: &[usize], sibling: impl Fn(usize) -> usize) -> Vec<usize> {
    let siblings: Vec<_> = cores.iter().map(|core| sibling(*core)).collect();
    let rank = |at: usize| siblings[..at].iter().filter(|other| **other == siblings[at]).count();
    let mut order: Vec<_> = (0..cores.len()).collect();
    order.sort_by_key(|at| (rank(*at), *at));
    order.into_iter().map(|at| cores[at]).collect()
}

impl Device {
    pub(crate) fn kernel(&self) -> anyhow::Result<CpuKernel> {
        let device = self.clone();
        Ok(CpuKernel::new(KernelConfig::new(self.isa, self.threads))?.on_thread(move |n| device.pin(n)))
    }

    /// Pins the calling thread, the `n`th, to its core. Where that is not allowed it is measured as it is.
    fn pin(&self, n: usize) {
        if let Some(core) = self.cores.get(n)
            && let Err(error) = cores::pin(&[*core])
        {
            tracing::warn!("thread {n} is not pinned: {error:#}");
        }
    }

    /// Runs `work` on every thread at once.
    fn on_each(&self, work: impl Fn() + Sync) -> anyhow::Result<()> {
        let work = &work;
        std::thread::scope(|scope| {
            for n in 1..self.threads {
                let start = move || {
                    self.pin(n);
                    work();
                };
                std::thread::Builder::new().spawn_scoped(scope, start).context("cannot start a thread")?;
            }
            work();
            Ok(())
        })
    }

    /// Runs and times `work`, which keeps every thread busy.
    pub(crate) fn time(&self, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Took> {
        let (before, start) = (process_seconds(), Instant::now());
        work()?;
        let wall = start.elapsed().as_secs_f64();
        if self.threads > 1 {
            std::thread::sleep(SETTLE);
        }
        Ok(Took { cpu: (process_seconds() - before) / self.threads as f64, wall })
    }
}

/// Seconds that all threads of this process have spent on cores.
fn process_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

impl Meter {
    pub(crate) fn new(device: &Device, dtype: DType) -> Self {
        let iterations = calibrate(PEAK_SECONDS, |n| _ = peak_loop(device.isa, dtype, n));
        let clock_iterations = calibrate(CLOCK_SECONDS, |n| _ = clock_loop(n));
        let (peaks, clocks, shares) = (Vec::new(), Vec::new(), Vec::new());
        Meter { device: device.clone(), dtype, iterations, clock_iterations, peaks, clocks, shares }
    }

    /// FLOP/s of the multiply-add loop on all threads at once, at this moment.
    pub(crate) fn peak(&mut self) -> anyhow::Result<f64> {
        let Meter { device, dtype, iterations, clock_iterations, .. } = self;
        let flops = peak_loop(device.isa, *dtype, 1) * *iterations as f64 * device.threads as f64;
        let took = device.time(|| device.on_each(|| _ = peak_loop(device.isa, *dtype, *iterations)))?;
        let cycles = clock_loop(1) as f64 * *clock_iterations as f64;
        let clocked = device.time(|| device.on_each(|| _ = clock_loop(*clock_iterations)))?;
        let peak = flops / took.cpu;
        self.peaks.push(peak);
        self.clocks.push(cycles / clocked.cpu);
        self.shares.push(took.cpu / took.wall);
        Ok(peak)
    }

    pub(crate) fn has_peaks(&self) -> bool {
        !self.peaks.is_empty()
    }

    /// Median FLOP/s of all threads, after at least one [`Meter::peak`].
    pub(crate) fn median_peak(&self) -> f64 {
        median(&self.peaks)
    }

    /// Median cycles a second, after at least one [`Meter::peak`].
    pub(crate) fn median_clock(&self) -> f64 {
        median(&self.clocks)
    }

    /// Median part of the time that the threads had their cores, after at least one [`Meter::peak`].
    pub(crate) fn median_share(&self) -> f64 {
        median(&self.shares)
    }

    /// Median FLOPs a cycle of one thread: peak and clock of one moment belong together.
    pub(crate) fn flops_per_cycle(&self) -> f64 {
        let each = self.peaks.iter().zip(&self.clocks);
        let each: Vec<_> = each.map(|(peak, clock)| peak / clock / self.device.threads as f64).collect();
        median(&each)
    }
}

/// How many iterations of a loop take about as long as asked.
fn calibrate(seconds: f64, work: impl Fn(u64)) -> u64 {
    let mut iterations = 1000;
    loop {
        let start = process_seconds();
        work(iterations);
        let took = process_seconds() - start;
        if took > seconds / 4.0 {
            return ((iterations as f64 * seconds / took) as u64).max(1);
        }
        iterations *= 2;
    }
}

/// Measures batches in turn, with the peak before and after each, so that what the machine does meanwhile is the same
/// for all of them.
pub(crate) fn measure(
    kernel: &mut CpuKernel,
    meter: &mut Meter,
    repeats: u32,
    batches: &mut [Batch<'_>],
) -> anyhow::Result<Vec<Figures>> {
    let mut runs = vec![NonZeroUsize::MIN; batches.len()];
    let mut samples: Vec<Vec<Sample>> = batches.iter().map(|_| Vec::new()).collect();
    let mut before = meter.peak()?;
    for round in 0..=repeats {
        for ((batch, runs), samples) in batches.iter_mut().zip(&mut runs).zip(&mut samples) {
            if samples.len() == repeats as usize {
                continue;
            }
            let took = meter.device.time(|| (0..runs.get()).try_for_each(|_| batch.run(kernel)))?;
            let each = runs.get() as f64;
            let took = Took { cpu: took.cpu / each, wall: took.wall / each };
            let after = meter.peak()?;
            if round > 0 || took.cpu > LONG_SECONDS {
                let fraction = batch.flops() / took.cpu / (0.5 * (before + after));
                samples.push(Sample { took, fraction });
            }
            if round == 0 {
                *runs = runs_of(took.cpu);
            }
            before = after;
        }
    }
    Ok(batches.iter().zip(&samples).map(|(batch, samples)| Figures::of(batch.flops(), samples)).collect())
}

/// Runs of a sample, given the seconds of one.
fn runs_of(seconds: f64) -> NonZeroUsize {
    let runs = (SAMPLE_SECONDS / seconds.max(1e-6)).ceil();
    NonZeroUsize::new(runs as usize).unwrap_or(NonZeroUsize::MIN)
}

impl Figures {
    fn of(flops: f64, samples: &[Sample]) -> Figures {
        let each = |value: fn(&Sample) -> f64| samples.iter().map(value).collect::<Vec<_>>();
        let cpu = median(&each(|sample| sample.took.cpu));
        let wall = median(&each(|sample| sample.took.wall));
        let fractions = each(|sample| sample.fraction);
        let (speed, fraction) = (flops / cpu, median(&fractions));
        Figures { speed, fraction, took: Took { cpu, wall }, fractions }
    }
}

/// The value in the middle, or between the two there; NaN of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
    0.5 * (at(sorted.len().saturating_sub(1) / 2) + at(sorted.len() / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_lie_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn siblings_come_last() {
        assert_eq!(spread(&[0, 1, 2, 3], |core| core / 2 * 2), [0, 2, 1, 3]);
        assert_eq!(spread(&[0, 1, 2, 3], |core| core % 2), [0, 1, 2, 3]);
        assert_eq!(spread(&[5, 3, 9], |core| core), [5, 3, 9]);
    }

    #[test]
    fn short_batches_run_many_times() {
        assert_eq!(runs_of(0.02).get(), 2);
        assert_eq!(runs_of(3.0).get(), 1);
        assert_eq!(runs_of(0.0).get(), 40_000);
    }
}
