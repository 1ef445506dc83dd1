//! Our own kernels, compiled by NVRTC when a device is opened: they bring tasks into the order of sequences, and merge
//! the results of pieces.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use outboard_attention::DType;

use super::driver;
use crate::CudaError;
use crate::batch::{BatchTables, KeyHead, MadeUp, Move, MoveTable, Regions, RowHead, RowMove};

const SOURCE: &str = include_str!("kernels.cu");

/// Threads of a block: lanes of a row, and rows.
const BLOCK: (u32, u32, u32) = (32, 8, 1);
/// Blocks along the rows at most; a block takes further rows in turn.
const MAX_ROW_BLOCKS: usize = 2048;
/// Entries of a table that one launch takes at most, a limit of the hardware.
const MAX_ENTRIES: usize = 65_535;

/// The kernels for one 16-bit element type.
#[derive(Debug)]
pub(crate) struct Movers {
    move_heads: CudaFunction,
    move_rows: CudaFunction,
    make_up: CudaFunction,
    merge_outputs: CudaFunction,
    sum_rows: CudaFunction,
    sum_keys: CudaFunction,
}

/// Device addresses that the kernels of a batch work on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    pub(crate) tables: sys::CUdeviceptr,
    pub(crate) tensors: sys::CUdeviceptr,
    pub(crate) work: sys::CUdeviceptr,
    pub(crate) output: sys::CUdeviceptr,
}

/// Compiles the kernels to PTX: needs NVRTC, but no device.
pub(crate) fn compile(dtype: DType, (major, minor): (i32, i32)) -> Result<cudarc::nvrtc::Ptx, CudaError> {
    let options = vec![
        format!("--gpu-architecture=compute_{major}{minor}"),
        format!("-DOUTBOARD_BF16={}", u8::from(dtype == DType::Bf16)),
    ];
    let options = CompileOptions { options, name: Some("kernels.cu".to_owned()), ..Default::default() };
    compile_ptx_with_opts(SOURCE, options).map_err(|error| CudaError::Compile {
        message: match error {
            CompileError::CompileError { log, .. } => log.to_string_lossy().into_owned(),
            other => format!("{other:?}"),
        },
    })
}

impl Movers {
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        dtype: DType,
        compute: (i32, i32),
    ) -> Result<Movers, CudaError> {
        let module = context.load_module(compile(dtype, compute)?).map_err(driver("cuModuleLoadData"))?;
        let load = |name| module.load_function(name).map_err(driver("cuModuleGetFunction"));
        Ok(Movers {
            move_heads: load("move_heads")?,
            move_rows: load("move_rows")?,
            make_up: load("make_up")?,
            merge_outputs: load("merge_outputs")?,
            sum_rows: load("sum_rows")?,
            sum_keys: load("sum_keys")?,
        })
    }

    /// Enqueues what brings operands into the order of sequences.
    ///
    /// # Safety
    /// `places` and `tables` must be those of one batch, laid out and uploaded, and stay until the stream has passed this
    /// point.
    pub(crate) unsafe fn bring_in(
        &self,
        stream: &CudaStream,
        tables: &BatchTables,
        places: Places,
    ) -> Result<(), CudaError> {
        let Places { tensors, work, .. } = places;
        let table = |table: MoveTable| places.tables + table.start as sys::CUdeviceptr;
        // SAFETY: the caller vouches for the tables, whose entries stay within the batch's memory.
        unsafe {
            launch::<Move>(stream, &self.move_heads, tables.moves, &[tensors, work], &[table(tables.moves)])?;
            launch::<RowMove>(
                stream,
                &self.move_rows,
                tables.row_moves,
                &[tensors, work],
                &[table(tables.row_moves)],
            )?;
            launch::<MadeUp>(
                stream,
                &self.make_up,
                tables.made_up,
                &[tensors, work],
                &[table(tables.made_up)],
            )
        }
    }

    /// Enqueues what merges the outputs of forward pieces.
    ///
    /// # Safety
    /// As for [`Movers::bring_in`].
    pub(crate) unsafe fn merge_forward(
        &self,
        stream: &CudaStream,
        tables: &BatchTables,
        places: Places,
        regions: &Regions,
    ) -> Result<(), CudaError> {
        let at = |offset: usize| places.work + offset as sys::CUdeviceptr;
        let table = |start: usize| places.tables + start as sys::CUdeviceptr;
        let [starts, spans] = tables.row_index.map(table);
        let before = [at(regions.o), at(regions.lse), places.output];
        let heads = [table(tables.row_heads.start), starts, spans];
        // SAFETY: as above.
        unsafe { launch::<RowHead>(stream, &self.merge_outputs, tables.row_heads, &before, &heads) }
    }

    /// Enqueues what sums the gradients of backward pieces.
    ///
    /// # Safety
    /// As for [`Movers::bring_in`].
    pub(crate) unsafe fn merge_backward(
        &self,
        stream: &CudaStream,
        tables: &BatchTables,
        places: Places,
        regions: &Regions,
    ) -> Result<(), CudaError> {
        let at = |offset: usize| places.work + offset as sys::CUdeviceptr;
        let table = |start: usize| places.tables + start as sys::CUdeviceptr;
        let [starts, spans] = tables.row_index.map(table);
        let rows = [table(tables.row_heads.start), starts, spans];
        let [starts, spans] = tables.key_index.map(table);
        let keys = [table(tables.key_heads.start), starts, spans];
        // SAFETY: as above.
        unsafe {
            launch::<RowHead>(
                stream,
                &self.sum_rows,
                tables.row_heads,
                &[at(regions.dq), places.output],
                &rows,
            )?;
            let before = [at(regions.dk), at(regions.dv), places.output];
            launch::<KeyHead>(stream, &self.sum_keys, tables.key_heads, &before, &keys)
        }
    }
}

/// Launches a kernel over a table of `T`: its arguments are addresses, those of `before`, then of `tables`, the first of
/// which is that of the table itself.
///
/// # Safety
/// The addresses must be what the kernel takes.
unsafe fn launch<T>(
    stream: &CudaStream,
    kernel: &CudaFunction,
    table: MoveTable,
    before: &[sys::CUdeviceptr],
    tables: &[sys::CUdeviceptr],
) -> Result<(), CudaError> {
    let mut first = 0;
    while first < table.entries {
        let entries = (table.entries - first).min(MAX_ENTRIES);
        let mut arguments = [before, tables].concat();
        arguments[before.len()] += (first * size_of::<T>()) as sys::CUdeviceptr;
        let rows = table.rows.div_ceil(BLOCK.1 as usize).clamp(1, MAX_ROW_BLOCKS);
        let grid_dim = (rows as u32, entries as u32, 1);
        let mut launch = stream.launch_builder(kernel);
        for argument in &arguments {
            launch.arg(argument);
        }
        // SAFETY: the caller vouches for the arguments; the kernels end at their tables' rows.
        let launched =
            unsafe { launch.launch(LaunchConfig { grid_dim, block_dim: BLOCK, shared_mem_bytes: 0 }) };
        launched.map_err(driver("cuLaunchKernel"))?;
        first += entries;
    }
    Ok(())
}
