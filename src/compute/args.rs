//! Flags of `outboard compute`.

use std::path::PathBuf;

use outboard_attention::kernel::Isa;

use crate::cuda::CudaArgs;
use crate::device::Device;

/// Arguments of `outboard compute`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of batch.json and the tasks' tensors. Results are written there, beside them.
    pub(super) dir: PathBuf,
    /// What computes: cpu, or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub(super) device: Device,
    /// With --device cpu: threads that compute; they change no bit [default: one a core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(super) threads: Option<u16>,
    /// With --device cpu: instruction set, portable, avx2, avx512 or avx512-bf16 [default: the best of this machine].
    #[arg(long, alias = "simd", value_name = "SET")]
    pub(super) isa: Option<Isa>,
    /// Compute each task in a batch of its own instead of all in one. On a deterministic device no bit differs.
    #[arg(long)]
    pub(super) alone: bool,
    /// Print one JSON object a line instead of words.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) cuda: CudaArgs,
}
