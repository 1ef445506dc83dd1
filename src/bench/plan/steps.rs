//! Where steps come from, and their lanes.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use outboard_attention::{HeadGeometry, HeadShape};
use outboard_planner::{Problem, Rates};

use super::mixes::Draw;
use super::variants::Variant;
use crate::step::read;

/// What the names of step files end in.
const SUFFIX: &str = ".step.json";

/// A step before it is read or drawn.
#[derive(Clone, Debug)]
pub(super) enum Source {
    File { name: String, path: PathBuf },
    Drawn(Draw),
    Variant(Variant),
}

impl Source {
    /// The step's name.
    pub(super) fn name(&self) -> String {
        match self {
            Source::File { name, .. } => name.clone(),
            Source::Drawn(draw) => draw.name(),
            Source::Variant(variant) => variant.name(),
        }
    }

    /// What an error calls it.
    pub(super) fn words(&self) -> String {
        match self {
            Source::File { path, .. } => path.display().to_string(),
            Source::Drawn(_) | Source::Variant(_) => format!("step {}", self.name()),
        }
    }

    /// The step, and how fast its servers compute.
    pub(super) fn step(&self) -> anyhow::Result<(Problem, Rates)> {
        let rates = Rates::default();
        match self {
            Source::Drawn(draw) => Ok((draw.problem().with_context(|| self.words())?, rates)),
            Source::Variant(variant) => Ok((variant.problem().with_context(|| self.words())?, rates)),
            Source::File { path, .. } => {
                let step = read(path)?;
                if step.token_slack.is_some() {
                    bail!(
                        "{}: some documents have no home, and plans are compared with those of the step's own homes; \
                         add them (--free-homes takes them away by itself)",
                        path.display()
                    );
                }
                let flops_per_second = step.flops_per_second.unwrap_or(rates.flops_per_second);
                let rates = step.problem.rates.unwrap_or(Rates { flops_per_second, ..rates });
                // Balance and bytes are judged of plans that are told nothing of links.
                Ok((Problem { rates: None, ..step.problem }, rates))
            }
        }
    }
}

/// The step files of a folder, by name.
pub(super) fn in_folder(folder: &Path) -> anyhow::Result<Vec<Source>> {
    let unreadable = || format!("--steps {}", folder.display());
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(name) = file.strip_suffix(SUFFIX) {
            sources.push(Source::File { name: name.to_owned(), path });
        }
    }
    ensure!(!sources.is_empty(), "--steps {}: the folder holds no file *{SUFFIX}", folder.display());
    sources.sort_by_key(Source::name);
    Ok(sources)
}

/// The step as a tensor-parallel lane of one kv head sees it: the same documents, of which it computes one kv head and
/// the query heads that share it.
pub(super) fn lane(step: &Problem) -> anyhow::Result<Problem> {
    let shape = HeadShape { q_heads: step.geometry.group(), kv_heads: 1, ..step.geometry.shape() };
    Ok(Problem { geometry: HeadGeometry::try_from(shape)?, ..step.clone() })
}
