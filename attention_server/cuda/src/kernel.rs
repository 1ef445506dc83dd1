//! The kernel of a GPU: tasks in, results out.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::CudaContext;
use outboard_attention::kernel::{KernelError, KernelTask, Operands, Results};
use outboard_attention::{DType, Direction, HeadGeometry, MAX_HEAD_DIM, Task};

use crate::batch::{BatchLayout, Cut, LaidTask, MAX_PIECES, call_geometry};
use crate::cudnn::{Cudnn, Handle, device_properties};
use crate::gpu::{self, DeviceInfo, driver};
use crate::graph::{CallGeometry, GraphKey};
use crate::plan::{Background, PlanConfig, Plans, Target, device_kind};
use crate::wave::{Lane, RunningWave, StagedWave, Streams};
use crate::{CudaConfig, CudaError, tensors};

/// Counts changes that alter bits; part of [`CudaKernel::numerics_id`].
const REVISION: u32 = 2;

/// Waves under way at most: one each uploaded, computed and downloaded.
pub(crate) const LANES: usize = 3;

/// How long the oldest wave may take to end, once somebody waits for it. It takes a second at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// Query heads of a kv head at most.
const MAX_GROUP: usize = 128;

/// A GPU that computes core attention.
///
/// It belongs to one thread at a time. Batches may overlap: [`CudaKernel::begin`] returns as soon as a batch is on its
/// way, and [`CudaKernel::finish`] waits for the oldest. Dropping it drops what is under way without a word.
///
/// Backward, D must be what it is by its definition, `rowsum(dO * O)`: a row whose dO is zero is taken to have a D of zero.
pub struct CudaKernel {
    pub(crate) config: CudaConfig,
    info: DeviceInfo,
    version: String,
    plans: Arc<Plans>,
    background: Option<Background>,
    pub(crate) free: Vec<Lane>,
    running: VecDeque<Tagged>,
    pub(crate) streams: Streams,
    busy_seconds: f64,
    pub(crate) failed: Option<CudaError>,
}

impl Drop for CudaKernel {
    fn drop(&mut self) {
        if matches!(self.failed, Some(CudaError::Silent { .. })) {
            // Freeing would wait for what does not answer.
            std::mem::forget((std::mem::take(&mut self.free), std::mem::take(&mut self.running)));
            self.streams.forget_memory();
            return;
        }
        // Streams, handle and plans go with their context current, and nothing under way.
        let _ = self.streams.context.bind_to_thread();
        let _ = gpu::settle(&self.streams.context);
        self.background = None;
    }
}

/// Tasks of a batch, by index, that are computed as one.
#[derive(Debug)]
pub(crate) struct Wave {
    pub(crate) indices: Vec<usize>,
    pub(crate) layout: BatchLayout,
}

/// A running wave and whose tasks are in it.
#[derive(Debug)]
struct Tagged {
    wave: RunningWave,
    entries: Vec<Entry>,
}

/// A task of a wave.
#[derive(Debug)]
struct Entry {
    batch: u64,
    index: usize,
    results: Results,
}

/// A task that has ended: the batch it came with, its place there, and its results.
#[derive(Debug)]
pub struct Finished {
    /// As given to [`CudaKernel::begin`].
    pub batch: u64,
    /// Index in that batch.
    pub index: usize,
    /// Its results, or why there are none.
    pub results: Result<Results, CudaError>,
}

impl fmt::Debug for CudaKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaKernel")
            .field("device", &self.info)
            .field("cudnn", &self.version)
            .finish_non_exhaustive()
    }
}

impl CudaKernel {
    /// Opens a device.
    ///
    /// # Errors
    /// [`CudaError`] when there is no usable device, driver or library; it says which, and what to install.
    pub fn new(mut config: CudaConfig) -> Result<CudaKernel, CudaError> {
        let (context, info) = gpu::open(config.device)?;
        config.batch_bytes = config.batch_bytes.min(info.memory_bytes / 3);
        let cudnn = Cudnn::load(&config.libraries)?;
        context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let handle = Handle::new(&cudnn)?;
        let plan_config = PlanConfig {
            device: device_kind(&device_properties(&cudnn, &handle)?).0,
            compute: info.compute,
            folder: config.plan_folder.clone(),
            deterministic: config.deterministic,
        };
        let plans = Arc::new(Plans::new(&cudnn, plan_config));
        let background = start_background(&plans, &cudnn, &context);
        let streams = Streams::new(&context, info.compute, handle)?;
        let free = (0..LANES).map(|_| Lane::new(&context)).collect::<Result<_, _>>()?;
        Ok(CudaKernel {
            version: cudnn.version(),
            config,
            info,
            plans,
            background,
            free,
            running: VecDeque::new(),
            streams,
            busy_seconds: 0.0,
            failed: None,
        })
    }

    /// The device.
    pub fn device(&self) -> &DeviceInfo {
        &self.info
    }

    /// cuDNN's version, such as 9.19.0.
    pub fn cudnn_version(&self) -> &str {
        &self.version
    }

    /// Backend, architecture and number of processors (which the heuristics know), element type, library, how backward
    /// sums, and revision. Kernels of equal ids give equal bits, but for dQ where the id says `atomic`.
    pub fn numerics_id(&self, dtype: DType) -> String {
        let (major, minor) = self.info.compute;
        let processors = self.info.processors;
        let order = if self.is_deterministic() { "deterministic" } else { "atomic" };
        format!("cuda-sm{major}{minor}x{processors}-{dtype}-cudnn{}-{order}-r{REVISION}", self.version)
    }

    /// Whether equal tasks give equal bits backward as well.
    pub fn is_deterministic(&self) -> bool {
        self.plans.is_deterministic()
    }

    /// Seconds that kernels have run, of the waves finished so far.
    pub fn busy_seconds(&self) -> f64 {
        self.busy_seconds
    }

    fn cut(&self, direction: Direction) -> Cut {
        Cut { direction, ordered: self.is_deterministic(), in_place: self.config.in_place }
    }

    /// Whether tasks of this geometry are computed.
    ///
    /// # Errors
    /// [`CudaError`] naming the field that is not.
    pub fn supports(geometry: &HeadGeometry) -> Result<(), CudaError> {
        match geometry.dtype() {
            DType::Bf16 | DType::F16 => {}
            dtype => return Err(CudaError::DType { dtype }),
        }
        if let Some(softcap) = geometry.softcap() {
            return Err(CudaError::Softcap { softcap });
        }
        if geometry.group() > MAX_GROUP {
            return Err(CudaError::Group { group: geometry.group(), max: MAX_GROUP });
        }
        debug_assert!(geometry.head_dim().max(geometry.v_head_dim()) <= MAX_HEAD_DIM);
        Ok(())
    }

    /// Bytes of device memory that a task takes, to be compared with [`CudaKernel::batch_bytes`].
    ///
    /// # Errors
    /// [`CudaError`] when it is not computed at all.
    pub fn task_bytes(
        &self,
        geometry: &HeadGeometry,
        direction: Direction,
        task: &Task,
    ) -> Result<usize, CudaError> {
        CudaKernel::supports(geometry)?;
        task.check(geometry).map_err(|source| KernelError::Invalid { index: 0, source })?;
        let laid = LaidTask { geometry, task };
        let layout = BatchLayout::new(self.cut(direction), call_geometry(geometry), &[laid]);
        let too_many = |index| CudaError::TooManyPieces { index, max: MAX_PIECES };
        layout.map(|layout| device_bytes(&layout)).map_err(too_many)
    }

    /// Bytes of device memory that one wave may take.
    pub fn batch_bytes(&self) -> usize {
        self.config.batch_bytes
    }

    /// Sends a batch on its way. `number` comes back with each of its tasks. `done` is called for those that end
    /// meanwhile, of this batch or an earlier one.
    ///
    /// # Errors
    /// [`CudaError`] when a task is not computable; then none of the batch is on its way. A device that has failed once
    /// fails every later batch in the same way.
    pub fn begin(
        &mut self,
        number: u64,
        batch: Vec<KernelTask<'_>>,
        done: &mut dyn FnMut(Finished),
    ) -> Result<(), CudaError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let waves = self.waves(&batch)?;
        let mut batch: Vec<Option<KernelTask<'_>>> = batch.into_iter().map(Some).collect();
        for Wave { indices, layout } in waves {
            let tasks = indices.into_iter().filter_map(|index| Some((index, batch[index].take()?))).collect();
            self.begin_wave(number, tasks, layout, done);
        }
        Ok(())
    }

    /// Whether this kernel computes a task: what [`CudaKernel::begin`] asks of each.
    ///
    /// # Errors
    /// [`CudaError`] saying why not. The index in it is zero.
    pub fn check_task(&self, task: &KernelTask<'_>) -> Result<(), CudaError> {
        self.waves(std::slice::from_ref(task)).map(|_| ())
    }

    /// The waves of a batch: each of one direction, call geometry and scale, and within the memory.
    pub(crate) fn waves(&self, batch: &[KernelTask<'_>]) -> Result<Vec<Wave>, CudaError> {
        let mut kinds: Vec<(Kind, Vec<usize>)> = Vec::new();
        for (index, task) in batch.iter().enumerate() {
            self.check(index, task)?;
            let kind = kind(task);
            match kinds.iter_mut().find(|(other, _)| *other == kind) {
                Some((_, indices)) => indices.push(index),
                None => kinds.push((kind, vec![index])),
            }
        }
        let mut waves = Vec::new();
        for (kind, indices) in kinds {
            self.lay_out(batch, kind, indices, &mut waves)?;
        }
        Ok(waves)
    }

    /// What can be said of a task before it is laid out.
    fn check(&self, index: usize, task: &KernelTask<'_>) -> Result<(), CudaError> {
        if matches!(task.operands, Operands::Stage { .. }) {
            return Err(CudaError::Stage { index });
        }
        task.check_tensors(index)?;
        CudaKernel::supports(&task.geometry)?;
        let (needed, limit) = (moved_bytes(task), self.config.batch_bytes);
        match needed > limit {
            true => Err(CudaError::TooLarge { index, needed, limit }),
            false => Ok(()),
        }
    }

    /// Lays tasks out as one wave, or as two of half as many each where the memory does not hold them.
    fn lay_out(
        &self,
        batch: &[KernelTask<'_>],
        kind: Kind,
        mut indices: Vec<usize>,
        waves: &mut Vec<Wave>,
    ) -> Result<(), CudaError> {
        let laid: Vec<LaidTask<'_>> = indices
            .iter()
            .map(|&index| LaidTask { geometry: &batch[index].geometry, task: batch[index].task })
            .collect();
        let (direction, geometry, _) = kind;
        let too_many = |n: usize| CudaError::TooManyPieces { index: indices[n], max: MAX_PIECES };
        let layout = BatchLayout::new(self.cut(direction), geometry, &laid).map_err(too_many)?;
        let (needed, limit) = (device_bytes(&layout), self.config.batch_bytes);
        match indices[..] {
            _ if needed <= limit => waves.push(Wave { indices, layout }),
            [index] => return Err(CudaError::TooLarge { index, needed, limit }),
            _ => {
                let rest = indices.split_off(indices.len() / 2);
                self.lay_out(batch, kind, indices, waves)?;
                self.lay_out(batch, kind, rest, waves)?;
            }
        }
        Ok(())
    }

    fn begin_wave(
        &mut self,
        number: u64,
        tasks: Vec<(usize, KernelTask<'_>)>,
        layout: BatchLayout,
        done: &mut dyn FnMut(Finished),
    ) {
        while self.free.is_empty() && !self.running.is_empty() {
            self.finish(done);
        }
        let end_all = |error: &CudaError, done: &mut dyn FnMut(Finished)| {
            for (index, _) in &tasks {
                done(Finished { batch: number, index: *index, results: Err(error.clone()) });
            }
        };
        if let Some(error) = &self.failed {
            return end_all(error, done);
        }
        // There is none only after failures that cost lanes.
        let lane = match self.free.pop().map_or_else(|| Lane::new(&self.streams.context), Ok) {
            Ok(lane) => lane,
            Err(error) => return end_all(&error, done),
        };
        let of_wave: Vec<&KernelTask<'_>> = tasks.iter().map(|(_, task)| task).collect();
        let staged = self.stage(lane, &of_wave, layout).map_err(|(lane, error)| (Some(lane), error));
        let started = staged.and_then(|staged| staged.start(&mut self.streams));
        match started {
            Ok(wave) => {
                let entry = |(index, task): (usize, KernelTask<'_>)| Entry {
                    batch: number,
                    index,
                    results: task.results,
                };
                let entries = tasks.into_iter().map(entry).collect();
                self.running.push_back(Tagged { wave, entries });
            }
            Err((lane, error)) => {
                self.free.extend(lane);
                self.note(&error);
                end_all(&error, done);
            }
        }
    }

    /// Prepares a wave and copies the operands of its tasks.
    pub(crate) fn stage(
        &self,
        lane: Lane,
        tasks: &[&KernelTask<'_>],
        layout: BatchLayout,
    ) -> Result<StagedWave, (Lane, CudaError)> {
        let mut staged = self.prepare(lane, tasks, layout)?;
        tensors::bring(tasks.iter().copied(), &mut staged, self.config.copy_threads);
        Ok(staged)
    }

    /// Gets the plans of a wave and writes its tables.
    pub(crate) fn prepare(
        &self,
        lane: Lane,
        tasks: &[&KernelTask<'_>],
        layout: BatchLayout,
    ) -> Result<StagedWave, (Lane, CudaError)> {
        let Some(first) = tasks.first() else {
            return Err((lane, CudaError::NotOneWave { waves: 0 }));
        };
        // cuDNN builds plans for the context that is current, which another kernel's may be.
        if let Err(error) = self.streams.context.bind_to_thread() {
            return Err((lane, driver("cuCtxSetCurrent")(error)));
        }
        let mut plans = Vec::with_capacity(layout.calls.len());
        for call in &layout.calls {
            let geometry = call.geometry(layout.geometry);
            let direction = layout.direction;
            let key = GraphKey { direction, shape: call.shape, geometry, bounds: call.bounds() };
            match self.plans.get(key, Target::Device(&self.streams.handle)) {
                Ok((plan, wanted)) => {
                    plans.push(plan);
                    if let (Some(wanted), Some(background)) = (wanted, &self.background) {
                        background.want(wanted);
                    }
                }
                Err(error) => return Err((lane, error)),
            }
        }
        StagedWave::new(layout, plans, first.geometry.scale(), lane)
    }

    /// Waits for the oldest wave under way, if there is one, and ends its tasks. One that does not end in time fails, and
    /// the device with it.
    pub fn finish(&mut self, done: &mut dyn FnMut(Finished)) {
        let ready = self.wait_ready();
        let Some(Tagged { wave, mut entries }) = self.running.pop_front() else { return };
        let ended = ready.and_then(|()| wave.wait()).and_then(|()| wave.seconds());
        let error = match ended {
            Ok(seconds) => {
                self.busy_seconds += seconds;
                let results = entries.iter_mut().map(|entry| &mut entry.results);
                tensors::take(&wave, results, self.config.copy_threads);
                self.free.push(wave.into_lane());
                for Entry { batch, index, results } in entries {
                    done(Finished { batch, index, results: Ok(results) });
                }
                return;
            }
            Err(error) => error,
        };
        match error {
            // Waiting for it would not end; its memory is lost rather than given to another while it may be written.
            CudaError::Silent { .. } => std::mem::forget(wave),
            _ => self.free.extend(wave.abandon(&self.streams.context)),
        }
        self.note(&error);
        for Entry { batch, index, .. } in entries {
            done(Finished { batch, index, results: Err(error.clone()) });
        }
    }

    /// Waits until the oldest wave has ended, but not for ever.
    fn wait_ready(&self) -> Result<(), CudaError> {
        let begun = Instant::now();
        while !self.running.is_empty() && !self.is_ready() {
            if begun.elapsed() > PATIENCE {
                return Err(CudaError::Silent { seconds: PATIENCE.as_secs() });
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Waves under way.
    pub fn under_way(&self) -> usize {
        self.running.len()
    }

    /// True when [`CudaKernel::finish`] would not wait.
    pub fn is_ready(&self) -> bool {
        self.running.front().is_some_and(|tagged| tagged.wave.is_done())
    }

    /// Computes a batch and calls `done(index, results)` for each of its tasks.
    ///
    /// # Errors
    /// [`CudaError`] when a task is not computable, and then none is, or when the device fails; [`CudaError::Busy`] while
    /// other batches are under way.
    pub fn run(
        &mut self,
        batch: Vec<KernelTask<'_>>,
        done: &(dyn Fn(usize, Results) + Sync),
    ) -> Result<(), CudaError> {
        if self.under_way() > 0 {
            return Err(CudaError::Busy { waves: self.under_way() });
        }
        let mut failed = None;
        let mut each = |finished: Finished| match finished.results {
            Ok(results) => done(finished.index, results),
            Err(error) => {
                failed.get_or_insert(error);
            }
        };
        self.begin(0, batch, &mut each)?;
        while self.under_way() > 0 {
            self.finish(&mut each);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Remembers a failure that ends the device.
    pub(crate) fn note(&mut self, error: &CudaError) {
        if error.is_fatal() && self.failed.is_none() {
            tracing::error!(%error, device = %self.info, "the device failed; it computes nothing more");
            self.failed = Some(error.clone());
        }
    }
}

/// What tasks of one wave have in common: direction, call geometry and the bits of the scale.
type Kind = (Direction, CallGeometry, u32);

fn kind(task: &KernelTask<'_>) -> Kind {
    (task.operands.direction(), call_geometry(&task.geometry), task.geometry.scale().to_bits())
}

/// Bytes that a task takes at least: those of operands and results, all in 16 bits.
fn moved_bytes(task: &KernelTask<'_>) -> usize {
    let shapes = task.task.shapes(&task.geometry);
    let elements = |shape: [usize; 3]| shape.iter().fold(1, |product: usize, n| product.saturating_mul(*n));
    let all = match task.operands.direction() {
        Direction::Forward => [shapes.q, shapes.k, shapes.v, shapes.o],
        Direction::Backward => [shapes.q, shapes.k, shapes.v, shapes.q],
    };
    all.into_iter().map(elements).fold(0, usize::saturating_add).saturating_mul(2)
}

fn device_bytes(layout: &BatchLayout) -> usize {
    let moved = layout.operand_bytes + layout.operand_slack + layout.result_bytes;
    // Operands and results have a lane each, of which there are several.
    layout.work_bytes + layout.table_bytes() + LANES * moved
}

fn start_background(
    plans: &Arc<Plans>,
    cudnn: &Arc<Cudnn>,
    context: &Arc<CudaContext>,
) -> Option<Background> {
    let (cudnn, context) = (Arc::clone(cudnn), Arc::clone(context));
    let enter = move || {
        context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        Ok((Handle::new(&cudnn)?, context))
    };
    Background::start(Arc::clone(plans), enter)
        .inspect_err(
            |error| tracing::warn!(%error, "no thread for building plans; they are built when needed"),
        )
        .ok()
}
