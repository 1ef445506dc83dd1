//! What a run shows: a progress bar, a line a step where there is no terminal, JSON lines, and a table at the end.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::args::Run;
use super::cluster::Cluster;
use super::forecast::Outlook;
use super::job::JobLine;
use super::protocol::Mode;
use super::report::{Record, StepLine};
use super::table::{table, words};
use crate::device::Device;

/// Where figures and words go.
pub(crate) struct Show {
    bar: Option<ProgressBar>,
    json: Option<Box<dyn Write + Send>>,
    /// Words go to standard error when standard output carries JSON.
    words_to_stderr: bool,
    cores_shared: bool,
    device: Device,
}

impl Show {
    pub(crate) fn new(run: &Run) -> anyhow::Result<Show> {
        let to_stdout = run.json.as_deref() == Some(Path::new("-"));
        let json: Option<Box<dyn Write + Send>> = match &run.json {
            None => None,
            Some(_) if to_stdout => Some(Box::new(std::io::stdout())),
            Some(path) => Some(Box::new(
                File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
            )),
        };
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(run.train.steps));
        if let Some(bar) = &bar {
            let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}")?;
            bar.set_style(style);
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        Ok(Show { bar, json, words_to_stderr: to_stdout, cores_shared: run.cores_shared, device: run.device })
    }

    /// Writes what is trained.
    pub(crate) fn job(&mut self, job: &JobLine) -> anyhow::Result<()> {
        self.write_json(job)
    }

    /// Says whether attention is worth disaggregating, loudly where it is not.
    pub(crate) fn outlook(&mut self, outlook: &Outlook) -> anyhow::Result<()> {
        self.write_json(outlook)?;
        self.say(&outlook.words());
        if let Some(warning) = outlook.warning() {
            self.warn(&warning);
        }
        Ok(())
    }

    /// Says what a person should know before reading on, where it cannot be taken for a figure.
    pub(crate) fn warn(&self, message: &str) {
        let say = || eprintln!("outboard: warning: {message}");
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }

    /// Says what runs where.
    pub(crate) fn started(&self, cluster: &Cluster) {
        for line in cluster.describe() {
            self.say(&line);
        }
    }

    pub(crate) fn step(&mut self, line: &StepLine, last_of_step: bool) -> anyhow::Result<()> {
        self.write_json(line)?;
        let said = step_words(line);
        match &self.bar {
            Some(bar) => {
                bar.set_message(said);
                if last_of_step {
                    bar.inc(1);
                }
            }
            None => self.say(&format!("step {:>3}  {said}", line.step)),
        }
        Ok(())
    }

    pub(crate) fn progress_ends(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    pub(crate) fn summary(&mut self, record: &Record) -> anyhow::Result<()> {
        let Some(summary) = record.summary() else { return Ok(()) };
        self.write_json(&summary)?;
        self.say(&table(&summary).to_string());
        for line in words(&summary, self.cores_shared, self.device) {
            self.say(&line);
        }
        Ok(())
    }

    fn write_json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let Some(out) = &mut self.json else { return Ok(()) };
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        out.write_all(&line).and_then(|()| out.flush()).context("cannot write JSON lines")
    }

    pub(crate) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.say_plainly(line)),
            None => self.say_plainly(line),
        }
    }

    fn say_plainly(&self, line: &str) {
        if self.words_to_stderr {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }
}

fn step_words(line: &StepLine) -> String {
    let StepLine {
        attention, loss, tokens_per_second, imbalance_before: before, imbalance_after: after, ..
    } = line;
    let name = attention.name();
    let mut words =
        format!("{name:<5}  loss {loss:.3}  {tokens_per_second:>6.0} tokens/s  imbalance {before:.2}");
    if *attention == Mode::Pool {
        words += &format!(" to {after:.2}  {} moved", HumanBytes(line.bytes_moved));
        if let Some(bytes) = line.bytes_with_fixed_homes {
            let predicted = HumanBytes(line.bytes_predicted.unwrap_or(0));
            words += &format!(", {predicted} planned, {} with fixed homes", HumanBytes(bytes));
        }
        if line.tasks_resent > 0 {
            words += &format!("  {} tasks resent", line.tasks_resent);
        }
    }
    words
}
