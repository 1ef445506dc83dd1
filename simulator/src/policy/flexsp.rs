//! FlexSP (arXiv 2412.01523): sequence-parallel groups of several degrees, chosen by length.

use super::Planned;
use crate::SimulationError;
use crate::scenario::Sequences;
use crate::setting::Setting;

pub(super) fn plan(setting: &Setting<'_>, batch: &Sequences) -> Result<Planned, SimulationError> {
    let _ = (setting, batch);
    Err(SimulationError::Unsuited { policy: "flexsp".to_owned(), what: "anything yet".to_owned() })
}
