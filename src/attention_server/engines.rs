//! An engine for each device.

use anyhow::ensure;
use outboard_attention::kernel::Isa;
use outboard_attention_server::{CpuOptions, DeviceOptions, Engine, EngineOptions};
use outboard_proto::describe;

use super::Args;
use crate::cores;
use crate::device::{Device, Devices};

/// Starts the engines that `--device` names. They are closed by their servers.
pub(super) fn start(args: &Args) -> anyhow::Result<Vec<Engine>> {
    let on_gpu = matches!(args.device, Devices::One(Device::Cuda(_)) | Devices::AllCuda);
    ensure!(
        !on_gpu || (args.threads.is_none() && args.isa.is_none()),
        "--threads and --isa are for --device cpu, and --device is {}",
        args.device
    );
    match args.device {
        Devices::One(Device::Cpu) => Ok(vec![cpu(args)?]),
        Devices::One(Device::Cuda(device)) => gpus::start(args, &[device]),
        Devices::AllCuda => gpus::start(args, &gpus::all()?),
        Devices::Auto => match gpus::all().and_then(|all| gpus::start_usable(args, &all)) {
            Ok(engines) => Ok(engines),
            Err(error) => {
                let why = describe(error.as_ref());
                eprintln!("outboard: the CPU computes, since no GPU is usable: {why}");
                Ok(vec![cpu(args)?])
            }
        },
    }
}

fn cpu(args: &Args) -> anyhow::Result<Engine> {
    let threads = match args.threads {
        Some(threads) => usize::from(threads),
        None => cores::available()?.len(),
    };
    let isa = args.isa.unwrap_or_else(Isa::detect);
    let device = DeviceOptions::Cpu(CpuOptions { isa, threads, ..CpuOptions::default() });
    Ok(Engine::start(&options(args, device))?)
}

fn options(args: &Args, device: DeviceOptions) -> EngineOptions {
    EngineOptions { device, memory_bytes: args.memory_mib << 20 }
}

#[cfg(feature = "cuda")]
mod gpus {
    use anyhow::Context;
    use outboard_attention_server::{CudaOptions, ServerError};

    use super::*;

    /// The numbers of this machine's GPUs.
    pub(super) fn all() -> anyhow::Result<Vec<usize>> {
        Ok(outboard_cuda::devices()?.into_iter().map(|device| device.number).collect())
    }

    pub(super) fn start(args: &Args, devices: &[usize]) -> anyhow::Result<Vec<Engine>> {
        let mut engines = Vec::with_capacity(devices.len());
        for engine in each(args, devices) {
            engines.push(engine?);
        }
        Ok(engines)
    }

    /// The engines of those devices that can be opened, with a line for each other one.
    pub(super) fn start_usable(args: &Args, devices: &[usize]) -> anyhow::Result<Vec<Engine>> {
        let (mut engines, mut errors) = (Vec::new(), Vec::new());
        for (device, engine) in devices.iter().zip(each(args, devices)) {
            match engine {
                Ok(engine) => engines.push(engine),
                Err(error) => errors.push((Device::Cuda(*device), error)),
            }
        }
        if engines.is_empty() {
            let (_, error) = errors.into_iter().next().context("there is none")?;
            return Err(error.into());
        }
        for (device, error) in errors {
            eprintln!("outboard: {device} is not used: {}", describe(&error));
        }
        Ok(engines)
    }

    /// Opens devices at the same time, which takes seconds each.
    fn each(args: &Args, devices: &[usize]) -> Vec<Result<Engine, ServerError>> {
        let start = |device: usize| {
            let device = DeviceOptions::Cuda(CudaOptions::new(args.cuda.config(device)));
            Engine::start(&options(args, device))
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = devices.iter().map(|&device| scope.spawn(move || start(device))).collect();
            let panicked = |_| Err(ServerError::Kernel("opening a device panicked".to_owned()));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        })
    }
}

#[cfg(not(feature = "cuda"))]
mod gpus {
    use super::*;

    pub(super) fn all() -> anyhow::Result<Vec<usize>> {
        Err(crate::cuda::absent("GPUs"))
    }

    pub(super) fn start(_: &Args, devices: &[usize]) -> anyhow::Result<Vec<Engine>> {
        match devices {
            [device, ..] => Err(crate::cuda::absent(Device::Cuda(*device))),
            [] => all().map(|_| Vec::new()),
        }
    }

    pub(super) fn start_usable(args: &Args, devices: &[usize]) -> anyhow::Result<Vec<Engine>> {
        start(args, devices)
    }
}
