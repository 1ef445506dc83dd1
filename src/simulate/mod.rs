//! `outboard simulate`: what a training step would take on a cluster, by each way to share core attention.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use outboard_simulator::Policy;

use description::{Description, Named};
use entries::Flags;
use point::Point;
use record::Record;

use crate::bench::kernel::show::Output;

pub(crate) mod description;
pub(crate) mod entries;
mod file;
mod html;
mod lengths;
pub(crate) mod point;
mod record;
mod run;
mod shapes;
mod sweep;
pub(crate) mod table;
mod value;

/// Arguments of `outboard simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    described: Described,
    /// Write results as JSON lines to this file, `-` for standard output.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the same as comma-separated values to this file, `-` for standard output.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a page that shows the results to this file: throughput by scale, where the time goes, memory, and what some
    /// devices do when. It needs no network and no other file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Threads that simulate; results do not depend on it. By default as many as there are cores.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// What says what is to be simulated.
#[derive(Debug, clap::Args)]
pub(crate) struct Described {
    /// Say it in this file; flags count for more. Its entries are the flags' names with underscores, in tables: `[layout]`
    /// has gpus, tensor, pipeline, context_parallel, micro_batches and dedicated; `[network]` has
    /// gpus_per_node; `[network.within]` and `[network.between]` have bytes_per_second and latency_seconds; `[tuning]` has the
    /// efficiencies and overheads; `[model]` may hold shapes and `[gpu]` peak_flops_per_second, memory_bytes and
    /// memory_bytes_per_second; `[sweep]` has a list for each of its names. Files that it names are looked for beside it.
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

impl Described {
    /// The file, and the flags over it.
    pub(crate) fn description(&self) -> anyhow::Result<Description> {
        let mut description = Description::new()?;
        if let Some(config) = &self.config {
            let folder = config.parent().unwrap_or(Path::new(""));
            description.take(&file::read(config).context("--config")?, folder)?;
        }
        description.take(&self.flags.said, Path::new(""))?;
        sweep::check(&description)?;
        Ok(description)
    }

    /// The one scenario of those who look at no more.
    pub(crate) fn one(&self) -> anyhow::Result<Named> {
        let description = self.description()?;
        if !description.sweep.is_empty() {
            bail!("sweep: one scenario is looked at; leave it out, or see `outboard simulate`");
        }
        if description.policies.len() < Policy::ALL.len() {
            bail!("policy: all that are of use are looked at; leave it out, or see `outboard simulate`");
        }
        description.named()
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { described, json, csv, html, threads } = args;
    check_files([("--json", &json), ("--csv", &csv), ("--html", &html)])?;
    let description = described.description()?;
    let swept = !description.sweep.is_empty();
    let mut lines = Output::new(json.as_deref())?;
    let mut columns = String::new();
    let mut points: Vec<Point> = Vec::new();
    let threads = threads.map_or_else(run::threads, usize::from);
    run::points(&description, threads, html.is_some(), |point| {
        for row in &point.rows {
            let record = Record::of(&point, row);
            lines.write(&record)?;
            if columns.is_empty() {
                columns.push_str(&record.header());
            }
            columns.push_str(&record.line());
        }
        // What devices do when is shown of one point, the last that has anything to show.
        if point.fastest().is_some() {
            points.iter_mut().for_each(Point::drop_traces);
        }
        points.push(point);
        Ok(())
    })?;
    let standard = csv.as_deref() == Some(Path::new("-"));
    match &csv {
        Some(_) if standard => Output::new(None)?.say(columns.trim_end())?,
        Some(file) => std::fs::write(file, columns).with_context(|| format!("--csv {}", file.display()))?,
        None => {}
    }
    let failures: Vec<String> = points.iter().filter_map(Point::failure).collect();
    if let Some(reason) = failures.first()
        && failures.len() == points.len()
    {
        let what = match (swept, description.policies.len()) {
            (true, _) => "no point can be simulated; the first: ",
            (false, 1) => "",
            (false, _) => "no policy can do it: ",
        };
        bail!("{what}{reason}");
    }
    if !standard {
        say(&description, &points, &lines)?;
    }
    if let Some(file) = &html {
        let page = html::page(&description, &points);
        std::fs::write(file, page).with_context(|| format!("--html {}", file.display()))?;
    }
    Ok(())
}

/// Checks, before anything is simulated, that results can be written, each to a file of its own.
fn check_files(files: [(&str, &Option<PathBuf>); 3]) -> anyhow::Result<()> {
    let named = files.iter().filter_map(|(flag, file)| Some((*flag, file.as_deref()?)));
    let mut before: Vec<(&str, PathBuf)> = Vec::new();
    for (flag, file) in named {
        let standard = file == Path::new("-") && flag != "--html";
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            bail!("{flag} {}: there is no folder {}", file.display(), folder.display());
        }
        let place = if standard { file.to_owned() } else { place(file) };
        if let Some((other, _)) = before.iter().find(|(_, other)| *other == place) {
            bail!("{other} and {flag} both name {}", file.display());
        }
        if !standard {
            writable(file).with_context(|| format!("{flag} {}", file.display()))?;
        }
        before.push((flag, place));
    }
    Ok(())
}

/// The one path of a file that may go by several, or may not be there yet.
fn place(file: &Path) -> PathBuf {
    let there = file.canonicalize().ok();
    let of_folder = || {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
        Some(folder.join(file.file_name()?))
    };
    there.or_else(of_folder).unwrap_or_else(|| file.to_owned())
}

/// Checks that a file can be written, and leaves all as it was.
fn writable(file: &Path) -> std::io::Result<()> {
    // Who reads a pipe would take the end of the check for the end of the results.
    if file.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        return Ok(());
    }
    let is_new = file.symlink_metadata().is_err();
    OpenOptions::new().write(true).create(true).truncate(false).open(file)?;
    if is_new { std::fs::remove_file(file) } else { Ok(()) }
}

/// Prints what people read.
fn say(description: &Description, points: &[Point], output: &Output) -> anyhow::Result<()> {
    let Some(last) = points.iter().rfind(|point| point.fastest().is_some()) else { return Ok(()) };
    output.say(&table::about(points))?;
    // The last column is words of any length; without it rows end where their words do.
    let table = table::table(description, points).to_string();
    output.say(&table.lines().map(str::trim_end).collect::<Vec<_>>().join("\n"))?;
    output.say("* fastest; gain: tokens/s over the best of what trainers do without attention servers (fixed, wlb, cp, cp-ring); GB of the GPU that needs or sends most, a step")?;
    output.say(&table::tunings(points))?;
    let verdict = if points.len() > 1 { table::range(points) } else { table::verdict(last) };
    verdict.map_or(Ok(()), |verdict| output.say(&verdict))
}
