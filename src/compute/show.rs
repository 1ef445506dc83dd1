//! What is printed: a line for each task and one for all of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::backend::Backend;
use super::files::Entry;
use crate::bench::kernel::show::Output;

/// A task that was computed.
#[derive(Debug, Serialize)]
struct TaskLine<'a> {
    kind: &'static str,
    name: &'a str,
    direction: String,
    dtype: String,
    /// Cells of the mask, each counted once per kv head.
    cells: u64,
    flops: f64,
    numerics_id: String,
}

/// All of them.
#[derive(Debug, Serialize)]
struct TotalLine {
    kind: &'static str,
    tasks: usize,
    /// Into how many batches the tasks went.
    batches: usize,
    cells: u64,
    flops: f64,
    /// Computing, files not counted. The first batch of a device may include its getting ready.
    seconds: f64,
    device: String,
    numerics_ids: BTreeSet<String>,
}

/// Prints what was computed, as words or as JSON lines.
pub(super) fn show(
    json: bool,
    entries: &[Entry],
    backend: &dyn Backend,
    (batches, took): (usize, Duration),
) -> anyhow::Result<()> {
    let mut output = Output::new(json.then_some(Path::new("-")))?;
    let mut total = TotalLine {
        kind: "total",
        tasks: entries.len(),
        batches,
        cells: 0,
        flops: 0.0,
        seconds: took.as_secs_f64(),
        device: backend.describe(),
        numerics_ids: BTreeSet::new(),
    };
    let width = entries.iter().map(|entry| entry.name.len()).max().unwrap_or_default();
    for entry in entries {
        let line = TaskLine {
            kind: "task",
            name: &entry.name,
            direction: entry.direction.to_string(),
            dtype: entry.geometry.dtype().to_string(),
            cells: entry.task.cells(),
            flops: entry.task.flops(&entry.geometry, entry.direction),
            numerics_id: backend.numerics_id(entry.geometry.dtype()),
        };
        output.write(&line)?;
        let TaskLine { name, direction, dtype, cells, numerics_id, .. } = &line;
        let gflop = line.flops / 1e9;
        output.say(&format!(
            "{name:width$}  {direction:8}  {dtype:4}  {cells} cells  {gflop:.3} GFLOP  {numerics_id}"
        ))?;
        total.cells = total.cells.saturating_add(line.cells);
        total.flops += line.flops;
        total.numerics_ids.insert(line.numerics_id);
    }
    output.write(&total)?;
    let TotalLine { tasks, cells, seconds, device, .. } = &total;
    let gflop = total.flops / 1e9;
    output.say(&format!(
        "{tasks} tasks in {batches} batches  {cells} cells  {gflop:.3} GFLOP  {seconds:.6} s  {device}"
    ))
}
