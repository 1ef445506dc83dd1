//! STEP.json as a user writes it, and the step that the planner takes.

use std::path::Path;

use anyhow::Context;

mod files;

pub(crate) use files::{PlanFile, Step};

/// Reads STEP.json. Errors name the file, and the field at fault.
pub(crate) fn read(path: &Path) -> anyhow::Result<Step> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: files::StepFile = serde_json::from_slice(&text).map_err(|error| {
        let before = near(&text, error.line(), error.column());
        anyhow::anyhow!("{} is not a valid step: {error}{before}", path.display())
    })?;
    Step::try_from(file).with_context(|| path.display().to_string())
}

/// What stands before a place in a file, as far as it fits a message: it shows the field at fault.
pub(crate) fn near(text: &[u8], line: usize, column: usize) -> String {
    const SHOWN: usize = 40;
    let line = text.split(|&byte| byte == b'\n').nth(line.saturating_sub(1)).unwrap_or_default();
    let end = column.min(line.len());
    match String::from_utf8_lossy(&line[end.saturating_sub(SHOWN)..end]).trim() {
        "" => String::new(),
        shown => format!(", just after `{shown}`"),
    }
}
