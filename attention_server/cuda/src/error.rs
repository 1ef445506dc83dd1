//! Why a GPU cannot compute.

use std::path::PathBuf;

use outboard_attention::kernel::KernelError;
use outboard_attention::{DType, Direction};

/// Why a GPU, or what it is driven through, cannot compute.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No NVIDIA driver.
    #[error(
        "there is no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded); install one for CUDA 13 (580 or later)"
    )]
    NoDriver,
    /// A driver that finds no usable GPU.
    #[error("the NVIDIA driver finds no usable GPU: {message}; see what `nvidia-smi` says")]
    NoDevice {
        /// What the driver says.
        message: String,
    },
    /// A device number beyond those there are.
    #[error("there is no device cuda:{device}; this machine has {count}, from cuda:0")]
    DeviceNumber {
        /// The number asked for.
        device: usize,
        /// Devices there are.
        count: usize,
    },
    /// A GPU without the kernels' instructions.
    #[error(
        "cuda:{device} ({name}) has compute capability {major}.{minor}; attention needs 9.0 (Hopper) or later"
    )]
    OldDevice {
        /// Its number.
        device: usize,
        /// Its name.
        name: String,
        /// Major compute capability.
        major: i32,
        /// Minor compute capability.
        minor: i32,
    },
    /// A library that cannot be loaded.
    #[error(
        "{library} cannot be loaded, neither from {folders:?} nor by the system's loader: {message}; install the PyPI \
         package {package}, and name its folder with --cuda-libraries or OUTBOARD_CUDA_LIBRARIES"
    )]
    Library {
        /// The file.
        library: &'static str,
        /// The package that has it.
        package: &'static str,
        /// Where it was looked for.
        folders: Vec<PathBuf>,
        /// What the loader says.
        message: String,
    },
    /// A cuDNN without what is needed.
    #[error("cuDNN is version {found}; attention needs 9.10 or later (PyPI package nvidia-cudnn-cu13)")]
    OldCudnn {
        /// Its version.
        found: String,
    },
    /// A call of cuDNN that failed.
    #[error("cuDNN: {call} failed: {message}")]
    Cudnn {
        /// What was called.
        call: String,
        /// What cuDNN says.
        message: String,
    },
    /// A geometry that cuDNN has no kernel for.
    #[error("cuDNN has no {direction} kernel for this geometry: {message}")]
    NoEngine {
        /// The direction.
        direction: Direction,
        /// What was tried.
        message: String,
    },
    /// A call of the driver that failed.
    #[error(
        "the GPU failed at {call}: {message}; {}",
        if *lost { "the device is lost to this process: see `dmesg` for its Xid, and start the server anew" }
        else { "see what `nvidia-smi` says of its memory and load" }
    )]
    Driver {
        /// What was called.
        call: &'static str,
        /// What the driver says.
        message: String,
        /// Whether every later call will fail too.
        lost: bool,
    },
    /// A device that does not answer.
    #[error("the GPU has not answered for {seconds} s; see `dmesg` for its Xid, and start the server anew")]
    Silent {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The kernels that move data did not compile.
    #[error("NVRTC cannot compile the kernels that move data: {message}")]
    Compile {
        /// What the compiler says.
        message: String,
    },
    /// Memory that the device or the host does not have.
    #[error(
        "{bytes} bytes of {place} memory cannot be had: {message}; give the server a smaller --cuda-batch-mib, or the task fewer tokens"
    )]
    Memory {
        /// Bytes asked for.
        bytes: usize,
        /// "device" or "pinned host".
        place: &'static str,
        /// What the driver says.
        message: String,
    },
    /// A driver that is too old.
    #[error("the NVIDIA driver is for CUDA {found}; install one for CUDA 13 (580 or later)")]
    OldDriver {
        /// The version of CUDA it is for.
        found: String,
    },
    /// A mask in too many parts.
    #[error(
        "task {index} of the batch is cut into more than {max} pieces by its mask; cut the task, or send it to CPU servers"
    )]
    TooManyPieces {
        /// Index of the task in the batch.
        index: usize,
        /// The most there may be.
        max: usize,
    },
    /// Something that must be computed by itself, while other batches are under way.
    #[error("{waves} waves are under way; finish them first")]
    Busy {
        /// How many.
        waves: usize,
    },
    /// A batch that is not computed as one wave.
    #[error(
        "the batch makes {waves} waves, and one is measured; give tasks of one direction and geometry, and fewer of them"
    )]
    NotOneWave {
        /// How many it makes.
        waves: usize,
    },
    /// A batch that does not fit what the kernel may take.
    #[error(
        "task {index} of the batch needs {needed} bytes of device memory, the kernel may take {limit} for one batch; cut the task into fewer tokens"
    )]
    TooLarge {
        /// Index of the task in the batch.
        index: usize,
        /// Bytes it needs.
        needed: usize,
        /// [`CudaConfig::batch_bytes`](crate::CudaConfig::batch_bytes).
        limit: usize,
    },
    /// An element type that is not computed.
    #[error("dtype is {dtype}; a GPU computes bf16 and f16")]
    DType {
        /// The type asked for.
        dtype: DType,
    },
    /// A feature that is not computed.
    #[error("softcap is {softcap}; a GPU computes none, send such tasks to CPU servers")]
    Softcap {
        /// The value asked for.
        softcap: f32,
    },
    /// A query group that is not computed.
    #[error("{group} query heads share a kv head; a GPU computes at most {max}")]
    Group {
        /// Query heads of a kv head.
        group: usize,
        /// The most there may be.
        max: usize,
    },
    /// A stage of a task.
    #[error("task {index} of the batch is a stage; a GPU computes whole tasks")]
    Stage {
        /// Index of the task in the batch.
        index: usize,
    },
    /// A task that does not fit its tensors.
    #[error(transparent)]
    Invalid(#[from] KernelError),
}

impl CudaError {
    /// True when the device will not compute anything again.
    pub fn is_fatal(&self) -> bool {
        matches!(self, CudaError::Driver { lost: true, .. } | CudaError::Silent { .. })
    }
}
