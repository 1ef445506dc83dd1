//! Operators of the model with a backward pass of their own.
//!
//! candle's fused norms, rotary positions and softmax have none, and gradients vanish silently; chains of its
//! primitives have one, and read and write every activation ten times over. These are the same formulas in one pass
//! each way, in a fixed order of summation; tests hold them against the chains of primitives.

mod cross_entropy;
mod math;
mod rms_norm;
mod rope;
mod swiglu;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};

pub(crate) use cross_entropy::{CrossEntropy, NO_TARGET};
pub(crate) use rms_norm::RmsNorm;
pub(crate) use rope::{Rope, RopeTable};
pub(crate) use swiglu::SwiGlu;

/// The elements of an operator's argument, which must be contiguous f32.
pub(crate) fn elements<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = layout.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op })?;
    match storage.as_slice::<f32>()?.get(start..end) {
        Some(elements) => Ok(elements),
        None => candle_core::bail!("{op}: a layout of {end} elements does not fit its storage"),
    }
}

/// Calls `f` with the elements of a tensor on the CPU, which are copied only when they are not contiguous.
pub(crate) fn with_elements<T>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(&[f32]) -> Result<T>,
) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(elements(op, storage, layout)?),
        _ => candle_core::bail!("{op} runs on the CPU only"),
    }
}
