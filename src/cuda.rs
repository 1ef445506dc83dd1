//! GPUs on the command line: how they are used, and how they are opened.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueEnum;

/// How a GPU is used, where one is.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "GPU")]
pub(crate) struct CudaArgs {
    /// Folders of cuDNN, cuBLASLt and NVRTC, separated by colons [default: $OUTBOARD_CUDA_LIBRARIES, then wherever the
    /// system's loader finds them].
    #[arg(long, value_name = "DIRS")]
    cuda_libraries: Option<OsString>,
    /// Where execution plans are kept between runs; `none` keeps none [default: outboard/plans in the user's cache folder].
    #[arg(long, value_name = "DIR")]
    cuda_plans: Option<PathBuf>,
    /// How backward sums: `ordered` gives equal bits in every run, where cuDNN can (9.25 and later); `fastest` does not.
    #[arg(long, value_name = "HOW", default_value = "ordered")]
    cuda_sums: Sums,
    /// Device memory that one batch may take, in MiB. Up to three are under way at once, and what they bring and take lies
    /// in pinned host memory besides.
    #[arg(long, value_name = "MIB", default_value_t = 8192, value_parser = clap::value_parser!(u64).range(64..=1 << 24))]
    cuda_batch_mib: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sums {
    Ordered,
    Fastest,
}

impl CudaArgs {
    /// The same arguments for another process.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let sums = match self.cuda_sums {
            Sums::Ordered => "ordered",
            Sums::Fastest => "fastest",
        };
        let mut words: Vec<OsString> = vec!["--cuda-sums".into(), sums.into()];
        words.extend(["--cuda-batch-mib".into(), self.cuda_batch_mib.to_string().into()]);
        let libraries = self.cuda_libraries.clone().map(|folders| ("--cuda-libraries", folders));
        let plans = self.cuda_plans.clone().map(|folder| ("--cuda-plans", folder.into_os_string()));
        for (flag, value) in libraries.into_iter().chain(plans) {
            words.extend([flag.into(), value]);
        }
        words
    }
}

#[cfg(feature = "cuda")]
impl CudaArgs {
    /// The configuration of a device.
    pub(crate) fn config(&self, device: usize) -> outboard_cuda::CudaConfig {
        use std::env;
        let libraries = self.cuda_libraries.clone().or_else(|| env::var_os("OUTBOARD_CUDA_LIBRARIES"));
        let folders =
            libraries.map(|all| env::split_paths(&all).filter(|f| !f.as_os_str().is_empty()).collect());
        let cache = || {
            let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
            let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute());
            Some(cache.or_else(home)?.join("outboard/plans"))
        };
        let plan_folder = match &self.cuda_plans {
            Some(none) if none.as_os_str() == "none" => None,
            Some(folder) => Some(folder.clone()),
            None => cache(),
        };
        let cores = crate::cores::available().map_or(1, |cores| cores.len());
        outboard_cuda::CudaConfig {
            libraries: folders.unwrap_or_default(),
            plan_folder,
            batch_bytes: usize::try_from(self.cuda_batch_mib << 20).unwrap_or(usize::MAX),
            deterministic: self.cuda_sums == Sums::Ordered,
            copy_threads: cores.clamp(1, 8),
            ..outboard_cuda::CudaConfig::new(device)
        }
    }

    /// Opens a device.
    pub(crate) fn open(&self, device: usize) -> anyhow::Result<outboard_cuda::CudaKernel> {
        Ok(outboard_cuda::CudaKernel::new(self.config(device))?)
    }
}

/// Why a build without CUDA opens no GPU.
#[cfg(not(feature = "cuda"))]
pub(crate) fn absent(device: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!(
        "this build has no CUDA backend, so it cannot open {device}; build it with --features cuda"
    )
}
