//! A wave: what is uploaded, computed and downloaded as one.
//!
//! Three streams take turns on it, so that one wave is computed while the next is uploaded and the one before downloaded.
//! Uploads and downloads of different waves use different memory, a *lane* each; the work memory is shared, since waves
//! are computed one after the other.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};
use outboard_attention::{DType, Direction};

use crate::CudaError;
use crate::batch::{BatchLayout, BatchTables, Call, CallTables, Shape, TaskOperands, Tensors};
use crate::cudnn::{self, Handle, Raw};
use crate::gpu::memory::{DeviceMemory, PinnedMemory, download, upload};
use crate::gpu::movers::{Movers, Places};
use crate::gpu::{driver, settle};
use crate::graph::Ids;
use crate::plan::Plan;

/// Operands start at a multiple of this after the tables, in bytes.
const OPERANDS: usize = 256;

/// Memory for what a wave brings in and takes out, and the events of its way.
#[derive(Debug)]
pub(crate) struct Lane {
    started: CudaEvent,
    uploaded: CudaEvent,
    begun: CudaEvent,
    brought: CudaEvent,
    called: CudaEvent,
    computed: CudaEvent,
    downloaded: CudaEvent,
    staging: PinnedMemory,
    input: DeviceMemory,
    output: DeviceMemory,
    results: PinnedMemory,
}

/// The streams of a device, and what runs on them.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Enqueues on `compute`, and so goes before it.
    pub(crate) handle: Handle,
    pub(crate) upload: Arc<CudaStream>,
    pub(crate) compute: Arc<CudaStream>,
    pub(crate) download: Arc<CudaStream>,
    pub(crate) context: Arc<CudaContext>,
    /// Where sequences lie while they are computed.
    pub(crate) work: DeviceMemory,
    /// What cuDNN works in.
    pub(crate) workspace: DeviceMemory,
    bf16: Movers,
    f16: Movers,
}

/// A wave whose tables and operands lie in its lane's staging memory.
#[derive(Debug)]
pub(crate) struct StagedWave {
    /// First, since dropping it waits for the device, which may still run the plans.
    lane: Lane,
    layout: BatchLayout,
    tables: BatchTables,
    plans: Vec<Arc<Plan>>,
    scale: f32,
    operands: usize,
    /// Whether more times are taken than those of its kernels.
    pub(crate) detailed: bool,
}

/// A wave on its way through the device.
#[derive(Debug)]
pub(crate) struct RunningWave {
    staged: StagedWave,
}

impl Drop for Lane {
    fn drop(&mut self) {
        // The device must be through with the memory before it goes. On a lost device this fails at once, and nothing is
        // under way any more.
        for event in [&self.uploaded, &self.computed, &self.downloaded] {
            let _ = event.synchronize();
        }
    }
}

impl Lane {
    pub(crate) fn new(context: &Arc<CudaContext>) -> Result<Lane, CudaError> {
        // Whoever waits sleeps.
        let flags = Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC);
        let event = || context.new_event(flags).map_err(driver("cuEventCreate"));
        Ok(Lane {
            started: event()?,
            uploaded: event()?,
            begun: event()?,
            brought: event()?,
            called: event()?,
            computed: event()?,
            downloaded: event()?,
            staging: PinnedMemory::new(context),
            input: DeviceMemory::new(context),
            output: DeviceMemory::new(context),
            results: PinnedMemory::new(context),
        })
    }
}

impl Streams {
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        compute_capability: (i32, i32),
        handle: Handle,
    ) -> Result<Streams, CudaError> {
        let stream = || context.new_stream().map_err(driver("cuStreamCreate"));
        let streams = Streams {
            handle,
            upload: stream()?,
            compute: stream()?,
            download: stream()?,
            work: DeviceMemory::new(context),
            workspace: DeviceMemory::new(context),
            bf16: Movers::new(context, DType::Bf16, compute_capability)?,
            f16: Movers::new(context, DType::F16, compute_capability)?,
            context: Arc::clone(context),
        };
        // SAFETY: the stream belongs to the context that the handle was made in, and outlives it in the same value.
        unsafe { streams.handle.set_stream(streams.compute.cu_stream().cast())? };
        Ok(streams)
    }

    /// Gives up the memory without freeing it.
    pub(crate) fn forget_memory(&mut self) {
        for memory in [&mut self.work, &mut self.workspace] {
            std::mem::forget(std::mem::replace(memory, DeviceMemory::new(&self.context)));
        }
    }

    fn movers(&self, dtype: DType) -> &Movers {
        match dtype {
            DType::F16 => &self.f16,
            _ => &self.bf16,
        }
    }
}

impl StagedWave {
    /// Makes room in `lane` and writes the tables. The operands are left to be written: see [`StagedWave::operands`].
    /// `plans` has one for each call of the layout.
    pub(crate) fn new(
        layout: BatchLayout,
        plans: Vec<Arc<Plan>>,
        scale: f32,
        mut lane: Lane,
    ) -> Result<StagedWave, (Lane, CudaError)> {
        let capacities: Vec<usize> = plans.iter().map(|plan| plan.sequences).collect();
        let tables = layout.tables(&capacities);
        let operands = tables.tables.bytes().len().next_multiple_of(OPERANDS);
        let input = operands + layout.operand_bytes;
        let output = layout.result_bytes;
        let reserved = lane
            .staging
            .reserve(input)
            .and_then(|()| lane.input.reserve(input + layout.operand_slack))
            .and_then(|()| lane.output.reserve(output))
            .and_then(|()| lane.results.reserve(output));
        if let Err(error) = reserved {
            return Err((lane, error));
        }
        // SAFETY: a lane that is not part of a running wave is not used by the device.
        let staging = unsafe { lane.staging.slice_mut() };
        staging[..tables.tables.bytes().len()].copy_from_slice(tables.tables.bytes());
        Ok(StagedWave { lane, layout, tables, plans, scale, operands, detailed: false })
    }

    /// Where each task's operands go, and the bytes of all, to be written before the wave is started.
    pub(crate) fn operands(&mut self) -> (&[TaskOperands], &mut [u8]) {
        let (start, bytes) = (self.operands, self.layout.operand_bytes);
        // SAFETY: the device does not use a staged wave's memory.
        let staging = unsafe { self.lane.staging.slice_mut() };
        (&self.layout.operands, &mut staging[start..start + bytes])
    }

    /// Enqueues everything.
    pub(crate) fn start(mut self, streams: &mut Streams) -> Result<RunningWave, (Option<Lane>, CudaError)> {
        match self.enqueue(streams) {
            Ok(()) => Ok(RunningWave { staged: self }),
            Err(error) => Err((settled(self.lane, &streams.context), error)),
        }
    }

    fn enqueue(&mut self, streams: &mut Streams) -> Result<(), CudaError> {
        streams.context.bind_to_thread().map_err(driver("cuCtxSetCurrent"))?;
        let workspace = self.plans.iter().map(|plan| plan.workspace).max().unwrap_or(0);
        // Growing frees, and freeing waits for what is enqueued, so no running wave loses its work memory.
        streams.work.reserve(self.layout.work_bytes)?;
        streams.workspace.reserve(workspace)?;
        let record =
            |event: &CudaEvent, stream: &CudaStream| event.record(stream).map_err(driver("cuEventRecord"));
        let wait =
            |stream: &CudaStream, event: &CudaEvent| stream.wait(event).map_err(driver("cuStreamWaitEvent"));
        let input = self.operands + self.layout.operand_bytes;
        self.mark(&self.lane.started, &streams.upload)?;
        // SAFETY: staging and input hold `input` bytes, and stay with the running wave.
        unsafe { upload(&streams.upload, &self.lane.staging, &self.lane.input, input)? };
        record(&self.lane.uploaded, &streams.upload)?;
        wait(&streams.compute, &self.lane.uploaded)?;
        record(&self.lane.begun, &streams.compute)?;
        self.compute(streams)?;
        record(&self.lane.computed, &streams.compute)?;
        wait(&streams.download, &self.lane.computed)?;
        let output = self.layout.result_bytes;
        // SAFETY: output and results hold `output` bytes, and stay with the running wave, which nobody reads from until
        // the event has passed.
        unsafe { download(&streams.download, &self.lane.output, &mut self.lane.results, output)? };
        record(&self.lane.downloaded, &streams.download)
    }

    /// Enqueues the kernels.
    fn compute(&self, streams: &Streams) -> Result<(), CudaError> {
        let places = Places {
            tables: self.lane.input.at(0),
            tensors: self.lane.input.at(self.operands),
            work: streams.work.at(0),
            output: self.lane.output.at(0),
        };
        let movers = streams.movers(self.layout.geometry.dtype);
        // SAFETY: tables and places are those of this wave; its memory stays with it.
        unsafe { movers.bring_in(&streams.compute, &self.tables, places)? };
        self.mark(&self.lane.brought, &streams.compute)?;
        for (tables, (call, plan)) in self.tables.calls.iter().zip(self.layout.calls.iter().zip(&self.plans))
        {
            self.call(streams, places, (call, tables), plan)?;
        }
        self.mark(&self.lane.called, &streams.compute)?;
        let regions = &self.layout.regions;
        // SAFETY: as above.
        unsafe {
            match self.layout.direction {
                Direction::Forward => movers.merge_forward(&streams.compute, &self.tables, places, regions),
                Direction::Backward => movers.merge_backward(&streams.compute, &self.tables, places, regions),
            }
        }
    }

    /// Records what only a detailed wave asks for.
    fn mark(&self, event: &CudaEvent, stream: &CudaStream) -> Result<(), CudaError> {
        match self.detailed {
            true => event.record(stream).map_err(driver("cuEventRecord")),
            false => Ok(()),
        }
    }

    /// The lane, for another wave.
    pub(crate) fn into_lane(self) -> Lane {
        self.lane
    }

    /// Enqueues one call of cuDNN.
    fn call(
        &self,
        streams: &Streams,
        places: Places,
        (call, tables): (&Call, &CallTables),
        plan: &Plan,
    ) -> Result<(), CudaError> {
        let at = |base: sys::CUdeviceptr, offset: usize| (base + offset as sys::CUdeviceptr) as Raw;
        let table = |offset: usize| at(places.tables, offset);
        let work = |offset: usize| at(places.work, offset);
        let (hidden, one) = (f32::NEG_INFINITY, 1.0f32);
        let scalar = |value: &f32| std::ptr::from_ref(value).cast_mut().cast::<std::ffi::c_void>();
        let regions = &self.layout.regions;
        let forward = self.layout.direction == Direction::Forward;
        let in_place = call.tensors != Tensors::Slabs;
        let place = |in_place: bool, memory: sys::CUdeviceptr, region: usize| match in_place {
            true => at(memory, 0),
            false => work(region),
        };
        let mut tensors = vec![
            (Ids::Q, place(in_place && forward, places.tensors, regions.q)),
            (Ids::K, place(in_place, places.tensors, regions.k)),
            (Ids::V, place(in_place, places.tensors, regions.v)),
            (Ids::O, place(in_place && forward, places.output, regions.o)),
            (Ids::LSE, place(in_place && forward, places.output, regions.lse)),
            (Ids::ROWS, table(tables.rows)),
            (Ids::KEYS, table(tables.keys)),
            (Ids::Q_OFFSETS, table(tables.q_offsets)),
            (Ids::K_OFFSETS, table(tables.k_offsets)),
            (Ids::V_OFFSETS, table(tables.v_offsets)),
            (Ids::ROW_OFFSETS, table(tables.row_offsets)),
            (Ids::LSE_OFFSETS, table(tables.lse_offsets)),
            (Ids::SCALE, scalar(&self.scale)),
            (Ids::HIDDEN, scalar(&hidden)),
        ];
        if call.shape != Shape::Full {
            tensors.push((Ids::HIDDEN_CAUSAL, scalar(&hidden)));
        }
        if self.layout.direction == Direction::Backward {
            tensors.extend([
                (Ids::D_O, work(regions.d_o)),
                (Ids::DQ, work(regions.dq)),
                (Ids::DQ_SUMS, work(regions.dq_sums)),
                (Ids::DK, work(regions.dk)),
                (Ids::DV, work(regions.dv)),
                (Ids::D, work(regions.d)),
                (Ids::KEY_OFFSETS, table(tables.key_offsets)),
                (Ids::ONE, scalar(&one)),
            ]);
        }
        let (ids, addresses): (Vec<i64>, Vec<Raw>) = tensors.into_iter().unzip();
        let workspace = at(streams.workspace.at(0), 0);
        // SAFETY: every tensor of the graph is here, in memory of the wave laid out for it; scalars live until the call
        // returns; the workspace is as large as the largest plan says.
        unsafe { cudnn::execute(&streams.handle, &plan.descriptor, (&ids, &addresses), workspace) }
    }
}

/// The lane of a wave that failed, once nothing that was enqueued before uses it; none where that cannot be known: then
/// its memory is lost, rather than given to another wave or to the system while the device may still use it.
fn settled(lane: Lane, context: &CudaContext) -> Option<Lane> {
    match settle(context) {
        Ok(()) => Some(lane),
        Err(error) => {
            tracing::error!(%error, "leaking the memory of a wave");
            std::mem::forget(lane);
            None
        }
    }
}

impl RunningWave {
    /// Waits until the results are on the host.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        self.staged.lane.downloaded.synchronize().map_err(driver("cuEventSynchronize"))
    }

    /// True when [`RunningWave::wait`] would not wait, or would fail.
    pub(crate) fn is_done(&self) -> bool {
        self.staged.lane.downloaded.try_is_complete().unwrap_or(true)
    }

    /// Seconds of the kernels. After [`RunningWave::wait`].
    pub(crate) fn seconds(&self) -> Result<f64, CudaError> {
        let Lane { begun, computed, .. } = &self.staged.lane;
        let milliseconds = begun.elapsed_ms(computed).map_err(driver("cuEventElapsedTime"))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Of a detailed wave, the seconds of the kernels before cuDNN's, of cuDNN's, and of those after; and those from the start
    /// of its upload to the ends of upload, kernels and download. After [`RunningWave::wait`].
    pub(crate) fn details(&self) -> Result<Option<[[f64; 3]; 2]>, CudaError> {
        let StagedWave { lane, detailed, .. } = &self.staged;
        if !detailed {
            return Ok(None);
        }
        let seconds = |from: &CudaEvent, to: &CudaEvent| -> Result<f64, CudaError> {
            Ok(f64::from(from.elapsed_ms(to).map_err(driver("cuEventElapsedTime"))?) / 1e3)
        };
        let parts = [
            seconds(&lane.begun, &lane.brought)?,
            seconds(&lane.brought, &lane.called)?,
            seconds(&lane.called, &lane.computed)?,
        ];
        let since = |to: &CudaEvent| seconds(&lane.started, to);
        let way = [since(&lane.uploaded)?, since(&lane.computed)?, since(&lane.downloaded)?];
        Ok(Some([parts, way]))
    }

    pub(crate) fn layout(&self) -> &BatchLayout {
        &self.staged.layout
    }

    /// The bytes of all results, each at a multiple of 16. After [`RunningWave::wait`].
    pub(crate) fn results(&self) -> &[u8] {
        // SAFETY: the download has passed, and nothing writes there until the lane is used again.
        let results = unsafe { self.staged.lane.results.slice() };
        &results[..self.staged.layout.result_bytes]
    }

    /// The wave's operands, tables and plans, to be started once more. After [`RunningWave::wait`].
    pub(crate) fn again(self) -> StagedWave {
        self.staged
    }

    /// The lane of a wave that failed, if it can be used again.
    pub(crate) fn abandon(self, context: &CudaContext) -> Option<Lane> {
        settled(self.staged.lane, context)
    }

    /// The lane, for another wave. After [`RunningWave::wait`].
    pub(crate) fn into_lane(self) -> Lane {
        self.staged.lane
    }
}
