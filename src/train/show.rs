//! What a run shows: a progress bar, a line a step where there is no terminal, JSON lines, and a table at the end.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use comfy_table::{Table, presets};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::args::Run;
use super::cluster::Cluster;
use super::protocol::Mode;
use super::report::{Record, StepLine, Summary, Training};
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

    /// Says what runs where.
    pub(crate) fn started(&self, cluster: &Cluster) {
        for line in cluster.describe() {
            self.say(&line);
        }
    }

    pub(crate) fn step(&mut self, line: &StepLine, last_of_step: bool) -> anyhow::Result<()> {
        self.write_json(line)?;
        let words = step_words(line);
        match &self.bar {
            Some(bar) => {
                bar.set_message(words);
                if last_of_step {
                    bar.inc(1);
                }
            }
            None => self.say(&format!("step {:>3}  {words}", line.step)),
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
        self.say(&training_table(&summary.trainings).to_string());
        for line in summary_words(&summary, self.cores_shared, self.device) {
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

    fn say(&self, line: &str) {
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
        if line.tasks_resent > 0 {
            words += &format!("  {} tasks resent", line.tasks_resent);
        }
    }
    words
}

fn training_table(trainings: &[Training]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let mut header = vec!["attention by".to_owned()];
    header.extend(trainings.iter().map(|t| t.attention.name().to_owned()));
    table.set_header(header);
    let mut row = |name: &str, value: &dyn Fn(&Training) -> String| {
        let mut cells = vec![name.to_owned()];
        cells.extend(trainings.iter().map(value));
        table.add_row(cells);
    };
    row("loss, first to last", &|t| format!("{:.4} to {:.4}", t.loss_first, t.loss_last));
    row("tokens/s", &|t| format!("{:.0}", t.tokens_per_second));
    row("seconds", &|t| format!("{:.1}", t.seconds));
    row("  core attention", &|t| format!("{:.1}", t.attention_seconds));
    row("    with the device idle", &|t| match t.attention {
        Mode::Local => "-".to_owned(),
        Mode::Pool => format!("{:.1}", t.exposed_seconds),
    });
    row("  waiting for the slowest rank", &|t| format!("{:.1}", t.wait_seconds));
    row("  gradient exchange", &|t| format!("{:.1}", t.exchange_seconds));
    row("  model and optimizer", &|t| format!("{:.1}", t.other_seconds));
    table
}

fn summary_words(summary: &Summary, cores_shared: bool, device: Device) -> Vec<String> {
    let mut lines = vec![format!("Q, K, V and dO of core attention in {}", summary.dtype)];
    if let Some((speedup, ideal)) = summary.speedup.zip(summary.ideal_speedup) {
        let share = if ideal > 1.0 { 100.0 * (speedup - 1.0) / (ideal - 1.0) } else { 0.0 };
        lines.push(match cores_shared {
            _ if device != Device::Cpu => {
                format!("speedup {speedup:.3} by {device} over attention on the ranks' cores")
            }
            false => format!("speedup {speedup:.3}, ideal {ideal:.3}: {share:.0}% of what balance can give"),
            true => "no speedup is claimed: ranks and servers share cores".to_owned(),
        });
    }
    if let Some(difference) = summary.max_relative_loss_difference {
        lines.push(format!("largest relative difference of loss {difference:.1e}"));
    }
    lines.push(format!(
        "imbalance of the documents {:.3} (most over mean cells of a rank)",
        summary.imbalance
    ));
    if summary.tasks_planned > 0 {
        lines.push(format!(
            "tasks: {} planned, {} computed by the servers' own counters, {} resent, {} servers lost; {} moved",
            summary.tasks_planned,
            summary.tasks_computed,
            summary.tasks_resent,
            summary.servers_lost,
            HumanBytes(summary.bytes_moved)
        ));
    }
    lines
}
