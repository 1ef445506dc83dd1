//! Our own kernels, compiled by NVRTC when a device is opened: they bring tasks into the order of sequences, and merge
//! the results of pieces.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, CudaStream, LaunchConfig, PushKernelArg, sys};
use cudarc::nvrtc::{CompileError, CompileOptions, compile_ptx_with_opts};
use outboard_attention::DType;

use super::driver;
use crate::CudaError;
use crate::batch::{BatchTables, MoveTable, Regions};

const SOURCE: &str = include_str!("kernels.cu");

/// Threads of a block: lanes of a row, and rows.
const BLOCK: (u32, u32, u32) = (32, 8, 1);
/// Blocks along the rows at most; a block takes further rows in turn.
const MAX_ROW_BLOCKS: usize = 2048;
/// Entries of tables that one launch takes at most, a limit of the hardware.
const MAX_ENTRIES: usize = 65_535;

/// The kernels for one 16-bit element type.
#[derive(Debug)]
pub(crate) struct Movers {
    bring_in: CudaFunction,
    merge_outputs: CudaFunction,
    sum_gradients: CudaFunction,
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
            bring_in: load("bring_in")?,
            merge_outputs: load("merge_outputs")?,
            sum_gradients: load("sum_gradients")?,
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
        let BatchTables { moves, row_moves, made_up, .. } = tables;
        let tables = [*moves, *row_moves, *made_up];
        let [moves_at, row_moves_at, made_up_at] =
            tables.map(|table| places.tables + table.start as sys::CUdeviceptr);
        let addresses = [tensors, work, moves_at, row_moves_at, made_up_at];
        let counts = [moves.entries as i32, row_moves.entries as i32];
        // SAFETY: the caller vouches for the tables, whose entries stay within the batch's memory.
        unsafe { launch(stream, &self.bring_in, &tables, &addresses, &counts) }
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
        let heads = table(tables.row_heads.start);
        let addresses = [at(regions.o), at(regions.lse), places.output, heads, starts, spans];
        // SAFETY: as above.
        unsafe { launch(stream, &self.merge_outputs, &[tables.row_heads], &addresses, &[]) }
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
        let [row_starts, row_spans] = tables.row_index.map(table);
        let [key_starts, key_spans] = tables.key_index.map(table);
        let (rows, keys) = (tables.row_heads, tables.key_heads);
        let addresses = [
            at(regions.dq),
            at(regions.dk),
            at(regions.dv),
            places.output,
            table(rows.start),
            row_starts,
            row_spans,
            table(keys.start),
            key_starts,
            key_spans,
        ];
        // SAFETY: as above.
        unsafe { launch(stream, &self.sum_gradients, &[rows, keys], &addresses, &[rows.entries as i32]) }
    }
}

/// Launches a kernel over the entries of some tables, one after the other. Its arguments are `addresses`, the number of the
/// first entry, and `counts`.
///
/// # Safety
/// The arguments must be what the kernel takes.
unsafe fn launch(
    stream: &CudaStream,
    kernel: &CudaFunction,
    tables: &[MoveTable],
    addresses: &[sys::CUdeviceptr],
    counts: &[i32],
) -> Result<(), CudaError> {
    let entries: usize = tables.iter().map(|table| table.entries).sum();
    let rows = tables.iter().map(|table| table.rows).max().unwrap_or(0);
    let blocks = rows.div_ceil(BLOCK.1 as usize).clamp(1, MAX_ROW_BLOCKS) as u32;
    for first in (0..entries).step_by(MAX_ENTRIES) {
        let grid_dim = (blocks, (entries - first).min(MAX_ENTRIES) as u32, 1);
        let first = first as i32;
        let mut launch = stream.launch_builder(kernel);
        for address in addresses {
            launch.arg(address);
        }
        launch.arg(&first);
        for count in counts {
            launch.arg(count);
        }
        // SAFETY: the caller vouches for the arguments; the kernels end at their tables' rows.
        let launched =
            unsafe { launch.launch(LaunchConfig { grid_dim, block_dim: BLOCK, shared_mem_bytes: 0 }) };
        launched.map_err(driver("cuLaunchKernel"))?;
    }
    Ok(())
}
