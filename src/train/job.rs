//! What a run trains, as `{"kind": "job"}`: the first of its JSON lines.

use outboard_trainer::ModelConfig;
use serde::{Deserialize, Serialize};

use super::args::Run;

/// A run's model and ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct JobLine {
    pub(crate) kind: String,
    pub(crate) model: ModelConfig,
    pub(crate) ranks: u32,
    /// Tokens that each rank is dealt in a step.
    pub(crate) tokens: usize,
    /// Whether every rank has an attention server in place.
    pub(crate) in_place: bool,
    /// Dedicated attention servers that the run starts.
    pub(crate) dedicated: u32,
    /// How far above the mean the tokens of a rank may lie; `None` where documents stay where they are dealt to.
    pub(crate) token_slack: Option<f64>,
}

impl JobLine {
    pub(super) fn of(run: &Run) -> JobLine {
        JobLine {
            kind: "job".to_owned(),
            model: run.model,
            ranks: run.train.ranks,
            tokens: run.train.tokens,
            in_place: run.in_place,
            dedicated: run.dedicated,
            token_slack: run.placement.map(|placement| placement.token_slack),
        }
    }
}
