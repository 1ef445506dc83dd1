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
    /// Device memory that one batch may take, in MiB [default: a third of the device's, which is also the most]. Up to three
    /// are under way at once, and what they bring and take lies in pinned host memory besides.
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(64..=1 << 24))]
    cuda_batch_mib: Option<u64>,
    /// Move all tensors into an order of their own first, even where cuDNN could use them as they lie. Changes no bit.
    #[arg(long)]
    cuda_move_all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Sums {
    Ordered,
    Fastest,
}

impl CudaArgs {
    /// The same arguments for another process.
    pub(crate) fn words(&self) -> Vec<OsString> {
        let CudaArgs { cuda_libraries, cuda_plans, cuda_sums, cuda_batch_mib, cuda_move_all } = self;
        let valued = [
            ("--cuda-libraries", cuda_libraries.clone()),
            ("--cuda-plans", cuda_plans.clone().map(PathBuf::into_os_string)),
            ("--cuda-sums", named(cuda_sums)),
            ("--cuda-batch-mib", cuda_batch_mib.map(|mib| mib.to_string().into())),
        ];
        let valued = valued.into_iter().filter_map(|(flag, value)| Some([OsString::from(flag), value?]));
        valued.flatten().chain(cuda_move_all.then(|| "--cuda-move-all".into())).collect()
    }
}

fn named(value: &impl ValueEnum) -> Option<OsString> {
    Some(value.to_possible_value()?.get_name().into())
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
            batch_bytes: self.cuda_batch_mib.map_or(usize::MAX, |mib| (mib as usize).saturating_mul(1 << 20)),
            deterministic: self.cuda_sums == Sums::Ordered,
            copy_threads: cores.clamp(1, 8),
            in_place: !self.cuda_move_all,
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        cuda: CudaArgs,
    }

    #[test]
    fn arguments_are_passed_on_as_they_were_given() {
        let all = "--cuda-libraries a:b --cuda-plans none --cuda-sums fastest --cuda-batch-mib 64 \
                   --cuda-move-all";
        for given in ["", all] {
            let parse = |words: Vec<OsString>| {
                Command::parse_from([OsString::from("x")].into_iter().chain(words)).cuda
            };
            let first = parse(given.split_whitespace().map(OsString::from).collect());
            assert_eq!(format!("{:?}", parse(first.words())), format!("{first:?}"));
        }
    }
}
