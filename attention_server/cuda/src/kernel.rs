//! The kernel of a GPU: tasks in, results out.

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::CudaContext;
use outboard_attention::kernel::{KernelError, KernelTask, Operands, QueryInput, Results};
use outboard_attention::{AnyTensor, DType, Direction, HeadGeometry, MAX_HEAD_DIM, Task, TensorView};

use crate::batch::{BatchLayout, Cut, LaidTask, MAX_PIECES, OperandPlace, TaskOperands, call_geometry};
use crate::cudnn::{Cudnn, Handle, device_properties};
use crate::gpu::{self, DeviceInfo, driver};
use crate::graph::{CallGeometry, GraphKey};
use crate::plan::{Background, PlanConfig, Plans, Target, device_kind};
use crate::wave::{Lane, RunningWave, StagedWave, Streams};
use crate::{CudaError, copy};

/// Counts changes that alter bits; part of [`CudaKernel::numerics_id`].
const REVISION: u32 = 1;

/// Waves under way at most: one each uploaded, computed and downloaded.
pub(crate) const LANES: usize = 3;

/// How long the oldest wave may take to end, when another needs its memory. A wave takes a second at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// Query heads of a kv head at most.
const MAX_GROUP: usize = 128;

/// How a GPU computes.
#[derive(Clone, Debug)]
pub struct CudaConfig {
    /// Its number: 0 is `cuda:0`.
    pub device: usize,
    /// Where cuDNN, cuBLASLt and NVRTC are looked for before the system's loader is asked.
    pub libraries: Vec<PathBuf>,
    /// Where execution plans are kept between runs. Without it they are built anew, which takes up to seconds each.
    pub plan_folder: Option<PathBuf>,
    /// Bytes of device memory that one wave may take: operands, results, and what lies between; never more than a third of
    /// the device's. A batch is cut into as many waves as it needs.
    pub batch_bytes: usize,
    /// Whether backward sums in a fixed order, where cuDNN can (9.25 and later). Otherwise it is faster, and the last bits
    /// of dQ differ from run to run.
    pub deterministic: bool,
    /// Threads that copy operands and results, at least one.
    pub copy_threads: usize,
    /// Whether cuDNN reads and writes tensors where they lie, where it can. Otherwise all are moved into an order of its
    /// own first. It changes no bit.
    pub in_place: bool,
}

impl CudaConfig {
    /// The usual configuration of a device.
    pub fn new(device: usize) -> CudaConfig {
        CudaConfig {
            device,
            libraries: Vec::new(),
            plan_folder: None,
            batch_bytes: usize::MAX,
            deterministic: true,
            copy_threads: 4,
            in_place: true,
        }
    }
}

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
    free: Vec<Lane>,
    running: VecDeque<Tagged>,
    pub(crate) streams: Streams,
    busy_seconds: f64,
    failed: Option<CudaError>,
}

impl Drop for CudaKernel {
    fn drop(&mut self) {
        // Streams, handle and plans go with their context current, and nothing under way.
        let _ = self.streams.context.bind_to_thread();
        let _ = gpu::settle(&self.streams.context);
        self.background = None;
    }
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
    /// sums, and revision. Kernels of equal ids give equal
    /// bits, but for dQ where the id says `atomic`.
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

    /// Bytes of device memory held.
    pub fn device_bytes(&self) -> usize {
        let free = self.free.iter().map(Lane::device_bytes).sum::<usize>();
        let running = self.running.iter().map(|tagged| tagged.wave.device_bytes()).sum::<usize>();
        free + running + self.streams.work.bytes() + self.streams.workspace.bytes()
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
        for wave in waves {
            if let Some(error) = self.failed.clone() {
                for index in wave {
                    done(Finished { batch: number, index, results: Err(error.clone()) });
                }
                continue;
            }
            let tasks = wave.iter().filter_map(|&index| Some((index, batch[index].take()?))).collect();
            self.begin_wave(number, tasks, done);
        }
        Ok(())
    }

    /// Whether this kernel computes a task: what [`CudaKernel::begin`] asks of each.
    ///
    /// # Errors
    /// [`CudaError`] saying why not. The index in it is `index`.
    pub fn check_task(&self, index: usize, task: &KernelTask<'_>) -> Result<(), CudaError> {
        self.check(index, task).map(|_| ())
    }

    /// The same, with the bytes of device memory that the task takes.
    fn check(&self, index: usize, task: &KernelTask<'_>) -> Result<usize, CudaError> {
        if matches!(task.operands, Operands::Stage { .. }) {
            return Err(CudaError::Stage { index });
        }
        task.check_tensors(index)?;
        CudaKernel::supports(&task.geometry)?;
        let (limit, direction) = (self.config.batch_bytes, task.operands.direction());
        // What comes in and goes out is soon counted; only then is the task laid out.
        let moved = moved_bytes(&task.geometry, direction, task.task);
        if moved > limit {
            return Err(CudaError::TooLarge { index, needed: moved, limit });
        }
        let needed = self.task_bytes(&task.geometry, direction, task.task).map_err(|error| match error {
            CudaError::TooManyPieces { max, .. } => CudaError::TooManyPieces { index, max },
            error => error,
        })?;
        if needed > limit {
            return Err(CudaError::TooLarge { index, needed, limit });
        }
        Ok(needed)
    }

    /// Batches of tasks, by index, that are computed as one: of one direction, call geometry and scale, and within the
    /// memory.
    pub(crate) fn waves(&self, batch: &[KernelTask<'_>]) -> Result<Vec<Vec<usize>>, CudaError> {
        let limit = self.config.batch_bytes;
        let mut waves: Vec<(Kind, usize, Vec<usize>)> = Vec::new();
        for (index, task) in batch.iter().enumerate() {
            let kind = kind(task);
            let needed = self.check(index, task)?;
            let open = waves.iter_mut().rev().find(|(other, _, _)| *other == kind);
            match open {
                Some((_, bytes, tasks)) if *bytes + needed <= limit => {
                    *bytes += needed;
                    tasks.push(index);
                }
                _ => waves.push((kind, needed, vec![index])),
            }
        }
        Ok(waves.into_iter().map(|(_, _, tasks)| tasks).collect())
    }

    fn begin_wave(
        &mut self,
        number: u64,
        tasks: Vec<(usize, KernelTask<'_>)>,
        done: &mut dyn FnMut(Finished),
    ) {
        while self.free.is_empty() && !self.running.is_empty() {
            if let Err(error) = self.wait_ready() {
                self.note(&error);
                for (index, _) in tasks {
                    done(Finished { batch: number, index, results: Err(error.clone()) });
                }
                return;
            }
            self.finish(done);
        }
        // There is none only after failures that cost lanes.
        let lane = self.free.pop().map_or_else(|| Lane::new(&self.streams.context), Ok);
        let lane = match lane {
            Ok(lane) => lane,
            Err(error) => {
                for (index, _) in tasks {
                    done(Finished { batch: number, index, results: Err(error.clone()) });
                }
                return;
            }
        };
        let staged = self.stage(lane, &tasks).map_err(|(lane, error)| (Some(lane), error));
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
                for (index, _) in tasks {
                    done(Finished { batch: number, index, results: Err(error.clone()) });
                }
            }
        }
    }

    /// Lays out the tasks of a wave and copies their operands.
    pub(crate) fn stage(
        &self,
        lane: Lane,
        tasks: &[(usize, KernelTask<'_>)],
    ) -> Result<StagedWave, (Lane, CudaError)> {
        let Some((_, first)) = tasks.first() else {
            return Err((lane, CudaError::NotOneWave { waves: 0 }));
        };
        // cuDNN builds plans for the context that is current, which another kernel's may be.
        if let Err(error) = self.streams.context.bind_to_thread() {
            return Err((lane, driver("cuCtxSetCurrent")(error)));
        }
        let direction = first.operands.direction();
        let geometry = call_geometry(&first.geometry);
        let laid: Vec<LaidTask<'_>> =
            tasks.iter().map(|(_, task)| LaidTask { geometry: &task.geometry, task: task.task }).collect();
        let layout = match BatchLayout::new(self.cut(direction), geometry, &laid) {
            Ok(layout) => layout,
            Err(index) => return Err((lane, too_many(index))),
        };
        let mut plans = Vec::with_capacity(layout.calls.len());
        for call in &layout.calls {
            let geometry = call.geometry(geometry);
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
        let mut staged = StagedWave::new(layout, plans, first.geometry.scale(), lane)?;
        let places = staged.layout().operands.clone();
        let copies = tasks.iter().zip(&places).flat_map(|((_, task), places)| operands(task, places));
        copy::gather(copies.collect(), staged.operands(), self.config.copy_threads);
        Ok(staged)
    }

    /// Waits for the oldest wave under way, if there is one, and ends its tasks.
    pub fn finish(&mut self, done: &mut dyn FnMut(Finished)) {
        let Some(Tagged { wave, entries }) = self.running.pop_front() else { return };
        let ended = wave.wait().and_then(|()| wave.seconds());
        let (wave, error) = match ended {
            Ok(seconds) => {
                self.busy_seconds += seconds;
                let mut results: Vec<Results> = Vec::with_capacity(entries.len());
                let mut tags = Vec::with_capacity(entries.len());
                for Entry { batch, index, results: of_task } in entries {
                    tags.push((batch, index));
                    results.push(of_task);
                }
                let mut copies = Vec::new();
                let dtype = wave.layout().geometry.dtype;
                for (of_task, place) in results.iter_mut().zip(&wave.layout().results) {
                    for (i, part) in parts(of_task).into_iter().enumerate() {
                        let dtype = if place.narrow && i == 0 { dtype } else { DType::F32 };
                        let (start, bytes) = (place.starts[i], place.lens[i] * dtype.bytes());
                        copies.push(copy::Widened {
                            dtype,
                            from: &wave.results()[start..start + bytes],
                            to: part,
                        });
                    }
                }
                copy::scatter(copies, self.config.copy_threads);
                self.free.push(wave.into_lane());
                for ((batch, index), results) in tags.into_iter().zip(results) {
                    done(Finished { batch, index, results: Ok(results) });
                }
                return;
            }
            Err(error) => (wave, error),
        };
        self.free.extend(wave.abandon(&self.streams.context));
        self.note(&error);
        for Entry { batch, index, .. } in entries {
            done(Finished { batch, index, results: Err(error.clone()) });
        }
    }

    /// Waits until the oldest wave has ended, but not for ever.
    fn wait_ready(&self) -> Result<(), CudaError> {
        let begun = Instant::now();
        while !self.is_ready() {
            if begun.elapsed() > PATIENCE {
                let message = format!("no wave has ended for {} s", PATIENCE.as_secs());
                return Err(CudaError::Driver { call: "cuEventQuery", message, lost: true });
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
    fn note(&mut self, error: &CudaError) {
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
fn moved_bytes(geometry: &HeadGeometry, direction: Direction, task: &Task) -> usize {
    let shapes = task.shapes(geometry);
    let elements = |shape: [usize; 3]| shape.iter().fold(1, |product: usize, n| product.saturating_mul(*n));
    let all = match direction {
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

fn too_many(index: usize) -> CudaError {
    CudaError::TooManyPieces { index, max: MAX_PIECES }
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

/// The operands of a task and where they go.
fn operands<'a>(task: &'a KernelTask<'_>, places: &TaskOperands) -> Vec<(copy::Source<'a>, OperandPlace)> {
    let mut all = Vec::new();
    let mut add = |place: Option<OperandPlace>, source: copy::Source<'a>| {
        all.extend(place.map(|place| (source, place)))
    };
    let any = |tensor: &AnyTensor<'a>| copy::Source::from(*tensor);
    let query = |input: &QueryInput<'a>| match input {
        QueryInput::View(tensor) => copy::Source::from(*tensor),
        // Only f32 may lie in its result's place, and the check has refused it.
        QueryInput::InPlace => copy::Source::Nothing,
    };
    match &task.operands {
        Operands::Forward { q, k, v } => {
            add(places.q, query(q));
            add(places.k, any(k));
            add(places.v, any(v));
        }
        Operands::Backward { q, k, v, d_o, lse, d } => {
            add(places.q, any(q));
            add(places.k, any(k));
            add(places.v, any(v));
            add(places.d_o, query(d_o));
            let row = |view: &TensorView<'a>| copy::Source::from(AnyTensor::F32(*view));
            add(places.lse, row(lse));
            add(places.d, row(d));
        }
        Operands::Stage { .. } => {}
    }
    all
}

fn parts(results: &mut Results) -> Vec<&mut [f32]> {
    match results {
        Results::Forward { o, lse } => vec![o, lse],
        Results::Backward { dq, dk, dv } => vec![dq, dk, dv],
        Results::Stage(_) => Vec::new(),
    }
}
