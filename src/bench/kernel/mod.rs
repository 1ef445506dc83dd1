//! `outboard bench kernel`: the CPU kernel's speed against the peak of this machine's multiply-adds, or a GPU's.

use anyhow::Context;

mod accuracy;
pub(crate) mod args;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod measure;
pub(crate) mod show;
pub(crate) mod subject;
mod suite;
mod targets;

pub(crate) use args::Args;
use measure::{Cores, Meter, measure};
use show::{Measurement, Output, Peak, Progress, table};
use subject::{Batch, Subject};

use crate::device::Device;

const REPEATS: u32 = 5;

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Device::Cuda(number) = args.device {
        #[cfg(feature = "cuda")]
        return cuda::run(&args, number, &mut Output::new(args.json.as_deref())?);
        #[cfg(not(feature = "cuda"))]
        return Err(crate::cuda::absent(Device::Cuda(number)));
    }
    let isa = args::isa(args.simd)?;
    let cores = Cores::claim()?;
    let mut output = Output::new(args.json.as_deref())?;
    if args.suite {
        return suite::run(&args, isa, &cores, &mut output);
    }
    let threads = match (&args.threads[..], cores.count()) {
        ([], 1) => vec![1],
        ([], all) => vec![1, all],
        (asked, _) => asked.to_vec(),
    };
    let devices: Vec<_> = threads.iter().map(|n| cores.device(isa, *n)).collect::<anyhow::Result<_>>()?;
    let shapes = args.head_dim.len() * args.tokens.len() * args.directions.len();
    let progress = Progress::new(args.dtype.len() * devices.len() * shapes)?;
    let mut table = table(Measurement::HEADER, 2);
    let mut peaks = Vec::new();
    for &dtype in &args.dtype {
        for device in &devices {
            let mut meter = Meter::new(device, dtype);
            let mut kernel = device.kernel()?;
            for (&head_dim, &tokens) in
                args.head_dim.iter().flat_map(|dim| args.tokens.iter().map(move |tokens| (dim, tokens)))
            {
                let geometry = args.geometry(head_dim, dtype)?;
                let queries = args.queries.unwrap_or(tokens);
                let task = args.mask.task(tokens, queries, geometry.kv_heads())?;
                progress.at(format!("{queries} x {tokens}, {dtype}, head dim {head_dim}"));
                let subject = Subject::new(&mut kernel, geometry, task)?;
                for &direction in &args.directions {
                    let mut batch = [Batch::new(direction, [&subject])];
                    let repeats = args.repeats.unwrap_or(REPEATS);
                    let figures = measure(&mut kernel, &mut meter, repeats, &mut batch)?;
                    let figures = figures.first().context("nothing was measured")?;
                    let subject = (args.mask, &subject.geometry, &subject.task);
                    let measured = Measurement::new(device, subject, direction, figures);
                    output.write(&measured)?;
                    table.add_row(measured.row());
                    progress.step();
                }
            }
            let peak = Peak::of(&meter);
            output.write(&peak)?;
            peaks.push(peak.words());
        }
    }
    drop(progress);
    let kv_heads = args.kv_heads.unwrap_or(args.heads);
    output.say(&format!("{isa}, {} query heads, {kv_heads} kv heads, {} mask", args.heads, args.mask))?;
    output.say(&table.to_string())?;
    output.say(&peaks.join("\n"))
}
