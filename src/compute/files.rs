//! batch.json, and what it means in the domain.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use outboard_attention::{
    BandSlice, DType, Direction, DocumentId, HeadGeometry, HeadShape, Mask, MaskPart, Task,
};
use serde::Deserialize;

use crate::slices::{self, SliceEntry, span};
use crate::step::near;

/// The file of a batch's folder that says what its tasks are.
pub(super) const BATCH_FILE: &str = "batch.json";
const VERSION: u64 = 1;
/// With any suffix a name of this length still fits a file system's limit.
const LONGEST_NAME: usize = 200;

/// A task to compute, checked.
#[derive(Debug)]
pub(super) struct Entry {
    /// What its files' names start with.
    pub(super) name: String,
    pub(super) direction: Direction,
    pub(super) geometry: HeadGeometry,
    pub(super) task: Task,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BatchFile {
    version: u64,
    tasks: Vec<TaskEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TaskEntry {
    name: String,
    direction: DirectionEntry,
    geometry: GeometryEntry,
    q: [usize; 2],
    kv: [usize; 2],
    kv_heads: [usize; 2],
    mask: Option<Vec<SliceEntry>>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DirectionEntry {
    Forward,
    Backward,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GeometryEntry {
    q_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    v_head_dim: usize,
    /// As f32 it may turn out infinite or zero, which the domain refuses by name.
    scale: f64,
    dtype: DTypeEntry,
    softcap: Option<f64>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum DTypeEntry {
    F32,
    Bf16,
    F16,
}

/// Reads the tasks of a folder. Errors name the file, the task and the field at fault.
pub(super) fn read(dir: &Path) -> anyhow::Result<Vec<Entry>> {
    let path = dir.join(BATCH_FILE);
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &[u8]) -> anyhow::Result<Vec<Entry>> {
    let file: BatchFile = serde_json::from_slice(text).map_err(|error| {
        // A file of another version is refused for that, not for its fields.
        if let Err(other) = serde_json::from_slice::<VersionOnly>(text).map_or(Ok(()), |file| file.check()) {
            return other;
        }
        let before = near(text, error.line(), error.column());
        let task = culprit(text).map_or_else(String::new, |task| format!("{task}: "));
        anyhow!("{task}{error}{before}")
    })?;
    VersionOnly { version: file.version }.check()?;
    ensure!(!file.tasks.is_empty(), "tasks is empty; there is nothing to compute");
    let mut names = BTreeSet::new();
    for (n, entry) in file.tasks.iter().enumerate() {
        check_name(&entry.name).with_context(|| format!("tasks[{n}]"))?;
        let name = &entry.name;
        ensure!(names.insert(name), "tasks[{n}]: name {name:?} is taken; each task needs files of its own");
    }
    let entries = file.tasks.into_iter().enumerate().map(|(n, entry)| {
        let place = format!("tasks[{n}] ({})", entry.name);
        Entry::new(n, entry).context(place)
    });
    entries.collect()
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u64,
}

impl VersionOnly {
    fn check(&self) -> anyhow::Result<()> {
        let version = self.version;
        ensure!(version == VERSION, "version is {version}; this program reads version {VERSION}");
        Ok(())
    }
}

/// The first task that is not as tasks are, where the file is JSON otherwise.
fn culprit(text: &[u8]) -> Option<String> {
    let file: serde_json::Value = serde_json::from_slice(text).ok()?;
    let tasks = file.get("tasks")?.as_array()?;
    let bad = |task: &serde_json::Value| TaskEntry::deserialize(task).is_err();
    let n = tasks.iter().position(bad)?;
    Some(match tasks.get(n)?.get("name").and_then(serde_json::Value::as_str) {
        Some(name) => format!("tasks[{n}] ({})", name.escape_debug()),
        None => format!("tasks[{n}]"),
    })
}

/// Names become file names: nothing that could leave the folder or hide in it.
fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    ensure!(
        (1..=LONGEST_NAME).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain),
        "name is {name:?}; it must be 1 to {LONGEST_NAME} of the characters A-Z, a-z, 0-9, _, . and -, and not start \
         with a dot"
    );
    Ok(())
}

impl Entry {
    fn new(n: usize, entry: TaskEntry) -> anyhow::Result<Entry> {
        let geometry = geometry(entry.geometry).context("geometry")?;
        let (q, kv) = (span("q", entry.q)?, span("kv", entry.kv)?);
        let kv_heads = span("kv_heads", entry.kv_heads)?;
        for (name, span) in [("q", q), ("kv", kv), ("kv_heads", kv_heads)] {
            ensure!(!span.is_empty(), "{name} is {span}, which is empty");
        }
        let mask = match entry.mask {
            None => Mask::new(vec![MaskPart { kv_heads, slice: BandSlice::new(q, kv, None, Some(0))? }])?,
            Some(slices) => {
                let owner =
                    slices::Owner { name: "task", heads_of: "geometry", geometry: &geometry, kv_heads };
                slices::mask(&slices, owner)?
            }
        };
        if mask.clip(q, kv, kv_heads).parts().is_empty() {
            bail!(
                "mask counts no cell of queries {q}, keys {kv} and kv_heads {kv_heads}; a task needs at least one \
                 (positions are those of the document, and without a mask a key counts for queries at or after it)"
            );
        }
        let document = DocumentId { rank: 0, index: u32::try_from(n).context("too many tasks")? };
        let task = Task::new(document, q, kv, kv_heads, &mask)?;
        task.check(&geometry)?;
        let direction = match entry.direction {
            DirectionEntry::Forward => Direction::Forward,
            DirectionEntry::Backward => Direction::Backward,
        };
        Ok(Entry { name: entry.name, direction, geometry, task })
    }
}

fn geometry(entry: GeometryEntry) -> anyhow::Result<HeadGeometry> {
    let GeometryEntry { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap } = entry;
    let dtype = match dtype {
        DTypeEntry::F32 => DType::F32,
        DTypeEntry::Bf16 => DType::Bf16,
        DTypeEntry::F16 => DType::F16,
    };
    let (scale, softcap) = (scale as f32, softcap.map(|cap| cap as f32));
    Ok(HeadShape { q_heads, kv_heads, head_dim, v_head_dim, scale, dtype, softcap }.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_folder() {
        for name in ["t0", "a.b-c_D9", "0", &"x".repeat(LONGEST_NAME)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        let long = "x".repeat(LONGEST_NAME + 1);
        for name in ["", ".", "..", ".hidden", "a/b", "../a", "a\\b", "a b", "a\0", "a\n", "\u{e9}", &long] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
